"""What skipping costs on text: the report for programs, as a page, and as a table for the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moeprune._files import envelope, to_json, write_atomic
from moeprune.evaluation.agreement import Estimate, TokenLosses, perplexity, perplexity_ratio
from moeprune.evaluation.evaluator import PlanScore, difference
from moeprune.evaluation.report import Filters, aligned, render_template
from moeprune.evaluation.skipped import IntArray, Tally, rate_of
from moeprune.evaluation.token_classes import CLASSES
from moeprune.plans_skip import SkipPlan

SCHEMA = "moeprune.skip/1"
LEGEND = "skipped: measured here, padding left out; ratio: perplexity over the base's; random and oracle skip as much"

_HEAD = ("asked", "skipped", "ratio", "95 % interval", "top-1", "KL nats", "random", "oracle")


@dataclass(frozen=True, slots=True, kw_only=True)
class SkipScore:
    """One way to skip, on the whole text; intervals are 95 % ones over documents.

    Attributes:
        rate: share of the slots that were skipped on this text.
        perplexity: of the model that skips.
        ratio: that over the base model's, paired by document.
        top1: share of tokens on which both put the same token first.
        kl: KL(base || skipping) per token, in nats.
    """

    rate: float
    perplexity: Estimate
    ratio: Estimate
    top1: Estimate
    kl: Estimate

    @classmethod
    def of(cls, score: PlanScore, tally: Tally) -> SkipScore:
        """From what an evaluator found and what was counted meanwhile."""
        return cls(
            rate=measured_rate(tally),
            perplexity=_plain(score.perplexity),
            ratio=_plain(score.perplexity_ratio),
            top1=score.agreement.top1,
            kl=score.agreement.kl,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class SkipPoint:
    """A plan beside its controls, which skip as many slots in every layer and batch.

    Attributes:
        target: rate that was asked for.
        calibrated: rate that the plan has on the text on which it was solved.
        policy: what the plan does.
        random: what slots drawn at random do; oracle: those with the smallest norm of what they would have added.
        over_random: perplexity under the plan over that under the control, paired by document; over_oracle likewise.
    """

    target: float
    calibrated: float
    policy: SkipScore
    random: SkipScore
    oracle: SkipScore
    over_random: Estimate
    over_oracle: Estimate


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerRate:
    """Share of a layer's slots that were skipped: on the text of the plan, and on this one."""

    calibrated: float
    measured: float


@dataclass(frozen=True, slots=True, kw_only=True)
class DomainRate:
    """Documents of a domain, the tokens that they have, the share of slots skipped, and the perplexity ratio if any."""

    documents: int
    tokens: int
    rate: float
    ratio: Estimate | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassRate:
    """Tokens of a class, and the share of their slots that were skipped."""

    tokens: int
    rate: float


@dataclass(frozen=True, slots=True, kw_only=True)
class SkipReport:
    """What a skip plan, and others like it at other rates, cost on a text.

    Attributes:
        base_model: name of the model's folder.
        policy, renorm, top_k: of the plan.
        perplexity: of the base model, which skips nothing.
        documents, tokens: how much text there is: documents and tokens that are predicted in them.
        point: the plan.
        curve: plans at other rates, in ascending order of the rate.
        layers, domains, classes: where the plan skips.
        text: where the text comes from, one entry per source.
        warnings: what a reader must know.
        command, inputs: canonical options and fingerprints.
    """

    base_model: str
    policy: str
    renorm: str
    top_k: int
    perplexity: Estimate
    documents: int
    tokens: int
    point: SkipPoint
    curve: tuple[SkipPoint, ...]
    layers: Mapping[str, LayerRate]
    domains: Mapping[str, DomainRate]
    classes: Mapping[str, ClassRate]
    text: Sequence[Mapping[str, Any]] = ()
    warnings: Sequence[str] = ()
    command: Mapping[str, Any]
    inputs: Mapping[str, str]

    def payload(self) -> dict[str, Any]:
        """The report as plain JSON values, envelope first."""
        content = asdict(self)
        return envelope(SCHEMA, content.pop("command"), content.pop("inputs")) | content

    def to_json(self) -> str:
        """The report as readable JSON; equal reports give equal bytes."""
        return to_json(self.payload())


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Measured:
    """A plan, what an evaluator found for it and for its controls, and what was counted meanwhile."""

    plan: SkipPlan
    scores: Mapping[str, PlanScore]
    tallies: Mapping[str, Tally]

    def point(self) -> SkipPoint:
        """The plan beside its controls."""
        found = {name: SkipScore.of(score, self.tallies[name]) for name, score in self.scores.items()}
        mine = self.scores["policy"]
        return SkipPoint(
            target=self.plan.target,
            calibrated=self.plan.rate,
            **found,
            over_random=_plain(difference(self.scores["random"], mine)),
            over_oracle=_plain(difference(self.scores["oracle"], mine)),
        )


def report_of(chosen: Measured, others: Sequence[Measured], labels: Sequence[str], **about: Any) -> SkipReport:
    """Make the report.

    Args:
        chosen: the plan whose rates are broken down.
        others: plans at other rates.
        labels: domain of every document.
        about: the remaining fields.
    """
    base, plan, tally = chosen.scores["policy"].base_losses, chosen.plan, chosen.tallies["policy"]
    curve = sorted((one.point() for one in others), key=lambda point: point.target)
    return SkipReport(
        policy=plan.policy,
        renorm=str(plan.renorm),
        top_k=plan.top_k,
        perplexity=_plain(perplexity(base)),
        documents=int((base.tokens > 0).sum()),
        tokens=int(base.tokens.sum()),
        point=chosen.point(),
        curve=tuple(curve),
        layers={
            str(index): LayerRate(
                calibrated=plan.layers[index].rate if index in plan.layers else 0.0, measured=rate_of(cells)
            )
            for index, cells in sorted(tally.cells.items())
        },
        domains=_domains(chosen.scores["policy"], tally, labels, plan.top_k),
        classes=_classes(tally, plan.top_k),
        **about,
    )


def measured_rate(tally: Tally) -> float:
    """Share of the slots of all layers that were skipped."""
    return rate_of(_all_layers(tally))


def _all_layers(tally: Tally) -> IntArray:
    cells: IntArray = np.sum(list(tally.cells.values()), axis=0)
    return cells


def _domains(score: PlanScore, tally: Tally, labels: Sequence[str], top_k: int) -> dict[str, DomainRate]:
    """By domain, in the order of their names."""
    cells, layers, found = _all_layers(tally), len(tally.cells), {}
    for number, name in enumerate(sorted(set(labels))):
        own_N = np.array([label == name for label in labels]) & (score.losses.tokens > 0)
        base, gated = (TokenLosses(one.nll[own_N], one.tokens[own_N]) for one in (score.base_losses, score.losses))
        found[name] = DomainRate(
            documents=int(own_N.sum()),
            tokens=int(cells[0, number].sum()) // (layers * top_k),
            rate=rate_of(cells[:, number]),
            ratio=_plain(perplexity_ratio(base, gated)) if own_N.sum() > 1 else None,
        )
    return found


def _classes(tally: Tally, top_k: int) -> dict[str, ClassRate]:
    """By class of the tokens, for those that occur; none where the tokens have no names."""
    cells, layers = _all_layers(tally).sum(axis=1), len(tally.cells)
    if not tally.has_classes:
        return {}
    return {
        name: ClassRate(tokens=int(slots) // (layers * top_k), rate=float(1 - kept / slots))
        for name, slots, kept in zip(CLASSES, *cells, strict=True)
        if slots
    }


def _plain(estimate: Estimate) -> Estimate:
    """Without the number of tokens, which a report says once."""
    return Estimate(value=estimate.value, interval=estimate.interval)


# --- faces ------------------------------------------------------------------------------------------------------------


def write_skip_report(report: SkipReport, folder: Path) -> None:
    """Write ``skip.json`` and ``skip.md`` into the folder."""
    write_atomic(folder / "skip.json", report.to_json())
    write_atomic(folder / "skip.md", render_skip_markdown(report))


def render_skip_markdown(report: SkipReport) -> str:
    """The report as a Markdown page."""
    filters: Filters = {
        "estimate": lambda estimate: f"{estimate.value:.3f} ({_interval(estimate)})",
        "percents": lambda estimate: f"{_percent(estimate.value)} ({_interval(estimate, 100, 1)})",
        "percent": _percent,
    }
    return render_template("skip.md.j2", filters, report=report, points=_points(report))


def render_skip_table(report: SkipReport) -> str:
    """The report as plain aligned text, the smallest rate first."""
    rows = [_HEAD, *(_cells(point) for point in _points(report))]
    extent = f"{report.documents:,} documents, {report.tokens:,} predicted tokens"
    base = f"base perplexity {report.perplexity.value:.3f} ({_interval(report.perplexity)}): {extent}"
    lines = [*(f"note: {warning}" for warning in report.warnings), base, *aligned(rows), LEGEND]
    if len(report.domains) > 1:
        domains = (f"{name} {_percent(one.rate)} %" for name, one in report.domains.items())
        lines.append(f"skipped by domain: {', '.join(domains)}")
    if report.classes:
        classes = (f"{name} {_percent(one.rate)} %" for name, one in report.classes.items())
        lines.append(f"skipped by class of token: {', '.join(classes)}")
    return "\n".join(lines) + "\n"


def _points(report: SkipReport) -> list[SkipPoint]:
    return sorted([report.point, *report.curve], key=lambda point: point.target)


def _cells(point: SkipPoint) -> tuple[str, ...]:
    own = point.policy
    return (
        f"{_percent(point.target)} %",
        f"{_percent(own.rate)} %",
        f"{own.ratio.value:.3f}",
        _interval(own.ratio),
        f"{_percent(own.top1.value)} %",
        f"{own.kl.value:.4f}",
        f"{point.random.ratio.value:.3f}",
        f"{point.oracle.ratio.value:.3f}",
    )


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"


def _interval(estimate: Estimate, factor: float = 1, digits: int = 3) -> str:
    return "..".join(f"{factor * end:.{digits}f}" for end in estimate.interval)
