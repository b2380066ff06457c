"""The experts boundary of a loaded model: its MoE layers, and functions that run in the place of their experts.

Whatever watches or changes what experts do is a *wrapper*: a function that is given the function below it, the experts
module, the hidden states [T, H], the chosen experts [T, K] and their weights [T, K], and gives the output [T, H]. They
are nested by :func:`wrapped_experts`, whatever the architecture and its experts implementation.
"""

from __future__ import annotations

import contextlib
import functools
import re
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from moeprune.errors import UnsupportedModelError

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedModel

    Experts = Callable[[nn.Module, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
    Wrapper = Callable[[Experts, nn.Module, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]

NAME = "moeprune"  # of our function in transformers' experts interfaces
GATES_ATTRIBUTE = "moeprune_gates"  # where a model that skips slots keeps its gates
_SLOT_ELEMENTS = {True: 1 << 24, False: 1 << 28}  # of the (token, slot) rows that run at a time, on a CPU and elsewhere
_ROWS_PER_EXPERT = {True: 32, False: 256}  # below that, reading an expert's weights takes as long as the arithmetic


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertLayer:
    """The modules of one MoE layer: its experts, the router beside them, and the block that holds both."""

    index: int
    experts: nn.Module
    router: nn.Module
    block: nn.Module
    num_experts: int


def expert_layers(model: nn.Module) -> list[ExpertLayer]:
    """Find the MoE layers of a loaded model by what they hold, not by the names of their classes.

    Experts are a module with parameters that all have one row per expert; the router is the module beside them whose
    parameters have those rows too.

    Raises:
        UnsupportedModelError: there are none, or a layer's router cannot be found.
    """
    found = []
    for name, module in model.named_modules():
        if not _are_experts(module):
            continue
        position = re.search(r"(?:^|\.)layers\.(\d+)\.", name)
        if position is None:
            continue
        block = model.get_submodule(name.rpartition(".")[0])
        routers = [child for child in block.children() if child is not module and _has_rows(child, module.num_experts)]
        if len(routers) != 1:
            raise UnsupportedModelError(
                f"cannot tell the router of {name}: {len(routers)} modules look like one",
                "" if routers else "look for the layers, or start to observe, before experts are masked",
            )
        found.append(
            ExpertLayer(
                index=int(position[1]),
                experts=module,
                router=routers[0],
                block=block,
                num_experts=module.num_experts,
            )
        )
    if not found:
        raise UnsupportedModelError("the loaded model has no experts that transformers can observe", "is it dense?")
    return found


def _are_experts(module: nn.Module) -> bool:
    return hasattr(module, "_is_expert_parallel") and hasattr(module, "num_experts")


def _has_rows(module: nn.Module, count: int) -> bool:
    return any(tensor.dim() == 2 and tensor.shape[0] == count for tensor in module.parameters(recurse=False))


# Wrappers by experts module, the innermost first; below them is the implementation that the model had before.
_WRAPPERS: weakref.WeakKeyDictionary[nn.Module, list[Wrapper]] = weakref.WeakKeyDictionary()
_BELOW: weakref.WeakKeyDictionary[nn.Module, str] = weakref.WeakKeyDictionary()


def slot_rows(hidden: int, num_experts: int, device_type: str) -> int:
    """How many (token, slot) rows of ``hidden`` elements should run through a layer's experts at a time."""
    on_cpu = device_type == "cpu"
    return max(_SLOT_ELEMENTS[on_cpu] // hidden, _ROWS_PER_EXPERT[on_cpu] * num_experts)


@contextlib.contextmanager
def wrapped_experts(
    model: PreTrainedModel, wrappers: Mapping[nn.Module, Wrapper], *, innermost: bool = False
) -> Iterator[None]:
    """Let wrappers run in the place of experts modules inside the block.

    Args:
        model: the loaded model.
        wrappers: by experts module.
        innermost: call them last, next to the experts; else first, before all others.

    Raises:
        UnsupportedModelError: transformers cannot exchange the experts implementation of this model.
    """
    with contextlib.ExitStack() as undo:
        _register()
        # The implementation can only be exchanged for the whole model, so that every layer comes through here.
        exchanged = all(experts in _WRAPPERS for experts in wrappers)
        fresh = [] if exchanged else [experts for experts in _experts_of(model) if experts not in _WRAPPERS]
        for experts in fresh:
            _WRAPPERS[experts], _BELOW[experts] = [], implementation_of(experts)
            undo.callback(_BELOW.pop, experts, None)
            undo.callback(_WRAPPERS.pop, experts, None)
        if fresh:
            undo.callback(model.set_experts_implementation, model.get_experts_implementation())
            model.set_experts_implementation(NAME)
        if any(implementation_of(experts) != NAME for experts in wrappers):
            raise UnsupportedModelError("transformers cannot exchange the experts implementation of this model")
        for experts, wrapper in wrappers.items():
            _WRAPPERS[experts].insert(0 if innermost else len(_WRAPPERS[experts]), wrapper)
            undo.callback(_WRAPPERS[experts].remove, wrapper)
        yield


def _experts_of(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if _are_experts(module)]


def is_wrapped(experts: nn.Module, wrapper: object) -> bool:
    """Whether some bound method of the same function as ``wrapper`` runs in the place of the experts already."""
    function = getattr(wrapper, "__func__", wrapper)
    return any(getattr(one, "__func__", one) is function for one in _WRAPPERS.get(experts, ()))


def implementation_of(experts: nn.Module) -> str:
    """Name of the experts implementation that the module asks for."""
    return str(getattr(experts.config, "_experts_implementation", None) or "eager")


def _register() -> None:
    """Put our function into transformers' experts interfaces, once."""
    for interface in _interfaces():
        if NAME not in interface.valid_keys():
            interface.register(NAME, functools.partial(_run, interface))


def _interfaces() -> list[Any]:
    from transformers.integrations.finegrained_fp8 import ALL_FP8_EXPERTS_FUNCTIONS
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    return [ALL_EXPERTS_FUNCTIONS, ALL_FP8_EXPERTS_FUNCTIONS]


def _run(
    interface: Any, experts: nn.Module, hidden: torch.Tensor, index: torch.Tensor, gates: torch.Tensor
) -> torch.Tensor:
    name = _BELOW[experts]
    eager = type(experts).forward.__wrapped__  # type: ignore[attr-defined]
    bottom = eager if name == "eager" else interface.get_interface(name, eager)
    return _nested(bottom, _WRAPPERS[experts])(experts, hidden, index, gates)


def _nested(bottom: Experts, wrappers: Sequence[Wrapper]) -> Experts:
    function = bottom
    for wrapper in wrappers:
        function = functools.partial(wrapper, function)
    return function
