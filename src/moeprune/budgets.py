"""How many experts each layer of a checkpoint keeps: what a budget wishes for, and what engines let come true."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

import numpy as np

from moeprune._files import note, progress
from moeprune.errors import ConfigError
from moeprune.plans import Budget, RouterShape
from moeprune.statistics import FloatArray
from moeprune.strategies.allocate import Allocation, IntArray, allocate, kept_mass, least_steps, step_mass
from moeprune.strategies.evolve import evolve


@dataclass(frozen=True, slots=True, kw_only=True)
class Shares:
    """How many experts stay.

    Attributes:
        kept: experts by decoder layer.
        budget: what the plan says of it.
        notes: what people should know.
    """

    kept: Mapping[int, int]
    budget: Mapping[str, Any]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class LayerMasses:
    """What a budget sees: the layers of a model, in steps of one expert of every group.

    Attributes:
        shape: the routers' numbers.
        layers: decoder layers with routed experts, ascending.
        mass: mass, [L, M], of the strategy's scores by layer and step.
        load: the same of the tokens routed to each expert, for budgets that go by it.
        least: steps, [L], that each layer cannot do without.
    """

    shape: RouterShape
    layers: tuple[int, ...]
    mass: FloatArray
    load: FloatArray
    least: IntArray

    @classmethod
    def of(
        cls,
        shape: RouterShape,
        scores: Mapping[int, FloatArray],
        loads: Mapping[int, FloatArray],
        protected: Mapping[int, Set[int]],
    ) -> LayerMasses:
        """From scores [E] or drop costs [E, E], and tokens [E], by layer."""
        layers = tuple(sorted(scores))
        nobody: Set[int] = frozenset()

        def stacked(values: Mapping[int, FloatArray]) -> FloatArray:
            rows = [
                step_mass(values[layer], n_group=shape.n_group, protected=protected.get(layer, nobody))
                for layer in layers
            ]
            return np.stack(rows)

        return cls(
            shape=shape,
            layers=layers,
            mass=stacked(scores),
            load=stacked(loads),
            least=np.array([least_steps(shape, protected.get(layer, nobody)) for layer in layers]),
        )

    def wish(self, allocation: Allocation, kept: int | None) -> dict[int, int]:
        """Experts that each layer would keep under a budget.

        Args:
            allocation: the budget.
            kept: experts that stay per layer on average; None where the allocation's thresholds decide.

        Raises:
            PlanError: top-k and the protected experts need more.
            ConfigError: the thresholds let no expert go, or alpha too few.
        """
        total = None if kept is None else kept // self.shape.n_group * len(self.layers)
        steps_L = allocate(allocation, self.mass, self.load, least_L=self.least, total=total)
        if steps_L.sum() == self.mass.size:
            raise ConfigError(f"--budget {allocation.name} lets no expert go", "choose other thresholds, or a --ratio")
        return self._by_layer(steps_L.tolist())

    def search(
        self,
        allocation: Allocation,
        kept: int,
        cost: Callable[[Sequence[Mapping[int, int]]], Sequence[float]],
        seed: int,
    ) -> tuple[dict[int, int], dict[str, Any]]:
        """Experts that each layer would keep by what that does to the predictions, and what the search found.

        It starts from equal counts and from what the other budgets wish for. Interrupted, it gives the best so far.

        Args:
            allocation: the budget, which says how long to search.
            kept: experts that stay per layer on average.
            cost: costs of candidates, each given by the experts that every layer keeps.
            seed: of the search.
        """
        step, size = self.shape.n_group, self.mass.shape[1]
        starts = [self.wish(Allocation(name=name), kept) for name in ("uniform", "global", "coverage")]
        states = evolve(
            [tuple(start[layer] // step for layer in self.layers) for start in starts],
            lambda found: cost([self._by_layer(counts) for counts in found]),
            least=tuple(map(int, self.least)),
            most=size,
            generations=allocation.generations,
            seed=seed,
        )
        found = next(states)
        try:
            for state in progress(states, "searching counts", total=allocation.generations, unit="generation"):
                found = state
        except KeyboardInterrupt:
            note("interrupted: the best counts so far are taken")
        told = {"kl": {"uniform": found.first, "best": found.cost}, "scored": found.scored}
        told |= {"generations": found.generation, "finished": found.finished}
        return self._by_layer(found.best), told

    def _by_layer(self, steps: Sequence[int]) -> dict[int, int]:
        return {layer: int(count) * self.shape.n_group for layer, count in zip(self.layers, steps, strict=True)}

    def share(self, kept: Mapping[int, int]) -> float:
        """Share of its score mass that a layer keeps, mean over layers."""
        return kept_mass(self.mass, np.array([kept[layer] for layer in self.layers]) // self.shape.n_group)


def even_shares(shape: RouterShape, layers: tuple[int, ...], kept: int) -> Shares:
    """The same count in every layer."""
    budget = {"allocation": "uniform", "kept": kept, "of": shape.num_experts, "n_group": shape.n_group}
    return Shares(kept=dict.fromkeys(layers, kept), budget=budget)


def realise(
    masses: LayerMasses, wish: Mapping[int, int], name: str, budget: Budget, *, allow_non_uniform: bool
) -> Shares:
    """Keep what a budget wishes for, or the same number in every layer where engines are to load it.

    Args:
        masses: the layers.
        wish: experts by layer.
        name: of the budget.
        budget: the count of a uniform plan; where it has none, the wish's mean, rounded up.
        allow_non_uniform: let layers differ.

    Raises:
        ConfigError: rounded up, every expert would stay.
    """
    shape = masses.shape
    told: dict[str, Any] = {"allocation": name, "of": shape.num_experts, "n_group": shape.n_group}
    told["wish"] = {str(layer): kept for layer, kept in wish.items()}
    counts = set(wish.values())
    if allow_non_uniform and len(counts) > 1:
        return Shares(kept=wish, budget=told | {"realised": "per layer"})
    if not budget.given:
        steps = -(-sum(wish.values()) // (len(wish) * shape.n_group))
        budget = dataclasses.replace(budget, keep=steps * shape.n_group)
    kept = budget.kept(shape)
    uniform = dict.fromkeys(masses.layers, kept)
    lost = masses.share(wish) - masses.share(uniform)
    told |= {"realised": "uniform", "lost": round(lost, 6)}
    notes = (_lost_note(name, wish, kept, lost),) if counts != {kept} else ()
    return Shares(kept=uniform, budget=told, notes=notes)


def _lost_note(name: str, wish: Mapping[int, int], kept: int, lost: float) -> str:
    few, many = (pick(wish, key=lambda layer: wish[layer]) for pick in (min, max))
    span = f"{wish[few]} experts (layer {few}) to {wish[many]} (layer {many})"
    cost = f"{100 * abs(lost):.1f} % of the layers' score mass {'less' if lost >= 0 else 'more'}"
    return (
        f"budget {name} would keep {span}; every layer keeps {kept}, since engines load one count, which keeps {cost}: "
        "--allow-non-uniform keeps the wish, for transformers only"
    )
