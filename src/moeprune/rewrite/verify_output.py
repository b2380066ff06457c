"""Prove what can be proved of any checkpoint that was written here, by what its folder says that it is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from moeprune._files import PathLike
from moeprune.checkpoint import Checkpoint
from moeprune.errors import ArtifactError
from moeprune.plan_kinds import PLAN_FILE
from moeprune.plans import DROP
from moeprune.plans_fuse import FUSE, plan_kind
from moeprune.plans_multiplex import MULTIPLEX
from moeprune.plans_skip import SKIP
from moeprune.plans_sparsify import SPARSIFY
from moeprune.rewrite.drop import PROVENANCE
from moeprune.rewrite.skip import verify_skip
from moeprune.rewrite.verify import Verification, verify_drop
from moeprune.rewrite.verify_fuse import verify_fuse
from moeprune.rewrite.verify_healed import verify_healed
from moeprune.rewrite.verify_multiplex import verify_multiplex
from moeprune.rewrite.verify_sparse import verify_sparse

_PROOFS: Mapping[str, Callable[[Checkpoint, PathLike], Verification]] = {
    DROP: verify_drop,
    SKIP: verify_skip,
    FUSE: verify_fuse,
    SPARSIFY: verify_sparse,
    MULTIPLEX: verify_multiplex,
}


def verify_output(source: Checkpoint, output: PathLike) -> Verification:
    """Compare a checkpoint with its source: of a healed one the checkpoint that was healed.

    Raises:
        MoePruneError: anything differs; the message names the first tensor or file.
        ArtifactError: the folder has no plan and no record of healing, or one of an unknown kind.
    """
    folder = Path(output)
    if (folder / PROVENANCE / "healing.json").is_file():  # a plan beside it is that of what was healed
        return verify_healed(source, folder)
    kind = plan_kind(folder / PLAN_FILE)
    if kind not in _PROOFS:
        raise ArtifactError(f"{folder / PLAN_FILE} is of an unknown kind {kind!r}", f"known: {', '.join(_PROOFS)}")
    return _PROOFS[kind](source, folder)
