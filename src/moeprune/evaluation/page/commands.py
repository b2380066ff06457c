"""The commands that make the same again, in the order in which to run them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from moeprune._commands import command_line, source_words
from moeprune.accounts import HEAL, account_of
from moeprune.evaluation.page.formats import reading
from moeprune.evaluation.page.sources import ReportSources

MODEL, PRUNED = "MODEL", "PRUNED"  # where the two models lie, which no artifact records
_STATISTICS, _PLAN = "statistics.safetensors", "plan.json"
_DATA, _HEALED = "DATA", "HEALED"


def command_lines(sources: ReportSources) -> list[str]:
    """Command lines for every artifact that records its options."""
    with reading("the recorded commands"):
        return [*_pruning(sources), *_changing(sources), *_measuring(sources)]


def _pruning(sources: ReportSources) -> Iterator[str]:
    statistics, plan = sources.statistics, sources.plan
    if statistics is not None and statistics.command.get("stage") == "collect":
        yield command_line(statistics.command, MODEL, *source_words(statistics.provenance), "-o", _STATISTICS)
    if plan is not None and plan.command.get("stage") == "plan":
        yield command_line(plan.command, _STATISTICS, MODEL, "-o", _PLAN)
        yield command_line({}, MODEL, _PLAN, "-o", PRUNED, name="apply")


def _changing(sources: ReportSources) -> Iterator[str]:
    """What computes, from its data or from the statistics that were collected of it."""
    change, healing = sources.change, sources.healing
    if change is not None:
        data = _data(sources, change.inputs)
        yield command_line(change.command, MODEL, *data, "-o", PRUNED, name=account_of(change).kind)
    if healing is not None:
        yield command_line(healing["command"], MODEL, PRUNED, "--calibration", _DATA, "-o", _HEALED, name=HEAL)


def _data(sources: ReportSources, inputs: Mapping[str, Any]) -> tuple[str, ...]:
    if sources.statistics is not None:
        return "--statistics-file", _STATISTICS
    return ("--calibration", _DATA) if "calibration" in inputs else ()


def _measuring(sources: ReportSources) -> Iterator[str]:
    command, evaluated = sources.report.command if sources.report else {}, _HEALED if sources.healing else PRUNED
    if "tasks" in command:
        yield command_line(command, MODEL, evaluated, "-o", "report", name="eval")
    elif command:
        yield command_line(command, "BASE_RUN", "PRUNED_RUN", "-o", "report", name="compare")
    if sources.text is not None:
        given = source_words(sources.text["text"], "--text")
        yield command_line(sources.text["command"], MODEL, _PLAN, *given, "-o", "text", name="eval")
