"""Hub data sets by config, split and revision, from a small Hub on this machine that the real client talks to."""

from __future__ import annotations

import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

NEW, OLD = "a" * 40, "b" * 40
COMMITS = {"main": NEW, "old": OLD, NEW: NEW, OLD: OLD}
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


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of the Hub as a data set of a few files needs: commits, listings and files."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        """Serve a file, a listing, or what the data set is."""
        path = urlsplit(self.path).path
        if path.startswith("/datasets/org/name/resolve/"):
            self._file(*path.removeprefix("/datasets/org/name/resolve/").split("/", 1))
        elif path.startswith("/api/datasets/org/name/tree/"):
            self._listing(*path.removeprefix("/api/datasets/org/name/tree/").partition("/")[::2])
        elif path.startswith("/api/datasets/org/name"):
            self._reply(json.dumps({"id": "org/name", "sha": COMMITS[path.rpartition("/")[2]]}))
        else:
            self._missing("RepoNotFound")

    do_HEAD = do_GET  # noqa: N815 - the server calls it

    def log_message(self, *_: Any) -> None:
        """Say nothing."""

    def _file(self, revision: str, name: str) -> None:
        commit = COMMITS.get(revision)
        if commit is None:
            self._missing("RevisionNotFound")
        elif name in FILES[commit]:
            tag = hashlib.sha256(FILES[commit][name].encode()).hexdigest()
            self._reply(FILES[commit][name], {"ETag": f'"{tag}"', "X-Repo-Commit": commit})
        else:
            self._missing("EntryNotFound", {"X-Repo-Commit": commit})

    def _listing(self, commit: str, folder: str) -> None:
        entries = [
            {"type": "file", "path": name, "size": len(text), "oid": hashlib.sha256(text.encode()).hexdigest()}
            for name, text in FILES[COMMITS[commit]].items()
            if name.rpartition("/")[0] == folder
        ]
        self._reply(json.dumps(entries))

    def _missing(self, code: str, headers: dict[str, str] | None = None) -> None:
        self._reply("{}", {"X-Error-Code": code} | (headers or {}), status=404)

    def _reply(self, text: str, headers: dict[str, str] | None = None, *, status: int = 200) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(text)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(text.encode())


@pytest.fixture
def endpoint() -> Iterator[str]:
    """Address of a running Hub."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def load(endpoint: str, home: Path, *sources: str, **environment: str) -> list[tuple[Any, dict[str, Any]]]:
    """Token ids and provenance of each source, or the error, from a fresh process with an empty cache."""
    others = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    here = {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0", "HF_DATASETS_OFFLINE": "0"}
    done = subprocess.run(
        [sys.executable, "-c", CLIENT, *sources],
        env=others | here | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "examples/s" not in done.stderr  # no bar where nobody watches
    return [(ids, entry) for ids, entry in map(json.loads, done.stdout.splitlines())]


def test_provenance_names_config_split_and_commit(endpoint: str, tmp_path: Path) -> None:
    """What is left out is filled in, branches are resolved to commits, and a named commit is taken."""
    sources = ["org/name", "x=org/name/part@test", "org/name/part@train[1:]#old", f"org/name/part#{OLD}"]
    wrong = ["org/name/part@none", "org/name/none", "org/name#none", "org/nothing"]
    found = load(endpoint, tmp_path, *sources, *wrong)
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


def test_a_commit_is_not_replaced_by_another_one(endpoint: str, tmp_path: Path) -> None:
    """Without a network the commit at hand is used and named; another one that was asked for is an error."""
    load(endpoint, tmp_path, "org/name")
    [plain, same, other] = load(
        endpoint, tmp_path, "org/name", f"org/name#{NEW}", f"org/name#{OLD}", HF_HUB_OFFLINE="1"
    )
    assert plain == same
    assert (plain[0], plain[1]["revision"]) == ([[4]], NEW)
    assert f"only commit {NEW} is here" in other[0]
