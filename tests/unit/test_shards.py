"""Bytes laid out over safetensors files, read back through the library, and the files that travel along."""

from __future__ import annotations

import itertools
import json
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from moeprune.errors import CheckpointError, ConfigError
from moeprune.rewrite import shards as module
from moeprune.rewrite.shards import (
    OutputTensor,
    Segment,
    assign_shards,
    copy_other_files,
    other_files,
    parse_size,
    tensor_digest,
    write_shards,
)

SOURCE_BYTES = np.random.default_rng(1).integers(0, 256, 512, dtype=np.uint8).tobytes()
Ranges = list[tuple[int, int, int]]


def tensor(folder: Path, name: str, ranges: Ranges) -> OutputTensor:
    """A tensor of bytes whose segments are (file number, begin, end)."""
    segments = tuple(Segment(file=folder / f"source{file}", begin=begin, end=end) for file, begin, end in ranges)
    size = sum(end - begin for _, begin, end in ranges)
    return OutputTensor(name=name, dtype="U8", shape=(size,), segments=segments)


def sources(folder: Path) -> Path:
    """Three files of different bytes to copy from."""
    for number in range(3):
        (folder / f"source{number}").write_bytes(SOURCE_BYTES[number:] + SOURCE_BYTES[:number])
    return folder


def expected(item: OutputTensor) -> bytes:
    """The bytes that a tensor should have."""
    return b"".join(segment.file.read_bytes()[segment.begin : segment.end] for segment in item.segments)


def read_back(folder: Path) -> dict[str, bytes]:
    """Every tensor of a folder through the safetensors library."""
    found = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="numpy") as file:
            assert file.metadata() == {"format": "pt"}
            found.update({name: file.get_tensor(name).tobytes() for name in file.keys()})  # noqa: SIM118
    return found


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """An empty folder to write into, beside the sources."""
    sources(tmp_path)
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


# --- sizes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("5GB", 5_000_000_000),
        ("512MiB", 512 * 2**20),
        ("1.5 kb", 1500),
        (" 2GiB ", 2**31),
        ("7", 7),
        ("7B", 7),
        ("1KiB", 1024),
        ("3mb", 3_000_000),
        ("1e3MB", 10**9),
    ],
)
def test_sizes_as_people_write_them(text: str, size: int) -> None:
    """Decimal and binary units, in any case."""
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "5TB", "5G", "five", "5 B B", "nan", "inf", "1e999GB", "5GBGB"])
def test_what_is_no_size(text: str) -> None:
    """One line, with two good ones."""
    with pytest.raises(ConfigError, match=r"is not a size .*5GB or 512MiB"):
        parse_size(text)


@pytest.mark.parametrize("text", ["0", "0GB", "-5GB", "0.1B"])
def test_a_shard_must_hold_something(text: str) -> None:
    """Zero and negative sizes are refused."""
    with pytest.raises(ConfigError, match="holds nothing"):
        parse_size(text)


# --- layout ---------------------------------------------------------------------------------------------------------

RANGES = st.lists(
    st.tuples(st.integers(0, 2), st.integers(0, 400), st.integers(0, 60)).map(lambda t: (t[0], t[1], t[1] + t[2])),
    max_size=3,
)
LAYOUTS = st.lists(RANGES, min_size=1, max_size=8)


@settings(deadline=None)
@given(LAYOUTS, st.integers(1, 200))
def test_shards_are_filled_in_order_and_never_overfull(layout: Sequence[Ranges], largest: int) -> None:
    """Order is kept; a shard above the limit holds one tensor; each next tensor would not have fitted before."""
    tensors = [tensor(Path(), f"t{number}", ranges) for number, ranges in enumerate(layout)]
    shards = assign_shards(tensors, largest)
    assert list(itertools.chain.from_iterable(shards)) == tensors
    sizes = [sum(item.nbytes for item in shard) for shard in shards]
    assert all(size <= largest or len(shard) == 1 for size, shard in zip(sizes, shards, strict=True))
    assert all(size + shard[0].nbytes > largest for size, shard in zip(sizes, shards[1:], strict=False))


@settings(deadline=None, max_examples=60)
@given(LAYOUTS, st.integers(1, 200), st.integers(1, 40))
def test_what_is_written_is_what_the_segments_say(layout: Sequence[Ranges], largest: int, buffer: int) -> None:
    """Any tensors, segments, shard size and buffer: the library reads the source's bytes, digests and index agree."""
    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_BUFFER", buffer)
        out = sources(Path(name)) / "out"
        out.mkdir()
        tensors = [tensor(Path(name), f"t{number}", ranges) for number, ranges in enumerate(layout)]
        copied = write_shards(tensors, out, {"format": "pt"}, largest)
        wanted = {item.name: expected(item) for item in tensors}
        assert read_back(out) == wanted
        assert [(item.name, item.nbytes) for item in copied] == [(item.name, item.nbytes) for item in tensors]
        assert {item.name: item.digest for item in copied} == {
            name: xxhash.xxh3_128_hexdigest(raw) for name, raw in wanted.items()
        }
        assert [item.digest for item in copied] == [tensor_digest(item.segments) for item in tensors]
        check_names(out, assign_shards(tensors, largest))


def check_names(folder: Path, shards: Sequence[Sequence[OutputTensor]]) -> None:
    """One file alone has no index; several are numbered and the index says which holds what."""
    if len(shards) == 1:
        assert [path.name for path in folder.iterdir()] == ["model.safetensors"]
        return
    names = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    assert sorted(path.name for path in folder.iterdir()) == [*names, "model.safetensors.index.json"]
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == {item.name: name for name, shard in zip(names, shards, strict=True) for item in shard}
    assert list(index["weight_map"]) == sorted(index["weight_map"])
    assert index["metadata"] == {"total_size": sum(item.nbytes for shard in shards for item in shard)}


def test_types_and_shapes_are_written_as_given(out: Path) -> None:
    """Nothing is decoded: packed and unusual types pass through with their metadata."""
    segments = (Segment(file=out.parent / "source0", begin=8, end=14),)
    item = OutputTensor(name="x", dtype="BF16", shape=(3, 1), segments=segments)
    write_shards([item], out, {}, 1000)
    with safe_open(out / "model.safetensors", framework="numpy") as file:
        assert (file.get_slice("x").get_dtype(), file.get_slice("x").get_shape()) == ("BF16", [3, 1])
        assert file.metadata() == {"format": "pt"}  # transformers refuses a file without it
    raw = (out / "model.safetensors").read_bytes()
    assert raw.endswith(SOURCE_BYTES[8:14])
    assert (len(raw) - 6) % 8 == 0


def test_equal_input_gives_equal_bytes(out: Path) -> None:
    """A second run writes the same files."""
    tensors = [tensor(out.parent, name, [(0, 3, 40), (2, 0, 9)]) for name in ("b", "a", "c")]
    again = out.parent / "again"
    again.mkdir()
    for folder in (out, again):
        write_shards(tensors, folder, {"format": "pt", "more": "1"}, 60)
    files = sorted(path.name for path in out.iterdir())
    assert len(files) == 4
    assert [(out / name).read_bytes() for name in files] == [(again / name).read_bytes() for name in files]


def test_a_source_that_shrinks_while_it_is_read_is_an_error(out: Path) -> None:
    """No tensor is padded with what happened to lie in the buffer."""
    item = tensor(out.parent, "x", [(0, 0, 100)])
    (out.parent / "source0").write_bytes(SOURCE_BYTES[:50])
    with pytest.raises(CheckpointError, match="source0 ended early"):
        write_shards([item], out, {}, 1000)


def test_a_file_that_is_there_is_never_written_over(out: Path) -> None:
    """The folder is a fresh one; anything in it is a mistake."""
    (out / "model.safetensors").touch()
    with pytest.raises(FileExistsError):
        write_shards([tensor(out.parent, "x", [(0, 0, 4)])], out, {}, 1000)


# --- other files ----------------------------------------------------------------------------------------------------

TRAVEL = ["LICENSE", "README.md", "chat_template.jinja", "generation_config.json", "img/a.png", "modeling_x.py"]
TRAVEL += ["img/deep/config.json", "sub/moeprune/x.txt", "tokenizer.json", "tokenizer.model"]
STAY = [
    "config.json",
    "model.safetensors",
    "model.safetensors.index.json",
    "consolidated.safetensors",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "original/consolidated.00.pth",
    "model-q4.gguf",
    "onnx/model.onnx",
    "onnx/model.onnx_data",
    "tf_model.h5",
    "flax_model.msgpack",
    "moeprune/plan.json",
    ".gitattributes",
    ".cache/huggingface/x.json",
    "img/.DS_Store",
]


def folder_of(path: Path, names: Sequence[str]) -> Path:
    """A folder of small files, each holding its own name."""
    for name in names:
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_text(name)
    return path


def test_which_files_travel(tmp_path: Path) -> None:
    """Tokenizer, template, licence, code and pictures do; weights of any format, indexes and hidden files do not."""
    source = folder_of(tmp_path, [*TRAVEL, *STAY])
    assert sorted(map(str, other_files(source))) == sorted(TRAVEL)


def test_files_are_copied_through_the_links_of_the_hub_cache(tmp_path: Path) -> None:
    """The copy holds real files, in the same folders, also when the snapshot is only links."""
    blobs = folder_of(tmp_path / "blobs", TRAVEL)
    snapshot, target = tmp_path / "snapshot", tmp_path / "target"
    for name in TRAVEL:
        (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
        (snapshot / name).symlink_to(blobs / name)
    target.mkdir()
    copy_other_files(snapshot, target)
    shutil.rmtree(blobs)
    assert {str(path.relative_to(target)): path.read_text() for path in target.rglob("*") if path.is_file()} == {
        name: name for name in TRAVEL
    }


def test_a_broken_link_is_an_error(tmp_path: Path) -> None:
    """A half-downloaded snapshot must not lose its tokenizer on the way; links to stale weights do not matter."""
    (tmp_path / "pytorch_model.bin").symlink_to(tmp_path / "gone")
    assert list(other_files(tmp_path)) == []
    (tmp_path / "tokenizer.json").symlink_to(tmp_path / "gone")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json links to a file that is not there"):
        list(other_files(tmp_path))
