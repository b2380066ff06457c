"""The executor of fuse plans: merge experts layer by layer, copy everything else by bytes.

Experts are read from the files one group at a time. Only what is fitted to activations runs the model, and then one
decoder layer is in memory at a time, with the hidden states of the calibration data.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from moeprune._files import PathLike, progress
from moeprune.architectures import ExpertName, RouterName, StackedName
from moeprune.checkpoint import Checkpoint
from moeprune.errors import PlanError, UnsupportedModelError
from moeprune.experts import expert_layers
from moeprune.plans import PruningPlan
from moeprune.plans_fuse import ABSORB, FITTED, TIED, FusePlan, Group, check_choices, check_groups
from moeprune.rewrite.changed import Changes, changing, check_plain, write_changed
from moeprune.rewrite.drop import DEFAULT_SHARD_SIZE, check_plan, keep_lists
from moeprune.rewrite.fuse_fit import Fitting
from moeprune.rewrite.merging import merge_experts

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from transformers import PreTrainedModel

    from moeprune.headers import TensorEntry
    from moeprune.rewrite.fuse_fit import Chosen
    from moeprune.rewrite.merging import Expert
    from moeprune.streaming.naming import Piece
    from moeprune.streaming.states import States
    from moeprune.streaming.stream import Inputs, LayerStream
    from moeprune.streaming.weights import Weights


def open_weights(
    checkpoint: Checkpoint, device: torch.device | str = "cpu", *, trust_remote_code: bool = False
) -> Weights:
    """Where the weights of a checkpoint lie, for a device that computes what is merged; none is read.

    Raises:
        UnsupportedModelError: its experts cannot be merged.
    """
    import torch

    from moeprune.streaming.skeleton import build_skeleton
    from moeprune.streaming.weights import Weights

    model = build_skeleton(checkpoint, trust_remote_code=trust_remote_code)
    check_experts(model)
    return Weights(checkpoint, model, torch.device(device))


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """What merged experts are fitted to.

    Attributes:
        stream: runs the checkpoint, with whole layers in memory.
        inputs: batches of token ids and masks.
        states: where the hidden states live in between.
        fingerprint: of the data and of how it is run.
        chosen: what a router picks [T, K] that has the rows of some experts alone: a layer, those experts and the
            inputs [T, H] of its MoE block to source numbers. A router that is not tied will pick like that.
    """

    stream: LayerStream
    inputs: Sequence[Inputs]
    states: States
    fingerprint: str
    chosen: Chosen


def apply_fuse(
    checkpoint: Checkpoint,
    plan: FusePlan,
    output: PathLike,
    *,
    weights: Weights,
    calibration: Calibration | None = None,
    max_shard_size: int = DEFAULT_SHARD_SIZE,
    overwrite: bool = False,
    extra: Mapping[str, bytes] | None = None,
) -> Path:
    """Write the fused checkpoint; the folder appears whole or not at all.

    After a kill the same call goes on with the layer that was not finished.

    Args:
        checkpoint: the source.
        plan: groups for every MoE layer.
        output: new folder.
        weights: of the checkpoint, which say where each expert lies; what is merged is computed on their device.
        calibration: for merges that fit.
        max_shard_size: bytes of tensors per file.
        overwrite: replace a folder that is not empty.
        extra: more files for the provenance folder, by name.

    Returns:
        The finished folder.

    Raises:
        StaleArtifactError: the plan was made for another model.
        PlanError: no engine could run the result, or a fit has nothing to be fitted to.
        UnsupportedModelError: the weights are quantised, or experts are no three matrices.
    """
    plan = check_fuse(checkpoint, plan)
    check_experts(weights.model)
    if calibration is None:
        check_fitted(plan)
    data = calibration.fingerprint if calibration else ""
    job = (plan.to_dict(), data, str(weights.device))
    with changing(checkpoint, output, job=job, overwrite=overwrite) as changes:
        if calibration is not None and plan.merge in FITTED:
            _fit_layers(checkpoint, plan, changes, weights, calibration)
        else:
            _merge_layers(checkpoint, plan, changes, weights)
        return write_changed(
            checkpoint,
            changes,
            output,
            keep=keep_of(checkpoint, plan),
            config_edits=plan.config_edits,
            records={"plan": plan.to_dict()},
            extra=extra,
            max_shard_size=max_shard_size,
            overwrite=overwrite,
        )


def check_fuse(checkpoint: Checkpoint, plan: FusePlan) -> FusePlan:
    """Check a plan against the checkpoint and derive again what follows from its groups.

    Raises:
        StaleArtifactError: the plan was made for another model.
        PlanError: a layer is missing, groups are no partition, or no engine could run the result.
        UnsupportedModelError: the weights are quantised.
    """
    check_choices(plan)
    check_plain(checkpoint, "fusing")
    dropped = _dropped(checkpoint, plan)
    for index, layer in sorted(plan.layers.items()):
        check_groups(index, layer.groups, checkpoint.router)
    if plan.router == TIED and plan.mtp_layers:
        raise PlanError("nothing could run MTP layers behind a tied router", "leave them out of the plan")
    return dataclasses.replace(plan, config_edits=dropped.config_edits)


def _dropped(checkpoint: Checkpoint, plan: FusePlan) -> PruningPlan:
    """The plan that keeps the dominant experts alone: the same shapes, numbers and config."""
    return check_plan(checkpoint, plan.as_drop())


def check_fitted(plan: FusePlan) -> None:
    """Refuse a plan that fits experts to activations where there are none.

    Raises:
        PlanError: the message says what runs it.
    """
    if plan.merge in FITTED:
        raise PlanError(
            f"{plan.merge} fits merged experts to activations",
            "run the plan with `moeprune fuse MODEL --plan FILE --calibration data.jsonl`",
        )


def keep_of(checkpoint: Checkpoint, plan: FusePlan) -> dict[int, tuple[int, ...]]:
    """The dominant experts by layer, in the order of the new numbers."""
    return keep_lists(_dropped(checkpoint, plan))


def check_experts(model: PreTrainedModel) -> None:
    """Refuse experts that are not a gate, an up and a down projection without biases.

    Raises:
        UnsupportedModelError: they are something else.
    """
    for layer in expert_layers(model):
        kind: Any = layer.experts
        plain = getattr(kind, "has_gate", False) and getattr(kind, "is_concatenated", False)
        if not plain or getattr(kind, "is_transposed", True) or getattr(kind, "has_bias", True):
            what = f"the experts of layer {layer.index} are not three matrices without biases"
            raise UnsupportedModelError(f"{what}, which is what can be merged", "drop experts instead")


def computed_names(checkpoint: Checkpoint, plan: FusePlan) -> set[str]:
    """Names of the output's tensors whose values are computed; all others are the source's bytes."""
    merged = {index: layer.merged.keys() for index, layer in plan.layers.items()}
    down = f"{checkpoint.spec.projections[2]}.weight", checkpoint.spec.experts + checkpoint.spec.stacked[1]
    found = set()
    for name, role in checkpoint.roles.items():
        places = merged.get(role.layer, ())
        if isinstance(role, ExpertName):
            computed = role.expert in places and (plan.merge != ABSORB or role.after == down[0])
        elif isinstance(role, StackedName):
            computed = bool(places) and (plan.merge != ABSORB or role.part == down[1])
        else:
            computed = isinstance(role, RouterName) and bool(places) and plan.router == "merge-rows"
        if computed:
            found.add(name)
    return found


# --- one layer --------------------------------------------------------------------------------------------------------


def _merge_layers(checkpoint: Checkpoint, plan: FusePlan, changes: Changes, weights: Weights) -> None:
    for index in progress(sorted(plan.layers), "merging experts", unit="layer"):
        if changes.finished(index):
            continue
        with StoredExperts(weights, index) as stored:
            changes.add(index, layer_tensors(checkpoint, plan, stored, merged_experts(stored, plan)))


def merged_experts(stored: StoredExperts, plan: FusePlan) -> dict[int, Expert]:
    """The merged experts of a layer by their new number; of a merge that fits, what it starts from."""
    return {
        place: merge_experts(
            [stored.read(member) for member in group.members], group.weights, plan.merge, align=plan.align
        )
        for place, group in plan.layers[stored.layer].merged.items()
    }


def layer_tensors(
    checkpoint: Checkpoint, plan: FusePlan, stored: StoredExperts, merged: Mapping[int, Expert]
) -> dict[str, torch.Tensor]:
    """The layer's computed tensors by their names in the output."""
    layer = plan.layers[stored.layer]
    found = dict(stored.named(merged, layer.keep, only_down=plan.merge == ABSORB))
    for name, role in checkpoint.roles.items():
        if not isinstance(role, RouterName) or role.layer != stored.layer or plan.router == "keep-dominant":
            continue
        rows = stored.tensor(checkpoint.tensors[name])
        if plan.router == TIED:
            found[name] = rows
        elif merged:
            found[name] = _merged_rows(rows, layer.groups, role.axis)
    return found


def _merged_rows(rows: torch.Tensor, groups: Sequence[Group], axis: int) -> torch.Tensor:
    """One row for every group along an axis: the weighted mean of its members' rows."""
    import torch

    mixing = torch.zeros((len(groups), rows.shape[axis]), dtype=torch.float64, device=rows.device)
    for place, group in enumerate(groups):
        mixing[place, list(group.members)] = torch.tensor(group.weights, dtype=torch.float64, device=rows.device)
    merged: torch.Tensor = torch.tensordot(mixing, rows.double().movedim(axis, 0), dims=1).movedim(0, axis)
    return merged


class StoredExperts:
    """The experts of one layer as the files hold them, one at a time; use it as a context manager."""

    def __init__(self, weights: Weights, layer: int) -> None:
        self.layer = layer
        self._weights = weights
        self._pieces = weights.pieces(layer, experts=True)
        self._files = contextlib.ExitStack()
        self._open: dict[Path, Any] = {}

    def __enter__(self) -> Self:
        """Files are opened when they are read."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close them."""
        self._files.close()

    def tensor(self, entry: TensorEntry) -> torch.Tensor:
        """A tensor, as it is stored, on the device."""
        value: torch.Tensor = self._file(entry).get_tensor(entry.name).to(self._weights.device)
        return value

    def read(self, expert: int) -> Expert:
        """Gate, up and down of an expert, in the dtype in which they are stored."""
        parts: dict[tuple[str, int], torch.Tensor] = {}
        for piece in self._pieces:
            leaf, entry = piece.parameter.rpartition(".")[2], piece.stored[""]
            if piece.expert == expert:
                parts[leaf, piece.part] = self.tensor(entry)
            elif piece.stacked:
                row = self._file(entry).get_slice(entry.name)[expert].to(self._weights.device)
                halves = row.chunk(2) if leaf == "gate_up_proj" else (row,)
                parts |= {(leaf, part): half for part, half in enumerate(halves)}
        return parts["gate_up_proj", 0], parts["gate_up_proj", 1], parts["down_proj", 0]

    def named(
        self, merged: Mapping[int, Expert], keep: Sequence[int], *, only_down: bool
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Merged experts, by their new number, as tensors by their names in the output.

        Args:
            merged: those that were computed.
            keep: the source's expert in the place of each new number, for a tensor that holds all of them.
            only_down: the other projections are as they were.
        """
        for piece in self._pieces if merged else ():
            entry = piece.stored[""]
            if only_down and not piece.parameter.endswith("down_proj"):
                continue
            if piece.stacked:
                yield entry.name, self._restacked(piece, merged, keep)
            elif piece.expert is not None and piece.expert in merged:
                yield entry.name, _part(merged[piece.expert], piece)

    def _restacked(self, piece: Piece, merged: Mapping[int, Expert], keep: Sequence[int]) -> torch.Tensor:
        rows = self.tensor(piece.stored[""])[list(keep)]
        for place, expert in merged.items():
            rows[place] = _part(expert, piece)
        return rows

    def _file(self, entry: TensorEntry) -> Any:
        from safetensors import safe_open

        if entry.file not in self._open:
            self._open[entry.file] = self._files.enter_context(safe_open(entry.file, framework="pt"))
        return self._open[entry.file]


def _part(expert: Expert, piece: Piece) -> torch.Tensor:
    """The part of an expert that a piece holds."""
    import torch

    gate, up, down = expert
    if piece.parameter.endswith("down_proj"):
        return down
    return torch.cat([gate, up]) if piece.stacked else (gate, up)[piece.part]


# --- fitted to activations --------------------------------------------------------------------------------------------


def _fit_layers(
    checkpoint: Checkpoint, plan: FusePlan, changes: Changes, weights: Weights, calibration: Calibration
) -> None:
    """Run the model layer by layer, and fit what is merged in each to what its experts give."""
    import torch

    todo = [index for index in plan.layers if not changes.finished(index)]
    if not todo:
        return
    stream, states, inputs = calibration.stream, calibration.states, calibration.inputs
    modules = {layer.index: layer for layer in expert_layers(stream.model)}
    chosen = None if plan.router == TIED else calibration.chosen
    stream.last = max(todo)
    with torch.inference_mode():
        stream.embed(inputs, states)
        for index in progress(range(stream.last + 1), "fitting experts", unit="layer"):
            with contextlib.ExitStack() as undo:
                stored = undo.enter_context(StoredExperts(weights, index))
                undo.enter_context(stream.layer(index))
                fitting = None
                if index in todo:
                    merged = merged_experts(stored, plan)
                    fitting = undo.enter_context(Fitting(modules[index], plan.layers[index], merged, chosen))
                for number, batch in enumerate(inputs):
                    if fitting is not None:
                        fitting.mask_T = batch["attention_mask"].reshape(-1).bool()
                    states.put(number, stream.run(index, states.get(number), batch))
                states.turn()
                if fitting is not None:
                    tensors = layer_tensors(checkpoint, plan, stored, fitting.solved())
                    changes.add(index, tensors, {"tokens": fitting.rows})
