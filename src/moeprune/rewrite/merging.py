"""Several experts into one: alignment of their neurons, and the ways to merge their matrices.

An expert is its gate [I, H], up [I, H] and down [H, I] projection. Shapes: H hidden size, I inner size, N neurons.
Everything is computed in float64 but for the costs of the alignment, so that equal experts merge into themselves to the
bit of whatever dtype they are stored in.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from moeprune.plans_fuse import ABSORB

if TYPE_CHECKING:
    import torch

    Expert = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # gate, up, down
    Merge = Callable[[Sequence[torch.Tensor], Sequence[float]], torch.Tensor]

SVD_SHARE = 0.95  # of the squared singular values that a shared basis holds
RIDGE = 0.01  # of the mean squared inner activation, which pulls a fitted down projection to the mean one


def merge_experts(experts: Sequence[Expert], weights: Sequence[float], method: str, *, align: bool) -> Expert:
    """Merge experts.

    Args:
        experts: the dominant one first.
        weights: share of each, adding up to 1.
        method: of :data:`moeprune.plans_fuse.MERGES`; of those that fit the down projection, what they start from:
            ``least-squares`` from the mean, ``absorb`` from the dominant expert.
        align: put the neurons of the others in the order of the dominant one's first.
    """
    first, *others = experts
    if method == ABSORB:
        gate, up, down = (matrix.double() for matrix in first)
        return gate, up, down
    if align:
        others = [permuted(expert, neuron_order(first, expert)) for expert in others]
    merge = MERGE_BY.get(method, mean)
    wide = ([matrix.double() for matrix in matrices] for matrices in zip(first, *others, strict=True))
    gate, up, down = (merge(matrices, weights) for matrices in wide)
    return gate, up, down


# --- alignment --------------------------------------------------------------------------------------------------------


def neuron_order(reference: Expert, expert: Expert) -> torch.Tensor:
    """Which neuron [I] of an expert is to stand in the place of each of the reference's.

    The assignment with the largest sum of inner products of their rows of gate and up and columns of down
    (arXiv:2310.01334).
    """
    import torch
    from scipy.optimize import linear_sum_assignment

    gate, up, down = (matrix.float() for matrix in reference)
    own_gate, own_up, own_down = (matrix.float() for matrix in expert)
    likeness_II = gate @ own_gate.T + up @ own_up.T + down.T @ own_down
    _, order = linear_sum_assignment(likeness_II.cpu().numpy(), maximize=True)
    return torch.as_tensor(order, device=gate.device)


def permuted(expert: Expert, order: torch.Tensor) -> Expert:
    """An expert with its neurons in another order, which computes the same."""
    gate, up, down = expert
    return gate[order], up[order], down[:, order]


# --- merges of one matrix ---------------------------------------------------------------------------------------------


def mean(matrices: Sequence[torch.Tensor], weights: Sequence[float]) -> torch.Tensor:
    """Weighted mean."""
    import torch

    total = torch.zeros_like(matrices[0])
    for matrix, weight in zip(matrices, weights, strict=True):
        total += weight * matrix
    return total


def slerp(matrices: Sequence[torch.Tensor], weights: Sequence[float]) -> torch.Tensor:
    """Weighted mean on the sphere, with the weighted mean of the norms.

    The directions are averaged in the tangent space of their mean direction, which for two is spherical linear
    interpolation.
    """
    import torch

    norms = torch.stack([matrix.norm() for matrix in matrices])
    directions = [matrix / norm.clamp_min(1e-300) for matrix, norm in zip(matrices, norms, strict=True)]
    middle = mean(directions, weights)
    if not middle.norm() > 0:
        return mean(matrices, weights)
    middle = middle / middle.norm()
    tangent = mean([_towards(middle, direction) for direction in directions], weights)
    angle = tangent.norm()
    turned: torch.Tensor = middle if angle == 0 else middle * angle.cos() + tangent / angle * angle.sin()
    return turned * mean(list(norms), weights)


def _towards(start: torch.Tensor, end: torch.Tensor) -> torch.Tensor:
    """The tangent at one direction that leads to another, as long as the angle between them."""
    import torch

    cosine = (start * end).sum()
    across = end - cosine * start
    length = across.norm()
    return across if length == 0 else across / length * torch.atan2(length, cosine)


def svd(matrices: Sequence[torch.Tensor], weights: Sequence[float], *, share: float = SVD_SHARE) -> torch.Tensor:
    """Weighted mean in a basis that the matrices share (arXiv:2506.23266).

    Side by side they are U S [V_1 ... V_n], and the merged matrix is U S times the mean of the V_i. With all singular
    vectors that is the mean of the matrices; the basis holds the first of them, up to a share of the squared singular
    values.
    """
    import torch

    beside = torch.cat(list(matrices), dim=1)
    values, vectors = torch.linalg.eigh(
        beside @ beside.T
    )  # ascending; the left singular vectors and the squared singular values
    energy = values.flip(0).clamp_min(0).cumsum(0)
    rank = int((energy < share * energy[-1]).sum()) + 1
    basis = vectors[:, -rank:]
    merged: torch.Tensor = basis @ (basis.T @ mean(matrices, weights))
    return merged


MERGE_BY: Mapping[str, Merge] = {"slerp": slerp, "svd": svd}  # all others start from the mean


# --- the down projection that fits best -------------------------------------------------------------------------------


class DownFit:
    """Fits the down projection of a merged expert to what its members gave, by least squares (arXiv:2510.14436).

    Args:
        down: the projection [H, I] that it starts from, and stays at where there is no data.

    Example:
        >>> fit = DownFit(down)
        >>> fit.add(inner, wanted)
        >>> down = fit.solve()
    """

    def __init__(self, down: torch.Tensor) -> None:
        import torch

        self._down = down.double()
        self._inner_II = torch.zeros((down.shape[1], down.shape[1]), dtype=torch.float64, device=down.device)
        self._cross_HI = torch.zeros_like(self._down)
        self._rows = 0

    def add(self, inner_RI: torch.Tensor, wanted_RH: torch.Tensor) -> None:
        """Take rows of the down projection's input, and of the output that is wanted there."""
        inner, wanted = inner_RI.double(), wanted_RH.double()
        self._inner_II += inner.T @ inner
        self._cross_HI += wanted.T @ inner
        self._rows += len(inner)

    @property
    def rows(self) -> int:
        """Rows that were taken."""
        return self._rows

    def solve(self, ridge: float = RIDGE) -> torch.Tensor:
        """The projection [H, I] with the smallest squared error, pulled a little to the one that it started from."""
        import torch

        size = len(self._inner_II)
        pull = ridge * self._inner_II.diagonal().mean().clamp_min(1e-300)
        matrix = self._inner_II + pull * torch.eye(size, dtype=torch.float64, device=self._inner_II.device)
        missing_HI = self._cross_HI - self._down @ self._inner_II
        fitted: torch.Tensor = self._down + torch.linalg.solve(matrix, missing_HI.T).T
        return fitted
