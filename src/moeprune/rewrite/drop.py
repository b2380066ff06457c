"""The byte-copy executor: drop experts, renumber the rest, slice router rows. No tensor is decoded.

Every output tensor is a list of byte ranges of source files, so the result is bit-exact by construction in whatever
dtype or quantisation the checkpoint is stored.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from moeprune._files import (
    PathLike,
    begin_work,
    check_free_space,
    check_output_folder,
    envelope,
    json_pieces,
    parse_json,
)
from moeprune._version import __version__
from moeprune.architectures import ExpertName, RouterName, StackedName
from moeprune.checkpoint import Checkpoint, check_inside
from moeprune.errors import ConfigError, PlanError, StaleArtifactError
from moeprune.headers import TensorEntry
from moeprune.plans import DROP, PruningPlan, check_keep, check_order
from moeprune.rewrite.claims import check_unclaimed
from moeprune.rewrite.copying import OutputTensor, Segment
from moeprune.rewrite.journal import Journal, job_key, resumable_folder
from moeprune.rewrite.naming import renumber_names
from moeprune.rewrite.non_uniform import check_possible, non_uniform_files
from moeprune.rewrite.raw_config import edit_json
from moeprune.rewrite.shards import Layout, Remade, copy_other_files, lay_out, write_shards

PROVENANCE = "moeprune"  # the folder inside a checkpoint where engines that glob *.safetensors do not look
QUANTISATION = "hf_quant_config.json"  # where modelopt says which modules it quantised, and how
DEFAULT_SHARD_SIZE = 5_000_000_000


def config_edits(checkpoint: Checkpoint, kept: int, *, drop_mtp: bool) -> dict[str, int]:
    """The config values that change: every expert count that is present, and the MTP count when MTP layers go."""
    spec, values = checkpoint.spec, checkpoint.spec.values(checkpoint.config)
    edits = {spec.path(key): kept for key in spec.count_keys if key in values}
    if drop_mtp and spec.mtp_key in values:  # not every family that has MTP layers counts them
        edits[spec.path(spec.mtp_key)] = 0
    return edits


def edited_files(
    checkpoint: Checkpoint, keep: Mapping[int, tuple[int, ...]], edits: Mapping[str, Any]
) -> dict[str, bytes]:
    """Files that do not travel as they are: the config, and a list of quantised modules where there is one.

    Where layers keep different numbers of experts, the modeling file that loads them is one more.

    Raises:
        LayoutError: they name single experts in a way that cannot be renumbered.
    """
    texts = {"config.json": edit_json(checkpoint.config_text, edits)}
    if (checkpoint.path / QUANTISATION).is_file():
        check_inside(checkpoint.path, checkpoint.path / QUANTISATION)
        texts[QUANTISATION] = (checkpoint.path / QUANTISATION).read_bytes().decode()
        parse_json(texts[QUANTISATION], checkpoint.path / QUANTISATION)
    if not all(len(kept) == checkpoint.num_experts for kept in keep.values()):
        texts = {name: renumber_names(text, checkpoint, keep, name) for name, text in texts.items()}
    counts = {layer: len(kept) for layer, kept in keep.items()}
    if len(set(counts.values())) > 1:
        texts |= non_uniform_files(texts["config.json"], checkpoint, counts)
    return {name: text.encode() for name, text in texts.items()}


def check_plan(checkpoint: Checkpoint, plan: PruningPlan) -> PruningPlan:
    """Check a plan against the checkpoint and derive again what follows from its keep-lists.

    Raises:
        StaleArtifactError: the plan was made for another model.
        PlanError: a layer is missing, or no engine could run the result.
        LayoutError: the config names experts in a way that cannot be renumbered.
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
        check_order(layer, decision, checkpoint.router)
    checkpoint.check_uniform()
    check_counts(plan)
    if not plan.uniform:
        _check_non_uniform(checkpoint, plan)
    edited_files(checkpoint, keep_lists(plan), {})  # refuses names that cannot be renumbered
    dropped = bool(mtp) and planned == trunk
    return dataclasses.replace(plan, config_edits=config_edits(checkpoint, plan.kept, drop_mtp=dropped))


def check_counts(plan: PruningPlan) -> None:
    """Refuse a plan whose layers keep different numbers of experts, unless it says that they may."""
    counts = sorted(set(plan.counts.values()))
    if len(counts) > 1 and not plan.allow_non_uniform:
        raise PlanError(
            f"layers keep different numbers of experts: {counts}", "no stock engine loads such a checkpoint"
        )


def _check_non_uniform(checkpoint: Checkpoint, plan: PruningPlan) -> None:
    check_possible(checkpoint)
    last = plan.counts[checkpoint.moe_layers[-1]]
    for layer in set(checkpoint.mtp_layers) & set(plan.layers):
        if plan.counts[layer] != last:
            raise PlanError(
                f"MTP layer {layer} keeps {plan.counts[layer]} experts and the last decoder layer {last}",
                "keep as many, or leave all MTP layers out",
            )


def output_tensors(checkpoint: Checkpoint, keep: Mapping[int, tuple[int, ...]]) -> Iterator[OutputTensor]:
    """Every tensor of the pruned checkpoint, in the source's order.

    Args:
        checkpoint: the source.
        keep: experts that stay by layer, in the order of their new numbers; an MTP layer that is absent is left out
            whole, with all that belongs to it.
    """
    new_number = {layer: {old: new for new, old in enumerate(kept)} for layer, kept in keep.items()}
    for name, entry in checkpoint.tensors.items():
        role = checkpoint.roles[name]
        if role.layer in checkpoint.mtp_layers and role.layer not in keep:
            continue
        if isinstance(role, ExpertName):
            if role.expert in new_number[role.layer]:
                yield _whole(role.renumbered(new_number[role.layer][role.expert]), entry)
        elif isinstance(role, StackedName | RouterName):
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
        raise PlanError(f"tensor {entry.name!r} cannot be cut along axis {axis}: rows share bytes")
    segments = []
    for block in range(outer):
        start = entry.begin + block * count * width
        for _, run in itertools.groupby(enumerate(keep), key=lambda pair: pair[1] - pair[0]):
            rows = [row for _, row in run]
            segments.append(Segment(file=entry.file, begin=start + rows[0] * width, end=start + (rows[-1] + 1) * width))
    shape = (*entry.shape[:axis], len(keep), *entry.shape[axis + 1 :])
    return OutputTensor(name=entry.name, dtype=entry.dtype, shape=shape, segments=tuple(segments))


def keep_lists(plan: PruningPlan) -> dict[int, tuple[int, ...]]:
    """The part of a plan that steers the rewrite: experts by layer in the order of their new numbers."""
    return {layer: decision.placed for layer, decision in plan.layers.items()}


def check_output(checkpoint: Checkpoint, output: PathLike, *, overwrite: bool) -> None:
    """Refuse an output that is not empty, that another run is writing, or that would replace the source."""
    check_output_folder(output, overwrite=overwrite)
    check_unclaimed(output)
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

    After a kill, a full disk or Ctrl-C the same call goes on with the shard that was not finished.

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
    keep = keep_lists(plan)
    layout = lay_out(Remade(partial(output_tensors, checkpoint, keep)), max_shard_size)
    files = edited_files(checkpoint, keep, plan.config_edits)
    origin = provenance(checkpoint, layout, plan.command, plan.inputs, plan.kept_by_layer, plan.config_edits)
    records = {"plan": plan.to_dict(), "provenance": origin}
    return write_folder(checkpoint, layout, files, output, records=records, extra=extra or {}, overwrite=overwrite)


def write_folder(
    checkpoint: Checkpoint,
    layout: Layout,
    files: Mapping[str, bytes],
    output: PathLike,
    *,
    records: Mapping[str, Mapping[str, Any]],
    extra: Mapping[str, bytes],
    overwrite: bool,
) -> Path:
    """Write a checkpoint with its records; the folder appears whole or not at all, and a killed run goes on.

    Args:
        checkpoint: the source.
        layout: which tensors go into which file.
        files: those that do not travel as they are, by name.
        output: new folder.
        records: JSON files of the provenance folder, by name without suffix; the digests of all tensors are added.
        extra: more files for the provenance folder, by name.
        overwrite: replace a folder that is not empty.

    Returns:
        The finished folder.
    """
    check_free_space(output, layout.nbytes)
    with resumable_folder(output, _job(checkpoint, layout), overwrite=overwrite) as journal:
        begin_work()
        written = write_checkpoint(checkpoint, layout, files, journal.folder, journal)
        _write_records(journal.folder / PROVENANCE, {**records, "manifest": _manifest(written)}, extra)
    return Path(output)


def _job(checkpoint: Checkpoint, layout: Layout) -> str:
    """Everything that decides the bytes of the shards; files that are read are told apart by their times too."""
    tensors = (
        (tensor.name, tensor.dtype, tensor.shape, *((part.file.name, part.begin, part.end) for part in tensor.segments))
        for tensor in layout.tensors
    )
    read = dict.fromkeys(part.file for tensor in layout.tensors for part in tensor.segments)
    return job_key(
        itertools.chain(
            [__version__, checkpoint.fingerprint, sorted(checkpoint.shard_metadata.items())],
            file_states(read),
            layout.shards,
            tensors,
        )
    )


def file_states(files: Iterable[Path]) -> Iterator[tuple[str, int, int]]:
    """Name, size and time of files, by which one that was written anew is told from what it was."""
    return ((file.name, stat.st_size, stat.st_mtime_ns) for file in files for stat in [file.stat()])


def write_checkpoint(
    checkpoint: Checkpoint,
    layout: Layout,
    files: Mapping[str, bytes],
    folder: Path,
    journal: Journal | None = None,
) -> Iterator[tuple[OutputTensor, str]]:
    """Write shards, index, the edited files and those that travel as they are; gives every tensor with its digest."""
    written = write_shards(layout, folder, checkpoint.shard_metadata, journal)
    copy_other_files(checkpoint.path, folder)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return written


def _write_records(folder: Path, records: Mapping[str, Mapping[str, Any]], extra: Mapping[str, bytes]) -> None:
    folder.mkdir()
    for name, data in extra.items():
        (folder / name).write_bytes(data)
    for name, record in records.items():
        with (folder / f"{name}.json").open("w", encoding="utf-8", newline="\n") as file:
            file.writelines(json_pieces(record))


def _manifest(written: Iterator[tuple[OutputTensor, str]]) -> dict[str, Any]:
    return {
        "schema": "moeprune.manifest/1",
        "algorithm": "xxh3-128",
        "tensors": ((tensor.name, digest) for tensor, digest in written),
    }


def provenance(
    checkpoint: Checkpoint,
    layout: Layout,
    command: Mapping[str, Any],
    inputs: Mapping[str, str],
    experts: object,
    edits: Mapping[str, Any],
) -> dict[str, Any]:
    """Where a checkpoint came from: no times, hosts or paths, so that equal runs give equal bytes."""
    return envelope("moeprune.provenance/1", command, inputs) | {
        **({"source": checkpoint.hub_source} if checkpoint.hub_source else {}),
        "architecture": checkpoint.spec.model_type,
        "experts": {"before": checkpoint.num_experts, "after": experts},
        "tensors": layout.count,
        "bytes": {"before": checkpoint.nbytes, "after": layout.nbytes},
        "config_edits": dict(edits),
    }
