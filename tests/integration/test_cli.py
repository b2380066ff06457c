"""Every command, run in this process the way a shell would: results on stdout, the rest on stderr, one exit code."""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import moeprune
from moeprune import cli, oneshot, pipeline
from moeprune._cli_run import exit_code
from moeprune._files import parse_size
from moeprune._options import CalibrationOptions
from moeprune.evaluation.settings import EvalSettings
from moeprune.planner import Decisions

COMMANDS = [
    *("prune", "collect", "stats merge", "plan", "apply", "verify", "eval", "compare", "report", "inspect", "sweep"),
    *("strategies", "statistics", "architectures"),
]


class Done(NamedTuple):
    """What a command line left behind."""

    code: int
    out: str
    err: str

    @property
    def result(self) -> Any:
        """Its one JSON object."""
        value = json.loads(self.out)
        assert isinstance(value, dict)
        return value


Run = Callable[..., Done]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command line; what the expected code is not shows all that was printed."""

    def execute(*arguments: object, code: int = 0) -> Done:
        found = cli.run([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        assert found == code, out + err
        return Done(found, out, err)

    return execute


@pytest.fixture
def base(checkpoint_of: Callable[..., Path]) -> Path:
    """A model of 16 experts per layer."""
    return checkpoint_of("qwen3_moe")


@pytest.fixture(autouse=True)
def in_scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Run where default outputs may be written."""
    folder = tmp_path / "scratch"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def statistics(base: Path, ids_file: Path, tmp_path: Path) -> Path:
    """A statistics file of the model."""
    moeprune.collect(base, tmp_path / "statistics.safetensors", calibration=str(ids_file))
    return tmp_path / "statistics.safetensors"


def tree(folder: Path) -> dict[str, bytes]:
    """Every file of a folder with its bytes."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


# --- the stages -----------------------------------------------------------------------------------------------------


def test_stages_give_what_the_one_shot_run_gives(run: Run, base: Path, ids_file: Path, in_scratch: Path) -> None:
    """Collect, plan, apply and verify, each from its files alone, end in the bytes of `prune`."""
    run("collect", base, "--calibration", ids_file, "-o", "statistics.safetensors")
    run("plan", "statistics.safetensors", base, "--ratio", "0.5", "-o", "plan.json")
    assert "checkpoint: staged" in run("apply", base, "plan.json", "-o", "staged").out
    assert run("verify", base, "staged").out.startswith("verified: ")
    done = run("prune", base, "--ratio", "0.5", "--calibration", ids_file)
    assert "checkpoint: base-8of16" in done.out
    one_shot = tree(in_scratch / "base-8of16")
    assert one_shot.pop("moeprune/statistics.safetensors") == Path("statistics.safetensors").read_bytes()
    assert one_shot == tree(in_scratch / "staged")
    assert one_shot["moeprune/plan.json"] == Path("plan.json").read_bytes()


def test_default_output_of_apply(run: Run, base: Path, statistics: Path, in_scratch: Path) -> None:
    """Without -o the folder is named after the model and the counts."""
    run("plan", statistics, base, "--keep", "10", "-o", "plan.json", "--no-guard", "--target", "vllm")
    run("apply", base, "plan.json")
    assert (in_scratch / "base-10of16" / "config.json").is_file()


def test_prune_prints_size_engines_and_proof(run: Run, base: Path, ids_file: Path) -> None:
    """A person reads what was decided, what it saves, who loads it, and that it was verified."""
    done = run("prune", base, "--keep", "8", "--strategy", "reap", "--calibration", ids_file, "-o", "out")
    lines = done.out.splitlines()
    assert lines[0] == "reap: keep 8 of 16 experts in 2 layers"
    assert lines[1].startswith("size: 281.9 kB -> 181.6 kB (-36 %)")
    assert lines[2] == "parameters: 70,480 -> 45,392"
    assert "loads in: transformers, vllm, sglang, llama.cpp" in lines
    assert "verified: 80 tensors (181.6 kB) and 3 other files equal the source" in lines
    assert lines[-1] == "checkpoint: out"
    assert "note: very short calibration data" in done.err


def test_merged_statistics_count_everything(run: Run, base: Path, statistics: Path) -> None:
    """Two statistics files become one with the tokens of both."""
    found = run("stats", "merge", statistics, statistics, "-o", "both.safetensors", "--json").result
    alone = moeprune.RouterStatistics.load(statistics)
    assert found["tokens"] == 2 * alone.tokens == moeprune.RouterStatistics.load("both.safetensors").tokens
    assert found["domains"] == ["code", "prose"]


def test_collections_say_how_far_their_halves_agree(run: Run, base: Path, ids_file: Path) -> None:
    """As a line for people and a key for scripts; the plan has it for its own strategy and choice."""
    given = ["collect", base, "--calibration", ids_file, "-o", "s.safetensors"]
    found = run(*given, "--json").result["stability"]
    assert found["strategy"] == "gated-norm"
    assert found["layers"].keys() == {"0", "2"}
    assert found["lowest"] == min(layer["rank"] for layer in found["layers"].values())
    line = run(*given, "--overwrite").out.splitlines()[1]
    assert line.startswith("gated-norm: the two halves of the calibration data rank the experts")
    assert f"with a correlation of {found['median']:.2f} (" in line
    planned = run("plan", "s.safetensors", base, "--ratio", "0.5", "--dry-run", "--strategy", "gated-norm", "--json")
    layers = planned.result["stability"]["layers"]
    assert {layer: values["rank"] for layer, values in layers.items()} == {
        layer: values["rank"] for layer, values in found["layers"].items()
    }
    assert all(0 <= values["agree"] <= 1 for values in layers.values())
    assert run("collect", base, "-o", "nothing", "--json").result["stability"] is None


def test_calibration_options_reach_the_data(run: Run, base: Path, ids_file: Path) -> None:
    """Rows, length, packing, label and seed are those of the command line, and are in the file."""
    given = ["--num-samples", "6", "--max-length", "10", "--shuffle", "--seed", "5", "--batch-tokens", "64"]
    run("collect", base, "-o", "s.safetensors", "--calibration", f"mine={ids_file}", *given)
    found = moeprune.RouterStatistics.load("s.safetensors")
    assert (found.provenance[0]["rows"], found.provenance[0]["shuffle_seed"]) == (6, 5)
    assert found.tokens <= 60
    assert {key: found.command[key] for key in ("max_length", "batch_tokens", "seed")} == {
        "max_length": 10,
        "batch_tokens": 64,
        "seed": 5,
    }
    run("collect", base, "-o", "p.safetensors", "--calibration", ids_file, "--max-length", "10", "--pack")
    assert moeprune.RouterStatistics.load("p.safetensors").provenance[0]["packed"]


def test_decisions_reach_the_plan(run: Run, base: Path, statistics: Path) -> None:
    """Every option of a decision is in the plan's command, and so in the provenance of the checkpoint."""
    given = ["--ratio", "0.3", "--round-to", "4", "--weights", "code=2,prose=0.5", "--protect", "0:1,0:3,2:5"]
    found = run(
        *("plan", statistics, base, "--dry-run", "--json", *given, "--strategy", "S(1, 1, 1)", "--seed", "7"),
        *("--no-guard", "--mtp", "drop", "--target", "vllm,sglang"),
    ).result
    assert found["command"] == {
        "stage": "plan",
        "strategy": "S(1, 1, 1)",
        "ratio": "0.3",
        "round_to": 4,
        "weights": {"code": 2.0, "prose": 0.5},
        "protect": ["0:1", "0:3", "2:5"],
        "guard": False,
        "mtp": "drop",
        "target": ["vllm", "sglang"],
        "seed": 7,
    }
    assert found["budget"]["kept"] == 12
    assert {1, 3} <= set(found["layers"]["0"]["keep"])


def test_shard_size_reaches_the_files(run: Run, base: Path, statistics: Path) -> None:
    """A smaller shard size gives several files and their index."""
    run("plan", statistics, base, "--ratio", "0.5", "-o", "plan.json")
    run("apply", base, "plan.json", "-o", "out", "--max-shard-size", "64KB")
    assert len(list(Path("out").glob("model-0000?-of-0000?.safetensors"))) > 1
    assert Path("out/model.safetensors.index.json").is_file()


# --- evaluation -----------------------------------------------------------------------------------------------------


def test_prune_evaluates_when_tasks_are_named(run: Run, speaker: Path, in_scratch: Path) -> None:
    """With --eval the report lies in the checkpoint's own folder and its table on stdout; without, nothing is run."""
    model, given = speaker / "model", ["--ratio", "0.5", "--calibration", speaker / "calibration.jsonl"]
    options = ["--eval", "tiny_one", "--include-path", speaker / "tasks", "--limit", "8", "--batch-size", "4"]
    done = run("prune", model, *given, "-o", "out", *options)
    assert "NOT the full benchmark: tiny_one 8 of 20" in done.out
    assert f"report: {Path('out/moeprune/report/report.md')}" in done.out
    assert f"page: {Path('out/moeprune/report/report.html')}" in done.out
    report = json.loads(Path("out/moeprune/report/report.json").read_text())
    assert (report["command"]["batch_size"], report["limit"], len(report["tasks"])) == (4, 8, 1)
    done = run("prune", model, *given, "-o", "silent", "--json")
    assert done.result["report"] is None
    assert not (in_scratch / "silent" / "moeprune" / "report").exists()


def test_eval_and_compare_agree(run: Run, speaker: Path) -> None:
    """`compare` on the two folders that `eval` leaves gives its numbers, and a replaced report is a whole one."""
    model, options = speaker / "model", ["--include-path", speaker / "tasks", "-o", "report"]
    run("prune", model, "--ratio", "0.5", "--strategy", "random", "-o", "out")
    report = run("eval", model, "out", "--tasks", "tiny_one,tiny_two", *options, "--json").result
    files = ["base", "pruned", "report.html", "report.json", "report.md"]
    assert sorted(path.name for path in Path("report").iterdir()) == files
    assert json.loads(Path("report/report.json").read_text()) == report
    again = run("compare", "report/base", "report/pruned", "--json", "-o", "again").result
    assert again["tasks"] == report["tasks"]
    assert all(Path("again", name).is_file() for name in ("report.md", "report.html"))
    run("eval", model, "out", "--tasks", "tiny_one", *options, code=2)
    report = run("eval", model, "out", "--tasks", "tiny_one", *options, "--overwrite", "--limit", "5", "--json").result
    assert [(task["task"], task["n"]) for task in report["tasks"]] == [("tiny_one", 5)]


def test_a_loss_can_fail_the_run(run: Run, speaker: Path) -> None:
    """--fail-on loss exits with 3 on a planted loss and with 0 without one; the report is written either way."""
    model, tasks = speaker / "model", str(speaker / "tasks")
    moeprune.evaluate(model, model, tasks="tiny_one", output="same", include_path=tasks)
    run("compare", "same/base", "same/pruned", "--fail-on", "loss")
    for side, score in (("base", 1.0), ("pruned", 0.0)):
        [samples] = Path("same", side).glob("samples_*.jsonl")
        rows = [json.loads(line) | {"acc": score} for line in samples.read_text().splitlines()]
        samples.write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = run("compare", "same/base", "same/pruned", "--fail-on", "loss", "-o", "loss", code=3)
    assert "loss" in done.out
    assert Path("loss/report.json").is_file()
    run("compare", "same/base", "same/pruned")


def test_failed_evaluation_leaves_the_checkpoint(run: Run, speaker: Path) -> None:
    """When a model cannot be evaluated the pruned checkpoint is whole, and the error says how to go on."""
    given = ["--ratio", "0.5", "--strategy", "random", "-o", "out", "--include-path", speaker / "tasks"]
    done = run("prune", speaker / "model", *given, "--eval", "tiny_one", "--model-args", "bogus=1", code=1)
    assert "error: lm-eval could not evaluate" in done.err
    assert "checkpoint out is complete: try again with `moeprune eval`" in done.err
    run("verify", speaker / "model", "out")


# --- the bundled model ----------------------------------------------------------------------------------------------


@pytest.fixture
def bundled(speaker: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Put a small bundle in the place of the one that ships."""
    monkeypatch.setattr(oneshot, "BUNDLED", speaker)
    monkeypatch.setattr(pipeline, "BUNDLED", speaker)
    return speaker


def test_without_a_model_the_bundle_is_used(run: Run, bundled: Path) -> None:
    """Model, text, tasks and a limit are the bundled ones, and the folder has their name."""
    done = run("prune", "--ratio", "0.5", "--json").result
    assert done["output"] == "moeprune-tiny-8of16"
    assert [task["task"] for task in done["report"]["tasks"]] == ["tiny_one", "tiny_two"]
    assert done["report"]["limit"] == oneshot.BUNDLED_LIMIT == 200
    assert moeprune.RouterStatistics.load("moeprune-tiny-8of16/moeprune/statistics.safetensors").domains == ("sums",)


def test_what_the_user_names_replaces_the_bundled(run: Run, bundled: Path, tmp_path: Path) -> None:
    """A text of the user's is calibrated on, a task of the user's is run in full, and a limit is kept."""
    (tmp_path / "mine.txt").write_text("one two\n\nthree four\n")
    options = ["--calibration", f"mine={tmp_path / 'mine.txt'}", "--eval", "tiny_two"]
    done = run("prune", "--ratio", "0.5", "--json", "-o", "out", *options).result
    assert [(task["task"], task["n"]) for task in done["report"]["tasks"]] == [("tiny_two", 20)]
    assert done["report"]["limit"] is None
    assert moeprune.RouterStatistics.load("out/moeprune/statistics.safetensors").domains == ("mine",)
    done = run("prune", "--ratio", "0.5", "--json", "-o", "few", "--limit", "3").result
    assert {task["n"] for task in done["report"]["tasks"]} == {3}
    assert "--include-path" in run("prune", "--ratio", "0.5", "--include-path", tmp_path, code=2).err


# --- looking without writing ----------------------------------------------------------------------------------------


def test_dry_runs_write_nothing(run: Run, base: Path, ids_file: Path, statistics: Path, in_scratch: Path) -> None:
    """A dry run says the parameters and bytes before and after and the engines, and leaves no file."""
    expected = ["size: 281.9 kB -> 181.6 kB (-36 %)", "parameters: 70,480 -> 45,392", "loads in: transformers, vllm"]
    moeprune.plan(statistics, base, ratio=0.5, output=statistics.with_name("plan.json"))
    for arguments in (
        ["prune", base, "--ratio", "0.5", "--calibration", ids_file, "-o", "out"],
        ["plan", statistics, base, "--ratio", "0.5", "-o", "out.json"],
        ["plan", statistics, base, "--ratio", "0.5"],
        ["apply", base, statistics.with_name("plan.json"), "-o", "out"],
    ):
        done = run(*arguments, "--dry-run")
        assert all(text in done.out for text in expected), done.out
        assert "dry run: nothing was written" in done.out
        text = json.dumps(run(*arguments, "--dry-run", "--json").result)
        assert '"parameters": {"before": 70480, "after": 45392}' in text
    assert list(in_scratch.iterdir()) == []


def test_dry_run_of_prune_chooses_no_experts(run: Run, base: Path, ids_file: Path) -> None:
    """Before calibration nobody knows which experts stay: the preview must not look like a plan."""
    found = run("prune", base, "--ratio", "0.5", "--calibration", ids_file, "--dry-run", "--json").result
    assert "layers" not in found["plan"]
    assert found["plan"]["strategy"]["name"] == moeprune.strategies.DEFAULT
    assert (found["written"], found["verification"]) == (False, None)


def test_dry_run_says_which_engine_refuses_and_why(
    run: Run, checkpoint_of: Callable[..., Path], tmp_path: Path
) -> None:
    """An engine that would not take the result is listed apart, with its reason."""
    folder = Path(shutil.copytree(checkpoint_of("glm4_moe"), tmp_path / "short"))
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"] = {name: file for name, file in index["weight_map"].items() if file != "mtp.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    done = run("prune", folder, "--ratio", "0.5", "--strategy", "random", "--dry-run")
    assert "loads in: transformers, vllm, sglang\n" in done.out
    assert "not in llama.cpp: the config announces MTP layers that are not there\n" in done.out


def test_edited_plan_is_shown_as_it_will_be_applied(run: Run, base: Path, statistics: Path, tmp_path: Path) -> None:
    """After a person kept more experts, the sizes are those of the edited plan."""
    file = tmp_path / "plan.json"
    run("plan", statistics, base, "--ratio", "0.5", "-o", file)
    plan = json.loads(file.read_text())
    for layer in plan["layers"].values():
        layer["keep"] = list(range(12))
    file.write_text(json.dumps(plan))
    done = run("apply", base, file, "-o", "out")
    assert "keep 12 of 16 experts" in done.out
    assert "-> 231.7 kB" in done.out
    assert "by norm" not in done.out
    assert json.loads(Path("out/moeprune/plan.json").read_text())["budget"]["kept"] == 12


# --- looking around -------------------------------------------------------------------------------------------------


def test_inspect_says_what_can_be_kept(run: Run, checkpoint_of: Callable[..., Path]) -> None:
    """Layers, experts, groups and the counts that work, for people and for programs."""
    folder = checkpoint_of("deepseek_v3")
    lines = run("inspect", folder).out.splitlines()
    assert lines[1:6] == [
        "architecture  deepseek_v3",
        "MoE layers    1-2",
        "MTP layers    3",
        "experts       16 per layer in 4 groups, 2 of them per token, top-3",
        "can keep      8 to 12 in steps of 4",
    ]
    found = run("inspect", folder, "--json").result
    assert (found["moe_layers"], found["mtp_layers"], found["smallest_keep"]) == ([1, 2], [3], 8)
    assert found["fingerprint"] == moeprune.open_checkpoint(folder).fingerprint


def test_lists_name_everything(run: Run) -> None:
    """Strategies with their papers and the default, architectures with the engines that load them."""
    assert run("strategies").out.count("[default]") == 1
    found = run("strategies", "--json").result
    assert set(found) == {*moeprune.strategies.BUILTIN, moeprune.strategies.AUTO.name}
    assert [name for name, item in found.items() if item["default"]] == [moeprune.strategies.DEFAULT]
    assert re.search("^deepseek_v3 +transformers, vllm", run("architectures").out, flags=re.MULTILINE)
    assert set(run("architectures", "--json").result) == set(moeprune.architectures.ARCHITECTURES)
    assert set(run("statistics", "--json").result) == set(moeprune.catalogue.BUILTIN)
    assert re.search(r"^gram +\[E, E\] sum over those of .*⟩$", run("statistics").out, flags=re.MULTILINE)


def test_version_and_help(run: Run) -> None:
    """The version and every command's help are results; without a command the help is an error."""
    assert run("--version").out == f"moeprune {moeprune.__version__}\n"
    for command in COMMANDS:
        done = run(*command.split(), "--help")
        assert done.out.startswith(f"Usage: moeprune {command}")
        assert done.err == ""
    done = run(code=2)
    assert done.out == ""
    assert "Commands:" in done.err


# --- what scripts rely on -------------------------------------------------------------------------------------------


def test_json_is_the_only_thing_on_stdout(run: Run, base: Path, ids_file: Path, statistics: Path) -> None:
    """With --json each command prints one object and nothing else; notes stay on stderr."""
    plan = run("plan", statistics, base, "--ratio", "0.5", "-o", "plan.json", "--json")
    assert plan.out == Path("plan.json").read_text()
    assert plan.err.startswith("note: ")
    assert run("collect", base, "-o", "s.safetensors", "--calibration", ids_file, "--json").result["tokens"] > 0
    assert run("apply", base, "plan.json", "-o", "out", "--json").result["written"] is True
    assert run("verify", base, "out", "--json").result == {"tensors": 80, "bytes": 181568, "files": 3}
    done = run("prune", base, "--ratio", "0.5", "--calibration", ids_file, "-o", "one", "--json").result
    assert (done["output"], done["written"], done["verification"]["tensors"]) == ("one", True, 80)
    assert done["plan"]["layers"].keys() == {"0", "2"}


def test_quiet_keeps_stderr_empty(run: Run, base: Path, ids_file: Path) -> None:
    """-q drops notes, also before the arguments; results stay."""
    loud = run("prune", base, "--ratio", "0.5", "--calibration", ids_file, "-o", "loud")
    quiet = run("prune", "-q", base, "--ratio", "0.5", "--calibration", ids_file, "-o", "quiet")
    assert (loud.err != "", quiet.err) == (True, "")
    assert quiet.out == loud.out.replace("loud", "quiet")


def test_options_stand_before_or_after_arguments(run: Run, base: Path) -> None:
    """The order of options and arguments is free after the command name."""
    assert run("inspect", base, "--json").out == run("inspect", "--json", base).out


def test_interrupt_is_130(run: Run, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C in the middle of a command ends it with 130 and a word, and leaves no folder behind."""

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("moeprune.rewrite.drop.write_shards", interrupt)
    done = run("prune", base, "--ratio", "0.5", "--strategy", "random", "-o", "out", code=130)
    assert done.err.splitlines()[-1] == "interrupted"
    assert list(Path.cwd().iterdir()) == []
    assert exit_code(interrupt) == 130  # however the parser passes it on


def test_tracebacks_only_when_asked_for(run: Run, base: Path, tmp_path: Path) -> None:
    """An error is one line; -v adds what caused it, -vv the traceback."""
    (tmp_path / "plan.json").write_text("{")
    arguments = ("apply", base, tmp_path / "plan.json", "-o", "out")
    plain, causes, traces = (run(*arguments, *more, code=2).err for more in ((), ("-v",), ("-vv",)))
    assert len(plain.splitlines()) == 1
    assert plain.startswith("error: ")
    assert "because: JSONDecodeError: " in causes
    assert "Traceback" not in causes
    assert "Traceback" in traces
    assert traces.endswith(plain)


def test_unexpected_errors_ask_for_a_report(run: Run, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A defect is one line too, and says how to report it."""
    monkeypatch.setattr("moeprune.inspecting.open_checkpoint", lambda *_, **__: 1 / 0)
    err = run("inspect", base, code=2).err
    assert err.splitlines() == [
        "error: unexpected ZeroDivisionError: division by zero",
        "hint: run again with -vv and report the traceback",
    ]


def test_damage_found_while_verifying_is_1(run: Run, base: Path) -> None:
    """One changed byte in the output is a failure after work began, and names the tensor."""
    run("prune", base, "--ratio", "0.5", "--strategy", "random", "-o", "out")
    file = Path("out/model.safetensors")
    file.write_bytes(file.read_bytes()[:-1] + b"\0")
    err = run("verify", base, "out", code=1).err
    assert "error: tensor 'model." in err
    assert "hint: apply the plan again" in err


def test_the_command_lines_defaults_are_those_of_python() -> None:
    """An option that is left out means the same in both."""
    kinds = (CalibrationOptions, Decisions, EvalSettings)
    python = {field.name: field.default for kind in kinds for field in dataclasses.fields(kind)}
    python |= {name: item.default for name, item in inspect.signature(oneshot.prune).parameters.items()}
    options = {name: item.default for name, item in inspect.signature(cli.prune).parameters.items()}
    assert parse_size(options.pop("max_shard_size")) == python["max_shard_size"]
    assert options.pop("strategy") is None  # the same default, looked up when it is needed
    nothing = (None, "", (), [])
    for name, default in options.items():
        if python.get(name, dataclasses.MISSING) is not dataclasses.MISSING:
            assert default == python[name] or (default in nothing and python[name] in nothing), name
    assert [options[name] for name in ("num_samples", "max_length", "margin", "batch_size")] == [512, 2048, 1.0, 16]
