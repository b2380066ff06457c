"""Zero experts: rows of a router that stand for experts without weights and without output (ZEDA, arXiv:2605.18643).

They compete with the real experts for a token's top-k slots. A slot that goes to one of them costs nothing and adds
nothing, and its weight stays in the denominator that the others are divided by. The rows lie beside the plan; the
checkpoint itself has none, so that any engine loads it and skips nothing.

The model's own router chooses among the real experts, in its own groups; of what it chose and the zero experts the best
top-k are taken. These are the best top-k of all, zero experts being eligible everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from moeprune.errors import PlanError, UnsupportedModelError
from moeprune.experts import ExpertLayer

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import torch

    Arrays = Mapping[str, npt.NDArray[np.float32]]
    Heard = Callable[["ZeroRouter", torch.Tensor, torch.Tensor, torch.Tensor], None]

_BIAS = "e_score_correction_bias"
_CLOSE = 1e-3  # between a router's own weights and the same computed here


class ZeroRouter:
    """The router of one MoE layer with rows for zero experts.

    Args:
        layer: the modules of the layer.
        weight_ZH: the rows.
        bias_Z: what is added to their scores when experts are chosen, for routers that have such a bias.

    Attributes:
        offset: added to what zero experts are chosen by (their logits, or their scores where there is a bias): the
            larger it is, the more slots they get.
        heard: told of every choice, if set: the router, the margins [T, K] by which slots went to real experts
            (a slot goes to a zero expert where it is below the offset), and both kinds' scores [T, E] and [T, Z].

    Raises:
        UnsupportedModelError: the router does not compute what is known here: softmax, or sigmoid with a bias.
    """

    def __init__(self, layer: ExpertLayer, weight_ZH: torch.Tensor, bias_Z: torch.Tensor | None = None) -> None:
        self.layer, self.router = layer, _known(layer)
        own: Any = self.router
        self.weight_ZH = weight_ZH.to(own.weight.device)
        self.has_bias = hasattr(own, _BIAS)
        self.bias_Z = None if bias_Z is None else bias_Z.to(own.weight.device)
        self.offset = 0.0
        self.heard: Heard | None = None
        self._shares = False  # whether the weights of a token are divided by their sum
        self._below: Callable[..., Any] = own.forward
        self._check()

    @classmethod
    def of(cls, layer: ExpertLayer, tensors: Arrays) -> ZeroRouter:
        """With rows that lie beside a plan.

        Raises:
            PlanError: they are not there, or do not fit.
        """
        import torch

        weight = tensors.get(f"layers.{layer.index}.zero_weight")
        bias = tensors.get(f"layers.{layer.index}.zero_bias")
        own: Any = layer.router
        if weight is None or weight.shape[1:] != own.weight.shape[1:]:
            raise PlanError(f"the plan has no zero experts that fit layer {layer.index}")
        return cls(layer, torch.from_numpy(weight), None if bias is None else torch.from_numpy(bias))

    def stand(self) -> Callable[[], None]:
        """Take the router's place; what comes back undoes it."""
        router: Any = self.router
        own = vars(router).get("forward")
        self._below, router.forward = router.forward, self.route

        def leave() -> None:
            del router.forward
            if own is not None:
                router.forward = own

        return leave

    def route(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """In the place of the router: the real experts' logits, and weights and numbers of the chosen [T, K].

        Zero experts have the numbers from E on.
        """
        logits_TE, gates_TK, index_TK = self._below(hidden)
        flat_TH = hidden.reshape(-1, hidden.shape[-1])
        zero_TZ = flat_TH.to(logits_TE.dtype) @ self.weight_ZH.to(logits_TE.dtype).T
        weights_TK, chosen_TK = self._merged(logits_TE.float(), index_TK, zero_TZ.float())
        return logits_TE, weights_TK.to(gates_TK.dtype), chosen_TK

    def _merged(
        self, logits_TE: torch.Tensor, index_TK: torch.Tensor, zero_TZ: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        import torch

        if not self.has_bias:
            zero_TZ = zero_TZ + self.offset
        real_TE, score_TZ = self._scores(logits_TE, zero_TZ)
        # Experts are chosen by scores and biases, or by logits, whose order is that of their softmax.
        by_TK, by_TZ = logits_TE.gather(-1, index_TK), zero_TZ
        if self.has_bias:
            bias_E: Any = self.router.get_buffer(_BIAS).float()
            by_TK = real_TE.gather(-1, index_TK) + bias_E[index_TK]
            by_TZ = score_TZ + self.offset + (0.0 if self.bias_Z is None else self.bias_Z.float())
        if self.heard is not None:
            self.heard(self, margins(by_TK, by_TZ - self.offset), real_TE, score_TZ)
        place_TK = torch.cat([by_TK, by_TZ], dim=-1).topk(index_TK.shape[-1], dim=-1).indices
        numbers_TX = torch.cat([index_TK, self.layer.num_experts + _count_like(zero_TZ)], dim=-1)
        scores_TX = torch.cat([real_TE.gather(-1, index_TK), score_TZ], dim=-1)
        return self._weights(scores_TX.gather(-1, place_TK)), numbers_TX.gather(-1, place_TK)

    def _scores(self, logits_TE: torch.Tensor, zero_TZ: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        import torch

        if self.has_bias:
            return logits_TE.sigmoid(), zero_TZ.sigmoid()
        both_TX = torch.cat([logits_TE, zero_TZ], dim=-1).softmax(dim=-1)
        return both_TX[:, : logits_TE.shape[-1]], both_TX[:, logits_TE.shape[-1] :]

    def _weights(self, scores_TK: torch.Tensor) -> torch.Tensor:
        """What the model makes of the scores of the chosen: zero slots stay in the denominator."""
        own: Any = self.router
        if self._shares:
            scores_TK = scores_TK / (scores_TK.sum(dim=-1, keepdim=True) + 1e-20)
        return scores_TK * float(getattr(own, "routed_scaling_factor", 1.0))

    def _check(self) -> None:
        """Prove on a few vectors that without zero experts the weights here are the router's own.

        That also tells whether they are divided by their sum: not all routers that do have a setting for it.
        """
        import torch

        own: Any = self.router
        generator = torch.Generator().manual_seed(0)
        hidden_TH = torch.randn((16, own.weight.shape[-1]), generator=generator).to(own.weight)
        with torch.no_grad():
            try:
                logits_TE, gates_TK, index_TK = self._below(hidden_TH)
            except (TypeError, ValueError):  # it wants more, or gives something else
                raise _unknown(self.layer) from None
            scores_TE, _ = self._scores(logits_TE.float(), logits_TE.new_empty((16, 0)).float())
            for self._shares in (False, True):
                found_TK = self._weights(scores_TE.gather(-1, index_TK))
                if torch.allclose(found_TK, gates_TK.float(), atol=_CLOSE, rtol=1e-2):
                    return
        raise _unknown(self.layer)


def margins(by_TK: torch.Tensor, by_TZ: torch.Tensor) -> torch.Tensor:
    """The offset above which a token's m-th zero slot is taken, for m from 1 to K, [T, K].

    The m-th best zero expert gets a slot where it beats the m-th last of the K real ones.

    Args:
        by_TK: what the chosen real experts are chosen by.
        by_TZ: the same of zero experts, without the offset.
    """
    real_TK = by_TK.sort(dim=-1).values
    count = min(real_TK.shape[-1], by_TZ.shape[-1])
    found = real_TK.new_full(real_TK.shape, math.inf)
    found[:, :count] = real_TK[:, :count] - by_TZ.topk(count, dim=-1).values
    return found.detach()


def _count_like(zero_TZ: torch.Tensor) -> torch.Tensor:
    import torch

    return torch.arange(zero_TZ.shape[-1], device=zero_TZ.device).expand(zero_TZ.shape)


def _known(layer: ExpertLayer) -> torch.nn.Module:
    weight = getattr(layer.router, "weight", None)
    if weight is None or weight.dim() != 2 or hasattr(layer.router, "bias"):
        raise _unknown(layer)
    return layer.router


def _unknown(layer: ExpertLayer) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"the router of layer {layer.index} ({type(layer.router).__name__}) takes no zero experts",
        "softmax routers and sigmoid routers with a correction bias do; take another --policy",
    )
