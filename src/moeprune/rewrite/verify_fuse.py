"""Prove that a fused checkpoint is its source but for the experts that were merged. Runs without torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from moeprune._files import PathLike, begin_work, byte_bar, read_artifact
from moeprune.architectures import RouterName, StackedName
from moeprune.checkpoint import Checkpoint, read_tensors
from moeprune.errors import CheckpointError
from moeprune.headers import TensorEntry
from moeprune.plans_fuse import TIED, FusePlan
from moeprune.rewrite.copying import OutputTensor, Reader, Segment, in_threads
from moeprune.rewrite.drop import PROVENANCE, edited_files, output_tensors
from moeprune.rewrite.fuse import check_fuse, computed_names, keep_of
from moeprune.rewrite.shards import Remade, other_files
from moeprune.rewrite.verify import (
    Verification,
    batches_of,
    check_digests,
    compare_names,
    compare_tensors,
    same_bytes,
)


def verify_fuse(source: Checkpoint, output: PathLike) -> Verification:
    """Re-read a fused checkpoint and compare it with its source.

    What was not merged equals its bytes in the source, single experts in a tensor of all of them too. What was merged
    has the shape that the plan gives, and the digest that was recorded when it was written.

    Raises:
        MoePruneError: anything differs; the message names the first tensor or file.
    """
    folder = Path(output)
    plan = check_fuse(source, FusePlan.load(folder / PROVENANCE / "plan.json"))
    manifest = read_artifact(folder / PROVENANCE / "manifest.json", "moeprune.manifest/1").get("tensors", {})
    edited = edited_files(source, keep_of(source, plan), plan.config_edits)
    for name, data in edited.items():
        same_bytes(folder / name, data)
    found, _ = read_tensors(folder)
    expected = Remade(partial(_expected, source, plan))
    compare_names(expected, found, folder)
    for tensor in expected:
        _same_shape(tensor, found[tensor.name])
    computed = computed_names(source, plan)
    copied = (tensor for tensor in expected if tensor.name not in computed)
    singles = [pair for name in sorted(computed) for pair in _single_rows(source, plan, found[name])]
    begin_work()
    with byte_bar("verifying", sum(entry.nbytes for entry in found.values())) as bar:
        for compared in in_threads(partial(compare_tensors, found, manifest), batches_of(copied)):
            bar.update(compared)
        written = (_bytes_of(found[name]) for name in sorted(computed))
        for compared in in_threads(partial(check_digests, manifest), batches_of(written)):
            bar.update(compared)
        for _ in in_threads(_compare_rows, singles):
            pass
    files = [file for file in other_files(source.path) if str(file) not in edited]
    for file in files:
        same_bytes(folder / file, (source.path / file).read_bytes())
    nbytes = sum(entry.nbytes for entry in found.values())
    return Verification(tensors=len(found), nbytes=nbytes, files=len(files), computed=len(computed))


def _expected(source: Checkpoint, plan: FusePlan) -> Iterator[OutputTensor]:
    """The output's tensors; those that were merged have the bytes of the dominant experts here."""
    for tensor in output_tensors(source, keep_of(source, plan)):
        whole = plan.router == TIED and isinstance(source.roles[tensor.name], RouterName)
        yield _bytes_of(source.tensors[tensor.name]) if whole else tensor


def _bytes_of(entry: TensorEntry) -> OutputTensor:
    segment = Segment(file=entry.file, begin=entry.begin, end=entry.end)
    return OutputTensor(name=entry.name, dtype=entry.dtype, shape=entry.shape, segments=(segment,))


def _same_shape(expected: OutputTensor, found: TensorEntry) -> None:
    if (found.dtype, found.shape) != (expected.dtype, expected.shape):
        raise CheckpointError(
            f"tensor {found.name!r} is {found.dtype} {found.shape}, should be {expected.dtype} {expected.shape}"
        )


def _single_rows(source: Checkpoint, plan: FusePlan, found: TensorEntry) -> Iterator[tuple[OutputTensor, OutputTensor]]:
    """Of a tensor of all experts, the rows of those that were not merged, in the output and in the source."""
    role = source.roles[found.name]
    if not isinstance(role, StackedName):
        return
    for place, group in enumerate(plan.layers[role.layer].groups):
        if not group.merged:
            yield _row(found, place), _row(source.tensors[found.name], group.dominant)


def _row(entry: TensorEntry, number: int) -> OutputTensor:
    width = entry.nbytes // entry.shape[0]
    begin = entry.begin + number * width
    segment = Segment(file=entry.file, begin=begin, end=begin + width)
    return dataclasses.replace(_bytes_of(entry), shape=entry.shape[1:], segments=(segment,))


def _compare_rows(pair: tuple[OutputTensor, OutputTensor], reader: Reader) -> None:
    one, other = reader.digests(pair)
    if one != other:
        raise CheckpointError(f"tensor {pair[0].name!r} differs from the source in an expert that was not merged")
