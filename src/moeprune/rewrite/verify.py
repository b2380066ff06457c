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
        MoePruneError: anything differs; the message names the first tensor or file.
    """
    folder = Path(output)
    plan = check_plan(source, PruningPlan.load(folder / PROVENANCE / "plan.json"))
    manifest = read_artifact(folder / PROVENANCE / "manifest.json", "moeprune.manifest/1").get("tensors", {})
    _same_bytes(folder / "config.json", edit_json(source.config_text, plan.config_edits).encode())
    pruned = open_checkpoint(folder)
    expected = {tensor.name: tensor for tensor in output_tensors(source, keep_lists(plan))}
    _compare_names(expected, pruned, folder)
    begin_work()
    for name, tensor in progress(expected.items(), "verifying", unit="tensor"):
        _compare(tensor, pruned.tensors[name], manifest)
    files = list(other_files(source.path))
    for file in files:
        _same_bytes(folder / file, (source.path / file).read_bytes())
    return Verification(tensors=len(expected), nbytes=pruned.nbytes, files=len(files))


def _same_bytes(file: Path, expected: bytes) -> None:
    if not file.is_file() or file.read_bytes() != expected:
        what = "is not what the source and the plan give" if file.is_file() else "is missing"
        raise CheckpointError(f"{file} {what}", "apply the plan again")


def _compare_names(expected: Mapping[str, OutputTensor], pruned: Checkpoint, folder: Path) -> None:
    odd = sorted(expected.keys() ^ pruned.tensors.keys())
    if odd:
        raise CheckpointError(
            f"tensor {odd[0]!r} is {'missing from' if odd[0] in expected else 'too much in'} {folder}"
        )
    named = {entry.file.name for entry in pruned.tensors.values()}
    stray = sorted(file.name for file in folder.glob("*.safetensors") if file.name not in named)
    if stray:
        raise CheckpointError(f"{folder / stray[0]} is no part of the checkpoint", "engines may load it: remove it")


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
