"""Time and memory of planning from a statistics file of DeepSeek-V3's size, for every strategy that reads nothing else.

    python benchmarks/plan.py --work /tmp/plan [--strategies hope-total router-hint]

58 MoE layers of 256 experts in 8 router groups, hidden size 7168, experts 2048 wide: every statistic that there is, of
all data and of half of it, in one domain, filled with random numbers; the checkpoint has the names and counts of
DeepSeek-V3 in block FP8 and tensors of a few bytes. Every plan (half of the experts) runs in a process of its own,
through the command line. Processor seconds are of that process, and do not depend on what else the machine does.

Targets: at most 10 seconds and 2 GB resident.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from rewrite import HEADERS, build

SECONDS, GIGABYTES = 10.0, 2.0
SIZES = {"H": 7168, "I": 2048}
SAMPLES = 8  # sequences that are described on their own


class Made(Mapping[str, Any]):
    """Random arrays of some statistics of one layer, made when they are asked for, so that they need not be held."""

    def __init__(
        self, names: Mapping[str, Any], layer: int, experts: int, *, domains: int | None = 1, share: float = 1.0
    ) -> None:
        self._names, self._layer, self._experts, self._domains, self._share = names, layer, experts, domains, share

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, name: str) -> Any:
        statistic = self._names[name]
        shape = statistic.shape(self._experts, {**SIZES, "S": SAMPLES})
        shape = shape if self._domains is None else (self._domains, *shape)
        rng = np.random.default_rng([self._layer, sorted(self._names).index(name)])
        if name in {"path_domain", "path_row"}:
            return np.arange(SAMPLES) * (name == "path_row")
        values = 100 + rng.integers(1 << 20, size=shape)
        if statistic.axes == "EE" and name not in {"transition_count", "wrap_count"}:
            values = values + np.swapaxes(values, -1, -2)
        return (values * self._share).astype(np.int64 if statistic.integer else np.float64)


def write_statistics(model: Path, file: Path) -> None:
    """A file of everything that can be collected."""
    from moeprune import open_checkpoint
    from moeprune.catalogue import FACTS, MORE, ROWS, STATISTICS
    from moeprune.statistics import RouterStatistics

    checkpoint = open_checkpoint(model)
    layers, experts = checkpoint.moe_layers, checkpoint.num_experts
    sums = {**STATISTICS, **MORE}

    def of(layer: int) -> dict[str, Any]:
        first = "transition" if layer == layers[0] else "wrap"
        return {name: one for name, one in sums.items() if not name.startswith(first)}

    RouterStatistics(
        domains=("text",),
        num_experts=experts,
        top_k=8,
        layers={layer: Made(of(layer), layer, experts) for layer in layers},
        command={"stage": "collect"},
        inputs={"model": checkpoint.fingerprint, "calibration": "0" * 64},
        first_half={layer: Made(of(layer), layer, experts, share=0.5) for layer in layers},
        facts={layer: Made(FACTS, layer, experts, domains=None) for layer in layers},
        rows={layer: Made(ROWS, layer, experts, domains=None) for layer in layers},
        sizes=SIZES,
    ).save(file)


def measured(command: list[str]) -> tuple[float, float, float]:
    """Seconds, processor seconds and peak gigabytes of a process."""
    code = (
        "import resource, subprocess, sys, time\n"
        "start = time.perf_counter()\n"
        "subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL)\n"
        "seconds, used = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)\n"
        "print(seconds, used.ru_utime + used.ru_stime, used.ru_maxrss)"
    )
    done = subprocess.run([sys.executable, "-c", code, *command], check=True, stdout=subprocess.PIPE, text=True)
    seconds, processor, kilobytes = map(float, done.stdout.split())
    return seconds, processor, kilobytes * 1024 / 1e9


def main() -> None:
    """Make the files where they are missing, plan by every strategy, print a row for each."""
    from moeprune.strategies import BUILTIN

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder of the checkpoint and the statistics, reused")
    parser.add_argument("--strategies", nargs="+", default=[name for name, one in BUILTIN.items() if not one.search])
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    model, file = options.work / "model", options.work / "statistics.safetensors"
    if not model.exists():
        build(model, *HEADERS["DeepSeek-V3, block FP8"]())
    if not file.exists():
        write_statistics(model, file)
    print(f"{file.stat().st_size / 1e9:.1f} GB of statistics\n")
    rows = []
    print("| strategy | seconds | processor seconds | GB resident |\n|---|--:|--:|--:|")
    for name in options.strategies:
        command = [sys.executable, "-m", "moeprune", "plan", str(file), str(model), "--ratio", "0.5", "-q"]
        seconds, processor, size = measured(
            [*command, "--strategy", name, "-o", str(options.work / "plan.json"), "--overwrite"]
        )
        print(f"| {name} | {seconds:.1f} | {processor:.1f} | {size:.2f} |", flush=True)
        rows.append((seconds, size))
    slowest, largest = (max(column) for column in zip(*rows, strict=True))
    for value, unit, target in ((slowest, "seconds", SECONDS), (largest, "GB", GIGABYTES)):
        print(f"\nat most {value:.1f} {unit}, target {target:g}: {'met' if value <= target else 'missed'}")


if __name__ == "__main__":
    main()
