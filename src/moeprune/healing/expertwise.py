"""Fit each expert of a sparsified model to the expert that it was, while its layer is fitted to the original's.

MoE-Pruner (arXiv:2410.12013) adds to a model's loss the squared differences between the outputs of its experts and of
the experts that they were made from. Here it is added to the loss of one layer, so that a layer of both models is in
memory and no more. Shapes: T tokens, K experts per token, R = T K slots, H hidden size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from moeprune.errors import ConfigError
from moeprune.experts import ExpertLayer, expert_layers
from moeprune.healing.fitting import Fitted
from moeprune.healing.layerwise import LayerwiseHealing
from moeprune.runtime.skipping import Boundary
from moeprune.streaming.stream import LayerStream

if TYPE_CHECKING:
    import torch

    from moeprune.healing.layerwise import Parameters

_NOTHING = 1e-10  # a mean squared difference that no weight was lost for


class Beside(Boundary):
    """Runs a layer's experts slot by slot, and the original's on the same inputs.

    Args:
        layer: the modules that are trained.
        original: those that they were made from, in memory too.

    Attributes:
        difference: of the two experts' outputs in the last run, squared, mean over slots that are no padding.
        mask_T: which tokens are no padding, for the next run.
    """

    def __init__(self, layer: ExpertLayer, original: ExpertLayer) -> None:
        super().__init__(layer)
        self._original = original
        self.mask_T: torch.Tensor | None = None
        self.difference: torch.Tensor | None = None

    def run(self, hidden_TH: torch.Tensor, index_TK: torch.Tensor, gates_TK: torch.Tensor) -> torch.Tensor:
        """In the place of the experts."""
        import torch

        assert self.below is not None  # noqa: S101 - it stands before the experts
        assert self.mask_T is not None  # noqa: S101 - and was told
        tokens, top_k = index_TK.shape
        inputs_RH, index_R1 = hidden_TH.repeat_interleave(top_k, dim=0), index_TK.reshape(-1, 1)
        ones_R1 = gates_TK.new_ones(index_R1.shape)
        rows_RH = self.below(inputs_RH, index_R1, ones_R1)
        with torch.no_grad():
            wanted_RH = self._original.experts(inputs_RH, index_R1, ones_R1)
        real_R = self.mask_T.to(hidden_TH.device).repeat_interleave(top_k)
        self.difference = (rows_RH - wanted_RH)[real_R].square().mean()
        summed_TH = (rows_RH.view(tokens, top_k, -1) * gates_TK[..., None]).sum(dim=1)
        return summed_TH.to(hidden_TH.dtype)


class ExpertwiseHealing(LayerwiseHealing):
    """Both models side by side; what is minimised in a layer is its own loss and, as much again, its experts'.

    The weight of the experts' part is set, as in the paper, so that both are equal before the first step. Which
    weights are best is still told by the layer's output on held-out text.
    """

    keeps_original = True

    def _search(
        self,
        index: int,
        parameters: Parameters,
        loss: Callable[[int], torch.Tensor],
        held_out: Callable[[], float],
    ) -> Fitted:
        if index not in self._experts:
            return super()._search(index, parameters, loss, held_out)
        [original] = [layer for layer in expert_layers(self._base.model) if layer.index == index]
        beside = Beside(self._experts[index], original)
        weight = self._weight(beside, loss)

        def both(number: int) -> torch.Tensor:
            whole, experts = self._both(beside, loss, number)
            return whole + weight * experts

        return super()._search(index, parameters, both, held_out)

    def _weight(self, beside: Beside, loss: Callable[[int], torch.Tensor]) -> float:
        """What makes the two losses equal on the held-out text, with the weights as they are given."""
        import torch

        with torch.no_grad():
            whole, experts = (
                self._mean(lambda number, part=part: self._both(beside, loss, number)[part]) for part in (0, 1)
            )
        return whole / experts if experts > _NOTHING else 0.0

    def _both(
        self, beside: Beside, loss: Callable[[int], torch.Tensor], number: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The loss of the layer's output on a batch, and that of its experts' outputs."""
        beside.mask_T = self._batches[number]["attention_mask"].reshape(-1).bool()
        with beside.applied():
            whole = loss(number)
        assert beside.difference is not None  # noqa: S101 - every layer with experts runs them
        return whole, beside.difference


def check_one_to_one(base: LayerStream, given: LayerStream) -> None:
    """Refuse two models whose experts do not correspond one to one.

    Raises:
        ConfigError: they have different numbers of experts.
    """
    counts = [[layer.num_experts for layer in expert_layers(stream.model)] for stream in (base, given)]
    if counts[0] != counts[1]:
        raise ConfigError(
            f"the original has {max(counts[0], default=0)} experts in a layer and the other model "
            f"{max(counts[1], default=0)}: it cannot be told which was made from which",
            "--method experts is for what moeprune sparsify wrote; take --method layerwise, or give the model that was "
            "sparsified as BASE",
        )
