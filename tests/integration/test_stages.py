"""The stages through the Python API: each from its files alone, all at once, twice, in halves, and cut short."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import moeprune
from moeprune.checkpoint import INDEX, open_checkpoint
from moeprune.errors import CheckpointError, ConfigError, PlanError, StaleArtifactError, StrategyError
from moeprune.rewrite import copying, shards
from moeprune.rewrite.drop import apply_drop
from moeprune.statistics import STATISTICS, merge_statistics

CheckpointOf = Callable[..., Path]
BATCH = {"batch_tokens": 128}  # several batches per domain


def tree(folder: Path) -> dict[str, bytes]:
    """Every file of a folder, byte for byte."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def check_arrays(found: moeprune.RouterStatistics, expected: moeprune.RouterStatistics) -> None:
    """Integers equal, sums to 1e-6 of the largest of their kind, in any order of the domains."""
    assert sorted(found.domains) == sorted(expected.domains)
    rows = [found.domains.index(domain) for domain in expected.domains]
    assert found.layers.keys() == expected.layers.keys()
    for layer, arrays in expected.layers.items():
        for name, array in arrays.items():
            values = found.layers[layer][name][rows]
            if STATISTICS[name].integer:
                np.testing.assert_array_equal(values, array, err_msg=name)
            else:
                np.testing.assert_allclose(values, array, rtol=1e-6, atol=1e-6 * np.abs(array).max(), err_msg=name)


# --- in order ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model_type", "changes"),
    [
        ("qwen3_moe", {}),
        ("deepseek_v3", {}),
        ("olmoe", {"tie_word_embeddings": True}),
        ("mixtral", {"dtype": "bfloat16"}),
    ],
    ids=str,
)
def test_each_stage_needs_only_the_file_before_it(
    model_type: str, changes: dict[str, Any], checkpoint_of: CheckpointOf, ids_file: Path, tmp_path: Path
) -> None:
    """Collect, plan, apply and verify, each from files, return what they wrote; transformers loads the result."""
    import torch
    from transformers import AutoModelForCausalLM

    base = checkpoint_of(model_type, **changes)
    statistics, plan = tmp_path / "statistics.safetensors", tmp_path / "plan.json"
    collected = moeprune.collect(base, statistics, calibration=str(ids_file), **BATCH)
    assert moeprune.RouterStatistics.load(statistics).to_bytes() == collected.to_bytes() == statistics.read_bytes()
    planned = moeprune.plan(statistics, base, ratio=0.5, output=plan)
    assert moeprune.PruningPlan.load(plan).layers.keys() == planned.layers.keys()
    assert all(
        layer.keep == planned.layers[index].keep for index, layer in moeprune.PruningPlan.load(plan).layers.items()
    )
    out = moeprune.apply(base, plan, tmp_path / "out")
    proof = moeprune.verify(base, out)
    assert proof.tensors == len(open_checkpoint(out).tensors)
    assert proof.files == 3  # generation config, tokenizer config, licence
    pruned = AutoModelForCausalLM.from_pretrained(out)
    assert torch.isfinite(pruned(torch.tensor([[1, 2, 3]])).logits).all()


@pytest.mark.parametrize("model_type", ["qwen3_moe", "deepseek_v3"])
def test_one_shot_equals_the_stages(
    model_type: str, checkpoint_of: CheckpointOf, ids_file: Path, tmp_path: Path
) -> None:
    """``prune`` writes the bytes that the stages write, and keeps the statistics beside the plan."""
    base = checkpoint_of(model_type)
    statistics, plan = tmp_path / "statistics.safetensors", tmp_path / "plan.json"
    moeprune.collect(base, statistics, calibration=str(ids_file), **BATCH)
    moeprune.plan(statistics, base, ratio=0.5, output=plan)
    staged = tree(moeprune.apply(base, plan, tmp_path / "staged"))
    result = moeprune.prune(base, tmp_path / "one", ratio=0.5, calibration=str(ids_file), **BATCH)
    one = tree(tmp_path / "one")
    assert one.pop("moeprune/statistics.safetensors") == statistics.read_bytes()
    assert one["moeprune/plan.json"] == plan.read_bytes()
    assert one == staged
    assert result.verification == moeprune.verify(base, tmp_path / "staged")
    assert result.report is None


def test_equal_runs_give_equal_bytes(checkpoint_of: CheckpointOf, ids_file: Path, tmp_path: Path) -> None:
    """The same options and seed give the same statistics, plan and checkpoint, wherever the files lie."""
    base = checkpoint_of("deepseek_v3")
    trees = []
    for name, seed in (("first", 3), ("second", 3), ("third", 4)):
        model = shutil.copytree(base, tmp_path / name / f"model-{name}")
        data = shutil.copy(ids_file, tmp_path / name)
        out = tmp_path / name / "out"
        moeprune.prune(
            model, out, ratio="0.5", calibration=str(data), strategy="random", seed=seed, shuffle=True, num_samples=20,
            **BATCH,
        )  # fmt: skip
        trees.append(tree(out))
    assert "moeprune/statistics.safetensors" in trees[0]
    assert trees[0] == trees[1]
    assert trees[0].keys() == trees[2].keys()
    for name in ("moeprune/statistics.safetensors", "moeprune/plan.json", "model.safetensors"):
        assert trees[0][name] != trees[2][name]


@pytest.mark.parametrize("model_type", ["qwen3_moe", "deepseek_v3"])
def test_two_halves_make_a_whole(model_type: str, checkpoint_of: CheckpointOf, ids_file: Path, tmp_path: Path) -> None:
    """Statistics of two halves of the rows, merged, are those of all rows, though the batches differ."""
    base, lines = checkpoint_of(model_type), ids_file.read_text().splitlines(keepends=True)
    parts = []
    for name, rows in (("a", lines[:11]), ("b", lines[11:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(rows))
        file = tmp_path / f"{name}.safetensors"
        moeprune.collect(base, file, calibration=str(tmp_path / f"{name}.jsonl"), **BATCH)
        parts.append(moeprune.RouterStatistics.load(file))
    whole = moeprune.collect(base, calibration=str(ids_file), **BATCH)
    for merged in (parts[0].merge(parts[1]), parts[1].merge(parts[0])):
        check_arrays(merged, whole)
        assert (
            moeprune.plan(merged, base, ratio=0.5).layers[2].keep
            == moeprune.plan(whole, base, ratio=0.5).layers[2].keep
        )
    assert all(0 < part.tokens < whole.tokens for part in parts)


@pytest.mark.parametrize("stream", [False, True], ids=["in memory", "streamed"])
def test_slices_of_layers_make_a_whole(
    stream: bool, checkpoint_of: CheckpointOf, ids_file: Path, tmp_path: Path
) -> None:
    """A slice of the layers is no basis for a plan; slices put together are, as if all had been collected at once."""
    base = checkpoint_of("deepseek_v3")
    given = {"calibration": str(ids_file), "stream": stream, **BATCH}
    files = [tmp_path / "second", tmp_path / "first"]
    slices = [
        moeprune.collect(base, file, layers=layers, **given) for file, layers in zip(files, [(2,), (1,)], strict=True)
    ]
    with pytest.raises(StaleArtifactError, match=r"lack layers 1 .*stats merge"):
        moeprune.plan(slices[0], base, ratio=0.5)
    merged = merge_statistics(map(moeprune.RouterStatistics.load, files))
    whole = moeprune.collect(base, calibration=str(ids_file), stream=stream, **BATCH)
    check_arrays(merged, whole)
    assert (merged.provenance, merged.inputs) == (whole.provenance, whole.inputs)
    first, second = (moeprune.plan(one, base, ratio=0.5) for one in (merged, whole))
    assert {layer: one.keep for layer, one in first.layers.items()} == {
        layer: one.keep for layer, one in second.layers.items()
    }
    assert first.stability == second.stability


def test_batches_do_not_matter(checkpoint_of: CheckpointOf, ids_file: Path) -> None:
    """Rows one by one, without padding, give the same statistics as rows padded together."""
    base = checkpoint_of("deepseek_v3")
    alone = moeprune.collect(base, calibration=str(ids_file), batch_tokens=1)
    check_arrays(moeprune.collect(base, calibration=str(ids_file), batch_tokens=10_000), alone)
    rows = [json.loads(line) for line in ids_file.read_text().splitlines()]
    for domain in ("prose", "code"):
        tokens = sum(len(row["input_ids"]) for row in rows if row["domain"] == domain)
        assert alone.layers[1]["tokens"][alone.domains.index(domain)] == tokens
        assert alone.layers[1]["count"][alone.domains.index(domain)].sum() == 3 * tokens


def test_the_default_folder_says_what_was_kept(
    checkpoint_of: CheckpointOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without an output the result lies in ``./<name>-<kept>of<E>``."""
    base = shutil.copytree(checkpoint_of("qwen3_moe"), tmp_path / "models" / "tiny-base")
    monkeypatch.chdir(tmp_path)
    result = moeprune.prune(base, keep=6, strategy="random")
    assert result.output == Path("tiny-base-6of16")
    assert moeprune.verify(base, tmp_path / "tiny-base-6of16").tensors > 0


# --- the plan is a file for people ------------------------------------------------------------------------------------


def test_an_edited_keep_list_is_obeyed(checkpoint_of: CheckpointOf, tmp_path: Path) -> None:
    """Only the keep-lists of the file steer ``apply``: the edited one is executed, everything else follows from it."""
    base, file = checkpoint_of("mixtral"), tmp_path / "plan.json"
    moeprune.plan(moeprune.collect(base), base, keep=4, strategy="random", output=file)
    edited = json.loads(file.read_text())
    for entry in edited["layers"].values():
        entry["keep"] = [0, 1, 2, 5, 7]
    file.write_text(json.dumps(edited))
    out = moeprune.apply(base, file, tmp_path / "out")
    assert moeprune.verify(base, out).tensors > 0
    source, result = open_checkpoint(base), open_checkpoint(out)
    assert result.config["num_local_experts"] == result.num_experts == 5
    name = "model.layers.1.block_sparse_moe.experts.{}.w2.weight"
    blocks = [checkpoint.tensors[name.format(number)] for checkpoint, number in ((result, 3), (source, 5))]
    assert len({entry.file.read_bytes()[entry.begin : entry.end] for entry in blocks}) == 1
    for keep, problem in (([0, 1, 1, 5], "ascending"), ([0, 1, 2, 8], "0 to 7"), ([0, 1, 2, 3], "different numbers")):
        edited["layers"]["1"]["keep"] = keep
        file.write_text(json.dumps(edited))
        with pytest.raises(PlanError, match=problem):
            moeprune.apply(base, file, tmp_path / "refused")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "plan.json"]


def test_files_of_another_model_are_refused(checkpoint_of: CheckpointOf, tmp_path: Path) -> None:
    """Statistics and plans of a fine-tune with the same shapes and config do not pass."""
    base = checkpoint_of("qwen3_moe")
    other = shutil.copytree(base, tmp_path / "fine-tune")
    entry = open_checkpoint(other).tensors["model.layers.0.mlp.gate.weight"]
    data = bytearray(entry.file.read_bytes())
    data[entry.begin] ^= 1
    entry.file.write_bytes(data)
    statistics = moeprune.collect(base)
    plan = moeprune.plan(statistics, base, ratio=0.5, strategy="random")
    with pytest.raises(StaleArtifactError, match="statistics were made for another model than fine-tune"):
        moeprune.plan(statistics, other, ratio=0.5, strategy="random")
    with pytest.raises(StaleArtifactError, match="plan was made for another model than fine-tune"):
        moeprune.apply(other, plan, tmp_path / "out")
    with pytest.raises(StaleArtifactError, match="different models"):
        statistics.merge(moeprune.collect(other))
    with pytest.raises(StaleArtifactError):
        moeprune.verify(other, moeprune.apply(base, plan, tmp_path / "good"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fine-tune", "good"]


def test_statistics_of_no_data_serve_the_control_only(checkpoint_of: CheckpointOf, tmp_path: Path) -> None:
    """Without calibration data only ``random`` can plan; the others say what they lack."""
    base, file = checkpoint_of("olmoe"), tmp_path / "statistics.safetensors"
    assert moeprune.collect(base, file).tokens == 0
    assert moeprune.plan(file, base, ratio=0.5, strategy="random").kept == 6
    for strategy in ("frequency", "reap", "hope-total", "gram"):
        with pytest.raises(StrategyError, match="statistics file has no"):
            moeprune.plan(file, base, ratio=0.5, strategy=strategy)
        with pytest.raises(ConfigError, match="needs calibration data"):
            moeprune.prune(base, tmp_path / "out", ratio=0.5, strategy=strategy)
    assert [path.name for path in tmp_path.iterdir()] == ["statistics.safetensors"]


# --- what goes wrong --------------------------------------------------------------------------------------------------


def test_a_checkpoint_that_lacks_a_plain_tensor_is_not_run(
    checkpoint_of: CheckpointOf, ids_file: Path, tmp_path: Path
) -> None:
    """Instead of filling it with random numbers, which transformers does with a warning, the run is refused."""
    from safetensors.torch import load_file, save_file

    base = shutil.copytree(checkpoint_of("qwen3_moe"), tmp_path / "base")
    index = json.loads((base / INDEX).read_text())
    shard = base / index["weight_map"].pop("model.layers.1.input_layernorm.weight")
    tensors = load_file(shard)
    del tensors["model.layers.1.input_layernorm.weight"]
    save_file(tensors, shard, metadata={"format": "pt"})
    (base / INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"lacks tensors .* such as 'model\.layers\.1\.input_layernorm"):
        moeprune.collect(base, tmp_path / "statistics.safetensors", calibration=str(ids_file))
    assert not (tmp_path / "statistics.safetensors").exists()


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"dtype": "int3"}, "unknown --dtype"),
        ({"dtype": "nn"}, "unknown --dtype"),
        ({"device": "gpu"}, "unknown --device"),
        ({"device": "cuda:99"}, "--device cuda:99: there are"),
    ],
)
def test_an_unknown_dtype_or_device_is_refused(
    options: dict[str, Any], problem: str, checkpoint_of: CheckpointOf, ids_file: Path
) -> None:
    """The message names the option."""
    with pytest.raises(ConfigError, match=problem):
        moeprune.collect(checkpoint_of("qwen3_moe"), calibration=str(ids_file), **options)


@pytest.mark.parametrize("old", [False, True], ids=["new", "overwrite"])
def test_a_source_that_breaks_leaves_nothing(old: bool, checkpoint_of: CheckpointOf, tmp_path: Path) -> None:
    """A shard that shrinks while it is copied fails the run; no folder appears, and an old one stays as it was."""
    base = shutil.copytree(checkpoint_of("qwen3_moe"), tmp_path / "base")
    plan = moeprune.plan(moeprune.collect(base), base, ratio=0.5, strategy="random")
    out = tmp_path / "out"
    if old:
        out.mkdir()
        (out / "precious.txt").write_text("old")
    checkpoint = open_checkpoint(base)
    assert checkpoint.fingerprint  # read before the damage
    last = max(base.glob("*.safetensors"))
    last.write_bytes(last.read_bytes()[:-64])
    with pytest.raises(CheckpointError, match="ended early"):
        apply_drop(checkpoint, plan, out, overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == (["base", "out"] if old else ["base"])
    assert not old or tree(out) == {"precious.txt": b"old"}


@pytest.mark.parametrize("stage", ["apply", "prune"])
def test_an_interrupt_leaves_nothing(
    stage: str, checkpoint_of: CheckpointOf, ids_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C before the first shard is finished leaves neither a folder nor anything hidden beside it."""
    written = 0
    write = shards._write_all

    def interrupt(*args: Any) -> None:
        nonlocal written
        written += 1
        if written == 50:
            raise KeyboardInterrupt
        write(*args)

    base = checkpoint_of("qwen3_moe")
    plan = moeprune.plan(moeprune.collect(base), base, ratio=0.5, strategy="random")
    monkeypatch.setattr(copying, "_BUFFER", 1024)
    monkeypatch.setattr(shards, "_write_all", interrupt)
    folder = tmp_path / "here"
    folder.mkdir()
    run: Callable[[], Any] = {
        "apply": lambda: moeprune.apply(base, plan, folder / "out"),
        "prune": lambda: moeprune.prune(base, folder / "out", ratio=0.5, calibration=str(ids_file)),
    }[stage]
    with pytest.raises(KeyboardInterrupt):
        run()
    assert written == 50
    assert list(folder.iterdir()) == []
