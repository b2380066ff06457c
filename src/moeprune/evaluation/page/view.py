"""Everything that the page's template sets, in one frozen value: it computes nothing itself."""

from __future__ import annotations

from dataclasses import dataclass

from moeprune.evaluation.compare import EvalReport
from moeprune.evaluation.page.changes import Change, accounts_of, changes_of, gained_of, skip_table, skipped_by_task
from moeprune.evaluation.page.commands import MODEL, PRUNED, command_lines
from moeprune.evaluation.page.cost import (
    VERDICTS,
    ProbeLine,
    Tasks,
    Verdict,
    probe_lines,
    tasks_of,
    text_table,
    verdict,
)
from moeprune.evaluation.page.decisions import Decision, decision_of, won_of
from moeprune.evaluation.page.formats import counted_points, reading
from moeprune.evaluation.page.parts import Table
from moeprune.evaluation.page.ratios import Sweep, sweep_of
from moeprune.evaluation.page.seen import Calibration, calibration_of
from moeprune.evaluation.page.sources import ReportSources, model_of
from moeprune.evaluation.report import banner


@dataclass(frozen=True, slots=True, kw_only=True)
class Page:
    """What the page says; a section without its source is None."""

    doing: str
    title: str
    banner: str
    warnings: tuple[str, ...]
    report: EvalReport | None
    tasks: Tasks | None
    legend: tuple[Verdict, ...]
    allowed: str
    skipped: str
    won: tuple[str, ...]
    text: Table | None
    skip: Table | None
    probes: tuple[ProbeLine, ...] | None
    probe_warnings: tuple[str, ...]
    sweep: Sweep | None
    decision: Decision | None
    changes: tuple[Change, ...]
    calibration: Calibration | None
    commands: tuple[str, ...]
    places: tuple[str, str]
    facts: tuple[tuple[str, str], ...]
    digests: tuple[tuple[str, str], ...]


def view_of(sources: ReportSources) -> Page:
    """The page of some artifacts.

    Raises:
        ArtifactError: one of them holds values that cannot be shown.
    """
    report = sources.report
    with reading("the plan or the statistics"):
        won, decision, calibration = won_of(sources), decision_of(sources), calibration_of(sources)
    return Page(
        doing=_doing(sources),
        title=_title(sources),
        banner=banner(report) if report and report.partial else "",
        warnings=(*(report.warnings if report else ()), *_unbound(sources)),
        report=report,
        tasks=tasks_of(report) if report and report.tasks else None,
        legend=tuple(verdict(name) for name in VERDICTS),
        allowed=counted_points(report.margin) if report else "",
        skipped=skipped_by_task(report) if report else "",
        won=(*won, *gained_of(sources)),
        text=text_table(sources.text) if sources.text else None,
        skip=skip_table(sources.skip) if sources.skip else None,
        probes=probe_lines(sources.probes) if sources.probes else None,
        probe_warnings=tuple(map(str, (sources.probes or {}).get("warnings", ()))),
        sweep=sweep_of(sources.sweep) if sources.sweep else None,
        decision=decision,
        changes=changes_of(sources),
        calibration=calibration,
        commands=tuple(command_lines(sources)),
        places=(MODEL, PRUNED),
        facts=tuple(_facts(sources).items()),
        digests=tuple(sorted(sources.digests.items())),
    )


def _doing(sources: ReportSources) -> str:
    """What it is whose cost is shown."""
    done = [*(["pruning"] if sources.plan else []), *(account.doing for account in accounts_of(sources))]
    return " and ".join(done) or "pruning"


def _title(sources: ReportSources) -> str:
    if sources.report is not None:
        return f"{sources.report.pruned_model} against {sources.report.base_model}"
    architecture = (sources.provenance or {}).get("architecture") or "a model"
    if sources.plan is not None:
        return f"{architecture} with {sources.plan.span} experts per layer"
    if accounts := accounts_of(sources):
        return f"{architecture}, {' and '.join(account.done for account in accounts)}"
    named = ((source or {}).get("base_model") for source in (sources.text, sources.sweep))
    return next((str(name) for name in named if name), "a model")


def _unbound(sources: ReportSources) -> tuple[str, ...]:
    """A comparison of other tools' runs does not say which model its samples came from."""
    others = (sources.plan, sources.change, sources.healing, sources.statistics)
    if sources.report is None or model_of(sources.report) or others == (None,) * len(others):
        return ()
    return ("the compared runs do not record which model made them: nothing proves that the plan shown here is theirs",)


def _facts(sources: ReportSources) -> dict[str, str]:
    """What a reader needs to repeat or to doubt the result."""
    report, plan = sources.report, sources.plan or sources.change
    facts: dict[str, str] = {}
    for name, value in (("base model", model_of(plan) if plan else ""), ("calibration data", _calibration(sources))):
        if value:
            facts[f"fingerprint of the {name}"] = value
    if report is not None:
        what = "model" if model_of(report) else "run"
        facts |= {f"fingerprint of the {name} {what}": value for name, value in report.inputs.items()}
        facts |= {name.replace("_", " "): str(value) for name, value in report.settings.items()}
        facts["versions of the tasks"] = ", ".join(f"{row.task} {row.version}" for row in report.tasks)
    if sources.provenance is not None:
        facts["made by"] = f"moeprune {sources.provenance.get('moeprune_version', '')}"
    return facts


def _calibration(sources: ReportSources) -> str:
    plan = sources.plan or sources.change
    return str(plan.inputs.get("calibration", "")) if plan else ""
