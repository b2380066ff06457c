"""Down projections by ridge regression: the given ones found again, a stationary point, and healing with it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import moeprune
from moeprune.collectors.weights import weights_of
from moeprune.errors import ConfigError
from moeprune.experts import ExpertLayer, expert_layers
from moeprune.healing.closed_form import DownRegression
from moeprune.rewrite.changed import Changes

TOKENS = 600


def routed(layer: ExpertLayer) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Inputs of the experts, and two of them with gates for each token."""
    generator = torch.Generator().manual_seed(0)
    width = next(weights_of(layer.experts))[1].down.shape[0]
    hidden_NH = torch.randn((TOKENS, width), generator=generator)
    index_NK = torch.rand((TOKENS, layer.num_experts), generator=generator).argsort(dim=1)[:, :2]
    return hidden_NH, index_NK, torch.rand((TOKENS, 2), generator=generator) + 0.2


def output(layer: ExpertLayer, *given: torch.Tensor) -> torch.Tensor:
    """What the experts give."""
    out: torch.Tensor = layer.experts(*given)
    return out


@pytest.mark.parametrize("in_files", [False, True])
@torch.no_grad()
def test_a_perturbed_projection_is_found_again(model_of: Callable[..., Any], tmp_path: Path, in_files: bool) -> None:
    """Nothing but one expert is missing, so that sweeps lead back to it, and the error to nothing."""
    layer = expert_layers(copy.deepcopy(model_of("mixtral")))[0]
    given = routed(layer)
    wanted = output(layer, *given)
    down = dict(weights_of(layer.experts))[1].down
    original = down.clone()
    down += 0.1 * original.norm() / original.numel() ** 0.5 * torch.randn(down.shape, generator=torch.Generator())
    missing = wanted - output(layer, *given)
    regression = DownRegression(layer, TOKENS, folder=tmp_path if in_files else None)
    for part in (slice(0, 200), slice(200, TOKENS)):
        regression.add(*(rows[part] for rows in (*given, missing)))
    for _ in range(40):
        regression.sweep(1e-9)
    assert (wanted - output(layer, *given)).norm() < 1e-3 * missing.norm()
    assert torch.allclose(down, original, atol=1e-3 * float(original.abs().max()))


@torch.no_grad()
def test_the_solution_is_stationary(model_of: Callable[..., Any]) -> None:
    """For a target that nothing reaches, the objective's gradient goes away, pull included; the error has shrunk."""
    layer, ridge = expert_layers(copy.deepcopy(model_of("mixtral")))[0], 0.05
    given = routed(layer)
    experts = dict(weights_of(layer.experts))
    before = {number: expert.down.clone() for number, expert in experts.items()}
    start = output(layer, *given)
    missing = start.std() * torch.randn(start.shape, generator=torch.Generator().manual_seed(1))
    regression = DownRegression(layer, TOKENS)
    regression.add(*given, missing)
    for _ in range(20):
        regression.sweep(ridge)
    left = (missing - (output(layer, *given) - start)).double()
    hidden, index, gates = given
    for number, expert in experts.items():
        tokens, slots = (index == number).nonzero(as_tuple=True)
        inner = (gates[tokens, slots, None] * expert.inner(hidden[tokens])).double()
        pull = ridge * inner.square().sum(dim=0).mean()
        cross = missing[tokens].double().T @ inner
        gradient = left[tokens].T @ inner - pull * (expert.down - before[number]).double()
        assert gradient.norm() < 1e-3 * cross.norm()
    assert left.norm() < missing.double().norm()


@torch.no_grad()
def test_where_nothing_is_missing_bits_stay(model_of: Callable[..., Any]) -> None:
    """And zeros of a pruned projection stay where something is."""
    layer = expert_layers(copy.deepcopy(model_of("mixtral")))[0]
    given = routed(layer)
    down = dict(weights_of(layer.experts))[0].down
    down[:, ::2] = 0
    down[::3, 1] = 0
    before = {name: value.clone() for name, value in layer.experts.named_parameters()}
    for missing in (torch.zeros(given[0].shape), given[0]):
        regression = DownRegression(layer, TOKENS)
        regression.add(*given, missing)
        regression.sweep(0.1)
        same = all(torch.equal(value, before[name]) for name, value in layer.experts.named_parameters())
        assert same == (not missing.any())
        assert torch.equal(down == 0, dict(before)["down_proj"][0] == 0)


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint."""
    return {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}


@pytest.mark.parametrize("model_type", ["deepseek_v3", "qwen3_moe", "gpt_oss", "qwen3_5_moe_text"])
def test_healing_in_closed_form(
    checkpoint_of: Callable[..., Path],
    plan_by_hand: Callable[..., Any],
    ids_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    model_type: str,
) -> None:
    """Closer to the original by down projections alone; a killed run goes on to the same bytes."""
    base = checkpoint_of(model_type)
    kept = moeprune.open_checkpoint(base).num_experts // 2
    dropped = moeprune.apply(base, plan_by_hand(base, kept), tmp_path / "dropped")
    options: dict[str, Any] = {"calibration": str(ids_file), "method": "closed-form"}
    result = moeprune.heal(base, dropped, tmp_path / "out", **options)
    assert result.healed
    assert result.after is not None
    assert result.before is not None
    assert result.after < result.before
    after = tensors_of(result.output)
    changed = {name for name, value in tensors_of(dropped).items() if not torch.equal(value, after[name])}
    assert changed
    assert all("experts" in name and "down_proj" in name and "shared" not in name for name in changed)
    add = Changes.add

    def stop(self: Changes, layer: int, *rest: Any) -> None:
        if layer == 1:
            raise KeyboardInterrupt
        add(self, layer, *rest)

    with monkeypatch.context() as patched:
        patched.setattr(Changes, "add", stop)
        with pytest.raises(KeyboardInterrupt):
            moeprune.heal(base, dropped, tmp_path / "again", **options)
    again = moeprune.heal(base, dropped, tmp_path / "again", **options).output
    for file in result.output.rglob("*.*"):
        assert file.read_bytes() == (again / file.relative_to(result.output)).read_bytes()


def test_gradients_have_no_options_here(tmp_path: Path) -> None:
    """Steps say nothing about a closed form."""
    with pytest.raises(ConfigError, match="--steps does not go with --method closed-form"):
        moeprune.heal("base", "pruned", tmp_path, calibration="data.jsonl", method="closed-form", steps=3)
