"""From scores or drop costs to the experts that stay."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from moeprune.errors import PlanError, StrategyError
from moeprune.strategies import selection
from moeprune.strategies.selection import select

Cost = NDArray[np.float64]


def total(cost: Cost, dropped: list[int]) -> float:
    """What dropping a set costs."""
    return float(cost[np.ix_(dropped, dropped)].sum())


def complement(keep: tuple[int, ...], num_experts: int) -> list[int]:
    """The experts that do not stay."""
    return sorted(set(range(num_experts)) - set(keep))


def cheapest(cost: Cost, keep: int, n_group: int = 1) -> float:
    """The least cost over every allowed set, by trying them all."""
    size = len(cost) // n_group
    blocks = [range(group * size, (group + 1) * size) for group in range(n_group)]
    choices = [itertools.combinations(block, size - keep // n_group) for block in blocks]
    return min(total(cost, list(itertools.chain(*parts))) for parts in itertools.product(*choices))


def gram_matrix(rng: np.random.Generator, num_experts: int) -> Cost:
    """Inner products of random vectors: positive semidefinite, with negative entries."""
    vectors = rng.normal(size=(num_experts, 4)) * rng.uniform(0.2, 2, (num_experts, 1))
    return np.asarray(vectors @ vectors.T)


def norm_matrix(rng: np.random.Generator, num_experts: int) -> Cost:
    """Pair sums of norms over random routing: no negative entry, not always semidefinite once divided."""
    norms = rng.uniform(0.1, 3, (40, num_experts)) * (rng.random((40, num_experts)) < 0.3)
    shared = (norms > 0).astype(float).T @ (norms > 0)
    return np.asarray(norms.T @ norms / np.maximum(shared, 1))


# --- scores ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scores", "keep", "n_group", "protected", "expected"),
    [
        ([0.1, 0.9, 0.5, 0.7], 2, 1, set(), (1, 3)),
        ([0.5, 0.5, 0.5, 0.5], 2, 1, set(), (0, 1)),
        ([1.0, 2.0, 1.0, 2.0, 1.0], 3, 1, set(), (0, 1, 3)),
        ([-3.0, -1.0, -2.0], 1, 1, set(), (1,)),
        ([9.0, 8.0, 7.0, 1.0, 2.0, 3.0], 4, 2, set(), (0, 1, 4, 5)),
        ([0.1, 0.9, 0.5, 0.7], 2, 1, {0}, (0, 1)),
        ([0.1, 0.9, 0.5, 0.7], 2, 1, {0, 2}, (0, 2)),
        ([0.0, -0.0, 0.0], 1, 1, set(), (0,)),
        ([0.3, 0.2], 2, 1, set(), (0, 1)),
    ],
)
def test_the_best_of_each_group_stay(
    scores: list[float], keep: int, n_group: int, protected: set[int], expected: tuple[int, ...]
) -> None:
    """Highest scores, ties by index, protected experts first, the same number in every block."""
    chosen = select(np.array(scores), keep, n_group=n_group, protected=protected)
    assert chosen.keep == expected
    assert chosen.scores == tuple(scores)


@settings(deadline=None)
@given(st.data(), st.integers(1, 4), st.integers(1, 6))
def test_no_dropped_expert_is_better_than_a_kept_one(data: st.DataObject, n_group: int, size: int) -> None:
    """Whatever the scores, with many ties: exact counts, protected stay, order by score and then by index."""
    num_experts = n_group * size
    scores = data.draw(st.lists(st.sampled_from([-1.0, 0.0, 0.5, 2.0]), min_size=num_experts, max_size=num_experts))
    per_group = data.draw(st.integers(1, size))
    blocks = [range(group * size, (group + 1) * size) for group in range(n_group)]
    protected = {
        expert for block in blocks for expert in data.draw(st.sets(st.sampled_from(block), max_size=per_group))
    }
    keep = select(np.array(scores), per_group * n_group, n_group=n_group, protected=protected).keep
    assert keep == tuple(sorted(keep))
    assert protected <= set(keep)
    for block in blocks:
        kept = [(-scores[e], e) for e in block if e in keep and e not in protected]
        dropped = [(-scores[e], e) for e in block if e not in keep]
        assert len([e for e in block if e in keep]) == per_group
        assert not kept or not dropped or max(kept) < min(dropped)


# --- drop costs -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [gram_matrix, norm_matrix])
@pytest.mark.parametrize(("num_experts", "keep", "n_group"), [(8, 4, 1), (9, 3, 1), (10, 8, 1), (8, 4, 2), (9, 6, 3)])
def test_the_search_finds_the_cheapest_set_nearly_always(make, num_experts: int, keep: int, n_group: int) -> None:  # type: ignore[no-untyped-def]
    """Against every subset of 60 random matrices: mostly the least cost, rarely a few per cent above it."""
    rng = np.random.default_rng(num_experts * keep + n_group)
    excess = []
    for _ in range(60):
        cost = make(rng, num_experts)
        chosen = select(cost, keep, n_group=n_group).keep
        least = cheapest(cost, keep, n_group)
        excess.append((total(cost, complement(chosen, num_experts)) - least) / np.abs(cost).sum())
    assert min(excess) > -1e-12
    assert np.mean(np.array(excess) < 1e-9) >= 0.8
    assert max(excess) < 0.05


@pytest.mark.parametrize("make", [gram_matrix, norm_matrix])
def test_the_search_is_never_worse_than_greedy_or_one_exchange(make) -> None:  # type: ignore[no-untyped-def]
    """On matrices too large for trying everything: better than both greedy starts, and no single swap helps."""
    rng = np.random.default_rng(0)
    groups, locked = np.arange(32) // 8, np.zeros(32, dtype=bool)
    for _ in range(10):
        cost = make(rng, 32)
        dropped = complement(select(cost, 16, n_group=4).keep, 32)
        found = total(cost, dropped)
        for greedy in (selection._grow, selection._shrink):
            assert found <= total(cost, np.flatnonzero(greedy(cost, 4, groups, locked)).tolist()) + 1e-9
        for back, away in itertools.product(dropped, complement(tuple(dropped), 32)):
            if groups[back] == groups[away]:
                assert found <= total(cost, [*(e for e in dropped if e != back), away]) + 1e-9


@pytest.mark.parametrize("make", [gram_matrix, norm_matrix])
def test_both_starts_take_the_cheapest_step_each_time(make) -> None:  # type: ignore[no-untyped-def]
    """Adding from nothing and taking back from everything, against the costs of whole sets."""
    groups, locked = np.arange(12) // 4, np.isin(np.arange(12), [0, 5])
    free = [expert for expert in range(12) if not locked[expert]]
    for seed in range(5):
        cost = make(np.random.default_rng(seed), 12)
        grown: list[int] = []
        while len(grown) < 6:
            room = [e for e in free if e not in grown and sum(groups[d] == groups[e] for d in grown) < 2]
            grown.append(min(room, key=lambda e: total(cost, [*grown, e])))
        shrunk = list(free)
        while len(shrunk) > 6:
            crowded = [e for e in shrunk if sum(groups[d] == groups[e] for d in shrunk) > 2]
            shrunk.remove(min(crowded, key=lambda e: total(cost, [d for d in shrunk if d != e])))
        assert np.flatnonzero(selection._grow(cost, 2, groups, locked)).tolist() == sorted(grown)
        assert np.flatnonzero(selection._shrink(cost, 2, groups, locked)).tolist() == shrunk


def test_independent_experts_go_by_their_own_cost() -> None:
    """With a diagonal matrix the search is a sort."""
    cost = np.diag([5.0, 1.0, 4.0, 2.0, 3.0, 9.0])
    assert select(cost, 3).keep == (0, 2, 5)
    assert select(cost, 2, n_group=2).keep == (0, 5)


def test_experts_that_cancel_are_dropped_together() -> None:
    """Each of the first two is the largest, and dropping both changes nothing."""
    vectors = np.array([[10.0, 0], [-10.0, 0], [0, 1.0], [1.0, 1.0]])
    chosen = select(vectors @ vectors.T, 2)
    assert chosen.keep == (2, 3)


def test_experts_that_replace_each_other_are_not_dropped_together() -> None:
    """Two that always agree cost four times one of them: one stays."""
    vectors = np.array([[1.0, 0], [1.0, 0], [0, 1.3], [0, 0.1]])
    assert select(vectors @ vectors.T, 2).keep == (0, 2)


def test_equal_costs_keep_the_lowest_index() -> None:
    """Nothing measured at all is the extreme case: the last experts of each group go."""
    assert select(np.zeros((6, 6)), 2).keep == (0, 1)
    assert select(np.zeros((6, 6)), 4, n_group=2).keep == (0, 1, 3, 4)
    assert select(np.ones((5, 5)) + np.eye(5), 3).keep == (0, 1, 2)


def test_only_the_symmetric_part_counts() -> None:
    """Costs of a pair may be given in either half of the matrix."""
    rng = np.random.default_rng(3)
    cost = gram_matrix(rng, 7)
    assert select(np.triu(cost, 1) * 2 + np.diag(np.diag(cost)), 4) == select(cost, 4)


@pytest.mark.parametrize("protected", [set(), {0}, {1, 5}, {0, 1, 2, 3}])
def test_protected_experts_are_never_dropped(protected: set[int]) -> None:
    """Although each of the lowest six costs nothing."""
    cost = np.diag([0.0] * 6 + [7.0, 8.0])
    chosen = select(cost, 4, protected=protected)
    assert protected <= set(chosen.keep)
    assert len(chosen.keep) == 4
    if len(protected) < 3:
        assert {6, 7} <= set(chosen.keep)


def test_the_score_of_an_expert_is_what_dropping_it_adds() -> None:
    """Given all others that are dropped: what people read in the plan, higher is better."""
    cost = gram_matrix(np.random.default_rng(4), 7)
    chosen = select(cost, 4)
    dropped = complement(chosen.keep, 7)
    for expert, score in enumerate(chosen.scores):
        others = [e for e in dropped if e != expert]
        assert score == pytest.approx(total(cost, [*others, expert]) - total(cost, others))


def test_nothing_to_drop_is_the_identity() -> None:
    """Also with a matrix."""
    assert select(np.eye(4), 4).keep == (0, 1, 2, 3)


# --- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "values",
    [np.array([1.0, np.nan]), np.array([1.0, np.inf]), np.zeros((3, 4)), np.zeros((2, 2, 2)), np.array(1.0)],
)
def test_values_that_are_no_scores_or_costs(values: NDArray[np.float64]) -> None:
    """A criterion that went wrong cannot give a plan."""
    with pytest.raises(StrategyError, match="must return finite values"):
        select(values, 1)


@pytest.mark.parametrize("values", [np.ones(8), np.eye(8)])
def test_more_protected_experts_than_may_stay(values: NDArray[np.float64]) -> None:
    """The group is named where there are groups."""
    with pytest.raises(PlanError, match=r"there are 3 protected experts and only 2 may stay .*protect fewer"):
        select(values, 2, protected={0, 3, 7})
    with pytest.raises(PlanError, match="group 1 has 3 protected experts and only 2 may stay"):
        select(values, 4, n_group=2, protected={0, 5, 6, 7})
