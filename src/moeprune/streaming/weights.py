"""Weights from safetensors files into the parameters of a skeleton, one decoder layer at a time.

A parameter is allocated once and filled in place by reads of its pieces, so that a layer never exists twice; the next
layer takes over the memory of the last one. Files are read, not mapped: what a process holds is what it allocated.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import math
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moeprune.checkpoint import Checkpoint
from moeprune.errors import CheckpointError
from moeprune.experts import expert_layers
from moeprune.headers import TensorEntry
from moeprune.streaming.naming import Piece, kept_in_float32, pieces_of
from moeprune.streaming.quantised import Scheme, scheme_of

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

EMBEDDING, HEAD = -1, -2  # beside the decoder layers: what stands before them, and the last norm and the head
_STAGE = 1 << 26  # bytes that are read at a time where they are then converted or sent to a device
_READERS = 4
_DECODED = 4  # bytes of a number while it is decoded
_ADVICE = 1 << 17  # bytes: of a longer range Linux reads ahead only as much as the disk's read-ahead, by default this


def _readers() -> int:
    return min(_READERS, os.cpu_count() or 1)


class Weights:
    """Fills and empties the parts of a skeleton."""

    def __init__(self, checkpoint: Checkpoint, model: PreTrainedModel, device: torch.device) -> None:
        self.checkpoint = checkpoint
        self.model = model
        self.device = device
        self.scheme = scheme_of(checkpoint.config)
        depth = checkpoint.spec.depth(checkpoint.config)
        modules = {layer.experts: layer.index for layer in expert_layers(model)}
        self.experts = {modules[module]: name for name, module in model.named_modules() if module in modules}
        self.depth = depth
        self._pieces = _with_ends(model, pieces_of(checkpoint, model, self.experts, self.scheme, depth=depth))
        self._dtypes = self._planned_dtypes()
        # By the name that each has now: layers change their places in the model while one of them runs.
        self._owners = {name: model.get_submodule(name.rpartition(".")[0]) for name in self._dtypes}
        self._free: dict[tuple[Any, ...], list[torch.Tensor]] = {}
        self._move_buffers()

    def _planned_dtypes(self) -> dict[str, torch.dtype]:
        import torch

        keeps = kept_in_float32(self.model, self.model.dtype)
        named = [*self.model.named_parameters(remove_duplicate=False), *self.model.named_buffers()]
        return {name: torch.float32 if keeps(name) else value.dtype for name, value in named}

    def _move_buffers(self) -> None:
        """Buffers are small and stay."""
        for name, value in self.model.named_buffers():
            self._place(name, value.to(self.device))

    # --- sizes --------------------------------------------------------------------------------------------------------

    def pieces(self, layer: int, *, experts: bool | None = None) -> list[Piece]:
        """What fills a layer; only the weights of single experts, or all others, where asked."""
        pieces = self._pieces[layer]
        return pieces if experts is None else [piece for piece in pieces if _of_experts(piece) == experts]

    def nbytes(self, layer: int, *, experts: bool | None = None) -> int:
        """Bytes that the parameters of a layer take in memory."""
        names = {piece.parameter for piece in self.pieces(layer, experts=experts)}
        return sum(self._size(name) for name in names)

    def stored_bytes(self, layer: int, *, experts: bool | None = None) -> int:
        """Bytes that are read for a layer."""
        pieces = self.pieces(layer, experts=experts)
        return sum(entry.nbytes for piece in pieces for entry in piece.stored.values())

    def filling(self, layer: int, *, experts: bool | None = None) -> int:
        """Bytes that it takes meanwhile to fill a layer: what each reader converts or decodes at a time."""
        aside = sorted(map(self._converted, self.pieces(layer, experts=experts)), reverse=True)
        return sum(aside[: _readers()])

    def _converted(self, piece: Piece) -> int:
        """Bytes beside a parameter while one of its pieces is filled."""
        dtype, rows = self._dtypes[piece.parameter], self._value(piece.parameter).shape[0] if piece.stacked else 1
        stored = sum(entry.nbytes for entry in piece.stored.values()) // rows
        if "" not in piece.stored:
            shapes = {role: entry.shape for role, entry in piece.stored.items()}
            numbers = math.prod(self.scheme.shape(shapes)) // rows  # type: ignore[union-attr]
            return stored + numbers * (_DECODED + dtype.itemsize)
        same = torch_dtypes().get(piece.stored[""].dtype) == dtype
        return 0 if same and self.device.type == "cpu" else min(_STAGE, stored)

    def output_width(self, piece: Piece) -> int:
        """Numbers that a matrix gives for a token; 0 for what is no matrix."""
        shape = self._value(piece.parameter).shape
        return int(shape[0]) if len(shape) == 2 else 0

    def expert_width(self, layer: int) -> int:
        """Inner size of a layer's experts; 0 where it has none."""
        names = {piece.parameter for piece in self.pieces(layer, experts=True)}
        sizes = {int(size) for name in names for size in self._value(name).shape[1:]}
        return min(sizes - {self.model.config.get_text_config().hidden_size}, default=0)

    def _size(self, name: str) -> int:
        return self._value(name).numel() * self._dtypes[name].itemsize

    def _value(self, name: str) -> torch.Tensor:
        value: torch.Tensor = self._holder(name)[name.rpartition(".")[2]]
        return value

    def _holder(self, name: str) -> dict[str, Any]:
        """The dictionary of a module that holds the parameter or buffer; setattr would refuse another device."""
        owner = self._owners[name]
        held: dict[str, Any] = owner._buffers if self._is_buffer(name) else owner._parameters  # noqa: SLF001
        return held

    def _is_buffer(self, name: str) -> bool:
        return name.rpartition(".")[2] in self._owners[name]._buffers  # noqa: SLF001

    # --- filling ------------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def loaded(self, layer: int, *, experts: bool | None = None) -> Iterator[None]:
        """Fill a layer inside the block; its memory is kept for the next layer that has the same shapes.

        Args:
            layer: decoder layer, :data:`EMBEDDING` or :data:`HEAD`.
            experts: only the weights of single experts, or only all others.

        Raises:
            CheckpointError: a file cannot be read; the message names it.
        """
        pieces = self.pieces(layer, experts=experts)
        names = sorted({piece.parameter for piece in pieces})
        self._drop_misfits(names)
        try:
            for name in names:
                self._place(name, self._allocate(name))
            self._fill([(self._value(piece.parameter), piece, None) for piece in pieces])
            yield
        finally:
            for name in names:
                self._recycle(name)

    def load_experts(self, layer: int, experts: range) -> dict[str, torch.Tensor]:
        """Some experts of a layer, by the name of the parameter inside the experts module: ``[experts, ...]`` each."""
        import torch

        if self.device.type == "cpu":
            trim_heap()  # of the experts before, which have been freed
        chunk: dict[str, torch.Tensor] = {}
        jobs = []
        for piece in self.pieces(layer, experts=True):
            if piece.expert is not None and piece.expert not in experts:
                continue
            name = piece.parameter.rpartition(".")[2]
            if name not in chunk:
                shape = (len(experts), *self._value(piece.parameter).shape[1:])
                chunk[name] = torch.empty(shape, dtype=self._dtypes[piece.parameter], device=self.device)
            jobs.append((chunk[name], piece, experts))
        self._fill(jobs)
        return chunk

    def announce(self, layer: int) -> None:
        """Ask the system to read a layer's bytes into its cache meanwhile; the process itself holds none of them."""
        ranges = _runs(entry for piece in self._pieces[layer] for entry in piece.stored.values())
        threading.Thread(target=_advise, args=(ranges,), daemon=True).start()

    def _fill(self, jobs: Sequence[tuple[torch.Tensor, Piece, range | None]]) -> None:
        import torch

        def fill(job: tuple[torch.Tensor, Piece, range | None]) -> None:
            with torch.inference_mode():  # which is a thread's own
                filler.fill(*job)

        with _Files() as files, ThreadPoolExecutor(_readers()) as pool:
            filler = _Filler(files, self.scheme)
            list(pool.map(fill, jobs))

    def _allocate(self, name: str) -> torch.Tensor:
        import torch

        key = self._key(name)
        if self._free.get(key):
            return self._free[key].pop()
        return torch.empty(self._value(name).shape, dtype=self._dtypes[name], device=self.device)

    def _key(self, name: str) -> tuple[Any, ...]:
        return (name.rpartition(".")[2], tuple(self._value(name).shape), self._dtypes[name])

    def _drop_misfits(self, names: Sequence[str]) -> None:
        """Give back memory that the coming layer cannot use, before it allocates any."""
        keys = {self._key(name) for name in names}
        self._free = {key: tensors for key, tensors in self._free.items() if key in keys}

    def _recycle(self, name: str) -> None:
        value = self._value(name)
        if not value.is_meta and not self._is_buffer(name):
            self._free.setdefault(self._key(name), []).append(value.detach())
            self._place(name, value.detach().to("meta"))

    def _place(self, name: str, value: torch.Tensor) -> None:
        import torch

        parameter = value if self._is_buffer(name) else torch.nn.Parameter(value, requires_grad=False)
        self._holder(name)[name.rpartition(".")[2]] = parameter


def _with_ends(model: PreTrainedModel, pieces: dict[int, list[Piece]]) -> dict[int, list[Piece]]:
    """What lies outside of the layers by whether it is the embedding; a head that is tied to it is filled likewise."""
    outside = pieces.pop(-1)
    embedding = model.get_input_embeddings()
    name = next(name for name, module in model.named_modules() if module is embedding)
    before = [piece for piece in outside if piece.parameter.startswith(f"{name}.")]
    filled = {piece.parameter for piece in outside}
    tied = {
        head: source
        for head, source in (getattr(model, "all_tied_weights_keys", None) or {}).items()
        if head not in filled
    }
    copies = [
        dataclasses.replace(piece, parameter=head)
        for head, source in tied.items()
        for piece in outside
        if piece.parameter == source
    ]
    return pieces | {EMBEDDING: before, HEAD: [piece for piece in outside if piece not in before] + copies}


def trim_heap() -> None:
    """Give freed memory back to the system, where the C library has a way to."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def _of_experts(piece: Piece) -> bool:
    return piece.expert is not None or piece.stacked


# --- reading --------------------------------------------------------------------------------------------------------


class _Files:
    """Open files, shared by the threads that read."""

    def __init__(self) -> None:
        self._open: dict[Path, int] = {}
        self._lock = threading.Lock()

    def __enter__(self) -> _Files:
        return self

    def __exit__(self, *_: object) -> None:
        for descriptor in self._open.values():
            os.close(descriptor)

    def read(self, file: Path, position: int, into: memoryview) -> None:
        """Fill a buffer with the bytes of a file from a position on.

        Raises:
            CheckpointError: the file cannot be read, or is shorter than its header said.
        """
        try:
            with self._lock:
                if file not in self._open:
                    self._open[file] = os.open(file, os.O_RDONLY)
            done = 0
            while done < len(into):
                count = os.preadv(self._open[file], [into[done:]], position + done)
                if count == 0:
                    raise CheckpointError(f"{file} is shorter than its header says", "download it again")
                done += count
        except OSError as error:
            raise CheckpointError(f"cannot read {file}: {error.strerror}") from error


class _Filler:
    """Reads pieces into parameters, a bounded number of bytes at a time."""

    def __init__(self, files: _Files, scheme: Scheme | None) -> None:
        self._files = files
        self._scheme = scheme

    def fill(self, parameter: torch.Tensor, piece: Piece, experts: range | None) -> None:
        """Fill the piece's place in a parameter, or in the rows of it that hold the experts of a chunk."""
        first = experts.start if experts is not None else 0
        if piece.expert is not None:
            self._read(self._expert_rows(parameter[piece.expert - first], piece), piece.stored, None)
        elif piece.stacked:
            for row in range(len(parameter)):
                self._read(parameter[row], piece.stored, first + row)
        else:
            self._read(parameter, piece.stored, None)

    def _expert_rows(self, rows: torch.Tensor, piece: Piece) -> torch.Tensor:
        shapes = {role: entry.shape for role, entry in piece.stored.items()}
        height = shapes[""][0] if "" in shapes else self._scheme.shape(shapes)[0]  # type: ignore[union-attr]
        return rows.narrow(0, piece.part * height, height)

    def _read(self, into: torch.Tensor, stored: Mapping[str, TensorEntry], row: int | None) -> None:
        """Read a weight, or one row of its first axis, into a tensor of the same shape."""
        if "" not in stored:
            parts = {role: self._whole(entry, row, into.device) for role, entry in stored.items()}
            into.copy_(self._scheme.decode(parts, into.dtype).reshape(into.shape))  # type: ignore[union-attr]
            return
        entry = stored[""]
        dtype = torch_dtypes().get(entry.dtype)
        if dtype is None or not dtype.is_floating_point or dtype.itemsize < 2:
            raise CheckpointError(f"tensor {entry.name!r} is stored as {entry.dtype} and has no scales")
        begin = entry.begin + (0 if row is None else row * into.numel() * dtype.itemsize)
        wanted = tuple(into.shape) if row is None else (entry.shape[0], *into.shape)
        if entry.shape != wanted:
            raise CheckpointError(f"tensor {entry.name!r} of shape {list(entry.shape)} does not fit the model")
        if dtype == into.dtype and into.device.type == "cpu" and into.is_contiguous():
            self._files.read(entry.file, begin, _bytes_of(into))
        else:
            self._read_staged(into, entry, begin, dtype)

    def _read_staged(self, into: torch.Tensor, entry: TensorEntry, begin: int, dtype: torch.dtype) -> None:
        flat = into.view(-1)
        step = _STAGE // dtype.itemsize
        for start in range(0, flat.numel(), step):
            some = _staging((min(step, flat.numel() - start),), dtype, into.device)
            self._files.read(entry.file, begin + start * dtype.itemsize, _bytes_of(some))
            flat[start : start + some.numel()].copy_(some)

    def _whole(self, entry: TensorEntry, row: int | None, device: torch.device) -> torch.Tensor:
        shape = entry.shape if row is None else entry.shape[1:]
        value = _staging(shape, torch_dtypes()[entry.dtype], device)
        size = value.numel() * value.itemsize
        self._files.read(entry.file, entry.begin + (0 if row is None else row * size), _bytes_of(value))
        return value.to(device)


def _staging(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Main memory for what goes to a device; page-locked for a GPU, which then fetches it several times faster."""
    import torch

    return torch.empty(tuple(shape), dtype=dtype, pin_memory=device.type == "cuda")


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    import torch

    return tensor.reshape(-1).view(torch.uint8).numpy().data


def torch_dtypes() -> dict[str, torch.dtype]:
    """Dtypes of torch by their names in safetensors files."""
    import torch

    names = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "BOOL": "bool", "U8": "uint8"}
    names |= {f"I{bits}": f"int{bits}" for bits in (8, 16, 32, 64)}
    names |= {"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu"}
    return {name: getattr(torch, dtype) for name, dtype in names.items() if hasattr(torch, dtype)}


def _runs(entries: Iterator[TensorEntry]) -> list[tuple[Path, int, int]]:
    """Byte ranges of files with neighbours joined: file, begin, size."""
    runs: list[tuple[Path, int, int]] = []
    for file, begin, end in sorted((entry.file, entry.begin, entry.end) for entry in entries):
        if runs and runs[-1][0] == file and runs[-1][1] + runs[-1][2] == begin:
            runs[-1] = (file, runs[-1][1], end - runs[-1][1])
        else:
            runs.append((file, begin, end - begin))
    return runs


def _advise(runs: Sequence[tuple[Path, int, int]]) -> None:
    if not hasattr(os, "posix_fadvise"):
        return
    for file, begin, size in runs:
        with contextlib.suppress(OSError):  # it is only advice: the read itself reports
            descriptor = os.open(file, os.O_RDONLY)
            try:
                for start in range(begin, begin + size, _ADVICE):
                    os.posix_fadvise(descriptor, start, _ADVICE, os.POSIX_FADV_WILLNEED)
            finally:
                os.close(descriptor)
