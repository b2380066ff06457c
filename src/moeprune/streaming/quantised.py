"""Quantised weights, decoded one at a time: what the files store for a weight, and the numbers that it stands for.

A :class:`Scheme` groups the tensors of a checkpoint by the weight that a plain model would have, and decodes such a
group on its device with arithmetic in float32. Which modules a config leaves unquantised is never read: a weight
without companions is plain. What no scheme can read is refused by name; nothing is guessed.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Set
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from moeprune.errors import CheckpointError, UnsupportedModelError

if TYPE_CHECKING:
    import torch

Shape = tuple[int, ...]

# Scales of activations and of the KV cache, and the shape of a packed weight, which its words tell already.
_NOT_DECODED = re.compile(
    r".+(?:[._](?:input|output|activation)_(?:global_)?scale|\.[qkv](?:_global)?_scale"
    r"|[._](?:input|output)_zero_point|\.[qkv]_zero_point|\.weight_shape)"
)
_UNPACKED = ("float-quantized", "int-quantized", "naive-quantized")  # formats with one element per weight
_STRATEGIES = ("tensor", "channel", "group", "block", None)  # None: as the shapes of the scales say
# Values of the 16 codes of FP4 (E2M1): the upper eight are the lower ones with a minus sign.
_FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)


class Scheme(Protocol):
    """How one quantisation method stores a weight."""

    @property
    def name(self) -> str:
        """The method as people call it."""

    def parts(self, names: Collection[str]) -> dict[str, dict[str, str]]:
        """Group the tensors of a checkpoint, or of some of its modules, by weight.

        Args:
            names: names on disk; all tensors of a module together.

        Returns:
            By the name that a plain model would store a weight under, its tensors: role -> name on disk. What is not
            quantised maps to ``{"": name}``; what no weight needs, such as the scales of activations, is left out.

        Raises:
            CheckpointError: a weight lacks a tensor.
        """

    def shape(self, stored: Mapping[str, Shape]) -> Shape:
        """Shape of a weight from the shapes of its tensors, by role.

        Raises:
            CheckpointError: the shapes do not fit each other.
        """

    def decode(self, stored: Mapping[str, torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
        """The weight in ``dtype`` on the device of its tensors, which are given by role.

        Besides the result it takes memory for one matrix in float32, however many matrices are stacked.

        Raises:
            CheckpointError: shapes or types that do not fit each other.
        """


def scheme_of(config: Mapping[str, Any]) -> Scheme | None:
    """How a checkpoint's weights are quantised; None when they are not.

    Args:
        config: ``config.json``; the quantiser's settings may also lie in its ``text_config``.

    Raises:
        UnsupportedModelError: they are quantised in a way that cannot be decoded here.

    Example:
        >>> scheme_of({"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}).name
        'fp8'
    """
    settings = quantiser_of(config)
    if settings is None:
        return None
    method = method_of(settings)
    if method == "fp8":
        return _fp8(settings)
    if method == "compressed-tensors":
        return _compressed_tensors(settings)
    if method == "mxfp4":
        return Mxfp4()
    raise _refusal(method)


def _refusal(method: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"weights that are quantised by {method} cannot be read layer by layer",
        "dequantise the checkpoint first, or load it whole with --no-stream where transformers can",
    )


# --- the quantiser's settings -----------------------------------------------------------------------------------------


def method_of(settings: Mapping[str, Any]) -> str:
    """Name of the method in a quantiser's settings."""
    unnamed = "bitsandbytes" if "load_in_4bit" in settings else "a method without a name"
    return str(settings.get("quant_method") or unnamed)


def quantiser_of(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """What config.json says about quantisation, wherever it says it."""
    for section in (config, config.get("text_config")):
        for key in ("quantization_config", "compression_config"):
            value = section.get(key) if isinstance(section, Mapping) else None
            if value:
                inner = _object(value, key)
                return _object(inner.get("quantization_config", inner), key)
    return None


def _object(value: Any, key: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise UnsupportedModelError(f"config.json: {key} is {value!r}, where an object is needed")
    return value


def _block(value: Any, key: str) -> tuple[int, int]:
    """Rows and columns of a block: ``[128, 128]``, or ``"128x128"`` as older files write it."""
    sizes = value.split("x") if isinstance(value, str) else value
    try:
        rows, columns = map(int, sizes)
    except (TypeError, ValueError):
        rows = columns = 0
    if min(rows, columns) < 1:
        raise UnsupportedModelError(f"config.json: {key} is {value!r}, where two sizes are needed")
    return rows, columns


def _fp8(settings: Mapping[str, Any]) -> Scheme:
    if settings.get("expert_dtype", "fp8") != "fp8":
        raise _refusal(f"fp8 with {settings['expert_dtype']} experts")
    size = settings.get("weight_block_size", (128, 128))
    block = None if size is None else _block(size, "weight_block_size")
    return Scaled(name="fp8", companion=re.compile(r"(.+)_(scale)_inv"), block=block)


def _compressed_tensors(settings: Mapping[str, Any]) -> Scheme:
    """One scheme for all groups of a config: which group a weight is of shows in its tensors."""
    sparsity = _object(settings.get("sparsity_config") or {}, "sparsity_config").get("format", "dense")
    if sparsity != "dense":
        raise _refusal(f"compressed-tensors {sparsity}")
    if settings.get("transform_config"):
        raise _refusal("compressed-tensors with transforms")
    groups = list(_weight_groups(settings))
    bits = {weights["num_bits"] for form, weights in groups if form == "pack-quantized"}
    blocks = {
        _block(weights.get("block_structure"), "block_structure")
        for _, weights in groups
        if weights.get("strategy") == "block"
    }
    if len(bits) > 1 or len(blocks) > 1:
        raise _refusal("compressed-tensors with groups of several bit widths or block sizes")
    return Scaled(
        name="compressed-tensors",
        companion=re.compile(r"(.+\.weight)_(packed|scale|zero_point|g_idx)"),
        block=next(iter(blocks), None),
        bits=next(iter(bits), None),
        integers=any(form in _UNPACKED and weights["type"] == "int" for form, weights in groups),
    )


def _weight_groups(settings: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Format and settings of each group of a config whose weights are quantised, and can be decoded."""
    for group in _object(settings.get("config_groups") or {}, "config_groups").values():
        weights = _object(_object(group, "config_groups").get("weights") or {}, "weights")
        if not weights:  # only activations
            continue
        form = group.get("format") or settings.get("format")
        bits, kind, strategy = (weights.get(key) for key in ("num_bits", "type", "strategy"))
        packed = form == "pack-quantized" and kind == "int" and bits in (2, 4, 8)
        unpacked = form in _UNPACKED and kind in ("int", "float") and bits == 8
        if not (packed or unpacked) or strategy not in _STRATEGIES:
            raise _refusal(f"compressed-tensors {form} ({bits}-bit {kind}, scales by {strategy})")
        yield str(form), weights


# --- the schemes ------------------------------------------------------------------------------------------------------


def _parts(
    names: Collection[str], companion: re.Pattern[str], complete: Callable[[Set[str]], bool]
) -> dict[str, dict[str, str]]:
    """Group names by the weight and role that ``companion`` finds in them; the rest are weights themselves."""
    found: dict[str, dict[str, str]] = {}
    for name in names:
        match = companion.fullmatch(name)
        if match:
            found.setdefault(match[1], {})[match[2]] = name
        elif not _NOT_DECODED.fullmatch(name):
            found.setdefault(name, {})["weight"] = name
    for weight, roles in found.items():
        if roles.keys() == {"weight"}:
            found[weight] = {"": weight}
        elif not complete(roles.keys()):
            there = ", ".join(sorted(roles.values()))
            raise CheckpointError(f"{weight} cannot be decoded from {there} alone", "is the checkpoint complete?")
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Scaled:
    """Codes of 8 bits or fewer times scales: block FP8 and the formats of compressed-tensors.

    A scale stands for the whole weight, for a row, for a group of columns in a row, or for a block. Which of these it
    is shows in its shape, apart from the size of blocks: the last row and column of them may be cut short.

    Attributes:
        name: the method.
        companion: matches a companion's name; its groups are the weight's name and the companion's role.
        block: rows and columns of a block, where the config names them.
        bits: size of the codes that ``packed`` weights hold in each 32-bit word, the first in the lowest bits.
        integers: whether weights that are not packed may be int8.
    """

    name: str
    companion: re.Pattern[str]
    block: tuple[int, int] | None = None
    bits: int | None = None
    integers: bool = False

    def parts(self, names: Collection[str]) -> dict[str, dict[str, str]]:
        """See :meth:`Scheme.parts`."""
        return _parts(names, self.companion, lambda roles: "scale" in roles and len({"weight", "packed"} & roles) == 1)

    def shape(self, stored: Mapping[str, Shape]) -> Shape:
        """See :meth:`Scheme.shape`."""
        if "" in stored:
            return stored[""]
        shape = stored["weight"] if "weight" in stored else self._unpacked_shape(stored["packed"])
        grid = _grid(stored["scale"])
        _span(shape, grid, self.block)
        words = math.ceil(shape[-2] * (self.bits or 32) / 32)  # of zero points, which are packed down the rows
        fitting = {"zero_point": (stored["scale"], (*shape[:-2], words, grid[-1])), "g_idx": (shape[-1:],)}
        for role, shapes in fitting.items():
            if role in stored and stored[role] not in shapes:
                raise CheckpointError(f"a {role} of shape {stored[role]} does not fit a weight of shape {shape}")
        return shape

    def _unpacked_shape(self, packed: Shape) -> Shape:
        """Rows that do not fill their last word come out too wide, and then fit no model."""
        if self.bits is None or not packed:
            raise CheckpointError("there are packed weights, of which config.json says nothing")
        return (*packed[:-1], packed[-1] * 32 // self.bits)

    def decode(self, stored: Mapping[str, torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
        """See :meth:`Scheme.decode`."""
        if "" in stored:
            return _plain(stored[""], dtype)
        return _each_matrix(self._matrix, stored, self.shape(_shapes(stored)), dtype)

    def _matrix(self, stored: Mapping[str, torch.Tensor]) -> torch.Tensor:
        import torch

        values = self._codes(stored)
        grid = _grid(tuple(stored["scale"].shape))
        span = _span(tuple(values.shape), grid, self.block)
        scales, zeros = _scales(stored["scale"]).reshape(grid), self._zeros(stored, len(values), grid)
        order = _order(stored, grid[-1])
        if order is not None:
            span, scales = (1, 1), scales[:, order]
            zeros = None if zeros is None else zeros[:, order]
        if zeros is not None:
            _by_block(torch.Tensor.sub_, values, zeros, span)
        _by_block(torch.Tensor.mul_, values, scales, span)
        return values

    def _codes(self, stored: Mapping[str, torch.Tensor]) -> torch.Tensor:
        import torch

        if "packed" in stored:
            return _unpack(stored["packed"], self.bits or 8)
        codes = stored["weight"]
        if not (codes.is_floating_point() or (self.integers and codes.dtype == torch.int8)) or codes.element_size() > 1:
            raise CheckpointError(f"a weight of {codes.dtype} has scales, which belong to quantised ones")
        return codes.float()

    def _zeros(self, stored: Mapping[str, torch.Tensor], rows: int, grid: Shape) -> torch.Tensor | None:
        """Zero points in the layout of the scales."""
        import torch

        zeros = stored.get("zero_point")
        if zeros is None:
            return None
        if "packed" in stored and zeros.dtype == torch.int32:
            return _unpack(zeros.T, self.bits or 8)[:, :rows].T
        return zeros.float().reshape(grid)


@dataclass(frozen=True, slots=True, kw_only=True)
class Mxfp4:
    """MXFP4 as gpt-oss has it: FP4 codes, two to a byte, in blocks of 32 that share a power of two.

    The files hold [outputs, inputs / 32, 16] per expert, the plain model [inputs, outputs].
    """

    name: str = "mxfp4"

    def parts(self, names: Collection[str]) -> dict[str, dict[str, str]]:
        """See :meth:`Scheme.parts`."""
        return _parts(names, re.compile(r"(.+)_(blocks|scales)"), lambda roles: roles == {"blocks", "scales"})

    def shape(self, stored: Mapping[str, Shape]) -> Shape:
        """See :meth:`Scheme.shape`."""
        if "" in stored:
            return stored[""]
        blocks, scales = stored["blocks"], stored["scales"]
        if len(blocks) not in (3, 4) or blocks[-1] != 16 or scales != blocks[:-1]:
            raise CheckpointError(f"scales of shape {scales} do not fit blocks of shape {blocks}")
        *stack, outputs, groups, size = blocks
        return (*stack, groups * size * 2, outputs)

    def decode(self, stored: Mapping[str, torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
        """See :meth:`Scheme.decode`."""
        if "" in stored:
            return _plain(stored[""], dtype)
        return _each_matrix(self._matrix, stored, self.shape(_shapes(stored)), dtype)

    @staticmethod
    def _matrix(stored: Mapping[str, torch.Tensor]) -> torch.Tensor:
        import torch

        blocks = stored["blocks"]
        if blocks.dtype != torch.uint8:
            raise CheckpointError(f"blocks of {blocks.dtype}, where bytes are needed")
        values = torch.nn.functional.embedding(blocks.int(), _fp4_pairs(blocks.device)).flatten(-2)  # [R, C / 32, 32]
        return values.mul_(_scales(stored["scales"]).unsqueeze(-1)).flatten(-2).T


# --- arithmetic -------------------------------------------------------------------------------------------------------


def _shapes(stored: Mapping[str, torch.Tensor]) -> dict[str, Shape]:
    return {role: tuple(tensor.shape) for role, tensor in stored.items()}


def _plain(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    if not tensor.is_floating_point() or tensor.element_size() < 2:
        raise CheckpointError(f"a weight of {tensor.dtype} has no scales")
    return tensor.to(dtype)


def _each_matrix(
    decode: Callable[[Mapping[str, torch.Tensor]], torch.Tensor],
    stored: Mapping[str, torch.Tensor],
    shape: Shape,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Decode a stack matrix by matrix, so that only one is ever there in float32."""
    import torch

    if len(shape) == 2:
        return decode(stored).to(dtype, memory_format=torch.contiguous_format)
    result = torch.empty(shape, dtype=dtype, device=next(iter(stored.values())).device)
    for index, matrix in enumerate(result):
        matrix.copy_(decode({role: tensor[index] for role, tensor in stored.items()}))
    return result


def _grid(scale: Shape) -> Shape:
    """Shape of the scales with rows and columns; older files leave out an axis of length 1."""
    return (*scale, *(1,) * (2 - len(scale)))


def _order(stored: Mapping[str, torch.Tensor], groups: int) -> torch.Tensor | None:
    """The group of each column, where they do not lie in order: all -1 says that they do."""
    if "g_idx" not in stored or int(stored["g_idx"].min()) < 0:
        return None
    order = stored["g_idx"].long()
    if int(order.max()) >= groups:
        raise CheckpointError(f"a g_idx names group {int(order.max())} of {groups}")
    return order


def _span(shape: Shape, grid: Shape, block: tuple[int, int] | None) -> tuple[int, int]:
    """Rows and columns of a weight that one scale stands for."""
    if len(shape) in (2, 3) and len(grid) == len(shape) and grid[:-2] == shape[:-2]:
        rows, columns = shape[-2:]
        if block is not None and grid[-2:] == (math.ceil(rows / block[0]), math.ceil(columns / block[1])):
            return block
        if grid[-2:] == (1, 1):
            return rows, columns
        if grid[-2] == rows and grid[-1] and columns % grid[-1] == 0:
            return 1, columns // grid[-1]
    raise CheckpointError(f"scales of shape {grid} do not fit a weight of shape {shape}")


def _tiles(size: int, length: int) -> Iterator[tuple[slice, slice]]:
    """Along an axis of a weight: the whole blocks, then the one that is cut short, each with its scales."""
    whole = size // length
    if whole:
        yield slice(0, whole * length), slice(0, whole)
    if size % length:
        yield slice(whole * length, size), slice(whole, whole + 1)


def _by_block(
    operation: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    values_RC: torch.Tensor,
    scales: torch.Tensor,
    span: tuple[int, int],
) -> None:
    """Combine each block of a matrix with its own scale, in place; the scales are never blown up to its size."""
    for rows, scale_rows in _tiles(values_RC.shape[0], span[0]):
        for columns, scale_columns in _tiles(values_RC.shape[1], span[1]):
            own, tile = scales[scale_rows, scale_columns], values_RC[rows, columns]
            blocks = tile.view(own.shape[0], len(tile) // own.shape[0], own.shape[1], tile.shape[1] // own.shape[1])
            operation(blocks, own[:, None, :, None])


def _unpack(words: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes of 32-bit words in float32, shifted to be symmetric about zero: [R, W] -> [R, W * 32 / bits]."""
    import torch

    if words.dtype != torch.int32:
        raise CheckpointError(f"packed weights of {words.dtype}, where int32 is needed")
    codes = torch.empty((*words.shape, 32 // bits), dtype=torch.float32, device=words.device)
    for number in range(32 // bits):
        codes[..., number] = (words >> (number * bits)) & ((1 << bits) - 1)
    return codes.flatten(-2).sub_(1 << (bits - 1))


def _scales(scales: torch.Tensor) -> torch.Tensor:
    """Scales in float32; bytes are exponents (E8M0): 127 stands for 1."""
    import torch

    if scales.dtype == torch.uint8:
        return torch.nn.functional.embedding(scales.int(), _powers(scales.device)).squeeze(-1)
    if not scales.is_floating_point():
        raise CheckpointError(f"scales of {scales.dtype}, where floating point is needed")
    return scales.float()


@functools.cache
def _powers(device: torch.device) -> torch.Tensor:
    """Values of the 256 bytes of E8M0 [256, 1]: from a table, since not every device has an exact power."""
    import torch

    values = [*(2.0**exponent for exponent in range(-127, 128)), math.nan]
    return torch.tensor(values, dtype=torch.float32, device=device).unsqueeze(-1)


@functools.cache
def _fp4_pairs(device: torch.device) -> torch.Tensor:
    """Values of the two FP4 codes of each byte [256, 2]: the lower four bits come first."""
    import torch

    pairs = [(_FP4[byte & 15], _FP4[byte >> 4]) for byte in range(256)]
    return torch.tensor(pairs, dtype=torch.float32, device=device)
