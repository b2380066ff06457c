"""A search over the number of experts that each layer keeps, by what candidates do to the predictions (EvoESAP).

As in arXiv:2603.06003 the order inside a layer is the strategy's and only the counts change, by mutation alone: a child
moves experts from some layers to others, so that their sum stays. The paper's cost is one minus the overlap of the
next-token distributions; here the caller says what a candidate costs, lower is better.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

Counts = tuple[int, ...]  # steps that each layer keeps
Cost = Callable[[Sequence[Counts]], Sequence[float]]
POPULATION = 32
_PARENTS = 4  # the best so far, from which all children come
_MOVES, _WIDTH = 3, 4  # most moves in a child, and most steps in a move
_TRIES = 50  # mutations that may turn out to be known before a generation is smaller


@dataclass(slots=True, kw_only=True)
class Evolution:
    """The best counts so far, which an interrupted search gives too.

    Attributes:
        best: steps that each layer keeps; cost: what that costs.
        first: cost of the first start.
        scored: candidates that were scored.
        generation: generations that are done.
        finished: whether all of them are.
    """

    best: Counts
    cost: float
    first: float
    scored: int
    generation: int = 0
    finished: bool = False


def evolve(
    starts: Sequence[Counts],
    cost: Cost,
    *,
    least: Counts,
    most: int,
    generations: int = 20,
    population: int = POPULATION,
    seed: int = 0,
) -> Iterator[Evolution]:
    """Search for counts of low cost whose sum is that of the starts.

    Args:
        starts: counts to begin with, the first of which is what the result is compared with.
        cost: costs of many candidates in one call, in the order given; never asked twice for the same.
        least: steps that each layer cannot do without.
        most: steps that a layer has.
        generations: how often children are made.
        population: parents and children of a generation.
        seed: of the mutations.

    Yields:
        The state after the starts and after each generation, better every time or as it was; stop whenever you like.

    Example:
        >>> def cost(found):
        ...     return [abs(counts[0] - 5) for counts in found]
        >>> [*_, end] = evolve([(8, 8)], cost, least=(1, 1), most=16)
        >>> end.best
        (5, 11)
    """
    rng = np.random.default_rng(seed)
    known: dict[Counts, float] = {}
    _score(known, list(dict.fromkeys(starts)), cost)

    def state(generation: int, *, finished: bool) -> Evolution:
        best = min(known, key=lambda counts: (known[counts], counts))
        return Evolution(
            best=best,
            cost=known[best],
            first=known[starts[0]],
            scored=len(known),
            generation=generation,
            finished=finished,
        )

    yield state(0, finished=generations == 0)
    for generation in range(1, generations + 1):
        parents = sorted(known, key=lambda counts: (known[counts], counts))[:_PARENTS]
        children = _children(parents, known, population - len(parents), least, most, rng)
        if not children:  # everything in reach is known
            yield state(generation - 1, finished=True)
            return
        _score(known, children, cost)
        yield state(generation, finished=generation == generations)


def _score(known: dict[Counts, float], found: list[Counts], cost: Cost) -> None:
    known.update(zip(found, map(float, cost(found)), strict=True))


def _children(
    parents: Sequence[Counts],
    known: dict[Counts, float],
    wanted: int,
    least: Counts,
    most: int,
    rng: np.random.Generator,
) -> list[Counts]:
    """New counts, each a mutation of a parent."""
    found: dict[Counts, None] = {}
    for _ in range(wanted * _TRIES):
        child = _mutated(parents[int(rng.integers(len(parents)))], least, most, rng)
        if child not in known:
            found[child] = None
        if len(found) == wanted:
            break
    return list(found)


def _mutated(counts: Counts, least: Counts, most: int, rng: np.random.Generator) -> Counts:
    """Move a few steps from one layer to another, a few times."""
    child = list(counts)
    for _ in range(rng.integers(1, _MOVES + 1)):
        givers = [layer for layer, count in enumerate(child) if count > least[layer]]
        takers = [layer for layer, count in enumerate(child) if count < most]
        if not givers or not takers:
            break
        giver, taker = (int(rng.choice(layers)) for layers in (givers, takers))
        if giver != taker:
            width = int(rng.integers(1, 1 + min(_WIDTH, child[giver] - least[giver], most - child[taker])))
            child[giver] -= width
            child[taker] += width
    return tuple(child)
