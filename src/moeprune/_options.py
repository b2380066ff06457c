"""Options of the stages as callers give them: read, checked and handed to the stages that know them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moeprune._plugins import published_names
from moeprune.calibration import DEFAULT_LABEL, CalibrationSet, check_vocabulary, load_calibration
from moeprune.catalogue import PATHS, ROWS, find, known_names, origin, requested
from moeprune.checkpoint import Checkpoint
from moeprune.errors import ConfigError, StrategyError, nearest, ranges
from moeprune.evaluation.presets import expand
from moeprune.evaluation.settings import EvalSettings
from moeprune.plans import Budget
from moeprune.strategies import BUILTIN as STRATEGIES
from moeprune.strategies import resolve


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationOptions:
    """How calibration data is read and run.

    Attributes:
        sources: ``[DOMAIN=]SOURCE`` each, see :func:`moeprune.calibration.load_calibration`.
        num_samples: rows per source; max_length: tokens per sequence.
        shuffle: draw rows with ``seed`` instead of taking the first; pack: join rows into full sequences.
        batch_tokens: tokens per batch, padding included.
        device, dtype: where and in what the model runs; ``auto`` is the checkpoint's own dtype.
        trust_remote_code: run code that comes with the checkpoint.
        stream: run one decoder layer at a time; None does so where the model does not fit.
        memory, device_memory: bytes that a pass layer by layer may use; by default what is free.
        layers: decoder layers to collect; by default all that have experts.
        statistics: what to measure beyond the core sums: names of statistics, or of strategies that need some;
            ``all`` is everything.
        paths: sequences of each domain that are described on their own, where that is asked for: the first ones.
    """

    sources: tuple[str, ...] = ()
    num_samples: int = 512
    max_length: int = 2048
    shuffle: bool = False
    pack: bool = False
    batch_tokens: int = 8192
    seed: int = 0
    device: str | None = None
    dtype: str = "auto"
    trust_remote_code: bool = False
    stream: bool | None = None
    memory: int | None = None
    device_memory: int | None = None
    layers: tuple[int, ...] | None = None
    statistics: tuple[str, ...] = ()
    paths: int = PATHS

    @property
    def measured(self) -> tuple[str, ...]:
        """Statistics to measure beyond the core sums, in the order that files have.

        Raises:
            ConfigError: a name is neither a statistic nor a strategy, or no sequence is to be described.
        """
        if self.paths < 1:
            raise ConfigError(f"--paths must be at least 1, not {self.paths}", f"the default is {PATHS}")
        return requested(name for given in several(self.statistics) for name in _statistics_of(given))

    def observed(self, checkpoint: Checkpoint) -> tuple[int, ...]:
        """The decoder layers to collect.

        Raises:
            ConfigError: one of them has no routed experts.
        """
        odd = sorted(set(self.layers or ()) - set(checkpoint.moe_layers))
        if odd:
            known = checkpoint.moe_layers
            raise ConfigError(
                f"--layers names layer {odd[0]}, which has no routed experts", f"layers with experts: {ranges(known)}"
            )
        return tuple(sorted(set(self.layers))) if self.layers else checkpoint.moe_layers

    def load(self, checkpoint: Checkpoint, label: str = DEFAULT_LABEL) -> CalibrationSet:
        """Read and tokenise the sources, for a model whose layers are alike; rows are labelled by that column."""
        checkpoint.check_uniform()
        _ = self.measured  # a wrong name is refused before the data is read
        if self.batch_tokens < 1:
            raise ConfigError("--batch-tokens must be at least 1", "the default is 8192")
        data = load_calibration(
            self.sources,
            checkpoint.path,
            num_samples=self.num_samples,
            max_length=self.max_length,
            shuffle=self.shuffle,
            pack=self.pack,
            seed=self.seed,
            trust_remote_code=self.trust_remote_code,
            label=label,
        )
        if isinstance(checkpoint.config.get("vocab_size"), int):
            check_vocabulary(data, checkpoint.config["vocab_size"])
        return data

    def canonical(self) -> dict[str, Any]:
        """The options that decide the statistics, file names without their folders."""
        options = dataclasses.asdict(self)
        for name in ("device", "trust_remote_code", "sources", "stream", "memory", "device_memory"):
            del options[name]  # sources are in the provenance, and how a model runs does not change what is seen
        if self.layers is None:
            del options["layers"]
        measured = self.measured
        options["statistics"] = measured
        if not measured:
            del options["statistics"]
        if not {*measured} & ROWS.keys():
            del options["paths"]
        return {"stage": "collect"} | options | origin(measured)


def _statistics_of(name: str) -> tuple[str, ...]:
    """What a name asks for: a statistic itself, a strategy what it needs."""
    if name in {"core", "all"} or find(name) is not None:
        return (name,)
    try:
        return resolve(name).needs
    except StrategyError:
        hint = nearest(name, [*known_names(), *STRATEGIES, *published_names("strategy")])
        raise ConfigError(f"--statistics {name!r} is neither a statistic nor a strategy", hint) from None


# Fields that the stages' own parameters fill.
_OWN_PARAMETERS = {"sources", "budget", "allocation", "strategy", "tasks"}


def several(value: Sequence[str] | str) -> tuple[str, ...]:
    """One name or many, as a tuple."""
    return (value,) if isinstance(value, str) else tuple(value)


def by_stage(options: Mapping[str, Any], *stages: type[Any]) -> list[dict[str, Any]]:
    """Options by the stages that have a field of that name.

    Raises:
        ConfigError: no stage has it.
    """
    fields = [{item.name for item in dataclasses.fields(stage)} - _OWN_PARAMETERS for stage in stages]
    known: set[str] = set().union(*fields)
    for name in options:
        if name not in known:
            raise ConfigError(f"unknown option {name!r}", nearest(name, known))
    return [{name: value for name, value in options.items() if name in own} for own in fields]


def budget_of(ratio: float | str | None, keep: int | None, round_to: int) -> Budget:
    """A budget; a ratio as text, so that 0.3 means three tenths."""
    return Budget(ratio=None if ratio is None else str(ratio), keep=keep, round_to=round_to)


def eval_settings(tasks: tuple[str, ...], options: Mapping[str, Any]) -> EvalSettings:
    """How to evaluate, from loose options; presets among the tasks give way to what they mean.

    Raises:
        EvaluationError: a preset cannot run here.
    """
    [given] = by_stage(options, EvalSettings)
    folder = given.pop("include_path", None)
    return expand(EvalSettings(tasks=tasks, include_path=Path(folder) if folder else None, **given))


def check_margin(margin: float) -> None:
    """Refuse a margin that is no number of points."""
    if not 0 <= margin < math.inf:
        raise ConfigError(
            f"--margin must be at least 0, not {margin}", "it is the loss in points that you would accept"
        )
