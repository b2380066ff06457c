"""Teacher-forced measures on held-out text: perplexity and how far two models' next-token distributions agree.

All intervals treat documents as clusters: tokens of one document are not independent.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from moeprune.errors import EvaluationError

if TYPE_CHECKING:
    import torch
    from torch import nn

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]
Sequences = Sequence[Sequence[int]]


class TokenLosses(NamedTuple):
    """Per document: summed negative log-likelihood in nats, and the number of predicted tokens; both of shape N."""

    nll: FloatArray
    tokens: IntArray


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A value with its 95 % interval over documents."""

    value: float
    interval: tuple[float, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Perplexity(Estimate):
    """exp of the mean negative log-likelihood per token, or the ratio of two such perplexities."""

    tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreement:
    """How far a pruned model's next-token distributions agree with the base model's.

    Attributes:
        kl: mean of KL(base || pruned) per predicted token, in nats.
        top1: share of tokens on which both models put the same token first.
        tokens: number of predicted tokens.
    """

    kl: Estimate
    top1: Estimate
    tokens: int


def token_losses(model: nn.Module, sequences: Sequences, batch_tokens: int = 8192) -> TokenLosses:
    """Negative log-likelihood of each document under a causal language model.

    Args:
        model: a transformers causal language model in evaluation mode.
        sequences: token ids per document; the first token is only ever context.
        batch_tokens: most tokens, padding included, in one forward pass.
    """
    import torch

    nll_N = np.zeros(len(sequences))
    for rows, batch in _batches(sequences, batch_tokens):
        logp_BTV, ids_BT, kept_BT = _log_probabilities(model, batch)
        loss_BT = -torch.gather(logp_BTV, 2, ids_BT[:, 1:, None])[..., 0]
        nll_N[rows] = _per_document(loss_BT, kept_BT)
    return TokenLosses(nll_N, _predicted(sequences))


def perplexity(losses: TokenLosses) -> Perplexity:
    """Corpus perplexity with an interval over documents.

    Raises:
        EvaluationError: fewer than two documents with a predicted token.
    """
    return _exponential(_ratio(losses.nll, losses.tokens), losses)


def perplexity_ratio(base: TokenLosses, pruned: TokenLosses) -> Perplexity:
    """Pruned over base perplexity, paired by document: 1.05 says that perplexity rose by 5 %.

    Raises:
        EvaluationError: the two were measured on different documents, or on fewer than two.
    """
    if not np.array_equal(base.tokens, pruned.tokens):
        raise EvaluationError("the two models were measured on different documents")
    return _exponential(_ratio(pruned.nll - base.nll, base.tokens), base)


def agreement(
    base_model: nn.Module, pruned_model: nn.Module, sequences: Sequences, batch_tokens: int = 8192
) -> Agreement:
    """Compare two models' next-token distributions on the same text.

    Args:
        base_model: a transformers causal language model in evaluation mode.
        pruned_model: another with the same vocabulary.
        sequences: token ids per document.
        batch_tokens: most tokens, padding included, in one forward pass.

    Raises:
        EvaluationError: different vocabularies, or fewer than two documents with a predicted token.
    """
    kl_N, same_N, tokens_N = np.zeros(len(sequences)), np.zeros(len(sequences)), _predicted(sequences)
    for rows, batch in _batches(sequences, batch_tokens):
        p_BTV, _, kept_BT = _log_probabilities(base_model, batch)
        q_BTV = _log_probabilities(pruned_model, batch)[0].to(p_BTV.device)
        if p_BTV.shape != q_BTV.shape:
            raise EvaluationError(f"vocabularies of {p_BTV.shape[-1]} and {q_BTV.shape[-1]} tokens cannot be compared")
        kl_N[rows] = _per_document((p_BTV.exp() * (p_BTV - q_BTV)).sum(-1), kept_BT)
        same_N[rows] = _per_document((p_BTV.argmax(-1) == q_BTV.argmax(-1)).float(), kept_BT)
    return Agreement(kl=_ratio(kl_N, tokens_N), top1=_ratio(same_N, tokens_N), tokens=int(tokens_N.sum()))


# --- batches ----------------------------------------------------------------------------------------------------------


def _batches(sequences: Sequences, batch_tokens: int) -> Iterator[tuple[list[int], list[Sequence[int]]]]:
    """Documents of similar length together, with their positions; a document longer than a batch goes alone."""
    rows: list[int] = []
    for row in sorted(range(len(sequences)), key=lambda row: -len(sequences[row])):
        if len(sequences[row]) < 2:
            break  # nothing to predict, and nothing in what follows
        if rows and (len(rows) + 1) * len(sequences[rows[0]]) > batch_tokens:
            yield rows, [sequences[index] for index in rows]
            rows = []
        rows.append(row)
    if rows:
        yield rows, [sequences[index] for index in rows]


def _log_probabilities(model: Any, batch: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """fp32 log-probabilities of every next token, the ids, and which predictions are of real tokens."""
    import torch

    longest = max(map(len, batch))
    device = next(model.parameters()).device
    ids_BT = torch.tensor([[*ids, *[0] * (longest - len(ids))] for ids in batch], device=device)
    mask_BT = torch.tensor([[1] * len(ids) + [0] * (longest - len(ids)) for ids in batch], device=device)
    with torch.inference_mode():
        logits_BTV = model(input_ids=ids_BT, attention_mask=mask_BT, use_cache=False).logits[:, :-1]
        return torch.log_softmax(logits_BTV.float(), dim=-1), ids_BT, mask_BT[:, 1:].bool()


def _per_document(values_BT: torch.Tensor, kept_BT: torch.Tensor) -> FloatArray:
    total: FloatArray = values_BT.double().masked_fill(~kept_BT, 0.0).sum(1).cpu().numpy()
    return total


def _predicted(sequences: Sequences) -> IntArray:
    return np.array([max(len(ids) - 1, 0) for ids in sequences], dtype=np.int64)


# --- estimates --------------------------------------------------------------------------------------------------------


def _ratio(sums_N: FloatArray, tokens_N: IntArray) -> Estimate:
    """Sum over sum with the linearised standard error of a ratio, documents as clusters (Cochran 1977, chapter 6)."""
    from scipy.stats import t

    kept = tokens_N > 0
    n, total = int(kept.sum()), int(tokens_N.sum())
    if n < 2:
        raise EvaluationError("an interval needs at least two documents of two tokens or more")
    value = float(sums_N.sum() / total)
    residuals_N = sums_N[kept] - value * tokens_N[kept]
    error = math.sqrt(n / (n - 1) * float((residuals_N**2).sum())) / total
    reach = float(t.ppf(0.975, n - 1)) * error
    return Estimate(value=value, interval=(value - reach, value + reach))


def _exponential(log: Estimate, losses: TokenLosses) -> Perplexity:
    lower, upper = map(math.exp, log.interval)
    return Perplexity(value=math.exp(log.value), interval=(lower, upper), tokens=int(losses.tokens.sum()))
