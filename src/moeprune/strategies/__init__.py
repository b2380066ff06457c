"""Strategies by name: pure formulas over statistics, with the paper they come from and what they need.

A strategy sees the statistics of one layer, or as a :class:`GlobalCriterion` of all layers, and returns scores [E]
(higher stays) or drop costs [E, E]; it never sees a model, a device or a path. Pass any such callable from Python, or
publish one under the entry-point group ``moeprune.strategies``; the names below always win.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from moeprune._plugins import PlugIn, find_plug_in, published_names
from moeprune.catalogue import find
from moeprune.errors import StrategyError, nearest
from moeprune.statistics import FloatArray, LayerStatistics
from moeprune.strategies.criterion import Criterion, GlobalCriterion, Layers
from moeprune.strategies.interaction import gram, hope, hope_total
from moeprune.strategies.router_hint import Aggregation, RouterHint
from moeprune.strategies.saliency import Saliency, easy_ep, random_control, seer
from moeprune.strategies.trajectory import Pathfinder, maestro
from moeprune.strategies.weights_only import aimer

__all__ = ["AUTO", "BUILTIN", "COLLECTING", "DEFAULT", "Criterion", "GlobalCriterion", "Strategy", "resolve"]

DEFAULT = "hope-total"


COLLECTING = "one pass over the calibration data"
Search = Literal["", "layer-wise", "progressive"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Strategy:
    """A criterion under its name.

    Attributes:
        name: what the command line and the plan call it.
        criterion: statistics to scores [E] or drop costs [E, E], of a layer or of all layers.
        summary: one line for people.
        paper: arXiv id, or empty.
        calibrated: whether it needs calibration data.
        needs: the statistics that it reads.
        cost: what collecting them takes, for people.
        search: where the criterion only says what to start from: whether the losses by which sets of experts are
            compared are measured on what the original's layers give each other, or those that were pruned before.
        package: name and version of the package that publishes it; empty for what is built in.
    """

    name: str
    criterion: Criterion | GlobalCriterion
    summary: str = ""
    paper: str = ""
    calibrated: bool = True
    needs: tuple[str, ...] = ()
    cost: str = COLLECTING
    search: Search = ""
    package: str = ""

    @property
    def across_layers(self) -> bool:
        """Whether it looks at all layers together."""
        return isinstance(self.criterion, GlobalCriterion)

    def __call__(self, stats: LayerStatistics) -> FloatArray:
        """Scores [E] or drop costs [E, E] of one layer.

        Raises:
            StrategyError: a statistic is missing, the criterion's values are not finite numbers of that shape, or it
                needs all layers.
        """
        if isinstance(self.criterion, GlobalCriterion):
            raise StrategyError(f"strategy {self.name!r} scores all layers at once", "call its method scores()")
        return self._checked(stats, self.criterion(stats))

    def scores(self, layers: Layers) -> dict[int, FloatArray]:
        """Scores [E] or drop costs [E, E] of every layer.

        Raises:
            StrategyError: a statistic is missing, or the criterion's values are not finite numbers of that shape.
        """
        if not isinstance(self.criterion, GlobalCriterion):
            return {layer: self(stats) for layer, stats in layers.items()}
        found = self.criterion(layers)
        if found.keys() != layers.keys():
            raise StrategyError(f"strategy {self.name!r} does not score the layers that it was given, each once")
        return {layer: self._checked(stats, found[layer]) for layer, stats in layers.items()}

    def _checked(self, stats: LayerStatistics, found: FloatArray) -> FloatArray:
        values, experts = np.asarray(found, dtype=np.float64), stats.num_experts
        if values.shape not in {(experts,), (experts, experts)} or not np.isfinite(values).all():
            raise StrategyError(
                f"strategy {self.name!r}, layer {stats.layer}: {experts} experts need as many finite scores",
                "a criterion returns scores [E], higher stays, or drop costs [E, E]",
            )
        return values


_FAMILY = "2606.15716"
_FAMILY_MEMBER = re.compile(r"[sS]\(\s*(\d+(?:\.\d+)?)\s*,\s*(\d)\s*,\s*(\d)\s*\)")


def _member(name: str, saliency: Saliency, summary: str = "", paper: str = _FAMILY) -> Strategy:
    return Strategy(name=name, criterion=saliency, summary=summary, paper=paper, needs=saliency.needs)


def _hint(name: str, aggregation: Aggregation, summary: str) -> Strategy:
    hint = RouterHint(aggregation)
    return Strategy(name=name, criterion=hint, summary=summary, paper="2410.12013", needs=hint.needs)


_SALIENCY = (
    _member("frequency", Saliency(0, 0, 0), "tokens routed to the expert", "2404.05089"),
    _member("routing-mass", Saliency(0, 1, 0), "sum of gates"),
    _member("ean", Saliency(0, 0, 1), "sum of output norms", "2510.13999"),
    _member("man", Saliency(1, 0, 1), "mean output norm"),
    _member("msan", Saliency(1, 0, 2), "mean squared output norm"),
    _member("reap", Saliency(1, 1, 1), "mean gated output norm", "2510.13999"),
    _member("gated-norm", Saliency(0, 1, 1), "sum of gated output norms"),
    _member("gated-norm-sq", Saliency(0, 2, 2), "sum of squared gated norms"),
    Strategy(
        name="seer",
        criterion=seer,
        summary="sum of router probabilities over all tokens",
        paper="2404.05089",
        needs=("soft_prob_sum",),
    ),
    Strategy(
        name="easy-ep",
        criterion=easy_ep,
        summary="sum of gated norms, tokens weighted by how far the residual turns",
        paper="2504.06792",
        needs=("easy_ep_sum",),
    ),
)
_PAIRS = (
    Strategy(
        name="hope",
        criterion=hope,
        summary="pairwise gated norms, mean over shared tokens",
        paper="2609.18916",
        needs=("pair_gated_norm", "pair_count"),
    ),
    Strategy(
        name="hope-total",
        criterion=hope_total,
        summary="pairwise gated norms, mean over all tokens",
        paper="2609.18916",
        needs=("pair_gated_norm", "tokens"),
    ),
    Strategy(
        name="gram",
        criterion=gram,
        summary="squared change of the layer's routed output",
        needs=("gram", "tokens"),
    ),
)
_WEIGHTS = (
    _hint("router-hint", "mean-tok", "weights times their gated inputs, mean over the expert's tokens"),
    _hint("router-hint-sum", "sum", "weights times their gated inputs, sum over tokens"),
    _hint("router-hint-down-only", "down-only", "the same mean, of the down projection alone"),
    Strategy(
        name="aimer",
        criterion=aimer,
        summary="rms over mean absolute value of the expert's weights",
        paper="2603.18492",
        calibrated=False,
        needs=("weight_abs_sum", "weight_sq_sum", "weight_numel"),
        cost="one pass over the weights",
    ),
)
_SAMPLES = ("path_prob", "path_norm", "path_loss", "path_scale", "path_domain")
_EVERY_EXPERT = "every expert on every token of the first samples"
_PATHS = (
    Strategy(
        name="maestro",
        criterion=GlobalCriterion(maestro),
        summary="share of a walk through the experts of all layers",
        paper="2607.08601",
        needs=("transition_count", "wrap_count"),
    ),
    Strategy(
        name="pathfinder",
        criterion=GlobalCriterion(Pathfinder()),
        summary="votes of each sample's best paths through the layers",
        paper="2512.18425",
        needs=_SAMPLES,
        cost=_EVERY_EXPERT,
    ),
    Strategy(
        name="pathfinder-conditional",
        criterion=GlobalCriterion(Pathfinder(conditional=True)),
        summary="the same, with the probability of an expert after the one before",
        paper="2512.18425",
        needs=(*_SAMPLES, "transition_count"),
        cost=f"{COLLECTING}, and {_EVERY_EXPERT}",
    ),
)


def _naee(name: str, search: Search, given: str = "") -> Strategy:
    return Strategy(
        name=name,
        criterion=gram,
        summary=f"the set with which the layer's output is closest to the original's{given}",
        paper="2402.14800",
        needs=("gram", "tokens"),
        cost="some hundred passes through every MoE layer",
        search=search,
    )


_SEARCHES = (
    _naee("naee", "layer-wise"),
    _naee("naee-progressive", "progressive", ", behind layers that are pruned already"),
)
_CONTROL = Strategy(
    name="random", criterion=random_control, summary="control: uniform draws", calibrated=False, cost="nothing"
)


def _no_formula(stats: LayerStatistics) -> FloatArray:
    raise StrategyError(
        "auto has no formula: it tries the other strategies on text of its own", "pass --selection heldout.jsonl"
    )


AUTO = Strategy(
    name="auto",
    criterion=_no_formula,
    summary="the strategies' plan closest to the original on selection text, mixed layer by layer",
    needs=("soft_prob_sum", "easy_ep_sum"),  # so that all candidates are there that cost no more than one number
    cost="a pass over the selection text for every plan that is tried",
)

BUILTIN: Mapping[str, Strategy] = {
    strategy.name: strategy for strategy in (*_SALIENCY, *_PAIRS, *_WEIGHTS, *_PATHS, *_SEARCHES, _CONTROL)
}


def resolve(strategy: str | Criterion | GlobalCriterion | Strategy) -> Strategy:
    """Find a strategy by name, or wrap a callable.

    ``S(b,alpha,beta)`` names any member of the saliency family.

    Raises:
        StrategyError: the name is unknown.
        ConfigError: another package publishes it, and it cannot be used.
    """
    if isinstance(strategy, Strategy):
        return strategy
    if isinstance(strategy, GlobalCriterion):
        return Strategy(name=strategy.name, criterion=strategy)
    if not isinstance(strategy, str):
        return Strategy(name=getattr(strategy, "__name__", type(strategy).__name__), criterion=strategy)
    if strategy in (named := {**BUILTIN, AUTO.name: AUTO}):
        return named[strategy]
    if member := _FAMILY_MEMBER.fullmatch(strategy):
        return _member(strategy, Saliency(float(member[1]), int(member[2]), int(member[3])))
    if plug_in := find_plug_in("strategy", strategy):
        return load_plug_in(plug_in)
    raise StrategyError(
        f"unknown strategy {strategy!r}", nearest(strategy, [*BUILTIN, AUTO.name, *published_names("strategy")])
    )


def is_built_in(name: str) -> bool:
    """Whether a name is ours, so that no other package can give it a meaning."""
    return name in BUILTIN or name == AUTO.name or bool(_FAMILY_MEMBER.fullmatch(name))


def load_plug_in(plug_in: PlugIn) -> Strategy:
    """A strategy that another package publishes, as a :class:`Strategy` or as a criterion.

    Raises:
        ConfigError: it cannot be imported, is neither, or needs a statistic that nobody publishes.
    """
    found = plug_in.load()
    if not isinstance(found, Strategy):
        if not callable(found):
            raise plug_in.problem("is neither a moeprune.Strategy nor a function")
        found = Strategy(name=plug_in.name, criterion=found)
    if found.name != plug_in.name:
        raise plug_in.problem(f"calls itself {found.name!r}")
    for name in found.needs:
        if find(name) is None:
            raise plug_in.problem(f"needs the statistic {name!r}, which no package publishes")
    return dataclasses.replace(found, package=plug_in.package)
