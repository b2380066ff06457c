"""The model card: Markdown from what was measured. Nothing is typed, and what is missing is said to be missing."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from moeprune._files import human_bytes
from moeprune._version import __version__
from moeprune.architectures import ExpertName, RouterName, StackedName
from moeprune.checkpoint import Checkpoint
from moeprune.errors import ranges
from moeprune.evaluation.page import formats
from moeprune.evaluation.page.changes import skip_table, skipped_by_task
from moeprune.evaluation.page.commands import command_lines
from moeprune.evaluation.page.cost import ProbeLine, TaskRow, probe_lines, tasks_of, text_table
from moeprune.evaluation.page.decisions import experts_of
from moeprune.evaluation.page.parts import Table
from moeprune.evaluation.page.ratios import Sweep, sweep_of
from moeprune.evaluation.paired import INCONCLUSIVE
from moeprune.evaluation.report import banner
from moeprune.plans import PruningPlan
from moeprune.publish import changed
from moeprune.publish.evidence import Evidence, Proof
from moeprune.statistics import RARE, RouterStatistics

if TYPE_CHECKING:
    from huggingface_hub import EvalResult

    from moeprune.evaluation.compare import EvalReport, TaskComparison

Row = tuple[str, ...]
TAGS = ("moe", "expert-pruning", "moeprune")
_BACKENDS = {"hf": "transformers", "vllm": "vllm", "sglang": "sglang"}
_MARKUP = re.compile(r"([\\`*\[\]|~]|(?<!\w)_|_(?!\w))")


class Markdown(str):
    """Text that is Markdown already; any other is escaped where the template sets it."""

    __slots__ = ()


def render_card(evidence: Evidence, proof: Proof, name: str) -> str:
    """The card of a pruned checkpoint, front matter first; equal evidence gives equal text.

    Args:
        evidence: what its folder says.
        proof: what is known of its bytes.
        name: of the model.

    Example:
        >>> evidence = gather("pruned")
        >>> render_card(evidence, prove(evidence), "my-model-pruned").splitlines()[0]
        '---'
    """
    import jinja2

    environment = jinja2.Environment(  # noqa: S701 - Markdown, not HTML; whatever is not marked as such is escaped
        loader=jinja2.PackageLoader("moeprune.publish", "templates"),
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        undefined=jinja2.StrictUndefined,
        finalize=_set,
    )
    environment.filters["table"] = _table
    body = environment.get_template("card.md.j2").render(card=_card(evidence, proof, name))
    return f"---\n{_front_matter(evidence, name)}\n---\n\n{body}"


def _set(value: object) -> object:
    """Text as it is shown: on one line, and no markup unless it was made here."""
    if type(value) is not str:
        return value
    return _MARKUP.sub(r"\\\1", " ".join(value.split()).replace("&", "&amp;").replace("<", "&lt;"))


def _table(rows: Iterable[Sequence[str]], head: Sequence[str]) -> Markdown:
    """Rows of text as a table."""
    lines = [head, ["---"] * len(head), *rows]
    return Markdown("\n".join(f"| {' | '.join(str(_set(cell)) for cell in line)} |" for line in lines))


def _code(text: object) -> Markdown:
    return Markdown(f"`{' '.join(str(text).replace('`', '').split())}`")


# --- front matter -----------------------------------------------------------------------------------------------------


def _front_matter(evidence: Evidence, name: str) -> str:
    from huggingface_hub import ModelCardData

    base, licence, report = evidence.base, evidence.licence, evidence.sources.report
    data = ModelCardData(
        base_model=base.repo or None,
        license=licence.name or None,
        license_name=licence.title or None,
        license_link=licence.link or None,
        language=_languages(evidence.front_matter.get("language")),
        library_name="transformers" if changed.stock(evidence) else "moeprune",
        pipeline_tag=str(evidence.front_matter.get("pipeline_tag") or "text-generation"),
        tags=_tags(evidence),
        datasets=_datasets(evidence.sources.statistics) or None,
        model_name=name,
        eval_results=[_eval_result(row) for row in report.tasks] if report else None,
        base_model_relation="finetune" if base.repo else None,  # the Hub has no word for pruned
    )
    if not report:
        data.pop("model_name")
    return data.to_yaml()


def _tags(evidence: Evidence) -> list[str]:
    first, pruned, last = TAGS
    done = [*([pruned] if evidence.plan else []), *changed.tags_of(evidence.accounts)]
    return [first, *dict.fromkeys(done), last]


def _languages(value: object) -> str | list[str] | None:
    if isinstance(value, list):
        return [item for item in value if isinstance(item, str)] or None
    return value if isinstance(value, str) else None


def _datasets(statistics: RouterStatistics | None) -> list[str]:
    """Data sets of the Hub among the calibration data; files of this machine have a digest of their own."""
    entries = statistics.provenance if statistics else ()
    return sorted({str(entry["source"]) for entry in entries if "file_sha256" not in entry and "source" in entry})


def _eval_result(row: TaskComparison) -> EvalResult:
    from huggingface_hub import EvalResult

    points = row.unit == "points"
    part = "" if row.n == row.n_full else f", {row.n} of {row.n_full} documents"
    return EvalResult(
        task_type="text-generation",
        dataset_type=row.task,
        dataset_name=f"{row.task} ({row.n_shot}-shot{part})",
        dataset_args={"num_few_shot": row.n_shot, "documents": row.n, "of": row.n_full, "version": row.version},
        metric_type=row.metric,
        metric_name=f"{row.metric}, %" if points else row.metric,
        metric_value=round(100 * row.pruned, 2) if points else float(f"{row.pruned:.6g}"),
    )


# --- the page ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class _Calibration:
    """The section on calibration data."""

    source_head: Row
    sources: list[Row]
    domain_head: Row
    domains: list[Row]
    remarks: list[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Card:
    """Everything that the template sets; a section without its evidence is None."""

    name: str
    version: str
    summary: str
    cost: Markdown
    banner: str
    changes: list[Row]
    done: str
    proof: str
    choice_title: str
    choice: list[str]
    load: bool
    calibration: _Calibration | None
    calibrated_on: str
    tasks: list[Row] | None
    evaluation: list[str]
    text: Table | None
    skip: Table | None
    probes: list[Row] | None
    probe_warnings: list[str]
    sweep: Sweep | None
    engines: list[Row]
    commands: list[Markdown]
    hashes: list[Row]
    licence: str
    limits: list[str]


def _card(evidence: Evidence, proof: Proof, name: str) -> _Card:
    sources, report = evidence.sources, evidence.sources.report
    return _Card(
        name=name,
        version=__version__,
        summary=_summary(evidence),
        cost=_cost(evidence),
        banner=banner(report) if report and report.partial else "",
        changes=list(_changes(evidence, evidence.plan) if evidence.plan else changed.rows_of(evidence)),
        done=evidence.done,
        proof=changed.proof_of(evidence, proof) if evidence.accounts else _proof(proof),
        choice_title="How it was made" if evidence.accounts else "How the experts were chosen",
        choice=[*(_choice(evidence.plan) if evidence.plan else ()), *changed.choices_of(evidence.accounts)],
        load=not changed.stock(evidence) or changed.gated(evidence),
        calibration=_calibration(evidence),
        calibrated_on=changed.calibration_digest(evidence),
        tasks=_task_rows(report) if report else None,
        evaluation=_evaluation(report) if report else [],
        text=text_table(sources.text) if sources.text else None,
        skip=skip_table(sources.skip) if sources.skip else None,
        probes=[_probe(row) for row in probe_lines(sources.probes)] if sources.probes else None,
        probe_warnings=[str(line) for line in (sources.probes or {}).get("warnings", ())],
        sweep=sweep_of(sources.sweep) if sources.sweep else None,
        engines=_engines(evidence),
        commands=[Markdown(" ".join(line.split())) for line in command_lines(sources)],
        hashes=[(_code(name), _code(digest)) for name, digest in sorted(sources.digests.items())],
        licence=_licence(evidence),
        limits=list(_limits(evidence)),
    )


def _summary(evidence: Evidence) -> str:
    plan, base = evidence.plan, evidence.base
    at = f" at revision {base.revision}" if base.revision else ""
    parent = f"{base.repo}{at}" if base.repo else "a model whose name on the Hub is not recorded"
    if plan is None:
        done = "; ".join(account.summary for account in evidence.accounts)
        return f"{parent}, changed by moeprune: {done}. A {evidence.done} model is not the parent."
    kept = f"{plan.span} of {_experts_before(evidence)} routed experts in each of {len(plan.layers)} MoE layers"
    more = "".join(f" Then {account.summary}." for account in evidence.accounts)
    return f"{parent}, with {kept}. The others were removed by moeprune; a pruned model is not the parent.{more}"


def _experts_before(evidence: Evidence) -> int:
    recorded = (evidence.sources.provenance or {}).get("experts", {}).get("before")
    known = isinstance(recorded, int) and not evidence.sources.healing  # which starts from the pruned one
    return recorded if known else experts_of(evidence.sources)


def _cost(evidence: Evidence) -> Markdown:
    """What it cost, before anything else is said."""
    report, skip = evidence.sources.report, evidence.sources.skip
    text = f" On text: {changed.skip_cost(skip)}." if skip else ""
    if report is not None and report.tasks:
        return Markdown(f"{_task_cost(report)}{text}")
    if skip:
        return Markdown(f"**Cost: {changed.skip_cost(skip)}.** No task was evaluated.")
    doing = " and ".join([*(["pruning"] if evidence.plan else []), *(one.doing for one in evidence.accounts)])
    return Markdown(f"**Cost: not evaluated.** What {doing} cost this model was not measured on any task.")


def _task_cost(report: EvalReport) -> str:
    tasks = tasks_of(report)
    worst, count = tasks.worst, len(report.tasks)
    unit = "points" if report.tasks[0].unit == "points" else f"({report.tasks[0].metric})"
    line = f"**Cost: {_set(worst.name)} {worst.change} {unit}** (95 % interval {worst.interval})"
    if count > 1:
        line += f", the worst of {count} tasks"
    line += f"; {tasks.worse} of {formats.counted(count, 'task')} significantly worse"
    line += f" (Holm-adjusted p, {100 * report.alpha:g} %)"
    unclear = sum(item.count for item in tasks.verdicts if item.name == INCONCLUSIVE)
    if unclear:
        line += f", {unclear} inconclusive: too few documents to tell"
    if tasks.suite:
        line += f"; mean {tasks.suite.change} ({tasks.suite.interval})"
    return f"{line}."


def _changes(evidence: Evidence, plan: PruningPlan) -> Iterator[Row]:
    checkpoint = evidence.checkpoint
    before = _experts_before(evidence)
    yield "routed experts per MoE layer", str(before), plan.span
    if not plan.uniform:
        yield "by layer", "", ", ".join(f"{layer}: {count}" for layer, count in sorted(plan.counts.items()))
    yield "experts per token (top-k)", str(checkpoint.top_k), str(checkpoint.top_k)
    if checkpoint.n_group > 1:
        yield "expert groups", *[f"{checkpoint.n_group}, {checkpoint.topk_group} per token"] * 2
    size = plan.size.get("parameters")
    if size:
        yield "parameters", f"{size['before']:,}", f"{size['after']:,}"
        yield "of these active per token", *(f"{count:,}" for count in active_parameters(checkpoint, before))
    recorded = {} if evidence.accounts else (evidence.sources.provenance or {})  # healing starts from the pruned one
    stored = recorded.get("bytes") or plan.size.get("bytes")
    if stored:
        saved = 100 * (1 - stored["after"] / stored["before"])
        yield "weights on disk", human_bytes(stored["before"]), f"{human_bytes(stored['after'])} (-{saved:.0f} %)"
    dtypes = ", ".join(sorted({entry.dtype for entry in checkpoint.tensors.values()}))
    yield "dtypes on disk", dtypes, dtypes
    yield "MTP layers", *_mtp(evidence, plan)


def _mtp(evidence: Evidence, plan: PruningPlan) -> tuple[str, str]:
    checkpoint, spec = evidence.checkpoint, evidence.checkpoint.spec
    if checkpoint.mtp_layers:
        return ranges(checkpoint.mtp_layers), "kept, with as many experts"
    dropped = bool(spec.mtp_key) and plan.config_edits.get(spec.path(spec.mtp_key)) == 0
    return ("there", "dropped") if dropped else ("none", "none")


def active_parameters(checkpoint: Checkpoint, experts_before: int) -> tuple[int, int]:
    """Parameters of the decoder that one token uses, before and after: the latter lacks rows of the routers.

    Args:
        checkpoint: the pruned one, of a format whose elements are parameters.
        experts_before: routed experts per layer of what it was made from.
    """
    used, removed = 0, 0
    for name, entry in checkpoint.tensors.items():
        role = checkpoint.roles[name]
        if role.layer in checkpoint.mtp_layers or "scale" in name:
            continue
        experts = checkpoint.own_counts.get(role.layer, checkpoint.num_experts)
        if isinstance(role, ExpertName):
            used += entry.numel * (role.expert < checkpoint.top_k)  # experts are alike
        elif isinstance(role, StackedName):
            used += entry.numel // experts * checkpoint.top_k
        else:
            used += entry.numel
        if isinstance(role, RouterName):
            removed += entry.numel // experts * (experts_before - experts)
    return used + removed, used


def _proof(proof: Proof) -> str:
    found = proof.verification
    if found is None:
        return (
            "Kept experts byte-identical: not known. These weights were saved from memory, without a record of the "
            "parent's bytes, and may have been changed since they were pruned."
        )
    what = f"{found.tensors:,} tensors ({human_bytes(found.nbytes)})"
    if proof.with_source:
        return (
            f"Kept experts byte-identical: yes. {what} and {found.files} other files were compared with the parent's."
        )
    return (
        f"Kept experts byte-identical: {what} have the digests that were recorded while they were copied from the "
        "parent. The parent itself was not read again for this card; moeprune verify does that."
    )


def _choice(plan: PruningPlan) -> Iterator[str]:
    strategy, command = plan.strategy, plan.command
    paper = f" ({strategy['paper']})" if "paper" in strategy else ""
    yield f"Strategy: {strategy.get('name', 'by hand')}, {strategy.get('what', 'keep-lists')}{paper}."
    amount = f"ratio {command['ratio']} removed" if "ratio" in command else f"{plan.span} kept"
    yield f"Amount: {amount} of each layer's routed experts; budget {plan.budget.get('allocation', 'as listed')}."
    protected = sum(map(len, strategy.get("protected", {}).values()))
    said = "guarded" if command.get("guard") else "not guarded"
    yield f"Protected: {formats.counted(protected, 'expert')}; super experts {said}."
    if plan.coverage:
        shares = ", ".join(f"{domain} {100 * share:.1f} %" for domain, share in plan.coverage.items())
        yield f"Output of the experts that stay, by norm, mean over layers: {shares}."
    if "median" in plan.stability:
        median, lowest = plan.stability["median"], plan.stability["lowest"]
        yield (
            f"Two halves of the calibration data rank the experts with a correlation of {median:.2f} "
            f"(median of the layers; the lowest {lowest:.2f})."
        )


# --- calibration ------------------------------------------------------------------------------------------------------


def _calibration(evidence: Evidence) -> _Calibration | None:
    statistics = evidence.sources.statistics
    if statistics is None or not statistics.tokens:
        return None
    decided = evidence.plan or evidence.sources.change
    weights = (decided.command if decided else {}).get("weights", {})
    return _Calibration(
        source_head=("source", "revision", "domains", "samples", "tokens", "max length", "sha256 of the tokens"),
        sources=[_source_row(entry) for entry in statistics.provenance],
        domain_head=("domain", "tokens", "weight", "tokens of an expert: fewest", "median", f"experts below {RARE}"),
        domains=list(_domain_rows(statistics, weights)),
        remarks=list(_calibration_remarks(statistics)),
    )


def _source_row(entry: Mapping[str, Any]) -> Row:
    where = [str(entry[key]) for key in ("config", "split") if entry.get(key)]
    packed = ", packed" if entry.get("packed") else ""
    return (
        f"{entry.get('source', '')}{''.join(f'/{part}' for part in where)}",
        str(entry.get("revision") or "a file"),
        ", ".join(map(str, entry.get("domains", ()))),
        f"{int(entry.get('sequences', 0)):,}",
        f"{int(entry.get('tokens', 0)):,}",
        f"{entry.get('max_length', '')}{packed}",
        str(entry.get("sha256", "")),
    )


def _domain_rows(statistics: RouterStatistics, weights: Mapping[str, float]) -> Iterator[Row]:
    tokens_D = np.asarray(next(iter(statistics.layers.values()))["tokens"]).reshape(-1)
    count_DN = np.concatenate([np.asarray(arrays["count"]) for arrays in statistics.layers.values()], axis=1)
    for domain, tokens, count_N in zip(statistics.domains, tokens_D, count_DN, strict=True):
        seen = (f"{int(count_N.min()):,}", f"{int(np.median(count_N)):,}", f"{int((count_N < RARE).sum()):,}")
        yield (domain, f"{int(tokens):,}", f"{float(weights.get(domain, 1)):g}", *seen)


def _calibration_remarks(statistics: RouterStatistics) -> Iterator[str]:
    templates = {
        str(entry["chat_template_sha256"]) for entry in statistics.provenance if "chat_template_sha256" in entry
    }
    yield (
        f"Chat template: messages were set by the one with sha256 {', '.join(sorted(templates))}."
        if templates
        else "Chat template: none was applied."
    )
    yield "Languages of the data are not recorded."
    yield "A domain that is not in this table was not calibrated."


# --- evaluation -------------------------------------------------------------------------------------------------------


def _task_rows(report: EvalReport) -> list[Row]:
    tasks = tasks_of(report)
    return [_task_row(row) for row in (*tasks.rows, *([tasks.suite] if tasks.suite else []))]


def _task_row(row: TaskRow) -> Row:
    change = (row.change, row.interval, row.lost, row.gained, row.p, row.verdict.name, row.detectable)
    return (row.name, row.shots, row.metric, row.n, row.base, row.pruned, *change)


def _evaluation(report: EvalReport) -> list[str]:
    settings = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in report.settings.items())
    lines = [
        f"Margin in points: {report.margin:g}; significance level {report.alpha:g} after Holm's adjustment.",
        "Detectable: the smallest change that this many documents show with 80 % power.",
        f"Settings: {settings or 'not recorded'}.",
        *([f"Slots skipped, measured on each task: {skipped}."] if (skipped := skipped_by_task(report)) else []),
        *map(str, report.warnings),
    ]
    if "tasks" not in report.command:
        lines.append("Compared from sample files, which do not say which weights made them.")
    return lines


def _probe(row: ProbeLine) -> Row:
    told = row.told.name if row.told else row.note
    return (row.what, row.calibrated, row.n, row.base, row.pruned, row.change, row.interval, told)


def _engines(evidence: Evidence) -> list[Row]:
    """What each engine makes of the files: by its rules, or because it ran them."""
    report = evidence.sources.report
    ran, version = "", ""
    if report and report.inputs.get("pruned") == evidence.checkpoint.fingerprint:
        ran = _BACKENDS.get(str(report.settings.get("model_source", "")), "")
        version = str(report.settings.get(f"{ran}_version", ""))
    if evidence.plan is None:
        return changed.engine_rows(evidence, ran, version)
    rows: list[Row] = []
    for engine, reasons in evidence.plan.engines.items():
        if engine == ran:
            verdict = f"loaded{f' by {version}' if version else ''}: it ran the tasks above"
        elif reasons:
            verdict = f"does not load, according to its rules (not run): {'; '.join(map(str, reasons))}"
        else:
            verdict = "loads, according to its rules (not run)"
        rows.append((engine, verdict))
    return rows


# --- licence and limits -----------------------------------------------------------------------------------------------


def _licence(evidence: Evidence) -> str:
    licence = evidence.licence
    files = f" Files that came with the parent: {', '.join(licence.files)}." if licence.files else ""
    if not licence.name:
        return f"Unknown: the parent's card names none, or there is none. Ask its authors before you use this.{files}"
    title = f" ({licence.title})" if licence.title else ""
    source = "as stated by whoever published this" if licence.stated else "inherited from the parent's card"
    return f"{licence.name}{title}, {source}. It binds a pruned model as it binds the parent.{files}"


def _limits(evidence: Evidence) -> Iterator[str]:
    sources, plan = evidence.sources, evidence.plan
    if plan is not None and sources.provenance is not None and not evidence.accounts:
        yield "Experts were removed and nothing was trained afterwards."
    yield from changed.limits_of(evidence)
    yield "What the tasks and texts above do not cover was not measured: much may be lost there without a trace here."
    if sources.report is None:
        yield "No task was run: do not take the size of the cut for its cost."
    elif sources.report.partial:
        yield "Tasks ran on part of their documents only, so that scores are no benchmark results."
    if sources.statistics is None:
        yield "What the routers and experts did on calibration data does not come with this checkpoint."
    if sources.probes is None:
        yield "Generation was not probed for loops, nor output for its form."
    yield from map(str, plan.notes if plan else ())
    if plan and not plan.uniform:
        yield "Layers keep different numbers of experts, which only transformers loads, with trust_remote_code=True."
