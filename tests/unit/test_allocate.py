"""How a budget is shared out over layers, against slow and direct computations."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from moeprune.errors import ConfigError, PlanError
from moeprune.plans import RouterShape
from moeprune.strategies.allocate import BUDGETS, Allocation, allocate, kept_mass, least_steps, step_mass

SHARED_OUT = [name for name in BUDGETS if name != "evolve"]


def masses(seed: int, layers: int = 5, experts: int = 16, *, n_group: int = 1) -> NDArray[np.float64]:
    """Step masses of layers of different scale and skew."""
    rng = np.random.default_rng(seed)
    scores = rng.exponential(size=(layers, experts)) ** rng.uniform(0.3, 3, (layers, 1)) * rng.uniform(
        1, 99, (layers, 1)
    )
    return np.stack([step_mass(row, n_group=n_group) for row in scores])


def shared(budget: str, mass: NDArray[np.float64], total: int | None = None, least: int = 1) -> list[int]:
    """Steps that each layer keeps, with the load in the place of the score."""
    floors = np.full(len(mass), least)
    return list(map(int, allocate(Allocation.parse(budget), mass, mass, least_L=floors, total=total)))


# --- the mass of the steps ------------------------------------------------------------------------------------------


def test_the_mass_of_scores_is_the_scores_in_order() -> None:
    """Best first, protected before all others, negative scores count as nothing."""
    scores = np.array([1.0, -2.0, 5.0, 3.0])
    assert step_mass(scores).tolist() == [5, 3, 1, 0]
    assert step_mass(scores, protected={0}).tolist() == [1, 5, 3, 0]


def test_groups_step_together() -> None:
    """With groups a step is the m-th best of every group."""
    scores = np.array([1.0, 4.0, 2.0, 9.0, 8.0, 7.0])
    assert step_mass(scores, n_group=2).tolist() == [13, 10, 8]
    assert step_mass(scores, n_group=2, protected={0}).tolist() == [10, 12, 9]


@given(st.integers(0, 999), st.sampled_from([1, 2, 4]))
def test_the_mass_of_costs_is_the_cost_of_the_layer(seed: int, n_group: int) -> None:
    """The steps of a cost matrix never rise and add up to the cost of dropping everything; a diagonal is scores."""
    square = np.random.default_rng(seed).exponential(size=(8, 8))
    cost = square @ square.T
    mass = step_mass(cost, n_group=n_group)
    assert mass.sum() == pytest.approx(cost.sum())
    assert (np.diff(mass) <= 1e-9).all()
    assert step_mass(np.diag(cost[0]), n_group=n_group) == pytest.approx(step_mass(cost[0], n_group=n_group))


def test_a_copy_of_an_expert_adds_what_is_left() -> None:
    """Taking back one of two experts whose outputs are equal saves three quarters of the cost of losing both."""
    assert step_mass(np.ones((2, 2))).tolist() == [3, 1]


# --- what each budget keeps -----------------------------------------------------------------------------------------


@given(st.integers(0, 999), st.sampled_from(SHARED_OUT), st.integers(10, 79))
def test_counts_add_up_to_the_target(seed: int, name: str, total: int) -> None:
    """Whatever the budget, exactly the target stays, never less than the floor."""
    kept = shared(name, masses(seed), total, least=2)
    assert sum(kept) == total
    assert min(kept) >= 2


@pytest.mark.parametrize("name", SHARED_OUT)
@pytest.mark.parametrize("scores", [0.1, 0.0])
def test_equal_scores_give_equal_counts(name: str, scores: float) -> None:
    """Layers whose experts are all alike keep the same number, at whatever scale; the first layers take the rest."""
    mass = scores * np.array([[1.0], [3.0], [0.7]]) * np.ones((3, 8))
    assert shared(name, mass, 15) == [5, 5, 5]
    assert shared(name, mass, 17) == [6, 6, 5]


@given(st.integers(0, 999), st.sampled_from(SHARED_OUT))
def test_layers_and_experts_have_no_order_of_their_own(seed: int, name: str) -> None:
    """Other orders of the experts or of the layers give the same counts in that order."""
    rng = np.random.default_rng(seed)
    scores = rng.exponential(size=(4, 8))
    mass = np.stack([step_mass(row) for row in scores])
    shuffled = np.stack([step_mass(rng.permutation(row)) for row in scores])
    layers = rng.permutation(4)
    kept = shared(name, mass, 18)
    assert shared(name, shuffled, 18) == kept
    if name != "uniform":  # whose rest goes to the first layers
        assert shared(name, mass[layers], 18) == [kept[layer] for layer in layers]


@given(st.integers(0, 999))
def test_global_is_one_ranking_of_scores_over_their_mean(seed: int) -> None:
    """The experts that stay are the best of all, whatever the scale of a layer's scores."""
    mass = masses(seed)
    relative = mass / mass.mean(axis=1, keepdims=True)
    line = np.sort(relative.ravel())[-30]
    assert shared("global", mass, 30, least=0) == (relative >= line).sum(axis=1).tolist()


def slow_laep(load: NDArray[np.float64], alpha: float, beta: float) -> int:
    """Experts of one layer that stay, by the rule as it is written: quietest first, while both bounds hold."""
    gone, removed = 0.0, 0
    for own in sorted(load):
        gone += own
        if own > alpha * load.mean() or gone > beta * load.sum():
            break
        removed += 1
    return len(load) - removed


@given(st.integers(0, 999), st.sampled_from([0.2, 0.4, 1.0, math.inf]), st.floats(0, 0.9))
def test_laep_is_the_rule_of_the_paper(seed: int, alpha: float, beta: float) -> None:
    """The quietest experts go while each is below alpha times the mean and together they hold at most beta."""
    load = np.random.default_rng(seed).integers(0, 50, (3, 12)).astype(float)
    kept = shared(f"laep:alpha={alpha},beta={beta}", np.stack([step_mass(row) for row in load]), least=0)
    assert kept == [slow_laep(row, alpha, beta) for row in load]


def test_laep_with_nothing_to_spare_drops_the_idle() -> None:
    """Without alpha and with a beta of 0 exactly the experts without a token go."""
    load = np.array([[5.0, 1.0, 1e-9, 0.0], [3.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]])
    assert shared("laep:beta=0", load) == [3, 1, 4]


@given(st.integers(0, 999), st.integers(6, 60))
def test_laep_reaches_a_target_where_a_bisection_would(seed: int, total: int) -> None:
    """The counts for a target are those of some beta, the smallest that lets so many go."""
    mass = masses(seed)
    tails = np.cumsum(mass[:, ::-1], axis=1) / mass.sum(axis=1, keepdims=True)
    beta = np.sort(tails.ravel())[mass.size - total - 1]
    assert shared("laep", mass, total, least=0) == shared(f"laep:beta={beta:.17g}", mass, least=0)


def test_an_alpha_that_holds_too_many_is_refused() -> None:
    """Experts above alpha times the mean stay, so a target may be out of reach; the message has the numbers."""
    mass = np.array([[9.0, 5.0, 1.0, 1.0]] * 2)
    assert shared("laep:alpha=0.5", mass, 4) == [2, 2]
    with pytest.raises(ConfigError, match=r"alpha=0\.5 lets 4 steps go, and 5 should"):
        shared("laep:alpha=0.5", mass, 3)


def slow_coverage(scores: NDArray[np.float64], fraction: float) -> int:
    """Length of the shortest prefix that holds the fraction of the positive scores."""
    best = np.sort(np.maximum(scores, 0))[::-1]
    return next(count for count in range(len(best) + 1) if best[:count].sum() >= fraction * best.sum() * (1 - 1e-9))


@given(st.integers(0, 999), st.floats(0.01, 0.99))
def test_coverage_keeps_the_shortest_prefix(seed: int, fraction: float) -> None:
    """In every layer the fewest experts that hold the fraction."""
    scores = np.random.default_rng(seed).normal(1, 1, (3, 12))
    kept = shared(f"coverage:fraction={fraction}", np.stack([step_mass(row) for row in scores]), least=0)
    assert kept == [slow_coverage(row, fraction) for row in scores]


def test_full_coverage_keeps_all_that_score() -> None:
    """A fraction of 1 keeps every expert with a positive score, however small, and a tenth of ten equals is one."""
    mass = np.stack([step_mass(np.array(row)) for row in ([9.0, 1e-17, 0.0, -3.0], [1.0, 1.0, 1.0, 0.0])])
    assert shared("coverage:fraction=1", mass) == [2, 3]
    assert shared("coverage:fraction=0.9", np.ones((1, 10))) == [9]


def test_alpha_and_coverage_look_at_different_things() -> None:
    """LAEP goes by the load and coverage by the score, each whatever the other is."""
    score, load = np.array([[8.0, 1, 1, 1], [2, 2, 2, 2]]), np.array([[2.0, 2, 2, 2], [8, 1, 1, 1]])
    floors = np.ones(2, dtype=int)
    kept = {name: allocate(Allocation(name=name), score, load, least_L=floors, total=5).tolist() for name in SHARED_OUT}
    assert kept["laep"] == [3, 2]
    assert kept["coverage"] == [2, 3]


# --- floors and options ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "protected", "least"),
    [
        (RouterShape(num_experts=16, top_k=3), set(), 3),
        (RouterShape(num_experts=16, top_k=3), {1, 2, 3, 4, 5}, 5),
        (RouterShape(num_experts=16, top_k=3, n_group=4, topk_group=2), set(), 2),
        (RouterShape(num_experts=16, top_k=6, n_group=4, topk_group=2), set(), 3),
        (RouterShape(num_experts=16, top_k=3, n_group=4, topk_group=2), {0, 1, 2, 15}, 3),
    ],
)
def test_what_no_layer_can_do_without(shape: RouterShape, protected: set[int], least: int) -> None:
    """Top-k within reach, two experts in every group, and the protected ones of the fullest group."""
    assert least_steps(shape, protected) == least


def test_less_than_the_floors_is_refused() -> None:
    """A total below what the layers cannot do without is an error."""
    with pytest.raises(PlanError, match="9 steps should stay and 10 must"):
        shared("global", masses(0), 9, least=2)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("leap", "did you mean 'laep'"),
        ("laep:gamma=1", "no option 'gamma'.*alpha, beta"),
        ("uniform:alpha=1", "no option 'alpha'.*none"),
        ("laep:beta=much", "beta must be a number, not 'much'"),
        ("laep:beta=1.5", "at least 0 and at most 1"),
        ("laep:alpha=-1", "at least 0$"),
        ("coverage:fraction=nan", "at least 0 and at most 1"),
    ],
)
def test_budgets_that_cannot_be_read(text: str, message: str) -> None:
    """The name, the option or its value is named."""
    with pytest.raises(ConfigError, match=message):
        Allocation.parse(text)


def test_budgets_are_read_with_their_options() -> None:
    """Options stand behind a colon; thresholds take the place of a ratio, alpha alone does not."""
    expected: dict[str, Any] = {"name": "laep", "alpha": 0.4, "beta": 0.1, "fraction": None}
    assert Allocation.parse("laep:alpha=0.4, beta=0.1") == Allocation(**expected)
    assert Allocation.parse("laep:beta=0").sized
    assert Allocation.parse("coverage:fraction=0.9").sized
    assert not Allocation.parse("laep:alpha=0.4").sized
    assert Allocation.parse("laep:alpha=inf") == Allocation(name="laep")


def test_a_budget_without_thresholds_needs_a_total() -> None:
    """Nothing says how many experts should stay."""
    for text in ("global", "laep:alpha=0.4", "coverage", "uniform"):
        with pytest.raises(ConfigError, match=f"--budget {text.partition(':')[0]} needs --ratio or --keep"):
            shared(text, masses(0))


def test_the_share_of_the_mass_that_stays() -> None:
    """Mean over layers; a layer without any loses nothing."""
    mass = np.array([[6.0, 3, 1], [1, 1, 0], [0, 0, 0]])
    assert kept_mass(mass, np.array([2, 1, 0])) == pytest.approx((0.9 + 0.5 + 1) / 3)
