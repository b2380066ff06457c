"""The commands that list what there is: strategies, statistics and architectures, ours and those of other packages.

What another package publishes and cannot be used is listed too, with the reason; it never hides the rest.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from moeprune import _cli_options as opt
from moeprune._cli_output import print_json, show
from moeprune._plugins import Kind, PlugIn, ambiguous, published
from moeprune.errors import MoePruneError

if TYPE_CHECKING:
    from moeprune.architectures import MoESpec
    from moeprune.catalogue import Statistic
    from moeprune.strategies import Strategy

Item = TypeVar("Item")
Row = dict[str, Any]  # what is said of one name
Rows = dict[str, Row]


def strategies(as_json: opt.AsJson = False) -> None:
    """List the strategies: what they compute, their papers, and what they need."""
    from moeprune.strategies import AUTO, BUILTIN, is_built_in, load_plug_in

    rows = {name: _strategy_row(item) for name, item in {**BUILTIN, AUTO.name: AUTO}.items()}
    rows |= _published_rows("strategy", load_plug_in, _strategy_row, is_built_in, rows)
    _print(rows, _strategy_lines, as_json=as_json)
    if not as_json:
        show("S(b,alpha,beta) is any member of the saliency family: S(1,1,1) is reap.")
        show("What a strategy needs beyond the core statistics `prune` collects, and `collect --statistics STRATEGY`.")


def statistics(as_json: opt.AsJson = False) -> None:
    """List the statistics: their axes per layer, their meaning, and which ones must be asked for."""
    from moeprune.catalogue import BUILTIN, load_plug_in

    rows = {name: _statistic_row(item) | {"always": _is_always_there(name)} for name, item in BUILTIN.items()}
    rows |= _published_rows("statistic", load_plug_in, _statistic_row, BUILTIN.__contains__, rows)
    _print(rows, _statistic_lines, as_json=as_json)


def architectures(as_json: opt.AsJson = False) -> None:
    """List the supported architectures and the engines that load them."""
    from moeprune.architectures import ARCHITECTURES, load_plug_in

    rows = {name: _architecture_row(spec) for name, spec in ARCHITECTURES.items()}
    rows |= _published_rows("architecture", load_plug_in, _architecture_row, ARCHITECTURES.__contains__, rows)
    _print(rows, lambda row: [", ".join(row["engines"])], as_json=as_json)


# --- what is said -----------------------------------------------------------------------------------------------------


def _strategy_row(item: Strategy) -> Row:
    from moeprune.strategies import DEFAULT

    return {
        "summary": item.summary,
        "paper": item.paper,
        "calibrated": item.calibrated,
        "needs": list(item.needs),
        "cost": item.cost,
        "default": item.name == DEFAULT,
        "package": item.package,
    }


def _strategy_lines(row: Row) -> list[str]:
    from moeprune.strategies import COLLECTING

    paper = f" (arXiv:{row['paper']})" if row["paper"] else ""
    marks = "  [default]" * row["default"] + "  [needs no calibration]" * (not row["calibrated"])
    more = [name for name in row["needs"] if not _is_always_there(name)]
    details = [f"needs {', '.join(more)}"] if more else []
    details += [f"takes {row['cost']}"] if row["cost"] not in {COLLECTING, "nothing"} else []
    return [f"{row['summary']}{paper}{marks}", "; ".join(details)]


def _statistic_row(item: Statistic) -> Row:
    return {
        "axes": item.axes,
        "meaning": item.meaning,
        "merge": item.merge,
        "integer": item.integer,
        "point": item.point,
        "always": False,
        "package": "",
    }


def _statistic_lines(row: Row) -> list[str]:
    axes = f"[{', '.join(row['axes'])}] " if row["axes"] else ""
    return [f"{axes}{row['meaning']}" + "  [on request]" * (not row["always"])]


def _is_always_there(statistic: str) -> bool:
    from moeprune.catalogue import FACTS, STATISTICS

    return statistic in STATISTICS or statistic in FACTS


def _architecture_row(spec: MoESpec) -> Row:
    return {"engines": list(spec.engines), "package": ""}


# --- what other packages publish --------------------------------------------------------------------------------------


def _published_rows(
    kind: Kind,
    load: Callable[[PlugIn], Item],
    describe: Callable[[Item], Row],
    is_built_in: Callable[[str], bool],
    ours: Mapping[str, Row],
) -> Rows:
    """A row for each name that other packages publish: what it is, why it cannot be used, or that it is ignored."""
    rows: Rows = {}
    for name, group in itertools.groupby(published(kind), key=lambda plug_in: plug_in.name):
        plug_ins = [*group]
        packages = [plug_in.package for plug_in in plug_ins]
        try:
            if name in ours:
                rows[name] = {**ours[name], "ignored": packages}
            elif is_built_in(name):
                raise plug_ins[0].problem("has the name of a built-in one")
            elif len(plug_ins) > 1:
                raise ambiguous(plug_ins)
            else:
                rows[name] = describe(load(plug_ins[0])) | {"package": packages[0]}
        except MoePruneError as error:
            rows[name] = {"package": ", ".join(packages), "error": error.message}
    return rows


# --- how it is shown --------------------------------------------------------------------------------------------------


def _print(rows: Rows, lines: Callable[[Row], list[str]], *, as_json: bool) -> None:
    if as_json:
        print_json(rows)
        return
    width = max(map(len, rows)) + 2
    for name, row in rows.items():
        first, *rest = filter(None, [*(lines(row) if "error" not in row else []), *_origin_lines(row)])
        show(f"{name:<{width}}{first}")
        for line in rest:
            show(f"{'':<{width}}{line}")


def _origin_lines(row: Row) -> list[str]:
    """Where it comes from, or why it cannot be used."""
    if "error" in row:
        return [f"cannot be used: {' '.join(row['error'].split())}"]
    ignored = [f"ignored: {package} publishes the same name" for package in row.get("ignored", ())]
    return [f"from {row['package']}"] * bool(row.get("package")) + ignored
