"""One calibration, many plans: what each ratio costs, measured on the loaded model by masking its experts.

No checkpoint is written. Whatever is finished stays in the output folder, so that a killed sweep goes on from there;
it is used again only where the experts, the model and all settings are the same.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moeprune._files import (
    PathLike,
    begin_work,
    check_output_folder,
    lock_file,
    progress,
    sha256_bytes,
    to_json,
    write_atomic,
)
from moeprune._options import CalibrationOptions, budget_of, by_stage, check_margin, eval_settings, several
from moeprune.calibration import CalibrationSet
from moeprune.catalogue import known
from moeprune.checkpoint import Checkpoint, open_checkpoint
from moeprune.choosing import decide
from moeprune.collecting import collected, does_not_fit, expected_of
from moeprune.collectors.distributed import refuse_many
from moeprune.errors import ConfigError
from moeprune.evaluation.agreement import Estimate
from moeprune.evaluation.compare import SAME_MODEL, EvalReport, compare_folders
from moeprune.evaluation.curve import SweepPoint, SweepReport, write_sweep
from moeprune.evaluation.evaluator import Evaluator, KeepLists, PlanScore, ResidentEvaluator, check_documents
from moeprune.evaluation.harness import preflight, prepare, run_model
from moeprune.evaluation.page import write_page
from moeprune.evaluation.settings import EvalSettings, canonical_options
from moeprune.oneshot import BUNDLED_LIMIT, BUNDLED_TASKS
from moeprune.pipeline import BUNDLED
from moeprune.planner import Decisions, check_decisions, check_statistics, preview
from moeprune.plans import PruningPlan
from moeprune.scoring import (
    SelectionText,
    forecast_evaluator,
    load_selection,
    open_evaluator,
    selection_evaluator,
    text_digests,
)
from moeprune.statistics import RouterStatistics
from moeprune.strategies import AUTO, DEFAULT, Criterion, GlobalCriterion, Strategy, resolve
from moeprune.strategies.allocate import Allocation

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from moeprune.streaming.forecast import Forecast

RATIOS = ("0.125", "0.25", "0.5", "0.625")
_NEED_TASKS = (
    *("include_path", "limit", "num_fewshot", "apply_chat_template", "max_gen_toks", "confirm_run_unsafe_code"),
    "model_args",
)
BASE = "base"  # name of the original's run
_UNFINISHED = ".unfinished"  # there while a sweep is not finished, and locked while it runs
StrategyLike = str | Criterion | GlobalCriterion
Strategies = list[StrategyLike] | tuple[StrategyLike, ...]


def sweep(
    model: PathLike | None = None,
    output: PathLike = "sweep",
    *,
    ratios: Sequence[float | str] = RATIOS,
    strategy: StrategyLike | Strategies = DEFAULT,
    calibration: Sequence[str] | str = (),
    statistics_file: PathLike | None = None,
    text: Sequence[str] | str = (),
    tasks: Sequence[str] | str = (),
    margin: float = 1.0,
    round_to: int = 1,
    budget: str = "uniform",
    selection: Sequence[str] | str = (),
    revision: str | None = None,
    overwrite: bool = False,
    **options: Any,
) -> SweepReport:
    """Plan at many ratios from one calibration, and measure what every plan costs without writing a checkpoint.

    Args:
        model: folder or Hub id; left out, the bundled model with its texts and its tasks.
        output: folder for ``sweep.json``, ``sweep.md``, ``report.html``, the statistics, a plan per point, and
            lm-eval's samples. A sweep that was killed goes on there.
        ratios: fractions of the routed experts of each layer to remove.
        strategy: one or several, each by its name or as a callable.
        calibration: ``[DOMAIN=]SOURCE`` each; or
        statistics_file: what :func:`moeprune.collect` wrote for this model.
        text: ``[DOMAIN=]SOURCE`` each, on which perplexity and agreement with the original are measured.
        tasks: lm-eval tasks, for which the model must fit in memory.
        margin: loss in points that would still be acceptable, stated before the run.
        round_to, budget, selection: as for :func:`moeprune.prune`.
        revision: of a Hub model.
        overwrite: replace a finished sweep in ``output``; what it finished is used again where nothing has changed.
        options: other fields of :class:`moeprune._options.CalibrationOptions`,
            :class:`moeprune.planner.Decisions` and :class:`moeprune.evaluation.settings.EvalSettings`.

    Raises:
        MoePruneError: anything that the stages refuse.

    Example:
        >>> report = moeprune.sweep("base", "sweep", calibration="data.jsonl", text="heldout.jsonl", tasks="arc_easy")
        >>> report.largest_within_margin
    """
    job = _opened(
        model,
        output,
        ratios=ratios,
        strategy=strategy,
        calibration=calibration,
        statistics_file=statistics_file,
        text=text,
        tasks=tasks,
        margin=margin,
        round_to=round_to,
        budget=budget,
        selection=selection,
        revision=revision,
        overwrite=overwrite,
        **options,
    )
    with _working_in(job):
        statistics = _statistics(job)
        plans = _plans(job, statistics)
        _measure(job, plans)
        report = _report(job, statistics, plans)
        write_sweep(report, job.output)
        write_page(job.output)
    return report


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepOutlook:
    """What a sweep would do.

    Attributes:
        previews: plans of the right size, by name of the point; their choice of experts means nothing.
        passes: peak memory, disk and reading of what the model runs for; None where it is loaded whole.
    """

    previews: Mapping[str, PruningPlan]
    passes: Mapping[str, Forecast | None]


def forecast_sweep(model: PathLike | None = None, output: PathLike = "sweep", **options: Any) -> SweepOutlook:
    """Check what :func:`sweep` would do and say what it would take, without running or writing anything.

    Args:
        model, output, options: as for :func:`sweep`.
    """
    job = _opened(model, output, **options)
    passes: dict[str, Forecast | None] = {}
    if job.data is not None and job.given is None:
        passes["collecting"] = expected_of(job.checkpoint, job.settings, job.data, output=job.output / "statistics")
    if job.text is not None and job.evaluation is None:
        settings, data = job.text.settings, job.text.data
        passes["scoring"] = forecast_evaluator(job.checkpoint, settings, data, plans=len(job.points), output=job.output)
    if job.evaluation is not None:
        passes["evaluating"] = None
    previews = {name: preview(job.checkpoint, wanted) for name, wanted in job.points.items()}
    return SweepOutlook(previews=previews, passes=passes)


# --- what is swept ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class _Text:
    """Documents on which plans are scored."""

    settings: CalibrationOptions
    data: CalibrationSet


@dataclass(frozen=True, slots=True, kw_only=True)
class _Job:
    """Everything opened and checked.

    Attributes:
        settings, data: of the calibration; ``given``: statistics that take its place.
        points: what is asked of each plan, by the point's name, which is part of its file's.
        selection: text for what searches.
        text, evaluation: what is measured.
    """

    checkpoint: Checkpoint
    output: Path
    settings: CalibrationOptions
    data: CalibrationSet | None
    given: RouterStatistics | None
    points: Mapping[str, Decisions]
    selection: SelectionText | None
    text: _Text | None
    evaluation: EvalSettings | None
    margin: float

    @property
    def files(self) -> Path:
        """Where each point's answers lie."""
        return self.output / "runs"

    def plan_file(self, name: str) -> Path:
        """The plan of a point."""
        return self.output / f"plan-{name}.json"


def _opened(
    model: PathLike | None,
    output: PathLike,
    *,
    ratios: Sequence[float | str] | float | str = RATIOS,
    strategy: StrategyLike | Strategies = DEFAULT,
    calibration: Sequence[str] | str = (),
    statistics_file: PathLike | None = None,
    text: Sequence[str] | str = (),
    tasks: Sequence[str] | str = (),
    margin: float = 1.0,
    round_to: int = 1,
    budget: str = "uniform",
    selection: Sequence[str] | str = (),
    revision: str | None = None,
    overwrite: bool = False,
    **options: Any,
) -> _Job:
    """Open all inputs, and refuse what cannot work before anything runs."""
    refuse_many("sweep")
    check_margin(margin)
    check_output_folder(output, overwrite=overwrite or (Path(output) / _UNFINISHED).exists())
    given = {name: value for name, value in options.items() if value is not None}
    sources, texts, names = several(calibration), several(text), several(tasks)
    chosen, allocation = _strategies(strategy), Allocation.parse(budget)
    if model is None:
        model, sources, texts, names, given = _bundled(sources, texts, names, given, statistics_file)
        searches = allocation.searched or any(one.name == AUTO.name for one in chosen)
        selection = selection or (str(BUNDLED / "selection.jsonl") if searches else ())
    if statistics_file is not None and sources:
        raise ConfigError("--statistics-file takes the place of --calibration", "give one of them")
    if not (names or texts):
        raise ConfigError(
            "a sweep measures what plans cost, and it is not said on what", "name --text, --eval, or both"
        )
    calibrated, decided, evaluated = by_stage(given, CalibrationOptions, Decisions, EvalSettings)
    checkpoint = open_checkpoint(model, revision=revision)
    settings = CalibrationOptions(sources=sources, **calibrated)
    if settings.layers:
        raise ConfigError("a sweep plans all layers of a model", "leave layers out")
    needs = [need for one in chosen for need in one.needs]
    settings = dataclasses.replace(settings, statistics=(*several(settings.statistics), *needs))
    decided |= {"allocation": allocation}
    points = {
        _point_name(one, ratio, several_strategies=len(chosen) > 1): Decisions(
            budget=budget_of(ratio, None, round_to), strategy=one, **decided
        )
        for one in chosen
        for ratio in _ratios(ratios)
    }
    statistics = RouterStatistics.load(statistics_file) if statistics_file is not None else None
    data = settings.load(checkpoint) if sources else None
    _check_points(checkpoint, points, statistics, data)
    return _Job(
        checkpoint=checkpoint,
        output=Path(output),
        settings=settings,
        data=data,
        given=statistics,
        points=points,
        selection=_selection(checkpoint, settings, several(selection), chosen, allocation, data),
        text=_text(checkpoint, settings, texts) if texts else None,
        evaluation=_evaluation(checkpoint, settings, names, evaluated),
        margin=margin,
    )


def _bundled(
    sources: tuple[str, ...],
    texts: tuple[str, ...],
    names: tuple[str, ...],
    options: Mapping[str, Any],
    statistics_file: PathLike | None,
) -> tuple[Path, tuple[str, ...], tuple[str, ...], tuple[str, ...], dict[str, Any]]:
    """The bundled model, and its texts, tasks and limit where the user gave none."""
    ours = {"include_path": BUNDLED / "tasks"} | ({} if names else {"limit": BUNDLED_LIMIT})
    ours_too = () if statistics_file is not None else (str(BUNDLED / "calibration.jsonl"),)
    texts = texts or (str(BUNDLED / "heldout.jsonl"),)
    return BUNDLED / "model", sources or ours_too, texts, names or BUNDLED_TASKS, {**ours, **options}


def _strategies(given: StrategyLike | Strategies) -> list[Strategy]:
    """The strategies to compare.

    Raises:
        ConfigError: none, one twice, or one that runs the model for every plan.
    """
    found = [resolve(one) for one in (given if isinstance(given, list | tuple) else (given,))]
    names = [strategy.name for strategy in found]
    if not names or len(set(names)) < len(names):
        raise ConfigError("a sweep takes one or several different strategies", "such as --strategy reap,frequency")
    for strategy in found:
        if strategy.search:
            hint = "use `moeprune prune`, and compare its results with `moeprune eval --text`"
            raise ConfigError(f"strategy {strategy.name!r} runs the model for hours for every plan", hint)
    return found


def _ratios(given: Sequence[float | str] | float | str) -> list[str]:
    """The ratios as text, ascending; that each is one is checked with its plan.

    Raises:
        ConfigError: none, one twice, or one that is no number.
    """
    found = [str(ratio) for ratio in ([given] if isinstance(given, str | float) else given)]
    try:
        numbers = {ratio: Fraction(ratio) for ratio in found}
    except (ValueError, ZeroDivisionError):
        raise ConfigError(f"--ratios {','.join(found)}: not all are numbers", "write them as 0.125,0.25") from None
    if not found or len(set(numbers.values())) < len(found):
        raise ConfigError("a sweep takes one or several different ratios", "such as --ratios 0.125,0.25,0.5")
    return sorted(found, key=numbers.__getitem__)


def _point_name(strategy: Strategy, ratio: str, *, several_strategies: bool) -> str:
    """What tells a point's files apart."""
    label = re.sub(r"[^\w.-]+", "-", strategy.name).strip("-")
    return f"{label}-{ratio}" if several_strategies else ratio


def _check_points(
    checkpoint: Checkpoint,
    points: Mapping[str, Decisions],
    statistics: RouterStatistics | None,
    data: CalibrationSet | None,
) -> None:
    """Refuse a plan that cannot be made, before any is."""
    if statistics is not None:
        check_statistics(checkpoint, statistics)
    domains = statistics.domains if statistics is not None else sorted(set(data.domains)) if data else ()
    for wanted in points.values():
        chosen = check_decisions(checkpoint, wanted, domains=domains)
        preview(checkpoint, wanted)
        if chosen.calibrated and statistics is None and data is None:
            hint = "pass --calibration data.jsonl or --statistics-file"
            raise ConfigError(f"strategy {chosen.name!r} needs calibration data", hint)


def _selection(
    checkpoint: Checkpoint,
    settings: CalibrationOptions,
    sources: tuple[str, ...],
    strategies: Sequence[Strategy],
    allocation: Allocation,
    data: CalibrationSet | None,
) -> SelectionText | None:
    """Text for what searches among the plans of a sweep."""
    searching = next((one for one in strategies if one.name == AUTO.name), strategies[0])
    return load_selection(checkpoint, settings, sources, allocation, searching, data)


def _text(checkpoint: Checkpoint, settings: CalibrationOptions, sources: tuple[str, ...]) -> _Text:
    own = dataclasses.replace(settings, sources=sources, shuffle=False, pack=False, statistics=())
    data = own.load(checkpoint)
    check_documents(data.sequences)
    return _Text(settings=own, data=data)


def _evaluation(
    checkpoint: Checkpoint, settings: CalibrationOptions, names: tuple[str, ...], options: Mapping[str, Any]
) -> EvalSettings | None:
    """How tasks are run, on the model in this process."""
    if not names:
        idle = [name for name in _NEED_TASKS if name in options]
        if idle:
            option = f"--{idle[0].replace('_', '-')}"
            raise ConfigError(f"{option} says how to evaluate, and no task is named", "name tasks with --eval")
        return None
    found = eval_settings(names, options)
    if not found.in_process:
        raise ConfigError("a sweep masks the experts of a model in this process", "leave --model and isolated out")
    preflight(found, checkpoint.path)
    reason = "--stream is given" if settings.stream else does_not_fit(checkpoint, settings, beside=0)
    if reason and settings.stream is not False:
        hint = "sweep with --text and without --eval"
        raise ConfigError(f"tasks are asked of the whole model in memory, and {reason}", hint)
    return found


# --- the folder -------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _working_in(job: _Job) -> Iterator[None]:
    """Keep other sweeps out of the folder, and mark it as unfinished until all is done."""
    job.output.mkdir(parents=True, exist_ok=True)
    mark = job.output / _UNFINISHED
    with mark.open("ab") as file:
        lock_file(file, job.output)
        begin_work()
        _clear(job)
        yield
        mark.unlink()


def _clear(job: _Job) -> None:
    """Remove what an earlier sweep said, and what it made for points that are not swept any more."""
    for name in ("sweep.json", "sweep.md"):
        (job.output / name).unlink(missing_ok=True)
    wanted = {job.plan_file(name) for name in job.points}
    for file in set(job.output.glob("plan-*.json")) - wanted:
        file.unlink()


def _is_kept(file: Path, key: Mapping[str, Any]) -> bool:
    """Whether a file says that it was made in just this way."""
    try:
        found = json.loads(file.read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(found, dict) and found.get("made") == json.loads(to_json(key))


# --- calibration and plans --------------------------------------------------------------------------------------------


def _statistics(job: _Job) -> RouterStatistics:
    """What is given, what an unfinished sweep collected, or what is collected now."""
    if job.given is not None:
        return job.given
    file = job.output / "statistics.safetensors"
    if job.data is not None and file.is_file():
        found = RouterStatistics.load(file)
        inputs = {"model": job.checkpoint.fingerprint, "calibration": job.data.fingerprint}
        if found.inputs == inputs and to_json(found.command) == to_json(job.settings.canonical()):
            return found
    needs = [need for wanted in job.points.values() for need in resolve(wanted.strategy).needs]
    facts = any(known(need).point == "weights" for need in needs)
    with collected(job.checkpoint, job.settings, job.data, output=file, facts=facts) as statistics:
        if statistics.tokens:
            statistics.save(file)
    return statistics


def _plans(job: _Job, statistics: RouterStatistics) -> dict[str, PruningPlan]:
    """A plan for every point, written beside the report."""
    plans = {}
    with selection_evaluator(job.checkpoint, job.selection, output=job.output) as evaluator:
        for name, wanted in progress(job.points.items(), "planning", unit="plan"):
            searches = wanted.allocation.searched or resolve(wanted.strategy).name == AUTO.name
            text = job.selection.data if job.selection and searches else None
            plans[name] = decide(job.checkpoint, statistics, wanted, None, evaluator if searches else None, text)
            plans[name].save(job.plan_file(name))
    return plans


# --- measuring --------------------------------------------------------------------------------------------------------


def _measure(job: _Job, plans: Mapping[str, PruningPlan]) -> None:
    """Score and ask what is not known yet; everything lies in files in the end."""
    keeps: dict[str, KeepLists] = {BASE: {}} if job.evaluation else {}
    keeps |= {name: _keep(job, plan) for name, plan in plans.items()}
    scored = [name for name in plans if job.text and not _is_kept(_text_file(job, name), _text_key(job, keeps[name]))]
    asked = [
        name for name in keeps if job.evaluation and not _is_kept(_run_file(job, name), _run_key(job, keeps[name]))
    ]
    if not scored and not asked:
        return
    with _running(job, len(scored)) as (evaluator, model):
        if evaluator is not None and scored:
            for name, score in zip(scored, evaluator([keeps[name] for name in scored]), strict=True):
                made = {"made": _text_key(job, keeps[name]), "text": _estimates(score)}
                write_atomic(_text_file(job, name), to_json(made))
        if model is not None and asked:
            _ask(job, model, {name: keeps[name] for name in asked})


@contextlib.contextmanager
def _running(job: _Job, plans: int) -> Iterator[tuple[Evaluator | None, PreTrainedModel | None]]:
    """What scores text, and the model for tasks: loaded once for both."""
    if job.evaluation is not None:
        from moeprune.collectors.resident import load_model

        settings = job.settings
        model = load_model(
            job.checkpoint, device=settings.device, dtype=settings.dtype, trust_remote_code=settings.trust_remote_code
        )
        text = job.text
        yield ResidentEvaluator(model, text.data.sequences, text.settings.batch_tokens) if text else None, model
    elif job.text is not None:
        text = job.text
        with open_evaluator(job.checkpoint, text.settings, text.data, plans=plans, output=job.output) as evaluator:
            yield evaluator, None


def _ask(job: _Job, model: PreTrainedModel, keeps: Mapping[str, KeepLists]) -> None:
    """Run the tasks with only some of the model's experts, once for each point."""
    from transformers import AutoTokenizer

    from moeprune.experts import expert_layers
    from moeprune.runtime.masking import masked

    assert job.evaluation is not None  # noqa: S101 - else there is nothing to ask
    tokenizer = AutoTokenizer.from_pretrained(job.checkpoint.path, trust_remote_code=job.evaluation.trust_remote_code)
    layers = expert_layers(model)
    with prepare(job.evaluation) as loaded:
        for name, keep in progress(keeps.items(), "asking", unit="plan"):
            folder = job.files / name
            shutil.rmtree(folder, ignore_errors=True)
            with masked(layers, keep):
                run_model((model, tokenizer), job.evaluation, folder, loaded=loaded)
            write_atomic(_run_file(job, name), to_json({"made": _run_key(job, keep)}))


def _keep(job: _Job, plan: PruningPlan) -> KeepLists:
    """The experts that stay in the layers that are run."""
    return {layer: plan.layers[layer].keep for layer in job.checkpoint.moe_layers}


def _run_file(job: _Job, name: str) -> Path:
    return job.files / name / "made.json"


def _text_file(job: _Job, name: str) -> Path:
    return job.files / f"{name}.text.json"


def _text_key(job: _Job, keep: KeepLists) -> dict[str, Any]:
    """What decides a plan's score on the text."""
    assert job.text is not None  # noqa: S101 - else nothing is scored
    return _key(job, keep) | {"text": job.text.data.fingerprint}


def _run_key(job: _Job, keep: KeepLists) -> dict[str, Any]:
    """What decides a plan's answers; the margin does not."""
    assert job.evaluation is not None  # noqa: S101 - else nothing is asked
    settings = canonical_options(job.evaluation, job.margin)
    del settings["margin"]
    folder = job.evaluation.include_path
    files = sorted(file for file in folder.rglob("*") if file.is_file()) if folder else []
    tasks = sha256_bytes(*(part for file in files for part in (file.name.encode(), file.read_bytes())))
    return _key(job, keep) | {"settings": settings, "tasks": tasks, "lm_eval": version("lm_eval")}


def _key(job: _Job, keep: KeepLists) -> dict[str, Any]:
    from moeprune.collectors.resident import place_of

    settings = job.settings
    return {
        "model": job.checkpoint.fingerprint,
        "experts": {str(layer): list(experts) for layer, experts in keep.items()},
        "batch_tokens": settings.batch_tokens,
        "dtype": settings.dtype,
        "device": place_of(settings.device),
        "transformers": version("transformers"),
        "torch": version("torch"),
    }


def _estimates(score: PlanScore) -> dict[str, Any]:
    ratio = Estimate(value=score.perplexity_ratio.value, interval=score.perplexity_ratio.interval)
    found = {"perplexity_ratio": ratio, "kl": score.agreement.kl, "top1": score.agreement.top1}
    return {name: dataclasses.asdict(value) for name, value in found.items()}


# --- the report -------------------------------------------------------------------------------------------------------


def _report(job: _Job, statistics: RouterStatistics, plans: Mapping[str, PruningPlan]) -> SweepReport:
    compared = {name: _compared(job, name) for name in plans} if job.evaluation else {}
    points = tuple(_point(job, name, plan, compared.get(name)) for name, plan in plans.items())
    warnings = [*_calibration_warnings(job, statistics), *_notes(plans)]
    warnings += [text for report in compared.values() for text in report.warnings if text != SAME_MODEL]
    inputs = {"model": job.checkpoint.fingerprint}
    inputs |= {name: value for name, value in statistics.inputs.items() if name == "calibration"}
    inputs |= {"text": job.text.data.fingerprint} if job.text else {}
    inputs |= {f"plan {name}": sha256_bytes(to_json(plan.to_dict()).encode()) for name, plan in plans.items()}
    return SweepReport(
        base_model=job.checkpoint.path.resolve().name,
        num_experts=job.checkpoint.num_experts,
        margin=job.margin,
        points=points,
        warnings=tuple(dict.fromkeys(warnings)),
        command=_command(job, next(iter(plans.values()))),
        inputs=inputs,
    )


def _compared(job: _Job, name: str) -> EvalReport:
    return compare_folders(job.files / BASE, job.files / name, margin=job.margin)


def _point(job: _Job, name: str, plan: PruningPlan, report: EvalReport | None) -> SweepPoint:
    sizes, counts = plan.size["bytes"], [len(plan.layers[layer].keep) for layer in job.checkpoint.moe_layers]
    found = json.loads(_text_file(job, name).read_bytes())["text"] if job.text else {}
    text = {measure: Estimate(value=one["value"], interval=tuple(one["interval"])) for measure, one in found.items()}
    return SweepPoint(
        ratio=str(job.points[name].budget.ratio),
        strategy=resolve(job.points[name].strategy).name,
        plan=job.plan_file(name).name,
        kept=sum(counts) / len(counts),
        nbytes=sizes["after"],
        base_bytes=sizes["before"],
        tasks=report.tasks if report else (),
        suite=report.suite if report else None,
        text=text or None,
    )


def _calibration_warnings(job: _Job, statistics: RouterStatistics) -> Iterator[str]:
    if job.text is None:
        return
    seen = text_digests(statistics.inputs.values(), statistics.provenance)
    if seen & text_digests([job.text.data.fingerprint], job.text.data.provenance):
        yield "the experts were chosen on this very text: plans look better than they are"


def _notes(plans: Mapping[str, PruningPlan]) -> Iterator[str]:
    """What plans say of themselves, once, with the points that it is said of."""
    said: dict[str, list[str]] = {}
    for name, plan in plans.items():
        for note in plan.notes:
            said.setdefault(note, []).append(name)
    for note, names in said.items():
        yield note if len(names) == len(plans) else f"{', '.join(names)}: {note}"


_DERIVED = {"stage", "ratio", "strategy", "statistics", "paths", "backend"}  # by the points, or always the same


def _command(job: _Job, plan: PruningPlan) -> dict[str, Any]:
    """The options that decided the content, by their names on the command line."""
    given = job.settings.canonical() | dict(plan.command)
    if job.evaluation is not None:
        given |= canonical_options(job.evaluation, job.margin)
    return {
        "stage": "sweep",
        "ratios": list(dict.fromkeys(str(wanted.budget.ratio) for wanted in job.points.values())),
        "strategy": list(dict.fromkeys(resolve(wanted.strategy).name for wanted in job.points.values())),
        "margin": job.margin,
    } | {name: value for name, value in given.items() if name not in _DERIVED}
