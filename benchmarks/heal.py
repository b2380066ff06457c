"""Dropping, fusing and thinning to equal bytes, each as it is and healed layer by layer; what healing takes of memory.

    python benchmarks/heal.py --work WORK -o docs/benchmarks/heal.md       # all parts; goes on where it stopped
    python benchmarks/heal.py --work WORK --parts time                     # methods at equal time
    python benchmarks/heal.py --work WORK --memory --layers 6 [--small]    # layers of Qwen3-30B-A3B's size

Calibration text, held-out text and tasks share no passage. Each checkpoint is made in a process of its own, whose
processor time and peak memory the system counts, then evaluated: tasks (one is written, six are four-way choices) and
perplexity. Every cell is a JSON file in the work folder.

A way is what is done to the model, then what is done to the result, joined by ``+``: ``drop`` or the name of another
strategy, ``fuse``, ``neurons``, ``sparse``, ``2:4``; ``heal[@STEPS][=LEVEL[=VARIANT]]``, ``closed-form``,
``experts[@STEPS]``.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import stream as synthetic
from strategies import MODELS, _score

from moeprune.pipeline import BUNDLED

CALIBRATION, HELDOUT = str(BUNDLED / "calibration.jsonl"), BUNDLED / "heldout.jsonl"
RATIOS = ("0.5", "0.75")
WAYS = ("drop", "drop+heal", "fuse", "fuse+heal", "neurons", "neurons+heal")
SPARSE = ("sparse", "sparse+heal", "sparse+experts", "neurons+heal", "neurons+experts")
CHAIN = "drop+closed-form+heal@50"
TIMED = ("drop+closed-form", *(f"drop+heal@{steps}" for steps in (25, 50, 100)), "drop+heal", CHAIN)
FITTED = ("drop+heal", *(f"drop+heal={level}" for level in ("experts", "down", "router")))
FITTED += tuple(f"drop+heal=all={variant}" for variant in ("fast-router", "no-norm", "no-logits"))
CHOSEN = ("drop", "drop+heal", "router-hint", "router-hint+heal")
PARTS = {"tables": WAYS, "choice": CHOSEN, "time": TIMED, "sparse": SPARSE, "fit": FITTED}
WRITTEN = "tiny_sorting"  # its answers are generated; chance is 0, and a quarter elsewhere
RESAMPLES = 2000


# --- making a checkpoint, in a process of its own ---------------------------------------------------------------------


def make(model: str, ratio: str, way: str, source: Path, out: Path) -> None:
    """Write the checkpoint of a cell."""
    import moeprune
    from moeprune.strategies import is_built_in

    base = MODELS[model]
    _, plus, healing = way.rpartition("+")
    given: dict[str, Any] = {"calibration": CALIBRATION, "overwrite": True}
    if plus:
        named, level, variant = [*healing.split("="), "", ""][:3]
        method, _, steps = named.partition("@")
        more: dict[str, Any] = {"steps": int(steps)} if steps else {}
        more |= {"train": level} if level else {}
        with VARIANTS[variant]():
            moeprune.heal(base, source, out, method="layerwise" if method == "heal" else method, **more, **given)
    elif healing == "drop":
        moeprune.prune(base, out, ratio=ratio, **given)
    elif healing == "auto":
        moeprune.prune(base, out, ratio=ratio, strategy=healing, selection=str(BUNDLED / "selection.jsonl"), **given)
    elif is_built_in(healing):
        moeprune.prune(base, out, ratio=ratio, strategy=healing, **given)
    elif healing == "fuse":
        moeprune.fuse(base, out, ratio=ratio, **given)
    else:
        how = {"neurons": {"neurons": ratio}, "sparse": {"sparsity": ratio}}.get(healing, {"pattern": healing})
        moeprune.sparsify(base, out, **how, **given)


@contextlib.contextmanager
def _as_it_is() -> Iterator[None]:
    yield


@contextlib.contextmanager
def _without_norm() -> Iterator[None]:
    """Errors of the hidden states themselves, of each token in proportion to its size."""

    def loss(*_: object) -> Callable[[Any, Any], Any]:
        return lambda out, wanted: ((out - wanted).square().mean(-1) / wanted.square().mean(-1)).mean()

    with mock.patch("moeprune.healing.layerwise.hidden_loss", loss):
        yield


@contextlib.contextmanager
def _without_logits() -> Iterator[None]:
    """The last layer is fitted like the others."""
    from moeprune.healing.targets import hidden_loss

    def loss(base: Any, _: Any) -> Any:
        return hidden_loss(base, base.depth - 1)

    with mock.patch("moeprune.healing.layerwise.divergence", loss):
        yield


@contextlib.contextmanager
def _with_fast_routers() -> Iterator[None]:
    """Routers learn three times as fast as everything else."""
    with mock.patch("moeprune.healing.fitting._ROUTER", 3.0):
        yield


VARIANTS = {"": _as_it_is, "fast-router": _with_fast_routers, "no-norm": _without_norm, "no-logits": _without_logits}


def made(options: argparse.Namespace, model: str, ratio: str, way: str) -> tuple[Path, dict[str, float]]:
    """The checkpoint of a cell, and the seconds and bytes that the last thing done to it took; of healings, all."""
    if way == "base":
        return MODELS[model], {"seconds": 0.0, "peak": 0.0}
    folder = options.work / model / _named(ratio, way)
    file = folder.with_name(f"{folder.name}.made.json")
    if not file.is_file() or not folder.is_dir():
        before = way.rpartition("+")[0]
        start, cost = made(options, model, ratio, before) if before else (folder, {})
        spent = cost["seconds"] if "+" in before else 0.0
        folder.parent.mkdir(parents=True, exist_ok=True)
        words = [sys.executable, __file__, "--make", model, ratio, way, str(start), str(folder)]
        subprocess.run([*words, "--threads", str(options.threads)], check=True, stdout=subprocess.DEVNULL)
        took = json.loads(_took(folder).read_text())
        file.write_text(json.dumps({"seconds": spent + took["seconds"], "peak": took["peak"]}))
    cost = json.loads(file.read_text())
    return folder, cost


def divergence(folder: Path) -> str:
    """The held-out divergence that `heal` printed."""
    record = folder / "moeprune" / "healing.json"
    return f"{json.loads(record.read_text())['held_out_kl']['after']:.3f}" if record.is_file() else ""


def _took(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.took.json")


def _named(ratio: str, way: str) -> str:
    return way if way == "base" else f"{ratio}-{way}".replace(":", "")


# --- evaluating -------------------------------------------------------------------------------------------------------


def measured(options: argparse.Namespace, model: str, ratio: str, way: str) -> dict[str, Any]:
    """Answers and losses of a cell."""
    name = _named(ratio, way)
    file = options.work / model / f"{name}.json"
    folder, cost = made(options, model, ratio, way)
    if not file.is_file():
        found = {"bytes": _bytes(folder)} | evaluate(folder, options.limit)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(found))
        print(model, name, f"{cost['seconds']:.0f} s", flush=True)
    cell: dict[str, Any] = json.loads(file.read_text()) | {"cost": cost, "kl": divergence(folder)}
    return cell


def _bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def evaluate(folder: Path, limit: int | None) -> dict[str, Any]:
    """Right answers by task, and losses by held-out document."""
    from transformers import AutoTokenizer

    from moeprune import open_checkpoint
    from moeprune.collectors.resident import load_model
    from moeprune.evaluation.agreement import token_losses
    from moeprune.evaluation.harness import prepare, run_model
    from moeprune.evaluation.samples import read_run
    from moeprune.evaluation.settings import EvalSettings

    model = load_model(open_checkpoint(folder), device="cpu", dtype="float32")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    settings = EvalSettings(tasks=("tiny",), include_path=BUNDLED / "tasks", batch_size=32, limit=limit)
    with tempfile.TemporaryDirectory() as scratch, prepare(settings) as loaded:
        run_model((model, tokenizer), settings, Path(scratch) / "run", loaded=loaded)
        tasks = read_run(Path(scratch) / "run").tasks
    correct = {
        name: [_score(task.samples[key]) for key in sorted(task.samples)] for name, task in sorted(tasks.items())
    }
    texts = [json.loads(line)["text"] for line in HELDOUT.read_text(encoding="utf-8").splitlines()]
    losses = token_losses(model, [tokenizer(text)["input_ids"] for text in texts])
    return {"correct": correct, "nll": losses.nll.tolist(), "tokens": losses.tokens.tolist()}


# --- the page ---------------------------------------------------------------------------------------------------------


def above_chance(correct: dict[str, Any]) -> dict[str, float]:
    """Accuracy above chance by task."""
    return {name: float(np.mean(own)) - (0 if name == WRITTEN else 0.25) for name, own in correct.items()}


def kept(base: dict[str, Any], cell: dict[str, Any]) -> tuple[float, float, float]:
    """Accuracy above chance over the base's in percent, mean over tasks, with its 95 % bootstrap interval."""
    rng = np.random.default_rng(0)
    pairs = {name: np.array([base["correct"][name], own]) for name, own in cell["correct"].items()}

    def share(drawn: dict[str, Any]) -> float:
        whole, own = (above_chance({name: pair[side] for name, pair in drawn.items()}) for side in (0, 1))
        return 100 * float(np.mean([own[name] / whole[name] for name in own]))

    def draw() -> dict[str, Any]:
        return {name: pair[:, rng.integers(0, pair.shape[1], pair.shape[1])] for name, pair in pairs.items()}

    low, high = np.percentile([share(draw()) for _ in range(RESAMPLES)], [2.5, 97.5])
    return share(pairs), float(low), float(high)


def row(base: dict[str, Any], cell: dict[str, Any], dropped: float | None) -> list[str]:
    """One line of the table, without its name."""
    from moeprune.evaluation.agreement import TokenLosses, perplexity_ratio

    losses = [TokenLosses(np.array(one["nll"]), np.array(one["tokens"])) for one in (base, cell)]
    rise = perplexity_ratio(*losses)
    value, low, high = kept(base, cell)
    own, whole = above_chance(cell["correct"]), above_chance(base["correct"])
    shares = {name: 100 * own[name] / whole[name] for name in own if whole[name] > 0}
    worst = min(shares, key=lambda name: shares[name])
    chosen = 100 * np.mean([np.mean(answers) for name, answers in cell["correct"].items() if name != WRITTEN])
    back = "" if dropped is None else f"{100 * (dropped - rise.value) / (dropped - 1):.0f}"
    cost = cell["cost"]
    return [
        f"{cell['bytes'] / 1e6:.2f}",
        f"{value:.1f} ({low:.1f}..{high:.1f})",
        f"{shares[worst]:.0f} {worst.removeprefix('tiny_')}",
        f"{100 * np.mean(cell['correct'][WRITTEN]):.1f}",
        f"{chosen:.1f}",
        f"{rise.value:.3f} ({rise.interval[0]:.3f}..{rise.interval[1]:.3f})",
        back,
        cell["kl"],
        f"{cost['seconds']:.0f}",
        f"{cost['peak'] / 1e6:.0f}",
    ]


HEAD = "MB | kept % | worst task % | written % | chosen % | ppl x | gap back % | KL | seconds | peak MB"


TITLES = {
    "tables": "Dropped, fused, narrowed; healed and not",
    "choice": "Which experts to keep where they are healed",
    "time": "Closed form and gradient steps at equal time",
    "sparse": "Sparsified models, healed by layer and expert by expert",
    "fit": "What to fit, and to what",
}
NOTES = {
    "choice": "`drop` keeps the experts that `hope-total` rates highest, the default.",
    "time": "`heal@N` takes N steps in each layer, `heal` 400; of a chain the seconds of both healings are added up.",
    "sparse": "`sparse` sets half of each row's weights to zero, `neurons` removes half of the neurons; MB are those "
    "of the files, in which zeros are stored.",
    "fit": "`=LEVEL` says what is trained; with `fast-router` routers learn three times as fast as the rest and not at "
    "three tenths of its rate; `no-norm` measures errors of the states themselves, `no-logits` fits the last layer "
    "like the others.",
}


def page(options: argparse.Namespace) -> str:
    """All tables; measures what is missing."""
    more = f" --limit {options.limit}" if options.limit else ""
    more += "" if options.parts == list(PARTS) else f" --parts {' '.join(options.parts)}"
    threads = f"{options.threads} thread" + "s" * (options.threads > 1)
    lines = [
        "# Healed and not",
        "",
        f"    python benchmarks/heal.py --work WORK --threads {options.threads}{more} -o docs/benchmarks/heal.md",
        "",
        "- *kept %*: accuracy above chance over the original's, mean over the tasks, with a 95 % bootstrap interval",
        "  over questions, paired; *worst task %*: the least that one task keeps. *written*: exact match of generated",
        "  answers; *chosen*: mean of the four-way choices.",
        "- *ppl x*: held-out perplexity over the original's, with its 95 % interval over documents; *gap back*: how",
        "  much of what the same model loses without healing. It can be more than all, and a ratio below 1 is no",
        "  better model: healing is trained on text of the same kind.",
        "- *KL*: from the original, in nats, on the part of the calibration text that was held out of the healing, as",
        "  `heal` prints it in the end.",
        "- *seconds* (of processor time), *peak*: of the process that makes the checkpoint with its imports; of what",
        f"  is healed, the healing alone; {threads}.",
        "",
    ]
    for part in options.parts:
        ratios = options.ratios if part == "tables" else ["0.5"]
        lines += [f"## {TITLES[part]}", "", *([NOTES[part], ""] if part in NOTES else [])]
        for ratio in ratios:
            for model in options.models:
                lines += table(options, model, ratio, part)
    return "\n".join(lines)


def table(options: argparse.Namespace, model: str, ratio: str, part: str) -> Iterator[str]:
    """One model's ways beside one another."""
    ways = [way for way in options.ways or PARTS[part] if not options.done or is_there(options, model, ratio, way)]
    missing = [way for way in options.ways or PARTS[part] if way not in ways]
    if not set(ways) - set(WAYS) and part != "tables":
        return  # nothing that is not there already
    if missing:
        yield f"{model}, {float(ratio):.0%} removed: not measured were {', '.join(missing)}."
        yield ""
    if not ways:
        return
    base = measured(options, model, ratio, "base")
    yield f"### {model}, {float(ratio):.0%} removed"
    yield ""
    yield f"| way | {HEAD} |"
    yield "|---|" + "--:|" * 10
    for way in ways:
        cell = measured(options, model, ratio, way)
        plain = measured(options, model, ratio, way.partition("+")[0]) if "+" in way else None
        yield f"| {way} | {' | '.join(row(base, cell, _rise(base, plain)))} |"
    yield ""


def is_there(options: argparse.Namespace, model: str, ratio: str, way: str) -> bool:
    """Whether a cell was measured."""
    files = [options.work / model / f"{_named(ratio, way)}{suffix}" for suffix in (".json", ".made.json")]
    return all(file.is_file() for file in files)


def _rise(base: dict[str, Any], cell: dict[str, Any] | None) -> float | None:
    if cell is None:
        return None
    return float(np.exp((np.sum(cell["nll"]) - np.sum(base["nll"])) / np.sum(base["tokens"])))


# --- memory -----------------------------------------------------------------------------------------------------------


def memory(options: argparse.Namespace) -> None:
    """Heal half of a synthetic model's experts, and compare the peak with the model and with the forecast."""
    import torch

    import moeprune

    torch.set_num_threads(options.threads)
    base = synthetic.build(options.work / ("small" if options.small else "large"), options.layers, small=options.small)
    ids = synthetic.write_ids(options.work, 20, 256)
    dropped, out = options.work / "dropped", options.work / "healed"
    if not dropped.is_dir():
        moeprune.prune(base, dropped, ratio=0.5, strategy="random")
    shutil.rmtree(out, ignore_errors=True)
    given: dict[str, Any] = {"calibration": str(ids), "steps": 4, "device": "cpu"}
    expected = moeprune.heal(base, dropped, out, dry_run=True, **given).forecast
    idle = synthetic.status("RssAnon")
    begun = time.perf_counter()
    with synthetic.watched_peak() as peak:
        moeprune.heal(base, dropped, out, **given)
    whole = {name: 2 * _bytes(folder) for name, folder in {"original": base, "pruned": dropped}.items()}
    print(f"peak {(peak[0] - idle) / 1e9:.2f} GB above idle in {time.perf_counter() - begun:.0f} s", end="; ")
    print(f"forecast {expected.host / 1e9:.2f} GB" if expected else "no forecast", end="; ")
    print(", ".join(f"{name} in float32 {size / 1e9:.2f} GB" for name, size in whole.items()))


def main() -> None:
    """Measure what is missing, then print the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, help="folder of checkpoints and measurements, reused")
    parser.add_argument("-o", "--output", type=Path, help="Markdown file; stdout otherwise")
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--ratios", nargs="+", default=list(RATIOS))
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=list(PARTS))
    parser.add_argument("--ways", nargs="+", help="in the place of those of the parts")
    parser.add_argument("--done", action="store_true", help="the page of what is there; measure nothing")
    parser.add_argument("--limit", type=int, help="first N questions of each task")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--small", action="store_true", help="a smaller synthetic model")
    parser.add_argument("--layers", type=int, default=5, help="of the synthetic model")
    parser.add_argument("--make", nargs=5, metavar=("MODEL", "RATIO", "WAY", "SOURCE", "OUT"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    import torch

    torch.set_num_threads(options.threads)
    if options.make:
        model, ratio, way, source, out = options.make
        make(model, ratio, way, Path(source), Path(out))
        own = resource.getrusage(resource.RUSAGE_SELF)
        took = {"seconds": own.ru_utime + own.ru_stime, "peak": 1024 * own.ru_maxrss}
        _took(Path(out)).write_text(json.dumps(took))
        return
    if options.work is None:
        parser.error("--work is needed")
    options.work.mkdir(parents=True, exist_ok=True)
    if options.memory:
        memory(options)
        return
    text = page(options)
    if options.output:
        options.output.write_text(text, encoding="utf-8")
    else:
        print(text)


if __name__ == "__main__":
    main()
