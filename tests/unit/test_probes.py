"""Detectors on sequences made by hand, and rows against the paired statistics that they are made of."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeprune.evaluation.agreement import Agreement, Estimate, TokenLosses, perplexity, perplexity_ratio
from moeprune.evaluation.detectors import ends_in_loop, first_object, repetition, structured_prompts
from moeprune.evaluation.evaluator import PlanScore
from moeprune.evaluation.paired import bootstrap_interval, tango_interval
from moeprune.evaluation.probes import (
    ProbeReport,
    ProbeRow,
    generation_rows,
    ranked,
    render_probes_markdown,
    render_probes_table,
    share_row,
    structured_rows,
    text_rows,
)

FRESH = tuple(range(100, 196))  # no token twice


def row(**changes: object) -> ProbeRow:
    """A row that says nothing."""
    values: dict[str, object] = {"probe": "p", "group": "g", "what": "w", "unit": "%", "better": "lower", "n": 9}
    values |= {"base": 1.0, "pruned": 2.0, "change": 1.0, "interval": (-1.0, 3.0)}
    return ProbeRow(**(values | changes))  # type: ignore[arg-type]


# --- detectors --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("period", [1, 2, 7, 8, 31, 32])
def test_loops_of_every_period_are_found(period: int) -> None:
    """Three repeats and 24 tokens at the end are a loop, one token less or one that differs is none."""
    length = max(3 * period, 24)
    tail = tuple(position % period for position in range(length))
    assert ends_in_loop(FRESH + tail)
    assert ends_in_loop(tail)
    assert not ends_in_loop(FRESH[:50] + tail[1:])
    assert not ends_in_loop(FRESH + tail + (999,))
    assert not ends_in_loop((*tail[: length // 2], 999, *tail[length // 2 + 1 :]))


def test_what_is_no_loop() -> None:
    """Text without repeats, a loop that was left, periods of 33 tokens, and nothing at all."""
    for tokens in (FRESH, (1, 2) * 40 + FRESH[:9], tuple(range(33)) * 4, (), (5,) * 23):
        assert not ends_in_loop(tokens)


@given(st.lists(st.integers(0, 2), max_size=40))
def test_loops_by_brute_force(tokens: list[int]) -> None:
    """The detector agrees with writing out every possible loop."""

    def written(period: int) -> bool:
        length = max(3 * period, 24)
        start = tokens[len(tokens) - length : len(tokens) - length + period]
        return len(tokens) >= length and tokens[-length:] == (start * length)[:length]

    assert ends_in_loop(tokens) == any(written(period) for period in range(1, 33))


def test_repetition_is_one_minus_distinct_n() -> None:
    """Of ABCABC's bigrams AB BC CA AB BC two of five were there before; short texts repeat nothing."""
    assert repetition([1, 2, 3, 1, 2, 3], size=2) == pytest.approx(2 / 5)
    assert repetition([1] * 10) == pytest.approx(6 / 7)
    assert repetition(FRESH) == repetition([1, 1]) == repetition([]) == 0


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (' {"a": 1}\n\nText: more {', {"a": 1}),
        ('<think>x</think> {"a": {"b": [1, "}"]}} {"c": 2}', {"a": {"b": [1, "}"]}}),
        ('{"a": 1', None),
        ("{'a': 1}", None),
        ('{"a": 1,}', None),
        ("[1, 2]", None),
        ("", None),
        ("{" * 3000, None),
        ('{"a":' * 100_000, None),
    ],
)
def test_first_object(text: str, expected: object) -> None:
    """The first balanced object counts, whatever surrounds it; a broken one, a list or nothing does not."""
    assert first_object(text) == expected


def test_structured_prompts_ask_for_what_their_examples_show() -> None:
    """Four schemas of eight texts, none of them an example; every example passes the test of its own prompt."""
    prompts = structured_prompts()
    assert len(prompts) == len({prompt.text for prompt in prompts}) == 32
    assert len({prompt.keys for prompt in prompts}) == 4
    for prompt in prompts:
        assert prompt.text.endswith("\nJSON:")
        assert all(key in prompt.text.partition("\n")[0] for key in prompt.keys)
        shots = [line.removeprefix("JSON:") for line in prompt.text.splitlines() if line.startswith("JSON: ")]
        assert len(shots) == 3
        assert all(prompt.parses(shot) and prompt.has_keys(shot) for shot in shots)
        asked = prompt.text.rpartition("Text: ")[2].partition("\n")[0]
        assert prompt.text.count(asked) == 1
        assert not prompt.has_keys("{}")


# --- rows of generation -----------------------------------------------------------------------------------------------


def test_loops_are_paired_by_prompt() -> None:
    """Two prompts loop in the pruned model only, one in the base only; one that came to an end is in no loop."""
    loop, fine = ((7,) * 40, False), (FRESH, False)
    base = [loop, fine, fine, fine, fine, ((7,) * 40, True)]
    pruned = [fine, loop, loop, fine, fine, ((7,) * 40, True)]
    loops, repeats = generation_rows("greedy", base, pruned)
    assert (loops.n, loops.base, loops.pruned) == (6, pytest.approx(100 / 6), pytest.approx(200 / 6))
    assert loops.interval == pytest.approx([100 * end for end in tango_interval(1, 2, 6)])
    assert loops.change == pytest.approx(100 / 6)
    changes = np.array([repetition(two) - repetition(one) for (one, _), (two, _) in zip(base, pruned, strict=True)])
    high = repetition((7,) * 40)
    assert repeats.change == pytest.approx(100 * changes.mean())
    assert repeats.interval == pytest.approx([100 * end for end in bootstrap_interval(changes, high)])


def test_repetition_gets_the_bootstrap_where_there_is_enough() -> None:
    """Thirty different changes give the BCa interval."""
    rng = np.random.default_rng(0)
    base, pruned = ([(tuple(rng.integers(0, 3, 40).tolist()), False) for _ in range(30)] for _ in range(2))
    _, repeats = generation_rows("sampled", base, pruned)
    changes = np.array([repetition(two) - repetition(one) for (one, _), (two, _) in zip(base, pruned, strict=True)])
    assert repeats.interval == pytest.approx([100 * end for end in bootstrap_interval(changes, 1.0)])
    assert repeats.interval[0] < repeats.change < repeats.interval[1]


def test_equal_answers_change_nothing() -> None:
    """Rows of a model beside itself are zeros, with intervals that still say how little few prompts show."""
    same = [((7,) * 40, False), (FRESH, False)]
    for each in generation_rows("greedy", same, same):
        assert each.change == 0
        assert each.reading == "no change shown"
        assert each.interval[0] < 0 < each.interval[1]


def test_broken_json_is_worse_and_none_says_nothing() -> None:
    """Fewer answers that parse are worse; where the base gives none, its row says so and nothing is concluded."""
    prompts = structured_prompts()
    good = [json.dumps(dict.fromkeys(prompt.keys)) for prompt in prompts]
    parses, keyed = structured_rows(prompts, good, ["{}"] * 16 + good[16:])
    assert (parses.base, parses.pruned, parses.reading) == (100, 100, "no change shown")
    assert (keyed.base, keyed.pruned, keyed.change, keyed.reading) == (100, 50, -50, "worse")
    assert keyed.interval == pytest.approx([100 * end for end in tango_interval(16, 0, 32)])
    for each in structured_rows(prompts, ["no"] * 32, good):
        assert (each.n, each.base, each.pruned, each.reading, each.note) == (32, 0, 100, "", "base gives none")


def test_the_direction_that_is_better_decides_the_reading() -> None:
    """More of what is bad is worse, more of what is good is better, and a ratio is measured against 1."""
    up, down = ([False] * 20, [True] * 20), ([True] * 20, [False] * 20)
    about = {"probe": "p", "group": "g", "what": "w"}
    readings = [share_row(better, *pair, **about).reading for better in ("lower", "higher") for pair in (up, down)]
    assert readings == ["worse", "better", "better", "worse"]
    ratios = [(1.1, 1.2), (0.8, 0.9), (0.9, 1.1)]
    assert [row(unit="x", interval=ends).reading for ends in ratios] == ["worse", "better", "no change shown"]


# --- rows of text -----------------------------------------------------------------------------------------------------


def score_of(base: Sequence[float], pruned: Sequence[float]) -> PlanScore:
    """A score on documents of ten tokens with these losses."""
    tokens = np.full(len(base), 10)
    one, two = TokenLosses(np.array(base), tokens), TokenLosses(np.array(pruned), tokens)
    kl = Estimate(value=0.2, interval=(-0.1, 0.5))
    return PlanScore(
        perplexity=perplexity(two),
        perplexity_ratio=perplexity_ratio(one, two),
        agreement=Agreement(kl=kl, top1=Estimate(value=0.9, interval=(0.8, 1.1)), tokens=10 * len(base)),
        losses=two,
        base_losses=one,
        kl=np.zeros(len(base)),
        same=np.zeros(len(base)),
    )


def test_domains_and_languages_have_rows_of_their_own() -> None:
    """Each with its ratio, its documents and whether it was calibrated; one document is no interval and no row."""
    score = score_of([20, 21, 22, 23, 24], [30, 31, 29, 23, 24])
    domains, languages = ["code", "code", "code", "logs", "one"], ["", "de", "de", "", ""]
    found = {each.probe: each for each in text_rows(score, domains, languages, {"code", "one"})}
    assert found.keys() == {"perplexity (code)", "perplexity (de)", "KL", "top-1 agreement"}
    code = found["perplexity (code)"]
    parts = [TokenLosses(side.nll[:3], side.tokens[:3]) for side in (score.base_losses, score.losses)]
    assert (code.n, code.calibrated, code.reading) == (3, True, "worse")
    assert (code.base, code.pruned) == tuple(perplexity(part).value for part in parts)
    assert (code.change, code.interval) == (perplexity_ratio(*parts).value, perplexity_ratio(*parts).interval)
    assert (found["perplexity (de)"].n, found["perplexity (de)"].group) == (2, "language")
    assert found["KL"].interval == (0.0, 0.5)
    assert found["top-1 agreement"].interval == pytest.approx((-20, 0))
    known = [each.calibrated for each in text_rows(score, ["a"] * 2 + ["b"] * 3, languages, {"a"})]
    assert known[:2] == [True, False]
    assert next(text_rows(score, domains, languages, None)).calibrated is None


# --- the report -------------------------------------------------------------------------------------------------------


def test_worst_rows_come_first_in_their_group() -> None:
    """Sorted by how much worse, whichever direction is; groups and units stay together."""
    rows = [
        row(probe="a", change=1.0),
        row(probe="b", change=5.0, better="higher"),
        row(probe="c", group="h", unit="x", change=1.1),
        row(probe="d", change=2.0),
        row(probe="e", group="h", unit="x", change=1.2),
        row(probe="f", change=-7.0, better="higher"),
    ]
    assert [each.probe for each in ranked(rows)] == ["f", "d", "a", "b", "e", "c"]


def test_the_faces_say_the_same() -> None:
    """JSON by the contract, a table within 110 columns, a page with a table per group and safe cells."""
    rows = (row(probe="loops (x|y)"), row(probe="perplexity (a)", group="domain", unit="x", calibrated=False))
    text = [{"source": "t.jsonl", "sequences": 3, "sha256": "0123456789abcdef"}]
    report = ProbeReport(base_model="b", pruned_model="p", rows=rows, text=text, warnings=("take care",))
    payload = json.loads(report.to_json())
    assert payload["schema"] == "moeprune.probes/1"
    assert payload["rows"][0].keys() == {field.name for field in dataclasses.fields(ProbeRow)} | {"reading"}
    assert payload["rows"][1]["calibrated"] is False
    lines = render_probes_table(report).splitlines()
    assert lines[0] == "note: take care"
    assert max(map(len, lines[1:4])) <= 110
    assert lines[3].split()[-4:] == ["no", "no", "change", "shown"]
    page = render_probes_markdown(report)
    assert "## G\n" in page
    assert "## Domain\n" in page
    assert "| loops (x\\|y) | 9 |" in page
    assert "- **Note:** take care" in page
