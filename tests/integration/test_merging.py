"""Several experts into one: alignment, merges and fits against slow and direct computations."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import numpy as np
import pytest

from moeprune.rewrite.merging import DownFit, mean, merge_experts, neuron_order, permuted, slerp, svd

if TYPE_CHECKING:
    import torch

    from moeprune.rewrite.merging import Expert

H, INNER = 12, 5


def expert_of(seed: int, dtype: str = "float32") -> Expert:
    """Random gate, up and down."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    shapes = ((INNER, H), (INNER, H), (H, INNER))
    gate, up, down = (torch.randn(shape, generator=generator).to(getattr(torch, dtype)) for shape in shapes)
    return gate, up, down


def matrices(count: int = 3) -> list[torch.Tensor]:
    """Random matrices in float64."""
    return [expert_of(seed)[0].double() for seed in range(count)]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("method", ["frequency", "mean", "least-squares", "slerp"])
def test_an_expert_and_its_permuted_copies_merge_into_it(method: str, dtype: str) -> None:
    """Aligned they give the expert itself, to the last bit of its dtype; not aligned they do not."""
    import torch

    expert = expert_of(0, dtype)
    copies = [permuted(expert, torch.tensor(order)) for order in ([4, 2, 0, 1, 3], [1, 0, 3, 2, 4])]
    merged = merge_experts([expert, *copies], [0.5, 0.3, 0.2], method, align=True)
    assert all(torch.equal(one.to(other.dtype), other) for one, other in zip(merged, expert, strict=True))
    plain = merge_experts([expert, *copies], [0.5, 0.3, 0.2], method, align=False)
    assert not torch.allclose(plain[0].float(), expert[0].float(), atol=1e-2)


@pytest.mark.parametrize("part", [0, 1, 2, None])
def test_the_order_of_neurons_is_the_best_one(part: int | None) -> None:
    """Of all orders, the one with the largest sum of inner products, of gate, up and down alike."""
    import torch

    def only(expert: Expert) -> Expert:
        gate, up, down = (matrix * (part in (None, place)) for place, matrix in enumerate(expert))
        return gate, up, down

    one, other = only(expert_of(1)), only(expert_of(2))

    def likeness(order: tuple[int, ...]) -> float:
        moved = permuted(other, torch.tensor(order))
        return sum(float((a * b).sum()) for a, b in zip(one, moved, strict=True))

    best = max(itertools.permutations(range(INNER)), key=likeness)
    assert tuple(neuron_order(one, other).tolist()) == best


def test_a_permuted_expert_computes_the_same() -> None:
    """Whatever the order of its neurons, its output does not change."""
    import torch

    order, hidden = torch.tensor([3, 0, 4, 1, 2]), torch.randn(7, H)

    def run(expert: Expert) -> torch.Tensor:
        gate, up, down = expert
        return (torch.nn.functional.silu(hidden @ gate.T) * (hidden @ up.T)) @ down.T

    torch.testing.assert_close(run(permuted(expert_of(3), order)), run(expert_of(3)))


def test_weights_are_shares() -> None:
    """The mean is the weighted one."""
    import torch

    one, two, three = matrices()
    torch.testing.assert_close(mean([one, two, three], [0.5, 0.3, 0.2]), 0.5 * one + 0.3 * two + 0.2 * three)


def test_slerp_of_two_is_spherical_interpolation() -> None:
    """On the arc between them, at the share of the way, with the norm between theirs."""
    import torch

    one, two = matrices(2)
    a, b = one / one.norm(), two / two.norm()
    angle = torch.arccos((a * b).sum())
    direction = (torch.sin(0.7 * angle) * a + torch.sin(0.3 * angle) * b) / torch.sin(angle)
    torch.testing.assert_close(slerp([one, two], [0.7, 0.3]), direction * (0.7 * one.norm() + 0.3 * two.norm()))


def test_slerp_of_what_has_no_direction() -> None:
    """Of opposites the mean, of zeros nothing, and never a number that is not finite."""
    import torch

    one = matrices(1)[0]
    torch.testing.assert_close(slerp([one, -one], [0.5, 0.5]), torch.zeros_like(one))
    torch.testing.assert_close(slerp([one, one, one], [0.2, 0.3, 0.5]), one)
    assert not slerp([torch.zeros_like(one)] * 2, [0.5, 0.5]).any()


def test_a_shared_basis_of_all_singular_vectors_is_the_mean() -> None:
    """Only what the basis leaves out tells the merge from the mean; the largest singular values make it."""
    import torch

    three, weights = matrices(), [0.5, 0.3, 0.2]
    torch.testing.assert_close(svd(three, weights, share=1.0), mean(three, weights))
    left, values, _ = torch.linalg.svd(torch.cat(three, dim=1), full_matrices=False)
    share = float((values[:2] ** 2).sum() / (values**2).sum())
    basis = left[:, :2]
    torch.testing.assert_close(svd(three, weights, share=share - 1e-6), basis @ basis.T @ mean(three, weights))


def test_a_fit_is_the_least_squares_solution() -> None:
    """Added in two parts, it solves the normal equations with a pull to where it starts from."""
    import torch

    rng = np.random.default_rng(0)
    inner, wanted, start = rng.normal(size=(40, INNER)), rng.normal(size=(40, H)), rng.normal(size=(H, INNER))
    fit = DownFit(torch.tensor(start))
    for rows in (slice(0, 15), slice(15, 40)):
        fit.add(torch.tensor(inner[rows]), torch.tensor(wanted[rows]))
    assert fit.rows == 40
    found, *_ = np.linalg.lstsq(inner, wanted, rcond=None)
    np.testing.assert_allclose(fit.solve(ridge=0.0).numpy(), found.T, atol=1e-10)
    pull = np.sqrt(0.3 * np.mean(np.diagonal(inner.T @ inner)))
    rows, more = np.vstack([inner, pull * np.eye(INNER)]), np.vstack([wanted, pull * start.T])
    found, *_ = np.linalg.lstsq(rows, more, rcond=None)
    np.testing.assert_allclose(fit.solve(ridge=0.3).numpy(), found.T, atol=1e-10)


def test_a_fit_without_data_stays_where_it_is() -> None:
    """An expert that no token is routed to keeps the down projection that it starts from."""
    import torch

    down = expert_of(0)[2]
    assert torch.equal(DownFit(down).solve(), down.double())
