"""Charts as SVG: small pure functions from numbers to elements.

No chart needs a script or tells anything by colour alone: verdicts have shapes, dropped experts have strokes, hover
values are titles. Colours come from the page's style sheet, by class.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from moeprune.evaluation.page.formats import plain
from moeprune.evaluation.page.svg import Element, drawing, element, percent
from moeprune.evaluation.paired import GAIN, INCONCLUSIVE, LOSS, NO_MATERIAL_LOSS, SMALL_LOSS

SHADES = 8
_HIGH = 120  # of a curve over ratios
SLUGS = {
    LOSS: "loss",
    SMALL_LOSS: "small",
    NO_MATERIAL_LOSS: "none",
    GAIN: "gain",
    INCONCLUSIVE: "unknown",
}
_MARKERS = {  # around the origin
    "loss": "M-6-5h12l-6 11z",
    "small": "M-6-5h12l-6 11z",
    "gain": "M-6 5h12l-6-11z",
    "none": "M-5 0a5 5 0 1 0 10 0a5 5 0 1 0-10 0z",
    "unknown": "M0-7l7 7l-7 7l-7-7z",
    "plain": "M-4-4h8v8h-8z",  # judged by nobody
}


def slug(verdict: str) -> str:
    """The class of a verdict; what is not known as one is as good as inconclusive."""
    return SLUGS.get(verdict, "unknown")


# --- scales -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """A linear axis from ``low`` to ``high`` with round ticks."""

    low: float
    high: float
    ticks: tuple[float, ...]

    @classmethod
    def around(cls, values: Sequence[float], count: int = 5) -> Scale:
        """A scale that holds all values with some room, and about so many ticks."""
        low, high = min(values), max(values)
        room = 0.06 * (high - low or abs(high) or 1.0)
        low, high = low - room, high + room
        step = _round_step((high - low) / count)
        first, last = math.ceil(low / step), math.floor(high / step)
        return cls(low=low, high=high, ticks=tuple(step * index for index in range(first, last + 1)))

    def share(self, value: float) -> float:
        """Where a value lies, 0 to 1."""
        return (value - self.low) / (self.high - self.low)

    def x(self, value: float) -> str:
        """Its position from the left."""
        return percent(100 * self.share(value))

    def y(self, value: float, height: float) -> float:
        """Its position from the top of a chart of this height."""
        return height * (1 - self.share(value))


def _round_step(rough: float) -> float:
    magnitude = float(10 ** math.floor(math.log10(rough)))
    return magnitude * next(step for step in (1, 2, 5, 10) if magnitude * step >= rough * 0.999)


# --- forest plot ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Effect:
    """A change with its 95 % interval and its verdict."""

    label: str
    change: float
    interval: tuple[float, float]
    verdict: str
    summary: bool = False


def effect_scale(effects: Sequence[Effect], margin: float) -> Scale:
    """One axis for all rows of a forest plot, with zero and the margin on it."""
    return Scale.around([-margin, 0.0, margin, *(end for effect in effects for end in effect.interval)])


def forest_row(effect: Effect, scale: Scale, margin: float) -> Element:
    """One row: the margin's band, the zero line, the interval and a marker in the shape of its verdict."""
    kind, (lower, upper) = slug(effect.verdict), effect.interval
    line = element("line", class_=f"interval {kind}", x1=scale.x(lower), x2=scale.x(upper), y1=14, y2=14)
    ends = [element("line", class_=f"end {kind}", x1=scale.x(x), x2=scale.x(x), y1=9, y2=19) for x in (lower, upper)]
    return element(
        "svg", *_ground(scale, margin, 28), line, *ends, marker(kind, scale.x(effect.change), 14), aria_hidden="true"
    )


def _ground(scale: Scale, margin: float, height: int) -> list[Element]:
    band = percent(100 * (scale.share(0.0) - scale.share(-margin)))
    return [
        element("rect", class_="band", x=scale.x(-margin), y=0, width=band, height=height),
        element("line", class_="zero", x1=scale.x(0.0), x2=scale.x(0.0), y1=0, y2=height),
    ]


def marker(kind: str, x: str, y: float) -> Element:
    """The shape of a verdict."""
    return element(
        "svg", element("path", d=_MARKERS[kind]), class_=f"marker {kind}", x=x, y=float(y), overflow="visible"
    )


def badge(kind: str) -> Element:
    """The same shape on its own."""
    shape = element("path", d=_MARKERS[kind])
    return element("svg", shape, class_=f"marker {kind}", viewBox="-9 -9 18 18", aria_hidden="true")


def axis(scale: Scale) -> Element:
    """Ticks below a chart."""
    lines = [element("line", class_="tick", x1=scale.x(tick), x2=scale.x(tick), y1=0, y2=5) for tick in scale.ticks]
    texts = [
        element("text", text=_tick(tick), x=scale.x(tick), y=18, text_anchor=_anchor(scale.share(tick)))
        for tick in scale.ticks
    ]
    return element("svg", *lines, *texts, class_="axis", aria_hidden="true")


def _tick(value: float) -> str:
    return plain(0.0 if abs(value) < 1e-12 else value)


def _anchor(share: float) -> str:
    """Letters at the edges stay inside."""
    return "start" if share < 0.03 else "end" if share > 0.97 else "middle"


# --- experts by layer -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class HeatRow:
    """One layer of a heatmap.

    Attributes:
        layer: its number.
        shades: of every expert, 0 to ``SHADES`` - 1.
        dropped: whether it is.
        titles: hover texts.
    """

    layer: int
    shades: Sequence[int]
    dropped: Sequence[bool]
    titles: Sequence[str]


def heatmap(rows: Sequence[HeatRow], label: str) -> Element:
    """Layers by experts, a stroke through each dropped one; 15,000 cells take 1.8 MB."""
    experts = max(len(row.shades) for row in rows)
    pitch = min(20, max(6, 960 // experts))
    left, top = 34, 18
    width, height = left + pitch * experts, top + pitch * len(rows)
    every = _label_step(experts, pitch, room=30)
    columns = [
        element("text", text=expert, x=left + pitch * expert + pitch / 2, y=12, text_anchor="middle")
        for expert in range(0, experts, every)
    ]
    step = _label_step(len(rows), pitch, room=14)
    drawn = [_heat_row(row, pitch, left, top + pitch * i, named=i % step == 0) for i, row in enumerate(rows)]
    return drawing(label, *columns, *drawn, class_="heat", width=width, height=height, viewBox=f"0 0 {width} {height}")


def _label_step(count: int, pitch: int, room: int) -> int:
    """Label every first, second, fifth, ... so that labels do not touch."""
    return next((step for step in (1, 2, 4, 5, 8, 10, 16, 20, 32) if pitch * step >= room), count)


def _heat_row(row: HeatRow, pitch: int, left: int, y: int, *, named: bool) -> Element:
    size = pitch - 1
    cells = [
        element("rect", element("title", text=title), class_=f"h{shade}", x=pitch * i, width=size, height=size)
        for i, (shade, title) in enumerate(zip(row.shades, row.titles, strict=True))
    ]
    strokes = "".join(f"M{pitch * i + 1} {size - 1}l{size - 2} {2 - size}" for i, cut in enumerate(row.dropped) if cut)
    marks = [element("path", class_=name, d=strokes) for name in ("halo", "cut")] if strokes else []
    label = [element("text", text=row.layer, x=-5, y=size / 2 + 4, text_anchor="end")] if named else []
    return element("g", *label, *cells, *marks, transform=f"translate({left} {y})")


def score_curve(scores: Sequence[float], kept: Sequence[bool]) -> Element:
    """A layer's scores from the highest to the lowest, the cut, and ticks under the experts that are dropped."""
    order = sorted(range(len(scores)), key=lambda index: -scores[index])
    scale = Scale(low=min(0.0, *scores), high=max(*scores, 0.0) or 1.0, ticks=())
    height, step = 44, 120 / len(scores)
    points = " ".join(f"{step * (i + 0.5):.1f},{2 + scale.y(scores[at], height):.1f}" for i, at in enumerate(order))
    ticks = "".join(f"M{step * (i + 0.5):.1f} 49v6" for i, at in enumerate(order) if not kept[at])
    cut = step * sum(kept)
    parts = [
        element("line", class_="cutline", x1=cut, x2=cut, y1=0, y2=56),
        element("polyline", class_="curve", points=points),
        *([element("path", class_="drop", d=ticks)] if ticks else []),
    ]
    return element("svg", *parts, class_="score", viewBox="0 0 120 58", aria_hidden="true")


def columns(values: Sequence[int], total: int, titles: Sequence[str], label: str) -> Element:
    """One column per layer, out of a total."""
    step, height = 100 / len(values), 90
    bars = [
        element(
            "rect",
            element("title", text=title),
            class_="bar",
            x=percent(step * (index + 0.1)),
            width=percent(step * 0.8),
            y=height * (1 - value / total),
            height=height * value / total,
        )
        for index, (value, title) in enumerate(zip(values, titles, strict=True))
    ]
    frame = element("line", class_="zero", x1="0%", x2="100%", y1=height, y2=height)
    return drawing(label, frame, *bars, class_="columns", height=height + 1)


def bar(parts: Sequence[tuple[str, float]], *, at: float | None = None) -> Element:
    """Shares of a whole side by side, each with the class of its colour, and a line at a share to compare with."""
    left, drawn = 0.0, []
    for name, share in parts:
        drawn.append(element("rect", class_=name, x=percent(100 * left), y=4, width=percent(100 * share), height=14))
        left += share
    line = (
        []
        if at is None
        else [element("line", class_="cutline", x1=percent(100 * at), x2=percent(100 * at), y1=0, y2=22)]
    )
    ground = element("rect", class_="track", x=0, y=4, width="100%", height=14)
    return element("svg", ground, *drawn, *line, class_="share", aria_hidden="true")


# --- a measure over ratios --------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """A measured value at one ratio, with its interval where there is one, and a verdict where there is one."""

    ratio: str
    share: float
    value: float
    interval: tuple[float, float] | None = None
    verdict: str = ""
    title: str = ""


def ratio_scale(readings: Sequence[Reading], still: float, margin: float | None) -> Scale:
    """An axis for all readings, with what stands for no change and the margin on it."""
    ends = [end for reading in readings for end in (reading.value, *(reading.interval or ()))]
    return Scale.around([still, still - (margin or 0.0), *ends], count=4)


def ratio_curve(
    readings: Sequence[Reading],
    label: str,
    *,
    scale: Scale,
    largest: float,
    still: float,
    margin: float | None = None,
) -> Element:
    """Readings with intervals, joined by lines.

    Args:
        readings: by ascending ratio.
        label: what it shows, for people who cannot see it.
        scale: from bottom to top.
        largest: the ratio at the right end.
        still: the value that stands for no change.
        margin: how far below that a value would be acceptable.
    """
    places = [scale.y(reading.value, _HIGH) for reading in readings]
    xs = [10 + 84 * reading.share / largest for reading in readings]  # with room for letters at both sides
    deep = _HIGH * (margin or 0.0) / (scale.high - scale.low)
    level = scale.y(still, _HIGH)
    band = [element("rect", class_="band", x="0%", width="100%", y=level, height=deep)] if margin else []
    zero = element("line", class_="zero", x1="0%", x2="100%", y1=level, y2=level)
    steps = itertools.pairwise(zip(xs, places, strict=True))
    lines = [
        element("line", class_="curve", x1=percent(x1), x2=percent(x2), y1=y1, y2=y2) for (x1, y1), (x2, y2) in steps
    ]
    points = [_reading(reading, percent(x), y, scale) for reading, x, y in zip(readings, xs, places, strict=True)]
    grid = [_gridline(tick, scale.y(tick, _HIGH)) for tick in scale.ticks]
    names = _ratio_names(readings, xs, _HIGH + 15)
    parts = (*band, *grid, zero, *lines, *points, *names)
    return drawing(label, *parts, class_="ratio", height=_HIGH + 20)


def _ratio_names(readings: Sequence[Reading], xs: Sequence[float], y: int) -> list[Element]:
    """The ratios below their points, without those that would touch the one before."""
    names, last = [], -100.0
    for reading, x in zip(readings, xs, strict=True):
        if x - last >= 12:
            names.append(element("text", text=reading.ratio, x=percent(x), y=y, text_anchor="middle"))
            last = x
    return names


def _gridline(tick: float, y: float) -> Element:
    line = element("line", class_="grid", x1="0%", x2="100%", y1=y, y2=y)
    return element("g", line, element("text", text=_tick(tick), x=0, y=y - 3))


def _reading(reading: Reading, x: str, y: float, scale: Scale) -> Element:
    kind = slug(reading.verdict) if reading.verdict else "plain"
    ends = [scale.y(end, _HIGH) for end in reading.interval or ()]
    line = [element("line", class_=f"interval {kind}", x1=x, x2=x, y1=ends[0], y2=ends[1])] if ends else []
    return element("g", element("title", text=reading.title), *line, marker(kind, x, y))
