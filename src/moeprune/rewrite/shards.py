"""Lay tensors out over safetensors files and write them, several files at a time."""

from __future__ import annotations

import itertools
import os
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from moeprune._files import byte_bar, json_pieces, safetensors_header, sync_path
from moeprune.checkpoint import INDEX, SINGLE, check_inside
from moeprune.errors import CheckpointError
from moeprune.rewrite.copying import DIGEST, OutputTensor, Reader, begin_flush, copied_on_server, in_threads
from moeprune.rewrite.journal import Journal

_FLUSH = 8 << 20  # bytes after which the device is put to work
# Weights in other formats and their indexes: stale once experts are gone.
_WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".gguf", ".onnx", ".onnx_data", ".h5", ".msgpack", ".ckpt"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """A file of the output: how many tensors it holds, and the bytes of these."""

    name: str
    count: int
    nbytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Which tensors go into which file. The tensors themselves are made again whenever they are needed.

    Attributes:
        tensors: every tensor in order, each time it is iterated over.
        shards: the files in order.
    """

    tensors: Iterable[OutputTensor]
    shards: tuple[Shard, ...]

    @property
    def count(self) -> int:
        """Number of tensors."""
        return sum(shard.count for shard in self.shards)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(shard.nbytes for shard in self.shards)

    def filled(self) -> Iterator[tuple[Shard, list[OutputTensor]]]:
        """Each file with its tensors."""
        tensors = iter(self.tensors)
        for shard in self.shards:
            yield shard, list(itertools.islice(tensors, shard.count))


class Remade(Iterable[OutputTensor]):
    """Tensors that are made each time they are iterated over, instead of held."""

    def __init__(self, make: Callable[[], Iterator[OutputTensor]]) -> None:
        self._make = make

    def __iter__(self) -> Iterator[OutputTensor]:
        return self._make()


def lay_out(tensors: Iterable[OutputTensor], max_shard_size: int) -> Layout:
    """Fill files in order; a tensor larger than a file gets one of its own.

    Args:
        tensors: something that can be iterated over again and again.
        max_shard_size: bytes of tensors per file.
    """
    sizes: list[tuple[int, int]] = []
    count = size = 0
    for tensor in tensors:
        if count and size + tensor.nbytes > max_shard_size:
            sizes.append((count, size))
            count = size = 0
        count, size = count + 1, size + tensor.nbytes
    sizes.append((count, size))
    shards = (
        Shard(name=_shard_name(number, len(sizes)), count=count, nbytes=size)
        for number, (count, size) in enumerate(sizes, 1)
    )
    return Layout(tensors=tensors, shards=tuple(shards))


def _shard_name(number: int, total: int) -> str:
    return SINGLE if total == 1 else f"model-{number:05d}-of-{total:05d}.safetensors"


def write_shards(
    layout: Layout, folder: Path, metadata: Mapping[str, str], journal: Journal | None = None
) -> Iterator[tuple[OutputTensor, str]]:
    """Write ``model.safetensors``, or numbered shards and their index.

    Args:
        layout: what goes where.
        folder: where to; finished shards of an earlier run may lie there.
        metadata: the ``__metadata__`` strings of every file.
        journal: knows the finished shards, and is told of each new one.

    Returns:
        Every tensor in the order of the bytes, with its xxh3-128 digest.
    """
    digests = dict(journal.finished) if journal else {}
    done = sum(shard.nbytes for shard in layout.shards if shard.name in digests)
    with byte_bar("copying experts", layout.nbytes, done=done) as bar:
        writer = _Writer(folder, metadata or {"format": "pt"}, journal, bar.update)
        todo = (item for item in layout.filled() if item[0].name not in digests)
        digests |= dict(in_threads(writer.write, todo))
    if len(layout.shards) > 1:
        _write_index(layout, folder / INDEX)
    return _digested(layout, digests)


def _digested(layout: Layout, digests: Mapping[str, str]) -> Iterator[tuple[OutputTensor, str]]:
    for shard, tensors in layout.filled():
        text = digests[shard.name]
        for number, tensor in enumerate(tensors):
            yield tensor, text[number * DIGEST : (number + 1) * DIGEST]


class _Writer:
    """Writes shards, each under another name until it is safe on the device."""

    def __init__(
        self, folder: Path, metadata: Mapping[str, str], journal: Journal | None, progress: Callable[[int], object]
    ) -> None:
        self._folder = folder
        self._metadata = metadata
        self._journal = journal
        self._progress = progress
        self._lock = threading.Lock()

    def write(self, item: tuple[Shard, list[OutputTensor]], reader: Reader) -> tuple[str, str]:
        """Write one file; it gets its name, and the journal its line, when its bytes are on the device.

        Returns:
            The file's name, and the digests of its tensors one after another.
        """
        shard, tensors = item
        partial, target = self._folder / f".{shard.name}.part", self._folder / shard.name
        described = ((tensor.name, tensor.dtype, tensor.shape, tensor.nbytes) for tensor in tensors)
        try:
            with partial.open("wb", buffering=0) as out:
                _write_all(out, memoryview(safetensors_header(described, self._metadata)))
                digests = self._copy(tensors, reader, out)
                os.fsync(out.fileno())
                size = out.tell()
            os.rename(partial, target)
        except BaseException:
            partial.unlink(missing_ok=True)  # half a file is of no use, and the disk may be full
            raise
        sync_path(self._folder)
        if self._journal is not None:
            self._journal.add(shard.name, size, digests)
        return shard.name, digests

    def _copy(self, tensors: list[OutputTensor], reader: Reader, out: IO[bytes]) -> str:
        """Append the tensors' bytes, by the file server where it does that; gives their digests."""
        position = flushed = out.tell()

        def write(chunk: memoryview) -> None:
            nonlocal position, flushed
            _write_all(out, chunk)
            position += len(chunk)
            if position - flushed >= _FLUSH:
                begin_flush(out, flushed, position)
                flushed = position
            self._done(len(chunk))

        folders = {segment.file.parent for tensor in tensors for segment in tensor.segments}
        remote = all(copied_on_server(folder, self._folder) for folder in folders)
        copied = remote and reader.copy_within(tensors, out, self._done)
        return "".join(reader.digests(tensors, None if copied else write))

    def _done(self, nbytes: int) -> None:
        with self._lock:
            self._progress(nbytes)


def _write_all(out: IO[bytes], chunk: memoryview) -> None:
    while len(chunk):
        written = out.write(chunk)  # unbuffered: may take less than it was given
        chunk = chunk[written:]


def _write_index(layout: Layout, file: Path) -> None:
    rows = sorted((tensor.name, shard.name) for shard, tensors in layout.filled() for tensor in tensors)
    with file.open("w", encoding="utf-8") as out:
        out.writelines(json_pieces({"metadata": {"total_size": layout.nbytes}, "weight_map": iter(rows)}))


def other_files(source: Path) -> Iterator[Path]:
    """Files of a checkpoint that travel as they are: tokenizer, chat template, licence, remote code, pictures."""
    for path in sorted(source.rglob("*")):
        relative = path.relative_to(source)
        hidden = any(part.startswith(".") for part in relative.parts)
        ours = relative.parts[0] == "moeprune" or str(relative) == "config.json"
        if hidden or ours or _is_weight(path):
            continue
        if path.is_symlink() and not path.exists():
            raise CheckpointError(f"{path} links to a file that is not there", "download the checkpoint again")
        if path.is_file():
            check_inside(source, path)
            yield relative


def _is_weight(path: Path) -> bool:
    return path.suffix in _WEIGHTS or path.name.endswith((".safetensors.index.json", ".bin.index.json"))


def copy_other_files(source: Path, target: Path) -> None:
    """Copy the files that travel as they are, through links as the Hub's cache lays them."""
    for relative in other_files(source):
        (target / relative).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / relative, target / relative)
