"""Plans of token-skip gating: which of a token's experts are not run, decided per layer by one threshold."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from moeprune._files import PathLike, envelope, read_artifact, sha256_bytes, to_json, write_atomic
from moeprune.errors import ArtifactError, ConfigError
from moeprune.plans import SCHEMA

if TYPE_CHECKING:
    import numpy.typing as npt

    FloatArray = npt.NDArray[np.float32]

SKIP = "skip"


@dataclass(frozen=True, slots=True, kw_only=True)
class Renorm:
    """What the weights of the slots that run are divided by.

    Attributes:
        kind: ``none`` keeps the denominator of all top-k slots, skipped ones included; ``survivors`` shares the whole
            weight out over the slots that run; ``topk2`` divides by the weight of the k2 largest slots
            (arXiv:2609.04575), or of those that run where they are more.
        k2: of ``topk2``.

    Example:
        >>> Renorm.parse("topk2:6")
    """

    kind: str = "none"
    k2: int = 0

    @classmethod
    def parse(cls, text: str) -> Renorm:
        """Read what is written on the command line and in plans.

        Raises:
            ConfigError: it is none of ``none``, ``survivors`` and ``topk2:N``.
        """
        kind, _, number = text.partition(":")
        if text in {"none", "survivors"}:
            return cls(kind=kind)
        if kind == "topk2" and number.isdecimal() and int(number) > 0:
            return cls(kind=kind, k2=int(number))
        raise ConfigError(f"unknown --renorm {text!r}", "none, survivors or topk2:N")

    def __str__(self) -> str:
        return f"{self.kind}:{self.k2}" if self.k2 else self.kind


@dataclass(frozen=True, slots=True, kw_only=True)
class SkipLayer:
    """One layer's decision.

    Attributes:
        threshold: a slot whose score is below it is skipped; minus infinity skips nothing.
        rate: share of the slots that were skipped on the calibration text, inputs being those of the gated model.
        table: what the policy knows of every expert, such as its mean output norm; empty for most.
        sensitivity: what the policy knows of the layer, from 0 to 1.
        span: smallest and largest value that the policy found for a token, if it scales by them.
    """

    threshold: float = -math.inf
    rate: float = 0.0
    table: tuple[float, ...] = ()
    sensitivity: float = 0.0
    span: tuple[float, float] = (0.0, 1.0)

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it; a layer that skips nothing has no threshold."""
        found: dict[str, Any] = {} if self.threshold == -math.inf else {"threshold": self.threshold}
        found["rate"] = round(self.rate, 6)
        if self.table:
            found["table"] = [float(f"{value:.6g}") for value in self.table]
        if self.sensitivity:
            found["sensitivity"] = self.sensitivity
        if self.span != (0.0, 1.0):
            found["span"] = list(self.span)
        return found

    @classmethod
    def of(cls, value: Mapping[str, Any]) -> SkipLayer:
        """From JSON.

        Raises:
            TypeError, ValueError: a field cannot be what it says.
        """
        numbers = {"threshold": -math.inf, "rate": 0.0, "sensitivity": 0.0}
        single = {name: _number(value.get(name, default)) for name, default in numbers.items()}
        table = tuple(map(_number, value.get("table", ())))
        low, high = map(_number, value.get("span", (0.0, 1.0)))
        return cls(**single, table=table, span=(low, high))


def _number(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or math.isnan(value):
        raise TypeError(f"{value!r} is no number")
    return float(value)


def side_file(path: PathLike) -> Path:
    """Where the arrays of a plan lie."""
    return Path(path).with_suffix(".safetensors")


def _read_side(file: Path, digest: str) -> dict[str, FloatArray]:
    """The arrays that belong to a plan, which names their sha256."""
    from safetensors import SafetensorError
    from safetensors.numpy import load

    if not digest:
        return {}
    try:
        data = file.read_bytes()
        if sha256_bytes(data) != digest:
            raise ArtifactError(f"{file} is not the file that its plan was written with", "write both again")
        return dict(load(data))
    except (OSError, SafetensorError) as error:
        raise ArtifactError(f"cannot read {file}, which belongs to the plan: {error}") from error


@dataclass(frozen=True, slots=True, kw_only=True)
class SkipPlan:
    """How a model skips experts of tokens, bound to one model by its fingerprint.

    Attributes:
        policy: name of the policy that scores a token's slots.
        renorm: what the weights of the other slots are divided by.
        layers: decisions by decoder layer; a layer that is absent skips nothing.
        target: share of the slots that was asked for.
        rate: share that was skipped on the calibration text, over all layers.
        top_k: experts per token.
        floor: slots of a token that are never skipped.
        baked: the decision lies in the config as a smaller number of experts per token, so that any engine follows it.
        config_edits: values that differ from the source's config.
        training: what distillation did, where it did.
        tensors: float32 arrays of the file beside the plan, by name; what is too large for JSON.
        command, inputs: canonical options, and fingerprints of the model and the texts.
    """

    policy: str
    renorm: Renorm
    layers: Mapping[int, SkipLayer]
    target: float
    rate: float
    top_k: int
    command: Mapping[str, Any]
    inputs: Mapping[str, str]
    floor: int = 1
    baked: bool = False
    config_edits: Mapping[str, Any] = field(default_factory=dict)
    training: Mapping[str, Any] = field(default_factory=dict)
    notes: Sequence[str] = ()
    tensors: Mapping[str, FloatArray] = field(default_factory=dict, repr=False)

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        return envelope(SCHEMA, self.command, self.inputs) | {
            "kind": SKIP,
            "policy": self.policy,
            "renorm": str(self.renorm),
            "target": self.target,
            "rate": round(self.rate, 6),
            "top_k": self.top_k,
            "floor": self.floor,
            **({"baked": True} if self.baked else {}),
            **({"training": dict(self.training)} if self.training else {}),
            **({"tensors": sha256_bytes(self.side_bytes())} if self.tensors else {}),
            "notes": list(self.notes),
            "config_edits": dict(self.config_edits),
            "layers": {str(index): layer.to_dict() for index, layer in sorted(self.layers.items())},
        }

    def save(self, path: PathLike) -> Path:
        """Write the plan as JSON, and beside it a safetensors file of the same name where it has arrays."""
        if self.tensors:
            write_atomic(side_file(path), self.side_bytes())
        return write_atomic(path, to_json(self.to_dict()))

    def side_bytes(self) -> bytes:
        """The file of arrays."""
        from safetensors.numpy import save

        data: bytes = save({name: np.ascontiguousarray(self.tensors[name]) for name in sorted(self.tensors)})
        return data

    @classmethod
    def load(cls, path: PathLike) -> SkipPlan:
        """Read a plan file.

        Raises:
            ArtifactError: it is missing, not JSON, of another schema or kind, or lacks a field.
        """
        payload = read_artifact(path, SCHEMA)
        if payload.get("kind") != SKIP:
            raise ArtifactError(f"{path} is a plan of kind {payload.get('kind')!r}, not {SKIP!r}")
        try:
            return cls(
                policy=str(payload["policy"]),
                renorm=Renorm.parse(payload["renorm"]),
                layers={int(name): SkipLayer.of(layer) for name, layer in payload["layers"].items()},
                target=_number(payload["target"]),
                rate=_number(payload["rate"]),
                top_k=int(payload["top_k"]),
                floor=int(payload["floor"]),
                baked=payload.get("baked") is True,
                training=dict(payload.get("training", {})),
                notes=tuple(payload["notes"]),
                config_edits=dict(payload["config_edits"]),
                tensors=_read_side(side_file(path), payload.get("tensors", "")),
                command=dict(payload["command"]),
                inputs=dict(payload["inputs"]),
            )
        except (KeyError, TypeError, ValueError, AttributeError, ConfigError) as error:
            what = f"it lacks {error}" if isinstance(error, KeyError) else str(error)
            raise ArtifactError(f"{path} is not a usable plan: {what}") from error
