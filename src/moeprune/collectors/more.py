"""The statistics that are collected when asked for, beside the core sums that every observation adds up."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from moeprune.catalogue import FIXED, PATHS, ROWS, in_order, known
from moeprune.collectors.measures import Slots, measure_of, score_hist, slots_of
from moeprune.collectors.residual import ResidualStream
from moeprune.collectors.routes import Routes, transitions, wraps
from moeprune.collectors.sequences import describe
from moeprune.collectors.weights import problem_of, sizes_of
from moeprune.errors import UnsupportedModelError
from moeprune.experts import ExpertLayer, slot_rows
from moeprune.statistics import AnyArray, Statistic

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch
    from torch import nn

    from moeprune.collectors.sequences import Run
    from moeprune.collectors.sums import LayerSums
    from moeprune.collectors.weights import Loader

    SumsOf = Callable[[ExpertLayer], LayerSums]


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What is measured beyond the core sums.

    Attributes:
        statistics: names that :func:`moeprune.catalogue.requested` gave.
        paths: sequences of each domain that are described on their own: the first ones.
        sequences: how many each domain has, in all processes; None where that is not known before.
    """

    statistics: tuple[str, ...] = ()
    paths: int = PATHS
    sequences: Mapping[str, int] | None = None

    def last_layer(self, observed: Collection[int], layers: Sequence[int]) -> int:
        """The last decoder layer that must run.

        Args:
            observed: those that are observed.
            layers: all MoE layers; the first one needs the last one for the tokens that come from there.
        """
        return layers[-1] if "wrap_count" in self.statistics and layers[0] in observed else max(observed)


CORE = Request()


class More:
    """What was asked for, by where it is observed, and what it has to know of the running batch.

    Args:
        request: what was asked for.
        layers: all MoE layers of the model, in their order.
        observed: those that are observed.
    """

    def __init__(self, request: Request, layers: Sequence[ExpertLayer], observed: Sequence[ExpertLayer]) -> None:
        wanted: dict[str, Statistic] = {name: known(name) for name in in_order(request.statistics)}

        def at(*points: str) -> list[str]:
            return [name for name, statistic in wanted.items() if statistic.point in points]

        self.summed = at("experts", "residual", "router", "choices", "routes")
        self.facts = at("weights")
        self.on_residual, self._on_routes, self._on_sequences = at("residual"), at("routes"), at("sequences")
        self._on_slots = {name: measure_of(name) for name in at("experts", "residual")}
        self._on_router = {name: measure_of(name) for name in at("router")}
        self._on_choices = at("choices")
        self._first, self._last = layers[0], layers[-1]
        self._observed = {layer.index for layer in observed}
        self._paths, self._sequences = request.paths, request.sequences
        self._residual: dict[int, ResidualStream] = {}
        self._described: dict[int, dict[tuple[str, int], dict[str, torch.Tensor]]] = {}  # by layer, domain and number
        self._logits: dict[int, torch.Tensor] = {}
        self.routes = Routes()
        self.rows: tuple[int, ...] = ()  # of the running batch: the number of each sequence in its domain
        self.shape = (0, 0)  # of the running batch: rows, tokens
        for layer in observed:
            _check(layer, wanted)

    @property
    def follows(self) -> bool:
        """Whether it must see every MoE layer, also those that are not observed."""
        return bool(self._on_routes)

    def shapes(self, layer: ExpertLayer) -> dict[str, tuple[int, ...]]:
        """Shape of every sum."""
        sizes = sizes_of(layer.experts)
        return {name: known(name).shape(layer.num_experts, sizes) for name in self.summed}

    @contextlib.contextmanager
    def hooks(self, model: nn.Module, layers: Sequence[ExpertLayer]) -> Iterator[None]:
        """What must hang in the model beside the three points."""
        with contextlib.ExitStack() as undo:
            for layer in layers if self.on_residual else ():
                self._residual[layer.index] = ResidualStream()
                undo.enter_context(self._residual[layer.index].followed(model, layer, self.on_residual[0]))
            yield

    # --- what is seen -------------------------------------------------------------------------------------------------

    def residual(self, layer: ExpertLayer) -> torch.Tensor | None:
        """The residual stream [T, H] around the layer that runs, where a statistic needs it."""
        return self._residual[layer.index].rows() if self.on_residual else None

    def see_logits(
        self, layer: ExpertLayer, sums: LayerSums, logits_TE: torch.Tensor, valid_T: torch.Tensor | None
    ) -> None:
        """A router ran."""
        if self._on_sequences or self._on_choices:
            self._logits[layer.index] = logits_TE
        for name, measure in self._on_router.items():
            assert measure is not None  # noqa: S101 - only statistics of this package may lack one
            sums.add(name, measure(logits_TE if valid_T is None else logits_TE[valid_T]))

    def see_slots(
        self,
        layer: ExpertLayer,
        sums: LayerSums,
        valid_T: torch.Tensor | None,
        loader: Loader | None,
        **rows: torch.Tensor | None,
    ) -> None:
        """Experts ran on a slice of the tokens, whose rows are given by the names that :class:`Slots` has."""
        if not self._on_slots:
            return
        given = {name: value.detach() for name, value in rows.items() if value is not None}
        slots: Slots = slots_of(layer.experts, valid_T, loader=loader, **given)
        for name, measure in self._on_slots.items():
            assert measure is not None  # noqa: S101 - only statistics of this package may lack one
            sums.add(name, measure(slots))

    def see_layer(
        self,
        layer: ExpertLayer,
        sums_of: SumsOf,
        run: Run,
        domain: str,
        valid_T: torch.Tensor | None,
        hidden_TH: torch.Tensor,
        experts_TK: torch.Tensor,
        gates_TK: torch.Tensor,
    ) -> None:
        """A layer ran: the input of its experts, the experts and the gates of all tokens."""
        if self._on_routes:
            self._follow(layer, sums_of, valid_T, experts_TK, gates_TK)
        logits_TE = self._logits.pop(layer.index, None)
        if logits_TE is not None and self._on_choices:
            kept = slice(None) if valid_T is None else valid_T
            sums_of(layer).add("score_hist", score_hist(logits_TE[kept], experts_TK[kept]))
        if logits_TE is not None and self._on_sequences:
            self._describe(layer, run, domain, valid_T, hidden_TH, experts_TK, gates_TK, logits_TE)

    def _follow(
        self,
        layer: ExpertLayer,
        sums_of: SumsOf,
        valid_T: torch.Tensor | None,
        experts_TK: torch.Tensor,
        gates_TK: torch.Tensor,
    ) -> None:
        before, gates_before = self.routes.before, self.routes.gates
        if before is not None and gates_before is not None and layer.index in self._observed:
            kept = slice(None) if valid_T is None else valid_T
            found = transitions(
                before.to(experts_TK.device)[kept],
                gates_before.to(experts_TK.device)[kept],
                experts_TK[kept],
                gates_TK[kept],
                layer.num_experts,
            )
            self._add(sums_of(layer), found)
        self.routes.follow(experts_TK, gates_TK)
        if layer.index == self._last.index and self._first.index in self._observed:
            self._wrap(sums_of(self._first), valid_T, experts_TK)

    def _wrap(self, sums: LayerSums, valid_T: torch.Tensor | None, last_TK: torch.Tensor) -> None:
        import torch

        assert self.routes.first is not None  # noqa: S101 - this layer was followed
        valid_T = torch.ones(len(last_TK), dtype=torch.bool, device=last_TK.device) if valid_T is None else valid_T
        last_BSK = last_TK.view(*self.shape, -1)
        first_BSK = self.routes.first.to(last_TK.device).view(*self.shape, -1)
        found = wraps(last_BSK, first_BSK, valid_T.view(self.shape), self._first.num_experts)
        self._add(sums, {"wrap_count": found})

    def _add(self, sums: LayerSums, found: Mapping[str, torch.Tensor]) -> None:
        for name in found.keys() & set(self._on_routes):
            sums.add(name, found[name])

    # --- single sequences ---------------------------------------------------------------------------------------------

    def _describe(
        self, layer: ExpertLayer, run: Run, domain: str, valid_T: torch.Tensor | None, *rows: torch.Tensor
    ) -> None:
        hidden_TH = rows[0]
        step = slot_rows(hidden_TH.shape[-1], layer.num_experts, hidden_TH.device.type)
        length = self.shape[1]
        for row, number in enumerate(self.rows):
            own = slice(row * length, (row + 1) * length)
            kept = slice(None) if valid_T is None else valid_T[own]
            tokens = [values[own][kept] for values in rows]
            if number < self._paths and len(tokens[0]):
                seen = self._described.setdefault(layer.index, {})
                found = describe(run, tokens[0], tokens[1], tokens[2], tokens[3], step)
                seen[domain, number] = {name: value.cpu() for name, value in found.items()}

    def row_arrays(self, layer: ExpertLayer, domains: Sequence[str]) -> dict[str, AnyArray]:
        """Arrays [S, ...] of the sequences that were described, by domain and number.

        Where it was said how many sequences there are, each has its place, and is 0 until it is seen.
        """
        if not self._on_sequences:
            return {}
        seen = self._described.get(layer.index, {})
        if self._sequences is None:
            places = sorted(seen, key=lambda place: (domains.index(place[0]), place[1]))
        else:
            places = [(name, row) for name in domains for row in range(min(self._paths, self._sequences[name]))]
        arrays: dict[str, AnyArray] = {
            name: np.zeros(
                statistic.shape(layer.num_experts, {"S": len(places)}), np.int64 if statistic.integer else np.float64
            )
            for name, statistic in ROWS.items()
        }
        for row, (domain, number) in enumerate(places):
            for name, value in seen.get((domain, number), {}).items():
                arrays[name][row] = value.numpy()
            if (domain, number) in seen:
                arrays["path_domain"][row], arrays["path_row"][row] = domains.index(domain), number
        return arrays

    def forget(self, index: int) -> None:
        """The sequences of a layer were taken."""
        self._described.pop(index, None)


def _check(layer: ExpertLayer, wanted: Mapping[str, Statistic]) -> None:
    """Refuse what cannot be measured on the layer."""
    sizes = sizes_of(layer.experts)
    for name, statistic in wanted.items():
        missing = set(statistic.axes) - sizes.keys() - FIXED.keys() - {"S"}
        problem = "its experts do not say how large they are" if missing else ""
        if name in {"gated_mid_sq_sum", "output_sum_all"} or statistic.point == "weights":
            problem = problem or problem_of(layer.experts, elsewhere=True)
        if problem:
            raise UnsupportedModelError(
                f"{name} cannot be measured in layer {layer.index}: {problem}", "leave it out of the statistics"
            )
