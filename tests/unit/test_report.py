"""The report's three faces: JSON, Markdown, terminal table."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from moeprune.evaluation.compare import EvalReport, SuiteComparison, TaskComparison
from moeprune.evaluation.paired import INCONCLUSIVE, LOSS, SMALL_LOSS
from moeprune.evaluation.report import render_markdown, render_table, write_report


def row(task: str, **changes: Any) -> TaskComparison:
    """A task's result with nothing special about it."""
    values: dict[str, Any] = {
        "task": task,
        "metric": "acc",
        "filter": "none",
        "version": "1.0",
        "n": 200,
        "n_full": 200,
        "n_shot": 0,
        "base": 0.5,
        "pruned": 0.375,
        "unit": "points",
        "change": -12.5,
        "interval": (-18.0, -7.1),
        "ni_lower": -17.1,
        "lost": 30,
        "gained": 5,
        "flips": 17.5,
        "answers_changed": 40,
        "p": 0.00002,
        "p_adjusted": 0.00004,
        "mde": 8.3,
        "verdict": LOSS,
    }
    return TaskComparison(**(values | changes))


@pytest.fixture
def report() -> EvalReport:
    """Two tasks, their mean, and settings."""
    quiet = {"change": -0.01, "p_adjusted": 0.4, "verdict": INCONCLUSIVE, "answers_changed": None}
    suite = SuiteComparison(
        tasks=2, base=0.5, pruned=0.4, change=-6.2, interval=(-9.0, -3.4), ni_lower=-8.6, verdict=LOSS
    )
    return EvalReport(
        base_model="big",
        pruned_model="small",
        margin=1.0,
        alpha=0.05,
        limit=None,
        tasks=(row("reading"), row("writing", **quiet)),
        suite=suite,
        settings={"batch_size": 16, "fewshot_seed": 1234, "lm_eval_version": "0.4.13"},
        warnings=("the runs differ in batch_size",),
    )


def test_files_are_written_and_read_back(report: EvalReport, tmp_path: Path) -> None:
    """Both files appear, and the JSON one is the report."""
    write_report(report, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.json", "report.md"]
    assert EvalReport.from_json((tmp_path / "report.json").read_text()) == report
    assert (tmp_path / "report.md").read_text() == render_markdown(report)


def test_markdown_has_one_row_per_task_and_the_settings(report: EvalReport) -> None:
    """The page shows numbers, intervals, verdicts, margin, seeds and versions."""
    text = render_markdown(report)
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert len(table) == 2 + 2 + 1
    assert len({line.count("|") for line in table}) == 1
    assert (
        "| reading | 0 | acc (none) | 200 | 50.0 | 37.5 | -12.5 | -18.0..-7.1 | 30 | 5 | 17.5 | 40 | <0.001 |" in text
    )
    assert "| writing | 0 | acc (none) | 200 | 50.0 | 37.5 | 0.0 |" in text
    for fact in ("Margin 1 points", "level 0.05", "fewshot_seed 1234", "lm_eval_version 0.4.13", "batch_size"):
        assert fact in text
    assert "NOT the full benchmark" not in text


def test_limited_run_carries_a_banner(report: EvalReport) -> None:
    """A partial run cannot be mistaken for the benchmark in any of its faces."""
    limited = dataclasses.replace(report, limit=200, tasks=(row("reading", n_full=5000),), suite=None)
    for text in (render_markdown(limited), render_table(limited)):
        assert "NOT the full benchmark: reading 200 of 5000" in text


def test_names_cannot_break_the_table(report: EvalReport) -> None:
    """Bars, markup and line breaks in a name stay text in one cell."""
    nasty = dataclasses.replace(report, tasks=(row("a|b<script>\n*c*"),), base_model="x|y", suite=None)
    text = render_markdown(nasty)
    assert "a\\|b&lt;script> \\*c\\*" in text
    assert "<script>" not in text


def test_terminal_table_is_aligned_and_narrow(report: EvalReport) -> None:
    """Every line fits 110 columns, columns line up, and the legend closes the table."""
    wide = {"n": 14042, "verdict": SMALL_LOSS, "interval": (-100.0, 100.0)}
    long = row("a_task_with_quite_a_long_name_indeed_" * 3, **wide)
    text = render_table(dataclasses.replace(report, tasks=(long, *report.tasks), limit=5))
    lines = text.splitlines()
    assert max(map(len, lines)) <= 110
    table = [line for line in lines if not line.startswith(("note", "lost/gained"))]
    assert len({line.find("verdict") for line in table if "verdict" in line}) == 1
    assert lines[-1].startswith("lost/gained:")
    assert any(line.startswith("mean of 2 tasks") for line in table)


def test_raw_metrics_are_not_percentages(report: EvalReport) -> None:
    """A metric on its own scale is shown as it is."""
    raw = dataclasses.replace(report, tasks=(row("t", unit="raw", base=41.25, pruned=39.5),), suite=None)
    assert " 41.25 " in render_table(raw)
    assert "| 41.25 | 39.5 |" in render_markdown(raw)
