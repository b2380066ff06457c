"""The search for a layer's best set of experts, on losses that are known."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from moeprune.strategies.reconstruction import Keep, Loss, reconstruct
from moeprune.strategies.selection import Selection, select

E = 12


def losses(seed: int = 0) -> tuple[Loss, list[Keep]]:
    """A loss with interactions, by experts that stay, and the list of all sets that it was asked for."""
    rng = np.random.default_rng(seed)
    own, pairs, asked = rng.gamma(1.0, size=E), rng.normal(size=(E, E)) / 4, list[Keep]()

    def loss(keep: Keep) -> float:
        asked.append(keep)
        gone = np.setdiff1d(np.arange(E), keep)
        return float(own[gone].sum() + np.abs(pairs[np.ix_(gone, gone)].sum()))

    return loss, asked


def start(seed: int = 0, keep: int = 6, n_group: int = 1, protected: frozenset[int] = frozenset()) -> Selection:
    """A choice by random scores."""
    return select(np.random.default_rng(seed).random(E), keep, n_group=n_group, protected=protected)


@pytest.mark.parametrize("n_group", [1, 3])
@pytest.mark.parametrize("protected", [frozenset[int](), frozenset({1, 7})])
def test_few_sets_are_all_looked_at(n_group: int, protected: frozenset[int]) -> None:
    """The best of those with the protected experts and with equal groups, each looked at once."""
    loss, asked = losses()
    found = reconstruct(
        loss, start(n_group=n_group, protected=protected), n_group=n_group, protected=protected, calls=999
    )
    assert found.complete
    assert len(asked) == len({*asked}) == found.calls
    allowed = [
        keep
        for keep in itertools.combinations(range(E), 6)
        if protected <= {*keep} and {*np.bincount(np.array(keep) * n_group // E, minlength=n_group)} == {6 // n_group}
    ]
    assert sorted(asked) == sorted(allowed)
    assert found.loss == min(map(loss, allowed)) == loss(found.keep)


@pytest.mark.parametrize("n_group", [1, 3])
@pytest.mark.parametrize("calls", [1, 2, 30, 130])
def test_many_sets_are_looked_at_within_bounds(n_group: int, calls: int) -> None:
    """Never worse than the start, of equal groups with the protected experts, and no more calls than allowed."""
    for seed in range(5):
        loss, asked = losses(seed)
        protected = frozenset({1})
        begun = start(seed, n_group=n_group, protected=protected)
        found = reconstruct(
            loss, begun, n_group=n_group, protected=protected, calls=calls if n_group == 1 else calls // 2
        )
        if found.complete:
            continue
        assert len(asked) == len({*asked}) == found.calls <= calls
        assert found.loss == loss(found.keep) <= found.start_loss == loss(begun.keep)
        assert protected <= {*found.keep}
        for keep in asked if n_group > 1 else [found.keep]:  # no router can run unequal groups on the way
            assert [*np.bincount(np.array(keep) * n_group // E, minlength=n_group)] == [6 // n_group] * n_group


def test_more_calls_find_more() -> None:
    """With some hundred calls of 924 sets the search ends in a set that no exchange makes better."""
    gaps = []
    for seed in range(5):
        loss, _ = losses(seed)
        best = min(loss(keep) for keep in itertools.combinations(range(E), 6))
        few, many = (reconstruct(loss, start(seed), calls=calls) for calls in (20, 400))
        assert many.loss <= few.loss
        for inside, outside in itertools.product(many.keep, {*range(E)} - {*many.keep}):
            assert loss(tuple(sorted({*many.keep} - {inside} | {outside}))) >= many.loss
        gaps.append(many.loss - best)
    assert sorted(gaps)[2] < 1e-9  # mostly the best of all


def test_elimination_gets_out_of_a_bad_start() -> None:
    """The start keeps the worst experts; dropping one after the other finds the best ones without an exchange."""
    values = np.arange(E, dtype=float)

    def loss(keep: Keep) -> float:
        return float(values.sum() - values[list(keep)].sum())

    bad = Selection(keep=(0, 1, 2, 3, 4, 5), scores=tuple(-values))
    assert reconstruct(loss, bad, calls=200).keep == (6, 7, 8, 9, 10, 11)


def test_equal_sets_leave_the_start() -> None:
    """Nothing is exchanged for nothing."""
    begun = start(3)
    for calls in (50, 1000):
        assert reconstruct(lambda _: 1.0, begun, calls=calls).keep == begun.keep
