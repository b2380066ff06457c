"""Order of the kept experts: expert-parallel groups that carry equal load (the rearrangement of arXiv:2601.14327).

Engines give each device a contiguous block of experts. Any order of the experts, with the router's rows in the same
order, computes the same, so the busy ones can be spread over the blocks.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from moeprune.statistics import FloatArray


def balanced_order(load: FloatArray, keep: Sequence[int], groups: int, *, n_group: int = 1) -> tuple[int, ...]:
    """The kept experts in an order whose contiguous groups carry about the same load.

    The busiest expert first, each goes to the group with the least load that has room; a plan that is balanced better
    as it is stays so. Experts never leave their router group.

    Args:
        load: tokens routed to each expert, [E].
        keep: experts that stay, ascending, equally many of each router group.
        groups: expert-parallel groups; a multiple of ``n_group`` that divides the kept experts.
        n_group: groups of a group-limited router.

    Example:
        >>> balanced_order(np.array([9.0, 8.0, 2.0, 1.0]), (0, 1, 2, 3), 2)
        (0, 3, 1, 2)
    """
    blocks = np.array(keep).reshape(n_group, -1)
    order = tuple(expert for block in blocks for expert in _spread(load, block.tolist(), groups // n_group))
    return min(tuple(keep), order, key=lambda experts: imbalance(load, experts, groups))


def _spread(load: FloatArray, experts: list[int], groups: int) -> list[int]:
    """Greedy, longest processing time first, into groups of one size; inside a group ascending."""
    room = len(experts) // groups
    members: list[list[int]] = [[] for _ in range(groups)]
    for expert in sorted(experts, key=lambda one: (-load[one], one)):
        open_groups = [group for group in members if len(group) < room]
        min(open_groups, key=lambda group: float(load[group].sum())).append(expert)
    return [expert for group in members for expert in sorted(group)]


def imbalance(load: FloatArray, order: Sequence[int], groups: int) -> float:
    """Load of the busiest contiguous group over that of the mean group; 1 is perfect, and what no load at all gives."""
    sums = load[list(order)].reshape(groups, -1).sum(axis=1)
    return float(sums.max() / sums.mean()) if sums.any() else 1.0
