"""The report of skipping on a text: what is compared with what, and its faces."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from moeprune.evaluation.agreement import AgreementSums, perplexity_ratio
from moeprune.evaluation.evaluator import PlanScore
from moeprune.evaluation.skip_report import (
    Measured,
    SkipReport,
    render_skip_markdown,
    render_skip_table,
    report_of,
    write_skip_report,
)
from moeprune.evaluation.token_classes import CLASSES
from moeprune.plans_skip import Renorm, SkipLayer, SkipPlan

TOKENS = np.array([10, 0, 20, 15, 5, 30, 8])
LABELS = ("code", "code", "prose", "prose", "code", "prose", "chat")
TOP_K, NUMBER, FIRST = 4, CLASSES.index("number"), CLASSES.index("first piece")


def score_of(cost: float, seed: int = 0) -> PlanScore:
    """A way to skip that costs so many nats per token, differently on every document."""
    sums = AgreementSums(len(TOKENS))
    noise_N = np.random.default_rng(seed).normal(1, 0.1, len(TOKENS))
    sums.tokens = TOKENS
    sums.base_nll = TOKENS * np.linspace(2, 3, len(TOKENS))
    sums.nll = sums.base_nll + cost * noise_N * TOKENS
    sums.kl, sums.same = cost * noise_N * TOKENS, 0.5 * TOKENS
    return PlanScore.of(sums)


def tally_of(kept: float, *, classes: bool = True) -> Any:
    """Counts of two layers, the second of which keeps all: of chat, code and prose, 10, 20 and 30 tokens each."""
    cells = np.zeros((2, 3, len(CLASSES)), dtype=int)
    for domain, tokens in enumerate((10, 20, 30)):
        cells[0, domain, NUMBER] = cells[0, domain, FIRST] = tokens * TOP_K // 2
    cells[1] = cells[0]
    cells[1, :, NUMBER] = cells[0, :, NUMBER] * kept
    whole = cells.copy()
    whole[1] = whole[0]
    return SimpleNamespace(cells={3: cells, 5: whole}, has_classes=classes)


def measured(target: float, cost: float, kept: float, *, classes: bool = True) -> Measured:
    """A plan that costs less than slots drawn at random and more than the oracle."""
    plan = SkipPlan(
        policy="share",
        renorm=Renorm(),
        layers={3: SkipLayer(threshold=0.1, rate=0.24)},
        target=target,
        rate=target - 0.01,
        top_k=TOP_K,
        command={},
        inputs={},
    )
    costs = {"policy": cost, "random": 5 * cost, "oracle": cost / 2}
    return Measured(
        plan=plan,
        scores={name: score_of(value, seed) for seed, (name, value) in enumerate(costs.items())},
        tallies=dict.fromkeys(costs, tally_of(kept, classes=classes)),
    )


def report_with(*others: Measured, classes: bool = True, **about: Any) -> SkipReport:
    """A report of a plan at 12.5 %, and of others."""
    source = {"source": "held.jsonl", "sequences": 7, "sha256": 64 * "a"}
    facts: dict[str, Any] = {"base_model": "big", "command": {}, "inputs": {}, "text": (source,)}
    return report_of(measured(0.13, 0.1, 0.5, classes=classes), others, LABELS, **facts | about)


def test_rates_are_of_slots(tmp_path: Path) -> None:
    """Over both layers, by layer, by domain and by class of token; a layer that the plan leaves out is there too."""
    report = report_with()
    assert report.point.policy.rate == pytest.approx(0.125)
    assert {name: (one.calibrated, one.measured) for name, one in report.layers.items()} == {
        "3": (0.24, 0.25),
        "5": (0.0, 0.0),
    }
    assert [(name, one.documents, one.tokens) for name, one in report.domains.items()] == [
        ("chat", 1, 10),
        ("code", 2, 20),
        ("prose", 3, 30),
    ]
    assert {one.rate for one in report.domains.values()} == {0.125}
    assert {name: (one.tokens, one.rate) for name, one in report.classes.items()} == {
        "number": (30, 0.25),
        "first piece": (30, 0.0),
    }
    assert not report_with(classes=False).classes


def test_a_plan_is_paired_with_its_controls() -> None:
    """Perplexities are compared document by document, and domains of a single document are not."""
    report, scores = report_with(), measured(0.13, 0.1, 0.5).scores
    expected = perplexity_ratio(scores["random"].losses, scores["policy"].losses)
    assert (report.point.over_random.value, report.point.over_random.interval) == (expected.value, expected.interval)
    assert report.point.over_random.interval[1] < 1 < report.point.over_oracle.interval[0]
    assert report.domains["chat"].ratio is None
    assert report.domains["code"].ratio is not None
    assert report.domains["code"].ratio.value == pytest.approx(np.exp(0.1), rel=0.03)


def test_the_curve_is_in_order() -> None:
    """By the rate that was asked for, the plan itself among the others."""
    report = report_with(measured(0.5, 0.4, 0.1), measured(0.05, 0.01, 0.9))
    assert [point.target for point in report.curve] == [0.05, 0.5]
    page, table = render_skip_markdown(report), render_skip_table(report)
    for text, start in ((page, "| "), (table, "")):
        places = [text.index(f"\n{start}{asked} %") for asked in ("5.0", "13.0", "50.0")]
        assert places == sorted(places)


def test_the_faces_say_the_same(tmp_path: Path) -> None:
    """JSON has the schema and no NaN; page and table have the ratio, the controls, the classes and the warnings."""
    report = report_with(warnings=("mind | this",))
    write_skip_report(report, tmp_path)
    payload = json.loads((tmp_path / "skip.json").read_text())
    assert payload["schema"] == "moeprune.skip/1"
    assert payload["point"]["policy"]["rate"] == report.point.policy.rate
    page, table = (tmp_path / "skip.md").read_text(), render_skip_table(report)
    for value in (report.point.policy, report.point.random, report.point.oracle):
        assert f"{value.ratio.value:.3f}" in page
        assert f"{value.ratio.value:.3f}" in table
    assert "mind \\| this" in page
    assert "note: mind | this" in table
    assert "number 25.0 %" in table
    assert "| number | 30 | 25.0 |" in page
    assert "held.jsonl (7 sequences" in page
    assert max(map(len, table.splitlines())) <= 120


def test_tables_of_the_page_are_whole() -> None:
    """No line is missing between the head of a table and its rows, and all rows are as wide."""
    for report in (report_with(), report_with(measured(0.5, 0.4, 0.1), classes=False)):
        tables = [part.splitlines() for part in render_skip_markdown(report).split("\n\n") if part.startswith("|")]
        assert len(tables) == (4 if report.classes else 3)
        for rows in tables:
            assert len(rows) > 2
            assert set(rows[1]) <= set("|-:")
            assert len({row.count("|") for row in rows}) == 1
