"""The stages one by one from Python: collect, plan, apply, verify, evaluate. Runs on the bundled model.

python examples/stages.py OUTPUT
"""

from __future__ import annotations

import sys
from pathlib import Path

import moeprune
from moeprune.pipeline import BUNDLED


def main(output: Path) -> None:
    """Write statistics, two plans, a pruned checkpoint and a report into ``output``."""
    model = BUNDLED / "model"
    statistics = moeprune.collect(
        model, output / "statistics.safetensors", calibration=str(BUNDLED / "calibration.jsonl"), num_samples=128
    )
    print(f"{statistics.tokens:,} tokens in the domains {', '.join(statistics.domains)}")

    # One calibration serves any number of plans: other ratios, strategies and domain weights.
    careful = moeprune.plan(statistics, model, ratio=0.25)
    plan = moeprune.plan(statistics, model, ratio=0.5, weights={"code": 2}, output=output / "plan.json")
    print(f"keep {careful.kept} or {plan.kept} of {statistics.num_experts} experts")

    pruned = moeprune.apply(model, plan, output / "pruned")
    proof = moeprune.verify(model, pruned)
    print(f"{proof.tensors} tensors equal the source")

    report = moeprune.evaluate(
        model, pruned, tasks="tiny_code", include_path=BUNDLED / "tasks", limit=40, output=output / "report"
    )
    for task in report.tasks:
        low, high = task.interval
        print(f"{task.task}: {task.change:+.1f} points ({low:+.1f} to {high:+.1f}), {task.verdict}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
