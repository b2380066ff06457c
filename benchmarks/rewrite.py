"""Time and memory of a rewrite against a plain copy of as many bytes, and against what other tools do.

    python benchmarks/rewrite.py --work DIR [--small] [--repeats 3]     four ways to prune one checkpoint, side by side
    python benchmarks/rewrite.py --work DIR --headers                   memory of apply and verify on huge checkpoints

The checkpoint has the layer shapes of Qwen3-30B-A3B (hidden 2048, experts 768 wide, 128 of them, top-8), four layers of
random bytes. Each way runs in a process of its own on a warm cache, keeps the same half of the experts and flushes what
it wrote to the device. Times are those of the work; the start of Python and of its libraries is shown apart. The plain
copy reads and writes the surviving number of bytes, so that no file system can share blocks instead of copying; so does
moeprune, which leaves copying to the system only on network file systems.

Targets: at most 1.5 times the plain copy; at most 150 MB resident up to 100,000 tensors, and 1 KB for each tensor more.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

RATIO_TARGET = 1.5
BUFFER = 256 << 10
SHARDS = 60  # of 5 GB, in half of DeepSeek-V3 or Kimi-K2
SIZES = {"BF16": 2, "F32": 4, "F8_E4M3": 1, "I32": 4, "I64": 8}
Tensor = tuple[str, str, tuple[int, ...]]


# --- checkpoints ----------------------------------------------------------------------------------------------------


def qwen3(*, small: bool) -> tuple[dict[str, Any], list[list[Tensor]]]:
    """Four layers of Qwen3-30B-A3B: 4.7 GiB; or layers of an eighth of the width for a quick look."""
    hidden, inner, vocab = (256, 96, 1024) if small else (2048, 768, 8192)
    config = {
        "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "hidden_size": hidden,
        "intermediate_size": 3 * hidden, "moe_intermediate_size": inner, "num_attention_heads": hidden // 64,
        "num_key_value_heads": 4, "head_dim": 128, "num_hidden_layers": 4, "num_experts": 128,
        "num_experts_per_tok": 8, "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": [],
        "vocab_size": vocab, "max_position_embeddings": 4096, "rms_norm_eps": 1e-6, "rope_theta": 1e6,
        "tie_word_embeddings": False, "torch_dtype": "bfloat16", "hidden_act": "silu",
    }  # fmt: skip
    heads = hidden * 2
    shards = [[("model.embed_tokens.weight", "BF16", (vocab, hidden)), ("lm_head.weight", "BF16", (vocab, hidden))]]
    shards[0].append(("model.norm.weight", "BF16", (hidden,)))
    for layer in range(4):
        at = f"model.layers.{layer}."
        shapes = {
            "q_proj": (heads, hidden),
            "k_proj": (512, hidden),
            "v_proj": (512, hidden),
            "o_proj": (hidden, heads),
        }
        shards.append([(f"{at}self_attn.{name}.weight", "BF16", shape) for name, shape in shapes.items()])
        shards[-1] += [(f"{at}self_attn.{name}.weight", "BF16", (128,)) for name in ("q_norm", "k_norm")]
        norms = ("input_layernorm", "post_attention_layernorm")
        shards[-1] += [(f"{at}{name}.weight", "BF16", (hidden,)) for name in norms]
        shards[-1].append((f"{at}mlp.gate.weight", "BF16", (128, hidden)))
        for expert in range(128):
            for name, shape in experts(hidden, inner):
                shards[-1].append((f"{at}mlp.experts.{expert}.{name}.weight", "BF16", shape))
    return config, shards


def experts(hidden: int, inner: int) -> list[tuple[str, tuple[int, int]]]:
    """The matrices of an expert, in the order of the files."""
    return [("down_proj", (hidden, inner)), ("gate_proj", (inner, hidden)), ("up_proj", (inner, hidden))]


def deepseek(
    layers: int, count: int, parts: list[tuple[str, str, tuple[int, ...]]], groups: int
) -> tuple[dict[str, Any], list[list[Tensor]]]:
    """The names of a DeepSeek-V3-shaped checkpoint, with tensors of a few bytes; three shards per layer."""
    config = {
        "model_type": "deepseek_v3", "num_hidden_layers": layers, "first_k_dense_replace": 1, "n_routed_experts": count,
        "n_shared_experts": 1, "num_experts_per_tok": 8, "n_group": groups, "topk_group": max(1, groups // 2),
        "moe_intermediate_size": 8, "hidden_size": 8, "num_nextn_predict_layers": 0, "moe_layer_freq": 1,
    }  # fmt: skip
    shards: list[list[Tensor]] = [[("model.embed_tokens.weight", "BF16", (16, 8)), ("lm_head.weight", "BF16", (16, 8))]]
    for layer in range(layers):
        at = f"model.layers.{layer}."
        shards.append(
            [(f"{at}{name}.weight", "BF16", (8,)) for name in ("input_layernorm", "post_attention_layernorm")]
        )
        if not layer:
            shards[-1] += [(f"{at}mlp.{name}.weight", "BF16", (8, 8)) for name in ("gate_proj", "up_proj", "down_proj")]
            continue
        shards[-1].append((f"{at}mlp.gate.weight", "BF16", (count, 8)))
        shards[-1].append((f"{at}mlp.gate.e_score_correction_bias", "F32", (count,)))
        for expert in range(count):
            if expert % (count // 3) == 0 and expert:
                shards.append([])
            for name, _ in experts(8, 8):
                shards[-1] += [
                    (f"{at}mlp.experts.{expert}.{name}.{part}", dtype, shape) for part, dtype, shape in parts
                ]
    return config, shards


HEADERS: dict[str, Callable[[], tuple[dict[str, Any], list[list[Tensor]]]]] = {
    "DeepSeek-V3, block FP8": lambda: deepseek(
        59, 256, [("weight", "F8_E4M3", (8, 8)), ("weight_scale_inv", "F32", (1, 1))], 8
    ),
    "Kimi-K2, packed int4": lambda: deepseek(
        61, 384, [("weight_packed", "I32", (8, 1)), ("weight_scale", "BF16", (8, 1)), ("weight_shape", "I64", (2,))], 1
    ),
}


def build(folder: Path, config: dict[str, Any], shards: list[list[Tensor]]) -> int:
    """Write a checkpoint of random bytes; gives its number of tensors."""
    from moeprune._files import safetensors_header

    folder.mkdir(parents=True)
    block = os.urandom(16 << 20)
    index: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        sized = [(tensor, dtype, shape, size_of(dtype, shape)) for tensor, dtype, shape in shard]
        with (folder / name).open("wb") as out:
            out.write(safetensors_header(sized, {"format": "pt"}))
            for left in sized:
                write_bytes(out, block, left[3])
        index |= dict.fromkeys((tensor for tensor, *_ in shard), name)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return len(index)


def size_of(dtype: str, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor."""
    size = SIZES[dtype]
    for length in shape:
        size *= length
    return size


def write_bytes(out: Any, block: bytes, size: int) -> None:
    """Random bytes, from a different place of the block each time."""
    begin = out.tell() % 1009
    while size:
        size -= out.write(block[begin : begin + size])
        begin = 0


# --- the ways to do it, each in a process of its own ----------------------------------------------------------------


def plain_copy(source: Path, _: Path, out: Path) -> Callable[[], None]:
    """As many bytes as survive, read and written."""
    left = int((source / "surviving").read_text())

    def work() -> None:
        nonlocal left
        buffer = memoryview(bytearray(BUFFER))
        with out.open("wb", buffering=0) as target:
            for file in sorted(source.glob("*.safetensors")):
                with file.open("rb", buffering=0) as handle:
                    while left and (count := handle.readinto(buffer[:left])):  # type: ignore[attr-defined]
                        target.write(buffer[:count])
                        left -= count
            os.fsync(target.fileno())
        sync_folder(out.parent)

    return work


def by_moeprune(source: Path, plan: Path, out: Path) -> Callable[[], None]:
    """``moeprune apply``."""
    import moeprune.pipeline

    given = source / "shard-size"
    size = int(given.read_text()) if given.exists() else 5_000_000_000
    return lambda: print_none(moeprune.pipeline.apply(source, plan, out, max_shard_size=size))


def checked(source: Path, _: Path, out: Path) -> Callable[[], None]:
    """``moeprune verify``."""
    import moeprune.pipeline

    return lambda: print_none(moeprune.pipeline.verify(source, out))


def by_tensor(source: Path, plan: Path, out: Path) -> Callable[[], None]:
    """Tensor by tensor through the safetensors library, a shard's worth in memory."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    layers = {int(layer): row["keep"] for layer, row in json.loads(plan.read_text())["layers"].items()}

    def work() -> None:
        out.mkdir()
        held: dict[str, Any] = {}
        size = number = 0
        for file in sorted(source.glob("*.safetensors")):
            with safe_open(file, framework="pt") as handle:
                for name in handle.keys():  # noqa: SIM118
                    new = renamed(name, layers)
                    if new is None:
                        continue
                    tensor = handle.get_tensor(name)
                    gate = re.match(r"model\.layers\.(\d+)\.mlp\.gate\.", name)
                    held[new] = tensor[layers[int(gate[1])]] if gate else tensor
                    size += held[new].nbytes
            if size > 5e9:
                number, size, held = number + 1, 0, save_file(held, out / f"{number}.safetensors") or {}
        save_file(held, out / f"{number}.safetensors")
        sync_files(out)

    return work


def renamed(name: str, layers: dict[int, list[int]]) -> str | None:
    """The name of a tensor once experts are renumbered; none when its expert goes."""
    match = re.match(r"(model\.layers\.(\d+)\.mlp\.experts\.)(\d+)(\..*)", name)
    if match is None:
        return name
    keep = layers[int(match[2])]
    return f"{match[1]}{keep.index(int(match[3]))}{match[4]}" if int(match[3]) in keep else None


def by_transformers(source: Path, plan: Path, out: Path) -> Callable[[], None]:
    """Load the model, slice it in memory, save it."""
    import torch
    from transformers import AutoModelForCausalLM

    import moeprune
    import moeprune.runtime.surgery

    def work() -> None:
        model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
        moeprune.prune_model(model, moeprune.PruningPlan.load(plan))
        model.save_pretrained(out, max_shard_size="5GB")
        sync_files(out)

    return work


WAYS: dict[str, Callable[[Path, Path, Path], Callable[[], None]]] = {
    "plain copy": plain_copy,
    "moeprune apply": by_moeprune,
    "moeprune verify": checked,
    "safetensors, tensor by tensor": by_tensor,
    "transformers, load, slice, save": by_transformers,
}


def print_none(_: object) -> None:
    """Take a result and show nothing."""


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries."""
    descriptor = os.open(folder, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def sync_files(folder: Path) -> None:
    """Flush everything in a folder."""
    for path in (*folder.iterdir(), folder):
        sync_folder(path)


def child(name: str, started: float, *paths: Path) -> None:
    """Run one way and print what it took."""
    work = WAYS[name](*paths)
    ready = time.time()
    work()
    taken = {"startup": ready - started, "seconds": time.time() - ready}
    print(json.dumps(taken | {"rss": peak_memory()}))


def peak_memory() -> int:
    """Most bytes that this process had resident; ``ru_maxrss`` would count what started it too."""
    status = Path("/proc/self/status")
    if status.exists():
        return 1024 * int(re.findall(r"VmHWM:\s+(\d+) kB", status.read_text())[0])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # macOS: bytes


# --- side by side ---------------------------------------------------------------------------------------------------


def run(name: str, source: Path, plan: Path, out: Path) -> dict[str, float]:
    """Run one way in a process of its own, with the source in the page cache and nothing left to flush."""
    warm(source)
    os.sync()
    command = [sys.executable, __file__, "--child", name, str(time.time()), str(source), str(plan), str(out)]
    env = os.environ | {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, env=env, text=True)
    taken: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return taken


def warm(folder: Path) -> None:
    """Read everything once."""
    buffer = bytearray(BUFFER)
    for file in folder.glob("*.safetensors"):
        with file.open("rb", buffering=0) as handle:
            while handle.readinto(buffer):  # type: ignore[attr-defined]
                pass


def remove(path: Path) -> None:
    """Remove an output, of whatever kind."""
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def in_a_process(task: str, *arguments: object) -> str:
    """Do something that would make this process grow: a child counts the memory of the process that started it."""
    command = [sys.executable, __file__, "--child", task, "0", *map(str, arguments)]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def prepare(kind: str, source: Path, plan: Path) -> int:
    """Build a checkpoint and a plan that keeps a random half, unless they are there; gives the number of tensors."""
    if not (source / "surviving").exists():
        remove(source)
        in_a_process("prepare", kind, source, plan)
    index = json.loads((source / "model.safetensors.index.json").read_text())
    return len(index["weight_map"])


def prepare_here(kind: str, source: Path, plan: Path) -> None:
    """The work of :func:`prepare`."""
    build(source, *(HEADERS[kind]() if kind in HEADERS else qwen3(small=kind == "small")))
    surviving = random_half(source, plan)
    if kind in HEADERS:  # as many files as the real checkpoint would have
        (source / "shard-size").write_text(str(surviving // SHARDS))
    (source / "surviving").write_text(str(surviving))


def random_half(source: Path, plan: Path) -> int:
    """Write a plan that keeps a random half of the experts; gives the bytes that survive it."""
    import moeprune
    from moeprune.rewrite.drop import keep_lists, output_tensors

    statistics_of_nothing = moeprune.collect(source)
    made = moeprune.plan(
        statistics_of_nothing, source, ratio=0.5, strategy="random", output=plan, overwrite=plan.exists()
    )
    return sum(tensor.nbytes for tensor in output_tensors(moeprune.open_checkpoint(source), keep_lists(made)))


def compare(work: Path, *, small: bool, repeats: int) -> None:
    """All ways on one checkpoint."""
    source, plan, out = work / "base", work / "plan.json", work / "out"
    prepare("small" if small else "full", source, plan)
    size = sum(file.stat().st_size for file in source.glob("*.safetensors"))
    print(f"{size / 1e9:.2f} GB in, {int((source / 'surviving').read_text()) / 1e9:.2f} GB out; {os.cpu_count()} cores")
    rows: dict[str, list[dict[str, float]]] = {name: [] for name in WAYS}
    for number in range(repeats):
        for name in WAYS:
            if number and name.startswith(("safetensors", "transformers")):
                continue  # slow, and far from any limit
            if name != "moeprune verify":
                remove(out)
            rows[name].append(run(name, source, plan, out))
    remove(out)
    report(rows, small=small)


def report(rows: dict[str, list[dict[str, float]]], *, small: bool) -> None:
    """A table, and whether the target is met."""
    plain = statistics.median(row["seconds"] for row in rows["plain copy"])
    print(f"{'':32} {'seconds':>8} {'ratio':>6} {'start-up':>9} {'peak MB':>8}  all runs")
    for name, runs in rows.items():
        seconds, startup = (statistics.median(row[key] for row in runs) for key in ("seconds", "startup"))
        each = " ".join(f"{row['seconds']:.2f}" for row in runs)
        peak = max(row["rss"] for row in runs) / 1e6
        print(f"{name:32} {seconds:8.2f} {seconds / plain:6.2f} {startup:9.2f} {peak:8.0f}  {each}")
    pairs = zip(rows["moeprune apply"], rows["plain copy"], strict=True)
    ratio = statistics.median(ours["seconds"] / copy["seconds"] for ours, copy in pairs)
    judged = "the target is for the full size" if small else f"target {RATIO_TARGET}: {met(ratio <= RATIO_TARGET)}"
    print(f"moeprune / plain copy {ratio:.2f} (median of pairs), {judged}")


def headers(work: Path) -> None:
    """Peak memory on checkpoints of very many tensors."""
    for number, kind in enumerate(HEADERS):
        source, plan, out = work / f"headers-{number}", work / f"plan-{number}.json", work / "out"
        count = prepare(kind, source, plan)
        limit = 150 + max(0, count - 100_000) * 1024 / 1e6
        remove(out)
        for name in ("moeprune apply", "moeprune verify"):
            taken = run(name, source, plan, out)
            peak = taken["rss"] / 1e6
            print(
                f"{kind}: {count:,} tensors, {name}: {peak:.0f} MB at its peak in {taken['seconds']:.1f} s, "
                f"target {limit:.0f} MB: {met(peak <= limit)}"
            )
        remove(out)


def met(good: bool) -> str:
    """A word for it."""
    return "met" if good else "MISSED"


def main() -> None:
    """Read the command line."""
    if sys.argv[1:2] == ["--child"]:
        task, started, *arguments = sys.argv[2:]
        if task == "prepare":
            prepare_here(arguments[0], *map(Path, arguments[1:]))
        else:
            child(task, float(started), *map(Path, arguments))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for the checkpoints; kept, to be used again")
    parser.add_argument("--small", action="store_true", help="80 MB instead of 4.7 GiB")
    parser.add_argument("--headers", action="store_true", help="memory on synthetic headers")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    if options.headers:
        headers(options.work)
    else:
        compare(options.work, small=options.small, repeats=options.repeats)


if __name__ == "__main__":
    main()
