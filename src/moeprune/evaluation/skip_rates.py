"""How much a gated model skips on the tokens of each task: rates that hold on running text need not hold there."""

from __future__ import annotations

import contextlib
import inspect
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from moeprune._files import to_json, write_atomic
from moeprune.errors import EvaluationError
from moeprune.experts import GATES_ATTRIBUTE
from moeprune.runtime.skipping import SkipCounter

if TYPE_CHECKING:
    import torch

FILE = "skipping.json"  # beside lm-eval's results
_NOBODY = -1  # asks for padding

Tasks = frozenset[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Skipped:
    """Slots of the experts that a task's tokens were routed to, and those of them that ran."""

    slots: int
    kept: int

    @property
    def rate(self) -> float:
        """Share that was skipped."""
        return 1 - self.kept / self.slots if self.slots else 0.0


def add_skipped(parts: Sequence[Skipped]) -> Skipped:
    """The counts of several tasks together."""
    return Skipped(slots=sum(part.slots for part in parts), kept=sum(part.kept for part in parts))


def write_skipped(folder: Path, found: Mapping[str, Skipped]) -> None:
    """Leave the counts beside lm-eval's results."""
    if found:
        write_atomic(folder / FILE, to_json({task: asdict(skipped) for task, skipped in sorted(found.items())}))


def read_skipped(folder: Path) -> dict[str, Skipped]:
    """The counts by task; none where nothing was skipped.

    Raises:
        EvaluationError: the file is damaged.
    """
    file = folder / FILE
    try:
        return {task: Skipped(**fields) for task, fields in json.loads(file.read_bytes()).items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise EvaluationError(f"cannot read {file}: {error!r}") from error


class RateWatch(SkipCounter):
    """Sees which tokens of which task lm-eval's hf model runs, and what its gates let through.

    lm-eval pads what it asks without a mask that would say so, mixes tasks in a batch, and asks once what several tasks
    want to know; so every row is told by its tokens, and counts for all tasks that ask it. Of generated answers those
    rows count that have not come to their end.
    """

    def __init__(self, lm: Any) -> None:
        super().__init__()
        self._lm = lm
        self._signature = inspect.signature(lm.model.base_model.forward)
        self._askers: dict[Tasks, int] = {}  # those who ask the same, numbered
        self._questions: dict[bytes, Tasks] = {}  # by the tokens that are run
        self._prompts: dict[str, Tasks] = {}  # by the text that is gone on with
        self._asked: list[str] = []  # task of each question, in the order in which they are asked
        self._rows: list[int] = []  # who asks for each row of the running batch of answers
        self._asker_T: npt.NDArray[np.int64] = np.zeros(0, dtype=np.int64)
        self._sums: npt.NDArray[np.int64] = np.zeros((0, 2), dtype=np.int64)  # slots and those that ran, by asker

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Watch inside the block; a model that has no gates is left alone."""
        lm, gates = self._lm, getattr(self._lm.model, GATES_ATTRIBUTE, {})
        if not gates:
            yield
            return
        lm.loglikelihood = self._see_loglikelihood(lm.loglikelihood)
        lm._loglikelihood_tokens = self._see_tokens(lm._loglikelihood_tokens)  # noqa: SLF001 - no public place has them
        lm.generate_until = self._see_generate_until(lm.generate_until)
        lm.tok_batch_encode = self._see_tok_batch_encode(lm.tok_batch_encode)
        hook = lm.model.base_model.register_forward_pre_hook(self._begin, with_kwargs=True)
        before = {gate: gate.counter for gate in gates.values()}
        try:
            for gate in gates.values():
                gate.counter = self
            yield
        finally:
            hook.remove()
            for gate, counter in before.items():
                gate.counter = counter

    def see(self, layer: int, row_flops: int, keep_TK: torch.Tensor) -> None:
        """Add what a gate decided for the tokens that run."""
        real_T = self._asker_T != _NOBODY
        kept_T, asker_T = keep_TK.sum(dim=-1).cpu().numpy()[real_T], self._asker_T[real_T]
        size = len(self._askers)
        found = [np.bincount(asker_T, minlength=size) * keep_TK.shape[-1], np.bincount(asker_T, kept_T, size)]
        before = np.zeros((size - len(self._sums), 2), dtype=np.int64)
        self._sums = np.concatenate([self._sums, before]) + np.array(found, dtype=np.int64).T

    def count(self) -> dict[str, Skipped]:
        """The counts by task; none of a model that has no gates."""
        found: dict[str, list[Skipped]] = {}
        for tasks, (slots, kept) in zip(self._askers, self._sums.tolist(), strict=False):
            for task in tasks:
                found.setdefault(task, []).append(Skipped(slots=slots, kept=kept))
        return {task: add_skipped(parts) for task, parts in found.items()}

    # --- what lm-eval is about to ask ---------------------------------------------------------------------------------

    def _number(self, tasks: Tasks) -> int:
        return self._askers.setdefault(tasks, len(self._askers))

    def _see_loglikelihood(self, own: Callable[..., Any]) -> Callable[..., Any]:
        def ask(requests: Sequence[Any], *others: Any, **options: Any) -> Any:
            self._rows, self._asked = [], [request.task_name for request in requests]
            return own(requests, *others, **options)

        return ask

    def _see_tokens(self, own: Callable[..., Any]) -> Callable[..., Any]:
        def ask(requests: Sequence[Any], *others: Any, **options: Any) -> Any:
            longest = self._lm.max_length + 1
            for task, (_, context, continuation) in zip(self._asked, requests, strict=True):
                ids = np.array([*context, *continuation][-longest:][:-1], dtype=np.int64).tobytes()
                self._questions[ids] = self._questions.get(ids, frozenset()) | {task}
            return own(requests, *others, **options)

        return ask

    def _see_generate_until(self, own: Callable[..., Any]) -> Callable[..., Any]:
        def ask(requests: Sequence[Any], *others: Any, **options: Any) -> Any:
            for request in requests:
                text = request.args[0]
                self._prompts[text] = self._prompts.get(text, frozenset()) | {request.task_name}
            try:
                return own(requests, *others, **options)
            finally:
                self._prompts, self._rows = {}, []

        return ask

    def _see_tok_batch_encode(self, own: Callable[..., Any]) -> Callable[..., Any]:
        def encode(texts: Sequence[str], *others: Any, **options: Any) -> Any:
            self._rows = [self._number(self._prompts[text]) for text in texts] if self._prompts else []
            return own(texts, *others, **options)

        return encode

    # --- what runs ----------------------------------------------------------------------------------------------------

    def _begin(self, _: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        given = self._signature.bind_partial(*args, **kwargs).arguments | dict(kwargs)
        ids_BT, mask = given["input_ids"].cpu().numpy(), given.get("attention_mask")
        self._asker_T = (self._answers(ids_BT, mask) if self._rows else self._asked_rows(ids_BT)).reshape(-1)

    def _asked_rows(self, ids_BT: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Who asks every token of questions that are padded with zeros at their end."""
        asker_BT = np.full(ids_BT.shape, _NOBODY)
        for ids, asker in zip(ids_BT, asker_BT, strict=True):
            least = int(ids.nonzero()[0].max(initial=-1)) + 1
            for length in range(least, len(ids) + 1):
                tasks = self._questions.get(ids[:length].tobytes())
                if tasks is not None:
                    asker[:length] = self._number(tasks)
                    break
        return asker_BT

    def _answers(self, ids_BT: npt.NDArray[np.int64], mask: torch.Tensor | None) -> npt.NDArray[np.int64]:
        """Who asks every token of questions that are padded at their begin, or of one more token of their answers."""
        rows = np.repeat(self._rows, len(ids_BT) // len(self._rows))  # several beams of each
        real_BT = np.ones(ids_BT.shape, dtype=np.bool_)
        if mask is not None:
            real_BT = mask[:, -ids_BT.shape[1] :].bool().cpu().numpy()
            if mask.shape[1] > ids_BT.shape[1]:  # what has come to its end is padded until all have
                real_BT &= ids_BT != self._lm.tokenizer.pad_token_id
        return np.where(real_BT, rows[:, None], _NOBODY)
