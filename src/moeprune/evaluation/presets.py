"""Presets: sets of tasks under one name, asked the way the field asks them; and the metric that counts for a task."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moeprune.errors import EvaluationError
from moeprune.evaluation.settings import EvalSettings

BUNDLED_TASKS = Path(__file__).parents[1] / "data" / "tasks"

# Modules that lm-eval's extras bring; `pip install "lm_eval[math]"`.
EXTRAS = {"math": ("sympy", "math_verify", "antlr4"), "ifeval": ("langdetect", "immutabledict", "nltk")}

# The metric that papers report, where it is not the first one of lm-eval's task; `metric` or `metric,filter`.
PRIMARY_METRICS = {
    "arc_challenge": "acc_norm",
    "arc_easy": "acc_norm",
    "hellaswag": "acc_norm",
    "openbookqa": "acc_norm",
    # an answer in another layout than asked for is still an answer
    "gsm8k": "exact_match,flexible-extract",
    "gsm8k_cot": "exact_match,flexible-extract",
    "gpqa_diamond_cot_zeroshot": "exact_match,flexible-extract",
    "minerva_math500": "math_verify",
    "ifeval": "prompt_level_strict_acc",
    "humaneval": "pass@1",
    "humaneval_plus": "pass@1",
    "humaneval_instruct": "pass@1",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Preset:
    """Tasks that belong together and how they are asked.

    What a preset sets holds for the whole run, also for tasks named beside it; an option of the user's wins over it.

    Attributes:
        summary: what it measures, for people.
        tasks: names of lm-eval's tasks and groups, each with its number of examples, which is lm-eval's own.
        apply_chat_template: ask as a chat.
        max_gen_toks: most tokens of an answer; None where nothing is generated.
        model_args: arguments of lm-eval's model class, for models that think before they answer.
        limit: questions per task.
        extra: extra of lm-eval that its tasks need, a key of `EXTRAS`.
        unsafe: its tasks execute what the models write.
        bundled: its tasks come with moeprune.
    """

    summary: str
    tasks: Mapping[str, int]
    apply_chat_template: bool = False
    max_gen_toks: int | None = None
    model_args: Mapping[str, Any] = field(default_factory=dict)
    limit: int | None = None
    extra: str = ""
    unsafe: bool = False
    bundled: bool = False


PRESETS: dict[str, Preset] = {
    "smoke": Preset(
        summary="the bundled tasks, 200 questions of each: does it run at all; needs no network",
        tasks={"tiny": 0},
        limit=200,
        bundled=True,
    ),
    "quick": Preset(
        summary="four multiple-choice tasks, for a first look",
        tasks={"arc_challenge": 0, "hellaswag": 0, "winogrande": 0, "piqa": 0},
    ),
    "mc": Preset(
        summary="the multiple-choice tasks of the pruning papers (arXiv:2510.13999)",
        tasks={
            "winogrande": 0,
            "arc_challenge": 0,
            "arc_easy": 0,
            "boolq": 0,
            "hellaswag": 0,
            "mmlu": 0,
            "openbookqa": 0,
            "rte": 0,
        },
    ),
    "math": Preset(
        summary="word problems and competition problems, answered in full",
        tasks={"gsm8k": 5, "minerva_math500": 4},
        apply_chat_template=True,
        max_gen_toks=16384,
        model_args={"enable_thinking": False},
        extra="math",
    ),
    "code": Preset(
        summary="functions completed from their docstring or tests, and run",
        tasks={"humaneval_plus": 0, "mbpp_plus": 3},
        max_gen_toks=2048,
        unsafe=True,
    ),
    "instruct": Preset(
        summary="instructions whose keeping a program can check",
        tasks={"ifeval": 0},
        apply_chat_template=True,
        max_gen_toks=4096,
        model_args={"enable_thinking": False},
        extra="ifeval",
    ),
    "reasoning": Preset(
        summary="hard problems, for models that think before they answer",
        tasks={"gpqa_diamond_cot_zeroshot": 0, "aime24": 0, "aime25": 0, "mmlu_pro": 5},
        apply_chat_template=True,
        max_gen_toks=32768,
        model_args={"enable_thinking": True, "think_end_token": "</think>"},
    ),
}


def expand(settings: EvalSettings) -> EvalSettings:
    """Put tasks in the place of presets' names, and what presets set where the user set nothing.

    Raises:
        EvaluationError: a preset cannot run here, or two of them want to be asked differently.

    Example:
        >>> expand(EvalSettings(tasks=("quick", "my_task"))).tasks
        ('arc_challenge', 'hellaswag', 'winogrande', 'piqa', 'my_task')
    """
    named = {name: PRESETS[name] for name in settings.tasks if name in PRESETS}
    for name, preset in named.items():
        _check_needs(name, preset, settings)
    if not named:
        return settings
    filled = {
        option: _agreed(named, option)
        for option in ("apply_chat_template", "max_gen_toks", "limit")
        if getattr(settings, option) is None
    }
    given = [task for name in settings.tasks for task in (PRESETS[name].tasks if name in PRESETS else (name,))]
    folder = BUNDLED_TASKS if any(preset.bundled for preset in named.values()) else settings.include_path
    return dataclasses.replace(
        settings,
        tasks=tuple(dict.fromkeys(given)),
        include_path=folder,
        model_args={**_agreed(named, "model_args"), **settings.model_args},
        **filled,
    )


def _agreed(named: Mapping[str, Preset], option: str) -> Any:
    """What presets set for an option, all of them alike; those that generate nothing have no say in how much."""
    wanted = {name: getattr(preset, option) for name, preset in named.items()}
    if option == "max_gen_toks":
        wanted = {name: limit for name, limit in wanted.items() if limit is not None} or wanted
    first, *others = wanted.values()
    if any(other != first for other in others):
        hint = "evaluate them one at a time" + ("" if option == "model_args" else f", or pass --{_dashed(option)}")
        raise EvaluationError(f"the presets {' and '.join(wanted)} differ in {_dashed(option)}", hint)
    return first


def _dashed(option: str) -> str:
    return option.replace("_", "-")


def _check_needs(name: str, preset: Preset, settings: EvalSettings) -> None:
    if preset.unsafe and not settings.confirm_run_unsafe_code:
        raise EvaluationError(
            f"preset {name!r} executes the code that the models write",
            "pass --confirm-run-unsafe-code where that can do no harm, such as in a container",
        )
    missing = missing_modules(EXTRAS.get(preset.extra, ()))
    if missing:
        raise EvaluationError(f"preset {name!r} needs {', '.join(missing)}", f'pip install "lm_eval[{preset.extra}]"')
    if preset.bundled and settings.include_path is not None:
        hint = "evaluate it and the tasks of --include-path one at a time"
        raise EvaluationError(f"preset {name!r} brings tasks of its own", hint)


def missing_modules(names: Sequence[str]) -> list[str]:
    """Those modules that are not installed."""
    return [name for name in names if importlib.util.find_spec(name) is None]


def presets_table() -> str:
    """The presets as a Markdown table, for the reference."""
    lines = ["| preset | tasks, with examples | asked | tokens of an answer | also needs |", "|---|---|---|--:|---|"]
    for name, preset in PRESETS.items():
        tasks = ", ".join(f"`{task}` {shots}" for task, shots in preset.tasks.items())
        limit = f"{preset.max_gen_toks:,}" if preset.max_gen_toks else "the task's own" if preset.bundled else ""
        lines.append(f"| `{name}` | {tasks} | {_asked(preset)} | {limit} | {_needs(preset)} |")
    return "\n".join(lines) + "\n"


def _asked(preset: Preset) -> str:
    thinking = {True: ", thinking", False: ", not thinking", None: ""}[preset.model_args.get("enable_thinking")]
    limit = f", {preset.limit} questions of each" if preset.limit else ""
    return ("as a chat" if preset.apply_chat_template else "as text") + thinking + limit


def _needs(preset: Preset) -> str:
    extra = f'`pip install "lm_eval[{preset.extra}]"`' if preset.extra else ""
    return "`--confirm-run-unsafe-code`" if preset.unsafe else extra
