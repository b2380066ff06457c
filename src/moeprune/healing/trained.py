"""From trained parameters of a loaded model to tensors of its checkpoint."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from moeprune.checkpoint import Checkpoint
from moeprune.rewrite.changed import Changes
from moeprune.runtime.surgery import named_as_on_disk
from moeprune.streaming.weights import torch_dtypes

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")
_OUTSIDE = -1  # stands for the layer of embeddings and whatever else lies in no decoder layer


def stored_dtypes(model: PreTrainedModel, checkpoint: Checkpoint, names: Iterable[str]) -> dict[str, torch.dtype]:
    """The dtypes that the checkpoint stores some parameters in, by the parameters' names."""
    state, known = dict(model.named_parameters()), torch_dtypes()
    found = {}
    for name in names:
        on_disk = named_as_on_disk(model, {name: state[name].detach().to("meta")})
        entries = [checkpoint.tensors[own] for own in on_disk if own in checkpoint.tensors]
        found[name] = known[entries[0].dtype] if entries else state[name].dtype  # tied: stored under another name
    return found


def add_trained(
    model: PreTrainedModel, names: Iterable[str], changes: Changes, checkpoint: Checkpoint, record: Mapping[str, Any]
) -> None:
    """Hand over what was trained, layer by layer; the values of everything else stay those of the files.

    Args:
        model: the trained model.
        names: of the parameters that were trained.
        changes: where the tensors go.
        checkpoint: what the model was loaded from.
        record: what to remember of the training, with the first layer.
    """
    state, layers = dict(model.named_parameters()), defaultdict[int, dict[str, Any]](dict)
    for name in names:
        position = _LAYER.search(name)
        layers[int(position[1]) if position else _OUTSIDE][name] = state[name].detach()
    for number, (layer, values) in enumerate(sorted(layers.items())):
        tensors = named_as_on_disk(model, values)
        own = {name: value for name, value in tensors.items() if name in checkpoint.tensors}
        changes.add(layer, own, record if number == 0 else None)
