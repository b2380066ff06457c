"""Answers that ended at the limit on their length: a model that would have gone on is judged by half an answer.

In this process the generated tokens themselves are looked at, which is exact. Of a run in another process only texts
are left, and their tokens are counted again: a text that was cut has about as many as the limit allows.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from moeprune._files import to_json, write_atomic
from moeprune.errors import EvaluationError

FILE = "generation.json"  # beside lm-eval's results
DEFAULT_LIMIT = 256  # tokens, where neither the task nor the user says otherwise: lm-eval's own

_LIMITS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_NEARLY = 0.98  # of the limit: a text need not be split into the tokens that it was generated as


@dataclass(frozen=True, slots=True, kw_only=True)
class Answers:
    """How the answers to one task ended.

    Attributes:
        answers: generated answers; cut: those that ended at the limit without having come to an end.
        limit: tokens; where the task's questions have several limits, the largest.
        exact: whether tokens were seen as they were generated, and not counted again in the text.
    """

    answers: int
    cut: int
    limit: int
    exact: bool


def answer_limit(generation: Mapping[str, Any] | None, usual: int = DEFAULT_LIMIT) -> int:
    """Most tokens of an answer by a task's or a request's ``generation_kwargs``, found as lm-eval finds it."""
    given = (generation or {}).items()
    limits = {name: int(value) for name, value in given if name in _LIMITS and value is not None}
    return next((limits[name] for name in _LIMITS if name in limits), usual)


def add_answers(parts: Sequence[Answers]) -> Answers:
    """The counts of several tasks together."""
    return Answers(
        answers=sum(part.answers for part in parts),
        cut=sum(part.cut for part in parts),
        limit=max(part.limit for part in parts),
        exact=all(part.exact for part in parts),
    )


def write_answers(folder: Path, found: Mapping[str, Answers]) -> None:
    """Leave the counts beside lm-eval's results."""
    if found:
        write_atomic(folder / FILE, to_json({task: asdict(answers) for task, answers in sorted(found.items())}))


def read_answers(folder: Path) -> dict[str, Answers]:
    """The counts by task; none where nobody counted.

    Raises:
        EvaluationError: the file is damaged.
    """
    file = folder / FILE
    try:
        return {task: Answers(**fields) for task, fields in json.loads(file.read_bytes()).items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise EvaluationError(f"cannot read {file}: {error!r}") from error


# --- in this process --------------------------------------------------------------------------------------------------


class AnswerWatch:
    """Sees the tokens that lm-eval's hf model generates, and which answer they became.

    lm-eval tells its cache hook of every answer, in the order in which the batches were generated.
    """

    def __init__(self, lm: Any) -> None:
        self._lm = lm
        self._generate = lm._model_generate  # noqa: SLF001 - lm-eval has no public place that sees tokens
        self._ended: deque[bool] = deque()
        self._cut: dict[str, bool] = {}
        lm._model_generate = self._watched  # noqa: SLF001
        lm.set_cache_hook(self)

    def _watched(self, context: Any, max_length: int, stop: Sequence[str], **options: Any) -> Any:
        tokens_BT = self._generate(context=context, max_length=max_length, stop=stop, **options)
        begin = context.shape[1]
        full = tokens_BT.shape[1] >= max_length
        self._ended += [not full or self._came_to_an_end(row[begin:].tolist(), stop) for row in tokens_BT]
        return tokens_BT

    def _came_to_an_end(self, tokens: list[int], stop: Sequence[str]) -> bool:
        ends = getattr(self._lm.model.generation_config, "eos_token_id", None)
        if {*(ends if isinstance(ends, list) else [ends])} & {*tokens}:
            return True
        text = self._lm.tok_decode(tokens, skip_special_tokens=False)
        return any(end in text for end in stop if end)

    def add_partial(self, kind: str, request: tuple[str, Any], _answer: Any) -> None:
        """What lm-eval calls after every answer."""
        if kind == "generate_until":
            self._cut[_key(*request)] = not self._ended.popleft()

    def count(self, samples: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, Answers]:
        """The counts by task, from lm-eval's samples."""
        found = {}
        for task, rows in samples.items():
            requests = [request for row in _once(rows) for request in row["arguments"] if _is_generation(request)]
            if requests:
                cut = sum(self._cut.get(_key(*request), False) for request in requests)
                limit = max(answer_limit(request[1]) for request in requests)
                found[task] = Answers(answers=len(requests), cut=cut, limit=limit, exact=True)
        return found


def _key(context: str, generation: Any) -> str:
    return json.dumps([context, generation], sort_keys=True, default=str)


def _is_generation(request: Sequence[Any]) -> bool:
    return len(request) == 2 and isinstance(request[1], Mapping)


def _once(rows: Sequence[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    """One row per document: lm-eval has one for every filter."""
    first = rows[0]["filter"] if rows else ""
    return (row for row in rows if row["filter"] == first)


# --- of another process -----------------------------------------------------------------------------------------------


def count_again(files: Mapping[str, Path], tokenizer: Any, usual: int = DEFAULT_LIMIT) -> dict[str, Answers]:
    """The counts by task, from the texts in lm-eval's sample files.

    Args:
        files: sample file of each task.
        tokenizer: the models' own.
        usual: limit of the answers whose requests name none.
    """
    found = {}
    for task, file in files.items():
        rows = [json.loads(line) for line in file.read_bytes().splitlines()]
        answers = [answer for row in _once(rows) for answer in _texts(row, usual)]
        if answers:
            lengths = [len(tokenizer.encode(text, add_special_tokens=False)) for text, _ in answers]
            limits = [limit for _, limit in answers]
            cut = sum(length >= _NEARLY * limit for length, limit in zip(lengths, limits, strict=True))
            found[task] = Answers(answers=len(answers), cut=cut, limit=max(limits), exact=False)
    return found


def _texts(row: Mapping[str, Any], usual: int) -> Iterator[tuple[str, int]]:
    """The generated texts of a document, each with the limit on its length."""
    for name, responses in zip(row["arguments"], row["resps"], strict=True):
        request = [*row["arguments"][name].values()]
        if _is_generation(request):
            yield from ((str(response), answer_limit(request[1], usual)) for response in responses)
