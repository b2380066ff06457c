"""What a strategy computes: a formula over one layer, or over all layers at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from moeprune.statistics import FloatArray, LayerStatistics

Criterion = Callable[[LayerStatistics], FloatArray]
Layers = Mapping[int, LayerStatistics]  # by decoder layer, ascending


@dataclass(frozen=True, slots=True)
class GlobalCriterion:
    """A formula that looks at all decoder layers together, such as one over paths through them.

    Attributes:
        formula: statistics by layer to scores [E] or drop costs [E, E] by layer.

    Example:
        >>> @GlobalCriterion
        ... def share_of_all(layers):
        ...     total = sum(stats.gated_norm_sum.sum() for stats in layers.values())
        ...     return {layer: stats.gated_norm_sum / total for layer, stats in layers.items()}
        >>> plan = moeprune.plan("statistics.safetensors", "base", ratio=0.5, strategy=share_of_all)
    """

    formula: Callable[[Layers], Mapping[int, FloatArray]]

    @property
    def name(self) -> str:
        """Name of the formula."""
        return getattr(self.formula, "__name__", type(self.formula).__name__)

    def __call__(self, layers: Layers) -> Mapping[int, FloatArray]:
        """Scores [E], higher stays, or drop costs [E, E], by layer."""
        return self.formula(layers)
