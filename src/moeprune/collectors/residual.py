"""The residual stream around a MoE block, found by what is handed from module to module."""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from moeprune.errors import UnsupportedModelError

if TYPE_CHECKING:
    import torch
    from torch import nn

    from moeprune.experts import ExpertLayer


class ResidualStream:
    """What a decoder layer adds the output of its MoE block to.

    Such a layer normalises the residual stream and hands the result to the block. So it is the input of the module
    inside the decoder layer whose output is the very tensor that the block is given.
    """

    def __init__(self) -> None:
        self._handed: list[tuple[torch.Tensor, torch.Tensor]] = []  # output and input of what ran in the layer
        self._now: torch.Tensor | None = None

    def rows(self) -> torch.Tensor | None:
        """The stream [T, H] around the block that runs now."""
        return None if self._now is None else self._now.reshape(-1, self._now.shape[-1])

    @contextlib.contextmanager
    def followed(self, model: nn.Module, layer: ExpertLayer, why: str) -> Iterator[None]:
        """Follow one layer inside the block.

        Args:
            model: the model of the layer.
            layer: its modules.
            why: name of the statistic that needs it.
        """
        decoder = _decoder_layer(model, layer)
        with contextlib.ExitStack() as undo:
            undo.callback(decoder.register_forward_pre_hook(self._begin).remove)
            for child in decoder.children():
                if layer.block not in child.modules():
                    undo.callback(child.register_forward_hook(self._keep).remove)
            find = functools.partial(self._find, layer.index, why)
            undo.callback(layer.block.register_forward_pre_hook(find, with_kwargs=True).remove)
            undo.callback(layer.block.register_forward_hook(self._forget).remove)
            yield

    def _begin(self, *_: Any) -> None:
        self._handed.clear()

    def _keep(self, _: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if args and getattr(args[0], "shape", None) == getattr(output, "shape", ()):
            self._handed.append((output, args[0]))

    def _find(self, index: int, why: str, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = next(iter((*args, *kwargs.values())), None)
        self._now = next((before for after, before in self._handed if after is given), None)
        self._handed.clear()
        if self._now is None:
            raise UnsupportedModelError(
                f"{why} cannot be measured in layer {index}: no module gives the experts' block its input",
                "leave it out of the statistics",
            )

    def _forget(self, *_: Any) -> None:
        self._now = None


def _decoder_layer(model: nn.Module, layer: ExpertLayer) -> nn.Module:
    name = next(name for name, module in model.named_modules() if module is layer.block)
    found = re.match(rf"(?:.*\.)?layers\.{layer.index}(?=\.|$)", name)
    return model.get_submodule(found[0] if found else name.rpartition(".")[0])
