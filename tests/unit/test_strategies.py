"""Every strategy under one contract, the formulas against brute force, and the guard of super experts."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from moeprune.errors import ConfigError, StrategyError
from moeprune.plans import Budget, RouterShape
from moeprune.statistics import STATISTICS, LayerStatistics, RouterStatistics
from moeprune.strategies import BUILTIN, DEFAULT, Strategy, resolve
from moeprune.strategies.guards import super_experts
from moeprune.strategies.selection import select

Array = NDArray[Any]
EXPERTS, TOP_K, TOKENS, WIDTH = 12, 3, 150, 4
# Strategies that read more than every collection adds up have their tests in test_published.py.
LOCAL = [name for name, strategy in BUILTIN.items() if {*strategy.needs} <= STATISTICS.keys()]
EVERY = pytest.mark.parametrize("name", LOCAL)
MEASURED = [name for name in LOCAL if BUILTIN[name].calibrated]
DRAWS = pytest.mark.skip(reason="it draws by index and does not look at the experts")
BY_EXPERT = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in MEASURED else DRAWS) for name in LOCAL]
)


def routed(seed: int = 0, never: tuple[int, ...] = ()) -> Array:
    """Gated outputs g f(x) [tokens, experts, width] of random routing, zero where an expert was not chosen."""
    rng = np.random.default_rng(seed)
    liked = rng.normal(size=EXPERTS)
    liked[list(never)] = -np.inf
    logits_TE = rng.normal(size=(TOKENS, EXPERTS)) + liked
    chosen_TK = np.argsort(-logits_TE, axis=1)[:, :TOP_K]
    outputs_TED = np.zeros((TOKENS, EXPERTS, WIDTH))
    for token, experts in enumerate(chosen_TK):
        gates_K = rng.dirichlet(np.ones(TOP_K))
        outputs_TED[token, experts] = gates_K[:, None] * rng.normal(size=(TOP_K, WIDTH)) * (1 + experts[:, None] % 5)
    return outputs_TED


def measure(outputs_TED: Array, gate: float = 0.25) -> dict[str, Array]:
    """The statistics of gated outputs, as one domain; every gate is the same, so f(x) is the output over the gate."""
    norms_TE = np.linalg.norm(outputs_TED, axis=2)
    hits_TE = (norms_TE > 0).astype(np.int64)
    values = {
        "tokens": np.array(len(outputs_TED)),
        "count": hits_TE.sum(axis=0),
        "gate_sum": gate * hits_TE.sum(axis=0),
        "gate_sq_sum": gate**2 * hits_TE.sum(axis=0),
        "soft_prob_sum": gate * hits_TE.sum(axis=0),
        "norm_sum": (norms_TE / gate).sum(axis=0),
        "norm_sq_sum": ((norms_TE / gate) ** 2).sum(axis=0),
        "gated_norm_sum": norms_TE.sum(axis=0),
        "gated_norm_sq_sum": (norms_TE**2).sum(axis=0),
        "max_abs_down": np.abs(outputs_TED / gate).max(axis=(0, 2)),
        "pair_count": hits_TE.T @ hits_TE,
        "pair_gated_norm": norms_TE.T @ norms_TE,
        "gram": np.einsum("tid,tjd->ij", outputs_TED, outputs_TED),
    }
    assert values.keys() == STATISTICS.keys()
    return {name: np.asarray(array)[None] for name, array in values.items()}


def statistics(layers: dict[int, dict[str, Array]], *domains: str) -> RouterStatistics:
    """Statistics of a model from those of its layers."""
    return RouterStatistics(
        domains=domains or ("a",), num_experts=EXPERTS, top_k=TOP_K, layers=layers, command={}, inputs={"model": "m"}
    )


def layer_of(outputs_TED: Array, seed: int = 0) -> LayerStatistics:
    """One layer's statistics as a strategy sees them."""
    return statistics({2: measure(outputs_TED)}).layer(2, seed=seed)


def kept(name: str, outputs_TED: Array, keep: int, **options: Any) -> tuple[int, ...]:
    """The experts that a strategy keeps."""
    return select(resolve(name)(layer_of(outputs_TED)), keep, **options).keep


# --- the contract ---------------------------------------------------------------------------------------------------


@BY_EXPERT
@pytest.mark.parametrize("n_group", [1, 3])
def test_renaming_the_experts_renames_the_choice(name: str, n_group: int) -> None:
    """The same experts stay under new numbers, inside their groups where the router has groups."""
    size = EXPERTS // n_group
    for seed in range(5):
        outputs = routed(seed)
        rng = np.random.default_rng(seed)
        order = np.concatenate([group * size + rng.permutation(size) for group in range(n_group)])
        before = kept(name, outputs, 6, n_group=n_group)
        after = kept(name, outputs[:, order], 6, n_group=n_group)
        assert sorted(order[list(after)]) == list(before)


@EVERY
@pytest.mark.parametrize("n_group", [1, 3])
def test_exactly_as_many_as_asked_for_stay(name: str, n_group: int) -> None:
    """In every group, for every count that the budget lets through, which is never under top-k."""
    router = RouterShape(num_experts=EXPERTS, top_k=TOP_K, n_group=n_group, topk_group=max(1, n_group - 1))
    outputs = routed()
    with pytest.raises(ConfigError, match=r"top-3|fewer than the 2"):
        Budget(keep=router.smallest() - n_group).kept(router)
    for count in range(router.smallest(), EXPERTS, n_group):
        keep = kept(name, outputs, Budget(keep=count).kept(router), n_group=n_group)
        per_group = np.bincount(np.array(keep) // (EXPERTS // n_group), minlength=n_group)
        assert per_group.tolist() == [count // n_group] * n_group
        assert keep == tuple(sorted(set(keep)))


@BY_EXPERT
@pytest.mark.parametrize("n_group", [1, 3])
def test_of_equal_experts_the_first_stay(name: str, n_group: int) -> None:
    """Ties go by index."""
    outputs = np.zeros((EXPERTS, EXPERTS, WIDTH))
    outputs[np.arange(EXPERTS), np.arange(EXPERTS)] = 0.5  # each expert alone once, all with the same output
    size = EXPERTS // n_group
    first = [expert for expert in range(EXPERTS) if expert % size < 6 // n_group]
    assert list(kept(name, outputs, 6, n_group=n_group)) == first


@EVERY
def test_protected_experts_stay_whatever_the_strategy_says(name: str) -> None:
    """The first six that it would drop, made untouchable."""
    outputs = routed()
    unloved = set(range(EXPERTS)) - set(kept(name, outputs, 6))
    assert set(kept(name, outputs, 6, protected=unloved)) == unloved
    assert unloved < set(kept(name, outputs, 9, protected=unloved))


@BY_EXPERT
def test_experts_that_were_never_routed_to_go_first(name: str) -> None:
    """They score 0 without a division by zero."""
    stats = layer_of(routed(never=(0, 7)))
    values = resolve(name)(stats)
    own = values if values.ndim == 1 else np.diag(values)
    assert (own[[0, 7]] == 0).all()
    assert (np.delete(own, [0, 7]) > 0).all()
    assert set(range(EXPERTS)) - set(select(values, 10).keep) == {0, 7}


@EVERY
def test_a_strategy_gives_the_same_values_every_time(name: str) -> None:
    """And leaves the statistics as they were."""
    measured = measure(routed())
    before = {key: array.copy() for key, array in measured.items()}
    first, second = (resolve(name)(statistics({2: measured}).layer(2)) for _ in range(2))
    np.testing.assert_array_equal(first, second)
    for key, array in before.items():
        np.testing.assert_array_equal(measured[key], array)


@EVERY
@pytest.mark.parametrize("scale", [1e-6, 0.125, 50.0])
def test_the_scale_of_domain_weights_does_not_matter(name: str, scale: float) -> None:
    """Only their proportion does: a weighted count below one is still a count."""
    measured = {
        key: np.concatenate([one, two])
        for (key, one), two in zip(measure(routed(0)).items(), measure(routed(1)).values(), strict=True)
    }
    made = statistics({2: measured}, "a", "b")
    plain, scaled = (resolve(name)(made.layer(2, {"a": factor, "b": 3 * factor})) for factor in (1.0, scale))
    assert select(plain, 6).keep == select(scaled, 6).keep
    if name in {"reap", "man", "msan", "hope", "hope-total", "gram"}:
        np.testing.assert_allclose(scaled, plain, rtol=1e-9)


@pytest.mark.parametrize("name", MEASURED)
def test_a_missing_statistic_is_named_with_a_hint(name: str) -> None:
    """Statistics of no data, and a file that lacks all but the token count."""
    nothing = RouterStatistics.empty([2], num_experts=EXPERTS, top_k=TOP_K, model="m")
    partial = statistics({2: {"tokens": np.array([5])}})
    for source in (nothing, partial):
        with pytest.raises(StrategyError, match=r"has no '.*' for layer 2") as caught:
            resolve(name)(source.layer(2))
        assert "--calibration" in caught.value.hint


def test_the_control_needs_no_data_and_follows_the_seed() -> None:
    """Another seed and another layer draw anew; the same ones do not."""
    nothing = RouterStatistics.empty([2, 3], num_experts=EXPERTS, top_k=TOP_K, model="m")
    draws = [resolve("random")(nothing.layer(layer, seed=seed)) for layer, seed in [(2, 0), (2, 1), (3, 0), (2, 0)]]
    np.testing.assert_array_equal(draws[0], draws[3])
    assert len({tuple(draw) for draw in draws}) == 3
    assert [name for name, strategy in BUILTIN.items() if not strategy.calibrated] == ["aimer", "random"]


# --- formulas -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "b", "alpha", "beta"),
    [
        ("frequency", 0, 0, 0),
        ("routing-mass", 0, 1, 0),
        ("ean", 0, 0, 1),
        ("man", 1, 0, 1),
        ("msan", 1, 0, 2),
        ("reap", 1, 1, 1),
        ("gated-norm", 0, 1, 1),
        ("gated-norm-sq", 0, 2, 2),
    ],
)
def test_published_names_are_members_of_the_family(name: str, b: int, alpha: int, beta: int) -> None:
    """Each is S(b, alpha, beta), by its other name and by its definition over single tokens."""
    outputs, gate = routed(), 0.25
    stats = layer_of(outputs)
    norms_TE = np.linalg.norm(outputs, axis=2) / gate
    hits_TE = norms_TE > 0
    by_hand = (hits_TE * gate**alpha * norms_TE**beta).sum(axis=0) / hits_TE.sum(axis=0) ** b
    np.testing.assert_allclose(resolve(name)(stats), by_hand)
    np.testing.assert_array_equal(resolve(f"S({b}, {alpha},{beta})")(stats), resolve(name)(stats))


def test_the_power_of_the_count_may_be_a_fraction() -> None:
    """S(0.5, 1, 1) lies between the sum and the mean."""
    stats = layer_of(routed(never=(3,)))
    root = resolve("s(0.5,1,1)")(stats)
    np.testing.assert_allclose(root**2, resolve("reap")(stats) * resolve("gated-norm")(stats))


def test_the_gram_cost_is_the_squared_change_of_the_output() -> None:
    """For any set of dropped experts: the mean over tokens of the squared norm of what goes."""
    outputs = routed()
    cost = resolve("gram")(layer_of(outputs))
    rng = np.random.default_rng(1)
    for size in (1, 2, 6, EXPERTS):
        dropped = rng.permutation(EXPERTS)[:size]
        change = (np.linalg.norm(outputs[:, dropped].sum(axis=1), axis=1) ** 2).mean()
        assert cost[np.ix_(dropped, dropped)].sum() == pytest.approx(change)


def test_hope_bounds_the_gram_cost() -> None:
    """Over all tokens, products of norms bound inner products, with equality on the diagonal."""
    stats = layer_of(routed())
    bound, exact = resolve("hope-total")(stats), resolve("gram")(stats)
    assert (bound >= np.abs(exact) - 1e-12).all()
    np.testing.assert_allclose(np.diag(bound), np.diag(exact))
    np.testing.assert_allclose(np.diag(bound), stats.gated_norm_sq_sum / TOKENS)


def test_hope_as_published_takes_the_mean_over_shared_tokens() -> None:
    """A pair that met once weighs as much as one that always meets, and one that never met costs nothing."""
    outputs = routed(never=(4,))
    norms_TE = np.linalg.norm(outputs, axis=2)
    cost = resolve("hope")(layer_of(outputs))
    for first in range(EXPERTS):
        for second in range(EXPERTS):
            both = norms_TE[:, first] * norms_TE[:, second]
            assert cost[first, second] == pytest.approx(both[both > 0].mean() if (both > 0).any() else 0)


def test_hope_of_experts_that_never_meet_drops_the_smallest() -> None:
    """The matrix is diagonal then, and the choice is a sort of mean squared gated norms."""
    outputs = np.zeros((EXPERTS * 2, EXPERTS, WIDTH))
    sizes = np.random.default_rng(6).permutation(EXPERTS) + 1.0
    for token in range(EXPERTS * 2):
        outputs[token, token % EXPERTS, 0] = sizes[token % EXPERTS]
    for name in ("hope", "hope-total", "gram"):
        assert kept(name, outputs, 5) == tuple(np.flatnonzero(sizes > EXPERTS - 5).tolist())


def test_only_the_gram_sees_experts_that_cancel() -> None:
    """Two large outputs of opposite sign, always together: HOPE keeps both, the Gram drops both."""
    outputs = np.zeros((40, EXPERTS, WIDTH))
    outputs[:, 0, 0], outputs[:, 1, 0] = 9.0, -9.0
    outputs[:, 2:, 1] = 1.0
    assert {0, 1} <= set(kept("hope", outputs, 6)) & set(kept("hope-total", outputs, 6))
    assert not {0, 1} & set(kept("gram", outputs, 6))


# --- names and callables --------------------------------------------------------------------------------------------


@EVERY
def test_every_builtin_is_described(name: str) -> None:
    """Its own name, one line for people, and a paper unless it is ours or a control."""
    strategy = resolve(name)
    assert strategy is BUILTIN[name]
    assert strategy.name == name
    assert strategy.summary
    assert strategy.paper or name in {"gram", "random"}


def test_the_default_is_a_builtin() -> None:
    """Changing the table cannot leave it behind."""
    assert DEFAULT in BUILTIN


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("repa", "unknown strategy 'repa' .*did you mean 'reap'"),
        ("zzz", "unknown strategy 'zzz' .*known: aimer, auto, ean"),
        ("S(1,1)", "unknown strategy"),
        ("S(1.2.3,1,1)", "unknown strategy"),
        ("S(-1,1,1)", "unknown strategy"),
        ("S(1,3,1)", r"no sum is collected for \(alpha, beta\) = \(3,1\) .*known: \(0,0\)"),
        ("", "unknown strategy ''"),
    ],
)
def test_names_that_are_not_there(name: str, why: str) -> None:
    """The nearest names, or what sums there are."""
    with pytest.raises(StrategyError, match=why):
        resolve(name)


def even_first(stats: LayerStatistics) -> Array:
    """A criterion of one's own."""
    return np.arange(stats.num_experts) % 2 * -1.0 * stats.count.mean()


class Quadratic:
    """A criterion with settings."""

    def __call__(self, stats: LayerStatistics) -> Array:
        """Costs of pairs."""
        return np.asarray(stats.gram * 2)


def test_any_callable_is_a_strategy() -> None:
    """A function is called by its name, an object by its class, and a Strategy stays what it is."""
    stats = layer_of(routed())
    assert resolve(even_first).name == "even_first"
    assert select(resolve(even_first)(stats), 6).keep == (0, 2, 4, 6, 8, 10)
    assert resolve(Quadratic()).name == "Quadratic"
    assert select(resolve(Quadratic())(stats), 6).keep == kept("gram", routed(), 6)
    mine = Strategy(name="mine", criterion=even_first, calibrated=False)
    assert resolve(mine) is mine
    assert resolve(BUILTIN["reap"]) is BUILTIN["reap"]


@pytest.mark.parametrize(
    "values",
    [np.ones(EXPERTS - 1), np.ones((EXPERTS, 2)), np.ones((1, EXPERTS)), np.array(1.0), np.full(EXPERTS, np.nan)],
)
def test_a_callable_that_gives_no_scores_is_named(values: Array) -> None:
    """Scores for another number of experts would keep the wrong ones without a word."""

    def broken(_: LayerStatistics) -> Array:
        return values

    with pytest.raises(StrategyError, match="strategy 'broken', layer 2: 12 experts need as many finite scores"):
        resolve(broken)(layer_of(routed()))


def test_a_callable_that_asks_for_what_is_not_there() -> None:
    """The nearest statistic is named."""
    with pytest.raises(StrategyError, match=r"there is no statistic 'counts' .*'count'"):
        resolve(lambda stats: stats.counts)(layer_of(routed()))


def test_another_package_can_add_a_strategy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By entry point, as a function or a Strategy; a built-in name cannot be taken."""
    info = tmp_path / "plug-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: plug\nVersion: 1.0\n")
    points = ["mine = plug_strategies:mine", "ready = plug_strategies:READY", "reap = plug_strategies:mine"]
    (info / "entry_points.txt").write_text("\n".join(["[moeprune.strategies]", *points]))
    (tmp_path / "plug_strategies.py").write_text(
        "from moeprune.strategies import Strategy\n"
        "def mine(stats):\n    return -stats.count\n"
        "READY = Strategy(name='ready', criterion=mine, summary='rarest first')\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    stats = layer_of(routed())
    np.testing.assert_array_equal(resolve("mine")(stats), -stats.count)
    assert (resolve("mine").name, resolve("ready").summary) == ("mine", "rarest first")
    assert resolve("reap") is BUILTIN["reap"]


# --- super experts --------------------------------------------------------------------------------------------------


def peaks(values_LE: Array, *more: Array) -> RouterStatistics:
    """Statistics of which only the largest outputs matter, one domain for each array."""
    domains = [values_LE, *more]
    layers = {
        10 + layer: {"tokens": np.ones(len(domains), dtype=np.int64), "max_abs_down": np.stack(rows)}
        for layer, rows in enumerate(zip(*domains, strict=True))
    }
    return dataclasses.replace(statistics(layers, *map(str, range(len(domains)))), num_experts=values_LE.shape[1])


@pytest.fixture
def massive() -> Array:
    """Eight layers of 128 experts with a few large outputs."""
    values = np.ones((8, 128))
    values[0, 3], values[0, 5], values[5, 7] = 100, 50, 20
    values[2, 1] = 9  # below a tenth of the largest
    values[6, 9] = 90  # in the last quarter of the layers
    return values


def test_experts_with_massive_outputs_are_found_in_early_layers(massive: Array) -> None:
    """Above a tenth of the largest and in the first three quarters of the layers, by layer number on disk."""
    assert super_experts(peaks(massive)) == {10: {3, 5}, 15: {7}}


def test_a_peak_in_any_domain_counts(massive: Array) -> None:
    """An expert that is massive on code only is massive."""
    calm = np.ones_like(massive)
    assert super_experts(peaks(calm, massive)) == super_experts(peaks(massive, calm)) == {10: {3, 5}, 15: {7}}


def test_few_experts_are_super(massive: Array) -> None:
    """Without outliers only the top half per cent qualifies, however close the others are."""
    even = np.random.default_rng(2).uniform(90, 100, massive.shape)
    found = super_experts(peaks(even))
    assert 0 < sum(map(len, found.values())) <= 6
    assert all(even[layer - 10, expert] >= np.percentile(even, 99.5) for layer in found for expert in found[layer])


def test_in_a_small_model_the_largest_is_found() -> None:
    """The percentile of few values is nearly the largest itself, which must not hide it."""
    assert super_experts(peaks(np.array([[1.0, 1.0, 8.0, 1.0]]))) == {10: {2}}


@pytest.mark.parametrize("change", ["nothing calibrated", "not collected", "all zero"])
def test_without_measurements_nothing_is_guarded(massive: Array, change: str) -> None:
    """Rather no guard than one that protects every expert of a silent layer."""
    makers: dict[str, Callable[[], RouterStatistics]] = {
        "nothing calibrated": lambda: RouterStatistics.empty([0, 1], num_experts=4, top_k=2, model="m"),
        "not collected": lambda: dataclasses.replace(peaks(massive), layers={0: {"tokens": np.array([3])}}),
        "all zero": lambda: peaks(np.zeros((4, 8))),
    }
    assert super_experts(makers[change]()) == {}
