"""Values replaced inside a JSON text, every other byte as it was."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeprune.errors import LayoutError, PlanError
from moeprune.rewrite.raw_config import add_to_json, edit_json, edit_names

KEYS = st.sampled_from(["num_experts", "n_routed_experts", "num", "x", 'quo"te', "ünï", "a\\b"]) | st.text(
    st.characters(exclude_characters=".", exclude_categories=["Cs"]), max_size=5
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | KEYS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3),
    max_leaves=8,
)
SPACE = st.text(" \t\r\n", max_size=3)
Pair = tuple[str, str]


@st.composite
def written(draw: st.DrawFn, values: st.SearchStrategy[Any]) -> str:
    """A JSON value in some formatting."""
    indent = draw(st.sampled_from([None, 1, 4, "\t"]))
    separators = draw(st.sampled_from([(",", ":"), (", ", ": "), (" ,\n", " : ")]))
    return json.dumps(draw(values), indent=indent, separators=separators, ensure_ascii=draw(st.booleans()))


@st.composite
def objects(draw: st.DrawFn) -> tuple[list[Pair], list[str]]:
    """Keys and values as they are written, and the white space between all the parts; keys may repeat."""
    pairs = draw(st.lists(st.tuples(written(KEYS), written(VALUES)), max_size=6))
    return pairs, draw(st.lists(SPACE, min_size=4 * len(pairs) + 3, max_size=4 * len(pairs) + 3))


def render(pairs: Sequence[Pair], spaces: Sequence[str]) -> str:
    """The text of an object, with white space wherever JSON allows it."""
    space = iter(spaces)
    rows = [f"{next(space)}{key}{next(space)}:{next(space)}{value}{next(space)}" for key, value in pairs]
    return next(space) + "{" + ",".join(rows) + next(space) + "}" + next(space)


@settings(deadline=None)
@given(objects(), st.data())
def test_only_the_edited_values_change(drawn: tuple[list[Pair], list[str]], data: st.DataObject) -> None:
    """Any object, in any formatting: the result is the same text with the new values in the old places."""
    pairs, spaces = drawn
    names = [json.loads(key) for key, _ in pairs]
    chosen = data.draw(st.sets(st.sampled_from(names)) if names else st.just(set()))
    edits = {name: data.draw(st.integers() | st.none() | st.text(max_size=3)) for name in sorted(chosen)}
    changed = [
        (key, json.dumps(edits[name]) if name in edits else value)
        for (key, value), name in zip(pairs, names, strict=True)
    ]
    result = edit_json(render(pairs, spaces), edits)
    assert result == render(changed, spaces)
    assert {name: json.loads(result)[name] for name in edits} == edits


@settings(deadline=None)
@given(objects(), objects(), st.integers(0, 512))
def test_a_dotted_key_reaches_into_a_nested_object(
    outer: tuple[list[Pair], list[str]], inner: tuple[list[Pair], list[str]], value: int
) -> None:
    """Only the value at the whole path changes, not one of the same name further out or further in."""
    counted = [*inner[0], ('"num_experts"', "128")]
    pairs = [pair for pair in outer[0] if json.loads(pair[0]) != "text_config"]
    spaces = [*inner[1], " ", "", "\n", ""]

    def text(pairs_inside: Sequence[Pair]) -> str:
        return render([*pairs, ('"text_config"', render(pairs_inside, spaces).strip())], [*outer[1], " ", "", "\n", ""])

    changed = [(key, str(value) if json.loads(key) == "num_experts" else old) for key, old in counted]
    assert edit_json(text(counted), {"text_config.num_experts": value}) == text(changed)


CONFIG = """{
    "architectures": ["Qwen3MoeForCausalLM"],
    "note": "\\"num_experts\\": 128, }{",
    "quantization_config": {"num_experts": 128, "ignore": ["num_experts", {"num_experts": 1}]},
    "num_experts" : 128,
    "num_experts_per_tok": 8, "rope_theta":1e6,\t"eps": 1.0E-06
}

"""


def test_text_that_only_looks_like_the_key_stays() -> None:
    """A string that holds the key, a longer key, a value that is the key, and the same key elsewhere."""
    assert edit_json(CONFIG, {"num_experts": 64}) == CONFIG.replace('"num_experts" : 128', '"num_experts" : 64')


def test_several_edits_of_different_length_do_not_shift_each_other() -> None:
    """Places are found in the original text."""
    edits = {"num_experts": 12345, "num_experts_per_tok": 4, "rope_theta": "x", "quantization_config.num_experts": 1}
    result = json.loads(edit_json(CONFIG, edits))
    assert (result["num_experts"], result["num_experts_per_tok"], result["rope_theta"]) == (12345, 4, "x")
    assert result["quantization_config"]["num_experts"] == 1
    assert edit_json(CONFIG, {}) == CONFIG


def test_every_occurrence_of_a_repeated_key_changes() -> None:
    """Readers differ in which of two they take."""
    assert edit_json('{"n": 8, "m": {"n": 8}, "n": [8]}', {"n": 4}) == '{"n": 4, "m": {"n": 8}, "n": 4}'


def test_an_escaped_key_is_the_key_it_means() -> None:
    """JSON may write any letter as an escape."""
    assert edit_json('{"num\\u005fexperts": 8}', {"num_experts": 4}) == '{"num\\u005fexperts": 4}'


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("{}", "n"),
        ('{"m": {"n": 1}}', "n"),
        ('{"m": {"n": 1}}', "n.m"),
        ('{"m": [{"n": 1}]}', "m.n"),
        ('{"m": "n"}', "m.n"),
        ('{"N": 1}', "n"),
    ],
)
def test_a_missing_key_is_an_error(text: str, key: str) -> None:
    """Adding a key would be a different edit than the plan says."""
    with pytest.raises(PlanError, match=rf"config\.json has no '{key}' to edit"):
        edit_json(text, {key: 1})


# --- names in lists and keys ----------------------------------------------------------------------------------------

LISTS = """{
  "ignore": [ "a1",\t"keep", "a2" ,
     "a3"],  "nested": {"list": [["a4"], {"a5": {"bits" : 4}, "b": "a1x"}], "a6":[1,2] , "z": 1.50},
  "x": "other"
}

"""


def drop_and_shift(name: str) -> str | None:
    """Names a1, a2, ...: even ones go, odd ones become half as large."""
    number = int(name[1:]) if name[:1] == "a" and name[1:].isdigit() else 0
    return name if not number else None if number % 2 == 0 else f"a{number // 2}"


def test_names_are_changed_and_taken_out_with_their_comma() -> None:
    """Items of lists and keys with their values go; spaces, other values and longer names stay as they are."""
    found = edit_names(LISTS, drop_and_shift, "config.json")
    assert (
        found
        == """{
  "ignore": [ "a0",\t"keep", "a1"],  "nested": {"list": [[], {"a2": {"bits" : 4}, "b": "a1x"}], "z": 1.50},
  "x": "other"
}

"""
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"l": ["a2"]}', '{"l": []}'),
        ('{"l": [ "a2", "a4" ]}', '{"l": [  ]}'),
        ('{"l": ["a2", "k"]}', '{"l": ["k"]}'),
        ('{"l": ["k", "a2"]}', '{"l": ["k"]}'),
        ('{"l": ["k" , "a2", "a4"]}', '{"l": ["k"]}'),
        ('{"l": ["a2", "k", "a4", "m", "a6"]}', '{"l": ["k", "m"]}'),
        ('{"a2": 1}', "{}"),
        ('{"a2": ["a3"], "a1": "a3"}', '{"a0": "a1"}'),
        ('{"caf\\u00e9": ["\\u0061" , "a1"]}', '{"caf\\u00e9": ["\\u0061" , "a0"]}'),
    ],
)
def test_what_is_left_is_json(text: str, expected: str) -> None:
    """First, last and all items can go, and what is left can be read."""
    assert edit_names(text, drop_and_shift, "config.json") == expected
    json.loads(expected)


@settings(deadline=None)
@given(objects())
def test_only_names_change(drawn: tuple[list[Pair], list[str]]) -> None:
    """Any object, in any formatting: no name, no change; and every name gone leaves an object that can be read."""
    text = render(*drawn)
    assert edit_names(text, lambda name: name, "config.json") == text
    assert json.loads(edit_names(text, lambda _: None, "config.json")) == {}
    longer = json.loads(edit_names(text, lambda name: f"{name}!", "config.json"))
    assert set(longer) == {f"{name}!" for name in json.loads(text)}


def test_a_value_cannot_go() -> None:
    """A name that is the value of a key has no place to be taken out of."""
    with pytest.raises(LayoutError, match=r'config\.json has "a2" as a value'):
        edit_names('{"module": "a2"}', drop_and_shift, "config.json")
    assert edit_names('{"module": "a3"}', drop_and_shift, "config.json") == '{"module": "a1"}'


def test_absurd_nesting_is_refused() -> None:
    """The reader runs out of stack and says so in one line."""
    with pytest.raises(LayoutError, match="nested too deeply"):
        edit_names('{"a":' + "[" * 5000 + "]" * 5000 + "}", drop_and_shift, "config.json")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"a": 1}', '{"a": 1,"new": [2]}'),
        ('{\n  "a": 1,\n  "b": {"c": 3}\n}\n\n', '{\n  "a": 1,\n  "b": {"c": 3},\n  "new": [2]\n}\n\n'),
        (' { "a" : 1 } ', ' { "a" : 1, "new": [2] } '),
    ],
)
def test_a_new_key_looks_like_those_before_it(text: str, expected: str) -> None:
    """It comes last, indented as they are, and every other byte stays."""
    assert add_to_json(text, {"new": [2]}) == expected
    assert json.loads(expected)["new"] == [2]


def test_new_keys_reach_into_a_nested_object() -> None:
    """A dotted key goes where it belongs; of an object that is there twice into the one that readers take."""
    text = '{"text": {"x": 0}, "b": 1, "text": {"y": 0}}'
    assert add_to_json(text, {"text.new": 2, "z": 3}) == '{"text": {"x": 0}, "b": 1, "text": {"y": 0,"new": 2},"z": 3}'


@pytest.mark.parametrize(
    ("text", "key"), [('{"new": 1}', "new"), ('{"a": 1}', "b.new"), ("{}", "new"), ('{"b": 1}', "b.new")]
)
def test_a_key_that_cannot_be_added(text: str, key: str) -> None:
    """It is there already, or its object is not, or holds nothing."""
    with pytest.raises(PlanError, match="no room for"):
        add_to_json(text, {key: 2})


@settings(deadline=None)
@given(objects())
def test_adding_keeps_what_is_there(drawn: tuple[list[Pair], list[str]]) -> None:
    """Any object, in any formatting: the same keys and values, and one more."""
    text = render(*drawn)
    before = json.loads(text)
    if before:
        assert json.loads(add_to_json(text, {"a new key": None})) == {**before, "a new key": None}
