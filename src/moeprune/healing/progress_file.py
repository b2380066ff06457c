"""The state of a training run on disk: safetensors for weights and optimiser, JSON for the rest; nothing is pickled."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moeprune._files import read_artifact, to_json, write_atomic
from moeprune.errors import ArtifactError
from moeprune.rewrite.changed import safetensors_pieces

if TYPE_CHECKING:
    import torch
    from torch import nn

SCHEMA = "moeprune.training/1"
_PARTS = ("exp_avg", "exp_avg_sq", "step")  # of AdamW


@dataclass(slots=True)
class Progress:
    """How far a run is.

    Attributes:
        best: weights by name that were best on the held-out text, as the checkpoint stores them.
        step: steps that are done.
        best_step: after which step they were.
        looks: held-out divergence by step.
        schedule: state of the learning rate's scheduler.
        objective: state of the objective now; best_objective: when the weights were best.
    """

    best: dict[str, torch.Tensor]
    step: int = 0
    best_step: int = 0
    looks: dict[int, float] = field(default_factory=dict)
    schedule: dict[str, Any] = field(default_factory=dict)
    objective: dict[str, Any] = field(default_factory=dict)
    best_objective: dict[str, Any] = field(default_factory=dict)


def save_progress(folder: Path, progress: Progress, parameters: Mapping[str, nn.Parameter], optimizer: Any) -> None:
    """Keep a run's state; the one before it stays until this one is whole.

    Args:
        folder: where to; it exists.
        progress: everything but the weights that are trained now and the optimiser's state.
        parameters: those that are trained, by name.
        optimizer: AdamW.
    """
    tensors = {f"best.{name}": value for name, value in progress.best.items()}
    for name, parameter in parameters.items():
        tensors[f"now.{name}"] = parameter.detach()
        for part, value in optimizer.state.get(parameter, {}).items():
            tensors[f"{part}.{name}"] = value
    file = folder / f"training{progress.step}.safetensors"
    write_atomic(file, safetensors_pieces(tensors, {}))
    content = {
        "schema": SCHEMA,
        "step": progress.step,
        "best_step": progress.best_step,
        "looks": [[step, value] for step, value in progress.looks.items()],
        "schedule": {key: value for key, value in progress.schedule.items() if key != "lr_lambdas"},
        "objective": progress.objective,
        "best_objective": progress.best_objective,
    }
    write_atomic(folder / "training.json", to_json(content))
    for old in folder.glob("training*.safetensors"):
        if old != file:
            old.unlink()


def load_progress(folder: Path, parameters: Mapping[str, nn.Parameter], optimizer: Any) -> Progress | None:
    """Set weights and optimiser to where an earlier run of the same job was.

    Returns:
        The rest of its state, or None where it had kept none.

    Raises:
        ArtifactError: what it kept is damaged.
    """
    if not (folder / "training.json").is_file():
        return None
    from safetensors.torch import load_file

    content = read_artifact(folder / "training.json", SCHEMA)
    file = folder / f"training{content['step']}.safetensors"
    if not file.is_file():
        raise ArtifactError(f"{file} is missing", "start again with --overwrite")
    tensors = load_file(file)
    import torch

    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[f"now.{name}"])
            state = {part: tensors[f"{part}.{name}"] for part in _PARTS if f"{part}.{name}" in tensors}
            if state:  # the step stays on the CPU, as torch keeps it
                moved = {part: value if part == "step" else value.to(parameter.device) for part, value in state.items()}
                optimizer.state[parameter] = moved
    return Progress(
        best={name: tensors[f"best.{name}"] for name in parameters},
        step=content["step"],
        best_step=content["best_step"],
        looks={int(step): float(value) for step, value in content["looks"]},
        schedule={**content["schedule"], "lr_lambdas": [None] * len(content["schedule"]["base_lrs"])},
        objective=content["objective"],
        best_objective=content["best_objective"],
    )
