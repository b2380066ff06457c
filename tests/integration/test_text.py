"""`moeprune eval --text`: many plans on one text, in memory or layer by layer, for people and for programs."""

from __future__ import annotations

import dataclasses
import inspect
import json
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest

import moeprune
from moeprune import cli, collecting
from moeprune._options import CalibrationOptions
from moeprune.errors import ConfigError, PlanError, StaleArtifactError
from moeprune.evaluation.agreement import agreement, perplexity_ratio, token_losses
from moeprune.evaluation.settings import EvalSettings
from moeprune.scoring import forecast_text
from moeprune.streaming import forecast
from moeprune.streaming.forecast import Limits
from moeprune.streaming.stream import LayerStream

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PlanByHand = Callable[..., moeprune.PruningPlan]
CheckpointOf = Callable[..., Path]
ModelOf = Callable[..., "PreTrainedModel"]


class Done(NamedTuple):
    """What a command line left behind."""

    out: str
    err: str


Run = Callable[..., Done]


@pytest.fixture
def base(checkpoint_of: CheckpointOf) -> Path:
    """A model of 16 experts per layer."""
    return checkpoint_of("qwen3_moe")


@pytest.fixture
def plans(base: Path, plan_by_hand: PlanByHand, tmp_path: Path) -> dict[str, Path]:
    """Plan files: two of a half, one of three quarters."""
    made = {"one": plan_by_hand(base, 8, seed=1), "two": plan_by_hand(base, 8, seed=2), "most": plan_by_hand(base, 12)}
    return {name: plan.save(tmp_path / "plans" / f"{name}.json") for name, plan in made.items()}


@pytest.fixture
def text(ids_file: Path) -> Path:
    """Token ids in two domains."""
    return ids_file


@pytest.fixture
def run(
    base: Path, plans: dict[str, Path], text: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Run:
    """Score the three plans by a command line, in a folder of its own."""
    scratch = text.with_name("scratch")
    scratch.mkdir()
    monkeypatch.chdir(scratch)

    def execute(options: str = "", code: int = 0) -> Done:
        files = " ".join(map(str, plans.values()))
        found = cli.run(shlex.split(f"eval {base} {files} --text {text} -o report --batch-tokens 128 {options}"))
        out, err = capsys.readouterr()
        assert found == code, out + err
        return Done(out, err)

    return execute


def payload(folder: str | Path) -> Any:
    """The report in a folder."""
    return json.loads((Path(folder) / "text.json").read_text())


# --- what is said -----------------------------------------------------------------------------------------------------


def test_people_and_programs_read_the_same(run: Run) -> None:
    """A table with the best plan first, a page, and one object of the same numbers."""
    lines = run().out.splitlines()
    found = payload("report")
    assert lines[0].startswith(f"base perplexity {found['perplexity']['value']:.3f} (")
    assert lines[0].endswith(f"24 documents, {found['extent']['tokens']:,} predicted tokens")
    ranked = sorted(found["plans"], key=lambda plan: plan["perplexity"]["value"])
    assert [line.split()[0] for line in lines[2:5]] == [plan["name"] for plan in ranked]
    for line, plan in zip(lines[2:5], ranked, strict=True):
        assert f" {plan['kept']:g}/16 " in line
        assert f" {plan['ratio']['value']:.3f} " in line
        assert max(plan["domains"], key=lambda name: plan["domains"][name]["value"]) in line.split()
    assert " best " in lines[2]
    assert lines[-1] == "report: report/text.md"
    assert run("--overwrite --json").out == Path("report/text.json").read_text()
    page = Path("report/text.md").read_text()
    assert page.count("\n| one | 8/16 |") == 1
    assert page.count("\n| most |") + page.count("\n| one |") + page.count("\n| two |") == 3 + 3 + 2
    assert "| plan | code | prose |" in page


def test_the_report_is_an_artifact(run: Run, base: Path, text: Path, plans: dict[str, Path]) -> None:
    """It says what decided it and what it was made from; no folder is in it, and equal runs give equal bytes."""
    run("--num-samples 20 --max-length 16")
    found = payload("report")
    assert (found["schema"], found["command"]["stage"]) == ("moeprune.text/1", "text")
    assert (found["command"]["num_samples"], found["command"]["max_length"]) == (20, 16)
    assert found["inputs"]["model"] == moeprune.open_checkpoint(base).fingerprint
    assert found["inputs"].keys() == {"model", "text", "plan one", "plan two", "plan most"}
    assert (found["text"][0]["source"], found["text"][0]["rows"]) == (text.name, 20)
    assert str(text.parent) not in Path("report/text.json").read_text()
    before = Path("report/text.json").read_bytes()
    run("--num-samples 20 --max-length 16 --overwrite")
    assert Path("report/text.json").read_bytes() == before


def test_numbers_are_those_of_pruned_checkpoints(
    base: Path, model_of: ModelOf, plans: dict[str, Path], text: Path, tmp_path: Path
) -> None:
    """Of the checkpoint that `apply` writes and stock transformers loads; its folder stands for its plan."""
    from transformers import AutoModelForCausalLM

    written = moeprune.apply(base, plans["one"], tmp_path / "pruned")
    report = moeprune.evaluate_text(base, [written, plans["two"]], text=str(text), batch_tokens=128)
    [score, other] = report.plans
    assert (score.name, score.kept, report.num_experts) == ("pruned", 8, 16)
    model, pruned = model_of("qwen3_moe"), AutoModelForCausalLM.from_pretrained(written).eval()
    data = moeprune.load_calibration([str(text)], base)
    expected = agreement(model, pruned, data.sequences, batch_tokens=128)
    assert (score.kl, score.top1) == (expected.kl, expected.top1)
    losses = [token_losses(each, data.sequences, batch_tokens=128) for each in (model, pruned)]
    assert score.ratio.value == pytest.approx(perplexity_ratio(*losses).value)
    assert score.ratio.value == pytest.approx(score.perplexity.value / report.perplexity.value)
    code = [number for number, domain in enumerate(data.domains) if domain == "code"]
    part = [type(one)(one.nll[code], one.tokens[code]) for one in losses]
    assert score.domains["code"].interval == pytest.approx(perplexity_ratio(*part).interval)
    assert report.domains["code"].tokens == part[0].tokens.sum()
    better, worse = sorted((score, other), key=lambda plan: plan.perplexity.value)
    assert (report.best, better.over) == (better.name, {})
    assert worse.over[better.name].value == pytest.approx(worse.ratio.value / better.ratio.value)


def test_text_that_plans_were_made_from_is_named(base: Path, text: Path, tmp_path: Path) -> None:
    """Plans know the tokens they were made from; a pruned folder its files too, however they are cut."""
    statistics = moeprune.collect(base, tmp_path / "s.safetensors", calibration=str(text))
    plan = moeprune.plan(statistics, base, ratio=0.5)
    other = moeprune.plan(statistics, base, ratio=0.5, strategy="random")
    merged = dataclasses.replace(plan, inputs=plan.inputs | {"calibration": f"0+{plan.inputs['calibration']}"})
    drawn = dataclasses.replace(other, inputs={"model": other.inputs["model"]})

    def warned(source: Any, **options: Any) -> list[str]:
        report = moeprune.evaluate_text(base, source, **{"text": str(text)} | options)
        return [warning.partition(" was made from this very text")[0] for warning in report.warnings]

    chosen = dataclasses.replace(drawn, inputs=drawn.inputs | {"selection": plan.inputs["calibration"]})
    assert warned([plan, drawn, merged]) == ["hope-total", "hope-total (2)"]
    assert warned([drawn, chosen]) == ["random (2)"]
    assert warned(plan, max_length=10) == []
    moeprune.prune(base, tmp_path / "out", ratio=0.5, calibration=str(text))
    assert warned(tmp_path / "out", max_length=10) == ["out"]
    fresh = text.with_name("fresh.jsonl")
    fresh.write_text("\n".join(text.read_text().splitlines()[1:]))
    assert warned([plan, tmp_path / "out"], text=str(fresh)) == []


def test_a_warning_stands_in_every_face(run: Run, base: Path, text: Path, plans: dict[str, Path]) -> None:
    """In the table, on the page and in the object."""
    plan = json.loads(plans["two"].read_text())
    plan["inputs"]["calibration"] = moeprune.load_calibration([str(text)], base).fingerprint
    plans["two"].write_text(json.dumps(plan))
    warning = "two was made from this very text: it looks better than it is"
    assert run().out.startswith(f"note: {warning}\n")
    assert payload("report")["warnings"] == [warning]
    assert f"**Note:** {warning}" in Path("report/text.md").read_text()


def test_names_are_as_much_of_a_path_as_is_needed(base: Path, plans: dict[str, Path], text: Path) -> None:
    """Files of one name are told apart by their folders, one and the same plan by a number."""
    root = plans["one"].parent
    for folder, name in (("a", "one"), ("b", "two")):
        (root / folder).mkdir()
        (root / folder / "plan.json").write_bytes(plans[name].read_bytes())
    loaded = moeprune.PruningPlan.load(plans["most"])

    def names(*sources: Any) -> list[str]:
        return [plan.name for plan in moeprune.evaluate_text(base, sources, text=str(text), num_samples=2).plans]

    assert names(root / "a" / "plan.json", str(root / "b" / "plan.json")) == ["a/plan", "b/plan"]
    assert names(plans["one"], plans["one"], loaded) == ["one", "one (2)", "plan"]
    report = moeprune.evaluate_text(base, [plans["one"], plans["one"]], text=str(text))
    assert report.plans[1].over["one"].interval == (1.0, 1.0)


# --- how it is run ----------------------------------------------------------------------------------------------------


def spilling(run: Run) -> str:
    """Options of a pass that has a byte too little for hidden states in memory."""
    needed = json.loads(run("--stream --dry-run --json --overwrite").out)["forecast"]["host"]
    options = f"--stream --memory {needed - 1}"
    assert json.loads(run(f"{options} --dry-run --json --overwrite").out)["forecast"]["spill"]
    return options


def test_every_way_gives_the_same_report(run: Run) -> None:
    """Loaded whole, layer by layer, and with the states in files: equal numbers, and nothing is left beside them."""
    run("--no-stream")
    whole = payload("report")
    run("--stream --overwrite")
    streamed = payload("report")
    run(f"{spilling(run)} --overwrite")
    assert payload("report") == streamed
    assert [path.name for path in Path().iterdir()] == ["report"]
    for found, expected in zip(streamed["plans"], whole["plans"], strict=True):
        for measure in ("perplexity", "ratio", "top1", "kl"):
            assert found[measure]["interval"] == pytest.approx(expected[measure]["interval"], rel=1e-5)


def test_a_dry_run_says_what_it_would_take(run: Run, base: Path, plans: dict[str, Path], text: Path) -> None:
    """A forecast in which every plan has hidden states of its own; nothing is run or written."""
    done = run("--stream --dry-run")
    assert done.out.startswith("scoring: one layer at a time, hidden states in memory; at most ")
    assert done.out.endswith("dry run: nothing was written to report\n")
    assert run("--dry-run").out.startswith("scoring: the whole model is loaded\n")
    four = json.loads(run("--stream --dry-run --json").out)["forecast"]
    assert list(Path().iterdir()) == []
    alone = forecast_text(base, plans["one"], text=str(text), batch_tokens=128, stream=True)
    assert alone is not None
    assert four["states"] == 2 * alone.states
    assert alone.read == moeprune.open_checkpoint(base).nbytes


def test_a_model_without_room_beside_its_logits_is_streamed(
    run: Run, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a collection would load the model, two models' logits may be too much; the note says so."""
    size = collecting.resident_bytes(moeprune.open_checkpoint(base), "auto") + collecting._ROOM
    monkeypatch.setattr(forecast, "free_memory", lambda _: Limits(host=size + 2 * 4 * 97 * 100))
    assert "note: running layer by layer: loaded whole it takes" in run("--batch-tokens 128").err
    assert run("--batch-tokens 64 --overwrite").err == ""


@pytest.mark.parametrize("options", ["--stream", "--stream --dry-run"])
def test_a_full_disk_is_seen_before_any_work(run: Run, monkeypatch: pytest.MonkeyPatch, options: str) -> None:
    """Too little space is a refusal that says how much is needed, in a dry run too."""
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9 - 1000, 1000))
    done = run(options, code=2)
    assert "error: not enough disk space for report" in done.err
    assert "1.0 kB free" in done.err
    assert list(Path().iterdir()) == []


def test_a_failure_leaves_nothing(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error in the middle of a pass with states in files removes them."""
    options = spilling(run)

    def fail(*_: object) -> None:
        assert sorted(path.name for path in Path(".report.moeprune-states").iterdir()) == ["lock", "states-1"]
        raise moeprune.CheckpointError("a shard is short")

    monkeypatch.setattr(LayerStream, "run", fail)
    assert run(options, code=1).err == "error: a shard is short\n"
    assert list(Path().iterdir()) == []


def test_options_reach_text_and_model(base: Path, plans: dict[str, Path], text: Path) -> None:
    """Labels, rows, packing and dtype are those that are asked for."""
    plain = text.with_name("plain.jsonl")
    plain.write_text("".join(json.dumps({"input_ids": list(range(50))}) + "\n" for _ in range(10)))
    report = moeprune.evaluate_text(
        base, plans["one"], text=[f"mine={plain}", str(text)], num_samples=10, pack=True, max_length=40
    )
    assert report.domains.keys() == {"mine", "code", "prose"}
    assert report.text[0]["packed"]
    assert report.extent.tokens == report.extent.documents * 39
    narrow = moeprune.evaluate_text(base, plans["one"], text=str(text), dtype="bfloat16")
    assert narrow.plans[0].kl != moeprune.evaluate_text(base, plans["one"], text=str(text)).plans[0].kl


def test_mtp_layers_of_a_plan_are_left_out(checkpoint_of: CheckpointOf, plan_by_hand: PlanByHand, text: Path) -> None:
    """They predict nothing that is measured: a plan with them and one without score the same."""
    folder = checkpoint_of("deepseek_v3")
    plan = plan_by_hand(folder, 8)
    short = dataclasses.replace(plan, layers={index: plan.layers[index] for index in (1, 2)})
    report = moeprune.evaluate_text(folder, [plan, short], text=str(text))
    assert report.plans[0].kl == report.plans[1].kl


def test_layers_may_keep_different_numbers(base: Path, plans: dict[str, Path], text: Path) -> None:
    """A plan that says so is scored, and what it keeps is told as a mean."""
    eight, twelve = (moeprune.PruningPlan.load(plans[name]) for name in ("one", "most"))
    mixed = dataclasses.replace(
        eight, layers={0: eight.layers[0], 2: twelve.layers[2]}, allow_non_uniform=True, strategy={"name": "mixed"}
    )
    report = moeprune.evaluate_text(base, [eight, mixed, twelve], text=str(text))
    assert [plan.kept for plan in report.plans] == [8, 10, 12]
    assert len({plan.kl.value for plan in report.plans}) == 3


# --- what is refused --------------------------------------------------------------------------------------------------


def test_wrong_plans_are_named(
    base: Path, checkpoint_of: CheckpointOf, plan_by_hand: PlanByHand, plans: dict[str, Path], text: Path
) -> None:
    """One wrong plan among right ones stops the run, with its name and what is wrong."""
    other = plan_by_hand(checkpoint_of("deepseek_v3"), 8).save(plans["one"].with_name("other.json"))
    with pytest.raises(StaleArtifactError, match="other: the plan was made for another model than base"):
        moeprune.evaluate_text(base, [plans["one"], other], text=str(text))
    broken = json.loads(plans["two"].read_text())
    broken["layers"]["2"]["keep"] = [0, 1]
    plans["two"].write_text(json.dumps(broken))
    with pytest.raises(PlanError, match="two: layer 2: a token could reach 2 experts"):
        moeprune.evaluate_text(base, plans.values(), text=str(text))
    with pytest.raises(ConfigError, match="no plan to score"):
        moeprune.evaluate_text(base, [], text=str(text))
    with pytest.raises(ConfigError, match="on all layers"):
        moeprune.evaluate_text(base, plans["one"], text=str(text), layers=(0,))
    with pytest.raises(ConfigError, match=r"unknown option 'num_sample'.*num_samples"):
        moeprune.evaluate_text(base, plans["one"], text=str(text), num_sample=3)


def test_the_command_lines_defaults_are_those_of_python() -> None:
    """An option that is left out means the same in both, and belongs to one kind of evaluation or to both."""
    options = {name: item.default for name, item in inspect.signature(cli.evaluate).parameters.items()}
    kinds = [
        {field.name: field.default for field in dataclasses.fields(kind)} for kind in (CalibrationOptions, EvalSettings)
    ]
    for name in cli._OF_TEXT - {"dry_run"}:
        assert options[name] == kinds[0][name], name
    assert (kinds[0].keys() & kinds[1].keys()) - {"seed"} == {"device", "dtype", "trust_remote_code"}
    assert options.keys() >= cli._OF_TASKS
    assert not cli._OF_TASKS & cli._OF_TEXT
