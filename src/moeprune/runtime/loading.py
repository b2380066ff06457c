"""Load what moeprune wrote so that it runs as its plan says, whatever the kind of the plan."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moeprune._files import PathLike
from moeprune.errors import ConfigError
from moeprune.plans_fuse import FUSE
from moeprune.plans_multiplex import MULTIPLEX
from moeprune.plans_skip import SkipPlan
from moeprune.runtime.multiplexed import load_multiplexed
from moeprune.runtime.skipping import PLAN_FILE, attach
from moeprune.runtime.tied import is_tied, load_tied

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    Loader = Callable[[Path, Mapping[str, Any]], PreTrainedModel]


def load(path: PathLike, *, plan: PathLike | SkipPlan | None = None, **options: Any) -> PreTrainedModel:
    """Load a checkpoint as ``AutoModelForCausalLM.from_pretrained`` does, and have it skip what its plan says.

    A checkpoint that any engine can load (pruned, fused, sparsified, healed) is loaded as it is; one that was fused
    with a tied router leads the numbers that it picks to the merged experts, and a multiplexed one gets its residuals.

    Args:
        path: folder or Hub id.
        plan: a skip plan that does not lie in the folder, for a model that was not copied.
        options: of ``from_pretrained``, such as ``dtype`` and ``device_map``.

    Returns:
        The model, in evaluation mode.

    Raises:
        PlanError: the plan does not fit the model.
        StaleArtifactError: it was made for another model.
        ArtifactError: its file is damaged.

    Example:
        >>> model = moeprune.load("gated", dtype="auto")
        >>> model.generate(**tokenizer("The", return_tensors="pt"))
    """
    if plan is not None:
        return _load_with(path, plan, options)
    path = _fetched(path, options.get("revision"))
    loader = _loader_of(path)
    return loader(Path(path), options) if loader is not None else _stock(path, options)


def _fetched(path: PathLike, revision: str | None) -> PathLike:
    """The folder of a Hub model that runs as its plan says only from there; any other is left to transformers."""
    if Path(path).exists():
        return path
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    from moeprune.checkpoint import open_checkpoint

    try:
        records = snapshot_download(str(path), revision=revision, allow_patterns=[f"{PLAN_FILE.parent}/*"])
    except (HfHubHTTPError, LocalEntryNotFoundError, HFValidationError, OSError):
        return path  # transformers says what is wrong
    return open_checkpoint(path, revision=revision).path if needs_loading(records) else path


def kind_of(path: PathLike) -> str:
    """Kind of the plan that lies in a checkpoint's folder; empty where there is none."""
    file = Path(path) / PLAN_FILE
    if not file.is_file():
        return ""
    try:
        payload = json.loads(file.read_bytes())
    except ValueError:
        return ""
    return str(payload.get("kind", "drop")) if isinstance(payload, dict) else ""


def needs_loading(path: PathLike) -> bool:
    """Whether a checkpoint runs as its plan says only if it is loaded by :func:`load`."""
    return _loader_of(path) is not None


def _loader_of(path: PathLike) -> Loader | None:
    """What loads a checkpoint so that it runs as its plan says; None where transformers does."""
    kind = kind_of(path)
    if kind == FUSE and not is_tied(Path(path)):
        return None
    if kind == "skip" and SkipPlan.load(Path(path) / PLAN_FILE).baked:  # its config says all
        return None
    return _loaders().get(kind)


def _loaders() -> Mapping[str, Loader]:
    """How checkpoints are loaded that transformers alone would not run as their plans say."""
    return {"skip": _load_skipping, FUSE: load_tied, MULTIPLEX: load_multiplexed}


def _stock(path: PathLike, options: Mapping[str, Any]) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM

    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(path, **options)
    return model.eval()


def _load_skipping(path: Path, options: Mapping[str, Any]) -> PreTrainedModel:
    return attach(_stock(path, options), SkipPlan.load(path / PLAN_FILE))


def _load_with(path: PathLike, plan: PathLike | SkipPlan, options: Mapping[str, Any]) -> PreTrainedModel:
    from moeprune.checkpoint import open_checkpoint
    from moeprune.runtime.skipping import check_made_for

    if kind_of(path) == "skip":
        raise ConfigError(
            f"{path} has a skip plan of its own", "leave plan out, or name the model that it was made from"
        )
    read = plan if isinstance(plan, SkipPlan) else SkipPlan.load(plan)
    checkpoint = open_checkpoint(path)
    check_made_for(read, checkpoint.fingerprint, checkpoint.path.name)
    return attach(_stock(checkpoint.path, options), read)
