"""One collection: in memory where the model fits, else layer by layer; in one process or in several."""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from moeprune._files import begin_work, check_free_space, human_bytes, note
from moeprune._options import CalibrationOptions
from moeprune.calibration import Batch, CalibrationSet
from moeprune.checkpoint import Checkpoint
from moeprune.collectors.distributed import (
    ALONE,
    Ranks,
    any_of,
    check_same,
    device_of,
    from_environment,
    processes_here,
    reduce_layers,
    shard,
)
from moeprune.errors import ConfigError, UnsupportedModelError
from moeprune.statistics import STATISTICS, LayerArrays, RouterStatistics

if TYPE_CHECKING:
    import torch

    from moeprune.streaming.forecast import Forecast, Limits
    from moeprune.streaming.stream import LayerStream

_ROOM = 1 << 30  # bytes for activations beside a model that is loaded whole


def collect_from(
    checkpoint: Checkpoint,
    settings: CalibrationOptions,
    data: CalibrationSet | None,
    ranks: Ranks = ALONE,
    *,
    output: Path | None = None,
) -> RouterStatistics:
    """Collect from an opened checkpoint and loaded data; without any, and outside process 0: of no tokens.

    Args:
        checkpoint: the model.
        settings: how to run it.
        data: the calibration data.
        ranks: the place of this process among those of the run.
        output: what will be written in the end; beside it lies what a layer-by-layer pass needs to go on.
    """
    nothing = RouterStatistics.empty(
        checkpoint.moe_layers,
        num_experts=checkpoint.num_experts,
        top_k=checkpoint.top_k,
        model=checkpoint.fingerprint,
    )
    if data is None:
        return nothing
    check_same(ranks, model=checkpoint.fingerprint, calibration_data=data.fingerprint, options=settings.canonical())
    reduced = reduce_layers(_run(checkpoint, settings, data, ranks, output), ranks)
    if reduced is None:
        return nothing
    return RouterStatistics.of_layers(
        reduced,
        domains=_domains(data),
        num_experts=checkpoint.num_experts,
        top_k=checkpoint.top_k,
        command=settings.canonical(),
        inputs={"model": checkpoint.fingerprint, "calibration": data.fingerprint},
        provenance=data.provenance,
    )


def _domains(data: CalibrationSet) -> tuple[str, ...]:
    return tuple(sorted(set(data.domains)))


def _run(
    checkpoint: Checkpoint, settings: CalibrationOptions, data: CalibrationSet, ranks: Ranks, output: Path | None
) -> Mapping[int, LayerArrays]:
    """The sums of this process' share of the data."""
    settings = dataclasses.replace(settings, device=device_of(ranks, settings.device))
    batches = shard(data.batches(settings.batch_tokens), ranks)
    if any_of(streams(checkpoint, settings), ranks):  # each saw what memory was free at its time
        return _streamed(checkpoint, settings, data, batches, ranks, output)
    from moeprune.collectors.resident import load_model, run_batches

    loaded = load_model(
        checkpoint, device=settings.device, dtype=settings.dtype, trust_remote_code=settings.trust_remote_code
    )
    begin_work()
    layers = settings.observed(checkpoint)
    observation = run_batches(loaded, batches, checkpoint, layers, domains=_domains(data))
    return {index: observation.take(index) for index in layers}


# --- does it fit? ---------------------------------------------------------------------------------------------------


def streams(checkpoint: Checkpoint, settings: CalibrationOptions) -> bool:
    """Whether the model runs layer by layer: because the user says so, or because it does not fit otherwise.

    Raises:
        ConfigError: a limit on memory is given for a model that is to be loaded whole.
    """
    if settings.stream is False and (settings.memory or settings.device_memory):
        raise ConfigError("--memory bounds a pass layer by layer", "leave --no-stream out")
    if settings.stream is not None:
        return settings.stream
    reason = _does_not_fit(checkpoint, settings)
    if reason:
        note(f"running layer by layer: {reason}")
    return bool(reason)


def _does_not_fit(checkpoint: Checkpoint, settings: CalibrationOptions) -> str:
    """Why the model cannot be loaded whole, or an empty string."""
    device = device_for(settings.device)
    try:
        if device.type != "cuda" and _is_quantised(checkpoint):
            return "its quantised weights are turned into numbers as they are read"
    except UnsupportedModelError:
        return ""  # transformers may know the method
    needed, limits = resident_bytes(checkpoint, settings.dtype) + _ROOM, limits_of(settings, device)
    room = limits.host if limits.device is None else limits.device
    if settings.device == "auto":
        room = _all_devices(room)
    if needed <= room:
        return ""
    return f"loaded whole it takes {human_bytes(needed)}, and there are {human_bytes(room)}"


def _is_quantised(checkpoint: Checkpoint) -> bool:
    from moeprune.streaming.quantised import scheme_of

    return scheme_of(checkpoint.config) is not None


def resident_bytes(checkpoint: Checkpoint, dtype: str) -> int:
    """Bytes of all parameters in memory, roughly: packed elements as many as their bits tell."""
    from moeprune.streaming.skeleton import torch_dtype

    wide = None if dtype == "auto" else torch_dtype(dtype).itemsize
    plain = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2}
    packed = {"F8_E4M3": 2, "F8_E5M2": 2, "U8": 4, "I32": 4}  # of its bytes: one number of two bytes for each element
    total: int = 0
    for entry in checkpoint.tensors.values():
        size = wide or plain.get(entry.dtype, 2)
        numbers = entry.numel if entry.dtype in plain else entry.nbytes * packed.get(entry.dtype, 1) // 2
        total += int(numbers * size)
    return total


def device_for(device: str | None) -> torch.device:
    """The device that runs a layer at a time.

    Raises:
        ConfigError: there is no such device.
    """
    import torch

    from moeprune.collectors.resident import place_of

    place = place_of(device)
    if place == "auto":
        place = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(place)


def limits_of(settings: CalibrationOptions, device: torch.device) -> Limits:
    """What the user allows, or what is free; processes of one machine share its main memory.

    Raises:
        ConfigError: a limit is given for a device that is not used.
    """
    from moeprune.streaming.forecast import Limits, free_memory

    if settings.device_memory and device.type == "cpu":
        raise ConfigError("--device-memory is given and the model runs on the CPU", "give --memory")
    free = free_memory(device)
    return Limits(
        host=settings.memory or free.host // processes_here(from_environment()),
        device=None if free.device is None else settings.device_memory or free.device,
    )


def _all_devices(of_one: int) -> int:
    import torch

    return of_one * max(1, torch.cuda.device_count())


# --- layer by layer -------------------------------------------------------------------------------------------------


def _streamed(
    checkpoint: Checkpoint,
    settings: CalibrationOptions,
    data: CalibrationSet,
    batches: Sequence[Batch],
    ranks: Ranks,
    output: Path | None,
) -> Mapping[int, LayerArrays]:
    from moeprune.collectors.kept import kept_beside
    from moeprune.collectors.stream import stream_batches
    from moeprune.streaming.states import SpilledStates, States

    stream = open_stream(checkpoint, settings)
    expected = arrange(stream, settings, data, batches, kept=output is not None)
    run = {
        "model": checkpoint.fingerprint,
        "calibration": data.fingerprint,
        "options": settings.canonical(),
        "process": [ranks.rank, ranks.size],
        "device": stream.device.type,
        "spilled": expected.spill,
    }
    with contextlib.ExitStack() as undo:
        if output is not None:
            check_free_space(output, expected.disk)
            kept = undo.enter_context(kept_beside(output, run, rank=ranks.rank))
            folder = kept.folder
        else:
            kept, folder = None, Path(undo.enter_context(_spill_folder(expected)))
        begin_work()
        states = SpilledStates(len(batches), folder) if expected.spill else States(len(batches))
        return stream_batches(
            stream,
            batches,
            states,
            domains=_domains(data),
            layers=settings.observed(checkpoint),
            kept=kept,
            ranks=ranks,
        )


@contextlib.contextmanager
def _spill_folder(expected: Forecast) -> Iterator[str]:
    with tempfile.TemporaryDirectory(prefix="moeprune-") as folder:
        check_free_space(folder, expected.disk)
        yield folder


def open_stream(checkpoint: Checkpoint, settings: CalibrationOptions) -> LayerStream:
    """The checkpoint as a stream of layers on the device that is asked for.

    Raises:
        UnsupportedModelError: the layers cannot be run one at a time.
    """
    from moeprune.streaming.stream import LayerStream

    return LayerStream(
        checkpoint,
        device=device_for(settings.device),
        dtype=settings.dtype,
        trust_remote_code=settings.trust_remote_code,
    )


def arrange(
    stream: LayerStream, settings: CalibrationOptions, data: CalibrationSet, batches: Sequence[Batch], *, kept: bool
) -> Forecast:
    """Forecast a collection, and have the stream hold as many experts at a time as there is room for.

    Raises:
        ConfigError: it cannot fit.
    """
    from moeprune.streaming.forecast import Load, forecast

    checkpoint = stream.weights.checkpoint
    load = Load(
        shapes=[(len(batch.sequences), max(map(len, batch.sequences))) for batch in batches],
        last=max(settings.observed(checkpoint)),
        sums=_sums_bytes(checkpoint.num_experts, len(_domains(data))),
        durable=kept,
    )
    expected = forecast(stream.weights, load, limits_of(settings, stream.device))
    stream.chunk = expected.chunk
    return expected


def _sums_bytes(num_experts: int, domains: int) -> int:
    """Sums of one layer: two halves of every domain while they are added up, and once more as what they come to."""
    elements: int = sum(num_experts ** len(statistic.axes) for statistic in STATISTICS.values())
    return 4 * 8 * domains * elements


def expected_of(
    checkpoint: Checkpoint, settings: CalibrationOptions, data: CalibrationSet, *, output: Path | None
) -> Forecast | None:
    """What a collection would take; None where the model would be loaded whole."""
    if not streams(checkpoint, settings):
        return None
    batches = data.batches(settings.batch_tokens)
    return arrange(open_stream(checkpoint, settings), settings, data, batches, kept=output is not None)
