"""Experts that share fused ones: the arithmetic against a loop, what is written, and what loads it again."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import moeprune
from moeprune import cli
from moeprune.architectures import ExpertName, StackedName, resolve_architecture
from moeprune.checkpoint import read_tensors
from moeprune.errors import ArtifactError, CheckpointError, ConfigError, PlanError, UnsupportedModelError
from moeprune.experts import expert_layers
from moeprune.healing.multiplexed import Recipe, Seen, groups_of, start_of, train
from moeprune.multiplexing import MultiplexResult
from moeprune.plans_multiplex import MultiplexLayer, MultiplexPlan
from moeprune.rewrite.changed import Changes
from moeprune.runtime.multiplexed import SIDE, multiplexed

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CheckpointOf = Callable[..., Path]
ModelOf = Callable[..., "PreTrainedModel"]
SMALL: dict[str, Any] = {"keep": 4, "rank": 2, "steps": 16, "batch_tokens": 200}


def logits_of(model: PreTrainedModel) -> torch.Tensor:
    """Logits of a few fixed tokens."""
    ids = torch.randint(0, 97, (2, 24), generator=torch.Generator().manual_seed(11))
    with torch.inference_mode():
        return model(ids).logits


def tree(folder: Path) -> dict[str, bytes]:
    """Every file of a folder, byte for byte."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def small(base: Path, out: Path, ids_file: Path, **options: Any) -> MultiplexResult:
    """Multiplex on the test's rows."""
    return moeprune.multiplex(base, out, calibration=str(ids_file), **SMALL | options)


def rows_of(tokens: int) -> torch.Tensor:
    """Inputs of random numbers."""
    return torch.randn(tokens, 32, generator=torch.Generator().manual_seed(3))


def routed(tokens: int, experts: int, top_k: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Which experts tokens go to, and with what weights."""
    rng = torch.Generator().manual_seed(seed)
    index = torch.stack([torch.randperm(experts, generator=rng)[:top_k] for _ in range(tokens)])
    return index, torch.rand((tokens, top_k), generator=rng)


def random_side(experts: Any, rank: int) -> dict[str, torch.Tensor]:
    """Residuals and shifts of random numbers."""
    count, hidden, inner = experts.down_proj.shape
    rng = torch.Generator().manual_seed(5)
    shapes = [(count, rank, hidden), (count, 2 * inner, rank), (count, rank, inner), (count, hidden, rank)]
    return {
        name: torch.randn(shape, generator=rng) for name, shape in zip(SIDE, [*shapes, (count, hidden)], strict=True)
    }


# --- arithmetic -------------------------------------------------------------------------------------------------------


def by_hand(
    experts: Any,
    groups: Sequence[Sequence[int]],
    side: dict[str, torch.Tensor],
    x: torch.Tensor,
    gates: dict[int, float],
) -> torch.Tensor:
    """What the fused experts give for one token, slot by slot and member by member."""
    total = torch.zeros_like(x)
    for number, group in enumerate(groups):
        own = [member for member in group if member in gates]
        if not own:
            continue
        shares = torch.tensor([gates[member] for member in own]).softmax(dim=0)
        pairs = list(zip(own, shares, strict=True))
        y = x + sum(share * side["shift"][member] for member, share in pairs)
        both = experts.gate_up_proj[number] @ y + sum(
            share * side["gate_up_out"][member] @ (side["gate_up_in"][member] @ y) for member, share in pairs
        )
        gate, up = both.chunk(2)
        inner = torch.nn.functional.silu(gate) * up
        down = experts.down_proj[number] @ inner + sum(
            share * side["down_out"][member] @ (side["down_in"][member] @ inner) for member, share in pairs
        )
        total += sum(gates[member] for member in own) * down
    return total


@torch.no_grad()
def test_the_module_is_a_loop_over_tokens_and_members(model_of: ModelOf) -> None:
    """Shares, shifts, residuals and the sum of the gates, for one member of a group and for several."""
    experts: Any = expert_layers(model_of("qwen3_moe"))[0].experts
    groups, side = [[0, 3, 5, 9], [1, 2], [4, 6, 7, 8, 10, 11, 12, 13, 14], [15]], random_side(experts, 3)
    module = multiplexed(experts, groups, side)
    hidden, (index, gates) = rows_of(20), routed(20, 16, 3)
    found = module(hidden, index, gates)
    for token in range(20):
        given = dict(zip(index[token].tolist(), gates[token].tolist(), strict=True))
        torch.testing.assert_close(
            found[token], by_hand(experts, groups, side, hidden[token], given), rtol=1e-3, atol=1e-3
        )


@torch.no_grad()
def test_experts_that_nothing_is_fused_with_stay_what_they_are(model_of: ModelOf) -> None:
    """Groups of one, and full residuals of tokens that are sent to one member, give the original's output."""
    experts: Any = expert_layers(model_of("qwen3_moe"))[0].experts
    hidden, (index, gates) = rows_of(30), routed(30, 16, 3)
    expected = experts(hidden, index, gates)
    alone = start_of(experts, [[expert] for expert in range(16)], 1)
    torch.testing.assert_close(alone(hidden, index, gates), expected, rtol=1e-4, atol=1e-4)
    pairs = start_of(experts, [[expert, expert + 8] for expert in range(8)], 32)
    one = index[:, :1]
    torch.testing.assert_close(
        pairs(hidden, one, gates[:, :1]), experts(hidden, one, gates[:, :1]), rtol=1e-3, atol=1e-3
    )


def test_experts_that_fire_together_are_grouped() -> None:
    """Two experts that always come together share a fused one."""
    index = torch.tensor([[0, 3], [1, 2], [0, 3], [2, 1], [4, 5]])
    assert groups_of(index, 6, 3) == ((0, 3), (1, 2), (4, 5))


def test_training_finds_what_can_be_found_and_keeps_the_best(model_of: ModelOf) -> None:
    """The error falls when there is something to learn; a rate that ruins everything leaves the start."""
    experts: Any = expert_layers(model_of("qwen3_moe"))[0].experts
    hidden, (index, gates) = rows_of(600), routed(600, 16, 3)
    groups = groups_of(index, 16, 4)
    truth: Any = start_of(experts, groups, 2)
    with torch.no_grad():
        truth.shift.normal_(0, 0.5, generator=torch.Generator().manual_seed(1))
        seen = Seen(hidden=hidden, index=index, gates=gates, target=truth(hidden, index, gates))
    first, best = train(start_of(experts, groups, 2), seen, Recipe(steps=60, lr=2e-2, step_tokens=256), torch.float32)
    assert best < 0.7 * first
    module = start_of(experts, groups, 2)
    before = {name: value.detach().clone() for name, value in module.named_parameters()}
    first, best = train(module, seen, Recipe(steps=8, lr=1e3, step_tokens=256), torch.float32)
    assert best == first
    assert all(torch.equal(value, before[name]) for name, value in module.named_parameters())


# --- what is written --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model_type", "changes"),
    [("deepseek_v3", {}), ("qwen3_moe", {"stacked": True}), ("mixtral", {}), ("glm4_moe", {"dtype": "bfloat16"})],
)
def test_what_is_written_is_loaded_and_is_the_original_with_other_experts(
    checkpoint_of: CheckpointOf,
    model_of: ModelOf,
    ids_file: Path,
    tmp_path: Path,
    model_type: str,
    changes: dict[str, Any],
) -> None:
    """moeprune.load gives the logits of the original whose experts were exchanged by hand; transformers refuses."""
    from transformers import AutoModelForCausalLM

    base = checkpoint_of(model_type, **changes)
    result = small(base, tmp_path / "out", ids_file)
    reference = copy.deepcopy(model_of(model_type, **changes))
    assert result.plan is not None
    exchange(reference, result.output, result.plan)
    torch.testing.assert_close(logits_of(moeprune.load(result.output)), logits_of(reference), rtol=1e-4, atol=1e-4)
    proof = moeprune.verify(base, result.output)
    assert 0 < proof.computed < proof.tensors
    with pytest.raises(RuntimeError, match="mismatch"):
        AutoModelForCausalLM.from_pretrained(result.output)


def exchange(model: PreTrainedModel, out: Path, plan: MultiplexPlan) -> None:
    """Put the output's fused experts and residuals into a loaded original."""
    spec = resolve_architecture(json.loads((out / "config.json").read_text()))
    stored = {name: value for file in out.glob("*.safetensors") for name, value in load_file(file).items()}
    side = load_file(out / "moeprune" / "multiplex.safetensors")
    for layer in expert_layers(model):
        mine = {name: value for name, value in stored.items() if f"layers.{layer.index}." in name}
        stacks = [value for name, value in mine.items() if name.endswith(("gate_up_proj", "down_proj"))]
        if stacks:
            both = next(value for name, value in mine.items() if name.endswith("gate_up_proj"))
            down = next(value for name, value in mine.items() if name.endswith("experts.down_proj"))
        else:
            experts = [
                [
                    next(value for name, value in mine.items() if f"experts.{number}.{one}." in name)
                    for one in spec.projections
                ]
                for number in range(4)
            ]
            both = torch.stack([torch.cat([gate, up]) for gate, up, _ in experts])
            down = torch.stack([own for _, _, own in experts])
        named = {name: side[f"layers.{layer.index}.{name}"] for name in SIDE}
        module = multiplexed(layer.experts, plan.layers[layer.index].groups, named, gate_up_proj=both, down_proj=down)
        layer.block.experts = module


def test_each_layer_is_to_undo_what_those_before_it_changed(
    checkpoint_of: CheckpointOf, model_of: ModelOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the wanted output in the place of the experts' the last layer would give what the original's gives."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"input_ids": list(range(3, 60))}) + "\n")
    seen: list[Seen] = []

    def noted(module: Any, given: Seen, *options: Any) -> tuple[float, ...]:
        seen.append(given)
        return train(module, given, *options)

    monkeypatch.setattr("moeprune.multiplexing.train", noted)
    base = checkpoint_of("qwen3_moe", mlp_only_layers=[])
    result = moeprune.multiplex(base, tmp_path / "out", calibration=str(rows), **SMALL)
    original, student = model_of("qwen3_moe", mlp_only_layers=[]), moeprune.load(result.output)
    kept: dict[str, torch.Tensor] = {}
    student.model.layers[2].mlp.experts.register_forward_hook(lambda _, __, out: kept.update(experts=out))
    ids = torch.tensor([list(range(3, 60))])
    with torch.inference_mode():
        found = hidden_after_last(student, ids) - kept["experts"] + seen[2].target
        torch.testing.assert_close(found, hidden_after_last(original, ids), rtol=1e-3, atol=1e-3)
    assert not torch.allclose(hidden_after_last(student, ids), hidden_after_last(original, ids), atol=0.1)


def hidden_after_last(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """What the last decoder layer gives for one sequence, [S, H]."""
    found: list[torch.Tensor] = []
    handle = model.model.layers[-1].register_forward_hook(lambda _, __, out: found.append(out))
    with torch.inference_mode():
        model(ids)
    handle.remove()
    return found[0][0]


def test_the_bytes_that_are_told_are_those_of_the_files(
    checkpoint_of: CheckpointOf, ids_file: Path, tmp_path: Path
) -> None:
    """Fused experts and everything in the side file are counted, against all routed experts of the decoder layers."""
    base = checkpoint_of("deepseek_v3")
    result = small(base, tmp_path / "out", ids_file)
    spec = resolve_architecture(json.loads((base / "config.json").read_text()))
    depth = 3

    def experts(folder: Path) -> int:
        tensors, _ = read_tensors(folder)
        return sum(
            entry.nbytes
            for name, entry in tensors.items()
            if isinstance(role := spec.role(name, depth), ExpertName | StackedName) and role.layer < depth
        )

    side = load_file(result.output / "moeprune" / "multiplex.safetensors")
    extra = sum(value.nbytes for value in side.values())
    assert result.expert_bytes == (experts(base), experts(result.output) + extra)
    assert result.plan is not None
    assert all(end <= start for start, end in (layer.loss for layer in result.plan.layers.values()))


def test_a_killed_run_goes_on_to_the_same_bytes(
    checkpoint_of: CheckpointOf, ids_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Layers that were done are not trained again, and the folder has the bytes of a run that was not interrupted."""
    base = checkpoint_of("deepseek_v3")
    whole = small(base, tmp_path / "whole", ids_file)
    add, done = Changes.add, []

    def interrupted(self: Changes, layer: int, *given: Any) -> None:
        if layer == 2 and len(done) == 2:
            raise KeyboardInterrupt
        add(self, layer, *given)
        done.append(layer)

    monkeypatch.setattr(Changes, "add", interrupted)
    with pytest.raises(KeyboardInterrupt):
        small(base, tmp_path / "out", ids_file)
    done.append(-1)
    small(base, tmp_path / "out", ids_file)
    assert done == [0, 1, -1, 2]
    assert tree(tmp_path / "out") == tree(whole.output)


def test_what_was_changed_since_is_found(checkpoint_of: CheckpointOf, ids_file: Path, tmp_path: Path) -> None:
    """A side file, a router or a fused expert that is not what was written is refused by verify."""
    base = checkpoint_of("mixtral")
    out = small(base, tmp_path / "out", ids_file, steps=0).output
    side = out / "moeprune" / "multiplex.safetensors"
    good = side.read_bytes()
    side.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    with pytest.raises(CheckpointError, match=r"multiplex\.safetensors is not"):
        moeprune.verify(base, out)
    side.write_bytes(good[: len(good) // 2])
    with pytest.raises(ArtifactError):
        moeprune.load(out)
    side.write_bytes(good)
    for part in ("block_sparse_moe.gate.weight", "experts.1.w2.weight"):
        forged = shutil.copytree(out, tmp_path / "forged", dirs_exist_ok=True)
        [file] = forged.glob("*.safetensors")
        tensors = load_file(file)
        name = next(name for name in tensors if name.endswith(part))
        tensors[name] += 1
        save_file(tensors, file, metadata={"format": "pt"})
        with pytest.raises(CheckpointError, match=part.rpartition(".")[0]):
            moeprune.verify(base, forged)


def test_a_plan_comes_back_from_its_file_and_is_no_plan_to_apply(checkpoint_of: CheckpointOf, tmp_path: Path) -> None:
    """The record is read as it was written; `apply` says what to run instead."""
    plan = MultiplexPlan(
        layers={0: MultiplexLayer(groups=((0, 2), (1,)), loss=(0.5, 0.25))},
        rank=2,
        expert_bytes=(100, 50),
        side="s",
        command={"stage": "multiplex"},
        inputs={"model": "m"},
    )
    file = plan.save(tmp_path / "plan.json")
    assert MultiplexPlan.load(file) == plan
    assert plan.layers[0].new_numbers == (0, 1, 0)
    with pytest.raises(PlanError, match="multiplex"):
        moeprune.apply(checkpoint_of("mixtral"), file, tmp_path / "out")
    file.write_text(file.read_text().replace("[0, 2]", "[0, 1]"))
    with pytest.raises(ArtifactError, match="every expert once"):
        MultiplexPlan.load(file)


# --- refusals and the command line ------------------------------------------------------------------------------------


def test_what_cannot_work_is_refused(checkpoint_of: CheckpointOf, ids_file: Path, tmp_path: Path) -> None:
    """Nothing to fuse, no data, or experts with biases."""
    base = checkpoint_of("qwen3_moe")
    for options, message in (
        ({"keep": 16}, "nothing to fuse"),
        ({"rank": 0}, "--rank"),
        ({"lr": 0.0}, "--lr"),
        ({"stream": False}, "stream"),
    ):
        with pytest.raises(ConfigError, match=message):
            small(base, tmp_path / "out", ids_file, **options)
    with pytest.raises(ConfigError, match="calibration"):
        moeprune.multiplex(base, tmp_path / "out", keep=4)
    with pytest.raises(UnsupportedModelError, match="plain"):
        small(checkpoint_of("gpt_oss"), tmp_path / "out", ids_file)
    assert not (tmp_path / "out").exists()


def test_the_command_says_what_it_did(
    checkpoint_of: CheckpointOf, ids_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Bytes and the error of every layer on stdout, what runs it on stderr; a dry run writes nothing."""
    base, out = str(checkpoint_of("mixtral")), tmp_path / "out"
    command = ["multiplex", base, "--keep", "2", "--rank", "2", "--steps", "4", "--calibration", str(ids_file)]
    command += ["-o", str(out)]
    assert cli.run([*command, "--dry-run"]) == 0
    assert "nothing was written" in capsys.readouterr().out
    assert not out.exists()
    assert cli.run(command) == 0
    shown = capsys.readouterr()
    assert "layer 2: 2 fused experts, held-out error" in shown.out
    assert "moeprune.load" in shown.err
    assert cli.run([*command, "--overwrite", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["expert_bytes"]["after"] < found["expert_bytes"]["before"]
    assert cli.run(["multiplex", base, "--calibration", str(ids_file), "-o", str(tmp_path / "no")]) == 2
