"""Experts that no criterion may drop."""

from __future__ import annotations

import numpy as np

from moeprune.statistics import RouterStatistics

_EARLY = 0.75  # massive activations form in the first layers; the reference code looks at this share of them


def super_experts(statistics: RouterStatistics) -> dict[int, frozenset[int]]:
    """Experts whose outputs hold the model's massive activations (arXiv:2507.23279).

    An expert is one when its largest absolute output is above the 99.5th percentile of all experts and above a tenth of
    the largest, in the first three quarters of the MoE layers. Dropping three of 6,144 took Qwen3-30B from 70 to 55.

    Returns:
        Protected experts by layer; empty when nothing was calibrated.
    """
    layers = sorted(statistics.layers)
    rows = [statistics.layers[layer].get("max_abs_down") for layer in layers]
    if not statistics.tokens or any(row is None or not len(row) for row in rows):
        return {}
    peak_LE = np.stack([row.max(axis=0) for row in rows if row is not None])
    threshold = max(float(np.percentile(peak_LE, 99.5)), float(peak_LE.max()) / 10)
    early = int(np.ceil(_EARLY * len(layers)))
    # >= because on a small model the percentile interpolates up to the largest value itself
    if threshold <= 0:
        return {}
    found = {layers[row]: frozenset(np.flatnonzero(peak_LE[row] >= threshold).tolist()) for row in range(early)}
    return {layer: experts for layer, experts in found.items() if experts}
