"""Names of single experts in a config: renumbered, taken out, left alone or refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from moeprune.checkpoint import Checkpoint, open_checkpoint
from moeprune.errors import LayoutError
from moeprune.rewrite.naming import renumber_names

KEEP = {0: (1, 3), 1: (0, 2)}
EXPERT = "model.layers.0.mlp.experts"


def checkpoint_of(folder: Path, model_type: str = "qwen3_moe", prefix: str = "model.layers.") -> Checkpoint:
    """Two decoder layers of four experts; with Qwen3-Next's names an MTP layer too."""
    folder.mkdir()
    layers = [f"{prefix}0.", f"{prefix}1."] + (["mtp.layers.0."] if model_type == "qwen3_next" else [])
    tensors = {f"{layer}mlp.gate.weight": np.zeros((4, 2), np.float32) for layer in layers}
    for layer in layers:
        tensors |= {f"{layer}mlp.experts.{expert}.up_proj.weight": np.zeros(2, np.float32) for expert in range(4)}
    save_file(tensors, folder / "model.safetensors")
    config = {"model_type": model_type, "num_hidden_layers": 2, "num_experts": 4, "num_experts_per_tok": 1}
    (folder / "config.json").write_text(json.dumps(config))
    return open_checkpoint(folder)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    """A Qwen3-MoE."""
    return checkpoint_of(tmp_path / "base")


def renamed(names: Any, checkpoint: Checkpoint, keep: dict[int, tuple[int, ...]] = KEEP) -> Any:
    """A list of names, or an object, after renumbering."""
    text = json.dumps({"quantization_config": names})
    return json.loads(renumber_names(text, checkpoint, keep, "config.json"))["quantization_config"]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (f"{EXPERT}.1.up_proj", f"{EXPERT}.0.up_proj"),
        (f"{EXPERT}.3", f"{EXPERT}.1"),
        (f"{EXPERT}.2.up_proj", None),
        (f"{EXPERT}.17.up_proj", None),
        ("model.layers.1.mlp.experts.2.up_proj.weight", "model.layers.1.mlp.experts.1.up_proj.weight"),
        (f"{EXPERT}.1.*", f"{EXPERT}.0.*"),
        (r"re:model\.layers\.0\.mlp\.experts\.3\.up_proj$", r"re:model\.layers\.0\.mlp\.experts\.1\.up_proj$"),
        (r"-:^model\.layers\.0\.mlp\.experts\.3\..*", r"-:^model\.layers\.0\.mlp\.experts\.1\..*"),
        (r"+:model.layers.0.mlp.experts.1$", r"+:model.layers.0.mlp.experts.0$"),
        (r"-:model\.layers\.0\.mlp\.experts\.2\..*", None),
    ],
)
def test_names_of_single_experts_follow_them(name: str, expected: str | None, checkpoint: Checkpoint) -> None:
    """As item of a list and as key: the new number where the expert stays, nothing where it goes."""
    assert renamed(["lm_head", name, "z"], checkpoint) == ["lm_head", *([expected] if expected else []), "z"]
    assert renamed({name: {"bits": 8}}, checkpoint) == ({expected: {"bits": 8}} if expected else {})


@pytest.mark.parametrize(
    "name",
    [
        "lm_head",
        "model.layers.0.mlp.gate",
        "model.layers.0.mlp.shared_experts.1.up_proj",
        f"{EXPERT}",
        f"{EXPERT}*",
        f"{EXPERT}.*",
        f"{EXPERT}.gate_up_proj",
        "re:.*mlp.experts.*",
        r"re:.*\.mlp\.experts\.\d+\.down_proj",
        r"re:.*mlp\.experts\.[0-9]+\.down_proj",
        r"re:.*mlp\.experts\..*\.down_proj",
        "re:.*shared_expert.*",
        "num_experts_per_tok",
        "model.layers.7.mlp.experts.1.up_proj",
    ],
)
def test_names_of_all_experts_and_of_none_stay(name: str, checkpoint: Checkpoint) -> None:
    """A pattern that holds for every expert holds for those that stay."""
    assert renamed([name], checkpoint) == [name]


@pytest.mark.parametrize(
    "name",
    [
        r"re:.*mlp\.experts\.(1|2)\.down_proj",
        r"re:.*mlp\.experts\.[0-3]\..*",
        r"re:.*mlp\.experts\.\d\.up_proj",
        r"re:.*\.experts\.3\..*",
        "model.layers.*.mlp.experts.3.up_proj",
        f"{EXPERT}.1*",
        f"{EXPERT}.1?",
        r"-:model\.layers\.0\.mlp\.experts\.1",  # means expert 10 too
        "language_model.model.layers.0.mlp.experts.1.up_proj",
    ],
)
def test_patterns_that_mean_some_experts_are_refused(name: str, checkpoint: Checkpoint) -> None:
    """They would mean others once the experts have new numbers, and each layer has its own."""
    with pytest.raises(LayoutError, match=r"config\.json singles out experts by the pattern"):
        renamed([name], checkpoint)


def test_mtp_layers_are_renumbered_by_their_own_list(tmp_path: Path) -> None:
    """A name at the top level means the MTP layer; one of a dropped MTP layer goes."""
    checkpoint = checkpoint_of(tmp_path / "base", "qwen3_next")
    names = ["mtp.layers.0.mlp.experts.3.up_proj", "model.layers.0.mlp.experts.3.up_proj", "mtp.fc"]
    expected = ["mtp.layers.0.mlp.experts.0.up_proj", "model.layers.0.mlp.experts.1.up_proj", "mtp.fc"]
    assert renamed(names, checkpoint, KEEP | {2: (3, 1)}) == expected
    assert renamed(names, checkpoint) == expected[1:]
