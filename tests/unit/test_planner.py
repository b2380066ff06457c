"""Statistics, a strategy and a budget to a plan, on checkpoints written without torch."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import save_file

from moeprune.checkpoint import Checkpoint, open_checkpoint
from moeprune.engines import engine_remarks, engine_verdicts
from moeprune.errors import ConfigError, PlanError, StaleArtifactError, StrategyError
from moeprune.planner import RARE, Decisions, coverage_warnings, derive, make_plan, preview
from moeprune.plans import Budget, LayerPlan
from moeprune.rewrite.drop import apply_drop
from moeprune.statistics import STATISTICS, RouterStatistics
from moeprune.strategies import GlobalCriterion
from moeprune.strategies.criterion import Layers

E, TOP_K, HIDDEN = 16, 2, 4
QWEN = {"model_type": "qwen3_moe", "num_experts": E, "num_experts_per_tok": TOP_K}
_ROUTED = {"n_routed_experts": E, "num_experts_per_tok": TOP_K, "num_nextn_predict_layers": 1}
GLM = _ROUTED | {"model_type": "glm4_moe", "n_group": 1, "topk_group": 1}
GROUPED = _ROUTED | {"model_type": "deepseek_v3", "n_group": 4, "topk_group": 2}


def write_checkpoint(
    folder: Path, config: Mapping[str, Any], *, mtp: bool = True, dtype: str = "float32", scales: bool = False
) -> Checkpoint:
    """Two MoE layers and, where the config announces one, an MTP layer."""
    folder.mkdir(parents=True)
    experts, depth = config.get("num_experts", config.get("n_routed_experts")), 2
    layers = range(depth + (config.get("num_nextn_predict_layers", 0) if mtp else 0))
    tensors = {"model.embed_tokens.weight": np.ones((8, HIDDEN), dtype)}
    for layer in layers:
        block = f"model.layers.{layer}.mlp"
        tensors[f"{block}.gate.weight"] = np.full((experts, HIDDEN), layer, dtype)
        if config["model_type"] != "qwen3_moe":
            tensors[f"{block}.gate.e_score_correction_bias"] = np.zeros(experts, dtype)
        for expert in range(experts):
            for part in ("gate_proj", "up_proj", "down_proj"):
                tensors[f"{block}.experts.{expert}.{part}.weight"] = np.full((3, HIDDEN), expert, dtype)
                if scales:
                    tensors[f"{block}.experts.{expert}.{part}.weight_scale_inv"] = np.ones((1, 1), np.float32)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"num_hidden_layers": depth} | config))
    return open_checkpoint(folder)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    """A Qwen3-MoE of two layers of 16 experts."""
    return write_checkpoint(tmp_path / "base", QWEN)


@pytest.fixture
def with_mtp(tmp_path: Path) -> Checkpoint:
    """A GLM-4-MoE with an MTP layer."""
    return write_checkpoint(tmp_path / "glm", GLM)


def statistics_of(
    checkpoint: Checkpoint, *, domains: tuple[str, ...] = ("default",), samples: int = 0, **given: NDArray[Any]
) -> RouterStatistics:
    """Statistics in which expert e is routed to 100 (e + 1) times; arrays [domains, E] replace what is given."""
    shape = (len(domains), E)
    steps = np.broadcast_to(100.0 * (1 + np.arange(E)), shape)
    values: dict[str, NDArray[Any]] = {
        name: np.zeros((len(domains), *statistic.shape(E)), np.int64 if statistic.integer else np.float64)
        for name, statistic in STATISTICS.items()
    }
    values |= {"count": steps.astype(np.int64), "gated_norm_sum": steps, "max_abs_down": steps} | given
    values["tokens"] = values["count"].sum(axis=1) // TOP_K
    return RouterStatistics(
        domains=domains,
        num_experts=E,
        top_k=TOP_K,
        layers=dict.fromkeys(checkpoint.moe_layers, values),
        command={"stage": "collect"},
        inputs={"model": checkpoint.fingerprint, "calibration": "c"},
        provenance=[{"sequences": samples}] if samples else [],
    )


def wanted(keep: int = 8, **changes: Any) -> Decisions:
    """A count to keep, by frequency."""
    return Decisions(**{"budget": Budget(keep=keep), "strategy": "frequency"} | changes)


# --- what stays -----------------------------------------------------------------------------------------------------


def test_the_best_stay_in_every_layer(checkpoint: Checkpoint) -> None:
    """The most frequent experts stay, the scores of all are in the plan, and it names what decided."""
    plan = make_plan(checkpoint, statistics_of(checkpoint), wanted())
    assert {layer: decision.keep for layer, decision in plan.layers.items()} == dict.fromkeys(
        (0, 1), tuple(range(8, E))
    )
    assert plan.layers[0].scores == tuple(100.0 * (1 + np.arange(E)))
    assert plan.inputs == {"model": checkpoint.fingerprint, "calibration": "c"}
    assert plan.config_edits == {"num_experts": 8}
    assert plan.command == {
        "stage": "plan",
        "strategy": "frequency",
        "keep": 8,
        "guard": True,
        "mtp": "cut",
        "target": [],
        "seed": 0,
    }


def test_groups_keep_equal_counts(tmp_path: Path) -> None:
    """With a group-limited router the best of each group stay, however good another group is."""
    checkpoint = write_checkpoint(tmp_path / "base", GROUPED)
    plan = make_plan(checkpoint, statistics_of(checkpoint), wanted())
    assert plan.layers[0].keep == (2, 3, 6, 7, 10, 11, 14, 15)


def test_protected_experts_stay(checkpoint: Checkpoint) -> None:
    """An expert that the user protects stays in its layer only, and the plan says so."""
    plan = make_plan(checkpoint, statistics_of(checkpoint), wanted(protect={1: frozenset({0})}, guard=False))
    assert plan.layers[0].keep == tuple(range(8, E))
    assert plan.layers[1].keep == (0, *range(9, E))
    assert plan.strategy["protected"] == {"1": [0]}
    assert plan.command["protect"] == ["1:0"]


@pytest.mark.parametrize(("guard", "stays"), [(True, True), (False, False)])
def test_super_experts_stay_unless_the_guard_is_off(checkpoint: Checkpoint, guard: bool, stays: bool) -> None:
    """An expert with a massive output stays whatever its score, for every strategy."""
    peaks = np.ones((1, E))
    peaks[0, 2] = 1000.0
    plan = make_plan(checkpoint, statistics_of(checkpoint, max_abs_down=peaks), wanted(guard=guard))
    assert (2 in plan.layers[0].keep) is stays
    assert plan.kept == 8


def test_domain_weights_decide(checkpoint: Checkpoint) -> None:
    """A domain with weight 0 has no say, and one that is not there is refused with its neighbour."""
    rising = 100 * (1 + np.arange(E))
    statistics = statistics_of(checkpoint, domains=("code", "prose"), count=np.stack([rising, rising[::-1]]))
    plan = make_plan(checkpoint, statistics, wanted(weights={"code": 0.0}, guard=False))
    assert plan.layers[0].keep == tuple(range(8))
    assert plan.command["weights"] == {"code": 0.0}
    with pytest.raises(ConfigError, match="'prosa'"):
        make_plan(checkpoint, statistics, wanted(weights={"prosa": 1.0}))


# --- two halves of the data -----------------------------------------------------------------------------------------


def halved(statistics: RouterStatistics, *first_half: NDArray[Any]) -> RouterStatistics:
    """The statistics with, by layer, what the first half of the data saw of each expert: counts [E]."""
    halves = {
        layer: dict(values) | {"count": counts[None], "tokens": counts[None].sum(axis=1) // TOP_K}
        for (layer, values), counts in zip(statistics.layers.items(), first_half, strict=True)
    }
    return dataclasses.replace(statistics, first_half=halves)


RISING = 50 * (1 + np.arange(E))  # half of what statistics_of counts


def test_plans_say_how_stable_their_scores_are(checkpoint: Checkpoint) -> None:
    """By layer the rank correlation of the halves and the share of kept experts on which they agree."""
    swapped = RISING.copy()
    swapped[[0, -1]] = 10, 325  # the second half counts 90 of the first expert and 1275 of the last
    plan = make_plan(checkpoint, halved(statistics_of(checkpoint), RISING, swapped), wanted(guard=False))
    assert plan.stability["layers"]["0"] == {"rank": 1.0, "agree": 1.0}
    second = 2 * RISING - swapped
    ranks = [np.argsort(np.argsort(one)) for one in (swapped, second)]
    expected = 1 - 6 * ((ranks[0] - ranks[1]) ** 2).sum() / (E**3 - E)
    keeps = [set(np.argsort(-one)[:8].tolist()) for one in (swapped, second)]
    assert plan.stability["layers"]["1"] == {
        "rank": round(float(expected), 4),
        "agree": len(keeps[0] & keeps[1]) / 8,
    }
    assert plan.stability["lowest"] == plan.stability["layers"]["1"]["rank"]
    assert plan.to_dict()["stability"] == plan.stability
    assert plan.notes == []


def test_scores_that_other_data_might_change_are_a_note(checkpoint: Checkpoint) -> None:
    """With the median correlation, the worst layer and the samples that Spearman and Brown ask for."""
    noisy = RISING + 49 * np.resize([1, -1], E) * (1 + np.arange(E))[::-1] // 4
    statistics = halved(statistics_of(checkpoint, samples=100), noisy, noisy)
    plan = make_plan(checkpoint, statistics, wanted())
    rank = plan.stability["median"]
    assert 0 < rank < 0.9
    more = 100 * (19 * (1 - rank) / (2 * rank) - 1)  # R = 2r/(1+r), and 0.95/0.05 (1-R)/R times the data
    assert len(plan.notes) == 1
    note = re.fullmatch(
        r"the two halves of the calibration data rank the experts with a correlation of (\d\.\d+) "
        r"\(layer 0 the lowest, \1\): add (\d+) samples like these",
        plan.notes[0],
    )
    assert note is not None
    assert float(note[1]) == round(rank, 2)
    assert int(note[2]) == pytest.approx(more, abs=1)


def test_halves_that_contradict_each_other_get_a_bound(checkpoint: Checkpoint) -> None:
    """Nothing follows from a negative correlation but that much more data is needed."""
    upside_down = 99 * (1 + np.arange(E))
    upside_down[8:] = 1
    statistics = halved(statistics_of(checkpoint), upside_down, upside_down)
    [note] = make_plan(checkpoint, statistics, wanted()).notes
    assert re.search(r"add at least [\d,]+ tokens", note)


def test_plans_without_halves_say_nothing_of_stability(checkpoint: Checkpoint) -> None:
    """Statistics without halves, and strategies that need no data, have no stability."""
    without = make_plan(checkpoint, statistics_of(checkpoint), wanted())
    control = make_plan(checkpoint, halved(statistics_of(checkpoint), RISING, RISING), wanted(strategy="random"))
    for plan in (without, control):
        assert plan.stability == {}
        assert "stability" not in plan.to_dict()


def test_groups_and_protection_hold_for_the_halves_too(tmp_path: Path) -> None:
    """Each half chooses under the rules of the plan: equal counts per group, and the protected stay."""
    checkpoint = write_checkpoint(tmp_path / "base", GROUPED)
    statistics = halved(statistics_of(checkpoint), RISING, RISING[::-1])
    protect = {1: frozenset({0, 4, 8, 12})}
    plan = make_plan(checkpoint, statistics, wanted(protect=protect, guard=False))
    second = 2 * RISING - RISING[::-1]
    keeps = [
        {4 * group for group in range(4)}
        | {4 * group + 1 + int(one[4 * group + 1 : 4 * group + 4].argmax()) for group in range(4)}
        for one in (RISING[::-1], second)
    ]
    assert plan.stability["layers"]["1"]["agree"] == len(keeps[0] & keeps[1]) / 8 == 0.5
    assert plan.stability["layers"]["0"]["agree"] == 1.0


# --- the same again -------------------------------------------------------------------------------------------------


def test_equal_inputs_give_equal_plans(checkpoint: Checkpoint) -> None:
    """The same seed gives the same plan, another seed another one."""
    statistics = statistics_of(checkpoint)
    plans = [make_plan(checkpoint, statistics, wanted(strategy="random", seed=seed)).to_dict() for seed in (1, 1, 2)]
    assert plans[0] == plans[1]
    assert plans[0]["layers"] != plans[2]["layers"]


# --- what is refused ------------------------------------------------------------------------------------------------


def test_too_many_protected_experts_are_refused(checkpoint: Checkpoint) -> None:
    """Protecting more than may stay is an error that names the layer, before calibration already."""
    many = wanted(protect={1: frozenset(range(9))}, guard=False)
    with pytest.raises(PlanError, match="layer 1: there are 9 protected experts and only 8 may stay"):
        make_plan(checkpoint, statistics_of(checkpoint), many)
    with pytest.raises(PlanError, match="layer 1"):
        preview(checkpoint, many)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"protect": {7: frozenset({0})}}, "layer 7, which has no routed experts"),
        ({"protect": {0: frozenset({E})}}, f"expert {E} of {E} in layer 0"),
        ({"mtp": "copy"}, "--mtp must be cut or drop"),
        ({"target": ("vlm",)}, "unknown engine 'vlm'"),
        ({"budget": Budget(ratio="0.5", keep=8)}, "exactly one of --ratio and --keep"),
        ({"budget": Budget(keep=8, round_to=0)}, "--round-to"),
    ],
)
def test_options_that_cannot_work_are_refused(checkpoint: Checkpoint, changes: dict[str, Any], message: str) -> None:
    """Each wrong option is an error that names it."""
    with pytest.raises(ConfigError, match=message):
        make_plan(checkpoint, statistics_of(checkpoint), wanted(**changes))


def test_statistics_of_another_model_are_refused(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """Statistics are bound to a model by its fingerprint; the hint depends on how they were made."""
    other = write_checkpoint(tmp_path / "other", QWEN | {"rope_theta": 5.0})
    with pytest.raises(StaleArtifactError, match="another model than base") as caught:
        make_plan(checkpoint, statistics_of(other), wanted())
    assert "collect them" in caught.value.hint
    unbound = dataclasses.replace(statistics_of(checkpoint), inputs={"model": ""})
    with pytest.raises(StaleArtifactError) as caught:
        make_plan(checkpoint, unbound, wanted())
    assert "like=" in caught.value.hint


def test_statistics_without_a_layer_are_refused(checkpoint: Checkpoint) -> None:
    """A slice of the layers cannot be planned, and the hint says how to make it whole."""
    whole = statistics_of(checkpoint)
    with pytest.raises(StaleArtifactError, match=r"lack layers 1 .*`moeprune stats merge`"):
        make_plan(checkpoint, dataclasses.replace(whole, layers={0: whole.layers[0]}), wanted())


def test_statistics_of_no_data_serve_only_strategies_without_need(checkpoint: Checkpoint) -> None:
    """`frequency` cannot plan from nothing, `random` can and says that no super expert was protected."""
    nothing = RouterStatistics.empty(checkpoint.moe_layers, num_experts=E, top_k=TOP_K, model=checkpoint.fingerprint)
    with pytest.raises(StrategyError, match="count"):
        make_plan(checkpoint, nothing, wanted())
    plan = make_plan(checkpoint, nothing, wanted(strategy="random"))
    assert any("super experts could not be protected" in note for note in plan.notes)


# --- MTP layers and engines -----------------------------------------------------------------------------------------


def test_mtp_layers_take_the_last_keep_list(with_mtp: Checkpoint) -> None:
    """MTP layers are cut like the last decoder layer, since engines build them with the same expert count."""
    plan = make_plan(with_mtp, statistics_of(with_mtp), wanted())
    assert plan.layers[2] == LayerPlan(keep=plan.layers[1].keep, copied_from=1)
    assert plan.config_edits == {"n_routed_experts": 8}
    assert any("MTP layers 2 take the keep-list of layer 1" in note for note in plan.notes)


def test_mtp_layers_that_were_measured_are_cut_by_their_own_scores(with_mtp: Checkpoint) -> None:
    """Statistics of the MTP layer decide on it, and the plan says so."""
    statistics = statistics_of(with_mtp)
    own = dict(statistics.layers[0]) | {"count": statistics.layers[0]["count"][:, ::-1]}
    statistics = dataclasses.replace(statistics, layers=statistics.layers | {2: own})
    plan = make_plan(with_mtp, statistics, wanted(guard=False))
    assert plan.layers[2].keep == tuple(range(8)) != plan.layers[1].keep
    assert plan.layers[2].copied_from is None
    assert any("MTP layers 2 are cut by their own scores" in note for note in plan.notes)
    assert sorted(make_plan(with_mtp, statistics, wanted(mtp="drop")).layers) == [0, 1]


def test_mtp_layers_can_be_dropped(with_mtp: Checkpoint) -> None:
    """Dropped, they are in no layer of the plan and the config announces none."""
    plan = make_plan(with_mtp, statistics_of(with_mtp), wanted(mtp="drop"))
    assert sorted(plan.layers) == [0, 1]
    assert plan.config_edits == {"n_routed_experts": 8, "num_nextn_predict_layers": 0}


def test_announced_mtp_layers_that_are_missing_are_pointed_out(tmp_path: Path) -> None:
    """A config that announces MTP layers which no file holds is a note, and llama.cpp does not take the result."""
    checkpoint = write_checkpoint(tmp_path / "base", GLM, mtp=False)
    plan = make_plan(checkpoint, statistics_of(checkpoint), wanted())
    assert any("announces MTP layers" in note for note in plan.notes)
    assert {engine for engine, reasons in plan.engines.items() if reasons} == {"llama.cpp"}
    make_plan(checkpoint, statistics_of(checkpoint), wanted(target=("vllm", "sglang")))
    with pytest.raises(PlanError, match=r"llama\.cpp would not take the result: .*MTP"):
        make_plan(checkpoint, statistics_of(checkpoint), wanted(target=("llama.cpp",)))


def test_engines_without_a_loader_say_so(checkpoint: Checkpoint) -> None:
    """An engine that does not know the architecture is named with the reason."""
    narrow = dataclasses.replace(checkpoint, spec=dataclasses.replace(checkpoint.spec, engines=("transformers",)))
    assert engine_verdicts(narrow, 8)["vllm"] == ("no loader for qwen3_moe",)
    assert engine_verdicts(checkpoint, 8) == dict.fromkeys(("transformers", "vllm", "sglang", "llama.cpp"), ())
    with pytest.raises(PlanError, match="vllm would not take the result: no loader for qwen3_moe"):
        make_plan(narrow, statistics_of(narrow), wanted(target=("vllm",)))


SHAPES = {  # by name: experts that stay, top-k, groups, groups that a token may use
    "sound": (128, 8, 8, 4),
    "no groups": (96, 8, 1, 1),
    "uneven": (100, 8, 8, 4),
    "one per group": (8, 4, 8, 4),
    "out of reach": (16, 9, 8, 4),
    "top-k of all": (4, 6, 1, 1),
    "too many": (513, 8, 1, 1),
    "all groups": (128, 8, 8, 8),
}


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ("sound", {}),
        ("no groups", {}),
        ("uneven", {"transformers": "divide", "vllm": "without groups", "sglang": "reach", "llama.cpp": "divide"}),
        ("one per group", {"transformers": "two best experts", "vllm": "without groups, silently"}),
        ("out of reach", {"transformers": "masked", "vllm": "reach", "sglang": "reach", "llama.cpp": "reach"}),
        ("top-k of all", {"transformers": "reach", "vllm": "reach", "sglang": "reach", "llama.cpp": "reach"}),
        ("too many", {"llama.cpp": "more than 512"}),
        ("all groups", {"llama.cpp": "topk_group must be smaller"}),
    ],
)
def test_what_each_engine_refuses(checkpoint: Checkpoint, shape: str, expected: dict[str, str]) -> None:
    """The constraints of every engine, whether it stops or routes otherwise without a word."""
    kept, top_k, n_group, topk_group = SHAPES[shape]
    asked = dataclasses.replace(checkpoint, num_experts=600, top_k=top_k, n_group=n_group, topk_group=topk_group)
    found = {engine: "; ".join(reasons) for engine, reasons in engine_verdicts(asked, kept).items() if reasons}
    assert found.keys() == expected.keys()
    assert all(expected[engine] in reasons for engine, reasons in found.items())


@pytest.mark.parametrize(
    ("experts", "kept", "slower"),
    [
        (256, 128, set()),
        (256, 96, {"vllm", "llama.cpp"}),
        (256, 192, {"llama.cpp"}),
        (256, 126, {"vllm", "llama.cpp"}),
        (96, 88, set()),  # lost before pruning
        (96, 86, {"vllm"}),  # no multiple of 4
    ],
)
def test_kernels_that_are_lost_are_pointed_out(
    checkpoint: Checkpoint, experts: int, kept: int, slower: set[str]
) -> None:
    """Only what pruning takes away, and with a target only of the engines in it."""
    asked = dataclasses.replace(checkpoint, num_experts=experts)
    assert set(engine_remarks(asked, kept)) == slower
    grouped = dataclasses.replace(asked, n_group=2, topk_group=1)
    assert ("sglang" in engine_remarks(grouped, kept)) is (experts == 256 and kept != 128)


def test_remarks_follow_the_target(tmp_path: Path) -> None:
    """Of an engine that nobody asked for nothing is said."""
    checkpoint = write_checkpoint(tmp_path / "base", QWEN)
    notes = preview(checkpoint, wanted(keep=12)).notes
    assert any("llama.cpp runs 12 experts more slowly: its fused CUDA top-k wants" in note for note in notes)
    assert not any("llama.cpp" in note for note in preview(checkpoint, wanted(keep=12, target=("vllm",))).notes)


# --- what the plan says of itself -----------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [QWEN, GLM, GROUPED], ids=["qwen3", "glm4", "grouped"])
def test_sizes_are_those_of_the_written_checkpoint(tmp_path: Path, config: dict[str, Any]) -> None:
    """Bytes and parameters before and after are what is on the disk."""
    checkpoint = write_checkpoint(tmp_path / "base", config)
    plan = make_plan(checkpoint, statistics_of(checkpoint), wanted())
    written = open_checkpoint(apply_drop(checkpoint, plan, tmp_path / "out"))
    assert plan.size["bytes"] == {"before": checkpoint.nbytes, "after": written.nbytes}
    assert plan.size["parameters"] == {"before": checkpoint.nbytes // 4, "after": written.nbytes // 4}
    assert preview(checkpoint, wanted()).size == plan.size


def test_scales_are_no_parameters_and_packed_weights_are_not_counted(tmp_path: Path) -> None:
    """Companions of quantised weights count as bytes only, and several weights in one element count as none."""
    scaled = write_checkpoint(tmp_path / "scaled", QWEN, scales=True)
    plain = write_checkpoint(tmp_path / "plain", QWEN)
    packed = write_checkpoint(tmp_path / "packed", QWEN, dtype="int32")
    plans = [make_plan(item, statistics_of(item), wanted()) for item in (scaled, plain, packed)]
    assert plans[0].size["parameters"] == plans[1].size["parameters"]
    assert plans[0].size["bytes"]["after"] > plans[1].size["bytes"]["after"]
    assert "parameters" not in plans[2].size


def test_coverage_is_the_share_of_the_output(checkpoint: Checkpoint) -> None:
    """What the kept experts carried of the gated output norm, by domain."""
    mass = np.ones((2, E))
    mass[1, 8:] = 3.0
    statistics = statistics_of(checkpoint, domains=("a", "b"), gated_norm_sum=mass)
    assert make_plan(checkpoint, statistics, wanted()).coverage == {"a": 0.5, "b": 0.75}


def test_an_edited_plan_is_worked_out_again(checkpoint: Checkpoint) -> None:
    """After a person changed the keep-lists, counts, sizes, config and engines follow them."""
    plan = make_plan(checkpoint, statistics_of(checkpoint), wanted())
    longer = dataclasses.replace(plan, layers=dict.fromkeys((0, 1), LayerPlan(keep=tuple(range(12)))))
    found = derive(checkpoint, longer)
    assert (found.kept, found.budget["kept"], found.config_edits) == (12, 12, {"num_experts": 12})
    assert found.size == make_plan(checkpoint, statistics_of(checkpoint), wanted(keep=12)).size
    assert derive(checkpoint, plan) == plan


def test_a_preview_names_the_wanted_strategy(checkpoint: Checkpoint) -> None:
    """Looking before calibrating shows the strategy that will run, and no warning about data that is still to come."""
    found = preview(checkpoint, wanted(strategy="reap", weights={"code": 2.0}))
    assert found.strategy["name"] == "reap"
    assert found.notes == []


@pytest.mark.parametrize(
    ("budget", "kept"),
    [
        (Budget(keep=7, round_to=8), 8),
        (Budget(keep=9, round_to=8), 24),  # 16 do not divide over 3 groups
        (Budget(ratio="0.7", round_to=4), 24),  # of 15
        (Budget(keep=9), 9),
    ],
)
def test_rounding_keeps_groups_equal(tmp_path: Path, budget: Budget, kept: int) -> None:
    """The count is rounded up to the next one that is a multiple and that every group can share."""
    checkpoint = write_checkpoint(tmp_path / "base", GROUPED | {"n_routed_experts": 48, "n_group": 3})
    if budget.keep == 7:
        checkpoint = dataclasses.replace(checkpoint, n_group=1, topk_group=1)
    assert preview(checkpoint, wanted(budget=budget)).kept == kept


@pytest.mark.parametrize(
    ("keep", "what", "better"),
    [
        # a router row of 16 bytes and three tensors of 48 in each of two layers: 320 bytes an expert
        (13, "13 experts is a prime number", "16 would not be, which is 3 experts per layer more (960 B)"),
        (12, "12 experts is no multiple of 8", "16 would not be, which is 4 experts per layer more (1.3 kB)"),
        (20, "20 experts is no multiple of 8", "16 would not be, which is 4 experts per layer fewer (1.3 kB)"),
    ],
)
def test_counts_that_kernels_dislike_are_noted(tmp_path: Path, keep: int, what: str, better: str) -> None:
    """A prime or odd count is a note that names the nearest better one that can be kept, and what that costs."""
    checkpoint = write_checkpoint(tmp_path / "base", QWEN | {"num_experts": 24})
    note = preview(checkpoint, wanted(keep=keep)).notes[0]
    assert what in note
    assert better in note
    assert preview(checkpoint, wanted(keep=16)).notes == []


# --- warnings about the data ----------------------------------------------------------------------------------------


def test_enough_data_warns_of_nothing(checkpoint: Checkpoint) -> None:
    """Every expert was seen often: silence."""
    assert coverage_warnings(statistics_of(checkpoint)) == []


def test_unseen_and_rare_experts_are_counted(checkpoint: Checkpoint) -> None:
    """Experts that were never or rarely routed are counted over all layers, with the samples to add."""
    counts = np.full((1, E), 1000)
    counts[0, :3] = (0, RARE - 1, 5)
    [warning] = coverage_warnings(statistics_of(checkpoint, samples=10, count=counts))
    assert "of 32 experts 2 were never routed to and 4 by fewer than 20 tokens" in warning
    assert "at least 190 samples" in warning  # one token in 10 samples at best: 20 times as many are needed
    counts[0, 0] = RARE
    [warning] = coverage_warnings(statistics_of(checkpoint, samples=10, count=counts))
    assert "add 30 samples" in warning  # 5 tokens of 20


def test_short_data_says_how_much_to_add(checkpoint: Checkpoint) -> None:
    """Few tokens per expert are a warning in samples, or in tokens where samples are unknown."""
    counts = np.full((1, E), 50)
    found = [coverage_warnings(statistics_of(checkpoint, samples=samples, count=counts)) for samples in (10, 0)]
    assert [len(warnings) for warnings in found] == [1, 1]
    assert "400 tokens give an expert 50 on average; add 30 samples" in found[0][0]
    assert "add 1,200 tokens" in found[1][0]


def test_warnings_are_notes_of_the_plan(checkpoint: Checkpoint) -> None:
    """What was wrong with the data stays with the plan."""
    counts = np.full((1, E), 50)
    plan = make_plan(checkpoint, statistics_of(checkpoint, count=counts), wanted())
    assert any("very short calibration data" in note for note in plan.notes)


def test_no_data_is_no_warning_about_data(checkpoint: Checkpoint) -> None:
    """Statistics of no data have no coverage to complain about."""
    nothing = RouterStatistics.empty(checkpoint.moe_layers, num_experts=E, top_k=TOP_K, model="")
    assert coverage_warnings(nothing) == []


# --- domains and layers together --------------------------------------------------------------------------------------


def two_domains() -> NDArray[Any]:
    """Gated masses: a large domain on the first half of the experts, a small one on the second."""
    mass_DE = np.zeros((2, E))
    mass_DE[0, : E // 2], mass_DE[1, E // 2 :] = 1000.0 + np.arange(8), 1.0 + np.arange(8)
    return mass_DE


def test_maxmin_serves_a_small_domain_as_well_as_a_large_one(checkpoint: Checkpoint) -> None:
    """By sums all experts of the large one stay; by shares half of each, and the plan says how it was made."""
    measured = statistics_of(checkpoint, domains=("large", "small"), gated_norm_sum=two_domains())
    by_sum = make_plan(checkpoint, measured, wanted(strategy="gated-norm", guard=False))
    assert by_sum.layers[0].keep == tuple(range(8))
    assert min(by_sum.coverage.values()) == 0
    blended = make_plan(checkpoint, measured, wanted(strategy="gated-norm", guard=False, blend="maxmin"))
    assert min(blended.coverage.values()) > 0.55
    assert blended.command["blend"] == "maxmin"
    assert "blend" not in by_sum.command


def test_maxmin_leaves_out_a_domain_of_weight_0(checkpoint: Checkpoint) -> None:
    """Whatever it would need."""
    measured = statistics_of(checkpoint, domains=("large", "small"), gated_norm_sum=two_domains())
    asked = wanted(strategy="gated-norm", guard=False, blend="maxmin", weights={"small": 0})
    assert make_plan(checkpoint, measured, asked).layers[0].keep == tuple(range(8))


def test_the_best_experts_of_each_domain_can_be_protected(checkpoint: Checkpoint) -> None:
    """They stay in every layer, in turns as far as there is room, beside those that the user protects."""
    measured = statistics_of(checkpoint, domains=("large", "small"), gated_norm_sum=two_domains())
    asked = wanted(strategy="gated-norm", guard=False, protect_top=2)
    plan = make_plan(checkpoint, measured, asked)
    assert plan.layers[0].keep == (*range(2, 8), 14, 15)
    assert plan.strategy["protected"] == {"0": [6, 7, 14, 15], "1": [6, 7, 14, 15]}
    assert plan.command["protect_top"] == 2
    crowded = make_plan(checkpoint, measured, dataclasses.replace(asked, protect_top=16, protect={0: {0, 8}}))
    assert crowded.layers[0].keep == (0, 5, 6, 7, 8, 13, 14, 15)
    only = make_plan(checkpoint, measured, dataclasses.replace(asked, weights={"small": 0}))
    assert only.strategy["protected"] == {"0": [6, 7], "1": [6, 7]}


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"blend": "mean"}, "--blend must be sum or maxmin, not 'mean'"),
        ({"protect_top": -1}, "--protect-top must be at least 0"),
        ({"blend": "maxmin", "weights": {"default": 2}}, "finds the weights of the domains itself"),
    ],
)
def test_ways_to_blend_that_are_not_there(checkpoint: Checkpoint, changes: dict[str, Any], why: str) -> None:
    """Refused before anything is read."""
    with pytest.raises(ConfigError, match=why):
        make_plan(checkpoint, statistics_of(checkpoint), wanted(**changes))


@pytest.mark.parametrize("changes", [{"blend": "maxmin"}, {"protect_top": 1}])
def test_domains_need_calibration_data(checkpoint: Checkpoint, changes: dict[str, Any]) -> None:
    """A strategy that needs none does not make up for it."""
    nothing = RouterStatistics.empty(checkpoint.moe_layers, num_experts=E, top_k=TOP_K, model=checkpoint.fingerprint)
    with pytest.raises(StrategyError, match="has no 'gated_norm_sum' for layer 0"):
        make_plan(checkpoint, nothing, wanted(strategy="random", **changes))


def test_a_criterion_over_all_layers_sees_all_of_them_at_once(with_mtp: Checkpoint) -> None:
    """One call for all decoder layers with the domains weighted; the MTP layer follows the last, statistics or not."""
    seen = []

    @GlobalCriterion
    def across(layers: Layers) -> dict[int, NDArray[Any]]:
        seen.append([*layers])
        return {layer: np.roll(stats.count, layer) for layer, stats in layers.items()}

    measured = statistics_of(with_mtp)
    measured = dataclasses.replace(measured, layers={**measured.layers, 2: measured.layers[0]})
    plan = make_plan(with_mtp, measured, wanted(strategy=across))
    assert seen == [[0, 1]]
    assert plan.layers[0].keep == tuple(range(8, E))
    assert plan.layers[1].keep == (0, *range(9, E))
    assert plan.layers[2].copied_from == 1
    assert plan.strategy["name"] == "across"
