"""``moeprune skip`` as a user meets it, on the models that are trained and shipped."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import moeprune
from moeprune.cli import run
from moeprune.pipeline import BUNDLED

FIXTURES = Path(__file__).parent.parent / "fixtures"
MODELS = {
    "qwen3_moe": BUNDLED / "model",
    "glm4_moe": FIXTURES / "glm4_moe",
    "deepseek_v3": FIXTURES / "deepseek_v3",
}


@pytest.mark.parametrize("name", MODELS)
def test_the_rate_holds_on_text_that_was_not_seen(name: str, tmp_path: Path) -> None:
    """Half is asked for, and on held-out text half is skipped to a point, for little and for less than slots by lot."""
    result = moeprune.skip(
        MODELS[name],
        tmp_path / "gated",
        calibration=str(BUNDLED / "calibration.jsonl"),
        heldout=str(BUNDLED / "heldout.jsonl"),
        num_samples=256,
        max_length=192,
        batch_tokens=4096,
    )
    assert result.heldout is not None
    point = result.heldout.point
    assert point.policy.rate == pytest.approx(0.5, abs=0.01)
    assert point.policy.ratio.value < 1.05
    assert point.random.ratio.value > 1.3
    assert point.random.rate == pytest.approx(point.policy.rate, abs=1e-6)


def test_the_command_says_what_it_did(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without MODEL it solves, writes, measures and evaluates; one object with --json."""
    few = ["--num-samples", "24", "--max-length", "128", "--limit", "4", "--eval", "tiny_brackets"]
    code = run(["skip", "-o", str(tmp_path / "out"), "--policy", "share", "--json", "-q", *few])
    shown = json.loads(capsys.readouterr().out)
    assert code == 0
    assert shown["plan"]["policy"] == "share"
    assert shown["heldout"]["schema"] == "moeprune.skip/1"
    assert shown["report"]["tasks"]
    assert (tmp_path / "out" / "moeprune" / "report" / "report.html").is_file()


def test_a_dry_run_forecasts_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What it would take, and an untouched folder."""
    assert run(["skip", "-o", str(tmp_path / "out"), "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "would take" in shown
    assert "nothing was written" in shown
    assert "training would take" not in shown
    assert run(["skip", "-o", str(tmp_path / "out"), "--dry-run", "--distill"]) == 0
    assert "training would take: about " in capsys.readouterr().out
    assert not [*tmp_path.iterdir()]


def test_policies_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    """One line for each."""
    assert run(["skip", "--policy", "list"]) == 0
    assert "share" in capsys.readouterr().out


def test_a_rate_that_cannot_be_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code 2, one line and a hint, and nothing is left."""
    arguments = ["skip", "-o", str(tmp_path / "out"), "--policy", "share", "--skip-rate", "0.9"]
    assert run(arguments) == 2
    assert "at most 75%" in capsys.readouterr().err
    assert not [*tmp_path.iterdir()]
