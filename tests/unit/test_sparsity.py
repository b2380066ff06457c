"""What goes inside an expert, as options say it, and the record of it."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeprune.errors import ArtifactError, ConfigError
from moeprune.plans_sparsify import SparseLayer, SparsifyPlan, Sparsity


def test_a_fraction_is_exact_decimal_arithmetic() -> None:
    """0.3 of 10 weights are three, whatever floating point makes of it."""
    assert Sparsity.parse(sparsity="0.3").gone(10) == 3
    assert Sparsity.parse(sparsity=0.7).gone(10) == 7
    assert Sparsity.parse(pattern="3:4").fraction == Fraction(1, 4)


@pytest.mark.parametrize(
    ("options", "hint"),
    [
        ({}, "pass one of"),
        ({"sparsity": "0.5", "pattern": "2:4"}, "pass one of"),
        ({"sparsity": "1"}, "0.5"),
        ({"sparsity": "-0.1"}, "0.5"),
        ({"neurons": "half"}, "0.5"),
        ({"pattern": "4:2"}, "2:4"),
        ({"pattern": "4:4"}, "2:4"),
        ({"pattern": "0:4"}, "2:4"),
        ({"pattern": "2/4"}, "2:4"),
    ],
)
def test_what_is_no_amount_is_refused(options: dict[str, str], hint: str) -> None:
    """One thing must be said, and it must be a fraction or N of more than N."""
    with pytest.raises(ConfigError) as caught:
        Sparsity.parse(**options)
    assert hint in caught.value.hint


@given(inner=st.integers(8, 5000), percent=st.integers(1, 99))
def test_neurons_that_stay_suit_kernels_and_are_never_fewer_than_asked(inner: int, percent: int) -> None:
    """The width is a multiple of 64, or of 8 where experts are small, at most one step above what was asked."""
    wanted, step = Sparsity.parse(neurons=f"0.{percent:02d}"), 64 if inner >= 512 else 8
    exact = inner - wanted.gone(inner)
    if -(-exact // step) * step >= inner:
        with pytest.raises(ConfigError, match="takes none"):
            wanted.width(inner)
        return
    kept = wanted.width(inner)
    assert exact <= kept < min(inner, exact + step)
    assert kept % step == 0 or kept == exact < step


@pytest.mark.parametrize("options", [{"sparsity": "0.5"}, {"pattern": "2:4"}, {"neurons": "0.25"}])
def test_a_plan_comes_back_from_its_file(options: dict[str, str], tmp_path: Path) -> None:
    """What went is read as it was written."""
    plan = SparsifyPlan(
        sparsity=Sparsity.parse(**options),
        layers={0: SparseLayer(weights=100, gone=50), 2: SparseLayer(weights=100, gone=30)},
        command={"stage": "sparsify"} | options,
        inputs={"model": "m"},
        config_edits={"moe_intermediate_size": 8},
        notes=("a note",),
    )
    assert SparsifyPlan.load(plan.save(tmp_path / "plan.json")) == plan
    assert plan.measured == 0.4


def test_a_plan_of_another_kind_or_without_layers_is_refused(tmp_path: Path) -> None:
    """A damaged file is an error that names it."""
    file = tmp_path / "plan.json"
    for text in ('{"schema": "moeprune.plan/1", "kind": "drop"}', '{"schema": "moeprune.plan/1", "kind": "sparsify"}'):
        file.write_text(text)
        with pytest.raises(ArtifactError, match=r"plan\.json"):
            SparsifyPlan.load(file)
