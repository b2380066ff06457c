"""How to evaluate: the settings that both models share, and what can be wrong with them."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moeprune.errors import EvaluationError, nearest

_BACKENDS = {"hf": "transformers", "vllm": "vllm", "sglang": "sglang"}
_RESERVED = {"pretrained", "batch_size", "trust_remote_code"}


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
        seed: 0 gives lm-eval's own default seeds, and so its usual few-shot examples.
        isolated: run the hf backend in a process of its own per model too.
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
    apply_chat_template: bool = False
    trust_remote_code: bool = False
    seed: int = 0
    isolated: bool = False

    @property
    def in_process(self) -> bool:
        """Whether models run in this process."""
        return self.backend == "hf" and not self.isolated

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
        "apply_chat_template": settings.apply_chat_template,
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
    if settings.limit is not None and settings.limit < 1:
        raise EvaluationError("the limit must be at least one document", "leave --limit out to run all of them")
    if settings.num_fewshot is not None and settings.num_fewshot < 0:
        raise EvaluationError("the number of few-shot examples cannot be negative", "0 gives none")
    if settings.seed < 0:
        raise EvaluationError(f"--seed must be at least 0, not {settings.seed}")
    if settings.backend == "hf":
        _check_placement(settings)


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
