"""What goes inside every expert, and the record of what went: plans of kind ``sparsify``."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

from moeprune._files import PathLike, envelope, read_artifact, to_json, write_atomic
from moeprune.errors import ArtifactError, ConfigError
from moeprune.plans import SCHEMA

SPARSIFY = "sparsify"
_WIDE, _STEP, _SMALL_STEP = 512, 64, 8  # experts at least so wide keep a multiple of 64 neurons, others of 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Sparsity:
    """What goes inside every expert.

    Attributes:
        kind: ``unstructured`` takes the lowest weights of every output row; ``n:m`` keeps the best N of every M
            consecutive weights of a row; ``neurons`` takes whole inner neurons, so that the tensors shrink.
        fraction: of the weights of a row, or of the neurons, that goes.
        n, m: of ``n:m``; 0 for the others.

    Example:
        >>> Sparsity.parse(pattern="2:4").fraction
        Fraction(1, 2)
    """

    kind: Literal["unstructured", "n:m", "neurons"]
    fraction: Fraction
    n: int = 0
    m: int = 0

    @classmethod
    def parse(
        cls, *, sparsity: float | str | None = None, pattern: str | None = None, neurons: float | str | None = None
    ) -> Sparsity:
        """Read what the options say.

        Raises:
            ConfigError: none or several of them are given, or one is no such thing.
        """
        given = {"--sparsity": sparsity, "--pattern": pattern, "--neurons": neurons}
        named = [option for option, value in given.items() if value is not None]
        if len(named) != 1:
            what = " and ".join(named) or "nothing"
            raise ConfigError(f"{what} says what goes", "pass one of --sparsity 0.5, --pattern 2:4, --neurons 0.5")
        if pattern is not None:
            return cls._of_pattern(pattern)
        kind: Literal["unstructured", "neurons"] = "unstructured" if sparsity is not None else "neurons"
        return cls(kind=kind, fraction=_fraction(named[0], str(given[named[0]])))

    @classmethod
    def _of_pattern(cls, text: str) -> Sparsity:
        found = re.fullmatch(r"([1-9][0-9]{0,3}):([1-9][0-9]{0,3})", text)
        n, m = (int(found[1]), int(found[2])) if found else (0, 0)
        if not 0 < n < m:
            raise ConfigError(f"--pattern {text!r} is no N:M", "write how many of how many weights stay, such as 2:4")
        return cls(kind="n:m", fraction=1 - Fraction(n, m), n=n, m=m)

    @property
    def nothing(self) -> bool:
        """Whether nothing goes at all."""
        return self.fraction == 0

    def __str__(self) -> str:
        amount = f"{self.n}:{self.m}" if self.n else f"{float(self.fraction):g}"
        return amount if self.n else f"{self.kind} {amount}"

    def canonical(self) -> dict[str, str]:
        """The option that says it."""
        names = {"unstructured": "sparsity", "n:m": "pattern", "neurons": "neurons"}
        return {names[self.kind]: f"{self.n}:{self.m}" if self.n else str(float(self.fraction))}

    def gone(self, inputs: int) -> int:
        """Weights of a row of so many that go."""
        return int(self.fraction * inputs)

    def width(self, inner: int) -> int:
        """Neurons that stay of so many, rounded up to what kernels like: a multiple of 64, or of 8 below 512.

        Raises:
            ConfigError: none would go.
        """
        step = _STEP if inner >= _WIDE else _SMALL_STEP
        exact = inner - self.gone(inner)
        kept = exact if inner < step else -(-exact // step) * step
        if self.fraction and kept >= inner:
            raise ConfigError(
                f"--neurons {float(self.fraction):g} takes none of {inner} neurons, in steps of {step}",
                f"take at least {step / inner:g}",
            )
        return kept


def _fraction(option: str, text: str) -> Fraction:
    """A fraction in exact decimal arithmetic."""
    try:
        value = Fraction(text)
    except (ValueError, ZeroDivisionError):
        value = Fraction(-1)
    if not 0 <= value < 1:
        raise ConfigError(f"{option} {text} is no fraction from 0 to below 1", f"write it as {option} 0.5")
    return value


@dataclass(frozen=True, slots=True, kw_only=True)
class SparseLayer:
    """What went in one layer.

    Attributes:
        weights: of its experts, and of its shared expert where that was cut too, before.
        gone: of those, how many were removed or are 0 now.
    """

    weights: int
    gone: int

    @property
    def sparsity(self) -> float:
        """Share of the weights that went."""
        return self.gone / self.weights


@dataclass(frozen=True, slots=True, kw_only=True)
class SparsifyPlan:
    """What went inside the experts of a checkpoint, bound to its source by a fingerprint.

    Attributes:
        sparsity: what was asked for.
        layers: what went, by layer.
        width: neurons that an expert has now, where neurons went; else 0.
        command, inputs: canonical options, and fingerprints of the model and the data.
        config_edits: values that differ from the source's config.
        notes: what a reader should know.
    """

    sparsity: Sparsity
    layers: Mapping[int, SparseLayer]
    command: Mapping[str, Any]
    inputs: Mapping[str, str]
    width: int = 0
    config_edits: Mapping[str, Any] = field(default_factory=dict)
    notes: Sequence[str] = ()

    @property
    def measured(self) -> float:
        """Share of all weights of the experts that went."""
        weights = sum(layer.weights for layer in self.layers.values())
        return sum(layer.gone for layer in self.layers.values()) / weights if weights else 0.0

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        return envelope(SCHEMA, self.command, self.inputs) | {
            "kind": SPARSIFY,
            **self.sparsity.canonical(),
            "measured": round(self.measured, 6),
            **({"width": self.width} if self.width else {}),
            "notes": list(self.notes),
            "config_edits": dict(self.config_edits),
            "layers": {
                str(index): {"weights": layer.weights, "gone": layer.gone, "sparsity": round(layer.sparsity, 6)}
                for index, layer in sorted(self.layers.items())
            },
        }

    def save(self, path: PathLike) -> Path:
        """Write the plan as JSON."""
        return write_atomic(path, to_json(self.to_dict()))

    @classmethod
    def load(cls, path: PathLike) -> SparsifyPlan:
        """Read a plan file.

        Raises:
            ArtifactError: it is missing, not JSON, of another schema or kind, or lacks a field.
        """
        payload = read_artifact(path, SCHEMA)
        if payload.get("kind") != SPARSIFY:
            raise ArtifactError(f"{path} is a plan of kind {payload.get('kind')!r}, not {SPARSIFY!r}")
        try:
            asked = {name: payload[name] for name in ("sparsity", "pattern", "neurons") if name in payload}
            return cls(
                sparsity=Sparsity.parse(**asked),
                layers={
                    int(name): SparseLayer(weights=int(layer["weights"]), gone=int(layer["gone"]))
                    for name, layer in payload["layers"].items()
                },
                width=int(payload.get("width", 0)),
                command=dict(payload["command"]),
                inputs=dict(payload["inputs"]),
                config_edits=dict(payload["config_edits"]),
                notes=tuple(payload["notes"]),
            )
        except (KeyError, TypeError, ValueError, AttributeError, ConfigError) as error:
            what = f"it lacks {error}" if isinstance(error, KeyError) else str(error)
            raise ArtifactError(f"{path} is not a usable plan: {what}") from error
