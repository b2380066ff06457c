"""Fuse experts: collect, plan, merge and verify, in one go or from the file of a stage."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from moeprune._files import PathLike, begin_work, check_free_space, check_output_file
from moeprune._options import CalibrationOptions, budget_of, by_stage, check_margin, eval_settings, several
from moeprune.calibration import CalibrationSet
from moeprune.checkpoint import Checkpoint, open_checkpoint
from moeprune.collecting import collected, device_for, expected_of, leaving, limits_of, open_stream, spill_folder
from moeprune.collectors.distributed import refuse_many
from moeprune.errors import ConfigError
from moeprune.evaluation.cache import cache_folder
from moeprune.evaluation.harness import preflight
from moeprune.evaluation.settings import EvalSettings
from moeprune.fusing_in_order import InOrder, check_in_order, expected_in_order, fuse_in_order
from moeprune.oneshot import bundled, check_evaluated
from moeprune.pipeline import default_output, evaluate_checkpoints
from moeprune.planner_fuse import Fusion, check_fusion, derive_fusion, make_fuse_plan
from moeprune.plans import Budget
from moeprune.plans_fuse import FITTED, FusePlan
from moeprune.rewrite.changed import check_plain
from moeprune.rewrite.drop import DEFAULT_SHARD_SIZE, PROVENANCE, check_output
from moeprune.rewrite.fuse import Calibration, apply_fuse, open_weights
from moeprune.rewrite.fuse_fit import fit_bytes
from moeprune.rewrite.verify_fuse import verify_fuse
from moeprune.runtime.masking import chosen_by_some
from moeprune.statistics import RouterStatistics
from moeprune.strategies.fusion import find_grouping

if TYPE_CHECKING:
    from moeprune.evaluation.compare import EvalReport
    from moeprune.rewrite.verify import Verification
    from moeprune.streaming.forecast import Forecast
    from moeprune.streaming.weights import Weights


@dataclass(frozen=True, kw_only=True)
class FuseResult:
    """What a run made; a dry run knows how many experts stay, and makes nothing.

    Attributes:
        output: the fused checkpoint.
        plan: what was merged; None in a dry run that has yet to find out.
        kept, of: experts that stay, of how many.
        verification, report: what was proved and measured.
        forecast: of a dry run: what the calibration would take.
    """

    output: Path
    kept: int
    of: int
    plan: FusePlan | None = None
    verification: Verification | None = None
    report: EvalReport | None = None
    forecast: Forecast | None = None


def plan_fusion(
    statistics: PathLike | RouterStatistics,
    model: PathLike,
    *,
    ratio: float | str | None = None,
    keep: int | None = None,
    round_to: int = 1,
    revision: str | None = None,
    output: PathLike | None = None,
    overwrite: bool = False,
    **options: Any,
) -> FusePlan:
    """Decide which experts are merged. Runs without torch.

    Args:
        statistics: a statistics file, or what :func:`moeprune.collect` returned; it must hold what the grouping needs.
        model: the folder or Hub id they were made from.
        ratio: fraction of the routed experts of each layer that goes; or
        keep: exact number that is left.
        round_to: make the count that is left a multiple of this.
        revision: of a Hub model.
        output: plan file to write.
        overwrite: replace ``output``.
        options: other fields of :class:`moeprune.planner_fuse.Fusion`.

    Raises:
        StaleArtifactError: the statistics were made for another model.
        StrategyError: the grouping is unknown, or its statistics are missing.
        ConfigError: an option cannot work.
        UnsupportedModelError: the weights are quantised.

    Example:
        >>> plan = moeprune.plan_fusion("statistics.safetensors", "base", ratio=0.25, output="plan.json")
        >>> plan.layers[0].groups[0].members
    """
    if output is not None:
        check_output_file(output, overwrite=overwrite)
    stats = statistics if isinstance(statistics, RouterStatistics) else RouterStatistics.load(statistics)
    [given] = by_stage(options, Fusion)
    made = make_fuse_plan(
        open_checkpoint(model, revision=revision), stats, Fusion(budget=budget_of(ratio, keep, round_to), **given)
    )
    if output is not None:
        begin_work()
        made.save(output)
    return made


def fuse(
    model: PathLike | None = None,
    output: PathLike | None = None,
    *,
    ratio: float | str | None = None,
    keep: int | None = None,
    calibration: Sequence[str] | str = (),
    statistics: PathLike | RouterStatistics | None = None,
    plan: PathLike | FusePlan | None = None,
    plan_only: bool = False,
    tasks: Sequence[str] | str = (),
    margin: float = 1.0,
    round_to: int = 1,
    max_shard_size: int = DEFAULT_SHARD_SIZE,
    revision: str | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
    cache: PathLike | Literal[False] | None = None,
    **options: Any,
) -> FuseResult:
    """Merge experts into fewer: collect, plan, merge, verify and, with tasks, evaluate.

    Args:
        model: folder or Hub id; left out, the bundled model with its calibration text and its tasks.
        output: folder of the fused checkpoint; by default ``./<name>-fused-<left>of<E>``.
        ratio: fraction of the routed experts of each layer that goes; or
        keep: exact number that is left.
        calibration: ``[DOMAIN=]SOURCE`` each.
        statistics: what was collected before, in the place of a collection.
        plan: what :func:`plan_fusion` made, to be executed as it is.
        plan_only: write the plan to the file ``output``, and merge nothing.
        tasks: lm-eval tasks; none means no evaluation.
        margin: acceptable loss in points.
        round_to: make the count that is left a multiple of this.
        max_shard_size: bytes of tensors per file.
        revision: of a Hub model.
        overwrite: replace a folder that is not empty.
        dry_run: check everything and run nothing.
        cache: folder where the results of ``model`` on the tasks are kept, by default the user's own; False is none.
        options: other fields of :class:`moeprune._options.CalibrationOptions`,
            :class:`moeprune.planner_fuse.Fusion` and :class:`moeprune.evaluation.settings.EvalSettings`. With
            ``sequential`` every layer is grouped and merged on what the fused layers before it give.

    Raises:
        MoePruneError: anything that the stages refuse.

    Example:
        >>> result = moeprune.fuse("base", "fused", ratio=0.25, calibration="data.jsonl")
        >>> result.plan.layers[0].groups[0].members
    """
    refuse_many("fuse")
    sources, names = several(calibration), several(tasks)
    check_margin(margin)
    check_evaluated(names, {**options, "cache": cache}, bundled=model is None)
    if model is None:
        model, sources, names, options = bundled(sources, names, options)
    calibrated, decided, evaluated = by_stage(options, CalibrationOptions, Fusion, EvalSettings)
    amount = budget_of(ratio, keep, round_to)
    job = _opened(
        model, output, amount, sources, statistics, plan, calibrated, decided, revision=revision, plan_only=plan_only
    )
    if calibration and job.data is None:
        raise ConfigError("--calibration is given, and nothing runs the model", "leave it out")
    _check_target(job, overwrite=overwrite, plan_only=plan_only)
    in_order = _in_order(job)
    weights = open_weights(
        job.checkpoint, device_for(job.settings.device), trust_remote_code=job.settings.trust_remote_code
    )
    evaluation = _preflight(job, names, evaluated) if names and not plan_only else None
    if dry_run:
        return FuseResult(
            output=job.output,
            kept=job.kept,
            of=job.checkpoint.num_experts,
            plan=job.plan,
            forecast=_collection(job) if in_order is None else expected_in_order(in_order),
        )
    writing: dict[str, Any] = {"max_shard_size": max_shard_size, "overwrite": overwrite}
    if in_order is not None:
        made = fuse_in_order(in_order, **writing)
    else:
        made = _fuse_at_once(job, weights, writing, plan_only=plan_only)
    result = FuseResult(output=job.output, kept=made.kept, of=job.checkpoint.num_experts, plan=made)
    if plan_only:
        return result
    result = dataclasses.replace(result, verification=verify_fuse(job.checkpoint, job.output))
    if evaluation is None:
        return result
    folder = job.output / PROVENANCE / "report"
    fused = open_checkpoint(job.output)
    report = evaluate_checkpoints(job.checkpoint, fused, evaluation, folder, margin=margin, cache=cache_folder(cache))
    return dataclasses.replace(result, report=report)


def _collection(job: _Job) -> Forecast | None:
    """What collecting statistics would take; None where the whole model is loaded, or where they are there."""
    if job.plan is not None or job.statistics is not None or job.data is None:
        return None
    return expected_of(job.checkpoint, job.settings, job.data, output=job.output)


# --- what is checked before anything runs -----------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Job:
    """Everything opened and checked.

    Attributes:
        checkpoint, output, kept: what is fused, where to, and the experts that are left.
        settings, data: how the model runs, and on what.
        fits: whether merged experts are fitted to the data.
        wanted: what the plan is asked for; None where there is a plan.
        statistics, plan: where they are there already.
    """

    checkpoint: Checkpoint
    output: Path
    kept: int
    settings: CalibrationOptions
    data: CalibrationSet | None
    fits: bool
    wanted: Fusion | None
    statistics: RouterStatistics | None
    plan: FusePlan | None


def _opened(
    model: PathLike,
    output: PathLike | None,
    amount: Budget,
    sources: tuple[str, ...],
    statistics: PathLike | RouterStatistics | None,
    plan: PathLike | FusePlan | None,
    calibrated: Mapping[str, Any],
    decided: Mapping[str, Any],
    *,
    revision: str | None,
    plan_only: bool,
) -> _Job:
    """Open all inputs and refuse what cannot be fused."""
    if plan is not None and (amount.given or statistics is not None or decided or plan_only):
        raise ConfigError("a plan says already what is merged", "leave out what would decide it anew")
    checkpoint = open_checkpoint(model, revision=revision)
    checkpoint.check_uniform()
    check_plain(checkpoint, "fusing")
    made = None
    if plan is not None:
        made = derive_fusion(checkpoint, plan if isinstance(plan, FusePlan) else FusePlan.load(plan))
        _check_fit_again(made)
        wanted, kept, merge = None, made.kept, made.merge
    else:
        wanted = Fusion(budget=amount, **decided)
        kept, merge = check_fusion(checkpoint, wanted), wanted.merge
        if wanted.sequential and (statistics is not None or plan_only):
            raise _only_in_order("--plan-only" if plan_only else "--statistics-file")
    needs = find_grouping(wanted.grouping).needs if wanted and statistics is None else ()
    stats = statistics if isinstance(statistics, RouterStatistics | None) else RouterStatistics.load(statistics)
    settings = CalibrationOptions(sources=sources, **calibrated)
    settings = dataclasses.replace(settings, statistics=(*several(settings.statistics), *needs))
    fits = merge in FITTED and not plan_only
    runs = fits or (made is None and statistics is None)
    if runs and not sources:
        what = f"{merge} fits merged experts to activations" if fits else "a grouping reads statistics"
        raise ConfigError(f"{what}, and there is no calibration data", "pass --calibration data.jsonl")
    name = default_output(model, f"fused-{kept}", checkpoint.num_experts)
    return _Job(
        checkpoint=checkpoint,
        output=Path(output) if output else name,
        kept=kept,
        settings=settings,
        data=settings.load(checkpoint) if runs else None,
        fits=fits,
        wanted=wanted,
        statistics=stats,
        plan=made,
    )


def _only_in_order(option: str) -> ConfigError:
    what = "writes its plan with the checkpoint" if option == "--plan-only" else "collects the statistics of each layer"
    return ConfigError(f"--sequential {what}, as the layers before it are fused", f"leave {option} out")


def _check_fit_again(plan: FusePlan) -> None:
    """Refuse to fit to the original's activations what a plan says was fitted to those of fused layers."""
    if plan.command.get("sequential") and plan.merge in FITTED:
        raise ConfigError(
            f"the plan is of a sequential run, whose {plan.merge} was fitted to what fused layers gave",
            "run `moeprune fuse MODEL --sequential` again with its options",
        )


def _in_order(job: _Job) -> InOrder | None:
    """The job layer by layer, where that is asked for."""
    if job.wanted is None or not job.wanted.sequential or job.data is None:
        return None
    check_in_order(job.settings)
    return InOrder(
        checkpoint=job.checkpoint, wanted=job.wanted, settings=job.settings, data=job.data, output=job.output
    )


def _check_target(job: _Job, *, overwrite: bool, plan_only: bool) -> None:
    if plan_only:
        check_output_file(job.output, overwrite=overwrite)
        return
    check_output(job.checkpoint, job.output, overwrite=overwrite)
    check_free_space(job.output, 2 * job.checkpoint.nbytes * job.kept // job.checkpoint.num_experts)


def _preflight(job: _Job, names: tuple[str, ...], options: Mapping[str, Any]) -> EvalSettings:
    """Check that every task can be run."""
    settings = eval_settings(names, options)
    preflight(settings, job.checkpoint.path)
    return settings


# --- what runs --------------------------------------------------------------------------------------------------------


def _fuse_at_once(job: _Job, weights: Weights, writing: Mapping[str, Any], *, plan_only: bool) -> FusePlan:
    """Decide all layers by statistics of the original, then merge them; or write the plan."""
    with _planned(job) as (made, extra):
        if plan_only:
            begin_work()
            made.save(job.output)
            return made
        with _fitted(job, made) as fit:
            apply_fuse(job.checkpoint, made, job.output, weights=weights, calibration=fit, extra=extra, **writing)
    return made


@contextlib.contextmanager
def _planned(job: _Job) -> Iterator[tuple[FusePlan, Mapping[str, bytes]]]:
    """The plan, and the statistics that it was made of, to lie beside it."""
    if job.plan is not None or job.wanted is None:
        assert job.plan is not None  # noqa: S101 - it is there, or what it is asked for
        yield _with_data(job, job.plan), {}
        return
    with contextlib.ExitStack() as undo:
        stats = job.statistics or undo.enter_context(
            collected(job.checkpoint, job.settings, job.data, output=job.output)
        )
        made = make_fuse_plan(job.checkpoint, stats, job.wanted)
        yield _with_data(job, made), {"statistics.safetensors": stats.to_bytes()}


def _with_data(job: _Job, plan: FusePlan) -> FusePlan:
    """The plan, with what its merged experts are fitted to among its inputs."""
    if not job.fits or job.data is None:
        return plan
    return dataclasses.replace(plan, inputs={**plan.inputs, "fit": job.data.fingerprint})


@contextlib.contextmanager
def _fitted(job: _Job, plan: FusePlan) -> Iterator[Calibration | None]:
    """For what is fitted to activations, the model as a stream of layers with its inputs."""
    if not job.fits or job.data is None:
        yield None
        return
    from moeprune.streaming.forecast import Load, forecast
    from moeprune.streaming.states import SpilledStates, States
    from moeprune.streaming.stream import padded

    stream = open_stream(job.checkpoint, job.settings)
    batches = job.data.batches(job.settings.batch_tokens)
    inputs = [padded(batch.sequences) for batch in batches]
    limits, sums = leaving(limits_of(job.settings, stream.device), _fit_bytes(stream.weights, plan))
    load = Load(shapes=[tuple(one["input_ids"].shape) for one in inputs], last=max(plan.layers), sums=sums)
    expected = forecast(stream.weights, load, limits)
    if expected.chunked:
        raise ConfigError(
            f"{plan.merge} needs all experts of a layer in memory, and they do not fit",
            "raise --memory or --device-memory, or merge otherwise",
        )
    with spill_folder(expected, job.output) as folder:
        states = SpilledStates(len(inputs), folder) if expected.spill else States(len(inputs))
        how = f"{job.data.fingerprint} {job.settings.dtype} {job.settings.batch_tokens}"
        yield Calibration(stream=stream, inputs=inputs, states=states, fingerprint=how, chosen=chosen_by_some)


def _fit_bytes(weights: Weights, plan: FusePlan) -> int:
    hidden = int(weights.model.config.get_text_config().hidden_size)
    return max(
        fit_bytes(len(layer.merged), hidden, weights.expert_width(index)) for index, layer in plan.layers.items()
    )
