"""Calibration data: local files or Hub data sets to token ids, with exact provenance.

One sequence per row unless packed; every batch holds rows of one domain, and the list of batches is fixed before
anything runs, so that any split of it over processes adds up to the same counts.
"""

from __future__ import annotations

import itertools
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from moeprune._files import parse_json, sha256_bytes
from moeprune.errors import ConfigError, first_line

T = TypeVar("T")
DEFAULT_DOMAIN = "default"
Row = Mapping[str, Any]
_SOURCES = "a .jsonl, .json, .parquet or .txt file, or a data set org/name[/config][@split]"


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Sequences of one domain that go through the model together."""

    domain: str
    sequences: tuple[tuple[int, ...], ...]


@dataclass(frozen=True, kw_only=True)
class CalibrationSet:
    """Token sequences with their domain labels.

    Attributes:
        sequences: token ids by row; ``domains``: the label of each row.
        provenance: one entry per source: source, rows, tokens, seed, sha256 of the token ids.
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
        """Group rows of one domain and similar length; padded, no batch of several rows exceeds ``batch_tokens``."""
        by_domain: dict[str, list[tuple[int, ...]]] = defaultdict(list)
        for domain, ids in zip(self.domains, self.sequences, strict=True):
            by_domain[domain].append(ids)
        batches = []
        for domain in sorted(by_domain):
            group: list[tuple[int, ...]] = []
            for ids in sorted(by_domain[domain], key=len, reverse=True):  # stable: equal lengths keep their order
                if group and len(group[0]) * (len(group) + 1) > batch_tokens:
                    batches.append(Batch(domain=domain, sequences=tuple(group)))
                    group = []
                group.append(ids)
            batches.append(Batch(domain=domain, sequences=tuple(group)))
        return batches


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
) -> CalibrationSet:
    """Read calibration sources and tokenise them.

    Args:
        sources: ``[DOMAIN=]SOURCE`` each; a source is a ``.jsonl``, ``.json``, ``.parquet`` or ``.txt`` file, or a Hub
            data set ``org/name[/config][@split]``. Rows have a column ``text``, ``messages`` (the chat template is
            applied) or ``input_ids`` (used as they are); a column ``domain`` labels the row. A ``.txt`` file is split
            at blank lines.
        tokenizer_path: the checkpoint folder; its tokenizer is loaded only when a row needs it.
        num_samples: rows taken from each source, the first ones or, with ``shuffle``, drawn with ``seed``.
        max_length: tokens per sequence.
        pack: join the rows of a domain and cut them into sequences of exactly ``max_length``.
        trust_remote_code: let the tokenizer run its own code.

    Raises:
        ConfigError: a source cannot be read, or gives no usable token.
    """
    if num_samples < 1 or max_length < 1:
        raise ConfigError("--num-samples and --max-length must be at least 1")
    if seed < 0:
        raise ConfigError(f"--seed must be at least 0, not {seed}")
    if not sources:
        raise ConfigError("no calibration source is given", f"give {_SOURCES}")
    encode = _Encoder(tokenizer_path, trust_remote_code=trust_remote_code)
    sequences: list[tuple[int, ...]] = []
    domains: list[str] = []
    provenance = []
    for source in (sources,) if isinstance(sources, str) else sources:
        label, location = _split_label(source)
        rows = _take(enumerate(read_rows(location), 1), num_samples, shuffle=shuffle, seed=seed)
        pairs = [(_domain(row, label), encode(row, f"row {number} of {location!r}")) for number, row in rows]
        pairs = [(domain, ids) for domain, ids in pairs if ids]
        pairs = _packed(pairs, max_length, encode) if pack else [(domain, ids[:max_length]) for domain, ids in pairs]
        if not pairs:
            raise ConfigError(f"calibration source {location!r} gives no usable token", "check its rows and columns")
        domains += [domain for domain, _ in pairs]
        sequences += [ids for _, ids in pairs]
        provenance.append(_describe(location, pairs, len(rows), shuffle=shuffle, pack=pack, seed=seed))
    return CalibrationSet(sequences=tuple(sequences), domains=tuple(domains), provenance=tuple(provenance))


def _describe(
    location: str, pairs: Sequence[tuple[str, tuple[int, ...]]], rows: int, *, shuffle: bool, pack: bool, seed: int
) -> dict[str, Any]:
    return {
        "source": Path(location).name if _is_file(location) else location,
        "rows": rows,
        "sequences": len(pairs),
        "tokens": sum(len(ids) for _, ids in pairs),
        "packed": pack,
        "shuffle_seed": seed if shuffle else None,
        "sha256": sha256_bytes(*(_row_bytes(domain, ids) for domain, ids in pairs)),
    }


def _split_label(source: str) -> tuple[str, str]:
    """``code=data.jsonl`` is the source ``data.jsonl`` with the label ``code``."""
    label, equals, location = source.partition("=")
    return (label, location) if equals and re.fullmatch(r"[\w-]+", label) else ("", source)


def _domain(row: Row, label: str) -> str:
    own = row.get("domain")
    return label or DEFAULT_DOMAIN if own is None or own == "" else str(own)


def _take(rows: Iterable[T], count: int, *, shuffle: bool, seed: int) -> list[T]:
    if not shuffle:
        return list(itertools.islice(rows, count))
    everything = list(rows)
    order = np.random.default_rng(seed).permutation(len(everything))[:count]
    return [everything[index] for index in order]


# --- sources --------------------------------------------------------------------------------------------------------


def _is_file(location: str) -> bool:
    return Path(location).suffix in {".jsonl", ".json", ".parquet", ".txt"}


def read_rows(location: str) -> Iterator[Row]:
    """Rows of a local file or a Hub data set.

    Raises:
        ConfigError: it cannot be read.
    """
    path = Path(location)
    if not _is_file(location):
        if path.exists():
            raise ConfigError(f"cannot read calibration data from {location!r}", f"it must be {_SOURCES}")
        return _hub_rows(location)
    if not path.is_file():
        raise ConfigError(f"no calibration file {location!r}")
    readers = {".jsonl": _jsonl_rows, ".json": _json_rows, ".parquet": _parquet_rows, ".txt": _txt_rows}
    return readers[path.suffix](path)


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


def _hub_rows(location: str) -> Iterator[Row]:
    name, _, split = location.partition("@")
    if not re.fullmatch(r"\w[\w.-]*(/[\w.-]+){1,2}", name):
        raise ConfigError(f"calibration source {location!r} is neither a file nor a data set", f"give {_SOURCES}")
    parts = name.split("/")
    from datasets import load_dataset

    try:
        data = load_dataset("/".join(parts[:2]), parts[2] if len(parts) == 3 else None, split=split or "train")
    except (OSError, ValueError) as error:  # what datasets raises for no network, no such name, split or config
        raise ConfigError(f"cannot load data set {location!r}: {first_line(error)}", "or use a local file") from error
    yield from data


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

    def __call__(self, row: Row, where: str) -> tuple[int, ...]:
        if row.get("input_ids") is not None:
            return self._given(row["input_ids"], where)
        if row.get("messages") is not None:
            return self._chat(row["messages"], where)
        if isinstance(row.get("text"), str):
            return tuple(self.tokenizer(row["text"], verbose=False)["input_ids"]) if row["text"].strip() else ()
        columns = ", ".join(map(repr, row)) or "none"
        raise ConfigError(f"{where} has no text, messages or input_ids", f"its columns: {columns}")

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
        """What stands between packed rows: the end-of-sequence token, when a tokenizer is in use."""
        end = self._loaded.eos_token_id if self._loaded is not None else None
        return () if end is None else (int(end),)


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


def _packed(
    pairs: Sequence[tuple[str, tuple[int, ...]]], max_length: int, encode: _Encoder
) -> list[tuple[str, tuple[int, ...]]]:
    """Join the rows of each domain and cut them; a last piece shorter than ``max_length`` stays when it is alone."""
    joined: dict[str, list[int]] = defaultdict(list)
    for domain, ids in pairs:
        joined[domain] += [*ids, *encode.separator]
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
