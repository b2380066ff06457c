"""Advice to the system to read a layer's bytes ahead."""

from __future__ import annotations

import itertools
import os
from pathlib import Path

import pytest

from moeprune.streaming import weights


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="this system takes no such advice")
def test_advice_covers_a_range_in_windows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Linux cuts advice short at the disk's read-ahead, so that a layer is asked for a window at a time."""
    file = tmp_path / "shard"
    file.touch()
    asked: list[tuple[int, int]] = []

    def advise(_: int, begin: int, size: int, advice: int) -> None:
        assert advice == os.POSIX_FADV_WILLNEED
        asked.append((begin, size))

    monkeypatch.setattr(os, "posix_fadvise", advise)
    begin, size = 1000, 3 * (128 << 10) + 5
    weights._advise([(file, begin, size)])
    assert asked[0][0] == begin
    assert all(after[0] == before[0] + before[1] for before, after in itertools.pairwise(asked))
    assert begin + size <= sum(asked[-1]) < begin + size + (128 << 10)
    assert max(length for _, length in asked) <= 128 << 10
