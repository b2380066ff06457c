"""Pushing to a Hub on this machine with the real client: what arrives, what is refused, and what is never sent."""

from __future__ import annotations

import getpass
import hashlib
import inspect
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

import moeprune
from moeprune import _cli_publish, cli
from moeprune.errors import CheckpointError, PublishError
from moeprune.evaluation.compare import EvalReport, TaskComparison
from moeprune.publish.push import make_card

NAME = "org/tiny-pruned"
# Runs command lines one after another; the last line says what came of each, and which heavy libraries were loaded.
DRIVER = """
import contextlib, io, json, sys
from moeprune.cli import run
found = []
for arguments in json.loads(sys.argv[1]):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = run(arguments)
    found.append([code, out.getvalue(), err.getvalue()])
assert "torch" not in sys.modules
print(json.dumps(found))
"""
# Whether stock transformers, asked for two names, loads models with the same logits.
LOADER = """
import sys
import torch
from transformers import AutoModelForCausalLM
with torch.no_grad():
    models = [AutoModelForCausalLM.from_pretrained(name).eval() for name in sys.argv[1:]]
    one, other = [model(torch.arange(24)[None]).logits for model in models]
print(torch.equal(one, other) and bool(one.std() > 0))
"""


class Done(NamedTuple):
    """What a command line left behind."""

    code: int
    out: str
    err: str


Run = Callable[..., list[Done]]


@pytest.fixture
def run(hub_environment: dict[str, str]) -> Run:
    """Run command lines in a process of its own that asks the Hub on this machine."""

    def execute(*commands: list[object], **changes: str) -> list[Done]:
        lines = [[str(word) for word in command] for command in commands]
        done = subprocess.run(
            [sys.executable, "-c", DRIVER, json.dumps(lines)],
            env=hub_environment | changes,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return [Done(*found) for found in json.loads(done.stdout)]

    return execute


@pytest.fixture(scope="module")
def base(checkpoint_of: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a card and a licence."""
    folder = tmp_path_factory.mktemp("source") / "base"
    shutil.copytree(checkpoint_of("qwen3_moe"), folder)
    (folder / "README.md").write_text("---\nlicense: apache-2.0\nlanguage: [en, de]\n---\n\n# The base\n")
    return folder


@pytest.fixture(scope="module")
def calibration(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of token ids in two domains."""
    rng = np.random.default_rng(5)
    rows = [
        {"input_ids": rng.integers(0, 97, 24).tolist(), "domain": ("prose", "code")[number % 2]} for number in range(16)
    ]
    file = tmp_path_factory.mktemp("calibration") / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture(scope="module")
def made(base: Path, calibration: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pruned checkpoint with everything that may lie in its folder; read-only."""
    folder = tmp_path_factory.mktemp("pruned") / "out"
    moeprune.prune(base, folder, ratio=0.5, calibration=str(calibration), strategy="reap")
    report = folder / "moeprune" / "report"
    (report / "base").mkdir(parents=True)
    fingerprints = {
        name: moeprune.open_checkpoint(place).fingerprint for name, place in (("base", base), ("pruned", folder))
    }
    (report / "report.json").write_text(a_report(fingerprints).to_json())
    (report / "base" / "samples_arc_2026.jsonl").write_text('{"doc_id": 0}\n')
    (report / "base" / "results_2026.json").write_text(json.dumps({"model_name": str(folder)}))
    (report / "eval.log").write_text(str(folder))
    (folder / ".cache").mkdir()
    (folder / ".cache" / "secret").write_text("not for anyone")
    return folder


def a_report(fingerprints: dict[str, str]) -> EvalReport:
    """A report of one task, on half of its documents."""
    row = TaskComparison(
        task="arc", metric="acc", filter="none", version="1.0", n=50, n_full=100, n_shot=5, base=0.8, pruned=0.6,
        unit="points", change=-20.0, interval=(-33.0, -9.0), ni_lower=-31.0, lost=11, gained=1, flips=24.0,
        answers_changed=14, p=0.006, p_adjusted=0.006, mde=12.0, verdict="loss",
    )  # fmt: skip
    return EvalReport(
        base_model="base", pruned_model="out", margin=1.0, alpha=0.05, limit=50, tasks=(row,), suite=None,
        settings={"model_source": "hf", "transformers_version": "5.23.0"}, command={"tasks": ["arc"]},
        inputs=fingerprints,
    )  # fmt: skip


@pytest.fixture
def out(made: Path, tmp_path: Path) -> Path:
    """A copy of the pruned checkpoint."""
    return Path(shutil.copytree(made, tmp_path / "out"))


def tree(folder: Path) -> dict[str, bytes]:
    """Every file of a folder with its bytes."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


# --- what arrives -----------------------------------------------------------------------------------------------------


def test_a_push_arrives_whole_and_loads_bit_for_bit(
    hub: Any, hub_environment: dict[str, str], run: Run, out: Path
) -> None:
    """All files but raw output arrive in one commit of a private repository; stock transformers loads equal logits."""
    before = tree(out)
    [done] = run(["push", out, NAME])
    assert done.code == 0, done.err
    assert f"{hub.endpoint}/{NAME}" in done.out
    assert "README.md of" in done.err  # where the base's own card went
    there, repository = hub.files(NAME), hub.repositories[f"models/{NAME}"]
    assert repository.private
    assert len(repository.commits) == 2  # that of the new repository, and one
    sent = {
        name: data
        for name, data in before.items()
        if not name.startswith((".cache", "moeprune/report/base")) and not name.endswith(".log")
    }
    sent["moeprune/README.original.md"] = sent.pop("README.md")
    assert {name: data for name, data in there.items() if name not in {"README.md", ".gitattributes"}} == sent
    assert b"\nlicense: apache-2.0\n" in there["README.md"]
    assert tree(out) == before
    command = [sys.executable, "-c", LOADER, str(out), NAME]
    loaded = subprocess.run(command, env=hub_environment, check=True, capture_output=True, text=True)
    assert loaded.stdout == "True\n"


def test_nothing_tells_of_this_machine_or_of_the_token(hub: Any, run: Run, out: Path) -> None:
    """No file that arrives, samples included, holds the token, a folder, the user's name as a path, or the host."""
    [done] = run(["push", out, NAME, "--samples", "-vv"])
    assert done.code == 0, done.err
    assert "moeprune/report/base/samples_arc_2026.jsonl" in hub.files(NAME)
    assert "moeprune/report/base/results_2026.json" not in hub.files(NAME)
    marks = {hub.token, str(out), str(out.parent), str(Path.home()) + "/", f"/{getpass.getuser()}/"}
    host = re.compile(rf"(?<!\w){re.escape(socket.gethostname())}(?!\w)".encode())
    told = dict(hub.files(NAME)) | {"message": hub.repositories[f"models/{NAME}"].messages[-1].encode()}
    for name, data in told.items():
        for mark in marks:
            assert mark.encode() not in data, (name, mark)
        assert "/" not in name or host.search(data) is None, name  # a short name may be found among random weights


def test_a_second_push_sends_only_what_is_new(hub: Any, run: Run, out: Path) -> None:
    """Without a change there is no commit; a file that was added goes alone."""
    first, second = run(["push", out, NAME], ["push", out, NAME, "--json"])
    assert (first.code, second.code) == (0, 0), first.err + second.err
    assert json.loads(second.out)["changed"] is False
    uploads, commits = list(hub.uploads), len(hub.repositories[f"models/{NAME}"].commits)
    assert commits == 2
    (out / "moeprune" / "report" / "report.md").write_text("what it cost\n")
    hub.requests.clear()
    [third] = run(["push", out, NAME])
    assert third.code == 0, third.err
    assert hub.files(NAME)["moeprune/report/report.md"] == b"what it cost\n"
    assert hub.uploads == uploads


def test_a_pull_request_leaves_the_branch_alone(hub: Any, run: Run, out: Path) -> None:
    """With --create-pr the branch stays as it is, and the request is named; a branch of one's own works too."""
    refused, *done = run(
        ["push", out, NAME, "--create-pr"],
        ["push", out, NAME],
        ["push", out, NAME, "--create-pr", "--overwrite", "--base-model", "org/base@abc"],
        ["push", out, NAME, "--revision", "next", "--license", "apache-2.0", "--commit-message", "as said"],
    )
    assert refused.code == 2
    assert "to open a pull request on" in refused.err
    assert [one.code for one in done] == [0, 0, 0], [one.err for one in done]
    repository = hub.repositories[f"models/{NAME}"]
    assert "/discussions/" in done[1].out
    assert b"org/base" not in hub.files(NAME)["README.md"]
    [request] = [branch for branch in repository.branches if branch.startswith("refs/pr/")]
    assert b"base_model: org/base" in hub.files(NAME, request)["README.md"]
    assert hub.files(NAME, "next")["config.json"] == (out / "config.json").read_bytes()


def test_the_default_transfer_arrives_too(hub: Any, run: Run, out: Path, tmp_path: Path) -> None:
    """Through Xet, which cuts files into chunks, a push commits the digests of all weights, also after a failure."""
    pytest.importorskip("hf_xet")
    hub.chunks = tmp_path / "chunks"
    hub.faults["POST /api/models/org/tiny-pruned/commit"] = [500]
    for expected in (1, 0):
        [done] = run(["push", out, NAME], HF_HUB_DISABLE_XET="0", HF_XET_CACHE=str(tmp_path / "xet"))
        assert done.code == expected, done.err
    assert any("xet-write-token" in request for request in hub.requests)
    there = hub.files(NAME)
    assert hub.uploads == []
    for name in ("model.safetensors", "moeprune/statistics.safetensors"):
        assert there[name] == hashlib.sha256((out / name).read_bytes()).hexdigest().encode()
    assert any(hub.chunks.rglob("*"))


# --- what fails -------------------------------------------------------------------------------------------------------


def test_an_interrupted_push_goes_on(hub: Any, run: Run, out: Path) -> None:
    """After a 500 at the commit nothing is visible; the same command sends no large file again and finishes."""
    hub.faults["POST /api/models/org/tiny-pruned/commit"] = [500]
    [failed] = run(["push", out, NAME])
    assert failed.code == 1
    assert "the Hub answered 500" in failed.err
    assert "hint: push again" in failed.err
    assert list(hub.files(NAME)) == [".gitattributes"]
    uploads = list(hub.uploads)
    assert uploads
    [done] = run(["push", out, NAME])
    assert done.code == 0, done.err
    assert hub.uploads == uploads
    assert "config.json" in hub.files(NAME)


def test_ctrl_c_says_how_to_go_on(hub: Any, hub_environment: dict[str, str], run: Run, out: Path) -> None:
    """Interrupted while it sends, a push ends with 130 and nothing to be seen on the Hub; the next one finishes it."""
    hub.pauses["PUT /_lfs/"] = threading.Event()
    command = [sys.executable, "-m", "moeprune", "push", str(out), NAME]
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have it ignored, also for children
    try:
        process = subprocess.Popen(command, env=hub_environment, stderr=subprocess.PIPE, text=True)
    finally:
        signal.signal(signal.SIGINT, before)
    while not any(request.startswith("PUT") for request in hub.requests):
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    time.sleep(0.3)
    hub.pauses["PUT /_lfs/"].set()
    _, told = process.communicate(timeout=60)
    assert process.returncode == 130, told
    assert "push again" in told
    assert told.splitlines()[-1] == "interrupted"
    assert list(hub.files(NAME)) == [".gitattributes"]
    [done] = run(["push", out, NAME])
    assert done.code == 0, done.err
    assert "config.json" in hub.files(NAME)


def test_an_upload_that_fails_is_tried_again(hub: Any, run: Run, out: Path) -> None:
    """A storage that fails now and then is asked again, by the client or by the next push."""
    hub.faults["PUT /_lfs/"] = [503, 500]
    [done] = run(["push", out, NAME])
    if done.code:
        assert "hint: push again" in done.err
        [done] = run(["push", out, NAME])
    assert done.code == 0, done.err
    weights = {hashlib.sha256(data).hexdigest() for name, data in hub.files(NAME).items() if "safetensors" in name}
    assert {*hub.uploads} >= {digest for digest in weights if digest in hub.storage}


def test_errors_of_the_hub_are_one_line_and_never_tell_the_token(hub: Any, run: Run, out: Path) -> None:
    """No token, a wrong one, no right, no such owner, no network, another's content: each says what to do."""
    hub.add("org/other", {"config.json": b"{}", "model.safetensors": b"x", ".gitattributes": b""}, private=True)
    hub.add("org/public", {".gitattributes": b""})
    hub.add("org/private", {".gitattributes": b""}, private=True)
    wrong = "hf_a_wrong_token_that_is_secret"
    cases = {
        "something else: config.json, model.safetensors": ["push", out, "org/other"],
        "exists and is public": ["push", out, "org/public"],
        "exists and is private": ["push", out, "org/private", "--public"],
        "may not write to nobody/tiny": ["push", out, "nobody/tiny"],
        "is no name of a repository": ["push", out, "tiny"],
        "opened on the default branch": ["push", out, NAME, "--create-pr", "--revision", "next"],
    }
    found = run(*([*case, "-vv"] for case in cases.values()))
    for (expected, _), done in zip(cases.items(), found, strict=True):
        assert done.code in {1, 2}, expected
        [line] = [line for line in done.err.splitlines() if line.startswith("error: ")]
        assert expected in line
        assert "\nhint: " in done.err
    [unknown] = run(["push", out, NAME, "-vv"], HF_TOKEN=wrong)
    assert "error: the Hub does not accept the token" in unknown.err
    [nobody] = run(["push", out, NAME, "-vv"], HF_TOKEN="")
    assert "error: not logged in to the Hub" in nobody.err
    [offline] = run(["push", out, NAME, "-vv"], HF_HUB_OFFLINE="1")
    assert "error: the Hub cannot be asked" in offline.err
    [lost] = run(["push", out, NAME, "-vv"], HF_ENDPOINT="http://127.0.0.1:9")
    assert "error: no answer from the Hub" in lost.err
    told = "".join(done.out + done.err for done in (*found, unknown, nobody, offline, lost))
    assert hub.token not in told
    assert wrong not in told
    assert f"models/{NAME}" not in hub.repositories
    assert not hub.uploads


def test_another_checkpoint_is_replaced_only_when_asked(hub: Any, run: Run, out: Path) -> None:
    """With --overwrite the other weights go in the same commit, so that no engine finds both."""
    hub.add("org/other", {"config.json": b"{}", "old.safetensors": b"x", "picture.png": b"p"}, private=True)
    [done] = run(["push", out, "org/other", "--overwrite"])
    assert done.code == 0, done.err
    assert {"old.safetensors", "picture.png"}.isdisjoint(hub.files("org/other"))
    stale = dict(hub.files("org/other")) | {"model-00001-of-00002.safetensors": b"y", "notes.txt": b"mine"}
    hub.repositories["models/org/other"].commit("main", stale)
    refused, again = run(["push", out, "org/other"], ["push", out, "org/other", "--overwrite"])
    assert "no part of this checkpoint: model-00001-of-00002.safetensors" in refused.err
    assert again.code == 0, again.err
    assert "model-00001-of-00002.safetensors" not in hub.files("org/other")
    assert hub.files("org/other")["notes.txt"] == b"mine"


# --- what is not sent -------------------------------------------------------------------------------------------------


def test_a_dry_run_asks_the_hub_nothing(hub: Any, run: Run, out: Path) -> None:
    """It lists files and sizes, gives the card, needs no token, and the Hub sees no request."""
    plain, told = run(
        ["push", out, NAME, "--dry-run"], ["push", out, NAME, "--dry-run", "--public", "--json"], HF_TOKEN=""
    )
    assert (plain.code, told.code) == (0, 0), plain.err + told.err
    assert "would push" in plain.out
    assert f"moeprune card {out}" in plain.out
    found = json.loads(told.out)
    assert found["pushed"] is False
    assert found["files"]["config.json"] == (out / "config.json").stat().st_size
    assert found["bytes"] == sum(found["files"].values())
    assert found["card"].startswith("---\n")
    assert hub.requests == []


def test_a_public_push_needs_a_licence(hub: Any, run: Run, out: Path) -> None:
    """Where the base's card names none, all may see the push only when --license says one; privately it goes."""
    (out / "README.md").write_text("# no front matter\n")
    refused, stated = run(["push", out, NAME, "--public"], ["push", out, NAME, "--public", "--license", "mit"])
    assert refused.code == 2
    assert "the licence of the base is not known" in refused.err
    assert "say which one LICENSE is with --license" in refused.err
    assert stated.code == 0, stated.err
    assert not hub.repositories[f"models/{NAME}"].private
    assert b"license: mit" in hub.files(NAME)["README.md"]
    (out / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    with pytest.raises(PublishError, match="by its own card, not 'mit'"):
        moeprune.push(out, NAME, licence="mit", dry_run=True)


def test_a_record_that_names_a_folder_is_not_sent(out: Path) -> None:
    """An option that held an absolute path stops the push before anything is asked."""
    plan = out / "moeprune" / "plan.json"
    text = plan.read_text()
    plan.write_text(text.replace('"seed": 0', '"seed": 0, "note": "/data/me/tasks"'))
    with pytest.raises(PublishError, match="names a folder of this machine: /data/me/tasks"):
        moeprune.push(out, NAME, dry_run=True)
    plan.write_text(text.replace('"seed": 0', f'"seed": 0, "note": "see {out.parent}"'))
    with pytest.raises(PublishError, match="names a folder of this machine"):
        moeprune.push(out, NAME, dry_run=True)
    plan.write_text(text)
    os.symlink(__file__, out / "notes.py")
    with pytest.raises(CheckpointError, match="links out of the checkpoint"):
        moeprune.push(out, NAME, dry_run=True)


def test_a_card_of_ones_own_is_sent_as_it_is(out: Path, tmp_path: Path) -> None:
    """The printed card can be edited and sent; one whose front matter is broken is refused."""
    card = tmp_path / "card.md"
    card.write_text(make_card(out, "tiny") + "\nMore words.\n")
    assert moeprune.push(out, NAME, card=card, dry_run=True).card == card.read_text()
    card.write_text("---\nlicense: [\n---\n")
    with pytest.raises(PublishError, match="is no model card"):
        moeprune.push(out, NAME, card=card, dry_run=True)


# --- what the card says -----------------------------------------------------------------------------------------------


def test_damaged_weights_are_not_pushed(out: Path) -> None:
    """One changed byte is found before anything is sent."""
    [weights] = out.glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:-1] + b"\0")
    with pytest.raises(CheckpointError, match="is not what the manifest says"):
        moeprune.push(out, NAME, dry_run=True)


def test_the_source_is_compared_where_it_is_named(base: Path, made: Path) -> None:
    """With --base the card claims byte identity of so many tensors; without, only what the record shows."""
    count = len(moeprune.open_checkpoint(made).tensors)
    with_base, without = make_card(made, base=base), make_card(made)
    assert f"Kept experts byte-identical: yes. {count} tensors" in with_base
    assert "byte-identical: yes" not in without
    assert f"{count} tensors" in without


def test_the_commands_of_the_card_make_the_same_again(
    base: Path, made: Path, calibration: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Run beside the calibration data, the printed commands give plan, statistics and weights byte by byte."""
    folder = tmp_path / "again"
    folder.mkdir()
    shutil.copy(calibration, folder)
    monkeypatch.chdir(folder)
    lines = [line.strip() for line in make_card(made).splitlines() if line.startswith("    moeprune ")]
    assert [line.split()[1] for line in lines] == ["collect", "plan", "apply", "eval"]
    for line in lines[:3]:
        words = [str(base) if word == "MODEL" else word for word in line.split()[1:]]
        assert cli.run(words) == 0, line
    for again, first in (
        ("statistics.safetensors",) * 2,
        ("plan.json",) * 2,
        ("PRUNED/model.safetensors", "../model.safetensors"),
    ):
        assert (folder / again).read_bytes() == (made / "moeprune" / first).resolve().read_bytes()


def test_the_command_line_offers_what_python_does() -> None:
    """Every parameter but the token is an option of the same default; a token on a command line could be seen."""
    python = {name: item.default for name, item in inspect.signature(moeprune.push).parameters.items()}
    options = {name: item.default for name, item in inspect.signature(_cli_publish.push).parameters.items()}
    assert options.keys() - python.keys() == {"as_json", "quiet", "verbose"}
    assert python.keys() - options.keys() == {"token"}
    assert {name: options[name] for name in python.keys() & options.keys()} == {
        name: default for name, default in python.items() if name != "token"
    }
