"""The licence of a pruned checkpoint, inherited from the model that it was made from."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moeprune.errors import PublishError, first_line

_FILES = ("licen[cs]e*", "copying*", "notice*", "use_policy*")


@dataclass(frozen=True, slots=True, kw_only=True)
class Licence:
    """What is known of a licence.

    Attributes:
        name: as the Hub calls it, such as ``apache-2.0``; empty where it is unknown.
        title, link: name and place of its text, where the Hub's own list does not have it (``license: other``).
        files: names of the licence files in the checkpoint's folder.
        stated: whoever publishes said it; it does not come from the base's card.
    """

    name: str = ""
    title: str = ""
    link: str = ""
    files: tuple[str, ...] = ()
    stated: bool = False

    @property
    def known(self) -> bool:
        """Whether a reader could find out what is allowed."""
        named = self.name not in {"", "unknown", "other"}
        return named or (self.name == "other" and bool(self.title or self.link or self.files))


def read_front_matter(folder: Path) -> Mapping[str, Any]:
    """What the card of the base says of itself, which travels with the other files; empty where there is no card.

    Raises:
        PublishError: its front matter cannot be read.
    """
    from huggingface_hub import metadata_load
    from yaml import YAMLError

    card = folder / "README.md"
    if not card.is_file():
        return {}
    try:
        return metadata_load(card) or {}
    except (YAMLError, ValueError) as error:
        raise PublishError(
            f"the front matter of {card} cannot be read: {first_line(error)}", "repair or remove it"
        ) from error


def find_licence(folder: Path, front_matter: Mapping[str, Any], stated: str | None = None) -> Licence:
    """The licence that the base's card names, with the licence files that were copied from the base.

    Args:
        folder: the checkpoint.
        front_matter: of the base's card.
        stated: what whoever publishes says it is.

    Raises:
        PublishError: the base's card names another one than ``stated``.
    """
    name, title, link = (_text(front_matter.get(key)) for key in ("license", "license_name", "license_link"))
    inherited = "" if name == "unknown" else name
    if stated and inherited and stated != inherited:
        raise PublishError(
            f"the licence of the base is {inherited!r} by its own card, not {stated!r}", "leave --license out"
        )
    return Licence(
        name=inherited or stated or "",
        title=title,
        link=link,
        files=tuple(sorted(file.name for file in folder.iterdir() if file.is_file() and _is_licence(file.name))),
        stated=bool(stated) and not inherited,
    )


def _is_licence(name: str) -> bool:
    return any(fnmatch.fnmatch(name.lower(), pattern) for pattern in _FILES)


def _text(value: object) -> str:
    """A value of the front matter where it is text, or a list of one."""
    if isinstance(value, list) and len(value) == 1:
        [value] = value
    return value.strip() if isinstance(value, str) else ""
