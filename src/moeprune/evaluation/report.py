"""The report of an evaluation: JSON for programs, Markdown for people, a table for the terminal."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from moeprune._files import write_atomic
from moeprune.evaluation.compare import EvalReport, SuiteComparison, TaskComparison

Filters = Mapping[str, Callable[..., str]]

_WIDTH = 110
_HEAD = ("task", "n", "base", "pruned", "change", "95 % interval", "lost", "gained", "p", "verdict")


def write_report(report: EvalReport, folder: Path) -> None:
    """Write ``report.json`` and ``report.md`` into the folder."""
    write_atomic(folder / "report.json", report.to_json())
    write_atomic(folder / "report.md", render_markdown(report))


def render_markdown(report: EvalReport) -> str:
    """The report as a Markdown page."""
    filters: Filters = {"signed": _signed, "interval": _interval, "pvalue": _p_value, "score": _score}
    units = "points" if all(row.unit == "points" for row in report.tasks) else "points, or the metric's own unit"
    values = {"report": report, "banner": banner(report), "legend": legend(report), "units": units}
    values["gated"] = any(row.skipped for row in report.tasks)
    return render_template("report.md.j2", filters, **values)


def render_template(name: str, filters: Filters, **values: Any) -> str:
    """A Markdown page from one of our templates; its filter ``cell`` keeps any text inside a table's cell."""
    import jinja2

    environment = jinja2.Environment(  # noqa: S701 - Markdown, not HTML; `cell` escapes names
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True, undefined=jinja2.StrictUndefined
    )
    environment.filters.update(cell=_cell, **filters)
    source = resources.files("moeprune.evaluation").joinpath(f"templates/{name}").read_text(encoding="utf-8")
    return environment.from_string(source).render(**values)


def render_table(report: EvalReport) -> str:
    """The report as plain aligned text, at most 110 columns wide, worst task first."""
    rows = [_task_cells(row) for row in report.tasks]
    if report.suite:
        rows.append(_suite_cells(report.suite))
    lines = aligned([_HEAD, *rows])
    if report.suite:
        lines.insert(-1, "-" * len(lines[0]))
    notes = [banner(report)] if report.partial else []
    notes += [f"note: {warning}" for warning in report.warnings]
    return "\n".join([*notes, *lines, legend(report), *_skipped(report)]) + "\n"


def _skipped(report: EvalReport) -> list[str]:
    """What gated models skipped by task, where there are any."""
    shares = [f"{row.task} {row.skipped} %" for row in report.tasks if row.skipped]
    return [f"slots skipped: {', '.join(shares)}"] if shares else []


def aligned(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Lines of a table for the terminal; where it would be too wide, its first column is cut short."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    widths[0] = min(widths[0], max(12, _WIDTH - sum(widths[1:]) - 2 * (len(widths) - 1)))
    return [_line(row, widths) for row in rows]


def banner(report: EvalReport) -> str:
    """What a reader must know when only part of the documents ran."""
    share = ", ".join(f"{row.task} {row.n} of {row.n_full}" for row in report.tasks if row.n < row.n_full)
    if len(share) > _WIDTH - 30:
        share = "only part of each task's documents ran"
    return f"NOT the full benchmark: {share}"


def legend(report: EvalReport) -> str:
    """One line that says how to read the columns."""
    return (
        f"lost/gained: better with base/pruned; verdict: margin {report.margin:g} pt, Holm p; "
        "inconclusive = too few documents to tell"
    )


def _task_cells(row: TaskComparison) -> tuple[str, ...]:
    change = (_signed(row.change), _interval(row.interval), str(row.lost), str(row.gained), _p_value(row.p_adjusted))
    return (row.task, str(row.n), _score(row, "base"), _score(row, "pruned"), *change, row.verdict)


def _suite_cells(suite: SuiteComparison) -> tuple[str, ...]:
    scores = (f"{100 * suite.base:.1f}", f"{100 * suite.pruned:.1f}")
    change = (_signed(suite.change), _interval(suite.interval), "", "", "")
    return (f"mean of {suite.tasks} tasks", "", *scores, *change, suite.verdict)


def _line(cells: tuple[str, ...], widths: list[int]) -> str:
    first = cells[0] if len(cells[0]) <= widths[0] else cells[0][: widths[0] - 3] + "..."
    middle = [cell.rjust(width) for cell, width in zip(cells[1:-1], widths[1:-1], strict=True)]
    return "  ".join([first.ljust(widths[0]), *middle, cells[-1]]).rstrip()


def _score(row: TaskComparison, side: str) -> str:
    value: float = getattr(row, side)
    return f"{100 * value:.1f}" if row.unit == "points" else f"{value:.4g}"


def _signed(value: float) -> str:
    text = f"{value:+.1f}"
    return "0.0" if text in {"+0.0", "-0.0"} else text


def _interval(ends: tuple[float, float]) -> str:
    return f"{_signed(ends[0])}..{_signed(ends[1])}"


def _p_value(p: float) -> str:
    return "<0.001" if p < 0.001 else f"{p:.3f}"


def _cell(value: object) -> str:
    """Text that stays inside its table cell and is no markup."""
    text = " ".join(str(value).split())
    for sign, escape in (("&", "&amp;"), ("<", "&lt;"), ("|", "\\|"), ("*", "\\*"), ("`", "\\`")):
        text = text.replace(sign, escape)
    return text
