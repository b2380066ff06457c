"""The statistic against a slow computation, and the strategy under the contract that built-in ones keep."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from moeprune_projection import PROJECTION, PROJECTION_SUM, measure

from moeprune import RouterStatistics, Slots, StrategyError

EXPERTS, TOP_K, TOKENS, WIDTH = 12, 3, 60, 8
UNUSED = (0, 7)  # experts that no token is routed to


class Experts(torch.nn.Module):
    """As much of a layer's experts as a statistic of outputs looks at."""

    num_experts = EXPERTS


def slots_of(tokens: slice = slice(None), numbers: list[int] | None = None) -> Slots:
    """Some tokens of random routing; ``numbers`` gives every expert another number."""
    rng = np.random.default_rng(0)
    used = np.setdiff1d(np.arange(EXPERTS), UNUSED)
    experts_TK = np.array([rng.permutation(used)[:TOP_K] for _ in range(TOKENS)])
    gates_TK = torch.tensor(rng.dirichlet(np.ones(TOP_K), TOKENS))[tokens]
    outputs_TKH = torch.tensor(rng.normal(size=(TOKENS, TOP_K, WIDTH)))[tokens]
    return Slots(
        Experts(),
        hidden_TH=torch.zeros(len(gates_TK), WIDTH),
        experts_TK=torch.tensor(np.array(numbers or range(EXPERTS))[experts_TK])[tokens],
        gates_TK=gates_TK,
        outputs_TKH=outputs_TKH,
        routed_TH=(gates_TK[..., None] * outputs_TKH).sum(dim=1),
    )


def statistics_of(*parts: Slots, **more: Any) -> RouterStatistics:
    """What a collection makes of one layer, with a domain for each part of the tokens."""
    arrays = {
        "tokens": np.array([len(part.gates_TK) for part in parts]),
        "projection_sum": np.stack([measure(part).numpy() for part in parts]),
    }
    return RouterStatistics(
        domains=tuple(f"domain {number}" for number in range(len(parts))),
        num_experts=EXPERTS,
        top_k=TOP_K,
        layers={3: arrays},
        command={},
        inputs={},
        **more,
    )


def test_it_is_what_its_meaning_says() -> None:
    """Token by token and slot by slot; over all experts it adds up to the lengths of the layer's outputs."""
    slots, by_hand = slots_of(), np.zeros(EXPERTS)
    for token, routed_H in enumerate(slots.routed_TH):
        for slot in range(TOP_K):
            along = slots.outputs_TKH[token, slot] @ routed_H / routed_H.norm()
            by_hand[slots.experts_TK[token, slot]] += float(slots.gates_TK[token, slot] * along)
    found = measure(slots)
    np.testing.assert_allclose(found, by_hand, rtol=1e-5)
    assert float(found.sum()) == pytest.approx(float(slots.routed_TH.norm(dim=1).sum()), rel=1e-5)


def test_parts_of_the_data_add_up() -> None:
    """However the tokens are cut into batches, files or processes."""
    parts = [measure(slots_of(slice(0, 20))), measure(slots_of(slice(20, None)))]
    torch.testing.assert_close(parts[0] + parts[1], measure(slots_of()))


def test_an_output_that_the_others_cancel_counts_for_nothing() -> None:
    """A token whose routed output is zero is no division by zero."""
    slots = slots_of()
    slots.routed_TH = torch.zeros_like(slots.routed_TH)
    assert not measure(slots).any()


def test_renaming_the_experts_renames_the_scores() -> None:
    """Nothing depends on an expert's number."""
    numbers = np.random.default_rng(1).permutation(EXPERTS).tolist()
    before = PROJECTION(statistics_of(slots_of()).layer(3))
    after = PROJECTION(statistics_of(slots_of(numbers=numbers)).layer(3))
    np.testing.assert_allclose(after[numbers], before)


def test_experts_that_were_never_routed_to_score_nothing() -> None:
    """They are equal, so that the first of them would stay first."""
    scores = PROJECTION(statistics_of(slots_of()).layer(3))
    assert np.flatnonzero(scores == 0).tolist() == list(UNUSED)


def test_the_scale_of_domain_weights_does_not_matter() -> None:
    """Only their proportion does, and a domain of weight 0 is left out."""
    halves = slots_of(slice(0, 20)), slots_of(slice(20, None))
    made, alone = statistics_of(*halves), statistics_of(halves[1])
    plain, scaled = (PROJECTION(made.layer(3, {"domain 0": w, "domain 1": 3 * w})) for w in (1.0, 50.0))
    np.testing.assert_allclose(scaled, 50 * plain)
    np.testing.assert_array_equal(PROJECTION(made.layer(3, {"domain 0": 0.0})), PROJECTION(alone.layer(3)))


def test_the_same_statistics_give_the_same_scores() -> None:
    """Twice, and the statistics are as they were."""
    made = statistics_of(slots_of())
    before = made.layers[3]["projection_sum"].copy()
    np.testing.assert_array_equal(PROJECTION(made.layer(3)), PROJECTION(made.layer(3)))
    np.testing.assert_array_equal(made.layers[3]["projection_sum"], before)


def test_a_file_without_the_statistic_says_how_to_get_it() -> None:
    """The strategy needs what the package publishes, and nothing else."""
    assert PROJECTION.needs == ("projection_sum",)
    assert PROJECTION_SUM.measure is measure
    made = statistics_of(slots_of())
    del made.layers[3]["projection_sum"]  # type: ignore[attr-defined]
    with pytest.raises(StrategyError, match="collect again with --statistics projection_sum"):
        PROJECTION(made.layer(3))
