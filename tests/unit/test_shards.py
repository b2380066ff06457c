"""Bytes laid out over safetensors files, read back through the library, and the files that travel along."""

from __future__ import annotations

import errno
import itertools
import json
import os
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

from moeprune._files import parse_size
from moeprune.errors import CheckpointError, ConfigError
from moeprune.rewrite import copying
from moeprune.rewrite.copying import OutputTensor, Reader, Segment, copied_on_server, in_threads, joined
from moeprune.rewrite.shards import Layout, Remade, copy_other_files, lay_out, other_files, write_shards

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
    with pytest.raises(ConfigError, match="hold anything"):
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
    laid = lay_out(Remade(lambda: iter(tensors)), largest)
    shards = [items for _, items in laid.filled()]
    assert list(itertools.chain.from_iterable(shards)) == tensors
    sizes = [sum(item.nbytes for item in shard) for shard in shards]
    assert [(shard.count, shard.nbytes) for shard in laid.shards] == list(zip(map(len, shards), sizes, strict=True))
    assert (laid.count, laid.nbytes) == (len(tensors), sum(sizes))
    assert all(size <= largest or len(shard) == 1 for size, shard in zip(sizes, shards, strict=True))
    assert all(size + shard[0].nbytes > largest for size, shard in zip(sizes, shards[1:], strict=False))


@settings(deadline=None)
@given(RANGES.map(lambda ranges: ranges * 2), RANGES)
def test_neighbouring_ranges_are_read_as_one(first: Ranges, second: Ranges) -> None:
    """The bytes stay the same and no two ranges that follow on each other are left."""
    tensors = [tensor(Path(), "a", first), tensor(Path(), "b", second)]
    split = [(segment.file, byte) for item in tensors for segment in item.segments for byte in span(segment)]
    found = list(joined(tensors))
    assert [(segment.file, byte) for segment in found for byte in span(segment)] == split
    assert all(one.file != two.file or one.end != two.begin for one, two in itertools.pairwise(found))


def span(segment: Segment) -> range:
    """The bytes of a segment."""
    return range(segment.begin, segment.end)


@settings(deadline=None, max_examples=60)
@given(LAYOUTS, st.integers(1, 200), st.integers(1, 40), st.booleans())
def test_what_is_written_is_what_the_segments_say(
    layout: Sequence[Ranges], largest: int, buffer: int, server: bool
) -> None:
    """Any tensors, segments, shard size and buffer, copied by us or by the system: the library reads the same bytes."""
    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        patch.setattr(copying, "_BUFFER", buffer)
        patch.setattr("moeprune.rewrite.shards.copied_on_server", lambda *_: server)
        out = sources(Path(name)) / "out"
        out.mkdir()
        tensors = [tensor(Path(name), f"t{number}", ranges) for number, ranges in enumerate(layout)]
        laid = lay_out(tensors, largest)
        written = list(write_shards(laid, out, {"format": "pt"}))
        wanted = {item.name: expected(item) for item in tensors}
        assert read_back(out) == wanted
        assert [item for item, _ in written] == tensors
        assert {item.name: digest for item, digest in written} == {
            name: xxhash.xxh3_128_hexdigest(raw) for name, raw in wanted.items()
        }
        check_names(out, laid)


def check_names(folder: Path, layout: Layout) -> None:
    """One file alone has no index; several are numbered and the index says which holds what."""
    if len(layout.shards) == 1:
        assert [path.name for path in folder.iterdir()] == ["model.safetensors"]
        return
    total = len(layout.shards)
    names = [f"model-{number:05d}-of-{total:05d}.safetensors" for number in range(1, total + 1)]
    assert sorted(path.name for path in folder.iterdir()) == [*names, "model.safetensors.index.json"]
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == {item.name: shard.name for shard, items in layout.filled() for item in items}
    assert list(index["weight_map"]) == sorted(index["weight_map"])
    assert index["metadata"] == {"total_size": layout.nbytes}


def test_types_and_shapes_are_written_as_given(out: Path) -> None:
    """Nothing is decoded: packed and unusual types pass through with their metadata."""
    segments = (Segment(file=out.parent / "source0", begin=8, end=14),)
    item = OutputTensor(name="x", dtype="BF16", shape=(3, 1), segments=segments)
    write_shards(lay_out([item], 1000), out, {})
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
        write_shards(lay_out(tensors, 60), folder, {"format": "pt", "more": "1"})
    files = sorted(path.name for path in out.iterdir())
    assert len(files) == 4
    assert [(out / name).read_bytes() for name in files] == [(again / name).read_bytes() for name in files]


def test_a_source_that_shrinks_while_it_is_read_is_an_error(out: Path) -> None:
    """No tensor is padded with what happened to lie in the buffer."""
    item = tensor(out.parent, "x", [(0, 0, 100)])
    (out.parent / "source0").write_bytes(SOURCE_BYTES[:50])
    with pytest.raises(CheckpointError, match="source0 ended early"):
        write_shards(lay_out([item], 1000), out, {})


def test_the_first_error_stops_the_other_threads(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread in the middle of a large tensor gives up, no further work is begun, and the error is the one raised."""
    monkeypatch.setattr(copying, "THREADS", 2)
    monkeypatch.setattr(copying, "_BUFFER", 1)
    endless = OutputTensor(
        name="x",
        dtype="U8",
        shape=(5120,),
        segments=(Segment(file=out.parent / "source0", begin=0, end=512),) * 1_000_000,
    )
    begun: list[int] = []

    def work(item: int, reader: Reader) -> None:
        begun.append(item)
        if item:
            raise CheckpointError("broken")
        list(reader.digests([endless]))

    with pytest.raises(CheckpointError, match="broken"):
        list(in_threads(work, itertools.count()))
    assert sorted(begun) == [0, 1]


# --- copies by the system -------------------------------------------------------------------------------------------


def on_server(*_: object) -> bool:
    """Every folder is on a network file system that copies by itself."""
    return True


def test_the_system_is_asked_to_copy_joined_ranges(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One call for neighbours, and none of our own writes but the header's."""
    asked: list[tuple[int, int]] = []
    copy = os.copy_file_range

    def record(source: int, target: int, count: int, offset: int) -> int:
        asked.append((offset, count))
        return copy(source, target, count, offset)

    monkeypatch.setattr("moeprune.rewrite.shards.copied_on_server", on_server)
    monkeypatch.setattr(os, "copy_file_range", record)
    tensors = [tensor(out.parent, name, [(0, begin, begin + 50)]) for name, begin in (("a", 0), ("b", 50), ("c", 200))]
    written = list(write_shards(lay_out(tensors, 1000), out, {}))
    assert asked == [(0, 100), (200, 50)]
    assert read_back(out) == {item.name: expected(item) for item in tensors}
    assert [digest for _, digest in written] == [xxhash.xxh3_128_hexdigest(expected(item)) for item in tensors]


@pytest.mark.parametrize("number", [errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP])
def test_where_the_system_cannot_copy_we_do(out: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Also when it finds that out half-way: what it wrote is taken back."""
    copy, calls = os.copy_file_range, []

    def unable(source: int, target: int, count: int, offset: int) -> int:
        calls.append(offset)
        if len(calls) > 1:
            raise OSError(number, os.strerror(number))
        return copy(source, target, count, offset)

    monkeypatch.setattr("moeprune.rewrite.shards.copied_on_server", on_server)
    monkeypatch.setattr(os, "copy_file_range", unable)
    item = tensor(out.parent, "x", [(0, 0, 100), (1, 5, 80)])
    [(_, digest)] = write_shards(lay_out([item], 1000), out, {})
    assert len(calls) == 2
    assert read_back(out) == {"x": expected(item)}
    assert digest == xxhash.xxh3_128_hexdigest(expected(item))


def test_a_full_disk_is_an_error_of_the_system_copy_too(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only what says that it cannot be done leads to a copy of our own; half a file is not left."""

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("moeprune.rewrite.shards.copied_on_server", on_server)
    monkeypatch.setattr(os, "copy_file_range", full)
    with pytest.raises(OSError, match="No space left"):
        write_shards(lay_out([tensor(out.parent, "x", [(0, 0, 100)])], 1000), out, {})
    assert list(out.iterdir()) == []


@pytest.mark.parametrize(("kind", "by_itself"), [("nfs4", True), ("cifs", True), ("ext4", False), ("btrfs", False)])
def test_only_network_file_systems_copy_by_themselves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, by_itself: bool
) -> None:
    """The mount of the device decides; on a local disk our own copy is faster."""
    device = tmp_path.stat().st_dev
    line = f"36 35 {os.major(device)}:{os.minor(device)} / /mnt rw shared:1 - {kind} server:/ rw\n"
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: f"1 1 0:1 / /other rw - nfs4 x rw\n{line}")
    assert copied_on_server(tmp_path, tmp_path) == by_itself
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: 1 / 0)
    assert not copied_on_server(tmp_path, Path("/proc"))  # another device: nothing to look up


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
    """The copy holds real files, in the same folders, also when the snapshot is only links to blobs."""
    blobs, snapshot, target = tmp_path / "blobs", tmp_path / "snapshots" / "abc", tmp_path / "target"
    blobs.mkdir()
    for number, name in enumerate(TRAVEL):
        (blobs / str(number)).write_text(name)
        (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
        (snapshot / name).symlink_to(Path("../" * (name.count("/") + 2)) / "blobs" / str(number))
    target.mkdir()
    copy_other_files(snapshot, target)
    shutil.rmtree(blobs)
    assert {str(path.relative_to(target)): path.read_text() for path in target.rglob("*") if path.is_file()} == {
        name: name for name in TRAVEL
    }


@pytest.mark.parametrize("where", ["secret", "model-2/secret", "blobs/secret"])
def test_a_link_out_of_the_checkpoint_is_not_followed(tmp_path: Path, where: str) -> None:
    """A downloaded folder must not be able to put a file of this machine into what is shared next."""
    model = folder_of(tmp_path / "model", ["real.txt"])
    folder_of(tmp_path, [where])
    (model / "also.txt").symlink_to("real.txt")
    assert sorted(map(str, other_files(model))) == ["also.txt", "real.txt"]
    (model / "tokenizer.json").symlink_to(tmp_path / where)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json links out of the checkpoint"):
        list(other_files(model))


def test_a_broken_link_is_an_error(tmp_path: Path) -> None:
    """A half-downloaded snapshot must not lose its tokenizer on the way; links to stale weights do not matter."""
    (tmp_path / "pytorch_model.bin").symlink_to(tmp_path / "gone")
    assert list(other_files(tmp_path)) == []
    (tmp_path / "tokenizer.json").symlink_to(tmp_path / "gone")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json links to a file that is not there"):
        list(other_files(tmp_path))
