"""The stages as functions: collect, plan, apply, verify, evaluate, compare.

Each stage reads files and writes one thing. Options are those of the command line.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from moeprune._files import PathLike, begin_work, check_free_space, check_output_file, check_output_folder
from moeprune._options import CalibrationOptions, budget_of, by_stage, check_margin, eval_settings, several
from moeprune.accounts import account_of
from moeprune.checkpoint import Checkpoint, open_checkpoint
from moeprune.choosing import decide
from moeprune.collecting import collected, expected_of
from moeprune.collectors.distributed import process_group
from moeprune.errors import ConfigError, PlanError
from moeprune.evaluation.cache import cache_folder
from moeprune.plan_kinds import load_plan
from moeprune.planner import Blend, Decisions, Protected, check_decisions, derive
from moeprune.planner_fuse import derive_fusion
from moeprune.plans import MtpPolicy, PruningPlan
from moeprune.plans_fuse import FusePlan, plan_kind
from moeprune.plans_skip import SkipPlan
from moeprune.rewrite.drop import DEFAULT_SHARD_SIZE, apply_drop, check_output, keep_lists, output_tensors
from moeprune.rewrite.fuse import apply_fuse, check_fitted, open_weights
from moeprune.rewrite.skip import apply_skip, check_made_for
from moeprune.scoring import load_selection, selection_evaluator
from moeprune.statistics import RouterStatistics
from moeprune.strategies import DEFAULT as DEFAULT_STRATEGY
from moeprune.strategies import Criterion, GlobalCriterion, resolve
from moeprune.strategies.allocate import Allocation

if TYPE_CHECKING:
    from moeprune.evaluation.compare import EvalReport
    from moeprune.evaluation.settings import EvalSettings
    from moeprune.evaluation.tasks import TaskOutlook
    from moeprune.rewrite.verify import Verification
    from moeprune.streaming.forecast import Forecast

Applicable = PruningPlan | FusePlan | SkipPlan
BUNDLED = Path(__file__).parent / "data"


def collect(
    model: PathLike,
    output: PathLike | None = None,
    *,
    calibration: Sequence[str] | str = (),
    revision: str | None = None,
    overwrite: bool = False,
    **options: Any,
) -> RouterStatistics:
    """Run calibration data through a model and add up what its routers and experts do.

    Args:
        model: folder or Hub id.
        output: statistics file to write.
        calibration: ``[DOMAIN=]SOURCE`` each. Without any, the statistics hold no tokens, for strategies without need.
        revision: of a Hub model.
        overwrite: replace ``output``.
        options: other fields of :class:`moeprune._options.CalibrationOptions`.

    Returns:
        The statistics, as written. Of the processes that a launcher started, each runs its share of the data, and the
        first writes and returns the statistics of all; the others return statistics of no tokens.

    Raises:
        ConfigError: an option cannot work, or the data gives no usable token.
        CheckpointError: the model's files are missing, damaged or unreachable.
        UnsupportedModelError: an unknown architecture, or one without routed experts.
        MoePruneError: another process of the same run failed.

    Example:
        >>> statistics = moeprune.collect("base", "statistics.safetensors", calibration="data.jsonl", num_samples=256)
    """
    sources = several(calibration)
    [given] = by_stage(options, CalibrationOptions)
    settings = CalibrationOptions(sources=sources, **given)
    with process_group() as ranks:
        if output is not None and ranks.first:
            check_output_file(output, overwrite=overwrite)
        checkpoint = open_checkpoint(model, revision=revision)
        data = settings.load(checkpoint) if sources else None
        place = Path(output) if output is not None else None
        with collected(checkpoint, settings, data, ranks, output=place) as statistics:
            if place is not None and ranks.first:
                statistics.save(place)
    return statistics


def forecast(
    model: PathLike,
    output: PathLike | None = None,
    *,
    calibration: Sequence[str] | str,
    revision: str | None = None,
    overwrite: bool = False,
    **options: Any,
) -> Forecast | None:
    """Check what :func:`collect` would do and say what it would take, without running or writing anything.

    Args:
        model, output, calibration, revision, overwrite, options: as for :func:`collect`.

    Returns:
        Peak memory, disk and reading of a pass layer by layer; None where the model would be loaded whole.

    Raises:
        ConfigError: an option cannot work, it does not fit, or the data gives no usable token.
        CheckpointError: the model's files are missing, damaged or unreachable.
        UnsupportedModelError: an unknown architecture, one without routed experts, or one whose layers cannot be run
            one at a time.

    Example:
        >>> print(moeprune.forecast("base", calibration="data.jsonl", memory=16 << 30))
    """
    sources = several(calibration)
    [given] = by_stage(options, CalibrationOptions)
    settings = CalibrationOptions(sources=sources, **given)
    if output is not None:
        check_output_file(output, overwrite=overwrite)
    checkpoint = open_checkpoint(model, revision=revision)
    return expected_of(checkpoint, settings, settings.load(checkpoint), output=Path(output) if output else None)


def plan(
    statistics: PathLike | RouterStatistics,
    model: PathLike,
    *,
    ratio: float | str | None = None,
    keep: int | None = None,
    strategy: str | Criterion | GlobalCriterion = DEFAULT_STRATEGY,
    weights: Mapping[str, float] | None = None,
    blend: Blend = "sum",
    protect_top: int = 0,
    protect: Protected | None = None,
    guard: bool = True,
    target: Sequence[str] = (),
    round_to: int = 1,
    budget: str = "uniform",
    allow_non_uniform: bool = False,
    rearrange: int = 1,
    selection: Sequence[str] | str = (),
    mtp: MtpPolicy = "cut",
    seed: int = 0,
    revision: str | None = None,
    output: PathLike | None = None,
    overwrite: bool = False,
    **running: Any,
) -> PruningPlan:
    """Decide which experts stay. Runs without torch, but for a budget that searches.

    Args:
        statistics: a statistics file, or what :func:`collect` or ``observe`` returned.
        model: the folder or Hub id they were made from.
        ratio: fraction of the routed experts of each layer to remove; or
        keep: exact number that stays.
        strategy: a name of ``moeprune strategies``, or a callable from layer statistics to scores [E] or costs [E, E].
        weights: weight by calibration domain; 0 leaves it out.
        blend: ``sum`` adds the domains up by their weights; ``maxmin`` finds weights for each layer with which the
            worst served domain keeps the most of its gated output norms.
        protect_top: keep so many of every domain's best experts in each layer.
        protect: experts by layer that must stay.
        guard: keep super experts whatever the strategy says.
        target: engines that must take the result.
        round_to: make the kept count a multiple of this.
        budget: how the experts that stay are shared out over layers: ``uniform``, ``global``, ``laep``, ``coverage`` or
            ``evolve``. ``laep:alpha=0.4,beta=0.1`` and ``coverage:fraction=0.9`` say themselves how many stay, without
            a ratio.
        allow_non_uniform: let layers keep different numbers, which only transformers loads; else every layer keeps the
            same number, and the plan says what that loses.
        rearrange: order the experts so that so many expert-parallel groups carry about the same load.
        selection: ``[DOMAIN=]SOURCE`` each: text of its own on which ``evolve`` scores counts, 64 rows of each source.
        mtp: ``cut`` or ``drop`` MTP layers.
        seed: for strategies that draw, and for a search.
        revision: of a Hub model.
        output: plan file to write.
        overwrite: replace ``output``.
        running: how the model runs on the selection text: ``device``, ``stream``, ``memory``, ``max_length`` and the
            other fields of :class:`moeprune._options.CalibrationOptions`.

    Raises:
        StaleArtifactError: the statistics were made for another model.
        StrategyError: the strategy is unknown, or the statistics lack what it needs.
        ConfigError: the budget or another option cannot work.
        PlanError: an engine in ``target`` would not take the result, or more experts are protected than may stay.

    Example:
        >>> plan = moeprune.plan("statistics.safetensors", "base", ratio=0.5, output="plan.json")
        >>> plan.layers[0].keep
    """
    if output is not None:
        check_output_file(output, overwrite=overwrite)
    stats = statistics if isinstance(statistics, RouterStatistics) else RouterStatistics.load(statistics)
    wanted = Decisions(
        budget=budget_of(ratio, keep, round_to),
        allocation=Allocation.parse(budget),
        allow_non_uniform=allow_non_uniform,
        rearrange=rearrange,
        strategy=strategy,
        weights=weights,
        blend=blend,
        protect_top=protect_top,
        protect=protect,
        guard=guard,
        mtp=mtp,
        target=target,
        seed=seed,
    )
    [given] = by_stage(running, CalibrationOptions)
    if given and not selection:
        option = f"--{next(iter(given)).replace('_', '-')}"
        raise ConfigError(f"{option} says how the model runs, and without --selection it does not run")
    checkpoint = open_checkpoint(model, revision=revision)
    check_decisions(checkpoint, wanted, domains=stats.domains)
    running_options = CalibrationOptions(seed=seed, **given)
    text = load_selection(checkpoint, running_options, several(selection), wanted.allocation, resolve(strategy))
    with selection_evaluator(checkpoint, text, output=Path(output) if output else None) as evaluator:
        made = decide(checkpoint, stats, wanted, evaluator=evaluator, selection=text.data if text else None)
    if output is not None:
        begin_work()
        made.save(output)
    return made


def apply(
    model: PathLike,
    plan: PathLike | Applicable,
    output: PathLike | None = None,
    *,
    max_shard_size: int = DEFAULT_SHARD_SIZE,
    overwrite: bool = False,
    revision: str | None = None,
    dry_run: bool = False,
) -> Path:
    """Write the checkpoint that a plan describes: pruned or gated by copying bytes, without torch, or fused.

    Args:
        model: folder or Hub id of the source.
        plan: a plan or a plan file; what a fuse plan fits to activations takes :func:`moeprune.fuse`.
        output: new folder, which appears whole or not at all; by default ``./<name>-<kept>of<E>``.
        max_shard_size: bytes of tensors per file.
        overwrite: replace a folder that is not empty.
        revision: of a Hub model.
        dry_run: check everything and write nothing.

    Returns:
        The folder.

    Raises:
        StaleArtifactError: the plan was made for another model.
        PlanError: no engine could run the result, or the plan records what was computed from data.
        ConfigError: the output is not empty, lies inside the source, or does not fit on the disk.

    Example:
        >>> moeprune.apply("base", "plan.json", "pruned")
    """
    written, _ = apply_plan(
        model,
        plan,
        output,
        max_shard_size=max_shard_size,
        overwrite=overwrite,
        revision=revision,
        dry_run=dry_run,
    )
    return written


def apply_plan(
    model: PathLike,
    plan: PathLike | Applicable,
    output: PathLike | None,
    *,
    max_shard_size: int,
    overwrite: bool,
    revision: str | None,
    dry_run: bool,
) -> tuple[Path, Applicable]:
    """What :func:`apply` does; gives the plan as executed too, whose size and engines follow from its keep-lists."""
    decided = plan if isinstance(plan, PruningPlan | FusePlan | SkipPlan) else _load_plan(plan)
    checkpoint = open_checkpoint(model, revision=revision)
    writing: dict[str, Any] = {"max_shard_size": max_shard_size, "overwrite": overwrite}
    if isinstance(decided, FusePlan):
        return _apply_fusion(checkpoint, decided, Path(output) if output else None, writing, dry_run=dry_run)
    if isinstance(decided, SkipPlan):
        return _apply_gates(checkpoint, decided, Path(output) if output else None, writing, dry_run=dry_run)
    decided = derive(checkpoint, decided)
    target = Path(output) if output else default_output(model, decided.span, checkpoint.num_experts)
    check_output(checkpoint, target, overwrite=overwrite)
    check_space(checkpoint, decided, target)
    if not dry_run:
        apply_drop(checkpoint, decided, target, max_shard_size=max_shard_size, overwrite=overwrite)
    return target, decided


def _load_plan(path: PathLike) -> Applicable:
    """A plan that can be applied."""
    plan = load_plan(path)
    if isinstance(plan, PruningPlan | FusePlan | SkipPlan):
        return plan
    raise PlanError(
        f"{path} is a plan of kind {plan_kind(path)!r}: a record of what was computed from data",
        f"run `moeprune {plan_kind(path)}` with the options of its command",
    )


def _apply_gates(
    checkpoint: Checkpoint, plan: SkipPlan, output: Path | None, writing: Mapping[str, Any], *, dry_run: bool
) -> tuple[Path, SkipPlan]:
    if account_of(plan).trained:
        raise PlanError(
            "the plan belongs to weights that were trained with it, and it does not hold them",
            "run `moeprune skip` with the options of its command",
        )
    target = output or Path(f"{model_name(checkpoint.path)}-skip{100 * plan.target:g}")
    check_output(checkpoint, target, overwrite=writing["overwrite"])
    check_made_for(plan.inputs, checkpoint)
    check_free_space(target, checkpoint.nbytes)
    if not dry_run:
        apply_skip(checkpoint, plan, target, **writing)
    return target, plan


def _apply_fusion(
    checkpoint: Checkpoint, plan: FusePlan, output: Path | None, writing: Mapping[str, Any], *, dry_run: bool
) -> tuple[Path, FusePlan]:
    decided = derive_fusion(checkpoint, plan)
    target = output or default_output(checkpoint.path, f"fused-{decided.kept}", checkpoint.num_experts)
    check_output(checkpoint, target, overwrite=writing["overwrite"])
    check_free_space(target, 2 * decided.size["bytes"]["after"])
    check_fitted(decided)
    weights = open_weights(checkpoint)
    if not dry_run:
        apply_fuse(checkpoint, decided, target, weights=weights, **writing)
    return target, decided


def verify(model: PathLike, output: PathLike, *, revision: str | None = None) -> Verification:
    """Prove that every tensor of a pruned checkpoint equals its bytes in the source. Runs without torch.

    Of a fused one that holds for what was not merged; what was is as it was written. Of a sparsified one it holds for
    whatever is no expert, and for the weights of experts that stayed. Of a healed one, whose
    source is what was healed, it holds for what was not trained.

    Args:
        model: folder or Hub id of the source.
        output: the pruned checkpoint.
        revision: of a Hub model.

    Returns:
        How many tensors, bytes and other files were compared.

    Raises:
        CheckpointError: something differs; the message names it.

    Example:
        >>> moeprune.verify("base", "pruned").tensors
    """
    from moeprune.rewrite.verify_output import verify_output

    return verify_output(open_checkpoint(model, revision=revision), output)


def evaluate(
    base: PathLike,
    pruned: PathLike,
    *,
    tasks: Sequence[str] | str,
    output: PathLike,
    margin: float = 1.0,
    revision: str | None = None,
    overwrite: bool = False,
    cache: PathLike | Literal[False] | None = None,
    **settings: Any,
) -> EvalReport:
    """Run lm-eval tasks on two checkpoints with identical requests and report the change per task.

    Args:
        base: the original, folder or Hub id.
        pruned: the other one.
        tasks: names of lm-eval tasks or groups, or of presets such as ``mc``.
        output: folder for ``report.json``, ``report.md``, ``report.html`` and lm-eval's own output.
        margin: loss in points that would still be acceptable, stated before the run.
        revision: of a base on the Hub.
        overwrite: replace the report in ``output``.
        cache: folder where the results of ``base`` are kept and taken from, by default the user's own; False is none.
        settings: other fields of :class:`moeprune.evaluation.settings.EvalSettings`, such as ``include_path``.

    Raises:
        EvaluationError: a task or a model cannot run.

    Example:
        >>> report = moeprune.evaluate("base", "pruned", tasks="arc_easy", output="report")
        >>> report.tasks[0].verdict
    """
    wanted = eval_settings(several(tasks), settings)
    check_margin(margin)
    check_output_folder(output, overwrite=overwrite)
    pair = open_checkpoint(base, revision=revision), open_checkpoint(pruned)
    kept = cache_folder(cache)
    return evaluate_checkpoints(*pair, wanted, Path(output), margin=margin, overwrite=overwrite, cache=kept)


def outlook(
    base: PathLike,
    pruned: PathLike,
    *,
    tasks: Sequence[str] | str,
    output: PathLike,
    margin: float = 1.0,
    revision: str | None = None,
    overwrite: bool = False,
    **settings: Any,
) -> list[TaskOutlook]:
    """Check all that :func:`evaluate` would check before it loads a model, and say what each task would ask.

    Args:
        base, pruned, tasks, output, margin, revision, overwrite, settings: as for :func:`evaluate`.

    Raises:
        EvaluationError: a task cannot run, or a model cannot be asked that way.
    """
    from moeprune.evaluation.harness import check_pair, preflight

    wanted = eval_settings(several(tasks), settings)
    check_margin(margin)
    check_output_folder(output, overwrite=overwrite)
    pair = open_checkpoint(base, revision=revision), open_checkpoint(pruned)
    if pair[1].own_counts:
        check_can_load(wanted)
    check_pair(pair[0].path, pair[1].path, wanted, Path(output), overwrite=overwrite)
    return preflight(wanted)


def evaluate_checkpoints(
    base: Checkpoint,
    pruned: Checkpoint,
    settings: EvalSettings,
    output: Path,
    *,
    margin: float,
    overwrite: bool = False,
    cache: Path | None = None,
) -> EvalReport:
    """Evaluate two opened checkpoints and write the report; the first one's results may come from the cache."""
    if pruned.own_counts:
        check_can_load(settings)
    from moeprune.evaluation.harness import evaluate_pair
    from moeprune.evaluation.page import write_page
    from moeprune.evaluation.report import write_report

    report = evaluate_pair(
        base.path,
        pruned.path,
        settings,
        output,
        margin=margin,
        overwrite=overwrite,
        fingerprints={"base": base.fingerprint, "pruned": pruned.fingerprint},
        cache=cache,
    )
    write_report(report, output)
    write_page(output, pruned.path)
    return report


def check_can_load(settings: EvalSettings) -> None:
    """Refuse to evaluate a checkpoint whose layers differ by what cannot load it."""
    if settings.backend != "hf" or not settings.trust_remote_code:
        raise ConfigError(
            "only transformers loads layers with different numbers of experts, through a file beside the weights",
            "evaluate with --model hf and --trust-remote-code",
        )


def compare(
    base: PathLike,
    pruned: PathLike,
    *,
    margin: float = 1.0,
    metrics: Mapping[str, str] | None = None,
    output: PathLike | None = None,
    overwrite: bool = False,
) -> EvalReport:
    """Compare two folders of lm-eval samples (``--output_path X --log_samples``), from whatever backend they came.

    Args:
        base: the original model's folder.
        pruned: the pruned model's.
        margin: loss in points that would still be acceptable.
        metrics: primary metric by task, such as ``{"arc_easy": "acc_norm"}``.
        output: folder for ``report.json``, ``report.md`` and ``report.html``.
        overwrite: replace the report in ``output``.

    Raises:
        EvaluationError: the runs are not the same experiment.

    Example:
        >>> report = moeprune.compare("runs/base", "runs/pruned")
        >>> [task.verdict for task in report.tasks]
    """
    from moeprune.evaluation.compare import compare_folders
    from moeprune.evaluation.page import write_page
    from moeprune.evaluation.report import write_report

    check_margin(margin)
    if output is not None:
        check_output_folder(output, overwrite=overwrite)
    report = compare_folders(Path(base), Path(pruned), margin=margin, metrics=metrics)
    if output is not None:
        begin_work()
        write_report(report, Path(output))
        write_page(Path(output))
    return report


# --- what apply and the one-shot run share ----------------------------------------------------------------------------


def default_output(model: PathLike, kept: int | str, experts: int) -> Path:
    """The folder that is written when the user names none."""
    return Path(f"{model_name(model)}-{str(kept).replace(' ', '')}of{experts}")


def model_name(model: PathLike) -> str:
    """How outputs of a model are called when the user names none."""
    return "moeprune-tiny" if Path(model) == BUNDLED / "model" else Path(os.fspath(model)).resolve().name


def check_space(checkpoint: Checkpoint, plan: PruningPlan, target: Path) -> None:
    """Refuse a disk that is too small, before the hours that calibration may take."""
    check_free_space(target, sum(tensor.nbytes for tensor in output_tensors(checkpoint, keep_lists(plan))))
