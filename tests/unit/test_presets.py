"""Presets, what they fill in, and the options that stand beside them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from moeprune import _cli_options as opt
from moeprune._options import eval_settings
from moeprune.errors import ConfigError, EvaluationError
from moeprune.evaluation import presets
from moeprune.evaluation.generation import DEFAULT_LIMIT, answer_limit
from moeprune.evaluation.presets import BUNDLED_TASKS, PRESETS, expand, presets_table
from moeprune.evaluation.settings import EvalSettings, context_length, launcher_command

DOCS = Path(__file__).parents[2] / "docs"


def expanded(*tasks: str, **options: Any) -> EvalSettings:
    """Settings after presets gave way to what they mean."""
    return expand(EvalSettings(tasks=tasks, **options))


def test_a_preset_becomes_its_tasks_beside_the_users() -> None:
    """Tasks stand in the order named, each once, and what the preset sets is set."""
    found = expanded("mine", "quick", "hellaswag", "mc")
    assert found.tasks[:6] == ("mine", *PRESETS["quick"].tasks, "arc_easy")
    assert set(found.tasks) == {"mine", *PRESETS["quick"].tasks, *PRESETS["mc"].tasks}
    assert len(set(found.tasks)) == len(found.tasks)


def test_a_preset_fills_in_what_nobody_set() -> None:
    """Chat, length of answers and thinking are the preset's."""
    found = expanded("reasoning")
    assert (found.chat, found.max_gen_toks) == (True, 32768)
    assert found.model_args == {"enable_thinking": True, "think_end_token": "</think>"}


def test_options_win_over_a_preset() -> None:
    """Whatever the user says holds, also where it says no."""
    args = {"think_end_token": "<end>"}
    found = expanded("reasoning", apply_chat_template=False, max_gen_toks=100, limit=3, model_args=args)
    assert (found.chat, found.max_gen_toks, found.limit) == (False, 100, 3)
    assert found.model_args == {"enable_thinking": True, "think_end_token": "<end>"}


def test_settings_without_a_preset_are_untouched() -> None:
    """Plain tasks leave everything as it was."""
    settings = EvalSettings(tasks=("arc_easy",))
    assert expand(settings) is settings


def test_smoke_brings_its_tasks() -> None:
    """The bundled tasks need no folder, take 200 questions, and do not mix with another folder."""
    found = expanded("smoke")
    assert (found.tasks, found.include_path, found.limit) == (("tiny",), BUNDLED_TASKS, 200)
    assert (BUNDLED_TASKS / "tiny.yaml").is_file()
    with pytest.raises(EvaluationError, match="one at a time"):
        expanded("smoke", include_path=Path("tasks"))


def test_presets_that_ask_differently_are_refused() -> None:
    """One run asks in one way: the error names the option that would settle it."""
    with pytest.raises(EvaluationError, match="--apply-chat-template"):
        expanded("mc", "reasoning")
    with pytest.raises(EvaluationError, match=r"differ in model-args \(evaluate them one at a time\)"):
        expanded("mc", "reasoning", apply_chat_template=True, max_gen_toks=10, limit=1)


def test_code_needs_a_word_of_consent() -> None:
    """Nothing that runs what models write is accepted without the option."""
    with pytest.raises(EvaluationError, match="--confirm-run-unsafe-code"):
        expanded("code")
    found = expanded("code", confirm_run_unsafe_code=True)
    assert found.tasks == ("humaneval_plus", "mbpp_plus")


@pytest.mark.parametrize(("preset", "extra"), [("math", "math"), ("instruct", "ifeval")])
def test_a_missing_extra_is_a_pip_command(preset: str, extra: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What lm-eval needs for a preset and does not bring is named with the command that installs it."""
    monkeypatch.setattr(presets, "missing_modules", lambda names: names[:1])
    with pytest.raises(EvaluationError) as caught:
        eval_settings((preset,), {})
    assert caught.value.hint == f'pip install "lm_eval[{extra}]"'
    monkeypatch.setattr(presets, "missing_modules", lambda _: [])
    assert eval_settings((preset,), {}).chat


def test_the_reference_lists_the_presets() -> None:
    """The table in the reference is the one that the code makes, and the help names them all."""
    assert presets_table() in (DOCS / "reference.md").read_text(encoding="utf-8")
    [option] = opt.Tasks.__metadata__
    assert all(name in option.help for name in PRESETS)


def test_limit_of_an_answer() -> None:
    """The name that lm-eval looks at first wins, and its own default holds where there is none."""
    assert answer_limit({"max_new_tokens": 7, "max_gen_toks": 5}) == 5
    assert answer_limit({"max_tokens": "9", "max_gen_toks": None}) == 9
    assert answer_limit({"until": []}) == answer_limit(None) == DEFAULT_LIMIT


@pytest.mark.parametrize(
    ("arguments", "config", "expected"),
    [
        ({}, {"max_position_embeddings": 4096}, 4096),
        ({"max_model_len": 100}, {"max_position_embeddings": 4096}, 100),
        ({}, {"text_config": {"max_position_embeddings": 64}, "max_position_embeddings": 8}, 64),
        ({"max_length": "auto"}, {"text_config": "a", "n_ctx": 32}, 32),
        ({}, {}, None),
    ],
)
def test_context_length(arguments: dict[str, Any], config: dict[str, Any], expected: int | None) -> None:
    """Arguments come first, then the inner configuration, then the outer one."""
    assert context_length(EvalSettings(tasks=("a",), model_args=arguments), config) == expected


def test_launcher_is_found_beside_python() -> None:
    """A launcher need not be on the path of the shell, and one that is nowhere is refused."""
    python = Path(sys.executable)
    assert launcher_command(f"{python.name} -X 'a b'") == [str(python), "-X", "a b"]
    with pytest.raises(EvaluationError, match="no program 'no-such-launcher'"):
        launcher_command("no-such-launcher --processes 2")
    with pytest.raises(EvaluationError, match="no command"):
        launcher_command("python 'unfinished")


def test_model_arguments_are_typed() -> None:
    """Numbers and truth values are what they look like, as in lm-eval's own command."""
    found = opt.model_args_of("max_length=512,parallelize=True,fraction=0.5,revision=none,backend=causal")
    assert found == {"max_length": 512, "parallelize": True, "fraction": 0.5, "revision": None, "backend": "causal"}


def test_cache_options_exclude_each_other() -> None:
    """A place, none, or the usual one; never a place that is not used."""
    assert opt.cache_of(None, unused=False) is None
    assert opt.cache_of(None, unused=True) is False
    assert opt.cache_of(Path("there"), unused=False) == Path("there")
    with pytest.raises(ConfigError, match="--no-cache"):
        opt.cache_of(Path("there"), unused=True)
