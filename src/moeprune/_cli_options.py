"""Options of the command line that several commands share, and how their text is read."""

from __future__ import annotations

import contextlib
import json
from contextvars import ContextVar
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from moeprune import _files
from moeprune.errors import ConfigError

# --- every command --------------------------------------------------------------------------------------------------

verbosity: ContextVar[int] = ContextVar("verbosity", default=0)  # how often -v was given


def _set_quiet(value: bool) -> bool:
    _files.quiet.set(value)
    return value


def _set_verbosity(value: int) -> int:
    verbosity.set(value)
    return value


AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
Quiet = Annotated[bool, typer.Option("-q", "--quiet", callback=_set_quiet, help="No progress and no notes.")]
Verbose = Annotated[
    int,
    typer.Option(
        "-v",
        "--verbose",
        count=True,
        callback=_set_verbosity,
        show_default=False,
        metavar="",
        help="-v: what caused an error; -vv: its traceback.",
    ),
]

# --- files ----------------------------------------------------------------------------------------------------------

Model = Annotated[str, typer.Argument(metavar="MODEL", help="Checkpoint folder or Hub id.")]
Statistics = Annotated[Path, typer.Argument(metavar="STATISTICS", help="Statistics file.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an output that is not empty.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Check everything, say what would be written, write nothing.")]
Revision = Annotated[str | None, typer.Option("--revision", metavar="REV", help="Branch, tag or commit on the Hub.")]
ShardSize = Annotated[str, typer.Option("--max-shard-size", metavar="SIZE", help="Bytes per file: 5GB, 512MiB.")]
OutputFile = Annotated[Path, typer.Option("-o", "--output", metavar="FILE", help="Where to write.")]
OutputFolder = Annotated[
    Path | None,
    typer.Option("-o", "--output", metavar="DIR", help="The pruned checkpoint.  [default: ./<name>-<kept>of<E>]"),
]
ReportFolder = Annotated[
    Path, typer.Option("-o", "--output", metavar="DIR", help="Folder of the report and of lm-eval's own output.")
]

# --- calibration ----------------------------------------------------------------------------------------------------

Calibration = Annotated[
    list[str],
    typer.Option(
        "--calibration",
        metavar="[DOMAIN=]SOURCE",
        help="Repeatable: .jsonl .json .parquet .txt, or org/name[/config][@split][#revision].",
    ),
]
NumSamples = Annotated[int, typer.Option("--num-samples", metavar="N", help="Rows per source.")]
MaxLength = Annotated[int, typer.Option("--max-length", metavar="N", help="Tokens per sequence.")]
Shuffle = Annotated[bool, typer.Option("--shuffle", help="Draw rows with --seed instead of taking the first.")]
Pack = Annotated[bool, typer.Option("--pack", help="Join rows into full sequences.")]
BatchTokens = Annotated[int, typer.Option("--batch-tokens", metavar="N", help="Tokens per batch, padding included.")]
Seed = Annotated[int, typer.Option("--seed", metavar="N", help="For everything that draws.")]
Device = Annotated[
    str | None, typer.Option("--device", metavar="DEVICE", help="cpu, cuda, cuda:1, or auto to spread over all.")
]
Dtype = Annotated[
    str, typer.Option("--dtype", metavar="DTYPE", help="auto (the checkpoint's own), float32, bfloat16, float16.")
]
Stream = Annotated[
    bool | None,
    typer.Option(
        "--stream/--no-stream",
        show_default=False,
        help="Run one layer at a time, or load the whole model.  [default: by what fits]",
    ),
]
Memory = Annotated[
    str | None, typer.Option("--memory", metavar="SIZE", help="Main memory that a pass layer by layer may use: 16GiB.")
]
DeviceMemory = Annotated[
    str | None, typer.Option("--device-memory", metavar="SIZE", help="The same of the accelerator's memory.")
]
Layers = Annotated[
    str, typer.Option("--layers", metavar="L,L-L,...", help="Collect a slice of the decoder layers: 0-11,13.")
]
StatisticNames = Annotated[
    str,
    typer.Option(
        "--statistics",
        metavar="core|all|NAME,...",
        help="What to measure: statistics, or strategies that need some.  [default: core]",
    ),
]
Paths = Annotated[
    int, typer.Option("--paths", metavar="N", help="Sequences per domain for the statistics path_*: the first ones.")
]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="Run code that comes with the model.")]

# --- training -------------------------------------------------------------------------------------------------------

TrainLevels = Annotated[
    str | None,
    typer.Option("--train", metavar="LEVEL,...", help="What moves: router, experts, attention, norms, all; zero-rows."),
]
Steps = Annotated[int | None, typer.Option("--steps", metavar="N", help="Optimiser steps.")]
LearningRate = Annotated[float | None, typer.Option("--lr", metavar="RATE", help="Largest learning rate.")]
StepTokens = Annotated[int | None, typer.Option("--step-tokens", metavar="N", help="Tokens of a step, about.")]
Schedule = Annotated[
    str | None, typer.Option("--schedule", metavar="NAME", help="Of the learning rate: cosine, linear, constant.")
]
Temperature = Annotated[
    float | None, typer.Option("--temperature", metavar="T", help="Softens both distributions that are compared.")
]
Precision = Annotated[
    str | None, typer.Option("--mixed-precision", metavar="no|bf16|fp16", help="Of the passes; weights are float32.")
]


def recipe_of(batch_tokens: int, seed: int, **given: Any) -> Any:
    """How to train, from the options that were given; the others have the recipe's own defaults."""
    from moeprune.healing.distillation import Recipe

    chosen = {name: value for name, value in given.items() if value is not None}
    return Recipe(batch_tokens=batch_tokens, seed=seed, **chosen)


def check_only_with(option: str, **given: Any) -> None:
    """Refuse options that say how to do what was not asked for.

    Raises:
        ConfigError: the message names the first one.
    """
    used = [name for name, value in given.items() if value is not None]
    if used:
        raise ConfigError(f"--{used[0].replace('_', '-')} does nothing without {option}", f"pass {option} too")


# --- decisions ------------------------------------------------------------------------------------------------------

Ratio = Annotated[
    str | None, typer.Option("--ratio", metavar="R", help="Fraction of the experts of each layer to REMOVE.")
]
Keep = Annotated[int | None, typer.Option("--keep", metavar="N", help="Exact number of experts to keep in each layer.")]
StrategyName = Annotated[str | None, typer.Option("--strategy", metavar="NAME", help="See `moeprune strategies`.")]
Weights = Annotated[str, typer.Option("--weights", metavar="D=W,...", help="Domain weights: code=2,prose=1.")]
Blend = Annotated[
    str,
    typer.Option(
        "--blend", metavar="sum|maxmin", help="maxmin: weigh domains so that the worst served one keeps the most."
    ),
]
ProtectTop = Annotated[
    int, typer.Option("--protect-top", metavar="N", help="Keep the N best experts of every domain in each layer.")
]
Protect = Annotated[str, typer.Option("--protect", metavar="L:E,...", help="Experts that must stay, by layer.")]
NoGuard = Annotated[bool, typer.Option("--no-guard", help="Let strategies drop super experts.")]
Target = Annotated[
    str, typer.Option("--target", metavar="ENGINES", help="Engines that must take the result: vllm,sglang,...")
]
RoundTo = Annotated[
    int, typer.Option("--round-to", metavar="N", help="Make the kept count a multiple of this, rounding up.")
]
BudgetName = Annotated[
    str,
    typer.Option(
        "--budget",
        metavar="NAME[:K=V,...]",
        help="Shares experts out over layers: uniform, global, laep[:alpha=A,beta=B], coverage[:fraction=F], "
        "evolve[:generations=N].",
    ),
]
NonUniform = Annotated[
    bool, typer.Option("--allow-non-uniform", help="Let layers keep different numbers: only transformers loads that.")
]
Selection = Annotated[
    list[str],
    typer.Option(
        "--selection",
        metavar="[DOMAIN=]SOURCE",
        help="Repeatable: text of its own on which --budget evolve scores counts, 64 rows of each source.",
    ),
]
Rearrange = Annotated[
    int,
    typer.Option(
        "--rearrange", metavar="N", help="Order the experts so that N expert-parallel groups carry equal load."
    ),
]
Mtp = Annotated[
    str, typer.Option("--mtp", metavar="cut|drop", help="MTP layers: cut them like the last layer, or drop them.")
]

# --- fusing ---------------------------------------------------------------------------------------------------------

GroupingName = Annotated[
    str | None,
    typer.Option(
        "--grouping",
        metavar="NAME",
        show_default=False,
        help="Which experts go together: m-smoe, hc-smoe, co-activation, ream, or a strategy whose kept ones take in "
        "the others.  [default: hope-total]",
    ),
]
MergeName = Annotated[
    str | None,
    typer.Option(
        "--merge",
        metavar="NAME",
        show_default=False,
        help="How they become one: absorb, least-squares, frequency, mean, slerp, svd.  [default: absorb]",
    ),
]
Align = Annotated[
    bool | None,
    typer.Option(
        "--align/--no-align",
        show_default=False,
        help="Put the neurons of each in the order of the dominant one's before.  [default: where they are mixed]",
    ),
]
RouterMode = Annotated[
    str | None,
    typer.Option(
        "--router",
        metavar="MODE",
        show_default=False,
        help="Its rows: keep-dominant, merge-rows, or tied, which only moeprune.load runs.  [default: keep-dominant]",
    ),
]

# --- evaluation -----------------------------------------------------------------------------------------------------

Tasks = Annotated[
    str,
    typer.Option(
        "--tasks",
        "--eval",
        metavar="A,B",
        help="lm-eval tasks or groups, or presets: smoke, quick, mc, math, code, instruct, reasoning.",
    ),
]
IncludePath = Annotated[
    Path | None, typer.Option("--include-path", "--include_path", metavar="DIR", help="Folder of more tasks.")
]
Backend = Annotated[str, typer.Option("--model", metavar="hf|vllm|sglang", help="What runs the models.")]
ModelArgs = Annotated[
    str, typer.Option("--model-args", "--model_args", metavar="K=V,...", help="Backend arguments, or a JSON object.")
]
Text = Annotated[
    list[str],
    typer.Option(
        "--text",
        metavar="[DOMAIN=]SOURCE",
        help="Repeatable: score plans on this text; sources as for --calibration.",
    ),
]
Probes = Annotated[
    bool,
    typer.Option(
        "--probes",
        help="Loops, JSON, and text inside and outside the calibration mix, beside --text and --tasks if given.",
    ),
]
BatchSize = Annotated[
    int, typer.Option("--batch-size", "--batch_size", metavar="N", help="Fixed, the same for both models.")
]
Limit = Annotated[
    int | None, typer.Option("--limit", metavar="N", help="First N questions of each task; no full benchmark.")
]
FewShot = Annotated[
    int | None, typer.Option("--num-fewshot", "--num_fewshot", metavar="N", help="Examples before each question.")
]
ChatTemplate = Annotated[
    bool | None,
    typer.Option(
        "--apply-chat-template/--no-apply-chat-template",
        "--apply_chat_template",
        show_default=False,
        help="Ask as a chat.  [default: as the preset says, or as text]",
    ),
]
MaxGenToks = Annotated[
    int | None,
    typer.Option(
        "--max-gen-toks",
        "--max_gen_toks",
        metavar="N",
        help="Most tokens of an answer.  [default: the preset's, or the task's own]",
    ),
]
UnsafeCode = Annotated[
    bool,
    typer.Option(
        "--confirm-run-unsafe-code",
        "--confirm_run_unsafe_code",
        help="Run the code that models write, for tasks that need it.",
    ),
]
Launcher = Annotated[
    str | None,
    typer.Option(
        "--launcher", metavar="COMMAND", help="Starts each model's processes: 'accelerate launch --num_processes 4'."
    ),
]
Cache = Annotated[
    Path | None,
    typer.Option("--cache", metavar="DIR", help="Where BASE's results are kept.  [default: ~/.cache/moeprune/results]"),
]
NoCache = Annotated[bool, typer.Option("--no-cache", help="Measure BASE again, and keep nothing.")]
Margin = Annotated[float, typer.Option("--margin", metavar="POINTS", help="Loss that would be acceptable.")]
FailOn = Annotated[str, typer.Option("--fail-on", metavar="loss", help="Exit with 3 when a task's verdict is a loss.")]

# --- reading their text ---------------------------------------------------------------------------------------------


def names(text: str) -> tuple[str, ...]:
    """``a,b`` as ``("a", "b")``."""
    return tuple(name.strip() for name in text.split(",") if name.strip())


def pairs(text: str, option: str) -> dict[str, str]:
    """``a=1,b=2`` as a dictionary.

    Raises:
        ConfigError: a part is not NAME=VALUE.
    """
    found = {}
    for item in names(text):
        key, equals, value = item.partition("=")
        if not equals or not key or not value:
            raise ConfigError(f"{option}: {item!r} is not NAME=VALUE", "write several as a=1,b=2")
        found[key] = value
    return found


def weights_of(text: str) -> dict[str, float] | None:
    """Domain weights.

    Raises:
        ConfigError: a weight is not a number.
    """
    try:
        return {name: float(value) for name, value in pairs(text, "--weights").items()} or None
    except ValueError:
        raise ConfigError(f"--weights {text!r}: a weight is not a number", "write it as code=2,prose=1") from None


def protected_of(text: str) -> dict[int, frozenset[int]] | None:
    """Protected experts by layer.

    Raises:
        ConfigError: a part is not LAYER:EXPERT.
    """
    layers: dict[int, set[int]] = {}
    for item in names(text):
        layer, _, expert = item.partition(":")
        if not (layer.isdecimal() and expert.isdecimal()):
            raise ConfigError(f"--protect: {item!r} is not LAYER:EXPERT", "write it as 0:17,3:5")
        layers.setdefault(int(layer), set()).add(int(expert))
    return {layer: frozenset(experts) for layer, experts in layers.items()} or None


_MOST_LAYERS = 9999  # no model has more


def layers_of(text: str) -> tuple[int, ...] | None:
    """Decoder layers, ``0-2,5`` as ``(0, 1, 2, 5)``.

    Raises:
        ConfigError: a part is neither a number nor a range.
    """
    found: list[int] = []
    for item in names(text):
        first, _, last = item.partition("-")
        numbers = [int(text) if text.isdecimal() else -1 for text in (first, last or first)]
        if not 0 <= numbers[0] <= numbers[1] <= _MOST_LAYERS:
            raise ConfigError(f"--layers: {item!r} is no layer or range of layers", "write it as 0-11,13")
        found += range(numbers[0], numbers[1] + 1)
    return tuple(found) or None


def size_of(text: str | None) -> int | None:
    """Bytes, from ``16GiB`` or ``500MB``.

    Raises:
        ConfigError: it is no size.
    """
    return None if text is None else _files.parse_size(text)


def model_args_of(text: str) -> dict[str, Any]:
    """Arguments of lm-eval's model class.

    Raises:
        ConfigError: neither ``k=v,...`` nor a JSON object.
    """
    if not text.lstrip().startswith("{"):
        return {name: _typed(value) for name, value in pairs(text, "--model-args").items()}
    try:
        return dict(json.loads(text))
    except ValueError as error:
        raise ConfigError(f"--model-args is not valid JSON: {error}", "or write it as k=v,...") from error


def _typed(text: str) -> Any:
    """A number or truth value where the text is one, as lm-eval reads it."""
    known = {"true": True, "false": False, "none": None}
    if text.lower() in known:
        return known[text.lower()]
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(text)
    return text


def cache_of(folder: Path | None, *, unused: bool) -> Path | Literal[False] | None:
    """Where a base model's results are kept; None for the usual place, False for nowhere.

    Raises:
        ConfigError: a place is named and not to be used.
    """
    if unused and folder is not None:
        raise ConfigError("--cache names a folder that --no-cache would not use", "pass one of them")
    return False if unused else folder
