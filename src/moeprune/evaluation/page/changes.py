"""What was done to the model other than leaving experts out: the words and tables of a page, ready to be set."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from moeprune._files import human_bytes
from moeprune.accounts import Account, history, percent
from moeprune.evaluation.compare import EvalReport
from moeprune.evaluation.page.cost import estimate
from moeprune.evaluation.page.formats import reading
from moeprune.evaluation.page.parts import Table
from moeprune.evaluation.page.sources import Json, ReportSources


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """The section on one thing that was done."""

    title: str
    summary: str
    lines: tuple[tuple[str, str], ...]
    table: Table
    notes: tuple[str, ...]


def accounts_of(sources: ReportSources) -> tuple[Account, ...]:
    """What was done, in its order."""
    with reading("the record of healing"):
        return history(sources.change, sources.healing)


def changes_of(sources: ReportSources) -> tuple[Change, ...]:
    """The sections, in the order in which things were done."""
    return tuple(
        Change(
            title=account.doing.capitalize(),
            summary=account.summary[0].upper() + account.summary[1:],
            lines=(*account.lines.items(), ("weights", account.weights), ("loads in", account.loads)),
            table=Table(head=account.head, rows=tuple(account.rows)),
            notes=tuple(account.notes),
        )
        for account in accounts_of(sources)
    )


def gained_of(sources: ReportSources) -> Iterator[str]:
    """What was won by it, in short lines."""
    for account in accounts_of(sources):
        yield account.summary
    if sources.skip:
        with reading("the cost of skipping"):
            yield f"{percent(sources.skip['point']['policy']['rate'])} of the slots were skipped on held-out text"
    stored = (sources.provenance or {}).get("bytes", {})
    if sources.change and stored and stored["before"] != stored["after"]:
        yield f"checkpoint: {human_bytes(stored['before'])} → {human_bytes(stored['after'])}"


# --- what skipping costs on text --------------------------------------------------------------------------------------


def skip_table(skip: Json) -> Table:
    """What skipping costs on text, the smallest rate first."""
    with reading("the cost of skipping"):
        points = sorted([skip["point"], *skip["curve"]], key=lambda point: float(point["target"]))
        size = f"{skip['documents']:,} documents, {skip['tokens']:,} predicted tokens"
        layers = ", ".join(f"{layer}: {percent(rate['measured'])}" for layer, rate in skip["layers"].items())
        domains = ", ".join(f"{name}: {percent(found['rate'])}" for name, found in skip["domains"].items())
        notes = (
            f"Base perplexity {estimate(skip['perplexity'], '.3f')}; {size}.",
            "Random and oracle are controls that skip as many slots in every layer: drawn, or those that add least.",
            f"Skipped by layer: {layers}.",
            f"Skipped by domain: {domains}.",
            *map(str, skip.get("warnings", ())),
        )
        return Table(head=_SKIP_HEAD, rows=tuple(map(_skip_row, points)), notes=notes)


def skipped_by_task(report: EvalReport) -> str:
    """What the models skipped on each task, base first where it has gates too; empty where none has."""
    return ", ".join(f"{row.task} {row.skipped} %" for row in report.tasks if row.skipped)


_SKIP_HEAD = (
    "asked",
    "skipped, measured",
    "perplexity, times the base's",
    "KL, nats per token",
    "same first token, %",
    "random instead",
    "oracle instead",
)


def _skip_row(point: Mapping[str, Any]) -> tuple[str, ...]:
    own = point["policy"]
    return (
        percent(point["target"]),
        percent(own["rate"]),
        estimate(own["ratio"], ".3f"),
        estimate(own["kl"], ".3f"),
        estimate(own["top1"], ".1f", 100),
        *(estimate(point[control]["ratio"], ".3f") for control in ("random", "oracle")),
    )
