"""The architectures table against what transformers itself says of the same architectures."""

from __future__ import annotations

import re
from typing import Any

import pytest
from transformers import AutoConfig
from transformers.conversion_mapping import get_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming

from moeprune.architectures import ARCHITECTURES, ExpertName, StackedName

# What transformers calls it where it has no class, or no names on disk, under the table's key.
KNOWN_AS = {"kimi_k2": "deepseek_v3", "qwen3_5_moe": "qwen3_5_moe_text"}
STACKED_ON_DISK = {"gpt_oss"}  # its tensors are loaded as they are
EVERY = pytest.mark.parametrize("model_type", ARCHITECTURES)


def mapping(model_type: str) -> list[Any]:
    """How transformers turns the tensors on disk into those of the model."""
    return get_checkpoint_conversion_mapping(KNOWN_AS.get(model_type, model_type)) or []


def parts(model_type: str) -> list[tuple[str, str]]:
    """What stands before and after the expert's number on disk, for each tensor that transformers stacks."""
    converters = [item for item in mapping(model_type) if isinstance(item, WeightConverter)]
    patterns = [text for item in converters for text in item.source_patterns]
    return [(before, after) for before, star, after in (text.partition("*.") for text in patterns) if star]


@EVERY
def test_transformers_stacks_exactly_what_the_table_calls_an_expert(model_type: str) -> None:
    """Every tensor that transformers stacks over experts is one of the table's, prefix and number included."""
    spec = ARCHITECTURES[model_type]
    found = parts(model_type)
    assert len(found) == (0 if model_type in STACKED_ON_DISK else 3)  # gate, up and down
    for before, after in found:
        assert f".{spec.experts}".endswith(f".{before.lstrip('.')}")
        layer = f"{spec.layers[0]}2."
        role = spec.role(f"{layer}{spec.experts}5.{after}", 4)
        assert role == ExpertName(layer=2, expert=5, before=f"{layer}{spec.experts}", after=after)


@EVERY
def test_what_transformers_stacks_into_is_stacked_in_the_table(model_type: str) -> None:
    """A file that is stacked already holds the names of the model, and the table takes them too."""
    spec = ARCHITECTURES[model_type]
    targets = [
        text for item in mapping(model_type) if isinstance(item, WeightConverter) for text in item.target_patterns
    ]
    names = {text.rpartition("experts.")[2] for text in targets} or {"gate_up_proj", "down_proj"}
    assert names == set(spec.stacked)
    for name in names:
        part = f"{spec.experts}{name}"
        assert spec.role(f"{spec.layers[0]}2.{part}", 4) == StackedName(layer=2, part=part)


@EVERY
def test_the_model_has_the_tables_tensors(model_type: str) -> None:
    """The model that transformers builds has the routers and the experts of the table, under the renamings it knows."""
    import torch
    from transformers import AutoModelForCausalLM

    spec, config = ARCHITECTURES[model_type], AutoConfig.for_model(KNOWN_AS.get(model_type, model_type))
    config.num_hidden_layers = 4
    for key in ("layer_types", "mlp_layer_types", "indexer_types"):
        if isinstance(getattr(config, key, None), list):
            setattr(config, key, getattr(config, key)[:4])
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    state = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    renamings = [item for item in mapping(model_type) if type(item) is WeightRenaming]
    experts = getattr(config, spec.count_keys[0])
    for part, axis in {**spec.router, **{f"{spec.experts}{name}": 0 for name in spec.stacked}}.items():
        name = f".{part}"
        for item in reversed(renamings):  # the special ones come after the general
            for source, target in zip(item.source_patterns, item.target_patterns, strict=True):
                name = re.sub(source, target, name)
        found = [shape for own, shape in state.items() if own.endswith(name)]
        assert found, name
        assert all(shape[axis] == experts for shape in found)


@EVERY
def test_renamed_blocks_have_their_name_on_disk_in_the_table(model_type: str) -> None:
    """Where transformers renames the block that holds the experts, the table has the name on disk."""
    spec = ARCHITECTURES[model_type]
    renamings = [item for item in mapping(model_type) if type(item) is WeightRenaming]
    for item in renamings:
        for text in item.source_patterns:
            assert any(re.search(text, f".{name}") for name in (spec.experts, *spec.router)), text


@EVERY
def test_the_config_has_the_keys(model_type: str) -> None:
    """Counts, top-k, groups and everything that decides which layers are sparse are keys that transformers knows."""
    spec, config = ARCHITECTURES[model_type], AutoConfig.for_model(KNOWN_AS.get(model_type, model_type))
    assert any(hasattr(config, key) for key in spec.count_keys)
    for key in (spec.top_k_key, *spec.group_keys):
        assert isinstance(getattr(config, key), int)


def test_nested_configs_are_nested_in_transformers_too() -> None:
    """The section of the table is a part of the config class."""
    nested = {name: spec.section for name, spec in ARCHITECTURES.items() if spec.section}
    assert nested == {"qwen3_5_moe": "text_config"}
    for name, section in nested.items():
        assert AutoConfig.for_model(name).sub_configs_defaults[section].model_type == KNOWN_AS[name]
