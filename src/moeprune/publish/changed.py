"""What a card says of a checkpoint that is gated, fused, sparse, multiplexed or healed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from moeprune._files import human_bytes
from moeprune.accounts import HEAL, Account, percent
from moeprune.engines import engine_verdicts
from moeprune.plans_fuse import FUSE, FusePlan
from moeprune.plans_multiplex import MULTIPLEX, MultiplexPlan
from moeprune.plans_skip import SKIP, SkipPlan
from moeprune.plans_sparsify import SPARSIFY
from moeprune.publish.evidence import Evidence, Proof

Row = tuple[str, ...]
_TAGS = {
    SKIP: "expert-skipping",
    FUSE: "expert-merging",
    SPARSIFY: "sparse",
    MULTIPLEX: "expert-merging",
    HEAL: "distillation",
}


def tags_of(accounts: Sequence[Account]) -> list[str]:
    """Tags for the Hub's search, one for each thing that was done."""
    return [_TAGS[account.kind] for account in accounts]


def stock(evidence: Evidence) -> bool:
    """Whether engines load it as they load the parent."""
    return all(account.stock for account in evidence.accounts)


def gated(evidence: Evidence) -> bool:
    """Whether it does what the card says only with its gates, which stock engines leave out without a word."""
    change = evidence.sources.change
    return isinstance(change, SkipPlan) and not change.baked


def rows_of(evidence: Evidence) -> Iterator[Row]:
    """What differs from the parent."""
    checkpoint, sources = evidence.checkpoint, evidence.sources
    origin, change, skip = sources.provenance or {}, sources.change, sources.skip
    experts, before = origin.get("experts", {}), checkpoint.top_k
    if experts and experts["before"] != experts["after"]:
        yield "routed experts per MoE layer", str(experts["before"]), str(experts["after"])
    if isinstance(change, SkipPlan):
        before = change.top_k
    yield "experts per token (top-k)", str(before), str(checkpoint.top_k)
    if gated(evidence) and isinstance(change, SkipPlan):
        yield "slots skipped on the calibration text", "none", percent(change.rate)
        measured = percent(skip["point"]["policy"]["rate"]) if skip else "not measured"
        yield "slots skipped on held-out text", "none", measured
    if isinstance(change, MultiplexPlan):
        yield "experts on disk, with their residuals", *map(human_bytes, change.expert_bytes)
    for key, value in (change.config_edits if change is not None else {}).items():
        yield f"{key} in the config", "", str(value)
    if origin.get("bytes"):
        yield "weights on disk", *(human_bytes(origin["bytes"][side]) for side in ("before", "after"))


def proof_of(evidence: Evidence, proof: Proof) -> str:
    """What is known of the bytes."""
    found = proof.verification
    if found is None:
        return "Whether the weights are those that were written is not known: no digests of them were recorded."
    size = human_bytes(found.nbytes)
    if not proof.with_source:
        return (
            f"All {found.tensors:,} tensors ({size}) have the digests that were recorded when they were written. The "
            "parent itself was not read again for this card; moeprune verify does that."
        )
    source = "what was healed" if evidence.sources.healing else "the parent"
    same = (
        f"{found.tensors - found.computed:,} tensors and {found.files} other files were compared with {source}'s bytes"
    )
    if not found.computed:
        return f"{same}, and all are equal ({size})."
    return (
        f"{same} and are equal; {found.computed:,} tensors were computed, and are as they were written ({size} in all)."
    )


def choices_of(accounts: Sequence[Account]) -> Iterator[str]:
    """How it was made."""
    for account in accounts:
        yield f"{account.doing.capitalize()}: {account.summary}."
        yield from (f"{label[0].upper()}{label[1:]}: {value}." for label, value in account.lines.items())


def skip_cost(skip: Mapping[str, Any]) -> str:
    """What skipping costs on held-out text, at the rate that was measured there."""
    own = skip["point"]["policy"]
    lower, upper = own["ratio"]["interval"]
    return (
        f"with {percent(own['rate'])} of the slots skipped, perplexity on held-out text is "
        f"{own['ratio']['value']:.3f} times the parent's (95 % interval {lower:.3f} to {upper:.3f})"
    )


def engine_rows(evidence: Evidence, ran: str, version: str) -> list[Row]:
    """What each engine makes of the files: by its rules, or because it ran them.

    Args:
        evidence: of the checkpoint.
        ran: the engine that ran tasks on these weights; empty where none did.
        version: of it.
    """
    change, checkpoint = evidence.sources.change, evidence.checkpoint
    rules: Mapping[str, Sequence[str]] = (
        change.engines if isinstance(change, FusePlan) else engine_verdicts(checkpoint, checkpoint.num_experts)
    )
    if checkpoint.router_rows:
        rules = dict.fromkeys(
            rules, (f"routers of {checkpoint.router_rows} rows over {checkpoint.num_experts} experts",)
        )
    own = not stock(evidence) or gated(evidence)
    rows: list[Row] = [
        (engine, _verdict(evidence, engine == ran and not own, version, why)) for engine, why in rules.items()
    ]
    if own:
        tasks = f", in {ran} {version}" if ran and version else ""
        rows.append(
            ("moeprune.load", f"ran the tasks above as described here{tasks}" if ran else "runs it as described")
        )
    return rows


def calibration_digest(evidence: Evidence) -> str:
    """Sha256 of the tokens that decided or trained anything; empty where that is not recorded."""
    change, healing = evidence.sources.change, evidence.sources.healing or {}
    inputs = change.inputs if change is not None else healing.get("inputs", {})
    return str(inputs.get("calibration", ""))


def _verdict(evidence: Evidence, ran: bool, version: str, reasons: Sequence[str]) -> str:
    if ran:
        return f"loaded{f' by {version}' if version else ''}: it ran the tasks above"
    if not stock(evidence):
        why = "; ".join(map(str, reasons)) or "it does not know this format"
        return f"does not load (not run): {why}"
    if reasons:
        return f"does not load, according to its rules (not run): {'; '.join(map(str, reasons))}"
    return "loads, according to its rules (not run)" + (", and skips nothing" if gated(evidence) else "")


def limits_of(evidence: Evidence) -> Iterator[str]:
    """What to know before use."""
    if evidence.plan is not None and evidence.accounts:
        yield "Experts were removed, and the result was healed afterwards."
    for account in evidence.accounts:
        yield f"Weights: {account.weights}"
        yield f"Loads in: {account.loads}."
        yield from map(str, account.notes)
    if gated(evidence) and evidence.sources.skip is None:
        yield "What skipping costs was not measured on held-out text."
