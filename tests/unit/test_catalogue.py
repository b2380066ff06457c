"""The tables of statistics, and files that hold more than the core sums."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load, save_file

from moeprune.catalogue import BUILTIN, FACTS, MORE, ROWS, STATISTICS, find, in_order
from moeprune.errors import ArtifactError, StrategyError
from moeprune.statistics import LayerArrays, RouterStatistics, merge_statistics

EXPERTS, SIZES, DOMAINS = 3, {"H": 4, "I": 2}, ("prose", "code")
LAYERS = (1, 4)


def statistics(seed: int = 0, rows: int = 2, **changes: Any) -> RouterStatistics:
    """Random whole numbers for everything that is built in, of layers whose tokens agree."""
    rng = np.random.default_rng(seed)

    def draw(table: Mapping[str, Any], *domains: int) -> dict[str, Any]:
        return {
            name: rng.integers(1, 50, (*domains, *one.shape(EXPERTS, {**SIZES, "S": rows}))).astype(
                np.int64 if one.integer else np.float64
            )
            for name, one in table.items()
        }

    def layer() -> LayerArrays:
        sums = {name: one for name, one in {**STATISTICS, **MORE}.items() if name != "tokens"}
        first, tokens = draw(sums, 2) | {"tokens": np.array([5, 7])}, np.array([11, 13])
        total = {name: 2 * array for name, array in first.items()} | {"tokens": tokens}
        own = draw(ROWS) | {"path_domain": np.arange(rows) % 2, "path_row": np.arange(rows)}
        return LayerArrays(total=total, first_half=first, rows=own, facts=draw(FACTS))

    values: dict[str, Any] = {
        "domains": DOMAINS,
        "num_experts": EXPERTS,
        "top_k": 2,
        "command": {"stage": "collect"},
        "inputs": {"model": "m", "calibration": f"c{seed}"},
    }
    return RouterStatistics.of_layers({index: layer() for index in LAYERS}, **values | changes)


def spoiled(path: Path, **arrays: Any) -> Path:
    """The file with arrays replaced or added; a name's last dots are written as two underscores."""
    made = statistics()
    values = load(made.to_bytes()) | {name.replace("__", "."): array for name, array in arrays.items()}
    save_file(values, path, metadata=made._metadata())
    return path


def test_no_name_has_two_meanings() -> None:
    """The tables are apart, and what has no axis of domains is told by its point."""
    assert len(BUILTIN) == len(STATISTICS) + len(MORE) + len(ROWS) + len(FACTS)
    assert {name for name, one in BUILTIN.items() if not one.by_domain} == ROWS.keys() | FACTS.keys()
    assert {name for name, one in BUILTIN.items() if "S" in one.axes} == ROWS.keys()
    assert find("nothing_of_the_kind") is None
    assert in_order(["zebra", "gram", "aardvark", "count"]) == ("count", "gram", "aardvark", "zebra")


def test_everything_reads_back(tmp_path: Path) -> None:
    """Sums, halves, rows and facts, with the sizes of their axes, and equal bytes again."""
    made = statistics()
    loaded = RouterStatistics.load(made.save(tmp_path / "s"))
    assert loaded.sizes == made.sizes == SIZES
    assert loaded.to_bytes() == made.to_bytes()
    for part in ("layers", "first_half", "rows", "facts"):
        for layer, arrays in getattr(made, part).items():
            assert getattr(loaded, part)[layer].keys() == arrays.keys()
            for name, array in arrays.items():
                np.testing.assert_array_equal(getattr(loaded, part)[layer][name], array, strict=True)
    keys = load(made.to_bytes()).keys()
    assert {"weights.4.gate_col_l1", "sequences.1.path_loss", "layers.1.gated_mid_sq_sum"} <= keys


@pytest.mark.parametrize(
    ("arrays", "why"),
    [
        ({"layers__1__gated_in_sq_sum": np.zeros((2, 3, 5))}, r"should be of shape \(2, 3, 4\), it is \(2, 3, 5\)"),
        ({"weights__1__down_col_l1": np.zeros((2, 3, 2))}, r"should be of shape \(3, 2\), it is \(2, 3, 2\)"),
        ({"weights__1__count": np.zeros((2, 3), dtype=np.int64)}, "unknown statistic 'weights.1.count'"),
        ({"layers__1__weight_abs_sum": np.zeros((2, 3))}, "unknown statistic 'layers.1.weight_abs_sum'"),
        ({"sequences__1__weight_abs_sum": np.zeros(3)}, "unknown statistic 'sequences.1.weight_abs_sum'"),
        ({"sequences__1__path_prob": np.zeros((2, 4))}, r"should be of shape \(2, 3\)"),
        ({"weights__7__weight_abs_sum": np.zeros(3)}, "holds weights of layer 7 and none of its sums"),
    ],
)
def test_what_is_not_as_it_should_be_is_refused(tmp_path: Path, arrays: dict[str, Any], why: str) -> None:
    """Wrong shapes, and statistics in a part of the file where they do not belong."""
    with pytest.raises(ArtifactError, match=why):
        RouterStatistics.load(spoiled(tmp_path / "s", **arrays))


@pytest.mark.parametrize(
    ("sizes", "why"),
    [('{"H": 4}', "no size of the axis 'I'"), ('{"H": 4, "I": 0}', "no whole numbers"), ("[4]", "damaged 'sizes'")],
)
def test_sizes_must_be_there(tmp_path: Path, sizes: str, why: str) -> None:
    """The header tells how long the axes are before any array is read."""
    made = statistics()
    save_file(load(made.to_bytes()), tmp_path / "s", metadata=made._metadata() | {"sizes": sizes})
    with pytest.raises(ArtifactError, match=why):
        RouterStatistics.load(tmp_path / "s")


def test_a_layer_reads_facts_and_rows_as_they_are() -> None:
    """Domains are weighted in sums alone; whole numbers that are no sums stay whole."""
    made = statistics()
    layer = made.layer(4, {"prose": 0.5, "code": 0.0})
    np.testing.assert_array_equal(layer.gated_in_sq_sum, 0.5 * made.layers[4]["gated_in_sq_sum"][0])
    np.testing.assert_array_equal(layer.gate_col_l1, made.facts[4]["gate_col_l1"])
    np.testing.assert_array_equal(layer.path_loss, made.rows[4]["path_loss"])
    assert layer.path_domain.dtype.kind == layer.weight_numel.dtype.kind == "i"
    nothing = RouterStatistics.empty(LAYERS, num_experts=EXPERTS, top_k=2, model="m", facts=made.facts).layer(4)
    np.testing.assert_array_equal(nothing.weight_sq_sum, made.facts[4]["weight_sq_sum"])
    for name, hint in (("count", "--calibration"), ("easy_ep_sum", "--calibration"), ("path_loss", "--calibration")):
        with pytest.raises(StrategyError, match=f"no '{name}' for layer 4 .*{hint}"):
            getattr(nothing, name)


def test_merging_joins_rows_and_keeps_facts() -> None:
    """In whatever order, with a file of no data among them, and as slices of layers."""
    first, second = statistics(), statistics(1, rows=3, domains=("code", "maths"))
    empty = RouterStatistics.empty(LAYERS, num_experts=EXPERTS, top_k=2, model="m", facts=first.facts)
    for parts in ([empty, first, second], [first, empty, second]):
        merged = merge_statistics(parts)
        assert merged.rows[1]["path_domain"].tolist() == [0, 1, 1, 2, 1]
        np.testing.assert_array_equal(merged.rows[4]["path_norm"][2:], second.rows[4]["path_norm"])
        np.testing.assert_array_equal(merged.facts[4]["up_col_l1"], first.facts[4]["up_col_l1"])
        np.testing.assert_array_equal(merged.layers[1]["easy_ep_sum"][2], second.layers[1]["easy_ep_sum"][1])
        assert merged.sizes == SIZES

    def slice_of(layer: int) -> RouterStatistics:
        parts = {part: {layer: getattr(first, part)[layer]} for part in ("layers", "first_half", "rows", "facts")}
        return dataclasses.replace(first, **parts)  # type: ignore[arg-type]

    whole = slice_of(4).merge(slice_of(1))
    assert dataclasses.replace(whole, command=first.command).to_bytes() == first.to_bytes()


def test_halves_have_every_other_sequence() -> None:
    """Facts are in both, sums as they were seen, rows by their numbers."""
    halves = statistics(rows=5).halves()
    assert [half.rows[1]["path_row"].tolist() for half in halves] == [[0, 2, 4], [1, 3]]
    assert all(half.facts == halves[0].facts for half in halves)
    total = sum(half.layers[4]["transition_count"] for half in halves)
    np.testing.assert_array_equal(total, statistics(rows=5).layers[4]["transition_count"])
