"""Decide which experts stay: statistics, a strategy and a budget to a checked plan. Runs without torch."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from moeprune._files import human_bytes, progress
from moeprune.architectures import ExpertName, RouterName, StackedName
from moeprune.budgets import LayerMasses, Shares, even_shares, realise
from moeprune.checkpoint import Checkpoint
from moeprune.engines import ENGINES, engine_remarks, engine_verdicts
from moeprune.errors import ConfigError, PlanError, StaleArtifactError, StrategyError, nearest, ranges
from moeprune.plans import Budget, LayerPlan, MtpPolicy, PruningPlan
from moeprune.rewrite.drop import check_plan, keep_lists, output_tensors
from moeprune.rewrite.non_uniform import MODELING, check_possible
from moeprune.stability import LEAST, RELIABLE, Stability, split_half
from moeprune.statistics import RARE, FloatArray, RouterStatistics, domain_weights
from moeprune.strategies import DEFAULT, Criterion, GlobalCriterion, Strategy, resolve
from moeprune.strategies.allocate import UNIFORM, Allocation
from moeprune.strategies.domains import maxmin_weights, top_of_each
from moeprune.strategies.guards import super_experts
from moeprune.strategies.rearrange import balanced_order, imbalance
from moeprune.strategies.reconstruction import reconstruct
from moeprune.strategies.selection import Selection, select

if TYPE_CHECKING:
    from moeprune.evaluation.evaluator import Evaluator
    from moeprune.evaluation.reconstruction import SubsetLoss

SHORT = 10 * RARE  # fewer tokens than this for the average expert leave many rare ones
Protected = Mapping[int, Set[int]]
Blend = Literal["sum", "maxmin"]
LayerWeights = Mapping[int, Mapping[str, float]]  # of the domains, by decoder layer


@dataclass(frozen=True, slots=True, kw_only=True)
class Decisions:
    """What a plan is asked for.

    Attributes:
        budget: ratio or count.
        allocation: how the budget is shared out over layers.
        allow_non_uniform: let layers keep different numbers, which only transformers loads.
        rearrange: expert-parallel groups over which the load is balanced by the order of the experts; 1 leaves it.
        strategy: a name or a callable.
        weights: weight of each calibration domain, 1 where none is given; a domain of weight 0 is left out.
        blend: how domains are put together: ``sum`` by their weights; ``maxmin`` by weights of each layer's own, such
            that the worst served domain keeps the largest share of its gated mass.
        protect_top: so many of each domain's best experts must stay in each layer.
        protect: experts by layer that must stay.
        guard: also keep the super experts, whatever the strategy says.
        mtp: ``cut`` cuts MTP layers to the same count, by the last decoder layer's keep-list unless the statistics
            are of them too; ``drop`` removes them.
        target: engines that must take the result.
        seed: for strategies that draw.
    """

    budget: Budget
    allocation: Allocation = UNIFORM
    allow_non_uniform: bool = False
    rearrange: int = 1
    strategy: str | Criterion | GlobalCriterion = DEFAULT
    weights: Mapping[str, float] | None = None
    blend: Blend = "sum"
    protect_top: int = 0
    protect: Protected | None = None
    guard: bool = True
    mtp: MtpPolicy = "cut"
    target: Sequence[str] = ()
    seed: int = 0


def make_plan(
    checkpoint: Checkpoint,
    statistics: RouterStatistics,
    wanted: Decisions,
    subset_loss: SubsetLoss | None = None,
    evaluator: Evaluator | None = None,
    selection: str = "",
) -> PruningPlan:
    """Plan which experts stay in every MoE layer: the same number in each, unless layers may differ.

    Args:
        checkpoint: the model the plan is for.
        statistics: what was measured on it.
        wanted: budget, strategy and the rest.
        subset_loss: runs the model's layers with some of their experts, for a strategy that searches.
        evaluator: scores plans on a selection text, for a budget that searches.
        selection: fingerprint of that text.

    Raises:
        StaleArtifactError: the statistics were made for another model.
        StrategyError: the strategy is unknown, its statistics are missing, or it searches and cannot run the model.
        ConfigError: the budget or another option cannot work.
        PlanError: an engine in ``target`` would not take the result, or more experts are protected than may stay.
    """
    check_statistics(checkpoint, statistics)
    chosen = check_decisions(checkpoint, wanted, domains=statistics.domains)
    protected = _union(wanted.protect or {}, super_experts(statistics) if wanted.guard else {})
    protected = _union(protected, _top_of_each_domain(checkpoint, statistics, wanted, protected))
    own = [layer for layer in checkpoint.mtp_layers if wanted.mtp == "cut" and layer in statistics.layers]
    if chosen.across_layers or chosen.search:
        own = []  # no decoder layer hands its tokens on to them
    weights = _layer_weights(checkpoint, statistics, wanted, protected)
    shares = _share_out(checkpoint, statistics, wanted, chosen, protected, weights, evaluator)
    kept = {**shares.kept, **dict.fromkeys(own, shares.kept[checkpoint.moe_layers[-1]])}

    def choose(part: RouterStatistics, layers: Sequence[int]) -> dict[int, Selection]:
        views = {layer: part.layer(layer, weights[layer], seed=wanted.seed) for layer in layers}
        return {
            layer: _select(
                layer, values, kept[layer], n_group=checkpoint.n_group, protected=protected.get(layer, frozenset())
            )
            for layer, values in chosen.scores(views).items()
        }

    selected = choose(statistics, (*checkpoint.moe_layers, *own))
    selected, searched = _searched(checkpoint, selected, chosen, protected, subset_loss)
    stability = split_half(statistics, choose, selected) if chosen.calibrated and not searched else None
    layers = {layer: LayerPlan(keep=one.keep, scores=one.scores) for layer, one in selected.items()}
    layers, balance = rearranged(checkpoint, statistics, layers, wanted)
    if wanted.mtp == "cut":
        layers |= _follow_last(checkpoint, layers)
    notes = [*stability_warnings(statistics, stability), *shares.notes, *_notes(checkpoint, statistics, wanted)]
    notes += _count_notes(checkpoint, set(shares.kept.values()), wanted) + _mtp_notes(checkpoint, layers)
    plan = PruningPlan(
        layers=layers,
        config_edits={},
        command=_command(wanted, chosen),
        inputs={"model": checkpoint.fingerprint}
        | _calibration_input(statistics)
        | ({"selection": selection} if selection else {}),
        budget=shares.budget,
        strategy=_describe(chosen)
        | {"protected": {str(layer): sorted(who) for layer, who in sorted(protected.items())}}
        | searched,
        coverage=coverage(statistics, layers),
        stability=stability.to_dict() if stability else {},
        notes=notes,
        balance=balance,
        allow_non_uniform=wanted.allow_non_uniform,
    )
    plan = derive(checkpoint, plan)
    _check_target(plan.engines, wanted.target)
    return plan


def _share_out(
    checkpoint: Checkpoint,
    statistics: RouterStatistics,
    wanted: Decisions,
    strategy: Strategy,
    protected: Protected,
    weights: LayerWeights,
    evaluator: Evaluator | None,
) -> Shares:
    """How many experts stay in each decoder layer."""
    shape, allocation = checkpoint.router, wanted.allocation
    kept = wanted.budget.kept(shape) if wanted.budget.given else None
    if allocation.name == "uniform" and kept is not None:
        return even_shares(shape, checkpoint.moe_layers, kept)
    layers = {layer: statistics.layer(layer, weights[layer], seed=wanted.seed) for layer in checkpoint.moe_layers}
    scores = strategy.scores(layers)
    loads = {layer: stats.count for layer, stats in layers.items()} if allocation.by_load else scores
    masses = LayerMasses.of(shape, scores, loads, protected)
    searched: dict[str, Any] = {}
    if allocation.searched and kept is not None:
        cost = _cost_of_counts(checkpoint, scores, protected, evaluator)
        wish, searched = masses.search(allocation, kept, cost, wanted.seed)
    else:
        wish = masses.wish(allocation, kept)
    shares = realise(masses, wish, allocation.name, wanted.budget, allow_non_uniform=wanted.allow_non_uniform)
    return dataclasses.replace(shares, budget={**shares.budget, "search": searched}) if searched else shares


def _cost_of_counts(
    checkpoint: Checkpoint, scores: Mapping[int, FloatArray], protected: Protected, evaluator: Evaluator | None
) -> Callable[[Sequence[Mapping[int, int]]], list[float]]:
    """What candidates, given by the experts that every layer keeps, do to the predictions: the mean KL per token."""
    if evaluator is None:
        raise ConfigError("--budget evolve scores counts on a text of its own", "name one with --selection")

    @functools.cache
    def keep(layer: int, count: int) -> tuple[int, ...]:
        guarded = protected.get(layer, frozenset())
        return _select(layer, scores[layer], count, n_group=checkpoint.n_group, protected=guarded).keep

    def cost(found: Sequence[Mapping[int, int]]) -> list[float]:
        keeps = [{layer: keep(layer, count) for layer, count in counts.items()} for counts in found]
        return [score.agreement.kl.value for score in evaluator(keeps)]

    return cost


def _searched(
    checkpoint: Checkpoint,
    selected: dict[int, Selection],
    strategy: Strategy,
    protected: Protected,
    subset_loss: SubsetLoss | None,
) -> tuple[dict[int, Selection], dict[str, Any]]:
    """What a search makes of a choice, and what the plan says of it; of a strategy that searches not, nothing."""
    if not strategy.search:
        return selected, {}
    if subset_loss is None:
        raise StrategyError(f"strategy {strategy.name!r} runs the model", "use `moeprune prune`, which does so")
    better, said = {}, {}
    for layer, start in progress(selected.items(), "searching", unit="layer"):
        guarded = protected.get(layer, frozenset())
        loss = functools.partial(subset_loss, layer)
        found = reconstruct(loss, start, n_group=checkpoint.n_group, protected=guarded)
        subset_loss.settle(layer, found.keep)
        better[layer] = dataclasses.replace(start, keep=found.keep)
        said[str(layer)] = found.to_dict()
    return better, {"search": said}


def _layer_weights(
    checkpoint: Checkpoint, statistics: RouterStatistics, wanted: Decisions, protected: Protected
) -> LayerWeights:
    """Weights of the domains in each layer."""
    given = dict(zip(statistics.domains, domain_weights(statistics.domains, wanted.weights).tolist(), strict=True))
    if wanted.blend == "sum":
        return dict.fromkeys(statistics.layers, given)
    used = [domain for domain, weight in given.items() if weight]
    found = {}
    for layer in statistics.layers:
        best = maxmin_weights(
            _gated_mass(statistics, layer, used),
            _about(checkpoint, wanted),
            n_group=checkpoint.n_group,
            protected=protected.get(layer, frozenset()),
        )
        found[layer] = dict.fromkeys(given, 0.0) | dict(zip(used, best.tolist(), strict=True))
    return found


def _top_of_each_domain(
    checkpoint: Checkpoint, statistics: RouterStatistics, wanted: Decisions, protected: Protected
) -> Protected:
    """Each domain's best experts, as far as there is room for them beside those that are protected already."""
    if not wanted.protect_top:
        return {}
    factors = domain_weights(statistics.domains, wanted.weights)
    used = [domain for domain, weight in zip(statistics.domains, factors, strict=True) if weight]
    return {
        layer: top_of_each(
            _gated_mass(statistics, layer, used),
            wanted.protect_top,
            room=_about(checkpoint, wanted) // checkpoint.n_group,
            n_group=checkpoint.n_group,
            protected=protected.get(layer, frozenset()),
        )
        for layer in checkpoint.moe_layers
    }


def _gated_mass(statistics: RouterStatistics, layer: int, domains: Sequence[str]) -> FloatArray:
    """Sum of gated norms, [domains, E]."""
    mass_DE = statistics.layers[layer].get("gated_norm_sum")
    if mass_DE is None or not domains:
        raise StrategyError(
            f"the statistics file has no 'gated_norm_sum' for layer {layer}, by which domains are told apart",
            "collect again with calibration data (--calibration)",
        )
    return mass_DE[[statistics.domains.index(domain) for domain in domains]]


def _about(checkpoint: Checkpoint, wanted: Decisions) -> int:
    """Experts that each layer keeps, or would if all kept the same number; nearly all where thresholds decide."""
    return wanted.budget.kept(checkpoint.router) if wanted.budget.given else checkpoint.num_experts - checkpoint.n_group


def preview(checkpoint: Checkpoint, wanted: Decisions) -> PruningPlan:
    """A plan of the right size whose choice of experts means nothing, for looking before calibrating.

    Raises:
        ConfigError, PlanError: whatever :func:`make_plan` would refuse whatever the statistics turn out to be.
    """
    nothing = RouterStatistics.empty(
        checkpoint.moe_layers,
        num_experts=checkpoint.num_experts,
        top_k=checkpoint.top_k,
        model=checkpoint.fingerprint,
    )
    _check_budget(checkpoint, wanted)
    largest = Budget(keep=checkpoint.num_experts - checkpoint.n_group)
    guess = dataclasses.replace(
        wanted,
        budget=wanted.budget if wanted.budget.given else largest,
        allocation=UNIFORM,
        allow_non_uniform=False,
        rearrange=1,
        strategy="random",
        weights=None,
        blend="sum",
        protect_top=0,
        guard=False,
    )
    drawn = make_plan(checkpoint, nothing, guess)
    unknown = "the calibration decides how many experts stay: this is the most"
    notes = drawn.notes if wanted.budget.given else [unknown, *drawn.notes]
    return dataclasses.replace(drawn, strategy=_describe(resolve(wanted.strategy)), notes=notes)


def check_decisions(checkpoint: Checkpoint, wanted: Decisions, *, domains: Sequence[str]) -> Strategy:
    """Check what can be known about a plan before its statistics; gives the strategy."""
    if wanted.mtp not in {"cut", "drop"}:
        raise ConfigError(f"--mtp must be cut or drop, not {wanted.mtp!r}", "cut is the default")
    if wanted.seed < 0:
        raise ConfigError(f"--seed must be at least 0, not {wanted.seed}")
    chosen = resolve(wanted.strategy)
    _check_budget(checkpoint, wanted)
    domain_weights(domains, wanted.weights)
    _check_domains(wanted)
    _check_protection(checkpoint, wanted.protect or {})
    return chosen


def _check_budget(checkpoint: Checkpoint, wanted: Decisions) -> None:
    """Refuse counts that cannot work, as far as they are known."""
    allocation, budget = wanted.allocation, wanted.budget
    if allocation.sized and budget.given:
        raise ConfigError(
            f"the thresholds of --budget {allocation.name} say how many experts stay", "leave out --ratio and --keep"
        )
    if wanted.allow_non_uniform and allocation.name == "uniform":
        raise ConfigError("--allow-non-uniform needs a budget that tells layers apart", "such as --budget coverage")
    if wanted.allow_non_uniform and budget.round_to != 1:
        raise ConfigError("--round-to makes counts equal, and --allow-non-uniform lets them differ", "give one of them")
    if wanted.allow_non_uniform:
        check_possible(checkpoint)
    _check_rearrange(checkpoint, wanted)
    if not allocation.sized:
        kept = budget.kept(checkpoint.router)
        _check_target(engine_verdicts(checkpoint, kept, kept if wanted.allow_non_uniform else None), wanted.target)


def _check_domains(wanted: Decisions) -> None:
    if wanted.blend not in {"sum", "maxmin"}:
        raise ConfigError(f"--blend must be sum or maxmin, not {wanted.blend!r}", "sum is the default")
    if wanted.protect_top < 0:
        raise ConfigError(f"--protect-top must be at least 0, not {wanted.protect_top}")
    if wanted.blend == "maxmin" and {*(wanted.weights or {}).values()} - {0, 1}:
        raise ConfigError("--blend maxmin finds the weights of the domains itself", "weight 0 leaves a domain out")
    if wanted.blend == "maxmin" and not wanted.budget.given:
        raise ConfigError("--blend maxmin asks how much can be kept", "give --ratio or --keep")


def _check_rearrange(checkpoint: Checkpoint, wanted: Decisions) -> None:
    groups, n_group = wanted.rearrange, checkpoint.n_group
    if groups < 1:
        raise ConfigError(f"--rearrange must be at least 1, not {groups}", "it is the number of expert-parallel groups")
    if groups > 1 and groups % n_group:
        hint = f"give a multiple of {n_group}: experts stay in their router group"
        raise ConfigError(f"--rearrange {groups} does not fit a router of {n_group} groups", hint)
    if groups > 1 and wanted.allow_non_uniform:
        raise ConfigError("--rearrange is for engines that share experts out, which load one count for all layers")
    if wanted.budget.given:
        _check_divides(wanted.budget.kept(checkpoint.router), groups)


def _check_divides(kept: int, groups: int) -> None:
    if kept % groups:
        hint = f"keep {kept - kept % groups} or {kept + groups - kept % groups}, or use --round-to {groups}"
        raise ConfigError(f"{kept} experts do not divide over --rearrange {groups} groups", hint)


def check_statistics(checkpoint: Checkpoint, statistics: RouterStatistics) -> None:
    """Refuse statistics of another model, and models that are pruned as far as they can be."""
    checkpoint.check_uniform()
    made_for = statistics.inputs.get("model")
    if made_for != checkpoint.fingerprint:
        hint = (
            "observe(model, like=FOLDER) binds them to a checkpoint" if not made_for else "collect them from this model"
        )
        raise StaleArtifactError(f"the statistics were made for another model than {checkpoint.path.name}", hint)
    if statistics.num_experts != checkpoint.num_experts:
        raise StaleArtifactError(
            f"the statistics are of {statistics.num_experts} experts per layer, {checkpoint.path.name} has "
            f"{checkpoint.num_experts}",
            "collect them from this model",
        )
    missing = sorted(set(checkpoint.moe_layers) - set(statistics.layers))
    if missing:
        hint = "merge the files of all slices with `moeprune stats merge`, or collect all layers"
        raise StaleArtifactError(f"the statistics lack layers {ranges(missing)}", hint)


def _select(layer: int, values: FloatArray, kept: int, *, n_group: int, protected: Set[int]) -> Selection:
    try:
        return select(values, kept, n_group=n_group, protected=protected)
    except PlanError as error:
        raise PlanError(f"layer {layer}: {error.message}", error.hint) from error


def rearranged(
    checkpoint: Checkpoint, statistics: RouterStatistics, layers: Mapping[int, LayerPlan], wanted: Decisions
) -> tuple[dict[int, LayerPlan], dict[str, Any]]:
    """The layers in an order that balances expert-parallel groups, and how well it does."""
    groups = wanted.rearrange
    if groups == 1:
        return dict(layers), {}
    ordered, told = {}, {}
    for layer, decision in layers.items():
        _check_divides(len(decision.keep), groups)
        load = statistics.layer(layer, wanted.weights).count
        order = balanced_order(load, decision.keep, groups, n_group=checkpoint.n_group)
        ordered[layer] = dataclasses.replace(decision, order=None if order == decision.keep else order)
        shares = {"before": decision.keep, "after": order}
        told[str(layer)] = {when: round(imbalance(load, experts, groups), 4) for when, experts in shares.items()}
    return ordered, {"groups": groups, "layers": told}


def _follow_last(checkpoint: Checkpoint, layers: Mapping[int, LayerPlan]) -> dict[int, LayerPlan]:
    """MTP layers that have no scores of their own take the last decoder layer's keep-list."""
    last = checkpoint.moe_layers[-1]
    copied = LayerPlan(keep=layers[last].keep, order=layers[last].order, copied_from=last)
    return {layer: copied for layer in checkpoint.mtp_layers if layer not in layers}


def _mtp_notes(checkpoint: Checkpoint, layers: Mapping[int, LayerPlan]) -> list[str]:
    """What becomes of the MTP layers."""
    routed = {role.layer for role in checkpoint.roles.values() if isinstance(role, ExpertName | StackedName)}
    what: dict[str, list[int]] = {}
    for layer in checkpoint.mtp_layers:
        if layer not in layers:
            fate = "are dropped, and the config's count of them, where it has one, is set to 0"
        elif layer not in routed:
            fate = "have no routed experts and stay as they are"
        elif layers[layer].copied_from is None:
            fate = "are cut by their own scores"
        else:
            fate = f"take the keep-list of layer {layers[layer].copied_from}"
        what.setdefault(fate, []).append(layer)
    return [f"MTP layers {ranges(those)} {fate}" for fate, those in what.items()]


def _check_protection(checkpoint: Checkpoint, protect: Protected) -> None:
    for layer, experts in protect.items():
        if layer not in checkpoint.moe_layers:
            which = f"layers with experts: {ranges(checkpoint.moe_layers)}"
            raise ConfigError(f"--protect names layer {layer}, which has no routed experts", which)
        odd = [expert for expert in experts if not 0 <= expert < checkpoint.num_experts]
        if odd:
            what = f"--protect names expert {odd[0]} of {checkpoint.num_experts} in layer {layer}"
            raise ConfigError(what, f"experts are 0 to {checkpoint.num_experts - 1}")


def _union(first: Protected, second: Protected) -> dict[int, frozenset[int]]:
    layers = sorted(first.keys() | second.keys())
    return {layer: frozenset(first.get(layer, ())) | frozenset(second.get(layer, ())) for layer in layers}


# --- what follows from the keep-lists -------------------------------------------------------------------------------


def derive(checkpoint: Checkpoint, plan: PruningPlan) -> PruningPlan:
    """Check a plan and work out what follows from its keep-lists, which a person may have edited.

    Raises:
        StaleArtifactError: the plan was made for another model.
        PlanError: no engine could run the result.
    """
    plan = check_plan(checkpoint, plan)
    return dataclasses.replace(
        plan,
        budget=dict(plan.budget) | {"kept": plan.kept_by_layer, "of": checkpoint.num_experts},
        size=_size(checkpoint, plan),
        engines=engine_verdicts(checkpoint, plan.kept, None if plan.uniform else min(plan.counts.values())),
    )


def _size(checkpoint: Checkpoint, plan: PruningPlan) -> dict[str, Any]:
    before = checkpoint.tensors.values()
    counted = all(entry.dtype in _PLAIN for entry in before)
    nbytes = parameters = 0
    for tensor in output_tensors(checkpoint, keep_lists(plan)):  # 100,000 of them: one at a time
        nbytes += tensor.nbytes
        parameters += _parameters(tensor.name, tensor.shape)
    size: dict[str, Any] = {"bytes": {"before": checkpoint.nbytes, "after": nbytes}}
    if counted:
        total = sum(_parameters(entry.name, entry.shape) for entry in before)
        size["parameters"] = {"before": total, "after": parameters}
    return size


# Types whose elements are parameters; packed formats hold several in one element and are only counted in bytes.
_PLAIN = {"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"}


def _parameters(name: str, shape: Sequence[int]) -> int:
    return 0 if "scale" in name else math.prod(shape)


# --- what the plan says of itself -----------------------------------------------------------------------------------


def _command(wanted: Decisions, strategy: Strategy) -> dict[str, Any]:
    """Canonical options: what decided, and nothing else."""
    budget, protect = wanted.budget, wanted.protect or {}
    command: dict[str, Any] = {"stage": "plan", "strategy": strategy.name}
    command |= {name: value for name in ("ratio", "keep") if (value := getattr(budget, name)) is not None}
    if wanted.allocation != UNIFORM:
        command["budget"] = str(wanted.allocation)
    if wanted.allow_non_uniform:
        command["allow_non_uniform"] = True
    if wanted.rearrange != 1:
        command["rearrange"] = wanted.rearrange
    if budget.round_to != 1:
        command["round_to"] = budget.round_to
    if wanted.weights:
        command["weights"] = dict(sorted(wanted.weights.items()))
    if wanted.blend != "sum":
        command["blend"] = wanted.blend
    if wanted.protect_top:
        command["protect_top"] = wanted.protect_top
    if protect:
        command["protect"] = [f"{layer}:{expert}" for layer in sorted(protect) for expert in sorted(protect[layer])]
    return command | {"guard": wanted.guard, "mtp": wanted.mtp, "target": list(wanted.target), "seed": wanted.seed}


def _calibration_input(statistics: RouterStatistics) -> dict[str, str]:
    source = statistics.inputs.get("calibration")
    return {"calibration": source} if source else {}


def _describe(strategy: Strategy) -> dict[str, Any]:
    described = {"name": strategy.name, "what": strategy.summary}
    described |= {"paper": f"arXiv:{strategy.paper}"} if strategy.paper else {}
    return described | ({"package": strategy.package} if strategy.package else {})


def coverage(statistics: RouterStatistics, layers: Mapping[int, LayerPlan]) -> dict[str, float]:
    """Share of the gated output norm that the kept experts carried, by domain, mean over layers."""
    shares = []
    for layer, decision in layers.items():
        mass_DE = statistics.layers.get(layer, {}).get("gated_norm_sum")
        if mass_DE is not None and len(mass_DE):
            total = np.maximum(mass_DE.sum(axis=1), 1e-30)
            shares.append(mass_DE[:, list(decision.keep)].sum(axis=1) / total)
    if not shares:
        return {}
    return {
        domain: round(float(share), 4)
        for domain, share in zip(statistics.domains, np.mean(shares, axis=0), strict=True)
    }


def _notes(checkpoint: Checkpoint, statistics: RouterStatistics, wanted: Decisions) -> list[str]:
    notes = coverage_warnings(statistics)
    if wanted.guard and not statistics.tokens:
        notes.append("nothing was calibrated, so super experts could not be protected")
    if checkpoint.spec.announced_mtp(checkpoint.config) and not checkpoint.mtp_layers:
        notes.append("the config announces MTP layers that the checkpoint does not hold; engines may refuse it")
    return notes


def _count_notes(checkpoint: Checkpoint, counts: Set[int], wanted: Decisions) -> list[str]:
    """What engines make of the number of experts, where there is one."""
    if len(counts) > 1:
        return [f"layers differ: transformers loads them with trust_remote_code=True, through {MODELING} beside them"]
    [kept], notes = counts, []
    if kept % 8 and kept > 8:
        what = "a prime number" if _is_prime(kept) else "no multiple of 8"
        advice = _better_count(checkpoint, kept)
        notes.append(f"{kept} experts is {what}: slower or unsupported in fused kernels and expert parallelism{advice}")
    for engine, remarks in engine_remarks(checkpoint, kept).items():
        if engine in (wanted.target or ENGINES):
            notes.append(f"{engine} runs {kept} experts more slowly: {'; '.join(remarks)}")
    return notes


def _better_count(checkpoint: Checkpoint, kept: int) -> str:
    """The nearest multiple of 8 that can be kept, and what it costs."""
    better = [count for count in (kept - kept % 8, kept + 8 - kept % 8) if not checkpoint.router.problem(count)]
    if not better:
        return ""
    near = min(better, key=lambda count: (abs(count - kept), -count))
    cut = (ExpertName, StackedName, RouterName)
    whole = sum(checkpoint.tensors[name].nbytes for name, role in checkpoint.roles.items() if isinstance(role, cut))
    cost = human_bytes(abs(near - kept) * whole // checkpoint.num_experts)
    step = f"{abs(near - kept)} experts per layer {'more' if near > kept else 'fewer'}"
    return f"; {near} would not be, which is {step} ({cost})"


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % divisor for divisor in range(2, int(number**0.5) + 1))


def coverage_warnings(statistics: RouterStatistics) -> list[str]:
    """Warnings about experts that calibration hardly saw, with how much data to add."""
    if not statistics.tokens:
        return []
    counts = np.concatenate([values["count"].sum(axis=0) for values in statistics.layers.values()])
    never, rare = int((counts == 0).sum()), int(((counts > 0) & (counts < RARE)).sum())
    warnings = []
    per_expert = statistics.tokens * statistics.top_k / statistics.num_experts
    if per_expert < SHORT:
        warnings.append(
            f"very short calibration data: {statistics.tokens:,} tokens give an expert {per_expert:.0f} on average; "
            f"add {_more(statistics, SHORT / per_expert)}"
        )
    if never or rare:
        least = "at least " if never else ""  # of an expert that was never seen only a bound is known
        warnings.append(
            f"of {len(counts):,} experts {never:,} were never routed to and {rare:,} by fewer than {RARE} tokens; "
            f"to reach them add {least}{_more(statistics, RARE / max(1, int(counts.min())))}"
        )
    return warnings


def stability_warnings(statistics: RouterStatistics, stability: Stability | None) -> list[str]:
    """Warning about scores that other data like these might rank otherwise, with how much to add."""
    if stability is None or stability.reliability >= RELIABLE:
        return []
    least = "at least " if stability.median < LEAST else ""
    return [f"{stability}: add {least}{_more(statistics, stability.data_factor)}"]


def _more(statistics: RouterStatistics, factor: float) -> str:
    """What to add so that there is ``factor`` times the data, in samples where their number is known."""
    samples = sum(int(source.get("sequences", 0)) for source in statistics.provenance)
    count, what = (samples, "samples like these") if samples else (statistics.tokens, "tokens")
    return f"{math.ceil(count * (factor - 1)):,} {what}"


# --- engines --------------------------------------------------------------------------------------------------------


def _check_target(verdicts: Mapping[str, Sequence[str]], target: Sequence[str]) -> None:
    for engine in target:
        if engine not in verdicts:
            raise ConfigError(f"unknown engine {engine!r} in --target", nearest(engine, ENGINES))
        if verdicts[engine]:
            raise PlanError(f"{engine} would not take the result: {'; '.join(verdicts[engine])}")
