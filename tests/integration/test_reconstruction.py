"""The loss of keeping only some experts of a layer, and the search for the set with the least."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import moeprune
from moeprune.checkpoint import open_checkpoint
from moeprune.errors import ConfigError, PlanError
from moeprune.evaluation.reconstruction import ResidentSubsetLoss, StreamedSubsetLoss
from moeprune.experts import expert_layers
from moeprune.strategies.reconstruction import reconstruct
from moeprune.strategies.selection import Selection

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PlanByHand = Callable[..., moeprune.PruningPlan]
CheckpointOf = Callable[..., Path]
ModelOf = Callable[..., "PreTrainedModel"]
FAMILIES = pytest.mark.parametrize("model_type", ["qwen3_moe", "glm4_moe", "deepseek_v3", "gpt_oss", "mixtral"])


@pytest.fixture(scope="module")
def sequences() -> list[list[int]]:
    """Documents of many lengths, so that batches have padding."""
    rng = np.random.default_rng(0)
    return [rng.integers(1, 97, length).tolist() for length in (9, 30, 2, 17, 5, 30, 21)]


def by_hand(
    model: PreTrainedModel, pruned: PreTrainedModel, layer: int, sequences: list[list[int]], source: PreTrainedModel
) -> float:
    """One document after the other: what the experts of both make of what the block in ``source`` is given."""
    import torch

    modules = [next(one for one in expert_layers(each) if one.index == layer) for each in (source, model, pruned)]
    total, caught, outputs = 0.0, list[Any](), list[Any]()
    hooks = [modules[0].block.register_forward_pre_hook(lambda _, args: caught.append(args[0]))]
    hooks += [one.experts.register_forward_hook(lambda _, __, out: outputs.append(out)) for one in modules[1:]]
    with torch.no_grad():
        for ids in sequences:
            caught.clear()
            source(torch.tensor([ids]))
            given = caught[0]
            outputs.clear()
            modules[1].block(given)
            modules[2].block(given)
            whole, part = (output.double().reshape(-1, output.shape[-1]) for output in outputs)
            total += float(((whole - part) ** 2).sum())
    for hook in hooks:
        hook.remove()
    return float(total**0.5)


@FAMILIES
def test_the_loss_is_that_of_a_pruned_copy(
    model_type: str,
    checkpoint_of: CheckpointOf,
    model_of: ModelOf,
    plan_by_hand: PlanByHand,
    sequences: list[list[int]],
) -> None:
    """The routed output of each layer against that of a copy with the experts taken out, on what the original gives."""
    model = model_of(model_type)
    plan = plan_by_hand(checkpoint_of(model_type), 8 if model_type == "deepseek_v3" else 4, mtp=False)
    pruned = moeprune.prune_model(copy.deepcopy(model), plan)
    loss = ResidentSubsetLoss(model, sequences, batch_tokens=512)  # one batch
    for layer, decision in plan.layers.items():
        wanted = by_hand(model, pruned, layer, sequences, model)
        assert wanted > 0.01
        assert loss(layer, decision.keep) == pytest.approx(wanted, rel=1e-4)
        assert loss(layer, range(expert_layers(model)[0].num_experts)) == 0


@FAMILIES
def test_progressive_losses_are_those_behind_pruned_layers(
    model_type: str,
    checkpoint_of: CheckpointOf,
    model_of: ModelOf,
    plan_by_hand: PlanByHand,
    sequences: list[list[int]],
) -> None:
    """A layer is given what a pruned copy gives it, once what the layers before it keep is settled."""
    model = model_of(model_type)
    plan = plan_by_hand(checkpoint_of(model_type), 8 if model_type == "deepseek_v3" else 4, mtp=False)
    pruned = moeprune.prune_model(copy.deepcopy(model), plan)
    progressive = ResidentSubsetLoss(model, sequences, batch_tokens=512, progressive=True)
    plain = ResidentSubsetLoss(model, sequences, batch_tokens=512)
    for layer, decision in plan.layers.items():
        found = progressive(layer, decision.keep)
        assert found == pytest.approx(by_hand(model, pruned, layer, sequences, pruned), rel=1e-4)
        for loss in (progressive, plain):
            loss.settle(layer, decision.keep)
    assert found != pytest.approx(plain(layer, decision.keep), rel=1e-3)
    assert plain(min(plan.layers), plan.layers[min(plan.layers)].keep) > 0


@FAMILIES
@pytest.mark.parametrize("progressive", [False, True])
def test_layer_by_layer_it_is_the_same(
    model_type: str,
    progressive: bool,
    checkpoint_of: CheckpointOf,
    model_of: ModelOf,
    plan_by_hand: PlanByHand,
    sequences: list[list[int]],
) -> None:
    """A checkpoint of which one layer, or some experts, are in memory gives the losses of the whole model."""
    import torch

    from moeprune.streaming.stream import LayerStream

    folder = checkpoint_of(model_type)
    plan = plan_by_hand(folder, 8 if model_type == "deepseek_v3" else 4, mtp=False)
    whole = ResidentSubsetLoss(model_of(model_type), sequences, batch_tokens=64, progressive=progressive)
    for chunk in (99, 3):
        stream = LayerStream(open_checkpoint(folder), device=torch.device("cpu"))
        stream.chunk = chunk
        with StreamedSubsetLoss(stream, sequences, batch_tokens=64, progressive=progressive) as streamed:
            for layer, decision in plan.layers.items():
                assert streamed(layer, decision.keep) == pytest.approx(whole(layer, decision.keep), rel=1e-4)
                streamed.settle(layer, decision.keep)
                whole.settle(layer, decision.keep)
            with pytest.raises(PlanError, match="layer 0 was passed already" if 0 in plan.layers else "no MoE layer 0"):
                streamed(0, (0, 1, 2, 3))
        whole = ResidentSubsetLoss(model_of(model_type), sequences, batch_tokens=64, progressive=progressive)


def test_only_the_first_tokens_are_used(model_of: ModelOf, sequences: list[list[int]]) -> None:
    """As many documents as it takes, at least one."""
    keep = (0, 3, 5, 9)
    first = ResidentSubsetLoss(model_of("qwen3_moe"), sequences[:2])(0, keep)
    assert ResidentSubsetLoss(model_of("qwen3_moe"), sequences, tokens=20)(0, keep) == pytest.approx(first)
    with pytest.raises(ConfigError, match="no token to measure"):
        ResidentSubsetLoss(model_of("qwen3_moe"), [[], [4]])


def test_what_cannot_be_kept_is_refused(model_of: ModelOf, sequences: list[list[int]]) -> None:
    """A layer without experts, and fewer experts than top-k."""
    loss = ResidentSubsetLoss(model_of("qwen3_moe"), sequences)
    with pytest.raises(PlanError, match="no MoE layer 1"):
        loss(1, (0, 1, 2))
    with pytest.raises(PlanError, match="top-3"):
        loss(0, (0, 1))


def test_the_model_is_left_as_it_was(model_of: ModelOf, sequences: list[list[int]]) -> None:
    """Its logits are the same, and no hook stays behind."""
    import torch

    model = model_of("qwen3_moe")
    before = model(torch.tensor([sequences[0]])).logits
    hooks = [(len(module._forward_hooks), len(module._forward_pre_hooks)) for module in model.modules()]
    loss = ResidentSubsetLoss(model, sequences, progressive=True)
    loss(0, range(8))
    loss.settle(0, range(8))
    loss(2, range(8))
    assert torch.equal(model(torch.tensor([sequences[0]])).logits, before)
    assert hooks == [(len(module._forward_hooks), len(module._forward_pre_hooks)) for module in model.modules()]


def test_the_search_finds_the_best_of_all_sets(model_of: ModelOf, sequences: list[list[int]]) -> None:
    """Of a layer of 8 experts, 4 of which stay: 70 sets, as the paper enumerates them."""
    subset_loss = ResidentSubsetLoss(model_of("mixtral"), sequences)
    losses: dict[tuple[int, ...], float] = {keep: subset_loss(1, keep) for keep in itertools.combinations(range(8), 4)}
    start = Selection(keep=(0, 1, 2, 3), scores=tuple(range(8, 0, -1)))
    found = reconstruct(lambda keep: subset_loss(1, keep), start)
    assert (found.complete, found.calls) == (True, 70)
    assert found.loss == min(losses.values()) == losses[found.keep]
    assert found.start_loss == losses[0, 1, 2, 3] > found.loss
