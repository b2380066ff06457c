"""Layer-wise healing: closer to the original, never worse, resumed to equal bytes, and refused where it cannot be."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import moeprune
from moeprune import cli, repairing
from moeprune.errors import ConfigError, MoePruneError, UnsupportedModelError
from moeprune.healing import layerwise
from moeprune.healing.fitting import Schedule, fit
from moeprune.repairing import heal_layerwise
from moeprune.rewrite.changed import Changes

CheckpointOf = Callable[..., Path]
STEPS = 24


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint."""
    return {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}


def tree(folder: Path) -> dict[str, bytes]:
    """Every file of a folder, byte for byte."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def dropped_of(
    checkpoint_of: CheckpointOf, plan_by_hand: Callable[..., Any], tmp_path: Path
) -> Callable[..., tuple[Path, Path]]:
    """A checkpoint, and the same with half of its experts."""

    def make(model_type: str, **changes: Any) -> tuple[Path, Path]:
        base = checkpoint_of(model_type, **changes)
        kept = moeprune.open_checkpoint(base).num_experts // 2
        return base, moeprune.apply(base, plan_by_hand(base, kept), tmp_path / "dropped")

    return make


def mean_kl(base: Path, other: Path, sequences: list[list[int]]) -> float:
    """KL(base || other) per token, from two whole models."""
    from transformers import AutoModelForCausalLM

    models = [AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval() for folder in (base, other)]
    total = count = 0.0
    with torch.inference_mode():
        for ids in sequences:
            base_TV, other_TV = (model(torch.tensor([ids])).logits[0].log_softmax(-1) for model in models)
            total += float((base_TV.exp() * (base_TV - other_TV)).sum())
            count += len(ids)
    return total / count


def held_out(ids_file: Path) -> list[list[int]]:
    """Every tenth row of a domain."""
    rows = [json.loads(line) for line in ids_file.read_text().splitlines()]
    domains = {row["domain"]: [own["input_ids"] for own in rows if own["domain"] == row["domain"]] for row in rows}
    return [ids for own in domains.values() for ids in own[9::10]]


@pytest.mark.parametrize(
    ("model_type", "changes"),
    [
        ("qwen3_moe", {}),
        ("glm4_moe", {}),
        ("deepseek_v3", {}),
        ("gpt_oss", {}),
        ("qwen3_5_moe_text", {}),
        ("mixtral", {"dtype": "bfloat16"}),
    ],
)
def test_a_healed_model_is_closer_to_its_original(
    dropped_of: Callable[..., tuple[Path, Path]],
    ids_file: Path,
    tmp_path: Path,
    model_type: str,
    changes: dict[str, Any],
) -> None:
    """The divergences are those of the whole models, the second is smaller, and only layers have changed."""
    base, dropped = dropped_of(model_type, **changes)
    result = moeprune.heal(base, dropped, tmp_path / "out", calibration=str(ids_file), steps=STEPS, step_tokens=256)
    assert result.healed
    assert result.before == pytest.approx(mean_kl(base, dropped, held_out(ids_file)), rel=1e-4)
    assert result.after == pytest.approx(mean_kl(base, result.output, held_out(ids_file)), rel=1e-4)
    assert result.after is not None
    assert result.before is not None
    assert result.after < 0.95 * result.before
    before, after = tensors_of(dropped), tensors_of(result.output)
    assert {name: value.shape for name, value in before.items()} == {name: value.shape for name, value in after.items()}
    changed = {name for name, value in before.items() if not torch.equal(value, after[name])}
    depth = json.loads((base / "config.json").read_text())["num_hidden_layers"]
    assert changed
    assert all(any(f"layers.{index}." in name for index in range(depth)) for name in changed)
    for file in ("config.json", "moeprune/plan.json"):
        assert (result.output / file).read_bytes() == (dropped / file).read_bytes()
    proof = moeprune.verify(dropped, result.output)
    assert (proof.computed, proof.tensors) == (len(changed), len(after))


def test_no_steps_give_the_same_weights(
    dropped_of: Callable[..., tuple[Path, Path]], ids_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without a step the output holds the given bytes, and says so."""
    base, dropped = dropped_of("qwen3_moe")
    result = moeprune.heal(base, dropped, tmp_path / "out", calibration=str(ids_file), steps=0)
    assert not result.healed
    assert result.before == result.after
    assert "the output is a copy" in capsys.readouterr().err
    for file in [*dropped.glob("*.safetensors"), dropped / "config.json"]:
        assert (result.output / file.name).read_bytes() == file.read_bytes()


def test_the_original_is_named_as_the_base(
    dropped_of: Callable[..., tuple[Path, Path]], ids_file: Path, tmp_path: Path
) -> None:
    """A healed model counts as made from its original, as far as folder or record of the pruned one name it."""
    base, dropped = dropped_of("qwen3_moe")
    record = dropped / "moeprune" / "provenance.json"
    plain = json.loads(record.read_text())
    cached = tmp_path / "models--org--big" / "snapshots" / "abc123"
    shutil.copytree(base, cached)
    older = {"source": {"repo": "org/older", "revision": "f00"}}

    def source(original: Path, text: str) -> object:
        record.write_text(text)
        given: dict[str, Any] = {"calibration": str(ids_file), "steps": 0, "overwrite": True}
        moeprune.heal(original, dropped, tmp_path / "out", **given)
        return json.loads((tmp_path / "out" / "moeprune" / "provenance.json").read_text()).get("source")

    assert source(cached, json.dumps(plain | older)) == {"repo": "org/big", "revision": "abc123"}
    assert source(base, json.dumps(plain | older)) == older["source"]
    for unknown in (plain, plain | {"source": "org/older"}, {"schema": "another/1"} | older):
        assert source(base, json.dumps(unknown)) is None
    assert source(base, "no JSON") is None


@pytest.mark.parametrize("rate", [3e4, 1e30])
def test_steps_that_make_it_worse_are_not_taken(
    dropped_of: Callable[..., tuple[Path, Path]], ids_file: Path, tmp_path: Path, rate: float
) -> None:
    """A learning rate that destroys the weights, or makes them infinite, leaves those that were given."""
    base, dropped = dropped_of("mixtral")
    result = moeprune.heal(base, dropped, tmp_path / "out", calibration=str(ids_file), steps=9, lr=rate)
    assert not result.healed
    assert {layer["best_step"] for layer in result.record["layers"].values()} == {0}
    before, after = tensors_of(dropped), tensors_of(result.output)
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_layers_that_fit_better_and_predict_worse_are_not_written(
    dropped_of: Callable[..., tuple[Path, Path]], ids_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What decides is the distribution at the end: layers that were fitted to something else are thrown away."""
    base, dropped = dropped_of("mixtral")

    def zero(*_: object) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
        return lambda out_NH, _: out_NH.square().mean()

    monkeypatch.setattr(layerwise, "hidden_loss", zero)
    result = moeprune.heal(base, dropped, tmp_path / "out", calibration=str(ids_file), steps=40, lr=0.05)
    assert not result.healed
    assert result.record["best_step"] == 0
    after = tensors_of(result.output)
    assert all(torch.equal(value, after[name]) for name, value in tensors_of(dropped).items())


@pytest.mark.parametrize("spilled", [False, True])
def test_a_killed_run_goes_on_to_equal_bytes(
    dropped_of: Callable[..., tuple[Path, Path]],
    ids_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    spilled: bool,
) -> None:
    """Stopped while the third layer is fitted, the run goes on there; the result is that of an undisturbed one."""
    base, dropped = dropped_of("deepseek_v3")
    options: dict[str, Any] = {"calibration": str(ids_file), "steps": 6, "step_tokens": 128}
    expected = tree(moeprune.heal(base, dropped, tmp_path / "whole", **options).output)
    if spilled:
        arrange = repairing._arrange
        monkeypatch.setattr(
            "moeprune.repairing._arrange", lambda *given: dataclasses.replace(arrange(*given), spill=True)
        )
    add, fitted = Changes.add, layerwise.LayerwiseHealing._layer

    def stop(self: Changes, layer: int, *rest: Any) -> None:
        if layer == 2:
            raise KeyboardInterrupt
        add(self, layer, *rest)

    with monkeypatch.context() as patched:
        patched.setattr(Changes, "add", stop)
        with pytest.raises(KeyboardInterrupt):
            moeprune.heal(base, dropped, tmp_path / "out", **options)
    run: list[int] = []

    def count(self: layerwise.LayerwiseHealing, index: int) -> None:
        run.append(index)
        fitted(self, index)

    monkeypatch.setattr(layerwise.LayerwiseHealing, "_layer", count)
    assert tree(moeprune.heal(base, dropped, tmp_path / "out", **options).output) == expected
    assert run == [2]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["calibration.jsonl", "dropped", "out", "whole"]


@pytest.mark.parametrize(
    ("train", "moving"),
    [("router", ["gate.weight"]), ("down", ["down_proj"]), ("experts", ["gate.weight", "experts."])],
)
def test_only_what_is_named_moves(
    dropped_of: Callable[..., tuple[Path, Path]], ids_file: Path, tmp_path: Path, train: str, moving: list[str]
) -> None:
    """Of a layer with shared experts and attention, only the routed experts' parts that were asked for are new."""
    base, dropped = dropped_of("glm4_moe")
    result = moeprune.heal(base, dropped, tmp_path / "out", calibration=str(ids_file), steps=STEPS, train=train)
    after = tensors_of(result.output)
    changed = {name for name, value in tensors_of(dropped).items() if not torch.equal(value, after[name])}
    assert changed
    assert not any("shared" in name for name in changed)
    assert all(any(part in name for part in moving) for name in changed)


def test_pruned_weights_stay_zero(checkpoint_of: CheckpointOf, ids_file: Path, tmp_path: Path) -> None:
    """Weights that were made zero inside experts are zero after healing, whereas their neighbours move."""
    base = checkpoint_of("mixtral")
    sparse = moeprune.sparsify(base, output=tmp_path / "sparse", sparsity=0.5, calibration=str(ids_file)).output
    result = moeprune.heal(base, sparse, tmp_path / "out", calibration=str(ids_file), steps=STEPS)
    before, after = tensors_of(sparse), tensors_of(result.output)
    experts = [name for name in before if ".experts." in name]
    assert result.healed
    assert all(torch.equal(before[name] == 0, after[name] == 0) for name in experts)
    assert any(not torch.equal(before[name], after[name]) for name in experts)


def test_a_layer_is_fitted_for_so_many_minutes() -> None:
    """By the clock a fit does as many steps as there is time for, at a rate that falls to nothing."""
    value = torch.nn.Parameter(torch.tensor([4.0, -2.0]))
    fitted = fit(
        {"weight": value},
        lambda _: value.square().sum(),
        1,
        lambda: float(value.detach().square().sum()),
        Schedule(minutes=1.0),
        rate=0.5,
        seconds=0.2,
    )
    assert fitted.steps > 10
    assert fitted.after < 0.5 < fitted.before == 20.0
    assert float(value.detach().square().sum()) == pytest.approx(fitted.after)


def test_a_router_moves_less_than_the_weights_around_it() -> None:
    """By three tenths of what the others do for the same gradient."""
    start = torch.full((2,), 4.0)
    values = {name: torch.nn.Parameter(start.clone()) for name in ("router", "down")}

    def loss(*_: int) -> torch.Tensor:
        return sum((value.square().sum() for value in values.values()), start.new_zeros(()))

    fit(values, loss, 1, lambda: float(loss().detach()), Schedule(steps=1), rate=0.5, routers=frozenset({"router"}))
    moved = {name: (start - value.detach()).mean() for name, value in values.items()}
    assert float(moved["router"] / moved["down"]) == pytest.approx(0.3, rel=1e-4)


# --- refused ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"method": "layerwize"}, "no method 'layerwize'"),
        ({"train": "gates"}, "'gates' is no part of a layer"),
        ({"steps": -1}, "--steps and --seed must be at least 0"),
        ({"lr": 0.0}, "--minutes and --lr must be larger than 0"),
        ({"step_tokens": 1}, "a step of 1 tokens"),
        ({"calibration": ()}, "healing trains on text"),
        ({"num_samples": 5}, "too few to train on"),
        ({"memory": 400 << 20}, "takes|--memory"),
        ({"method": "logits", "memory": 400 << 20}, "--memory does not go with --method logits"),
        ({"method": "experts", "schedule": "linear"}, "--schedule does not go with --method experts"),
        ({"schedule": "linear"}, "--schedule does not go with --method layerwise"),
        ({"method": "lora", "minutes": 1.0}, "--minutes does not go with --method lora"),
        ({"batch_tokens": 64}, "says nothing about healing"),
        ({"method": "logits", "r": 4}, "--rank and --alpha are of adapters"),
    ],
)
def test_what_cannot_be_done_is_refused_first(
    dropped_of: Callable[..., tuple[Path, Path]], ids_file: Path, tmp_path: Path, options: dict[str, Any], said: str
) -> None:
    """The message says why, and nothing is written."""
    base, dropped = dropped_of("mixtral", hidden_size=32)
    given: dict[str, Any] = {"calibration": str(ids_file)} | options
    if "memory" in options:
        given["memory"] = 100_000
    with pytest.raises(ConfigError, match=said):
        moeprune.heal(base, dropped, tmp_path / "out", **given)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["calibration.jsonl", "dropped"]


def test_models_that_do_not_belong_together_are_refused(
    checkpoint_of: CheckpointOf, ids_file: Path, tmp_path: Path
) -> None:
    """Another width or vocabulary is refused by name, and so are packed weights."""
    base, other = checkpoint_of("mixtral"), checkpoint_of("mixtral", num_hidden_layers=2)
    with pytest.raises(ConfigError, match="do not belong together: num_hidden_layers is 3 and 2"):
        moeprune.heal(base, other, tmp_path / "out", calibration=str(ids_file))
    packed = tmp_path / "packed"
    packed.mkdir()
    save_file(tensors_of(base), packed / "model.safetensors")
    config = json.loads((base / "config.json").read_text())
    settings = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}
    (packed / "config.json").write_text(json.dumps(config | settings))
    with pytest.raises(UnsupportedModelError, match="and healing computes new weights"):
        moeprune.heal(base, packed, tmp_path / "out", calibration=str(ids_file))
    assert not (tmp_path / "out").exists()


# --- the command line -------------------------------------------------------------------------------------------------


def test_the_command_heals(
    dropped_of: Callable[..., tuple[Path, Path]], ids_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A dry run forecasts and writes nothing; the run itself says how much closer it came."""
    base, dropped = dropped_of("qwen3_moe")
    words = ["heal", str(base), str(dropped), "-o", str(tmp_path / "out"), "--calibration", str(ids_file)]
    assert cli.run([*words, "--dry-run"]) == 0
    assert "healing: one layer at a time" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()
    assert cli.run([*words, "--steps", "12"]) == 0
    assert "layerwise: KL from the original" in capsys.readouterr().out
    assert cli.run([*words, "--steps", "12", "--json", "--overwrite", "-q"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["healed"]
    assert found["held_out_kl"]["after"] < found["held_out_kl"]["before"]
    record = json.loads((tmp_path / "out" / "moeprune" / "healing.json").read_text())
    assert record["schema"] == "moeprune.healing/1"
    assert record["command"]["train"] == "all"
    assert str(tmp_path) not in json.dumps(record)


def test_pruning_heals_in_one_go(
    checkpoint_of: CheckpointOf,
    ids_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """`prune --heal layerwise` is prune, then heal: the same bytes; what it makes on the way is gone."""
    base, out = str(checkpoint_of("mixtral")), tmp_path / "out"
    defaults: dict[str, Any] = heal_layerwise.__kwdefaults__ or {}
    monkeypatch.setitem(defaults, "steps", 12)
    plain = ["--ratio", "0.5", "--calibration", str(ids_file), "-q"]
    assert cli.run(["prune", base, "-o", str(out / "one"), "--heal", "layerwise", *plain]) == 0
    assert "layerwise: KL from the original" in capsys.readouterr().out
    assert cli.run(["prune", base, "-o", str(out / "two"), *plain]) == 0
    assert (
        cli.run(["heal", base, str(out / "two"), "-o", str(out / "three"), "--calibration", str(ids_file), "-q"]) == 0
    )
    assert tree(out / "one") == tree(out / "three")
    assert sorted(path.name for path in out.iterdir()) == ["one", "three", "two"]


def test_pruning_that_was_killed_while_it_healed_does_not_drop_again(
    checkpoint_of: CheckpointOf, ids_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was dropped lies beside the output until it is healed; the same command goes on from there."""
    base, out = checkpoint_of("mixtral"), tmp_path / "place" / "out"
    given: dict[str, Any] = {"ratio": 0.5, "calibration": str(ids_file), "heal": "layerwise"}
    defaults: dict[str, Any] = heal_layerwise.__kwdefaults__ or {}
    monkeypatch.setitem(defaults, "steps", 4)

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("moeprune.oneshot.heal_layerwise", interrupt)
        with pytest.raises(KeyboardInterrupt):
            moeprune.prune(base, out, **given)
    assert not out.exists()
    monkeypatch.setattr("moeprune.oneshot.apply_drop", interrupt)
    result = moeprune.prune(base, out, **given)
    assert result.healing is not None
    assert [path.name for path in out.parent.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"heal": "logits", "calibration": True}, "--heal knows layerwise alone"),
        ({"heal": "layerwise", "strategy": "random"}, "--heal trains on the calibration text"),
        ({"heal": "layerwise", "calibration": True, "num_samples": 3}, "too few to train on"),
    ],
)
def test_pruning_refuses_to_heal_what_cannot_be(
    checkpoint_of: CheckpointOf, ids_file: Path, tmp_path: Path, options: dict[str, Any], said: str
) -> None:
    """Before anything is collected."""
    given = options | ({"calibration": str(ids_file)} if options.get("calibration") else {})
    with pytest.raises(MoePruneError, match=said):
        moeprune.prune(checkpoint_of("mixtral"), tmp_path / "out", ratio=0.5, **given)
    assert [path.name for path in tmp_path.iterdir()] == ["calibration.jsonl"]
