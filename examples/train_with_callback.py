"""Collect router statistics while transformers' Trainer trains. Runs on the bundled model, in one process or in many.

python examples/train_with_callback.py OUTPUT
torchrun --nproc-per-node 2 examples/train_with_callback.py OUTPUT
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainingArguments,
)

import moeprune
from moeprune.pipeline import BUNDLED


def main(output: Path) -> None:
    """Train a few steps, evaluate in between, and plan from what was seen in training."""
    folder = BUNDLED / "model"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.gradient_checkpointing_enable()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = [json.loads(line) for line in (BUNDLED / "calibration.jsonl").read_text(encoding="utf-8").splitlines()]
    data = [tokenizer(row["text"]) for row in rows[:40]]

    # Written every second optimizer step and at the end; tokens of the evaluations do not count.
    callback = moeprune.statistics_callback(output / "statistics.safetensors", every_steps=2)
    arguments = TrainingArguments(
        str(output / "training"),
        max_steps=4,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="no",
        report_to="none",
        use_cpu=not torch.cuda.is_available(),
    )
    trainer = Trainer(
        model,
        arguments,
        train_dataset=data[:32],
        eval_dataset=data[32:],
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
        callbacks=[callback],
    )
    trainer.train()

    if trainer.is_world_process_zero():
        plan = moeprune.plan(output / "statistics.safetensors", folder, ratio=0.5, output=output / "plan.json")
        print(f"keep {plan.kept} experts in {len(plan.layers)} layers")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
