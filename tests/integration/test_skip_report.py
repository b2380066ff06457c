"""Models that skip, scored beside controls that skip as much, and what was skipped of which tokens."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import moeprune
from moeprune._options import CalibrationOptions
from moeprune.errors import EvaluationError
from moeprune.evaluation.agreement import agreement, batches, logits_of, perplexity_ratio, token_losses
from moeprune.evaluation.evaluator import PlanScore, ResidentEvaluator, Variant, changes_of
from moeprune.evaluation.skip_report import measured_rate, render_skip_table
from moeprune.evaluation.skipped import Control, Gated, Tally, at_random, rate_of, true_norm
from moeprune.evaluation.streamed import StreamedEvaluator
from moeprune.evaluation.token_classes import CLASSES, TokenClasses
from moeprune.experts import expert_layers
from moeprune.plans_skip import Renorm, SkipLayer, SkipPlan
from moeprune.runtime.masking import applied
from moeprune.runtime.skipping import GATES_ATTRIBUTE, Boundary, attach, counted
from moeprune.skip_scoring import measure_skip, time_skip, write_measured
from moeprune.streaming.stream import LayerStream

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CheckpointOf = Callable[..., Path]
ModelOf = Callable[..., "PreTrainedModel"]
FAMILIES = pytest.mark.parametrize("model_type", ["qwen3_moe", "deepseek_v3"])
THRESHOLDS = (0.35, 0.3)


@pytest.fixture(scope="module")
def sequences() -> list[list[int]]:
    """Documents of many lengths, also too short to predict anything."""
    rng = np.random.default_rng(0)
    return [rng.integers(0, 97, length).tolist() for length in (9, 1, 30, 2, 0, 17, 5, 30, 21)]


def plan_of(model: PreTrainedModel, **changes: Any) -> SkipPlan:
    """Skips something in every layer, and not as much in all."""
    layers = [layer.index for layer in expert_layers(model)]
    values: dict[str, Any] = {
        "policy": "share",
        "renorm": Renorm(),
        "layers": {layer: SkipLayer(threshold=t) for layer, t in zip(layers, THRESHOLDS, strict=True)},
        "target": 0.5,
        "rate": 0.4,
        "top_k": 3,
        "command": {},
        "inputs": {"calibration": "c"},
    }
    return SkipPlan(**values | changes)


def three_ways(plan: SkipPlan, documents: int) -> tuple[list[Variant], list[Tally]]:
    """A plan and its controls."""
    tallies = [Tally([0] * documents) for _ in range(3)]
    gated = Gated(plan, tallies[0])
    return [gated, Control(gated, at_random, tallies[1]), Control(gated, true_norm, tallies[2])], tallies


@FAMILIES
def test_a_score_is_that_of_the_gated_model(model_type: str, model_of: ModelOf, sequences: list[list[int]]) -> None:
    """Perplexity, agreement and rate equal those of a copy whose gates are attached for good."""
    model = model_of(model_type)
    plan = plan_of(model)
    tally = Tally([0] * len(sequences))
    [score] = ResidentEvaluator(model, sequences, batch_tokens=64).score([Gated(plan, tally)])
    gated = attach(copy.deepcopy(model), plan)
    base, losses = (token_losses(each, sequences, batch_tokens=64) for each in (model, gated))
    assert score.perplexity_ratio == perplexity_ratio(base, losses)
    assert score.agreement == agreement(model, gated, sequences, batch_tokens=64)
    with counted(gated) as counter:
        token_losses(gated, sequences, batch_tokens=64)
    assert measured_rate(tally) == pytest.approx(counter.rate)
    assert 0.1 < counter.rate < 0.9
    assert counter.total.slots == 2 * 3 * sum(len(ids) for ids in sequences if len(ids) > 1)


@FAMILIES
def test_layer_by_layer_gives_the_same(
    model_type: str, model_of: ModelOf, checkpoint_of: CheckpointOf, sequences: list[list[int]]
) -> None:
    """Scores and counts of the plan and of both controls, which see what the plan did in each layer and batch."""
    import torch

    model = model_of(model_type)
    plan = plan_of(model)
    found: list[tuple[list[PlanScore], list[Tally]]] = []
    stream = LayerStream(moeprune.open_checkpoint(checkpoint_of(model_type)), device=torch.device("cpu"))
    for evaluator in (ResidentEvaluator(model, sequences, 64), StreamedEvaluator(stream, sequences, 64)):
        variants, tallies = three_ways(plan, len(sequences))
        found.append((evaluator.score(variants), tallies))
    for one, other in zip(*(scores for scores, _ in found), strict=True):
        np.testing.assert_allclose(one.losses.nll, other.losses.nll, rtol=1e-5)
        np.testing.assert_allclose(one.kl, other.kl, rtol=1e-4, atol=1e-5)
    for one, other in zip(*(tallies for _, tallies in found), strict=True):
        assert one.cells.keys() == other.cells.keys()
        for layer, cells in one.cells.items():
            np.testing.assert_array_equal(cells, other.cells[layer])
    assert len({score.agreement.kl.value for score in found[0][0]}) == 3


def test_controls_skip_as_much_and_choose_as_they_say(model_of: ModelOf, sequences: list[list[int]]) -> None:
    """In every layer and batch as many slots as the gate; the oracle runs those that add the longest vectors."""
    import torch

    model = model_of("qwen3_moe")
    plan = plan_of(model)
    variants, tallies = three_ways(plan, len(sequences))
    seen: list[tuple[int, int]] = []
    see = Tally.see
    for number, tally in enumerate(tallies):
        tally.see = lambda layer, flops, keep, at=number: (  # type: ignore[method-assign]
            see(tallies[at], layer, flops, keep),
            seen.append((layer, tallies[at].latest[layer])),
        )
    ResidentEvaluator(model, sequences, batch_tokens=64).score(variants)
    passes = [seen[start : start + 2] for start in range(0, len(seen), 2)]  # two MoE layers
    for start in range(0, len(passes), 3):
        assert passes[start] == passes[start + 1] == passes[start + 2]
    layer = expert_layers(model)[0]
    experts: Any = layer.experts
    boundary = Boundary(layer)
    hidden, index = torch.randn(5, 32), torch.stack([torch.randperm(16)[:3] for _ in range(5)])
    gates = torch.rand(5, 3)
    with boundary.applied(), torch.no_grad():
        found = true_norm(boundary, hidden, index, gates)
        for token, slot in np.ndindex(5, 3):
            gate, up = (experts.gate_up_proj[index[token, slot]] @ hidden[token]).chunk(2)
            output = experts.down_proj[index[token, slot]] @ (torch.nn.functional.silu(gate) * up)
            assert float(found[token, slot]) == pytest.approx(float(gates[token, slot] * output.norm()), rel=1e-4)


def test_the_oracle_spares_the_layer_most(model_of: ModelOf, sequences: list[list[int]]) -> None:
    """In one layer, whose output it changes less than the gate, and the gate less than slots drawn at random."""
    model = model_of("qwen3_moe")
    last = expert_layers(model)[-1]
    plan = plan_of(model, layers={last.index: SkipLayer(threshold=THRESHOLDS[0])})
    variants, _ = three_ways(plan, len(sequences))
    by_hand: list[float] = []
    outputs: dict[str, Any] = {}
    hook = last.experts.register_forward_hook(lambda _, __, output: outputs.__setitem__("now", output.detach()))
    _, ids, mask = next(iter(batches(sequences, 64)))
    logits_of(model, ids, mask)
    whole = outputs["now"]
    for variant in variants:
        variant.begin(range(len(ids)), ids, mask)
        with applied(changes_of(variant, expert_layers(model))):
            logits_of(model, ids, mask)
        by_hand.append(float((outputs["now"] - whole)[mask.reshape(-1).bool()].norm()))
    hook.remove()
    gate, drawn, oracle = by_hand
    assert 0 < oracle <= gate < drawn


def test_a_tally_tells_domains_and_classes_apart(model_of: ModelOf, sequences: list[list[int]]) -> None:
    """The sums are those of a loop over single documents, without padding or any other document."""
    model = model_of("qwen3_moe")
    plan = plan_of(model)
    rng = np.random.default_rng(1)
    alone = rng.integers(0, len(CLASSES), 97)
    classes = TokenClasses(alone=alone, bare=np.zeros(97, dtype=bool), open=np.zeros(97, dtype=bool))
    domains = [number % 2 for number in range(len(sequences))]
    tally = Tally(domains, classes)
    ResidentEvaluator(model, sequences, batch_tokens=64).score([Gated(plan, tally)])
    by_hand = {layer.index: np.zeros((2, 2, len(CLASSES)), dtype=int) for layer in expert_layers(model)}
    gated = attach(copy.deepcopy(model), plan)
    for domain, ids in zip(domains, sequences, strict=True):
        if len(ids) < 2:
            continue
        add_by_hand(by_hand, gated, ids, domain, alone)
    for layer, cells in by_hand.items():
        np.testing.assert_array_equal(tally.cells[layer], cells)
    assert 0 < rate_of(tally.cells[0]) < 1


def add_by_hand(by_hand: dict[int, Any], gated: Any, ids: Sequence[int], domain: int, alone: Any) -> None:
    """Run one document and add the slots of each of its tokens."""
    import torch

    class Told:
        def see(self, layer: int, _: int, keep_TK: torch.Tensor) -> None:
            for token, kept in zip(ids, keep_TK.sum(-1).tolist(), strict=True):
                by_hand[layer][:, domain, alone[token]] += [3, kept]

    for gate in getattr(gated, GATES_ATTRIBUTE).values():
        gate.counter = Told()
    with torch.no_grad():
        gated(torch.tensor([ids]))


@pytest.fixture(scope="module")
def measured(speaker: Path) -> tuple[Any, ...]:
    """A checkpoint with a tokenizer, text, and its report for a plan beside two others."""
    from transformers import AutoModelForCausalLM

    checkpoint = moeprune.open_checkpoint(speaker / "model")
    settings = CalibrationOptions(sources=(str(speaker / "calibration.jsonl"),), num_samples=12, device="cpu")
    data = settings.load(checkpoint)
    model = AutoModelForCausalLM.from_pretrained(checkpoint.path)
    nothing = plan_of(model, layers={0: SkipLayer(threshold=-math.inf)}, target=0.01, rate=0.0)
    everything = plan_of(model, layers={0: SkipLayer(threshold=9.0), 2: SkipLayer(threshold=9.0)}, target=0.6)
    plans = [plan_of(model), everything, nothing]
    report, took = measure_skip(checkpoint, plans, settings, data)
    return checkpoint, plans, settings, data, report, took


def test_the_report_says_what_was_found(measured: tuple[Any, ...], tmp_path: Path) -> None:
    """The plan, the curve in order, where slots were skipped; a plan that skips nothing costs nothing."""
    *_, report, took = measured
    nothing, everything = report.curve
    assert (nothing.target, everything.target) == (0.01, 0.6)
    assert (nothing.policy.rate, nothing.policy.ratio.value) == (0.0, 1.0)
    assert nothing.over_oracle.value == pytest.approx(1.0)  # which does without the rows of padding
    assert everything.policy.rate == pytest.approx(2 / 3)  # the top slot stays
    own = report.point
    assert own.policy.rate == own.random.rate == own.oracle.rate
    assert np.mean([one.measured for one in report.layers.values()]) == pytest.approx(own.policy.rate)
    assert [one.calibrated for one in report.layers.values()] == [0.0, 0.0]
    assert list(report.domains) == ["sums"]
    assert report.domains["sums"].rate == pytest.approx(own.policy.rate)
    assert report.domains["sums"].tokens == sum(one.tokens for one in report.classes.values())
    assert {"number", "white space", "punctuation"} <= report.classes.keys()
    shares = [one.tokens * one.rate for one in report.classes.values()]
    assert sum(shares) / report.domains["sums"].tokens == pytest.approx(own.policy.rate)
    write_measured(report, took, tmp_path)
    page, table = (tmp_path / "skip.md").read_text(), render_skip_table(report)
    assert f"{100 * own.policy.rate:.1f} %" in page
    assert f"{own.policy.ratio.value:.3f}" in table
    assert {file.name for file in tmp_path.iterdir()} == {"skip.json", "skip.md", "time.json"}
    assert json.loads((tmp_path / "skip.json").read_text())["schema"] == "moeprune.skip/1"
    assert json.loads((tmp_path / "time.json").read_text())["implementation"] == took.implementation


def test_equal_runs_write_equal_reports(measured: tuple[Any, ...]) -> None:
    """The bytes are equal, and streamed the numbers are as near as float32 is; no machine is in the report."""
    checkpoint, plans, settings, data, report, _ = measured
    assert measure_skip(checkpoint, plans, settings, data)[0].to_json() == report.to_json()
    streamed, took = measure_skip(checkpoint, plans, dataclasses.replace(settings, stream=True), data)
    assert took is None
    assert streamed.point.policy.ratio.value == pytest.approx(report.point.policy.ratio.value, rel=1e-5)
    assert streamed.layers == report.layers
    assert str(checkpoint.path.parent) not in report.to_json()


def test_a_plan_made_from_the_text_is_told(measured: tuple[Any, ...]) -> None:
    """Thresholds that were solved on it fit it too well."""
    checkpoint, plans, settings, data, report, _ = measured
    assert not report.warnings
    seen = dataclasses.replace(plans[0], inputs={"calibration": data.fingerprint})
    again, _ = measure_skip(checkpoint, [seen], settings, data)
    assert "this very text" in again.warnings[0]
    assert "this very text" in render_skip_table(again)


def test_time_is_of_the_same_tokens(measured: tuple[Any, ...], model_of: ModelOf) -> None:
    """Both models run the same batches in turn, and the gates are gone afterwards."""
    _, plans, _, data, _, _ = measured
    model = model_of("qwen3_moe", vocab_size=257)
    passes: list[bool] = []
    hook = model.register_forward_pre_hook(lambda *_: passes.append("forward" in vars(expert_layers(model)[0].experts)))
    took = time_skip(model, plans[0], data, passes=2)
    hook.remove()
    assert passes == [False, True] * 3
    assert took.spread[0] <= took.ratio <= took.spread[1]
    assert took.tokens >= sum(map(len, data.sequences))


def test_a_text_of_one_document_is_refused(measured: tuple[Any, ...]) -> None:
    """Intervals are over documents."""
    checkpoint, plans, settings, _, _, _ = measured
    few = dataclasses.replace(settings, num_samples=1)
    with pytest.raises(EvaluationError, match="at least two documents"):
        measure_skip(checkpoint, plans, few, few.load(checkpoint))
