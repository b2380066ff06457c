"""Safetensors files that were worth keeping: what fuzzing and attackers would try, and what is odd but sound.

Whoever finds another one puts it into ``tests/corpus/headers`` under ``sound`` or ``damaged``.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors import SafetensorError, deserialize

from moeprune.errors import ArtifactError, CheckpointError
from moeprune.headers import read_header

CORPUS = Path(__file__).parents[1] / "corpus" / "headers"
DAMAGED = sorted((CORPUS / "damaged").iterdir())
SOUND = sorted((CORPUS / "sound").iterdir())
UNKNOWN_TO_THE_LIBRARY = {"unknown-type", "extra-keys", "huge-shape-of-zero"}


@pytest.mark.parametrize("file", DAMAGED, ids=lambda file: file.stem)
def test_damaged_files_are_refused(file: Path) -> None:
    """One line that names the file, and nothing but our own errors."""
    with pytest.raises((ArtifactError, CheckpointError), match=file.name):
        read_header(file)


@pytest.mark.parametrize("file", SOUND, ids=lambda file: file.stem)
def test_sound_files_are_read_as_the_library_reads_them(file: Path) -> None:
    """Every tensor lies where the library finds it, in whatever order the header lists them."""
    data = file.read_bytes()
    entries, _ = read_header(file)
    try:
        known = dict(deserialize(data))
    except SafetensorError:
        assert file.stem in UNKNOWN_TO_THE_LIBRARY
        return
    assert {entry.name: data[entry.begin : entry.end] for entry in entries} == {
        name: bytes(item["data"]) for name, item in known.items()
    }
    assert {entry.name: list(entry.shape) for entry in entries} == {name: item["shape"] for name, item in known.items()}


def test_the_corpus_is_there() -> None:
    """A test that reads no file proves nothing."""
    assert len(DAMAGED) > 50
    assert len(SOUND) > 10
