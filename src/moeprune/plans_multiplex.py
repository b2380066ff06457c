"""Plans of multiplexing: which experts share one fused expert, from which small residuals tell them apart again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moeprune._files import PathLike, envelope, read_artifact, to_json, write_atomic
from moeprune.errors import ArtifactError
from moeprune.plans import SCHEMA

MULTIPLEX = "multiplex"
SIDE_FILE = Path("moeprune") / "multiplex.safetensors"


@dataclass(frozen=True, slots=True, kw_only=True)
class MultiplexLayer:
    """One layer.

    Attributes:
        groups: source indices of the experts that share a fused one, in the order of the fused ones' numbers; the
            neurons of a group are in the order of its first member's.
        loss: mean squared error of the layer's output on held-out tokens, before training and after, as a share of the
            mean square of what the routed experts add; empty where nothing was trained.
    """

    groups: tuple[tuple[int, ...], ...]
    loss: tuple[float, ...] = ()

    @property
    def new_numbers(self) -> tuple[int, ...]:
        """The fused expert of each source expert."""
        places = {expert: place for place, group in enumerate(self.groups) for expert in group}
        return tuple(places[expert] for expert in sorted(places))


@dataclass(frozen=True, slots=True, kw_only=True)
class MultiplexPlan:
    """How a model's experts were multiplexed, bound to its source by a fingerprint.

    Attributes:
        layers: by decoder layer.
        rank: of the residuals of every source expert.
        expert_bytes: of the routed experts before, and after with everything that the side file holds.
        side: xxh3-128 of the side file.
        command, inputs: canonical options, and fingerprints of the model and the data.
        config_edits: values that differ from the source's config.
        notes: what a reader should know.
    """

    layers: Mapping[int, MultiplexLayer]
    rank: int
    expert_bytes: tuple[int, int]
    side: str
    command: Mapping[str, Any]
    inputs: Mapping[str, str]
    config_edits: Mapping[str, Any] = field(default_factory=dict)
    notes: Sequence[str] = ()

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        return envelope(SCHEMA, self.command, self.inputs) | {
            "kind": MULTIPLEX,
            "rank": self.rank,
            "expert_bytes": {"before": self.expert_bytes[0], "after": self.expert_bytes[1]},
            "side": self.side,
            "notes": list(self.notes),
            "config_edits": dict(self.config_edits),
            "layers": {
                str(index): {"groups": [list(group) for group in layer.groups], "loss": list(layer.loss)}
                for index, layer in sorted(self.layers.items())
            },
        }

    def save(self, path: PathLike) -> Path:
        """Write the plan as JSON."""
        return write_atomic(path, to_json(self.to_dict()))

    @classmethod
    def load(cls, path: PathLike) -> MultiplexPlan:
        """Read a plan file.

        Raises:
            ArtifactError: it is missing, not JSON, of another schema or kind, or lacks a field.
        """
        payload = read_artifact(path, SCHEMA)
        if payload.get("kind") != MULTIPLEX:
            raise ArtifactError(f"{path} is a plan of kind {payload.get('kind')!r}, not {MULTIPLEX!r}")
        try:
            return cls(
                layers={int(name): _read_layer(layer) for name, layer in payload["layers"].items()},
                rank=int(payload["rank"]),
                expert_bytes=(int(payload["expert_bytes"]["before"]), int(payload["expert_bytes"]["after"])),
                side=str(payload["side"]),
                command=dict(payload["command"]),
                inputs=dict(payload["inputs"]),
                config_edits=dict(payload["config_edits"]),
                notes=tuple(payload["notes"]),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            what = f"it lacks {error}" if isinstance(error, KeyError) else str(error)
            raise ArtifactError(f"{path} is not a usable plan: {what}") from error


def _read_layer(value: Mapping[str, Any]) -> MultiplexLayer:
    groups = tuple(tuple(int(expert) for expert in group) for group in value["groups"])
    members = sorted(expert for group in groups for expert in group)
    if members != list(range(len(members))) or not all(groups):
        raise ValueError("the groups do not hold every expert once")
    return MultiplexLayer(groups=groups, loss=tuple(float(loss) for loss in value["loss"]))
