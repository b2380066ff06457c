"""Calibrating a model that is larger than the memory it may use, against loading it whole.

    python benchmarks/stream.py --work DIR [--layers 5] [--samples 64] [--length 512] [--repeats 3] [--small]

The model has the layer shapes of Qwen3-30B-A3B (hidden 2048, 128 experts of 768, top-8; 1.2 GB a layer in bfloat16) and
random weights. Each way runs in a process of its own on a warm cache and reports its seconds from the first read of the
model to the finished statistics, and the peak of its anonymous memory above what it held after all imports. The
streamed pass runs under a hard limit on its address space (RLIMIT_AS); both statistics files must be equal.

Targets: anonymous memory at most 1.3 times the largest layer plus the hidden states; weights at least three times the
limit; at most 1.3 times the seconds of the resident run; the forecast within 15 % of what is measured.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

MEMORY_TARGET, TIME_TARGET, WEIGHTS_TARGET, FORECAST_TARGET = 1.3, 1.3, 3.0, 0.15
EXPERTS, TOP_K = 128, 8


# --- the model --------------------------------------------------------------------------------------------------------


def build(folder: Path, layers: int, *, small: bool) -> Path:
    """Write the checkpoint, one shard per layer, unless it is there."""
    import torch
    from safetensors.torch import save_file

    hidden, inner, vocab = (256, 96, 1024) if small else (2048, 768, 8192)
    if (folder / "model.safetensors.index.json").is_file():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "hidden_size": hidden,
        "intermediate_size": 3 * hidden, "moe_intermediate_size": inner, "num_attention_heads": hidden // 64,
        "num_key_value_heads": 4, "head_dim": 128, "num_hidden_layers": layers, "num_experts": EXPERTS,
        "num_experts_per_tok": TOP_K, "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": [],
        "vocab_size": vocab, "max_position_embeddings": 4096, "rms_norm_eps": 1e-6, "rope_theta": 1e6,
        "tie_word_embeddings": False, "torch_dtype": "bfloat16", "hidden_act": "silu",
    }  # fmt: skip
    draw = torch.Generator().manual_seed(0)

    def matrix(rows: int, columns: int) -> torch.Tensor:
        return (torch.randn(rows, columns, generator=draw) * columns**-0.5).bfloat16()

    weight_map: dict[str, str] = {}

    def write(file: str, tensors: dict[str, torch.Tensor]) -> None:
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, file))

    ends = {"model.embed_tokens.weight": matrix(vocab, hidden), "lm_head.weight": matrix(vocab, hidden)}
    write("ends.safetensors", ends | {"model.norm.weight": torch.ones(hidden, dtype=torch.bfloat16)})
    for layer in range(layers):
        write(f"layer-{layer:02d}.safetensors", _layer(layer, hidden, inner, matrix))
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def _layer(layer: int, hidden: int, inner: int, matrix: Any) -> dict[str, Any]:
    import torch

    at = f"model.layers.{layer}."
    heads = hidden * 2
    attention = {"q_proj": (heads, hidden), "k_proj": (512, hidden), "v_proj": (512, hidden), "o_proj": (hidden, heads)}
    tensors = {f"{at}self_attn.{name}.weight": matrix(*shape) for name, shape in attention.items()}
    for name, width in (("self_attn.q_norm", 128), ("self_attn.k_norm", 128)):
        tensors[f"{at}{name}.weight"] = torch.ones(width, dtype=torch.bfloat16)
    for name in ("input_layernorm", "post_attention_layernorm"):
        tensors[f"{at}{name}.weight"] = torch.ones(hidden, dtype=torch.bfloat16)
    tensors[f"{at}mlp.gate.weight"] = matrix(EXPERTS, hidden)
    for expert in range(EXPERTS):
        for name, shape in (
            ("gate_proj", (inner, hidden)),
            ("up_proj", (inner, hidden)),
            ("down_proj", (hidden, inner)),
        ):
            tensors[f"{at}mlp.experts.{expert}.{name}.weight"] = matrix(*shape)
    return tensors


def write_ids(folder: Path, samples: int, length: int) -> Path:
    """Random token ids, every sample as long as the others."""
    import numpy as np

    rows = np.random.default_rng(0).integers(1, 1000, (samples, length))
    file = folder / f"ids-{samples}-{length}.jsonl"
    file.write_text("".join(json.dumps({"input_ids": row.tolist()}) + "\n" for row in rows))
    return file


# --- one way, in a process of its own ---------------------------------------------------------------------------------


def run_way(options: argparse.Namespace) -> None:
    """Collect once, or fuse layer by layer, and print seconds and memory as JSON."""
    import accelerate
    import datasets
    import torch
    import transformers.models.qwen3_moe.modeling_qwen3_moe as qwen3_moe

    from moeprune import collect, fuse
    from moeprune.collectors import resident, stream
    from moeprune.pipeline import forecast

    assert all((accelerate, datasets, qwen3_moe, resident, stream))  # imported before the idle process is weighed
    torch.set_num_threads(options.threads)
    given: dict[str, Any] = {"calibration": str(options.ids), "batch_tokens": options.batch_tokens, "device": "cpu"}
    expected, work = None, collect
    if options.way in {"stream", "fuse"}:
        given |= {"stream": True, "memory": options.memory}
        if options.way == "fuse":
            work, given = fuse, {"ratio": 0.5, "sequential": True} | given
            predicted = fuse(options.model, options.output, overwrite=True, dry_run=True, **given).forecast
        else:
            predicted = forecast(options.model, options.output, overwrite=True, **given)
        expected = predicted.to_dict() if predicted else None
        limit = status("VmSize") + options.memory
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    else:
        given |= {"stream": False}
    idle, begun = status("RssAnon"), time.perf_counter()
    with watched_peak() as peak:
        work(options.model, options.output, overwrite=True, **given)
    seconds = time.perf_counter() - begun
    print(json.dumps({"seconds": seconds, "peak": peak[0] - idle, "forecast": expected}), flush=True)


def status(name: str) -> int:
    """A size of this process in bytes, as Linux tells it."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(name)


@contextmanager
def watched_peak() -> Iterator[list[int]]:
    """Sample the anonymous memory every few milliseconds; the largest value stands in the list."""
    peak, over = [status("RssAnon")], threading.Event()

    def watch() -> None:
        while not over.wait(0.005):
            peak[0] = max(peak[0], status("RssAnon"))

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    yield peak
    over.set()
    watcher.join()


# --- side by side -----------------------------------------------------------------------------------------------------


def main() -> None:
    """Run both ways in turn and print their figures beside the targets."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path)
    parser.add_argument("--layers", type=int, default=5)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--batch-tokens", type=int, default=512)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--small", action="store_true", help="an eighth of the width, for a quick look")
    for name in ("--way", "--model", "--ids", "--output"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    parser.add_argument("--memory", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.way:
        run_way(options)
        return
    model = build(
        options.work / f"model-{options.layers}{'-small' * options.small}", options.layers, small=options.small
    )
    ids = write_ids(options.work, options.samples, options.length)
    shown(options, model, ids)


def shown(options: argparse.Namespace, model: Path, ids: Path) -> None:
    """Measure and print."""
    from moeprune import open_checkpoint

    checkpoint = open_checkpoint(model)
    layer = sum(entry.nbytes for name, entry in checkpoint.tensors.items() if ".layers." in name) // options.layers
    states = options.samples * options.length * checkpoint.config["hidden_size"] * 2
    allowed = int(checkpoint.nbytes / WEIGHTS_TARGET)
    runs: dict[str, list[dict[str, Any]]] = {"resident": [], "stream": []}
    for _ in range(options.repeats):
        for way, found in runs.items():
            found.append(child(options, way, model, ids, allowed))
    same = (options.work / "resident.st").read_bytes() == (options.work / "stream.st").read_bytes()
    seconds = {way: statistics.median(run["seconds"] for run in found) for way, found in runs.items()}
    ratio = statistics.median(
        run["seconds"] / whole["seconds"] for run, whole in zip(runs["stream"], runs["resident"], strict=True)
    )
    peaks = {way: max(run["peak"] for run in found) for way, found in runs.items()}
    forecast = runs["stream"][0]["forecast"]["host"]
    gigabytes = checkpoint.nbytes / 1e9
    off = forecast / peaks["stream"] - 1
    print(f"{gigabytes:.1f} GB of weights, a layer {layer / 1e9:.2f} GB, hidden states {states / 1e6:.0f} MB")
    print(f"{options.samples * options.length:,} tokens, batches of {options.batch_tokens}, {options.threads} threads")
    for way in runs:
        print(f"{way:9} {seconds[way]:7.1f} s  {peaks[way] / 1e9:5.2f} GB")
    print(f"limit on the address space: {allowed / 1e9:.2f} GB above idle, a third of the weights")
    print(f"memory  {peaks['stream'] / (layer + states):.2f} x (layer + states)   target {MEMORY_TARGET}")
    print(f"time    {ratio:.2f} x resident (median of {options.repeats} pairs)   target {TIME_TARGET}")
    print(f"forecast {forecast / 1e9:.2f} GB, off by {100 * off:+.0f} %   target {100 * FORECAST_TARGET:.0f} %")
    print(f"statistics files {'equal' if same else 'DIFFERENT'}")


def child(options: argparse.Namespace, way: str, model: Path, ids: Path, memory: int) -> dict[str, Any]:
    """One measurement."""
    command = [sys.executable, __file__, "--way", way, "--model", str(model), "--ids", str(ids)]
    command += ["--output", str(options.work / f"{way}.st"), "--memory", str(memory)]
    command += ["--batch-tokens", str(options.batch_tokens), "--threads", str(options.threads)]
    environment = os.environ | {"MALLOC_ARENA_MAX": "2", "OMP_NUM_THREADS": str(options.threads)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{way} failed:\n{done.stderr[-3000:]}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


if __name__ == "__main__":
    main()
