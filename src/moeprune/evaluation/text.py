"""What plans cost on a text: the report for programs, as a page, and as a table for the terminal."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from moeprune._files import envelope, to_json, write_atomic
from moeprune.evaluation.agreement import Estimate, TokenLosses, perplexity, perplexity_ratio
from moeprune.evaluation.evaluator import PlanScore, difference
from moeprune.evaluation.report import Filters, aligned, render_template

BoolArray = npt.NDArray[np.bool_]

SCHEMA = "moeprune.text/1"
LEGEND = "ratio: perplexity over the base's; over the best: over the best plan's, 1 inside shows no difference"

_HEAD = ("plan", "kept", "perplexity", "ratio", "95 % interval", "top-1", "KL nats", "over the best")


@dataclass(frozen=True, slots=True, kw_only=True)
class TextScore:
    """What one plan does to the model's predictions; all intervals are 95 % ones over documents.

    Attributes:
        name: tells the plans of a report apart.
        kept: experts that stay in a MoE layer, the mean over the layers.
        perplexity: of the model with the plan's experts.
        ratio: that over the base model's, paired by document.
        top1: share of tokens on which the plan's and the base model put the same token first.
        kl: KL(base || plan) per token, in nats.
        over: the plan's perplexity over that of each plan with a lower one, the best first, paired by document.
        domains: ``ratio`` in each domain that has two documents or more.
    """

    name: str
    kept: float
    perplexity: Estimate
    ratio: Estimate
    top1: Estimate
    kl: Estimate
    over: Mapping[str, Estimate]
    domains: Mapping[str, Estimate]

    @property
    def worst_domain(self) -> str:
        """The domain where perplexity rises most; empty where fewer than two can be compared."""
        return max(self.domains, key=lambda name: self.domains[name].value) if len(self.domains) > 1 else ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Extent:
    """How much text there is: documents in which a token can be predicted, and the tokens that are predicted."""

    documents: int
    tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TextReport:
    """Every plan on the same text, in the order in which they were given.

    Attributes:
        base_model: name of the model's folder; num_experts: what each of its MoE layers has.
        perplexity: of the base model.
        extent: how much text there is; domains: by domain.
        plans: what each plan does; best: name of the one with the lowest perplexity.
        text: where the text comes from, one entry per source.
        warnings: what a reader must know.
        command, inputs: canonical options and fingerprints.
    """

    base_model: str
    num_experts: int
    perplexity: Estimate
    extent: Extent
    domains: Mapping[str, Extent]
    plans: tuple[TextScore, ...]
    best: str
    text: Sequence[Mapping[str, Any]] = ()
    warnings: Sequence[str] = ()
    command: Mapping[str, Any]
    inputs: Mapping[str, str]

    @classmethod
    def of(
        cls, scores: Mapping[str, PlanScore], kept: Mapping[str, float], labels: Sequence[str], **about: Any
    ) -> TextReport:
        """Make a report of what an evaluator found.

        Args:
            scores: by name of the plan.
            kept: experts that stay in a MoE layer, the mean over the layers, by name of the plan.
            labels: domain of every document.
            about: the remaining fields.
        """
        ranked = sorted(scores, key=lambda name: scores[name].perplexity.value)
        base = scores[ranked[0]].base_losses
        groups = {label: np.array([other == label for other in labels]) for label in sorted(set(labels))}
        return cls(
            perplexity=_plain(perplexity(base)),
            extent=_extent(base),
            domains={label: _extent(_part(base, chosen_N)) for label, chosen_N in groups.items()},
            plans=tuple(
                TextScore(
                    name=name,
                    kept=kept[name],
                    perplexity=_plain(score.perplexity),
                    ratio=_plain(score.perplexity_ratio),
                    top1=score.agreement.top1,
                    kl=score.agreement.kl,
                    over={better: _plain(difference(scores[better], score)) for better in ranked[: ranked.index(name)]},
                    domains=_by_domain(score, groups),
                )
                for name, score in scores.items()
            ),
            best=ranked[0],
            **about,
        )

    def payload(self) -> dict[str, Any]:
        """The report as plain JSON values, envelope first."""
        content = asdict(self)
        return envelope(SCHEMA, content.pop("command"), content.pop("inputs")) | content

    def to_json(self) -> str:
        """The report as readable JSON; equal reports give equal bytes."""
        return to_json(self.payload())


def _plain(estimate: Estimate) -> Estimate:
    """Without the number of tokens, which a report says once."""
    return Estimate(value=estimate.value, interval=estimate.interval)


def _extent(losses: TokenLosses) -> Extent:
    return Extent(documents=int((losses.tokens > 0).sum()), tokens=int(losses.tokens.sum()))


def _part(losses: TokenLosses, chosen_N: BoolArray) -> TokenLosses:
    return TokenLosses(losses.nll[chosen_N], losses.tokens[chosen_N])


def _by_domain(score: PlanScore, groups: Mapping[str, BoolArray]) -> dict[str, Estimate]:
    """The perplexity ratio in each domain that has documents enough for an interval."""
    found = {}
    for label, chosen_N in groups.items():
        base, plan = _part(score.base_losses, chosen_N), _part(score.losses, chosen_N)
        if _extent(base).documents > 1:
            found[label] = _plain(perplexity_ratio(base, plan))
    return found


# --- faces ------------------------------------------------------------------------------------------------------------


def write_text_report(report: TextReport, folder: Path) -> None:
    """Write ``text.json`` and ``text.md`` into the folder."""
    write_atomic(folder / "text.json", report.to_json())
    write_atomic(folder / "text.md", render_text_markdown(report))


def render_text_markdown(report: TextReport) -> str:
    """The report as a Markdown page."""
    filters: Filters = {"estimate": _estimate, "percent": lambda estimate: _estimate(estimate, _percent)}
    return render_template("text.md.j2", filters, report=report, ranked=_ranked(report))


def render_text_table(report: TextReport) -> str:
    """The report as plain aligned text, the best plan first."""
    domains = any(plan.worst_domain for plan in report.plans)
    rows = [_HEAD, *(_cells(plan, report.num_experts) for plan in _ranked(report))]
    if domains:
        worst = ("worst domain", *(_worst(plan) for plan in _ranked(report)))
        rows = [(*row, last) for row, last in zip(rows, worst, strict=True)]
    extent = f"{report.extent.documents:,} documents, {report.extent.tokens:,} predicted tokens"
    base = f"base perplexity {_estimate(report.perplexity)}: {extent}"
    return "\n".join([*(f"note: {warning}" for warning in report.warnings), base, *aligned(rows), LEGEND]) + "\n"


def _ranked(report: TextReport) -> list[TextScore]:
    return sorted(report.plans, key=lambda plan: plan.perplexity.value)


def _cells(plan: TextScore, num_experts: int) -> tuple[str, ...]:
    return (
        plan.name,
        f"{plan.kept:.4g}/{num_experts}",
        _number(plan.perplexity.value),
        _number(plan.ratio.value),
        _interval(plan.ratio),
        f"{_percent(plan.top1.value)} %",
        _number(plan.kl.value),
        _over_best(plan),
    )


def _over_best(plan: TextScore) -> str:
    return _estimate(next(iter(plan.over.values()))) if plan.over else "best"


def _worst(plan: TextScore) -> str:
    return f"{plan.worst_domain} {_number(plan.domains[plan.worst_domain].value)}" if plan.worst_domain else ""


def _number(value: float) -> str:
    """Three decimals, or three digits where that would say less or far more."""
    return f"{value:.3f}" if 0.1 <= value < 1000 or value == 0 else f"{value:.3g}"


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"


def _estimate(estimate: Estimate, form: Callable[[float], str] = _number) -> str:
    return f"{form(estimate.value)} ({_interval(estimate, form)})"


def _interval(estimate: Estimate, form: Callable[[float], str] = _number) -> str:
    return "..".join(map(form, estimate.interval))
