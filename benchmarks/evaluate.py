"""Many plans in one pass over the layers of a model, against one pass for each of them.

    python benchmarks/evaluate.py --work DIR [--layers 4] [--samples 8] [--length 512] [--plans 4,16] [--small]

The model has the layer shapes of Qwen3-30B-A3B (hidden 2048, 128 experts of 768, top-8; 1.2 GB a layer in bfloat16) and
random weights; every plan drops half of the experts, drawn for each layer. Each number of plans is scored layer by
layer in a process of its own on a warm cache: seconds from the first read of the model to the finished report, and the
peak of anonymous memory above what the process held after all imports.

The weights are read once for all plans, and the base model runs once; each plan has to run the tokens for itself. So n
plans take at least (n + 1) / 2n of the time of n passes with a plan each, and less where reading counts for more.
Targets: 16 plans in at most 0.6 times the seconds of 16 passes; the forecast within 15 % of what is measured.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from stream import build, status, watched_peak, write_ids

TARGET = 0.6


def write_plans(model: Path, folder: Path, count: int) -> list[Path]:
    """Plans whose experts are drawn, each with another seed."""
    import moeprune

    checkpoint = moeprune.open_checkpoint(model)
    nothing = moeprune.RouterStatistics.empty(
        checkpoint.moe_layers,
        num_experts=checkpoint.num_experts,
        top_k=checkpoint.top_k,
        model=checkpoint.fingerprint,
    )
    files = [folder / f"plan-{checkpoint.path.name}-{seed}.json" for seed in range(count)]
    for seed, file in enumerate(files):
        moeprune.plan(nothing, model, ratio=0.5, strategy="random", seed=seed, output=file, overwrite=True)
    return files


def score(options: argparse.Namespace) -> None:
    """Score some plans in this process; prints seconds, memory and forecast as JSON."""
    import accelerate
    import scipy.stats
    import torch
    import transformers.models.qwen3_moe.modeling_qwen3_moe as qwen3_moe

    import moeprune
    from moeprune.evaluation import streamed
    from moeprune.scoring import forecast_text

    assert all((accelerate, scipy.stats, qwen3_moe, streamed))  # imported before the idle process is weighed
    torch.set_num_threads(options.threads)
    given: dict[str, Any] = {"text": str(options.ids), "batch_tokens": options.batch_tokens, "device": "cpu"}
    given |= {"stream": True}
    expected = forecast_text(options.model, options.files, **given)
    assert expected is not None
    idle, begun = status("RssAnon"), time.perf_counter()
    with watched_peak() as peak:
        report = moeprune.evaluate_text(options.model, options.files, **given)
    found = {"seconds": time.perf_counter() - begun, "peak": peak[0] - idle, "forecast": expected.host}
    print(json.dumps(found | {"ratios": [plan.ratio.value for plan in report.plans]}), flush=True)


def child(options: argparse.Namespace, model: Path, ids: Path, files: list[Path]) -> dict[str, Any]:
    """Score plans in a process of their own."""
    command = [sys.executable, __file__, "--work", str(options.work), "--model", str(model), "--ids", str(ids)]
    command += ["--batch-tokens", str(options.batch_tokens), "--threads", str(options.threads), *map(str, files)]
    environment = os.environ | {"MALLOC_ARENA_MAX": "2", "OMP_NUM_THREADS": str(options.threads)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"scoring {len(files)} plans failed:\n{done.stderr[-3000:]}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    """Build the model, score the plans, print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, required=True, help="folder for the model; kept and used again")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--plans", default="4,16", help="how many plans to score at a time")
    parser.add_argument("--batch-tokens", type=int, default=2048)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--small", action="store_true", help="an eighth of the width, for a quick look")
    for name in ("--model", "--ids"):
        parser.add_argument(name, type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.files:
        score(options)
        return
    name = f"model-{options.layers}{'-small' * options.small}"
    model = build(options.work / name, options.layers, small=options.small)
    ids = write_ids(options.work, options.samples, options.length)
    shown(options, model, ids)


def shown(options: argparse.Namespace, model: Path, ids: Path) -> None:
    """Measure and print."""
    from moeprune import open_checkpoint

    counts = [int(count) for count in options.plans.split(",")]
    files = write_plans(model, options.work, max(counts))
    child(options, model, ids, files[:1])  # warms the cache
    before = child(options, model, ids, files[:1])
    found = {count: child(options, model, ids, files[:count]) for count in counts}
    alone = min(before, child(options, model, ids, files[:1]), key=lambda run: run["seconds"])
    print(f"{open_checkpoint(model).nbytes / 1e9:.1f} GB of weights, {options.layers} layers")
    print(f"{options.samples * options.length:,} tokens, batches of {options.batch_tokens}, {options.threads} threads")
    print(f"a pass with one plan: {alone['seconds']:.1f} s, the faster of two before and after the others")
    print("plans  seconds  per plan  of as many passes  memory GB  forecast GB")
    for count, run in found.items():
        share = run["seconds"] / (count * alone["seconds"])
        memory = f"{run['peak'] / 1e9:9.2f}  {run['forecast'] / 1e9:11.2f}"
        print(f"{count:5}  {run['seconds']:7.1f}  {run['seconds'] / count:8.2f}  {share:17.2f}  {memory}")
        assert run["ratios"][0] == alone["ratios"][0], "a plan's score depends on the plans beside it"
    print(f"targets: at most {TARGET} of as many passes for 16 plans, the forecast within 15 %")


if __name__ == "__main__":
    main()
