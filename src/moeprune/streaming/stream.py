"""A checkpoint that runs layer by layer: one decoder layer is in memory at a time, or only some of its experts."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from moeprune.checkpoint import Checkpoint
from moeprune.experts import expert_layers, wrapped_experts
from moeprune.streaming.skeleton import LayerRunner, build_skeleton
from moeprune.streaming.states import States
from moeprune.streaming.weights import EMBEDDING, HEAD, Weights, trim_heap

if TYPE_CHECKING:
    import torch
    from torch import nn

    from moeprune.experts import Experts

Inputs = dict[str, Any]


def padded(sequences: Sequence[Sequence[int]], device: torch.device | str = "cpu") -> Inputs:
    """Right-padded ``input_ids`` and ``attention_mask``, both [batch, sequence]."""
    import torch

    length = max(map(len, sequences))
    ids = torch.zeros((len(sequences), length), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, sequence in enumerate(sequences):
        ids[row, : len(sequence)] = torch.tensor(sequence)
        mask[row, : len(sequence)] = 1
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}


class LayerStream:
    """Runs batches through a checkpoint whose layers take turns in memory.

    Attributes:
        model: the model without weights; the layer that runs has its own.
        weights: what fills it.
        chunk: experts of a layer that are in memory at a time.
        last: the decoder layer after which nothing runs.
    """

    def __init__(
        self, checkpoint: Checkpoint, *, device: torch.device, dtype: str = "auto", trust_remote_code: bool = False
    ) -> None:
        if device.type == "cpu":
            # Every expert gets another number of rows, and for each oneDNN would keep the code that it made: 100 MB.
            os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "0")
        self.model = build_skeleton(checkpoint, dtype=dtype, trust_remote_code=trust_remote_code)
        self.device = device
        self.weights = Weights(checkpoint, self.model, device)
        self.chunk = checkpoint.num_experts
        self.last = self.weights.depth - 1
        self._runner = LayerRunner(self.model)
        self._experts = {layer.index: layer.experts for layer in expert_layers(self.model)}
        self._num_experts = checkpoint.num_experts

    @property
    def depth(self) -> int:
        """Number of decoder layers."""
        return self.weights.depth

    @property
    def whole_layers(self) -> bool:
        """Whether all experts of a layer are in memory together."""
        return self.chunk >= self._num_experts

    def embed(self, batches: Sequence[Inputs], states: States) -> None:
        """Fill the states with what the first layer is given.

        Args:
            batches: ``input_ids`` and ``attention_mask``, both [B, S], of each batch.
            states: as many places, or more.
        """
        with self.weights.loaded(EMBEDDING):
            for number, inputs in enumerate(batches):
                states.put(number, self._runner.embed(self._here(inputs)))
        states.turn()

    @contextlib.contextmanager
    def layer(self, index: int) -> Iterator[None]:
        """Have a decoder layer in memory inside the block, and let the system read the next one's bytes meanwhile.

        Raises:
            CheckpointError: a file cannot be read; the message names it.
        """
        with contextlib.ExitStack() as undo:
            whole = self.whole_layers or index not in self._experts
            undo.enter_context(self.weights.loaded(index, experts=None if whole else False))
            if not whole:
                in_chunks = functools.partial(_in_chunks, self.weights, index, self.chunk)
                wrappers = {self._experts[index]: in_chunks}
                undo.enter_context(wrapped_experts(self.model, wrappers, innermost=True))
            if index < self.last:
                self.weights.announce(index + 1)
            yield

    def run(
        self, index: int, state: tuple[torch.Tensor, ...], inputs: Inputs, *, trim: bool = True
    ) -> tuple[torch.Tensor, ...]:
        """One batch through the layer that is in memory; without ``trim`` freed memory stays for the next one."""
        here = tuple(tensor.to(self.device, non_blocking=True) for tensor in state)
        after = self._runner.run(index, here, self._here(inputs))
        if trim:
            self.trim()
        return after

    def trim(self) -> None:
        """Give back what was freed of main memory, where layers run in it: what stays would add up over batches."""
        if self.device.type == "cpu":
            trim_heap()

    @contextlib.contextmanager
    def head(self) -> Iterator[None]:
        """Have the last norm and the head in memory inside the block, for :meth:`logits`."""
        with self.weights.loaded(HEAD):
            yield

    def logits(self, state: tuple[torch.Tensor, ...], inputs: Inputs, positions: torch.Tensor) -> torch.Tensor:
        """Logits [B, len(positions), V] of a batch that has gone through all layers."""
        here = tuple(tensor.to(self.device) for tensor in state)
        return self._runner.logits(here, self._here(inputs), positions.to(self.device))

    def loader(self, index: int) -> Callable[[range], dict[str, torch.Tensor]]:
        """What reads the parameters of some experts of a layer, by name, each ``[experts, ...]``."""
        return functools.partial(self.weights.load_experts, index)

    def _here(self, inputs: Inputs) -> Inputs:
        return {name: value.to(self.device, non_blocking=True) for name, value in inputs.items()}


def _in_chunks(
    weights: Weights,
    layer: int,
    chunk: int,
    original: Experts,
    experts: nn.Module,
    hidden_TH: torch.Tensor,
    index_TK: torch.Tensor,
    gates_TK: torch.Tensor,
) -> torch.Tensor:
    """In place of the experts: some of them at a time, each time on the rows that are routed to them."""
    import torch

    total_TH = torch.zeros(hidden_TH.shape, dtype=torch.float32, device=hidden_TH.device)
    for start in range(0, weights.checkpoint.num_experts, chunk):
        own = range(start, min(start + chunk, weights.checkpoint.num_experts))
        token_R, slot_R = ((index_TK >= own.start) & (index_TK < own.stop)).nonzero(as_tuple=True)
        if not len(token_R):
            continue
        with _holding(experts, weights.load_experts(layer, own), len(own)):
            index_R1 = (index_TK[token_R, slot_R] - own.start)[:, None]
            rows = original(experts, hidden_TH[token_R], index_R1, gates_TK[token_R, slot_R][:, None])
        total_TH.index_add_(0, token_R, rows.float())
    return total_TH.to(hidden_TH.dtype)


@contextlib.contextmanager
def _holding(experts: nn.Module, values: dict[str, torch.Tensor], count: int) -> Iterator[None]:
    """Let an experts module hold only some experts inside the block."""
    import torch

    before = {name: experts._parameters[name] for name in values}  # noqa: SLF001 - setattr would copy the meta device
    holder: Any = experts
    number = holder.num_experts
    try:
        for name, value in values.items():
            experts._parameters[name] = torch.nn.Parameter(value, requires_grad=False)  # noqa: SLF001
        holder.num_experts = count
        yield
    finally:
        holder.num_experts = number
        experts._parameters.update(before)  # noqa: SLF001
