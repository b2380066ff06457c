"""Fit a pruned model to its original one decoder layer at a time, so that neither need be in memory as a whole.

Layer by layer both models run side by side. Each layer of the pruned one is given what the healed layers before it
make of the text, and is fitted to what the original's layer gives for the original's own states: so it takes back part
of the error that came in, and not only of its own. The last layer is fitted to the original's next-token distribution.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moeprune._files import progress
from moeprune.errors import ConfigError, UnsupportedModelError
from moeprune.evaluation.agreement import batches
from moeprune.experts import expert_layers
from moeprune.healing.distillation import Text
from moeprune.healing.fitting import Fitted, Schedule, fit
from moeprune.healing.targets import divergence, hidden_loss
from moeprune.rewrite.changed import Changes, stored_tensors
from moeprune.streaming.states import Saved, SpilledStates, States
from moeprune.streaming.stream import LayerStream
from moeprune.streaming.weights import torch_dtypes

if TYPE_CHECKING:
    import torch

    from moeprune.healing.targets import Loss

    Inputs = dict[str, torch.Tensor]
    Parameters = dict[str, torch.nn.Parameter]

LEVELS = ("all", "experts", "down", "router")
COPIES = 5  # of a layer while it is fitted: values, gradients, two moments, the best so far
_NOTHING = 1e-10  # a loss that is not worth a step


@dataclass(frozen=True, slots=True, kw_only=True)
class Healed:
    """What the fits came to.

    Attributes:
        layers: by decoder layer; one with nothing to train is absent.
        before, after: mean KL(original || model) per token on the held-out text, in nats.
        tokens: of the held-out text.
    """

    layers: dict[int, Fitted]
    before: float
    after: float
    tokens: int


class LayerwiseHealing:
    """Both models side by side, with the states of the text between their layers.

    Args:
        base: the original.
        given: the pruned model, whose layers are fitted in float32.
        text: what to fit on, and what judges.
        train: which parameters of a layer: ``all``; the routed ``experts`` with their router; their ``down``
            projections; or the ``router``.
        schedule: how long and how fast.
        step_tokens: tokens of a batch, padding included; each step takes one.
        changes: where finished layers and states go, so that a killed run goes on.
        spill: keep the states in files.

    Attributes:
        keeps_original: whether the original's layer is in memory too while a layer is fitted.
    """

    keeps_original = False

    def __init__(
        self,
        base: LayerStream,
        given: LayerStream,
        text: Text,
        *,
        train: str = "all",
        schedule: Schedule | None = None,
        step_tokens: int = 1024,
        changes: Changes,
        spill: bool = False,
    ) -> None:
        self._base, self._given, self._changes = base, given, changes
        self._train, self._schedule, self._spill = train, schedule or Schedule(), spill
        self._batches = [*_inputs(text.train, step_tokens), *_inputs(text.held_out, step_tokens)]
        held = sum(1 for _ in _inputs(text.held_out, step_tokens))
        self._fitted_on, self._held = range(len(self._batches) - held), range(len(self._batches))[-held:]
        self._experts = {layer.index: layer for layer in expert_layers(given.model)}
        counts = {"base": len(self._batches), "healed": len(self._batches), "given": held}
        self._states = {name: _states(count, changes.folder / name, spill) for name, count in counts.items()}

    def run(self) -> Healed:
        """Heal all layers, after those that an earlier run had finished.

        Raises:
            CheckpointError: a file cannot be read; the message names it.
        """
        import torch

        with torch.no_grad():
            start = self._go_on()
            if not start:
                self._base.embed(self._batches, self._states["base"])
                self._given.embed(self._batches, self._states["healed"])
                self._given.embed([self._batches[number] for number in self._held], self._states["given"])
        for index in progress(range(start, self._base.depth), "healing", unit="layer"):
            self._layer(index)
        records = {index: self._changes.record(index) for index in range(self._base.depth)}
        kl = records[self._base.depth - 1]["held_out_kl"]
        return Healed(
            layers={index: Fitted(**record["fitted"]) for index, record in records.items() if record["fitted"]},
            before=kl["before"],
            after=kl["after"],
            tokens=sum(int(self._batches[number]["attention_mask"].sum()) for number in self._held),
        )

    def _go_on(self) -> int:
        """The first layer that is not finished, with the states before it in place."""
        start = 0
        while self._changes.finished(start):
            start += 1
        if 0 < start < self._base.depth:
            saved = self._changes.record(start - 1)["states"]
            for name, states in self._states.items():
                states.restore(self._changes.folder / name, _saved(saved[name]))
        return start

    # --- one layer ----------------------------------------------------------------------------------------------------

    def _layer(self, index: int) -> None:
        import torch

        with contextlib.ExitStack() as original:
            original.enter_context(self._base.layer(index))
            with torch.no_grad():
                self._advance(index, self._base, self._states["base"], range(len(self._batches)))
            if not self.keeps_original:
                original.close()
            with self._given.layer(index), self._loss(index) as loss:
                self._heal(index, loss)

    def _heal(self, index: int, loss: Loss) -> None:
        """The layer of the given model that is in memory: fit it, run it, and hand it over."""
        import torch

        with torch.no_grad():
            self._advance(index, self._given, self._states["given"], self._held)
        parameters = self._parameters(index)
        fitted = self._fit(index, parameters, loss) if parameters else None
        improved = parameters if fitted is not None and fitted.best else {}
        tensors = stored_tensors(self._given.weights, index, self._rounded(index, improved))
        with torch.no_grad():
            self._advance(index, self._given, self._states["healed"], range(len(self._batches)))
            kl = self._divergence(loss) if index == self._base.depth - 1 else None
        saved = {name: self._save(name) for name in self._states}
        record = {"fitted": dataclasses.asdict(fitted) if fitted else None, "states": saved, "held_out_kl": kl}
        self._changes.add(index, tensors, record)

    @contextlib.contextmanager
    def _loss(self, index: int) -> Iterator[Loss]:
        """What the layer is fitted by, with the heads in memory where it is the last."""
        if index < self._base.depth - 1:
            yield hidden_loss(self._base, index)
            return
        with self._base.head(), self._given.head():
            yield divergence(self._base, self._given)

    def _advance(self, index: int, stream: LayerStream, states: States, numbers: range) -> None:
        """Run the layer that is in memory on the states of some batches."""
        for place, number in enumerate(numbers):
            states.put(place, stream.run(index, states.get(place), self._batches[number]))
        states.turn()

    def _save(self, name: str) -> dict[str, Any]:
        return dataclasses.asdict(self._states[name].save(self._changes.folder / name))

    def _fit(self, index: int, parameters: Parameters, loss: Loss) -> Fitted:
        import torch

        def of_batch(number: int) -> torch.Tensor:
            state = self._given.run(index, self._states["healed"].get(number), self._batches[number], trim=False)
            return loss(self._real(state, number), self._real(self._states["base"].get(number), number))

        def held_out() -> float:
            with torch.no_grad():
                return self._mean(of_batch)

        if held_out() < _NOTHING:
            return Fitted(before=0.0, after=0.0, steps=0, best=0)
        return self._search(index, parameters, of_batch, held_out)

    def _search(
        self,
        index: int,
        parameters: Parameters,
        loss: Callable[[int], torch.Tensor],
        held_out: Callable[[], float],
    ) -> Fitted:
        """Leave the best values that are found in the parameters."""
        for parameter in parameters.values():
            parameter.requires_grad_(True)
        minutes = self._schedule.minutes
        fitted = fit(
            parameters,
            loss,
            len(self._fitted_on),
            held_out,
            self._schedule,
            rate=self._schedule.rate(int(self._given.model.config.get_text_config().hidden_size)),
            routers=frozenset(name for name in parameters if name in self._names_of(index, "router")),
            seconds=None if minutes is None else 60 * minutes / self._base.depth,
        )
        for parameter in parameters.values():
            parameter.requires_grad_(False)
        return fitted

    def _mean(self, of_batch: Any) -> float:
        """Mean over the held-out tokens."""
        counts = {number: int(self._batches[number]["attention_mask"].sum()) for number in self._held}
        return sum(float(of_batch(number)) * count for number, count in counts.items()) / sum(counts.values())

    def _divergence(self, loss: Loss) -> dict[str, float]:
        """Held-out KL from the original, of the given model and of the healed one."""
        own = self._states

        def between(name: str, number: int) -> torch.Tensor:
            place = number - self._held.start if name == "given" else number
            return loss(self._real(own[name].get(place), number), self._real(own["base"].get(number), number))

        before, after = (self._mean(lambda number, name=name: between(name, number)) for name in ("given", "healed"))
        return {"before": before, "after": after}

    def _real(self, state: Sequence[torch.Tensor], number: int) -> torch.Tensor:
        """The hidden states of tokens that are no padding, [N, H], on the device."""
        real_BT = self._batches[number]["attention_mask"].bool()
        hidden_BTH = state[0].to(self._given.device)
        return hidden_BTH[real_BT.to(hidden_BTH.device)]

    # --- parameters ---------------------------------------------------------------------------------------------------

    def _parameters(self, index: int) -> Parameters:
        """What is trained of a layer, by name in the model."""
        own = dict(self._given.model.named_parameters())
        names = {piece.parameter for piece in self._given.weights.pieces(index)} & own.keys()
        if self._train != "all":
            names &= self._names_of(index, self._train)
        return {name: own[name] for name in sorted(names)} if self._schedule.steps else {}

    def _names_of(self, index: int, level: str) -> set[str]:
        """Names of the parameters of a layer's routed experts, or of parts of them."""
        layer = self._experts.get(index)
        if layer is None:
            return set()
        names = {id(value): name for name, value in self._given.model.named_parameters()}
        router = {names[id(value)] for value in layer.router.parameters()}
        experts = {names[id(value)] for value in layer.experts.parameters()}
        down = {name for name in experts if name.rpartition(".")[2].startswith("down_proj")}
        return {"router": router, "down": down, "experts": experts | router}[level]

    def _rounded(self, index: int, parameters: Parameters) -> dict[str, torch.Tensor]:
        """The parameters, in place, as the checkpoint will store them: the layers behind see what will be there."""
        import torch

        dtypes = {piece.parameter: piece.stored[""].dtype for piece in self._given.weights.pieces(index)}
        with torch.no_grad():
            for name, value in parameters.items():
                value.copy_(value.to(torch_dtypes()[dtypes[name]]))
        return {name: value.detach() for name, value in parameters.items()}


def check_pair(base: LayerStream, given: LayerStream) -> None:
    """Refuse two models whose layers cannot be compared.

    Raises:
        ConfigError: they have different widths, depths or vocabularies.
        UnsupportedModelError: a layer hands on more than hidden states.
    """
    for key in ("hidden_size", "num_hidden_layers", "vocab_size"):
        values = [getattr(stream.model.config.get_text_config(), key) for stream in (base, given)]
        if values[0] != values[1]:
            raise ConfigError(
                f"the two models do not belong together: {key} is {values[0]} and {values[1]}",
                "give the original first, then what was made from it",
            )
    if not given.whole_layers:
        raise UnsupportedModelError("a layer is fitted with all of its experts in memory", "give more with --memory")


def _inputs(sequences: Any, step_tokens: int) -> Iterator[Inputs]:
    for _, ids_BT, mask_BT in batches(sequences, step_tokens):
        yield {"input_ids": ids_BT, "attention_mask": mask_BT}


def _states(batches: int, folder: Path, spill: bool) -> States:
    folder.mkdir(exist_ok=True)
    return SpilledStates(batches, folder) if spill else States(batches)


def _saved(record: dict[str, Any]) -> Saved:
    layout = [[(tuple(shape), dtype) for shape, dtype in batch] for batch in record["layout"]]
    return Saved(file=record["file"], digest=record["digest"], layout=layout)
