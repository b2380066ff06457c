"""What an evaluation would ask, for a look before it runs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moeprune._cli_output import print_json, show

if TYPE_CHECKING:
    from moeprune.evaluation.tasks import TaskOutlook

_FLIPS = 0.1  # of the answers, a usual share; the report has what it really was
_HEAD = ("task", "n", "shots", "metric", "tokens of an answer", "detectable")


def print_outlook(tasks: Sequence[TaskOutlook], output: Path, *, as_json: bool) -> None:
    """Tasks, documents, examples, metrics and limits; and the change that so many documents would show."""
    from moeprune.evaluation.report import aligned

    if as_json:
        rows: list[dict[str, Any]] = [asdict(task) | {"detectable": _detectable(task)} for task in tasks]
        print_json({"output": str(output), "written": False, "tasks": rows})
        return
    cells = [_cells(task) for task in tasks]
    show("\n".join(aligned([_HEAD, *cells])))
    show(f"detectable: change in points seen with 80 % power if {100 * _FLIPS:.0f} % of the answers flip")
    show(f"dry run: nothing was written to {output}")


def _cells(task: TaskOutlook) -> tuple[str, ...]:
    asked = f"{task.n}" if task.n == task.n_full else f"{task.n} of {task.n_full}"
    limit = "" if task.max_gen_toks is None else f"{task.max_gen_toks:,}"
    return (task.task, asked, str(task.n_shot), task.metric, limit, f"{_detectable(task):.1f}")


def _detectable(task: TaskOutlook) -> float:
    """Points, for a metric that is 0 or 1 on each document."""
    from moeprune.evaluation.paired import detectable_change

    return 100 * detectable_change(math.sqrt(_FLIPS), task.n)
