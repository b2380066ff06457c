"""The executor for tensors that were computed: those of one decoder layer at a time, everything else copied by bytes.

Whatever does arithmetic on a checkpoint (fusing, sparsifying, healing) hands the new tensors of a finished layer to
:class:`Changes`, which makes them durable in a hidden folder beside the output. When all layers are done
:func:`write_changed` writes the output as :mod:`moeprune.rewrite.drop` does: each tensor is a list of byte ranges, of
the source or of a file of changes. A run that is killed goes on after the layers that it had finished.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moeprune._files import (
    PathLike,
    begin_work,
    check_free_space,
    hidden_sibling,
    lock_file,
    note,
    read_artifact,
    safetensors_header,
    to_json,
    write_atomic,
)
from moeprune._version import __version__
from moeprune.checkpoint import Checkpoint
from moeprune.errors import ArtifactError, CheckpointError, UnsupportedModelError
from moeprune.headers import TensorEntry, read_header
from moeprune.rewrite.copying import OutputTensor, Segment
from moeprune.rewrite.drop import (
    DEFAULT_SHARD_SIZE,
    check_output,
    edited_files,
    file_states,
    output_tensors,
    provenance,
    write_folder,
)
from moeprune.rewrite.journal import job_key
from moeprune.rewrite.raw_config import edit_json
from moeprune.rewrite.shards import Remade, lay_out
from moeprune.streaming.quantised import scheme_of
from moeprune.streaming.weights import torch_dtypes

if TYPE_CHECKING:
    import torch

    from moeprune.streaming.naming import Piece
    from moeprune.streaming.weights import Weights

SCHEMA = "moeprune.changes/1"
_RECORD = "record"  # the metadata string of a file of changes that holds what was said of the layer


class Changes:
    """Tensors that were computed, in one safetensors file per decoder layer.

    Attributes:
        folder: where the files lie, hidden beside the output. Whoever computes may keep state of its own there, such
            as the hidden states after the last finished layer.
        begun: set by whoever keeps state there that a later run can go on from before any layer is finished.
    """

    def __init__(self, checkpoint: Checkpoint, folder: Path) -> None:
        self.folder = folder
        self.begun = False
        self._checkpoint = checkpoint

    def finished(self, layer: int) -> bool:
        """Whether a layer was done, by this run or by an earlier one of the same job."""
        return self._file(layer).is_file()

    def record(self, layer: int) -> Mapping[str, Any]:
        """What was said of a finished layer."""
        _, metadata = read_header(self._file(layer))
        record: Mapping[str, Any] = json.loads(metadata[_RECORD])
        return record

    def add(self, layer: int, tensors: Mapping[str, torch.Tensor], record: Mapping[str, Any] | None = None) -> None:
        """Keep the new tensors of a layer; they are safe on the device when this returns.

        Args:
            layer: decoder layer.
            tensors: by their name on disk in the output, in any floating-point dtype and on any device; each is stored
                in the dtype that the checkpoint has for that name.
            record: JSON values to remember with it.

        Raises:
            CheckpointError: the checkpoint has no tensor of such a name.
            ArtifactError: nothing can be written there.
        """
        stored = {name: self._as_stored(name, value) for name, value in tensors.items()}
        metadata = {_RECORD: json.dumps(record or {}, sort_keys=True)}
        write_atomic(self._file(layer), safetensors_pieces(stored, metadata))

    def discard(self) -> None:
        """Forget all tensors: those of the source are written instead."""
        for layer in self.layers:
            self.add(layer, {}, self.record(layer))

    @property
    def layers(self) -> tuple[int, ...]:
        """The finished layers."""
        return tuple(sorted(int(file.stem.removeprefix("layer")) for file in self.folder.glob("layer*.safetensors")))

    def entries(self) -> dict[str, TensorEntry]:
        """Where the bytes of every changed tensor lie, by name."""
        return {entry.name: entry for layer in self.layers for entry in read_header(self._file(layer))[0]}

    def _file(self, layer: int) -> Path:
        return self.folder / f"layer{layer}.safetensors"

    def _as_stored(self, name: str, value: torch.Tensor) -> torch.Tensor:
        if name not in self._checkpoint.tensors:
            raise CheckpointError(f"a tensor {name!r} was computed, which {self._checkpoint.path.name} does not have")
        dtype = torch_dtypes()[self._checkpoint.tensors[name].dtype]
        return value.detach().to("cpu", dtype).contiguous()


def safetensors_pieces(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> Iterator[bytes]:
    """A safetensors file piece by piece: its header, then one tensor after the other, of which none is copied twice."""
    import torch

    names = {dtype: name for name, dtype in torch_dtypes().items()}
    described = ((name, names[value.dtype], tuple(value.shape), value.nbytes) for name, value in tensors.items())
    yield safetensors_header(described, metadata)
    for value in tensors.values():
        yield value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data  # type: ignore[misc]


@contextlib.contextmanager
def changing(
    checkpoint: Checkpoint, output: PathLike, *, job: Iterable[object], overwrite: bool, nbytes: int = 0
) -> Iterator[Changes]:
    """Somewhere to put the tensors that are computed for an output; call :func:`write_changed` inside the block.

    When the block fails or is killed after a layer was finished, the finished layers stay for a later run of the same
    job. What another job left is removed.

    Args:
        checkpoint: the source.
        output: what will be written in the end.
        job: everything that decides the tensors, apart from the source itself.
        overwrite: the output may be a folder that is not empty.
        nbytes: of what will be written in all, changes and output, to see that the disk has room for it.

    Raises:
        ConfigError: the output cannot be used, another run is writing it, or the disk is too small.
    """
    check_output(checkpoint, output, overwrite=overwrite)
    check_free_space(output, nbytes, kind="changes")
    folder = hidden_sibling(output, "changes")
    with _locked(folder, Path(output)):
        begin_work()
        changes = Changes(checkpoint, folder)
        _go_on(changes, _job(checkpoint, job))
        try:
            yield changes
        except BaseException:
            if changes.layers:
                note(f"the same command will go on after {_counted(changes)}")
            elif not changes.begun:
                shutil.rmtree(folder, ignore_errors=True)
            raise
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _locked(folder: Path, output: Path) -> Iterator[None]:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / "lock").open("a+b")
    except OSError as error:
        raise ArtifactError(f"cannot write {folder}: {error.strerror}", "choose another -o") from error
    with lock:
        lock_file(lock, output)
        yield


def _job(checkpoint: Checkpoint, parts: Iterable[object]) -> str:
    read = dict.fromkeys(entry.file for entry in checkpoint.tensors.values())
    return job_key([__version__, checkpoint.fingerprint, *file_states(read), *parts])


def _go_on(changes: Changes, job: str) -> None:
    """Keep what the same job left, and nothing else."""
    file = changes.folder / "job.json"
    if file.is_file():
        with contextlib.suppress(ArtifactError):  # a file of another version
            if read_artifact(file, SCHEMA).get("job") == job:
                if changes.layers:
                    note(f"going on after {_counted(changes)}")
                return
        note(f"removing what an earlier run left unfinished in {changes.folder}")
    for path in changes.folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != "lock":
            path.unlink()
    write_atomic(file, to_json({"schema": SCHEMA, "job": job}))


def _counted(changes: Changes) -> str:
    count = len(changes.layers)
    return f"{count} finished layer{'s' * (count != 1)} in {changes.folder}"


# --- writing the output -----------------------------------------------------------------------------------------------


def write_changed(
    checkpoint: Checkpoint,
    changes: Changes,
    output: PathLike,
    *,
    records: Mapping[str, Mapping[str, Any]],
    keep: Mapping[int, tuple[int, ...]] | None = None,
    config_edits: Mapping[str, Any] | None = None,
    extra: Mapping[str, bytes] | None = None,
    source: Mapping[str, str] | None = None,
    max_shard_size: int = DEFAULT_SHARD_SIZE,
    overwrite: bool = False,
) -> Path:
    """Write the checkpoint with its changes; the folder appears whole or not at all.

    Args:
        checkpoint: the source.
        changes: tensors by their name in the output, of any shape.
        output: new folder.
        records: JSON files of the provenance folder, by name without suffix. The ``command`` and ``inputs`` of the
            first one are those of the output; its provenance and the digests of all tensors are added.
        keep: experts of the source that stay by layer, in the order of their new numbers; all where it is left out.
        config_edits: config values that change.
        extra: more files for the provenance folder, by name.
        source: ``repo`` and ``revision`` of the model on the Hub that the output is a smaller one of, where that is
            not the checkpoint.
        max_shard_size: bytes of tensors per file.
        overwrite: replace a folder that is not empty.

    Returns:
        The finished folder.

    Raises:
        CheckpointError: a changed tensor is none of the output's.
        ConfigError: the output cannot be used, or the disk is too small.
    """
    check_output(checkpoint, output, overwrite=overwrite)
    kept, edits, entries = keep or all_experts(checkpoint), config_edits or {}, changes.entries()
    make = partial(_output_tensors, checkpoint, kept, entries)
    surplus = entries.keys() - {tensor.name for tensor in make()}
    if surplus:
        raise CheckpointError(f"a tensor {min(surplus)!r} was computed, which the output does not have")
    layout = lay_out(Remade(make), max_shard_size)
    counts = {str(layer): len(own) for layer, own in sorted(kept.items())}
    after = counts if len({*counts.values()}) > 1 else next(iter(counts.values()))
    first = next(iter(records.values()))
    origin = provenance(checkpoint, layout, first["command"], first["inputs"], after, edits)
    if keep is None:
        files = {"config.json": edit_json(checkpoint.config_text, edits).encode()}
    else:
        files = edited_files(checkpoint, kept, edits)
    both = {**records, "provenance": origin | ({"source": dict(source)} if source else {})}
    return write_folder(checkpoint, layout, files, output, records=both, extra=extra or {}, overwrite=overwrite)


def all_experts(checkpoint: Checkpoint) -> dict[int, tuple[int, ...]]:
    """Keep-lists that leave every layer as it is."""
    counts = {layer: checkpoint.own_counts.get(layer, checkpoint.num_experts) for layer in checkpoint.all_moe_layers}
    return {layer: tuple(range(count)) for layer, count in counts.items()}


def _output_tensors(
    checkpoint: Checkpoint, keep: Mapping[int, tuple[int, ...]], entries: Mapping[str, TensorEntry]
) -> Iterator[OutputTensor]:
    """The output's tensors in the source's order, changed ones from the files of changes."""
    for tensor in output_tensors(checkpoint, keep):
        entry = entries.get(tensor.name)
        if entry is None:
            yield tensor
            continue
        segment = Segment(file=entry.file, begin=entry.begin, end=entry.end)
        yield dataclasses.replace(tensor, dtype=entry.dtype, shape=entry.shape, segments=(segment,))


# --- from parameters in memory to tensors on disk ---------------------------------------------------------------------


def check_plain(checkpoint: Checkpoint, doing: str) -> None:
    """Refuse to do arithmetic on quantised weights.

    Args:
        checkpoint: the source.
        doing: what would be done, for the message: ``healing``.

    Raises:
        UnsupportedModelError: its weights are quantised.
    """
    scheme = scheme_of(checkpoint.config)
    if scheme is not None:
        raise UnsupportedModelError(
            f"{checkpoint.path.name} is quantised ({scheme.name}), and {doing} computes new weights",
            "start from the checkpoint that it was quantised from, and quantise afterwards",
        )


def stored_tensors(weights: Weights, layer: int, values: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Parameters as the tensors that the files hold: cut into single experts where the checkpoint stores those.

    Args:
        weights: of the checkpoint.
        layer: decoder layer.
        values: by the parameter's name in the model, or as much of its end as tells it from the layer's others, such
            as ``experts.gate_up_proj`` [E, 2I, H]. The experts may be fewer, and narrower, than the checkpoint's.

    Returns:
        Tensors by name on disk; those of single experts are views.

    Raises:
        CheckpointError: the layer has no such parameter, or several.
    """
    named = _by_parameter(weights.pieces(layer), values)
    parts: dict[str, int] = {}
    for piece in weights.pieces(layer):
        parts[piece.parameter] = max(parts.get(piece.parameter, 0), piece.part + 1)
    found = {}
    for piece in weights.pieces(layer):
        value = named.get(piece.parameter)
        if value is None or (piece.expert is not None and piece.expert >= len(value)):
            continue
        found[piece.stored[""].name] = value if piece.expert is None else _cut(value, piece, parts[piece.parameter])
    return found


def _by_parameter(pieces: Iterable[Piece], values: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    parameters = {piece.parameter for piece in pieces}
    named = {}
    for name, value in values.items():
        matching = sorted(known for known in parameters if known == name or known.endswith(f".{name}"))
        if len(matching) != 1:
            raise CheckpointError(f"a value is given for {name!r}, and {len(matching)} parameters are called that")
        named[matching[0]] = value
    return named


def _cut(value: torch.Tensor, piece: Piece, parts: int) -> torch.Tensor:
    """One expert's weight out of a stack, whose rows may hold several above one another."""
    rows = value[piece.expert]
    height = rows.shape[0] // parts
    return rows.narrow(0, piece.part * height, height)
