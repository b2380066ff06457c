"""Opening a checkpoint: hostile headers, damaged folders, contradicting configs, and the fingerprint."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from moeprune.architectures import ExpertName, PlainName, RouterName, StackedName
from moeprune.checkpoint import Checkpoint, open_checkpoint
from moeprune.errors import ArtifactError, CheckpointError, LayoutError, MoePruneError, UnsupportedModelError
from moeprune.headers import read_header
from moeprune.rewrite.drop import output_tensors

Tensors = dict[str, NDArray[Any]]
EXPERTS, HIDDEN, INNER = 4, 32, 64  # an expert tensor has 8 KiB, twice what enters the fingerprint
QWEN = {"model_type": "qwen3_moe", "num_hidden_layers": 2, "num_experts": EXPERTS, "num_experts_per_tok": 2}
DEEPSEEK = {
    "model_type": "deepseek_v3",
    "num_hidden_layers": 2,
    "first_k_dense_replace": 1,
    "n_routed_experts": EXPERTS,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "num_nextn_predict_layers": 1,
}
INDEX = "model.safetensors.index.json"


def layer_tensors(layer: int, rng: np.random.Generator, *, bias: bool = False) -> Tensors:
    """One MoE layer: norm, router and experts."""
    prefix = f"model.layers.{layer}."
    tensors = {f"{prefix}input_layernorm.weight": rng.random(HIDDEN, dtype=np.float32)}
    tensors[f"{prefix}mlp.gate.weight"] = rng.random((EXPERTS, HIDDEN), dtype=np.float32)
    if bias:
        tensors[f"{prefix}mlp.gate.e_score_correction_bias"] = rng.random(EXPERTS, dtype=np.float32)
    for expert in range(EXPERTS):
        for name in ("gate_proj", "up_proj", "down_proj"):
            weight = rng.random((INNER, HIDDEN), dtype=np.float32)
            tensors[f"{prefix}mlp.experts.{expert}.{name}.weight"] = weight
    return tensors


def model_tensors(config: Mapping[str, Any]) -> Tensors:
    """All tensors of a Qwen3-MoE of two sparse layers, or of a DeepSeek-V3 of a dense, a sparse and an MTP layer."""
    rng = np.random.default_rng(5)
    tensors = {"model.embed_tokens.weight": rng.random((97, HIDDEN), dtype=np.float32)}
    if config["model_type"] == "qwen3_moe":
        return tensors | layer_tensors(0, rng) | layer_tensors(1, rng)
    tensors["model.layers.0.mlp.gate_proj.weight"] = rng.random((INNER, HIDDEN), dtype=np.float32)
    tensors |= layer_tensors(1, rng, bias=True) | layer_tensors(2, rng, bias=True)
    tensors["model.layers.2.eh_proj.weight"] = rng.random((HIDDEN, 2 * HIDDEN), dtype=np.float32)
    return tensors


def write(folder: Path, config: Mapping[str, Any] = QWEN, tensors: Tensors | None = None, *, shards: int = 2) -> Path:
    """Write a checkpoint of one or more shards; tensors are dealt out in turn."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    tensors = model_tensors(config) if tensors is None else tensors
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    weight_map = {name: f"model-0000{number % shards + 1}.safetensors" for number, name in enumerate(tensors)}
    for file in set(weight_map.values()):
        own = {name: tensor for name, tensor in tensors.items() if weight_map[name] == file}
        save_file(own, folder / file, metadata={"format": "pt"})
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def edit_index(folder: Path, **changes: str | None) -> None:
    """Change entries of the weight map; None removes one. Dots are written as two underscores."""
    index = json.loads((folder / INDEX).read_text())
    for name, file in changes.items():
        index["weight_map"].pop(name.replace("__", "."), None)
        if file is not None:
            index["weight_map"][name.replace("__", ".")] = file
    (folder / INDEX).write_text(json.dumps(index))


def raw_file(header: object, data: bytes = b"", *, length: int | None = None) -> bytes:
    """A safetensors file with any header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def entry(begin: Any, end: Any, *, dtype: Any = "U8", shape: Any = None) -> dict[str, Any]:
    """A header entry, by default of bytes."""
    return {"dtype": dtype, "shape": [end - begin] if shape is None else shape, "data_offsets": [begin, end]}


# --- a sound checkpoint ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shards", [1, 3])
def test_a_sound_checkpoint_is_bound_to_its_architecture(tmp_path: Path, shards: int) -> None:
    """Numbers, roles and the place of every tensor are known without decoding one."""
    tensors = model_tensors(QWEN)
    checkpoint = open_checkpoint(write(tmp_path / "model", shards=shards))
    assert (checkpoint.num_experts, checkpoint.top_k, checkpoint.n_group, checkpoint.topk_group) == (EXPERTS, 2, 1, 1)
    assert (checkpoint.moe_layers, checkpoint.mtp_layers) == ((0, 1), ())
    assert checkpoint.shard_metadata == {"format": "pt"}
    assert checkpoint.tensors.keys() == checkpoint.roles.keys() == tensors.keys()
    for name, tensor in tensors.items():
        found = checkpoint.tensors[name]
        assert (found.dtype, found.shape, found.numel) == ("F32", tensor.shape, tensor.size)
        assert found.file.read_bytes()[found.begin : found.end] == tensor.tobytes()
    assert checkpoint.nbytes == sum(tensor.nbytes for tensor in tensors.values())
    assert str(checkpoint).startswith("model: qwen3_moe, 2 MoE layers of 4 experts, top-2, ")


def test_tensors_come_in_the_order_of_their_bytes(tmp_path: Path) -> None:
    """Files by name, inside each the order of the bytes: what a copy reads straight through."""
    checkpoint = open_checkpoint(write(tmp_path, shards=3))
    places = [(entry.file.name, entry.begin) for entry in checkpoint.tensors.values()]
    assert places == sorted(places)


def test_groups_and_mtp_layers(tmp_path: Path) -> None:
    """The MTP layer counts as a MoE layer to cut, and the dense first layer does not."""
    checkpoint = open_checkpoint(write(tmp_path, DEEPSEEK))
    assert (checkpoint.moe_layers, checkpoint.mtp_layers, checkpoint.all_moe_layers) == ((1,), (2,), (1, 2))
    assert (checkpoint.router.n_group, checkpoint.router.topk_group) == (2, 1)
    assert isinstance(checkpoint.roles["model.layers.2.mlp.experts.0.up_proj.weight"], ExpertName)
    assert isinstance(checkpoint.roles["model.layers.2.mlp.gate.e_score_correction_bias"], RouterName)
    assert checkpoint.roles["model.layers.2.eh_proj.weight"] == PlainName(layer=2)


def test_announced_mtp_layers_may_be_absent(tmp_path: Path) -> None:
    """Saving with transformers loses them and keeps the config's count."""
    tensors = {name: value for name, value in model_tensors(DEEPSEEK).items() if "layers.2." not in name}
    assert open_checkpoint(write(tmp_path, DEEPSEEK, tensors)).mtp_layers == ()


def test_the_hub_cache_layout_is_read_through_its_links(tmp_path: Path) -> None:
    """A snapshot is a folder of links to blobs; the link's name decides what a file is."""
    source = write(tmp_path / "source")
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    for number, path in enumerate(sorted(source.iterdir())):
        shutil.copyfile(path, blobs / str(number))
        (snapshot / path.name).symlink_to(Path("../../blobs") / str(number))
    checkpoint = open_checkpoint(snapshot)
    assert {entry.file.parent for entry in checkpoint.tensors.values()} == {snapshot}
    assert checkpoint.fingerprint == open_checkpoint(source).fingerprint


@pytest.mark.parametrize("name", ["config.json", INDEX, "model-00001.safetensors"])
def test_links_out_of_the_checkpoint_are_refused(tmp_path: Path, name: str) -> None:
    """A link could bring any file of this machine into the output; one inside the folder, or to the folder, is fine."""
    source, outside = write(tmp_path / "a" / "source"), tmp_path / "blobs"  # which only a snapshot may link to
    outside.mkdir()
    (source / name).rename(outside / name)
    (source / name).symlink_to(outside / name)
    refused(source, CheckpointError, f"{name} links out of the checkpoint, to {outside / name}")
    (source / name).unlink()
    (outside / name).rename(source / "real")
    (source / name).symlink_to("real")
    (tmp_path / "link").symlink_to(source)
    assert open_checkpoint(tmp_path / "link").num_experts == EXPERTS


# --- hostile headers ------------------------------------------------------------------------------------------------

HOSTILE = {
    "nothing": b"",
    "seven bytes": b"1234567",
    "length beyond the file": raw_file({}, length=3),
    "absurd length": raw_file({}, length=2**63),
    "not JSON": raw_file(b"{'a': 1}"),
    "not UTF-8": raw_file(b'{"\xff": 1}'),
    "not an object": raw_file([1, 2]),
    "a pickle": b"\x80\x04\x95" + b"\x00" * 40,
    "deep nesting": raw_file(b'{"a":' + b"[" * 200_000),
    "NaN": raw_file(b'{"a": NaN}'),
    "metadata is a list": raw_file({"__metadata__": [1]}),
    "metadata is null": raw_file({"__metadata__": None}),
    "metadata of numbers": raw_file({"__metadata__": {"a": 1}}),
    "half a surrogate pair": raw_file(b'{"\\ud800": {"dtype":"U8","shape":[1],"data_offsets":[0,1]}}', b"1"),
    "entry is null": raw_file({"a": None}),
    "entry is a list": raw_file({"a": [0, 1]}),
    "no offsets": raw_file({"a": {"dtype": "U8", "shape": [1]}}, b"1"),
    "three offsets": raw_file({"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1, 2]}}, b"1"),
    "offset is text": raw_file({"a": entry("0", "1", shape=[1])}, b"1"),
    "offset is a fraction": raw_file({"a": entry(0.0, 1.0, shape=[1])}, b"1"),
    "offset is a boolean": raw_file({"a": entry(False, True, shape=[1])}, b"1"),
    "negative offset": raw_file({"a": entry(-1, 0, shape=[1])}, b"1"),
    "offsets reversed": raw_file({"a": entry(1, 0, shape=[1])}, b"1"),
    "negative size": raw_file({"a": entry(0, 1, shape=[-1])}, b"1"),
    "shape is text": raw_file({"a": entry(0, 1, shape="1")}, b"1"),
    "shape is nested": raw_file({"a": entry(0, 1, shape=[[1]])}, b"1"),
    "dtype is a number": raw_file({"a": entry(0, 1, dtype=8)}, b"1"),
    "overlap": raw_file({"a": entry(0, 2), "b": entry(1, 3)}, b"123"),
    "gap": raw_file({"a": entry(0, 1), "b": entry(2, 3)}, b"123"),
    "does not start at the front": raw_file({"a": entry(1, 2)}, b"12"),
    "beyond the file": raw_file({"a": entry(0, 9)}, b"123"),
    "bytes left over": raw_file({"a": entry(0, 1)}, b"123"),
    "size contradicts shape": raw_file({"a": entry(0, 4, dtype="F32", shape=[2])}, b"1234"),
    "size contradicts a small type": raw_file({"a": entry(0, 2, dtype="F4", shape=[2])}, b"12"),
    "shape with no elements": raw_file({"a": entry(0, 1, shape=[1, 0])}, b"1"),
    "a name twice": raw_file(
        b'{"a": {"dtype":"U8","shape":[1],"data_offsets":[0,1]}, "a": {"dtype":"U8","shape":[1],"data_offsets":[0,1]}}',
        b"1",
    ),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_headers_are_refused_by_file_name(tmp_path: Path, case: str) -> None:
    """Whatever the damage, one line names the file."""
    (tmp_path / "odd.safetensors").write_bytes(HOSTILE[case])
    with pytest.raises((CheckpointError, ArtifactError), match=r"odd\.safetensors"):
        read_header(tmp_path / "odd.safetensors")


def test_unusual_headers_that_are_sound(tmp_path: Path) -> None:
    """Empty tensors, packed and unknown types, padding and any order in the header are fine."""
    header = {
        "b": entry(4, 6, dtype="F4", shape=[2, 2]),
        "__metadata__": {"format": "pt"},
        "a": entry(0, 4, dtype="F32", shape=[]),
        "empty": entry(4, 4, dtype="BF16", shape=[0, 7]),
        "new": entry(6, 9, dtype="Q3_K", shape=[1, 5]),
    }
    (tmp_path / "x").write_bytes(raw_file(json.dumps(header).encode() + b"   ", b"123456789"))
    entries, metadata = read_header(tmp_path / "x")
    assert metadata == {"format": "pt"}
    assert [item.name for item in entries] == ["a", "empty", "b", "new"]
    assert [item.nbytes for item in entries] == [4, 0, 2, 3]


WIDTHS = {"U8": 1, "BF16": 2, "F32": 4, "I64": 8}


@st.composite
def files(draw: st.DrawFn) -> bytes:
    """A safetensors file of some tensors in any order: sound, or with one number of its header moved."""
    kinds = st.tuples(st.sampled_from(sorted(WIDTHS)), st.lists(st.integers(0, 3), max_size=3))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}} if draw(st.booleans()) else {}
    end = 0
    for number, (dtype, shape) in enumerate(draw(st.lists(kinds, max_size=4))):
        begin, end = end, end + WIDTHS[dtype] * int(np.prod(shape, dtype=int))
        header[f"t{number}"] = entry(begin, end, dtype=dtype, shape=shape)
    names = [name for name in header if name != "__metadata__"]
    if names and draw(st.booleans()):
        numbers = header[draw(st.sampled_from(names))][draw(st.sampled_from(["shape", "data_offsets"]))]
        if numbers:
            numbers[draw(st.integers(0, len(numbers) - 1))] += draw(st.integers(-2, 2))
    order = draw(st.permutations(list(header)))
    return raw_file({name: header[name] for name in order}, bytes(number % 251 for number in range(end)))


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    """A file with some bytes changed, put in or taken out, cut short, or its header length moved."""
    data = bytearray(draw(files()))
    for damage in draw(st.lists(st.sampled_from(["change", "insert", "delete", "cut", "length"]), max_size=2)):
        place = draw(st.integers(0, len(data) - 1))
        match damage:
            case "change":
                data[place] = draw(st.sampled_from(b'0123456789"[]{},:-.eU\x00\xff'))
            case "insert":
                data[place:place] = draw(st.sampled_from([b"0", b"1", b"-", b'"', b"[", b"{}", b",", b" ", b"\x00"]))
            case "delete":
                del data[place : place + draw(st.integers(1, 3))]
            case "cut":
                del data[max(8, place) :]
            case "length":
                data[:8] = draw(st.integers(0, 2 * len(data)) | st.integers(0, 2**64 - 1)).to_bytes(8, "little")
    return bytes(data)


@settings(deadline=None, max_examples=400)
@given(damaged())
def test_damaged_files_are_refused_or_read_as_the_library_reads_them(data: bytes) -> None:
    """No other exception, and never tensors that the safetensors library would not see in these places."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.safetensors"
        path.write_bytes(data)
        try:
            entries, _ = read_header(path)
        except (CheckpointError, ArtifactError):
            return
        assert sum(item.nbytes for item in entries) == len(data) - 8 - int.from_bytes(data[:8], "little")
        if all(item.dtype in WIDTHS for item in entries):
            assert_library_agrees(path, {item.name: (item.shape, data[item.begin : item.end]) for item in entries})


def assert_library_agrees(path: Path, expected: Mapping[str, tuple[tuple[int, ...], bytes]]) -> None:
    """Compare with what the library reads; numpy has no BF16, there only the shape."""
    with safe_open(path, framework="numpy") as file:
        assert set(file.keys()) == expected.keys()
        for name, (shape, raw) in expected.items():
            view = file.get_slice(name)
            assert tuple(view.get_shape()) == shape
            if view.get_dtype() != "BF16":
                assert file.get_tensor(name).tobytes() == raw


# --- damaged folders ------------------------------------------------------------------------------------------------


def refused(folder: Path, kind: type[MoePruneError], why: str) -> MoePruneError:
    """Open a folder that must be refused for a reason."""
    with pytest.raises(kind, match=why) as caught:
        open_checkpoint(folder)
    return caught.value


def test_no_checkpoint_at_all(tmp_path: Path) -> None:
    """A folder without config, a file, a damaged config and a name that nothing has."""
    refused(tmp_path, CheckpointError, r"has no config\.json")
    refused(tmp_path / "none", CheckpointError, "no folder .*none")
    (tmp_path / "config.json").write_bytes(b"\xff")
    refused(tmp_path / "config.json", CheckpointError, "is not a folder")
    refused(tmp_path, CheckpointError, r"cannot read .*config\.json")
    (tmp_path / "config.json").write_text("{")
    refused(tmp_path, ArtifactError, r"config\.json is not valid JSON")
    (tmp_path / "config.json").write_text("[]")
    refused(tmp_path, CheckpointError, "is not a JSON object")


def test_a_hub_model_without_the_hub() -> None:
    """The name, the reason and what to check; no traceback of the client."""
    with pytest.raises(CheckpointError, match="cannot fetch 'nobody/no-such-model' from the Hub: ") as caught:
        open_checkpoint("nobody/no-such-model")
    assert "pass a local folder" in caught.value.hint


def test_missing_shards_are_named(tmp_path: Path) -> None:
    """The first three are listed."""
    folder = write(tmp_path, shards=6)
    for number in (2, 3, 4, 5):
        (folder / f"model-0000{number}.safetensors").unlink()
    error = refused(folder, CheckpointError, "lacks 4 of its shards: model-00002.safetensors, .*00004.safetensors, ...")
    assert error.hint


def test_weights_that_are_no_safetensors(tmp_path: Path) -> None:
    """Pickled weights are named and never opened; nothing at all is said so."""
    (tmp_path / "config.json").write_text(json.dumps(QWEN))
    refused(tmp_path, CheckpointError, r"neither model\.safetensors nor")
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04")
    error = refused(tmp_path, CheckpointError, r"only pytorch_model\.bin, which would have to be unpickled")
    assert "convert it to safetensors" in error.hint


def test_an_index_that_contradicts_the_shards(tmp_path: Path) -> None:
    """A tensor that is nowhere, or elsewhere than the index says."""
    folder = write(tmp_path)
    edit_index(folder, lm_head__weight="model-00001.safetensors")
    refused(folder, CheckpointError, r"names tensor 'lm_head\.weight' in model-00001\.safetensors, which does not hold")
    edit_index(folder, lm_head__weight=None, model__embed_tokens__weight="model-00002.safetensors")
    refused(folder, CheckpointError, r"names tensor 'model\.embed_tokens\.weight' in model-00002\.safetensors")


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "a/b.safetensors", "weights.bin", ""])
def test_an_index_cannot_point_out_of_the_folder(tmp_path: Path, name: str) -> None:
    """A path, or a file that holds no safetensors, is not followed."""
    folder = write(tmp_path / "model")
    edit_index(folder, model__embed_tokens__weight=name)
    refused(folder, CheckpointError, "which is not a file of the folder")


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("[]", "has no weight_map"),
        ('{"weight_map": {}}', "has no weight_map"),
        ('{"weight_map": [1]}', "has no weight_map"),
        ('{"weight_map": {"a": 1}}', "puts tensor 'a' in 1"),
        ('{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}', "'a' is there twice"),
        ("nonsense", "is not valid JSON"),
    ],
)
def test_a_damaged_index_is_refused(tmp_path: Path, text: str, why: str) -> None:
    """Nothing is guessed from half an index."""
    folder = write(tmp_path)
    (folder / INDEX).write_text(text)
    refused(folder, MoePruneError, why)


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    """Engines differ in which of the two they would read."""
    folder = write(tmp_path)
    second = load_file(folder / "model-00002.safetensors")
    save_file(second | {"model.embed_tokens.weight": np.zeros(1)}, folder / "model-00002.safetensors")
    refused(folder, CheckpointError, r"'model\.embed_tokens\.weight' is in both model-00001.* and model-00002")


def test_a_stale_single_file_beside_an_index_is_refused(tmp_path: Path) -> None:
    """The single file is what transformers would load, other engines the shards."""
    folder = write(tmp_path)
    shutil.copyfile(folder / "model-00001.safetensors", folder / "model.safetensors")
    refused(folder, CheckpointError, r"holds both model\.safetensors and")


# --- contradictions between config and tensors ----------------------------------------------------------------------


def test_a_dense_model_has_nothing_to_prune(tmp_path: Path) -> None:
    """A known architecture without one routed expert, and an unknown one."""
    plain = {"model.layers.0.mlp.gate_proj.weight": np.zeros(4, dtype=np.float32)}
    error = refused(write(tmp_path, QWEN, plain), UnsupportedModelError, "has no routed experts")
    assert error.hint == "is it a dense model?"
    refused(write(tmp_path, {"model_type": "llama"}, plain), UnsupportedModelError, "unknown model_type 'llama'")


@pytest.mark.parametrize(
    ("base", "change", "why"),
    [
        (QWEN, {"num_experts": None}, "num_experts is None"),
        (QWEN, {"num_experts": [4, 4]}, r"num_experts is \[4, 4\]"),
        (QWEN, {"num_experts": True}, "num_experts is True"),
        (QWEN, {"num_experts": 3}, r"layer 0 has 4 experts, config.json says 3 \(first odd one: 3\)"),
        (QWEN, {"num_experts": 6}, r"layer 0 has 4 experts, config.json says 6 \(first odd one: 4\)"),
        (QWEN, {"num_local_experts": 8}, "contradicts itself on the number of experts"),
        (QWEN, {"num_experts_per_tok": "2"}, "num_experts_per_tok is '2'"),
        (QWEN, {"num_experts_per_tok": 0}, "no router picks 0 of 4 experts"),
        (QWEN, {"num_experts_per_tok": 5}, "no router picks 5 of 4 experts"),
        (QWEN, {"num_hidden_layers": 3}, r"layers \[2\] should have routed experts and have none"),
        (QWEN, {"num_hidden_layers": 1}, r"layers \[1\] have routed experts that config.json does not announce"),
        (QWEN, {"mlp_only_layers": [0]}, r"layers \[0\] have routed experts that config.json does not announce"),
        (DEEPSEEK, {"num_nextn_predict_layers": 0}, r"layers \[2\] have routed experts"),
        (DEEPSEEK, {"first_k_dense_replace": 0}, r"layers \[0\] should have routed experts"),
        (DEEPSEEK, {"n_group": 3, "topk_group": 3}, "no router picks 2 of 4 experts in 3 of 3 groups"),
        (DEEPSEEK, {"n_group": 0}, "in 1 of 0 groups"),
        (DEEPSEEK, {"topk_group": 3}, "in 3 of 2 groups"),
        (DEEPSEEK, {"num_experts_per_tok": 3}, "no router picks 3 of 4 experts in 1 of 2 groups"),
    ],
)
def test_a_config_that_contradicts_the_tensors(
    tmp_path: Path, base: dict[str, Any], change: dict[str, Any], why: str
) -> None:
    """Each contradiction is a layout error that says which numbers clash."""
    refused(write(tmp_path, base | change, model_tensors(base)), LayoutError, why)


@pytest.mark.parametrize("key", ["num_hidden_layers", "num_experts_per_tok", "n_group", "topk_group"])
def test_a_config_must_say_what_engines_would_fill_in(tmp_path: Path, key: str) -> None:
    """Every engine has its own default for a missing value, so none can be assumed."""
    config = {name: value for name, value in DEEPSEEK.items() if name != key}
    refused(write(tmp_path, config), LayoutError, f"there is no {key}")


def test_a_config_without_expert_count_is_refused(tmp_path: Path) -> None:
    """The keys that were looked for are named."""
    config = {name: value for name, value in QWEN.items() if name != "num_experts"}
    refused(write(tmp_path, config), UnsupportedModelError, "has none of num_experts, num_local_experts")


LAYER = "model.layers.1."


@pytest.mark.parametrize(
    ("drop", "add", "why"),
    [
        ("mlp.experts.2.", {}, r"layer 1 has 3 experts, config.json says 4 \(first odd one: 2\)"),
        ("mlp.experts.2.up_proj.", {}, "layer 1: expert 2 and expert 0 do not both have 'up_proj.weight'"),
        ("?", {"mlp.experts.3.up_proj.scale": [1]}, "layer 1: expert 3 and expert 0 do not both have 'up_proj.scale'"),
        ("mlp.gate.weight", {}, "layer 1 lacks the router tensor 'mlp.gate.weight'"),
        ("?", {"mlp.gate.weight": [3, 32]}, r"1.mlp.gate.weight' of shape \[3, 32\] does not have 4 rows along axis 0"),
        ("?", {"mlp.gate.weight": []}, r"of shape \[\] does not have 4 rows along axis 0"),
        ("?", {"mlp.router.weight": [4]}, "tensor 'model.layers.1.mlp.router.weight' looks like part of an expert"),
    ],
)
def test_a_layer_that_is_not_whole(tmp_path: Path, drop: str, add: dict[str, list[int]], why: str) -> None:
    """Missing and surplus experts, parts and router rows are named."""
    tensors = {name: value for name, value in model_tensors(QWEN).items() if not name.startswith(LAYER + drop)}
    tensors |= {LAYER + part: np.zeros(shape, dtype=np.float32) for part, shape in add.items()}
    refused(write(tmp_path, QWEN, tensors), LayoutError, why)


def test_a_router_needs_experts(tmp_path: Path) -> None:
    """A router in a dense layer would stay at its old width."""
    extra = {"model.layers.0.mlp.gate.weight": np.zeros((EXPERTS, HIDDEN), dtype=np.float32)}
    refused(write(tmp_path, DEEPSEEK, model_tensors(DEEPSEEK) | extra), LayoutError, "layer 0 has a router and no exp")


def test_a_router_without_its_bias_is_refused(tmp_path: Path) -> None:
    """Also in the MTP layer."""
    tensors = model_tensors(DEEPSEEK)
    del tensors["model.layers.2.mlp.gate.e_score_correction_bias"]
    refused(write(tmp_path, DEEPSEEK, tensors), LayoutError, "layer 2 lacks the router tensor 'mlp.gate.e_score_corr")


def stacked_layer(**changes: list[int]) -> Tensors:
    """The experts of layer 1 in one tensor each; a change gives another shape, or takes a tensor out."""
    shapes = {"gate_up_proj": [EXPERTS, INNER, HIDDEN], "down_proj": [EXPERTS, HIDDEN, INNER]} | changes
    rng = np.random.default_rng(9)
    return {
        f"{LAYER}mlp.experts.{name}": rng.random(shape, dtype=np.float32) for name, shape in shapes.items() if shape
    }


def without_experts() -> Tensors:
    """A Qwen3-MoE that lacks the experts of layer 1."""
    return {name: value for name, value in model_tensors(QWEN).items() if f"{LAYER}mlp.experts" not in name}


def test_experts_may_be_stacked(tmp_path: Path) -> None:
    """A layer whose experts are one tensor each, next to one of single experts; companions have rows too."""
    extra = stacked_layer(down_proj_scale_inv=[EXPERTS, 1])
    checkpoint = open_checkpoint(write(tmp_path, QWEN, without_experts() | extra))
    assert checkpoint.moe_layers == (0, 1)
    for name in extra:
        assert checkpoint.roles[name] == StackedName(layer=1, part=name.removeprefix(LAYER))


@pytest.mark.parametrize(
    ("extra", "why"),
    [
        (stacked_layer(down_proj=[]), "layer 1 has the stacked 'mlp.experts.gate_up_proj' and no 'down_proj'"),
        (stacked_layer(down_proj=[3, 2, 2]), r"down_proj' of shape \[3, 2, 2\] does not have 4 rows along axis 0"),
        (stacked_layer(down_proj_input_scale=[1]), r"input_scale' of shape \[1\] does not have 4 rows"),
        (
            stacked_layer() | {f"{LAYER}mlp.experts.{expert}.up_proj.weight": np.zeros(2) for expert in range(EXPERTS)},
            "layer 1 has both single experts and the stacked 'mlp.experts.down_proj'",
        ),
    ],
)
def test_a_stack_that_is_not_whole(tmp_path: Path, extra: Tensors, why: str) -> None:
    """What is cut along its rows must have them, and nothing of a layer may be left over."""
    refused(write(tmp_path, QWEN, without_experts() | extra), LayoutError, why)


ERNIE = {"model_type": "ernie4_5_moe", "num_hidden_layers": 1, "moe_num_experts": EXPERTS, "moe_k": 2}


@pytest.mark.parametrize(("shape", "fits"), [([1, EXPERTS], True), ([EXPERTS], False), ([EXPERTS, 1], False)])
def test_rows_may_lie_along_the_second_axis(tmp_path: Path, shape: list[int], fits: bool) -> None:
    """The bias of ERNIE is [1, E]; one that lies otherwise would be cut wrongly."""
    tensors = layer_tensors(0, np.random.default_rng(1))
    tensors["model.layers.0.mlp.moe_statics.e_score_correction_bias"] = np.zeros(shape, np.float32)
    folder = write(tmp_path, ERNIE | {"moe_layer_start_index": 0}, tensors)
    if fits:
        assert open_checkpoint(folder).top_k == 2
    else:
        refused(folder, LayoutError, "does not have 4 rows along axis 1")


NEXT = QWEN | {"model_type": "qwen3_next"}
NESTED = {"model_type": "qwen3_5_moe", "text_config": QWEN | {"mtp_num_hidden_layers": 1}, "num_experts": 99}


@pytest.mark.parametrize("config", [NEXT, NESTED], ids=["qwen3_next", "qwen3_5_moe"])
def test_mtp_layers_at_the_top_level(tmp_path: Path, config: dict[str, Any]) -> None:
    """They come after the last decoder layer with all that belongs to them, announced or not, nested config or not."""
    prefix = "model.language_model." if config is NESTED else "model."
    tensors = {name.replace("model.", prefix, 1): value for name, value in model_tensors(QWEN).items()}
    mtp = {name.replace("model.", "mtp."): value for name, value in layer_tensors(0, np.random.default_rng(2)).items()}
    tensors |= mtp | {"mtp.fc.weight": np.zeros(2, np.float32)}
    checkpoint = open_checkpoint(write(tmp_path / "whole", config, tensors))
    assert (checkpoint.num_experts, checkpoint.top_k) == (EXPERTS, 2)
    assert (checkpoint.moe_layers, checkpoint.mtp_layers) == ((0, 1), (2,))
    assert {checkpoint.roles[name].layer for name in tensors if name.startswith("mtp.")} == {2}
    del tensors["mtp.layers.0.mlp.experts.3.up_proj.weight"]
    refused(write(tmp_path / "broken", config, tensors), LayoutError, "layer 2: expert 3 and expert 0 do not both have")


ODD = ["experts", "mlp", "0", "3", "4", "01", "-1", "mtp", "gate", "layers", "2", "weight", "x", "", "gate_up_proj"]


@st.composite
def renamed_tensors(draw: st.DrawFn) -> Tensors:
    """The tensors of a Qwen3-Next with an MTP layer, some of them renamed, left out or given another shape."""
    tensors = {name: np.zeros(value.shape[:1], np.uint8) for name, value in model_tensors(QWEN).items()}
    extra = layer_tensors(0, np.random.default_rng(0))
    tensors |= {name.replace("model.", "mtp."): np.zeros(value.shape[:1], np.uint8) for name, value in extra.items()}
    for name in draw(st.lists(st.sampled_from(sorted(tensors)), max_size=2, unique=True)):
        value = tensors.pop(name)
        match draw(st.sampled_from(["rename", "insert", "drop", "shape"])):
            case "rename":
                parts = name.split(".")
                parts[draw(st.integers(0, len(parts) - 1))] = draw(st.sampled_from(ODD))
                tensors[".".join(parts)] = value
            case "insert":
                parts = name.split(".")
                parts.insert(draw(st.integers(0, len(parts))), draw(st.sampled_from(ODD)))
                tensors[".".join(parts)] = value
            case "shape":
                tensors[name] = np.zeros(draw(st.sampled_from([(), (3,), (5,), (1, EXPERTS)])), np.uint8)
    return tensors


@settings(deadline=None, max_examples=150)
@given(renamed_tensors())
def test_odd_tensors_are_refused_or_cut_to_a_sound_checkpoint(tensors: Tensors) -> None:
    """What opens can be cut by any keep-lists, and the result opens with the new count and no tensor of the old one."""
    with tempfile.TemporaryDirectory() as name:
        folder = write(Path(name) / "base", NEXT, tensors, shards=1)
        try:
            checkpoint = open_checkpoint(folder)
        except MoePruneError:
            return
        keep = dict.fromkeys(checkpoint.all_moe_layers, (0, 2))
        out = {tensor.name: np.zeros(tensor.shape, np.uint8) for tensor in output_tensors(checkpoint, keep)}
        pruned = open_checkpoint(write(Path(name) / "out", NEXT | {"num_experts": 2}, out, shards=1))
        assert (pruned.moe_layers, pruned.mtp_layers) == (checkpoint.moe_layers, checkpoint.mtp_layers)
        lost = {tensor for tensor, role in checkpoint.roles.items() if isinstance(role, ExpertName) and role.expert > 1}
        assert len(pruned.tensors) == len(checkpoint.tensors) - len(lost)


# --- the fingerprint ------------------------------------------------------------------------------------------------


def flip(checkpoint: Checkpoint, name: str, offset: int) -> None:
    """Change one byte of a tensor on disk, counted from its middle."""
    found = checkpoint.tensors[name]
    with found.file.open("r+b") as handle:
        handle.seek((found.begin + found.end) // 2 + offset)
        byte = handle.read(1)[0]
        handle.seek(-1, 1)
        handle.write(bytes([byte ^ 1]))


@pytest.mark.parametrize(
    ("name", "offset", "changes"),
    [
        ("model.layers.0.mlp.gate.weight", 0, True),
        ("model.layers.0.mlp.gate.weight", EXPERTS * HIDDEN * 2 - 1, True),
        ("model.layers.1.mlp.gate.weight", -EXPERTS * HIDDEN * 2, True),
        ("model.layers.0.mlp.experts.3.down_proj.weight", 0, True),
        ("model.layers.1.mlp.experts.0.gate_proj.weight", -2048, True),
        ("model.layers.1.mlp.experts.0.gate_proj.weight", 2047, True),
        ("model.embed_tokens.weight", 0, True),
        ("model.layers.1.mlp.experts.0.gate_proj.weight", 2048, False),
        ("model.layers.0.input_layernorm.weight", 0, False),
    ],
)
def test_the_fingerprint_sees_routers_and_the_middle_of_experts(
    tmp_path: Path, name: str, offset: int, changes: bool
) -> None:
    """All router bytes and 4 KiB of every expert and of the embedding count, nothing else is read."""
    folder = write(tmp_path)
    before = open_checkpoint(folder)
    assert before.fingerprint == open_checkpoint(folder).fingerprint
    flip(before, name, offset)
    assert (open_checkpoint(folder).fingerprint != before.fingerprint) is changes


@pytest.mark.parametrize("expert", range(EXPERTS))
def test_the_fingerprint_sees_every_expert_of_a_stack(tmp_path: Path, expert: int) -> None:
    """4 KiB from the middle of each, as if it were a tensor of its own."""
    before = open_checkpoint(write(tmp_path, QWEN, without_experts() | stacked_layer()))
    name, width = f"{LAYER}mlp.experts.down_proj", INNER * HIDDEN * 4
    middle = (expert + 0.5 - EXPERTS / 2) * width
    flip(before, name, int(middle) - width // 2)  # its first byte
    assert open_checkpoint(tmp_path).fingerprint == before.fingerprint
    flip(before, name, int(middle))
    assert open_checkpoint(tmp_path).fingerprint != before.fingerprint


def test_the_fingerprint_sees_config_names_types_and_shapes(tmp_path: Path) -> None:
    """One byte of config.json, another name, type or shape each give another model."""
    tensors = model_tensors(QWEN)
    norm = "model.layers.0.input_layernorm.weight"
    plain = tensors[norm]
    variants = [
        (QWEN, tensors),
        (QWEN | {"rope_theta": 1}, tensors),
        (QWEN, {name: value for name, value in tensors.items() if name != norm} | {"model.norm.weight": plain}),
        (QWEN, tensors | {norm: plain.view(np.int32)}),
        (QWEN, tensors | {norm: plain.reshape(1, -1)}),
    ]
    prints = {
        open_checkpoint(write(tmp_path / str(number), config, values)).fingerprint
        for number, (config, values) in enumerate(variants)
    }
    assert len(prints) == len(variants)


def test_the_fingerprint_does_not_see_the_path_or_the_index(tmp_path: Path) -> None:
    """A copy elsewhere, with another order of the index and more files beside it, is the same model."""
    folder = write(tmp_path / "a")
    copy = tmp_path / "deep" / "b"
    shutil.copytree(folder, copy)
    index = json.loads((copy / INDEX).read_text())
    index["weight_map"] = dict(reversed(index["weight_map"].items()))
    (copy / INDEX).write_text(json.dumps(index))
    (copy / "README.md").write_text("x")
    assert open_checkpoint(copy).fingerprint == open_checkpoint(folder).fingerprint
