"""What one sweep found: cost against ratio, and the largest ratio whose loss stays inside a margin.

A point is inside the margin where the non-inferiority verdict of every task and of the tasks' mean is that any loss is
surely smaller than the margin. Every one of them is tested at the one-sided 95 % level, which needs no correction: the
claim is that all of them hold.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

from moeprune._files import envelope, human_bytes, to_json, write_atomic
from moeprune.evaluation.agreement import Estimate
from moeprune.evaluation.compare import SuiteComparison, TaskComparison
from moeprune.evaluation.paired import GAIN, INCONCLUSIVE, LOSS, NO_MATERIAL_LOSS, SMALL_LOSS
from moeprune.evaluation.report import Filters, aligned, render_template

SCHEMA = "moeprune.sweep/1"
WITHIN = "within margin"
INSIDE = {GAIN, SMALL_LOSS, NO_MATERIAL_LOSS}  # verdicts that say that any loss is surely smaller than the margin


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepPoint:
    """One plan and what it costs.

    Attributes:
        ratio: fraction of the experts removed, as the user wrote it.
        strategy: by which the experts were chosen; ``plan``: name of its plan file.
        kept: experts that stay in a layer, the mean over layers.
        nbytes, base_bytes: of the tensors of the pruned and of the original checkpoint.
        tasks: paired comparisons with the original, worst first; ``suite``: their mean.
        text: perplexity ratio, KL and top-1 agreement on text.
    """

    ratio: str
    strategy: str
    plan: str
    kept: float
    nbytes: int
    base_bytes: int
    tasks: tuple[TaskComparison, ...] = ()
    suite: SuiteComparison | None = None
    text: Mapping[str, Estimate] | None = None

    @property
    def verdict(self) -> str:
        """Whether the point is inside the margin, a loss, or too uncertain to say; empty without tasks."""
        found = {row.verdict for row in self.tasks} | ({self.suite.verdict} if self.suite else set())
        if not found:
            return ""
        if LOSS in found:
            return LOSS
        return WITHIN if found <= INSIDE else INCONCLUSIVE

    @property
    def mean_verdict(self) -> str:
        """The same of the tasks' mean alone, or of the only task."""
        found = {self.suite.verdict} if self.suite else {row.verdict for row in self.tasks}
        return WITHIN if found and found <= INSIDE else ""

    def payload(self) -> dict[str, Any]:
        """The point as JSON values."""
        return {
            "ratio": self.ratio,
            "strategy": self.strategy,
            "plan": self.plan,
            "kept": int(self.kept) if self.kept == int(self.kept) else self.kept,
            "bytes": self.nbytes,
            "base_bytes": self.base_bytes,
            "tasks": [asdict(row) for row in self.tasks],
            "suite": asdict(self.suite) if self.suite else None,
            "text": {name: asdict(value) for name, value in self.text.items()} if self.text else None,
            "verdict": self.verdict,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepReport:
    """Every point, by strategy and ascending ratio, with everything needed to judge or repeat the sweep.

    Attributes:
        base_model: name of the model's folder; num_experts: what each of its MoE layers has.
        margin: loss in points that would still be acceptable.
        points: by strategy in the order given, then by ratio.
        warnings: what a reader must know.
        command, inputs: canonical options and fingerprints.
    """

    base_model: str
    num_experts: int
    margin: float
    points: tuple[SweepPoint, ...]
    warnings: Sequence[str] = ()
    command: Mapping[str, Any] = field(default_factory=dict)
    inputs: Mapping[str, str] = field(default_factory=dict)

    @property
    def strategies(self) -> tuple[str, ...]:
        """Names in the order given."""
        return tuple(dict.fromkeys(point.strategy for point in self.points))

    @property
    def partial(self) -> bool:
        """Whether any task ran on only some of its documents."""
        return any(row.n < row.n_full for point in self.points for row in point.tasks)

    def of(self, strategy: str) -> list[SweepPoint]:
        """The points of one strategy, by ascending ratio."""
        return [point for point in self.points if point.strategy == strategy]

    def largest(self, strategy: str) -> str | None:
        """The largest ratio of a strategy that, with every smaller one swept, is inside the margin."""
        return _largest(self.of(strategy), lambda point: point.verdict == WITHIN)

    def largest_by_mean(self, strategy: str) -> str | None:
        """The same by the tasks' mean alone, whatever single tasks lose."""
        return _largest(self.of(strategy), lambda point: point.mean_verdict == WITHIN)

    @property
    def largest_within_margin(self) -> str | None:
        """The largest ratio over all strategies, each judged by its own smaller ratios."""
        found = [ratio for name in self.strategies if (ratio := self.largest(name)) is not None]
        return max(found, key=Fraction, default=None)

    def payload(self) -> dict[str, Any]:
        """The report as plain JSON values, envelope first."""
        return envelope(SCHEMA, self.command, self.inputs) | {
            "base_model": self.base_model,
            "num_experts": self.num_experts,
            "margin": self.margin,
            "partial": self.partial,
            "points": [point.payload() for point in self.points],
            "largest_within_margin": self.largest_within_margin,
            "largest_by_strategy": {name: self.largest(name) for name in self.strategies},
            "largest_by_mean": {name: self.largest_by_mean(name) for name in self.strategies},
            "summary": list(self.summary()),
            "warnings": list(self.warnings),
        }

    def to_json(self) -> str:
        """The report as readable JSON; equal reports give equal bytes."""
        return to_json(self.payload())

    def summary(self) -> Iterable[str]:
        """For each strategy, the sentence that the sweep was run for."""
        for name in self.strategies:
            label = f"{name}: " if len(self.strategies) > 1 else ""
            yield label + _sentence(self.of(name), self.margin, self.largest(name), self.largest_by_mean(name))


def _largest(points: Sequence[SweepPoint], holds: Callable[[SweepPoint], bool]) -> str | None:
    found = None
    for point in points:
        if not holds(point):
            break
        found = point.ratio
    return found


# --- the sentence -----------------------------------------------------------------------------------------------------


def _sentence(points: Sequence[SweepPoint], margin: float, largest: str | None, by_mean: str | None) -> str:
    """The largest ratio inside the margin, or why there is none."""
    if not any(point.tasks for point in points):
        return "no task was evaluated, so nothing is said of a margin: add --eval"
    if largest is not None:
        said = f"largest ratio whose loss stays within {margin:g} pt: {largest}, for {_all_of(points[0])}"
        beyond = next((point for point in points if point.verdict != WITHIN), None)
        return said + (f"; {_why_not(beyond, margin)}" if beyond else "")
    said = f"no ratio swept is shown to stay within {margin:g} pt: {_why_not(points[0], margin)}"
    return said + (f"; the mean of the tasks alone stays within it up to {by_mean}" if by_mean is not None else "")


def _all_of(point: SweepPoint) -> str:
    return f"each of the {len(point.tasks)} tasks and their mean" if point.suite else f"{point.tasks[0].task}"


def _why_not(point: SweepPoint, margin: float) -> str:
    """What keeps a point from being inside: a loss that was shown, or too few documents to tell."""
    where = f"at {point.ratio},"
    losses = [row for row in point.tasks if row.verdict == LOSS]
    if losses:
        more = f" and {len(losses) - 1} more" if len(losses) > 1 else ""
        return f"{where} a loss is shown in {losses[0].task}, {_change(losses[0])} pt{more}"
    if point.suite and point.suite.verdict == LOSS:
        return f"{where} a loss is shown in the mean of the tasks, {_change(point.suite)} pt"
    unsure = [row for row in point.tasks if row.verdict == INCONCLUSIVE]
    if not unsure:
        return f"{where} the mean of the tasks is too uncertain to tell"
    said = f"{where} {len(unsure)} of {len(point.tasks)} tasks have too few documents to tell"
    needed = max((documents_needed(row.flips / 100, margin / 100) or 0 for row in unsure), default=0)
    said += f" ({unsure[0].task}: {_change(unsure[0])} pt with {unsure[0].n}"
    return said + (f"; about {needed:,} each would do if nothing is lost)" if needed else ")")


def documents_needed(flips: float, margin: float) -> int | None:
    """Documents with which a task that loses nothing is found to be inside the margin, four times in five.

    Args:
        flips: share of documents whose score changed.
        margin: as a share too; with none no number of documents is enough.
    """
    from scipy.stats import norm

    if margin <= 0:
        return None
    level, power = float(norm.ppf(0.95)), float(norm.ppf(0.8))
    without_flips = level**2 * (1 - margin) / margin  # the score interval of no flips has this width
    return math.ceil(max(without_flips, (level + power) ** 2 * flips / margin**2))


# --- faces ------------------------------------------------------------------------------------------------------------

_BANNER = "NOT the full benchmark: only part of each task's documents ran"
_HEAD = ("ratio", "strategy", "kept", "size", "of base", "worst task", "mean change", "ppl x", "KL", "top-1", "verdict")


def write_sweep(report: SweepReport, folder: Path) -> None:
    """Write ``sweep.md`` and, last, ``sweep.json`` into the folder."""
    write_atomic(folder / "sweep.md", render_sweep_markdown(report))
    write_atomic(folder / "sweep.json", report.to_json())


def render_sweep_markdown(report: SweepReport) -> str:
    """The report as a Markdown page."""
    filters: Filters = {"change": lambda row: _change(row) if row else ""}
    table, several = _table(report), len(report.strategies) > 1
    labels = [f"{point.strategy} {point.ratio}" if several else point.ratio for point in report.points]
    return render_template("sweep.md.j2", filters, report=report, banner=_BANNER, table=table, labels=labels)


def render_sweep_table(report: SweepReport) -> str:
    """The points as plain aligned text, and the sentence."""
    notes = [_BANNER] if report.partial else []
    notes += [f"note: {warning}" for warning in report.warnings]
    return "\n".join([*notes, *aligned(_table(report)), *report.summary()]) + "\n"


def _table(report: SweepReport) -> list[tuple[str, ...]]:
    """The head and a row per point, without columns in which nothing stands."""
    rows = [_cells(point, report) for point in report.points]
    filled = [position for position in range(len(_HEAD)) if any(row[position] for row in rows)]
    return [tuple(row[position] for position in filled) for row in (_HEAD, *rows)]


def _cells(point: SweepPoint, report: SweepReport) -> tuple[str, ...]:
    worst = f"{point.tasks[0].task} {_change(point.tasks[0])}" if point.tasks else ""
    text = point.text or {}
    return (
        point.ratio,
        point.strategy if len(report.strategies) > 1 else "",
        f"{point.kept:.4g}/{report.num_experts}",
        human_bytes(point.nbytes),
        f"{100 * point.nbytes / point.base_bytes:.0f} %",
        worst,
        _change(point.suite) if point.suite else "",
        f"{text['perplexity_ratio'].value:.3f}" if text else "",
        f"{text['kl'].value:.3f}" if text else "",
        f"{100 * text['top1'].value:.1f} %" if text else "",
        point.verdict,
    )


def _change(row: TaskComparison | SuiteComparison) -> str:
    lower, upper = row.interval
    return f"{_signed(row.change)} ({_signed(lower)}..{_signed(upper)})"


def _signed(value: float) -> str:
    text = f"{value:+.1f}"
    return "0.0" if text in {"+0.0", "-0.0"} else text
