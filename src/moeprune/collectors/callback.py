"""Statistics while a model is trained by transformers' ``Trainer``."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moeprune._files import PathLike, check_output_file
from moeprune.collectors.distributed import from_environment, process_group, reduce_layers
from moeprune.collectors.probe import Observation, observe
from moeprune.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, TrainerCallback


def statistics_callback(
    output: PathLike,
    *,
    every_steps: int,
    domain: str = "default",
    like: PathLike | None = None,
    overwrite: bool = False,
) -> TrainerCallback:
    """A callback for ``Trainer`` that observes the model during training and writes a statistics file.

    The file is written every few optimizer steps and at the end, each time whole, and holds the sums since training
    began. Every training token counts once, also under gradient accumulation and checkpointing; tokens of evaluations
    do not count, for the model is not in training mode then. In a run of several processes the first one writes the
    sums of all. Parameters change while they are observed: the statistics are those of the model on its way.

    Args:
        output: statistics file to write.
        every_steps: optimizer steps between two writes.
        domain: label of the tokens.
        like: the checkpoint folder that the plan will be made for; by default the one the model was loaded from.
        overwrite: replace ``output`` where there is one before training.

    Raises:
        ConfigError: ``output`` exists or cannot be written, or, when training begins, the model is run by
            ``torch.nn.DataParallel``.

    Example:
        >>> callback = moeprune.statistics_callback("statistics.safetensors", every_steps=100)
        >>> Trainer(model, arguments, train_dataset=data, callbacks=[callback]).train()
    """
    from transformers import TrainerCallback

    if every_steps < 1:
        raise ConfigError(f"every_steps must be at least 1, not {every_steps}")
    if from_environment().first:
        check_output_file(output, overwrite=overwrite)
    recorder = _Recorder(Path(output), domain=domain, like=like)

    class StatisticsCallback(TrainerCallback):  # type: ignore[misc]  # transformers has no types here
        def on_train_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:
            recorder.begin(others["model"], copies=args.n_gpu)

        def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
            if state.global_step % every_steps == 0:
                recorder.write(state.global_step)

        def on_train_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
            recorder.write(state.global_step)
            recorder.end()

    return StatisticsCallback()


class _Recorder:
    """Observes a model from the begin of its training to the end."""

    def __init__(self, output: Path, *, domain: str, like: PathLike | None) -> None:
        self._output = output
        self._domain = domain
        self._like = like
        self._undo = contextlib.ExitStack()
        self._observation: Observation | None = None
        self._written = -1  # the step of the last write

    def begin(self, model: PreTrainedModel, *, copies: int) -> None:
        """Observe the model, and only while it is in training mode."""
        self.end()  # of a training that was broken off
        if copies > 1:
            raise ConfigError(
                f"torch.nn.DataParallel would run {copies} copies of the model, which cannot be observed",
                "run one process per device, with `accelerate launch` or `torchrun`",
            )
        observation = self._undo.enter_context(
            observe(model, domain=self._domain, like=self._like, domains=(self._domain,))
        )

        def pause(module: Any, _: Any) -> None:
            observation.paused = not module.training

        hook = model.base_model.register_forward_pre_hook(pause, prepend=True)
        self._undo.callback(hook.remove)
        self._observation, self._written = observation, -1

    def write(self, step: int) -> None:
        """Write what was added up since training began, in all processes together."""
        if self._observation is None or step == self._written:
            return
        with process_group() as ranks:
            layers = reduce_layers(self._observation.arrays(), ranks)
        if layers is not None and any(arrays.total["tokens"].any() for arrays in layers.values()):
            command = {"stage": "observe", "optimizer_steps": step}
            self._observation.statistics(layers, command=command).save(self._output)
        self._written = step

    def end(self) -> None:
        """Leave the model as it was."""
        self._undo.close()
        self._observation = None
