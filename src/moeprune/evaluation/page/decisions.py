"""Which experts stay and by what scores: the numbers of a page, ready to be set."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from moeprune._files import human_bytes
from moeprune.errors import ranges
from moeprune.evaluation.page import formats
from moeprune.evaluation.page.charts import SHADES, HeatRow, bar, columns, heatmap, score_curve
from moeprune.evaluation.page.parts import Share, Table
from moeprune.evaluation.page.seen import IntArray, counts_of
from moeprune.evaluation.page.sources import ReportSources
from moeprune.evaluation.page.svg import render
from moeprune.plans import LayerPlan, PruningPlan

FloatArray = npt.NDArray[np.float64]

_SHARES = (1 / 8, 1 / 4, 1 / 2, 1, 2, 4, 8)  # of the layer's mean: where shades begin
_BY_MEAN = ("0", "1/8", "1/4", "1/2", "1", "2", "4", "8")
_BY_RANK = ("lowest", "", "", "", "", "", "", "highest")


# --- what was won -----------------------------------------------------------------------------------------------------


def experts_of(sources: ReportSources) -> int:
    """Experts of each layer before pruning."""
    plan = sources.plan
    if sources.statistics is not None:
        return sources.statistics.num_experts
    assert plan is not None  # noqa: S101 - asked only where there is a plan
    scored = [len(layer.scores) for layer in plan.layers.values() if layer.scores is not None]
    of = plan.budget.get("of")
    return max([*scored, of if isinstance(of, int) else 0, *(layer.keep[-1] + 1 for layer in plan.layers.values())])


def won_of(sources: ReportSources) -> tuple[str, ...]:
    """What pruning won, in short lines."""
    if sources.plan is None:
        return ()
    plan, experts = sources.plan, experts_of(sources)
    removed = sum(experts - count for count in plan.counts.values())
    share = removed / (experts * len(plan.layers))
    layers = formats.counted(len(plan.layers), "layer")
    fewer = f"{formats.counted(removed, 'expert')} fewer ({100 * share:.0f} %)"
    lines = [f"{plan.span} of {experts} experts kept in each of {layers}: {fewer}"]
    recorded = {} if sources.healing else (sources.provenance or {})  # healing starts from the pruned one
    stored = recorded.get("bytes") or plan.size.get("bytes")
    if stored:
        lines.append(_shrunk("checkpoint", stored, human_bytes))
    if plan.size.get("parameters"):
        lines.append(_shrunk("parameters", plan.size["parameters"], "{:,}".format))
    return tuple(lines)


def _shrunk(what: str, size: Mapping[str, Any], form: Any) -> str:
    before, after = size["before"], size["after"]
    return f"{what}: {form(before)} → {form(after)} ({formats.MINUS}{100 * (1 - after / before):.0f} %)"


# --- the plan ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerCurve:
    """A layer's scores in their order."""

    title: str
    caption: str
    drawing: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """The section on the plan."""

    strategy: str
    summary: str
    heatmap: str
    shades: tuple[str, ...]
    shading: str
    curves: tuple[LayerCurve, ...]
    columns: str
    coverage: tuple[Share, ...]
    even: str
    layers: Table
    engines: tuple[tuple[str, str], ...]
    notes: tuple[str, ...]


def decision_of(sources: ReportSources) -> Decision | None:
    """The plan in pictures and tables; None without one."""
    plan = sources.plan
    if plan is None:
        return None
    experts = experts_of(sources)
    scored = {index: layer for index, layer in sorted(plan.layers.items()) if layer.scores is not None}
    relative = _relative([layer.scores for layer in scored.values() if layer.scores])
    counts = counts_of(sources.statistics) if sources.statistics else {}
    rows = [_heat_row(index, layer, counts.get(index), relative=relative) for index, layer in scored.items()]
    label = f"scores of {experts} experts in {formats.counted(len(rows), 'layer')}; a stroke marks each dropped one"
    kept = [len(layer.keep) for _, layer in sorted(plan.layers.items())]
    titles = [f"layer {index}: {len(layer.keep)} of {experts}" for index, layer in sorted(plan.layers.items())]
    return Decision(
        strategy=str(plan.strategy.get("name") or "by hand"),
        summary=_summary(plan),
        heatmap=render(heatmap(rows, label)) if rows else "",
        shades=_BY_MEAN if relative else _BY_RANK,
        shading="score over its layer's mean, from" if relative else "rank of the score in its layer, in eighths",
        curves=tuple(_curve(index, layer) for index, layer in scored.items()),
        columns="" if plan.uniform else render(columns(kept, experts, titles, "experts kept by layer")),
        coverage=_coverage(sources, experts),
        even=f"{100 * sum(kept) / (experts * len(kept)):.0f}",
        layers=_layer_table(sources, experts, counts),
        engines=tuple((engine, "; ".join(map(str, why))) for engine, why in plan.engines.items()),
        notes=tuple(map(str, plan.notes)),
    )


def _summary(plan: PruningPlan) -> str:
    what, paper = plan.strategy.get("what"), plan.strategy.get("paper")
    return "".join([f": {what}" if what else "", f" ({paper})" if paper else ""])


def _relative(scores: Sequence[Sequence[float]]) -> bool:
    """Whether scores can be compared with their layer's mean: none is negative, and no layer is all zeros."""
    return all(min(layer) >= 0 and sum(layer) > 0 for layer in scores)


def _heat_row(index: int, layer: LayerPlan, count_E: IntArray | None, *, relative: bool) -> HeatRow:
    scores, keep = layer.scores or (), {*layer.keep}
    tokens = [""] * len(scores) if count_E is None else [f", {count:,} tokens" for count in count_E]
    titles = [
        f"layer {index}, expert {expert}: {formats.plain(score)}{seen}{'' if expert in keep else ', dropped'}"
        for expert, (score, seen) in enumerate(zip(scores, tokens, strict=True))
    ]
    dropped = [expert not in keep for expert in range(len(scores))]
    return HeatRow(layer=index, shades=shades(scores, relative=relative), dropped=dropped, titles=titles)


def shades(scores: Sequence[float], *, relative: bool) -> list[int]:
    """Shades 0 to ``SHADES`` - 1 of one layer's scores: by their share of the mean, or by rank."""
    values = np.asarray(scores, dtype=np.float64)
    if relative:
        return [int(shade) for shade in np.searchsorted(_SHARES, values / values.mean(), side="right")]
    rank = np.empty(len(values), dtype=np.int64)
    rank[np.argsort(values, kind="stable")] = np.arange(len(values))
    return [int(shade) for shade in rank * SHADES // len(values)]


def _curve(index: int, layer: LayerPlan) -> LayerCurve:
    scores, keep = layer.scores or (), {*layer.keep}
    kept = [expert in keep for expert in range(len(scores))]
    ordered, top = sorted(scores, reverse=True), max(scores)
    at_cut = ordered[len(keep) - 1 : len(keep) + 1]
    known = len(at_cut) == 2 and at_cut[1] >= 0 < top
    caption = " → ".join(f"{100 * score / top:.2g}" for score in at_cut) + " %" if known else ""
    return LayerCurve(title=f"layer {index}", caption=caption, drawing=render(score_curve(scores, kept)))


def _coverage(sources: ReportSources, experts: int) -> tuple[Share, ...]:
    """What the kept experts carried of each domain's output, beside what an even spread would give."""
    plan = sources.plan
    assert plan is not None  # noqa: S101
    even = sum(plan.counts.values()) / (experts * len(plan.layers))
    lowest = _lowest_layers(sources)
    return tuple(
        Share(
            name=domain,
            value=f"{100 * share:.1f} %",
            remark=lowest.get(domain, ""),
            drawing=render(bar([("bar", min(max(float(share), 0.0), 1.0))], at=even)),
        )
        for domain, share in plan.coverage.items()
    )


def _lowest_layers(sources: ReportSources) -> dict[str, str]:
    """By domain, the layer whose kept experts carried the least of its output."""
    statistics = sources.statistics
    if statistics is None:
        return {}
    shares_LD = {layer: share_D for layer in statistics.layers if (share_D := _kept_share(sources, layer)) is not None}
    if not shares_LD:
        return {}
    found = {}
    for position, domain in enumerate(statistics.domains):
        layer = min(shares_LD, key=lambda index: float(shares_LD[index][position]))
        found[domain] = f"lowest in layer {layer}: {100 * shares_LD[layer][position]:.1f} %"
    return found


def _kept_share(sources: ReportSources, layer: int) -> FloatArray | None:
    """Share of the gated output norm that one layer's kept experts carried, by domain."""
    statistics, plan = sources.statistics, sources.plan
    if statistics is None or plan is None or layer not in plan.layers:
        return None
    mass_DE = statistics.layers.get(layer, {}).get("gated_norm_sum")
    if mass_DE is None or not len(mass_DE):
        return None
    share_D: FloatArray = mass_DE[:, list(plan.layers[layer].keep)].sum(axis=1) / np.maximum(mass_DE.sum(axis=1), 1e-30)
    return share_D


def _layer_table(sources: ReportSources, experts: int, counts: Mapping[int, IntArray]) -> Table:
    """Kept experts by layer, with the tokens of the rarest of them."""
    plan = sources.plan
    assert plan is not None  # noqa: S101
    rows = []
    for index, layer in sorted(plan.layers.items()):
        count_E = counts.get(index)
        rarest = f"{int(count_E[list(layer.keep)].min()):,}" if count_E is not None else ""
        share_D = _kept_share(sources, index)
        source = f" (as layer {layer.copied_from})" if layer.copied_from is not None else ""
        rows.append(
            (
                f"{index}{source}",
                f"{len(layer.keep)} of {experts}",
                "" if share_D is None else f"{100 * float(share_D.min()):.1f}",
                rarest,
                ranges(layer.keep),
            )
        )
    head = (
        "layer",
        "kept",
        "output kept, %, worst domain",
        "tokens of the rarest kept expert",
        "kept experts, by their number in the base",
    )
    return Table(head=head, rows=tuple(rows))
