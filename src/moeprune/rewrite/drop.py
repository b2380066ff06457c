"""The byte-copy executor: drop experts, renumber the rest, slice router rows. No tensor is decoded.

Every output tensor is a list of byte ranges of source files, so the result is bit-exact by construction in whatever
dtype or quantisation the checkpoint is stored.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from moeprune._files import (
    PathLike,
    begin_work,
    check_free_space,
    check_output_folder,
    envelope,
    output_folder,
    to_json,
)
from moeprune.architectures import ExpertName, RouterName
from moeprune.checkpoint import Checkpoint, TensorEntry
from moeprune.errors import ConfigError, LayoutError, PlanError, StaleArtifactError
from moeprune.plans import DROP, PruningPlan, check_keep
from moeprune.rewrite.raw_config import edit_json
from moeprune.rewrite.shards import Copied, OutputTensor, Segment, copy_other_files, write_shards

PROVENANCE = "moeprune"  # the folder inside a checkpoint where engines that glob *.safetensors do not look
DEFAULT_SHARD_SIZE = 5_000_000_000


def config_edits(checkpoint: Checkpoint, kept: int, *, drop_mtp: bool) -> dict[str, int]:
    """The config values that change: every expert count that is present, and the MTP count when MTP layers go."""
    edits = {key: kept for key in checkpoint.spec.count_keys if key in checkpoint.config}
    if drop_mtp:
        edits[checkpoint.spec.mtp_key] = 0
    return edits


def check_plan(checkpoint: Checkpoint, plan: PruningPlan) -> PruningPlan:
    """Check a plan against the checkpoint and derive again what follows from its keep-lists.

    Raises:
        StaleArtifactError: the plan was made for another model.
        PlanError: a layer is missing, or no engine could run the result.
        LayoutError: the config names experts by number.
    """
    if plan.kind != DROP:
        raise PlanError(f"this executor runs plans of kind {DROP!r}, not {plan.kind!r}")
    if plan.inputs.get("model") != checkpoint.fingerprint:
        raise StaleArtifactError(
            f"the plan was made for another model than {checkpoint.path.name}",
            "make a plan from statistics of this model, with the same config.json and weights",
        )
    planned, trunk, mtp = set(plan.layers), set(checkpoint.moe_layers), set(checkpoint.mtp_layers)
    if planned not in (trunk, trunk | mtp):
        odd = sorted(planned ^ (trunk | mtp))
        raise PlanError(f"the plan and the checkpoint do not have the same MoE layers (first odd one: {odd[0]})")
    for layer, decision in sorted(plan.layers.items()):
        check_keep(layer, decision.keep, checkpoint.router)
    check_counts(plan)
    if plan.kept < checkpoint.num_experts:
        _check_named_experts(checkpoint)
    dropped = bool(mtp) and planned == trunk
    return dataclasses.replace(plan, config_edits=config_edits(checkpoint, plan.kept, drop_mtp=dropped))


def check_counts(plan: PruningPlan) -> None:
    """Refuse a plan whose layers keep different numbers of experts."""
    counts = sorted({len(decision.keep) for decision in plan.layers.values()})
    if len(counts) > 1:
        raise PlanError(
            f"layers keep different numbers of experts: {counts}", "no stock engine loads such a checkpoint"
        )


def _check_named_experts(checkpoint: Checkpoint) -> None:
    """Refuse a config that singles out experts by number, as lists of unquantised modules may: they get new numbers."""
    named: dict[tuple[str, str], set[int]] = defaultdict(set)
    experts = re.escape(checkpoint.spec.experts)
    for before, number, after in re.findall(rf'"([^"]*{experts})(\d+)([^"]*)"', checkpoint.config_text):
        named[before, after].add(int(number))
    for (before, after), numbers in named.items():
        if numbers != set(range(checkpoint.num_experts)):  # a list of all of them holds for those that stay
            raise LayoutError(
                f"config.json names {before}{min(numbers)}{after}, and experts are renumbered",
                "take a checkpoint whose quantisation does not differ from expert to expert",
            )


def output_tensors(checkpoint: Checkpoint, keep: Mapping[int, tuple[int, ...]]) -> Iterator[OutputTensor]:
    """Every tensor of the pruned checkpoint, in the source's order.

    Args:
        checkpoint: the source.
        keep: experts that stay by layer; an MTP layer that is absent is left out whole.
    """
    new_number = {layer: {old: new for new, old in enumerate(kept)} for layer, kept in keep.items()}
    for name, entry in checkpoint.tensors.items():
        role = checkpoint.roles[name]
        if role.layer in checkpoint.mtp_layers and role.layer not in keep:
            continue
        if isinstance(role, ExpertName):
            if role.expert in new_number[role.layer]:
                yield _whole(role.renumbered(new_number[role.layer][role.expert]), entry)
        elif isinstance(role, RouterName):
            yield _rows(entry, keep[role.layer], role.axis)
        else:
            yield _whole(name, entry)


def _whole(name: str, entry: TensorEntry) -> OutputTensor:
    segment = Segment(file=entry.file, begin=entry.begin, end=entry.end)
    return OutputTensor(name=name, dtype=entry.dtype, shape=entry.shape, segments=(segment,))


def _rows(entry: TensorEntry, keep: tuple[int, ...], axis: int) -> OutputTensor:
    """Keep some rows along an axis: one byte range per run of neighbouring rows."""
    count = entry.shape[axis]
    outer = 1
    for size in entry.shape[:axis]:
        outer *= size
    width, rest = divmod(entry.nbytes, outer * count)
    if rest:
        raise PlanError(f"router tensor {entry.name!r} cannot be cut along axis {axis}: rows share bytes")
    segments = []
    for block in range(outer):
        start = entry.begin + block * count * width
        for _, run in itertools.groupby(enumerate(keep), key=lambda pair: pair[1] - pair[0]):
            rows = [row for _, row in run]
            segments.append(Segment(file=entry.file, begin=start + rows[0] * width, end=start + (rows[-1] + 1) * width))
    shape = (*entry.shape[:axis], len(keep), *entry.shape[axis + 1 :])
    return OutputTensor(name=entry.name, dtype=entry.dtype, shape=shape, segments=tuple(segments))


def keep_lists(plan: PruningPlan) -> dict[int, tuple[int, ...]]:
    """The part of a plan that steers the rewrite."""
    return {layer: decision.keep for layer, decision in plan.layers.items()}


def check_output(checkpoint: Checkpoint, output: PathLike, *, overwrite: bool) -> None:
    """Refuse an output that is not empty, or that would replace the checkpoint it is made from."""
    check_output_folder(output, overwrite=overwrite)
    source, target = checkpoint.path.resolve(), Path(output).resolve()
    if source == target or target in source.parents or source in target.parents:
        raise ConfigError(f"output {output} and the source checkpoint lie inside one another", "choose another -o")


def apply_drop(
    checkpoint: Checkpoint,
    plan: PruningPlan,
    output: PathLike,
    *,
    max_shard_size: int = DEFAULT_SHARD_SIZE,
    overwrite: bool = False,
    extra: Mapping[str, bytes] | None = None,
) -> Path:
    """Write the pruned checkpoint; the folder appears whole or not at all.

    Args:
        checkpoint: the source.
        plan: keep-lists for every MoE layer.
        output: new folder.
        max_shard_size: bytes of tensors per file.
        overwrite: replace a folder that is not empty.
        extra: more files for the provenance folder, by name.

    Returns:
        The finished folder.
    """
    plan = check_plan(checkpoint, plan)
    check_output(checkpoint, output, overwrite=overwrite)
    tensors = list(output_tensors(checkpoint, keep_lists(plan)))
    check_free_space(output, sum(tensor.nbytes for tensor in tensors) + 64_000_000)
    begin_work()
    with output_folder(output, overwrite=overwrite) as staging:
        copied = write_checkpoint(checkpoint, tensors, plan.config_edits, staging, max_shard_size)
        records = dict(extra or {}) | {
            "plan.json": to_json(plan.to_dict()).encode(),
            "manifest.json": to_json(_manifest(copied)).encode(),
            "provenance.json": to_json(provenance(checkpoint, plan, copied)).encode(),
        }
        (staging / PROVENANCE).mkdir()
        for name, data in records.items():
            (staging / PROVENANCE / name).write_bytes(data)
    return Path(output)


def write_checkpoint(
    checkpoint: Checkpoint,
    tensors: Sequence[OutputTensor],
    edits: Mapping[str, int],
    folder: Path,
    max_shard_size: int,
) -> list[Copied]:
    """Write shards, index, the edited config and the files that travel as they are."""
    copied = write_shards(tensors, folder, checkpoint.shard_metadata, max_shard_size)
    (folder / "config.json").write_bytes(edit_json(checkpoint.config_text, edits).encode())
    copy_other_files(checkpoint.path, folder)
    return copied


def _manifest(copied: list[Copied]) -> dict[str, Any]:
    return {
        "schema": "moeprune.manifest/1",
        "algorithm": "xxh3-128",
        "tensors": {item.name: item.digest for item in copied},
    }


def provenance(checkpoint: Checkpoint, plan: PruningPlan, copied: list[Copied]) -> dict[str, Any]:
    """Where a pruned checkpoint came from: no times, hosts or paths, so that equal runs give equal bytes."""
    return envelope("moeprune.provenance/1", plan.command, plan.inputs) | {
        "architecture": checkpoint.spec.model_type,
        "experts": {"before": checkpoint.num_experts, "after": plan.kept},
        "tensors": len(copied),
        "bytes": {"before": checkpoint.nbytes, "after": sum(item.nbytes for item in copied)},
        "config_edits": dict(plan.config_edits),
    }
