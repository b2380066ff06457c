"""Open a checkpoint folder: headers, index and raw config, bound to its architecture or refused.

Reads only the headers of the safetensors files; no tensor is decoded and torch is never imported.
"""

from __future__ import annotations

import hashlib
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from moeprune._files import PathLike, human_bytes, parse_json
from moeprune.architectures import (
    ExpertName,
    MoESpec,
    RouterName,
    StackedName,
    TensorRole,
    read_count,
    resolve_architecture,
)
from moeprune.errors import CheckpointError, LayoutError, UnsupportedModelError, first_line
from moeprune.headers import TensorEntry, read_header
from moeprune.plan_kinds import router_rows
from moeprune.plans import RouterShape

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_SAMPLE = 4096  # bytes of an expert tensor that enter the fingerprint


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A checkpoint on disk whose every tensor is known to be expert, router or untouched.

    Attributes:
        path: the folder.
        spec: names and config keys of its architecture.
        config: the parsed ``config.json``; ``config_text`` is the same file, byte for byte.
        tensors: every tensor by name, in file order; ``roles`` says what each one is.
        num_experts: routed experts per MoE layer (E); where layers differ, the most that one has.
        top_k: experts per token.
        n_group: expert groups of a group-limited router, 1 without groups; ``topk_group`` of them serve a token.
        own_counts: experts of the layers that do not have E of them, in a checkpoint whose layers differ.
        router_rows: rows of its routers, where an expert stands for several that the routers still tell apart; else 0.
        moe_layers: decoder layers with routed experts.
        mtp_layers: MTP layers whose tensors are present, numbered on from the last decoder layer.
    """

    path: Path
    spec: MoESpec
    config: Mapping[str, Any]
    config_text: str
    tensors: Mapping[str, TensorEntry]
    roles: Mapping[str, TensorRole]
    num_experts: int
    top_k: int
    n_group: int
    topk_group: int
    moe_layers: tuple[int, ...]
    mtp_layers: tuple[int, ...]
    shard_metadata: Mapping[str, str]
    own_counts: Mapping[int, int] = field(default_factory=dict)
    router_rows: int = 0

    @cached_property
    def fingerprint(self) -> str:
        """Identity of the weights: cheap on 700 GB, and different for two fine-tunes of one architecture.

        sha256 of the config, every tensor's name, dtype and shape, all router bytes, and 4 KiB from the middle of
        every expert and embedding tensor.
        """
        digest = hashlib.sha256(self.config_text.encode())
        for file, entries in self._by_file():
            with file.open("rb") as handle:
                for entry in entries:
                    digest.update(f"{entry.name}|{entry.dtype}|{entry.shape}\n".encode())
                    for begin, size in self._sampled(entry):
                        handle.seek(begin)
                        digest.update(handle.read(size))
        return digest.hexdigest()

    def _by_file(self) -> Iterator[tuple[Path, list[TensorEntry]]]:
        """Files in name order, each with its tensors in name order: independent of how the index lists them."""
        files: dict[Path, list[TensorEntry]] = defaultdict(list)
        for entry in self.tensors.values():
            files[entry.file].append(entry)
        for file in sorted(files):
            yield file, sorted(files[file], key=lambda entry: entry.name)

    def _sampled(self, entry: TensorEntry) -> Iterator[tuple[int, int]]:
        """Begin and size of the bytes that enter the fingerprint."""
        role = self.roles[entry.name]
        if isinstance(role, RouterName):
            yield entry.begin, entry.nbytes
        elif isinstance(role, ExpertName | StackedName) or "embed_tokens" in entry.name:
            pieces = entry.shape[role.axis] if isinstance(role, StackedName) else 1
            width = entry.nbytes // pieces
            size = min(_SAMPLE, width)
            for piece in range(pieces):
                yield entry.begin + piece * width + (width - size) // 2, size

    @property
    def hub_source(self) -> dict[str, str]:
        """Name and commit of a model that lies in the Hub's cache; empty for any other folder."""
        snapshots, cached = self.path.parent, self.path.parent.parent.name
        if snapshots.name != "snapshots" or not cached.startswith("models--"):
            return {}
        return {"repo": cached.removeprefix("models--").replace("--", "/", 1), "revision": self.path.name}

    @cached_property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(entry.nbytes for entry in self.tensors.values())

    @cached_property
    def router(self) -> RouterShape:
        """The numbers that bound what may be removed."""
        return RouterShape(
            num_experts=self.router_rows or self.num_experts,
            top_k=self.top_k,
            n_group=self.n_group,
            topk_group=self.topk_group,
        )

    @property
    def all_moe_layers(self) -> tuple[int, ...]:
        """Layers that a plan decides on: decoder layers with routed experts, and MTP layers."""
        return self.moe_layers + self.mtp_layers

    @property
    def fewest(self) -> int:
        """Experts of the layer that has the fewest."""
        return min(self.own_counts.values(), default=self.num_experts)

    @property
    def span(self) -> str:
        """Experts per MoE layer, for people: ``16``, or ``6 to 16`` where layers differ."""
        return f"{self.fewest} to {self.num_experts}" if self.own_counts else str(self.num_experts)

    def check_uniform(self) -> None:
        """Refuse a checkpoint whose layers have different numbers of experts, or whose experts stand for several.

        Raises:
            UnsupportedModelError: it was pruned, or fused, like that.
        """
        if self.router_rows:
            raise UnsupportedModelError(
                f"experts of {self.path.name} stand for several each: its routers know {self.router_rows}",
                "it can be loaded with moeprune.load and evaluated; to prune further, go back to what it was made from",
            )
        if self.own_counts:
            raise UnsupportedModelError(
                f"layers of {self.path.name} have different numbers of experts, {self.span}",
                "it can be loaded, evaluated and verified; to prune further, go back to what it was made from",
            )

    def __str__(self) -> str:
        what = f"{self.path.name}: {self.spec.model_type}, {len(self.moe_layers)} MoE layers"
        return f"{what} of {self.span} experts, top-{self.top_k}, {human_bytes(self.nbytes)}"


def open_checkpoint(model: PathLike, *, revision: str | None = None) -> Checkpoint:
    """Open a local folder or a Hub model and bind it to its architecture.

    Args:
        model: a folder, or a Hub id such as ``Qwen/Qwen3-30B-A3B``. A local path never touches the network.
        revision: branch, tag or commit of a Hub model.

    Raises:
        CheckpointError: files are missing, damaged or unreachable.
        UnsupportedModelError: an unknown architecture, or a model without routed experts.
        LayoutError: an unclassified or missing tensor.
    """
    path = Path(model) if Path(model).exists() else _download(str(model), revision)
    config_text, config = _read_config(path)
    spec = resolve_architecture(config)
    tensors, metadata = read_tensors(path)
    depth = spec.depth(config)
    roles = {name: spec.role(name, depth) for name in tensors}
    layers, mtp = _bind_layers(spec, config, roles)
    num_experts = _count_experts(spec, spec.values(config))
    counts = _own_counts(spec, config, (*layers, *mtp), num_experts)
    _check_experts(spec, tensors, roles, counts)
    wide = router_rows(path)
    _check_routers(spec, tensors, roles, dict.fromkeys(counts, wide) if wide else counts)
    router = _read_router(spec, spec.values(config), wide or num_experts)
    return Checkpoint(
        path=path,
        spec=spec,
        config=config,
        config_text=config_text,
        tensors=tensors,
        roles=roles,
        num_experts=num_experts,
        top_k=router.top_k,
        n_group=router.n_group,
        topk_group=router.topk_group,
        moe_layers=tuple(layers),
        mtp_layers=tuple(mtp),
        shard_metadata=metadata,
        own_counts={layer: count for layer, count in counts.items() if count != num_experts},
        router_rows=wide,
    )


# --- files ----------------------------------------------------------------------------------------------------------


def _download(model: str, revision: str | None) -> Path:
    """Fetch a Hub model into the local cache; only called when nothing of that name exists here."""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", model) or model.startswith((".", "/")):
        raise CheckpointError(f"no folder {model!r}", "give a local checkpoint folder or a Hub id like org/name")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(model, revision=revision, ignore_patterns=["*.bin", "*.pth", "*.pt", "*.gguf"]))
    except (HfHubHTTPError, LocalEntryNotFoundError, HFValidationError, OSError) as error:
        raise CheckpointError(
            f"cannot fetch {model!r} from the Hub: {first_line(error)}",
            "check the name, the network and your token, or pass a local folder",
        ) from error


def _read_config(path: Path) -> tuple[str, dict[str, Any]]:
    if not path.is_dir():
        raise CheckpointError(f"{path} is not a folder", "give the folder that holds config.json")
    file = path / "config.json"
    try:
        text = file.read_bytes().decode()
    except FileNotFoundError:
        raise CheckpointError(f"{path} has no config.json", "is this a Hugging Face checkpoint folder?") from None
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"cannot read {file}: {error}") from error
    check_inside(path, file)
    config = parse_json(text, file)
    if not isinstance(config, dict):
        raise CheckpointError(f"{file} is not a JSON object")
    return text, config


def read_tensors(path: Path) -> tuple[dict[str, TensorEntry], dict[str, str]]:
    """All tensors of the folder, checked against the index, and the metadata of the first shard."""
    listed = _read_index(path)
    files = sorted(set(listed.values())) if listed is not None else [SINGLE]
    missing = [name for name in files if not (path / name).is_file()]
    if missing:
        raise CheckpointError(*_missing_files(path, missing))
    if SINGLE not in files and (path / SINGLE).is_file():  # transformers would read that one, other engines the index
        raise CheckpointError(f"{path} holds both {SINGLE} and an {INDEX} that leaves it out", "remove the stale one")
    tensors: dict[str, TensorEntry] = {}
    metadata: dict[str, str] = {}
    for name in files:
        check_inside(path, path / name)
        entries, shard_metadata = read_header(path / name)
        metadata = metadata or shard_metadata
        for entry in entries:
            if entry.name in tensors:
                raise CheckpointError(f"tensor {entry.name!r} is in both {tensors[entry.name].file.name} and {name}")
            tensors[entry.name] = entry
    for tensor, name in (listed or {}).items():
        if tensor not in tensors or tensors[tensor].file.name != name:
            raise CheckpointError(f"{INDEX} names tensor {tensor!r} in {name}, which does not hold it")
    return tensors, metadata


def check_inside(folder: Path, file: Path) -> None:
    """Refuse a link out of the checkpoint, which could put any file of this machine into the output.

    The Hub's cache is fine: there a snapshot is a folder of links to the blobs beside it.

    Raises:
        CheckpointError: the file lies somewhere else.
    """
    home, target = folder.resolve(), file.resolve()
    homes = [home, (home.parent.parent / "blobs").resolve()] if home.parent.name == "snapshots" else [home]
    if not any(target.is_relative_to(place) for place in homes):
        raise CheckpointError(f"{file} links out of the checkpoint, to {target}", "put the file itself there")


def _missing_files(path: Path, missing: list[str]) -> tuple[str, str]:
    """What is missing and what to do."""
    what, hint = f"{path} has no safetensors weights: neither {SINGLE} nor {INDEX}", "download the checkpoint again"
    if missing != [SINGLE]:
        shown = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        what = f"{path} lacks {len(missing)} of its shards: {shown}"
    elif others := sorted(item.name for item in path.iterdir() if item.suffix in {".bin", ".pt", ".pth"}):
        what = f"{path} has no safetensors weights: only {others[0]}, which would have to be unpickled"
        hint = "a pickle can run any code: convert it to safetensors where that does no harm"
    return what, hint


def _read_index(path: Path) -> dict[str, str] | None:
    file = path / INDEX
    if not file.is_file():
        return None
    check_inside(path, file)
    index = parse_json(file.read_bytes(), file, unique=True)
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{file} has no weight_map")
    for tensor, name in weight_map.items():
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            raise CheckpointError(f"{file} puts tensor {tensor!r} in {name!r}, which is not a file of the folder")
    return weight_map


# --- binding --------------------------------------------------------------------------------------------------------


def _count_experts(spec: MoESpec, values: Mapping[str, Any]) -> int:
    counts = {key: read_count(values, key) for key in spec.count_keys if key in values}
    if not counts:
        wanted = ", ".join(map(spec.path, spec.count_keys))
        raise UnsupportedModelError(f"config.json of this {spec.model_type} has none of {wanted}")
    if len(set(counts.values())) > 1:
        raise LayoutError(f"config.json contradicts itself on the number of experts: {counts}")
    return next(iter(counts.values()))


def _own_counts(spec: MoESpec, config: Mapping[str, Any], layers: Iterable[int], num_experts: int) -> dict[int, int]:
    """Experts of every layer; MTP layers, which the config does not list, have as many as the last decoder layer."""
    own, depth = spec.layer_counts(config), spec.depth(config)
    last = own.get(max((layer for layer in layers if layer < depth), default=0), num_experts)
    return {layer: own.get(layer, num_experts) if layer < depth else last for layer in layers}


def _read_router(spec: MoESpec, values: Mapping[str, Any], num_experts: int) -> RouterShape:
    """Top-k and groups; a missing group count is refused, since engines fill it in with defaults of their own."""
    top_k = read_count(values, spec.top_k_key)
    n_group, topk_group = (read_count(values, key) for key in spec.group_keys) if spec.group_keys else (1, 1)
    shape = RouterShape(num_experts=num_experts, top_k=top_k, n_group=n_group, topk_group=topk_group)
    if not 1 <= topk_group <= n_group or num_experts % n_group or not 1 <= top_k <= num_experts * topk_group // n_group:
        raise LayoutError(
            f"config.json: no router picks {top_k} of {num_experts} experts in {topk_group} of {n_group} groups"
        )
    return shape


def _bind_layers(
    spec: MoESpec, config: Mapping[str, Any], roles: Mapping[str, TensorRole]
) -> tuple[list[int], list[int]]:
    """MoE decoder layers, which must be exactly those that the config announces, and the MTP layers that are there.

    MTP layers with a prefix of their own need no announcement: not every such family has a config key for it.
    """
    depth, expected, announced = spec.depth(config), spec.moe_layers(config), spec.announced_mtp(config)
    found = {role.layer for role in roles.values() if isinstance(role, ExpertName | StackedName)}
    mtp = {role.layer for role in roles.values() if role.layer >= depth}
    if not found:
        raise UnsupportedModelError(f"this {spec.model_type} checkpoint has no routed experts", "is it a dense model?")
    absent = sorted(set(expected) - found)
    surplus = sorted(found - set(expected) - set(mtp if spec.mtp else announced))
    if absent:
        raise LayoutError(f"layers {absent[:8]} should have routed experts and have none", "is a shard missing?")
    if surplus:
        raise LayoutError(f"layers {surplus[:8]} have routed experts that config.json does not announce")
    return expected, sorted(mtp)


def _check_experts(
    spec: MoESpec, tensors: Mapping[str, TensorEntry], roles: Mapping[str, TensorRole], counts: Mapping[int, int]
) -> None:
    """A layer must have experts 0..E-1, all with the same parts, or all of them stacked."""
    parts: dict[int, dict[int, set[str]]] = defaultdict(lambda: defaultdict(set))
    stacked: dict[int, list[str]] = defaultdict(list)
    for name, role in roles.items():
        if isinstance(role, ExpertName):
            parts[role.layer][role.expert].add(role.after)
        elif isinstance(role, StackedName):
            _check_rows(tensors[name], role.axis, counts[role.layer])
            stacked[role.layer].append(role.part)
    for layer, experts in sorted(parts.items()):
        num_experts = counts[layer]
        if sorted(experts) != list(range(num_experts)):
            odd = sorted(set(experts) ^ set(range(num_experts)))
            raise LayoutError(
                f"layer {layer} has {len(experts)} experts, config.json says {num_experts} (first odd one: {odd[0]})"
            )
        for expert, own in experts.items():
            if own != experts[0]:
                part = min(own ^ experts[0])
                raise LayoutError(f"layer {layer}: expert {expert} and expert 0 do not both have {part!r}")
    for layer, names in sorted(stacked.items()):
        if layer in parts:
            raise LayoutError(f"layer {layer} has both single experts and the stacked {min(names)!r}")
        for needed in spec.stacked:
            if not any(name.startswith(spec.experts + needed) for name in names):
                raise LayoutError(f"layer {layer} has the stacked {min(names)!r} and no {needed!r}")


def _check_routers(
    spec: MoESpec, tensors: Mapping[str, TensorEntry], roles: Mapping[str, TensorRole], counts: Mapping[int, int]
) -> None:
    """Every layer with experts must have its router tensors, with one row per expert; no other layer may have any."""
    layers = {role.layer for role in roles.values() if isinstance(role, ExpertName | StackedName)}
    parts: dict[int, set[str]] = defaultdict(set)
    for name, role in roles.items():
        if isinstance(role, RouterName):
            if role.layer in counts:
                _check_rows(tensors[name], role.axis, counts[role.layer])
            parts[role.layer].add(role.part)
    for layer in sorted(layers | parts.keys()):
        absent = sorted(spec.router.keys() - parts[layer])
        if layer not in layers:
            raise LayoutError(f"layer {layer} has a router and no experts")
        if absent:
            raise LayoutError(f"layer {layer} lacks the router tensor {absent[0]!r}")


def _check_rows(entry: TensorEntry, axis: int, num_experts: int) -> None:
    shape = list(entry.shape)
    if len(shape) <= axis or shape[axis] != num_experts:
        raise LayoutError(f"tensor {entry.name!r} of shape {shape} does not have {num_experts} rows along axis {axis}")
