"""Kinds of tokens, for tokenizers that mark spaces in either of the usual ways."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from moeprune.evaluation.token_classes import CLASSES, TokenClasses

BYTE_LEVEL = [
    "<s>",
    "Ġthe",
    "cat",
    "s",
    "Ġ",
    "Ċ",
    "ĠĊĠ",
    "12",
    "Ġ7",
    ")",
    "Ġ!=",
    "Ã",
    "Ã©",
    "don",
    "'",
    "t",
    "_x",
    "ĠÂ½",
]
PIECES = ["<s>", "▁the", "cat", "s", "▁", "<0x0A>", "▁▁", "12", "▁7", ")", "▁!=", "<0xC3>", "é", "don", "'", "t", "_x"]


class Tokenizer:
    """Names tokens, of which the first is special."""

    all_special_ids = (0,)

    def __init__(self, pieces: Sequence[str]) -> None:
        self.pieces = pieces

    def __len__(self) -> int:
        return len(self.pieces)

    def convert_ids_to_tokens(self, ids: Sequence[int]) -> list[str]:
        """Names of some."""
        return [self.pieces[token] for token in ids]


def classes_of(pieces: Sequence[str], *names: str) -> list[str]:
    """Classes of a text that is given by its pieces, in a vocabulary that the model pads to another size."""
    classes = TokenClasses.of(Tokenizer(pieces), 32)
    return [CLASSES[number] for number in classes([[pieces.index(name) for name in names]])[0]]


@pytest.mark.parametrize(
    ("pieces", "names", "expected"),
    [
        (BYTE_LEVEL, ("<s>", "Ã", "Ã©"), ["special", "bytes", "first piece"]),
        (BYTE_LEVEL, ("Ġ", "Ċ", "ĠĊĠ"), ["white space", "newline", "newline"]),
        (BYTE_LEVEL, ("12", "Ġ7", "ĠÂ½"), ["number"] * 3),
        (BYTE_LEVEL, (")", "Ġ!=", "_x"), ["punctuation", "punctuation", "first piece"]),
        (PIECES, ("<s>", "<0xC3>", "é"), ["special", "bytes", "first piece"]),
        (PIECES, ("▁", "<0x0A>", "▁▁"), ["white space", "newline", "white space"]),
        (PIECES, ("12", "▁7", ")", "▁!="), ["number", "number", "punctuation", "punctuation"]),
    ],
)
def test_what_a_token_stands_for_tells_its_class(
    pieces: Sequence[str], names: tuple[str, ...], expected: list[str]
) -> None:
    """Also of white space, of which a decoder would lose some."""
    assert classes_of(pieces, *names) == expected


@pytest.mark.parametrize(("pieces", "the"), [(BYTE_LEVEL, "Ġthe"), (PIECES, "▁the")])
def test_a_piece_goes_on_with_a_word_only_behind_a_letter(pieces: Sequence[str], the: str) -> None:
    """Else it begins one, as it does behind numbers, signs and at the begin of the text."""
    first, more = "first piece", "continuation"
    found = classes_of(pieces, "cat", "s", the, the, "s", ")", "cat", "12", "s", "don", "'", "t")
    assert found == [first, more, first, first, more, "punctuation", first, "number", first, more, "punctuation", first]


def test_tokens_without_a_name_are_special() -> None:
    """A model's vocabulary is often larger than its tokenizer's."""
    classes = TokenClasses.of(Tokenizer(PIECES), 20)
    assert [CLASSES[number] for number in classes([[19, 1]])[0]] == ["special", "first piece"]
    assert len(classes.alone) == 20
