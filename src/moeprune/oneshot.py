"""All stages in order, on a model of the user's or on the bundled one."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from moeprune._files import PathLike, hidden_sibling, to_json
from moeprune._options import CalibrationOptions, budget_of, by_stage, check_margin, eval_settings, several
from moeprune.calibration import CalibrationSet
from moeprune.catalogue import known
from moeprune.checkpoint import Checkpoint, open_checkpoint
from moeprune.choosing import decide
from moeprune.collecting import collected, expected_of
from moeprune.collectors.distributed import refuse_many
from moeprune.errors import ConfigError, EvaluationError
from moeprune.evaluation.cache import cache_folder
from moeprune.evaluation.harness import preflight
from moeprune.evaluation.settings import EvalSettings
from moeprune.healing.distillation import Text
from moeprune.pipeline import BUNDLED, check_can_load, check_space, default_output, evaluate_checkpoints
from moeprune.planner import Decisions, check_decisions, preview
from moeprune.plans import PruningPlan
from moeprune.reconstructing import subset_loss_of
from moeprune.repairing import LAYERWISE, HealResult, heal_layerwise
from moeprune.rewrite.changed import check_plain
from moeprune.rewrite.drop import DEFAULT_SHARD_SIZE, PROVENANCE, apply_drop, check_output
from moeprune.rewrite.verify import verify_drop
from moeprune.scoring import SelectionText, load_selection, selection_evaluator
from moeprune.statistics import RouterStatistics
from moeprune.strategies import AUTO, DEFAULT, Criterion, GlobalCriterion, resolve
from moeprune.strategies.allocate import Allocation

if TYPE_CHECKING:
    from moeprune.evaluation.compare import EvalReport
    from moeprune.evaluation.reconstruction import SubsetLoss
    from moeprune.rewrite.verify import Verification
    from moeprune.streaming.forecast import Forecast

BUNDLED_TASKS = ("tiny",)
BUNDLED_LIMIT = 200  # questions per bundled task, so that a first look takes minutes
_NEED_TASKS = (
    *("include_path", "limit", "num_fewshot", "apply_chat_template"),
    *("max_gen_toks", "confirm_run_unsafe_code", "launcher", "cache"),
)


@dataclass(frozen=True, kw_only=True)
class PruneResult:
    """What a one-shot run made; a dry run makes a preview of the plan and nothing else."""

    output: Path
    plan: PruningPlan
    statistics: RouterStatistics | None = None
    verification: Verification | None = None
    report: EvalReport | None = None
    forecast: Forecast | None = None
    healing: HealResult | None = None


def prune(
    model: PathLike | None = None,
    output: PathLike | None = None,
    *,
    ratio: float | str | None = None,
    keep: int | None = None,
    calibration: Sequence[str] | str = (),
    strategy: str | Criterion | GlobalCriterion = DEFAULT,
    tasks: Sequence[str] | str = (),
    margin: float = 1.0,
    round_to: int = 1,
    budget: str = "uniform",
    selection: Sequence[str] | str = (),
    max_shard_size: int = DEFAULT_SHARD_SIZE,
    revision: str | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
    cache: PathLike | Literal[False] | None = None,
    heal: str = "",
    **options: Any,
) -> PruneResult:
    """Collect, plan, apply, verify and, with tasks, evaluate. Everything that can be refused is refused first.

    Args:
        model: folder or Hub id; left out, the bundled model with its calibration text and its tasks.
        output: folder of the pruned checkpoint; by default ``./<name>-<kept>of<E>``.
        ratio: fraction of the routed experts of each layer to remove; or
        keep: exact number that stays.
        calibration: ``[DOMAIN=]SOURCE`` each.
        strategy: name or callable.
        tasks: lm-eval tasks; none means no evaluation.
        margin: acceptable loss in points.
        round_to: make the kept count a multiple of this.
        budget: how the experts that stay are shared out over layers, as for :func:`moeprune.plan`; and
        selection: the text on which it searches, if it does.
        max_shard_size: bytes of tensors per file.
        revision: of a Hub model.
        overwrite: replace a folder that is not empty.
        dry_run: check everything, preview the size and the engines, and run nothing.
        cache: folder where the results of ``model`` on the tasks are kept and taken from, by default the user's own;
            False is none.
        heal: ``layerwise`` fits the pruned layers to the original's on the calibration text, before the evaluation.
        options: other fields of :class:`moeprune._options.CalibrationOptions`,
            :class:`moeprune.planner.Decisions` and :class:`moeprune.evaluation.settings.EvalSettings`; what several
            have, such as ``seed`` and ``device``, holds for all of them.

    Raises:
        MoePruneError: anything that the stages refuse.

    Example:
        >>> result = moeprune.prune("base", "pruned", ratio=0.5, calibration="data.jsonl", tasks="arc_easy")
        >>> result.report.tasks[0].change
    """
    refuse_many("prune")
    sources, names = several(calibration), several(tasks)
    check_margin(margin)
    check_evaluated(names, {**options, "cache": cache}, bundled=model is None)
    if model is None:
        model, sources, names, options = bundled(sources, names, options)
        searches = Allocation.parse(budget).searched or strategy == AUTO.name
        selection = selection or (str(BUNDLED / "selection.jsonl") if searches else ())
    calibrated, decided, evaluated = by_stage(options, CalibrationOptions, Decisions, EvalSettings)
    amount, allocation = budget_of(ratio, keep, round_to), Allocation.parse(budget)
    wanted = Decisions(budget=amount, allocation=allocation, strategy=strategy, **decided)
    checkpoint = open_checkpoint(model, revision=revision)
    target = Path(output) if output else _default_output(model, checkpoint, wanted)
    check_output(checkpoint, target, overwrite=overwrite)
    look = preview(checkpoint, wanted)
    check_space(checkpoint, look, target)
    settings = CalibrationOptions(sources=sources, **calibrated)
    settings = dataclasses.replace(settings, statistics=(*several(settings.statistics), *resolve(strategy).needs))
    data = _load(checkpoint, settings, wanted)
    if heal:
        _check_heal(heal, checkpoint, wanted, data)
    text = load_selection(checkpoint, settings, several(selection), allocation, resolve(strategy), data)
    evaluation = _preflight(names, evaluated, checkpoint) if names else None
    if evaluation and wanted.allow_non_uniform:
        check_can_load(evaluation)
    if dry_run:
        expected = expected_of(checkpoint, settings, data, output=target) if data else None
        return PruneResult(output=target, plan=look, forecast=expected)
    facts = any(known(name).point == "weights" for name in resolve(strategy).needs)
    with collected(checkpoint, settings, data, output=target, facts=facts) as statistics:
        with subset_loss_of(checkpoint, settings, data, resolve(strategy), output=target) as subset_loss:
            made = _planned(checkpoint, statistics, wanted, subset_loss, text, target)
        dropped = hidden_sibling(target, "dropped") if heal else target
        if not (heal and _is_there(dropped, made)):
            writing: dict[str, Any] = {"max_shard_size": max_shard_size, "overwrite": overwrite or bool(heal)}
            apply_drop(checkpoint, made, dropped, extra=_records(statistics), **writing)
    proof = verify_drop(checkpoint, dropped)
    result = PruneResult(output=target, plan=made, statistics=statistics, verification=proof)
    if heal:
        healing = _healed(checkpoint, dropped, target, settings, max_shard_size=max_shard_size, overwrite=overwrite)
        result = dataclasses.replace(result, healing=healing)
    return _evaluated(result, checkpoint, evaluation, margin, cache_folder(cache)) if evaluation else result


def _planned(
    checkpoint: Checkpoint,
    statistics: RouterStatistics,
    wanted: Decisions,
    subset_loss: SubsetLoss | None,
    text: SelectionText | None,
    target: Path,
) -> PruningPlan:
    """The plan, with whatever runs the model to find it."""
    with selection_evaluator(checkpoint, text, output=target) as evaluator:
        return decide(checkpoint, statistics, wanted, subset_loss, evaluator, text.data if text else None)


def _default_output(model: PathLike, checkpoint: Checkpoint, wanted: Decisions) -> Path:
    if wanted.allocation.sized:
        raise ConfigError(f"--budget {wanted.allocation} leaves open how many experts stay", "name the output with -o")
    return default_output(model, wanted.budget.kept(checkpoint.router), checkpoint.num_experts)


def _load(checkpoint: Checkpoint, settings: CalibrationOptions, wanted: Decisions) -> CalibrationSet | None:
    """The calibration data, when there is any; a strategy that needs it gets none of ours in its place."""
    strategy = resolve(wanted.strategy)
    if strategy.calibrated and not settings.sources:
        raise ConfigError(f"strategy {strategy.name!r} needs calibration data", "pass --calibration data.jsonl")
    by_load = {f"--budget {wanted.allocation}": wanted.allocation.by_load, "--rearrange": wanted.rearrange > 1}
    for option, counts_tokens in by_load.items():
        if counts_tokens and not settings.sources:
            raise ConfigError(f"{option} needs calibration data", "pass --calibration data.jsonl")
    data = settings.load(checkpoint) if settings.sources else None
    check_decisions(checkpoint, wanted, domains=sorted(set(data.domains)) if data else ())
    return data


def _evaluated(
    result: PruneResult, base: Checkpoint, settings: EvalSettings, margin: float, cache: Path | None
) -> PruneResult:
    """Evaluate a checkpoint that was written."""
    report_folder = result.output / PROVENANCE / "report"
    try:
        pruned = open_checkpoint(result.output)
        report = evaluate_checkpoints(base, pruned, settings, report_folder, margin=margin, cache=cache)
    except EvaluationError as error:
        hint = f"the checkpoint {result.output} is complete: try again with `moeprune eval`"
        raise EvaluationError(error.message, "; ".join(filter(None, (error.hint, hint)))) from error
    return dataclasses.replace(result, report=report)


def _check_heal(method: str, checkpoint: Checkpoint, wanted: Decisions, data: CalibrationSet | None) -> None:
    """Refuse to heal what cannot be, before anything runs."""
    if method != LAYERWISE:
        raise ConfigError(f"--heal knows {LAYERWISE} alone, not {method!r}", "run `moeprune heal` for other methods")
    if data is None:
        raise ConfigError("--heal trains on the calibration text", "pass --calibration data.jsonl")
    if wanted.allow_non_uniform:
        raise ConfigError("--heal needs layers with equal numbers of experts", "leave --allow-non-uniform out")
    check_plain(checkpoint, "healing")
    Text.split(data)


def _is_there(dropped: Path, plan: PruningPlan) -> bool:
    """Whether a run that was killed while it healed has left what this one would make first."""
    file = dropped / PROVENANCE / "plan.json"
    return file.is_file() and file.read_text(encoding="utf-8") == to_json(plan.to_dict())


def _healed(
    checkpoint: Checkpoint, dropped: Path, target: Path, settings: CalibrationOptions, **writing: Any
) -> HealResult:
    """Heal a checkpoint that was written beside the output, and remove it."""
    read = {item.name: getattr(settings, item.name) for item in dataclasses.fields(settings)}
    for name in ("sources", "layers", "statistics", "paths", "batch_tokens", "stream"):
        del read[name]
    result = heal_layerwise(checkpoint.path, dropped, target, calibration=settings.sources, **read, **writing)
    shutil.rmtree(dropped)
    return result


def _records(statistics: RouterStatistics) -> dict[str, bytes]:
    """The statistics file, to lie beside the plan inside the checkpoint."""
    return {"statistics.safetensors": statistics.to_bytes()} if statistics.tokens else {}


# --- options of a stage that may not run -----------------------------------------------------------------------------


def _preflight(names: tuple[str, ...], options: Mapping[str, Any], base: Checkpoint) -> EvalSettings:
    """Check that every task can be run, before anything else is."""
    settings = eval_settings(names, options)
    preflight(settings, base.path)
    return settings


def check_evaluated(tasks: tuple[str, ...], options: Mapping[str, Any], *, bundled: bool) -> None:
    """Refuse options that would silently do nothing."""
    idle = [name for name in _NEED_TASKS if options.get(name) not in (None, False)]
    idle = [name for name in idle if not bundled or name == "include_path"]
    if idle and not tasks:
        option = f"--{idle[0].replace('_', '-')}"
        raise ConfigError(f"{option} says how to evaluate, and no task is named", "name tasks with --eval")


def bundled(
    sources: tuple[str, ...], tasks: tuple[str, ...], options: Mapping[str, Any]
) -> tuple[Path, tuple[str, ...], tuple[str, ...], dict[str, Any]]:
    """The bundled model, and the bundled calibration text, tasks and limit where the user gave none."""
    given = {name: value for name, value in options.items() if value is not None}
    ours = {"include_path": BUNDLED / "tasks"} | ({} if tasks else {"limit": BUNDLED_LIMIT})
    return (
        BUNDLED / "model",
        sources or (str(BUNDLED / "calibration.jsonl"),),
        tasks or BUNDLED_TASKS,
        ours | given,
    )
