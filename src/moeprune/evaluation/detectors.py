"""What is wrong with generated text: loops, repetition, and JSON that is none. Needs no model and no torch."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

LONGEST_PERIOD = 32  # tokens
REPEATS = 3
LEAST_TAIL = 24  # tokens: a short word that is said three times is no loop


def ends_in_loop(tokens: Sequence[int]) -> bool:
    """Whether generated tokens end by repeating themselves: 3 times or more, up to 32 tokens, and 24 in all or more.

    A text that came to an end of its own is in no loop: do not ask about one.

    Example:
        >>> ends_in_loop([5, 6, 7] * 8), ends_in_loop(range(24))
        (True, False)
    """
    for period in range(1, LONGEST_PERIOD + 1):
        needed = max(REPEATS * period, LEAST_TAIL)
        tail = tokens[-needed:]
        if len(tail) == needed and all(one == other for one, other in zip(tail, tail[period:], strict=False)):
            return True
    return False


def repetition(tokens: Sequence[int], size: int = 4) -> float:
    """Share of a text's n-grams of tokens that were there before: 1 minus distinct-n.

    Args:
        tokens: the text; one shorter than ``size`` repeats nothing.
        size: tokens of an n-gram.
    """
    grams = [tuple(tokens[start : start + size]) for start in range(len(tokens) - size + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def first_object(text: str) -> dict[str, Any] | None:
    """The first JSON object in a text, whatever stands before and after it; None where what begins as one is none."""
    start = text.find("{")
    if start < 0:
        return None
    try:
        value, _ = json.JSONDecoder().raw_decode(text, start)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


@dataclass(frozen=True, slots=True, kw_only=True)
class StructuredPrompt:
    """A text to be put into JSON, after three examples; the answer must have the keys of the examples."""

    text: str
    keys: tuple[str, ...]

    def parses(self, answer: str) -> bool:
        """Whether an answer begins with a JSON object."""
        return first_object(answer) is not None

    def has_keys(self, answer: str) -> bool:
        """Whether that object has all keys that were asked for."""
        return {*self.keys} <= (first_object(answer) or {}).keys()


def structured_prompts() -> list[StructuredPrompt]:
    """The bundled prompts, the schemas in turn, as text to be continued: any model can be given that, chat or not."""
    file = resources.files("moeprune").joinpath("data/probes/structured.json")
    schemas = [_prompts(schema) for schema in json.loads(file.read_text(encoding="utf-8"))]
    return [prompt for turn in zip(*schemas, strict=True) for prompt in turn]


def _prompts(schema: Mapping[str, Any]) -> Iterator[StructuredPrompt]:
    keys = schema["keys"]
    head = f"Write {schema['what']} as JSON with the keys {', '.join(keys[:-1])} and {keys[-1]}.\n\n"
    shots = "".join(f"Text: {text}\nJSON: {json.dumps(value)}\n\n" for text, value in schema["examples"])
    for text in schema["texts"]:
        yield StructuredPrompt(text=f"{head}{shots}Text: {text}\nJSON:", keys=tuple(keys))
