"""A gated model runs the slots that its plan keeps, no others, and adds them up as the model does."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import moeprune
from moeprune.architectures import ARCHITECTURES
from moeprune.errors import ArtifactError, ConfigError, PlanError, StaleArtifactError
from moeprune.experts import expert_layers
from moeprune.plans_skip import Renorm, SkipLayer, SkipPlan
from moeprune.runtime.policies import BUILTIN, Routed, reweighted
from moeprune.runtime.skipping import Boundary, Gate, NormHead, attach, compacted, detach, gates_of

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

CheckpointOf = Callable[..., Path]
ModelOf = Callable[..., "PreTrainedModel"]
FAMILIES = ("qwen3_moe", "glm4_moe", "deepseek_v3")
# A threshold for each policy that splits the slots of a small random model.
MIDDLE = {
    "share": 0.4,
    "ratio": 0.8,
    "top-p": 0.7,
    "zero-logit": 0.0,
    "gate-norm": 0.3,
    "predicted-norm": 0.5,
    "static-k": -0.5,
    "ban": 1.1,
    "random": 0.5,
}


def batch() -> dict[str, torch.Tensor]:
    """Random token ids, the second row padded on the left."""
    import torch

    ids = torch.randint(0, 97, (3, 16), generator=torch.Generator().manual_seed(5))
    mask = torch.ones_like(ids)
    mask[1, :6] = 0
    return {"input_ids": ids, "attention_mask": mask}


def logits_of(model: PreTrainedModel) -> torch.Tensor:
    """Logits of the batch."""
    import torch

    with torch.no_grad():
        return model(**batch()).logits


def plan_for(model: PreTrainedModel, policy: str, threshold: float, renorm: str = "none") -> SkipPlan:
    """A plan by hand, with one threshold in every layer."""
    layers = expert_layers(model)
    draw = np.random.default_rng(0)
    tables = {
        layer.index: tuple(draw.uniform(0.5, 1.5, layer.num_experts)) if BUILTIN[policy].table else ()
        for layer in layers
    }
    tensors = {}
    if BUILTIN[policy].head:
        hidden = model.config.get_text_config().hidden_size
        for layer in layers:
            weight = draw.normal(size=(layer.num_experts, hidden)).astype(np.float32)
            tensors |= {f"layers.{layer.index}.norm_weight": weight / hidden}
            tensors |= {f"layers.{layer.index}.norm_bias": np.zeros(layer.num_experts, dtype=np.float32)}
    return SkipPlan(
        policy=policy,
        renorm=Renorm.parse(renorm),
        layers={
            layer.index: SkipLayer(threshold=threshold, table=tables[layer.index], sensitivity=0.5) for layer in layers
        },
        tensors=tensors,
        target=0.5,
        rate=0.5,
        top_k=int(model.config.get_text_config().num_experts_per_tok),
        command={},
        inputs={},
    )


@contextlib.contextmanager
def gated(model: PreTrainedModel, plan: SkipPlan) -> Iterator[PreTrainedModel]:
    """A model with the gates of a plan inside the block."""
    attach(model, plan)
    try:
        yield model
    finally:
        detach(model)


class ByZeroWeights(Boundary):
    """What a gate computes, the slow way: every slot runs, and skipped ones weigh nothing."""

    def __init__(self, gate: Gate) -> None:
        super().__init__(gate.layer, logits=gate.policy.logits)
        self.gate = gate

    def run(self, hidden_TH: torch.Tensor, index_TK: torch.Tensor, gates_TK: torch.Tensor) -> torch.Tensor:
        """In the place of the experts."""
        assert self.below is not None
        self.gate._logits_TE = self._logits_TE
        keep_TK = self.gate.keep(hidden_TH, index_TK, gates_TK)
        routed = Routed(index_TK=index_TK, gates_TK=gates_TK, layer=self.gate.decision)
        weights_TK = reweighted(gates_TK, keep_TK, routed.ranks_TK, self.gate.renorm) * keep_TK
        return self.below(hidden_TH, index_TK, weights_TK.to(gates_TK.dtype))


@contextlib.contextmanager
def by_zero_weights(model: PreTrainedModel, plan: SkipPlan) -> Iterator[None]:
    """The model with a plan's decisions made by zero weights inside the block."""
    with contextlib.ExitStack() as stack:
        for gate in gates_of(expert_layers(model), plan).values():
            stack.enter_context(ByZeroWeights(gate).applied())
        yield


@pytest.fixture
def kernel_rows(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows that were multiplied by each call of the grouped kernel, taken from its own offsets."""
    from transformers.integrations import moe

    rows: list[int] = []
    kernel = moe._grouped_mm

    def counting(given: torch.Tensor, weight: torch.Tensor, offs: torch.Tensor) -> torch.Tensor:
        rows.append(int(offs[-1]))
        assert given.shape[0] == rows[-1], "rows beyond the offsets are moved around for nothing"
        return kernel(given, weight, offs)

    monkeypatch.setattr(moe, "_grouped_mm", counting)
    return rows


# --- what is computed -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", ARCHITECTURES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_skipping_nothing_is_the_original_to_the_bit(model_of: ModelOf, model_type: str, dtype: str) -> None:
    """Gates whose threshold is minus infinity, and gates that happen to keep every slot, change no bit."""
    model = model_of(model_type, dtype=dtype)
    before = logits_of(model)
    for policy, threshold in (("share", -math.inf), ("share", 0.0), ("zero-logit", -1e9)):
        with gated(model, plan_for(model, policy, threshold)):
            assert (logits_of(model) == before).all()
    assert (logits_of(model) == before).all()


@pytest.mark.parametrize("model_type", FAMILIES)
@pytest.mark.parametrize("policy", sorted(BUILTIN.keys() - {"random"}))  # which draws by the last bits of the weights
def test_a_gate_computes_what_zero_weights_compute(model_of: ModelOf, model_type: str, policy: str) -> None:
    """Slots that are left out and slots that weigh nothing give the same logits, whatever decides."""
    import torch

    model = model_of(model_type, num_experts_per_tok=4)
    plan = plan_for(model, policy, MIDDLE[policy])
    with by_zero_weights(model, plan):
        wanted = logits_of(model)
    with gated(model, plan), moeprune.counted(model) as counter:
        found = logits_of(model)
    assert 0.005 < counter.rate < 0.995
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    assert not torch.equal(found, logits_of(model))


@pytest.mark.parametrize("renorm", ["survivors", "topk2:3"])
@pytest.mark.parametrize("model_type", FAMILIES)
def test_weights_are_divided_as_said(model_of: ModelOf, model_type: str, renorm: str) -> None:
    """With another denominator the gated model equals the one whose weights were changed by hand."""
    import torch

    model = model_of(model_type, num_experts_per_tok=4)
    plan = plan_for(model, "static-k", -1.5, renorm)
    with by_zero_weights(model, plan):
        wanted = logits_of(model)
    with gated(model, plan):
        found = logits_of(model)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    with gated(model, dataclasses.replace(plan, renorm=Renorm())):
        assert not torch.allclose(logits_of(model), found, atol=1e-3)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_token_without_slots_gets_the_shared_experts_and_nothing_else(model_of: ModelOf, model_type: str) -> None:
    """Where every slot is skipped the MoE block gives exactly what its shared experts give, or zero."""
    import torch

    model = model_of(model_type)
    [layer, *_] = expert_layers(model)
    hidden = torch.randn((1, 5, model.config.hidden_size), generator=torch.Generator().manual_seed(0))
    gate = Gate(layer, BUILTIN["zero-logit"], SkipLayer(threshold=1e9))
    with torch.no_grad(), gate.applied():
        found = layer.block(hidden)
    shared = getattr(layer.block, "shared_experts", None)
    with torch.no_grad():
        wanted = shared(hidden) if shared is not None else torch.zeros_like(hidden)
    assert (found == wanted).all()


@pytest.mark.parametrize("threshold", [0.4, 1e9])
def test_memory_that_was_never_written_stays_out(model_of: ModelOf, threshold: float) -> None:
    """With every uninitialised tensor filled with NaN, the logits of a gated model are what they are without."""
    import torch

    model = model_of("qwen3_moe", num_experts_per_tok=4)
    with gated(model, plan_for(model, "ratio" if threshold < 1 else "zero-logit", threshold)):
        wanted = logits_of(model)
        torch.use_deterministic_algorithms(True)
        try:
            assert torch.empty(7).isnan().all()
            found = logits_of(model)
        finally:
            torch.use_deterministic_algorithms(False)
    assert (found == wanted).all()


def test_gradients_are_those_of_the_slots_that_run(model_of: ModelOf) -> None:
    """Training through a gate gives the gradients of a model whose skipped slots weigh nothing."""
    import torch

    model = model_of("deepseek_v3", num_experts_per_tok=4)
    plan = plan_for(model, "share", 0.25)

    def gradients() -> list[torch.Tensor]:
        model.zero_grad()
        model(**batch()).logits.float().square().mean().backward()
        found = [value.grad.clone() for value in model.parameters() if value.grad is not None]
        model.zero_grad()
        return found

    with by_zero_weights(model, plan):
        wanted = gradients()
    with gated(model, plan):
        found = gradients()
    assert len(found) == len(wanted) > 10
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-7)


# --- what it costs ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", FAMILIES)
def test_skipped_slots_never_reach_the_kernel(model_of: ModelOf, model_type: str, kernel_rows: list[int]) -> None:
    """At half of the slots the grouped kernel multiplies half of the rows; zero weights would multiply all."""
    model = model_of(model_type, num_experts_per_tok=4)
    tokens, layers = batch()["input_ids"].numel(), len(expert_layers(model))
    plan = plan_for(model, "static-k", -1.5)
    with by_zero_weights(model, plan):
        logits_of(model)
    assert kernel_rows == [4 * tokens] * 2 * layers
    kernel_rows.clear()
    with gated(model, plan), moeprune.counted(model) as counter:
        logits_of(model)
    assert kernel_rows == [2 * tokens] * 2 * layers
    assert counter.total.rows == 2 * tokens * layers


def test_counts_leave_padding_out(model_of: ModelOf) -> None:
    """Tokens, slots and rates are of real tokens; rows and operations are of what really ran."""
    model = model_of("glm4_moe", num_experts_per_tok=2)
    real = int(batch()["attention_mask"].sum())
    with gated(model, plan_for(model, "static-k", -0.5)), moeprune.counted(model) as counter:
        logits_of(model)
    config = model.config
    for counts in counter.layers.values():
        assert (counts.tokens, counts.slots, counts.kept) == (real, 2 * real, real)
        assert counts.rows == batch()["input_ids"].numel()
        assert counts.flops_per_token == 2 * 3 * config.hidden_size * config.moe_intermediate_size
    assert counter.rate == 0.5
    assert counter.flops == sum(counts.rows for counts in counter.layers.values()) * counter.total.row_flops


def test_counts_go_on_through_a_cache(model_of: ModelOf) -> None:
    """While a model generates, every new token is counted once."""
    model = model_of("qwen3_moe", num_experts_per_tok=2)
    given = {name: value[1:2] for name, value in batch().items()}
    with gated(model, plan_for(model, "static-k", -0.5)), moeprune.counted(model) as counter:
        model.generate(**given, max_new_tokens=4, min_new_tokens=4, do_sample=False, pad_token_id=0)
    first = next(iter(counter.layers.values()))
    assert first.tokens == int(given["attention_mask"].sum()) + 3


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_compacted_rows_are_added_up_token_by_token(dtype: str) -> None:
    """The sum is that of the slots that are kept, and what others keep changes no bit of a token's own output."""
    import torch

    def experts(hidden: torch.Tensor, index: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
        return ((hidden * (index + 1)).float() * gates).to(hidden.dtype)

    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn((6, 8), generator=generator).to(getattr(torch, dtype))
    index = torch.randint(0, 5, (6, 3), generator=generator)
    gates = torch.rand((6, 3), generator=generator)
    keep = torch.rand((6, 3), generator=generator) > 0.4
    keep[:, 2] = False  # where all are kept the experts themselves add up
    found = compacted(experts, hidden, index, gates, keep)
    for token in range(6):
        slots = [(hidden[token] * (index[token, k] + 1)).float() * gates[token, k] * keep[token, k] for k in range(3)]
        assert torch.allclose(found[token], torch.stack(slots).sum(0).to(hidden.dtype), rtol=1e-6)
        own = slice(token, token + 1)
        assert torch.equal(found[own], compacted(experts, hidden[own], index[own], gates[own], keep[own]))


# --- policies ---------------------------------------------------------------------------------------------------------


def routed(gates: Any, **more: Any) -> Routed:
    """What a router gave."""
    import torch

    gates_TK = torch.tensor(gates)
    return Routed(index_TK=torch.arange(gates_TK.shape[1]).expand(gates_TK.shape), gates_TK=gates_TK, **more)


def test_policies_score_slots_as_they_say() -> None:
    """Scores of one token by hand; slots need not be sorted."""
    import torch

    layer = SkipLayer(table=(4.0, 1.0, 2.0, 10.0))
    given = routed([[0.2, 0.4, 0.1, 0.1]], layer=layer, logits_TK=torch.tensor([[1.0, -2.0, 3.0, 0.0]]))
    wanted = {
        "share": [0.25, 0.5, 0.125, 0.125],
        "ratio": [0.5, 1.0, 0.25, 0.25],
        "top-p": [0.5, 1.0, 0.25, 0.125],
        "zero-logit": [1.0, -2.0, 3.0, 0.0],
        "gate-norm": [0.8, 0.4, 0.2, 1.0],
        "static-k": [-1.0, 0.0, -2.0, -3.0],
    }
    for name, scores in wanted.items():
        assert BUILTIN[name].score(given)[0].tolist() == pytest.approx(scores), name


def test_a_token_that_is_spread_out_keeps_more_of_its_slots() -> None:
    """Ban: the flatter token and the more sensitive layer keep more, and no token fewer than the floor."""
    flat, steep = [0.25] * 4, [0.85, 0.05, 0.05, 0.05]

    def kept(sensitivity: float, threshold: float) -> list[int]:
        layer = SkipLayer(threshold=threshold, sensitivity=sensitivity, span=(0.25, 0.85))
        return BUILTIN["ban"].kept(routed([flat, steep], layer=layer)).sum(-1).tolist()

    assert kept(0.5, 1.0) == [3, 2]
    assert kept(1.0, 1.0) == [4, 3]
    assert kept(0.0, 1e9) == [1, 1]


def test_the_best_slot_stays_whatever_the_threshold() -> None:
    """Policies that keep the top slot keep exactly one of every token at a threshold that nothing reaches."""
    layer = SkipLayer(threshold=1e9)
    for policy in BUILTIN.values():
        if policy.keeps_top:
            keep = policy.kept(routed([[0.1, 0.4, 0.2], [0.3, 0.3, 0.3]], layer=layer))
            assert keep.tolist() == [[False, True, False], [True, False, False]], policy.name


def test_random_slots_are_drawn_evenly_and_again_the_same() -> None:
    """The control's numbers are uniform, do not follow the weights, and are equal in equal runs."""
    import torch

    gates = torch.rand((4096, 4), generator=torch.Generator().manual_seed(0))
    given = Routed(index_TK=torch.arange(4).expand(4096, 4), gates_TK=gates, layer=SkipLayer())
    scores = BUILTIN["random"].score(given)
    assert (scores == BUILTIN["random"].score(given)).all()
    assert abs(float((scores < 0.3).float().mean()) - 0.3) < 0.02
    assert abs(float(torch.corrcoef(torch.stack([scores.reshape(-1), gates.reshape(-1)]))[0, 1])) < 0.03


def test_norms_are_predicted_from_the_input() -> None:
    """A head that is fitted to norms that follow the input finds them on inputs that it has not seen."""
    import torch

    from moeprune.runtime.thresholds import fitted_head

    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn((6000, 16), generator=generator)
    true = torch.randn((4, 16), generator=generator) / 4
    index = torch.randint(0, 3, (6000, 2), generator=generator)
    norms = (hidden @ true.T).gather(-1, index).exp()
    head = fitted_head(hidden[:5000], index[:5000], norms[:5000], 4)
    assert isinstance(head, NormHead)
    error = (head.norms(hidden[5000:], index[5000:]).log() - norms[5000:].log()).std() / norms[5000:].log().std()
    assert error < 0.05
    assert head.weight_EH[3].abs().max() == 0  # never seen: the mean of all


def test_few_rows_are_fitted_as_many_are() -> None:
    """The two forms of the regression, by rows and by columns, give the same coefficients."""
    import torch

    from moeprune.runtime.thresholds import _ridge

    rows = torch.randn((12, 12), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    values = rows[:, 0] * 2
    narrow = _ridge(rows[:, :8], values, 0.7)
    wide = _ridge(torch.cat([rows[:, :8], rows.new_zeros((12, 8))], 1), values, 0.7)
    torch.testing.assert_close(wide[:8], narrow)


# --- thresholds -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["share", "top-p", "zero-logit", "gate-norm", "predicted-norm"])
@pytest.mark.parametrize("model_type", FAMILIES)
def test_thresholds_give_the_rate_on_what_the_gated_model_sees(
    checkpoint_of: CheckpointOf, ids_file: Path, tmp_path: Path, model_type: str, policy: str
) -> None:
    """On the text that they were solved on, every layer of the loaded model skips the share that was asked for."""
    base = checkpoint_of(model_type, num_experts_per_tok=4)
    result = moeprune.skip(base, tmp_path / "gated", skip_rate=0.4, policy=policy, calibration=str(ids_file))
    model = moeprune.load(tmp_path / "gated")
    with moeprune.counted(model) as counter:
        run_text(model, ids_file)
    assert result.plan is not None
    slots = next(iter(counter.layers.values())).slots
    for index, counts in counter.layers.items():
        assert counts.rate == pytest.approx(0.4, abs=1.5 / slots + 0.01)
        assert counts.rate == pytest.approx(result.plan.layers[index].rate, abs=0.01)


def run_text(model: PreTrainedModel, file: Path) -> None:
    """Every row of a calibration file through a model."""
    import json

    import torch

    with torch.no_grad():
        for line in file.read_text().splitlines():
            ids = torch.tensor([json.loads(line)["input_ids"]])
            model(input_ids=ids, attention_mask=torch.ones_like(ids))


def test_one_threshold_for_all_layers_gives_the_rate_over_all(
    checkpoint_of: CheckpointOf, ids_file: Path, tmp_path: Path
) -> None:
    """Layers skip as they like, and together what was asked for."""
    base = checkpoint_of("qwen3_moe", num_experts_per_tok=4)
    options: dict[str, Any] = {"policy": "share", "calibration": str(ids_file), "thresholds": "global"}
    result = moeprune.skip(base, tmp_path / "plan.json", skip_rate=0.4, **options)
    assert result.plan is not None
    assert len({layer.threshold for layer in result.plan.layers.values()}) == 1
    model = moeprune.load(base, plan=tmp_path / "plan.json")
    with moeprune.counted(model) as counter:
        run_text(model, ids_file)
    assert counter.rate == pytest.approx(0.4, abs=0.01)


@pytest.mark.parametrize(("policy", "sketch"), [("share", "share_hist"), ("zero-logit", "score_hist")])
def test_thresholds_from_sketches_are_those_of_the_first_layer(
    checkpoint_of: CheckpointOf, ids_file: Path, tmp_path: Path, policy: str, sketch: str
) -> None:
    """Without running the model, the first MoE layer gets the same threshold as with it: nothing is gated before."""
    base, text = checkpoint_of("qwen3_moe", num_experts_per_tok=4), str(ids_file)
    moeprune.collect(base, tmp_path / "stats.safetensors", calibration=text, statistics=(sketch,))
    common: dict[str, Any] = {"skip_rate": 0.4, "policy": policy}
    found = moeprune.skip(base, tmp_path / "one.json", statistics=tmp_path / "stats.safetensors", **common).plan
    wanted = moeprune.skip(base, tmp_path / "two.json", calibration=text, **common).plan
    assert found is not None
    assert wanted is not None
    assert found.layers[0].threshold == pytest.approx(wanted.layers[0].threshold, abs=0.02)
    assert found.rate == pytest.approx(0.4, abs=0.01)


def test_layers_that_lose_little_run_fewer_slots() -> None:
    """The shares of the layers are the best of all ways to share the slots out."""
    import itertools

    from moeprune.runtime.static_k import shared_out

    draw = np.random.default_rng(0)
    errors = {layer: np.sort(draw.uniform(size=4))[::-1] for layer in range(3)}

    def cost(chosen: tuple[int, ...]) -> float:
        return sum(float(np.append(errors[layer], 0.0)[k]) for layer, k in enumerate(chosen))

    for slots in range(3, 13):
        ways = [way for way in itertools.product(range(1, 5), repeat=3) if sum(way) == slots]
        found = tuple(shared_out(errors, slots).values())
        assert sum(found) == slots
        assert cost(found) == pytest.approx(min(map(cost, ways)))


def test_the_error_of_a_layer_is_what_its_output_loses(checkpoint_of: CheckpointOf) -> None:
    """What running k slots costs a layer, against the layer run with so many slots."""
    import torch

    from moeprune.runtime.static_k import slot_errors
    from moeprune.streaming.states import States
    from moeprune.streaming.stream import LayerStream

    checkpoint = moeprune.open_checkpoint(checkpoint_of("glm4_moe", num_experts_per_tok=4))
    stream = LayerStream(checkpoint, device=torch.device("cpu"))
    given = batch()
    errors = slot_errors(stream, [given], lambda: contextlib.nullcontext(States(1)))
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(checkpoint.path).eval()
    [layer, *_] = expert_layers(model)
    seen: dict[int, torch.Tensor] = {}
    valid = given["attention_mask"].reshape(-1).bool()
    for kept in range(5):
        threshold = 0.5 - kept
        plan = dataclasses.replace(plan_for(model, "static-k", threshold))
        gate = gates_of([layer], dataclasses.replace(plan, layers={layer.index: plan.layers[layer.index]}))
        forced = dataclasses.replace(gate[layer.index].policy, keeps_top=False)
        own = Gate(layer, forced, SkipLayer(threshold=threshold))
        own.attach()
        hook = layer.experts.register_forward_hook(lambda _, __, out, k=kept: seen.update({k: out}))
        logits_of(model)
        hook.remove()
        own.detach()
    whole = seen[4][valid].double()
    wanted = [(seen[kept][valid].double() - whole).square().sum() / whole.square().sum() for kept in range(4)]
    np.testing.assert_allclose(errors[layer.index], [float(value) for value in wanted], rtol=1e-4)


# --- loading ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gated_folder(checkpoint_of: CheckpointOf, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What ``moeprune skip`` wrote."""
    folder = tmp_path_factory.mktemp("gated")
    rows = folder / "ids.jsonl"
    draw = np.random.default_rng(1)
    rows.write_text("".join(f'{{"input_ids": {draw.integers(0, 97, 24).tolist()}}}\n' for _ in range(12)))
    base = checkpoint_of("qwen3_moe", num_experts_per_tok=4)
    moeprune.skip(base, folder / "out", calibration=str(rows))
    return folder / "out"


def test_both_ways_to_load_run_the_same_model(gated_folder: Path) -> None:
    """``moeprune.load`` and transformers with our implementation give equal logits, apart from the stock model's."""
    from transformers import AutoModelForCausalLM

    ours = moeprune.load(gated_folder)
    theirs = AutoModelForCausalLM.from_pretrained(gated_folder, experts_implementation="moeprune_skip").eval()
    stock = AutoModelForCausalLM.from_pretrained(gated_folder).eval()
    assert (logits_of(ours) == logits_of(theirs)).all()
    assert not (logits_of(ours) == logits_of(stock)).all()
    with moeprune.counted(theirs) as counter:
        theirs.generate(**batch(), max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert 0.3 < counter.rate < 0.7


def test_the_source_is_copied_byte_for_byte(gated_folder: Path, checkpoint_of: CheckpointOf) -> None:
    """Stock engines get the original: every tensor and the config are equal, and verify says so."""
    base = checkpoint_of("qwen3_moe", num_experts_per_tok=4)
    assert (gated_folder / "config.json").read_bytes() == (base / "config.json").read_bytes()
    assert moeprune.verify(base, gated_folder).tensors == len(moeprune.open_checkpoint(base).tensors)
    weights = gated_folder / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    changed = gated_folder.parent / "changed"
    shutil.copytree(gated_folder, changed)
    (changed / "model.safetensors").write_bytes(data)
    with pytest.raises(moeprune.CheckpointError, match="differs from the source"):
        moeprune.verify(base, changed)


def test_importing_moeprune_is_enough(gated_folder: Path) -> None:
    """In a fresh process, before or after transformers, our implementation is known; moeprune alone loads no torch."""
    use = (
        "from transformers import AutoModelForCausalLM\nimport torch\n"
        f"model = AutoModelForCausalLM.from_pretrained({str(gated_folder)!r}, experts_implementation='moeprune_skip')\n"
        "model(torch.arange(8)[None])\nprint(hasattr(model, 'moeprune_gates'))"
    )
    for start in ("import moeprune, sys\nassert 'torch' not in sys.modules\n", "import transformers, moeprune\n"):
        done = subprocess.run([sys.executable, "-c", start + use], capture_output=True, text=True, check=True)
        assert done.stdout.split() == ["True"]


def test_a_plan_without_copy_is_bound_to_its_model(checkpoint_of: CheckpointOf, ids_file: Path, tmp_path: Path) -> None:
    """A plan file gates the model that it was made for, and no other."""
    base = checkpoint_of("glm4_moe", num_experts_per_tok=4)
    moeprune.skip(base, tmp_path / "plan.json", calibration=str(ids_file))
    moeprune.skip(base, tmp_path / "out", calibration=str(ids_file))
    ours = moeprune.load(base, plan=tmp_path / "plan.json")
    assert (logits_of(ours) == logits_of(moeprune.load(tmp_path / "out"))).all()
    with pytest.raises(StaleArtifactError, match="another model"):
        moeprune.load(checkpoint_of("glm4_moe"), plan=tmp_path / "plan.json")
    with pytest.raises(ConfigError, match="plan of its own"):
        moeprune.load(tmp_path / "out", plan=tmp_path / "plan.json")
    (tmp_path / "plan.safetensors").write_bytes(b"")
    with pytest.raises(ArtifactError, match=r"plan\.safetensors"):
        moeprune.load(base, plan=tmp_path / "plan.json")


def test_a_pruned_model_can_be_gated(
    checkpoint_of: CheckpointOf, ids_file: Path, tmp_path: Path, plan_by_hand: Callable[..., Any]
) -> None:
    """Dropping experts and skipping slots compose: the gated half is half of the pruned model's slots."""
    base = checkpoint_of("deepseek_v3", num_experts_per_tok=2)
    moeprune.apply(base, plan_by_hand(base, 8), tmp_path / "pruned")
    moeprune.skip(tmp_path / "pruned", tmp_path / "gated", calibration=str(ids_file))
    model = moeprune.load(tmp_path / "gated")
    with moeprune.counted(model) as counter:
        run_text(model, ids_file)
    assert counter.rate == pytest.approx(0.5, abs=0.02)
    assert expert_layers(model)[0].num_experts == 8


def test_equal_runs_give_equal_plans(checkpoint_of: CheckpointOf, ids_file: Path, tmp_path: Path) -> None:
    """Nothing in a plan depends on when or where it was made."""
    base = checkpoint_of("qwen3_moe", num_experts_per_tok=4)
    for name in ("one", "two"):
        moeprune.skip(base, tmp_path / f"{name}.json", calibration=str(ids_file))
    assert (tmp_path / "one.json").read_bytes() == (tmp_path / "two.json").read_bytes()
    assert (tmp_path / "one.safetensors").read_bytes() == (tmp_path / "two.safetensors").read_bytes()


# --- for every engine -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_baked_decision_is_in_the_config(
    checkpoint_of: CheckpointOf, ids_file: Path, tmp_path: Path, model_type: str
) -> None:
    """Stock transformers runs half of the experts, and where the family has a scale the output keeps its size."""
    from transformers import AutoModelForCausalLM

    base = checkpoint_of(model_type, num_experts_per_tok=4)
    options: dict[str, Any] = {"policy": "static-k", "bake": True, "calibration": str(ids_file)}
    result = moeprune.skip(base, tmp_path / "baked", skip_rate=0.5, **options)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "baked").eval()
    assert stock.config.num_experts_per_tok == 2
    assert (logits_of(stock) == logits_of(moeprune.load(tmp_path / "baked"))).all()
    assert result.plan is not None
    scale = "routed_scaling_factor"
    before = moeprune.open_checkpoint(base).config.get(scale)
    assert (scale in result.plan.config_edits) is (before is not None)
    if before is not None:
        assert 0.5 * before < result.plan.config_edits[scale] < before
    assert moeprune.verify(base, tmp_path / "baked").tensors


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"skip_rate": 0.8, "policy": "share"}, "at most 75%"),
        ({"skip_rate": 1.0}, "below 1"),
        ({"policy": "shares"}, "no skip policy 'shares'"),
        ({"renorm": "half"}, "unknown --renorm"),
        ({"thresholds": "all"}, "unknown --thresholds"),
        ({"bake": True}, "--bake is for --policy static-k"),
        ({"bake": True, "policy": "static-k", "skip_rate": 0.4}, "is no number of them"),
        ({"calibration": ()}, "solved on text"),
        ({"curve": (0.25,)}, "there is no text"),
        ({"statistics": "s.safetensors", "policy": "gate-norm"}, "has no sketch"),
        ({"policy": "static-k", "thresholds": "global"}, "no threshold to share"),
    ],
)
def test_what_cannot_work_is_refused_before_any_work(
    checkpoint_of: CheckpointOf, ids_file: Path, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    """A clear error, and nothing is written."""
    base = checkpoint_of("qwen3_moe", num_experts_per_tok=4)
    with pytest.raises(ConfigError, match=message):
        moeprune.skip(base, tmp_path / "out", **{"calibration": str(ids_file), **options})
    assert not [*tmp_path.glob("*out*")]


def test_gates_refuse_what_they_do_not_fit(model_of: ModelOf) -> None:
    """A plan of another top-k, of another layer, or a second one."""
    model = model_of("qwen3_moe", num_experts_per_tok=4)
    plan = plan_for(model, "share", 0.3)
    with pytest.raises(PlanError, match="for 2 experts per token"):
        attach(model, dataclasses.replace(plan, top_k=2))
    with pytest.raises(PlanError, match="gates layer 99"):
        attach(model, dataclasses.replace(plan, layers={99: SkipLayer()}))
    with pytest.raises(PlanError, match="has no output norms"):
        attach(model, dataclasses.replace(plan, policy="predicted-norm"))
    with gated(model, plan):
        with pytest.raises(ConfigError, match="gated already"):
            attach(model, plan)
        with pytest.raises(ConfigError, match="skips slots"), moeprune.observe(model):
            pass
    with pytest.raises(ConfigError, match="skips nothing"), moeprune.counted(model):
        pass


def test_plans_survive_their_file(model_of: ModelOf, tmp_path: Path) -> None:
    """What is written is what is read, side file included."""
    model = model_of("qwen3_moe", num_experts_per_tok=4)
    plan = plan_for(model, "predicted-norm", 0.5, "topk2:3")
    plan.save(tmp_path / "plan.json")
    found = SkipPlan.load(tmp_path / "plan.json")
    assert found.to_dict() == plan.to_dict()
    assert {name: value.tolist() for name, value in found.tensors.items()} == {
        name: value.tolist() for name, value in plan.tensors.items()
    }
