"""Statistics from inside transformers' Trainer, against ``observe`` around the same rows."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import moeprune
from moeprune.collectors.distributed import process_group
from moeprune.errors import ConfigError
from moeprune.statistics import STATISTICS

if TYPE_CHECKING:
    from transformers import PreTrainedModel, Trainer, TrainerCallback

CheckpointOf = Callable[..., Path]
Row = dict[str, list[int]]


def rows_of(count: int, *, seed: int) -> list[Row]:
    """Rows of different lengths."""
    rng = np.random.default_rng(seed)
    return [{"input_ids": rng.integers(1, 97, int(length)).tolist()} for length in rng.integers(4, 12, count)]


TRAINING, EVALUATION = rows_of(8, seed=0), rows_of(6, seed=1)
TOKENS = sum(len(row["input_ids"]) for row in TRAINING)


def padded(rows: list[Row]) -> dict[str, Any]:
    """A batch with its mask, and labels that leave the padding out."""
    import torch

    ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(row["input_ids"]) for row in rows], batch_first=True)
    return {"input_ids": ids, "attention_mask": (ids > 0).long(), "labels": ids.masked_fill(ids == 0, -100)}


@pytest.fixture
def model(checkpoint_of: CheckpointOf) -> PreTrainedModel:
    """A model of its own for each test, with gradient checkpointing."""
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(checkpoint_of("qwen3_moe"))
    loaded.gradient_checkpointing_enable()
    return loaded


def trainer_of(model: PreTrainedModel, folder: Path, *callbacks: TrainerCallback, **options: Any) -> Trainer:
    """A Trainer whose optimizer changes nothing: two accumulated batches per step, evaluations before and between."""
    from transformers import PrinterCallback, Trainer, TrainingArguments

    arguments = TrainingArguments(
        str(folder / "training"),
        learning_rate=0.0,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        num_train_epochs=1,
        eval_strategy="steps",
        eval_steps=1,
        eval_on_start=True,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        **options,
    )
    trainer = Trainer(
        model,
        arguments,
        train_dataset=TRAINING,
        eval_dataset=EVALUATION,
        data_collator=padded,
        callbacks=list(callbacks),
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def watcher(path: Path) -> TrainerCallback:
    """A callback that notes how many tokens the file holds after each step."""
    from transformers import TrainerCallback

    class Watcher(TrainerCallback):
        def __init__(self) -> None:
            self.tokens: list[int] = []

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.tokens.append(moeprune.RouterStatistics.load(path).tokens if path.exists() else 0)

    return Watcher()


# --- one process ------------------------------------------------------------------------------------------------------


def test_training_tokens_count_once_and_evaluations_do_not(
    model: PreTrainedModel, checkpoint_of: CheckpointOf, tmp_path: Path
) -> None:
    """Accumulated, recomputed and evaluated in between, the file holds what ``observe`` sees of the training rows."""
    import torch

    path = tmp_path / "statistics.safetensors"
    seen = watcher(path)
    callback = moeprune.statistics_callback(path, every_steps=1, domain="tuning")
    implementation = model.get_experts_implementation()
    trainer_of(model, tmp_path, callback, seen).train()

    assert model.get_experts_implementation() == implementation
    with moeprune.observe(model.eval(), domain="tuning") as observation, torch.no_grad():
        for row in TRAINING:
            model(**padded([row]))
    found, expected = moeprune.RouterStatistics.load(path), observation.result()
    assert 0 < seen.tokens[0] < seen.tokens[1] == found.tokens == TOKENS
    for layer, arrays in expected.layers.items():
        for name, array in arrays.items():
            if STATISTICS[name].integer:
                np.testing.assert_array_equal(found.layers[layer][name], array)
            else:
                np.testing.assert_allclose(found.layers[layer][name], array, rtol=1e-5, atol=1e-5 * np.abs(array).max())
    assert 0 < found.first_half[0]["tokens"] < TOKENS
    assert (found.domains, found.top_k, found.inputs) == (("tuning",), 3, expected.inputs)
    assert found.command == {"stage": "observe", "optimizer_steps": 2}
    assert moeprune.plan(path, checkpoint_of("qwen3_moe"), ratio=0.5).kept == 8


def test_the_file_is_written_every_few_steps_and_at_the_end(model: PreTrainedModel, tmp_path: Path) -> None:
    """Three steps, written every second: after the second, and when training is over."""
    path = tmp_path / "statistics.safetensors"
    seen = watcher(path)
    callback = moeprune.statistics_callback(path, every_steps=2)
    trainer_of(model, tmp_path, callback, seen, max_steps=3).train()
    assert seen.tokens[0] == 0 < seen.tokens[1] == seen.tokens[2]
    assert moeprune.RouterStatistics.load(path).tokens > seen.tokens[2]
    assert moeprune.RouterStatistics.load(path).command["optimizer_steps"] == 3


def test_training_again_begins_anew(model: PreTrainedModel, tmp_path: Path) -> None:
    """Also after a training that broke off and left the model observed."""
    from transformers import TrainerCallback

    class Breaks(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            raise KeyError("broken")

    path = tmp_path / "statistics.safetensors"
    callback, breaks = moeprune.statistics_callback(path, every_steps=1), Breaks()
    trainer = trainer_of(model, tmp_path, callback, breaks)
    with pytest.raises(KeyError, match="broken"):
        trainer.train()
    assert 0 < moeprune.RouterStatistics.load(path).tokens < TOKENS
    trainer.remove_callback(breaks)
    for _ in range(2):
        trainer.train()
        assert moeprune.RouterStatistics.load(path).tokens == TOKENS


def test_what_the_callback_refuses(model: PreTrainedModel, tmp_path: Path) -> None:
    """A file that is there, a pace that cannot be, and copies of the model in threads of one process."""
    path = tmp_path / "statistics.safetensors"
    with pytest.raises(ConfigError, match="every_steps must be at least 1"):
        moeprune.statistics_callback(path, every_steps=0)
    path.touch()
    with pytest.raises(ConfigError, match="exists"):
        moeprune.statistics_callback(path, every_steps=1)
    callback = moeprune.statistics_callback(path, every_steps=1, overwrite=True)
    trainer = trainer_of(model, tmp_path, callback)
    trainer.args._n_gpu = 2
    with pytest.raises(ConfigError, match="DataParallel would run 2 copies"):
        callback.on_train_begin(trainer.args, trainer.state, trainer.control, model=model)


# --- several processes ------------------------------------------------------------------------------------------------


@pytest.fixture
def group() -> Iterator[None]:
    """A default group of this process alone, as a training script would have one of many."""
    import torch.distributed as dist

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("group")
def test_wrapped_models(model: PreTrainedModel) -> None:
    """The model inside of DistributedDataParallel is observed; copies in threads are refused."""
    import torch
    from torch.nn.parallel import DistributedDataParallel

    with moeprune.observe(DistributedDataParallel(model)) as observation:
        DistributedDataParallel(model)(**padded(TRAINING)).loss.backward()
    assert observation.result().tokens == TOKENS
    with (
        pytest.raises(ConfigError, match="DataParallel runs copies of the model"),
        moeprune.observe(torch.nn.DataParallel(model)),
    ):
        pass


@pytest.mark.usefixtures("group")
def test_a_group_of_the_script_is_joined_and_left_alone() -> None:
    """It is neither made nor destroyed here."""
    import torch.distributed as dist

    with process_group() as ranks:
        assert (ranks.rank, ranks.size) == (0, 1)
    assert dist.is_initialized()


SCRIPT = """
import sys
from pathlib import Path
from transformers import AutoModelForCausalLM
import test_callback as test

folder = Path(sys.argv[2])
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
callback = test.moeprune.statistics_callback(folder / "statistics.safetensors", every_steps=1, overwrite=True)
test.trainer_of(model, folder, callback).train()
"""


def test_processes_of_a_training_are_added_up(checkpoint_of: CheckpointOf, tmp_path: Path) -> None:
    """Two processes train on different rows of one epoch; the first writes the sums of both."""
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*launcher, str(script), str(checkpoint_of("qwen3_moe")), str(tmp_path)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parent)},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    found = moeprune.RouterStatistics.load(tmp_path / "statistics.safetensors")
    assert found.tokens == TOKENS
    assert found.layers[0]["count"].sum() == TOKENS * found.top_k
    assert found.command == {"stage": "observe", "optimizer_steps": 1}
