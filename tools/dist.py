"""Build the source distribution and the wheel, and check them.

    SOURCE_DATE_EPOCH=$(git log -1 --format=%ct) python tools/dist.py -o dist

Everything is built in a temporary copy, the wheel from the unpacked source distribution, with the setuptools that is
installed. Equal sources and an equal SOURCE_DATE_EPOCH give equal bytes, whoever builds them and when, as long as the
versions of Python and setuptools are equal too.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path
from typing import IO

from packaging.metadata import Metadata

ROOT = Path(__file__).resolve().parents[1]
PARTS = ("src", "pyproject.toml", "MANIFEST.in", "README.md", "CHANGELOG.md", "LICENSE", "NOTICE")
LEFTOVERS = shutil.ignore_patterns("__pycache__", "*.py[cod]", "*.egg-info", ".*")


def main() -> None:
    """Build into the folder that is asked for."""
    parser = argparse.ArgumentParser(description="Build the source distribution and the wheel, and check them.")
    parser.add_argument("-o", "--output", type=Path, default=Path("dist"), help="where to [default: dist]")
    output: Path = parser.parse_args().output
    epoch = os.environ.get("SOURCE_DATE_EPOCH", "")
    if not epoch.isdecimal():
        sys.exit("SOURCE_DATE_EPOCH is not set: SOURCE_DATE_EPOCH=$(git log -1 --format=%ct)")
    output.mkdir(parents=True, exist_ok=True)
    os.umask(0o022)
    with tempfile.TemporaryDirectory(prefix="moeprune-dist-") as temporary:
        for file in build(Path(temporary), int(epoch)):
            print(f"{file.stat().st_size / 1e6:6.2f} MB  {hashlib.sha256(file.read_bytes()).hexdigest()}  {file.name}")
            shutil.copyfile(file, output / file.name)


def build(work: Path, epoch: int) -> tuple[Path, Path]:
    """The source distribution and, from it, the wheel; both checked."""
    files = copy_source(work / "source")
    sdist = work / run_backend("build_sdist", work / "source", work)
    repack(sdist, epoch)
    with tarfile.open(sdist) as archive:
        archive.extractall(work / "unpacked", filter="data")
    [unpacked] = (work / "unpacked").iterdir()
    wheel = work / run_backend("build_wheel", unpacked, work)
    check_sdist(sdist, files)
    check_wheel(wheel, {name.removeprefix("src/") for name in files if name.startswith("src/")})
    return sdist, wheel


def copy_source(target: Path) -> set[str]:
    """Copy what a distribution is made of, without what work leaves behind; gives the files."""
    target.mkdir()
    for part in PARTS:
        if (ROOT / part).is_dir():
            shutil.copytree(ROOT / part, target / part, ignore=LEFTOVERS)
        else:
            shutil.copyfile(ROOT / part, target / part)
    files = [path for path in target.rglob("*") if path.is_file()]
    for path in files:
        path.chmod(0o644)  # whatever the checkout's are
    return {path.relative_to(target).as_posix() for path in files}


def run_backend(hook: str, source: Path, output: Path) -> str:
    """Name of the file that the build backend makes."""
    code = f"import sys; from setuptools import build_meta; print(build_meta.{hook}(sys.argv[1]))"
    done = subprocess.run([sys.executable, "-c", code, output], cwd=source, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{done.stdout}{done.stderr}")
    return done.stdout.splitlines()[-1]


def repack(sdist: Path, epoch: int) -> None:
    """Write the source distribution again, in order and without the owners and the times of this machine."""
    with tarfile.open(sdist) as archive, tempfile.TemporaryFile() as plain:
        with tarfile.open(fileobj=plain, mode="w", format=tarfile.PAX_FORMAT) as ordered:
            for entry in sorted(archive.getmembers(), key=lambda entry: entry.name):
                ordered.addfile(anonymous(entry, epoch), archive.extractfile(entry) if entry.isfile() else None)
        plain.seek(0)
        compress(plain, sdist.with_suffix(".new"), epoch)
    sdist.with_suffix(".new").replace(sdist)


def anonymous(entry: tarfile.TarInfo, epoch: int) -> tarfile.TarInfo:
    """An entry of an archive that tells what it holds and nothing else."""
    plain = tarfile.TarInfo(entry.name)
    plain.type, plain.size, plain.mtime = entry.type, entry.size, epoch
    plain.mode = 0o755 if entry.isdir() else 0o644
    return plain


def compress(plain: IO[bytes], target: Path, epoch: int) -> None:
    """Write a file as gzip, without its name and with a given time."""
    with target.open("wb") as raw, gzip.GzipFile("", "wb", 9, raw, mtime=epoch) as packed:
        shutil.copyfileobj(plain, packed)


def check_sdist(sdist: Path, files: set[str]) -> None:
    """Refuse a source distribution that lacks a file."""
    with tarfile.open(sdist) as archive:
        missing = files - {entry.name.partition("/")[2] for entry in archive.getmembers()}
    if missing:
        sys.exit(f"{sdist.name} lacks {sorted(missing)}")


def check_wheel(wheel: Path, package: set[str]) -> None:
    """Refuse a wheel that lacks a file or has one more, and metadata that an index would refuse."""
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        info = next(name for name in names if name.endswith(".dist-info/METADATA")).removesuffix("METADATA")
        metadata = Metadata.from_email(archive.read(f"{info}METADATA"), validate=True)
    told = {"METADATA", "WHEEL", "RECORD", "entry_points.txt", "top_level.txt"}
    told |= {f"licenses/{name}" for name in metadata.license_files or ()}
    expected = package | {f"{info}{name}" for name in told}
    if names != expected:
        sys.exit(f"{wheel.name} lacks {sorted(expected - names)} and should not have {sorted(names - expected)}")


if __name__ == "__main__":
    main()
