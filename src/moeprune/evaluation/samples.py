"""Reading what ``lm_eval run --output_path DIR --log_samples`` leaves in a folder. Needs neither lm-eval nor torch."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from moeprune._files import sha256_bytes
from moeprune.errors import EvaluationError
from moeprune.evaluation.generation import Answers, add_answers, read_answers
from moeprune.evaluation.skip_rates import Skipped, add_skipped, read_skipped


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One document's scores, with hashes of everything that was asked; likelihoods in nats are those of the options."""

    hashes: Mapping[str, str]
    values: Mapping[str, float]
    choice: int | None
    finite: bool
    likelihoods: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskSamples:
    """One task's documents, by document and filter."""

    version: str
    n_shot: int
    n_full: int
    higher_is_better: Mapping[str, bool]
    samples: Mapping[tuple[int, str], Sample]  # by document and filter


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What one lm-eval run left in its folder.

    How generated answers ended, and what a gated model skipped, is known of runs that moeprune started.
    """

    results: Mapping[str, Any]
    tasks: Mapping[str, TaskSamples]
    fingerprint: str
    answers: Mapping[str, Answers] = field(default_factory=dict)
    skipped: Mapping[str, Skipped] = field(default_factory=dict)


def read_run(folder: Path) -> Run:
    """Read the one lm-eval run that a folder holds.

    Raises:
        EvaluationError: there is none, several, or one without samples.
    """
    path = _results_file(folder)
    try:
        results = json.loads(path.read_bytes())
        files = {name: _samples_file(path, name) for name in sorted(results["configs"])}
        texts = {name: file.read_bytes() for name, file in files.items()}
        tasks = {name: _read_task(results, name, text) for name, text in texts.items()}
    except (KeyError, TypeError, ValueError, OSError, RecursionError) as error:
        raise EvaluationError(f"cannot read the lm-eval run in {path.parent}: {error!r}") from error
    digest = sha256_bytes(*(part for name, text in texts.items() for part in (name.encode(), text)))
    answers, skipped = read_answers(path.parent), read_skipped(path.parent)
    return Run(results=results, tasks=tasks, fingerprint=digest, answers=answers, skipped=skipped)


def pooled(run: Run) -> Run:
    """The run with one task in the place of each group that lm-eval scores as one: the mean over all its documents.

    MMLU's 57 subjects are one benchmark, not 57.
    """
    tasks, answers, skipped = dict(run.tasks), dict(run.answers), dict(run.skipped)
    for group in sorted(run.results.get("groups", {}), key=lambda name: -len(_members(run, name))):
        members = [name for name in _members(run, group) if name in tasks]
        if len(members) > 1 and len(members) == len(_members(run, group)):
            whole = _pool(run, group, [tasks[name] for name in members])
            if _is_lm_evals_score(run, group, whole):
                counted = [answers.pop(name) for name in members if name in answers]
                tasks = {name: task for name, task in tasks.items() if name not in members} | {group: whole}
                answers |= {group: add_answers(counted)} if counted else {}
                seen = [skipped.pop(name) for name in members if name in skipped]
                skipped |= {group: add_skipped(seen)} if seen else {}
    return replace(run, tasks=tasks, answers=answers, skipped=skipped)


def _members(run: Run, group: str) -> list[str]:
    """The tasks at the ends of a group's branches."""
    inner = run.results["group_subtasks"].get(group, [])
    return sorted({task for name in inner for task in (_members(run, name) or [name])})


def _pool(run: Run, group: str, members: Sequence[TaskSamples]) -> TaskSamples:
    samples: dict[tuple[int, str], Sample] = {}
    before = 0
    for task in members:  # documents are numbered on from task to task
        samples |= {(before + number, name): sample for (number, name), sample in task.samples.items()}
        before += task.n_full
    return TaskSamples(
        version=str(run.results["versions"].get(group, "")),
        n_shot=members[0].n_shot,
        n_full=before,
        higher_is_better=members[0].higher_is_better,
        samples=samples,
    )


def _is_lm_evals_score(run: Run, group: str, whole: TaskSamples) -> bool:
    """Whether the pooled means are what lm-eval reports for the group: it may also weigh all tasks alike."""
    reported = {name: value for name, value in run.results["groups"][group].items() if "," in name}
    scores = {name: value for name, value in reported.items() if isinstance(value, float) and "_stderr," not in name}
    for name, score in scores.items():
        metric, _, filter_name = name.partition(",")
        values = [sample.values.get(metric, math.nan) for key, sample in whole.samples.items() if key[1] == filter_name]
        if not values or not math.isclose(sum(values) / len(values), score, abs_tol=1e-9):
            return False
    return bool(scores)


def samples_files(folder: Path) -> dict[str, Path]:
    """The sample file of each task of the one lm-eval run that a folder holds.

    Raises:
        EvaluationError: there is none, several, or one without samples.
    """
    path = _results_file(folder)
    return {name: _samples_file(path, name) for name in sorted(json.loads(path.read_bytes())["configs"])}


def _results_file(folder: Path) -> Path:
    found = sorted(folder.rglob("results_*.json"))
    if not found:
        raise EvaluationError(f"{folder} holds no lm-eval results", "run lm_eval with --output_path and --log_samples")
    if len(found) > 1:
        raise EvaluationError(f"{folder} holds {len(found)} lm-eval runs", "name a folder that holds a single run")
    return found[0]


def _samples_file(results: Path, task: str) -> Path:
    stamp = results.stem.removeprefix("results_")
    file = results.with_name(f"samples_{task}_{stamp}.jsonl")
    if not file.is_file():
        raise EvaluationError(f"{results.parent} has no samples of task {task!r}", "run lm_eval with --log_samples")
    return file


def _read_task(results: Mapping[str, Any], name: str, text: bytes) -> TaskSamples:
    is_choice = results["configs"][name].get("output_type") == "multiple_choice"
    samples: dict[tuple[int, str], Sample] = {}
    for line in text.splitlines():
        row = json.loads(line)
        key = (row["doc_id"], row["filter"])
        if key in samples:
            raise EvaluationError(f"task {name!r} has document {key[0]} twice", "use a fresh folder for every run")
        samples[key] = _read_sample(row, is_choice=is_choice)
    if not samples:
        raise EvaluationError(f"task {name!r} has no documents")
    return TaskSamples(
        version=str(results["versions"].get(name, "")),
        n_shot=int(results["n-shot"].get(name, 0)),
        n_full=int(results["n-samples"][name]["original"]),
        higher_is_better=results.get("higher_is_better", {}).get(name, {}),
        samples=samples,
    )


def _read_sample(row: Mapping[str, Any], *, is_choice: bool) -> Sample:
    # prompt_hash covers the first request only: a changed option shows in the hash of all requests
    requests = sha256_bytes(json.dumps(row["arguments"], sort_keys=True).encode())
    hashes = {"document": row["doc_hash"], "target": row["target_hash"], "prompt": row["prompt_hash"]}
    values = {name: float(row[name]) for name in row["metrics"] if isinstance(row.get(name), int | float)}
    choice, finite = None, True
    options: tuple[float, ...] = ()
    if is_choice:
        likelihoods = [float(response[0]) for response in row["filtered_resps"]]
        options = tuple(likelihoods[: len(likelihoods) // (2 if "acc_mutual_info" in row["metrics"] else 1)])
        choice = int(np.argmax(options))
        finite = not any(math.isnan(value) for value in likelihoods)
    hashes |= {"requests": requests}
    return Sample(hashes=hashes, values=values, choice=choice, finite=finite, likelihoods=options)
