"""The bridge to lm-eval: check the tasks before any model is loaded, run both models alike, compare their answers."""

from __future__ import annotations

import contextlib
import gc
import importlib
import logging
import os
import random
import shutil
import sys
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moeprune._files import begin_work, check_output_folder, parse_json, quiet
from moeprune.errors import EvaluationError
from moeprune.evaluation.backends import (
    check_runs_as_planned,
    load_planned,
    model_arguments,
    run_in_process_of_its_own,
)
from moeprune.evaluation.cache import through_cache
from moeprune.evaluation.compare import EvalReport, compare_folders
from moeprune.evaluation.generation import AnswerWatch, write_answers
from moeprune.evaluation.settings import EvalSettings, canonical_options, check_settings, context_length
from moeprune.evaluation.skip_rates import RateWatch, write_skipped
from moeprune.evaluation.tasks import LoadedTasks, TaskOutlook, load_tasks
from moeprune.runtime.loading import needs_loading

if TYPE_CHECKING:
    from torch import nn

    Model = Path | tuple[nn.Module, Any]

_SIDES = ("base", "pruned")
_CHATTY = ("lm_eval", "datasets", "transformers", "accelerate")


# --- the public stages ------------------------------------------------------------------------------------------------


def preflight(settings: EvalSettings, base: Path | None = None) -> list[TaskOutlook]:
    """Check everything that can be checked without a model: backend, task names, and that every task's data loads.

    Args:
        settings: what will be run and how.
        base: checkpoint folder of the original model, which must have a tokenizer.

    Returns:
        What each task would ask.

    Raises:
        EvaluationError: names every task that cannot run, with its cause and remedy.
    """
    if base is not None:
        _check_base(base, settings)
    with prepare(settings) as loaded:
        return loaded.outlook(settings)


@contextlib.contextmanager
def prepare(settings: EvalSettings) -> Iterator[LoadedTasks]:
    """Check as `preflight` does and keep the loaded tasks for the runs inside the block."""
    check_settings(settings)
    with tempfile.TemporaryDirectory(prefix="moeprune-tasks-") as scratch, _code_allowed(settings):
        with hushed(), _uncounted():
            loaded = load_tasks(settings, Path(scratch))
        yield loaded


def run_model(
    model: Model,
    settings: EvalSettings,
    output: Path,
    *,
    loaded: LoadedTasks | None = None,
    tokenizer: Path | None = None,
) -> None:
    """Evaluate one model and leave lm-eval's own results and samples in ``output``.

    Args:
        model: checkpoint folder, or a loaded module with its tokenizer (hf backend only; it is not moved or cast).
        settings: what to run and how.
        output: folder for the results; must be empty or absent.
        loaded: tasks from `prepare`, so that several models share them.
        tokenizer: folder with the tokenizer, for checkpoints without one.

    Raises:
        EvaluationError: the tasks cannot run, or the model failed on them.
    """
    if loaded is None:
        with prepare(settings) as own:
            return run_model(model, settings, output, loaded=own, tokenizer=tokenizer)
    check_output_folder(output, overwrite=False)
    if isinstance(model, Path):
        check_runs_as_planned(model, settings)
    if not settings.in_process:
        if not isinstance(model, Path):
            raise EvaluationError("a process of its own needs a checkpoint folder, not a loaded model")
        return run_in_process_of_its_own(model, settings, output, loaded.include_path, tokenizer)
    with hushed():
        return _run_in_process(model, settings, output, loaded, tokenizer)


def evaluate_pair(
    base: Path,
    pruned: Path,
    settings: EvalSettings,
    output: Path,
    *,
    margin: float = 1.0,
    overwrite: bool = False,
    fingerprints: Mapping[str, str] | None = None,
    cache: Path | None = None,
) -> EvalReport:
    """Evaluate both checkpoints alike and compare them document by document.

    Args:
        base: checkpoint folder of the original model.
        pruned: checkpoint folder of the pruned one; where it has no tokenizer, base's serves.
        settings: what to run and how.
        output: lm-eval's own results go to ``output/base`` and ``output/pruned``.
        margin: largest loss in points that still counts as immaterial.
        overwrite: replace what stands in those two folders.
        fingerprints: fingerprints of ``base`` and ``pruned``, for the report's envelope.
        cache: folder where base's results are kept, and taken from where nothing that decides them has changed.

    Raises:
        EvaluationError: a task or model cannot run; raised before any model is loaded wherever it can be known.
    """
    check_pair(base, pruned, settings, output, overwrite=overwrite)
    with prepare(settings) as loaded:
        begin_work()
        for label in _SIDES:
            shutil.rmtree(output / label, ignore_errors=True)
        measure = partial(run_model, base, settings, output / "base", loaded=loaded)
        if cache is None or needs_loading(base):  # then more decides than the cache knows of
            measure()
        else:
            through_cache(cache, base, settings, loaded, output / "base", measure)
        tokenizer = None if _has_tokenizer(pruned) else base
        run_model(pruned, settings, output / "pruned", loaded=loaded, tokenizer=tokenizer)
    command = canonical_options(settings, margin)
    return compare_folders(output / "base", output / "pruned", margin=margin, command=command, inputs=fingerprints)


# --- checks -----------------------------------------------------------------------------------------------------------


def check_pair(base: Path, pruned: Path, settings: EvalSettings, output: Path, *, overwrite: bool = False) -> None:
    """Check what can be checked of two models and of the place of their results, without loading anything.

    Raises:
        EvaluationError: a folder is no checkpoint, or cannot be asked as the settings say.
        ConfigError: there are results already.
    """
    for label, folder in zip(_SIDES, (base, pruned), strict=True):
        if not (folder / "config.json").is_file():
            raise EvaluationError(f"the {label} model {folder} is not a checkpoint folder", "it has no config.json")
        check_output_folder(output / label, overwrite=overwrite)
        check_runs_as_planned(folder, settings)
    _check_base(base, settings)


def _check_base(base: Path, settings: EvalSettings) -> None:
    """Refuse a model that has no tokenizer or chat template, or too little room for its answers."""
    own = "tokenizer" not in settings.model_args
    if own and not _has_tokenizer(base):
        raise EvaluationError(f"{base} has no tokenizer, which an evaluation needs", "add the tokenizer's files")
    if own and settings.chat and not settings.trust_remote_code and not _has_chat_template(base):
        hint = "pass --no-apply-chat-template to ask it as text"
        raise EvaluationError(f"{base} has no chat template, so it cannot be asked as a chat", hint)
    room = context_length(settings, parse_json((base / "config.json").read_bytes(), base / "config.json"))
    if room is not None and settings.max_gen_toks is not None and settings.max_gen_toks >= room:
        raise EvaluationError(
            f"answers of {settings.max_gen_toks:,} tokens leave no room for questions: {base.name} takes {room:,}",
            "pass a smaller --max-gen-toks",
        )


def _has_chat_template(folder: Path) -> bool:
    if any((folder / name).exists() for name in ("chat_template.jinja", "chat_template.json")):
        return True
    file = folder / "tokenizer_config.json"
    return file.is_file() and bool(parse_json(file.read_bytes(), file).get("chat_template"))


def _has_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model"))


@contextlib.contextmanager
def hushed() -> Iterator[None]:
    """Keep lm-eval and its friends off stdout, and off stderr too unless a person watches; errors still raise."""
    # their log handlers bind to stderr at import: import them before it is redirected
    for name in _CHATTY:
        importlib.import_module(name)
    watched = sys.stderr.isatty() and not quiet.get()
    levels = {name: logging.getLogger(name).level for name in _CHATTY}
    with contextlib.ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings(action="ignore"))
        nowhere = stack.enter_context(Path(os.devnull).open("w", encoding="utf-8"))
        stack.enter_context(contextlib.redirect_stdout(sys.stderr if watched else nowhere))
        stack.enter_context(contextlib.redirect_stderr(sys.stderr if watched else nowhere))
        try:
            for name in _CHATTY:
                logging.getLogger(name).setLevel(logging.CRITICAL)
            yield
        finally:
            for name, level in levels.items():
                logging.getLogger(name).setLevel(level)


@contextlib.contextmanager
def _uncounted() -> Iterator[None]:
    """Keep datasets from reporting every load over the network, local JSON files included: seconds per task offline."""
    import datasets

    before = datasets.config.HF_UPDATE_DOWNLOAD_COUNTS
    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False
    try:
        yield
    finally:
        datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = before


@contextlib.contextmanager
def _code_allowed(settings: EvalSettings) -> Iterator[None]:
    """Let the metric of code tasks run what models write, where the user said so; it asks for this variable."""
    name = "HF_ALLOW_CODE_EVAL"
    before = os.environ.get(name)
    if settings.confirm_run_unsafe_code:
        os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = before


# --- hf, in this process ----------------------------------------------------------------------------------------------


def _run_in_process(
    model: Model, settings: EvalSettings, output: Path, loaded: LoadedTasks, tokenizer: Path | None
) -> None:
    import jinja2
    import torch
    from safetensors import SafetensorError

    name = str(model) if isinstance(model, Path) else type(model[0]).__name__
    was_training = not isinstance(model, Path) and model[0].training
    try:
        lm = _load_model(model, settings, tokenizer)
        _evaluate(lm, name, settings, output, loaded)
    except (
        *(OSError, ValueError, LookupError, RuntimeError, TypeError, ImportError, AssertionError),
        *(SafetensorError, jinja2.TemplateError),
    ) as error:  # damaged weights, unknown model arguments, chat templates, memory: all that a model brings along
        raise EvaluationError(f"lm-eval could not evaluate {name}: {_first_line(error)}") from error
    finally:
        if not isinstance(model, Path):
            model[0].train(was_training)
        lm = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _load_model(model: Model, settings: EvalSettings, tokenizer: Path | None) -> Any:
    from lm_eval.models.huggingface import HFLM

    if not isinstance(model, Path):
        module, own_tokenizer = model
        return HFLM(pretrained=module, tokenizer=own_tokenizer, batch_size=settings.batch_size, **settings.model_args)
    if needs_loading(model):
        return HFLM(**load_planned(model, settings, tokenizer), batch_size=settings.batch_size)
    return HFLM(**model_arguments(model, settings, tokenizer), batch_size=settings.batch_size)


def _evaluate(lm: Any, name: str, settings: EvalSettings, output: Path, loaded: LoadedTasks) -> None:
    """What lm-eval's ``simple_evaluate`` does, less its seconds of probing the machine and its look-ups on the Hub."""
    from lm_eval.evaluator import evaluate
    from lm_eval.loggers import EvaluationTracker

    # with a .json suffix the tracker writes beside it, not into a sub-folder named after the model's whole path
    tracker = EvaluationTracker(output_path=str(output / "results.json"))
    chat = settings.chat
    tracker.general_config_tracker.log_experiment_args(
        model_source=settings.backend,
        model_args={"pretrained": name},
        system_instruction=None,
        chat_template=lm.chat_template(chat) if chat else None,
        fewshot_as_multiturn=chat,
    )
    _seed(settings)
    loaded.configure(settings)
    watch, rates = AnswerWatch(lm), RateWatch(lm)
    with rates.watching():
        results = evaluate(
            lm=lm,
            task_dict=loaded.task_dict,
            limit=settings.limit,
            bootstrap_iters=0,  # its unpaired standard errors are of no use to a paired comparison
            log_samples=True,
            apply_chat_template=chat,
            fewshot_as_multiturn=chat,
            confirm_run_unsafe_code=settings.confirm_run_unsafe_code,
        )
    write_skipped(output, rates.count())
    samples = results.pop("samples")
    write_answers(output, watch.count(samples))
    results.update(_provenance(lm, settings))
    tracker.save_results_aggregated(results=results, samples=samples)
    for task in results["configs"]:
        tracker.save_results_samples(task_name=task, samples=samples[task])
    if len(list(output.glob("samples_*.jsonl"))) < len(results["configs"]):  # the tracker only logs what went wrong
        raise EvaluationError(f"lm-eval could not save its results in {output}", "is there space on the disk?")


def _provenance(lm: Any, settings: EvalSettings) -> dict[str, Any]:
    import lm_eval
    import transformers

    config = {
        "model": settings.backend,
        "model_args": dict(settings.model_args),
        "model_dtype": str(lm.model.dtype),
        "batch_size": settings.batch_size,
        "limit": settings.limit,
        **settings.seeds,
    }
    return {
        "config": config,
        "lm_eval_version": lm_eval.__version__,
        "transformers_version": transformers.__version__,
    }


def _seed(settings: EvalSettings) -> None:
    import numpy as np
    import torch

    random.seed(settings.seeds["random_seed"])
    np.random.seed(settings.seeds["numpy_seed"])  # noqa: NPY002 - tasks may draw from the global generator
    torch.manual_seed(settings.seeds["torch_seed"])


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
