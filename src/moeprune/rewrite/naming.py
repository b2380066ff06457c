"""Names of single experts in a config, such as lists of unquantised modules: renumbered with the experts."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping

from moeprune.architectures import ExpertName
from moeprune.checkpoint import Checkpoint
from moeprune.errors import LayoutError
from moeprune.rewrite.raw_config import edit_names

_MARK = re.compile(r"(re:|[+-]:)\^?")  # of an entry that is a pattern, in compressed-tensors and in GPTQModel
_ALL = r"\\d[+*]|\[0-9\][+*]"  # any expert's number


@functools.cache
def _some(experts: str) -> re.Pattern[str]:
    """A pattern that means some experts and not others: a number, or a choice of numbers, behind ``experts.``."""
    word = re.escape(experts.rstrip(".").rpartition(".")[2])
    return re.compile(rf"(?<!shared_){word}(?:\\?\.)?+(?:\.?[*+])?+(?!{_ALL}|\\\.)[\d\[({{?\\]")


def renumber_names(text: str, checkpoint: Checkpoint, keep: Mapping[int, tuple[int, ...]], source: str) -> str:
    """Give names of experts their new numbers and take out those of removed experts; no other byte changes.

    Args:
        text: the JSON text.
        checkpoint: the source.
        keep: experts that stay by layer.
        source: name of the file, for messages.

    Raises:
        LayoutError: a pattern means experts that cannot be told apart from others, or one that goes is the value of
            a key that stays.
    """
    new_number = {layer: {old: new for new, old in enumerate(kept)} for layer, kept in keep.items()}

    def rename(name: str) -> str | None:
        role = _expert(name, checkpoint)
        if role is None and _some(checkpoint.spec.experts).search(name):
            raise LayoutError(
                f"{source} singles out experts by the pattern {name!r}, and experts are renumbered",
                "write the names of the experts out, or take a checkpoint that is quantised evenly",
            )
        if role is None or role.layer not in checkpoint.all_moe_layers:
            return name
        number = new_number.get(role.layer, {}).get(role.expert)
        return None if number is None else _numbered(name, checkpoint, role.expert, number)

    return edit_names(text, rename, source)


def _expert(name: str, checkpoint: Checkpoint) -> ExpertName | None:
    """The expert that a name means, and no other; None for other modules and for patterns."""
    mark = _MARK.match(name)
    plain = name.removeprefix(mark[0]).replace("\\.", ".").removesuffix("$") if mark else name
    try:
        role = checkpoint.spec.role(f"{plain}.x", checkpoint.spec.depth(checkpoint.config))
    except LayoutError:
        return None
    if not isinstance(role, ExpertName):
        return None
    open_end = mark is not None and role.after == "x" and not name.endswith("$")  # there expert 1 means 10 as well
    return None if open_end else role


def _numbered(name: str, checkpoint: Checkpoint, old: int, new: int) -> str:
    prefix = re.escape(checkpoint.spec.experts).replace(r"\.", r"\\?\.")
    return re.sub(rf"({prefix}){old}", rf"\g<1>{new}", name, count=1)
