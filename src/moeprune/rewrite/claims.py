"""Output folders that appear whole or not at all, written by one run at a time.

A folder is filled under a hidden name beside its target and renamed when it is finished. A journal file beside it is
locked meanwhile; the lock ends with the process, whatever ends that.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from moeprune._files import PathLike, check_output_folder, hidden_sibling, lock_file, sync_path
from moeprune.errors import ConfigError


@contextlib.contextmanager
def output_folder(path: PathLike, *, overwrite: bool = False) -> Iterator[Path]:
    """A folder to fill that takes its final name only when the block ends well.

    The block writes into a hidden sibling; on any error that sibling is removed and an existing folder stays as it was.
    """
    with claimed(path, overwrite=overwrite) as claim:
        claim.clear()
        try:
            yield claim.folder
            claim.finish()
        finally:
            shutil.rmtree(claim.folder, ignore_errors=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """An output folder that no other run may write now.

    Attributes:
        target: the folder under its final name.
        journal: a file beside it, locked while the claim holds; what is written to it outlives a kill.
    """

    target: Path
    journal: IO[bytes]

    @property
    def folder(self) -> Path:
        """The hidden sibling to fill."""
        return hidden_sibling(self.target, "partial")

    def clear(self) -> None:
        """Start with an empty hidden folder and an empty journal."""
        if self.folder.exists():
            shutil.rmtree(self.folder)
        self.journal.truncate(0)
        self.folder.mkdir()

    def finish(self) -> None:
        """Flush everything to the device and give the hidden folder its final name."""
        for item in (*self.folder.rglob("*"), self.folder):
            sync_path(item)
        _swap_in(self.folder, self.target)


@contextlib.contextmanager
def claimed(path: PathLike, *, overwrite: bool = False) -> Iterator[Claim]:
    """Keep other runs from an output folder; the end of the process, by a kill too, sets it free.

    Raises:
        ConfigError: another run holds it, it is not empty, or nothing can be written there.
    """
    target = Path(path).resolve()  # beside the folder that a link points to, so that the rename stays on one disk
    check_output_folder(target, overwrite=overwrite)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        journal = _locked_journal(target)
    except OSError as error:
        raise ConfigError(f"cannot create {target}: {error.strerror}") from error
    try:
        _mend(target)
        check_output_folder(target, overwrite=overwrite)  # another run may have finished it before the lock was free
        yield Claim(target=target, journal=journal)
    finally:
        if not hidden_sibling(target, "partial").exists():
            with contextlib.suppress(OSError):
                hidden_sibling(target, "journal").unlink()
        journal.close()


def check_unclaimed(path: PathLike) -> None:
    """Refuse an output folder that another run is writing, before any work is done for it."""
    with contextlib.suppress(OSError), hidden_sibling(path, "journal").open("rb") as journal:
        lock_file(journal, Path(path), shared=True)


def _locked_journal(target: Path) -> IO[bytes]:
    file = hidden_sibling(target, "journal")
    while True:
        journal = file.open("a+b", buffering=0)
        try:
            lock_file(journal, target)
            if os.path.samestat(os.fstat(journal.fileno()), file.stat()):
                return journal
            journal.close()  # removed, and made again by yet another run
        except FileNotFoundError:  # the run that held it has just finished and removed it
            journal.close()
        except BaseException:
            journal.close()
            raise


def _mend(target: Path) -> None:
    """Undo a swap of names that was cut in the middle, or remove what it replaced."""
    old = hidden_sibling(target, "old")
    if old.exists() and not target.exists():
        os.rename(old, target)
    shutil.rmtree(old, ignore_errors=True)


def _swap_in(staging: Path, target: Path) -> None:
    """Give the finished folder its name; what stood there before is removed only afterwards."""
    old = hidden_sibling(target, "old")
    try:
        if target.exists():
            os.rename(target, old)
        os.rename(staging, target)
    except BaseException:  # an interrupt between the two must not cost the old folder
        if old.exists() and not target.exists():
            os.rename(old, target)
        raise
    sync_path(target.parent)
    shutil.rmtree(old, ignore_errors=True)
