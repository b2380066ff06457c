"""Prove that a pruned checkpoint is its source with experts left out, byte for byte."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from moeprune._files import PathLike, begin_work, byte_bar, read_artifact
from moeprune.checkpoint import Checkpoint, read_tensors
from moeprune.errors import CheckpointError
from moeprune.headers import TensorEntry
from moeprune.plans import PruningPlan
from moeprune.rewrite.copying import OutputTensor, Reader, Segment, in_threads
from moeprune.rewrite.drop import PROVENANCE, check_plan, edited_files, keep_lists, output_tensors
from moeprune.rewrite.shards import Remade, other_files

_MOST, _LARGE = 1000, 256_000_000  # tensors and bytes that one thread compares at a time


@dataclass(frozen=True, slots=True, kw_only=True)
class Verification:
    """What was proved: every tensor of the output equals its bytes in the source.

    Attributes:
        tensors, nbytes, files: how many were compared.
        computed: tensors among them that were computed, and are what was written then.
    """

    tensors: int
    nbytes: int
    files: int
    computed: int = 0


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
    edited = edited_files(source, keep_lists(plan), plan.config_edits)
    for name, data in edited.items():
        same_bytes(folder / name, data)
    found, _ = read_tensors(folder)  # its config and names are compared, so that it needs no architecture
    expected = Remade(partial(output_tensors, source, keep_lists(plan)))
    compare_names(expected, found, folder)
    nbytes = sum(entry.nbytes for entry in found.values())
    begin_work()
    with byte_bar("verifying", nbytes) as bar:
        for compared in in_threads(partial(compare_tensors, found, manifest), batches_of(expected)):
            bar.update(compared)
    files = [file for file in other_files(source.path) if str(file) not in edited]
    for file in files:
        same_bytes(folder / file, (source.path / file).read_bytes())
    return Verification(tensors=len(found), nbytes=nbytes, files=len(files))


def verify_manifest(output: Checkpoint) -> Verification:
    """Re-read a pruned checkpoint and compare every tensor with the digest that was recorded when it was copied.

    Less than :func:`verify_drop`: the source is not read again, and no file but the weights.

    Raises:
        CheckpointError: a tensor differs, is missing or is too much; the message names it.
        ArtifactError: the checkpoint has no manifest.
    """
    manifest = read_artifact(output.path / PROVENANCE / "manifest.json", "moeprune.manifest/1").get("tensors", {})
    odd = min(manifest.keys() ^ output.tensors.keys(), default=None)
    if odd is not None:
        where = "the manifest has no" if odd in output.tensors else "the weights lack the"
        raise CheckpointError(f"{output.path}: {where} tensor {odd!r}", "apply the plan again")
    with byte_bar("checking", output.nbytes) as bar:
        for compared in in_threads(partial(check_digests, manifest), batches_of(map(_whole, output.tensors.values()))):
            bar.update(compared)
    return Verification(tensors=len(manifest), nbytes=output.nbytes, files=0)


def check_digests(manifest: Mapping[str, str], tensors: list[OutputTensor], reader: Reader) -> int:
    """Compare some tensors with the digests that were recorded; gives the bytes compared."""
    for tensor, digest in zip(tensors, reader.digests(tensors), strict=True):
        if digest != manifest[tensor.name]:
            raise CheckpointError(f"tensor {tensor.name!r} is not what the manifest says", "apply the plan again")
    return sum(tensor.nbytes for tensor in tensors)


def _whole(entry: TensorEntry) -> OutputTensor:
    segment = Segment(file=entry.file, begin=entry.begin, end=entry.end)
    return OutputTensor(name=entry.name, dtype=entry.dtype, shape=entry.shape, segments=(segment,))


def same_bytes(file: Path, expected: bytes) -> None:
    """Refuse a file that does not hold these bytes."""
    if not file.is_file() or file.read_bytes() != expected:
        what = "is not what the source and the plan give" if file.is_file() else "is missing"
        raise CheckpointError(f"{file} {what}", "apply the plan again")


def compare_names(expected: Iterable[OutputTensor], found: Mapping[str, TensorEntry], folder: Path) -> None:
    """Refuse a folder in which a tensor is missing or too much."""
    absent = min((tensor.name for tensor in expected if tensor.name not in found), default=None)
    if absent is not None:
        raise CheckpointError(f"tensor {absent!r} is missing from {folder}", "apply the plan again")
    if sum(1 for _ in expected) != len(found):
        surplus = min(found.keys() - {tensor.name for tensor in expected})
        raise CheckpointError(f"tensor {surplus!r} is too much in {folder}", "apply the plan again")
    named = {entry.file.name for entry in found.values()}
    stray = sorted(file.name for file in folder.glob("*.safetensors") if file.name not in named)
    if stray:
        raise CheckpointError(f"{folder / stray[0]} is no part of the checkpoint", "engines may load it: remove it")


def batches_of(tensors: Iterable[OutputTensor]) -> Iterator[list[OutputTensor]]:
    """What one thread compares at a time."""
    batch: list[OutputTensor] = []
    size = 0
    for tensor in tensors:
        batch.append(tensor)
        size += tensor.nbytes
        if len(batch) == _MOST or size >= _LARGE:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def compare_tensors(
    found: Mapping[str, TensorEntry], manifest: Mapping[str, str], expected: list[OutputTensor], reader: Reader
) -> int:
    """Compare some tensors with the source and the manifest, reading each side once; gives the bytes compared."""
    there = [_as_found(tensor, found[tensor.name]) for tensor in expected]
    theirs = list(reader.digests(there))
    for tensor, digest, wanted in zip(expected, theirs, reader.digests(expected), strict=True):
        if digest != wanted:
            raise CheckpointError(f"tensor {tensor.name!r} differs from the source", "apply the plan again")
        if digest != manifest.get(tensor.name):
            raise CheckpointError(f"tensor {tensor.name!r} is not what the manifest says", "apply the plan again")
    return sum(tensor.nbytes for tensor in expected)


def _as_found(expected: OutputTensor, found: TensorEntry) -> OutputTensor:
    """The tensor as it lies in the output."""
    if (found.dtype, found.shape) != (expected.dtype, expected.shape):
        raise CheckpointError(
            f"tensor {found.name!r} is {found.dtype} {found.shape}, should be {expected.dtype} {expected.shape}"
        )
    return _whole(found)
