"""The three points where a running model is observed, whatever its architecture.

1. A function in transformers' experts interface sees the indices and weights that are really used, and the outputs of
   the experts.
2. A hook on each router sees its logits.
3. A hook on the model below the head sees the attention mask, so that padding is left out.

Routing is never derived again from logits. The observed layer computes its output from the same per-slot outputs that
are recorded, and on the first tokens that output is compared with the model's own.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import itertools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from moeprune._files import PathLike
from moeprune.catalogue import PATHS, origin, requested
from moeprune.checkpoint import Checkpoint, open_checkpoint
from moeprune.collectors.more import CORE, More, Request
from moeprune.collectors.routes import Routes
from moeprune.collectors.sums import LayerSums
from moeprune.collectors.weights import facts_of, problem_of
from moeprune.errors import ConfigError, MoePruneError, UnsupportedModelError, nearest
from moeprune.experts import GATES_ATTRIBUTE, ExpertLayer, expert_layers, is_wrapped, slot_rows, wrapped_experts
from moeprune.statistics import STATISTICS, AnyArray, LayerArrays, RouterStatistics, added

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedModel

    from moeprune.collectors.weights import Loader

PLAN_ATTRIBUTE = "moeprune_plan"  # where a model that was pruned in place keeps its plan
_TOLERANCE = {4: 1e-5, 2: 2e-2}  # relative error of the rebuilt layer output, by bytes per element


class Observation:
    """Statistics of a model that is being observed; give the current domain with :meth:`domain`.

    The tokens of every domain fall into two halves, which :meth:`batch` names; outside of it forward passes belong to
    them in turn.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        domain: str,
        fingerprint: str,
        domains: Sequence[str] = (),
        layers: Collection[int] | None = None,
        request: Request = CORE,
    ) -> None:
        found = expert_layers(model)
        self.layers = {layer.experts: layer for layer in _chosen(found, layers)}  # by what is observed
        self.more = More(request, found, [*self.layers.values()])
        self.passed = {layer.experts: layer for layer in found if layer.experts not in self.layers}
        self.loader: Loader | None = None  # where the layer that runs does not hold its experts
        self._domain = domain
        self._announced = tuple(domains)
        self._domains = dict.fromkeys(domains)  # in the order of the result
        self._given_half: int | None = None
        self._passes: dict[str, int] = {}  # forward passes by domain, to tell whose turn it is
        self._given: tuple[Sequence[int] | None, Routes | None] = None, None  # what was said of the running batch
        self._numbers: dict[str, int] = {}  # sequences by domain
        self._fingerprint = fingerprint
        self._mask: torch.Tensor | None = None
        self._sums: dict[tuple[str, int, int], LayerSums] = {}  # by domain, half and layer
        self._facts: dict[int, dict[str, AnyArray]] = {}  # of the weights, by layer
        self._unchecked = set(self.layers)
        self.paused = False  # then the model runs as if nobody looked
        self.slot_rows = 0  # (token, slot) rows that run at a time; 0 leaves it to the size of the layer

    @contextlib.contextmanager
    def domain(self, name: str) -> Iterator[None]:
        """Label the batches inside the block."""
        before, self._domain = self._domain, name
        try:
            yield
        finally:
            self._domain = before

    @contextlib.contextmanager
    def batch(
        self, domain: str, half: int, *, rows: Sequence[int] | None = None, routes: Routes | None = None
    ) -> Iterator[None]:
        """Label what runs inside the block with its domain and its half of the data.

        Args:
            domain: label.
            half: 0 or 1.
            rows: the number of each sequence in its domain; else they are counted.
            routes: where the tokens went before, if the layers run one at a time.
        """
        if half not in {0, 1}:
            raise ConfigError(f"there is no half {half!r} of the calibration data", "the halves are 0 and 1")
        before = self._given_half, self._given
        self._given_half, self._given = half, (rows, routes)
        try:
            with self.domain(domain):
                yield
        finally:
            self._given_half, self._given = before

    # --- the three points -------------------------------------------------------------------------------------------

    def read_mask(self, signature: inspect.Signature, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Before the model below the head runs: keep the batch's own padding mask, flattened."""
        if self.paused:
            return
        given = signature.bind_partial(*args, **kwargs).arguments
        given = {**given.get("kwargs", {}), **given}
        self._count_pass(given.get("past_key_values"))
        mask, tokens = given.get("attention_mask"), given.get("input_ids")
        tokens = given.get("inputs_embeds") if tokens is None else tokens
        self._begin_batch(tokens, given.get("past_key_values"))
        if mask is None or tokens is None:
            self._mask = None
        elif getattr(mask, "dim", int)() == 2:
            flat = mask[:, -tokens.shape[1] :].reshape(-1).bool()  # a cache makes the mask longer
            self._mask = None if bool(flat.all()) else flat
        else:
            raise ConfigError("padding can only be left out of a [batch, sequence] attention_mask", "pass that one")

    def read_logits(self, layer: ExpertLayer, output: Any) -> None:
        """After a router ran: add its logits."""
        if self.paused or _recomputing():
            return
        outputs = output if isinstance(output, tuple) else (output,)
        fitting = (item for item in outputs if item.is_floating_point() and item.shape[-1] == layer.num_experts)
        logits = next(fitting, None)
        if logits is None:
            raise UnsupportedModelError(f"the router of layer {layer.index} returns no logits of its experts")
        logits_TE = logits.detach().reshape(-1, layer.num_experts)
        sums, valid_T = self._sums_of(layer, logits.device), self._valid_rows(len(logits_TE), logits.device)
        sums.add_logits(logits_TE, valid_T)
        self.more.see_logits(layer, sums, logits_TE, valid_T)

    def run_experts(
        self,
        original: Callable[..., torch.Tensor],
        experts: nn.Module,
        hidden_TH: torch.Tensor,
        index_TK: torch.Tensor,
        gates_TK: torch.Tensor,
    ) -> torch.Tensor:
        """In place of the experts: the same output, from per-slot outputs that are added up.

        Every (token, slot) pair goes through the model's own implementation as a token with one expert of weight 1. A
        slice of the tokens runs at a time, so that however large the batch is, its pairs are never in memory together.
        """
        import torch

        if self.paused:
            return original(experts, hidden_TH, index_TK, gates_TK)
        tokens, top_k = index_TK.shape
        num_experts = self.layers[experts].num_experts
        rows = self.slot_rows or slot_rows(hidden_TH.shape[-1], num_experts, hidden_TH.device.type)
        step = max(1, rows // top_k)
        valid_T = None if _recomputing() else self._valid_rows(tokens, hidden_TH.device)
        given = [torch.split(rows, step) for rows in (hidden_TH, index_TK, gates_TK)]
        others = [
            torch.split(rows, step) if rows is not None else itertools.repeat(None)
            for rows in (valid_T, self.more.residual(self.layers[experts]))
        ]
        slices = zip(*given, *others, strict=False)
        outputs = (self._run_slice(original, experts, *one) for one in slices)
        if torch.is_grad_enabled():
            output_TH = torch.cat(list(outputs))
        else:
            output_TH = torch.empty_like(hidden_TH)
            for place, output in zip(torch.split(output_TH, step), outputs, strict=True):
                place.copy_(output)
        self._see_layer(original, self.layers[experts], hidden_TH, index_TK, gates_TK)
        return output_TH

    def pass_by(
        self,
        original: Callable[..., torch.Tensor],
        experts: nn.Module,
        hidden_TH: torch.Tensor,
        index_TK: torch.Tensor,
        gates_TK: torch.Tensor,
    ) -> torch.Tensor:
        """In place of experts that are not observed: see where the tokens go."""
        if not self.paused:
            self._see_layer(original, self.passed[experts], hidden_TH, index_TK, gates_TK)
        return original(experts, hidden_TH, index_TK, gates_TK)

    def _see_layer(self, original: Callable[..., torch.Tensor], layer: ExpertLayer, *rows: torch.Tensor) -> None:
        import torch

        if _recomputing():
            return
        device = rows[0].device
        with torch.no_grad():
            self.more.see_layer(
                layer,
                functools.partial(self._sums_of, device=device),
                functools.partial(original, layer.experts),
                self._domain,
                self._valid_rows(len(rows[0]), device),
                *(values.detach() for values in rows),
            )

    def _run_slice(
        self,
        original: Callable[..., torch.Tensor],
        experts: nn.Module,
        hidden_TH: torch.Tensor,
        index_TK: torch.Tensor,
        gates_TK: torch.Tensor,
        valid_T: torch.Tensor | None,
        residual_TH: torch.Tensor | None,
    ) -> torch.Tensor:
        import torch

        tokens, top_k = index_TK.shape
        ones = torch.ones_like(gates_TK).reshape(-1, 1)
        rows = hidden_TH.repeat_interleave(top_k, dim=0)
        slots_TKH = original(experts, rows, index_TK.reshape(-1, 1), ones).view(tokens, top_k, -1)
        output = _weighted_sum(gates_TK, slots_TKH).to(hidden_TH.dtype)
        if not _recomputing():
            with torch.no_grad():
                self._check_once(original, experts, (hidden_TH, index_TK, gates_TK), output)
                sums = self._sums_of(self.layers[experts], hidden_TH.device)
                sums.add_slots(slots_TKH.detach(), index_TK, gates_TK.detach(), valid_T)
                self.more.see_slots(
                    self.layers[experts],
                    sums,
                    valid_T,
                    self.loader,
                    hidden_TH=hidden_TH,
                    experts_TK=index_TK,
                    gates_TK=gates_TK,
                    outputs_TKH=slots_TKH,
                    routed_TH=output,
                    residual_TH=residual_TH,
                )
        return output

    # --- bookkeeping ------------------------------------------------------------------------------------------------

    def _valid_rows(self, count: int, device: torch.device) -> torch.Tensor | None:
        """Which of the layer's flattened tokens are no padding; None when all are."""
        if self._mask is None:
            return None
        if self._mask.shape[0] != count:
            raise ConfigError(f"the attention mask covers {self._mask.shape[0]} tokens, the layer sees {count}")
        return self._mask.to(device)

    def _begin_batch(self, tokens: torch.Tensor | None, cache: Any) -> None:
        """Note what a batch is: its shape, the numbers of its sequences, and that its tokens went nowhere yet."""
        rows, routes = self._given
        self.more.shape = (0, 0) if tokens is None else (tokens.shape[0], tokens.shape[1])
        if rows is None and routes is None:
            begun = getattr(cache, "get_seq_length", int)() > 0  # its first part was described
            start = self._numbers.get(self._domain, 0)
            rows = () if begun else range(start, start + self.more.shape[0])
            self._numbers[self._domain] = start + len(rows)
        self.more.rows, self.more.routes = tuple(rows or ()), routes or Routes()

    def _count_pass(self, cache: Any) -> None:
        """Note that a forward pass of the current domain begins; one that goes on with a cache is no new one."""
        begun = getattr(cache, "get_seq_length", int)() > 0
        self._passes[self._domain] = self._passes.get(self._domain, 0) + (not begun)

    @property
    def _half(self) -> int:
        if self._given_half is not None:
            return self._given_half
        return max(0, self._passes.get(self._domain, 0) - 1) % 2  # the first pass belongs to the first half

    def _sums_of(self, layer: ExpertLayer, device: torch.device) -> LayerSums:
        key = (self._domain, self._half, layer.index)
        if key not in self._sums:
            if self._announced and self._domain not in self._announced:
                raise ConfigError(f"domain {self._domain!r} was not announced", nearest(self._domain, self._announced))
            self._domains[self._domain] = None
            self._sums[key] = LayerSums(layer.num_experts, device, self.more.shapes(layer))
        return self._sums[key]

    def _check_once(
        self, original: Callable[..., torch.Tensor], experts: nn.Module, given: tuple[Any, ...], rebuilt: torch.Tensor
    ) -> None:
        """Compare a layer's rebuilt output with the model's own, on the first tokens."""
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
        if not any(sums.tokens for sums in self._sums.values()):
            raise ConfigError("no token was observed", "run the model inside the block")
        self.read_weights()
        return self.statistics(self.arrays(), command=command, inputs=inputs, **more)

    def read_weights(self, index: int | None = None) -> None:
        """Look at the weights of a layer, or of all layers, as they are now; those that are packed are left out."""
        for experts, layer in self.layers.items():
            if index in {None, layer.index} and not problem_of(experts, elsewhere=self.loader is not None):
                self._facts[layer.index] = facts_of(experts, self.more.facts, self.loader)

    def arrays(self) -> dict[int, LayerArrays]:
        """The sums of every observed decoder layer up until now."""
        return {layer.index: self._arrays_of(layer) for layer in self.layers.values()}

    def statistics(
        self,
        layers: Mapping[int, LayerArrays],
        *,
        command: Mapping[str, Any] | None = None,
        inputs: Mapping[str, str] | None = None,
        **more: Any,
    ) -> RouterStatistics:
        """Statistics of this model from sums by decoder layer, its own or those of several processes together."""
        first = next(iter(layers.values()))
        some = first.total
        return RouterStatistics.of_layers(
            layers,
            domains=tuple(self._domains),
            num_experts=some["count"].shape[-1],
            top_k=int(some["count"].sum() // max(1, some["tokens"].sum())),
            command=command or {"stage": "observe"} | origin((*first.total, *first.facts)),
            inputs={"model": self._fingerprint} | dict(inputs or {}),
            **more,
        )

    def take(self, index: int) -> LayerArrays:
        """The sums of one decoder layer, which the observation forgets.

        The domains are in the order in which they were announced or else appeared; one that the layer did not see has
        zeros.
        """
        [layer] = [layer for layer in self.layers.values() if layer.index == index]
        arrays = self._arrays_of(layer)
        self._sums = {key: sums for key, sums in self._sums.items() if key[2] != index}
        self.more.forget(index)
        return arrays

    def _arrays_of(self, layer: ExpertLayer) -> LayerArrays:
        first, second = (self._stacked(layer, half) for half in (0, 1))
        total = {name: added(name, first[name], second[name]) for name in first}
        rows = self.more.row_arrays(layer, tuple(self._domains))
        return LayerArrays(total=total, first_half=first, rows=rows, facts=self._facts.get(layer.index, {}))

    def _stacked(self, layer: ExpertLayer, half: int) -> dict[str, AnyArray]:
        """Arrays [domains, ...] of one half of the data."""
        import torch

        nothing = LayerSums(layer.num_experts, torch.device("cpu"), self.more.shapes(layer))
        rows = [self._sums.get((domain, half, layer.index), nothing).arrays() for domain in self._domains]
        return {name: np.stack([arrays[name] for arrays in rows]) for name in (*STATISTICS, *self.more.summed)}

    def save(self, path: PathLike) -> Path:
        """Write the statistics file."""
        return self.result().save(path)


def _chosen(found: Sequence[ExpertLayer], wanted: Collection[int] | None) -> list[ExpertLayer]:
    """The layers that shall be observed."""
    indices = [layer.index for layer in found]
    missing = sorted(set(wanted or ()) - set(indices))
    if missing or (wanted is not None and not wanted):
        what = f"layer {missing[0]} has no experts to observe" if missing else "no layer is to be observed"
        raise ConfigError(what, f"layers with experts: {', '.join(map(str, indices))}")
    return [layer for layer in found if wanted is None or layer.index in wanted]


def _weighted_sum(gates_TK: torch.Tensor, slots_TKH: torch.Tensor) -> torch.Tensor:
    """Sum of the slots by their gates, [T, H], in the wider of the two dtypes; one slot is widened at a time."""
    import torch

    dtype = torch.promote_types(gates_TK.dtype, slots_TKH.dtype)
    gates_TK1 = gates_TK.to(dtype).unsqueeze(-1)
    total_TH = gates_TK1[:, 0] * slots_TKH[:, 0].to(dtype)
    for slot in range(1, slots_TKH.shape[1]):
        total_TH = torch.addcmul(total_TH, gates_TK1[:, slot], slots_TKH[:, slot].to(dtype))
    return total_TH


def _recomputing() -> bool:
    """Whether autograd is running a backward pass: then gradient checkpointing runs a layer a second time."""
    import torch

    return bool(torch._C._current_graph_task_id() != -1)  # noqa: SLF001 - what torch.utils.checkpoint asks itself


def _unwrapped(model: Any) -> PreTrainedModel:
    """The model inside of what runs it in several processes."""
    from torch.nn import DataParallel
    from torch.nn.parallel import DistributedDataParallel

    if isinstance(model, DataParallel):
        raise ConfigError(
            "torch.nn.DataParallel runs copies of the model that cannot be observed",
            "run one process per device, with `accelerate launch` or `torchrun`",
        )
    inner: PreTrainedModel = model.module if isinstance(model, DistributedDataParallel) else model
    return inner


@contextlib.contextmanager
def observe(
    model: PreTrainedModel,
    *,
    domain: str = "default",
    like: PathLike | Checkpoint | None = None,
    layers: Collection[int] | None = None,
    domains: Sequence[str] = (),
    statistics: Sequence[str] | str = (),
    paths: int = PATHS,
    sequences: Mapping[str, int] | None = None,
) -> Iterator[Observation]:
    """Observe every forward pass of a model inside the block.

    Each token is counted once, also under gradient checkpointing and accumulation; padding is left out by the batch's
    own ``attention_mask`` [batch, sequence]; gradients are those of the unobserved model; the experts implementation is
    restored on exit.

    Args:
        model: a loaded transformers model, also inside of ``DistributedDataParallel``: then every process sees its
            own share of the tokens.
        domain: label of the batches, until :meth:`Observation.domain` changes it.
        like: the checkpoint, opened or its folder, that the plan will be made for; by default the folder the model was
            loaded from.
        layers: decoder layers to observe; by default all that have experts.
        domains: labels in the order that the statistics shall have; by default that of their first batches.
        statistics: names of what to measure beyond the core sums; ``all`` is everything.
        paths: sequences of each domain that the statistics ``path_*`` describe: the first ones.
        sequences: how many each domain has, where parts of them are seen by several processes.

    Yields:
        The observation; ``result()`` gives :class:`RouterStatistics`, ``save(path)`` writes them.

    Raises:
        UnsupportedModelError: the model has no experts that can be observed.
        ConfigError: the model is being observed already or is run by ``torch.nn.DataParallel``, or one of ``layers``
            has no experts.

    Example:
        >>> with moeprune.observe(model) as stats:
        ...     for batch in loader:
        ...         model(**batch)
        >>> stats.save("statistics.safetensors")
    """
    model = _unwrapped(model)
    if hasattr(model, GATES_ATTRIBUTE):
        raise ConfigError("the model skips slots, and statistics are of models that run them all", "load it ungated")
    observation = Observation(
        model,
        domain=domain,
        fingerprint=fingerprint_of(model, like),
        domains=domains,
        layers=layers,
        request=Request(
            statistics=requested([statistics] if isinstance(statistics, str) else statistics),
            paths=paths,
            sequences=sequences,
        ),
    )
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
        undo.enter_context(observation.more.hooks(model, [*observation.layers.values()]))
        wrappers = dict.fromkeys(observation.layers, observation.run_experts)
        if observation.more.follows:
            wrappers |= dict.fromkeys(observation.passed, observation.pass_by)
        undo.enter_context(wrapped_experts(model, wrappers))
        yield observation


def _after_router(observation: Observation, layer: ExpertLayer, _: nn.Module, __: Any, output: Any) -> None:
    observation.read_logits(layer, output)


def fingerprint_of(model: PreTrainedModel, like: PathLike | Checkpoint | None = None) -> str:
    """Fingerprint of the checkpoint that a loaded model is of, or empty.

    Args:
        model: the loaded model.
        like: its checkpoint; by default the folder it was loaded from, unless it was pruned since.

    Raises:
        ConfigError: the checkpoint has another number of experts.
    """
    if like is None:
        like = str(getattr(model.config, "_name_or_path", ""))
        if not like or not Path(like).is_dir() or hasattr(model, PLAN_ATTRIBUTE):
            return ""
    checkpoint = like if isinstance(like, Checkpoint) else open_checkpoint(like)
    for layer in expert_layers(model):
        if layer.num_experts != checkpoint.num_experts:
            raise ConfigError(
                f"the model has {layer.num_experts} experts in layer {layer.index}, {checkpoint.path} has "
                f"{checkpoint.num_experts}",
                "name the checkpoint that the model is of with like=FOLDER",
            )
    return checkpoint.fingerprint
