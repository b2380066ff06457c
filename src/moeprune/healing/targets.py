"""What the layers of a healed model are fitted to: what the original's give, as whatever comes next sees it.

A layer's output goes through a norm into the next layer, so that an error is measured behind that norm: of an error
along the hidden state itself nothing is left there. Behind the last layer stand the logits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from moeprune.streaming.stream import LayerStream

if TYPE_CHECKING:
    import torch

    Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # mean over tokens of both outputs, [N, H] each

_PIECE = 1 << 24  # logits that are in memory at a time
_NORM = ".input_layernorm.weight"  # of a decoder layer, in every family that transformers has
_EPSILON = 1e-6


def hidden_loss(base: LayerStream, index: int) -> Loss:
    """Mean squared difference of two outputs of a layer behind the norm that the original's next layer begins with."""
    norm = _next_norm(base, index)

    def loss(out_NH: torch.Tensor, wanted_NH: torch.Tensor) -> torch.Tensor:
        return (norm(out_NH) - norm(wanted_NH)).square().mean()

    return loss


def _next_norm(base: LayerStream, index: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """The first norm of a layer that is not in memory; division by the root mean square where there is none."""
    from safetensors import safe_open
    from torch.func import functional_call

    pieces = [piece for piece in base.weights.pieces(index + 1) if piece.parameter.endswith(_NORM)]
    if len(pieces) != 1 or "" not in pieces[0].stored:
        return _plain_norm
    entry, name = pieces[0].stored[""], pieces[0].parameter.removesuffix(".weight")
    with safe_open(entry.file, framework="pt") as file:
        weight_H = file.get_tensor(entry.name).to(base.device, base.model.dtype)
    module = base.model.get_submodule(name)
    return lambda hidden_NH: functional_call(module, {"weight": weight_H}, (hidden_NH,))


def _plain_norm(hidden_NH: torch.Tensor) -> torch.Tensor:
    return hidden_NH / (hidden_NH.square().mean(-1, keepdim=True) + _EPSILON).sqrt()


def divergence(base: LayerStream, given: LayerStream) -> Loss:
    """Mean KL(original || model) of the next-token distributions, in nats; both heads must be in memory.

    A piece of the logits is there at a time, in the backward pass too.
    """
    import torch
    from torch.utils.checkpoint import checkpoint

    rows = max(1, _PIECE // int(base.model.config.get_text_config().vocab_size))

    def of_piece(out_NH: torch.Tensor, wanted_NH: torch.Tensor) -> torch.Tensor:
        base_NV, given_NV = _log_probabilities(base, wanted_NH), _log_probabilities(given, out_NH)
        return (base_NV.exp() * (base_NV - given_NV)).sum()

    def loss(out_NH: torch.Tensor, wanted_NH: torch.Tensor) -> torch.Tensor:
        pieces = zip(torch.split(out_NH, rows), torch.split(wanted_NH, rows), strict=True)
        total: Iterator[torch.Tensor] = (checkpoint(of_piece, *piece, use_reentrant=False) for piece in pieces)
        return sum(total, out_NH.new_zeros(())) / len(out_NH)

    return loss


def _log_probabilities(stream: LayerStream, hidden_NH: torch.Tensor) -> torch.Tensor:
    import torch

    count = len(hidden_NH)
    mask_1N = torch.ones((1, count), dtype=torch.long)
    logits_1NV = stream.logits((hidden_NH[None],), {"attention_mask": mask_1N}, torch.arange(count))
    return logits_1NV[0].float().log_softmax(-1)
