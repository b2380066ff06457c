"""Statistics of paired measurements: two models, the same documents."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Interval = tuple[float, float]
FloatArray = npt.NDArray[np.float64]

SMALL_LOSS, LOSS, GAIN = "small loss within margin", "loss", "gain"
NO_MATERIAL_LOSS, INCONCLUSIVE = "no material loss", "inconclusive"

_FEW_CHANGED = 10  # a bootstrap of fewer changed documents than this claims far more than it saw


def mcnemar(lost: int, gained: int) -> float:
    """Two-sided exact McNemar p: could as many losses against gains be coin tosses? (McNemar 1947)."""
    from scipy.stats import binomtest

    return float(binomtest(lost, lost + gained, 0.5).pvalue) if lost + gained else 1.0


def tango_interval(lost: int, gained: int, n: int, confidence: float = 0.95) -> Interval:
    """Score interval of the paired difference (gained - lost) / n (Tango, Stat. Med. 17:891, 1998).

    Unlike the usual standard error it keeps its coverage with few flips, and stays wide with none at all.
    """
    from scipy.optimize import brentq
    from scipy.stats import norm

    z = float(norm.ppf(0.5 + confidence / 2))
    estimate = (gained - lost) / n

    def excess(difference: float, sign: int) -> float:
        # q is the probability of a loss that is most likely when the true difference is this one
        b = (2 * n - gained + lost) * difference - gained - lost
        q = (math.sqrt(max(b * b + 8 * n * lost * difference * (1 - difference), 0.0)) - b) / (4 * n)
        variance = max(n * (2 * q + difference * (1 - difference)), 0.0)
        return gained - lost - n * difference + sign * z * math.sqrt(variance)

    nudge = 1e-12  # without flips the estimate itself is a root, and not the one that is wanted
    lower = brentq(excess, -1.0, estimate - nudge, args=(-1,)) if lost < n else -1.0
    upper = brentq(excess, estimate + nudge, 1.0, args=(1,)) if gained < n else 1.0
    return float(lower), float(upper)


def bootstrap_interval(change_N: FloatArray, span: float, confidence: float = 0.95) -> Interval:
    """BCa interval of the mean change per document (Efron 1987), for metrics that are not 0/1.

    A bootstrap of a handful of changed documents is far too sure, and one of none is undefined; there the score
    interval for changes as large as ``span``, the metric's observed range, stands in: too wide, never too narrow.
    """
    from scipy.stats import bootstrap

    mean, n = float(change_N.mean()), len(change_N)
    worse, better = int((change_N < 0).sum()), int((change_N > 0).sum())
    if worse + better < _FEW_CHANGED or np.ptp(change_N) == 0:
        lower, upper = (span * end for end in tango_interval(worse, better, n, confidence))
        return min(lower, mean), max(upper, mean)
    draws = {"method": "BCa", "n_resamples": 9999, "batch": 500, "random_state": np.random.default_rng(0)}
    found = bootstrap((change_N,), np.mean, confidence_level=confidence, **draws).confidence_interval
    return float(found.low), float(found.high)


def permutation_p(change_N: FloatArray) -> float:
    """Two-sided p of the mean change when each document's change could as well have had the other sign."""
    from scipy.stats import permutation_test

    if len(change_N) < 2 or not change_N.any():
        return 1.0
    draws = {"n_resamples": 9999, "batch": 500, "random_state": np.random.default_rng(0)}
    found = permutation_test((change_N,), np.mean, permutation_type="samples", vectorized=True, **draws)
    return float(found.pvalue)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjustment for several tests, in the order given (Holm 1979)."""
    order = sorted(range(len(p_values)), key=lambda index: p_values[index])
    adjusted, running = [0.0] * len(order), 0.0
    for rank, index in enumerate(order):
        running = max(running, min(1.0, (len(order) - rank) * p_values[index]))
        adjusted[index] = running
    return adjusted


def detectable_change(spread: float, n: int, alpha: float = 0.05, power: float = 0.8) -> float:
    """Smallest mean change that a two-sided test finds with this power, given a document's root mean square change."""
    from scipy.stats import norm

    return float((norm.ppf(1 - alpha / 2) + norm.ppf(power)) * spread / math.sqrt(n))


def verdict_of(change: float, ni_lower: float, margin: float, *, significant: bool) -> str:
    """Two questions, two axes: is there a change, and is any loss surely smaller than the margin?"""
    if significant and change > 0:
        return GAIN
    if significant:
        return SMALL_LOSS if ni_lower > -margin else LOSS
    return NO_MATERIAL_LOSS if ni_lower > -margin else INCONCLUSIVE
