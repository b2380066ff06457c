"""What the files of each MoE architecture call things: the only home of tensor names and config keys.

A :class:`MoESpec` says which tensors belong to an expert, which rows of which tensors belong to the router, and which
config values count them. Whatever it does not declare is copied untouched, unless it *looks* like an expert or a
router: then the run stops by name, because a tensor that is left at the old width gives a broken checkpoint.

To support another architecture add one entry to :data:`ARCHITECTURES`, or publish it from another package under the
entry-point group ``moeprune.architectures`` (an object of type :class:`MoESpec`, named by its ``model_type``).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from moeprune.errors import LayoutError, UnsupportedModelError, nearest

Config = Mapping[str, Any]

# A dotted part of a tensor's name that makes it look like a piece of an expert or a router.
_SUSPICIOUS = re.compile(r"expert|moe|router|gating|^gate$|score_correction", re.IGNORECASE)
_NUMBER = r"(0|[1-9][0-9]{0,8})"  # as checkpoints write it: 01 would be a second name for expert 1


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertName:
    """A tensor of one routed expert: ``<before><expert>.<after>``."""

    layer: int
    expert: int
    before: str
    after: str

    def renumbered(self, expert: int) -> str:
        """The tensor's name once its expert is number ``expert``."""
        return f"{self.before}{expert}.{self.after}"


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterName:
    """A tensor with one row per expert along ``axis``."""

    layer: int
    part: str
    axis: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PlainName:
    """A tensor that pruning leaves alone; ``layer`` is -1 outside the decoder layers."""

    layer: int


TensorRole = ExpertName | RouterName | PlainName


def read_count(config: Config, key: str, default: int | None = None) -> int:
    """A whole number of the config; ``default`` stands for one that is missing or null.

    Raises:
        LayoutError: it is missing without a default, or is no whole number of at least 0.
    """
    value = config.get(key)
    value = default if value is None else value
    if type(value) is not int or value < 0:
        what = f"{key} is {value!r}" if key in config else f"there is no {key}"
        raise LayoutError(f"config.json: {what}, where a whole number is needed", "is the file complete?")
    return value


def _read_list(config: Config, key: str) -> list[Any] | None:
    value = config.get(key)
    if value is not None and not isinstance(value, list):
        raise LayoutError(f"config.json: {key} is {value!r}, where a list is needed")
    return value


def _every_layer(config: Config, layer: int) -> bool:
    return True


def _after_first_dense(config: Config, layer: int) -> bool:
    types = _read_list(config, "mlp_layer_types")
    if types is not None:
        return layer >= len(types) or types[layer] == "sparse"
    frequency = read_count(config, "moe_layer_freq", 1) or 1
    return layer >= read_count(config, "first_k_dense_replace", 0) and layer % frequency == 0


def _sparse_step(config: Config, layer: int) -> bool:
    step = read_count(config, "decoder_sparse_step", 1) or 1
    return layer not in (_read_list(config, "mlp_only_layers") or []) and (layer + 1) % step == 0


@dataclass(frozen=True, slots=True, kw_only=True)
class MoESpec:
    """Names on disk of one architecture.

    Attributes:
        model_type: the config's ``model_type``.
        experts: prefix, inside a layer, of the tensors of expert e: ``<experts><e>.<anything>``. Companions such as
            ``weight_scale_inv`` travel with their expert because only the prefix is matched.
        router: name inside a layer of every tensor with one row per expert, and the axis of those rows.
        required_router: the router tensors that every MoE layer must have.
        shared: prefixes inside a layer that look like experts or routers and are neither.
        count_keys: config keys that hold the number of routed experts; all that are present are edited.
        top_k_key: config key of the number of experts that a token is routed to.
        group_keys: config keys of the number of groups and of the groups a token may use, or empty.
        mtp_key: config key of the number of multi-token-prediction layers, or empty. They follow the decoder layers
            as ``model.layers.<num_hidden_layers>`` and so on, and engines build them with the same expert count.
        is_moe_layer: whether decoder layer i has routed experts, from the config.
        layers: prefix of the decoder layers.
        engines: engines whose released versions have a loader for this architecture.
    """

    model_type: str
    experts: str = "mlp.experts."
    router: Mapping[str, int]
    required_router: tuple[str, ...]
    shared: tuple[str, ...] = ()
    count_keys: tuple[str, ...]
    top_k_key: str = "num_experts_per_tok"
    group_keys: tuple[str, str] | tuple[()] = ()
    mtp_key: str = ""
    is_moe_layer: Callable[[Config, int], bool] = _every_layer
    layers: str = "model.layers."
    engines: tuple[str, ...] = ("transformers", "vllm", "sglang", "llama.cpp")

    def role(self, name: str) -> TensorRole:
        """Classify one tensor name.

        Raises:
            LayoutError: the name looks like an expert or a router tensor and is not declared.
        """
        # Anchored at the start, so that `mtp.layers.0.` is never taken for decoder layer 0.
        match = re.match(re.escape(self.layers) + _NUMBER + r"\.(.+)", name)
        if match is None:
            return self._plain(name, -1, name)
        layer, part = int(match[1]), match[2]
        if part in self.router:
            return RouterName(layer=layer, part=part, axis=self.router[part])
        expert = re.match(re.escape(self.experts) + _NUMBER + r"\.(.+)", part)
        if expert is not None:
            before = f"{self.layers}{layer}.{self.experts}"
            return ExpertName(layer=layer, expert=int(expert[1]), before=before, after=expert[2])
        if part.startswith(self.shared):
            return PlainName(layer=layer)
        return self._plain(name, layer, part)

    def _plain(self, name: str, layer: int, part: str) -> PlainName:
        if any(_SUSPICIOUS.search(piece) for piece in part.split(".")):
            raise LayoutError(
                f"tensor {name!r} looks like part of an expert or a router, and {self.model_type} does not declare it",
                "nothing was written; declare it in moeprune.architectures, or report the checkpoint",
            )
        return PlainName(layer=layer)

    def moe_layers(self, config: Config) -> list[int]:
        """Decoder layers that have routed experts, MTP layers left out.

        Raises:
            LayoutError: a config value that decides it is missing or of the wrong kind; so for all that follow.
        """
        depth = read_count(config, "num_hidden_layers")
        return [layer for layer in range(depth) if self.is_moe_layer(config, layer)]

    def mtp_layers(self, config: Config) -> list[int]:
        """Indices of the multi-token-prediction layers that the config announces."""
        depth = read_count(config, "num_hidden_layers")
        count = read_count(config, self.mtp_key, 0) if self.mtp_key else 0
        return list(range(depth, depth + count))


_GATE = {"mlp.gate.weight": 0}
_BIASED_GATE = _GATE | {"mlp.gate.e_score_correction_bias": 0}


def _deepseek_like(model_type: str) -> MoESpec:
    """The shape shared by GLM and DeepSeek-V3: sigmoid router with correction bias, shared experts, groups, MTP."""
    return MoESpec(
        model_type=model_type,
        router=_BIASED_GATE,
        required_router=tuple(_BIASED_GATE),
        shared=("mlp.shared_experts.",),
        count_keys=("n_routed_experts", "num_local_experts", "num_experts"),
        group_keys=("n_group", "topk_group"),
        mtp_key="num_nextn_predict_layers",
        is_moe_layer=_after_first_dense,
    )


ARCHITECTURES: Mapping[str, MoESpec] = {
    spec.model_type: spec
    for spec in (
        MoESpec(
            model_type="qwen3_moe",
            router=_GATE,
            required_router=tuple(_GATE),
            # A file written by transformers 5 has the second key, and with both the second one wins.
            count_keys=("num_experts", "num_local_experts"),
            is_moe_layer=_sparse_step,
        ),
        MoESpec(
            model_type="qwen2_moe",
            router=_GATE,
            required_router=tuple(_GATE),
            shared=("mlp.shared_expert.", "mlp.shared_expert_gate."),
            count_keys=("num_experts", "num_local_experts"),
            is_moe_layer=_sparse_step,
        ),
        MoESpec(
            model_type="olmoe",
            router=_GATE,
            required_router=tuple(_GATE),
            count_keys=("num_experts", "num_local_experts"),
        ),
        MoESpec(
            model_type="mixtral",
            experts="block_sparse_moe.experts.",
            router={"block_sparse_moe.gate.weight": 0},
            required_router=("block_sparse_moe.gate.weight",),
            count_keys=("num_local_experts",),
        ),
        _deepseek_like("glm4_moe"),
        _deepseek_like("glm4_moe_lite"),
        _deepseek_like("deepseek_v3"),
    )
}


def resolve_architecture(config: Config) -> MoESpec:
    """Find the spec of a model by its config.

    Raises:
        UnsupportedModelError: the ``model_type`` is missing or unknown.
    """
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        raise UnsupportedModelError("config.json has no model_type", "is this a Hugging Face checkpoint folder?")
    spec = ARCHITECTURES.get(model_type) or _from_entry_points(model_type)
    if spec is None:
        raise UnsupportedModelError(f"unknown model_type {model_type!r}", nearest(model_type, ARCHITECTURES))
    return spec


def _from_entry_points(model_type: str) -> MoESpec | None:
    from importlib.metadata import entry_points

    for point in entry_points(group="moeprune.architectures", name=model_type):
        spec = point.load()
        if isinstance(spec, MoESpec):
            return spec
    return None
