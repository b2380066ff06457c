"""Every strategy on the three bundled models, experts masked in memory: tasks, held-out text and what planning takes.

    python benchmarks/strategies.py --work /tmp/strategies -o docs/benchmarks/strategies.md

Calibration, selection, held-out text and tasks share no passage. Each measurement is kept in the work folder, once for
all strategies that choose the same experts, so that an interrupted run goes on where it stopped and several processes
can share the work (``--models``, ``--reverse``, ``--measure-only``). ``strategies_page.py`` makes the page of them.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from strategies_page import Measured, Page, Run, load_run, run_file, save_run, wanted

from moeprune.pipeline import BUNDLED
from moeprune.plans import Budget
from moeprune.strategies import AUTO, BUILTIN, resolve

FIXTURES = Path(__file__).parents[1] / "tests" / "fixtures"
MODELS = {
    "qwen3_moe": BUNDLED / "model",
    "glm4_moe": FIXTURES / "glm4_moe",
    "deepseek_v3": FIXTURES / "deepseek_v3",
}
RATIOS = ("0.25", "0.5", "0.625")
ROWS = 256  # of the 383 of the calibration text: each seed draws its own
SELECTION_ROWS = 64  # what the command line takes of the selection text

Keeps = Mapping[int, tuple[int, ...]]


class Bench:
    """One bundled model with its statistics, its tasks and its texts."""

    def __init__(self, folder: Path, limit: int | None) -> None:
        from transformers import AutoTokenizer

        from moeprune import open_checkpoint
        from moeprune.collectors.resident import load_model
        from moeprune.evaluation.evaluator import ResidentEvaluator
        from moeprune.evaluation.settings import EvalSettings

        self.folder = folder
        self.checkpoint = open_checkpoint(folder)
        self.model: Any = load_model(self.checkpoint, device="cpu", dtype="float32")
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.heldout = ResidentEvaluator(self.model, self._encoded("heldout"))
        self.selection = ResidentEvaluator(self.model, self._encoded("selection"))
        self.chosen_on = self._loaded("selection", num_samples=SELECTION_ROWS)
        self.choosing = ResidentEvaluator(self.model, self.chosen_on.sequences)
        self.settings = EvalSettings(tasks=("tiny",), include_path=BUNDLED / "tasks", batch_size=32, limit=limit)
        self._calibrated: dict[int, tuple[Any, Any]] = {}

    def _encoded(self, name: str) -> list[list[int]]:
        rows = [json.loads(line)["text"] for line in (BUNDLED / f"{name}.jsonl").read_text("utf-8").splitlines()]
        return [self.tokenizer(text)["input_ids"] for text in rows]

    def _loaded(self, name: str, **options: Any) -> Any:
        """Rows of a bundled text, read as the command line does."""
        from moeprune._options import CalibrationOptions

        return CalibrationOptions(sources=(str(BUNDLED / f"{name}.jsonl"),), **options).load(self.checkpoint)

    def _calibration(self, seed: int) -> tuple[Any, Any]:
        """The rows that a seed draws, and the statistics of them."""
        from moeprune import collect

        if seed not in self._calibrated:
            source = str(BUNDLED / "calibration.jsonl")
            drawn: dict[str, Any] = {"num_samples": ROWS, "shuffle": True, "seed": seed}
            data = self._loaded("calibration", **drawn)
            found = collect(self.folder, calibration=source, dtype="float32", statistics=("all",), **drawn)
            self._calibrated[seed] = data, found
        return self._calibrated[seed]

    def plan(self, name: str, ratio: str, seed: int) -> tuple[Keeps, float]:
        """The experts that a strategy keeps, and the processor's seconds that choosing them took."""
        from moeprune.choosing import decide
        from moeprune.evaluation.reconstruction import ResidentSubsetLoss
        from moeprune.planner import Decisions

        if name == "none":
            return {}, 0.0
        strategy = resolve(name)
        data, statistics = self._calibration(0 if name == "random" else seed)
        choices = Decisions(budget=Budget(ratio=ratio), strategy=name, seed=seed)
        start = time.process_time()
        loss = None
        if strategy.search:
            loss = ResidentSubsetLoss(self.model, data.sequences, progressive=strategy.search == "progressive")
        evaluator = self.choosing if name == AUTO.name else None
        made = decide(self.checkpoint, statistics, choices, loss, evaluator, self.chosen_on if evaluator else None)
        seconds = time.process_time() - start
        return {layer: made.layers[layer].keep for layer in self.checkpoint.moe_layers}, seconds

    def measure(self, keeps: Keeps, loaded: Any, scratch: Path) -> Measured:
        """Run the tasks and both texts with nothing but these experts."""
        from moeprune.evaluation.harness import run_model
        from moeprune.evaluation.samples import read_run
        from moeprune.experts import expert_layers
        from moeprune.runtime.masking import masked

        with masked(expert_layers(self.model), keeps):
            run_model((self.model, self.tokenizer), self.settings, scratch, loaded=loaded)
        tasks = read_run(scratch).tasks
        correct = {
            name: np.array([_score(task.samples[key]) for key in sorted(task.samples)], dtype=np.int8)
            for name, task in sorted(tasks.items())
        }
        [heldout], [selection] = self.heldout([keeps]), self.selection([keeps])
        return Measured.of(correct, heldout, selection)


def _score(sample: Any) -> int:
    """1 for a right answer, chosen or written."""
    return int(sample.values["acc" if "acc" in sample.values else "exact_match"])


def _digest(keeps: Keeps) -> str:
    return hashlib.sha256(json.dumps(sorted(keeps.items())).encode()).hexdigest()[:16]


def measure_all(model: str, folder: Path, options: argparse.Namespace, jobs: Sequence[tuple[str, str, int]]) -> None:
    """Fill the work folder with what is missing of one model."""
    import tempfile

    from moeprune.evaluation.harness import prepare

    missing = [job for job in jobs if not run_file(options.work, model, *job).is_file()]
    if not missing:
        return
    bench = Bench(folder, options.limit)
    with prepare(bench.settings) as loaded:
        for job in missing:
            if run_file(options.work, model, *job).is_file():
                continue  # another process was here
            keeps, seconds = bench.plan(*job)
            run = Run(digest=_digest(keeps), seconds=seconds, keeps=keeps)
            place = options.work / model / f"{run.digest}.npz"
            if not place.is_file():
                with tempfile.TemporaryDirectory() as scratch:
                    bench.measure(keeps, loaded, Path(scratch) / "run").save(place)
            save_run(run_file(options.work, model, *job), run)
            found = load_run(options.work, model, *job)[1]
            print(f"{model} {job}: {found.mean_accuracy:.3f}, KL {found.kl.sum() / found.tokens.sum():.4f}", flush=True)


def main() -> None:
    """Measure what is missing, then print the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder of measurements, reused")
    parser.add_argument("-o", "--output", type=Path, help="Markdown file; stdout otherwise")
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--folder", type=Path, help="another folder for the one model named")
    parser.add_argument("--strategies", nargs="+", default=[*BUILTIN, AUTO.name])
    parser.add_argument("--ratios", nargs="+", default=list(RATIOS))
    parser.add_argument("--limit", type=int, help="first N questions of each task")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--measure-only", action="store_true")
    parser.add_argument("--reverse", action="store_true", help="begin at the other end, beside another process")
    options = parser.parse_args()
    import torch

    torch.set_num_threads(options.threads)
    jobs = list(wanted(options.strategies, options.ratios))
    step = -1 if options.reverse else 1
    for model in options.models[::step]:
        measure_all(model, options.folder or MODELS[model], options, jobs[::step])
    if options.measure_only:
        return
    page = Page(options.work, options.models, options.strategies, options.ratios)
    limit = f" --limit {options.limit}" if options.limit else ""
    text = page.render(f"python benchmarks/strategies.py --work WORK{limit} -o docs/benchmarks/strategies.md", ROWS)
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(text, encoding="utf-8")
    else:
        print(text)


if __name__ == "__main__":
    main()
