"""Fused checkpoints: what is in them, what they compute, and how they come about."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import moeprune
import moeprune.rewrite.fuse
from moeprune.checkpoint import open_checkpoint
from moeprune.cli import run
from moeprune.errors import (
    CheckpointError,
    ConfigError,
    PlanError,
    StaleArtifactError,
    UnsupportedModelError,
)
from moeprune.planner_fuse import derive_fusion
from moeprune.plans_fuse import FuseLayer, FusePlan, Group

if TYPE_CHECKING:
    import torch

CheckpointOf = Callable[..., Path]
Tensors = dict[str, "torch.Tensor"]
# One of each way to lay out experts, routers and what goes with them.
FAMILIES = ["qwen3_moe", "glm4_moe", "deepseek_v3", "mixtral", "minimax_m2", "ernie4_5_moe", "qwen3_5_moe"]


def plan_by_hand(folder: Path, keep: int, *, seed: int = 0, **changes: Any) -> FusePlan:
    """Groups of random members and shares in every layer, inside router groups, some of them of one."""
    checkpoint, rng = open_checkpoint(folder), np.random.default_rng(seed)

    def group(members: list[int]) -> Group:
        dominant, *others = members
        shares = rng.uniform(0.2, 1, len(members))
        return Group(members=(dominant, *sorted(others)), weights=tuple((shares / shares.sum()).tolist()))

    def layer() -> FuseLayer:
        groups = []
        for block in np.arange(checkpoint.num_experts).reshape(checkpoint.n_group, -1):
            order, count = rng.permutation(block).tolist(), keep // checkpoint.n_group
            cuts = [order[place : place + 1] for place in range(count)]
            for place, member in enumerate(order[count:]):
                cuts[place // 2 % count].append(member)
            groups += [group(members) for members in cuts]
        return FuseLayer(groups=tuple(sorted(groups, key=lambda one: one.dominant)))

    values: dict[str, Any] = {
        "layers": {index: layer() for index in checkpoint.moe_layers},
        "merge": "frequency",
        "align": False,
        "router": "keep-dominant",
        "mtp_layers": checkpoint.mtp_layers,
        "command": {"stage": "by hand"},
        "inputs": {"model": checkpoint.fingerprint},
    }
    return FusePlan(**values | changes)


def kept(folder: Path) -> int:
    """How many experts the tests leave: half, in whole router groups."""
    return open_checkpoint(folder).num_experts // 2


def tensors_of(folder: Path) -> Tensors:
    """All tensors by name."""
    from safetensors.torch import load_file

    return {name: value for file in sorted(folder.glob("*.safetensors")) for name, value in load_file(file).items()}


def files_of(folder: Path) -> dict[str, bytes]:
    """All files of a folder."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def by_hand(folder: Path, plan: FusePlan) -> Tensors:
    """What the output should hold, from whole tensors, without alignment."""
    import torch

    checkpoint, source = open_checkpoint(folder), tensors_of(folder)
    expected: Tensors = {}
    for name, value in source.items():
        role = checkpoint.roles[name]
        layer = plan.layers.get(role.layer)
        if role.layer in checkpoint.mtp_layers:
            if role.layer not in plan.mtp_layers:
                continue
            last = plan.layers[max(plan.layers)]
            layer = FuseLayer(groups=tuple(Group(members=(one,), weights=(1.0,)) for one in last.keep))
        if layer is None or not (hasattr(role, "axis") or hasattr(role, "expert")):
            expected[name] = value
            continue
        if hasattr(role, "expert"):
            for place, group in enumerate(layer.groups):
                if role.expert == group.dominant:
                    others = [source[role.renumbered(member)].double() for member in group.members]
                    total = sum(share * other for share, other in zip(group.weights, others, strict=True))
                    expected[role.renumbered(place)] = torch.as_tensor(total).to(value.dtype)
            continue
        is_router = type(role).__name__ == "RouterName"
        rows = value.double().movedim(role.axis, 0)
        merged = [
            rows[group.dominant]
            if is_router and plan.router == "keep-dominant"
            else sum(share * rows[member] for share, member in zip(group.weights, group.members, strict=True))
            for group in layer.groups
        ]
        found = torch.stack([torch.as_tensor(row) for row in merged]).movedim(0, role.axis)
        expected[name] = value if is_router and plan.router == "tied" else found.to(value.dtype)
    return expected


def same(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> None:
    """Equal names, dtypes and shapes, and values to the last bit or two."""
    import torch

    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=2e-6 if value.dtype == torch.float32 else 1e-2, atol=1e-7)


def ids(rows: int = 3, length: int = 11) -> torch.Tensor:
    """Random token ids."""
    import torch

    return torch.randint(1, 97, (rows, length), generator=torch.Generator().manual_seed(1))


# --- what is written --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("router", ["keep-dominant", "merge-rows"])
@pytest.mark.parametrize("model_type", FAMILIES)
def test_the_output_is_what_the_plan_says(
    model_type: str, router: str, checkpoint_of: CheckpointOf, loadable: Callable[[Path], Path], tmp_path: Path
) -> None:
    """Merged experts are weighted means, single ones and all else are the source's bytes, and transformers loads it."""
    from transformers import AutoModelForCausalLM

    base = checkpoint_of(model_type)
    plan = plan_by_hand(base, kept(base), router=router)
    moeprune.apply(base, plan, tmp_path / "out", max_shard_size=60_000)
    same(tensors_of(tmp_path / "out"), by_hand(base, plan))
    _, info = AutoModelForCausalLM.from_pretrained(loadable(tmp_path / "out"), output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["mismatched_keys"]
    made = open_checkpoint(tmp_path / "out")
    assert made.num_experts == plan.kept == kept(base)
    proof = moeprune.verify(base, tmp_path / "out")
    assert 0 < proof.computed < proof.tensors == len(made.tensors)
    source, written = tensors_of(base), tensors_of(tmp_path / "out")
    for name, role in open_checkpoint(base).roles.items():
        layer = plan.layers.get(role.layer)
        places = [] if layer is None else [place for place, one in enumerate(layer.groups) if not one.merged]
        if layer is not None and hasattr(role, "expert") and role.expert in places:
            assert written[name].equal(source[role.renumbered(layer.groups[role.expert].dominant)])


def test_experts_stacked_on_disk(checkpoint_of: CheckpointOf, tmp_path: Path) -> None:
    """Of a tensor that holds all experts of a layer, the rows of single ones are the source's to the bit."""
    base = checkpoint_of("qwen3_moe", stacked=True, dtype="bfloat16")
    plan = plan_by_hand(base, 8)
    moeprune.apply(base, plan, tmp_path / "out")
    found, source = tensors_of(tmp_path / "out"), tensors_of(base)
    same(found, by_hand(base, plan))
    for index, layer in plan.layers.items():
        for place, group in enumerate(layer.groups):
            if not group.merged:
                name = f"model.layers.{index}.mlp.experts.down_proj"
                assert found[name][place].equal(source[name][group.dominant])


@pytest.mark.parametrize("mtp", [True, False])
def test_mtp_layers(mtp: bool, checkpoint_of: CheckpointOf, tmp_path: Path) -> None:
    """They keep the experts that are dominant in the last decoder layer, or go with the config's count of them."""
    base = checkpoint_of("glm4_moe")
    plan = plan_by_hand(base, 8) if mtp else plan_by_hand(base, 8, mtp_layers=())
    moeprune.apply(base, plan, tmp_path / "out")
    made = open_checkpoint(tmp_path / "out")
    assert made.mtp_layers == plan.mtp_layers
    assert made.config["num_nextn_predict_layers"] == mtp
    same(tensors_of(tmp_path / "out"), by_hand(base, plan))


@pytest.mark.parametrize("model_type", ["qwen3_moe", "deepseek_v3"])
def test_groups_of_one_change_nothing(model_type: str, checkpoint_of: CheckpointOf, tmp_path: Path) -> None:
    """With as many groups as experts the output is the source, every tensor and every other file bit for bit."""
    base = checkpoint_of(model_type)
    checkpoint = open_checkpoint(base)
    single = FuseLayer(groups=tuple(Group(members=(one,), weights=(1.0,)) for one in range(checkpoint.num_experts)))
    plan = plan_by_hand(base, 8, layers=dict.fromkeys(checkpoint.moe_layers, single))
    moeprune.apply(base, plan, tmp_path / "out")
    source, made = tensors_of(base), tensors_of(tmp_path / "out")
    assert made.keys() == source.keys()
    assert all(made[name].equal(value) for name, value in source.items())
    assert (tmp_path / "out" / "config.json").read_bytes() == (base / "config.json").read_bytes()
    assert moeprune.verify(base, tmp_path / "out").computed == 0


def test_aligned_experts_are_permuted_first(checkpoint_of: CheckpointOf, tmp_path: Path) -> None:
    """A model whose merged experts are permuted copies of their dominant ones loses nothing when they are aligned."""
    import torch
    from safetensors.torch import load_file, save_file

    base = tmp_path / "base"
    shutil.copytree(checkpoint_of("qwen3_moe"), base)
    plan = plan_by_hand(base, 8, align=True)
    source = tensors_of(base)
    names = ("gate_proj", "up_proj", "down_proj")
    for index, layer in plan.layers.items():
        prefix = f"model.layers.{index}.mlp.experts"
        for group in layer.groups:
            for member in group.members[1:]:
                order = torch.randperm(16, generator=torch.Generator().manual_seed(member))
                for name in names:
                    own = source[f"{prefix}.{group.dominant}.{name}.weight"]
                    source[f"{prefix}.{member}.{name}.weight"] = own[:, order] if name == "down_proj" else own[order]
    for file in base.glob("*.safetensors"):
        save_file({name: source[name].contiguous() for name in load_file(file)}, file, metadata={"format": "pt"})
    plan = dataclasses.replace(plan, inputs={"model": open_checkpoint(base).fingerprint})
    moeprune.apply(base, plan, tmp_path / "out")
    dropped = plan_by_hand(base, 8).as_drop()
    moeprune.apply(base, dataclasses.replace(dropped, inputs=plan.inputs), tmp_path / "dropped")
    fused, kept_ones = tensors_of(tmp_path / "out"), tensors_of(tmp_path / "dropped")
    assert all(fused[name].equal(value) for name, value in kept_ones.items())


# --- tied routers -----------------------------------------------------------------------------------------------------


def with_copies(base: Path, target: Path, plan: FusePlan) -> FusePlan:
    """The checkpoint with every member equal to its group's dominant expert, and the plan for it."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(base, target)
    checkpoint, source = open_checkpoint(base), tensors_of(base)
    leader = {
        (index, member): group.dominant
        for index, layer in plan.layers.items()
        for group in layer.groups
        for member in group.members
    }
    for name, role in checkpoint.roles.items():
        if hasattr(role, "expert") and (role.layer, role.expert) in leader:
            source[name] = source[role.renumbered(leader[role.layer, role.expert])].clone()
    for file in target.glob("*.safetensors"):
        save_file({name: source[name] for name in load_file(file)}, file, metadata={"format": "pt"})
    return dataclasses.replace(plan, inputs={"model": open_checkpoint(target).fingerprint})


@pytest.mark.parametrize(
    "model_type", ["qwen3_moe", "glm4_moe", "deepseek_v3", "mixtral", "minimax_m2", "ernie4_5_moe"]
)
def test_a_tied_router_keeps_the_sum_over_merged_copies(
    model_type: str, checkpoint_of: CheckpointOf, tmp_path: Path
) -> None:
    """Where members are copies, the fused model computes the original's logits, also for tokens routed to several."""
    import torch
    from transformers import AutoModelForCausalLM

    base = checkpoint_of(model_type)
    plan = plan_by_hand(base, kept(base), router="tied", align=True, mtp_layers=())
    plan = with_copies(base, tmp_path / "base", plan)
    moeprune.apply(tmp_path / "base", plan, tmp_path / "out")
    assert moeprune.verify(tmp_path / "base", tmp_path / "out").computed
    original, fused = AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval(), moeprune.load(tmp_path / "out")
    with torch.no_grad():
        expected, found = original(ids()).logits, fused(ids()).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    parts = sum(value.numel() for value in fused.parameters()) / sum(value.numel() for value in original.parameters())
    assert parts < 0.9
    stock = dataclasses.replace(plan, router="keep-dominant")
    moeprune.apply(tmp_path / "base", stock, tmp_path / "stock")
    with torch.no_grad():
        other = moeprune.load(tmp_path / "stock")(ids()).logits
    assert (other - expected).abs().max() > 100 * (found - expected).abs().max()


def test_nothing_else_loads_a_tied_router(checkpoint_of: CheckpointOf, tmp_path: Path) -> None:
    """By its shapes transformers refuses it, moeprune by its rows, and the plan says which engines do not take it."""
    from transformers import AutoModelForCausalLM

    base = checkpoint_of("glm4_moe")
    plan = plan_by_hand(base, 8, router="tied", mtp_layers=())
    moeprune.apply(base, plan, tmp_path / "out")
    with pytest.raises(RuntimeError, match="mismatch"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with pytest.raises(UnsupportedModelError, match="stand for several each"):
        moeprune.collect(tmp_path / "out")
    assert all(derive_fusion(open_checkpoint(base), plan).engines.values())
    size = sum(value.nbytes for value in tensors_of(tmp_path / "out").values())
    assert derive_fusion(open_checkpoint(base), plan).size["bytes"]["after"] == size
    with pytest.raises(PlanError, match="nothing could run MTP layers behind a tied router"):
        moeprune.apply(base, dataclasses.replace(plan, mtp_layers=(3,)), tmp_path / "other")


# --- fitted to activations --------------------------------------------------------------------------------------------


def routed_errors(base: Path, fused: Path, file: Path) -> list[float]:
    """Of each layer, how far the tied experts' routed output is from the original's on its inputs, relative to it.

    Each row of the file is run on its own, as the original runs it.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from moeprune.experts import expert_layers

    original = AutoModelForCausalLM.from_pretrained(base).eval()
    seen: dict[int, list[Any]] = {layer.index: [] for layer in expert_layers(original)}
    for layer in expert_layers(original):
        layer.experts.register_forward_hook(lambda _, args, output, at=layer.index: seen[at].append((args, output)))
    tied, errors = moeprune.load(fused), []
    with torch.no_grad():
        for line in file.read_text().splitlines():
            original(torch.tensor([json.loads(line)["input_ids"]]))
        for index, calls in seen.items():
            outputs = [(tied.model.layers[index].mlp.experts(*args), output) for args, output in calls]
            found, wanted = (torch.cat(parts) for parts in zip(*outputs, strict=True))
            errors.append(float(((found - wanted).norm(dim=1) / wanted.norm(dim=1)).square().mean()))
    return errors


@pytest.mark.parametrize("merge", ["absorb", "least-squares"])
@pytest.mark.parametrize("model_type", ["qwen3_moe", "deepseek_v3"])
def test_a_fit_is_closer_than_the_mean(
    model_type: str, merge: str, checkpoint_of: CheckpointOf, ids_file: Path, tmp_path: Path
) -> None:
    """In every layer, the routed output is closer to the original's than with the mean of the experts."""
    base = checkpoint_of(model_type)
    for method, sources in (("frequency", ()), (merge, str(ids_file))):
        plan = plan_by_hand(base, 8, router="tied", merge=method, mtp_layers=())
        moeprune.fuse(base, tmp_path / method, plan=plan, calibration=sources)
    before, after = (routed_errors(base, tmp_path / method, ids_file) for method in ("frequency", merge))
    assert all(one < 0.95 * other for one, other in zip(after, before, strict=True))


def fit_by_hand(base: Path, plan: FusePlan, index: int, place: int, file: Path) -> torch.Tensor:
    """The down projection of one tied expert, from a loop over tokens in float64."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base).eval()
    experts, calls, group = model.model.layers[index].mlp.experts, [], plan.layers[index].groups[place]
    experts.register_forward_hook(lambda _, args, output: calls.append((*args, output)))
    gate_up, down = experts.gate_up_proj.detach().double(), experts.down_proj.detach().double()

    def inner(weight: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        gate, up = (weight @ hidden).chunk(2)
        return torch.nn.functional.silu(gate) * up

    shares = [1.0, *[0.0] * (len(group.members) - 1)] if plan.merge == "absorb" else group.weights
    mixed = [
        sum(share * part[one] for share, one in zip(shares, group.members, strict=True)) for part in (gate_up, down)
    ]
    left, right = [], []
    with torch.no_grad():
        for line in file.read_text().splitlines():
            model(torch.tensor([json.loads(line)["input_ids"]]))
    for hidden_TH, index_TK, gates_TK, output_TH in calls:
        for hidden, chosen, gates, output in zip(hidden_TH, index_TK, gates_TK, output_TH, strict=True):
            own = [
                (int(one), float(gate)) for one, gate in zip(chosen, gates, strict=True) if int(one) in group.members
            ]
            if own:
                wide, norm = hidden.double(), float(output.double().norm())
                wanted = sum(gate * (down[one] @ inner(gate_up[one], wide)) for one, gate in own)
                left.append(sum(gate for _, gate in own) * inner(mixed[0], wide) / norm)
                right.append(torch.as_tensor(wanted) / norm)
    rows, wanted_rows = torch.stack(left), torch.stack(right)
    gram = rows.T @ rows
    ridge = 0.01 * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)
    start = torch.as_tensor(mixed[1])
    return torch.linalg.solve(gram + ridge, rows.T @ wanted_rows + ridge @ start.T).T


@pytest.mark.parametrize("merge", ["absorb", "least-squares"])
def test_a_fit_is_that_of_a_loop(merge: str, checkpoint_of: CheckpointOf, ids_file: Path, tmp_path: Path) -> None:
    """Gates, members, padding, relative errors and the ridge are those of a loop over single tokens."""
    import torch

    base = checkpoint_of("qwen3_moe")
    plan = plan_by_hand(base, 8, router="tied", merge=merge)
    moeprune.fuse(base, tmp_path / "out", plan=plan, calibration=str(ids_file), batch_tokens=128)
    place = max(range(8), key=lambda one: len(plan.layers[2].groups[one].members))
    found = tensors_of(tmp_path / "out")[f"model.layers.2.mlp.experts.{place}.down_proj.weight"]
    expected = fit_by_hand(base, plan, 2, place, ids_file)
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("stacked", [False, True])
def test_absorbing_experts_keep_their_gate_and_up(
    stacked: bool, checkpoint_of: CheckpointOf, ids_file: Path, tmp_path: Path
) -> None:
    """What absorbs others keeps its own gate and up projection to the bit, and only its down projection is computed."""
    base = checkpoint_of("qwen3_moe", stacked=stacked)
    plan = plan_by_hand(base, 8, merge="absorb")
    moeprune.fuse(base, tmp_path / "out", plan=plan, calibration=str(ids_file))
    moeprune.apply(base, plan.as_drop(), tmp_path / "dropped")
    found, dropped = tensors_of(tmp_path / "out"), tensors_of(tmp_path / "dropped")
    changed = {name for name, value in dropped.items() if not found[name].equal(value)}
    stems = {index: f"model.layers.{index}.mlp.experts" for index in plan.layers}
    single = {
        f"{stems[index]}.{place}.down_proj.weight"
        for index, layer in plan.layers.items()
        for place, group in enumerate(layer.groups)
        if group.merged
    }
    assert changed == ({f"{stem}.down_proj" for stem in stems.values()} if stacked else single)
    assert moeprune.verify(base, tmp_path / "out").computed == len(changed)


def test_a_fit_does_not_depend_on_batches(checkpoint_of: CheckpointOf, ids_file: Path, tmp_path: Path) -> None:
    """Padding is no data: one row at a time, or many beside each other, give the same experts."""
    base = checkpoint_of("glm4_moe")
    plan = plan_by_hand(base, 8, merge="least-squares", align=True)
    made = []
    for tokens in (1, 1024):
        moeprune.fuse(base, tmp_path / str(tokens), plan=plan, calibration=str(ids_file), batch_tokens=tokens)
        made.append(tensors_of(tmp_path / str(tokens)))
    import torch

    for name, value in made[0].items():
        torch.testing.assert_close(made[1][name], value, rtol=1e-3, atol=1e-4)
    gates = [name for name in made[0] if "gate_proj" in name or "up_proj" in name or "gate." in name]
    assert all(made[0][name].equal(made[1][name]) for name in gates)


# --- how it comes about -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("merge", ["frequency", "least-squares"])
def test_a_killed_run_goes_on(
    merge: str, checkpoint_of: CheckpointOf, ids_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed in the second layer, it does not compute the first one again, and the bytes are those of a whole run."""
    base = checkpoint_of("deepseek_v3")
    plan = plan_by_hand(base, 8, merge=merge)
    options: dict[str, Any] = {"plan": plan, "calibration": str(ids_file) if merge == "least-squares" else ()}
    moeprune.fuse(base, tmp_path / "whole", **options)
    tensors, computed = moeprune.rewrite.fuse.layer_tensors, []

    def die(checkpoint: Any, plan: Any, stored: Any, merged: Any) -> Any:
        if len(computed) == 1:
            computed.append(-1)
            raise KeyboardInterrupt
        computed.append(stored.layer)
        return tensors(checkpoint, plan, stored, merged)

    monkeypatch.setattr(moeprune.rewrite.fuse, "layer_tensors", die)
    with pytest.raises(KeyboardInterrupt):
        moeprune.fuse(base, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()
    moeprune.fuse(base, tmp_path / "out", **options)
    assert computed == [1, -1, 2]
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")
    assert {file.name for file in tmp_path.iterdir()} - {"calibration.jsonl"} == {"whole", "out"}


def test_stages_and_one_run_are_the_same(checkpoint_of: CheckpointOf, ids_file: Path, tmp_path: Path) -> None:
    """From the file of each stage, in Python or on the command line, the bytes are those of one run."""
    base = checkpoint_of("qwen3_moe")
    wanted: dict[str, Any] = {"ratio": 0.5, "grouping": "ream", "merge": "slerp"}
    whole = moeprune.fuse(base, tmp_path / "whole", calibration=str(ids_file), **wanted)
    assert whole.verification is not None
    statistics = tmp_path / "whole" / "moeprune" / "statistics.safetensors"
    assert whole.plan == moeprune.plan_fusion(statistics, base, output=tmp_path / "plan.json", **wanted)
    later = moeprune.plan_fusion(statistics, base, output=tmp_path / "later.json", ratio=0.5, grouping="ream")
    moeprune.fuse(base, tmp_path / "now.json", statistics=statistics, plan_only=True, ratio=0.5, grouping="ream")
    assert later.merge == "absorb"  # which is fitted only when the plan is executed
    assert (tmp_path / "now.json").read_bytes() == (tmp_path / "later.json").read_bytes()
    options = ["--ratio", "0.5", "--grouping", "ream", "--merge", "slerp", "-q"]
    shown = ["--statistics-file", str(statistics), "--plan-only", "-o", str(tmp_path / "other.json")]
    assert run(["fuse", str(base), *options, *shown]) == 0
    assert (tmp_path / "other.json").read_bytes() == (tmp_path / "plan.json").read_bytes()
    assert run(["apply", str(base), str(tmp_path / "plan.json"), "-o", str(tmp_path / "out"), "-q"]) == 0
    first, second = files_of(tmp_path / "whole"), files_of(tmp_path / "out")
    assert first.pop("moeprune/statistics.safetensors")
    assert first == second
    assert run(["verify", str(base), str(tmp_path / "out"), "-q"]) == 0


def test_super_experts_stay_alone(checkpoint_of: CheckpointOf, ids_file: Path) -> None:
    """They are merged with no other unless the guard is off, and the plan names them."""
    base = checkpoint_of("qwen3_moe")
    statistics = moeprune.collect(base, calibration=str(ids_file), statistics="logit_gram")
    plan = moeprune.plan_fusion(statistics, base, keep=8, grouping="m-smoe")
    named = {(int(layer), expert) for layer, who in plan.strategy["protected"].items() for expert in who}
    single = {(index, one.dominant) for index, layer in plan.layers.items() for one in layer.groups if not one.merged}
    assert named
    assert named <= single
    assert not moeprune.plan_fusion(statistics, base, keep=8, grouping="m-smoe", guard=False).strategy["protected"]


def test_what_the_command_line_says(
    checkpoint_of: CheckpointOf, ids_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One JSON object or some lines, a dry run that writes nothing, and one line and a hint for what cannot work."""
    base, out = str(checkpoint_of("qwen3_moe")), tmp_path / "out"
    common = ["fuse", base, "--keep", "8", "--calibration", str(ids_file), "-o", str(out), "-q"]
    assert run([*common, "--dry-run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) | {"forecast": None} == {
        "output": str(out),
        "written": False,
        "kept": 8,
        "of": 16,
        "plan": None,
        "forecast": None,
        "verification": None,
        "report": None,
    }
    assert not out.exists()
    assert run([*common, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["written"]
    assert said["verification"]["computed"] > 0
    assert said["plan"] == json.loads((out / "moeprune" / "plan.json").read_text())
    assert run([*common, "--overwrite"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("merge 16 experts into 8 in 2 layers")
    assert lines[-1] == f"checkpoint: {out}"
    assert "computed ones are as they were written" in lines[-2]
    for options, message in (
        (["--merge", "glue"], "--merge knows no 'glue'"),
        (["--router", "none"], "--router knows no 'none'"),
        (["--grouping", "nearest"], "unknown grouping 'nearest'"),
        (["--plan", str(out / "moeprune" / "plan.json")], "a plan says already what is merged"),
        (["--merge", "absorb", "--align"], "--merge absorb mixes no neurons"),
        ([], "is not empty"),
    ):
        assert run([*common, *options]) == 2
        error = capsys.readouterr().err.splitlines()
        assert message in error[0]
        assert error[1].startswith("hint: ")


# --- what is refused --------------------------------------------------------------------------------------------------


def test_what_cannot_be_fused(checkpoint_of: CheckpointOf, ids_file: Path, tmp_path: Path) -> None:
    """Packed weights, experts with biases, plans of other models, and fits without data; nothing is written."""
    base = checkpoint_of("qwen3_moe")
    packed = tmp_path / "packed"
    shutil.copytree(base, packed)
    method = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    config = json.loads((packed / "config.json").read_text())
    (packed / "config.json").write_text(json.dumps(config | {"quantization_config": method}))
    with pytest.raises(UnsupportedModelError, match="quantised"):
        moeprune.fuse(packed, tmp_path / "out", ratio=0.5, calibration=str(ids_file))
    with pytest.raises(UnsupportedModelError, match="not three matrices without biases"):
        moeprune.fuse(checkpoint_of("gpt_oss"), tmp_path / "out", ratio=0.5, calibration=str(ids_file))
    with pytest.raises(StaleArtifactError, match="another model"):
        moeprune.apply(checkpoint_of("mixtral"), plan_by_hand(base, 8), tmp_path / "out")
    fitted = plan_by_hand(base, 8, merge="least-squares")
    with pytest.raises(PlanError, match="least-squares fits merged experts to activations"):
        moeprune.apply(base, fitted, tmp_path / "out")
    with pytest.raises(ConfigError, match="there is no calibration data"):
        moeprune.fuse(base, tmp_path / "out", plan=fitted)
    with pytest.raises(ConfigError, match="nothing runs the model"):
        moeprune.fuse(base, tmp_path / "out", plan=plan_by_hand(base, 8), calibration=str(ids_file))
    layers = {index: layer for index, layer in plan_by_hand(base, 8).layers.items() if index == 0}
    with pytest.raises(PlanError, match="do not have the same MoE layers"):
        moeprune.apply(base, plan_by_hand(base, 8, layers=layers), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("stacked", [False, True])
def test_verify_finds_what_differs(stacked: bool, checkpoint_of: CheckpointOf, tmp_path: Path) -> None:
    """A byte of a copied tensor, of a merged one and of a single row, and a file that is not the source's."""
    base = checkpoint_of("qwen3_moe", stacked=stacked)
    plan = plan_by_hand(base, 8)
    moeprune.apply(base, plan, tmp_path / "out")
    made = open_checkpoint(tmp_path / "out")
    merged = next(place for place, group in enumerate(plan.layers[0].groups) if group.merged)
    single = next(place for place, group in enumerate(plan.layers[0].groups) if not group.merged)
    stem = "model.layers.0.mlp.experts"
    places = {"model.layers.0.self_attn.q_proj.weight": 0}
    if stacked:
        places[f"{stem}.down_proj"] = made.tensors[f"{stem}.down_proj"].nbytes // 8 * single
    else:
        places |= {f"{stem}.{merged}.up_proj.weight": 0, f"{stem}.{single}.up_proj.weight": 0}
    for name, offset in places.items():
        entry = made.tensors[name]
        whole = entry.file.read_bytes()
        entry.file.write_bytes(
            whole[: entry.begin + offset] + bytes([whole[entry.begin + offset] ^ 1]) + whole[entry.begin + offset + 1 :]
        )
        with pytest.raises(CheckpointError, match=name):
            moeprune.verify(base, tmp_path / "out")
        entry.file.write_bytes(whole)
    moeprune.verify(base, tmp_path / "out")
    if stacked:  # with a manifest that agrees, only the source tells
        entry = made.tensors[f"{stem}.down_proj"]
        whole, at = entry.file.read_bytes(), entry.begin + entry.nbytes // 8 * single
        entry.file.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        _record_again(tmp_path / "out", entry.name)
        with pytest.raises(CheckpointError, match="in an expert that was not merged"):
            moeprune.verify(base, tmp_path / "out")
        entry.file.write_bytes(whole)
        _record_again(tmp_path / "out", entry.name)
    (tmp_path / "out" / "LICENSE").write_text("another\n")
    with pytest.raises(CheckpointError, match="LICENSE"):
        moeprune.verify(base, tmp_path / "out")


def _record_again(folder: Path, name: str) -> None:
    import xxhash

    entry, file = open_checkpoint(folder).tensors[name], folder / "moeprune" / "manifest.json"
    manifest = json.loads(file.read_text())
    manifest["tensors"][name] = xxhash.xxh3_128(entry.file.read_bytes()[entry.begin : entry.end]).hexdigest()
    file.write_text(json.dumps(manifest))


@pytest.mark.parametrize("model_type", ["qwen3_moe", "glm4_moe", "deepseek_v3", "mixtral"])
def test_what_a_router_of_fewer_rows_picks(model_type: str, checkpoint_of: CheckpointOf) -> None:
    """For any inputs, the experts that the pruned model's router picks, by their numbers in the original."""
    import torch
    from transformers import AutoModelForCausalLM

    from moeprune.experts import expert_layers
    from moeprune.runtime.masking import chosen_by_some

    base = checkpoint_of(model_type)
    plan = plan_by_hand(base, kept(base), mtp_layers=())
    model = AutoModelForCausalLM.from_pretrained(base).eval()
    hidden = torch.randn(50, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = {
            layer.index: chosen_by_some(layer, plan.layers[layer.index].keep, hidden) for layer in expert_layers(model)
        }
        moeprune.prune_model(model, plan.as_drop())
        for layer in expert_layers(model):
            seen: list[Any] = []
            layer.experts.register_forward_pre_hook(lambda _, args, into=seen: into.append(args[1]))
            layer.block(hidden[None])
            expected = torch.tensor(plan.layers[layer.index].keep)[seen[0]]
            assert found[layer.index].sort().values.equal(expected.sort().values)


def test_a_router_of_fewer_rows_decides_what_is_fitted(
    checkpoint_of: CheckpointOf, ids_file: Path, tmp_path: Path
) -> None:
    """Its merged experts are fitted to the tokens that it sends there, which are not all that go to their members."""
    base, found = checkpoint_of("deepseek_v3"), {}
    for router in ("tied", "keep-dominant"):
        plan = plan_by_hand(base, 8, merge="absorb", router=router, mtp_layers=())
        moeprune.fuse(base, tmp_path / router, plan=plan, calibration=str(ids_file))
        found[router] = tensors_of(tmp_path / router)
    names = [name for name in found["tied"] if name.endswith("down_proj.weight") and ".experts." in name]
    assert any(not found["tied"][name].equal(found["keep-dominant"][name]) for name in names)
