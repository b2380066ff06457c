"""Collect statistics layer by layer from a checkpoint that need not fit in memory."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

from moeprune._files import progress
from moeprune.calibration import Batch
from moeprune.collectors.distributed import ALONE, Ranks, barrier
from moeprune.collectors.kept import Kept
from moeprune.collectors.more import CORE, Request
from moeprune.collectors.probe import Observation, observe
from moeprune.collectors.routes import KEPT, Routes
from moeprune.collectors.weights import Loader
from moeprune.statistics import AnyArray, LayerArrays
from moeprune.streaming.states import States
from moeprune.streaming.stream import LayerStream, padded

if TYPE_CHECKING:
    import torch

    from moeprune.streaming.stream import Inputs

_LATE = -1  # in the place of a layer's number: what is known of the first MoE layer after the last one has run
_PACE = 10  # saving states in memory may cost a tenth of the time between two saves


def stream_batches(
    stream: LayerStream,
    batches: Sequence[Batch],
    states: States,
    *,
    domains: Sequence[str],
    layers: Collection[int],
    request: Request = CORE,
    kept: Kept | None = None,
    ranks: Ranks = ALONE,
) -> dict[int, LayerArrays]:
    """Run every batch through one layer after another and add up what the experts of some of them do.

    Args:
        stream: the checkpoint.
        batches: this process' share of the fixed list of batches.
        states: where the hidden states live in between.
        domains: all domains of the data, in the order of the result.
        layers: decoder layers to collect; nothing that they do not need runs after the last of them.
        request: what to measure beyond the core sums.
        kept: what an earlier run left, and where this one leaves what it has done.
        ranks: the place of this process among those of the run.

    Returns:
        The sums by decoder layer.

    Raises:
        CheckpointError: a file cannot be read; layers that are done need not be run again.
    """
    import torch

    moe_layers = stream.weights.checkpoint.moe_layers
    stream.last = last = request.last_layer(layers, moe_layers)
    observed = [layer for layer in moe_layers if layer <= last]  # all run alike, so that slices are of one whole
    inputs = [padded(batch.sequences) for batch in batches]
    start = kept.start if kept is not None else 0
    done = {layer: kept.load_layer(layer) for layer in (*layers, _LATE) if kept.has(layer)} if kept is not None else {}
    saver = _Saver(kept, last)
    with (
        observe(
            stream.model,
            like=stream.weights.checkpoint,
            domains=domains,
            layers=observed,
            statistics=request.statistics,
            paths=request.paths,
            sequences=request.sequences,
        ) as observation,
        torch.inference_mode(),
    ):
        observation.slot_rows = 0 if stream.whole_layers else 1 << 62  # experts come and go once per call
        if kept is not None and start:
            kept.restore(states)
        else:
            stream.embed(inputs, states)
        for _ in range(start):
            barrier(ranks)  # of a layer that another process may have to run again
        for index in progress(range(start, last + 1), "collecting", unit="layer"):
            _run_layer(stream, index, batches, inputs, states, observation)
            taken = {index: observation.take(index)} if index in observed else {}
            if index == moe_layers[-1] != moe_layers[0] and moe_layers[0] in layers and observation.more.follows:
                taken[_LATE] = observation.take(moe_layers[0])
            for number in taken.keys() & {*layers, _LATE}:
                done[number] = taken[number]
                if kept is not None:
                    kept.save_layer(number, taken[number])
            saver.save(states, index + 1)
            barrier(ranks)  # in step, processes of one machine read every layer from the disk once
    return _with_late(done, moe_layers[0])


def _with_late(done: dict[int, LayerArrays], first: int) -> dict[int, LayerArrays]:
    """The layers, with what is known of the first one only when the last one has run: where the tokens came from."""
    if _LATE not in done:
        return done
    late = done.pop(_LATE)

    def filled(early: dict[str, AnyArray], late: dict[str, AnyArray]) -> dict[str, AnyArray]:
        return {name: late[name] if name == "wrap_count" else array for name, array in early.items()}

    early = done[first]
    total, first_half = filled(early.total, late.total), filled(early.first_half, late.first_half)
    return done | {first: dataclasses.replace(early, total=total, first_half=first_half)}


def _run_layer(
    stream: LayerStream,
    index: int,
    batches: Sequence[Batch],
    inputs: Sequence[Inputs],
    states: States,
    observation: Observation,
) -> None:
    half = max(1, stream.chunk // 2)  # the one is read while the other is still held
    observation.loader = None if stream.whole_layers else Loader(read=stream.loader(index), step=half)
    with stream.layer(index):
        for number, batch in enumerate(batches):
            state, routes = _parted(states.get(number), carried=observation.more.follows and index > 0)
            with observation.batch(batch.domain, batch.half, rows=batch.rows, routes=routes):
                after = stream.run(index, state, inputs[number])
            states.put(number, (*after, *routes.tensors()) if observation.more.follows else after)
        observation.read_weights(index)
        stream.trim()
    states.turn()


def _parted(state: tuple[torch.Tensor, ...], *, carried: bool) -> tuple[tuple[torch.Tensor, ...], Routes]:
    """What a layer is given, and where the tokens went before, which travels with it."""
    return (state[:-KEPT], Routes.of_tensors(state[-KEPT:])) if carried else (state, Routes())


class _Saver:
    """Makes durable how far a run has got: seldom, where writing the states would take long beside the layers."""

    def __init__(self, kept: Kept | None, last: int) -> None:
        self._kept = kept
        self._last_layer = last
        self._saved = time.monotonic()
        self._took = 0.0

    def save(self, states: States, following: int) -> None:
        """Save if it is time to; a later run repeats the layers since then."""
        if self._kept is None:
            return
        begun = time.monotonic()
        if following > self._last_layer:
            self._kept.advance(following, None)
        elif states.in_files or begun - self._saved >= _PACE * self._took:
            self._kept.advance(following, states)
            self._saved = time.monotonic()
            self._took = self._saved - begun
