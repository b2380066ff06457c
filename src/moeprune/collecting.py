"""One collection: in memory where the model fits, else layer by layer; in one process or in several."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from moeprune._files import begin_work, check_free_space, hidden_sibling, human_bytes, lock_file, note, progress
from moeprune._options import CalibrationOptions
from moeprune._version import __version__
from moeprune.calibration import Batch, CalibrationSet
from moeprune.catalogue import known
from moeprune.checkpoint import Checkpoint
from moeprune.collectors.distributed import (
    ALONE,
    Ranks,
    any_of,
    barrier,
    check_same,
    device_of,
    from_environment,
    processes_here,
    reduce_layers,
    shard,
)
from moeprune.collectors.more import Request
from moeprune.errors import CheckpointError, ConfigError, UnsupportedModelError
from moeprune.statistics import STATISTICS, AnyArray, LayerArrays, RouterStatistics

if TYPE_CHECKING:
    import torch

    from moeprune.streaming.forecast import Forecast, Limits
    from moeprune.streaming.stream import LayerStream

_ROOM = 1 << 30  # bytes for activations beside a model that is loaded whole


@contextlib.contextmanager
def collected(
    checkpoint: Checkpoint,
    settings: CalibrationOptions,
    data: CalibrationSet | None,
    ranks: Ranks = ALONE,
    *,
    output: Path | None = None,
    facts: bool = True,
) -> Iterator[RouterStatistics]:
    """Collect from an opened checkpoint and loaded data; without any, and outside process 0: of no tokens.

    Args:
        checkpoint: the model.
        settings: how to run it.
        data: the calibration data.
        ranks: the place of this process among those of the run.
        output: what the block writes. Beside it lies what a layer-by-layer pass needs to go on, until the block has
            ended well in every process.
        facts: whether the weights are read where no data is run, for what they alone say.

    Yields:
        The statistics.
    """
    checkpoint.check_uniform()
    nothing = functools.partial(
        RouterStatistics.empty,
        checkpoint.moe_layers,
        num_experts=checkpoint.num_experts,
        top_k=checkpoint.top_k,
        model=checkpoint.fingerprint,
    )
    if data is None:
        yield nothing(facts=_facts(checkpoint, settings) if ranks.first and facts else {})
        return
    check_same(ranks, model=checkpoint.fingerprint, calibration_data=data.fingerprint, options=settings.canonical())
    with _layers(checkpoint, settings, data, ranks, output) as layers:
        reduced = reduce_layers(layers, ranks)
        if reduced is None:
            yield nothing()
        else:
            yield RouterStatistics.of_layers(
                _with_facts(checkpoint, settings, reduced),
                domains=_domains(data),
                num_experts=checkpoint.num_experts,
                top_k=checkpoint.top_k,
                command=settings.canonical(),
                inputs={"model": checkpoint.fingerprint, "calibration": data.fingerprint},
                provenance=data.provenance,
            )
        barrier(ranks)


def _with_facts(
    checkpoint: Checkpoint, settings: CalibrationOptions, layers: Mapping[int, LayerArrays]
) -> dict[int, LayerArrays]:
    """What was measured, with what the weights say where the loaded model keeps them packed."""
    found = {} if all(arrays.facts for arrays in layers.values()) else _facts(checkpoint, settings)
    return {
        index: arrays if arrays.facts else dataclasses.replace(arrays, facts=found.get(index, {}))
        for index, arrays in layers.items()
    }


def _facts(checkpoint: Checkpoint, settings: CalibrationOptions) -> dict[int, dict[str, AnyArray]]:
    """What the weights alone say by decoder layer, from the files, some experts of a layer at a time."""
    from moeprune.collectors.weights import Loader, facts_of, step_of
    from moeprune.experts import expert_layers

    try:
        stream = open_stream(checkpoint, settings)
        layers = {layer.index: layer.experts for layer in expert_layers(stream.model)}
    except (CheckpointError, UnsupportedModelError) as error:
        note(f"what the weights alone say is left out: {error.message}")
        return {}
    begin_work()
    wanted = progress(settings.observed(checkpoint), "reading weights", unit="layer")
    more = [name for name in settings.measured if known(name).point == "weights"]
    loaders = {index: Loader(read=stream.loader(index), step=step_of(experts)) for index, experts in layers.items()}
    return {index: facts_of(layers[index], more, loaders[index]) for index in wanted}


def _domains(data: CalibrationSet) -> tuple[str, ...]:
    return tuple(sorted(set(data.domains)))


@contextlib.contextmanager
def _layers(
    checkpoint: Checkpoint, settings: CalibrationOptions, data: CalibrationSet, ranks: Ranks, output: Path | None
) -> Iterator[Mapping[int, LayerArrays]]:
    """The sums of this process' share of the data, by decoder layer."""
    settings = dataclasses.replace(settings, device=device_of(ranks, settings.device))
    batches = shard(data.batches(settings.batch_tokens), ranks)
    if any_of(streams(checkpoint, settings), ranks):  # each saw what memory was free at its time
        with _streamed(checkpoint, settings, data, batches, ranks, output) as layers:
            yield layers
        return
    yield _resident(checkpoint, settings, data, batches)


def _resident(
    checkpoint: Checkpoint, settings: CalibrationOptions, data: CalibrationSet, batches: Sequence[Batch]
) -> Mapping[int, LayerArrays]:
    from moeprune.collectors.resident import load_model, run_batches

    layers = settings.observed(checkpoint)
    loaded = load_model(
        checkpoint, device=settings.device, dtype=settings.dtype, trust_remote_code=settings.trust_remote_code
    )
    begin_work()
    # Layers before those that are asked for run alike too, so that slices are of one whole.
    observed = [layer for layer in checkpoint.moe_layers if layer <= max(layers)]
    request = _request(settings, data)
    observation = run_batches(loaded, batches, checkpoint, observed, domains=_domains(data), request=request)
    return {index: observation.take(index) for index in layers}


# --- does it fit? ---------------------------------------------------------------------------------------------------


def streams(checkpoint: Checkpoint, settings: CalibrationOptions, *, beside: int = 0) -> bool:
    """Whether the model runs layer by layer: because the user says so, or because it does not fit otherwise.

    Args:
        checkpoint: the model.
        settings: how to run it.
        beside: bytes that are needed beside a model that is loaded whole, apart from ordinary activations.

    Raises:
        ConfigError: a limit on memory is given for a model that is to be loaded whole.
    """
    if settings.stream is False and (settings.memory or settings.device_memory):
        option = "--memory" if settings.memory else "--device-memory"
        raise ConfigError(f"{option} bounds a pass layer by layer", "leave --no-stream out")
    if settings.stream is not None:
        return settings.stream
    reason = does_not_fit(checkpoint, settings, beside)
    if reason:
        note(f"running layer by layer: {reason}")
    return bool(reason)


def does_not_fit(checkpoint: Checkpoint, settings: CalibrationOptions, beside: int) -> str:
    """Why the model cannot be loaded whole with so many bytes beside it, or an empty string."""
    device = device_for(settings.device)
    try:
        if device.type != "cuda" and _is_quantised(checkpoint):
            return "its quantised weights are turned into numbers as they are read"
    except UnsupportedModelError:
        return ""  # transformers may know the method
    needed, limits = resident_bytes(checkpoint, settings.dtype) + _ROOM + beside, limits_of(settings, device)
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


def leaving(limits: Limits, beside: int) -> tuple[Limits, int]:
    """Limits for what runs beside so many bytes in the same memory, and how many of these are in main memory."""
    if limits.device is None:
        return limits, beside
    return dataclasses.replace(limits, device=max(0, limits.device - beside)), 0


def _all_devices(of_one: int) -> int:
    import torch

    return of_one * max(1, torch.cuda.device_count())


# --- layer by layer -------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _streamed(
    checkpoint: Checkpoint,
    settings: CalibrationOptions,
    data: CalibrationSet,
    batches: Sequence[Batch],
    ranks: Ranks,
    output: Path | None,
) -> Iterator[Mapping[int, LayerArrays]]:
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
        "version": __version__,
    }
    with contextlib.ExitStack() as undo:
        if output is not None:
            check_free_space(output, expected.disk, kind="collect")
            kept = undo.enter_context(kept_beside(output, run, rank=ranks.rank))
            folder = kept.folder
        else:
            kept, folder = None, undo.enter_context(spill_folder(expected))
        begin_work()
        states = SpilledStates(len(batches), folder) if expected.spill else States(len(batches))
        layers = stream_batches(
            stream,
            batches,
            states,
            domains=_domains(data),
            layers=settings.observed(checkpoint),
            request=_request(settings, data),
            kept=kept,
            ranks=ranks,
        )
        del stream, states  # what follows needs the memory
        yield layers


@contextlib.contextmanager
def spill_folder(expected: Forecast, output: Path | None = None) -> Iterator[Path]:
    """A folder for hidden states in files, beside the output where there is one; it is gone after the block.

    Args:
        expected: what the pass will take.
        output: what will be written in the end. Every run for it uses the same folder, so that none is left for good.

    Raises:
        ConfigError: the disk is too small, or another run is writing the output.
    """
    check_spill(expected, output)
    if output is None or not expected.spill:
        with tempfile.TemporaryDirectory(prefix="moeprune-") as temporary:
            yield Path(temporary)
        return
    folder = hidden_sibling(output, "states")
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("a+b") as lock:
        lock_file(lock, output)
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def check_spill(expected: Forecast, output: Path | None) -> None:
    """Refuse a disk that is too small for hidden states in files.

    Raises:
        ConfigError: the message says how much is needed.
    """
    check_free_space(output or tempfile.gettempdir(), expected.disk, kind="states")


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
    stream: LayerStream,
    settings: CalibrationOptions,
    data: CalibrationSet,
    batches: Sequence[Batch],
    *,
    kept: bool,
    beside: int = 0,
) -> Forecast:
    """Forecast a collection, and have the stream hold as many experts at a time as there is room for.

    Args:
        stream: the checkpoint.
        settings: how it runs, and what is measured.
        data: the calibration data.
        batches: as they run.
        kept: whether the states are saved after layers.
        beside: bytes that are needed beside the layer that runs, where it runs.

    Raises:
        ConfigError: it cannot fit.
    """
    from moeprune.streaming.forecast import Load, forecast

    checkpoint, observed = stream.weights.checkpoint, settings.observed(stream.weights.checkpoint)
    request = _request(settings, data)
    limits, sums = leaving(limits_of(settings, stream.device), beside)
    sums += _sums_bytes(stream, request, len(_domains(data)), len(observed)) + _more_bytes(stream, request, batches)
    load = Load(
        shapes=[(len(batch.sequences), max(map(len, batch.sequences))) for batch in batches],
        last=request.last_layer(observed, checkpoint.moe_layers),
        sums=sums,
        durable=kept,
    )
    expected = forecast(stream.weights, load, limits)
    stream.chunk = expected.chunk
    return expected


def _request(settings: CalibrationOptions, data: CalibrationSet) -> Request:
    """What to measure beyond the core sums."""
    return Request(statistics=settings.measured, paths=settings.paths, sequences=Counter(data.domains))


def _more_bytes(stream: LayerStream, request: Request, batches: Sequence[Batch]) -> int:
    """What statistics that are asked for take beside their sums."""
    from moeprune.collectors.weights import sizes_of
    from moeprune.experts import expert_layers, slot_rows

    points = {known(name).point for name in request.statistics}
    sizes = {"H": 0, "I": 0} | sizes_of(expert_layers(stream.model)[0].experts)
    shapes = [(len(batch.sequences), max(map(len, batch.sequences))) for batch in batches]
    tokens = [rows * length for rows, length in shapes]
    top_k, wide = stream.weights.checkpoint.top_k, stream.model.dtype.itemsize
    needed = 0
    if "routes" in points:  # where each token went, which the states hold: twice in 2 bytes, and its gates in 4
        needed += 8 * top_k * sum(tokens)
    if points & {"experts", "residual"}:  # the slots without padding
        needed += top_k * max(tokens, default=0) * sizes["H"] * wide
    if "sequences" in points:  # a sequence in front of many experts
        rows = slot_rows(sizes["H"], sizes["E"], stream.device.type)
        longest = max((length for _, length in shapes), default=0)
        needed += min(rows, longest * sizes["E"]) * (2 * sizes["H"] + 3 * sizes["I"]) * wide
    return needed


def _sums_bytes(stream: LayerStream, request: Request, domains: int, layers: int) -> int:
    """Sums of one layer: two halves of every domain while they are added up, and of all layers what they came to."""
    from moeprune.collectors.weights import sizes_of
    from moeprune.experts import expert_layers

    sizes = sizes_of(expert_layers(stream.model)[0].experts)
    summed = [known(name) for name in (*STATISTICS, *request.statistics)]
    shapes = [statistic.shape(sizes["E"], sizes) for statistic in summed if statistic.by_domain]
    elements = sum(math.prod(shape) for shape in shapes)
    return (2 + 2 * layers) * 8 * domains * elements


def expected_of(
    checkpoint: Checkpoint, settings: CalibrationOptions, data: CalibrationSet, *, output: Path | None
) -> Forecast | None:
    """What a collection would take; None where the model would be loaded whole."""
    if not streams(checkpoint, settings):
        return None
    batches = data.batches(settings.batch_tokens)
    expected = arrange(open_stream(checkpoint, settings), settings, data, batches, kept=output is not None)
    if output is not None:
        check_free_space(output, expected.disk, kind="collect")
    return expected
