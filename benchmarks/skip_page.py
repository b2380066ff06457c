"""What ``skip.py`` measured, judged and written down as a page."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from strategies_page import kept_above_chance

from moeprune.evaluation.agreement import Perplexity, TokenLosses, perplexity_ratio

PREFILLS: Mapping[str, int] = {f"prefill, {length} tokens": length for length in (512, 2048)}
CONTROLS = ("random", "oracle")
RENORMS = ("none", "survivors")
TRAINED = "+distilled"
MIDDLE = "0.5"  # the rate that is looked at more closely
CHIEF = ("predicted-norm",)
_LIMIT_HINT = "`--limit` takes the first questions of each task."

_HOW_SPEED = """All ways run in turn in one process, {rounds} rounds after one that warms up; ratios are to the same
model with all of its slots in the same round: the median, and the smallest and largest in parentheses. *Experts*: the
time inside the experts modules, gates included, which the end-to-end time does not have to show. *FLOPs*: rows that
went into the experts' kernels over all rows. The thresholds are solved on the tokens that are run, so the measured
rate is the one that was asked for, but for decoding, which is solved in one pass over the same tokens. Both peers
skip the very slots that the share gate skips: *weights set to zero* is what a model's code can do without another
kernel, and saves nothing; *sentinel* names an expert that is not there, as transformers does when experts are spread
over devices.

Half of the rows is not half of the time where an expert has few rows, since its weights are read all the same: of 128
experts with top-8 each has 32 rows in a prefill of 512 tokens and 128 in one of 2048. In decoding what counts is how
many experts are not read at all. The gate of `predicted-norm` takes one more product of the size of the router's."""

_HOW_QUALITY = """Thresholds solved layer by layer on {rows} rows of the calibration text; measured on held-out text
and tasks that share no passage with it, in float32. *Skipped*: share of slots on the held-out text, and the range
over the tasks. *Ppl x*: perplexity over that of the model itself, paired by document, with its 95 % interval. *Kept*:
accuracy above chance, over the model's own, mean over the tasks with a 95 % bootstrap interval over questions.
`random` drops slots at random; `oracle` drops those with the smallest norm of what they would have added, as many in
every layer and batch as `share`: it needs every output, so it is a bound and no policy, and was not run on tasks.
*Distilled*: trained with the gate on the calibration text to predict what the model itself predicts. Renormalised:
the weights of the slots that run are scaled to the sum of all; else they are left as they are."""


def variants_of(options: argparse.Namespace, rate: str) -> list[tuple[str, str]]:
    """Every (policy, renormalisation) that is measured at a rate; at others than the middle one the chief ones."""
    if rate != MIDDLE:
        return [(name, "none") for name in (*CHIEF, *CONTROLS)]
    found = [(name, renorm) for name in options.policies for renorm in RENORMS]
    return [*found, *((name, "none") for name in (*(one + TRAINED for one in options.distilled), *CONTROLS))]


def speed_file(work: Path, device: str, model: str, dtype: str, mode: str, rate: str) -> Path:
    """Where a measurement of time lies."""
    return work / "speed" / (re.sub(r"[^\w.]+", "-", f"{device}-{model}-{dtype}-{mode}-{rate}") + ".json")


def quality_file(work: Path, model: str, policy: str, renorm: str, rate: str) -> Path:
    """Where a measurement of quality lies."""
    return work / model / f"{policy}-{renorm}-{rate}.json"


@dataclass(frozen=True)
class Cell:
    """What one way to skip does to a model.

    Attributes:
        values: as they were written.
    """

    values: Mapping[str, Any]

    @cached_property
    def correct(self) -> dict[str, NDArray[np.int8]]:
        """0 or 1 per question, by task."""
        return {name: np.array(values, dtype=np.int8) for name, values in self.values.get("correct", {}).items()}

    @property
    def losses(self) -> TokenLosses:
        """On the held-out text."""
        return TokenLosses(np.array(self.values["nll"]), np.array(self.values["tokens"]))

    @property
    def rise(self) -> Perplexity:
        """Perplexity over that of the model itself."""
        return perplexity_ratio(TokenLosses(np.array(self.values["base_nll"]), self.losses.tokens), self.losses)

    @property
    def skipped(self) -> str:
        """Share of the slots on the held-out text, and the range over the tasks."""
        tasks = list(self.values.get("task_rates", {}).values())
        spread = f" ({100 * min(tasks):.0f}..{100 * max(tasks):.0f})" if tasks else ""
        return f"{100 * self.values['rate']:.1f}{spread}"

    def mean(self, name: str) -> float:
        """Of a sum by document, per token."""
        return float(np.sum(self.values[name]) / np.sum(self.values["tokens"]))


class Page:
    """The measurements of a work folder as Markdown."""

    def __init__(self, work: Path, options: argparse.Namespace) -> None:
        self.work, self.policies, self.rates = work, options.policies, options.rates
        self.options = options
        self.base = {
            model: Cell(json.loads(file.read_bytes()))
            for model in options.models
            if (file := quality_file(work, model, "none", "none", "0")).is_file()
        }
        self.speed = [json.loads(file.read_bytes()) | {"key": file.stem} for file in sorted(work.glob("speed/*.json"))]

    def cell(self, model: str, policy: str, renorm: str, rate: str) -> Cell | None:
        """A measurement, if it is there."""
        file = quality_file(self.work, model, policy, renorm, rate)
        return Cell(json.loads(file.read_bytes())) if file.is_file() else None

    # --- time ---------------------------------------------------------------------------------------------------------

    def speed_rows(self, cells: Sequence[Mapping[str, Any]]) -> Iterator[str]:
        """Every way of every cell over the model itself."""
        yield "| mode | asked | way | skipped % | FLOPs | experts, time x | end to end, time x |"
        yield "|---|--:|---|--:|--:|--:|--:|"
        for cell in cells:
            base = cell["ways"]["all slots"]
            for name, way in cell["ways"].items():
                if name == "all slots":
                    continue
                yield (
                    f"| {cell['mode']} | {100 * float(cell['rate']):g} % | {name} | {100 * way['rate']:.1f} "
                    f"| {way['flops']:.2f} | {_ratio(way['experts'], base['experts'])} "
                    f"| {_ratio(way['seconds'], base['seconds'])} |"
                )

    def speed_parts(self) -> Iterator[str]:
        """One table for each model and dtype."""
        titles = sorted({(one["device_name"], one["model"], one["dtype"]) for one in self.speed})
        for device, model, dtype in titles:
            cells = [
                one for one in self.speed if (one["device_name"], one["model"], one["dtype"]) == (device, model, dtype)
            ]
            cells.sort(key=lambda one: (one["mode"] not in PREFILLS, len(one["mode"]), one["mode"], float(one["rate"])))
            first = cells[0]
            yield f"### {model}, {dtype}, on {first['device']}"
            yield ""
            share = np.median(_quotients(first["ways"]["all slots"]["experts"], first["ways"]["all slots"]["seconds"]))
            yield (
                f"{first['threads']} threads, torch {first['torch']}, transformers {first['transformers']}, experts "
                f"implementation {first['implementation']}; the experts take {100 * share:.0f} % of the model's "
                f"{np.median(first['ways']['all slots']['seconds']):.3g} s in {first['mode']}."
            )
            yield ""
            yield from self.speed_rows(cells)
            yield ""

    # --- quality ------------------------------------------------------------------------------------------------------

    def glance_rows(self, rate: str) -> Iterator[str]:
        """Perplexity of all policies without renormalisation, the best first."""
        yield "| policy | " + " | ".join(f"{model}: skipped %, ppl x" for model in self.base) + " |"
        yield "|---|" + "--:|" * len(self.base)
        names = [name for name, renorm in variants_of(self.options, rate) if renorm == "none"]
        found = {name: [self.cell(model, name, "none", rate) for model in self.base] for name in names}
        found = {name: cells for name, cells in found.items() if any(cells)}
        for name in sorted(found, key=lambda name: _mean_rise(found[name])):
            cells = (f"{one.skipped}, {one.rise.value:.3f}" if one else "" for one in found[name])
            yield f"| {_named(name)} | " + " | ".join(cells) + " |"

    def rows(self, model: str, rate: str) -> Iterator[str]:
        """One model at one rate, with intervals."""
        yield "| policy | renormalised | skipped % | ppl x | KL | top-1 % | kept % | against renormalised |"
        yield "|---|---|--:|--:|--:|--:|--:|--:|"
        for name, renorm in variants_of(self.options, rate):
            one = self.cell(model, name, renorm, rate)
            if one is None:
                continue
            other = self.cell(model, name, "survivors", rate) if renorm == "none" else None
            kept = "{:.1f} ({:.1f}..{:.1f})".format(*self.kept(model, one)) if one.correct else ""
            against = _estimate(perplexity_ratio(other.losses, one.losses)) if other else ""
            yield (
                f"| {_named(name)} | {'no' if renorm == 'none' else 'yes'} | {one.skipped} | {_estimate(one.rise)} "
                f"| {one.mean('kl'):.4f} | {100 * one.mean('same'):.1f} | {kept} | {against} |"
            )

    def kept(self, model: str, one: Cell) -> tuple[float, float, float]:
        """Accuracy above chance kept in percent, with its interval."""
        return kept_above_chance(self.base[model], [one])  # type: ignore[arg-type, list-item]

    def renorm_lines(self) -> Iterator[str]:
        """In how many pairs leaving the weights as they are is better, worse, or not told apart."""
        counts = {"lower": 0, "higher": 0, "not told apart from": 0}
        for model in self.base:
            for rate in self.rates:
                for name in self.policies:
                    pair = [self.cell(model, name, renorm, rate) for renorm in RENORMS]
                    if pair[0] is None or pair[1] is None:
                        continue
                    low, high = perplexity_ratio(pair[1].losses, pair[0].losses).interval
                    counts["lower" if high < 1 else "higher" if low > 1 else "not told apart from"] += 1
        total = sum(counts.values())
        said = ", ".join(f"{count} of {total} {what}" for what, count in counts.items() if count)
        yield (
            f"Perplexity without renormalisation is, beside that with it, by paired 95 % intervals: {said}."
            if total
            else ""
        )

    def render(self) -> str:
        """The page."""
        parts = ["# Token skipping: what it saves, and what it costs", ""]
        commands = ["--speed", "--quality", "-o docs/benchmarks/skip.md"]
        parts += [*(f"    python benchmarks/skip.py --work WORK {one}" for one in commands), ""]
        parts += ["Empty cells, and sizes and dtypes without a table, were not measured.", ""]
        parts += ["A slot is one of a token's top-k experts; the rate is the share of slots that are skipped.", ""]
        if self.base:
            parts += self._quality()
        if self.speed:
            rounds = sorted({one["rounds"] for one in self.speed})
            parts += ["## Time", "", _HOW_SPEED.format(rounds=" or ".join(map(str, rounds))), ""]
            if not any(one["device_name"] == "cuda" for one in self.speed):
                parts += ["Nothing here was run on a GPU; `--device cuda` is there and has not been tried.", ""]
            parts += [*self.speed_parts()]
        return "\n".join(parts).rstrip() + "\n"

    def _quality(self) -> list[str]:
        questions = sorted({len(values) for base in self.base.values() for values in base.correct.values()})
        parts = ["## Quality", "", _HOW_QUALITY.format(rows=256), ""]
        parts += [f"Questions of each task: {' or '.join(map(str, questions))}. {_LIMIT_HINT}", ""]
        for rate in self.rates:
            if any(self.cell(model, name, "none", rate) for model in self.base for name in self.policies):
                parts += [f"### {100 * float(rate):g} % at a glance, weights left as they are", ""]
                parts += [*self.glance_rows(rate), ""]
        parts += [*self.renorm_lines(), ""]
        for rate in self.rates:
            for model in self.base:
                table = [*self.rows(model, rate)]
                if len(table) > 2:
                    parts += [f"### {100 * float(rate):g} %: {model}", "", *table, ""]
        return parts


def _mean_rise(cells: Sequence[Cell | None]) -> float:
    found = [np.log(one.rise.value) for one in cells if one is not None]
    return float(np.mean(found)) if found else np.inf


def _named(policy: str) -> str:
    return f"*{policy}*" if policy in CONTROLS else policy.replace(TRAINED, ", distilled")


def _estimate(one: Perplexity) -> str:
    return f"{one.value:.3f} ({one.interval[0]:.3f}..{one.interval[1]:.3f})"


def _quotients(times: Sequence[float], base: Sequence[float]) -> NDArray[np.float64]:
    return np.array(times) / np.array(base)


def _ratio(times: Sequence[float], base: Sequence[float]) -> str:
    values = _quotients(times, base)
    return f"{np.median(values):.2f} ({values.min():.2f}..{values.max():.2f})"
