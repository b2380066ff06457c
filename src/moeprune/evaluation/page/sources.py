"""What a page is drawn from: artifacts that were found in folders, and that belong to one model."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moeprune._files import PathLike, read_artifact
from moeprune.accounts import HEALING
from moeprune.checkpoint import open_checkpoint
from moeprune.errors import ArtifactError, ConfigError, StaleArtifactError
from moeprune.evaluation.compare import EvalReport
from moeprune.evaluation.curve import SCHEMA as SWEEP
from moeprune.evaluation.probes import SCHEMA as PROBES
from moeprune.evaluation.skip_report import SCHEMA as SKIP
from moeprune.evaluation.text import SCHEMA as TEXT
from moeprune.plan_kinds import AnyPlan, ChangePlan, load_plan
from moeprune.plans import PruningPlan
from moeprune.rewrite.drop import PROVENANCE
from moeprune.statistics import RouterStatistics

Json = Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportSources:
    """The artifacts of one page; at least one of them.

    Attributes:
        report: what lm-eval's tasks say.
        plan: which experts stay, where that is what was decided.
        change: what else was decided: a plan of any other kind.
        healing: what ``healing.json`` of a healed checkpoint holds.
        statistics: what calibration saw.
        provenance: what ``provenance.json`` of a pruned checkpoint holds.
        probes: what ``probes.json`` holds.
        sweep: what ``sweep.json`` holds.
        text: what ``text.json`` of ``moeprune eval --text`` holds.
        skip: what ``skip.json`` holds: the cost of skipping on held-out text.
        digests: sha256 of the files that they were read from, by file name.
    """

    report: EvalReport | None = None
    plan: PruningPlan | None = None
    change: ChangePlan | None = None
    healing: Json | None = None
    statistics: RouterStatistics | None = None
    provenance: Json | None = None
    probes: Json | None = None
    sweep: Json | None = None
    text: Json | None = None
    skip: Json | None = None
    digests: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.present:
            raise ConfigError("a page needs something to show", "name a pruned checkpoint or the folder of a report")

    @property
    def present(self) -> tuple[str, ...]:
        """Names of the artifacts that are there."""
        return tuple(name for name in (*FILES, "change") if getattr(self, name) is not None)


def _json(schema: str) -> Callable[[Path], Json]:
    return lambda path: read_artifact(path, schema)


def _report(path: Path) -> EvalReport:
    return EvalReport.from_json(path.read_bytes(), path)


# What each artifact's file is called, and how it is read.
FILES: Mapping[str, tuple[str, Callable[[Path], Any]]] = {
    "report": ("report.json", _report),
    "plan": ("plan.json", load_plan),
    "healing": ("healing.json", _json(HEALING)),
    "statistics": ("statistics.safetensors", RouterStatistics.load),
    "provenance": ("provenance.json", _json("moeprune.provenance/1")),
    "probes": ("probes.json", _json(PROBES)),
    "sweep": ("sweep.json", _json(SWEEP)),
    "text": ("text.json", _json(TEXT)),
    "skip": ("skip.json", _json(SKIP)),
}


def find(folders: Iterable[PathLike], given: Mapping[str, PathLike | None] | None = None) -> dict[str, Path]:
    """The artifacts' files, each from the first folder that has it.

    Args:
        folders: pruned checkpoints, or folders of reports.
        given: files by the name of the artifact, which come before those that are found.

    Raises:
        ConfigError: a folder is not there, or holds nothing of the kind.
    """
    found = {name: Path(path) for name, path in (given or {}).items() if path is not None}
    for folder in map(Path, folders):
        if not folder.is_dir():
            raise ConfigError(f"{folder} is no folder", "name a pruned checkpoint or the folder of a report")
        here = _here(folder)
        if not here and not found:
            raise ConfigError(f"{folder} holds no report, plan or statistics", f"expected one of {_names()}")
        found = here | found
    return found


def _here(folder: Path) -> dict[str, Path]:
    inside = next((place for place in (folder, folder.parent) if place.absolute().name == PROVENANCE), None)
    records = inside or folder / PROVENANCE
    places = (folder, records, records / "report")
    files = {name: [place / file for place in places if (place / file).is_file()] for name, (file, _) in FILES.items()}
    return {name: paths[0] for name, paths in files.items() if paths}


def _names() -> str:
    return ", ".join(file for file, _ in FILES.values())


def read(files: Mapping[str, Path]) -> ReportSources:
    """Read the artifacts, and refuse those of different models.

    Raises:
        ArtifactError: a file is damaged or of another schema.
        StaleArtifactError: two of them were made for different models, or measured on different pruned ones.
    """
    values: dict[str, Any] = {}
    for name, path in files.items():
        try:
            values[name] = FILES[name][1](path)
        except OSError as error:
            raise ArtifactError(f"cannot read {path}: {error.strerror}", "check the path") from error
    _check_base({str(files[name]): bases_of(value) for name, value in values.items()})
    if "plan" in values and not isinstance(values["plan"], PruningPlan):
        values["change"] = values.pop("plan")
    sources = ReportSources(**values, digests={path.name: _digest(path) for path in files.values()})
    _check_equal(_pruned(sources), "was made for another checkpoint")
    _check_equal(_plans(sources), "was made with another plan")
    return sources


def _check_base(values: Mapping[str, tuple[str, ...]]) -> None:
    """Refuse artifacts of different models; one that names no model says nothing."""
    known = [(name, bases) for name, bases in values.items() if bases]
    shared = {*known[0][1]} if known else set()
    for name, bases in known[1:]:
        shared &= {*bases}
        if not shared:
            raise StaleArtifactError(
                f"{name} was made for another model than {known[0][0]}", "name folders that belong together"
            )


def _check_equal(values: Mapping[str, str], what: str, hint: str = "name folders that belong together") -> None:
    """Refuse fingerprints that differ; an empty one says nothing."""
    known = [(name, value) for name, value in values.items() if value]
    for name, value in known[1:]:
        if value != known[0][1]:
            raise StaleArtifactError(f"{name} {what} than {known[0][0]}", hint)


def check_pruned(sources: ReportSources, folders: Iterable[PathLike]) -> None:
    """Refuse measurements of another pruned checkpoint than the one in these folders, or of one that was changed.

    Raises:
        StaleArtifactError: something was measured on another one.
    """
    hint = "evaluate it again with `moeprune eval`, or name the checkpoint that was evaluated"
    for folder in map(Path, folders):
        if any(_pruned(sources).values()) and (folder / "config.json").is_file():
            here = {str(folder): open_checkpoint(folder).fingerprint}
            _check_equal(here | _pruned(sources), "was made for another checkpoint", hint)


def _pruned(sources: ReportSources) -> dict[str, str]:
    """Fingerprint of the pruned checkpoint, by what was measured on it; empty where that is not known."""
    report, probes = sources.report, _inputs(sources.probes)
    evaluated = report.inputs.get("pruned", "") if report is not None and model_of(report) else ""
    return {"the report": evaluated, "the file of probes": str(probes.get("pruned", ""))}


def _plans(sources: ReportSources) -> dict[str, str]:
    """Digest of the plan, of the one whose experts were masked for the probes, and of the one that was seen to skip."""
    masked = str(_inputs(sources.probes).get("plan", ""))
    skipped = _inputs(sources.skip).get(f"plan {sources.skip['point']['target']:g}", "") if sources.skip else ""
    digest = sources.digests.get(FILES["plan"][0], "")
    return {"the plan": digest, "the file of probes": masked, "the cost of skipping": str(skipped)}


def model_of(value: EvalReport | AnyPlan | RouterStatistics | Json) -> str:
    """Fingerprint of the base model that an artifact was made for; empty where it does not say."""
    return next(iter(bases_of(value)), "")


def bases_of(value: EvalReport | AnyPlan | RouterStatistics | Json) -> tuple[str, ...]:
    """Fingerprints of what may be called the base: of a healed model the original, and what was to be healed."""
    if isinstance(value, EvalReport):  # a comparison of other tools' runs knows their samples and not their models
        named = [value.inputs.get("base")] if "tasks" in value.command else []
    else:
        named = [_inputs(value).get(name) for name in ("base", "model")]
    return tuple(str(one) for one in named if one)


def _inputs(value: AnyPlan | RouterStatistics | Json | None) -> Json:
    found = value.get("inputs") if isinstance(value, Mapping) else None if value is None else value.inputs
    return found if isinstance(found, Mapping) else {}


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
