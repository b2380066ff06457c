"""Layers that keep different numbers of experts: written, proved, loaded by transformers, and refused elsewhere."""

from __future__ import annotations

import copy
import dataclasses
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import moeprune
from moeprune.architectures import ARCHITECTURES
from moeprune.cli import run
from moeprune.engines import engine_verdicts
from moeprune.errors import ArtifactError, CheckpointError, ConfigError, LayoutError, PlanError, UnsupportedModelError
from moeprune.evaluation.evaluator import KeepLists, PlanScore, ResidentEvaluator
from moeprune.experts import expert_layers
from moeprune.planner import derive
from moeprune.plans import LayerPlan
from moeprune.rewrite.non_uniform import MODELING
from moeprune.runtime.masking import masked
from moeprune.statistics import FloatArray, LayerStatistics

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

CheckpointOf = Callable[..., Path]
ModelOf = Callable[..., "PreTrainedModel"]
LOADED = [name for name in ARCHITECTURES if name != "kimi_k2"]  # which transformers does not load


@pytest.fixture(autouse=True)
def _modules_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Remote code is copied to a cache before it is imported."""
    from transformers import dynamic_module_utils

    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))


def load(folder: Path, **options: Any) -> PreTrainedModel:
    """The model, by the code that lies beside it."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **options).eval()


def token_ids() -> torch.Tensor:
    """Random token ids."""
    import torch

    return torch.randint(0, 97, (4, 24), generator=torch.Generator().manual_seed(11))


def plan_of(folder: Path, *, seed: int = 0, mtp: bool = True) -> moeprune.PruningPlan:
    """All experts but one step of one layer, half of the next, and so on; drawn, with equal counts per group."""
    checkpoint = moeprune.open_checkpoint(folder)
    rng = np.random.default_rng(seed)
    blocks = np.arange(checkpoint.num_experts).reshape(checkpoint.n_group, -1)
    width = blocks.shape[1]

    def keep(per_group: int) -> tuple[int, ...]:
        drawn = [rng.permutation(block)[:per_group] for block in blocks]
        return tuple(int(expert) for expert in np.sort(np.concatenate(drawn)))

    counts = [(width - 1, width // 2, width // 2 + 1)[number % 3] for number in range(len(checkpoint.moe_layers))]
    layers = {layer: LayerPlan(keep=keep(count)) for layer, count in zip(checkpoint.moe_layers, counts, strict=True)}
    if mtp:
        layers |= {layer: LayerPlan(keep=keep(counts[-1])) for layer in checkpoint.mtp_layers}
    return moeprune.PruningPlan(
        layers=layers,
        config_edits={},
        command={"stage": "by hand"},
        inputs={"model": checkpoint.fingerprint},
        allow_non_uniform=True,
    )


def masked_logits(model: PreTrainedModel, plan: moeprune.PruningPlan) -> torch.Tensor:
    """What the original computes with the plan's experts only."""
    import torch

    layers = expert_layers(model)
    with torch.no_grad(), masked(layers, {layer.index: plan.layers[layer.index].keep for layer in layers}):
        logits: torch.Tensor = model(token_ids()).logits
    return logits


def relative_error(model: PreTrainedModel, expected: torch.Tensor) -> float:
    """Norm of the difference over the norm."""
    import torch

    with torch.no_grad():
        found = model(token_ids()).logits
    return float((found - expected).norm() / expected.norm())


# --- the oracle -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", LOADED)
def test_every_family_loads_and_equals_the_masked_original(
    model_type: str, checkpoint_of: CheckpointOf, model_of: ModelOf, tmp_path: Path
) -> None:
    """Through the file beside the weights, every layer with its own experts; what transformers saves loads again."""
    base = checkpoint_of(model_type)
    plan = plan_of(base)
    out = moeprune.apply(base, plan, tmp_path / "out")
    moeprune.verify(base, out)
    pruned = load(out)
    found = {layer.index: layer.num_experts for layer in expert_layers(pruned)}
    assert found == {layer: count for layer, count in plan.counts.items() if layer in found}
    expected = masked_logits(model_of(model_type), plan)
    assert relative_error(pruned, expected) < 1e-5
    pruned.save_pretrained(tmp_path / "again")
    assert relative_error(load(tmp_path / "again"), expected) < 1e-5


def test_nothing_is_missing_and_settings_reach_every_layer(
    checkpoint_of: CheckpointOf, model_of: ModelOf, tmp_path: Path
) -> None:
    """No tensor is missing or too much, text can be generated, and another implementation is taken by all layers."""
    from transformers import AutoModelForCausalLM

    base = checkpoint_of("qwen3_moe")
    plan = plan_of(base)
    out = moeprune.apply(base, plan, tmp_path / "out")
    pruned, info = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True, output_loading_info=True)
    assert not any(info.values())
    assert pruned.generate(token_ids()[:1], max_new_tokens=3, do_sample=False).shape == (1, 27)
    configs: list[Any] = [module.config for module in pruned.modules() if hasattr(module, "config")]
    assert {config._experts_implementation for config in configs} != {"eager"}
    pruned.set_experts_implementation("eager")
    pruned.set_attn_implementation("eager")
    assert {(config._experts_implementation, config._attn_implementation) for config in configs} == {("eager", "eager")}
    assert relative_error(pruned, masked_logits(model_of("qwen3_moe"), plan)) < 1e-5


@pytest.mark.parametrize("model_type", ["mixtral", "glm4_moe"])
def test_without_the_code_the_load_is_an_error(model_type: str, checkpoint_of: CheckpointOf, tmp_path: Path) -> None:
    """Nothing is loaded silently at the wrong width."""
    from transformers import AutoModelForCausalLM

    base = checkpoint_of(model_type)
    out = moeprune.apply(base, plan_of(base), tmp_path / "out")
    with pytest.raises(RuntimeError, match=r"size mismatch|mismatched"):
        AutoModelForCausalLM.from_pretrained(out, trust_remote_code=False)


@pytest.mark.parametrize("model_type", ["qwen3_moe", "deepseek_v3", "qwen3_5_moe"])
def test_memory_and_disk_agree(model_type: str, checkpoint_of: CheckpointOf, model_of: ModelOf, tmp_path: Path) -> None:
    """A model pruned in place computes what the checkpoint computes, and is saved as the same files."""
    import torch

    base = checkpoint_of(model_type)
    plan = plan_of(base)
    out = moeprune.apply(base, plan, tmp_path / "out")
    model = moeprune.prune_model(copy.deepcopy(model_of(model_type)), plan)
    with torch.no_grad():
        assert torch.equal(model(token_ids()).logits, load(out)(token_ids()).logits)
    saved = moeprune.save_model(model, tmp_path / "saved", like=base)
    for file in out.iterdir():
        assert file.is_dir() or file.read_bytes() == (saved / file.name).read_bytes()


@pytest.mark.parametrize("model_type", LOADED)
def test_counts_stand_under_the_name_that_transformers_reads(model_type: str, checkpoint_of: CheckpointOf) -> None:
    """The key of a layer's own count is the config attribute itself, not another name for it."""
    from transformers import AutoConfig

    spec = ARCHITECTURES[model_type]
    config = AutoConfig.from_pretrained(checkpoint_of(model_type)).get_text_config()
    assert spec.layer_count_key not in config.attribute_map
    assert getattr(config, spec.layer_count_key) == moeprune.open_checkpoint(checkpoint_of(model_type)).num_experts


# --- files ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", ["qwen3_moe", "qwen3_5_moe", "deepseek_v3"])
def test_the_config_changes_where_it_must(model_type: str, checkpoint_of: CheckpointOf, tmp_path: Path) -> None:
    """The count is the largest, three keys are new, and every other byte of the file is as it was."""
    base = checkpoint_of(model_type)
    plan = plan_of(base)
    out = moeprune.apply(base, plan, tmp_path / "out")
    text = (out / "config.json").read_text()
    config, spec = json.loads(text), ARCHITECTURES[model_type]
    values = spec.values(config)
    decoder = moeprune.open_checkpoint(base).moe_layers
    assert values["per_layer_config"] == {str(layer): {spec.layer_count_key: plan.counts[layer]} for layer in decoder}
    assert values["allow_global_per_layer_attribute_access"] is True
    assert values[spec.count_keys[0]] == max(plan.counts.values())
    for key in ("per_layer_config", "allow_global_per_layer_attribute_access", "auto_map"):
        text = re.sub(rf',\s*"{key}": (true|\{{("\w+": (\{{[^}}]*\}}|"[^"]*"),? ?)*\}})', "", text)
    text = re.sub(rf'"{spec.count_keys[0]}": \d+', f'"{spec.count_keys[0]}": {plan_width(base)}', text)
    assert text == (base / "config.json").read_text()


def plan_width(folder: Path) -> int:
    """Experts of the source."""
    return moeprune.open_checkpoint(folder).num_experts


def test_the_result_can_be_opened_and_says_what_it_is(checkpoint_of: CheckpointOf, tmp_path: Path) -> None:
    """Headers, counts and the fingerprint; the record of where it came from has every layer's count."""
    base = checkpoint_of("deepseek_v3")
    plan = plan_of(base)
    out = moeprune.apply(base, plan, tmp_path / "out")
    opened = moeprune.open_checkpoint(out)
    assert {layer: opened.own_counts.get(layer, opened.num_experts) for layer in opened.all_moe_layers} == plan.counts
    assert (opened.num_experts, opened.fewest) == (12, 8)
    assert "of 8 to 12 experts" in str(opened)
    assert opened.fingerprint != moeprune.open_checkpoint(base).fingerprint
    told = json.loads((out / "moeprune/provenance.json").read_text())["experts"]
    assert told == {"before": 16, "after": {str(layer): count for layer, count in plan.counts.items()}}


def test_mtp_layers_can_be_dropped_or_cut_like_the_last(checkpoint_of: CheckpointOf, tmp_path: Path) -> None:
    """Dropped, the rest opens; with another count than the last decoder layer they are refused."""
    base = checkpoint_of("glm4_moe")
    out = moeprune.apply(base, plan_of(base, mtp=False), tmp_path / "out")
    assert moeprune.open_checkpoint(out).mtp_layers == ()
    plan = plan_of(base)
    odd = dataclasses.replace(plan, layers={**plan.layers, 3: LayerPlan(keep=tuple(range(5)))})
    with pytest.raises(PlanError, match="MTP layer 3 keeps 5 experts and the last decoder layer 8"):
        moeprune.apply(base, odd, tmp_path / "odd")


def test_verify_finds_what_was_changed(checkpoint_of: CheckpointOf, tmp_path: Path) -> None:
    """The modeling file and the counts are proved like everything else."""
    base = checkpoint_of("mixtral")
    out = moeprune.apply(base, plan_of(base), tmp_path / "out")
    for file in (out / MODELING, out / "config.json"):
        whole = file.read_bytes()
        file.write_bytes(whole + b"\n")
        with pytest.raises(CheckpointError, match=f"{file.name} is not what"):
            moeprune.verify(base, out)
        file.write_bytes(whole)
    moeprune.verify(base, out)


def test_keep_lists_can_be_edited(checkpoint_of: CheckpointOf, tmp_path: Path) -> None:
    """Size, counts and engines are derived again; made equal by hand the plan is an ordinary one."""
    base = checkpoint_of("qwen3_moe")
    checkpoint = moeprune.open_checkpoint(base)
    plan = derive(checkpoint, plan_of(base))
    assert plan.budget["kept"] == {"0": 15, "2": 8}
    assert plan.size["bytes"]["after"] == sum(
        entry.nbytes
        for entry in moeprune.open_checkpoint(moeprune.apply(base, plan, tmp_path / "out")).tensors.values()
    )
    assert plan.engines["transformers"] == ()
    for engine in ("vllm", "sglang", "llama.cpp"):
        assert plan.engines[engine] == ("it reads one number of experts for all layers",)
    read = moeprune.PruningPlan.load(plan.save(tmp_path / "plan.json"))
    even = dataclasses.replace(read, layers=dict.fromkeys((0, 2), LayerPlan(keep=tuple(range(8)))))
    made = derive(checkpoint, even)
    assert made.budget["kept"] == 8
    assert made.engines["vllm"] == ()
    assert not (moeprune.apply(base, made, tmp_path / "even") / MODELING).exists()


def test_the_smallest_layer_decides_what_transformers_takes(checkpoint_of: CheckpointOf) -> None:
    """A layer in which a token cannot reach its top-k experts is a reason, however many the others keep."""
    checkpoint = moeprune.open_checkpoint(checkpoint_of("qwen3_moe"))
    assert engine_verdicts(checkpoint, 12, fewest=3)["transformers"] == ()
    assert engine_verdicts(checkpoint, 12, fewest=2)["transformers"] == ("a token cannot reach its top-k experts",)


def test_the_flag_is_needed(checkpoint_of: CheckpointOf, model_of: ModelOf, tmp_path: Path) -> None:
    """Counts that differ by accident are refused on disk and in memory."""
    base = checkpoint_of("mixtral")
    accident = dataclasses.replace(plan_of(base), allow_non_uniform=False)
    with pytest.raises(PlanError, match="layers keep different numbers of experts"):
        moeprune.apply(base, accident, tmp_path / "out")
    with pytest.raises(PlanError, match="layers keep different numbers of experts"):
        moeprune.prune_model(copy.deepcopy(model_of("mixtral")), accident)


# --- refused --------------------------------------------------------------------------------------------------------


def test_what_cannot_work_with_it_says_so(checkpoint_of: CheckpointOf, ids_file: Path, tmp_path: Path) -> None:
    """Calibrating, planning and pruning it again, and saving like it, are refused by name."""
    base = checkpoint_of("mixtral")
    plan = plan_of(base)
    out = moeprune.apply(base, plan, tmp_path / "out")
    statistics = moeprune.collect(base, calibration=str(ids_file))
    for attempt in (
        lambda: moeprune.collect(out, calibration=str(ids_file)),
        lambda: moeprune.collect(out),
        lambda: moeprune.plan(statistics, out, ratio=0.25),
        lambda: moeprune.prune(out, tmp_path / "twice", ratio=0.25, calibration=str(ids_file)),
        lambda: moeprune.apply(out, plan, tmp_path / "twice"),
        lambda: moeprune.save_model(load(out), tmp_path / "twice", like=out),
    ):
        with pytest.raises(
            (UnsupportedModelError, moeprune.StaleArtifactError), match=r"different numbers|another model"
        ):
            attempt()


def test_families_with_code_of_their_own_are_refused(checkpoint_of: CheckpointOf, tmp_path: Path) -> None:
    """kimi_k2 is loaded by its own remote code, whose place the modeling file would take."""
    base = checkpoint_of("kimi_k2")
    with pytest.raises(PlanError, match="transformers loads kimi_k2 through code of its own files"):
        moeprune.apply(base, plan_of(base), tmp_path / "out")


@pytest.mark.parametrize("odd", ['{"0": 3}', "[1]", '{"x": {}}', '{"0": {"num_local_experts": "3"}}'])
def test_counts_that_cannot_be_read_are_refused(odd: str, checkpoint_of: CheckpointOf, tmp_path: Path) -> None:
    """A config whose counts are damaged is no checkpoint."""
    base = checkpoint_of("mixtral")
    out = moeprune.apply(base, plan_of(base), tmp_path / "out")
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | {"per_layer_config": json.loads(odd)}))
    with pytest.raises(LayoutError, match=r"per_layer_config|num_local_experts"):
        moeprune.open_checkpoint(out)


def test_evaluation_needs_trust(speaker: Path, tmp_path: Path) -> None:
    """lm-eval runs it where remote code is allowed; else it is refused before anything is calibrated or run."""
    options: dict[str, Any] = {
        "ratio": 0.5,
        "budget": "global",
        "allow_non_uniform": True,
        "strategy": steeper,
        "calibration": str(speaker / "calibration.jsonl"),
        "tasks": "tiny_one",
        "include_path": speaker / "tasks",
        "limit": 4,
    }
    with pytest.raises(ConfigError, match="only transformers loads layers with different numbers"):
        moeprune.prune(speaker / "model", tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()
    result = moeprune.prune(speaker / "model", tmp_path / "out", **options, trust_remote_code=True)
    assert not result.plan.uniform
    assert result.report is not None
    assert result.report.tasks[0].n == 4
    with pytest.raises(ConfigError, match="--trust-remote-code"):
        moeprune.evaluate(
            speaker / "model",
            tmp_path / "out",
            tasks="tiny_one",
            include_path=speaker / "tasks",
            output=tmp_path / "report",
        )


def test_a_run_that_stops_is_gone_on_with(
    checkpoint_of: CheckpointOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same command after a failure ends with the files of an undisturbed run, and keeps the finished shards."""
    base = checkpoint_of("mixtral")
    plan = plan_of(base)
    whole = moeprune.apply(base, plan, tmp_path / "whole", max_shard_size=30_000)

    def full(*_: object) -> None:
        raise OSError("no space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("moeprune.rewrite.drop._write_records", full)
        with pytest.raises(ArtifactError, match="no space"):
            moeprune.apply(base, plan, tmp_path / "out", max_shard_size=30_000)
    finished = {
        path.name: path.stat().st_mtime_ns for path in (tmp_path / ".out.moeprune-partial").glob("*.safetensors")
    }
    assert len(finished) > 1
    out = moeprune.apply(base, plan, tmp_path / "out", max_shard_size=30_000)
    for name in ("config.json", MODELING, "moeprune/plan.json", "moeprune/manifest.json", *finished):
        assert (out / name).read_bytes() == (whole / name).read_bytes()
    moeprune.verify(base, out)


# --- budgets --------------------------------------------------------------------------------------------------------


def steeper(stats: LayerStatistics) -> FloatArray:
    """Scores that fall off slowly in all layers but the last."""
    return np.asarray(stats.gated_norm_sum ** (6.0 if stats.layer == 2 else 0.5))


@pytest.mark.parametrize(("model_type", "ratio"), [("qwen3_moe", 0.5), ("deepseek_v3", 0.25), ("glm4_moe", 0.5)])
@pytest.mark.parametrize("budget", ["global", "laep", "coverage"])
def test_budgets_from_calibration_to_checkpoint(
    model_type: str,
    ratio: float,
    budget: str,
    checkpoint_of: CheckpointOf,
    model_of: ModelOf,
    ids_file: Path,
    tmp_path: Path,
) -> None:
    """The same total with the flag and without; groups stay equal, and what is written equals the masked original."""
    base = checkpoint_of(model_type)
    checkpoint = moeprune.open_checkpoint(base)
    statistics = moeprune.collect(base, calibration=str(ids_file))
    plan = moeprune.plan(statistics, base, ratio=ratio, budget=budget, strategy=steeper)
    wish = {int(layer): kept for layer, kept in plan.budget["wish"].items()}
    assert plan.uniform
    assert sum(wish.values()) == plan.kept * len(wish)
    assert all(kept % checkpoint.n_group == 0 for kept in wish.values())
    free = moeprune.plan(statistics, base, ratio=ratio, budget=budget, strategy=steeper, allow_non_uniform=True)
    assert {layer: free.counts[layer] for layer in checkpoint.moe_layers} == wish
    out = moeprune.apply(base, free, tmp_path / "out")
    assert relative_error(load(out), masked_logits(model_of(model_type), free)) < 1e-5
    assert not free.uniform or budget == "laep"  # routers that were never trained use all layers alike
    if not free.uniform:
        assert free.budget["realised"] == "per layer"
        assert any("trust_remote_code=True" in note for note in free.notes)
        with pytest.raises(PlanError, match="vllm would not take the result: it reads one number"):
            moeprune.plan(statistics, base, ratio=ratio, budget=budget, allow_non_uniform=True, target=["vllm"])


def test_measured_mtp_layers_keep_as_many_as_the_last(
    checkpoint_of: CheckpointOf, ids_file: Path, tmp_path: Path
) -> None:
    """An MTP layer with statistics of its own ranks its experts by them, and the count is the last layer's."""
    base = checkpoint_of("glm4_moe")
    statistics = moeprune.collect(base, calibration=str(ids_file))
    measured = dataclasses.replace(statistics, layers={**statistics.layers, 3: statistics.layers[1]})
    plan = moeprune.plan(measured, base, ratio=0.5, budget="global", strategy=steeper, allow_non_uniform=True)
    assert plan.layers[3].copied_from is None
    assert plan.counts[3] == plan.counts[2] != plan.counts[1]
    moeprune.verify(base, moeprune.apply(base, plan, tmp_path / "out"))


def test_thresholds_need_no_ratio(checkpoint_of: CheckpointOf, ids_file: Path, tmp_path: Path) -> None:
    """LAEP's thresholds say how many stay; in one run the output must be named, and calibration data is needed."""
    base, rows = checkpoint_of("qwen3_moe"), str(ids_file)
    result = moeprune.prune(
        base, tmp_path / "out", budget="laep:alpha=0.8,beta=0.2", allow_non_uniform=True, calibration=rows
    )
    assert result.plan.command["budget"] == "laep:alpha=0.8,beta=0.2"
    assert "ratio" not in result.plan.command
    assert moeprune.open_checkpoint(tmp_path / "out").num_experts == result.plan.kept
    assert result.statistics is not None
    loose: dict[str, Any] = {"budget": "coverage:fraction=0.8", "strategy": steeper, "allow_non_uniform": True}
    assert not moeprune.plan(result.statistics, base, target=["transformers"], **loose).uniform
    with pytest.raises(PlanError, match="vllm would not take the result: it reads one number"):
        moeprune.plan(result.statistics, base, target=["vllm"], **loose)
    with pytest.raises(ConfigError, match=r"leaves open how many experts stay.*-o"):
        moeprune.prune(base, budget="laep:beta=0.2", calibration=rows)
    with pytest.raises(ConfigError, match="--budget laep needs calibration data"):
        moeprune.prune(base, tmp_path / "x", ratio=0.25, budget="laep", strategy="random")
    look = moeprune.prune(base, tmp_path / "x", budget="laep:beta=0.2", calibration=rows, dry_run=True)
    assert "the calibration decides how many experts stay" in look.plan.notes[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ratio": 0.5, "budget": "laep:beta=0.1"}, "the thresholds of --budget laep say how many"),
        ({"budget": "laep:alpha=0.4"}, "exactly one of --ratio and --keep"),
        ({"ratio": 0.5, "allow_non_uniform": True}, "--allow-non-uniform needs a budget"),
        ({"ratio": 0.5, "budget": "global", "allow_non_uniform": True, "round_to": 8}, "--round-to makes counts equal"),
        ({"ratio": 0.5, "budget": "leap"}, "did you mean 'laep'"),
    ],
)
def test_options_that_contradict_each_other(
    options: dict[str, Any], message: str, checkpoint_of: CheckpointOf, ids_file: Path
) -> None:
    """Refused before anything is calibrated, by plan and by the one-shot run alike."""
    with pytest.raises(ConfigError, match=message):
        moeprune.prune(checkpoint_of("qwen3_moe"), "nowhere", calibration=str(ids_file), **options)


# --- the search -----------------------------------------------------------------------------------------------------


@pytest.fixture
def selection(tmp_path: Path) -> Path:
    """Documents that nothing was calibrated on."""
    rng = np.random.default_rng(9)
    path = tmp_path / "selection.jsonl"
    path.write_text("".join(json.dumps({"input_ids": rng.integers(0, 97, 24).tolist()}) + "\n" for _ in range(8)))
    return path


@pytest.mark.parametrize("model_type", ["qwen3_moe", "deepseek_v3"])
def test_a_search_is_no_worse_than_its_starts(
    model_type: str, checkpoint_of: CheckpointOf, model_of: ModelOf, ids_file: Path, selection: Path
) -> None:
    """On the selection text the counts it finds change the predictions least, as an evaluation of its own shows."""
    base = checkpoint_of(model_type)
    statistics = moeprune.collect(base, calibration=str(ids_file))
    made = {
        budget: moeprune.plan(
            statistics,
            base,
            keep=12,
            strategy=steeper,
            budget=budget,
            allow_non_uniform=budget != "uniform",
            selection=str(selection) if budget.startswith("evolve") else (),
        )
        for budget in ("uniform", "global", "coverage", "evolve:generations=3")
    }
    report = moeprune.evaluate_text(base, list(made.values()), text=str(selection))
    kl = dict(zip(made, (plan.kl.value for plan in report.plans), strict=True))
    found = made["evolve:generations=3"]
    assert kl["evolve:generations=3"] == min(kl.values())
    assert found.budget["search"]["kl"]["best"] == pytest.approx(kl["evolve:generations=3"])
    assert found.budget["search"]["kl"]["uniform"] == pytest.approx(kl["uniform"])
    assert found.budget["search"]["finished"]
    moe_layers = moeprune.open_checkpoint(base).moe_layers
    assert sum(found.counts[layer] for layer in moe_layers) == 12 * len(moe_layers)
    assert found.command["budget"] == "evolve:generations=3"
    assert found.inputs["selection"] not in {"", found.inputs["calibration"]}
    again = moeprune.plan(
        statistics,
        base,
        keep=12,
        strategy=steeper,
        budget="evolve:generations=3",
        allow_non_uniform=True,
        selection=str(selection),
    )
    assert again == found


def test_an_interrupted_search_gives_the_best_so_far(
    checkpoint_of: CheckpointOf,
    ids_file: Path,
    selection: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Ctrl-C in the first generation: the plan is made and written, and says that the search was cut short."""
    calls = 0
    whole = ResidentEvaluator.__call__

    def interrupted(self: ResidentEvaluator, keeps: Sequence[KeepLists]) -> list[PlanScore]:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise KeyboardInterrupt
        return whole(self, keeps)

    monkeypatch.setattr(ResidentEvaluator, "__call__", interrupted)
    base, plan = str(checkpoint_of("qwen3_moe")), tmp_path / "plan.json"
    moeprune.collect(base, tmp_path / "s", calibration=str(ids_file))
    options = ["--ratio", "0.5", "--budget", "evolve:generations=9", "--selection", str(selection)]
    assert run(["plan", str(tmp_path / "s"), base, "-o", str(plan), *options]) == 0
    told = capsys.readouterr().err
    assert "interrupted: the best counts so far are taken" in told
    search = json.loads(plan.read_text())["budget"]["search"]
    assert (search["generations"], search["finished"]) == (0, False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--budget", "evolve"], "--budget evolve scores counts on a text of its own"),
        (["--selection", "HERE"], "--selection is for what searches"),
        (["--device", "cpu"], "--device says how the model runs, and without --selection"),
        (["--budget", "evolve:generations=1.5", "--selection", "HERE"], "must be a whole number, not 1.5"),
    ],
)
def test_a_search_needs_a_text_and_nothing_else_does(
    options: list[str],
    message: str,
    checkpoint_of: CheckpointOf,
    ids_file: Path,
    selection: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Options that would do nothing are refused."""
    base = str(checkpoint_of("qwen3_moe"))
    moeprune.collect(base, tmp_path / "s", calibration=str(ids_file))
    given = [str(selection) if option == "HERE" else option for option in options]
    assert run(["plan", str(tmp_path / "s"), base, "--dry-run", "--ratio", "0.5", *given]) == 2
    assert message in capsys.readouterr().err


def test_one_run_searches_too(checkpoint_of: CheckpointOf, ids_file: Path, selection: Path, tmp_path: Path) -> None:
    """Collect, search, write and prove in one call; a search needs its text before anything is calibrated."""
    base, rows = checkpoint_of("qwen3_moe"), str(ids_file)
    result = moeprune.prune(
        base,
        tmp_path / "out",
        ratio=0.5,
        budget="evolve:generations=1",
        selection=str(selection),
        calibration=rows,
        allow_non_uniform=True,
    )
    assert result.plan.budget["search"]["scored"] > 4
    assert result.verification is not None
    with pytest.raises(ConfigError, match="name one with --selection"):
        moeprune.prune(base, tmp_path / "x", ratio=0.5, budget="evolve", calibration=rows)
