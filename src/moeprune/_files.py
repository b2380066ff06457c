"""Files that appear whole or not at all, checks of outputs, the envelope of every artifact, and progress bars.

Bytes are written beside their destination, flushed to the device, and renamed into place. Nothing here knows about
models.
"""

from __future__ import annotations

import contextlib
import contextvars
import errno
import hashlib
import json
import math
import os
import re
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any, TypeVar

from moeprune.errors import ArtifactError, ConfigError

T = TypeVar("T")
PathLike = str | os.PathLike[str]
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}

quiet: contextvars.ContextVar[bool] = contextvars.ContextVar("quiet", default=False)
_working: contextvars.ContextVar[bool] = contextvars.ContextVar("working", default=False)


def begin_work() -> None:
    """Say that every check is done and work starts: an error from here on is a failure, not a refusal."""
    _working.set(True)


def reset_work() -> None:
    """Forget that work began (a new command starts)."""
    _working.set(False)


def work_begun() -> bool:
    """Whether work began, so that the command line can tell a refusal (2) from a failure (1)."""
    return _working.get()


# --- progress -------------------------------------------------------------------------------------------------------


def progress(items: Iterable[T], description: str, *, total: float | None = None, unit: str = "it") -> Iterable[T]:
    """Iterate with a bar on stderr; silent when stderr is no terminal or the user asked for quiet."""
    from tqdm import tqdm

    bar: Iterable[T] = tqdm(
        items, desc=description, total=total, unit=unit, disable=_no_bar(), file=sys.stderr, leave=False
    )
    return bar


def byte_bar(description: str, total: int, *, done: int = 0) -> Any:
    """A tqdm bar that counts bytes, some of which an earlier run did; call ``update(n)``."""
    from tqdm import tqdm

    options: dict[str, Any] = {"unit": "B", "unit_scale": True, "file": sys.stderr, "leave": False}
    return tqdm(desc=description, total=total, initial=done, disable=_no_bar(), **options)


def note(text: str) -> None:
    """A remark on stderr, unless the user asked for quiet."""
    if not quiet.get():
        sys.stderr.write(f"note: {text}\n")


def _no_bar() -> bool:
    return quiet.get() or not sys.stderr.isatty()


# --- JSON -----------------------------------------------------------------------------------------------------------


def to_json(value: object) -> str:
    """Readable JSON for people to edit and diff: lists of numbers stay on one line, no NaN."""
    return "".join(json_pieces(value))


def json_pieces(value: object) -> Iterator[str]:
    """The text of :func:`to_json` bit by bit; an iterator of pairs stands for an object too large to be held."""
    yield from _layout(value, "")
    yield "\n"


def _layout(value: object, indent: str) -> Iterator[str]:
    inner, between = indent + "  ", ""
    if isinstance(value, Iterator) or (isinstance(value, Mapping) and value):
        for key, item in value.items() if isinstance(value, Mapping) else value:
            yield f"{between or '{'}\n{inner}{json.dumps(str(key))}: "
            yield from _layout(item, inner)
            between = ","
        yield f"\n{indent}}}" if between else "{}"
    elif isinstance(value, list | tuple) and any(isinstance(item, Mapping | list | tuple) for item in value):
        for item in value:
            yield f"{between or '['}\n{inner}"
            yield from _layout(item, inner)
            between = ","
        yield f"\n{indent}]"
    else:
        yield json.dumps(value, allow_nan=False, ensure_ascii=False)


_HALF_PAIR = re.compile(r"\\u[dD][89a-fA-F]")


def parse_json(
    text: str | bytes, source: PathLike, *, unique: bool = False, shrink: Callable[[dict[str, Any]], Any] | None = None
) -> Any:
    """Parse JSON that may be hostile: what could not be written again is an error that names the file.

    Refused are numbers that are not finite, bad UTF-8, halves of surrogate pairs, absurd nesting and, where ``unique``
    is asked for, names that an object has twice (the standard library keeps the last without a word). ``shrink`` takes
    every object as it is read, innermost first, and gives what stands for it: a large file need not lie there whole.
    """
    try:
        decoded = text if isinstance(text, str) else text.decode("utf-8-sig")
        hook = (lambda pairs: shrink(_distinct(pairs))) if shrink else _distinct if unique else None
        value = json.loads(decoded, parse_constant=_finite, parse_float=_finite, object_pairs_hook=hook)
        if _HALF_PAIR.search(decoded):
            json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{source} is not valid JSON: {error}") from error
    return value


def _finite(number: str) -> float:
    value = float(number)
    if not math.isfinite(value):
        raise ValueError(f"non-finite number {number}")
    return value


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        [(twice, _)] = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"{twice!r} is there twice")
    return result


# --- the envelope of an artifact ------------------------------------------------------------------------------------


def envelope(schema: str, command: Mapping[str, Any], inputs: Mapping[str, str]) -> dict[str, Any]:
    """What every artifact says of itself.

    Args:
        schema: name and version of the format, such as ``moeprune.plan/1``.
        command: the canonical options that decided the content; no output paths, times or hosts.
        inputs: fingerprint of every input by name.
    """
    from moeprune import __version__

    return {"schema": schema, "moeprune_version": __version__, "command": dict(command), "inputs": dict(inputs)}


def read_artifact(path: PathLike, schema: str) -> dict[str, Any]:
    """Read a JSON artifact and check its schema.

    Raises:
        ArtifactError: the file is missing, not JSON, or of another schema.
    """
    try:
        text = Path(path).read_bytes()
    except OSError as error:
        raise ArtifactError(f"cannot read {path}: {error.strerror}", "check the path") from error
    payload = parse_json(text, path, unique=True)
    check_schema(payload, schema, path)
    return dict(payload)


def check_schema(payload: object, schema: str, source: PathLike) -> None:
    """Refuse a payload that is not an artifact of this schema."""
    found = payload.get("schema") if isinstance(payload, Mapping) else None
    if found != schema:
        what = f"its schema is {found!r}" if found else "it has no schema"
        raise ArtifactError(f"{source} is not a {schema} file: {what}", "was it made by another stage or version?")


def sha256_bytes(*parts: bytes) -> str:
    """Hex sha256 of the parts one after another."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


# --- writing --------------------------------------------------------------------------------------------------------


def write_atomic(path: PathLike, data: bytes | str | Iterator[bytes]) -> Path:
    """Write a file, given whole or piece by piece, so that it is there whole or not at all, also after a power cut."""
    target = Path(path)
    whole = data.encode() if isinstance(data, str) else data
    pieces = (whole,) if isinstance(whole, bytes) else whole
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    except OSError as error:
        raise ArtifactError(f"cannot write {target}: {error.strerror}") from error
    try:
        with os.fdopen(descriptor, "wb") as handle:
            handle.writelines(pieces)
            handle.flush()
            os.fsync(handle.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, target)
    except OSError as error:
        raise ArtifactError(f"cannot write {target}: {error.strerror}") from error
    finally:
        Path(temporary).unlink(missing_ok=True)
    sync_path(target.parent)
    return target


def check_output_folder(path: PathLike, *, overwrite: bool) -> None:
    """Refuse an output folder that holds anything, unless overwriting was asked for."""
    target = Path(path)
    if target.exists() and not target.is_dir():
        raise ConfigError(f"output {target} exists and is not a folder")
    if target.is_dir() and any(target.iterdir()) and not overwrite:
        raise ConfigError(f"output folder {target} is not empty", "choose another -o or pass --overwrite")
    if target.is_mount():  # the finished folder could not be renamed to it
        raise ConfigError(f"output {target} is a mount point", "name a folder inside it")
    _check_place(target)


def check_output_file(path: PathLike, *, overwrite: bool) -> None:
    """Refuse an output file that exists, unless overwriting was asked for."""
    target = Path(path)
    if target.is_dir():
        raise ConfigError(f"output {target} is a folder", "name a file with -o")
    if target.exists() and not overwrite:
        raise ConfigError(f"output {target} exists", "choose another -o or pass --overwrite")
    _check_place(target)


def _check_place(target: Path) -> None:
    """Refuse an output that could not be created, before the work for it is done."""
    folder = target.absolute().parent
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise ConfigError(f"cannot write {target}: {folder} is no folder to write in", "choose another -o")


_BESIDE = 64_000_000  # bytes of tokenizer, index, plan and statistics beside the tensors, generously


def check_free_space(path: PathLike, tensor_bytes: int, *, kind: str = "partial") -> None:
    """Refuse when the disk that will hold the folder ``path`` cannot take the tensors and what goes with them.

    What an earlier run left in the hidden sibling of this kind counts as free: it is used again or removed.
    """
    needed = tensor_bytes + _BESIDE
    folder = Path(path).resolve()
    while not folder.exists():
        folder = folder.parent
    left = hidden_sibling(path, kind)
    free = shutil.disk_usage(folder).free + sum(file.stat().st_size for file in left.rglob("*") if file.is_file())
    if free < needed:
        raise ConfigError(
            f"not enough disk space for {path}: {human_bytes(needed)} needed, {human_bytes(free)} free",
            "free some space or choose another -o",
        )


def hidden_sibling(path: PathLike, kind: str) -> Path:
    """A hidden name beside an output folder, always the same, so that a later run finds what a killed one left."""
    target = Path(path).resolve()
    return target.with_name(f".{target.name}.moeprune-{kind}")


def lock_file(file: IO[bytes], target: Path, *, shared: bool = False) -> None:
    """Lock an open file for ``target``, or refuse when another run holds it.

    Where locks are not to be had, runs are not kept apart.

    Raises:
        ConfigError: another run holds the lock.
    """
    try:
        import fcntl

        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except ImportError:
        return
    except BlockingIOError:
        raise ConfigError(f"another run is writing {target}", "wait for it, or choose another -o") from None
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise


def sync_path(path: Path) -> None:
    """Flush a file, or a folder's own entries, to the device, where the system can."""
    with contextlib.suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def human_bytes(count: float) -> str:
    """Bytes as a person says them: ``3.8 MB``."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if abs(count) < 1000 or unit == "TB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError


def parse_size(text: str) -> int:
    """Bytes of a size such as ``5GB`` or ``512MiB``.

    Raises:
        ConfigError: not a size.
    """
    units = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
    number = text.strip().rstrip("BKMGIbkmgi")
    unit = text.strip()[len(number) :].upper()
    try:
        size = int(float(number) * units[unit])
    except (KeyError, ValueError, OverflowError):
        raise ConfigError(f"{text!r} is not a size", "write it as 5GB or 512MiB") from None
    if size < 1:
        raise ConfigError(f"{text!r} is no size that could hold anything", "write it as 5GB or 512MiB")
    return size


# --- safetensors ----------------------------------------------------------------------------------------------------


def safetensors_header(tensors: Iterable[tuple[str, str, Iterable[int], int]], metadata: Mapping[str, str]) -> bytes:
    """The header of a safetensors file, length prefix included, with equal bytes for equal content.

    The library's own writer keeps metadata in a hash map, whose order changes from run to run.

    Args:
        tensors: name, dtype, shape and size in bytes of each tensor, in the order of their bytes.
        metadata: the ``__metadata__`` strings.
    """
    text = bytearray(b"{")
    if metadata:
        text += _compact("__metadata__", dict(metadata))
    position = 0
    for name, dtype, shape, nbytes in tensors:
        offsets = [position, position + nbytes]
        text += _compact(name, {"dtype": dtype, "shape": list(shape), "data_offsets": offsets})
        position += nbytes
    text[-1:] = b"}" if len(text) > 1 else b"{}"  # in the place of the last comma
    text += b" " * (-len(text) % 8)  # readers map the data straight after the header: keep it aligned
    return len(text).to_bytes(8, "little") + text


def _compact(key: str, value: object) -> bytes:
    return (json.dumps({key: value}, separators=(",", ":"), ensure_ascii=False)[1:-1] + ",").encode()
