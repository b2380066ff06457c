"""Many plans scored on text: in memory where the model fits, else in one pass over its layers."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moeprune._files import PathLike, begin_work, check_output_folder, sha256_bytes, to_json
from moeprune._options import CalibrationOptions, by_stage, several
from moeprune.accounts import account_of
from moeprune.calibration import CalibrationSet
from moeprune.checkpoint import Checkpoint, open_checkpoint
from moeprune.collecting import check_spill, limits_of, open_stream, spill_folder, streams
from moeprune.errors import ConfigError, MoePruneError
from moeprune.evaluation.agreement import batches
from moeprune.evaluation.evaluator import Evaluator, Masked, PlanScore, ResidentEvaluator, check_documents
from moeprune.evaluation.skip_report import measured_rate
from moeprune.evaluation.skipped import Gated, Tally
from moeprune.evaluation.text import TextReport, write_text_report
from moeprune.plan_kinds import load_plan
from moeprune.plans import PruningPlan
from moeprune.plans_fuse import plan_kind
from moeprune.plans_skip import SkipPlan
from moeprune.rewrite.drop import PROVENANCE, check_plan
from moeprune.rewrite.skip import check_made_for
from moeprune.statistics import RouterStatistics
from moeprune.strategies import AUTO, BUILTIN, Strategy
from moeprune.strategies.allocate import Allocation
from moeprune.strategies.evolve import POPULATION

if TYPE_CHECKING:
    from moeprune.streaming.forecast import Forecast
    from moeprune.streaming.stream import LayerStream

_EVALUATE = "evaluate the checkpoint that it made: moeprune eval BASE OUT --tasks ... or --probes"
SELECTION_SAMPLES = 64  # rows of each source, as in the paper of the search
PlanLike = PathLike | PruningPlan | SkipPlan


def evaluate_text(
    base: PathLike,
    plans: Sequence[PlanLike] | PlanLike,
    *,
    text: Sequence[str] | str,
    output: PathLike | None = None,
    revision: str | None = None,
    overwrite: bool = False,
    **options: Any,
) -> TextReport:
    """Score plans on text: perplexity, and how far the next-token distributions agree with the base model's.

    No checkpoint is written: the experts that a plan drops are masked in the base model, which computes what the pruned
    model would. All plans share one pass over a model that does not fit in memory.

    Args:
        base: folder or Hub id of the original.
        plans: plans that drop experts or skip some of them for tokens, their files, or folders that
            :func:`moeprune.apply` wrote, whose plan is taken; one or many.
        text: ``[DOMAIN=]SOURCE`` each, as for calibration; a row is a document.
        output: folder for ``text.json`` and ``text.md``.
        revision: of a base on the Hub.
        overwrite: replace the report in ``output``.
        options: ``num_samples``, ``max_length``, ``batch_tokens``, ``device``, ``stream``, ``memory`` and the other
            fields of :class:`moeprune._options.CalibrationOptions`, except for ``layers``.

    Raises:
        StaleArtifactError: a plan was made for another model.
        PlanError: a plan that no engine could run.
        ConfigError: an option cannot work, or the text gives no usable token.
        EvaluationError: fewer than two documents with a token to predict.

    Example:
        >>> report = moeprune.evaluate_text("base", ["half.json", "third.json"], text="heldout.jsonl", output="report")
        >>> report.best, [plan.ratio.value for plan in report.plans]
    """
    job = _opened(base, plans, text, output, revision=revision, overwrite=overwrite, options=options)
    variants = [_variant(job, plan) for plan in job.plans.values()]
    with open_evaluator(job.checkpoint, job.settings, job.data, plans=len(variants), output=job.output) as evaluator:
        report = _report(job, variants, evaluator.score(variants))
    if job.output is not None:
        write_text_report(report, job.output)
    return report


def _variant(job: _Job, plan: PruningPlan | SkipPlan) -> Masked | Gated:
    """The base model as a plan has it."""
    if isinstance(plan, PruningPlan):
        return Masked({index: plan.layers[index].keep for index in job.checkpoint.moe_layers})
    return Gated(plan, Tally([0] * len(job.data.sequences)))


def _kept(job: _Job, plan: PruningPlan | SkipPlan) -> float:
    """Experts that stay in a MoE layer, the mean over the layers."""
    if isinstance(plan, SkipPlan):
        return float(job.checkpoint.num_experts)
    return sum(len(plan.layers[index].keep) for index in job.checkpoint.moe_layers) / len(job.checkpoint.moe_layers)


def _report(job: _Job, variants: Sequence[Masked | Gated], scores: Sequence[PlanScore]) -> TextReport:
    skipped = (
        f"{name} keeps all experts and skips {100 * measured_rate(variant.tally):.1f} % of the slots on this text"
        for name, variant in zip(job.plans, variants, strict=True)
        if isinstance(variant, Gated)
    )
    plans = {f"plan {name}": sha256_bytes(to_json(plan.to_dict()).encode()) for name, plan in job.plans.items()}
    return TextReport.of(
        dict(zip(job.plans, scores, strict=True)),
        {name: _kept(job, plan) for name, plan in job.plans.items()},
        job.data.domains,
        base_model=job.checkpoint.path.resolve().name,
        num_experts=job.checkpoint.num_experts,
        text=job.data.provenance,
        warnings=(*job.warnings, *skipped),
        command=job.settings.canonical() | {"stage": "text"},
        inputs={"model": job.checkpoint.fingerprint, "text": job.data.fingerprint} | plans,
    )


def forecast_text(
    base: PathLike,
    plans: Sequence[PlanLike] | PlanLike,
    *,
    text: Sequence[str] | str,
    output: PathLike | None = None,
    revision: str | None = None,
    overwrite: bool = False,
    **options: Any,
) -> Forecast | None:
    """Check what :func:`evaluate_text` would do and say what it would take, without running or writing anything.

    Args:
        base, plans, text, output, revision, overwrite, options: as for :func:`evaluate_text`.

    Returns:
        Peak memory, disk and reading of a pass layer by layer; None where the model would be loaded whole.
    """
    job = _opened(base, plans, text, output, revision=revision, overwrite=overwrite, options=options)
    return forecast_evaluator(job.checkpoint, job.settings, job.data, plans=len(job.plans), output=job.output)


def forecast_evaluator(
    checkpoint: Checkpoint,
    settings: CalibrationOptions,
    data: CalibrationSet,
    *,
    plans: int,
    output: Path | None = None,
) -> Forecast | None:
    """What :func:`open_evaluator` and a call for so many plans would take; None where the model would be loaded whole.

    Raises:
        ConfigError: it cannot fit.
    """
    shapes = _shapes(data, settings)
    if not streams(checkpoint, settings, beside=logits_bytes(checkpoint, data, settings)):
        return None
    expected = _arrange(open_stream(checkpoint, settings), settings, shapes, plans)
    check_spill(expected, output)
    return expected


@contextlib.contextmanager
def open_evaluator(
    checkpoint: Checkpoint,
    settings: CalibrationOptions,
    data: CalibrationSet,
    *,
    plans: int,
    output: Path | None = None,
) -> Iterator[Evaluator]:
    """What scores plans on a checkpoint: in memory where it fits, else layer by layer.

    Args:
        checkpoint: the base model.
        settings: how to run it.
        data: the documents.
        plans: most plans in one call, for which memory and disk are set apart.
        output: what will be written in the end; hidden states that need files lie beside it.

    Raises:
        EvaluationError: fewer than two documents with a token to predict.
        ConfigError: it cannot fit.
    """
    check_documents(data.sequences)
    shapes = _shapes(data, settings)
    if not streams(checkpoint, settings, beside=logits_bytes(checkpoint, data, settings)):
        from moeprune.collectors.resident import load_model

        model = load_model(
            checkpoint, device=settings.device, dtype=settings.dtype, trust_remote_code=settings.trust_remote_code
        )
        yield ResidentEvaluator(model, data.sequences, settings.batch_tokens)
        return
    from moeprune.evaluation.streamed import StreamedEvaluator
    from moeprune.streaming.states import SpilledStates, States

    stream = open_stream(checkpoint, settings)
    expected = _arrange(stream, settings, shapes, plans)
    with spill_folder(expected, output) as folder:
        begin_work()
        states = functools.partial(SpilledStates, folder=folder) if expected.spill else States
        yield StreamedEvaluator(stream, data.sequences, settings.batch_tokens, states=states)


# --- what searches ----------------------------------------------------------------------------------------------------


def load_selection(
    checkpoint: Checkpoint,
    settings: CalibrationOptions,
    sources: tuple[str, ...],
    allocation: Allocation,
    strategy: Strategy,
    calibration: CalibrationSet | None = None,
) -> SelectionText | None:
    """Read the text on which candidates are scored; None where none are.

    Args:
        checkpoint: the model.
        settings: how to read and run it.
        sources: of the text.
        allocation, strategy: one of which may search.
        calibration: what the statistics are of, where it is at hand.

    Raises:
        ConfigError: what searches has no text, nothing searches and there is one, or it is calibration data too.
        EvaluationError: fewer than two documents with a token to predict.
    """
    chooses = strategy.name == AUTO.name
    if chooses and allocation.searched:
        raise ConfigError("--strategy auto and --budget evolve both search", "leave one of them out")
    if (allocation.searched or chooses) is not bool(sources):
        if sources:
            raise ConfigError("--selection is for what searches", "add --strategy auto or --budget evolve")
        what = "--strategy auto scores plans" if chooses else f"--budget {allocation} scores counts"
        raise ConfigError(f"{what} on a text of its own", "name one with --selection")
    if not sources:
        return None
    samples = settings.num_samples if chooses else SELECTION_SAMPLES
    own = dataclasses.replace(settings, sources=sources, num_samples=samples, shuffle=False, pack=False, layers=None)
    data = own.load(checkpoint)
    check_documents(data.sequences)
    if calibration is not None:
        check_disjoint(calibration, data)
    return SelectionText(settings=own, data=data, plans=len(BUILTIN) if chooses else POPULATION)


def check_disjoint(calibration: CalibrationSet, selection: CalibrationSet) -> None:
    """Refuse to choose on text that the candidates were calibrated on.

    Raises:
        ConfigError: some sequence is in both.
    """
    shared = set(calibration.sequences) & set(selection.sequences)
    if shared:
        raise ConfigError(
            f"{len(shared)} sequences of the selection text are calibration data too",
            "choose on text that nothing was calibrated on: another --selection",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class SelectionText:
    """Documents on which candidates are scored, apart from those of the calibration; so many plans at a time."""

    settings: CalibrationOptions
    data: CalibrationSet
    plans: int


@contextlib.contextmanager
def selection_evaluator(
    checkpoint: Checkpoint, text: SelectionText | None, *, output: Path | None = None
) -> Iterator[Evaluator | None]:
    """What scores a generation of candidates; None where nothing is scored."""
    if text is None:
        yield None
        return
    with open_evaluator(checkpoint, text.settings, text.data, plans=text.plans, output=output) as evaluator:
        yield evaluator


# --- sizes ------------------------------------------------------------------------------------------------------------


def _shapes(data: CalibrationSet, settings: CalibrationOptions) -> list[tuple[int, int]]:
    """Rows and padded length of every batch."""
    return [(len(rows), ids_BT.shape[1]) for rows, ids_BT, _ in batches(data.sequences, settings.batch_tokens)]


def logits_bytes(checkpoint: Checkpoint, data: CalibrationSet, settings: CalibrationOptions) -> int:
    """Of the largest batch under two models, in float32 at most."""
    vocabulary = int(checkpoint.spec.values(checkpoint.config).get("vocab_size", 0))
    return 2 * 4 * vocabulary * max(rows * length for rows, length in _shapes(data, settings))


def _arrange(
    stream: LayerStream, settings: CalibrationOptions, shapes: Sequence[tuple[int, int]], plans: int
) -> Forecast:
    """Forecast a pass, and have the stream hold as many experts at a time as there is room for."""
    from moeprune.streaming.forecast import Load, forecast

    load = Load(shapes=shapes, copies=1 + plans, last=stream.depth - 1, head=True)
    expected = forecast(stream.weights, load, limits_of(settings, stream.device))
    stream.chunk = expected.chunk
    return expected


# --- what is scored, on what ------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class _Job:
    """Everything opened and checked."""

    checkpoint: Checkpoint
    settings: CalibrationOptions
    data: CalibrationSet
    plans: dict[str, PruningPlan | SkipPlan]
    output: Path | None
    warnings: tuple[str, ...]


def _opened(
    base: PathLike,
    plans: Sequence[PlanLike] | PlanLike,
    text: Sequence[str] | str,
    output: PathLike | None,
    *,
    revision: str | None,
    overwrite: bool,
    options: dict[str, Any],
) -> _Job:
    """Open all inputs and refuse what cannot be scored."""
    [given] = by_stage(options, CalibrationOptions)
    if given.pop("layers", None):
        raise ConfigError("plans are scored on all layers of a model", "leave layers out")
    settings = CalibrationOptions(sources=several(text), **given)
    if output is not None:
        check_output_folder(output, overwrite=overwrite)
    sources = [plans] if isinstance(plans, str | os.PathLike | PruningPlan | SkipPlan) else list(plans)
    if not sources:
        raise ConfigError("there is no plan to score", "name plan files, or folders that `moeprune apply` wrote")
    read = {name: _read_plan(source) for name, source in zip(_names(sources), sources, strict=True)}
    checkpoint = open_checkpoint(base, revision=revision)
    for name, (plan, _) in read.items():
        _check(checkpoint, name, plan)
    data = settings.load(checkpoint)
    check_documents(data.sequences)
    known = [name for name, (_, seen) in read.items() if seen & text_digests([data.fingerprint], data.provenance)]
    return _Job(
        checkpoint=checkpoint,
        settings=settings,
        data=data,
        plans={name: plan for name, (plan, _) in read.items()},
        output=Path(output) if output is not None else None,
        warnings=tuple(f"{name} was made from this very text: it looks better than it is" for name in known),
    )


def _read_plan(source: PlanLike) -> tuple[PruningPlan | SkipPlan, set[str]]:
    """A plan, and the digests of the texts that it was made from as far as they are known."""
    if isinstance(source, PruningPlan | SkipPlan):
        return source, text_digests(source.inputs.values(), ())
    file, statistics = Path(source), Path(source) / PROVENANCE / "statistics.safetensors"
    if file.is_dir():
        file = file / PROVENANCE / "plan.json"
        if not file.is_file():
            hint = "name plan files, or folders that `moeprune apply` wrote"
            raise ConfigError(f"{source} is no checkpoint that moeprune wrote: it has no {PROVENANCE}/plan.json", hint)
    if (file.parent / "healing.json").is_file():
        raise ConfigError(f"{source} was healed: its plan alone does not make it", _EVALUATE)
    plan = load_plan(file)
    if not isinstance(plan, PruningPlan | SkipPlan):
        raise ConfigError(f"{file} is a plan of kind {plan_kind(file)!r}, which computes new weights", _EVALUATE)
    provenance = RouterStatistics.load(statistics).provenance if statistics.is_file() else ()
    return plan, text_digests(plan.inputs.values(), provenance)


def text_digests(fingerprints: Iterable[object], provenance: Sequence[Any]) -> set[str]:
    """What identifies texts: of all token ids of each, and of each source's token ids and file."""
    found = {one for joined in fingerprints for one in str(joined).split("+")}  # merged statistics have several
    for entry in provenance:
        found |= {str(entry.get("sha256") or ""), str(entry.get("file_sha256") or "")}
    return found - {""}


def _check(checkpoint: Checkpoint, name: str, plan: PruningPlan | SkipPlan) -> None:
    """Refuse a plan of another model, that no engine could run, or that belongs to other weights, by its name."""
    try:
        if isinstance(plan, PruningPlan):
            check_plan(checkpoint, plan)
            return
        check_made_for(plan.inputs, checkpoint)
        if account_of(plan).trained:
            raise ConfigError("the plan belongs to weights that were trained with it", _EVALUATE)
        if plan.baked:
            raise ConfigError("the plan is a config with fewer experts per token", _EVALUATE)
    except MoePruneError as error:
        raise type(error)(f"{name}: {error.message}", error.hint) from error


def _names(sources: Sequence[PlanLike]) -> Iterator[str]:
    """As much of each path's end as tells it from the others; no more of it is anybody's business."""
    parts = [_parts(source) for source in sources]
    longest = max(map(len, parts))
    lengths = (length for length in range(1, longest) if len({own[-length:] for own in parts}) == len({*parts}))
    length, taken = next(lengths, longest), set[str]()
    for own in parts:
        stem = "/".join(own[-length:])
        numbered = (f"{stem} ({number})" for number in itertools.count(2))
        name = next(name for name in itertools.chain([stem], numbered) if name not in taken)
        taken.add(name)
        yield name


def _parts(source: PlanLike) -> tuple[str, ...]:
    if isinstance(source, PruningPlan | SkipPlan):
        return (source.policy if isinstance(source, SkipPlan) else str(source.strategy.get("name", "plan")),)
    path = Path(source).resolve()
    return (path.with_suffix("") if path.suffix == ".json" else path).parts
