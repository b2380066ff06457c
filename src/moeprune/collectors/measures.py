"""What is measured at the experts boundary beyond the core sums: what a statistic is shown, and the built-in ones.

Shapes: T tokens without padding, K experts per token (top-k), E experts, H hidden size, I inner size of an expert.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from moeprune.catalogue import known
from moeprune.collectors.weights import ExpertWeights, weights_of
from moeprune.sketches import BINS

if TYPE_CHECKING:
    import torch
    from torch import nn

    from moeprune.collectors.weights import Loader

_PIECE = 1 << 22  # elements that are widened at a time


class Slots:
    """What the experts of one layer do with some tokens; padding is left out.

    Attributes:
        hidden_TH: input of the experts.
        experts_TK: which experts were chosen; gates_TK: the weights that the model really multiplied their outputs by.
        outputs_TKH: outputs of the chosen experts, not multiplied.
        routed_TH: what they add up to.
        residual_TH: residual stream that the block's output is added to, for statistics whose point is ``residual``.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        hidden_TH: torch.Tensor,
        experts_TK: torch.Tensor,
        gates_TK: torch.Tensor,
        outputs_TKH: torch.Tensor,
        routed_TH: torch.Tensor,
        residual_TH: torch.Tensor | None = None,
        loader: Loader | None = None,
    ) -> None:
        self.hidden_TH = hidden_TH
        self.experts_TK = experts_TK
        self.gates_TK = gates_TK.float()
        self.outputs_TKH = outputs_TKH
        self.routed_TH = routed_TH
        self.residual_TH = residual_TH
        self._module: Any = module
        self._loader = loader

    @property
    def num_experts(self) -> int:
        """How many experts the layer has."""
        return int(self._module.num_experts)

    @functools.cached_property
    def norms_TK(self) -> torch.Tensor:  # noqa: N802 - a tensor with its shape
        """Norms of the outputs."""
        import torch

        pieces = torch.split(self.outputs_TKH, _rows_of(self.outputs_TKH))
        return torch.cat([torch.linalg.vector_norm(piece.float(), dim=-1) for piece in pieces])

    @functools.cached_property
    def shares_TK(self) -> torch.Tensor:  # noqa: N802 - a tensor with its shape
        """What each slot has of the sum of its token's gates, the largest first."""
        shares_TK = self.gates_TK / self.gates_TK.sum(dim=-1, keepdim=True).clamp_min(1e-30)
        return shares_TK.sort(dim=-1, descending=True).values

    @functools.cached_property
    def gates_TE(self) -> torch.Tensor:  # noqa: N802 - a tensor with its shape
        """The gate of every expert, 0 where the token was not routed to it."""
        gates_TE = self.gates_TK.new_zeros((len(self.gates_TK), self.num_experts))
        return gates_TE.scatter_(1, self.experts_TK, self.gates_TK)

    def by_expert(self, values: torch.Tensor) -> torch.Tensor:
        """Add values [T, K, ...] of the slots up by expert, [E, ...] in float64."""
        import torch

        total = torch.zeros((self.num_experts, *values.shape[2:]), dtype=torch.float64, device=values.device)
        return total.index_add_(0, self.experts_TK.reshape(-1), values.flatten(0, 1).double())

    def weights(self) -> Iterator[tuple[int, ExpertWeights]]:
        """The experts with their weights, one after another.

        Raises:
            UnsupportedModelError: they are packed, or no gate, up and down projection.
        """
        return weights_of(self._module, self._loader)


def slots_of(module: nn.Module, valid_T: torch.Tensor | None, *, loader: Loader | None, **rows: torch.Tensor) -> Slots:
    """What a statistic is shown of tokens some of which are padding."""
    if valid_T is not None:
        kept = valid_T.nonzero().squeeze(1)
        rows = {name: values[kept] for name, values in rows.items()}
    return Slots(module, loader=loader, **rows)


def _rows_of(values: torch.Tensor) -> int:
    """Rows of the first axis that are widened at a time."""
    return max(1, _PIECE // max(1, values[0].numel() if len(values) else 1))


# --- the built-in ones ------------------------------------------------------------------------------------------------


def easy_ep(slots: Slots) -> torch.Tensor:
    """Gated norms weighted by how far the experts turn the residual stream (arXiv:2504.06792)."""
    import torch

    assert slots.residual_TH is not None  # noqa: S101 - its point is the residual stream
    step = _rows_of(slots.routed_TH)
    turned = []
    for before, routed in zip(torch.split(slots.residual_TH, step), torch.split(slots.routed_TH, step), strict=True):
        wide = before.double()
        turned.append(1 - torch.nn.functional.cosine_similarity(wide, wide + routed.double(), dim=-1))
    turned_T1 = torch.cat(turned).clamp(min=0)[:, None]
    return slots.by_expert(turned_T1 * slots.gates_TK * slots.norms_TK)


def gated_in_sq(slots: Slots) -> torch.Tensor:
    """Squares of the gated input, by element (arXiv:2410.12013)."""
    return slots.gates_TE.square().T @ slots.hidden_TH.float().square()


def gated_mid_sq(slots: Slots) -> torch.Tensor:
    """Squares of the gated input of the down projection, by element (arXiv:2410.12013)."""
    import torch

    rows = []
    for expert, weights in slots.weights():
        token_R, slot_R = (slots.experts_TK == expert).nonzero(as_tuple=True)
        inner_RI = weights.inner(slots.hidden_TH[token_R]).float()
        rows.append((slots.gates_TK[token_R, slot_R, None] * inner_RI).square().sum(dim=0))
    return torch.stack(rows)


def share_hist(slots: Slots) -> torch.Tensor:
    """Shares of the slots in the sum of their token's gates, but for its top slot."""
    return _sketch(slots.shares_TK[:, 1:])


def ratio_hist(slots: Slots) -> torch.Tensor:
    """Ratios of the slots to their token's top slot, but for itself."""
    return _sketch(slots.shares_TK[:, 1:] / slots.shares_TK[:, :1].clamp_min(1e-30))


def mass_hist(slots: Slots) -> torch.Tensor:
    """What the larger slots of the token leave of its gates, but for its top slot."""
    before_TK = slots.shares_TK.cumsum(dim=-1) - slots.shares_TK
    return _sketch(1 - before_TK[:, 1:])


def score_hist(logits_TE: torch.Tensor, experts_TK: torch.Tensor) -> torch.Tensor:
    """Logits of the chosen experts, mapped to (0, 1)."""
    chosen_TK = logits_TE.float().gather(1, experts_TK)
    return _sketch((1 + chosen_TK / (1 + chosen_TK.abs())) / 2)


def _sketch(values: torch.Tensor) -> torch.Tensor:
    """What :func:`moeprune.sketches.sketch` counts."""
    import torch

    places = (values.reshape(-1) * BINS).long().clamp(0, BINS - 1)
    return torch.bincount(places, minlength=BINS)


def gated_output(slots: Slots) -> torch.Tensor:
    """Gated outputs, by element (arXiv:2604.04356)."""
    import torch

    step, hidden = _rows_of(slots.outputs_TKH), slots.outputs_TKH.shape[-1]
    total_EH = slots.gates_TK.new_zeros((slots.num_experts, hidden), dtype=torch.float64)
    parts = (torch.split(part, step) for part in (slots.experts_TK, slots.gates_TK, slots.outputs_TKH))
    for experts_RK, gates_RK, outputs_RKH in zip(*parts, strict=True):
        gated_RKH = gates_RK[..., None] * outputs_RKH.float()
        total_EH.index_add_(0, experts_RK.reshape(-1), gated_RKH.flatten(0, 1).double())
    return total_EH


def output_of_all(slots: Slots) -> torch.Tensor:
    """Outputs of every expert for every token, by element (arXiv:2410.08589)."""
    import torch

    step, rows = _rows_of(slots.hidden_TH), []
    for _, weights in slots.weights():
        outputs = (weights.output(part_RH) for part_RH in torch.split(slots.hidden_TH, step))
        rows.append(sum(output_RH.sum(dim=0, dtype=torch.float64) for output_RH in outputs))
    return torch.stack(rows)  # type: ignore[arg-type]


def logit_products(logits_TE: torch.Tensor) -> torch.Tensor:
    """Inner products of the experts' logits over tokens (arXiv:2310.01334)."""
    wide_TE = logits_TE.double()
    return wide_TE.T @ wide_TE


_BUILTIN: Mapping[str, Callable[[Any], torch.Tensor]] = {
    "easy_ep_sum": easy_ep,
    "gated_in_sq_sum": gated_in_sq,
    "gated_mid_sq_sum": gated_mid_sq,
    "gated_output_sum": gated_output,
    "output_sum_all": output_of_all,
    "logit_gram": logit_products,
    "share_hist": share_hist,
    "ratio_hist": ratio_hist,
    "mass_hist": mass_hist,
}


def measure_of(name: str) -> Callable[[Any], Any] | None:
    """The function that measures a statistic; None for what is measured otherwise."""
    return _BUILTIN.get(name) or known(name).measure
