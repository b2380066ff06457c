"""The files that are released: equal from everywhere, complete, and enough to run the default model."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EPOCH = "1700000000"
NEEDED = [
    *("moeprune/py.typed", "moeprune/data/model/model.safetensors", "moeprune/data/tasks/tiny.yaml"),
    *("moeprune/data/calibration.jsonl", "moeprune/data/LICENSE.python.txt", "moeprune/evaluation/templates"),
    *("dist-info/licenses/LICENSE", "dist-info/licenses/NOTICE", "dist-info/entry_points.txt"),
]


def build(output: Path, umask: int = 0o022) -> dict[str, Path]:
    """Build both files, as ``make dist`` does; by their endings."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools/dist.py"), "-o", str(output)],
        env=os.environ | {"SOURCE_DATE_EPOCH": EPOCH},
        capture_output=True,
        text=True,
        check=False,
        umask=umask,
    )
    assert done.returncode == 0, done.stderr
    return {file.suffix: file for file in output.iterdir()}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The wheel and the source distribution."""
    return build(tmp_path_factory.mktemp("dist"))


def test_equal_sources_give_equal_bytes(built: dict[str, Path], tmp_path: Path) -> None:
    """Whenever they are built, and whoever may read files by default there."""
    again = build(tmp_path, umask=0o077)
    assert {suffix: file.name for suffix, file in again.items()} == {
        suffix: file.name for suffix, file in built.items()
    }
    assert sorted(again) == [".gz", ".whl"]
    for suffix, file in again.items():
        assert file.read_bytes() == built[suffix].read_bytes()


def test_nothing_is_missing(built: dict[str, Path]) -> None:
    """What the package reads at run time, its licences and the type marker; and nothing of this machine."""
    with zipfile.ZipFile(built[".whl"]) as wheel:
        names = wheel.namelist()
    for needed in NEEDED:
        assert [name for name in names if needed in name], needed
    assert not [name for name in names if "__pycache__" in name or name.startswith(("tests", "examples"))]
    with tarfile.open(built[".gz"]) as sdist:
        entries = sdist.getmembers()
    assert {(entry.uid, entry.uname, entry.mtime) for entry in entries} == {(0, "", int(EPOCH))}
    assert built[".whl"].stat().st_size < 10e6


def test_a_time_must_be_given(tmp_path: Path) -> None:
    """Without one the files would differ from day to day."""
    without = {name: value for name, value in os.environ.items() if name != "SOURCE_DATE_EPOCH"}
    command = [sys.executable, str(ROOT / "tools/dist.py"), "-o", str(tmp_path / "dist")]
    done = subprocess.run(command, env=without, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("SOURCE_DATE_EPOCH is not set")
    assert not (tmp_path / "dist").exists()


@pytest.mark.timeout(600)  # it imports every dependency several times, on a busy machine slowly
def test_the_wheel_runs_the_default_model(built: dict[str, Path], tmp_path: Path) -> None:
    """In a fresh environment that has the dependencies and nothing of the source tree, from an empty folder."""
    python = environment(tmp_path / "environment")
    options = ["--quiet", "--disable-pip-version-check", "--no-index", "--no-deps", "--ignore-installed"]
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "MOEPRUNE"))}
    for command in (
        [sys.executable, "-m", "pip", "--python", str(python), "install", *options, str(built[".whl"])],
        [str(python), "-P", str(ROOT / "tests/integration/installed.py")],
    ):
        folder = tmp_path / "empty"
        folder.mkdir(exist_ok=True)
        done = subprocess.run(command, cwd=folder, env=clean, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    assert str(tmp_path / "environment") in done.stdout


def environment(folder: Path) -> Path:
    """A fresh environment that sees the packages of this one, but not what is installed here in place; its python."""
    venv.create(folder, symlinks=True)
    own = Path(sysconfig.get_path("purelib", vars={"base": str(folder)}))
    others = [path for path in sys.path if Path(path).name in {"site-packages", "dist-packages"}]
    (own / "others.pth").write_text("".join(f"{path}\n" for path in others))
    return folder / "bin/python"
