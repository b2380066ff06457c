"""Read byte ranges of source files and hash them by tensor, through one small buffer; write them on the way or not.

The buffer fits the processor's cache, so that hashing what was just read and writing it costs next to nothing on top of
a plain copy. ``copy_file_range`` needs a second read for the digest and is slower on a local disk, where it shares no
blocks either (tensors do not lie at block boundaries); on a network file system it keeps the bytes on the server.
"""

from __future__ import annotations

import errno
import itertools
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TypeVar

import xxhash

from moeprune.errors import CheckpointError

DIGEST = 32  # characters of a digest
_BUFFER = 256 << 10
_STEP = 64 << 20  # bytes that the system is asked to copy at once
_ON_SERVER = {"nfs4", "cifs", "smb3", "ceph"}  # file systems whose servers copy without sending the bytes around
_CANNOT = {errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM, errno.EBADF, errno.ETXTBSY}

THREADS = min(4, os.cpu_count() or 1)
T = TypeVar("T")
R = TypeVar("R")
Sink = Callable[[memoryview], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """A range of bytes of a source file."""

    file: Path
    begin: int
    end: int


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputTensor:
    """A tensor of the output: its bytes are the segments one after another."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    segments: tuple[Segment, ...]

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return sum(segment.end - segment.begin for segment in self.segments)


class _Stopped(Exception):  # noqa: N818
    """Another thread failed, so that this one need not go on."""


def in_threads(work: Callable[[T, Reader], R], items: Iterable[T]) -> Iterator[R]:
    """Do some work on every item, several at a time and each with a reader; the first error stops all of it.

    Items are taken from their iterator only when a thread is free, and results come in the order they are ready.
    """
    stop, left = threading.Event(), iter(items)
    with ThreadPoolExecutor(THREADS) as pool:

        def started(count: int) -> set[Future[R]]:
            return {pool.submit(_with_reader, work, item, stop) for item in itertools.islice(left, count)}

        try:
            running = started(THREADS)
            while running:
                done, running = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    yield future.result()
                running |= started(len(done))
        finally:
            stop.set()


def _with_reader(work: Callable[[T, Reader], R], item: T, stop: threading.Event) -> R:
    with Reader(stop) as reader:
        return work(item, reader)


def joined(tensors: Iterable[OutputTensor]) -> Iterator[Segment]:
    """The ranges of the tensors one after another, neighbours made one."""
    last: Segment | None = None
    for tensor in tensors:
        for segment in tensor.segments:
            if last is not None and segment.file == last.file and segment.begin == last.end:
                last = Segment(file=last.file, begin=last.begin, end=segment.end)
                continue
            if last is not None:
                yield last
            last = segment
    if last is not None:
        yield last


class Reader:
    """Reads ranges of source files into a buffer that is used again and again; one thread's own."""

    def __init__(self, stop: threading.Event) -> None:
        self._stop = stop
        self._buffer = memoryview(bytearray(_BUFFER))
        self._file: IO[bytes] | None = None
        self._path: Path | None = None

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()

    def digests(self, tensors: Iterable[OutputTensor], write: Sink | None = None) -> Iterator[str]:
        """The xxh3-128 digest of each tensor; ``write`` gets all bytes in order, each piece before it is used again."""
        held = list(tensors)
        chunks, chunk = self._chunks(joined(held)), memoryview(b"")
        for tensor in held:
            digest, left = xxhash.xxh3_128(), tensor.nbytes
            while left:
                if not chunk:
                    chunk = next(chunks)
                    if write is not None:
                        write(chunk)
                part, chunk = chunk[:left], chunk[left:]
                digest.update(part)
                left -= len(part)
            yield digest.hexdigest()

    def copy_within(self, tensors: Iterable[OutputTensor], out: IO[bytes], done: Callable[[int], None]) -> bool:
        """Let the system copy the tensors to the end of ``out``; false, and nothing is written, where it cannot."""
        begin = out.tell()
        try:
            for segment in joined(tensors):
                _copy_range(self._open(segment.file), out, segment, self._check, done)
        except OSError as error:
            if error.errno not in _CANNOT:
                raise
            done(begin - out.tell())
            out.seek(begin)
            out.truncate()
            return False
        return True

    def _chunks(self, segments: Iterable[Segment]) -> Iterator[memoryview]:
        """Bytes of the segments, a full buffer at a time; each chunk is valid until the next one is asked for."""
        filled = 0
        for segment in segments:
            file, left = self._open(segment.file), segment.end - segment.begin
            file.seek(segment.begin)
            while left:
                count = file.readinto(self._buffer[filled : filled + left])  # type: ignore[attr-defined]
                if not count:
                    raise _ended(segment.file)
                filled, left = filled + count, left - count
                if filled == len(self._buffer):
                    self._check()
                    yield self._buffer
                    filled = 0
        if filled:
            yield self._buffer[:filled]

    def _open(self, path: Path) -> IO[bytes]:
        """The source file, kept open until another one is read: a checkpoint may have hundreds."""
        if self._file is None or path != self._path:
            if self._file is not None:
                self._file.close()
            self._file, self._path = path.open("rb", buffering=0), path
        return self._file

    def _check(self) -> None:
        if self._stop.is_set():
            raise _Stopped


def _copy_range(
    source: IO[bytes], out: IO[bytes], segment: Segment, check: Callable[[], None], done: Callable[[int], None]
) -> None:
    position = segment.begin
    while position < segment.end:
        check()
        count = os.copy_file_range(source.fileno(), out.fileno(), min(_STEP, segment.end - position), position)
        if not count:
            raise _ended(segment.file)
        position += count
        done(count)


def _ended(file: Path) -> CheckpointError:
    return CheckpointError(f"{file} ended early", "it changed while it was read")


def begin_flush(out: IO[bytes], begin: int, end: int) -> None:
    """Let the system send a range to the device in the background, so that the last fsync has little left to do."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(out.fileno(), begin, end - begin, os.POSIX_FADV_DONTNEED)


def copied_on_server(source: Path, target: Path) -> bool:
    """Whether both folders lie on one network file system whose server copies by itself."""
    device = source.stat().st_dev
    if not hasattr(os, "copy_file_range") or device != target.stat().st_dev:
        return False
    number = f"{os.major(device)}:{os.minor(device)}"
    try:
        mounts = Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return False
    kinds = {line.split(" - ")[1].split()[0] for line in mounts if line.split()[2] == number}
    return bool(kinds & _ON_SERVER)
