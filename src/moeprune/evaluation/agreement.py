"""Teacher-forced measures on held-out text: perplexity and how far two models' next-token distributions agree.

All intervals treat documents as clusters: tokens of one document are not independent.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from moeprune.errors import EvaluationError

if TYPE_CHECKING:
    import torch
    from torch import nn

    Measure = Callable[..., list[torch.Tensor]]

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]
Sequences = Sequence[Sequence[int]]

_PIECE = {True: 1 << 19, False: 1 << 26}  # logits that are widened to float32 at a time, on a CPU and elsewhere


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


class AgreementSums:
    """Sums of two models' predictions per document, added batch by batch from their logits.

    Whoever computes the logits can feed it, so that a model need not be in memory as a whole; nothing is kept of them.

    Args:
        documents: how many there are (N).

    Attributes:
        nll: negative log-likelihood in nats under the other model, [N].
        base_nll: the same under the base model, [N].
        kl: KL(base || other) in nats, [N].
        same: tokens on which both put the same token first, [N].
        tokens: predicted tokens, [N].
    """

    def __init__(self, documents: int) -> None:
        self.nll, self.base_nll, self.kl, self.same = np.zeros((4, documents))
        self.tokens = np.zeros(documents, dtype=np.int64)

    def add(
        self,
        rows: Sequence[int],
        base_logits_BTV: torch.Tensor,
        other_logits_BTV: torch.Tensor,
        ids_BT: torch.Tensor,
        mask_BT: torch.Tensor,
    ) -> None:
        """Add a batch.

        A long document may come in parts that overlap by one token: the last of a part only ends a prediction.

        Args:
            rows: which documents the batch holds, each once.
            base_logits_BTV: the base model's logits at every token of the batch, in any dtype.
            other_logits_BTV: the other model's.
            ids_BT: the tokens.
            mask_BT: 1 for tokens, 0 for padding on either side.

        Raises:
            EvaluationError: the models have different vocabularies.
        """
        if base_logits_BTV.shape != other_logits_BTV.shape:
            sizes = f"{base_logits_BTV.shape[-1]} and {other_logits_BTV.shape[-1]}"
            raise EvaluationError(f"vocabularies of {sizes} tokens cannot be compared")
        found = _sums(_comparison, 4, ids_BT, mask_BT, base_logits_BTV, other_logits_BTV.to(base_logits_BTV.device))
        for total_N, sums_B in zip((self.nll, self.base_nll, self.kl, self.same, self.tokens), found, strict=True):
            total_N[rows] += sums_B.astype(total_N.dtype)

    @property
    def losses(self) -> TokenLosses:
        """The other model's losses."""
        return TokenLosses(self.nll, self.tokens)

    @property
    def base_losses(self) -> TokenLosses:
        """The base model's losses."""
        return TokenLosses(self.base_nll, self.tokens)

    def agreement(self) -> Agreement:
        """How far the two models agree.

        Raises:
            EvaluationError: fewer than two documents with a predicted token.
        """
        kl, top1 = _ratio(self.kl, self.tokens), _ratio(self.same, self.tokens)
        return Agreement(kl=kl, top1=top1, tokens=int(self.tokens.sum()))


def token_losses(model: nn.Module, sequences: Sequences, batch_tokens: int = 8192) -> TokenLosses:
    """Negative log-likelihood of each document under a causal language model.

    Args:
        model: a transformers causal language model in evaluation mode.
        sequences: token ids per document; the first token is only ever context.
        batch_tokens: most tokens, padding included, in one forward pass.
    """
    nll_N, tokens_N = np.zeros(len(sequences)), np.zeros(len(sequences), dtype=np.int64)
    for rows, ids_BT, mask_BT in batches(sequences, batch_tokens):
        nll_N[rows], tokens_N[rows] = _sums(_loss, 1, ids_BT, mask_BT, logits_of(model, ids_BT, mask_BT))
    return TokenLosses(nll_N, tokens_N)


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
    sums = AgreementSums(len(sequences))
    for rows, ids_BT, mask_BT in batches(sequences, batch_tokens):
        base_BTV, pruned_BTV = (logits_of(model, ids_BT, mask_BT) for model in (base_model, pruned_model))
        sums.add(rows, base_BTV, pruned_BTV, ids_BT, mask_BT)
    return sums.agreement()


# --- batches ----------------------------------------------------------------------------------------------------------


def batches(sequences: Sequences, batch_tokens: int) -> Iterator[tuple[list[int], torch.Tensor, torch.Tensor]]:
    """Documents of similar length together, right-padded; those with nothing to predict are left out.

    Args:
        sequences: token ids per document.
        batch_tokens: most tokens, padding included, in a batch; a document longer than that goes alone.

    Yields:
        The documents' positions, their ids [B, T] and their mask [B, T], on the CPU.
    """
    rows: list[int] = []
    for row in sorted(range(len(sequences)), key=lambda row: -len(sequences[row])):
        if len(sequences[row]) < 2:
            break  # nothing to predict, and nothing in what follows
        if rows and (len(rows) + 1) * len(sequences[rows[0]]) > batch_tokens:
            yield rows, *_padded([sequences[index] for index in rows])
            rows = []
        rows.append(row)
    if rows:
        yield rows, *_padded([sequences[index] for index in rows])


def _padded(batch: Sequences) -> tuple[torch.Tensor, torch.Tensor]:
    import torch

    longest = max(map(len, batch))
    ids_BT = torch.tensor([[*ids, *[0] * (longest - len(ids))] for ids in batch])
    return ids_BT, torch.tensor([[1] * len(ids) + [0] * (longest - len(ids)) for ids in batch])


def logits_of(model: Any, ids_BT: torch.Tensor, mask_BT: torch.Tensor) -> torch.Tensor:
    """Logits [B, T, V] of a batch, on the model's device and without gradients."""
    import torch

    device = next(model.parameters()).device
    with torch.inference_mode():
        output = model(input_ids=ids_BT.to(device), attention_mask=mask_BT.to(device), use_cache=False)
    logits_BTV: torch.Tensor = output.logits
    return logits_BTV


# --- sums -------------------------------------------------------------------------------------------------------------


def _loss(next_N: torch.Tensor, p_NV: torch.Tensor) -> list[torch.Tensor]:
    return [-p_NV.gather(1, next_N[:, None])[:, 0]]


def _comparison(next_N: torch.Tensor, p_NV: torch.Tensor, q_NV: torch.Tensor) -> list[torch.Tensor]:
    kl_N = (p_NV.exp() * (p_NV - q_NV)).sum(-1)
    same_N = (p_NV.argmax(-1) == q_NV.argmax(-1)).float()
    return [*_loss(next_N, q_NV), *_loss(next_N, p_NV), kl_N, same_N]


def _sums(
    measure: Measure, quantities: int, ids_BT: torch.Tensor, mask_BT: torch.Tensor, *logits_BTV: torch.Tensor
) -> FloatArray:
    """Add up quantities of predicted tokens by document, [quantities + 1, B]; the last row counts the tokens.

    Only a few tokens at a time are widened to float32: the logits of a large vocabulary would not fit in memory twice.

    Args:
        measure: takes the tokens that came, [N], and each model's log-probabilities, [N, V], and gives quantities [N].
        quantities: how many it gives.
        ids_BT: the tokens.
        mask_BT: which of them are real.
        logits_BTV: of each model.
    """
    import torch

    device, vocabulary = logits_BTV[0].device, logits_BTV[0].shape[-1]
    ids_BT, real_BT = ids_BT.to(device), mask_BT.to(device).bool()
    predicting_BT = real_BT[:, :-1] & real_BT[:, 1:]
    row, position = predicting_BT.nonzero(as_tuple=True)
    step = max(1, _PIECE[device.type == "cpu"] // vocabulary)
    # Places made beforehand: no order of summation matters, and nothing small is left between large pieces in memory.
    values_BT = torch.zeros((quantities, *predicting_BT.shape), dtype=torch.float64, device=device)
    with torch.inference_mode():
        for at in zip(torch.split(row, step), torch.split(position, step), strict=True):
            logp_NV = (torch.log_softmax(logits[at].float(), dim=-1) for logits in logits_BTV)
            values_BT[:, at[0], at[1]] = torch.stack(measure(ids_BT[at[0], at[1] + 1], *logp_NV)).double()
        sums: FloatArray = torch.cat([values_BT, predicting_BT[None].double()]).sum(-1).cpu().numpy()
    return sums


# --- estimates --------------------------------------------------------------------------------------------------------


def _ratio(sums_N: FloatArray, tokens_N: IntArray) -> Estimate:
    """Sum over sum with the linearised standard error of a ratio, documents as clusters (Cochran 1977, chapter 6)."""
    from scipy.stats import t

    kept = tokens_N > 0
    n, total = int(kept.sum()), int(tokens_N.sum())
    if n < 2:
        raise EvaluationError("an interval needs at least two documents of two tokens or more")
    if not np.isfinite(sums_N).all():
        raise EvaluationError("a model's probabilities are not finite", "load it in bfloat16 or float32")
    value = float(sums_N.sum() / total)
    residuals_N = sums_N[kept] - value * tokens_N[kept]
    error = math.sqrt(n / (n - 1) * float((residuals_N**2).sum())) / total
    reach = float(t.ppf(0.975, n - 1)) * error
    return Estimate(value=value, interval=(value - reach, value + reach))


def _exponential(log: Estimate, losses: TokenLosses) -> Perplexity:
    lower, upper = map(math.exp, log.interval)
    return Perplexity(value=math.exp(log.value), interval=(lower, upper), tokens=int(losses.tokens.sum()))
