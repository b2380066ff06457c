"""Quantised weights are decoded to the numbers that the libraries that wrote them, and transformers, decode them to."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeprune.errors import CheckpointError
from moeprune.streaming.quantised import Scheme, scheme_of

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

# Written and decoded by compressed-tensors 0.20.0: for each case a QuantizationScheme made its random [12, 64] weight,
# bf16 scales and zero points into what `BaseCompressor.compress` returns, and `decompress` made that into `decoded`.
# The case's config is in the file's metadata.
GOLDEN = Path(__file__).parent.parent / "fixtures" / "compressed_tensors" / "golden.safetensors"
CASES = (
    "int4 by group",
    "int4 by group with zero points",
    "int4 by row",
    "int8 by row with zero points",
    "unpacked int8 by row with zero points",
    "fp8 by row",
    "fp8 by tensor",
    "fp8 by block",
)


def scheme(method: str, **settings: Any) -> Scheme:
    """The scheme of a checkpoint with these settings."""
    found = scheme_of({"quantization_config": {"quant_method": method} | settings})
    assert found is not None
    return found


def packed_scheme(bits: int) -> Scheme:
    """Packed integers of compressed-tensors."""
    weights = {"num_bits": bits, "type": "int", "strategy": "group"}
    return scheme("compressed-tensors", format="pack-quantized", config_groups={"group_0": {"weights": weights}})


def group_tensors(found: Scheme, tensors: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
    """The tensors of each weight by role."""
    for weight, parts in found.parts(tensors.keys()).items():
        yield weight, {role: tensors[name] for role, name in parts.items()}


# --- by hand ----------------------------------------------------------------------------------------------------------


def test_blocks_are_cut_short_at_the_edges() -> None:
    """A 3 x 5 weight in blocks of 2 x 3 has four scales, whole blocks or not."""
    import torch

    weight = torch.tensor([[1, 2, 3, 4, 5], [-1, -2, -3, -4, -5], [8, 8, 8, 8, 8]]).to(torch.float8_e4m3fn)
    scale = torch.tensor([[1.0, 10.0], [0.5, 0.25]])
    decoded = scheme("fp8", weight_block_size=[2, 3]).decode({"weight": weight, "scale": scale}, torch.float32)
    assert decoded.tolist() == [[1, 2, 3, 40, 50], [-1, -2, -3, -40, -50], [4, 4, 4, 2, 2]]


def test_products_are_rounded_once() -> None:
    """A product that bf16 holds only rounded is computed in float32, and exact there."""
    import torch

    stored = {
        "weight": torch.tensor([[1.125]]).to(torch.float8_e4m3fn),
        "scale": torch.tensor([[1.0078125]]).bfloat16(),
    }
    product = 1.125 * 1.0078125
    assert scheme("fp8").decode(stored, torch.float32).item() == product
    assert scheme("fp8").decode(stored, torch.bfloat16).item() == torch.tensor(product).bfloat16().item() != product


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float8_e8m0fnu", "uint8"])
def test_scales_may_be_stored_in_several_types(dtype: str) -> None:
    """Powers of two are the same in each of them; bytes are exponents."""
    import torch

    scale = torch.tensor([[4.0, 0.125]])
    stored = torch.tensor([[129, 124]], dtype=torch.uint8) if dtype == "uint8" else scale.to(getattr(torch, dtype))
    weight = torch.tensor([[3.0, 5.0]]).to(torch.float8_e4m3fn)
    decoded = scheme("fp8", weight_block_size=[1, 1]).decode({"weight": weight, "scale": stored}, torch.bfloat16)
    assert decoded.tolist() == [[12.0, 0.625]]


def test_every_exponent_has_its_power_of_two() -> None:
    """Bytes mean what torch's own type for them means, down to the smallest and up to the one that is no number."""
    import torch

    codes = torch.arange(256, dtype=torch.uint8).unsqueeze(0)
    weight = torch.ones(1, 256).to(torch.float8_e4m3fn)
    decoded = scheme("fp8", weight_block_size=[1, 1]).decode({"weight": weight, "scale": codes}, torch.float32)
    assert torch.equal(decoded[0, :255], codes[0, :255].view(torch.float8_e8m0fnu).float())
    assert decoded[0, 255].isnan()


@pytest.mark.parametrize("zeros", ["none", "packed", "unpacked"])
def test_int4_codes_come_lowest_bits_first(zeros: str) -> None:
    """0 to 15 stand for -8 to 7; a zero point is taken off before the scale, packed down the rows or not."""
    import torch

    words = torch.tensor([[0x76543210, 0xFEDCBA98], [0x76543210, 0]]).to(torch.int32)
    stored = {"packed": words, "scale": torch.tensor([[2.0, 1.0], [0.5, 3.0]])}
    points = np.array([[0, 0], [0, 0]])
    if zeros != "none":
        points = np.array([[3, -8], [7, -1]])
        whole = torch.tensor([[(3 + 8) | (7 + 8) << 4, 0 | (-1 + 8) << 4]], dtype=torch.int32)
        stored["zero_point"] = whole if zeros == "packed" else torch.from_numpy(points).to(torch.int8)
    codes = np.array([[*range(-8, 8)], [*range(-8, 0), *([-8] * 8)]])
    scales, points = (values.repeat(8, 1) for values in (stored["scale"].numpy(), points))
    decoded = packed_scheme(4).decode(stored, torch.float32)
    assert np.array_equal(decoded.numpy(), (codes - points) * scales)


@pytest.mark.parametrize("dtype", ["int8", "int32"])
def test_zero_points_of_unpacked_weights_are_not_packed(dtype: str) -> None:
    """One per row, in whatever type."""
    import torch

    weights = {"num_bits": 8, "type": "int", "strategy": "channel"}
    found = scheme("compressed-tensors", format="int-quantized", config_groups={"group_0": {"weights": weights}})
    stored = {"weight": torch.tensor([[-128, 127], [0, 1]], dtype=torch.int8), "scale": torch.tensor([[0.5], [2.0]])}
    stored["zero_point"] = torch.tensor([[-8], [3]]).to(getattr(torch, dtype))
    assert found.decode(stored, torch.float32).tolist() == [[-60.0, 67.5], [-6.0, -4.0]]


@pytest.mark.parametrize("points", [False, True])
def test_columns_may_name_their_group(points: bool) -> None:
    """The order that activations gave is followed for scales and zero points; all -1 means that there is none."""
    import torch

    stored = {"packed": torch.tensor([[0x11111111]], dtype=torch.int32), "scale": torch.tensor([[1.0, 2.0]])}
    if points:
        stored["zero_point"] = torch.tensor([[-7, -4]], dtype=torch.int8)
    values = [0.0, -6.0] if points else [-7.0, -14.0]
    order = torch.tensor([1, 0, 0, 1, 1, 0, 1, 0], dtype=torch.int32)
    found = packed_scheme(4)
    decoded = found.decode(stored | {"g_idx": order}, torch.float32)
    assert decoded.tolist() == [[values[group] for group in order.tolist()]]
    none = found.decode(stored | {"g_idx": torch.full((8,), -1, dtype=torch.int32)}, torch.float32)
    assert none.tolist() == [[values[0]] * 4 + [values[1]] * 4]
    with pytest.raises(CheckpointError, match="names group 2 of 2"):
        found.decode(stored | {"g_idx": order + 1}, torch.float32)


@given(
    st.tuples(st.integers(1, 9), st.integers(1, 9)),
    st.tuples(st.integers(1, 4), st.integers(1, 4)),
    st.integers(1, 3),
)
def test_every_element_meets_the_scale_of_its_block(size: tuple[int, int], block: tuple[int, int], stack: int) -> None:
    """Whatever the sizes, for one weight and for each of a stack."""
    import torch

    rows, columns = (np.arange(length) // step for length, step in zip(size, block, strict=True))
    grid = (stack, rows[-1] + 1, columns[-1] + 1)
    scale = np.arange(1.0, 1 + math.prod(grid)).reshape(grid)
    weight = np.random.default_rng(0).integers(-8, 9, (stack, *size))
    stored = {"weight": torch.from_numpy(weight).to(torch.float8_e4m3fn), "scale": torch.from_numpy(scale).float()}
    found = scheme("fp8", weight_block_size=list(block))
    decoded = found.decode(stored, torch.float32)
    assert np.array_equal(decoded.numpy(), weight * scale[:, rows][:, :, columns])
    assert found.shape({role: tuple(tensor.shape) for role, tensor in stored.items()}) == tuple(decoded.shape)
    one = found.decode({role: tensor[-1] for role, tensor in stored.items()}, torch.float32)
    assert torch.equal(one, decoded[-1])


def test_what_is_not_quantised_is_only_cast() -> None:
    """Also in a quantised checkpoint, and by every scheme."""
    import torch

    norm = torch.tensor([1.0, 0.5])
    for found in (scheme("fp8"), scheme("mxfp4"), packed_scheme(4)):
        assert found.decode({"": norm}, torch.bfloat16).equal(norm.bfloat16())


@pytest.mark.parametrize(
    ("method", "dtypes", "message"),
    [
        ("fp8", {"": "float8_e4m3fn"}, "has no scales"),
        ("fp8", {"": "int32"}, "has no scales"),
        ("fp8", {"weight": "bfloat16", "scale": "float32"}, "which belong to quantised ones"),
        ("fp8", {"weight": "int8", "scale": "float32"}, "which belong to quantised ones"),
        ("fp8", {"weight": "float8_e4m3fn", "scale": "int32"}, "where floating point is needed"),
        ("int4", {"packed": "int64", "scale": "bfloat16"}, "where int32 is needed"),
        ("mxfp4", {"blocks": "int8", "scales": "uint8"}, "where bytes are needed"),
    ],
)
def test_types_that_do_not_belong_are_an_error(method: str, dtypes: dict[str, str], message: str) -> None:
    """Nothing is decoded from numbers of another kind than the scheme's."""
    import torch

    shapes = {"": (8, 8), "weight": (8, 8), "scale": (8, 1), "packed": (8, 1), "blocks": (8, 1, 16), "scales": (8, 1)}
    stored = {role: torch.zeros(shapes[role]).to(getattr(torch, dtype)) for role, dtype in dtypes.items()}
    found = packed_scheme(4) if method == "int4" else scheme(method)
    with pytest.raises(CheckpointError, match=message):
        found.decode(stored, torch.bfloat16)


def test_a_stack_is_decoded_one_matrix_at_a_time() -> None:
    """However many experts are in it, no more than one of them is ever there in float32."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, call: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
            nonlocal largest
            result = call(*arguments, **(options or {}))
            if isinstance(result, torch.Tensor) and result.dtype == torch.float32:
                largest = max(largest, result.numel())
            return result

    blocks = torch.zeros(7, 10, 2, 16, dtype=torch.uint8)
    fp8 = torch.zeros(7, 100, 50).to(torch.float8_e4m3fn)
    stacks = [
        (scheme("mxfp4"), {"blocks": blocks, "scales": blocks[..., 0]}, 10 * 64),
        (scheme("fp8", weight_block_size=[8, 8]), {"weight": fp8, "scale": torch.zeros(7, 13, 7)}, 100 * 50),
    ]
    for found, stored, matrix in stacks:
        largest = 0
        with Watch():
            found.decode(stored, torch.bfloat16)
        assert largest == matrix


# --- against the libraries that wrote them ----------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_compressed_tensors_decodes_to_the_same_numbers(case: str) -> None:
    """Packed and unpacked, by tensor, row, group and block, with and without zero points: equal bits."""
    import torch
    from safetensors import safe_open
    from safetensors.torch import load_file

    with safe_open(GOLDEN, "pt") as file:
        found = scheme_of({"quantization_config": json.loads(file.metadata()[case])})
    assert found is not None
    tensors = {
        name.replace("/", "."): tensor for name, tensor in load_file(GOLDEN).items() if name.startswith(f"{case}/")
    }
    expected = tensors.pop(f"{case}.decoded")
    [(weight, stored)] = group_tensors(found, tensors)
    assert weight == f"{case}.weight"
    decoded = found.decode(stored, torch.bfloat16)
    assert torch.equal(decoded, expected)
    assert len(decoded.unique()) > 100  # the case says something


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_mxfp4_decodes_to_the_numbers_of_transformers(dtype: str) -> None:
    """Every pair of codes with every exponent, in the layout of the plain model: equal bits, -0 included."""
    import torch
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    codes, exponents = torch.arange(256, dtype=torch.uint8), torch.arange(255, dtype=torch.uint8)
    blocks = codes.view(2, 8, 1, 16).expand(2, 8, 255, 16).contiguous()
    scales = exponents.expand(2, 8, 255).contiguous()
    kind, bits = getattr(torch, dtype), torch.int32 if dtype == "float32" else torch.int16
    expected = convert_moe_packed_tensors(blocks, scales, dtype=kind)
    decoded = scheme("mxfp4").decode({"blocks": blocks, "scales": scales}, kind)
    assert torch.equal(decoded.view(bits), expected.view(bits))
    one = scheme("mxfp4").decode({"blocks": blocks[1], "scales": scales[1]}, kind)
    assert torch.equal(one.view(bits), expected[1].view(bits))


# --- whole checkpoints ------------------------------------------------------------------------------------------------

Change = Callable[[str, "torch.Tensor"], "dict[str, torch.Tensor]"]


def rewritten(base: Path, folder: Path, change: Change, config: Mapping[str, Any]) -> Path:
    """A copy of a checkpoint in one file with other tensors in the place of each."""
    from safetensors.torch import load_file, save_file

    folder.mkdir()
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(base.glob("*.safetensors")):
        for name, tensor in load_file(file).items():
            tensors |= change(name, tensor)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    shutil.copy(base / "generation_config.json", folder)
    return folder


def decoded_by_us(quantised: Path, folder: Path) -> Path:
    """The plain bf16 checkpoint that the scheme makes of a quantised one."""
    import torch
    from safetensors.torch import load_file, save_file

    config = json.loads((quantised / "config.json").read_text())
    found = scheme_of(config)
    assert found is not None
    plain = {}
    for weight, stored in group_tensors(found, load_file(quantised / "model.safetensors")):
        dtype = torch.float32 if weight.endswith("e_score_correction_bias") else torch.bfloat16
        plain[weight] = found.decode(stored, dtype)
        assert found.shape({role: tuple(tensor.shape) for role, tensor in stored.items()}) == tuple(plain[weight].shape)
    folder.mkdir()
    save_file(plain, folder / "model.safetensors", metadata={"format": "pt"})
    config.pop("quantization_config")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def load(folder: Path, **options: Any) -> PreTrainedModel:
    """The model in bf16, which must lack nothing."""
    import torch
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, output_loading_info=True, **options
    )
    assert not info["missing_keys"]
    assert not info["mismatched_keys"]
    assert all(name.startswith("model.layers.3.") for name in info["unexpected_keys"])  # the MTP layer
    return model.eval()


def assert_same(ours: PreTrainedModel, theirs: PreTrainedModel) -> None:
    """Two models have the same weights and logits, bit for bit."""
    import torch

    own, others = ours.state_dict(), theirs.state_dict()
    assert own.keys() == others.keys()
    assert [name for name, tensor in own.items() if not torch.equal(tensor, others[name])] == []
    ids = torch.randint(0, 97, (2, 16), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits = ours(ids).logits
        assert torch.equal(logits, theirs(ids).logits)
    assert logits.isfinite().all()
    assert logits.std() > 0.01


@pytest.mark.parametrize("scales", ["float32", "bfloat16", "float8_e8m0fnu"])
def test_a_block_fp8_deepseek_is_the_one_that_transformers_loads(
    scales: str, checkpoint_of: Callable[..., Path], tmp_path: Path
) -> None:
    """Attention, dense layers, experts and MTP layer in blocks of 128 x 128: logits equal to the bit."""
    import torch
    from transformers import FineGrainedFP8Config

    sizes = {"hidden_size": 256, "moe_intermediate_size": 128, "intermediate_size": 384, "dtype": "bfloat16"}
    base = checkpoint_of("deepseek_v3", **sizes, n_routed_experts=8, n_group=2, topk_group=1, num_experts_per_tok=2)
    torch.manual_seed(1)

    def blocks(name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        if "_proj" not in name or name.endswith("eh_proj.weight"):
            return {name: tensor}
        scale = (torch.rand([math.ceil(size / 128) for size in tensor.shape]) + 0.5).to(getattr(torch, scales))
        return {name: tensor.to(torch.float8_e4m3fn), f"{name}_scale_inv": scale}

    method = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
    config = json.loads((base / "config.json").read_text()) | {"quantization_config": method}
    quantised = rewritten(base, tmp_path / "fp8", blocks, config)
    theirs = load(quantised, quantization_config=FineGrainedFP8Config(dequantize=True))
    assert_same(load(decoded_by_us(quantised, tmp_path / "plain")), theirs)


def test_an_mxfp4_gpt_oss_is_the_one_that_transformers_loads(
    checkpoint_of: Callable[..., Path], tmp_path: Path
) -> None:
    """Stacks of transposed experts beside plain attention and biases: logits equal to the bit."""
    import torch
    from transformers import Mxfp4Config

    base = checkpoint_of("gpt_oss", hidden_size=64, intermediate_size=96, dtype="bfloat16")
    torch.manual_seed(1)

    def blocks(name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            return {name: tensor}
        experts, inputs, outputs = tensor.shape
        shape = (experts, outputs, inputs // 32)
        packed = torch.randint(0, 256, (*shape, 16), dtype=torch.uint8)
        return {f"{name}_blocks": packed, f"{name}_scales": torch.randint(118, 123, shape, dtype=torch.uint8)}

    method = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}
    config = json.loads((base / "config.json").read_text()) | {"quantization_config": method}
    quantised = rewritten(base, tmp_path / "mxfp4", blocks, config)
    theirs = load(quantised, quantization_config=Mxfp4Config(dequantize=True))
    assert_same(load(decoded_by_us(quantised, tmp_path / "plain")), theirs)
