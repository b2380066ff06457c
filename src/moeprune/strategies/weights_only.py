"""Criteria that look at the experts' weights alone and need no calibration data."""

from __future__ import annotations

import numpy as np

from moeprune.statistics import FloatArray, LayerStatistics
from moeprune.strategies.saliency import mean


def aimer(stats: LayerStatistics) -> FloatArray:
    """Root mean square of an expert's weights over their mean absolute value (arXiv:2603.18492).

    The paper ranks by the inverse and removes the highest; this way round, higher stays and no score is negative. Over
    all weights of gate, up and down, so that the scale of an expert does not matter.
    """
    return mean(np.sqrt(stats.weight_sq_sum * stats.weight_numel), stats.weight_abs_sum)
