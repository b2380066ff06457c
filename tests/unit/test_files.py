"""Files that appear whole or not at all, JSON for people, and JSON from strangers."""

from __future__ import annotations

import io
import json
import os
import shutil
import stat
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import deserialize

from moeprune import _files
from moeprune.errors import ArtifactError, ConfigError

JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)


class Usage(NamedTuple):
    """What ``shutil.disk_usage`` returns."""

    total: int
    used: int
    free: int


def contents(folder: Path) -> dict[str, str]:
    """Every file below a folder, hidden ones too."""
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


def fail(*_: object) -> None:
    """A system call on a broken disk."""
    raise OSError(5, "Input/output error")


# --- JSON -----------------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(JSON_VALUES)
def test_json_for_people_reads_back_as_the_same_value(value: Any) -> None:
    """Whatever the layout, no value is changed by it."""
    text = _files.to_json(value)
    assert json.loads(text) == value
    assert text.endswith("\n")
    assert _files.to_json(json.loads(text)) == text


def test_json_layout_is_one_row_per_thing_a_person_edits() -> None:
    """Lists of numbers stay on one line, objects and lists of objects get a line for each item."""
    plan = {"kind": "drop", "layers": {"3": {"keep": [0, 2, 5], "scores": []}}, "notes": [{"a": "ß"}, [1]], "none": {}}
    assert _files.to_json(plan) == (
        '{\n  "kind": "drop",\n  "layers": {\n    "3": {\n      "keep": [0, 2, 5],\n      "scores": []\n    }\n  },\n'
        '  "notes": [\n    {\n      "a": "ß"\n    },\n    [1]\n  ],\n  "none": {}\n}\n'
    )


@pytest.mark.parametrize("value", [float("nan"), [float("inf")], {"a": -float("inf")}])
def test_json_for_people_has_no_number_that_json_lacks(value: object) -> None:
    """A NaN that slipped into a result is a failure, not a file that other readers refuse."""
    with pytest.raises(ValueError, match="not JSON compliant"):
        _files.to_json(value)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("NaN", "non-finite number NaN"),
        ('{"a": -Infinity}', "non-finite number -Infinity"),
        ("[1e999]", "non-finite number 1e999"),
        (b'"\xff"', "can't decode byte 0xff"),
        ('"\\ud800"', "surrogates not allowed"),
        ('{"\\uDCfF": 1}', "surrogates not allowed"),
        ("[" * 100_000, "recursion"),
        ("9" * 5000, "Exceeds the limit"),
        ('{"a": 1', "Expecting"),
        ("", "Expecting value"),
        ('{"a": 1}'.encode("utf-16"), "can't decode"),
    ],
)
def test_hostile_json_is_an_error_that_names_the_file(text: str | bytes, why: str) -> None:
    """What cannot be read, or could not be written again, is refused in one line."""
    with pytest.raises(ArtifactError, match=r"some.json is not valid JSON: .*" + why):
        _files.parse_json(text, "some.json")


@settings(deadline=None)
@given(st.binary(max_size=40) | st.text(max_size=40))
def test_parsing_raises_nothing_but_artifact_errors(text: str | bytes) -> None:
    """Garbage never surfaces as another library's exception."""
    try:
        value = _files.parse_json(text, "x")
    except ArtifactError:
        return
    assert json.loads(text if isinstance(text, str) else text.decode("utf-8-sig")) == value


def test_valid_json_of_every_kind_is_read() -> None:
    """Pairs of surrogates, a byte order mark and escaped backslashes are fine."""
    assert _files.parse_json('["\\ud83d\\ude00", "\\\\ud800", 1.5]', "x") == ["\U0001f600", "\\ud800", 1.5]
    assert _files.parse_json(b"\xef\xbb\xbf{}", "x") == {}


def test_repeated_names_are_refused_where_they_must_be_unique() -> None:
    """The standard library keeps the last value without a word; a header or plan must not be read so."""
    text = '{"b": 0, "a": {"x": 1, "y": 2, "x": 3}}'
    assert _files.parse_json(text, "f")["a"] == {"x": 3, "y": 2}
    with pytest.raises(ArtifactError, match="f is not valid JSON: 'x' is there twice"):
        _files.parse_json(text, "f", unique=True)
    assert _files.parse_json('{"a": {"x": 1}, "b": {"x": 1}}', "f", unique=True) == {"a": {"x": 1}, "b": {"x": 1}}


def test_an_object_that_is_never_held_reads_the_same() -> None:
    """Rows that are made one by one give the text of the object they make up, also when there are none."""
    rows = {f"tensor {number}": "x" * number for number in range(5)}
    for content in (rows, {}):
        pieces = _files.json_pieces({"a": [1, 2], "rows": iter(content.items()), "z": [{"b": 1}]})
        assert "".join(pieces) == _files.to_json({"a": [1, 2], "rows": content, "z": [{"b": 1}]})


# --- artifacts ------------------------------------------------------------------------------------------------------


def test_an_artifact_carries_its_schema_version_command_and_inputs(tmp_path: Path) -> None:
    """The envelope is what a stage checks before it believes a file."""
    envelope = _files.envelope("moeprune.plan/1", {"stage": "plan"}, {"model": "abc"})
    assert list(envelope) == ["schema", "moeprune_version", "command", "inputs"]
    _files.write_atomic(tmp_path / "a.json", _files.to_json(envelope | {"x": 1}))
    assert _files.read_artifact(tmp_path / "a.json", "moeprune.plan/1")["x"] == 1


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ('{"schema": "moeprune.report/1"}', "its schema is 'moeprune.report/1'"),
        ('{"schema": 1}', "its schema is 1"),
        ("{}", "it has no schema"),
        ("[1]", "it has no schema"),
        ('{"schema": "moeprune.plan/1", "schema": "moeprune.plan/1"}', "'schema' is there twice"),
    ],
)
def test_another_kind_of_file_is_refused(tmp_path: Path, text: str, why: str) -> None:
    """A file of another stage, of a later version, or of no stage at all names what it is."""
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ArtifactError, match=f"a.json.*{why}"):
        _files.read_artifact(tmp_path / "a.json", "moeprune.plan/1")


def test_a_missing_artifact_is_one_line(tmp_path: Path) -> None:
    """No such file, and a folder in its place, are plain errors."""
    with pytest.raises(ArtifactError, match=r"cannot read .*none.json: No such file"):
        _files.read_artifact(tmp_path / "none.json", "moeprune.plan/1")
    with pytest.raises(ArtifactError, match="Is a directory"):
        _files.read_artifact(tmp_path, "moeprune.plan/1")


def test_digest_of_parts_is_that_of_the_whole() -> None:
    """Parts are hashed one after another."""
    assert _files.sha256_bytes(b"ab", b"", b"c") == _files.sha256_bytes(b"abc") != _files.sha256_bytes(b"abd")


# --- one file -------------------------------------------------------------------------------------------------------


def test_a_file_is_written_with_its_folders_and_ordinary_rights(tmp_path: Path) -> None:
    """Bytes and text arrive as given, readable by whom the umask lets."""
    target = _files.write_atomic(tmp_path / "a" / "b.txt", "né\n")
    assert target.read_bytes() == "né\n".encode()
    plain = tmp_path / "plain"
    plain.touch()
    assert stat.S_IMODE(target.stat().st_mode) == stat.S_IMODE(plain.stat().st_mode)
    _files.write_atomic(target, b"\x00")
    assert target.read_bytes() == b"\x00"


@pytest.mark.parametrize("call", ["fsync", "replace", "chmod"])
def test_a_failed_write_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    """Whatever step fails, the old content stays and nothing else is left behind."""
    (tmp_path / "a").write_text("old")
    monkeypatch.setattr(os, call, fail)
    with pytest.raises(ArtifactError, match=r"cannot write .*a: Input/output error"):
        _files.write_atomic(tmp_path / "a", "new")
    assert contents(tmp_path) == {"a": "old"}


def test_an_interrupted_write_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C in the middle is no different from a failure."""

    def interrupt(_: object) -> None:
        raise KeyboardInterrupt

    (tmp_path / "a").write_text("old")
    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        _files.write_atomic(tmp_path / "a", "new")
    assert contents(tmp_path) == {"a": "old"}


def test_a_file_cannot_replace_a_folder_or_lie_under_a_file(tmp_path: Path) -> None:
    """Both are errors that name the target."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    with pytest.raises(ArtifactError, match=r"cannot write .*folder"):
        _files.write_atomic(tmp_path / "folder", "x")
    with pytest.raises(ArtifactError, match=r"cannot write .*below"):
        _files.write_atomic(tmp_path / "file" / "below", "x")


def test_output_files_are_replaced_only_on_demand(tmp_path: Path) -> None:
    """A file that exists needs --overwrite, a folder is never a file."""
    (tmp_path / "a").touch()
    _files.check_output_file(tmp_path / "new", overwrite=False)
    _files.check_output_file(tmp_path / "a", overwrite=True)
    with pytest.raises(ConfigError, match=r"a exists .*--overwrite"):
        _files.check_output_file(tmp_path / "a", overwrite=False)
    with pytest.raises(ConfigError, match="is a folder"):
        _files.check_output_file(tmp_path, overwrite=True)


# --- disks ---------------------------------------------------------------------------------------------------------


def test_too_little_space_is_refused_before_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk that is asked is the one of the nearest folder that exists, through links."""
    asked = []

    def usage(path: Path) -> Usage:
        asked.append(Path(path))
        return Usage(100_000_000, 35_996_000, 64_004_000)  # 64 MB are for what lies beside the tensors

    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    monkeypatch.setattr(shutil, "disk_usage", usage)
    _files.check_free_space(tmp_path / "a" / "b", 4_000)
    with pytest.raises(ConfigError, match=r"64\.0 MB needed, 64\.0 MB free") as caught:
        _files.check_free_space(tmp_path / "link", 4_001)
    assert asked == [tmp_path, tmp_path / "disk"]
    assert caught.value.hint


def test_remarks_go_to_stderr_unless_quiet(capsys: pytest.CaptureFixture[str]) -> None:
    """One line with a mark, or nothing."""
    _files.note("a remark")
    token = _files.quiet.set(True)
    _files.note("another")
    _files.quiet.reset(token)
    assert capsys.readouterr() == ("", "note: a remark\n")


# --- the rest -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1_000, "1.0 kB"), (3_812_000, "3.8 MB"), (7e9, "7.0 GB"), (2_500e12, "2500.0 TB")],
)
def test_bytes_as_people_say_them(count: float, text: str) -> None:
    """Decimal units, one digit."""
    assert _files.human_bytes(count) == text


def test_a_header_is_aligned_and_read_by_the_library() -> None:
    """Data starts at a multiple of eight, with equal bytes for equal content."""
    tensors = [("é", "U8", (3,), 3), ("empty", "F32", (0, 2), 0), ("last", "U8", [1], 1)]
    header = _files.safetensors_header(iter(tensors), {"format": "pt"})
    assert len(header) % 8 == 0
    assert header == _files.safetensors_header(tensors, {"format": "pt"})
    read = {name: (item["shape"], bytes(item["data"])) for name, item in deserialize(header + b"abcd")}
    assert read == {"é": ([3], b"abc"), "empty": ([0, 2], b""), "last": ([1], b"d")}
    assert b"__metadata__" not in _files.safetensors_header(tensors, {})


def test_work_begins_once_and_is_forgotten_by_the_next_command() -> None:
    """What tells a refusal from a failure."""
    _files.reset_work()
    assert not _files.work_begun()
    _files.begin_work()
    assert _files.work_begun()
    _files.reset_work()
    assert not _files.work_begun()


def test_a_byte_bar_counts_what_an_earlier_run_did(monkeypatch: pytest.MonkeyPatch) -> None:
    """The share that is done includes it; rate and time left are those of this run alone."""

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with _files.byte_bar("copying", 4_000_000, done=3_000_000) as bar:
        bar.update(500_000)
        bar.refresh()
        shown = bar.format_dict
    assert (shown["n"], shown["total"], shown["initial"]) == (3_500_000, 4_000_000, 3_000_000)
    assert "88%" in terminal.getvalue()
    assert "3.50M/4.00M" in terminal.getvalue()


def test_progress_is_silent_without_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    """Every item passes through, and a log file gets no bars."""
    assert list(_files.progress([3, 1, 2], "counting")) == [3, 1, 2]
    with _files.byte_bar("copying", 10) as bar:
        bar.update(10)
    assert capsys.readouterr() == ("", "")
