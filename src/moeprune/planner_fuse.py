"""Decide which experts are merged: statistics, a grouping and a budget to a checked fuse plan. Runs without torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

from moeprune.architectures import RouterName
from moeprune.checkpoint import Checkpoint
from moeprune.errors import ConfigError, PlanError, nearest
from moeprune.planner import check_statistics, coverage_warnings, derive
from moeprune.plans import Budget, MtpPolicy
from moeprune.plans_fuse import ABSORB, MERGES, ROUTERS, TIED, FuseLayer, FusePlan
from moeprune.rewrite.fuse import check_fuse
from moeprune.statistics import LayerStatistics, RouterStatistics, domain_weights
from moeprune.strategies.fusion import find_grouping, group_experts
from moeprune.strategies.guards import super_experts

GROUPING, MERGE, ROUTER = "hope-total", ABSORB, "keep-dominant"


@dataclass(frozen=True, slots=True, kw_only=True)
class Fusion:
    """What a fuse plan is asked for.

    Attributes:
        budget: ratio or count.
        grouping: name of :data:`moeprune.strategies.fusion.GROUPINGS`.
        merge: how weights are merged, of :data:`moeprune.plans_fuse.MERGES`.
        align: whether neurons are put in one order before; by default wherever neurons of several experts are mixed.
        router: which rows the new router has, of :data:`moeprune.plans_fuse.ROUTERS`.
        weights: weight of each calibration domain, 1 where none is given.
        guard: leave super experts alone.
        mtp: ``cut`` MTP layers to the experts that are dominant in the last decoder layer, or ``drop`` them, as a tied
            router does.
        sequential: whether every layer is grouped, and fitted, on what the fused layers before it give, as REAM does
            (arXiv:2604.04356); else all are on the original's own activations.
    """

    budget: Budget
    grouping: str = GROUPING
    merge: str = MERGE
    align: bool | None = None
    router: str = ROUTER
    weights: Mapping[str, float] | None = None
    guard: bool = True
    mtp: MtpPolicy = "cut"
    sequential: bool = False

    @property
    def aligned(self) -> bool:
        """Whether neurons are aligned."""
        return self.merge != ABSORB if self.align is None else self.align


def check_fusion(checkpoint: Checkpoint, wanted: Fusion) -> int:
    """Check what can be known about a fuse plan before its statistics; gives the experts that stay.

    Raises:
        ConfigError: an option cannot work.
        StrategyError: there is no such grouping.
    """
    find_grouping(wanted.grouping)
    for option, value, known in (
        ("--merge", wanted.merge, MERGES),
        ("--router", wanted.router, ROUTERS),
        ("--mtp", wanted.mtp, ("cut", "drop")),
    ):
        if value not in known:
            raise ConfigError(f"{option} knows no {value!r}", nearest(value, known))
    if wanted.align and wanted.merge == ABSORB:
        raise ConfigError("--merge absorb mixes no neurons that --align could put in order", "leave --align out")
    return wanted.budget.kept(checkpoint.router)


def make_fuse_plan(checkpoint: Checkpoint, statistics: RouterStatistics, wanted: Fusion) -> FusePlan:
    """Plan which experts are merged in every MoE layer.

    Args:
        checkpoint: the model the plan is for.
        statistics: what was measured on it.
        wanted: budget, grouping and the rest.

    Raises:
        StaleArtifactError: the statistics were made for another model.
        StrategyError: the grouping is unknown, or its statistics are missing.
        ConfigError: an option cannot work.
        PlanError: more super experts are left alone than there are groups.
    """
    if wanted.sequential:
        raise ConfigError(
            "a sequential plan is made while the layers before are fused, not from statistics of the original",
            "run `moeprune fuse MODEL --sequential --calibration data.jsonl`",
        )
    check_statistics(checkpoint, statistics)
    check_fusion(checkpoint, wanted)
    domain_weights(statistics.domains, wanted.weights)
    alone = super_experts(statistics) if wanted.guard else {}
    layers = {
        index: group_layer(checkpoint, statistics.layer(index, wanted.weights), wanted, alone.get(index, frozenset()))
        for index in checkpoint.moe_layers
    }
    calibration = statistics.inputs.get("calibration")
    plan = drafted(
        checkpoint, wanted, layers, calibration=calibration, alone=alone, notes=coverage_warnings(statistics)
    )
    return derive_fusion(checkpoint, plan)


def group_layer(checkpoint: Checkpoint, stats: LayerStatistics, wanted: Fusion, alone: Set[int]) -> FuseLayer:
    """Decide which experts of one layer become one.

    Args:
        checkpoint: the model.
        stats: of the layer.
        wanted: budget, grouping and the rest.
        alone: its experts that are merged with no other.

    Raises:
        StrategyError: the statistics lack what the grouping needs.
        PlanError: more experts are left alone than there are groups.
    """
    try:
        groups = group_experts(
            find_grouping(wanted.grouping),
            stats,
            wanted.budget.kept(checkpoint.router),
            n_group=checkpoint.n_group,
            alone=alone,
            equal=wanted.merge == "mean",
        )
    except PlanError as error:
        raise PlanError(f"layer {stats.layer}: {error.message}", error.hint) from error
    return FuseLayer(groups=groups)


def drafted(
    checkpoint: Checkpoint,
    wanted: Fusion,
    layers: Mapping[int, FuseLayer],
    *,
    calibration: str | None,
    alone: Mapping[int, frozenset[int]],
    notes: Sequence[str] = (),
) -> FusePlan:
    """A plan of some layers, not checked yet.

    Args:
        checkpoint: the model.
        wanted: what was asked for.
        layers: what was decided.
        calibration: fingerprint of the data, if there was any.
        alone: super experts by layer.
        notes: what to say beside what follows from the choices.
    """
    return FusePlan(
        layers=layers,
        merge=wanted.merge,
        align=wanted.aligned,
        router=wanted.router,
        mtp_layers=checkpoint.mtp_layers if wanted.mtp == "cut" and wanted.router != TIED else (),
        command=_command(wanted),
        inputs={"model": checkpoint.fingerprint} | ({"calibration": calibration} if calibration else {}),
        strategy=_describe(wanted, alone),
        notes=[*notes, *_notes(checkpoint, wanted)],
    )


def derive_fusion(checkpoint: Checkpoint, plan: FusePlan) -> FusePlan:
    """Check a plan and work out what follows from its groups, which a person may have edited.

    Raises:
        StaleArtifactError: the plan was made for another model.
        PlanError: no engine could run the result.
        UnsupportedModelError: the weights are quantised.
    """
    plan = check_fuse(checkpoint, plan)
    dropped = derive(checkpoint, plan.as_drop())
    engines = dropped.engines
    size = dropped.size
    if plan.router == TIED:
        engines = {engine: ["its router has more rows than there are experts"] for engine in engines}
        size = _with_whole_routers(checkpoint, size, plan.kept)
    return dataclasses.replace(plan, budget=dropped.budget, size=size, engines=engines)


def _with_whole_routers(checkpoint: Checkpoint, size: Mapping[str, Any], kept: int) -> dict[str, Any]:
    """The size when routers keep the rows of all experts."""
    routers = [checkpoint.tensors[name] for name, role in checkpoint.roles.items() if isinstance(role, RouterName)]
    own = [entry for entry in routers if checkpoint.roles[entry.name].layer in checkpoint.moe_layers]
    share, more = 1 - kept / checkpoint.num_experts, dict(size)
    counts = {"bytes": sum(entry.nbytes for entry in own), "parameters": sum(entry.numel for entry in own)}
    for what, count in counts.items():
        if what in more:
            more[what] = {**more[what], "after": more[what]["after"] + round(share * count)}
    return more


def _command(wanted: Fusion) -> dict[str, Any]:
    """Canonical options: what decided, and nothing else."""
    budget = wanted.budget
    command: dict[str, Any] = {"stage": "fuse", "grouping": wanted.grouping}
    command |= {name: value for name in ("ratio", "keep") if (value := getattr(budget, name)) is not None}
    if budget.round_to != 1:
        command["round_to"] = budget.round_to
    if wanted.weights:
        command["weights"] = dict(sorted(wanted.weights.items()))
    if wanted.sequential:
        command["sequential"] = True
    choices = {name: getattr(wanted, name) for name in ("merge", "router", "guard", "mtp")}
    return command | choices | {"align": wanted.aligned}


def _describe(wanted: Fusion, alone: Mapping[int, frozenset[int]]) -> dict[str, Any]:
    grouping = find_grouping(wanted.grouping)
    described: dict[str, Any] = {"name": grouping.name, "what": grouping.summary}
    described |= {"paper": f"arXiv:{grouping.paper}"} if grouping.paper else {}
    return described | {"protected": {str(layer): sorted(who) for layer, who in sorted(alone.items())}}


def _notes(checkpoint: Checkpoint, wanted: Fusion) -> list[str]:
    notes = []
    if wanted.router == TIED:
        notes.append("only moeprune.load runs a checkpoint with a tied router: no stock engine does")
        if checkpoint.mtp_layers:
            notes.append("MTP layers are dropped: nothing could run them behind a tied router")
    elif checkpoint.mtp_layers and wanted.mtp == "cut":
        notes.append("MTP layers keep the experts that are dominant in the last decoder layer, unmerged")
    return notes
