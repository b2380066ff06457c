"""Checkpoints written from computed tensors: names and dtypes as on disk, resumed after a kill, equal bytes."""

from __future__ import annotations

import dataclasses
import os
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from moeprune.checkpoint import Checkpoint, open_checkpoint
from moeprune.errors import CheckpointError, ConfigError, UnsupportedModelError
from moeprune.rewrite import drop
from moeprune.rewrite.changed import Changes, changing, check_plain, stored_tensors, write_changed
from moeprune.rewrite.verify import verify_manifest
from moeprune.streaming.stream import LayerStream

CheckpointOf = Callable[..., Path]
RECORDS: Mapping[str, Mapping[str, Any]] = {"change": {"command": {"stage": "test"}, "inputs": {"model": "m"}}}


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint."""
    return {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}


def tree(folder: Path) -> dict[str, bytes]:
    """Every file of a folder, byte for byte."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def parameters_of(stream: LayerStream, layer: int) -> dict[str, torch.Tensor]:
    """Copies of a layer's parameters by their names in the model."""
    state = stream.model.state_dict()
    names = {piece.parameter for piece in stream.weights.pieces(layer)}
    return {name: state[name].detach().clone() for name in names}


def experts_of(stream: LayerStream, layer: int) -> dict[str, torch.Tensor]:
    """Copies of the stacked experts of a layer, ``experts.down_proj`` and so on."""
    names = {piece.parameter for piece in stream.weights.pieces(layer, experts=True)}
    state = stream.model.state_dict()
    return {f"experts.{name.rpartition('.')[2]}": state[name].detach().clone() for name in names}


@pytest.mark.parametrize(
    "model_type", ["qwen3_moe", "mixtral", "gpt_oss", "deepseek_v3", "qwen3_5_moe", "ernie4_5_moe"]
)
def test_parameters_go_back_to_the_tensors_they_came_from(
    checkpoint_of: CheckpointOf, tmp_path: Path, model_type: str
) -> None:
    """Every parameter of every layer, written through changes, gives the source's bytes; so do config and MTP."""
    base = checkpoint_of(model_type)
    checkpoint = open_checkpoint(base)
    stream = LayerStream(checkpoint, device=torch.device("cpu"))
    with changing(checkpoint, tmp_path / "out", job=["keep"], overwrite=False) as changes:
        for layer in range(stream.depth):
            with stream.layer(layer):
                stored = stored_tensors(stream.weights, layer, parameters_of(stream, layer))
                changes.add(layer, stored, {"layer": layer})
        assert changes.record(1) == {"layer": 1}
        inside = [name for name in checkpoint.tensors if 0 <= checkpoint.roles[name].layer < stream.depth]
        assert changes.entries().keys() == set(inside)
        out = write_changed(checkpoint, changes, tmp_path / "out", records=RECORDS)
    before, after = tensors_of(base), tensors_of(out)
    assert after.keys() == before.keys()
    for name, value in before.items():
        assert after[name].dtype == value.dtype
        assert torch.equal(after[name].view(torch.uint8), value.view(torch.uint8)), name
    assert (out / "config.json").read_bytes() == (base / "config.json").read_bytes()
    assert verify_manifest(open_checkpoint(out)).tensors == len(before)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("stacked", [False, True])
def test_experts_may_be_fewer_and_narrower(checkpoint_of: CheckpointOf, tmp_path: Path, stacked: bool) -> None:
    """Eight experts of half the width take the places of sixteen, and transformers loads what comes out."""
    from transformers import AutoModelForCausalLM

    base = checkpoint_of("qwen3_moe", stacked=stacked)
    checkpoint = open_checkpoint(base)
    stream = LayerStream(checkpoint, device=torch.device("cpu"))
    keep = {layer: tuple(range(1, 16, 2)) for layer in checkpoint.moe_layers}
    made: dict[int, torch.Tensor] = {}
    with changing(checkpoint, tmp_path / "out", job=["fewer"], overwrite=False) as changes:
        for layer in checkpoint.moe_layers:
            with stream.layer(layer):
                whole = experts_of(stream, layer)
            gate_up = whole["experts.gate_up_proj"][:8].reshape(8, 2, 16, 32)[:, :, :8].reshape(8, 16, 32)
            made[layer] = gate_up * 2
            values = {"experts.gate_up_proj": gate_up * 2, "experts.down_proj": whole["experts.down_proj"][:8, :, :8]}
            changes.add(layer, stored_tensors(stream.weights, layer, values))
        edits = {"num_experts": 8, "moe_intermediate_size": 8}
        out = write_changed(
            checkpoint, changes, tmp_path / "out", keep=keep, config_edits=edits, records=RECORDS, extra={"note": b"x"}
        )
    model = AutoModelForCausalLM.from_pretrained(out)
    for layer, expected in made.items():
        mlp = model.model.layers[layer].mlp
        assert torch.equal(mlp.experts.gate_up_proj, expected)
        router = tensors_of(base)[f"model.layers.{layer}.mlp.gate.weight"]
        assert torch.equal(mlp.gate.weight, router[list(keep[layer])])
    assert (out / "moeprune" / "note").read_bytes() == b"x"
    assert open_checkpoint(out).num_experts == 8


def test_computed_numbers_are_stored_in_the_dtype_of_the_files(checkpoint_of: CheckpointOf, tmp_path: Path) -> None:
    """What was computed in float32 for a bfloat16 checkpoint is rounded to bfloat16 when it is kept."""
    checkpoint = open_checkpoint(checkpoint_of("mixtral", dtype="bfloat16"))
    name = next(name for name in checkpoint.tensors if name.endswith("gate.weight"))
    value = torch.rand(checkpoint.tensors[name].shape)
    with changing(checkpoint, tmp_path / "out", job=[], overwrite=False) as changes:
        changes.add(0, {name: value})
        out = write_changed(checkpoint, changes, tmp_path / "out", records=RECORDS)
    assert torch.equal(tensors_of(out)[name], value.bfloat16())


# --- interrupted ------------------------------------------------------------------------------------------------------


def doubled(checkpoint: Checkpoint, out: Path, *, stop: Callable[[Changes, int], None], job: str = "double") -> Path:
    """Double the router of every layer; ``stop`` is called after each layer."""
    tensors = tensors_of(checkpoint.path)
    with changing(checkpoint, out, job=[job], overwrite=False) as changes:
        for layer in checkpoint.moe_layers:
            name = f"model.layers.{layer}.block_sparse_moe.gate.weight"
            if not changes.finished(layer):
                changes.add(layer, {name: tensors[name] * 2})
                stop(changes, layer)
        return write_changed(checkpoint, changes, out, records=RECORDS, max_shard_size=30_000)


def go_on(_: Changes, __: int) -> None:
    """Do not stop."""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the writer is forked")
def test_a_killed_run_goes_on_after_its_last_layer(
    checkpoint_of: CheckpointOf, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """SIGKILL after the second of three layers: the next run computes only the third, and the bytes are the same."""
    checkpoint = open_checkpoint(checkpoint_of("mixtral"))
    expected = tree(doubled(checkpoint, tmp_path / "whole", stop=go_on))

    def die(_: Changes, layer: int) -> None:
        if layer == 1:
            os.kill(os.getpid(), signal.SIGKILL)

    child = os.fork()
    if not child:
        doubled(checkpoint, tmp_path / "out", stop=die)
        os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status)
    assert not (tmp_path / "out").exists()
    done: list[int] = []
    out = doubled(checkpoint, tmp_path / "out", stop=lambda _, layer: done.append(layer))
    assert done == [2]
    assert "going on after 2 finished layers" in capsys.readouterr().err
    assert tree(out) == expected
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]


def test_an_interrupt_keeps_finished_layers_and_nothing_else(
    checkpoint_of: CheckpointOf, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ctrl-C before the first layer leaves nothing; after it the layer stays, until another job takes the output."""
    checkpoint = open_checkpoint(checkpoint_of("mixtral"))

    def interrupt(_: Changes, __: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), changing(checkpoint, tmp_path / "out", job=[], overwrite=False):
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(KeyboardInterrupt):
        doubled(checkpoint, tmp_path / "out", stop=interrupt)
    assert "the same command will go on after 1 finished layer in" in capsys.readouterr().err
    done: list[int] = []
    doubled(checkpoint, tmp_path / "out", stop=lambda _, layer: done.append(layer), job="another")
    assert done == [0, 1, 2]
    assert "removing what an earlier run left" in capsys.readouterr().err


def test_shards_written_from_changes_are_gone_on_with(
    checkpoint_of: CheckpointOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that stops after the shards writes none of them again; other changes do not take them over."""
    checkpoint = open_checkpoint(checkpoint_of("mixtral"))

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(drop, "_write_records", interrupt)
        with pytest.raises(KeyboardInterrupt):
            doubled(checkpoint, tmp_path / "out", stop=go_on)
    partial = tmp_path / ".out.moeprune-partial"
    before = {path.name: path.stat().st_mtime_ns for path in partial.glob("*.safetensors")}
    out = doubled(checkpoint, tmp_path / "out", stop=interrupt)  # it computes no layer
    assert len(before) > 1
    assert {path.name: path.stat().st_mtime_ns for path in out.glob("*.safetensors")} == before


# --- refused ----------------------------------------------------------------------------------------------------------


def test_a_second_run_for_the_output_is_refused(checkpoint_of: CheckpointOf, tmp_path: Path) -> None:
    """While one computes, another one for the same folder stops before it changes anything."""
    checkpoint = open_checkpoint(checkpoint_of("mixtral"))

    def second(changes: Changes, _: int) -> None:
        with pytest.raises(ConfigError, match="another run is writing"):
            doubled(checkpoint, tmp_path / "out", stop=go_on, job="another")
        assert changes.finished(0)

    assert doubled(checkpoint, tmp_path / "out", stop=second).is_dir()


def test_tensors_that_nobody_has_are_refused(checkpoint_of: CheckpointOf, tmp_path: Path) -> None:
    """A name that the source lacks, or that its dropped experts had, stops the run before the output appears."""
    checkpoint = open_checkpoint(checkpoint_of("mixtral"))
    last = "model.layers.0.block_sparse_moe.experts.7.w1.weight"
    value = torch.zeros(checkpoint.tensors[last].shape)
    keep = dict.fromkeys(checkpoint.moe_layers, (0, 1, 2, 3))
    with pytest.raises(CheckpointError, match="does not have"), _changing(checkpoint, tmp_path) as changes:
        changes.add(0, {"model.layers.0.nothing": value})
    with _changing(checkpoint, tmp_path) as changes:
        changes.add(0, {last: value})
        with pytest.raises(CheckpointError, match="which the output does not have"):
            write_changed(checkpoint, changes, tmp_path / "out", keep=keep, records=RECORDS)
    assert not (tmp_path / "out").exists()
    stream = LayerStream(checkpoint, device=torch.device("cpu"))
    with pytest.raises(CheckpointError, match="'weight', and 7 parameters are called that"):
        stored_tensors(stream.weights, 0, {"weight": value})


def _changing(checkpoint: Checkpoint, folder: Path) -> Any:
    return changing(checkpoint, folder / "out", job=[], overwrite=False)


def test_quantised_sources_are_refused(checkpoint_of: CheckpointOf) -> None:
    """Arithmetic on packed weights is refused with what to do; plain weights pass."""
    checkpoint = open_checkpoint(checkpoint_of("mixtral"))
    check_plain(checkpoint, "healing")
    settings = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}
    packed = dataclasses.replace(checkpoint, config={**checkpoint.config, **settings})
    with pytest.raises(UnsupportedModelError, match=r"is quantised .* and healing computes new weights"):
        check_plain(packed, "healing")
