"""Collections layer by layer that are killed, fail or find damage: the same command again ends byte for byte the same.

The collections are forked from one warm process (``collector.py``) and told to die at a step of their own.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import pytest

import moeprune
from moeprune import cli
from moeprune.collectors import stream as collector
from moeprune.collectors.kept import kept_beside
from moeprune.errors import CheckpointError, ConfigError

CheckpointOf = Callable[..., Path]
DEPTH = 5
KILLS = 16
SELDOM = 1e9  # times the seconds that it took to save states


class Place(NamedTuple):
    """A model of several layers, some rows of calibration data, and the statistics that they give."""

    base: Path
    data: Path
    expected: bytes
    memory: dict[str, int | None]  # by where the states live


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """As in the processes that are started: float sums depend on the number of threads."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def place(checkpoint_of: CheckpointOf, tmp_path_factory: pytest.TempPathFactory) -> Place:
    """Five layers, of which one is dense."""
    base, root = checkpoint_of("qwen3_moe", num_hidden_layers=DEPTH), tmp_path_factory.mktemp("resume")
    rng, data = np.random.default_rng(5), root / "ids.jsonl"
    rows = [{"input_ids": rng.integers(0, 97, int(size)).tolist()} for size in rng.integers(8, 30, 8)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    room = moeprune.forecast(base, calibration=str(data), stream=True, batch_tokens=60, memory=1 << 40)
    assert room is not None
    output = root / "expected.safetensors"
    moeprune.collect(base, output, calibration=str(data), stream=False, batch_tokens=60)
    return Place(base, data, output.read_bytes(), {"memory": None, "files": room.host - 1})


class End(NamedTuple):
    """How a collection ended, and the decoder layers that it read, -1 for what is outside of them."""

    killed: bool
    steps: int
    layers: set[int]


class Collections:
    """Starts collections that write ``out``."""

    def __init__(self, place: Place, folder: Path) -> None:
        script = Path(__file__).with_name("collector.py")
        self._process = subprocess.Popen(
            [sys.executable, script],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            bufsize=1,
            env=os.environ | {"OMP_NUM_THREADS": "1"},  # a process with threads is no good to fork
        )
        self._place = place
        self._log = folder / "log"
        self._owners = {
            f"{entry.file.name} {entry.begin}": int((re.findall(r"\blayers\.(\d+)\.", name) or [-1])[0])
            for name, entry in moeprune.open_checkpoint(place.base).tensors.items()
        }
        self.out = folder / "out.safetensors"
        self.kept = folder / ".out.safetensors.moeprune-collect"
        self.run(output=None)

    def run(self, *, at: int | None = None, pace: float = 0, states: str = "memory", **more: Any) -> End:
        """Run a collection that may die at a step."""
        options = {"model": str(self._place.base), "output": str(self.out), "calibration": str(self._place.data)}
        options |= {"stream": True, "batch_tokens": 60, "memory": self._place.memory[states]} | more
        job = {"at": at, "pace": pace, "log": str(self._log), "options": options}
        print(json.dumps(job), file=self._pipe(self._process.stdin))
        answer = json.loads(self._pipe(self._process.stdout).readline())
        reads = self._log.read_text().splitlines() if self._log.exists() else []
        layers = {self._owners[line] for line in reads if line in self._owners}  # the last line may be cut
        return End(answer["killed"], int(answer["steps"] or 0), layers)

    def following(self) -> int:
        """The layer that a run would go on with."""
        journal = self.kept / "progress.json"
        return int(json.loads(journal.read_text())["following"]) if journal.exists() else 0

    def beside(self) -> list[str]:
        """What lies beside the output, but for the pieces of it that killed runs were writing."""
        names = {path.name for path in self.out.parent.iterdir()} - {self.out.name, self._log.name}
        return sorted(name for name in names if not re.fullmatch(rf"\.{self.out.name}\.\w{{8}}", name))

    def clear(self) -> None:
        """Forget everything."""
        self.out.unlink(missing_ok=True)
        shutil.rmtree(self.kept, ignore_errors=True)

    def close(self) -> None:
        """End the process that starts them."""
        self._pipe(self._process.stdin).close()
        self._process.wait()
        self._pipe(self._process.stdout).close()

    @staticmethod
    def _pipe(pipe: IO[str] | None) -> IO[str]:
        assert pipe is not None
        return pipe


@pytest.fixture(scope="module")
def warm(place: Place, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Collections]:
    """The warm process."""
    found = Collections(place, tmp_path_factory.mktemp("collections"))
    yield found
    found.close()


@pytest.fixture
def collections(warm: Collections) -> Collections:
    """A warm process that starts collections, with nothing left of earlier ones."""
    warm.clear()
    return warm


# --- kills ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pace", [0, SELDOM])
@pytest.mark.parametrize("states", ["memory", "files"])
def test_a_collection_that_is_killed_at_any_step_ends_the_same(
    states: str, pace: float, place: Place, collections: Collections
) -> None:
    """However often and wherever it dies, also in the middle of a write; layers that are done are not read again."""
    draw, kills, resumed = random.Random(8), 0, 0  # noqa: S311 - where to kill
    steps = collections.run(pace=pace, states=states).steps
    assert steps > 4 * DEPTH
    while kills < KILLS:
        collections.clear()
        end = collections.run(at=draw.randint(1, steps), pace=pace, states=states)
        while end.killed and not collections.out.exists():
            kills += 1
            start = collections.following()
            resumed += start > 0
            end = collections.run(at=draw.randint(1, steps), pace=pace, states=states)
            assert end.layers <= {*range(start, DEPTH)} | ({-1} if not start else set())
        if end.killed:  # between the output and the end, what was kept may stay
            end = collections.run(pace=pace, states=states, overwrite=True)
            assert not end.layers
        assert collections.out.read_bytes() == place.expected
        assert collections.beside() == []
    assert resumed > KILLS // 4


# --- what is not believed ---------------------------------------------------------------------------------------------


class Stopped(Exception):  # noqa: N818 - no error, but the end of a run that stands for a kill
    """Ends a collection in this process."""


def collect(place: Place, output: Path, **options: Any) -> bytes:
    """Collect layer by layer in this process."""
    given = {"stream": True, "batch_tokens": 60} | options
    moeprune.collect(place.base, output, calibration=str(place.data), **given)
    return output.read_bytes()


@pytest.fixture
def stopped(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[Path, Path]]:
    """Leave what a collection leaves that ends before a layer; gives its output and the folder beside it."""
    run_layer = collector._run_layer

    def stop(before: int, **options: Any) -> tuple[Path, Path]:
        def run(model: Any, index: int, *arguments: Any) -> None:
            if index == before:
                raise Stopped
            run_layer(model, index, *arguments)

        output = tmp_path / "out.safetensors"
        with monkeypatch.context() as patch:
            patch.setattr(collector, "_run_layer", run)
            patch.setattr(collector, "_PACE", 0)
            with pytest.raises(Stopped):
                collect(place, output, **options)
        assert f"note: the same command will go on with decoder layer {before}\n" in capsys.readouterr().err
        return output, tmp_path / ".out.safetensors.moeprune-collect"

    return stop


@pytest.mark.parametrize("states", ["memory", "files"])
def test_states_may_go_on_in_another_place(
    states: str, place: Place, stopped: Callable[..., tuple[Path, Path]], capsys: pytest.CaptureFixture[str]
) -> None:
    """How much memory is free decides where they live, and may be another amount the next time."""
    other = {"memory": "files", "files": "memory"}[states]
    output, kept = stopped(3, memory=place.memory[states])
    assert collect(place, output, memory=place.memory[other]) == place.expected
    assert capsys.readouterr().err.startswith("note: going on with decoder layer 3: those before it are done\n")
    assert not kept.exists()


@pytest.mark.parametrize("damage", ["a bit", "shorter", "longer", "empty", "gone"])
@pytest.mark.parametrize("states", ["memory", "files"])
def test_damage_never_gives_wrong_numbers(
    damage: str,
    states: str,
    place: Place,
    stopped: Callable[..., tuple[Path, Path]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Whatever happened to any of the files meanwhile, the run begins again and says so."""
    output, kept = stopped(3, memory=place.memory[states])
    whole = {file.name: file.read_bytes() for file in kept.iterdir()}
    used = {json.loads(whole["progress.json"])["states"]["file"], "progress.json", "layer-0.npz", "layer-2.npz"}
    draw = random.Random(damage)  # noqa: S311 - where to damage
    for name in sorted(used):
        for file, content in whole.items():
            (kept / file).write_bytes(content)
        (kept / name).write_bytes(damaged(whole[name], damage, draw))
        if damage == "gone":
            (kept / name).unlink()
        assert collect(place, output, memory=place.memory[states], overwrite=True) == place.expected
        noted = capsys.readouterr().err
        assert "going on" not in noted
        unfit = f"note: what an earlier run left in {kept} is damaged, and is not used\n"
        assert (unfit in noted) is ((damage, name) != ("gone", "progress.json"))
        assert not kept.exists()
        kept.mkdir()


def damaged(content: bytes, damage: str, draw: random.Random) -> bytes:
    """Other content in the place of some."""
    place = draw.randrange(len(content))
    flipped = content[:place] + bytes([content[place] ^ 1 << draw.randrange(8)]) + content[place + 1 :]
    return {"a bit": flipped, "shorter": content[:-1], "longer": content + b"x", "empty": b"", "gone": b""}[damage]


@pytest.mark.parametrize("change", ["an option", "the data", "the model", "the version"])
def test_what_another_run_left_is_not_used(
    change: str,
    place: Place,
    stopped: Callable[..., tuple[Path, Path]],
    checkpoint_of: CheckpointOf,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Other options, data, models and versions give other numbers."""
    output, kept = stopped(3)
    options: dict[str, Any] = {}
    if change == "an option":
        options = {"batch_tokens": 40}
    elif change == "the data":
        rows = place.data.read_text().splitlines(keepends=True)
        (tmp_path / "ids.jsonl").write_text("".join(rows[1:]))
        place = place._replace(data=tmp_path / "ids.jsonl")
    elif change == "the model":
        place = place._replace(base=checkpoint_of("qwen3_moe", num_hidden_layers=DEPTH, initializer_range=0.2))
    else:
        monkeypatch.setattr("moeprune.collecting.__version__", "0")
    found = collect(place, output, **options)
    note = f"note: what an earlier run left in {kept} was of other data or options, and is not used\n"
    assert note in capsys.readouterr().err
    assert not kept.exists()
    monkeypatch.undo()
    assert found == collect(place, tmp_path / "afresh.safetensors", **options)


# --- two runs ---------------------------------------------------------------------------------------------------------


def test_a_second_run_at_the_same_time_is_refused(
    place: Place, stopped: Callable[..., tuple[Path, Path]], capsys: pytest.CaptureFixture[str]
) -> None:
    """It says so before any work, and the first one's files stay as they are."""
    output, kept = stopped(3)
    whole = {file.name: file.read_bytes() for file in kept.iterdir()}
    command = ["collect", str(place.base), "--calibration", str(place.data), "-o", str(output), "--stream"]
    with kept_beside(output, {}):
        locked = {file.name: file.read_bytes() for file in kept.iterdir()}
        capsys.readouterr()
        assert cli.run(command) == 2
        error, hint = capsys.readouterr().err.splitlines()
        assert error == f"error: another run is writing {output}"
        assert "wait for it" in hint
        assert {file.name: file.read_bytes() for file in kept.iterdir()} == locked
    assert not kept.exists()
    assert whole


# --- errors -----------------------------------------------------------------------------------------------------------


def test_a_shard_that_is_cut_while_the_run_goes_on(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The error names the file; when it is repaired, the run goes on after the layers that were done."""
    base, output = by_layer(place.base, tmp_path / "base"), tmp_path / "out.safetensors"
    shard = base / "layer-3.safetensors"
    whole, run_layer, ran = shard.read_bytes(), collector._run_layer, []

    def run(model: Any, index: int, *arguments: Any) -> None:
        if not ran:
            shard.write_bytes(whole[:-1000])
        ran.append(index)
        run_layer(model, index, *arguments)

    monkeypatch.setattr(collector, "_run_layer", run)
    monkeypatch.setattr(collector, "_PACE", 0)
    command = ["collect", str(base), "--calibration", str(place.data), "-o", str(output), "--batch-tokens", "60"]
    command += ["--stream"]
    assert cli.run(command) == 1
    going_on, error, hint = [line for line in capsys.readouterr().err.splitlines() if "short" not in line.split()]
    assert going_on == "note: the same command will go on with decoder layer 3"
    assert error == f"error: {shard} is shorter than its header says"
    assert hint == "hint: download it again"
    assert cli.run(command) == 2  # now it is seen before any work, and what was done stays
    assert str(shard.name) in capsys.readouterr().err
    shard.write_bytes(whole)
    assert cli.run(command) == 0
    assert ran == [0, 1, 2, 3, 3, 4]
    expected = moeprune.collect(base, calibration=str(place.data), batch_tokens=60, stream=False)
    assert output.read_bytes() == expected.to_bytes()
    assert {file.name for file in tmp_path.iterdir()} == {"base", "out.safetensors"}


def by_layer(base: Path, folder: Path) -> Path:
    """A copy of a checkpoint with a shard for each layer and one for the rest."""
    from safetensors.torch import load_file, save_file

    tensors = {name: tensor for file in sorted(base.glob("*.safetensors")) for name, tensor in load_file(file).items()}
    shards: dict[str, dict[str, Any]] = {}
    for name, tensor in tensors.items():
        layer = re.search(r"\blayers\.(\d+)\.", name)
        shards.setdefault(f"layer-{layer[1]}.safetensors" if layer else "rest.safetensors", {})[name] = tensor
    folder.mkdir()
    for file, content in shards.items():
        save_file(content, folder / file, metadata={"format": "pt"})
    weight_map = {name: file for file, content in shards.items() for name in content}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    shutil.copy(base / "config.json", folder)
    return folder


@pytest.mark.parametrize("when", ["the embedding", "the first layer"])
def test_nothing_is_left_of_a_run_that_did_nothing(
    when: str, place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is nothing to go on from, and no hidden folder either."""

    def fail(*_: Any) -> None:
        raise CheckpointError("broken")

    monkeypatch.setattr(
        *{
            "the embedding": ("moeprune.streaming.stream.LayerStream.embed", fail),
            "the first layer": ("moeprune.collectors.stream._run_layer", fail),
        }[when]
    )
    with pytest.raises(CheckpointError, match="broken"):
        collect(place, tmp_path / "out.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_an_output_that_cannot_be_written_costs_no_layer(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that is full in the end: the same command writes it without running anything."""
    output = tmp_path / "out.safetensors"

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(moeprune.RouterStatistics, "save", full)
        with pytest.raises(OSError, match="No space left"):
            collect(place, output)
    kept = tmp_path / ".out.safetensors.moeprune-collect"
    assert sorted(file.name for file in kept.iterdir() if file.suffix != ".npz") == ["lock", "progress.json"]
    monkeypatch.setattr(collector, "_run_layer", full)
    assert collect(place, output) == place.expected
    assert not kept.exists()


def test_a_prune_goes_on_too(place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The one-shot run keeps a collection until the checkpoint is written."""
    options: dict[str, Any] = {"keep": 8, "calibration": str(place.data), "batch_tokens": 60, "stream": True}
    with monkeypatch.context() as patch:
        patch.setattr("moeprune.oneshot.apply_drop", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            moeprune.prune(place.base, tmp_path / "out", **options)
    assert [file.name for file in tmp_path.iterdir()] == [".out.moeprune-collect"]
    monkeypatch.setattr(collector, "_run_layer", lambda *_: 1 / 0)
    moeprune.prune(place.base, tmp_path / "out", **options)
    assert (tmp_path / "out" / "moeprune" / "statistics.safetensors").read_bytes() == place.expected
    assert [file.name for file in tmp_path.iterdir()] == ["out"]


def test_a_disk_too_small_for_the_states_is_refused(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stopped: Callable[..., tuple[Path, Path]]
) -> None:
    """Before any work; what an earlier run left there counts as free."""
    usage = shutil.disk_usage(tmp_path)
    room = moeprune.forecast(place.base, tmp_path / "x", calibration=str(place.data), stream=True, batch_tokens=60)
    assert room is not None
    needed = room.disk + 64_000_000
    assert room.disk == 2 * room.states > 0
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=needed - 1))
    for ask in (moeprune.collect, moeprune.forecast):
        with pytest.raises(ConfigError, match="not enough disk space"):
            ask(place.base, tmp_path / "x", calibration=str(place.data), stream=True, batch_tokens=60)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    output, kept = stopped(3)
    left = sum(file.stat().st_size for file in kept.iterdir())
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=needed - left))
    assert collect(place, output) == place.expected
