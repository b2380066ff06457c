"""Size of the HTML report, and the time to draw it, for models up to the largest.

    python benchmarks/report.py [--work DIR] [--repeats 3]

Each page has everything on it: 3 calibration domains, 20 tasks, 12 probes, a sweep of 5 ratios by 2 strategies, and
text. The numbers are random, the sizes are those of real models. Drawing includes reading the files from the disk; the
time of a browser is measured by `make test-browser`.

Targets for 94 layers of 160 experts: under 3 MB, under 5 s.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from moeprune._files import envelope
from moeprune.catalogue import STATISTICS
from moeprune.evaluation.compare import EvalReport, SuiteComparison, TaskComparison
from moeprune.evaluation.page import ReportSources, render_report
from moeprune.evaluation.paired import GAIN, INCONCLUSIVE, LOSS, NO_MATERIAL_LOSS, SMALL_LOSS
from moeprune.plans import LayerPlan, PruningPlan
from moeprune.statistics import RouterStatistics

MODELS = {"bundled": (4, 32), "Qwen3-30B-A3B": (48, 128), "DeepSeek-V3": (58, 256), "94 x 160": (94, 160)}
LARGEST = MODELS["94 x 160"]
BYTES_TARGET, SECONDS_TARGET = 3_000_000, 5.0
INPUTS = {"model": "0" * 64, "calibration": "1" * 64}
VERDICTS = (LOSS, SMALL_LOSS, INCONCLUSIVE, NO_MATERIAL_LOSS, GAIN)
Say = Callable[[str], str]


# --- sources ----------------------------------------------------------------------------------------------------------


def synthetic(layers: int, experts: int, *, tasks: int = 20, say: Say = str) -> ReportSources:
    """Everything that a page can show, of random numbers; ``say`` may change every name in it."""
    rng = np.random.default_rng(0)
    plan, counts = _plan(rng, layers, experts, say), rng.lognormal(5, 2, (layers, 3, experts)).astype(np.int64)
    provenance = envelope("moeprune.provenance/1", {}, INPUTS) | {
        "architecture": say("qwen3_moe"),
        "bytes": plan.size["bytes"],
    }
    return ReportSources(
        report=_report(rng, tasks, say),
        plan=plan,
        statistics=_statistics(counts, say),
        provenance=provenance,
        probes=_probes(say),
        sweep=_sweep(say),
        text=_text(say),
        digests={"plan.json": "2" * 64},
    )


def _plan(rng: np.random.Generator, layers: int, experts: int, say: Say) -> PruningPlan:
    scores = rng.lognormal(0, 2, (layers, experts))
    kept = np.sort(np.argsort(-scores, axis=1)[:, : experts // 2], axis=1)
    return PruningPlan(
        layers={
            index: LayerPlan(keep=tuple(map(int, kept[index])), scores=tuple(map(float, scores[index])))
            for index in range(layers)
        },
        config_edits={"num_experts": experts // 2},
        command={"stage": "plan", "strategy": say("reap"), "ratio": "0.5", "guard": True, "seed": 0},
        inputs=INPUTS,
        budget={"of": experts, "kept": experts // 2},
        strategy={"name": say("reap"), "what": say("mean gated output norm"), "paper": say("arXiv:2510.13999")},
        size={"bytes": {"before": 61_000_000_000, "after": 33_000_000_000}},
        coverage={say(name): 0.8 for name in ("code", "prose", "maths")},
        stability={"median": 0.98, "lowest": 0.91},
        engines={say("vllm"): [], say("sglang"): [say("too few experts")]},
        notes=[say("experts were never routed to")],
    )


def _statistics(counts_LDE: Any, say: Say) -> RouterStatistics:
    layers = {
        index: {
            "tokens": np.full(3, 100_000),
            "count": count_DE,
            "gated_norm_sum": count_DE * 1.5,
        }
        for index, count_DE in enumerate(counts_LDE)
    }
    assert set(layers[0]) <= STATISTICS.keys()
    source = {"source": say("data.jsonl"), "domains": [say("code"), "prose"], "sequences": 512, "tokens": 300_000}
    return RouterStatistics(
        domains=tuple(map(say, ("code", "prose", "maths"))),
        num_experts=counts_LDE.shape[2],
        top_k=8,
        layers=layers,
        command={"stage": "collect", "num_samples": 512, "seed": 0},
        inputs=INPUTS,
        provenance=(source | {"sha256": say("ab" * 32)},),
    )


def _report(rng: np.random.Generator, tasks: int, say: Say) -> EvalReport:
    rows = tuple(_task(say(f"task_{i}"), float(-rng.exponential(3)), VERDICTS[i % 5], say) for i in range(tasks))
    suite = SuiteComparison(
        tasks=tasks, base=0.7, pruned=0.67, change=-3.0, interval=(-4.0, -2.0), ni_lower=-3.8, verdict=LOSS
    )
    return EvalReport(
        base_model=say("base"),
        pruned_model=say("pruned"),
        margin=1.0,
        alpha=0.05,
        limit=None,
        tasks=rows,
        suite=suite,
        settings={say("batch_size"): 16, "lm_eval_version": say("0.4.13")},
        warnings=(say("the runs differ in batch_size"),),
        command={"tasks": [row.task for row in rows], "seed": 0, "margin": 1.0},
        inputs={"base": INPUTS["model"], "pruned": "3" * 64},
    )


def _task(name: str, change: float, verdict: str, say: Say) -> TaskComparison:
    return TaskComparison(
        task=name,
        metric=say("acc"),
        filter=say("strict"),
        version=say("1.0"),
        n=400,
        n_full=1000,
        n_shot=5,
        base=0.7,
        pruned=0.7 + change / 100,
        unit="points",
        change=change,
        interval=(change - 4, change + 4),
        ni_lower=change - 3.5,
        lost=30,
        gained=12,
        flips=10.5,
        answers_changed=60,
        p=0.004,
        p_adjusted=0.06,
        mde=4.5,
        verdict=verdict,
    )


def _probes(say: Say) -> dict[str, Any]:
    units = (("%", "lower"), ("x", "lower"), ("nats", "higher"))
    rows = [
        {"probe": say(f"probe_{i}"), "group": say("generation"), "what": say("share of answers that loop")}
        | {"unit": units[i % 3][0], "better": units[i % 3][1], "n": 64, "base": 1.5, "pruned": 4.7, "change": 3.2}
        | {"interval": [0.1, 6.0], "calibrated": (True, False, None)[i % 3]}
        for i in range(12)
    ]
    return envelope("moeprune.probes/1", {}, INPUTS) | {"rows": rows, "warnings": [say("few prompts")]}


def _sweep(say: Say) -> dict[str, Any]:
    points = [_point(say(strategy), ratio, say) for strategy in ("reap", "random") for ratio in (1, 2, 3, 4, 5)]
    said = {
        "margin": 1.0,
        "points": points,
        "largest_within_margin": "0.125",
        "partial": True,
        "warnings": [say("few")],
    }
    return envelope("moeprune.sweep/1", {}, INPUTS) | said


def _point(strategy: str, eighths: int, say: Say) -> dict[str, Any]:
    change = -(eighths**2) / 4
    effect = {"change": change, "interval": [change - 1, change + 1], "verdict": LOSS if eighths > 3 else INCONCLUSIVE}
    estimate = {"value": 1 + eighths / 50, "interval": [1 + eighths / 60, 1 + eighths / 40]}
    return {
        "ratio": str(eighths / 8),
        "strategy": strategy,
        "kept": 32 - 4 * eighths,
        "bytes": 100 - 10 * eighths,
        "base_bytes": 100,
        "tasks": [effect | {"task": say(name), "base": 0.7, "pruned": 0.6} for name in ("arc_easy", "gsm8k")],
        "suite": effect | {"ni_lower": change - 0.9},
        "text": {"perplexity_ratio": estimate, "kl": estimate, "top1": {"value": 0.9, "interval": [0.8, 0.95]}},
    }


def _text(say: Say) -> dict[str, Any]:
    one = {"value": 1.1, "interval": [1.05, 1.15]}
    plans = [
        {"name": say(name), "kept": 16, "perplexity": one, "ratio": one, "top1": one, "kl": one, "over": {}}
        | {"domains": {say("code"): one, say("prose"): one}}
        for name in ("half", "third")
    ]
    source = {"source": say("held out.jsonl"), "domains": [say("code")], "sequences": 64, "sha256": say("cd" * 32)}
    said = {"base_model": say("base"), "num_experts": 32, "perplexity": one, "plans": plans, "text": [source]}
    extent = {"documents": 64, "tokens": 40_000}
    head = envelope("moeprune.text/1", {"stage": "text", "num_samples": 64}, INPUTS)
    return head | said | {"extent": extent, "domains": {}, "best": say("half"), "warnings": [say("short text")]}


def save(sources: ReportSources, folder: Path) -> None:
    """Write the sources as the files that the stages leave."""
    for name in ("provenance", "probes", "sweep", "text"):
        (folder / f"{name}.json").write_text(json.dumps(getattr(sources, name)), encoding="utf-8")
    assert sources.report
    assert sources.plan
    assert sources.statistics
    (folder / "report.json").write_text(sources.report.to_json(), encoding="utf-8")
    sources.plan.save(folder / "plan.json")
    sources.statistics.save(folder / "statistics.safetensors")


# --- measuring --------------------------------------------------------------------------------------------------------


def main() -> None:
    """Draw each page and print a row about it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=None, help="where the pages stay")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        for name, (layers, experts) in MODELS.items():
            folder = (options.work or Path(temporary)) / name.replace(" ", "")
            folder.mkdir(parents=True, exist_ok=True)
            save(synthetic(layers, experts), folder)
            seconds = [_draw(folder) for _ in range(options.repeats)]
            size = (folder / "report.html").stat().st_size
            print(f"{name:<14} {layers:>3} x {experts:<4} {size / 1e6:6.2f} MB  {statistics.median(seconds):5.2f} s")
            if (layers, experts) == LARGEST:
                assert size < BYTES_TARGET
                assert statistics.median(seconds) < SECONDS_TARGET


def _draw(folder: Path) -> float:
    begin = time.perf_counter()
    render_report(folder, overwrite=True)
    return time.perf_counter() - begin


if __name__ == "__main__":
    main()
