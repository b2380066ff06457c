"""Whatever a user gets wrong: one line, a hint, the right exit code, and nothing half-written."""

from __future__ import annotations

import errno
import json
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import moeprune
from moeprune import cli

CheckpointOf = Callable[..., Path]
REFUSED, FAILED = 2, 1
PRUNE = "prune {base} --ratio 0.5 --calibration {ids} -o out"
RANDOM = "--ratio 0.5 --strategy random -o out"


@pytest.fixture(scope="module")
def places(checkpoint_of: CheckpointOf, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Good and bad models, data and artifacts, by name."""
    root = tmp_path_factory.mktemp("places")
    base, groups = checkpoint_of("qwen3_moe"), checkpoint_of("deepseek_v3")
    found = {
        "base": base,
        "groups": groups,
        "dense": checkpoint_of("qwen3_moe", mlp_only_layers=[0, 1, 2]),
        "typo": changed(base, root / "typo", lambda config: config | {"model_type": "qwen3_mo"}),
        "tuned": changed(base, root / "tuned", lambda config: config | {"rope_theta": 5.0}),
        "shardless": changed(base, root / "shardless"),
        "phantom": changed(base, root / "phantom"),
        "root": root,
    }
    sorted(found["shardless"].glob("model-*"))[2].unlink()
    index = json.loads((found["phantom"] / "model.safetensors.index.json").read_text())
    index["weight_map"]["model.layers.9.norm.weight"] = min(index["weight_map"].values())
    (found["phantom"] / "model.safetensors.index.json").write_text(json.dumps(index))
    rows = {
        "ids": [{"input_ids": list(range(40))}] * 4,
        "empty": [{"input_ids": []}] * 4,
        "columns": [{"prompt": "a", "answer": "b"}],
        "outside": [{"input_ids": [1, 2, 97]}],
        "text": [{"text": "a model without a tokenizer"}],
    }
    for name, content in rows.items():
        found[name] = root / f"{name}.jsonl"
        found[name].write_text("".join(json.dumps(row) + "\n" for row in content))
    found["broken"] = root / "broken.jsonl"
    found["broken"].write_text('{"input_ids": [1, 2]}\n{"input_ids": [1,\n')
    found["nothing"] = root / "nothing.safetensors"
    moeprune.collect(base, found["nothing"])
    found["plan"] = root / "plan.json"
    moeprune.plan(found["nothing"], base, ratio=0.5, strategy="random", output=found["plan"])
    return found


def changed(base: Path, folder: Path, edit: Callable[[dict[str, Any]], dict[str, Any]] = dict) -> Path:
    """A copy of a checkpoint with another config."""
    shutil.copytree(base, folder)
    config = json.loads((base / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(edit(config)))
    return folder


def everything(folder: Path) -> dict[str, int]:
    """Every path below a folder, hidden ones too, with its time of change."""
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*")}


Refuse = Callable[..., tuple[str, str]]


@pytest.fixture
def refuse(
    places: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Refuse:
    """Run a command line that must not work; gives the error and the hint."""
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious.txt").write_text("mine\n")
    monkeypatch.chdir(tmp_path)

    def run(command: str, code: int = REFUSED) -> tuple[str, str]:
        before = everything(tmp_path) | everything(places["root"])
        found = cli.run(shlex.split(command.format(**places)))
        out, err = capsys.readouterr()
        assert found == code, out + err
        assert out == ""
        error, *hints = [line for line in err.splitlines() if not line.startswith("note: ")]
        assert error.startswith("error: ")
        assert len(hints) <= 1
        assert "unexpected" not in error
        assert everything(tmp_path) | everything(places["root"]) == before
        return error.removeprefix("error: "), "".join(hints).removeprefix("hint: ")

    return run


class Case(NamedTuple):
    """A command line that must be refused, and what its error and its hint must say."""

    name: str
    command: str
    error: str
    hint: str


MODELS = [
    Case("misspelt model_type", "inspect {typo}", "unknown model_type 'qwen3_mo'", "did you mean 'qwen3_moe'"),
    Case("dense", f"prune {{dense}} {RANDOM}", "no routed experts", "dense"),
    Case("missing shard", f"prune {{shardless}} {RANDOM}", "lacks 1 of its shards: model-00003", "download"),
    Case("index names a tensor", f"prune {{phantom}} {RANDOM}", "'model.layers.9.norm.weight'", ""),
    Case("no such folder", f"prune ./nowhere {RANDOM}", "no folder './nowhere'", "org/name"),
    Case("no checkpoint", f"prune full {RANDOM}", "full has no config.json", "Hugging Face"),
    Case("no Hub", f"prune Qwen/Qwen3-30B-A3B {RANDOM}", "cannot fetch 'Qwen/Qwen3-30B-A3B'", "local folder"),
    Case("verify of no checkpoint", "verify {base} full", "plan.json", ""),
]
BUDGETS = [
    Case("neither", "prune {base} --calibration {ids}", "exactly one of --ratio and --keep", ""),
    Case("both", "prune {base} --calibration {ids} --ratio 0.5 --keep 8", "exactly one of --ratio and --keep", ""),
    Case("ratio 0", "prune {base} --calibration {ids} --ratio 0", "between 0 and 1, not 0", "REMOVED"),
    Case("ratio 1", "prune {base} --calibration {ids} --ratio 1.0", "between 0 and 1, not 1.0", "REMOVED"),
    Case("ratio 50", "prune {base} --calibration {ids} --ratio 50", "between 0 and 1, not 50", "REMOVED"),
    Case("ratio negative", "prune {base} --calibration {ids} --ratio -0.5", "between 0 and 1, not -0.5", "REMOVED"),
    Case("ratio in words", "prune {base} --calibration {ids} --ratio half", "must be a number, not 'half'", ""),
    Case("ratio nan", "prune {base} --calibration {ids} --ratio nan", "must be a number, not 'nan'", ""),
    Case("ratio of nothing", "prune {base} --calibration {ids} --ratio 0.01", "removes no expert", "one of 16"),
    Case("ratio below top-k", "prune {base} --calibration {ids} --ratio 0.9", "fewer than its top-3", "from 3 to 15"),
    Case("keep below top-k", "prune {base} --calibration {ids} --keep 2", "fewer than its top-3", "from 3 to 15"),
    Case("keep 0", "prune {base} --calibration {ids} --keep 0", "nothing would be left", "from 3 to 15"),
    Case("keep all", "prune {base} --calibration {ids} --keep 16", "removes nothing", "from 3 to 15"),
    Case("keep in words", "prune {base} --calibration {ids} --keep all", "'--keep'", "moeprune prune --help"),
    Case("keep over groups", "prune {groups} --calibration {ids} --keep 10", "divide over 4 groups", "in steps of 4"),
    Case("keep under groups", "prune {groups} --calibration {ids} --keep 4", "ranks groups", "from 8 to 12"),
]
OUTPUTS = [
    Case("not empty", "prune {base} --ratio 0.5 --calibration {ids} -o full", "full is not empty", "--overwrite"),
    Case("not empty, apply", "apply {base} {plan} -o full", "full is not empty", "--overwrite"),
    Case("inside the source", "apply {base} {plan} -o {base}/out --overwrite", "inside one another", "another -o"),
    Case("around the source", "apply {base} {plan} -o {base}/.. --overwrite", "inside one another", "another -o"),
    Case("the source itself", "prune {base} --ratio 0.5 --calibration {ids} -o {base} --overwrite", "inside one", "-o"),
    Case("a file", "apply {base} {plan} -o full/precious.txt --overwrite", "not a folder", ""),
    Case("a folder", "collect {base} --calibration {ids} -o full", "is a folder", "name a file"),
    Case("a file that is there", "collect {base} --calibration {ids} -o full/precious.txt", "exists", "--overwrite"),
    Case("plan without output", "plan {nothing} {base} --ratio 0.5", "needs an output file", "--dry-run"),
    Case("merge over a file", "stats merge {nothing} {nothing} -o full/precious.txt", "exists", "--overwrite"),
    Case("report", "eval {base} {base} --tasks a -o full", "full is not empty", "--overwrite"),
]
ARTIFACTS = [
    Case("plan of another model", "apply {tuned} {plan} -o out", "made for another model than tuned", "this model"),
    Case("plan of another shape", "apply {groups} {plan} -o out", "made for another model", "this model"),
    Case("plan that is none", "apply {base} {base}/config.json -o out", "is not a moeprune.plan/1 file", "stage"),
    Case("plan that is missing", "apply {base} nowhere.json -o out", "cannot read nowhere.json", ""),
    Case("plan that is no JSON", "apply {base} {broken} -o out", "is not valid JSON", ""),
    Case(
        "statistics of another", "plan {nothing} {tuned} --ratio 0.5 -o p.json", "another model than tuned", "collect"
    ),
    Case(
        "statistics of nothing", "plan {nothing} {base} --ratio 0.5 -o p.json", "has no 'pair_gated_norm'", "--calibr"
    ),
    Case("statistics missing", "plan nowhere.st {base} --ratio 0.5 -o p.json", "cannot read statistics nowhere.st", ""),
    Case("statistics that are none", "plan {ids} {base} --ratio 0.5 -o p.json", "cannot read statistics", ""),
]
DATA = [
    Case("none", "prune {base} --ratio 0.5", "'hope-total' needs calibration data", "--calibration"),
    Case("missing", "collect {base} --calibration gone.jsonl -o s.st", "no calibration file 'gone.jsonl'", ""),
    Case("no token", "collect {base} --calibration {empty} -o s.st", "gives no usable token", "rows and columns"),
    Case("no column", "collect {base} --calibration {columns} -o s.st", "no text, messages or input_ids", "'prompt'"),
    Case("outside", "collect {base} --calibration {outside} -o s.st", "token id 97 is outside", ""),
    Case("no tokenizer", "collect {base} --calibration {text} -o s.st", "the tokenizer of", "input_ids"),
    Case("broken", "collect {base} --calibration {broken} -o s.st", "broken.jsonl:2 is not valid JSON", ""),
    Case("no such kind", "collect {base} --calibration data.csv -o s.st", "neither a file nor a data set", ".jsonl"),
    Case("no Hub", "collect {base} --calibration org/name -o s.st", "cannot load data set 'org/name'", "local file"),
    Case("weight of no domain", PRUNE + " --weights code=2", "no calibration domain 'code'", "default"),
]
OPTIONS = [
    Case("unknown strategy", PRUNE + " --strategy reab", "unknown strategy 'reab'", "did you mean 'reap'"),
    Case("unknown engine", PRUNE + " --target vlm", "unknown engine 'vlm'", "'vllm'"),
    Case("unknown mtp", PRUNE + " --mtp keep", "--mtp must be cut or drop", "default"),
    Case("unknown dtype", PRUNE + " --dtype float23", "'float23'", "bfloat16"),
    Case("unknown device", PRUNE + " --device cuda:99", "--device cuda:99: there are", "--device cpu"),
    Case("no device", PRUNE + " --device gpu", "unknown --device 'gpu'", "auto"),
    Case("negative seed", "plan {nothing} {base} --keep 8 --strategy random --seed -1 -o p.json", "--seed must be", ""),
    Case("unknown option", PRUNE + " --stratgy reap", "No such option: --stratgy", "moeprune prune --help"),
    Case("unknown command", "prun {base}", "No such command 'prun'", "moeprune --help"),
    Case("no argument", "apply {base}", "PLAN", "moeprune apply --help"),
    Case("unknown gate", PRUNE + " --fail-on gain", "knows no 'gain'", "--fail-on loss"),
    Case("gate without tasks", PRUNE + " --fail-on loss", "--fail-on judges an evaluation", "--eval"),
    Case("limit without tasks", PRUNE + " --limit 5", "--limit says how to evaluate", "--eval"),
    Case("weights in words", PRUNE + " --weights code=much", "a weight is not a number", "code=2"),
    Case("weights without a name", PRUNE + " --weights 2", "'2' is not NAME=VALUE", "a=1,b=2"),
    Case("protection in words", PRUNE + " --protect 3", "'3' is not LAYER:EXPERT", "0:17"),
    Case("protection elsewhere", PRUNE + " --protect 1:0", "layer 1, which has no routed experts", "0, 2"),
    Case("protection of too many", PRUNE + f" --protect {','.join(f'0:{e}' for e in range(9))}", "layer 0", "fewer"),
    Case("shard size in words", PRUNE + " --max-shard-size big", "'big' is not a size", "5GB"),
    Case("no shard size", PRUNE + " --max-shard-size 0", "hold anything", "5GB"),
    Case("no samples", PRUNE + " --num-samples 0", "--num-samples and --max-length must be at least 1", ""),
    Case("negative samples", PRUNE + " --num-samples -5", "--num-samples", ""),
    Case("no length", PRUNE + " --max-length 0", "--max-length", ""),
    Case("no batch", PRUNE + " --batch-tokens 0", "--batch-tokens must be at least 1", "default"),
    Case("no rounding", PRUNE + " --round-to 0", "--round-to must be at least 1", ""),
    Case("negative margin", PRUNE + " --margin -1", "--margin must be at least 0", "points"),
    Case("margin nan", PRUNE + " --margin nan", "--margin must be at least 0", "points"),
]
COLLECT = "collect {base} --calibration {ids} --device cpu -o s.st"
STREAMS = [
    Case("memory of a whole", COLLECT + " --no-stream --memory 1GB", "--memory bounds a pass layer by", "--no-stream"),
    Case("device memory of a whole", COLLECT + " --no-stream --device-memory 1GB", "--device-memory bounds", "leave"),
    Case("memory of a whole, prune", PRUNE + " --no-stream --memory 1GB", "--memory bounds a pass", "--no-stream"),
    Case("no accelerator", COLLECT + " --stream --device-memory 1GB", "the model runs on the CPU", "give --memory"),
    Case("no accelerator, unasked", COLLECT + " --device-memory 1GB", "the model runs on the CPU", "give --memory"),
    Case("memory in words", COLLECT + " --memory lots", "'lots' is not a size", "512MiB"),
    Case("memory of nothing", COLLECT + " --memory 0", "hold anything", "512MiB"),
    Case("too little", COLLECT + " --stream --memory 1MB", "a single expert at a time takes", "raise --memory"),
    Case("too little, dry", COLLECT + " --stream --memory 1MB --dry-run", "at a time takes", "raise --memory"),
    Case("too little, prune", PRUNE + " --device cpu --memory 1MB", "at a time takes", "--batch-tokens"),
    Case("dense layer", COLLECT + " --layers 0-2", "names layer 1, which has no routed experts", "experts: 0, 2"),
    Case("no such layer", COLLECT + " --stream --layers 2,7", "names layer 7, which has no routed", "experts: 0, 2"),
    Case("layers in words", COLLECT + " --layers first", "'first' is no layer or range of layers", "0-11,13"),
    Case("layers backwards", COLLECT + " --layers 2-0", "'2-0' is no layer or range of layers", "0-11,13"),
    Case("negative layer", COLLECT + " --layers=-1", "'-1' is no layer or range of layers", "0-11,13"),
    Case("absurd layers", COLLECT + " --layers 0-99999999999", "is no layer or range of layers", "0-11,13"),
]
EVAL = "eval {base} {base} --tasks a -o report"
EVALUATIONS = [
    Case("no tasks", "eval {base} {base} --tasks , -o report", "no tasks to evaluate", "--tasks"),
    Case("no folder of tasks", EVAL + " --include-path gone", "task folder gone does not exist", "--include-path"),
    Case("unknown backend", EVAL + " --model vlm", "unknown backend 'vlm'", "'vllm'"),
    Case("broken JSON", EVAL + " --model-args '{{\"a\": '", "--model-args is not valid JSON", "k=v"),
    Case("JSON that is a list", EVAL + " --model-args '[1]'", "'[1]' is not NAME=VALUE", "a=1,b=2"),
    Case("no value", EVAL + " --model-args a", "'a' is not NAME=VALUE", "a=1,b=2"),
    Case("reserved", EVAL + " --model-args pretrained=x", "may not hold pretrained", "itself"),
    Case("no batch", EVAL + " --batch-size 0", "batch size must be a positive number", "fixed"),
    Case("no limit", EVAL + " --limit 0", "limit must be at least one", "all of them"),
    Case("negative limit", EVAL + " --limit -3", "limit must be at least one", "all of them"),
    Case("negative examples", EVAL + " --num-fewshot -1", "few-shot examples cannot be negative", "none"),
    Case("unknown dtype", EVAL + " --dtype float23", "unknown dtype 'float23'", "bfloat16"),
    Case("unknown device", EVAL + " --device cuda:99", "--device cuda:99: there are", "--device cpu"),
    Case("no device", EVAL + " --device gpu", "unknown device 'gpu'", "auto"),
    Case("negative seed", EVAL + " --seed -1", "--seed must be at least 0", ""),
    Case("negative margin", EVAL + " --margin -1", "--margin must be at least 0", "points"),
    Case("no such base", "eval ./gone {base} --tasks a -o report", "no folder './gone'", "org/name"),
    Case("nothing to compare", "compare {root} {root}", "holds no lm-eval results", "--log_samples"),
    Case("metric without a task", "compare {root} {root} --metrics acc", "'acc' is not NAME=VALUE", "a=1,b=2"),
]
TEXT = "eval {base} {plan} --text {ids} -o report"
TEXTS = [
    Case("no kind", "eval {base} {base} -o report", "either --tasks or --text", "perplexity"),
    Case("both kinds", TEXT + " --tasks a", "either --tasks or --text", "perplexity"),
    Case("two checkpoints", "eval {base} {base} {base} --tasks a -o report", "one checkpoint, not 2", "--text"),
    Case("limit", TEXT + " --limit 5", "--limit does nothing with --text", "leave it out"),
    Case("backend", TEXT + " --model hf", "--model does nothing with --text", "leave it out"),
    Case("gate", TEXT + " --fail-on loss", "--fail-on does nothing with --text", "leave it out"),
    Case("memory of tasks", EVAL + " --memory 1GB", "--memory does nothing with --tasks", "leave it out"),
    Case("streamed tasks", EVAL + " --no-stream", "--stream does nothing with --tasks", "leave it out"),
    Case("no plan", "eval {base} --text {ids} -o report", "PRUNED", "moeprune eval --help"),
    Case("plan missing", "eval {base} gone.json --text {ids} -o report", "cannot read gone.json", ""),
    Case("plan that is none", "eval {base} {ids} --text {ids} -o report", "is not valid JSON", ""),
    Case("not pruned", "eval {base} {base} --text {ids} -o report", "no checkpoint that moeprune wrote", "apply"),
    Case("another model", "eval {tuned} {plan} --text {ids} -o report", "plan: the plan was made for another", "this"),
    Case("report", "eval {base} {plan} --text {ids} -o full", "full is not empty", "--overwrite"),
    Case("text missing", "eval {base} {plan} --text gone.jsonl -o report", "no calibration file 'gone.jsonl'", ""),
    Case("text outside", "eval {base} {plan} --text {outside} -o report", "token id 97 is outside", ""),
    Case("one document", TEXT + " --num-samples 1", "at least two documents", "intervals"),
    Case("one token each", TEXT + " --max-length 1", "at least two documents", "intervals"),
    Case("no batch", TEXT + " --batch-tokens 0", "--batch-tokens must be at least 1", "default"),
    Case("unknown dtype", TEXT + " --dtype float23", "'float23'", "bfloat16"),
    Case("unknown device", TEXT + " --device cuda:99", "--device cuda:99: there are", "--device cpu"),
    Case("memory of a whole", TEXT + " --no-stream --memory 1GB", "--memory bounds a pass layer by layer", "leave"),
    Case("no memory", TEXT + " --stream --memory 1kB", "one layer with a single expert at a time takes", "--memory"),
    Case("no memory, dry", TEXT + " --memory 1kB --dry-run", "one layer with a single expert at a time", "--memory"),
]


@pytest.mark.parametrize("case", MODELS + BUDGETS + OUTPUTS + ARTIFACTS + DATA, ids=lambda case: case.name)
def test_bad_input_is_refused(refuse: Refuse, case: Case) -> None:
    """Wrong models, budgets, outputs, artifacts and data are refused before any work."""
    error, hint = refuse(case.command)
    assert case.error in error
    assert case.hint in hint


@pytest.mark.parametrize("case", OPTIONS + STREAMS + EVALUATIONS + TEXTS, ids=lambda case: case.name)
def test_bad_options_are_refused(refuse: Refuse, case: Case) -> None:
    """Options that cannot work are refused before any work, the ones of later stages too."""
    error, hint = refuse(case.command)
    assert case.error in error
    assert case.hint in hint


# --- tasks ----------------------------------------------------------------------------------------------------------


def test_unknown_tasks_are_refused_with_their_neighbours(refuse: Refuse) -> None:
    """A misspelt task stops the one-shot run before calibration, and names the tasks that are near."""
    error, hint = refuse(f"{PRUNE} --eval arc_esay")
    assert "unknown task 'arc_esay'" in error
    assert "'arc_easy'" in hint


def test_a_model_without_a_tokenizer_is_not_evaluated(refuse: Refuse, places: dict[str, Path], tmp_path: Path) -> None:
    """What an evaluation needs of the model is looked for before calibration too."""
    bare = Path(shutil.copytree(places["base"], tmp_path / "bare"))
    (bare / "tokenizer_config.json").unlink()
    error, hint = refuse(f"prune {bare} --ratio 0.5 --calibration {{ids}} -o out --eval anything")
    assert "bare has no tokenizer" in error
    assert "tokenizer's files" in hint
    assert "bare has no tokenizer" in refuse(f"eval {bare} {bare} --tasks anything -o report")[0]


# --- disks ----------------------------------------------------------------------------------------------------------


class Usage(NamedTuple):
    """What ``shutil.disk_usage`` gives."""

    total: int
    used: int
    free: int


@pytest.mark.parametrize(
    "command",
    [PRUNE, PRUNE + " --dry-run", "apply {base} {plan} -o out", "apply {base} {plan} -o out --dry-run"],
)
def test_a_full_disk_is_seen_before_any_work(refuse: Refuse, monkeypatch: pytest.MonkeyPatch, command: str) -> None:
    """Too little space is a refusal that says how much is needed, before calibration too."""
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10**9, 10**9 - 1000, 1000))
    error, hint = refuse(command)
    assert "not enough disk space for out" in error
    assert "1.0 kB free" in error
    assert "another -o" in hint


@pytest.mark.parametrize("command", [PRUNE, "apply {base} {plan} -o out"])
def test_a_disk_that_fills_up_leaves_nothing(refuse: Refuse, monkeypatch: pytest.MonkeyPatch, command: str) -> None:
    """When the disk is full in the first shard the run fails with 1, and no folder is left, not even a hidden one."""
    written = []

    def full(out: Any, chunk: memoryview) -> None:
        written.append(out.write(chunk))
        if len(written) > 40:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("moeprune.rewrite.copying._BUFFER", 1024)
    monkeypatch.setattr("moeprune.rewrite.shards._write_all", full)
    error, hint = refuse(command, code=FAILED)
    assert len(written) > 40
    assert error == "cannot write out: No space left on device"
    assert "another -o" in hint


@pytest.mark.parametrize(
    "command",
    [
        "collect {base} --calibration {ids} -o full/precious.txt/s.st",
        "plan {nothing} {base} --ratio 0.5 --strategy random -o full/precious.txt/p.json",
        "apply {base} {plan} -o full/precious.txt/out",
        "stats merge {nothing} {nothing} -o full/precious.txt/s.st",
    ],
)
def test_an_output_that_cannot_be_made_is_one_line(
    places: dict[str, Path], refuse: Refuse, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    """A file where a folder should be is an error that names the output."""
    assert cli.run(shlex.split(command.format(**places))) == REFUSED
    out, err = capsys.readouterr()
    assert out == ""
    assert [line for line in err.splitlines() if "full/precious.txt" in line and line.startswith("error: ")]
    assert "unexpected" not in err
    assert [path.name for path in Path().iterdir()] == ["full"]
    assert Path("full/precious.txt").read_text() == "mine\n"


# --- warnings -------------------------------------------------------------------------------------------------------


def test_short_data_is_a_warning(places: dict[str, Path], refuse: Refuse, capsys: pytest.CaptureFixture[str]) -> None:
    """Experts that were never or rarely seen are counted, with the samples to add; the run goes on and exits with 0."""
    for command in ("collect {base} --calibration {ids} --num-samples 1 -o s.st", PRUNE + " --num-samples 1"):
        assert cli.run(shlex.split(command.format(**places))) == 0
        notes = [line for line in capsys.readouterr().err.splitlines() if line.startswith("note: ")]
        assert any("very short calibration data: 40 tokens" in note and "samples" in note for note in notes)
        assert any("of 32 experts" in note and "never routed to" in note and "samples" in note for note in notes)
