"""Score many variants of a model that does not fit in memory: one pass over its weights serves all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from moeprune._files import progress
from moeprune.evaluation.agreement import AgreementSums, Sequences, batches
from moeprune.evaluation.evaluator import (
    KeepLists,
    Masked,
    PlanScore,
    Variant,
    check_documents,
    check_layers,
)
from moeprune.experts import expert_layers
from moeprune.runtime.masking import Change
from moeprune.streaming.states import States
from moeprune.streaming.stream import LayerStream

if TYPE_CHECKING:
    import torch

    Inputs = dict[str, torch.Tensor]

_PIECE = 1024  # tokens whose logits are in memory at a time


class StreamedEvaluator:
    """Scores variants layer by layer: the hidden states of the base model and of each of them advance side by side.

    Until the first layer that a variant changes, its states are the base model's and are not computed again.

    Args:
        stream: the checkpoint.
        sequences: token ids per document; the first token is only ever context.
        batch_tokens: most tokens, padding included, in a batch.
        states: makes the store for the states of so many batches; by default they are in memory.

    Raises:
        EvaluationError: fewer than two documents with a token to predict.

    Example:
        >>> evaluator = StreamedEvaluator(LayerStream(checkpoint, device=torch.device("cpu")), sequences)
        >>> [one, two] = evaluator([plan_a, plan_b])
    """

    def __init__(
        self,
        stream: LayerStream,
        sequences: Sequences,
        batch_tokens: int = 8192,
        *,
        states: Callable[[int], States] = States,
    ) -> None:
        check_documents(sequences)
        self._stream, self._documents, self._states = stream, len(sequences), states
        self._layers = {layer.index: layer for layer in expert_layers(stream.model)}
        self._rows: list[list[int]] = []
        self._inputs: list[Inputs] = []
        for rows, ids_BT, mask_BT in batches(sequences, batch_tokens):
            self._rows.append(rows)
            self._inputs.append({"input_ids": ids_BT, "attention_mask": mask_BT})

    def __call__(self, keeps: Sequence[KeepLists]) -> list[PlanScore]:
        """Score every plan on the same documents, in the order given.

        Raises:
            PlanError: a plan names a layer that has no experts, or a router cannot work with a keep-list.
            CheckpointError: a file cannot be read; the message names it.
        """
        for keep in keeps:
            check_layers(keep, self._layers)
        return self.score([Masked(keep) for keep in keeps])

    def score(self, variants: Sequence[Variant]) -> list[PlanScore]:
        """Score any variants of the model; in every layer a batch runs through them in the order given.

        Raises:
            PlanError: a layer cannot be changed as a variant says.
            CheckpointError: a file cannot be read; the message names it.
        """
        import torch

        if not variants:
            return []
        states = self._states(len(self._inputs) * (1 + len(variants)))
        with torch.inference_mode():
            self._stream.embed(self._inputs, states)
            apart = [False] * len(variants)  # whether a variant's states are no longer the base model's
            for index in progress(range(self._stream.depth), "evaluating", unit="layer"):
                self._advance(index, variants, states, apart)
                states.turn()
            return [PlanScore.of(sums) for sums in self._compare(states, apart)]

    def _advance(self, index: int, variants: Sequence[Variant], states: States, apart: list[bool]) -> None:
        """Run one layer on the base model's states and on those of every variant that is apart from it."""
        with self._stream.layer(index):
            layer = self._layers.get(index)
            changes = [None if layer is None else variant.at(layer) for variant in variants]
            for batch, inputs in enumerate(self._inputs):
                before = states.get(self._place(0, batch))
                for number, (variant, change) in enumerate(zip(variants, changes, strict=True)):
                    if not apart[number] and change is None:
                        continue
                    own = states.get(self._place(1 + number, batch)) if apart[number] else before
                    variant.begin(self._rows[batch], inputs["input_ids"], inputs["attention_mask"])
                    states.put(self._place(1 + number, batch), self._run(index, own, inputs, change))
                # Last, because it may take the place of the states that the variants have just read.
                states.put(self._place(0, batch), self._run(index, before, inputs, None))
        for number, change in enumerate(changes):
            apart[number] = apart[number] or change is not None

    def _run(
        self, index: int, state: tuple[torch.Tensor, ...], inputs: Inputs, change: Change | None
    ) -> tuple[torch.Tensor, ...]:
        if change is None:
            return self._stream.run(index, state, inputs)
        with change.applied():
            return self._stream.run(index, state, inputs)

    def _compare(self, states: States, apart: Sequence[bool]) -> list[AgreementSums]:
        """Add up what the logits of every variant say beside those of the base model."""
        sums = [AgreementSums(self._documents) for _ in apart]
        with self._stream.head():
            for batch, inputs in enumerate(self._inputs):
                places = [self._place(1 + number if own else 0, batch) for number, own in enumerate(apart)]
                ids_BT, mask_BT = inputs["input_ids"], inputs["attention_mask"]
                for part in _overlapping(ids_BT.shape[1], max(2, _PIECE // len(ids_BT))):
                    base = self._logits(states, self._place(0, batch), inputs, part)
                    for place, own in zip(places, sums, strict=True):
                        same = place == self._place(0, batch)
                        logits = base if same else self._logits(states, place, inputs, part)
                        own.add(self._rows[batch], base, logits, ids_BT[:, part], mask_BT[:, part])
        return sums

    def _logits(self, states: States, place: int, inputs: Inputs, part: slice) -> torch.Tensor:
        import torch

        return self._stream.logits(states.get(place), inputs, torch.arange(part.start, part.stop))

    def _place(self, copy: int, batch: int) -> int:
        return copy * len(self._inputs) + batch


def _overlapping(length: int, piece: int) -> Iterator[slice]:
    """Parts that share a token with the next, so that every token but the first is predicted in one of them."""
    for start in range(0, max(1, length - 1), piece - 1):
        yield slice(start, min(start + piece, length))
