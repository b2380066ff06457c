"""Teacher-forced measures of tiny models against brute-force loops."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import pytest

from moeprune.errors import EvaluationError
from moeprune.evaluation import agreement as module
from moeprune.evaluation.agreement import (
    AgreementSums,
    TokenLosses,
    agreement,
    perplexity,
    perplexity_ratio,
    token_losses,
)

if TYPE_CHECKING:
    import torch
    from torch import nn

VOCABULARY = 50


def make_model(seed: int, vocabulary: int = VOCABULARY) -> nn.Module:
    """A random Qwen3-MoE of two layers."""
    import torch
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(seed)
    config = Qwen3MoeConfig(
        vocab_size=vocabulary,
        hidden_size=32,
        intermediate_size=32,
        moe_intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        num_experts=4,
        num_experts_per_tok=2,
        initializer_range=0.5,
    )
    return Qwen3MoeForCausalLM(config).eval()


@pytest.fixture(scope="module")
def models() -> tuple[nn.Module, nn.Module]:
    """Two random models of one shape."""
    return make_model(0), make_model(1)


@pytest.fixture(scope="module")
def sequences() -> list[list[int]]:
    """Documents of many lengths, also too short to predict anything."""
    rng = np.random.default_rng(0)
    return [rng.integers(0, VOCABULARY, length).tolist() for length in (9, 1, 30, 2, 0, 17, 5, 30)]


def test_losses_equal_a_loop(models: tuple[nn.Module, nn.Module], sequences: list[list[int]]) -> None:
    """Each document's loss is that of the document alone, token by token."""
    import torch

    losses = token_losses(models[0], sequences, batch_tokens=64)
    assert losses.tokens.tolist() == [8, 0, 29, 1, 0, 16, 4, 29]
    for ids, nll in zip(sequences, losses.nll, strict=True):
        expected = 0.0
        if ids:
            with torch.no_grad():
                logits_TV = models[0](torch.tensor([ids])).logits[0].double()
            for position in range(len(ids) - 1):
                expected -= float(torch.log_softmax(logits_TV[position], -1)[ids[position + 1]])
        assert nll == pytest.approx(expected, rel=1e-5, abs=1e-5)


def test_losses_do_not_depend_on_padding(models: tuple[nn.Module, nn.Module], sequences: list[list[int]]) -> None:
    """One document per batch and all in one batch give the same losses."""
    alone = token_losses(models[0], sequences, batch_tokens=1)
    together = token_losses(models[0], sequences, batch_tokens=10_000)
    assert together.nll == pytest.approx(alone.nll, rel=1e-5)


def test_a_model_agrees_with_itself_exactly(models: tuple[nn.Module, nn.Module], sequences: list[list[int]]) -> None:
    """KL of a model to itself is exactly zero, and every first choice is the same."""
    found = agreement(models[0], models[0], sequences)
    assert (found.kl.value, found.kl.interval, found.top1.value, found.tokens) == (0.0, (0.0, 0.0), 1.0, 87)


def test_agreement_equals_a_loop(models: tuple[nn.Module, nn.Module], sequences: list[list[int]]) -> None:
    """KL and top-1 agreement of two models are their means over all predicted positions."""
    import torch

    kl, same = [], []
    for ids in (ids for ids in sequences if len(ids) > 1):
        with torch.no_grad():
            p_TV, q_TV = (torch.log_softmax(model(torch.tensor([ids])).logits[0, :-1], -1) for model in models)
        kl += [float((p.exp() * (p - q)).sum()) for p, q in zip(p_TV, q_TV, strict=True)]
        same += [float(p.argmax() == q.argmax()) for p, q in zip(p_TV, q_TV, strict=True)]
    found = agreement(*models, sequences, batch_tokens=64)
    assert found.kl.value == pytest.approx(np.mean(kl), rel=1e-4)
    assert found.top1.value == pytest.approx(np.mean(same))
    assert 0 < found.kl.interval[0] < found.kl.value < found.kl.interval[1]


# --- sums from logits -------------------------------------------------------------------------------------------------


def random_batch(rows: int = 3, length: int = 12) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits of two models and token ids."""
    import torch

    generator = torch.Generator().manual_seed(3)
    base, noise = torch.randn(2, rows, length, VOCABULARY, generator=generator)
    return base, base + noise, torch.randint(0, VOCABULARY, (rows, length), generator=generator)


def arrays_of(sums: AgreementSums) -> list[list[float]]:
    """Everything that was added up."""
    return [values.tolist() for values in (sums.nll, sums.base_nll, sums.kl, sums.same, sums.tokens)]


def test_sums_equal_a_loop_on_either_padding() -> None:
    """Each document's sums are those of its own tokens, padded right, left or not at all."""
    import torch

    base, other, ids = random_batch()
    mask = torch.ones_like(ids)
    mask[0, 7:], mask[1, :4] = 0, 0
    sums = AgreementSums(5)
    sums.add([4, 0, 2], base, other, ids, mask)
    assert sums.tokens.tolist() == [7, 0, 11, 0, 6]
    for document, row, real in ((4, 0, slice(0, 7)), (0, 1, slice(4, 12)), (2, 2, slice(0, 12))):
        p, q, came = (part[row, real] for part in (base, other, ids))
        p, q = p[:-1].double().log_softmax(-1), q[:-1].double().log_softmax(-1)
        nll, base_nll = (-float(logp.gather(1, came[1:, None]).sum()) for logp in (q, p))
        assert sums.nll[document] == pytest.approx(nll, rel=1e-6)
        assert sums.base_nll[document] == pytest.approx(base_nll, rel=1e-6)
        assert sums.kl[document] == pytest.approx(float((p.exp() * (p - q)).sum()), rel=1e-5)
        assert sums.same[document] == float((p.argmax(-1) == q.argmax(-1)).sum())
    assert not any(values[1] or values[3] for values in arrays_of(sums))


def test_sums_do_not_depend_on_how_documents_come() -> None:
    """All in one batch, one by one, and in parts that overlap by a token: the same sums."""
    import torch

    base, other, ids = random_batch()
    mask = torch.ones_like(ids)
    together, alone, parts = (AgreementSums(3) for _ in range(3))
    together.add(range(3), base, other, ids, mask)
    for row in range(3):
        one = slice(row, row + 1)
        alone.add([row], base[one], other[one], ids[one], mask[one])
    for part in (slice(0, 5), slice(4, 9), slice(8, 12)):
        parts.add(range(3), base[:, part], other[:, part], ids[:, part], mask[:, part])
    assert arrays_of(alone) == arrays_of(together)
    for found, expected in zip(arrays_of(parts), arrays_of(together), strict=True):
        assert found == pytest.approx(expected, rel=1e-12)


def test_only_a_few_tokens_are_widened_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """The float32 working memory is bounded whatever the batch, and the sums stay the same."""
    import torch

    base, other, ids = random_batch(rows=6, length=40)
    whole, pieces, log_softmax, sizes = AgreementSums(6), AgreementSums(6), torch.log_softmax, []
    whole.add(range(6), base, other, ids, torch.ones_like(ids))

    def watched(values: torch.Tensor, dim: int) -> torch.Tensor:
        sizes.append(values.numel())
        return log_softmax(values, dim=dim)

    monkeypatch.setattr(module, "_PIECE", {True: 7 * VOCABULARY + 1})
    monkeypatch.setattr(torch, "log_softmax", watched)
    pieces.add(range(6), base, other, ids, torch.ones_like(ids))
    assert arrays_of(pieces) == arrays_of(whole)
    assert max(sizes) == 7 * VOCABULARY
    assert sum(sizes) == 2 * 6 * 39 * VOCABULARY


def test_half_precision_is_widened() -> None:
    """Sums of bf16 logits are those of the same values in float32."""
    import torch

    base, other, ids = (part.bfloat16() if part.is_floating_point() else part for part in random_batch())
    narrow, wide = AgreementSums(3), AgreementSums(3)
    narrow.add(range(3), base, other, ids, torch.ones_like(ids))
    wide.add(range(3), base.float(), other.float(), ids, torch.ones_like(ids))
    assert arrays_of(narrow) == arrays_of(wide)


# --- estimates --------------------------------------------------------------------------------------------------------


def test_perplexity_and_its_paired_ratio(models: tuple[nn.Module, nn.Module], sequences: list[list[int]]) -> None:
    """Perplexity is exp of the mean loss; the ratio of two is paired, and of one to itself exactly one."""
    base, other = (token_losses(model, sequences) for model in models)
    value = perplexity(base)
    assert value.value == pytest.approx(math.exp(base.nll.sum() / base.tokens.sum()))
    assert value.interval[0] < value.value < value.interval[1]
    ratio = perplexity_ratio(base, other)
    assert ratio.value == pytest.approx(perplexity(other).value / value.value)
    assert perplexity_ratio(base, base).interval == (1.0, 1.0)


def test_interval_covers_the_truth() -> None:
    """Over many corpora of uneven documents the interval holds the true perplexity 95 % of the time."""
    rng = np.random.default_rng(0)
    held = []
    for _ in range(1000):
        tokens_N = rng.integers(5, 200, 60)
        document_N = rng.normal(2.0, 0.3, 60)  # documents differ in difficulty: tokens are not independent
        losses = TokenLosses(tokens_N * document_N + rng.normal(0, np.sqrt(tokens_N)), tokens_N)
        lower, upper = perplexity(losses).interval
        held.append(lower <= math.exp(2.0) <= upper)
    assert 0.92 < np.mean(held) < 0.975


def test_what_cannot_be_measured_is_refused(models: tuple[nn.Module, nn.Module], sequences: list[list[int]]) -> None:
    """One document, different documents, different vocabularies and overflowing logits have no answer."""
    with pytest.raises(EvaluationError, match="two documents"):
        perplexity(token_losses(models[0], [sequences[0], [1]]))
    with pytest.raises(EvaluationError, match="different documents"):
        perplexity_ratio(token_losses(models[0], sequences[:3]), token_losses(models[0], sequences[3:6]))
    with pytest.raises(EvaluationError, match="vocabularies of 50 and 60"):
        agreement(models[0], make_model(0, vocabulary=60), sequences)
    base, other, ids = random_batch()
    sums = AgreementSums(3)
    sums.add(range(3), base, other * float("inf"), ids, ids >= 0)
    with pytest.raises(EvaluationError, match="not finite"):
        sums.agreement()
