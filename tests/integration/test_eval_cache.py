"""Kept results of a base model: used again when nothing has changed, and never when anything has."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import moeprune
from moeprune.evaluation import cache as cache_module
from moeprune.evaluation.cache import ENTRY, UnknownInfluence, cache_folder, gather, through_cache
from moeprune.evaluation.harness import prepare
from moeprune.evaluation.settings import EvalSettings


@pytest.fixture
def model(speaker: Path, tmp_path: Path) -> Path:
    """A model of this test's own."""
    return Path(shutil.copytree(speaker / "model", tmp_path / "model"))


@pytest.fixture
def tasks(questions: Path, tmp_path: Path) -> Path:
    """A task folder of this test's own."""
    return Path(shutil.copytree(questions, tmp_path / "tasks"))


def settings_for(folder: Path, /, **changes: Any) -> EvalSettings:
    """Settings with examples before each question, so that these count as well."""
    given = {"tasks": ("ask_first", "ask_write"), "include_path": folder, "device": "cpu", "num_fewshot": 1}
    return EvalSettings(**given | changes)


class Runs:
    """Stands for the evaluation of a model: counts how often it is asked for."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.folder, self.model, self.count = folder, model, 0

    def ask(self, settings: EvalSettings, *, during: Callable[[], object] = lambda: None) -> Path:
        """Results of the model, from the cache or measured."""
        output = self.folder / f"output-{len(list(self.folder.glob('output-*')))}"

        def run() -> None:
            self.count += 1
            output.mkdir()
            (output / "results_1.json").write_text(json.dumps({"run": self.count}))
            (output / "samples.jsonl").write_text("{}\n")
            during()

        with prepare(settings) as loaded:
            through_cache(self.folder / "cache", self.model, settings, loaded, output, run)
        return output


@pytest.fixture
def runs(tmp_path: Path, model: Path) -> Runs:
    """Nothing is kept yet."""
    return Runs(tmp_path, model)


def flip_byte(file: Path, position: int) -> None:
    """Change one byte and nothing else: the size and the time of change stay."""
    before = file.stat()
    content = bytearray(file.read_bytes())
    content[position] ^= 1
    file.write_bytes(content)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert file.stat().st_mtime_ns == before.st_mtime_ns


def test_results_are_used_again(runs: Runs, tasks: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The second time nothing is run, a note says so, and the files are the same."""
    first, second = runs.ask(settings_for(tasks)), runs.ask(settings_for(tasks))
    assert runs.count == 1
    assert "an earlier run" in capsys.readouterr().err
    assert {file.name: file.read_bytes() for file in first.iterdir()} == {
        file.name: file.read_bytes() for file in second.iterdir()
    }


def test_any_byte_of_the_weights_counts(runs: Runs, tasks: Path) -> None:
    """Where the fingerprint does not look, in the header, at the front, in the middle and at the end."""
    runs.ask(settings_for(tasks))
    [weights, *_] = sorted(runs.model.glob("*.safetensors"))
    size = weights.stat().st_size
    places = [9, size // 3, size // 2, size - 1]
    for times, place in enumerate(places, start=2):
        flip_byte(weights, place)
        runs.ask(settings_for(tasks))
        assert runs.count == times


@pytest.mark.parametrize(
    "name", ["tokenizer.json", "tokenizer_config.json", "generation_config.json", "config.json", "chat_template.jinja"]
)
def test_any_other_file_of_the_model_counts(name: str, runs: Runs, tasks: Path) -> None:
    """A byte of a file changed, or a file added, and the model is evaluated again."""
    file = runs.model / name
    existed = file.exists()
    runs.ask(settings_for(tasks))
    if existed:
        flip_byte(file, file.stat().st_size // 2)
    else:
        file.write_text("{{ messages }}")
    runs.ask(settings_for(tasks))
    assert runs.count == 2
    if not existed:
        file.unlink()
        runs.ask(settings_for(tasks))
        assert runs.count == 2, "what was kept first holds again"


@pytest.mark.parametrize("change", ["document", "example", "prompt", "helper"])
def test_any_file_of_the_tasks_counts(change: str, runs: Runs, tasks: Path) -> None:
    """Documents, few-shot examples, the task's description and its code."""
    (tasks / "helper.py").write_text("def clean(docs):\n    return docs\n")
    (tasks / "examples.jsonl").write_bytes((tasks / "docs.jsonl").read_bytes())
    for file in tasks.glob("ask_*.yaml"):
        text = file.read_text().replace("dev: docs.jsonl", "dev: examples.jsonl")
        file.write_text(text if "group:" in text else f"{text}process_docs: !function helper.clean\n")
    runs.ask(settings_for(tasks))
    file, old, new = {
        "document": ("docs.jsonl", '"11 + 1 ="', '"11 + 2 ="'),
        "example": ("examples.jsonl", '"11 + 1 ="', '"11 + 2 ="'),
        "prompt": ("ask_first.yaml", "{{q}}", "Q{{q}}"),
        "helper": ("helper.py", "return docs", "return  docs"),
    }[change]
    before = (tasks / file).read_text()
    assert old in before
    (tasks / file).write_text(before.replace(old, new))
    runs.ask(settings_for(tasks))
    assert runs.count == 2


def test_documents_from_elsewhere_count(runs: Runs, tasks: Path, tmp_path: Path) -> None:
    """Data outside the task folder is part of what decides: the documents are, as they were read."""
    outside = tmp_path / "outside.jsonl"
    outside.write_bytes((tasks / "docs.jsonl").read_bytes())
    for file in tasks.glob("ask_*.yaml"):
        file.write_text(file.read_text().replace("docs.jsonl", str(outside)))
    runs.ask(settings_for(tasks))
    outside.write_text(outside.read_text().replace('"11 + 1 ="', '"11 + 3 ="'))
    runs.ask(settings_for(tasks))
    assert runs.count == 2


@pytest.mark.parametrize(
    "changes",
    [
        {"tasks": ("ask_write", "ask_first")},
        {"tasks": ("ask_first",)},
        {"model_args": {"max_length": 64}},
        {"batch_size": 8},
        {"limit": 5},
        {"dtype": "bfloat16"},
        {"num_fewshot": 0},
        {"apply_chat_template": False},
        {"max_gen_toks": 3},
        {"seed": 1},
        {"isolated": True},
    ],
)
def test_any_setting_counts(changes: dict[str, Any], runs: Runs, tasks: Path) -> None:
    """Every setting, the order of the tasks included: it decides what is computed together."""
    runs.ask(settings_for(tasks))
    runs.ask(settings_for(tasks, **changes))
    assert runs.count == 2


def test_every_setting_is_known_to_the_test_above() -> None:
    """A setting that comes later has to be thought about here."""
    fields = {field.name for field in dataclasses.fields(EvalSettings)}
    tested = {"tasks", "model_args", "batch_size", "limit", "dtype", "num_fewshot", "apply_chat_template"}
    tested |= {"max_gen_toks", "seed", "isolated"}
    elsewhere = {"include_path", "backend", "device", "trust_remote_code", "launcher", "confirm_run_unsafe_code"}
    assert fields == tested | elsewhere


def test_versions_source_and_surroundings_count(runs: Runs, tasks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another version of any package, another line of source, another device, thread count or variable."""
    runs.ask(settings_for(tasks))
    installed = list(cache_module.distributions())
    newer = SimpleNamespace(metadata={"Name": "numpy"}, version="99", read_text=lambda _: None)
    with monkeypatch.context() as patch:
        patch.setattr(cache_module, "distributions", lambda: [*installed, newer])
        runs.ask(settings_for(tasks))
    with monkeypatch.context() as patch:
        patch.setattr(cache_module, "_source_digest", lambda _: "other")
        runs.ask(settings_for(tasks))
    for name in ("_machine", "_environment"):
        with monkeypatch.context() as patch:
            known = getattr(cache_module, name)
            patch.setattr(cache_module, name, lambda *given, known=known: known(*given) | {"threads": "77"})
            runs.ask(settings_for(tasks))
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "1")
    runs.ask(settings_for(tasks))
    assert runs.count == 6
    monkeypatch.delenv("NVIDIA_TF32_OVERRIDE")
    runs.ask(settings_for(tasks))
    assert runs.count == 6, "what was kept first holds again"


def test_source_digest_sees_every_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A changed line in any Python file of a package changes its digest."""
    package = tmp_path / "a_package_of_this_test"
    (package / "inner").mkdir(parents=True)
    for place in (package, package / "inner"):
        (place / "__init__.py").write_text("ONE = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    before = cache_module._source_digest(package.name)
    (package / "inner" / "__init__.py").write_text("ONE = 2\n")
    assert cache_module._source_digest(package.name) != before


@pytest.mark.parametrize("damage", ["byte", "missing", "record", "facts"])
def test_a_damaged_entry_is_made_again(
    damage: str, runs: Runs, tasks: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A flipped byte, a file that is gone, half a record, or a record of other facts: a note, and a run."""
    runs.ask(settings_for(tasks))
    [entry] = (runs.folder / "cache").iterdir()
    record = entry / ENTRY
    if damage == "byte":
        flip_byte(entry / "samples.jsonl", 0)
    elif damage == "missing":
        (entry / "samples.jsonl").unlink()
    elif damage == "record":
        record.write_text(record.read_text()[:100])
    else:
        record.write_text(record.read_text().replace('"batch_size": 16', '"batch_size": 32'))
    output = runs.ask(settings_for(tasks))
    assert runs.count == 2
    assert "damaged" in capsys.readouterr().err
    assert sorted(file.name for file in output.iterdir()) == ["results_1.json", "samples.jsonl"]
    runs.ask(settings_for(tasks))
    assert runs.count == 2


def test_nothing_is_kept_of_files_that_changed_meanwhile(
    runs: Runs, tasks: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A file that was written during the run, even back to what it was, leaves no entry."""
    config = runs.model / "generation_config.json"
    content = config.read_bytes()
    runs.ask(settings_for(tasks), during=lambda: config.write_bytes(content))
    assert "changed while" in capsys.readouterr().err
    runs.ask(settings_for(tasks), during=lambda: (runs.model / "added.json").write_text("{}"))
    (runs.model / "added.json").unlink()
    runs.ask(settings_for(tasks))
    assert runs.count == 3


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"trust_remote_code": True}, "code that comes with a model"),
        ({"launcher": "python"}, "launcher"),
        ({"model_args": {"tokenizer": "gpt2"}}, "tokenizer may name files"),
        ({"model_args": {"chat_template_args": {"path": "x"}}}, "path may name files"),
        ({"model_args": {"attn_implementation": "some/kernels"}}, "attn_implementation may name files"),
    ],
)
def test_what_cannot_be_read_is_not_kept(
    changes: dict[str, Any], reason: str, runs: Runs, tasks: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where something unknown decides, the model is evaluated each time, and a note says why."""
    for _ in range(2):
        runs.ask(settings_for(tasks, **changes))
    assert runs.count == 2
    assert reason in capsys.readouterr().err


def test_a_file_that_cannot_be_read_is_not_an_error(
    runs: Runs, tasks: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A link to nowhere in the model's folder keeps nothing from being evaluated."""
    (runs.model / "notes.txt").symlink_to(runs.model / "gone.txt")
    runs.ask(settings_for(tasks))
    assert runs.count == 1
    assert "not cached" in capsys.readouterr().err


def test_a_library_that_is_being_edited_is_not_trusted(
    runs: Runs, tasks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its code changes under one version."""
    edited = SimpleNamespace(
        metadata={"Name": "transformers"}, version="5", read_text=lambda _: '{"dir_info": {"editable": true}}'
    )
    monkeypatch.setattr(cache_module, "distributions", lambda: [edited])
    settings = settings_for(tasks)
    with prepare(settings) as loaded, pytest.raises(UnknownInfluence, match="transformers is installed to be edited"):
        gather(runs.model, settings, loaded)


def test_a_link_to_a_folder_is_not_followed(runs: Runs, tasks: Path, tmp_path: Path) -> None:
    """What lies behind it might change unseen."""
    (runs.model / "more").symlink_to(tmp_path)
    settings = settings_for(tasks)
    with prepare(settings) as loaded, pytest.raises(UnknownInfluence, match="links to folders"):
        gather(runs.model, settings, loaded)


def test_a_cache_that_cannot_be_written_is_no_error(
    runs: Runs, tasks: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The results are there all the same."""
    (runs.folder / "cache").write_text("a file")
    assert (runs.ask(settings_for(tasks)) / "results_1.json").is_file()
    assert "could not be kept" in capsys.readouterr().err


def test_where_results_are_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The variable, the user's cache folder, a folder that is named, or nowhere."""
    monkeypatch.setenv("MOEPRUNE_CACHE", str(tmp_path))
    assert (cache_folder(None), cache_folder(False), cache_folder("there")) == (tmp_path, None, Path("there"))
    monkeypatch.delenv("MOEPRUNE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder(None) == tmp_path / "moeprune" / "results"


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the models that are loaded."""
    from moeprune.evaluation import harness

    seen: list[str] = []
    load = harness._load_model
    monkeypatch.setattr(harness, "_load_model", lambda model, *rest: seen.append(model.name) or load(model, *rest))
    return seen


def test_base_is_measured_once_for_many_pruned_models(
    runs: Runs, tasks: Path, tmp_path: Path, loads: list[str]
) -> None:
    """The reports of runs with and without kept results are the same, byte for byte."""
    pruned = Path(shutil.copytree(runs.model, tmp_path / "pruned"))
    options: dict[str, Any] = {
        "tasks": "ask_first",
        "include_path": tasks,
        "device": "cpu",
        "cache": tmp_path / "cache",
    }
    reports = [moeprune.evaluate(runs.model, pruned, output=tmp_path / f"report-{i}", **options) for i in range(2)]
    assert loads == ["model", "pruned", "pruned"]
    assert reports[0].to_json() == reports[1].to_json()
    moeprune.evaluate(runs.model, pruned, output=tmp_path / "again", **options | {"cache": False})
    assert loads[3:] == ["model", "pruned"]
