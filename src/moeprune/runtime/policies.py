"""Token-skip policies: small functions that score the slots of every token, from which a threshold keeps the best.

A *slot* is one of the top-k experts of a token. A policy sees what the router gave, never an expert's output, so that
its decision costs next to nothing. Scores are higher for slots that matter more.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from moeprune.errors import ConfigError, nearest
from moeprune.plans_skip import Renorm, SkipLayer

if TYPE_CHECKING:
    import torch

    Score = Callable[["Routed"], torch.Tensor]

ZERO_EXPERTS, ZEDA = "zero-experts", "zeda"
DEFAULT = "predicted-norm"
_NOISE = 2654435761  # Knuth's multiplier, for slots drawn by a hash of what they are


@dataclass(frozen=True, slots=True, kw_only=True)
class Routed:
    """What a router gave for some tokens.

    Attributes:
        index_TK: the chosen experts.
        gates_TK: the weights that the model multiplies their outputs by, in float32.
        logits_TK: the router's raw logits of the slots, where the policy asks for them.
        norms_TK: predicted norms of the slots' outputs, where the policy asks for them.
        layer: what the plan says of the layer.
        floor: slots of a token that are never skipped.
    """

    index_TK: torch.Tensor  # noqa: N815 - a tensor with its shape
    gates_TK: torch.Tensor  # noqa: N815 - a tensor with its shape
    layer: SkipLayer
    logits_TK: torch.Tensor | None = None  # noqa: N815
    norms_TK: torch.Tensor | None = None  # noqa: N815
    floor: int = 1

    @property
    def ranks_TK(self) -> torch.Tensor:  # noqa: N802 - a tensor with its shape
        """Place of each slot in its token's descending order of weights, from 0; some routers give them unsorted."""
        return self.gates_TK.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """One way to say which slots of a token matter.

    Attributes:
        name: on the command line and in plans.
        score: of every slot, [T, K], higher is better.
        meaning: one line.
        keeps_top: whether a token's best slots (``floor`` of them) are never skipped.
        logits: whether it needs the router's logits.
        table: whether it needs the mean output norm of every expert.
        head: whether it needs output norms that are predicted from each token.
        shared: whether one threshold serves all layers by definition.
        whole: whether it keeps the same number of slots of every token of a layer.
    """

    name: str
    score: Score
    meaning: str
    keeps_top: bool = True
    logits: bool = False
    table: bool = False
    head: bool = False
    shared: bool = False
    whole: bool = False

    def kept(self, routed: Routed) -> torch.Tensor:
        """Which slots run, [T, K]."""
        keep_TK = self.score(routed) >= routed.layer.threshold
        return keep_TK | (routed.ranks_TK < routed.floor) if self.keeps_top else keep_TK


def share(routed: Routed) -> torch.Tensor:
    """The slot's share of the sum of its token's top-k weights."""
    return routed.gates_TK / routed.gates_TK.sum(dim=-1, keepdim=True).clamp_min(1e-30)


def ratio(routed: Routed) -> torch.Tensor:
    """The slot's weight over that of its token's top slot (arXiv:2402.14800, for any top-k)."""
    return routed.gates_TK / routed.gates_TK.amax(dim=-1, keepdim=True).clamp_min(1e-30)


def top_p(routed: Routed) -> torch.Tensor:
    """1 minus the share of the token's weight before the slot: the smallest prefix that reaches p stays."""
    share_TK, order_TK = share(routed).sort(dim=-1, descending=True, stable=True)
    before_TK = share_TK.cumsum(dim=-1) - share_TK
    return (1 - before_TK).gather(-1, order_TK.argsort(dim=-1))


def zero_logit(routed: Routed) -> torch.Tensor:
    """The slot's raw router logit, as if zero experts with one constant logit stood beside it."""
    assert routed.logits_TK is not None  # noqa: S101 - the policy asks for them
    return routed.logits_TK


def gate_norm(routed: Routed) -> torch.Tensor:
    """The slot's weight times its expert's mean output norm."""
    norms_E = routed.gates_TK.new_tensor(routed.layer.table)
    return routed.gates_TK * norms_E[routed.index_TK]


def predicted_norm(routed: Routed) -> torch.Tensor:
    """The slot's weight times the norm that its expert's output is predicted to have for this very token.

    Gates say little of how large an output is, which varies from token to token; a linear function of the layer's input
    explains much of that, for the cost of a second router.
    """
    assert routed.norms_TK is not None  # noqa: S101 - the policy asks for them
    return routed.gates_TK * routed.norms_TK


def static_k(routed: Routed) -> torch.Tensor:
    """Minus the slot's rank: every token of a layer keeps as many (arXiv:2509.02753)."""
    return -routed.ranks_TK.float()


def ban(routed: Routed) -> torch.Tensor:
    """How many slots a token keeps by its layer's sensitivity and its own concentration (arXiv:2509.06346).

    With s = (layer + token) / 2, both from 0 to 1, round(floor + (K - floor) lambda s) slots stay; the threshold is
    1 / lambda. A token whose first ``floor`` slots hold little of the weight needs more.
    """
    ranks_TK, top_k = routed.ranks_TK, routed.gates_TK.shape[-1]
    low, high = routed.layer.span
    held_T1 = (share(routed) * (ranks_TK < routed.floor)).sum(dim=-1, keepdim=True)
    token_T1 = ((high - held_T1) / max(high - low, 1e-9)).clamp(0, 1)
    needs_T1 = (routed.layer.sensitivity + token_T1) / 2
    step_TK = (ranks_TK + 0.5 - routed.floor) / max(1, top_k - routed.floor)
    return needs_T1 / step_TK.clamp_min(1e-6)


def drawn(routed: Routed) -> torch.Tensor:
    """A number that has nothing to do with the slot's worth, the same in every run: the control of every policy."""
    import torch

    bits_TK = routed.gates_TK.contiguous().view(torch.int32).long() ^ (routed.index_TK + 1) * _NOISE
    mixed_TK = bits_TK * 0x9E3779B1 & 0xFFFFFFFF
    mixed_TK = (mixed_TK ^ mixed_TK >> 15) * 0x85EBCA77 & 0xFFFFFFFF
    mixed_TK = (mixed_TK ^ mixed_TK >> 13) * 0xC2B2AE3D & 0xFFFFFFFF
    return (mixed_TK ^ mixed_TK >> 16).float() / 2**32


BUILTIN: Mapping[str, Policy] = {
    policy.name: policy
    for policy in (
        Policy(name="share", score=share, meaning="share of the token's top-k weight"),
        Policy(name="ratio", score=ratio, meaning="ratio to the token's top weight (NAEE)"),
        Policy(name="top-p", score=top_p, meaning="smallest prefix of the weights that reaches p"),
        Policy(
            name="zero-logit", score=zero_logit, meaning="raw logit against a constant", keeps_top=False, logits=True
        ),
        Policy(name="gate-norm", score=gate_norm, meaning="weight x mean output norm", keeps_top=False, table=True),
        Policy(
            name="predicted-norm",
            score=predicted_norm,
            meaning="weight x output norm predicted from the token",
            keeps_top=False,
            head=True,
        ),
        Policy(name="static-k", score=static_k, meaning="as many slots of every token of a layer (LExI)", whole=True),
        Policy(name="ban", score=ban, meaning="by the layer's sensitivity and the token's weights (Ban)", shared=True),
        Policy(name="random", score=drawn, meaning="drawn slots: a control", keeps_top=False),
    )
}


# Policies that have to be trained: no text alone says what they skip. In plans both are called by the first name.
TRAINED: Mapping[str, Policy] = {
    name: Policy(name=name, score=share, meaning=f"{meaning}: needs --distill", keeps_top=False)
    for name, meaning in (
        (ZERO_EXPERTS, "slots that zero experts win"),
        (ZEDA, "the same, trained as in the paper (ZEDA)"),
    )
}


def policy_named(name: str) -> Policy:
    """The policy of a name.

    Raises:
        ConfigError: there is none.
    """
    known = {**BUILTIN, **TRAINED}
    if name not in known:
        raise ConfigError(f"there is no skip policy {name!r}", nearest(name, list(known)))
    return known[name]


def reweighted(gates_TK: torch.Tensor, keep_TK: torch.Tensor, ranks_TK: torch.Tensor, renorm: Renorm) -> torch.Tensor:
    """The weights of the slots that run; those of the others do not matter.

    Args:
        gates_TK: the model's own weights.
        keep_TK: which slots run.
        ranks_TK: places of the slots in descending order of weights.
        renorm: what the weights are divided by.
    """
    if renorm.kind == "none":
        return gates_TK
    held_TK = keep_TK if renorm.kind == "survivors" else keep_TK | (ranks_TK < renorm.k2)
    held_T1 = (gates_TK * held_TK).sum(dim=-1, keepdim=True)
    return gates_TK * (gates_TK.sum(dim=-1, keepdim=True) / held_T1.clamp_min(1e-30))
