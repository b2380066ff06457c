"""``--strategy auto``: plans by every strategy, scored on selection text, and mixed."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import moeprune
from moeprune.choosing import auto_plan, candidates
from moeprune.errors import ConfigError, StrategyError
from moeprune.evaluation.evaluator import KeepLists, PlanScore, ResidentEvaluator
from moeprune.planner import Decisions
from moeprune.plans import Budget
from moeprune.strategies.rearrange import imbalance

CheckpointOf = Callable[..., Path]
ModelOf = Callable[..., Any]


@pytest.fixture
def selection(tmp_path: Path) -> Path:
    """Rows of token ids that are not those of the calibration."""
    rng = np.random.default_rng(11)
    path = tmp_path / "selection.jsonl"
    rows = [{"input_ids": rng.integers(0, 97, 20).tolist()} for _ in range(6)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def sequences(path: Path) -> list[list[int]]:
    """The token ids of a file."""
    return [json.loads(line)["input_ids"] for line in path.read_text().splitlines()]


def divergence(evaluator: ResidentEvaluator, plan: moeprune.PruningPlan, layers: Sequence[int]) -> float:
    """KL of a plan on the evaluator's text."""
    [score] = evaluator([{layer: plan.layers[layer].keep for layer in layers}])
    return score.agreement.kl.value


@pytest.mark.parametrize("model_type", ["qwen3_moe", "deepseek_v3"])
def test_the_choice_predicts_at_least_as_well_as_every_candidate(
    model_type: str, checkpoint_of: CheckpointOf, model_of: ModelOf, ids_file: Path, selection: Path, tmp_path: Path
) -> None:
    """The plan file tells the table of candidates, and the mix is no farther from the original than any of them."""
    folder = checkpoint_of(model_type)
    statistics = moeprune.collect(folder, tmp_path / "s.st", calibration=str(ids_file))
    plan = moeprune.plan(
        statistics, folder, ratio=0.5, strategy="auto", selection=str(selection), output=tmp_path / "plan.json"
    )
    checkpoint = moeprune.open_checkpoint(folder)
    evaluator = ResidentEvaluator(model_of(model_type), sequences(selection))
    wanted = Decisions(budget=Budget(ratio="0.5"))
    found = {
        name: divergence(evaluator, one, checkpoint.moe_layers)
        for name, one in candidates(checkpoint, statistics, wanted).items()
    }
    chosen = divergence(evaluator, plan, checkpoint.moe_layers)
    assert chosen <= min(found.values()) + 1e-9
    assert plan.strategy["name"] == "auto"
    assert plan.strategy["best"] == min(found, key=found.__getitem__)
    assert plan.strategy["chosen"]["kl"] == pytest.approx(chosen, rel=1e-4)
    assert {name: trial["kl"] for name, trial in plan.strategy["candidates"].items()} == pytest.approx(found, rel=1e-4)
    assert plan.inputs["selection"]
    assert plan.coverage
    assert all(0 < share < 1 for share in plan.coverage.values())
    written = moeprune.apply(folder, moeprune.PruningPlan.load(tmp_path / "plan.json"), tmp_path / "out")
    assert moeprune.verify(folder, written).tensors


def test_prune_chooses_in_one_go(checkpoint_of: CheckpointOf, ids_file: Path, selection: Path, tmp_path: Path) -> None:
    """The one-shot run collects, chooses and writes; MTP layers follow the last layer's mixed keep-list."""
    folder = checkpoint_of("glm4_moe")
    options: dict[str, Any] = {"calibration": str(ids_file), "selection": str(selection), "ratio": 0.5}
    result = moeprune.prune(folder, tmp_path / "out", strategy="auto", **options)
    depth = max(moeprune.open_checkpoint(folder).moe_layers)
    assert result.plan.layers[depth + 1].keep == result.plan.layers[depth].keep
    assert result.plan.layers[depth + 1].copied_from == depth
    assert result.plan.strategy["finished"] is True
    assert {"easy-ep", "seer"} <= result.plan.strategy["candidates"].keys()


def test_a_mix_is_rearranged_like_any_plan(
    checkpoint_of: CheckpointOf, ids_file: Path, selection: Path, tmp_path: Path
) -> None:
    """Expert-parallel groups are balanced over the experts that the mix keeps, MTP layers included."""
    folder = checkpoint_of("glm4_moe")
    statistics = moeprune.collect(folder, tmp_path / "s.st", calibration=str(ids_file))
    options: dict[str, Any] = {"ratio": 0.5, "strategy": "auto", "selection": str(selection)}
    plain = moeprune.plan(statistics, folder, **options)
    spread = moeprune.plan(statistics, folder, rearrange=2, **options)
    assert {layer: one.keep for layer, one in spread.layers.items()} == {
        layer: one.keep for layer, one in plain.layers.items()
    }
    for layer, decision in spread.layers.items():
        order = decision.order or decision.keep
        assert sorted(order) == list(decision.keep)
        load = statistics.layer(decision.copied_from or layer).count
        assert imbalance(load, order, 2) <= imbalance(load, decision.keep, 2)
    assert spread.balance["groups"] == 2
    assert any(decision.order for decision in spread.layers.values())


def test_calibration_text_is_no_selection_text(checkpoint_of: CheckpointOf, ids_file: Path, tmp_path: Path) -> None:
    """To choose on what was calibrated on is refused."""
    with pytest.raises(ConfigError, match="are calibration data too"):
        moeprune.prune(
            checkpoint_of("qwen3_moe"),
            tmp_path / "out",
            ratio=0.5,
            strategy="auto",
            calibration=str(ids_file),
            selection=str(ids_file),
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strategy": "auto"}, "--strategy auto scores plans on a text of its own"),
        ({"strategy": "auto", "allow_non_uniform": True, "budget": "laep", "selection": "yes"}, "cannot be combined"),
        ({"strategy": "auto", "budget": "evolve", "selection": "yes"}, "both search"),
        ({"strategy": "reap", "selection": "yes"}, "for what searches"),
    ],
)
def test_what_cannot_be_combined_is_refused(
    options: dict[str, Any],
    message: str,
    checkpoint_of: CheckpointOf,
    ids_file: Path,
    selection: Path,
    tmp_path: Path,
) -> None:
    """Options that would do nothing, or that contradict each other, are errors."""
    folder = checkpoint_of("qwen3_moe")
    statistics = moeprune.collect(folder, tmp_path / "s.st", calibration=str(ids_file))
    given = options | ({"selection": str(selection)} if "selection" in options else {})
    with pytest.raises(ConfigError, match=message):
        moeprune.plan(statistics, folder, ratio=0.5, **given)


def test_an_interrupt_leaves_the_best_plan_so_far(
    checkpoint_of: CheckpointOf, model_of: ModelOf, ids_file: Path, selection: Path, tmp_path: Path
) -> None:
    """Once the candidates were scored, Ctrl-C gives the best of them and says that it is not finished."""
    folder = checkpoint_of("qwen3_moe")
    checkpoint = moeprune.open_checkpoint(folder)
    statistics = moeprune.collect(folder, tmp_path / "s.st", calibration=str(ids_file))
    inner = ResidentEvaluator(model_of("qwen3_moe"), sequences(selection))
    calls = []

    def impatient(keeps: Sequence[KeepLists]) -> list[PlanScore]:
        calls.append(len(keeps))
        if len(calls) > 1:
            raise KeyboardInterrupt
        return inner(keeps)

    plan = auto_plan(checkpoint, statistics, Decisions(budget=Budget(ratio="0.5")), impatient)
    assert len(calls) == 2
    assert plan.strategy["finished"] is False
    best = candidates(checkpoint, statistics, Decisions(budget=Budget(ratio="0.5")))[plan.strategy["best"]]
    assert [plan.layers[layer].keep for layer in plan.layers] == [best.layers[layer].keep for layer in plan.layers]


def test_statistics_of_no_data_serve_no_choice(checkpoint_of: CheckpointOf, model_of: ModelOf, selection: Path) -> None:
    """Without statistics that a strategy reads there is nothing to choose from."""
    checkpoint = moeprune.open_checkpoint(checkpoint_of("qwen3_moe"))
    nothing = moeprune.RouterStatistics.empty(
        checkpoint.moe_layers,
        num_experts=checkpoint.num_experts,
        top_k=checkpoint.top_k,
        model=checkpoint.fingerprint,
    )
    evaluator = ResidentEvaluator(model_of("qwen3_moe"), sequences(selection))
    with pytest.raises(StrategyError, match="serve no strategy"):
        auto_plan(checkpoint, nothing, Decisions(budget=Budget(ratio="0.5"), guard=False), evaluator)
