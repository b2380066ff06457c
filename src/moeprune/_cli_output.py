"""What the command line prints: results on stdout, everything else on stderr."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moeprune import _files

if TYPE_CHECKING:
    from moeprune.evaluation.compare import EvalReport
    from moeprune.evaluation.text import TextReport
    from moeprune.healing.forecast import TrainingForecast
    from moeprune.oneshot import PruneResult
    from moeprune.plans import PruningPlan
    from moeprune.repairing import HealResult
    from moeprune.rewrite.verify import Verification
    from moeprune.statistics import RouterStatistics
    from moeprune.streaming.forecast import Forecast


def print_json(value: Mapping[str, Any]) -> None:
    """One JSON object on stdout."""
    sys.stdout.write(_files.to_json(value))


def show(text: str) -> None:
    """A result on stdout."""
    sys.stdout.write(f"{text}\n")


def say(text: str) -> None:
    """A line on stderr."""
    sys.stderr.write(f"{text}\n")


def say_notes(notes: Iterable[str]) -> None:
    """Warnings and remarks on stderr, unless the user asked for quiet."""
    if not _files.quiet.get():
        for note in notes:
            say(f"note: {note}")


# --- plans ----------------------------------------------------------------------------------------------------------


def render_plan(plan: PruningPlan, *, measured: bool = True) -> str:
    """What a plan decides and means, for people; ``measured`` adds what only the statistics could tell."""
    layers = f"{len(plan.layers)} layer{'s' * (len(plan.layers) != 1)}"
    lines = [f"{plan.strategy.get('name', 'by hand')}: keep {plan.span} of {plan.budget.get('of')} experts in {layers}"]
    lines += render_size(plan.size)
    protected = sum(map(len, plan.strategy.get("protected", {}).values())) if measured else 0
    if protected:
        lines.append(f"protected: {protected} expert{'s' * (protected != 1)}")
    if plan.coverage and measured:
        shares = ", ".join(f"{domain} {100 * share:.0f} %" for domain, share in plan.coverage.items())
        lines.append(f"expert output kept, by norm: {shares}")
    if plan.balance and measured:
        lines.append(_render_balance(plan.balance))
    return "\n".join(lines + render_engines(plan.engines))


def render_size(size: Mapping[str, Any]) -> list[str]:
    """Bytes and parameters before and after, as far as they are known."""
    lines = []
    if nbytes := size.get("bytes"):
        before, after = (_files.human_bytes(nbytes[when]) for when in ("before", "after"))
        lines.append(f"size: {before} -> {after} (-{100 * (1 - nbytes['after'] / nbytes['before']):.0f} %)")
    if parameters := size.get("parameters"):
        lines.append(f"parameters: {parameters['before']:,} -> {parameters['after']:,}")
    return lines


def _render_balance(balance: Mapping[str, Any]) -> str:
    """The layer that was worst, and the one that is."""
    layers = balance["layers"].values()
    before, after = (max(layer[when] for layer in layers) for when in ("before", "after"))
    return f"load of the busiest of {balance['groups']} expert-parallel groups over the mean: {before} -> {after}"


def render_engines(engines: Mapping[str, Sequence[str]]) -> list[str]:
    """Which engines take the result, and why others do not."""
    takers = [engine for engine, reasons in engines.items() if not reasons]
    return [f"loads in: {', '.join(takers) or 'no known engine'}"] + [
        f"not in {engine}: {'; '.join(reasons)}" for engine, reasons in engines.items() if reasons
    ]


def print_plan(plan: PruningPlan, output: Path | None, *, as_json: bool) -> None:
    """A plan, and where it was written."""
    if as_json:
        print_json(plan.to_dict())
    else:
        show(f"{render_plan(plan)}\n{f'plan: {output}' if output else 'dry run: nothing was written'}")


def print_applied(plan: PruningPlan, output: Path, *, dry_run: bool, as_json: bool) -> None:
    """What was made of a plan."""
    if as_json:
        print_json({"output": str(output), "written": not dry_run} | _outlook(plan))
    else:
        # a person may have edited the keep-lists since they were measured
        show(f"{render_plan(plan, measured=False)}\n{_written(output, dry_run=dry_run)}")


def _written(output: Path, *, dry_run: bool) -> str:
    return f"dry run: nothing was written to {output}" if dry_run else f"checkpoint: {output}"


def _outlook(plan: PruningPlan) -> dict[str, Any]:
    """The part of a plan that is already true before its experts are chosen."""
    return {key: plan.to_dict()[key] for key in ("budget", "strategy", "size", "engines", "notes", "config_edits")}


# --- checkpoints and statistics -------------------------------------------------------------------------------------


def print_proof(proof: Verification, *, as_json: bool) -> None:
    """What was proved."""
    if as_json:
        print_json(proof_object(proof))
        return
    size, copied = _files.human_bytes(proof.nbytes), proof.tensors - proof.computed
    if proof.computed:
        computed = f"{proof.computed} computed ones are as they were written ({size} in all)"
        show(f"verified: {copied} tensors and {proof.files} other files equal the source, {computed}")
    else:
        show(f"verified: {copied} tensors ({size}) and {proof.files} other files equal the source")


def proof_object(proof: Verification) -> dict[str, Any]:
    """What was proved, for programs."""
    found = {"tensors": proof.tensors, "bytes": proof.nbytes, "files": proof.files}
    return found | ({"computed": proof.computed} if proof.computed else {})


def print_forecast(expected: Forecast | None, output: Path | None, *, as_json: bool, doing: str = "collecting") -> None:
    """What a collection, or what else is named, would take."""
    if as_json:
        print_json({"output": str(output), "written": False, "forecast": expected.to_dict() if expected else None})
    else:
        show(f"{render_forecast(expected, doing)}\ndry run: nothing was written to {output}")


def render_forecast(expected: Forecast | None, doing: str = "collecting") -> str:
    """What a pass would take, for people."""
    if expected is None:
        return f"{doing}: the whole model is loaded"
    states = "hidden states in files" if expected.spill else "hidden states in memory"
    size = _files.human_bytes
    how = f"{expected.chunk} experts of a layer at a time" if expected.chunked else "one layer at a time"
    return (
        f"{doing}: {how}, {states}; at most {expected}\n"
        f"  of memory: {size(expected.layer)} of weights, {size(expected.work)} for a batch, "
        f"{size(expected.states)} of hidden states"
    )


def print_statistics(output: Path, statistics: RouterStatistics, *, as_json: bool) -> None:
    """What a statistics file holds."""
    from moeprune.stability import gated_norm_stability

    stability = gated_norm_stability(statistics)
    facts = {
        "output": str(output),
        "tokens": statistics.tokens,
        "domains": list(statistics.domains),
        "layers": list(statistics.layers),
        "experts": statistics.num_experts,
        "stability": {"strategy": "gated-norm"} | stability.to_dict() if stability else None,
    }
    if as_json:
        print_json(facts)
        return
    domains = f" ({', '.join(statistics.domains)})" if statistics.domains else ""
    layers = f"{len(statistics.layers)} layers of {statistics.num_experts} experts"
    halves = f"gated-norm: {stability}\n" if stability else ""
    show(f"{statistics.tokens:,} tokens{domains} through {layers}\n{halves}statistics: {output}")


# --- reports --------------------------------------------------------------------------------------------------------


def print_report(report: EvalReport, output: Path | None, *, as_json: bool) -> None:
    """The comparison, one row per task."""
    from moeprune.evaluation.report import render_table

    if as_json:
        print_json(report.payload())
    else:
        show(render_table(report) + (_report_files(output) if output else ""))


def _report_files(folder: Path) -> str:
    return f"report: {folder / 'report.md'}\npage: {folder / 'report.html'}"


def print_text_report(report: TextReport, output: Path, *, as_json: bool) -> None:
    """What plans cost on text, one row per plan."""
    from moeprune.evaluation.text import render_text_table

    if as_json:
        print_json(report.payload())
    else:
        show(f"{render_text_table(report)}report: {output / 'text.md'}")


def print_pruned(result: PruneResult, *, as_json: bool) -> None:
    """All that a one-shot run made."""
    if as_json:
        print_json(_pruned_object(result))
        return
    dry_run = result.verification is None
    show(render_plan(result.plan))
    if result.verification is not None:
        print_proof(result.verification, as_json=False)
    if result.healing is not None:
        show(render_healing(result.healing))
    if result.report is not None:
        show("")
        print_report(result.report, None, as_json=False)
    if result.forecast is not None:
        show(render_forecast(result.forecast))
    show(_written(result.output, dry_run=dry_run))
    if result.report is not None:
        show(_report_files(result.output / "moeprune" / "report"))


def render_healing(result: HealResult) -> str:
    """The divergence from the original before and after."""
    if not result.healed or not result.before or result.after is None:
        return "nothing was closer to the original on held-out text: the weights are those that were given"
    less = 100 * (1 - result.after / result.before)
    return f"{result.method}: KL from the original {result.before:.4f} -> {result.after:.4f} nats (-{less:.0f} %)"


def render_heal_forecast(expected: Forecast | TrainingForecast | None) -> str:
    """What healing would take: one layer at a time, or both models as a whole."""
    from moeprune.streaming.forecast import Forecast

    if expected is None or isinstance(expected, Forecast):
        return render_forecast(expected, "healing")
    return f"healing: {expected}"


def healed_object(result: HealResult) -> dict[str, Any]:
    """For scripts."""
    return {
        "output": str(result.output),
        "written": result.before is not None,
        "method": result.method,
        "healed": result.healed,
        "held_out_kl": {"before": result.before, "after": result.after},
        "record": dict(result.record),
        "forecast": result.forecast.to_dict() if result.forecast else None,
    }


def _pruned_object(result: PruneResult) -> dict[str, Any]:
    dry_run = result.verification is None
    return {
        "output": str(result.output),
        "written": not dry_run,
        # which experts stay is not known yet in a dry run: its plan must not be mistaken for one
        "plan": _outlook(result.plan) if dry_run else result.plan.to_dict(),
        "forecast": result.forecast.to_dict() if result.forecast else None,
        "verification": proof_object(result.verification) if result.verification else None,
        "healing": healed_object(result.healing) if result.healing else None,
        "report": result.report.payload() if result.report is not None else None,
    }
