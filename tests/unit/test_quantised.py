"""Which quantised checkpoints can be read, and which tensors belong to which weight: names and shapes only."""

from __future__ import annotations

from typing import Any

import pytest

from moeprune.errors import CheckpointError, UnsupportedModelError
from moeprune.streaming.quantised import Scheme, scheme_of

FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}
MXFP4 = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}


def group(form: str | None = None, **weights: Any) -> dict[str, Any]:
    """A group of compressed-tensors: 4-bit integers in groups, if nothing else is said."""
    settings = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": True} | weights
    return {"targets": ["Linear"], "weights": settings, "input_activations": None, "format": form}


def compressed(*groups: dict[str, Any], form: str = "pack-quantized", **more: Any) -> dict[str, Any]:
    """Settings of compressed-tensors."""
    named = {f"group_{number}": value for number, value in enumerate(groups)}
    return {"quant_method": "compressed-tensors", "format": form, "config_groups": named, "ignore": ["lm_head"]} | more


INT4 = compressed(group())
FP8_CHANNEL = group("float-quantized", num_bits=8, type="float", strategy="channel", group_size=None)


def scheme(settings: Any) -> Scheme:
    """The scheme of a checkpoint with these settings."""
    found = scheme_of({"model_type": "deepseek_v3", "quantization_config": settings})
    assert found is not None
    return found


@pytest.mark.parametrize("config", [{}, {"quantization_config": None}, {"text_config": {"quantization_config": {}}}])
def test_a_checkpoint_without_settings_is_plain(config: dict[str, Any]) -> None:
    """There is nothing to decode."""
    assert scheme_of(config) is None


@pytest.mark.parametrize(
    "config",
    [
        {"quantization_config": INT4},
        {"compression_config": INT4},
        {"text_config": {"quantization_config": INT4}},
        {"text_config": {"compression_config": {"quantization_config": INT4}}},
        {"quantization_config": INT4, "text_config": "of no use"},
    ],
)
def test_settings_are_found_wherever_files_have_them(config: dict[str, Any]) -> None:
    """At the top or in the text section, under either key, or one level further down."""
    found = scheme_of(config)
    assert found is not None
    assert found.name == "compressed-tensors"
    assert found.shape({"packed": (8, 4), "scale": (8, 1)}) == (8, 32)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"quant_method": "awq", "bits": 4}, "awq"),
        ({"quant_method": "gptq", "bits": 4}, "gptq"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "modelopt"),
        ({"quant_method": "torchao"}, "torchao"),
        ({"load_in_4bit": True}, "bitsandbytes"),
        ({"bits": 4}, "a method without a name"),
        (FP8 | {"expert_dtype": "fp4"}, "fp8 with fp4 experts"),
        (compressed(group(num_bits=4, type="float", strategy="tensor_group"), form="nvfp4-pack-quantized"), "nvfp4"),
        (compressed(group(num_bits=3)), "compressed-tensors pack-quantized (3-bit int"),
        (compressed(group(num_bits=8, type="float"), form="dense"), "compressed-tensors dense"),
        (compressed(group(num_bits=4), form="int-quantized"), r"compressed-tensors int-quantized (4-bit int"),
        (compressed(group(strategy="token")), "scales by token"),
        (compressed(group(), group(num_bits=8)), "several bit widths"),
        (compressed(group(), transform_config={"config_groups": {"u": {}}}), "transforms"),
        (compressed(group(), sparsity_config={"format": "sparse-24-bitmask"}), "sparse-24-bitmask"),
    ],
)
def test_other_methods_are_refused_by_name(settings: dict[str, Any], named: str) -> None:
    """The error says which method it is and what to do."""
    with pytest.raises(UnsupportedModelError) as error:
        scheme(settings)
    assert named in error.value.message
    assert "--no-stream" in error.value.hint


@pytest.mark.parametrize(
    "settings",
    [
        3,
        FP8 | {"weight_block_size": 128},
        FP8 | {"weight_block_size": [128, 0]},
        compressed(group()) | {"config_groups": [1]},
        compressed(group()) | {"config_groups": {"W4A16": ["Linear"]}},
        compressed(group(strategy="block", num_bits=8, type="float", form="float-quantized")),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: Any) -> None:
    """Nothing is guessed in their place."""
    with pytest.raises(UnsupportedModelError, match=r"is needed|are needed|cannot be read"):
        scheme(settings)


def test_block_fp8_names_are_joined() -> None:
    """A scale joins its weight, in single experts and in stacks; plain weights stay, activation scales go."""
    names = [
        "model.layers.3.mlp.experts.7.up_proj.weight_scale_inv",
        "model.layers.3.mlp.experts.7.up_proj.weight",
        "model.layers.3.mlp.experts.7.up_proj.activation_scale",
        "model.layers.3.mlp.experts.gate_up_proj",
        "model.layers.3.mlp.experts.gate_up_proj_scale_inv",
        "model.layers.3.mlp.gate.e_score_correction_bias",
        "model.layers.3.self_attn.k_scale",
    ]
    assert scheme(FP8).parts(names) == {
        "model.layers.3.mlp.experts.7.up_proj.weight": {"scale": names[0], "weight": names[1]},
        "model.layers.3.mlp.experts.gate_up_proj": {"weight": names[3], "scale": names[4]},
        names[5]: {"": names[5]},
    }


def test_compressed_tensors_names_are_joined() -> None:
    """Packed and unpacked weights of one checkpoint, with zero points and column order; what is no weight goes."""
    up, q = "model.layers.1.mlp.experts.0.up_proj.", "model.layers.1.self_attn.q_proj."
    packed = [f"{up}weight_{part}" for part in ("packed", "scale", "zero_point", "g_idx")]
    names = [*packed, f"{up}weight_shape", f"{q}weight", f"{q}weight_scale", f"{q}input_scale", f"{q}bias"]
    names += [f"{q}output_scale", f"{q}input_zero_point", f"{q}input_global_scale", f"{up}q_scale"]
    mixed = scheme(compressed(group("pack-quantized"), FP8_CHANNEL, form="mixed-precision"))
    assert mixed.parts(names) == {
        f"{up}weight": dict(zip(("packed", "scale", "zero_point", "g_idx"), packed, strict=True)),
        f"{q}weight": {"weight": f"{q}weight", "scale": f"{q}weight_scale"},
        f"{q}bias": {"": f"{q}bias"},
    }


def test_mxfp4_names_are_joined() -> None:
    """Blocks and scales make up the stack that the plain model has; biases are plain."""
    stack = "model.layers.0.mlp.experts.gate_up_proj"
    assert scheme(MXFP4).parts([f"{stack}_bias", f"{stack}_blocks", f"{stack}_scales"]) == {
        f"{stack}_bias": {"": f"{stack}_bias"},
        stack: {"blocks": f"{stack}_blocks", "scales": f"{stack}_scales"},
    }


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        (FP8, ["a.weight_scale_inv"]),
        (INT4, ["a.weight_packed"]),
        (INT4, ["a.weight_packed", "a.weight", "a.weight_scale"]),
        (INT4, ["a.weight", "a.weight_zero_point"]),
        (MXFP4, ["a_blocks"]),
        (MXFP4, ["a_scales", "a"]),
    ],
)
def test_a_weight_that_lacks_a_tensor_is_an_error(settings: dict[str, Any], names: list[str]) -> None:
    """It says which weight, and what there is."""
    with pytest.raises(CheckpointError, match=r"a.* cannot be decoded from a.* alone"):
        scheme(settings).parts([*names, "b.weight"])


@pytest.mark.parametrize(
    ("settings", "stored", "shape"),
    [
        (FP8, {"": (3, 4, 5)}, (3, 4, 5)),
        (FP8, {"weight": (576, 7168), "scale": (5, 56)}, (576, 7168)),
        (FP8, {"weight": (8, 256, 130), "scale": (8, 2, 2)}, (8, 256, 130)),
        (FP8 | {"weight_block_size": None}, {"weight": (64, 48), "scale": ()}, (64, 48)),
        (INT4, {"packed": (2048, 896), "scale": (2048, 224)}, (2048, 7168)),
        (INT4, {"packed": (12, 4), "scale": (12, 1), "zero_point": (2, 1), "g_idx": (32,)}, (12, 32)),
        (compressed(group(num_bits=8)), {"packed": (12, 4), "scale": (12, 1)}, (12, 16)),
        (compressed(FP8_CHANNEL), {"weight": (12, 5), "scale": (12, 1)}, (12, 5)),
        (compressed(FP8_CHANNEL), {"weight": (12, 5), "scale": (12,)}, (12, 5)),
        (compressed(FP8_CHANNEL), {"weight": (12, 5), "scale": (1,)}, (12, 5)),
        (MXFP4, {"blocks": (4, 10, 2, 16), "scales": (4, 10, 2)}, (4, 64, 10)),
        (MXFP4, {"blocks": (10, 2, 16), "scales": (10, 2)}, (64, 10)),
        (MXFP4, {"": (7,)}, (7,)),
    ],
)
def test_shapes_follow_from_those_of_the_tensors(
    settings: dict[str, Any], stored: dict[str, tuple[int, ...]], shape: tuple[int, ...]
) -> None:
    """One expert or a stack, whatever a scale stands for."""
    assert scheme(settings).shape(stored) == shape


@pytest.mark.parametrize(
    ("settings", "stored"),
    [
        (FP8, {"weight": (576, 7168), "scale": (4, 56)}),
        (FP8, {"weight": (8, 256, 130), "scale": (7, 2, 2)}),
        (FP8, {"weight": (8, 256, 130), "scale": ()}),
        (FP8, {"weight": (256,), "scale": (2,)}),
        (INT4, {"packed": (8, 4), "scale": (8, 3)}),
        (INT4, {"packed": (8, 4), "scale": (8, 0)}),
        (INT4, {"packed": (12, 4), "scale": (12, 1), "zero_point": (3, 1)}),
        (INT4, {"packed": (12, 4), "scale": (12, 1), "g_idx": (31,)}),
        (INT4, {"packed": (), "scale": (12, 1)}),
        (compressed(FP8_CHANNEL), {"packed": (12, 4), "scale": (12, 1)}),
        (MXFP4, {"blocks": (4, 10, 2, 16), "scales": (4, 10)}),
        (MXFP4, {"blocks": (4, 10, 2, 8), "scales": (4, 10, 2)}),
        (MXFP4, {"blocks": (2, 16), "scales": (2,)}),
    ],
)
def test_shapes_that_do_not_fit_are_an_error(settings: dict[str, Any], stored: dict[str, tuple[int, ...]]) -> None:
    """Before any byte of a weight is read."""
    with pytest.raises(CheckpointError, match=r"fit|config.json says nothing"):
        scheme(settings).shape(stored)
