"""What a healed checkpoint takes over from the folder of the model that was healed."""

from __future__ import annotations

from moeprune.checkpoint import Checkpoint
from moeprune.rewrite.drop import PROVENANCE

_CARRIED = ("plan.json", "statistics.safetensors")  # what was done to the model before it was healed, and why


def carried(start: Checkpoint) -> dict[str, bytes]:
    """Files by name for the provenance folder of what is made from a checkpoint."""
    files = [start.path / PROVENANCE / name for name in _CARRIED]
    return {file.name: file.read_bytes() for file in files if file.is_file()}
