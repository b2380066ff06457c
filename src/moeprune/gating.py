"""Token-skip gating as a stage: solve a policy's thresholds on text, and write the checkpoint with its plan."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from moeprune._files import PathLike, begin_work, check_output_file
from moeprune._options import CalibrationOptions, by_stage, check_margin, eval_settings, several
from moeprune.calibration import CalibrationSet
from moeprune.checkpoint import Checkpoint, open_checkpoint
from moeprune.collecting import limits_of, open_stream, spill_folder
from moeprune.distilling import check_device, check_distillation, distil_gated, distil_zero, forecast_gated
from moeprune.errors import ConfigError, StaleArtifactError, StrategyError
from moeprune.evaluation.cache import cache_folder
from moeprune.evaluation.harness import preflight
from moeprune.evaluation.settings import EvalSettings
from moeprune.evaluation.skipped import Gated, Tally
from moeprune.oneshot import BUNDLED_LIMIT, BUNDLED_TASKS
from moeprune.pipeline import BUNDLED, evaluate_checkpoints, model_name
from moeprune.plans_skip import Renorm, SkipLayer, SkipPlan
from moeprune.rewrite.drop import DEFAULT_SHARD_SIZE, PROVENANCE, check_output
from moeprune.rewrite.skip import apply_skip, verify_skip
from moeprune.runtime.policies import DEFAULT, TRAINED, Policy, policy_named
from moeprune.scoring import open_evaluator
from moeprune.sketches import count_below, softsign, threshold_for, unsoftsign
from moeprune.statistics import RouterStatistics

if TYPE_CHECKING:
    from moeprune.evaluation.compare import EvalReport
    from moeprune.evaluation.skip_report import SkipReport
    from moeprune.healing.distillation import Recipe
    from moeprune.healing.forecast import TrainingForecast
    from moeprune.rewrite.verify import Verification
    from moeprune.runtime.thresholds import Solved
    from moeprune.streaming.forecast import Forecast
    from moeprune.streaming.states import States
    from moeprune.streaming.stream import LayerStream

Thresholds = Literal["layer", "global"]
SKETCHES = {"share": "share_hist", "ratio": "ratio_hist", "top-p": "mass_hist", "zero-logit": "score_hist"}
_SENSITIVITY_TEXTS = 64  # documents on which it is measured what a layer alone costs
_AT_ONCE = 8  # layers of which that is measured in one pass


@dataclass(frozen=True, kw_only=True)
class SkipResult:
    """What ``skip`` made; a dry run has a forecast and nothing else.

    Attributes:
        output: the folder, or the plan file.
        plan: what is skipped.
        verification: of the folder against its source.
        heldout: what it costs on text, at the measured rate.
        report: accuracy per task.
        forecast: of the pass that solves the thresholds; training: of the training after it.
    """

    output: Path
    plan: SkipPlan | None = None
    verification: Verification | None = None
    heldout: SkipReport | None = None
    report: EvalReport | None = None
    forecast: Forecast | None = None
    training: TrainingForecast | None = None


def skip(
    model: PathLike | None = None,
    output: PathLike | None = None,
    *,
    skip_rate: float = 0.5,
    policy: str = DEFAULT,
    renorm: str = "none",
    thresholds: str = "layer",
    calibration: Sequence[str] | str = (),
    statistics: PathLike | None = None,
    bake: bool = False,
    distill: Recipe | None = None,
    train: Sequence[str] | str = "all",
    heldout: Sequence[str] | str = (),
    curve: Sequence[float] = (),
    tasks: Sequence[str] | str = (),
    margin: float = 1.0,
    max_shard_size: int = DEFAULT_SHARD_SIZE,
    revision: str | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
    cache: PathLike | Literal[False] | None = None,
    **options: Any,
) -> SkipResult:
    """Have a trained model skip a share of its (token, expert) slots, without training it.

    The thresholds are solved layer by layer, each on what the already gated layers before it give. The checkpoint is
    copied as it is, so that any engine loads it (and skips nothing); :func:`moeprune.load` runs it with its gates.

    Args:
        model: folder or Hub id; left out, the bundled model with its calibration text, held-out text and tasks.
        output: new folder; or a file that ends in ``.json``, for the plan alone. By default ``./<name>-skip50``.
        skip_rate: share of the top-k slots to skip, from 0 to 1.
        policy: scores slots, see :data:`moeprune.runtime.policies.BUILTIN`.
        renorm: what the weights of the other slots are divided by: ``none``, ``survivors`` or ``topk2:N``.
        thresholds: ``layer`` skips the share in every layer, ``global`` has one threshold for all of them.
        calibration: ``[DOMAIN=]SOURCE`` each.
        statistics: a statistics file with the policy's sketches, from which thresholds are read without running the
            model: on the inputs that the model without gates has.
        bake: of ``static-k``: write the smaller number of experts per token into the config, for any engine.
        distill: train the model with its gates in the loop to predict what it predicts without them, so that the
            checkpoint has other weights; train: which, of ``router``, ``experts``, ``attention``, ``norms``, ``all``
            and, with zero experts, ``zero-rows``.
        heldout: text on which the cost is measured; curve: other rates to measure there too.
        tasks: lm-eval tasks; margin: acceptable loss in points.
        max_shard_size: bytes of tensors per file.
        revision: of a Hub model.
        overwrite: replace an output that exists.
        dry_run: check everything and write nothing.
        cache: where results of the model itself are kept, as for :func:`moeprune.prune`.
        options: other fields of :class:`moeprune._options.CalibrationOptions` and
            :class:`moeprune.evaluation.settings.EvalSettings`.

    Raises:
        MoePruneError: anything that cannot work; nothing is half-written.

    Example:
        >>> result = moeprune.skip("base", "gated", skip_rate=0.5, calibration="data.jsonl", heldout="heldout.jsonl")
        >>> result.plan.rate, result.heldout.point.policy.ratio
    """
    check_margin(margin)
    sources, texts, names = several(calibration), several(heldout), several(tasks)
    if model is None:
        model = BUNDLED / "model"
        sources = sources or (() if statistics else (str(BUNDLED / "calibration.jsonl"),))
        texts = texts or (str(BUNDLED / "heldout.jsonl"),)
        options = _bundled_tasks(names, options)
        names = names or BUNDLED_TASKS
    calibrated, evaluated = by_stage(options, CalibrationOptions, EvalSettings)
    settings = CalibrationOptions(sources=sources, **calibrated)
    checkpoint = open_checkpoint(model, revision=revision)
    target = Path(output) if output is not None else Path(f"{model_name(model)}-skip{skip_rate * 100:g}")
    job = _Job(
        checkpoint=checkpoint,
        settings=settings,
        policy=policy_named(policy),
        renorm=Renorm.parse(renorm),
        thresholds=thresholds,
        statistics=Path(statistics) if statistics else None,
        bake=bake,
        target=target,
    )
    job.check(skip_rate)
    for rate in curve:
        job.check(rate)
    job.check_measured(texts, names, curve)
    if job.policy.name in TRAINED and distill is None:
        raise ConfigError(f"policy {policy!r} has to be trained", "pass --distill")
    if distill is not None:
        check_device(settings.device)
        check_distillation(checkpoint, job.policy, train, bake=bake, file_only=job.file_only, curve=bool(curve))
    _check_output(job, overwrite=overwrite)
    data = settings.load(checkpoint) if sources else None
    held = _held_out(checkpoint, settings, texts, data)
    evaluation = eval_settings(names, evaluated) if names else None
    if evaluation is not None:
        preflight(evaluation, checkpoint.path)
    if dry_run:
        if data is None:
            return SkipResult(output=target)
        training = forecast_gated(checkpoint, settings, data, distill, train) if distill is not None else None
        return SkipResult(output=target, forecast=job.forecast(data), training=training)
    if distill is not None and data is not None:
        write = {"max_shard_size": max_shard_size, "overwrite": overwrite}
        plan = _distilled(job, skip_rate, data, recipe=distill, train=train, **write)
    else:
        plan = job.solve(skip_rate, data)
    if job.file_only:
        plan.save(target)
        return SkipResult(output=target, plan=plan)
    others = [job.solve(rate, data) for rate in curve]
    if distill is None:
        apply_skip(checkpoint, plan, target, max_shard_size=max_shard_size, overwrite=overwrite)
    result = SkipResult(output=target, plan=plan, verification=verify_skip(checkpoint, target))
    return evaluated_skip(
        result, checkpoint, [plan, *others], settings, held, evaluation, margin=margin, cache=cache_folder(cache)
    )


def _distilled(job: _Job, rate: float, data: CalibrationSet, **how: Any) -> SkipPlan:
    """Train, write the folder, and give the plan that lies in it."""
    if job.policy.name in TRAINED:
        given = job.unsolved(rate, data.fingerprint)
        return distil_zero(job.checkpoint, given, job.target, settings=job.settings, data=data, **how).plan
    given = job.solve(rate, data)
    return distil_gated(job.checkpoint, given, job.target, settings=job.settings, data=data, **how).plan


def evaluated_skip(
    result: SkipResult,
    base: Checkpoint,
    plans: Sequence[SkipPlan],
    settings: CalibrationOptions,
    held: CalibrationSet | None,
    evaluation: EvalSettings | None,
    *,
    margin: float,
    cache: Path | None,
) -> SkipResult:
    """Measure what was written on held-out text and on tasks, and leave the report in its folder.

    Args:
        result: what was written.
        base: the model that skips nothing.
        plans: the one that was written, and others for a curve.
        settings: how text is run.
        held: the text, if any.
        evaluation: the tasks, if any.
        margin: acceptable loss in points.
        cache: where results of the base are kept.
    """
    from moeprune.skip_scoring import measure_skip, write_measured

    folder = result.output / PROVENANCE / "report"
    if held is not None and not plans[0].baked:
        trained = open_checkpoint(result.output) if plans[0].training else None
        report, took = measure_skip(base, plans, settings, held, output=result.output, trained=trained)
        folder.mkdir(parents=True, exist_ok=True)
        write_measured(report, took, folder)
        result = dataclasses.replace(result, heldout=report)
    if evaluation is not None:
        written = open_checkpoint(result.output)
        accuracy = evaluate_checkpoints(base, written, evaluation, folder, margin=margin, cache=cache)
        result = dataclasses.replace(result, report=accuracy)
    return result


def _bundled_tasks(names: tuple[str, ...], options: Mapping[str, Any]) -> dict[str, Any]:
    """Where the bundled model's tasks lie, and how many of their questions are asked where nothing is said."""
    given = {name: value for name, value in options.items() if value is not None}
    return {"include_path": BUNDLED / "tasks", **({} if names else {"limit": BUNDLED_LIMIT}), **given}


def _held_out(
    checkpoint: Checkpoint, settings: CalibrationOptions, texts: tuple[str, ...], data: CalibrationSet | None
) -> CalibrationSet | None:
    """The text on which the cost is measured; none of it may have been calibrated on."""
    held = dataclasses.replace(settings, sources=texts).load(checkpoint) if texts else None
    if data is not None and held is not None and set(data.sequences) & set(held.sequences):
        raise ConfigError("the held-out text is calibration data too", "name another --heldout")
    return held


def _check_output(job: _Job, *, overwrite: bool) -> None:
    if job.file_only:
        check_output_file(job.target, overwrite=overwrite)
    else:
        check_output(job.checkpoint, job.target, overwrite=overwrite)


@dataclass(frozen=True, kw_only=True)
class _Job:
    """Everything that decides a plan but its rate."""

    checkpoint: Checkpoint
    settings: CalibrationOptions
    policy: Policy
    renorm: Renorm
    thresholds: str
    statistics: Path | None
    bake: bool
    target: Path

    @property
    def file_only(self) -> bool:
        """Whether the plan is all that is written."""
        return self.target.suffix == ".json"

    @property
    def floor(self) -> int:
        """Slots of a token that are never skipped: the best one, but more of them where the policy says so."""
        return max(1, 3 * self.checkpoint.top_k // 8) if self.policy.shared else 1

    def check(self, rate: float) -> None:
        """Refuse what cannot work.

        Raises:
            ConfigError: the message says what.
        """
        from moeprune.runtime.thresholds import check_rate

        self.checkpoint.check_uniform()
        if self.policy.name in TRAINED and (self.renorm.kind != "none" or self.thresholds != "layer"):
            raise ConfigError("zero experts are trained: there are no weights to share out and no thresholds to solve")
        check_rate(self.policy, rate, self.checkpoint.top_k, self.floor)
        if self.thresholds not in get_args(Thresholds):
            raise ConfigError(f"unknown --thresholds {self.thresholds!r}", "layer or global")
        if self.policy.whole and self.thresholds == "global":
            raise ConfigError(f"policy {self.policy.name!r} has no threshold to share", "leave --thresholds out")
        if self.statistics is None and not self.settings.sources:
            raise ConfigError("thresholds are solved on text", "pass --calibration data.jsonl, or --statistics FILE")
        if self.statistics is not None:
            self._check_sketch()
        if self.bake:
            self._check_bake(rate)

    def check_measured(self, texts: Sequence[str], tasks: Sequence[str], curve: Sequence[float]) -> None:
        """Refuse to measure what is not written, or nothing.

        Raises:
            ConfigError: the message says what.
        """
        if (texts or tasks) and self.file_only:
            what = "a plan file alone is not evaluated"
            raise ConfigError(what, "give a folder as -o, or leave --heldout and --eval out")
        if curve and not texts:
            raise ConfigError("--curve says at which rates to measure, and there is no text", "name one with --heldout")

    def _check_sketch(self) -> None:
        if self.policy.name not in SKETCHES:
            known = ", ".join(SKETCHES)
            raise ConfigError(f"policy {self.policy.name!r} has no sketch in statistics", f"these have one: {known}")
        if self.settings.sources:
            raise ConfigError("--statistics and --calibration are both given", "leave one of them out")

    def _check_bake(self, rate: float) -> None:
        top_k = self.checkpoint.top_k
        if not self.policy.whole:
            raise ConfigError("--bake is for --policy static-k", "no config says anything else about skipping")
        if str(self.renorm) != "none":
            raise ConfigError("--bake leaves the weights to the engine", "leave --renorm out")
        if self.file_only:
            raise ConfigError("--bake edits a config, and the output is a plan file", "give a folder as -o")
        kept = (1 - rate) * top_k
        if abs(kept - round(kept)) > 1e-6 or not 0 < round(kept) < top_k:
            rates = ", ".join(f"{1 - k / top_k:g}" for k in range(top_k - 1, 0, -1))
            raise ConfigError(f"--bake runs as many experts of every token: {kept:g} is no number of them", rates)

    # --- solving ------------------------------------------------------------------------------------------------------

    def forecast(self, data: CalibrationSet) -> Forecast:
        """What the pass would take."""
        return self._arranged(data)[1]

    def unsolved(self, rate: float, calibration: str) -> SkipPlan:
        """A plan that is still to be trained."""
        return SkipPlan(
            policy=self.policy.name,
            renorm=self.renorm,
            layers={},
            target=rate,
            rate=rate,
            top_k=self.checkpoint.top_k,
            command=self._command(rate),
            inputs={"model": self.checkpoint.fingerprint, "calibration": calibration},
        )

    def solve(self, rate: float, data: CalibrationSet | None) -> SkipPlan:
        """The plan that skips a share of the slots."""
        if data is None:
            return self._from_sketches(rate)
        with self._solver(data) as (solve, baked):
            if self.bake:
                return self._plan(rate, baked(rate), data.fingerprint)
            return self._plan(rate, solve(rate), data.fingerprint)

    def _plan(self, rate: float, solved: Solved, calibration: str) -> SkipPlan:
        kept = round((1 - rate) * self.checkpoint.top_k)
        edits = self._baked_edits(kept, solved) if self.bake else {}
        return SkipPlan(
            policy=self.policy.name,
            renorm=self.renorm,
            layers={} if self.bake else solved.layers,
            tensors=solved.tensors(),
            target=rate,
            rate=rate if self.bake else solved.rate,
            top_k=self.checkpoint.top_k,
            floor=self.floor,
            baked=self.bake,
            config_edits=edits,
            command=self._command(rate),
            inputs={"model": self.checkpoint.fingerprint, "calibration": calibration},
            notes=self._notes(rate, edits),
        )

    def _command(self, rate: float) -> dict[str, Any]:
        own = {"policy": self.policy.name, "skip_rate": rate, "renorm": str(self.renorm), "thresholds": self.thresholds}
        return self.settings.canonical() | {"stage": "skip"} | own | ({"bake": True} if self.bake else {})

    def _notes(self, rate: float, edits: Mapping[str, Any]) -> tuple[str, ...]:
        top_k, notes = self.checkpoint.top_k, []
        if self.policy.keeps_top and not self.policy.whole and abs(rate - (1 - self.floor / top_k)) < 1e-9:
            notes.append(
                f"at this rate {self.policy.name} keeps {self.floor} of {top_k} slots of every token: "
                f"it is static {self.floor}"
            )
        if edits and len(edits) == 1:
            notes.append("the engine shares the weight of the slots that go out over the others: no scale prevents it")
        return tuple(notes)

    def _baked_edits(self, kept: int, solved: Solved) -> dict[str, Any]:
        """The config of a model that runs fewer experts per token, its output being as large as before on the mean."""
        spec, values = self.checkpoint.spec, self.checkpoint.spec.values(self.checkpoint.config)
        edits: dict[str, Any] = {spec.path(spec.top_k_key): kept}
        scale = values.get("routed_scaling_factor")
        if scale is not None and values.get("norm_topk_prob", True):
            held = sum(one.held for one in solved.scored.values()) / len(solved.scored)
            edits[spec.path("routed_scaling_factor")] = float(f"{scale * held:.6g}")
        return edits

    def _arranged(self, data: CalibrationSet) -> tuple[LayerStream, Forecast, list[dict[str, Any]]]:
        from moeprune.streaming.forecast import Load, forecast
        from moeprune.streaming.stream import padded

        batches = [padded(batch.sequences) for batch in data.batches(self.settings.batch_tokens)]
        stream = open_stream(self.checkpoint, self.settings)
        shapes = [(int(rows), int(length)) for rows, length in (inputs["input_ids"].shape for inputs in batches)]
        load = Load(shapes=shapes, last=stream.depth - 1)
        expected = forecast(stream.weights, load, limits_of(self.settings, stream.device))
        stream.chunk = expected.chunk
        return stream, expected, batches

    @contextlib.contextmanager
    def _solver(self, data: CalibrationSet) -> Iterator[tuple[Callable[[float], Solved], Callable[[float], Solved]]]:
        from moeprune.runtime.thresholds import ThresholdSolver
        from moeprune.streaming.states import SpilledStates, States

        stream, expected, batches = self._arranged(data)
        with spill_folder(expected, self.target) as folder:
            begin_work()

            @contextlib.contextmanager
            def states() -> Iterator[States]:
                yield SpilledStates(len(batches), folder) if expected.spill else States(len(batches))

            def solver(floor: int) -> ThresholdSolver:
                return ThresholdSolver(
                    stream,
                    batches,
                    states,
                    policy=self.policy,
                    renorm=self.renorm,
                    floor=floor,
                    sensitivity=self._sensitivity(data) if self.policy.shared else {},
                )

            def solve(rate: float) -> Solved:
                if self.policy.shared or self.thresholds == "global":
                    return solver(self.floor).shared(rate)
                return solver(self.floor).each(self._rates(rate, stream, batches, states))

            def baked(rate: float) -> Solved:
                kept = round((1 - rate) * self.checkpoint.top_k)
                return solver(kept).each(dict.fromkeys(self.checkpoint.moe_layers, rate))

            yield solve, baked

    def _rates(
        self,
        rate: float,
        stream: LayerStream,
        batches: list[dict[str, Any]],
        states: Callable[[], contextlib.AbstractContextManager[States]],
    ) -> dict[int, float]:
        """The share that every layer skips: the same, but where a policy keeps whole slots, by what it costs there."""
        layers, top_k = self.checkpoint.moe_layers, self.checkpoint.top_k
        if not self.policy.whole or rate == 0:
            return dict.fromkeys(layers, rate)
        from moeprune.runtime.static_k import shared_out, slot_errors

        slots = max(len(layers), round((1 - rate) * top_k * len(layers)))
        chosen = shared_out(slot_errors(stream, batches, states), slots)
        return {layer: 1 - k / top_k for layer, k in chosen.items()}

    def _sensitivity(self, data: CalibrationSet) -> dict[int, float]:
        """KL of the next-token distributions when one layer alone runs its first slots only, from 0 to 1."""
        layers, few = self.checkpoint.moe_layers, data.sequences[:_SENSITIVITY_TEXTS]
        text = dataclasses.replace(data, sequences=few, domains=data.domains[: len(few)])
        found: dict[int, float] = {}
        with open_evaluator(self.checkpoint, self.settings, text, plans=_AT_ONCE, output=self.target) as evaluator:
            for begin in range(0, len(layers), _AT_ONCE):
                part = layers[begin : begin + _AT_ONCE]
                alone = [Gated(self._only(layer), Tally([0] * len(few))) for layer in part]
                scores = evaluator.score(alone)
                found |= {layer: score.agreement.kl.value for layer, score in zip(part, scores, strict=True)}
        low, high = min(found.values()), max(found.values())
        return {layer: round((kl - low) / max(high - low, 1e-12), 6) for layer, kl in found.items()}

    def _only(self, layer: int) -> SkipPlan:
        """The plan by which one layer alone keeps nothing but the slots that are never skipped."""
        return SkipPlan(
            policy="static-k",
            renorm=self.renorm,
            layers={layer: SkipLayer(threshold=0.5 - self.floor)},
            target=0.0,
            rate=0.0,
            top_k=self.checkpoint.top_k,
            command={},
            inputs={},
        )

    # --- from statistics ----------------------------------------------------------------------------------------------

    def _from_sketches(self, rate: float) -> SkipPlan:
        """A plan without running the model: quantiles of what was counted."""
        assert self.statistics is not None  # noqa: S101 - one of the two is given
        stats = RouterStatistics.load(self.statistics)
        if stats.inputs.get("model") != self.checkpoint.fingerprint:
            raise StaleArtifactError(
                f"{self.statistics} was collected from another model than {self.checkpoint.path.name}"
            )
        name = SKETCHES[self.policy.name]
        top_k = self.checkpoint.top_k
        hists = {layer: _sketch_of(stats, layer, name) for layer in self.checkpoint.moe_layers}
        slots = {layer: int(stats.layer(layer).tokens) * top_k for layer in hists}
        total = functools.reduce(lambda one, other: one + other, hists.values())
        layers = {}
        for layer, hist in hists.items():
            pooled = self.thresholds == "global"
            of, wanted = (total, rate * sum(slots.values())) if pooled else (hist, rate * slots[layer])
            value = threshold_for(of, wanted)
            logit = self.policy.name == "zero-logit"
            threshold = -math.inf if rate == 0 else unsoftsign(value) if logit else value
            skipped = count_below(hist, float(softsign(threshold)) if logit else value) / slots[layer] if rate else 0.0
            layers[layer] = SkipLayer(threshold=threshold, rate=skipped)
        measured = sum(one.rate * slots[layer] for layer, one in layers.items()) / sum(slots.values())
        return SkipPlan(
            policy=self.policy.name,
            renorm=self.renorm,
            layers=layers,
            target=rate,
            rate=measured,
            top_k=top_k,
            floor=self.floor,
            command=self._command(rate),
            inputs={"model": self.checkpoint.fingerprint, **{k: v for k, v in stats.inputs.items() if k != "model"}},
            notes=(
                *self._notes(rate, {}),
                "thresholds are of the model without gates: the measured rate differs a little",
            ),
        )


def _sketch_of(stats: RouterStatistics, layer: int, name: str) -> Any:
    try:
        return getattr(stats.layer(layer), name)
    except StrategyError as error:
        raise ConfigError(f"the statistics have no {name}", f"collect them with --statistics {name}") from error
