"""Budgets: the scores of all layers to the number of experts that each of them keeps.

A budget never ranks: within a layer the strategy's order holds, and the budget says how far down the layer goes. It is
counted in steps, one expert of every group of the router, so that groups stay equal; without groups a step is one
expert. Layers are compared by the mass of their steps, what each adds to the layer in the strategy's order.

A budget is a priority for every step, never rising down a layer: the steps of highest priority stay, as many as the
target asks for, or all above a threshold. That is what a bisection on the threshold would end at.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Set
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moeprune.errors import ConfigError, PlanError, nearest
from moeprune.plans import RouterShape
from moeprune.statistics import FloatArray

IntArray = NDArray[np.int64]
# By name: the options behind the colon, and what the budget shares out.
BUDGETS: Mapping[str, tuple[tuple[str, ...], str]] = {
    "uniform": ((), "the same count in every layer"),
    "global": ((), "one ranking of all experts by score, each layer's scores divided by their mean"),
    "laep": (
        ("alpha", "beta"),
        "quiet experts go: at most alpha of the mean load, and beta of the layer's load in all",
    ),
    "coverage": (("fraction",), "the best experts that hold one fraction of each layer's score, the same in all"),
    "evolve": (("generations",), "a search over counts for the smallest change of the predictions on a selection text"),
}
_DIGITS = 12  # priorities that agree to this many digits are equal, and the earlier step of the earlier layer wins


@dataclass(frozen=True, slots=True, kw_only=True)
class Allocation:
    """How a budget is shared out over layers.

    Attributes:
        name: one of :data:`BUDGETS`.
        alpha: LAEP: the load, in means of the layer's, above which an expert stays.
        beta: LAEP: share of the layer's load that may go; None where a ratio decides.
        fraction: coverage: share of the layer's score that stays; None where a ratio decides.
        generations: evolve: how often counts are changed and scored.
    """

    name: str = "uniform"
    alpha: float = math.inf
    beta: float | None = None
    fraction: float | None = None
    generations: int = 20

    @classmethod
    def parse(cls, text: str) -> Allocation:
        """Read ``laep`` or ``laep:alpha=0.4,beta=0.1``.

        Raises:
            ConfigError: an unknown name or option, or a value that is no number in its range.

        Example:
            >>> Allocation.parse("coverage:fraction=0.9").fraction
            0.9
        """
        name, _, options = text.partition(":")
        if name not in BUDGETS:
            raise ConfigError(f"--budget knows no {name!r}", nearest(name, BUDGETS))
        known = BUDGETS[name][0]
        values: dict[str, Any] = {}
        for item in filter(None, options.split(",")):
            key, _, value = (part.strip() for part in item.partition("="))
            if key not in known:
                raise ConfigError(f"--budget {name} has no option {key!r}", f"it has {', '.join(known) or 'none'}")
            number = _number(value, f"--budget {name}: {key}", top=_LARGEST[key], whole=key in _WHOLE)
            values[key] = int(number) if key in _WHOLE else number
        return cls(name=name, **values)

    def __str__(self) -> str:
        options = ((field.name, getattr(self, field.name), field.default) for field in fields(self))
        given = [f"{key}={value:.12g}" for key, value, unset in options if key != "name" and value != unset]
        return self.name + (f":{','.join(given)}" if given else "")

    @property
    def by_load(self) -> bool:
        """Whether it goes by the tokens routed to each expert, which only calibration counts."""
        return self.name == "laep"

    @property
    def searched(self) -> bool:
        """Whether candidates are scored on the model, for which it must run."""
        return self.name == "evolve"

    @property
    def sized(self) -> bool:
        """Whether thresholds say how many experts stay, so that no ratio is wanted."""
        return self.beta is not None or self.fraction is not None


UNIFORM = Allocation()
_LARGEST = {"alpha": math.inf, "beta": 1.0, "fraction": 1.0, "generations": 10_000.0}
_WHOLE = {"generations"}


def _number(text: str, what: str, *, top: float, whole: bool) -> float:
    try:
        value = float(text)
    except ValueError:
        raise ConfigError(f"{what} must be a number, not {text!r}") from None
    if not 0 <= value <= top:
        raise ConfigError(f"{what} must be at least 0" + (f" and at most {top:g}" if top < math.inf else ""))
    if whole and value % 1:
        raise ConfigError(f"{what} must be a whole number, not {text}")
    return value


def least_steps(shape: RouterShape, protected: Set[int]) -> int:
    """Steps that a layer cannot do without: top-k within reach, what the groups need, and the protected experts."""
    return max(shape.smallest() // shape.n_group, _most_in_a_group(shape.num_experts, shape.n_group, protected))


def _most_in_a_group(num_experts: int, n_group: int, protected: Set[int]) -> int:
    return int(np.bincount([expert * n_group // num_experts for expert in sorted(protected)], minlength=1).max())


def step_mass(values: FloatArray, *, n_group: int = 1, protected: Set[int] = frozenset()) -> FloatArray:
    """What each step down a layer's order adds to the layer, [E / n_group], protected experts first.

    Of scores [E] it is the m-th best of every group, and negative ones count as 0. Of drop costs M [E, E], what the
    cost of the dropped set falls by when the m-th expert is taken back, from everything dropped: so the mass of all
    steps is the cost of dropping the whole layer, whatever the ratio will be.

    Example:
        >>> step_mass(np.array([1.0, 3.0, 2.0]))
        array([3., 2., 1.])
    """
    cost = np.diag(values) if values.ndim == 1 else (values + values.T) / 2
    groups = np.arange(len(cost)) // (len(cost) // n_group)
    locked = np.isin(np.arange(len(cost)), sorted(protected))
    dropped = np.ones(len(cost), dtype=bool)
    saved = 2 * cost.sum(axis=1) - np.diag(cost)  # what the cost falls by when an expert is taken back
    mass = np.zeros(len(cost) // n_group)
    for step in range(len(mass)):
        for group in range(n_group):
            price = np.where(dropped & (groups == group), np.where(locked, np.inf, saved), -np.inf)
            chosen = int(np.argmax(price))
            mass[step] += max(saved[chosen], 0.0)
            dropped[chosen] = False
            saved = saved - 2 * cost[:, chosen]
    free = _most_in_a_group(len(cost), n_group, protected)
    mass[free:] = np.sort(mass[free:])[::-1]  # experts that cancel can save less than the ones after them
    return mass


def allocate(
    allocation: Allocation, mass_LM: FloatArray, load_LM: FloatArray, *, least_L: IntArray, total: int | None = None
) -> IntArray:
    """Steps that each layer keeps, [L].

    Args:
        allocation: the budget.
        mass_LM: :func:`step_mass` of the strategy's scores, by layer.
        load_LM: the same of the tokens routed to each expert.
        least_L: :func:`least_steps` of each layer.
        total: steps that stay in all layers together; None where the allocation's thresholds decide.

    Raises:
        PlanError: the layers cannot do with so few steps.
        ConfigError: alpha does not let so many experts go.
    """
    if total is not None and total < least_L.sum():
        raise PlanError(
            f"{total} steps should stay and {least_L.sum()} must: routers need their top-k, and protected experts stay",
            "remove less, or protect fewer",
        )
    priority_LM = _priority(allocation, mass_LM, load_LM)
    if total is None:
        return np.maximum(_above(priority_LM, _threshold(allocation)), least_L)
    if allocation.by_load and np.isinf(priority_LM).sum() > total:
        most = priority_LM.size - int(np.isinf(priority_LM).sum())
        raise ConfigError(
            f"alpha={allocation.alpha:g} lets {most} steps go, and {priority_LM.size - total} should",
            "give a larger alpha, or leave it out",
        )
    return _fill(priority_LM, least_L, total)


def _priority(allocation: Allocation, mass_LM: FloatArray, load_LM: FloatArray) -> FloatArray:
    if allocation.name == "uniform":
        return np.broadcast_to(-np.arange(mass_LM.shape[1], dtype=np.float64), mass_LM.shape)
    if allocation.name == "global":
        return np.asarray(_share(mass_LM, mass_LM) * mass_LM.shape[1])
    if allocation.name == "coverage":
        return _share(_tail(mass_LM), mass_LM)
    busy_LM = _share(load_LM, load_LM) * load_LM.shape[1] > allocation.alpha
    return np.where(busy_LM, np.inf, _share(_tail(load_LM), load_LM))


def _tail(mass_LM: FloatArray) -> FloatArray:
    """Mass of each step and all that follow, added up from the smallest."""
    return np.asarray(np.cumsum(mass_LM[:, ::-1], axis=1)[:, ::-1])


def _share(part_LM: FloatArray, mass_LM: FloatArray) -> FloatArray:
    """Parts of the layer's mass; 0 where it has none."""
    total_L1 = mass_LM.sum(axis=1, keepdims=True)
    return np.asarray(np.divide(part_LM, total_L1, out=np.zeros_like(part_LM), where=total_L1 > 0))


def _threshold(allocation: Allocation) -> float:
    """Share of the tail that may go: coverage is LAEP's rule for the score, without alpha."""
    if allocation.name == "coverage" and allocation.fraction is not None:
        return 1 - allocation.fraction
    if allocation.by_load and allocation.beta is not None:
        return allocation.beta
    raise ConfigError(f"--budget {allocation.name} needs --ratio or --keep", "--ratio 0.5 removes half of the experts")


def _above(priority_LM: FloatArray, threshold: float) -> IntArray:
    # relative, so that 1 - 0.9 is a tenth and 0 stays 0
    return np.asarray((priority_LM > threshold * (1 + 10.0**-_DIGITS)).sum(axis=1))


def _fill(priority_LM: FloatArray, least_L: IntArray, total: int) -> IntArray:
    """The steps of highest priority, after those that no layer can do without."""
    layer_LM, step_LM = np.indices(priority_LM.shape)
    needed_LM = step_LM < least_L[:, None]
    order = np.lexsort([layer_LM.ravel(), step_LM.ravel(), -priority_LM.round(_DIGITS).ravel(), ~needed_LM.ravel()])
    return np.bincount(layer_LM.ravel()[order[:total]], minlength=len(priority_LM))


def kept_mass(mass_LM: FloatArray, kept_L: IntArray) -> float:
    """Share of its score mass that a layer keeps, mean over layers; nothing is lost where there is none."""
    within_LM = np.arange(mass_LM.shape[1]) < kept_L[:, None]
    total_L = mass_LM.sum(axis=1)
    kept = np.divide((mass_LM * within_LM).sum(axis=1), total_L, out=np.ones_like(total_L), where=total_L > 0)
    return float(kept.mean())
