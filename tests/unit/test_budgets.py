"""What a budget wishes for, and what is made of it where every layer must keep the same number."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from moeprune.budgets import LayerMasses, even_shares, realise
from moeprune.errors import ConfigError, PlanError
from moeprune.plans import Budget, RouterShape
from moeprune.strategies.allocate import Allocation

PLAIN = RouterShape(num_experts=8, top_k=2)
GROUPED = RouterShape(num_experts=8, top_k=2, n_group=2, topk_group=1)
STEEP = np.array([64.0, 32, 16, 8, 4, 2, 1, 0])
FLAT = np.full(8, 5.0)


def masses(
    *scores: NDArray[np.float64], shape: RouterShape = PLAIN, protected: dict[int, set[int]] | None = None
) -> LayerMasses:
    """Layers 1, 2, ... with these scores, which are the load too."""
    layers = dict(enumerate(scores, start=1))
    return LayerMasses.of(shape, layers, layers, protected or {})


def wish(of: LayerMasses, budget: str, kept: int | None) -> dict[int, int]:
    """Experts by layer."""
    return of.wish(Allocation.parse(budget), kept)


def test_flat_layers_keep_more() -> None:
    """Coverage takes from the layer whose score sits in few experts, and the sum is that of the uniform plan."""
    assert wish(masses(STEEP, FLAT), "coverage", 4) == {1: 2, 2: 6}
    assert wish(masses(STEEP, FLAT), "uniform", 4) == {1: 4, 2: 4}


def test_groups_move_together() -> None:
    """With groups every count is a multiple of them, however the scores lie, and never below two in each."""
    kept = wish(masses(STEEP, FLAT, shape=GROUPED), "global", 6)
    assert kept == {1: 4, 2: 8}
    assert wish(masses(STEEP, FLAT, shape=GROUPED), "coverage:fraction=0.01", None) == {1: 4, 2: 4}


def test_protected_experts_raise_a_layers_floor() -> None:
    """Protected experts come first, however poor, and the best one on top of them is worth more than others."""
    kept = wish(masses(STEEP, FLAT, protected={1: {7, 6, 5, 4, 3}}), "coverage", 4)
    assert kept == {1: 6, 2: 2}
    with pytest.raises(PlanError, match="6 steps should stay and 7 must"):
        wish(masses(STEEP, FLAT, protected={1: {7, 6, 5, 4, 3}}), "coverage", 3)


def test_costs_are_shared_out_like_scores() -> None:
    """A diagonal cost matrix is scores; doubling every expert makes a layer need more of them."""
    diagonal = wish(masses(np.diag(STEEP), np.diag(FLAT)), "coverage", 4)
    assert diagonal == wish(masses(STEEP, FLAT), "coverage", 4)
    # each expert twice: the first of a pair saves three quarters
    twins = np.asarray(np.kron(np.eye(4), np.ones((2, 2))), np.float64)
    assert wish(masses(twins, np.eye(8)), "global", 5) == {1: 4, 2: 6}


def test_a_uniform_plan_says_what_it_loses() -> None:
    """Without the flag all layers keep the same number; the wish, what it would have kept and a note are there."""
    own = masses(STEEP, FLAT)
    shares = realise(own, {1: 2, 2: 6}, "coverage", Budget(ratio="0.5"), allow_non_uniform=False)
    assert shares.kept == {1: 4, 2: 4}
    lost = (96 / 127 + 6 / 8) / 2 - (120 / 127 + 4 / 8) / 2
    assert shares.budget == {
        "allocation": "coverage",
        "of": 8,
        "n_group": 1,
        "wish": {"1": 2, "2": 6},
        "realised": "uniform",
        "lost": round(lost, 6),
    }
    [note] = shares.notes
    assert "would keep 2 experts (layer 1) to 6 (layer 2); every layer keeps 4" in note
    assert f"keeps {100 * lost:.1f} % of the layers' score mass less" in note
    assert "--allow-non-uniform" in note


def test_a_loss_can_be_a_gain() -> None:
    """A budget that goes by the load may keep less of the score than the uniform plan, and the note says so."""
    shares = realise(masses(STEEP, FLAT), {1: 6, 2: 2}, "laep", Budget(keep=4), allow_non_uniform=False)
    assert shares.budget["lost"] < 0
    assert "more" in shares.notes[0]


def test_with_the_flag_the_wish_comes_true() -> None:
    """The wish is what stays; nothing is lost and nothing noted."""
    shares = realise(masses(STEEP, FLAT), {1: 2, 2: 6}, "coverage", Budget(keep=4), allow_non_uniform=True)
    assert shares.kept == {1: 2, 2: 6}
    assert shares.budget["realised"] == "per layer"
    assert "lost" not in shares.budget
    assert shares.notes == ()


@pytest.mark.parametrize("allow", [True, False])
def test_an_even_wish_is_a_uniform_plan(allow: bool) -> None:
    """Where the budget wants the same everywhere there is nothing to give up."""
    shares = realise(masses(STEEP, STEEP), {1: 4, 2: 4}, "global", Budget(keep=4), allow_non_uniform=allow)
    assert shares.budget["realised"] == "uniform"
    assert shares.budget["lost"] == 0
    assert shares.notes == ()


@pytest.mark.parametrize(
    ("shape", "wished", "budget", "kept"),
    [
        (PLAIN, {1: 2, 2: 5}, Budget(), 4),
        (PLAIN, {1: 2, 2: 4}, Budget(), 3),
        (PLAIN, {1: 2, 2: 4}, Budget(round_to=4), 4),
        (GROUPED, {1: 4, 2: 6}, Budget(), 6),
    ],
)
def test_thresholds_are_rounded_towards_keeping_more(
    shape: RouterShape, wished: dict[int, int], budget: Budget, kept: int
) -> None:
    """Where thresholds say how many stay, the uniform count is their mean, rounded up to what the router can take."""
    own = masses(STEEP, FLAT, shape=shape)
    assert set(realise(own, wished, "laep", budget, allow_non_uniform=False).kept.values()) == {kept}


def test_a_cut_that_rounds_away_is_refused() -> None:
    """One expert of one layer cannot be a uniform plan, and thresholds that drop nothing are no plan at all."""
    with pytest.raises(ConfigError, match="cannot keep 8 of 8"):
        realise(masses(STEEP, FLAT), {1: 7, 2: 8}, "laep", Budget(), allow_non_uniform=False)
    with pytest.raises(ConfigError, match="--budget laep lets no expert go"):
        wish(masses(FLAT, FLAT), "laep:beta=0", None)


def test_even_shares_are_what_plans_always_said() -> None:
    """The budget of a uniform plan has its four facts and no other."""
    shares = even_shares(GROUPED, (1, 2), 4)
    assert shares.kept == {1: 4, 2: 4}
    assert shares.budget == {"allocation": "uniform", "kept": 4, "of": 8, "n_group": 2}
