"""Search for the experts with which a layer's output comes closest to the original's, as NAEE does (arXiv:2402.14800).

The loss of a set is measured by running the layer without the other experts, the router's top-k taken anew among those
that stay, so that no statistic can stand in for it: the search is given a function. It looks at every set where they
are few. Else it starts from what another strategy would keep and, without router groups, from greedy elimination, and
exchanges one expert for another while that helps.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence, Set
from dataclasses import dataclass, field
from typing import Any

from moeprune.strategies.selection import Selection

Keep = tuple[int, ...]
Loss = Callable[[Keep], float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """The best set of one layer.

    Attributes:
        keep: experts that stay, ascending.
        loss: of that set.
        start_loss: of the set that the search started from.
        calls: how many sets were looked at.
        complete: whether these were all, so that none is better.
    """

    keep: Keep
    loss: float
    start_loss: float
    calls: int
    complete: bool

    def to_dict(self) -> dict[str, Any]:
        """Rounded for a plan file."""
        rounded = {name: float(f"{getattr(self, name):.6g}") for name in ("start_loss", "loss")}
        return rounded | {"calls": self.calls, "complete": self.complete}


def reconstruct(
    loss: Loss, start: Selection, *, n_group: int = 1, protected: Set[int] = frozenset(), calls: int = 256
) -> Found:
    """Find the experts to keep in one layer.

    Args:
        loss: distance of the layer's output from the original's, by the experts that stay.
        start: a choice to start from; how many it keeps is how many stay, and its scores say what to try first.
        n_group: groups of a group-limited router; each keeps the same number.
        protected: experts that stay.
        calls: most sets to look at.

    Returns:
        A set that is never worse than the start; of equal ones the first that was looked at.

    Example:
        >>> found = reconstruct(lambda keep: subset_loss(3, keep), select(reap(stats), 8))
        >>> found.keep, found.loss / found.start_loss
    """
    search = _Search(loss=loss, start=start, n_group=n_group, protected=frozenset(protected), left=max(1, calls))
    start_loss = search.look(start.keep)
    complete = search.number_of_sets() <= calls
    if complete:
        for keep in search.every_set():
            search.look(keep)
    else:
        if n_group == 1:  # on the way groups would be unequal, which a router cannot run
            search.eliminate(calls // 2)
        search.exchange()
    best = search.best()
    return Found(keep=best, loss=search.seen[best], start_loss=start_loss, calls=len(search.seen), complete=complete)


class _SpentError(Exception):
    """No more sets may be looked at."""


@dataclass(slots=True, kw_only=True)
class _Search:
    """One layer's sets and their losses; ``left`` is how many more may be looked at."""

    loss: Loss
    start: Selection
    n_group: int
    protected: frozenset[int]
    left: int
    seen: dict[Keep, float] = field(default_factory=dict)

    @property
    def blocks(self) -> list[range]:
        """Experts by group."""
        size = len(self.start.scores) // self.n_group
        return [range(first, first + size) for first in range(0, len(self.start.scores), size)]

    def look(self, keep: Keep) -> float:
        """The loss of a set, measured once."""
        if keep not in self.seen:
            if not self.left:
                raise _SpentError
            self.seen[keep] = self.loss(keep)
            self.left -= 1
        return self.seen[keep]

    def best(self) -> Keep:
        """Of the sets of the right size the best that was looked at."""
        right = [keep for keep in self.seen if len(keep) == len(self.start.keep)]
        return min(right, key=lambda keep: self.seen[keep])

    def number_of_sets(self) -> int:
        """How many sets there are."""
        per_group = len(self.start.keep) // self.n_group
        locked = [len(self.protected & {*block}) for block in self.blocks]
        return math.prod(
            math.comb(len(block) - fixed, per_group - fixed) for block, fixed in zip(self.blocks, locked, strict=True)
        )

    def every_set(self) -> Iterator[Keep]:
        """All sets with the protected experts, the same number from each group."""
        per_group = len(self.start.keep) // self.n_group
        in_groups = []
        for block in self.blocks:
            fixed = self.protected & {*block}
            free = [expert for expert in block if expert not in fixed]
            chosen = itertools.combinations(free, per_group - len(fixed))
            in_groups.append([(*fixed, *some) for some in chosen])
        for parts in itertools.product(*in_groups):
            yield tuple(sorted(itertools.chain(*parts)))

    def eliminate(self, calls: int) -> None:
        """From all experts drop one after the other: of the worst few the one without which the loss is least."""
        steps = len(self.start.scores) - len(self.start.keep)
        width = calls // steps
        if width < 2:
            return  # the worst one every time is what the start is
        keep = tuple(range(len(self.start.scores)))
        for _ in range(steps):
            worst = self._removable(keep)[:width]
            keep = min((_without(keep, expert) for expert in worst), key=self.look)

    def _removable(self, keep: Keep) -> list[int]:
        """Experts that may go, worst first; of equal ones the last."""
        free = [expert for expert in keep if expert not in self.protected]
        return sorted(free, key=lambda expert: (self.start.scores[expert], -expert))

    def exchange(self) -> None:
        """From the best set so far exchange one expert for another of its group while that lowers the loss."""
        best = self.best()
        try:
            while (better := self._first_better(best)) is not None:
                best = better
        except _SpentError:
            pass

    def _first_better(self, keep: Keep) -> Keep | None:
        scores = self.start.scores
        pairs = [
            (scores[inside] - scores[outside], inside, outside)
            for block in self.blocks
            for inside in block
            if inside in keep and inside not in self.protected
            for outside in block
            if outside not in keep
        ]
        for _, inside, outside in sorted(pairs):
            swapped = tuple(sorted((*_without(keep, inside), outside)))
            if self.look(swapped) < self.seen[keep]:
                return swapped
        return None


def _without(keep: Sequence[int], expert: int) -> Keep:
    return tuple(one for one in keep if one != expert)
