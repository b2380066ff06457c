"""Choosing between plans by a score: the best candidate, the best mix of layers, and exchanges of single experts."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import numpy as np
import pytest

from moeprune.errors import StrategyError
from moeprune.strategies.auto import Choice, Keeps, Rules, Trial, divergence, search

EXPERTS, KEPT = 6, 3
BEST = {0: (0, 1, 2), 1: (3, 4, 5)}  # what the score likes most
CANDIDATES: dict[str, Keeps] = {
    "first": {0: (0, 1, 2), 1: (0, 1, 2)},
    "second": {0: (3, 4, 5), 1: (2, 3, 4)},
    "third": {0: (1, 2, 3), 1: (1, 2, 3)},
}


class Scorer:
    """The number of experts that are not the best ones, as a divergence; remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[Keeps] = []

    def __call__(self, keeps: Sequence[Keeps]) -> list[Trial]:
        """Score some plans."""
        self.asked += keeps
        return [self.trial(one) for one in keeps]

    def trial(self, keeps: Keeps) -> Trial:
        """Score a plan."""
        wrong = sum(len(set(keep) - set(BEST[layer])) for layer, keep in keeps.items())
        return Trial(kl=float(wrong), top1=1 - wrong / 6, perplexity_ratio=1 + wrong)


def blocks_of(rules: Rules, keep: Sequence[int]) -> list[int]:
    """The block of every expert that stays, ascending."""
    return sorted(map(rules.block, keep))


def last(candidates: Mapping[str, Keeps], scorer: Scorer, rules: Rules, **options: int) -> Choice:
    """Run a search to its end."""
    return list(search(candidates, scorer, rules, **options))[-1]


def test_without_rounds_the_best_candidate_is_taken() -> None:
    """Each candidate is scored once, and nothing else is."""
    scorer = Scorer()
    choice = last(CANDIDATES, scorer, Rules(num_experts=EXPERTS), rounds=0)
    assert (choice.best, choice.keeps, choice.calls) == ("first", CANDIDATES["first"], 3)
    assert len(scorer.asked) == 3
    assert choice.finished


def test_layers_are_mixed() -> None:
    """Each layer takes the candidates' keep-list that serves best, and says whose it is."""
    choice = last(CANDIDATES, Scorer(), Rules(num_experts=EXPERTS), exchanges=0)
    assert choice.keeps == {0: (0, 1, 2), 1: (2, 3, 4)}
    assert choice.origin == {0: "first", 1: "second"}
    assert choice.trial.kl == 1


def test_exchanges_find_what_no_candidate_keeps() -> None:
    """The last wrong expert is exchanged, and no plan is scored twice for a layer."""
    scorer = Scorer()
    choice = last(CANDIDATES, scorer, Rules(num_experts=EXPERTS), rounds=4)
    assert choice.keeps == BEST
    assert choice.trial.kl == 0
    assert choice.origin[1] == "exchanges"


@pytest.mark.parametrize("n_group", [1, 2])
def test_exchanges_stay_in_their_group_and_spare_the_protected(n_group: int) -> None:
    """Every plan that is scored keeps as many experts of each group as before, and the protected ones."""
    scorer = Scorer()
    rules = Rules(num_experts=EXPERTS, n_group=n_group, protected={1: {2}})
    start = {"only": {0: (0, 1, 3), 1: (1, 2, 4)}}
    last(start, scorer, rules, rounds=4)
    for keeps, layer in itertools.product(scorer.asked, (0, 1)):
        assert blocks_of(rules, keeps[layer]) == blocks_of(rules, start["only"][layer])
        assert 2 in keeps[1]


def test_the_choice_never_gets_worse() -> None:
    """After every step the choice is at least as good as before, so that it can be interrupted."""
    divergences = [choice.trial.kl for choice in search(CANDIDATES, Scorer(), Rules(num_experts=EXPERTS))]
    assert divergences == sorted(divergences, reverse=True)
    assert divergences[0] > divergences[-1]


def test_the_table_has_the_best_first() -> None:
    """What goes into the plan lists the candidates by their divergence."""
    said = last(CANDIDATES, Scorer(), Rules(num_experts=EXPERTS)).to_dict()
    assert list(said["candidates"]) == ["first", "third", "second"]
    assert said["chosen"]["kl"] == 0
    assert said["finished"] is True


def test_domains_count_by_relative_change() -> None:
    """Halving the divergence of one domain is worth as much as halving that of another a hundred times as large."""
    kl_N, tokens_N, labels = np.array([1.0, 3.0, 400.0]), np.array([10.0, 10.0, 20.0]), ["drills", "drills", "prose"]
    whole = divergence(kl_N, tokens_N, labels)
    assert whole == pytest.approx((0.2 * 20) ** 0.5)
    assert divergence(kl_N * [0.5, 0.5, 1], tokens_N, labels) == pytest.approx(whole / 2**0.5)
    assert divergence(kl_N * [1, 1, 0.5], tokens_N, labels) == pytest.approx(whole / 2**0.5)
    assert divergence(kl_N, tokens_N, ["all"] * 3) == pytest.approx(404 / 40)


def test_weights_of_domains_are_exponents() -> None:
    """A domain of weight 0 is left out, and one without tokens says nothing."""
    kl_N, tokens_N, labels = np.array([1.0, 8.0, 0.0]), np.array([10.0, 10.0, 0.0]), ["code", "prose", "empty"]
    assert divergence(kl_N, tokens_N, labels, {"code": 0}) == pytest.approx(0.8)
    assert divergence(kl_N, tokens_N, labels, {"code": 2}) == pytest.approx((0.1**2 * 0.8) ** (1 / 3))
    assert divergence(np.zeros(2), np.ones(2), ["a", "b"]) > 0
    with pytest.raises(StrategyError, match="weight 0"):
        divergence(kl_N, tokens_N, labels, {"code": 0, "prose": 0})
