"""Multi-token-prediction layers under every name they have: cut to the trunk's count or removed, never left wide."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import moeprune
from moeprune.errors import CheckpointError, LayoutError, PlanError
from moeprune.plans import LayerPlan

if TYPE_CHECKING:
    import torch

PlanByHand = Callable[..., moeprune.PruningPlan]
CheckpointOf = Callable[..., Path]
# What the tensors of the head begin with, and the config key that counts its layers where there is one.
NAMINGS = {
    "deepseek_v3": ("model.layers.3.", "num_nextn_predict_layers"),
    "glm4_moe_lite": ("model.layers.3.", "num_nextn_predict_layers"),
    "qwen3_next": ("mtp.", ""),
    "qwen3_5_moe_text": ("mtp.", "mtp_num_hidden_layers"),
    "qwen3_5_moe": ("mtp.", "text_config.mtp_num_hidden_layers"),
    "ernie4_5_moe": ("model.mtp_", "num_nextn_predict_layers"),
}
DENSE = {"ernie4_5_moe"}
EVERY = pytest.mark.parametrize("model_type", NAMINGS)
ROUTED = pytest.mark.parametrize("model_type", [name for name in NAMINGS if name not in DENSE])


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a folder."""
    from safetensors.torch import load_file

    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def value_of(config: object, key: str) -> object:
    """The value at a dotted key."""
    for part in key.split("."):
        assert isinstance(config, dict)
        config = config[part]
    return config


def planned(base: Path, mtp: str) -> moeprune.PruningPlan:
    """A plan without calibration."""
    return moeprune.plan(moeprune.collect(base), base, ratio=0.5, strategy="random", mtp=mtp)


@EVERY
def test_heads_are_cut_like_the_last_layer_by_default(
    model_type: str, checkpoint_of: CheckpointOf, tmp_path: Path
) -> None:
    """The plan says where the head's list comes from; its experts and router rows are those of the list."""
    import torch

    base, (prefix, key) = checkpoint_of(model_type), NAMINGS[model_type]
    checkpoint, plan = moeprune.open_checkpoint(base), planned(base, "cut")
    [head], last = checkpoint.mtp_layers, checkpoint.moe_layers[-1]
    keep = plan.layers[head].keep
    assert plan.layers[head] == LayerPlan(keep=plan.layers[last].keep, copied_from=last)
    fate = "stay as they are" if model_type in DENSE else f"take the keep-list of layer {last}"
    assert any(f"MTP layers {head} " in note and fate in note for note in plan.notes)
    out = moeprune.apply(base, plan, tmp_path / "out")
    source, result = tensors_of(base), tensors_of(out)
    assert {name for name in source if name.startswith(prefix)} >= {name for name in result if name.startswith(prefix)}
    seen = set()
    for name, tensor in result.items():
        if not name.startswith(prefix):
            continue
        single = re.fullmatch(r"(.*\.experts\.)(\d+)(\..*)", name)
        rows = re.search(r"\.mlp\.(gate|experts)\.", name)
        if single:
            assert torch.equal(tensor, source[f"{single[1]}{keep[int(single[2])]}{single[3]}"])
            seen.add(int(single[2]))
        else:
            assert torch.equal(tensor, source[name][list(keep)] if rows else source[name])
            seen.update(range(len(tensor)) if ".mlp.experts.down_proj" in name else ())
    assert seen == (set() if model_type in DENSE else set(range(checkpoint.num_experts // 2)))
    assert not key or value_of(moeprune.open_checkpoint(out).config, key) == 1
    assert moeprune.verify(base, out).tensors == len(result)


@EVERY
def test_heads_can_be_dropped(model_type: str, checkpoint_of: CheckpointOf, tmp_path: Path) -> None:
    """No tensor of the head is left, the config announces none, and transformers finds nothing unexpected."""
    from transformers import AutoModelForCausalLM

    base, (prefix, key) = checkpoint_of(model_type), NAMINGS[model_type]
    plan = planned(base, "drop")
    assert any("are dropped" in note for note in plan.notes)
    out = moeprune.apply(base, plan, tmp_path / "out")
    left = tensors_of(out).keys()
    assert any(name.startswith(prefix) for name in tensors_of(base))
    assert not any(name.startswith(prefix) or "mtp" in name for name in left)
    pruned = moeprune.open_checkpoint(out)
    assert pruned.mtp_layers == ()
    assert not key or value_of(pruned.config, key) == 0
    _, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not info["unexpected_keys"]
    assert not info["missing_keys"]
    assert moeprune.verify(base, out).tensors == len(left)


@ROUTED
def test_no_plan_leaves_a_full_head(
    model_type: str, checkpoint_of: CheckpointOf, plan_by_hand: PlanByHand, tmp_path: Path
) -> None:
    """A plan whose head keeps all experts, or another number than the trunk, is refused before anything is written."""
    base = checkpoint_of(model_type)
    plan, full = plan_by_hand(base, 8), plan_by_hand(base, moeprune.open_checkpoint(base).num_experts)
    [head] = moeprune.open_checkpoint(base).mtp_layers
    wide = dataclasses.replace(plan, layers=dict(plan.layers) | {head: full.layers[head]})
    with pytest.raises(PlanError, match="layers keep different numbers of experts"):
        moeprune.apply(base, wide, tmp_path / "out")
    assert not any(tmp_path.iterdir())


@ROUTED
def test_a_full_head_on_a_pruned_trunk_is_no_checkpoint(
    model_type: str, checkpoint_of: CheckpointOf, tmp_path: Path
) -> None:
    """Put together by hand it cannot be opened, so it is neither verified nor pruned again."""
    from safetensors.torch import save_file

    base, (prefix, _) = checkpoint_of(model_type), NAMINGS[model_type]
    out = moeprune.apply(base, planned(base, "cut"), tmp_path / "out", max_shard_size=10**9)
    trunk = {name: tensor for name, tensor in tensors_of(out).items() if not name.startswith(prefix)}
    head = {name: tensor for name, tensor in tensors_of(base).items() if name.startswith(prefix)}
    save_file(trunk | head, out / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(LayoutError, match=r"experts, config\.json says|does not have . rows along axis 0"):
        moeprune.open_checkpoint(out)
    with pytest.raises(CheckpointError, match=r"is too much in|, should be"):
        moeprune.verify(base, out)


@pytest.mark.parametrize("name", ["mtp.layers.0.mlp.experts.0.up_proj.weight", "model.mtp.0.mlp.experts.down_proj"])
def test_a_head_under_an_unknown_name_stops_the_run(name: str, checkpoint_of: CheckpointOf, tmp_path: Path) -> None:
    """Where the architecture is not known to have such a head, its experts would stay at the old width."""
    import torch
    from safetensors.torch import save_file

    source = checkpoint_of("deepseek_v3")
    (tmp_path / "config.json").write_bytes((source / "config.json").read_bytes())
    save_file(tensors_of(source) | {name: torch.zeros(16, 2)}, tmp_path / "model.safetensors")
    with pytest.raises(LayoutError, match=re.escape(f"tensor {name!r} looks like part of an expert")):
        moeprune.open_checkpoint(tmp_path)
