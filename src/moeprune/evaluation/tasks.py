"""Finding and loading lm-eval's tasks, so that all that can go wrong goes wrong before a model is loaded."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moeprune.errors import EvaluationError, nearest
from moeprune.evaluation.generation import answer_limit
from moeprune.evaluation.presets import EXTRAS, PRESETS, PRIMARY_METRICS
from moeprune.evaluation.settings import EvalSettings

_LOCAL_LOADERS = {"json", "csv", "parquet", "arrow", "text", "pandas"}
_NAMED_EXTRA = re.compile(r"lm[-_]eval\[(\w+)\]")
_FIRST_METRICS = ("acc", "exact_match")


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedTasks:
    """Tasks with their documents, ready for any number of models.

    Attributes:
        task_dict: what lm-eval's ``evaluate`` takes.
        include_path: the staged copy of the user's task folder, for lm-eval in another process.
    """

    task_dict: dict[str, dict[str, Any]]
    include_path: Path | None

    def configure(self, settings: EvalSettings) -> None:
        """Set examples and answer lengths as lm-eval's own command does; a task that asks for no example keeps none."""
        for task in self.task_dict["tasks"].values():
            own = task.get_config("num_fewshot")
            if own is None or (settings.num_fewshot is not None and own != 0):
                task.set_config(key="num_fewshot", value=settings.num_fewshot or 0)
            task.set_fewshot_seed(seed=settings.seeds["fewshot_seed"])
            if settings.max_gen_toks is not None and task.OUTPUT_TYPE == "generate_until":
                task.set_config(key="generation_kwargs", value={"max_gen_toks": settings.max_gen_toks}, update=True)

    def outlook(self, settings: EvalSettings) -> list[TaskOutlook]:
        """What each task would ask, in order of their names."""
        self.configure(settings)
        return [_outlook(name, task, settings.limit) for name, task in sorted(self.task_dict["tasks"].items())]


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskOutlook:
    """What one task would ask of a model.

    Attributes:
        metric: the compared metric.
        n: documents that would be asked, out of ``n_full``.
        max_gen_toks: most tokens of an answer; None where nothing is generated.
    """

    task: str
    n_shot: int
    metric: str
    n: int
    n_full: int
    max_gen_toks: int | None


def _outlook(name: str, task: Any, limit: int | None) -> TaskOutlook:
    listed = [entry["metric"] for entry in task.get_config("metric_list") or []]
    metrics = [metric if isinstance(metric, str) else metric.__name__ for metric in listed]
    first = next((metric for metric in _FIRST_METRICS if metric in metrics), next(iter(metrics), ""))
    documents, generates = len(task.eval_docs), task.OUTPUT_TYPE == "generate_until"
    return TaskOutlook(
        task=name,
        n_shot=int(task.get_config("num_fewshot") or 0),
        metric=PRIMARY_METRICS.get(name, first),
        n=min(documents, limit or documents),
        n_full=documents,
        max_gen_toks=answer_limit(task.get_config("generation_kwargs")) if generates else None,
    )


def load_tasks(settings: EvalSettings, scratch: Path) -> LoadedTasks:
    """Resolve every name and load its documents.

    Args:
        settings: the tasks, groups or tags, where ``*`` matches several; the folder with the user's own task YAMLs,
            which is looked at first; and whether code that a model wrote may be run.
        scratch: empty folder that outlives the tasks.

    Raises:
        EvaluationError: names every task that cannot run, with cause and remedy.
    """
    staged = _stage(settings.include_path, scratch) if settings.include_path is not None else None
    manager = _manager(settings.tasks, staged)
    task_dict: dict[str, dict[str, Any]] = {"tasks": {}, "groups": {}, "group_map": {}}
    failures: list[tuple[str, str]] = []
    for name in settings.tasks:
        matches = manager.match_tasks([name])
        if not matches:
            failures.append((f"unknown task {name!r}", nearest(name, [*PRESETS, *manager.all_tasks])))
        for match in matches:
            failures += _load(manager, match, task_dict)
    for task in task_dict["tasks"].values():
        failures += _unsuited(task, settings)
    if failures:
        raise _error(failures)
    return LoadedTasks(task_dict=task_dict, include_path=staged)


def _load(manager: Any, name: str, task_dict: dict[str, dict[str, Any]]) -> list[tuple[str, str]]:
    """Load one name into ``task_dict``; what went wrong otherwise."""
    import datasets
    import jinja2
    import yaml

    try:
        loaded = manager.load([name])
    except (
        *(OSError, ValueError, LookupError, TypeError, AttributeError, ImportError, RuntimeError, AssertionError),
        *(datasets.exceptions.DatasetsError, jinja2.TemplateError, yaml.YAMLError),
    ) as error:  # a task is the user's own code and data: this is all that they can raise
        return [_explain(name, error)]
    for kind, items in loaded.items():
        task_dict[kind].update(items)
    return []


def _unsuited(task: Any, settings: EvalSettings) -> list[tuple[str, str]]:
    if task.OUTPUT_TYPE == "loglikelihood_rolling":
        return [(f"task {task.task_name!r} has only perplexities, no score per document to compare", "leave it out")]
    if getattr(task, "UNSAFE_CODE", False) and not settings.confirm_run_unsafe_code:
        remedy = "pass --confirm-run-unsafe-code where that can do no harm, such as in a container"
        return [(f"task {task.task_name!r} executes what the model writes", remedy)]
    if settings.model_args.get("enable_thinking") and task.OUTPUT_TYPE != "generate_until":
        return [(f"task {task.task_name!r} leaves no room for thinking", "evaluate it without enable_thinking")]
    return []


def _explain(name: str, error: Exception) -> tuple[str, str]:
    """Cause and remedy of a task that did not load."""
    text = next(iter(str(error).strip().splitlines()), type(error).__name__)
    extra = _NAMED_EXTRA.search(str(error)) if isinstance(error, ModuleNotFoundError) else None
    if extra:
        return f"task {name!r} needs an extra of lm-eval: {text}", f'pip install "lm_eval[{extra[1]}]"'
    if isinstance(error, ModuleNotFoundError) and error.name:
        top = error.name.split(".")[0]
        return f"task {name!r} needs the module {top}", f"pip install {_pip_name(top)}"
    if isinstance(error, ConnectionError) or "on the Hub" in text:
        remedy = (
            "run `hf download --repo-type dataset ID` where there is a network, or use local tasks (--include-path)"
        )
        return f"task {name!r}: its data set is not on this machine and the Hub cannot be reached: {text}", remedy
    return f"task {name!r} cannot be loaded: {type(error).__name__}: {text}", "see the traceback with -vv"


def _pip_name(module: str) -> str:
    return next((f'"lm_eval[{extra}]"' for extra, modules in EXTRAS.items() if module in modules), module)


def _error(failures: Sequence[tuple[str, str]]) -> EvaluationError:
    if len(failures) == 1:
        return EvaluationError(*failures[0])
    lines = "".join(f"\n  {cause} ({remedy})" for cause, remedy in failures)
    return EvaluationError(f"{len(failures)} tasks cannot run:{lines}")


# --- finding ----------------------------------------------------------------------------------------------------------


def _manager(names: Sequence[str], include_path: Path | None) -> Any:
    """A task manager that knows the names; lm-eval's own tasks take seconds to index and are often not needed."""
    from lm_eval.tasks import TaskManager

    if include_path is None:
        return _packaged_tasks()
    local = TaskManager(include_path=str(include_path), include_defaults=False)
    if all(_is_complete(local, name) for name in names):
        return local
    return TaskManager(include_path=str(include_path))


@functools.cache
def _packaged_tasks() -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager()


def _is_complete(manager: Any, name: str) -> bool:
    """Whether a name, and every member when it is a group, is known to this manager."""
    entry = manager.task_index.get(name)
    if entry is None:
        return bool(manager.match_tasks([name]))
    members = (entry.cfg or {}).get("task")
    if not isinstance(members, list):
        return True
    inner = (member if isinstance(member, str) else member.get("task", member.get("group")) for member in members)
    return all(isinstance(item, list) or _is_complete(manager, item) for item in inner)


# --- staging ----------------------------------------------------------------------------------------------------------


def _stage(include_path: Path, scratch: Path) -> Path:
    """Copy a task folder so that its relative data files are found from any working directory.

    The copy also gives local data a cache of its own: datasets' shared one knows a file by path and time of change
    only, and so could serve yesterday's documents.
    """
    if not include_path.is_dir():
        raise EvaluationError(f"the task folder {include_path} does not exist", "check --include-path")
    source = include_path.resolve()
    staged = scratch / "tasks"
    staged.mkdir()
    for file in sorted(source.rglob("*")):
        target = staged / file.relative_to(source)
        if file.name.endswith(("yaml", "yml")):  # lm-eval's habit is `_default_template_yaml`, without a dot
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(_with_absolute_paths(file, source, scratch / "data"), encoding="utf-8")
        elif file.suffix == ".py":
            target.parent.mkdir(parents=True, exist_ok=True)
            target.symlink_to(file)
    return staged


def _with_absolute_paths(file: Path, source: Path, cache: Path) -> str:
    """The YAML with its data files and outside includes made absolute; tags such as ``!function`` stay as they are."""
    import yaml

    text = file.read_text(encoding="utf-8")
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        raise EvaluationError(f"{file} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(root, yaml.MappingNode):
        return text
    entries = {key.value: value for key, value in root.value}
    for node in _scalars(entries.get("include")):
        outside = (file.parent / node.value).resolve()
        if not outside.is_relative_to(source):
            node.value = str(outside)
    keywords = entries.get("dataset_kwargs")
    if isinstance(keywords, yaml.MappingNode) and _make_local(keywords, entries.get("dataset_path"), file.parent):
        keywords.value.append((_text("cache_dir"), _text(str(cache))))
    return str(yaml.serialize(root, Dumper=yaml.SafeDumper, allow_unicode=True))


def _make_local(keywords: Any, dataset_path: Any, folder: Path) -> bool:
    """Make the data files absolute; whether the data set is local at all."""
    values = [value for key, value in keywords.value if key.value in {"data_files", "data_dir"}]
    nodes = [node for value in values for node in _scalars(value)]
    if dataset_path is None:  # the loader is named in a template: see whether the files are there
        is_local = any((folder / node.value).exists() for node in nodes)
    else:
        is_local = dataset_path.value in _LOCAL_LOADERS and not any("://" in node.value for node in nodes)
    for node in nodes if is_local else ():
        beside = folder / node.value
        # lm-eval itself looks in the working directory: tasks written for that keep working
        node.value = str(Path(node.value).absolute() if not beside.exists() and Path(node.value).exists() else beside)
    return is_local


def _text(value: str) -> Any:
    import yaml

    return yaml.ScalarNode(tag="tag:yaml.org,2002:str", value=value)


def _scalars(node: Any) -> Iterable[Any]:
    """Every scalar value under a YAML node, keys left out."""
    import yaml

    if isinstance(node, yaml.ScalarNode):
        yield node
    elif isinstance(node, yaml.SequenceNode):
        for item in node.value:
            yield from _scalars(item)
    elif isinstance(node, yaml.MappingNode):
        for _, value in node.value:
            yield from _scalars(value)
