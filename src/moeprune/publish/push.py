"""Push a pruned checkpoint to the Hub: card, weights and the record of how they came about, in one commit.

Nothing is visible on the Hub before that commit, and what has been sent before an interruption is not sent again.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from moeprune._files import PathLike, begin_work
from moeprune.checkpoint import check_inside
from moeprune.errors import PublishError, first_line
from moeprune.publish.card import render_card
from moeprune.publish.evidence import MARKS, Evidence, gather, prove
from moeprune.publish.hub import HubRepo
from moeprune.rewrite.drop import PROVENANCE

CARD = "README.md"
OWN_CARD = f"{PROVENANCE}/README.original.md"
_RECORDS = {".json", ".md", ".html", ".safetensors"}  # of what lies in OUT/moeprune; no logs


@dataclass(frozen=True, slots=True, kw_only=True)
class PushResult:
    """What was pushed, or would be.

    Attributes:
        repo: name on the Hub.
        private: whether only its owner sees it.
        revision: branch that is written.
        files: size in bytes by name in the repository.
        card: text of ``README.md``.
        url: where people see it; empty in a dry run, like what follows.
        commit: its id.
        pull_request: its address, where one was asked for.
        changed: whether the Hub lacked anything of this.
    """

    repo: str
    private: bool
    revision: str
    files: Mapping[str, int]
    card: str
    url: str = ""
    commit: str = ""
    pull_request: str = ""
    changed: bool = False

    @property
    def nbytes(self) -> int:
        """Bytes of all files."""
        return sum(self.files.values())


def push(
    output: PathLike,
    repo: str,
    *,
    private: bool = True,
    create_pr: bool = False,
    revision: str | None = None,
    base: PathLike | None = None,
    base_model: str | None = None,
    licence: str | None = None,
    card: PathLike | None = None,
    samples: bool = False,
    commit_message: str | None = None,
    token: str | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
) -> PushResult:
    """Push a pruned checkpoint to the Hub with a card made from what was measured. Runs without torch.

    Args:
        output: folder that ``prune`` or ``apply`` wrote. Nothing in it is changed.
        repo: ``org/name``; it is made where it does not exist.
        private: only its owner sees the repository. One that exists is refused where it is not as asked for.
        create_pr: open a pull request on a repository that exists, instead of writing to its branch.
        revision: branch, made where it does not exist; by default ``main``.
        base: folder or Hub id of the source: compare every tensor with it first, and say so on the card.
        base_model: the source's name on the Hub, ``org/name`` or ``org/name@revision``, where it is not recorded.
        licence: the source's licence as the Hub calls it, where its card does not name it.
        card: file to send as ``README.md`` in the place of the card that would be made.
        samples: send documents and answers of lm-eval's runs too; they may hold texts of data sets.
        commit_message: of the commit.
        token: of the Hub; by default that of ``hf auth login``, or HF_TOKEN. It is written nowhere.
        overwrite: replace what else the repository holds.
        dry_run: check everything here, send nothing, and ask the Hub nothing.

    Returns:
        What was pushed.

    Raises:
        PublishError: the Hub refuses, the repository holds something else, or all would see what has no known licence.
        StaleArtifactError: a record in the folder is of another model.
        CheckpointError: the weights are not what was recorded.

    Example:
        >>> moeprune.push("pruned", "org/name-pruned", base_model="org/name", dry_run=True).nbytes
    """
    _check_name(repo)
    if create_pr and revision is not None:
        raise PublishError("a pull request is opened on the default branch", "leave --revision or --create-pr out")
    evidence = gather(output, base=base, base_model=base_model, licence=licence)
    text = read_card(card) if card is not None else ""
    if not private:
        _check_licence(evidence, text)
    files = dict(_files_of(evidence.checkpoint.path, samples=samples))
    for name, file in files.items():
        _check_anonymous(name, file)
    hub, removed = None, []
    if not dry_run:
        hub = HubRepo.connect(repo, token, private=private, branch=revision, create_pr=create_pr)
        mark = next(name for name in (f"{PROVENANCE}/{record}" for record in MARKS) if name in files)
        removed = hub.replaced(files, mark, overwrite=overwrite)
    proof = prove(evidence, base)
    text = text or render_card(evidence, proof, repo.partition("/")[2])
    sizes = {CARD: len(text.encode())} | {name: file.stat().st_size for name, file in files.items()}
    planned = PushResult(repo=repo, private=private, revision=revision or "main", files=sizes, card=text)
    if hub is None:
        return planned
    begin_work()
    message = commit_message or _title(evidence)
    done = hub.commit({CARD: text.encode(), **files}, removed, message=message, create_pr=create_pr)
    return dataclasses.replace(
        planned, url=hub.url, commit=done.oid, pull_request=done.pull_request, changed=done.changed
    )


def _title(evidence: Evidence) -> str:
    """Of the commit."""
    kept = f"{evidence.plan.span} experts per layer, " if evidence.plan else ""
    return f"{kept}{evidence.done} by moeprune"


def make_card(
    output: PathLike,
    name: str | None = None,
    *,
    base: PathLike | None = None,
    base_model: str | None = None,
    licence: str | None = None,
) -> str:
    """The card that :func:`push` would send; ``name`` is by default that of the folder, the rest as there."""
    evidence = gather(output, base=base, base_model=base_model, licence=licence)
    return render_card(evidence, prove(evidence, base), name or evidence.checkpoint.path.resolve().name)


def read_card(file: PathLike) -> str:
    """A card of the user's own, whose front matter the Hub's own loader takes.

    Raises:
        PublishError: it cannot be read, or its front matter is wrong.
    """
    from huggingface_hub import ModelCard
    from yaml import YAMLError

    try:
        text = Path(file).read_text(encoding="utf-8")
        ModelCard(text)
    except (OSError, ValueError, YAMLError) as error:
        hint = "start from what `moeprune card` prints"
        raise PublishError(f"{file} is no model card: {first_line(error)}", hint) from error
    return text


def _check_name(repo: str) -> None:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils._validators import validate_repo_id

    try:
        validate_repo_id(repo)
        owner, slash, name = repo.partition("/")
        valid = bool(owner and slash and name)
    except HFValidationError:
        valid = False
    if not valid:
        raise PublishError(f"{repo!r} is no name of a repository", "write org/name")


def _check_licence(evidence: Evidence, card: str) -> None:
    """Refuse to let all see what nobody knows the licence of."""
    from huggingface_hub import ModelCard

    if evidence.licence.known or (card and ModelCard(card).data.get("license")):
        return
    held = f"say which one {', '.join(evidence.licence.files)} is" if evidence.licence.files else "say it"
    raise PublishError("the licence of the base is not known, and all would see the push", f"{held} with --license ID")


# --- files ------------------------------------------------------------------------------------------------------------


def _files_of(folder: Path, *, samples: bool) -> Iterator[tuple[str, Path]]:
    """What is sent, by name in the repository: the checkpoint as it is, and the records without lm-eval's own output.

    A ``README.md`` of the folder goes beside the records, since the card takes its place.
    """
    for file in sorted(folder.rglob("*")):
        parts = file.relative_to(folder).parts
        if not file.is_file() or any(part.startswith(".") for part in parts):
            continue
        name = "/".join(parts)
        if parts[0] == PROVENANCE and not _is_record(parts, samples=samples):
            continue
        check_inside(folder, file)
        yield (OWN_CARD if name == CARD else name), file


def _is_record(parts: tuple[str, ...], *, samples: bool) -> bool:
    raw = len(parts) > 3 or (len(parts) == 3 and parts[1] != "report")
    if raw:  # lm-eval's results name folders of this machine, its samples do not
        return samples and parts[1] == "report" and re.fullmatch(r"samples_.+\.jsonl", parts[-1]) is not None
    return Path(parts[-1]).suffix in _RECORDS


def _check_anonymous(name: str, file: Path) -> None:
    """Refuse a record that names a folder of this machine: an option may have held one."""
    if not name.startswith(f"{PROVENANCE}/") or name == OWN_CARD or file.suffix not in _RECORDS:
        return
    places = {str(Path.home()), str(file.absolute().parents[name.count("/") + 1])} - {"/"}
    marks = [rf"{re.escape(place)}(?![\w.-])" for place in sorted(places)]
    if file.suffix in {".json", ".safetensors"}:
        marks.append(r'(?<=")(/[\w.@ -]+){2,}')
    with file.open("rb") as handle:
        size = 8 + int.from_bytes(handle.read(8), "little") if file.suffix == ".safetensors" else _SCANNED
        handle.seek(0)
        found = re.search("|".join(marks).encode(), handle.read(min(size, _SCANNED)))
    if found is not None:
        raise PublishError(
            f"{name} names a folder of this machine: {found[0].decode()}", "make it again with relative paths"
        )


_SCANNED = 50_000_000  # bytes of a record that are looked through; of arrays the header alone, for numbers name nothing
