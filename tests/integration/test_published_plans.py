"""Every strategy from a collection of a real model to a plan."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

import moeprune
from moeprune.cli import run
from moeprune.errors import StrategyError
from moeprune.experts import expert_layers
from moeprune.statistics import RouterStatistics
from moeprune.strategies import BUILTIN

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CheckpointOf = Callable[..., Path]
ModelOf = Callable[..., "PreTrainedModel"]
FAMILIES = ["qwen3_moe", "glm4_moe", "deepseek_v3", "gpt_oss"]
Collected = Callable[[str], RouterStatistics]


@pytest.fixture(scope="module")
def collected(checkpoint_of: CheckpointOf, tmp_path_factory: pytest.TempPathFactory) -> Collected:
    """Everything that can be measured, of two domains, once per architecture."""
    rng = np.random.default_rng(3)
    data = tmp_path_factory.mktemp("data") / "rows.jsonl"
    rows = [rng.integers(0, 97, int(length)).tolist() for length in rng.integers(8, 40, 16)]
    lines = (json.dumps({"input_ids": row, "domain": "ab"[number % 2]}) for number, row in enumerate(rows))
    data.write_text("\n".join(lines))
    made: dict[str, RouterStatistics] = {}

    def collect(model_type: str) -> RouterStatistics:
        if model_type not in made:
            made[model_type] = moeprune.collect(
                checkpoint_of(model_type), calibration=str(data), statistics=("all",), device="cpu"
            )
        return made[model_type]

    return collect


@pytest.mark.parametrize("model_type", FAMILIES)
@pytest.mark.parametrize("name", [name for name, strategy in BUILTIN.items() if not strategy.search])
def test_every_strategy_plans_from_one_collection(
    name: str, model_type: str, checkpoint_of: CheckpointOf, collected: Collected
) -> None:
    """Of two domains and with any of the ways to treat them."""
    for options in ({}, {"weights": {"a": 2.0, "b": 0.0}}, {"blend": "maxmin"}, {"protect_top": 1}):
        plan = moeprune.plan(
            collected(model_type), checkpoint_of(model_type), ratio=0.5, strategy=name, guard=False, **options
        )
        assert {len(layer.keep) for layer in plan.layers.values()} == {plan.kept}
        assert plan.strategy["name"] == name
        assert bool(plan.stability) is BUILTIN[name].calibrated


@pytest.mark.parametrize("model_type", FAMILIES)
def test_aimer_is_of_the_weights_that_the_model_runs(
    model_type: str, checkpoint_of: CheckpointOf, model_of: ModelOf, collected: Collected
) -> None:
    """Rms over mean absolute value of everything that an expert multiplies by, from the loaded model's parameters."""
    plan = moeprune.plan(collected(model_type), checkpoint_of(model_type), ratio=0.5, strategy="aimer", guard=False)
    for layer in expert_layers(model_of(model_type)):
        weights = [tensor for name, tensor in layer.experts.named_parameters() if "bias" not in name]
        flat = np.concatenate([tensor.detach().numpy().reshape(layer.num_experts, -1) for tensor in weights], axis=1)
        flat = flat.astype(np.float64)
        scores = np.sqrt((flat**2).mean(axis=1)) / np.abs(flat).mean(axis=1)
        np.testing.assert_allclose(np.array(plan.layers[layer.index].scores), scores, rtol=1e-5)


def test_the_command_line_treats_domains_and_lists_needs(
    checkpoint_of: CheckpointOf, collected: Collected, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What the options ask for is in the plan, and the list of strategies says what each needs and takes."""
    file, plan_file = tmp_path / "statistics.safetensors", tmp_path / "plan.json"
    collected("qwen3_moe").save(file)
    options = [
        "--ratio",
        "0.5",
        "--strategy",
        "easy-ep",
        "--blend",
        "maxmin",
        "--protect-top",
        "2",
        "-o",
        str(plan_file),
    ]
    assert run(["plan", str(file), str(checkpoint_of("qwen3_moe")), *options, "--no-guard"]) == 0
    plan = moeprune.PruningPlan.load(plan_file)
    assert (plan.command["blend"], plan.command["protect_top"]) == ("maxmin", 2)
    assert all(2 <= len(who) <= 4 for who in plan.strategy["protected"].values())
    capsys.readouterr()
    assert run(["strategies", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert listed["easy-ep"]["needs"] == ["easy_ep_sum"]
    assert all(item["cost"] for item in listed.values())
    assert run(["strategies"]) == 0
    assert "every expert on every token" in capsys.readouterr().out


def test_a_search_needs_the_model(checkpoint_of: CheckpointOf, collected: Collected) -> None:
    """Statistics alone do not do, and the hint says what does."""
    with pytest.raises(StrategyError, match=r"strategy 'naee' runs the model .*moeprune prune"):
        moeprune.plan(collected("qwen3_moe"), checkpoint_of("qwen3_moe"), ratio=0.5, strategy="naee")


@pytest.mark.parametrize("name", ["naee", "naee-progressive"])
@pytest.mark.parametrize("model_type", ["qwen3_moe", "deepseek_v3"])
def test_naee_is_at_least_as_near_as_what_it_starts_from(
    name: str, model_type: str, checkpoint_of: CheckpointOf, ids_file: Path, tmp_path: Path
) -> None:
    """In every layer, with protected experts, whether the model runs whole or layer by layer; MTP layers follow."""
    protect = {2: frozenset({5})}
    plans = [
        moeprune.prune(
            checkpoint_of(model_type),
            tmp_path / str(stream),
            ratio=0.5,
            calibration=str(ids_file),
            strategy=name,
            stream=stream,
            guard=False,
            protect=protect,
            device="cpu",
        ).plan
        for stream in (False, True)
    ]
    assert plans[0].layers == plans[1].layers
    found = plans[0].strategy["search"]
    assert {int(layer) for layer in found} == {
        layer for layer, decision in plans[0].layers.items() if decision.copied_from is None
    }
    assert all(0 < one["loss"] <= one["start_loss"] for one in found.values())
    assert any(one["loss"] < one["start_loss"] for one in found.values())
    assert 5 in plans[0].layers[2].keep
    assert not plans[0].stability
