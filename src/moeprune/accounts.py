"""What was done to a model, in the few words that a terminal, a page and a model card share: one account a kind."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from moeprune._files import human_bytes
from moeprune.errors import ranges
from moeprune.plan_kinds import ChangePlan
from moeprune.plans_fuse import FUSE, TIED, FusePlan
from moeprune.plans_multiplex import MULTIPLEX, MultiplexPlan
from moeprune.plans_skip import SKIP, SkipPlan
from moeprune.plans_sparsify import SPARSIFY, SparsifyPlan

HEALING = "moeprune.healing/1"
HEAL = "heal"
_ENVELOPE = {"schema", "moeprune_version", "command", "inputs"}
Row = tuple[str, ...]

_STOCK = "whatever loads the source"
_OWN_ONLY = "moeprune.load alone: no engine knows this format"


@dataclass(frozen=True, slots=True, kw_only=True)
class Account:
    """What a plan, or a record of healing, says.

    Attributes:
        kind: of the plan; ``heal`` for a record of healing.
        doing: what it is called that was done, such as ``skipping experts``; done: what a model is called afterwards.
        summary: what was done, as the end of a sentence.
        facts: the same for programs.
        lines: label and value, for people.
        weights: what became of the weights, as a sentence.
        loads: what loads the result, and what that then does.
        stock: whether stock engines load it.
        trained: whether anything was trained.
        head, rows: a table by layer.
        notes: what a reader should know.
    """

    kind: str
    doing: str
    done: str
    summary: str
    facts: Mapping[str, Any]
    lines: Mapping[str, str]
    weights: str
    loads: str
    stock: bool = True
    trained: bool = False
    head: Row = ()
    rows: Sequence[Row] = ()
    notes: Sequence[str] = field(default=())


def account_of(plan: ChangePlan) -> Account:
    """The account of a plan of any kind but ``drop``.

    Example:
        >>> account_of(SkipPlan.load("plan.json")).summary
    """
    match plan:
        case SkipPlan():
            return _skip(plan)
        case FusePlan():
            return _fuse(plan)
        case SparsifyPlan():
            return _sparsify(plan)
        case MultiplexPlan():
            return _multiplex(plan)


def history(change: ChangePlan | None, healing: Mapping[str, Any] | None) -> tuple[Account, ...]:
    """What was done to a checkpoint in its order, by the plan and the record of healing that lie in its folder."""
    first = [account_of(change)] if change is not None else []
    last = [account_of_healing(healing)] if healing is not None else []
    if last and last[0].trained:
        first = [replace(account, weights="Other ones since: they were healed.") for account in first]
    return (*first, *last)


def percent(share: float) -> str:
    """``30.0 %``."""
    return f"{100 * share:.1f} %"


def _edits(edits: Mapping[str, Any]) -> dict[str, str]:
    return {"config": ", ".join(f"{key} = {value}" for key, value in edits.items())} if edits else {}


# --- skip -------------------------------------------------------------------------------------------------------------


def _skip(plan: SkipPlan) -> Account:
    rates = {index: layer.rate for index, layer in sorted(plan.layers.items())}
    kept = plan.top_k * (1 - plan.rate)
    summary = (
        f"every token is sent to {kept:.0f} experts instead of {plan.top_k}, by the config"
        if plan.baked
        else f"{percent(plan.rate)} of the (token, expert) slots are skipped on the calibration text, by {plan.policy}"
    )
    return Account(
        kind=SKIP,
        doing="skipping experts of tokens",
        done="gated",
        summary=summary,
        facts=_skip_facts(plan, rates),
        lines=_skip_lines(plan, rates),
        weights=_skip_weights(plan),
        loads=(
            _STOCK
            if plan.baked
            else f"{_STOCK}, and then skips nothing, for no engine reads the plan; moeprune.load runs the gates"
        ),
        trained=_improved(plan.training),
        head=("layer", "threshold", "skipped") if rates else (),
        rows=[
            (str(index), "none" if layer.threshold == -math.inf else f"{layer.threshold:.6g}", percent(layer.rate))
            for index, layer in sorted(plan.layers.items())
        ],
        notes=plan.notes,
    )


def _skip_facts(plan: SkipPlan, rates: Mapping[int, float]) -> dict[str, Any]:
    return {
        "policy": plan.policy,
        "renorm": str(plan.renorm),
        "target": plan.target,
        "rate": plan.rate,
        "top_k": plan.top_k,
        "floor": plan.floor,
        "baked": plan.baked,
        "rates": {str(index): rate for index, rate in rates.items()},
        "tensors": {name: list(array.shape) for name, array in sorted(plan.tensors.items())},
        "config_edits": dict(plan.config_edits),
        "training": dict(plan.training),
    }


def _skip_lines(plan: SkipPlan, rates: Mapping[int, float]) -> dict[str, str]:
    shared = plan.command.get("thresholds") == "global"
    low, high = min(rates.values(), default=0.0), max(rates.values(), default=0.0)
    if plan.baked:
        return {"policy": f"{plan.policy}, in the config", **_edits(plan.config_edits)}
    nbytes = sum(array.nbytes for array in plan.tensors.values())
    return {
        "policy": f"{plan.policy}, {'one threshold for all layers' if shared else 'a threshold for each layer'}",
        "weights of slots": f"renorm {plan.renorm}",
        "skipped": f"{percent(plan.rate)} of the slots on the calibration text ({percent(plan.target)} asked)",
        **({"by layer": f"{percent(low)} to {percent(high)}"} if percent(low) != percent(high) else {}),
        "never skipped": f"{plan.floor} of the {plan.top_k} slots of a token",
        **({"arrays": f"{len(plan.tensors)} beside the plan, {human_bytes(nbytes)}"} if nbytes else {}),
        **_edits(plan.config_edits),
        **({"trained": _divergence(plan.training)} if plan.training else {}),
    }


def _skip_weights(plan: SkipPlan) -> str:
    if _improved(plan.training):
        return f"Trained with the gates in the loop: {_divergence(plan.training)}."
    return "Those of the source, byte for byte; nothing was trained."


# --- fuse -------------------------------------------------------------------------------------------------------------


def _fuse(plan: FusePlan) -> Account:
    layers = sorted(plan.layers.items())
    before = sum(len(group.members) for group in layers[0][1].groups)
    merged = sum(group.merged for _, layer in layers for group in layer.groups)
    alone = sum(len(layer.groups) for _, layer in layers) - merged
    tied = plan.router == TIED
    name = plan.strategy.get("name", "by hand")
    return Account(
        kind=FUSE,
        doing="merging experts",
        done="fused",
        summary=f"{before} routed experts were merged into {plan.kept} in each of {len(layers)} MoE layers, by {name}",
        facts={
            "strategy": plan.strategy.get("name"),
            "layers": len(layers),
            "kept": plan.kept,
            "of": before,
            "merge": plan.merge,
            "align": plan.align,
            "router": plan.router,
            "merged_groups": merged,
            "size": dict(plan.size),
            "engines": {engine: list(reasons) for engine, reasons in plan.engines.items()},
        },
        lines={
            "grouping": f"{name}: {plan.strategy.get('what', 'groups')}",
            "experts": f"{before} merged into {plan.kept} in layers {ranges([index for index, _ in layers])}",
            "merged by": f"{plan.merge}, {'aligned' if plan.align else 'not aligned'}, router {plan.router}",
            "groups": f"{merged} of several experts, {alone} of one, which stays as it is",
            **_edits(plan.config_edits),
        },
        weights=(
            f"{merged} experts are sums of several; {alone} are the source's, byte for byte. Nothing was trained."
        ),
        loads=_OWN_ONLY if tied else _STOCK,
        stock=not tied,
        head=("layer", "experts", "merged"),
        rows=[(str(index), str(len(layer.groups)), _groups(layer.groups)) for index, layer in layers],
        notes=plan.notes,
    )


def _groups(groups: Sequence[Any]) -> str:
    return "; ".join("+".join(map(str, group.members)) for group in groups if group.merged) or "none"


# --- sparsify ---------------------------------------------------------------------------------------------------------


def _sparsify(plan: SparsifyPlan) -> Account:
    layers, gone = sorted(plan.layers.items()), percent(plan.measured)
    narrow = bool(plan.width)
    summary = (
        f"{gone} of the experts' weights were removed with whole neurons, {plan.width} of which are left in an expert"
        if narrow
        else f"{gone} of the experts' weights were made 0 ({plan.sparsity})"
    )
    return Account(
        kind=SPARSIFY,
        doing="taking weights out of experts",
        done="sparse",
        summary=summary,
        facts={
            **plan.sparsity.canonical(),
            "measured": plan.measured,
            "width": plan.width,
            "layers": {str(index): layer.sparsity for index, layer in layers},
            "config_edits": dict(plan.config_edits),
        },
        lines={
            "pattern": str(plan.sparsity),
            "gone": f"{gone} of the experts' weights in layers {ranges([index for index, _ in layers])}",
            **(
                {"neurons": f"{plan.width} in an expert"}
                if narrow
                else {"stored": "as zeros: the file does not shrink"}
            ),
            **_edits(plan.config_edits),
        },
        weights=f"{gone} of the experts' weights {'are gone' if narrow else 'are 0'}; "
        "the others are the source's, byte for byte. Nothing was trained.",
        loads=_STOCK + ("" if narrow else "; only a kernel for this pattern gains time or memory by the zeros"),
        head=("layer", "weights of experts", "gone", "share"),
        rows=[
            (str(index), f"{layer.weights:,}", f"{layer.gone:,}", percent(layer.sparsity)) for index, layer in layers
        ],
        notes=plan.notes,
    )


# --- multiplex --------------------------------------------------------------------------------------------------------


def _multiplex(plan: MultiplexPlan) -> Account:
    layers = sorted(plan.layers.items())
    fused, before = len(layers[0][1].groups), len(layers[0][1].new_numbers)
    saved = percent(1 - plan.expert_bytes[1] / plan.expert_bytes[0])
    trained = any(layer.loss for _, layer in layers)
    return Account(
        kind=MULTIPLEX,
        doing="multiplexing experts",
        done="multiplexed",
        summary=f"{before} routed experts share {fused} in each of {len(layers)} MoE layers, "
        f"told apart by residuals of rank {plan.rank}",
        facts={
            "layers": len(layers),
            "kept": fused,
            "of": before,
            "rank": plan.rank,
            "expert_bytes": {"before": plan.expert_bytes[0], "after": plan.expert_bytes[1]},
            "loss": {str(index): list(layer.loss) for index, layer in layers},
            "config_edits": dict(plan.config_edits),
        },
        lines={
            "experts": f"{before} share {fused} in layers {ranges([index for index, _ in layers])}",
            "residuals": f"rank {plan.rank} of every expert, in multiplex.safetensors",
            "bytes": f"{saved} fewer for experts, residuals included",
            **({"trained": "every layer alone, on what the original's layer gives"} if trained else {}),
            **_edits(plan.config_edits),
        },
        weights="Shared experts and their residuals are new"
        + (", trained layer by layer." if trained else "; nothing was trained.")
        + " Everything else is the source's, byte for byte.",
        loads=_OWN_ONLY,
        stock=False,
        trained=trained,
        head=("layer", "error before training", "after"),
        rows=[(str(index), *(_losses(layer.loss))) for index, layer in layers],
        notes=plan.notes,
    )


def _losses(loss: Sequence[float]) -> tuple[str, str]:
    before, after = (*loss, math.nan, math.nan)[:2]
    return ("", "") if math.isnan(before) else (percent(before), percent(after))


# --- heal -------------------------------------------------------------------------------------------------------------


def _improved(training: Mapping[str, Any]) -> bool:
    """Whether trained weights were taken: a run that made nothing better leaves those of the source."""
    return bool(training) and bool(training.get("healed", training.get("best_step", 1)))


def _divergence(training: Mapping[str, Any]) -> str:
    taken = "" if _improved(training) else "; nothing was better than the given weights, which stay"
    kl = training.get("held_out_kl")
    if kl is None:
        return f"{training.get('steps', 'some')} steps{taken}"
    steps = f", step {training['best_step']} of {training['steps']}" if not taken and "best_step" in training else ""
    return f"KL {float(kl['before']):.4g} → {float(kl['after']):.4g} nats on held-out calibration text{steps}{taken}"


def account_of_healing(record: Mapping[str, Any]) -> Account:
    """The account of what ``healing.json`` holds.

    Raises:
        KeyError, TypeError, ValueError: it does not hold what it should.
    """
    method, improved, trained = str(record["method"]), _improved(record), _trained(record)
    what, count = _divergence(record), record.get("trained_parameters")
    return Account(
        kind=HEAL,
        doing="healing",
        done="healed",
        summary=f"weights were trained towards the original's outputs ({method}: {trained}; {what})"
        if improved
        else f"healing ({method}: {trained}) found no better weights, so that this is a copy of what was to be healed",
        facts={key: value for key, value in record.items() if key not in _ENVELOPE},
        lines={
            "method": method,
            "trained": trained + (f", {count:,} parameters" if count else ""),
            "came to": what,
        },
        weights=f"Trained, {method}: {trained}; {what}."
        if improved
        else "Those that were to be healed, byte for byte; no training made them better.",
        loads=f"{_STOCK}: the shapes are those of what was healed",
        trained=improved,
        **_looks(record),
    )


def _trained(record: Mapping[str, Any]) -> str:
    levels = record["command"].get("train", "attention, by low-rank adapters that were merged")
    return levels if isinstance(levels, str) else ", ".join(map(str, levels))


def _looks(record: Mapping[str, Any]) -> dict[str, Any]:
    """What was measured on the way: by layer, or by step."""
    if layers := record.get("layers"):
        losses = {index: layer["loss"] for index, layer in layers.items()}
        rows = [(index, f"{loss['before']:.4g}", f"{loss['after']:.4g}") for index, loss in losses.items()]
        return {"head": ("layer", "held-out loss before", "after"), "rows": rows}
    if looks := record.get("looks"):
        return {"head": ("step", "KL, nats"), "rows": [(str(step), f"{kl:.4g}") for step, kl in looks.items()]}
    return {}
