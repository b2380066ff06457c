"""Which weights of an expert go: scores of single weights and of whole neurons, and what is lowest.

MoE-Pruner (arXiv:2410.12013) scores the weight from input j to output i by |W_ij| times the norm over the expert's
tokens of its input j, each token multiplied by the weight that the router gave the expert. Weights are compared within
an output row.

Shapes: I inner size of an expert, H hidden size, O outputs and J inputs of any matrix.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def weight_scores(weight_OJ: torch.Tensor, input_sq_J: torch.Tensor) -> torch.Tensor:
    """|W_ij| sqrt(sum over tokens of (g x_j)²), float32 [O, J] (arXiv:2410.12013).

    Args:
        weight_OJ: a matrix, one row per output.
        input_sq_J: sums of the squared gated inputs. Where all are 0, because no token came to the expert, the weights
            alone decide.
    """
    return weight_OJ.float().abs() * _norms(input_sq_J)


def neuron_scores(down_HI: torch.Tensor, inner_sq_I: torch.Tensor) -> torch.Tensor:
    """Norm of all that a neuron adds to the routed output, float32 [I].

    Over the tokens of the expert it adds g u_j down_j, u_j being its activation: the norm of that is
    sqrt(sum of (g u_j)²) times the norm of its column of the down projection. It is the square root of the interaction
    Gram's diagonal, of neurons in the place of experts.

    Args:
        down_HI: the down projection.
        inner_sq_I: sums of the squared gated activations; where all are 0 the columns alone decide.
    """
    import torch

    columns_I: torch.Tensor = torch.linalg.vector_norm(down_HI.float(), dim=0)
    return columns_I * _norms(inner_sq_I)


def _norms(squares: torch.Tensor) -> torch.Tensor:
    import torch

    return squares.float().sqrt() if bool(squares.any()) else torch.ones_like(squares, dtype=torch.float32)


def lowest_of_rows(scores_OJ: torch.Tensor, count: int) -> torch.Tensor:
    """The ``count`` lowest scores of every row, as a bool mask [O, J]; of equal ones the first."""
    import torch

    gone = torch.zeros_like(scores_OJ, dtype=torch.bool)
    order_OJ = scores_OJ.argsort(dim=-1, stable=True)
    return gone.scatter_(-1, order_OJ[..., :count], True)


def lowest_of_groups(scores_OJ: torch.Tensor, n: int, m: int) -> torch.Tensor:
    """All but the best N of every M consecutive scores of a row, as a bool mask [O, J]; J is a multiple of M."""
    groups = scores_OJ.reshape(*scores_OJ.shape[:-1], -1, m)
    return lowest_of_rows(groups, m - n).flatten(-2)


def best_neurons(scores_I: torch.Tensor, count: int) -> torch.Tensor:
    """The ``count`` neurons of the highest scores, ascending; of equal ones the last stay."""
    order_I = scores_I.argsort(stable=True)
    best, _ = order_I[len(scores_I) - count :].sort()
    return best
