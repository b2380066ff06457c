"""Which experts are merged with which: a layer's statistics to a partition of its experts.

A grouping is a formula over one block of experts, which is the whole layer or, where the router works in groups, one of
those: experts of two router groups are never merged, and every group keeps the same number.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from moeprune.errors import PlanError, StrategyError, nearest
from moeprune.plans_fuse import Group
from moeprune.statistics import FloatArray, LayerStatistics
from moeprune.strategies import AUTO, BUILTIN, Strategy, resolve
from moeprune.strategies.selection import select

IntArray = NDArray[np.int64]
Partition = list[list[int]]  # positions in the block
GROUP_SIZE = 16  # most experts that REAM puts together


@dataclass(frozen=True, slots=True, kw_only=True)
class Grouping:
    """A way to decide which experts are merged.

    Attributes:
        name: as on the command line.
        partition: statistics, a block of experts and a count to so many groups of positions in the block.
        importance: how much each expert [E] counts for in its group.
        centred: whether the first expert of each group is the dominant one; else the most important one is.
        summary, paper: for people.
        needs: statistics that it reads.
    """

    name: str
    partition: Callable[[LayerStatistics, IntArray, int], Partition]
    importance: Callable[[LayerStatistics], FloatArray]
    centred: bool = True
    summary: str
    paper: str = ""
    needs: tuple[str, ...]


def group_experts(
    grouping: Grouping,
    stats: LayerStatistics,
    keep: int,
    *,
    n_group: int = 1,
    alone: Set[int] = frozenset(),
    equal: bool = False,
) -> tuple[Group, ...]:
    """Partition a layer's experts.

    Args:
        grouping: how.
        stats: of the layer.
        keep: number of groups, the same in each of ``n_group`` contiguous blocks.
        n_group: groups of a group-limited router.
        alone: experts that are merged with no other.
        equal: let every member count alike.

    Returns:
        Groups by their dominant expert, ascending.

    Raises:
        StrategyError: the statistics lack what the grouping needs.
        PlanError: more experts are to be left alone than there are groups.
    """
    importance_E = np.asarray(grouping.importance(stats), dtype=np.float64)
    found: list[Group] = []
    for block in np.arange(stats.num_experts).reshape(n_group, -1):
        single = [expert for expert in block.tolist() if expert in alone]
        rest = np.array([expert for expert in block.tolist() if expert not in alone], dtype=np.int64)
        count = keep // n_group - len(single)
        if count < (1 if len(rest) else 0):
            raise PlanError(f"{len(single)} experts stay alone and only {keep // n_group} may be left", "keep more")
        parts = [rest[part].tolist() for part in grouping.partition(stats, rest, count)] if len(rest) else []
        if not grouping.centred:
            parts = [sorted(part, key=lambda expert: (-importance_E[expert], expert)) for part in parts]
        found += [_group(part, importance_E, equal=equal) for part in (*([one] for one in single), *parts)]
    return tuple(sorted(found, key=lambda group: group.dominant))


def _group(members: Sequence[int], importance_E: FloatArray, *, equal: bool) -> Group:
    dominant, *others = members
    ordered = (dominant, *sorted(others))
    shares = importance_E[list(ordered)]
    if equal or not shares.sum() > 0:
        shares = np.ones(len(ordered))
    return Group(members=ordered, weights=tuple((shares / shares.sum()).tolist()))


# --- the groupings ----------------------------------------------------------------------------------------------------


def frequency(stats: LayerStatistics) -> FloatArray:
    """Tokens routed to each expert."""
    return stats.count


def saliency(stats: LayerStatistics) -> FloatArray:
    """Mean gated norm over each expert's own tokens (arXiv:2510.13999)."""
    return stats.gated_norm_sum / np.maximum(stats.count, 1)


def hc_smoe(stats: LayerStatistics, block: IntArray, count: int) -> Partition:
    """Agglomerative clusters, by average linkage, of the mean outputs over all tokens (arXiv:2410.08589)."""
    from scipy.cluster.hierarchy import cut_tree, linkage

    if len(block) == 1:
        return [[0]]
    means_BH = stats.output_sum_all[block] / max(float(stats.tokens), 1.0)
    labels = cut_tree(linkage(means_BH, method="average", metric="euclidean"), n_clusters=count)[:, 0]
    return [np.flatnonzero(labels == label).tolist() for label in range(count)]


def m_smoe(stats: LayerStatistics, block: IntArray, count: int) -> Partition:
    """The most frequent experts, each with those whose router logits are most like its own (arXiv:2310.01334)."""
    order = np.argsort(-frequency(stats)[block], kind="stable")
    return _joined(stats, block, np.sort(order[:count]))


def kept_by(strategy: Strategy, stats: LayerStatistics, block: IntArray, count: int) -> Partition:
    """The experts that a strategy would keep, each with those whose router logits are most like its own."""
    values = strategy(stats)
    own = values[block] if values.ndim == 1 else values[np.ix_(block, block)]
    return _joined(stats, block, np.array(select(own, count).keep))


def _joined(stats: LayerStatistics, block: IntArray, dominant: IntArray) -> Partition:
    """Groups of the dominant experts, each with the others whose router logits go with its own the most."""
    alike_BB = _cosines(stats.logit_gram[np.ix_(block, block)])
    groups = {int(one): [int(one)] for one in dominant}
    for other in sorted({*range(len(block))} - groups.keys()):
        groups[int(dominant[np.argmax(alike_BB[other, dominant])])].append(other)
    return list(groups.values())


def co_activation(stats: LayerStatistics, block: IntArray, count: int) -> Partition:
    """Groups of equal size of experts that serve the same tokens, as moe-pruner makes them.

    A group starts with an expert of the pair that is most often chosen together among those that are left, and grows by
    the one with the highest mean affinity to it.
    """
    affinity_BB = _scaled(stats.pair_count[np.ix_(block, block)])
    left, groups = list(range(len(block))), []
    for number in range(count):
        size = -(-len(left) // (count - number))
        group = [_first_of_best_pair(affinity_BB, left)]
        left.remove(group[0])
        while len(group) < size:
            best = max(left, key=lambda one: (affinity_BB[one, group].mean(), -one))
            group.append(best)
            left.remove(best)
        groups.append(group)
    return groups


def _scaled(pairs_BB: FloatArray) -> FloatArray:
    """Affinities between 0 and 1, of an expert with itself none."""
    apart = ~np.eye(len(pairs_BB), dtype=bool)
    low, high = (float(edge) for edge in (pairs_BB[apart].min(initial=np.inf), pairs_BB[apart].max(initial=-np.inf)))
    return np.where(apart, (pairs_BB - low) / (high - low), 0.0) if high > low else np.zeros_like(pairs_BB)


def _first_of_best_pair(affinity_BB: FloatArray, left: Sequence[int]) -> int:
    inside = affinity_BB[np.ix_(left, left)]
    return left[int(np.argmax(inside) // len(left))]


def ream(stats: LayerStatistics, block: IntArray, count: int) -> Partition:
    """The most salient experts, each with up to 15 of its likes, the most salient one first (arXiv:2604.04356).

    Alike are experts whose mean gated outputs point the same way and whose router logits go together. Where so many
    groups of 16 would not hold all experts, they hold more.
    """
    alike_BB = _alike_in_both(stats, block)
    order = np.argsort(-saliency(stats)[block], kind="stable").tolist()
    centroids, left = order[:count], set(order[count:])
    room = max(GROUP_SIZE, -(-len(block) // count)) - 1
    groups = []
    for centroid in centroids:
        nearest_first = sorted(left, key=lambda one: (-alike_BB[centroid, one], one))
        groups.append([centroid, *nearest_first[:room]])
        left -= set(nearest_first[:room])
    return groups


def _alike_in_both(stats: LayerStatistics, block: IntArray) -> FloatArray:
    """Half the similarity of mean gated outputs, half that of router logits, each between 0 and 1."""
    means_BH = stats.gated_output_sum[block] / np.maximum(stats.count[block], 1)[:, None]
    outputs_BB = (1 + _cosines(means_BH @ means_BH.T)) / 2
    distance_BB = np.sqrt(np.maximum(2 - 2 * _cosines(stats.logit_gram[np.ix_(block, block)]), 0))
    return (outputs_BB + 1 - distance_BB / 2) / 2


def _cosines(gram_BB: FloatArray) -> FloatArray:
    """Cosines from inner products; 0 with what is all 0."""
    norms = np.sqrt(np.maximum(np.diagonal(gram_BB), 0))
    scale = np.outer(norms, norms)
    cosines_BB: FloatArray = np.divide(gram_BB, scale, out=np.zeros_like(gram_BB), where=scale > 0)
    return cosines_BB


GROUPINGS: Mapping[str, Grouping] = MappingProxyType(
    {
        one.name: one
        for one in (
            Grouping(
                name="hc-smoe",
                partition=hc_smoe,
                importance=frequency,
                centred=False,
                summary="clusters of the mean outputs over all tokens",
                paper="2410.08589",
                needs=("output_sum_all", "tokens", "count"),
            ),
            Grouping(
                name="m-smoe",
                partition=m_smoe,
                importance=frequency,
                summary="the most frequent experts, each with those of the most similar router logits",
                paper="2310.01334",
                needs=("logit_gram", "count"),
            ),
            Grouping(
                name="co-activation",
                partition=co_activation,
                importance=frequency,
                centred=False,
                summary="groups of equal size of experts that serve the same tokens",
                needs=("pair_count", "count"),
            ),
            Grouping(
                name="ream",
                partition=ream,
                importance=saliency,
                summary="the most salient experts, the first of them with the nearest others",
                paper="2604.04356",
                needs=("gated_output_sum", "logit_gram", "gated_norm_sum", "count"),
            ),
        )
    }
)


def find_grouping(name: str) -> Grouping:
    """A grouping by its name, or by that of a strategy, whose kept experts are then the dominant ones.

    Raises:
        StrategyError: there is none of that name, or the strategy does more than score the experts of a layer.
    """
    if name in GROUPINGS:
        return GROUPINGS[name]
    try:
        strategy = resolve(name)
    except StrategyError:
        raise StrategyError(f"unknown grouping {name!r}", nearest(name, [*GROUPINGS, *BUILTIN])) from None
    if strategy.across_layers or strategy.search or strategy.name == AUTO.name:
        raise StrategyError(f"strategy {name!r} does not score one layer by a formula", "group by another one")
    return Grouping(
        name=strategy.name,
        partition=functools.partial(kept_by, strategy),
        importance=frequency,
        summary=f"the experts that {strategy.name} keeps, each with those of the most similar router logits",
        paper=strategy.paper,
        needs=(*strategy.needs, "logit_gram", "count"),
    )
