"""How far a layer's routed output is from the original's when only some of its experts are there.

The layer itself computes it: its router is masked, so that the model's own top-k, groups and renormalisation pick among
the experts that stay. Shared experts and the residual stream do not come into it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Protocol, Self

from moeprune.errors import ConfigError, PlanError
from moeprune.evaluation.agreement import Sequences, batches
from moeprune.experts import ExpertLayer, expert_layers
from moeprune.runtime.masking import Mask, applied
from moeprune.streaming.states import States
from moeprune.streaming.stream import LayerStream

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedModel

    Inputs = dict[str, torch.Tensor]


TOKENS = 8192  # on which a layer's output is measured


class SubsetLoss(Protocol):
    """Losses of sets of experts that stay, layer by layer."""

    def __call__(self, layer: int, keep: Sequence[int]) -> float:
        """Sum over batches of ‖Y - Y_keep‖_F, of the routed output Y of a decoder layer; layers are taken in order."""

    def settle(self, layer: int, keep: Sequence[int]) -> None:
        """Say what a layer will keep, for those after it."""


class _Captured:
    """What a layer's MoE block was given, batch by batch, and what its experts made of it."""

    def __init__(self, layer: ExpertLayer, given: Sequence[torch.Tensor]) -> None:
        self.layer, self._given_TH = layer, given
        self._whole_TH = [_routed(layer, given_TH) for given_TH in given]

    def loss(self, keep: Sequence[int]) -> float:
        """Distance of the routed output with some experts from that with all, added up over batches."""
        if len(keep) == self.layer.num_experts:
            return 0.0
        with Mask(self.layer, keep).applied():
            part_TH = [_routed(self.layer, given_TH) for given_TH in self._given_TH]
        return sum(
            float((whole.double() - part.double()).norm()) for whole, part in zip(self._whole_TH, part_TH, strict=True)
        )


def _routed(layer: ExpertLayer, given_TH: torch.Tensor) -> torch.Tensor:
    """The sum of the routed experts' weighted outputs, [T, H]."""
    outputs: list[torch.Tensor] = []

    def keep_output(_: nn.Module, __: object, output: torch.Tensor) -> None:
        outputs.append(output.reshape(given_TH.shape))

    hook = layer.experts.register_forward_hook(keep_output)
    try:
        layer.block(given_TH[None])
    finally:
        hook.remove()
    return outputs[0]


class _CaughtError(Exception):
    """The rest of the forward pass is of no interest."""


@contextlib.contextmanager
def _catching(
    layer: ExpertLayer, mask_BS: torch.Tensor, into: list[torch.Tensor], *, stop: bool = False
) -> Iterator[None]:
    """Append what the layer's MoE block is given for tokens that are no padding, [T, H]; end the pass with it."""

    def catch(_: nn.Module, args: tuple[torch.Tensor, ...], kwargs: Mapping[str, torch.Tensor]) -> None:
        hidden_BSH = args[0] if args else kwargs["hidden_states"]
        into.append(hidden_BSH[mask_BS.to(hidden_BSH.device).bool()])
        if stop:
            raise _CaughtError

    hook = layer.block.register_forward_pre_hook(catch, with_kwargs=True)
    try:
        with contextlib.suppress(_CaughtError):
            yield
    finally:
        hook.remove()


def first_batches(sequences: Sequences, batch_tokens: int, tokens: int = TOKENS) -> list[Inputs]:
    """Batches of the first documents, of about so many tokens.

    Raises:
        ConfigError: no document has two tokens.
    """
    chosen: list[Sequence[int]] = []
    for ids in sequences:
        if sum(map(len, chosen)) >= tokens:
            break
        chosen.append(ids)
    found = [{"input_ids": ids_BT, "attention_mask": mask_BT} for _, ids_BT, mask_BT in batches(chosen, batch_tokens)]
    if not found:
        raise ConfigError("there is no token to measure a layer's output on", "give calibration data")
    return found


class ResidentSubsetLoss:
    """Of a model that is in memory.

    Args:
        model: a transformers causal language model in evaluation mode; it is left as it is.
        sequences: token ids per document.
        batch_tokens: most tokens, padding included, in a batch.
        tokens: about how many tokens of the first documents to use.
        progressive: give a layer what it gets when the layers before it keep what was settled, not the original's.

    Example:
        >>> subset_loss = ResidentSubsetLoss(model, sequences)
        >>> subset_loss(0, (0, 2, 5, 7)) < subset_loss(0, (1, 3, 4, 6))
    """

    def __init__(
        self,
        model: PreTrainedModel,
        sequences: Sequences,
        batch_tokens: int = TOKENS,
        *,
        tokens: int = TOKENS,
        progressive: bool = False,
    ) -> None:
        self._model, self._progressive = model, progressive
        self._inputs = first_batches(sequences, batch_tokens, tokens)
        self._layers = {layer.index: layer for layer in expert_layers(model)}
        self._settled: dict[int, Mask] = {}
        self._now: _Captured | None = None

    def __call__(self, layer: int, keep: Sequence[int]) -> float:
        """See :class:`SubsetLoss`.

        Raises:
            PlanError: the model has no such MoE layer, or its router cannot work with these experts.
        """
        import torch

        with torch.inference_mode():
            if self._now is None or self._now.layer.index != layer:
                self._now = _Captured(_of(self._layers, layer), self._capture(layer))
            return self._now.loss(keep)

    def settle(self, layer: int, keep: Sequence[int]) -> None:
        """See :class:`SubsetLoss`."""
        if self._progressive:
            self._settled[layer] = Mask(_of(self._layers, layer), keep)
            self._now = None

    def _capture(self, layer: int) -> list[torch.Tensor]:
        given: list[torch.Tensor] = []
        before = [mask for index, mask in self._settled.items() if index < layer]
        for inputs in self._inputs:
            here = {name: value.to(self._model.device) for name, value in inputs.items()}
            with applied(before), _catching(_of(self._layers, layer), inputs["attention_mask"], given, stop=True):
                self._model(**here, use_cache=False)
        return given


class StreamedSubsetLoss:
    """Of a model that does not fit in memory, one layer of which is there at a time; layers can only be taken in order.

    Use it as a context manager, which takes the last layer out of memory.

    Args:
        stream: the checkpoint.
        sequences, batch_tokens, tokens, progressive: see :class:`ResidentSubsetLoss`.
        states: makes the store for the states of so many batches; by default they are in memory.

    Example:
        >>> with StreamedSubsetLoss(LayerStream(checkpoint, device=torch.device("cpu")), sequences) as subset_loss:
        ...     subset_loss(0, (0, 2, 5, 7))
    """

    def __init__(
        self,
        stream: LayerStream,
        sequences: Sequences,
        batch_tokens: int = TOKENS,
        *,
        tokens: int = TOKENS,
        progressive: bool = False,
        states: Callable[[int], States] = States,
    ) -> None:
        self._stream, self._progressive = stream, progressive
        self._inputs = first_batches(sequences, batch_tokens, tokens)
        self._states = states(len(self._inputs))
        self._layers = {layer.index: layer for layer in expert_layers(stream.model)}
        self._settled: dict[int, Sequence[int]] = {}
        self._in_memory = contextlib.ExitStack()
        self._at = -1  # the layer that is in memory
        self._now: _Captured | None = None

    def __enter__(self) -> Self:
        """Start with nothing in memory."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Take the last layer out of memory."""
        self._now = None
        self._in_memory.close()

    def __call__(self, layer: int, keep: Sequence[int]) -> float:
        """See :class:`SubsetLoss`.

        Raises:
            PlanError: the model has no such MoE layer, its router cannot work with these experts, or the layer was
                passed already.
            CheckpointError: a file cannot be read; the message names it.
        """
        import torch

        with torch.inference_mode():
            if self._now is None or self._now.layer.index != layer:
                self._go_to(layer)
                self._now = _Captured(_of(self._layers, layer), self._capture(layer))
            return self._now.loss(keep)

    def settle(self, layer: int, keep: Sequence[int]) -> None:
        """See :class:`SubsetLoss`."""
        if self._progressive:
            self._settled[layer] = keep

    def _go_to(self, layer: int) -> None:
        """Have a layer in memory, and in the states what it is given."""
        _of(self._layers, layer)
        if layer < self._at:
            raise PlanError(f"layer {layer} was passed already", "take the layers in order")
        if self._at < 0:
            self._stream.embed(self._inputs, self._states)
        while self._at < layer:
            if self._at >= 0:
                self._pass()
            self._in_memory.close()
            self._at += 1
            self._in_memory.enter_context(self._stream.layer(self._at))

    def _pass(self) -> None:
        """Run the layer that is in memory, with what was settled for it."""
        keep = self._settled.get(self._at)
        with applied([Mask(self._layers[self._at], keep)] if keep is not None else []):
            for number, inputs in enumerate(self._inputs):
                self._states.put(number, self._stream.run(self._at, self._states.get(number), inputs))
        self._states.turn()

    def _capture(self, layer: int) -> list[torch.Tensor]:
        given: list[torch.Tensor] = []
        for number, inputs in enumerate(self._inputs):
            with _catching(self._layers[layer], inputs["attention_mask"], given):
                self._stream.run(layer, self._states.get(number), inputs)
        return given


def _of(layers: Mapping[int, ExpertLayer], index: int) -> ExpertLayer:
    if index not in layers:
        raise PlanError(f"the model has no MoE layer {index}", f"it has {sorted(layers)}")
    return layers[index]
