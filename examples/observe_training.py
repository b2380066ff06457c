"""Collect router statistics inside a training loop, at the cost of almost nothing. Runs on the bundled model.

python examples/observe_training.py OUTPUT
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import moeprune
from moeprune.pipeline import BUNDLED

STEPS, ACCUMULATE = 4, 2


def main(output: Path) -> None:
    """Train a few steps with gradient checkpointing and accumulation, observed, and plan from what was seen."""
    folder = BUNDLED / "model"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).train()
    model.gradient_checkpointing_enable()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = [json.loads(line) for line in (BUNDLED / "calibration.jsonl").read_text(encoding="utf-8").splitlines()]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)

    # Every token counts once, recomputed or not; padding is left out by the batch's own attention_mask.
    with moeprune.observe(model) as stats:
        for step in range(STEPS * ACCUMULATE):
            batch_rows = rows[4 * step : 4 * step + 4]
            batch = tokenizer([row["text"] for row in batch_rows], return_tensors="pt", padding=True)
            labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
            with stats.domain("mixed"):
                loss = model(**batch, labels=labels, use_cache=False).loss / ACCUMULATE
            loss.backward()
            if step % ACCUMULATE == ACCUMULATE - 1:
                optimizer.step()
                optimizer.zero_grad()
    output.mkdir(parents=True, exist_ok=True)
    stats.save(output / "statistics.safetensors")

    plan = moeprune.plan(output / "statistics.safetensors", folder, ratio=0.5, output=output / "plan.json")
    print(f"{stats.result().tokens:,} tokens seen; keep {plan.kept} experts in {len(plan.layers)} layers")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
