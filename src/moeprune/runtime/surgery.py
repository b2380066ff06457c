"""Prune a loaded model in place, and save a loaded model with the names and the config of its base checkpoint."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moeprune._files import PathLike, begin_work, check_free_space, output_folder, to_json
from moeprune.checkpoint import Checkpoint, open_checkpoint
from moeprune.collectors.probe import expert_layers
from moeprune.errors import CheckpointError, PlanError
from moeprune.plans import PruningPlan, RouterShape, check_keep
from moeprune.rewrite.drop import (
    DEFAULT_SHARD_SIZE,
    PROVENANCE,
    check_output,
    check_plan,
    keep_lists,
    output_tensors,
)
from moeprune.rewrite.raw_config import edit_json
from moeprune.rewrite.shards import OutputTensor, Segment, copy_other_files, write_shards

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedModel


def prune_model(model: PreTrainedModel, plan: PruningPlan) -> PreTrainedModel:
    """Drop experts from a loaded model, in place.

    Expert tensors lose slices, the router loses the same rows and biases, and the config and modules get the new count.
    Make a new optimizer afterwards: parameters are replaced.

    Args:
        model: a loaded transformers model, on any device and in any dtype.
        plan: keep-lists for its MoE layers; MTP layers, which transformers does not load, are passed over.

    Returns:
        The same model.

    Raises:
        PlanError: the plan does not fit the model.

    Example:
        >>> plan = moeprune.plan("statistics.safetensors", "base", ratio=0.5)
        >>> moeprune.prune_model(model, plan)
    """
    layers = expert_layers(model)
    for layer in layers:
        if layer.index not in plan.layers:
            raise PlanError(f"the plan has no layer {layer.index}, the model has")
        check_keep(layer.index, plan.layers[layer.index].keep, _router_shape(model, layer.num_experts))
    for layer in layers:
        keep = plan.layers[layer.index].keep
        for module in (layer.experts, layer.router, model.get_submodule(_parent_name(model, layer.experts))):
            _slice_module(module, layer.num_experts, keep, recurse=module is layer.experts)
    for name, count in _counts(model.config, layers[0].num_experts).items():
        setattr(model.config, name, plan.kept if count == layers[0].num_experts else count)
    if getattr(model, "num_experts", None) == layers[0].num_experts:
        model.num_experts = plan.kept  # read by the load-balancing loss
    return model


def _router_shape(model: PreTrainedModel, num_experts: int) -> RouterShape:
    config = model.config.get_text_config()
    return RouterShape(
        num_experts=num_experts,
        top_k=int(config.num_experts_per_tok),
        n_group=int(getattr(config, "n_group", None) or 1),
        topk_group=int(getattr(config, "topk_group", None) or 1),
    )


def _parent_name(model: nn.Module, child: nn.Module) -> str:
    name: str = next(name for name, module in model.named_modules() if module is child)
    return name.rpartition(".")[0]


def _slice_module(module: nn.Module, num_experts: int, keep: tuple[int, ...], *, recurse: bool) -> None:
    """Keep some rows of every parameter and buffer that has one row per expert, and correct the module's own count."""
    import torch

    index = torch.tensor(keep)
    for owner in module.modules() if recurse else [module]:
        for name, value in [*owner.named_parameters(recurse=False), *owner.named_buffers(recurse=False)]:
            if value.shape[:1] == (num_experts,):
                _replace(owner, name, value, index)
        for name, count in _counts(owner, num_experts).items():
            setattr(owner, name, len(keep) if count == num_experts else count)


def _replace(owner: nn.Module, name: str, value: torch.Tensor, index: torch.Tensor) -> None:
    import torch

    rows = value.detach().index_select(0, index.to(value.device)).clone()
    if isinstance(value, torch.nn.Parameter):
        setattr(owner, name, torch.nn.Parameter(rows, requires_grad=value.requires_grad))
    else:
        setattr(owner, name, rows)


def _counts(holder: Any, num_experts: int) -> dict[str, int]:
    """Attributes that count routed experts."""
    names = ("num_experts", "num_local_experts", "n_routed_experts")
    found = {name: getattr(holder, name, None) for name in names}
    return {name: count for name, count in found.items() if count == num_experts}


def save_model(
    model: PreTrainedModel,
    output: PathLike,
    *,
    like: PathLike,
    plan: PruningPlan | None = None,
    max_shard_size: int = DEFAULT_SHARD_SIZE,
    overwrite: bool = False,
) -> Path:
    """Write a loaded model as a stock checkpoint with the base's tensor names, dtypes and raw config, plus the plan's edits.

    transformers' own ``save_pretrained`` drops MTP layers and rewrites config keys that other engines need. Here the
    tensors come from the model, MTP layers come from the base (cut by the plan), the config is the base's own text, and
    tokenizer and other files are copied.

    Args:
        model: the loaded model, pruned by ``plan`` or not pruned at all.
        output: new folder, which appears whole or not at all.
        like: the base checkpoint the model came from.
        plan: what :func:`prune_model` was given; None for a model that was not pruned.
        max_shard_size: bytes of tensors per file.
        overwrite: replace a folder that is not empty.

    Raises:
        CheckpointError: a tensor of the base is missing from the model or has another shape.

    Example:
        >>> moeprune.save_model(model, "pruned", like="base", plan=plan)
    """
    base = open_checkpoint(like)
    plan = check_plan(base, plan) if plan is not None else None
    keep = keep_lists(plan) if plan else {layer: tuple(range(base.num_experts)) for layer in base.all_moe_layers}
    expected = list(output_tensors(base, keep))
    check_output(base, output, overwrite=overwrite)
    check_free_space(output, 2 * sum(tensor.nbytes for tensor in expected) + 64_000_000)
    begin_work()
    with output_folder(output, overwrite=overwrite) as staging, tempfile.TemporaryDirectory(dir=staging) as scratch:
        tensors = _from_model(model, base, expected, Path(scratch))
        write_shards(tensors, staging, base.shard_metadata, max_shard_size)
        config = edit_json(base.config_text, plan.config_edits) if plan else base.config_text
        (staging / "config.json").write_bytes(config.encode())
        copy_other_files(base.path, staging)
        if plan is not None:
            (staging / PROVENANCE).mkdir()
            (staging / PROVENANCE / "plan.json").write_text(to_json(plan.to_dict()), encoding="utf-8")
    return Path(output)


def _from_model(
    model: PreTrainedModel, base: Checkpoint, expected: list[OutputTensor], scratch: Path
) -> list[OutputTensor]:
    """The expected tensors with their bytes taken from the model where it has them, else from the base."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    model.save_pretrained(scratch / "saved")  # undoes the stacking of experts: names as on disk
    homes: dict[str, Path] = {}
    for file in sorted((scratch / "saved").glob("*.safetensors")):
        with safe_open(file, framework="pt") as shard:
            homes |= dict.fromkeys(shard.keys(), file)
    depth = int(base.config["num_hidden_layers"])
    result = []
    (scratch / "cast").mkdir()
    for number, tensor in enumerate(expected):
        if tensor.name not in homes:
            if base.spec.role(tensor.name).layer < depth:
                raise CheckpointError(f"the model has no tensor {tensor.name!r}, which {base.path.name} has")
            result.append(tensor)  # MTP layers are not part of the loaded model
            continue
        with safe_open(homes[tensor.name], framework="pt") as shard:
            value = shard.get_tensor(tensor.name)
        if tuple(value.shape) != tensor.shape:
            raise CheckpointError(
                f"tensor {tensor.name!r} is {tuple(value.shape)} in the model and should be {tensor.shape}",
                "was the model pruned with this plan?",
            )
        cast = scratch / "cast" / f"{number}.safetensors"
        save_file({tensor.name: value.to(_torch_dtype(tensor)).contiguous()}, cast)
        result.append(_only_tensor(tensor, cast))
    return result


def _only_tensor(tensor: OutputTensor, file: Path) -> OutputTensor:
    from moeprune.checkpoint import read_header

    (entry,), _ = read_header(file)
    segment = Segment(file=file, begin=entry.begin, end=entry.end)
    return OutputTensor(name=tensor.name, dtype=tensor.dtype, shape=tensor.shape, segments=(segment,))


def _torch_dtype(tensor: OutputTensor) -> torch.dtype:
    import torch

    names: Mapping[str, torch.dtype] = {
        "F64": torch.float64,
        "F32": torch.float32,
        "F16": torch.float16,
        "BF16": torch.bfloat16,
    }
    if tensor.dtype not in names:
        raise CheckpointError(
            f"tensor {tensor.name!r} is stored as {tensor.dtype}", "save_model writes unquantised checkpoints only"
        )
    return names[tensor.dtype]
