"""Fit the down projections of each layer's routed experts by ridge regression: layer by layer, without a gradient.

What a pruned layer gives is linear in its experts' down projections, so that the best ones are known in closed form,
up to how the experts share a token. Shapes: N tokens, R tokens of one expert, K experts per token, H hidden size, I
inner size.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from moeprune.collectors.weights import ExpertWeights, weights_of
from moeprune.errors import UnsupportedModelError
from moeprune.experts import ExpertLayer
from moeprune.healing.fitting import Best, Fitted, zeros_of
from moeprune.healing.layerwise import LayerwiseHealing

if TYPE_CHECKING:
    import torch
    from torch import nn

    from moeprune.healing.layerwise import Parameters

# Of the mean squared input of a down projection, in each sweep through the experts: what is held less and less comes
# closer on the text that is fitted, and held-out text says where to stop.
RIDGES = (3.0, 1.0, 0.3, 0.1, 0.03)
_ROWS = 4096  # that are in float64 at a time
_ADDED = 1e-2  # how far, relatively, a layer may be from adding its experts' output to the state


class DownRegression:
    """Down projections that bring what a layer gives closest to what is wanted.

    With W_e the down projection of an expert, V_e the given one, h its input and g its gate for a token, and m the
    state that is missing there, relative to the size of the wanted one, it minimises

        sum over tokens |m - sum_e g (W_e - V_e) h|^2  +  sum_e pull_e |W_e - V_e|^2

    where pull_e is the mean of the expert's squared g h, over its I inner neurons, times ``ridge``. A sweep solves for
    each expert in turn, the others as they are, in float64. So memory is one I x I system, whatever the number of
    experts, with the given projections beside the new ones, and 2 N H floats for the tokens, which can be in files.

    Args:
        layer: its weights are changed in place.
        tokens: N; so many rows are to be added.
        folder: keep what grows with the tokens in files there.

    Raises:
        UnsupportedModelError: its experts have no down projections to fit.

    Example:
        >>> regression = DownRegression(layer, tokens=len(hidden_TH))
        >>> regression.add(hidden_TH, index_TK, gates_TK, missing_TH)
        >>> regression.sweep(0.1)
    """

    def __init__(self, layer: ExpertLayer, tokens: int, *, folder: Path | None = None) -> None:
        self._experts = dict(weights_of(layer.experts))
        self._given = {number: expert.down.clone() for number, expert in self._experts.items()}
        self._zeros = zeros_of({str(number): expert.down for number, expert in self._experts.items()})
        width = next(iter(self._given.values())).shape[0]
        self._hidden_NH, self._missing_NH = (
            _matrix(tokens, width, folder and folder / name) for name in ("inputs", "missing")
        )
        self._chosen: list[torch.Tensor] = []
        self._gates: list[torch.Tensor] = []
        self._filled = 0

    def add(
        self, hidden_TH: torch.Tensor, index_TK: torch.Tensor, gates_TK: torch.Tensor, missing_TH: torch.Tensor
    ) -> None:
        """Take tokens: inputs of the experts, who was chosen with which gate, and what the layer's output lacks."""
        rows = slice(self._filled, self._filled + len(hidden_TH))
        self._hidden_NH[rows], self._missing_NH[rows] = hidden_TH, missing_TH
        self._chosen.append(index_TK)
        self._gates.append(gates_TK)
        self._filled = rows.stop

    def sweep(self, ridge: float) -> None:
        """Solve for each expert once; the objective never grows.

        Args:
            ridge: how strongly the projections are held where they were.
        """
        import torch

        index_NK, gates_NK = torch.cat(self._chosen), torch.cat(self._gates)
        for number, expert in self._experts.items():
            tokens_R, slots_R = (index_NK == number).nonzero(as_tuple=True)
            if len(tokens_R):
                self._solve(number, expert, tokens_R, gates_NK[tokens_R, slots_R], ridge)

    def _solve(
        self, number: int, expert: ExpertWeights, tokens_R: torch.Tensor, gates_R: torch.Tensor, ridge: float
    ) -> None:
        import torch

        down = expert.down
        cross_HI = torch.zeros(down.shape, dtype=torch.float64, device=down.device)
        matrix_II = cross_HI.new_zeros((down.shape[1], down.shape[1]))
        for rows_P, inner_PI in self._inner(expert, tokens_R, gates_R):
            matrix_II += inner_PI.T @ inner_PI
            cross_HI += self._missing_NH[rows_P].to(inner_PI).T @ inner_PI
        pull = ridge * matrix_II.diagonal().mean()
        if not pull > 0:
            return  # nothing comes out of the expert, whatever its down projection
        cross_HI -= pull * (down - self._given[number]).double()
        matrix_II.diagonal().add_(pull)
        before = down.clone()
        down += _solved(matrix_II, cross_HI, self._zeros.get(str(number)))
        moved_IH = (down - before).double().T
        for rows_P, inner_PI in self._inner(expert, tokens_R, gates_R):
            self._missing_NH[rows_P] -= (inner_PI @ moved_IH).to(self._missing_NH)

    def _inner(
        self, expert: ExpertWeights, tokens_R: torch.Tensor, gates_R: torch.Tensor
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Some of an expert's tokens at a time, where they are kept, and what comes into its down projection, gated."""
        import torch

        for rows_P, gates_P in zip(torch.split(tokens_R, _ROWS), torch.split(gates_R, _ROWS), strict=True):
            here_P = rows_P.to(self._hidden_NH.device)
            inner_PI = expert.inner(self._hidden_NH[here_P].to(expert.down))
            yield here_P, gates_P[:, None].double() * inner_PI.double()


def _solved(matrix_II: torch.Tensor, cross_HI: torch.Tensor, zero_HI: torch.Tensor | None) -> torch.Tensor:
    """X [H, I] with X M = C; row by row over the weights that may move, where others were pruned."""
    import torch

    if zero_HI is None:
        solved: torch.Tensor = torch.linalg.solve(matrix_II, cross_HI, left=False)
        return solved
    solved = torch.zeros_like(cross_HI)
    for row_I, cross_I, free_I in zip(solved, cross_HI, ~zero_HI, strict=True):
        row_I[free_I] = torch.linalg.solve(matrix_II[free_I][:, free_I], cross_I[free_I])
    return solved


def _matrix(rows: int, columns: int, file: Path | None) -> torch.Tensor:
    import torch

    if file is None:
        return torch.empty((rows, columns))
    return torch.from_file(str(file), shared=True, size=rows * columns).view(rows, columns)


class ClosedFormHealing(LayerwiseHealing):
    """Both models side by side; down projections are solved for, and everything else of a layer stays."""

    def _parameters(self, index: int) -> Parameters:
        own = dict(self._given.model.named_parameters())
        return {name: own[name] for name in sorted(self._names_of(index, "down"))}

    def _search(
        self,
        index: int,
        parameters: Parameters,
        loss: Callable[[int], torch.Tensor],
        held_out: Callable[[], float],
    ) -> Fitted:
        import torch

        layer = self._experts[index]
        own = {name: value for name, value in parameters.items() if not name.endswith("_bias")}
        best = Best(own, held_out())
        folder = self._changes.folder if self._spill else None
        with torch.no_grad(), _removed(folder):
            tokens = sum(int(self._batches[number]["attention_mask"].sum()) for number in self._fitted_on)
            regression = DownRegression(layer, tokens, folder=folder)
            self._check_added(index, layer)
            for number in self._fitted_on:
                regression.add(*self._rows(index, layer, number))
            for sweep, ridge in enumerate(RIDGES, start=1):
                regression.sweep(ridge)
                best.look(held_out(), sweep)
        best.restore()
        return Fitted(before=best.before, after=best.loss, steps=len(RIDGES), best=best.step)

    def _rows(
        self, index: int, layer: ExpertLayer, number: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """A batch's tokens: what the experts are given, and what is missing behind the layer.

        Behind the next norm every token has the same size, so it is relative to the size of the wanted state.
        """
        seen: list[tuple[torch.Tensor, ...]] = []
        with _hooked(layer.experts, lambda _, args, __: seen.append(args)):
            state = self._given.run(index, self._states["healed"].get(number), self._batches[number], trim=False)
        real_T = self._batches[number]["attention_mask"].bool().reshape(-1).to(state[0].device)
        hidden_TH, index_TK, gates_TK = (rows[real_T] for rows in seen[0])
        wanted_TH = self._real(self._states["base"].get(number), number)
        scale_T1 = wanted_TH.square().mean(dim=-1, keepdim=True).clamp_min(1e-30).rsqrt()
        return hidden_TH, index_TK, gates_TK * scale_T1, (wanted_TH - self._real(state, number)) * scale_T1

    def _check_added(self, index: int, layer: ExpertLayer) -> None:
        """Refuse a layer that does more with its experts' output than to add it to the state.

        Raises:
            UnsupportedModelError: it scales or normalises it.
        """
        import torch

        batch, state = self._batches[0], self._states["healed"].get(0)
        routed: list[torch.Tensor] = []
        with _hooked(layer.experts, lambda _, __, output: routed.append(output)):
            whole = self._given.run(index, state, batch)[0]
        with _hooked(layer.experts, lambda _, __, output: torch.zeros_like(output)):
            rest = self._given.run(index, state, batch)[0]
        added = routed[0].reshape(whole.shape)
        if (whole - rest - added).norm() > _ADDED * added.norm():
            raise UnsupportedModelError(
                f"layer {index} does more with its experts' output than to add it up, and no closed form is known",
                "take --method layerwise",
            )


@contextlib.contextmanager
def _hooked(module: nn.Module, hook: Callable[..., object]) -> Iterator[None]:
    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@contextlib.contextmanager
def _removed(folder: Path | None) -> Iterator[None]:
    """Remove the files of a regression in the end."""
    try:
        yield
    finally:
        if folder is not None:
            for name in ("inputs", "missing"):
                (folder / name).unlink(missing_ok=True)
