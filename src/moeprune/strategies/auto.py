"""Choose between plans by what they do to the model's predictions: the best candidate, then the best mix of layers.

No criterion wins on every model, so the choice is measured: every candidate is scored by the teacher-forced agreement
of its model with the original on text that nothing was calibrated on, every domain of which counts by how far it moves
relative to itself. Then each layer in turn may take the keep-list of
another candidate or exchange experts that the candidates do not agree on, as long as that brings the predictions closer
to the original's.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from moeprune.errors import StrategyError
from moeprune.statistics import FloatArray

Keeps = Mapping[int, tuple[int, ...]]  # experts that stay, by decoder layer
Score = Callable[[Sequence[Keeps]], Sequence["Trial"]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """What one plan did to the predictions on the selection text.

    Attributes:
        kl: mean KL(original || plan) per token in nats, by which plans are chosen: the geometric mean over domains.
        top1: share of tokens on which both put the same token first.
        perplexity_ratio: the plan's perplexity over the original's.
    """

    kl: float
    top1: float
    perplexity_ratio: float

    def to_dict(self) -> dict[str, float]:
        """Rounded for a plan file."""
        return {name: float(f"{getattr(self, name):.6g}") for name in ("kl", "top1", "perplexity_ratio")}


def divergence(
    kl_N: FloatArray, tokens_N: FloatArray, domains: Sequence[str], weights: Mapping[str, float] | None = None
) -> float:
    """Geometric mean over domains of the mean divergence per token, in nats.

    Predictable text (drills, code) diverges little and other text much, whatever the plan: in a plain mean the former
    would not count, and it is what tasks ask for.

    Args:
        kl_N: sums over the tokens of each document; tokens_N: how many there are.
        domains: label of each document.
        weights: of domains, 1 where none is given; 0 leaves one out.

    Raises:
        StrategyError: nothing is left.
    """
    labels, logs, factors = np.array(domains), [], []
    for domain in sorted(set(domains)):
        tokens = tokens_N[labels == domain].sum()
        factor = (weights or {}).get(domain, 1.0)
        if tokens and factor:
            factors.append(factor)
            logs.append(np.log(max(kl_N[labels == domain].sum() / tokens, _EXACT)))
    if not logs:
        raise StrategyError("every domain of the selection text has weight 0", "give --weights to one of them")
    return float(np.exp(np.average(logs, weights=factors)))


_EXACT = 1e-12  # nats per token; what is closer to the original than that is no better


@dataclass(slots=True, kw_only=True)
class Choice:
    """The best plan so far, which an interrupted search gives too.

    Attributes:
        keeps: experts that stay by layer.
        origin: the candidate that each layer's keep-list is of.
        best: the candidate that was best on its own.
        trials: what every candidate did; trial: what the chosen mix does.
        calls: how many plans were scored.
    """

    keeps: dict[int, tuple[int, ...]]
    origin: dict[int, str]
    best: str
    trials: Mapping[str, Trial]
    trial: Trial
    calls: int = 0
    finished: bool = field(default=False)

    def to_dict(self) -> dict[str, Any]:
        """For the plan file: the table of candidates, the best first, and what was made of them."""
        ranked = sorted(self.trials.items(), key=lambda item: item[1].kl)
        return {
            "best": self.best,
            "candidates": {name: trial.to_dict() for name, trial in ranked},
            "chosen": self.trial.to_dict(),
            "layers": {str(layer): name for layer, name in sorted(self.origin.items())},
            "scored": self.calls,
            "finished": self.finished,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """What an exchange of experts must respect.

    Attributes:
        num_experts: experts of a layer; n_group: contiguous blocks of them, each of which keeps its number.
        protected: experts by layer that stay.
    """

    num_experts: int
    n_group: int = 1
    protected: Mapping[int, Set[int]] = field(default_factory=dict)

    def block(self, expert: int) -> int:
        """The block that an expert is in."""
        return expert * self.n_group // self.num_experts


def search(
    candidates: Mapping[str, Keeps], score: Score, rules: Rules, *, rounds: int = 2, exchanges: int = 8
) -> Iterator[Choice]:
    """Score the candidates, mix their layers, then exchange single experts.

    Args:
        candidates: keep-lists of the same layers by the name of what made them.
        score: trials of many plans in one call, in the order given.
        rules: what an exchange must respect.
        rounds: how often every layer may change its keep-list; 0 takes the best candidate as it is.
        exchanges: exchanges that are tried for a layer in one round; 0 tries none.

    Yields:
        The same choice after each call of ``score``, better every time or as it was; stop whenever you like.

    Example:
        >>> for choice in search(candidates, score, Rules(num_experts=32)):
        ...     print(choice.trial.kl)
    """
    names = list(candidates)
    trials = dict(zip(names, score([candidates[name] for name in names]), strict=True))
    best = min(names, key=lambda name: trials[name].kl)
    keeps = {layer: tuple(keep) for layer, keep in candidates[best].items()}
    choice = Choice(
        keeps=keeps,
        origin=dict.fromkeys(keeps, best),
        best=best,
        trials=trials,
        trial=trials[best],
        calls=len(names),
    )
    yield choice
    others = {layer: _others(layer, candidates) for layer in sorted(keeps)}
    yield from _rounds(choice, score, rounds, others.__getitem__)
    if exchanges:
        votes = {layer: _votes(layer, candidates) for layer in keeps}
        tried: set[tuple[int, tuple[int, ...]]] = set()

        def proposals(layer: int) -> dict[tuple[int, ...], str]:
            return _exchanged(layer, choice.keeps[layer], votes[layer], rules, exchanges, tried)

        yield from _rounds(choice, score, rounds, proposals)
    choice.finished = True
    yield choice


def _rounds(
    choice: Choice, score: Score, rounds: int, proposals: Callable[[int], Mapping[tuple[int, ...], str]]
) -> Iterator[Choice]:
    """Let every layer in turn take the best of what is proposed for it, until nothing new is proposed."""
    seen: set[tuple[tuple[int, tuple[int, ...]], ...]] = set()
    for _ in range(rounds):
        before = len(seen)
        for layer in sorted(choice.keeps):
            fresh = {}
            for keep, name in proposals(layer).items():
                plan = tuple(sorted((choice.keeps | {layer: keep}).items()))
                if keep != choice.keeps[layer] and plan not in seen:
                    seen.add(plan)
                    fresh[keep] = name
            if fresh:
                _improve(choice, layer, fresh, score)
                yield choice
        if len(seen) == before:
            return


def _improve(choice: Choice, layer: int, proposed: Mapping[tuple[int, ...], str], score: Score) -> None:
    """Take the proposed keep-list that brings the predictions closest to the original's, if one does."""
    found = score([choice.keeps | {layer: keep} for keep in proposed])
    choice.calls += len(proposed)
    best = min(range(len(found)), key=lambda place: found[place].kl)
    if found[best].kl < choice.trial.kl:
        keep = list(proposed)[best]
        choice.keeps[layer], choice.origin[layer], choice.trial = keep, proposed[keep], found[best]


def _others(layer: int, candidates: Mapping[str, Keeps]) -> dict[tuple[int, ...], str]:
    """The candidates' different keep-lists of a layer."""
    found: dict[tuple[int, ...], str] = {}
    for name, keeps in candidates.items():
        found.setdefault(tuple(keeps[layer]), name)
    return found


def _votes(layer: int, candidates: Mapping[str, Keeps]) -> Counter[int]:
    """How many candidates keep each expert of a layer."""
    return Counter(expert for keeps in candidates.values() for expert in keeps[layer])


def _exchanged(
    layer: int,
    keep: tuple[int, ...],
    votes: Counter[int],
    rules: Rules,
    count: int,
    tried: set[tuple[int, tuple[int, ...]]],
) -> dict[tuple[int, ...], str]:
    """Keep-lists with one expert exchanged, those first on which the candidates' votes speak the most for it."""
    leaving = [expert for expert in keep if expert not in rules.protected.get(layer, ())]
    coming = [expert for expert in range(rules.num_experts) if expert not in set(keep)]
    pairs = [(out, new) for out in leaving for new in coming if rules.block(out) == rules.block(new)]
    pairs.sort(key=lambda pair: (votes[pair[0]] - votes[pair[1]], pair))
    found: dict[tuple[int, ...], str] = {}
    for out, new in pairs:
        if len(found) == count:
            break
        exchanged = tuple(sorted({*keep, new} - {out}))
        if (layer, exchanged) not in tried:
            tried.add((layer, exchanged))
            found[exchanged] = "exchanges"
    return found
