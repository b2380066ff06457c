"""Criteria over the ways that tokens take through the experts of all layers: MAESTRO and Pathfinder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moeprune.errors import StrategyError
from moeprune.statistics import FloatArray
from moeprune.strategies.criterion import Layers
from moeprune.strategies.saliency import mean

BoolArray = NDArray[np.bool_]
IntArray = NDArray[np.int64]

# --- MAESTRO ----------------------------------------------------------------------------------------------------------

_CLOSE = 1e-6  # L1 distance of two rounds of the power iteration at which it ends
_ROUNDS = 1000


def maestro(layers: Layers) -> dict[int, FloatArray]:
    """Share of time that a walk through the experts spends on each of them (arXiv:2607.08601).

    A state is an expert of a layer; the walk follows how often tokens went from the top-k of one MoE layer to that of
    the next, and from the last layer to the first one for the next token. The shares are the chain's stationary
    distribution, times the number of layers so that each layer's sum is 1.

    Raises:
        StrategyError: no token came from one layer to the next, or the sequences are so short that every walk ends.
    """
    steps_LEE = np.stack([_steps(layers, layer) for layer in layers])
    share_LE = np.full(steps_LEE.shape[:2], 1 / steps_LEE.shape[1])
    for _ in range(_ROUNDS):
        # What arrives in a layer left the one before it. Every layer has its token at every time, so its sum is 1.
        arrived_LE = (np.roll(share_LE, 1, axis=0)[:, None, :] @ steps_LEE)[:, 0, :]
        total_L1 = arrived_LE.sum(axis=1, keepdims=True)
        if not total_L1.all():
            raise StrategyError("every walk through the experts comes to an end", "calibrate with longer sequences")
        arrived_LE /= total_L1
        change = np.abs(arrived_LE - share_LE).sum() / len(share_LE)
        share_LE = arrived_LE
        if change < _CLOSE:
            break
    return dict(zip(layers, share_LE, strict=True))


def _steps(layers: Layers, layer: int) -> FloatArray:
    """Probabilities [E, E] that a token that was with expert i, one step before, is with expert j of this layer.

    Raises:
        StrategyError: no token came here.
    """
    first = layer == next(iter(layers))
    count_EE = layers[layer].wrap_count if first else layers[layer].transition_count
    if not count_EE.any():
        what = "the layer before it: no sequence has two tokens" if first else "the MoE layer before it"
        raise StrategyError(f"no token came to layer {layer} from {what}", "calibrate with longer sequences")
    return mean(count_EE, np.broadcast_to(count_EE.sum(axis=1, keepdims=True), count_EE.shape))


# --- Pathfinder -------------------------------------------------------------------------------------------------------

_TINY = 1e-10  # added before every logarithm
_LITTLE = 1e-6  # of a vote, for an expert's place among those with as many votes
_FENCE = 3.0  # interquartile ranges beyond the quartiles at which a value is an outlier


@dataclass(frozen=True, slots=True)
class Pathfinder:
    """Experts on the best paths through the layers of single samples (arXiv:2512.18425).

    A path takes one expert e of every layer and scores the sum of log p + log n + log w: p the mean probability that
    the router gives e on the sample, n the mean norm of its output over all tokens, w the softmax over experts of minus
    the relative error of the layer's output with e alone. The best paths of each sample vote for their experts.

    In the paper every term depends on one expert only, so that the best path takes each layer's best expert by itself.
    With ``conditional``, p becomes the probability of e after the path's expert of the layer before, as the transitions
    of all calibration data have it.

    Attributes:
        conditional: let p depend on the expert before.
        paths: best paths of each sample that vote.
    """

    conditional: bool = False
    paths: int = 10

    def __call__(self, layers: Layers) -> dict[int, FloatArray]:
        """Shares of the votes by layer; of equal ones first the expert with the higher mean score of its own.

        Experts that are outliers for the better in any sample score above all votes.
        """
        nodes = [_nodes(layers, layer) for layer in layers]
        own = [node.own for node in nodes]
        chance = [node.chance for node in nodes]
        if self.conditional:
            steps = [np.log(_steps(layers, layer) + _TINY) for layer in list(layers)[1:]]
            paths = _linked_paths(chance[0] + own[0], own[1:], steps, self.paths)
        else:
            paths = _free_paths([p + rest for p, rest in zip(chance, own, strict=True)], self.paths)
        return {layer: _votes(paths_SP, node) for layer, paths_SP, node in zip(layers, paths, nodes, strict=True)}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Nodes:
    """One layer's experts as nodes of the samples' graphs; minus infinity bars a node from all paths.

    Attributes:
        chance: log p, [S, E].
        own: log n + log w, [S, E].
        mean: mean over samples of both, of barred nodes too, [E].
        outstanding: outliers for the better in some sample, [E].
        weight: what a sample's votes count, [S].
    """

    chance: FloatArray
    own: FloatArray
    mean: FloatArray
    outstanding: BoolArray
    weight: FloatArray


def _nodes(layers: Layers, layer: int) -> _Nodes:
    """Read a layer's samples.

    Raises:
        StrategyError: there are none in a domain that has a weight.
    """
    stats = layers[layer]
    weight_S = stats.path_weight
    if not weight_S.any():
        raise StrategyError(f"no sequence has its paths in layer {layer}", "collect again with more sequences")
    error_SE = stats.path_loss / np.maximum(stats.path_scale, np.finfo(np.float64).tiny)[:, None]
    good_SE = np.exp(error_SE.min(axis=1, keepdims=True) - error_SE)
    good_SE /= good_SE.sum(axis=1, keepdims=True)
    chance_SE = np.log(stats.path_prob + _TINY)
    own_SE = np.log(stats.path_norm + _TINY) + np.log(good_SE + _TINY)
    (low_error, high_error), (low_norm, high_norm) = _outliers(error_SE), _outliers(stats.path_norm)
    keep_SE = low_error | high_norm
    barred_SE = keep_SE | high_error | low_norm
    barred_SE &= ~barred_SE.all(axis=1, keepdims=True)  # a path has to go somewhere
    return _Nodes(
        chance=chance_SE,
        own=np.where(barred_SE, -np.inf, own_SE),
        mean=np.average(chance_SE + own_SE, axis=0, weights=weight_S),
        outstanding=np.asarray(keep_SE[weight_S > 0].any(axis=0)),
        weight=weight_S / weight_S.sum(),
    )


def _outliers(values_SE: FloatArray) -> tuple[BoolArray, BoolArray]:
    """Values far below and far above the quartiles of their sample."""
    first_S, third_S = np.percentile(values_SE, [25, 75], axis=1)
    spread_S = third_S - first_S
    fence_S = np.where(spread_S > 1e-12, _FENCE * spread_S, np.inf)  # of equal values none is an outlier
    return values_SE < (first_S - fence_S)[:, None], values_SE > (third_S + fence_S)[:, None]


def _votes(paths_SP: IntArray, nodes: _Nodes) -> FloatArray:
    """Share of all votes, and a little for the mean score, so that no two experts are equal that differ in it."""
    experts, on_path = len(nodes.mean), paths_SP >= 0
    weight_SP = np.broadcast_to(nodes.weight[:, None] / on_path.sum(axis=1, keepdims=True), paths_SP.shape)
    votes_E = np.bincount(paths_SP[on_path], weights=weight_SP[on_path], minlength=experts)
    place_E = np.unique(nodes.mean, return_inverse=True)[1] / experts
    return np.asarray(votes_E.round(9) + _LITTLE * place_E + 2 * nodes.outstanding)


def _free_paths(scores: Sequence[FloatArray], count: int) -> list[IntArray]:
    """The best ``count`` choices of one expert from every layer, of each sample.

    Args:
        scores: of the experts of each layer, [S, E]; any expert may follow any other.
        count: how many.

    Returns:
        Experts by layer, [S, count] or fewer, best first; -1 where there are fewer paths.
    """
    best_SP = np.zeros((len(scores[0]), 1))
    chosen, parents = [], []
    for score_SE in scores:
        all_SPE = best_SP[:, :, None] + score_SE[:, None, :]
        best_SP, place_SP = _best(all_SPE.reshape(len(score_SE), -1), count)
        parents.append(place_SP // score_SE.shape[1])
        chosen.append(place_SP % score_SE.shape[1])
    states = _followed_back(np.broadcast_to(np.arange(best_SP.shape[1]), best_SP.shape), parents[1:])
    experts = (
        np.take_along_axis(layer_SP, state_SP, axis=1) for layer_SP, state_SP in zip(chosen, states, strict=True)
    )
    return [np.where(np.isfinite(best_SP), expert_SP, -1) for expert_SP in experts]


def _linked_paths(
    start_SE: FloatArray, own: Sequence[FloatArray], steps: Sequence[FloatArray], count: int
) -> list[IntArray]:
    """The best ``count`` paths of each sample, where going from expert i to expert j has a score of its own.

    Args:
        start_SE: scores of the first layer's experts.
        own: of those of the layers after it, [S, E] each.
        steps: scores [E, E] of going to each of these from the layer before.
        count: how many.

    Returns:
        As for :func:`_free_paths`.
    """
    prefix_SEP = np.full((*start_SE.shape, count), -np.inf)  # the best ones that end at each expert
    prefix_SEP[:, :, 0] = start_SE
    parents = []
    for own_SE, step_EE in zip(own, steps, strict=True):
        prefix_SEP, parent_SEP = _extended(prefix_SEP, step_EE)
        prefix_SEP += own_SE[:, :, None]
        parents.append(parent_SEP.reshape(len(own_SE), -1))
    best_SP, end_SP = _best(prefix_SEP.reshape(len(start_SE), -1), count)
    states = _followed_back(end_SP, parents)
    return [np.where(np.isfinite(best_SP), state_SP // count, -1) for state_SP in states]


def _extended(prefix_SEP: FloatArray, step_EE: FloatArray) -> tuple[FloatArray, IntArray]:
    """The best prefixes that end at each expert of the next layer, and the number e * P + p of what they go on from."""
    samples, experts, count = prefix_SEP.shape
    ahead_SEE = (
        prefix_SEP[:, None, :, 0] + step_EE.T
    )  # the best way to each expert from each one before that is not taken
    taken_SEE = np.zeros(ahead_SEE.shape, dtype=np.int32)  # how many prefixes of the one before are
    best_SEP, parent_SEP = np.empty_like(prefix_SEP), np.empty(prefix_SEP.shape, dtype=np.int64)
    sample, to = np.ogrid[:samples, :experts]
    for number in range(count):
        before_SE = ahead_SEE.argmax(axis=-1)
        here = (sample, to, before_SE)
        rank_SE = taken_SEE[here]
        best_SEP[..., number] = ahead_SEE[here]
        parent_SEP[..., number] = before_SE * count + rank_SE
        taken_SEE[here] += 1
        following_SE = prefix_SEP[sample, before_SE, np.minimum(rank_SE + 1, count - 1)] + step_EE[before_SE, to]
        ahead_SEE[here] = np.where(rank_SE + 1 < count, following_SE, -np.inf)
    return best_SEP, parent_SEP


def _followed_back(end_SP: IntArray, parents: Sequence[IntArray]) -> list[IntArray]:
    """The states on paths that end in given ones, first layer first."""
    states = [end_SP]
    for parent_SX in reversed(parents):
        states.append(np.take_along_axis(parent_SX, states[-1], axis=1))
    return states[::-1]


def _best(values: FloatArray, count: int) -> tuple[FloatArray, IntArray]:
    """The largest values of every row, and where they are; of equal ones the first."""
    place = np.argsort(-values, axis=1, kind="stable")[:, :count]
    return np.take_along_axis(values, place, axis=1), place
