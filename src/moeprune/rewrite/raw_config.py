"""Edit values inside the text of a JSON file and leave every other byte as it was.

Re-serialising ``config.json`` loses keys that some engines need, so the values are replaced in place.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from moeprune.errors import PlanError

_DECODER = json.JSONDecoder()
_SPACE = " \t\r\n"


def edit_json(text: str, edits: Mapping[str, Any]) -> str:
    """Replace values by dotted key.

    Args:
        text: a JSON object.
        edits: new value by key; ``text_config.num_experts`` reaches into a nested object.

    Raises:
        PlanError: a key is not there. Where a key is repeated, every occurrence is replaced.
    """
    spans: list[tuple[int, int, str]] = []
    for key, value in edits.items():
        found = _find(text, _skip(text, 0), key.split("."))
        if not found:
            raise PlanError(f"config.json has no {key!r} to edit")
        spans.extend((begin, end, json.dumps(value)) for begin, end in found)
    for begin, end, new in sorted(spans, reverse=True):
        text = text[:begin] + new + text[end:]
    return text


def _find(text: str, position: int, path: list[str]) -> list[tuple[int, int]]:
    """Spans of the values at ``path`` inside the object that starts at ``position``."""
    if text[position] != "{":
        return []
    found: list[tuple[int, int]] = []
    position = _skip(text, position + 1)
    while text[position] != "}":
        key, position = _DECODER.raw_decode(text, position)
        begin = _skip(text, _skip(text, position) + 1)  # over the colon
        _, end = _DECODER.raw_decode(text, begin)
        if key == path[0]:
            found += _find(text, begin, path[1:]) if path[1:] else [(begin, end)]
        position = _skip(text, end)
        if text[position] == ",":
            position = _skip(text, position + 1)
    return found


def _skip(text: str, position: int) -> int:
    while text[position] in _SPACE:
        position += 1
    return position
