"""The weights of a layer's experts, one expert at a time, and the facts that they alone give."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from moeprune.catalogue import known
from moeprune.errors import UnsupportedModelError
from moeprune.statistics import AnyArray

if TYPE_CHECKING:
    import torch
    from torch import nn

_BYTES = 1 << 28  # of experts that are read from files at a time


@dataclass(frozen=True, slots=True, kw_only=True)
class Loader:
    """Reads the experts of a layer that holds none of them in memory.

    Attributes:
        read: gives the parameters of some experts by name, each ``[experts, ...]``.
        step: experts to read at a time.
    """

    read: Callable[[range], Mapping[str, torch.Tensor]]
    step: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertWeights:
    """The weights of one expert, whatever way round the model keeps them.

    Attributes:
        module: the experts module, which says how it keeps them.
        own: this expert's parameters by their names in the module.
    """

    module: Any
    own: Mapping[str, torch.Tensor]

    @property
    def gate(self) -> torch.Tensor:
        """Gate projection [I, H]."""
        return self._of_both(0)

    @property
    def up(self) -> torch.Tensor:
        """Up projection [I, H]."""
        return self._of_both(1)

    @property
    def down(self) -> torch.Tensor:
        """Down projection [H, I]."""
        return self._outputs_first("down_proj")

    @property
    def matrices(self) -> tuple[torch.Tensor, ...]:
        """Gate, up and down."""
        return self.gate, self.up, self.down

    def inner(self, hidden_RH: torch.Tensor) -> torch.Tensor:
        """Input of the down projection [R, I] for rows of the experts' input."""
        import torch

        both = torch.nn.functional.linear(
            hidden_RH, self._outputs_first("gate_up_proj"), self.own.get("gate_up_proj_bias")
        )
        inner_RI: torch.Tensor = self.module._apply_gate(both)  # noqa: SLF001 - what transformers' own kernels call
        return inner_RI

    def output(self, hidden_RH: torch.Tensor) -> torch.Tensor:
        """Output of the expert [R, H] for rows of its input, not multiplied by a gate."""
        import torch

        inner_RI = self.inner(hidden_RH)
        return torch.nn.functional.linear(inner_RI, self._outputs_first("down_proj"), self.own.get("down_proj_bias"))

    def _of_both(self, part: int) -> torch.Tensor:
        both = self._outputs_first("gate_up_proj")
        return both.chunk(2)[part] if self.module.is_concatenated else both[part::2]

    def _outputs_first(self, name: str) -> torch.Tensor:
        weight = self.own[name]
        return weight.T if self.module.is_transposed else weight


def weights_of(experts: Any, loader: Loader | None = None) -> Iterator[tuple[int, ExpertWeights]]:
    """The experts of a layer with their weights, one after another.

    Args:
        experts: the experts module.
        loader: where the module holds no weights.

    Raises:
        UnsupportedModelError: they are no gate, up and down projection, or are packed.
    """
    problem = problem_of(experts, elsewhere=loader is not None)
    if problem:
        raise UnsupportedModelError(f"the weights of the experts cannot be read: {problem}")
    own = dict(experts.named_parameters(recurse=False))
    count: int = experts.num_experts
    step = count if loader is None else loader.step
    for start in range(0, count, step):
        chunk = range(start, min(start + step, count))
        values = own if loader is None else loader.read(chunk)
        for expert in chunk:
            yield (
                expert,
                ExpertWeights(module=experts, own={name: value[expert - start] for name, value in values.items()}),
            )


def problem_of(experts: nn.Module, *, elsewhere: bool = False) -> str:
    """Why single experts of a module cannot be looked at, or an empty string; ``elsewhere``: it need not hold them."""
    import torch

    if not (getattr(experts, "has_gate", False) and hasattr(experts, "is_transposed")):
        return "they are no gate, up and down projection"
    for name in ("gate_up_proj", "down_proj"):
        value = experts._parameters.get(name)  # noqa: SLF001 - may be packed by a quantiser, and no parameter
        if not isinstance(value, torch.Tensor) or value.dim() != 3 or value.shape[0] != experts.num_experts:
            return "they are not kept as one tensor for all experts"
        if value.is_meta and not elsewhere:
            return "they are not in memory"
        if not value.is_floating_point() or value.dtype.itemsize < 2:
            return f"they are packed, as {str(value.dtype).removeprefix('torch.')}"
    return ""


def step_of(experts: Any) -> int:
    """How many experts to read from files at a time."""
    size: int = sum(value.numel() * value.element_size() for value in experts.parameters(recurse=False))
    return max(1, _BYTES * int(experts.num_experts) // max(1, size))


def sizes_of(experts: Any) -> dict[str, int]:
    """Sizes of the axes E, H and I, for arrays that have them; empty where the module does not say."""
    down = experts._parameters.get("down_proj")  # noqa: SLF001 - may be packed by a quantiser
    if down is None or down.dim() != 3:
        return {"E": int(experts.num_experts)}
    hidden, inner = reversed(down.shape[1:]) if getattr(experts, "is_transposed", False) else down.shape[1:]
    return {"E": int(experts.num_experts), "H": int(hidden), "I": int(inner)}


# --- facts ------------------------------------------------------------------------------------------------------------


def facts_of(experts: nn.Module, more: Iterable[str] = (), loader: Loader | None = None) -> dict[str, AnyArray]:
    """What the weights of a layer's experts say, from one pass over them on the device where they are.

    Args:
        experts: the experts module.
        more: facts beyond :data:`moeprune.catalogue.FACTS`.
        loader: where the module holds no weights.

    Returns:
        Arrays by statistic; float64, counts int64.
    """
    import torch

    measures = {name: measure for name in more if (measure := known(name).measure) is not None}
    count = int(experts.num_experts)  # type: ignore[arg-type]
    rows: dict[str, torch.Tensor] = {}
    with torch.no_grad():
        for number, expert in weights_of(experts, loader):
            found = _own_facts(expert) | {name: measure(expert) for name, measure in measures.items()}
            for name, value in found.items():
                if name not in rows:  # made at once: small results between large temporary ones would tear the heap
                    rows[name] = value.new_empty((count, *value.shape), dtype=torch.float64)
                rows[name][number] = value
    arrays = {name: values.cpu().numpy() for name, values in rows.items()}
    arrays["weight_numel"] = np.array(sum(matrix.numel() for matrix in expert.matrices))
    return {name: _as_declared(name, array) for name, array in arrays.items()}


def _as_declared(name: str, array: AnyArray) -> AnyArray:
    return array.astype(np.int64 if known(name).integer else np.float64, copy=False)


def _own_facts(expert: ExpertWeights) -> dict[str, torch.Tensor]:
    """Columns are added up in float32, which is many times faster, and everything from there on in float64."""
    import torch

    facts: dict[str, torch.Tensor] = {}
    squares = []
    for name, matrix in zip(("gate_col_l1", "up_col_l1", "down_col_l1"), expert.matrices, strict=True):
        wide = matrix.float()
        facts[name] = wide.abs().sum(dim=0).double()
        squares.append(wide.square().sum(dim=0).double().sum())
    return facts | {
        "weight_abs_sum": torch.stack([columns.sum() for columns in facts.values()]).sum(),
        "weight_sq_sum": torch.stack(squares).sum(),
    }
