"""Numbers as people read them, with a real minus sign, and what to say where there is none."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

from moeprune.errors import ArtifactError
from moeprune.evaluation.compare import TaskComparison

MINUS = "\N{MINUS SIGN}"


def signed(value: float, form: str = ".1f") -> str:
    """A change with its sign; none on what rounds to zero."""
    text = format(value, f"+{form}")
    return text.lstrip("+-") if float(text) == 0 else text.replace("-", MINUS)


def plain(value: float) -> str:
    """Three digits, whatever the magnitude."""
    text = format(value, ".3g")
    whole = format(float(text), ".0f") if abs(value) >= 1000 and "e" in text and abs(value) < 1e6 else text
    return whole.replace("-", MINUS)


def interval(ends: Sequence[float], form: str = "+.1f") -> str:
    """Both ends, ``-23.4 to -12.9``."""
    lower, upper = (moved(end, form) for end in ends)
    return f"{lower} to {upper}"


def moved(value: float, form: str) -> str:
    """A change; with a sign where the form begins with one."""
    return signed(value, form[1:]) if form[0] == "+" else format(value, form)


def p_value(p: float) -> str:
    """A p value that never claims to be zero."""
    return "<0.001" if p < 0.001 else f"{p:.3f}"


def change(row: TaskComparison, value: float) -> str:
    """A change of a task, in points or on its metric's own scale."""
    return signed(value) if row.unit == "points" else signed(value, ".3g")


def change_interval(row: TaskComparison, ends: Sequence[float]) -> str:
    """Both ends of the same."""
    return " to ".join(change(row, end) for end in ends)


def score(row: TaskComparison, value: float) -> str:
    """A mean of a task's metric."""
    return f"{100 * value:.1f}" if row.unit == "points" else f"{value:.4g}"


def counted(count: int, what: str) -> str:
    """``1 task``, ``2 tasks``."""
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def counted_points(points: float) -> str:
    """``1 point``, ``0.5 points``."""
    return f"{points:g} point{'' if points == 1 else 's'}"


@contextlib.contextmanager
def reading(what: str) -> Iterator[None]:
    """Say which artifact it is that does not hold what it should."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, ZeroDivisionError) as error:
        problem = f"it lacks {error}" if isinstance(error, KeyError) else str(error)
        raise ArtifactError(
            f"{what} cannot be shown: {problem}", "was it edited by hand, or made by another version?"
        ) from error
