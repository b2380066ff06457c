"""Run a fused checkpoint whose router is the original's: every expert's number leads to the one it was merged into.

On disk such a checkpoint has the merged experts alone, numbered on, and the router with all of its rows; its config
counts the merged experts. So transformers, which expects one row for each, refuses it, and so do other engines.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moeprune._files import parse_json
from moeprune.architectures import RouterName, resolve_architecture
from moeprune.checkpoint import read_tensors
from moeprune.errors import CheckpointError, PlanError
from moeprune.experts import ExpertLayer, expert_layers
from moeprune.plans_fuse import TIED, FusePlan
from moeprune.runtime.masking import assign, kept_counts, router_modules

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedModel

    from moeprune.headers import TensorEntry

_PLAN = Path("moeprune") / "plan.json"


def is_tied(path: Path) -> bool:
    """Whether a fused checkpoint has the original's router."""
    return FusePlan.load(path / _PLAN).router == TIED


def load_tied(path: Path, options: Mapping[str, Any]) -> PreTrainedModel:
    """Load a checkpoint that was fused with a tied router.

    Args:
        path: its folder.
        options: of ``from_pretrained``.

    Returns:
        The model, in evaluation mode.

    Raises:
        PlanError: its plan does not tie the router, or does not fit.
        CheckpointError: its files are not what the plan says, or the model would be offloaded.
    """
    plan = FusePlan.load(path / _PLAN)
    if plan.router != TIED:
        raise PlanError(f"the router of {path} is not tied", "load it with transformers")
    model, layers = load_with_whole_routers(
        path, options, {index: len(layer.new_numbers()) for index, layer in plan.layers.items()}
    )
    return attach(model, plan, layers)


def load_with_whole_routers(
    path: Path, options: Mapping[str, Any], counts: Mapping[int, int]
) -> tuple[PreTrainedModel, list[ExpertLayer]]:
    """Load a checkpoint whose routers have more rows than it has experts.

    Args:
        path: its folder.
        options: of ``from_pretrained``.
        counts: rows of the router by decoder layer.

    Returns:
        The model in evaluation mode, and its MoE layers.

    Raises:
        CheckpointError: its files are not what the plan says, or the model would be offloaded.
    """
    from transformers import AutoModelForCausalLM

    with _expecting_other_shapes():
        model, info = AutoModelForCausalLM.from_pretrained(
            path, **{**options, "ignore_mismatched_sizes": True, "output_loading_info": True}
        )
    layers = expert_layers(model)
    rows = _router_rows(path)
    whole = {name for layer in layers for name in _widen(model, layer, rows.get(layer.index, {}), counts)}
    odd = {_name(item) for item in info["mismatched_keys"]} ^ whole
    if odd:
        raise CheckpointError(f"{path}: {min(odd)!r} does not have the shape that the plan gives it", "fuse again")
    return model.eval(), layers


def attach(model: PreTrainedModel, plan: FusePlan, layers: Sequence[ExpertLayer]) -> PreTrainedModel:
    """Lead the numbers that the routers of a model pick to the merged experts that it holds, in place and for good.

    Args:
        model: with merged experts, and routers of all rows.
        plan: what merged them.
        layers: its MoE layers.

    Returns:
        The same model.

    Raises:
        PlanError: the plan does not fit the model.
    """
    odd = {layer.index for layer in layers} ^ plan.layers.keys()
    if odd:
        raise PlanError(f"the plan and the model do not have the same MoE layers (first odd one: {min(odd)})")
    for layer in layers:
        layer.experts.register_forward_pre_hook(Lead(plan.layers[layer.index].new_numbers()))
    return model


class Lead:
    """Before the experts run: the numbers of the merged experts in the place of their members', [T, K].

    Args:
        numbers: where the merged expert of each source expert is.
    """

    def __init__(self, numbers: Sequence[int]) -> None:
        import torch

        self._numbers_E = torch.tensor(numbers)

    def __call__(self, _: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        """Exchange the numbers."""
        hidden_TH, index_TK, gates_TK = args
        if self._numbers_E.device != index_TK.device:
            self._numbers_E = self._numbers_E.to(index_TK.device)
        return hidden_TH, self._numbers_E[index_TK], gates_TK


# --- routers of all rows ----------------------------------------------------------------------------------------------


def _router_rows(path: Path) -> dict[int, dict[str, TensorEntry]]:
    """The router's tensors by decoder layer and the last part of their names."""
    config = parse_json((path / "config.json").read_bytes(), path / "config.json")
    spec = resolve_architecture(config)
    tensors, _ = read_tensors(path)
    rows: dict[int, dict[str, TensorEntry]] = {}
    for name, entry in tensors.items():
        role = spec.role(name, spec.depth(config))
        if isinstance(role, RouterName):
            rows.setdefault(role.layer, {})[name.rpartition(".")[2]] = entry
    return rows


def _widen(
    model: PreTrainedModel, layer: ExpertLayer, stored: Mapping[str, TensorEntry], counts: Mapping[int, int]
) -> Iterator[str]:
    """Give a layer's router the rows of all experts; gives the names of what was replaced."""
    import torch
    from safetensors import safe_open

    names = {id(value): name for name, value in [*model.named_parameters(), *model.named_buffers()]}
    before = counts.get(layer.index, layer.num_experts)
    for module in router_modules(layer):
        held = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        for leaf, value in held:
            if leaf not in stored or stored[leaf].shape == tuple(value.shape):
                continue
            if value.is_meta:
                raise CheckpointError(f"the router of layer {layer.index} is offloaded", "load it without offloading")
            with safe_open(stored[leaf].file, framework="pt") as file:
                rows = file.get_tensor(stored[leaf].name).to(value.device, value.dtype)
            is_parameter = isinstance(value, torch.nn.Parameter)
            assign(
                module, {leaf: torch.nn.Parameter(rows, requires_grad=value.requires_grad) if is_parameter else rows}
            )
            yield names[id(value)]
        assign(module, kept_counts(module, layer.num_experts, before))


def _name(item: Any) -> str:
    """A parameter's name, which transformers gives with its shapes or without."""
    return str(item[0] if isinstance(item, tuple) else item)


@contextlib.contextmanager
def _expecting_other_shapes() -> Iterator[None]:
    """Have transformers not warn of the routers' shapes, which are put right afterwards."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
