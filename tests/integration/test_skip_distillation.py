"""Models trained with their gates in the loop: rates that hold, weights that move, and commands that are refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import moeprune
from moeprune import gating
from moeprune.checkpoint import open_checkpoint
from moeprune.cli import app
from moeprune.errors import ConfigError
from moeprune.experts import expert_layers
from moeprune.healing import skip_distillation
from moeprune.healing.distillation import Recipe, Text, distil, held_out_divergence, trainable
from moeprune.healing.skip_distillation import GatedTraining
from moeprune.pipeline import BUNDLED
from moeprune.plans_skip import Renorm, SkipLayer, SkipPlan
from moeprune.rewrite.skip import verify_skip
from moeprune.runtime.loading import needs_loading
from moeprune.runtime.skipping import attach, counted

CheckpointOf = Callable[..., Path]
SHORT = Recipe(steps=8, lr=2e-3, step_tokens=200, checks=4)


def model_at(folder: Path) -> Any:
    """A model of one's own."""
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint."""
    return {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}


def rows(count: int, length: int = 24) -> list[list[int]]:
    """Token sequences."""
    return torch.randint(0, 97, (count, length), generator=torch.Generator().manual_seed(5)).tolist()


def plan_for(model: Any, policy: str = "share", rate: float = 0.4, threshold: float = 0.2) -> SkipPlan:
    """The same threshold everywhere, whatever it skips."""
    layers = expert_layers(model)
    return SkipPlan(
        policy=policy,
        renorm=Renorm(),
        layers={layer.index: SkipLayer(threshold=threshold, rate=rate) for layer in layers},
        target=rate,
        rate=rate,
        top_k=int(layers[0].experts.config.num_experts_per_tok),
        command={},
        inputs={},
    )


@pytest.mark.parametrize(
    ("policy", "rate"), [("share", 0.4), ("share", 0.64), ("ratio", 0.4), ("top-p", 0.4), ("zero-logit", 0.4)]
)
def test_thresholds_settle_on_the_rate(checkpoint_of: CheckpointOf, policy: str, rate: float) -> None:
    """Whatever the unit of the score, every layer comes to skip its share of the text, padding left out."""
    model = model_at(checkpoint_of("qwen3_moe"))
    plan = plan_for(model, policy, rate)
    sequences = [*rows(8, 24), *rows(8, 11)]
    layers = GatedTraining(model, plan).settle(model, sequences, 400)
    assert all(layer.rate == pytest.approx(rate, abs=0.003) for layer in layers.values())
    settled = SkipPlan(
        policy=policy, renorm=Renorm(), layers=layers, target=rate, rate=rate, top_k=3, command={}, inputs={}
    )
    with counted(attach(model, settled)) as counter:
        for ids in sequences:
            model(torch.tensor([ids]))
    assert counter.rate == pytest.approx(rate, abs=0.004)


def test_thresholds_follow_while_the_model_is_trained(checkpoint_of: CheckpointOf) -> None:
    """From a threshold that skips far too much, training comes to the rate by itself."""
    student, teacher = (model_at(checkpoint_of("qwen3_moe")) for _ in range(2))
    gates = GatedTraining(student, plan_for(student, threshold=0.6))
    text = Text(train=rows(32), held_out=rows(4))
    said: list[str] = []
    follow = gates.after_step

    def after_step(step: int, share: float, sums: Any) -> str:
        said.append(follow(step, share, sums))
        return said[-1]

    gates.after_step = after_step  # type: ignore[method-assign]
    recipe = Recipe(steps=20, lr=1e-4, step_tokens=200, checks=1)
    distil(student, teacher, text, recipe, parameters=trainable(student, ["all"]), objective=gates, device="cpu")
    rates = [float(remark.split()[2].rstrip("%")) / 100 for remark in said]
    assert rates[0] > 0.6
    assert rates[-1] == pytest.approx(0.4, abs=0.03)


def test_gradients_flow_through_slots_that_run_and_no_others(checkpoint_of: CheckpointOf) -> None:
    """With every slot but the best skipped, experts that are nobody's best get no gradient."""
    model = model_at(checkpoint_of("qwen3_moe"))
    gates = GatedTraining(model, plan_for(model, threshold=2.0))
    [layer, *_] = expert_layers(model)
    best: list[torch.Tensor] = []
    layer.router.register_forward_hook(lambda _, __, out: best.append(out[2].gather(1, out[1].argmax(-1)[:, None])))
    with gates.running(model):
        model(torch.tensor(rows(1, 6))).logits.sum().backward()
    moved = layer.experts.get_parameter("down_proj").grad.abs().sum((1, 2)) > 0  # type: ignore[union-attr]
    assert set(moved.nonzero()[:, 0].tolist()) == set(best[0][:, 0].tolist())


def test_training_beats_the_same_policy_untrained(tmp_path: Path) -> None:
    """At equal rates the trained model is closer to the original than the same gates on the untrained one."""
    base, out = BUNDLED / "model", tmp_path / "o"
    reading: dict[str, Any] = {"calibration": str(BUNDLED / "calibration.jsonl"), "num_samples": 100, "max_length": 96}
    recipe = Recipe(steps=8, lr=3e-4, step_tokens=1200, checks=2)
    result = gating.skip(base, out, policy="share", distill=recipe, device="cpu", **reading)
    gating.skip(base, tmp_path / "plain", policy="share", device="cpu", **reading)
    plan = result.plan
    assert plan is not None
    assert plan.training["best_step"] > 0
    text = Text.split(moeprune.load_calibration([reading.pop("calibration")], base, **reading))
    teacher, found = moeprune.load(base, dtype="float32"), {}
    for folder in (tmp_path / "plain", out):
        model = moeprune.load(folder, dtype="float32")
        with counted(model) as counter:
            found[folder.name] = held_out_divergence(model, teacher, text.held_out, 4096)
        assert counter.rate == pytest.approx(0.5, abs=0.04)  # of ten sequences; the thresholds are of the others
    assert found["o"] < 0.95 * found["plain"]
    assert found["o"] == pytest.approx(plan.training["held_out_kl"]["after"], rel=0.2)


def test_the_output_is_a_stock_checkpoint_with_a_plan(
    checkpoint_of: CheckpointOf, ids_file: Path, tmp_path: Path
) -> None:
    """Names, shapes and config are the base's; only what was to be trained differs; it is verified by its digests."""
    base, out = checkpoint_of("qwen3_moe"), tmp_path / "o"
    recipe = Recipe(steps=6, lr=3e-3, step_tokens=200, checks=6)
    gating.skip(base, out, policy="share", distill=recipe, train="router", calibration=str(ids_file), device="cpu")
    before, after = tensors_of(base), tensors_of(out)
    assert before.keys() == after.keys()
    moved = {name for name, value in before.items() if not torch.equal(value, after[name])}
    assert moved
    assert all(name.endswith("mlp.gate.weight") for name in moved)
    assert (out / "config.json").read_bytes() == (base / "config.json").read_bytes()
    assert needs_loading(out)
    assert verify_skip(open_checkpoint(base), out).computed == len(after)
    plan = json.loads((out / "moeprune" / "plan.json").read_text())
    assert plan["command"]["distill"] is True
    assert plan["command"]["train"] == ["router"]


def test_a_killed_run_goes_on_to_the_same_bytes(
    checkpoint_of: CheckpointOf, ids_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A command that is stopped while it trains, and given again, writes what it would have written at once."""
    base = checkpoint_of("qwen3_moe")
    options: dict[str, Any] = {"policy": "share", "distill": SHORT, "calibration": str(ids_file), "device": "cpu"}
    gating.skip(base, tmp_path / "whole", **options)
    follow = GatedTraining.after_step

    def stopping(self: GatedTraining, step: int, share: float, sums: Any) -> str:
        if step == 5:
            raise KeyboardInterrupt
        return follow(self, step, share, sums)

    with monkeypatch.context() as patch:
        patch.setattr(skip_distillation.GatedTraining, "after_step", stopping)
        with pytest.raises(KeyboardInterrupt):
            gating.skip(base, tmp_path / "killed", **options)
    assert not (tmp_path / "killed").exists()
    steps: list[int] = []

    def counting(self: GatedTraining, step: int, share: float, sums: Any) -> str:
        steps.append(step)
        return follow(self, step, share, sums)

    monkeypatch.setattr(skip_distillation.GatedTraining, "after_step", counting)
    gating.skip(base, tmp_path / "killed", **options)
    assert steps == [4, 5, 6, 7]
    files = [
        {str(file.relative_to(root)): file.read_bytes() for file in root.rglob("*") if file.is_file()}
        for root in (tmp_path / "whole", tmp_path / "killed")
    ]
    assert files[0] == files[1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["calibration.jsonl", "killed", "whole"]


def test_what_cannot_be_distilled_is_refused(checkpoint_of: CheckpointOf, ids_file: Path, tmp_path: Path) -> None:
    """Plans without gates, plan files, curves and the control."""
    base = checkpoint_of("qwen3_moe")
    options: dict[str, Any] = {"distill": SHORT, "calibration": str(ids_file)}
    with pytest.raises(ConfigError, match="plan file"):
        gating.skip(base, tmp_path / "plan.json", **options)
    with pytest.raises(ConfigError, match="--bake"):
        gating.skip(base, tmp_path / "o", policy="static-k", skip_rate=1 / 3, bake=True, **options)
    with pytest.raises(ConfigError, match="--curve"):
        gating.skip(base, tmp_path / "o", curve=[0.25], heldout=str(ids_file), **options)
    with pytest.raises(ConfigError, match="control"):
        gating.skip(base, tmp_path / "o", policy="random", **options)
    assert not (tmp_path / "o").exists()


def test_the_command_line_trains_and_refuses_options_without_effect(
    checkpoint_of: CheckpointOf, ids_file: Path, tmp_path: Path
) -> None:
    """The command writes the folder and says what training did; its options alone are refused with exit code 2."""
    base, out = str(checkpoint_of("qwen3_moe")), tmp_path / "o"
    words = ["skip", base, "--policy", "share", "--calibration", str(ids_file), "-o", str(out), "--device", "cpu"]
    refused = CliRunner().invoke(app, [*words, "--steps", "3"])
    assert refused.exit_code != 0
    assert "--steps does nothing without --distill" in str(refused.exception)
    assert not out.exists()
    done = CliRunner().invoke(app, [*words, "--distill", "--steps", "3", "--lr", "1e-3", "--json"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["plan"]["training"]["steps"] == 3
    assert found["plan"]["command"]["lr"] == 0.001
