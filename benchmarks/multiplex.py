"""Multiplexed experts against dropped and narrower ones at about equal bytes, on a bundled model.

    python benchmarks/multiplex.py --work /tmp/multiplex -o docs/benchmarks/multiplex.md

Bytes are those of all routed experts and of everything that is stored for them. Every row is made from the bundled
calibration text and measured on held-out text and on the bundled tasks, which share no passage with it. Each is kept in
the work folder, so that an interrupted run goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from strategies import MODELS

import moeprune
from moeprune.architectures import ExpertName, StackedName, resolve_architecture
from moeprune.checkpoint import read_tensors
from moeprune.pipeline import BUNDLED

CALIBRATION = str(BUNDLED / "calibration.jsonl")
Make = Callable[[Path, Path], object]


def _multiplex(keep: int, rank: int) -> Make:
    return lambda base, out: moeprune.multiplex(base, out, keep=keep, rank=rank, calibration=CALIBRATION)


def _drop(ratio: str) -> Make:
    return lambda base, out: moeprune.prune(base, out, ratio=ratio, calibration=CALIBRATION)


def _narrow(fraction: str) -> Make:
    return lambda base, out: moeprune.sparsify(base, out, neurons=fraction, calibration=CALIBRATION)


def _healed(make: Make) -> Make:
    def both(base: Path, out: Path) -> None:
        given = out.with_name(f"{out.name}-given")
        make(base, given)
        moeprune.heal(base, given, out, calibration=CALIBRATION)
        shutil.rmtree(given)

    return both


ROWS: Mapping[str, Make] = {
    "drop half of the experts": _drop("0.5"),
    "drop half of every expert's neurons": _narrow("0.5"),
    "drop half of the experts, heal": _healed(_drop("0.5")),
    "drop half of every expert's neurons, heal": _healed(_narrow("0.5")),
    "multiplex: 8 fused experts, rank 8": _multiplex(8, 8),
    "drop three quarters of the experts": _drop("0.75"),
    "drop three quarters of every expert's neurons": _narrow("0.75"),
    "drop three quarters of the experts, heal": _healed(_drop("0.75")),
    "drop three quarters of every expert's neurons, heal": _healed(_narrow("0.75")),
    "multiplex: 4 fused experts, rank 3": _multiplex(4, 3),
}


def expert_bytes(folder: Path) -> int:
    """Bytes of the routed experts and of whatever lies in a side file for them."""
    config = json.loads((folder / "config.json").read_text())
    spec = resolve_architecture(config)
    tensors, _ = read_tensors(folder)
    side = folder / "moeprune" / "multiplex.safetensors"
    own = (
        entry.nbytes
        for name, entry in tensors.items()
        if isinstance(spec.role(name, spec.depth(config)), ExpertName | StackedName)
    )
    return sum(own) + (side.stat().st_size if side.is_file() else 0)


class Bench:
    """The original with its tasks and its text."""

    def __init__(self, base: Path, limit: int | None) -> None:
        from transformers import AutoTokenizer

        from moeprune.evaluation.settings import EvalSettings

        self.base = base
        self.tokenizer = AutoTokenizer.from_pretrained(base)
        self.model = self._load(base)
        self.settings = EvalSettings(tasks=("tiny",), include_path=BUNDLED / "tasks", batch_size=32, limit=limit)
        rows = [json.loads(line)["text"] for line in (BUNDLED / "heldout.jsonl").read_text("utf-8").splitlines()]
        self.heldout = [self.tokenizer(text)["input_ids"] for text in rows]

    def _load(self, folder: Path) -> Any:
        import torch

        return moeprune.load(folder, dtype=torch.float32)

    def measure(self, folder: Path, loaded: Any) -> dict[str, Any]:
        """Bytes, held-out text and tasks."""
        model = self.model if folder == self.base else self._load(folder)
        return {"bytes": expert_bytes(folder)} | self._text(model) | {"tasks": self._tasks(model, loaded)}

    def _text(self, model: Any) -> dict[str, Any]:
        from moeprune.evaluation.agreement import AgreementSums, batches, logits_of
        from moeprune.evaluation.evaluator import PlanScore

        sums = AgreementSums(len(self.heldout))
        for rows, ids, mask in batches(self.heldout, 8192):
            sums.add(rows, logits_of(self.model, ids, mask), logits_of(model, ids, mask), ids, mask)
        score = PlanScore.of(sums)
        ratio = score.perplexity_ratio
        found = {"perplexity": score.perplexity.value, "ratio": ratio.value, "interval": list(ratio.interval)}
        return found | {"kl": score.agreement.kl.value, "top1": score.agreement.top1.value}

    def _tasks(self, model: Any, loaded: Any) -> dict[str, list[int]]:
        """By task 1 for a right answer and 0 for a wrong one, question by question."""
        from moeprune.evaluation.harness import run_model
        from moeprune.evaluation.samples import read_run

        with tempfile.TemporaryDirectory() as scratch:
            run_model((model, self.tokenizer), self.settings, Path(scratch) / "run", loaded=loaded)
            tasks = read_run(Path(scratch) / "run").tasks
        return {
            name: [_score(task.samples[key]) for key in sorted(task.samples)] for name, task in sorted(tasks.items())
        }


def _score(sample: Any) -> int:
    return int(sample.values["acc" if "acc" in sample.values else "exact_match"])


def measure_all(base: Path, work: Path, limit: int | None) -> dict[str, dict[str, Any]]:
    """Fill the work folder with what is missing; gives all measurements by row."""
    from moeprune.evaluation.harness import prepare

    work.mkdir(parents=True, exist_ok=True)
    files = {name: work / f"{base.name}-{number}.json" for number, name in enumerate(("original", *ROWS))}
    if not all(file.is_file() for file in files.values()):
        bench = Bench(base, limit)
        with prepare(bench.settings) as loaded:
            for name, file in files.items():
                if not file.is_file():
                    file.write_text(json.dumps(_measured(bench, name, work / "out", loaded)))
                    print(f"{name}: done", flush=True)
    return {name: json.loads(file.read_text()) for name, file in files.items()}


def _measured(bench: Bench, name: str, out: Path, loaded: Any) -> dict[str, Any]:
    if name == "original":
        return bench.measure(bench.base, loaded) | {"seconds": 0.0}
    shutil.rmtree(out, ignore_errors=True)
    start = time.process_time()
    ROWS[name](bench.base, out)
    seconds = time.process_time() - start
    return bench.measure(out, loaded) | {"seconds": seconds}


# --- the page ---------------------------------------------------------------------------------------------------------


_EXPLAINED = (
    "Bytes are those of all routed experts, with everything that is stored for them. Perplexity is of the bundled "
    "held-out text, its ratio to the original's with a 95 % interval over documents; accuracy is the mean of the "
    "bundled tasks ({questions} questions), the change with a 95 % interval over questions (score interval of "
    "paired answers, all tasks together). Seconds are processor time of making the checkpoint, healing included, with "
    "{threads} thread(s). The healed rows and the multiplexed ones are trained, on the same text."
)
_HOW_TO = (
    "Half as many bytes above, a quarter below. Multiplexed checkpoints need `moeprune.load`; the others load in "
    "stock engines. How to make one: [multiplex experts](../how-to/multiplex-experts.md)."
)


def page(model: str, found: Mapping[str, Mapping[str, Any]], command: str, threads: int) -> str:
    """The measurements as Markdown."""
    original = found["original"]
    questions = sum(map(len, original["tasks"].values()))
    lines = [
        "# Multiplexed experts",
        "",
        f"`{command}`, on {platform.machine()}; the {model} model of the tests, one seed.",
        "",
        _EXPLAINED.format(questions=questions, threads=threads),
        "",
        "| | expert bytes | perplexity | over the original's | KL | accuracy | change in points | seconds |",
        "|---|---|---|---|---|---|---|---|",
        *(_row(name, one, original) for name, one in found.items()),
        "",
        _HOW_TO,
    ]
    return "\n".join(lines) + "\n"


def _row(name: str, one: Mapping[str, Any], original: Mapping[str, Any]) -> str:
    low, high = one["interval"]
    share = one["bytes"] / original["bytes"]
    if name == "original":
        return f"| {name} | 100 % | {one['perplexity']:.2f} | | | {_accuracy(one):.1f} | | |"
    change, interval = _change(one, original)
    return (
        f"| {name} | {share:.0%} | {one['perplexity']:.2f} | {one['ratio']:.3f} ({low:.3f} to {high:.3f}) "
        f"| {one['kl']:.3f} | {_accuracy(one):.1f} | {change:+.1f} ({interval[0]:+.1f} to {interval[1]:+.1f}) "
        f"| {one['seconds']:.0f} |"
    )


def _accuracy(one: Mapping[str, Any]) -> float:
    means = [sum(task) / len(task) for task in one["tasks"].values()]
    return 100 * sum(means) / len(means)


def _change(one: Mapping[str, Any], original: Mapping[str, Any]) -> tuple[float, tuple[float, float]]:
    """Change in points over all questions, with its interval."""
    from moeprune.evaluation.paired import tango_interval

    pairs = [
        pair for name in original["tasks"] for pair in zip(original["tasks"][name], one["tasks"][name], strict=True)
    ]
    lost, gained = sum(old > new for old, new in pairs), sum(new > old for old, new in pairs)
    low, high = tango_interval(lost, gained, len(pairs))
    return 100 * (gained - lost) / len(pairs), (100 * low, 100 * high)


def main() -> None:
    """Measure what is missing, then write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder of measurements, reused")
    parser.add_argument("-o", "--output", type=Path, help="Markdown file; stdout otherwise")
    parser.add_argument("--model", default="deepseek_v3", choices=list(MODELS))
    parser.add_argument("--limit", type=int, help="first N questions of each task")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    import torch

    torch.set_num_threads(options.threads)
    found = measure_all(MODELS[options.model], options.work, options.limit)
    limit = f" --limit {options.limit}" if options.limit else ""
    limit += f" --threads {options.threads}" if options.threads != 2 else ""
    command = f"python benchmarks/multiplex.py --work WORK{limit} -o docs/benchmarks/multiplex.md"
    text = page(options.model, found, command, options.threads)
    if options.output:
        options.output.write_text(text, encoding="utf-8")
    else:
        print(text)


if __name__ == "__main__":
    main()
