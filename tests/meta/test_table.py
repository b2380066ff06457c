"""The architectures table against what transformers itself says of the same architectures."""

from __future__ import annotations

import re

import pytest
from transformers import AutoConfig
from transformers.conversion_mapping import get_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming

from moeprune.architectures import ARCHITECTURES, ExpertName


def parts(model_type: str) -> list[tuple[str, str]]:
    """What stands before and after the expert's number on disk, for each tensor that transformers stacks."""
    mapping = get_checkpoint_conversion_mapping(model_type)
    patterns = [text for item in mapping if isinstance(item, WeightConverter) for text in item.source_patterns]
    return [(before, after) for before, star, after in (text.partition("*.") for text in patterns) if star]


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_transformers_stacks_exactly_what_the_table_calls_an_expert(model_type: str) -> None:
    """Every tensor that transformers stacks over experts is one of the table's, prefix and number included."""
    spec = ARCHITECTURES[model_type]
    found = parts(model_type)
    assert len(found) == 3  # gate, up and down
    for before, after in found:
        assert f".{spec.experts}".endswith(f".{before.lstrip('.')}")
        role = spec.role(f"model.layers.2.{spec.experts}5.{after}")
        assert role == ExpertName(layer=2, expert=5, before=f"model.layers.2.{spec.experts}", after=after)


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_renamed_blocks_have_their_name_on_disk_in_the_table(model_type: str) -> None:
    """Where transformers renames the block that holds the experts, the table has the name on disk."""
    spec = ARCHITECTURES[model_type]
    renamings = [item for item in get_checkpoint_conversion_mapping(model_type) if isinstance(item, WeightRenaming)]
    for name in (spec.experts, *spec.router):
        assert all(re.search(text, f".{name}") for item in renamings for text in item.source_patterns)


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_the_config_has_the_keys(model_type: str) -> None:
    """Counts, top-k, groups and everything that decides which layers are sparse are keys that transformers knows."""
    spec, config = ARCHITECTURES[model_type], AutoConfig.for_model(model_type)
    assert any(hasattr(config, key) for key in spec.count_keys)
    for key in (spec.top_k_key, *spec.group_keys):
        assert isinstance(getattr(config, key), int)
