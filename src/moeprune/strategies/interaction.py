"""Criteria that see pairs of experts: the cost of dropping a set S is 1_S^T M 1_S for a matrix M [E, E].

A formula returns M; :func:`moeprune.strategies.selection.select` looks for the set with the least cost.
"""

from __future__ import annotations

import numpy as np

from moeprune.statistics import FloatArray, LayerStatistics
from moeprune.strategies.saliency import mean


def hope(stats: LayerStatistics) -> FloatArray:
    """Mean product of gated norms over the tokens routed to both experts, as published (arXiv:2609.18916).

    The paper relaxes the choice to a box and rounds; here the same objective is minimised over sets directly.
    """
    return mean(stats.pair_gated_norm, stats.pair_count)


def hope_total(stats: LayerStatistics) -> FloatArray:
    """HOPE's objective as its derivation has it: products of gated norms averaged over all tokens (arXiv:2609.18916).

    Without the conditional mean, rarely shared pairs do not weigh as much as common ones.
    """
    return np.asarray(stats.pair_gated_norm / stats.tokens)


def gram(stats: LayerStatistics) -> FloatArray:
    """Mean inner product of gated outputs: 1_S^T M 1_S is the mean squared change of the layer's routed output.

    Exact for a fixed routing: HOPE's matrix bounds the same quantity by norms and cannot see two experts that cancel.
    """
    return np.asarray(stats.gram / stats.tokens)
