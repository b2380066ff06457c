"""The stages as functions: collect, plan, apply, verify, evaluate, compare, and prune, which is all of them in order.

Each stage reads files and writes one thing. Options are those of the command line.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moeprune._files import PathLike, begin_work, check_output_file, check_output_folder
from moeprune.calibration import CalibrationSet, check_vocabulary, load_calibration
from moeprune.checkpoint import Checkpoint, open_checkpoint
from moeprune.errors import ConfigError
from moeprune.planner import check_decisions, make_plan, preview
from moeprune.plans import Budget, MtpPolicy, PruningPlan
from moeprune.rewrite.drop import DEFAULT_SHARD_SIZE, PROVENANCE, apply_drop, check_output, check_plan
from moeprune.statistics import RouterStatistics
from moeprune.strategies import DEFAULT as DEFAULT_STRATEGY
from moeprune.strategies import Criterion, resolve

if TYPE_CHECKING:
    from moeprune.evaluation.compare import EvalReport
    from moeprune.evaluation.harness import EvalSettings
    from moeprune.rewrite.verify import Verification

BUNDLED = Path(__file__).parent / "data"
BUNDLED_TASKS = ("tiny",)
Protect = Mapping[int, frozenset[int]]


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationOptions:
    """How calibration data is read and run.

    Attributes:
        sources: ``[DOMAIN=]SOURCE`` each, see :func:`moeprune.calibration.load_calibration`.
        num_samples: rows per source; max_length: tokens per sequence.
        shuffle: draw rows with ``seed`` instead of taking the first; pack: join rows into full sequences.
        batch_tokens: tokens per batch, padding included.
        device, dtype: where and in what the model runs; ``auto`` is the checkpoint's own dtype.
        trust_remote_code: run code that comes with the checkpoint.
    """

    sources: tuple[str, ...] = ()
    num_samples: int = 512
    max_length: int = 2048
    shuffle: bool = False
    pack: bool = False
    batch_tokens: int = 8192
    seed: int = 0
    device: str | None = None
    dtype: str = "auto"
    trust_remote_code: bool = False

    def load(self, checkpoint: Checkpoint) -> CalibrationSet:
        """Read and tokenise the sources."""
        if self.batch_tokens < 1:
            raise ConfigError("--batch-tokens must be at least 1")
        data = load_calibration(
            self.sources,
            checkpoint.path,
            num_samples=self.num_samples,
            max_length=self.max_length,
            shuffle=self.shuffle,
            pack=self.pack,
            seed=self.seed,
            trust_remote_code=self.trust_remote_code,
        )
        check_vocabulary(data, int(checkpoint.config["vocab_size"]))
        return data

    def canonical(self) -> dict[str, Any]:
        """The options that decide the statistics, file names without their folders."""
        options = dataclasses.asdict(self)
        del options["device"], options["trust_remote_code"], options["sources"]  # sources are in the provenance
        return {"stage": "collect"} | options


def collect(
    model: PathLike,
    output: PathLike | None = None,
    *,
    calibration: Sequence[str] | str = (),
    revision: str | None = None,
    overwrite: bool = False,
    **options: Any,
) -> RouterStatistics:
    """Run calibration data through a model and add up what its routers and experts do.

    Args:
        model: folder or Hub id.
        output: statistics file to write.
        calibration: ``[DOMAIN=]SOURCE`` each. Without any, the statistics hold no tokens, for strategies without need.
        revision: of a Hub model.
        overwrite: replace ``output``.
        options: other fields of :class:`CalibrationOptions`.

    Returns:
        The statistics, as written.
    """
    sources = (calibration,) if isinstance(calibration, str) else tuple(calibration)
    settings = _options(sources=sources, **options)
    if output is not None:
        check_output_file(output, overwrite=overwrite)
    checkpoint = open_checkpoint(model, revision=revision)
    statistics = collect_from(checkpoint, settings, settings.load(checkpoint) if sources else None)
    if output is not None:
        statistics.save(output)
    return statistics


def _options(**options: Any) -> CalibrationOptions:
    try:
        return CalibrationOptions(**options)
    except TypeError as error:
        raise ConfigError(f"unknown calibration option: {error}") from error


def collect_from(checkpoint: Checkpoint, settings: CalibrationOptions, data: CalibrationSet | None) -> RouterStatistics:
    """Collect from an opened checkpoint and loaded data; without data, statistics of no tokens."""
    begin_work()
    if data is None:
        return RouterStatistics.empty(
            checkpoint.moe_layers,
            num_experts=checkpoint.num_experts,
            top_k=checkpoint.top_k,
            model=checkpoint.fingerprint,
        )
    from moeprune.collectors.resident import load_model, run_batches

    loaded = load_model(
        checkpoint, device=settings.device, dtype=settings.dtype, trust_remote_code=settings.trust_remote_code
    )
    observation = run_batches(loaded, data.batches(settings.batch_tokens), checkpoint)
    return observation.result(
        command=settings.canonical(), inputs={"calibration": data.fingerprint}, provenance=data.provenance
    )


def plan(
    statistics: PathLike | RouterStatistics,
    model: PathLike,
    *,
    ratio: float | str | None = None,
    keep: int | None = None,
    strategy: str | Criterion = DEFAULT_STRATEGY,
    weights: Mapping[str, float] | None = None,
    protect: Protect | None = None,
    guard: bool = True,
    target: Sequence[str] = (),
    round_to: int = 1,
    mtp: MtpPolicy = "cut",
    seed: int = 0,
    revision: str | None = None,
    output: PathLike | None = None,
    overwrite: bool = False,
) -> PruningPlan:
    """Decide which experts stay. Runs without torch.

    Args:
        statistics: a statistics file, or what :func:`collect` or ``observe`` returned.
        model: the folder or Hub id they were made from.
        ratio: fraction of the routed experts of each layer to remove; or
        keep: exact number that stays.
        strategy: a name of ``moeprune strategies``, or a callable from layer statistics to scores [E] or costs [E, E].
        weights: weight by calibration domain.
        protect: experts by layer that must stay.
        guard: keep super experts whatever the strategy says.
        target: engines that must take the result.
        round_to: make the kept count a multiple of this.
        mtp: ``cut`` or ``drop`` MTP layers.
        seed: for strategies that draw.
        revision: of a Hub model.
        output: plan file to write.
        overwrite: replace ``output``.
    """
    if output is not None:
        check_output_file(output, overwrite=overwrite)
    budget = Budget(ratio=None if ratio is None else str(ratio), keep=keep, round_to=round_to)
    stats = statistics if isinstance(statistics, RouterStatistics) else RouterStatistics.load(statistics)
    made = make_plan(
        open_checkpoint(model, revision=revision),
        stats,
        budget,
        strategy=strategy,
        weights=weights,
        protect=protect,
        guard=guard,
        mtp=mtp,
        target=target,
        seed=seed,
    )
    if output is not None:
        made.save(output)
    return made


def apply(
    model: PathLike,
    plan: PathLike | PruningPlan,
    output: PathLike,
    *,
    max_shard_size: int = DEFAULT_SHARD_SIZE,
    overwrite: bool = False,
    revision: str | None = None,
    dry_run: bool = False,
) -> Path:
    """Write the pruned checkpoint that a plan describes, by copying bytes. Runs without torch.

    Args:
        model: folder or Hub id of the source.
        plan: a plan or a plan file.
        output: new folder; it appears whole or not at all.
        max_shard_size: bytes of tensors per file.
        overwrite: replace a folder that is not empty.
        revision: of a Hub model.
        dry_run: check everything and write nothing.

    Returns:
        The folder.
    """
    decided = plan if isinstance(plan, PruningPlan) else PruningPlan.load(plan)
    checkpoint = open_checkpoint(model, revision=revision)
    if dry_run:
        check_plan(checkpoint, decided)
        check_output(checkpoint, output, overwrite=overwrite)
        return Path(output)
    return apply_drop(checkpoint, decided, output, max_shard_size=max_shard_size, overwrite=overwrite)


def verify(model: PathLike, output: PathLike, *, revision: str | None = None) -> Verification:
    """Prove that every tensor of a pruned checkpoint equals its bytes in the source.

    Raises:
        CheckpointError: something differs.
    """
    from moeprune.rewrite.verify import verify_drop

    return verify_drop(open_checkpoint(model, revision=revision), output)


def evaluate(
    base: PathLike,
    pruned: PathLike,
    *,
    tasks: Sequence[str] | str,
    output: PathLike,
    include_path: PathLike | None = None,
    margin: float = 1.0,
    overwrite: bool = False,
    **settings: Any,
) -> EvalReport:
    """Run lm-eval tasks on two checkpoints with identical requests and report the change per task.

    Args:
        base: the original, folder or Hub id.
        pruned: the other one.
        tasks: names of lm-eval tasks or groups.
        output: folder for ``report.json``, ``report.md`` and lm-eval's own output.
        include_path: folder of more task files.
        margin: loss in points that would still be acceptable, stated before the run.
        overwrite: replace ``output``.
        settings: other fields of :class:`moeprune.evaluation.harness.EvalSettings`.
    """
    from moeprune.evaluation.harness import EvalSettings

    names = (tasks,) if isinstance(tasks, str) else tuple(tasks)
    wanted = EvalSettings(tasks=names, include_path=Path(include_path) if include_path else None, **settings)
    check_output_folder(output, overwrite=overwrite)
    return evaluate_checkpoints(open_checkpoint(base), open_checkpoint(pruned), wanted, Path(output), margin=margin)


def evaluate_checkpoints(
    base: Checkpoint, pruned: Checkpoint, settings: EvalSettings, output: Path, *, margin: float
) -> EvalReport:
    """Evaluate two opened checkpoints and write the report."""
    from moeprune.evaluation.harness import evaluate_pair
    from moeprune.evaluation.report import write_report

    fingerprints = {"base": base.fingerprint, "pruned": pruned.fingerprint}
    report = evaluate_pair(base.path, pruned.path, settings, output, margin=margin, fingerprints=fingerprints)
    write_report(report, output)
    return report


def compare(
    base: PathLike,
    pruned: PathLike,
    *,
    margin: float = 1.0,
    metrics: Mapping[str, str] | None = None,
    output: PathLike | None = None,
    overwrite: bool = False,
) -> EvalReport:
    """Compare two folders of lm-eval samples (``--output_path X --log_samples``), from whatever backend they came.

    Raises:
        EvaluationError: the runs are not the same experiment.
    """
    from moeprune.evaluation.compare import compare_folders
    from moeprune.evaluation.report import write_report

    if output is not None:
        check_output_folder(output, overwrite=overwrite)
    report = compare_folders(Path(base), Path(pruned), margin=margin, metrics=metrics)
    if output is not None:
        write_report(report, Path(output))
    return report


@dataclass(frozen=True, kw_only=True)
class PruneResult:
    """What a one-shot run made; a dry run makes a preview of the plan and nothing else."""

    output: Path
    plan: PruningPlan
    statistics: RouterStatistics | None = None
    verification: Verification | None = None
    report: EvalReport | None = None


def prune(
    model: PathLike | None = None,
    output: PathLike | None = None,
    *,
    ratio: float | str | None = None,
    keep: int | None = None,
    calibration: Sequence[str] | str = (),
    strategy: str | Criterion = DEFAULT_STRATEGY,
    tasks: Sequence[str] | str = (),
    calibration_options: Mapping[str, Any] | None = None,
    evaluation: Mapping[str, Any] | None = None,
    margin: float = 1.0,
    max_shard_size: int = DEFAULT_SHARD_SIZE,
    overwrite: bool = False,
    revision: str | None = None,
    round_to: int = 1,
    dry_run: bool = False,
    **decisions: Any,
) -> PruneResult:
    """Collect, plan, apply, verify and, with tasks, evaluate. Everything that can be refused is refused first.

    Args:
        model: folder or Hub id; left out, the bundled model with its calibration text and its tasks.
        output: folder of the pruned checkpoint; by default ``./<name>-<kept>of<E>``.
        ratio: fraction of the routed experts of each layer to remove; or
        keep: exact number that stays.
        calibration: ``[DOMAIN=]SOURCE`` each.
        strategy: name or callable.
        tasks: lm-eval tasks; none means no evaluation.
        calibration_options: other fields of :class:`CalibrationOptions`.
        evaluation: other fields of :class:`moeprune.evaluation.harness.EvalSettings`.
        margin: acceptable loss in points.
        max_shard_size: bytes of tensors per file.
        overwrite: replace a folder that is not empty.
        revision: of a Hub model.
        round_to: make the kept count a multiple of this.
        dry_run: check everything, preview the size and the engines, and run nothing.
        decisions: ``weights``, ``protect``, ``guard``, ``mtp``, ``target``, ``seed`` as for :func:`plan`.
    """
    sources, names = (((text,) if isinstance(text, str) else tuple(text)) for text in (calibration, tasks))
    evaluation = dict(evaluation or {})
    if model is None:
        model, sources, names, evaluation = _bundled(sources, names, evaluation)
    checkpoint = open_checkpoint(model, revision=revision)
    budget = Budget(ratio=None if ratio is None else str(ratio), keep=keep, round_to=round_to)
    kept = budget.kept(checkpoint.router)
    target = Path(output) if output else Path(f"{_name(model)}-{kept}of{checkpoint.num_experts}")
    check_output(checkpoint, target, overwrite=overwrite)
    if resolve(strategy).calibrated and not sources:
        raise ConfigError(
            f"strategy {resolve(strategy).name!r} needs calibration data", "pass --calibration data.jsonl"
        )
    settings = _options(sources=sources, **dict(calibration_options or {}))
    data = settings.load(checkpoint) if sources else None
    check_decisions(
        checkpoint, budget, strategy=strategy, domains=sorted(set(data.domains)) if data else (), **decisions
    )
    evaluated = _preflight(names, evaluation) if names else None
    if dry_run:
        return PruneResult(output=target, plan=preview(checkpoint, budget, strategy=strategy, **decisions))
    statistics = collect_from(checkpoint, settings, data)
    made = make_plan(checkpoint, statistics, budget, strategy=strategy, **decisions)
    apply_drop(checkpoint, made, target, max_shard_size=max_shard_size, overwrite=overwrite, extra=_records(statistics))
    return _finish(checkpoint, target, made, statistics, evaluated, margin)


def _finish(
    checkpoint: Checkpoint,
    target: Path,
    made: PruningPlan,
    statistics: RouterStatistics,
    evaluated: EvalSettings | None,
    margin: float,
) -> PruneResult:
    """Verify the written checkpoint, and evaluate it."""
    from moeprune.rewrite.verify import verify_drop

    verification = verify_drop(checkpoint, target)
    pruned = open_checkpoint(target)
    report = None
    if evaluated is not None:
        report = evaluate_checkpoints(checkpoint, pruned, evaluated, target / PROVENANCE / "report", margin=margin)
    return PruneResult(output=target, plan=made, statistics=statistics, verification=verification, report=report)


def _preflight(names: tuple[str, ...], evaluation: Mapping[str, Any]) -> EvalSettings:
    """Check that every task can be run, before anything else is."""
    from moeprune.evaluation.harness import EvalSettings, preflight

    settings = EvalSettings(tasks=names, **evaluation)
    preflight(settings)
    return settings


def _records(statistics: RouterStatistics) -> dict[str, bytes]:
    """The statistics file, to lie beside the plan inside the checkpoint."""
    return {"statistics.safetensors": statistics.to_bytes()} if statistics.tokens else {}


def _bundled(
    sources: tuple[str, ...], names: tuple[str, ...], evaluation: dict[str, Any]
) -> tuple[Path, tuple[str, ...], tuple[str, ...], dict[str, Any]]:
    """The bundled model, calibration text and tasks, where the user named none."""
    if not names:
        evaluation = {"include_path": BUNDLED / "tasks", "limit": 200} | {
            key: value for key, value in evaluation.items() if value is not None
        }
    return BUNDLED / "model", sources or (str(BUNDLED / "calibration.jsonl"),), names or BUNDLED_TASKS, evaluation


def _name(model: PathLike) -> str:
    """What the default output folder is called after."""
    return "moeprune-tiny" if Path(model) == BUNDLED / "model" else Path(os.fspath(model)).resolve().name
