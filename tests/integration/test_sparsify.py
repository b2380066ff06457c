"""Weights and neurons taken out of experts: against a model that is masked in memory, on every architecture."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from safetensors.torch import load_file, save_file

import moeprune
from moeprune import cli
from moeprune.architectures import ARCHITECTURES
from moeprune.checkpoint import open_checkpoint
from moeprune.errors import CheckpointError, ConfigError, StaleArtifactError, StrategyError, UnsupportedModelError
from moeprune.plans_sparsify import SparsifyPlan
from moeprune.rewrite.changed import Changes
from moeprune.rewrite.stored import shared_expert, stored_experts
from moeprune.sparsifying import NEEDS, SparsifyResult
from moeprune.strategies.sparsity import (
    best_neurons,
    lowest_of_groups,
    lowest_of_rows,
    neuron_scores,
    weight_scores,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CheckpointOf = Callable[..., Path]
ModelOf = Callable[..., "PreTrainedModel"]
SCORES = hnp.arrays(
    np.float32, hnp.array_shapes(min_dims=2, max_dims=2, max_side=12), elements=st.floats(0, 8, width=16)
)


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint."""
    return {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}


def tree(folder: Path) -> dict[str, bytes]:
    """Every file of a folder, byte for byte."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def logits_of(model: PreTrainedModel) -> torch.Tensor:
    """Logits of a few fixed tokens."""
    ids = torch.randint(0, 97, (2, 24), generator=torch.Generator().manual_seed(11))
    with torch.inference_mode():
        return model(ids).logits


def loaded(folder: Path) -> PreTrainedModel:
    """A checkpoint in stock transformers, which must find every tensor that it wants and no other."""
    from transformers import AutoModelForCausalLM

    model, found = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not found["missing_keys"]
    assert not found["mismatched_keys"]
    return model.eval()


def sparse(base: Path, out: Path, ids_file: Path, **options: Any) -> SparsifyResult:
    """Sparsify on the test's rows."""
    return moeprune.sparsify(base, out, calibration=str(ids_file), **options)


# --- what is lowest ---------------------------------------------------------------------------------------------------


@given(scores=SCORES, share=st.floats(0, 1))
def test_exactly_the_lowest_of_every_row_go(scores: np.ndarray[Any, Any], share: float) -> None:
    """As many as asked for, and none that stays is lower than one that goes."""
    count = int(share * scores.shape[1])
    gone = lowest_of_rows(torch.from_numpy(scores), count).numpy()
    assert (gone.sum(axis=1) == count).all()
    for row, mask in zip(scores, gone, strict=True):
        assert max(row[mask], default=0) <= min(row[~mask], default=np.inf)


@given(scores=SCORES, m=st.integers(2, 8), data=st.data())
def test_n_of_every_m_stay(scores: np.ndarray[Any, Any], m: int, data: st.DataObject) -> None:
    """Every group of M neighbours keeps N, its best ones."""
    n = data.draw(st.integers(1, m - 1))
    wide = np.repeat(scores, m, axis=1) + np.arange(scores.shape[1] * m, dtype=np.float32) % 3
    gone = lowest_of_groups(torch.from_numpy(wide), n, m).numpy().reshape(-1, m)
    assert ((~gone).sum(axis=1) == n).all()
    for group, mask in zip(wide.reshape(-1, m), gone, strict=True):
        assert group[mask].max() <= group[~mask].min()


@given(order=st.permutations(range(8)), seed=st.integers(0, 99))
def test_neurons_and_rows_may_be_permuted(order: list[int], seed: int) -> None:
    """Neurons in another order lose the same neurons; rows in another order lose the same weights."""
    rng = torch.Generator().manual_seed(seed)
    down, squares = torch.randn(5, 8, generator=rng), torch.rand(8, generator=rng)
    kept = best_neurons(neuron_scores(down, squares), 3)
    again = best_neurons(neuron_scores(down[:, order], squares[order]), 3)
    assert sorted(order[neuron] for neuron in again) == kept.tolist()
    weight = torch.randn(8, 5, generator=rng)
    gone = lowest_of_rows(weight_scores(weight, squares[:5]), 2)
    assert torch.equal(lowest_of_rows(weight_scores(weight[order], squares[:5]), 2), gone[order])


def test_an_expert_that_saw_no_token_is_cut_by_its_weights() -> None:
    """Where all inputs are 0, the size of the weights decides, not their place."""
    weight = torch.tensor([[3.0, 1.0, 2.0, 0.5]])
    assert lowest_of_rows(weight_scores(weight, torch.zeros(4)), 2).tolist() == [[False, True, False, True]]
    assert best_neurons(neuron_scores(weight, torch.zeros(4)), 2).tolist() == [0, 2]


# --- against a model that is masked in memory -------------------------------------------------------------------------


def brute_force(model: PreTrainedModel, rows: list[list[int]], kind: str) -> None:
    """Sparsify a loaded model layer by layer with loops over tokens and rows; knows nothing of moeprune."""
    for layer in model.model.layers:
        if not hasattr(layer.mlp, "experts"):
            continue
        experts, seen = layer.mlp.experts, []
        handle = experts.register_forward_pre_hook(lambda _, given: seen.append(given))  # noqa: B023
        shared_seen: list[torch.Tensor] = []
        shared = getattr(layer.mlp, "shared_experts", None)
        second = shared and shared.down_proj.register_forward_pre_hook(
            lambda _, given: shared_seen.append(given[0])  # noqa: B023
        )
        with torch.inference_mode():
            for row in rows:
                model(torch.tensor([row]))
        handle.remove()
        inner = experts.down_proj.shape[2]
        for number in range(experts.num_experts):
            gate_up, down = experts.gate_up_proj.data[number], experts.down_proj.data[number]
            inputs, middles = torch.zeros(down.shape[0]).double(), torch.zeros(inner).double()
            for hidden, index, gates in seen:
                for token, (chosen, weights) in enumerate(zip(index, gates, strict=True)):
                    for slot in (chosen == number).nonzero().flatten():
                        x, g = hidden[token].flatten(), weights[slot]
                        gate, up = (gate_up @ x).chunk(2)
                        inputs += (g * x).double() ** 2
                        middles += (g * torch.nn.functional.silu(gate) * up).double() ** 2
            if kind == "neurons":
                score = middles.sqrt() * down.norm(dim=0)
                down[:, score.argsort()[: inner // 2]] = 0
            else:
                zero_rows(gate_up, inputs, kind)
                zero_rows(down, middles, kind)
        if kind == "neurons" and shared:
            second.remove()
            rows_TJ = torch.cat([value.flatten(0, -2) for value in shared_seen])
            score = rows_TJ.norm(dim=0) * shared.down_proj.weight.data.norm(dim=0)
            shared.down_proj.weight.data[:, score.argsort()[: len(score) // 2]] = 0


def zero_rows(weight: torch.Tensor, squares: torch.Tensor, kind: str) -> None:
    """Make the lower half of every row, or of every four of its weights, 0."""
    for row in weight:
        score = row.abs() * squares.sqrt() if squares.any() else row.abs()
        step = 4 if kind == "2:4" else len(row)
        for start in range(0, len(row), step):
            row[start + score[start : start + step].argsort()[: step // 2]] = 0


AMOUNTS: dict[str, dict[str, str]] = {
    "0.5": {"sparsity": "0.5"},
    "2:4": {"pattern": "2:4"},
    "neurons": {"neurons": "0.5"},
}


@pytest.mark.parametrize("kind", AMOUNTS)
@pytest.mark.parametrize("model_type", ["qwen3_moe", "deepseek_v3"])
def test_the_result_is_the_model_that_is_masked_in_memory(
    checkpoint_of: CheckpointOf, model_of: ModelOf, ids_file: Path, tmp_path: Path, model_type: str, kind: str
) -> None:
    """Scores by a loop over tokens, each layer on the sparse ones before it, give the logits of the written model."""
    result = sparse(checkpoint_of(model_type), tmp_path / "out", ids_file, batch_tokens=100, **AMOUNTS[kind])
    reference = copy.deepcopy(model_of(model_type))
    reference.set_experts_implementation("eager")
    rows = [json.loads(line)["input_ids"] for line in ids_file.read_text().splitlines()]
    brute_force(reference, rows, kind)
    torch.testing.assert_close(logits_of(loaded(result.output)), logits_of(reference), rtol=1e-4, atol=1e-4)
    assert result.plan is not None
    assert result.plan.measured == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("model_type", [name for name in ARCHITECTURES if name != "kimi_k2"])
def test_narrow_experts_load_on_every_architecture(
    checkpoint_of: CheckpointOf, model_of: ModelOf, ids_file: Path, tmp_path: Path, model_type: str
) -> None:
    """Stock transformers builds the narrower experts, and computes what the model without those neurons does."""
    base = checkpoint_of(model_type)
    result = sparse(base, tmp_path / "out", ids_file, neurons="0.5")
    reference = copy.deepcopy(model_of(model_type))
    silence(reference, base, result.output)
    torch.testing.assert_close(logits_of(loaded(result.output)), logits_of(reference), rtol=1e-4, atol=1e-4)
    assert not open_checkpoint(result.output).mtp_layers
    assert result.after < result.before
    assert moeprune.verify(base, result.output).computed


def silence(model: PreTrainedModel, base: Path, out: Path) -> None:
    """Make the output's missing neurons 0 in a loaded base model, by what the files hold."""
    from moeprune.experts import expert_layers

    source, made = open_checkpoint(base), open_checkpoint(out)
    for layer in expert_layers(model):
        experts: Any = layer.experts
        for number, (before, after) in enumerate(
            zip(stored_experts(source, layer.index), stored_experts(made, layer.index), strict=True)
        ):
            kept = {*after.neurons}
            gone = [neuron for neuron, own in enumerate(before.neurons) if own not in kept]
            assert len(gone) == len(before.neurons) - len(kept) == len(kept)
            down = experts.down_proj.data[number]
            (down.T if experts.is_transposed else down)[:, gone] = 0
        shared_before, shared_after = shared_expert(source, layer.index), shared_expert(made, layer.index)
        if shared_before and shared_after and source.spec.shared_count_key:
            kept = {*shared_after.neurons}
            gone = [neuron for neuron, own in enumerate(shared_before.neurons) if own not in kept]
            assert len(gone) == len(kept)
            block: Any = layer.block
            block.shared_experts.down_proj.weight.data[:, gone] = 0


@pytest.mark.parametrize("stacked", [False, True])
def test_a_pattern_holds_and_everything_else_is_as_it_was(
    checkpoint_of: CheckpointOf, ids_file: Path, tmp_path: Path, stacked: bool
) -> None:
    """Two of every four inputs of every expert are 0; the others and all other tensors, MTP's too, equal the source."""
    base = checkpoint_of("glm4_moe", stacked=stacked, dtype="bfloat16")
    result = sparse(base, tmp_path / "out", ids_file, pattern="2:4")
    before, after = tensors_of(base), tensors_of(result.output)
    assert before.keys() == after.keys()
    depth = open_checkpoint(base).spec.depth(open_checkpoint(base).config)
    for name, value in after.items():
        touched = ".mlp.experts." in name and not name.startswith(f"model.layers.{depth}.")
        assert value.dtype == before[name].dtype
        assert torch.equal(value[value != 0], before[name][value != 0])
        if touched:
            assert ((value == 0).unflatten(-1, (-1, 4)).sum(dim=-1) == 2).all()
        else:
            assert torch.equal(value, before[name])
    assert (result.output / "config.json").read_bytes() == (base / "config.json").read_bytes()
    assert result.after == result.before


def test_no_sparsity_at_all_is_a_copy(checkpoint_of: CheckpointOf, tmp_path: Path) -> None:
    """`--sparsity 0` needs no data and copies every tensor by its bytes."""
    base = checkpoint_of("qwen3_moe")
    for amount in ({"sparsity": "0"}, {"neurons": "0"}):
        result = moeprune.sparsify(base, tmp_path / "out", overwrite=True, **amount)
        before, after = tensors_of(base), tensors_of(result.output)
        assert {name: value.numpy().tobytes() for name, value in before.items()} == {
            name: value.numpy().tobytes() for name, value in after.items()
        }
        assert (result.output / "config.json").read_bytes() == (base / "config.json").read_bytes()


# --- files ------------------------------------------------------------------------------------------------------------


def test_a_statistics_file_decides_without_running_the_model(
    checkpoint_of: CheckpointOf, ids_file: Path, tmp_path: Path
) -> None:
    """The first layer, which no sparse one comes before, is cut as by calibration; the file must be of this model."""
    base = checkpoint_of("qwen3_moe")
    moeprune.collect(base, tmp_path / "s.safetensors", calibration=str(ids_file), statistics=NEEDS)
    by_file = moeprune.sparsify(base, tmp_path / "file", sparsity="0.5", statistics=tmp_path / "s.safetensors")
    by_run = sparse(base, tmp_path / "run", ids_file, sparsity="0.5")
    found, expected = tensors_of(by_file.output), tensors_of(by_run.output)
    first = [name for name in found if name.startswith("model.layers.0.")]
    last = [name for name in found if name.startswith("model.layers.2.mlp.experts")]
    assert all(torch.equal(found[name], expected[name]) for name in first)
    assert not all(torch.equal(found[name], expected[name]) for name in last)
    with pytest.raises(StaleArtifactError):
        moeprune.sparsify(by_run.output, tmp_path / "no", sparsity="0.5", statistics=tmp_path / "s.safetensors")


def test_a_killed_run_goes_on_to_the_same_bytes(
    checkpoint_of: CheckpointOf, ids_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Layers that were done are not run again, and the folder has the bytes of a run that was not interrupted."""
    base = checkpoint_of("glm4_moe")
    whole = sparse(base, tmp_path / "whole", ids_file, pattern="2:4")
    add, done = Changes.add, []

    def interrupted(self: Changes, layer: int, *given: Any) -> None:
        if layer == 2 and len(done) == 2:
            raise KeyboardInterrupt
        add(self, layer, *given)
        done.append(layer)

    monkeypatch.setattr(Changes, "add", interrupted)
    with pytest.raises(KeyboardInterrupt):
        sparse(base, tmp_path / "out", ids_file, pattern="2:4")
    assert not (tmp_path / "out").exists()
    done.append(-1)
    sparse(base, tmp_path / "out", ids_file, pattern="2:4")
    assert done == [0, 1, -1, 2]
    assert tree(tmp_path / "out") == tree(whole.output)
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["out", "whole"]


def test_it_composes_with_dropping_experts(
    checkpoint_of: CheckpointOf, ids_file: Path, tmp_path: Path, plan_by_hand: Callable[..., Any]
) -> None:
    """A pruned model can be sparsified and a sparse one pruned; neither loses what the other did."""
    base = checkpoint_of("qwen3_moe")
    moeprune.apply(base, plan_by_hand(base, 8), tmp_path / "pruned")
    both = sparse(tmp_path / "pruned", tmp_path / "both", ids_file, neurons="0.5").output
    assert loaded(both).config.moe_intermediate_size == 8
    assert open_checkpoint(both).num_experts == 8
    zeros = sparse(base, tmp_path / "sparse", ids_file, pattern="2:4").output
    moeprune.apply(zeros, plan_by_hand(zeros, 8), tmp_path / "then")
    experts = [value for name, value in tensors_of(tmp_path / "then").items() if ".experts." in name]
    assert len(experts) == 2 * 8 * 3
    assert all(((value == 0).unflatten(-1, (-1, 4)).sum(dim=-1) == 2).all() for value in experts)


def change(folder: Path, name: str, edit: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Change a tensor of a checkpoint, and forge its digest in the manifest."""
    import xxhash

    [file] = folder.glob("*.safetensors")
    tensors = load_file(file)
    tensors[name] = edit(tensors[name].clone())
    save_file(tensors, file, metadata={"format": "pt"})
    manifest = json.loads((folder / "moeprune" / "manifest.json").read_text())
    manifest["tensors"][name] = xxhash.xxh3_128_hexdigest(tensors[name].numpy().tobytes())
    (folder / "moeprune" / "manifest.json").write_text(json.dumps(manifest))


def set_at(value: float, *place: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """An edit that sets one element."""

    def edit(tensor: torch.Tensor) -> torch.Tensor:
        tensor[place] = value
        return tensor

    return edit


def restore_a_zero(tensor: torch.Tensor) -> torch.Tensor:
    """An edit that gives a zero some value."""
    row, column = (tensor == 0).nonzero()[0]
    tensor[row, column] = 0.25
    return tensor


EXPERT = "model.layers.2.mlp.experts.3.up_proj.weight"
FORGERIES = {
    "2:4": [
        (EXPERT, lambda value: value * 2, "differs from the source"),
        (EXPERT, restore_a_zero, "differs from the source"),
        ("model.layers.1.mlp.gate.weight", set_at(9.0, 0, 0), "differs from the source"),
        ("model.norm.weight", set_at(9.0, 0), "differs from the source"),
    ],
    "neurons": [
        (EXPERT, set_at(9.0, 0, 0), "none of the source's"),
        (EXPERT, lambda value: value.flip(0), "none of the source's"),
        ("model.layers.2.mlp.shared_experts.up_proj.weight", set_at(9.0, 0, 0), "neuron 0 of the shared expert"),
    ],
}


@pytest.mark.parametrize("kind", FORGERIES)
def test_verify_finds_what_is_not_the_source(
    checkpoint_of: CheckpointOf, ids_file: Path, tmp_path: Path, kind: str
) -> None:
    """A weight, a neuron or any other tensor that is not the source's is found, though the manifest was forged too."""
    base = checkpoint_of("glm4_moe")
    out = sparse(base, tmp_path / "out", ids_file, **AMOUNTS[kind]).output
    for name, edit, message in FORGERIES[kind]:
        forged = shutil.copytree(out, tmp_path / "forged", dirs_exist_ok=True)
        change(forged, name, edit)
        with pytest.raises(CheckpointError, match=message):
            moeprune.verify(base, forged)
    moeprune.verify(base, out)


def test_verify_finds_a_weight_that_should_have_gone(
    checkpoint_of: CheckpointOf, ids_file: Path, tmp_path: Path
) -> None:
    """A weight of the source that is back, one too many in its group of four, is found."""
    base = checkpoint_of("glm4_moe")
    out = sparse(base, tmp_path / "out", ids_file, pattern="2:4").output
    source = tensors_of(base)[EXPERT]

    def put_back(value: torch.Tensor) -> torch.Tensor:
        row, column = (value == 0).nonzero()[5]
        value[row, column] = source[row, column]
        return value

    change(out, EXPERT, put_back)
    with pytest.raises(CheckpointError, match="fewer zeros"):
        moeprune.verify(base, out)


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sparsity": "0.5"}, "calibration"),
        ({"pattern": "2:3", "calibration": "x.jsonl"}, "multiple of 3"),
        ({"neurons": "0.1", "calibration": "x.jsonl"}, "takes none"),
        ({"sparsity": "0.5", "weights": {"code": 2.0}, "calibration": "x"}, "--weights"),
        ({"sparsity": "0.5", "stream": False, "calibration": "x"}, "stream"),
        ({"sparsity": "0.5", "calibration": "missing.jsonl"}, "missing"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_written(
    checkpoint_of: CheckpointOf,
    tmp_path: Path,
    options: dict[str, Any],
    message: str,
) -> None:
    """Options that exclude one another, do nothing or do not fit the model."""
    with pytest.raises(ConfigError, match=message):
        moeprune.sparsify(checkpoint_of("qwen3_moe"), tmp_path / "out", **options)
    assert not [*tmp_path.iterdir()]


def test_a_dtype_that_would_round_is_refused(checkpoint_of: CheckpointOf, ids_file: Path, tmp_path: Path) -> None:
    """Weights that stay are those of the source, so the model runs in their dtype or a wider one."""
    with pytest.raises(ConfigError, match="would round"):
        sparse(checkpoint_of("qwen3_moe"), tmp_path / "out", ids_file, sparsity="0.5", dtype="bfloat16")


def test_statistics_that_do_not_tell_enough_are_refused(
    checkpoint_of: CheckpointOf, ids_file: Path, tmp_path: Path
) -> None:
    """The sums must be there, and a shared expert that shrinks with the others needs a run."""
    base = checkpoint_of("deepseek_v3")
    core = moeprune.collect(base, calibration=str(ids_file))
    with pytest.raises(StrategyError, match="gated_in_sq_sum"):
        moeprune.sparsify(base, tmp_path / "out", sparsity="0.5", statistics=core)
    with pytest.raises(ConfigError, match="shared expert"):
        moeprune.sparsify(base, tmp_path / "out", neurons="0.5", statistics=core)


def test_quantised_weights_are_refused(checkpoint_of: CheckpointOf, ids_file: Path, tmp_path: Path) -> None:
    """What is stored as codes is not sparsified."""
    base = shutil.copytree(checkpoint_of("qwen3_moe"), tmp_path / "fp8")
    config = json.loads((base / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (base / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedModelError, match="quantised"):
        sparse(base, tmp_path / "out", ids_file, sparsity="0.5")


# --- the command line -------------------------------------------------------------------------------------------------


def test_the_command_says_what_it_did(
    checkpoint_of: CheckpointOf, ids_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Measured sparsity and sizes on stdout, that the file does not shrink on stderr; a dry run writes nothing."""
    base, out = str(checkpoint_of("qwen3_moe")), tmp_path / "out"
    command = ["sparsify", base, "--pattern", "2:4", "--calibration", str(ids_file), "-o", str(out)]
    assert cli.run([*command, "--dry-run"]) == 0
    assert not out.exists()
    assert "nothing was written" in capsys.readouterr().out
    assert cli.run(command) == 0
    shown = capsys.readouterr()
    assert "2:4: 50.0% of the experts' weights are 0" in shown.out
    assert "does not shrink" in shown.err
    assert cli.run(["verify", base, str(out)]) == 0
    capsys.readouterr()
    assert cli.run([*command, "--overwrite", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["plan"]["measured"] == 0.5
    assert found["bytes"]["before"] == found["bytes"]["after"]
    assert SparsifyPlan.load(out / "moeprune" / "plan.json").measured == 0.5
    assert cli.run(["sparsify", base, "--pattern", "2:4", "-o", str(tmp_path / "no")]) == 2
    assert "hint: pass --calibration" in capsys.readouterr().err
