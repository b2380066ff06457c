"""Evaluating a checkpoint that skips: it runs as its plan says, and what it skips is known by task."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import moeprune
from moeprune.errors import EvaluationError
from moeprune.evaluation.compare import EvalReport
from moeprune.evaluation.harness import EvalSettings, evaluate_pair, prepare, run_model
from moeprune.evaluation.report import render_markdown, render_table
from moeprune.evaluation.samples import read_run
from moeprune.evaluation.skip_rates import RateWatch, Skipped, read_skipped
from moeprune.plans_skip import Renorm, SkipLayer, SkipPlan
from moeprune.runtime.loading import load, needs_loading
from moeprune.runtime.policies import Policy, Routed
from moeprune.runtime.skipping import GATES_ATTRIBUTE, Gate, SkipCounter, counted

CHOICES, WRITTEN = ("ask_first", "ask_second"), "ask_write"


@pytest.fixture(scope="module")
def gated(speaker: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that skips about half of its slots, fewer of them in its last layer."""
    folder = tmp_path_factory.mktemp("gated") / "model"
    shutil.copytree(speaker / "model", folder)
    (folder / "moeprune").mkdir()
    plan = SkipPlan(
        policy="share",
        renorm=Renorm(),
        layers={0: SkipLayer(threshold=0.35), 2: SkipLayer(threshold=0.2)},
        target=0.5,
        rate=0.5,
        top_k=3,
        command={},
        inputs={"model": moeprune.open_checkpoint(folder).fingerprint},
    )
    plan.save(folder / "moeprune" / "plan.json")
    return folder


def settings_for(questions: Path, *tasks: str, **changes: Any) -> EvalSettings:
    """On the CPU."""
    return EvalSettings(tasks=tasks, include_path=questions, device="cpu", **changes)


@pytest.fixture(scope="module")
def report(speaker: Path, gated: Path, questions: Path, tmp_path_factory: pytest.TempPathFactory) -> EvalReport:
    """The model beside itself with gates, on a group of two tasks and one whose answers are written."""
    settings = settings_for(questions, "ask_both", WRITTEN)
    return evaluate_pair(speaker / "model", gated, settings, tmp_path_factory.mktemp("pair") / "report")


def alone(gated: Path, questions: Path, task: str, output: Path) -> Skipped:
    """What skips when one question of one task runs at a time, so that there is no padding and no other task."""
    from transformers import AutoTokenizer

    model = load(gated)
    with counted(model) as counter:
        settings = settings_for(questions, task, batch_size=1)
        for gate in getattr(model, GATES_ATTRIBUTE).values():
            gate.policy = _told(gate.policy, counter, gate)
        run_model((model, AutoTokenizer.from_pretrained(gated)), settings, output)
    total = counter.total
    return Skipped(slots=total.slots, kept=total.kept)


def _told(policy: Policy, counter: SkipCounter, gate: Gate) -> Policy:
    """The policy, which tells a counter that is not the watch's own of what it decides."""

    def score(routed: Routed) -> Any:
        counter.see(gate.layer.index, 0, policy.kept(routed))
        return policy.score(routed)

    return dataclasses.replace(policy, score=score)


def test_rates_are_those_of_questions_that_run_alone(gated: Path, questions: Path, tmp_path: Path) -> None:
    """Whatever else is in a batch: padding, other tasks and answers that came to their end do not count."""
    with prepare(settings_for(questions, *CHOICES, WRITTEN)) as loaded:
        run_model(gated, settings_for(questions, *CHOICES, WRITTEN, batch_size=7), tmp_path / "together", loaded=loaded)
    found = read_skipped(tmp_path / "together")
    assert found.keys() == {*CHOICES, WRITTEN}
    for task in (CHOICES[1], WRITTEN):
        expected = alone(gated, questions, task, tmp_path / task)
        assert found[task].slots == expected.slots
        assert abs(found[task].kept - expected.kept) <= 2  # a share beside the threshold, in other company
        assert 0.2 < found[task].rate < 0.8


def test_answers_count_until_they_end() -> None:
    """Of a batch of prompts what is padded at the begin is left out, of the tokens after it rows that only wait."""
    import torch

    lm = SimpleNamespace(
        model=SimpleNamespace(base_model=SimpleNamespace(forward=lambda input_ids: input_ids)),
        tokenizer=SimpleNamespace(pad_token_id=0),
    )
    watch = RateWatch(lm)
    watch._rows = [4, 7]
    mask = torch.tensor([[0, 1, 1], [1, 1, 1]])
    assert watch._answers(np.array([[0, 5, 0], [3, 0, 4]]), mask).tolist() == [[-1, 4, 4], [7, 7, 7]]
    mask = torch.cat([mask, torch.ones(2, 1)], dim=1)
    assert watch._answers(np.array([[6], [0]]), mask).tolist() == [[4], [-1]]
    assert watch._answers(np.array([[6], [0], [0], [9]]), mask.repeat_interleave(2, 0)).tolist() == [
        [4],
        [-1],
        [-1],
        [7],
    ]


def test_the_report_has_the_rate_beside_every_figure(report: EvalReport) -> None:
    """Groups are put together, the base skips nothing, and all faces say what was skipped."""
    by_task = {row.task: row for row in report.tasks}
    assert by_task.keys() == {"ask_both", WRITTEN}
    for row in report.tasks:
        assert row.skipped_base is None
        assert row.skipped_pruned is not None
        assert row.skipped == f"{100 * row.skipped_pruned:.1f}"
        assert f"{row.task} {row.skipped} %" in render_table(report)
        assert f"| {row.skipped} |" in render_markdown(report)
    assert EvalReport.from_json(report.to_json()) == report


def test_the_gates_are_there_when_it_is_evaluated(
    speaker: Path, gated: Path, questions: Path, report: EvalReport, tmp_path: Path
) -> None:
    """Answers are those of the gated model in memory, not of the stock one; afterwards nobody listens to it."""
    from transformers import AutoTokenizer

    settings, model = settings_for(questions, *CHOICES), load(gated)
    for name, one in (("disk", gated), ("memory", (model, AutoTokenizer.from_pretrained(gated)))):
        run_model(one, settings, tmp_path / name)
    run_model(speaker / "model", settings, tmp_path / "stock")
    disk, memory, stock = (
        {key: sample.likelihoods for key, sample in read_run(tmp_path / name).tasks["ask_first"].samples.items()}
        for name in ("disk", "memory", "stock")
    )
    assert disk == memory != stock
    assert read_skipped(tmp_path / "disk") == read_skipped(tmp_path / "memory")
    assert not read_skipped(tmp_path / "stock")
    assert all(gate.counter is None for gate in getattr(model, GATES_ATTRIBUTE).values())
    assert not model.base_model._forward_pre_hooks


def test_what_would_not_skip_is_refused(gated: Path, speaker: Path, questions: Path, tmp_path: Path) -> None:
    """Other processes and engines load the weights alone, and some of lm-eval's arguments are for loading."""
    for changes in ({"isolated": True}, {"launcher": "python"}):
        with pytest.raises(EvaluationError, match="would pass over the plan"):
            run_model(gated, settings_for(questions, WRITTEN, **changes), tmp_path / "out")
    with pytest.raises(EvaluationError, match="no model argument 'peft'"):
        evaluate_pair(
            speaker / "model", gated, settings_for(questions, WRITTEN, model_args={"peft": "x"}), tmp_path / "out"
        )
    assert not (tmp_path / "out").exists()


def test_a_baked_plan_needs_nobody(gated: Path, tmp_path: Path) -> None:
    """Its config says how many experts each token has, so that any engine runs it as planned."""
    folder = shutil.copytree(gated, tmp_path / "baked")
    plan = SkipPlan.load(folder / "moeprune" / "plan.json")
    assert needs_loading(folder)
    dataclasses.replace(plan, policy="static-k", layers={}, baked=True).save(folder / "moeprune" / "plan.json")
    assert not needs_loading(folder)
    assert not hasattr(load(folder), GATES_ATTRIBUTE)


def test_model_arguments_reach_what_they_are_for(gated: Path, questions: Path, tmp_path: Path) -> None:
    """Of lm-eval's class and of transformers, beside the dtype."""
    arguments = {"max_length": 40, "attn_implementation": "eager"}
    run_model(gated, settings_for(questions, CHOICES[0], dtype="bfloat16", model_args=arguments), tmp_path / "out")
    results = read_run(tmp_path / "out").results
    assert results["config"]["model_dtype"] == "torch.bfloat16"
    assert results["config"]["model_args"] == arguments
