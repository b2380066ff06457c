"""Hub data sets by config, split and revision, from a small Hub on this machine that the real client talks to."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

NEW, OLD = "a" * 40, "b" * 40
CARD = """---
configs:
- config_name: part
  data_files:
  - {split: train, path: part/train.jsonl}
  - {split: test, path: part/test.jsonl}
- config_name: other
  data_files: other.jsonl
  default: true
---
"""


def rows(*numbers: int) -> str:
    """One row of one token id per line."""
    return "".join(json.dumps({"input_ids": [number]}) + "\n" for number in numbers)


FILES = {
    NEW: {
        "README.md": CARD,
        "part/train.jsonl": rows(1, 2),
        "part/test.jsonl": rows(3),
        "other.jsonl": rows(4),
    },
    OLD: {"README.md": CARD, "part/train.jsonl": rows(5, 6), "part/test.jsonl": rows(7), "other.jsonl": rows(8)},
}
# Loads every source that it is given; an error stands for itself.
CLIENT = """
import json, sys
from pathlib import Path
from moeprune.calibration import load_calibration
from moeprune.errors import ConfigError
for source in sys.argv[1:]:
    try:
        data = load_calibration(source, Path("nowhere"))
        print(json.dumps([list(data.sequences), data.provenance[0]]))
    except ConfigError as error:
        print(json.dumps([str(error), {}]))
"""


@pytest.fixture
def environment(hub: Any, hub_environment: dict[str, str]) -> dict[str, str]:
    """Of a process that asks a Hub with one data set of two commits."""
    made = hub.add("org/name", {}, kind="datasets")
    made.commits |= {commit: {name: text.encode() for name, text in files.items()} for commit, files in FILES.items()}
    made.branches |= {"main": NEW, "old": OLD}
    return hub_environment


def load(environment: dict[str, str], *sources: str) -> list[tuple[Any, dict[str, Any]]]:
    """Token ids and provenance of each source, or the error, from a fresh process."""
    done = subprocess.run(
        [sys.executable, "-c", CLIENT, *sources],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "examples/s" not in done.stderr  # no bar where nobody watches
    return [(ids, entry) for ids, entry in map(json.loads, done.stdout.splitlines())]


def test_provenance_names_config_split_and_commit(environment: dict[str, str]) -> None:
    """What is left out is filled in, branches are resolved to commits, and a named commit is taken."""
    sources = ["org/name", "x=org/name/part@test", "org/name/part@train[1:]#old", f"org/name/part#{OLD}"]
    wrong = ["org/name/part@none", "org/name/none", "org/name#none", "org/nothing"]
    found = load(environment, *sources, *wrong)
    keys = ("source", "config", "split", "revision")
    assert [(ids, *map(entry.get, keys)) for ids, entry in found[:4]] == [
        ([[4]], "org/name", "other", "train", NEW),
        ([[3]], "org/name", "part", "test", NEW),
        ([[6]], "org/name", "part", "train[1:]", OLD),
        ([[5], [6]], "org/name", "part", "train", OLD),
    ]
    assert found[1][1] == dict(zip(keys, ("org/name", "part", "test", NEW), strict=True)) | {
        "columns": ["input_ids"],
        "domains": ["x"],
        "rows": 1,
        "sequences": 1,
        "tokens": 1,
        "max_length": 2048,
        "packed": False,
        "shuffle_seed": None,
        "sha256": found[1][1]["sha256"],
    }
    for (error, _), source in zip(found[4:], wrong, strict=True):
        assert error.startswith(f"cannot load data set {source!r}: ")


def test_a_commit_is_not_replaced_by_another_one(environment: dict[str, str]) -> None:
    """Without a network the commit at hand is used and named; another one that was asked for is an error."""
    load(environment, "org/name")
    offline = environment | {"HF_HUB_OFFLINE": "1"}
    [plain, same, other] = load(offline, "org/name", f"org/name#{NEW}", f"org/name#{OLD}")
    assert plain == same
    assert (plain[0], plain[1]["revision"]) == ([[4]], NEW)
    assert f"only commit {NEW} is here" in other[0]
