"""Presets and primary metrics against the tasks of the installed lm-eval."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import lm_eval
import pytest

from moeprune.evaluation.presets import PRESETS, PRIMARY_METRICS

TASKS = Path(lm_eval.__file__).parent / "tasks"
FOLDERS = (
    *("arc", "hellaswag", "winogrande", "piqa", "super_glue", "openbookqa", "glue", "mmlu", "mmlu_pro"),
    *("gsm8k", "minerva_math", "humaneval", "mbpp", "ifeval", "gpqa", "aime"),
)
MULTIPLE = {name: preset for name, preset in PRESETS.items() if not preset.bundled}
ASKED = [(name, task) for name, preset in MULTIPLE.items() for task in preset.tasks]


@cache
def manager() -> Any:
    """Tasks of the folders that the presets use: all of lm-eval's take long to find."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=[str(TASKS / folder) for folder in FOLDERS], include_defaults=False)


def leaves(name: str) -> list[dict[str, Any]]:
    """The configuration of a task, or of all tasks of a group; functions by name."""
    from lm_eval.tasks._yaml_loader import load_yaml

    entry = manager().task_index[name]
    config = load_yaml(entry.yaml_path, resolve_func=False)
    if entry.kind.name != "GROUP":
        return [config]
    members = config["task"]
    tagged = [known for known, other in manager().task_index.items() if set(members) & other.tags]
    return [leaf for member in [*members, *tagged] if member in manager().task_index for leaf in leaves_or_tag(member)]


def leaves_or_tag(name: str) -> list[dict[str, Any]]:
    """As `leaves`; a tag has no configuration of its own."""
    return [] if manager().task_index[name].kind.name == "TAG" else leaves(name)


def metrics(config: dict[str, Any]) -> set[str]:
    """Names under which a task's scores are found, with and without the filter."""
    filters = [entry["name"] for entry in config.get("filter_list") or [{"name": "none"}]]
    names = [entry["metric"].rpartition(".")[2] for entry in config["metric_list"]]
    names += ["pass@1"] if any(entry.get("k") == [1] for entry in config["metric_list"]) else []
    return {*names, *(f"{name},{filter_name}" for name in names for filter_name in filters)}


@pytest.mark.parametrize(("preset", "task"), ASKED)
def test_a_presets_task_is_lm_evals(preset: str, task: str) -> None:
    """The task exists, has the examples that the preset says, and generates, or runs code, where it says so."""
    found = leaves(task)
    assert found
    shots = PRESETS[preset].tasks[task]
    for config in found:
        assert (config.get("num_fewshot") or 0) == shots
        assert (config["output_type"] == "generate_until") == (PRESETS[preset].max_gen_toks is not None)
        assert bool(config.get("unsafe_code")) == PRESETS[preset].unsafe


@pytest.mark.parametrize("task", PRIMARY_METRICS)
def test_a_primary_metric_is_lm_evals(task: str) -> None:
    """The metric, and the filter where one is named, are among the task's own."""
    assert all(PRIMARY_METRICS[task] in metrics(config) for config in leaves(task))


@pytest.mark.parametrize(("preset", "task"), ASKED)
def test_no_preset_allows_less_than_the_task_itself(preset: str, task: str) -> None:
    """A preset never cuts answers earlier than lm-eval's own limit would."""
    for config in leaves(task):
        own = (config.get("generation_kwargs") or {}).get("max_gen_toks", 0)
        assert (PRESETS[preset].max_gen_toks or 0) >= own


def test_no_preset_hides_a_task() -> None:
    """None of the presets' names is one of a task of lm-eval that they use."""
    assert not PRESETS.keys() & manager().task_index.keys()
