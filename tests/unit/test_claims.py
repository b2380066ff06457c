"""Folders that appear whole or not at all, one run at a time."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import Any

import pytest

from moeprune import _files
from moeprune.errors import ConfigError
from moeprune.rewrite import claims


def contents(folder: Path) -> dict[str, str]:
    """Every file below a folder, hidden ones too."""
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


def fail(*_: object) -> None:
    """A system call on a broken disk."""
    raise OSError(5, "Input/output error")


def fill_and_raise(target: Path, error: type[BaseException], *, overwrite: bool) -> None:
    """Work on an output folder that goes wrong half-way."""
    with claims.output_folder(target, overwrite=overwrite) as staging:
        (staging / "half").write_text("x")
        raise error


def test_a_folder_appears_when_the_block_ends(tmp_path: Path) -> None:
    """Until then only a hidden sibling exists; afterwards only the folder."""
    target = tmp_path / "deep" / "out"
    with claims.output_folder(target) as staging:
        (staging / "sub").mkdir()
        (staging / "sub" / "a").write_text("1")
        assert staging.parent == target.parent
        assert staging.name.startswith(".")
        assert not target.exists()
    assert contents(tmp_path) == {"deep/out/sub/a": "1"}
    (tmp_path / "plain").mkdir()
    assert stat.S_IMODE(target.stat().st_mode) == stat.S_IMODE((tmp_path / "plain").stat().st_mode)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_block_that_fails_leaves_everything_as_it_was(
    tmp_path: Path, error: type[BaseException], overwrite: bool
) -> None:
    """No half-written folder, and an old one keeps its content."""
    target = tmp_path / "out"
    before = {}
    if overwrite:
        target.mkdir()
        (target / "old").write_text("kept")
        before = {"out/old": "kept"}
    with pytest.raises(error):
        fill_and_raise(target, error, overwrite=overwrite)
    assert contents(tmp_path) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"][: len(before)]


def test_the_old_folder_stays_until_the_new_one_is_whole(tmp_path: Path) -> None:
    """Overwriting replaces everything, at the very end."""
    target = tmp_path / "out"
    target.mkdir()
    (target / "old").write_text("1")
    with claims.output_folder(target, overwrite=True) as staging:
        (staging / "new").write_text("2")
        assert contents(target) == {"old": "1"}
    assert contents(tmp_path) == {"out/new": "2"}


@pytest.mark.parametrize("call", [1, 2])
@pytest.mark.parametrize("error", [OSError(5, "broken"), KeyboardInterrupt()])
def test_a_failure_while_names_are_swapped_restores_the_old_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: int, error: BaseException
) -> None:
    """Between the two renames the old folder has no name: neither an error nor Ctrl-C may cost it."""
    rename, calls = os.rename, []

    def unlucky(source: Path, target: Path) -> None:
        calls.append(source)
        if len(calls) == call:
            raise error
        rename(source, target)

    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_text("1")
    monkeypatch.setattr(os, "rename", unlucky)
    with (
        pytest.raises(type(error)),
        claims.output_folder(tmp_path / "out", overwrite=True) as staging,
    ):
        (staging / "new").write_text("2")
    assert contents(tmp_path) == {"out/old": "1"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_output_folders_that_cannot_be_used_are_refused(tmp_path: Path) -> None:
    """A non-empty folder without --overwrite, a file, and a place nothing can be renamed to."""
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a").touch()
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    _files.check_output_folder(tmp_path / "empty", overwrite=False)
    _files.check_output_folder(tmp_path / "none", overwrite=False)
    _files.check_output_folder(tmp_path / "full", overwrite=True)
    with pytest.raises(ConfigError, match=r"full is not empty .*--overwrite"):
        _files.check_output_folder(tmp_path / "full", overwrite=False)
    with pytest.raises(ConfigError, match="file exists and is not a folder"):
        _files.check_output_folder(tmp_path / "file", overwrite=True)
    with pytest.raises(ConfigError, match="/ is a mount point"):
        _files.check_output_folder("/", overwrite=True)
    with pytest.raises(ConfigError, match=r"cannot write .*below"), claims.output_folder(tmp_path / "file" / "below"):
        pass


def test_a_link_to_a_folder_is_written_through(tmp_path: Path) -> None:
    """A link to another disk must not turn into a folder on this one."""
    real = tmp_path / "disk" / "real"
    real.mkdir(parents=True)
    (tmp_path / "out").symlink_to(real)
    with claims.output_folder(tmp_path / "out") as staging:
        assert staging.parent == real.parent
        (staging / "a").write_text("1")
    assert (tmp_path / "out").is_symlink()
    assert contents(real) == {"a": "1"}


def test_files_of_a_finished_folder_reach_the_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every file and folder is flushed before the rename, so that a power cut leaves no empty file under its name."""
    flushed: list[str] = []
    fsync = os.fsync

    def record(descriptor: int) -> None:
        flushed.append(Path(f"/proc/self/fd/{descriptor}").readlink().name)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", record)
    with claims.output_folder(tmp_path / "out") as staging:
        (staging / "sub").mkdir()
        (staging / "sub" / "config.json").write_text("{}")
    assert {"sub", "config.json", tmp_path.name} <= set(flushed)


def test_one_run_at_a_time_writes_a_folder(tmp_path: Path) -> None:
    """The second is refused at once, before any work too; when the first ends, however it does, the folder is free."""
    out = tmp_path / "out"
    claims.check_unclaimed(out)
    with claims.output_folder(out) as staging:
        (staging / "a").write_text("1")
        with pytest.raises(ConfigError, match="another run is writing"):
            claims.check_unclaimed(out)
        with pytest.raises(ConfigError, match="another run is writing"), claims.output_folder(out):
            pass
        with claims.output_folder(tmp_path / "other"):
            pass
    claims.check_unclaimed(out)
    assert contents(tmp_path) == {"out/a": "1"}
    with pytest.raises(ValueError, match=r"^$"):
        fill_and_raise(out, ValueError, overwrite=True)
    claims.check_unclaimed(out)
    assert contents(tmp_path) == {"out/a": "1"}


def test_a_folder_that_another_run_finished_first_is_not_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the first look and the lock another run may have filled the folder: it is looked at again."""
    locked = claims._locked_journal

    def late(target: Path) -> Any:
        target.mkdir()
        (target / "theirs").write_text("1")
        return locked(target)

    monkeypatch.setattr(claims, "_locked_journal", late)
    with pytest.raises(ConfigError, match="is not empty"), claims.output_folder(tmp_path / "out"):
        pass
    assert contents(tmp_path) == {"out/theirs": "1"}


def test_a_lock_on_a_file_that_is_gone_is_no_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A journal that its owner removed between our opening and our locking it is opened anew."""
    lock, locked = claims.lock_file, []

    def late(file: Any, target: Path) -> None:
        locked.append(file)
        if len(locked) == 1:
            Path(file.name).unlink()
        lock(file, target)

    monkeypatch.setattr(claims, "lock_file", late)
    with claims.output_folder(tmp_path / "out") as staging:
        assert [file.closed for file in locked] == [True, False]
        monkeypatch.undo()
        with pytest.raises(ConfigError, match="another run"):
            claims.check_unclaimed(tmp_path / "out")
        (staging / "a").write_text("1")
    assert contents(tmp_path) == {"out/a": "1"}


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_can_be_written_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """Some network file systems have none; a real error is still one."""

    def no_locks(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.flock", no_locks)
    with claims.output_folder(tmp_path / "out") as staging:
        (staging / "a").write_text("1")
    assert contents(tmp_path) == {"out/a": "1"}
    monkeypatch.setattr("fcntl.flock", fail)
    with pytest.raises(ConfigError, match="Input/output error"), claims.output_folder(tmp_path / "new"):
        pass
