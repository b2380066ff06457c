"""Which experts are merged with which, and the plan that says so."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from moeprune.errors import ArtifactError, PlanError, StrategyError
from moeprune.plans import PruningPlan, RouterShape
from moeprune.plans_fuse import FuseLayer, FusePlan, Group, check_choices, check_groups, plan_kind
from moeprune.statistics import LayerStatistics
from moeprune.strategies.fusion import GROUPINGS, find_grouping, group_experts

E, H = 16, 6
NAMES = [*GROUPINGS, "hope-total", "frequency"]


def arrays_of(seed: int = 0, experts: int = E) -> dict[str, NDArray[Any]]:
    """What a layer's statistics could be: sums over random tokens, outputs and logits."""
    rng = np.random.default_rng(seed)
    logits_TE, outputs_EH = rng.normal(size=(200, experts)), rng.normal(size=(experts, H))
    chosen_TE = logits_TE >= np.sort(logits_TE, axis=1)[:, [-3]]
    count_E = chosen_TE.sum(axis=0)
    norms_E = rng.uniform(1, 2, experts)
    pair_EE = (chosen_TE.T.astype(int) @ chosen_TE).astype(float)
    return {
        "tokens": np.array(200),
        "count": count_E,
        "gated_norm_sum": count_E * norms_E,
        "gated_output_sum": outputs_EH * count_E[:, None],
        "output_sum_all": outputs_EH * 200,
        "logit_gram": logits_TE.T @ logits_TE,
        "pair_count": pair_EE,
        "pair_gated_norm": pair_EE * np.outer(norms_E, norms_E),
    }


def stats_of(arrays: dict[str, NDArray[Any]]) -> LayerStatistics:
    """Them as a grouping sees them."""
    return LayerStatistics(arrays, layer=3, num_experts=len(arrays["count"]))


def permuted(arrays: dict[str, NDArray[Any]], order: NDArray[Any]) -> dict[str, NDArray[Any]]:
    """The same layer with its experts numbered otherwise."""
    square = {"logit_gram", "pair_count", "pair_gated_norm"}
    return {
        name: array if not array.shape else array[np.ix_(order, order)] if name in square else array[order]
        for name, array in arrays.items()
    }


def sets(groups: tuple[Group, ...]) -> set[frozenset[int]]:
    """The members alone."""
    return {frozenset(group.members) for group in groups}


# --- all groupings ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@given(seed=st.integers(0, 50), keep=st.sampled_from([4, 8, 12, 16]), n_group=st.sampled_from([1, 2, 4]))
def test_groups_are_a_partition(name: str, seed: int, keep: int, n_group: int) -> None:
    """Every expert is in one group, of one router group, and shares add up; new numbers go up with dominant experts."""
    groups = group_experts(find_grouping(name), stats_of(arrays_of(seed)), keep, n_group=n_group)
    assert len(groups) == keep
    check_groups(3, groups, RouterShape(num_experts=E, top_k=3, n_group=n_group, topk_group=n_group))
    assert [group.dominant for group in groups] == sorted(group.dominant for group in groups)
    assert all(list(group.members[1:]) == sorted(group.members[1:]) for group in groups)
    blocks = [group.dominant // (E // n_group) for group in groups]
    assert [blocks.count(block) for block in range(n_group)] == [keep // n_group] * n_group


@pytest.mark.parametrize("name", NAMES)
def test_numbers_of_experts_mean_nothing(name: str) -> None:
    """Numbered otherwise, the same experts go together with the same shares."""
    arrays, order = arrays_of(5), np.random.default_rng(1).permutation(E)
    plain = group_experts(find_grouping(name), stats_of(arrays), 6)
    other = group_experts(find_grouping(name), stats_of(permuted(arrays, order)), 6)
    back = {frozenset(int(order[member]) for member in group.members): group for group in other}
    assert sets(plain) == set(back)
    for group in plain:
        twin = back[frozenset(group.members)]
        assert int(order[twin.dominant]) == group.dominant
        assert sorted(twin.weights) == pytest.approx(sorted(group.weights))


@pytest.mark.parametrize("name", NAMES)
def test_some_experts_stay_alone(name: str) -> None:
    """They are in groups of one, and the count is the same; where they are too many, that is said."""
    groups = group_experts(find_grouping(name), stats_of(arrays_of()), 6, alone={2, 9})
    assert {frozenset({2}), frozenset({9})} <= sets(groups)
    assert len(groups) == 6
    with pytest.raises(PlanError, match="5 experts stay alone and only 4 may be left"):
        group_experts(find_grouping(name), stats_of(arrays_of()), 4, alone={0, 1, 2, 3, 4})


def test_shares_are_frequencies() -> None:
    """Members count by their tokens, or alike; experts without any token count alike too."""
    arrays = arrays_of()
    for group in group_experts(GROUPINGS["m-smoe"], stats_of(arrays), 4):
        counts = arrays["count"][list(group.members)]
        assert group.weights == pytest.approx(counts / counts.sum())
    for group in group_experts(GROUPINGS["m-smoe"], stats_of(arrays), 4, equal=True):
        assert group.weights == pytest.approx([1 / len(group.members)] * len(group.members))
    idle = arrays | {"count": np.zeros(E, dtype=int)}
    assert all(len({*group.weights}) == 1 for group in group_experts(GROUPINGS["m-smoe"], stats_of(idle), 4))


def test_what_is_missing_is_named() -> None:
    """A statistic that the file lacks, and a grouping that there is not, are errors with a hint."""
    arrays = arrays_of()
    del arrays["output_sum_all"]
    with pytest.raises(StrategyError, match="no 'output_sum_all' for layer 3"):
        group_experts(GROUPINGS["hc-smoe"], stats_of(arrays), 4)
    with pytest.raises(StrategyError, match="unknown grouping 'hcsmoe'") as error:
        find_grouping("hcsmoe")
    assert "'hc-smoe'" in error.value.hint
    for name in ("maestro", "naee", "auto"):
        with pytest.raises(StrategyError, match="does not score one layer by a formula"):
            find_grouping(name)


# --- each of them -----------------------------------------------------------------------------------------------------


def test_hc_smoe_clusters_mean_outputs() -> None:
    """Experts whose mean outputs lie together go together, whatever their numbers; the most frequent one leads."""
    arrays, rng = arrays_of(), np.random.default_rng(0)
    centres_CH = 100 * rng.normal(size=(3, H))
    label_E = np.arange(E) % 3
    arrays["output_sum_all"] = 200 * (centres_CH[label_E] + rng.normal(size=(E, H)))
    groups = group_experts(GROUPINGS["hc-smoe"], stats_of(arrays), 3)
    assert sets(groups) == {frozenset(np.flatnonzero(label_E == label).tolist()) for label in range(3)}
    for group in groups:
        assert arrays["count"][group.dominant] == max(arrays["count"][list(group.members)])


def test_hc_smoe_links_by_the_average() -> None:
    """Of a chain and a pair, the average linkage merges what is nearest on the mean: a loop by hand agrees."""
    arrays = arrays_of(7)
    points = arrays["output_sum_all"] / 200
    clusters = [[expert] for expert in range(E)]
    while len(clusters) > 5:
        mean = {
            (a, b): np.mean([np.linalg.norm(points[x] - points[y]) for x in clusters[a] for y in clusters[b]])
            for a in range(len(clusters))
            for b in range(a)
        }
        first, second = min(mean, key=lambda pair: mean[pair])
        clusters[second] += clusters.pop(first)
    assert sets(group_experts(GROUPINGS["hc-smoe"], stats_of(arrays), 5)) == set(map(frozenset, clusters))


def test_m_smoe_joins_by_router_logits() -> None:
    """The most frequent experts lead; each of the others joins the one with the largest cosine of logits."""
    arrays = arrays_of(3)
    gram = arrays["logit_gram"]
    leaders = sorted(np.argsort(-arrays["count"], kind="stable")[:5].tolist())
    expected: dict[int, list[int]] = {leader: [leader] for leader in leaders}
    for expert in set(range(E)) - set(leaders):
        cosines = [gram[expert, leader] / np.sqrt(gram[expert, expert] * gram[leader, leader]) for leader in leaders]
        expected[leaders[int(np.argmax(cosines))]].append(expert)
    groups = group_experts(GROUPINGS["m-smoe"], stats_of(arrays), 5)
    assert [group.dominant for group in groups] == leaders
    assert sets(groups) == set(map(frozenset, expected.values()))


def test_a_strategy_names_the_dominant_experts() -> None:
    """By the name of a strategy, those that it keeps lead their groups, also where they are not the most frequent."""
    from moeprune.strategies import resolve
    from moeprune.strategies.selection import select

    arrays = arrays_of(4)
    arrays["gated_norm_sum"] = arrays["gated_norm_sum"][::-1].copy()
    stats = stats_of(arrays)
    groups = group_experts(find_grouping("reap"), stats, 6, n_group=2)
    assert tuple(group.dominant for group in groups) == select(resolve("reap")(stats), 6, n_group=2).keep
    assert any(group.merged and group.weights[0] < max(group.weights) for group in groups)
    groups = group_experts(find_grouping("hope-total"), stats, 6)
    assert tuple(group.dominant for group in groups) == select(resolve("hope-total")(stats), 6).keep


def test_co_activation_makes_equal_groups() -> None:
    """Experts that serve the same tokens go together; where the count does not divide, sizes differ by one."""
    arrays = arrays_of()
    pairs = np.ones((E, E))
    for first in range(0, E, 4):
        pairs[first : first + 4, first : first + 4] = 50 + first
    arrays["pair_count"] = pairs
    groups = group_experts(GROUPINGS["co-activation"], stats_of(arrays), 4)
    assert sets(groups) == {frozenset(range(first, first + 4)) for first in range(0, E, 4)}
    sizes = sorted(len(group.members) for group in group_experts(GROUPINGS["co-activation"], stats_of(arrays), 6))
    assert sizes == [2, 2, 3, 3, 3, 3]


def test_ream_fills_the_most_salient_groups_first() -> None:
    """The most salient expert takes its 15 nearest of those that are left, then the next one; others stay alone."""
    arrays = arrays_of(2, experts=40)
    groups = group_experts(GROUPINGS["ream"], stats_of(arrays), 20)
    assert sorted((len(group.members) for group in groups), reverse=True) == [16, 6] + [1] * 18
    saliency = arrays["gated_norm_sum"] / arrays["count"]
    leaders = np.argsort(-saliency, kind="stable")[:20].tolist()
    assert sorted(group.dominant for group in groups) == sorted(leaders)
    largest = max(groups, key=lambda group: len(group.members))
    assert largest.dominant == leaders[0]
    assert largest.weights == pytest.approx(saliency[list(largest.members)] / saliency[list(largest.members)].sum())

    def unit(rows: NDArray[Any]) -> NDArray[Any]:
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)

    means = unit(arrays["gated_output_sum"])
    norms = np.sqrt(np.diagonal(arrays["logit_gram"]))
    cosine = arrays["logit_gram"] / np.outer(norms, norms)
    alike = ((1 + means @ means.T) / 2 + 1 - np.sqrt(np.maximum(2 - 2 * cosine, 0)) / 2) / 2
    others = sorted(set(range(40)) - set(leaders), key=lambda expert: -alike[leaders[0], expert])
    assert set(largest.members) == {leaders[0], *others[:15]}


def test_ream_holds_everything() -> None:
    """Where groups of 16 would not hold all experts, they hold more."""
    groups = group_experts(GROUPINGS["ream"], stats_of(arrays_of(2, experts=64)), 2)
    assert sum(len(group.members) for group in groups) == 64


# --- the plan ---------------------------------------------------------------------------------------------------------


def group(*members: int) -> Group:
    """Members that count alike."""
    return Group(members=members, weights=(1 / len(members),) * len(members))


def plan_of(**changes: Any) -> FusePlan:
    """Four experts into two in two layers, and an MTP layer."""
    layers = {1: FuseLayer(groups=(group(0, 2), group(3, 1))), 2: FuseLayer(groups=(group(1), group(2, 0, 3)))}
    values: dict[str, Any] = {
        "layers": layers,
        "merge": "frequency",
        "align": True,
        "router": "keep-dominant",
        "mtp_layers": (3,),
        "command": {"stage": "fuse"},
        "inputs": {"model": "m"},
    }
    return FusePlan(**values | changes)


def test_a_plan_reads_back(tmp_path: Path) -> None:
    """Equal plans give equal bytes, and what reads drop plans finds the dominant experts."""
    plan = plan_of()
    loaded = FusePlan.load(plan.save(tmp_path / "plan.json"))
    assert loaded == plan
    assert loaded.to_dict() == plan.to_dict()
    assert plan_kind(tmp_path / "plan.json") == "fuse"
    seen = PruningPlan.load(tmp_path / "plan.json")
    assert (seen.kind, seen.kept, seen.layers[3].copied_from) == ("fuse", 2, 2)
    assert seen.layers[1].keep == seen.layers[1].keep == plan.layers[1].keep == (0, 3)
    assert plan.as_drop().layers == seen.layers
    assert plan.layers[2].new_numbers() == (1, 0, 1, 1)


def test_an_edited_plan_is_put_in_order(tmp_path: Path) -> None:
    """Groups may be written in any order; their dominant experts number them."""
    payload = plan_of().to_dict()
    for name in ("groups", "weights"):
        payload["layers"]["1"][name].reverse()
    (tmp_path / "plan.json").write_text(json.dumps(payload))
    assert FusePlan.load(tmp_path / "plan.json").layers == plan_of().layers


@pytest.mark.parametrize(
    ("place", "value", "says"),
    [
        (("kind",), "drop", "plan of kind 'drop', not 'fuse'"),
        (("layers", "1", "weights"), [[1.0]], "as many lists"),
        (("layers", "1", "groups"), [[0, "2"], [3, 1]], "lists of expert numbers"),
        (("layers", "1", "groups"), [[0, 2], []], "lists of expert numbers"),
        (("layers", "1", "weights"), [[1, None], [0.5, 0.5]], "lists of numbers"),
        (("layers", "1"), {"keep": [0, 3]}, "lacks 'groups'"),
        (("layers",), {"one": {}}, "'one' is no layer"),
        (("inputs",), 3, "not a usable plan"),
    ],
)
def test_damaged_plans_are_refused(place: tuple[str, ...], value: Any, says: str, tmp_path: Path) -> None:
    """Whatever cannot be a fuse plan is named, with its file."""
    payload = plan_of().to_dict()
    inner: Any = payload
    for name in place[:-1]:
        inner = inner[name]
    inner[place[-1]] = value
    (tmp_path / "plan.json").write_text(json.dumps(payload))
    with pytest.raises(ArtifactError, match=says):
        FusePlan.load(tmp_path / "plan.json")


SHAPE = RouterShape(num_experts=4, top_k=1, n_group=2, topk_group=2)


@pytest.mark.parametrize(
    ("groups", "says"),
    [
        ((group(0, 1), group(2)), "expert 3 is not in exactly one group"),
        ((group(0, 1), group(2, 3), group(1)), "expert 1 is not in exactly one group"),
        ((group(0, 1), group(2, 3, 4)), "expert 4 is not in exactly one group"),
        ((group(0, 2), group(3, 1)), "group of expert 0 has members of several router groups"),
        ((group(0, 1), Group(members=(2, 3), weights=(0.5, 0.6))), "group of expert 2 do not add up to 1"),
        ((group(0, 1), Group(members=(2, 3), weights=(1.5, -0.5))), "group of expert 2 do not add up to 1"),
        ((group(0, 1), Group(members=(2, 3), weights=(1.0,))), "group of expert 2 do not add up to 1"),
        ((group(0, 1), Group(members=(2, 3), weights=(float("nan"), 1.0))), "group of expert 2 do not add up to 1"),
    ],
)
def test_groups_that_cannot_be_merged(groups: tuple[Group, ...], says: str) -> None:
    """No partition of the experts, across router groups, or shares that are none."""
    with pytest.raises(PlanError, match=says):
        check_groups(1, groups, SHAPE)
    check_groups(1, (group(1, 0), group(2, 3)), SHAPE)


@pytest.mark.parametrize("name", ["merge", "router"])
def test_unknown_words_are_refused(name: str) -> None:
    """A way to merge, or a router, that there is not."""
    check_choices(plan_of())
    with pytest.raises(PlanError, match=f"{name} is 'magic'"):
        check_choices(dataclasses.replace(plan_of(), **{name: "magic"}))
