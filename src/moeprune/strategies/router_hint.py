"""Router hints: the weight saliency of MoE-Pruner, added up over an expert (arXiv:2410.12013).

MoE-Pruner scores a single weight of an expert's linear by

    |W_ij| * a_j,  a_j = sqrt(sum over the tokens routed to the expert of (g x_j)^2)

with x the input of that linear and g the weight the model multiplied the expert by. The paper removes weights, never
experts: how their scores make one of the expert is not from it. A sum over rows needs the L1 norms of columns only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from moeprune.statistics import FloatArray, LayerStatistics
from moeprune.strategies.saliency import mean

Aggregation = Literal["sum", "mean-tok", "down-only"]


@dataclass(frozen=True, slots=True)
class RouterHint:
    """The scores of an expert's weights as one of the expert.

    Attributes:
        aggregation: ``sum``: over all weights of gate, up and down, so that busy experts count for more;
            ``mean-tok``: the same with the mean over the expert's own tokens in a_j; ``down-only``: that over the down
            projection alone.
    """

    aggregation: Aggregation = "mean-tok"

    def __call__(self, stats: LayerStatistics) -> FloatArray:
        """Scores [E]; an expert that was never routed to scores 0."""
        total_E = (stats.down_col_l1 * np.sqrt(stats.gated_mid_sq_sum)).sum(axis=1)
        if self.aggregation != "down-only":
            total_E += ((stats.gate_col_l1 + stats.up_col_l1) * np.sqrt(stats.gated_in_sq_sum)).sum(axis=1)
        return total_E if self.aggregation == "sum" else mean(total_E, np.sqrt(stats.count))

    @property
    def needs(self) -> tuple[str, ...]:
        """The statistics that it reads."""
        down = ("down_col_l1", "gated_mid_sq_sum")
        inner = () if self.aggregation == "down-only" else ("gate_col_l1", "up_col_l1", "gated_in_sq_sum")
        return (*down, *inner) if self.aggregation == "sum" else (*down, *inner, "count")
