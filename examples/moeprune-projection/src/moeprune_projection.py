"""Prunes the experts that contribute least to the direction of their layer's output.

A token's routed output y is the sum of g f(x) over its experts, g the gate and f(x) the expert's output. The length of
one g f(x) along y is its part of ‖y‖, and these parts add up to ‖y‖: an expert whose output the others cancel gets
little or less than nothing, however long it is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from moeprune import Statistic, Strategy

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

    from moeprune import LayerStatistics, Slots


def measure(slots: Slots) -> torch.Tensor:
    """Lengths of the experts' weighted outputs along the layer's output, added up by expert, [E].

    Args:
        slots: what the experts of one layer do with T tokens, each routed to K of E experts.
    """
    import torch

    along_TH = torch.nn.functional.normalize(slots.routed_TH.float(), dim=-1)
    lengths_TK = torch.einsum("tkh,th->tk", slots.outputs_TKH.float(), along_TH)
    return slots.by_expert(slots.gates_TK * lengths_TK)


def projection(stats: LayerStatistics) -> NDArray[np.float64]:
    """How much of the length of the layer's output comes from each expert, over all tokens, [E]; higher stays."""
    return stats.projection_sum


PROJECTION_SUM = Statistic(axes="E", meaning="sum of g⟨f(x), y⟩/‖y‖, y the layer's routed output", measure=measure)
PROJECTION = Strategy(
    name="projection",
    criterion=projection,
    summary="sum of the lengths of gated outputs along the layer's output",
    needs=("projection_sum",),
)
