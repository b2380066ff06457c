"""Everything that is known of a pruned checkpoint, read from its own folder: what a card may say."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moeprune._files import PathLike
from moeprune.accounts import Account
from moeprune.checkpoint import Checkpoint, open_checkpoint
from moeprune.errors import PublishError, StaleArtifactError
from moeprune.evaluation.page.changes import accounts_of
from moeprune.evaluation.page.sources import ReportSources, find, read
from moeprune.plans import PruningPlan
from moeprune.plans_fuse import FusePlan
from moeprune.publish.licence import Licence, find_licence, read_front_matter
from moeprune.rewrite.drop import PROVENANCE
from moeprune.rewrite.verify import Verification, verify_manifest
from moeprune.rewrite.verify_output import verify_output

MARKS = ("plan.json", "healing.json")  # of the records, what says what was done
_HUB_ID = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w./-]+))?")


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseModel:
    """The model that was pruned, as the Hub knows it; an empty name where that is not known."""

    repo: str = ""
    revision: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """What a card is made from.

    Attributes:
        checkpoint: the pruned one.
        plan: which experts stayed, where experts were left out.
        accounts: what else was done, in its order.
        sources: the artifacts in its folder, the plan among them.
        base: the model that was pruned.
        front_matter: what the base's own card says of itself.
        licence: of both.
    """

    checkpoint: Checkpoint
    plan: PruningPlan | None
    accounts: tuple[Account, ...]
    sources: ReportSources
    base: BaseModel
    front_matter: Mapping[str, Any]
    licence: Licence

    @property
    def done(self) -> str:
        """What the model is called after what was done to it, such as ``pruned``."""
        return " and ".join([*(["pruned"] if self.plan else []), *(account.done for account in self.accounts)])


@dataclass(frozen=True, slots=True, kw_only=True)
class Proof:
    """What is known of the weights' bytes.

    Attributes:
        verification: what was compared; None where there is no record to compare with.
        with_source: with the source itself; else with the digests that were recorded when it was copied.
    """

    verification: Verification | None
    with_source: bool = False


def gather(
    output: PathLike, *, base: PathLike | None = None, base_model: str | None = None, licence: str | None = None
) -> Evidence:
    """Read what a pruned checkpoint's folder says of it; no tensor is read.

    Args:
        output: the checkpoint.
        base: what it was made from; a Hub id is its name too.
        base_model: the base's name on the Hub, ``org/name`` or ``org/name@revision``; by default what is recorded.
        licence: the base's licence, where its card does not name it.

    Raises:
        PublishError: the folder was not written by moeprune, or an argument contradicts what it says.
        StaleArtifactError: a report or statistics file in it is of another model.
        ArtifactError: a file in it is damaged.
    """
    folder = Path(output)
    checkpoint = open_checkpoint(folder)
    if not any((folder / PROVENANCE / name).is_file() for name in MARKS):
        raise PublishError(
            f"{folder} has no {PROVENANCE}/{MARKS[0]}: a card could say nothing of it",
            "name a folder that `moeprune prune` or `apply` wrote; others are pushed with `hf upload`",
        )
    places = [folder / PROVENANCE, folder / PROVENANCE / "report"]
    sources = read(find(place for place in places if place.is_dir()))
    _check_own(checkpoint, sources)
    front_matter = read_front_matter(folder)
    if base_model is None and base is not None and not Path(base).exists():
        base_model = str(base)
    return Evidence(
        checkpoint=checkpoint,
        plan=sources.plan,
        accounts=accounts_of(sources),
        sources=sources,
        base=_base_model(base_model, (sources.provenance or {}).get("source", {})),
        front_matter=front_matter,
        licence=find_licence(folder, front_matter, licence),
    )


def _check_own(checkpoint: Checkpoint, sources: ReportSources) -> None:
    """Refuse a plan or a report that is not of these very weights."""
    counts = {layer: checkpoint.own_counts.get(layer, checkpoint.num_experts) for layer in checkpoint.all_moe_layers}
    if _planned(sources, counts) != counts:
        raise StaleArtifactError(
            f"{checkpoint.path}: its plan and its weights do not have the same experts", "apply the plan again"
        )
    change = sources.change
    edits = change.config_edits if change is not None else {}
    odd = next((key for key, value in edits.items() if _at(checkpoint.config, key) != value), None)
    if odd is not None:
        raise StaleArtifactError(
            f"{checkpoint.path}: its plan says {odd} = {edits[odd]}, and its config does not", "make it again"
        )
    report = sources.report
    evaluated = report.inputs.get("pruned") if report and "tasks" in report.command else None
    if evaluated not in (None, checkpoint.fingerprint):
        raise StaleArtifactError(
            f"the report in {checkpoint.path / PROVENANCE} is of other weights", "evaluate this checkpoint again"
        )


def _planned(sources: ReportSources, counts: Mapping[int, int]) -> Mapping[int, int]:
    """Experts by layer as the plan says; as found where it says nothing of them."""
    if sources.plan is not None:
        return sources.plan.counts
    return sources.change.as_drop().counts if isinstance(sources.change, FusePlan) else counts


def _at(config: Mapping[str, Any], key: str) -> Any:
    """The value of a key such as ``text_config.num_experts``."""
    found: Any = config
    for part in key.split("."):
        found = found.get(part) if isinstance(found, Mapping) else None
    return found


def _base_model(given: str | None, recorded: Mapping[str, str]) -> BaseModel:
    if given is None:
        return BaseModel(repo=recorded.get("repo", ""), revision=recorded.get("revision", ""))
    found = _HUB_ID.fullmatch(given)
    if found is None:
        raise PublishError(f"{given!r} is no model on the Hub", "write --base-model org/name or org/name@revision")
    repo, revision = found["repo"], found["revision"] or ""
    if recorded and recorded["repo"] != repo:
        raise PublishError(f"this was made from {recorded['repo']}, not from {repo}", "leave --base-model out")
    return BaseModel(repo=repo, revision=revision or recorded.get("revision", ""))


def prove(evidence: Evidence, base: PathLike | None = None) -> Proof:
    """Compare the weights with the source where it is named, or else with what was recorded when it was copied.

    Args:
        evidence: of the checkpoint.
        base: folder or Hub id of the source; of the latter the recorded commit is taken, where there is one.

    Raises:
        CheckpointError: something differs; the message names it.
    """
    checkpoint = evidence.checkpoint
    if base is not None:
        source = open_checkpoint(base, revision=evidence.base.revision or None)
        return Proof(verification=verify_output(source, checkpoint.path), with_source=True)
    recorded = (checkpoint.path / PROVENANCE / "manifest.json").is_file()
    return Proof(verification=verify_manifest(checkpoint) if recorded else None)
