"""Train a whole checkpoint to predict what its original predicts: a pruned one, or one that skips slots."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moeprune._files import PathLike, envelope, note
from moeprune._options import CalibrationOptions, by_stage, several
from moeprune.checkpoint import Checkpoint, open_checkpoint
from moeprune.errors import ConfigError
from moeprune.healing.carried import carried, source_of
from moeprune.healing.distillation import Distilled, Recipe, Text, check_levels, distil, held_out_divergence, trainable
from moeprune.healing.forecast import TrainingForecast, training_forecast
from moeprune.rewrite.changed import Changes, changing, check_plain, write_changed
from moeprune.rewrite.drop import DEFAULT_SHARD_SIZE, check_output
from moeprune.runtime.loading import needs_loading
from moeprune.runtime.policies import TRAINED, ZEDA, ZERO_EXPERTS

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from moeprune.calibration import CalibrationSet
    from moeprune.healing.lora import Rank
    from moeprune.plans_skip import SkipPlan
    from moeprune.runtime.policies import Policy

SCHEMA = "moeprune.healing/1"
METHODS: Mapping[str, Mapping[str, Any]] = {"logits": {}, "lora": {"lr": 1e-3}}  # with defaults of their own


@dataclass(frozen=True, kw_only=True)
class DistillResult:
    """What :func:`distil_checkpoint` made.

    Attributes:
        output: the folder.
        method: ``logits`` or ``lora``.
        distilled: what the run came to; None in a dry run.
        healed: whether the output predicts what the original does better than the given model; else it is a copy.
        forecast: memory, of a dry run.
    """

    output: Path
    method: str
    distilled: Distilled | None = None
    healed: bool = False
    forecast: TrainingForecast | None = None


def distil_checkpoint(
    base: PathLike,
    pruned: PathLike,
    output: PathLike,
    *,
    method: str = "logits",
    calibration: Sequence[str] | str,
    train: Sequence[str] | str = "all",
    recipe: Recipe | None = None,
    rank: Rank | None = None,
    keep_zeros: bool = False,
    max_shard_size: int = DEFAULT_SHARD_SIZE,
    revision: str | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
    **options: Any,
) -> DistillResult:
    """Train a pruned, fused or sparsified checkpoint on the next-token distributions of its original.

    Both models are in memory as a whole, the trained one in float32 with AdamW's two moments. A killed run goes on.

    Args:
        base: the original: folder or Hub id.
        pruned: what was made from it.
        output: new folder, which appears whole or not at all.
        method: ``logits`` trains the weights that ``train`` names; ``lora`` adapters on the attention projections.
        calibration: ``[DOMAIN=]SOURCE`` each; every tenth sequence of a domain only judges.
        train: of ``router``, ``experts``, ``attention``, ``norms`` and ``all``.
        recipe: steps, learning rate and so on; adapters have a larger rate by default.
        rank: of the adapters.
        keep_zeros: weights that are exactly zero stay so, as those that were pruned away.
        max_shard_size: bytes of tensors per file.
        revision: of a base on the Hub.
        overwrite: replace a folder that is not empty.
        dry_run: check everything, forecast the memory, and run nothing.
        options: ``num_samples``, ``max_length``, ``device`` and the other fields of
            :class:`moeprune._options.CalibrationOptions` that say how data is read.

    Raises:
        ConfigError: an option cannot work, or the text is too short.
        UnsupportedModelError: the weights to train are quantised.

    Example:
        >>> distil_checkpoint("base", "pruned", "healed", calibration="data.jsonl", recipe=Recipe(steps=300))
    """
    if method not in METHODS:
        raise ConfigError(f"there is no method {method!r} of distillation", ", ".join(METHODS))
    [given] = by_stage(options, CalibrationOptions)
    settings = CalibrationOptions(sources=several(calibration), **given)
    original, start = open_checkpoint(base, revision=revision), open_checkpoint(pruned)
    check_plain(start, "distillation")
    check_device(settings.device)
    if needs_loading(start.path):
        raise ConfigError(f"{start.path.name} skips experts of tokens", "distil it with moeprune skip --distill")
    check_output(start, output, overwrite=overwrite)
    check_levels(several(train))
    data = settings.load(original)
    job = _Job(
        original=original,
        start=start,
        text=Text.split(data),
        recipe=dataclasses.replace(recipe or Recipe(**METHODS[method]), seed=settings.seed),
        method=method,
        train=several(train),
        rank=rank,
        keep_zeros=keep_zeros,
        settings=settings,
        inputs={"base": original.fingerprint, "model": start.fingerprint, "calibration": data.fingerprint},
    )
    if dry_run:
        return DistillResult(output=Path(output), method=method, forecast=_forecast(job))
    return _run(job, Path(output), max_shard_size=max_shard_size, overwrite=overwrite)


@dataclass(frozen=True, kw_only=True)
class _Job:
    """All that was checked before work begins."""

    original: Checkpoint
    start: Checkpoint
    text: Text
    recipe: Recipe
    method: str
    train: tuple[str, ...]
    rank: Rank | None
    keep_zeros: bool
    settings: CalibrationOptions
    inputs: Mapping[str, str]

    @property
    def command(self) -> dict[str, Any]:
        """Canonical options."""
        from moeprune.healing.lora import Rank

        read = {name: value for name, value in self.settings.canonical().items() if name not in {"stage", "dtype"}}
        own: dict[str, Any] = {"stage": "heal", "method": self.method}
        if self.method == "lora":
            own |= dataclasses.asdict(self.rank or Rank())
        else:
            own |= {"train": list(self.train)}
        return own | dataclasses.asdict(self.recipe) | read | ({"keep_zeros": True} if self.keep_zeros else {})


def _forecast(job: _Job) -> TrainingForecast:
    """What training would take, from models without weights."""
    from moeprune.healing.lora import Rank, adapter_sizes
    from moeprune.streaming.skeleton import build_skeleton

    trusted = job.settings.trust_remote_code
    student, teacher = (build_skeleton(one, trust_remote_code=trusted) for one in (job.start, job.original))
    if job.method == "lora":
        sizes = adapter_sizes(student, job.rank or Rank())
    else:
        sizes = [value.numel() for value in trainable(student, job.train).values()]
    return training_forecast(student, teacher, sizes, job.text.train, job.recipe)


def check_device(device: str | None) -> None:
    """Refuse a place that a whole model is not trained on: accelerate chooses the GPU of each process.

    Raises:
        ConfigError: the message says how to choose.
    """
    if device not in {None, "cpu", "cuda"}:
        raise ConfigError(
            f"whole models are not trained on --device {device}",
            "cpu or cuda; CUDA_VISIBLE_DEVICES says which GPU, and accelerate launch takes several",
        )


def _run(job: _Job, output: Path, *, max_shard_size: int, overwrite: bool) -> DistillResult:
    parts = (sorted(job.command.items()), sorted(job.inputs.items()), job.settings.device)
    with changing(job.start, output, job=parts, overwrite=overwrite, nbytes=2 * job.start.nbytes) as changes:
        distilled = _train(job, changes)
        healed = distilled.best_step > 0
        if not healed:
            note("no step brought the model closer to its original on the held-out text: the output is a copy")
        record = envelope(SCHEMA, job.command, job.inputs) | {"method": job.method} | distilled.record()
        write_changed(
            job.start,
            changes,
            output,
            records={"healing": record},
            extra=carried(job.start),
            source=source_of(job.original, job.start),
            max_shard_size=max_shard_size,
            overwrite=overwrite,
        )
    return DistillResult(output=output, method=job.method, distilled=distilled, healed=healed)


def _train(job: _Job, changes: Changes) -> Distilled:
    """Train, and hand over the tensors that are better than the given ones, if there are any."""
    from moeprune.healing.trained import add_trained, stored_dtypes

    student, teacher = load_pair(job.start, job.original, job.settings, job.recipe)
    changes.begun = True
    given: dict[str, Any] = {
        "keep_zeros": job.keep_zeros,
        "folder": changes.folder,
        "device": job.settings.device,
    }
    if job.method == "lora":
        names, distilled = _adapt(job, student, teacher, given)
    else:
        parameters = trainable(student, job.train)
        names = [*parameters]
        dtypes = stored_dtypes(student, job.start, names)
        distilled = distil(student, teacher, job.text, job.recipe, parameters=parameters, stored=dtypes, **given)
    if distilled.best_step > 0:
        add_trained(student, names, changes, job.start, distilled.record())
    return distilled


def _adapt(
    job: _Job, student: PreTrainedModel, teacher: PreTrainedModel, given: dict[str, Any]
) -> tuple[list[str], Distilled]:
    """Train adapters and merge them; what counts is how the merged weights do as they will be stored."""
    from moeprune.healing.lora import Adapters, Rank
    from moeprune.healing.trained import stored_dtypes

    adapters = Adapters(student, job.rank or Rank(), job.recipe.seed)
    parameters = adapters.parameters
    distilled = distil(student, teacher, job.text, job.recipe, parameters=parameters, **{**given, "keep_zeros": False})
    adapters.merge()
    own = dict(student.named_parameters())
    for name, dtype in stored_dtypes(student, job.start, adapters.weights).items():
        own[name].data = own[name].data.to(dtype).float()
    after = held_out_divergence(student, teacher, job.text.held_out, job.recipe.batch_tokens)
    best = distilled.best_step if after < distilled.before else 0
    after = after if best else distilled.before
    return adapters.weights, dataclasses.replace(distilled, after=after, best_step=best)


def load_pair(
    start: Checkpoint, original: Checkpoint, settings: CalibrationOptions, recipe: Recipe
) -> tuple[PreTrainedModel, PreTrainedModel]:
    """The model to train, in float32, and its teacher, in float32 too unless training is in mixed precision."""
    from moeprune.collectors.resident import load_model

    common: dict[str, Any] = {"device": settings.device, "trust_remote_code": settings.trust_remote_code}
    student = load_model(start, dtype="float32", **common)
    teacher = load_model(original, dtype="float32" if recipe.precision == "no" else "auto", **common)
    return student, teacher


def forecast_gated(
    checkpoint: Checkpoint,
    settings: CalibrationOptions,
    data: CalibrationSet,
    recipe: Recipe,
    train: Sequence[str] | str,
) -> TrainingForecast:
    """What training a model with gates in the loop would take; rows of zero experts are too few to count."""
    from moeprune.streaming.skeleton import build_skeleton

    model = build_skeleton(checkpoint, trust_remote_code=settings.trust_remote_code)
    levels = [level for level in several(train) if level != "zero-rows"]
    sizes = [value.numel() for value in trainable(model, levels).values()] if levels else []
    return training_forecast(model, model, sizes, Text.split(data).train, recipe)


# --- with gates -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class GatedResult:
    """What :func:`distil_gated` made.

    Attributes:
        plan: the plan with settled thresholds, as it lies in the output.
        distilled: what the run came to.
    """

    plan: SkipPlan
    distilled: Distilled


def distil_gated(
    checkpoint: Checkpoint,
    plan: SkipPlan,
    output: PathLike,
    *,
    settings: CalibrationOptions,
    data: CalibrationSet,
    recipe: Recipe,
    train: Sequence[str] | str = "all",
    max_shard_size: int = DEFAULT_SHARD_SIZE,
    overwrite: bool = False,
) -> GatedResult:
    """Train a checkpoint with a plan's gates in the loop to predict what it predicts without them, and write it.

    Args:
        checkpoint: the model that the plan was made for.
        plan: where the thresholds start.
        output: new folder, a stock checkpoint with its plan; it appears whole or not at all.
        settings: how data is run.
        data: the text; every tenth sequence of a domain only judges.
        recipe: steps, learning rate and so on.
        train: of ``router``, ``experts``, ``attention``, ``norms`` and ``all``.
        max_shard_size: bytes of tensors per file.
        overwrite: replace a folder that is not empty.

    Raises:
        UnsupportedModelError: the weights are quantised.
        ConfigError: an option cannot work, or the text is too short.
    """
    levels, text = several(train), Text.split(data)
    check_plain(checkpoint, "distillation")
    own = {"distill": True, "train": list(levels), **dataclasses.asdict(recipe)}
    command = {**plan.command, **own}
    parts = (sorted(command.items()), sorted(plan.inputs.items()), settings.device)
    with changing(checkpoint, output, job=parts, overwrite=overwrite, nbytes=2 * checkpoint.nbytes) as changes:
        trained, distilled = _train_gated(checkpoint, plan, changes, settings, text, recipe, levels)
        done = dataclasses.replace(trained, command=command)
        extra = {"plan.safetensors": done.side_bytes()} if done.tensors else {}
        write_changed(
            checkpoint,
            changes,
            output,
            records={"plan": done.to_dict()},
            extra=extra,
            max_shard_size=max_shard_size,
            overwrite=overwrite,
        )
    return GatedResult(plan=done, distilled=distilled)


def distil_zero(
    checkpoint: Checkpoint,
    plan: SkipPlan,
    output: PathLike,
    *,
    settings: CalibrationOptions,
    data: CalibrationSet,
    recipe: Recipe,
    train: Sequence[str] | str = "all",
    max_shard_size: int = DEFAULT_SHARD_SIZE,
    overwrite: bool = False,
) -> GatedResult:
    """Add zero experts to every router, train, and write the checkpoint, whose own tensors stay those of a stock one.

    Args:
        checkpoint: the model.
        plan: says by its policy how to train, and what share of the slots to skip; it has no layers yet.
        output: new folder; the zero experts' rows lie beside its plan.
        settings, data, recipe: as for :func:`distil_gated`.
        train: ``zero-rows`` alone, or with them ``router``, ``experts``, ``attention``, ``norms``, ``all``.
        max_shard_size: bytes of tensors per file.
        overwrite: replace a folder that is not empty.

    Raises:
        UnsupportedModelError: the weights are quantised, or the routers take no zero experts.
        ConfigError: an option cannot work, or the text is too short.
    """
    levels, text = several(train), Text.split(data)
    check_plain(checkpoint, "distillation")
    command = {**plan.command, "distill": True, "train": list(levels), **dataclasses.asdict(recipe)}
    parts = (sorted(command.items()), sorted(plan.inputs.items()), settings.device)
    with changing(checkpoint, output, job=parts, overwrite=overwrite, nbytes=2 * checkpoint.nbytes) as changes:
        trained, distilled = _train_zero(checkpoint, plan, changes, settings, text, recipe, levels)
        done = dataclasses.replace(trained, command=command, policy=ZERO_EXPERTS)
        write_changed(
            checkpoint,
            changes,
            output,
            records={"plan": done.to_dict()},
            extra={"plan.safetensors": done.side_bytes()},
            max_shard_size=max_shard_size,
            overwrite=overwrite,
        )
    return GatedResult(plan=done, distilled=distilled)


def _train_zero(
    checkpoint: Checkpoint,
    plan: SkipPlan,
    changes: Changes,
    settings: CalibrationOptions,
    text: Text,
    recipe: Recipe,
    levels: Sequence[str],
) -> tuple[SkipPlan, Distilled]:
    from moeprune.experts import expert_layers
    from moeprune.healing.trained import add_trained, stored_dtypes
    from moeprune.healing.zeda import ALPHA, Balance, ZeroTraining, layers_at, record_of, written_text, zero_rows

    student, teacher = load_pair(checkpoint, checkpoint, settings, recipe)
    changes.begun = True
    tensors = zero_rows(expert_layers(student), recipe.seed)
    start = dataclasses.replace(plan, policy=ZERO_EXPERTS, layers=layers_at(student, plan.target), tensors=tensors)
    rest = [level for level in levels if level != "zero-rows"]
    own = trainable(student, rest) if rest else {}
    dtypes = stored_dtypes(student, checkpoint, own)
    faithful = plan.policy == ZEDA
    gates = ZeroTraining(
        student,
        start,
        balance=Balance(alpha=ALPHA if faithful else 0.0, rate=plan.target),
        seed=recipe.seed,
        prompts=text.train,
    )
    if not faithful:
        gates.settle(student, text.train, recipe.batch_tokens)
    stages = {"text": recipe}
    if faithful:
        late = recipe.steps // 4
        stages = {
            "teacher's text": dataclasses.replace(recipe, steps=recipe.steps - late, loss="text"),
            "own text": dataclasses.replace(recipe, steps=late, lr=recipe.lr / 4, loss="reverse", schedule="constant"),
        }
    runs: dict[str, Distilled] = {}
    for name, stage in stages.items():
        gates.writes(recipe.step_tokens if name == "own text" else 0)
        folder = changes.folder / f"stage{len(runs) + 1}"
        folder.mkdir(exist_ok=True)
        runs[name] = distil(
            student,
            teacher,
            written_text(teacher, text, stage) if stage.loss == "text" else text,
            stage,
            parameters={**gates.rows(), **own},
            objective=gates,
            stored={**dict.fromkeys(gates.rows(), _float32()), **dtypes},
            folder=folder,
            device=settings.device,
        )
    drifted = gates.measure(student, text.train, recipe.batch_tokens)
    layers = gates.settle(student, text.train, recipe.batch_tokens)
    with gates.running(student):
        after = held_out_divergence(student, teacher, text.held_out, recipe.batch_tokens)
    record = record_of(runs, after, drifted)
    if own:
        add_trained(student, own, changes, checkpoint, record)
    rate = sum(layer.rate for layer in layers.values()) / len(layers)
    done = dataclasses.replace(start, layers=layers, rate=rate, tensors=gates.tensors(), training=record)
    return done, [*runs.values()][-1]


def _float32() -> torch.dtype:
    import torch

    return torch.float32


def check_distillation(
    checkpoint: Checkpoint, policy: Policy, train: Sequence[str] | str, *, bake: bool, file_only: bool, curve: bool
) -> None:
    """Refuse to distil what cannot be, before anything runs.

    Raises:
        UnsupportedModelError: the weights are quantised.
        ConfigError: the message says what.
    """
    check_plain(checkpoint, "distillation")
    check_levels(several(train), more=("zero-rows",) if policy.name in TRAINED else ())
    if bake:
        raise ConfigError("--bake leaves no gates to train with", "leave --bake or --distill out")
    if file_only:
        raise ConfigError("--distill writes other weights, and the output is a plan file", "give a folder as -o")
    if curve:
        raise ConfigError("--curve measures plans of one model, and --distill makes another for each", "leave one out")
    if policy.name == "random":
        raise ConfigError("drawn slots are a control, not something to train with", "take another --policy")


def _train_gated(
    checkpoint: Checkpoint,
    plan: SkipPlan,
    changes: Changes,
    settings: CalibrationOptions,
    text: Text,
    recipe: Recipe,
    levels: Sequence[str],
) -> tuple[SkipPlan, Distilled]:
    """Train, settle the thresholds, and hand over what is better than the given weights with the given thresholds."""
    from moeprune.healing.skip_distillation import GatedTraining
    from moeprune.healing.trained import add_trained, stored_dtypes

    student, teacher = load_pair(checkpoint, checkpoint, settings, recipe)
    changes.begun = True
    parameters = trainable(student, levels)
    gates = GatedTraining(student, plan)
    distilled = distil(
        student,
        teacher,
        text,
        recipe,
        parameters=parameters,
        objective=gates,
        stored=stored_dtypes(student, checkpoint, parameters),
        folder=changes.folder,
        device=settings.device,
    )
    if not distilled.best_step:
        return dataclasses.replace(plan, training=distilled.record()), distilled
    layers = {**plan.layers, **gates.settle(student, text.train, recipe.batch_tokens)}
    with gates.running(student):
        after = held_out_divergence(student, teacher, text.held_out, recipe.batch_tokens)
    if after >= distilled.before:
        note("training did not bring the gated model closer to the original on the held-out text: the weights stay")
        distilled = dataclasses.replace(distilled, best_step=0, after=distilled.before)
        return dataclasses.replace(plan, training=distilled.record()), distilled
    distilled = dataclasses.replace(distilled, after=after)
    add_trained(student, parameters, changes, checkpoint, distilled.record())
    rate = sum(layer.rate for layer in layers.values()) / len(layers)  # of every layer as many slots
    return dataclasses.replace(plan, layers=layers, rate=rate, training=distilled.record()), distilled
