"""Pruning a loaded model in place, and saving it as a stock checkpoint, against what ``apply`` writes."""

from __future__ import annotations

import copy
import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import moeprune
from moeprune.architectures import ARCHITECTURES
from moeprune.errors import CheckpointError, ConfigError, PlanError, StaleArtifactError
from moeprune.plans import LayerPlan

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

PlanByHand = Callable[..., moeprune.PruningPlan]
CheckpointOf = Callable[..., Path]
ModelOf = Callable[..., "PreTrainedModel"]
CASES = [
    *((name, {}) for name in ARCHITECTURES if name != "kimi_k2"),  # which transformers does not load
    ("qwen3_moe", {"dtype": "bfloat16"}),
    ("deepseek_v3", {"dtype": "bfloat16"}),
    ("qwen3_moe", {"tie_word_embeddings": True}),
]


def load(folder: Path, **options: Any) -> PreTrainedModel:
    """A stock transformers model."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, **options).eval()


def token_ids() -> torch.Tensor:
    """Random token ids."""
    import torch

    return torch.randint(0, 97, (3, 16), generator=torch.Generator().manual_seed(2))


def files(folder: Path) -> dict[str, bytes]:
    """Every file of a checkpoint but its provenance, byte for byte."""
    found = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return {name: data for name, data in found.items() if not name.startswith("moeprune")}


def half(folder: Path) -> int:
    """Half of the experts of a checkpoint."""
    return moeprune.open_checkpoint(folder).num_experts // 2


@pytest.mark.parametrize(("model_type", "changes"), CASES, ids=str)
def test_memory_and_disk_agree(
    model_type: str,
    changes: dict[str, Any],
    checkpoint_of: CheckpointOf,
    model_of: ModelOf,
    plan_by_hand: PlanByHand,
    tmp_path: Path,
) -> None:
    """A model pruned in place computes what the pruned checkpoint computes, and is saved as the same files."""
    import torch

    base = checkpoint_of(model_type, **changes)
    plan = plan_by_hand(base, half(base))
    applied = moeprune.apply(base, plan, tmp_path / "applied", max_shard_size=60_000)
    model = copy.deepcopy(model_of(model_type, **changes))
    before = model.num_parameters()
    assert moeprune.prune_model(model, plan) is model
    loaded = load(applied)
    assert model.num_parameters() == loaded.num_parameters() < before
    assert {name: (value.dtype, value.shape) for name, value in model.state_dict().items()} == {
        name: (value.dtype, value.shape) for name, value in loaded.state_dict().items()
    }
    with torch.no_grad():
        assert torch.equal(model(token_ids()).logits, loaded(token_ids()).logits)
    saved = moeprune.save_model(model, tmp_path / "saved", like=base, max_shard_size=60_000)
    assert files(saved) == files(applied)
    plans = [moeprune.PruningPlan.load(folder / "moeprune/plan.json") for folder in (saved, applied)]
    assert plans[0].layers == plans[1].layers == plan.layers
    assert plans[0].config_edits == plans[1].config_edits
    assert sorted(path.name for path in tmp_path.iterdir()) == ["applied", "saved"]


@pytest.mark.parametrize("model_type", ["mixtral", "deepseek_v3"])
def test_an_unpruned_model_gives_its_base_again(
    model_type: str, checkpoint_of: CheckpointOf, model_of: ModelOf, tmp_path: Path
) -> None:
    """Without a plan every tensor, MTP layers included, and the raw config are those of the base."""
    base = checkpoint_of(model_type)
    saved = moeprune.save_model(model_of(model_type), tmp_path / "saved", like=base)
    ours, theirs = moeprune.open_checkpoint(saved), moeprune.open_checkpoint(base)
    assert ours.tensors.keys() == theirs.tensors.keys()
    for name, entry in ours.tensors.items():
        other = theirs.tensors[name]
        assert entry.dtype == other.dtype
        assert entry.file.read_bytes()[entry.begin : entry.end] == other.file.read_bytes()[other.begin : other.end]
    assert (saved / "config.json").read_bytes() == (base / "config.json").read_bytes()
    assert not (saved / "moeprune").exists()


def test_dtypes_are_the_base_s(checkpoint_of: CheckpointOf, plan_by_hand: PlanByHand, tmp_path: Path) -> None:
    """A bf16 base with a float32 correction bias keeps both, though the model was trained in float32."""
    import torch

    base = checkpoint_of("deepseek_v3", dtype="bfloat16")
    plan = plan_by_hand(base, 8)
    model = load(base, dtype=torch.float32)
    assert {value.dtype for value in model.state_dict().values()} == {torch.float32}
    saved = moeprune.save_model(moeprune.prune_model(model, plan), tmp_path / "saved", like=base)
    assert files(saved) == files(moeprune.apply(base, plan, tmp_path / "applied"))
    tensors = moeprune.open_checkpoint(saved).tensors
    assert tensors["model.layers.1.mlp.gate.e_score_correction_bias"].dtype == "F32"
    assert tensors["model.layers.1.mlp.experts.0.up_proj.weight"].dtype == "BF16"


@pytest.mark.parametrize("model_type", ["qwen3_moe", "deepseek_v3"])
def test_a_pruned_model_trains_and_is_saved(
    model_type: str, checkpoint_of: CheckpointOf, plan_by_hand: PlanByHand, tmp_path: Path
) -> None:
    """Two steps of training after pruning lower the loss; the saved checkpoint computes what the model computes."""
    import torch

    base = checkpoint_of(model_type)
    plan = plan_by_hand(base, 8)
    model = moeprune.prune_model(load(base), plan)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(3):
        loss = model(token_ids(), labels=token_ids()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[0] > losses[1] > losses[2]
    saved = moeprune.save_model(model, tmp_path / "saved", like=base, plan=plan)
    with torch.no_grad():
        assert torch.equal(load(saved)(token_ids()).logits, model(token_ids()).logits)
    applied = moeprune.apply(base, plan, tmp_path / "applied")
    assert (saved / "config.json").read_bytes() == (applied / "config.json").read_bytes()
    assert (saved / "model.safetensors").read_bytes() != (applied / "model.safetensors").read_bytes()


def test_the_load_balancing_loss_counts_the_kept_experts(
    checkpoint_of: CheckpointOf, plan_by_hand: PlanByHand, tmp_path: Path
) -> None:
    """With router logits in the output the auxiliary loss is that of the pruned checkpoint, and has a gradient."""
    import torch

    base = checkpoint_of("qwen3_moe")
    plan = plan_by_hand(base, 8)
    loaded = load(moeprune.apply(base, plan, tmp_path / "applied"))
    model = moeprune.prune_model(load(base), plan)
    results = [
        each(token_ids(), labels=token_ids(), output_router_logits=True) for each in (model.train(), loaded.train())
    ]
    assert results[0].router_logits[0].shape[-1] == 8
    assert torch.equal(results[0].aux_loss, results[1].aux_loss)
    results[0].aux_loss.backward()
    assert model.model.layers[0].mlp.gate.weight.grad.shape == (8, 32)


def test_observe_plan_and_prune_in_one_script(checkpoint_of: CheckpointOf, tmp_path: Path) -> None:
    """The flow of a training script gives what the stages give; afterwards the model can be observed again."""
    import torch

    base = checkpoint_of("qwen3_moe")
    model = load(base)
    with moeprune.observe(model) as observation, torch.no_grad():
        model(token_ids())
    plan = moeprune.plan(observation.result(), base, ratio=0.5)
    moeprune.prune_model(model, plan)
    assert files(moeprune.save_model(model, tmp_path / "saved", like=base)) == files(
        moeprune.apply(base, plan, tmp_path / "applied")
    )
    with moeprune.observe(model) as observation, torch.no_grad():
        model(token_ids())
    again = observation.result()
    assert again.num_experts == 8
    with pytest.raises(StaleArtifactError):
        moeprune.plan(again, base, ratio=0.5)  # they describe the pruned model, not the base
    with pytest.raises(ConfigError, match=r"8 experts in layer 0, .* has 16"), moeprune.observe(model, like=base):
        pass
    with moeprune.observe(model, like=tmp_path / "saved") as observation, torch.no_grad():
        model(token_ids())
    assert moeprune.plan(observation.result(), tmp_path / "saved", keep=4).kept == 4


# --- what is refused --------------------------------------------------------------------------------------------------


def state_of(model: PreTrainedModel) -> dict[str, tuple[int, tuple[int, ...]]]:
    """Identity and shape of every tensor."""
    return {name: (value.data_ptr(), tuple(value.shape)) for name, value in model.state_dict().items()}


def test_plans_that_do_not_fit_are_refused(
    checkpoint_of: CheckpointOf, model_of: ModelOf, plan_by_hand: PlanByHand
) -> None:
    """A plan for other weights, other layers, unequal counts or too few experts changes nothing in the model."""
    base, model = checkpoint_of("deepseek_v3"), copy.deepcopy(model_of("deepseek_v3"))
    plan = plan_by_hand(base, 8)
    before = state_of(model)
    with pytest.raises(StaleArtifactError, match="another model"):
        moeprune.prune_model(model, plan_by_hand(checkpoint_of("deepseek_v3", routed_scaling_factor=2.0), 8))
    lacking = dataclasses.replace(plan, layers={layer: plan.layers[layer] for layer in (1, 3)})
    with pytest.raises(PlanError, match=r"do not have the same MoE layers \(first odd one: 2\)"):
        moeprune.prune_model(model, lacking)
    with pytest.raises(PlanError, match=r"different numbers of experts: \[8, 12\]"):
        moeprune.prune_model(
            model, dataclasses.replace(plan, layers={**plan.layers, 1: plan_by_hand(base, 12).layers[1]})
        )
    few = LayerPlan(keep=(0, 4, 8, 12))
    with pytest.raises(PlanError, match="layer 1: 1 expert per group"):
        moeprune.prune_model(model, dataclasses.replace(plan, layers=dict.fromkeys((1, 2), few)))
    assert state_of(model) == before
    assert model.config.n_routed_experts == 16


def test_the_shape_is_checked_when_the_folder_is_unknown(
    checkpoint_of: CheckpointOf, model_of: ModelOf, plan_by_hand: PlanByHand
) -> None:
    """A model that came from no folder still refuses keep-lists that it cannot have."""
    model = copy.deepcopy(model_of("mixtral"))
    model.config._name_or_path = "somebody/some-model"
    with pytest.raises(PlanError, match=r"layer 0: .* must name experts 0 to 7"):
        moeprune.prune_model(model, plan_by_hand(checkpoint_of("olmoe"), 6))
    assert moeprune.prune_model(model, plan_by_hand(checkpoint_of("mixtral"), 4)).config.num_local_experts == 4


def test_a_model_is_pruned_once(checkpoint_of: CheckpointOf, model_of: ModelOf, plan_by_hand: PlanByHand) -> None:
    """A second plan would be read in the wrong numbering."""
    base, model = checkpoint_of("mixtral"), copy.deepcopy(model_of("mixtral"))
    moeprune.prune_model(model, plan_by_hand(base, 4))
    with pytest.raises(PlanError, match="pruned already"):
        moeprune.prune_model(model, plan_by_hand(base, 4))


def test_what_cannot_be_saved_is_refused(
    checkpoint_of: CheckpointOf, model_of: ModelOf, plan_by_hand: PlanByHand, tmp_path: Path
) -> None:
    """Another plan, another base, lacking, surplus and offloaded tensors are named, and nothing is written."""
    import torch

    base, out = checkpoint_of("mixtral"), tmp_path / "out"
    plan, unpruned = plan_by_hand(base, 4), model_of("mixtral")
    pruned = moeprune.prune_model(copy.deepcopy(unpruned), plan)
    with pytest.raises(PlanError, match="pruned by another plan"):
        moeprune.save_model(pruned, out, like=base, plan=plan_by_hand(base, 4, seed=1))
    with pytest.raises(StaleArtifactError, match="another model"):
        moeprune.save_model(pruned, out, like=checkpoint_of("olmoe"))
    with pytest.raises(CheckpointError, match=r"is \(8, 32\) in the model and should be \(4, 32\)"):
        moeprune.save_model(unpruned, out, like=base, plan=plan)
    with pytest.raises(CheckpointError, match=r"the model has no tensor 'model\.layers"):
        moeprune.save_model(unpruned, out, like=checkpoint_of("qwen3_moe"))
    odd = copy.deepcopy(unpruned)
    odd.model.layers[0].mlp.register_parameter("adapter", torch.nn.Parameter(torch.zeros(2)))
    with pytest.raises(CheckpointError, match=r"has a tensor 'model\.layers\.0\.\w+\.adapter', which base has not"):
        moeprune.save_model(odd, out, like=base)
    odd = copy.deepcopy(unpruned)
    odd.lm_head.weight = torch.nn.Parameter(odd.lm_head.weight.to("meta"))
    with pytest.raises(CheckpointError, match=r"lm_head\.weight' is offloaded"):
        moeprune.save_model(odd, out, like=base)
    with pytest.raises(ConfigError, match="inside one another"):
        moeprune.save_model(unpruned, base / "out", like=base)
    assert not any(tmp_path.iterdir())


def test_quantised_bases_are_refused(checkpoint_of: CheckpointOf, model_of: ModelOf, tmp_path: Path) -> None:
    """Values cannot be put in the place of bytes of another kind."""
    base = tmp_path / "base"
    shutil.copytree(checkpoint_of("mixtral"), base)
    for shard in base.glob("*.safetensors"):
        shard.write_bytes(shard.read_bytes().replace(b'"F32"', b'"I32"'))
    with pytest.raises(CheckpointError, match="is stored as I32"):
        moeprune.save_model(model_of("mixtral"), tmp_path / "out", like=base)
    assert [path.name for path in tmp_path.iterdir()] == ["base"]
