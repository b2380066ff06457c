"""Calibration data of every kind: rows to token ids, labels, batches, and errors that name the row."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeprune.calibration import CalibrationSet, check_vocabulary, load_calibration, open_source
from moeprune.errors import ArtifactError, ConfigError, MoePruneError

Rows = Sequence[dict[str, Any]]
NO_TOKENIZER = Path("/nowhere")


def jsonl(path: Path, rows: Rows) -> str:
    """One row per line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def load(*sources: str, tokenizer: Path = NO_TOKENIZER, **options: Any) -> CalibrationSet:
    """Load sources; without a tokenizer only token ids can be read."""
    return load_calibration(sources, tokenizer, **options)


def ids(*lengths: int) -> list[dict[str, Any]]:
    """Rows of token ids; row i holds the number i."""
    return [{"input_ids": [number] * length} for number, length in enumerate(lengths)]


# --- rows -----------------------------------------------------------------------------------------------------------

ROWS = [{"input_ids": [1, 2, 3], "domain": "prose", "more": 1}, {"input_ids": [4], "domain": None, "more": 2}]


def write_rows(path: Path) -> Path:
    """The two rows in the format that the suffix says."""
    match path.suffix:
        case ".jsonl":
            path.write_text("\n".join(json.dumps(row) for row in ROWS) + "\n\n")
        case ".json":
            path.write_text(json.dumps({"version": 1, "data": ROWS} if path.stem == "wrapped" else ROWS))
        case ".parquet":
            pq.write_table(pa.Table.from_pylist(ROWS), path)
    return path


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "wrapped.json", "rows.parquet"])
def test_every_format_gives_the_same_rows(tmp_path: Path, name: str) -> None:
    """Other columns are ignored, and token ids are used as they are, without a tokenizer."""
    data = load(f"code={write_rows(tmp_path / name)}")
    assert data.sequences == ((1, 2, 3), (4,))
    assert data.domains == ("prose", "code")
    assert data.tokens == 4
    assert data.provenance == (
        {
            "source": name,
            "file_sha256": hashlib.sha256((tmp_path / name).read_bytes()).hexdigest(),
            "columns": ["input_ids"],
            "domains": ["code", "prose"],
            "rows": 2,
            "sequences": 2,
            "tokens": 4,
            "max_length": 2048,
            "packed": False,
            "shuffle_seed": None,
            "sha256": data.fingerprint,
        },
    )


def test_a_text_file_is_split_at_blank_lines(tmp_path: Path) -> None:
    """Paragraphs are rows; blank lines of spaces count, and a byte order mark is no text."""
    (tmp_path / "x.txt").write_bytes("\ufeffone\ntwo\r\n \t\r\nthrée\n\n\n\nfour".encode())
    assert [row["text"] for row in open_source(str(tmp_path / "x.txt")).rows] == ["one\ntwo", "thrée", "four"]


@pytest.mark.parametrize(
    ("label", "row", "domain"),
    [
        ("", {}, "default"),
        ("code", {}, "code"),
        ("code", {"domain": "prose"}, "prose"),
        ("", {"domain": ""}, "default"),
        ("code", {"domain": None}, "code"),
        ("code", {"domain": 0}, "0"),
    ],
)
def test_the_label_of_a_row(tmp_path: Path, label: str, row: dict[str, Any], domain: str) -> None:
    """The row's own column wins over the source's label, which wins over the default."""
    source = jsonl(tmp_path / "x.jsonl", [{"input_ids": [1]} | row])
    assert load(f"{label}={source}" if label else source).domains == (domain,)


def test_sources_are_read_in_order(tmp_path: Path) -> None:
    """Rows of the first source come first; the limit holds for each of them."""
    first, second = jsonl(tmp_path / "a.jsonl", ids(1, 1, 1)), jsonl(tmp_path / "b.jsonl", ids(2, 2, 2))
    data = load(f"a={first}", f"b={second}", num_samples=2)
    assert data.sequences == ((0,), (1,), (0, 0), (1, 1))
    assert data.domains == ("a", "a", "b", "b")
    assert [entry["rows"] for entry in data.provenance] == [2, 2]
    assert load_calibration(first, NO_TOKENIZER).sequences == ((0,), (1,), (2,))


# --- which rows, how long -------------------------------------------------------------------------------------------


def test_the_first_rows_are_taken_in_file_order(tmp_path: Path) -> None:
    """Nothing behind the last row that is wanted is even read."""
    source = jsonl(tmp_path / "x.jsonl", ids(5, 9, 2))
    with Path(source).open("a") as file:
        file.write("this is no JSON\n")
    data = load(source, num_samples=3, max_length=4)
    assert data.sequences == ((0,) * 4, (1,) * 4, (2,) * 2)
    with pytest.raises(ArtifactError, match=r"x\.jsonl:4 is not valid JSON"):
        load(source, num_samples=4)


def test_shuffling_draws_with_the_seed(tmp_path: Path) -> None:
    """Different rows for different seeds, the same for the same, from the whole file and none twice."""
    source = jsonl(tmp_path / "x.jsonl", ids(*[1] * 100))
    draws = [load(source, num_samples=20, shuffle=True, seed=seed) for seed in (0, 1, 0)]
    numbers = [[row[0] for row in draw.sequences] for draw in draws]
    assert numbers[0] == numbers[2] != numbers[1]
    assert all(len(set(drawn)) == 20 and max(drawn) > 20 for drawn in numbers)
    assert [draw.provenance[0]["shuffle_seed"] for draw in draws] == [0, 1, 0]
    assert sorted(load(source, shuffle=True).sequences) == [(number,) for number in range(100)]


def test_packing_joins_the_rows_of_a_domain(tmp_path: Path) -> None:
    """Every sequence is full; the rest of each domain's stream is left out."""
    rows = [row | {"domain": "ab"[number % 2]} for number, row in enumerate(ids(3, 4, 3, 5))]
    data = load(jsonl(tmp_path / "x.jsonl", rows), max_length=4, pack=True)
    assert data.sequences == ((0, 0, 0, 2), (1, 1, 1, 1), (3, 3, 3, 3))
    assert data.domains == ("a", "b", "b")
    assert (data.provenance[0]["packed"], data.provenance[0]["sequences"], data.provenance[0]["rows"]) == (True, 3, 4)


def test_packing_keeps_a_short_stream(tmp_path: Path) -> None:
    """A domain that does not fill one sequence would otherwise vanish."""
    assert load(jsonl(tmp_path / "x.jsonl", ids(2, 1)), max_length=8, pack=True).sequences == ((0, 0, 1),)


def test_provenance_follows_the_content(tmp_path: Path) -> None:
    """One token, one label, or where one row ends and the next begins: each is other data; the path is not."""
    variants: list[Rows] = [
        [{"input_ids": [1, 2]}, {"input_ids": [3]}],
        [{"input_ids": [1, 2]}, {"input_ids": [4]}],
        [{"input_ids": [1]}, {"input_ids": [2, 3]}],
        [{"input_ids": [1, 2]}, {"input_ids": [3], "domain": "x"}],
        [{"input_ids": [3]}, {"input_ids": [1, 2]}],
    ]
    sets = [load(jsonl(tmp_path / f"{number}.jsonl", rows)) for number, rows in enumerate(variants)]
    assert len({data.fingerprint for data in sets}) == len({data.provenance[0]["sha256"] for data in sets}) == 5
    (tmp_path / "other").mkdir()
    assert load(jsonl(tmp_path / "other" / "0.jsonl", variants[0])) == sets[0]
    spaced = json.dumps(variants[0][0]) + "\n\n" + json.dumps(variants[0][1])
    (tmp_path / "other" / "0.jsonl").write_text(spaced)  # the same tokens from a file of other bytes
    again = load(str(tmp_path / "other" / "0.jsonl")).provenance[0]
    assert {key for key, value in sets[0].provenance[0].items() if again[key] != value} == {"file_sha256"}


# --- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ({"input_ids": "12"}, "row 2 of .* has input_ids that are not token ids"),
        ({"input_ids": 12}, "not token ids"),
        ({"input_ids": [1, "2"]}, "not token ids"),
        ({"input_ids": [1.0]}, "not token ids"),
        ({"input_ids": [True]}, "not token ids"),
        ({"input_ids": [-1]}, "not token ids"),
        ({"input_ids": [2**70]}, "not token ids"),
        ({"input_ids": [[1]]}, "not token ids"),
        ({"input_ids": {"1": 1}}, "not token ids"),
        (
            {"prompt": "x", "answer": "y"},
            "row 2 of .* has no text, .* its columns: 'prompt', 'answer'|'prompt', 'answer'",
        ),
        ({"text": None}, "row 2 of .* has no text, messages or input_ids"),
        ({"text": ["a"]}, "has no text, messages or input_ids"),
        ({}, "its columns: none"),
    ],
)
def test_a_row_that_cannot_be_used_is_named(tmp_path: Path, row: dict[str, Any], why: str) -> None:
    """The file, the row and what is wrong with it."""
    source = jsonl(tmp_path / "x.jsonl", [{"input_ids": [1]}, row])
    with pytest.raises(ConfigError, match=why) as caught:
        load(source)
    assert "x.jsonl" in caught.value.message


@pytest.mark.parametrize(
    ("name", "content", "why"),
    [
        ("x.jsonl", b'{"input_ids": [1]}\n{"input_ids": [1]\n', r"x\.jsonl:2 is not valid JSON"),
        ("x.jsonl", b'{"input_ids": [1]}\n\n"text"\n', r"x\.jsonl:3 is not a row with columns"),
        ("x.jsonl", b'\n{"text": "\xe9"}\n', r"x\.jsonl:2 is not valid JSON: .*can't decode byte"),
        ("x.jsonl", b'{"text": "\\ud83d"}\n', r"x\.jsonl:1 is not valid JSON: .*surrogates"),
        ("x.json", b'[{"input_ids": [1]}, 3]', r"x\.json\[1\] is not a row with columns"),
        ("x.json", b'{"rows": []}', "neither a list of rows nor an object with a list 'data'"),
        ("x.json", b"3", "neither a list of rows"),
        ("x.json", b"{", r"x\.json is not valid JSON"),
        ("x.parquet", b"PAR0 not parquet", r"cannot read .*x\.parquet"),
        ("x.txt", b"caf\xe9", r"x\.txt is not UTF-8 text"),
        ("x.jsonl", b"", "gives no usable token"),
        ("x.json", b"[]", "gives no usable token"),
        ("x.txt", b"\n \n\n", "gives no usable token"),
        ("x.jsonl", b'{"input_ids": []}\n{"text": " \\n"}\n', "gives no usable token"),
    ],
)
@pytest.mark.parametrize("pack", [False, True])
def test_a_file_that_cannot_be_used_is_named(tmp_path: Path, name: str, content: bytes, why: str, pack: bool) -> None:
    """Damage names the line; a file without one token is an error, also when rows are packed."""
    (tmp_path / name).write_bytes(content)
    with pytest.raises(MoePruneError, match=why):
        load(str(tmp_path / name), pack=pack)


@pytest.mark.parametrize(
    ("source", "why"),
    [
        ("none.jsonl", "no calibration file 'none.jsonl'"),
        ("code=none.parquet", "no calibration file 'none.parquet'"),
        ("nothing", "'nothing' is neither a file nor a data set .*org/name"),
        ("a/b/c/d", "is neither a file nor a data set"),
        ("a/b#", "is neither a file nor a data set"),
        ("a#b", "is neither a file nor a data set"),
        ("/data/rows", "is neither a file nor a data set"),
        ("../data", "is neither a file nor a data set"),
        ("", "cannot read calibration data from ''"),
    ],
)
def test_a_source_that_is_not_there(source: str, why: str) -> None:
    """What is no known file and no name of a data set is refused without asking the Hub."""
    with pytest.raises(ConfigError, match=why):
        load(source)


def test_a_local_file_of_another_kind_never_asks_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A path like data/rows.csv looks like a name of the Hub and is a file here."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "rows.csv").touch()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"cannot read calibration data from 'data/rows\.csv' .*\.jsonl"):
        load("data/rows.csv")


@pytest.mark.parametrize("options", [{"num_samples": 0}, {"max_length": 0}, {"seed": -1}])
def test_numbers_that_cannot_be(tmp_path: Path, options: dict[str, int]) -> None:
    """Refused before anything is read."""
    with pytest.raises(ConfigError, match="must be at least"):
        load(str(tmp_path / "none.jsonl"), **options)
    with pytest.raises(ConfigError, match="no calibration source is given"):
        load()


def test_token_ids_must_be_in_the_vocabulary(tmp_path: Path) -> None:
    """The largest id decides, in whichever row."""
    data = load(jsonl(tmp_path / "x.jsonl", ids(1, 1, 1)))
    check_vocabulary(data, 3)
    with pytest.raises(ConfigError, match="token id 2 is outside the model's vocabulary of 2"):
        check_vocabulary(data, 2)


# --- data sets of the Hub -------------------------------------------------------------------------------------------


def test_a_data_set_without_the_hub_is_one_line() -> None:
    """The name and a way out; no traceback of the client."""
    with pytest.raises(ConfigError, match=r"cannot load data set 'nobody/nothing': .* \(or use a local file"):
        load("prose=nobody/nothing")


# --- batches --------------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 30)), min_size=1, max_size=40),
    st.integers(1, 120),
)
def test_every_row_is_in_one_batch_of_its_domain_and_half(rows: list[tuple[str, int]], budget: int) -> None:
    """Padded, no batch of several rows exceeds the budget, and none could have taken the next row."""
    sequences = tuple((number, *[0] * (length - 1)) for number, (_, length) in enumerate(rows))
    data = CalibrationSet(sequences=sequences, domains=tuple(label for label, _ in rows), provenance=())
    seen: Counter[str] = Counter()
    expected = []
    for domain, ids in zip(data.domains, sequences, strict=True):
        expected.append((domain, seen[domain] % 2, ids))  # the rows of a domain take turns
        seen[domain] += 1
    batches = data.batches(budget)
    assert sorted((batch.domain, batch.half, ids) for batch in batches for ids in batch.sequences) == sorted(expected)
    assert [(batch.domain, batch.half) for batch in batches] == sorted((batch.domain, batch.half) for batch in batches)
    for batch in batches:
        longest = max(map(len, batch.sequences))
        assert len(batch.sequences) == 1 or longest * len(batch.sequences) <= budget
    for batch, following in itertools.pairwise(batches):
        if (batch.domain, batch.half) == (following.domain, following.half):
            assert len(batch.sequences[0]) * (len(batch.sequences) + 1) > budget
            assert min(map(len, batch.sequences)) >= max(map(len, following.sequences))
    assert batches == data.batches(budget)


def test_batches_are_filled_to_the_budget() -> None:
    """Exactly the budget still fits, a longer row goes alone, and padding to the longest row counts."""
    lengths = {"a": [5, 30, 5, 5, 4, 5, 5], "b": [10, 1]}
    data = CalibrationSet(
        sequences=tuple((0,) * length for rows in lengths.values() for length in rows),
        domains=tuple(domain for domain, rows in lengths.items() for _ in rows),
        provenance=(),
    )
    sizes = [(batch.domain, batch.half, [len(row) for row in batch.sequences]) for batch in data.batches(10)]
    assert sizes == [
        ("a", 0, [5, 5]),
        ("a", 0, [5, 4]),
        ("a", 1, [30]),
        ("a", 1, [5, 5]),
        ("b", 0, [10]),
        ("b", 1, [1]),
    ]


# --- text: the only tests here that load a tokenizer ----------------------------------------------------------------

TEMPLATE = "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
TEMPLATE += "<s> {{ m.content }} </s> {% endfor %}"
WORDS = ["[UNK]", "<s>", "</s>", "one", "two", "three", "four"]


@pytest.fixture(scope="module")
def tokenizer_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A folder with a tokenizer of four words that puts <s> in front, with or without a chat template."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    made = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="[UNK]"))  # noqa: S106
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])

    def build(template: str | None) -> Path:
        folder = tmp_path_factory.mktemp("tokenizer")
        made.save(str(folder / "tokenizer.json"))
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>", "unk_token": "[UNK]"}
        config |= {"model_max_length": 3} | ({"chat_template": template} if template else {})
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
        return folder

    return build


def test_text_gets_the_tokenizers_own_special_tokens(tmp_path: Path, tokenizer_of: Callable[..., Path]) -> None:
    """Longer text than the tokenizer's own limit is cut by --max-length only, and blank text is no row."""
    source = jsonl(tmp_path / "x.jsonl", [{"text": "one two three four one"}, {"text": "  "}, {"text": "nine"}])
    folder = tokenizer_of(None)
    data = load(source, tokenizer=folder, max_length=5)
    assert data.sequences == ((1, 3, 4, 5, 6), (1, 0))
    [entry] = data.provenance
    assert (entry["rows"], entry["sequences"], entry["columns"], entry["max_length"]) == (3, 2, ["text"], 5)
    assert entry["tokenizer_sha256"] == hashlib.sha256((folder / "tokenizer.json").read_bytes()).hexdigest()
    assert "chat_template_sha256" not in entry
    (tmp_path / "x.txt").write_text("one\n\ntwo two")
    assert load(str(tmp_path / "x.txt"), tokenizer=tokenizer_of(None)).sequences == ((1, 3), (1, 4, 4))


def test_messages_go_through_the_chat_template(tmp_path: Path, tokenizer_of: Callable[..., Path]) -> None:
    """The template writes the special tokens; messages may be a list or, as some files have it, JSON text."""
    messages = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]
    rows = [{"messages": messages}, {"messages": json.dumps(messages[:1]), "text": "four"}]
    data = load(jsonl(tmp_path / "x.jsonl", rows), tokenizer=tokenizer_of(TEMPLATE))
    assert data.sequences == ((1, 3, 2, 1, 4, 2), (1, 3, 2))
    [entry] = data.provenance
    assert entry["columns"] == ["messages"]
    assert entry["chat_template_sha256"] == hashlib.sha256(TEMPLATE.encode()).hexdigest()
    assert "tokenizer_sha256" in entry


def test_packed_text_is_separated(tmp_path: Path, tokenizer_of: Callable[..., Path]) -> None:
    """The end-of-sequence token stands between rows, and blank rows leave no trace of themselves."""
    source = jsonl(tmp_path / "x.jsonl", [{"text": "one"}, {"text": ""}, {"text": "two three"}])
    assert load(source, tokenizer=tokenizer_of(None), pack=True, max_length=7).sequences == ((1, 3, 2, 1, 4, 5, 2),)


def test_packed_token_ids_have_no_separator(tmp_path: Path, tokenizer_of: Callable[..., Path]) -> None:
    """Given ids are used as they are, also after a source that needed the tokenizer; a source of both is text."""
    text = jsonl(tmp_path / "text.jsonl", [{"text": "one"}])
    given = jsonl(tmp_path / "given.jsonl", [{"input_ids": [5, 5]}, {"input_ids": [6]}, {"text": " "}])
    mixed = jsonl(tmp_path / "mixed.jsonl", [{"input_ids": [5]}, {"text": "one"}])
    data = load(text, given, mixed, tokenizer=tokenizer_of(None), pack=True, max_length=9)
    assert data.sequences == ((1, 3, 2), (5, 5, 6), (5, 2, 1, 3, 2))
    columns = [entry["columns"] for entry in data.provenance]
    assert columns == [["text"], ["input_ids"], ["input_ids", "text"]]
    assert ["tokenizer_sha256" in entry for entry in data.provenance] == [True, False, True]


def test_a_tokenizer_without_its_file_is_known_by_its_words(tmp_path: Path, tokenizer_of: Callable[..., Path]) -> None:
    """Older layouts have a vocabulary and merges in files of their own: other words give another fingerprint."""
    prints = set()
    for words in (["a", "b"], ["a", "c"]):
        folder = tmp_path / "".join(words)
        folder.mkdir()
        letters = {letter: number for number, letter in enumerate([*words, "Ġ", "<|endoftext|>"])}
        (folder / "vocab.json").write_text(json.dumps(letters))
        (folder / "merges.txt").write_text("#version: 0.2\n")
        (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')
        [entry] = load(jsonl(tmp_path / "x.jsonl", [{"text": "a a"}]), tokenizer=folder).provenance
        prints.add(entry["tokenizer_sha256"])
    assert len(prints) == 2


@pytest.mark.parametrize(
    ("messages", "template", "why"),
    [
        ([{"role": "tool", "content": "x"}], TEMPLATE, "the chat template does not take row 1 of .*no tools"),
        ("[{", TEMPLATE, "row 1 of .* is not valid JSON"),
        (3, TEMPLATE, "the chat template does not take row 1"),
        ([{"role": "user", "content": "x"}], None, "has messages and the tokenizer has no chat template"),
    ],
)
def test_messages_that_cannot_be_used(
    tmp_path: Path, tokenizer_of: Callable[..., Path], messages: Any, template: str | None, why: str
) -> None:
    """What the template raises is told in one line with the row."""
    with pytest.raises(MoePruneError, match=why):
        load(jsonl(tmp_path / "x.jsonl", [{"messages": messages}]), tokenizer=tokenizer_of(template))


@pytest.mark.parametrize(
    ("files", "why"),
    [
        ({}, "cannot load the tokenizer"),
        ({"tokenizer.json": "{"}, "cannot load the tokenizer"),
        ({"tokenizer.json": "{}"}, "cannot load the tokenizer"),
        # transformers makes up an empty tokenizer for this one
        ({"config.json": '{"model_type": "qwen3_moe"}'}, "has no vocabulary"),
    ],
)
def test_a_folder_without_a_usable_tokenizer(tmp_path: Path, files: dict[str, str], why: str) -> None:
    """Text needs the tokenizer's files; the hint names the way without."""
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    source = jsonl(tmp_path / "x.jsonl", [{"text": "one"}])
    with pytest.raises(ConfigError, match=why) as caught:
        load(source, tokenizer=tmp_path)
    assert "input_ids" in caught.value.hint
    assert load(jsonl(tmp_path / "y.jsonl", ids(3)), tokenizer=tmp_path).tokens == 3


def test_rows_of_numpy_integers_have_one_fingerprint() -> None:
    """Ids hash as little-endian int64, whatever made them."""
    plain = CalibrationSet(sequences=((1, 2),), domains=("a",), provenance=())
    numpy = CalibrationSet(sequences=(tuple(np.array([1, 2], dtype=np.int32)),), domains=("a",), provenance=())
    assert plain.fingerprint == numpy.fingerprint
