"""Plans of fusing: which experts become one and how, as a JSON file that a person can read, edit and diff."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moeprune._files import PathLike, envelope, read_artifact, to_json, write_atomic
from moeprune.errors import ArtifactError, PlanError
from moeprune.plans import DROP, SCHEMA, LayerPlan, PruningPlan, RouterShape

FUSE = "fuse"
ABSORB = "absorb"
MERGES = (ABSORB, "least-squares", "frequency", "mean", "slerp", "svd")
FITTED = (ABSORB, "least-squares")  # those that fit the merged experts to activations
TIED = "tied"
ROUTERS = ("keep-dominant", "merge-rows", TIED)


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Experts that become one.

    Attributes:
        members: source indices, the dominant expert first, which the others are aligned to; then ascending.
        weights: share of each in the merged expert, adding up to 1.
    """

    members: tuple[int, ...]
    weights: tuple[float, ...]

    @property
    def dominant(self) -> int:
        """The member that the group stands for."""
        return self.members[0]

    @property
    def merged(self) -> bool:
        """Whether there is anything to merge."""
        return len(self.members) > 1


@dataclass(frozen=True, slots=True, kw_only=True)
class FuseLayer:
    """One layer's decision.

    Attributes:
        groups: every expert of the layer is in one; in the order of the dominant experts, which is that of the new
            numbers.
    """

    groups: tuple[Group, ...]

    @property
    def keep(self) -> tuple[int, ...]:
        """The dominant experts, ascending: whose places and router rows stay."""
        return tuple(group.dominant for group in self.groups)

    @property
    def merged(self) -> dict[int, Group]:
        """Groups of several experts, by their new number."""
        return {place: group for place, group in enumerate(self.groups) if group.merged}

    def new_numbers(self) -> tuple[int, ...]:
        """The number that each expert's merged one has, by source index."""
        places = {expert: place for place, group in enumerate(self.groups) for expert in group.members}
        return tuple(places[expert] for expert in sorted(places))

    def leaders(self) -> tuple[int, ...]:
        """The dominant expert of each expert's group, by source index."""
        return tuple(self.keep[place] for place in self.new_numbers())

    def to_dict(self) -> dict[str, Any]:
        """For JSON; ``keep`` follows from the groups."""
        return {
            "keep": list(self.keep),
            "groups": [list(group.members) for group in self.groups],
            "weights": [list(group.weights) for group in self.groups],
        }

    @classmethod
    def from_dict(cls, index: int, value: Any) -> FuseLayer:
        """Read the decision on a decoder layer from JSON values.

        Raises:
            KeyError, TypeError, ValueError: they are something else.
        """
        groups, weights = value["groups"], value["weights"]
        if len(groups) != len(weights) or not all(group and {*map(type, group)} == {int} for group in groups):
            raise ValueError(f"layer {index}: groups must be lists of expert numbers, and weights as many lists")
        if not all(type(share) in {int, float} for shares in weights for share in shares):
            raise ValueError(f"layer {index}: weights must be lists of numbers")
        found = [
            Group(members=tuple(members), weights=tuple(map(float, shares)))
            for members, shares in zip(groups, weights, strict=True)
        ]
        return cls(groups=tuple(sorted(found, key=lambda group: group.dominant)))


@dataclass(frozen=True, slots=True, kw_only=True)
class FusePlan:
    """Which experts of every MoE layer are merged, bound to one model by its fingerprint.

    Attributes:
        layers: groups by decoder layer.
        merge: how weights are merged, of :data:`MERGES`.
        align: whether the neurons of every member are put in the order of the dominant expert's before.
        router: which rows the new router has, of :data:`ROUTERS`.
        mtp_layers: MTP layers that stay, with the experts that are dominant in the last decoder layer, as they are.
        config_edits, budget, strategy, size, engines, notes: what follows and what it was based on, for people.
        command, inputs: canonical options and fingerprints.
    """

    layers: Mapping[int, FuseLayer]
    merge: str
    align: bool
    router: str
    command: Mapping[str, Any]
    inputs: Mapping[str, str]
    mtp_layers: tuple[int, ...] = ()
    config_edits: Mapping[str, Any] = field(default_factory=dict)
    budget: Mapping[str, Any] = field(default_factory=dict)
    strategy: Mapping[str, Any] = field(default_factory=dict)
    size: Mapping[str, Any] = field(default_factory=dict)
    engines: Mapping[str, Sequence[str]] = field(default_factory=dict)
    notes: Sequence[str] = ()

    @property
    def _last(self) -> FuseLayer:
        """The last decoder layer's groups."""
        return self.layers[max(self.layers)]

    @property
    def kept(self) -> int:
        """Experts that every layer has afterwards."""
        return max(len(layer.groups) for layer in self.layers.values())

    def as_drop(self) -> PruningPlan:
        """The plan that only keeps the dominant experts, which has the same shapes."""
        layers = {index: LayerPlan(keep=layer.keep) for index, layer in self.layers.items()}
        for index in self.mtp_layers:
            layers[index] = LayerPlan(keep=self._last.keep, copied_from=max(self.layers))
        return PruningPlan(layers=layers, config_edits={}, command=self.command, inputs=self.inputs)

    def to_dict(self) -> dict[str, Any]:
        """The plan as JSON values, envelope first; ``keep`` follows from the groups."""
        return envelope(SCHEMA, self.command, self.inputs) | {
            "kind": FUSE,
            "merge": self.merge,
            "align": self.align,
            "router": self.router,
            "budget": dict(self.budget),
            "strategy": dict(self.strategy),
            "size": dict(self.size),
            "engines": {engine: list(reasons) for engine, reasons in self.engines.items()},
            "notes": list(self.notes),
            "config_edits": dict(self.config_edits),
            "layers": {str(index): layer.to_dict() for index, layer in sorted(self.layers.items())}
            | {str(index): self._follower() for index in sorted(self.mtp_layers)},
        }

    def _follower(self) -> dict[str, Any]:
        """For JSON: an MTP layer."""
        return {"keep": list(self._last.keep), "copied_from": max(self.layers)}

    def save(self, path: PathLike) -> Path:
        """Write the plan as JSON."""
        return write_atomic(path, to_json(self.to_dict()))

    @classmethod
    def load(cls, path: PathLike) -> FusePlan:
        """Read a plan file.

        Raises:
            ArtifactError: it is missing, not JSON, of another schema or kind, or lacks a field.
        """
        payload = read_artifact(path, SCHEMA)
        if payload.get("kind") != FUSE:
            raise ArtifactError(f"{path} is a plan of kind {payload.get('kind')!r}, not {FUSE!r}")
        try:
            named = {int(_number(name)): value for name, value in payload["layers"].items()}
            copied = {index for index, value in named.items() if "copied_from" in value}
            return cls(
                layers={
                    index: FuseLayer.from_dict(index, value) for index, value in named.items() if index not in copied
                },
                mtp_layers=tuple(sorted(copied)),
                merge=str(payload["merge"]),
                align=payload["align"] is True,
                router=str(payload["router"]),
                **{name: dict(payload[name]) for name in ("command", "inputs", "config_edits")},
                **{name: dict(payload.get(name, {})) for name in ("budget", "strategy", "size", "engines")},
                notes=tuple(payload.get("notes", ())),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            what = f"it lacks {error}" if isinstance(error, KeyError) else str(error)
            raise ArtifactError(f"{path} is not a usable plan: {what}") from error


def plan_kind(path: PathLike) -> str:
    """The kind of a plan file, which says what executes it.

    Raises:
        ArtifactError: it is missing, not JSON, or of another schema.
    """
    return str(read_artifact(path, SCHEMA).get("kind", DROP))


def check_groups(layer: int, groups: Sequence[Group], shape: RouterShape) -> None:
    """Check that one layer's groups are a partition of its experts that its router can work with.

    Raises:
        PlanError: they are not.
    """
    named = sorted(expert for group in groups for expert in group.members)
    if named != list(range(shape.num_experts)):
        odd = sorted({*named} ^ {*range(shape.num_experts)}) or [one for one in named if named.count(one) > 1]
        raise PlanError(f"layer {layer}: expert {odd[0]} is not in exactly one group", "every expert is in one")
    block = shape.num_experts // shape.n_group
    for group in groups:
        if len({expert // block for expert in group.members}) > 1:
            raise PlanError(
                f"layer {layer}: the group of expert {group.dominant} has members of several router groups",
                "merge experts of one router group",
            )
        usable = len(group.weights) == len(group.members) and all(map(math.isfinite, group.weights))
        if not usable or min(group.weights) < 0 or not math.isclose(sum(group.weights), 1, abs_tol=1e-6):
            raise PlanError(
                f"layer {layer}: the weights of the group of expert {group.dominant} do not add up to 1",
                "write one share of at least 0 for each member",
            )


def check_choices(plan: FusePlan) -> None:
    """Check the plan's words.

    Raises:
        PlanError: one is unknown.
    """
    for name, value, known in (
        ("merge", plan.merge, MERGES),
        ("router", plan.router, ROUTERS),
    ):
        if value not in known:
            raise PlanError(f"{name} is {value!r}", f"known: {', '.join(known)}")


def _number(name: str) -> str:
    if not re.fullmatch("0|[1-9][0-9]{0,8}", name):
        raise ValueError(f"{name!r} is no layer")
    return name
