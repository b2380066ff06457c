"""Decide which experts stay: statistics, a strategy and a budget to a checked plan. Runs without torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence, Set
from typing import Any

import numpy as np

from moeprune.checkpoint import Checkpoint
from moeprune.errors import ConfigError, PlanError, StaleArtifactError, nearest
from moeprune.plans import Budget, LayerPlan, MtpPolicy, PruningPlan
from moeprune.rewrite.drop import check_plan, output_tensors
from moeprune.statistics import RouterStatistics, domain_weights
from moeprune.strategies import Criterion, Strategy, resolve
from moeprune.strategies.guards import super_experts
from moeprune.strategies.selection import select

RARE = 20  # an expert seen by fewer tokens than this has a score made of noise
ENGINES = ("transformers", "vllm", "sglang", "llama.cpp")
Protected = Mapping[int, Set[int]]


def make_plan(
    checkpoint: Checkpoint,
    statistics: RouterStatistics,
    budget: Budget,
    *,
    strategy: str | Criterion,
    weights: Mapping[str, float] | None = None,
    protect: Protected | None = None,
    guard: bool = True,
    mtp: MtpPolicy = "cut",
    target: Sequence[str] = (),
    seed: int = 0,
) -> PruningPlan:
    """Plan the same number of kept experts for every MoE layer.

    Args:
        checkpoint: the model the plan is for.
        statistics: what was measured on it.
        budget: ratio or count.
        strategy: a name or a callable.
        weights: weight of each calibration domain, 1 where none is given.
        protect: experts by layer that must stay.
        guard: also keep the super experts, whatever the strategy says.
        mtp: ``cut`` gives MTP layers the last decoder layer's keep-list, ``drop`` removes them.
        target: engines that must take the result.
        seed: for strategies that draw.

    Raises:
        StaleArtifactError: the statistics were made for another model.
        StrategyError: the strategy is unknown or its statistics are missing.
        ConfigError: the budget or another option cannot work.
        PlanError: an engine in ``target`` would not take the result.
    """
    check_statistics(checkpoint, statistics)
    chosen, kept = check_decisions(
        checkpoint,
        budget,
        strategy=strategy,
        domains=statistics.domains,
        weights=weights,
        protect=protect,
        mtp=mtp,
        target=target,
    )
    protected = _union(protect or {}, super_experts(statistics) if guard else {})
    layers = {
        layer: _plan_layer(
            checkpoint, statistics, chosen, layer, kept, protected.get(layer, frozenset()), weights, seed
        )
        for layer in checkpoint.moe_layers
    }
    notes = _notes(checkpoint, statistics, kept, guard=guard)
    if checkpoint.mtp_layers:
        notes.append(_plan_mtp(checkpoint, layers, mtp))
    plan = PruningPlan(
        layers=layers,
        config_edits={},
        command=_command(budget, chosen, weights, protect, guard=guard, mtp=mtp, target=target, seed=seed),
        inputs={"model": checkpoint.fingerprint} | _calibration_input(statistics),
        budget={"allocation": "uniform", "kept": kept, "of": checkpoint.num_experts, "n_group": checkpoint.n_group},
        strategy=_describe(chosen)
        | {"protected": {str(layer): sorted(who) for layer, who in sorted(protected.items())}},
        coverage=_coverage(statistics, layers),
        engines=engine_verdicts(checkpoint, kept),
        notes=notes,
    )
    return _with_size(checkpoint, check_plan(checkpoint, plan))


def preview(
    checkpoint: Checkpoint, budget: Budget, *, strategy: str | Criterion, mtp: MtpPolicy = "cut", **_: Any
) -> PruningPlan:
    """A plan of the right size whose choice of experts means nothing, for looking before calibrating."""
    nothing = RouterStatistics.empty(
        checkpoint.moe_layers,
        num_experts=checkpoint.num_experts,
        top_k=checkpoint.top_k,
        model=checkpoint.fingerprint,
    )
    drawn = make_plan(checkpoint, nothing, budget, strategy="random", guard=False, mtp=mtp)
    return dataclasses.replace(drawn, strategy=_describe(resolve(strategy)))


def check_decisions(
    checkpoint: Checkpoint,
    budget: Budget,
    *,
    strategy: str | Criterion,
    domains: Sequence[str],
    weights: Mapping[str, float] | None = None,
    protect: Protected | None = None,
    mtp: MtpPolicy = "cut",
    target: Sequence[str] = (),
    **_: Any,
) -> tuple[Strategy, int]:
    """Check everything about a plan that can be known before its statistics; see :func:`make_plan` for the options.

    Returns:
        The strategy, and the experts that stay in each layer.
    """
    if mtp not in {"cut", "drop"}:
        raise ConfigError(f"--mtp must be cut or drop, not {mtp!r}")
    chosen = resolve(strategy)
    kept = budget.kept(checkpoint.router)
    domain_weights(domains, weights)
    _check_protection(checkpoint, protect or {})
    _check_target(engine_verdicts(checkpoint, kept), target)
    return chosen, kept


def check_statistics(checkpoint: Checkpoint, statistics: RouterStatistics) -> None:
    """Refuse statistics of another model."""
    made_for = statistics.inputs.get("model")
    if made_for != checkpoint.fingerprint:
        hint = (
            "observe(model, like=FOLDER) binds them to a checkpoint" if not made_for else "collect them from this model"
        )
        raise StaleArtifactError(f"the statistics were made for another model than {checkpoint.path.name}", hint)
    missing = sorted(set(checkpoint.moe_layers) - set(statistics.layers))
    if missing:
        raise StaleArtifactError(f"the statistics lack layers {missing[:8]}", "collect all layers")


def _plan_layer(
    checkpoint: Checkpoint,
    statistics: RouterStatistics,
    strategy: Strategy,
    layer: int,
    kept: int,
    protected: Set[int],
    weights: Mapping[str, float] | None,
    seed: int,
) -> LayerPlan:
    values = strategy.criterion(statistics.layer(layer, weights, seed=seed))
    try:
        selection = select(values, kept, n_group=checkpoint.n_group, protected=protected)
    except PlanError as error:
        raise PlanError(f"layer {layer}: {error.message}", error.hint) from error
    return LayerPlan(keep=selection.keep, scores=selection.scores)


def _plan_mtp(checkpoint: Checkpoint, layers: dict[int, LayerPlan], mtp: MtpPolicy) -> str:
    """Give MTP layers their keep-list (they are not run in calibration) or leave them out."""
    names = ", ".join(map(str, checkpoint.mtp_layers))
    if mtp == "drop":
        return f"MTP layers {names} are dropped and the config's count of them is set to 0"
    last = checkpoint.moe_layers[-1]
    for layer in checkpoint.mtp_layers:
        layers[layer] = LayerPlan(keep=layers[last].keep, copied_from=last)
    return f"MTP layers {names} take the keep-list of layer {last}"


def _check_protection(checkpoint: Checkpoint, protect: Protected) -> None:
    for layer, experts in protect.items():
        if layer not in checkpoint.moe_layers:
            shown = f"{checkpoint.moe_layers[0]} to {checkpoint.moe_layers[-1]}"
            raise ConfigError(f"--protect names layer {layer}, which has no routed experts", f"MoE layers: {shown}")
        odd = [expert for expert in experts if not 0 <= expert < checkpoint.num_experts]
        if odd:
            raise ConfigError(f"--protect names expert {odd[0]} of {checkpoint.num_experts} in layer {layer}")


def _union(first: Protected, second: Protected) -> dict[int, frozenset[int]]:
    layers = sorted(first.keys() | second.keys())
    return {layer: frozenset(first.get(layer, ())) | frozenset(second.get(layer, ())) for layer in layers}


# --- what the plan says of itself -----------------------------------------------------------------------------------


def _command(
    budget: Budget, strategy: Strategy, weights: Mapping[str, float] | None, protect: Protected | None, **options: Any
) -> dict[str, Any]:
    """Canonical options: what decided, and nothing else."""
    command: dict[str, Any] = {"stage": "plan", "strategy": strategy.name}
    command |= {"ratio": budget.ratio} if budget.ratio is not None else {"keep": budget.keep}
    if budget.round_to != 1:
        command["round_to"] = budget.round_to
    if weights:
        command["weights"] = dict(sorted(weights.items()))
    if protect:
        command["protect"] = [f"{layer}:{expert}" for layer in sorted(protect) for expert in sorted(protect[layer])]
    return command | {key: list(value) if isinstance(value, tuple | list) else value for key, value in options.items()}


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


def _with_size(checkpoint: Checkpoint, plan: PruningPlan) -> PruningPlan:
    after = list(output_tensors(checkpoint, {layer: decision.keep for layer, decision in plan.layers.items()}))
    before = checkpoint.tensors.values()
    size: dict[str, Any] = {"bytes": {"before": checkpoint.nbytes, "after": sum(tensor.nbytes for tensor in after)}}
    if all(entry.dtype in _PLAIN for entry in before):
        counts = [sum(_numel(item.shape) for item in items if "scale" not in item.name) for items in (before, after)]
        size["parameters"] = {"before": counts[0], "after": counts[1]}
    return dataclasses.replace(plan, size=size)


# Types whose elements are parameters; packed formats hold several in one element and are only counted in bytes.
_PLAIN = {"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"}


def _numel(shape: Sequence[int]) -> int:
    return int(np.prod(shape, dtype=np.int64))


def _notes(checkpoint: Checkpoint, statistics: RouterStatistics, kept: int, *, guard: bool) -> list[str]:
    notes = coverage_warnings(statistics)
    if guard and not statistics.tokens:
        notes.append("nothing was calibrated, so super experts could not be protected")
    if checkpoint.spec.mtp_layers(checkpoint.config) and not checkpoint.mtp_layers:
        notes.append("the config announces MTP layers that the checkpoint does not hold; engines may refuse it")
    if kept % 8 and kept > 8:
        better = [count for count in (kept - kept % 8, kept + 8 - kept % 8) if not checkpoint.router.problem(count)]
        near = min(better, key=lambda count: (abs(count - kept), -count), default=None)
        advice = f"; {near} would not be" if near else ""
        what = "a prime number" if _is_prime(kept) else "no multiple of 8"
        notes.append(f"{kept} experts is {what}: slower or unsupported in fused kernels and expert parallelism{advice}")
    return notes


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % divisor for divisor in range(2, int(number**0.5) + 1))


def coverage_warnings(statistics: RouterStatistics) -> list[str]:
    """Warnings about experts that calibration hardly saw, with how much data would help."""
    if not statistics.tokens:
        return []
    counts = np.concatenate([values["count"].sum(axis=0) for values in statistics.layers.values()])
    never, rare = int((counts == 0).sum()), int(((counts > 0) & (counts < RARE)).sum())
    warnings = []
    per_expert = statistics.tokens * statistics.top_k / statistics.num_experts
    if per_expert < 10 * RARE:
        warnings.append(
            f"very short calibration data: {statistics.tokens:,} tokens give an expert {per_expert:.0f} on average; "
            f"use at least {int(10 * RARE / per_expert * statistics.tokens):,}"
        )
    if never or rare:
        factor = RARE / counts[counts > 0].min()
        more = f"; about {max(1.0, factor - 1):.0f} times the data would reach the rare ones" if rare else ""
        warnings.append(
            f"of {len(counts):,} experts {never:,} were never routed to and {rare:,} by fewer than {RARE} tokens{more}"
        )
    return warnings


# --- engines --------------------------------------------------------------------------------------------------------


def engine_verdicts(checkpoint: Checkpoint, kept: int) -> dict[str, tuple[str, ...]]:
    """Reasons why each engine would not take the result, read from the engines' sources; none means it will."""
    verdicts: dict[str, list[str]] = {engine: [] for engine in ENGINES}
    for engine, reasons in verdicts.items():
        if engine not in checkpoint.spec.engines:
            reasons.append(f"no loader for {checkpoint.spec.model_type}")
    if kept > 512:
        verdicts["vllm"].append("more than 512 experts")
        verdicts["llama.cpp"].append("more than 512 experts")
    if checkpoint.n_group > 1 and checkpoint.topk_group >= checkpoint.n_group:
        verdicts["llama.cpp"].append("topk_group must be smaller than n_group")
    if checkpoint.spec.mtp_layers(checkpoint.config) and not checkpoint.mtp_layers:
        verdicts["llama.cpp"].append("the config announces MTP layers that are not there")
    return {engine: tuple(reasons) for engine, reasons in verdicts.items()}


def _check_target(verdicts: Mapping[str, Sequence[str]], target: Sequence[str]) -> None:
    for engine in target:
        if engine not in verdicts:
            raise ConfigError(f"unknown engine {engine!r} in --target", nearest(engine, ENGINES))
        if verdicts[engine]:
            raise PlanError(f"{engine} would not take the result: {'; '.join(verdicts[engine])}")
