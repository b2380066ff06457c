"""Run a loaded model as if experts had been dropped, without touching its experts.

A masked layer computes what a pruned one computes: its router holds the rows of the kept experts only, so that the
model's own code (softmax, groups, top-k) picks among them, and the numbers that it picks are translated back before the
untouched experts run. Only router rows are ever copied, so any number of plans can share one model.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from moeprune.errors import CheckpointError, PlanError
from moeprune.experts import ExpertLayer
from moeprune.plans import RouterShape, check_keep

if TYPE_CHECKING:
    import torch
    from torch import nn

_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts")  # attributes that count routed experts


class Change(Protocol):
    """What makes one layer run otherwise, such as a mask or a gate."""

    def applied(self) -> contextlib.AbstractContextManager[None]:
        """Change the layer inside the block."""


class Mask:
    """One MoE layer's kept experts, ready to be applied any number of times.

    The kept rows are copied once, when the mask is made; applying it only exchanges references.

    Args:
        layer: the modules of the layer, with their weights in memory.
        keep: numbers of the experts that stay, ascending.

    Raises:
        PlanError: the router cannot work with these experts.
        CheckpointError: the router's weights are offloaded.

    Example:
        >>> mask = Mask(layer, (0, 2, 5, 7))
        >>> with mask.applied():
        ...     pruned_logits = model(input_ids).logits
    """

    def __init__(self, layer: ExpertLayer, keep: Sequence[int]) -> None:
        import torch

        check_keep(layer.index, keep, router_shape(layer))
        self._layer, self._kept_count = layer, len(keep)
        self._kept = {module: kept_rows(module, layer.num_experts, keep) for module in router_modules(layer)}
        if not self._kept[layer.router]:  # inside another mask it has fewer rows
            raise _not_whole(layer)
        self._whole = {module: {name: getattr(module, name) for name in kept} for module, kept in self._kept.items()}
        self._numbers = torch.tensor(keep, device=next(layer.router.parameters()).device)

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Mask the layer inside the block; afterwards it holds the very tensors that it held before.

        Observers see the experts' original numbers, and minus infinity as the dropped experts' logits.

        Raises:
            PlanError: the layer is masked already, or its router has other tensors than when the mask was made.
        """
        with contextlib.ExitStack() as undo:
            for module, whole in self._whole.items():
                if any(getattr(module, name) is not value for name, value in whole.items()):
                    raise _not_whole(self._layer)
                undo.callback(assign, module, whole)
                assign(module, self._kept[module])
            undo.callback(self._layer.experts.register_forward_pre_hook(self._original_numbers).remove)
            # Before the hooks of observers, which look for one logit per expert.
            undo.callback(self._layer.router.register_forward_hook(self._original_columns, prepend=True).remove)
            yield

    def _original_numbers(self, _: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        """Before the experts run: the kept experts' numbers among all, [T, K]."""
        hidden_TH, index_TK, gates_TK = args
        return hidden_TH, self._numbers[index_TK], gates_TK

    def _original_columns(self, _: nn.Module, __: Any, output: Any) -> Any:
        """After the router ran: its logits with a column for every expert, [T, E]."""
        logits, *others = output
        if logits.shape[-1] != self._kept_count:
            return output
        columns = logits.new_full((*logits.shape[:-1], self._layer.num_experts), float("-inf"))
        return columns.index_copy(-1, self._numbers, logits), *others


@contextlib.contextmanager
def masked(layers: Sequence[ExpertLayer], keep: Mapping[int, Sequence[int]]) -> Iterator[None]:
    """Run the model that the layers are of as if only some experts were there.

    Layers may keep different numbers of experts. For inference: gradients would reach copies of the router's rows.

    Args:
        layers: what :func:`moeprune.experts.expert_layers` found.
        keep: experts that stay by layer, ascending; a layer that is absent keeps all of its experts.

    Raises:
        PlanError: a router cannot work with its experts, or a layer is masked already.
        CheckpointError: a router's weights are offloaded.

    Example:
        >>> layers = expert_layers(model)
        >>> with masked(layers, {0: (0, 2, 5, 7)}):
        ...     pruned_logits = model(input_ids).logits
    """
    with applied([Mask(layer, keep[layer.index]) for layer in layers if layer.index in keep]):
        yield


@contextlib.contextmanager
def applied(changes: Iterable[Change]) -> Iterator[None]:
    """Apply changes of several layers together."""
    with contextlib.ExitStack() as stack:
        for change in changes:
            stack.enter_context(change.applied())
        yield


class _ChosenError(Exception):
    """Ends a pass through a block once its router has chosen."""


def chosen_by_some(layer: ExpertLayer, keep: Sequence[int], hidden_TH: torch.Tensor) -> torch.Tensor:
    """Which experts a layer's router picks, [T, K], when it has the rows of some experts alone.

    Args:
        layer: with its router in memory.
        keep: those experts, ascending.
        hidden_TH: what the MoE block is given.

    Returns:
        Numbers of the original's experts.
    """
    found: list[torch.Tensor] = []

    def catch(_: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        found.append(args[1])
        raise _ChosenError

    with Mask(layer, keep).applied():
        hook = layer.experts.register_forward_pre_hook(catch)  # behind the one that gives the original numbers
        try:
            with contextlib.suppress(_ChosenError):
                layer.block(hidden_TH[None])
        finally:
            hook.remove()
    return found[0]


def _not_whole(layer: ExpertLayer) -> PlanError:
    return PlanError(
        f"layer {layer.index} is masked already, or its router was loaded again since the mask was made",
        "leave the one mask before the other, and make masks after loading",
    )


# --- what a router keeps ----------------------------------------------------------------------------------------------


def router_shape(layer: ExpertLayer) -> RouterShape:
    """The numbers of a loaded layer's router that bound what may be removed."""
    config: Any = layer.experts.config
    return RouterShape(
        num_experts=layer.num_experts,
        top_k=int(config.num_experts_per_tok),
        n_group=int(getattr(config, "n_group", None) or 1),
        topk_group=int(getattr(config, "topk_group", None) or 1),
    )


def router_modules(layer: ExpertLayer) -> tuple[nn.Module, ...]:
    """The modules whose own tensors may have rows of the router: it, what is in it, and the block around it."""
    return (*layer.router.modules(), layer.block)


def kept_rows(module: nn.Module, num_experts: int, keep: Sequence[int]) -> dict[str, Any]:
    """What a module's attributes are with only some experts.

    Args:
        module: its own parameters, buffers and counts are looked at, not those of modules inside it.
        num_experts: how many experts there are.
        keep: those that stay.

    Returns:
        By attribute: parameters and buffers that have one row per expert, with the kept rows, and the new counts.

    Raises:
        CheckpointError: a tensor is offloaded.
    """
    import torch

    kept: dict[str, Any] = {}
    index = torch.tensor(keep)
    for name, value in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
        axis = _expert_axis(value.shape, num_experts)
        if axis is None:
            continue
        if value.is_meta:
            raise CheckpointError(f"{type(module).__name__}.{name} is offloaded", "load the model without offloading")
        rows = value.detach().index_select(axis, index.to(value.device))
        is_parameter = isinstance(value, torch.nn.Parameter)
        kept[name] = torch.nn.Parameter(rows, value.requires_grad) if is_parameter else rows
    return kept | kept_counts(module, num_experts, len(keep))


def kept_counts(holder: object, before: int, after: int) -> dict[str, int]:
    """The attributes of a module, model or config that count routed experts, with their new value."""
    return {name: after for name in _COUNTS if getattr(holder, name, None) == before}


def _expert_axis(shape: Sequence[int], num_experts: int) -> int | None:
    """The axis with one row per expert, if any: the first, or the second behind one of size 1."""
    if tuple(shape[:1]) == (num_experts,):
        return 0
    return 1 if tuple(shape[:2]) == (1, num_experts) else None


def assign(holder: object, values: Mapping[str, Any]) -> None:
    """Set attributes by name."""
    for name, value in values.items():
        setattr(holder, name, value)
