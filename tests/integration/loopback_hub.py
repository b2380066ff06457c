"""As much of the Hub as models and data sets of a few files need, on this machine: for the real client, with faults."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import http.server
import json
import re
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = "hf_loopback_secret_token"  # noqa: S105 - of a Hub that lives as long as a test
OWNERS = {"org", "me"}


@dataclass
class Repository:
    """A repository: what each commit holds, and the commit of each branch."""

    private: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def commit_of(self, revision: str) -> str | None:
        """The commit that a branch or a commit's own id names."""
        found = self.branches.get(revision, revision)
        return found if found in self.commits else None

    def commit(self, branch: str, files: Mapping[str, bytes], message: str = "") -> str:
        """Put files on a branch."""
        digest = hashlib.sha1(usedforsecurity=False)
        for name, data in sorted(files.items()):
            digest.update(f"{name}\0{len(data)}\0".encode() + data)
        digest.update(f"{branch}\0{len(self.messages)}".encode())
        oid = digest.hexdigest()
        self.commits[oid], self.branches[branch] = dict(files), oid
        self.messages.append(message)
        return oid


class LoopbackHub:
    """A Hub that listens on this machine only.

    Attributes:
        endpoint: its address; ``token``: the one that it takes.
        repositories: by kind and name, such as ``models/org/name``.
        requests: method and path of all that it was asked.
        uploads: digests of the large files that it was sent.
        storage: large files by digest.
        faults: statuses that the next requests get whose method and path hold a text.
        pauses: requests whose method and path hold a text wait for its event.
        chunks: folder for the chunks of files that come by Xet; in the commit then stands the file's digest.
    """

    token = TOKEN

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.requests: list[str] = []
        self.uploads: list[str] = []
        self.storage: dict[str, bytes] = {}
        self.faults: dict[str, list[int]] = {}
        self.pauses: dict[str, threading.Event] = {}
        self.endpoint = ""
        self.chunks: Path | None = None

    def add(self, name: str, files: Mapping[str, bytes], *, kind: str = "models", private: bool = False) -> Repository:
        """A repository with one commit on ``main``."""
        made = self.repositories[f"{kind}/{name}"] = Repository(private=private)
        made.commit("main", files)
        return made

    def files(self, name: str, branch: str = "main") -> dict[str, bytes]:
        """What a branch of a model's repository holds."""
        found = self.repositories[f"models/{name}"]
        return found.commits[found.branches[branch]]

    @contextlib.contextmanager
    def running(self) -> Iterator[LoopbackHub]:
        """Answer requests."""
        handler = type("Handler", (_Handler,), {"hub": self})
        with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
            threading.Thread(target=server.serve_forever, daemon=True).start()
            self.endpoint = f"http://127.0.0.1:{server.server_port}"
            yield self
            server.shutdown()


def is_large(name: str, size: int) -> bool:
    """Whether a file goes to the large file storage."""
    return name.endswith(".safetensors") or size > 1_000_000


def git_oid(data: bytes) -> str:
    """How git names a file's content."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


def remote_oid(name: str, data: bytes) -> str:
    """How the Hub names a file's content."""
    return hashlib.sha256(data).hexdigest() if is_large(name, len(data)) else git_oid(data)


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: LoopbackHub

    def log_message(self, *_: Any) -> None:
        """Say nothing."""

    def do_GET(self) -> None:
        """Serve what a repository is, a listing, or a file."""
        self._answer(
            [
                (r"/api/(models|datasets)/([^/]+/[^/]+)(?:/revision/(.+))?", self._info),
                (r"/api/(models)/([^/]+/[^/]+)/xet-write-token/(.+)", self._xet_token),
                (r"/api/(models|datasets)/([^/]+/[^/]+)/tree/([^/]+)(?:/(.*))?", self._tree),
                (r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", self._file),
            ]
        )

    do_HEAD = do_GET  # noqa: N815 - the server calls it

    def do_POST(self) -> None:
        """Make repositories, branches and commits."""
        self._answer(
            [
                (r"/api/validate-yaml", lambda: self._json({"errors": [], "warnings": []})),
                (r"/api/repos/create", self._create),
                (r"/api/(models)/([^/]+/[^/]+)/branch/(.+)", self._branch),
                (r"/api/(models)/([^/]+/[^/]+)/preupload/(.+)", self._preupload),
                (r"/api/(models)/([^/]+/[^/]+)/commit/(.+)", self._commit),
                (r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", self._batch),
            ]
        )

    def do_PUT(self) -> None:
        """Take a large file."""
        self._answer([(r"/_lfs/(\w+)", self._store)])

    # --- before anything else -----------------------------------------------------------------------------------------

    def _answer(self, routes: list[tuple[str, Any]]) -> None:
        split = urlsplit(self.path)
        path, self.query = unquote(split.path), parse_qs(split.query)
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        asked = f"{self.command} {path}"
        self.hub.requests.append(asked)
        for part, event in self.hub.pauses.items():
            if part in asked:
                event.wait(60)
        for part, statuses in self.hub.faults.items():
            if part in asked and statuses:
                self._json({"error": "injected"}, statuses.pop(0))
                return
        if self.headers.get("Authorization") not in {None, f"Bearer {TOKEN}"}:
            message = {"X-Error-Message": "Invalid credentials in Authorization header"}
            self._json({"error": "Invalid username or password."}, 401, message)
            return
        for pattern, serve in routes:
            if found := re.fullmatch(pattern, path):
                serve(*found.groups())
                return
        self._missing("RepoNotFound")

    def _repository(self, kind: str, name: str) -> Repository | None:
        """The repository, where whoever asks may see it."""
        found = self.hub.repositories.get(f"{kind}/{name}")
        known = self.headers.get("Authorization") is not None
        if found is None or (found.private and not known):
            self._missing("RepoNotFound")
            return None
        return found

    # --- reading ------------------------------------------------------------------------------------------------------

    def _info(self, kind: str, name: str, revision: str | None) -> None:
        if (repository := self._repository(kind, name)) is None:
            return
        if (commit := repository.commit_of(revision or "main")) is None:
            self._missing("RevisionNotFound")
            return
        siblings = [{"rfilename": path} for path in repository.commits[commit]]
        told = {"id": name, "sha": commit, "private": repository.private, "tags": [], "siblings": siblings}
        self._json(told)

    def _tree(self, kind: str, name: str, revision: str, folder: str | None) -> None:
        if (repository := self._repository(kind, name)) is None:
            return
        if (commit := repository.commit_of(revision)) is None:
            self._missing("RevisionNotFound")
            return
        everything = self.query.get("recursive", ["false"])[0].lower() == "true"
        self._json(
            [
                {"type": "file", "path": path, "size": len(data), "oid": git_oid(data)}
                for path, data in repository.commits[commit].items()
                if everything or path.rpartition("/")[0] == (folder or "")
            ]
        )

    def _file(self, datasets: str | None, name: str, revision: str, path: str) -> None:
        if (repository := self._repository("datasets" if datasets else "models", name)) is None:
            return
        commit = repository.commit_of(revision)
        if commit is None:
            self._missing("RevisionNotFound")
        elif path not in repository.commits[commit]:
            self._missing("EntryNotFound", {"X-Repo-Commit": commit})
        else:
            data = repository.commits[commit][path]
            self._send(data, headers={"ETag": f'"{remote_oid(path, data)}"', "X-Repo-Commit": commit})

    # --- writing ------------------------------------------------------------------------------------------------------

    def _create(self) -> None:
        asked = json.loads(self.body)
        name = f"{asked['organization']}/{asked['name']}"
        if self.headers.get("Authorization") is None:
            self._json({"error": "Unauthorized"}, 401)
        elif asked["organization"] not in OWNERS:
            self._json({"error": f"no right to create a model under {asked['organization']}"}, 403)
        elif f"models/{name}" in self.hub.repositories:
            self._json({"error": "You already created this model repo"}, 409)
        else:
            private = asked.get("visibility") == "private" or bool(asked.get("private"))
            self.hub.add(name, {".gitattributes": b"*.safetensors filter=lfs\n"}, private=private)
            self._json({"url": f"{self.hub.endpoint}/{name}", "name": name})

    def _branch(self, kind: str, name: str, branch: str) -> None:
        if (repository := self._repository(kind, name)) is None:
            return
        if branch in repository.branches:
            self._json({"error": "Reference already exists"}, 409)
        else:
            repository.branches[branch] = repository.branches["main"]
            self._json({})

    def _preupload(self, kind: str, name: str, revision: str) -> None:
        if (repository := self._repository(kind, name)) is None:
            return
        there = repository.commits[repository.commit_of(revision) or repository.branches["main"]]
        self._json(
            {
                "files": [
                    {
                        "path": file["path"],
                        "uploadMode": "lfs" if is_large(file["path"], file["size"]) else "regular",
                        "shouldIgnore": False,
                        "oid": remote_oid(file["path"], there[file["path"]]) if file["path"] in there else None,
                    }
                    for file in json.loads(self.body)["files"]
                ]
            }
        )

    def _batch(self, name: str) -> None:
        if self._repository("models", name) is None:
            return
        objects: list[dict[str, Any]] = []
        for wanted in json.loads(self.body)["objects"]:
            upload = {"upload": {"href": f"{self.hub.endpoint}/_lfs/{wanted['oid']}", "header": {}}}
            new = wanted["oid"] not in self.hub.storage
            objects.append(dict(wanted) | ({"actions": upload} if new else {}))
        self._json({"transfer": "basic", "objects": objects})

    def _xet_token(self, kind: str, name: str, revision: str) -> None:
        if self._repository(kind, name) is None:
            return
        told = {"casUrl": f"local://{self.hub.chunks}", "exp": int(time.time()) + 3600, "accessToken": "chunks"}
        headers = {
            "X-Xet-Cas-Url": told["casUrl"],
            "X-Xet-Token-Expiration": told["exp"],
            "X-Xet-Access-Token": "chunks",
        }
        self._json(told, headers={key: str(value) for key, value in headers.items()})

    def _store(self, oid: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != oid:
            self._json({"error": "not what its digest says"}, 400)
            return
        self.hub.storage[oid] = self.body
        self.hub.uploads.append(oid)
        self._json({})

    def _commit(self, kind: str, name: str, revision: str) -> None:
        if (repository := self._repository(kind, name)) is None:
            return
        lines = [json.loads(line) for line in self.body.splitlines() if line.strip()]
        head, changes = lines[0]["value"], lines[1:]
        if head.get("parentCommit", repository.branches[revision]) != repository.branches[revision]:
            self._json({"error": "A commit has happened since"}, 412)
            return
        files = dict(repository.commits[repository.branches[revision]])
        for change in changes:
            value = change["value"]
            if change["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif change["key"] == "lfsFile":
                files[value["path"]] = self.hub.storage.get(value["oid"], value["oid"].encode())
            else:
                del files[value["path"]]
        pulled = "create_pr" in self.query
        branch = f"refs/pr/{len(repository.branches)}" if pulled else revision
        oid = repository.commit(branch, files, head["summary"])
        url = f"{self.hub.endpoint}/{name}"
        request = f"{url}/discussions/{branch.rpartition('/')[2]}" if pulled else None
        self._json({"commitUrl": f"{url}/commit/{oid}", "commitOid": oid, "pullRequestUrl": request, "success": True})

    # --- answers ------------------------------------------------------------------------------------------------------

    def _missing(self, code: str, headers: Mapping[str, str] | None = None) -> None:
        self._json({}, 404, {"X-Error-Code": code} | dict(headers or {}))

    def _json(self, value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> None:
        self._send(json.dumps(value).encode(), status, {"Content-Type": "application/json"} | dict(headers or {}))

    def _send(self, data: bytes, status: int = 200, headers: Mapping[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)
