"""Zero experts in a router: against direct computation, in all kinds of routers, trained, written and loaded again."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import moeprune
from moeprune import gating
from moeprune.errors import ConfigError, UnsupportedModelError
from moeprune.experts import ExpertLayer, expert_layers
from moeprune.healing.distillation import Recipe, Text
from moeprune.healing.sampling import PROMPT, sampled
from moeprune.healing.zeda import Balance, ZeroTraining, layers_at, zero_rows
from moeprune.plans_skip import Renorm, SkipLayer, SkipPlan
from moeprune.runtime.skipping import attach, counted, detach
from moeprune.runtime.zero_experts import ZeroRouter, margins

CheckpointOf = Callable[..., Path]
SOFTMAX, SIGMOID = ["qwen3_moe", "mixtral", "qwen3_next"], ["deepseek_v3", "glm4_moe", "glm_moe_dsa"]


def model_at(folder: Path) -> Any:
    """A model of one's own."""
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def plan_for(model: Any, offset: float = 0.0, rate: float = 0.5) -> SkipPlan:
    """Zero experts in every layer, with an offset."""
    layers = expert_layers(model)
    return SkipPlan(
        policy="zero-experts",
        renorm=Renorm(),
        layers={layer.index: SkipLayer(threshold=offset, rate=rate) for layer in layers},
        target=rate,
        rate=rate,
        top_k=int(layers[0].experts.config.num_experts_per_tok),
        tensors=zero_rows(layers, 0),
        command={},
        inputs={},
    )


def router_of(layer: ExpertLayer, plan: SkipPlan) -> ZeroRouter:
    """The layer's router with the plan's rows, at the plan's offset."""
    router = ZeroRouter.of(layer, plan.tensors)
    router.offset = plan.layers[layer.index].threshold
    return router


def chosen_directly(layer: ExpertLayer, plan: SkipPlan, hidden_TH: torch.Tensor) -> list[dict[int, float]]:
    """Per token the best top-k of all eligible experts with their weights, computed one token at a time."""
    own: Any = layer.router
    offset, count = plan.layers[layer.index].threshold, layer.num_experts
    rows_ZH = torch.from_numpy(plan.tensors[f"layers.{layer.index}.zero_weight"])
    bias = plan.tensors.get(f"layers.{layer.index}.zero_bias")
    found = []
    for hidden_H in hidden_TH:
        real_E, zero_Z = own.weight.float() @ hidden_H, rows_ZH @ hidden_H
        if bias is None:
            scores = torch.cat([real_E, zero_Z + offset]).softmax(0)
            choice = scores
        else:
            scores = torch.cat([real_E, zero_Z]).sigmoid()
            choice = scores + torch.cat([own.e_score_correction_bias.float(), torch.from_numpy(bias) + offset])
            groups = choice[:count].view(own.num_group, -1)
            best = groups.topk(2).values.sum(1).topk(own.topk_group).indices
            size = groups.shape[1]
            shut = [expert for expert in range(count) if expert // size not in best]
            choice[shut] = -math.inf
        picked = choice.topk(own.top_k).indices
        weights = scores[picked]
        weights = weights / weights.sum() if getattr(own, "norm_topk_prob", True) else weights
        weights = weights * getattr(own, "routed_scaling_factor", 1.0)
        found.append(dict(zip(picked.tolist(), weights.tolist(), strict=True)))
    return found


@pytest.mark.parametrize("offset", [-0.1, 0.0, 0.1])
@pytest.mark.parametrize("model_type", ["qwen3_moe", "deepseek_v3", "glm4_moe"])
def test_slots_and_weights_are_those_of_all_experts_together(
    model_of: Callable[..., Any], model_type: str, offset: float
) -> None:
    """Real experts are chosen in the model's groups, zero ones anywhere, and all share one denominator."""
    model = model_of(model_type)
    plan = plan_for(model, offset)
    layer = expert_layers(model)[-1]
    hidden_TH = torch.randn((40, 32), generator=torch.Generator().manual_seed(2))
    router = router_of(layer, plan)
    leave = router.stand()
    try:
        with torch.no_grad():
            logits_TE, weights_TK, index_TK = layer.router(hidden_TH)
    finally:
        leave()
    expected = chosen_directly(layer, plan, hidden_TH)
    assert logits_TE.shape == (40, layer.num_experts)
    assert (index_TK >= layer.num_experts).any()
    assert (index_TK < layer.num_experts).any()
    for token, own in enumerate(expected):
        assert set(index_TK[token].tolist()) == set(own)
        assert weights_TK[token].tolist() == pytest.approx([own[i] for i in index_TK[token].tolist()], abs=1e-5)


@pytest.mark.parametrize("model_type", [*SOFTMAX, *SIGMOID])
def test_zero_experts_that_get_no_slot_change_nothing(checkpoint_of: CheckpointOf, model_type: str) -> None:
    """With an offset far below, every architecture computes what it did; with one far above, no expert runs."""
    model = model_at(checkpoint_of(model_type))
    ids = torch.arange(40).view(2, 20)
    before = model(ids).logits
    # A softmax gives slots that nobody gets no weight at all, a sigmoid does not ask.
    with_none = attach(model, plan_for(model, -1e4))
    assert torch.allclose(with_none(ids).logits, before, atol=2e-4)
    detach(model)
    with counted(attach(model, plan_for(model, 1e4))) as counter:
        assert torch.isfinite(model(ids).logits).all()
    assert counter.rate == 1
    detach(model)
    assert torch.equal(model(ids).logits, before)


def test_margins_say_at_which_offset_slots_change_hands() -> None:
    """The number of zero slots at any offset is the number of margins below it."""
    generator = torch.Generator().manual_seed(4)
    real_TK, zero_TZ = torch.randn((50, 4), generator=generator), torch.randn((50, 6), generator=generator)
    for offset in (-1.0, 0.0, 0.7):
        place_TK = torch.cat([real_TK, zero_TZ + offset], dim=-1).topk(4).indices
        assert torch.equal((place_TK >= 4).sum(-1), (margins(real_TK, zero_TZ) < offset).sum(-1))
    assert margins(real_TK, zero_TZ[:, :2]).isinf().sum() == 100


@pytest.mark.parametrize("model_type", ["gpt_oss", "minimax_m2"])
def test_routers_of_another_kind_are_refused(model_of: Callable[..., Any], model_type: str) -> None:
    """A router that computes something else is not guessed at."""
    model = model_of(model_type)
    with pytest.raises(UnsupportedModelError, match="takes no zero experts"):
        router_of(expert_layers(model)[0], plan_for(model))


def test_rows_are_drawn_like_the_routers_own(model_of: Callable[..., Any]) -> None:
    """Half as many rows as experts, with the mean and deviation of every column, and biases where there are any."""
    layers = expert_layers(model_of("deepseek_v3"))
    rows = zero_rows(layers, 0)
    many = np.concatenate([zero_rows(layers, seed)["layers.1.zero_weight"] for seed in range(300)])
    own = layers[0].router.weight.detach().numpy()
    assert rows["layers.1.zero_weight"].shape == (8, 32)
    assert rows["layers.1.zero_bias"].shape == (8,)
    assert np.allclose(many.mean(axis=0), own.mean(axis=0), atol=0.1)
    assert np.allclose(many.std(axis=0), own.std(axis=0, ddof=1), rtol=0.1)
    assert not any("bias" in name for name in zero_rows(expert_layers(model_of("qwen3_moe")), 0))


def test_the_balance_loss_is_that_of_the_paper() -> None:
    """With N = 2 Z and half of the slots it is alpha (N + 2 Z) / K (f_E P_E / N + f_Z P_Z / (2 Z))."""
    real, zero, top_k, alpha = 8, 4, 4, 0.1
    share, zero_slots = torch.tensor([0.7, 0.3]), 0.25
    found = Balance(alpha=alpha, rate=0.5).loss((share[0], share[1]), zero_slots, real)
    slots = (1 - zero_slots) * top_k, zero_slots * top_k
    expected = alpha * (real + 2 * zero) / top_k * (slots[0] * 0.7 / real + slots[1] * 0.3 / (2 * zero))
    assert float(found) == pytest.approx(expected)


@pytest.mark.parametrize("model_type", ["qwen3_moe", "deepseek_v3"])
def test_the_balance_loss_reaches_rows_and_router(checkpoint_of: CheckpointOf, model_type: str) -> None:
    """Its gradient moves the probability mass; padding is left out."""
    model = model_at(checkpoint_of(model_type))
    training = ZeroTraining(model, plan_for(model), balance=Balance(alpha=0.1, rate=0.5))
    rows = training.rows()
    ids, mask = torch.arange(24).view(2, 12), torch.ones((2, 12), dtype=torch.long)
    mask[1, 6:] = 0
    with training.running(model), training.watching(mask):
        model(input_ids=ids, attention_mask=mask)
    loss = training.extra()
    assert loss is not None
    loss.backward()
    assert all(row.grad is not None and row.grad.abs().sum() > 0 for row in rows.values())
    assert all(layer.router.weight.grad is not None for layer in expert_layers(model))
    heard = training._heard()
    assert all(one.slots == 18 * 3 for one in heard.values())


def test_offsets_settle_on_the_rate(checkpoint_of: CheckpointOf) -> None:
    """Every layer skips its share of the text, and the counter of the running model says the same."""
    model = model_at(checkpoint_of("deepseek_v3"))
    sequences = torch.randint(0, 97, (12, 30), generator=torch.Generator().manual_seed(6)).tolist()
    plan = plan_for(model, rate=0.4)
    layers = ZeroTraining(model, plan, balance=Balance(alpha=0.0, rate=0.4)).settle(model, sequences, 4096)
    assert all(layer.rate == pytest.approx(0.4, abs=0.002) for layer in layers.values())
    settled = SkipPlan(
        policy=plan.policy,
        renorm=plan.renorm,
        layers=layers,
        target=0.4,
        rate=0.4,
        top_k=3,
        tensors=plan.tensors,
        command={},
        inputs={},
    )
    with counted(attach(model, settled)) as counter:
        model(torch.tensor(sequences))
    assert {index: counts.rate for index, counts in counter.layers.items()} == pytest.approx(
        {index: layer.rate for index, layer in layers.items()},
        abs=0.002,  # the slot at the very threshold may fall either way
    )


def test_sampled_text_begins_as_it_was_given_and_ends_where_the_model_ends_it(checkpoint_of: CheckpointOf) -> None:
    """Prompts stay, nothing follows the end of a sequence, and equal seeds give equal text."""
    model = model_at(checkpoint_of("qwen3_moe"))
    model.generation_config.eos_token_id = 5
    given = [[*range(20, 60)], [*range(30, 70)], [1, 2, 3]]
    texts = sampled(model, given * 8, new_tokens=40, seed=1)
    assert {ids[:PROMPT] for ids in texts if len(ids) > PROMPT} >= {tuple(ids[:PROMPT]) for ids in given[:2]}
    assert all(5 not in ids[PROMPT:-1] for ids in texts if len(ids) > PROMPT)
    assert any(ids[-1] == 5 for ids in texts)
    assert texts == sampled(model, given * 8, new_tokens=40, seed=1)
    assert texts != sampled(model, given * 8, new_tokens=40, seed=2)


# --- the whole way ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["zero-experts", "zeda"])
def test_a_model_with_zero_experts_is_written_and_loaded(
    checkpoint_of: CheckpointOf, ids_file: Path, tmp_path: Path, policy: str
) -> None:
    """The folder is a stock checkpoint; loaded by its plan it skips the share that was asked for."""
    base, out = checkpoint_of("deepseek_v3"), tmp_path / "o"
    recipe = Recipe(steps=4, lr=1e-3, step_tokens=200, checks=2)
    result = gating.skip(
        base, out, skip_rate=0.5, policy=policy, distill=recipe, calibration=str(ids_file), device="cpu"
    )
    assert result.plan is not None
    assert result.plan.rate == pytest.approx(0.5, abs=0.01)
    assert result.plan.policy == "zero-experts"
    assert set(result.plan.training["stages"]) == (
        {"text"} if policy == "zero-experts" else {"teacher's text", "own text"}
    )
    assert result.verification is not None
    stock, gated = model_at(out), moeprune.load(out)
    assert stock.state_dict().keys() == model_at(base).state_dict().keys()
    data = moeprune.load_calibration([str(ids_file)], base)
    text = Text.split(data)
    with counted(gated) as counter:
        for ids in text.train:
            gated(torch.tensor([ids]))
    assert counter.rate == pytest.approx(result.plan.rate, abs=0.003)


def test_zero_rows_alone_leave_the_checkpoint_as_it_is(
    checkpoint_of: CheckpointOf, ids_file: Path, tmp_path: Path
) -> None:
    """Trained on their own level, the rows move and no tensor of the checkpoint does."""
    base, out = checkpoint_of("qwen3_moe"), tmp_path / "o"
    recipe = Recipe(steps=12, lr=3e-3, step_tokens=400, checks=6)
    result = gating.skip(
        base,
        out,
        policy="zero-experts",
        distill=recipe,
        train="zero-rows",
        calibration=str(ids_file),
        device="cpu",
    )
    for file in base.glob("*.safetensors"):
        for name, value in load_file(file).items():
            [found] = [load_file(one)[name] for one in out.glob("*.safetensors") if name in load_file(one)]
            assert torch.equal(value, found)
    drawn = zero_rows(expert_layers(model_at(base)), 0)
    assert result.plan is not None
    assert any(not np.array_equal(value, drawn[name]) for name, value in result.plan.tensors.items())


def test_zero_experts_ask_to_be_trained(checkpoint_of: CheckpointOf, ids_file: Path, tmp_path: Path) -> None:
    """Without distillation, or with weights shared out, nothing is written."""
    base, out = checkpoint_of("qwen3_moe"), tmp_path / "o"
    with pytest.raises(ConfigError, match="has to be trained"):
        gating.skip(base, out, policy="zeda", calibration=str(ids_file))
    with pytest.raises(ConfigError, match="zero experts"):
        gating.skip(base, out, policy="zeda", renorm="survivors", distill=Recipe(), calibration=str(ids_file))
    with pytest.raises(ConfigError, match="nothing to train"):
        gating.skip(base, out, train="zero-rows", distill=Recipe(), calibration=str(ids_file))
    assert not out.exists()


def test_decisions_begin_without_an_offset(model_of: Callable[..., Any]) -> None:
    """Every MoE layer has one, with the rate that is wanted."""
    model = model_of("deepseek_v3")
    assert layers_at(model, 0.25) == {
        layer.index: SkipLayer(threshold=0.0, rate=0.25) for layer in expert_layers(model)
    }
