"""What training a whole model takes in memory, told from shapes before anything is loaded."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from moeprune._files import human_bytes
from moeprune.evaluation.agreement import batches
from moeprune.healing.distillation import Recipe, Sequences

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_FLOAT = 4  # bytes
_LOGITS = 7  # tensors as large as a batch's logits: of both models, their logarithms, probabilities, and gradients
_HIDDEN, _SLOT, _INNER = 24, 5, 8  # tensors kept for the backward pass: by token, by slot, by slot and inner neuron


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingForecast:
    """Memory at the peak, above the idle process, in bytes; on a GPU all of it is the GPU's.

    Attributes:
        student: the model that is trained, in float32.
        training: gradients, AdamW's two moments, and the best weights so far.
        teacher: the original.
        batch: what is kept of the largest batch for the backward pass, and its logits.
    """

    student: int
    training: int
    teacher: int
    batch: int

    @property
    def memory(self) -> int:
        """Everything together."""
        return self.student + self.training + self.teacher + self.batch

    def to_dict(self) -> dict[str, Any]:
        """For scripts."""
        return {"memory": self.memory} | dataclasses.asdict(self)

    def __str__(self) -> str:
        parts = {
            "the trained model": self.student,
            "its gradients, moments and best weights": self.training,
            "the original": self.teacher,
            "a batch": self.batch,
        }
        told = ", ".join(f"{human_bytes(size)} for {what}" for what, size in parts.items())
        return f"about {human_bytes(self.memory)} of memory: {told}"


def training_forecast(
    student: PreTrainedModel, teacher: PreTrainedModel, trained: Iterable[int], sequences: Sequences, recipe: Recipe
) -> TrainingForecast:
    """Forecast a run of :func:`moeprune.healing.distillation.distil`.

    Args:
        student: with parameters of the right shapes, which need not have memory.
        teacher: likewise; its own dtype counts in mixed precision only.
        trained: numbers of elements of what moves.
        sequences: the text, from which batches are cut.
        recipe: says how large they are.
    """
    of_teacher = [_FLOAT if recipe.precision == "no" else value.element_size() for value in teacher.parameters()]
    moving = sum(trained)
    return TrainingForecast(
        student=_FLOAT * sum(value.numel() for value in student.parameters()),
        training=4 * _FLOAT * moving,
        teacher=sum(size * value.numel() for size, value in zip(of_teacher, teacher.parameters(), strict=True)),
        batch=_batch(student, sequences, recipe),
    )


def _batch(student: PreTrainedModel, sequences: Sequences, recipe: Recipe) -> int:
    """Bytes of the largest batch in a step of the student."""
    config = student.config.get_text_config()
    step = max(recipe.step_tokens, *map(len, sequences))
    sizes = [ids_BT.numel() for _, ids_BT, _ in batches(sequences, min(recipe.batch_tokens, step))]
    hidden, inner = int(config.hidden_size), int(getattr(config, "moe_intermediate_size", config.intermediate_size))
    slots = int(getattr(config, "num_experts_per_tok", 1)) + int(getattr(config, "n_shared_experts", 0) or 0)
    layer = _HIDDEN * hidden + slots * (_SLOT * hidden + _INNER * inner)
    logits = _LOGITS * int(config.vocab_size)
    return _FLOAT * max(sizes) * (int(config.num_hidden_layers) * layer + logits)
