"""What kinds of tokens a text is made of: numbers, punctuation, white space, first pieces of words, and their like."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

CLASSES = ("special", "newline", "white space", "number", "punctuation", "first piece", "continuation", "bytes")
_SPECIAL, _NEWLINE, _SPACE, _NUMBER, _PUNCTUATION, _FIRST, _CONTINUATION, _BYTES = range(len(CLASSES))
_BROKEN = "\ufffd"  # what stands for bytes that are no whole sign


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TokenClasses:
    """Classes of a vocabulary's tokens, as numbers of :data:`CLASSES`.

    A piece of a word without white space before it goes on with the word if the token before ends in a letter, and
    begins one otherwise; so the class of a token also depends on that token.

    Attributes:
        alone: class of each token as the first of a text, [V].
        bare: whether a token is a piece of a word and begins in a letter, [V].
        open: whether it ends in a letter, so that a word may go on behind it, [V].
    """

    alone: npt.NDArray[np.int64]
    bare: npt.NDArray[np.bool_]
    open: npt.NDArray[np.bool_]

    @classmethod
    def of(cls, tokenizer: Any, size: int) -> TokenClasses:
        """Of a tokenizer and a model with a vocabulary of some size; what the tokenizer does not name is special."""
        special = set(tokenizer.all_special_ids)
        texts = ["" if token in special else text for token, text in enumerate(_texts(tokenizer, size))]
        return cls(
            alone=np.array([_class_of(text) for text in texts]),
            bare=np.array([text[:1].isalpha() for text in texts]),
            open=np.array([text[-1:].isalpha() for text in texts]),
        )

    def __call__(self, ids_BT: npt.ArrayLike) -> npt.NDArray[np.int64]:
        """The class of every token of a batch, [B, T]."""
        ids = np.asarray(ids_BT)
        classes: npt.NDArray[np.int64] = self.alone[ids]
        goes_on = self.open[ids[:, :-1]] & self.bare[ids[:, 1:]]
        classes[:, 1:][goes_on] = _CONTINUATION
        return classes


def _class_of(text: str) -> int:
    """The class of what a token stands for."""
    inner = text.strip()
    if not text:
        return _SPECIAL
    if _BROKEN in text:
        return _BYTES
    if not inner:
        return _NEWLINE if "\n" in text else _SPACE
    if all(sign.isnumeric() for sign in inner):
        return _NUMBER
    return _FIRST if any(sign.isalnum() for sign in inner) else _PUNCTUATION


def _texts(tokenizer: Any, size: int) -> Sequence[str]:
    """What each token stands for, with the white space before it, which decoding a single token may lose."""
    from tokenizers.decoders import ByteFallback, ByteLevel

    pieces = [piece or "" for piece in tokenizer.convert_ids_to_tokens(range(min(size, len(tokenizer))))]
    bytes_alone = ByteLevel() if any("Ġ" in piece for piece in pieces) else None
    if bytes_alone is None:
        texts = [ByteFallback().decode([piece]).replace("▁", " ") for piece in pieces]
    else:
        texts = [bytes_alone.decode([piece]) for piece in pieces]
    return [*texts, *[""] * (size - len(texts))]
