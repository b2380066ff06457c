"""`moeprune eval` of two models, against two plain lm-eval runs of the same models on the same tasks.

    python benchmarks/lm_eval_overhead.py --work DIR [--limits 100,500] [--repeats 3]

Runs the bundled model and a pruned copy of it on the bundled tasks, on the CPU. Each repeat runs, one after another for
each number of questions: lm-eval's command on one model, then on the other, with samples logged; `moeprune eval` on
both; and `moeprune eval` once more with an empty cache, which then keeps the base model's results. Every run is a
process of its own on a warm disk cache. Prints medians of seconds and of CPU seconds, and their ratios: of whole runs,
and of what each further question costs, which is the difference between the numbers of questions and so without the
start of programs.

Target: at most 1.1 times two plain runs.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path

import moeprune

TARGET = 1.1
DATA = Path(moeprune.__file__).parent / "data"
KINDS = ("two lm-eval runs", "moeprune eval", "moeprune eval, kept")


def spent(command: list[str], work: Path) -> tuple[float, float]:
    """Seconds and CPU seconds of a command; plain lm-eval looks for data files where it is started."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    environment |= {"HF_DATASETS_CACHE": str(work / "datasets"), "MOEPRUNE_CACHE": str(work / "cache")}
    begun, before = time.perf_counter(), os.times()
    done = subprocess.run(command, cwd=DATA / "tasks", env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
    after = os.times()
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return time.perf_counter() - begun, cpu


def lm_eval(model: Path, limit: int, work: Path) -> tuple[float, float]:
    """lm-eval's own command on one model."""
    command = [sys.executable, "-m", "lm_eval", "run", "--model", "hf", "--model_args", f"pretrained={model}"]
    command += ["--tasks", "tiny", "--include_path", str(DATA / "tasks"), "--batch_size", "16", "--device", "cpu"]
    command += ["--limit", str(limit), "--log_samples", "--output_path", str(work / "plain")]
    return spent(command, work)


def eval_both(base: Path, pruned: Path, limit: int, work: Path, *extra: str) -> tuple[float, float]:
    """`moeprune eval` of both models."""
    command = [sys.executable, "-m", "moeprune", "eval", str(base), str(pruned), "--tasks", "tiny"]
    command += ["--include-path", str(DATA / "tasks"), "--batch-size", "16", "--device", "cpu", "--overwrite"]
    return spent([*command, "--limit", str(limit), "-o", str(work / "report"), *extra], work)


def measure(options: argparse.Namespace) -> dict[tuple[str, int], tuple[float, float]]:
    """Medians of seconds and CPU seconds, by kind of run and number of questions."""
    base, pruned, work = DATA / "model", options.work / "pruned", options.work
    moeprune.prune(base, pruned, ratio=0.5, strategy="random", overwrite=True)
    found: dict[tuple[str, int], list[tuple[float, float]]] = defaultdict(list)
    for _ in range(options.repeats):
        for limit in options.limits:
            plain = [lm_eval(model, limit, work) for model in (base, pruned)]
            found["two lm-eval runs", limit].append((sum(run[0] for run in plain), sum(run[1] for run in plain)))
            found["moeprune eval", limit].append(eval_both(base, pruned, limit, work, "--no-cache"))
            shutil.rmtree(work / "cache", ignore_errors=True)
            found["moeprune eval, kept", limit].append(eval_both(base, pruned, limit, work))
    return {
        key: (statistics.median(run[0] for run in runs), statistics.median(run[1] for run in runs))
        for key, runs in found.items()
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for what is written")
    parser.add_argument("--limits", default="100,500", help="questions per task; there are 1000 in each of 7 tasks")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    options.work = options.work.resolve()
    options.limits = [int(limit) for limit in options.limits.split(",")]
    found = measure(options)
    print(f"{'':22}questions  seconds  ratio  CPU s  ratio")
    for limit in options.limits:
        shown({kind: found[kind, limit] for kind in KINDS}, str(7 * limit))
    fewest, most = min(options.limits), max(options.limits)
    if fewest < most:
        further = {
            kind: tuple(after - before for after, before in zip(found[kind, most], found[kind, fewest], strict=True))
            for kind in KINDS
        }
        shown({kind: (seconds, cpu) for kind, (seconds, cpu) in further.items()}, f"{7 * (most - fewest)} more")
    print(f"target: at most {TARGET} times two plain runs")


def shown(runs: dict[str, tuple[float, float]], questions: str) -> None:
    """One line for each kind of run."""
    plain = runs[KINDS[0]]
    for kind, (seconds, cpu) in runs.items():
        ratios = f"{seconds / plain[0]:7.2f}  {cpu:5.1f}{cpu / plain[1]:7.2f}"
        print(f"{kind:22}{questions:>9}  {seconds:7.1f}{ratios}")


if __name__ == "__main__":
    main()
