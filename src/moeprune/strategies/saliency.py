"""Criteria that score each expert on its own: the family S(b, alpha, beta), its neighbours and the random control.

    S_e(b, alpha, beta) = n_e^-b * sum over the tokens routed to e of g^alpha * ||f_e(x)||^beta

with n_e the number of those tokens, g the weight the model really multiplied by and f_e(x) the expert's un-gated
output (arXiv:2606.15716). Higher is better.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moeprune.errors import StrategyError
from moeprune.statistics import FloatArray, LayerStatistics

# The sums that are collected, by (alpha, beta).
_SUMS = {
    (0, 0): "count",
    (1, 0): "gate_sum",
    (2, 0): "gate_sq_sum",
    (0, 1): "norm_sum",
    (0, 2): "norm_sq_sum",
    (1, 1): "gated_norm_sum",
    (2, 2): "gated_norm_sq_sum",
}


@dataclass(frozen=True, slots=True)
class Saliency:
    """One member of the family S(b, alpha, beta).

    Attributes:
        b: 1 for the mean over the expert's own tokens, 0 for the sum, so that busy experts count for more.
        alpha: power of the gate.
        beta: power of the output norm.
    """

    b: float
    alpha: int
    beta: int

    def __post_init__(self) -> None:
        if (self.alpha, self.beta) not in _SUMS:
            known = ", ".join(f"({alpha},{beta})" for alpha, beta in _SUMS)
            raise StrategyError(
                f"no sum is collected for (alpha, beta) = ({self.alpha},{self.beta})", f"known: {known}"
            )

    def __call__(self, stats: LayerStatistics) -> FloatArray:
        """Scores [E]; an expert that was never routed to scores 0."""
        total: FloatArray = getattr(stats, _SUMS[self.alpha, self.beta])
        return total if self.b == 0 else mean(total, stats.count**self.b)

    @property
    def needs(self) -> tuple[str, ...]:
        """The statistics that it reads."""
        total = _SUMS[self.alpha, self.beta]
        return (total,) if self.b == 0 or total == "count" else (total, "count")


def mean(total: FloatArray, count: FloatArray) -> FloatArray:
    """Sums over counts, 0 where nothing was counted; a weighted count may lie between 0 and 1."""
    return np.divide(total, count, out=np.zeros_like(total), where=count > 0)


def seer(stats: LayerStatistics) -> FloatArray:
    """Probability that the router gives the expert, added up over all tokens, chosen or not (arXiv:2404.05089).

    The hard count of the same paper is ``frequency``; that over the chosen experts' gates is ``routing-mass``.
    """
    return stats.soft_prob_sum


def easy_ep(stats: LayerStatistics) -> FloatArray:
    """Sum of gated norms, each token weighted by how far the experts turn the residual stream (arXiv:2504.06792).

    The weight is max(1 - cos(h, h + routed), 0) for the stream h and the routed experts' output.
    """
    return stats.easy_ep_sum


def random_control(stats: LayerStatistics) -> FloatArray:
    """Uniform draws from the plan's seed: the control that every criterion must beat."""
    return stats.rng.random(stats.num_experts)
