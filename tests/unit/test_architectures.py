"""The table of names: what every tensor of every architecture is, and what must stop the run."""

from __future__ import annotations

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
    read_count,
    resolve_architecture,
)
from moeprune.errors import LayoutError, UnsupportedModelError

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

# What is left alone inside the layers of each architecture, without the suffix.
PLAIN = {
    "qwen3_moe": ATTENTION + NORMS + DENSE,
    "qwen2_moe": [*ATTENTION, *NORMS, *(f"mlp.shared_expert.{name}" for name in PROJECTIONS), "mlp.shared_expert_gate"],
    "olmoe": ATTENTION + NORMS,
    "mixtral": ATTENTION + NORMS,
    "glm4_moe": ATTENTION + NORMS + DENSE + SHARED + MTP,
    "glm4_moe_lite": MLA + NORMS + DENSE + SHARED + MTP,
    "deepseek_v3": MLA + NORMS + DENSE + SHARED + MTP,
}
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
            assert spec.role(f"model.layers.46.{part}.{suffix}") == PlainName(layer=46)
    for name in OUTSIDE:
        assert spec.role(name) == PlainName(layer=-1)


@EVERY
def test_expert_tensors_with_every_companion(model_type: str) -> None:
    """Whatever follows the expert's number travels with the expert, and gets only its number changed."""
    spec = ARCHITECTURES[model_type]
    block, names = ("block_sparse_moe", ("w1", "w2", "w3")) if model_type == "mixtral" else ("mlp", PROJECTIONS)
    for projection in names:
        for suffix in SUFFIXES:
            name = f"model.layers.3.{block}.experts.17.{projection}.{suffix}"
            role = spec.role(name)
            assert isinstance(role, ExpertName)
            assert (role.layer, role.expert, role.after) == (3, 17, f"{projection}.{suffix}")
            assert role.renumbered(17) == name
            assert role.renumbered(4) == name.replace("experts.17.", "experts.4.")


@EVERY
def test_router_tensors(model_type: str) -> None:
    """The gate, and the correction bias where the router has one, are cut along their first axis."""
    spec = ARCHITECTURES[model_type]
    block = "block_sparse_moe" if model_type == "mixtral" else "mlp"
    parts = [f"{block}.gate.weight"]
    if model_type in {"glm4_moe", "glm4_moe_lite", "deepseek_v3"}:
        parts.append("mlp.gate.e_score_correction_bias")
    assert sorted(spec.required_router) == sorted(parts)
    for part in parts:
        assert spec.role(f"model.layers.12.{part}") == RouterName(layer=12, part=part, axis=0)


@EVERY
def test_layer_numbers_are_read_whole(model_type: str) -> None:
    """Layer 1 is not the beginning of layer 10, and a layer of another module is no decoder layer."""
    spec = ARCHITECTURES[model_type]
    assert [spec.role(f"model.layers.{layer}.input_layernorm.weight").layer for layer in (0, 1, 10, 100)] == [
        0,
        1,
        10,
        100,
    ]
    assert spec.role("mtp.layers.0.input_layernorm.weight") == PlainName(layer=-1)
    assert spec.role("encoder.model.layers.0.input_layernorm.weight") == PlainName(layer=-1)
    assert spec.role("model.layers.0") == PlainName(layer=-1)


UNDECLARED = [
    "mtp.layers.0.mlp.experts.0.gate_proj.weight",
    "mtp.layers.0.mlp.gate.weight",
    "model.language_model.layers.0.mlp.experts.gate_up_proj",
    "model.layers.0.mlp.experts.gate_up_proj",
    "model.layers.0.mlp.experts.0",
    "model.layers.0.mlp.gate.weight_scale_inv",
    "model.layers.0.mlp.gate.bias",
    "model.layers.0.mlp.router.weight",
    "model.layers.0.mlp.router_logits_scale",
    "model.layers.0.mlp.gating.weight",
    "model.layers.0.mlp.moe_statics.e_score_correction_bias",
    "model.layers.0.mlp.e_score_correction_bias",
    "model.layers.0.feed_forward.Experts.0.w1.weight",
    "model.layers.0.mlp.experts.01.gate_proj.weight",
    "model.layers.00.mlp.experts.1.gate_proj.weight",
    "model.layers.0.mlp.experts.\u0663.gate_proj.weight",
    "model.layers.0.mlp.experts.9999999999.gate_proj.weight",
    "model.layers." + "9" * 5000 + ".mlp.experts.1.gate_proj.weight",
]


@EVERY
@pytest.mark.parametrize("name", UNDECLARED)
def test_undeclared_expert_or_router_tensors_stop_by_name(model_type: str, name: str) -> None:
    """A tensor left at the old width, or a second name for one expert, would give a broken checkpoint."""
    with pytest.raises(LayoutError) as caught:
        ARCHITECTURES[model_type].role(name)
    assert repr(name) in caught.value.message
    assert model_type in caught.value.message
    assert "nothing was written" in caught.value.hint


@pytest.mark.parametrize(
    ("model_type", "name"),
    [
        ("qwen3_moe", "model.layers.0.mlp.shared_expert.up_proj.weight"),
        ("qwen3_moe", "model.layers.0.mlp.shared_expert_gate.weight"),
        ("qwen3_moe", "model.layers.0.mlp.gate.e_score_correction_bias"),
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
        ARCHITECTURES[model_type].role(name)


@EVERY
@settings(deadline=None)
@given(
    st.lists(
        st.sampled_from(["model", "layers", "0", "10", "mlp", "experts", "gate", "weight", "block_sparse_moe", "", "é"])
        | st.text(max_size=4),
        max_size=9,
    ).map(".".join)
)
def test_any_name_is_classified_or_refused(model_type: str, name: str) -> None:
    """No name gives another error, and a declared name keeps all of itself but the expert's number."""
    try:
        role = ARCHITECTURES[model_type].role(name)
    except LayoutError:
        return
    if isinstance(role, ExpertName):
        assert role.renumbered(role.expert) == name
        assert ARCHITECTURES[model_type].role(role.renumbered(5)).layer == role.layer
    elif isinstance(role, RouterName):
        assert name == f"model.layers.{role.layer}.{role.part}"
    else:
        assert "expert" not in name.removeprefix(f"model.layers.{role.layer}.").replace("shared_expert", "")


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
    assert ARCHITECTURES["deepseek_v3"].mtp_layers(config) == [61, 62]
    assert ARCHITECTURES["deepseek_v3"].mtp_layers({"num_hidden_layers": 61, "num_nextn_predict_layers": None}) == []
    assert ARCHITECTURES["qwen3_moe"].mtp_layers(config) == []


@pytest.mark.parametrize(
    ("model_type", "config", "why"),
    [
        ("mixtral", {}, "there is no num_hidden_layers"),
        ("mixtral", {"num_hidden_layers": "32"}, "num_hidden_layers is '32'"),
        ("mixtral", {"num_hidden_layers": True}, "num_hidden_layers is True"),
        ("mixtral", {"num_hidden_layers": -1}, "num_hidden_layers is -1"),
        ("mixtral", {"num_hidden_layers": 2.0}, "num_hidden_layers is 2.0"),
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
        [spec.moe_layers(config), spec.mtp_layers(config)]


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
        ("deepseek_v2", "did you mean 'deepseek_v3'"),
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
    """An installed entry point is found by its model type; one that is not a MoESpec is passed over."""
    info = tmp_path / "plug-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: plug\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[moeprune.architectures]\nnew_moe = moeprune_plug:SPEC\nodd_moe = moeprune_plug:ODD\n"
    )
    (tmp_path / "moeprune_plug.py").write_text(
        "from moeprune.architectures import MoESpec\n"
        "SPEC = MoESpec(model_type='new_moe', router={'mlp.router.weight': 0}, required_router=('mlp.router.weight',),"
        " count_keys=('num_experts',))\nODD = 'not a spec'\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    spec = resolve_architecture({"model_type": "new_moe"})
    assert isinstance(spec, MoESpec)
    assert spec.role("model.layers.0.mlp.router.weight") == RouterName(layer=0, part="mlp.router.weight", axis=0)
    with pytest.raises(UnsupportedModelError, match="unknown model_type 'odd_moe'"):
        resolve_architecture({"model_type": "odd_moe"})
