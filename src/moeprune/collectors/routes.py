"""Where tokens go from one MoE layer to the next."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

KEPT = 3  # tensors of a batch between two layers


@dataclass(slots=True)
class Routes:
    """Where the tokens of one batch went.

    Attributes:
        first: experts [T, K] of the first MoE layer.
        before: experts [T, K] of the MoE layer before; gates: their gates.
    """

    first: torch.Tensor | None = None
    before: torch.Tensor | None = None
    gates: torch.Tensor | None = None

    def follow(self, experts_TK: torch.Tensor, gates_TK: torch.Tensor) -> None:
        """The tokens went through another MoE layer."""
        import torch

        self.before, self.gates = experts_TK.to(torch.int16), gates_TK.detach().float()
        if self.first is None:
            self.first = self.before

    def tensors(self) -> tuple[torch.Tensor, ...]:
        """As tensors, to be kept between two layers; of no elements before the first MoE layer."""
        import torch

        return tuple(
            torch.empty(0) if value is None else value
            for value in (getattr(self, field.name) for field in dataclasses.fields(self))
        )

    @classmethod
    def of_tensors(cls, kept: tuple[torch.Tensor, ...]) -> Routes:
        """What :meth:`tensors` gave."""
        return cls(*(value if value.numel() else None for value in kept))


def transitions(
    before_TK: torch.Tensor,
    gates_before_TK: torch.Tensor,
    experts_TK: torch.Tensor,
    gates_TK: torch.Tensor,
    num_experts: int,
) -> dict[str, torch.Tensor]:
    """Tokens, and products of gates, from each expert of the layer before to each of this one, [E, E]."""
    import torch

    pair = before_TK.long()[:, :, None] * num_experts + experts_TK[:, None, :]
    product = gates_before_TK.double()[:, :, None] * gates_TK.double()[:, None, :]
    gates = torch.zeros(num_experts**2, dtype=torch.float64, device=pair.device)
    gates.index_add_(0, pair.reshape(-1), product.reshape(-1))
    return {
        "transition_count": _counted(pair, num_experts),
        "transition_gate": gates.view(num_experts, num_experts),
    }


def wraps(last_BSK: torch.Tensor, first_BSK: torch.Tensor, valid_BS: torch.Tensor, num_experts: int) -> torch.Tensor:
    """Tokens from each expert of the last layer to each that the next token has in the first one, [E, E]."""
    follows = valid_BS[:, :-1] & valid_BS[:, 1:]
    last_PK, first_PK = last_BSK[:, :-1][follows].long(), first_BSK[:, 1:][follows].long()
    return _counted(last_PK[:, :, None] * num_experts + first_PK[:, None, :], num_experts)


def _counted(pair: torch.Tensor, num_experts: int) -> torch.Tensor:
    import torch

    return torch.bincount(pair.reshape(-1), minlength=num_experts**2).view(num_experts, num_experts)
