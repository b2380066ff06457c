"""Fuse layer by layer: each is grouped and merged on what the fused layers before it give (arXiv:2604.04356).

One decoder layer is in memory at a time. The calibration data run through it once to collect its statistics, once more
where merged experts are fitted, and a last time as the fused layer, whose output the next layer is given. What is fused
in memory are the tensors that will be written, rounded as they will be stored.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from moeprune._files import check_free_space, progress
from moeprune._options import CalibrationOptions
from moeprune.architectures import RouterName
from moeprune.calibration import Batch, CalibrationSet
from moeprune.catalogue import known
from moeprune.checkpoint import Checkpoint
from moeprune.collecting import arrange, collected, open_stream
from moeprune.errors import ConfigError
from moeprune.experts import ExpertLayer, expert_layers
from moeprune.planner import coverage_warnings
from moeprune.planner_fuse import Fusion, derive_fusion, drafted, group_layer
from moeprune.plans_fuse import FITTED, TIED, FuseLayer, FusePlan
from moeprune.rewrite.changed import Changes, changing, write_changed
from moeprune.rewrite.drop import DEFAULT_SHARD_SIZE
from moeprune.rewrite.fuse import StoredExperts, keep_of, layer_tensors, merged_experts
from moeprune.rewrite.fuse_fit import Fitting, fit_bytes
from moeprune.runtime.masking import Mask, chosen_by_some
from moeprune.runtime.tied import Lead
from moeprune.statistics import RouterStatistics, domain_weights
from moeprune.strategies.guards import super_experts

if TYPE_CHECKING:
    import torch

    from moeprune.rewrite.merging import Expert
    from moeprune.statistics import LayerArrays
    from moeprune.streaming.forecast import Forecast
    from moeprune.streaming.states import States
    from moeprune.streaming.stream import Inputs, LayerStream
    from moeprune.streaming.weights import Weights

    Tensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class InOrder:
    """What is fused, and on what.

    Attributes:
        checkpoint: the source.
        wanted: budget, grouping and the rest.
        settings: how the model runs, and what its grouping measures.
        data: the calibration data.
        output: new folder.
    """

    checkpoint: Checkpoint
    wanted: Fusion
    settings: CalibrationOptions
    data: CalibrationSet
    output: Path

    @property
    def fits(self) -> bool:
        """Whether merged experts are fitted to activations."""
        return self.wanted.merge in FITTED

    @property
    def domains(self) -> tuple[str, ...]:
        """Labels of the data, in the order of statistics."""
        return tuple(sorted(set(self.data.domains)))


def check_in_order(settings: CalibrationOptions) -> None:
    """Refuse what does not go with fusing layer by layer.

    Raises:
        ConfigError: layers are left out, all are to be loaded together, or a statistic follows tokens over layers.
    """
    if settings.layers:
        raise ConfigError("--sequential fuses all layers, one at a time", "leave the choice of layers out")
    if settings.stream is False:
        raise ConfigError("--sequential runs one layer at a time, and --no-stream says otherwise", "leave it out")
    across = [name for name in settings.measured if known(name).point == "routes"]
    if across:
        raise ConfigError(
            f"{across[0]} follows tokens through the original's layers, which --sequential replaces one by one",
            "leave --sequential out, or group otherwise",
        )


def expected_in_order(job: InOrder) -> Forecast:
    """What fusing would take.

    Raises:
        ConfigError: it does not fit.
    """
    _, expected, _ = _arranged(job)
    check_free_space(job.output, expected.disk, kind="changes")
    return dataclasses.replace(expected, read=expected.read * (2 if job.wanted.guard else 1))  # it runs the original


def fuse_in_order(job: InOrder, *, max_shard_size: int = DEFAULT_SHARD_SIZE, overwrite: bool = False) -> FusePlan:
    """Write the fused checkpoint; the folder appears whole or not at all, with the plan that came of it.

    After a kill the same call goes on with the layer that was not finished.

    Args:
        job: what is fused, and on what.
        max_shard_size: bytes of tensors per file.
        overwrite: replace a folder that is not empty.

    Raises:
        ConfigError: one layer does not fit in memory, or the output cannot be used.
        PlanError: more super experts are left alone than there are groups, or no engine could run the result.
        StrategyError: the statistics lack what the grouping needs.
    """
    checkpoint, arranged = job.checkpoint, _arranged(job)
    domain_weights(job.domains, job.wanted.weights)
    with _super_experts(job) as alone:
        draft = _draft(job, alone)
        with changing(
            checkpoint,
            job.output,
            job=(sorted(draft.command.items()), draft.inputs, job.settings.measured, job.settings.device),
            overwrite=overwrite,
            nbytes=arranged[1].disk,
        ) as changes:
            _Pass(job, draft, alone, *arranged, changes).run()
            plan = _plan(job, alone, changes)
            write_changed(
                checkpoint,
                changes,
                job.output,
                keep=keep_of(checkpoint, plan),
                config_edits=plan.config_edits,
                records={"plan": plan.to_dict()},
                max_shard_size=max_shard_size,
                overwrite=overwrite,
            )
    return plan


def _arranged(job: InOrder) -> tuple[LayerStream, Forecast, list[Batch]]:
    """The stream, what a pass takes, and the batches."""
    checkpoint = job.checkpoint
    stream, batches = open_stream(checkpoint, job.settings), job.data.batches(job.settings.batch_tokens)
    one_layer = dataclasses.replace(job.settings, layers=checkpoint.moe_layers[-1:])  # its sums alone are held
    expected = arrange(stream, one_layer, job.data, batches, kept=True, beside=_merging_bytes(job, stream.weights))
    if not stream.whole_layers:
        raise ConfigError(
            f"one layer does not fit in memory, only {stream.chunk} of its experts",
            "raise --memory or --device-memory, or leave --sequential out",
        )
    return stream, expected, batches


def _merging_bytes(job: InOrder, weights: Weights) -> int:
    """The most that a layer's merged experts take while they are made."""
    kept, count = job.wanted.budget.kept(job.checkpoint.router), job.checkpoint.num_experts
    hidden = int(weights.model.config.get_text_config().hidden_size)
    return max(
        fit_bytes(min(kept, count - kept), hidden, weights.expert_width(index)) for index in job.checkpoint.moe_layers
    )


@contextlib.contextmanager
def _super_experts(job: InOrder) -> Iterator[Mapping[int, frozenset[int]]]:
    """Experts that stay alone. Layers are compared with one another to find them, so the original runs before."""
    if not job.wanted.guard:
        yield {}
        return
    core = dataclasses.replace(job.settings, statistics=(), stream=True)
    with collected(job.checkpoint, core, job.data, output=job.output) as statistics:
        yield super_experts(statistics)


# --- the plan ---------------------------------------------------------------------------------------------------------


def _draft(
    job: InOrder,
    alone: Mapping[int, frozenset[int]],
    layers: Mapping[int, FuseLayer] | None = None,
    notes: Sequence[str] = (),
) -> FusePlan:
    calibration = job.data.fingerprint
    plan = drafted(job.checkpoint, job.wanted, layers or {}, calibration=calibration, alone=alone, notes=notes)
    run = dataclasses.replace(job.settings, statistics=()).canonical()  # which no statistics file records
    fitted = {"fit": calibration} if job.fits else {}
    return dataclasses.replace(plan, command={**run, **plan.command}, inputs={**plan.inputs, **fitted})


def _plan(job: InOrder, alone: Mapping[int, frozenset[int]], changes: Changes) -> FusePlan:
    """What was decided in all layers, by this run or an earlier one."""
    records = {index: changes.record(index) for index in job.checkpoint.moe_layers}
    layers = {index: FuseLayer.from_dict(index, record["layer"]) for index, record in records.items()}
    return derive_fusion(job.checkpoint, _draft(job, alone, layers, coverage_warnings(_seen(job, records))))


def _seen(job: InOrder, records: Mapping[int, Mapping[str, Any]]) -> RouterStatistics:
    """How many tokens each expert saw, of all domains together."""
    return RouterStatistics(
        domains=("all",),
        num_experts=job.checkpoint.num_experts,
        top_k=job.checkpoint.top_k,
        layers={
            index: {name: np.array([record[name]]) for name in ("tokens", "count")} for index, record in records.items()
        },
        command={},
        inputs={},
        provenance=job.data.provenance,
    )


# --- the data on their way --------------------------------------------------------------------------------------------


class _Pass:
    """The calibration data on their way through the layers."""

    def __init__(
        self,
        job: InOrder,
        draft: FusePlan,
        alone: Mapping[int, frozenset[int]],
        stream: LayerStream,
        expected: Forecast,
        batches: Sequence[Batch],
        changes: Changes,
    ) -> None:
        from moeprune.streaming.states import SpilledStates, States
        from moeprune.streaming.stream import padded

        self._job, self._draft, self._alone = job, draft, alone
        self._stream, self._batches, self._changes = stream, batches, changes
        self._inputs: list[Inputs] = [padded(batch.sequences) for batch in batches]
        count = len(batches)
        self._states: States = SpilledStates(count, changes.folder) if expected.spill else States(count)
        self._layers = {layer.index: layer for layer in expert_layers(stream.model)}

    def run(self) -> None:
        """Do the layers that are not done, and keep with each what the next one is given."""
        import torch

        last = self._stream.last = self._job.checkpoint.moe_layers[-1]
        start = next((index for index in range(last + 1) if not self._changes.finished(index)), last + 1)
        with torch.inference_mode():
            if start <= last:
                self._begin(start)
            for index in progress(range(start, last + 1), "fusing", unit="layer"):
                with self._stream.layer(index), self._fused(index) as (tensors, said):
                    if index < last:
                        self._advance(index)
                        said["states"] = dataclasses.asdict(self._states.save(self._changes.folder))
                    self._changes.add(index, tensors, said)

    def _begin(self, start: int) -> None:
        from moeprune.streaming.states import Saved

        if start:
            self._states.restore(self._changes.folder, Saved(**self._changes.record(start - 1)["states"]))
        else:
            self._stream.embed(self._inputs, self._states)

    @contextlib.contextmanager
    def _fused(self, index: int) -> Iterator[tuple[Tensors, dict[str, Any]]]:
        """Fuse the layer in memory, which runs so inside the block; its new tensors, and what is to be said of it."""
        if index not in self._layers:
            yield {}, {}
            return
        arrays = self._observed(index)
        plan = dataclasses.replace(self._draft, layers={index: self._grouped(index, arrays)})
        with StoredExperts(self._stream.weights, index) as stored:
            merged = merged_experts(stored, plan)
            if self._job.fits and merged:
                merged = self._fitted(plan, self._layers[index], merged)
            tensors = layer_tensors(self._job.checkpoint, plan, stored, merged)
        said = {"layer": plan.layers[index].to_dict()}
        said |= {name: arrays.total[name].sum(axis=0).tolist() for name in ("tokens", "count")}
        with running_fused(self._stream.weights, self._layers[index], plan, tensors):
            yield tensors, said

    def _observed(self, index: int) -> LayerArrays:
        """What is measured on the original's layer, behind fused ones."""
        from moeprune.collectors.probe import observe

        job = self._job
        with observe(
            self._stream.model,
            like=job.checkpoint,
            layers=[index],
            domains=job.domains,
            statistics=job.settings.measured,
            paths=job.settings.paths,
            sequences=Counter(job.data.domains),
        ) as observation:
            for number, batch in enumerate(self._batches):
                with observation.batch(batch.domain, batch.half, rows=batch.rows):
                    self._run(index, number)
            observation.read_weights(index)
            return observation.take(index)

    def _grouped(self, index: int, arrays: LayerArrays) -> FuseLayer:
        checkpoint, wanted = self._job.checkpoint, self._job.wanted
        statistics = RouterStatistics.of_layers(
            {index: arrays},
            domains=self._job.domains,
            num_experts=checkpoint.num_experts,
            top_k=checkpoint.top_k,
            command={},
            inputs={},
        )
        alone: Set[int] = self._alone.get(index, frozenset())
        return group_layer(checkpoint, statistics.layer(index, wanted.weights), wanted, alone)

    def _fitted(self, plan: FusePlan, layer: ExpertLayer, merged: Mapping[int, Expert]) -> dict[int, Expert]:
        """The merged experts, fitted to what the original's give behind fused layers."""
        chosen = None if plan.router == TIED else chosen_by_some
        with Fitting(layer, plan.layers[layer.index], merged, chosen) as fitting:
            for number, inputs in enumerate(self._inputs):
                fitting.mask_T = inputs["attention_mask"].reshape(-1).bool()
                self._run(layer.index, number)
        return fitting.solved()

    def _advance(self, index: int) -> None:
        """Run the layer as it is now, and keep what the next one is given."""
        for number in range(len(self._batches)):
            self._states.put(number, self._run(index, number))
        self._states.turn()

    def _run(self, index: int, number: int) -> tuple[torch.Tensor, ...]:
        return self._stream.run(index, self._states.get(number), self._inputs[number])


# --- a fused layer in memory ------------------------------------------------------------------------------------------


@contextlib.contextmanager
def running_fused(weights: Weights, layer: ExpertLayer, plan: FusePlan, tensors: Tensors) -> Iterator[None]:
    """Let a layer of the original run as its fused one inside the block; afterwards it must be loaded again.

    Merged experts stand in the places of the dominant ones, which alone are chosen, or are led to by a tied router.

    Args:
        weights: of the checkpoint, with the layer in memory.
        layer: its modules.
        plan: what is merged in it.
        tensors: what is written for it, by name in the output.
    """
    _put(weights, layer.index, plan, tensors)
    if plan.router != TIED:
        with Mask(layer, plan.layers[layer.index].keep).applied():
            yield
        return
    hook = layer.experts.register_forward_pre_hook(Lead(plan.layers[layer.index].leaders()))
    try:
        yield
    finally:
        hook.remove()


def _put(weights: Weights, index: int, plan: FusePlan, tensors: Tensors) -> None:
    """Put what is written, as it is stored, where the dominant experts' own is in memory."""
    import torch

    from moeprune.streaming.weights import torch_dtypes

    keep, held = list(plan.layers[index].keep), weights.model.state_dict(keep_vars=True)
    for piece in weights.pieces(index):
        entry, role = piece.stored[""], weights.checkpoint.roles[piece.stored[""].name]
        if entry.name not in tensors or (isinstance(role, RouterName) and plan.router == TIED):
            continue
        parameter, value = held[piece.parameter], tensors[entry.name].to(torch_dtypes()[entry.dtype])
        if piece.expert is not None:
            parameter[keep[piece.expert]].narrow(0, piece.part * len(value), len(value)).copy_(value)
        else:
            axis = role.axis if isinstance(role, RouterName) else 0
            places = torch.tensor(keep, device=parameter.device)
            parameter.index_copy_(axis, places, value.to(parameter.device, parameter.dtype))
