"""Merged experts fitted to activations: what the experts of a layer give, watched and added up."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from moeprune.experts import ExpertLayer
from moeprune.plans_fuse import FuseLayer, Group
from moeprune.rewrite.merging import DownFit

if TYPE_CHECKING:
    import torch
    from torch import nn

    from moeprune.rewrite.merging import Expert

    Chosen = Callable[[ExpertLayer, Sequence[int], torch.Tensor], torch.Tensor]


def fit_bytes(merged: int, hidden: int, inner: int) -> int:
    """Bytes of so many merged experts while they are fitted: their matrices, the fits' sums, and what these give."""
    return 8 * merged * (inner * inner + 5 * hidden * inner)


class Fitting:
    """Watches the experts of a layer and adds up what the merged ones should give; use it as a context manager.

    The tied model would give the merged expert the gates of all members that a token was routed to. So each token that
    was routed to some asks for the gated sum of their outputs, from its inner activations times the sum of the gates.
    Where the router has fewer rows, only those tokens do that it still sends there. Errors count relative to the norm
    of what all experts give the token: few tokens have activations that are a hundred times as large as those of
    others, and would decide everything.
    """

    def __init__(
        self,
        layer: ExpertLayer,
        plan: FuseLayer,
        merged: Mapping[int, Expert],
        chosen: Chosen | None,
    ) -> None:
        self._module: Any = layer.experts
        self._groups = plan.merged
        self._merged = merged
        self._chosen = None if chosen is None else functools.partial(chosen, layer, plan.keep)
        self._fits = {place: DownFit(down) for place, (_, _, down) in merged.items()}
        self._hook: Any = None
        self.mask_T: torch.Tensor | None = None

    def __enter__(self) -> Self:
        """Start to watch."""
        self._hook = self._module.register_forward_hook(self._see)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Watch no longer."""
        self._hook.remove()

    @property
    def rows(self) -> list[int]:
        """Tokens that each merged expert was fitted to."""
        return [fit.rows for fit in self._fits.values()]

    def solved(self) -> dict[int, Expert]:
        """The merged experts with their fitted down projections, by new number."""
        return {place: (*self._merged[place][:2], fit.solve()) for place, fit in self._fits.items()}

    def _see(self, _: nn.Module, args: tuple[torch.Tensor, ...], routed_TH: torch.Tensor) -> None:
        hidden_TH, index_TK, gates_TK = args
        if self.mask_T is not None:
            kept = self.mask_T.to(hidden_TH.device)
            hidden_TH, index_TK, gates_TK, routed_TH = (rows[kept] for rows in (*args, routed_TH))
        norms_T1 = routed_TH.double().norm(dim=1, keepdim=True)
        shares_TK = gates_TK.double() / norms_T1.clamp_min(1e-30)
        chosen_TK = None if self._chosen is None else self._chosen(hidden_TH)
        for place, group in self._groups.items():
            shares_TM = _gates_of(group.members, index_TK, shares_TK)
            asks_T = shares_TM.any(dim=1)
            if chosen_TK is not None:
                asks_T &= (chosen_TK == group.dominant).any(dim=1)
            rows = asks_T.nonzero()[:, 0]
            if len(rows):
                self._add(place, group, hidden_TH[rows], shares_TM[rows])

    def _add(self, place: int, group: Group, hidden_RH: torch.Tensor, shares_RM: torch.Tensor) -> None:
        import torch

        wanted_RH = torch.zeros(hidden_RH.shape, dtype=torch.float64, device=hidden_RH.device)
        for position, member in enumerate(group.members):
            own = shares_RM[:, position].nonzero()[:, 0]
            gate_up, down = self._module.gate_up_proj[member], self._module.down_proj[member]
            output = self._inner(hidden_RH[own], gate_up) @ down.T
            wanted_RH[own] += shares_RM[own, position, None] * output.double()
        gate, up, _ = self._merged[place]
        inner_RI = self._inner(hidden_RH, torch.cat([gate, up]).to(hidden_RH.dtype))
        self._fits[place].add(shares_RM.sum(dim=1, keepdim=True) * inner_RI.double(), wanted_RH)

    def _inner(self, hidden_RH: torch.Tensor, gate_up: torch.Tensor) -> torch.Tensor:
        inner_RI: torch.Tensor = self._module._apply_gate(hidden_RH @ gate_up.T)  # noqa: SLF001 - what kernels call
        return inner_RI


def _gates_of(members: Sequence[int], index_TK: torch.Tensor, gates_TK: torch.Tensor) -> torch.Tensor:
    """The gate [T, M] of each member, 0 where a token was not routed to it."""
    import torch

    return torch.stack([(gates_TK * (index_TK == member)).sum(dim=1) for member in members], dim=1)
