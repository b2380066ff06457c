"""The statistics of a report against statsmodels, and whether they hold what they promise over thousands of reports.

What is marked slow runs by `make test-slow`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence

import numpy as np
import pytest

from moeprune.evaluation.agreement import TokenLosses, perplexity_ratio
from moeprune.evaluation.compare import SuiteComparison, TaskComparison, _compare_suite
from moeprune.evaluation.paired import bootstrap_interval, detectable_change, holm, mcnemar, tango_interval

Interval = tuple[float, float]
tango = functools.cache(tango_interval)  # simulated reports repeat themselves
slow = pytest.mark.slow


def changes(n: int, lost: int, gained: int) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """Changes of 0/1 scores by document."""
    return np.concatenate([np.full(lost, -1.0), np.full(gained, 1.0), np.zeros(n - lost - gained)])


def task(n: int, lost: int, gained: int) -> TaskComparison:
    """A task of 0/1 scores with these flips, as a comparison would measure it."""
    change, (lower, upper) = 100 * (gained - lost) / n, tango(lost, gained, n)
    return TaskComparison(
        task="t",
        metric="acc",
        filter="none",
        version="1",
        n=n,
        n_full=n,
        n_shot=0,
        base=0.5,
        pruned=0.5 + change / 100,
        unit="points",
        change=change,
        interval=(100 * lower, 100 * upper),
        ni_lower=100 * tango(lost, gained, n, 0.9)[0],
        lost=lost,
        gained=gained,
        flips=100 * (lost + gained) / n,
        answers_changed=None,
        p=1.0,
        p_adjusted=1.0,
        mde=1.0,
        verdict="",
    )


def suite(tasks: Sequence[TaskComparison]) -> SuiteComparison:
    """The mean of tasks, at a margin of a point."""
    found = _compare_suite(tasks, 1.0, 0.05)
    assert found is not None
    return found


# --- against statsmodels ----------------------------------------------------------------------------------------------


def test_non_inferiority_is_that_of_statsmodels() -> None:
    """On many documents the verdict is that of its one-sided tests of a paired mean, but for p values at the edge."""
    from statsmodels.stats.weightstats import DescrStatsW, ttost_paired

    n, margin, decided = 5000, 0.01, {True: 0, False: 0}
    for gained in (50, 150, 300):
        for net in range(-80, 41, 8):
            change_N = changes(n, gained - net, gained)
            _, p = DescrStatsW(change_N).ztest_mean(value=-margin, alternative="larger")
            _, lower, _ = ttost_paired(change_N, np.zeros(n), -margin, 1.0)
            assert lower[1] == pytest.approx(p, abs=1e-3)
            if abs(p - 0.05) > 0.01:
                holds = tango(gained - net, gained, n, 0.9)[0] > -margin
                assert holds == (p < 0.05)
                decided[holds] += 1
    assert min(decided.values()) > 10


def test_intervals_are_those_of_statsmodels_where_documents_abound() -> None:
    """The score interval, the bootstrap's and the suite's come to statsmodels' textbook intervals."""
    from statsmodels.stats.weightstats import DescrStatsW

    cases = [(20_000, 400, 300), (30_000, 900, 950), (10_000, 100, 90)]
    described = [DescrStatsW(changes(*case)) for case in cases]
    for case, one in zip(cases, described, strict=True):
        for level in (0.95, 0.9):
            expected = one.zconfint_mean(alpha=1 - level)
            assert tango(case[1], case[2], case[0], level) == pytest.approx(expected, abs=2e-4)
    whole = suite([task(*case) for case in cases])
    error = math.sqrt(sum(one.std_mean**2 for one in described)) / len(cases)
    mean = float(np.mean([one.mean for one in described]))
    assert whole.interval == pytest.approx([100 * (mean + sign * 1.959964 * error) for sign in (-1, 1)], abs=0.01)
    assert whole.ni_lower == pytest.approx(100 * (mean - 1.644854 * error), abs=0.01)
    graded_N = np.random.default_rng(0).gamma(2, 1, 2000) - 1.9
    assert bootstrap_interval(graded_N, 1.0) == pytest.approx(DescrStatsW(graded_N).zconfint_mean(), abs=0.01)


@pytest.mark.parametrize("power", [0.5, 0.8, 0.95])
def test_the_detectable_change_is_that_of_statsmodels(power: float) -> None:
    """The smallest change that a test finds, from its power of a one-sample normal test."""
    from statsmodels.stats.power import NormalIndPower

    effect = NormalIndPower().solve_power(nobs1=1200, ratio=0, alpha=0.05, power=power)
    assert detectable_change(0.3, 1200, power=power) == pytest.approx(0.3 * effect, rel=1e-3)


# --- over thousands of reports ----------------------------------------------------------------------------------------


def flips(
    rng: np.random.Generator, n: int, lost: float, gained: float, reports: int
) -> np.ndarray[tuple[int, int], np.dtype[np.int64]]:
    """Lost and gained documents of many reports, [reports, 2]."""
    return rng.multinomial(n, [lost, gained, 1 - lost - gained], size=reports)[:, :2]


@slow
@pytest.mark.parametrize(
    ("n", "lost", "gained"), [(100, 0.01, 0.005), (164, 0.03, 0.02), (277, 0.03, 0.02), (1000, 0.06, 0.05)]
)
def test_the_score_interval_covers(n: int, lost: float, gained: float) -> None:
    """The 95 % interval of a task holds the true change at least about 95 % of the time, also with hardly a flip."""
    found = flips(np.random.default_rng(1), n, lost, gained, 4000).tolist()
    held = [lower <= gained - lost <= upper for lower, upper in (tango(*case, n) for case in found)]
    assert np.mean(held) > 0.94


@slow
@pytest.mark.parametrize(("n", "gained"), [(164, 0.02), (500, 0.03), (1319, 0.04), (1000, 0.0)])
def test_a_loss_of_the_margin_seldom_passes(n: int, gained: float) -> None:
    """Of tasks that truly lose just the margin about one in twenty is called inside it, not more."""
    found = flips(np.random.default_rng(2), n, gained + 0.01, gained, 4000).tolist()
    assert np.mean([tango(*case, n, 0.9)[0] > -0.01 for case in found]) < 0.07


@slow
@pytest.mark.parametrize("truth", [0.0, -0.01])
def test_the_mean_of_tasks_covers(truth: float) -> None:
    """The suite's interval holds the true mean, and a mean that loses just the margin seldom passes."""
    rng, sizes, rates = np.random.default_rng(3), (100, 200, 400, 150, 1000), (0.01, 0.05, 0.02, 0.1, 0.03)
    drawn = [flips(rng, n, rate - truth, rate, 2000) for n, rate in zip(sizes, rates, strict=True)]
    cached = functools.cache(task)
    wholes = [
        suite([cached(n, *map(int, found[report])) for n, found in zip(sizes, drawn, strict=True)])
        for report in range(2000)
    ]
    held = [whole.interval[0] <= 100 * truth <= whole.interval[1] for whole in wholes]
    assert np.mean(held) > 0.94
    if truth:
        assert np.mean([whole.ni_lower > -1 for whole in wholes]) < 0.07


@slow
@pytest.mark.parametrize(
    "draw",
    [
        lambda rng, n: rng.normal(0, 1, n),
        lambda rng, n: rng.gamma(0.5, 1, n) - 0.5,
        lambda rng, n: np.where(rng.random(n) < 0.4, rng.normal(0, 1, n), 0.0),
    ],
    ids=["normal", "skewed", "mostly unchanged"],
)
def test_the_bootstrap_covers(
    draw: Callable[[np.random.Generator, int], np.ndarray[tuple[int], np.dtype[np.float64]]],
) -> None:
    """The interval of graded scores holds the true change, about as often as it says."""
    rng = np.random.default_rng(4)
    held = [lower <= 0 <= upper for lower, upper in (bootstrap_interval(draw(rng, 80), 1.0) for _ in range(500))]
    assert np.mean(held) > 0.9


@slow
def test_seldom_does_any_task_seem_to_change() -> None:
    """Of reports on seven tasks without any change fewer than one in twenty calls some task changed."""
    rng, p = np.random.default_rng(5), functools.cache(mcnemar)
    found = flips(rng, 200, 0.05, 0.05, 7 * 2000).reshape(2000, 7, 2).tolist()
    assert np.mean([min(holm([p(*case) for case in report])) <= 0.05 for report in found]) < 0.05


@slow
def test_the_interval_of_a_perplexity_ratio_covers() -> None:
    """Over documents of different lengths, whose tokens are alike within a document."""
    rng = np.random.default_rng(6)
    held = []
    for _ in range(2000):
        tokens = rng.integers(20, 300, 40)
        base = tokens * rng.normal(3, 0.5, 40)
        pruned = base + tokens * rng.normal(0.1, 0.08, 40)
        lower, upper = perplexity_ratio(TokenLosses(base, tokens), TokenLosses(pruned, tokens)).interval
        held.append(lower <= math.exp(0.1) <= upper)
    assert 0.93 < np.mean(held) < 0.97
