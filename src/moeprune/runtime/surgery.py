"""Prune a loaded model in place, and save a loaded model with the names and the config of its base checkpoint."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence, Set
from pathlib import Path
from typing import TYPE_CHECKING

from moeprune._files import PathLike, begin_work, check_free_space, progress, to_json
from moeprune.checkpoint import Checkpoint, open_checkpoint
from moeprune.collectors.probe import PLAN_ATTRIBUTE, fingerprint_of
from moeprune.errors import CheckpointError, PlanError, StaleArtifactError
from moeprune.experts import ExpertLayer, expert_layers
from moeprune.headers import TensorEntry
from moeprune.plans import PruningPlan, check_keep, check_order
from moeprune.rewrite.claims import output_folder
from moeprune.rewrite.copying import OutputTensor
from moeprune.rewrite.drop import (
    DEFAULT_SHARD_SIZE,
    PROVENANCE,
    check_counts,
    check_output,
    check_plan,
    edited_files,
    keep_lists,
    output_tensors,
    write_checkpoint,
)
from moeprune.rewrite.shards import lay_out
from moeprune.runtime.masking import assign, kept_counts, kept_rows, router_modules, router_shape

if TYPE_CHECKING:
    import torch
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
        PlanError: the plan does not fit the model, or the model was pruned already.
        StaleArtifactError: the plan was made for another checkpoint than the folder the model was loaded from.

    Example:
        >>> plan = moeprune.plan("statistics.safetensors", "base", ratio=0.5)
        >>> moeprune.prune_model(model, plan)
    """
    layers = expert_layers(model)
    _check_fit(model, layers, plan)
    for layer in layers:
        keep = plan.layers[layer.index].placed
        for module in (*layer.experts.modules(), *router_modules(layer)):
            assign(module, kept_rows(module, layer.num_experts, keep))
    for holder in (model, model.config.get_text_config()):  # the model's own is read by the load-balancing loss
        assign(holder, kept_counts(holder, layers[0].num_experts, plan.kept))
    setattr(model, PLAN_ATTRIBUTE, plan)
    return model


def _check_fit(model: PreTrainedModel, layers: Sequence[ExpertLayer], plan: PruningPlan) -> None:
    """Refuse a plan for another model before anything changes."""
    if hasattr(model, PLAN_ATTRIBUTE):
        raise PlanError("the model was pruned already", "load it again to prune it by another plan")
    made_for = fingerprint_of(model)
    if made_for and made_for != plan.inputs.get("model"):
        raise StaleArtifactError(
            f"the plan was made for another model than {model.config._name_or_path}",  # noqa: SLF001 - its only name
            "make a plan from statistics of this model",
        )
    depth = model.config.get_text_config().num_hidden_layers
    odd = {layer.index for layer in layers} ^ {layer for layer in plan.layers if layer < depth}
    if odd:
        raise PlanError(f"the plan and the model do not have the same MoE layers (first odd one: {min(odd)})")
    check_counts(plan)
    for layer in layers:
        shape, decision = router_shape(layer), plan.layers[layer.index]
        check_keep(layer.index, decision.keep, shape)
        check_order(layer.index, decision, shape)


def save_model(
    model: PreTrainedModel,
    output: PathLike,
    *,
    like: PathLike,
    plan: PruningPlan | None = None,
    max_shard_size: int = DEFAULT_SHARD_SIZE,
    overwrite: bool = False,
) -> Path:
    """Write a loaded model as a stock checkpoint: the base's tensor names, dtypes and raw config, edited by the plan.

    transformers' own ``save_pretrained`` drops MTP layers and rewrites config keys that other engines need. Here the
    tensors come from the model, MTP layers come from the base (cut by the plan), the config is the base's own text, and
    tokenizer and other files are copied.

    Args:
        model: the loaded model, pruned by :func:`prune_model` or not pruned at all.
        output: new folder, which appears whole or not at all.
        like: the base checkpoint the model came from.
        plan: what :func:`prune_model` was given; the model remembers it.
        max_shard_size: bytes of tensors per file.
        overwrite: replace a folder that is not empty.

    Raises:
        CheckpointError: the tensors of the model and of the base are not the same, or have other shapes.
        PlanError: another plan than the one the model was pruned by.

    Example:
        >>> moeprune.save_model(model, "pruned", like="base")
    """
    base = open_checkpoint(like)
    base.check_uniform()
    plan = _plan_of(model, plan)
    plan = check_plan(base, plan) if plan is not None else None
    keep = keep_lists(plan) if plan else dict.fromkeys(base.all_moe_layers, tuple(range(base.num_experts)))
    tensors = list(output_tensors(base, keep))
    wanted = _check_tensors(model, base, tensors)
    check_output(base, output, overwrite=overwrite)
    check_free_space(output, sum(tensor.nbytes for tensor in tensors))
    begin_work()
    with output_folder(output, overwrite=overwrite) as staging:
        files = edited_files(base, keep, plan.config_edits if plan else {})
        write_checkpoint(base, lay_out(tensors, max_shard_size), files, staging)
        _overwrite_tensors(model, wanted, open_checkpoint(staging).tensors)
        if plan is not None:
            (staging / PROVENANCE).mkdir()
            (staging / PROVENANCE / "plan.json").write_text(to_json(plan.to_dict()), encoding="utf-8")
    return Path(output)


def _plan_of(model: PreTrainedModel, given: PruningPlan | None) -> PruningPlan | None:
    used: PruningPlan | None = getattr(model, PLAN_ATTRIBUTE, None)
    if used is not None and given is not None and keep_lists(used) != keep_lists(given):
        raise PlanError("the model was pruned by another plan", "leave plan out: the model remembers it")
    return given if used is None else used


def _check_tensors(model: PreTrainedModel, base: Checkpoint, expected: Sequence[OutputTensor]) -> set[str]:
    """The model must have the expected tensors and no others, but for those that transformers never loads.

    Returns:
        The names on disk of the model's tensors.
    """
    state = model.state_dict()
    for name, value in state.items():
        if value.is_meta:
            raise CheckpointError(f"tensor {name!r} is offloaded", "load the model without offloading to save it")
    found = named_as_on_disk(model, {name: value.to("meta") for name, value in state.items()})
    wanted, depth = set(), base.spec.depth(base.config)
    for tensor in expected:
        if tensor.name in found:
            _check_tensor(tensor, found[tensor.name])
            wanted.add(tensor.name)
        elif not _passed_over(model, tensor.name) and base.spec.role(tensor.name, depth).layer not in base.mtp_layers:
            raise CheckpointError(f"the model has no tensor {tensor.name!r}, which {base.path.name} has")
    homes = Counter(value.data_ptr() for value in state.values())
    tied = {name for name, value in state.items() if homes[value.data_ptr()] > 1}  # lm_head as the embedding
    surplus = sorted(found.keys() - wanted - tied)
    if surplus:
        raise CheckpointError(
            f"the model has a tensor {surplus[0]!r}, which {base.path.name} has not",
            "was it pruned with this plan? merge adapters first",
        )
    return wanted


def _passed_over(model: PreTrainedModel, name: str) -> bool:
    """Whether transformers leaves the tensor out when it loads this class, such as the vision tower of a text model."""
    ignored = model._keys_to_ignore_on_load_unexpected or ()  # noqa: SLF001 - the only place that says so
    return any(re.search(pattern, name) for pattern in ignored)


def _check_tensor(expected: OutputTensor, found: torch.Tensor) -> None:
    if tuple(found.shape) != expected.shape:
        raise CheckpointError(
            f"tensor {expected.name!r} is {tuple(found.shape)} in the model and should be {expected.shape}",
            "was the model pruned with this plan?",
        )
    if expected.dtype not in _dtypes():
        raise CheckpointError(
            f"tensor {expected.name!r} is stored as {expected.dtype}", "save_model writes unquantised checkpoints only"
        )


def named_as_on_disk(model: PreTrainedModel, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Undo the stacking of experts that transformers does when it loads a checkpoint."""
    from transformers.core_model_loading import revert_weight_conversion

    reverted: dict[str, torch.Tensor] = revert_weight_conversion(model, dict(state))
    return reverted


def _overwrite_tensors(model: PreTrainedModel, wanted: Set[str], entries: Mapping[str, TensorEntry]) -> None:
    """Put the model's values in the place of the base's, layer by layer: a second copy of one layer is in memory."""
    layers: dict[int, dict[str, torch.Tensor]] = defaultdict(dict)
    for name, value in model.state_dict().items():
        position = re.search(r"(?:^|\.)layers\.(\d+)\.", name)
        layers[int(position[1]) if position else -1][name] = value
    done: set[str] = set()
    for layer in progress(sorted(layers), "saving", unit="layer"):
        found = named_as_on_disk(model, layers[layer])
        for name in wanted & found.keys():
            _overwrite(entries[name], found[name])
            done.add(name)
    if done != wanted:
        raise CheckpointError(f"tensor {min(wanted - done)!r} could not be taken from the model")


def _overwrite(entry: TensorEntry, value: torch.Tensor) -> None:
    import torch

    raw = value.detach().to("cpu", _dtypes()[entry.dtype]).contiguous().reshape(-1).view(torch.uint8).numpy()
    with entry.file.open("r+b") as handle:
        handle.seek(entry.begin)
        handle.write(raw.data)


def _dtypes() -> dict[str, torch.dtype]:
    import torch

    return {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
