"""Quantiles read from sketches, against sorted values."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeprune.sketches import BINS, count_below, sketch, softsign, threshold_for, unsoftsign

VALUES = st.lists(st.floats(0, 1), min_size=1, max_size=300)


@given(VALUES, st.floats(0, 1))
def test_a_threshold_is_a_bin_away_from_the_exact_one(values: list[float], share: float) -> None:
    """As many values as wanted lie below it, give or take those that are no more than a bin away from it."""
    wanted = round(share * len(values))
    threshold = threshold_for(sketch(values), wanted)
    near = 1 / BINS + 1e-12
    assert (
        sum(value < threshold - near for value in values) <= wanted <= sum(value < threshold + near for value in values)
    )


@given(VALUES, st.floats(0, 1))
def test_counts_below_a_value_are_off_by_its_own_bin_at_most(values: list[float], value: float) -> None:
    """Exactly so at the edges of bins."""
    hist = sketch(values)
    own = hist[min(BINS - 1, int(value * BINS))]
    assert abs(count_below(hist, value) - sum(one < value for one in values)) <= own + 1e-6
    edge = int(value * BINS) / BINS
    assert count_below(hist, edge) == pytest.approx(sum(one < edge for one in values))


@given(VALUES, st.floats(0, 1))
def test_a_threshold_and_its_count_undo_each_other(values: list[float], share: float) -> None:
    """Interpolated alike in both directions, for any number from none to all."""
    hist = sketch(values)
    assert count_below(hist, threshold_for(hist, share * len(values))) == pytest.approx(share * len(values), abs=1e-6)


@given(VALUES, VALUES)
def test_sketches_add_up(first: list[float], second: list[float]) -> None:
    """The sum of two is that of all values together."""
    np.testing.assert_array_equal(sketch(first) + sketch(second), sketch(first + second))
    assert sketch(first).dtype == np.int64


@given(VALUES, st.integers(1, 299))
def test_thresholds_grow_with_what_is_wanted(values: list[float], wanted: int) -> None:
    """More values below is never a lower threshold, and weights of domains only scale the counts."""
    hist = sketch(values)
    assert threshold_for(hist, wanted - 1) <= threshold_for(hist, wanted)
    assert threshold_for(0.5 * hist, 0.5 * wanted) == pytest.approx(threshold_for(hist, wanted))


def test_the_ends() -> None:
    """None, all, more than all, and values outside of the bins."""
    hist = sketch([0.25, 0.5, 1.0])
    assert [threshold_for(hist, wanted) for wanted in (-1, 0, 3, 4)] == [0.0, 0.0, 1.0, 1.0]
    assert [count_below(hist, value) for value in (0.0, 1.0, 2.0)] == [0.0, 3.0, 3.0]
    np.testing.assert_array_equal(sketch([-1.0, 7.0]).nonzero()[0], [0, BINS - 1])
    assert threshold_for(np.zeros(BINS), 1) == 1.0


@given(st.floats(-1e4, 1e4), st.floats(-1e4, 1e4))
def test_scores_keep_their_order(one: float, other: float) -> None:
    """Between 0 and 1, and back again."""
    mapped = softsign([one, other])
    assert ((mapped > 0) & (mapped < 1)).all()
    assert (mapped[0] <= mapped[1]) or one > other
    assert unsoftsign(mapped[0]) == pytest.approx(one, rel=1e-6, abs=1e-9)
    assert (unsoftsign(0.0), unsoftsign(1.0)) == (-math.inf, math.inf)
