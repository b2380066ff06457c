"""Fuse experts that fire together, and train the fused ones with small residuals to do again what the originals did.

The recipe of github.com/gabrielolympie/moe-pruner, layer by layer. It departs from it where noted: the neurons of a
group are aligned before their mean is taken, residuals start from an exact singular value decomposition and carry their
scale themselves, the input biases start at 0, the optimiser is AdamW with a rate that decays, and the weights that were
best on held-out tokens stay.

Shapes: T tokens, H hidden size, I inner size, E source experts, F fused ones, K experts of a token, R rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from moeprune.rewrite.merging import mean, neuron_order, permuted
from moeprune.runtime.multiplexed import SIDE, multiplexed
from moeprune.statistics import LayerStatistics
from moeprune.strategies.fusion import co_activation

if TYPE_CHECKING:
    import torch
    from torch import nn

    Expert = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # gate, up, down

STEPS, LR = 300, 5e-3  # LR suits narrow models; the recipe has 2e-4 for wide ones
_HELD_OUT = 10  # every tenth token
_ROWS = 4096  # tokens that run at a time where nothing is trained
_CHECKS = 8  # looks at the held-out tokens during a training


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """How a layer is trained.

    Attributes:
        steps: of the optimiser; 0 leaves it as it starts.
        lr: learning rate at the start; it falls to 0 on a line.
        step_tokens: tokens of a step.
        seed: of the order of the tokens.
    """

    steps: int = STEPS
    lr: float = LR
    step_tokens: int = 2048
    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """What the experts of a layer are given, and what they should give.

    Attributes:
        hidden: input [T, H].
        index, gates: what the router chose, both [T, K].
        target: output [T, H].
    """

    hidden: torch.Tensor
    index: torch.Tensor
    gates: torch.Tensor
    target: torch.Tensor

    def __len__(self) -> int:
        return len(self.hidden)

    def rows(self, places: torch.Tensor) -> Seen:
        """Some of the tokens."""
        return Seen(
            hidden=self.hidden[places], index=self.index[places], gates=self.gates[places], target=self.target[places]
        )


# --- where it starts --------------------------------------------------------------------------------------------------


def groups_of(index_TK: torch.Tensor, num_experts: int, count: int) -> tuple[tuple[int, ...], ...]:
    """``count`` groups of experts that tokens are sent to together, ordered by their first members."""
    import torch

    sent_TE = torch.zeros((len(index_TK), num_experts), dtype=torch.float32, device=index_TK.device)
    sent_TE.scatter_(1, index_TK, 1.0)
    pairs: Any = (sent_TE.T @ sent_TE).double().cpu().numpy()
    stats = LayerStatistics({"pair_count": pairs, "tokens": np.array(len(index_TK))}, layer=0, num_experts=num_experts)
    groups = co_activation(stats, np.arange(num_experts), count)
    return tuple(sorted(tuple(sorted(group)) for group in groups))


def start_of(experts: Any, groups: Sequence[Sequence[int]], rank: int) -> nn.Module:
    """The module of a layer whose fused experts are means, and whose residuals are what is missing, cut to a rank.

    Args:
        experts: the layer's experts with their weights.
        groups: members of every fused expert.
        rank: of the residuals.
    """
    import torch

    gate_up_E, down_E = experts.gate_up_proj.detach().float(), experts.down_proj.detach().float()
    fused: dict[str, list[torch.Tensor]] = {"gate_up_proj": [], "down_proj": []}
    side: dict[str, torch.Tensor] = {}
    for members in groups:
        aligned = _aligned([(*gate_up_E[member].chunk(2), down_E[member]) for member in members])
        stacked = [torch.cat([gate, up]) for gate, up, _ in aligned]
        even = [1 / len(members)] * len(members)
        own = {"gate_up": mean(stacked, even), "down": mean([down for _, _, down in aligned], even)}
        fused["gate_up_proj"].append(own["gate_up"])
        fused["down_proj"].append(own["down"])
        for member, both, (_, _, down) in zip(members, stacked, aligned, strict=True):
            for name, weight in (("gate_up", both), ("down", down)):
                _put(side, name, member, len(gate_up_E), *_low_rank(weight - own[name], rank))
    side["shift"] = gate_up_E.new_zeros((len(gate_up_E), gate_up_E.shape[2]))
    return multiplexed(experts, groups, side, **{name: torch.stack(values) for name, values in fused.items()})


def _aligned(members: Sequence[Expert]) -> list[Expert]:
    """The members of a group with their neurons in the order of the first one's."""
    first, *others = members
    return [first, *(permuted(other, neuron_order(first, other)) for other in others)]


def _low_rank(weight_OJ: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The best A [R, J] and B [O, R] whose product B A is nearest, of equal size."""
    import torch

    left, values, right = torch.linalg.svd(weight_OJ, full_matrices=False)
    roots = values[:rank].sqrt()
    return roots[:, None] * right[:rank], left[:, :rank] * roots


def _put(
    side: dict[str, torch.Tensor], name: str, expert: int, count: int, a_RJ: torch.Tensor, b_OR: torch.Tensor
) -> None:
    for part, value in ((f"{name}_in", a_RJ), (f"{name}_out", b_OR)):
        if part not in side:
            side[part] = value.new_zeros((count, *value.shape))
        side[part][expert] = value


# --- training ---------------------------------------------------------------------------------------------------------


def train(module: nn.Module, seen: Seen, recipe: Recipe, dtype: torch.dtype) -> tuple[float, ...]:
    """Train a layer in place until its output is what is wanted, by smooth L1 distance.

    What is kept is rounded to the dtype that is stored, and best on tokens that were held out.

    Args:
        module: what :func:`start_of` gave.
        seen: the tokens.
        recipe: how.
        dtype: that the weights are stored in.

    Returns:
        Squared error on the held-out tokens before and after, as a share of the mean square of what is wanted.
    """
    import torch

    places = torch.arange(len(seen), device=seen.hidden.device)
    held, own = seen.rows(places[_HELD_OUT - 1 :: _HELD_OUT]), seen.rows(places[places % _HELD_OUT != _HELD_OUT - 1])
    _round(module, dtype)
    first = best = error_of(module, held)
    kept = _copied(module)
    optimiser = torch.optim.AdamW(module.parameters(), lr=recipe.lr, betas=(0.9, 0.99), weight_decay=0.0)
    scale = own.target.float().square().mean().sqrt().clamp_min(1e-12)
    order = _Order(len(own), recipe)
    for step in range(recipe.steps):
        batch = own.rows(order.next().to(places.device))
        optimiser.param_groups[0]["lr"] = recipe.lr * (1 - step / recipe.steps)
        found = module(batch.hidden, batch.index, batch.gates)
        loss = torch.nn.functional.smooth_l1_loss(found / scale, batch.target / scale)
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimiser.step()
        if step + 1 in {recipe.steps * look // _CHECKS for look in range(1, _CHECKS + 1)}:
            trained = _copied(module)
            _round(module, dtype)
            error = error_of(module, held)
            if error < best:
                best, kept = error, _copied(module)
            _restore(module, trained)
    _restore(module, kept)
    return first, best


class _Order:
    """Batches of tokens: every one once before any twice."""

    def __init__(self, count: int, recipe: Recipe) -> None:
        import torch

        self._count, self._size = count, min(count, recipe.step_tokens)
        self._generator = torch.Generator().manual_seed(recipe.seed)
        self._left = torch.empty(0, dtype=torch.long)

    def next(self) -> torch.Tensor:
        """Places of the next batch's tokens."""
        import torch

        if len(self._left) < self._size:
            self._left = torch.randperm(self._count, generator=self._generator)
        batch, self._left = self._left[: self._size], self._left[self._size :]
        return batch


def error_of(module: nn.Module, seen: Seen) -> float:
    """Mean squared error, as a share of the mean square of what is wanted."""
    import torch

    with torch.no_grad():
        places = torch.arange(len(seen), device=seen.hidden.device)
        parts = (seen.rows(part) for part in torch.split(places, _ROWS))
        wrong = sum(
            float((module(part.hidden, part.index, part.gates).float() - part.target.float()).square().sum())
            for part in parts
        )
    return wrong / max(float(seen.target.float().square().sum()), 1e-30)


def _round(module: nn.Module, dtype: torch.dtype) -> None:
    for value in module.parameters():
        value.data = value.data.to(dtype).to(value.dtype)


def _copied(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in module.named_parameters()}


def _restore(module: nn.Module, values: dict[str, torch.Tensor]) -> None:
    for name, value in module.named_parameters():
        value.data.copy_(values[name])


def side_of(module: nn.Module) -> dict[str, torch.Tensor]:
    """What is stored in the side file of a layer's module."""
    return {name: getattr(module, name).detach() for name in SIDE}
