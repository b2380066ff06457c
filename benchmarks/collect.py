"""Time of a calibration pass against plain forward passes over the same batches, in turn, in one process.

    python benchmarks/collect.py [MODEL] [--dtype float32] [--threads 2]

Target: at most 1.25 times the plain pass (median of the paired ratios, core statistics, bundled model).
"""

from __future__ import annotations

import argparse
import resource
import statistics
import time
from pathlib import Path
from typing import Any

TARGET = 1.25


def plain(model: Any, batches: Any) -> float:
    """Seconds of the forward passes alone."""
    import torch

    from moeprune.collectors.resident import padded

    start = time.perf_counter()
    with torch.inference_mode():
        for batch in batches:
            model(**padded(batch.sequences, model.device), use_cache=False, logits_to_keep=1)
    return time.perf_counter() - start


def observed(model: Any, batches: Any, checkpoint: Any) -> float:
    """Seconds of the same passes with every core statistic added up."""
    from moeprune.collectors.resident import run_batches

    start = time.perf_counter()
    run_batches(model, batches, checkpoint).result()
    return time.perf_counter() - start


def main() -> None:
    """Print the median times and their ratio."""
    from moeprune import load_calibration, open_checkpoint
    from moeprune.collectors.resident import load_model
    from moeprune.pipeline import BUNDLED

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", type=Path, default=BUNDLED / "model")
    parser.add_argument("--calibration", default=str(BUNDLED / "calibration.jsonl"))
    parser.add_argument("--batch-tokens", type=int, default=8192)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    import torch

    torch.set_num_threads(options.threads)
    checkpoint = open_checkpoint(options.model)
    model = load_model(checkpoint, device="cpu", dtype=options.dtype)
    data = load_calibration([options.calibration], checkpoint.path)
    batches = data.batches(options.batch_tokens)
    plain(model, batches), observed(model, batches, checkpoint)  # warm-up
    pairs = [(plain(model, batches), observed(model, batches, checkpoint)) for _ in range(options.repeats)]
    ratio = statistics.median(with_sums / alone for alone, with_sums in pairs)
    alone, with_sums = (statistics.median(column) for column in zip(*pairs, strict=True))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    print(f"{checkpoint}; {data.tokens:,} tokens in {len(batches)} batches, {model.dtype}, {options.threads} threads")
    print(f"plain {alone:.2f} s, observed {with_sums:.2f} s, ratio {ratio:.3f} (median of {options.repeats} pairs)")
    print(f"target at most {TARGET}: {'met' if ratio <= TARGET else 'missed'}; peak memory {peak:.0f} MB")


if __name__ == "__main__":
    main()
