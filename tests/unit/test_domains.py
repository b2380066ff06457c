"""Weights of domains under which the worst served one keeps most, and a place for the best experts of each."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.optimize import linprog

from moeprune.strategies.domains import maxmin_weights, top_of_each
from moeprune.strategies.selection import select

Array = NDArray[Any]


def masses(seed: int, domains: int, experts: int) -> Array:
    """Gated masses [domains, experts], few of them large, of domains of very different size."""
    rng = np.random.default_rng(seed)
    return np.asarray(rng.gamma(0.5, size=(domains, experts)) * rng.uniform(1, 100, (domains, 1)))


def worst(mass_DE: Array, kept: tuple[int, ...]) -> float:
    """The share that the worst served domain keeps."""
    return float((mass_DE[:, list(kept)].sum(axis=1) / mass_DE.sum(axis=1)).min())


def kept_by(weights_D: Array, mass_DE: Array, keep: int, n_group: int = 1) -> tuple[int, ...]:
    """The best experts by weighted sum of masses."""
    return select(weights_D @ mass_DE, keep, n_group=n_group).keep


def best_possible(mass_DE: Array, keep: int, n_group: int) -> float:
    """The largest worst share of any set, by looking at all of them."""
    experts = mass_DE.shape[1]
    blocks = np.arange(experts).reshape(n_group, -1).tolist()
    in_groups = itertools.product(*(itertools.combinations(block, keep // n_group) for block in blocks))
    return max(worst(mass_DE, tuple(itertools.chain(*parts))) for parts in in_groups)


@pytest.mark.parametrize(("domains", "experts", "keep", "n_group"), [(2, 10, 5, 1), (3, 10, 4, 1), (3, 12, 6, 3)])
def test_the_worst_domain_keeps_nearly_as_much_as_any_set_could_leave_it(
    domains: int, experts: int, keep: int, n_group: int
) -> None:
    """Against all sets: mostly the best there is, and on average much nearer to it than plain sums are."""
    lost, by_sum = [], []
    for seed in range(30):
        mass_DE = masses(seed, domains, experts)
        best = best_possible(mass_DE, keep, n_group)
        weights_D = maxmin_weights(mass_DE, keep, n_group=n_group)
        lost.append(best - worst(mass_DE, kept_by(weights_D, mass_DE, keep, n_group)))
        by_sum.append(best - worst(mass_DE, kept_by(np.ones(domains), mass_DE, keep, n_group)))
    assert np.mean(np.array(lost) < 1e-12) >= 0.5
    assert np.mean(lost) < 0.25 * np.mean(by_sum)


def test_of_many_experts_next_to_nothing_is_lost() -> None:
    """Only as many experts as there are domains lie between staying and going."""
    for seed in range(5):
        mass_DE = masses(seed, 4, 256)
        share_DE = mass_DE / mass_DE.sum(axis=1, keepdims=True)
        solved = linprog(
            np.append(np.zeros(256), -1.0),
            A_ub=np.column_stack([-share_DE, np.ones(4)]),
            b_ub=np.zeros(4),
            A_eq=[[*np.ones(256), 0.0]],
            b_eq=[128],
            bounds=[(0, 1)] * 256 + [(None, None)],
        )
        bound = -solved.fun  # of any set's worst share
        found = worst(mass_DE, kept_by(maxmin_weights(mass_DE, 128), mass_DE, 128))
        assert bound - 0.01 < found <= bound + 1e-9


def test_it_is_never_worse_than_equal_shares() -> None:
    """Which every domain's sums divided by their own total would give."""
    for seed in range(40):
        mass_DE = masses(seed, 3, 8)
        equal_D = 1 / mass_DE.sum(axis=1)
        found = worst(mass_DE, kept_by(maxmin_weights(mass_DE, 3), mass_DE, 3))
        assert found >= worst(mass_DE, kept_by(equal_D, mass_DE, 3)) - 1e-12


def test_the_size_of_a_domain_does_not_matter() -> None:
    """A thousand times the tokens, a thousandth of the weight."""
    mass_DE = masses(1, 3, 16)
    plain, scaled = (maxmin_weights(mass_DE * size, 8) for size in ([[1]] * 3, [[1], [1000], [1]]))
    np.testing.assert_allclose(scaled * [1, 1000, 1], plain, rtol=1e-9)


def test_domains_that_need_nothing_have_no_weight() -> None:
    """One that saw no expert, and one whose experts all stay anyway."""
    mass_DE = np.array([[9.0, 8, 1, 1, 0, 0], [0, 0, 0, 0, 0, 0], [5, 5, 5, 5, 5, 5]])
    weights_D = maxmin_weights(mass_DE, 2)
    assert weights_D[1] == 0
    assert weights_D[0] < 1e-5 < weights_D[2]
    assert maxmin_weights(np.zeros((2, 4)), 2).tolist() == [1, 1]


def test_protected_experts_count_as_kept() -> None:
    """Domain 0 is served by an expert that stays anyway, so that the other slot goes to domain 1."""
    mass_DE = np.array([[5.0, 4, 1, 0], [0, 0, 1, 9]])
    weights_D = maxmin_weights(mass_DE, 2, protected={0})
    assert select(weights_D @ mass_DE, 2, protected={0}).keep == (0, 3)


# --- a place for each domain's best -----------------------------------------------------------------------------------


def test_domains_take_turns_while_there_is_room() -> None:
    """First the best of each, then the second of each: with room for three, domain 1 gets its second, not domain 0."""
    mass_DE = np.array([[9.0, 8, 7, 0, 0, 0], [0, 0, 7, 8, 9, 0]])
    assert top_of_each(mass_DE, 1, room=6) == {0, 4}
    assert top_of_each(mass_DE, 2, room=6) == {0, 1, 3, 4}
    assert top_of_each(mass_DE, 2, room=3) == {0, 1, 4}
    assert top_of_each(mass_DE, 9, room=6) == {0, 1, 2, 3, 4}  # nobody uses the last


def test_protected_experts_take_up_room() -> None:
    """And are not named again."""
    mass_DE = np.array([[9.0, 8, 7, 0], [0, 0, 8, 9]])
    assert top_of_each(mass_DE, 2, room=3, protected={0, 1}) == {3}


def test_every_group_has_its_own_room() -> None:
    """A group that is full passes, and the others go on."""
    mass_DE = np.array([[9.0, 8, 1, 0], [7, 9, 0, 1]])
    assert top_of_each(mass_DE, 4, room=1, n_group=2) == {0, 2}


def test_of_equal_experts_the_first_are_taken() -> None:
    """Ties go by index."""
    assert top_of_each(np.ones((2, 6)), 2, room=6) == {0, 1}
