"""Headers of safetensors files: where the bytes of each tensor lie. Files are not trusted; no tensor is decoded."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moeprune._files import parse_json
from moeprune.errors import CheckpointError

_MAX_HEADER = 100_000_000  # the limit of the safetensors library itself
# Bits of an element. A type that is not here is copied all the same, its size is just not checked.
_BITS = {
    **dict.fromkeys(("F4",), 4),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 16),
    **dict.fromkeys(("I32", "U32", "F32"), 32),
    **dict.fromkeys(("I64", "U64", "F64", "C64"), 64),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorEntry:
    """Where one tensor's bytes lie: ``file[begin:end]``."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    begin: int
    end: int

    @property
    def nbytes(self) -> int:
        """Size of the tensor in bytes."""
        return self.end - self.begin

    @property
    def numel(self) -> int:
        """Number of stored elements."""
        count = 1
        for size in self.shape:
            count *= size
        return count


def read_header(file: Path) -> tuple[list[TensorEntry], dict[str, str]]:
    """Read one safetensors header.

    Returns:
        The tensors in the order of their bytes, and the ``__metadata__`` strings.

    Raises:
        CheckpointError: the header or an offset does not fit the file.
    """
    size = file.stat().st_size
    with file.open("rb") as handle:
        length = int.from_bytes(handle.read(8), "little")
        if size < 8 or length > min(size - 8, _MAX_HEADER):
            raise CheckpointError(f"{file} is not a safetensors file, or is cut short")
        header = parse_json(handle.read(length), file, shrink=_place)
    metadata = header.pop("__metadata__", {}) if isinstance(header, dict) else None
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(f"{file} has a damaged header")
    base = 8 + length
    entries = [_entry(file, name, header.pop(name), base) for name in list(header)]
    entries.sort(key=lambda entry: (entry.begin, entry.end))
    position = base
    for entry in entries:
        if entry.begin != position:
            raise CheckpointError(f"{file}: the bytes of tensor {entry.name!r} overlap or leave a gap")
        position = entry.end
    if position != size:
        raise CheckpointError(f"{file} has {size} bytes, its header describes {position}", "download it again")
    return entries, metadata


def _place(value: dict[str, Any]) -> Any:
    """A tensor's entry as a tuple, which is a fifth of the size; anything else as it is."""
    if value.keys() >= {"dtype", "shape", "data_offsets"} and isinstance(value["shape"], list):
        return value["dtype"], tuple(value["shape"]), value["data_offsets"]
    return value


def _entry(file: Path, name: str, value: Any, base: int) -> TensorEntry:
    try:
        dtype, shape, (begin, end) = value if isinstance(value, tuple) else ()
    except (TypeError, ValueError):
        begin, end, shape, dtype = -1, -1, (), None
    numbers = (begin, end, *shape)
    if not isinstance(dtype, str) or not all(type(number) is int and number >= 0 for number in numbers) or begin > end:
        raise CheckpointError(f"{file}: the header entry of tensor {name!r} is damaged")
    dtype = sys.intern(dtype)  # one string for 100,000 tensors
    entry = TensorEntry(name=name, dtype=dtype, shape=shape, file=file, begin=base + begin, end=base + end)
    if dtype in _BITS and entry.numel * _BITS[dtype] != 8 * entry.nbytes:
        raise CheckpointError(f"{file}: tensor {name!r}, {dtype} {list(shape)}, cannot have {entry.nbytes} bytes")
    return entry
