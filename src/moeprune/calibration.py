"""Calibration data: local files or Hub data sets to token ids, with exact provenance.

One sequence per row unless packed; every batch holds rows of one domain, and the list of batches is fixed before
anything runs, so that any split of it over processes adds up to the same counts.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from moeprune._files import parse_json, quiet, sha256_bytes
from moeprune.errors import ConfigError, first_line

T = TypeVar("T")
DEFAULT_DOMAIN = "default"
DEFAULT_LABEL = "domain"  # the column that labels rows
Row = Mapping[str, Any]
Pair = tuple[str, tuple[int, ...]]  # a label and token ids
Numbered = tuple[int, tuple[int, ...]]  # a row's number and token ids
_SOURCES = "a .jsonl, .json, .parquet or .txt file, or a data set org/name[/config][@split][#revision]"


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Sequences of one domain and one half of the data that go through the model together.

    Attributes:
        domain: label of the rows.
        half: 0 or 1: what each half says on its own tells how far the data can be trusted.
        sequences: token ids by row.
        rows: the number of each among the rows of the domain.
    """

    domain: str
    half: int
    sequences: tuple[tuple[int, ...], ...]
    rows: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class CalibrationSet:
    """Token sequences with their domain labels.

    Attributes:
        sequences: token ids by row; ``domains``: the label of each row.
        provenance: one entry per source, which says exactly where its tokens come from: the file's name and sha256 or
            the data set's config, split and commit, the columns and the tokenizer that were used, how rows were
            drawn, cut and packed, and the sha256 of the token ids. No paths, hosts or times.
    """

    sequences: tuple[tuple[int, ...], ...]
    domains: tuple[str, ...]
    provenance: tuple[Mapping[str, Any], ...]

    @property
    def tokens(self) -> int:
        """Tokens in all sequences."""
        return sum(map(len, self.sequences))

    @property
    def fingerprint(self) -> str:
        """sha256 of all token ids and labels."""
        rows = zip(self.domains, self.sequences, strict=True)
        return sha256_bytes(*(_row_bytes(domain, ids) for domain, ids in rows))

    def batches(self, batch_tokens: int) -> list[Batch]:
        """Group rows of one domain, one half and similar length.

        The rows of a domain go to the two halves in turn. Padded, no batch of several rows exceeds ``batch_tokens``.
        """
        by_domain: dict[str, list[tuple[int, ...]]] = defaultdict(list)
        for domain, ids in zip(self.domains, self.sequences, strict=True):
            by_domain[domain].append(ids)
        return [
            Batch(
                domain=domain,
                half=half,
                sequences=tuple(ids for _, ids in group),
                rows=tuple(number for number, _ in group),
            )
            for domain in sorted(by_domain)
            for half in (0, 1)
            for group in _groups([*enumerate(by_domain[domain])][half::2], batch_tokens)
        ]


def _groups(rows: Sequence[Numbered], batch_tokens: int) -> Iterator[list[Numbered]]:
    """Rows by length, the longest first, cut where one more would not fit."""
    group: list[Numbered] = []
    for row in sorted(rows, key=lambda row: len(row[1]), reverse=True):  # stable: equal lengths keep their order
        if group and len(group[0][1]) * (len(group) + 1) > batch_tokens:
            yield group
            group = []
        group.append(row)
    if group:
        yield group


def _row_bytes(domain: str, ids: Sequence[int]) -> bytes:
    return domain.encode() + b"\0" + np.asarray(ids, dtype="<i8").tobytes()


def load_calibration(
    sources: Sequence[str],
    tokenizer_path: Path,
    *,
    num_samples: int = 512,
    max_length: int = 2048,
    shuffle: bool = False,
    pack: bool = False,
    seed: int = 0,
    trust_remote_code: bool = False,
    label: str = DEFAULT_LABEL,
) -> CalibrationSet:
    """Read calibration sources and tokenise them.

    Args:
        sources: ``[DOMAIN=]SOURCE`` each; a source is a ``.jsonl``, ``.json``, ``.parquet`` or ``.txt`` file, or a Hub
            data set ``org/name[/config][@split][#revision]``. Rows have a column ``text``, ``messages`` (the chat
            template is applied) or ``input_ids`` (used as they are); a column ``domain`` labels the row. A ``.txt``
            file is split at blank lines.
        tokenizer_path: the checkpoint folder; its tokenizer is loaded only when a row needs it.
        num_samples: rows taken from each source, the first ones or, with ``shuffle``, drawn with ``seed``.
        max_length: tokens per sequence.
        pack: join the rows of a domain and cut them into sequences of exactly ``max_length``.
        trust_remote_code: let the tokenizer run its own code.
        label: the column that labels rows; by another than ``domain`` only rows that have it are labelled.

    Raises:
        ConfigError: a source cannot be read, or gives no usable token.
    """
    if num_samples < 1 or max_length < 1:
        raise ConfigError("--num-samples and --max-length must be at least 1")
    if seed < 0:
        raise ConfigError(f"--seed must be at least 0, not {seed}")
    if not sources:
        raise ConfigError("no calibration source is given", f"give {_SOURCES}")
    recipe = _Recipe(num_samples=num_samples, max_length=max_length, shuffle=shuffle, pack=pack, seed=seed, label=label)
    encode = _Encoder(tokenizer_path, trust_remote_code=trust_remote_code)
    read = [_read_source(source, encode, recipe) for source in ((sources,) if isinstance(sources, str) else sources)]
    return CalibrationSet(
        sequences=tuple(ids for pairs, _ in read for _, ids in pairs),
        domains=tuple(domain for pairs, _ in read for domain, _ in pairs),
        provenance=tuple(entry for _, entry in read),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Recipe:
    """How rows are drawn, cut and packed, see :func:`load_calibration`."""

    num_samples: int
    max_length: int
    shuffle: bool
    pack: bool
    seed: int
    label: str


def _read_source(source: str, encode: _Encoder, recipe: _Recipe) -> tuple[list[Pair], dict[str, Any]]:
    """Labelled sequences of one source, and its entry of the provenance."""
    label, location = _split_label(source)
    opened = open_source(location)
    rows = _take(enumerate(opened.rows, 1), recipe.num_samples, shuffle=recipe.shuffle, seed=recipe.seed)
    read = [(_label(row, label, recipe.label), *encode(row, f"row {number} of {location!r}")) for number, row in rows]
    columns = {column for _, column, ids in read if ids}
    pairs = [(domain, ids) for domain, _, ids in read if ids]
    if recipe.pack:
        pairs = _packed(pairs, recipe.max_length, encode.separator if columns - {"input_ids"} else ())
    else:
        pairs = [(domain, ids[: recipe.max_length]) for domain, ids in pairs]
    if not pairs:
        raise ConfigError(f"calibration source {location!r} gives no usable token", "check its rows and columns")
    entry = {
        **opened.origin,
        **encode.origin(columns),
        "domains": sorted({domain for domain, _ in pairs}),
        "rows": len(rows),
        "sequences": len(pairs),
        "tokens": sum(len(ids) for _, ids in pairs),
        "max_length": recipe.max_length,
        "packed": recipe.pack,
        "shuffle_seed": recipe.seed if recipe.shuffle else None,
        "sha256": sha256_bytes(*(_row_bytes(domain, ids) for domain, ids in pairs)),
    }
    return pairs, entry


def _split_label(source: str) -> tuple[str, str]:
    """``code=data.jsonl`` is the source ``data.jsonl`` with the label ``code``."""
    label, equals, location = source.partition("=")
    return (label, location) if equals and re.fullmatch(r"[\w-]+", label) else ("", source)


def _label(row: Row, given: str, column: str) -> str:
    own, default = row.get(column), (given or DEFAULT_DOMAIN) if column == DEFAULT_LABEL else ""
    return default if own is None or own == "" else str(own)


def _take(rows: Iterable[T], count: int, *, shuffle: bool, seed: int) -> list[T]:
    if not shuffle:
        return list(itertools.islice(rows, count))
    everything = list(rows)
    order = np.random.default_rng(seed).permutation(len(everything))[:count]
    return [everything[index] for index in order]


# --- sources --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Rows, and where exactly they come from: a file by its content, a data set by its commit."""

    rows: Iterable[Row]
    origin: dict[str, Any]


def _is_file(location: str) -> bool:
    return Path(location).suffix in {".jsonl", ".json", ".parquet", ".txt"}


def open_source(location: str) -> Source:
    """Open a local file or a Hub data set; the rows of a file are read when they are asked for.

    Raises:
        ConfigError: it cannot be read.
    """
    path = Path(location)
    if not _is_file(location):
        if path.exists():
            raise ConfigError(f"cannot read calibration data from {location!r}", f"it must be {_SOURCES}")
        return _hub_source(location)
    if not path.is_file():
        raise ConfigError(f"no calibration file {location!r}")
    readers = {".jsonl": _jsonl_rows, ".json": _json_rows, ".parquet": _parquet_rows, ".txt": _txt_rows}
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return Source(rows=readers[path.suffix](path), origin={"source": path.name, "file_sha256": digest})


def _jsonl_rows(path: Path) -> Iterator[Row]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield _object(parse_json(line, f"{path}:{number}"), f"{path}:{number}")


def _json_rows(path: Path) -> Iterator[Row]:
    content = parse_json(path.read_bytes(), path)
    rows = content.get("data") if isinstance(content, dict) else content
    if not isinstance(rows, list):
        raise ConfigError(f"{path} is neither a list of rows nor an object with a list 'data'")
    for number, row in enumerate(rows):
        yield _object(row, f"{path}[{number}]")


def _object(row: object, where: str) -> Row:
    if not isinstance(row, dict):
        raise ConfigError(f"{where} is not a row with columns")
    return row


def _parquet_rows(path: Path) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        for batch in pq.ParquetFile(path).iter_batches():
            yield from batch.to_pylist()
    except pa.ArrowException as error:
        raise ConfigError(f"cannot read {path}: {error}") from error


def _txt_rows(path: Path) -> Iterator[Row]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text: {error}") from error
    for paragraph in re.split(r"\n\s*\n", text):
        if paragraph.strip():
            yield {"text": paragraph}


_DATA_SET = re.compile(
    r"(?P<name>\w[\w.-]*/[\w.-]+)(?:/(?P<config>[\w.-]+))?(?:@(?P<split>[^#]*))?(?:#(?P<revision>.+))?"
)


def _hub_source(location: str) -> Source:
    wanted = _DATA_SET.fullmatch(location)
    if not wanted:
        raise ConfigError(f"calibration source {location!r} is neither a file nor a data set", f"give {_SOURCES}")
    revision, split = wanted["revision"], wanted["split"] or "train"
    import datasets

    if quiet.get() or not sys.stderr.isatty():
        datasets.disable_progress_bars()
    try:
        builder = datasets.load_dataset_builder(wanted["name"], wanted["config"], revision=revision)
        builder.download_and_prepare()
        data = builder.as_dataset(split=split)
    except Exception as error:  # no network, no such name, config or split, damaged files: datasets raises anything
        raise ConfigError(f"cannot load data set {location!r}: {first_line(error)}", "or use a local file") from error
    if revision and re.fullmatch("[0-9a-f]{40}", revision) and builder.hash != revision:
        # without a network datasets takes whatever commit it has
        raise ConfigError(f"of data set {location!r} only commit {builder.hash} is here", "go online, or name that")
    origin = {"source": wanted["name"], "config": builder.config.name, "split": split, "revision": builder.hash}
    return Source(rows=data, origin=origin)


# --- tokens ---------------------------------------------------------------------------------------------------------


class _Encoder:
    """Rows to token ids; the tokenizer is loaded when the first row needs it."""

    def __init__(self, path: Path, *, trust_remote_code: bool) -> None:
        self._path = path
        self._trust = trust_remote_code
        self._loaded: Any = None

    @property
    def tokenizer(self) -> Any:
        if self._loaded is None:
            self._loaded = _load_tokenizer(self._path, trust_remote_code=self._trust)
        return self._loaded

    def __call__(self, row: Row, where: str) -> tuple[str, tuple[int, ...]]:
        """The column that was used, and the token ids."""
        if row.get("input_ids") is not None:
            return "input_ids", self._given(row["input_ids"], where)
        if row.get("messages") is not None:
            return "messages", self._chat(row["messages"], where)
        if isinstance(row.get("text"), str):
            return "text", self._text(row["text"])
        columns = ", ".join(map(repr, row)) or "none"
        raise ConfigError(f"{where} has no text, messages or input_ids", f"its columns: {columns}")

    def _text(self, text: str) -> tuple[int, ...]:
        return tuple(self.tokenizer(text, verbose=False)["input_ids"]) if text.strip() else ()

    def _given(self, ids: Any, where: str) -> tuple[int, ...]:
        if not isinstance(ids, list) or not all(type(token) is int and 0 <= token < 2**31 for token in ids):
            raise ConfigError(f"{where} has input_ids that are not token ids")
        return tuple(ids)

    def _chat(self, messages: Any, where: str) -> tuple[int, ...]:
        messages = parse_json(messages, where) if isinstance(messages, str) else messages
        if not self.tokenizer.chat_template:
            raise ConfigError(f"{where} has messages and the tokenizer has no chat template", "use a text column")
        try:
            text = self.tokenizer.apply_chat_template(messages, tokenize=False)
        except Exception as error:  # a template is a program that came with the model: it may raise anything
            raise ConfigError(f"the chat template does not take {where}: {first_line(error)}") from error
        return tuple(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    @property
    def separator(self) -> tuple[int, ...]:
        """What stands between packed rows: the end-of-sequence token."""
        end = self.tokenizer.eos_token_id
        return () if end is None else (int(end),)

    def origin(self, columns: Set[str]) -> dict[str, Any]:
        """What made token ids of these columns, by its content."""
        facts: dict[str, Any] = {"columns": sorted(columns)}
        if "messages" in columns:
            facts["chat_template_sha256"] = sha256_bytes(self.tokenizer.get_chat_template().encode())
        if columns - {"input_ids"}:
            file = self._path / "tokenizer.json"
            vocabulary = json.dumps(self.tokenizer.get_vocab(), sort_keys=True).encode()
            facts["tokenizer_sha256"] = sha256_bytes(file.read_bytes() if file.is_file() else vocabulary)
        return facts


def _load_tokenizer(path: Path, *, trust_remote_code: bool) -> Any:
    from transformers import AutoTokenizer

    hint = "calibrate with input_ids, or add the tokenizer's files"
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    except Exception as error:  # damaged files raise anything, down to a bare Exception
        raise ConfigError(f"cannot load the tokenizer of {path}: {first_line(error)}", hint) from error
    # For some families transformers makes up a tokenizer without words where a folder has none.
    if not tokenizer.get_vocab().keys() - set(tokenizer.all_special_tokens):
        raise ConfigError(f"the tokenizer of {path} has no vocabulary", hint)
    return tokenizer


def _packed(pairs: Sequence[Pair], max_length: int, separator: tuple[int, ...]) -> list[Pair]:
    """Join the rows of each domain and cut them; a last piece shorter than ``max_length`` stays when it is alone.

    A separator follows every row; rows of given token ids have none, for they are used as they are.
    """
    joined: dict[str, list[int]] = defaultdict(list)
    for domain, ids in pairs:
        joined[domain] += [*ids, *separator]
    packed = []
    for domain, stream in joined.items():
        whole = max(len(stream) // max_length * max_length, min(len(stream), max_length))
        packed += [(domain, tuple(stream[start : start + max_length])) for start in range(0, whole, max_length)]
    return packed


def check_vocabulary(calibration: CalibrationSet, vocabulary: int) -> None:
    """Refuse token ids that the model does not have.

    Raises:
        ConfigError: an id is outside the vocabulary.
    """
    largest = max(max(ids) for ids in calibration.sequences)
    if largest >= vocabulary:
        raise ConfigError(f"calibration token id {largest} is outside the model's vocabulary of {vocabulary}")
