"""Collect statistics layer by layer from a checkpoint that need not fit in memory."""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

from moeprune._files import progress
from moeprune.calibration import Batch
from moeprune.collectors.distributed import ALONE, Ranks, barrier
from moeprune.collectors.kept import Kept
from moeprune.collectors.probe import Observation, observe
from moeprune.statistics import LayerArrays
from moeprune.streaming.states import States
from moeprune.streaming.stream import LayerStream, padded

if TYPE_CHECKING:
    from moeprune.streaming.stream import Inputs

_PACE = 10  # saving states in memory may cost a tenth of the time between two saves


def stream_batches(
    stream: LayerStream,
    batches: Sequence[Batch],
    states: States,
    *,
    domains: Sequence[str],
    layers: Collection[int],
    kept: Kept | None = None,
    ranks: Ranks = ALONE,
) -> dict[int, LayerArrays]:
    """Run every batch through one layer after another and add up what the experts of some of them do.

    Args:
        stream: the checkpoint.
        batches: this process' share of the fixed list of batches.
        states: where the hidden states live in between.
        domains: all domains of the data, in the order of the result.
        layers: decoder layers to collect; nothing runs after the last of them.
        kept: what an earlier run left, and where this one leaves what it has done.
        ranks: the place of this process among those of the run.

    Returns:
        The sums by decoder layer.

    Raises:
        CheckpointError: a file cannot be read; layers that are done need not be run again.
    """
    import torch

    inputs = [padded(batch.sequences) for batch in batches]
    done: dict[int, LayerArrays] = {}
    saver = _Saver(kept)
    with (
        observe(stream.model, like=stream.weights.checkpoint, domains=domains, layers=layers) as observation,
        torch.inference_mode(),
    ):
        observation.slot_rows = 0 if stream.whole_layers else 1 << 62  # experts come and go once per call
        start = _begin(stream, inputs, states, kept)
        if kept is not None:
            done = {layer: kept.load_layer(layer) for layer in layers if layer < start}
        for _ in range(start):
            barrier(ranks)  # of a layer that another process may have to run again
        for index in progress(range(start, max(layers) + 1), "collecting", unit="layer"):
            _run_layer(stream, index, batches, inputs, states, observation)
            if index in layers:
                done[index] = observation.take(index)
                if kept is not None:
                    kept.save_layer(index, done[index])
            saver.save(states, index + 1)
            barrier(ranks)  # in step, processes of one machine read every layer from the disk once
    return done


def _begin(stream: LayerStream, inputs: Sequence[Inputs], states: States, kept: Kept | None) -> int:
    """Go on from what was kept, or embed the batches; gives the layer to run first."""
    if kept is not None and kept.start:
        kept.restore(states)
        return kept.start
    stream.embed(inputs, states)
    return 0


def _run_layer(
    stream: LayerStream,
    index: int,
    batches: Sequence[Batch],
    inputs: Sequence[Inputs],
    states: States,
    observation: Observation,
) -> None:
    with stream.layer(index):
        for number, batch in enumerate(batches):
            with observation.batch(batch.domain, batch.half):
                states.put(number, stream.run(index, states.get(number), inputs[number]))
    states.turn()


class _Saver:
    """Saves states after a layer, but seldom where that would take long beside the layers themselves."""

    def __init__(self, kept: Kept | None) -> None:
        self._kept = kept
        self._last = time.monotonic()
        self._took = 0.0

    def save(self, states: States, following: int) -> None:
        """Save the states if it is time to; a later run repeats the layers since then."""
        begun = time.monotonic()
        if self._kept is None or begun - self._last < _PACE * self._took:
            return
        self._kept.save_states(states, following)
        self._last = time.monotonic()
        self._took = self._last - begun
