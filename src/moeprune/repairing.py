"""Heal a pruned checkpoint layer by layer: everything checked first, then one sweep through both models."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moeprune._files import PathLike, envelope, human_bytes, note
from moeprune._options import CalibrationOptions, by_stage, several
from moeprune.checkpoint import Checkpoint, open_checkpoint
from moeprune.collecting import limits_of, open_stream
from moeprune.errors import ConfigError, nearest
from moeprune.evaluation.agreement import batches
from moeprune.healing.carried import carried, source_of
from moeprune.healing.closed_form import ClosedFormHealing
from moeprune.healing.distillation import Text
from moeprune.healing.expertwise import ExpertwiseHealing, check_one_to_one
from moeprune.healing.fitting import STEPS, Schedule
from moeprune.healing.layerwise import COPIES, LEVELS, Healed, LayerwiseHealing, check_pair
from moeprune.rewrite.changed import changing, check_plain, write_changed
from moeprune.rewrite.drop import DEFAULT_SHARD_SIZE, check_output
from moeprune.runtime.loading import needs_loading

if TYPE_CHECKING:
    from moeprune.calibration import CalibrationSet
    from moeprune.healing.forecast import TrainingForecast
    from moeprune.streaming.forecast import Forecast, Limits
    from moeprune.streaming.stream import LayerStream

SCHEMA = "moeprune.healing/1"
LAYERWISE, CLOSED_FORM, EXPERTS = "layerwise", "closed-form", "experts"
METHODS: Mapping[str, type[LayerwiseHealing]] = {
    LAYERWISE: LayerwiseHealing,
    CLOSED_FORM: ClosedFormHealing,
    EXPERTS: ExpertwiseHealing,
}
STEP_TOKENS = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class HealResult:
    """What healing made.

    Attributes:
        output: the folder.
        method: how.
        before, after: mean KL(original || model) per token on held-out calibration text, in nats; None in a dry run.
        healed: whether the output has new weights; else they were no better than the given ones, and it is a copy.
        record: what was written of it.
        forecast: memory, disk and reading, of a dry run.
    """

    output: Path
    method: str
    before: float | None = None
    after: float | None = None
    healed: bool = False
    record: Mapping[str, Any] = field(default_factory=dict)
    forecast: Forecast | TrainingForecast | None = None


def heal_layerwise(
    base: PathLike,
    pruned: PathLike,
    output: PathLike,
    *,
    calibration: Sequence[str] | str,
    method: str = LAYERWISE,
    train: str = "all",
    steps: int = STEPS,
    minutes: float | None = None,
    lr: float | None = None,
    step_tokens: int = STEP_TOKENS,
    max_shard_size: int = DEFAULT_SHARD_SIZE,
    revision: str | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
    **options: Any,
) -> HealResult:
    """Fit each layer of a pruned, fused or sparsified model to the original's, one layer of both in memory at a time.

    Args:
        base: the original: folder or Hub id.
        pruned: what was made from it.
        output: new folder, which appears whole or not at all.
        calibration: ``[DOMAIN=]SOURCE`` each; every tenth sequence of a domain only judges.
        method: ``layerwise`` takes gradient steps; ``experts`` too, and also brings each expert of a sparsified model
            closer to the one that it was; ``closed-form`` solves for the down projections of routed experts, and
            ``train``, ``steps``, ``minutes`` and ``lr`` say nothing.
        train: what of a layer: ``all``, ``experts`` (routed ones and their router), ``down`` or ``router``.
        steps: of Adam, for each layer; or
        minutes: for all layers together.
        lr: largest learning rate; by default 0.384 over the hidden size.
        step_tokens: tokens of a step, padding included.
        max_shard_size: bytes of tensors per file.
        revision: of a base on the Hub.
        overwrite: replace a folder that is not empty.
        dry_run: check everything, and run nothing.
        options: fields of :class:`moeprune._options.CalibrationOptions` that say how data is read and models run.

    Raises:
        ConfigError: an option cannot work, the text is too short, or it does not fit in memory.
        UnsupportedModelError: the pruned model is quantised.
    """
    if train not in LEVELS:
        raise ConfigError(f"--train {train!r} is no part of a layer", nearest(train, LEVELS) or ", ".join(LEVELS))
    if not several(calibration):
        raise ConfigError("healing trains on text", "pass --calibration data.jsonl")
    if step_tokens < 2:
        raise ConfigError(f"a step of {step_tokens} tokens predicts nothing", f"the default is {STEP_TOKENS}")
    _check_idle(options)
    [given] = by_stage(options, CalibrationOptions)
    settings = CalibrationOptions(sources=several(calibration), **given)
    schedule = Schedule(steps=steps, minutes=minutes, lr=lr, seed=settings.seed)
    original, start = open_checkpoint(base, revision=revision), open_checkpoint(pruned)
    check_plain(start, "healing")
    if needs_loading(start.path):
        raise ConfigError(
            f"{start.path.name} does not run as a stock model does, and a stock model is what is healed",
            "heal what it was made from",
        )
    start.check_uniform()
    check_output(start, output, overwrite=overwrite)
    data = settings.load(original)
    job = _Job(
        original=original,
        start=start,
        data=data,
        text=Text.split(data),
        method=method,
        train=train,
        schedule=schedule,
        step_tokens=step_tokens,
        settings=settings,
    )
    streams = [open_stream(checkpoint, job.running) for checkpoint in (original, start)]
    expected = _arrange(streams[0], streams[1], job)
    check_pair(streams[0], streams[1])
    if method == EXPERTS:
        check_one_to_one(streams[0], streams[1])
    if dry_run:
        return HealResult(output=Path(output), method=method, forecast=expected)
    return _run(job, streams, expected, Path(output), max_shard_size=max_shard_size, overwrite=overwrite)


def _check_idle(options: Mapping[str, Any]) -> None:
    """Refuse options of a collection that would do nothing here."""
    for name in ("batch_tokens", "stream", "layers", "statistics", "paths"):
        if options.get(name):
            hint = "step_tokens is the size of a batch" if name == "batch_tokens" else "leave it out"
            raise ConfigError(f"{name} says nothing about healing layer by layer", hint)


@dataclass(frozen=True, kw_only=True)
class _Job:
    """All that was checked before work begins."""

    original: Checkpoint
    start: Checkpoint
    data: CalibrationSet
    text: Text
    method: str
    train: str
    schedule: Schedule
    step_tokens: int
    settings: CalibrationOptions

    @property
    def running(self) -> CalibrationOptions:
        """How both models run: in float32, unless another dtype is asked for."""
        dtype = "float32" if self.settings.dtype == "auto" else self.settings.dtype
        return dataclasses.replace(self.settings, dtype=dtype)

    @property
    def command(self) -> dict[str, Any]:
        """Canonical options."""
        idle = {"stage", "batch_tokens", *(("dtype",) if self.settings.dtype == "auto" else ())}
        read = {name: value for name, value in self.settings.canonical().items() if name not in idle}
        how = {"stage": "heal", "method": self.method, "step_tokens": self.step_tokens}
        if self.method == CLOSED_FORM:
            return how | read
        own = {name: value for name, value in dataclasses.asdict(self.schedule).items() if value is not None}
        if self.schedule.minutes is not None:
            del own["steps"]
        return how | own | {"train": self.train} | read

    @property
    def inputs(self) -> dict[str, str]:
        """Fingerprints."""
        return {
            "base": self.original.fingerprint,
            "model": self.start.fingerprint,
            "calibration": self.data.fingerprint,
        }


def _run(
    job: _Job,
    streams: Sequence[LayerStream],
    expected: Forecast,
    output: Path,
    *,
    max_shard_size: int,
    overwrite: bool,
) -> HealResult:
    parts = (sorted(job.command.items()), sorted(job.inputs.items()), job.settings.device)
    room = 2 * job.start.nbytes + expected.disk
    with changing(job.start, output, job=parts, overwrite=overwrite, nbytes=room) as changes:
        healing = METHODS[job.method](
            streams[0],
            streams[1],
            job.text,
            train=job.train,
            schedule=job.schedule,
            step_tokens=job.step_tokens,
            changes=changes,
            spill=expected.spill,
        )
        made = healing.run()
        healed = made.after < made.before
        if not healed:
            note("no weights were found that are closer to the original on held-out text: the output is a copy")
            changes.discard()
        record = envelope(SCHEMA, job.command, job.inputs) | _record(job.method, made, healed)
        write_changed(
            job.start,
            changes,
            output,
            records={"healing": record},
            extra=carried(job.start),
            source=source_of(job.original, job.start),
            max_shard_size=max_shard_size,
            overwrite=overwrite,
        )
    after = made.after if healed else made.before
    return HealResult(output=output, method=job.method, before=made.before, after=after, healed=healed, record=record)


def _record(method: str, made: Healed, healed: bool) -> dict[str, Any]:
    """What the fits came to; layers whose weights stayed are those with step 0."""
    return {
        "method": method,
        "healed": healed,
        "held_out_kl": {"before": made.before, "after": made.after if healed else made.before},
        "held_out_tokens": made.tokens,
        "steps": max((fitted.steps for fitted in made.layers.values()), default=0),
        "best_step": max((fitted.best for fitted in made.layers.values()), default=0) if healed else 0,
        "layers": {
            str(index): {
                "loss": {"before": fitted.before, "after": fitted.after},
                "steps": fitted.steps,
                "best_step": fitted.best if healed else 0,
            }
            for index, fitted in made.layers.items()
        },
    }


# --- memory -----------------------------------------------------------------------------------------------------------


def _arrange(base: LayerStream, given: LayerStream, job: _Job) -> Forecast:
    """Forecast the sweep, and have the original's layers in memory as far as there is room for them.

    Raises:
        ConfigError: it cannot fit.
    """
    from moeprune.streaming.forecast import Load, forecast

    text = (*job.text.train, *job.text.held_out)
    shapes = [(len(rows), ids_BT.shape[1]) for rows, ids_BT, _ in batches(text, job.step_tokens)]
    limits = limits_of(job.settings, base.device)
    copies = 5 if job.method == CLOSED_FORM else 3  # hidden states, and what a regression keeps of each token
    load = Load(shapes=shapes, copies=copies, last=base.depth - 1, head=True, durable=True)
    expected = forecast(base.weights, load, limits)
    base.chunk = expected.chunk
    if METHODS[job.method].keeps_original and not base.whole_layers:
        raise ConfigError(f"--method {job.method} holds a layer of both models in memory", "raise --memory")
    fitting = COPIES * _largest(given) + 4 * expected.work
    if METHODS[job.method].keeps_original:
        fitting += _largest(base) + 4 * expected.work
    return _with_fit(expected, fitting, limits)


def _with_fit(expected: Forecast, fitting: int, limits: Limits) -> Forecast:
    """The forecast of a sweep in which so many bytes are taken while a layer is fitted.

    Raises:
        ConfigError: it cannot fit.
    """
    more = max(0, fitting - expected.layer - expected.work)
    place = "host" if limits.device is None else "device"
    whole = dataclasses.replace(expected, **{place: getattr(expected, place) + more})
    if whole.host > limits.host and not whole.spill:
        whole = dataclasses.replace(whole, spill=True, host=whole.host - whole.states)
    needed, room = getattr(whole, place), getattr(limits, place)
    if needed > room:
        raise ConfigError(
            f"fitting a layer takes {human_bytes(needed)}, and there are {human_bytes(room)}",
            f"raise {'--memory' if place == 'host' else '--device-memory'}, or run smaller batches with --step-tokens",
        )
    return whole


def _largest(stream: LayerStream) -> int:
    """Bytes of a model's largest layer in memory."""
    return max(stream.weights.nbytes(layer) for layer in range(stream.depth))
