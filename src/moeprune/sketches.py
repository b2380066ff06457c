"""Quantile sketches: how often values in [0, 1] fall into bins of equal width.

They are statistics like any other: counts that add up over batches, files and domains, and from which a quantile of the
whole is read afterwards, no more than the width of a bin from the exact one.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

BINS = 2048

Counts = NDArray[np.int64]


def sketch(values: ArrayLike) -> Counts:
    """Count values by bin, [BINS]; those outside of [0, 1] are counted at its ends.

    Example:
        >>> total = sketch(one_half) + sketch(other_half)
    """
    places = np.floor(np.asarray(values, dtype=np.float64).reshape(-1) * BINS).clip(0, BINS - 1)
    return np.bincount(places.astype(np.int64), minlength=BINS)


def count_below(hist: ArrayLike, value: float) -> float:
    """How many of the values lie below a value, those of its own bin being taken as spread evenly.

    Args:
        hist: counts by bin, [BINS], weighted or not.
        value: from 0 to 1.

    Returns:
        The number, off by no more than what the value's own bin holds.
    """
    cumulative = _cumulative(hist)
    return float(np.interp(value, np.linspace(0, 1, len(cumulative)), cumulative))


def threshold_for(hist: ArrayLike, wanted: float) -> float:
    """The value below which a wanted number of the values lies.

    Args:
        hist: counts by bin, [BINS], weighted or not.
        wanted: how many.

    Returns:
        The value: of ``wanted`` values or fewer that are below the exact quantile and the rest that are not, both ends
        are at most a bin (1 / BINS) away. 0 for none, 1 for all there are or more.

    Example:
        >>> hist = statistics.layer(3).share_hist
        >>> threshold = threshold_for(hist, 0.25 * top_k * tokens)
    """
    cumulative = _cumulative(hist)
    if wanted <= 0:
        return 0.0
    if wanted >= cumulative[-1]:
        return 1.0
    bin_ = int(np.searchsorted(cumulative[1:], wanted))  # the first at whose end there are enough
    inside = (wanted - cumulative[bin_]) / (cumulative[bin_ + 1] - cumulative[bin_])
    return float((bin_ + inside) / (len(cumulative) - 1))


def softsign(scores: ArrayLike) -> NDArray[np.float64]:
    """Any number to (0, 1), in order: (1 + z / (1 + |z|)) / 2."""
    z = np.asarray(scores, dtype=np.float64)
    mapped: NDArray[np.float64] = (1 + z / (1 + np.abs(z))) / 2
    return mapped


def unsoftsign(value: float) -> float:
    """The score that :func:`softsign` maps to a value; infinite at 0 and 1.

    Example:
        >>> logit = unsoftsign(threshold_for(statistics.layer(3).score_hist, wanted))
    """
    y = 2 * value - 1
    return y / (1 - abs(y)) if abs(y) < 1 else float(np.copysign(np.inf, y))


def _cumulative(hist: ArrayLike) -> NDArray[np.float64]:
    """Counts below each edge of a bin, [BINS + 1]."""
    return np.concatenate([[0.0], np.cumsum(np.asarray(hist, dtype=np.float64))])
