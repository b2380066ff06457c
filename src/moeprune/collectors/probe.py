"""The three points where a running model is observed, whatever its architecture.

1. A function in transformers' experts interface sees the indices and weights that are really used, and the outputs of
   the experts.
2. A hook on each router sees its logits.
3. A hook on the model below the head sees the attention mask, so that padding is left out.

Routing is never derived again from logits. The observed layer computes its output from the same per-slot outputs that
are recorded, and on the first batch that output is compared with the model's own.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from moeprune._files import PathLike
from moeprune.collectors.sums import LayerSums
from moeprune.errors import ConfigError, MoePruneError, UnsupportedModelError
from moeprune.experts import ExpertLayer, expert_layers, is_wrapped, wrapped_experts
from moeprune.statistics import STATISTICS, AnyArray, RouterStatistics

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedModel

PLAN_ATTRIBUTE = "moeprune_plan"  # where a model that was pruned in place keeps its plan
_TOLERANCE = {4: 1e-5, 2: 2e-2}  # relative error of the rebuilt layer output, by bytes per element


class Observation:
    """Statistics of a model that is being observed; give the current domain with :meth:`domain`."""

    def __init__(self, model: PreTrainedModel, *, domain: str, fingerprint: str) -> None:
        self.layers = {layer.experts: layer for layer in expert_layers(model)}  # by the module that is observed
        self._domain = domain
        self._fingerprint = fingerprint
        self._mask: torch.Tensor | None = None
        self._sums: dict[tuple[str, int], LayerSums] = {}
        self._unchecked = set(self.layers)

    @contextlib.contextmanager
    def domain(self, name: str) -> Iterator[None]:
        """Label the batches inside the block."""
        before, self._domain = self._domain, name
        try:
            yield
        finally:
            self._domain = before

    # --- the three points -------------------------------------------------------------------------------------------

    def read_mask(self, signature: inspect.Signature, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Before the model below the head runs: keep the batch's own padding mask, flattened."""
        given = signature.bind_partial(*args, **kwargs).arguments
        given = {**given.get("kwargs", {}), **given}
        mask, tokens = given.get("attention_mask"), given.get("input_ids")
        tokens = given.get("inputs_embeds") if tokens is None else tokens
        if mask is None or tokens is None:
            self._mask = None
        elif getattr(mask, "dim", int)() == 2:
            flat = mask[:, -tokens.shape[1] :].reshape(-1).bool()  # a cache makes the mask longer
            self._mask = None if bool(flat.all()) else flat
        else:
            raise ConfigError("padding can only be left out of a [batch, sequence] attention_mask", "pass that one")

    def read_logits(self, layer: ExpertLayer, output: Any) -> None:
        """After a router ran: add its logits."""
        if _recomputing():
            return
        outputs = output if isinstance(output, tuple) else (output,)
        fitting = (item for item in outputs if item.is_floating_point() and item.shape[-1] == layer.num_experts)
        logits = next(fitting, None)
        if logits is None:
            raise UnsupportedModelError(f"the router of layer {layer.index} returns no logits of its experts")
        logits_TE = logits.detach().reshape(-1, layer.num_experts)
        self._sums_of(layer, logits.device).add_logits(logits_TE, self._valid_rows(len(logits_TE), logits.device))

    def run_experts(
        self,
        original: Callable[..., torch.Tensor],
        experts: nn.Module,
        hidden_TH: torch.Tensor,
        index_TK: torch.Tensor,
        gates_TK: torch.Tensor,
    ) -> torch.Tensor:
        """In place of the experts: the same output, from per-slot outputs that are added up.

        Every (token, slot) pair goes through the model's own implementation as a token with one expert of weight 1.
        """
        import torch

        tokens, top_k = index_TK.shape
        ones = torch.ones_like(gates_TK).reshape(-1, 1)
        rows = hidden_TH.repeat_interleave(top_k, dim=0)
        slots_TKH = original(experts, rows, index_TK.reshape(-1, 1), ones).view(tokens, top_k, -1)
        output = _weighted_sum(gates_TK, slots_TKH).to(hidden_TH.dtype)
        if not _recomputing():
            layer = self.layers[experts]
            with torch.no_grad():
                self._check_once(original, experts, (hidden_TH, index_TK, gates_TK), output)
                valid_T = self._valid_rows(tokens, hidden_TH.device)
                sums = self._sums_of(layer, hidden_TH.device)
                sums.add_slots(slots_TKH.detach(), index_TK, gates_TK.detach(), valid_T)
        return output

    # --- bookkeeping ------------------------------------------------------------------------------------------------

    def _valid_rows(self, count: int, device: torch.device) -> torch.Tensor | None:
        """Which of the layer's flattened tokens are no padding; None when all are."""
        if self._mask is None:
            return None
        if self._mask.shape[0] != count:
            raise ConfigError(f"the attention mask covers {self._mask.shape[0]} tokens, the layer sees {count}")
        return self._mask.to(device)

    def _sums_of(self, layer: ExpertLayer, device: torch.device) -> LayerSums:
        key = (self._domain, layer.index)
        if key not in self._sums:
            self._sums[key] = LayerSums(layer.num_experts, device)
        return self._sums[key]

    def _check_once(
        self, original: Callable[..., torch.Tensor], experts: nn.Module, given: tuple[Any, ...], rebuilt: torch.Tensor
    ) -> None:
        """Compare a layer's rebuilt output with the model's own, on the first batch."""
        if experts not in self._unchecked:
            return
        self._unchecked.remove(experts)
        own = original(experts, *given).float()
        error = float((rebuilt.float() - own).norm() / own.norm().clamp_min(1e-30))
        if not error <= _TOLERANCE.get(rebuilt.element_size(), 2e-2):
            raise MoePruneError(
                f"self-check failed in layer {self.layers[experts].index}: the recorded slots rebuild the layer's "
                f"output with a relative error of {error:.1e}",
                "the statistics would be wrong; please report the model and the versions",
            )

    def result(
        self, *, command: Mapping[str, Any] | None = None, inputs: Mapping[str, str] | None = None, **more: Any
    ) -> RouterStatistics:
        """What was added up until now.

        Raises:
            ConfigError: no token was seen.
            MoePruneError: a forward pass ended before the last layer.
        """
        domains = tuple(dict.fromkeys(domain for domain, _ in self._sums))
        if not any(sums.tokens for sums in self._sums.values()):
            raise ConfigError("no token was observed", "run the model inside the block")
        indices = sorted(layer.index for layer in self.layers.values())
        layers: dict[int, dict[str, AnyArray]] = {}
        for index in indices:
            per_domain = [self._whole(domain, index).arrays() for domain in domains]
            layers[index] = {name: np.stack([arrays[name] for arrays in per_domain]) for name in STATISTICS}
        any_sums = next(iter(self._sums.values()))
        return RouterStatistics(
            domains=domains,
            num_experts=any_sums.num_experts,
            top_k=any_sums.top_k,
            layers=layers,
            command=command or {"stage": "observe"},
            inputs={"model": self._fingerprint} | dict(inputs or {}),
            **more,
        )

    def _whole(self, domain: str, index: int) -> LayerSums:
        """A layer's sums, which must be over the same tokens as every other layer's."""
        tokens = {sums.tokens for (name, _), sums in self._sums.items() if name == domain}
        if len(tokens) > 1 or (domain, index) not in self._sums:
            raise MoePruneError(
                f"the layers did not see the same tokens in domain {domain!r}",
                "a forward pass ended early: observe again without that batch",
            )
        return self._sums[domain, index]

    def save(self, path: PathLike) -> Path:
        """Write the statistics file."""
        return self.result().save(path)


def _weighted_sum(gates_TK: torch.Tensor, slots_TKH: torch.Tensor) -> torch.Tensor:
    """Sum of the slots by their gates, [T, H], in the wider of the two dtypes."""
    import torch

    dtype = torch.promote_types(gates_TK.dtype, slots_TKH.dtype)
    return torch.bmm(gates_TK.to(dtype).unsqueeze(1), slots_TKH.to(dtype)).squeeze(1)


def _recomputing() -> bool:
    """Whether autograd is running a backward pass: then gradient checkpointing runs a layer a second time."""
    import torch

    return bool(torch._C._current_graph_task_id() != -1)  # noqa: SLF001 - what torch.utils.checkpoint asks itself


@contextlib.contextmanager
def observe(model: PreTrainedModel, *, domain: str = "default", like: PathLike | None = None) -> Iterator[Observation]:
    """Observe every forward pass of a model inside the block.

    Each token is counted once, also under gradient checkpointing and accumulation; padding is left out by the batch's
    own ``attention_mask`` [batch, sequence]; gradients are those of the unobserved model; the experts implementation is
    restored on exit.

    Args:
        model: a loaded transformers model.
        domain: label of the batches, until :meth:`Observation.domain` changes it.
        like: the checkpoint folder that the plan will be made for; by default the one the model was loaded from.

    Yields:
        The observation; ``result()`` gives :class:`RouterStatistics`, ``save(path)`` writes them.

    Raises:
        UnsupportedModelError: the model has no experts that can be observed.
        ConfigError: the model is being observed already.

    Example:
        >>> with moeprune.observe(model) as stats:
        ...     for batch in loader:
        ...         model(**batch)
        >>> stats.save("statistics.safetensors")
    """
    observation = Observation(model, domain=domain, fingerprint=fingerprint_of(model, like))
    if any(is_wrapped(experts, observation.run_experts) for experts in observation.layers):
        raise ConfigError("the model is being observed already", "label parts of the data with domain()")
    with contextlib.ExitStack() as undo:
        base = model.base_model  # below the head: whatever calls it, the mask is that of the running batch
        signature = inspect.signature(base.forward)
        undo.callback(
            base.register_forward_pre_hook(
                lambda _, args, kwargs: observation.read_mask(signature, args, kwargs), with_kwargs=True
            ).remove
        )
        for layer in observation.layers.values():
            after = functools.partial(_after_router, observation, layer)
            undo.callback(layer.router.register_forward_hook(after).remove)
        undo.enter_context(wrapped_experts(model, dict.fromkeys(observation.layers, observation.run_experts)))
        yield observation


def _after_router(observation: Observation, layer: ExpertLayer, _: nn.Module, __: Any, output: Any) -> None:
    observation.read_logits(layer, output)


def fingerprint_of(model: PreTrainedModel, like: PathLike | None = None) -> str:
    """Fingerprint of the checkpoint that a loaded model is of, or empty.

    Args:
        model: the loaded model.
        like: its checkpoint; by default the folder it was loaded from, unless it was pruned since.

    Raises:
        ConfigError: the checkpoint has another number of experts.
    """
    from moeprune.checkpoint import open_checkpoint

    folder = getattr(model.config, "_name_or_path", "") if like is None else like
    if like is None and (not folder or not Path(folder).is_dir() or hasattr(model, PLAN_ATTRIBUTE)):
        return ""
    checkpoint = open_checkpoint(folder)
    for layer in expert_layers(model):
        if layer.num_experts != checkpoint.num_experts:
            raise ConfigError(
                f"the model has {layer.num_experts} experts in layer {layer.index}, {folder} has "
                f"{checkpoint.num_experts}",
                "name the checkpoint that the model is of with like=FOLDER",
            )
    return checkpoint.fingerprint
