"""Prune a loaded model in place, go on training it, and save a stock checkpoint. Runs on the bundled model.

python examples/prune_in_memory.py OUTPUT
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import moeprune
from moeprune.pipeline import BUNDLED


def main(output: Path) -> None:
    """Write the pruned and slightly trained model into ``output/pruned``."""
    folder = BUNDLED / "model"
    statistics = moeprune.collect(folder, calibration=str(BUNDLED / "calibration.jsonl"), num_samples=64)
    plan = moeprune.plan(statistics, folder, ratio=0.5)

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    before = sum(parameter.numel() for parameter in model.parameters())
    moeprune.prune_model(model, plan)
    after = sum(parameter.numel() for parameter in model.parameters())
    print(f"{before:,} -> {after:,} parameters")

    # The optimizer comes after pruning: the parameters are new ones.
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    batch = AutoTokenizer.from_pretrained(folder)("for item in items:\n    print(item)", return_tensors="pt")
    model(**batch, labels=batch["input_ids"]).loss.backward()
    optimizer.step()

    # The base's tensor names, dtypes and config; the plan's new counts; nothing that save_pretrained would lose.
    moeprune.save_model(model, output / "pruned", like=folder, plan=plan)
    again = AutoModelForCausalLM.from_pretrained(output / "pruned")
    print(f"saved and loaded: {again.config.num_experts} experts per layer")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
