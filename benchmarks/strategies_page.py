"""What ``strategies.py`` measured, judged and written down as a page."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moeprune.evaluation.agreement import Perplexity, TokenLosses, perplexity, perplexity_ratio
from moeprune.pipeline import BUNDLED
from moeprune.strategies import AUTO, BUILTIN, DEFAULT
from moeprune.strategies.auto import divergence

CHANCE = 0.25  # of four options
WRITTEN = {"tiny_sorting"}  # the answer is generated: no guess is right
AUTO_KEPT, AUTO_TASK, DEFAULT_KEPT, RANDOM_KEPT, RANDOM_RATIO = 95.0, 90.0, 90.0, 75.0, 1.5
CONTROLS = ("random", "frequency")
_HOW = """Trained small models (a Qwen3-MoE, a GLM-4-MoE with a shared expert, a DeepSeek-V3 with groups and MLA), in
float32, experts masked in memory, nothing retrained. Calibrated on {rows} of the 383 rows of `calibration.jsonl`,
drawn by a seed: three draws at 50 %, one elsewhere; `random` has three draws of experts everywhere. Tasks: the first
{questions} questions of each; `sorting` is written (exact match), the others are four-way choices.

- *kept %*: accuracy above chance, pruned over base, mean over the tasks, with a 95 % bootstrap interval over questions
  (and draws).
- *worst task %*: the least that any single task keeps, mean of the draws. Read it first: a mean hides it.
- *ppl x*: held-out perplexity, pruned over base, paired by document with its 95 % interval; of several draws the mean
  and the range.
- *KL*, *top-1*: of the next-token distributions on the held-out text, original against pruned: mean divergence in nats,
  and how often both put the same token first.
- *seconds* of one processor for choosing, statistics given: what collecting takes is in `moeprune strategies`."""

SEEDS = 3  # draws of the calibration text where they are compared, and of random experts


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What one choice of experts did.

    Attributes:
        correct: 0 or 1 per question, by task.
        nll, base_nll, kl, same, tokens: sums per held-out document, of the choice and of the whole model.
        selection_nll, selection_base_nll, selection_kl, selection_tokens: the same of the selection text.
    """

    correct: dict[str, NDArray[np.int8]]
    nll: NDArray[Any]
    base_nll: NDArray[Any]
    kl: NDArray[Any]
    same: NDArray[Any]
    tokens: NDArray[Any]
    selection_nll: NDArray[Any]
    selection_base_nll: NDArray[Any]
    selection_kl: NDArray[Any]
    selection_tokens: NDArray[Any]

    @classmethod
    def of(cls, correct: dict[str, NDArray[np.int8]], heldout: Any, selection: Any) -> Measured:
        """Of answers and two scores of an evaluator."""
        return cls(
            correct=correct,
            nll=heldout.losses.nll,
            base_nll=heldout.base_losses.nll,
            kl=heldout.kl,
            same=heldout.same,
            tokens=heldout.losses.tokens,
            selection_nll=selection.losses.nll,
            selection_base_nll=selection.base_losses.nll,
            selection_kl=selection.kl,
            selection_tokens=selection.losses.tokens,
        )

    @property
    def losses(self) -> TokenLosses:
        """On the held-out text."""
        return TokenLosses(self.nll, self.tokens)

    @property
    def rise(self) -> Perplexity:
        """Perplexity on the held-out text over that of the whole model."""
        return perplexity_ratio(TokenLosses(self.base_nll, self.tokens), self.losses)

    @property
    def selection_rise(self) -> float:
        """Log of the perplexity on the selection text over that of the whole model."""
        return float((self.selection_nll - self.selection_base_nll).sum() / self.selection_tokens.sum())

    @property
    def mean_accuracy(self) -> float:
        """Over the tasks."""
        return float(np.mean([values.mean() for values in self.correct.values()]))

    def save(self, file: Path) -> None:
        """Write it, whole or not at all."""
        file.parent.mkdir(parents=True, exist_ok=True)
        texts = {f"text.{name}": value for name, value in vars(self).items() if name != "correct"}
        arrays: dict[str, Any] = self.correct | texts
        with tempfile.NamedTemporaryFile(dir=file.parent, suffix=".npz", delete=False) as handle:
            np.savez_compressed(handle, **arrays)
        Path(handle.name).rename(file)

    @classmethod
    def load(cls, file: Path) -> Measured:
        """Read it."""
        with np.load(file, allow_pickle=False) as arrays:
            texts = {name.removeprefix("text."): arrays[name] for name in arrays.files if name.startswith("text.")}
            correct = {name: arrays[name] for name in arrays.files if not name.startswith("text.")}
        return cls(correct=correct, **texts)


@dataclass(frozen=True, kw_only=True)
class Run:
    """What a strategy chose: where the measurement lies, and the processor's seconds that choosing took."""

    digest: str
    seconds: float
    keeps: Mapping[int, Sequence[int]]


def wanted(strategies: list[str], ratios: list[str]) -> Iterator[tuple[str, str, int]]:
    """Every (strategy, ratio, seed) to measure, the unpruned model first."""
    yield "none", "0", 0
    for ratio in ratios:
        for name in strategies:
            yield from ((name, ratio, seed) for seed in range(seeds(name, ratio)))


def seeds(name: str, ratio: str) -> int:
    """How often a strategy is measured."""
    return SEEDS if name == "random" or ratio == "0.5" else 1


def run_file(work: Path, model: str, strategy: str, ratio: str, seed: int) -> Path:
    """Where a choice is kept."""
    return work / model / f"{strategy.replace('/', '_')}-{ratio}-{seed}.json"


def save_run(file: Path, run: Run) -> None:
    """Write it."""
    file.write_text(json.dumps(asdict(run)), encoding="utf-8")


def load_run(work: Path, model: str, strategy: str, ratio: str, seed: int) -> tuple[Run, Measured]:
    """Read a choice and what it did."""
    run = Run(**json.loads(run_file(work, model, strategy, ratio, seed).read_text(encoding="utf-8")))
    return run, Measured.load(work / model / f"{run.digest}.npz")


# --- judging --------------------------------------------------------------------------------------------------------


def kept_above_chance(base: Measured, pruned: Sequence[Measured], draws: int = 2000) -> tuple[float, float, float]:
    """Accuracy above chance kept in percent, mean over tasks, with a 95 % bootstrap interval over documents.

    Several pruned models (draws of calibration rows) are averaged, and drawn from too.
    """
    rng = np.random.default_rng(0)
    estimate = np.mean([_kept(base, one).mean() for one in pruned])
    resampled = np.zeros(draws)
    for draw in range(draws):
        chosen = [pruned[index] for index in rng.integers(len(pruned), size=len(pruned))]
        rows = {task: rng.integers(len(values), size=len(values)) for task, values in base.correct.items()}
        resampled[draw] = np.mean([_kept(base, one, rows).mean() for one in chosen])
    low, high = np.percentile(resampled, [2.5, 97.5])
    return float(estimate), float(low), float(high)


def _kept(base: Measured, pruned: Measured, rows: Mapping[str, Any] | None = None) -> NDArray[np.float64]:
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


class Page:
    """The measurements of a work folder as Markdown."""

    def __init__(self, work: Path, models: Sequence[str], strategies: Sequence[str], ratios: Sequence[str]) -> None:
        self.models, self.strategies, self.ratios = models, strategies, ratios
        self.base = {model: load_run(work, model, "none", "0", 0)[1] for model in models}
        self.runs: dict[tuple[str, str, str], list[tuple[Run, Measured]]] = {
            (model, name, ratio): [load_run(work, model, name, ratio, seed) for seed in range(seeds(name, ratio))]
            for model in models
            for name in strategies
            for ratio in ratios
        }

    def found(self, model: str, name: str, ratio: str) -> list[Measured]:
        """What a strategy did, draw by draw."""
        return [measured for _, measured in self.runs[model, name, ratio]]

    # --- tables -------------------------------------------------------------------------------------------------------

    def base_rows(self) -> Iterator[str]:
        """Base accuracy by task."""
        tasks = list(next(iter(self.base.values())).correct)
        yield "| model | " + " | ".join(task.removeprefix("tiny_") for task in tasks) + " | held-out perplexity |"
        yield "|---|" + "--:|" * (len(tasks) + 1)
        for model, base in self.base.items():
            scores = " | ".join(f"{100 * base.correct[task].mean():.1f}" for task in tasks)
            yield f"| {model} | {scores} | {perplexity(base.losses).value:.2f} |"

    def glance_rows(self, ratio: str) -> Iterator[str]:
        """All strategies beside each other, those first that raise perplexity least."""
        yield "| strategy | " + " | ".join(f"{model}: kept % | worst task % | ppl x" for model in self.models) + " |"
        yield "|---|" + "--:|--:|--:|" * len(self.models)
        for name in sorted(self.strategies, key=lambda name: self._rise(name, [ratio], "heldout")):
            cells = []
            for model in self.models:
                by_task = self._by_task(model, name, ratio)
                rise = np.mean([one.rise.value for one in self.found(model, name, ratio)])
                cells.append(f"{by_task.mean():.1f} | {by_task.min():.0f} | {rise:.3f}")
            yield f"| {_shown(name)} | " + " | ".join(cells) + " |"

    def rows(self, model: str, ratio: str) -> Iterator[str]:
        """One model at one ratio, with intervals."""
        yield "| strategy | kept % | worst task % | ppl x | KL | top-1 % | seconds |"
        yield "|---|" + "--:|" * 6
        for name in self.strategies:
            runs, found = self.runs[model, name, ratio], self.found(model, name, ratio)
            kept, low, high = kept_above_chance(self.base[model], found)
            kl = np.mean([one.kl.sum() / one.tokens.sum() for one in found])
            top1 = 100 * np.mean([one.same.sum() / one.tokens.sum() for one in found])
            seconds = np.mean([run.seconds for run, _ in runs])
            took = f"{seconds:.0f}" if seconds >= 10 else f"{seconds:.2g}"
            worst = self._by_task(model, name, ratio).min()
            yield (
                f"| {_shown(name)} | {kept:.1f} ({low:.1f}..{high:.1f}) | {worst:.0f} | {_rises(found)} "
                f"| {kl:.3f} | {top1:.1f} | {took} |"
            )

    def _by_task(self, model: str, name: str, ratio: str) -> NDArray[np.float64]:
        """Percent kept by task, mean of the draws."""
        kept = [_kept(self.base[model], one) for one in self.found(model, name, ratio)]
        return np.asarray(np.mean(kept, axis=0), dtype=np.float64)

    def _rise(self, name: str, ratios: Sequence[str], text: str) -> float:
        """Mean log of the perplexity ratio over the models and ratios."""
        return float(
            np.mean([np.mean(self._rises(model, name, ratio, text)) for model in self.models for ratio in ratios])
        )

    def _rises(self, model: str, name: str, ratio: str, text: str) -> list[float]:
        found = self.found(model, name, ratio)
        return [one.selection_rise if text == "selection" else float(np.log(one.rise.value)) for one in found]

    def selection_rows(self) -> Iterator[str]:
        """Log of the perplexity ratio on the selection text: what the default is chosen by."""
        columns = [(model, ratio) for model in self.models for ratio in self.ratios]
        yield "| strategy | mean | " + " | ".join(f"{model} {ratio}" for model, ratio in columns) + " |"
        yield "|---|--:|" + "--:|" * len(columns)
        formulas = [name for name in self.strategies if name in BUILTIN and not BUILTIN[name].search]
        for name in sorted(formulas, key=lambda name: self._rise(name, self.ratios, "selection")):
            values = [np.mean(self._rises(model, name, ratio, "selection")) for model, ratio in columns]
            cells = " | ".join(f"{value:.3f}" for value in values)
            yield f"| {_shown(name)} | {self._rise(name, self.ratios, 'selection'):.3f} | {cells} |"

    def objective_rows(self) -> Iterator[str]:
        """How well two readings of the divergence on the selection text rank what tasks keep (Spearman)."""
        from scipy.stats import spearmanr

        rows = (BUNDLED / "selection.jsonl").read_text(encoding="utf-8").splitlines()
        domains = [json.loads(row)["domain"] for row in rows]
        readings = {"all tokens alike": [""] * len(domains), "domains alike": domains}
        names = [name for name in self.strategies if name not in {"random", AUTO.name}]
        yield "| model | removed | " + " | ".join(readings) + " |"
        yield "|---|--:|" + "--:|" * len(readings)
        for model in self.models:
            for ratio in self.ratios:
                kept = [self._by_task(model, name, ratio).mean() for name in names]
                found = [self.found(model, name, ratio)[0] for name in names]
                ranks = [
                    -spearmanr([divergence(one.selection_kl, one.selection_tokens, labels) for one in found], kept)[0]
                    for labels in readings.values()
                ]
                yield f"| {model} | {100 * float(ratio):g} % | " + " | ".join(f"{rank:.2f}" for rank in ranks) + " |"

    # --- what follows -------------------------------------------------------------------------------------------------

    def losing_rows(self) -> Iterator[str]:
        """Where a method does no better than a control, by held-out perplexity."""
        cases = [(model, ratio) for model in self.models for ratio in self.ratios]
        for name in self.strategies:
            if name in CONTROLS:
                continue
            against = {rival: [case for case in cases if self._loses(name, rival, *case)] for rival in CONTROLS}
            said = [
                f"{_CLAIMS[rival]} in {len(lost)} of {len(cases)} cases ({_listed(lost)})"
                for rival, lost in against.items()
                if lost
            ]
            if said:
                yield f"- `{name}`: " + "; ".join(said)

    def _loses(self, name: str, rival: str, model: str, ratio: str) -> bool:
        """Whether every draw is worse than frequency's beyond its interval, or none is better than random's best."""
        mine, theirs = self.found(model, name, ratio), self.found(model, rival, ratio)
        if rival == "random":
            return min(one.rise.value for one in mine) >= min(one.rise.value for one in theirs)
        pairs = zip(mine, theirs, strict=True)
        return all(perplexity_ratio(their.losses, my.losses).interval[0] > 1 for my, their in pairs)

    def auto_rows(self, ratio: str = "0.5") -> Iterator[str]:
        """What is asked of the choice between strategies."""
        for model in self.models:
            yield self._kept_row(model, AUTO.name, ratio, AUTO_KEPT)
            tasks = list(self.base[model].correct)
            by_task = self._by_task(model, AUTO.name, ratio)
            accuracy = {
                task: np.mean([one.correct[task].mean() for one in self.found(model, AUTO.name, ratio)])
                / self.base[model].correct[task].mean()
                for task in tasks
            }
            worst = min(accuracy, key=lambda task: accuracy[task])
            yield (
                f"- {model}: no task keeps less than {AUTO_TASK:.0f} % of its accuracy: "
                f"{'met' if 100 * accuracy[worst] >= AUTO_TASK else 'missed'} ({worst.removeprefix('tiny_')} keeps "
                f"{100 * accuracy[worst]:.1f} %, and {by_task[tasks.index(worst)]:.0f} % of what is above chance)"
            )
            yield self._against_best(model, ratio)

    def _against_best(self, model: str, ratio: str) -> str:
        published = [name for name in self.strategies if name in BUILTIN and BUILTIN[name].paper]
        best = min(published, key=lambda name: np.mean(self._rises(model, name, ratio, "heldout")))
        mine = self.found(model, AUTO.name, ratio)
        pairs = zip(self.found(model, best, ratio), mine, strict=True)
        ratios = [perplexity_ratio(their.losses, my.losses) for their, my in pairs]
        worst = max(ratios, key=lambda one: one.value)
        text = verdict(worst.value, *worst.interval, 1.0, at_least=False)
        return (
            f"- {model}: its perplexity is at most that of the best published criterion, `{best}`: {text} "
            f"({np.mean([one.value for one in ratios]):.3f} of it; in the worst draw {worst.value:.3f}, "
            f"{worst.interval[0]:.3f}..{worst.interval[1]:.3f})"
        )

    def _kept_row(self, model: str, name: str, ratio: str, target: float) -> str:
        kept = kept_above_chance(self.base[model], self.found(model, name, ratio))
        return (
            f"- {model}: `{name}` keeps at least {target:.0f} % of the accuracy above chance: "
            f"{verdict(*kept, target, at_least=True)} ({kept[0]:.1f} %, {kept[1]:.1f}..{kept[2]:.1f})"
        )

    def default_rows(self, ratio: str = "0.5") -> Iterator[str]:
        """What is asked of the default, and of the models: that they tell a good choice of experts from a bad one."""
        for model in self.models:
            yield self._kept_row(model, DEFAULT, ratio, DEFAULT_KEPT)
            mine = self.found(model, DEFAULT, ratio)
            for rival in CONTROLS:
                pairs = zip(self.found(model, rival, ratio), mine, strict=True)
                against = [perplexity_ratio(their.losses, my.losses) for their, my in pairs]
                worst = max(against, key=lambda one: one.value)
                text = verdict(worst.value, *worst.interval, 1.0, at_least=False)
                yield (
                    f"- {model}: its perplexity is under that of {rival}: {text} ({worst.value:.3f} of it, "
                    f"{worst.interval[0]:.3f}..{worst.interval[1]:.3f}, the closest of the draws)"
                )
            runs = self.found(model, "random", ratio)
            kept = kept_above_chance(self.base[model], runs)
            rise = float(np.mean([one.rise.value for one in runs]))
            yield (
                f"- {model}: random keeps under {RANDOM_KEPT:.0f} %: {verdict(*kept, RANDOM_KEPT, at_least=False)} "
                f"({kept[0]:.1f} %, {kept[1]:.1f}..{kept[2]:.1f}), perplexity over {RANDOM_RATIO:g}x: "
                f"{'met' if rise > RANDOM_RATIO else 'missed'} ({rise:.2f}x)"
            )

    def render(self, command: str, rows: int) -> str:
        """The page."""
        questions = {len(values) for base in self.base.values() for values in base.correct.values()}
        how = _HOW.format(rows=rows, questions=" or ".join(map(str, sorted(questions))))
        parts = ["# Strategies on the three bundled models", "", f"    {command}", "", how, ""]
        parts += ["## At a glance: half of the experts of every layer removed", "", *self.glance_rows("0.5"), ""]
        parts += ["## `auto` at 50 %", "", *self.auto_rows(), ""]
        parts += ["## Where a method loses against a control", "", _LOSING, "", *self.losing_rows(), ""]
        parts += ["## Unpruned: accuracy in percent", "", *self.base_rows()]
        for ratio in self.ratios:
            for model in self.models:
                title = f"## {100 * float(ratio):g} % of the experts of every layer removed: {model}"
                parts += ["", title, "", *self.rows(model, ratio)]
        parts += ["", "## What `auto` goes by", "", _OBJECTIVE, "", *self.objective_rows()]
        parts += ["", "## The default at 50 %", "", *self.default_rows()]
        title = "## Choice of the default: ln(perplexity ratio) on the selection text"
        parts += ["", title, "", *self.selection_rows()]
        return "\n".join(parts) + "\n"


_CLAIMS = {"random": "no better than the best draw of `random`", "frequency": "worse than `frequency`"}
_LOSING = """By held-out perplexity. *Worse than `frequency`*: the interval of the paired ratio is above 1 in every
draw. *No better than `random`*: no draw of the calibration text gives a lower perplexity than the best of three random
choices."""


_OBJECTIVE = """Rank correlation, over all strategies but `random` and `auto`, between the accuracy above chance that
they keep and the closeness to the original on the selection text: by the mean divergence per token, all tokens alike
or as the geometric mean over the domains of the text. `auto` goes by the latter, and this table is why: the choice
between the two readings, unlike the choices that it makes, has seen the tasks."""


def _shown(name: str) -> str:
    return f"**{name}**" if name == DEFAULT else name


def _rises(found: Sequence[Measured]) -> str:
    values = [one.rise for one in found]
    if len(values) == 1:
        return f"{values[0].value:.3f} ({values[0].interval[0]:.3f}..{values[0].interval[1]:.3f})"
    ends = [one.value for one in values]
    return f"{np.mean(ends):.3f} ({min(ends):.3f}..{max(ends):.3f})"


def _listed(cases: Sequence[tuple[str, str]]) -> str:
    return ", ".join(f"{model} {100 * float(ratio):g} %" for model, ratio in cases)
