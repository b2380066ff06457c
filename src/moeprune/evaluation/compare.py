"""Paired comparison of two lm-eval runs: what a pruned model lost and gained, document by document.

Reads what ``lm_eval run --output_path DIR --log_samples`` writes, so that it needs no model, no GPU and no torch. Two
runs are compared only when they were the same experiment: same documents, requests, few-shot examples and versions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from moeprune._files import PathLike, check_schema, envelope, parse_json, to_json
from moeprune.errors import ArtifactError, EvaluationError, nearest
from moeprune.evaluation.agreement import Estimate
from moeprune.evaluation.paired import (
    Interval,
    bootstrap_interval,
    detectable_change,
    holm,
    mcnemar,
    permutation_p,
    tango_interval,
    verdict_of,
)
from moeprune.evaluation.presets import PRIMARY_METRICS
from moeprune.evaluation.samples import Run, TaskSamples, pooled, read_run

SCHEMA = "moeprune.report/1"
SAME_MODEL = "both runs name the same model: this measures noise, not pruning"

_PREFERRED = ("acc", "exact_match")
_DERIVED = {"schema", "moeprune_version", "partial"}
_SAME_EXPERIMENT = "run both with the same tasks, lm-eval version, few-shot examples, seeds, tokenizer and --limit"


# --- values -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskComparison:
    """One task's paired result.

    Attributes:
        metric: the compared metric, and ``filter`` the lm-eval filter that extracted the answers.
        n: documents compared, out of ``n_full`` in the task.
        base: the metric's mean for the base model as lm-eval reports it (0..1 for accuracies); ``pruned`` likewise.
        unit: ``points`` (the metric times 100) for metrics in 0..1, ``raw`` for any other scale.
        change: pruned minus base in ``unit``; positive is better, also where the metric itself is better when lower.
        interval: 95 % interval of ``change``; ``ni_lower`` is the lower end of the 90 % one (one-sided 95 %).
        lost: documents on which the pruned model scores worse; ``gained`` those on which it scores better.
        flips: lost plus gained as a percentage of n.
        answers_changed: multiple choice only: documents whose most likely option changed, right or wrong.
        p: exact McNemar (0/1 metrics) or sign-flip permutation p; ``p_adjusted`` is Holm's over the report's tasks.
        mde: smallest change in ``unit`` that a test of this size finds with 80 % power at the observed flip rate.
        choice_kl: multiple choice only: KL(base || pruned) in nats between the models' probabilities of the options,
            renormalised, the mean over documents with its 95 % interval.
        cut_base: answers of the base model that ended at the limit of ``max_gen_toks`` tokens, and ``cut_pruned`` those
            of the pruned one; None where nothing is generated or nobody counted.
        skipped_base: share of the slots that the base model skipped on the task's tokens, and ``skipped_pruned`` the
            other one; None of a model that has no gates.
    """

    task: str
    metric: str
    filter: str
    version: str
    n: int
    n_full: int
    n_shot: int
    base: float
    pruned: float
    unit: str
    change: float
    interval: Interval
    ni_lower: float
    lost: int
    gained: int
    flips: float
    answers_changed: int | None
    p: float
    p_adjusted: float
    mde: float
    verdict: str
    choice_kl: Estimate | None = None
    max_gen_toks: int | None = None
    cut_base: int | None = None
    cut_pruned: int | None = None
    skipped_base: float | None = None
    skipped_pruned: float | None = None

    @property
    def skipped(self) -> str:
        """What the two models skipped in percent, for people; empty where neither has gates."""
        shares = (self.skipped_base, self.skipped_pruned)
        shown = ["0" if share is None else f"{100 * share:.1f}" for share in shares]
        return "" if shares == (None, None) else shown[1] if shares[0] is None else " / ".join(shown)


@dataclass(frozen=True, slots=True, kw_only=True)
class SuiteComparison:
    """The unweighted mean over the tasks measured in points; fields as in `TaskComparison`."""

    tasks: int
    base: float
    pruned: float
    change: float
    interval: Interval
    ni_lower: float
    verdict: str


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalReport:
    """All tasks, worst first, with everything needed to judge or repeat the comparison."""

    base_model: str
    pruned_model: str
    margin: float
    alpha: float
    limit: float | None
    tasks: tuple[TaskComparison, ...]
    suite: SuiteComparison | None
    settings: Mapping[str, Any] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    command: Mapping[str, Any] = field(default_factory=dict)
    inputs: Mapping[str, str] = field(default_factory=dict)

    @property
    def partial(self) -> bool:
        """Whether any task ran on only some of its documents, so that this is NOT the full benchmark."""
        return any(row.n < row.n_full for row in self.tasks)

    def payload(self) -> dict[str, Any]:
        """The report as plain JSON values, envelope first."""
        content = asdict(self)
        head = envelope(SCHEMA, content.pop("command"), content.pop("inputs"))
        return {**head, "partial": self.partial, **content}

    def to_json(self) -> str:
        """The report as readable JSON; equal reports give equal bytes."""
        return to_json(self.payload())

    @classmethod
    def from_json(cls, text: str | bytes, source: PathLike = "report") -> EvalReport:
        """Read back what `to_json` wrote.

        Raises:
            ArtifactError: not JSON, another schema, or fields missing.
        """
        payload = parse_json(text, source)
        check_schema(payload, SCHEMA, source)
        content = {name: value for name, value in payload.items() if name not in _DERIVED}
        try:
            content["tasks"] = tuple(TaskComparison(**_with_kl(_with_interval(row))) for row in content["tasks"])
            content["suite"] = SuiteComparison(**_with_interval(content["suite"])) if content["suite"] else None
            content["warnings"] = tuple(content["warnings"])
            return cls(**content)
        except (KeyError, TypeError, ValueError) as error:
            raise ArtifactError(f"{source} is not a complete {SCHEMA} file: {error}") from error


def _with_interval(row: Mapping[str, Any]) -> dict[str, Any]:
    lower, upper = row["interval"]
    return {**row, "interval": (lower, upper)}


def _with_kl(row: Mapping[str, Any]) -> dict[str, Any]:
    found = row.get("choice_kl")
    return {**row, "choice_kl": Estimate(**_with_interval(found)) if found else None}


# --- the same experiment? ---------------------------------------------------------------------------------------------


def _check_same_experiment(base: Run, pruned: Run) -> None:
    for setting, what in (("chat_template_sha", "chat template"), ("system_instruction_sha", "system instruction")):
        if base.results.get(setting) != pruned.results.get(setting):
            raise EvaluationError(f"the two runs used a different {what}", _SAME_EXPERIMENT)
    if base.tasks.keys() != pruned.tasks.keys():
        alone = ", ".join(sorted(base.tasks.keys() ^ pruned.tasks.keys()))
        raise EvaluationError(f"only one of the two runs has the tasks {alone}", _SAME_EXPERIMENT)
    for name, task in base.tasks.items():
        _check_same_task(name, task, pruned.tasks[name])


def _check_same_task(name: str, base: TaskSamples, pruned: TaskSamples) -> None:
    for what, one, other in (
        ("version", base.version, pruned.version),
        ("number of few-shot examples", base.n_shot, pruned.n_shot),
    ):
        if one != other:
            raise EvaluationError(f"task {name!r}: another {what} ({one} and {other})", _SAME_EXPERIMENT)
    alone = sorted({key[0] for key in base.samples.keys() ^ pruned.samples.keys()})
    if alone:
        shown = ", ".join(map(str, alone[:5])) + (", ..." if len(alone) > 5 else "")
        raise EvaluationError(f"task {name!r}: only one run has the documents {shown}", _SAME_EXPERIMENT)
    for (doc_id, _), sample in base.samples.items():
        other_hashes = pruned.samples[doc_id, _].hashes
        changed = [what for what, digest in sample.hashes.items() if other_hashes[what] != digest]
        if changed:
            raise EvaluationError(f"task {name!r}, document {doc_id}: changed {changed[0]}", _SAME_EXPERIMENT)


def _warnings(base: Run, pruned: Run) -> list[str]:
    found = []
    if base.results.get("model_name") == pruned.results.get("model_name") is not None:
        found.append(SAME_MODEL)
    for setting in ("batch_size", "model_dtype", "model_source", "lm_eval_version", "transformers_version"):
        one, other = (_setting(run.results, setting) for run in (base, pruned))
        if one != other:
            found.append(f"the runs differ in {setting} ({one} and {other}): some flips may come from that")
    for label, run in (("base", base), ("pruned", pruned)):
        for name, task in run.tasks.items():
            broken = sum(not sample.finite for sample in task.samples.values())
            if broken:
                found.append(f"task {name!r}: the {label} model gave NaN likelihoods on {broken} documents")
    return found


def _setting(results: Mapping[str, Any], name: str) -> Any:
    return results.get("config", {}).get(name, results.get(name))


# --- the comparison ---------------------------------------------------------------------------------------------------


def compare_folders(
    base_dir: PathLike,
    pruned_dir: PathLike,
    *,
    margin: float = 1.0,
    alpha: float = 0.05,
    metrics: Mapping[str, str] | None = None,
    command: Mapping[str, Any] | None = None,
    inputs: Mapping[str, str] | None = None,
) -> EvalReport:
    """Compare two folders written by lm-eval with ``--log_samples``, paired by document.

    Args:
        base_dir: folder with the base model's run: one run, possibly in a sub-folder.
        pruned_dir: folder with the pruned model's run.
        margin: largest loss in points that still counts as immaterial; decide it before looking.
        alpha: significance level, for Holm-adjusted p values.
        metrics: primary metric by task, ``"acc_norm"`` or ``"exact_match,flexible-extract"``; by default that of
            `PRIMARY_METRICS`, or else ``acc`` or ``exact_match``.
        command: what the envelope records as the command; this function's options by default.
        inputs: what it records as inputs; hashes of the two runs' samples by default.

    Raises:
        EvaluationError: a folder without a single complete run, or two runs that were not the same experiment.
    """
    metrics = metrics or {}
    base, pruned = read_run(Path(base_dir)), read_run(Path(pruned_dir))
    _check_same_experiment(base, pruned)
    base, pruned = pooled(base), pooled(pruned)
    for name in metrics:
        if name not in base.tasks:
            raise EvaluationError(f"no task {name!r} in these runs", nearest(name, base.tasks))
    chosen = {name: _primary_metric(name, task, metrics.get(name)) for name, task in base.tasks.items()}
    measured = [_compare_task(name, base, pruned, *key, alpha) for name, key in chosen.items() if key]
    if not measured:
        raise EvaluationError("no task has a per-document score that can be paired")
    rows = sorted(_judged(measured, margin, alpha), key=lambda row: (row.interval[0], row.change, row.task))
    return EvalReport(
        base_model=_model_name(base.results),
        pruned_model=_model_name(pruned.results),
        margin=margin,
        alpha=alpha,
        limit=_setting(base.results, "limit"),
        tasks=tuple(rows),
        suite=_compare_suite([row for row in rows if row.unit == "points"], margin, alpha),
        settings=_settings(base.results),
        warnings=(
            *(f"task {name!r} has no per-document score to pair: left out" for name, key in chosen.items() if not key),
            *(
                f"task {row.task!r}: {row.metric} and its margin are on its own scale"
                for row in rows
                if row.unit == "raw"
            ),
            *(_cut_warning(row) for row in rows if row.cut_base or row.cut_pruned),
            *_warnings(base, pruned),
        ),
        command=command if command is not None else {"margin": margin, "alpha": alpha, "metrics": dict(metrics)},
        inputs=inputs if inputs is not None else {"base": base.fingerprint, "pruned": pruned.fingerprint},
    )


def _primary_metric(name: str, task: TaskSamples, wanted: str | None) -> tuple[str, str] | None:
    """The metric and filter to compare; None when the task has no scalar per document."""
    found: dict[str, tuple[str, str]] = {}
    for (_, filter_name), sample in task.samples.items():
        for metric in sample.values:
            found.setdefault(metric, (metric, filter_name))  # lm-eval lists its strictest filter first
            found.setdefault(f"{metric},{filter_name}", (metric, filter_name))
    if wanted is None:
        usual = (PRIMARY_METRICS.get(name, ""), *_PREFERRED)
        return next((found[metric] for metric in usual if metric in found), next(iter(found.values()), None))
    if wanted not in found:
        raise EvaluationError(f"task {name!r} has no metric {wanted!r}", nearest(wanted, found))
    return found[wanted]


def _compare_task(name: str, base: Run, pruned: Run, metric: str, filter_name: str, alpha: float) -> TaskComparison:
    """Everything about one task that does not depend on the other tasks."""
    task, other = base.tasks[name], pruned.tasks[name]
    keys = sorted(key for key in task.samples if key[1] == filter_name)
    pairs = [(task.samples[key], other.samples[key]) for key in keys]
    base_N, pruned_N = (np.array([pair[side].values.get(metric, math.nan) for pair in pairs]) for side in (0, 1))
    both = np.concatenate([base_N, pruned_N])
    if not np.isfinite(both).all():
        raise EvaluationError(f"task {name!r}: {metric} is missing or not finite on some documents")
    scale = 100.0 if both.min() >= 0 and both.max() <= 1 else 1.0
    better = 1.0 if task.higher_is_better.get(metric, True) else -1.0
    change_N, n = better * (pruned_N - base_N), len(keys)
    lost, gained = int((change_N < 0).sum()), int((change_N > 0).sum())
    if np.isin(both, (0.0, 1.0)).all():
        interval, inner = (tango_interval(lost, gained, n, level) for level in (0.95, 0.9))
        p, smallest = mcnemar(lost, gained), math.ceil(math.log2(2 / alpha)) / n
    else:
        span = float(np.ptp(both)) or float(np.abs(both).max()) or 1.0
        interval, inner = (bootstrap_interval(change_N, span, level) for level in (0.95, 0.9))
        p, smallest = permutation_p(change_N), 0.0
    changed = sum(left.choice != right.choice for left, right in pairs) if pairs[0][0].choice is not None else None
    answers, other_answers = base.answers.get(name), pruned.answers.get(name)
    # an exact test cannot reject at all below some number of flips, whatever the flip rate
    mde = max(detectable_change(float(np.sqrt((change_N**2).mean())), n, alpha), smallest)
    return TaskComparison(
        task=name,
        metric=metric,
        filter=filter_name,
        version=task.version,
        n=n,
        n_full=task.n_full,
        n_shot=task.n_shot,
        base=float(base_N.mean()),
        pruned=float(pruned_N.mean()),
        unit="points" if scale == 100 else "raw",
        change=scale * float(change_N.mean()),
        interval=(scale * interval[0], scale * interval[1]),
        ni_lower=scale * inner[0],
        lost=lost,
        gained=gained,
        flips=100 * (lost + gained) / n,
        answers_changed=changed,
        p=p,
        p_adjusted=p,
        mde=scale * mde,
        verdict="",
        choice_kl=_choice_kl([(one.likelihoods, two.likelihoods) for one, two in pairs]),
        max_gen_toks=answers.limit if answers else None,
        cut_base=answers.cut if answers else None,
        cut_pruned=other_answers.cut if other_answers else None,
        skipped_base=base.skipped[name].rate if name in base.skipped else None,
        skipped_pruned=pruned.skipped[name].rate if name in pruned.skipped else None,
    )


def _cut_warning(row: TaskComparison) -> str:
    counts = f"{row.cut_base or 0} of {row.n} base and {row.cut_pruned or 0} pruned answers"
    return f"task {row.task!r}: {counts} were cut at {row.max_gen_toks} tokens; --max-gen-toks allows more"


def _choice_kl(pairs: Sequence[tuple[Sequence[float], Sequence[float]]]) -> Estimate | None:
    """Mean KL between the two models' probabilities of a document's options; None where there are none or are NaN."""
    from scipy.special import log_softmax

    found = []
    for options in pairs:
        if len(options[0]) < 2 or not np.isfinite(options).all():
            return None
        base_C, pruned_C = log_softmax(options, axis=1)
        found.append(max(0.0, float((np.exp(base_C) * (base_C - pruned_C)).sum())))
    kl_N = np.array(found)
    lower, upper = bootstrap_interval(kl_N, float(kl_N.max()))
    return Estimate(value=float(kl_N.mean()), interval=(max(0.0, lower), upper))


def _judged(rows: Sequence[TaskComparison], margin: float, alpha: float) -> list[TaskComparison]:
    judged = []
    for row, p in zip(rows, holm([row.p for row in rows]), strict=True):
        verdict = verdict_of(row.change, row.ni_lower, margin, significant=p <= alpha)
        judged.append(replace(row, p_adjusted=p, verdict=verdict))
    return judged


def _compare_suite(rows: Sequence[TaskComparison], margin: float, alpha: float) -> SuiteComparison | None:
    """Mean over tasks, with standard errors read off the tasks' intervals, which are not zero where nothing flipped."""
    from scipy.stats import norm

    if len(rows) < 2:
        return None
    errors = [(row.interval[1] - row.interval[0]) / (2 * norm.ppf(0.975)) for row in rows]
    error = math.sqrt(sum(value**2 for value in errors)) / len(rows)
    change = float(np.mean([row.change for row in rows]))
    reach, inner = (float(norm.ppf(level) * error) for level in (0.975, 0.95))
    significant = abs(change) >= norm.ppf(1 - alpha / 2) * error
    return SuiteComparison(
        tasks=len(rows),
        base=float(np.mean([row.base for row in rows])),
        pruned=float(np.mean([row.pruned for row in rows])),
        change=change,
        interval=(change - reach, change + reach),
        ni_lower=change - inner,
        verdict=verdict_of(change, change - inner, margin, significant=bool(significant)),
    )


def _model_name(results: Mapping[str, Any]) -> str:
    """Last part of the model's name: where it lay on this machine is nobody's business."""
    return Path(str(results.get("model_name") or "model")).name


def _settings(results: Mapping[str, Any]) -> dict[str, Any]:
    names = ("model_source", "model_dtype", "batch_size", "random_seed", "numpy_seed", "torch_seed", "fewshot_seed")
    more = ("gen_kwargs", "chat_template_sha", "lm_eval_version", "transformers_version")
    return {name: _setting(results, name) for name in (*names, *more) if _setting(results, name) is not None}
