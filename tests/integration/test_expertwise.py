"""Healing expert by expert: the arithmetic beside the original's experts, what it brings, and what it refuses."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import moeprune
from moeprune.errors import ConfigError
from moeprune.experts import expert_layers
from moeprune.healing.expertwise import Beside

CheckpointOf = Callable[..., Path]
STEPS = 48


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint."""
    return {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}


@pytest.mark.parametrize("model_type", ["qwen3_moe", "deepseek_v3", "gpt_oss"])
@torch.no_grad()
def test_experts_run_slot_by_slot_beside_their_originals(model_of: Callable[..., Any], model_type: str) -> None:
    """The layer's output stays what it was, and the difference is that of every expert, one by one; padding is out."""
    original = expert_layers(model_of(model_type))[-1]
    layer = expert_layers(copy.deepcopy(model_of(model_type)))[-1]
    for value in layer.experts.parameters():
        value.mul_(torch.rand(value.shape, generator=torch.Generator().manual_seed(0)) < 0.5)
    generator = torch.Generator().manual_seed(1)
    width = layer.router.weight.shape[-1]
    hidden_TH = torch.randn((50, int(width)), generator=generator)
    index_TK = torch.rand((50, layer.num_experts), generator=generator).argsort(dim=1)[:, :2]
    gates_TK = torch.rand((50, 2), generator=generator) + 0.2
    plain_TH = layer.experts(hidden_TH, index_TK, gates_TK)
    beside = Beside(layer, original)
    beside.mask_T = torch.arange(50) < 40
    with beside.applied():
        output_TH = layer.experts(hidden_TH, index_TK, gates_TK)
    assert torch.allclose(output_TH, plain_TH, rtol=1e-5, atol=1e-6 * float(plain_TH.abs().max()))
    squares = []
    for token in range(40):
        for expert in index_TK[token]:
            one = hidden_TH[token : token + 1], expert.view(1, 1), torch.ones((1, 1))
            squares.append((layer.experts(*one) - original.experts(*one)).square().mean())
    assert beside.difference is not None
    assert float(beside.difference) == pytest.approx(float(torch.stack(squares).mean()), rel=1e-4)


def expert_gap(base: Path, other: Path) -> float:
    """Mean squared difference of two models' experts, all on the same inputs, over that of the originals' outputs."""
    from transformers import AutoModelForCausalLM

    layers = [
        expert_layers(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)) for folder in (base, other)
    ]
    gaps = []
    for original, layer in zip(*layers, strict=True):
        width = int(layer.router.weight.shape[-1])  # type: ignore[union-attr,arg-type]
        hidden_TH = torch.randn((64, width), generator=torch.Generator().manual_seed(0))
        for expert in range(layer.num_experts):
            given = hidden_TH, torch.full((64, 1), expert), torch.ones((64, 1))
            with torch.no_grad():
                wanted, found = original.experts(*given), layer.experts(*given)
            gaps.append(float((wanted - found).square().sum() / wanted.square().sum()))
    return sum(gaps) / len(gaps)


@pytest.mark.parametrize(
    ("model_type", "how"), [("qwen3_moe", {"sparsity": 0.5}), ("qwen2_moe", {"neurons": 0.5}), ("glm4_moe", {})]
)
def test_every_expert_comes_closer_to_its_own(
    checkpoint_of: CheckpointOf, ids_file: Path, tmp_path: Path, model_type: str, how: dict[str, Any]
) -> None:
    """The model predicts more like its original, its experts are nearer to theirs than by fitting layers alone."""
    base = checkpoint_of(model_type)
    thinned = how or {"pattern": "2:4"}
    sparse = moeprune.sparsify(base, output=tmp_path / "sparse", calibration=str(ids_file), **thinned).output
    common: dict[str, Any] = {"calibration": str(ids_file), "steps": STEPS, "step_tokens": 256, "lr": 0.002}
    result = moeprune.heal(base, sparse, tmp_path / "out", method="experts", **common)
    assert result.healed
    assert result.before is not None
    assert result.after is not None
    assert result.after < result.before
    before, after = tensors_of(sparse), tensors_of(result.output)
    if "neurons" not in thinned:
        pruned = [name for name in before if ".experts." in name]
        assert all(torch.equal(before[name] == 0, after[name] == 0) for name in pruned)
    moeprune.heal(base, sparse, tmp_path / "layers", method="layerwise", **common)
    assert expert_gap(base, result.output) < expert_gap(base, tmp_path / "layers")
    assert result.record["method"] == "experts"


def test_experts_that_do_not_correspond_are_refused(
    checkpoint_of: CheckpointOf, plan_by_hand: Callable[..., Any], ids_file: Path, tmp_path: Path
) -> None:
    """A model with fewer experts is refused by name; a sparsified one may be healed to what it was made from."""
    base = checkpoint_of("mixtral")
    kept = moeprune.open_checkpoint(base).num_experts // 2
    dropped = moeprune.apply(base, plan_by_hand(base, kept), tmp_path / "dropped")
    common: dict[str, Any] = {"calibration": str(ids_file), "method": "experts", "steps": 8}
    with pytest.raises(ConfigError, match="cannot be told which was made from which"):
        moeprune.heal(base, dropped, tmp_path / "out", **common)
    assert not (tmp_path / "out").exists()
    both = moeprune.sparsify(dropped, output=tmp_path / "both", sparsity=0.5, calibration=str(ids_file)).output
    assert moeprune.heal(dropped, both, tmp_path / "out", **common).healed


def test_a_memory_forecast_counts_both_layers(checkpoint_of: CheckpointOf, ids_file: Path, tmp_path: Path) -> None:
    """A dry run forecasts more than fitting a layer alone takes, and writes nothing."""
    base = checkpoint_of("mixtral", hidden_size=128, intermediate_size=512)
    sparse = moeprune.sparsify(base, output=tmp_path / "sparse", sparsity=0.5, calibration=str(ids_file)).output
    forecasts = [
        moeprune.heal(base, sparse, tmp_path / "out", method=method, calibration=str(ids_file), dry_run=True).forecast
        for method in ("layerwise", "experts")
    ]
    assert forecasts[0] is not None
    assert forecasts[1] is not None
    assert forecasts[1].host >= forecasts[0].host + forecasts[0].layer
    assert not (tmp_path / "out").exists()
