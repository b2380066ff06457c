"""What a layer-by-layer collection keeps beside its output, so that a later run goes on where this one stopped.

``progress.json`` says which decoder layer is next, and holds the digests of everything else: of the sums of the layers
that are done, and of the states that the next layer is given. What is not as it was written, and what a run of other
data or options left, is not used.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
import xxhash

from moeprune._files import hidden_sibling, lock_file, note, sha256_bytes, write_atomic
from moeprune.statistics import AnyArray, LayerArrays
from moeprune.streaming.states import Saved, States, remove_states

_JOURNAL, _LOCK = "progress.json", "lock"
_PIECE = 1 << 24  # bytes of a file that are in memory while its digest is computed


@dataclass(frozen=True, slots=True, kw_only=True)
class _Progress:
    """What the journal says.

    Attributes:
        run: digest of everything that decides the numbers.
        following: the decoder layer that comes next.
        layers: digests of the sums of layers, by the layer's number in decimal.
        states: what layer ``following`` is given; None before the first and after the last.
    """

    run: str
    following: int = 0
    layers: Mapping[str, str] = field(default_factory=dict)
    states: Saved | None = None


class Kept:
    """The sums of the layers that are done, and the states that the next layer is given.

    Attributes:
        folder: where everything lies.
    """

    def __init__(self, folder: Path, run: Mapping[str, Any]) -> None:
        self.folder = folder
        found = _usable(folder, _digest(run))
        if found is None:
            _empty(folder)
        else:
            note(f"going on with decoder layer {found.following}: those before it are done")
        self._progress = found or _Progress(run=_digest(run))
        self._layers = dict(self._progress.layers)

    @property
    def start(self) -> int:
        """The decoder layer to go on with."""
        return self._progress.following

    def restore(self, states: States) -> None:
        """Give back the states that layer ``start`` is given."""
        if self._progress.states is not None:
            states.restore(self.folder, self._progress.states)

    def advance(self, following: int, states: States | None) -> None:
        """Go on with layer ``following`` next time, which is given these states; after the last layer none are left."""
        saved = None if states is None else states.save(self.folder)
        self._progress = _Progress(run=self._progress.run, following=following, layers=dict(self._layers), states=saved)
        said = dataclasses.asdict(self._progress)
        write_atomic(self.folder / _JOURNAL, json.dumps(said | {"digest": _digest(said)}))
        if states is None:
            remove_states(self.folder)

    def save_layer(self, layer: int, arrays: LayerArrays) -> None:
        """Make the sums of a layer durable."""
        named = {f"{part}.{name}": array for part, one in _parts(arrays).items() for name, array in one.items()}
        buffer = io.BytesIO()
        np.savez(buffer, **named)  # type: ignore[arg-type]
        write_atomic(_layer_file(self.folder, layer), buffer.getvalue())
        self._layers[str(layer)] = xxhash.xxh3_128_hexdigest(buffer.getbuffer())

    def has(self, layer: int) -> bool:
        """Whether a layer was done when the run got as far as ``start``."""
        return str(layer) in self._progress.layers

    def load_layer(self, layer: int) -> LayerArrays:
        """The sums of a layer that is done."""
        parts: dict[str, dict[str, AnyArray]] = {"total": {}, "first_half": {}, "rows": {}, "facts": {}}
        with np.load(_layer_file(self.folder, layer), allow_pickle=False) as named:
            for key in named.files:
                part, _, name = key.partition(".")
                parts[part][name] = named[key]
        return LayerArrays(**parts)


def _parts(arrays: LayerArrays) -> dict[str, Mapping[str, AnyArray]]:
    return {"total": arrays.total, "first_half": arrays.first_half, "rows": arrays.rows, "facts": arrays.facts}


def _layer_file(folder: Path, layer: int | str) -> Path:
    return folder / f"layer-{layer}.npz"


# --- what an earlier run left -----------------------------------------------------------------------------------------


def _usable(folder: Path, run: str) -> _Progress | None:
    """What an earlier run left, or None with a remark where that is of no use; every byte is read once."""
    if not (folder / _JOURNAL).exists():
        return None
    found = _read(folder / _JOURNAL)
    if found is not None and found.run != run:
        note(f"what an earlier run left in {folder} was of other data or options, and is not used")
        return None
    if found is None or not _whole(folder, found):
        note(f"what an earlier run left in {folder} is damaged, and is not used")
        return None
    return found


def _read(journal: Path) -> _Progress | None:
    """The journal; None where it is not as it was written."""
    try:
        said = json.loads(journal.read_bytes())
        if said.pop("digest") != _digest(said):
            return None
        states = said.pop("states")
        return _Progress(**said, states=Saved(**states) if states else None)
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None


def _whole(folder: Path, progress: _Progress) -> bool:
    """Whether every file is as it was written."""
    files = {_layer_file(folder, layer): digest for layer, digest in progress.layers.items()}
    if progress.states is not None:
        files[folder / progress.states.file] = progress.states.digest
    try:
        return all(_digest_of_file(file) == digest for file, digest in files.items())
    except OSError:
        return False


def _digest(value: Any) -> str:
    return sha256_bytes(json.dumps(value, sort_keys=True).encode())


def _digest_of_file(file: Path) -> str:
    digest = xxhash.xxh3_128()
    with file.open("rb", buffering=0) as handle:
        while piece := handle.read(_PIECE):
            digest.update(piece)
    return digest.hexdigest()


def _empty(folder: Path) -> None:
    for item in folder.iterdir():
        if item.name != _LOCK:
            item.unlink()


# --- the folder -------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def kept_beside(output: Path, run: Mapping[str, Any], *, rank: int = 0) -> Iterator[Kept]:
    """Use what an earlier run left beside an output; it is removed when the block, which writes the output, ends well.

    Args:
        output: what will be written in the end.
        run: everything that decides the numbers; what another run left is not used.
        rank: of this process, each of which keeps its own.

    Raises:
        ConfigError: another run is collecting for the same output.
    """
    folder = hidden_sibling(output, "collect" if rank == 0 else f"collect-{rank}")
    with _locked(folder, output):
        try:
            yield Kept(folder, run)
        except BaseException:
            left = _read(folder / _JOURNAL)
            if left is None:
                shutil.rmtree(folder, ignore_errors=True)
            else:
                note(f"the same command will go on with decoder layer {left.following}")
            raise
        shutil.rmtree(folder, ignore_errors=True)


def _locked(folder: Path, output: Path) -> IO[bytes]:
    """A file that keeps other runs from the folder while it is open; a killed process closes it too."""
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as undo, contextlib.suppress(FileNotFoundError):
            file = undo.enter_context((folder / _LOCK).open("a+b"))
            lock_file(file, output)
            # A run that has just ended may have removed the file after it was opened here.
            if os.path.samestat(os.fstat(file.fileno()), (folder / _LOCK).stat()):
                undo.pop_all()
                return file
