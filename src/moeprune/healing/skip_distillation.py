"""Train a model that skips experts of tokens, with the gates in the loop, towards what it predicted without them.

The mask of a step is fixed by the policy, weights and gradients flow through the slots that stay. Routing moves while
the model is trained, so every layer's threshold follows the quantile of its own scores; in the end all thresholds are
settled once more on the whole text, so that the rate that is reported is the one that the finished model has.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from moeprune.errors import ConfigError
from moeprune.evaluation.agreement import batches
from moeprune.experts import expert_layers
from moeprune.healing.distillation import Objective, Sequences
from moeprune.plans_skip import SkipLayer, SkipPlan
from moeprune.runtime.policies import Routed, policy_named
from moeprune.runtime.skipping import Gate, gates_of
from moeprune.runtime.thresholds import Scored, rate_of, threshold_of

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from moeprune.healing.distillation import Sums

FOLLOW = 0.3  # of the way from a threshold to the quantile that a step measured
_ROUNDS = 8  # passes at most until the thresholds of all layers agree with one another
_LOOK_ROUNDS = 3
_CLOSE = 0.001  # of the rate of every layer


class Listener:
    """Keeps the scores that the gate of one layer decides by.

    Args:
        gate: its policy is exchanged for one that tells.

    Attributes:
        mask_T: which tokens of the forward pass are no padding; nothing is kept while it is None.
    """

    def __init__(self, gate: Gate) -> None:
        self.gate, self.mask_T = gate, cast("torch.Tensor | None", None)
        self._policy, self._slots = gate.policy, 0
        self._seen: list[Any] = []
        gate.policy = dataclasses.replace(gate.policy, score=self._score)

    def _score(self, routed: Routed) -> torch.Tensor:
        scores_TK = self._policy.score(routed)
        if self.mask_T is not None:
            open_TK = self.mask_T[:, None].expand_as(scores_TK)
            self._slots += int(open_TK.sum())
            if self._policy.keeps_top:
                open_TK = open_TK & (routed.ranks_TK >= routed.floor)
            self._seen.append(scores_TK[open_TK].float().cpu().numpy())
        return scores_TK

    def heard(self) -> Scored:
        """The scores since the last time, of slots that may be skipped."""
        found = Scored(scores=np.concatenate([np.empty(0, np.float32), *self._seen]), slots=self._slots)
        self._seen, self._slots = [], 0
        return found


class GatedTraining(Objective):
    """Gates in the loop, each with a threshold that follows its layer's scores.

    Args:
        student: the model to train.
        plan: a skip plan whose thresholds fit the student as it is given.
    """

    def __init__(self, student: PreTrainedModel, plan: SkipPlan) -> None:
        self.gates = gates_of(expert_layers(student), plan)
        if not self.gates:
            raise ConfigError("a plan whose decision lies in the config has no gates to train with", "leave --bake out")
        self.rates = {index: layer.rate for index, layer in plan.layers.items() if layer.threshold > -math.inf}
        self._listeners = {index: self._listening(self.gates[index]) for index in self.rates}
        self._fixed = policy_named(plan.policy).whole  # of every token as many slots, whatever their scores
        self._follows = not self._fixed

    def _listening(self, gate: Gate) -> Any:
        """What keeps the scores of a gate."""
        return Listener(gate)

    @contextlib.contextmanager
    def running(self, student: PreTrainedModel) -> Iterator[None]:
        """With the gates on."""
        with contextlib.ExitStack() as stack:
            for gate in self.gates.values():
                stack.enter_context(gate.applied())
            yield

    @contextlib.contextmanager
    def watching(self, mask_BT: torch.Tensor) -> Iterator[None]:
        """Keep the scores of what runs inside the block."""
        for listener in self._listeners.values():
            listener.mask_T = mask_BT.reshape(-1).bool()
        try:
            yield
        finally:
            for listener in self._listeners.values():
                listener.mask_T = None

    def after_step(self, step: int, share: float, sums: Sums) -> str:
        """Let every threshold follow."""
        import torch

        heard = self._heard()
        ahead = {index: threshold_of([scored], self.rates[index]) for index, scored in heard.items()}
        measured = [rate_of([scored], self._threshold(index)) for index, scored in heard.items()]
        told_2L = torch.tensor([[*ahead.values()], measured], dtype=torch.float32)
        told_2L = sums(told_2L) / sums(torch.ones(()))
        for place, index in enumerate(ahead):
            if self._follows and math.isfinite(told_2L[0, place]):
                own = self._threshold(index)
                self._set(index, own + FOLLOW * (float(told_2L[0, place]) - own))
        return f", skipped {float(told_2L[1].mean()):.1%}"

    def _threshold(self, index: int) -> float:
        return self.gates[index].decision.threshold

    def _set(self, index: int, threshold: float) -> None:
        gate = self.gates[index]
        gate.decision = dataclasses.replace(gate.decision, threshold=threshold)

    def state(self) -> dict[str, Any]:
        """The thresholds by layer."""
        return {str(index): self._threshold(index) for index in self.rates}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Set the thresholds."""
        for index, threshold in state.items():
            self._set(int(index), threshold)

    @contextlib.contextmanager
    def looking(self, student: PreTrainedModel, held_out: Sequences, batch_tokens: int) -> Iterator[None]:
        """With thresholds that skip the wanted share of the held-out text, so that looks can be compared."""
        before = self.state()
        self._settle(student, held_out, batch_tokens, _LOOK_ROUNDS)
        yield
        self.restore(before)

    def settle(self, student: PreTrainedModel, sequences: Sequences, batch_tokens: int) -> dict[int, SkipLayer]:
        """Decide all thresholds on a text, every layer on what the gated layers before it give.

        Thresholds of all layers are exchanged together until every layer skips its share; a layer is right at the
        latest one pass after those before it.

        Args:
            student: the model, without gates.
            sequences: token ids.
            batch_tokens: most tokens, padding included, in one forward pass.

        Returns:
            Decisions by layer, with the rates that were measured.
        """
        with self.running(student):
            rates = self._settle(student, sequences, batch_tokens, _ROUNDS)
        return {index: dataclasses.replace(self.gates[index].decision, rate=rates[index]) for index in self.rates}

    def _settle(self, student: Any, sequences: Sequences, batch_tokens: int, rounds: int) -> dict[int, float]:
        """Exchange thresholds until every layer skips its share; the shares that were measured last."""
        for number in range(rounds):
            heard = self._pass(student, sequences, batch_tokens)
            rates = {index: rate_of([scored], self._threshold(index)) for index, scored in heard.items()}
            far = max((abs(rate - self.rates[index]) for index, rate in rates.items()), default=0.0)
            if self._fixed or far <= _CLOSE or number == rounds - 1:
                break
            for index, scored in heard.items():
                self._set(index, threshold_of([scored], self.rates[index]))
        return rates

    def _pass(self, student: Any, sequences: Sequences, batch_tokens: int) -> dict[int, Scored]:
        import torch

        device = next(student.parameters()).device
        for _, ids_BT, mask_BT in batches(sequences, batch_tokens):
            ids, mask = ids_BT.to(device), mask_BT.to(device)
            with torch.no_grad(), self.watching(mask):
                student(input_ids=ids, attention_mask=mask, use_cache=False)
        return self._heard()

    def _heard(self) -> dict[int, Scored]:
        return {index: listener.heard() for index, listener in self._listeners.items()}
