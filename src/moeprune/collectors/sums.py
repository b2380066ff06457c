"""Accumulators: what one layer adds up over the slots of a batch.

Shapes: T tokens, K experts per token (top-k), E experts, H hidden size. Everything is added in float64 on the layer's
own device, without a synchronisation per batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from moeprune.catalogue import known
from moeprune.errors import ConfigError, MoePruneError
from moeprune.statistics import AnyArray

if TYPE_CHECKING:
    import torch

_COLUMNS = ("gate_sum", "gate_sq_sum", "norm_sum", "norm_sq_sum", "gated_norm_sum", "gated_norm_sq_sum")
_CHUNK = {True: 1 << 19, False: 1 << 25}  # elements that are widened to float32 at a time, on a CPU and elsewhere


class LayerSums:
    """Running sums of one layer and one domain.

    Every sum has one place more than there are experts: padding is added there and thrown away, which is cheaper than
    picking the valid rows out of every tensor.

    Args:
        num_experts: how many there are.
        device: where the layer is.
        more: shapes of the statistics beyond the core ones, which :meth:`add` is for.
    """

    def __init__(
        self, num_experts: int, device: torch.device, more: Mapping[str, tuple[int, ...]] | None = None
    ) -> None:
        import torch

        def zeros(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self.num_experts = num_experts
        self.top_k = 0
        self._places = num_experts + 1
        self._tokens = zeros(dtype=torch.int64)
        self._count = zeros(self._places, dtype=torch.int64)
        self._columns = zeros(len(_COLUMNS), self._places)
        self._peak = zeros(self._places)
        self._soft_prob = zeros(num_experts)
        self._pair_count = zeros(self._places**2, dtype=torch.int64)
        self._pairs = zeros(2, self._places**2)  # product of gated norms, inner product of gated outputs
        self._more = {
            name: zeros(*shape, dtype=torch.int64 if known(name).integer else torch.float64)
            for name, shape in (more or {}).items()
        }

    @property
    def tokens(self) -> int:
        """Tokens seen, padding left out."""
        return int(self._tokens)

    def add_logits(self, logits_TE: torch.Tensor, valid_T: torch.Tensor | None) -> None:
        """Add the router's raw logits; ``valid_T`` leaves padding out."""
        prob_TE = logits_TE.float().softmax(dim=-1)
        if valid_T is not None:
            prob_TE = prob_TE.masked_fill(~valid_T[:, None], 0.0)
        self._soft_prob += prob_TE.sum(dim=0, dtype=self._soft_prob.dtype)

    def add_slots(
        self,
        outputs_TKH: torch.Tensor,
        experts_TK: torch.Tensor,
        gates_TK: torch.Tensor,
        valid_T: torch.Tensor | None,
    ) -> None:
        """Add the un-gated expert outputs with the experts and gates that were used; ``valid_T`` leaves padding out."""
        import torch

        self.top_k = outputs_TKH.shape[1]
        norm_TK, peak_TK, inner_TKK = _reduce(outputs_TKH)
        self._tokens += len(outputs_TKH) if valid_T is None else valid_T.sum()
        if valid_T is not None:
            experts_TK = experts_TK.masked_fill(~valid_T[:, None], self.num_experts)
        experts, gate_TK = experts_TK.reshape(-1), gates_TK.float()
        gated_TK = gate_TK * norm_TK
        columns = (gate_TK, gate_TK**2, norm_TK, norm_TK**2, gated_TK, gated_TK**2)
        for total, values_TK in zip(self._columns, columns, strict=True):
            total.index_add_(0, experts, values_TK.reshape(-1).double())
        self._count += torch.bincount(experts, minlength=self._places)
        self._peak.scatter_reduce_(0, experts, peak_TK.reshape(-1).double(), "amax")
        pair = (experts_TK[:, :, None] * self._places + experts_TK[:, None, :]).reshape(-1)
        products = (
            gated_TK[:, :, None] * gated_TK[:, None, :],
            inner_TKK * gate_TK[:, :, None] * gate_TK[:, None, :],
        )
        for total, values_TKK in zip(self._pairs, products, strict=True):
            total.index_add_(0, pair, values_TKK.reshape(-1).double())
        self._pair_count += torch.bincount(pair, minlength=self._places**2)

    def add(self, name: str, value: torch.Tensor) -> None:
        """Add what was measured on some tokens to a statistic beyond the core ones.

        Raises:
            ConfigError: it is not of the shape that the statistic says.
        """
        import torch

        total = self._more[name]
        if value.shape != total.shape:
            raise ConfigError(
                f"the statistic {name!r} gave an array of shape {tuple(value.shape)}, not of {tuple(total.shape)}",
                f"its axes are {known(name).axes!r}",
            )
        value = value.to(device=total.device, dtype=total.dtype)
        if known(name).merge == "max":
            torch.maximum(total, value, out=total)
        else:
            total += value

    def arrays(self) -> dict[str, AnyArray]:
        """The sums as numpy arrays by statistic name.

        Raises:
            MoePruneError: the counts do not add up to tokens x top-k, or a sum is not finite.
        """
        count = self.num_experts
        columns = self._columns.cpu().numpy()

        def square(values: torch.Tensor) -> AnyArray:
            return np.ascontiguousarray(values.view(self._places, self._places)[:count, :count].cpu().numpy())

        arrays: dict[str, AnyArray] = {
            "tokens": np.array(self.tokens, dtype=np.int64),
            "count": self._count[:count].cpu().numpy(),
            "soft_prob_sum": self._soft_prob.cpu().numpy(),
            "max_abs_down": self._peak[:count].cpu().numpy(),
            "pair_count": square(self._pair_count),
            "pair_gated_norm": square(self._pairs[0]),
            "gram": square(self._pairs[1]),
        } | {name: values[:count] for name, values in zip(_COLUMNS, columns, strict=True)}
        arrays |= {name: total.cpu().numpy() for name, total in self._more.items()}
        self._check(arrays)
        return arrays

    def _check(self, arrays: Mapping[str, AnyArray]) -> None:
        for name in self._more:
            if not np.isfinite(arrays[name]).all():
                hint = "leave it out of --statistics"
                raise MoePruneError(f"the statistic {name!r} gave numbers that are not finite", hint)
        if (
            arrays["count"].sum() != self.tokens * self.top_k
            or (arrays["count"] != arrays["pair_count"].diagonal()).any()
        ):
            raise MoePruneError(
                f"counts add up to {arrays['count'].sum()}, not to {self.tokens} tokens x top-{self.top_k}",
                "this is a defect of moeprune or of the model's code: please report it",
            )


def _reduce(outputs_TKH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Norm [T, K], largest absolute element [T, K] and inner products [T, K, K], in float32.

    A few tokens at a time, so that the widened outputs stay in a processor's cache and never cost much memory.
    """
    import torch

    tokens, top_k, hidden = outputs_TKH.shape
    step = max(1, _CHUNK[outputs_TKH.device.type == "cpu"] // (top_k * hidden))
    parts = []
    for start in range(0, max(tokens, 1), step):
        wide_TKH = outputs_TKH[start : start + step].float()
        norm_TK = torch.linalg.vector_norm(wide_TKH, dim=-1)
        peak_TK = torch.maximum(wide_TKH.amax(dim=-1), -wide_TKH.amin(dim=-1))
        parts.append((norm_TK, peak_TK, torch.bmm(wide_TKH, wide_TKH.transpose(1, 2))))
    norm_TK, peak_TK, inner_TKK = (torch.cat(part) for part in zip(*parts, strict=True))
    return norm_TK, peak_TK, inner_TKK
