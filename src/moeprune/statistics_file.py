"""A statistics file as it lies on the disk: what its tensors are called, and how they are checked and read."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from moeprune._files import PathLike, parse_json
from moeprune.catalogue import find, known
from moeprune.errors import ArtifactError
from moeprune.headers import TensorEntry, read_header

AnyArray = NDArray[Any]


class Lazy(Mapping[str, AnyArray]):
    """Arrays by statistic that are made when they are asked for and not kept: all of them may not fit into memory."""

    def __init__(self, names: Iterable[str], make: Callable[[str], AnyArray]) -> None:
        self._names = tuple(names)
        self._make = make

    def __getitem__(self, name: str) -> AnyArray:
        if name not in self._names:
            raise KeyError(name)
        return self._make(name)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def decode(metadata: Mapping[str, str], path: PathLike, key: str, kind: type[Any]) -> Any:
    """A value of the header, which must be of a kind."""
    if key not in metadata:
        raise ArtifactError(f"{path} has no {key!r} in its header")
    value = parse_json(metadata[key], path)
    if type(value) is not kind:
        raise ArtifactError(f"{path} has a damaged {key!r} in its header")
    return value


def on_disk(name: str, array: AnyArray) -> AnyArray:
    """The array in the type that files have."""
    return np.ascontiguousarray(array, dtype="<i8" if known(name).integer else "<f8")


_DTYPES = {"I64": np.dtype("<i8"), "F64": np.dtype("<f8")}
_PARTS = ("layers", "first_half", "weights", "sequences")


def check_published(file: StatisticsFile, command: Mapping[str, Any], path: PathLike) -> None:
    """Refuse a file that was made with packages that are not there, by their names."""
    packages = dict(_packages(command))
    for key in file.entries:
        name = key.rpartition(".")[2]
        if name in packages and find(name) is None:
            raise ArtifactError(
                f"{path} holds {name!r}, a statistic of {packages[name]}, which is not installed",
                "install that package to read the file",
            )


def _packages(command: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Statistics that other packages measured, each with its package."""
    parts = command.get("of")
    for one in [command, *(parts if isinstance(parts, list) else [])]:
        found = one.get("plug_ins") if isinstance(one, dict) else None
        yield from found.items() if isinstance(found, dict) else ()


def open_file(path: Path) -> tuple[StatisticsFile, dict[str, str]]:
    """An opened statistics file and the strings of its header."""
    handle = path.open("rb")
    try:
        entries, metadata = read_header(path)
    except BaseException:
        handle.close()
        raise
    return StatisticsFile(handle, {entry.name: entry for entry in entries}), metadata


class StatisticsFile:
    """An open safetensors file of 8-byte numbers, read array by array.

    Not mapped into memory: what was read of a file of gigabytes would stay there, and count as the process's own.
    """

    def __init__(self, handle: BinaryIO, entries: Mapping[str, TensorEntry]) -> None:
        self._handle, self.entries = handle, entries

    def __del__(self) -> None:
        """Close the file with the last array that could be read from it."""
        self._handle.close()

    def array(self, key: str) -> AnyArray:
        """A new array, as it is stored.

        Raises:
            ArtifactError: the file is shorter than it was.
        """
        entry = self.entries[key]
        self._handle.seek(entry.begin)
        array = np.fromfile(self._handle, dtype=_DTYPES[entry.dtype], count=entry.numel)
        if array.size != entry.numel:
            raise ArtifactError(f"{entry.file} was cut short while it was read", "collect again")
        return array.reshape(entry.shape)


def stored_layers(
    file: StatisticsFile, domains: int, sizes: Mapping[str, int], path: PathLike
) -> dict[str, dict[int, Mapping[str, AnyArray]]]:
    """The layers by part of a file whose header says what it should."""
    names: dict[tuple[str, int], list[str]] = {}
    for key, stored in file.entries.items():
        part, layer, name = _read_key(key, path)
        statistic = known(name)
        free = {"S": stored.shape[0]} if stored.shape else {}
        try:
            expected = statistic.shape(sizes["E"], {**sizes, **free})
        except KeyError as error:
            raise ArtifactError(f"{path} has no size of the axis {error} in its header") from error
        expected = (domains, *expected) if statistic.by_domain else expected
        _check_stored(stored, key, expected, integer=statistic.integer, path=path)
        names.setdefault((part, layer), []).append(name)
    parts: dict[str, dict[int, Mapping[str, AnyArray]]] = {part: {} for part in _PARTS}
    for (part, layer), held in sorted(names.items()):
        parts[part][layer] = Lazy(held, functools.partial(_read, file, path, f"{part}.{layer}"))
    _check_parts(parts, path)
    return parts


def _read_key(key: str, path: PathLike) -> tuple[str, int, str]:
    """Part, layer and statistic of a tensor's name."""
    found = re.fullmatch(rf"({'|'.join(_PARTS)})\.(0|[1-9][0-9]{{0,8}})\.(\w+)", key)
    statistic = find(found[3]) if found else None
    homes = {"weights": "weights", "sequences": "sequences"}
    if found is None or statistic is None or (found[1] if found[1] in homes else "") != homes.get(statistic.point, ""):
        raise ArtifactError(
            f"{path} holds an unknown statistic {key!r}", "was it made by a newer version, or with another plug-in?"
        )
    return found[1], int(found[2]), found[3]


def _check_parts(parts: Mapping[str, Mapping[int, Mapping[str, AnyArray]]], path: PathLike) -> None:
    layers = parts["layers"]
    if not layers:
        raise ArtifactError(f"{path} holds no layers")
    for layer, arrays in parts["first_half"].items():
        if set(arrays) != set(layers.get(layer, ())):
            raise ArtifactError(f"{path}: the first half of layer {layer} does not hold the statistics of the whole")
    for part in ("weights", "sequences"):
        odd = sorted(parts[part].keys() - layers.keys())
        if odd:
            raise ArtifactError(f"{path} holds {part} of layer {odd[0]} and none of its sums")


def _check_stored(stored: TensorEntry, key: str, expected: tuple[int, ...], *, integer: bool, path: PathLike) -> None:
    if stored.shape != expected:
        raise ArtifactError(f"{path}: {key!r} should be of shape {expected}, it is {stored.shape}")
    if stored.dtype != ("I64" if integer else "F64"):
        raise ArtifactError(f"{path}: {key!r} should not be of type {stored.dtype}")


def _read(file: StatisticsFile, path: PathLike, prefix: str, name: str) -> AnyArray:
    array = file.array(f"{prefix}.{name}")
    if not np.isfinite(array).all():
        raise ArtifactError(f"{path}: {f'{prefix}.{name}'!r} holds numbers that are not finite")
    array.flags.writeable = False  # what is written into it would be lost
    return array
