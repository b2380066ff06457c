"""Prove that a sparsified checkpoint is its source without some weights of its experts. Runs without torch."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np

from moeprune._files import PathLike, begin_work, byte_bar, progress, read_artifact
from moeprune.architectures import ExpertName, StackedName
from moeprune.checkpoint import Checkpoint, open_checkpoint
from moeprune.errors import CheckpointError, StaleArtifactError
from moeprune.plans_sparsify import SparsifyPlan, Sparsity
from moeprune.rewrite.copying import OutputTensor, in_threads
from moeprune.rewrite.drop import PROVENANCE, output_tensors
from moeprune.rewrite.raw_config import edit_json
from moeprune.rewrite.shards import other_files
from moeprune.rewrite.stored import Bits, StoredExpert, shared_expert, shared_projection, stored_experts
from moeprune.rewrite.verify import Verification, batches_of, compare_tensors, same_bytes, verify_manifest

_AGAIN = "sparsify again"


def verify_sparse(source: Checkpoint, output: PathLike) -> Verification:
    """Re-read a sparsified checkpoint and compare it with its source.

    Whatever is no expert equals its bytes in the source, and so does every weight of an expert that is not 0; as many
    weights of every row are 0 as were to go, or, where neurons went, every neuron that is left is one of the source's,
    in its order. All bytes are those that the manifest tells of.

    Raises:
        MoePruneError: anything differs; the message names the first tensor, expert or file.
    """
    folder = Path(output)
    plan = SparsifyPlan.load(folder / PROVENANCE / "plan.json")
    if plan.inputs.get("model") != source.fingerprint:
        raise StaleArtifactError(f"{folder} was made from another model than {source.path.name}")
    same_bytes(folder / "config.json", edit_json(source.config_text, plan.config_edits).encode())
    made = open_checkpoint(folder)
    begin_work()
    proved = verify_manifest(made)
    computed = proved.tensors - _compare_others(source, made, plan)
    for layer in progress(made.moe_layers if not plan.sparsity.nothing else (), "verifying", unit="layer"):
        pairs = zip(stored_experts(source, layer), stored_experts(made, layer), strict=True)
        for before, after in pairs:
            _compare_expert(before, after, plan.sparsity)
        if plan.width and _shared_is_cut(source):
            _compare_shared(shared_expert(source, layer), shared_expert(made, layer), plan.sparsity)
    files = [file for file in other_files(source.path) if str(file) != "config.json"]
    for file in files:
        same_bytes(folder / file, (source.path / file).read_bytes())
    return Verification(tensors=proved.tensors, nbytes=proved.nbytes, files=len(files), computed=computed)


def _shared_is_cut(source: Checkpoint) -> bool:
    return bool(source.spec.shared_count_key)


def _compare_others(source: Checkpoint, made: Checkpoint, plan: SparsifyPlan) -> int:
    """Every tensor that is left alone, byte for byte; none may be missing or too much. Gives how many they are."""
    kept = {layer: tuple(range(source.num_experts)) for layer in (*source.moe_layers, *made.mtp_layers)}
    expected = [*output_tensors(source, kept)]
    odd = {tensor.name for tensor in expected} ^ made.tensors.keys()
    if odd:
        raise CheckpointError(f"{made.path} and its source do not both have {min(odd)!r}", _AGAIN)
    untouched = [tensor for tensor in expected if not _is_touched(source, tensor, plan)]
    manifest = read_artifact(made.path / PROVENANCE / "manifest.json", "moeprune.manifest/1")["tensors"]
    with byte_bar("comparing", sum(tensor.nbytes for tensor in untouched)) as bar:
        for compared in in_threads(partial(compare_tensors, made.tensors, manifest), batches_of(untouched)):
            bar.update(compared)
    return len(untouched)


def _is_touched(source: Checkpoint, tensor: OutputTensor, plan: SparsifyPlan) -> bool:
    role = source.roles[tensor.name]
    if plan.sparsity.nothing or role.layer not in source.moe_layers:
        return False
    if isinstance(role, ExpertName | StackedName):
        return True
    return bool(plan.width and _shared_is_cut(source) and shared_projection(source, tensor.name))


# --- experts ----------------------------------------------------------------------------------------------------------


def _compare_expert(before: StoredExpert, after: StoredExpert, sparsity: Sparsity) -> None:
    if sparsity.kind == "neurons":
        _compare_neurons(before, after)
        return
    for name, old, new in zip(("gate", "up", "down"), before.matrices, after.matrices, strict=True):
        _compare_weights(f"{name} of {before.what}", old, new, sparsity)


def _compare_weights(what: str, old: Bits, new: Bits, sparsity: Sparsity) -> None:
    """Each weight is 0 or the source's, and enough of every row, or of every group, are 0."""
    if old.shape != new.shape or bool((new[new != old] != 0).any()):
        raise CheckpointError(f"{what} differs from the source in weights that are not 0", _AGAIN)
    rows = (new == 0).reshape(-1, sparsity.m or new.shape[1])
    wanted = sparsity.m - sparsity.n if sparsity.m else sparsity.gone(new.shape[1])
    if int(np.count_nonzero(rows, axis=1).min()) < wanted:
        raise CheckpointError(f"{what} has a row with fewer zeros than {sparsity} says", _AGAIN)


def _compare_neurons(before: StoredExpert, after: StoredExpert) -> None:
    """The neurons that are left are some of the source's, in their order."""
    left = iter(before.neurons)
    for number, neuron in enumerate(after.neurons):
        if neuron not in left:  # goes on behind the one that was found last
            raise CheckpointError(f"neuron {number} of {before.what} is none of the source's, or out of order", _AGAIN)


def _compare_shared(before: StoredExpert | None, after: StoredExpert | None, sparsity: Sparsity) -> None:
    if before is not None and after is not None:
        _compare_expert(before, after, sparsity)
