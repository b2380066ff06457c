"""`moeprune eval --probes`: real models that are the same, pruned, masked, or made to loop."""

from __future__ import annotations

import copy
import json
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
import typer

import moeprune
from moeprune import cli, collecting
from moeprune._commands import command_line
from moeprune.errors import ConfigError, EvaluationError, StaleArtifactError
from moeprune.evaluation.agreement import agreement
from moeprune.evaluation.continuations import continuations
from moeprune.evaluation.detectors import ends_in_loop
from moeprune.evaluation.probes import ProbeReport, ProbeRow
from moeprune.streaming import forecast
from moeprune.streaming.forecast import Limits

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PlanByHand = Callable[..., moeprune.PruningPlan]
ModelOf = Callable[..., "PreTrainedModel"]
FEW = {"prompts": 10, "prompt_tokens": 8, "new_tokens": 26, "questions": 4, "probe_batch": 16}
SMALL = FEW | {"device": "cpu", "max_length": 40}


class Pair(NamedTuple):
    """A model, a checkpoint that was pruned from it, its plan, and text of two domains and languages."""

    base: Path
    pruned: Path
    plan: Path
    text: str


@pytest.fixture(scope="module")
def pair(speaker: Path, plan_by_hand: PlanByHand, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """Half of the experts are gone, chosen by hand after a calibration on sums."""
    folder = tmp_path_factory.mktemp("pair")
    base = speaker / "model"
    moeprune.prune(base, folder / "out", ratio=0.5, calibration=str(speaker / "calibration.jsonl"), device="cpu")
    plan = folder / "plan.json"
    shutil.copy(folder / "out" / "moeprune" / "plan.json", plan)
    rows = [
        {
            "text": f"{number} + 2 = {number + 2}, {number}",
            "domain": ("sums", "odd")[number % 2],
            "language": ("en", "de", "")[number % 3],
        }
        for number in range(12)
    ]
    text = folder / "text.jsonl"
    text.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Pair(base=base, pruned=folder / "out", plan=plan, text=str(text))


@pytest.fixture(scope="module")
def report(pair: Pair) -> ProbeReport:
    """Both checkpoints probed."""
    return moeprune.evaluate_probes(pair.base, pair.pruned, text=pair.text, **SMALL)


def by_name(report: ProbeReport) -> dict[str, ProbeRow]:
    """The rows by probe."""
    return {row.probe: row for row in report.rows}


# --- what is measured -------------------------------------------------------------------------------------------------


def test_every_probe_has_its_rows(report: ProbeReport) -> None:
    """Generation, JSON, domains inside and outside the calibration mix, languages, and agreement."""
    rows = by_name(report)
    assert {row.group for row in report.rows} == {"generation", "structured", "domain", "language", "agreement"}
    assert {row.n for row in report.rows if row.group == "generation"} == {10}
    assert {row.n for row in report.rows if row.group == "structured"} == {4}
    inside = {row.probe: row.calibrated for row in report.rows if row.group == "domain"}
    assert inside == {
        "perplexity (sums)": True,
        "perplexity (odd)": False,
        **{f"perplexity (pack-{name})": False for name in ("letters", "logs", "tables")},
    }
    assert {row.probe for row in report.rows if row.group == "language"} == {
        f"perplexity ({name})" for name in ("en", "de", "fr")
    }
    assert (rows["perplexity (fr)"].n, rows["perplexity (en)"].n) == (6, 10)
    assert rows["KL"].change > 0
    assert report.pruned_model == "out"
    assert [source["source"] for source in report.text] == ["text.jsonl"]
    assert (report.pack["source"], report.pack["sequences"]) == ("outside.jsonl", 34)


def test_agreement_is_that_of_the_two_models(pair: Pair, report: ProbeReport) -> None:
    """KL and top-1 on all of the text are what comparing the loaded checkpoints gives."""
    from transformers import AutoModelForCausalLM

    models = [AutoModelForCausalLM.from_pretrained(folder).eval() for folder in (pair.base, pair.pruned)]
    sources = [pair.text, str(Path(moeprune.__file__).parent / "data" / "probes" / "outside.jsonl")]
    data = moeprune.load_calibration(sources, pair.base, max_length=40)
    expected = agreement(*models, data.sequences)
    rows = by_name(report)
    assert rows["KL"].change == pytest.approx(expected.kl.value)
    assert rows["top-1 agreement"].pruned == pytest.approx(100 * expected.top1.value)
    assert rows["KL"].n == len(data.sequences)


def test_a_mask_gives_the_rows_of_the_checkpoint(pair: Pair, report: ProbeReport) -> None:
    """The plan stands for what `apply` made of it; only the name differs."""
    masked = moeprune.evaluate_probes(pair.base, moeprune.PruningPlan.load(pair.plan), text=pair.text, **SMALL)
    for row, expected in zip(masked.rows, report.rows, strict=True):
        assert row.probe == expected.probe
        assert row.interval == pytest.approx(expected.interval, rel=1e-5, abs=1e-6)
        assert (row.base, row.pruned) == pytest.approx((expected.base, expected.pruned), rel=1e-5)
    inside = [row.calibrated for row in masked.rows if row.group == "domain"]
    assert inside == [row.calibrated for row in report.rows if row.group == "domain"]


def test_a_model_beside_itself_changes_nothing(pair: Pair) -> None:
    """Every change is none, and nothing is read as worse or better."""
    found = moeprune.evaluate_probes(pair.base, pair.base, text=pair.text, **SMALL)
    for row in found.rows:
        assert row.change == (1 if row.unit == "x" else 0), row.probe
        assert row.reading in {"no change shown", ""}, row.probe
        assert row.calibrated is None


def test_equal_runs_give_equal_bytes(pair: Pair, report: ProbeReport) -> None:
    """What is drawn is drawn with the seed, and no path is in the report."""
    again = moeprune.evaluate_probes(pair.base, pair.pruned, text=pair.text, **SMALL)
    assert again.to_json() == report.to_json()
    assert str(pair.base.parent) not in report.to_json()


def test_layer_by_layer_nothing_is_generated(pair: Pair, report: ProbeReport, tmp_path: Path) -> None:
    """A plan for a model that does not fit is scored on the text, and the report says what is left out."""
    options = {"stream": True, "output": tmp_path / "r", "num_samples": 12, "shuffle": True}
    found = moeprune.evaluate_probes(pair.base, pair.plan, text=pair.text, **options, **SMALL)
    assert found.pack["rows"] == 34  # whatever is taken of the text that is given
    assert {row.group for row in found.rows} == {"domain", "language", "agreement"}
    assert found.warnings == ("the model does not fit in memory: nothing was generated",)
    for probe, row in by_name(found).items():
        assert row.interval == pytest.approx(by_name(report)[probe].interval, rel=1e-4, abs=1e-6)


# --- generation -------------------------------------------------------------------------------------------------------


@pytest.fixture
def stuck(model_of: ModelOf) -> PreTrainedModel:
    """A model that says one token for ever, whatever it is told."""
    import torch

    model = copy.deepcopy(model_of("qwen3_moe"))
    with torch.no_grad():
        model.lm_head.weight.zero_()
    return model


def test_a_stuck_model_loops(stuck: PreTrainedModel, model_of: ModelOf) -> None:
    """Its greedy continuations end in a loop; drawn ones, over equal odds, do not, and neither do a healthy model's."""
    prompts = [[number, 5, 7] for number in range(6)]
    greedy = continuations(stuck, prompts, new_tokens=30, batch_size=4)
    assert all(ends_in_loop(tokens) and not ended for tokens, ended in greedy)
    drawn = continuations(stuck, prompts, new_tokens=30, batch_size=4, seed=0)
    assert not any(ends_in_loop(tokens) for tokens, _ in drawn)
    assert drawn == continuations(stuck, prompts, new_tokens=30, batch_size=4, seed=0)
    assert drawn != continuations(stuck, prompts, new_tokens=30, batch_size=4, seed=1)
    assert len({tokens for tokens, _ in drawn}) == 6
    healthy = continuations(model_of("qwen3_moe"), prompts, new_tokens=30, batch_size=4)
    assert not all(ends_in_loop(tokens) for tokens, _ in healthy)


def test_prompts_of_different_lengths_go_on_where_they_end(model_of: ModelOf) -> None:
    """Padding changes nothing: each continuation is the model's likeliest next tokens, one after another."""
    import torch

    model, prompts = model_of("qwen3_moe"), [[3, 1, 4, 1, 5, 9], [2, 7], [18]]
    for prompt, (tokens, _) in zip(prompts, continuations(model, prompts, new_tokens=4, batch_size=3), strict=True):
        ids = list(prompt)
        for _ in range(4):
            with torch.inference_mode():
                ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        assert tokens == tuple(ids[len(prompt) :])


def test_a_checkpoints_own_settings_are_put_aside(stuck: PreTrainedModel) -> None:
    """A file that says to draw, or with a penalty, changes nothing; only what ends a text is the model's own."""
    before = stuck.generation_config
    stuck.generation_config = copy.deepcopy(before)
    stuck.generation_config.update(do_sample=True, repetition_penalty=5.0, max_new_tokens=3)
    [(tokens, ended)] = continuations(stuck, [[5, 6]], new_tokens=30, batch_size=1)
    assert (tokens, ended) == ((0,) * 30, False)
    assert stuck.generation_config.repetition_penalty == 5.0
    stuck.generation_config.eos_token_id = 0
    assert continuations(stuck, [[5, 6]], new_tokens=30, batch_size=1) == [((), True)]


# --- the command line -------------------------------------------------------------------------------------------------


@pytest.fixture
def run(pair: Pair, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Probe by a command line, with few prompts."""
    from moeprune import probing

    monkeypatch.setattr(probing.ProbeOptions.__init__, "__kwdefaults__", FEW)

    def execute(options: str, pruned: Path = pair.pruned, code: int = 0) -> tuple[str, str]:
        line = f"eval {pair.base} {pruned} -o {tmp_path / 'report'} --probes {options}"
        found = cli.run(shlex.split(line))
        out, err = capsys.readouterr()
        assert found == code, out + err
        return out, err

    return execute


def test_people_and_programs_read_the_same(run: Any, pair: Pair, tmp_path: Path) -> None:
    """A table, a page, and one object of the same rows."""
    options = f"--text {pair.text} --device cpu --max-length 40"
    out, _ = run(options)
    found = json.loads((tmp_path / "report" / "probes.json").read_text())
    assert found["schema"] == "moeprune.probes/1"
    for row in found["rows"]:
        assert any(line.startswith(row["probe"]) and f" {row['n']} " in line for line in out.splitlines())
    assert out.splitlines()[-1] == f"probes: {tmp_path / 'report' / 'probes.md'}"
    again, _ = run(f"{options} --json --overwrite")
    assert json.loads(again) == found
    assert command_line(found["command"], "BASE", "PRUNED", name="eval").startswith("moeprune eval BASE PRUNED --")
    options = {option.name for option in typer.main.get_command(cli.app).commands["eval"].params}  # type: ignore[attr-defined]
    assert found["command"].keys() - {"stage"} <= options | FEW.keys()
    assert "## Agreement" in (tmp_path / "report" / "probes.md").read_text()


def test_tasks_add_flips_and_choices(run: Any, pair: Pair, speaker: Path, tmp_path: Path) -> None:
    """With --tasks the report of the tasks lies beside the probes, which have rows of every task."""
    options = f"--tasks tiny --include-path {speaker / 'tasks'} --device cpu --max-length 40 --text {pair.text}"
    out, _ = run(f"{options} --json")
    found = json.loads(out)
    tasks = json.loads((tmp_path / "report" / "report.json").read_text())["tasks"]
    assert found["report"]["tasks"] == tasks
    rows = {row["probe"]: row for row in found["probes"]["rows"] if row["group"] == "tasks"}
    for task in tasks:
        flips, moved = rows[f"flips ({task['task']})"], rows[f"choice KL ({task['task']})"]
        assert (flips["change"], flips["n"]) == (task["flips"], task["n"])
        assert flips["interval"][0] <= flips["change"] <= flips["interval"][1]
        assert (moved["change"], moved["interval"]) == (task["choice_kl"]["value"], task["choice_kl"]["interval"])
        assert moved["change"] > 0
    assert json.loads((tmp_path / "report" / "probes.json").read_text()) == found["probes"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--pack", "--pack does nothing with --probes"),
        ("--dry-run", "--dry-run does nothing with --probes"),
        ("--limit 3", "--limit does nothing with --probes"),
        ("more.json", "--probes compares one checkpoint, not 2"),
        ("--stream", "probes need both models in memory, and --stream is given"),
    ],
)
def test_what_does_nothing_is_refused(run: Any, options: str, message: str) -> None:
    """Options of the other kinds of evaluation are no options of probes alone."""
    _, err = run(options, code=2)
    assert message in err


def test_tasks_need_a_checkpoint(run: Any, pair: Pair) -> None:
    """A plan is refused before the probes run."""
    _, err = run("--tasks tiny", pruned=pair.plan, code=2)
    assert "is a plan" in err


# --- what is refused --------------------------------------------------------------------------------------------------


def test_two_models_that_do_not_fit_are_refused(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hint names the plan, which needs one model only."""
    sizes = [collecting.resident_bytes(moeprune.open_checkpoint(each), "auto") for each in (pair.base, pair.pruned)]
    monkeypatch.setattr(forecast, "free_memory", lambda _: Limits(host=sum(sizes) + collecting._ROOM))
    with pytest.raises(ConfigError, match="both models in memory, and loaded whole it takes") as caught:
        moeprune.evaluate_probes(pair.base, pair.pruned, text=pair.text, **SMALL)
    assert caught.value.hint == f"give its plan instead: {pair.pruned / 'moeprune' / 'plan.json'}"


def test_short_documents_are_continued_by_ours(pair: Pair, tmp_path: Path) -> None:
    """Text that is too short for prompts is measured all the same, and the report says that ours is continued."""
    short = tmp_path / "short.jsonl"
    short.write_text('{"text": "1 + 1"}\n' * 12)
    found = moeprune.evaluate_probes(pair.base, pair.plan, text=str(short), **SMALL)
    assert "0 documents of the text are long enough to be continued: ours are too" in found.warnings
    assert by_name(found)["loops (greedy)"].n == 10
    assert by_name(found)["perplexity (default)"].n == 12
    with pytest.raises(EvaluationError, match="no document has more than 99 tokens"):
        moeprune.evaluate_probes(pair.base, pair.plan, text=str(short), **SMALL | {"prompt_tokens": 99})


def test_calibration_text_is_named(pair: Pair, speaker: Path) -> None:
    """Text that the experts were chosen on is said to look too good."""
    found = moeprune.evaluate_probes(pair.base, pair.pruned, text=str(speaker / "calibration.jsonl"), **SMALL)
    assert "part of the text was calibrated on: it looks better than it is" in found.warnings


def test_wrong_inputs_are_refused(pair: Pair, checkpoint_of: Callable[..., Path], plan_by_hand: PlanByHand) -> None:
    """A plan of another model, slices, packing, and no prompts at all."""
    with pytest.raises(StaleArtifactError):
        moeprune.evaluate_probes(pair.base, plan_by_hand(checkpoint_of("olmoe"), 6), text=pair.text)
    for options in ({"layers": (0,)}, {"pack": True}):
        with pytest.raises(ConfigError, match="single documents"):
            moeprune.evaluate_probes(pair.base, pair.plan, text=pair.text, **options)
    with pytest.raises(ConfigError, match="prompts must be at least 1"):
        moeprune.evaluate_probes(pair.base, pair.plan, text=pair.text, prompts=0)
