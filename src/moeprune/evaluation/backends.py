"""Models in processes of their own, through lm-eval's own command: vllm, sglang, or hf under a launcher.

Each model has the machine to itself: when its process has ended, its memory is free, and a crash stays there. Both
models are given the same command, but for the folder of the model and of its results.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moeprune._files import note
from moeprune.errors import EvaluationError, first_line
from moeprune.evaluation.generation import DEFAULT_LIMIT, count_again, write_answers
from moeprune.evaluation.samples import samples_files
from moeprune.evaluation.settings import EvalSettings, launcher_command
from moeprune.runtime.loading import load, needs_loading

LOG = "lm_eval.log"
_GRACE = 10.0  # seconds to end in before a process is killed
_AN_ERROR = re.compile(r"(?:^|[\s:\]])((?:\w+\.)*\w*(?:Error|Exception|Interrupt)\b.*)")
# Launchers and engines end in an error that only says that one of their processes failed.
_HERALDS = ("ChildFailedError", "CalledProcessError", "Engine core initialization failed")
# Arguments of lm-eval's hf class that say how a model is loaded, and mean nothing for one that is loaded already.
_OF_LOADING = {
    *("peft", "delta", "autogptq", "gptqmodel", "gguf_file", "subfolder", "revision", "tp_plan"),
    *("max_memory_per_gpu", "max_cpu_memory", "offload_folder"),
}
_LINES = 200  # of the log's end, in which an error is looked for


def run_in_process_of_its_own(
    model: Path, settings: EvalSettings, output: Path, include_path: Path | None, tokenizer: Path | None
) -> None:
    """Evaluate one model by lm-eval's command; what it prints goes to ``lm_eval.log`` beside its results.

    Raises:
        EvaluationError: it failed; the message is its last error.
    """
    output.mkdir(parents=True, exist_ok=True)
    log = output / LOG
    status = _run(command(model, settings, output, include_path, tokenizer), settings, log)
    if status or not any(output.glob("results_*.json")):
        printed = log.read_text(errors="replace").partition("\n\n")[2]  # after the command
        error = f"lm-eval failed on {model}: {_last_error(printed, status)}"
        raise EvaluationError(error, f"all of its output is in {log}")
    _count_cut_answers(output, tokenizer or model, settings)


def _run(words: Sequence[str], settings: EvalSettings, log: Path) -> int:
    """Run a command and return its exit status; whatever ends this process's waiting ends the command too."""
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "HF_UPDATE_DOWNLOAD_COUNTS": "0"}
    if settings.confirm_run_unsafe_code:
        environment["HF_ALLOW_CODE_EVAL"] = "1"
    with log.open("wb") as handle:
        handle.write(f"{shlex.join(words)}\n\n".encode())
        handle.flush()
        started = subprocess.Popen(
            words,
            stdin=subprocess.DEVNULL,
            stdout=handle,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )
        try:
            return started.wait()
        except BaseException:
            _signal(started, signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                started.wait(timeout=_GRACE)
            raise
        finally:  # engines start processes of their own, which may outlive the first one
            _signal(started, signal.SIGKILL)
            started.wait()


def _signal(process: subprocess.Popen[bytes], sign: signal.Signals) -> None:
    """Send a signal to a process and to all that it started."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, sign)


def _last_error(printed: str, status: int) -> str:
    """The last line that names an error, or the last one at all."""
    if status < 0:
        return f"it was ended by {signal.Signals(-status).name}"
    lines = [line.strip() for line in printed.splitlines()[-_LINES:] if line.strip()]
    found = [match[1] for line in lines if (match := _AN_ERROR.search(line)) and not _is_herald(match[1])]
    return next(reversed(found), lines[-1] if lines else "it left no results")


def _is_herald(line: str) -> bool:
    return any(herald in line for herald in _HERALDS)


def _count_cut_answers(output: Path, tokenizer: Path, settings: EvalSettings) -> None:
    """Count them where transformers has the tokenizer; the engine may have another."""
    from transformers import AutoTokenizer

    folder = settings.model_args.get("tokenizer", tokenizer)
    try:
        loaded = AutoTokenizer.from_pretrained(folder, trust_remote_code=settings.trust_remote_code)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, ImportError, RuntimeError) as error:
        note(f"nobody counts which answers were cut: the tokenizer cannot be loaded: {first_line(error)}")
        return
    usual = int(settings.model_args.get("max_gen_toks", DEFAULT_LIMIT))
    write_answers(output, count_again(samples_files(output), loaded, usual))


# --- checkpoints that only moeprune runs as their plans say -----------------------------------------------------------


def check_runs_as_planned(model: Path, settings: EvalSettings) -> None:
    """Refuse to evaluate a model by what would load it and pass over its plan.

    Raises:
        EvaluationError: another process, or another engine, would run it.
    """
    if not needs_loading(model):
        return
    if not settings.in_process:
        raise EvaluationError(
            f"{model} runs as its plan says only where moeprune loads it, and {settings.backend} in a process of its "
            "own would pass over the plan",
            "leave out --model and --launcher, or evaluate the checkpoint that it was made from",
        )
    odd = sorted(_OF_LOADING & settings.model_args.keys())
    if odd:
        hint = "evaluate it without that"
        raise EvaluationError(f"{model} is loaded by moeprune, which has no model argument {odd[0]!r}", hint)


def load_planned(model: Path, settings: EvalSettings, tokenizer: Path | None) -> dict[str, Any]:
    """Arguments of lm-eval's hf class for a model that moeprune loads: what it does not know goes to transformers."""
    import inspect

    from lm_eval.models.huggingface import HFLM

    arguments = model_arguments(model, settings, tokenizer) | {"pretrained": model}
    whole = arguments.pop("parallelize", False)
    options = {"dtype": arguments.pop("dtype"), "device_map": "auto" if whole else arguments.pop("device")}
    for name in [name for name in arguments if name not in inspect.signature(HFLM).parameters]:
        options[name] = arguments.pop(name)
    own = load(arguments.pop("pretrained"), trust_remote_code=settings.trust_remote_code, **options)
    return {"tokenizer": str(model.absolute()), **arguments, "pretrained": own}


# --- the command ------------------------------------------------------------------------------------------------------


def command(
    model: Path, settings: EvalSettings, output: Path, include_path: Path | None, tokenizer: Path | None
) -> list[str]:
    """lm-eval's command for one model."""
    arguments = model_arguments(model, settings, tokenizer)
    options = {
        "--device": arguments.pop("device", None),  # its default would meet one in the model's arguments
        "--model": settings.backend,
        "--model_args": json.dumps(arguments),
        "--tasks": ",".join(settings.tasks),
        "--batch_size": settings.batch_size,
        "--output_path": output / "results.json",
        "--seed": ",".join(map(str, settings.seeds.values())),
        "--include_path": include_path,
        "--limit": settings.limit,
        "--num_fewshot": settings.num_fewshot,
        "--gen_kwargs": json.dumps({"max_gen_toks": settings.max_gen_toks}) if settings.max_gen_toks else None,
    }
    flags = {
        "--log_samples": True,
        "--apply_chat_template": settings.chat,
        "--trust_remote_code": settings.trust_remote_code,
        "--confirm_run_unsafe_code": settings.confirm_run_unsafe_code,
    }
    given = [str(part) for option in options.items() if option[1] is not None for part in option]
    start = launcher_command(settings.launcher) if settings.launcher else [sys.executable]
    return [*start, "-m", "lm_eval", "run", *given, *(flag for flag, is_set in flags.items() if is_set)]


def model_arguments(model: Path, settings: EvalSettings, tokenizer: Path | None) -> dict[str, Any]:
    """Arguments of lm-eval's model class, in this process or another."""
    # trust_remote_code is always said aloud: one of lm-eval's backends trusts by default
    arguments = {
        "pretrained": str(model.absolute()),
        "dtype": settings.dtype,
        "trust_remote_code": settings.trust_remote_code,
    }
    if tokenizer is not None:
        arguments["tokenizer_path" if settings.backend == "sglang" else "tokenizer"] = str(tokenizer.absolute())
    given = dict(settings.model_args)
    if settings.backend == "sglang":  # lm-eval's class would hand it on to the engine, which knows no such argument
        given.pop("enable_thinking", None)
    return {**arguments, **_placement(settings), **given}


def _placement(settings: EvalSettings) -> dict[str, Any]:
    """Where the model goes; lm-eval's hf backend takes CUDA for granted when it is told nothing."""
    import torch

    if settings.device not in {None, "auto"}:
        return {"device": settings.device}
    if settings.backend != "hf":
        return {}
    if settings.device == "auto" and torch.cuda.device_count() > 1:
        return {"parallelize": True}
    return {"device": "cuda" if torch.cuda.is_available() else "cpu"}
