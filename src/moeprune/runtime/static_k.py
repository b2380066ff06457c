"""How much each layer's output changes when every token runs fewer of its slots (LExI, arXiv:2509.02753)."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from moeprune._files import progress
from moeprune.experts import ExpertLayer, expert_layers, slot_rows
from moeprune.runtime.skipping import Boundary
from moeprune.streaming.states import States
from moeprune.streaming.stream import LayerStream

if TYPE_CHECKING:
    import numpy.typing as npt
    import torch

    Errors = npt.NDArray[np.float64]


class _SlotErrors(Boundary):
    """Runs a layer whole and adds up what is missing when only the k best slots of every token run, for every k."""

    def __init__(self, layer: ExpertLayer) -> None:
        super().__init__(layer)
        self.valid_T: torch.Tensor | None = None
        self.squares: Errors = np.zeros(0)

    def run(self, hidden_TH: torch.Tensor, index_TK: torch.Tensor, gates_TK: torch.Tensor) -> torch.Tensor:
        """In the place of the experts."""
        import torch

        assert self.below is not None and self.valid_T is not None  # noqa: S101, PT018 - both are set
        top_k = index_TK.shape[-1]
        step = max(1, slot_rows(hidden_TH.shape[-1], self.layer.num_experts, hidden_TH.device.type) // top_k)
        order_TK = gates_TK.argsort(dim=-1, descending=True, stable=True)
        sorted_TK = (index_TK.gather(-1, order_TK), gates_TK.gather(-1, order_TK))
        parts = (torch.split(part, step) for part in (hidden_TH, *sorted_TK, self.valid_T.to(hidden_TH.device)))
        for hidden, index, gates, valid in zip(*parts, strict=True):
            ones_R1 = torch.ones_like(gates).reshape(-1, 1)
            rows_RH = self.below(hidden.repeat_interleave(top_k, dim=0), index.reshape(-1, 1), ones_R1)
            slots_TKH = rows_RH.view(*index.shape, -1).float() * gates[..., None].float()
            missing_TKH = slots_TKH.flip(1).cumsum(1).flip(1)[valid]  # of slot k and all after it
            squares_K = missing_TKH.double().square().sum(dim=(0, 2)).cpu().numpy()
            self.squares = squares_K if not self.squares.size else self.squares + squares_K
        return self.below(hidden_TH, index_TK, gates_TK)


def slot_errors(
    stream: LayerStream,
    batches: Sequence[dict[str, Any]],
    states: Callable[[], contextlib.AbstractContextManager[States]],
) -> dict[int, Errors]:
    """Squared change of each layer's routed output when its tokens run only k slots, for k from 0 to K - 1.

    Args:
        stream: the checkpoint.
        batches: ``input_ids`` and ``attention_mask`` [B, S] of each batch.
        states: where the hidden states live in between; one place for each batch.

    Returns:
        By decoder layer, relative to the square of the whole output: the first one is 1.
    """
    import torch

    layers = {layer.index: layer for layer in expert_layers(stream.model)}
    found: dict[int, Errors] = {}
    with states() as held, torch.inference_mode():
        stream.embed(batches, held)
        for index in progress(range(stream.depth), "measuring", unit="layer"):
            errors = _SlotErrors(layers[index]) if index in layers else None
            with stream.layer(index), errors.applied() if errors else contextlib.nullcontext():
                for number, inputs in enumerate(batches):
                    if errors:
                        errors.valid_T = inputs["attention_mask"].reshape(-1).bool()
                    held.put(number, stream.run(index, held.get(number), inputs))
            if errors:
                found[index] = errors.squares / max(errors.squares[0], 1e-30)
            stream.trim()
            held.turn()
    return found


def shared_out(errors: Mapping[int, Errors], slots: int) -> dict[int, int]:
    """How many slots every layer's tokens run, so that the errors add up to the least: exact, by dynamic programming.

    Args:
        errors: by layer, of running k slots, for k from 0 to K - 1; K slots have none.
        slots: to be shared out over the layers, from one to K for each of them.
    """
    best: dict[int, tuple[float, tuple[int, ...]]] = {0: (0.0, ())}
    for of_layer in errors.values():
        costs = [*of_layer[1:], 0.0]
        reached: dict[int, tuple[float, tuple[int, ...]]] = {}
        for used, (cost, chosen) in best.items():
            for k, own in enumerate(costs, 1):
                candidate = (cost + float(own), (*chosen, k))
                if used + k not in reached or candidate < reached[used + k]:
                    reached[used + k] = candidate
        best = reached
    return dict(zip(errors, best[slots][1], strict=True))
