"""Token-skip gating of a loaded model: slots that a policy finds not worth it are not run.

The gate stands before a layer's experts. It decides from what the router gave, hands on only the rows of the slots that
stay, and adds up what comes back token by token. So a skipped slot costs nothing in any implementation of the
experts below, a token whose slots are all skipped gets exactly zero from them, and where nothing is skipped the model's
own call is made, to the bit.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moeprune.errors import ConfigError, PlanError, StaleArtifactError
from moeprune.experts import GATES_ATTRIBUTE, ExpertLayer, expert_layers
from moeprune.plans_skip import Renorm, SkipLayer, SkipPlan
from moeprune.runtime.policies import ZERO_EXPERTS, Policy, Routed, policy_named, reweighted
from moeprune.runtime.zero_experts import ZeroRouter

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedModel

    Experts = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]

SKIPPING = "moeprune_skip"  # our name among transformers' experts implementations
PLAN_FILE = Path("moeprune") / "plan.json"


@dataclass(slots=True)
class Counts:
    """What one layer really ran; padding is left out of everything but ``rows``.

    Attributes:
        tokens: tokens seen.
        slots: their top-k slots.
        kept: slots that ran.
        rows: rows that went into the experts' kernels, padding included.
        row_flops: floating-point operations of one row.
    """

    tokens: int = 0
    slots: int = 0
    kept: int = 0
    rows: int = 0
    row_flops: int = 0

    @property
    def rate(self) -> float:
        """Share of the slots that were skipped."""
        return 1 - self.kept / self.slots if self.slots else 0.0

    @property
    def flops_per_token(self) -> float:
        """Floating-point operations of routed experts that a token took."""
        return self.kept * self.row_flops / self.tokens if self.tokens else 0.0


@dataclass(slots=True)
class SkipCounter:
    """Counts by decoder layer, of everything that ran inside a block of :func:`counted`."""

    layers: dict[int, Counts] = field(default_factory=dict)
    _mask: Any = None

    @property
    def total(self) -> Counts:
        """All layers together; its tokens are counted once in each of them."""
        sums = Counts(row_flops=max((one.row_flops for one in self.layers.values()), default=0))
        for one in self.layers.values():
            sums.tokens, sums.slots = sums.tokens + one.tokens, sums.slots + one.slots
            sums.kept, sums.rows = sums.kept + one.kept, sums.rows + one.rows
        return sums

    @property
    def rate(self) -> float:
        """Share of all slots that were skipped."""
        return self.total.rate

    @property
    def flops(self) -> int:
        """Floating-point operations of the rows that ran, padding included."""
        return sum(one.rows * one.row_flops for one in self.layers.values())

    def see(self, layer: int, row_flops: int, keep_TK: torch.Tensor) -> None:
        """Add what a gate decided for some tokens."""
        counts = self.layers.setdefault(layer, Counts(row_flops=row_flops))
        valid_T = self._valid(keep_TK)
        counted_TK = keep_TK if valid_T is None else keep_TK[valid_T]
        counts.tokens += counted_TK.shape[0]
        counts.slots += counted_TK.numel()
        counts.kept += int(counted_TK.sum())
        counts.rows += int(keep_TK.sum())

    def read_mask(self, inputs: Mapping[str, Any]) -> None:
        """Before the model runs: keep its padding mask, flattened."""
        mask, tokens = inputs.get("attention_mask"), inputs.get("input_ids")
        tokens = inputs.get("inputs_embeds") if tokens is None else tokens
        if mask is None or tokens is None or getattr(mask, "dim", int)() != 2:
            self._mask = None
        else:
            self._mask = mask[:, -tokens.shape[1] :].reshape(-1).bool()

    def _valid(self, keep_TK: torch.Tensor) -> torch.Tensor | None:
        if self._mask is None:
            return None
        if len(self._mask) != len(keep_TK):
            raise ConfigError(f"the attention mask covers {len(self._mask)} tokens, the layer sees {len(keep_TK)}")
        valid_T: torch.Tensor = self._mask.to(keep_TK.device)
        return valid_T


class NormHead:
    """Predicts how large an expert's output will be from the layer's input, as a second router would.

    Args:
        weight_EH: one row for each expert.
        bias_E: of the logarithm of the norm.
    """

    def __init__(self, weight_EH: torch.Tensor, bias_E: torch.Tensor) -> None:
        self.weight_EH, self.bias_E = weight_EH, bias_E

    def norms(self, hidden_TH: torch.Tensor, index_TK: torch.Tensor) -> torch.Tensor:
        """Predicted norms of the slots' outputs, [T, K]."""
        import torch

        if self.weight_EH.device != hidden_TH.device:
            self.weight_EH, self.bias_E = self.weight_EH.to(hidden_TH.device), self.bias_E.to(hidden_TH.device)
        logs_TE = torch.nn.functional.linear(hidden_TH.detach().float(), self.weight_EH, self.bias_E)
        return logs_TE.gather(-1, index_TK).exp()


class Boundary:
    """Something that stands before the experts of one layer and sees what the router gave.

    Args:
        layer: the modules of the layer.
        logits: whether the router's logits are wanted.

    Attributes:
        below: the experts, while it stands before them.
    """

    def __init__(self, layer: ExpertLayer, *, logits: bool = False) -> None:
        self.layer = layer
        self.below: Experts | None = None
        self._wants_logits = logits
        self._logits_TE: torch.Tensor | None = None
        self._off: list[Callable[[], object]] = []

    def run(self, hidden_TH: torch.Tensor, index_TK: torch.Tensor, gates_TK: torch.Tensor) -> torch.Tensor:
        """In the place of the experts."""
        raise NotImplementedError

    def attach(self) -> None:
        """Stand before the experts until :meth:`detach`.

        Raises:
            ConfigError: something stands there already.
        """
        experts: Any = self.layer.experts
        own = vars(experts).get("forward")  # accelerate puts one there too
        if isinstance(own, _Forward):
            raise ConfigError(
                f"the experts of layer {self.layer.index} are gated already", "leave the other gate first"
            )
        self.below = experts.forward
        experts.forward = _Forward(self)
        self._off.append(functools.partial(_restore, experts, own))
        if self._wants_logits:
            self._off.append(self.layer.router.register_forward_hook(self._read_logits).remove)

    def detach(self) -> None:
        """Go away."""
        while self._off:
            self._off.pop()()
        self.below = self._logits_TE = None

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Stand before the experts inside the block."""
        self.attach()
        try:
            yield
        finally:
            self.detach()

    def logits_of(self, index_TK: torch.Tensor) -> torch.Tensor | None:
        """Raw router logits of the slots, where they are wanted."""
        return None if self._logits_TE is None else self._logits_TE.float().gather(-1, index_TK)

    def _read_logits(self, _: nn.Module, __: Any, output: Any) -> None:
        outputs = output if isinstance(output, tuple) else (output,)
        logits = next(item for item in outputs if item.is_floating_point() and item.shape[-1] == self.layer.num_experts)
        self._logits_TE = logits.detach().reshape(-1, self.layer.num_experts)


class Gate(Boundary):
    """The gate of one MoE layer.

    Args:
        layer: the modules of the layer.
        policy: scores slots.
        decision: the threshold, and what else the policy knows of the layer.
        renorm: what the weights of the slots that run are divided by.
        floor: slots of a token that are never skipped, by policies that keep the best ones.
        head: predicts output norms, for policies that ask for them.

    Attributes:
        decision: may be exchanged while the gate stands, by what trains with it.
        counter: is told of every decision, if there is one.
    """

    def __init__(
        self,
        layer: ExpertLayer,
        policy: Policy,
        decision: SkipLayer,
        renorm: Renorm | None = None,
        floor: int = 1,
        head: NormHead | None = None,
    ) -> None:
        gates = decision.threshold > -math.inf
        if gates and policy.table and len(decision.table) != layer.num_experts:
            raise PlanError(f"layer {layer.index}: the table has {len(decision.table)} values, not {layer.num_experts}")
        if gates and policy.head and (head is None or len(head.bias_E) != layer.num_experts):
            raise PlanError(f"layer {layer.index} has no output norms for its {layer.num_experts} experts")
        super().__init__(layer, logits=policy.logits)
        self.policy, self.decision, self.head = policy, decision, head
        self.renorm, self.floor = renorm or Renorm(), floor
        self.counter: SkipCounter | None = None

    @functools.cached_property
    def row_flops(self) -> int:
        """Floating-point operations of one row: two for each weight of an expert."""
        matrices = [value for value in self.layer.experts.parameters() if value.dim() > 2]
        return 2 * sum(value.numel() for value in matrices) // self.layer.num_experts

    def keep(self, hidden_TH: torch.Tensor, index_TK: torch.Tensor, gates_TK: torch.Tensor) -> torch.Tensor:
        """The one decision: which slots of some tokens run, [T, K]."""
        import torch

        with torch.no_grad():
            routed = self._routed(index_TK, gates_TK)
            if self.policy.head and self.head is not None:
                routed = dataclasses.replace(routed, norms_TK=self.head.norms(hidden_TH, index_TK))
            return self.policy.kept(routed)

    def run(self, hidden_TH: torch.Tensor, index_TK: torch.Tensor, gates_TK: torch.Tensor) -> torch.Tensor:
        """In the place of the experts: run the slots that are kept."""
        import torch

        assert self.below is not None  # noqa: S101 - the gate stands
        if self.decision.threshold == -math.inf:
            keep_TK = torch.ones_like(index_TK, dtype=torch.bool) if self.counter is not None else None
        else:
            keep_TK = self.keep(hidden_TH, index_TK, gates_TK)
        if self.counter is not None and keep_TK is not None:
            self.counter.see(self.layer.index, self.row_flops, keep_TK)
        if keep_TK is None or self.decision.threshold == -math.inf:
            return self.below(hidden_TH, index_TK, gates_TK)
        if self.renorm.kind != "none":
            gates_TK = reweighted(gates_TK, keep_TK, self._routed(index_TK, gates_TK).ranks_TK, self.renorm)
        return compacted(self.below, hidden_TH, index_TK, gates_TK, keep_TK)

    def _routed(self, index_TK: torch.Tensor, gates_TK: torch.Tensor) -> Routed:
        return Routed(
            index_TK=index_TK,
            gates_TK=gates_TK.detach().float(),
            layer=self.decision,
            logits_TK=self.logits_of(index_TK),
            floor=self.floor,
        )


class ZeroGate(Gate):
    """Slots that went to zero experts are not run.

    Args:
        layer: the modules of the layer.
        decision: its threshold is the zero experts' offset.
        router: the layer's router with rows for zero experts.
    """

    def __init__(self, layer: ExpertLayer, decision: SkipLayer, router: ZeroRouter) -> None:
        self.router = router
        super().__init__(layer, policy_named(ZERO_EXPERTS), decision)

    @property
    def decision(self) -> SkipLayer:
        """The layer's decision, which the router follows."""
        return self._decision

    @decision.setter
    def decision(self, decision: SkipLayer) -> None:
        self._decision, self.router.offset = decision, decision.threshold

    def attach(self) -> None:
        """Stand before the experts, and in the place of the router."""
        super().attach()
        self._off.append(self.router.stand())

    def keep(self, hidden_TH: torch.Tensor, index_TK: torch.Tensor, gates_TK: torch.Tensor) -> torch.Tensor:
        """Which slots have a real expert, [T, K]."""
        return index_TK < self.layer.num_experts


class _Forward:
    """What stands in the place of an experts module's ``forward``."""

    def __init__(self, boundary: Boundary) -> None:
        self.boundary = boundary

    def __call__(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        return self.boundary.run(hidden_states, top_k_index, top_k_weights)


def _restore(module: Any, own: object) -> None:
    """Give a module back the ``forward`` of its own that it had, or that of its class."""
    del module.forward
    if own is not None:
        module.forward = own


def compacted(
    experts: Experts, hidden_TH: torch.Tensor, index_TK: torch.Tensor, gates_TK: torch.Tensor, keep_TK: torch.Tensor
) -> torch.Tensor:
    """Run only some slots: each is a row of its own with one expert.

    Args:
        experts: the function below.
        hidden_TH: input of the layer.
        index_TK: the chosen experts, gates_TK: their weights.
        keep_TK: which slots run.

    Returns:
        The layer's output [T, H]; what a token gets does not depend on the slots of others, whatever the device.
    """
    import torch

    tokens, top_k = keep_TK.shape
    slots_S = keep_TK.reshape(-1)
    [place_R] = slots_S.nonzero(as_tuple=True)
    if len(place_R) == tokens * top_k:
        return experts(hidden_TH, index_TK, gates_TK)
    # Grouped by expert already, so that whatever the experts do to group them reads memory in its order.
    chosen_R, order_R = index_TK.reshape(-1)[place_R].sort(stable=True)
    ones_R1 = gates_TK.new_ones((len(place_R), 1))
    rows_RH = experts(hidden_TH[place_R[order_R] // top_k], chosen_R[:, None], ones_R1)
    # Weighted and added up in one go, in the precision of the weights: a bag of rows for each token.
    row_R = torch.empty_like(order_R)
    row_R[order_R] = torch.arange(len(order_R), device=order_R.device)
    ends_T = keep_TK.sum(dim=1).cumsum(0)
    bags = torch.nn.functional.embedding_bag(
        row_R,
        rows_RH.to(gates_TK.dtype),
        ends_T - keep_TK.sum(dim=1),
        mode="sum",
        per_sample_weights=gates_TK.reshape(-1)[place_R],
    )
    return bags.to(hidden_TH.dtype)


# --- whole models -----------------------------------------------------------------------------------------------------


def attach(model: PreTrainedModel, plan: SkipPlan) -> PreTrainedModel:
    """Gate a loaded model, in place and for good.

    Args:
        model: a loaded transformers model, pruned or not, on any device and in any dtype.
        plan: what :func:`moeprune.skip` made for its checkpoint.

    Returns:
        The same model.

    Raises:
        PlanError: the plan does not fit the model.
        ConfigError: the model is gated already.
    """
    if hasattr(model, GATES_ATTRIBUTE):
        raise ConfigError("the model is gated already", "load it again to gate it by another plan")
    gates = gates_of(expert_layers(model), plan)
    for gate in gates.values():
        gate.attach()
    setattr(model, GATES_ATTRIBUTE, gates)
    return model


def detach(model: PreTrainedModel) -> PreTrainedModel:
    """Take the gates of a model away: it runs all of its slots again."""
    for gate in getattr(model, GATES_ATTRIBUTE, {}).values():
        gate.detach()
    vars(model).pop(GATES_ATTRIBUTE, None)
    return model


def gates_of(layers: list[ExpertLayer], plan: SkipPlan) -> dict[int, Gate]:
    """The gates of a model's layers, by decoder layer; they are not on yet.

    Raises:
        PlanError: the plan names other layers, or was made for another number of experts per token.
    """
    if plan.baked:
        return {}
    policy_named(plan.policy)
    odd = plan.layers.keys() - {layer.index for layer in layers}
    if odd:
        raise PlanError(f"the plan gates layer {min(odd)}, in which the model has no experts")
    return {layer.index: gate_of(layer, plan) for layer in layers}


def gate_of(layer: ExpertLayer, plan: SkipPlan) -> Gate:
    """The gate of one layer, which is not on yet.

    Raises:
        PlanError: the plan was made for another number of experts, or of experts per token.
        ConfigError: there is no such policy.
    """
    top_k = int(layer.experts.config.num_experts_per_tok)  # type: ignore[union-attr, arg-type]
    if top_k != plan.top_k:
        raise PlanError(f"the plan is for {plan.top_k} experts per token, and the model has {top_k}")
    decision = plan.layers.get(layer.index, SkipLayer())
    if plan.policy == ZERO_EXPERTS and layer.index in plan.layers:
        return ZeroGate(layer, decision, ZeroRouter.of(layer, plan.tensors))
    return Gate(layer, policy_named(plan.policy), decision, plan.renorm, plan.floor, head_of(plan, layer.index))


def head_of(plan: SkipPlan, layer: int) -> NormHead | None:
    """What the plan's side file holds to predict the output norms of a layer."""
    import torch

    names = [f"layers.{layer}.norm_{part}" for part in ("weight", "bias")]
    if not all(name in plan.tensors for name in names):
        return None
    weight_EH, bias_E = (torch.from_numpy(plan.tensors[name]) for name in names)
    return NormHead(weight_EH, bias_E)


@contextlib.contextmanager
def counted(model: PreTrainedModel) -> Iterator[SkipCounter]:
    """Count what a gated model really runs inside the block: slots, rows, floating-point operations.

    Args:
        model: what :func:`moeprune.load` gave, or was gated otherwise.

    Raises:
        ConfigError: the model is not gated.

    Example:
        >>> model = moeprune.load("gated")
        >>> with moeprune.counted(model) as counter:
        ...     model(input_ids)
        >>> counter.rate, counter.layers[3].flops_per_token
    """
    import inspect

    gates: Mapping[int, Gate] = getattr(model, GATES_ATTRIBUTE, {})
    if not gates:
        raise ConfigError("the model skips nothing, so that there is nothing to count", "load it with moeprune.load")
    counter = SkipCounter()
    signature = inspect.signature(model.base_model.forward)

    def read_mask(_: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        counter.read_mask(signature.bind_partial(*args, **kwargs).arguments | dict(kwargs))

    before = {index: gate.counter for index, gate in gates.items()}
    hook = model.base_model.register_forward_pre_hook(read_mask, with_kwargs=True)
    try:
        for gate in gates.values():
            gate.counter = counter
        yield counter
    finally:
        hook.remove()
        for index, gate in gates.items():
            gate.counter = before[index]


# --- transformers' own way to ask for it ------------------------------------------------------------------------------


def register() -> None:
    """Offer ``experts_implementation="moeprune_skip"`` to ``from_pretrained``."""
    from transformers.integrations.finegrained_fp8 import ALL_FP8_EXPERTS_FUNCTIONS
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    for interface in (ALL_EXPERTS_FUNCTIONS, ALL_FP8_EXPERTS_FUNCTIONS):
        if SKIPPING not in interface.valid_keys():
            interface.register(SKIPPING, first_run)


def first_run(
    experts: nn.Module, hidden_TH: torch.Tensor, index_TK: torch.Tensor, gates_TK: torch.Tensor
) -> torch.Tensor:
    """The first layer of a model that was loaded with our implementation: gate the model, then run it.

    Afterwards the model has the implementation that transformers would have chosen, below the gates.
    """
    model = _running_model()
    folder = Path(model.config._name_or_path)  # noqa: SLF001 - where transformers keeps the path
    model.set_experts_implementation(model.get_correct_experts_implementation(None))
    attach(model, plan_in(folder))
    output: torch.Tensor = experts(hidden_TH, index_TK, gates_TK)
    return output


def _running_model() -> PreTrainedModel:
    """The outermost transformers model whose forward pass is under way; an experts module does not know its own."""
    from transformers import PreTrainedModel

    found: PreTrainedModel | None = None
    frame: Any = sys._getframe()  # noqa: SLF001
    while frame is not None:
        candidate = frame.f_locals.get("self")
        if isinstance(candidate, PreTrainedModel):
            found = candidate
        frame = frame.f_back
    if found is None:
        raise ConfigError("a layer runs outside of its model", "load the model with moeprune.load")
    return found


def plan_in(folder: Path) -> SkipPlan:
    """The skip plan of a checkpoint that ``moeprune skip`` wrote.

    Raises:
        ConfigError: there is none.
    """
    file = folder / PLAN_FILE
    if not file.is_file():
        raise ConfigError(
            f"{folder} has no {PLAN_FILE}, so that nothing says what to skip", "write it with moeprune skip"
        )
    return SkipPlan.load(file)


def check_made_for(plan: SkipPlan, fingerprint: str, name: str) -> None:
    """Refuse a plan that was made for another model.

    Raises:
        StaleArtifactError: it was.
    """
    if plan.inputs.get("model") != fingerprint:
        raise StaleArtifactError(f"the plan was made for another model than {name}", "make one with moeprune skip")
