"""Which parameter of a model a tensor on disk fills: the only module that asks transformers' loader for names.

What it asks is private to transformers. Where that is not to be had, a tensor fills the parameter of its name, of its
name inside the layer or, within its layer, the only one left with the same last part of the name and the same shape.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from moeprune.architectures import ExpertName, StackedName
from moeprune.checkpoint import Checkpoint
from moeprune.errors import CheckpointError, UnsupportedModelError
from moeprune.headers import TensorEntry
from moeprune.streaming.quantised import Scheme

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """One weight on disk and the place that it fills.

    Attributes:
        parameter: name in the model.
        stored: the tensors that hold it by their role in the quantisation scheme; an unquantised weight is ``""``.
        expert: its row on the parameter's first axis, for a weight of one expert.
        part: how many weights of the same height stand above it in the parameter: gate 0, up 1.
        stacked: whether it holds all experts along its first axis.
    """

    parameter: str
    stored: Mapping[str, TensorEntry]
    expert: int | None = None
    part: int = 0
    stacked: bool = False


def pieces_of(
    checkpoint: Checkpoint, model: PreTrainedModel, experts: Mapping[int, str], scheme: Scheme | None, *, depth: int
) -> dict[int, list[Piece]]:
    """Every weight that the model needs, by decoder layer; -1 holds what is outside of the layers.

    Args:
        checkpoint: where the weights are.
        model: a skeleton.
        experts: name of the experts module in the model, by decoder layer.
        scheme: how the weights are quantised, if they are.
        depth: number of decoder layers.

    Raises:
        CheckpointError: a parameter would stay empty.
        UnsupportedModelError: transformers changes values, not names alone, when it loads a tensor.
    """
    pieces: dict[int, list[Piece]] = {layer: [] for layer in range(-1, depth)}
    plain: dict[int, dict[str, dict[str, TensorEntry]]] = {layer: {} for layer in range(-1, depth)}
    for name, stored in _weights(checkpoint, scheme):
        role = checkpoint.roles[next(iter(stored.values())).name]
        if role.layer >= depth:
            continue  # MTP layers, which transformers does not load
        if isinstance(role, ExpertName):
            part = name.removeprefix(role.renumbered(role.expert).removesuffix(role.after)).removesuffix(".weight")
            pieces[role.layer].append(_expert_piece(checkpoint, experts[role.layer], role.expert, part, stored))
        elif isinstance(role, StackedName):
            leaf = name.rpartition(".")[2]
            parameter = f"{experts[role.layer]}.{leaf}"
            pieces[role.layer].append(Piece(parameter=parameter, stored=stored, stacked=True))
        else:
            plain[role.layer][name] = stored
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    renamed = transformers_names(model, [name for names in plain.values() for name in names]) or {}
    wanted = _by_layer(shapes, _layer_prefix(experts), depth)
    for layer, names in plain.items():
        own = wanted[layer] - {piece.parameter for piece in pieces[layer]}
        found = _match(names, renamed, {name: shapes[name] for name in own}, scheme, layer)
        pieces[layer] += [Piece(parameter=target, stored=names[name]) for name, target in found.items()]
        _check_filled(checkpoint, model, wanted[layer], pieces[layer])
    return pieces


def _weights(checkpoint: Checkpoint, scheme: Scheme | None) -> Iterator[tuple[str, dict[str, TensorEntry]]]:
    """Name and stored tensors of every weight."""
    tensors = checkpoint.tensors
    if scheme is None:
        yield from ((name, {"": entry}) for name, entry in tensors.items())
    else:
        for name, parts in scheme.parts(tensors.keys()).items():
            yield name, {role: tensors[part] for role, part in parts.items()}


def _expert_piece(
    checkpoint: Checkpoint, module: str, expert: int, part: str, stored: Mapping[str, TensorEntry]
) -> Piece:
    gate, up, down = checkpoint.spec.projections
    homes = {gate: ("gate_up_proj", 0), up: ("gate_up_proj", 1), down: ("down_proj", 0)}
    if part not in homes:
        raise UnsupportedModelError(f"cannot tell what {part!r} of an expert is", "use --no-stream")
    parameter, position = homes[part]
    return Piece(parameter=f"{module}.{parameter}", stored=stored, expert=expert, part=position)


def _layer_prefix(experts: Mapping[int, str]) -> Callable[[int], str]:
    """Prefix of the names in the model of decoder layer i."""
    index, name = next(iter(experts.items()))
    before = name.partition(f".{index}.")[0]
    return lambda layer: f"{before}.{layer}."


def _by_layer(shapes: Collection[str], prefix: Callable[[int], str], depth: int) -> dict[int, set[str]]:
    layers: dict[int, set[str]] = {layer: set() for layer in range(-1, depth)}
    of_prefix = {prefix(layer): layer for layer in range(depth)}
    stem = prefix(0).removesuffix("0.")
    for name in shapes:
        head = stem + name.removeprefix(stem).partition(".")[0] + "." if name.startswith(stem) else ""
        layers[of_prefix.get(head, -1)].add(name)
    return layers


def _match(
    names: Mapping[str, Mapping[str, TensorEntry]],
    renamed: Mapping[str, str],
    wanted: Shapes,
    scheme: Scheme | None,
    layer: int,
) -> dict[str, str]:
    """Parameter by name on disk: by transformers' renaming, by the same name, or the only one that it can be."""
    found = {name: renamed.get(name, name) for name in names if renamed.get(name, name) in wanted}
    for like in (lambda name, _: _inside(name, layer), lambda name, shape: (name.rpartition(".")[2], shape)):
        filled = set(found.values())
        left: dict[Any, list[str]] = {}
        for target, shape in wanted.items():
            if target not in filled:
                left.setdefault(like(target, shape), []).append(target)
        for name in sorted(names.keys() - found.keys()):
            fitting = left.pop(like(name, _shape(names[name], scheme)), [])
            if len(fitting) == 1:
                found[name] = fitting[0]
    return found


def _inside(name: str, layer: int) -> str:
    """A name without what comes before its layer; outside of the layers its last two parts."""
    return name.partition(f".layers.{layer}.")[2] if layer >= 0 else ".".join(name.split(".")[-2:])


def _shape(stored: Mapping[str, TensorEntry], scheme: Scheme | None) -> tuple[int, ...]:
    if "" in stored:
        return stored[""].shape
    assert scheme is not None  # noqa: S101 - only a scheme gives roles
    return scheme.shape({role: entry.shape for role, entry in stored.items()})


def _check_filled(checkpoint: Checkpoint, model: PreTrainedModel, wanted: set[str], pieces: Sequence[Piece]) -> None:
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    empty = sorted(wanted - {piece.parameter for piece in pieces} - tied)
    if empty:
        raise CheckpointError(
            f"{checkpoint.path} lacks a tensor for {empty[0]!r}",
            "is a shard missing? or load the whole model with --no-stream",
        )


def transformers_names(model: PreTrainedModel, names: Sequence[str]) -> dict[str, str] | None:
    """Parameter names by names on disk as transformers' own loader has them; None where it does not say.

    Raises:
        UnsupportedModelError: a tensor is not only renamed but computed from others.
    """
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

        mapping = get_model_conversion_mapping(model)
        renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        state = model.state_dict()
        prefix = model.base_model_prefix
        found = {name: rename_source_key(name, renamings, converters, prefix, state) for name in names}
    except (ImportError, AttributeError, TypeError):
        return None
    computed = sorted(name for name, (target, pattern) in found.items() if pattern is not None and target in state)
    if computed:
        raise UnsupportedModelError(
            f"transformers computes a parameter from {computed[0]!r} and others",
            "load the whole model with --no-stream",
        )
    return {name: target for name, (target, _) in found.items()}


def kept_in_float32(model: PreTrainedModel, dtype: torch.dtype) -> Callable[[str], bool]:
    """Whether transformers keeps the parameter of a name in float32 whatever ``dtype`` the model has."""
    import re

    plan: dict[str, Any] = {}
    try:
        plan = model._get_dtype_plan(dtype)  # noqa: SLF001 - nothing public says so
    except AttributeError:
        if dtype.itemsize == 2:
            plan = dict.fromkeys(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
    pattern = "|".join(rf"(?:^|\.){re.escape(name)}(?:\.|$)" for name in plan)
    return lambda name: bool(pattern) and re.search(pattern, name) is not None
