"""Checkpoints whose layers keep different numbers of experts: loaded by transformers alone, through a file beside them.

The counts stand in the config under ``per_layer_config``, transformers' own key for models whose layers differ. No
released class of these architectures builds its layers by it, so a small modeling file goes with the weights: it builds
the architecture's own class and then each layer anew by that layer's config. Without ``trust_remote_code`` the load
ends in an error, because the largest count does not fit the smaller layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moeprune.architectures import RENAMED_PREFIX
from moeprune.checkpoint import Checkpoint
from moeprune.errors import PlanError
from moeprune.rewrite.raw_config import add_to_json

MODELING = "modeling_moeprune.py"
_AUTO_MAP = "auto_map"  # the config's key of remote code
_TEMPLATE = '''\
"""{model_type} whose layers have different numbers of experts; written by moeprune."""

from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

_Base = MODEL_FOR_CAUSAL_LM_MAPPING[CONFIG_MAPPING["{model_type}"]]
_RENAMED = {renamed}  # names of tensors in the files, and in the model


class NonUniformForCausalLM(_Base):
    def __init__(self, config):
        super().__init__(config)
        layers = self.get_decoder().layers
        for index, layer in enumerate(layers):
            own = config.per_layer_config[index]
            layers[index] = type(layer)(own, index)
            for module in layers[index].modules():
                if getattr(module, "config", None) is own:
                    module.config = config  # one for all, so that settings made later reach every layer
        self.post_init()

    @classmethod
    def from_pretrained(cls, *args, config=None, **kwargs):
        if config is not None:
            config = config.get_text_config()
        kwargs.setdefault("key_mapping", _RENAMED or None)
        return super().from_pretrained(*args, config=config, **kwargs)
'''


def check_possible(checkpoint: Checkpoint) -> None:
    """Refuse checkpoints that could not be loaded with different numbers of experts.

    Raises:
        PlanError: transformers has no class of its own for them.
    """
    if "transformers" not in checkpoint.spec.engines or _AUTO_MAP in checkpoint.config:
        raise PlanError(
            f"transformers loads {checkpoint.spec.model_type} through code of its own files, and layers that differ "
            "need a class of transformers",
            "plan without --allow-non-uniform",
        )


def non_uniform_files(text: str, checkpoint: Checkpoint, counts: Mapping[int, int]) -> dict[str, str]:
    """The config with the counts of the decoder layers, and the modeling file that reads them.

    Args:
        text: the config's text, in which the number of experts is the largest count.
        checkpoint: the source.
        counts: experts by layer.
    """
    spec = checkpoint.spec
    layers = {str(layer): {spec.layer_count_key: counts[layer]} for layer in checkpoint.moe_layers}
    added: dict[str, Any] = {
        spec.path("per_layer_config"): layers,
        spec.path("allow_global_per_layer_attribute_access"): True,  # the load-balancing loss reads the largest count
        _AUTO_MAP: {"AutoModelForCausalLM": f"{MODELING.removesuffix('.py')}.NonUniformForCausalLM"},
    }
    renamed = any(name.startswith(RENAMED_PREFIX) for name in checkpoint.tensors)
    mapping = {"^" + RENAMED_PREFIX.replace(".", r"\."): "model."} if renamed else {}
    code = _TEMPLATE.format(model_type=spec.model_type, renamed=mapping)
    return {"config.json": add_to_json(text, added), MODELING: code}
