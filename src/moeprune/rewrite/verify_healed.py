"""Prove that a healed checkpoint is what was healed but for the weights that were trained. Runs without torch."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path

from moeprune._files import PathLike, begin_work, byte_bar, read_artifact
from moeprune.accounts import HEALING, account_of_healing
from moeprune.checkpoint import Checkpoint, read_tensors
from moeprune.errors import CheckpointError, StaleArtifactError
from moeprune.headers import TensorEntry
from moeprune.rewrite.changed import all_experts
from moeprune.rewrite.copying import OutputTensor, Reader, Segment, in_threads
from moeprune.rewrite.drop import PROVENANCE, output_tensors
from moeprune.rewrite.shards import Remade, other_files
from moeprune.rewrite.verify import Verification, batches_of, compare_names, same_bytes

_AGAIN = "heal again"


def verify_healed(source: Checkpoint, output: PathLike) -> Verification:
    """Re-read a healed checkpoint and compare it with the one that was healed.

    Every tensor has the shape and dtype of the source's and the digest that was recorded when it was written. Those
    that differ from the source were trained; where no training was better, none may differ.

    Raises:
        MoePruneError: anything differs; the message names the first tensor or file.
    """
    folder = Path(output)
    record = read_artifact(folder / PROVENANCE / "healing.json", HEALING)
    _check_source(source, folder, record["inputs"])
    manifest = read_artifact(folder / PROVENANCE / "manifest.json", "moeprune.manifest/1").get("tensors", {})
    found, _ = read_tensors(folder)
    expected = Remade(partial(output_tensors, source, all_experts(source)))
    compare_names(expected, found, folder)
    files = [*other_files(source.path)]
    for file in {Path("config.json"), *files}:
        same_bytes(folder / file, (source.path / file).read_bytes())
    trained, computed, nbytes = account_of_healing(record).trained, 0, sum(entry.nbytes for entry in found.values())
    begin_work()
    with byte_bar("verifying", nbytes) as bar:
        for compared, differing in in_threads(partial(_compare, found, manifest), batches_of(expected)):
            bar.update(compared)
            computed += len(differing)
            if differing and not trained:
                raise CheckpointError(f"tensor {differing[0]!r} differs from what was healed, by no training", _AGAIN)
    return Verification(tensors=len(found), nbytes=nbytes, files=len(files), computed=computed)


def _check_source(source: Checkpoint, folder: Path, inputs: Mapping[str, str]) -> None:
    if inputs.get("model") != source.fingerprint:
        original = inputs.get("base") == source.fingerprint
        raise StaleArtifactError(
            f"{folder} was healed towards {source.path.name}, and made from another checkpoint"
            if original
            else f"{folder} was made from another checkpoint than {source.path.name}",
            "name the checkpoint that was healed",
        )


def _compare(
    found: Mapping[str, TensorEntry], manifest: Mapping[str, str], expected: list[OutputTensor], reader: Reader
) -> tuple[int, list[str]]:
    """Compare some tensors with the manifest; gives the bytes compared, and the names of those unlike the source's."""
    there = [_as_found(tensor, found[tensor.name]) for tensor in expected]
    differing = []
    theirs = list(reader.digests(there))
    for tensor, digest, before in zip(expected, theirs, reader.digests(expected), strict=True):
        if digest != manifest.get(tensor.name):
            raise CheckpointError(f"tensor {tensor.name!r} is not what the manifest says", _AGAIN)
        if digest != before:
            differing.append(tensor.name)
    return sum(tensor.nbytes for tensor in expected), differing


def _as_found(expected: OutputTensor, found: TensorEntry) -> OutputTensor:
    if (found.dtype, found.shape) != (expected.dtype, expected.shape):
        raise CheckpointError(
            f"tensor {found.name!r} is {found.dtype} {found.shape}, should be {expected.dtype} {expected.shape}", _AGAIN
        )
    segment = Segment(file=found.file, begin=found.begin, end=found.end)
    return OutputTensor(name=found.name, dtype=found.dtype, shape=found.shape, segments=(segment,))
