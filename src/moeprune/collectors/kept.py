"""What a layer-by-layer collection keeps beside its output, so that a later run goes on where this one stopped."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np

from moeprune._files import hidden_sibling, lock_file, note, parse_json, sha256_bytes, write_atomic
from moeprune.errors import ArtifactError
from moeprune.statistics import LayerArrays
from moeprune.streaming.states import Layout, States

_JOURNAL = "progress.json"


class Kept:
    """The sums of the layers that are done, and the states that the next layer needs.

    Attributes:
        folder: where everything lies.
        start: the decoder layer to go on with.
    """

    def __init__(self, folder: Path, run: Mapping[str, Any]) -> None:
        self.folder = folder
        self._key = sha256_bytes(json.dumps(run, sort_keys=True).encode())
        found = self._journal()
        if found.get("run") != self._key:
            if found:
                note(f"what an earlier run left in {folder} was of other data or options, and is not used")
            _empty(folder)
            found = {}
        self.start = int(found.get("next", 0))
        self._states = found.get("states", "")
        self._layout: Layout = [[(tuple(shape), dtype) for shape, dtype in batch] for batch in found.get("layout", [])]

    def _journal(self) -> dict[str, Any]:
        try:
            found = parse_json((self.folder / _JOURNAL).read_bytes(), self.folder / _JOURNAL)
        except (OSError, ArtifactError):
            return {}
        return found if isinstance(found, dict) else {}

    def restore(self, states: States) -> None:
        """Give back the states that layer ``start`` needs.

        Raises:
            ArtifactError: their file is not as it was written.
        """
        try:
            states.restore(self.folder, self._states, self._layout)
        except (OSError, ValueError) as error:
            raise ArtifactError(
                f"cannot go on from {self.folder}: {error}", "remove that folder to begin again"
            ) from error

    def save_states(self, states: States, following: int) -> None:
        """Make the states that layer ``following`` needs durable, and go on from there next time."""
        file = states.save(self.folder)
        journal = {"run": self._key, "next": following, "states": file, "layout": states.layout()}
        write_atomic(self.folder / _JOURNAL, json.dumps(journal))

    def save_layer(self, layer: int, arrays: LayerArrays) -> None:
        """Make the sums of a layer durable."""
        named = {f"total.{name}": array for name, array in arrays.total.items()}
        named |= {f"first_half.{name}": array for name, array in arrays.first_half.items()}
        buffer = io.BytesIO()
        np.savez(buffer, **named)  # type: ignore[arg-type]
        write_atomic(self._file(layer), buffer.getvalue())

    def load_layer(self, layer: int) -> LayerArrays:
        """The sums of a layer that is done.

        Raises:
            ArtifactError: its file is missing or damaged.
        """
        parts: dict[str, dict[str, Any]] = {"total": {}, "first_half": {}}
        try:
            with np.load(self._file(layer), allow_pickle=False) as named:
                for key in named.files:
                    part, _, name = key.partition(".")
                    parts[part][name] = named[key]
        except (OSError, ValueError, KeyError, EOFError) as error:
            raise ArtifactError(
                f"cannot read {self._file(layer)}: {error}", "remove that folder to begin again"
            ) from error
        return LayerArrays(**parts)

    def _file(self, layer: int) -> Path:
        return self.folder / f"layer-{layer:05d}.npz"


@contextlib.contextmanager
def kept_beside(output: Path, run: Mapping[str, Any], *, rank: int = 0) -> Iterator[Kept]:
    """Use what an earlier run left beside an output file; it is removed when the block ends well.

    Args:
        output: the file that will be written in the end.
        run: everything that decides the numbers; what was left by another run is not used.
        rank: of this process, each of which keeps its own.

    Raises:
        ConfigError: another run is collecting for the same output.
    """
    folder = hidden_sibling(output, "collect" if rank == 0 else f"collect-{rank}")
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder, output):
        yield Kept(folder, run)
    shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _locked(folder: Path, output: Path) -> Iterator[IO[bytes]]:
    with (folder / "lock").open("a+b") as handle:
        lock_file(handle, output)
        yield handle


def _empty(folder: Path) -> None:
    for item in folder.iterdir():
        if item.name != "lock":
            item.unlink()
