"""Orders that balance expert-parallel groups, and the plans that hold them."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from moeprune.errors import ArtifactError, PlanError
from moeprune.plans import LayerPlan, PruningPlan, RouterShape, check_order
from moeprune.strategies.rearrange import balanced_order, imbalance

CASES = st.tuples(st.integers(0, 999), st.sampled_from([(1, 2), (1, 4), (2, 2), (2, 4), (4, 4), (4, 8)]))


def skewed(seed: int, experts: int = 32) -> NDArray[np.float64]:
    """Loads as routers have them."""
    return np.random.default_rng(seed).pareto(1.5, experts).round(3)


@given(CASES)
def test_the_order_is_a_permutation_inside_router_groups(case: tuple[int, tuple[int, int]]) -> None:
    """Every kept expert is there once, and in the block of its router group."""
    seed, (n_group, groups) = case
    blocks = np.arange(32).reshape(n_group, -1)
    keep = tuple(int(expert) for block in blocks for expert in block[: 16 // n_group])
    order = balanced_order(skewed(seed), keep, groups, n_group=n_group)
    assert sorted(order) == list(keep)
    check_order(0, LayerPlan(keep=keep, order=order), RouterShape(num_experts=32, top_k=1, n_group=n_group))
    assert imbalance(skewed(seed), order, groups) <= imbalance(skewed(seed), keep, groups)


@given(st.integers(0, 999))
def test_no_split_of_few_experts_is_much_better(seed: int) -> None:
    """Against every split of six experts into two groups: within the factor that is known of the greedy rule."""
    load = skewed(seed, 6) + 0.1
    best = min(
        imbalance(load, (*half, *(set(range(6)) - set(half))), 2) for half in itertools.combinations(range(6), 3)
    )
    assert imbalance(load, balanced_order(load, range(6), 2), 2) <= 4 / 3 * best


def test_the_busiest_goes_to_the_idlest() -> None:
    """By hand: 9 | 8, then 2 to the second group, and the last one where there is room."""
    load = np.array([9.0, 8, 2, 1])
    assert balanced_order(load, (0, 1, 2, 3), 2) == (0, 3, 1, 2)
    assert imbalance(load, (0, 1, 2, 3), 2) == pytest.approx(1.7)
    assert imbalance(load, (0, 3, 1, 2), 2) == pytest.approx(1.0)


def test_what_is_balanced_stays_and_no_load_is_no_reason() -> None:
    """An order is only given up for a better one."""
    assert balanced_order(np.ones(8), tuple(range(8)), 4) == tuple(range(8))
    assert balanced_order(np.zeros(8), tuple(range(8)), 4) == tuple(range(8))
    assert imbalance(np.zeros(8), range(8), 4) == 1.0


@pytest.mark.parametrize(
    ("keep", "order", "message"),
    [
        ((0, 1, 4, 5), (0, 1, 4, 4), "does not list the kept"),
        ((0, 1, 4, 5), (0, 1, 4), "does not list the kept"),
        ((0, 1, 4, 5), (0, 4, 1, 5), "out of its router group"),
    ],
)
def test_orders_that_do_not_fit_are_refused(keep: tuple[int, ...], order: tuple[int, ...], message: str) -> None:
    """Whoever edits one list edits the other, and groups are the router's."""
    shape = RouterShape(num_experts=8, top_k=1, n_group=2, topk_group=1)
    with pytest.raises(PlanError, match=f"layer 3: order .*{message}"):
        check_order(3, LayerPlan(keep=keep, order=order), shape)


def test_plans_hold_orders(tmp_path: Path) -> None:
    """The file has an order only where there is one, and reads back the same."""
    layers = {0: LayerPlan(keep=(0, 2), order=(2, 0)), 1: LayerPlan(keep=(0, 2))}
    plan = PruningPlan(layers=layers, config_edits={}, command={}, inputs={}, balance={"groups": 2, "layers": {}})
    assert PruningPlan.load(plan.save(tmp_path / "plan.json")).to_dict() == plan.to_dict()
    assert plan.to_dict()["layers"] == {"0": {"keep": [0, 2], "order": [2, 0]}, "1": {"keep": [0, 2]}}
    assert [plan.layers[layer].placed for layer in (0, 1)] == [(2, 0), (0, 2)]
    text = (tmp_path / "plan.json").read_text().replace('"order": [', '"order": ["a", ')
    (tmp_path / "plan.json").write_text(text)
    with pytest.raises(ArtifactError, match="layer 0: order must be a list of expert numbers"):
        PruningPlan.load(tmp_path / "plan.json")
