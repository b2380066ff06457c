"""What the files of each MoE architecture call things: the only home of tensor names and config keys.

A :class:`MoESpec` says which tensors belong to an expert, which rows of which tensors belong to the router, and which
config values count them. Whatever it does not declare is copied untouched, unless it *looks* like an expert or a
router: then the run stops by name, because a tensor that is left at the old width gives a broken checkpoint.

To support another architecture add one entry to :data:`ARCHITECTURES`, or publish it from another package under the
entry-point group ``moeprune.architectures`` (an object of type :class:`MoESpec`, named by its ``model_type``):
docs/how-to/add-an-architecture.md.
"""

from __future__ import annotations

import functools
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from moeprune._plugins import PlugIn, find_plug_in, published_names
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
class StackedName:
    """A tensor of all routed experts of a layer, one after another along ``axis``."""

    layer: int
    part: str
    axis: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterName:
    """A tensor with one row per expert along ``axis``."""

    layer: int
    part: str
    axis: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PlainName:
    """A tensor that pruning leaves alone; ``layer`` is -1 outside the decoder and MTP layers."""

    layer: int


TensorRole = ExpertName | StackedName | RouterName | PlainName


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


def _sparse_interval(config: Config, layer: int) -> bool:
    step = read_count(config, "moe_layer_interval", 1) or 1
    last = layer if config.get("moe_layer_end_index") == -1 else read_count(config, "moe_layer_end_index", layer)
    return read_count(config, "moe_layer_start_index", 0) <= layer <= last and (layer + 1) % step == 0


@functools.cache
def _block_pattern(layers: tuple[str, ...], mtp_layers: tuple[str, ...]) -> re.Pattern[str]:
    """A tensor inside a numbered layer: prefix of a decoder layer or of an MTP layer, number, name inside."""

    def either(prefixes: Iterable[str]) -> str:
        return "|".join(map(re.escape, prefixes)) or "(?!)"

    # Matched at the start, so that `mtp.layers.0.` is never taken for decoder layer 0.
    return re.compile(rf"((?:{either(layers)})|({either(mtp_layers)})){_NUMBER}\.(.+)")


@functools.cache
def _expert_pattern(experts: str, stacked: tuple[str, ...]) -> re.Pattern[str]:
    """A tensor of one expert: its number and what follows; or of all of them: what follows the prefix."""
    names = "|".join(map(re.escape, stacked)) or "(?!)"
    return re.compile(rf"{re.escape(experts)}(?:{_NUMBER}\.(.+)|((?:{names})(?:[_.].+)?$))")


@dataclass(frozen=True, slots=True, kw_only=True)
class MoESpec:
    """Names on disk of one architecture.

    Attributes:
        model_type: the config's ``model_type``.
        experts: prefix, inside a layer, of the tensors of expert e: ``<experts><e>.<anything>``. Companions such as
            ``weight_scale_inv`` travel with their expert because only the prefix is matched.
        stacked: names after the same prefix of tensors that hold all experts of the layer along their first axis,
            with any companion of theirs: ``<experts><name>``, ``<experts><name>_bias`` and so on. A layer has either
            these or one set of tensors per expert.
        projections: names, after an expert's number, of its gate, up and down projection.
        router: name inside a layer of every tensor with one row per expert, and the axis of those rows; every MoE
            layer must have all of them.
        shared: prefixes inside a layer that look like experts or routers and are neither.
        width_key: config key of the inner size of a routed expert.
        shared_count_key: config key of the number of shared experts, where together they are so many times as wide as a
            routed one; empty where their width has a key of its own.
        section: the config's key of the object that describes the language model, where it is nested.
        count_keys: config keys that hold the number of routed experts; all that are present are edited.
        own_count_key: transformers' name for that number, where it is not the first of the keys.
        top_k_key: config key of the number of experts that a token is routed to.
        group_keys: config keys of the number of groups and of the groups a token may use, or empty.
        is_moe_layer: whether decoder layer i has routed experts, from the config.
        layers: prefixes of the decoder layers.
        mtp_key: config key of the number of multi-token-prediction layers, or empty. They follow the decoder layers
            as ``model.layers.<num_hidden_layers>`` and so on, and engines build them with the same expert count.
        mtp_layers: prefixes of MTP layers that are numbered on their own, from 0.
        mtp: prefixes of every tensor that belongs to such MTP layers, inside one of them or not.
        engines: engines whose released versions have a loader for this architecture.
    """

    model_type: str
    experts: str = "mlp.experts."
    stacked: tuple[str, ...] = ("gate_up_proj", "down_proj")
    projections: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    router: Mapping[str, int]
    shared: tuple[str, ...] = ()
    width_key: str = "moe_intermediate_size"
    shared_count_key: str = ""
    section: str = ""
    count_keys: tuple[str, ...]
    own_count_key: str = ""
    top_k_key: str = "num_experts_per_tok"
    group_keys: tuple[str, str] | tuple[()] = ()
    is_moe_layer: Callable[[Config, int], bool] = _every_layer
    layers: tuple[str, ...] = ("model.layers.",)
    mtp_key: str = ""
    mtp_layers: tuple[str, ...] = ()
    mtp: tuple[str, ...] = ()
    engines: tuple[str, ...] = ("transformers", "vllm", "sglang", "llama.cpp")

    def role(self, name: str, depth: int) -> TensorRole:
        """Classify one tensor name.

        Args:
            name: the tensor's name on disk.
            depth: number of decoder layers; MTP layers are numbered on from there, however the files number them.

        Raises:
            LayoutError: the name looks like an expert or a router tensor and is not declared.
        """
        match = _block_pattern(self.layers, self.mtp_layers).match(name)
        if match is None:
            return self._plain(name, depth if name.startswith(self.mtp or "no MTP") else -1, name)
        layer, part = int(match[3]) + (depth if match[2] else 0), match[4]
        if part in self.router:
            return RouterName(layer=layer, part=sys.intern(part), axis=self.router[part])
        expert = _expert_pattern(self.experts, self.stacked).match(part)
        if expert is not None and expert[3]:
            return StackedName(layer=layer, part=sys.intern(part))
        if expert is not None:
            before = sys.intern(f"{match[1]}{match[3]}.{self.experts}")  # few strings, shared by 100,000 tensors
            return ExpertName(layer=layer, expert=int(expert[1]), before=before, after=sys.intern(expert[2]))
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

    def values(self, config: Config) -> Config:
        """The part of the config that describes the language model.

        Raises:
            LayoutError: a config value that is needed is missing or of the wrong kind; so for all that follow.
        """
        inner = config.get(self.section) if self.section else config
        if not isinstance(inner, Mapping):
            raise LayoutError(f"config.json: {self.section} is {inner!r}, where an object is needed")
        return inner

    def path(self, key: str) -> str:
        """A key of :meth:`values` as the dotted key of the whole config."""
        return f"{self.section}.{key}" if self.section else key

    @property
    def layer_count_key(self) -> str:
        """Key under which ``per_layer_config`` holds the number of one layer's experts."""
        return self.own_count_key or self.count_keys[0]

    def layer_counts(self, config: Config) -> dict[int, int]:
        """Numbers of routed experts of the decoder layers that have one of their own; most models have none."""
        entries = self.values(config).get("per_layer_config") or {}
        if not isinstance(entries, Mapping) or not all(
            re.fullmatch("[0-9]{1,9}", layer) and isinstance(own, Mapping) for layer, own in entries.items()
        ):
            raise LayoutError("config.json: per_layer_config is not an object of objects by layer")
        key = self.layer_count_key
        return {int(layer): read_count(own, key) for layer, own in entries.items() if key in own}

    def depth(self, config: Config) -> int:
        """Number of decoder layers."""
        return read_count(self.values(config), "num_hidden_layers")

    def moe_layers(self, config: Config) -> list[int]:
        """Decoder layers that have routed experts, MTP layers left out."""
        values = self.values(config)
        return [layer for layer in range(self.depth(config)) if self.is_moe_layer(values, layer)]

    def announced_mtp(self, config: Config) -> list[int]:
        """Indices of the multi-token-prediction layers that the config announces."""
        depth = self.depth(config)
        count = read_count(self.values(config), self.mtp_key, 0) if self.mtp_key else 0
        return list(range(depth, depth + count))


_GATE = {"mlp.gate.weight": 0}
_BIAS = {"mlp.gate.e_score_correction_bias": 0}
_BLOCK = "block_sparse_moe."
_SHARED = ("mlp.shared_expert.", "mlp.shared_expert_gate.")
RENAMED_PREFIX = "model.language_model."  # of a text model inside another one; transformers loads it as ``model.``
_TOP_LEVEL_MTP = {"mtp": ("mtp.",), "mtp_layers": ("mtp.layers.",)}


def _deepseek_like(model_type: str, **changes: Any) -> MoESpec:
    """The shape shared by GLM and DeepSeek-V3: sigmoid router with correction bias, shared experts, groups, MTP."""
    values: dict[str, Any] = {
        "router": _GATE | _BIAS,
        "shared": ("mlp.shared_experts.",),
        "shared_count_key": "n_shared_experts",
        "count_keys": ("n_routed_experts", "num_local_experts", "num_experts"),
        "group_keys": ("n_group", "topk_group"),
        "mtp_key": "num_nextn_predict_layers",
        "is_moe_layer": _after_first_dense,
    }
    return MoESpec(model_type=model_type, **values | changes)


def _qwen_like(model_type: str, **changes: Any) -> MoESpec:
    """The shape shared by Qwen and OLMoE: softmax router without bias."""
    # A file written by transformers 5 may have the second key, and with both the second one wins.
    return MoESpec(model_type=model_type, router=_GATE, count_keys=("num_experts", "num_local_experts"), **changes)


ARCHITECTURES: Mapping[str, MoESpec] = {
    spec.model_type: spec
    for spec in (
        _qwen_like("qwen3_moe", is_moe_layer=_sparse_step, own_count_key="num_local_experts"),
        _qwen_like("qwen2_moe", is_moe_layer=_sparse_step, shared=_SHARED),
        _qwen_like("qwen3_next", is_moe_layer=_sparse_step, shared=_SHARED, **_TOP_LEVEL_MTP),
        _qwen_like(
            "qwen3_5_moe",
            shared=_SHARED,
            section="text_config",
            layers=(f"{RENAMED_PREFIX}layers.",),
            mtp_key="mtp_num_hidden_layers",
            **_TOP_LEVEL_MTP,
        ),
        _qwen_like(
            "qwen3_5_moe_text",
            shared=_SHARED,
            layers=("model.layers.", f"{RENAMED_PREFIX}layers."),
            mtp_key="mtp_num_hidden_layers",
            **_TOP_LEVEL_MTP,
        ),
        _qwen_like("olmoe", width_key="intermediate_size"),
        _deepseek_like("glm4_moe"),
        _deepseek_like("glm4_moe_lite"),
        _deepseek_like("glm_moe_dsa"),
        _deepseek_like("deepseek_v3"),
        _deepseek_like("deepseek_v32"),
        _deepseek_like("kimi_k2", engines=("vllm", "sglang", "llama.cpp")),  # transformers needs its remote code
        MoESpec(
            model_type="mixtral",
            experts=f"{_BLOCK}experts.",
            projections=("w1", "w3", "w2"),
            router={f"{_BLOCK}gate.weight": 0},
            width_key="intermediate_size",
            count_keys=("num_local_experts",),
        ),
        MoESpec(
            model_type="minimax_m2",
            experts=f"{_BLOCK}experts.",
            projections=("w1", "w3", "w2"),
            router={f"{_BLOCK}gate.weight": 0, f"{_BLOCK}e_score_correction_bias": 0},  # the bias is above the gate
            width_key="intermediate_size",
            count_keys=("num_local_experts",),
            mtp_key="num_mtp_modules",
        ),
        MoESpec(
            model_type="gpt_oss",
            router={"mlp.router.weight": 0, "mlp.router.bias": 0},
            width_key="intermediate_size",
            count_keys=("num_local_experts",),
        ),
        MoESpec(
            model_type="ernie4_5_moe",
            router=_GATE | {"mlp.moe_statics.e_score_correction_bias": 1},  # [1, E]
            shared=("mlp.shared_experts.",),
            shared_count_key="moe_num_shared_experts",
            count_keys=("moe_num_experts",),
            top_k_key="moe_k",
            is_moe_layer=_sparse_interval,
            mtp_key="num_nextn_predict_layers",
            mtp_layers=("model.mtp_block.", "mtp_block."),
            mtp=("model.mtp_", "mtp_"),
        ),
    )
}


def resolve_architecture(config: Config) -> MoESpec:
    """Find the spec of a model by its config.

    Raises:
        UnsupportedModelError: the ``model_type`` is missing or unknown.
        ConfigError: another package publishes it, and it cannot be used.
    """
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        raise UnsupportedModelError("config.json has no model_type", "is this a Hugging Face checkpoint folder?")
    if model_type in ARCHITECTURES:
        return ARCHITECTURES[model_type]
    if plug_in := find_plug_in("architecture", model_type):
        return load_plug_in(plug_in)
    names = [*ARCHITECTURES, *published_names("architecture")]
    raise UnsupportedModelError(f"unknown model_type {model_type!r}", nearest(model_type, names))


def load_plug_in(plug_in: PlugIn) -> MoESpec:
    """A spec that another package publishes.

    Raises:
        ConfigError: it cannot be imported, or is no spec of that ``model_type``.
    """
    found = plug_in.load()
    if not isinstance(found, MoESpec):
        raise plug_in.problem("is no moeprune.MoESpec")
    if found.model_type != plug_in.name:
        raise plug_in.problem(f"is of the model_type {found.model_type!r}")
    return found
