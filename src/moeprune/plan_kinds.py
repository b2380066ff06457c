"""Plans of every kind: one way to read them all."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from moeprune._files import PathLike
from moeprune.errors import ArtifactError, ConfigError
from moeprune.plans import DROP, PruningPlan
from moeprune.plans_fuse import FUSE, TIED, FusePlan, plan_kind
from moeprune.plans_multiplex import MULTIPLEX, MultiplexPlan
from moeprune.plans_skip import SKIP, SkipPlan
from moeprune.plans_sparsify import SPARSIFY, SparsifyPlan

PLAN_FILE = Path("moeprune") / "plan.json"
ChangePlan = SkipPlan | FusePlan | SparsifyPlan | MultiplexPlan  # what does more than leave experts out
AnyPlan = PruningPlan | ChangePlan

_READERS: Mapping[str, Callable[[PathLike], AnyPlan]] = {
    DROP: PruningPlan.load,
    SKIP: SkipPlan.load,
    FUSE: FusePlan.load,
    SPARSIFY: SparsifyPlan.load,
    MULTIPLEX: MultiplexPlan.load,
}


def load_plan(path: PathLike) -> AnyPlan:
    """Read a plan file of any kind.

    Raises:
        ArtifactError: it is missing, not JSON, of another schema or an unknown kind, or lacks a field.

    Example:
        >>> load_plan("gated/moeprune/plan.json").rate
    """
    kind = plan_kind(path)
    if kind not in _READERS:
        raise ArtifactError(f"{path} is a plan of an unknown kind {kind!r}", f"known: {', '.join(_READERS)}")
    return _READERS[kind](path)


def load_drop(path: PathLike, doing: str) -> PruningPlan:
    """Read a plan that leaves experts out, for what can do no more than mask them.

    Args:
        path: the file.
        doing: what cannot be done with another kind, for the message.

    Raises:
        ConfigError: it is of another kind.
        ArtifactError: as for :func:`load_plan`.
    """
    plan = load_plan(path)
    if not isinstance(plan, PruningPlan):
        raise ConfigError(
            f"{path} is a plan of kind {plan_kind(path)!r}, and {doing} masks experts that a plan drops",
            "evaluate the checkpoint that it makes: moeprune eval BASE OUT --tasks ... or --probes",
        )
    return plan


def router_rows(folder: PathLike) -> int:
    """Rows of the routers of a checkpoint whose experts stand for several each; 0 for any other.

    Args:
        folder: the checkpoint's. A plan that cannot be read says nothing here: whoever needs it says what is wrong.
    """
    file = Path(folder) / PLAN_FILE
    try:
        plan = load_plan(file) if file.is_file() and plan_kind(file) in {FUSE, MULTIPLEX} else None
    except ArtifactError:
        return 0
    if isinstance(plan, MultiplexPlan):
        return sum(map(len, next(iter(plan.layers.values())).groups))
    if isinstance(plan, FusePlan) and plan.router == TIED:
        return len(next(iter(plan.layers.values())).new_numbers())
    return 0
