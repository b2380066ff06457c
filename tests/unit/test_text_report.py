"""The report of plans on a text: what is compared with what, and its three faces."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moeprune.evaluation.agreement import AgreementSums, perplexity_ratio
from moeprune.evaluation.evaluator import PlanScore
from moeprune.evaluation.text import TextReport, render_text_markdown, render_text_table, write_text_report

TOKENS = np.array([10, 0, 20, 15, 5, 30, 8])
LABELS = ("code", "code", "prose", "prose", "code", "prose", "chat")


def score_of(cost: float, seed: int = 0) -> PlanScore:
    """A plan that costs so many nats per token, more of them on prose, and differently on every document."""
    sums = AgreementSums(len(TOKENS))
    noise_N = np.random.default_rng(seed).normal(1, 0.1, len(TOKENS))
    sums.tokens = TOKENS
    sums.base_nll = TOKENS * np.linspace(2, 3, len(TOKENS))
    dear_N = np.array([2 if label == "prose" else 1 for label in LABELS])
    sums.nll = sums.base_nll + cost * dear_N * noise_N * TOKENS
    sums.kl, sums.same = cost * noise_N * TOKENS, 0.5 * TOKENS
    return PlanScore.of(sums)


def report_of(scores: dict[str, PlanScore], labels: tuple[str, ...] = LABELS, **about: Any) -> TextReport:
    """A report with nothing special about it."""
    facts: dict[str, Any] = {"base_model": "big", "num_experts": 16, "command": {}, "inputs": {}}
    source = {"source": "held.jsonl", "sequences": 7, "sha256": 64 * "a"}
    return TextReport.of(scores, dict.fromkeys(scores, 8), labels, **facts, text=(source,), **about)


@pytest.fixture
def report() -> TextReport:
    """A bad plan before two that are hard to tell apart."""
    return report_of({"bad": score_of(0.5), "good": score_of(0.1, 2), "near": score_of(0.1, 1)})


def test_every_plan_is_compared_with_every_better_one(report: TextReport) -> None:
    """Paired by document, the best first; the order of the plans is the one given."""
    bad, good, near = report.plans
    assert (report.best, good.over, list(near.over), list(bad.over)) == ("good", {}, ["good"], ["good", "near"])
    scores = [score_of(0.1, 2), score_of(0.5)]
    expected = perplexity_ratio(*(score.losses for score in scores))
    assert (bad.over["good"].value, bad.over["good"].interval) == (expected.value, expected.interval)
    assert bad.over["good"].interval[0] > 1
    assert near.over["good"].interval[0] < 1 < near.over["good"].interval[1]


def test_domains_have_a_ratio_where_an_interval_can_be_had(report: TextReport) -> None:
    """Documents without a predicted token do not count, a domain of a single document is counted and not compared."""
    assert {name: (extent.documents, extent.tokens) for name, extent in report.domains.items()} == {
        "chat": (1, 8),
        "code": (2, 15),
        "prose": (3, 65),
    }
    assert (report.extent.documents, report.extent.tokens) == (6, 88)
    score, [bad, *_] = score_of(0.5), report.plans
    assert bad.domains.keys() == {"code", "prose"}
    prose_N = np.array(LABELS) == "prose"
    base, plan = (type(part)(part.nll[prose_N], part.tokens[prose_N]) for part in (score.base_losses, score.losses))
    assert bad.domains["prose"].interval == perplexity_ratio(base, plan).interval
    assert bad.worst_domain == "prose"


def test_a_single_domain_is_not_the_worst_of_several() -> None:
    """Without labels there is no such column and no such table."""
    report = report_of({"only": score_of(0.5)}, labels=("default",) * 7)
    assert (report.plans[0].worst_domain, list(report.plans[0].domains)) == ("", ["default"])
    assert "domain" not in render_text_table(report)
    page = render_text_markdown(report)
    assert "domain" not in page
    assert "better than another" not in page


def test_files_are_the_report(report: TextReport, tmp_path: Path) -> None:
    """The JSON file holds every number, the page is the Markdown one."""
    write_text_report(report, tmp_path / "out")
    found = json.loads((tmp_path / "out" / "text.json").read_text())
    assert found == json.loads(json.dumps(report.payload()))
    assert found["plans"][0]["kl"]["interval"] == list(report.plans[0].kl.interval)
    assert (tmp_path / "out" / "text.md").read_text() == render_text_markdown(report)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["text.json", "text.md"]


def test_the_page_has_a_full_row_for_every_plan(report: TextReport) -> None:
    """Every table is rectangular, and each number has its interval."""
    tables = [block.splitlines() for block in render_text_markdown(report).split("\n\n") if block.startswith("|")]
    assert [len(table) for table in tables] == [5, 6, 4]
    assert all(len({line.count("|") for line in table}) == 1 for table in tables)
    [row] = [line for line in tables[0] if line.startswith("| bad |")]
    assert row.count("..") == 4
    assert [line.split("|")[1].strip() for line in tables[0][2:]] == ["good", "near", "bad"]
    assert "held.jsonl (7 sequences, sha256 aaaaaaaaaaaa)" in render_text_markdown(report)


def test_names_cannot_break_the_tables() -> None:
    """Bars and markup in the names of plans, domains and models stay text; long ones are cut in the terminal."""
    labels = tuple(label.replace("code", "co|de") for label in LABELS)
    long = "a_plan_with_quite_a_long_name_" * 4
    report = report_of({"a|b<i>": score_of(0.1), long: score_of(0.2)}, labels, warnings=("x | y",))
    page = render_text_markdown(report)
    for text in ("a\\|b&lt;i>", "co\\|de", "x \\| y"):
        assert text in page
    lines = render_text_table(report).splitlines()
    assert lines[0] == "note: x | y"
    assert max(map(len, lines)) <= 110
    assert len({line.find("8/16") for line in lines if "8/16" in line}) == 1
    wide = report_of({long: score_of(0.1)}, tuple(label * 20 for label in LABELS))
    assert "\na_plan_wi...  " in render_text_table(wide)


@pytest.mark.parametrize(
    ("cost", "shown"),
    [(0.0, "0.000"), (1e-5, "1.04e-05"), (0.05, "0.0519"), (9.0, "9.3")],
)
def test_numbers_have_the_digits_that_matter(cost: float, shown: str) -> None:
    """A tiny divergence is no zero, and a ruined model's perplexity has no decimals."""
    line = render_text_table(report_of({"plan": score_of(cost)})).splitlines()[2]
    assert any(word.startswith(shown) for word in line.split()), line
    assert ("e+" in line) == (cost == 9.0)
