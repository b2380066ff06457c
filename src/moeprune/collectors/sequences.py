"""What is known of single sequences: how each expert would do on all of their tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    Run = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def describe(
    run: Run,
    hidden_TH: torch.Tensor,
    experts_TK: torch.Tensor,
    gates_TK: torch.Tensor,
    logits_TE: torch.Tensor,
    rows: int,
) -> dict[str, torch.Tensor]:
    """Describe one sequence in one layer (arXiv:2512.18425), in float64.

    Args:
        run: the experts: hidden states, experts and gates to the output.
        hidden_TH, experts_TK, gates_TK, logits_TE: of its tokens.
        rows: how many rows go through the experts at a time.

    Returns:
        ``path_prob``, ``path_norm`` and ``path_loss`` [E], ``path_scale`` []. Alone, an expert has the sum of the
        token's gates: 1, or the scaling factor, where the router makes them add up to it.
    """
    import torch

    tokens, count = logits_TE.shape
    full_TH = run(hidden_TH, experts_TK, gates_TK).double()
    alone_T1 = gates_TK.double().sum(dim=1, keepdim=True)
    norms, losses = [], []
    step = max(1, rows // tokens)
    for start in range(0, count, step):
        chunk = torch.arange(start, min(start + step, count), device=hidden_TH.device)
        repeated = hidden_TH.repeat(len(chunk), 1)
        ones = torch.ones((len(repeated), 1), dtype=gates_TK.dtype, device=hidden_TH.device)
        outputs = run(repeated, chunk.repeat_interleave(tokens)[:, None], ones)
        for output_TH in outputs.view(len(chunk), tokens, -1):
            wide_TH = output_TH.double()
            norms.append(torch.linalg.vector_norm(wide_TH, dim=-1).mean())
            losses.append(torch.linalg.vector_norm(full_TH - alone_T1 * wide_TH))
    return {
        "path_prob": logits_TE.float().softmax(dim=-1).double().mean(dim=0),
        "path_norm": torch.stack(norms),
        "path_loss": torch.stack(losses),
        "path_scale": torch.linalg.vector_norm(full_TH),
    }
