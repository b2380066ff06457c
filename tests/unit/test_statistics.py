"""Router statistics: sums that merge, weights of domains, and a file that is read only when it is whole."""

from __future__ import annotations

import dataclasses
import itertools
import json
import pickle
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors.numpy import load, save_file

import moeprune.statistics_file
from moeprune.errors import ArtifactError, ConfigError, MoePruneError, StaleArtifactError, StrategyError
from moeprune.statistics import (
    STATISTICS,
    LayerArrays,
    LayerStatistics,
    RouterStatistics,
    added,
    domain_weights,
    merge_statistics,
)

EXPERTS, LAYERS = 3, (1, 4)


def statistics(
    *domains: str, seed: int = 0, calibration: str = "", layers: tuple[int, ...] = LAYERS, **changes: Any
) -> RouterStatistics:
    """Statistics of random whole numbers in two halves, so that sums are exact."""
    rng = np.random.default_rng(seed)

    def draw(name: str) -> NDArray[Any]:
        shape = (len(domains), *STATISTICS[name].shape(EXPERTS))
        return rng.integers(1, 1000, shape).astype(np.int64 if STATISTICS[name].integer else np.float64)

    first, second = ({layer: {name: draw(name) for name in STATISTICS} for layer in layers} for _ in range(2))
    values: dict[str, Any] = {
        "domains": domains,
        "num_experts": EXPERTS,
        "top_k": 2,
        "layers": {
            layer: {name: added(name, first[layer][name], second[layer][name]) for name in STATISTICS}
            for layer in layers
        },
        "first_half": first,
        "command": {"stage": "collect", "num_samples": seed},
        "inputs": {"model": "m", "calibration": calibration or f"c{seed}"},
        "provenance": ({"source": f"s{seed}", "rows": 3},),
    }
    return RouterStatistics(**values | changes)


# --- the file -------------------------------------------------------------------------------------------------------


def test_a_file_reads_back_as_it_was_written(tmp_path: Path) -> None:
    """Every array, label and envelope entry survives, and writing again gives the same bytes."""
    made = statistics("prose", "code")
    loaded = RouterStatistics.load(made.save(tmp_path / "s.safetensors"))
    for field in dataclasses.fields(made):
        if field.name not in {"layers", "first_half"}:
            assert getattr(loaded, field.name) == getattr(made, field.name), field.name
    for read, written in ((loaded.layers, made.layers), (loaded.first_half, made.first_half)):
        assert read.keys() == written.keys()
        for layer, values in written.items():
            assert read[layer].keys() == values.keys()
            for name, array in values.items():
                np.testing.assert_array_equal(read[layer][name], array, strict=True)
    assert loaded.to_bytes() == made.to_bytes() == (tmp_path / "s.safetensors").read_bytes()
    assert loaded.tokens == int(made.layers[1]["tokens"].sum())


def test_equal_statistics_give_equal_bytes() -> None:
    """Neither the order of layers, nor that of statistics, nor the memory layout of an array shows."""
    made = statistics("prose", "code")
    shuffled = {
        layer: {name: np.asfortranarray(array) for name, array in reversed(values.items())}
        for layer, values in reversed(made.layers.items())
    }
    assert dataclasses.replace(made, layers=shuffled).to_bytes() == made.to_bytes()


def test_the_file_is_plain_safetensors() -> None:
    """Other tools find int64 counts and float64 sums with one row per domain."""
    data = statistics("prose", "code").to_bytes()
    arrays = load(data)
    expected = [
        f"{part}.{layer}.{name}" for part in ("layers", "first_half") for layer in LAYERS for name in STATISTICS
    ]
    assert set(arrays) == set(expected)
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    assert sorted(arrays, key=lambda name: header[name]["data_offsets"]) == expected  # the halves come last
    assert (arrays["layers.1.count"].dtype, arrays["layers.1.count"].shape) == (np.int64, (2, EXPERTS))
    assert (arrays["layers.4.gram"].dtype, arrays["layers.4.gram"].shape) == (np.float64, (2, EXPERTS, EXPERTS))
    assert arrays["layers.4.tokens"].shape == (2,)


def test_statistics_of_nothing_are_a_file_too(tmp_path: Path) -> None:
    """Strategies that need no calibration still get a file, bound to the model."""
    made = RouterStatistics.empty([2, 0], num_experts=4, top_k=2, model="m")
    loaded = RouterStatistics.load(made.save(tmp_path / "s"))
    assert (loaded.domains, loaded.tokens, list(loaded.layers), loaded.inputs) == ((), 0, [0, 2], {"model": "m"})
    assert loaded.layers[2]["gram"].shape == (0, 4, 4)


def spoiled(path: Path, *, arrays: Mapping[str, Any] | None = None, header: Mapping[str, Any] | None = None) -> Path:
    """A statistics file with some arrays or header entries replaced, or removed where None is given."""
    made = statistics("prose", "code")
    values = load(made.to_bytes()) | dict(arrays or {})
    metadata = made._metadata() | dict(header or {})
    save_file(
        {name: value for name, value in values.items() if value is not None},
        path,
        metadata={key: value for key, value in metadata.items() if value is not None},
    )
    return path


@pytest.mark.parametrize(
    ("arrays", "why"),
    [
        (
            {"layers.1.count": np.zeros((2, 4), dtype=np.int64)},
            r"'layers\.1\.count' should be of shape \(2, 3\), it is \(2, 4\)",
        ),
        ({"layers.1.count": np.zeros((1, 3), dtype=np.int64)}, r"should be of shape \(2, 3\)"),
        ({"first_half.1.gram": np.zeros((2, 3))}, r"'first_half.1.gram' should be of shape \(2, 3, 3\)"),
        ({"layers.1.count": np.zeros((2, 3))}, r"'layers\.1\.count' should not be of type F64"),
        ({"layers.1.norm_sum": np.zeros((2, 3), dtype=np.int64)}, "should not be of type I64"),
        ({"layers.1.norm_sum": np.zeros((2, 3), dtype=np.float32)}, "should not be of type F32"),
        ({"layers.1.magic": np.zeros((2, 3))}, r"holds an unknown statistic 'layers\.1\.magic'"),
        ({"layers.01.count": np.zeros((2, 3), dtype=np.int64)}, "holds an unknown statistic"),
        ({"blocks.1.count": np.zeros((2, 3), dtype=np.int64)}, "holds an unknown statistic"),
        ({"count": np.zeros((2, 3), dtype=np.int64)}, "holds an unknown statistic"),
        ({f"layers.{layer}.{name}": None for layer in LAYERS for name in STATISTICS}, "holds no layers"),
        ({"first_half.4.gram": None}, "the first half of layer 4 does not hold the statistics of the whole"),
        ({f"layers.4.{name}": None for name in STATISTICS}, "the first half of layer 4 does not hold"),
    ],
)
def test_arrays_that_are_not_what_they_should_be(tmp_path: Path, arrays: dict[str, Any], why: str) -> None:
    """Wrong shapes, types and names are refused by name when the file is opened."""
    with pytest.raises(ArtifactError, match=f"bad.safetensors.*{why}"):
        RouterStatistics.load(spoiled(tmp_path / "bad.safetensors", arrays=arrays))


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("part", ["layers", "first_half"])
def test_numbers_that_are_not_finite_are_refused_when_they_are_read(tmp_path: Path, part: str, value: float) -> None:
    """Opening a file reads no array; whatever needs the array stops with its name, and a copy is not left behind."""
    array = np.zeros((2, EXPERTS))
    array[-1, -1] = value
    path = spoiled(tmp_path / "bad.safetensors", arrays={f"{part}.4.norm_sum": array})
    opened = RouterStatistics.load(path)
    assert opened.layer(4).gram.shape == (EXPERTS, EXPERTS)
    why = rf"bad.safetensors: '{part}\.4\.norm_sum' holds numbers that are not finite"
    for read in (lambda: getattr(opened, part)[4]["norm_sum"], lambda: opened.save(tmp_path / "copy")):
        with pytest.raises(ArtifactError, match=why):
            read()
    assert [file.name for file in tmp_path.iterdir()] == ["bad.safetensors"]


def test_files_without_halves_are_read(tmp_path: Path) -> None:
    """Halves are an addition: a file that holds none is as good as before."""
    made = dataclasses.replace(statistics("prose"), first_half={})
    loaded = RouterStatistics.load(made.save(tmp_path / "s"))
    assert loaded.first_half == {}
    assert_equal(loaded, made)


def test_only_what_is_asked_for_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A strategy over one statistic of one layer reads that array, however large the file is."""
    reads: list[str] = []
    read = moeprune.statistics_file._read
    path = statistics("prose", "code").save(tmp_path / "s")
    monkeypatch.setattr(
        moeprune.statistics_file,
        "_read",
        lambda file, path, prefix, name: (reads.append(name), read(file, path, prefix, name))[1],
    )
    layer = RouterStatistics.load(path).layer(4, {"code": 2.0})
    layer.gated_norm_sum  # noqa: B018
    assert reads == ["tokens", "gated_norm_sum"]


def test_a_file_that_is_cut_short_after_it_was_opened_is_an_error(tmp_path: Path) -> None:
    """An array whose bytes are gone is refused by the file's name, and one that was replaced is read as it was."""
    path = statistics("prose").save(tmp_path / "s")
    replaced = RouterStatistics.load(path)
    before = np.array(replaced.layers[1]["count"])
    statistics("prose", "code").save(path)
    assert np.array_equal(replaced.layers[1]["count"], before)
    path = statistics("prose").save(tmp_path / "t")
    loaded = RouterStatistics.load(path)
    with path.open("r+b") as handle:
        handle.truncate(path.stat().st_size // 2)
    with pytest.raises(ArtifactError, match="t was cut short"):
        _ = [array for layer in loaded.layers.values() for array in layer.values()]


def test_what_was_read_cannot_be_written(tmp_path: Path) -> None:
    """Changing an array of a file would change nothing, so it is refused."""
    loaded = RouterStatistics.load(statistics("prose").save(tmp_path / "s"))
    with pytest.raises(ValueError, match="read-only"):
        loaded.layers[1]["count"][0, 0] = 7  # type: ignore[index]


@pytest.mark.parametrize(
    ("header", "why"),
    [
        ({"schema": "moeprune.statistics/2"}, "is not a moeprune.statistics/1 file: its schema is"),
        ({"schema": None}, "it has no schema"),
        ({"domains": None}, "has no 'domains' in its header"),
        ({"domains": '"pc"'}, "has a damaged 'domains'"),
        ({"domains": "[1, 2]"}, "the domains or inputs in its header are no distinct labels"),
        ({"domains": '["a", "a"]'}, "the domains or inputs in its header are no distinct labels"),
        ({"domains": '["a"]'}, r"of shape \(1,.*\), it is \(2,"),
        ({"num_experts": "true"}, "has a damaged 'num_experts'"),
        ({"num_experts": "many"}, "is not valid JSON"),
        ({"top_k": "2.5"}, "has a damaged 'top_k'"),
        ({"inputs": "[]"}, "has a damaged 'inputs'"),
        ({"inputs": '{"model": 1}'}, "no distinct labels"),
        ({"command": '"collect"'}, "has a damaged 'command'"),
        ({"provenance": "{}"}, "has a damaged 'provenance'"),
    ],
)
def test_headers_that_are_not_what_they_should_be(tmp_path: Path, header: dict[str, Any], why: str) -> None:
    """The header key is named."""
    with pytest.raises(ArtifactError, match=f"bad.safetensors.*{why}"):
        RouterStatistics.load(spoiled(tmp_path / "bad.safetensors", header=header))


def test_files_of_another_kind_are_refused(tmp_path: Path) -> None:
    """Weights (also of types that numpy lacks), pickles, text, nothing and a folder."""
    header = json.dumps({"w": {"dtype": "BF16", "shape": [1], "data_offsets": [0, 2]}}).encode()
    for content in (
        len(header).to_bytes(8, "little") + header + b"\x00\x00",
        pickle.dumps({"schema": "moeprune.statistics/1"}),
        b"plain text, and quite a bit of it",
        b"",
    ):
        (tmp_path / "x").write_bytes(content)
        with pytest.raises(ArtifactError, match=r"x.* has no schema|cannot read statistics .*x"):
            RouterStatistics.load(tmp_path / "x")
    for path in (tmp_path, tmp_path / "none"):
        with pytest.raises(ArtifactError, match="cannot read statistics"):
            RouterStatistics.load(path)


@settings(deadline=None, max_examples=150)
@given(st.integers(0, 2**31), st.binary(min_size=1, max_size=3), st.booleans())
def test_a_damaged_file_is_refused_or_read(place: int, junk: bytes, cut: bool) -> None:
    """Whatever happens to the bytes, no other exception comes out."""
    data = bytearray(statistics("prose").to_bytes())
    # two thirds of the damage in the header, where it matters most
    place %= len(data) if place % 3 == 0 else 8 + int.from_bytes(data[:8], "little")
    data[place : None if cut else place + len(junk)] = junk
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x"
        path.write_bytes(data)
        try:
            loaded = RouterStatistics.load(path)
            read = [array for arrays in loaded.layers.values() for array in arrays.values()]
        except ArtifactError:
            return
        assert read


# --- domains --------------------------------------------------------------------------------------------------------


def test_domains_add_up_with_their_weights() -> None:
    """A weight multiplies a domain's sums, 1 where none is given; the largest value is not a sum."""
    made = statistics("prose", "code")
    layer = made.layer(4, {"code": 2.5})
    for name, array in made.layers[4].items():
        prose, code = array
        whole = np.maximum(prose, code) if STATISTICS[name].merge == "max" else prose + 2.5 * code
        np.testing.assert_array_equal(getattr(layer, name), whole)
    np.testing.assert_array_equal(made.layer(4).count, made.layers[4]["count"].sum(axis=0))


def test_a_domain_of_weight_zero_is_not_there() -> None:
    """Also its largest value does not count."""
    made = statistics("prose", "code")
    for row, other in ((0, "code"), (1, "prose")):
        layer = made.layer(1, {other: 0})
        for name, array in made.layers[1].items():
            np.testing.assert_array_equal(getattr(layer, name), array[row])


@pytest.mark.parametrize(
    ("weights", "why"),
    [
        ({"cod": 1}, "no calibration domain 'cod' to weigh .*did you mean 'code'"),
        ({"code": -1}, "the weight of domain 'code' must be a number of at least 0"),
        ({"code": float("nan")}, "the weight of domain 'code' must be a number"),
        ({"code": float("inf")}, "the weight of domain 'code' must be a number"),
        ({"code": 0, "prose": 0}, "every domain has weight 0"),
    ],
)
def test_weights_that_cannot_work(weights: dict[str, float], why: str) -> None:
    """The domain is named, and the nearest one where it is misspelt."""
    with pytest.raises(ConfigError, match=why):
        domain_weights(["prose", "code"], weights)


def test_weights_come_in_the_order_of_the_domains() -> None:
    """Whatever the order in which they were given."""
    assert domain_weights(["a", "b", "c"], {"c": 0, "a": 3}).tolist() == [3, 1, 0]
    assert domain_weights([], None).tolist() == []


# --- one layer ------------------------------------------------------------------------------------------------------


def test_reading_a_statistic_that_does_not_exist_names_the_nearest() -> None:
    """A slip in a callable strategy is a strategy error, not an AttributeError."""
    with pytest.raises(StrategyError, match=r"there is no statistic 'gated_norm' .*'gated_norm_sum'"):
        statistics("prose").layer(1).gated_norm  # noqa: B018


def test_reading_a_statistic_that_was_not_collected_says_how_to_get_it() -> None:
    """Absent from the file, or from a file of no tokens."""
    made = statistics("prose")
    partial = dataclasses.replace(made, layers={1: {"tokens": made.layers[1]["tokens"]}})
    empty = RouterStatistics.empty([1], num_experts=EXPERTS, top_k=2, model="m")
    assert float(partial.layer(1).tokens) == made.tokens
    for source in (partial, empty):
        with pytest.raises(StrategyError, match=r"has no 'count' for layer 1 .*--calibration"):
            source.layer(1).count  # noqa: B018
    assert dataclasses.replace(made, layers={1: {}}).tokens == 0


def test_draws_depend_on_seed_and_layer_only() -> None:
    """Each layer has its own stream, the same every time."""

    def draw(layer: int, seed: int) -> list[float]:
        stats: LayerStatistics = statistics("prose").layer(layer, seed=seed)
        assert stats.rng.random(3).tolist() == stats.rng.random(3).tolist()
        return stats.rng.random(3).tolist()

    assert draw(1, 0) == draw(1, 0)
    assert len({tuple(draw(layer, seed)) for layer in LAYERS for seed in (0, 1)}) == 4
    with pytest.raises(ConfigError, match="--seed must be at least 0, not -1"):
        draw(1, -1)


# --- merging --------------------------------------------------------------------------------------------------------


def assert_equal(first: RouterStatistics, second: RouterStatistics) -> None:
    """Same domains in the same order, same values of all data and of the first half."""
    assert first.domains == second.domains
    for one, other in ((first.layers, second.layers), (first.first_half, second.first_half)):
        assert one.keys() == other.keys()
        for layer, values in one.items():
            for name, array in values.items():
                np.testing.assert_array_equal(array, other[layer][name], strict=True)


def test_merging_adds_sums_and_takes_the_larger_maximum() -> None:
    """Shared domains add up, others are put side by side."""
    first, second = statistics("prose", "code", seed=1), statistics("maths", "prose", seed=2)
    merged = first.merge(second)
    assert merged.domains == ("prose", "code", "maths")
    for part, layer in itertools.product(("layers", "first_half"), LAYERS):
        for name, array in getattr(merged, part)[layer].items():
            mine, theirs = (getattr(source, part)[layer][name] for source in (first, second))
            both = np.maximum(mine[0], theirs[1]) if name == "max_abs_down" else mine[0] + theirs[1]
            np.testing.assert_array_equal(array, np.stack([both, mine[1], theirs[0]]), strict=True)
    assert merged.tokens == first.tokens + second.tokens


def test_a_merged_file_says_what_it_was_made_of(tmp_path: Path) -> None:
    """Commands, calibration fingerprints and sources of all parts; the arrays survive a file."""
    merged = merge_statistics([statistics("a", seed=seed) for seed in (3, 1, 2)])
    assert merged.command["of"] == [{"stage": "collect", "num_samples": seed} for seed in (3, 1, 2)]
    assert merged.inputs == {"model": "m", "calibration": "c1+c2+c3"}
    assert [entry["source"] for entry in merged.provenance] == ["s3", "s1", "s2"]
    assert_equal(RouterStatistics.load(merged.save(tmp_path / "s")), merged)


@settings(deadline=None)
@given(st.lists(st.lists(st.sampled_from("abc"), unique=True, max_size=3), min_size=3, max_size=3))
def test_merging_is_associative(domains: list[list[str]]) -> None:
    """Halves of halves give the same bytes as one after another, so a run may be split anywhere."""
    first, second, third = (statistics(*labels, seed=seed) for seed, labels in enumerate(domains))
    assert first.merge(second).merge(third).to_bytes() == first.merge(second.merge(third)).to_bytes()


def test_merging_with_nothing_changes_no_number() -> None:
    """Statistics of no data are the neutral element."""
    made = statistics("prose", "code")
    nothing = RouterStatistics.empty(LAYERS, num_experts=EXPERTS, top_k=2, model="m")
    assert_equal(made.merge(nothing), made)
    assert_equal(nothing.merge(made), made)
    assert made.merge(nothing).inputs == made.inputs


def test_order_of_merging_only_orders_the_domains() -> None:
    """The numbers of each domain do not depend on which file came first."""
    first, second = statistics("a", "b", seed=1), statistics("b", "c", seed=2)
    one, other = first.merge(second), second.merge(first)
    rows = [other.domains.index(domain) for domain in one.domains]
    for layer in LAYERS:
        for name, array in one.layers[layer].items():
            np.testing.assert_array_equal(array, other.layers[layer][name][rows])
    assert one.inputs == other.inputs


@pytest.mark.parametrize(
    ("changes", "kind", "why"),
    [
        ({"inputs": {"model": "other"}}, StaleArtifactError, "were made for different models"),
        ({"inputs": {}}, StaleArtifactError, "were made for different models"),
        ({"layers": (1,)}, ArtifactError, "share layers such as 1 and not others such as 4"),
        ({"layers": (4, 5), "calibration": "c0"}, ArtifactError, "share layers such as 4 and not others such as 1"),
        ({"layers": (2, 3), "seed": 5}, ArtifactError, "of different layers and of different calibration data"),
        ({"num_experts": 4}, ArtifactError, "different numbers of experts"),
        ({"top_k": 1}, ArtifactError, "different numbers of experts"),
    ],
)
def test_what_cannot_be_merged(changes: dict[str, Any], kind: type[ArtifactError], why: str) -> None:
    """Another model, other layers, another router."""
    with pytest.raises(kind, match=why):
        statistics("prose").merge(statistics("prose", **changes))


def test_statistics_of_unbound_models_merge_when_they_fit() -> None:
    """What ``observe`` measured on a model that no folder holds has no fingerprint."""
    first, second = (statistics("a", seed=seed, inputs={}) for seed in (1, 2))
    assert first.merge(second).inputs == {"calibration": ""}


def test_merging_many_files_does_not_nest(tmp_path: Path) -> None:
    """A thousand files of one process each are added up, as small numbers show exactly."""
    path = statistics("a", seed=1).save(tmp_path / "s")
    merged = merge_statistics([RouterStatistics.load(path)] * 1000)
    np.testing.assert_array_equal(merged.layers[4]["gram"], 1000 * statistics("a", seed=1).layers[4]["gram"])


def test_other_statistics_are_not_added() -> None:
    """Files of the same layers that measured other things are refused."""
    made = statistics("a")
    partial = {layer: {"tokens": values["tokens"]} for layer, values in made.layers.items()}
    with pytest.raises(ArtifactError, match="do not hold the same statistics"):
        made.merge(dataclasses.replace(made, layers=partial, first_half={}))


# --- halves -----------------------------------------------------------------------------------------------------------


def test_halves_add_up_to_the_whole() -> None:
    """Each half on its own; the largest value belongs to both."""
    made = statistics("prose", "code")
    first, second = made.halves()
    for layer in LAYERS:
        for name, array in made.layers[layer].items():
            mine, theirs = first.layers[layer][name], second.layers[layer][name]
            if name == "max_abs_down":
                np.testing.assert_array_equal(mine, array)
                np.testing.assert_array_equal(theirs, array)
            else:
                np.testing.assert_array_equal(mine, made.first_half[layer][name])
                np.testing.assert_array_equal(mine + theirs, array, strict=True)
    assert dataclasses.replace(made, first_half={}).halves()[0].layers == {}


def test_halves_are_lost_where_one_part_has_none() -> None:
    """A half of only some of the data would be no half; a part without tokens does not matter."""
    made, without = statistics("a", seed=1), dataclasses.replace(statistics("a", seed=2), first_half={})
    nothing = RouterStatistics.empty(LAYERS, num_experts=EXPERTS, top_k=2, model="m")
    assert made.merge(without).first_half == without.merge(made).first_half == {}
    assert made.merge(nothing).first_half.keys() == made.first_half.keys()
    assert nothing.merge(nothing).first_half == {}


# --- layers -----------------------------------------------------------------------------------------------------------


def slice_of(made: RouterStatistics, *layers: int) -> RouterStatistics:
    """What a collection of only some layers would have given."""
    return dataclasses.replace(
        made,
        layers={layer: made.layers[layer] for layer in layers},
        first_half={layer: made.first_half[layer] for layer in layers},
        command=dict(made.command) | {"layers": list(layers)},
    )


def whole(*domains: str, seed: int = 0) -> RouterStatistics:
    """Statistics of three layers that all saw the same tokens."""
    made = statistics(*domains, seed=seed, layers=(0, 1, 2))
    for part in (made.layers, made.first_half):
        tokens = part[0]["tokens"]
        for values in part.values():
            values["tokens"] = tokens  # type: ignore[index]
    return made


def test_layers_put_together_are_statistics() -> None:
    """Sums by layer, in whatever order, give the statistics of all layers in ascending order."""
    made = whole("a", "b")
    layers = {
        layer: LayerArrays(total=dict(made.layers[layer]), first_half=dict(made.first_half[layer]))
        for layer in (2, 0, 1)
    }
    built = RouterStatistics.of_layers(
        layers, domains=["a", "b"], num_experts=EXPERTS, top_k=2, command=made.command, inputs=made.inputs
    )
    assert list(built.layers) == [0, 1, 2]
    assert_equal(built, made)


@pytest.mark.parametrize("half", ["total", "first_half"])
def test_layers_that_saw_other_tokens_are_refused(half: str) -> None:
    """A forward pass that ended between two layers shows in the domain it was of, also where halves were mixed up."""
    made = whole("a", "b")
    layers = {
        layer: LayerArrays(total=dict(made.layers[layer]), first_half=dict(made.first_half[layer])) for layer in (0, 1)
    }
    getattr(layers[1], half)["tokens"] = getattr(layers[1], half)["tokens"] + np.array([0, 1])
    with pytest.raises(MoePruneError, match="did not see the same tokens in domain 'b'"):
        RouterStatistics.of_layers(
            layers, domains=["a", "b"], num_experts=EXPERTS, top_k=2, command={}, inputs=made.inputs
        )


def test_slices_of_layers_become_the_whole(tmp_path: Path) -> None:
    """Files of some layers each of one collection are put side by side, and its sources are named once."""
    made = whole("a", "b")
    parts = [slice_of(made, 2), slice_of(made, 0), slice_of(made, 1)]
    merged = merge_statistics(RouterStatistics.load(part.save(tmp_path / str(n))) for n, part in enumerate(parts))
    assert list(merged.layers) == [0, 1, 2]
    assert_equal(merged, made)
    assert merged.provenance == made.provenance
    assert merged.inputs == made.inputs
    assert [command["layers"] for command in merged.command["of"]] == [[2], [0], [1]]


@pytest.mark.parametrize("order", itertools.permutations(range(4)))
def test_slices_are_put_together_before_collections_are_added_up(order: tuple[int, ...]) -> None:
    """Whatever the order of the files, two collections in two slices each give their sum."""
    first, second = whole("a", seed=1), whole("a", "b", seed=2)
    parts = [slice_of(first, 0, 2), slice_of(first, 1), slice_of(second, 0), slice_of(second, 1, 2)]
    merged = merge_statistics(parts[place] for place in order)
    expected = first.merge(second)
    assert merged.tokens == expected.tokens
    for layer in (0, 1, 2):
        for name, array in expected.layers[layer].items():
            np.testing.assert_array_equal(merged.layers[layer][name].sum(axis=0), array.sum(axis=0))


def test_slices_of_other_tokens_are_not_one_collection() -> None:
    """The fingerprint is the same and the tokens are not: one of the runs was not whole."""
    made = whole("a", "b")
    other = slice_of(made, 1)
    other = dataclasses.replace(other, layers={1: dict(other.layers[1]) | {"tokens": np.array([1, 1])}})
    for wrong in (other, dataclasses.replace(slice_of(made, 1), domains=("b", "a"))):
        with pytest.raises(ArtifactError, match="the slices of layers did not see the same tokens"):
            slice_of(made, 0).merge(wrong)


def test_slices_of_unknown_data_are_not_put_together() -> None:
    """Without a fingerprint of the calibration data nobody knows whether it was the same."""
    made = dataclasses.replace(whole("a"), inputs={"model": "m"})
    with pytest.raises(ArtifactError, match="of different layers and of different calibration data"):
        slice_of(made, 0).merge(slice_of(made, 1))
