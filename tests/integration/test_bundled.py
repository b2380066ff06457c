"""The three trained models, their tasks and texts, and what a user runs first."""

from __future__ import annotations

import copy
import json
import runpy
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import moeprune
from moeprune import cli
from moeprune.evaluation.agreement import TokenLosses, perplexity_ratio, token_losses
from moeprune.evaluation.harness import prepare, run_model
from moeprune.evaluation.settings import EvalSettings
from moeprune.pipeline import BUNDLED
from moeprune.strategies import DEFAULT

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
MODELS = {
    "qwen3_moe": BUNDLED / "model",
    "glm4_moe": ROOT / "tests" / "fixtures" / "glm4_moe",
    "deepseek_v3": ROOT / "tests" / "fixtures" / "deepseek_v3",
}


def read_lines(file: Path) -> list[dict[str, Any]]:
    """Rows of a JSONL file."""
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


# --- models ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", MODELS)
def test_models_are_small_and_of_their_family(family: str) -> None:
    """Each is at most 5 MB of bf16, of the architecture it stands for, with a config like the public ones."""
    checkpoint = moeprune.open_checkpoint(MODELS[family])
    assert checkpoint.spec.model_type == family
    assert sum(file.stat().st_size for file in MODELS[family].iterdir()) <= 5_000_000
    dtypes = {name: entry.dtype for name, entry in checkpoint.tensors.items()}
    assert {dtype for name, dtype in dtypes.items() if "e_score_correction_bias" not in name} == {"BF16"}
    assert {dtype for name, dtype in dtypes.items() if "e_score_correction_bias" in name} <= {"F32"}
    assert "rope_theta" in checkpoint.config
    assert "num_local_experts" not in checkpoint.config


def test_the_families_differ_where_it_matters() -> None:
    """Shared experts, a dense first layer, correction bias, groups: each is there in the model that stands for it."""
    qwen, glm, deepseek = (moeprune.open_checkpoint(folder) for folder in MODELS.values())
    assert (qwen.n_group, glm.n_group, deepseek.n_group) == (1, 1, 4)
    for checkpoint in (glm, deepseek):
        assert 0 not in checkpoint.moe_layers
        assert any("shared_experts" in name for name in checkpoint.tensors)
        assert any("e_score_correction_bias" in name for name in checkpoint.tensors)
    assert any("kv_a_proj_with_mqa" in name for name in deepseek.tensors)


@pytest.fixture(scope="module", params=MODELS)
def family(request: pytest.FixtureRequest) -> str:
    """Each family in turn."""
    return str(request.param)


@pytest.fixture(scope="module")
def loaded(family: str) -> tuple[Any, Any]:
    """A trained model in float32, and its tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = MODELS[family]
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), AutoTokenizer.from_pretrained(folder)


def test_every_task_can_be_done(family: str, loaded: tuple[Any, Any], tmp_path: Path) -> None:
    """The first questions of every task are answered far above chance; guessing reaches 37 % once in 500 runs."""
    settings = EvalSettings(tasks=("tiny",), include_path=BUNDLED / "tasks", limit=120, batch_size=32, device="cpu")
    with prepare(settings) as tasks:
        run_model(loaded, settings, tmp_path / "run", loaded=tasks)
    [results] = (json.loads(file.read_text()) for file in (tmp_path / "run").glob("results_*.json"))
    scores = {
        name: values.get("acc,none", values.get("exact_match,answer"))
        for name, values in results["results"].items()
        if name != "tiny"
    }
    assert len(scores) >= 6
    assert min(scores.values()) > 0.37, (family, scores)


def test_the_default_strategy_beats_its_controls(family: str, loaded: tuple[Any, Any]) -> None:
    """With half of the experts gone, held-out perplexity is surely under that of random and frequency."""
    model, tokenizer = loaded
    statistics = moeprune.collect(MODELS[family], calibration=str(BUNDLED / "calibration.jsonl"), dtype="float32")
    texts = [tokenizer(row["text"])["input_ids"] for row in read_lines(BUNDLED / "heldout.jsonl")]

    def losses(strategy: str) -> TokenLosses:
        plan = moeprune.plan(statistics, MODELS[family], ratio=0.5, strategy=strategy)
        return token_losses(moeprune.prune_model(copy.deepcopy(model), plan), texts)

    ours = losses(DEFAULT)
    for control in ("random", "frequency"):
        assert perplexity_ratio(losses(control), ours).interval[1] < 1, control


# --- tasks and texts ------------------------------------------------------------------------------------------------


def test_tasks_are_large_and_balanced() -> None:
    """At least six tasks of 1,000 different questions in three kinds, the right answer at every position alike."""
    files = sorted((BUNDLED / "tasks").glob("*.jsonl"))
    assert len(files) >= 6
    kinds = set()
    for file in files:
        rows = read_lines(file)
        asked = [row.get("prompt") or row["continuation"] for row in rows]
        assert len(set(asked)) >= 1000, file
        if "answer" not in rows[0]:
            assert np.bincount([row["label"] for row in rows]).tolist() == [250] * 4
            assert all(len(set(row.get("choices") or row["passages"])) == 4 for row in rows)
        kinds.add(next(line for line in file.with_suffix(".yaml").read_text().splitlines() if line.startswith("tag:")))
    assert len(kinds) >= 3


def test_texts_share_no_passage(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calibration, selection, held-out rows and the questions have no 64 characters and no long line in common."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    from tiny_moe.text import assert_disjoint

    texts = {
        name: [row["text"] for row in read_lines(BUNDLED / f"{name}.jsonl") if row["domain"] != "drills"]
        for name in ("calibration", "selection", "heldout")
    }
    texts["tasks"] = [
        passage
        for name in ("prose", "code")
        for row in read_lines(BUNDLED / "tasks" / f"{name}.jsonl")
        for passage in row["passages"]
    ]
    assert_disjoint(texts)
    with pytest.raises(ValueError, match="share"):
        assert_disjoint(texts | {"more": [texts["heldout"][0]]})


def test_drill_questions_are_not_in_the_texts() -> None:
    """No question of a drill task is answered in the calibration, selection or held-out rows."""
    lines = {
        line
        for name in ("calibration", "selection", "heldout")
        for row in read_lines(BUNDLED / f"{name}.jsonl")
        for line in row["text"].splitlines()
    }
    for name in ("sorting", "transform", "comparison", "brackets", "knowledge"):
        for row in read_lines(BUNDLED / "tasks" / f"{name}.jsonl"):
            answer = row.get("answer") or row["choices"][row["label"]]
            assert f"{row['prompt']} {answer}" not in lines


# --- what a user runs first -----------------------------------------------------------------------------------------


def test_the_first_command_of_the_readme(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`moeprune prune --ratio 0.5` needs nothing else: a verified checkpoint and a report with a row per task."""
    monkeypatch.chdir(tmp_path)
    assert cli.run(["prune", "--ratio", "0.5", "--limit", "12"]) == 0
    text = capsys.readouterr().out
    out = tmp_path / "moeprune-tiny-16of32"
    assert "verified: " in text
    assert "NOT the full benchmark" in text
    report = json.loads((out / "moeprune" / "report" / "report.json").read_text())
    assert len(report["tasks"]) >= 6
    assert {row["n"] for row in report["tasks"]} == {12}
    assert all(row["task"] in text for row in report["tasks"])
    assert moeprune.open_checkpoint(out).num_experts == 16
    assert json.loads((out / "config.json").read_text())["num_experts"] == 16


@pytest.mark.parametrize("example", ["stages", "observe_training", "train_with_callback", "prune_in_memory"])
def test_examples_run(example: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every example of the Python API runs as it is shown."""
    monkeypatch.setattr(sys, "argv", [example, str(tmp_path / "out")])
    runpy.run_path(str(EXAMPLES / f"{example}.py"), run_name="__main__")
    assert any((tmp_path / "out").iterdir())
