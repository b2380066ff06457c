"""A model that can be calibrated on text and evaluated, with everything the bundled one has."""

from __future__ import annotations

import json
import os
import runpy
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="session")
def speaker(checkpoint_of: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle: a model that has a tokenizer, calibration text, and tasks under the bundled group's name."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("bundle")
    alphabet = ["<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    shutil.copytree(checkpoint_of("qwen3_moe", vocab_size=len(alphabet)), folder / "model")
    tokenizer = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    named = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>")  # noqa: S106
    named.save_pretrained(folder / "model")
    rows = [{"text": f"{number} + 1 = {number + 1}", "domain": "sums"} for number in range(40)]
    (folder / "calibration.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    _write_tasks(folder / "tasks")
    return folder


def _write_tasks(folder: Path) -> None:
    folder.mkdir()
    rows = [{"q": f"{number} + 1 =", "choices": ["ab", "cd"], "label": number % 2} for number in range(20)]
    (folder / "docs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name in ("tiny_one", "tiny_two"):
        (folder / f"{name}.yaml").write_text(
            f"task: {name}\ntest_split: test\ndataset_path: json\n"
            "dataset_kwargs: {data_files: {test: docs.jsonl}}\n"
            'output_type: multiple_choice\ndoc_to_text: "{{q}}"\ndoc_to_choice: "{{choices}}"\ndoc_to_target: label\n'
            "metric_list:\n  - {metric: acc, aggregation: mean, higher_is_better: true}\nmetadata: {version: 1.0}\n"
        )
    (folder / "tiny.yaml").write_text("group: tiny\ntask: [tiny_one, tiny_two]\n")


@pytest.fixture
def hub() -> Iterator[Any]:
    """A Hub on this machine, see loopback_hub.py."""
    made = runpy.run_path(str(Path(__file__).with_name("loopback_hub.py")))["LoopbackHub"]()
    with made.running():
        yield made


@pytest.fixture
def hub_environment(hub: Any, tmp_path: Path) -> dict[str, str]:
    """Environment of a process that asks that Hub and no other, with nothing in its cache."""
    others = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    return others | {
        "HF_ENDPOINT": hub.endpoint,
        "HF_HOME": str(tmp_path / "hf"),
        "HF_HUB_OFFLINE": "0",
        "HF_DATASETS_OFFLINE": "0",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_XET": "1",
        "HF_TOKEN": hub.token,
    }


@pytest.fixture(scope="session")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tasks: two of choices, which the group `ask_both` scores as one, and one whose answers are written."""
    folder = tmp_path_factory.mktemp("questions")
    rows = [{"q": f"{number} + 1 =", "choices": ["ab", "cd", "efg"], "label": number % 3} for number in range(12)]
    (folder / "docs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shared = "dataset_path: json\ndataset_kwargs: {data_files: {test: docs.jsonl, dev: docs.jsonl}}\ntest_split: test\n"
    shared += 'fewshot_split: dev\ndoc_to_text: "{{q}}"\nmetadata: {version: 1.0}\n'
    choice = 'output_type: multiple_choice\ndoc_to_choice: "{{choices}}"\ndoc_to_target: label\n'
    choice += "metric_list:\n  - {metric: acc, aggregation: mean, higher_is_better: true}\n"
    for name in ("ask_first", "ask_second"):
        (folder / f"{name}.yaml").write_text(f"task: {name}\n{shared}{choice}")
    write = 'output_type: generate_until\ndoc_to_target: "{{label}}"\n'
    write += 'generation_kwargs: {until: [";"], max_gen_toks: 6}\n'
    write += "metric_list:\n  - {metric: exact_match, aggregation: mean, higher_is_better: true}\n"
    (folder / "ask_write.yaml").write_text(f"task: ask_write\n{shared}{write}")
    whole = "aggregate_metric_list:\n  - {metric: acc, weight_by_size: true}\n"
    (folder / "ask_both.yaml").write_text(f"group: ask_both\ntask: [ask_first, ask_second]\n{whole}")
    return folder
