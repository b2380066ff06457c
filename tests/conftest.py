"""Small real checkpoints of every architecture, built on disk the way the public ones are laid out."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, settings

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from moeprune.plans import PruningPlan

# No test may reach for the network, whatever the machine's settings.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"

# A busy machine must not fail a property test.
settings.register_profile("suite", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("suite")

FIXTURES = Path(__file__).parent / "fixtures"

_COMMON: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
    "initializer_range": 0.3,
}
_SPARSE: dict[str, Any] = {"moe_intermediate_size": 16, "num_experts_per_tok": 3, "norm_topk_prob": True}
_DEEPSEEK: dict[str, Any] = {
    "n_routed_experts": 16,
    "n_shared_experts": 1,
    "n_group": 4,
    "topk_group": 2,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 1.8,
    "num_nextn_predict_layers": 1,
}
_MLA: dict[str, Any] = {
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}
TINY: dict[str, dict[str, Any]] = {
    "qwen3_moe": _SPARSE | {"num_experts": 16, "head_dim": 8, "mlp_only_layers": [1]},
    "qwen2_moe": _SPARSE | {"num_experts": 12, "shared_expert_intermediate_size": 16},
    "olmoe": {"num_experts": 12, "num_experts_per_tok": 3},
    "mixtral": {"num_local_experts": 8, "num_experts_per_tok": 2, "head_dim": 8},
    "glm4_moe": _SPARSE | _DEEPSEEK | {"n_group": 1, "topk_group": 1, "head_dim": 8},
    "glm4_moe_lite": _SPARSE | _DEEPSEEK | _MLA | {"n_group": 1, "topk_group": 1},
    "deepseek_v3": _SPARSE | _DEEPSEEK | _MLA,
}
# What public config files have and transformers does not write, or writes under another name.
_ON_HUB = {"qwen3_moe": {"num_experts": 16}, "qwen2_moe": {"num_experts": 12}, "olmoe": {"num_experts": 12}}


def build_checkpoint(model_type: str, folder: Path, **changes: Any) -> Path:
    """Write a random checkpoint of several shards, with MTP layers where the public checkpoints have them."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(7)
    values = _COMMON | TINY[model_type] | changes
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **values))
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if "gate.weight" in name or "e_score_correction_bias" in name:
                tensor.normal_(0, 0.5)
    for name, tensor in model.named_buffers():  # as in the public checkpoints, whatever the dtype of the rest
        if "e_score_correction_bias" in name:
            tensor.data = tensor.float()
    model.save_pretrained(folder, max_shard_size="60KB")
    _hub_style_config(folder, model_type, values)
    if values.get("num_nextn_predict_layers"):
        _add_mtp_layer(folder, int(values["num_hidden_layers"]))
    (folder / "LICENSE").write_text("a licence\n")
    (folder / "tokenizer_config.json").write_text('{"model_max_length": 128}\n')
    return folder


def _hub_style_config(folder: Path, model_type: str, values: dict[str, Any]) -> None:
    config = json.loads((folder / "config.json").read_text())
    if model_type in _ON_HUB:
        config.pop("num_local_experts", None)
        config |= {"num_experts": values["num_experts"]}
    config |= {"rope_theta": 10000.0, "torch_dtype": values.get("dtype", "float32")}
    config["a_key_nobody_knows"] = [1, 2.50, "x"]
    if "num_nextn_predict_layers" in values:
        config["num_nextn_predict_layers"] = values["num_nextn_predict_layers"]
    (folder / "config.json").write_text(json.dumps(config, indent=4) + "\n\n")


def _add_mtp_layer(folder: Path, depth: int) -> None:
    """Append layer ``depth``: the last decoder layer under a new number, with the tensors that only MTP layers have."""
    import torch
    from safetensors.torch import load_file, save_file

    index = json.loads((folder / "model.safetensors.index.json").read_text())
    prefix = f"model.layers.{depth - 1}."
    extra = {}
    for file in sorted(set(index["weight_map"].values())):
        for name, tensor in load_file(folder / file).items():
            if name.startswith(prefix):
                extra[name.replace(prefix, f"model.layers.{depth}.")] = tensor + 1
    for name in ("enorm.weight", "hnorm.weight", "shared_head.norm.weight", "eh_proj.weight"):
        extra[f"model.layers.{depth}.{name}"] = torch.randn(32)
    save_file(extra, folder / "mtp.safetensors", metadata={"format": "pt"})
    index["weight_map"] |= dict.fromkeys(extra, "mtp.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.fixture(scope="session")
def checkpoint_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A random checkpoint of an architecture, with changes to its config, built once per session; read-only."""
    built: dict[str, Path] = {}

    def build(model_type: str, **changes: Any) -> Path:
        key = f"{model_type} {sorted(changes.items())}"
        if key not in built:
            built[key] = build_checkpoint(model_type, tmp_path_factory.mktemp(model_type) / "base", **changes)
        return built[key]

    return build


@pytest.fixture(scope="session")
def model_of(checkpoint_of: Callable[..., Path]) -> Callable[..., PreTrainedModel]:
    """The model of :func:`checkpoint_of`, loaded once per session; treat it as read-only."""
    loaded: dict[Path, PreTrainedModel] = {}

    def load(model_type: str, **changes: Any) -> PreTrainedModel:
        folder = checkpoint_of(model_type, **changes)
        if folder not in loaded:
            from transformers import AutoModelForCausalLM

            loaded[folder] = AutoModelForCausalLM.from_pretrained(folder).eval()
        return loaded[folder]

    return load


def plan_by_hand(folder: Path, kept: int, *, seed: int = 0, mtp: bool = True) -> PruningPlan:
    """Keep-lists drawn for every layer on its own, with equal counts per group, bound to the checkpoint."""
    import numpy as np

    from moeprune.checkpoint import open_checkpoint
    from moeprune.plans import LayerPlan, PruningPlan

    checkpoint = open_checkpoint(folder)
    rng = np.random.default_rng(seed)
    blocks = np.arange(checkpoint.num_experts).reshape(checkpoint.n_group, -1)

    def keep() -> tuple[int, ...]:
        chosen = [rng.permutation(block)[: kept // checkpoint.n_group] for block in blocks]
        return tuple(int(expert) for expert in np.sort(np.concatenate(chosen)))

    layers = checkpoint.all_moe_layers if mtp else checkpoint.moe_layers
    return PruningPlan(
        layers={layer: LayerPlan(keep=keep()) for layer in layers},
        config_edits={},
        command={"stage": "by hand"},
        inputs={"model": checkpoint.fingerprint},
    )


@pytest.fixture(name="plan_by_hand", scope="session")
def plan_by_hand_fixture() -> Callable[..., PruningPlan]:
    """:func:`plan_by_hand`, for tests that cannot import this file."""
    return plan_by_hand


@pytest.fixture
def ids_file(tmp_path: Path) -> Path:
    """Calibration rows of token ids in two domains, of different lengths."""
    import numpy as np

    rng = np.random.default_rng(3)
    rows = [
        {"input_ids": rng.integers(0, 97, int(length)).tolist(), "domain": ("prose", "code")[number % 2]}
        for number, length in enumerate(rng.integers(8, 40, 24))
    ]
    path = tmp_path / "calibration.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
