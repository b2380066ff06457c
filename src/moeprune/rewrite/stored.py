"""The matrices of single experts as they lie in files, bit by bit: no model is built and no number decoded."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moeprune.architectures import ExpertName, StackedName
from moeprune.checkpoint import Checkpoint
from moeprune.errors import CheckpointError
from moeprune.headers import TensorEntry

Bits = NDArray[np.unsignedinteger[Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredExpert:
    """One expert's matrices as unsigned numbers of their elements' size.

    Attributes:
        what: name for messages.
        gate, up, down: the matrices, one row per output.
        biases: biases of gate and up, where there are some.
    """

    what: str
    gate: Bits
    up: Bits
    down: Bits
    biases: Bits | None = None

    @property
    def matrices(self) -> tuple[Bits, Bits, Bits]:
        """Gate, up and down."""
        return self.gate, self.up, self.down

    @property
    def neurons(self) -> list[bytes]:
        """The bytes of every neuron: its rows of gate and up, its column of down, and its biases."""
        parts = [self.gate, self.up, self.down.T]
        if self.biases is not None:
            parts.append(self.biases)
        return [row.tobytes() for row in np.concatenate(parts, axis=1)]


def stored_experts(checkpoint: Checkpoint, layer: int) -> Iterator[StoredExpert]:
    """The routed experts of a layer, in their order.

    Raises:
        CheckpointError: they are packed, or no gate, up and down projection.
    """
    stacks = {
        role.part: name
        for name, role in checkpoint.roles.items()
        if isinstance(role, StackedName) and role.layer == layer
    }
    if stacks:
        yield from _stacked(checkpoint, layer, stacks)
        return
    experts: dict[int, dict[str, str]] = {}
    for name, role in checkpoint.roles.items():
        if isinstance(role, ExpertName) and role.layer == layer:
            experts.setdefault(role.expert, {})[role.after.removesuffix(".weight")] = name
    for expert, names in sorted(experts.items()):
        yield _single(checkpoint, f"expert {expert} of layer {layer}", names)


def shared_expert(checkpoint: Checkpoint, layer: int) -> StoredExpert | None:
    """The shared expert of a layer; None where it has none."""
    names = {
        projection: name
        for name, role in checkpoint.roles.items()
        if role.layer == layer and (projection := shared_projection(checkpoint, name))
    }
    return _single(checkpoint, f"the shared expert of layer {layer}", names) if names else None


def shared_projection(checkpoint: Checkpoint, name: str) -> str:
    """Which projection of a shared expert a tensor on disk is; empty for any other tensor."""
    prefixes = "|".join(map(re.escape, checkpoint.spec.shared)) or "(?!)"
    match = re.search(rf"\.(?:{prefixes})(\w+)\.weight$", name)
    return match[1] if match and match[1] in checkpoint.spec.projections else ""


def _single(checkpoint: Checkpoint, what: str, names: dict[str, str]) -> StoredExpert:
    odd = set(checkpoint.spec.projections) ^ names.keys()
    if odd:
        raise CheckpointError(f"{what}: {min(odd)!r} is not where gate, up and down are looked for")
    gate, up, down = (_read(checkpoint.tensors[names[projection]]) for projection in checkpoint.spec.projections)
    return StoredExpert(what=what, gate=gate, up=up, down=down)


def _stacked(checkpoint: Checkpoint, layer: int, stacks: dict[str, str]) -> Iterator[StoredExpert]:
    entries = {part.rpartition(".")[2]: checkpoint.tensors[name] for part, name in stacks.items()}
    for name in entries.keys() - {"gate_up_proj", "down_proj", "gate_up_proj_bias", "down_proj_bias"}:
        raise CheckpointError(f"the experts of layer {layer} have a tensor {name!r}, which is not known here")
    both, down, bias = entries["gate_up_proj"], entries["down_proj"], entries.get("gate_up_proj_bias")
    transposed = both.shape[1] == down.shape[2] and both.shape[2] == 2 * down.shape[1]  # and then interleaved
    for expert in range(both.shape[0]):
        both_OH, down_HI = _read(both, expert), _read(down, expert)
        if transposed:
            both_OH, down_HI = both_OH.T, down_HI.T
        half = len(both_OH) // 2
        parts = (slice(0, None, 2), slice(1, None, 2)) if transposed else (slice(half), slice(half, None))
        yield StoredExpert(
            what=f"expert {expert} of layer {layer}",
            gate=both_OH[parts[0]],
            up=both_OH[parts[1]],
            down=down_HI,
            biases=None if bias is None else np.stack([_read(bias, expert)[part] for part in parts], axis=1),
        )


def _read(entry: TensorEntry, row: int | None = None) -> Bits:
    """A tensor, or one row of its first axis."""
    size, rest = divmod(entry.nbytes, entry.numel)
    if rest or size not in {2, 4, 8}:
        raise CheckpointError(f"tensor {entry.name!r} is stored as {entry.dtype}, whose elements are packed")
    shape = entry.shape if row is None else entry.shape[1:]
    count = int(np.prod(shape))
    start = entry.begin + (0 if row is None else row * count * size)
    bits: Bits = np.fromfile(entry.file, dtype=f"<u{size}", count=count, offset=start)
    if bits.size != count:
        raise CheckpointError(f"{entry.file} ended early", "it changed while it was read")
    return bits.reshape(shape)
