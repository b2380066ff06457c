"""Solve the thresholds of a skip policy on text, layer by layer, each on what the already gated layers before it give.

Only one layer is in memory at a time. What the router gave is kept for all tokens of a layer (ten bytes a slot), so
that a threshold is an exact quantile and not an estimate.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from moeprune._files import progress
from moeprune.errors import ConfigError
from moeprune.experts import ExpertLayer, expert_layers, slot_rows
from moeprune.plans_skip import Renorm, SkipLayer
from moeprune.runtime.policies import Policy, Routed
from moeprune.runtime.skipping import Boundary, Gate, NormHead
from moeprune.streaming.states import States
from moeprune.streaming.stream import LayerStream

if TYPE_CHECKING:
    import numpy.typing as npt
    import torch

    Scores = npt.NDArray[np.float32]

_ROUNDS = 6  # passes at most until one threshold for all layers gives the rate
_CLOSE = 0.002  # of the rate
_PIECE = 1 << 14  # tokens that are widened at a time
_TOKENS = 1 << 16  # of a layer whose inputs are kept, for what is fitted to them
_ROWS = 1 << 13  # to which an expert is fitted


@dataclass(frozen=True, slots=True, kw_only=True)
class Scored:
    """The scores of one layer's slots that may be skipped, and how many slots there are in all.

    Attributes:
        scores: higher is better.
        slots: all of them.
        held: mean share of a token's weight that its first ``floor`` slots hold.
    """

    scores: Scores
    slots: int
    held: float = 1.0


class _Recorder(Boundary):
    """Keeps what the router gave; the experts run only where their output norms are wanted, and add nothing.

    Attributes:
        valid_T: which tokens of the batch are no padding.
    """

    def __init__(self, layer: ExpertLayer, policy: Policy, floor: int, step: int = 1) -> None:
        super().__init__(layer, logits=policy.logits)
        self.valid_T: torch.Tensor | None = None
        self._policy, self._floor, self._step = policy, floor, step
        self._seen: dict[str, list[torch.Tensor]] = {}
        self._tokens = 0

    def run(self, hidden_TH: torch.Tensor, index_TK: torch.Tensor, gates_TK: torch.Tensor) -> torch.Tensor:
        """In the place of the experts."""
        import torch

        valid_T = torch.ones(len(index_TK), dtype=torch.bool) if self.valid_T is None else self.valid_T
        [place_T] = valid_T.nonzero(as_tuple=True)
        place_T = place_T[-self._tokens % self._step :: self._step].to(index_TK.device)
        self._tokens += int(valid_T.sum())
        logits_TK = self.logits_of(index_TK)
        parts = {"index": index_TK.to(torch.int16), "gates": gates_TK.float()}
        if logits_TK is not None:
            parts["logits"] = logits_TK
        if self._policy.head:
            parts["hidden"] = hidden_TH
        for name, part in parts.items():
            self._seen.setdefault(name, []).append(part[place_T].cpu())
        if self._policy.table or self._policy.head:
            self._seen.setdefault("norms", []).append(self._norms(hidden_TH[place_T], index_TK[place_T]).cpu())
        return torch.zeros_like(hidden_TH)

    def _norms(self, hidden_TH: torch.Tensor, index_TK: torch.Tensor) -> torch.Tensor:
        """Norms of the outputs of the slots, [T, K]."""
        import torch

        assert self.below is not None  # noqa: S101 - it stands before the experts
        top_k = index_TK.shape[-1]
        step = max(1, slot_rows(hidden_TH.shape[-1], self.layer.num_experts, hidden_TH.device.type) // top_k)
        found = []
        for hidden, index in zip(torch.split(hidden_TH, step), torch.split(index_TK, step), strict=True):
            index_R1 = index.reshape(-1, 1)
            rows_RH = self.below(hidden.repeat_interleave(top_k, dim=0), index_R1, torch.ones_like(index_R1).float())
            found.append(rows_RH.float().norm(dim=-1).view(-1, top_k))
        return torch.cat(found) if found else hidden_TH.new_zeros((0, top_k), dtype=torch.float32)

    def result(self, sensitivity: float) -> tuple[SkipLayer, NormHead | None, Scored]:
        """What a policy can know of the layer beside the threshold, and the scores of the slots that it may skip."""
        import torch

        seen = {name: torch.cat(parts) for name, parts in self._seen.items()}
        index_TK, gates_TK = seen["index"].long(), seen["gates"]
        table, head, norms_TK = (), None, None
        if self._policy.table:
            table = tuple(_means(index_TK, seen["norms"], self.layer.num_experts).tolist())
        if self._policy.head:
            head = fitted_head(seen["hidden"], index_TK, seen["norms"], self.layer.num_experts)
            pieces = zip(torch.split(seen["hidden"], _PIECE), torch.split(index_TK, _PIECE), strict=True)
            norms_TK = torch.cat([head.norms(*piece) for piece in pieces])
        held_T = held_by(gates_TK, self._floor)
        span = (round(float(held_T.min()), 6), round(float(held_T.max()), 6)) if self._policy.shared else (0.0, 1.0)
        layer = SkipLayer(table=table, sensitivity=sensitivity, span=span)
        routed = Routed(
            index_TK=index_TK,
            gates_TK=gates_TK,
            layer=layer,
            logits_TK=seen.get("logits"),
            norms_TK=norms_TK,
            floor=self._floor,
        )
        scores_TK = self._policy.score(routed)
        may_skip_TK = routed.ranks_TK >= self._floor if self._policy.keeps_top else torch.ones_like(index_TK).bool()
        scores = scores_TK[may_skip_TK].numpy()
        return layer, head, Scored(scores=scores, slots=scores_TK.numel(), held=float(held_T.mean()))


def _means(index_TK: torch.Tensor, norms_TK: torch.Tensor, num_experts: int) -> npt.NDArray[np.float64]:
    """Mean output norm of every expert."""
    experts, norms = index_TK.reshape(-1).numpy(), norms_TK.reshape(-1).numpy()
    sums = np.bincount(experts, norms, num_experts)
    means: npt.NDArray[np.float64] = sums / np.maximum(np.bincount(experts, minlength=num_experts), 1)
    return means


def held_by(gates_TK: torch.Tensor, count: int) -> torch.Tensor:
    """Share of its weight that each token's largest slots hold, so many of them, [T]."""
    largest_TK = gates_TK.sort(dim=-1, descending=True).values
    return largest_TK[:, :count].sum(dim=-1) / largest_TK.sum(dim=-1).clamp_min(1e-30)


def fitted_head(hidden_TH: torch.Tensor, index_TK: torch.Tensor, norms_TK: torch.Tensor, num_experts: int) -> NormHead:
    """Fit the logarithm of every expert's output norm to the layer's input, by ridge regression.

    The penalty is what a noise of about the size of the signal asks for, so that an expert that was hardly seen is
    predicted to be what it was on the mean.
    """
    import torch

    width = hidden_TH.shape[-1]
    weight_EH, bias_E = torch.zeros((num_experts, width)), torch.zeros(num_experts)
    logs_TK = norms_TK.clamp_min(1e-8).log()
    bias_E += logs_TK.mean() if logs_TK.numel() else 0.0
    spread = float(hidden_TH[:: max(1, len(hidden_TH) // _PIECE)].float().var()) if len(hidden_TH) > 1 else 1.0
    for expert in range(num_experts):
        token_R, slot_R = (index_TK == expert).nonzero(as_tuple=True)
        token_R, slot_R = token_R[:_ROWS], slot_R[:_ROWS]
        if len(token_R) < 2:
            continue
        rows_RH, logs_R = hidden_TH[token_R].double(), logs_TK[token_R, slot_R].double()
        center_H, level = rows_RH.mean(dim=0), logs_R.mean()
        rows_RH -= center_H
        weight_H = _ridge(rows_RH, logs_R - level, 0.5 * width * spread)
        weight_EH[expert], bias_E[expert] = weight_H.float(), (level - center_H @ weight_H).float()
    return NormHead(weight_EH, bias_E)


def _ridge(rows_RH: torch.Tensor, values_R: torch.Tensor, penalty: float) -> torch.Tensor:
    """Coefficients [H], from whichever of the two equal systems is smaller."""
    import torch

    rows, width = rows_RH.shape
    wide = rows < width
    gram = rows_RH @ rows_RH.T if wide else rows_RH.T @ rows_RH
    gram.diagonal().add_(max(penalty, 1e-12))
    right = values_R if wide else rows_RH.T @ values_R
    solved = torch.cholesky_solve(right[:, None], torch.linalg.cholesky(gram))[:, 0]
    return rows_RH.T @ solved if wide else solved


def threshold_of(scored: Sequence[Scored], rate: float) -> float:
    """The threshold below which the wanted share of all slots lies, as nearly as ties let it.

    Args:
        scored: one layer, or several that share the threshold.
        rate: share of the slots to skip.
    """
    wanted = round(rate * sum(one.slots for one in scored))
    scores = np.concatenate([one.scores for one in scored])
    if wanted <= 0:
        return -math.inf
    if wanted >= len(scores):
        return float(np.nextafter(scores.max(), np.float32(np.inf)))
    at = np.partition(scores, wanted)[wanted]
    below, through = int((scores < at).sum()), int((scores <= at).sum())
    if through - wanted < wanted - below:  # of tied scores either all are skipped or none
        return float(np.nextafter(at, np.float32(np.inf)))
    return float(at)


def rate_of(scored: Sequence[Scored], threshold: float) -> float:
    """Share of all slots whose scores are below the threshold."""
    return sum(int((one.scores < np.float32(threshold)).sum()) for one in scored) / sum(one.slots for one in scored)


def most_skipped(policy: Policy, top_k: int, floor: int) -> float:
    """The largest share of the slots that a policy can skip."""
    return 1 - floor / top_k if policy.keeps_top else 1.0


@dataclass(slots=True)
class Solved:
    """What was decided, by decoder layer."""

    layers: dict[int, SkipLayer] = field(default_factory=dict)
    heads: dict[int, NormHead] = field(default_factory=dict)
    scored: dict[int, Scored] = field(default_factory=dict)

    def add(self, index: int, layer: SkipLayer, head: NormHead | None, scored: Scored) -> None:
        """Add a layer."""
        self.layers[index], self.scored[index] = layer, scored
        if head is not None:
            self.heads[index] = head

    @property
    def rate(self) -> float:
        """Share of all slots that are skipped."""
        skipped = sum(layer.rate * self.scored[index].slots for index, layer in self.layers.items())
        return skipped / sum(one.slots for one in self.scored.values())

    def tensors(self) -> dict[str, npt.NDArray[np.float32]]:
        """What a plan holds beside its JSON."""
        found = {}
        for index, head in self.heads.items():
            found[f"layers.{index}.norm_weight"] = head.weight_EH.cpu().numpy()
            found[f"layers.{index}.norm_bias"] = head.bias_E.cpu().numpy()
        return found


class ThresholdSolver:
    """Runs text through a checkpoint layer by layer and decides every layer's threshold on the way.

    Args:
        stream: the checkpoint.
        batches: ``input_ids`` and ``attention_mask`` [B, S] of each batch.
        states: where the hidden states live in between; one place for each batch.
        policy: scores slots.
        renorm: what the weights of the slots that run are divided by.
        floor: slots of a token that are never skipped.
        sensitivity: of each layer, for policies that ask for it.
    """

    def __init__(
        self,
        stream: LayerStream,
        batches: Sequence[dict[str, Any]],
        states: Callable[[], contextlib.AbstractContextManager[States]],
        *,
        policy: Policy,
        renorm: Renorm,
        floor: int = 1,
        sensitivity: Mapping[int, float] | None = None,
    ) -> None:
        self._stream, self._batches, self._states = stream, batches, states
        self._policy, self._renorm, self._floor = policy, renorm, floor
        self._sensitivity = sensitivity or {}
        self._layers = {layer.index: layer for layer in expert_layers(stream.model)}
        self._valid = [inputs["attention_mask"].reshape(-1).bool() for inputs in batches]
        tokens = sum(int(valid.sum()) for valid in self._valid)
        self._step = max(1, -(-tokens // _TOKENS)) if policy.head else 1

    def each(self, rates: Mapping[int, float]) -> Solved:
        """A threshold for every layer, so that it skips its share of the slots."""
        return self._pass(lambda index, scored: threshold_of([scored], rates[index]))

    def shared(self, rate: float) -> Solved:
        """One threshold for all layers together, found again on what it leads to until it gives the rate."""
        threshold = -math.inf
        for _ in range(_ROUNDS):
            solved = self._pass(lambda _, __: threshold)  # noqa: B023 - called before the next round
            if abs(solved.rate - rate) <= _CLOSE:
                break
            threshold = threshold_of([*solved.scored.values()], rate)
        return solved

    def _pass(self, decide: Callable[[int, Scored], float]) -> Solved:
        """All layers in turn: see what the router gives, decide, and run the layer as decided."""
        import torch

        solved = Solved()
        with self._states() as states, torch.inference_mode():
            self._stream.embed(self._batches, states)
            for index in progress(range(self._stream.depth), "solving", unit="layer"):
                with self._stream.layer(index):
                    if index in self._layers:
                        known, head, scored = self._see(index, states)
                        threshold = decide(index, scored)
                        layer = dataclasses.replace(known, threshold=threshold, rate=rate_of([scored], threshold))
                        solved.add(index, layer, head, scored)
                    with self._gate(index, solved):
                        for number, inputs in enumerate(self._batches):
                            states.put(number, self._stream.run(index, states.get(number), inputs))
                    self._stream.trim()
                states.turn()
        return solved

    def _see(self, index: int, states: States) -> tuple[SkipLayer, NormHead | None, Scored]:
        """What the router of a layer gives on the states that the layers before it gave."""
        recorder = _Recorder(self._layers[index], self._policy, self._floor, self._step)
        with recorder.applied():
            for number, inputs in enumerate(self._batches):
                recorder.valid_T = self._valid[number]
                self._stream.run(index, states.get(number), inputs)
            return recorder.result(self._sensitivity.get(index, 0.0))

    @contextlib.contextmanager
    def _gate(self, index: int, solved: Solved) -> Iterator[None]:
        if index not in solved.layers:
            yield
            return
        layer, head = solved.layers[index], solved.heads.get(index)
        with Gate(self._layers[index], self._policy, layer, self._renorm, self._floor, head).applied():
            yield


def check_rate(policy: Policy, rate: float, top_k: int, floor: int) -> None:
    """Refuse a rate that a policy cannot reach.

    Raises:
        ConfigError: the message says how far it goes.
    """
    most = most_skipped(policy, top_k, floor)
    if not 0 <= rate < 1:
        raise ConfigError(
            f"--skip-rate must be at least 0 and below 1, not {rate:g}", "it is the share of slots SKIPPED"
        )
    if rate > most + 1e-9:
        raise ConfigError(
            f"policy {policy.name!r} never skips the best {floor} of {top_k} slots: at most {most:.0%} can go",
            "ask for less, or take a policy that may skip all slots of a token: zero-logit or gate-norm",
        )
