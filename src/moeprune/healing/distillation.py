"""Train a whole model until it predicts what its original predicts: logit distillation of models that fit in memory.

The student is trained in float32 on the Kullback-Leibler divergence of its next-token distribution from a frozen
teacher's. Part of the text is held out: the weights that are best on it are the ones that come back, and the ones that
were given are among the candidates, rounded as the checkpoint stores them. Devices, mixed precision and several
processes are accelerate's business. What else a run needs (gates with a controller, balance losses) is an
:class:`Objective`.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from moeprune._files import quiet
from moeprune.calibration import CalibrationSet
from moeprune.errors import ConfigError, EvaluationError
from moeprune.evaluation.agreement import batches
from moeprune.experts import expert_layers
from moeprune.healing.progress_file import Progress, load_progress, save_progress

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from torch import nn
    from transformers import PreTrainedModel

    Sums = Callable[[torch.Tensor], torch.Tensor]

Sequences = Sequence[Sequence[int]]
SCHEDULES = ("cosine", "linear", "constant")
LOSSES = ("forward", "reverse", "text")
PRECISIONS = ("no", "bf16", "fp16")
LEVELS = ("router", "experts", "attention", "norms", "all")
_HELD_OUT = 10  # every tenth sequence of a domain
_TRAINABLE = re.compile(r"(?:^|\.)layers\.\d+\.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """How a model is trained.

    Attributes:
        steps: optimiser steps at most.
        lr: largest learning rate of AdamW.
        schedule: ``cosine``, ``linear`` (both end at 0) or ``constant``, after ``warmup`` of the steps.
        warmup: share of the steps.
        step_tokens: tokens of a step, padding included.
        batch_tokens: most tokens in one forward pass; a step adds up the gradients of several.
        temperature: that both distributions are softened by; the loss is multiplied by its square.
        loss: ``forward`` is KL(teacher || student), ``reverse`` KL(student || teacher), ``text`` the negative
            log-likelihood of the text itself, for text that the teacher wrote.
        weight_decay: of AdamW.
        clip: largest norm of the gradients.
        checks: how often the held-out text is looked at.
        patience: looks without a better result after which a run ends; 0 never ends it.
        seed: of the order of the text.
        precision: ``no``, ``bf16`` or ``fp16``, as accelerate calls mixed precision.
    """

    steps: int = 150
    lr: float = 3e-4
    schedule: str = "cosine"
    warmup: float = 0.1
    step_tokens: int = 2048
    batch_tokens: int = 8192
    temperature: float = 1.0
    loss: str = "forward"
    weight_decay: float = 0.0
    clip: float = 1.0
    checks: int = 10
    patience: int = 6
    seed: int = 0
    precision: str = "no"

    def __post_init__(self) -> None:
        """Refuse what cannot be run.

        Raises:
            ConfigError: the message names the option.
        """
        if self.steps < 0 or self.step_tokens < 2 or self.batch_tokens < 2 or self.checks < 1 or self.seed < 0:
            raise ConfigError("--steps and --seed must be at least 0, and a batch two tokens or more")
        if not (math.isfinite(self.lr) and self.lr > 0 and self.temperature > 0 and self.clip > 0):
            raise ConfigError("--lr, --temperature and --clip must be larger than 0")
        if self.loss not in LOSSES:
            raise ConfigError(f"there is no loss {self.loss!r}", ", ".join(LOSSES))
        if self.precision not in PRECISIONS:
            raise ConfigError(f"there is no mixed precision {self.precision!r}", ", ".join(PRECISIONS))
        if self.schedule not in SCHEDULES:
            raise ConfigError(f"there is no schedule {self.schedule!r}", ", ".join(SCHEDULES))

    @property
    def every(self) -> int:
        """Steps from one look at the held-out text to the next."""
        return max(1, math.ceil(self.steps / self.checks))


@dataclass(frozen=True, slots=True, kw_only=True)
class Text:
    """Token ids to train on, and others that only judge.

    Attributes:
        train: sequences.
        held_out: sequences that no step sees.
    """

    train: Sequences
    held_out: Sequences

    @classmethod
    def split(cls, calibration: CalibrationSet, every: int = _HELD_OUT) -> Text:
        """Hold out every so many sequences of each domain.

        Raises:
            ConfigError: too few sequences for both parts.
        """
        seen: dict[str, int] = {}
        train: list[Sequence[int]] = []
        held_out: list[Sequence[int]] = []
        for domain, ids in zip(calibration.domains, calibration.sequences, strict=True):
            seen[domain] = seen.get(domain, 0) + 1
            if len(ids) > 1:
                (held_out if seen[domain] % every == 0 else train).append(ids)
        if not train or not held_out:
            raise ConfigError(
                f"{len(calibration.sequences)} sequences are too few to train on and to judge by",
                f"give at least {every} of a domain: raise --num-samples, or lower --max-length with --pack",
            )
        return cls(train=train, held_out=held_out)

    def of_step(self, step: int, recipe: Recipe, share: int = 1) -> Sequences:
        """What a step trains on: the text in an order that is drawn anew each time it has all been seen.

        Args:
            step: from 0.
            recipe: gives the seed and the tokens of a step.
            share: processes that divide the step among them; each is meant to take its part of what comes back.
        """
        per_step = max(1, round(recipe.step_tokens * share * len(self.train) / max(1, sum(map(len, self.train)))))
        found = []
        for place in range(step * per_step, (step + 1) * per_step):
            epoch, position = divmod(place, len(self.train))
            found.append(self.train[int(_order(recipe.seed, epoch, len(self.train))[position])])
        return found


@functools.lru_cache(maxsize=4)
def _order(seed: int, epoch: int, count: int) -> Any:
    return np.random.default_rng([seed, epoch]).permutation(count)


class Objective:
    """What a run does besides bringing the two distributions together; by default nothing.

    The trainer calls :meth:`running` around everything, :meth:`text` before a step, :meth:`extra` after each forward
    pass of a step and :meth:`after_step` after the weights moved. :meth:`state` and :meth:`restore` carry the
    objective over an interruption; the state that goes with the best weights is restored at the end.
    """

    def running(self, student: PreTrainedModel) -> contextlib.AbstractContextManager[None]:
        """Change how the student runs while it is trained and looked at."""
        return contextlib.nullcontext()

    def text(self, step: int, student: PreTrainedModel) -> Sequences | None:
        """Sequences of a step in the place of the given text, such as the student's own."""
        return None

    def watching(self, mask_BT: torch.Tensor) -> contextlib.AbstractContextManager[None]:
        """Around a forward pass of a step: see what it does."""
        return contextlib.nullcontext()

    def looking(
        self, student: PreTrainedModel, held_out: Sequences, batch_tokens: int
    ) -> contextlib.AbstractContextManager[None]:
        """Around a look at the held-out text; the state inside is the one that goes with the weights."""
        return contextlib.nullcontext()

    def extra(self) -> torch.Tensor | None:
        """A further loss of the forward pass that has just been, per token."""
        return None

    def after_step(self, step: int, share: float, sums: Sums) -> str:
        """The weights moved.

        Args:
            step: from 0.
            share: of the steps that are done.
            sums: adds a tensor up over processes.

        Returns:
            What the progress line should say, such as a measured rate.
        """
        return ""

    def state(self) -> dict[str, Any]:
        """JSON values that :meth:`restore` understands."""
        return {}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Be as when :meth:`state` gave this."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Distilled:
    """What a run came to.

    Attributes:
        before: divergence on the held-out text of the model as given, in nats per token.
        after: that of the model that came back.
        best_step: steps after which it was that; 0 is the model as given.
        steps: steps that were done.
        looks: held-out divergence by step.
        trained: parameters that could move.
    """

    before: float
    after: float
    best_step: int
    steps: int
    looks: Mapping[int, float]
    trained: int

    def record(self) -> dict[str, Any]:
        """As an artifact says it."""
        return {
            "held_out_kl": {"before": round(self.before, 6), "after": round(self.after, 6)},
            "best_step": self.best_step,
            "steps": self.steps,
            "looks": {str(step): round(value, 6) for step, value in self.looks.items()},
            "trained_parameters": self.trained,
        }


# --- what is trained --------------------------------------------------------------------------------------------------


def check_levels(levels: Sequence[str], more: Sequence[str] = ()) -> None:
    """Refuse levels that there are not.

    Raises:
        ConfigError: the message names the first one.
    """
    known = (*LEVELS, *more)
    unknown = sorted(set(levels) - {*known})
    if unknown or not levels:
        raise ConfigError(f"there is nothing to train called {unknown[0] if unknown else ''!r}", ", ".join(known))


def trainable(model: nn.Module, levels: Sequence[str]) -> dict[str, nn.Parameter]:
    """Parameters by name that some levels train.

    Args:
        model: a loaded model.
        levels: of ``router``, ``experts`` (shared ones too), ``attention``, ``norms`` and ``all``.

    Raises:
        ConfigError: a level is unknown, or names nothing in this model.
    """
    check_levels(levels)
    parts = levels_of(model)
    found = {
        name: parameter for name, parameter in model.named_parameters() if "all" in levels or parts.get(name) in levels
    }
    if not found:
        raise ConfigError(f"the model has nothing to train called {', '.join(levels)}")
    return found


def levels_of(model: nn.Module) -> dict[str, str]:
    """The level of every parameter of the decoder layers, told from where it stands and not from class names."""
    layers = expert_layers(model)
    routers = {id(value) for layer in layers for value in layer.router.parameters()}
    blocks = {id(value) for layer in layers for value in layer.block.parameters()}
    parts = {}
    for name, value in model.named_parameters():
        if id(value) in routers:
            parts[name] = "router"
        elif id(value) in blocks:
            parts[name] = "experts"
        elif value.dim() == 1 and "norm" in name:
            parts[name] = "norms"
        elif _TRAINABLE.search(name) and ".mlp." not in name:
            parts[name] = "attention"
    return parts


# --- the trainer ------------------------------------------------------------------------------------------------------


def distil(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    text: Text,
    recipe: Recipe,
    *,
    parameters: Mapping[str, nn.Parameter],
    objective: Objective | None = None,
    stored: Mapping[str, torch.dtype] | None = None,
    keep_zeros: bool = False,
    folder: Path | None = None,
    device: str | None = None,
) -> Distilled:
    """Train the student in place, and leave it with the best weights that were found.

    Args:
        student: in any dtype; afterwards it is in float32, with values that can be stored as they are.
        teacher: a model with the same vocabulary; it may be the student's own original.
        text: what is trained on, and what judges.
        recipe: how.
        parameters: those of the student that move, by name.
        objective: what else there is to do.
        stored: the dtype that each of them will be stored in; by default the one that it has.
        keep_zeros: values that are exactly zero stay so.
        folder: where the state of the run is kept, so that a killed run goes on; by default nowhere.
        device: ``cpu``, or what accelerate takes by default.

    Raises:
        EvaluationError: the divergence is not finite.
        ConfigError: the models' vocabularies differ.
    """
    dtypes = stored or {name: value.dtype for name, value in parameters.items()}
    trainer = Trainer(student, teacher, text, recipe, parameters, dtypes, objective or Objective(), device)
    if keep_zeros:
        trainer.keep_zeros()
    with trainer.objective.running(student):
        return trainer.run(folder)


class Trainer:
    """One run of :func:`distil`."""

    def __init__(
        self,
        student: PreTrainedModel,
        teacher: PreTrainedModel,
        text: Text,
        recipe: Recipe,
        parameters: Mapping[str, nn.Parameter],
        stored: Mapping[str, torch.dtype],
        objective: Objective,
        device: str | None = None,
    ) -> None:
        if student.config.get_text_config().vocab_size != teacher.config.get_text_config().vocab_size:
            raise ConfigError("the model and its original have different vocabularies", "which one was it made from?")
        import torch
        from accelerate import Accelerator
        from transformers import get_scheduler

        self.text, self.recipe, self.objective = text, recipe, objective
        self._stored, self._zeros = stored, dict[str, "torch.Tensor"]()
        self._whole = student.float()
        _freeze(student, parameters)
        # A parameter without gradient in some step (an expert that nobody chose) is no error in several processes.
        self._accelerator = Accelerator(cpu=device == "cpu", mixed_precision=recipe.precision, kwargs_handlers=_ddp())
        self._parameters = dict(parameters)
        optimizer = torch.optim.AdamW(
            self._parameters.values(), lr=recipe.lr, weight_decay=recipe.weight_decay, betas=(0.9, 0.98), eps=1e-8
        )
        self._schedule = get_scheduler(
            recipe.schedule if recipe.schedule != "constant" else "constant_with_warmup",
            optimizer,
            num_warmup_steps=round(recipe.warmup * recipe.steps),
            num_training_steps=recipe.steps,
        )
        self.student, self._optimizer = self._accelerator.prepare(student, optimizer)
        self.teacher = teacher.to(self._accelerator.device)

    def keep_zeros(self) -> None:
        """Let values that are zero now never be anything else."""
        self._zeros = {name: value.detach() != 0 for name, value in self._parameters.items() if (value == 0).any()}

    def run(self, folder: Path | None) -> Distilled:
        """All steps, or those that an earlier run of the same job has not done."""
        progress = load_progress(folder, self._parameters, self._optimizer) if folder else None
        if progress is None:
            progress = Progress(best=self._rounded())
            self._look(progress)
        else:
            self._schedule.load_state_dict(progress.schedule)
            for group, lr in zip(self._optimizer.param_groups, self._schedule.get_last_lr(), strict=True):
                group["lr"] = lr  # the schedule sets it when it moves on, and the next step comes before that
            self.objective.restore(progress.objective)
        with _bar(self.recipe.steps, progress.step) as bar:
            while progress.step < self.recipe.steps and not self._tired(progress):
                kl, remark = self._step(progress.step)
                progress.step += 1
                bar.update()
                bar.set_postfix_str(f"KL {kl:.4f}{remark}, held out {progress.looks[max(progress.looks)]:.4f}")
                if progress.step % self.recipe.every == 0 or progress.step == self.recipe.steps:
                    self._look(progress)
                    progress.schedule, progress.objective = self._schedule.state_dict(), self.objective.state()
                    if folder and self._accelerator.is_main_process:
                        save_progress(folder, progress, self._parameters, self._optimizer)
        return self._best(progress)

    def _step(self, step: int) -> tuple[float, str]:
        """Move the weights once; the mean divergence, and the objective's remark."""
        import torch

        processes = self._accelerator.num_processes
        given = self.objective.text(step, self._whole)
        sequences = self.text.of_step(step, self.recipe, processes) if given is None else given
        mine = sequences[self._accelerator.process_index :: processes]
        total = sum(len(ids) - 1 for ids in sequences) / processes  # gradients are averaged over processes
        kl_sum = torch.zeros((), device=self._accelerator.device)
        for _, ids_BT, mask_BT in batches(mine, self.recipe.batch_tokens):
            kl_sum += self._backward(ids_BT.to(kl_sum.device), mask_BT.to(kl_sum.device), total)
        self._accelerator.clip_grad_norm_(self._parameters.values(), self.recipe.clip)
        self._optimizer.step()
        self._schedule.step()
        self._optimizer.zero_grad()
        with torch.no_grad():
            for name, mask in self._zeros.items():
                self._parameters[name].mul_(mask)
        kl = float(self._sums(kl_sum)) / (total * processes)
        if not math.isfinite(kl):
            raise EvaluationError("the divergence is not finite", "lower --lr, or train without mixed precision")
        return kl, self.objective.after_step(step, (step + 1) / self.recipe.steps, self._sums)

    def _backward(self, ids_BT: torch.Tensor, mask_BT: torch.Tensor, total: float) -> torch.Tensor:
        """Add the gradients of one forward pass; the sum of its divergences."""
        import torch

        with self.objective.watching(mask_BT):
            student_NV = predicting(self.student, ids_BT, mask_BT)
        with torch.no_grad():
            teacher_NV = predicting(self.teacher, ids_BT, mask_BT)
        heat, reverse = self.recipe.temperature, self.recipe.loss == "reverse"
        kl_sum = divergence(teacher_NV, student_NV, temperature=heat, reverse=reverse).sum()
        loss = kl_sum / total
        if self.recipe.loss == "text":
            next_N = ids_BT[:, 1:][mask_BT[:, 1:].bool()]
            loss = torch.nn.functional.cross_entropy(student_NV, next_N, reduction="sum") / total
        extra = self.objective.extra()
        if extra is not None:
            loss = loss + extra * (len(student_NV) / total)
        self._accelerator.backward(loss)
        return kl_sum.detach()

    def _sums(self, value: torch.Tensor) -> torch.Tensor:
        total: torch.Tensor = self._accelerator.reduce(value.to(self._accelerator.device), "sum")
        return total

    # --- what judges ---

    def _look(self, progress: Progress) -> None:
        """Measure the held-out divergence with rounded weights, and remember them if it is the lowest."""
        rounded = self._rounded()
        looking = self.objective.looking(self._whole, self.text.held_out, self.recipe.batch_tokens)
        with _holding(self._parameters, rounded), looking:
            value, state = self._held_out(), self.objective.state()
        progress.looks[progress.step] = value
        if progress.step == 0 or value < progress.looks[progress.best_step]:
            progress.best_step, progress.best, progress.best_objective = progress.step, rounded, state

    def _held_out(self) -> float:
        ranks = self._accelerator.process_index, self._accelerator.num_processes
        found = held_out_sums(self._whole, self.teacher, self.text.held_out, self.recipe.batch_tokens, *ranks)
        total, tokens = self._sums(found).tolist()
        if not math.isfinite(total):
            raise EvaluationError("the divergence on the held-out text is not finite", "lower --lr")
        return float(total / tokens)

    def _tired(self, progress: Progress) -> bool:
        late = [step for step in progress.looks if step > progress.best_step]
        return bool(self.recipe.patience) and len(late) >= self.recipe.patience

    def _rounded(self) -> dict[str, torch.Tensor]:
        """The weights as the checkpoint will store them."""
        return {name: value.detach().to(self._stored[name], copy=True) for name, value in self._parameters.items()}

    def _best(self, progress: Progress) -> Distilled:
        import torch

        with torch.no_grad():
            for name, value in self._parameters.items():
                value.copy_(progress.best[name])
        self.objective.restore(progress.best_objective)
        return Distilled(
            before=progress.looks[0],
            after=progress.looks[progress.best_step],
            best_step=progress.best_step,
            steps=progress.step,
            looks=copy.copy(progress.looks),
            trained=sum(value.numel() for value in self._parameters.values()),
        )


def held_out_divergence(student: nn.Module, teacher: nn.Module, sequences: Sequences, batch_tokens: int) -> float:
    """KL(teacher || student) in nats per predicted token."""
    total, tokens = held_out_sums(student, teacher, sequences, batch_tokens).tolist()
    return float(total / tokens)


def held_out_sums(
    student: nn.Module, teacher: nn.Module, sequences: Sequences, batch_tokens: int, first: int = 0, every: int = 1
) -> torch.Tensor:
    """Sum of the divergences and number of predicted tokens, of every so many batches: [2]."""
    import torch

    found = torch.zeros(2, dtype=torch.float64)
    device = next(student.parameters()).device
    for number, (_, ids_BT, mask_BT) in enumerate(batches(sequences, batch_tokens)):
        if number % every == first:
            ids, mask = ids_BT.to(device), mask_BT.to(device)
            with torch.no_grad():
                teacher_NV, student_NV = predicting(teacher, ids, mask), predicting(student, ids, mask)
            kl_N = divergence(teacher_NV, student_NV)
            found += torch.tensor([float(kl_N.double().sum()), len(kl_N)])
    return found


def predicting(model: Any, ids_BT: torch.Tensor, mask_BT: torch.Tensor) -> torch.Tensor:
    """Logits [N, V] of the tokens after which another one comes."""
    logits_BTV = model(input_ids=ids_BT, attention_mask=mask_BT, use_cache=False).logits
    logits_NV: torch.Tensor = logits_BTV[:, :-1][mask_BT[:, 1:].bool()].float()
    return logits_NV


def divergence(
    teacher_NV: torch.Tensor, student_NV: torch.Tensor, *, temperature: float = 1.0, reverse: bool = False
) -> torch.Tensor:
    """Kullback-Leibler divergence of each prediction [N] in nats, times the square of the temperature.

    Args:
        teacher_NV: logits.
        student_NV: logits.
        temperature: that softens both.
        loss: ``forward`` is KL(teacher || student), ``reverse`` KL(student || teacher), ``text`` the negative
            log-likelihood of the text itself, for text that the teacher wrote.
    """
    import torch

    p_NV, q_NV = (torch.log_softmax(logits / temperature, dim=-1) for logits in (teacher_NV, student_NV))
    if reverse:
        p_NV, q_NV = q_NV, p_NV
    kl_N: torch.Tensor = (p_NV.exp() * (p_NV - q_NV)).sum(dim=-1) * temperature**2
    return kl_N


@contextlib.contextmanager
def _holding(parameters: Mapping[str, nn.Parameter], values: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """Let parameters have other values inside the block."""
    own = {name: parameter.data for name, parameter in parameters.items()}
    try:
        for name, parameter in parameters.items():
            parameter.data = values[name].to(own[name].dtype)
        yield
    finally:
        for name, parameter in parameters.items():
            parameter.data = own[name]


def _freeze(model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> None:
    chosen = {id(parameter) for parameter in parameters.values()}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in chosen)


def _ddp() -> list[Any]:
    from accelerate import DistributedDataParallelKwargs

    return [DistributedDataParallelKwargs(find_unused_parameters=True)]


def _bar(total: int, done: int) -> Any:
    import sys

    from tqdm import tqdm

    silent = quiet.get() or not sys.stderr.isatty()
    return tqdm(desc="distilling", total=total, initial=done, unit="step", disable=silent, file=sys.stderr, leave=False)
