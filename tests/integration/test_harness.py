"""lm-eval runs of tiny models on local tasks, in this process and in others."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from moeprune.errors import ConfigError, EvaluationError
from moeprune.evaluation.backends import model_arguments
from moeprune.evaluation.compare import EvalReport, compare_folders
from moeprune.evaluation.harness import (
    EvalSettings,
    evaluate_pair,
    preflight,
    prepare,
    run_model,
)
from moeprune.evaluation.paired import INCONCLUSIVE

TASKS = ("tiny_choice", "tiny_write")


def make_model(folder: Path, seed: int) -> Path:
    """A random Qwen3-MoE of two layers with a byte-level tokenizer."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(["<eos>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = {"eos_token": "<eos>", "pad_token": "<eos>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    torch.manual_seed(seed)
    config = Qwen3MoeConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        intermediate_size=32,
        moe_intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        num_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=512,
        eos_token_id=0,
        pad_token_id=0,
    )
    Qwen3MoeForCausalLM(config).save_pretrained(folder)
    return folder


def write_tasks(folder: Path, documents: int = 24) -> Path:
    """A multiple-choice and a generation task, with data files named relative to the YAML, and a group of both."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [
        {"q": f"{i} + 1", "choices": ["ab", "cd", "efg"], "label": i % 3, "answer": str(i)} for i in range(documents)
    ]
    (folder / "data").mkdir()
    (folder / "data" / "docs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "_shared_yaml").write_text("dataset_path: json\nmetadata: {version: 1.0}\n")
    kwargs = "include: _shared_yaml\ndataset_kwargs: {data_files: {test: data/docs.jsonl}}\ntest_split: test\n"
    choice = (
        'output_type: multiple_choice\ndoc_to_text: "{{q}} ="\ndoc_to_choice: "{{choices}}"\ndoc_to_target: label\n'
    )
    metrics = "metric_list:\n  - {metric: acc, aggregation: mean, higher_is_better: true}\n"
    (folder / "choice.yaml").write_text(f"task: tiny_choice\n{kwargs}{choice}{metrics}")
    write = 'output_type: generate_until\ndoc_to_text: "{{q}} ="\ndoc_to_target: answer\n'
    until = 'generation_kwargs: {until: ["\\n"], do_sample: false, max_gen_toks: 3}\n'
    exact = "metric_list:\n  - {metric: exact_match, aggregation: mean, higher_is_better: true}\n"
    (folder / "write.yaml").write_text(f"task: tiny_write\n{kwargs}{write}{until}{exact}")
    (folder / "group.yaml").write_text("group: tiny_suite\ntask: [tiny_choice, tiny_write]\n")
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two random models of one shape."""
    folder = tmp_path_factory.mktemp("models")
    return make_model(folder / "one", 0), make_model(folder / "two", 1)


@pytest.fixture(scope="module")
def include(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of local tasks."""
    return write_tasks(tmp_path_factory.mktemp("include") / "tasks")


def settings_for(include: Path, **changes: Any) -> EvalSettings:
    """Settings for the local tasks on the CPU."""
    return EvalSettings(**{"tasks": TASKS, "include_path": include, "device": "cpu", **changes})


@pytest.fixture(scope="module")
def report(models: tuple[Path, Path], include: Path, tmp_path_factory: pytest.TempPathFactory) -> EvalReport:
    """The two models compared."""
    return evaluate_pair(*models, settings_for(include), tmp_path_factory.mktemp("pair"))


def test_two_models_give_one_row_per_task(report: EvalReport) -> None:
    """Every task appears once, on all its documents, with settings and versions recorded."""
    assert {row.task: row.n for row in report.tasks} == dict.fromkeys(TASKS, 24)
    assert {row.metric for row in report.tasks} == {"acc", "exact_match"}
    assert not report.partial
    assert report.settings["batch_size"] == 16
    assert "lm_eval_version" in report.settings
    assert [warning for warning in report.warnings if "cut at 3 tokens" not in warning] == []
    assert report.command["tasks"] == list(TASKS)


def test_equal_models_flip_nothing(models: tuple[Path, Path], include: Path, tmp_path: Path) -> None:
    """A model against itself has no flips, and still no claim that nothing was lost."""
    prints = {"base": "a", "pruned": "a"}
    found = evaluate_pair(models[0], models[0], settings_for(include), tmp_path, fingerprints=prints)
    assert all(row.flips == 0 and row.verdict == INCONCLUSIVE for row in found.tasks)
    assert found.inputs == prints
    assert any("same model" in warning for warning in found.warnings)


def test_limit_is_reported(models: tuple[Path, Path], include: Path, tmp_path: Path) -> None:
    """A limited run says how many documents it left out."""
    found = evaluate_pair(*models, settings_for(include, limit=5, tasks=("tiny_choice",)), tmp_path)
    assert (found.limit, found.partial, found.tasks[0].n, found.tasks[0].n_full) == (5, True, 5, 24)


def test_group_gives_its_tasks(models: tuple[Path, Path], include: Path, tmp_path: Path) -> None:
    """A group's name stands for the tasks in it."""
    found = evaluate_pair(*models, settings_for(include, limit=3, tasks=("tiny_suite",)), tmp_path)
    assert {row.task for row in found.tasks} == set(TASKS)


def test_subprocess_equals_in_process(models: tuple[Path, Path], include: Path, tmp_path: Path) -> None:
    """lm-eval's own command, one process per model, gives the same answers as the run in this process."""
    changes = {"tasks": ("tiny_choice",), "limit": 8}
    settings = settings_for(include, **changes)
    isolated = settings_for(include, **changes, isolated=True)
    with prepare(settings) as loaded:
        run_model(models[0], settings, tmp_path / "here", loaded=loaded)
        run_model(models[0], isolated, tmp_path / "there", loaded=loaded)
    [row] = compare_folders(tmp_path / "here", tmp_path / "there").tasks
    assert (row.n, row.flips, row.answers_changed) == (8, 0, 0)
    assert (tmp_path / "there" / "lm_eval.log").stat().st_size > 0


def test_failing_subprocess_shows_its_last_lines(include: Path, tmp_path: Path) -> None:
    """A crash in lm-eval's process is one error that quotes it."""
    settings = settings_for(include, isolated=True, tasks=("tiny_choice",))
    with pytest.raises(EvaluationError, match=r"(?s)lm-eval failed on .*Error"):
        run_model(tmp_path / "absent", settings, tmp_path / "out")


def test_loaded_model_is_evaluated_as_it_is(models: tuple[Path, Path], include: Path, tmp_path: Path) -> None:
    """A module in memory gives the answers of its folder, and stays in the mode it was in."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(models[0]).train()
    settings = settings_for(include, limit=8)
    with prepare(settings) as loaded:
        run_model((model, AutoTokenizer.from_pretrained(models[0])), settings, tmp_path / "object", loaded=loaded)
        run_model(models[0], settings, tmp_path / "folder", loaded=loaded)
    assert model.training
    assert all(row.flips == 0 for row in compare_folders(tmp_path / "object", tmp_path / "folder").tasks)


def test_model_that_cannot_load_is_one_error(models: tuple[Path, Path], include: Path, tmp_path: Path) -> None:
    """Cut weights, a missing chat template and an unknown model argument are errors that name the model."""
    cut = Path(shutil.copytree(models[0], tmp_path / "cut"))
    weights = cut / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    settings = settings_for(include, limit=2, tasks=("tiny_choice",))
    with pytest.raises(EvaluationError, match=r"could not evaluate .*cut: .*header"):
        run_model(cut, settings, tmp_path / "out")
    with pytest.raises(EvaluationError, match="template"):
        run_model(models[0], dataclasses.replace(settings, apply_chat_template=True), tmp_path / "out")
    with pytest.raises(EvaluationError, match="bogus"):
        run_model(models[0], dataclasses.replace(settings, model_args={"bogus": 1}), tmp_path / "out")


def test_stdout_and_stderr_stay_clean(
    models: tuple[Path, Path], include: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Results own stdout, and without a terminal lm-eval's bars and logs do not show either."""
    evaluate_pair(*models, settings_for(include, limit=2), tmp_path)
    assert capfd.readouterr() == ("", "")


def test_local_run_opens_no_connection(
    models: tuple[Path, Path], include: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Local tasks and local models never touch the network."""
    import datasets
    from huggingface_hub import constants

    attempts: list[object] = []

    def refuse(*address: object, **_: object) -> None:
        attempts.append(address)
        raise OSError("no network in this test")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    evaluate_pair(*models, settings_for(include, limit=2), tmp_path)
    assert attempts == []


def test_data_files_are_found_from_anywhere(include: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Data files named beside the YAML load from another working directory, and so does a relative task folder."""
    monkeypatch.chdir(tmp_path)
    preflight(settings_for(include))
    monkeypatch.chdir(include.parent)
    preflight(settings_for(Path("tasks")))


def test_changed_data_file_is_read_again(tmp_path: Path) -> None:
    """A data file that changed under the same name and time stamp gives its new documents."""
    folder = write_tasks(tmp_path / "tasks", documents=6)
    data = folder / "data" / "docs.jsonl"
    stamp = data.stat()
    settings = settings_for(folder, tasks=("tiny_choice",))
    with prepare(settings) as loaded:
        assert len(loaded.task_dict["tasks"]["tiny_choice"].eval_docs) == 6
    data.write_text(data.read_text().replace('"ab"', '"xy"'))
    os.utime(data, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    with prepare(settings) as loaded:
        assert loaded.task_dict["tasks"]["tiny_choice"].eval_docs[0]["choices"][0] == "xy"


def test_missing_data_file_is_named(tmp_path: Path) -> None:
    """A task whose data is gone is refused before any model is loaded."""
    folder = write_tasks(tmp_path / "tasks")
    (folder / "data" / "docs.jsonl").unlink()
    with pytest.raises(EvaluationError, match=r"2 tasks cannot run:(?s:.*)tiny_choice(?s:.*)docs\.jsonl"):
        preflight(settings_for(folder))


def test_missing_module_is_a_pip_command(tmp_path: Path) -> None:
    """A task whose helper needs a module that is not installed says how to get it."""
    folder = write_tasks(tmp_path / "tasks")
    (folder / "helper.py").write_text("import langdetect\ndef clean(docs):\n    return docs\n")
    with (folder / "choice.yaml").open("a") as handle:
        handle.write("process_docs: !function helper.clean\n")
    with pytest.raises(EvaluationError) as caught:
        preflight(settings_for(folder, tasks=("tiny_choice",)))
    assert "langdetect" in caught.value.message
    assert caught.value.hint == 'pip install "lm_eval[ifeval]"'


def test_perplexity_task_is_refused_early(tmp_path: Path) -> None:
    """A task without a score per document is refused before an hour of evaluation."""
    folder = write_tasks(tmp_path / "tasks")
    text = (folder / "choice.yaml").read_text().replace("multiple_choice", "loglikelihood_rolling")
    text = text.replace('doc_to_choice: "{{choices}}"\n', "").replace("metric: acc", "metric: word_perplexity")
    (folder / "choice.yaml").write_text(text.replace("doc_to_target: label", 'doc_to_target: "{{q}}"'))
    with pytest.raises(EvaluationError, match="only perplexities"):
        preflight(settings_for(folder, tasks=("tiny_choice",)))


def test_names_that_need_lm_evals_own_tasks(include: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A misspelt name is refused with its neighbours and a Hub task without a Hub with a remedy, all in one error."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))
    started = time.monotonic()
    with pytest.raises(EvaluationError) as caught:
        preflight(EvalSettings(tasks=("arc_esay", "arc_challenge")))
    assert "'arc_easy'" in str(caught.value)
    assert "hf download --repo-type dataset" in str(caught.value)
    assert time.monotonic() - started < 60


def test_unknown_local_names_are_refused(models: tuple[Path, Path], include: Path, tmp_path: Path) -> None:
    """Folders, backends and arguments that cannot work are refused before anything is loaded."""
    settings = settings_for(include)
    with pytest.raises(EvaluationError, match="not a checkpoint folder"):
        evaluate_pair(models[0], tmp_path, settings, tmp_path / "out")
    with pytest.raises(EvaluationError, match="vllm"):
        preflight(settings_for(include, backend="vlm"))
    with pytest.raises(EvaluationError, match="pretrained"):
        preflight(settings_for(include, model_args={"pretrained": "x"}))
    with pytest.raises(EvaluationError, match="does not exist"):
        preflight(settings_for(tmp_path / "nowhere"))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(ConfigError, match="not empty"):
        run_model(models[0], settings, tmp_path / "full")


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"device": "cpu"}, {"device": "cpu"}),
        ({"device": "cuda:1", "backend": "vllm"}, {"device": "cuda:1"}),
        ({"device": "auto", "backend": "vllm"}, {}),
        ({"device": None, "backend": "sglang"}, {}),
        ({"device": None}, {"device": "DEFAULT"}),
        ({"device": "auto"}, {"device": "DEFAULT"}),
    ],
)
def test_device_is_said_aloud(include: Path, changes: dict[str, Any], named: dict[str, str]) -> None:
    """lm-eval's hf backend takes CUDA for granted when it is told nothing; other backends place models themselves."""
    import torch

    if torch.cuda.device_count() > 1 and changes == {"device": "auto"}:
        named = {"parallelize": True}
    default = "cuda" if torch.cuda.is_available() else "cpu"
    expected = {key: default if value == "DEFAULT" else value for key, value in named.items()}
    found = model_arguments(Path("model"), settings_for(include, **changes), None)
    assert {key: found[key] for key in ("device", "parallelize") if key in found} == expected


def test_importing_loads_neither_torch_nor_lm_eval() -> None:
    """Every module of the package is cheap to import."""
    code = (
        "import sys, moeprune.evaluation.harness, moeprune.evaluation.report, moeprune.evaluation.agreement;"
        "print([m for m in ('torch', 'lm_eval', 'transformers', 'scipy', 'datasets') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
