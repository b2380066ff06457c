"""How to evaluate: the settings that both models share, and what can be wrong with them."""

from __future__ import annotations

import importlib.util
import os
import shlex
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moeprune.errors import EvaluationError, nearest

_BACKENDS = {"hf": "transformers", "vllm": "vllm", "sglang": "sglang"}
_RESERVED = {"pretrained", "batch_size", "trust_remote_code"}
# What each backend calls the longest sequence that it takes; the longest is the model's own where none is given.
_LENGTHS = ("max_length", "max_model_len", "context_length")


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalSettings:
    """How to evaluate; the same for both models.

    Attributes:
        tasks: names of lm-eval tasks, groups or tags; ``*`` matches several.
        include_path: folder with further task YAMLs; its names win over lm-eval's own.
        backend: ``hf`` (in this process), ``vllm`` or ``sglang`` (one process per model).
        model_args: further arguments of lm-eval's model class, such as ``{"max_length": 4096}``.
        batch_size: fixed on purpose, because scores move with the batch size.
        limit: evaluate only the first so many documents per task; the report then says so.
        device: torch device of the hf backend, or ``auto`` to spread over all; by default CUDA where there is one.
        dtype: ``auto`` is the checkpoint's own.
        num_fewshot: overrides the tasks' number of examples, except where a task insists on none.
        apply_chat_template: ask as a chat; None leaves it to the preset, or asks as text.
        max_gen_toks: most tokens of an answer, for every task that generates; by default the task's own.
        confirm_run_unsafe_code: run what the models write, for tasks that need it.
        seed: 0 gives lm-eval's own default seeds, and so its usual few-shot examples.
        isolated: run the hf backend in a process of its own per model too.
        launcher: command that starts the processes of each model, such as ``accelerate launch --num_processes 4``.
    """

    tasks: tuple[str, ...]
    include_path: Path | None = None
    backend: str = "hf"
    model_args: Mapping[str, Any] = field(default_factory=dict)
    batch_size: int = 16
    limit: int | None = None
    device: str | None = None
    dtype: str = "auto"
    num_fewshot: int | None = None
    apply_chat_template: bool | None = None
    max_gen_toks: int | None = None
    confirm_run_unsafe_code: bool = False
    trust_remote_code: bool = False
    seed: int = 0
    isolated: bool = False
    launcher: str | None = None

    @property
    def in_process(self) -> bool:
        """Whether models run in this process."""
        return self.backend == "hf" and not self.isolated and not self.launcher

    @property
    def chat(self) -> bool:
        """Whether tasks are asked as a chat."""
        return bool(self.apply_chat_template)

    @property
    def seeds(self) -> dict[str, int]:
        """Seeds by generator, in the order of lm-eval's ``--seed``."""
        other = 1234 + self.seed
        return {"random_seed": self.seed, "numpy_seed": other, "torch_seed": other, "fewshot_seed": other}


def canonical_options(settings: EvalSettings, margin: float) -> dict[str, Any]:
    """The options that decide the result, for the report's envelope."""
    return {
        "tasks": list(settings.tasks),
        "backend": settings.backend,
        "model_args": dict(settings.model_args),
        "batch_size": settings.batch_size,
        "limit": settings.limit,
        "dtype": settings.dtype,
        "num_fewshot": settings.num_fewshot,
        "apply_chat_template": settings.chat,
        "max_gen_toks": settings.max_gen_toks,
        "seed": settings.seed,
        "margin": margin,
    }


def check_settings(settings: EvalSettings) -> None:
    """Refuse settings that cannot work.

    Raises:
        EvaluationError: names the setting.
    """
    if not settings.tasks:
        raise EvaluationError("no tasks to evaluate", "name some with --tasks")
    if settings.backend not in _BACKENDS:
        raise EvaluationError(f"unknown backend {settings.backend!r}", nearest(settings.backend, _BACKENDS))
    for module in (_BACKENDS[settings.backend], "lm_eval"):
        if importlib.util.find_spec(module) is None:
            raise EvaluationError(f"{module} is not installed", f"pip install {module.replace('_', '-')}")
    reserved = sorted(_RESERVED & settings.model_args.keys())
    if reserved:
        raise EvaluationError(f"model arguments may not hold {', '.join(reserved)}", "moeprune sets it itself")
    if settings.batch_size < 1:
        raise EvaluationError("the batch size must be a positive number", "a fixed one, so that both models share it")
    _check_numbers(settings)
    if settings.launcher:
        launcher_command(settings.launcher)
    if settings.backend == "hf":
        _check_placement(settings)


def _check_numbers(settings: EvalSettings) -> None:
    if settings.limit is not None and settings.limit < 1:
        raise EvaluationError("the limit must be at least one document", "leave --limit out to run all of them")
    if settings.num_fewshot is not None and settings.num_fewshot < 0:
        raise EvaluationError("the number of few-shot examples cannot be negative", "0 gives none")
    if settings.max_gen_toks is not None and settings.max_gen_toks < 1:
        raise EvaluationError("an answer must be allowed at least one token", "check --max-gen-toks")
    if settings.seed < 0:
        raise EvaluationError(f"--seed must be at least 0, not {settings.seed}")


def launcher_command(launcher: str) -> list[str]:
    """The launcher's words, its program found also beside this Python where the shell would not look.

    Raises:
        EvaluationError: there is no such program.
    """
    beside = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    try:
        program, *words = shlex.split(launcher)
    except ValueError as error:
        raise EvaluationError(f"--launcher {launcher!r} is no command: {error}") from error
    found = shutil.which(program, path=beside)
    if found is None:
        raise EvaluationError(f"--launcher: there is no program {program!r}", "such as 'accelerate launch'")
    return [found, *words]


def context_length(settings: EvalSettings, config: Mapping[str, Any]) -> int | None:
    """Tokens that the model takes at once, by the arguments given or its ``config.json``; None where neither says.

    Looked for where lm-eval looks.
    """
    inner = config.get("text_config")
    known = [settings.model_args.get(name) for name in _LENGTHS]
    for part in (inner if isinstance(inner, Mapping) else {}, config):
        known += [part.get(name) for name in ("n_positions", "max_position_embeddings", "n_ctx")]
    return next((int(str(length)) for length in known if str(length).isdecimal()), None)


def _check_placement(settings: EvalSettings) -> None:
    import torch

    if settings.dtype != "auto" and not isinstance(getattr(torch, settings.dtype, None), torch.dtype):
        raise EvaluationError(f"unknown dtype {settings.dtype!r}", "auto, float32, bfloat16 or float16")
    if settings.device in {None, "auto"}:
        return
    try:
        wanted = torch.device(str(settings.device))
    except RuntimeError:
        raise EvaluationError(f"unknown device {settings.device!r}", "cpu, cuda, cuda:1 or auto") from None
    if wanted.type == "cuda" and (wanted.index or 0) >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise EvaluationError(f"--device {settings.device}: there are {count} CUDA devices", "use --device cpu")
