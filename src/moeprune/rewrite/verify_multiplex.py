"""Prove that a multiplexed checkpoint is its source but for its experts. Runs without torch."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import xxhash

from moeprune._files import PathLike, begin_work, byte_bar, read_artifact
from moeprune.architectures import ExpertName, StackedName
from moeprune.checkpoint import Checkpoint, read_tensors
from moeprune.errors import ArtifactError, CheckpointError, StaleArtifactError
from moeprune.headers import TensorEntry
from moeprune.plans_multiplex import SIDE_FILE, MultiplexPlan
from moeprune.rewrite.copying import OutputTensor, Segment, in_threads
from moeprune.rewrite.drop import PROVENANCE, edited_files, output_tensors
from moeprune.rewrite.shards import other_files
from moeprune.rewrite.verify import (
    Verification,
    batches_of,
    check_digests,
    compare_names,
    compare_tensors,
    same_bytes,
)

_AGAIN = "multiplex again"


def verify_multiplex(source: Checkpoint, output: PathLike) -> Verification:
    """Re-read a multiplexed checkpoint and compare it with its source.

    Whatever is no expert, the whole routers too, equals its bytes in the source; experts and the side file are as they
    were written.

    Raises:
        MoePruneError: anything differs; the message names the first tensor or file.
    """
    folder = Path(output)
    plan = MultiplexPlan.load(folder / PROVENANCE / "plan.json")
    if plan.inputs.get("model") != source.fingerprint:
        raise StaleArtifactError(f"{folder} was made from another model than {source.path.name}")
    keep = {index: tuple(range(len(layer.groups))) for index, layer in plan.layers.items()}
    edited = edited_files(source, keep, plan.config_edits)
    for name, data in edited.items():
        same_bytes(folder / name, data)
    manifest = read_artifact(folder / PROVENANCE / "manifest.json", "moeprune.manifest/1").get("tensors", {})
    found, _ = read_tensors(folder)
    expected = [*output_tensors(source, keep)]
    compare_names(expected, found, folder)
    fused = {tensor.name for tensor in expected if isinstance(source.roles[tensor.name], ExpertName | StackedName)}
    whole = {index: tuple(range(source.num_experts)) for index in plan.layers}
    copied = [tensor for tensor in output_tensors(source, whole) if tensor.name in found.keys() - fused]
    begin_work()
    with byte_bar("verifying", sum(entry.nbytes for entry in found.values())) as bar:
        for compared in in_threads(partial(compare_tensors, found, manifest), batches_of(copied)):
            bar.update(compared)
        written = [_bytes_of(found[name]) for name in sorted(fused)]
        for compared in in_threads(partial(check_digests, manifest), batches_of(written)):
            bar.update(compared)
    _check_side(folder / SIDE_FILE, plan.side)
    files = [file for file in other_files(source.path) if str(file) not in edited]
    for file in files:
        same_bytes(folder / file, (source.path / file).read_bytes())
    nbytes = sum(entry.nbytes for entry in found.values())
    return Verification(tensors=len(found), nbytes=nbytes, files=len(files), computed=len(fused))


def _bytes_of(entry: TensorEntry) -> OutputTensor:
    segment = Segment(file=entry.file, begin=entry.begin, end=entry.end)
    return OutputTensor(name=entry.name, dtype=entry.dtype, shape=entry.shape, segments=(segment,))


def _check_side(file: Path, digest: str) -> None:
    try:
        found = xxhash.xxh3_128_hexdigest(file.read_bytes())
    except OSError as error:
        raise ArtifactError(f"cannot read {file}: {error.strerror}", _AGAIN) from error
    if found != digest:
        raise CheckpointError(f"{file} is not what was written", _AGAIN)
