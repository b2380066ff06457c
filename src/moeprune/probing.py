"""The probe pack: both models on the same prompts and texts, from opened folders to the report."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moeprune._files import PathLike, begin_work, check_output_folder, sha256_bytes, to_json
from moeprune._options import CalibrationOptions, by_stage, several
from moeprune.calibration import DEFAULT_LABEL, CalibrationSet
from moeprune.checkpoint import Checkpoint, open_checkpoint
from moeprune.collecting import does_not_fit, resident_bytes, streams
from moeprune.errors import ConfigError, EvaluationError
from moeprune.evaluation.agreement import AgreementSums, batches, logits_of
from moeprune.evaluation.continuations import continuations
from moeprune.evaluation.detectors import structured_prompts
from moeprune.evaluation.evaluator import KeepLists, PlanScore, check_documents
from moeprune.evaluation.probes import (
    Continuation,
    ProbeReport,
    ProbeRow,
    generation_rows,
    ranked,
    structured_rows,
    task_rows,
    text_rows,
    write_probes,
)
from moeprune.pipeline import BUNDLED
from moeprune.plan_kinds import AnyPlan, load_drop, load_plan
from moeprune.plans import DROP, PruningPlan
from moeprune.rewrite.drop import PROVENANCE, check_plan
from moeprune.runtime.loading import kind_of, needs_loading
from moeprune.scoring import logits_bytes, open_evaluator, text_digests
from moeprune.statistics import RouterStatistics

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from moeprune.evaluation.compare import EvalReport

OUTSIDE = BUNDLED / "probes" / "outside.jsonl"  # letters in three languages, logs and tables: in no calibration mix
LEAST_PROMPTS = 8
_ALL = 1000  # rows of our pack, which has fewer
_ANSWER_TOKENS = 64  # for a JSON object of a few keys


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeOptions:
    """How much is generated.

    Attributes:
        prompts: beginnings of documents that are continued, each once greedily and once drawn; at most so many.
        prompt_tokens: tokens of each.
        new_tokens: most tokens of a continuation.
        questions: texts to be put into JSON; at most so many.
        probe_batch: prompts that run together, the same for both models.
    """

    prompts: int = 64
    prompt_tokens: int = 32
    new_tokens: int = 96
    questions: int = 32
    probe_batch: int = 32


def evaluate_probes(
    base: PathLike,
    pruned: PathLike | PruningPlan,
    *,
    output: PathLike | None = None,
    text: Sequence[str] | str = (),
    revision: str | None = None,
    overwrite: bool = False,
    **options: Any,
) -> ProbeReport:
    """Run the probe pack on both models: loops, JSON, text inside and outside the calibration mix, agreement.

    The texts are those that are given and a small pack of ours, which no calibration has seen. Both models are given
    the same prompts in the same batches.

    Args:
        base: folder or Hub id of the original.
        pruned: the pruned checkpoint, with which it must fit in memory; or a plan or its file, by which experts are
            masked in the original. A plan for a model that does not fit alone is scored on the text, and generates
            nothing.
        output: folder for ``probes.json`` and ``probes.md``.
        text: ``[DOMAIN=]SOURCE`` each, as for calibration; columns ``domain`` and ``language`` label the rows. What is
            continued begins as they do.
        revision: of a base on the Hub.
        overwrite: replace the report in ``output``.
        options: fields of :class:`ProbeOptions`, and of :class:`moeprune._options.CalibrationOptions` except for
            ``pack`` and ``layers``.

    Raises:
        StaleArtifactError: the plan was made for another model.
        ConfigError: an option cannot work, the models do not fit, or the text gives no usable token.
        EvaluationError: the models cannot be compared.

    Example:
        >>> report = moeprune.evaluate_probes("base", "pruned", text="heldout.jsonl", output="report")
        >>> [(row.probe, row.reading) for row in report.rows]
    """
    job = _opened(base, pruned, text, output, revision=revision, overwrite=overwrite, options=options)
    measured = _measured(job)
    rows = [*_generated_rows(measured), *text_rows(measured.score, job.data.domains, job.languages, job.calibrated)]
    found = ProbeReport(
        base_model=job.checkpoint.path.resolve().name,
        pruned_model=job.name,
        rows=ranked(rows),
        text=job.data.provenance[:-1],
        pack=job.data.provenance[-1],
        warnings=(*job.warnings, *measured.warnings),
        command=_canonical(job),
        inputs=job.inputs,
    )
    if job.output is not None:
        write_probes(found, job.output)
    return found


def add_tasks(found: ProbeReport, report: EvalReport, output: PathLike) -> ProbeReport:
    """Add what tasks say of the same models, flips and choices, and write the probes again."""
    inputs = dict(found.inputs) | {f"tasks {name}": digest for name, digest in report.inputs.items()}
    more = dataclasses.replace(found, rows=ranked([*found.rows, *task_rows(report)]), inputs=inputs)
    write_probes(more, Path(output))
    return more


# --- what is opened ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class _Job:
    """Everything opened and checked.

    Attributes:
        keep: experts that a plan keeps; None where ``pruned`` is a checkpoint of its own.
        data: the documents; ``languages``: of each, or empty; ``prompts``: what is continued.
        calibrated: domains of the calibration mix, where they are known.
    """

    checkpoint: Checkpoint
    pruned: Checkpoint | None
    keep: KeepLists | None
    name: str
    settings: CalibrationOptions
    probing: ProbeOptions
    data: CalibrationSet
    languages: tuple[str, ...]
    prompts: Sequence[tuple[int, ...]]
    calibrated: frozenset[str] | None
    inputs: Mapping[str, str]
    warnings: tuple[str, ...]
    output: Path | None


def _opened(
    base: PathLike,
    pruned: PathLike | PruningPlan,
    text: Sequence[str] | str,
    output: PathLike | None,
    *,
    revision: str | None,
    overwrite: bool,
    options: dict[str, Any],
) -> _Job:
    """Open all inputs and refuse what cannot be probed."""
    calibrated, wanted = by_stage(options, CalibrationOptions, ProbeOptions)
    if calibrated.pop("layers", None) or calibrated.pop("pack", None):
        raise ConfigError("probes run whole models on single documents", "leave layers and pack out")
    probing = ProbeOptions(**wanted)
    _check_options(probing)
    if output is not None:
        check_output_folder(output, overwrite=overwrite)
    checkpoint = open_checkpoint(base, revision=revision)
    texts = several(text) or _bundled_text(checkpoint)
    settings = CalibrationOptions(sources=texts, **calibrated)
    plan = _plan_of(pruned)
    other = None if plan is not None else open_checkpoint(pruned)  # type: ignore[arg-type]  # no plan: a folder
    if plan is not None:
        plan = check_plan(checkpoint, plan)
    data = _load_texts(checkpoint, settings)
    check_documents(data.sequences)
    mix = _mix_of(pruned, plan)
    warnings = []
    if mix.digests & text_digests([data.fingerprint], data.provenance):
        warnings.append("part of the text was calibrated on: it looks better than it is")
    prompts = _prompts(data, sum(int(entry["sequences"]) for entry in data.provenance[:-1]), probing)
    if len(prompts) < LEAST_PROMPTS and texts:
        warnings.append(f"{len(prompts)} documents of the text are long enough to be continued: ours are too")
        prompts = _prompts(data, len(data.sequences), probing)
    if not prompts:
        raise EvaluationError(f"no document has more than {probing.prompt_tokens} tokens", "continue shorter prompts")
    digest = sha256_bytes(to_json(plan.to_dict()).encode()) if plan is not None else ""
    return _Job(
        checkpoint=checkpoint,
        pruned=other,
        keep=None if plan is None else {layer: plan.layers[layer].keep for layer in checkpoint.moe_layers},
        name=Path(pruned).resolve().name if not isinstance(pruned, PruningPlan) else "plan",
        settings=settings,
        probing=probing,
        data=data,
        languages=_load_texts(checkpoint, settings, label="language").domains,
        prompts=prompts,
        calibrated=mix.domains,
        inputs={"model": checkpoint.fingerprint, "text": data.fingerprint}
        | ({"pruned": other.fingerprint} if other else {"plan": digest}),
        warnings=tuple(warnings),
        output=Path(output) if output is not None else None,
    )


def _prompts(data: CalibrationSet, documents: int, probing: ProbeOptions) -> list[tuple[int, ...]]:
    """Beginnings of the first so many documents, or of all where that is none, the domains in turn."""
    by_domain: dict[str, list[tuple[int, ...]]] = defaultdict(list)
    for domain, ids in zip(data.domains[: documents or None], data.sequences, strict=False):
        if len(ids) > probing.prompt_tokens:
            by_domain[domain].append(ids[: probing.prompt_tokens])
    turns = itertools.zip_longest(*(by_domain[domain] for domain in sorted(by_domain)))
    return [ids for turn in turns for ids in turn if ids is not None][: probing.prompts]


def _check_options(probing: ProbeOptions) -> None:
    for field in dataclasses.fields(probing):
        if getattr(probing, field.name) < 1:
            raise ConfigError(f"{field.name} must be at least 1", f"the default is {field.default}")


def _load_texts(checkpoint: Checkpoint, settings: CalibrationOptions, label: str = DEFAULT_LABEL) -> CalibrationSet:
    """The documents that are given, as many as are asked for, and all of ours."""
    ours = dataclasses.replace(settings, sources=(str(OUTSIDE),), num_samples=_ALL, shuffle=False)
    parts = [one.load(checkpoint, label) for one in (settings, ours) if one.sources]
    return CalibrationSet(
        sequences=tuple(ids for part in parts for ids in part.sequences),
        domains=tuple(name for part in parts for name in part.domains),
        provenance=tuple(entry for part in parts for entry in part.provenance),
    )


def _bundled_text(checkpoint: Checkpoint) -> tuple[str, ...]:
    """Held-out text of the bundled model, which has its domains."""
    return (str(BUNDLED / "heldout.jsonl"),) if checkpoint.path.resolve() == (BUNDLED / "model").resolve() else ()


def _plan_of(pruned: PathLike | PruningPlan) -> PruningPlan | None:
    """The plan that is given, or None for a checkpoint."""
    if isinstance(pruned, PruningPlan):
        return pruned
    return load_drop(pruned, "a probe of a plan") if Path(pruned).suffix == ".json" else None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Mix:
    """What a pruned model was calibrated on, as far as it is known."""

    domains: frozenset[str] | None
    digests: frozenset[str]


def _mix_of(pruned: PathLike | PruningPlan, plan: PruningPlan | None) -> _Mix:
    """The domains that had a weight, by the plan and the statistics that lie beside it."""
    folder = None
    if not isinstance(pruned, PruningPlan):
        folder = Path(pruned).parent if plan is not None else Path(pruned) / PROVENANCE
    made: AnyPlan | None = plan
    if plan is None and folder is not None and (folder / "plan.json").is_file():
        made = load_plan(folder / "plan.json")
    if made is None:
        return _Mix(domains=None, digests=frozenset())
    domains = {*made.coverage} if isinstance(made, PruningPlan) else set()
    digests = text_digests(made.inputs.values(), ())
    file = folder / "statistics.safetensors" if folder is not None else None
    if file is not None and file.is_file():
        statistics = RouterStatistics.load(file)
        if statistics.inputs.get("calibration") == made.inputs.get("calibration"):
            domains |= {*statistics.domains}
            digests |= text_digests((), statistics.provenance)
    left_out = {domain for domain, weight in (made.command.get("weights") or {}).items() if not weight}
    return _Mix(domains=frozenset(domains - left_out) if domains else None, digests=frozenset(digests))


def _canonical(job: _Job) -> dict[str, Any]:
    """The options that decided the content, by their names on the command line; what only Python can say, if it did."""
    said = dataclasses.asdict(job.probing).items() - dataclasses.asdict(ProbeOptions()).items()
    return job.settings.canonical() | {"stage": "probes", "probes": True} | dict(sorted(said))


# --- what is measured -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class _Generated:
    """What one model generated."""

    greedy: list[Continuation]
    sampled: list[Continuation]
    answers: list[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Measured:
    """What both models did; without generation where the model is not in memory."""

    score: PlanScore
    base: _Generated | None = None
    pruned: _Generated | None = None
    warnings: tuple[str, ...] = ()


def _measured(job: _Job) -> _Measured:
    """Run both models, or the original with and without a plan's mask."""
    if job.pruned is not None:
        return _of_two(job, job.pruned)
    beside = logits_bytes(job.checkpoint, job.data, job.settings)
    if streams(job.checkpoint, job.settings, beside=beside):
        with open_evaluator(job.checkpoint, job.settings, job.data, plans=1, output=job.output) as evaluator:
            [score] = evaluator([job.keep or {}])
        return _Measured(score=score, warnings=("the model does not fit in memory: nothing was generated",))
    return _of_plan(job)


def _of_plan(job: _Job) -> _Measured:
    """The original, and the original with the plan's mask."""
    from moeprune.experts import expert_layers
    from moeprune.runtime.masking import masked

    model, keep = _load(job, job.checkpoint), job.keep or {}
    layers = expert_layers(model)
    return _run(job, model, model, lambda: masked(layers, keep))


def _of_two(job: _Job, pruned: Checkpoint) -> _Measured:
    """Both checkpoints, side by side in memory."""
    settings = job.settings
    beside = resident_bytes(pruned, settings.dtype) + logits_bytes(job.checkpoint, job.data, settings)
    reason = "--stream is given" if settings.stream else does_not_fit(job.checkpoint, settings, beside)
    if reason and settings.stream is not False:
        dropped = kind_of(pruned.path) == DROP and not (pruned.path / PROVENANCE / "healing.json").is_file()
        plan = pruned.path / PROVENANCE / "plan.json"
        hint = f"give its plan instead: {plan}" if dropped else "use a machine with more memory"
        raise ConfigError(f"probes need both models in memory, and {reason}", hint)
    return _run(job, _load(job, job.checkpoint), _load(job, pruned), contextlib.nullcontext)


def _load(job: _Job, checkpoint: Checkpoint) -> PreTrainedModel:
    """A model that runs as its plan says, whatever the kind of the plan."""
    from moeprune.collectors.resident import load_model, place_of
    from moeprune.runtime.loading import load

    settings = job.settings
    if needs_loading(checkpoint.path):
        place, trust = place_of(settings.device), settings.trust_remote_code
        begin_work()
        return load(checkpoint.path, dtype=settings.dtype, device_map=place, trust_remote_code=trust)
    return load_model(
        checkpoint, device=settings.device, dtype=settings.dtype, trust_remote_code=settings.trust_remote_code
    )


def _run(job: _Job, model: PreTrainedModel, other: PreTrainedModel, changed: Any) -> _Measured:
    """Everything that both models do.

    Args:
        job: what is asked.
        model: the original; ``other``: the pruned one, which may be the same.
        changed: makes a context in which ``other`` is pruned.
    """
    sums = AgreementSums(len(job.data.sequences))
    for rows, ids_BT, mask_BT in batches(job.data.sequences, job.settings.batch_tokens):
        base_BTV = logits_of(model, ids_BT, mask_BT)
        with changed():
            other_BTV = logits_of(other, ids_BT, mask_BT)
        sums.add(rows, base_BTV, other_BTV, ids_BT, mask_BT)
    base = _generate(job, model)
    with changed():
        pruned = _generate(job, other)
    return _Measured(score=PlanScore.of(sums), base=base, pruned=pruned)


def _generate(job: _Job, model: PreTrainedModel) -> _Generated:
    from transformers import AutoTokenizer

    trust = job.settings.trust_remote_code
    tokenizer: Any = AutoTokenizer.from_pretrained(job.checkpoint.path, trust_remote_code=trust)
    probing, size, prompts = job.probing, job.probing.probe_batch, job.prompts
    questions = [tokenizer(prompt.text)["input_ids"] for prompt in structured_prompts()[: probing.questions]]
    answers = continuations(model, questions, new_tokens=_ANSWER_TOKENS, batch_size=size)
    return _Generated(
        greedy=continuations(model, prompts, new_tokens=probing.new_tokens, batch_size=size),
        sampled=continuations(model, prompts, new_tokens=probing.new_tokens, batch_size=size, seed=job.settings.seed),
        answers=[tokenizer.decode(tokens, skip_special_tokens=True) for tokens, _ in answers],
    )


def _generated_rows(measured: _Measured) -> Iterator[ProbeRow]:
    base, pruned = measured.base, measured.pruned
    if base is None or pruned is None:
        return
    yield from generation_rows("greedy", base.greedy, pruned.greedy)
    yield from generation_rows("sampled", base.sampled, pruned.sampled)
    yield from structured_rows(structured_prompts()[: len(base.answers)], base.answers, pruned.answers)
