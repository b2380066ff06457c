"""Small real checkpoints of every architecture, built on disk the way the public ones are laid out."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, settings

from moeprune import _files

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from moeprune.plans import PruningPlan

# No test may reach for the network, whatever the machine's settings.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"

# A busy machine must not fail a property test.
settings.register_profile("suite", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("suite")

FIXTURES = Path(__file__).parent / "fixtures"


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Results that tests keep are kept in a folder of this run."""
    os.environ["MOEPRUNE_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(autouse=True)
def heard() -> Iterator[None]:
    """What a command was told about being quiet ends with its test."""
    yield
    _files.quiet.set(False)


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
_DSA: dict[str, Any] = {"index_topk": 16, "index_head_dim": 16, "index_n_heads": 2}
_LINEAR: dict[str, Any] = {  # one layer of linear attention, one of full attention
    "num_hidden_layers": 2,
    "layer_types": ["linear_attention", "full_attention"],
    "head_dim": 8,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
_QWEN_NEXT: dict[str, Any] = _SPARSE | _LINEAR | {"num_experts": 12, "shared_expert_intermediate_size": 16}
TINY: dict[str, dict[str, Any]] = {
    "qwen3_moe": _SPARSE | {"num_experts": 16, "head_dim": 8, "mlp_only_layers": [1]},
    "qwen2_moe": _SPARSE | {"num_experts": 12, "shared_expert_intermediate_size": 16},
    "olmoe": {"num_experts": 12, "num_experts_per_tok": 3},
    "mixtral": {"num_local_experts": 8, "num_experts_per_tok": 2, "head_dim": 8},
    "glm4_moe": _SPARSE | _DEEPSEEK | {"n_group": 1, "topk_group": 1, "head_dim": 8},
    "glm4_moe_lite": _SPARSE | _DEEPSEEK | _MLA | {"n_group": 1, "topk_group": 1},
    "glm_moe_dsa": _SPARSE | _DEEPSEEK | _MLA | _DSA | {"n_group": 1, "topk_group": 1},
    "deepseek_v3": _SPARSE | _DEEPSEEK | _MLA,
    "deepseek_v32": _SPARSE | _DEEPSEEK | _MLA | _DSA,
    "kimi_k2": _SPARSE | _DEEPSEEK | _MLA | {"n_group": 1, "topk_group": 1, "num_nextn_predict_layers": 0},
    "qwen3_next": _QWEN_NEXT,
    "qwen3_5_moe": _QWEN_NEXT | {"mtp_num_hidden_layers": 1},
    "qwen3_5_moe_text": _QWEN_NEXT | {"mtp_num_hidden_layers": 1},
    "minimax_m2": {"num_local_experts": 12, "num_experts_per_tok": 3, "head_dim": 8, "num_mtp_modules": 0},
    "gpt_oss": {"num_local_experts": 12, "num_experts_per_tok": 3, "head_dim": 8},
    "ernie4_5_moe": {
        "moe_num_experts": 12,
        "moe_k": 3,
        "moe_intermediate_size": 16,
        "moe_num_shared_experts": 1,
        "num_nextn_predict_layers": 1,
    },
}
# What public config files have and transformers does not write, or writes under another name.
_ON_HUB = {"qwen3_moe": {"num_experts": 16}, "qwen2_moe": {"num_experts": 12}, "olmoe": {"num_experts": 12}}


# What transformers knows by another name: the class that has the same layers.
_BUILT_AS = {"kimi_k2": "deepseek_v3", "qwen3_5_moe": "qwen3_5_moe_text"}
_ROUTERS = re.compile(r"(gate|router)\.(weight|bias)$|e_score_correction_bias")
Tensors = dict[str, "torch.Tensor"]


def build_checkpoint(model_type: str, folder: Path, *, stacked: bool = False, **changes: Any) -> Path:
    """Write a random checkpoint of several shards, laid out as the public ones, MTP layers included.

    Args:
        model_type: a key of the table.
        folder: where to.
        stacked: write all experts of a layer as one tensor where the architecture's public files do not.
        changes: config values.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(7)
    values = _COMMON | TINY[model_type] | changes
    config = AutoConfig.for_model(_BUILT_AS.get(model_type, model_type), **values)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if _ROUTERS.search(name):
                tensor.normal_(0, 0.5)
    for name, tensor in model.named_buffers():  # as in the public checkpoints, whatever the dtype of the rest
        if "e_score_correction_bias" in name:
            tensor.data = tensor.float()
    model.save_pretrained(folder, max_shard_size="60KB")
    _rewrite_tensors(folder, lambda tensors: _hub_style_tensors(tensors, model_type, values, stacked=stacked))
    _hub_style_config(folder, model_type, values)
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
    for key in ("num_nextn_predict_layers", "mtp_num_hidden_layers", "num_mtp_modules"):
        if key in values:
            config[key] = values[key]
    if model_type == "qwen3_5_moe":
        vision = {"model_type": "qwen3_5_moe_vision", "depth": 1, "hidden_size": 16, "num_heads": 2}
        outer = {"architectures": ["Qwen3_5MoeForConditionalGeneration"], "tie_word_embeddings": False}
        config = outer | {"text_config": config | {"model_type": "qwen3_5_moe_text"}, "vision_config": vision}
    config["model_type"] = model_type
    (folder / "config.json").write_text(json.dumps(config, indent=4) + "\n\n")


def _rewrite_tensors(folder: Path, change: Callable[[Tensors], Tensors]) -> None:
    """Load all tensors, change them and write them again: what is new, such as MTP layers, goes to its own shard."""
    from safetensors.torch import load_file, save_file

    index = json.loads((folder / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    homes = {name: file for file in files for name in load_file(folder / file)}
    tensors = change({name: tensor for file in files for name, tensor in load_file(folder / file).items()})
    index["weight_map"] = {name: homes.get(name, "mtp.safetensors") for name in tensors}
    for file in files:
        (folder / file).unlink()
    for file in set(index["weight_map"].values()):
        own = {name: tensor.contiguous() for name, tensor in tensors.items() if index["weight_map"][name] == file}
        save_file(own, folder / file, metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _hub_style_tensors(tensors: Tensors, model_type: str, values: dict[str, Any], *, stacked: bool) -> Tensors:
    import torch

    depth = int(values["num_hidden_layers"])
    last = f"model.layers.{depth - 1}."
    if model_type in {"qwen3_next", "qwen3_5_moe", "qwen3_5_moe_text"}:
        tensors |= _mtp_layer(tensors, last, "mtp.layers.0.")
        names = ("norm", "pre_fc_norm_hidden", "pre_fc_norm_embedding")
        tensors |= {f"mtp.{name}.weight": torch.randn(32) for name in names}
        tensors["mtp.fc.weight"] = torch.randn(32, 64)
    elif model_type == "ernie4_5_moe":  # a dense layer
        tensors |= _mtp_layer(tensors, "model.layers.0.", "model.mtp_block.0.")
        tensors["model.mtp_linear_proj.0.weight"] = torch.randn(32, 64)
    elif values.get("num_nextn_predict_layers"):
        tensors |= _mtp_layer(tensors, last, f"model.layers.{depth}.")
        names = ("enorm", "hnorm", "shared_head.norm")
        tensors |= {f"model.layers.{depth}.{name}.weight": torch.randn(32) for name in names}
        tensors[f"model.layers.{depth}.eh_proj.weight"] = torch.randn(32, 64)
    if stacked or model_type == "qwen3_5_moe":
        tensors = stack_experts(tensors)
    if model_type == "qwen3_5_moe":
        tensors = {name.replace("model.", "model.language_model.", 1): tensor for name, tensor in tensors.items()}
        tensors["model.visual.blocks.0.mlp.linear_fc1.weight"] = torch.randn(16, 16)
    return tensors


def _mtp_layer(tensors: Tensors, source: str, target: str) -> Tensors:
    """A decoder layer under another name, with other values."""
    return {name.replace(source, target): tensor + 1 for name, tensor in tensors.items() if name.startswith(source)}


def stack_experts(tensors: Tensors) -> Tensors:
    """The experts of each layer as one tensor of gates above ups, and one of downs."""
    import torch

    stacks: dict[str, dict[int, dict[str, torch.Tensor]]] = {}
    result = {}
    for name, tensor in tensors.items():
        match = re.fullmatch(r"(.+\.experts\.)(\d+)\.(\w+)\.weight", name)
        if match is None:
            result[name] = tensor
        else:
            stacks.setdefault(match[1], {}).setdefault(int(match[2]), {})[match[3]] = tensor
    for prefix, experts in stacks.items():
        gate, up, down = ("w1", "w3", "w2") if "w1" in experts[0] else ("gate_proj", "up_proj", "down_proj")
        ordered = [experts[number] for number in range(len(experts))]
        result[f"{prefix}gate_up_proj"] = torch.stack([torch.cat([own[gate], own[up]]) for own in ordered])
        result[f"{prefix}down_proj"] = torch.stack([own[down] for own in ordered])
    return result


def loadable(folder: Path) -> Path:
    """The checkpoint, or for an architecture that transformers does not know a copy under the name of its like."""
    config = json.loads((folder / "config.json").read_text())
    if config["model_type"] != "kimi_k2":
        return folder
    renamed = folder.with_name(f"{folder.name}-renamed")
    if not renamed.exists():
        shutil.copytree(folder, renamed)
        (renamed / "config.json").write_text(json.dumps(config | {"model_type": "deepseek_v3"}))
    return renamed


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
        folder = loadable(checkpoint_of(model_type, **changes))
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


@pytest.fixture(name="loadable", scope="session")
def loadable_fixture() -> Callable[[Path], Path]:
    """:func:`loadable`, for tests that cannot import this file."""
    return loadable


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
