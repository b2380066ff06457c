"""``moeprune eval --probes``: what accuracy does not show, as a table."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moeprune import _cli_output as out

if TYPE_CHECKING:
    from moeprune.evaluation.compare import EvalReport
    from moeprune.evaluation.probes import ProbeReport


def run_probes(base: str, pruned: str, options: Mapping[str, Any]) -> ProbeReport:
    """Probe two models with the options of `eval --text`, of which single documents leave no use for packing."""
    from moeprune.probing import evaluate_probes

    return evaluate_probes(base, pruned, **{name: value for name, value in options.items() if name != "pack"})


def print_probes(found: ProbeReport, report: EvalReport | None, output: Path, *, as_json: bool) -> None:
    """One row per probe; after the tasks, where there are some, which add rows of their own."""
    from moeprune.evaluation.probes import render_probes_table
    from moeprune.probing import add_tasks

    if report is not None:
        found = add_tasks(found, report, output)
    if as_json:
        out.print_json({"report": report.payload(), "probes": found.payload()} if report else found.payload())
        return
    if report is not None:
        out.print_report(report, output, as_json=False)
        out.show("")
    out.show(f"{render_probes_table(found)}probes: {output / 'probes.md'}")
