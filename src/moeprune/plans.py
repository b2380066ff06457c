"""Plans: which experts stay, as a JSON file that a person can read, edit and diff.

Only the keep-lists steer ``apply``: edit them, keep every layer's count the same, and the rest is derived again.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

from moeprune._files import PathLike, envelope, read_artifact, to_json, write_atomic
from moeprune.errors import ArtifactError, ConfigError, PlanError

SCHEMA = "moeprune.plan/1"
DROP = "drop"
MtpPolicy = Literal["cut", "drop"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterShape:
    """The numbers of a router that bound what may be removed.

    Attributes:
        num_experts: routed experts per layer (E).
        top_k: experts per token.
        n_group: groups of equal, contiguous blocks of experts; 1 without groups.
        topk_group: groups a token may use.
    """

    num_experts: int
    top_k: int
    n_group: int = 1
    topk_group: int = 1

    def problem(self, kept: int) -> str:
        """Why ``kept`` experts per layer cannot work, or an empty string.

        With groups, the router picks top-k inside ``topk_group`` groups and ranks groups by their two best experts:
        fewer reachable experts than top-k make transformers pick masked ones without an error.
        """
        if kept >= self.num_experts:
            return f"{kept} kept of {self.num_experts} removes nothing"
        if kept % self.n_group:
            return f"{kept} experts do not divide over {self.n_group} groups"
        per_group = kept // self.n_group
        if self.n_group > 1 and per_group < 2:
            return f"{per_group} expert per group is fewer than the 2 by which the router ranks groups"
        reachable = kept if self.n_group == 1 else self.topk_group * per_group
        if reachable < self.top_k:
            return f"a token could reach {reachable} experts, fewer than its top-{self.top_k}"
        return ""

    def smallest(self) -> int:
        """The smallest count that works."""
        works = (kept for kept in range(self.n_group, self.num_experts, self.n_group) if not self.problem(kept))
        return next(works, self.num_experts)


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """How many experts each layer keeps: exactly one of ``ratio`` and ``keep``.

    Attributes:
        ratio: fraction of the routed experts of each layer to REMOVE, as text so that 0.3 means three tenths.
        keep: exact number of experts that stay in each layer.
        round_to: make the kept count a multiple of this, rounding up.
    """

    ratio: str | None = None
    keep: int | None = None
    round_to: int = 1

    @property
    def given(self) -> bool:
        """Whether it says how many experts stay."""
        return self.ratio is not None or self.keep is not None

    def kept(self, shape: RouterShape) -> int:
        """Experts that stay in each layer: E - floor(ratio x E / n_group) x n_group.

        Raises:
            ConfigError: nothing would be removed, too little would stay, or the options contradict each other.
        """
        if (self.ratio is None) == (self.keep is None):
            raise ConfigError(
                "give exactly one of --ratio and --keep", "--ratio 0.5 removes half of each layer's experts"
            )
        kept = self.keep if self.keep is not None else shape.num_experts - self._removed(shape)
        if self.round_to < 1:
            raise ConfigError("--round-to must be at least 1")
        if self.round_to > 1:
            kept += -kept % math.lcm(self.round_to, shape.n_group)  # every group keeps the same number
        problem = shape.problem(kept) if kept > 0 else "nothing would be left"
        if problem:
            raise ConfigError(f"cannot keep {kept} of {shape.num_experts} experts: {problem}", self._advice(shape))
        return kept

    def _removed(self, shape: RouterShape) -> int:
        try:
            ratio = Fraction(str(self.ratio))
        except (ValueError, ZeroDivisionError):
            raise ConfigError(f"--ratio must be a number, not {self.ratio!r}") from None
        if not 0 < ratio < 1:
            raise ConfigError(f"--ratio must lie between 0 and 1, not {self.ratio}", "it is the fraction REMOVED")
        removed = int(ratio * shape.num_experts / shape.n_group) * shape.n_group
        if removed == 0:
            per = f"one of {shape.num_experts}" if shape.n_group == 1 else f"one in each of {shape.n_group} groups"
            raise ConfigError(f"--ratio {self.ratio} removes no expert", f"the smallest cut removes {per}")
        return removed

    @staticmethod
    def _advice(shape: RouterShape) -> str:
        smallest = shape.smallest()
        if smallest >= shape.num_experts:
            return "this model cannot lose any expert"
        step = f" in steps of {shape.n_group}" if shape.n_group > 1 else ""
        return f"from {smallest} to {shape.num_experts - shape.n_group} experts can be kept{step}"


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerPlan:
    """One layer's decision.

    Attributes:
        keep: source indices of the experts that stay, ascending.
        scores: the strategy's score of every expert, higher is better; None where it was copied from another layer.
        copied_from: the layer whose keep-list an MTP layer takes.
        order: the same experts in the order in which they are written; None where that is ascending.
    """

    keep: tuple[int, ...]
    scores: tuple[float, ...] | None = None
    copied_from: int | None = None
    order: tuple[int, ...] | None = None

    @property
    def placed(self) -> tuple[int, ...]:
        """Source indices of the experts that stay, by their new number."""
        return self.keep if self.order is None else self.order


@dataclass(frozen=True, slots=True, kw_only=True)
class PruningPlan:
    """A decision about every MoE layer, bound to one model by its fingerprint.

    Attributes:
        layers: decision by decoder layer on disk. An MTP layer that is absent here is dropped from the checkpoint.
        config_edits: config keys and their new values; derived from the keep-lists.
        budget, strategy, size, coverage, engines, notes: what the decision was based on and means, for people. An
            engine with no reason against it takes the result.
        stability: how far two halves of the calibration data agree, where that is known.
        command, inputs: canonical options and fingerprints.
        kind: always ``drop``: keep-lists for the byte-copy executor.
        balance: where experts were put in another order, the load of expert-parallel groups before and after.
        allow_non_uniform: layers may keep different numbers of experts, which only transformers loads.
    """

    layers: Mapping[int, LayerPlan]
    config_edits: Mapping[str, int]
    command: Mapping[str, Any]
    inputs: Mapping[str, str]
    kind: str = DROP
    budget: Mapping[str, Any] = field(default_factory=dict)
    strategy: Mapping[str, Any] = field(default_factory=dict)
    size: Mapping[str, Any] = field(default_factory=dict)
    coverage: Mapping[str, float] = field(default_factory=dict)
    stability: Mapping[str, Any] = field(default_factory=dict)
    engines: Mapping[str, Sequence[str]] = field(default_factory=dict)
    notes: Sequence[str] = ()
    balance: Mapping[str, Any] = field(default_factory=dict)
    allow_non_uniform: bool = False

    @property
    def counts(self) -> dict[int, int]:
        """Experts that stay, by layer."""
        return {layer: len(decision.keep) for layer, decision in self.layers.items()}

    @property
    def uniform(self) -> bool:
        """Whether every layer keeps the same number."""
        return len(set(self.counts.values())) == 1

    @property
    def kept(self) -> int:
        """Experts that stay in each layer; where layers differ, the most that any of them keeps."""
        return max(self.counts.values())

    @property
    def kept_by_layer(self) -> int | dict[str, int]:
        """For JSON: the experts that stay in each layer, or by layer where layers differ."""
        return self.kept if self.uniform else {str(layer): count for layer, count in sorted(self.counts.items())}

    @property
    def span(self) -> str:
        """Experts that stay in each layer, for people: ``8``, or ``6 to 10``."""
        return str(self.kept) if self.uniform else f"{min(self.counts.values())} to {self.kept}"

    def to_dict(self) -> dict[str, Any]:
        """The plan as JSON values, envelope first."""
        return envelope(SCHEMA, self.command, self.inputs) | {
            "kind": self.kind,
            **({"allow_non_uniform": True} if self.allow_non_uniform else {}),
            "budget": dict(self.budget),
            "strategy": dict(self.strategy),
            "size": dict(self.size),
            "coverage": dict(self.coverage),
            **({"stability": dict(self.stability)} if self.stability else {}),
            **({"balance": dict(self.balance)} if self.balance else {}),
            "engines": {engine: list(reasons) for engine, reasons in self.engines.items()},
            "notes": list(self.notes),
            "config_edits": dict(self.config_edits),
            "layers": {str(layer): _layer_dict(value) for layer, value in sorted(self.layers.items())},
        }

    def save(self, path: PathLike) -> Path:
        """Write the plan as JSON."""
        return write_atomic(path, to_json(self.to_dict()))

    @classmethod
    def load(cls, path: PathLike) -> PruningPlan:
        """Read a plan file.

        Raises:
            ArtifactError: it is missing, not JSON, of another schema, or lacks a field.
        """
        payload = read_artifact(path, SCHEMA)
        try:
            names = [item.name for item in dataclasses.fields(cls) if item.name in {*_REQUIRED, *payload}]
            fields = {name: _read_field(payload, name) for name in names}
            return cls(**fields | {"layers": dict(_read_layer(*item) for item in fields["layers"].items())})
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            what = f"it lacks {error}" if isinstance(error, KeyError) else str(error)
            raise ArtifactError(f"{path} is not a usable plan: {what}") from error


def check_keep(layer: int, keep: Sequence[int], shape: RouterShape) -> None:
    """Check one layer's keep-list against its router.

    Raises:
        PlanError: not ascending, out of range, unequal over groups, or too few for top-k.
    """
    expected = sorted(set(keep))
    if list(keep) != expected:
        raise PlanError(f"layer {layer}: the keep-list must be ascending and without repeats")
    if not keep or keep[0] < 0 or keep[-1] >= shape.num_experts:
        raise PlanError(f"layer {layer}: the keep-list must name experts 0 to {shape.num_experts - 1}")
    block = shape.num_experts // shape.n_group
    counts = [sum(index // block == group for index in keep) for group in range(shape.n_group)]
    if len(set(counts)) > 1:
        raise PlanError(f"layer {layer}: groups keep {counts} experts", "every group must keep the same number")
    problem = shape.problem(len(keep)) if len(keep) < shape.num_experts else ""
    if problem:
        raise PlanError(f"layer {layer}: {problem}")


def check_order(layer: int, decision: LayerPlan, shape: RouterShape) -> None:
    """Check that one layer's order lists its kept experts and leaves every one in its router group.

    Raises:
        PlanError: it does not.
    """
    if sorted(decision.placed) != list(decision.keep):
        raise PlanError(f"layer {layer}: order does not list the kept experts", "write it to match keep, or remove it")
    block = shape.num_experts // shape.n_group
    groups = [expert // block for expert in decision.placed]
    if groups != sorted(groups):
        raise PlanError(f"layer {layer}: order moves an expert out of its router group", "order them inside the groups")


def _layer_dict(layer: LayerPlan) -> dict[str, Any]:
    entry: dict[str, Any] = {"keep": list(layer.keep)}
    if layer.order is not None:
        entry["order"] = list(layer.order)
    if layer.copied_from is not None:
        entry["copied_from"] = layer.copied_from
    if layer.scores is not None:
        entry["scores"] = [float(f"{score:.6g}") for score in layer.scores]
    return entry


_REQUIRED = ("layers", "config_edits", "command", "inputs")
# Of the JSON values; every other field is an object.
_KINDS: Mapping[str, type[Any]] = {"kind": str, "notes": list, "allow_non_uniform": bool}


def _read_field(payload: Mapping[str, Any], name: str) -> Any:
    value: Any = payload[name]
    kind = _KINDS.get(name, dict)
    if not isinstance(value, kind):
        raise TypeError(f"{name} must be {'an object' if kind is dict else f'a {kind.__name__}'}")
    if name == "engines" and not all(isinstance(reasons, list) for reasons in value.values()):
        raise TypeError("engines must hold lists of reasons")
    return value


def _read_layer(name: str, value: Any) -> tuple[int, LayerPlan]:
    if not re.fullmatch("0|[1-9][0-9]{0,8}", name):
        raise ValueError(f"{name!r} is no layer")
    if not isinstance(value, dict) or not _numbers(value.get("keep"), int):
        raise ValueError(f"layer {name}: keep must be a list of expert numbers")
    scores, source, order = value.get("scores"), value.get("copied_from"), value.get("order")
    if scores is not None and not _numbers(scores, int, float):
        raise ValueError(f"layer {name}: scores must be a list of numbers")
    if source is not None and type(source) is not int:
        raise ValueError(f"layer {name}: copied_from must be the number of a layer")
    if order is not None and not _numbers(order, int):
        raise ValueError(f"layer {name}: order must be a list of expert numbers")
    layer = LayerPlan(
        keep=tuple(value["keep"]),
        scores=None if scores is None else tuple(map(float, scores)),
        copied_from=source,
        order=None if order is None else tuple(order),
    )
    return int(name), layer


def _numbers(value: object, *kinds: type) -> bool:
    return isinstance(value, list) and all(type(item) in kinds for item in value)
