"""Every format of quantised experts goes through byte for byte, and lists that name experts follow them.

The checkpoints are written and read back here by hand: nothing of moeprune decides what is expected.
"""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import moeprune
from moeprune.errors import CheckpointError, LayoutError

if TYPE_CHECKING:
    import torch

PlanByHand = Callable[..., moeprune.PruningPlan]
Shapes = dict[str, tuple[str, list[int]]]
Stored = dict[str, tuple[str, list[int], bytes]]
E, H, INNER, GROUP = 8, 64, 32, 32
BYTES = {"F32": 4, "I32": 4, "BF16": 2, "F16": 2, "F8_E4M3": 1, "F8_E8M0": 1, "U8": 1, "I64": 8}

# Tensors of one projection [INNER, H] of one expert, as each format writes them.
FORMATS: dict[str, Shapes] = {
    "bf16": {"weight": ("BF16", [INNER, H])},
    "fp16": {"weight": ("F16", [INNER, H])},
    "fp32": {"weight": ("F32", [INNER, H])},
    "block fp8": {"weight": ("F8_E4M3", [INNER, H]), "weight_scale_inv": ("F32", [1, 1])},
    "compressed-tensors fp8": {
        "weight": ("F8_E4M3", [INNER, H]),
        "weight_scale": ("BF16", [INNER, 1]),
        "input_scale": ("BF16", [1]),
    },
    "compressed-tensors int4": {
        "weight_packed": ("I32", [INNER, H // 8]),
        "weight_scale": ("BF16", [INNER, H // GROUP]),
        "weight_zero_point": ("I32", [INNER // 8, H // GROUP]),
        "weight_shape": ("I64", [2]),
        "weight_g_idx": ("I32", [H]),
    },
    "compressed-tensors nvfp4": {
        "weight_packed": ("U8", [INNER, H // 2]),
        "weight_scale": ("F8_E4M3", [INNER, H // 16]),
        "weight_global_scale": ("F32", [1]),
        "input_global_scale": ("F32", [1]),
    },
    "modelopt nvfp4": {
        "weight": ("U8", [INNER, H // 2]),
        "weight_scale": ("F8_E4M3", [INNER, H // 16]),
        "weight_scale_2": ("F32", []),
        "input_scale": ("F32", []),
    },
    "awq": {
        "qweight": ("I32", [H, INNER // 8]),
        "qzeros": ("I32", [H // GROUP, INNER // 8]),
        "scales": ("F16", [H // GROUP, INNER]),
    },
    "gptq": {
        "qweight": ("I32", [H // 8, INNER]),
        "qzeros": ("I32", [H // GROUP, INNER // 8]),
        "scales": ("F16", [H // GROUP, INNER]),
        "g_idx": ("I32", [H]),
    },
}
# All experts of a layer in one tensor each, as the two families that store them so write them.
STACKED: dict[str, Shapes] = {
    "gpt-oss mxfp4": {
        "gate_up_proj_blocks": ("U8", [E, 2 * INNER, H // 32, 16]),
        "gate_up_proj_scales": ("U8", [E, 2 * INNER, H // 32]),
        "gate_up_proj_bias": ("BF16", [E, 2 * INNER]),
        "down_proj_blocks": ("U8", [E, H, INNER // 32, 16]),
        "down_proj_scales": ("F8_E8M0", [E, H, INNER // 32]),
        "down_proj_bias": ("BF16", [E, H]),
    },
    "stacked fp8": {
        "gate_up_proj": ("F8_E4M3", [E, 2 * INNER, H]),
        "gate_up_proj_scale_inv": ("F32", [E, 1, 1]),
        "down_proj": ("F8_E4M3", [E, H, INNER]),
        "down_proj_scale_inv": ("F32", [E, 1, 1]),
    },
}
DEEPSEEK = {
    "model_type": "deepseek_v3",
    "num_hidden_layers": 3,
    "first_k_dense_replace": 1,
    "n_routed_experts": E,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "num_nextn_predict_layers": 1,
}
GPT_OSS = {"model_type": "gpt_oss", "num_hidden_layers": 2, "num_local_experts": E, "num_experts_per_tok": 2}
QWEN = {"model_type": "qwen3_moe", "num_hidden_layers": 2, "num_experts": E, "num_experts_per_tok": 2}
_ROUTED = re.compile(r"(model\.layers\.(\d+)\.mlp\.experts\.)(\d+)(\..+)")
_ROWS = re.compile(r"model\.layers\.(\d+)\.mlp\.(experts\.\D.*|router\..*|gate\.[we].*)")


def per_expert(parts: Shapes) -> Shapes:
    """A DeepSeek-V3 of a dense layer, two MoE layers and an MTP layer."""
    shapes: Shapes = {"model.embed_tokens.weight": ("BF16", [9, H]), "lm_head.weight": ("BF16", [9, H])}
    shapes["model.layers.0.mlp.gate_proj.weight"] = ("BF16", [INNER, H])
    for layer in (1, 2, 3):
        block = f"model.layers.{layer}.mlp"
        shapes[f"{block}.gate.weight"] = ("BF16", [E, H])
        shapes[f"{block}.gate.e_score_correction_bias"] = ("F32", [E])
        shapes[f"{block}.shared_experts.up_proj.weight"] = ("BF16", [INNER, H])
        for expert in range(E):
            for projection in ("gate_proj", "up_proj", "down_proj"):
                shapes |= {f"{block}.experts.{expert}.{projection}.{part}": shape for part, shape in parts.items()}
    return shapes | {"model.layers.3.eh_proj.weight": ("BF16", [H, 2 * H])}


def stacked(parts: Shapes, router: Shapes) -> Shapes:
    """Two MoE layers whose experts are stacked."""
    shapes: Shapes = {"model.embed_tokens.weight": ("BF16", [9, H])}
    for layer in (0, 1):
        shapes |= {f"model.layers.{layer}.mlp.experts.{part}": shape for part, shape in parts.items()}
        shapes |= {f"model.layers.{layer}.mlp.{part}": shape for part, shape in router.items()}
    return shapes


def write(folder: Path, config: Mapping[str, Any], shapes: Shapes) -> Path:
    """Write one file of random bytes."""
    folder.mkdir()
    rng, header, data = np.random.default_rng(4), {}, b""
    for name, (dtype, shape) in shapes.items():
        raw = rng.bytes(BYTES[dtype] * math.prod(shape))
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    text = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    return folder


def read(folder: Path) -> Stored:
    """Every tensor of a folder with one file: dtype, shape and bytes."""
    data = (folder / "model.safetensors").read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    header.pop("__metadata__", None)
    return {
        name: (
            entry["dtype"],
            entry["shape"],
            data[end + entry["data_offsets"][0] : end + entry["data_offsets"][1]],
        )
        for name, entry in header.items()
    }


def expected(source: Stored, keep: Mapping[int, tuple[int, ...]]) -> Iterator[tuple[str, tuple[str, list[int], bytes]]]:
    """What pruning must give."""
    for name, (dtype, shape, data) in source.items():
        routed, rows = _ROUTED.fullmatch(name), _ROWS.fullmatch(name)
        if routed is not None:
            kept = keep[int(routed[2])]
            if int(routed[3]) in kept:
                yield f"{routed[1]}{kept.index(int(routed[3]))}{routed[4]}", (dtype, shape, data)
        elif rows is not None:
            kept = keep[int(rows[1])]
            cut = np.frombuffer(data, np.uint8).reshape(E, -1)[list(kept)].tobytes()
            yield name, (dtype, [len(kept), *shape[1:]], cut)
        else:
            yield name, (dtype, shape, data)


CASES: dict[str, tuple[dict[str, Any], Shapes]] = {
    name: (DEEPSEEK, per_expert(parts)) for name, parts in FORMATS.items()
} | {
    "gpt-oss mxfp4": (
        GPT_OSS,
        stacked(STACKED["gpt-oss mxfp4"], {"router.weight": ("BF16", [E, H]), "router.bias": ("BF16", [E])}),
    ),
    "stacked fp8": (QWEN, stacked(STACKED["stacked fp8"], {"gate.weight": ("BF16", [E, H])})),
}


@pytest.mark.parametrize("name", CASES)
def test_kept_experts_are_byte_identical(name: str, plan_by_hand: PlanByHand, tmp_path: Path) -> None:
    """Names, types, shapes and bytes are those of the kept experts and rows; all else is as it was; verify agrees."""
    config, shapes = CASES[name]
    base = write(tmp_path / "base", config, shapes)
    plan = plan_by_hand(base, E // 2, seed=3)
    out = moeprune.apply(base, plan, tmp_path / "out")
    keep = {layer: decision.keep for layer, decision in plan.layers.items()}
    assert len(set(keep.values())) == len(keep)  # no layer is pruned like another
    wanted = dict(expected(read(base), keep))
    assert read(out) == wanted
    assert moeprune.verify(base, out).tensors == len(wanted)


# --- lists that name experts ------------------------------------------------------------------------------------------

UP, DOWN = "model.layers.0.mlp.experts.{}.up_proj", "model.layers.1.mlp.experts.{}.down_proj"
LISTED = {
    "compressed-tensors": {"ignore": ["lm_head", UP, "re:.*mlp.gate$", DOWN]},
    "awq": {"modules_to_not_convert": [UP, DOWN, "lm_head"]},
    "autoround": {"extra_config": {UP: {"bits": 16}, "lm_head": {"bits": 8}, DOWN: {"bits": 4, "sym": True}}},
    "gptqmodel": {"dynamic": {"-:" + UP.replace(".", r"\."): {}, r"+:.*\.experts\.\d+\..*": {"bits": 4}, DOWN: {}}},
    "modelopt": {"exclude_modules": [UP, "lm_head", DOWN, "model.layers.*.mlp.gate"]},
}


def numbered(value: Any, first: int | None, second: int | None) -> Any:
    """A list or object with the numbers of two experts filled in; entries of an expert without number left out."""

    def fill(name: str) -> str | None:
        for pattern, number in ((UP, first), (DOWN, second)):
            for text in (pattern, pattern.replace(".", r"\.")):
                if text in name:
                    return None if number is None else name.replace("{}", str(number))
        return name

    if isinstance(value, list):
        return [name for name in map(fill, value) if name is not None]
    return {name: inner for key, inner in value.items() if (name := fill(key)) is not None}


@pytest.mark.parametrize("method", LISTED)
@pytest.mark.parametrize("file", ["config.json", "hf_quant_config.json"])
def test_lists_of_experts_are_renumbered(file: str, method: str, plan_by_hand: PlanByHand, tmp_path: Path) -> None:
    """Entries of kept experts get the new number and those of removed ones go, in the config and in modelopt's file."""
    base = write(tmp_path / "base", *CASES["stacked fp8"])
    plan = plan_by_hand(base, 4)
    [key] = LISTED[method]
    gone = min(set(range(E)) - set(plan.layers[1].keep))

    def text(first: int | None, second: int | None, count: int) -> str:
        lists = {key: numbered(LISTED[method][key], first, second)}
        inner = {"quantization_config" if file == "config.json" else "quantization": {"b": 1.0} | lists}
        return json.dumps((QWEN | {"num_experts": count} if file == "config.json" else {}) | inner, indent=3)

    (base / file).write_text(text(plan.layers[0].keep[2], gone, E))
    out = moeprune.apply(base, plan_by_hand(base, 4), tmp_path / "out")
    assert (out / file).read_text() == text(2, None, 4 if file == "config.json" else E)
    moeprune.verify(base, out)
    (out / file).write_text((base / file).read_text())
    with pytest.raises(CheckpointError, match=f"{file} is not what the source and the plan give"):
        moeprune.verify(base, out)


@pytest.mark.parametrize("file", ["config.json", "hf_quant_config.json"])
def test_patterns_that_single_out_experts_stop_the_run(file: str, plan_by_hand: PlanByHand, tmp_path: Path) -> None:
    """Nothing is written, and with all experts kept there is nothing to refuse."""
    base = write(tmp_path / "base", *CASES["stacked fp8"])
    config = QWEN if file == "config.json" else {}
    (base / file).write_text(json.dumps(config | {"quantization_config": {"ignore": [r"re:.*experts\.[0-3]\..*"]}}))
    with pytest.raises(LayoutError, match=rf"{file} singles out experts by the pattern 're:"):
        moeprune.apply(base, plan_by_hand(base, 4), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["base"]
    moeprune.verify(base, moeprune.apply(base, plan_by_hand(base, E), tmp_path / "all"))


# --- quantised checkpoints in stock transformers ----------------------------------------------------------------------


def rewrite(
    folder: Path, method: dict[str, Any], change: Callable[[str, torch.Tensor], dict[str, torch.Tensor]]
) -> None:
    """Put other tensors in the place of each one of a checkpoint, and say in the config how they are quantised."""
    from safetensors.torch import load_file, save_file

    index = json.loads((folder / "model.safetensors.index.json").read_text())
    weight_map = {}
    for file in sorted(set(index["weight_map"].values())):
        tensors: dict[str, torch.Tensor] = {}
        for name, tensor in load_file(folder / file).items():
            tensors |= change(name, tensor)
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps(index | {"weight_map": weight_map}))
    config = json.loads((folder / "config.json").read_text()) | {"quantization_config": method}
    (folder / "config.json").write_text(json.dumps(config))


def load(folder: Path, method: Any) -> Any:
    """The dequantised model, which must lack nothing."""
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(folder, quantization_config=method, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["mismatched_keys"]
    assert all(name.startswith("model.layers.3.") for name in info["unexpected_keys"])  # the MTP layer
    return model.float().eval()


def same_logits(first: Any, second: Any) -> bool:
    """Whether two models agree on random tokens, and say something."""
    import torch

    ids = torch.randint(0, 97, (2, 16), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        one, other = first(ids).logits, second(ids).logits
    return bool(one.isfinite().all()) and float((one - other).norm() / one.norm()) < 1e-5


def test_a_block_fp8_deepseek_reads_back_as_the_original(
    checkpoint_of: Callable[..., Path], plan_by_hand: PlanByHand, tmp_path: Path
) -> None:
    """Dense layer, groups, correction bias, MTP layer and scales: the kept experts have the original's exact values."""
    import torch
    from transformers import FineGrainedFP8Config

    sizes = {"hidden_size": 256, "moe_intermediate_size": 128, "intermediate_size": 128}
    groups = {"n_routed_experts": 8, "n_group": 2, "topk_group": 1, "num_experts_per_tok": 2}
    base = Path(shutil.copytree(checkpoint_of("deepseek_v3", **sizes, **groups), tmp_path / "base"))
    values = {}
    torch.manual_seed(1)

    def blocks(name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        if not name.endswith("_proj.weight"):
            return {name: tensor}
        rows, columns = (math.ceil(size / 128) for size in tensor.shape)
        scale = torch.rand(rows, columns) + 0.5
        full = scale.repeat_interleave(128, 0).repeat_interleave(128, 1)[: tensor.shape[0], : tensor.shape[1]]
        packed = (tensor / full).to(torch.float8_e4m3fn)
        values[name] = packed.float() * full
        return {name: packed, f"{name}_scale_inv": scale}

    method = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
    rewrite(base, method, blocks)
    plan = plan_by_hand(base, 4)
    out = moeprune.apply(base, plan, tmp_path / "out")
    assert moeprune.verify(base, out).tensors == len(moeprune.open_checkpoint(out).tensors)
    pruned, whole = (load(folder, FineGrainedFP8Config(dequantize=True)) for folder in (out, base))
    for layer in (1, 2):
        experts = pruned.model.layers[layer].mlp.experts
        for new, old in enumerate(plan.layers[layer].keep):
            prefix = f"model.layers.{layer}.mlp.experts.{old}."
            gate, up, down = (values[f"{prefix}{name}_proj.weight"] for name in ("gate", "up", "down"))
            assert torch.equal(experts.gate_up_proj[new], torch.cat([gate, up]))
            assert torch.equal(experts.down_proj[new], down)
        gone = sorted(set(range(8)) - set(plan.layers[layer].keep))
        whole.model.layers[layer].mlp.gate.e_score_correction_bias[gone] = -torch.inf
    assert same_logits(pruned, whole)


def test_an_mxfp4_gpt_oss_reads_back_as_the_original(
    checkpoint_of: Callable[..., Path], plan_by_hand: PlanByHand, tmp_path: Path
) -> None:
    """Stacked blocks and scales are cut along the experts: the kept ones have the original's exact values."""
    import torch
    from transformers import Mxfp4Config

    source = checkpoint_of("gpt_oss", hidden_size=64, intermediate_size=64, dtype="bfloat16")
    base = Path(shutil.copytree(source, tmp_path / "base"))

    def blocks(name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            return {name: tensor}
        experts, inputs, outputs = tensor.shape
        shape = (experts, outputs, inputs // 32)
        packed = torch.randint(0, 256, (*shape, 16), dtype=torch.uint8)
        return {f"{name}_blocks": packed, f"{name}_scales": torch.randint(118, 123, shape, dtype=torch.uint8)}

    torch.manual_seed(1)
    kept_as_they_are = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    rewrite(base, {"quant_method": "mxfp4", "modules_to_not_convert": kept_as_they_are}, blocks)
    plan = plan_by_hand(base, 6)
    out = moeprune.apply(base, plan, tmp_path / "out")
    moeprune.verify(base, out)
    pruned, whole = (load(folder, Mxfp4Config(dequantize=True)) for folder in (out, base))
    for layer, decision in plan.layers.items():
        ours, theirs = (model.model.layers[layer].mlp for model in (pruned, whole))
        assert torch.equal(ours.experts.gate_up_proj, theirs.experts.gate_up_proj[list(decision.keep)])
        assert torch.equal(ours.experts.down_proj, theirs.experts.down_proj[list(decision.keep)])
        theirs.router.bias.data[[expert for expert in range(12) if expert not in decision.keep]] = -torch.inf
    assert same_logits(pruned, whole)
