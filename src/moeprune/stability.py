"""How far calibration data can be trusted: whether its two halves, each on its own, rank the experts alike.

The scores from all of the data are the sums of both halves, so their reliability follows from the correlation r of the
halves by the formula of Spearman and Brown: R = 2r / (1 + r) is what one would expect between this calibration and
another one of the same size. Runs without torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from moeprune.errors import StrategyError
from moeprune.statistics import RouterStatistics
from moeprune.strategies import BUILTIN
from moeprune.strategies.selection import Selection

RELIABLE = 0.95  # scores that would correlate like this with those of as much new data
LEAST = 0.05  # a correlation below this is noise, from which nothing follows but that much more data is needed
Choose = Callable[[RouterStatistics, Sequence[int]], Mapping[int, Selection]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Stability:
    """What two halves of the calibration data have in common, by decoder layer.

    Attributes:
        rank: Spearman's correlation between their scores of the experts; without layers whose scores are all equal.
        agree: share of the kept experts that both halves would keep; kept / E is what chance gives. Empty where nothing
            was chosen.
    """

    rank: Mapping[int, float]
    agree: Mapping[int, float]

    @property
    def median(self) -> float:
        """Median of the layers' rank correlations."""
        return float(np.median(list(self.rank.values())))

    @property
    def lowest(self) -> int:
        """The layer with the lowest rank correlation."""
        return min(self.rank, key=lambda layer: self.rank[layer])

    @property
    def reliability(self) -> float:
        """R, of the median layer's scores from all of the data; correlations below a least one count as that."""
        rank = max(self.median, LEAST)
        return 2 * rank / (1 + rank)

    @property
    def data_factor(self) -> float:
        """How many times as much data would make the scores of the median layer reliable, by Spearman and Brown."""
        return RELIABLE * (1 - self.reliability) / (self.reliability * (1 - RELIABLE))

    def __str__(self) -> str:
        worst = f"layer {self.lowest} the lowest, {self.rank[self.lowest]:.2f}"
        return (
            f"the two halves of the calibration data rank the experts with a correlation of {self.median:.2f} ({worst})"
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON values: the layers, and the median and the lowest of their rank correlations."""
        layers = {
            str(layer): {"rank": round(rank, 4)} | ({"agree": round(self.agree[layer], 4)} if self.agree else {})
            for layer, rank in sorted(self.rank.items())
        }
        return {"layers": layers, "median": round(self.median, 4), "lowest": round(self.rank[self.lowest], 4)}


def split_half(statistics: RouterStatistics, choose: Choose, layers: Iterable[int]) -> Stability | None:
    """Compare what the two halves of the calibration data say.

    Drop costs [E, E] are compared by the scores that people read in a plan: what each expert adds to the cost of the
    set that its own half would drop.

    Args:
        statistics: what was measured.
        choose: the scores and the choice that statistics lead to, in each of some layers.
        layers: decoder layers to compare.

    Returns:
        The comparison; None where a half is unknown, or saw too little to be scored on its own.
    """
    known = [layer for layer in layers if layer in statistics.first_half]
    if not known:
        return None
    try:
        one, two = (choose(half, known) for half in statistics.halves())
    except StrategyError:
        return None
    pairs = {layer: (one[layer], two[layer]) for layer in known}
    ranks = {layer: _rank_correlation(first.scores, second.scores) for layer, (first, second) in pairs.items()}
    rank = {layer: value for layer, value in ranks.items() if value is not None}
    agree = {
        layer: len({*first.keep} & {*second.keep}) / len(first.keep)
        for layer, (first, second) in pairs.items()
        if first.keep
    }
    return Stability(rank=rank, agree=agree) if rank else None


def gated_norm_stability(statistics: RouterStatistics) -> Stability | None:
    """Compare the halves by the scores of ``gated-norm``, before anybody has asked for a plan."""

    def choose(part: RouterStatistics, layers: Sequence[int]) -> dict[int, Selection]:
        scores = BUILTIN["gated-norm"].scores({layer: part.layer(layer) for layer in layers})
        return {layer: Selection(keep=(), scores=tuple(values)) for layer, values in scores.items()}

    return split_half(statistics, choose, statistics.layers)


def _rank_correlation(first: tuple[float, ...], second: tuple[float, ...]) -> float | None:
    """Spearman's, or None where one side does not rank at all."""
    from scipy.stats import spearmanr

    if len({*first}) == 1 or len({*second}) == 1:
        return None
    return float(spearmanr(first, second).statistic)
