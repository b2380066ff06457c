"""Take weights or whole neurons out of the experts of a layer that is in memory.

In memory everything stays as wide as it is: a weight that goes is 0, and a neuron that goes adds nothing to the output.
What is stored is narrower where neurons go.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from moeprune.architectures import ExpertName, read_count
from moeprune.checkpoint import Checkpoint
from moeprune.collectors.weights import ExpertWeights, weights_of
from moeprune.errors import ConfigError, LayoutError
from moeprune.plans_sparsify import SparseLayer, Sparsity
from moeprune.rewrite.stored import shared_projection
from moeprune.strategies.sparsity import best_neurons, lowest_of_groups, lowest_of_rows, neuron_scores, weight_scores

if TYPE_CHECKING:
    import torch

    from moeprune.streaming.weights import Weights


@dataclass(frozen=True, slots=True, kw_only=True)
class Squares:
    """Sums over the calibration tokens of one layer, on the device of its weights.

    Attributes:
        inputs: squares of the gated input of every expert.
        inner: squares of the gated input of its down projection.
        shared: squares of the input of the shared expert's down projection; None where it stays as it is.
    """

    inputs: torch.Tensor
    inner: torch.Tensor
    shared: torch.Tensor | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Widths:
    """How wide the experts of a checkpoint are.

    Attributes:
        inner: neurons of an expert.
        shared: how many times as wide the shared expert is, where its width follows from theirs; else 0.
    """

    inner: int
    shared: int = 0


def check_sparsity(checkpoint: Checkpoint, sparsity: Sparsity) -> Widths:
    """Refuse what cannot be taken out of the experts of this checkpoint.

    Raises:
        ConfigError: rows are no multiple of M long, or no neuron would go.
        LayoutError: the experts are not as wide as the config says.
    """
    spec, values = checkpoint.spec, checkpoint.spec.values(checkpoint.config)
    inner, hidden = read_count(values, spec.width_key), read_count(values, "hidden_size")
    shared = read_count(values, spec.shared_count_key, 0) if spec.shared_count_key else 0
    for length in (hidden, inner) if sparsity.m else ():
        if length % sparsity.m:
            raise ConfigError(f"--pattern {sparsity}: rows of {length} weights are no multiple of {sparsity.m}")
    if sparsity.kind == "neurons":
        sparsity.width(inner)
        _check_width(checkpoint, inner)
    return Widths(inner=inner, shared=shared)


def _check_width(checkpoint: Checkpoint, inner: int) -> None:
    down = checkpoint.spec.projections[2]
    for name, role in checkpoint.roles.items():
        if isinstance(role, ExpertName) and role.after.startswith(f"{down}."):
            shape = checkpoint.tensors[name].shape
            if len(shape) == 2 and shape[1] != inner:
                raise LayoutError(f"{name} takes {shape[1]} inputs, config.json says {inner}")


# --- one layer --------------------------------------------------------------------------------------------------------


def sparsify_layer(
    weights: Weights, experts: Any, layer: int, squares: Squares, sparsity: Sparsity, widths: Widths
) -> tuple[dict[str, torch.Tensor], SparseLayer]:
    """Take weights or neurons out of a layer in memory, in place.

    Args:
        weights: of the checkpoint, with the layer loaded.
        experts: the layer's experts module.
        layer: decoder layer.
        squares: what its experts saw.
        sparsity: what goes.
        widths: of the checkpoint.

    Returns:
        Parameters to be stored, by name in the model, and what went.
    """
    if sparsity.kind != "neurons":
        return _zero_weights(weights.experts[layer], experts, squares, sparsity)
    count = sparsity.width(widths.inner)
    values, before, after = _cut_experts(weights.experts[layer], experts, squares, count)
    if widths.shared:
        assert squares.shared is not None  # noqa: S101 - whoever measures knows the widths
        shared = shared_of(weights, layer)
        values |= _cut_shared(weights.model, shared, squares.shared, widths.shared * count)
        before += sum(weights.model.get_parameter(name).numel() for name in shared)
        after += sum(values[name].numel() for name in shared)
    return values, SparseLayer(weights=before, gone=before - after)


def _zero_weights(
    prefix: str, experts: Any, squares: Squares, sparsity: Sparsity
) -> tuple[dict[str, torch.Tensor], SparseLayer]:
    total = gone = 0
    for expert, own in weights_of(experts):
        inputs = (squares.inputs[expert], squares.inputs[expert], squares.inner[expert])
        for matrix, input_sq in zip(own.matrices, inputs, strict=True):
            scores = weight_scores(matrix, input_sq)
            if sparsity.m:
                matrix.masked_fill_(lowest_of_groups(scores, sparsity.n, sparsity.m), 0)
            else:
                matrix.masked_fill_(lowest_of_rows(scores, sparsity.gone(matrix.shape[1])), 0)
            total += matrix.numel()
            gone += int((matrix == 0).sum())
    values = {f"{prefix}.{name}": getattr(experts, name) for name in ("gate_up_proj", "down_proj")}
    return values, SparseLayer(weights=total, gone=gone)


def _cut_experts(prefix: str, experts: Any, squares: Squares, count: int) -> tuple[dict[str, torch.Tensor], int, int]:
    """The parameters without the neurons that go, and the weights before and after; those in memory are silenced."""
    import torch

    cut: dict[str, list[torch.Tensor]] = {}
    before = after = 0
    for expert, own in weights_of(experts):
        kept = best_neurons(neuron_scores(own.down, squares.inner[expert]), count)
        for name, value in own.own.items():
            narrow = _of_neurons(own, name, kept)
            cut.setdefault(name, []).append(narrow)
            before, after = before + value.numel(), after + narrow.numel()
        gone = torch.ones(own.down.shape[1], dtype=torch.bool, device=kept.device)
        own.down.masked_fill_(gone.index_fill_(0, kept, value=False), 0)
    return {f"{prefix}.{name}": torch.stack(values) for name, values in cut.items()}, before, after


def _of_neurons(expert: ExpertWeights, name: str, kept: torch.Tensor) -> torch.Tensor:
    """One parameter of an expert with some of its neurons only."""
    import torch

    value, transposed = expert.own[name], expert.module.is_transposed
    if name == "down_proj":
        return value.index_select(0 if transposed else 1, kept)
    if not name.startswith("gate_up_proj"):
        return value  # a bias of the output
    inner = value.shape[-1 if transposed or value.dim() == 1 else 0] // 2
    both = [kept, kept + inner] if expert.module.is_concatenated else [2 * kept, 2 * kept + 1]
    rows = torch.cat(both) if expert.module.is_concatenated else torch.stack(both, dim=1).flatten()
    return value.index_select(1 if transposed and value.dim() == 2 else 0, rows)


# --- the shared expert ------------------------------------------------------------------------------------------------


def shared_of(weights: Weights, layer: int) -> tuple[str, str, str]:
    """Names in the model of a layer's shared gate, up and down projection.

    Raises:
        LayoutError: they are not there.
    """
    spec = weights.checkpoint.spec
    found = {}
    for piece in weights.pieces(layer, experts=False):
        [entry, *_] = piece.stored.values()
        if projection := shared_projection(weights.checkpoint, entry.name):
            found[projection] = piece.parameter
    if set(found) != set(spec.projections):
        raise LayoutError(f"layer {layer} has no shared expert of {', '.join(spec.projections)}")
    gate, up, down = (found[projection] for projection in spec.projections)
    return gate, up, down


def _cut_shared(model: Any, names: tuple[str, str, str], inner_sq_J: torch.Tensor, count: int) -> dict[str, Any]:
    gate, up, down = (model.get_parameter(name) for name in names)
    kept = best_neurons(neuron_scores(down, inner_sq_J), count)
    values = {names[0]: gate[kept], names[1]: up[kept], names[2]: down[:, kept]}
    for neuron in sorted(set(range(len(inner_sq_J))) - set(kept.tolist())):
        down[:, neuron] = 0
    return values
