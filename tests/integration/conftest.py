"""A model that can be calibrated on text and evaluated, with everything the bundled one has."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

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
