"""Fusing layer by layer: each layer is decided and fitted on what the fused ones before it give."""

from __future__ import annotations

import dataclasses
import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file

import moeprune
from moeprune import fusing_in_order
from moeprune._commands import command_line
from moeprune.checkpoint import open_checkpoint
from moeprune.cli import run
from moeprune.errors import ConfigError, StrategyError
from moeprune.plans import Budget
from moeprune.plans_fuse import FusePlan
from moeprune.rewrite.changed import Changes
from moeprune.statistics import LayerStatistics
from moeprune.strategies import BUILTIN
from moeprune.strategies.fusion import find_grouping, group_experts

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CheckpointOf = Callable[..., Path]
# One of each way to lay out experts, routers and what goes with them.
FAMILIES = ["qwen3_moe", "glm4_moe", "deepseek_v3", "mixtral", "minimax_m2", "ernie4_5_moe", "qwen3_5_moe"]


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint."""
    return {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}


def tree(folder: Path) -> dict[str, bytes]:
    """Every file of a folder, byte for byte."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def fused(base: Path, out: Path, ids_file: Path, **options: Any) -> FusePlan:
    """Fuse half of the experts layer by layer on the test's rows; the plan that came of it."""
    amount = {} if options.keys() & {"ratio", "keep"} else {"ratio": 0.5}
    result = moeprune.fuse(base, out, calibration=str(ids_file), sequential=True, **amount, **options)
    assert result.plan is not None
    assert result.verification is not None
    return result.plan


def layers_of(model: PreTrainedModel) -> torch.nn.ModuleList:
    """The decoder layers of a text model, or of the text model inside of another."""
    return next(
        module
        for name, module in model.named_modules()
        if name.endswith("layers") and isinstance(module, torch.nn.ModuleList)
    )


def original(base: Path) -> PreTrainedModel:
    """The original in stock transformers, without the name of its folder: a layer of it will be another's."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base).eval()
    model.config._name_or_path = ""
    return model


def run_with_first_fused(model: PreTrainedModel, out: Path, first: int, file: Path) -> None:
    """Run the original row after row, with the fused checkpoint's own layer in the place of its first MoE layer."""
    layers_of(model)[first] = layers_of(moeprune.load(out))[first]
    with torch.inference_mode():
        for line in file.read_text().splitlines():
            model(torch.tensor([json.loads(line)["input_ids"]]))


@pytest.fixture
def grouped(monkeypatch: pytest.MonkeyPatch) -> dict[int, LayerStatistics]:
    """The statistics that each layer was grouped by, by layer."""
    seen, group = {}, fusing_in_order.group_layer

    def watched(checkpoint: Any, stats: LayerStatistics, *given: Any) -> Any:
        seen[stats.layer] = stats
        return group(checkpoint, stats, *given)

    monkeypatch.setattr(fusing_in_order, "group_layer", watched)
    return seen


# --- against a model whose first layer is fused -----------------------------------------------------------------------


def statistics_behind(base: Path, out: Path, file: Path, needs: tuple[str, ...]) -> LayerStatistics:
    """What the second MoE layer does in the original with only its first one fused, row after row."""
    first, second, *_ = open_checkpoint(base).moe_layers
    model = original(base)
    with moeprune.observe(model, layers=[second], statistics=needs) as observation:
        run_with_first_fused(model, out, first, file)
    return observation.result().layer(second)


@pytest.mark.parametrize("router", ["keep-dominant", "merge-rows", "tied"])
@pytest.mark.parametrize("model_type", FAMILIES)
def test_each_layer_is_grouped_behind_the_fused_ones(
    model_type: str,
    router: str,
    checkpoint_of: CheckpointOf,
    ids_file: Path,
    tmp_path: Path,
    grouped: dict[int, LayerStatistics],
) -> None:
    """The second MoE layer's statistics and groups are those of a slow and direct run, and no longer the original's."""
    base, out = checkpoint_of(model_type), tmp_path / "out"
    plan = fused(base, out, ids_file, grouping="ream", merge="frequency", router=router, batch_tokens=100)
    checkpoint, grouping = open_checkpoint(base), find_grouping("ream")
    second = checkpoint.moe_layers[1]
    slow = statistics_behind(base, out, ids_file, ("gated_output_sum", "logit_gram"))
    for name in grouping.needs:
        found, expected = (torch.from_numpy(getattr(stats, name)) for stats in (grouped[second], slow))
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))
    alone = frozenset(plan.strategy["protected"].get(str(second), ()))
    expected_groups = group_experts(grouping, slow, plan.kept, n_group=checkpoint.n_group, alone=alone)
    assert [group.members for group in plan.layers[second].groups] == [group.members for group in expected_groups]
    original = moeprune.collect(base, calibration=str(ids_file)).layer(second).gated_norm_sum
    assert abs(slow.gated_norm_sum - original).max() > 1e-3 * original.max()


@pytest.mark.parametrize("grouping", ["ream", "hope-total", "hc-smoe", "m-smoe", "easy-ep", "aimer"])
def test_the_first_layer_is_grouped_as_ever(
    grouping: str, checkpoint_of: CheckpointOf, ids_file: Path, tmp_path: Path
) -> None:
    """No fused layer comes before it, whatever the grouping reads; super experts are those of the original."""
    base = checkpoint_of("glm4_moe")
    plan = fused(base, tmp_path / "out", ids_file, grouping=grouping)
    at_once = moeprune.fuse(base, tmp_path / "at-once", ratio=0.5, grouping=grouping, calibration=str(ids_file)).plan
    assert at_once is not None
    first = min(plan.layers)
    assert [group.members for group in plan.layers[first].groups] == [
        one.members for one in at_once.layers[first].groups
    ]
    shares, others = ([group.weights for group in one.layers[first].groups] for one in (plan, at_once))
    assert [pytest.approx(share, rel=1e-4) for share in others] == shares
    assert plan.strategy == at_once.strategy
    named = {(int(layer), expert) for layer, who in plan.strategy["protected"].items() for expert in who}
    single = {(index, one.dominant) for index, layer in plan.layers.items() for one in layer.groups if not one.merged}
    assert named
    assert named <= single
    assert plan.command.items() >= (at_once.command | {"sequential": True}).items()
    assert plan.inputs == at_once.inputs


@pytest.mark.parametrize("stacked", [False, True])
def test_experts_are_fitted_to_what_fused_layers_give(
    stacked: bool, checkpoint_of: CheckpointOf, ids_file: Path, tmp_path: Path
) -> None:
    """A merged expert of the second layer has the down projection of a loop over the tokens behind the fused first."""
    base, out = checkpoint_of("qwen3_moe", stacked=stacked), tmp_path / "out"
    plan = fused(base, out, ids_file, merge="absorb", router="tied", batch_tokens=128)
    first, second = plan.layers
    place = max(plan.layers[second].merged, key=lambda one: len(plan.layers[second].groups[one].members))
    experts = layers_of(moeprune.load(out))[second].mlp.experts
    model, calls = original(base), []
    layers_of(model)[second].mlp.experts.register_forward_hook(lambda _, args, output: calls.append((*args, output)))
    run_with_first_fused(model, out, first, ids_file)
    expected = fit_by_hand(layers_of(model)[second].mlp.experts, calls, plan.layers[second].groups[place].members)
    torch.testing.assert_close(experts.down_proj[place].double(), expected, rtol=1e-3, atol=1e-4)


def fit_by_hand(experts: Any, calls: list[tuple[torch.Tensor, ...]], members: tuple[int, ...]) -> torch.Tensor:
    """The down projection of what absorbs the members behind a tied router, from a loop over tokens in float64."""
    gate_up, down = experts.gate_up_proj.detach().double(), experts.down_proj.detach().double()

    def inner(expert: int, hidden: torch.Tensor) -> torch.Tensor:
        gate, up = (gate_up[expert] @ hidden).chunk(2)
        return torch.nn.functional.silu(gate) * up

    left, right = [], []
    for hidden_TH, index_TK, gates_TK, output_TH in calls:
        for hidden, chosen, gates, output in zip(hidden_TH, index_TK, gates_TK, output_TH, strict=True):
            own = [(int(one), float(gate)) for one, gate in zip(chosen, gates, strict=True) if int(one) in members]
            if own:
                norm = float(output.double().norm())
                left.append(sum(gate for _, gate in own) * inner(members[0], hidden.double()) / norm)
                right.append(sum(gate * (down[one] @ inner(one, hidden.double())) for one, gate in own) / norm)
    rows, wanted = torch.stack(left), torch.stack([torch.as_tensor(row) for row in right])
    gram = rows.T @ rows
    ridge = 0.01 * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)
    return torch.linalg.solve(gram + ridge, rows.T @ wanted + ridge @ down[members[0]].T).T


# --- what is written --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("merge", ["absorb", "slerp"])
@pytest.mark.parametrize("model_type", ["qwen3_moe", "glm4_moe", "deepseek_v3"])
def test_the_output_is_a_stock_checkpoint(
    model_type: str, merge: str, checkpoint_of: CheckpointOf, ids_file: Path, tmp_path: Path
) -> None:
    """Loading finds every tensor, what was not merged is proved to be the source's, and the plan lies beside it."""
    from transformers import AutoModelForCausalLM

    base, out = checkpoint_of(model_type), tmp_path / "out"
    plan = fused(base, out, ids_file, merge=merge)
    model, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["mismatched_keys"]
    with torch.no_grad():
        assert model(torch.arange(1, 20)[None]).logits.isfinite().all()
    assert moeprune.verify(base, out).computed > 0
    assert FusePlan.load(out / "moeprune" / "plan.json").to_dict() == plan.to_dict()
    assert {file.name for file in (out / "moeprune").iterdir()} == {"manifest.json", "plan.json", "provenance.json"}


def test_what_needs_no_data_is_what_apply_makes_of_the_plan(
    checkpoint_of: CheckpointOf, ids_file: Path, tmp_path: Path
) -> None:
    """Groups and shares decide such a merge: the plan, executed as it is, gives the same bytes."""
    base, out = checkpoint_of("deepseek_v3"), tmp_path / "out"
    fused(base, out, ids_file, grouping="ream", merge="frequency")
    moeprune.apply(base, out / "moeprune" / "plan.json", tmp_path / "applied")
    assert tree(tmp_path / "applied") == tree(out)


@pytest.mark.parametrize(("model_type", "router"), [("deepseek_v3", "keep-dominant"), ("qwen3_moe", "tied")])
def test_groups_of_one_change_nothing(
    model_type: str,
    router: str,
    checkpoint_of: CheckpointOf,
    ids_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With as many groups as experts, which no budget gives, every tensor is the source's to the bit."""
    base, out = checkpoint_of(model_type), tmp_path / "out"
    monkeypatch.setattr(Budget, "kept", lambda _, shape: shape.num_experts)
    fused(base, out, ids_file, router=router)
    before, after = tensors_of(base), tensors_of(out)
    assert after.keys() == before.keys()
    assert all(after[name].equal(value) for name, value in before.items())
    assert (out / "config.json").read_bytes() == (base / "config.json").read_bytes()


def test_states_in_files_give_the_same_bytes(checkpoint_of: CheckpointOf, ids_file: Path, tmp_path: Path) -> None:
    """Where memory is too short for hidden states they lie in files, and nothing else changes."""
    base = checkpoint_of("glm4_moe")
    options: dict[str, Any] = {"calibration": str(ids_file), "ratio": 0.5, "sequential": True, "batch_tokens": 64}
    forecast = moeprune.fuse(base, tmp_path / "dry", dry_run=True, memory=1 << 40, **options).forecast
    assert forecast is not None
    assert not forecast.spill
    short = forecast.host - 1
    spilled = moeprune.fuse(base, tmp_path / "dry", dry_run=True, memory=short, **options).forecast
    assert spilled is not None
    assert spilled.spill
    assert not (tmp_path / "dry").exists()
    moeprune.fuse(base, tmp_path / "files", memory=short, **options)
    moeprune.fuse(base, tmp_path / "memory", memory=1 << 40, **options)
    assert tree(tmp_path / "files") == tree(tmp_path / "memory")
    with pytest.raises(ConfigError, match="one layer does not fit in memory, only"):
        moeprune.fuse(base, tmp_path / "no", memory=forecast.host - forecast.states - 20_000, **options)
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["files", "memory"]


@pytest.mark.parametrize("guard", [True, False])
def test_a_killed_run_goes_on_to_the_same_bytes(
    guard: bool, checkpoint_of: CheckpointOf, ids_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Layers that were done are not run again, and the folder has the bytes of a run that was not interrupted."""
    base = checkpoint_of("deepseek_v3")
    fused(base, tmp_path / "whole", ids_file, guard=guard)
    add, done = Changes.add, []

    def interrupted(self: Changes, layer: int, *given: Any) -> None:
        if layer == 2 and len(done) == 2:
            raise KeyboardInterrupt
        add(self, layer, *given)
        done.append(layer)

    monkeypatch.setattr(Changes, "add", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fused(base, tmp_path / "out", ids_file, guard=guard)
    assert not (tmp_path / "out").exists()
    done.append(-1)
    fused(base, tmp_path / "out", ids_file, guard=guard)
    assert done == [0, 1, -1, 2]
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["out", "whole"]


def test_only_the_guard_runs_the_original_before(
    checkpoint_of: CheckpointOf, ids_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without it no layer but the first is seen as it was, and no expert is left alone by name."""
    monkeypatch.setattr(fusing_in_order, "collected", None)
    plan = fused(checkpoint_of("qwen3_moe"), tmp_path / "out", ids_file, guard=False)
    assert not plan.strategy["protected"]
    assert any("very short calibration data" in note for note in plan.notes)
    with pytest.raises(TypeError):
        fused(checkpoint_of("qwen3_moe"), tmp_path / "other", ids_file)


# --- refusals and the command line ------------------------------------------------------------------------------------


def test_what_does_not_go_with_it(
    checkpoint_of: CheckpointOf, ids_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Statistics and plans of the original, a plan alone, no data, no stream; nothing is written."""
    base, out, other = checkpoint_of("qwen3_moe"), tmp_path / "out", tmp_path / "other"
    data = {"calibration": str(ids_file)}
    plan = fused(base, out, ids_file)
    statistics = moeprune.collect(base, statistics=["hope-total", "logit_gram"], **data)
    crossing = dataclasses.replace(
        BUILTIN["reap"], name="crossing", needs=("transition_count", "gated_norm_sum", "count")
    )
    monkeypatch.setitem(BUILTIN, "crossing", crossing)
    for options, message in (
        ({"statistics": statistics, **data}, "--sequential collects the statistics of each layer"),
        ({"plan_only": True, **data}, "--sequential writes its plan with the checkpoint"),
        ({"stream": False, **data}, "--no-stream says otherwise"),
        ({"grouping": "crossing", **data}, "transition_count follows tokens through the original's layers"),
        ({"layers": (0,), **data}, "--sequential fuses all layers"),
        ({}, "there is no calibration data"),
        ({"weights": {"poems": 2.0}, **data}, "poems"),
    ):
        with pytest.raises(ConfigError, match=message):
            moeprune.fuse(base, other, ratio=0.5, sequential=True, **options)
    with pytest.raises(ConfigError, match="a plan says already what is merged"):
        moeprune.fuse(base, other, plan=plan, sequential=True, **data)
    with pytest.raises(ConfigError, match="whose absorb was fitted to what fused layers gave"):
        moeprune.fuse(base, other, plan=plan, **data)
    with pytest.raises(ConfigError, match="made while the layers before are fused"):
        moeprune.plan_fusion(statistics, base, ratio=0.5, sequential=True)
    with pytest.raises(StrategyError, match="unknown grouping"):
        moeprune.fuse(base, other, ratio=0.5, sequential=True, grouping="nearest", **data)
    assert not other.exists()


def test_what_the_command_line_says(
    checkpoint_of: CheckpointOf, ids_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A dry run only forecasts, a plan's own command makes its bytes again, and a refusal is one line and a hint."""
    base, out = str(checkpoint_of("glm4_moe")), tmp_path / "out"
    common = ["fuse", base, "--ratio", "0.5", "--sequential", "--grouping", "ream", "-o", str(out), "-q"]
    data = ["--calibration", str(ids_file)]
    assert run([*common, *data, "--dry-run", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["written"], said["kept"], said["plan"]) == (False, 8, None)
    assert said["forecast"]["read"] > 0
    assert not out.exists()
    assert run([*common, *data]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "ream: merge 16 experts into 8 in 2 layers"
    assert lines[1].endswith("each layer on what the fused ones before it give")
    assert json.loads((out / "moeprune" / "plan.json").read_text())["command"]["sequential"] is True
    again = fused(Path(base), tmp_path / "python", ids_file, grouping="ream", batch_tokens=100, max_length=30)
    words = shlex.split(command_line(again.command, base, *data, "-o", str(tmp_path / "again"), "-q"))
    assert run(words[1:]) == 0
    assert tree(tmp_path / "again") == tree(tmp_path / "python")
    assert run(["verify", base, str(out), "-q"]) == 0
    capsys.readouterr()
    for options, message in (
        ([], "there is no calibration data"),
        ([*data, "--no-stream"], "--no-stream says otherwise"),
        ([*data, "--statistics-file", str(tmp_path / "s.safetensors")], "leave --statistics-file out"),
        ([*data, "--plan-only"], "leave --plan-only out"),
    ):
        assert run([*common, *options, "--overwrite"]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert "hint: " in error
