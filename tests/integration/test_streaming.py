"""Collecting layer by layer gives what loading the whole model gives, within its memory, and goes on after a kill."""

from __future__ import annotations

import json
import math
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import moeprune
from moeprune import collecting
from moeprune.architectures import ARCHITECTURES
from moeprune.collectors import stream as collector
from moeprune.errors import CheckpointError, ConfigError
from moeprune.statistics import STATISTICS, RouterStatistics
from moeprune.streaming import naming
from moeprune.streaming.stream import LayerStream, padded

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

CheckpointOf = Callable[..., Path]
Loadable = Callable[[Path], Path]
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
    assert not (room.spill or room.chunked)
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


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("model_type", ["qwen3_moe", "deepseek_v3", "mixtral", "gpt_oss"])
def test_chunks_of_experts_give_the_same_sums(
    model_type: str, stacked: bool, checkpoint_of: CheckpointOf, data: Path
) -> None:
    """A layer that does not fit runs some of its experts at a time, down to a single one."""
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
            found[0] |= {name.removesuffix(".weight") + suffix if suffix else name: part for suffix, part in parts.items()}
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
