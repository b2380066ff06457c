"""An output folder that is filled shard by shard and goes on where a killed run stopped.

The folder is filled under a hidden name beside its target, with a journal beside it: one line of JSON for the job,
then one for every shard that is safe on the device, with its size and the digests of its tensors. A later run of the
same job believes a shard that is in the journal and has the size written there; whatever else it finds is removed and
written again. The bytes are not read again for that: they were flushed before the line was written, and ``verify``
reads them.

What is left of *another* job, which another ratio or another model makes it, is removed with a remark: it costs disk
space and could be of use only to a command that the user replaced by this one.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import threading
from collections.abc import Iterable, Iterator
from typing import Any

from moeprune._files import PathLike, human_bytes, note
from moeprune.errors import ArtifactError, MoePruneError
from moeprune.rewrite.claims import Claim, claimed

SCHEMA = "moeprune.journal/1"
_FULL = {errno.ENOSPC, errno.EDQUOT}


def job_key(parts: Iterable[object]) -> str:
    """Identity of a job: everything that decides the bytes of the shards."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(f"{part}\n".encode())
    return digest.hexdigest()


class Journal:
    """The shards of a folder that are finished, each with its digests one after another; any thread may add to it.

    Attributes:
        folder: the hidden folder to fill.
        finished: digests by shard.
    """

    def __init__(self, claim: Claim) -> None:
        self.folder = claim.folder
        self.finished: dict[str, str] = {}
        self._claim = claim
        self._file = claim.journal
        self._lock = threading.Lock()

    def go_on(self, job: str) -> None:
        """Find what an earlier run of the same job has finished, and remove everything else."""
        lines, safe = _read(self._file.fileno())
        kept = lines[1:] if lines and lines[0] == {"schema": SCHEMA, "job": job} else []
        for line in kept:
            file = self.folder / line["shard"]
            if file.is_file() and file.stat().st_size == line["bytes"]:
                self.finished[line["shard"]] = line["digests"]
        if self.finished:
            note(f"going on after {_kept(self)}")
            self._file.truncate(safe)  # a kill may have cut the last line
            self._sweep()
        else:
            if self.folder.exists() and any(self.folder.iterdir()):
                note(f"removing what an earlier run left unfinished in {self.folder}")
            self._claim.clear()
            self._append({"schema": SCHEMA, "job": job})

    def add(self, shard: str, nbytes: int, digests: str) -> None:
        """Record that a shard is safe on the device."""
        with self._lock:
            self._append({"shard": shard, "bytes": nbytes, "digests": digests})
            self.finished[shard] = digests

    def _append(self, line: dict[str, Any]) -> None:
        self._file.write(json.dumps(line).encode() + b"\n")
        os.fsync(self._file.fileno())

    def _sweep(self) -> None:
        """Remove everything but the finished shards."""
        for path in self.folder.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            elif path.name not in self.finished:
                path.unlink()


def _read(descriptor: int) -> tuple[list[dict[str, Any]], int]:
    """The whole lines of a journal, and where they end."""
    with os.fdopen(os.dup(descriptor), "rb") as file:
        file.seek(0)
        lines, safe = [], 0
        for raw in file:
            try:
                line = json.loads(raw)
            except ValueError:
                break
            if not raw.endswith(b"\n") or not _known(line):
                break
            lines.append(line)
            safe += len(raw)
    return lines, safe


def _known(line: object) -> bool:
    """Whether a line is one that this version writes."""
    if not isinstance(line, dict):
        return False
    fields = {"shard": str, "bytes": int, "digests": str} if "shard" in line else {"job": str}
    return all(isinstance(line.get(name), kind) for name, kind in fields.items())


@contextlib.contextmanager
def resumable_folder(path: PathLike, job: str, *, overwrite: bool = False) -> Iterator[Journal]:
    """A folder to fill that takes its final name only when the block ends well.

    When the block fails after a shard was finished, the shards stay for a later run of the same job, unless the error
    says that the source or the plan is at fault; otherwise nothing stays. An existing folder stays until the end.

    Raises:
        ConfigError: another run is writing this folder, or it cannot be used.
        ArtifactError: the disk is full or broken; the hint says what is kept and how to go on.
    """
    with claimed(path, overwrite=overwrite) as claim:
        journal = Journal(claim)
        try:
            journal.go_on(job)
            yield journal
            claim.finish()
        except MoePruneError:
            shutil.rmtree(claim.folder, ignore_errors=True)
            raise
        except BaseException as error:
            kept = _kept(journal)
            if not kept:
                shutil.rmtree(claim.folder, ignore_errors=True)
            if isinstance(error, OSError):
                where = f": {error.filename}" if error.filename else ""
                why = f"cannot write {path}: {error.strerror or error}{where}"
                raise ArtifactError(why, _hint(error, kept)) from error
            if kept:
                note(f"the same command will go on after {kept}")
            raise


def _kept(journal: Journal) -> str:
    if not journal.finished:
        return ""
    nbytes = sum((journal.folder / name).stat().st_size for name in journal.finished)
    shards = f"{len(journal.finished)} finished shard{'s' * (len(journal.finished) != 1)}"
    return f"{shards} ({human_bytes(nbytes)}) in {journal.folder}"


def _hint(error: OSError, kept: str) -> str:
    room = "free some space" if error.errno in _FULL else ""
    if not kept:
        return f"{room or 'check the disk'} or choose another -o"
    return f"{room + ' and ' if room else ''}run the same command again: it goes on after {kept}"
