"""What a collection leaves to go on from is believed only when every byte is as it was written."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import xxhash

from moeprune.collectors.kept import Kept, kept_beside
from moeprune.errors import ConfigError
from moeprune.statistics import LayerArrays
from moeprune.streaming.states import Layout, Saved, States

RUN = {"model": "abc", "options": {"batch_tokens": 8}}
LAYOUT: Layout = [[((2, 3), "float32")]]


class Bytes(States):
    """States that are some bytes."""

    def save(self, folder: Path) -> Saved:
        """Write them."""
        content = bytes(range(24))
        (folder / "states-1").write_bytes(content)
        return Saved(file="states-1", digest=xxhash.xxh3_128_hexdigest(content), layout=LAYOUT)


def arrays(layer: int) -> LayerArrays:
    """Sums of a layer."""
    return LayerArrays(
        total={"count": np.arange(4) + layer, "norm_sum": np.full((1, 4), layer / 7)},
        first_half={"count": np.arange(4) // 2},
    )


def leave(folder: Path) -> None:
    """Leave two layers and the states that the third is given."""
    kept = Kept(folder, RUN)
    for layer in (0, 1):
        kept.save_layer(layer, arrays(layer))
    kept.advance(2, Bytes(1))


def same(one: LayerArrays, other: LayerArrays) -> bool:
    """Equal names, types and bytes."""
    return all(
        {name: (array.dtype, array.tobytes()) for name, array in getattr(one, part).items()}
        == {name: (array.dtype, array.tobytes()) for name, array in getattr(other, part).items()}
        for part in ("total", "first_half")
    )


def test_what_was_left_is_found(tmp_path: Path) -> None:
    """Layers, states and the number of the next layer, of the same run only."""
    leave(tmp_path)
    found = Kept(tmp_path, dict(reversed(RUN.items())))
    assert found.start == 2
    assert all(same(found.load_layer(layer), arrays(layer)) for layer in (0, 1))
    assert not same(found.load_layer(0), arrays(1))
    other = Kept(tmp_path, RUN | {"model": "abd"})
    assert other.start == 0
    assert list(tmp_path.iterdir()) == []


def test_after_the_last_layer_the_states_are_gone(tmp_path: Path) -> None:
    """They may be larger than everything else, and nobody needs them."""
    leave(tmp_path)
    Kept(tmp_path, RUN).advance(3, None)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["layer-0.npz", "layer-1.npz", "progress.json"]
    assert Kept(tmp_path, RUN).start == 3


@pytest.mark.parametrize("name", ["progress.json", "layer-1.npz", "states-1"])
def test_no_byte_may_change(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One bit of any byte, or one byte more or less: everything is forgotten, with a remark."""
    leave(tmp_path)
    whole = {file: file.read_bytes() for file in tmp_path.iterdir()}
    content = whole[tmp_path / name]
    changes = [content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :] for place in range(len(content))]
    for change in [*changes, content[:-1], content + b" ", b"", b"null", b"[]", b"{}"]:
        for file, before in whole.items():
            file.write_bytes(before)
        (tmp_path / name).write_bytes(change)
        capsys.readouterr()
        found = Kept(tmp_path, RUN)
        if found.start:  # white space that JSON does not mind
            assert all(same(found.load_layer(layer), arrays(layer)) for layer in (0, 1))
            assert change.strip() == content
        else:
            assert capsys.readouterr().err.count("and is not used") == 1
            assert list(tmp_path.iterdir()) == []


def test_a_folder_is_used_by_one_run_at_a_time(tmp_path: Path) -> None:
    """Each process of a run has its own; it is gone in the end, and stays when the run fails after a layer."""
    output = tmp_path / "out.safetensors"
    with kept_beside(output, RUN) as kept:
        assert kept.folder.parent == tmp_path
        with pytest.raises(ConfigError, match="another run is writing"), kept_beside(output, RUN):
            pass
        with kept_beside(output, RUN, rank=1) as second:
            assert second.folder != kept.folder
    assert list(tmp_path.iterdir()) == []
    for layers, left in ((0, False), (1, True)):
        with pytest.raises(ZeroDivisionError):
            fail_after(layers, output)
        assert any(tmp_path.iterdir()) is left


def fail_after(layers: int, output: Path) -> None:
    """A run that fails when some layers are done."""
    with kept_beside(output, RUN) as kept:
        for layer in range(layers):
            kept.save_layer(layer, arrays(layer))
            kept.advance(layer + 1, Bytes(1))
        raise ZeroDivisionError


def test_a_folder_that_was_removed_meanwhile_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that has just ended removes the lock that the next one holds: that one locks another."""
    from moeprune.collectors import kept as module

    output, lock_file, removed = tmp_path / "out", module.lock_file, []

    def lock(file: object, target: Path) -> None:
        lock_file(file, target)  # type: ignore[arg-type]
        if not removed:
            removed.append((tmp_path / ".out.moeprune-collect" / "lock").unlink())

    monkeypatch.setattr(module, "lock_file", lock)
    with kept_beside(output, RUN) as kept:
        assert (kept.folder / "lock").exists()
        with pytest.raises(ConfigError, match="another run is writing"), kept_beside(output, RUN):
            pass
