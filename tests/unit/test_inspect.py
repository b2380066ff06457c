"""`moeprune inspect`: what each file is, for people and for programs, and what it says of other files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import moeprune
from moeprune import cli
from moeprune._commands import command_line, source_words
from moeprune.errors import ArtifactError
from moeprune.inspecting import describe
from moeprune.pipeline import BUNDLED
from moeprune.statistics import RouterStatistics

MODEL = BUNDLED / "model"
HEAD = {
    "moeprune_version": "0.1.0",
    "command": {"tasks": ["mc"], "limit": None},
    "inputs": {"base": "b", "pruned": "p"},
}
TASK = {
    "task": "reading",
    "n": 200,
    "unit": "points",
    "base": 0.5,
    "pruned": 0.375,
    "change": -12.5,
    "interval": [-18.0, -7.1],
    "p_adjusted": 0.001,
    "verdict": "loss",
}
REPORT = {
    "schema": "moeprune.report/1",
    **HEAD,
    "partial": True,
    "base_model": "big",
    "pruned_model": "small",
    "margin": 1.0,
    "tasks": [TASK],
    "suite": {"change": -6.0, "interval": [-9.0, -3.0], "verdict": "loss"},
}
ESTIMATE = {"value": 1.25, "interval": [1.1, 1.4]}
TEXT = {
    "schema": "moeprune.text/1",
    **HEAD,
    "base_model": "big",
    "num_experts": 32,
    "perplexity": ESTIMATE,
    "extent": {"documents": 7, "tokens": 90},
    "best": "good",
    "plans": [{"name": "good", "kept": 16, **dict.fromkeys(("perplexity", "ratio", "top1", "kl"), ESTIMATE)}],
    "text": [{"source": "held.jsonl", "domains": ["a", "b"]}],
}
PROBES = {
    "schema": "moeprune.probes/1",
    **HEAD,
    "rows": [
        {
            "probe": "loops",
            "what": "share that loops",
            "unit": "%",
            "n": 64,
            "base": 1.5,
            "pruned": None,
            "change": 3.2,
            "interval": [0.1, 6.0],
        }
    ],
    "warnings": [],
}
SKIP_SCORE = {"rate": 0.489, "ratio": {"value": 1.032, "interval": [1.024, 1.041]}, "top1": {"value": 0.867}}
SKIP = {
    "schema": "moeprune.skip/1",
    **HEAD,
    "command": {"stage": "skip", "policy": "share", "skip_rate": 0.5},
    "base_model": "big",
    "policy": "share",
    "renorm": "none",
    "top_k": 4,
    "documents": 7,
    "tokens": 90,
    "curve": [],
    "perplexity": {"value": 9.5},
    "point": {"target": 0.5, "policy": SKIP_SCORE, "random": {"ratio": {"value": 3.55}}, "oracle": SKIP_SCORE},
    "layers": {},
    "domains": {},
    "classes": {},
    "text": [{"source": "held.jsonl"}],
}
SWEEP = {
    "schema": "moeprune.sweep/1",
    **HEAD,
    "margin": 1.0,
    "points": [{"ratio": "0.25", "kept": 24, "bytes": 1200, "suite": REPORT["suite"], "text": None}],
    "largest_within_margin": "0.25",
}


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model, pruned; read-only."""
    base = moeprune.open_checkpoint(MODEL)
    empty = RouterStatistics.empty(base.moe_layers, num_experts=32, top_k=4, model=base.fingerprint)
    plan = moeprune.plan(empty, MODEL, ratio=0.25, strategy="random", seed=4)
    folder = moeprune.apply(MODEL, plan, tmp_path_factory.mktemp("inspect") / "out")
    empty.save(folder / "moeprune" / "statistics.safetensors")
    return folder


def test_a_pruned_checkpoint_says_where_it_came_from(out: Path) -> None:
    """Beside what any checkpoint says there are the command and the fingerprint of the base; a base has neither."""
    found, base = describe(out), describe(MODEL)
    assert found.lines["pruned by"].startswith("moeprune plan STATISTICS MODEL --strategy random --ratio 0.25")
    assert base.facts["fingerprint"] in found.lines["pruned from"]
    assert found.facts["pruned"]["experts"] == {"before": 32, "after": 24}
    assert found.lines["experts"] == "24 per layer, top-4"
    assert "pruned" not in base.facts
    assert "pruned by" not in base.lines


def test_a_plan_says_what_it_decides(out: Path) -> None:
    """Strategy, counts, size, engines, and of which model."""
    found = describe(out / "moeprune" / "plan.json")
    assert (found.kind, found.facts["strategy"], found.facts["kept"], found.facts["of"]) == ("plan", "random", 24, 32)
    assert found.lines["experts"] == "keep 24 of 32 in layers 0-3"
    assert found.lines["of model"] == describe(MODEL).facts["fingerprint"]
    assert found.lines["size"].startswith("4.1 MB -> ")
    assert found.lines["loads in"] == "transformers, vllm, sglang, llama.cpp"


def test_statistics_say_what_was_seen(out: Path) -> None:
    """Tokens, layers, experts, and what was measured; without data that is none."""
    found = describe(out / "moeprune" / "statistics.safetensors")
    assert (found.kind, found.facts["tokens"], found.facts["layers"]) == ("statistics", 0, [0, 1, 2, 3])
    assert found.lines["layers"] == "0-3, 32 experts each, top-4"
    assert "gated_norm_sum" in found.facts["statistics"]
    assert found.facts["observations"] == {}


@pytest.mark.parametrize(
    ("payload", "expected"),
    [
        (REPORT, ["small against big", "NOT the full benchmark", "-6.0 points (-9.0..-3.0): loss", "-12.5"]),
        (TEXT, ["--text held.jsonl", "7 documents, 90 predicted tokens", "1.250", "16/32"]),
        (
            SKIP,
            [
                "--heldout held.jsonl --policy share --skip-rate 0.5",
                "top-4",
                "48.9",
                "1.024..1.041",
                "3.550",
            ],
        ),
        (PROBES, ["share that loops", "+3.2 %", "0.1..6"]),
        (SWEEP, ["0.25 is the largest ratio whose loss stays within 1 points", "-6.0", "1.2 kB"]),
    ],
)
def test_reports_show_their_figures(
    payload: dict[str, Any], expected: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every kind of report has a screenful of its own, and one object for programs."""
    file = tmp_path / "report.json"
    file.write_text(json.dumps(payload))
    assert cli.run(["inspect", str(file)]) == 0
    told = capsys.readouterr().out
    made_by = {SWEEP["schema"]: "moeprune sweep", SKIP["schema"]: "moeprune skip"}.get(
        payload["schema"], "moeprune eval"
    )
    for text in (*expected, made_by, "of base"):
        assert text in told
    assert len(told.splitlines()) < 40
    assert cli.run(["inspect", str(file), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["schema"] == payload["schema"]
    assert found["command"] == payload["command"]


def test_long_tables_are_cut(tmp_path: Path) -> None:
    """Of many tasks a screenful is shown, and how many more there are."""
    file = tmp_path / "report.json"
    file.write_text(json.dumps(REPORT | {"tasks": [TASK | {"task": f"task {number}"} for number in range(40)]}))
    found = describe(file)
    assert len(found.rows) == 17
    assert found.rows[-1][0] == "and 25 more"
    assert len(found.facts["tasks"]) == 40


def test_other_files_are_named_with_what_would_do(out: Path, tmp_path: Path) -> None:
    """A config, a shard, a folder of records, a file of another program or a later version: each error says so."""
    cases = {
        out / "config.json": ("has no schema", f"inspect {out}"),
        out / "model.safetensors": ("has no schema", f"inspect {out}"),
        out / "moeprune": ("it holds manifest.json, plan.json, provenance.json", "name one of them"),
        out / "moeprune" / "manifest.json": ("its schema is 'moeprune.manifest/1'", "expected: "),
        Path(__file__): ("has no schema", "expected: a checkpoint folder"),
    }
    later = tmp_path / "plan.json"
    later.write_text(json.dumps({"schema": "moeprune.plan/2"}))
    cases[later] = ("which this version does not read", "update")
    for path, (message, hint) in cases.items():
        with pytest.raises(ArtifactError) as caught:
            describe(path)
        assert message in caught.value.message
        assert hint in caught.value.hint
    (tmp_path / "empty").mkdir()
    with pytest.raises(moeprune.CheckpointError, match=r"has no config\.json"):
        describe(tmp_path / "empty")


@pytest.mark.parametrize(
    ("payload", "keys"),
    [
        (REPORT, ("command", "inputs", "tasks", "suite")),
        (TEXT, ("plans", "perplexity", "extent")),
        (PROBES, ("rows",)),
        (SWEEP, ("points",)),
    ],
)
def test_damaged_files_are_one_line(payload: dict[str, Any], keys: tuple[str, ...], tmp_path: Path) -> None:
    """A field that is gone or of another kind is an error that names the file, whatever the kind."""
    file = tmp_path / "file.json"
    for key in keys:
        without = {name: value for name, value in payload.items() if name != key}
        for broken in (without, payload | {key: 7}):
            file.write_text(json.dumps(broken))
            with pytest.raises(ArtifactError, match=r"file\.json is a damaged moeprune\."):
                describe(file)


def test_a_provenance_alone_is_described(out: Path, tmp_path: Path) -> None:
    """It says the counts, the architecture, the size, and the Hub's name of the source where that is known."""
    record = json.loads((out / "moeprune" / "provenance.json").read_text())
    file = tmp_path / "provenance.json"
    file.write_text(json.dumps(record | {"source": {"repo": "org/big", "revision": "abc"}}))
    found = describe(file)
    assert found.lines["experts"] == "24 of 32 kept, org/big at abc"
    assert found.facts["source"]["repo"] == "org/big"
    shutil.copy(out / "moeprune" / "provenance.json", file)
    assert describe(file).lines["experts"] == "24 of 32 kept"


def test_canonical_commands_become_command_lines() -> None:
    """What is off, empty or as by default when left out is left out; names with spaces are quoted."""
    command = {
        "stage": "plan",
        "ratio": "0.5",
        "guard": False,
        "shuffle": False,
        "pack": True,
        "target": [],
        "layers": [0, 2],
        "weights": {"code": 2.0, "prose": 1.0},
        "num_fewshot": None,
        "seed": 0,
        "backend": "vllm",
    }
    assert command_line(command, "my stats", "MODEL") == (
        "moeprune plan 'my stats' MODEL --ratio 0.5 --no-guard --pack --layers 0,2 --weights code=2.0,prose=1.0 "
        "--seed 0 --model vllm"
    )
    assert command_line({"guard": True}, name="eval") == "moeprune eval"
    hub = {"source": "org/d", "config": "c", "split": "train", "revision": "abc", "domains": ["a"]}
    assert source_words([hub, {"source": "x.jsonl", "domains": ["a", "b"]}]) == [
        *("--calibration", "a=org/d/c@train#abc"),
        *("--calibration", "x.jsonl"),
    ]
