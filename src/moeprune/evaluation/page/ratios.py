"""What a sweep over ratios found: its curves, and the table beside them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from moeprune.evaluation.page import formats
from moeprune.evaluation.page.charts import Reading, ratio_curve, ratio_scale
from moeprune.evaluation.page.cost import estimate
from moeprune.evaluation.page.formats import reading
from moeprune.evaluation.page.parts import Table
from moeprune.evaluation.page.sources import Json
from moeprune.evaluation.page.svg import render

_ON_TEXT = (  # key, what it is, the value that stands for no change, factor
    ("perplexity_ratio", "perplexity on text, times the base's", 1.0, 1.0),
    ("kl", "KL on text, nats per token", 0.0, 1.0),
    ("top1", "tokens with the same first choice, %", 100.0, 100.0),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """One panel."""

    title: str
    drawing: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Sweep:
    """The section on ratios."""

    summary: tuple[str, ...]
    partial: bool
    warnings: tuple[str, ...]
    panels: tuple[tuple[Curve, ...], ...]
    table: Table


@dataclass(frozen=True, slots=True, kw_only=True)
class _Measure:
    """One number of every point that has it, by strategy."""

    title: str
    readings: dict[str, list[Reading]]
    still: float
    margin: float | None = None


def sweep_of(sweep: Json) -> Sweep:
    """Curves over the share of removed experts, each strategy's own, on scales that all of them share."""
    with reading("the sweep"):
        order = list(dict.fromkeys(map(_strategy, sweep["points"])))
        points = sorted(sweep["points"], key=lambda point: (order.index(_strategy(point)), _ratio(point)))
        margin = float(sweep["margin"])
        if not points:
            raise ValueError("it has no points")
        return Sweep(
            summary=tuple(map(str, sweep.get("summary") or _summary(sweep, margin))),
            partial=bool(sweep.get("partial")),
            warnings=tuple(map(str, sweep.get("warnings", ()))),
            panels=_panels(points, margin),
            table=_table(points),
        )


def _strategy(point: Json) -> str:
    return str(point.get("strategy", ""))


def _ratio(point: Json) -> float:
    return float(Fraction(str(point["ratio"])))


def _summary(sweep: Json, margin: float) -> list[str]:
    largest, allowed = sweep.get("largest_within_margin"), formats.counted_points(margin)
    if largest is None:
        return [f"no ratio swept is shown to stay within {allowed}"]
    return [f"largest ratio whose loss stays within {allowed}: {largest}"]


def _panels(points: Sequence[Json], margin: float) -> tuple[tuple[Curve, ...], ...]:
    """All curves in one group; of several strategies those of one measure, side by side."""
    largest, several = max(map(_ratio, points)), len({*map(_strategy, points)}) > 1
    groups = [tuple(_curves(measure, largest, named=several)) for measure in _measures(points, margin)]
    return tuple(groups) if several else (tuple(curve for group in groups for curve in group),)


def _curves(measure: _Measure, largest: float, *, named: bool) -> Iterator[Curve]:
    """One measure, a curve for each strategy."""
    every = [found for readings in measure.readings.values() for found in readings]
    how: Any = {"scale": ratio_scale(every, measure.still, measure.margin), "largest": largest}
    for strategy, readings in measure.readings.items():
        title = f"{strategy}: {measure.title}" if named else measure.title
        drawn = ratio_curve(readings, title, still=measure.still, margin=measure.margin, **how)
        yield Curve(title=title, drawing=render(drawn))


def _measures(points: Sequence[Json], margin: float) -> Iterator[_Measure]:
    suites = [(point, point["suite"]) for point in points if point.get("suite")]
    if suites:
        yield _Measure(title="mean of the tasks, points", readings=_changes(suites), still=0.0, margin=margin)
    for name, unit in dict.fromkeys((str(task["task"]), _unit(task)) for point in points for task in point["tasks"]):
        found = [(point, task) for point in points for task in point["tasks"] if task["task"] == name]
        allowed = margin if unit == "points" else None
        yield _Measure(title=f"{name}, {unit}", readings=_changes(found), still=0.0, margin=allowed)
    for key, title, still, factor in _ON_TEXT:
        texts = [(point, point["text"][key]) for point in points if (point.get("text") or {}).get(key)]
        if texts:
            yield _Measure(title=title, readings=_values(texts, factor), still=still)
    sizes = [(point, {"value": point["bytes"] / point["base_bytes"]}) for point in points]
    yield _Measure(title="size of the checkpoint, % of the base's", readings=_values(sizes, 100.0), still=100.0)


def _unit(task: Json) -> str:
    return "points" if task.get("unit", "points") == "points" else "change on its own scale"


def _changes(found: Sequence[tuple[Json, Json]]) -> dict[str, list[Reading]]:
    return _by_strategy((point, _reading(point, entry, "change", 1.0)) for point, entry in found)


def _values(found: Sequence[tuple[Json, Json]], factor: float) -> dict[str, list[Reading]]:
    return _by_strategy((point, _reading(point, entry, "value", factor)) for point, entry in found)


def _by_strategy(found: Iterator[tuple[Json, Reading]]) -> dict[str, list[Reading]]:
    readings: dict[str, list[Reading]] = {}
    for point, made in found:
        readings.setdefault(_strategy(point), []).append(made)
    return readings


def _reading(point: Json, entry: Json, key: str, factor: float) -> Reading:
    ends, verdict = entry.get("interval"), str(entry.get("verdict") or "")
    shown = f"ratio {point['ratio']}: {formats.plain(factor * entry[key])}"
    return Reading(
        ratio=str(point["ratio"]),
        share=_ratio(point),
        value=factor * entry[key],
        interval=(factor * ends[0], factor * ends[1]) if ends else None,
        verdict=verdict,
        title=", ".join(filter(None, (shown, verdict))),
    )


def _table(points: Sequence[Json]) -> Table:
    """One row per point, without columns that are empty in all of them."""
    rows = [_cells(point) for point in points]
    filled = [name for name in rows[0] if any(row[name] for row in rows)]
    return Table(head=tuple(filled), rows=tuple(tuple(row[name] for name in filled) for row in rows))


def _cells(point: Json) -> dict[str, str]:
    worst = min(point["tasks"], key=lambda task: float(task["interval"][0]), default=None)
    suite, text = point.get("suite"), point.get("text") or {}
    return {
        "ratio": str(point["ratio"]),
        "strategy": _strategy(point),
        "experts kept": f"{point['kept']:.4g}",
        "size, % of the base's": f"{100 * point['bytes'] / point['base_bytes']:.1f}",
        "worst task": f"{worst['task']} {_change(worst)} {worst['verdict']}" if worst else "",
        "mean of the tasks": f"{_change(suite)} {suite['verdict']}" if suite else "",
        "all of it": str(point.get("verdict") or ""),
        "perplexity, times": _text(text, "perplexity_ratio"),
        "KL, nats": _text(text, "kl"),
    }


def _change(entry: Any) -> str:
    return f"{formats.signed(entry['change'])} ({formats.interval(entry['interval'])})"


def _text(text: Json, key: str) -> str:
    return estimate(text[key], ".3f") if text.get(key) else ""
