"""How much memory, disk and reading a layer-by-layer pass takes, and how it is arranged to fit what there is."""

from __future__ import annotations

import bisect
import dataclasses
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moeprune._files import human_bytes
from moeprune.errors import ConfigError
from moeprune.experts import slot_rows
from moeprune.streaming.skeleton import handed_on
from moeprune.streaming.weights import EMBEDDING, HEAD, Weights

if TYPE_CHECKING:
    import torch

SHARE = 0.9  # of what is free, where the user sets no limit
_STAGES = 4 << 26  # bytes of the buffers through which weights go to another device
_LIBRARIES = 160 << 20  # bytes that the libraries below keep once layers run on a CPU, mostly oneDNN's code


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Bytes that a pass may use above what the process holds when it starts.

    Attributes:
        host: of main memory.
        device: of the accelerator's memory; None where the model runs in main memory.
    """

    host: int
    device: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """What a pass will take at its peak, and how it is arranged.

    Attributes:
        host, device: bytes of memory, above the idle process.
        disk: bytes of states in files; read: bytes read from the checkpoint.
        spill: whether the states live in files.
        chunk: experts of a layer that are in memory at a time; chunked: whether those are not all.
        layer, states, work: bytes of the largest layer, of all states, and of a batch while it runs.
    """

    host: int
    device: int
    disk: int
    read: int
    spill: bool
    chunk: int
    chunked: bool
    layer: int
    states: int
    work: int

    def to_dict(self) -> dict[str, Any]:
        """For people and scripts."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        where = f", {human_bytes(self.device)} on the device" if self.device else ""
        disk = f", {human_bytes(self.disk)} of disk" if self.disk else ""
        return f"{human_bytes(self.host)} of memory{where}{disk}, {human_bytes(self.read)} to read"


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What goes through the layers.

    Attributes:
        shapes: rows and padded length of every batch.
        copies: how many hidden states each batch has: one for the model itself, one for every plan.
        last: the last decoder layer that runs.
        head: whether logits are wanted in the end.
        sums: bytes that are added up beside a layer.
        durable: whether the states are saved after layers.
    """

    shapes: Sequence[tuple[int, int]]
    copies: int = 1
    last: int
    head: bool = False
    sums: int = 0
    durable: bool = False


def forecast(weights: Weights, load: Load, limits: Limits) -> Forecast:
    """Arrange a pass so that it fits.

    Raises:
        ConfigError: it cannot fit.
    """
    sizes = _Sizes(weights, load)
    on_device = limits.device is not None
    chunk = sizes.chunk_that_fits(limits)
    layer, work = sizes.peak(chunk)
    running = layer + work
    host = (_STAGES + sizes.batch_state if on_device else running) + sizes.beside
    if host > limits.host:
        raise _too_little("what goes to the device passes through memory that", host, limits.host, "--memory")
    states = sizes.states
    spill = host + states > limits.host
    disk = states * (2 if spill else 2 * load.durable)
    return Forecast(
        host=host + (0 if spill else states),
        device=running if on_device else 0,
        disk=disk,
        read=sizes.read(chunk),
        spill=spill,
        chunk=chunk,
        chunked=chunk < sizes.num_experts,
        layer=layer,
        states=states,
        work=work,
    )


class _Sizes:
    """The sizes that a forecast is made of."""

    def __init__(self, weights: Weights, load: Load) -> None:
        self.weights = weights
        self.load = load
        config = weights.model.config.get_text_config()
        self.hidden = int(config.hidden_size)
        self.top_k = weights.checkpoint.top_k
        self.num_experts = weights.checkpoint.num_experts
        self.itemsize = weights.model.dtype.itemsize
        self.layers = range(load.last + 1)
        self.tokens = max((rows * length for rows, length in load.shapes), default=0)
        self.batch_state = self.tokens * self.hidden * self.itemsize
        per_token = self.hidden * self.itemsize
        self.states = load.copies * sum(
            rows * length * (per_token + handed_on(weights.model, length)) for rows, length in load.shapes
        )

    @property
    def beside(self) -> int:
        """What is in main memory beside weights and batches."""
        return self.load.sums + (_LIBRARIES if self.weights.device.type == "cpu" else 0)

    def peak(self, chunk: int) -> tuple[int, int]:
        """The largest sum of a layer in memory and a batch at work in it, as the two parts."""
        parts = [(self.weights.nbytes(EMBEDDING), self.batch_state)]
        parts += [(self._in_memory(layer, chunk), self._aside(layer, chunk)) for layer in self.layers]
        if self.load.head:
            parts.append((self.weights.nbytes(HEAD), self._logits()))
        return max(parts, key=sum)

    def _in_memory(self, layer: int, chunk: int) -> int:
        experts = self.weights.nbytes(layer, experts=True)
        return self.weights.nbytes(layer, experts=False) + experts * chunk // self.num_experts

    def chunk_that_fits(self, limits: Limits) -> int:
        """Experts at a time: all, or as many as there is room for."""
        on_device = limits.device is not None
        room = limits.device if limits.device is not None else limits.host - self.beside

        def takes(chunk: int) -> int:
            return sum(self.peak(chunk))

        if takes(self.num_experts) <= room:
            return self.num_experts
        chunk = bisect.bisect_right(range(1, self.num_experts), room, key=takes)
        if not chunk:
            needed = takes(1) + (0 if on_device else self.beside)
            option, given = ("--device-memory", room) if on_device else ("--memory", limits.host)
            raise _too_little("one layer with a single expert at a time", needed, given, option)
        return chunk

    def read(self, chunk: int) -> int:
        """Bytes read: experts that do not fit are read again for every batch.

        Whoever adds up reads them once more to check the first batch's output, and once for facts about weights.
        """
        batches = len(self.load.shapes) * self.load.copies + (2 if self.load.sums else 0)
        times = batches if chunk < self.num_experts else 1
        total = self.weights.stored_bytes(EMBEDDING) + (self.weights.stored_bytes(HEAD) if self.load.head else 0)
        for layer in self.layers:
            experts = self.weights.stored_bytes(layer, experts=True)
            total += self.weights.stored_bytes(layer, experts=False) + experts * times
        return total

    def _aside(self, layer: int, chunk: int) -> int:
        """Beside a layer: what it takes to fill it, then a batch, during which a chunk of experts is filled."""
        if chunk == self.num_experts:
            return max(self.weights.filling(layer), self._work(layer, chunk))
        filling = self.weights.filling(layer, experts=True)
        return max(self.weights.filling(layer, experts=False), self._work(layer, chunk) + filling)

    # --- a batch at work: what a decoder layer allocates, the larger of its two halves --------------------------------

    def _work(self, layer: int, chunk: int) -> int:
        stream = 3 * self.batch_state  # what came in, the residual and what goes out
        return int(stream + max(self._attention(layer), self._experts(layer, chunk)))

    def _attention(self, layer: int) -> int:
        outputs = sum(self.weights.output_width(piece) for piece in self.weights.pieces(layer, experts=False))
        padded = max((rows * length * length for rows, length in self.load.shapes), default=0)
        return int(self.tokens * outputs * self.itemsize + padded)

    def _experts(self, layer: int, chunk: int) -> int:
        inner = self.weights.expert_width(layer)
        if not inner:
            return 0
        rows = self.tokens * self.top_k
        if chunk == self.num_experts:
            rows = min(rows, slot_rows(self.hidden, self.num_experts, self.weights.device.type))
        return int(rows * (4 * self.hidden + 3 * inner) * self.itemsize + rows * self.hidden * 4)

    def _logits(self) -> int:
        config = self.weights.model.config.get_text_config()
        return min(self.tokens, 1024) * int(config.vocab_size) * 4 * 4


def _too_little(what: str, needed: int, given: int, option: str) -> ConfigError:
    step = 10 ** max(0, len(str(needed)) - 2)
    enough = -(-needed // step) * step  # so that what people read is not less than what is needed
    return ConfigError(
        f"{what} takes {human_bytes(enough)}, and there are {human_bytes(given)}",
        f"raise {option}, or run smaller batches with --batch-tokens",
    )


def free_memory(device: torch.device) -> Limits:
    """What is free now on this machine and, where it is an accelerator, on the device."""
    import psutil
    import torch

    host = int(min(psutil.virtual_memory().available, *_container_limits()) * SHARE)
    if device.type != "cuda":
        return Limits(host=host)
    free, _ = torch.cuda.mem_get_info(device)
    return Limits(host=host, device=int(free * SHARE))


def _container_limits() -> list[int]:
    """Memory that a container still allows, by either version of Linux' control groups."""
    found = [1 << 62]
    for limit, used in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        try:
            numbers = [int(Path(file).read_text(encoding="ascii")) for file in (limit, used)]
        except (OSError, ValueError):  # no such version, or "max"
            continue
        found.append(numbers[0] - min(numbers[1], _anonymous()))
    return found


def _anonymous() -> int:
    """Bytes that this process holds; a control group also counts files that the system may forget at any time."""
    import psutil

    return int(psutil.Process(os.getpid()).memory_info().rss)
