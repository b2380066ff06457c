"""What pruning cost on tasks, on text and in probes: the numbers of a page, ready to be set."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from moeprune.evaluation.compare import EvalReport, SuiteComparison, TaskComparison
from moeprune.evaluation.page import formats
from moeprune.evaluation.page.charts import Effect, axis, badge, effect_scale, forest_row, slug
from moeprune.evaluation.page.formats import reading
from moeprune.evaluation.page.parts import Table
from moeprune.evaluation.page.sources import Json
from moeprune.evaluation.page.svg import render
from moeprune.evaluation.paired import GAIN, INCONCLUSIVE, LOSS, NO_MATERIAL_LOSS, SMALL_LOSS
from moeprune.evaluation.probes import NOTHING, ProbeRow

VERDICTS = {
    LOSS: "significantly worse, perhaps by more than the margin",
    SMALL_LOSS: "significantly worse, but surely by less than the margin",
    INCONCLUSIVE: "too few documents to tell: neither fine nor worse",
    NO_MATERIAL_LOSS: "no change is shown, and any loss is surely smaller than the margin",
    GAIN: "significantly better",
}


# --- tasks ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """A verdict and its class, or how many tasks have it."""

    name: str
    slug: str
    count: int = 0
    meaning: str = ""

    @property
    def shape(self) -> str:
        """Its shape, to be set before the name."""
        return render(badge(self.slug))


def verdict(name: str) -> Verdict:
    """A verdict with the class of its colour and shape."""
    return Verdict(name=name, slug=slug(name), meaning=VERDICTS.get(name, ""))


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskRow:
    """One row of the table, as text."""

    name: str
    shots: str
    metric: str
    n: str
    base: str
    pruned: str
    change: str
    interval: str
    lost: str
    gained: str
    flips: str
    answers: str
    kl: str
    p: str
    lower: str
    verdict: Verdict
    detectable: str


_COLUMNS = {  # what a row holds, and what stands above it
    "verdict": "verdict",
    "base": "base",
    "pruned": "pruned",
    "change": "change",
    "interval": "95 % interval",
    "lost": "lost",
    "gained": "gained",
    "flips": "flips, %",
    "p": "p, Holm",
    "lower": "90 % lower bound",
    "detectable": "detectable change",
    "n": "documents",
    "answers": "answers changed",
    "kl": "KL of the choices, nats",
    "shots": "shots",
    "metric": "metric",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ForestRow:
    """One row of the forest plot."""

    label: str
    value: str
    verdict: Verdict
    drawing: str
    summary: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Tasks:
    """The section on tasks."""

    worst: TaskRow
    verdicts: tuple[Verdict, ...]
    worse: int
    columns: tuple[tuple[str, str], ...]
    rows: tuple[TaskRow, ...]
    suite: TaskRow | None
    forest: tuple[ForestRow, ...]
    axis: str
    own_scale: tuple[str, ...]


def tasks_of(report: EvalReport) -> Tasks:
    """Everything about the tasks, worst first."""
    rows = tuple(_task_row(row) for row in report.tasks)
    points = [row for row in report.tasks if row.unit == "points"]
    effects = [Effect(label=row.task, change=row.change, interval=row.interval, verdict=row.verdict) for row in points]
    if report.suite:
        suite = report.suite
        name = f"mean of {formats.counted(suite.tasks, 'task')}"
        effects.append(
            Effect(label=name, change=suite.change, interval=suite.interval, verdict=suite.verdict, summary=True)
        )
    scale = effect_scale(effects, report.margin)
    return Tasks(
        worst=rows[0],
        verdicts=_counts(report),
        worse=sum(row.verdict in {LOSS, SMALL_LOSS} for row in report.tasks),
        columns=tuple(
            (name, head)
            for name, head in _COLUMNS.items()
            if any(getattr(row, name) not in {"", "none"} for row in rows)
        ),
        rows=rows,
        suite=_suite_row(report.suite) if report.suite else None,
        forest=tuple(
            ForestRow(
                label=effect.label,
                value=f"{formats.signed(effect.change)} ({formats.interval(effect.interval)})",
                verdict=verdict(effect.verdict),
                drawing=render(forest_row(effect, scale, report.margin)),
                summary=effect.summary,
            )
            for effect in effects
        ),
        axis=render(axis(scale)),
        own_scale=tuple(row.task for row in report.tasks if row.unit != "points"),
    )


def _counts(report: EvalReport) -> tuple[Verdict, ...]:
    """How many tasks have each verdict, the bad ones first."""
    found = [row.verdict for row in report.tasks]
    return tuple(
        Verdict(name=name, slug=slug(name), count=found.count(name), meaning=meaning)
        for name, meaning in VERDICTS.items()
        if name in found
    )


def _task_row(row: TaskComparison) -> TaskRow:
    return TaskRow(
        name=row.task,
        shots=str(row.n_shot),
        metric=row.metric if row.filter == "none" else f"{row.metric}, {row.filter}",
        n=f"{row.n:,}" if row.n == row.n_full else f"{row.n:,} of {row.n_full:,}",
        base=formats.score(row, row.base),
        pruned=formats.score(row, row.pruned),
        change=formats.change(row, row.change),
        interval=formats.change_interval(row, row.interval),
        lost=f"{row.lost:,}",
        gained=f"{row.gained:,}",
        flips=f"{row.flips:.1f}",
        answers="" if row.answers_changed is None else f"{row.answers_changed:,}",
        kl="" if row.choice_kl is None else f"{row.choice_kl.value:.3f}",
        p=formats.p_value(row.p_adjusted),
        lower=formats.change(row, row.ni_lower),
        verdict=verdict(row.verdict),
        detectable=formats.change(row, row.mde).lstrip("+"),
    )


def _suite_row(suite: SuiteComparison) -> TaskRow:
    empty = dict.fromkeys(("shots", "metric", "n", "lost", "gained", "flips", "answers", "kl", "p", "detectable"), "")
    return TaskRow(
        name=f"mean of {formats.counted(suite.tasks, 'task')}",
        base=f"{100 * suite.base:.1f}",
        pruned=f"{100 * suite.pruned:.1f}",
        change=formats.signed(suite.change),
        interval=formats.interval(suite.interval),
        lower=formats.signed(suite.ni_lower),
        verdict=verdict(suite.verdict),
        **empty,
    )


# --- text -------------------------------------------------------------------------------------------------------------


def text_table(text: Json) -> Table:
    """What plans cost on text, the best plan first."""
    with reading("the text report"):
        plans = sorted(text["plans"], key=lambda plan: float(plan["perplexity"]["value"]))
        extent, base = text["extent"], text["perplexity"]
        rows = tuple(
            (
                str(plan["name"]),
                f"{plan['kept']:.4g} of {text['num_experts']}",
                estimate(plan["ratio"], ".3f"),
                estimate(plan["kl"], ".3f"),
                estimate(plan["top1"], ".1f", 100),
                _worst_domain(plan.get("domains", {})),
            )
            for plan in plans
        )
        size = f"{extent['documents']:,} documents, {extent['tokens']:,} predicted tokens"
        notes = (f"Base perplexity {estimate(base, '.3f')}; {size}.", *map(str, text.get("warnings", ())))
    head = (
        "plan",
        "experts kept",
        "perplexity, times the base's",
        "KL, nats per token",
        "same first token, %",
        "worst domain",
    )
    return Table(head=head, rows=rows, notes=notes)


def estimate(found: Mapping[str, Any], form: str, factor: float = 1) -> str:
    """A value with its interval."""
    lower, upper = found["interval"]
    return f"{factor * found['value']:{form}} ({factor * lower:{form}} to {factor * upper:{form}})"


def _worst_domain(domains: Mapping[str, Mapping[str, Any]]) -> str:
    if len(domains) < 2:
        return ""
    name = max(domains, key=lambda label: domains[label]["value"])
    return f"{name} {domains[name]['value']:.3f}"


# --- probes -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeLine:
    """One probe, as text; ``told`` is what its interval says, and ``note`` why it says nothing."""

    group: str
    what: str
    n: str
    base: str
    pruned: str
    change: str
    interval: str
    told: Verdict | None
    note: str
    calibrated: str


def probe_lines(probes: Json) -> tuple[ProbeLine, ...]:
    """The probes in their order."""
    known = {item.name for item in dataclasses.fields(ProbeRow)}
    with reading("the probes"):
        return tuple(
            _probe_line(ProbeRow(**{key: value for key, value in row.items() if key in known}))
            for row in probes["rows"]
        )


def _probe_line(row: ProbeRow) -> ProbeLine:
    if row.unit not in NOTHING or row.better not in {"lower", "higher"}:
        raise ValueError(f"unit {row.unit!r}, better {row.better!r}")
    form = ".3f" if row.unit == "x" else "+.1f" if row.unit == "%" else "+.3f"
    told = row.reading
    return ProbeLine(
        group=row.group,
        what=f"{row.what} ({'times' if row.unit == 'x' else row.unit})",
        n=f"{row.n:,}",
        base=formats.plain(row.base),
        pruned=formats.plain(row.pruned),
        change=formats.moved(row.change, form),
        interval=formats.interval(row.interval, form),
        told=Verdict(name=told, slug=_TOLD.get(told, "unknown")) if told else None,
        note=row.note,
        calibrated="" if row.calibrated is None else "calibrated" if row.calibrated else "not calibrated",
    )


_TOLD = {"worse": "loss", "better": "gain"}
