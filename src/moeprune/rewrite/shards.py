"""Lay tensors out over safetensors files and copy their bytes, one buffer at a time."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import xxhash

from moeprune._files import byte_bar, safetensors_header, to_json
from moeprune.checkpoint import INDEX, SINGLE
from moeprune.errors import CheckpointError, ConfigError

_BUFFER = 8 << 20
# Weights in other formats and their indexes: stale once experts are gone.
_WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".gguf", ".onnx", ".onnx_data", ".h5", ".msgpack", ".ckpt"}


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Copied:
    """A tensor that was written, with the xxh3-128 digest of its bytes."""

    name: str
    nbytes: int
    digest: str


def parse_size(text: str) -> int:
    """Bytes of a size such as ``5GB`` or ``512MiB``.

    Raises:
        ConfigError: not a size.
    """
    units = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
    number = text.strip().rstrip("BKMGIbkmgi")
    unit = text.strip()[len(number) :].upper()
    try:
        size = int(float(number) * units[unit])
    except (KeyError, ValueError, OverflowError):
        raise ConfigError(f"{text!r} is not a size", "write it as 5GB or 512MiB") from None
    if size < 1:
        raise ConfigError(f"a shard of {text!r} holds nothing")
    return size


def assign_shards(tensors: Iterable[OutputTensor], max_shard_size: int) -> list[list[OutputTensor]]:
    """Fill shards in order; a tensor larger than a shard gets one of its own."""
    shards: list[list[OutputTensor]] = [[]]
    size = 0
    for tensor in tensors:
        if shards[-1] and size + tensor.nbytes > max_shard_size:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.nbytes
    return shards


def write_shards(
    tensors: Sequence[OutputTensor], folder: Path, metadata: Mapping[str, str], max_shard_size: int
) -> list[Copied]:
    """Write ``model.safetensors``, or numbered shards and their index.

    Returns:
        What was written, in the order of the bytes.
    """
    shards = assign_shards(tensors, max_shard_size)
    names = [SINGLE] if len(shards) == 1 else [_shard_name(number, len(shards)) for number in range(1, len(shards) + 1)]
    copied: list[Copied] = []
    with byte_bar("copying experts", sum(tensor.nbytes for tensor in tensors)) as bar:
        for name, shard in zip(names, shards, strict=True):
            for item in _write_shard(shard, folder / name, metadata or {"format": "pt"}):
                copied.append(item)
                bar.update(item.nbytes)
    if len(shards) > 1:
        weight_map = {tensor.name: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
        index = {
            "metadata": {"total_size": sum(item.nbytes for item in copied)},
            "weight_map": dict(sorted(weight_map.items())),
        }
        (folder / INDEX).write_text(to_json(index), encoding="utf-8")
    return copied


def _shard_name(number: int, total: int) -> str:
    return f"model-{number:05d}-of-{total:05d}.safetensors"


def _write_shard(tensors: Sequence[OutputTensor], target: Path, metadata: Mapping[str, str]) -> Iterator[Copied]:
    described = ((tensor.name, tensor.dtype, tensor.shape, tensor.nbytes) for tensor in tensors)
    largest = max((segment.end - segment.begin for tensor in tensors for segment in tensor.segments), default=0)
    with target.open("xb", buffering=0) as out, _Sources(largest) as sources:
        _write_all(out, memoryview(safetensors_header(described, metadata)))
        for tensor in tensors:
            digest = xxhash.xxh3_128()
            for chunk in sources.chunks(tensor.segments):
                digest.update(chunk)
                _write_all(out, chunk)
            yield Copied(name=tensor.name, nbytes=tensor.nbytes, digest=digest.hexdigest())
        os.fsync(out.fileno())


def _write_all(out: IO[bytes], chunk: memoryview) -> None:
    while len(chunk):
        written = out.write(chunk)  # unbuffered: may take less than it was given
        chunk = chunk[written:]


class _Sources:
    """Source files that stay open while their bytes are read into one reused buffer."""

    def __init__(self, largest: int) -> None:
        self._files: dict[Path, IO[bytes]] = {}
        self._buffer = memoryview(bytearray(min(largest, _BUFFER)))

    def __enter__(self) -> _Sources:
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._files.values():
            file.close()

    def chunks(self, segments: Iterable[Segment]) -> Iterator[memoryview]:
        """Bytes of the segments; each chunk is valid until the next one is asked for."""
        for segment in segments:
            if segment.file not in self._files:
                self._files[segment.file] = segment.file.open("rb", buffering=0)
            file = self._files[segment.file]
            file.seek(segment.begin)
            left = segment.end - segment.begin
            while left:
                count = file.readinto(self._buffer[:left])  # type: ignore[attr-defined]
                if not count:
                    raise CheckpointError(f"{segment.file} ended early", "it changed while it was read")
                left -= count
                yield self._buffer[:count]


def tensor_digest(segments: Sequence[Segment]) -> str:
    """xxh3-128 of the bytes of some segments."""
    digest = xxhash.xxh3_128()
    with _Sources(max((segment.end - segment.begin for segment in segments), default=0)) as sources:
        for chunk in sources.chunks(segments):
            digest.update(chunk)
    return digest.hexdigest()


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
            yield relative


def _is_weight(path: Path) -> bool:
    return path.suffix in _WEIGHTS or path.name.endswith((".safetensors.index.json", ".bin.index.json"))


def copy_other_files(source: Path, target: Path) -> None:
    """Copy the files that travel as they are, through links as the Hub's cache lays them."""
    for relative in other_files(source):
        (target / relative).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / relative, target / relative)
