"""Statistics for expert pruning beside plain forward passes, and beside llm-compressor's REAP modifier.

    python -m venv PEER && PEER/bin/pip install llmcompressor==0.14.0.1 transformers==5.17.0 torch==2.13.0
    python benchmarks/collect_peers.py --work DIR --peer-python PEER/bin/python [--repeats 3] [--small]

One model (the layer shapes of Qwen3-30B-A3B: hidden 2048, 128 experts of 768, top-8; four layers, 4.7 GB of random
weights in bfloat16), the same batches of the same tokens, one process per way, a warm cache. Seconds count from the
first read of the model to the finished statistics, or to a model that is pruned in memory for llm-compressor, which has
no other result; CPU seconds are those of all threads. Memory is the peak of anonymous memory above what the process
held after its imports, and the peak of all resident memory, in which mapped files count too. llm-compressor runs in
three ways:

    by its example    as its own REAP example does: from_pretrained, experts see the tokens that are routed to them
    leanest           loaded into the layout that it works on; every layer runs once; the causal mask is given to it
    by default        as oneshot() does when nothing else is said: every expert sees every token

Only the leanest way scores the model that moeprune scores: the others score each layer behind layers that are pruned
already. They also attend to later tokens, since no causal mask reaches the attention in what llm-compressor traces
(0.14.0.1 with transformers 5.17). `--dtype float32` compares the scores without the rounding of bfloat16.

Targets: at most 1.25 times the seconds of the forward passes; at least 5 times as fast as llm-compressor; streamed, at
most a quarter of its resident memory.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from stream import build, status, watched_peak, write_ids

FORWARD_TARGET, SPEED_TARGET, MEMORY_TARGET = 1.25, 5.0, 0.25
FORWARD, RESIDENT, STREAMED = "plain forward passes", "moeprune collect", "moeprune collect --stream"
PEERS = {
    "llm-compressor, by its example": {"moe_calibrate_all_experts": False},
    "llm-compressor, leanest": {"moe_calibrate_all_experts": False, "propagate_error": False},
    "llm-compressor, by default": {},
}
LEANEST = list(PEERS)[1]
RATIO = 0.5
Found = dict[str, Any]  # what a way took: seconds, cpu, anonymous, resident; versions; saliencies of llm-compressor
Work = Callable[[], Found]


# --- the ways, each in a process of its own -------------------------------------------------------------------------


def plain(options: argparse.Namespace) -> Work:
    """Every batch through the model, and nothing else."""
    import torch
    import transformers.models.qwen3_moe.modeling_qwen3_moe as qwen3_moe
    from transformers import AutoModelForCausalLM

    assert qwen3_moe  # imported before the idle process is weighed

    def work() -> Found:
        model = AutoModelForCausalLM.from_pretrained(options.model, dtype=options.dtype).eval()
        with torch.inference_mode():
            for batch in batches_of(options):
                model(**batch, use_cache=False, logits_to_keep=1)
        return {}

    return work


def moeprune(options: argparse.Namespace) -> Work:
    """``moeprune collect``."""
    import accelerate
    import datasets
    import transformers.models.qwen3_moe.modeling_qwen3_moe as qwen3_moe

    from moeprune import collect
    from moeprune.collectors import resident, stream

    assert all((accelerate, datasets, qwen3_moe, resident, stream))
    given = {"calibration": str(options.ids), "batch_tokens": options.batch_tokens, "dtype": options.dtype}

    def work() -> Found:
        collect(options.model, options.output, overwrite=True, device="cpu", stream=options.way == STREAMED, **given)
        return {}

    return work


def peer(options: argparse.Namespace) -> Work:
    """llm-compressor's REAP modifier, in the Python that it is installed in."""
    import torch
    import transformers.models.qwen3_moe.modeling_qwen3_moe as qwen3_moe
    from llmcompressor import oneshot
    from llmcompressor.modeling.moe.linearize import load_quantizable_moe
    from llmcompressor.modifiers.pruning import REAPPruningModifier
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    assert qwen3_moe
    leanest = options.way == LEANEST
    loading = load_quantizable_moe if leanest else contextlib.nullcontext
    for name in [name for name in sys.modules if ".image_processing_" in name]:
        del sys.modules[name]  # aliases that the loader looks into, and that fail where there is no torchvision

    def work() -> Found:
        with loading(), recorded_saliencies() as saliencies:
            model = AutoModelForCausalLM.from_pretrained(options.model, dtype=options.dtype)
            batches = batches_of(options, causal=model.dtype if leanest else None)
            data = torch.utils.data.DataLoader(batches, batch_size=None)
            recipe = REAPPruningModifier(sparsity=RATIO, report_path=str(options.output))
            # Token ids need no tokenizer, and something has to stand in its place.
            given = PEERS[options.way]
            oneshot(model=model, processor=PreTrainedTokenizerFast, dataset=data, recipe=recipe, **given)
        assert model.config.num_experts == len(next(iter(kept_by(options.output).values())))
        return {"saliencies": saliencies}

    return work


@contextlib.contextmanager
def recorded_saliencies() -> Iterator[list[list[float]]]:
    """The scores by which llm-compressor chooses, layer after layer: its report has the choice alone."""
    from llmcompressor.modifiers.pruning.reap.utils import REAPSaliencyTracker

    original, found = REAPSaliencyTracker.compute_retained_experts, []

    def recording(tracker: Any, *arguments: Any) -> Any:
        found.append(tracker.mean_saliency.tolist())
        return original(tracker, *arguments)

    REAPSaliencyTracker.compute_retained_experts = recording
    try:
        yield found
    finally:
        REAPSaliencyTracker.compute_retained_experts = original


def batches_of(options: argparse.Namespace, *, causal: Any = None) -> list[dict[str, Any]]:
    """The batches that moeprune makes of the tokens, without padding; with a causal mask of some dtype to add."""
    import torch

    batches = []
    for rows in json.loads(options.batches.read_text()):
        ids = torch.tensor(rows)
        mask = torch.ones_like(ids)
        if causal is not None:
            least = torch.finfo(causal).min
            mask = torch.full((len(ids), 1, *2 * ids.shape[1:]), least, dtype=causal).triu(1)
        batches.append({"input_ids": ids, "attention_mask": mask})
    return batches


def run_way(options: argparse.Namespace) -> None:
    """Do it once, and print what it took as JSON."""
    import torch

    torch.set_num_threads(options.threads)
    work = {FORWARD: plain, RESIDENT: moeprune, STREAMED: moeprune}.get(options.way, peer)(options)
    idle, begun, busy = status("RssAnon"), time.perf_counter(), time.process_time()
    with watched_peak() as peak:
        found = work()
    found |= {"seconds": time.perf_counter() - begun, "cpu": time.process_time() - busy}
    found |= {"anonymous": peak[0] - idle, "resident": status("VmHWM"), "versions": versions()}
    print(json.dumps(found), flush=True)


def versions() -> str:
    """What is installed here."""
    installed = {each.metadata["Name"]: each.version for each in importlib.metadata.distributions()}
    names = ("torch", "transformers", "moeprune", "llmcompressor")
    return ", ".join(f"{name} {installed[name]}" for name in names if name in installed)


# --- side by side ---------------------------------------------------------------------------------------------------


def main() -> None:
    """Run every way in turn and print the figures beside the targets."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path)
    parser.add_argument("--peer-python", type=Path, help="of an environment that has llmcompressor")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--batch-tokens", type=int, default=2048)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--small", action="store_true", help="an eighth of the width, for a quick look")
    parser.add_argument("--way", help=argparse.SUPPRESS)
    for name in ("--model", "--ids", "--batches", "--output"):
        parser.add_argument(name, type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.way:
        run_way(options)
        return
    prepare(options)
    ways = [FORWARD, RESIDENT, STREAMED, *(PEERS if options.peer_python else ())]
    runs: dict[str, list[Found]] = {way: [] for way in ways}
    for _ in range(options.repeats):
        for way in ways:
            runs[way].append(child(options, way))
            print(f"{way}: {runs[way][-1]['seconds']:.1f} s", file=sys.stderr)
    show(options, runs)


def prepare(options: argparse.Namespace) -> None:
    """Build the model and the batches, and read the model's files once."""
    from moeprune import load_calibration

    folder = options.work / f"model-{options.layers}{'-small' * options.small}"
    options.model = build(folder, options.layers, small=options.small)
    options.ids = write_ids(options.work, options.samples, options.length)
    options.batches = options.work / "batches.json"
    batches = load_calibration([str(options.ids)], options.model).batches(options.batch_tokens)
    options.batches.write_text(json.dumps([batch.sequences for batch in batches]))
    for file in options.model.glob("*.safetensors"):
        with file.open("rb", buffering=0) as handle:
            while handle.read(1 << 24):
                pass


def child(options: argparse.Namespace, way: str) -> Found:
    """One measurement."""
    python = options.peer_python if way in PEERS else sys.executable
    command = [str(python), __file__, "--way", way, "--output", str(output_of(options, way))]
    for name in ("model", "ids", "batches", "batch_tokens", "dtype", "threads"):
        command += [f"--{name.replace('_', '-')}", str(getattr(options, name))]
    environment = os.environ | {"MALLOC_ARENA_MAX": "2", "OMP_NUM_THREADS": str(options.threads)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{way} failed:\n{done.stderr[-3000:]}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def output_of(options: argparse.Namespace, way: str) -> Path:
    """Where a way leaves its statistics, or its report."""
    number = [FORWARD, RESIDENT, STREAMED, *PEERS].index(way)
    return Path(options.work / f"way-{number}{'.json' if way in PEERS else '.safetensors'}")


def show(options: argparse.Namespace, runs: dict[str, list[Found]]) -> None:
    """Print the table, the targets, and whether the two tools agree."""
    size = sum(file.stat().st_size for file in options.model.glob("*.safetensors")) / 1e9
    tokens, cores = options.samples * options.length, len(os.sched_getaffinity(0))
    print(f"{size:.1f} GB, {options.layers} layers; {tokens:,} tokens; {options.threads} threads, {cores} cores")
    print(f"{'':32}{'seconds':>8}{'ratio':>7}{'CPU s':>8}{'anonymous GB':>14}{'resident GB':>13}  all runs")
    seconds = {way: statistics.median(run["seconds"] for run in found) for way, found in runs.items()}
    resident = {way: max(run["resident"] for run in found) for way, found in runs.items()}
    for way, found in runs.items():
        cpu = statistics.median(run["cpu"] for run in found)
        anonymous = max(run["anonymous"] for run in found)
        each = " ".join(f"{run['seconds']:.1f}" for run in found)
        row = f"{way:32}{seconds[way]:8.1f}{seconds[way] / seconds[FORWARD]:7.2f}{cpu:8.1f}"
        print(f"{row}{anonymous / 1e9:14.2f}{resident[way] / 1e9:13.2f}  {each}")
    for installed in dict.fromkeys(found[0]["versions"] for found in runs.values()):
        print(installed)
    for way in (RESIDENT, STREAMED):
        report(f"{way} / {FORWARD}", seconds[way] / seconds[FORWARD], FORWARD_TARGET, most=True)
    for theirs in (way for way in PEERS if way in runs):
        report(f"{theirs} / {RESIDENT}, seconds", seconds[theirs] / seconds[RESIDENT], SPEED_TARGET, most=False)
        report(f"{STREAMED} / {theirs}, memory", resident[STREAMED] / resident[theirs], MEMORY_TARGET, most=True)
    if options.peer_python:
        compare_choices(options, runs)
    else:
        print("llm-compressor: not measured (give --peer-python)")


def report(what: str, value: float, target: float, *, most: bool) -> None:
    """One figure beside its target."""
    met = value <= target if most else value >= target
    bound = "at most" if most else "at least"
    print(f"{what}: {value:.2f}, target {bound} {target:g}: {'met' if met else 'missed'}")


# --- do they agree? -------------------------------------------------------------------------------------------------


def kept_by(report_file: Path) -> dict[int, list[int]]:
    """Kept experts by layer from llm-compressor's report, whose keys are names such as ``model.layers.3.mlp``."""
    named = json.loads(report_file.read_text())
    return {int(name.split(".layers.")[1].split(".")[0]): kept for name, kept in named.items()}


def compare_choices(options: argparse.Namespace, runs: dict[str, list[Found]]) -> None:
    """Say by layer how many experts llm-compressor keeps that moeprune's ``reap`` keeps too, and how scores differ."""
    import numpy as np

    from moeprune import RouterStatistics, plan

    stats = RouterStatistics.load(output_of(options, RESIDENT))
    ours = plan(stats, options.model, ratio=RATIO, strategy="reap", guard=False).layers
    for way in PEERS:
        kept, saliencies = kept_by(output_of(options, way)), runs[way][-1]["saliencies"]
        same, off = [], []
        for (layer, theirs), saliency in zip(kept.items(), saliencies, strict=True):
            scores = np.asarray(ours[layer].scores)
            same.append(f"{len(set(theirs) & set(ours[layer].keep))} of {len(theirs)}")
            off.append(f"{np.max(np.abs(saliency - scores) / scores.max()):.1e}")
        print(f"{way}: kept by moeprune's reap too, by layer: {', '.join(same)}")
        print(f"{way}: scores differ by, of the largest: {', '.join(off)}")


if __name__ == "__main__":
    main()
