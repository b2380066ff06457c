"""Strategies that read more than every collection adds up: each by its formula over tokens, and under one contract."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from moeprune.errors import StrategyError
from moeprune.statistics import STATISTICS, LayerStatistics, RouterStatistics
from moeprune.strategies import BUILTIN, GlobalCriterion, Strategy, resolve
from moeprune.strategies.criterion import Layers
from moeprune.strategies.selection import select
from moeprune.strategies.trajectory import Pathfinder

Array = NDArray[Any]
EXPERTS, TOP_K, HIDDEN, INNER, LENGTH, SAMPLES = 12, 3, 5, 4, 20, 6
LAYERS = (1, 2, 4)  # decoder layers, with a dense one between
EVERY = [name for name, strategy in BUILTIN.items() if not {*strategy.needs} <= STATISTICS.keys()]
LOCAL = [name for name in EVERY if not BUILTIN[name].across_layers]


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One MoE layer that saw S sequences of L tokens: every expert's weights, and what it did to every token."""

    gate: Array  # [E, I, H]
    up: Array  # [E, I, H]
    down: Array  # [E, H, I]
    x: Array  # what the experts are given, [S, L, H]
    h: Array  # what their sum is added to, [S, L, H]
    logits: Array  # [S, L, E]

    @property
    def prob(self) -> Array:
        """Softmax of the logits, [S, L, E]."""
        raised = np.exp(self.logits - self.logits.max(axis=-1, keepdims=True))
        return np.asarray(raised / raised.sum(axis=-1, keepdims=True))

    @property
    def hit(self) -> Array:
        """Whether a token is routed to an expert, [S, L, E]."""
        return np.asarray(self.logits >= np.sort(self.logits, axis=-1)[..., -TOP_K, None])

    @property
    def gates(self) -> Array:
        """Renormalised probabilities of the chosen experts, 0 for the others, [S, L, E]."""
        chosen = self.prob * self.hit
        return np.asarray(chosen / chosen.sum(axis=-1, keepdims=True))

    @property
    def mid(self) -> Array:
        """Input of every expert's down projection, [S, L, E, I]."""
        gate = np.einsum("eih,slh->slei", self.gate, self.x)
        return np.asarray(np.tanh(gate) * np.einsum("eih,slh->slei", self.up, self.x))

    @property
    def out(self) -> Array:
        """Every expert's output, [S, L, E, H]."""
        return np.asarray(np.einsum("ehi,slei->sleh", self.down, self.mid))

    @property
    def routed(self) -> Array:
        """What the experts add together, [S, L, H]."""
        return np.asarray(np.einsum("sle,sleh->slh", self.gates, self.out))

    @property
    def turn(self) -> Array:
        """How far the experts turn the residual stream, [S, L]."""
        after = self.h + self.routed
        norms = np.linalg.norm(self.h, axis=-1) * np.linalg.norm(after, axis=-1)
        return np.asarray(np.maximum(1 - (self.h * after).sum(axis=-1) / norms, 0))

    def renamed(self, order: Array) -> Layer:
        """The same layer with its experts in another order."""
        weights = {name: getattr(self, name)[order] for name in ("gate", "up", "down")}
        return dataclasses.replace(self, **weights, logits=self.logits[..., order])


def model(seed: int = 0) -> dict[int, Layer]:
    """Random layers whose experts differ in size and in how often they are chosen."""
    rng = np.random.default_rng(seed)
    layers = {}
    for layer in LAYERS:
        size_E = rng.uniform(0.3, 2.0, EXPERTS)[:, None, None]
        layers[layer] = Layer(
            gate=size_E * rng.standard_t(3, (EXPERTS, INNER, HIDDEN)),
            up=rng.normal(size=(EXPERTS, INNER, HIDDEN)),
            down=size_E * rng.normal(size=(EXPERTS, HIDDEN, INNER)),
            x=rng.normal(size=(SAMPLES, LENGTH, HIDDEN)),
            h=3 * rng.normal(size=(SAMPLES, LENGTH, HIDDEN)),
            logits=rng.normal(size=EXPERTS) + rng.normal(size=(SAMPLES, LENGTH, EXPERTS)),
        )
    return layers


def statistics(layers: Mapping[int, Layer], domains: int = 1) -> Any:
    """Everything that these strategies read, to be edited; sample s is of domain s modulo their number."""
    of = np.arange(SAMPLES) % domains
    last = [*layers.values()][-1:]
    return RouterStatistics(
        domains=tuple("abc"[:domains]),
        num_experts=EXPERTS,
        top_k=TOP_K,
        layers={
            index: _sums(layer, before, of, first=number == 0)
            for number, ((index, layer), before) in enumerate(
                zip(layers.items(), [*last, *[*layers.values()][:-1]], strict=True)
            )
        },
        rows={index: _rows(layer, of) for index, layer in layers.items()},
        facts={index: _facts(layer) for index, layer in layers.items()},
        command={},
        inputs={"model": "m"},
    )


def _sums(layer: Layer, before: Layer, of: Array, *, first: bool) -> dict[str, Array]:
    gates, norms = layer.gates, np.linalg.norm(layer.out, axis=-1)
    hits, came = layer.hit.astype(np.int64), before.hit.astype(np.int64)
    steps = np.einsum("sli,slj->sij", came, hits)
    wraps = np.einsum("sli,slj->sij", came[:, :-1], hits[:, 1:])
    by_sample = {
        "tokens": np.full(SAMPLES, LENGTH),
        "count": hits.sum(axis=1),
        "soft_prob_sum": layer.prob.sum(axis=1),
        "easy_ep_sum": (layer.turn[..., None] * gates * norms).sum(axis=1),
        "gated_in_sq_sum": np.einsum("sle,slh->seh", gates**2, layer.x**2),
        "gated_mid_sq_sum": np.einsum("sle,slei->sei", gates**2, layer.mid**2),
        "transition_count": np.zeros_like(steps) if first else steps,
        "wrap_count": wraps if first else np.zeros_like(steps),
    }
    return {
        name: np.stack([values[of == domain].sum(axis=0) for domain in range(of.max() + 1)])
        for name, values in by_sample.items()
    }


def _rows(layer: Layer, of: Array) -> dict[str, Array]:
    alone_SLEH = layer.out
    return {
        "path_prob": layer.prob.mean(axis=1),
        "path_norm": np.linalg.norm(alone_SLEH, axis=-1).mean(axis=1),
        "path_loss": np.sqrt(((layer.routed[:, :, None] - alone_SLEH) ** 2).sum(axis=(1, 3))),
        "path_scale": np.sqrt((layer.routed**2).sum(axis=(1, 2))),
        "path_domain": of,
    }


def _facts(layer: Layer) -> dict[str, Array]:
    flat = np.concatenate(
        [layer.gate.reshape(EXPERTS, -1), layer.up.reshape(EXPERTS, -1), layer.down.reshape(EXPERTS, -1)],
        axis=1,
    )
    return {
        "weight_abs_sum": np.abs(flat).sum(axis=1),
        "weight_sq_sum": (flat**2).sum(axis=1),
        "weight_numel": np.array(flat.shape[1]),
        "gate_col_l1": np.abs(layer.gate).sum(axis=1),
        "up_col_l1": np.abs(layer.up).sum(axis=1),
        "down_col_l1": np.abs(layer.down).sum(axis=1),
    }


def views(made: RouterStatistics, weights: Mapping[str, float] | None = None) -> dict[int, LayerStatistics]:
    """All layers as a strategy sees them."""
    return {layer: made.layer(layer, weights) for layer in made.layers}


def scores(strategy: str, layers: Mapping[int, Layer]) -> dict[int, Array]:
    """What a strategy makes of a model."""
    return resolve(strategy).scores(views(statistics(layers)))


def kept(found: Mapping[int, Array], keep: int = 6, **options: Any) -> dict[int, tuple[int, ...]]:
    """The experts that stay."""
    return {layer: select(values, keep, **options).keep for layer, values in found.items()}


@pytest.fixture(scope="module")
def layers() -> dict[int, Layer]:
    """One random model."""
    return model()


# --- the contract -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("n_group", [1, 3])
def test_renaming_the_experts_renames_the_choice(name: str, n_group: int) -> None:
    """The same experts stay under new numbers, in every layer and inside their groups."""
    size = EXPERTS // n_group
    for seed in range(3):
        made, rng = model(seed), np.random.default_rng(seed)
        orders = {
            layer: np.concatenate([group * size + rng.permutation(size) for group in range(n_group)]) for layer in made
        }
        before = kept(scores(name, made), n_group=n_group)
        after = kept(scores(name, {layer: one.renamed(orders[layer]) for layer, one in made.items()}), n_group=n_group)
        assert {layer: sorted(orders[layer][list(keep)]) for layer, keep in after.items()} == {
            layer: list(keep) for layer, keep in before.items()
        }
        assert [len(keep) for keep in before.values()] == [6] * len(LAYERS)


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("n_group", [1, 3])
def test_of_equal_experts_the_first_stay(name: str, n_group: int, layers: dict[int, Layer]) -> None:
    """Ties go by index."""
    made = statistics(layers)
    equal: dict[str, Any] = {
        part: {layer: {key: np.ones_like(value) for key, value in arrays.items()} for layer, arrays in of.items()}
        for part, of in {"layers": made.layers, "facts": made.facts, "rows": made.rows}.items()
    }
    for arrays in equal["rows"].values():
        arrays["path_domain"] *= 0
    found = resolve(name).scores(views(dataclasses.replace(made, **equal)))
    first = tuple(expert for expert in range(EXPERTS) if expert % (EXPERTS // n_group) < 6 // n_group)
    assert kept(found, n_group=n_group) == dict.fromkeys(LAYERS, first)


@pytest.mark.parametrize("name", EVERY)
def test_scores_are_finite_and_not_negative(name: str, layers: dict[int, Layer]) -> None:
    """Budgets share out their mass; and they differ, or they would rank nothing."""
    for values in scores(name, layers).values():
        assert values.shape == (EXPERTS,)
        assert (values >= 0).all()
        assert len({*values}) == EXPERTS


@pytest.mark.parametrize("name", EVERY)
def test_a_strategy_gives_the_same_values_every_time(name: str, layers: dict[int, Layer]) -> None:
    """And leaves the statistics as they were."""
    made, before = statistics(layers), statistics(layers)
    first, second = (resolve(name).scores(views(made)) for _ in range(2))
    for layer in LAYERS:
        np.testing.assert_array_equal(first[layer], second[layer])
        for part in ("layers", "facts", "rows"):
            for key, array in getattr(before, part)[layer].items():
                np.testing.assert_array_equal(getattr(made, part)[layer][key], array)


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("scale", [1e-6, 50.0])
def test_the_scale_of_domain_weights_does_not_matter(name: str, scale: float, layers: dict[int, Layer]) -> None:
    """Only their proportion does."""
    made = statistics(layers, domains=2)
    plain, scaled = (kept(resolve(name).scores(views(made, {"a": f, "b": 3 * f}))) for f in (1.0, scale))
    assert plain == scaled


@pytest.mark.parametrize("name", [name for name in EVERY if BUILTIN[name].calibrated])
def test_a_domain_without_weight_does_not_count(name: str, layers: dict[int, Layer]) -> None:
    """Scores of one domain are those of a calibration without the other, up to the scale of sums."""
    made = statistics(layers, domains=2)
    only = dataclasses.replace(
        made,
        domains=("a",),
        layers={layer: {key: value[:1] for key, value in arrays.items()} for layer, arrays in made.layers.items()},
        rows={
            layer: {key: value[arrays["path_domain"] == 0] for key, value in arrays.items()}
            for layer, arrays in made.rows.items()
        },
    )
    found = resolve(name).scores(views(made, {"a": 1, "b": 0}))
    for layer, values in resolve(name).scores(views(only)).items():
        np.testing.assert_allclose(found[layer], values, rtol=1e-5)


@pytest.mark.parametrize("name", BUILTIN)
def test_a_strategy_reads_what_it_says(name: str, layers: dict[int, Layer]) -> None:
    """Exactly the statistics that it needs: with these it works, and without any of them it names the missing one."""
    strategy, made = resolve(name), _everything(statistics(layers))
    needed = {*strategy.needs}
    strategy.scores(views(_only(made, needed)))
    for missing in needed - {"tokens"}:  # without tokens nothing was calibrated, whatever else is there
        with pytest.raises(StrategyError, match=f"has no '{missing}' for layer") as caught:
            strategy.scores(views(_only(made, needed - {missing})))
        assert "collect again" in caught.value.hint


def _everything(made: RouterStatistics) -> RouterStatistics:
    """With ones for the statistics that are of no interest here."""
    ones: dict[str, Array] = {
        name: np.ones((len(made.domains), *one.shape(EXPERTS))) for name, one in STATISTICS.items()
    }
    return dataclasses.replace(made, layers={layer: ones | dict(arrays) for layer, arrays in made.layers.items()})


def _only(made: RouterStatistics, names: set[str]) -> RouterStatistics:
    parts: dict[str, Any] = {
        part: {
            layer: {key: value for key, value in arrays.items() if key in names | {"tokens"}}
            for layer, arrays in getattr(made, part).items()
        }
        for part in ("layers", "facts", "rows")
    }
    return dataclasses.replace(made, **parts)


# --- single formulas --------------------------------------------------------------------------------------------------


def test_seer_adds_up_probabilities_of_all_tokens(layers: dict[int, Layer]) -> None:
    """Chosen or not."""
    for layer, values in scores("seer", layers).items():
        np.testing.assert_allclose(values, layers[layer].prob.sum(axis=(0, 1)))


def test_easy_ep_weighs_tokens_by_how_far_the_residual_turns(layers: dict[int, Layer]) -> None:
    """Token by token."""
    for index, values in scores("easy-ep", layers).items():
        layer, by_hand = layers[index], np.zeros(EXPERTS)
        for s, t in itertools.product(range(SAMPLES), range(LENGTH)):
            before = layer.h[s, t]
            after = before + layer.routed[s, t]
            turn = max(1 - before @ after / np.linalg.norm(before) / np.linalg.norm(after), 0)
            for expert in np.flatnonzero(layer.hit[s, t]):
                norm = np.linalg.norm(layer.out[s, t, expert])
                by_hand[expert] += turn * layer.gates[s, t, expert] * norm
        np.testing.assert_allclose(values, by_hand)


def test_aimer_is_rms_over_mean_absolute_weight(layers: dict[int, Layer]) -> None:
    """The inverse of the paper's score, so that the order of who stays is the paper's; and it ignores size."""
    for index, values in scores("aimer", layers).items():
        layer = layers[index]
        for expert in range(EXPERTS):
            own = [layer.gate[expert], layer.up[expert], layer.down[expert]]
            flat = np.concatenate([part.ravel() for part in own])
            assert 1 / values[expert] == pytest.approx(np.abs(flat).mean() / np.sqrt((flat**2).mean()))
        assert (values >= 1).all()


def test_aimer_of_an_expert_of_zeros_is_zero() -> None:
    """It goes first, without a division by zero."""
    made = statistics(model())
    for arrays in made.facts.values():
        arrays["weight_abs_sum"][3] = arrays["weight_sq_sum"][3] = 0
    assert resolve("aimer").scores(views(made))[1][3] == 0


@pytest.mark.parametrize("name", ["router-hint", "router-hint-sum", "router-hint-down-only"])
def test_router_hints_add_up_the_scores_of_single_weights(name: str, layers: dict[int, Layer]) -> None:
    """Of every weight: its size times the norm of its gated input, over the tokens of the expert or their mean."""
    for index, values in scores(name, layers).items():
        layer, by_hand = layers[index], np.zeros(EXPERTS)
        for expert in range(EXPERTS):
            gates_SL1 = layer.gates[:, :, expert, None]
            share = 1 if name == "router-hint-sum" else layer.hit[..., expert].sum()
            into, mid = (
                np.sqrt(((gates_SL1 * inputs) ** 2).sum(axis=(0, 1)) / share)
                for inputs in (layer.x, layer.mid[:, :, expert])
            )
            by_hand[expert] = (np.abs(layer.down[expert]) * mid).sum()
            if name != "router-hint-down-only":
                by_hand[expert] += (np.abs(layer.gate[expert]) * into).sum()
                by_hand[expert] += (np.abs(layer.up[expert]) * into).sum()
        np.testing.assert_allclose(values, by_hand)


# --- MAESTRO ----------------------------------------------------------------------------------------------------------


def test_maestro_is_the_stationary_distribution_of_the_walk(layers: dict[int, Layer]) -> None:
    """That of one chain over the experts of all layers, with the paper's self-loops, found from its eigenvectors."""
    made, size = statistics(layers), EXPERTS * len(LAYERS)
    chain = np.zeros((size, size))
    for number, layer in enumerate(LAYERS):
        name = "transition_count" if number else "wrap_count"
        before = (number - 1) % len(LAYERS)
        counts = made.layers[layer][name][0]
        chain[before * EXPERTS : (before + 1) * EXPERTS, number * EXPERTS : (number + 1) * EXPERTS] = counts
    chain = chain / chain.sum(axis=1, keepdims=True) + 1e-5 * np.eye(size)
    values, vectors = np.linalg.eig(chain.T)
    stationary = np.real(vectors[:, np.argmax(np.real(values))])
    stationary = (stationary / stationary.sum()).reshape(len(LAYERS), EXPERTS)
    for row, found in zip(stationary, scores("maestro", layers).values(), strict=True):
        np.testing.assert_allclose(found, row * len(LAYERS), atol=1e-5)
        assert found.sum() == pytest.approx(1)


def test_maestro_is_frequency_but_for_the_ends_of_sequences(layers: dict[int, Layer]) -> None:
    """Exactly so where the last token is followed by the first, and nearly where it is followed by none."""
    made = statistics(layers)
    busy = {layer: made.layers[layer]["count"][0] / made.layers[layer]["count"].sum() for layer in LAYERS}
    for layer, values in resolve("maestro").scores(views(made)).items():
        np.testing.assert_allclose(values, busy[layer], atol=0.02)
    last, first = layers[LAYERS[-1]].hit.astype(float), layers[LAYERS[0]].hit.astype(float)
    made.layers[LAYERS[0]]["wrap_count"] = np.einsum("sli,slj->ij", last, np.roll(first, -1, axis=1))[None]
    for layer, values in resolve("maestro").scores(views(made)).items():
        np.testing.assert_allclose(values, busy[layer], atol=1e-6)


def test_maestro_follows_layers_that_only_it_connects(layers: dict[int, Layer]) -> None:
    """An expert that nobody comes to has no share, in whichever layer it is."""
    made = statistics(layers)
    for layer, name in zip(LAYERS, ("wrap_count", "transition_count", "transition_count"), strict=True):
        made.layers[layer][name][0, :, layer] = 0
    found = resolve("maestro").scores(views(made))
    assert [int(np.argmin(found[layer])) for layer in LAYERS] == list(LAYERS)
    assert all(found[layer][layer] == 0 for layer in LAYERS)


@pytest.mark.parametrize(("layer", "name"), [(1, "wrap_count"), (4, "transition_count")])
def test_maestro_needs_tokens_that_go_on(layer: int, name: str, layers: dict[int, Layer]) -> None:
    """Sequences of one token never come back to the first layer."""
    made = statistics(layers)
    made.layers[layer][name][:] = 0
    with pytest.raises(StrategyError, match=rf"no token came to layer {layer} .*longer sequences"):
        resolve("maestro").scores(views(made))


def test_a_walk_that_ends_is_an_error(layers: dict[int, Layer]) -> None:
    """One sequence of two tokens: nothing follows the experts of the second, and nothing leads back to the first's."""
    made, first, second = statistics(layers), np.arange(EXPERTS) < 6, np.arange(EXPERTS) >= 6
    for layer in LAYERS:
        made.layers[layer]["transition_count"] = (np.outer(first, first) + np.outer(second, second))[None] * 1
    made.layers[1]["wrap_count"] = np.outer(first, second)[None] * 1
    with pytest.raises(StrategyError, match=r"every walk .* comes to an end .*longer sequences"):
        resolve("maestro").scores(views(made))


# --- Pathfinder -------------------------------------------------------------------------------------------------------


def node_scores(made: RouterStatistics) -> Array:
    """Scores [L, S, E] of single experts, chance first, without outliers barred."""
    terms = []
    for arrays in made.rows.values():
        error = arrays["path_loss"] / arrays["path_scale"][:, None]
        weight = np.exp(-error) / np.exp(-error).sum(axis=1, keepdims=True)
        terms.append(np.log(arrays["path_prob"] + 1e-10) + np.log(arrays["path_norm"] + 1e-10) + np.log(weight + 1e-10))
    return np.stack(terms)


def without_outliers(seed: int = 0) -> Any:
    """Statistics whose losses and norms have no outliers."""
    made, rng = statistics(model(seed)), np.random.default_rng(seed)
    for arrays in made.rows.values():
        arrays["path_loss"], arrays["path_norm"] = (rng.uniform(5, 6, (SAMPLES, EXPERTS)) for _ in range(2))
    return made


def votes(paths: Sequence[Sequence[tuple[int, ...]]]) -> Array:
    """Shares [L, E] of the votes of every sample's paths."""
    found = np.zeros((len(LAYERS), EXPERTS))
    for sample in paths:
        for path in sample:
            found[np.arange(len(LAYERS)), path] += 1 / len(sample) / len(paths)
    return found


@pytest.mark.parametrize("count", [1, 10, 100])
@pytest.mark.parametrize("conditional", [False, True])
def test_pathfinder_counts_the_best_of_all_paths(conditional: bool, count: int) -> None:
    """Against all 1,728 paths of every sample."""
    made = without_outliers()
    nodes = node_scores(made)
    chance = np.stack([np.log(arrays["path_prob"] + 1e-10) for arrays in made.rows.values()])
    steps = []
    for layer in LAYERS[1:]:
        counts = made.layers[layer]["transition_count"][0]
        steps.append(np.log(counts / counts.sum(axis=1, keepdims=True) + 1e-10))
    best = []
    for s in range(SAMPLES):
        ranked = []
        for path in itertools.product(range(EXPERTS), repeat=len(LAYERS)):
            score = sum(nodes[number, s, expert] for number, expert in enumerate(path))
            if conditional:
                for number, (before, after) in enumerate(itertools.pairwise(path)):
                    score += steps[number][before, after] - chance[number + 1, s, after]
            ranked.append((-score, path))
        best.append([path for _, path in sorted(ranked)[:count]])
    criterion = GlobalCriterion(Pathfinder(conditional=conditional, paths=count))
    found = resolve(criterion).scores(views(made))
    np.testing.assert_allclose(np.stack([*found.values()]), votes(best), atol=1e-6)


def test_the_best_path_is_every_layers_best_expert() -> None:
    """In the paper's graph no expert's score depends on another layer's; with conditional probabilities it does."""
    made = without_outliers()
    best = node_scores(made).argmax(axis=2)  # [L, S]
    single = resolve(GlobalCriterion(Pathfinder(paths=1))).scores(views(made))
    np.testing.assert_allclose(
        np.stack([*single.values()]), votes([[tuple(best[:, s])] for s in range(SAMPLES)]), atol=1e-6
    )
    linked = resolve(GlobalCriterion(Pathfinder(paths=1, conditional=True))).scores(views(made))
    assert any((np.abs(linked[layer] - single[layer]) > 1e-3).any() for layer in LAYERS[1:])


@pytest.mark.parametrize("name", ["pathfinder", "pathfinder-conditional"])
def test_outliers_are_kept_or_barred_from_paths(name: str) -> None:
    """A very small error or a very large norm keeps an expert; the contrary takes it out of that sample's paths."""
    made = without_outliers()
    rows = made.rows[2]
    rows["path_loss"][1, 4] = 0.0
    rows["path_norm"][0, 7] = 30.0
    rows["path_loss"][:, 9] = 50.0
    rows["path_prob"][:, 9] = 1.0
    found = resolve(name).scores(views(made))
    assert (found[2][[4, 7]] >= 2).all()
    assert np.delete(found[2], [4, 7]).max() < 2
    assert found[2][9] < 1e-6
    assert found[1].max() < 2


def test_an_expert_is_an_outlier_beyond_three_interquartile_ranges() -> None:
    """And not short of it."""
    for factor, outstanding in ((2.9, False), (3.1, True)):
        made = without_outliers()
        rows = made.rows[2]["path_norm"]
        rows[0] = np.linspace(1, 2, EXPERTS)
        first, third = np.percentile(rows[0, :-1], [25, 75])
        for _ in range(50):  # the outlier is itself one of the values that the quartiles are of
            rows[0, -1] = third + factor * (third - first)
            first, third = np.percentile(rows[0], [25, 75])
        assert bool(resolve("pathfinder").scores(views(made))[2][-1] >= 2) is outstanding


def test_experts_without_votes_are_ordered_by_their_own_mean_score() -> None:
    """The few paths leave most experts without a vote, and index order would say nothing."""
    made = without_outliers()
    nodes = node_scores(made).mean(axis=1)  # [L, E]
    found = resolve(GlobalCriterion(Pathfinder(paths=1))).scores(views(made))
    for row, values in zip(nodes, found.values(), strict=True):
        silent = np.flatnonzero(values < 1e-6)
        assert len(silent) > 3
        assert (np.argsort(values[silent]) == np.argsort(row[silent])).all()


def test_a_sample_votes_by_the_weight_of_its_domain() -> None:
    """Twice the weight, twice the votes."""
    made = without_outliers()
    for arrays in made.rows.values():
        arrays["path_domain"] = np.arange(SAMPLES) % 2
    doubled = {
        layer: {key: np.concatenate([value, value]) for key, value in arrays.items()}
        for layer, arrays in made.layers.items()
    }
    made = dataclasses.replace(made, domains=("a", "b"), layers=doubled)
    alone = [resolve("pathfinder").scores(views(made, {name: 0}))[2] for name in "ba"]
    mixed = resolve("pathfinder").scores(views(made, {"a": 3}))[2]
    np.testing.assert_allclose(mixed, 0.75 * alone[0] + 0.25 * alone[1], atol=1e-5)


def test_pathfinder_without_samples_says_so(layers: dict[int, Layer]) -> None:
    """No sequence, or none of a domain that has a weight."""
    made = statistics(layers)
    none = {layer: {key: value[:0] for key, value in arrays.items()} for layer, arrays in made.rows.items()}
    with pytest.raises(StrategyError, match="no sequence has its paths in layer 1"):
        resolve("pathfinder").scores(views(dataclasses.replace(made, rows=none)))


# --- over all layers --------------------------------------------------------------------------------------------------


def test_a_criterion_over_all_layers_is_a_strategy(layers: dict[int, Layer]) -> None:
    """It has the name of its formula, and cannot be asked about a single layer."""

    @GlobalCriterion
    def deepest_first(given: Layers) -> dict[int, Array]:
        return {layer: np.arange(EXPERTS) + layer for layer in given}

    made = views(statistics(layers))
    strategy = resolve(deepest_first)
    assert (strategy.name, strategy.across_layers) == ("deepest_first", True)
    assert kept(strategy.scores(made), 3) == dict.fromkeys(LAYERS, (9, 10, 11))
    with pytest.raises(StrategyError, match="'deepest_first' scores all layers at once"):
        strategy(made[1])


def test_a_criterion_over_all_layers_scores_each_of_them(layers: dict[int, Layer]) -> None:
    """A layer that is left out, or has scores that are not finite, is an error that names it."""
    made = views(statistics(layers))
    partly = Strategy(name="partly", criterion=GlobalCriterion(lambda _: {1: np.ones(EXPERTS)}))
    with pytest.raises(StrategyError, match="'partly' does not score the layers"):
        partly.scores(made)
    broken = Strategy(name="broken", criterion=GlobalCriterion(lambda given: dict.fromkeys(given, np.ones(3))))
    with pytest.raises(StrategyError, match="strategy 'broken', layer 1: 12 experts"):
        broken.scores(made)


@pytest.mark.parametrize("name", LOCAL)
def test_other_criteria_score_layers_one_by_one(name: str, layers: dict[int, Layer]) -> None:
    """Whatever layers are beside them."""
    made = views(statistics(layers))
    for layer, values in resolve(name).scores(made).items():
        np.testing.assert_array_equal(values, resolve(name)(made[layer]))


@pytest.mark.parametrize("name", EVERY)
def test_every_one_has_a_paper_and_a_cost(name: str) -> None:
    """Said in one line each."""
    assert BUILTIN[name].paper
    assert BUILTIN[name].summary
    assert BUILTIN[name].cost
