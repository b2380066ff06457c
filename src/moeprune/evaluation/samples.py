"""Reading what ``lm_eval run --output_path DIR --log_samples`` leaves in a folder. Needs neither lm-eval nor torch."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moeprune._files import sha256_bytes
from moeprune.errors import EvaluationError


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One document's scores, with hashes of everything that was asked."""

    hashes: Mapping[str, str]
    values: Mapping[str, float]
    choice: int | None
    finite: bool


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
    """What one lm-eval run left in its folder."""

    results: Mapping[str, Any]
    tasks: Mapping[str, TaskSamples]
    fingerprint: str


def read_run(folder: Path) -> Run:
    """Read the one lm-eval run that a folder holds.

    Raises:
        EvaluationError: there is none, several, or one without samples.
    """
    found = sorted(folder.rglob("results_*.json"))
    if not found:
        raise EvaluationError(f"{folder} holds no lm-eval results", "run lm_eval with --output_path and --log_samples")
    if len(found) > 1:
        raise EvaluationError(f"{folder} holds {len(found)} lm-eval runs", "name a folder that holds a single run")
    [path] = found
    try:
        results = json.loads(path.read_bytes())
        files = {name: _samples_file(path, name) for name in sorted(results["configs"])}
        texts = {name: file.read_bytes() for name, file in files.items()}
        tasks = {name: _read_task(results, name, text) for name, text in texts.items()}
    except (KeyError, TypeError, ValueError, OSError, RecursionError) as error:
        raise EvaluationError(f"cannot read the lm-eval run in {path.parent}: {error!r}") from error
    digest = sha256_bytes(*(part for name, text in texts.items() for part in (name.encode(), text)))
    return Run(results=results, tasks=tasks, fingerprint=digest)


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
    if is_choice:
        likelihoods = [float(response[0]) for response in row["filtered_resps"]]
        options = len(likelihoods) // (2 if "acc_mutual_info" in row["metrics"] else 1)
        choice = int(np.argmax(likelihoods[:options]))
        finite = not any(math.isnan(value) for value in likelihoods)
    return Sample(hashes={**hashes, "requests": requests}, values=values, choice=choice, finite=finite)
