"""What a healed checkpoint takes over from the folder of the model that was healed, and from its original."""

from __future__ import annotations

from moeprune._files import read_artifact
from moeprune.checkpoint import Checkpoint
from moeprune.errors import ArtifactError
from moeprune.rewrite.drop import PROVENANCE

_CARRIED = ("plan.json", "statistics.safetensors")  # what was done to the model before it was healed, and why


def carried(start: Checkpoint) -> dict[str, bytes]:
    """Files by name for the provenance folder of what is made from a checkpoint."""
    files = [start.path / PROVENANCE / name for name in _CARRIED]
    return {file.name: file.read_bytes() for file in files if file.is_file()}


def source_of(base: Checkpoint, start: Checkpoint) -> dict[str, str]:
    """The original's name and commit on the Hub, as its folder or the pruned model's record tells; empty if unknown."""
    if base.hub_source:
        return base.hub_source
    try:
        found = read_artifact(start.path / PROVENANCE / "provenance.json", "moeprune.provenance/1").get("source")
    except ArtifactError:
        return {}  # nothing is lost: who pushes the output can give the name
    if isinstance(found, dict) and found.keys() == {"repo", "revision"}:
        return {key: str(value) for key, value in found.items()}
    return {}
