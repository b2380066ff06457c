"""What accuracy does not show: loops, broken JSON, text outside the calibration mix, distributions that moved.

Every probe is a row: two models on the same inputs, the change between them, how many there were and a 95 % interval.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from moeprune._files import envelope, to_json, write_atomic
from moeprune.evaluation.agreement import TokenLosses, perplexity, perplexity_ratio
from moeprune.evaluation.compare import EvalReport, TaskComparison
from moeprune.evaluation.detectors import StructuredPrompt, ends_in_loop, repetition
from moeprune.evaluation.evaluator import PlanScore
from moeprune.evaluation.paired import FloatArray, Interval, bootstrap_interval, tango_interval
from moeprune.evaluation.report import Filters, aligned, render_template

SCHEMA = "moeprune.probes/1"
LEGEND = (
    "calibrated: whether the domain was in the calibration mix; intervals are 95 % ones, each for its row alone: "
    "of twenty rows without any change one may stand out"
)
_BASE_NONE = "base gives none"  # so that nothing can be concluded
_DISTANCE = "distance"  # from the base, which is never less than nothing
NOTHING = {"%": 0.0, "nats": 0.0, "x": 1.0}  # the change that is none

Unit = Literal["%", "x", "nats"]
Better = Literal["lower", "higher"]
Continuation = tuple[tuple[int, ...], bool]  # tokens, and whether the model came to an end of its own


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeRow:
    """One probe of both models.

    Attributes:
        probe: tells the rows apart; ``group``: rows that belong together; ``what`` is measured.
        unit: of ``change`` and ``interval``: ``%`` and ``nats`` are pruned minus base, ``x`` is pruned over base.
        better: the direction that is.
        n: prompts, documents or questions.
        base, pruned: what each model has; ``change`` with its 95 % ``interval``.
        calibrated: of a domain, whether it was in the calibration mix; None where that is not known or not asked.
        note: why the interval is not read as better or worse, if so.
    """

    probe: str
    group: str
    what: str
    unit: Unit
    better: Better
    n: int
    base: float
    pruned: float
    change: float
    interval: Interval
    calibrated: bool | None = None
    note: str = ""

    @property
    def harm(self) -> float:
        """How much worse the pruned model is: 0 where it is the same; comparable in one unit."""
        moved = math.log(max(self.change, 1e-300)) if self.unit == "x" else self.change
        return moved if self.better == "lower" else -moved

    @property
    def reading(self) -> str:
        """What the interval says; nothing where no conclusion may be drawn."""
        lower, upper = self.interval
        nothing = NOTHING[self.unit]
        if self.note:
            return ""
        if lower <= nothing <= upper:
            return "no change shown"
        return "worse" if (lower > nothing) is (self.better == "lower") else "better"


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeReport:
    """All rows, in groups, the worst first in each.

    Attributes:
        base_model, pruned_model: names of the folders, or of the plan's file.
        rows: see `ProbeRow`.
        text: where the text comes from, one entry per source; ``pack``: the same of the texts of ours beside it.
        warnings: what a reader must know.
        command, inputs: canonical options and fingerprints.
    """

    base_model: str
    pruned_model: str
    rows: tuple[ProbeRow, ...]
    text: Sequence[Mapping[str, Any]] = ()
    pack: Mapping[str, Any] = field(default_factory=dict)
    warnings: Sequence[str] = ()
    command: Mapping[str, Any] = field(default_factory=dict)
    inputs: Mapping[str, str] = field(default_factory=dict)

    def payload(self) -> dict[str, Any]:
        """The report as plain JSON values, envelope first."""
        content = asdict(self)
        content["rows"] = [asdict(row) | {"reading": row.reading} for row in self.rows]
        return envelope(SCHEMA, content.pop("command"), content.pop("inputs")) | content

    def to_json(self) -> str:
        """The report as readable JSON; equal reports give equal bytes."""
        return to_json(self.payload())


def ranked(rows: Iterable[ProbeRow]) -> tuple[ProbeRow, ...]:
    """Groups in the order in which they come, each unit of a group together, the worst row first."""
    listed = list(rows)
    groups = list(dict.fromkeys((row.group, row.unit) for row in listed))
    return tuple(sorted(listed, key=lambda row: (groups.index((row.group, row.unit)), -row.harm)))


# --- generation -------------------------------------------------------------------------------------------------------


def generation_rows(how: str, base: Sequence[Continuation], pruned: Sequence[Continuation]) -> Iterator[ProbeRow]:
    """Loops and repetition in continuations of the same prompts.

    Args:
        how: ``greedy`` or ``sampled``.
        base, pruned: what each model continued, prompt by prompt.
    """
    loops = [[not ended and ends_in_loop(tokens) for tokens, ended in side] for side in (base, pruned)]
    what = f"share of {how} continuations that end in a loop"
    yield share_row("lower", *loops, probe=f"loops ({how})", group="generation", what=what)
    base_N, pruned_N = (np.array([repetition(tokens) for tokens, _ in side]) for side in (base, pruned))
    change_N = pruned_N - base_N
    yield ProbeRow(
        probe=f"repetition ({how})",
        group="generation",
        what=f"repeated 4-grams in {how} continuations",
        unit="%",
        better="lower",
        n=len(change_N),
        base=100 * float(base_N.mean()),
        pruned=100 * float(pruned_N.mean()),
        change=100 * float(change_N.mean()),
        interval=_percent(bootstrap_interval(change_N, _span(base_N, pruned_N))),
    )


def structured_rows(
    prompts: Sequence[StructuredPrompt], base: Sequence[str], pruned: Sequence[str]
) -> Iterator[ProbeRow]:
    """How often answers are JSON, and JSON with the keys that were asked for."""
    for probe, what, test in (
        ("JSON that parses", "share of answers that are a JSON object", StructuredPrompt.parses),
        ("JSON with its keys", "share of answers that have all keys asked for", StructuredPrompt.has_keys),
    ):
        found = [[test(*pair) for pair in zip(prompts, side, strict=True)] for side in (base, pruned)]
        note = "" if any(found[0]) else _BASE_NONE
        yield share_row("higher", *found, probe=probe, group="structured", what=what, note=note)


def share_row(better: Better, base: Sequence[bool], pruned: Sequence[bool], **about: Any) -> ProbeRow:
    """A share of cases under both models, paired case by case, with Tango's score interval.

    Args:
        better: the direction that is.
        base, pruned: whether each case has it.
        about: the remaining fields of the row.
    """
    n = len(base)
    less = sum(one and not other for one, other in zip(base, pruned, strict=True))
    more = sum(other and not one for one, other in zip(base, pruned, strict=True))
    return ProbeRow(
        unit="%",
        better=better,
        n=n,
        base=100 * sum(base) / n,
        pruned=100 * sum(pruned) / n,
        change=100 * (more - less) / n,
        interval=_percent(tango_interval(less, more, n)),
        **about,
    )


def _span(*values: FloatArray) -> float:
    return float(np.ptp(np.concatenate(values))) or 1.0


def _percent(interval: Interval) -> Interval:
    return 100 * interval[0], 100 * interval[1]


# --- text -------------------------------------------------------------------------------------------------------------


def text_rows(
    score: PlanScore, domains: Sequence[str], languages: Sequence[str], calibrated: Collection[str] | None
) -> Iterator[ProbeRow]:
    """Perplexity by domain and by language, and how far the next-token distributions agree on all of the text.

    Args:
        score: of both models on the documents.
        domains: of each document; ``languages``: likewise, empty where it has none.
        calibrated: domains of the calibration mix; None where they are not known.
    """
    for domain in sorted(set(domains)):
        inside = None if calibrated is None else domain in calibrated
        yield from _perplexity_row(score, "domain", domain, domains, calibrated=inside)
    for language in sorted(set(languages) - {""}):
        yield from _perplexity_row(score, "language", language, languages, calibrated=None)
    kl, top1 = score.agreement.kl, score.agreement.top1
    documents = int((score.losses.tokens > 0).sum())
    yield ProbeRow(
        probe="KL",
        group="agreement",
        what="KL(base || pruned) per predicted token",
        unit="nats",
        better="lower",
        n=documents,
        base=0.0,
        pruned=kl.value,
        change=kl.value,
        interval=(max(0.0, kl.interval[0]), kl.interval[1]),
        note=_DISTANCE,
    )
    yield ProbeRow(
        probe="top-1 agreement",
        group="agreement",
        what="share of tokens on which both put the same token first",
        unit="%",
        better="higher",
        n=documents,
        base=100.0,
        pruned=100 * top1.value,
        change=100 * (top1.value - 1),
        interval=(100 * (top1.interval[0] - 1), min(0.0, 100 * (top1.interval[1] - 1))),
        note=_DISTANCE,
    )


def _perplexity_row(
    score: PlanScore, group: str, label: str, labels: Sequence[str], *, calibrated: bool | None
) -> Iterator[ProbeRow]:
    """A row where there are documents enough for an interval."""
    chosen_N = np.array([other == label for other in labels])
    base, pruned = (
        TokenLosses(side.nll[chosen_N], side.tokens[chosen_N]) for side in (score.base_losses, score.losses)
    )
    documents = int((base.tokens > 0).sum())
    if documents < 2:
        return
    ratio = perplexity_ratio(base, pruned)
    yield ProbeRow(
        probe=f"perplexity ({label})",
        group=group,
        what=f"perplexity on the {group} {label}",
        unit="x",
        better="lower",
        n=documents,
        base=perplexity(base).value,
        pruned=perplexity(pruned).value,
        change=ratio.value,
        interval=ratio.interval,
        calibrated=calibrated,
    )


# --- tasks ------------------------------------------------------------------------------------------------------------


def task_rows(report: EvalReport) -> Iterator[ProbeRow]:
    """Of each task the answers that flipped, whatever that did to the score, and how far the options' odds moved."""
    for task in report.tasks:
        yield _flips(task)
    for task in report.tasks:
        if task.choice_kl is not None:
            yield ProbeRow(
                probe=f"choice KL ({task.task})",
                group="tasks",
                what=f"KL between the probabilities of the options in {task.task}",
                unit="nats",
                better="lower",
                n=task.n,
                base=0.0,
                pruned=task.choice_kl.value,
                change=task.choice_kl.value,
                interval=task.choice_kl.interval,
                note=_DISTANCE,
            )


def _flips(task: TaskComparison) -> ProbeRow:
    from scipy.stats import binomtest

    flipped = task.lost + task.gained
    found = binomtest(flipped, task.n).proportion_ci(method="wilson")
    return ProbeRow(
        probe=f"flips ({task.task})",
        group="tasks",
        what=f"share of the questions of {task.task} whose score changed",
        unit="%",
        better="lower",
        n=task.n,
        base=0.0,
        pruned=task.flips,
        change=task.flips,
        interval=_percent((float(found.low), float(found.high))),
        note=_DISTANCE,
    )


# --- faces ------------------------------------------------------------------------------------------------------------

_HEAD = ("probe", "n", "base", "pruned", "change", "95 % interval", "calibrated", "reading")


def write_probes(report: ProbeReport, folder: Path) -> None:
    """Write ``probes.json`` and ``probes.md`` into the folder."""
    write_atomic(folder / "probes.json", report.to_json())
    write_atomic(folder / "probes.md", render_probes_markdown(report))


def render_probes_markdown(report: ProbeReport) -> str:
    """The report as a Markdown page."""
    groups = list(dict.fromkeys(row.group for row in report.rows))
    filters: Filters = {}
    tables = {group: [_cells(row) for row in report.rows if row.group == group] for group in groups}
    return render_template("probes.md.j2", filters, report=report, head=_HEAD, tables=tables, legend=LEGEND)


def render_probes_table(report: ProbeReport) -> str:
    """The rows as plain aligned text, group by group, the worst first."""
    lines = aligned([_HEAD, *(_cells(row) for row in report.rows)])
    notes = [f"note: {warning}" for warning in report.warnings]
    return "\n".join([*notes, *lines, LEGEND]) + "\n"


def _cells(row: ProbeRow) -> tuple[str, ...]:
    lower, upper = row.interval
    inside = {True: "yes", False: "no", None: ""}[row.calibrated]
    values = (_value(row.base, row.unit), _value(row.pruned, row.unit), _change(row.change, row.unit))
    interval = f"{_change(lower, row.unit, bare=True)}..{_change(upper, row.unit, bare=True)}"
    return row.probe, str(row.n), *values, interval, inside, row.reading or row.note


def _value(value: float, unit: Unit) -> str:
    return f"{value:.1f} %" if unit == "%" else f"{value:.4g}"


def _change(value: float, unit: Unit, *, bare: bool = False) -> str:
    if unit == "x":
        return f"{value:.3f}" if bare else f"{value:.3f} x"
    text = f"{value:+.1f}" if unit == "%" else f"{value:.3f}"
    text = "0.0" if text in {"+0.0", "-0.0"} else text
    return text if bare else f"{text} {'pt' if unit == '%' else unit}"
