"""Experts in another order: the same function, balanced expert-parallel groups, and only bytes of the source."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import moeprune
from moeprune.cli import run
from moeprune.errors import ConfigError, PlanError
from moeprune.experts import expert_layers
from moeprune.runtime.masking import masked

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

CheckpointOf = Callable[..., Path]
ModelOf = Callable[..., "PreTrainedModel"]
TWO_GROUPS = {"n_group": 2, "topk_group": 1}
CASES: list[tuple[str, dict[str, Any], int]] = [
    ("qwen3_moe", {}, 4),
    ("deepseek_v3", TWO_GROUPS, 4),
    ("gpt_oss", {}, 2),
    ("glm4_moe", {}, 2),
]


def logits(model: PreTrainedModel) -> torch.Tensor:
    """Of some tokens."""
    import torch

    ids = torch.randint(0, 97, (4, 24), generator=torch.Generator().manual_seed(11))
    with torch.no_grad():
        found: torch.Tensor = model(ids).logits
    return found


@pytest.mark.parametrize(("model_type", "changes", "groups"), CASES, ids=str)
def test_the_order_does_not_change_the_function(
    model_type: str,
    changes: dict[str, Any],
    groups: int,
    checkpoint_of: CheckpointOf,
    model_of: ModelOf,
    ids_file: Path,
    tmp_path: Path,
) -> None:
    """Stock transformers loads it; it equals the masked original, whose layers hold the same experts in their order."""
    from transformers import AutoModelForCausalLM

    base, model = checkpoint_of(model_type, **changes), model_of(model_type, **changes)
    checkpoint = moeprune.open_checkpoint(base)
    statistics = moeprune.collect(base, calibration=str(ids_file))
    kept = checkpoint.num_experts // 2 + checkpoint.num_experts % 8
    plan = moeprune.plan(statistics, base, keep=kept, rearrange=groups)
    out = moeprune.apply(base, plan, tmp_path / "out")
    moeprune.verify(base, out)
    pruned = AutoModelForCausalLM.from_pretrained(out).eval()
    layers = expert_layers(model)
    with masked(layers, {layer.index: plan.layers[layer.index].keep for layer in layers}):
        expected = logits(model)
    assert float((logits(pruned) - expected).norm() / expected.norm()) < 1e-5
    in_place = moeprune.prune_model(copy.deepcopy(model), plan)
    assert float((logits(in_place) - logits(pruned)).abs().max()) == 0
    saved = moeprune.save_model(in_place, tmp_path / "saved", like=base)
    assert (saved / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()
    assert any(decision.order is not None for decision in plan.layers.values())


def test_the_plan_says_how_well_groups_are_balanced(checkpoint_of: CheckpointOf, ids_file: Path) -> None:
    """Load of the busiest group over the mean, before and after, against the counts; weights of domains count too."""
    base = checkpoint_of("qwen3_moe")
    statistics = moeprune.collect(base, calibration=str(ids_file))
    plan = moeprune.plan(statistics, base, ratio=0.5, rearrange=4, weights={"code": 3.0})
    weights = np.array([3.0 if name == "code" else 1.0 for name in statistics.domains])
    assert plan.balance["groups"] == 4
    for layer, told in plan.balance["layers"].items():
        load = weights @ np.asarray(statistics.layers[int(layer)]["count"])
        decision = plan.layers[int(layer)]
        for when, order in (("before", decision.keep), ("after", decision.placed)):
            sums = load[list(order)].reshape(4, 2).sum(axis=1)
            assert told[when] == pytest.approx(sums.max() / sums.mean(), abs=1e-4)
        assert 1 <= told["after"] <= told["before"]
    assert plan.command["rearrange"] == 4


def test_mtp_layers_follow_the_order_of_the_last(checkpoint_of: CheckpointOf, ids_file: Path, tmp_path: Path) -> None:
    """An MTP layer that takes a keep-list takes its order, and the experts inside a router group stay in it."""
    base = checkpoint_of("deepseek_v3", **TWO_GROUPS)
    plan = moeprune.plan(moeprune.collect(base, calibration=str(ids_file)), base, ratio=0.5, rearrange=4)
    last, mtp = plan.layers[2], plan.layers[3]
    assert (mtp.keep, mtp.order, mtp.copied_from) == (last.keep, last.order, 2)
    for decision in plan.layers.values():
        assert [expert // 8 for expert in decision.placed] == [0] * 4 + [1] * 4
    assert moeprune.PruningPlan.load(plan.save(tmp_path / "plan.json")).layers[2].order == last.order


def test_an_edited_keep_list_needs_its_order(checkpoint_of: CheckpointOf, ids_file: Path, tmp_path: Path) -> None:
    """An order that no longer fits is refused on disk and in memory; without one the list is written as it is."""
    base = checkpoint_of("mixtral")
    plan = moeprune.plan(moeprune.collect(base, calibration=str(ids_file)), base, keep=4, rearrange=2)
    layer = next(number for number, decision in plan.layers.items() if decision.order)
    others = tuple(expert for expert in range(8) if expert not in plan.layers[layer].keep)
    edited = dataclasses.replace(plan.layers[layer], keep=others)
    odd = dataclasses.replace(plan, layers={**plan.layers, layer: edited})
    with pytest.raises(PlanError, match=f"layer {layer}: order does not list the kept experts"):
        moeprune.apply(base, odd, tmp_path / "out")
    plain = dataclasses.replace(plan, layers={**plan.layers, layer: dataclasses.replace(edited, order=None)})
    moeprune.verify(base, moeprune.apply(base, plain, tmp_path / "out"))


@pytest.mark.parametrize(
    ("model_type", "options", "message"),
    [
        ("qwen3_moe", {"keep": 8, "rearrange": 3}, r"8 experts do not divide over --rearrange 3 groups .*keep 6 or 9"),
        ("qwen3_moe", {"keep": 8, "rearrange": 0}, "--rearrange must be at least 1"),
        ("deepseek_v3", {"keep": 12, "rearrange": 6}, "--rearrange 6 does not fit a router of 4 groups"),
        (
            "qwen3_moe",
            {"keep": 8, "rearrange": 2, "budget": "global", "allow_non_uniform": True},
            "--rearrange is for engines",
        ),
        ("qwen3_moe", {"keep": 8, "rearrange": 2, "strategy": "random"}, "--rearrange needs calibration data"),
    ],
)
def test_orders_that_cannot_be_are_refused(
    model_type: str, options: dict[str, Any], message: str, checkpoint_of: CheckpointOf, ids_file: Path
) -> None:
    """Before anything is calibrated, with what would work."""
    rows = () if options.get("strategy") == "random" else str(ids_file)
    with pytest.raises(ConfigError, match=message):
        moeprune.prune(checkpoint_of(model_type), "nowhere", calibration=rows, **options)


def test_the_command_line_tells_it(
    checkpoint_of: CheckpointOf, ids_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`prune --rearrange --budget` from calibration to checkpoint, for people and as JSON."""
    base, out = str(checkpoint_of("qwen3_moe")), tmp_path / "out"
    options = ["--calibration", str(ids_file), "--ratio", "0.5", "--budget", "global", "--rearrange", "2"]
    assert run(["prune", base, "-o", str(out), *options]) == 0
    told = capsys.readouterr()
    assert "load of the busiest of 2 expert-parallel groups over the mean: 1." in told.out
    assert "budget global would keep" in told.err
    assert run(["prune", base, "-o", str(out), *options, "--overwrite", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)["plan"]
    assert plan["balance"]["groups"] == 2
    assert plan["budget"]["realised"] == "uniform"
    assert run(["inspect", str(out)]) == 0
    assert "8 per layer" in capsys.readouterr().out
    free = [*options[:-2], "--allow-non-uniform"]
    assert run(["prune", base, "-o", str(tmp_path / "free"), *free]) == 0
    told = capsys.readouterr()
    span = f"{min(counts := _counts(tmp_path / 'free'))} to {max(counts)}"
    assert f"keep {span} of 16 experts in 2 layers" in told.out
    assert "loads in: transformers\n" in told.out
    assert run(["inspect", str(tmp_path / "free")]) == 0
    assert f"{span} per layer" in capsys.readouterr().out
    assert run(["inspect", str(tmp_path / "free"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["smallest_keep"] is None
    assert run(["collect", str(tmp_path / "free"), "-o", str(tmp_path / "s"), "--calibration", str(ids_file)]) == 2
    assert "have different numbers of experts" in capsys.readouterr().err


def _counts(folder: Path) -> list[int]:
    plan = moeprune.PruningPlan.load(folder / "moeprune/plan.json")
    return sorted(plan.counts.values())
