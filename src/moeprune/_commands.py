"""Canonical commands of artifacts as command lines that a person can run again."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

# Options whose name differs from that of the field, fields that an option turns off, and fields that are no options.
_NAMES = {"backend": "--model", "precision": "--mixed-precision"}
_NEGATED = {"guard": "--no-guard", "align": "--no-align", "stream": "--no-stream"}
_NO_OPTIONS = {"stage", "alpha", "plug_ins"} | {
    "warmup",
    "reverse",
    "weight_decay",
    "clip",
    "checks",
    "patience",
    "loss",
}


def command_line(command: Mapping[str, Any], *arguments: str, name: str = "") -> str:
    """The command line of an artifact's ``command``.

    Args:
        command: canonical options; ``stage`` names the command where ``name`` does not.
        arguments: what the options do not hold: models, files and sources, as words of the command line.
        name: the command.

    Example:
        >>> command_line({"stage": "plan", "ratio": "0.5", "guard": True}, "stats.safetensors", "BASE")
        'moeprune plan stats.safetensors BASE --ratio 0.5'
    """
    stage = name or str(command.get("stage", ""))
    options = (word for key, value in command.items() if key not in _NO_OPTIONS for word in _option(key, value))
    return shlex.join(["moeprune", stage, *arguments, *options])


def source_words(provenance: Sequence[Mapping[str, Any]], option: str = "--calibration") -> list[str]:
    """The sources of calibration data or text as words of a command line.

    Where all rows of a source have one label, it is named: a label that was given and one in the rows do the same.
    """
    words: list[str] = []
    for entry in provenance:
        domains = entry.get("domains", ())
        label = f"{domains[0]}=" if len(domains) == 1 else ""
        words += [option, f"{label}{source_name(entry)}"]
    return words


def source_name(entry: Mapping[str, Any]) -> str:
    """A source as it is written: a file's name, or ``org/name/config@split#revision``."""
    config, split, revision = (entry.get(key) for key in ("config", "split", "revision"))
    named = f"{entry['source']}/{config}" if config else str(entry["source"])
    return named + (f"@{split}" if split else "") + (f"#{revision}" if revision else "")


def _option(key: str, value: object) -> Iterator[str]:
    """The words of one option; none where it says what leaving it out says."""
    if isinstance(value, bool) and key in _NEGATED:
        if not value:
            yield _NEGATED[key]
    elif value is not None and value is not False and value not in ([], (), {}, ""):
        yield _NAMES.get(key, f"--{key.replace('_', '-')}")
        if value is not True:
            yield _text(value)


def _text(value: object) -> str:
    if isinstance(value, Mapping):
        return ",".join(f"{key}={item}" for key, item in value.items())
    return ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
