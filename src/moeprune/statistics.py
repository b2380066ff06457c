"""Router statistics: additive sums per domain, layer and expert, and the file that holds them.

Sums, never means: two files add up to the file of the concatenated data, domains can be weighted afterwards, and any
ratio can be planned from one calibration. On disk (schema ``moeprune.statistics/1``) they are a safetensors file with
tensors ``layers.<decoder layer on disk>.<statistic>``, whose first axis is the domains in the order of the header key
``domains``; counts are int64, everything else float64. Tensors ``first_half.<layer>.<statistic>`` hold the same of half
of the calibration data, so that one can see how far two halves agree. What the weights alone say lies in
``weights.<layer>.<statistic>``, what is known of single sequences in ``sequences.<layer>.<statistic>``; neither has an
axis of domains. A file is read array by array, when needed.
"""

from __future__ import annotations

import dataclasses
import functools
import io
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moeprune._files import PathLike, check_schema, envelope, safetensors_header, write_atomic
from moeprune.catalogue import FACTS, FIXED, STATISTICS, Statistic, find, in_order, known, known_names
from moeprune.errors import (
    ArtifactError,
    ConfigError,
    MoePruneError,
    StaleArtifactError,
    StrategyError,
    first_line,
    nearest,
)
from moeprune.statistics_file import Lazy, check_published, decode, on_disk, open_file, stored_layers

__all__ = ["STATISTICS", "LayerArrays", "LayerStatistics", "RouterStatistics", "Statistic", "merge_statistics"]

SCHEMA = "moeprune.statistics/1"
RARE = 20  # an expert seen by fewer tokens than this has a score made of noise
FloatArray = NDArray[np.float64]
AnyArray = NDArray[Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerArrays:
    """What was measured on one decoder layer, by statistic.

    Attributes:
        total: sums of all data, [domains, ...].
        first_half: of half of it.
        rows: what is known of single sequences, [S, ...].
        facts: of the weights alone.
    """

    total: dict[str, AnyArray]
    first_half: dict[str, AnyArray]
    rows: dict[str, AnyArray] = field(default_factory=dict)
    facts: dict[str, AnyArray] = field(default_factory=dict)


class LayerStatistics:
    """The statistics of one layer with the domains already weighted: ``layer.gated_norm_sum`` is an [E] array.

    What the weights alone say, and rows of single sequences, are as they were measured. Reading a statistic that was
    not collected raises :class:`StrategyError`.
    """

    def __init__(
        self,
        values: Mapping[str, AnyArray],
        *,
        layer: int,
        num_experts: int,
        seed: int = 0,
        weights: FloatArray | None = None,
    ) -> None:
        self._values = values
        self._weights = weights
        self._empty = not np.any(values.get("tokens", 0))
        self.layer = layer
        self.num_experts = num_experts
        self.seed = seed

    def __getattr__(self, name: str) -> FloatArray:
        if name.startswith("__"):
            raise AttributeError(name)
        statistic = find(name)
        if statistic is None:
            raise StrategyError(f"there is no statistic {name!r}", nearest(name, known_names()))
        if name not in self._values or (self._empty and statistic.by_domain):
            hint = self._how_to_get(name, statistic)
            raise StrategyError(f"the statistics file has no {name!r} for layer {self.layer}", hint)
        values = np.asarray(self._values[name])
        return values if statistic.integer and not statistic.by_domain else values.astype(np.float64, copy=False)

    def _how_to_get(self, name: str, statistic: Statistic) -> str:
        if name in FACTS:
            return "collect again: it is read from the model's weights"
        if name in STATISTICS or (self._empty and statistic.point != "weights"):
            return "collect again with calibration data (--calibration)"
        return f"collect again with --statistics {name}"

    @property
    def path_weight(self) -> FloatArray:
        """Weights [S] of the sequences that rows are of: those of their domains."""
        domain_S = np.asarray(self.path_domain, dtype=np.int64)
        return np.ones(len(domain_S)) if self._weights is None else self._weights[domain_S]

    @property
    def rng(self) -> np.random.Generator:
        """A generator of this layer's own, for strategies that draw."""
        if self.seed < 0:
            raise ConfigError(f"--seed must be at least 0, not {self.seed}")
        return np.random.default_rng([self.seed, self.layer])


@dataclass(frozen=True, kw_only=True)
class RouterStatistics:
    """What one calibration pass measured.

    Attributes:
        domains: labels of the calibration data, the first axis of every array.
        num_experts: routed experts per layer (E).
        top_k: experts per token.
        layers: arrays of shape [domains, ...] by decoder layer and statistic, which may be read from a file anew each
            time that one is asked for.
        command: canonical options of the collection.
        inputs: fingerprints: ``model`` and ``calibration``.
        provenance: where the calibration data came from, one entry per source.
        first_half: the same arrays of half of the calibration data, for the layers of which they are known.
        facts: what the weights alone say, by decoder layer and statistic; without an axis of domains.
        rows: what is known of single sequences, arrays of shape [S, ...] by decoder layer and statistic.
        sizes: of the axes H and I, where a statistic has them.
    """

    domains: tuple[str, ...]
    num_experts: int
    top_k: int
    layers: Mapping[int, Mapping[str, AnyArray]]
    command: Mapping[str, Any]
    inputs: Mapping[str, str]
    provenance: Sequence[Mapping[str, Any]] = ()
    first_half: Mapping[int, Mapping[str, AnyArray]] = field(default_factory=dict)
    facts: Mapping[int, Mapping[str, AnyArray]] = field(default_factory=dict)
    rows: Mapping[int, Mapping[str, AnyArray]] = field(default_factory=dict)
    sizes: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def of_layers(
        cls,
        layers: Mapping[int, LayerArrays],
        *,
        domains: Sequence[str],
        num_experts: int,
        top_k: int,
        command: Mapping[str, Any],
        inputs: Mapping[str, str],
        provenance: Sequence[Mapping[str, Any]] = (),
    ) -> RouterStatistics:
        """Put the sums of all layers together.

        Args:
            layers: sums by decoder layer on disk, with the domains in the order of ``domains``.
            domains: labels of the first axis.
            num_experts, top_k, command, inputs, provenance: see the class.

        Raises:
            MoePruneError: the layers did not see the same tokens.
        """
        for half in ("total", "first_half"):
            _check_tokens(domains, [getattr(arrays, half)["tokens"] for arrays in layers.values()])
        return cls(
            domains=tuple(domains),
            num_experts=num_experts,
            top_k=top_k,
            layers={index: arrays.total for index, arrays in sorted(layers.items())},
            command=command,
            inputs=inputs,
            provenance=provenance,
            first_half={index: arrays.first_half for index, arrays in sorted(layers.items())},
            facts={index: arrays.facts for index, arrays in sorted(layers.items()) if arrays.facts},
            rows={index: arrays.rows for index, arrays in sorted(layers.items()) if arrays.rows},
            sizes=_sizes_of(one for arrays in layers.values() for one in (arrays.facts, _undomained(arrays.total))),
        )

    @classmethod
    def empty(
        cls,
        layers: Iterable[int],
        *,
        num_experts: int,
        top_k: int,
        model: str,
        facts: Mapping[int, Mapping[str, AnyArray]] | None = None,
    ) -> RouterStatistics:
        """Statistics of no data, for strategies that need none.

        Args:
            layers: decoder layers with experts.
            num_experts, top_k: see the class.
            model: the checkpoint's fingerprint.
            facts: what its weights say.
        """
        nothing = {
            name: np.zeros((0, *statistic.shape(num_experts)), dtype=np.int64 if statistic.integer else np.float64)
            for name, statistic in STATISTICS.items()
        }
        return cls(
            domains=(),
            num_experts=num_experts,
            top_k=top_k,
            layers=dict.fromkeys(layers, nothing),
            command={"stage": "collect"},
            inputs={"model": model},
            facts=facts or {},
            sizes=_sizes_of((facts or {}).values()),
        )

    @property
    def tokens(self) -> int:
        """Calibration tokens seen by each layer, padding left out."""
        first = next(iter(self.layers.values()))
        return int(first["tokens"].sum()) if "tokens" in first else 0

    def layer(self, index: int, weights: Mapping[str, float] | None = None, *, seed: int = 0) -> LayerStatistics:
        """One layer, domains added up with the given weights (1 where none is given).

        Args:
            index: decoder layer on disk.
            weights: weight by domain.
            seed: for strategies that draw.

        Raises:
            ConfigError: a weight for a domain that is not there, or no positive weight.
        """
        factors = domain_weights(self.domains, weights)
        arrays, facts, rows = self.layers[index], self.facts.get(index, {}), self.rows.get(index, {})

        def make(name: str) -> AnyArray:
            if name in arrays:
                return self._combine(name, arrays[name], factors)
            return facts[name] if name in facts else rows[name]

        values = Lazy([*arrays, *facts, *rows], make)
        return LayerStatistics(values, layer=index, num_experts=self.num_experts, seed=seed, weights=factors)

    @staticmethod
    def _combine(name: str, array: AnyArray, factors: FloatArray) -> AnyArray:
        if known(name).merge == "max":
            used = array[factors > 0]
            return used.max(axis=0) if len(used) else np.zeros(array.shape[1:])
        return np.tensordot(factors, array, axes=1)

    def halves(self) -> tuple[RouterStatistics, RouterStatistics]:
        """The two halves of the calibration data, each on its own.

        Returns:
            The statistics of each half, of the layers of which they are known. What is no sum, such as the largest
            value, is that of all data in both. Of single sequences every other one of a domain is in each.
        """

        def half_of(half: int, part: Callable[[AnyArray, AnyArray], AnyArray]) -> RouterStatistics:
            layers = {layer: self._half(layer, part) for layer in self.first_half}
            rows = {layer: _rows_of_half(arrays, half) for layer, arrays in self.rows.items()}
            return dataclasses.replace(self, layers=layers, first_half={}, rows=rows)

        return half_of(0, lambda _, first: first), half_of(1, lambda total, first: total - first)

    def _half(self, layer: int, part: Callable[[AnyArray, AnyArray], AnyArray]) -> Mapping[str, AnyArray]:
        total, first = self.layers[layer], self.first_half[layer]

        def make(name: str) -> AnyArray:
            return part(total[name], first[name]) if known(name).merge == "sum" else total[name]

        return Lazy(first, make)

    def merge(self, other: RouterStatistics) -> RouterStatistics:
        """Statistics of both together, see :func:`merge_statistics`."""
        return merge_statistics([self, other])

    def save(self, path: PathLike) -> Path:
        """Write the statistics file."""
        return write_atomic(path, self._pieces())

    def to_bytes(self) -> bytes:
        """The statistics file; equal statistics give equal bytes."""
        buffer = io.BytesIO()
        buffer.writelines(self._pieces())
        return buffer.getvalue()

    def _pieces(self) -> Iterator[bytes]:
        """The file: its header, and one array after the other."""
        parts = {"layers": self.layers, "first_half": self.first_half, "weights": self.facts, "sequences": self.rows}
        entries = [
            (f"{part}.{layer}.{name}", name, self._stored_shape(name, layers[layer]), layers[layer])
            for part, layers in parts.items()
            for layer in sorted(layers)
            for name in in_order(layers[layer])
        ]
        yield safetensors_header(
            (
                (key, "I64" if known(name).integer else "F64", shape, 8 * math.prod(shape))
                for key, name, shape, _ in entries
            ),
            self._metadata(),
        )
        for _, name, shape, arrays in entries:
            yield on_disk(name, arrays[name]).reshape(shape).tobytes()

    def _stored_shape(self, name: str, arrays: Mapping[str, AnyArray]) -> tuple[int, ...]:
        statistic = known(name)
        if "S" in statistic.axes:
            return arrays[name].shape
        domains = (len(self.domains),) if statistic.by_domain else ()
        return (*domains, *statistic.shape(self.num_experts, self.sizes))

    def _metadata(self) -> dict[str, str]:
        described = envelope(SCHEMA, self.command, self.inputs) | {
            "domains": list(self.domains),
            "num_experts": self.num_experts,
            "top_k": self.top_k,
            "provenance": [dict(entry) for entry in self.provenance],
        }
        if self.sizes:
            described["sizes"] = dict(sorted(self.sizes.items()))
        return {key: value if isinstance(value, str) else json.dumps(value) for key, value in described.items()}

    @classmethod
    def load(cls, path: PathLike) -> RouterStatistics:
        """Open a statistics file; arrays are read when they are asked for.

        Raises:
            ArtifactError: it is missing, damaged, of another schema, or an array has the wrong shape or type. An array
                that holds numbers that are not finite raises it when it is read.
        """
        try:
            file, metadata = open_file(Path(path))
        except (OSError, MoePruneError) as error:
            hint = "check the path, or make it with `moeprune collect`"
            raise ArtifactError(f"cannot read statistics {path}: {first_line(error)}", hint) from error
        check_schema(metadata, SCHEMA, path)
        read = functools.partial(decode, metadata, path)
        domains, num_experts, inputs = tuple(read("domains", list)), read("num_experts", int), read("inputs", dict)
        if not all(isinstance(label, str) for label in (*domains, *inputs.values())) or len({*domains}) < len(domains):
            raise ArtifactError(f"{path}: the domains or inputs in its header are no distinct labels")
        sizes = read("sizes", dict) if "sizes" in metadata else {}
        if not all(type(size) is int and size > 0 for size in sizes.values()):
            raise ArtifactError(f"{path}: the sizes in its header are no whole numbers above 0")
        command = read("command", dict)
        check_published(file, command, path)
        parts = stored_layers(file, len(domains), {"E": num_experts, **sizes}, path)
        return cls(
            domains=domains,
            num_experts=num_experts,
            top_k=read("top_k", int),
            layers=parts["layers"],
            command=command,
            inputs=inputs,
            provenance=tuple(read("provenance", list)),
            first_half=parts["first_half"],
            facts=parts["weights"],
            rows=parts["sequences"],
            sizes=sizes,
        )


def _undomained(arrays: Mapping[str, AnyArray]) -> dict[str, AnyArray]:
    """Sums of the first domain, if there is one, for their shapes."""
    return {name: array[0] for name, array in arrays.items() if len(array)}


def _sizes_of(layers: Iterable[Mapping[str, AnyArray]]) -> dict[str, int]:
    """Sizes of the axes other than E, from arrays by statistic."""
    sizes: dict[str, int] = {}
    for arrays in layers:
        for name, array in arrays.items():
            sizes |= dict(zip(known(name).axes, array.shape, strict=True))
    return {axis: size for axis, size in sizes.items() if axis != "E" and axis not in FIXED}


def _rows_of_half(arrays: Mapping[str, AnyArray], half: int) -> Mapping[str, AnyArray]:
    own = arrays["path_row"] % 2 == half
    return {name: array[own] for name, array in arrays.items()}


def domain_weights(domains: Sequence[str], weights: Mapping[str, float] | None) -> FloatArray:
    """Weights [domains] in the order of the domains, 1 where none is given.

    Raises:
        ConfigError: a weight for a domain that is not there, a negative one, or none above 0.
    """
    given = dict(weights or {})
    for name, value in given.items():
        if name not in domains:
            raise ConfigError(f"no calibration domain {name!r} to weigh", nearest(name, domains))
        if not (np.isfinite(value) and value >= 0):
            raise ConfigError(f"the weight of domain {name!r} must be a number of at least 0")
    factors = np.array([float(given.get(name, 1.0)) for name in domains])
    if len(factors) and not factors.any():
        raise ConfigError("every domain has weight 0")
    return factors


# --- several files ----------------------------------------------------------------------------------------------------


def merge_statistics(parts: Iterable[RouterStatistics]) -> RouterStatistics:
    """Merge any number of statistics of one model.

    Those of the same layers add up. Those of other layers that saw the same calibration data are slices of one
    collection and are put together first.

    Raises:
        StaleArtifactError: they were made for different models.
        ArtifactError: they share some layers and not others, or slices saw different data.
    """
    wholes: list[RouterStatistics] = []
    for part in parts:
        _check_mergeable(wholes[0] if wholes else part, part)
        place = next((place for place, whole in enumerate(wholes) if _are_slices(whole, part)), None)
        if place is None:
            wholes.append(part)
        else:
            wholes[place] = _put_together(wholes[place], part)
    return wholes[0] if len(wholes) == 1 else _added_up(wholes)


def _check_mergeable(first: RouterStatistics, part: RouterStatistics) -> None:
    if first.inputs.get("model") != part.inputs.get("model"):
        raise StaleArtifactError("the statistics files were made for different models")
    if (first.num_experts, first.top_k) != (part.num_experts, part.top_k):
        raise ArtifactError("the statistics files were made with different numbers of experts")


def _are_slices(first: RouterStatistics, second: RouterStatistics) -> bool:
    """Whether two parts are of different layers and of the same data."""
    data = first.inputs.get("calibration")
    return bool(data) and data == second.inputs.get("calibration") and not first.layers.keys() & second.layers.keys()


def _put_together(first: RouterStatistics, second: RouterStatistics) -> RouterStatistics:
    """The layers of two slices side by side."""
    tokens = [next(iter(part.layers.values()))["tokens"].tolist() for part in (first, second)]
    if first.domains != second.domains or tokens[0] != tokens[1]:
        raise ArtifactError(
            "the slices of layers did not see the same tokens by domain", "collect them from the same data"
        )
    return dataclasses.replace(
        first,
        layers=dict(sorted({**first.layers, **second.layers}.items())),
        first_half=dict(sorted({**first.first_half, **second.first_half}.items())),
        facts=dict(sorted({**first.facts, **second.facts}.items())),
        rows=dict(sorted({**first.rows, **second.rows}.items())),
        sizes={**first.sizes, **second.sizes},
        command=_merged_command((first, second)),
    )


def _added_up(parts: Sequence[RouterStatistics]) -> RouterStatistics:
    """The sums of statistics of the same layers."""
    filled = [part for part in parts if part.tokens]
    first = filled[0] if filled else parts[0]
    for part in parts:
        _check_same_layers(first, part)
    domains = tuple(dict.fromkeys(domain for part in parts for domain in part.domains))
    halved = [layer for layer in first.layers if filled and all(layer in part.first_half for part in filled)]
    calibrations = sorted(
        source for part in parts for source in part.inputs.get("calibration", "").split("+") if source
    )
    return dataclasses.replace(
        first,
        domains=domains,
        layers={
            layer: _sums(domains, [(part.domains, part.layers[layer]) for part in filled or parts])
            for layer in first.layers
        },
        first_half={
            layer: _sums(domains, [(part.domains, part.first_half[layer]) for part in filled]) for layer in halved
        },
        facts=next((part.facts for part in parts if part.facts), {}),
        rows={
            layer: _joined(domains, [(part.domains, part.rows[layer]) for part in parts if layer in part.rows])
            for layer in first.rows
        },
        sizes={letter: size for part in parts for letter, size in part.sizes.items()},
        command=_merged_command(parts),
        inputs={**first.inputs, "calibration": "+".join(calibrations)},
        provenance=tuple(entry for part in parts for entry in part.provenance),
    )


def _check_same_layers(first: RouterStatistics, part: RouterStatistics) -> None:
    shared = sorted(first.layers.keys() & part.layers.keys())
    apart = sorted(first.layers.keys() ^ part.layers.keys())
    if shared and apart:
        raise ArtifactError(
            f"the statistics files share layers such as {shared[0]} and not others such as {apart[0]}",
            "merge files of the same layers, or slices of one collection that have no layer in common",
        )
    if apart:
        raise ArtifactError(
            "the statistics files are of different layers and of different calibration data",
            "merge the slices of one collection first",
        )
    if not part.tokens:
        return  # of no data, and of no more statistics than every file has
    if (
        any(set(first.layers[layer]) != set(part.layers[layer]) for layer in shared)
        or first.rows.keys() != part.rows.keys()
    ):
        raise ArtifactError(
            "the statistics files do not hold the same statistics", "collect them with the same --statistics"
        )


def _sums(
    domains: tuple[str, ...], parts: Sequence[tuple[tuple[str, ...], Mapping[str, AnyArray]]]
) -> Mapping[str, AnyArray]:
    """Arrays [domains, ...] of one layer, added up over parts that each have domains of their own."""

    def make(name: str) -> AnyArray:
        arrays = [(labels, values[name]) for labels, values in parts]
        total = np.zeros((len(domains), *arrays[0][1].shape[1:]), dtype=arrays[0][1].dtype)
        for labels, array in arrays:
            rows = [domains.index(label) for label in labels]
            total[rows] = added(name, total[rows], array)
        return total

    return Lazy(parts[0][1], make)


def _joined(
    domains: tuple[str, ...], parts: Sequence[tuple[tuple[str, ...], Mapping[str, AnyArray]]]
) -> Mapping[str, AnyArray]:
    """Rows of single sequences, one part's after the other's, with their domains renumbered."""

    def rows(labels: tuple[str, ...], name: str, array: AnyArray) -> AnyArray:
        return np.array([domains.index(labels[int(row)]) for row in array]) if name == "path_domain" else array

    return {
        name: np.concatenate([rows(labels, name, arrays[name]) for labels, arrays in parts]) for name in parts[0][1]
    }


def added(name: str, first: AnyArray, second: AnyArray) -> AnyArray:
    """Two arrays of one statistic together, by its merge rule."""
    return np.maximum(first, second) if known(name).merge == "max" else first + second


def _merged_command(parts: Sequence[RouterStatistics]) -> dict[str, Any]:
    """The collections behind some statistics, flat, so that the order of merging leaves no trace."""
    return {
        "stage": "stats merge",
        "of": [command for part in parts for command in part.command.get("of") or [dict(part.command)]],
    }


def _check_tokens(domains: Sequence[str], tokens: Sequence[AnyArray]) -> None:
    """Refuse layers that did not all see the same tokens [domains]."""
    differs_D = np.any(np.stack(tokens) != tokens[0], axis=0)
    if differs_D.any():
        raise MoePruneError(
            f"the layers did not see the same tokens in domain {domains[int(differs_D.argmax())]!r}",
            "a forward pass ended early: observe again without that batch",
        )


# --- the file ---------------------------------------------------------------------------------------------------------
