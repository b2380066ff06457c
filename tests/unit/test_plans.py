"""Budgets in exact arithmetic, and the plan file that people edit."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeprune.errors import ArtifactError, ConfigError, PlanError
from moeprune.plans import Budget, LayerPlan, PruningPlan, RouterShape, check_keep


def shape(num_experts: int, top_k: int = 1, n_group: int = 1, topk_group: int = 1) -> RouterShape:
    """A router's numbers."""
    return RouterShape(num_experts=num_experts, top_k=top_k, n_group=n_group, topk_group=topk_group)


SHAPES = st.builds(
    lambda groups, per_group, top_k, used: shape(groups * per_group, top_k, groups, min(used, groups)),
    st.integers(1, 8),
    st.integers(1, 32),
    st.integers(1, 12),
    st.integers(1, 8),
)


# --- budgets --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ratio", "router", "kept"),
    [
        ("0.5", shape(128, 8), 64),
        ("0.3", shape(10), 7),  # 0.3 is a little less than three tenths in binary
        ("0.1", shape(30), 27),
        ("0.57", shape(100), 43),  # 0.57 * 100 is 56.99999999999999 in binary
        ("0.29", shape(100), 71),
        ("0.33", shape(12), 9),
        ("1/3", shape(12), 8),
        ("2e-1", shape(10), 8),
        (" 0.25 ", shape(8), 6),
        ("0.5", shape(16, 3, 4, 2), 8),
        ("0.3", shape(16, 3, 4, 2), 12),
        ("0.49", shape(256, 8, 8, 4), 136),
        ("0.5", shape(7), 4),
    ],
)
def test_a_ratio_is_the_exact_fraction_removed(ratio: str, router: RouterShape, kept: int) -> None:
    """Whole experts, the same number in every group, rounded towards removing less."""
    assert Budget(ratio=ratio).kept(router) == kept


@settings(deadline=None)
@given(st.fractions(0, 1, max_denominator=1000), SHAPES)
def test_a_ratio_removes_the_most_that_it_allows(ratio: Fraction, router: RouterShape) -> None:
    """Removed is at most ratio x E, one more step would be above it, and what stays is a router that works."""
    try:
        kept = Budget(ratio=str(ratio)).kept(router)
    except ConfigError as error:
        assert error.hint  # noqa: PT017 - most ratios of small routers are refused
        return
    removed = router.num_experts - kept
    assert removed % router.n_group == 0
    assert 0 < removed <= ratio * router.num_experts < removed + router.n_group
    assert router.problem(kept) == ""


@pytest.mark.parametrize(
    ("budget", "router", "why", "hint"),
    [
        (Budget(), shape(8), "exactly one of --ratio and --keep", ""),
        (Budget(ratio="0.5", keep=4), shape(8), "exactly one of --ratio and --keep", ""),
        (Budget(ratio="0"), shape(8), "must lie between 0 and 1, not 0", "REMOVED"),
        (Budget(ratio="1"), shape(8), "must lie between 0 and 1, not 1", "REMOVED"),
        (Budget(ratio="-0.5"), shape(8), "must lie between 0 and 1", "REMOVED"),
        (Budget(ratio="50"), shape(8), "must lie between 0 and 1", "REMOVED"),
        (Budget(ratio="half"), shape(8), "must be a number, not 'half'", ""),
        (Budget(ratio="nan"), shape(8), "must be a number", ""),
        (Budget(ratio="1/0"), shape(8), "must be a number", ""),
        (Budget(ratio="0.1"), shape(8), "removes no expert", "one of 8"),
        (Budget(ratio="0.1"), shape(16, 1, 4, 2), "removes no expert", "one in each of 4 groups"),
        (Budget(ratio="0.9"), shape(8, 2), "could reach 1 experts, fewer than its top-2", "from 2 to 7 experts"),
        (Budget(keep=8), shape(8), "8 kept of 8 removes nothing", "from 1 to 7 experts"),
        (Budget(keep=9), shape(8), "9 kept of 8 removes nothing", "from 1 to 7"),
        (Budget(keep=0), shape(8), "nothing would be left", "from 1 to 7"),
        (Budget(keep=-1), shape(8), "nothing would be left", "from 1 to 7"),
        (Budget(keep=6), shape(16, 2, 4, 2), "6 experts do not divide over 4 groups", "from 8 to 12 .* in steps of 4"),
        (Budget(keep=4), shape(16, 2, 4, 2), "1 expert per group is fewer than the 2", "from 8 to 12"),
        (Budget(keep=8), shape(16, 5, 4, 2), "could reach 4 experts, fewer than its top-5", "from 12 to 12"),
        (Budget(keep=8), shape(16, 8, 4, 2), "could reach 4 experts", "cannot lose any expert"),
        (Budget(keep=4, round_to=0), shape(8), "--round-to must be at least 1", ""),
        (Budget(keep=5, round_to=8), shape(8), "8 kept of 8 removes nothing", "from 1 to 7"),
    ],
)
def test_a_budget_that_cannot_work_says_what_could(budget: Budget, router: RouterShape, why: str, hint: str) -> None:
    """The number, the reason, and the counts that would do."""
    with pytest.raises(ConfigError, match=why) as caught:
        budget.kept(router)
    assert re.search(hint, caught.value.hint)


@pytest.mark.parametrize(
    ("budget", "kept"),
    [(Budget(ratio="0.3", round_to=8), 72), (Budget(keep=65, round_to=16), 80), (Budget(keep=64, round_to=64), 64)],
)
def test_rounding_goes_up_to_the_next_multiple(budget: Budget, kept: int) -> None:
    """More experts stay than asked for, never fewer."""
    assert budget.kept(shape(100 if budget.ratio else 128)) == kept


@settings(deadline=None)
@given(SHAPES)
def test_the_smallest_count_works_and_no_smaller_one_does(router: RouterShape) -> None:
    """What the hint offers is true at both ends."""
    smallest = router.smallest()
    works = [kept for kept in range(1, router.num_experts) if not router.problem(kept)]
    assert smallest == (works[0] if works else router.num_experts)
    assert works == list(range(smallest, router.num_experts, router.n_group))


# --- keep-lists -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keep", "router"),
    [
        ([0, 3], shape(4, 2)),
        ([0, 1, 2, 3], shape(4, 2)),  # nothing removed is the identity
        ([0, 1, 4, 7], shape(8, 2, 2, 1)),
    ],
)
def test_keep_lists_that_work(keep: list[int], router: RouterShape) -> None:
    """Any experts, as long as the groups stay equal."""
    check_keep(0, keep, router)


@pytest.mark.parametrize(
    ("keep", "router", "why"),
    [
        ([], shape(4), "must name experts 0 to 3"),
        ([1, 0], shape(4), "ascending and without repeats"),
        ([1, 1], shape(4), "ascending and without repeats"),
        ([-1, 2], shape(4), "must name experts 0 to 3"),
        ([1, 4], shape(4), "must name experts 0 to 3"),
        ([1], shape(4, 2), "could reach 1 experts, fewer than its top-2"),
        ([0, 1, 2, 4], shape(8, 2, 2, 1), r"groups keep \[3, 1\] experts"),
        ([0, 4], shape(8, 1, 2, 1), "1 expert per group is fewer than the 2"),
        ([0, 1, 4, 5], shape(8, 3, 2, 1), "could reach 2 experts, fewer than its top-3"),
    ],
)
def test_keep_lists_that_no_engine_could_run(keep: list[int], router: RouterShape, why: str) -> None:
    """The layer and the reason are named."""
    with pytest.raises(PlanError, match=f"layer 7: .*{why}"):
        check_keep(7, keep, router)


# --- the file -------------------------------------------------------------------------------------------------------


def plan() -> PruningPlan:
    """A plan with every field filled in."""
    return PruningPlan(
        layers={
            3: LayerPlan(keep=(0, 2), scores=(0.5, 0.25, 1 / 3, -2e-9)),
            1: LayerPlan(keep=(1, 3), scores=(1.0, 2.0, 3.0, 4.0)),
            4: LayerPlan(keep=(0, 2), copied_from=3),
        },
        config_edits={"num_experts": 2},
        command={"stage": "plan", "strategy": "reap", "ratio": "0.5"},
        inputs={"model": "abc", "calibration": "def"},
        budget={"kept": 2, "of": 4},
        strategy={"name": "reap", "protected": {"3": [0]}},
        size={"bytes": {"before": 10, "after": 6}},
        coverage={"prose": 0.75},
        engines={"vllm": ["too odd"], "transformers": []},
        notes=["a note", "zwölf"],
    )


def test_a_plan_reads_back_as_it_was_written(tmp_path: Path) -> None:
    """Every field survives; scores to six digits, so a second writing gives the same bytes."""
    made = plan()
    loaded = PruningPlan.load(made.save(tmp_path / "plan.json"))
    assert loaded.to_dict() == made.to_dict()
    assert loaded.layers[3].keep == (0, 2)
    assert loaded.layers[3].scores == (0.5, 0.25, 0.333333, -2e-9)
    assert (loaded.layers[4].scores, loaded.layers[4].copied_from, loaded.kept) == (None, 3, 2)
    assert loaded.save(tmp_path / "again.json").read_bytes() == (tmp_path / "plan.json").read_bytes()


def test_a_plan_file_is_for_people(tmp_path: Path) -> None:
    """The envelope comes first, layers in order, one line for each keep-list."""
    text = plan().save(tmp_path / "plan.json").read_text()
    assert list(json.loads(text))[:4] == ["schema", "moeprune_version", "command", "inputs"]
    assert list(json.loads(text)["layers"]) == ["1", "3", "4"]
    assert '      "keep": [0, 2],\n' in text
    assert "zwölf" in text


def test_a_plan_may_be_edited_and_cut_down_by_hand(tmp_path: Path) -> None:
    """Another keep-list is read as it stands; what is only for people may go, and unknown keys are ignored."""
    payload = plan().to_dict()
    payload["layers"]["3"] = {"keep": [1, 2], "why": "looked at it"}
    for name in ("budget", "strategy", "size", "coverage", "engines", "notes", "kind"):
        del payload[name]
    (tmp_path / "plan.json").write_text(json.dumps(payload | {"comment": "mine"}))
    loaded = PruningPlan.load(tmp_path / "plan.json")
    assert loaded.layers[3] == LayerPlan(keep=(1, 2))
    assert (loaded.kind, loaded.engines) == ("drop", {})


Payload = dict[str, Any]


def put(*path: str, value: Any) -> Callable[[Payload], None]:
    """An edit of one value."""

    def edit(payload: Payload) -> None:
        for key in path[:-1]:
            payload = payload[key]
        payload[path[-1]] = value

    return edit


@pytest.mark.parametrize(
    ("edit", "why"),
    [
        (put("layers", "3", "keep", value="0,2"), "layer 3: keep must be a list of expert numbers"),
        (put("layers", "3", "keep", value=[0, "2"]), "layer 3: keep must be a list of expert numbers"),
        (put("layers", "3", "keep", value=[0, 2.0]), "layer 3: keep must be"),
        (put("layers", "3", "keep", value=[False, True]), "layer 3: keep must be"),
        (put("layers", "3", value={}), "layer 3: keep must be"),
        (put("layers", "3", value=[0, 2]), "layer 3: keep must be"),
        (put("layers", "3", value=None), "layer 3: keep must be"),
        (put("layers", "3", "scores", value="high"), "layer 3: scores must be a list of numbers"),
        (put("layers", "3", "scores", value=[1, None]), "layer 3: scores must be a list of numbers"),
        (put("layers", "3", "scores", value=[10**400]), "too large"),
        (put("layers", "4", "copied_from", value="3"), "layer 4: copied_from must be"),
        (put("layers", "three", value={"keep": [0, 2]}), "'three' is no layer"),
        (put("layers", "03", value={"keep": [0, 2]}), "'03' is no layer"),
        (put("layers", "-1", value={"keep": [0, 2]}), "'-1' is no layer"),
        (put("layers", value=[[0, 2]]), "layers must be an object"),
        (lambda payload: payload.pop("layers"), "it lacks 'layers'"),
        (lambda payload: payload.pop("inputs"), "it lacks 'inputs'"),
        (lambda payload: payload.pop("command"), "it lacks 'command'"),
        (put("inputs", value=[]), "inputs must be an object"),
        (put("command", value="plan"), "command must be an object"),
        (put("engines", "vllm", value=1), "engines must hold lists of reasons"),
        (put("notes", value="none"), "notes must be a list"),
        (put("kind", value=1), "kind must be a str"),
        (put("schema", value="moeprune.plan/2"), "is not a moeprune.plan/1 file: its schema is 'moeprune.plan/2'"),
        (lambda payload: payload.pop("schema"), "it has no schema"),
    ],
)
def test_a_plan_edited_wrongly_is_one_line(tmp_path: Path, edit: Callable[[Payload], None], why: str) -> None:
    """The file, the layer and what it should hold; never a traceback later, in the middle of a rewrite."""
    payload = json.loads(json.dumps(plan().to_dict()))
    edit(payload)
    (tmp_path / "plan.json").write_text(json.dumps(payload))
    with pytest.raises(ArtifactError, match=rf"plan\.json .*{why}"):
        PruningPlan.load(tmp_path / "plan.json")


@pytest.mark.parametrize(
    ("old", "new", "why"),
    [
        ('"keep": [0, 2],', '"keep": [NaN],', "non-finite number NaN"),
        ("0.333333", "1e999", "non-finite number 1e999"),
        ('"3": {', '"1": {', "'1' is there twice"),
        ('"keep": [0, 2],', '"keep": [0, 2], "keep": [0, 1],', "'keep' is there twice"),
        ("}", "", "is not valid JSON"),
    ],
)
def test_a_plan_that_is_no_json_any_more_is_refused(tmp_path: Path, old: str, new: str, why: str) -> None:
    """Slips of the keyboard, and a layer that is there twice, of which the last would win unseen."""
    path = plan().save(tmp_path / "plan.json")
    text = path.read_text()
    path.write_text(text.replace(old, new, 1))
    assert path.read_text() != text
    with pytest.raises(ArtifactError, match=rf"plan\.json.*{why}"):
        PruningPlan.load(path)
