"""Presets, answers that are cut, groups that are one benchmark, and code that is not run: with real models."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from moeprune.cli import run
from moeprune.errors import EvaluationError
from moeprune.evaluation.compare import EvalReport
from moeprune.evaluation.generation import Answers, read_answers
from moeprune.evaluation.harness import evaluate_pair, preflight, prepare, run_model
from moeprune.evaluation.report import render_markdown, render_table
from moeprune.evaluation.settings import EvalSettings
from moeprune.pipeline import BUNDLED


@pytest.fixture(scope="module")
def model(speaker: Path) -> Path:
    """A random model that has a tokenizer."""
    return speaker / "model"


def settings_for(folder: Path, *tasks: str, **changes: Any) -> EvalSettings:
    """Settings for local tasks on the CPU."""
    return EvalSettings(tasks=tasks, include_path=folder, device="cpu", **changes)


def test_smoke_runs_from_its_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The bundled tasks run on any model without a word about where they are."""
    model = str(BUNDLED / "model")
    command = ["eval", model, model, "--eval", "smoke", "--limit", "2", "--device", "cpu", "--json", "--no-cache"]
    assert run([*command, "-o", str(tmp_path / "report")]) == 0
    report = json.loads(capsys.readouterr().out)
    assert {task["task"][:5] for task in report["tasks"]} == {"tiny_"}
    assert (len(report["tasks"]), report["command"]["limit"]) == (7, 2)


def test_dry_run_lists_what_would_be_asked(
    model: Path, questions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Tasks with documents, examples, metric, limit and detectable change; nothing is written."""
    output = tmp_path / "report"
    command = ["eval", str(model), str(model), "--tasks", "ask_both,ask_write", "--include-path", str(questions)]
    command += ["--limit", "5", "--num-fewshot", "2", "--max-gen-toks", "9", "-o", str(output), "--dry-run"]
    assert run([*command, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["written"] is False
    first, _, write = found["tasks"]
    assert {"task": "ask_first", "n_shot": 2, "metric": "acc", "n": 5, "n_full": 12}.items() <= first.items()
    assert (first["max_gen_toks"], write["max_gen_toks"]) == (None, 9)
    assert first["detectable"] == pytest.approx(39.6, abs=0.1)
    assert run(command) == 0
    assert "5 of 12" in capsys.readouterr().out
    assert not output.exists()


@pytest.fixture(scope="module")
def report(model: Path, questions: Path, tmp_path_factory: pytest.TempPathFactory) -> EvalReport:
    """A model and a copy with other weights, compared on all questions."""
    import torch
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("other")
    other = Path(shutil.copytree(model, folder / "other"))
    torch.manual_seed(1)
    changed = AutoModelForCausalLM.from_pretrained(other)
    with torch.no_grad():
        changed.lm_head.weight.normal_()
    for file in other.glob("*.safetensors*"):
        file.unlink()
    changed.save_pretrained(other)
    settings = settings_for(questions, "ask_both", "ask_write", max_gen_toks=40)
    return evaluate_pair(model, other, settings, folder / "report")


def test_a_group_scored_as_one_is_one_row(report: EvalReport, model: Path, questions: Path, tmp_path: Path) -> None:
    """Its documents are those of all its tasks, and its score is lm-eval's own for the group."""
    rows = {row.task: row for row in report.tasks}
    assert {name: row.n for name, row in rows.items()} == {"ask_both": 24, "ask_write": 12}
    with prepare(settings_for(questions, "ask_both")) as loaded:
        run_model(model, settings_for(questions, "ask_both"), tmp_path / "run", loaded=loaded)
    [file] = (tmp_path / "run").glob("results_*.json")
    assert rows["ask_both"].base == pytest.approx(json.loads(file.read_text())["groups"]["ask_both"]["acc,none"])


def test_a_group_that_weighs_its_tasks_stays_apart(model: Path, questions: Path, tmp_path: Path) -> None:
    """Where lm-eval's score is not the mean over documents, the tasks are rows of their own."""
    folder = Path(shutil.copytree(questions, tmp_path / "tasks"))
    short = (folder / "docs.jsonl").read_text().splitlines()[:7]
    (folder / "short.jsonl").write_text("\n".join(short))
    second = folder / "ask_second.yaml"
    second.write_text(second.read_text().replace("docs.jsonl", "short.jsonl"))
    group = folder / "ask_both.yaml"
    group.write_text(group.read_text().replace("weight_by_size: true", "weight_by_size: false"))
    found = evaluate_pair(model, model, settings_for(folder, "ask_both"), tmp_path / "report")
    assert {row.task: row.n for row in found.tasks} == {"ask_first": 12, "ask_second": 7}


def test_cut_answers_are_those_without_an_end(report: EvalReport, model: Path, questions: Path) -> None:
    """Each question generated alone, token by token: an answer is cut when neither a stop nor an end comes in time."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer, network = AutoTokenizer.from_pretrained(model), AutoModelForCausalLM.from_pretrained(model)
    cut = 0
    for line in (questions / "docs.jsonl").read_text().splitlines():
        tokens = tokenizer(json.loads(line)["q"], return_tensors="pt").input_ids
        begin, ended = tokens.shape[1], False
        while not ended and tokens.shape[1] < begin + 40:
            with torch.no_grad():
                following = network(tokens).logits[:, -1].argmax(dim=-1, keepdim=True)
            tokens = torch.cat([tokens, following], dim=1)
            ended = ";" in tokenizer.decode(tokens[0, begin:]) or int(following) == tokenizer.eos_token_id
        cut += not ended
    [row] = [row for row in report.tasks if row.task == "ask_write"]
    assert 0 < cut < 12
    assert (row.cut_base, row.max_gen_toks) == (cut, 40)
    assert all(row.cut_base is None for row in report.tasks if row.task != "ask_write")


def test_cut_answers_are_warned_about(report: EvalReport) -> None:
    """The warning has both counts and the limit, on the terminal and on the page, and the JSON keeps the numbers."""
    [row] = [row for row in report.tasks if row.task == "ask_write"]
    text = f"{row.cut_base} of 12 base and {row.cut_pruned} pruned answers were cut at 40 tokens"
    assert text in render_table(report)
    assert text in render_markdown(report)
    assert EvalReport.from_json(report.to_json()) == report


def test_counts_lie_beside_lm_evals_results(model: Path, questions: Path, tmp_path: Path) -> None:
    """The task's own limit holds where none is given; what is damaged is an error."""
    settings = settings_for(questions, "ask_write", "ask_first", limit=2)
    with prepare(settings) as loaded:
        run_model(model, settings, tmp_path / "run", loaded=loaded)
    [(task, found)] = read_answers(tmp_path / "run").items()
    assert (task, found) == ("ask_write", Answers(answers=2, cut=found.cut, limit=6, exact=True))
    assert read_answers(tmp_path) == {}
    (tmp_path / "run" / "generation.json").write_text("[1]")
    with pytest.raises(EvaluationError, match="cannot read"):
        read_answers(tmp_path / "run")


def test_unsafe_tasks_wait_for_consent(model: Path, questions: Path, tmp_path: Path) -> None:
    """A task that runs what models write is refused before anything runs, and runs when the user says so."""
    folder = Path(shutil.copytree(questions, tmp_path / "tasks"))
    task = folder / "ask_write.yaml"
    task.write_text(task.read_text() + "unsafe_code: true\n")
    settings = settings_for(folder, "ask_write", limit=2)
    with pytest.raises(EvaluationError, match="--confirm-run-unsafe-code"):
        preflight(settings)
    before = os.environ.get("HF_ALLOW_CODE_EVAL")
    agreed = dataclasses.replace(settings, confirm_run_unsafe_code=True)
    with prepare(agreed) as loaded:
        assert os.environ["HF_ALLOW_CODE_EVAL"] == "1"
        run_model(model, agreed, tmp_path / "run", loaded=loaded)
    assert os.environ.get("HF_ALLOW_CODE_EVAL") == before
    assert len(list((tmp_path / "run").glob("samples_*"))) == 1


def test_what_a_model_cannot_be_asked_is_refused(model: Path, questions: Path, tmp_path: Path) -> None:
    """A chat without a template, answers longer than the model, and thinking where there is no room for it."""
    chat = settings_for(questions, "ask_first", apply_chat_template=True)
    with pytest.raises(EvaluationError, match="no chat template"):
        preflight(chat, model)
    with pytest.raises(EvaluationError, match="leave no room for questions: model takes 128"):
        preflight(settings_for(questions, "ask_write", max_gen_toks=128), model)
    with pytest.raises(EvaluationError, match="no room for thinking"):
        preflight(settings_for(questions, "ask_first", model_args={"enable_thinking": True}))
    talking = Path(shutil.copytree(model, tmp_path / "model"))
    (talking / "chat_template.jinja").write_text("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}")
    assert [task.n for task in preflight(chat, talking)] == [12]
