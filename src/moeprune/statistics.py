"""Router statistics: additive sums per domain, layer and expert, and the file that holds them.

Sums, never means: two files add up to the file of the concatenated data, domains can be weighted afterwards, and any
ratio can be planned from one calibration. On disk (schema ``moeprune.statistics/1``) they are a safetensors file with
tensors ``layers.<decoder layer on disk>.<statistic>``, whose first axis is the domains in the order of the header key
``domains``; counts are int64, everything else float64.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from moeprune._files import PathLike, check_schema, envelope, parse_json, safetensors_header, write_atomic
from moeprune.errors import ArtifactError, ConfigError, StaleArtifactError, StrategyError, nearest

SCHEMA = "moeprune.statistics/1"
FloatArray = NDArray[np.float64]
AnyArray = NDArray[Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Statistic:
    """How one statistic is stored and merged.

    Attributes:
        axes: shape per layer and domain, in letters: E experts.
        meaning: the definition; sums run over the tokens routed to the expert unless it says otherwise. g is the weight
            the model really multiplied the expert's output f(x) by.
        merge: how two files combine.
        integer: whether it counts.
    """

    axes: str
    meaning: str
    merge: Literal["sum", "max"] = "sum"
    integer: bool = False

    def shape(self, num_experts: int) -> tuple[int, ...]:
        """Shape per layer and domain."""
        return (num_experts,) * len(self.axes)


STATISTICS: Mapping[str, Statistic] = {
    "tokens": Statistic(axes="", meaning="tokens seen, padding left out", integer=True),
    "count": Statistic(axes="E", meaning="tokens routed to the expert", integer=True),
    "gate_sum": Statistic(axes="E", meaning="sum of g"),
    "gate_sq_sum": Statistic(axes="E", meaning="sum of g²"),
    "soft_prob_sum": Statistic(axes="E", meaning="sum over all tokens of softmax(router logits)"),
    "norm_sum": Statistic(axes="E", meaning="sum of ‖f(x)‖"),
    "norm_sq_sum": Statistic(axes="E", meaning="sum of ‖f(x)‖²"),
    "gated_norm_sum": Statistic(axes="E", meaning="sum of g‖f(x)‖"),
    "gated_norm_sq_sum": Statistic(axes="E", meaning="sum of (g‖f(x)‖)²"),
    "max_abs_down": Statistic(axes="E", meaning="largest |element of f(x)|", merge="max"),
    "pair_count": Statistic(axes="EE", meaning="tokens routed to both experts", integer=True),
    "pair_gated_norm": Statistic(axes="EE", meaning="sum over those of g_i‖f_i(x)‖ g_j‖f_j(x)‖"),
    "gram": Statistic(axes="EE", meaning="sum over those of ⟨g_i f_i(x), g_j f_j(x)⟩"),
}


class LayerStatistics:
    """The statistics of one layer with the domains already weighted: ``layer.gated_norm_sum`` is an [E] array.

    Reading one that was not collected raises :class:`StrategyError`.
    """

    def __init__(self, values: Mapping[str, AnyArray], *, layer: int, num_experts: int, seed: int = 0) -> None:
        self._values = values
        self._empty = not np.any(values.get("tokens", 0))
        self.layer = layer
        self.num_experts = num_experts
        self.seed = seed

    def __getattr__(self, name: str) -> FloatArray:
        if name.startswith("__"):
            raise AttributeError(name)
        if name not in STATISTICS:
            raise StrategyError(f"there is no statistic {name!r}", nearest(name, STATISTICS))
        if name not in self._values or self._empty:
            raise StrategyError(
                f"the statistics file has no {name!r} for layer {self.layer}",
                "collect again with calibration data (--calibration)",
            )
        return np.asarray(self._values[name], dtype=np.float64)

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
        layers: arrays of shape [domains, ...] by decoder layer and statistic.
        command: canonical options of the collection.
        inputs: fingerprints: ``model`` and ``calibration``.
        provenance: where the calibration data came from, one entry per source.
    """

    domains: tuple[str, ...]
    num_experts: int
    top_k: int
    layers: Mapping[int, Mapping[str, AnyArray]]
    command: Mapping[str, Any]
    inputs: Mapping[str, str]
    provenance: Sequence[Mapping[str, Any]] = ()

    @classmethod
    def empty(cls, layers: Iterable[int], *, num_experts: int, top_k: int, model: str) -> RouterStatistics:
        """Statistics of no data, for strategies that need none; ``model`` is the checkpoint's fingerprint."""
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
        values = {name: self._combine(name, array, factors) for name, array in self.layers[index].items()}
        return LayerStatistics(values, layer=index, num_experts=self.num_experts, seed=seed)

    @staticmethod
    def _combine(name: str, array: AnyArray, factors: FloatArray) -> AnyArray:
        if STATISTICS[name].merge == "max":
            used = array[factors > 0]
            return used.max(axis=0) if len(used) else np.zeros(array.shape[1:])
        return np.tensordot(factors, array, axes=1)

    def merge(self, other: RouterStatistics) -> RouterStatistics:
        """Statistics of both data sets together.

        Raises:
            StaleArtifactError: they were made for different models.
            ArtifactError: they do not hold the same layers and statistics.
        """
        if self.inputs.get("model") != other.inputs.get("model"):
            raise StaleArtifactError("the statistics files were made for different models")
        if self._shape() != other._shape():
            raise ArtifactError("the statistics files do not hold the same layers and statistics")
        domains = tuple(dict.fromkeys((*self.domains, *other.domains)))
        layers = {
            layer: {name: _merge_arrays(name, domains, self, other, layer) for name in values}
            for layer, values in self.layers.items()
        }
        return RouterStatistics(
            domains=domains,
            num_experts=self.num_experts,
            top_k=self.top_k,
            layers=layers,
            command={"stage": "stats merge", "of": [*_merged_commands(self), *_merged_commands(other)]},
            inputs={**self.inputs, "calibration": "+".join(sorted((*_calibrations(self), *_calibrations(other))))},
            provenance=(*self.provenance, *other.provenance),
        )

    def _shape(self) -> tuple[int, int, dict[int, set[str]]]:
        return self.num_experts, self.top_k, {layer: set(values) for layer, values in self.layers.items()}

    def save(self, path: PathLike) -> Path:
        """Write the statistics file."""
        return write_atomic(path, self.to_bytes())

    def to_bytes(self) -> bytes:
        """The statistics file; equal statistics give equal bytes."""
        names = [(layer, name) for layer in sorted(self.layers) for name in STATISTICS if name in self.layers[layer]]
        arrays = [_on_disk(name, self.layers[layer][name]) for layer, name in names]
        header = safetensors_header(
            (
                (f"layers.{layer}.{name}", "I64" if STATISTICS[name].integer else "F64", array.shape, array.nbytes)
                for (layer, name), array in zip(names, arrays, strict=True)
            ),
            self._metadata(),
        )
        return b"".join((header, *(array.tobytes() for array in arrays)))

    def _metadata(self) -> dict[str, str]:
        described = envelope(SCHEMA, self.command, self.inputs) | {
            "domains": list(self.domains),
            "num_experts": self.num_experts,
            "top_k": self.top_k,
            "provenance": [dict(entry) for entry in self.provenance],
        }
        return {key: value if isinstance(value, str) else json.dumps(value) for key, value in described.items()}

    @classmethod
    def load(cls, path: PathLike) -> RouterStatistics:
        """Read a statistics file.

        Raises:
            ArtifactError: it is missing, damaged, of another schema, or an array has the wrong shape.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="numpy") as file:
                metadata = dict(file.metadata() or {})
                check_schema(metadata, SCHEMA, path)  # first, for a file of weights may hold what numpy cannot
                arrays = {name: _read_array(file, name, path) for name in file.keys()}  # noqa: SIM118 - not a mapping
        except (OSError, SafetensorError) as error:
            hint = "check the path, or make it with `moeprune collect`"
            raise ArtifactError(f"cannot read statistics {path}: {error}", hint) from error
        read = functools.partial(_decode, metadata, path)
        domains, num_experts, inputs = tuple(read("domains", list)), read("num_experts", int), read("inputs", dict)
        if not all(isinstance(label, str) for label in (*domains, *inputs.values())) or len({*domains}) < len(domains):
            raise ArtifactError(f"{path}: the domains or inputs in its header are no distinct labels")
        return cls(
            domains=domains,
            num_experts=num_experts,
            top_k=read("top_k", int),
            layers=_by_layer(arrays, len(domains), num_experts, path),
            command=read("command", dict),
            inputs=inputs,
            provenance=tuple(read("provenance", list)),
        )


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


def merge_statistics(parts: Iterable[RouterStatistics]) -> RouterStatistics:
    """Merge any number of statistics of one model."""
    return functools.reduce(RouterStatistics.merge, parts)


def _merged_commands(part: RouterStatistics) -> list[Any]:
    """The collections behind some statistics, flat, so that the order of merging leaves no trace."""
    return list(part.command.get("of") or [dict(part.command)])


def _calibrations(part: RouterStatistics) -> list[str]:
    return [source for source in part.inputs.get("calibration", "").split("+") if source]


def _read_array(file: Any, name: str, path: PathLike) -> AnyArray:
    if file.get_slice(name).get_dtype() not in {"I64", "F64"}:
        raise ArtifactError(f"{path}: {name!r} is neither int64 nor float64")
    return np.asarray(file.get_tensor(name))


def _decode(metadata: Mapping[str, str], path: PathLike, key: str, kind: type[Any]) -> Any:
    if key not in metadata:
        raise ArtifactError(f"{path} has no {key!r} in its header")
    value = parse_json(metadata[key], path)
    if type(value) is not kind:
        raise ArtifactError(f"{path} has a damaged {key!r} in its header")
    return value


def _on_disk(name: str, array: AnyArray) -> AnyArray:
    return np.ascontiguousarray(array, dtype="<i8" if STATISTICS[name].integer else "<f8")


def _merge_arrays(
    name: str, domains: tuple[str, ...], first: RouterStatistics, second: RouterStatistics, layer: int
) -> AnyArray:
    shape = (len(domains), *first.layers[layer][name].shape[1:])
    total = np.zeros(shape, dtype=first.layers[layer][name].dtype)
    for part in (first, second):
        rows = [domains.index(domain) for domain in part.domains]
        values = part.layers[layer][name]
        total[rows] = np.maximum(total[rows], values) if STATISTICS[name].merge == "max" else total[rows] + values
    return total


def _by_layer(
    arrays: Mapping[str, AnyArray], domains: int, num_experts: int, path: PathLike
) -> dict[int, dict[str, AnyArray]]:
    layers: dict[int, dict[str, AnyArray]] = {}
    for key, array in arrays.items():
        parts = re.fullmatch(r"layers\.(0|[1-9][0-9]{0,8})\.(\w+)", key)
        if parts is None or parts[2] not in STATISTICS:
            raise ArtifactError(f"{path} holds an unknown statistic {key!r}", "was it made by a newer version?")
        index, name = int(parts[1]), parts[2]
        expected = (domains, *STATISTICS[name].shape(num_experts))
        if array.shape != expected or not np.isfinite(array).all():
            raise ArtifactError(f"{path}: {key!r} should be finite and of shape {expected}, it is {array.shape}")
        if (array.dtype.kind == "i") != STATISTICS[name].integer:
            raise ArtifactError(f"{path}: {key!r} should not be of type {array.dtype}")
        layers.setdefault(index, {})[name] = array
    if not layers:
        raise ArtifactError(f"{path} holds no layers")
    return dict(sorted(layers.items()))
