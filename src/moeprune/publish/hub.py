"""A model repository on the Hub that is to be written: what is there, one commit, and errors that people can act on."""

from __future__ import annotations

import contextlib
import logging
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moeprune import _files
from moeprune._version import __version__
from moeprune.errors import PublishError, first_line

if TYPE_CHECKING:
    from huggingface_hub import HfApi

ON = "push again: what has arrived is not sent twice"
_WEIGHTS = re.compile(r"[^/]+\.(safetensors|safetensors\.index\.json|bin|bin\.index\.json)")
# What a new repository may have before anything is pushed to it.
_NEUTRAL = re.compile(r"\.gitattributes|\.gitignore|README\.md|LICENSE(\.\w+)?")


@dataclass(frozen=True, slots=True, kw_only=True)
class Commit:
    """What became of a commit: its id, the address of a pull request, and whether the Hub lacked anything of it."""

    oid: str
    pull_request: str
    changed: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class HubRepo:
    """A repository that exists, or is about to.

    Attributes:
        api: the client.
        name: ``org/name``.
        private: whether only its owner sees it.
        branch: that is written; None is the default one.
        head: commit on it; empty where there is none yet.
        exists: whether the repository is there.
    """

    api: HfApi
    name: str
    private: bool
    branch: str | None
    head: str
    exists: bool

    @classmethod
    def connect(cls, name: str, token: str | None, *, private: bool, branch: str | None, create_pr: bool) -> HubRepo:
        """Look whether the repository is there and what it may become; nothing is written.

        Raises:
            PublishError: there is no token, the Hub does not answer, or the repository is not as private as asked for.
        """
        from huggingface_hub import HfApi, get_token
        from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

        with _told(name):
            if not (token or get_token()):
                raise PublishError("not logged in to the Hub", "run `hf auth login`, or set HF_TOKEN")
            api = HfApi(token=token, library_name="moeprune", library_version=__version__)
            try:
                found = api.model_info(name)
            except RepositoryNotFoundError:
                if create_pr:
                    raise PublishError(
                        f"there is no {name} to open a pull request on", "leave --create-pr out to make it"
                    ) from None
                return cls(api=api, name=name, private=private, branch=branch, head="", exists=False)
            if bool(found.private) != private:
                raise PublishError(*_other_visibility(name, public=private))
            head = str(found.sha or "")
            if branch is not None:
                with contextlib.suppress(RevisionNotFoundError):  # it is made from the default one
                    head = str(api.model_info(name, revision=branch).sha or "")
            return cls(api=api, name=name, private=private, branch=branch, head=head, exists=True)

    @property
    def url(self) -> str:
        """Where people see it."""
        return f"{self.api.endpoint}/{self.name}"

    def replaced(self, files: Mapping[str, Path], mark: str, *, overwrite: bool) -> list[str]:
        """Files on the Hub that must go, so that no engine takes them for a part of what is pushed.

        Args:
            files: what is pushed, by name in the repository.
            mark: the one that is the same in every push of one checkpoint.
            overwrite: whether they may go.

        Raises:
            PublishError: the repository holds something else, and ``overwrite`` does not say that it may go.
        """
        from huggingface_hub import RepoFile
        from huggingface_hub.utils.sha import git_hash

        if not self.exists:
            return []
        with _told(self.name):
            listed = self.api.list_repo_tree(self.name, recursive=True, revision=self.head or None)
            there = {item.path: item.blob_id for item in listed if isinstance(item, RepoFile)}
        same = there.get(mark) == git_hash(files[mark].read_bytes())
        odd = [
            path
            for path in sorted(there)
            if (_WEIGHTS.fullmatch(path) and path not in files if same else not _NEUTRAL.fullmatch(path))
        ]
        if odd and not overwrite:
            shown = ", ".join(odd[:3]) + (f" and {len(odd) - 3} more" if len(odd) > 3 else "")
            what = "files that are no part of this checkpoint" if same else "something else"
            raise PublishError(
                f"{self.name} holds {what}: {shown}", "push to a new repository, or replace them with --overwrite"
            )
        return [path for path in odd if path not in files]

    def commit(
        self, files: Mapping[str, Path | bytes], removed: Iterable[str], *, message: str, create_pr: bool
    ) -> Commit:
        """Send what the Hub lacks and make it visible in one commit, in a repository that is made where needed.

        Raises:
            PublishError: the Hub refuses, or does not answer.
        """
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete

        with _told(self.name, ON), _progress(), _going_on():
            operations: list[Any] = [
                CommitOperationAdd(path_in_repo=name, path_or_fileobj=data if isinstance(data, bytes) else str(data))
                for name, data in files.items()
            ]
            operations += [CommitOperationDelete(path_in_repo=name) for name in removed]
            if not self.exists:
                self.api.create_repo(self.name, private=self.private)
            if self.branch is not None:
                self.api.create_branch(self.name, branch=self.branch, exist_ok=True)
            done = self.api.create_commit(
                self.name,
                operations,
                commit_message=message,
                revision=self.branch,
                create_pr=create_pr,
                parent_commit=self.head or None,
            )
        changed = bool(done.pr_url) or done.oid != self.head
        return Commit(oid=str(done.oid), pull_request=done.pr_url or "", changed=changed)


def _other_visibility(name: str, *, public: bool) -> tuple[str, str]:
    if public:
        return f"{name} exists and is public", "push with --public if all may see it, or name another repository"
    return f"{name} exists and is private", "leave --public out, and make it public in its settings on the Hub"


# --- while it runs ----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _progress() -> Iterator[None]:
    """The client's own bars on a terminal only, and none of its remarks: we say what matters."""
    from huggingface_hub.utils import logging as remarks
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    shown, level = not are_progress_bars_disabled(), remarks.get_verbosity()
    if _files.quiet.get() or not sys.stderr.isatty():
        disable_progress_bars()
    remarks.set_verbosity(logging.ERROR)
    try:
        yield
    finally:
        remarks.set_verbosity(level)
        if shown:
            enable_progress_bars()


@contextlib.contextmanager
def _going_on() -> Iterator[None]:
    """Say how to go on after Ctrl-C."""
    try:
        yield
    except KeyboardInterrupt:
        _files.note(f"the push is not finished, and nothing of it is visible on the Hub; {ON}")
        raise


# --- errors -----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _told(name: str, further: str = "") -> Iterator[None]:
    """Make one line and a hint of whatever the client raises.

    Args:
        name: of the repository.
        further: what to do where nothing better is known.
    """
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]  # of whichever library the client uses

    try:
        yield
    except PublishError:
        raise
    except (HTTPError, ConnectionError, RuntimeError, ValueError) as error:
        raise PublishError(*_refusal(error, name, further)) from error


def _refusal(error: BaseException, name: str, further: str) -> tuple[str, str]:
    """What to say of an error of the client."""
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    owner = name.partition("/")[0]
    found = next((cause for cause in _chain(error) if isinstance(cause, HfHubHTTPError)), None)
    if found is None:
        if any(isinstance(cause, OfflineModeIsEnabled) for cause in _chain(error)):
            return "the Hub cannot be asked: offline mode is on", "unset HF_HUB_OFFLINE"
        if isinstance(error, ValueError):
            return f"the Hub's client refuses: {first_line(error)}", further
        return f"no answer from the Hub: {first_line(error)}", further or "check the network, and HF_ENDPOINT"
    said = " ".join((found.server_message or first_line(found)).split())
    status = found.response.status_code
    known = {
        401: ("the Hub does not accept the token", "log in again with `hf auth login`, or set HF_TOKEN"),
        403: (
            f"the token may not write to {name}: {said}",
            f"check the name, and that the token has write access to {owner}",
        ),
        404: (f"the Hub has no user or organisation {owner!r}, or none that you may see", "check the name"),
        409: (f"{name} is taken, or was changed by someone else meanwhile", "look at it, and push again"),
        412: (f"{name} was changed by someone else meanwhile", "look at it, and push again"),
        429: ("the Hub asks to wait: too many requests", further or "try again in some minutes"),
    }
    return known.get(status, (f"the Hub answered {status}: {said}", further or "try again later"))


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
