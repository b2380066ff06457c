"""What calibration saw of each expert: the numbers of a page, ready to be set."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from moeprune.evaluation.page import formats
from moeprune.evaluation.page.charts import bar
from moeprune.evaluation.page.parts import Share, Table
from moeprune.evaluation.page.sources import Json, ReportSources
from moeprune.evaluation.page.svg import render
from moeprune.plans import PruningPlan
from moeprune.statistics import RARE, RouterStatistics

IntArray = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]

_LEVELS = (0, 1, RARE, 100, 1000, 10_000)  # where the bins of tokens per expert begin


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """The section on calibration."""

    summary: tuple[str, ...]
    warning: str
    levels: tuple[Share, ...]
    split: bool
    domains: Table
    layers: Table
    data: Table


def calibration_of(sources: ReportSources) -> Calibration | None:
    """What calibration saw of each expert; None where it saw nothing."""
    statistics, plan = sources.statistics, sources.plan
    counts = counts_of(statistics) if statistics else {}
    if statistics is None or not counts or not statistics.tokens:
        return None
    kept = {index: _mask(plan, index, statistics.num_experts) for index in counts}
    count_N = np.concatenate(list(counts.values()))
    kept_N = np.concatenate(list(kept.values()))
    return Calibration(
        summary=_calibration_summary(statistics, plan),
        warning=_warning(count_N, kept_N, split=plan is not None),
        levels=tuple(_levels(count_N, kept_N, split=plan is not None)),
        split=plan is not None,
        domains=_domain_table(statistics),
        layers=_count_table(counts, kept if plan else {}),
        data=_data_table(statistics.provenance),
    )


def counts_of(statistics: RouterStatistics) -> dict[int, IntArray]:
    """Tokens routed to each expert, by layer."""
    return {
        index: np.asarray(arrays["count"]).sum(axis=0)
        for index, arrays in sorted(statistics.layers.items())
        if "count" in arrays and len(arrays["count"])
    }


def _mask(plan: PruningPlan | None, layer: int, experts: int) -> BoolArray:
    kept_E = np.zeros(experts, dtype=np.bool_)
    if plan is not None and layer in plan.layers:
        kept_E[list(plan.layers[layer].keep)] = True
    return kept_E


def _calibration_summary(statistics: RouterStatistics, plan: PruningPlan | None) -> tuple[str, ...]:
    average = statistics.tokens * statistics.top_k / statistics.num_experts
    layers = formats.counted(len(statistics.layers), "layer")
    routed = f"{statistics.top_k} of {statistics.num_experts} experts each: {average:,.0f} per expert on average"
    lines = [f"{statistics.tokens:,} tokens through {layers}, {routed}."]
    stability = plan.stability if plan else {}
    if "median" in stability and "lowest" in stability:
        lines.append(
            f"Two halves of the data rank the experts with a correlation of {stability['median']:.3f} "
            f"(median of the layers; the lowest {stability['lowest']:.3f})."
        )
    return tuple(lines)


def _warning(count_N: IntArray, kept_N: BoolArray, *, split: bool) -> str:
    """How many experts have scores made of noise; empty where none has."""
    rare_N = count_N < RARE
    if not rare_N.any():
        return ""
    kept = f", {int((rare_N & kept_N).sum()):,} of them kept" if split else ""
    return f"{formats.counted(int(rare_N.sum()), 'expert')} of {len(count_N):,} below {RARE} tokens{kept}"


def _levels(count_N: IntArray, kept_N: BoolArray, *, split: bool) -> list[Share]:
    """How many experts saw how many tokens, kept and dropped apart."""
    level_N = np.digitize(count_N, _LEVELS) - 1
    shares = []
    for level in range(len(_LEVELS)):
        inside = level_N == level
        stay, total = int((inside & kept_N).sum()), int(inside.sum())
        counted = {"bar": stay, "bar cutbar": total - stay} if split else {"bar": total}
        parts = [(name, count / len(count_N)) for name, count in counted.items()]
        value = f"{stay:,} kept, {total - stay:,} dropped" if split else f"{total:,}"
        shares.append(Share(name=_level_name(level), value=value, remark="", drawing=render(bar(parts))))
    return shares


def _level_name(level: int) -> str:
    if level == 0:
        return "never"
    low, after = _LEVELS[level], _LEVELS[level + 1 : level + 2]
    return f"{low:,} to {after[0] - 1:,}" if after else f"{low:,} or more"


def _domain_table(statistics: RouterStatistics) -> Table:
    tokens_D = np.asarray(next(iter(statistics.layers.values()))["tokens"]).reshape(-1)
    counts = [np.asarray(arrays["count"]) for arrays in statistics.layers.values() if "count" in arrays]
    rows = []
    for position, domain in enumerate(statistics.domains):
        seen_N = np.concatenate([count_DE[position] for count_DE in counts])
        rows.append(
            (domain, f"{int(tokens_D[position]):,}", f"{int(np.median(seen_N)):,}", f"{int((seen_N < RARE).sum()):,}")
        )
    return Table(head=("domain", "tokens", "tokens of the median expert", f"experts below {RARE}"), rows=tuple(rows))


def _count_table(counts: Mapping[int, IntArray], kept: Mapping[int, BoolArray]) -> Table:
    rows = []
    for index, count_E in counts.items():
        rare_E = count_E < RARE
        stay = f"{int((rare_E & kept[index]).sum()):,}" if kept else ""
        never = int((count_E == 0).sum())
        rows.append(
            (
                str(index),
                f"{int(count_E.min()):,}",
                f"{int(np.median(count_E)):,}",
                f"{int(count_E.max()):,}",
                str(never),
                str(int(rare_E.sum())),
                stay,
            )
        )
    head = ("layer", "fewest tokens", "median", "most", "never", f"below {RARE}", "of those kept")
    return Table(head=head, rows=tuple(rows))


def _data_table(provenance: Sequence[Json]) -> Table:
    rows = tuple(
        (
            "/".join(str(entry[key]) for key in ("source", "config", "split") if entry.get(key)),
            ", ".join(map(str, entry.get("domains", ()))),
            f"{int(entry.get('sequences', 0)):,}",
            f"{int(entry.get('tokens', 0)):,}",
            str(entry.get("sha256", ""))[:16],
        )
        for entry in provenance
    )
    return Table(head=("source", "domains", "sequences", "tokens", "sha256 of the tokens"), rows=rows)
