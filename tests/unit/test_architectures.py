"""The table of names: what every tensor of every architecture is, and what must stop the run."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeprune.architectures import (
    ARCHITECTURES,
    Config,
    ExpertName,
    MoESpec,
    PlainName,
    RouterName,
    StackedName,
    read_count,
    resolve_architecture,
)
from moeprune.errors import ConfigError, LayoutError, UnsupportedModelError

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
ATTENTION = [f"self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")]
MLA = [
    f"self_attn.{name}"
    for name in ("q_a_proj", "q_a_layernorm", "q_b_proj", "kv_a_proj_with_mqa", "kv_a_layernorm", "kv_b_proj", "o_proj")
]
NORMS = ["input_layernorm", "post_attention_layernorm"]
DENSE = [f"mlp.{name}" for name in PROJECTIONS]
SHARED = [f"mlp.shared_experts.{name}" for name in PROJECTIONS]
MTP = ["eh_proj", "enorm", "hnorm", "shared_head.norm", "shared_head.head", "embed_tokens"]
OUTSIDE = ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"]
LINEAR = [f"linear_attn.{name}" for name in ("A_log", "dt_bias", "conv1d", "in_proj_qkvz", "norm", "out_proj")]
SHARED_GATED = [*(f"mlp.shared_expert.{name}" for name in PROJECTIONS), "mlp.shared_expert_gate"]
INDEXER = [f"self_attn.indexer.{name}" for name in ("k_norm", "weights_proj", "wk", "wq_b")]
QWEN_NEXT = ATTENTION + NORMS + LINEAR + SHARED_GATED

# What is left alone inside the layers of each architecture, without the suffix.
PLAIN = {
    "qwen3_moe": ATTENTION + NORMS + DENSE,
    "qwen2_moe": ATTENTION + NORMS + SHARED_GATED,
    "qwen3_next": QWEN_NEXT,
    "qwen3_5_moe": QWEN_NEXT,
    "qwen3_5_moe_text": QWEN_NEXT,
    "olmoe": ATTENTION + NORMS,
    "mixtral": ATTENTION + NORMS,
    "minimax_m2": ATTENTION + NORMS,
    "gpt_oss": [*ATTENTION, *NORMS, "self_attn.sinks"],
    "ernie4_5_moe": ATTENTION + NORMS + DENSE + SHARED,
    "glm4_moe": ATTENTION + NORMS + DENSE + SHARED + MTP,
    "glm4_moe_lite": MLA + NORMS + DENSE + SHARED + MTP,
    "glm_moe_dsa": MLA + INDEXER + NORMS + DENSE + SHARED + MTP,
    "deepseek_v3": MLA + NORMS + DENSE + SHARED + MTP,
    "deepseek_v32": MLA + INDEXER + NORMS + DENSE + SHARED + MTP,
    "kimi_k2": MLA + NORMS + DENSE + SHARED,
}
# The tensors with one row per expert, and the axis of those rows.
SIGMOID = {"mlp.gate.weight": 0, "mlp.gate.e_score_correction_bias": 0}
ROUTERS: dict[str, dict[str, int]] = {name: {"mlp.gate.weight": 0} for name in PLAIN} | {
    **dict.fromkeys(("glm4_moe", "glm4_moe_lite", "glm_moe_dsa", "deepseek_v3", "deepseek_v32", "kimi_k2"), SIGMOID),
    "mixtral": {"block_sparse_moe.gate.weight": 0},
    "minimax_m2": {"block_sparse_moe.gate.weight": 0, "block_sparse_moe.e_score_correction_bias": 0},
    "gpt_oss": {"mlp.router.weight": 0, "mlp.router.bias": 0},
    "ernie4_5_moe": {"mlp.gate.weight": 0, "mlp.moe_statics.e_score_correction_bias": 1},
}
W123 = {"mixtral", "minimax_m2"}
DEPTH = 61  # number of decoder layers
LAYERS = dict.fromkeys(PLAIN, "model.layers.") | {"qwen3_5_moe": "model.language_model.layers."}
# Companions of quantised weights, and biases.
SUFFIXES = ("weight", "weight_scale_inv", "bias", "weight_packed", "qzeros", "input_scale")
EVERY = pytest.mark.parametrize("model_type", ARCHITECTURES)


def test_every_architecture_of_the_table_has_a_list_here() -> None:
    """A new architecture needs its names in these tests."""
    assert PLAIN.keys() == ARCHITECTURES.keys()


@EVERY
def test_tensors_that_pruning_leaves_alone(model_type: str) -> None:
    """Attention, norms, dense and shared experts, MTP parts and everything outside the layers are plain."""
    spec = ARCHITECTURES[model_type]
    for part in PLAIN[model_type]:
        for suffix in SUFFIXES:
            assert spec.role(f"{LAYERS[model_type]}46.{part}.{suffix}", DEPTH) == PlainName(layer=46)
    for name in OUTSIDE:
        assert spec.role(name, DEPTH) == PlainName(layer=-1)


@EVERY
def test_expert_tensors_with_every_companion(model_type: str) -> None:
    """Whatever follows the expert's number travels with the expert, and gets only its number changed."""
    spec = ARCHITECTURES[model_type]
    block, names = ("block_sparse_moe", ("w1", "w2", "w3")) if model_type in W123 else ("mlp", PROJECTIONS)
    for projection in names:
        for suffix in SUFFIXES:
            name = f"{LAYERS[model_type]}3.{block}.experts.17.{projection}.{suffix}"
            role = spec.role(name, DEPTH)
            assert isinstance(role, ExpertName)
            assert (role.layer, role.expert, role.after) == (3, 17, f"{projection}.{suffix}")
            assert role.renumbered(17) == name
            assert role.renumbered(4) == name.replace("experts.17.", "experts.4.")


@EVERY
def test_stacked_experts_with_every_companion(model_type: str) -> None:
    """All experts of a layer in one tensor, with its biases, blocks and scales, are cut along the first axis."""
    block = "block_sparse_moe" if model_type in W123 else "mlp"
    for name in ("gate_up_proj", "down_proj"):
        for suffix in ("", "_bias", "_blocks", "_scales", "_scale_inv", ".weight"):
            part = f"{block}.experts.{name}{suffix}"
            role = ARCHITECTURES[model_type].role(f"{LAYERS[model_type]}3.{part}", DEPTH)
            assert role == StackedName(layer=3, part=part, axis=0)


@EVERY
def test_router_tensors(model_type: str) -> None:
    """The gate, and biases where the router has them, are cut along the axis that has one row per expert."""
    spec = ARCHITECTURES[model_type]
    assert spec.router == ROUTERS[model_type]
    for part, axis in ROUTERS[model_type].items():
        found = spec.role(f"{LAYERS[model_type]}12.{part}", DEPTH)
        assert found == RouterName(layer=12, part=part, axis=axis)


@EVERY
def test_layer_numbers_are_read_whole(model_type: str) -> None:
    """Layer 1 is not the beginning of layer 10, and a layer of another module is no decoder layer."""
    spec, prefix = ARCHITECTURES[model_type], LAYERS[model_type]
    for layer in (0, 1, 10, 100):
        assert spec.role(f"{prefix}{layer}.input_layernorm.weight", DEPTH).layer == layer
    assert spec.role(f"encoder.{prefix}0.input_layernorm.weight", DEPTH) == PlainName(layer=-1)
    assert spec.role(f"{prefix}0", DEPTH) == PlainName(layer=-1)


@pytest.mark.parametrize("model_type", ["qwen3_next", "qwen3_5_moe", "qwen3_5_moe_text"])
def test_mtp_layers_at_the_top_level_are_numbered_on(model_type: str) -> None:
    """``mtp.layers.0`` is the layer after the last decoder layer, never decoder layer 0."""
    spec = ARCHITECTURES[model_type]
    assert spec.role("mtp.layers.1.input_layernorm.weight", DEPTH) == PlainName(layer=DEPTH + 1)
    assert spec.role("mtp.fc.weight", DEPTH) == PlainName(layer=DEPTH)
    assert spec.role("mtp.layers.0.mlp.gate.weight", DEPTH).layer == DEPTH
    assert spec.role("mtp.layers.0.mlp.experts.down_proj", DEPTH) == StackedName(
        layer=DEPTH, part="mlp.experts.down_proj"
    )
    name = "mtp.layers.0.mlp.experts.5.up_proj.weight"
    role = spec.role(name, DEPTH)
    assert isinstance(role, ExpertName)
    assert (role.layer, role.renumbered(2)) == (DEPTH, name.replace(".5.", ".2."))


def test_mtp_layers_of_ernie_have_a_prefix_of_their_own() -> None:
    """Its MTP block and what surrounds it belong to the layer after the last."""
    spec = ARCHITECTURES["ernie4_5_moe"]
    for name in ("model.mtp_block.0.mlp.up_proj.weight", "model.mtp_linear_proj.0.weight", "mtp_emb_norm.0.weight"):
        assert spec.role(name, 28) == PlainName(layer=28)
    assert isinstance(spec.role("model.mtp_block.0.mlp.experts.3.up_proj.weight", 28), ExpertName)


UNDECLARED = [
    "model.mtp.layers.0.mlp.experts.0.gate_proj.weight",
    "mtp.experts.0.gate_proj.weight",
    "draft.layers.0.mlp.gate.weight",
    "LAYERS0.mlp.experts.gate_proj",
    "LAYERS0.mlp.experts.gate_up_projection",
    "LAYERS0.mlp.experts.0",
    "LAYERS0.mlp.gate.weight_scale_inv",
    "LAYERS0.mlp.gate.bias",
    "LAYERS0.mlp.gate.qweight",
    "LAYERS0.mlp.router.weight_scale",
    "LAYERS0.mlp.router_logits_scale",
    "LAYERS0.mlp.gating.weight",
    "LAYERS0.mlp.e_score_correction_bias",
    "LAYERS0.feed_forward.Experts.0.w1.weight",
    "LAYERS0.mlp.experts.01.gate_proj.weight",
    "LAYERS00.mlp.experts.1.gate_proj.weight",
    "LAYERS0.mlp.experts.\u0663.gate_proj.weight",
    "LAYERS0.mlp.experts.9999999999.gate_proj.weight",
    "LAYERS" + "9" * 5000 + ".mlp.experts.1.gate_proj.weight",
]


@EVERY
@pytest.mark.parametrize("name", UNDECLARED)
def test_undeclared_expert_or_router_tensors_stop_by_name(model_type: str, name: str) -> None:
    """A tensor left at the old width, or a second name for one expert, would give a broken checkpoint."""
    name = name.replace("LAYERS", LAYERS[model_type])
    with pytest.raises(LayoutError) as caught:
        ARCHITECTURES[model_type].role(name, DEPTH)
    assert repr(name) in caught.value.message
    assert model_type in caught.value.message
    assert "nothing was written" in caught.value.hint


@pytest.mark.parametrize(
    ("model_type", "name"),
    [
        ("qwen3_moe", "model.layers.0.mlp.shared_expert.up_proj.weight"),
        ("qwen3_moe", "model.layers.0.mlp.shared_expert_gate.weight"),
        ("qwen3_moe", "model.layers.0.mlp.gate.e_score_correction_bias"),
        ("qwen3_moe", "mtp.layers.0.mlp.experts.0.gate_proj.weight"),
        ("qwen3_5_moe", "model.layers.0.mlp.experts.gate_up_proj"),
        ("deepseek_v3", "mtp.layers.0.mlp.experts.gate_up_proj"),
        ("deepseek_v3", "model.layers.0.mlp.moe_statics.e_score_correction_bias"),
        ("ernie4_5_moe", "model.layers.0.mlp.gate.e_score_correction_bias"),
        ("minimax_m2", "model.layers.0.block_sparse_moe.gate.e_score_correction_bias"),
        ("gpt_oss", "model.layers.0.mlp.gate.weight"),
        ("olmoe", "model.layers.0.mlp.shared_experts.up_proj.weight"),
        ("mixtral", "model.layers.0.mlp.experts.0.w1.weight"),
        ("mixtral", "model.layers.0.block_sparse_moe.gate.bias"),
        ("deepseek_v3", "model.layers.0.mlp.shared_expert.up_proj.weight"),
        ("deepseek_v3", "model.layers.0.block_sparse_moe.experts.0.w1.weight"),
    ],
)
def test_a_part_of_another_architecture_is_undeclared(model_type: str, name: str) -> None:
    """What one architecture declares does not hold for its neighbour."""
    with pytest.raises(LayoutError, match="does not declare it"):
        ARCHITECTURES[model_type].role(name, DEPTH)


PIECES = ["model", "language_model", "layers", "mtp", "mtp_block", "0", "10", "mlp", "experts", "gate", "router"]
PIECES += ["weight", "block_sparse_moe", "gate_up_proj", "down_proj_bias", "moe_statics", "", "\u00e9"]


@EVERY
@settings(deadline=None)
@given(st.lists(st.sampled_from(PIECES) | st.text(max_size=4), max_size=9).map(".".join))
def test_any_name_is_classified_or_refused(model_type: str, name: str) -> None:
    """No name gives another error, and a declared name keeps all of itself but the expert's number."""
    spec = ARCHITECTURES[model_type]
    try:
        role = spec.role(name, DEPTH)
    except LayoutError:
        return
    if isinstance(role, ExpertName):
        assert role.renumbered(role.expert) == name
        assert spec.role(role.renumbered(5), DEPTH).layer == role.layer
    elif isinstance(role, RouterName | StackedName):
        assert name.endswith(f".{role.part}")
    else:
        assert "experts." not in name.replace("shared_experts.", "")


# --- which layers are sparse ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model_type", "config", "expected"),
    [
        ("mixtral", {"num_hidden_layers": 3}, [0, 1, 2]),
        ("olmoe", {"num_hidden_layers": 2}, [0, 1]),
        ("qwen3_moe", {"num_hidden_layers": 4}, [0, 1, 2, 3]),
        ("qwen3_moe", {"num_hidden_layers": 4, "mlp_only_layers": None, "decoder_sparse_step": None}, [0, 1, 2, 3]),
        ("qwen3_moe", {"num_hidden_layers": 4, "mlp_only_layers": [0, 3]}, [1, 2]),
        ("qwen3_moe", {"num_hidden_layers": 6, "decoder_sparse_step": 2}, [1, 3, 5]),
        ("qwen2_moe", {"num_hidden_layers": 6, "decoder_sparse_step": 2, "mlp_only_layers": [3]}, [1, 5]),
        ("deepseek_v3", {"num_hidden_layers": 5, "first_k_dense_replace": 3}, [3, 4]),
        ("deepseek_v3", {"num_hidden_layers": 6, "first_k_dense_replace": 1, "moe_layer_freq": 2}, [2, 4]),
        ("glm4_moe", {"num_hidden_layers": 3, "first_k_dense_replace": 0}, [0, 1, 2]),
        # where both are there the list is what the model reads
        (
            "glm4_moe_lite",
            {"num_hidden_layers": 3, "first_k_dense_replace": 2, "mlp_layer_types": ["dense", "sparse", "dense"]},
            [1],
        ),
        ("glm4_moe", {"num_hidden_layers": 2, "first_k_dense_replace": 5}, []),
        ("ernie4_5_moe", {"num_hidden_layers": 4, "moe_layer_start_index": 1, "moe_layer_end_index": -1}, [1, 2, 3]),
        ("ernie4_5_moe", {"num_hidden_layers": 4, "moe_layer_start_index": 1, "moe_layer_end_index": 2}, [1, 2]),
        ("ernie4_5_moe", {"num_hidden_layers": 6, "moe_layer_interval": 2}, [1, 3, 5]),
        ("qwen3_5_moe", {"num_hidden_layers": 9, "text_config": {"num_hidden_layers": 2}}, [0, 1]),
        # a list that is too short leaves the rest to be found, or missed, among the tensors
        ("glm4_moe_lite", {"num_hidden_layers": 3, "mlp_layer_types": ["dense"]}, [1, 2]),
    ],
)
def test_moe_layers_follow_the_config(model_type: str, config: Config, expected: list[int]) -> None:
    """Each of the keys that make a layer dense is obeyed as the models obey it."""
    assert ARCHITECTURES[model_type].moe_layers(config) == expected


def test_mtp_layers_follow_the_decoder_layers() -> None:
    """They are numbered on from the last decoder layer; an architecture without the key has none."""
    config = {"num_hidden_layers": 61, "num_nextn_predict_layers": 2}
    assert ARCHITECTURES["deepseek_v3"].announced_mtp(config) == [61, 62]
    assert ARCHITECTURES["deepseek_v3"].announced_mtp({"num_hidden_layers": 61, "num_nextn_predict_layers": None}) == []
    assert ARCHITECTURES["qwen3_moe"].announced_mtp(config) == []
    nested = {"text_config": {"num_hidden_layers": 40, "mtp_num_hidden_layers": 1}}
    assert ARCHITECTURES["qwen3_5_moe"].announced_mtp(nested) == [40]


@pytest.mark.parametrize(
    ("model_type", "config", "why"),
    [
        ("mixtral", {}, "there is no num_hidden_layers"),
        ("mixtral", {"num_hidden_layers": "32"}, "num_hidden_layers is '32'"),
        ("mixtral", {"num_hidden_layers": True}, "num_hidden_layers is True"),
        ("mixtral", {"num_hidden_layers": -1}, "num_hidden_layers is -1"),
        ("mixtral", {"num_hidden_layers": 2.0}, "num_hidden_layers is 2.0"),
        ("qwen3_5_moe", {"num_hidden_layers": 2}, "text_config is None, where an object"),
        ("qwen3_moe", {"num_hidden_layers": 2, "mlp_only_layers": 1}, "mlp_only_layers is 1, where a list"),
        ("qwen3_moe", {"num_hidden_layers": 2, "decoder_sparse_step": [1]}, r"decoder_sparse_step is \[1\]"),
        ("glm4_moe", {"num_hidden_layers": 2, "first_k_dense_replace": "a"}, "first_k_dense_replace is 'a'"),
        ("glm4_moe", {"num_hidden_layers": 2, "mlp_layer_types": "dense"}, "mlp_layer_types is 'dense'"),
        ("glm4_moe", {"num_hidden_layers": 2, "num_nextn_predict_layers": "1"}, "num_nextn_predict_layers is '1'"),
    ],
)
def test_config_values_of_the_wrong_kind_are_named(model_type: str, config: Config, why: str) -> None:
    """A damaged config is a layout error that names the key, never a TypeError."""
    spec = ARCHITECTURES[model_type]
    with pytest.raises(LayoutError, match=f"config.json: {why}"):
        [spec.moe_layers(config), spec.announced_mtp(config)]


def test_a_count_may_have_a_default() -> None:
    """The default stands for a missing value and for null, not for zero."""
    config: dict[str, Any] = {"null": None, "zero": 0}
    assert [read_count(config, key, 7) for key in ("null", "zero", "none")] == [7, 0, 7]


# --- finding an architecture ----------------------------------------------------------------------------------------


@EVERY
def test_an_architecture_is_found_by_its_model_type(model_type: str) -> None:
    """The config decides; nothing else is guessed."""
    assert resolve_architecture({"model_type": model_type}) is ARCHITECTURES[model_type]


@pytest.mark.parametrize(
    ("model_type", "hint"),
    [
        ("qwen3_mo", "did you mean .*'qwen3_moe'"),
        ("deepseek_v2", "did you mean .*'deepseek_v3'"),
        ("llama", "known: .*mixtral"),
    ],
)
def test_an_unknown_model_type_gives_the_nearest_names(model_type: str, hint: str) -> None:
    """A near miss is named, anything else gets the whole list."""
    with pytest.raises(UnsupportedModelError, match=f"unknown model_type '{model_type}' .*{hint}"):
        resolve_architecture({"model_type": model_type})


@pytest.mark.parametrize("config", [{}, {"model_type": None}, {"model_type": ["mixtral"]}])
def test_a_config_without_model_type_is_refused(config: Config) -> None:
    """Such a folder is usually no checkpoint at all."""
    with pytest.raises(UnsupportedModelError, match="has no model_type"):
        resolve_architecture(config)


def test_another_package_can_add_an_architecture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An installed entry point is found by its model type; one that is no spec of that type is refused."""
    info = tmp_path / "plug-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: plug\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[moeprune.architectures]\n"
        "new_moe = moeprune_plug:SPEC\nother_moe = moeprune_plug:SPEC\nodd_moe = moeprune_plug:ODD\n"
    )
    (tmp_path / "moeprune_plug.py").write_text(
        "from moeprune.architectures import MoESpec\n"
        "SPEC = MoESpec(model_type='new_moe', router={'mlp.router.weight': 0},"
        " count_keys=('num_experts',))\nODD = 'not a spec'\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    spec = resolve_architecture({"model_type": "new_moe"})
    assert isinstance(spec, MoESpec)
    assert spec.role("model.layers.0.mlp.router.weight", 2) == RouterName(layer=0, part="mlp.router.weight", axis=0)
    for name, why in (("odd_moe", "is no moeprune.MoESpec"), ("other_moe", "is of the model_type 'new_moe'")):
        with pytest.raises(ConfigError, match=f"the architecture '{name}' of plug 1.0 {why}"):
            resolve_architecture({"model_type": name})
    with pytest.raises(UnsupportedModelError, match="did you mean 'new_moe'"):
        resolve_architecture({"model_type": "new_mo"})


def test_the_example_in_the_documentation_works() -> None:
    """The page on adding an architecture declares one that classifies its names and knows its sparse layers."""
    page = Path(__file__).parents[2] / "docs/how-to/add-an-architecture.md"
    code = page.read_text(encoding="utf-8").split("```python\n")[1].split("```")[0]
    names: dict[str, Any] = {}
    exec(code, names)  # noqa: S102 - our own page
    spec = names["DOTS1"]
    assert isinstance(spec, MoESpec)
    assert spec.moe_layers({"num_hidden_layers": 3, "first_k_dense_replace": 1}) == [1, 2]
    assert isinstance(spec.role("model.layers.1.mlp.experts.0.up_proj.weight", 3), ExpertName)
    assert spec.role("model.layers.1.mlp.shared_experts.up_proj.weight", 3) == PlainName(layer=1)
    assert all(
        f"`{field.name}`" in page.read_text(encoding="utf-8") for field in fields(MoESpec) if field.name != "engines"
    )
