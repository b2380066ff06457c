"""Whole models trained to predict what their originals predict: what moves, what stays, and runs that are killed."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import moeprune
from moeprune import cli
from moeprune.calibration import CalibrationSet
from moeprune.distilling import distil_checkpoint
from moeprune.errors import ConfigError, EvaluationError, UnsupportedModelError
from moeprune.healing.distillation import (
    Objective,
    Recipe,
    Text,
    Trainer,
    distil,
    divergence,
    held_out_divergence,
    levels_of,
    trainable,
)
from moeprune.healing.forecast import training_forecast
from moeprune.healing.lora import Adapters, Rank, projections

CheckpointOf = Callable[..., Path]
SHORT = Recipe(steps=6, lr=3e-3, step_tokens=128, checks=3)


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint."""
    return {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}


def changed(before: Path, after: Path) -> set[str]:
    """Names of the tensors that differ."""
    one, other = tensors_of(before), tensors_of(after)
    assert one.keys() == other.keys()
    return {name for name, value in one.items() if not torch.equal(value, other[name])}


@pytest.fixture
def dropped(checkpoint_of: CheckpointOf, tmp_path: Path) -> Callable[[str], tuple[Path, Path]]:
    """A checkpoint, and the same with fewer experts."""

    def build(model_type: str) -> tuple[Path, Path]:
        base = checkpoint_of(model_type)
        moeprune.prune(base, tmp_path / "pruned", ratio=0.5, strategy="aimer")
        return base, tmp_path / "pruned"

    return build


def pair(folder: Path) -> tuple[Any, Any]:
    """A student that differs from its teacher, and the teacher."""
    student, teacher = (AutoModelForCausalLM.from_pretrained(folder).eval() for _ in range(2))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for value in student.parameters():
            value.add_(0.05 * torch.randn(value.shape, generator=generator))
    return student, teacher


def rows(count: int, length: int = 24) -> list[list[int]]:
    """Token sequences."""
    generator = torch.Generator().manual_seed(5)
    return torch.randint(0, 97, (count, length), generator=generator).tolist()


# --- the loss and the text --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_divergence_is_that_of_the_softened_distributions(temperature: float) -> None:
    """Both directions equal sums over the vocabulary, times the square of the temperature."""
    one, other = torch.randn((2, 5, 7), generator=torch.Generator().manual_seed(0))
    p, q = ((logits / temperature).softmax(-1) for logits in (one, other))
    forward = temperature**2 * (p * (p / q).log()).sum(-1)
    assert torch.allclose(divergence(one, other, temperature=temperature), forward, atol=1e-5)
    back = divergence(other, one, temperature=temperature, reverse=True)
    assert torch.allclose(back, forward, atol=1e-5)


def test_every_tenth_sequence_of_a_domain_is_held_out() -> None:
    """Training text and held-out text are disjoint, and both have every domain that has ten sequences."""
    sequences = tuple((number, 1) for number in range(33))
    domains = tuple("ab"[number % 3 == 0] for number in range(33))
    text = Text.split(CalibrationSet(sequences=sequences, domains=domains, provenance=()))
    assert [ids[0] for ids in text.held_out] == [14, 27, 29]
    assert sorted([*text.train, *text.held_out]) == sorted(sequences)


def test_all_of_the_text_is_seen_once_before_any_of_it_again() -> None:
    """The steps of an epoch take every sequence once, in an order that depends on the seed and the epoch alone."""
    text = Text(train=[(number, 0) for number in range(8)], held_out=[])
    recipe = Recipe(step_tokens=4)
    epochs = [[ids[0] for step in range(4) for ids in text.of_step(4 * epoch + step, recipe)] for epoch in range(2)]
    assert [sorted(epoch) for epoch in epochs] == [[*range(8)]] * 2
    assert epochs[0] != epochs[1]
    assert text.of_step(1, Recipe(step_tokens=4, seed=1)) != text.of_step(1, recipe)


@pytest.mark.parametrize(
    ("options", "says"),
    [({"lr": 0}, "--lr"), ({"steps": -1}, "--steps"), ({"schedule": "x"}, "schedule"), ({"loss": "x"}, "loss")],
)
def test_a_recipe_that_cannot_be_run_is_refused(options: dict[str, Any], says: str) -> None:
    """The message names what is wrong."""
    with pytest.raises(ConfigError, match=says):
        Recipe(**options)


# --- what moves -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", ["qwen3_moe", "deepseek_v3", "qwen3_next"])
def test_levels_name_disjoint_parts_of_the_model(model_of: Callable[..., Any], model_type: str) -> None:
    """Every level has parameters of its own; routers are routers and norms are vectors."""
    model = model_of(model_type)
    levels = levels_of(model)
    assert {*levels.values()} == {"router", "experts", "attention", "norms"}
    assert all(name.rsplit(".", 2)[-2] in {"gate", "shared_expert_gate"} for name in levels if levels[name] == "router")
    assert all(dict(model.named_parameters())[name].dim() == 1 for name in levels if levels[name] == "norms")
    assert {*trainable(model, ["router", "norms"])} == {name for name in levels if levels[name] in {"router", "norms"}}
    assert len(trainable(model, ["all"])) == len([*model.named_parameters()])


def test_training_brings_a_pruned_model_closer_to_its_original(
    dropped: Callable[[str], tuple[Path, Path]], ids_file: Path, tmp_path: Path
) -> None:
    """The held-out divergence falls, only what is named moves, and the output is a stock checkpoint of its base."""
    base, pruned = dropped("deepseek_v3")
    out = tmp_path / "healed"
    result = distil_checkpoint(
        base, pruned, out, calibration=str(ids_file), train=["router", "norms"], recipe=SHORT, device="cpu"
    )
    assert result.healed
    assert result.distilled.after < result.distilled.before
    names = changed(pruned, out)
    assert names
    assert all("mlp.gate.weight" in name or "norm" in name for name in names)
    assert (out / "config.json").read_bytes() == (pruned / "config.json").read_bytes()
    student, teacher = (AutoModelForCausalLM.from_pretrained(folder).eval() for folder in (out, base))
    data = moeprune.load_calibration([str(ids_file)], base)
    kl = held_out_divergence(student, teacher, Text.split(data).held_out, 4096)
    assert kl == pytest.approx(result.distilled.after, rel=1e-3)
    record = json.loads((out / "moeprune" / "healing.json").read_text())
    assert record["schema"] == "moeprune.healing/1"
    assert record["held_out_kl"]["after"] == round(result.distilled.after, 6)


def test_equal_runs_give_equal_bytes(
    dropped: Callable[[str], tuple[Path, Path]], ids_file: Path, tmp_path: Path
) -> None:
    """Two runs write the same files."""
    base, pruned = dropped("qwen3_moe")
    folders = [tmp_path / "one", tmp_path / "two"]
    for out in folders:
        distil_checkpoint(base, pruned, out, calibration=str(ids_file), recipe=SHORT, device="cpu")
    files = [
        {str(file.relative_to(out)): file.read_bytes() for file in out.rglob("*") if file.is_file()} for out in folders
    ]
    assert files[0] == files[1]


@pytest.mark.parametrize("method", ["logits", "lora"])
def test_no_step_changes_no_byte(
    dropped: Callable[[str], tuple[Path, Path]], ids_file: Path, tmp_path: Path, method: str
) -> None:
    """Without steps the output has the tensors of what it was made from."""
    base, pruned = dropped("qwen3_moe")
    distil_checkpoint(
        base, pruned, tmp_path / "o", method=method, calibration=str(ids_file), recipe=Recipe(steps=0), device="cpu"
    )
    assert not changed(pruned, tmp_path / "o")


def test_a_model_that_training_made_worse_is_not_written(
    dropped: Callable[[str], tuple[Path, Path]],
    ids_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Where every look is worse than the model as given, the output is a copy, and a note says so."""
    base, pruned = dropped("qwen3_moe")
    wild = Recipe(steps=3, lr=10.0, warmup=0, schedule="constant", step_tokens=64, checks=3)
    result = distil_checkpoint(base, pruned, tmp_path / "o", calibration=str(ids_file), recipe=wild, device="cpu")
    assert not result.healed
    assert not changed(pruned, tmp_path / "o")
    assert "the output is a copy" in capsys.readouterr().err


def test_zeros_stay_zeros_where_that_is_asked(checkpoint_of: CheckpointOf) -> None:
    """Weights that are exactly zero do not move; the others do."""
    student, teacher = pair(checkpoint_of("qwen3_moe"))
    name = "model.layers.0.mlp.experts.down_proj"
    weight = student.get_parameter(name)
    with torch.no_grad():
        weight[:, ::2] = 0
    before = weight.detach().clone()
    text = Text(train=rows(16), held_out=rows(2))
    done = distil(
        student, teacher, text, SHORT, parameters=trainable(student, ["experts"]), keep_zeros=True, device="cpu"
    )
    assert done.best_step
    assert not weight[:, ::2].any()
    assert not torch.equal(weight, before)


# --- runs that are killed ---------------------------------------------------------------------------------------------


class Stopping(Objective):
    """Stops the run after a step, and counts the steps it sees."""

    def __init__(self, last: int) -> None:
        self.last, self.steps = last, 0

    def after_step(self, step: int, share: float, sums: Any) -> str:
        """Stop."""
        self.steps += 1
        if step == self.last:
            raise KeyboardInterrupt
        return ""

    def state(self) -> dict[str, Any]:
        """The count."""
        return {"steps": self.steps}

    def restore(self, state: Any) -> None:
        """The count."""
        self.steps = state["steps"]


@pytest.mark.parametrize("stop", [1, 2, 4])
def test_a_killed_run_goes_on_to_the_same_bits(checkpoint_of: CheckpointOf, tmp_path: Path, stop: int) -> None:
    """A run that is stopped at any step and started again ends with the weights and looks of one that was not."""
    text, recipe = Text(train=rows(16), held_out=rows(2)), Recipe(steps=6, lr=3e-3, step_tokens=64, checks=3)

    def run(objective: Objective, folder: Path) -> tuple[dict[str, torch.Tensor], Any]:
        student, teacher = pair(checkpoint_of("deepseek_v3"))
        parameters = trainable(student, ["all"])
        done = distil(
            student, teacher, text, recipe, parameters=parameters, objective=objective, folder=folder, device="cpu"
        )
        return {name: value.detach().clone() for name, value in parameters.items()}, done

    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    expected, done = run(Stopping(99), tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(Stopping(stop), tmp_path / "killed")
    again = Stopping(99)
    found, went_on = run(again, tmp_path / "killed")
    assert went_on == done
    assert again.steps == done.best_step
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_nothing_is_pickled(checkpoint_of: CheckpointOf, tmp_path: Path) -> None:
    """The state of a run is one safetensors file and one JSON file."""
    student, teacher = pair(checkpoint_of("qwen3_moe"))
    text = Text(train=rows(16), held_out=rows(2))
    distil(student, teacher, text, SHORT, parameters=trainable(student, ["router"]), folder=tmp_path, device="cpu")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["training.json", "training6.safetensors"]


def test_a_run_ends_when_looks_do_not_get_better(checkpoint_of: CheckpointOf) -> None:
    """After as many looks without a better one as the recipe allows, no step is made any more."""
    student, teacher = pair(checkpoint_of("qwen3_moe"))
    text = Text(train=rows(16), held_out=rows(2))
    wild = Recipe(steps=10, lr=1.0, warmup=0, schedule="constant", step_tokens=64, checks=10, patience=2)
    done = distil(student, teacher, text, wild, parameters=trainable(student, ["all"]), device="cpu")
    assert (done.best_step, done.steps) == (0, 2)


def test_a_divergence_that_is_not_finite_ends_the_run(checkpoint_of: CheckpointOf) -> None:
    """A teacher that gives no numbers is an error, not a model."""
    student, teacher = pair(checkpoint_of("qwen3_moe"))
    with torch.no_grad():
        teacher.lm_head.weight.fill_(math.nan)
    with pytest.raises(EvaluationError, match="not finite"):
        distil(
            student,
            teacher,
            Text(train=rows(16), held_out=rows(2)),
            SHORT,
            parameters=trainable(student, ["router"]),
            device="cpu",
        )


def test_gradients_do_not_depend_on_how_a_step_is_cut(checkpoint_of: CheckpointOf) -> None:
    """A step in one forward pass moves the weights as one in several, up to rounding."""
    ends = []
    for batch_tokens in (4096, 30):
        student, teacher = pair(checkpoint_of("qwen3_moe"))
        parameters = trainable(student, ["attention"])
        recipe = Recipe(steps=1, lr=1e-3, warmup=0, schedule="constant", step_tokens=96, batch_tokens=batch_tokens)
        text = Text(train=rows(8), held_out=rows(2))
        Trainer(
            student, teacher, text, recipe, parameters, dict.fromkeys(parameters, torch.float32), Objective(), "cpu"
        )._step(0)
        ends.append({name: value.detach().clone() for name, value in parameters.items()})
    assert all(torch.allclose(value, ends[1][name], atol=2e-5) for name, value in ends[0].items())


# --- adapters ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model_type", "expected"),
    [
        ("qwen3_moe", {"q_proj", "k_proj", "v_proj", "o_proj"}),
        ("deepseek_v3", {"q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"}),
        ("glm_moe_dsa", {"q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"}),
        ("gpt_oss", {"q_proj", "k_proj", "v_proj", "o_proj"}),
    ],
)
def test_adapters_sit_on_the_attention_projections(
    model_of: Callable[..., Any], model_type: str, expected: Sequence[str]
) -> None:
    """Whatever the attention is like, its projections are found and nothing else is."""
    assert {name.rpartition(".")[2] for name in projections(model_of(model_type))} == set(expected)


def test_adapters_change_nothing_until_they_are_trained(checkpoint_of: CheckpointOf) -> None:
    """A model with fresh adapters, and one from which they were merged, predict what they did."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint_of("qwen3_moe")).eval()
    ids = torch.tensor(rows(2))
    before = model(ids).logits
    names = {name for name, _ in model.named_parameters()}
    adapters = Adapters(model, Rank(r=4, alpha=8), seed=0)
    assert torch.equal(model(ids).logits, before)
    adapters.merge()
    assert torch.equal(model(ids).logits, before)
    assert {name for name, _ in model.named_parameters()} == names


def test_lora_heals_by_attention_alone(
    dropped: Callable[[str], tuple[Path, Path]], ids_file: Path, tmp_path: Path
) -> None:
    """The divergence falls, and of the output's tensors only attention projections differ."""
    base, pruned = dropped("deepseek_v3")
    out = tmp_path / "healed"
    result = distil_checkpoint(
        base, pruned, out, method="lora", calibration=str(ids_file), recipe=SHORT, rank=Rank(r=4, alpha=8), device="cpu"
    )
    assert result.healed
    assert result.distilled.after < result.distilled.before
    names = changed(pruned, out)
    assert names
    assert all(".self_attn." in name and "_proj" in name for name in names)


# --- the command line -------------------------------------------------------------------------------------------------

SHORT_RUN = ["--steps", "6", "--step-tokens", "128", "--schedule", "linear", "--temperature", "1.5"]


@pytest.mark.parametrize(
    ("words", "recorded"),
    [
        (["--method", "logits", "--train", "router,experts", "--lr", "0.003"], {"train": ["router", "experts"]}),
        (["--method", "lora", "--rank", "4", "--alpha", "8", "--lr", "0.003"], {"r": 4, "alpha": 8}),
    ],
)
def test_the_command_trains_a_whole_model(
    dropped: Callable[[str], tuple[Path, Path]],
    ids_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    recorded: dict[str, Any],
) -> None:
    """A dry run forecasts the memory and writes nothing; the run records its options and takes over what it found."""
    base, pruned = dropped("qwen3_moe")
    out = tmp_path / "healed"
    command = ["heal", str(base), str(pruned), "-o", str(out), "--calibration", str(ids_file), *words, *SHORT_RUN]
    assert cli.run([*command, "--dry-run"]) == 0
    assert "healing: about " in capsys.readouterr().out
    assert not out.exists()
    assert cli.run([*command, "--json", "-q"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["healed"]
    assert found["held_out_kl"]["after"] < found["held_out_kl"]["before"]
    record = json.loads((out / "moeprune" / "healing.json").read_text())
    assert recorded.items() <= record["command"].items()
    assert {"schedule": "linear", "temperature": 1.5, "steps": 6}.items() <= record["command"].items()
    assert (out / "moeprune" / "plan.json").read_bytes() == (pruned / "moeprune" / "plan.json").read_bytes()
    assert moeprune.verify(pruned, out).tensors == len(tensors_of(out))


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_the_forecast_of_training_is_told_from_shapes(checkpoint_of: CheckpointOf, precision: str) -> None:
    """Weights, gradients, moments and the best weights so far of what moves; the original as it is loaded."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint_of("qwen3_moe"), dtype=torch.bfloat16)
    sizes = [value.numel() for value in trainable(model, ["experts"]).values()]
    small, large = (
        training_forecast(
            model, model, sizes, [[1] * 8] * 40, Recipe(step_tokens=tokens, batch_tokens=tokens, precision=precision)
        )
        for tokens in (16, 64)
    )
    everything = sum(value.numel() for value in model.parameters())
    assert (small.student, small.training) == (4 * everything, 16 * sum(sizes))
    assert small.teacher == (4 if precision == "no" else 2) * everything
    assert large.batch == 4 * small.batch
    assert small.memory == sum(value for name, value in small.to_dict().items() if name != "memory")


# --- what is refused --------------------------------------------------------------------------------------------------


def test_what_cannot_be_trained_is_refused_and_nothing_is_written(
    checkpoint_of: CheckpointOf, ids_file: Path, tmp_path: Path
) -> None:
    """Unknown methods and levels, too little text and quantised weights."""
    base, out = checkpoint_of("qwen3_moe"), tmp_path / "o"
    few = tmp_path / "few.jsonl"
    few.write_text("".join(ids_file.read_text().splitlines(keepends=True)[:4]))
    with pytest.raises(ConfigError, match="no method"):
        distil_checkpoint(base, base, out, method="x", calibration=str(ids_file))
    with pytest.raises(ConfigError, match="nothing to train called 'x'"):
        distil_checkpoint(base, base, out, train=["x"], calibration=str(ids_file))
    with pytest.raises(ConfigError, match="too few"):
        distil_checkpoint(base, base, out, calibration=str(few))
    with pytest.raises(ConfigError, match="not trained on --device auto"):
        distil_checkpoint(base, base, out, calibration=str(ids_file), device="auto")
    with pytest.raises(ConfigError, match="--train does not go with --method lora"):
        moeprune.heal(base, base, out, method="lora", train="router", calibration=str(ids_file))
    quantised = tmp_path / "quantised"
    quantised.mkdir()
    for file in base.iterdir():
        (quantised / file.name).write_bytes(file.read_bytes())
    config = json.loads((quantised / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (quantised / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedModelError, match="quantised"):
        distil_checkpoint(base, quantised, out, calibration=str(ids_file))
    assert not out.exists()
