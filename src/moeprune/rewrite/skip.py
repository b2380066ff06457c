"""Write a checkpoint with the plan of its token-skip gates beside it: every tensor is a copy of the source's bytes."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path

from moeprune._files import PathLike, begin_work, byte_bar, read_artifact
from moeprune.checkpoint import Checkpoint, read_tensors
from moeprune.errors import StaleArtifactError
from moeprune.plans_skip import SkipPlan
from moeprune.rewrite.changed import all_experts
from moeprune.rewrite.copying import in_threads
from moeprune.rewrite.drop import (
    DEFAULT_SHARD_SIZE,
    PROVENANCE,
    check_output,
    output_tensors,
    provenance,
    write_folder,
)
from moeprune.rewrite.raw_config import edit_json
from moeprune.rewrite.shards import Remade, lay_out, other_files
from moeprune.rewrite.verify import (
    Verification,
    batches_of,
    compare_names,
    compare_tensors,
    same_bytes,
    verify_manifest,
)


def apply_skip(
    checkpoint: Checkpoint,
    plan: SkipPlan,
    output: PathLike,
    *,
    max_shard_size: int = DEFAULT_SHARD_SIZE,
    overwrite: bool = False,
) -> Path:
    """Copy the checkpoint and put the plan into its provenance folder; the folder appears whole or not at all.

    Args:
        checkpoint: the source.
        plan: what is skipped; its config edits are made.
        output: new folder.
        max_shard_size: bytes of tensors per file.
        overwrite: replace a folder that is not empty.

    Raises:
        StaleArtifactError: the plan was made for another model.
    """
    check_made_for(plan.inputs, checkpoint)
    check_output(checkpoint, output, overwrite=overwrite)
    layout = lay_out(_tensors(checkpoint), max_shard_size)
    edits = plan.config_edits
    files = {"config.json": edit_json(checkpoint.config_text, edits).encode()}
    records = {
        "plan": plan.to_dict(),
        "provenance": provenance(checkpoint, layout, plan.command, plan.inputs, checkpoint.num_experts, edits),
    }
    extra = {"plan.safetensors": plan.side_bytes()} if plan.tensors else {}
    return write_folder(checkpoint, layout, files, output, records=records, extra=extra, overwrite=overwrite)


def check_made_for(inputs: Mapping[str, str], checkpoint: Checkpoint) -> None:
    """Refuse a plan of another model.

    Raises:
        StaleArtifactError: its fingerprint differs.
    """
    if inputs.get("model") != checkpoint.fingerprint:
        raise StaleArtifactError(
            f"the plan was made for another model than {checkpoint.path.name}", "solve its thresholds on this one"
        )


def verify_skip(source: Checkpoint, output: PathLike) -> Verification:
    """Re-read a checkpoint with gates and compare it with its source.

    A distilled one has other weights: they are compared with the digests that were recorded when they were written.

    Raises:
        MoePruneError: anything differs; the message names the first tensor or file.
    """
    folder = Path(output)
    plan = SkipPlan.load(folder / PROVENANCE / "plan.json")
    if plan.inputs.get("model") != source.fingerprint:
        raise StaleArtifactError(f"{folder} was made from another model than {source.path.name}")
    same_bytes(folder / "config.json", edit_json(source.config_text, plan.config_edits).encode())
    files = [file for file in other_files(source.path) if str(file) != "config.json"]
    for file in files:
        same_bytes(folder / file, (source.path / file).read_bytes())
    if plan.training:
        from moeprune.checkpoint import open_checkpoint

        proved = verify_manifest(open_checkpoint(folder))
        return Verification(tensors=proved.tensors, nbytes=proved.nbytes, files=len(files), computed=proved.tensors)
    found, _ = read_tensors(folder)
    expected = _tensors(source)
    compare_names(expected, found, folder)
    manifest = read_artifact(folder / PROVENANCE / "manifest.json", "moeprune.manifest/1").get("tensors", {})
    nbytes = sum(entry.nbytes for entry in found.values())
    begin_work()
    with byte_bar("verifying", nbytes) as bar:
        for compared in in_threads(partial(compare_tensors, found, manifest), batches_of(expected)):
            bar.update(compared)
    return Verification(tensors=len(found), nbytes=nbytes, files=len(files))


def _tensors(checkpoint: Checkpoint) -> Remade:
    return Remade(partial(output_tensors, checkpoint, all_experts(checkpoint)))
