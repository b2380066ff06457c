"""Multiplex a checkpoint: layer by layer, each trained to undo what the layers before it changed."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xxhash

from moeprune._files import PathLike, check_free_space, progress, safetensors_header, write_atomic
from moeprune._options import CalibrationOptions, by_stage, several
from moeprune.architectures import ExpertName, RouterName, StackedName
from moeprune.calibration import CalibrationSet
from moeprune.checkpoint import Checkpoint, open_checkpoint
from moeprune.collecting import arrange, open_stream
from moeprune.errors import ConfigError
from moeprune.healing.multiplexed import LR, STEPS, Recipe, Seen, groups_of, side_of, start_of, train
from moeprune.pipeline import BUNDLED, model_name
from moeprune.plans_multiplex import SIDE_FILE, MultiplexLayer, MultiplexPlan
from moeprune.rewrite.changed import Changes, changing, check_plain, stored_tensors, write_changed
from moeprune.rewrite.drop import DEFAULT_SHARD_SIZE, check_output, config_edits
from moeprune.rewrite.verify_multiplex import verify_multiplex
from moeprune.runtime.multiplexed import SIDE, check_plain_experts

if TYPE_CHECKING:
    import torch
    from torch import nn

    from moeprune.experts import Experts
    from moeprune.streaming.forecast import Forecast
    from moeprune.streaming.states import States
    from moeprune.streaming.stream import Inputs, LayerStream

_STOCK = "stock engines cannot run it: load it with moeprune.load"


@dataclass(frozen=True, kw_only=True)
class MultiplexResult:
    """What :func:`multiplex` made; a dry run makes no plan.

    Attributes:
        output: the folder.
        expert_bytes: of the routed experts before, and after with all that the side file holds.
        plan: what was fused; forecast: of a dry run, what it would take.
    """

    output: Path
    expert_bytes: tuple[int, int]
    plan: MultiplexPlan | None = None
    forecast: Forecast | None = None


def multiplex(
    model: PathLike | None = None,
    output: PathLike | None = None,
    *,
    keep: int,
    rank: int = 8,
    steps: int = STEPS,
    lr: float = LR,
    calibration: Sequence[str] | str = (),
    max_shard_size: int = DEFAULT_SHARD_SIZE,
    revision: str | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
    **options: Any,
) -> MultiplexResult:
    """Fuse experts that fire together, with small residuals that tell them apart, and train them layer by layer.

    The original router stays, and what it says of the members of a group steers their fused expert. Each layer is
    trained to give what the original's layer gives, from what the layers before it, already fused, hand on. Only
    :func:`moeprune.load` runs the result.

    Args:
        model: folder or Hub id; left out, the bundled model with its calibration text.
        output: new folder, which appears whole or not at all.
        keep: fused experts of each layer.
        rank: of the residuals of every original expert.
        steps: of training in each layer.
        lr: learning rate at its start.
        calibration: ``[DOMAIN=]SOURCE`` each.
        max_shard_size: bytes of tensors per file.
        revision: of a Hub model.
        overwrite: replace a folder that is not empty.
        dry_run: check everything, forecast, and write nothing.
        options: ``num_samples``, ``max_length``, ``batch_tokens``, ``seed``, ``device``, ``dtype``, ``memory`` and the
            other fields of :class:`moeprune._options.CalibrationOptions` that say how data is read and run.

    Raises:
        ConfigError: an option cannot work, or one layer does not fit in memory.
        UnsupportedModelError: its experts are quantised or no plain projections, or layers cannot run one by one.

    Example:
        >>> moeprune.multiplex("base", "fused", keep=8, rank=8, calibration="data.jsonl")
        >>> model = moeprune.load("fused")
    """
    sources = several(calibration)
    if model is None:
        model, sources = BUNDLED / "model", sources or (str(BUNDLED / "calibration.jsonl"),)
    job = _checked(model, output, Wanted(keep=keep, rank=rank, steps=steps, lr=lr), sources, revision, options)
    check_output(job.checkpoint, job.output, overwrite=overwrite)
    sizes = _expert_bytes(job.checkpoint, job.wanted)
    if dry_run:
        check_free_space(job.output, job.checkpoint.nbytes)
        return MultiplexResult(output=job.output, expert_bytes=sizes, forecast=_arranged(job)[1])
    plan = _run(job, sizes, max_shard_size=max_shard_size, overwrite=overwrite)
    return MultiplexResult(output=job.output, expert_bytes=sizes, plan=plan)


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What was asked for, see :func:`multiplex`."""

    keep: int
    rank: int
    steps: int
    lr: float


@dataclass(frozen=True, kw_only=True)
class _Job:
    """All that was checked before work begins."""

    checkpoint: Checkpoint
    output: Path
    wanted: Wanted
    settings: CalibrationOptions
    data: CalibrationSet

    @property
    def recipe(self) -> Recipe:
        """How layers are trained."""
        return Recipe(steps=self.wanted.steps, lr=self.wanted.lr, seed=self.settings.seed)

    @property
    def command(self) -> dict[str, Any]:
        """Canonical options."""
        return self.settings.canonical() | {"stage": "multiplex"} | dataclasses.asdict(self.wanted)

    @property
    def inputs(self) -> dict[str, str]:
        """Fingerprints."""
        return {"model": self.checkpoint.fingerprint, "calibration": self.data.fingerprint}


def _checked(
    model: PathLike,
    output: PathLike | None,
    wanted: Wanted,
    sources: tuple[str, ...],
    revision: str | None,
    options: Mapping[str, Any],
) -> _Job:
    [given] = by_stage(options, CalibrationOptions)
    settings = CalibrationOptions(sources=sources, **given)
    if not sources:
        raise ConfigError("layers are trained on calibration data", "pass --calibration data.jsonl")
    idle = [name for name in ("layers", "statistics") if getattr(settings, name)]
    if idle or settings.stream is False:
        raise ConfigError(f"multiplexing runs all layers, one at a time: {(idle or ['stream'])[0]!r} says otherwise")
    checkpoint = open_checkpoint(model, revision=revision)
    checkpoint.check_uniform()
    check_plain(checkpoint, "multiplexing")
    if not 1 <= wanted.keep < checkpoint.num_experts:
        raise ConfigError(f"--keep {wanted.keep} of {checkpoint.num_experts} experts leaves nothing to fuse")
    if wanted.rank < 1 or wanted.steps < 0 or not wanted.lr > 0:
        raise ConfigError("--rank is at least 1, --steps at least 0 and --lr above 0")
    name = f"{model_name(model)}-multiplexed{wanted.keep}of{checkpoint.num_experts}"
    return _Job(
        checkpoint=checkpoint,
        output=Path(output) if output else Path(name),
        wanted=wanted,
        settings=settings,
        data=settings.load(checkpoint),
    )


def _expert_bytes(checkpoint: Checkpoint, wanted: Wanted) -> tuple[int, int]:
    """Bytes of the routed experts of the decoder layers before, and after with the side file's."""
    values = checkpoint.spec.values(checkpoint.config)
    hidden, experts = int(values["hidden_size"]), checkpoint.num_experts
    before = sum(
        checkpoint.tensors[name].nbytes
        for name, role in checkpoint.roles.items()
        if isinstance(role, ExpertName | StackedName) and role.layer in checkpoint.moe_layers
    )
    numbers = before // (experts * len(checkpoint.moe_layers))  # bytes of an expert
    size = next(
        entry.nbytes // entry.numel
        for name, entry in checkpoint.tensors.items()
        if isinstance(checkpoint.roles[name], ExpertName | StackedName)
    )
    inner = numbers // size // (3 * hidden)
    side = experts * size * (wanted.rank * (2 * hidden + 3 * inner) + hidden)
    return before, len(checkpoint.moe_layers) * (wanted.keep * numbers + side)


# --- the work ---------------------------------------------------------------------------------------------------------


def _run(job: _Job, sizes: tuple[int, int], *, max_shard_size: int, overwrite: bool) -> MultiplexPlan:
    parts = (sorted(job.command.items()), sorted(job.inputs.items()), job.settings.device, job.settings.dtype)
    checkpoint = job.checkpoint
    with changing(checkpoint, job.output, job=parts, overwrite=overwrite, nbytes=2 * checkpoint.nbytes) as changes:
        _Pass(job).run(changes)
        side = _side_file(changes, checkpoint.moe_layers)
        plan = _plan(job, changes, sizes, side)
        write_changed(
            checkpoint,
            changes,
            job.output,
            records={"plan": plan.to_dict()},
            keep={layer: tuple(range(job.wanted.keep)) for layer in checkpoint.moe_layers},
            config_edits=plan.config_edits,
            extra={SIDE_FILE.name: side},
            max_shard_size=max_shard_size,
            overwrite=overwrite,
        )
    verify_multiplex(checkpoint, job.output)
    return plan


def _plan(job: _Job, changes: Changes, sizes: tuple[int, int], side: bytes) -> MultiplexPlan:
    checkpoint = job.checkpoint
    layers = {}
    for index in checkpoint.moe_layers:
        said = changes.record(index)
        groups = tuple(tuple(group) for group in said["groups"])
        layers[index] = MultiplexLayer(groups=groups, loss=tuple(round(loss, 6) for loss in said["loss"]))
    notes = [_STOCK]
    if checkpoint.mtp_layers:
        notes.append("MTP layers are left out")
    return MultiplexPlan(
        layers=layers,
        rank=job.wanted.rank,
        expert_bytes=sizes,
        side=xxhash.xxh3_128_hexdigest(side),
        command=job.command,
        inputs=job.inputs,
        config_edits=config_edits(checkpoint, job.wanted.keep, drop_mtp=bool(checkpoint.mtp_layers)),
        notes=notes,
    )


def _side_path(changes: Changes, layer: int) -> Path:
    return changes.folder / f"side-{layer}.safetensors"


def _save_side(changes: Changes, layer: int, side: Mapping[str, torch.Tensor], dtype: torch.dtype) -> None:
    from safetensors.torch import save

    values = {name: value.to("cpu", dtype).contiguous() for name, value in side.items()}
    write_atomic(_side_path(changes, layer), save(values))


def _side_file(changes: Changes, layers: Sequence[int]) -> bytes:
    """The side files of all layers as one, with equal bytes for equal content."""
    from moeprune.headers import read_header

    described, parts = [], []
    for layer in layers:
        file = _side_path(changes, layer)
        entries = {entry.name: entry for entry in read_header(file)[0]}
        data = file.read_bytes()
        for name in SIDE:
            entry = entries[name]
            described.append((f"layers.{layer}.{name}", entry.dtype, entry.shape, entry.nbytes))
            parts.append(data[entry.begin : entry.end])
    return b"".join([safetensors_header(described, {"format": "pt"}), *parts])


def _arranged(job: _Job) -> tuple[LayerStream, Forecast]:
    """The stream, and what a pass takes.

    Raises:
        ConfigError: it does not fit.
    """
    from moeprune.experts import expert_layers

    stream = open_stream(job.checkpoint, job.settings)
    for layer in expert_layers(stream.model):
        check_plain_experts(layer.experts)
    expected = arrange(stream, job.settings, job.data, job.data.batches(job.settings.batch_tokens), kept=True)
    if not stream.whole_layers:
        raise ConfigError(f"one layer does not fit in memory, only {stream.chunk} of its experts", "raise --memory")
    return stream, expected


class _Pass:
    """The batches on their way through the layers of the original and of what becomes of it, side by side."""

    def __init__(self, job: _Job) -> None:
        from moeprune.experts import expert_layers
        from moeprune.streaming.states import States
        from moeprune.streaming.stream import padded

        self._job = job
        self._stream, _ = _arranged(job)
        batches = job.data.batches(job.settings.batch_tokens)
        self._inputs: list[Inputs] = [padded(batch.sequences) for batch in batches]
        self._states: States = States(2 * len(batches))
        self._experts = {layer.index: layer.experts for layer in expert_layers(self._stream.model)}
        self._dtype = _stored_dtype(job.checkpoint)

    def run(self, changes: Changes) -> None:
        """Do the layers that are not done, and keep with each what the next ones are given."""
        import torch

        from moeprune.streaming.states import Saved

        stream, last = self._stream, self._job.checkpoint.moe_layers[-1]
        stream.last = last
        start = next((layer for layer in range(last + 1) if not changes.finished(layer)), last + 1)
        with torch.no_grad():
            if not start:
                stream.embed(self._inputs * 2, self._states)
            elif start <= last:
                self._states.restore(changes.folder, Saved(**changes.record(start - 1)["states"]))
            for index in progress(range(start, last + 1), "multiplexing", unit="layer"):
                with stream.layer(index):
                    said = self._multiplexed(index, changes) if index in self._experts else self._plain(index)
                    tensors = said.pop("tensors")
                    self._states.turn()
                    said["states"] = dataclasses.asdict(self._states.save(changes.folder))
                    changes.add(index, tensors, said)

    def _plain(self, index: int) -> dict[str, Any]:
        for place, inputs in enumerate(self._inputs * 2):
            self._states.put(place, self._stream.run(index, self._states.get(place), inputs))
        return {"tensors": {}}

    def _multiplexed(self, index: int, changes: Changes) -> dict[str, Any]:
        """Fuse and train one layer; gives what is stored and said of it."""
        import torch

        job, experts = self._job, self._experts[index]
        seen = self._seen(index)
        groups = groups_of(seen.index, job.checkpoint.num_experts, job.wanted.keep)
        with torch.enable_grad():
            module = start_of(experts, groups, job.wanted.rank)
            loss = train(module, seen, job.recipe, self._dtype)
        _save_side(changes, index, side_of(module), self._dtype)
        self._advance(index, module)
        prefix = self._stream.weights.experts[index]
        fused = {f"{prefix}.{name}": getattr(module, name) for name in ("gate_up_proj", "down_proj")}
        tensors = stored_tensors(self._stream.weights, index, fused) | _routers(job.checkpoint, index)
        return {"tensors": tensors, "groups": groups, "loss": loss}

    def _seen(self, index: int) -> Seen:
        """Run both through the layer: what the student's experts are given, and what would undo all differences."""
        import torch

        parts: list[Seen] = []
        count = len(self._inputs)
        for number, inputs in enumerate(self._inputs):
            teacher = self._stream.run(index, self._states.get(number), inputs)
            recorder = _Recorder()
            with recorder.watching(self._stream, self._experts[index]):
                student = self._stream.run(index, self._states.get(count + number), inputs)
            self._states.put(number, teacher)
            valid_T = inputs["attention_mask"].flatten().bool().to(student[0].device)
            rest_TH = student[0].flatten(0, 1).float() - recorder.output.float()
            parts.append(
                Seen(
                    hidden=recorder.hidden[valid_T].float(),
                    index=recorder.index[valid_T],
                    gates=recorder.gates[valid_T].float(),
                    target=(teacher[0].flatten(0, 1).float() - rest_TH)[valid_T],
                )
            )
        fields = [field.name for field in dataclasses.fields(Seen)]
        return Seen(**{name: torch.cat([getattr(part, name) for part in parts]) for name in fields})

    def _advance(self, index: int, module: nn.Module) -> None:
        """Run the student through the layer with its new experts."""
        from moeprune.experts import wrapped_experts

        def instead(_: Experts, __: Any, hidden: Any, chosen: Any, gates: Any) -> Any:
            return module(hidden.float(), chosen, gates).to(hidden.dtype)

        count = len(self._inputs)
        with wrapped_experts(self._stream.model, {self._experts[index]: instead}):
            for number, inputs in enumerate(self._inputs):
                place = count + number
                self._states.put(place, self._stream.run(index, self._states.get(place), inputs))


class _Recorder:
    """Keeps what the experts of a layer are given and give in one batch."""

    hidden: torch.Tensor
    index: torch.Tensor
    gates: torch.Tensor
    output: torch.Tensor

    def watching(self, stream: LayerStream, experts: nn.Module) -> Any:
        """Keep what runs inside the block."""
        from moeprune.experts import wrapped_experts

        return wrapped_experts(stream.model, {experts: self._run})

    def _run(
        self, original: Experts, experts: nn.Module, hidden: torch.Tensor, index: torch.Tensor, gates: torch.Tensor
    ) -> torch.Tensor:
        self.output = original(experts, hidden, index, gates)
        self.hidden, self.index, self.gates = hidden.clone(), index.clone(), gates.clone()
        return self.output


def _stored_dtype(checkpoint: Checkpoint) -> torch.dtype:
    from moeprune.streaming.weights import torch_dtypes

    roles = checkpoint.roles
    name = next(name for name in checkpoint.tensors if isinstance(roles[name], ExpertName | StackedName))
    return torch_dtypes()[checkpoint.tensors[name].dtype]


def _routers(checkpoint: Checkpoint, layer: int) -> dict[str, torch.Tensor]:
    """The router of a layer with all of its rows, by name on disk."""
    from safetensors import safe_open

    found = {}
    for name, role in checkpoint.roles.items():
        if isinstance(role, RouterName) and role.layer == layer:
            with safe_open(checkpoint.tensors[name].file, framework="pt") as file:
                found[name] = file.get_tensor(name)
    return found
