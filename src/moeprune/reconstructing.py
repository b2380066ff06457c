"""What a strategy that searches needs of a checkpoint: its layers, run with some of their experts."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from moeprune._files import begin_work
from moeprune._options import CalibrationOptions
from moeprune.calibration import CalibrationSet
from moeprune.checkpoint import Checkpoint
from moeprune.collecting import limits_of, open_stream, spill_folder, streams
from moeprune.strategies import Strategy

if TYPE_CHECKING:
    from moeprune.evaluation.reconstruction import SubsetLoss


@contextlib.contextmanager
def subset_loss_of(
    checkpoint: Checkpoint,
    settings: CalibrationOptions,
    data: CalibrationSet | None,
    strategy: Strategy,
    *,
    output: Path | None = None,
) -> Iterator[SubsetLoss | None]:
    """Losses of sets of experts on the calibration data: in memory where the model fits, else layer by layer.

    Args:
        checkpoint: the model.
        settings: how to run it.
        data: the documents, of which the first are used.
        strategy: what searches.
        output: what will be written in the end; hidden states that need files lie beside it.

    Yields:
        The losses; None for a strategy that does not search.
    """
    if not strategy.search or data is None:
        yield None
        return
    from moeprune.evaluation.reconstruction import ResidentSubsetLoss, StreamedSubsetLoss, first_batches
    from moeprune.streaming.forecast import Load, forecast
    from moeprune.streaming.states import SpilledStates, States

    sequences, progressive = data.sequences, strategy.search == "progressive"
    ids = [batch["input_ids"] for batch in first_batches(sequences, settings.batch_tokens)]
    shapes = [(len(ids_BS), ids_BS.shape[1]) for ids_BS in ids]
    beside = _captured_bytes(checkpoint, shapes)
    if not streams(checkpoint, settings, beside=beside):
        from moeprune.collectors.resident import load_model

        model = load_model(
            checkpoint, device=settings.device, dtype=settings.dtype, trust_remote_code=settings.trust_remote_code
        )
        yield ResidentSubsetLoss(model, sequences, settings.batch_tokens, progressive=progressive)
        return
    stream = open_stream(checkpoint, settings)
    expected = forecast(
        stream.weights,
        Load(shapes=shapes, last=checkpoint.moe_layers[-1], sums=beside),
        limits_of(settings, stream.device),
    )
    stream.chunk = expected.chunk
    with spill_folder(expected, output) as folder:
        begin_work()
        states = functools.partial(SpilledStates, folder=folder) if expected.spill else States
        with StreamedSubsetLoss(
            stream, sequences, settings.batch_tokens, progressive=progressive, states=states
        ) as subset_loss:
            yield subset_loss


def _captured_bytes(checkpoint: Checkpoint, shapes: Sequence[tuple[int, int]]) -> int:
    """Of what one layer is given and gives, with all of its experts and with some, and of their difference."""
    hidden = int(checkpoint.spec.values(checkpoint.config).get("hidden_size", 0))
    return 6 * 4 * hidden * sum(rows * length for rows, length in shapes)
