"""``--strategy auto``: a plan by every strategy that the statistics allow, and the mix of them that predicts best."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from moeprune._files import note, progress
from moeprune.calibration import CalibrationSet
from moeprune.checkpoint import Checkpoint
from moeprune.errors import ConfigError, StrategyError
from moeprune.planner import Decisions, coverage, derive, make_plan, rearranged
from moeprune.plans import LayerPlan, PruningPlan
from moeprune.statistics import RouterStatistics
from moeprune.strategies import AUTO, BUILTIN, resolve
from moeprune.strategies.auto import Choice, Keeps, Rules, Trial, divergence, search

if TYPE_CHECKING:
    from moeprune.evaluation.evaluator import Evaluator, PlanScore
    from moeprune.evaluation.reconstruction import SubsetLoss

ROUNDS = 2  # how often every layer may take another candidate's keep-list, and how often it may exchange experts


def decide(
    checkpoint: Checkpoint,
    statistics: RouterStatistics,
    wanted: Decisions,
    subset_loss: SubsetLoss | None = None,
    evaluator: Evaluator | None = None,
    selection: CalibrationSet | None = None,
) -> PruningPlan:
    """The plan that is asked for: by a strategy, or by what chooses between them.

    Args:
        checkpoint, statistics, wanted, subset_loss: as for :func:`moeprune.planner.make_plan`.
        evaluator: scores plans on a selection text, for what searches.
        selection: that text.
    """
    if resolve(wanted.strategy).name != AUTO.name:
        fingerprint = selection.fingerprint if selection else ""
        return make_plan(checkpoint, statistics, wanted, subset_loss, evaluator, fingerprint)
    if evaluator is None:
        raise ConfigError("--strategy auto scores plans on a text of its own", "name one with --selection")
    return auto_plan(checkpoint, statistics, wanted, evaluator, selection=selection)


def auto_plan(
    checkpoint: Checkpoint,
    statistics: RouterStatistics,
    wanted: Decisions,
    evaluator: Evaluator,
    *,
    rounds: int = ROUNDS,
    selection: CalibrationSet | None = None,
) -> PruningPlan:
    """Plan by every strategy, score the plans on selection text, and mix their layers.

    An interrupt ends the search with the best plan so far, once all candidates have been scored.

    Args:
        checkpoint: the model the plan is for.
        statistics: what was measured on it.
        wanted: budget and the rest; its strategy is passed over.
        evaluator: scores keep-lists against the original on text that nothing was calibrated on.
        rounds: how often every layer may change its keep-list; 0 takes the best candidate as it is.
        selection: that text, whose domains count alike, or by ``wanted.weights`` where they are named there.

    Raises:
        StrategyError: the statistics serve no strategy.
        ConfigError, PlanError: whatever :func:`moeprune.planner.make_plan` refuses.
    """
    if wanted.allow_non_uniform:
        raise ConfigError(
            "--strategy auto cannot be combined with --allow-non-uniform",
            "it mixes keep-lists of one length; plan by the strategy that it finds best",
        )
    plans = candidates(checkpoint, statistics, wanted)
    layers = checkpoint.moe_layers
    keeps = {name: {layer: plan.layers[layer].keep for layer in layers} for name, plan in plans.items()}
    some = next(iter(plans.values()))
    protected = {int(layer): frozenset(who) for layer, who in some.strategy.get("protected", {}).items()}
    rules = Rules(num_experts=checkpoint.num_experts, n_group=checkpoint.n_group, protected=protected)
    choice = _searched(keeps, _score_with(evaluator, selection, wanted), rules, rounds)
    return _as_plan(checkpoint, statistics, wanted, choice, plans, selection)


def candidates(checkpoint: Checkpoint, statistics: RouterStatistics, wanted: Decisions) -> dict[str, PruningPlan]:
    """Plans by every built-in strategy that a formula decides and whose statistics are there.

    Raises:
        StrategyError: there is none.
    """
    plans: dict[str, PruningPlan] = {}
    for name, strategy in BUILTIN.items():
        if strategy.search or not (strategy.calibrated or strategy.needs):
            continue  # searches take long, and a control is no candidate
        try:
            plans[name] = make_plan(checkpoint, statistics, dataclasses.replace(wanted, strategy=name))
        except StrategyError:
            continue  # its statistics were not collected
    if not plans:
        raise StrategyError("the statistics serve no strategy to choose from", "collect with calibration data")
    return plans


def _score_with(
    evaluator: Evaluator, selection: CalibrationSet | None, wanted: Decisions
) -> Callable[[Sequence[Keeps]], list[Trial]]:
    domains = selection.domains if selection else ()
    return lambda keeps: [_trial(score, domains, wanted.weights) for score in evaluator(keeps)]


def _trial(score: PlanScore, domains: Sequence[str], weights: Mapping[str, float] | None) -> Trial:
    tokens_N = score.losses.tokens.astype(float)
    return Trial(
        kl=divergence(score.kl, tokens_N, domains or [""] * len(tokens_N), weights),
        top1=score.agreement.top1.value,
        perplexity_ratio=score.perplexity_ratio.value,
    )


def _searched(
    keeps: Mapping[str, Keeps], score: Callable[[Sequence[Keeps]], list[Trial]], rules: Rules, rounds: int
) -> Choice:
    """Run the search to its end, or until the user interrupts it."""
    found: Choice | None = None
    try:
        for choice in progress(search(keeps, score, rules, rounds=rounds), "choosing", unit="step"):
            found = choice
    except KeyboardInterrupt:
        if found is None:
            raise
        note("interrupted: the plan is the best one so far")
    assert found is not None  # noqa: S101 - the candidates' scores come first
    return found


def _as_plan(
    checkpoint: Checkpoint,
    statistics: RouterStatistics,
    wanted: Decisions,
    choice: Choice,
    plans: Mapping[str, PruningPlan],
    selection: CalibrationSet | None,
) -> PruningPlan:
    """The plan of the chosen mix; what it says beside the keep-lists is that of the best candidate where it holds."""
    best = plans[choice.best]
    layers = {layer: one for layer, one in best.layers.items() if one.copied_from is None}
    for layer, keep in choice.keeps.items():
        source = plans.get(choice.origin[layer], best).layers[layer]
        layers[layer] = dataclasses.replace(source, keep=keep, order=None)
    layers, balance = rearranged(checkpoint, statistics, layers, wanted)
    last = checkpoint.moe_layers[-1]
    for layer, decision in best.layers.items():
        if decision.copied_from == last:
            layers[layer] = LayerPlan(keep=layers[last].keep, order=layers[last].order, copied_from=last)
    described: dict[str, Any] = {"name": AUTO.name, "what": AUTO.summary}
    described |= {key: best.strategy[key] for key in ("protected",) if key in best.strategy} | choice.to_dict()
    text = {"selection": selection.fingerprint} if selection else {}
    mixed = dataclasses.replace(
        best,
        layers=layers,
        command=dict(best.command) | {"strategy": AUTO.name},
        inputs=dict(best.inputs) | text,
        strategy=described,
        coverage=coverage(statistics, layers),
        stability={},  # of a search: halves of the calibration data cannot tell it
        balance=balance,
        notes=[line for line in best.notes if "halves of the calibration data" not in line],
    )
    return derive(checkpoint, mixed)
