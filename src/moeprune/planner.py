"""Decide which experts stay: statistics, a strategy and a budget to a checked plan. Runs without torch."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

import numpy as np

from moeprune._files import human_bytes
from moeprune.architectures import ExpertName, RouterName, StackedName
from moeprune.checkpoint import Checkpoint
from moeprune.engines import ENGINES, engine_remarks, engine_verdicts
from moeprune.errors import ConfigError, PlanError, StaleArtifactError, nearest, ranges
from moeprune.plans import Budget, LayerPlan, MtpPolicy, PruningPlan
from moeprune.rewrite.drop import check_plan, keep_lists, output_tensors
from moeprune.stability import LEAST, RELIABLE, Stability, split_half
from moeprune.statistics import LayerStatistics, RouterStatistics, domain_weights
from moeprune.strategies import DEFAULT, Criterion, Strategy, resolve
from moeprune.strategies.guards import super_experts
from moeprune.strategies.selection import Selection, select

RARE = 20  # an expert seen by fewer tokens than this has a score made of noise
SHORT = 10 * RARE  # fewer tokens than this for the average expert leave many rare ones
Protected = Mapping[int, Set[int]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Decisions:
    """What a plan is asked for.

    Attributes:
        budget: ratio or count.
        strategy: a name or a callable.
        weights: weight of each calibration domain, 1 where none is given.
        protect: experts by layer that must stay.
        guard: also keep the super experts, whatever the strategy says.
        mtp: ``cut`` cuts MTP layers to the same count, by the last decoder layer's keep-list unless the statistics
            are of them too; ``drop`` removes them.
        target: engines that must take the result.
        seed: for strategies that draw.
    """

    budget: Budget
    strategy: str | Criterion = DEFAULT
    weights: Mapping[str, float] | None = None
    protect: Protected | None = None
    guard: bool = True
    mtp: MtpPolicy = "cut"
    target: Sequence[str] = ()
    seed: int = 0


def make_plan(checkpoint: Checkpoint, statistics: RouterStatistics, wanted: Decisions) -> PruningPlan:
    """Plan the same number of kept experts for every MoE layer.

    Args:
        checkpoint: the model the plan is for.
        statistics: what was measured on it.
        wanted: budget, strategy and the rest.

    Raises:
        StaleArtifactError: the statistics were made for another model.
        StrategyError: the strategy is unknown or its statistics are missing.
        ConfigError: the budget or another option cannot work.
        PlanError: an engine in ``target`` would not take the result, or more experts are protected than may stay.
    """
    check_statistics(checkpoint, statistics)
    chosen, kept = check_decisions(checkpoint, wanted, domains=statistics.domains)
    protected = _union(wanted.protect or {}, super_experts(statistics) if wanted.guard else {})
    own = [layer for layer in checkpoint.mtp_layers if wanted.mtp == "cut" and layer in statistics.layers]

    def choose(part: RouterStatistics, layer: int) -> Selection:
        stats = part.layer(layer, wanted.weights, seed=wanted.seed)
        return _select(chosen, stats, kept, n_group=checkpoint.n_group, protected=protected.get(layer, frozenset()))

    selected = {layer: choose(statistics, layer) for layer in (*checkpoint.moe_layers, *own)}
    stability = split_half(statistics, choose, selected) if chosen.calibrated else None
    layers = {layer: LayerPlan(keep=one.keep, scores=one.scores) for layer, one in selected.items()}
    if wanted.mtp == "cut":
        layers |= _follow_last(checkpoint, layers)
    notes = stability_warnings(statistics, stability) + _notes(checkpoint, statistics, kept, wanted)
    notes += _mtp_notes(checkpoint, layers)
    plan = PruningPlan(
        layers=layers,
        config_edits={},
        command=_command(wanted, chosen),
        inputs={"model": checkpoint.fingerprint} | _calibration_input(statistics),
        budget={"allocation": "uniform", "kept": kept, "of": checkpoint.num_experts, "n_group": checkpoint.n_group},
        strategy=_describe(chosen)
        | {"protected": {str(layer): sorted(who) for layer, who in sorted(protected.items())}},
        coverage=_coverage(statistics, layers),
        stability=stability.to_dict() if stability else {},
        notes=notes,
    )
    return derive(checkpoint, plan)


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
    drawn = make_plan(checkpoint, nothing, dataclasses.replace(wanted, strategy="random", weights=None, guard=False))
    return dataclasses.replace(drawn, strategy=_describe(resolve(wanted.strategy)))


def check_decisions(checkpoint: Checkpoint, wanted: Decisions, *, domains: Sequence[str]) -> tuple[Strategy, int]:
    """Check what can be known about a plan before its statistics.

    Returns:
        The strategy, and the experts that stay in each layer.
    """
    if wanted.mtp not in {"cut", "drop"}:
        raise ConfigError(f"--mtp must be cut or drop, not {wanted.mtp!r}", "cut is the default")
    if wanted.seed < 0:
        raise ConfigError(f"--seed must be at least 0, not {wanted.seed}")
    chosen = resolve(wanted.strategy)
    kept = wanted.budget.kept(checkpoint.router)
    domain_weights(domains, wanted.weights)
    _check_protection(checkpoint, wanted.protect or {})
    _check_target(engine_verdicts(checkpoint, kept), wanted.target)
    return chosen, kept


def check_statistics(checkpoint: Checkpoint, statistics: RouterStatistics) -> None:
    """Refuse statistics of another model."""
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


def _select(strategy: Strategy, stats: LayerStatistics, kept: int, *, n_group: int, protected: Set[int]) -> Selection:
    try:
        return select(strategy(stats), kept, n_group=n_group, protected=protected)
    except PlanError as error:
        raise PlanError(f"layer {stats.layer}: {error.message}", error.hint) from error


def _follow_last(checkpoint: Checkpoint, layers: Mapping[int, LayerPlan]) -> dict[int, LayerPlan]:
    """MTP layers that have no scores of their own take the last decoder layer's keep-list."""
    last = checkpoint.moe_layers[-1]
    copied = LayerPlan(keep=layers[last].keep, copied_from=last)
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
        budget=dict(plan.budget) | {"kept": plan.kept, "of": checkpoint.num_experts},
        size=_size(checkpoint, plan),
        engines=engine_verdicts(checkpoint, plan.kept),
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
    command |= {"ratio": budget.ratio} if budget.ratio is not None else {"keep": budget.keep}
    if budget.round_to != 1:
        command["round_to"] = budget.round_to
    if wanted.weights:
        command["weights"] = dict(sorted(wanted.weights.items()))
    if protect:
        command["protect"] = [f"{layer}:{expert}" for layer in sorted(protect) for expert in sorted(protect[layer])]
    return command | {"guard": wanted.guard, "mtp": wanted.mtp, "target": list(wanted.target), "seed": wanted.seed}


def _calibration_input(statistics: RouterStatistics) -> dict[str, str]:
    source = statistics.inputs.get("calibration")
    return {"calibration": source} if source else {}


def _describe(strategy: Strategy) -> dict[str, Any]:
    described = {"name": strategy.name, "what": strategy.summary}
    return described | ({"paper": f"arXiv:{strategy.paper}"} if strategy.paper else {})


def _coverage(statistics: RouterStatistics, layers: Mapping[int, LayerPlan]) -> dict[str, float]:
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


def _notes(checkpoint: Checkpoint, statistics: RouterStatistics, kept: int, wanted: Decisions) -> list[str]:
    notes = coverage_warnings(statistics)
    if wanted.guard and not statistics.tokens:
        notes.append("nothing was calibrated, so super experts could not be protected")
    if checkpoint.spec.announced_mtp(checkpoint.config) and not checkpoint.mtp_layers:
        notes.append("the config announces MTP layers that the checkpoint does not hold; engines may refuse it")
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
