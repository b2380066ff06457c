"""Layer-by-layer collection on a GPU at the real size of DeepSeek-V3's layers: seconds and memory of each.

    python benchmarks/stream_gpu.py --work DIR [--tokens 262144 1048576]     24 GB of disk; warm page cache
    python benchmarks/stream_gpu.py --work DIR --toy                         small layers on the CPU, tens of seconds

The checkpoint has one dense layer and two MoE layers in the dimensions of DeepSeek-V3's published config: hidden 7168,
MLA with 128 heads, 256 experts of 2048 in 8 groups, top-8 of 4 groups, block FP8 with blocks of 128 x 128. Its values
are random, and it has fewer words, since the head is not run. Nothing but the collection itself is called:
`stream_batches` with every core statistic.

For each layer: seconds to read it into the device's memory and to run all batches through it; peak memory of the device
and of the process, page-locked memory included; the arithmetic of the layer as a share of the rate at which the device
itself multiplies two bfloat16 matrices of 8192 x 8192. The second MoE layer, which finds everything warm, is what the
time for the whole model is projected from.

Target: 1,048,576 tokens through DeepSeek-V3 in at most 15 minutes on one H200, with at most 64 GB of main memory.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stream import watched_peak

from moeprune.streaming.stream import LayerStream

MINUTES_TARGET, HOST_TARGET, TOKENS_TARGET = 15.0, 64e9, 1 << 20
DENSE, MOE = 3, 58  # decoder layers of DeepSeek-V3
BLOCK = 128
Tensor = tuple[str, str, tuple[int, ...]]  # name, dtype in the file, shape

REAL = {
    "hidden_size": 7168, "intermediate_size": 18432, "moe_intermediate_size": 2048, "n_routed_experts": 256,
    "num_attention_heads": 128, "num_key_value_heads": 128, "q_lora_rank": 1536, "kv_lora_rank": 512,
    "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128, "vocab_size": 8192,
}  # fmt: skip
TOY = {
    "hidden_size": 512, "intermediate_size": 1024, "moe_intermediate_size": 128, "n_routed_experts": 64,
    "num_attention_heads": 4, "num_key_value_heads": 4, "q_lora_rank": 256, "kv_lora_rank": 128,
    "qk_rope_head_dim": 16, "qk_nope_head_dim": 32, "v_head_dim": 32, "vocab_size": 1024,
}  # fmt: skip
COMMON = {
    "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "num_hidden_layers": 3,
    "first_k_dense_replace": 1, "moe_layer_freq": 1, "n_shared_experts": 1, "num_experts_per_tok": 8, "n_group": 8,
    "topk_group": 4, "topk_method": "noaux_tc", "scoring_func": "sigmoid", "norm_topk_prob": True,
    "routed_scaling_factor": 2.5, "hidden_act": "silu", "rms_norm_eps": 1e-6, "max_position_embeddings": 163840,
    "rope_theta": 10000, "attention_bias": False, "tie_word_embeddings": False, "num_nextn_predict_layers": 0,
    "torch_dtype": "bfloat16",
    "quantization_config": {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [BLOCK, BLOCK]},
}  # fmt: skip


# --- the checkpoint -------------------------------------------------------------------------------------------------


def build(folder: Path, config: dict[str, Any]) -> Path:
    """Write the checkpoint, one file per layer, unless it is there."""
    if (folder / "model.safetensors.index.json").is_file():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    files = {f"layer-{layer}.safetensors": layer_tensors(layer, config) for layer in range(3)}
    files["ends.safetensors"] = end_tensors(config)
    filler = Filler()
    for file, tensors in files.items():
        filler.write(folder / file, tensors)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    weight_map = {name: file for file, tensors in files.items() for name, _, _ in tensors}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def end_tensors(config: dict[str, Any]) -> list[Tensor]:
    """What stands before and behind the layers."""
    hidden, words = config["hidden_size"], config["vocab_size"]
    names = ("model.embed_tokens.weight", "lm_head.weight")
    return [*((name, "BF16", (words, hidden)) for name in names), ("model.norm.weight", "BF16", (hidden,))]


def layer_tensors(layer: int, config: dict[str, Any]) -> list[Tensor]:
    """A decoder layer."""
    hidden = config["hidden_size"]
    at = f"model.layers.{layer}."
    norms = {"input_layernorm": hidden, "post_attention_layernorm": hidden}
    norms |= {"self_attn.q_a_layernorm": config["q_lora_rank"], "self_attn.kv_a_layernorm": config["kv_lora_rank"]}
    tensors: list[Tensor] = [(f"{at}{name}.weight", "BF16", (size,)) for name, size in norms.items()]
    for name, shape in attention(config).items():
        tensors += quantised(f"{at}self_attn.{name}", shape)
    if layer < config["first_k_dense_replace"]:
        return tensors + mlp(f"{at}mlp", hidden, config["intermediate_size"])
    inner, experts = config["moe_intermediate_size"], config["n_routed_experts"]
    tensors.append((f"{at}mlp.gate.weight", "BF16", (experts, hidden)))
    tensors.append((f"{at}mlp.gate.e_score_correction_bias", "F32", (experts,)))
    tensors += mlp(f"{at}mlp.shared_experts", hidden, inner * config["n_shared_experts"])
    for expert in range(experts):
        tensors += mlp(f"{at}mlp.experts.{expert}", hidden, inner)
    return tensors


def attention(config: dict[str, Any]) -> dict[str, tuple[int, int]]:
    """The matrices of multi-head latent attention: outputs, inputs."""
    hidden, heads, value = config["hidden_size"], config["num_attention_heads"], config["v_head_dim"]
    nope, rope = config["qk_nope_head_dim"], config["qk_rope_head_dim"]
    q_rank, kv_rank = config["q_lora_rank"], config["kv_lora_rank"]
    return {
        "q_a_proj": (q_rank, hidden),
        "q_b_proj": (heads * (nope + rope), q_rank),
        "kv_a_proj_with_mqa": (kv_rank + rope, hidden),
        "kv_b_proj": (heads * (nope + value), kv_rank),
        "o_proj": (hidden, heads * value),
    }


def mlp(at: str, hidden: int, inner: int) -> list[Tensor]:
    """Gate, up and down projection."""
    shapes = {"gate_proj": (inner, hidden), "up_proj": (inner, hidden), "down_proj": (hidden, inner)}
    return [tensor for name, shape in shapes.items() for tensor in quantised(f"{at}.{name}", shape)]


def quantised(name: str, shape: tuple[int, int]) -> list[Tensor]:
    """A matrix in FP8 and the scales of its blocks."""
    blocks = (-(-shape[0] // BLOCK), -(-shape[1] // BLOCK))
    return [(f"{name}.weight", "F8_E4M3", shape), (f"{name}.weight_scale_inv", "F32", blocks)]


class Filler:
    """Writes random tensors; FP8 codes come from different places of one block, since drawing 24 GB takes minutes."""

    def __init__(self) -> None:
        import torch

        self._draw = torch.Generator().manual_seed(0)
        codes = torch.randn(1 << 24, generator=self._draw).to(torch.float8_e4m3fn)  # normal, and never NaN
        self._codes = codes.view(torch.uint8).numpy().tobytes()

    def write(self, file: Path, tensors: Sequence[Tensor]) -> None:
        """Write a file, header and all."""
        import math

        from moeprune._files import safetensors_header

        width = {"F8_E4M3": 1, "BF16": 2, "F32": 4}
        sized = [(name, dtype, shape, math.prod(shape) * width[dtype]) for name, dtype, shape in tensors]
        columns = {name: shape[-1] for name, _, shape in tensors}
        with file.open("wb") as out:
            out.write(safetensors_header(sized, {"format": "pt"}))
            for name, dtype, shape, size in sized:
                if dtype == "F8_E4M3":
                    self._write_codes(out, size)
                else:
                    out.write(self._values(name, dtype, shape, columns))

    def _write_codes(self, out: Any, size: int) -> None:
        begin = out.tell() % 9973
        while size:
            size -= out.write(self._codes[begin : begin + size])
            begin = 0

    def _values(self, name: str, dtype: str, shape: tuple[int, ...], columns: dict[str, int]) -> bytes:
        import torch

        if name.endswith("_scale_inv"):
            inputs = columns[name.removesuffix("_scale_inv")]
            value = (1 + 0.1 * torch.rand(shape, generator=self._draw)) * inputs**-0.5
        elif len(shape) == 1:
            value = torch.zeros(shape) if name.endswith("bias") else torch.ones(shape)
        else:
            value = torch.randn(shape, generator=self._draw) * shape[-1] ** -0.5
        typed = value.bfloat16() if dtype == "BF16" else value
        return typed.contiguous().view(torch.uint8).numpy().tobytes()


# --- the run --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """One layer: seconds to load and to run, bytes of the device and of the process at their peak."""

    load: float
    run: float
    device: int
    host: int


class TimedStream(LayerStream):
    """Notes what each layer takes."""

    found: list[Measured]
    host: list[int]  # the largest anonymous memory since it was last set to 0

    @contextlib.contextmanager
    def layer(self, index: int) -> Iterator[None]:
        """As the base class does it, with a clock beside it."""
        self.host[0] = 0
        reset_peaks(self.device)
        begun = time.perf_counter()
        with super().layer(index):
            synchronise(self.device)
            loaded = time.perf_counter()
            yield
            synchronise(self.device)
            ended = time.perf_counter()
        device, locked = peaks(self.device)
        self.found.append(Measured(load=loaded - begun, run=ended - loaded, device=device, host=self.host[0] + locked))


def collect(options: argparse.Namespace, model: Path, tokens: int) -> tuple[list[Measured], Any]:
    """Collect once.

    Returns:
        What each layer took, and what the forecast said.
    """
    import numpy as np
    import torch

    from moeprune import CalibrationSet, open_checkpoint
    from moeprune._options import CalibrationOptions
    from moeprune.collecting import arrange
    from moeprune.collectors.stream import stream_batches
    from moeprune.streaming.states import States

    checkpoint = open_checkpoint(model)
    rows = np.random.default_rng(0).integers(1, 1000, (tokens // options.length, options.length))
    data = CalibrationSet(sequences=tuple(map(tuple, rows.tolist())), domains=("all",) * len(rows), provenance=())
    settings = CalibrationOptions(device=options.device, batch_tokens=options.batch_tokens)
    batches = data.batches(options.batch_tokens)
    stream = TimedStream(checkpoint, device=torch.device(options.device))
    expected = arrange(stream, settings, data, batches, kept=False)
    states, layers = States(len(batches)), settings.observed(checkpoint)
    with watched_peak() as stream.host:
        stream.found = []
        stream_batches(stream, batches, states, domains=("all",), layers=layers)
    return stream.found, expected


def make_room(device: Any) -> None:
    """Give back what the last run held."""
    import torch

    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_host_memory_stats()


def synchronise(device: Any) -> None:
    """Wait for the device."""
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)


def reset_peaks(device: Any) -> None:
    """Forget the device's peak."""
    import torch

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peaks(device: Any) -> tuple[int, int]:
    """Peak bytes of the device's memory, and of page-locked main memory."""
    import torch

    if device.type != "cuda":
        return 0, 0
    return torch.cuda.max_memory_allocated(device), torch.cuda.host_memory_stats()["allocated_bytes.peak"]


def matmul_rate(device: Any, *, size: int, repeats: int = 20) -> float:
    """Operations per second of bfloat16 matrix products, the best of three times."""
    import torch

    left, right = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    rates = []
    for _ in range(3):
        synchronise(device)
        begun = time.perf_counter()
        for _ in range(repeats):
            left @ right
        synchronise(device)
        rates.append(2 * size**3 * repeats / (time.perf_counter() - begun))
    return max(rates)


def operations(config: dict[str, Any], length: int) -> int:
    """Multiplications and additions of a MoE layer per token: its matrices, and attention to half of the sequence."""
    hidden, inner = config["hidden_size"], config["moe_intermediate_size"]
    weights = sum(rows * columns for rows, columns in attention(config).values())
    weights += 3 * hidden * inner * (config["num_experts_per_tok"] + config["n_shared_experts"])
    weights += hidden * config["n_routed_experts"]
    per_pair = config["qk_nope_head_dim"] + config["qk_rope_head_dim"] + config["v_head_dim"]
    return int(2 * weights + 2 * config["num_attention_heads"] * per_pair * (length + 1) // 2)


# --- side by side ---------------------------------------------------------------------------------------------------


def main() -> None:
    """Print what every number of tokens takes beside the target."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--tokens", type=int, nargs="+")
    parser.add_argument("--length", type=int)
    parser.add_argument("--batch-tokens", type=int, help="by default 65,536 above 100 GB of device memory, else 32,768")
    parser.add_argument("--device")
    parser.add_argument("--toy", action="store_true", help="small layers, on the CPU unless --device says otherwise")
    options = parser.parse_args()
    import torch

    options.device = options.device or ("cpu" if options.toy else "cuda")
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        raise SystemExit("there is no CUDA device: try --toy")
    options.length = options.length or (256 if options.toy else 2048)
    options.tokens = options.tokens or ([4096, 16384] if options.toy else [TOKENS_TARGET // 4, TOKENS_TARGET])
    options.batch_tokens = options.batch_tokens or default_batch(options)
    config = COMMON | (TOY if options.toy else REAL)
    model = build(options.work / ("deepseek-toy" if options.toy else "deepseek"), config)
    device = torch.device(options.device)
    results = []
    for tokens in options.tokens:
        make_room(device)
        results.append((tokens, *collect(options, model, tokens)))
    rate = matmul_rate(device, size=1024 if options.toy else 8192)
    print(f"{name_of(device)}; bfloat16 products at {rate / 1e12:.3g} TFLOP/s; torch {torch.__version__}")
    stored = sum(file.stat().st_size for file in model.glob("layer-2.*"))
    for tokens, found, expected in results:
        print(f"\n{tokens:,} tokens in sequences of {options.length:,}, batches of {options.batch_tokens:,}")
        show(found, expected, tokens * operations(config, options.length) / rate)
        project(found, stored, to_target=tokens == TOKENS_TARGET and not options.toy)


def default_batch(options: argparse.Namespace) -> int:
    """Tokens per batch that leave room beside a layer."""
    import torch

    if options.toy:
        return 2048
    _, total = torch.cuda.mem_get_info(options.device)
    return 65536 if total > 100e9 else 32768


def name_of(device: Any) -> str:
    """What runs."""
    import torch

    if device.type != "cuda":
        return f"CPU, {torch.get_num_threads()} threads of {os.cpu_count()}"
    return f"{torch.cuda.get_device_name(device)}, {torch.cuda.mem_get_info(device)[1] / 1e9:.0f} GB"


def show(found: list[Measured], expected: Any, ideal: float) -> None:
    """One table; ``ideal``: seconds of a MoE layer's arithmetic at the rate of the device."""
    print("layer          load s   run s  device GB  host GB  share of product rate")
    for index, layer in enumerate(found):
        dense = index < COMMON["first_k_dense_replace"]
        share = "" if dense else f"{ideal / layer.run:10.0%}"
        row = f"{index} {'dense' if dense else 'MoE':10}{layer.load:9.2f}{layer.run:8.2f}"
        print(f"{row}{layer.device / 1e9:11.2f}{layer.host / 1e9:9.2f}{share}")
    device, host = expected.device / 1e9, expected.host / 1e9
    print(f"forecast: device {device:.2f} GB, host {host:.2f} GB above the idle process")


def project(found: list[Measured], stored: int, *, to_target: bool) -> None:
    """What the whole model would take; ``stored``: bytes of a MoE layer on disk."""
    dense, moe = (layer.load + layer.run for layer in (found[0], found[-1]))
    minutes, host = (DENSE * dense + MOE * moe) / 60, max(layer.host for layer in found)
    print(
        f"{DENSE} dense and {MOE} MoE layers like these: {minutes:.1f} minutes, read at {stored / 1e9 / moe:.2f} GB/s"
    )
    if to_target:
        met = minutes <= MINUTES_TARGET and host <= HOST_TARGET
        target = f"target {MINUTES_TARGET:g} minutes on one H200 and {HOST_TARGET / 1e9:g} GB of main memory"
        print(f"{target}: {'met' if met else 'missed'}")


if __name__ == "__main__":
    main()
