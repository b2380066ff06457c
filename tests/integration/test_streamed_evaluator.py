"""Scoring plans layer by layer gives what the model in memory gives, whatever is in memory and whatever in files."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import moeprune
from moeprune.architectures import ARCHITECTURES
from moeprune.errors import EvaluationError, PlanError
from moeprune.evaluation import streamed
from moeprune.evaluation.agreement import agreement
from moeprune.evaluation.evaluator import Evaluator, KeepLists, PlanScore, ResidentEvaluator
from moeprune.evaluation.streamed import StreamedEvaluator
from moeprune.streaming.states import SpilledStates
from moeprune.streaming.stream import LayerStream

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PlanByHand = Callable[..., moeprune.PruningPlan]
CheckpointOf = Callable[..., Path]
ModelOf = Callable[..., "PreTrainedModel"]
Loadable = Callable[[Path], Path]
StreamOf = Callable[..., LayerStream]
Scored = tuple[LayerStream, list[KeepLists], list[PlanScore]]
EVEN, ODD = range(0, 16, 2), range(1, 16, 2)


@pytest.fixture(scope="module")
def sequences() -> list[list[int]]:
    """Documents of many lengths, also too short to predict anything."""
    rng = np.random.default_rng(0)
    return [rng.integers(0, 97, length).tolist() for length in (9, 1, 30, 2, 0, 17, 5, 30, 21)]


@pytest.fixture
def stream_of(checkpoint_of: CheckpointOf, loadable: Loadable) -> StreamOf:
    """A checkpoint of an architecture as a stream of layers."""

    def build(model_type: str, **changes: Any) -> LayerStream:
        import torch

        folder = loadable(checkpoint_of(model_type, **changes))
        return LayerStream(moeprune.open_checkpoint(folder), device=torch.device("cpu"))

    return build


def three_plans(stream: LayerStream, plan_by_hand: PlanByHand) -> list[KeepLists]:
    """Two plans of all layers, and one of the last layer only."""
    checkpoint = stream.weights.checkpoint
    plans = [plan_by_hand(checkpoint.path, checkpoint.num_experts // 2, seed=seed, mtp=False) for seed in range(2)]
    first, second = ({index: layer.keep for index, layer in plan.layers.items()} for plan in plans)
    last = checkpoint.moe_layers[-1]
    return [first, second, {last: first[last]}]


def assert_equal(found: Sequence[PlanScore], expected: Sequence[PlanScore], tolerance: float = 1e-5) -> None:
    """Document by document, and no two plans alike."""
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one.losses.tokens, other.losses.tokens)
        np.testing.assert_array_equal(one.same, other.same)
        for mine, theirs in ((one.losses.nll, other.losses.nll), (one.base_losses.nll, other.base_losses.nll)):
            np.testing.assert_allclose(mine, theirs, rtol=tolerance)
        np.testing.assert_allclose(one.kl, other.kl, rtol=tolerance, atol=tolerance)
    assert len({score.agreement.kl.value for score in found}) == len(found)


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_streamed_scores_are_those_of_the_model_in_memory(
    model_type: str, stream_of: StreamOf, model_of: ModelOf, plan_by_hand: PlanByHand, sequences: list[list[int]]
) -> None:
    """Of three plans in one pass, one of which leaves all layers but the last as they are."""
    stream = stream_of(model_type)
    keeps = three_plans(stream, plan_by_hand)
    expected = ResidentEvaluator(model_of(model_type), sequences, batch_tokens=64)(keeps)
    assert_equal(StreamedEvaluator(stream, sequences, batch_tokens=64)(keeps), expected)


@pytest.fixture
def scored(stream_of: StreamOf, model_of: ModelOf, plan_by_hand: PlanByHand, sequences: list[list[int]]) -> Scored:
    """A stream with a shared expert and groups, plans for it, and their scores in memory."""
    stream = stream_of("deepseek_v3")
    keeps = three_plans(stream, plan_by_hand)
    return stream, keeps, ResidentEvaluator(model_of("deepseek_v3"), sequences, batch_tokens=64)(keeps)


def test_states_may_live_in_files(scored: Scored, sequences: list[list[int]], tmp_path: Path) -> None:
    """The same scores; no state of a plan is written before the plan is apart from the base model."""
    stream, keeps, expected = scored
    states = functools.partial(SpilledStates, folder=tmp_path)
    assert_equal(StreamedEvaluator(stream, sequences, batch_tokens=64, states=states)(keeps), expected)
    padded = 2 * 30 + 3 * 21 + 2 * 5  # tokens of three batches: their documents times the longest of them
    last, before = (copies * padded * 32 * 4 for copies in (4, 3))  # of the base and of the plans that are apart
    assert {file.stat().st_size for file in tmp_path.iterdir()} == {last, before}


def test_experts_may_come_in_chunks(scored: Scored, sequences: list[list[int]]) -> None:
    """Three experts at a time, of which a plan may have dropped all or none."""
    stream, keeps, expected = scored
    stream.chunk = 3
    assert_equal(StreamedEvaluator(stream, sequences, batch_tokens=64)(keeps), expected)


def test_logits_may_come_in_pieces(
    scored: Scored,
    sequences: list[list[int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """However few tokens have their logits in memory, every token but the first of a document is predicted once."""
    stream, keeps, expected = scored
    for piece in (1, 7, 20):
        monkeypatch.setattr(streamed, "_PIECE", piece)
        assert_equal(StreamedEvaluator(stream, sequences, batch_tokens=64)(keeps), expected)


def test_scores_are_those_of_pruned_checkpoints(
    stream_of: StreamOf, model_of: ModelOf, plan_by_hand: PlanByHand, sequences: list[list[int]], tmp_path: Path
) -> None:
    """What `apply` writes and stock transformers loads agrees with the base as the streamed score says."""
    from transformers import AutoModelForCausalLM

    stream = stream_of("glm4_moe")
    base = stream.weights.checkpoint.path
    plans = [plan_by_hand(base, 8, seed=seed) for seed in range(2)]
    keeps = [{index: plan.layers[index].keep for index in (1, 2)} for plan in plans]
    for number, score in enumerate(StreamedEvaluator(stream, sequences, batch_tokens=64)(keeps)):
        written = moeprune.apply(base, plans[number], tmp_path / str(number))
        pruned = AutoModelForCausalLM.from_pretrained(written).eval()
        expected = agreement(model_of("glm4_moe"), pruned, sequences, batch_tokens=64)
        assert score.agreement.top1 == expected.top1
        assert score.agreement.kl.value == pytest.approx(expected.kl.value, rel=1e-5)


def test_plans_that_change_nothing_score_as_the_base_does(stream_of: StreamOf, sequences: list[list[int]]) -> None:
    """A plan without layers, and one that keeps all experts; no plan at all is no work."""
    evaluator: Evaluator = StreamedEvaluator(stream_of("qwen3_moe"), sequences, batch_tokens=64)
    for score in evaluator([{}, {0: range(16), 2: range(16)}]):
        assert score.perplexity_ratio.interval == (1.0, 1.0)
        assert (score.agreement.kl.value, score.agreement.top1.value) == (0.0, 1.0)
    assert evaluator([]) == []


def test_layers_run_only_for_plans_that_are_apart(
    stream_of: StreamOf, sequences: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of three layers a plan that masks the last runs one, a plan that masks the first all; the base runs all."""
    stream, runs = stream_of("qwen3_moe"), list[int]()
    evaluator = StreamedEvaluator(stream, sequences, batch_tokens=10_000)
    run = stream.run
    monkeypatch.setattr(stream, "run", lambda index, *given: (runs.append(index), run(index, *given))[1])
    alone = [evaluator([keep])[0].kl.tolist() for keep in ({0: EVEN}, {2: ODD})]
    assert runs == [0, 0, 1, 1, 2, 2, 0, 1, 2, 2]
    assert [score.kl.tolist() for score in evaluator([{0: EVEN}, {2: ODD}])] == alone


def test_what_cannot_be_scored_is_refused(
    stream_of: StreamOf, sequences: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Too few documents, and a wrong layer among right ones before any weight is read."""
    stream = stream_of("qwen3_moe")
    with pytest.raises(EvaluationError, match="at least two documents"):
        StreamedEvaluator(stream, [sequences[0], [1], []])
    monkeypatch.setattr(stream, "embed", None)
    with pytest.raises(PlanError, match=r"no MoE layer 1 \(it has \[0, 2\]\)"):
        StreamedEvaluator(stream, sequences)([{0: EVEN}, {1: EVEN}])
