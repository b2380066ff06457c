"""What can be measured: one entry per statistic, with its axes, its merge rule and the point where it is observed.

``STATISTICS`` is what every collection adds up, ``FACTS`` what the weights alone say; both are always there. ``MORE``
and ``ROWS`` are collected when asked for, and so is what is published under the entry-point group
``moeprune.statistics``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal, get_args

from moeprune._plugins import PlugIn, find_plug_in, published, published_names
from moeprune.errors import ConfigError, nearest
from moeprune.sketches import BINS

Point = Literal["experts", "residual", "router", "choices", "routes", "weights", "sequences"]
PATHS = 8  # sequences of each domain that are described on their own, unless another number is asked for
FIXED: Mapping[str, int] = MappingProxyType({"B": BINS})  # sizes of axes that no model decides
_OURS_ALONE = {"choices", "routes", "sequences"}  # points that other packages cannot name
_NO_NAMES = {"core", "all", "layer", "num_experts", "seed", "rng", "path_weight"}  # they mean something else
_NO_SIZES: Mapping[str, int] = MappingProxyType({})


@dataclass(frozen=True, slots=True, kw_only=True)
class Statistic:
    """How one statistic is measured, stored and merged.

    One of your own names its point, and has a function that is called with what is seen there and returns a tensor of
    the shape of ``axes``, of the current tokens alone; padding is left out already. It is added up in float64 by domain
    and half of the data, and is found by its name when it is published under ``moeprune.statistics``.

    Attributes:
        axes: shape per layer and domain, in letters: E experts, H hidden size, I inner size of an expert, S sequences,
            B bins of a sketch (:mod:`moeprune.sketches`).
        meaning: the definition; sums run over the tokens routed to the expert unless it says otherwise. g is the weight
            the model really multiplied the expert's output f(x) by.
        merge: how two batches, and two files, combine.
        integer: whether it counts.
        point: where it is observed, and what ``measure`` is given. ``experts``:
            :class:`moeprune.collectors.measures.Slots`. ``residual``: the same with the residual stream. ``router``:
            logits [T, E]. ``weights``: :class:`moeprune.collectors.weights.ExpertWeights` of one expert at a time, to
            be described without its first axis E; it has no axis of domains. ``choices`` (logits of the chosen
            experts), ``routes`` (from layer to layer) and ``sequences`` (one row each, which are joined) are of this
            package only.
        measure: the function; what this package defines needs none here.

    Example:
        >>> def gate_cubed(slots):
        ...     return slots.by_expert(slots.gates_TK**3)
        >>> STATISTIC = Statistic(axes="E", meaning="sum of g³", measure=gate_cubed)
    """

    axes: str
    meaning: str
    merge: Literal["sum", "max"] = "sum"
    integer: bool = False
    point: Point = "experts"
    measure: Callable[[Any], Any] | None = None

    def shape(self, num_experts: int, sizes: Mapping[str, int] = _NO_SIZES) -> tuple[int, ...]:
        """Shape per layer and domain, with the sizes of axes other than E."""
        known_sizes = {**sizes, **FIXED, "E": num_experts}
        return tuple(known_sizes[axis] for axis in self.axes)

    @property
    def by_domain(self) -> bool:
        """Whether its first axis is the domains of the calibration data."""
        return self.point not in {"weights", "sequences"}


STATISTICS: Mapping[str, Statistic] = {
    "tokens": Statistic(axes="", meaning="tokens seen, padding left out", integer=True),
    "count": Statistic(axes="E", meaning="tokens routed to the expert", integer=True),
    "gate_sum": Statistic(axes="E", meaning="sum of g"),
    "gate_sq_sum": Statistic(axes="E", meaning="sum of g²"),
    "soft_prob_sum": Statistic(axes="E", meaning="sum over all tokens of softmax(router logits)", point="router"),
    "norm_sum": Statistic(axes="E", meaning="sum of ‖f(x)‖"),
    "norm_sq_sum": Statistic(axes="E", meaning="sum of ‖f(x)‖²"),
    "gated_norm_sum": Statistic(axes="E", meaning="sum of g‖f(x)‖"),
    "gated_norm_sq_sum": Statistic(axes="E", meaning="sum of (g‖f(x)‖)²"),
    "max_abs_down": Statistic(axes="E", meaning="largest |element of f(x)|", merge="max"),
    "pair_count": Statistic(axes="EE", meaning="tokens routed to both experts", integer=True),
    "pair_gated_norm": Statistic(axes="EE", meaning="sum over those of g_i‖f_i(x)‖ g_j‖f_j(x)‖"),
    "gram": Statistic(axes="EE", meaning="sum over those of ⟨g_i f_i(x), g_j f_j(x)⟩"),
}

MORE: Mapping[str, Statistic] = {
    "easy_ep_sum": Statistic(
        axes="E",
        meaning="sum of max(1 - cos(h, h + routed), 0) g‖f(x)‖, h the residual stream, routed what the experts add",
        point="residual",
    ),
    "gated_in_sq_sum": Statistic(axes="EH", meaning="sum of (g x)² by element of the experts' input"),
    "gated_mid_sq_sum": Statistic(axes="EI", meaning="sum of (g u)² by element of the down projection's input"),
    "gated_output_sum": Statistic(axes="EH", meaning="sum of g f(x)"),
    "output_sum_all": Statistic(axes="EH", meaning="sum over all tokens of f(x), routed to the expert or not"),
    "logit_gram": Statistic(axes="EE", meaning="sum over all tokens of z_i z_j, z the router's logits", point="router"),
    "transition_count": Statistic(
        axes="EE",
        meaning="tokens that the MoE layer before routed to i and this one to j",
        integer=True,
        point="routes",
    ),
    "transition_gate": Statistic(axes="EE", meaning="sum over those of g_i g_j", point="routes"),
    "wrap_count": Statistic(
        axes="EE",
        meaning="at the first MoE layer: tokens that the last one routed to i and, the next token, the first one to j",
        integer=True,
        point="routes",
    ),
    "share_hist": Statistic(
        axes="B", meaning="sketch of g over the sum of the token's gates, its top slot left out", integer=True
    ),
    "ratio_hist": Statistic(
        axes="B", meaning="sketch of g over the token's largest gate, its top slot left out", integer=True
    ),
    "mass_hist": Statistic(
        axes="B",
        meaning="sketch of 1 - the share of the token's larger gates, its top slot left out",
        integer=True,
    ),
    "score_hist": Statistic(
        axes="B",
        meaning="sketch of (1 + z / (1 + |z|)) / 2, z the router's logit of a chosen expert",
        integer=True,
        point="choices",
    ),
}

ROWS: Mapping[str, Statistic] = {
    "path_prob": Statistic(axes="SE", meaning="mean over its tokens of softmax(router logits)", point="sequences"),
    "path_norm": Statistic(axes="SE", meaning="mean over all its tokens of ‖f(x)‖, routed or not", point="sequences"),
    "path_loss": Statistic(
        axes="SE", meaning="‖Y - Y_e‖_F, Y the routed output, Y_e when e has all of the gates", point="sequences"
    ),
    "path_scale": Statistic(axes="S", meaning="‖Y‖_F", point="sequences"),
    "path_domain": Statistic(axes="S", meaning="position of its domain in the header", integer=True, point="sequences"),
    "path_row": Statistic(axes="S", meaning="its number in its domain", integer=True, point="sequences"),
}

FACTS: Mapping[str, Statistic] = {
    "weight_abs_sum": Statistic(axes="E", meaning="sum of |w| over gate, up and down", point="weights"),
    "weight_sq_sum": Statistic(axes="E", meaning="sum of w² over gate, up and down", point="weights"),
    "weight_numel": Statistic(
        axes="", meaning="elements of one expert's three matrices", integer=True, point="weights"
    ),
    "gate_col_l1": Statistic(axes="EH", meaning="sum of |w| over each input's column of gate", point="weights"),
    "up_col_l1": Statistic(axes="EH", meaning="sum of |w| over each input's column of up", point="weights"),
    "down_col_l1": Statistic(axes="EI", meaning="sum of |w| over each input's column of down", point="weights"),
}

BUILTIN: Mapping[str, Statistic] = {**STATISTICS, **MORE, **ROWS, **FACTS}


def find(name: str) -> Statistic | None:
    """The statistic of that name, built in or published by another package; None where there is none.

    Raises:
        ConfigError: another package publishes it, and it cannot be used.
    """
    return BUILTIN.get(name) or _published(name)


def known(name: str) -> Statistic:
    """The statistic of a name that was read or measured before."""
    statistic = find(name)
    assert statistic is not None, name  # noqa: S101 - names are checked where they come in
    return statistic


@functools.cache
def _published(name: str) -> Statistic | None:
    plug_in = find_plug_in("statistic", name)
    return load_plug_in(plug_in) if plug_in else None


def load_plug_in(plug_in: PlugIn) -> Statistic:
    """A statistic that another package publishes.

    Raises:
        ConfigError: it cannot be imported, or cannot be measured and stored.
    """
    found = plug_in.load()
    if not isinstance(found, Statistic):
        raise plug_in.problem("is no moeprune.Statistic")
    name, points = plug_in.name, {*get_args(Point)} - _OURS_ALONE
    problems = {
        "has no name that strategies and files can use": not name.isidentifier()
        or name.startswith("_")
        or name in _NO_NAMES,
        "has no function `measure`": found.measure is None,
        f"has the point {found.point!r}, where {', '.join(sorted(points))} are offered": found.point not in points,
        f"has the axes {found.axes!r}, where E, H and I are offered": not {*found.axes} <= {*"EHI"},
        "is of weights and its first axis is not E": found.point == "weights" and not found.axes.startswith("E"),
        f"merges by {found.merge!r}, where sum and max are offered": found.merge not in {"sum", "max"},
    }
    for what, wrong in problems.items():
        if wrong:
            raise plug_in.problem(what)
    return found


def origin(names: Iterable[str]) -> dict[str, dict[str, str]]:
    """What a file says of those of its statistics that are not built in: ``plug_ins``, their packages by name."""
    foreign = set(names) - BUILTIN.keys()
    found = {one.name: one.package for one in published("statistic") if one.name in foreign} if foreign else {}
    return {"plug_ins": found} if found else {}


def known_names() -> list[str]:
    """Names of all statistics, built in or published by another package."""
    return [*BUILTIN, *(name for name in published_names("statistic") if name not in BUILTIN)]


def requested(names: Iterable[str]) -> tuple[str, ...]:
    """What has to be collected beyond what always is.

    Args:
        names: of statistics; ``core`` is what always is, ``all`` is everything. Of rows, one stands for all.

    Returns:
        Names in the order that files have.

    Raises:
        ConfigError: there is no such statistic, or another package publishes it and it cannot be used.
    """
    wanted: set[str] = set()
    for name in names:
        if name == "all":
            wanted.update(known_names())
        elif name != "core":
            wanted |= ROWS.keys() if name in ROWS else {name}
    for name in sorted(wanted):
        if find(name) is None:
            raise ConfigError(f"there is no statistic {name!r}", nearest(name, known_names()))
    return in_order(wanted - STATISTICS.keys() - FACTS.keys())


def in_order(names: Iterable[str]) -> tuple[str, ...]:
    """Names in the order that files have: built-in ones in that of their tables, then the others."""
    given = set(names)
    return (*(name for name in BUILTIN if name in given), *sorted(given - BUILTIN.keys()))
