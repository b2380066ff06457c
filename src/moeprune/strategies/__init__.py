"""Strategies by name: pure formulas over statistics, with the paper they come from.

A strategy sees the statistics of one layer and returns scores [E] (higher stays) or drop costs [E, E]; it never sees a
model, a device or a path. Pass any such callable from Python, or publish one under the entry-point group
``moeprune.strategies``; the names below always win.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from moeprune.errors import StrategyError, nearest
from moeprune.statistics import FloatArray, LayerStatistics
from moeprune.strategies.interaction import gram, hope, hope_total
from moeprune.strategies.saliency import Saliency, random_control

Criterion = Callable[[LayerStatistics], FloatArray]
DEFAULT = "hope-total"


@dataclass(frozen=True, slots=True, kw_only=True)
class Strategy:
    """A criterion under its name.

    Attributes:
        name: what the command line and the plan call it.
        criterion: statistics of a layer to scores [E] or drop costs [E, E].
        summary: one line for people.
        paper: arXiv id, or empty.
        calibrated: whether it needs calibration data.
    """

    name: str
    criterion: Criterion
    summary: str = ""
    paper: str = ""
    calibrated: bool = True

    def __call__(self, stats: LayerStatistics) -> FloatArray:
        """Scores [E] or drop costs [E, E] of one layer.

        Raises:
            StrategyError: a statistic is missing, or the criterion's values are not finite numbers of that shape.
        """
        values, experts = np.asarray(self.criterion(stats), dtype=np.float64), stats.num_experts
        if values.shape not in {(experts,), (experts, experts)} or not np.isfinite(values).all():
            raise StrategyError(
                f"strategy {self.name!r}, layer {stats.layer}: {experts} experts need as many finite scores",
                "a criterion returns scores [E], higher stays, or drop costs [E, E]",
            )
        return values


_FAMILY = "2606.15716"

BUILTIN: Mapping[str, Strategy] = {
    strategy.name: strategy
    for strategy in (
        Strategy(
            name="frequency", criterion=Saliency(0, 0, 0), summary="tokens routed to the expert", paper="2404.05089"
        ),
        Strategy(name="routing-mass", criterion=Saliency(0, 1, 0), summary="sum of gates", paper=_FAMILY),
        Strategy(name="ean", criterion=Saliency(0, 0, 1), summary="sum of output norms", paper="2510.13999"),
        Strategy(name="man", criterion=Saliency(1, 0, 1), summary="mean output norm", paper=_FAMILY),
        Strategy(name="msan", criterion=Saliency(1, 0, 2), summary="mean squared output norm", paper=_FAMILY),
        Strategy(name="reap", criterion=Saliency(1, 1, 1), summary="mean gated output norm", paper="2510.13999"),
        Strategy(name="gated-norm", criterion=Saliency(0, 1, 1), summary="sum of gated output norms", paper=_FAMILY),
        Strategy(
            name="gated-norm-sq", criterion=Saliency(0, 2, 2), summary="sum of squared gated norms", paper=_FAMILY
        ),
        Strategy(
            name="hope", criterion=hope, summary="pairwise gated norms, mean over shared tokens", paper="2609.18916"
        ),
        Strategy(
            name="hope-total",
            criterion=hope_total,
            summary="pairwise gated norms, mean over all tokens",
            paper="2609.18916",
        ),
        Strategy(name="gram", criterion=gram, summary="squared change of the layer's routed output"),
        Strategy(name="random", criterion=random_control, summary="control: uniform draws", calibrated=False),
    )
}


def resolve(strategy: str | Criterion | Strategy) -> Strategy:
    """Find a strategy by name, or wrap a callable.

    ``S(b,alpha,beta)`` names any member of the saliency family.

    Raises:
        StrategyError: the name is unknown.
    """
    if isinstance(strategy, Strategy):
        return strategy
    if not isinstance(strategy, str):
        return Strategy(name=getattr(strategy, "__name__", type(strategy).__name__), criterion=strategy)
    if strategy in BUILTIN:
        return BUILTIN[strategy]
    member = re.fullmatch(r"[sS]\(\s*(\d+(?:\.\d+)?)\s*,\s*(\d)\s*,\s*(\d)\s*\)", strategy)
    if member:
        criterion = Saliency(float(member[1]), int(member[2]), int(member[3]))
        return Strategy(name=strategy, criterion=criterion, paper=_FAMILY)
    return _from_entry_points(strategy)


def _from_entry_points(name: str) -> Strategy:
    from importlib.metadata import entry_points

    for point in entry_points(group="moeprune.strategies", name=name):
        loaded = point.load()
        return loaded if isinstance(loaded, Strategy) else Strategy(name=name, criterion=loaded)
    raise StrategyError(f"unknown strategy {name!r}", nearest(name, BUILTIN))
