"""Train zero experts into a model: ZEDA (arXiv:2605.18643), and a simpler form with a controller.

Rows for half as many zero experts as there are real ones join every router. *ZEDA* keeps the two groups balanced by a
loss, and trains twice: on text that the original wrote, then on the model's own text, towards the original's
predictions of it. The *simple* form trains once on the given text, and an offset of the zero experts follows the rate.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from moeprune.experts import expert_layers
from moeprune.healing.distillation import Distilled, Recipe, Sequences, Text
from moeprune.healing.sampling import sampled
from moeprune.healing.skip_distillation import GatedTraining
from moeprune.plans_skip import SkipLayer
from moeprune.runtime.skipping import ZeroGate
from moeprune.runtime.thresholds import Scored, rate_of
from moeprune.runtime.zero_experts import ZeroRouter

if TYPE_CHECKING:
    import numpy.typing as npt
    import torch
    from torch import nn
    from transformers import PreTrainedModel

    from moeprune.experts import ExpertLayer
    from moeprune.plans_skip import SkipPlan

ALPHA = 0.1  # of the balance loss
NEW_TOKENS = 128  # that are written after a prompt
_BIAS = "e_score_correction_bias"


@dataclass(frozen=True, slots=True, kw_only=True)
class Balance:
    """The loss that divides slots between real and zero experts.

    Attributes:
        alpha: weight of the loss; 0 leaves the division to the controller.
        rate: share of the slots that zero experts are meant to get.
    """

    alpha: float
    rate: float

    def loss(self, shares: tuple[torch.Tensor, torch.Tensor], zero_slots: float, real: int) -> torch.Tensor:
        """Of one layer: alpha (N + w Z) / K (f_real P_real / N + f_zero P_zero / (w Z)), f in slots per token of K.

        Args:
            shares: mean mass of the router's probabilities on real and on zero experts.
            zero_slots: share of the slots that went to zero experts.
            real: number of real experts, N; of Z zero ones w Z count, so that the wanted rate is the minimum.
        """
        weighted = self.rate * real / (1 - self.rate)  # w Z
        each = (1 - zero_slots) * shares[0] / real + zero_slots * shares[1] / weighted
        return self.alpha * (real + weighted) * each


class ZeroListener:
    """Keeps what decides between real and zero experts in one layer.

    Args:
        gate: of the layer.

    Attributes:
        mask_T: which tokens of the forward pass are no padding; nothing is kept while it is None.
        latest: of the latest forward pass: mean mass on real and zero experts, and the share of zero slots.
    """

    def __init__(self, gate: ZeroGate) -> None:
        self.gate = gate
        self.mask_T: torch.Tensor | None = None
        self.latest: tuple[tuple[torch.Tensor, torch.Tensor], float] | None = None
        self._seen: list[Any] = []
        gate.router.heard = self._hear

    def _hear(self, router: ZeroRouter, margin_TK: torch.Tensor, real_TE: torch.Tensor, zero_TZ: torch.Tensor) -> None:
        if self.mask_T is None:
            return
        margin_TK = margin_TK[self.mask_T]
        self._seen.append(margin_TK.float().cpu().numpy())
        real_T, zero_T = real_TE[self.mask_T].sum(dim=-1), zero_TZ[self.mask_T].sum(dim=-1)
        total_T = real_T + zero_T  # 1 for a softmax
        shares = (real_T / total_T).mean(), (zero_T / total_T).mean()
        self.latest = shares, float((margin_TK < router.offset).float().mean())

    def heard(self) -> Scored:
        """The margins since the last time."""
        found = np.concatenate([np.empty(0, np.float32), *(one.reshape(-1) for one in self._seen)])
        self._seen = []
        return Scored(scores=found, slots=len(found))


class ZeroTraining(GatedTraining):
    """Zero experts in the loop.

    Args:
        student: the model to train.
        plan: rows, offsets and rates.
        balance: the loss between the groups; with it, offsets stay as they are while it is trained.
        seed: of what the student writes, if it is trained on its own text.
        prompts: what that begins with.
    """

    def __init__(
        self,
        student: PreTrainedModel,
        plan: SkipPlan,
        *,
        balance: Balance,
        seed: int = 0,
        prompts: Sequences = (),
    ) -> None:
        super().__init__(student, plan)
        self._balance, self._seed, self._prompts = balance, seed, prompts
        self._own_text = 0
        self._follows = balance.alpha == 0
        self.routers = {index: gate.router for index, gate in self.gates.items() if isinstance(gate, ZeroGate)}

    def _listening(self, gate: Any) -> Any:
        return ZeroListener(gate)

    def writes(self, tokens: int) -> None:
        """How much the student writes itself for every step; nothing leaves the given text."""
        self._own_text = tokens

    def measure(self, student: PreTrainedModel, sequences: Sequences, batch_tokens: int) -> float:
        """The share of the slots that zero experts have with the offsets as they are."""
        with self.running(student):
            heard = self._pass(student, sequences, batch_tokens)
        return float(np.mean([rate_of([scored], self._threshold(index)) for index, scored in heard.items()]))

    def rows(self) -> dict[str, nn.Parameter]:
        """The zero experts' rows by name, to be trained."""
        import torch

        found = {}
        for index, router in self.routers.items():
            if not isinstance(router.weight_ZH, torch.nn.Parameter):
                router.weight_ZH = torch.nn.Parameter(router.weight_ZH)
            found[f"layers.{index}.zero_weight"] = router.weight_ZH
        return found

    def tensors(self) -> dict[str, npt.NDArray[np.float32]]:
        """Rows and biases as the plan keeps them."""
        found = {name: value.detach().cpu().float().numpy() for name, value in self.rows().items()}
        for index, router in self.routers.items():
            if router.bias_Z is not None:
                found[f"layers.{index}.zero_bias"] = router.bias_Z.cpu().float().numpy()
        return found

    def text(self, step: int, student: PreTrainedModel) -> Sequences | None:
        """What the student writes itself, where it is trained on that."""
        if not self._own_text:
            return None
        count = max(1, self._own_text // (NEW_TOKENS + 16))
        first = step * count
        prompts = [self._prompts[place % len(self._prompts)] for place in range(first, first + count)]
        return sampled(student, prompts, new_tokens=NEW_TOKENS, seed=self._seed + step)

    def extra(self) -> torch.Tensor | None:
        """The balance loss, the mean of the layers."""
        if not self._balance.alpha:
            return None
        losses = []
        for listener in self._listeners.values():
            shares, zero_slots = listener.latest
            losses.append(self._balance.loss(shares, zero_slots, listener.gate.layer.num_experts))
        return sum(losses[1:], losses[0]) / len(losses)


def zero_rows(layers: Iterable[ExpertLayer], seed: int) -> dict[str, npt.NDArray[np.float32]]:
    """Rows for half as many zero experts as a layer has real ones.

    Every column of the rows is drawn with the mean and the deviation that it has in the real experts' rows, and so are
    the correction biases.

    Args:
        layers: of a loaded model.
        seed: of what is drawn.
    """
    found = {}
    for layer in layers:
        router: Any = layer.router
        weight_EH = router.weight.detach().float().cpu().numpy()
        random, count = np.random.default_rng([seed, layer.index]), max(1, layer.num_experts // 2)
        drawn_ZH = random.normal(weight_EH.mean(axis=0), weight_EH.std(axis=0, ddof=1), (count, weight_EH.shape[1]))
        found[f"layers.{layer.index}.zero_weight"] = drawn_ZH.astype(np.float32)
        if hasattr(router, _BIAS):
            bias_E = router.get_buffer(_BIAS).float().cpu().numpy()
            drawn_Z = random.normal(bias_E.mean(), bias_E.std(ddof=1), count)
            found[f"layers.{layer.index}.zero_bias"] = drawn_Z.astype(np.float32)
    return found


def layers_at(model: PreTrainedModel, rate: float) -> dict[int, SkipLayer]:
    """Decisions of all layers before anything is trained: no offset."""
    return {layer.index: SkipLayer(threshold=0.0, rate=rate) for layer in expert_layers(model)}


def written_text(teacher: PreTrainedModel, text: Text, recipe: Recipe) -> Text:
    """The text with what the teacher writes in the place of what is trained on; what judges stays."""
    return Text(train=sampled(teacher, text.train, new_tokens=NEW_TOKENS, seed=recipe.seed), held_out=text.held_out)


def record_of(stages: Mapping[str, Distilled], after: float, drifted: float) -> dict[str, Any]:
    """Several runs as one record.

    Args:
        stages: in their order.
        after: held-out divergence of what came out, at the rate that was asked for.
        drifted: the rate that training alone led to, before the offsets were settled.
    """
    first = next(iter(stages.values()))
    return {
        "held_out_kl": {"before": round(first.before, 6), "after": round(after, 6)},
        "best_step": sum(run.best_step for run in stages.values()),
        "steps": sum(run.steps for run in stages.values()),
        "rate_before_settling": round(drifted, 6),
        "stages": {name: run.record() for name, run in stages.items()},
    }
