"""Accumulators: what one layer adds up over the slots of a batch.

Shapes: T tokens, K experts per token (top-k), E experts, H hidden size. Everything is added in float64 on the layer's
own device, without a synchronisation per batch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from moeprune.errors import MoePruneError
from moeprune.statistics import AnyArray

if TYPE_CHECKING:
    import torch

_COLUMNS = ("gate_sum", "gate_sq_sum", "norm_sum", "norm_sq_sum", "gated_norm_sum", "gated_norm_sq_sum")
_CHUNK = 1 << 24  # elements of the expert outputs that are widened to float32 at a time: 64 MB


class LayerSums:
    """Running sums of one layer and one domain."""

    def __init__(self, num_experts: int, device: torch.device) -> None:
        import torch

        def zeros(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self.num_experts = num_experts
        self.top_k = 0
        self.tokens = 0
        self._count = zeros(num_experts, dtype=torch.int64)
        self._columns = zeros(num_experts, len(_COLUMNS))
        self._peak = zeros(num_experts)
        self._soft_prob = zeros(num_experts)
        self._pair_count = zeros(num_experts**2, dtype=torch.int64)
        self._pairs = zeros(num_experts**2, 2)  # product of gated norms, inner product of gated outputs

    def add_logits(self, logits_TE: torch.Tensor, valid_T: torch.Tensor | None) -> None:
        """Add the router's raw logits; ``valid_T`` leaves padding out."""
        prob_TE = logits_TE.float().softmax(dim=-1)
        self._soft_prob += (prob_TE if valid_T is None else prob_TE[valid_T]).sum(dim=0, dtype=self._soft_prob.dtype)

    def add_slots(
        self,
        outputs_TKH: torch.Tensor,
        experts_TK: torch.Tensor,
        gates_TK: torch.Tensor,
        valid_T: torch.Tensor | None,
    ) -> None:
        """Add the un-gated expert outputs with the experts and gates that were used; ``valid_T`` leaves padding out."""
        tokens, top_k, hidden = outputs_TKH.shape
        self.top_k = top_k
        step = max(1, _CHUNK // (top_k * hidden))
        for start in range(0, tokens, step):
            rows = slice(start, start + step)
            chunk = None if valid_T is None else valid_T[rows]
            self._add_chunk(outputs_TKH[rows].float(), experts_TK[rows], gates_TK[rows].float(), chunk)

    def _add_chunk(
        self, outputs_TKH: torch.Tensor, experts_TK: torch.Tensor, gate_TK: torch.Tensor, valid_T: torch.Tensor | None
    ) -> None:
        """Reduce over the hidden size first and drop padding afterwards: the wide tensor is never copied."""
        import torch

        norm_TK = torch.linalg.vector_norm(outputs_TKH, dim=-1)
        peak_TK = torch.maximum(outputs_TKH.amax(dim=-1), -outputs_TKH.amin(dim=-1))
        inner_TKK = torch.bmm(outputs_TKH, outputs_TKH.transpose(1, 2))
        if valid_T is not None:
            kept = (values[valid_T] for values in (experts_TK, gate_TK, norm_TK, peak_TK, inner_TKK))
            experts_TK, gate_TK, norm_TK, peak_TK, inner_TKK = kept
        self.tokens += len(experts_TK)
        experts = experts_TK.reshape(-1)
        gated_TK = gate_TK * norm_TK
        columns = torch.stack((gate_TK, gate_TK**2, norm_TK, norm_TK**2, gated_TK, gated_TK**2), dim=-1)
        self._columns.index_add_(0, experts, columns.reshape(-1, len(_COLUMNS)).double())
        self._count += torch.bincount(experts, minlength=self.num_experts)
        self._peak.scatter_reduce_(0, experts, peak_TK.reshape(-1).double(), "amax")
        pair = (experts_TK[:, :, None] * self.num_experts + experts_TK[:, None, :]).reshape(-1)
        norms_TKK = gated_TK[:, :, None] * gated_TK[:, None, :]
        inner_TKK = inner_TKK * gate_TK[:, :, None] * gate_TK[:, None, :]
        self._pairs.index_add_(0, pair, torch.stack((norms_TKK, inner_TKK), dim=-1).reshape(-1, 2).double())
        self._pair_count += torch.bincount(pair, minlength=self.num_experts**2)

    def arrays(self) -> dict[str, AnyArray]:
        """The sums as numpy arrays by statistic name.

        Raises:
            MoePruneError: the counts do not add up to tokens x top-k.
        """
        square = (self.num_experts, self.num_experts)
        columns = self._columns.cpu().numpy()
        pairs = self._pairs.cpu().numpy()
        arrays: dict[str, AnyArray] = {
            "tokens": np.array(self.tokens, dtype=np.int64),
            "count": self._count.cpu().numpy(),
            "soft_prob_sum": self._soft_prob.cpu().numpy(),
            "max_abs_down": self._peak.cpu().numpy(),
            "pair_count": self._pair_count.cpu().numpy().reshape(square),
            "pair_gated_norm": pairs[:, 0].reshape(square),
            "gram": pairs[:, 1].reshape(square),
        } | {name: columns[:, column] for column, name in enumerate(_COLUMNS)}
        if (
            arrays["count"].sum() != self.tokens * self.top_k
            or (arrays["count"] != arrays["pair_count"].diagonal()).any()
        ):
            raise MoePruneError(
                f"counts add up to {arrays['count'].sum()}, not to {self.tokens} tokens x top-{self.top_k}",
                "this is a defect of moeprune or of the model's code: please report it",
            )
        return arrays
