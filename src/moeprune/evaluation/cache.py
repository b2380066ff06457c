"""Results of a base model, measured once and used again for every checkpoint that is pruned from it.

An entry is found by the sha256 of everything that decides the results, all of it read anew each time:

- every byte of every file of the model and of its tokenizer (sizes and times of change are no evidence);
- every setting;
- the configuration and every document of every task, examples included, and every file of the user's task folder;
- the source of lm-eval with its tasks and of moeprune's side of it, and the version of every installed package;
- the kind of device, the number of threads, and the variables of the environment that steer the libraries.

What was changed leads to another entry, and never to an old one. Where something that decides cannot be read, such as
code that a model brings along, nothing is kept or used. An entry is written beside its place and renamed; it is
believed only where it names the same facts and its files have the digests that it tells; and it is kept only if none of
the files that were read at the beginning was touched before the results were there.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import Distribution, distributions
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from moeprune._files import PathLike, byte_bar, note, sha256_bytes, to_json, write_atomic
from moeprune.evaluation.settings import EvalSettings
from moeprune.evaluation.tasks import LoadedTasks

SCHEMA = "moeprune.results/1"
ENTRY = "entry.json"

_OWN_RECORDS = Path("moeprune/report")  # inside a pruned checkpoint: written by evaluations
_PIECE = 8 << 20  # bytes
_HASHERS = 4  # files at a time
# Text arguments of lm-eval's model classes that only choose among ways to compute: any other may name files.
_HARMLESS = {
    *("dtype", "softmax_dtype", "mixed_precision_dtype", "attn_implementation", "experts_implementation"),
    *("backend", "think_end_token", "quantization", "kv_cache_dtype", "truncation_side", "tokenizer_mode"),
}
_LIBRARIES = ("torch", "transformers", "tokenizers", "safetensors", "accelerate", "datasets", "vllm", "sglang")
_STEERING = (
    *("TORCH", "PYTORCH", "CUDA", "CUBLAS", "CUDNN", "NVIDIA", "NCCL", "TRITON", "OMP_", "MKL_", "OPENBLAS_", "KMP_"),
    *("TRANSFORMERS", "HF_", "VLLM", "SGL", "LMEVAL", "LM_EVAL", "LM_HARNESS", "FLASH", "TOKENIZERS"),
)


class UnknownInfluence(Exception):  # noqa: N818 - no failure: the results are only not kept
    """Something decides the results that cannot be read."""


def cache_folder(wanted: PathLike | Literal[False] | None) -> Path | None:
    """Where results are kept: a folder, by default ``$MOEPRUNE_CACHE`` or one in the user's cache; False is nowhere."""
    if wanted is False:
        return None
    if wanted is not None:
        return Path(wanted)
    own = os.environ.get("MOEPRUNE_CACHE")
    shared = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(own) if own else Path(shared) / "moeprune" / "results"


def through_cache(
    folder: Path,
    model: Path,
    settings: EvalSettings,
    loaded: LoadedTasks,
    output: Path,
    run: Callable[[], None],
) -> None:
    """Put a model's results into ``output``: those that are kept, or what ``run`` leaves there, which is then kept.

    Args:
        folder: the cache.
        model: checkpoint folder, with its tokenizer.
        settings, loaded: what is run and how.
        output: folder of lm-eval's results, absent or empty.
        run: evaluates the model.
    """
    try:
        evidence = gather(model, settings, loaded)
    except (UnknownInfluence, OSError) as reason:
        note(f"the results of {model.name} are not cached: {reason}")
        run()
        return
    entry = folder / evidence.key
    if _fetch(entry, evidence, output):
        note(f"the results of {model.name} are those of an earlier run, which the cache has; --no-cache measures again")
        return
    run()
    if evidence.still_holds():
        _store(entry, evidence, output)
    else:
        note(f"the results of {model.name} are not cached: files were changed while they were made")


# --- evidence ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """All that decides the results, and what the files looked like when they were read."""

    facts: Mapping[str, Any]
    seen: Mapping[Path, tuple[int, ...]]

    @property
    def key(self) -> str:
        """Name of the entry."""
        return sha256_bytes(json.dumps(self.facts, sort_keys=True).encode())

    def still_holds(self) -> bool:
        """Whether no file was touched since; a write leaves its mark in ``st_ctime``, which no program can set back."""
        try:
            return all(_signature(path) == before for path, before in self.seen.items())
        except OSError:
            return False


def gather(model: Path, settings: EvalSettings, loaded: LoadedTasks) -> Evidence:
    """Read everything that decides a model's results.

    Raises:
        UnknownInfluence: something cannot be read.
    """
    _check_knowable(settings)
    folders = {"model": model, **({"task_folder": settings.include_path} if settings.include_path else {})}
    files = {name: dict(_files_of(folder)) for name, folder in folders.items()}
    # before a byte is read; folders too, whose entries may change
    seen = {path: _signature(path) for name, found in files.items() for path in (folders[name], *found.values())}
    loaded.configure(settings)
    given = {key: value for key, value in dataclasses.asdict(settings).items() if key != "include_path"}
    digests = _digests([path for found in files.values() for path in found.values()])
    contents = {name: {key: digests[path] for key, path in found.items()} for name, found in files.items()}
    facts = {
        "name": model.absolute().name,
        **contents,
        "settings": json.loads(_dumped(given)),
        "tasks": {name: _task_digest(name, task) for name, task in sorted(loaded.task_dict["tasks"].items())},
        "groups": {name: _group_facts(group) for name, group in sorted(loaded.task_dict["groups"].items())},
        "source": {name: _source_digest(name) for name in ("lm_eval", "moeprune.evaluation")},
        "packages": _packages(),
        "machine": _machine(settings),
        "environment": sha256_bytes(_dumped(_environment()).encode()),
    }
    return Evidence(facts=facts, seen=seen)


def _check_knowable(settings: EvalSettings) -> None:
    if settings.trust_remote_code:
        raise UnknownInfluence("code that comes with a model may do anything")
    if settings.launcher:
        raise UnknownInfluence("a launcher has settings of its own")
    for name, value in _leaves(settings.model_args):
        if isinstance(value, str) and (name not in _HARMLESS or "/" in value or Path(value).exists()):
            raise UnknownInfluence(f"the model argument {name} may name files")


def _leaves(arguments: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in arguments.items():
        if isinstance(value, Mapping):
            yield from _leaves(value)
        elif isinstance(value, list | tuple):
            yield from ((name, item) for item in value)
        else:
            yield name, value


def _files_of(folder: Path) -> Iterator[tuple[str, Path]]:
    """Every file under a folder by its relative name, but for hidden ones."""
    for place, inner, names in os.walk(folder):
        here = Path(place)
        inner[:] = sorted(name for name in inner if not name.startswith(".") and name != "__pycache__")
        inner[:] = [name for name in inner if (here / name).relative_to(folder) != _OWN_RECORDS]
        if any((here / name).is_symlink() for name in inner):
            raise UnknownInfluence(f"{here} has links to folders")
        for name in sorted(names):
            if not name.startswith("."):
                yield (here / name).relative_to(folder).as_posix(), here / name


def _signature(path: Path) -> tuple[int, ...]:
    found = path.stat()
    return found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def _digests(paths: list[Path]) -> dict[Path, str]:
    """sha256 of files, several at a time."""
    with (
        byte_bar("looking for known results", sum(path.stat().st_size for path in paths)) as bar,
        ThreadPoolExecutor(_HASHERS) as workers,
    ):
        return dict(zip(paths, workers.map(lambda path: _digest(path, bar.update), paths), strict=True))


def _digest(path: Path, progress: Callable[[int], object] = lambda _: None) -> str:
    digest, piece = hashlib.sha256(), memoryview(bytearray(min(_PIECE, path.stat().st_size + 1)))
    with path.open("rb", buffering=0) as handle:
        while size := handle.readinto(piece):
            digest.update(piece[:size])
            progress(size)
    return digest.hexdigest()


def _task_digest(name: str, task: Any) -> str:
    """sha256 of a task's configuration, documents and examples."""
    config = task.dump_config() | {"dataset_kwargs": None}  # which say where the documents lay, as does this:
    config["metadata"] = {key: value for key, value in config.get("metadata", {}).items() if key != "config_source"}
    digest = hashlib.sha256(_dumped([str(task.VERSION), config], name).encode())
    examples = task.sampler.df if task.get_config("num_fewshot") and hasattr(task, "sampler") else ()
    for documents in (task.eval_docs, examples):
        digest.update(b"\n\n")
        for document in documents:
            digest.update(_dumped(document, name).encode() + b"\n")
    return digest.hexdigest()


def _group_facts(group: Any) -> list[str]:
    """How a group adds up its tasks, and which."""
    tasks = sorted(task.task_name for task in group.get_all_tasks())
    return [repr(group.aggregate_metric_list), str(group.version), *tasks]


def _dumped(value: object, task: str = "") -> str:
    def plain(item: object) -> str:
        if callable(item) and hasattr(item, "__qualname__"):
            return f"{item.__module__}.{item.__qualname__}"  # its source is part of the evidence
        raise UnknownInfluence(f"task {task} holds a {type(item).__name__}")

    return json.dumps(value, sort_keys=True, default=plain)


def _source_digest(package: str) -> str:
    """sha256 of a package's Python files: one that is being worked on changes under one version."""
    spec = find_spec(package)
    [root] = spec.submodule_search_locations if spec and spec.submodule_search_locations else [""]
    digest = hashlib.sha256()
    for file in sorted(Path(root).rglob("*.py")):
        digest.update(f"{file.relative_to(root)}|{_digest(file)}\n".encode())
    return digest.hexdigest()


def _packages() -> dict[str, str]:
    """Version of every installed package."""
    found = {str(package.metadata["Name"]): package for package in distributions()}
    for name in _LIBRARIES:
        if name in found and _is_editable(found[name]):
            raise UnknownInfluence(f"{name} is installed to be edited")
    return {name: found[name].version for name in sorted(found)}


def _is_editable(package: Distribution) -> bool:
    origin = json.loads(package.read_text("direct_url.json") or "{}")
    return bool(origin.get("dir_info", {}).get("editable"))


def _machine(settings: EvalSettings) -> dict[str, Any]:
    import torch

    devices = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    on_cpu = settings.backend == "hf" and (settings.device == "cpu" or not devices)
    return {
        "python": sys.version,
        "platform": platform.machine(),
        "devices": ["cpu"] if on_cpu else devices,
        "cuda": torch.version.cuda,
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
    }


def _environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name.startswith(_STEERING)}


# --- entries ----------------------------------------------------------------------------------------------------------


def _fetch(entry: Path, evidence: Evidence, output: Path) -> bool:
    """Copy an entry's files to ``output``; whether there was one, and it was whole."""
    if not entry.is_dir():
        return False
    try:
        record = json.loads((entry / ENTRY).read_bytes())
        known = record["schema"] == SCHEMA and record["facts"] == json.loads(json.dumps(evidence.facts))
        output.mkdir(parents=True, exist_ok=True)
        for name in record["files"]:
            shutil.copyfile(entry / Path(name).name, output / Path(name).name)
        whole = known and all(_digest(output / name) == digest for name, digest in record["files"].items())
    except (OSError, ValueError, LookupError, TypeError):
        whole = False
    if not whole:
        note(f"the cached results in {entry} are damaged, and made again")
        shutil.rmtree(entry, ignore_errors=True)
        shutil.rmtree(output, ignore_errors=True)
    return whole


def _store(entry: Path, evidence: Evidence, output: Path) -> None:
    """Keep what lies in ``output``, whole or not at all; that nothing could be kept is no error."""
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=entry.parent, prefix=".", ignore_cleanup_errors=True) as scratch:
            whole = Path(scratch) / "entry"
            whole.mkdir()
            files = {file.name: _digest(file) for file in sorted(output.iterdir()) if file.is_file()}
            for name in files:
                shutil.copyfile(output / name, whole / name)
            write_atomic(whole / ENTRY, to_json({"schema": SCHEMA, "facts": evidence.facts, "files": files}))
            if not entry.exists():  # another run may have been faster
                whole.rename(entry)
    except OSError as error:
        note(f"the results could not be kept in {entry.parent}: {error.strerror or error}")
