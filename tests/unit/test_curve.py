"""The largest ratio inside a margin, and the sentence that says why there is none."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping

import pytest

from moeprune.evaluation.agreement import Estimate
from moeprune.evaluation.compare import SuiteComparison, TaskComparison
from moeprune.evaluation.curve import (
    SweepPoint,
    SweepReport,
    documents_needed,
    render_sweep_markdown,
    render_sweep_table,
)
from moeprune.evaluation.paired import GAIN, INCONCLUSIVE, LOSS, NO_MATERIAL_LOSS, SMALL_LOSS, tango_interval

TEXT = {
    name: Estimate(value=value, interval=(value, value)) for name, value in (("perplexity_ratio", 1.1), ("kl", 0.2))
}
TEXT["top1"] = Estimate(value=0.9, interval=(0.8, 0.95))


def task(name: str, verdict: str, change: float = 0.0) -> TaskComparison:
    """A task of a hundred questions that has this verdict."""
    return TaskComparison(
        task=name,
        metric="acc",
        filter="none",
        version="1",
        n=100,
        n_full=100,
        n_shot=0,
        base=0.5,
        pruned=0.5 + change / 100,
        unit="points",
        change=change,
        interval=(change - 1, change + 1),
        ni_lower=change - 0.8,
        lost=2,
        gained=2,
        flips=4.0,
        answers_changed=5,
        p=1.0,
        p_adjusted=1.0,
        mde=1.0,
        verdict=verdict,
    )


def point(ratio: str, verdicts: Mapping[str, str], suite: str = "", strategy: str = "reap") -> SweepPoint:
    """A point whose tasks have these verdicts."""
    rows = tuple(task(name, verdict, -2.0 if verdict == LOSS else 0.0) for name, verdict in verdicts.items())
    mean = {"tasks": len(rows), "base": 0.5, "pruned": 0.5, "change": 0.0, "interval": (-1.0, 1.0), "ni_lower": -0.8}
    return SweepPoint(
        ratio=ratio,
        strategy=strategy,
        plan=f"plan-{ratio}.json",
        kept=24.0,
        nbytes=75,
        base_bytes=100,
        tasks=rows,
        suite=SuiteComparison(**mean, verdict=suite) if suite else None,  # type: ignore[arg-type]
        text=TEXT,
    )


def report(*points: SweepPoint, margin: float = 1.0) -> SweepReport:
    """A sweep of these points."""
    return SweepReport(base_model="m", num_experts=32, margin=margin, points=points)


FINE = {"a": NO_MATERIAL_LOSS, "b": SMALL_LOSS, "c": GAIN}


@pytest.mark.parametrize(
    ("points", "expected"),
    [
        ([point("0.1", FINE, NO_MATERIAL_LOSS), point("0.2", FINE, GAIN)], "0.2"),
        ([point("0.1", FINE, NO_MATERIAL_LOSS), point("0.2", FINE | {"b": LOSS}, NO_MATERIAL_LOSS)], "0.1"),
        ([point("0.1", FINE, NO_MATERIAL_LOSS), point("0.2", FINE, INCONCLUSIVE)], "0.1"),
        ([point("0.1", FINE | {"b": INCONCLUSIVE}, GAIN), point("0.2", FINE, GAIN)], None),
        ([point("0.1", {"a": LOSS}), point("0.2", {"a": GAIN})], None),
        ([point("0.1", {"a": GAIN}), point("0.2", {"a": LOSS}), point("0.3", {"a": GAIN})], "0.1"),
        ([point("0.1", {})], None),
    ],
)
def test_every_smaller_ratio_must_hold_too(points: list[SweepPoint], expected: str | None) -> None:
    """A ratio counts when it and all smaller ones have every task and the mean inside the margin."""
    found = report(*points)
    assert found.largest_within_margin == expected
    assert json.loads(found.to_json())["largest_within_margin"] == expected


def test_strategies_are_judged_by_their_own_points() -> None:
    """The largest over strategies is by number, not by text."""
    points = [point("0.05", FINE, GAIN), point("0.5", FINE, LOSS), point("0.05", FINE, GAIN, "hope")]
    found = report(*points, point("0.125", FINE, GAIN, "hope"))
    assert (found.largest("reap"), found.largest("hope"), found.largest_within_margin) == ("0.05", "0.125", "0.125")
    assert [sentence.partition(":")[0] for sentence in found.summary()] == ["reap", "hope"]
    lines = render_sweep_table(found).splitlines()
    assert [line.split()[:2] for line in lines[:2]] == [["ratio", "strategy"], ["0.05", "reap"]]
    assert "\n| hope 0.125 | 0.0 (-1.0..+1.0) |" in render_sweep_markdown(found)


def test_why_there_is_none() -> None:
    """A loss that is shown, too few documents, an uncertain mean, and no tasks are told apart."""
    [lost] = report(point("0.1", {"a": INCONCLUSIVE, "b": LOSS}, INCONCLUSIVE)).summary()
    assert "at 0.1, a loss is shown in b, -2.0 (-3.0..-1.0) pt" in lost
    [few] = report(point("0.1", {"a": GAIN, "b": INCONCLUSIVE}, GAIN)).summary()
    assert "1 of 2 tasks have too few documents to tell (b: 0.0 (-1.0..+1.0) pt with 100; about 2,474 each" in few
    assert few.endswith("the mean of the tasks alone stays within it up to 0.1")
    [mean] = report(point("0.1", FINE, INCONCLUSIVE)).summary()
    assert "at 0.1, the mean of the tasks is too uncertain to tell" in mean
    [lost_mean] = report(point("0.1", FINE, LOSS)).summary()
    assert "a loss is shown in the mean of the tasks" in lost_mean
    [nothing] = report(point("0.1", {})).summary()
    assert nothing == "no task was evaluated, so nothing is said of a margin: add --eval"
    [found] = report(point("0.1", FINE, GAIN), point("0.2", {"a": LOSS}, LOSS)).summary()
    assert "stays within 1 pt: 0.1, for each of the 3 tasks and their mean; at 0.2, a loss is shown in a" in found


def test_documents_that_are_needed_are_enough() -> None:
    """Without flips that many make the interval lie inside the margin, one less does not; no margin, no number."""
    needed = documents_needed(0.0, 0.01)
    assert needed is not None
    assert tango_interval(0, 0, needed, 0.9)[0] > -0.01
    assert tango_interval(0, 0, needed - 1, 0.9)[0] < -0.01
    flips = documents_needed(0.1, 0.01)
    assert flips == math.ceil((1.644854 + 0.841621) ** 2 * 0.1 / 0.01**2)
    assert documents_needed(0.1, 0.0) is None


def test_the_faces_say_the_same() -> None:
    """Columns without content are left out of the table; the page has a row per point and a column per task."""
    found = report(point("0.125", FINE, GAIN), point("0.25", FINE | {"b": LOSS}, LOSS))
    lines = render_sweep_table(found).splitlines()
    assert " ".join(lines[0].split()) == "ratio kept size of base worst task mean change ppl x KL top-1 verdict"
    assert lines[1].split()[:5] == ["0.125", "24/32", "75", "B", "75"]
    assert "within margin" in lines[1]
    assert max(map(len, lines[:3])) <= 110
    page = render_sweep_markdown(found)
    assert "\n| ratio | a | b | c | mean |\n|---|--:|--:|--:|--:|\n| 0.125 | 0.0 (-1.0..+1.0) |" in page
    assert page.count("\n| 0.25 |") == 2
    bare = report(point("0.125", {}))
    assert "worst task" not in render_sweep_table(bare)
    payload = json.loads(found.to_json())
    assert payload["points"][0]["text"]["kl"] == {"value": 0.2, "interval": [0.2, 0.2]}
    assert {"task", "base", "pruned", "change", "interval", "verdict"} <= payload["points"][0]["tasks"][0].keys()
    assert (payload["points"][0]["kept"], payload["points"][0]["bytes"], payload["points"][0]["base_bytes"]) == (
        24,
        75,
        100,
    )
