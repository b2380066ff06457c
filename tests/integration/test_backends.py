"""Models in processes of their own: the hf backend and launchers for real; vllm and sglang as stubs.

Neither engine can be installed for these tests. A module of the same name stands in its place, which takes what
lm-eval's own class for the engine hands it, writes down what it was started with, and answers without a model. So the
arguments and the whole way to the report are tested, and nothing of the engines themselves.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from moeprune.errors import EvaluationError
from moeprune.evaluation.backends import _last_error, command, model_arguments, run_in_process_of_its_own
from moeprune.evaluation.compare import compare_folders
from moeprune.evaluation.generation import read_answers
from moeprune.evaluation.harness import evaluate_pair, prepare, run_model
from moeprune.evaluation.settings import EvalSettings

# accelerate's --cpu would start a single process
LAUNCHER = "accelerate launch --multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no"
SLOW = pytest.mark.timeout(900)  # lm-eval takes long to start: it looks at all of its tasks

ENGINES = {
    "vllm/__init__.py": """
import json, os
from types import SimpleNamespace

class LLM:
    def __init__(self, **arguments):
        with open(os.environ["ENGINE_RECORD"], "a") as file:
            file.write(json.dumps(arguments) + "\\n")
        self.llm_engine = SimpleNamespace(model_config=SimpleNamespace(max_model_len=64))

    def generate(self, prompts, sampling_params, **_):
        return [answer(prompt["prompt_token_ids"], one.max_tokens) for prompt, one in zip(prompts, sampling_params)]

def answer(tokens, length):
    known = [None, *({token: -1.0 / (1 + token % 7)} for token in tokens[1:])]
    return SimpleNamespace(prompt_logprobs=known, outputs=[SimpleNamespace(text="x" * length)])

class SamplingParams:
    def __init__(self, **options):
        self.__dict__.update(options)

def TokensPrompt(**fields):
    return fields
""",
    "vllm/lora/__init__.py": "",
    "vllm/lora/request.py": "class LoRARequest: pass\n",
    "vllm/renderers/__init__.py": "",
    "vllm/renderers/hf.py": "def resolve_chat_template(**_): return None\n",
    "vllm/tokenizers/__init__.py": """
from transformers import AutoTokenizer

def get_tokenizer(name, **_):
    return AutoTokenizer.from_pretrained(name)
""",
    "vllm-99.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: vllm\nVersion: 99.0\n",
    "sglang/__init__.py": """
import json, os
from types import SimpleNamespace
from transformers import AutoTokenizer

class Engine:
    def __init__(self, **arguments):
        with open(os.environ["ENGINE_RECORD"], "a") as file:
            file.write(json.dumps(arguments) + "\\n")
        tokenizer = AutoTokenizer.from_pretrained(arguments["tokenizer_path"] or arguments["model_path"])
        self.tokenizer_manager = SimpleNamespace(tokenizer=tokenizer, context_len=64)

    def generate(self, input_ids, sampling_params, **_):
        return [answer(tokens, one["max_new_tokens"]) for tokens, one in zip(input_ids, sampling_params)]

def answer(tokens, length):
    known = [(-1.0 / (1 + token % 7), token, None) for token in tokens]
    told = {"input_token_logprobs": known, "input_top_logprobs": [[entry] for entry in known]}
    return {"text": "x" * length, "meta_info": told}
""",
}


@pytest.fixture(scope="module")
def model(speaker: Path) -> Path:
    """A random model that has a tokenizer."""
    return speaker / "model"


@pytest.fixture(scope="module")
def bare(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same weights without a tokenizer."""
    folder = tmp_path_factory.mktemp("bare") / "pruned"
    folder.mkdir()
    for file in model.iterdir():
        if "token" not in file.name:
            (folder / file.name).symlink_to(file)
    return folder


def settings_for(folder: Path, *tasks: str, **changes: Any) -> EvalSettings:
    """Settings for local tasks on the CPU."""
    return EvalSettings(tasks=tasks, include_path=folder, **{"device": "cpu", **changes})


@SLOW
def test_launched_processes_equal_the_run_in_this_one(
    model: Path, questions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two processes under accelerate give the answers, the limits and the counts of one; their log is kept.

    On the CPU each of them answers everything, and one writes; shares of the questions need a GPU for each process.
    """
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    changes: dict[str, Any] = {"max_gen_toks": 20, "num_fewshot": 1}
    here = settings_for(questions, "ask_first", "ask_write", **changes)
    there = settings_for(questions, "ask_first", "ask_write", **changes, launcher=LAUNCHER)
    with prepare(here) as loaded:
        run_model(model, here, tmp_path / "here", loaded=loaded)
        run_model(model, there, tmp_path / "there", loaded=loaded)
    rows = compare_folders(tmp_path / "here", tmp_path / "there").tasks
    assert {row.task: (row.n, row.n_shot, row.flips) for row in rows} == {
        "ask_first": (12, 1, 0),
        "ask_write": (12, 1, 0),
    }
    seen, counted = (read_answers(tmp_path / side)["ask_write"] for side in ("here", "there"))
    assert (seen.limit, seen.cut, seen.exact, counted.exact) == (counted.limit, counted.cut, True, False)
    log = (tmp_path / "there" / "lm_eval.log").read_text()
    assert "accelerate" in log.splitlines()[0]
    assert log.count("Selected Tasks") == 2


@pytest.fixture
def record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Puts the engines where Python finds them; one line is written here for each start of an engine."""
    for name, text in ENGINES.items():
        (tmp_path / "engines" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "engines" / name).write_text(text)
    monkeypatch.syspath_prepend(tmp_path / "engines")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "engines"))
    monkeypatch.setenv("ENGINE_RECORD", str(tmp_path / "record"))
    return tmp_path / "record"


ENGINE: dict[str, Any] = {"device": None, "dtype": "bfloat16", "limit": 4, "max_gen_toks": 5}


@SLOW
def test_vllm_is_started_alike_for_both_models(
    model: Path, bare: Path, questions: Path, tmp_path: Path, record: Path
) -> None:
    """One start for each model with the same arguments; a tokenizer that is missing is the base's."""
    changes = ENGINE | {"backend": "vllm", "model_args": {"max_model_len": 60}}
    settings = settings_for(questions, "ask_first", "ask_write", **changes)
    report = evaluate_pair(model, bare, settings, tmp_path / "report")
    base, pruned = (json.loads(line) for line in record.read_text().splitlines())
    assert (base.pop("model"), pruned.pop("model")) == (str(model), str(bare))
    assert (base.pop("tokenizer"), pruned.pop("tokenizer")) == (None, str(model))
    assert base == pruned
    assert {"trust_remote_code": False, "dtype": "bfloat16", "max_model_len": 60}.items() <= base.items()
    assert report.settings["model_source"] == "vllm"
    assert {row.task: (row.n, row.cut_base, row.cut_pruned) for row in report.tasks} == {
        "ask_first": (4, None, None),
        "ask_write": (4, 4, 4),
    }


@SLOW
def test_sglang_is_started_with_what_it_knows(
    model: Path, bare: Path, questions: Path, tmp_path: Path, record: Path
) -> None:
    """Its tokenizer goes by another name, and code that comes with a model is not trusted, which is its default."""
    changes = ENGINE | {"backend": "sglang", "model_args": {"context_length": 60}}
    settings = settings_for(questions, "ask_first", "ask_write", **changes)
    with prepare(settings) as loaded:
        run_model(bare, settings, tmp_path / "run", loaded=loaded, tokenizer=model)
    [started] = (json.loads(line) for line in record.read_text().splitlines())
    assert (started["model_path"], started["tokenizer_path"]) == (str(bare), str(model))
    assert (started["trust_remote_code"], started["dtype"]) == (False, "bfloat16")
    assert read_answers(tmp_path / "run")["ask_write"].cut == 4
    rows = compare_folders(tmp_path / "run", tmp_path / "run").tasks
    assert {row.task: row.n for row in rows} == {"ask_first": 4, "ask_write": 4}


def test_command_says_only_what_was_asked(model: Path, questions: Path, tmp_path: Path) -> None:
    """Consent to run code, chat and limits are handed on when they are given, and else not mentioned."""
    plain = command(model, settings_for(questions, "ask_first"), tmp_path, questions, None)
    assert plain[:4] == [sys.executable, "-m", "lm_eval", "run"]
    assert not any(
        word in " ".join(plain) for word in ("unsafe", "chat", "gen_kwargs", "--limit", "trust_remote_code ")
    )
    changes: dict[str, Any] = {"confirm_run_unsafe_code": True, "apply_chat_template": True, "max_gen_toks": 7}
    full = command(model, settings_for(questions, "a", "b", limit=3, **changes), tmp_path, None, None)
    assert {"--confirm_run_unsafe_code", "--apply_chat_template", "--log_samples"} <= {*full}
    assert full[full.index("--gen_kwargs") + 1] == '{"max_gen_toks": 7}'
    assert full[full.index("--tasks") + 1] == "a,b"


def test_sglang_is_not_told_what_it_cannot_take(model: Path, questions: Path) -> None:
    """lm-eval's class for it has no word on thinking, and would hand it on to the engine."""
    arguments = {"enable_thinking": True, "think_end_token": "</think>"}
    for engine, told in (("vllm", True), ("sglang", False)):
        settings = settings_for(questions, "a", backend=engine, model_args=arguments)
        found = model_arguments(model, settings, None)
        assert ("enable_thinking" in found, found["think_end_token"]) == (told, "</think>")


@pytest.fixture
def script(tmp_path: Path) -> Callable[[str], str]:
    """A launcher that runs some Python in the place of lm-eval."""

    def written(code: str) -> str:
        file = tmp_path / "launcher.py"
        file.write_text(code)
        return f"{sys.executable} {file}"

    return written


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Let an interrupt raise, also where a shell started the tests in the background and had it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def test_interrupt_ends_every_process(
    script: Callable[[str], str], model: Path, questions: Path, tmp_path: Path
) -> None:
    """Ctrl-C ends lm-eval's process and those that it started, also one that does not listen."""
    launcher = script(
        "import os, signal, subprocess, sys, time\n"
        "deaf = 'import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)'\n"
        "child = subprocess.Popen([sys.executable, '-c', deaf])\n"
        f"open({str(tmp_path / 'pids')!r}, 'w').write(f'{{os.getpid()}} {{child.pid}}\\n')\n"
        "time.sleep(60)\n"
    )

    def interrupt() -> None:
        while not (tmp_path / "pids").exists() or "\n" not in (tmp_path / "pids").read_text():
            time.sleep(0.05)
        time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt).start()
    settings = settings_for(questions, "ask_first", launcher=launcher)
    with interruptible(), pytest.raises(KeyboardInterrupt):
        run_in_process_of_its_own(model, settings, tmp_path / "out", questions, None)
    for pid in map(int, (tmp_path / "pids").read_text().split()):
        _wait_until_gone(pid)


def _wait_until_gone(pid: int) -> None:
    """A killed process may be a zombie for as long as nobody asks for its status."""
    for _ in range(100):
        status = Path(f"/proc/{pid}/stat")
        try:
            if status.read_text().rpartition(")")[2].split()[0] == "Z":
                return
        except OSError:
            return
        time.sleep(0.05)
    raise AssertionError(f"process {pid} still runs")


def test_what_lm_eval_leaves_running_is_ended(
    script: Callable[[str], str], model: Path, questions: Path, tmp_path: Path
) -> None:
    """A process that outlives lm-eval's would keep the memory that the next model needs."""
    launcher = script(
        "import subprocess, sys\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        f"open({str(tmp_path / 'pid')!r}, 'w').write(str(child.pid))\n"
    )
    with pytest.raises(EvaluationError):
        run_in_process_of_its_own(
            model, settings_for(questions, "ask_first", launcher=launcher), tmp_path / "out", questions, None
        )
    _wait_until_gone(int((tmp_path / "pid").read_text()))


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("print('a'); raise ValueError('the reason')", "ValueError: the reason"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "it was ended by SIGKILL"),
        ("print('no results here')", "no results here"),
        ("raise SystemExit(3)", "it left no results"),
    ],
)
def test_failure_is_one_line_and_a_log(
    code: str, message: str, script: Callable[[str], str], model: Path, questions: Path, tmp_path: Path
) -> None:
    """The last error that was printed, what ended the process, or its last word; and where all of it is."""
    settings = settings_for(questions, "ask_first", launcher=script(code))
    with pytest.raises(EvaluationError) as caught:
        run_in_process_of_its_own(model, settings, tmp_path / "out", questions, None)
    assert caught.value.message == f"lm-eval failed on {model}: {message}"
    assert str(tmp_path / "out" / "lm_eval.log") in caught.value.hint


def test_a_launchers_own_error_is_not_the_reason() -> None:
    """Launchers end in an error that says only that a process failed: the one before it tells why."""
    printed = (
        "[rank0]: Traceback (most recent call last):\n"
        "[rank0]: torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB\n"
        "Traceback (most recent call last):\n"
        "RuntimeError: Engine core initialization failed. See root cause above.\n"
        "torch.distributed.elastic.multiprocessing.errors.ChildFailedError: \n"
        "============================================================\n"
    )
    assert _last_error(printed, 1) == "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB"
