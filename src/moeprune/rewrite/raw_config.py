"""Edit values inside the text of a JSON file and leave every other byte as it was.

Re-serialising ``config.json`` loses keys that some engines need, so the values are replaced in place.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from moeprune.errors import LayoutError, PlanError

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


def add_to_json(text: str, values: Mapping[str, Any]) -> str:
    """Add keys at the end of an object, laid out like the keys before them.

    Args:
        text: a JSON object.
        values: value by new key; ``text_config.name`` reaches into a nested object.

    Raises:
        PlanError: a key is there already, or the object that it belongs to is not.
    """
    for key, value in values.items():
        *path, name = key.split(".")
        found = _find(text, _skip(text, 0), path) if path else [(_skip(text, 0), len(text))]
        items = list(_items(text, found[-1][0])) if found else []
        if not items or any(_DECODER.raw_decode(text, begin)[0] == name for begin, _, _ in items):
            raise PlanError(f"config.json has no room for {key!r}", "was it written by moeprune?")
        lead = text[found[-1][0] + 1 : items[0][0]]
        end = items[-1][2]
        text = f"{text[:end]},{lead}{json.dumps(name)}: {json.dumps(value)}{text[end:]}"
    return text


def edit_names(text: str, rename: Callable[[str], str | None], source: str) -> str:
    """Rename or take out strings that name things: items of lists and keys of objects, wherever they stand.

    Args:
        text: a JSON object.
        rename: gives a string's new value; None takes the item, or the key with its value, out.
        source: name of the file, for messages.

    Raises:
        LayoutError: a string that would go is the value of a key, or the object is nested too deeply.
    """
    try:
        edits = _rename_inside(text, _skip(text, 0), rename, source)
    except RecursionError:
        raise LayoutError(f"{source} is nested too deeply") from None
    parts, position = [], 0
    for begin, end, new in edits:
        parts += [text[position:begin], new]
        position = end
    return "".join([*parts, text[position:]])


_Edit = tuple[int, int, str]  # begin and end in the text, and what takes its place


def _rename_inside(text: str, position: int, rename: Callable[[str], str | None], source: str) -> list[_Edit]:
    """Edits inside the object or list that starts at ``position``, in the order of the text."""
    items: list[tuple[int, int, list[_Edit] | None]] = []  # begin, end and edits; None where the item goes
    for begin, value, end in _items(text, position):
        edits = _rename(text, begin, rename) if text[begin] == '"' else []
        if edits is not None and text[value] in "{[":
            edits += _rename_inside(text, value, rename, source)
        elif edits is not None and text[value] == '"' and begin < value:
            renamed = _rename(text, value, rename)
            if renamed is None:
                raise LayoutError(f"{source} has {text[value:end]} as a value, and that expert is removed")
            edits += renamed
        items.append((begin, end, edits))
    return _take_out(items)


def _rename(text: str, position: int, rename: Callable[[str], str | None]) -> list[_Edit] | None:
    """The edit of one string, empty where it stays the same; None where it goes."""
    name, end = _DECODER.raw_decode(text, position)
    new = rename(name)
    if new is None:
        return None
    return [(position, end, json.dumps(new))] if new != name else []


def _take_out(items: list[tuple[int, int, list[_Edit] | None]]) -> list[_Edit]:
    """Edits of a list or object: an item goes with the comma behind it, the last ones with the comma before them."""
    staying = max((number for number, item in enumerate(items) if item[2] is not None), default=-1)
    edits: list[_Edit] = []
    for number, (begin, _, inner) in enumerate(items[: staying + 1]):
        edits += [(begin, items[number + 1][0], "")] if inner is None else inner
    if items[staying + 1 :]:
        edits.append((items[staying][1] if staying >= 0 else items[0][0], items[-1][1], ""))
    return edits


def _find(text: str, position: int, path: list[str]) -> list[tuple[int, int]]:
    """Spans of the values at ``path`` inside the object that starts at ``position``."""
    if text[position] != "{":
        return []
    found: list[tuple[int, int]] = []
    for begin, value, end in _items(text, position):
        if _DECODER.raw_decode(text, begin)[0] == path[0]:
            found += _find(text, value, path[1:]) if path[1:] else [(value, end)]
    return found


def _items(text: str, position: int) -> Iterator[tuple[int, int, int]]:
    """Items of the object or list that starts at ``position``: where each begins, its value begins, and it ends."""
    named = text[position] == "{"
    position = _skip(text, position + 1)
    while text[position] not in "}]":
        begin = value = position
        if named:
            _, end = _DECODER.raw_decode(text, begin)
            value = _skip(text, _skip(text, end) + 1)  # over the colon
        _, end = _DECODER.raw_decode(text, value)
        yield begin, value, end
        position = _skip(text, end)
        if text[position] == ",":
            position = _skip(text, position + 1)


def _skip(text: str, position: int) -> int:
    while text[position] in _SPACE:
        position += 1
    return position
