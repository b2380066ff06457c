"""Fit the parameters of one layer: a few hundred steps of Adam, the best weights on held-out text kept."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from moeprune.errors import ConfigError

if TYPE_CHECKING:
    import torch

    Parameters = Mapping[str, torch.nn.Parameter]

STEPS = 400
CHECKS = 8  # looks at the held-out text while a layer is fitted
_BETAS = (0.9, 0.99)
_WARMUP = 10  # steps in which the rate rises
_WIDTH_RATE = 0.384  # the rate times the width of the model: 0.003 at 128
_ROUTER = 0.3  # of the rate, for routers: a faster one leads tokens away from the experts that know them
_ZEROS = 0.05  # a parameter with this share of exact zeros was pruned, and keeps them


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """How long and how fast each layer is fitted.

    Attributes:
        steps: of Adam, in each layer.
        minutes: for all layers together, in the place of a number of steps; two such runs give different weights.
        lr: largest learning rate; None is 0.384 over the hidden size, since wide matrices take smaller steps.
        seed: of the order of the batches.
    """

    steps: int = STEPS
    minutes: float | None = None
    lr: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse what cannot be run.

        Raises:
            ConfigError: the message names the option.
        """
        if self.steps < 0 or self.seed < 0:
            raise ConfigError("--steps and --seed must be at least 0")
        if not all(value is None or 0 < value < math.inf for value in (self.minutes, self.lr)):
            raise ConfigError("--minutes and --lr must be larger than 0")

    def rate(self, hidden: int) -> float:
        """The largest learning rate for a model of this width."""
        return self.lr or _WIDTH_RATE / hidden


@dataclass(frozen=True, slots=True, kw_only=True)
class Fitted:
    """What became of a layer.

    Attributes:
        before, after: the held-out loss; equal where no step made it smaller.
        steps: how many ran.
        best: the step after which the weights were taken; 0 for the given ones.
    """

    before: float
    after: float
    steps: int
    best: int


def fit(
    parameters: Parameters,
    loss: Callable[[int], torch.Tensor],
    batches: int,
    held_out: Callable[[], float],
    schedule: Schedule,
    *,
    rate: float,
    routers: frozenset[str] = frozenset(),
    seconds: float | None = None,
) -> Fitted:
    """Minimise a loss over batches; the parameters end with the values that were best on held-out text.

    Args:
        parameters: by name; those of which a twentieth is exactly zero keep their zeros.
        loss: of a batch, by its number.
        batches: how many there are; each round goes through them in a new order.
        held_out: the loss that judges, without gradients.
        schedule: how many steps.
        rate: largest learning rate.
        routers: names of parameters that learn at three tenths of the rate.
        seconds: how long instead, where the schedule counts minutes.
    """
    import torch

    # Fused: the plain kernel makes two more tensors as large as the parameter that it updates.
    optimizer = torch.optim.Adam(_groups(parameters, routers, rate), betas=_BETAS, fused=True)
    best = Best(parameters, held_out())
    order, zeros = _order(batches, schedule.seed), zeros_of(parameters)
    step = looks = 0
    for done in _progress(schedule.steps, seconds):
        if int(done * CHECKS) > looks:
            looks = int(done * CHECKS)
            best.look(held_out(), step)
        for group in optimizer.param_groups:
            group["lr"] = group["largest"] * min(1.0, (step + 1) / _WARMUP) * (1 + math.cos(math.pi * done)) / 2
        loss(next(order)).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for name, zero in zeros.items():
                parameters[name].masked_fill_(zero, 0)
        step += 1
    if step:
        best.look(held_out(), step)
    best.restore()
    return Fitted(before=best.before, after=best.loss, steps=step, best=best.step)


class Best:
    """The values that were best so far."""

    def __init__(self, parameters: Parameters, loss: float) -> None:
        self._parameters = parameters
        self.before = self.loss = loss
        self.step = 0
        self._take()

    def look(self, loss: float, step: int) -> None:
        """Take the values of now if they are better; those that are not finite never are."""
        if loss < self.loss:
            self.loss, self.step = loss, step
            self._take()

    def restore(self) -> None:
        """Put the best values back."""
        for name, value in self._values.items():
            self._parameters[name].data.copy_(value)

    def _take(self) -> None:
        self._values = {name: value.detach().clone() for name, value in self._parameters.items()}


def _groups(parameters: Parameters, routers: frozenset[str], rate: float) -> list[dict[str, object]]:
    own = [value for name, value in parameters.items() if name in routers]
    others = [value for name, value in parameters.items() if name not in routers]
    groups = [{"params": others, "largest": rate}, {"params": own, "largest": _ROUTER * rate}]
    return [group for group in groups if group["params"]]


def zeros_of(parameters: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Where pruned weights are, of parameters that were pruned; one of nothing but zeros is a bias not in use."""
    zeros = {name: value.detach() == 0 for name, value in parameters.items()}
    return {name: zero for name, zero in zeros.items() if _ZEROS * zero.numel() < int(zero.sum()) < zero.numel()}


def _order(batches: int, seed: int) -> Iterator[int]:
    import torch

    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from torch.randperm(batches, generator=generator).tolist()


def _progress(steps: int, seconds: float | None) -> Iterator[float]:
    """How far a fit is before each of its steps, from 0 to less than 1."""
    if seconds is None:
        yield from (step / steps for step in range(steps))
        return
    begin = time.monotonic()
    while (done := (time.monotonic() - begin) / seconds) < 1:
        yield done
