"""`moeprune sweep`: many plans on one model in memory, against the checkpoints that they would give."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import typer

import moeprune
from moeprune import cli, sweeping
from moeprune._cli_sweep import RATIOS, strategies_of
from moeprune._commands import command_line
from moeprune.errors import ConfigError, StaleArtifactError, StrategyError
from moeprune.evaluation.harness import run_model

CheckpointOf = Callable[..., Path]


class Done(NamedTuple):
    """What a command line left behind."""

    out: str
    err: str


@pytest.fixture
def inputs(speaker: Path, tmp_path: Path) -> dict[str, Any]:
    """Calibration data, held-out text and tasks for the speaking model."""
    rows = [{"text": f"{number} + 2 = {number + 2}", "domain": ("odd", "even")[number % 2]} for number in range(20)]
    heldout = tmp_path / "heldout.jsonl"
    heldout.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "calibration": str(speaker / "calibration.jsonl"),
        "text": str(heldout),
        "tasks": "tiny",
        "include_path": speaker / "tasks",
        "device": "cpu",
        "batch_tokens": 512,
    }


@pytest.fixture
def run(
    speaker: Path, inputs: dict[str, Any], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Callable[..., Done]:
    """A sweep over text by a command line."""

    def execute(options: str = "", code: int = 0) -> Done:
        line = f"sweep {speaker / 'model'} --calibration {inputs['calibration']} -o {tmp_path / 'out'} {options}"
        found = cli.run(shlex.split(line))
        out, err = capsys.readouterr()
        assert found == code, out + err
        return Done(out, err)

    return execute


def payload(folder: Path) -> Any:
    """The report in a folder."""
    return json.loads((folder / "sweep.json").read_text())


# --- what is measured -------------------------------------------------------------------------------------------------


def test_points_are_what_the_checkpoints_would_give(speaker: Path, inputs: dict[str, Any], tmp_path: Path) -> None:
    """Answers, text and sizes of every point are those of the checkpoint that `apply` makes of its plan."""
    out = tmp_path / "out"
    report = moeprune.sweep(speaker / "model", out, ratios=["0.5", 0.25], **inputs)
    assert [(point.ratio, point.kept, point.plan) for point in report.points] == [
        ("0.25", 12, "plan-0.25.json"),
        ("0.5", 8, "plan-0.5.json"),
    ]
    half = report.points[1]
    written = moeprune.apply(speaker / "model", out / half.plan, tmp_path / "half")
    assert moeprune.open_checkpoint(written).nbytes == half.nbytes
    assert moeprune.open_checkpoint(speaker / "model").nbytes == half.base_bytes
    wanted = {name: inputs[name] for name in ("tasks", "include_path", "device")}
    evaluated = moeprune.evaluate(speaker / "model", written, output=tmp_path / "report", **wanted)
    assert (half.tasks, half.suite) == (evaluated.tasks, evaluated.suite)
    [scored] = moeprune.evaluate_text(
        speaker / "model", written, text=inputs["text"], batch_tokens=512, device="cpu"
    ).plans
    assert half.text == {"perplexity_ratio": scored.ratio, "kl": scored.kl, "top1": scored.top1}
    assert report.points[0].text != half.text
    assert not any("same model" in warning for warning in report.warnings)
    found = payload(out)
    assert (found["schema"], found["margin"], found["largest_within_margin"]) == ("moeprune.sweep/1", 1.0, None)
    assert found["points"][1]["tasks"][0]["task"] == half.tasks[0].task
    assert str(tmp_path) not in (out / "sweep.json").read_text()
    assert "too few documents to tell" in found["summary"][0]


def test_plans_are_those_of_the_stages(speaker: Path, inputs: dict[str, Any], tmp_path: Path) -> None:
    """One calibration, or a file of one, gives the very plans that `collect` and `plan` give."""
    statistics = tmp_path / "statistics.safetensors"
    moeprune.collect(speaker / "model", statistics, calibration=inputs["calibration"], batch_tokens=512, device="cpu")
    options = {"text": inputs["text"], "batch_tokens": 512, "device": "cpu", "strategy": ("reap", "S(1,1,1)", "random")}
    options |= {"ratios": "0.5", "protect": {0: frozenset({3})}, "round_to": 2}
    moeprune.sweep(speaker / "model", tmp_path / "a", calibration=inputs["calibration"], **options)
    moeprune.sweep(speaker / "model", tmp_path / "b", statistics_file=statistics, **options)
    assert (tmp_path / "a" / "statistics.safetensors").read_bytes() == statistics.read_bytes()
    assert not (tmp_path / "b" / "statistics.safetensors").exists()
    for name, strategy in (("reap", "reap"), ("S-1-1-1", "S(1,1,1)"), ("random", "random")):
        made = moeprune.plan(
            statistics, speaker / "model", ratio=0.5, strategy=strategy, protect={0: frozenset({3})}, round_to=2
        )
        expected = made.save(tmp_path / "expected.json").read_bytes()
        for folder in ("a", "b"):
            assert (tmp_path / folder / f"plan-{name}-0.5.json").read_bytes() == expected
    assert payload(tmp_path / "a") == payload(tmp_path / "b")


def test_layer_by_layer_is_the_same(speaker: Path, inputs: dict[str, Any], tmp_path: Path) -> None:
    """A model that does not fit is swept over text, with the numbers of the loaded one."""
    del inputs["tasks"], inputs["include_path"]
    whole, streamed = (
        moeprune.sweep(speaker / "model", tmp_path / name, ratios=[0.25, 0.5], stream=stream, **inputs).points
        for name, stream in (("whole", False), ("streamed", True))
    )
    for one, other in zip(whole, streamed, strict=True):
        assert one.text is not None
        assert other.text is not None
        for measure, value in one.text.items():
            assert other.text[measure].interval == pytest.approx(value.interval, rel=1e-4, abs=1e-6)


# --- going on ---------------------------------------------------------------------------------------------------------


def test_a_killed_sweep_goes_on(
    speaker: Path, inputs: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Finished points are used again, the one that was cut is not; the report is that of a sweep in one go."""
    asked: list[str] = []
    left = 2

    def counted(model: Any, settings: Any, output: Path, **options: Any) -> None:
        nonlocal left
        asked.append(output.name)
        run_model(model, settings, output, **options)
        left -= 1
        if left < 0:
            raise KeyboardInterrupt

    monkeypatch.setattr(sweeping, "run_model", counted)
    out, options = tmp_path / "out", {"ratios": [0.25, 0.5], **inputs}
    with pytest.raises(KeyboardInterrupt):
        moeprune.sweep(speaker / "model", out, **options)
    assert asked == ["base", "0.25", "0.5"]
    assert not (out / "sweep.json").exists()
    asked.clear()
    left = 99
    monkeypatch.setattr(sweeping, "collected", None)
    found = moeprune.sweep(speaker / "model", out, **options)
    assert asked == ["0.5"]
    monkeypatch.undo()
    assert moeprune.sweep(speaker / "model", tmp_path / "once", **options).to_json() == found.to_json()
    assert {file.name for file in out.iterdir()} == {file.name for file in (tmp_path / "once").iterdir()}


def test_only_the_same_is_used_again(
    speaker: Path, inputs: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A finished sweep is refused; replaced, it keeps answers of the same experts, settings and tasks only."""
    asked: list[str] = []

    def counted(model: Any, settings: Any, output: Path, **options: Any) -> None:
        asked.append(output.name)
        run_model(model, settings, output, **options)

    monkeypatch.setattr(sweeping, "run_model", counted)
    out, options = tmp_path / "out", {"overwrite": True, "limit": 5, **inputs}

    def again(**changes: Any) -> list[str]:
        asked.clear()
        moeprune.sweep(speaker / "model", out, **{"ratios": [0.25], **options, **changes})
        return asked

    assert again() == ["base", "0.25"]
    with pytest.raises(ConfigError, match="not empty"):
        again(overwrite=False)
    assert again(margin=3.0) == []
    assert payload(out)["margin"] == 3.0
    assert again(ratios=[0.5]) == ["0.5"]
    assert not (out / "plan-0.25.json").exists()
    assert again(ratios=[0.25, 0.5], strategy=["random", "reap"]) == [
        *("random-0.25", "random-0.5", "reap-0.25", "reap-0.5"),
    ]
    assert again(strategy="random") == ["0.25"]
    assert again(limit=6) == ["base", "0.25"]
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    for file in (speaker / "tasks").iterdir():
        (tasks / file.name).write_bytes(file.read_bytes())
    assert again(limit=6, include_path=tasks) == []  # the same files elsewhere
    (tasks / "docs.jsonl").write_text((tasks / "docs.jsonl").read_text().replace('"ab"', '"ba"'))
    assert again(limit=6, include_path=tasks) == ["base", "0.25"]


def test_two_sweeps_do_not_meet(speaker: Path, inputs: dict[str, Any], tmp_path: Path) -> None:
    """While one writes a folder another is refused."""
    from moeprune._files import lock_file

    (tmp_path / "out").mkdir()
    with (tmp_path / "out" / sweeping._UNFINISHED).open("wb") as file:
        lock_file(file, tmp_path)
        with pytest.raises(ConfigError, match="another run is writing"):
            moeprune.sweep(speaker / "model", tmp_path / "out", ratios=0.5, **inputs)


# --- the command line -------------------------------------------------------------------------------------------------


def test_people_and_programs_read_the_same(run: Callable[..., Done], inputs: dict[str, Any], tmp_path: Path) -> None:
    """A table with a row per point, the sentence, a page, and one object of the same numbers."""
    text = f"--text {inputs['text']} --ratios 0.25,0.5"
    lines = run(text).out.splitlines()
    found = payload(tmp_path / "out")
    assert command_line(found["command"], "MODEL").startswith("moeprune sweep MODEL --ratios 0.25,0.5 --strategy ")
    options = {option.name for option in typer.main.get_command(cli.app).commands["sweep"].params}  # type: ignore[attr-defined]
    assert found["command"].keys() - {"stage", "guard"} <= options
    table = next(number for number, line in enumerate(lines) if line.startswith("ratio"))
    for line, point in zip(lines[table + 1 : table + 3], found["points"], strict=True):
        assert line.split()[:2] == [point["ratio"], f"{point['kept']}/16"]
        assert f"{point['text']['kl']['value']:.3f}" in line
    assert lines[-3] == found["summary"][0]
    assert lines[-2:] == [f"report: {tmp_path / 'out' / 'sweep.md'}", f"page: {tmp_path / 'out' / 'report.html'}"]
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "0.25" in page
    assert "<script" not in page
    assert run(f"{text} --overwrite --json").out == (tmp_path / "out" / "sweep.json").read_text()
    assert "| 0.25 | 12/16 |" in (tmp_path / "out" / "sweep.md").read_text()


def test_a_dry_run_says_the_sizes(run: Callable[..., Done], inputs: dict[str, Any], tmp_path: Path) -> None:
    """Every plan's size and what the passes take; nothing is run or written."""
    done = run(f"--text {inputs['text']} --dry-run --stream")
    lines = done.out.splitlines()
    assert [line.partition(":")[0] for line in lines[:4]] == RATIOS.split(",")
    assert lines[0].startswith("0.125: keep 14 of 16 experts, ")
    assert any(line.startswith("collecting: one layer at a time") for line in lines)
    assert any(line.startswith("scoring: one layer at a time") for line in lines)
    assert lines[-1] == f"dry run: nothing was written to {tmp_path / 'out'}"
    found = json.loads(run(f"--text {inputs['text']} --dry-run --json").out)
    assert (found["written"], found["passes"]) == (False, {"collecting": None, "scoring": None})
    assert found["points"]["0.5"]["budget"]["kept"] == 8
    assert not (tmp_path / "out").exists()


def test_the_texts_that_plans_were_made_from_are_named(
    run: Callable[..., Done], inputs: dict[str, Any], tmp_path: Path
) -> None:
    """Scoring on the calibration text is said to look too good."""
    run(f"--text {inputs['calibration']} --ratios 0.5")
    warnings = payload(tmp_path / "out")["warnings"]
    assert "the experts were chosen on this very text: plans look better than they are" in warnings


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("", "it is not said on what"),
        ("--text T --ratios 0.5,x", "not all are numbers"),
        ("--text T --ratios 0.5,0.50", "different ratios"),
        ("--text T --ratios 0.01", "removes no expert"),
        ("--text T --strategy reap,reap", "different strategies"),
        ("--text T --strategy naee", "runs the model"),
        ("--text T --strategy auto", "on a text of its own"),
        ("--text T --statistics-file s.safetensors", "takes the place of --calibration"),
        ("--text T --limit 3", "no task is named"),
        ("--text T --margin -1", "--margin must be"),
        ("--eval tiny_none --text T", "tiny_none"),
    ],
)
def test_what_cannot_work_is_refused_before_any_work(
    run: Callable[..., Done], inputs: dict[str, Any], tmp_path: Path, options: str, message: str
) -> None:
    """One line, exit code 2, and no folder."""
    done = run(options.replace("--text T", f"--text {inputs['text']}"), code=2)
    assert message in done.err
    assert not (tmp_path / "out").exists()


def test_what_cannot_work_in_python(
    speaker: Path, inputs: dict[str, Any], checkpoint_of: CheckpointOf, tmp_path: Path
) -> None:
    """Tasks layer by layer, a strategy without its data, statistics of another model, and slices."""
    model, out = speaker / "model", tmp_path / "out"
    with pytest.raises(ConfigError, match="whole model in memory, and --stream"):
        moeprune.sweep(model, out, stream=True, **inputs)
    with pytest.raises(ConfigError, match="needs calibration data"):
        moeprune.sweep(model, out, **{**inputs, "calibration": ()})
    with pytest.raises(ConfigError, match="all layers"):
        moeprune.sweep(model, out, layers=(0,), **inputs)
    with pytest.raises(StrategyError, match="unknown strategy"):
        moeprune.sweep(model, out, strategy="reaper", **inputs)
    other = tmp_path / "other.safetensors"
    moeprune.collect(checkpoint_of("olmoe"), other)
    with pytest.raises(StaleArtifactError):
        moeprune.sweep(model, out, statistics_file=other, **{**inputs, "calibration": ()})
    assert not out.exists()


def test_strategies_with_commas_in_their_names() -> None:
    """Commas inside parentheses belong to the name."""
    assert strategies_of("reap, S(1,1,1),hope") == ("reap", "S(1,1,1)", "hope")


def test_the_bundled_model_has_all_it_takes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without MODEL a sweep has texts and tasks of its own."""
    out = tmp_path / "out"
    assert cli.run(shlex.split(f"sweep --ratios 0.5 --limit 2 --num-samples 20 -o {out}")) == 0
    [point] = payload(out)["points"]
    assert (point["kept"], len(point["tasks"])) == (16, 7)
    assert point["text"]["perplexity_ratio"]["interval"][0] > 1
    assert "NOT the full benchmark" in capsys.readouterr().out
