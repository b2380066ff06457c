"""Experts that share fused ones: the module that runs them, in a loaded model and while it is trained.

A token that the original's router sends to members of a group runs through the group's fused expert once, with weights
and an input of its own (the recipe of github.com/gabrielolympie/moe-pruner)::

    p     softmax of the token's gates over the members of the group that it was sent to
    x'    x + sum_m p_m shift_m
    W(x)  W x + sum_m p_m out_m in_m x        for gate and up together, and for down
    out   (sum of the gates) * down(act(gate(x')) * up(x'))

Shapes: T tokens, H hidden size, I inner size, E source experts, F fused ones, K experts of a token, R rank.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moeprune.errors import ArtifactError, PlanError, UnsupportedModelError
from moeprune.experts import ExpertLayer
from moeprune.plans_multiplex import SIDE_FILE, MultiplexPlan

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedModel

SIDE = ("gate_up_in", "gate_up_out", "down_in", "down_out", "shift")


def load_multiplexed(path: Path, options: Mapping[str, Any]) -> PreTrainedModel:
    """Load a multiplexed checkpoint; transformers alone would refuse its routers.

    Args:
        path: its folder.
        options: of ``from_pretrained``.

    Returns:
        The model, in evaluation mode.

    Raises:
        ArtifactError: the plan or the side file is damaged.
        CheckpointError: its files are not what the plan says, or the model would be offloaded.
    """
    from moeprune.runtime.tied import load_with_whole_routers

    plan = MultiplexPlan.load(path / "moeprune" / "plan.json")
    rows = {index: len(layer.new_numbers) for index, layer in plan.layers.items()}
    model, layers = load_with_whole_routers(path, options, rows)
    return attach(model, path, plan, layers)


def attach(model: PreTrainedModel, folder: Path, plan: MultiplexPlan, layers: Sequence[ExpertLayer]) -> PreTrainedModel:
    """Put multiplexed experts in the place of the fused ones of a model, in place and for good.

    Args:
        model: with fused experts, and routers of all rows.
        folder: with the side file.
        plan: what fused them.
        layers: its MoE layers.

    Returns:
        The same model.

    Raises:
        PlanError: the plan does not fit the model.
        ArtifactError: the side file is damaged.
    """
    import torch

    odd = {layer.index for layer in layers} ^ plan.layers.keys()
    if odd:
        raise PlanError(f"the plan and the model do not have the same MoE layers (first odd one: {min(odd)})")
    for layer, side in zip(layers, _read_side(folder / SIDE_FILE, [layer.index for layer in layers]), strict=True):
        check_plain_experts(layer.experts)
        both: Any = layer.experts.gate_up_proj
        named = {name: value.to(both.device, both.dtype) for name, value in side.items()}
        module = multiplexed(layer.experts, plan.layers[layer.index].groups, named)
        for value in module.parameters():
            value.requires_grad_(False)
        name = next(name for name, child in layer.block.named_children() if child is layer.experts)
        setattr(layer.block, name, module)
    torch.nn.Module.eval(model)
    return model


def _read_side(file: Path, layers: Sequence[int]) -> list[dict[str, torch.Tensor]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as side:
            return [{name: side.get_tensor(f"layers.{layer}.{name}") for name in SIDE} for layer in layers]
    except (OSError, SafetensorError) as error:
        raise ArtifactError(f"cannot read {file}: {error}", "multiplex again") from error


def check_plain_experts(experts: Any) -> None:
    """Refuse experts that are not gate, up and down projections without biases, gates above ups.

    Raises:
        UnsupportedModelError: they are something else.
    """
    names = {name for name, _ in experts.named_parameters(recurse=False)}
    if names != {"gate_up_proj", "down_proj"} or experts.is_transposed or not experts.is_concatenated:
        raise UnsupportedModelError("these experts are no plain gate, up and down projections", "drop or fuse instead")


def multiplexed(
    experts: nn.Module, groups: Sequence[Sequence[int]], side: Mapping[str, torch.Tensor], **fused: torch.Tensor
) -> nn.Module:
    """The module of one layer.

    Args:
        experts: transformers' experts module, whose activation is used.
        groups: members of every fused expert.
        side: ``gate_up_in`` [E, R, H], ``gate_up_out`` [E, 2I, R], ``down_in`` [E, R, I], ``down_out`` [E, H, R] and
            ``shift`` [E, H].
        fused: ``gate_up_proj`` [F, 2I, H] and ``down_proj`` [F, H, I], where they are not those of ``experts``.
    """
    module: nn.Module = _module_type()(experts, groups, side, fused)
    return module


@functools.cache
def _module_type() -> Any:
    import torch
    from torch import nn
    from torch.nn.functional import linear

    class Multiplexed(nn.Module):
        """Fused experts with residuals."""

        gate_up_in: torch.Tensor
        gate_up_out: torch.Tensor
        down_in: torch.Tensor
        down_out: torch.Tensor
        shift: torch.Tensor

        def __init__(
            self,
            experts: Any,
            groups: Sequence[Sequence[int]],
            side: Mapping[str, torch.Tensor],
            fused: Mapping[str, torch.Tensor],
        ) -> None:
            super().__init__()
            self._activate = (experts._apply_gate,)  # noqa: SLF001 - in a tuple, so that it is no submodule
            self.groups = [list(group) for group in groups]
            self.gate_up_proj = nn.Parameter(fused.get("gate_up_proj", experts.gate_up_proj))
            self.down_proj = nn.Parameter(fused.get("down_proj", experts.down_proj))
            for name in SIDE:
                setattr(self, name, nn.Parameter(side[name]))

        def forward(self, hidden_TH: torch.Tensor, index_TK: torch.Tensor, gates_TK: torch.Tensor) -> torch.Tensor:
            gates_TE = gates_TK.new_zeros((len(hidden_TH), len(self.shift))).scatter_(1, index_TK, gates_TK)
            sent_TE = torch.zeros_like(gates_TE, dtype=torch.bool).scatter_(1, index_TK, value=True)
            total_TH = torch.zeros_like(hidden_TH)
            for number, members in enumerate(self.groups):
                rows = sent_TE[:, members].any(dim=1).nonzero().squeeze(1)
                if len(rows):
                    sent, gates = sent_TE[rows][:, members], gates_TE[rows][:, members]
                    shares = gates.float().masked_fill(~sent, -torch.inf).softmax(dim=1).to(hidden_TH.dtype)
                    output = self._fused(number, members, hidden_TH[rows], shares)
                    scaled = output * gates.sum(dim=1, keepdim=True).to(output.dtype)
                    total_TH = total_TH.index_add(0, rows, scaled.to(total_TH.dtype))
            return total_TH

        def _fused(
            self, number: int, members: list[int], hidden_RH: torch.Tensor, shares_RG: torch.Tensor
        ) -> torch.Tensor:
            inputs = hidden_RH + shares_RG @ self.shift[members]
            both = linear(inputs, self.gate_up_proj[number])
            both = both + _residual(inputs, shares_RG, self.gate_up_in[members], self.gate_up_out[members])
            inner = self._activate[0](both)
            output = linear(inner, self.down_proj[number])
            return output + _residual(inner, shares_RG, self.down_in[members], self.down_out[members])

    def _residual(
        inputs_RJ: torch.Tensor, shares_RG: torch.Tensor, a_GrJ: torch.Tensor, b_GOr: torch.Tensor
    ) -> torch.Tensor:
        small_RGr = linear(inputs_RJ, a_GrJ.flatten(0, 1)).view(-1, *a_GrJ.shape[:2]) * shares_RG[:, :, None]
        output_RO: torch.Tensor = small_RGr.flatten(1) @ b_GOr.transpose(1, 2).flatten(0, 1)
        return output_RO

    return Multiplexed
