"""Calibration domains side by side: weights under which the worst served one keeps most, and a place for each's best.

What a domain keeps is the share of its gated mass, the sum of g‖f(x)‖ over the domain's tokens, that the experts that
stay carry. It is the measure by which a plan reports its coverage, whatever strategy chooses the experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Set

import numpy as np

from moeprune.statistics import FloatArray
from moeprune.strategies.selection import select

_NUDGE = 1e-6  # of a domain's weight, so that experts which the multipliers make equal are told apart


def maxmin_weights(
    mass_DE: FloatArray, keep: int, *, n_group: int = 1, protected: Set[int] = frozenset()
) -> FloatArray:
    """Weights of the domains under which the worst served domain keeps the largest share of its mass.

    Let x[e] in [0, 1] say how far expert e stays. The largest share t that every domain can keep is the linear program

        max t  such that  sum over e of share[d, e] x[e] >= t for every domain d, and sum of x = keep in all,

    and the multipliers of its D conditions are the weights: the best experts by the weighted sum of shares are an
    optimum, but for at most D experts that lie between, which the last step decides.

    Args:
        mass_DE: gated mass of each expert in each domain.
        keep: experts that stay, the same number in each group.
        n_group: groups of a group-limited router.
        protected: experts that stay whatever their mass.

    Returns:
        Weights [D] for the sums of the domains: of domains with little mass they are large; 0 for one without any.

    Example:
        >>> mass_DE = np.array([[80.0, 20, 0, 1], [0, 1, 1, 8]])
        >>> sorted((maxmin_weights(mass_DE, keep=2) @ mass_DE).argsort()[-2:].tolist())
        [0, 3]
    """
    total_D = mass_DE.sum(axis=1)
    weights_D = np.zeros(len(mass_DE))
    used = np.flatnonzero(total_D > 0)
    if not len(used):
        return np.ones(len(mass_DE))
    share_DE = mass_DE[used] / total_D[used, None]

    def worst(candidate_D: FloatArray) -> float:
        kept = select(candidate_D @ share_DE, keep, n_group=n_group, protected=protected).keep
        return float(share_DE[:, list(kept)].sum(axis=1).min())

    best_D = max(_candidates(share_DE, keep, n_group, protected), key=worst)
    weights_D[used] = best_D / total_D[used]
    return weights_D


def _candidates(share_DE: FloatArray, keep: int, n_group: int, protected: Set[int]) -> Iterator[FloatArray]:
    """The multipliers with ties broken for or against each domain, and equal weights."""
    multipliers_D = _multipliers(share_DE, keep, n_group, protected)
    for domain in np.eye(len(share_DE)):
        for towards in (domain, 1 - domain):
            yield multipliers_D + _NUDGE * towards
    yield np.ones(len(share_DE))


def _multipliers(share_DE: FloatArray, keep: int, n_group: int, protected: Set[int]) -> FloatArray:
    from scipy.optimize import linprog

    domains, experts = share_DE.shape
    group_GE = np.repeat(np.eye(n_group), experts // n_group, axis=1)
    locked_E = np.isin(np.arange(experts), sorted(protected))
    solved = linprog(
        np.append(np.zeros(experts), -1.0),  # the last variable is t
        A_ub=np.column_stack([-share_DE, np.ones(domains)]),
        b_ub=np.zeros(domains),
        A_eq=np.column_stack([group_GE, np.zeros(n_group)]),
        b_eq=np.full(n_group, keep / n_group),
        bounds=[*((float(locked), 1.0) for locked in locked_E), (None, None)],
    )
    multipliers_D = np.maximum(-solved.ineqlin.marginals, 0)
    return np.asarray(multipliers_D / multipliers_D.sum())


def top_of_each(
    mass_DE: FloatArray, count: int, *, room: int, n_group: int = 1, protected: Set[int] = frozenset()
) -> frozenset[int]:
    """The best experts of every domain, taken in turns while there is room: first every domain's best, then its second.

    Args:
        mass_DE: gated mass of each expert in each domain; experts without any are nobody's best.
        count: experts of each domain.
        room: experts of each group that may be protected in all.
        n_group: groups of a group-limited router.
        protected: experts that are protected already and take up room.

    Returns:
        The experts, without those that were protected already.

    Example:
        >>> sorted(top_of_each(np.array([[9.0, 3, 1, 0], [0, 1, 3, 9]]), 2, room=3))
        [0, 1, 3]
    """
    size = mass_DE.shape[1] // n_group
    left = [room - sum(expert // size == group for expert in protected) for group in range(n_group)]
    order_DE = np.argsort(-mass_DE, axis=1, kind="stable")
    found: set[int] = set()
    for place in range(min(count, order_DE.shape[1])):
        for domain, expert in enumerate(order_DE[:, place].tolist()):
            fits = left[expert // size] > 0 and mass_DE[domain, expert] > 0
            if fits and expert not in found and expert not in protected:
                found.add(expert)
                left[expert // size] -= 1
    return frozenset(found)
