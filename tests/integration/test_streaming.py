"""Collecting layer by layer gives what loading the whole model gives, within its memory, and goes on after a kill."""

from __future__ import annotations

import gc
import json
import math
import os
import re
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import moeprune
from moeprune import cli, collecting
from moeprune._files import parse_size
from moeprune._options import CalibrationOptions
from moeprune.architectures import ARCHITECTURES
from moeprune.collectors import resident
from moeprune.errors import ConfigError
from moeprune.statistics import STATISTICS, RouterStatistics
from moeprune.streaming import forecast, naming, skeleton, weights
from moeprune.streaming.stream import LayerStream, padded

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

CheckpointOf = Callable[..., Path]
Loadable = Callable[[Path], Path]
DEPTH = 5
STACKED = ("qwen3_moe", "mixtral", "minimax_m2", "glm4_moe", "qwen3_next")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of token ids in two domains, of different lengths, so that batches have padding."""
    rng = np.random.default_rng(3)
    rows = [
        {"input_ids": rng.integers(0, 97, int(length)).tolist(), "domain": ("prose", "code")[number % 2]}
        for number, length in enumerate(rng.integers(8, 40, 24))
    ]
    file = tmp_path_factory.mktemp("data") / "calibration.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def collect(folder: Path, data: Path, output: Path | None = None, **options: Any) -> RouterStatistics:
    """Collect in about ten batches, layer by layer unless told otherwise."""
    given = {"stream": True, "batch_tokens": 100} | options
    return moeprune.collect(folder, output, calibration=str(data), **given)


def assert_close(found: RouterStatistics, expected: RouterStatistics) -> None:
    """Counts equal and sums to a millionth, of all data and of its first half."""
    assert found.tokens == expected.tokens > 0
    assert found.domains == expected.domains
    for part in ("layers", "first_half"):
        assert getattr(found, part).keys() == getattr(expected, part).keys() != set()
        for layer, arrays in getattr(expected, part).items():
            for name, array in arrays.items():
                scale = 0 if STATISTICS[name].integer else 1e-6
                own = getattr(found, part)[layer][name]
                np.testing.assert_allclose(own, array, rtol=scale, atol=scale * np.abs(array).max())


def small_memory(folder: Path, data: Path, how: str, **options: Any) -> int:
    """Bytes of memory that are one too few for the states beside the layers, or for whole layers."""
    room = moeprune.forecast(folder, calibration=str(data), stream=True, batch_tokens=100, memory=1 << 40, **options)
    assert room is not None
    assert (room.spill, room.chunked) == (False, False)
    memory = room.host - 1 - (room.states if how == "chunks" else 0)
    less = moeprune.forecast(folder, calibration=str(data), stream=True, batch_tokens=100, memory=memory, **options)
    assert less is not None
    assert (less.spill, less.chunked) == (True, how == "chunks")
    assert less.host <= memory
    return memory


# --- the same as the whole model --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_every_architecture_gives_the_same_bytes(
    model_type: str, dtype: str, checkpoint_of: CheckpointOf, loadable: Loadable, data: Path
) -> None:
    """Dense layers, hybrid attention, sparse attention, shared experts and biases: every sum is equal to the bit."""
    base = loadable(checkpoint_of(model_type, dtype=dtype))
    streamed, whole = collect(base, data), collect(base, data, stream=False)
    assert streamed.domains == ("code", "prose")
    assert streamed.to_bytes() == whole.to_bytes()


@pytest.mark.parametrize(
    ("model_type", "changes", "options"),
    [
        *((name, {"stacked": True}, {}) for name in STACKED),
        ("qwen3_moe", {"tie_word_embeddings": True}, {}),
        ("deepseek_v3", {}, {"dtype": "bfloat16"}),
        ("deepseek_v3", {"dtype": "bfloat16"}, {"dtype": "float32"}),
        ("qwen3_moe", {"dtype": "bfloat16"}, {"dtype": "float16"}),
    ],
    ids=str,
)
def test_other_layouts_and_dtypes_give_the_same_bytes(
    model_type: str, changes: dict[str, Any], options: dict[str, Any], checkpoint_of: CheckpointOf, data: Path
) -> None:
    """Experts in stacks on disk, a head that is the embedding, and numbers that are converted as they are read."""
    base = checkpoint_of(model_type, **changes)
    assert collect(base, data, **options).to_bytes() == collect(base, data, stream=False, **options).to_bytes()


@pytest.mark.parametrize("model_type", ["qwen3_moe", "deepseek_v3", "glm_moe_dsa"])
def test_states_in_files_give_the_same_bytes(model_type: str, checkpoint_of: CheckpointOf, data: Path) -> None:
    """Also where a layer hands on more than hidden states; with an output beside it and without."""
    base = checkpoint_of(model_type)
    expected = collect(base, data, stream=False).to_bytes()
    assert collect(base, data, memory=small_memory(base, data, "files")).to_bytes() == expected


@pytest.mark.parametrize(
    ("model_type", "stacked"),
    [*((name, stacked) for name in ("qwen3_moe", "mixtral") for stacked in (False, True)), ("gpt_oss", False)],
)
def test_chunks_of_experts_give_the_same_sums(
    model_type: str, stacked: bool, checkpoint_of: CheckpointOf, data: Path
) -> None:
    """A layer that does not fit runs some of its experts at a time."""
    base = checkpoint_of(model_type, stacked=stacked)
    expected = collect(base, data, stream=False)
    assert_close(collect(base, data, memory=small_memory(base, data, "chunks")), expected)


@pytest.mark.parametrize("tied", [False, True])
def test_logits_are_those_of_the_whole_model(
    tied: bool, checkpoint_of: CheckpointOf, model_of: Callable[..., PreTrainedModel]
) -> None:
    """After the last layer come the last norm and the head, whose matrix may be the embedding's."""
    import torch

    from moeprune.streaming.states import States

    model = model_of("qwen3_moe", tie_word_embeddings=tied)
    checkpoint = moeprune.open_checkpoint(checkpoint_of("qwen3_moe", tie_word_embeddings=tied))
    stream, states = LayerStream(checkpoint, device=torch.device("cpu")), States(1)
    inputs = padded([list(range(20)), list(range(30, 37))])
    with torch.inference_mode():
        stream.embed([inputs], states)
        for index in range(stream.depth):
            with stream.layer(index):
                states.put(0, stream.run(index, states.get(0), inputs))
        with stream.head():
            logits = stream.logits(states.get(0), inputs, torch.arange(3, 20))
        expected = model(**inputs).logits[:, 3:]
    assert ("lm_head.weight" in checkpoint.tensors) is not tied
    assert torch.equal(logits, expected)
    assert all(parameter.is_meta for parameter in stream.model.parameters())


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_names_are_found_without_the_library_s_loader(
    model_type: str, checkpoint_of: CheckpointOf, loadable: Loadable, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What transformers' loader says about names is private to it, and a later version may not say it."""
    base = loadable(checkpoint_of(model_type))
    expected = collect(base, data).to_bytes()
    monkeypatch.setattr(naming, "transformers_names", lambda *_: None)
    assert collect(base, data).to_bytes() == expected


def test_names_are_found_where_the_library_s_loader_is_gone(
    checkpoint_of: CheckpointOf, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A module that cannot be imported any longer is one that says nothing."""
    base = checkpoint_of("minimax_m2")
    expected = collect(base, data).to_bytes()
    monkeypatch.setitem(sys.modules, "transformers.core_model_loading", None)
    assert collect(base, data).to_bytes() == expected


# --- quantised sources ------------------------------------------------------------------------------------------------

Stored = dict[str, "torch.Tensor"]
Quantise = Callable[["torch.Tensor"], tuple[Stored, "torch.Tensor"]]  # what is stored by suffix, what it stands for


def quantised(base: Path, folder: Path, quantise: Quantise, which: str, method: dict[str, Any]) -> tuple[Path, Path]:
    """A copy of a checkpoint with quantised weights, and the plain one that it stands for."""
    from safetensors.torch import load_file, save_file

    config = json.loads((base / "config.json").read_text())
    found: list[Stored] = [{}, {}]
    for file in sorted(base.glob("*.safetensors")):
        for name, tensor in load_file(file).items():
            parts, plain = quantise(tensor) if re.search(which, name) else ({"": tensor}, tensor)
            found[0] |= {
                name.removesuffix(".weight") + suffix if suffix else name: part for suffix, part in parts.items()
            }
            found[1][name] = plain
    folders = (folder / "quantised", folder / "plain")
    for place, tensors, more in zip(folders, found, ({"quantization_config": method}, {}), strict=True):
        place.mkdir()
        save_file(tensors, place / "model.safetensors", metadata={"format": "pt"})
        (place / "config.json").write_text(json.dumps(config | more))
    return folders


def blocks_of_fp8(scales: str) -> Quantise:
    """Codes of eight bits, and a scale for each block of 128 x 128."""

    def quantise(tensor: torch.Tensor) -> tuple[Stored, torch.Tensor]:
        import torch

        draw = torch.Generator().manual_seed(tensor.numel())
        scale = (torch.rand([math.ceil(size / 128) for size in tensor.shape], generator=draw) + 0.5).to(
            getattr(torch, scales)
        )
        codes = tensor.to(torch.float8_e4m3fn)
        full = scale.float().repeat_interleave(128, 0).repeat_interleave(128, 1)[: len(codes), : codes.shape[1]]
        return {".weight": codes, ".weight_scale_inv": scale}, (codes.float() * full).to(tensor.dtype)

    return quantise


def packed_int4(tensor: torch.Tensor) -> tuple[Stored, torch.Tensor]:
    """Eight codes to a word, the first in the lowest bits, and a scale for each 16 columns of a row."""
    import torch

    groups = tensor.float().reshape(len(tensor), -1, 16)
    scale = (groups.abs().amax(-1) / 7).to(torch.bfloat16)
    codes = (groups / scale.float()[..., None]).round().clamp(-8, 7)
    words = (codes.long().reshape(len(tensor), -1, 8) + 8) << torch.arange(0, 32, 4)
    packed = words.sum(-1).to(torch.uint32).view(torch.int32)
    plain = (codes * scale.float()[..., None]).reshape(tensor.shape).to(tensor.dtype)
    shape = torch.tensor(tensor.shape)
    return {".weight_packed": packed, ".weight_scale": scale, ".weight_shape": shape}, plain


def mxfp4(tensor: torch.Tensor) -> tuple[Stored, torch.Tensor]:
    """Two codes of four bits to a byte and an exponent for each block of 32, decoded by transformers."""
    import torch
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    draw = torch.Generator().manual_seed(tensor.numel())
    experts, inputs, outputs = tensor.shape
    blocks = torch.randint(0, 256, (experts, outputs, inputs // 32, 16), dtype=torch.uint8, generator=draw)
    scales = torch.randint(118, 123, blocks.shape[:-1], dtype=torch.uint8, generator=draw)
    plain = convert_moe_packed_tensors(blocks, scales, dtype=tensor.dtype)
    return {"_blocks": blocks, "_scales": scales}, plain.contiguous()


FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
INT4 = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "config_groups": {"group_0": {"weights": {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 16}}},
}
WIDE = {"hidden_size": 256, "moe_intermediate_size": 144, "intermediate_size": 384, "dtype": "bfloat16"}
QUANTISED: dict[str, tuple[str, dict[str, Any], Quantise, str, dict[str, Any]]] = {
    "DeepSeek-V3 in FP8": ("deepseek_v3", WIDE, blocks_of_fp8("float32"), r"_proj\.weight$|_proj_with", FP8),
    "Qwen3 in FP8": ("qwen3_moe", WIDE, blocks_of_fp8("bfloat16"), r"_proj\.weight$", FP8),
    "Kimi-K2 in int4": ("deepseek_v3", {"dtype": "bfloat16"}, packed_int4, r"experts\.\d+\..*weight$", INT4),
    "gpt-oss in MXFP4": (
        "gpt_oss",
        {"hidden_size": 64, "intermediate_size": 96, "dtype": "bfloat16"},
        mxfp4,
        r"experts\.(gate_up|down)_proj$",
        {"quant_method": "mxfp4"},
    ),
}


@pytest.mark.parametrize("chunks", [False, True])
@pytest.mark.parametrize("name", QUANTISED)
def test_a_quantised_checkpoint_gives_what_its_numbers_give(
    name: str, chunks: bool, checkpoint_of: CheckpointOf, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without a GPU it runs layer by layer unasked: every sum equals that of the plain model, loaded whole."""
    model_type, changes, quantise, which, method = QUANTISED[name]
    source, plain = quantised(checkpoint_of(model_type, **changes), tmp_path, quantise, which, method)
    expected = collect(plain, data, stream=False)
    memory = small_memory(source, data, "chunks") if chunks else None
    found = collect(source, data, stream=None, memory=memory)
    assert "note: running layer by layer: its quantised weights" in capsys.readouterr().err
    for part in ("layers", "first_half"):
        for layer, arrays in getattr(expected, part).items():
            for statistic, array in arrays.items():
                np.testing.assert_array_equal(getattr(found, part)[layer][statistic], array)


UNREADABLE = {"quant_method": "modelopt", "quant_algo": "FP8"}


@pytest.mark.parametrize(
    ("method", "option", "said"),
    [
        ({"quant_method": "awq", "bits": 4}, "--stream", "weights that are quantised by awq cannot be read layer by"),
        (UNREADABLE, "--stream", "weights that are quantised by modelopt cannot be read layer by layer"),
        (UNREADABLE, "--no-stream", "transformers cannot load weights that are quantised by modelopt"),
        (UNREADABLE, "--num-samples=4", "transformers cannot load weights that are quantised by modelopt"),
        ({}, "--stream", "cannot tell what 'down_proj.weight_scale_inv' of an expert is"),
        ({}, "--no-stream", "quantised by a method that config.json does not name"),
    ],
)
def test_codes_are_never_taken_for_numbers(
    method: dict[str, Any],
    option: str,
    said: str,
    checkpoint_of: CheckpointOf,
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A method that nobody here knows is named in an error, whatever way the model is asked to run."""
    name, changes, quantise, which, _ = QUANTISED["Qwen3 in FP8"]
    source, _ = quantised(checkpoint_of(name, **changes), tmp_path, quantise, which, method)
    assert run_cli("collect", source, "--calibration", data, "-o", tmp_path / "out", option) == 2
    error = next(line for line in capsys.readouterr().err.splitlines() if line.startswith("error: "))
    assert said in error
    assert {file.name for file in tmp_path.iterdir()} == {"quantised", "plain"}


# --- what is read, and when -------------------------------------------------------------------------------------------

Event = tuple[str, int]  # what happened, and the decoder layer


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], list[Event]]:
    """Watch a checkpoint: gives the list of reads, announcements and batches that ran, as they happen."""

    def watch(folder: Path) -> list[Event]:
        found: list[Event] = []
        owners = {
            (entry.file, entry.begin): int((re.findall(r"\blayers\.(\d+)\.", name) or [-1])[0])
            for name, entry in moeprune.open_checkpoint(folder).tensors.items()
        }
        read, run, advise = weights._Files.read, LayerStream.run, weights._advise

        def watched_read(self: Any, file: Path, position: int, into: memoryview) -> None:
            found.append(("read", owners[file, position]))
            read(self, file, position, into)

        def watched_run(self: Any, index: int, *arguments: Any) -> Any:
            result = run(self, index, *arguments)
            found.append(("run", index))
            return result

        def watched_advise(runs: Any) -> None:
            found.extend(("announce", owners[file, begin]) for file, begin, _ in runs)
            advise(runs)

        monkeypatch.setattr(weights._Files, "read", watched_read)
        monkeypatch.setattr(LayerStream, "run", watched_run)
        monkeypatch.setattr(weights, "_advise", watched_advise)
        return found

    return watch


@pytest.mark.parametrize("how", ["layers", "files", "chunks"])
def test_layers_are_read_in_their_turn(
    how: str, checkpoint_of: CheckpointOf, data: Path, events: Callable[[Path], list[Event]]
) -> None:
    """Only the next layer is announced, while the one before it runs, and its bytes are read when that is through."""
    base = checkpoint_of("qwen3_moe", num_hidden_layers=DEPTH)
    memory = None if how == "layers" else small_memory(base, data, how)
    found = events(base)
    collect(base, data, memory=memory)
    places: dict[Event, list[int]] = {}
    for place, event in enumerate(found):
        places.setdefault(event, []).append(place)
    assert {layer for kind, layer in places if kind == "read"} == {-1, *range(DEPTH)}
    assert {layer for kind, layer in places if kind == "announce"} == {*range(1, DEPTH)}
    for layer in range(DEPTH):
        ran = places["run", layer]
        assert places["read", layer][0] < ran[0]
        for other in range(layer + 1, DEPTH):
            assert places["read", other][0] > ran[-1]
        for other in range(layer + 2, DEPTH):
            assert places["announce", other][0] > ran[-1]
    reads = [event for event in found if event[0] == "read"]
    once = len(moeprune.open_checkpoint(base).tensors) - 2  # without the last norm and the head
    assert (len(reads) == once) is (how != "chunks")


def test_a_slice_of_the_layers(
    checkpoint_of: CheckpointOf, data: Path, tmp_path: Path, events: Callable[[Path], list[Event]]
) -> None:
    """Slices are put together to the whole, byte for byte; nothing is read or run after the last layer of one."""
    base = checkpoint_of("qwen3_moe", num_hidden_layers=DEPTH)
    whole = collect(base, data, tmp_path / "whole")
    found = events(base)
    collect(base, data, tmp_path / "first", layers=(2, 0))
    assert {layer for _, layer in found} == {-1, 0, 1, 2}
    collect(base, data, tmp_path / "second", layers=(3, 4))
    resident = collect(base, data, tmp_path / "resident", layers=(3, 4), stream=False)
    assert (tmp_path / "resident").read_bytes() == (tmp_path / "second").read_bytes()
    assert list(resident.layers) == [3, 4]
    command = ["stats", "merge", *(str(tmp_path / name) for name in ("second", "first")), "-o", str(tmp_path / "both")]
    assert cli.run(command) == 0
    merged = RouterStatistics.load(tmp_path / "both")
    for part in ("layers", "first_half"):
        assert list(getattr(merged, part)) == [0, 2, 3, 4]
        for layer, arrays in getattr(whole, part).items():
            assert all(
                getattr(merged, part)[layer][name].tobytes() == array.tobytes() for name, array in arrays.items()
            )
    plans = [moeprune.plan(one, base, ratio=0.5).layers for one in (whole, merged)]
    assert plans[0] == plans[1]


def test_two_processes_add_up_to_one(checkpoint_of: CheckpointOf, data: Path, tmp_path: Path) -> None:
    """Each runs its share of the batches through the layers, in step with the other."""
    base, output = checkpoint_of("deepseek_v3"), tmp_path / "two.safetensors"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "moeprune"]
    command += ["collect", str(base), "--calibration", str(data), "--batch-tokens=100", "--stream", "-o", str(output)]
    done = subprocess.run(
        command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert_close(RouterStatistics.load(output), collect(base, data, stream=False))
    assert [file.name for file in tmp_path.iterdir()] == [output.name]


# --- what fits --------------------------------------------------------------------------------------------------------


def run_cli(*arguments: str | Path) -> int:
    """The command line in this process."""
    return cli.run([str(argument) for argument in arguments])


@pytest.mark.parametrize("model_type", ["qwen3_moe", "deepseek_v3"])
def test_what_is_said_to_be_enough_is_enough(
    model_type: str, checkpoint_of: CheckpointOf, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Too little memory is refused with an amount that works, with a single expert of a layer at a time."""
    base, output = checkpoint_of(model_type), tmp_path / "out.safetensors"
    command = ("collect", base, "--calibration", data, "--batch-tokens=100", "--stream", "-o", output)
    assert run_cli(*command, "--memory=1MB") == 2
    error, hint = capsys.readouterr().err.splitlines()
    needed = re.fullmatch(r"error: one layer with .* at a time takes (.*), and there are 1\.0 MB", error)
    assert needed is not None
    assert hint == "hint: raise --memory, or run smaller batches with --batch-tokens"
    enough = needed[1].replace(" ", "")
    assert run_cli(*command, f"--memory={enough}", "--dry-run", "--json") == 0
    assert json.loads(capsys.readouterr().out)["forecast"]["host"] <= parse_size(enough)
    assert run_cli(*command, f"--memory={enough}") == 0
    assert_close(RouterStatistics.load(output), collect(base, data, stream=False))


def test_a_single_expert_at_a_time(checkpoint_of: CheckpointOf, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The smallest chunk gives the same sums."""
    base = checkpoint_of("deepseek_v3")
    monkeypatch.setattr(forecast, "_LIBRARIES", 0)
    with pytest.raises(ConfigError, match="takes") as refused:
        collect(base, data, memory=1)
    enough = parse_size(refused.value.message.split("takes ")[1].split(",")[0].replace(" ", ""))
    chunks = [one_chunk(base, data, memory) for memory in range(enough, 2 * enough, enough // 20)]
    assert chunks == sorted(chunks)
    assert chunks[0] <= 2 < chunks[-1]
    least = next(memory for memory in range(enough, 0, -enough // 200) if one_chunk(base, data, memory) == 1)
    assert_close(collect(base, data, memory=least), collect(base, data, stream=False))


def one_chunk(base: Path, data: Path, memory: int) -> int:
    """Experts at a time in that much memory."""
    room = moeprune.forecast(base, calibration=str(data), stream=True, batch_tokens=100, memory=memory)
    assert room is not None
    assert room.host <= memory
    return room.chunk


@pytest.mark.parametrize("chunks", [False, True])
def test_the_forecast_says_what_is_read(
    chunks: bool, checkpoint_of: CheckpointOf, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every byte that the layers need once; in chunks the experts once a batch at most."""
    base, read, seen = checkpoint_of("deepseek_v3"), weights._Files.read, []
    memory = small_memory(base, data, "chunks") if chunks else None
    room = moeprune.forecast(base, calibration=str(data), stream=True, batch_tokens=100, memory=memory)
    assert room is not None

    def counted(self: Any, file: Path, position: int, into: memoryview) -> None:
        seen.append(len(into))
        read(self, file, position, into)

    monkeypatch.setattr(weights._Files, "read", counted)
    collect(base, data, memory=memory)
    if chunks:
        assert 0.8 * room.read < sum(seen) <= room.read
    else:
        assert sum(seen) == room.read


@pytest.mark.parametrize(
    ("free", "reason"),
    [
        (forecast.Limits(host=1 << 30), "loaded whole it takes 1.1 GB, and there are 1.1 GB"),
        (forecast.Limits(host=1 << 40), ""),
    ],
)
def test_a_model_that_does_not_fit_runs_layer_by_layer(
    free: forecast.Limits,
    reason: str,
    checkpoint_of: CheckpointOf,
    data: Path,
    events: Callable[[Path], list[Event]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Nobody has to ask for it, and a note says why."""
    base = checkpoint_of("qwen3_moe")
    expected = collect(base, data, stream=False).to_bytes()
    monkeypatch.setattr(forecast, "free_memory", lambda _: free)
    found = events(base)
    capsys.readouterr()
    assert collect(base, data, stream=None).to_bytes() == expected
    assert capsys.readouterr().err == (f"note: running layer by layer: {reason}\n" if reason else "")
    assert bool(found) is bool(reason)


def test_a_dry_run_says_what_it_would_take(
    checkpoint_of: CheckpointOf, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Memory, disk and reading, in words and as JSON, of both commands; nothing is written."""
    base = checkpoint_of("qwen3_moe")
    given = (base, "--calibration", data, "-o", tmp_path / "out", "--batch-tokens=100", "--dry-run")
    memory = f"--memory={small_memory(base, data, 'chunks')}"
    assert run_cli("collect", *given, memory) == 0
    words = capsys.readouterr().out
    assert re.search(r"collecting: \d+ experts of a layer at a time, hidden states in files; at most .* to read", words)
    assert "dry run: nothing was written" in words
    assert run_cli("collect", *given, "--stream") == 0
    assert "collecting: one layer at a time, hidden states in memory; at most" in capsys.readouterr().out
    assert run_cli("collect", *given) == 0
    assert "collecting: the whole model is loaded" in capsys.readouterr().out
    expected = moeprune.forecast(base, tmp_path / "out", calibration=str(data), batch_tokens=100, stream=True)
    assert expected is not None
    for command in ("collect", "prune"):
        more = ("--ratio=0.5",) if command == "prune" else ()
        assert run_cli(command, *given, "--stream", "--json", *more) == 0
        found = json.loads(capsys.readouterr().out)
        assert found["forecast"] == expected.to_dict()
        assert found["written"] is False
        assert run_cli(command, *given, "--stream", *more) == 0
        assert f"at most {expected}" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_a_device_gets_its_weights_through_main_memory(checkpoint_of: CheckpointOf, data: Path) -> None:
    """Both memories have limits of their own; what is too small is named."""
    import torch

    base = moeprune.open_checkpoint(checkpoint_of("qwen3_moe"))
    stream = LayerStream(base, device=torch.device("cpu"))
    load = forecast.Load(shapes=[(4, 32)], last=2)
    room = forecast.forecast(stream.weights, load, forecast.Limits(host=1 << 30, device=1 << 30))
    assert room.device == room.layer + room.work
    assert room.host >= room.states
    with pytest.raises(ConfigError, match=r"a single expert at a time takes .*, and there are 1\.0 kB") as refused:
        forecast.forecast(stream.weights, load, forecast.Limits(host=1 << 30, device=1000))
    assert "--device-memory" in refused.value.hint
    with pytest.raises(ConfigError, match="passes through memory that takes") as refused:
        forecast.forecast(stream.weights, load, forecast.Limits(host=1 << 20, device=1 << 30))
    assert "--memory" in refused.value.hint


@pytest.mark.parametrize("stream", [True, False])
def test_the_model_is_gone_when_the_statistics_are_there(
    stream: bool, checkpoint_of: CheckpointOf, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What follows, such as writing a checkpoint, has all of the memory."""
    made: list[weakref.ref[Any]] = []
    open_stream, load_model = collecting.open_stream, resident.load_model

    def remembered(model: Any) -> Any:
        made.append(weakref.ref(model))
        return model

    monkeypatch.setattr(collecting, "open_stream", lambda *given: remembered(open_stream(*given)))
    monkeypatch.setattr(resident, "load_model", lambda *given, **more: remembered(load_model(*given, **more)))
    checkpoint = moeprune.open_checkpoint(checkpoint_of("qwen3_moe"))
    settings = CalibrationOptions(sources=(str(data),), stream=stream)
    with collecting.collected(checkpoint, settings, settings.load(checkpoint)) as statistics:
        gc.collect()
        assert [reference() for reference in made] == [None]
        assert statistics.tokens


def test_the_skeleton_is_never_in_memory(checkpoint_of: CheckpointOf, monkeypatch: pytest.MonkeyPatch) -> None:
    """A parameter may be larger than what there is: it is not even asked for before it is given up."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    made: list[int] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, call: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
            result = call(*arguments, **(options or {}))
            if isinstance(result, torch.Tensor) and not result.is_meta:
                made.append(result.numel())
            return result

    checkpoint = moeprune.open_checkpoint(checkpoint_of("qwen3_next"))
    monkeypatch.setattr(skeleton, "_LARGE", 1000)
    with Watch():
        model = skeleton.build_skeleton(checkpoint)
    assert max(made, default=0) <= 1000 < max(parameter.numel() for parameter in model.parameters())
    assert all(parameter.is_meta for parameter in model.parameters())
    assert not any(buffer.is_meta for buffer in model.buffers())
