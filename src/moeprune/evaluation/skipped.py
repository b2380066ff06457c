"""Run a model as if it were gated, beside two controls that skip as much, and count what was skipped of which tokens.

The controls skip just as many slots as the gate did, in every layer and batch: one drops slots at random, the other is
the oracle that knows what a gate cannot, the norm of what each slot would have added.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from moeprune.evaluation.evaluator import Variant
from moeprune.evaluation.token_classes import CLASSES, TokenClasses
from moeprune.experts import ExpertLayer, slot_rows
from moeprune.plans_skip import SkipLayer, SkipPlan
from moeprune.runtime.policies import Routed, policy_named, reweighted
from moeprune.runtime.skipping import Boundary, Gate, SkipCounter, compacted, gate_of

if TYPE_CHECKING:
    import torch

    Score = Callable[[Boundary, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]

IntArray = npt.NDArray[np.int64]


class Tally(SkipCounter):
    """Counts of slots by decoder layer, by domain of the text and by class of the token; padding is left out.

    Args:
        domains: number of the domain of every document, [N].
        classes: of the tokens; none where there is no tokenizer.

    Attributes:
        cells: by decoder layer: slots and those that ran, by domain and class, [2, D, C].
        latest: by decoder layer: slots that ran in the running batch.
        real_T: which tokens of the running batch are no padding.
        has_classes: whether tokens are told apart by class.
    """

    def __init__(self, domains: Sequence[int], classes: TokenClasses | None = None) -> None:
        super().__init__()
        self.cells: dict[int, IntArray] = {}
        self.latest: dict[int, int] = {}
        self.real_T = np.zeros(0, dtype=np.bool_)
        self.has_classes = classes is not None
        self._domains, self._classes = np.asarray(domains), classes
        self._shape = (int(self._domains.max(initial=0)) + 1, len(CLASSES))
        self._group_T: IntArray = np.zeros(0, dtype=np.int64)

    def begin(self, rows: Sequence[int], ids_BT: torch.Tensor, mask_BT: torch.Tensor) -> None:
        """Learn what batch runs next."""
        self.read_mask({"input_ids": ids_BT, "attention_mask": mask_BT})
        domain_B1 = self._domains[list(rows)][:, None] * self._shape[1]
        class_BT = self._classes(ids_BT.cpu().numpy()) if self._classes else np.zeros(ids_BT.shape, dtype=np.int64)
        self._group_T = (domain_B1 + class_BT).reshape(-1)
        self.real_T = mask_BT.reshape(-1).bool().cpu().numpy()

    def see(self, layer: int, row_flops: int, keep_TK: torch.Tensor) -> None:
        """Add what was decided for the tokens of the batch."""
        super().see(layer, row_flops, keep_TK)
        kept_T = keep_TK.sum(dim=-1).cpu().numpy()[self.real_T]
        group_T = self._group_T[self.real_T]
        size = self._shape[0] * self._shape[1]
        found = [np.bincount(group_T, minlength=size) * keep_TK.shape[-1], np.bincount(group_T, kept_T, size)]
        self.cells.setdefault(layer, np.zeros((2, *self._shape), dtype=np.int64))
        self.cells[layer] += np.array(found, dtype=np.int64).reshape(2, *self._shape)
        self.latest[layer] = int(kept_T.sum())


class Gated(Variant):
    """The model with the gates of a plan.

    Args:
        plan: what is skipped.
        tally: counts it.
    """

    def __init__(self, plan: SkipPlan, tally: Tally) -> None:
        self.plan, self.tally = plan, tally

    def at(self, layer: ExpertLayer) -> Gate:
        """The gate of a layer."""
        gate = gate_of(layer, self.plan)
        gate.counter = self.tally
        return gate

    def begin(self, rows: Sequence[int], ids_BT: torch.Tensor, mask_BT: torch.Tensor) -> None:
        """Tell the tally."""
        self.tally.begin(rows, ids_BT, mask_BT)


class Control(Variant):
    """The model with as many slots skipped as a gated one skips, by another score.

    Args:
        like: the gated one, which must run every batch before this.
        score: of every slot, [T, K], from what stands before the experts and what they are given.
        tally: counts what is skipped.
    """

    def __init__(self, like: Gated, score: Score, tally: Tally) -> None:
        self.like, self.score, self.tally = like, score, tally

    def at(self, layer: ExpertLayer) -> Boundary:
        """What chooses in a layer."""
        return _Chooser(layer, self)

    def begin(self, rows: Sequence[int], ids_BT: torch.Tensor, mask_BT: torch.Tensor) -> None:
        """Tell the tally."""
        self.tally.begin(rows, ids_BT, mask_BT)


class _Chooser(Boundary):
    """Runs the best slots of a batch, as many as the gate let through."""

    def __init__(self, layer: ExpertLayer, control: Control) -> None:
        super().__init__(layer)
        self._control = control

    def run(self, hidden_TH: torch.Tensor, index_TK: torch.Tensor, gates_TK: torch.Tensor) -> torch.Tensor:
        """In the place of the experts."""
        assert self.below is not None  # noqa: S101 - it stands before them
        control = self._control
        score_TK = control.score(self, hidden_TH, index_TK, gates_TK)
        keep_TK = _best(score_TK, control.tally.real_T, control.like.tally.latest[self.layer.index])
        control.tally.see(self.layer.index, 0, keep_TK)
        routed = Routed(index_TK=index_TK, gates_TK=gates_TK, layer=SkipLayer())
        gates_TK = reweighted(gates_TK, keep_TK, routed.ranks_TK, control.like.plan.renorm)
        return compacted(self.below, hidden_TH, index_TK, gates_TK, keep_TK)


def _best(score_TK: torch.Tensor, real_T: npt.NDArray[np.bool_], count: int) -> torch.Tensor:
    """The ``count`` slots with the highest scores, [T, K]; none of padding."""
    import torch

    padding_T1 = torch.from_numpy(~real_T).to(score_TK.device)[:, None]
    flat_S = score_TK.masked_fill(padding_T1, float("-inf")).reshape(-1)
    chosen = flat_S.argsort(descending=True, stable=True)[:count]
    return torch.zeros_like(flat_S, dtype=torch.bool).index_fill(0, chosen, value=True).view(score_TK.shape)


def at_random(
    boundary: Boundary, hidden_TH: torch.Tensor, index_TK: torch.Tensor, gates_TK: torch.Tensor
) -> torch.Tensor:
    """A number that has nothing to do with the slot's worth; equal runs draw alike."""
    routed = Routed(index_TK=index_TK, gates_TK=gates_TK.float(), layer=SkipLayer())
    return policy_named("random").score(routed)


def true_norm(
    boundary: Boundary, hidden_TH: torch.Tensor, index_TK: torch.Tensor, gates_TK: torch.Tensor
) -> torch.Tensor:
    """The norm of what the slot adds to the layer's output: every slot is run to know it."""
    import torch

    assert boundary.below is not None  # noqa: S101 - it stands before the experts
    top_k, layer = index_TK.shape[-1], boundary.layer
    step = max(1, slot_rows(hidden_TH.shape[-1], layer.num_experts, hidden_TH.device.type) // top_k)
    norms = []
    for hidden, index in zip(torch.split(hidden_TH, step), torch.split(index_TK, step), strict=True):
        ones_R1 = torch.ones_like(gates_TK[:1, :1]).expand(index.numel(), 1)
        rows_RH = boundary.below(hidden.repeat_interleave(top_k, dim=0), index.reshape(-1, 1), ones_R1)
        norms.append(rows_RH.float().norm(dim=-1).view(index.shape))
    return gates_TK.float() * torch.cat(norms)


def rate_of(cells: IntArray) -> float:
    """Share of slots that were skipped, of counts whose first axis is all slots and those that ran."""
    slots, kept = cells.reshape(2, -1).sum(axis=-1)
    return float(1 - kept / slots) if slots else 0.0
