"""One collection in many processes: ``accelerate launch -m moeprune collect ...`` or ``torchrun``.

Every process runs its share of the fixed list of batches through a model of its own, and the sums are added up in
process 0. Counts are integers and sums are added in the order of the processes, so that equal runs give equal bytes.
Only process 0 prints and writes.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from moeprune import _files
from moeprune.collectors.lifeline import lifeline, process_lost
from moeprune.errors import ConfigError, MoePruneError, first_line
from moeprune.statistics import AnyArray, LayerArrays, added

if TYPE_CHECKING:
    import torch

T = TypeVar("T")
_MEETINGS = itertools.count()
_MEETING = timedelta(minutes=10)  # for all processes to start
_WAITING = timedelta(hours=6)  # of the fastest for the slowest: those that died are noticed at once
_LAUNCH = "start the processes with `accelerate launch` or `torchrun`, or unset WORLD_SIZE"


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranks:
    """The place of this process among those of one run.

    Attributes:
        rank: its number; size: how many there are.
        local_rank: its number among those of this machine.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @property
    def first(self) -> bool:
        """Whether this is the process that prints and writes."""
        return self.rank == 0


ALONE = Ranks()


def from_environment() -> Ranks:
    """The place that a launcher gave to this process in RANK, WORLD_SIZE and LOCAL_RANK; alone without them.

    Raises:
        ConfigError: the numbers cannot be.
    """
    size = _number("WORLD_SIZE", 1)
    if size == 1:
        return ALONE
    rank = _number("RANK", -1)
    if not 0 <= rank < size:
        raise ConfigError(
            f"WORLD_SIZE is {size} and RANK is {os.environ.get('RANK', 'missing')}",
            _LAUNCH,
        )
    return Ranks(rank=rank, size=size, local_rank=_number("LOCAL_RANK", rank))


def _number(name: str, default: int) -> int:
    text = os.environ.get(name, "")
    if text and not text.isdecimal():
        raise ConfigError(f"{name} in the environment is {text!r}, which is no number", f"unset {name}")
    return int(text) if text else default


def refuse_many(command: str) -> None:
    """Refuse a command that would do everything once per process.

    Raises:
        ConfigError: a launcher started several processes.
    """
    size = from_environment().size
    if size > 1:
        raise ConfigError(
            f"{command} runs in one process, and WORLD_SIZE is {size}",
            "run `moeprune collect` in many processes, then plan and apply in one; or unset WORLD_SIZE",
        )


# --- the group --------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def process_group() -> Iterator[Ranks]:
    """Meet the other processes of the run for as long as the block runs.

    A process on its own meets nobody and loads no torch. In a training script that has a default group this is that
    group. Otherwise the processes find each other by MASTER_ADDR and MASTER_PORT, as a launcher sets them; then the
    death of one of them, or an error in one, ends the others with an error at once.

    Yields:
        The place of this process; all but the first are quiet inside the block.

    Raises:
        ConfigError: the environment is incomplete.
        MoePruneError: the processes cannot meet, or another one failed.
    """
    ranks = _joined()
    with contextlib.ExitStack() as undo:
        if ranks is None:
            ranks = from_environment()
            if ranks.size > 1:
                undo.enter_context(_meeting(ranks))
        if not ranks.first:
            undo.callback(_files.quiet.reset, _files.quiet.set(True))
        yield ranks


def _joined() -> Ranks | None:
    """The place in a group that was there before."""
    if "torch" not in sys.modules:
        return None
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_initialized()):
        return None
    rank = dist.get_rank()
    return Ranks(rank=rank, size=dist.get_world_size(), local_rank=_number("LOCAL_RANK", rank))


@contextlib.contextmanager
def _meeting(ranks: Ranks) -> Iterator[None]:
    """A group of our own, with a line that tells when one of it dies."""
    _check_address(ranks)
    import torch.distributed as dist
    from torch.distributed.rendezvous import rendezvous

    with contextlib.ExitStack() as undo:
        try:
            shared, _, _ = next(rendezvous("env://", ranks.rank, ranks.size, timeout=_MEETING))
            meeting = f"moeprune/{next(_MEETINGS)}"  # a launcher's store outlives the group
            store = dist.PrefixStore(meeting, shared)  # type: ignore[attr-defined]  # documented, not in __all__
            dist.init_process_group(_backend(), store=store, rank=ranks.rank, world_size=ranks.size, timeout=_WAITING)
            undo.callback(dist.destroy_process_group)
            line = lifeline(
                ranks.rank,
                ranks.size,
                os.environ["MASTER_ADDR"],
                tell=lambda invitation: store.set("lifeline", invitation.hex()),
                ask=lambda: bytes.fromhex(store.get("lifeline").decode()),
                timeout=_MEETING,
            )
            undo.enter_context(line)
        except (OSError, RuntimeError, ValueError) as error:
            raise MoePruneError(
                f"the {ranks.size} processes of this run cannot meet: {first_line(error)}",
                "all of them must run and reach MASTER_ADDR:MASTER_PORT",
            ) from error
        undo.enter_context(_share_of_the_cores(ranks))
        yield


def _check_address(ranks: Ranks) -> None:
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if not os.environ.get(name):
            raise ConfigError(f"WORLD_SIZE is {ranks.size} and {name} is not set", _LAUNCH)


def _backend() -> str:
    import torch
    import torch.distributed as dist

    return "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo"


@contextlib.contextmanager
def _share_of_the_cores(ranks: Ranks) -> Iterator[None]:
    """Let the processes of a machine not all compute on all of its cores, unless the user said how many."""
    import torch

    before = torch.get_num_threads()
    if not os.environ.get("OMP_NUM_THREADS"):
        torch.set_num_threads(max(1, before // processes_here(ranks)))
    yield
    torch.set_num_threads(before)


def processes_here(ranks: Ranks) -> int:
    """Processes of the run on this machine; all of them where no launcher says so."""
    return _number("LOCAL_WORLD_SIZE", ranks.size)


def device_of(ranks: Ranks, device: str | None) -> str | None:
    """Where the model of this process goes: to a CUDA device of its own, unless the user named one.

    Raises:
        ConfigError: every process of a machine would take all of its devices.
    """
    if device == "auto" and ranks.size > 1 and processes_here(ranks) > 1:
        raise ConfigError(
            "--device auto spreads one model over all devices, and several processes run on this machine",
            "leave --device out, and each takes a device of its own; or run one process per machine",
        )
    if device is not None or ranks.size == 1:
        return device
    import torch

    return f"cuda:{ranks.local_rank}" if torch.cuda.is_available() else "cpu"


# --- what the processes exchange --------------------------------------------------------------------------------------


def shard(batches: Sequence[T], ranks: Ranks) -> Sequence[T]:
    """The batches of one process: every ``size``-th of the fixed list, and none where there are fewer than processes.

    Example:
        >>> shard(["a", "b", "c"], Ranks(rank=1, size=2))
        ['b']
    """
    return batches[ranks.rank :: ranks.size]


def barrier(ranks: Ranks) -> None:
    """Wait for the other processes.

    Raises:
        MoePruneError: another process failed.
    """
    if ranks.size > 1:
        _all_gather(b".", ranks)


def any_of(flag: bool, ranks: Ranks) -> bool:
    """Whether the flag is set in any process, so that all of them take the same way.

    Raises:
        MoePruneError: another process failed.
    """
    return flag if ranks.size == 1 else b"\1" in _all_gather(bytes([flag]), ranks)


def check_same(ranks: Ranks, **facts: Any) -> None:
    """Refuse processes whose sums would not belong together.

    Args:
        ranks: the place of this process.
        facts: what must be the same in all of them, by name; values that JSON can hold.

    Raises:
        ConfigError: a process has something else; all of them raise it.
    """
    if ranks.size == 1:
        return
    digests = [hashlib.sha256(json.dumps(value, sort_keys=True).encode()).digest() for value in facts.values()]
    for number, theirs in enumerate(_all_gather(b"".join(digests), ranks)):
        for position, (name, ours) in enumerate(zip(facts, digests, strict=True)):
            if theirs[32 * position : 32 * position + 32] != ours:
                raise ConfigError(
                    f"processes {min(number, ranks.rank)} and {max(number, ranks.rank)} of this run do not have the "
                    f"same {name.replace('_', ' ')}",
                    "start all of them with the same command and the same files",
                )


def reduce_layers(layers: Mapping[int, LayerArrays], ranks: Ranks) -> Mapping[int, LayerArrays] | None:
    """Add up what the processes saw.

    Args:
        layers: sums by decoder layer; every process gives the same layers and shapes, zeros where it saw nothing.
        ranks: the place of this process.

    Returns:
        The sums of all processes by decoder layer in process 0, and None in the others.

    Raises:
        MoePruneError: another process failed.
    """
    if ranks.size == 1:
        return layers
    reduced = {index: _reduce(layers[index], ranks) for index in sorted(layers)}
    return {index: arrays for index, arrays in reduced.items() if arrays is not None} if ranks.first else None


def _reduce(arrays: LayerArrays, ranks: Ranks) -> LayerArrays | None:
    """One layer, in one exchange; every row of a sequence comes from one process and is 0 in the others."""
    named = [*arrays.total.items(), *arrays.first_half.items(), *arrays.rows.items()]
    parts = _gather(b"".join(np.ascontiguousarray(array).tobytes() for _, array in named), ranks)
    if parts is None:
        return None
    position = 0
    sums = []
    for name, array in named:
        shares = [_read(part, array, position) for part in parts]
        position += array.nbytes
        total = shares[0]
        for share in shares[1:]:  # in the order of the processes: float64 sums depend on it
            total = added(name, total, share)
        sums.append((name, total))
    count, halves = len(arrays.total), len(arrays.total) + len(arrays.first_half)
    return LayerArrays(
        total=dict(sums[:count]),
        first_half=dict(sums[count:halves]),
        rows=dict(sums[halves:]),
        facts=arrays.facts,  # of the weights, the same in every process
    )


def _read(data: bytes, like: AnyArray, position: int) -> AnyArray:
    return np.frombuffer(data, dtype=like.dtype, count=like.size, offset=position).reshape(like.shape)


# --- bytes ------------------------------------------------------------------------------------------------------------


def _gather(data: bytes, ranks: Ranks) -> list[bytes] | None:
    """The equally long bytes of every process, in process 0."""
    import torch
    import torch.distributed as dist

    own = _tensor(data)
    parts = [torch.empty_like(own) for _ in range(ranks.size)] if ranks.first else None
    with _others_alive():
        dist.gather(own, parts, dst=0)
    return None if parts is None else [part.cpu().numpy().tobytes() for part in parts]


def _all_gather(data: bytes, ranks: Ranks) -> list[bytes]:
    """The equally long bytes of every process, in all of them."""
    import torch
    import torch.distributed as dist

    own = _tensor(data)
    parts = [torch.empty_like(own) for _ in range(ranks.size)]
    with _others_alive():
        dist.all_gather(parts, own)
    return [part.cpu().numpy().tobytes() for part in parts]


def _tensor(data: bytes) -> torch.Tensor:
    """Bytes where the group can send them from: groups of a training script may know CUDA only."""
    import torch
    import torch.distributed as dist

    devices = [pair.partition(":")[0] for pair in str(dist.get_backend_config()).split(",")]  # cpu:gloo,cuda:nccl
    return torch.frombuffer(bytearray(data), dtype=torch.uint8).to("cpu" if "cpu" in devices else devices[0])


@contextlib.contextmanager
def _others_alive() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # what torch.distributed raises for a connection that ended
        raise process_lost() from error
