"""The search over counts: what it respects, what it finds, and what it asks for."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeprune.strategies.evolve import Counts, Evolution, evolve

BEST = (3, 8, 5, 4)


def distance(found: Sequence[Counts]) -> list[float]:
    """How far counts are from the best ones, layers weighted differently."""
    return [
        sum((1 + layer) * (one - wanted) ** 2 for layer, (one, wanted) in enumerate(zip(counts, BEST, strict=True)))
        for counts in found
    ]


def last(**options: int) -> Evolution:
    """The end of a search from equal counts."""
    *_, state = evolve([(5, 5, 5, 5)], distance, least=(1, 2, 1, 1), most=8, **options)
    return state


def test_the_best_counts_are_found() -> None:
    """From equal counts to those of least cost; the cost of the start stays known."""
    state = last(generations=20)
    assert state.best == BEST
    assert state.cost == 0
    assert state.first == distance([(5, 5, 5, 5)])[0]
    assert state.finished


@given(st.integers(0, 99), st.integers(1, 5), st.integers(5, 12))
def test_candidates_keep_the_sum_and_the_bounds(seed: int, generations: int, population: int) -> None:
    """Every candidate has the sum of the start, no layer leaves its bounds, and none is scored twice."""
    seen: list[Counts] = []

    def watched(found: Sequence[Counts]) -> list[float]:
        seen.extend(found)
        assert len(found) <= population
        return distance(found)

    states = list(
        evolve(
            [(5, 5, 5, 5)],
            watched,
            least=(4, 2, 5, 1),
            most=8,
            generations=generations,
            population=population,
            seed=seed,
        )
    )
    assert len(seen) == len(set(seen))
    for counts in seen:
        assert sum(counts) == 20
        assert all(low <= count <= 8 for low, count in zip((4, 2, 5, 1), counts, strict=True))
        moved = sum(abs(one - 5) for one in counts) // 2
        assert moved <= 12 * generations
    assert [state.cost for state in states] == sorted((state.cost for state in states), reverse=True)
    assert [state.scored for state in states] == sorted(state.scored for state in states)


def test_the_seed_decides() -> None:
    """Equal seeds give equal searches, another one another; and more generations are never worse."""
    runs = [
        [state.best for state in evolve([(5, 5, 5, 5)], distance, least=(1,) * 4, most=8, seed=seed)]
        for seed in (3, 3, 4)
    ]
    assert runs[0] == runs[1] != runs[2]
    assert last(generations=2).cost >= last(generations=6).cost


def test_a_search_can_be_stopped_at_any_state() -> None:
    """The first state is the best start, before any child is made."""
    states = evolve([(5, 5, 5, 5), (3, 7, 5, 5)], distance, least=(1,) * 4, most=8)
    first = next(states)
    assert (first.best, first.scored, first.generation, first.finished) == ((3, 7, 5, 5), 2, 0, False)
    assert first.first == distance([(5, 5, 5, 5)])[0]


def test_a_search_ends_where_all_is_known() -> None:
    """Two layers of three have few splits: all are scored once, and the end is an end."""
    asked: list[Counts] = []

    def cost(found: Sequence[Counts]) -> list[float]:
        asked.extend(found)
        return [abs(counts[0] - 1) for counts in found]

    *_, state = evolve([(2, 2)], cost, least=(1, 1), most=3, generations=50)
    assert state.finished
    assert state.best == (1, 3)
    assert sorted(asked) == sorted(split for split in itertools.product((1, 2, 3), repeat=2) if sum(split) == 4)


def test_layers_that_cannot_move_stay() -> None:
    """Where every layer is at its floor there is nothing to search."""
    [first, end] = evolve([(2, 2)], lambda found: [1.0] * len(found), least=(2, 2), most=4)
    assert first.best == end.best == (2, 2)
    assert end.finished


def test_no_generations_take_the_best_start() -> None:
    """Nothing is mutated, and the search is over."""
    [state] = evolve([(2, 2), (1, 3)], lambda found: [5.0, 4.0], least=(1, 1), most=4, generations=0)
    assert state.best == (1, 3)
    assert state.finished


def test_as_many_costs_as_candidates() -> None:
    """A cost that leaves one out is an error."""
    with pytest.raises(ValueError, match="zip"):
        next(evolve([(2, 2)], lambda _: [], least=(1, 1), most=4))
