"""Every strategy on the three bundled models: accuracy above chance and held-out perplexity, experts dropped in memory.

    python benchmarks/strategies.py --work /tmp/strategies -o docs/benchmarks/strategies.md

Calibration, selection, held-out text and tasks share no passage. Each measurement is kept in the work folder, so that
an interrupted run goes on where it stopped and several processes can share the work (``--models``, ``--threads``).
"""

from __future__ import annotations

import argparse
import copy
import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moeprune.evaluation.agreement import TokenLosses, perplexity, perplexity_ratio
from moeprune.pipeline import BUNDLED
from moeprune.strategies import BUILTIN, DEFAULT

FIXTURES = Path(__file__).parents[1] / "tests" / "fixtures"
MODELS = {
    "qwen3_moe": BUNDLED / "model",
    "glm4_moe": FIXTURES / "glm4_moe",
    "deepseek_v3": FIXTURES / "deepseek_v3",
}
RATIOS = ("0.25", "0.5")
RANDOM_SEEDS = 5
CHANCE = 0.25  # of four options
WRITTEN = {"tiny_sorting"}  # the answer is generated: no guess is right
TARGET_KEPT, TARGET_RANDOM, TARGET_RANDOM_RATIO = 90.0, 75.0, 1.5
_HOW = """Trained small models (a Qwen3-MoE, a GLM-4-MoE with a shared expert, a DeepSeek-V3 with groups and MLA), in
float32, nothing retrained. Calibrated on all of `calibration.jsonl`, strategies with seed 0, `random` with seeds 0 to
4. Tasks: the first {} questions of each; `sorting` is written (exact match), the others are four-way choices.

- *kept %*: accuracy above chance, pruned over base, mean over the tasks, with a 95 % bootstrap interval over questions
  (and seeds).
- *ppl x*: held-out perplexity, pruned over base, paired by document with its 95 % interval; for `random` the mean and
  the range over the seeds.
- *worst task %*: the least that any single task keeps. Read it first: a mean hides it."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What one model scored: 0/1 per document by task, and losses per document of two texts."""

    correct: dict[str, NDArray[np.int8]]
    heldout: TokenLosses
    selection: TokenLosses


# --- measuring ------------------------------------------------------------------------------------------------------


class Bench:
    """One bundled model with its statistics, its tasks and its texts."""

    def __init__(self, folder: Path, limit: int | None) -> None:
        from transformers import AutoTokenizer

        from moeprune import collect, open_checkpoint
        from moeprune.collectors.resident import load_model
        from moeprune.evaluation.harness import EvalSettings

        self.folder = folder
        self.checkpoint = open_checkpoint(folder)
        self.model: Any = load_model(self.checkpoint, device="cpu", dtype="float32")
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        calibration = str(BUNDLED / "calibration.jsonl")
        self.statistics = collect(folder, calibration=calibration, dtype="float32", statistics=("all",))
        self.texts = {name: self._encode(BUNDLED / f"{name}.jsonl") for name in ("heldout", "selection")}
        self.settings = EvalSettings(tasks=("tiny",), include_path=BUNDLED / "tasks", batch_size=32, limit=limit)

    def _encode(self, file: Path) -> list[list[int]]:
        rows = [json.loads(line)["text"] for line in file.read_text(encoding="utf-8").splitlines()]
        return [self.tokenizer(text)["input_ids"] for text in rows]

    def pruned(self, strategy: str, ratio: str, seed: int) -> Any:
        """A copy of the model with the strategy's choice of experts dropped."""
        from moeprune import plan, prune_model

        decided = plan(self.statistics, self.folder, ratio=ratio, strategy=strategy, seed=seed)
        return prune_model(copy.deepcopy(self.model), decided)

    def measure(self, model: Any, loaded: Any) -> Measured:
        """Run the tasks and both texts."""
        from moeprune.evaluation.agreement import token_losses
        from moeprune.evaluation.harness import run_model
        from moeprune.evaluation.samples import read_run

        with tempfile.TemporaryDirectory() as folder:
            output = Path(folder) / "run"
            run_model((model, self.tokenizer), self.settings, output, loaded=loaded)
            tasks = read_run(output).tasks
        correct = {
            name: np.array([_score(task.samples[key]) for key in sorted(task.samples)], dtype=np.int8)
            for name, task in sorted(tasks.items())
        }
        losses = {name: token_losses(model, texts) for name, texts in self.texts.items()}
        return Measured(correct=correct, **losses)


def _score(sample: Any) -> int:
    """1 for a right answer, chosen or written."""
    return int(sample.values["acc" if "acc" in sample.values else "exact_match"])


def wanted(strategies: list[str], ratios: list[str]) -> Iterator[tuple[str, str, int]]:
    """Every (strategy, ratio, seed) to measure, the unpruned model first."""
    yield "none", "0", 0
    for ratio in ratios:
        for name in strategies:
            yield from ((name, ratio, seed) for seed in range(RANDOM_SEEDS if name == "random" else 1))


def measure_all(model: str, folder: Path, work: Path, options: argparse.Namespace) -> None:
    """Fill the work folder with what is missing of one model."""
    from moeprune.evaluation.harness import prepare

    missing = [job for job in wanted(options.strategies, options.ratios) if not _file(work, model, *job).is_file()]
    if not missing:
        return
    bench = Bench(folder, options.limit)
    with prepare(bench.settings) as loaded:
        for name, ratio, seed in missing:
            subject = bench.model if name == "none" else bench.pruned(name, ratio, seed)
            found = bench.measure(subject, loaded)
            _save(_file(work, model, name, ratio, seed), found)
            kept = np.mean([values.mean() for values in found.correct.values()])
            print(f"{model} {name} {ratio} {seed}: {kept:.3f}, {perplexity(found.heldout).value:.2f}", flush=True)


def _file(work: Path, model: str, strategy: str, ratio: str, seed: int) -> Path:
    return work / model / f"{strategy.replace('/', '_')}-{ratio}-{seed}.npz"


def _save(file: Path, found: Measured) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    texts = {
        f"{name}.{part}": array
        for name in ("heldout", "selection")
        for part, array in zip(("nll", "tokens"), getattr(found, name), strict=True)
    }
    with tempfile.NamedTemporaryFile(dir=file.parent, suffix=".npz", delete=False) as handle:
        np.savez_compressed(handle, **found.correct, **texts)
    Path(handle.name).rename(file)


def load(file: Path) -> Measured:
    """Read one measurement."""
    with np.load(file, allow_pickle=False) as arrays:
        texts = {
            name: TokenLosses(arrays[f"{name}.nll"], arrays[f"{name}.tokens"]) for name in ("heldout", "selection")
        }
        correct = {name: arrays[name] for name in arrays.files if "." not in name}
    return Measured(correct=correct, **texts)


# --- judging --------------------------------------------------------------------------------------------------------


def kept_above_chance(base: Measured, pruned: list[Measured], draws: int = 2000) -> tuple[float, float, float]:
    """Accuracy above chance kept in percent, mean over tasks, with a 95 % bootstrap interval over documents.

    Several pruned models (seeds) are averaged, and drawn from too.
    """
    rng = np.random.default_rng(0)
    estimate = np.mean([_kept(base, one).mean() for one in pruned])
    resampled = np.zeros(draws)
    for draw in range(draws):
        chosen = [pruned[index] for index in rng.integers(len(pruned), size=len(pruned))]
        rows = {task: rng.integers(len(values), size=len(values)) for task, values in base.correct.items()}
        resampled[draw] = np.mean([_kept(base, one, rows).mean() for one in chosen])
    return float(estimate), *map(float, np.percentile(resampled, [2.5, 97.5]))


def _kept(base: Measured, pruned: Measured, rows: dict[str, Any] | None = None) -> NDArray[np.float64]:
    """Percent kept by task."""
    ratios = []
    for task, values in base.correct.items():
        chosen = slice(None) if rows is None else rows[task]
        chance = 0.0 if task in WRITTEN else CHANCE
        ratios.append((pruned.correct[task][chosen].mean() - chance) / (values[chosen].mean() - chance))
    return 100 * np.array(ratios)


def verdict(value: float, low: float, high: float, target: float, *, at_least: bool) -> str:
    """Whether a target is met, or the interval spans it."""
    if low < target < high:
        return "not resolved"
    met = value >= target if at_least else value <= target
    return "met" if met else "missed"


class Table:
    """The measurements of a work folder as Markdown."""

    def __init__(self, work: Path, models: list[str], strategies: list[str], ratios: list[str]) -> None:
        self.models, self.strategies, self.ratios = models, strategies, ratios
        self.base = {model: load(_file(work, model, "none", "0", 0)) for model in models}
        self.runs = {
            (model, name, ratio): [
                load(_file(work, model, name, ratio, seed)) for seed in range(RANDOM_SEEDS if name == "random" else 1)
            ]
            for model in models
            for name in strategies
            for ratio in ratios
        }

    def base_rows(self) -> Iterator[str]:
        """Base accuracy by task."""
        tasks = list(next(iter(self.base.values())).correct)
        yield "| model | " + " | ".join(task.removeprefix("tiny_") for task in tasks) + " | held-out perplexity |"
        yield "|---|" + "--:|" * (len(tasks) + 1)
        for model, base in self.base.items():
            scores = " | ".join(f"{100 * base.correct[task].mean():.1f}" for task in tasks)
            yield f"| {model} | {scores} | {perplexity(base.heldout).value:.2f} |"

    def rows(self, ratio: str) -> Iterator[str]:
        """One row per strategy, both measures with intervals for every model."""
        yield "| strategy | " + " | ".join(f"{model}: kept % | ppl x | worst task %" for model in self.models) + " |"
        yield "|---|" + "--:|--:|--:|" * len(self.models)
        for name in self.strategies:
            shown = f"**{name}**" if name == DEFAULT else name
            yield f"| {shown} | " + " | ".join(self._cells(model, name, ratio) for model in self.models) + " |"

    def _cells(self, model: str, name: str, ratio: str) -> str:
        base, runs = self.base[model], self.runs[model, name, ratio]
        kept, low, high = kept_above_chance(base, runs)
        worst = float(np.mean([_kept(base, one) for one in runs], axis=0).min())
        return f"{kept:.1f} ({low:.1f}..{high:.1f}) | {self._ratio(model, name, ratio)} | {worst:.0f}"

    def _ratio(self, model: str, name: str, ratio: str) -> str:
        found = [perplexity_ratio(self.base[model].heldout, one.heldout) for one in self.runs[model, name, ratio]]
        if len(found) > 1:
            values = [one.value for one in found]
            return f"{np.mean(values):.2f} ({min(values):.2f}..{max(values):.2f})"
        return f"{found[0].value:.3f} ({found[0].interval[0]:.3f}..{found[0].interval[1]:.3f})"

    def selection_rows(self) -> Iterator[str]:
        """Log of the perplexity ratio on the selection text: what the default is chosen by."""
        columns = [(model, ratio) for model in self.models for ratio in self.ratios]
        yield "| strategy | mean | " + " | ".join(f"{model} {ratio}" for model, ratio in columns) + " |"
        yield "|---|--:|" + "--:|" * len(columns)
        scored = sorted((np.mean(self._selection(name, columns)), name) for name in self.strategies)
        for mean, name in scored:
            cells = " | ".join(f"{value:.3f}" for value in self._selection(name, columns))
            yield f"| {name} | {mean:.3f} | {cells} |"

    def _selection(self, name: str, columns: list[tuple[str, str]]) -> list[float]:
        return [
            float(
                np.mean(
                    [
                        np.log(perplexity_ratio(self.base[model].selection, one.selection).value)
                        for one in self.runs[model, name, ratio]
                    ]
                )
            )
            for model, ratio in columns
        ]

    def target_rows(self, ratio: str = "0.5") -> Iterator[str]:
        """The stated targets, met or not."""
        for model in self.models:
            base, mine = self.base[model], self.runs[model, DEFAULT, ratio]
            found = kept_above_chance(base, mine)
            yield (
                f"- {model}: `{DEFAULT}` keeps at least {TARGET_KEPT:.0f} % above chance: "
                + verdict(*found, TARGET_KEPT, at_least=True)
                + f" ({found[0]:.1f} %, {found[1]:.1f}..{found[2]:.1f})"
            )
            for rival in ("random", "frequency"):
                against = [perplexity_ratio(one.heldout, mine[0].heldout) for one in self.runs[model, rival, ratio]]
                worst = max(against, key=lambda one: one.value)
                text = verdict(worst.value, *worst.interval, 1.0, at_least=False)
                yield f"- {model}: its perplexity is under that of {rival}: {text} ({worst.value:.3f} of it, " + (
                    f"{worst.interval[0]:.3f}..{worst.interval[1]:.3f}"
                    + (", the closest of the seeds)" if rival == "random" else ")")
                )
            yield from self._random_rows(model, ratio)

    def _random_rows(self, model: str, ratio: str) -> Iterator[str]:
        """Whether the model tells a good choice of experts from a bad one at all."""
        base, runs = self.base[model], self.runs[model, "random", ratio]
        kept = kept_above_chance(base, runs)
        text = verdict(*kept, TARGET_RANDOM, at_least=False)
        rise = float(np.mean([perplexity_ratio(base.heldout, one.heldout).value for one in runs]))
        yield (
            f"- {model}: random keeps under {TARGET_RANDOM:.0f} %: {text} ({kept[0]:.1f} %, "
            f"{kept[1]:.1f}..{kept[2]:.1f}), perplexity over {TARGET_RANDOM_RATIO:g}x: "
            f"{'met' if rise > TARGET_RANDOM_RATIO else 'missed'} ({rise:.2f}x, mean of {len(runs)} seeds)"
        )

    def render(self, command: str) -> str:
        """The page."""
        questions = {len(values) for base in self.base.values() for values in base.correct.values()}
        parts = ["# Strategies on the three bundled models", "", f"    {command}", "", _HOW.format(*questions), ""]
        parts += ["## Unpruned: accuracy in percent", "", *self.base_rows()]
        for ratio in self.ratios:
            parts += ["", f"## {100 * float(ratio):g} % of the experts of every layer removed", "", *self.rows(ratio)]
        parts += ["", "## Targets at 50 %", "", *self.target_rows()]
        parts += [
            "",
            "## Choice of the default: ln(perplexity ratio) on the selection text",
            "",
            *self.selection_rows(),
        ]
        return "\n".join(parts) + "\n"


def main() -> None:
    """Measure what is missing, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder of measurements, reused")
    parser.add_argument("-o", "--output", type=Path, help="Markdown file; stdout otherwise")
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--folder", type=Path, help="another folder for the one model named")
    formulas = [name for name, strategy in BUILTIN.items() if not strategy.search]
    parser.add_argument("--strategies", nargs="+", default=formulas)
    parser.add_argument("--ratios", nargs="+", default=list(RATIOS))
    parser.add_argument("--limit", type=int, help="first N questions of each task")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--measure-only", action="store_true")
    options = parser.parse_args()
    import torch

    torch.set_num_threads(options.threads)
    for model in options.models:
        measure_all(model, options.folder or MODELS[model], options.work, options)
    if options.measure_only:
        return
    table = Table(options.work, options.models, options.strategies, options.ratios)
    limit = f" --limit {options.limit}" if options.limit else ""
    text = table.render(f"python benchmarks/strategies.py --work WORK{limit} -o docs/benchmarks/strategies.md")
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(text, encoding="utf-8")
    else:
        print(text)


if __name__ == "__main__":
    main()
