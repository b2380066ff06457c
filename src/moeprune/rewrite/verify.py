"""Prove that a pruned checkpoint is its source with experts left out, byte for byte."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from moeprune._files import PathLike, begin_work, progress, read_artifact
from moeprune.checkpoint import Checkpoint, TensorEntry, open_checkpoint
from moeprune.errors import CheckpointError
from moeprune.plans import PruningPlan
from moeprune.rewrite.drop import PROVENANCE, check_plan, keep_lists, output_tensors
from moeprune.rewrite.raw_config import edit_json
from moeprune.rewrite.shards import OutputTensor, Segment, other_files, tensor_digest


@dataclass(frozen=True, slots=True, kw_only=True)
class Verification:
    """What was proved: every tensor of the output equals its bytes in the source."""

    tensors: int
    nbytes: int
    files: int


def verify_drop(source: Checkpoint, output: PathLike) -> Verification:
    """Re-read a pruned checkpoint and compare it with its source.

    The expected tensors are derived again from the source and the plan's keep-lists; the digests of both sides and of
    the manifest must agree, the config may differ only in the planned values, and other files must be equal.

    Raises:
        CheckpointError: anything differs; the message names the first tensor or file.
    """
    folder = Path(output)
    plan = check_plan(source, PruningPlan.load(folder / PROVENANCE / "plan.json"))
    pruned = open_checkpoint(folder)
    if pruned.config_text != edit_json(source.config_text, plan.config_edits):
        raise CheckpointError(f"{folder / 'config.json'} differs from the source in more than the planned values")
    expected = {tensor.name: tensor for tensor in output_tensors(source, keep_lists(plan))}
    odd = sorted(expected.keys() ^ pruned.tensors.keys())
    if odd:
        raise CheckpointError(
            f"tensor {odd[0]!r} is {'missing from' if odd[0] in expected else 'too much in'} {folder}"
        )
    manifest = read_artifact(folder / PROVENANCE / "manifest.json", "moeprune.manifest/1")["tensors"]
    begin_work()
    for name, tensor in progress(expected.items(), "verifying", unit="tensor"):
        _compare(tensor, pruned.tensors[name], manifest)
    files = _compare_files(source.path, folder)
    return Verification(tensors=len(expected), nbytes=pruned.nbytes, files=files)


def _compare(expected: OutputTensor, found: TensorEntry, manifest: Mapping[str, str]) -> None:
    if (found.dtype, found.shape) != (expected.dtype, expected.shape):
        raise CheckpointError(
            f"tensor {found.name!r} is {found.dtype} {found.shape}, should be {expected.dtype} {expected.shape}"
        )
    digest = tensor_digest([Segment(file=found.file, begin=found.begin, end=found.end)])
    if digest != tensor_digest(expected.segments):
        raise CheckpointError(f"tensor {found.name!r} differs from the source", "apply the plan again")
    if digest != manifest.get(found.name):
        raise CheckpointError(f"tensor {found.name!r} is not what the manifest says", "apply the plan again")


def _compare_files(source: Path, output: Path) -> int:
    names = list(other_files(source))
    for name in names:
        if not (output / name).is_file() or (output / name).read_bytes() != (source / name).read_bytes():
            raise CheckpointError(f"{output / name} is not the source's file", "apply the plan again")
    return len(names)
