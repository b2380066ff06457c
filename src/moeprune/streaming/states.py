"""What the decoder layers hand on, batch by batch: in memory, or in a file where memory is short.

Files are read and written, not mapped: a mapping would count against a limit on a process's address space, and the
system caches the file either way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xxhash

from moeprune._files import sync_path
from moeprune.errors import ArtifactError

if TYPE_CHECKING:
    import torch

    State = tuple[torch.Tensor, ...]  # hidden states [B, S, H] first; few families hand on more

Layout = list[list[tuple[tuple[int, ...], str]]]  # shape and dtype of every tensor of every batch
_FILES = ("states-0", "states-1")


@dataclass(frozen=True, slots=True, kw_only=True)
class Saved:
    """States that are safe in a file.

    Attributes:
        file: its name.
        digest: xxh3-128 of its bytes.
        layout: shapes and dtypes of the tensors that lie in it one after another, by batch.
    """

    file: str
    digest: str
    layout: Layout


class States:
    """The states of every batch in memory; a new one takes the place of the old one.

    Attributes:
        in_files: whether they live in files, so that to save them costs next to nothing.
    """

    in_files = False

    def __init__(self, batches: int) -> None:
        self._states: list[State] = [()] * batches
        self._saved = 0

    def get(self, batch: int) -> State:
        """What the last layer gave for a batch, on the CPU; to be read before it is replaced."""
        return self._states[batch]

    def put(self, batch: int, state: State) -> None:
        """Keep what this layer gives for a batch."""
        old = self._states[batch]
        if _shapes(old) == _shapes(state):
            for kept, tensor in zip(old, state, strict=True):
                kept.copy_(tensor)
        else:
            self._states[batch] = tuple(tensor.detach().to("cpu", copy=True).contiguous() for tensor in state)

    def turn(self) -> None:
        """The layer is done: what was put is what the next layer gets."""

    def save(self, folder: Path) -> Saved:
        """Make what the next layer gets durable; what was saved before stays until the next call."""
        self._saved = 1 - self._saved
        file, digest = folder / _FILES[self._saved], xxhash.xxh3_128()
        with file.open("wb", buffering=0) as handle:
            for state in self._states:
                for tensor in state:
                    _write(handle, tensor, digest)
        sync_path(file)
        return Saved(file=file.name, digest=digest.hexdigest(), layout=[_shapes(state) for state in self._states])

    def restore(self, folder: Path, saved: Saved) -> None:
        """Go on from what was saved, by this class or another."""
        self._saved = _FILES.index(saved.file)
        with (folder / saved.file).open("rb", buffering=0) as handle:
            self._states = [tuple(_read(handle, *like) for like in batch) for batch in saved.layout]


class SpilledStates(States):
    """The states in two files, of which one is read while the other is written.

    What was saved is overwritten by the second layer after it, so that they must be saved after every layer.
    """

    in_files = True

    def __init__(self, batches: int, folder: Path) -> None:
        super().__init__(batches)
        self._folder = folder
        self._now: list[tuple[int, Any]] = [(0, [])] * batches  # offset, shapes
        self._next = list(self._now)
        self._end = 0
        self._written = xxhash.xxh3_128()
        self._digest = ""

    def get(self, batch: int) -> State:
        """What the last layer gave for a batch, read from its file."""
        offset, shapes = self._now[batch]
        with self._file(self._saved).open("rb", buffering=0) as handle:
            handle.seek(offset)
            return tuple(_read(handle, *like) for like in shapes)

    def put(self, batch: int, state: State) -> None:
        """Write what this layer gives for a batch behind what it gave for others."""
        self._next[batch] = (self._end, _shapes(state))
        with self._file(1 - self._saved).open("r+b" if self._end else "wb", buffering=0) as handle:
            handle.seek(self._end)
            for tensor in state:
                _write(handle, tensor.detach().cpu().contiguous(), self._written)
            self._end = handle.tell()

    def turn(self) -> None:
        """Read from now on what was written."""
        self._saved = 1 - self._saved
        self._now, self._next, self._end = self._next, [(0, [])] * len(self._now), 0
        self._digest, self._written = self._written.hexdigest(), xxhash.xxh3_128()

    def save(self, folder: Path) -> Saved:
        """Flush the file that is read now to the device; the batches must have been put in order."""
        self._file(self._saved).touch()  # where there are no batches, nothing was written
        sync_path(self._file(self._saved))
        layout = [shapes for _, shapes in self._now]
        return Saved(file=_FILES[self._saved], digest=self._digest, layout=layout)

    def restore(self, folder: Path, saved: Saved) -> None:
        """Go on from what was saved, by this class or another, in the folder of these states."""
        self._saved, self._digest, offset = _FILES.index(saved.file), saved.digest, 0
        self._now = []
        for batch in saved.layout:
            self._now.append((offset, batch))
            offset += sum(_size(*like) for like in batch)

    def _file(self, which: int) -> Path:
        return self._folder / _FILES[which]


def remove_states(folder: Path) -> None:
    """Remove the files of states that nobody needs any longer."""
    for name in _FILES:
        (folder / name).unlink(missing_ok=True)


def _shapes(state: Sequence[torch.Tensor]) -> list[tuple[tuple[int, ...], str]]:
    return [(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch.")) for tensor in state]


def _size(shape: Sequence[int], dtype: str) -> int:
    import math

    import torch

    return int(math.prod(shape) * getattr(torch, dtype).itemsize)


def _read(handle: Any, shape: Sequence[int], dtype: str) -> torch.Tensor:
    import torch

    tensor = torch.empty(tuple(shape), dtype=getattr(torch, dtype))
    view, done = _bytes_of(tensor), 0
    while done < len(view):
        count = handle.readinto(view[done:])
        if not count:
            raise ArtifactError(f"{handle.name} is shorter than what was written")
        done += count
    return tensor


def _write(handle: Any, tensor: torch.Tensor, digest: Any) -> None:
    view, done = _bytes_of(tensor), 0
    digest.update(view)
    while done < len(view):
        done += handle.write(view[done:])


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    import torch

    return tensor.reshape(-1).view(torch.uint8).numpy().data
