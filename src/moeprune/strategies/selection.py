"""From a criterion's values to the experts that stay: equal counts per group, protected experts, ties by index."""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moeprune.errors import PlanError, StrategyError
from moeprune.statistics import FloatArray

BoolArray = NDArray[np.bool_]


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """What stays in one layer, and the score [E] of every expert (higher is better)."""

    keep: tuple[int, ...]
    scores: tuple[float, ...]


def select(values: FloatArray, keep: int, *, n_group: int = 1, protected: Set[int] = frozenset()) -> Selection:
    """Choose the experts that stay.

    Args:
        values: scores [E], higher stays; or drop costs [E, E], whose quadratic form over the dropped set is minimised.
        keep: experts that stay, the same number in each of ``n_group`` contiguous blocks.
        n_group: groups of a group-limited router.
        protected: experts that stay whatever their score.

    Raises:
        StrategyError: the values are not finite or have the wrong shape.
        PlanError: a group has more protected experts than it may keep.
    """
    values = np.asarray(values, dtype=np.float64)
    if values.ndim not in {1, 2} or len(set(values.shape)) != 1 or not np.isfinite(values).all():
        raise StrategyError(f"a criterion must return finite values [E] or [E, E], not shape {values.shape}")
    num_experts = len(values)
    groups = np.arange(num_experts) // (num_experts // n_group)
    locked = np.isin(np.arange(num_experts), sorted(protected))
    _check_protected(locked, groups, keep // n_group, n_group)
    if values.ndim == 1:
        kept = _best_scores(values, keep // n_group, groups, locked)
        return Selection(keep=_indices(kept), scores=tuple(map(float, values)))
    cost = (values + values.T) / 2
    dropped = _cheapest_set(cost, (num_experts - keep) // n_group, groups, locked)
    return Selection(keep=_indices(~dropped), scores=tuple(map(float, _marginal_cost(cost, dropped))))


def _check_protected(locked: BoolArray, groups: NDArray[np.int64], per_group: int, n_group: int) -> None:
    for group in range(n_group):
        count = int(locked[groups == group].sum())
        if count > per_group:
            where = f"group {group} has" if n_group > 1 else "there are"
            raise PlanError(f"{where} {count} protected experts and only {per_group} may stay", "protect fewer")


def _indices(mask: BoolArray) -> tuple[int, ...]:
    return tuple(int(index) for index in np.flatnonzero(mask))


def _best_scores(scores: FloatArray, per_group: int, groups: NDArray[np.int64], locked: BoolArray) -> BoolArray:
    order = np.lexsort((np.arange(len(scores)), -scores, ~locked))  # protected first, then best, ties by index
    kept = np.zeros(len(scores), dtype=bool)
    for group in np.unique(groups):
        kept[order[groups[order] == group][:per_group]] = True
    return kept


# --- the quadratic criterion ----------------------------------------------------------------------------------------


def _cheapest_set(cost: FloatArray, per_group: int, groups: NDArray[np.int64], locked: BoolArray) -> BoolArray:
    """Dropped set of small cost: greedy from both ends, then one-for-one exchanges until none helps."""
    starts = [_grow(cost, per_group, groups, locked), _shrink(cost, per_group, groups, locked)]
    ends = [_exchange(cost, start, groups, locked) for start in starts]
    return min(ends, key=lambda dropped: _total(cost, dropped))


def _total(cost: FloatArray, dropped: BoolArray) -> float:
    return float(dropped @ cost @ dropped)


def _grow(cost: FloatArray, per_group: int, groups: NDArray[np.int64], locked: BoolArray) -> BoolArray:
    """Start with nothing dropped and add the expert that costs least, as long as its group has room."""
    dropped = np.zeros(len(cost), dtype=bool)
    added = np.diag(cost).copy()  # cost of dropping each expert next
    for _ in range(per_group * len(np.unique(groups))):
        full = np.bincount(groups, weights=dropped)[groups] >= per_group
        price = np.where(dropped | locked | full, np.inf, added)
        chosen = len(price) - 1 - int(np.argmin(price[::-1]))  # of equals the last goes, so that the first stays
        dropped[chosen] = True
        added += 2 * cost[:, chosen]
    return dropped


def _shrink(cost: FloatArray, per_group: int, groups: NDArray[np.int64], locked: BoolArray) -> BoolArray:
    """Start with everything dropped that may be, and take back the expert that costs most."""
    dropped = ~locked
    saved = 2 * cost @ dropped - np.diag(cost)  # cost that goes when an expert is taken back
    for _ in range(int(dropped.sum()) - per_group * len(np.unique(groups))):
        crowded = np.bincount(groups, weights=dropped)[groups] > per_group
        chosen = int(np.argmax(np.where(dropped & crowded, saved, -np.inf)))
        dropped[chosen] = False
        saved -= 2 * cost[:, chosen]
    return dropped


def _exchange(cost: FloatArray, dropped: BoolArray, groups: NDArray[np.int64], locked: BoolArray) -> BoolArray:
    """Swap a dropped expert for a kept one of its group while the best such swap lowers the cost."""
    dropped = dropped.copy()
    diagonal = np.diag(cost)
    tolerance = 1e-12 * float(np.abs(cost).sum())
    for _ in range(4 * len(cost)):
        reach = cost @ dropped
        back = np.flatnonzero(dropped)  # leave the dropped set
        away = np.flatnonzero(~dropped & ~locked)  # enter it
        if not len(back) or not len(away):
            break
        change = (diagonal[back] - 2 * reach[back])[:, None] + (diagonal[away] + 2 * reach[away])[None, :]
        change -= 2 * cost[np.ix_(back, away)]
        change[groups[back][:, None] != groups[away][None, :]] = np.inf
        row, column = np.unravel_index(int(np.argmin(change)), change.shape)
        if not change[row, column] < -tolerance:
            break
        dropped[back[row]], dropped[away[column]] = False, True
    return dropped


def _marginal_cost(cost: FloatArray, dropped: BoolArray) -> FloatArray:
    """What each expert adds to the cost, given the others that are dropped: the score that people read."""
    return np.asarray(2 * cost @ dropped + np.diag(cost) * np.where(dropped, -1, 1))
