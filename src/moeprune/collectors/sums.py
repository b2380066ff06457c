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

    def add_logits(self, logits_TE: torch.Tensor) -> None:
        """Add the router's raw logits of the valid tokens."""
        self._soft_prob += logits_TE.float().softmax(dim=-1).sum(dim=0, dtype=self._soft_prob.dtype)

    def add_slots(self, outputs_TKH: torch.Tensor, experts_TK: torch.Tensor, gates_TK: torch.Tensor) -> None:
        """Add the un-gated expert outputs of the valid tokens, with the experts and gates the model used."""
        import torch

        self.tokens += outputs_TKH.shape[0]
        self.top_k = outputs_TKH.shape[1]
        experts = experts_TK.reshape(-1)
        gate = gates_TK.float()
        norm = torch.linalg.vector_norm(outputs_TKH, dim=-1, dtype=torch.float32)
        gated_norm = gate * norm
        columns = torch.stack((gate, gate**2, norm, norm**2, gated_norm, gated_norm**2), dim=-1)
        self._columns.index_add_(0, experts, columns.reshape(-1, len(_COLUMNS)).double())
        self._count += torch.bincount(experts, minlength=self.num_experts)
        peak = torch.linalg.vector_norm(outputs_TKH, ord=float("inf"), dim=-1, dtype=torch.float32)
        self._peak.scatter_reduce_(0, experts, peak.reshape(-1).double(), "amax")
        self._add_pairs(outputs_TKH, experts_TK, gate, gated_norm)

    def _add_pairs(
        self, outputs_TKH: torch.Tensor, experts_TK: torch.Tensor, gate_TK: torch.Tensor, gated_norm_TK: torch.Tensor
    ) -> None:
        import torch

        pair = (experts_TK[:, :, None] * self.num_experts + experts_TK[:, None, :]).reshape(-1)
        gated_TKH = outputs_TKH.float() * gate_TK[:, :, None]
        inner_TKK = gated_TKH @ gated_TKH.transpose(1, 2)
        norms_TKK = gated_norm_TK[:, :, None] * gated_norm_TK[:, None, :]
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
