"""What ``observe`` adds up, against a loop over tokens and slots that runs every expert by hand."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import moeprune
from moeprune.architectures import ARCHITECTURES
from moeprune.collectors.sums import LayerSums
from moeprune.errors import ConfigError, MoePruneError, StaleArtifactError, UnsupportedModelError
from moeprune.experts import NAME
from moeprune.statistics import STATISTICS

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

CheckpointOf = Callable[..., Path]
ModelOf = Callable[..., "PreTrainedModel"]
Batch = dict[str, Any]
Sums = dict[int, dict[str, Any]]
PAIRS = ("pair_count", "pair_gated_norm", "gram")


# --- the brute-force loop ---------------------------------------------------------------------------------------------


@contextmanager
def recorded(model: PreTrainedModel) -> Iterator[dict[int, dict[str, torch.Tensor]]]:
    """What experts and routers of an unobserved model are given and give, by layer, of the last forward pass."""
    seen: dict[int, dict[str, torch.Tensor]] = {}
    hooks = []

    def before_experts(layer: int, args: tuple[torch.Tensor, ...]) -> None:
        seen.setdefault(layer, {}).update(hidden=args[0].detach(), index=args[1], gates=args[2].detach())

    def after_router(layer: int, output: tuple[torch.Tensor, ...]) -> None:
        seen.setdefault(layer, {}).update(logits=output[0].detach())

    for index, layer in enumerate(model.model.layers):
        if hasattr(layer.mlp, "experts"):
            router = layer.mlp.router if hasattr(layer.mlp, "router") else layer.mlp.gate
            hooks += [
                layer.mlp.experts.register_forward_pre_hook(lambda _, args, index=index: before_experts(index, args)),
                router.register_forward_hook(lambda _, __, output, index=index: after_router(index, output)),
            ]
    yield seen
    for hook in hooks:
        hook.remove()


def by_hand(model: PreTrainedModel, batches: Sequence[Batch]) -> tuple[Sums, list[torch.Tensor]]:
    """Every statistic by layer from loops in float64, and the logits of each batch, all from the unobserved model."""
    import torch

    sums: Sums = {}
    logits = []
    for batch in batches:
        with recorded(model) as seen, torch.no_grad():
            logits.append(model(**batch, use_cache=False).logits)
        mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))
        valid = [token for token, value in enumerate(mask.flatten().tolist()) if value]
        for layer, record in seen.items():
            experts = model.model.layers[layer].mlp.experts
            if layer not in sums:
                shapes = {name: statistic.shape(experts.num_experts) for name, statistic in STATISTICS.items()}
                sums[layer] = {name: np.zeros(shape) for name, shape in shapes.items()}
            for token in valid:
                add_token(sums[layer], experts, {name: rows[token] for name, rows in record.items()})
    return sums, logits


def add_token(sums: dict[str, Any], experts: Any, token: dict[str, torch.Tensor]) -> None:
    """Add one token: its router's softmax, and each of its slots through the expert's own weights."""
    sums["tokens"] += 1
    exponentials = np.exp((token["logits"].double() - token["logits"].double().max()).numpy())
    sums["soft_prob_sum"] += exponentials / exponentials.sum()
    gated = {}
    for expert, gate in zip(token["index"].tolist(), token["gates"].tolist(), strict=True):
        output = expert_output(experts, expert, token["hidden"].double()).numpy()
        norm = np.sqrt((output**2).sum())
        gated[expert] = gate * output
        sums["count"][expert] += 1
        sums["gate_sum"][expert] += gate
        sums["gate_sq_sum"][expert] += gate**2
        sums["norm_sum"][expert] += norm
        sums["norm_sq_sum"][expert] += norm**2
        sums["gated_norm_sum"][expert] += gate * norm
        sums["gated_norm_sq_sum"][expert] += (gate * norm) ** 2
        sums["max_abs_down"][expert] = max(sums["max_abs_down"][expert], np.abs(output).max())
    for first, one in gated.items():
        for second, other in gated.items():
            sums["pair_count"][first, second] += 1
            sums["pair_gated_norm"][first, second] += np.linalg.norm(one) * np.linalg.norm(other)
            sums["gram"][first, second] += one @ other


def expert_output(experts: Any, expert: int, hidden: torch.Tensor) -> torch.Tensor:
    """One token through one expert's own weights, which gpt-oss lays out the other way round and with biases."""
    gate_up, down = experts.gate_up_proj[expert].detach().double(), experts.down_proj[expert].detach().double()
    if hasattr(experts, "gate_up_proj_bias"):
        both = hidden @ gate_up + experts.gate_up_proj_bias[expert].detach()
        gate, up = both[::2].clamp(max=experts.limit), both[1::2].clamp(-experts.limit, experts.limit)
        return (up + 1) * gate / (1 + (-experts.alpha * gate).exp()) @ down + experts.down_proj_bias[expert].detach()
    gate, up = (gate_up @ hidden).chunk(2)
    return down @ (gate / (1 + (-gate).exp()) * up)


def check_sums(found: moeprune.RouterStatistics, expected: Sums, domain: int = 0, tolerance: float = 1e-5) -> None:
    """Integers must be equal, sums close; and the counts add up to tokens x top-k."""
    assert found.layers.keys() == expected.keys()
    for layer, arrays in expected.items():
        values = {name: array[domain] for name, array in found.layers[layer].items()}
        assert values.keys() == STATISTICS.keys()
        assert values["count"].sum() == values["tokens"] * found.top_k > 0
        for name, array in arrays.items():
            if STATISTICS[name].integer:
                np.testing.assert_array_equal(values[name], array, err_msg=f"{layer} {name}")
            else:
                scale = np.abs(array).max()  # inner products cancel: near zero they are exact to the scale of the rest
                np.testing.assert_allclose(
                    values[name], array, rtol=tolerance, atol=tolerance * scale, err_msg=f"{layer} {name}"
                )


def batch_of(padding: str = "none", *, rows: int = 3, length: int = 10, seed: int = 0) -> Batch:
    """Random token ids; with padding each row has its own length and a mask of which the padding side is 0."""
    import torch

    ids = torch.randint(1, 97, (rows, length), generator=torch.Generator().manual_seed(seed))
    if padding == "none":
        return {"input_ids": ids}
    mask = torch.ones_like(ids)
    for row in range(1, rows):
        empty = slice(None, 2 * row) if padding == "left" else slice(length - 2 * row, None)
        mask[row, empty] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Norm of the difference over the norm."""
    return float((found - expected).norm() / expected.norm())


# --- the sums ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_statistics_equal_the_loop(model_type: str, padding: str, model_of: ModelOf) -> None:
    """Every statistic of every layer, with padding left out by the batch's own mask; the logits do not change."""
    import torch

    model = model_of(model_type)
    batches = [batch_of(padding), batch_of(padding, rows=2, length=7, seed=1)]
    expected, logits = by_hand(model, batches)
    with moeprune.observe(model) as observation, torch.no_grad():
        observed = [model(**batch).logits for batch in batches]
    check_sums(observation.result(), expected)
    assert all(relative_error(found, plain) < 1e-5 for found, plain in zip(observed, logits, strict=True))


def test_padding_matters(model_of: ModelOf) -> None:
    """The same ids without their mask give other counts: the loop above can tell."""
    batch = batch_of("left")
    with_mask, _ = by_hand(model_of("deepseek_v3"), [batch])
    without, _ = by_hand(model_of("deepseek_v3"), [{"input_ids": batch["input_ids"]}])
    assert without[1]["tokens"] > with_mask[1]["tokens"]


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
def test_every_experts_implementation_is_observed(implementation: str, checkpoint_of: CheckpointOf) -> None:
    """The statistics do not depend on how transformers runs the experts, and that is restored."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        checkpoint_of("qwen3_moe"), experts_implementation=implementation
    ).eval()
    expected, _ = by_hand(model, [batch_of("right")])
    with moeprune.observe(model) as observation, torch.no_grad():
        model(**batch_of("right"))
    check_sums(observation.result(), expected)
    assert model.get_experts_implementation()[""] == implementation


def test_softmax_before_the_choice_of_experts(model_of: ModelOf) -> None:
    """Gates that are not normalised over the chosen experts are recorded as the model multiplied by them."""
    import torch

    model = model_of("qwen2_moe", norm_topk_prob=False)
    expected, _ = by_hand(model, [batch_of()])
    with moeprune.observe(model) as observation, torch.no_grad():
        model(**batch_of())
    check_sums(observation.result(), expected)
    assert expected[0]["gate_sum"].sum() < 0.95 * expected[0]["tokens"]


def test_the_inner_model_may_be_called(model_of: ModelOf) -> None:
    """A loop that calls the model below the head has its mask respected too."""
    import torch

    model = model_of("qwen3_moe")
    expected, _ = by_hand(model, [batch_of("left"), batch_of()])
    with moeprune.observe(model) as observation, torch.no_grad():
        model.model(**batch_of("left"))
        model.model(**batch_of())
    check_sums(observation.result(), expected)


def test_embeddings_and_positional_arguments(model_of: ModelOf) -> None:
    """The mask is found wherever the caller puts it, and ``inputs_embeds`` may stand for token ids."""
    import torch

    model, batch = model_of("qwen3_moe"), batch_of("left")
    expected, _ = by_hand(model, [batch, batch])
    with moeprune.observe(model) as observation, torch.no_grad():
        model(batch["input_ids"], batch["attention_mask"])
        model(inputs_embeds=model.get_input_embeddings()(batch["input_ids"]), attention_mask=batch["attention_mask"])
    check_sums(observation.result(), expected)


def test_domains_nest(model_of: ModelOf) -> None:
    """Batches go to the innermost domain, and outside of any to the default one."""
    import torch

    model = model_of("deepseek_v3")
    batches = {name: batch_of("left", seed=seed) for seed, name in enumerate(("outer", "inner", "default"))}
    with moeprune.observe(model) as observation, torch.no_grad():
        with observation.domain("outer"):
            with observation.domain("inner"):
                model(**batches["inner"])
            model(**batches["outer"])
        model(**batches["default"])
    result = observation.result()
    assert result.domains == ("inner", "outer", "default")
    for number, name in enumerate(result.domains):
        check_sums(result, by_hand(model, [batches[name]])[0], domain=number)


def test_generation_counts_each_token_once(model_of: ModelOf) -> None:
    """With a cache every prompt token and every token that is fed back is counted once, padding never."""
    import torch

    model, prompt = model_of("qwen3_moe"), batch_of("left")
    with moeprune.observe(model) as observation, torch.no_grad():
        output = model.generate(**prompt, max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0)
    fed = output[:, :-1]  # the last new token is never fed back
    mask = torch.ones_like(fed)
    mask[:, : prompt["attention_mask"].shape[1]] = prompt["attention_mask"]
    assert fed.shape[1] == 15
    check_sums(observation.result(), by_hand(model, [{"input_ids": fed, "attention_mask": mask}])[0])


# --- training ---------------------------------------------------------------------------------------------------------


def train(model: PreTrainedModel, batches: Sequence[Batch]) -> dict[str, torch.Tensor]:
    """Gradients of the mean loss, added up over micro-batches."""
    model.zero_grad()
    for batch in batches:
        loss = model(**batch, labels=batch["input_ids"], use_cache=False).loss
        (loss / len(batches)).backward()
    return {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}


@pytest.mark.parametrize("checkpointing", [None, False, True], ids=["plain", "non-reentrant", "reentrant"])
@pytest.mark.parametrize("model_type", ["qwen3_moe", "deepseek_v3"])
def test_training_counts_each_token_once_and_keeps_gradients(
    model_type: str, checkpointing: bool | None, model_of: ModelOf
) -> None:
    """Two micro-batches of a training step, also when layers run again in the backward pass."""
    import torch

    model = copy.deepcopy(model_of(model_type))
    batches = [batch_of("right"), batch_of("right", seed=1)]
    expected, _ = by_hand(model, batches)
    model.train()
    plain = train(model, batches)
    runs = 0

    def count_run(*_: Any) -> None:
        nonlocal runs
        runs += 1

    model.model.layers[2].mlp.experts.register_forward_pre_hook(count_run)
    if checkpointing is not None:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
        model.enable_input_require_grads()
    with moeprune.observe(model) as observation:
        observed = train(model, batches)
    check_sums(observation.result(), expected)
    assert runs == (2 if checkpointing is None else 4)  # the layer really ran twice per micro-batch
    assert observed.keys() == plain.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(observed[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


# --- the self-check ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", ["qwen3_moe", "deepseek_v3"])
def test_half_precision_passes_the_self_check(model_type: str, model_of: ModelOf) -> None:
    """In bf16 the slots rebuild the layer's output within the tolerance, and the sums are those of the loop.

    Only the first MoE layer is compared: after it other rounding may send a token elsewhere.
    """
    import torch

    model = copy.deepcopy(model_of(model_type)).to(torch.bfloat16)
    expected, _ = by_hand(model, [batch_of("left")])
    with moeprune.observe(model) as observation, torch.no_grad():
        model(**batch_of("left"))
    result, first = observation.result(), min(expected)
    check_sums(
        dataclasses.replace(result, layers={first: result.layers[first]}), {first: expected[first]}, tolerance=2e-2
    )


def test_an_implementation_that_cannot_be_rebuilt_is_refused(model_of: ModelOf) -> None:
    """An experts function that does not multiply by the gates it is given stops the run in the first batch."""
    import torch
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    def wrong(experts: Any, hidden: torch.Tensor, index: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
        return ALL_EXPERTS_FUNCTIONS["batched_mm"](experts, hidden, index, gates.square())

    model = copy.deepcopy(model_of("qwen3_moe"))
    ALL_EXPERTS_FUNCTIONS["wrong"] = wrong
    try:
        model.set_experts_implementation("wrong")
        with (
            torch.no_grad(),
            pytest.raises(MoePruneError, match="self-check failed in layer 0"),
            moeprune.observe(model),
        ):
            model(**batch_of())
        assert model.get_experts_implementation()[""] == "wrong"
    finally:
        del ALL_EXPERTS_FUNCTIONS["wrong"]


# --- coming and going -------------------------------------------------------------------------------------------------


def test_everything_is_restored_after_an_exception(model_of: ModelOf) -> None:
    """Implementation and hooks are as before when the block fails, and the model can be observed again."""
    import torch

    model = copy.deepcopy(model_of("qwen3_moe"))

    def hooks() -> int:
        return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())

    def fail() -> None:
        with moeprune.observe(model), torch.no_grad():
            model(**batch_of())
            assert model.get_experts_implementation()[""] == NAME
            assert hooks() > before[1]
            raise RuntimeError("of the caller")

    before = (model.get_experts_implementation(), hooks())
    with pytest.raises(RuntimeError, match="of the caller"):
        fail()
    assert (model.get_experts_implementation(), hooks()) == before
    with moeprune.observe(model) as observation, torch.no_grad():
        model(**batch_of())
    check_sums(observation.result(), by_hand(model, [batch_of()])[0])


def test_a_model_is_observed_once_at_a_time(model_of: ModelOf) -> None:
    """A second observation of the same model is refused, and the first one goes on."""
    import torch

    model = model_of("qwen3_moe")
    with moeprune.observe(model) as observation, torch.no_grad():
        with pytest.raises(ConfigError, match="observed already"), moeprune.observe(model):
            pass
        model(**batch_of())
    check_sums(observation.result(), by_hand(model, [batch_of()])[0])


def test_two_models_are_observed_side_by_side(model_of: ModelOf) -> None:
    """Each observation sees its own model only."""
    import torch

    first, second = model_of("qwen3_moe"), model_of("mixtral")
    with moeprune.observe(first) as one, moeprune.observe(second) as two, torch.no_grad():
        first(**batch_of("left"))
        second(**batch_of("right"))
    check_sums(one.result(), by_hand(first, [batch_of("left")])[0])
    check_sums(two.result(), by_hand(second, [batch_of("right")])[0])


def test_a_forward_pass_that_ends_early_is_noticed(model_of: ModelOf) -> None:
    """Statistics of which some layers lack tokens are never handed out."""
    import torch

    class StopError(Exception):
        """Raised between the layers."""

    def stop(*_: Any) -> None:
        raise StopError

    model = copy.deepcopy(model_of("qwen3_moe"))
    with moeprune.observe(model) as observation, torch.no_grad():
        model(**batch_of())
        hook = model.model.layers[1].register_forward_hook(stop)
        with pytest.raises(StopError):
            model(**batch_of("left"))
        hook.remove()
        model(**batch_of())
    with pytest.raises(MoePruneError, match="did not see the same tokens"):
        observation.result()


def test_what_cannot_be_observed_is_refused(model_of: ModelOf, tmp_path: Path) -> None:
    """A dense model, a mask that does not say which tokens are padding, and a block that runs nothing."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    dense = AutoModelForCausalLM.from_config(
        LlamaConfig(vocab_size=97, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    )
    with pytest.raises(UnsupportedModelError, match="no experts"), moeprune.observe(dense):
        pass
    model = model_of("qwen3_moe")
    square = torch.zeros(3, 1, 10, 10)
    with pytest.raises(ConfigError, match=r"\[batch, sequence\]"), moeprune.observe(model), torch.no_grad():
        model(**batch_of(), attention_mask=square)
    with moeprune.observe(model) as observation:
        pass
    with pytest.raises(ConfigError, match="no token was observed"):
        observation.save(tmp_path / "statistics.safetensors")
    assert not any(tmp_path.iterdir())


def test_models_that_transformers_cannot_switch_are_refused(model_of: ModelOf, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the exchange of the experts function nothing would be seen, so the run does not start."""
    model = copy.deepcopy(model_of("qwen3_moe"))
    before = model.get_experts_implementation()
    monkeypatch.setattr(type(model), "_can_set_experts_implementation_cached_value", False)
    with pytest.raises(UnsupportedModelError, match="cannot exchange"), moeprune.observe(model):
        pass
    assert model.get_experts_implementation() == before


def test_routers_without_logits_are_refused(model_of: ModelOf) -> None:
    """A router whose output holds nothing with one value per expert cannot be observed."""
    import torch

    model = copy.deepcopy(model_of("qwen3_moe"))
    model.model.layers[2].mlp.gate.register_forward_hook(lambda _, __, output: (output[0][:, :8], *output[1:]))
    with (
        torch.no_grad(),
        pytest.raises(UnsupportedModelError, match="router of layer 2 returns no logits"),
        moeprune.observe(model),
    ):
        model(**batch_of())


def test_only_padding_is_no_observation(model_of: ModelOf) -> None:
    """A batch of nothing but padding counts no token."""
    import torch

    batch = batch_of()
    with moeprune.observe(model_of("qwen3_moe")) as observation, torch.no_grad():
        model_of("qwen3_moe")(**batch, attention_mask=torch.zeros_like(batch["input_ids"]))
    with pytest.raises(ConfigError, match="no token was observed"):
        observation.result()


# --- from observation to plan -----------------------------------------------------------------------------------------


def test_observed_statistics_can_be_planned(model_of: ModelOf, checkpoint_of: CheckpointOf, tmp_path: Path) -> None:
    """They are bound to the folder the model came from, and survive their file."""
    import torch

    base = checkpoint_of("deepseek_v3")
    with moeprune.observe(model_of("deepseek_v3"), domain="prose") as observation, torch.no_grad():
        model_of("deepseek_v3")(**batch_of())
    file = observation.save(tmp_path / "statistics.safetensors")
    loaded = moeprune.RouterStatistics.load(file)
    assert loaded.domains == ("prose",)
    assert loaded.tokens == 30
    plan = moeprune.plan(file, base, ratio=0.5, strategy="frequency", guard=False)
    counts = loaded.layers[2]["count"][0].reshape(4, 4)
    best = [4 * group + expert for group in range(4) for expert in np.lexsort((range(4), -counts[group]))[:2]]
    assert plan.layers[2].keep == tuple(sorted(int(expert) for expert in best))


def test_statistics_without_a_folder_must_be_bound(model_of: ModelOf, checkpoint_of: CheckpointOf) -> None:
    """A model that came from no folder gives statistics that no plan takes, until ``like`` names the checkpoint."""
    import torch

    base, model = checkpoint_of("qwen3_moe"), copy.deepcopy(model_of("qwen3_moe"))
    model.config._name_or_path = "somebody/some-model"
    for like, fits in ((None, False), (base, True)):
        with moeprune.observe(model, like=like) as observation, torch.no_grad():
            model(**batch_of())
        if fits:
            moeprune.plan(observation.result(), base, ratio=0.5)
            continue
        with pytest.raises(StaleArtifactError, match="like=FOLDER"):
            moeprune.plan(observation.result(), base, ratio=0.5)


# --- halves of the data -----------------------------------------------------------------------------------------------


def check_halves(found: moeprune.RouterStatistics, halves: Sequence[Sums], domain: int = 0) -> None:
    """The first half holds the first sums, and what the second half adds are the second."""
    first, second = (dataclasses.replace(found, layers=part.layers) for part in found.halves())
    for part, expected in zip((first, second), halves, strict=True):
        sums = {name for name, statistic in STATISTICS.items() if statistic.merge == "sum"}
        for layer, arrays in expected.items():
            for name in sums:
                scale = np.abs(arrays[name]).max()
                np.testing.assert_allclose(
                    part.layers[layer][name][domain], arrays[name], rtol=1e-5, atol=1e-5 * scale, err_msg=name
                )
    peaks = {layer: arrays["max_abs_down"] for layer, arrays in halves[0].items()}
    for layer, peak in peaks.items():
        np.testing.assert_allclose(found.first_half[layer]["max_abs_down"][domain], peak, rtol=1e-5)


def test_named_halves_are_kept_apart(model_of: ModelOf) -> None:
    """Each batch goes to the half that it names, whatever their order, and the total holds both."""
    import torch

    model = model_of("deepseek_v3")
    batches = [batch_of("left", seed=seed) for seed in range(3)]
    with moeprune.observe(model) as observation, torch.no_grad():
        for batch, half in zip(batches, (1, 0, 1), strict=True):
            with observation.batch("prose", half):
                model(**batch)
    result = observation.result()
    check_sums(result, by_hand(model, batches)[0])
    check_halves(result, [by_hand(model, batches[1:2])[0], by_hand(model, [batches[0], batches[2]])[0]])
    with pytest.raises(ConfigError, match="no half 2"), observation.batch("prose", 2):
        pass


def test_halves_take_turns_in_each_domain(model_of: ModelOf) -> None:
    """In a loop that names no halves the forward passes of a domain alternate, also when domains do."""
    import torch

    model = model_of("qwen3_moe")
    batches = [batch_of("right", seed=seed) for seed in range(6)]
    with moeprune.observe(model, domain="a") as observation, torch.no_grad():
        for number, batch in enumerate(batches):
            with observation.domain("ab"[number % 2]):
                model(**batch)
    result = observation.result()
    for domain in (0, 1):
        own = batches[domain::2]
        check_halves(result, [by_hand(model, own[::2])[0], by_hand(model, own[1::2])[0]], domain)


def test_a_cache_does_not_change_the_half(model_of: ModelOf) -> None:
    """Generation is one turn, however many forward passes it takes: its tokens belong together."""
    import torch

    model, prompt = model_of("qwen3_moe"), batch_of()
    with moeprune.observe(model) as observation, torch.no_grad():
        model.generate(**prompt, max_new_tokens=4, do_sample=False, eos_token_id=None, pad_token_id=0)
        model(**prompt)
    result = observation.result()
    assert result.first_half[0]["tokens"].tolist() == [39]
    assert result.layers[0]["tokens"].tolist() == [69]


# --- some layers, one at a time ---------------------------------------------------------------------------------------


def test_layers_are_taken_one_by_one(model_of: ModelOf) -> None:
    """The sums of a layer come in the order of the announced domains, and the observation forgets them."""
    import torch

    model = model_of("qwen3_moe")
    batches = {name: batch_of("left", seed=seed) for seed, name in enumerate(("prose", "code"))}
    with moeprune.observe(model, domains=("code", "maths", "prose")) as observation, torch.no_grad():
        for name, batch in batches.items():
            with observation.batch(name, 1):
                model(**batch)
    whole = observation.result()
    assert whole.domains == ("code", "maths", "prose")
    taken = {layer: observation.take(layer) for layer in (2, 0)}
    with pytest.raises(ConfigError, match="no token was observed"):
        observation.result()
    assert not observation.take(0).total["count"].any()
    for layer, arrays in taken.items():
        assert arrays.total["count"][1].sum() == 0 < arrays.total["count"][0].sum()
        assert not any(array.any() for array in arrays.first_half.values())
        for name, array in arrays.total.items():
            np.testing.assert_array_equal(array, whole.layers[layer][name], strict=True)
    for domain, name in ((0, "code"), (2, "prose")):
        check_sums(whole, by_hand(model, [batches[name]])[0], domain=domain)


def test_a_layer_that_was_taken_is_missing_from_the_result(model_of: ModelOf) -> None:
    """Nobody gets statistics with a layer of zeros."""
    import torch

    model = model_of("qwen3_moe")
    with moeprune.observe(model) as observation, torch.no_grad():
        model(**batch_of())
    observation.take(2)
    with pytest.raises(MoePruneError, match="did not see the same tokens"):
        observation.result()


def test_only_chosen_layers_are_observed(model_of: ModelOf) -> None:
    """The others run as ever, and slices together are the whole."""
    import torch

    model = model_of("glm4_moe")
    expected, logits = by_hand(model, [batch_of("left")])
    parts = []
    for layers in ((2,), (1,)):
        with moeprune.observe(model, layers=layers) as observation, torch.no_grad():
            found = model(**batch_of("left")).logits
        assert relative_error(found, logits[0]) < 1e-5
        part = observation.result(inputs={"calibration": "c"})
        assert list(part.layers) == list(layers)
        parts.append(part)
    check_sums(parts[0].merge(parts[1]), expected)


def test_observations_of_other_layers_nest(model_of: ModelOf) -> None:
    """Each sees its own layers, and the model's own implementation runs below both."""
    import torch

    model = model_of("glm4_moe")
    expected, _ = by_hand(model, [batch_of("left")])
    with moeprune.observe(model, layers=(1,)) as outer, moeprune.observe(model, layers=(2,)) as inner, torch.no_grad():
        model(**batch_of("left"))
    check_sums(outer.result(), {1: expected[1]})
    check_sums(inner.result(), {2: expected[2]})


@pytest.mark.parametrize(
    ("layers", "why"), [((0, 7), "layer 0 has no experts to observe .*: 1, 2"), ((), "no layer is to be observed")]
)
def test_layers_that_cannot_be_observed(layers: tuple[int, ...], why: str, model_of: ModelOf) -> None:
    """A dense layer, or none at all, is refused with those that there are."""
    with pytest.raises(ConfigError, match=why), moeprune.observe(model_of("glm4_moe"), layers=layers):
        pass


def test_domains_that_were_not_announced_are_refused(model_of: ModelOf) -> None:
    """Once the order of the domains is fixed, another one is a slip."""
    import torch

    model = model_of("qwen3_moe")
    with (
        pytest.raises(ConfigError, match=r"domain 'cod' was not announced .*'code'"),
        moeprune.observe(model, domains=("code", "prose")) as observation,
        observation.domain("cod"),
        torch.no_grad(),
    ):
        model(**batch_of())


# --- slices of the tokens ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("padding", ["none", "left"])
@pytest.mark.parametrize("model_type", ["qwen3_moe", "deepseek_v3", "gpt_oss"])
def test_slices_of_the_tokens_change_nothing(
    model_type: str, padding: str, model_of: ModelOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Few (token, slot) pairs run at a time, the sums and logits are the same, and no slice is larger."""
    import torch

    model = model_of(model_type)
    expected, logits = by_hand(model, [batch_of(padding)])
    runs: list[int] = []
    add_slots = LayerSums.add_slots

    def count(sums: LayerSums, outputs: torch.Tensor, *given: Any) -> None:
        runs.append(len(outputs))
        add_slots(sums, outputs, *given)

    monkeypatch.setattr(LayerSums, "add_slots", count)
    with moeprune.observe(model) as observation, torch.no_grad():
        observation.slot_rows = 14  # four tokens of top-3
        found = model(**batch_of(padding)).logits
    assert runs == [4, 4, 4, 4, 4, 4, 4, 2] * len(expected)
    check_sums(observation.result(), expected)
    assert relative_error(found, logits[0]) < 1e-5


def test_slices_are_trained_through(model_of: ModelOf) -> None:
    """Gradients of a step that ran in slices of one token are those of the unobserved model."""
    import torch

    model = copy.deepcopy(model_of("qwen3_moe")).train()
    batches = [batch_of("right", rows=2, length=5)]
    plain = train(model, batches)
    with moeprune.observe(model) as observation:
        observation.slot_rows = 1
        observed = train(model, batches)
    check_sums(observation.result(), by_hand(model, batches)[0])
    assert observed.keys() == plain.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(observed[name], gradient, rtol=1e-4, atol=1e-6, msg=name)
