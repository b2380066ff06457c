"""Scoring plans on a model in memory, against pruned copies of it."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

import moeprune
from moeprune.errors import EvaluationError, PlanError
from moeprune.evaluation.agreement import agreement, perplexity, perplexity_ratio, token_losses
from moeprune.evaluation.evaluator import Evaluator, KeepLists, ResidentEvaluator, difference

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PlanByHand = Callable[..., moeprune.PruningPlan]
CheckpointOf = Callable[..., Path]
ModelOf = Callable[..., "PreTrainedModel"]
EVEN, ODD = range(0, 16, 2), range(1, 16, 2)


@pytest.fixture(scope="module")
def sequences() -> list[list[int]]:
    """Documents of many lengths, also too short to predict anything."""
    rng = np.random.default_rng(0)
    return [rng.integers(0, 97, length).tolist() for length in (9, 1, 30, 2, 0, 17, 5, 30, 21)]


@pytest.fixture
def evaluator(model_of: ModelOf, sequences: list[list[int]]) -> Evaluator:
    """Of a model with MoE layers 0 and 2."""
    return ResidentEvaluator(model_of("qwen3_moe"), sequences, batch_tokens=64)


@pytest.mark.parametrize("model_type", ["qwen3_moe", "deepseek_v3"])
def test_scores_are_those_of_pruned_copies(
    model_type: str,
    checkpoint_of: CheckpointOf,
    model_of: ModelOf,
    plan_by_hand: PlanByHand,
    sequences: list[list[int]],
) -> None:
    """Every plan's perplexity, ratio, KL and top-1 agreement equal those of a copy that was pruned in place."""
    base, model = checkpoint_of(model_type), model_of(model_type)
    plans = [plan_by_hand(base, 8, seed=seed, mtp=False) for seed in range(3)]
    keeps = [{index: layer.keep for index, layer in plan.layers.items()} for plan in plans]
    scores = ResidentEvaluator(model, sequences, batch_tokens=64)(keeps)
    for plan, score in zip(plans, scores, strict=True):
        pruned = moeprune.prune_model(copy.deepcopy(model), plan)
        base_losses, losses = (token_losses(each, sequences, batch_tokens=64) for each in (model, pruned))
        assert np.array_equal(score.losses.nll, losses.nll)
        assert np.array_equal(score.base_losses.nll, base_losses.nll)
        assert score.perplexity == perplexity(losses)
        assert score.perplexity_ratio == perplexity_ratio(base_losses, losses)
        assert score.agreement == agreement(model, pruned, sequences, batch_tokens=64)
        assert score.kl.sum() / score.losses.tokens.sum() == score.agreement.kl.value
        assert score.same.sum() / score.losses.tokens.sum() == score.agreement.top1.value
    assert len({score.perplexity.value for score in scores}) == 3


def test_keeping_everything_changes_nothing(evaluator: Evaluator) -> None:
    """A plan without layers, and one that keeps all experts, score exactly as the base does."""
    for score in evaluator([{}, {0: range(16), 2: range(16)}]):
        assert score.perplexity_ratio.interval == (1.0, 1.0)
        assert (score.agreement.kl.value, score.agreement.top1.value) == (0.0, 1.0)


def test_plans_are_scored_alone_and_in_order(evaluator: Evaluator) -> None:
    """A plan's score does not depend on the plans beside it, and layers that it leaves out keep all experts."""
    keeps: list[KeepLists] = [{0: EVEN}, {2: ODD}, {0: EVEN, 2: ODD}]
    together = evaluator(keeps)
    for keep, score in zip(keeps, together, strict=True):
        assert evaluator([keep])[0].kl.tolist() == score.kl.tolist()
    assert len({score.agreement.kl.value for score in together}) == 3


def test_the_base_runs_once_per_batch(model_of: ModelOf, sequences: list[list[int]]) -> None:
    """Three plans on five batches are twenty forward passes; no plans are none."""
    model, passes = model_of("qwen3_moe"), []
    evaluator = ResidentEvaluator(model, sequences, batch_tokens=40)
    hook = model.register_forward_pre_hook(lambda _, __, kwargs: passes.append(kwargs["input_ids"]), with_kwargs=True)
    assert evaluator([]) == []
    assert not passes
    evaluator([{0: EVEN}, {0: ODD}, {2: EVEN}])
    hook.remove()
    assert len(passes) == 20
    assert max(ids.numel() for ids in passes) <= 40
    for first in range(0, 20, 4):
        assert all(ids.equal(passes[first]) for ids in passes[first : first + 4])


def test_two_plans_are_compared_document_by_document(evaluator: Evaluator) -> None:
    """The ratio of two plans is that of their perplexities, with an interval that pairs documents."""
    first, second = evaluator([{0: EVEN, 2: EVEN}, {0: EVEN, 2: ODD}])
    found = difference(first, second)
    assert found.value == pytest.approx(second.perplexity.value / first.perplexity.value)
    assert difference(second, first).value == pytest.approx(1 / found.value)
    assert difference(first, first).interval == (1.0, 1.0)

    def width(interval: tuple[float, float]) -> float:
        return math.log(interval[1] / interval[0])

    assert width(found.interval) < math.hypot(width(first.perplexity.interval), width(second.perplexity.interval))


def test_what_cannot_be_scored_is_refused(
    evaluator: Evaluator, model_of: ModelOf, sequences: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A wrong plan among right ones is refused before the model runs; so are too few documents, and unlike ones."""
    model = model_of("qwen3_moe")
    [score] = evaluator([{0: EVEN}])
    [other] = ResidentEvaluator(model, sequences[:3])([{0: EVEN}])
    with pytest.raises(EvaluationError, match="different documents"):
        difference(score, other)
    with pytest.raises(EvaluationError, match="at least two documents"):
        ResidentEvaluator(model, [sequences[0], [1], []])
    monkeypatch.setattr(model, "forward", None)
    with pytest.raises(PlanError, match=r"no MoE layer 1 \(it has \[0, 2\]\)"):
        evaluator([{0: EVEN}, {1: EVEN}])
    with pytest.raises(PlanError, match="layer 2: a token could reach 2 experts"):
        evaluator([{0: EVEN}, {2: range(2)}])
