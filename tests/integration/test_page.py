"""The page of real runs: written where the report is, made again from files, and true to its commands."""

from __future__ import annotations

import html
import json
import re
import shlex
import shutil
from pathlib import Path

import pytest

import moeprune
from moeprune import cli


@pytest.fixture(scope="module")
def pruned(speaker: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pruned checkpoint that was evaluated."""
    out = tmp_path_factory.mktemp("page") / "out"
    how = {"include_path": speaker / "tasks", "batch_size": 8}
    calibration = str(speaker / "calibration.jsonl")
    moeprune.prune(speaker / "model", out, ratio=0.5, calibration=calibration, tasks=["tiny_one", "tiny_two"], **how)
    return out


@pytest.fixture
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Run in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_one_shot_run_leaves_a_page_of_everything_it_knows(pruned: Path) -> None:
    """Report, plan and statistics are on the page of `prune`, with the numbers of the files."""
    report = json.loads((pruned / "moeprune/report/report.json").read_text())
    text = (pruned / "moeprune/report/report.html").read_text()
    assert "8 of 16 experts kept in each of 2 layers" in text
    assert "by gated norm on the calibration data" in text
    assert "sums" in text
    assert f"{report['tasks'][0]['n']}" in text
    assert report["inputs"]["pruned"] in text


def test_the_page_is_made_again_from_files(pruned: Path, scratch: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`moeprune report OUT` gives the bytes that the run left, says where, and replaces nothing unasked."""
    page = pruned / "moeprune/report/report.html"
    assert cli.run(["report", str(pruned), "-o", "page.html"]) == 0
    assert capsys.readouterr().out == "page: page.html\n"
    assert Path("page.html").read_bytes() == page.read_bytes()
    assert cli.run(["report", str(pruned)]) == 2
    assert "exists" in capsys.readouterr().err
    assert cli.run(["report", str(pruned), "--overwrite", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"output": str(page), "bytes": page.stat().st_size}


def test_an_evaluation_elsewhere_takes_the_plan_from_the_checkpoint(pruned: Path, speaker: Path, scratch: Path) -> None:
    """`eval -o report` has the checkpoint's plan on its page; `compare` knows no checkpoint and says so."""
    moeprune.evaluate(
        speaker / "model", pruned, tasks="tiny_one", output="report", include_path=speaker / "tasks", batch_size=8
    )
    assert "8 of 16 experts kept" in Path("report/report.html").read_text()
    moeprune.compare("report/base", "report/pruned", output="again")
    text = Path("again/report.html").read_text()
    assert "The plan is not at hand" in text
    assert "moeprune compare BASE_RUN PRUNED_RUN" in text


def test_a_report_of_a_checkpoint_that_changed_is_refused(
    pruned: Path, scratch: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The report names the checkpoint that it measured: after a change of that one it is stale."""
    shutil.copytree(pruned, "changed")
    config = Path("changed/config.json")
    config.write_text(config.read_text().replace("}", ' , "changed": 1}', 1))
    assert cli.run(["report", "changed", "-o", "page.html"]) == 2
    found = capsys.readouterr().err
    assert "error: the report was made for another checkpoint than changed" in found
    assert "hint: evaluate it again" in found
    assert not Path("page.html").exists()


def test_the_commands_on_the_page_make_the_same_again(pruned: Path, speaker: Path, scratch: Path) -> None:
    """Collect, plan and apply as the page writes them end in the bytes of the checkpoint."""
    shutil.copy(speaker / "calibration.jsonl", scratch)
    found = re.search(r"<pre[^>]*>(.*?)</pre>", (pruned / "moeprune/report/report.html").read_text(), flags=re.DOTALL)
    assert found
    lines = html.unescape(found[1]).splitlines()
    assert [line.split()[1] for line in lines] == ["collect", "plan", "apply", "eval"]
    for line in lines[:3]:
        words = [{"MODEL": str(speaker / "model"), "PRUNED": "same"}.get(word, word) for word in shlex.split(line)]
        assert cli.run(words[1:]) == 0, line
    assert Path("plan.json").read_bytes() == (pruned / "moeprune/plan.json").read_bytes()
    assert Path("statistics.safetensors").read_bytes() == (pruned / "moeprune/statistics.safetensors").read_bytes()
    assert Path("same/model.safetensors").read_bytes() == (pruned / "model.safetensors").read_bytes()


def test_probes_and_tasks_share_one_page(pruned: Path, speaker: Path, scratch: Path) -> None:
    """`eval --tasks --probes` ends in a page with both, drawn from the files that lie there in the end."""
    options = ["--tasks", "tiny_one", "--include-path", speaker / "tasks", "--batch-size", "8", "--probes", "-q"]
    assert cli.run([str(word) for word in ("eval", speaker / "model", pruned, *options, "-o", "report")]) == 0
    text = Path("report/report.html").read_text()
    assert "share of the questions of tiny_one whose score changed" in text
    assert "8 of 16 experts kept" in text
    assert cli.run(["report", "report", str(pruned), "-o", "page.html"]) == 0
    assert Path("page.html").read_text() == text
