"""Whether two halves of the calibration data rank the experts alike, and how much more data would make them."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from moeprune.errors import StrategyError
from moeprune.stability import LEAST, RELIABLE, Stability, gated_norm_stability, split_half
from moeprune.statistics import STATISTICS, LayerArrays, LayerStatistics, RouterStatistics, added
from moeprune.strategies import Strategy, resolve
from moeprune.strategies.selection import Selection, select

E = 12
Halves = tuple[dict[str, Any], dict[str, Any]]


def statistics_of(*layers: Halves, domains: tuple[str, ...] = ("default",)) -> RouterStatistics:
    """Statistics from what each half of each layer saw; arrays [E], [E, E] or with the domains in front."""

    def arrays(given: dict[str, Any]) -> dict[str, NDArray[Any]]:
        values = {"tokens": 10} | given
        return {
            name: np.broadcast_to(
                np.asarray(values.get(name, 0), np.int64 if statistic.integer else np.float64),
                (len(domains), *statistic.shape(E)),
            )
            for name, statistic in STATISTICS.items()
        }

    halves = [(arrays(first), arrays(second)) for first, second in layers]
    return RouterStatistics.of_layers(
        {
            layer: LayerArrays(
                total={name: added(name, first[name], second[name]) for name in STATISTICS}, first_half=first
            )
            for layer, (first, second) in enumerate(halves)
        },
        domains=domains,
        num_experts=E,
        top_k=2,
        command={},
        inputs={},
    )


def compare(
    statistics: RouterStatistics,
    strategy: str | Strategy = "gated-norm",
    keep: int = 6,
    weights: dict[str, float] | None = None,
) -> Stability | None:
    """The comparison for a strategy and a count to keep."""

    def choose(part: RouterStatistics, layers: Sequence[int]) -> dict[int, Selection]:
        return {layer: select(resolve(strategy)(part.layer(layer, weights)), keep) for layer in layers}

    return split_half(statistics, choose, statistics.layers)


def norms(*values: float) -> dict[str, Any]:
    """Gated norms of one half."""
    return {"gated_norm_sum": np.array(values)}


RISING = tuple(float(value) for value in range(1, E + 1))


# --- the correlation ------------------------------------------------------------------------------------------------


def test_rank_correlation_is_spearmans() -> None:
    """1 - 6 sum(d²) / (n³ - n) over the differences of ranks, whatever the scale of the scores."""
    rng = np.random.default_rng(0)
    first, second = rng.permutation(E), rng.permutation(E)
    found = compare(statistics_of((norms(*np.exp(first / 2.0)), norms(*(7.0 * second)))))
    assert found is not None
    difference = (first - second).astype(float)
    assert found.rank[0] == pytest.approx(1 - 6 * (difference**2).sum() / (E**3 - E))
    both = set(np.argsort(-first)[:6].tolist()) & set(np.argsort(-second)[:6].tolist())
    assert found.agree[0] == len(both) / 6


def test_the_second_half_is_what_the_first_is_not() -> None:
    """The halves are compared with each other, never one with the whole."""
    found = compare(statistics_of((norms(*RISING), norms(*RISING[::-1]))))
    assert found is not None
    assert (found.rank[0], found.agree[0]) == (pytest.approx(-1), 0)


def test_layers_are_told_apart() -> None:
    """The median over the layers and the layer with the lowest correlation are named."""
    swapped = (*RISING[:-2], RISING[-1], RISING[-2])
    found = compare(statistics_of(*((norms(*RISING), norms(*other)) for other in (RISING, RISING[::-1], swapped))))
    assert found is not None
    assert found.rank == pytest.approx({0: 1, 1: -1, 2: 1 - 12 / (E**3 - E)})
    assert found.median == found.rank[2]
    assert found.lowest == 1
    assert "with a correlation of 0.99 (layer 1 the lowest, -1.00)" in str(found)
    assert found.to_dict() == {
        "layers": {
            "0": {"rank": 1.0, "agree": 1.0},
            "1": {"rank": -1.0, "agree": 0.0},
            "2": {"rank": 0.993, "agree": 1.0},
        },
        "median": 0.993,
        "lowest": -1.0,
    }


def test_layers_without_a_ranking_are_left_out() -> None:
    """Scores that are all equal say nothing; where no layer ranks there is nothing to say."""
    level = norms(*[1.0] * E)
    found = compare(statistics_of((level, norms(*RISING)), (norms(*RISING), norms(*RISING))))
    assert found is not None
    assert list(found.rank) == [1]
    assert list(found.to_dict()["layers"]) == ["1"]
    assert compare(statistics_of((level, level))) is None


def test_the_largest_value_belongs_to_both_halves() -> None:
    """What is no sum cannot be split, so a strategy that only looks at it is as stable as can be."""
    peaks = Strategy(name="peaks", criterion=lambda stats: stats.max_abs_down)
    halves = ({"max_abs_down": np.array(RISING)}, {"max_abs_down": np.array(RISING[::-1])})
    found = compare(statistics_of(halves), peaks)
    assert found is not None
    assert found.rank[0] == pytest.approx(1)


def test_costs_of_pairs_are_compared_by_their_own_choice() -> None:
    """Each half drops its own cheapest set, and what experts add to that is compared."""
    rng = np.random.default_rng(1)
    first, second = ({"pair_gated_norm": (one := rng.random((E, E))) + one.T} for _ in range(2))
    found = compare(statistics_of((first, second)), "hope-total")
    chosen = [select(half["pair_gated_norm"] / 10, 6) for half in (first, second)]
    ranks = [np.argsort(np.argsort(one.scores)).astype(float) for one in chosen]
    assert found is not None
    assert found.rank[0] == pytest.approx(1 - 6 * ((ranks[0] - ranks[1]) ** 2).sum() / (E**3 - E))
    assert found.agree[0] == len({*chosen[0].keep} & {*chosen[1].keep}) / 6 < 1


def test_weights_of_domains_count() -> None:
    """The halves are weighted as the plan is, and a domain without weight has no say."""
    first = {"gated_norm_sum": np.array([RISING, RISING])}
    second = {"gated_norm_sum": np.array([RISING, RISING[::-1]])}
    made = statistics_of((first, second), domains=("a", "b"))
    ranks = [compare(made, weights=weights) for weights in ({"b": 0.0}, {"a": 0.0})]
    assert [one.rank[0] for one in ranks if one] == pytest.approx([1, -1])


# --- where there is nothing to compare ------------------------------------------------------------------------------


def test_nothing_is_said_without_two_halves() -> None:
    """Files without halves, one half without tokens, also by the weights, and no data at all."""
    made = statistics_of((norms(*RISING), norms(*RISING)))
    assert compare(dataclasses.replace(made, first_half={})) is None
    assert compare(statistics_of((norms(*RISING), {"tokens": 0}))) is None
    assert compare(statistics_of(({"tokens": 0}, norms(*RISING)))) is None
    tokens = {"tokens": np.array([0, 5])}
    lopsided = statistics_of((norms(*RISING) | tokens, norms(*RISING)), domains=("a", "b"))
    assert compare(lopsided) is not None
    assert compare(lopsided, weights={"b": 0.0}) is None
    assert gated_norm_stability(RouterStatistics.empty([0], num_experts=E, top_k=2, model="")) is None


def test_a_strategy_that_cannot_score_a_half_is_not_judged() -> None:
    """It may need experts to have been seen, which they were only in all of the data."""

    def needs_all(stats: LayerStatistics) -> NDArray[np.float64]:
        if not stats.gated_norm_sum.all():
            raise StrategyError("an expert was never seen")
        return stats.gated_norm_sum

    made = statistics_of((norms(0.0, *RISING[1:]), norms(*RISING)))
    assert compare(made, Strategy(name="needs-all", criterion=needs_all)) is None


def test_before_a_plan_only_the_ranking_is_known() -> None:
    """Without a count to keep there is no choice on which the halves could agree."""
    made = statistics_of((norms(*RISING), norms(*RISING)))
    found = gated_norm_stability(made)
    assert found is not None
    assert found.agree == {}
    assert found.to_dict()["layers"] == {"0": {"rank": 1.0}}


# --- how much more --------------------------------------------------------------------------------------------------


@given(st.floats(LEAST, 0.999))
def test_more_data_makes_it_reliable(rank: float) -> None:
    """Spearman and Brown: R of k times the data is k R / (1 + (k - 1) R), and of both halves 2 r / (1 + r)."""
    found = Stability(rank={0: rank}, agree={})
    factor = found.data_factor
    assert found.reliability == pytest.approx(2 * rank / (1 + rank))
    assert factor * found.reliability / (1 + (factor - 1) * found.reliability) == pytest.approx(RELIABLE)
    assert (factor > 1) is (found.reliability < RELIABLE)


def test_halves_that_contradict_each_other_need_a_lot() -> None:
    """A correlation of zero or less has no finite answer; it counts as the least one that has."""
    factors = [Stability(rank={0: rank}, agree={}).data_factor for rank in (-0.8, 0.0, LEAST, 2 * LEAST)]
    assert factors[0] == factors[1] == factors[2] > 1.5 * factors[3] > 50


def test_reliability_is_the_correlation_with_new_data() -> None:
    """Drawn again and again, two collections of n tokens correlate as the halves of one foretell."""
    rng = np.random.default_rng(2)
    foretold, found = [], []
    for _ in range(300):
        worth = rng.normal(size=E)
        halves = [10 + worth + rng.normal(size=E) for _ in range(4)]  # two collections of two halves
        one, other = (statistics_of((norms(*halves[n]), norms(*halves[n + 1]))) for n in (0, 2))
        stability = gated_norm_stability(one)
        assert stability is not None
        foretold.append(stability.rank[0])
        pair = [made.layer(0).gated_norm_sum.argsort().argsort().astype(float) for made in (one, other)]
        found.append(np.corrcoef(*pair)[0, 1])
    mean = float(np.mean(foretold))
    assert 2 * mean / (1 + mean) == pytest.approx(float(np.mean(found)), abs=0.05)
    assert mean < 0.85 * float(np.mean(found))  # the halves alone are clearly less reliable


def test_halves_of_many_layers_keep_their_numbers() -> None:
    """Layers are looked up by their index on disk, and only those that are asked for."""
    made = statistics_of(*itertools.repeat((norms(*RISING), norms(*RISING)), 3))

    def choose(part: RouterStatistics, layers: Sequence[int]) -> dict[int, Selection]:
        return {layer: select(part.layer(layer).gated_norm_sum, 6) for layer in layers}

    found = split_half(made, choose, [2, 0])
    assert found is not None
    assert sorted(found.rank) == [0, 2]
