"""Every grouping, merge and router on the three bundled models, against dropping to the same size: held-out perplexity.

    python benchmarks/fuse.py --work WORK -o docs/benchmarks/fuse.md

Calibration and held-out text share no passage. Each checkpoint is written, loaded and thrown away; what was measured is
kept in the work folder, so that an interrupted run goes on where it stopped. `--only sequential` measures the rows that
are fused layer by layer, and beside each the one that differs from it in that alone.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import moeprune
from moeprune.evaluation.agreement import TokenLosses, perplexity, perplexity_ratio, token_losses
from moeprune.pipeline import BUNDLED
from moeprune.strategies.fusion import GROUPINGS

FIXTURES = Path(__file__).parents[1] / "tests" / "fixtures"
MODELS = {
    "Qwen3": BUNDLED / "model",
    "GLM-4": FIXTURES / "glm4_moe",
    "DeepSeek-V3": FIXTURES / "deepseek_v3",
}
CALIBRATION, HELDOUT = str(BUNDLED / "calibration.jsonl"), BUNDLED / "heldout.jsonl"
DEFAULT = ("hope-total", "absorb", "keep-dominant")
AT_ONCE, IN_ORDER = "", "sequential"
Row = tuple[str, str, str, str, str]  # ratio, grouping, merge, router, order; a drop has only a strategy


def rows() -> Iterator[Row]:
    """What is measured, some of it twice: dropping, the default, and one choice at a time in its place."""
    grouping, merge, router = DEFAULT
    for ratio in ("0.25", "0.5"):
        yield (ratio, grouping, "", "", AT_ONCE)
        yield (ratio, grouping, merge, router, AT_ONCE)
        yield (ratio, grouping, merge, "tied", AT_ONCE)
    for other in ("gated-norm", *GROUPINGS):
        yield ("0.5", other, merge, router, AT_ONCE)
    for other in ("least-squares", "frequency", "mean", "slerp", "svd"):
        yield ("0.5", grouping, other, router, AT_ONCE)
    yield ("0.5", grouping, "frequency", "merge-rows", AT_ONCE)
    yield ("0.5", grouping, "frequency", "tied", AT_ONCE)
    yield ("0.5", "m-smoe", "frequency", router, AT_ONCE)
    yield ("0.5", "hc-smoe", "frequency", "tied", AT_ONCE)
    for pair in sequential_rows():
        yield from pair


def sequential_rows() -> Iterator[tuple[Row, Row]]:
    """Pairs that differ in the order alone: the default, and REAM's groups absorbed or, as published, averaged."""
    for ratio in ("0.5", "0.25"):
        for how in (DEFAULT, ("ream", "absorb", "keep-dominant"), ("ream", "frequency", "keep-dominant")):
            yield (ratio, *how, AT_ONCE), (ratio, *how, IN_ORDER)


class Bench:
    """One model with its statistics and its held-out text."""

    def __init__(self, name: str, work: Path) -> None:
        from transformers import AutoTokenizer

        self.folder, self.work = MODELS[name], work / name
        self.work.mkdir(parents=True, exist_ok=True)
        statistics, needs = self.work / "statistics.safetensors", ("output_sum_all", "gated_output_sum", "logit_gram")
        if not statistics.is_file():
            moeprune.collect(self.folder, statistics, calibration=CALIBRATION, statistics=needs)
        self.statistics = moeprune.RouterStatistics.load(statistics)
        tokenizer = AutoTokenizer.from_pretrained(self.folder)
        texts = [json.loads(line)["text"] for line in HELDOUT.read_text(encoding="utf-8").splitlines()]
        self.sequences = [tokenizer(text, truncation=True, max_length=512)["input_ids"] for text in texts]
        self.base = self.losses(self.folder)

    def losses(self, folder: Path) -> TokenLosses:
        """Of a checkpoint on the held-out text."""
        return token_losses(moeprune.load(folder), self.sequences)

    def measured(self, row: Row) -> dict[str, Any]:
        """Perplexity over the original's with its interval, and the processor seconds of deciding and merging."""
        file = self.work / f"{'_'.join(filter(None, row))}.json"
        if not file.is_file():
            out, begun = self.work / "out", time.process_time()
            self.write(row, out)
            took = time.process_time() - begun
            ratio = perplexity_ratio(self.base, self.losses(out))
            file.write_text(json.dumps({"ratio": ratio.value, "interval": ratio.interval, "seconds": took}))
        found: dict[str, Any] = json.loads(file.read_text())
        return found

    def write(self, row: Row, out: Path) -> None:
        """Write the checkpoint of a row."""
        ratio, grouping, merge, router, order = row
        if not merge:
            plan = moeprune.plan(self.statistics, self.folder, ratio=ratio, strategy=grouping)
            moeprune.apply(self.folder, plan, out, overwrite=True)
            return
        choice: dict[str, Any] = {"grouping": grouping, "merge": merge, "router": router}
        if order == IN_ORDER:
            choice |= {"sequential": True, "calibration": CALIBRATION}
        else:
            data = CALIBRATION if merge in {"absorb", "least-squares"} else ()
            choice |= {"statistics": self.statistics, "calibration": data}
        moeprune.fuse(self.folder, out, ratio=ratio, overwrite=True, **choice)


def page(benches: dict[str, Bench], wanted: Sequence[Row], threads: int) -> str:
    """The table."""
    bases = ", ".join(f"{name} {perplexity(bench.base).value:.2f}" for name, bench in benches.items())
    lines = [
        "# Fusing against dropping",
        "",
        f"    python benchmarks/fuse.py --work WORK --threads {threads} -o docs/benchmarks/fuse.md",
        "",
        f"Held-out perplexity over the original's ({bases}) with its 95 % interval over documents, and the seconds",
        "of a processor from statistics to a verified checkpoint; a sequential one also collects them. Every row of",
        "a ratio has the same number of experts; `tied` also keeps the routers' rows. One calibration,",
        "nothing trained: a direction, not a verdict.",
        "",
        f"| removed | grouping | merge | router | layers | {' | '.join(benches)} | seconds |",
        f"|---|---|---|---|---|{'---|' * (len(benches) + 1)}",
    ]
    for row in wanted:
        ratio, grouping, merge, router, order = row
        found = [bench.measured(row) for bench in benches.values()]
        cells = [f"{one['ratio']:.3f} ({one['interval'][0]:.3f}..{one['interval'][1]:.3f})" for one in found]
        took = " / ".join(f"{one['seconds']:.1f}" for one in found)
        words = f"{ratio} | {grouping} | {merge or 'none: dropped'} | {router or 'of those that stay'}"
        lines.append(f"| {words} | {order or 'at once'} | {' | '.join(cells)} | {took} |")
    return "\n".join([*lines, ""])


def main() -> None:
    """Measure, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--only", choices=[IN_ORDER], help="these rows, each beside the one at once")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("-o", "--output", type=Path)
    given = parser.parse_args()
    import torch

    torch.set_num_threads(given.threads)
    benches = {name: Bench(name, given.work) for name in given.models.split(",")}
    wanted = [row for pair in sequential_rows() for row in pair] if given.only else list(dict.fromkeys(rows()))
    text = page(benches, wanted, given.threads)
    if given.output:
        given.output.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
