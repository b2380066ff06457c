"""Sparsify a checkpoint: layer by layer, each on what the sparse layers before it give, or from a statistics file."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moeprune._files import PathLike, check_free_space, progress
from moeprune._options import CalibrationOptions, by_stage, several
from moeprune.calibration import Batch, CalibrationSet
from moeprune.checkpoint import Checkpoint, open_checkpoint
from moeprune.collecting import arrange, open_stream
from moeprune.errors import ConfigError, StaleArtifactError
from moeprune.pipeline import BUNDLED, model_name
from moeprune.plans_sparsify import SparseLayer, SparsifyPlan, Sparsity
from moeprune.rewrite.changed import Changes, changing, check_plain, stored_tensors, write_changed
from moeprune.rewrite.drop import DEFAULT_SHARD_SIZE, check_output, config_edits
from moeprune.rewrite.sparsify import Squares, Widths, check_sparsity, shared_of, sparsify_layer
from moeprune.statistics import RouterStatistics

if TYPE_CHECKING:
    import torch

    from moeprune.collectors.probe import Observation
    from moeprune.rewrite.verify import Verification
    from moeprune.streaming.forecast import Forecast
    from moeprune.streaming.states import States
    from moeprune.streaming.stream import Inputs, LayerStream

NEEDS = ("gated_in_sq_sum", "gated_mid_sq_sum")
_DENSE = "the file does not shrink: weights that went are stored as zeros"


@dataclass(frozen=True, kw_only=True)
class SparsifyResult:
    """What :func:`sparsify` made; a dry run makes no plan and nothing else.

    Attributes:
        output: the folder.
        sparsity: what was asked for.
        before, after: bytes of all tensors of the source and of the output; the latter is 0 in a dry run.
        plan: what went.
        verification: what was proved.
        forecast: of a dry run, what it would take.
    """

    output: Path
    sparsity: Sparsity
    before: int
    after: int = 0
    plan: SparsifyPlan | None = None
    verification: Verification | None = None
    forecast: Forecast | None = None


def sparsify(
    model: PathLike | None = None,
    output: PathLike | None = None,
    *,
    sparsity: float | str | None = None,
    pattern: str | None = None,
    neurons: float | str | None = None,
    calibration: Sequence[str] | str = (),
    statistics: PathLike | RouterStatistics | None = None,
    weights: Mapping[str, float] | None = None,
    max_shard_size: int = DEFAULT_SHARD_SIZE,
    revision: str | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
    **options: Any,
) -> SparsifyResult:
    """Take weights or whole neurons out of the routed experts, by MoE-Pruner's score (arXiv:2410.12013).

    With calibration data the layers run one at a time, each on what the layers before it give that are sparse already.
    A statistics file decides all layers at once, and no model runs. Routers, shared experts and dense layers stay as
    they are; only where the config ties a shared expert's width to that of the others it loses neurons with them.

    Args:
        model: folder or Hub id; left out, the bundled model with its calibration text.
        output: new folder, which appears whole or not at all.
        sparsity: fraction of the weights of every output row to remove; they are stored as zeros; or
        pattern: ``2:4`` keeps the best 2 of every 4 consecutive weights of a row; the others are stored as zeros; or
        neurons: fraction of the inner neurons of every expert to remove: the tensors shrink, and so does the expert's
            width in the config. MTP layers are left out.
        calibration: ``[DOMAIN=]SOURCE`` each; or
        statistics: a statistics file of this model with ``gated_in_sq_sum`` and ``gated_mid_sq_sum``; and
        weights: weight by calibration domain of that file.
        max_shard_size: bytes of tensors per file.
        revision: of a Hub model.
        overwrite: replace a folder that is not empty.
        dry_run: check everything, forecast, and write nothing.
        options: ``num_samples``, ``max_length``, ``batch_tokens``, ``seed``, ``device``, ``dtype``, ``memory`` and the
            other fields of :class:`moeprune._options.CalibrationOptions` that say how data is read and run.

    Raises:
        ConfigError: an option cannot work, or one layer does not fit in memory.
        UnsupportedModelError: its weights are quantised, or its layers cannot be run one at a time.
        StaleArtifactError: the statistics were made for another model.
        StrategyError: the statistics lack what the score needs.

    Example:
        >>> result = moeprune.sparsify("base", "sparse", pattern="2:4", calibration="data.jsonl")
        >>> result.plan.measured
        0.5
    """
    wanted = Sparsity.parse(sparsity=sparsity, pattern=pattern, neurons=neurons)
    sources = several(calibration)
    if model is None:
        model = BUNDLED / "model"
        sources = sources or (() if statistics is not None else (str(BUNDLED / "calibration.jsonl"),))
    job = _checked(model, output, wanted, sources, statistics, weights, revision, options)
    check_output(job.checkpoint, job.output, overwrite=overwrite)
    result = SparsifyResult(output=job.output, sparsity=wanted, before=job.checkpoint.nbytes)
    if dry_run:
        check_free_space(job.output, job.checkpoint.nbytes)
        return dataclasses.replace(result, forecast=_forecast(job))
    return _run(job, result, max_shard_size=max_shard_size, overwrite=overwrite)


@dataclass(frozen=True, kw_only=True)
class _Job:
    """All that was checked before work begins; ``data`` or ``statistics`` says what the experts see."""

    checkpoint: Checkpoint
    output: Path
    sparsity: Sparsity
    widths: Widths
    settings: CalibrationOptions
    data: CalibrationSet | None
    statistics: RouterStatistics | None
    weights: Mapping[str, float] | None

    @property
    def command(self) -> dict[str, Any]:
        """Canonical options."""
        ours = {"stage": "sparsify"} | self.sparsity.canonical()
        if self.statistics is not None:
            return ours | ({"weights": dict(self.weights)} if self.weights else {})
        own = self.settings.canonical() if self.data is not None else {}
        return own | ours

    @property
    def inputs(self) -> dict[str, str]:
        """Fingerprints."""
        model = {"model": self.checkpoint.fingerprint}
        if self.statistics is not None:
            return dict(self.statistics.inputs) | model
        return model | ({"calibration": self.data.fingerprint} if self.data is not None else {})


def _checked(
    model: PathLike,
    output: PathLike | None,
    wanted: Sparsity,
    sources: tuple[str, ...],
    statistics: PathLike | RouterStatistics | None,
    weights: Mapping[str, float] | None,
    revision: str | None,
    options: Mapping[str, Any],
) -> _Job:
    [given] = by_stage(options, CalibrationOptions)
    settings = CalibrationOptions(sources=sources, **given)
    _check_options(settings, wanted, by_file=statistics is not None, weighted=bool(weights))
    checkpoint = open_checkpoint(model, revision=revision)
    checkpoint.check_uniform()
    check_plain(checkpoint, "sparsifying")
    widths = check_sparsity(checkpoint, wanted)
    found = RouterStatistics.load(statistics) if isinstance(statistics, str | os.PathLike) else statistics
    if found is not None:
        _check_statistics(checkpoint, found, wanted, widths, weights)
    return _Job(
        checkpoint=checkpoint,
        output=Path(output) if output else Path(f"{model_name(model)}-{_label(wanted, widths)}"),
        sparsity=wanted,
        widths=widths,
        settings=settings,
        data=settings.load(checkpoint) if sources and not wanted.nothing else None,
        statistics=found,
        weights=weights,
    )


def _label(wanted: Sparsity, widths: Widths) -> str:
    """The end of the default output's name."""
    if wanted.kind == "neurons":
        return f"{wanted.width(widths.inner)}of{widths.inner}neurons"
    return f"{wanted.n}of{wanted.m}" if wanted.m else f"sparse{float(wanted.fraction):g}"


def _check_options(settings: CalibrationOptions, wanted: Sparsity, *, by_file: bool, weighted: bool) -> None:
    """Refuse options that exclude one another or would do nothing."""
    if by_file and settings.sources:
        raise ConfigError("--statistics-file and --calibration both say what the experts see", "leave one of them out")
    if not by_file and not settings.sources and not wanted.nothing:
        raise ConfigError(
            "the scores need calibration data", "pass --calibration data.jsonl, or --statistics-file FILE"
        )
    if weighted and not by_file:
        raise ConfigError("--weights weighs the domains of a statistics file", "pass it with --statistics-file FILE")
    idle = [name for name in ("layers", "statistics") if getattr(settings, name)]
    if idle or settings.stream is False:
        raise ConfigError(f"sparsifying runs all layers, one at a time: {(idle or ['stream'])[0]!r} says otherwise")


def _check_statistics(
    checkpoint: Checkpoint,
    statistics: RouterStatistics,
    wanted: Sparsity,
    widths: Widths,
    weights: Mapping[str, float] | None,
) -> None:
    if statistics.inputs.get("model") != checkpoint.fingerprint:
        raise StaleArtifactError(
            f"the statistics were made for another model than {checkpoint.path.name}", "collect them from this one"
        )
    if wanted.kind == "neurons" and widths.shared:
        raise ConfigError(
            "the shared expert has to shrink with the others, and statistics do not tell of it",
            "pass --calibration data.jsonl in the place of --statistics-file",
        )
    missing = sorted(set(checkpoint.moe_layers) - statistics.layers.keys())
    if missing:
        raise ConfigError(f"the statistics have no layer {missing[0]}", "collect all layers")
    for layer in checkpoint.moe_layers:
        for name in NEEDS:
            getattr(statistics.layer(layer, weights), name)


# --- the work ---------------------------------------------------------------------------------------------------------


def _run(job: _Job, result: SparsifyResult, *, max_shard_size: int, overwrite: bool) -> SparsifyResult:
    from moeprune.rewrite.verify_sparse import verify_sparse

    checkpoint = job.checkpoint
    parts = (sorted(job.command.items()), sorted(job.inputs.items()), job.settings.device, job.settings.dtype)
    with changing(checkpoint, job.output, job=parts, overwrite=overwrite, nbytes=_room(job)) as changes:
        if job.sparsity.nothing:
            pass  # every tensor is copied by its bytes
        elif job.statistics is not None:
            _at_once(job, job.statistics, changes)
        elif job.data is not None:
            _in_order(job, job.data, changes)
        plan = _plan(job, changes)
        cut = plan.width and checkpoint.mtp_layers
        write_changed(
            checkpoint,
            changes,
            job.output,
            records={"plan": plan.to_dict()},
            keep={layer: tuple(range(checkpoint.num_experts)) for layer in checkpoint.moe_layers} if cut else None,
            config_edits=plan.config_edits,
            max_shard_size=max_shard_size,
            overwrite=overwrite,
        )
    proved = verify_sparse(checkpoint, job.output)
    return dataclasses.replace(result, after=proved.nbytes, plan=plan, verification=proved)


def _room(job: _Job) -> int:
    """Bytes of what is computed: no more than all experts."""
    return 0 if job.sparsity.nothing else job.checkpoint.nbytes


def _plan(job: _Job, changes: Changes) -> SparsifyPlan:
    layers, spec, checkpoint = {}, job.checkpoint.spec, job.checkpoint
    for layer in changes.layers:
        said = changes.record(layer)
        if "weights" in said:
            layers[layer] = SparseLayer(weights=said["weights"], gone=said["gone"])
    edits: dict[str, Any] = {}
    notes = [] if job.sparsity.kind == "neurons" or job.sparsity.nothing else [_DENSE]
    width = 0
    if job.sparsity.kind == "neurons" and not job.sparsity.nothing:
        width = job.sparsity.width(job.widths.inner)
        edits = {spec.path(spec.width_key): width}
        if checkpoint.mtp_layers:
            unchanged = config_edits(checkpoint, checkpoint.num_experts, drop_mtp=True)
            values = spec.values(checkpoint.config)
            edits |= {key: value for key, value in unchanged.items() if values.get(key.rpartition(".")[2]) != value}
            notes.append("MTP layers are left out: engines would build them as wide as the others")
        if job.widths.shared:
            notes.append("the shared expert lost as large a part of its neurons: the config ties its width to theirs")
    return SparsifyPlan(
        sparsity=job.sparsity,
        layers=layers,
        width=width,
        command=job.command,
        inputs=job.inputs,
        config_edits=edits,
        notes=notes,
    )


def _at_once(job: _Job, statistics: RouterStatistics, changes: Changes) -> None:
    """All layers from sums that were collected before; one layer's experts are in memory at a time."""
    import torch

    from moeprune.experts import expert_layers

    stream = open_stream(job.checkpoint, job.settings)
    _check_dtype(stream)
    experts = {layer.index: layer.experts for layer in expert_layers(stream.model)}
    left = [layer for layer in job.checkpoint.moe_layers if not changes.finished(layer)]
    for index in progress(left, "sparsifying", unit="layer"):
        seen = statistics.layer(index, job.weights)
        squares = Squares(
            inputs=torch.from_numpy(seen.gated_in_sq_sum).to(stream.device),
            inner=torch.from_numpy(seen.gated_mid_sq_sum).to(stream.device),
        )
        with torch.inference_mode(), stream.weights.loaded(index, experts=True):
            values, said = sparsify_layer(stream.weights, experts[index], index, squares, job.sparsity, job.widths)
            changes.add(index, stored_tensors(stream.weights, index, values), dataclasses.asdict(said))


def _in_order(job: _Job, data: CalibrationSet, changes: Changes) -> None:
    """One layer after another, each on what those before it give that are sparse already."""
    import torch

    from moeprune.collectors.probe import observe
    from moeprune.streaming.states import SpilledStates, States

    stream, expected, batches = _arranged(job, data)
    states = SpilledStates(len(batches), changes.folder) if expected.spill else States(len(batches))
    domains = tuple(sorted(set(data.domains)))
    with (
        observe(
            stream.model, like=job.checkpoint, domains=domains, layers=job.checkpoint.moe_layers, statistics=NEEDS
        ) as observation,
        torch.inference_mode(),
    ):
        _Pass(job, stream, batches, states, observation).run(changes)


class _Pass:
    """The batches on their way through the layers."""

    def __init__(
        self, job: _Job, stream: LayerStream, batches: Sequence[Batch], states: States, observation: Observation
    ) -> None:
        from moeprune.experts import expert_layers
        from moeprune.streaming.stream import padded

        self._job, self._stream, self._states, self._observation = job, stream, states, observation
        self._batches = batches
        self._inputs: list[Inputs] = [padded(batch.sequences) for batch in batches]
        self._experts = {layer.index: layer.experts for layer in expert_layers(stream.model)}

    def run(self, changes: Changes) -> None:
        """Do the layers that are not done, and keep with each what the next one is given."""
        from moeprune.streaming.states import Saved

        last = self._stream.last = self._job.checkpoint.moe_layers[-1]
        start = next((layer for layer in range(last + 1) if not changes.finished(layer)), last + 1)
        if start:
            saved = changes.record(start - 1).get("states")
            if saved:
                self._states.restore(changes.folder, Saved(**saved))
        else:
            self._stream.embed(self._inputs, self._states)
        for index in progress(range(start, last + 1), "sparsifying", unit="layer"):
            with self._stream.layer(index):
                tensors, said = self._sparsified(index) if index in self._experts else ({}, {})
                if index < last:
                    self._advance(index)
                    self._states.turn()
                    said["states"] = dataclasses.asdict(self._states.save(changes.folder))
                changes.add(index, tensors, said)

    def _sparsified(self, index: int) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """Make the layer in memory sparse; gives what is to be stored, and what is to be said of it."""
        job, weights = self._job, self._stream.weights
        squares = self._squares(index)
        values, went = sparsify_layer(weights, self._experts[index], index, squares, job.sparsity, job.widths)
        return stored_tensors(weights, index, values), dataclasses.asdict(went)

    def _squares(self, index: int) -> Squares:
        """Run the layer, which is whole, and add up what its experts see."""
        import torch

        device = self._stream.device
        shared = _SharedInputs(self._stream, index) if self._tied else None
        for batch, inputs, state in self._each():
            with self._observation.batch(batch.domain, batch.half, rows=batch.rows):
                if shared is None:
                    self._stream.run(index, state, inputs)
                else:
                    with shared.watched(inputs["attention_mask"]):
                        self._stream.run(index, state, inputs)
        found = self._observation.take(index).total
        sums = {name: torch.from_numpy(found[name].sum(axis=0)).to(device) for name in NEEDS}
        return Squares(
            inputs=sums["gated_in_sq_sum"],
            inner=sums["gated_mid_sq_sum"],
            shared=shared.total if shared is not None else None,
        )

    @property
    def _tied(self) -> bool:
        return self._job.sparsity.kind == "neurons" and bool(self._job.widths.shared)

    def _advance(self, index: int) -> None:
        """Run the layer as it is now, and keep what the next one is given."""
        self._observation.paused = True
        try:
            for number, (_, inputs, state) in enumerate(self._each()):
                self._states.put(number, self._stream.run(index, state, inputs))
        finally:
            self._observation.paused = False
        self._stream.trim()

    def _each(self) -> Iterator[tuple[Batch, Inputs, tuple[torch.Tensor, ...]]]:
        for number, (batch, inputs) in enumerate(zip(self._batches, self._inputs, strict=True)):
            yield batch, inputs, self._states.get(number)


class _SharedInputs:
    """Adds up the squares of what the down projection of a layer's shared expert is given."""

    def __init__(self, stream: LayerStream, index: int) -> None:
        import torch

        _, _, down = shared_of(stream.weights, index)
        self._module = stream.model.get_submodule(down.removesuffix(".weight"))
        self.total = torch.zeros(self._module.in_features, dtype=torch.float64, device=stream.device)

    @contextlib.contextmanager
    def watched(self, mask_BS: torch.Tensor) -> Iterator[None]:
        """Add up what runs inside the block, padding left out."""

        def see(_: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            rows_TJ = inputs[0].flatten(0, -2)
            valid_T = mask_BS.flatten().bool().to(rows_TJ.device)
            self.total += rows_TJ[valid_T].float().square().sum(dim=0).double()

        handle = self._module.register_forward_pre_hook(see)
        try:
            yield
        finally:
            handle.remove()


def _arranged(job: _Job, data: CalibrationSet) -> tuple[LayerStream, Forecast, list[Batch]]:
    """The stream, what a pass takes, and the batches.

    Raises:
        ConfigError: it does not fit.
    """
    stream = open_stream(job.checkpoint, job.settings)
    _check_dtype(stream)
    batches = data.batches(job.settings.batch_tokens)
    measured = dataclasses.replace(job.settings, statistics=NEEDS)
    expected = arrange(stream, measured, data, batches, kept=True)
    if not stream.whole_layers:
        raise ConfigError(
            f"one layer does not fit in memory, only {stream.chunk} of its experts",
            "raise --memory, or use --statistics-file",
        )
    return stream, expected, batches


def _check_dtype(stream: LayerStream) -> None:
    """Refuse a dtype that would round the weights that stay."""
    from moeprune.streaming.weights import torch_dtypes

    held, known = stream.model.dtype, torch_dtypes()
    pieces = (piece for layer in stream.weights.experts for piece in stream.weights.pieces(layer, experts=True))
    for stored in {known[entry.dtype] for piece in pieces for entry in piece.stored.values()}:
        if held != stored and held.itemsize <= stored.itemsize:
            name = str(stored).removeprefix("torch.")
            raise ConfigError(f"this dtype would round weights that are stored as {name}", f"pass --dtype {name}")


def _forecast(job: _Job) -> Forecast | None:
    return None if job.data is None else _arranged(job, job.data)[1]
