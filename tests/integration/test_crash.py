"""Writers that are killed, stopped, interrupted or run out of disk: the same command again ends byte for byte the same.

The writers are forked from one warm process (``writer.py``), told to die at a step of their own or killed from outside.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

import pytest

import moeprune
from moeprune import _files, cli
from moeprune.errors import ConfigError
from moeprune.rewrite import copying, shards

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="writers are forked")
SHARD_SIZE = 62_000
KILLS = 60
CONFIG = {
    "model_type": "qwen3_moe",
    "num_hidden_layers": 2,
    "num_experts": 16,
    "num_experts_per_tok": 2,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}


def tensors() -> Iterator[tuple[str, tuple[int, int]]]:
    """Names and shapes of a small checkpoint."""
    yield "model.embed_tokens.weight", (100, 128)
    for layer in range(2):
        yield f"model.layers.{layer}.mlp.gate.weight", (16, 128)
        for expert in range(16):
            for name in ("down_proj", "gate_proj", "up_proj"):
                yield f"model.layers.{layer}.mlp.experts.{expert}.{name}.weight", (40, 128)


class Place(NamedTuple):
    """A checkpoint, a plan that keeps half of it, and the tree that the plan gives."""

    base: Path
    plan: Path
    expected: dict[str, bytes]

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes of each shard of the output."""
        return {name: len(data) for name, data in self.expected.items() if name.endswith(".safetensors")}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """Random bytes in two files, cut to eight shards."""
    root = tmp_path_factory.mktemp("crash")
    base, plan = root / "base", root / "plan.json"
    base.mkdir()
    draw, described, index = random.Random(3), list(tensors()), {}  # noqa: S311 - bytes of a test
    for number, part in enumerate((described[:50], described[50:]), 1):
        name = f"model-0000{number}-of-00002.safetensors"
        sized = [(tensor, "BF16", shape, 2 * shape[0] * shape[1]) for tensor, shape in part]
        data = b"".join(draw.randbytes(size) for *_, size in sized)
        (base / name).write_bytes(_files.safetensors_header(sized, {"format": "pt"}) + data)
        index |= dict.fromkeys((tensor for tensor, _ in part), name)
    (base / "config.json").write_text(json.dumps(CONFIG))
    (base / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    (base / "tokenizer.json").write_text("{}")
    moeprune.plan(moeprune.collect(base), base, ratio=0.5, strategy="random", output=plan)
    return Place(base, plan, tree(moeprune.apply(base, plan, root / "out", max_shard_size=SHARD_SIZE)))


def tree(folder: Path) -> dict[str, bytes]:
    """Every file of a folder, byte for byte."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


class End(NamedTuple):
    """How a writer ended, and the bytes that it wrote to each shard."""

    killed: bool
    steps: int
    written: Counter[str]


class Writers:
    """Starts writers that fill ``out``."""

    def __init__(self, place: Place, folder: Path) -> None:
        script = Path(__file__).with_name("writer.py")
        self._process = subprocess.Popen(
            [sys.executable, script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )
        self._place = place
        self._log = folder / "log"
        self._running = 0
        self.out = folder / "out"

    def start(
        self,
        *,
        at: int | str | None = None,
        after: float | None = None,
        send: int = signal.SIGKILL,
        overwrite: bool = False,
    ) -> int:
        """Start a writer that gets a signal at some step, or is killed after some seconds; gives its process id."""
        job: dict[str, Any] = {"at": at, "after": after, "signal": int(send), "overwrite": overwrite}
        job |= {"log": str(self._log), "out": str(self.out)}
        self._log.unlink(missing_ok=True)
        print(json.dumps(job | {"base": str(self._place.base), "plan": str(self._place.plan)}), file=self._pipe())
        self._running = int(self._answer())
        return self._running

    def end(self) -> End:
        """Wait until the writer has ended."""
        answer = json.loads(self._answer())
        self._running = 0
        written: Counter[str] = Counter()
        for line in self._log.read_text().splitlines() if self._log.exists() else ():
            name, nbytes = line.split()
            written[name.removeprefix(".").removesuffix(".part")] += int(nbytes)
        return End(answer["killed"], int(answer["steps"] or 0), written)

    def run(self, **options: Any) -> End:
        """Start a writer and wait for it."""
        self.start(**options)
        return self.end()

    def finished(self) -> set[str]:
        """The shards that the journal vouches for."""
        file = self.out.with_name(".out.moeprune-journal")
        lines = file.read_bytes().split(b"\n")[:-1] if file.exists() else []
        return {row["shard"] for row in map(json.loads, lines) if "shard" in row}

    def close(self) -> None:
        """End the process that starts them, and a writer that a failed test left stopped."""
        if self._running:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._running, signal.SIGCONT)
        self._pipe().close()
        self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()

    def _pipe(self) -> IO[str]:
        assert self._process.stdin is not None
        return self._process.stdin

    def _answer(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline()


@pytest.fixture
def writers(place: Place, tmp_path: Path) -> Iterator[Writers]:
    """A warm process that starts writers in an empty folder."""
    found = Writers(place, tmp_path)
    yield found
    found.close()


def check_end(end: End, before: set[str], place: Place, out: Path) -> None:
    """The writer ended well: the tree is right, nothing hidden is left, and only what was missing was written."""
    assert not end.killed
    assert tree(out) == place.expected
    assert not list(out.parent.glob(".out*"))
    assert end.written == {name: size for name, size in place.sizes.items() if name not in before}


# --- kills ----------------------------------------------------------------------------------------------------------


def test_a_writer_that_is_killed_at_any_step_ends_the_same(place: Place, writers: Writers) -> None:
    """Sixty kills at random steps, often several in a row: no finished shard is ever written again."""
    draw, kills, resumed = random.Random(8), 0, 0  # noqa: S311 - where to kill
    assert len(place.sizes) >= 8
    steps = writers.run().steps
    while kills < KILLS:
        shutil.rmtree(writers.out, ignore_errors=True)
        end, before = writers.run(at=draw.randint(1, steps)), set()
        while end.killed and not writers.out.exists():
            kills += 1
            before = writers.finished()
            resumed += bool(before)
            end = writers.run(at=draw.randint(1, steps))
            assert not before & end.written.keys()
        if not end.killed:
            check_end(end, before, place, writers.out)
        assert tree(writers.out) == place.expected
    assert resumed > KILLS // 4


def test_a_writer_that_is_killed_from_outside_ends_the_same(place: Place, writers: Writers) -> None:
    """Kills at moments that no step marks."""
    draw, kills = random.Random(9), 0  # noqa: S311 - when to kill
    began = time.perf_counter()
    writers.run()
    whole = time.perf_counter() - began
    for _ in range(100):
        if kills == 10:
            break
        shutil.rmtree(writers.out, ignore_errors=True)
        began = time.perf_counter()
        end, before = writers.run(after=draw.uniform(0, whole)), writers.finished()
        if end.killed and not writers.out.exists():
            kills += 1
            end = writers.run()
            check_end(end, before, place, writers.out)
        elif not end.killed:  # a busy machine is faster now than when the time was taken
            whole = min(whole, time.perf_counter() - began)
        assert tree(writers.out) == place.expected
    assert kills == 10


@pytest.mark.parametrize(
    ("step", "again"),
    [
        ("rename model-00003-of-00009.safetensors", True),
        ("journal model-00003-of-00009.safetensors", True),
        ("copy tokenizer.json", False),
        ("rename out", False),
    ],
)
def test_a_kill_between_two_steps(place: Place, writers: Writers, step: str, again: bool) -> None:
    """Between fsync and rename, in the middle of the journal's line, after the last shard, before the last rename."""
    end, shard = writers.run(at=step), "model-00003-of-00009.safetensors"
    folder = writers.out.with_name(".out.moeprune-partial")
    assert end.killed
    assert not writers.out.exists()
    if step == f"rename {shard}":  # every byte is on the device, under a name that nobody trusts
        assert (folder / f".{shard}.part").read_bytes() == place.expected[shard]
        assert not (folder / shard).exists()
    before = writers.finished()
    assert (shard not in before) == again
    check_end(writers.run(), before, place, writers.out)


def test_a_kill_while_names_are_swapped_costs_neither_folder(place: Place, writers: Writers) -> None:
    """Between the two renames of --overwrite the old folder has a hidden name; the next run puts it back first."""
    writers.out.mkdir()
    (writers.out / "precious.txt").write_text("old")
    old = writers.out.with_name(".out.moeprune-old")
    assert writers.run(at="rename out", overwrite=True).killed
    assert not writers.out.exists()
    assert tree(old) == {"precious.txt": b"old"}
    with pytest.raises(ConfigError, match="out is not empty"):
        moeprune.apply(place.base, place.plan, writers.out, max_shard_size=SHARD_SIZE)
    assert tree(writers.out) == {"precious.txt": b"old"}
    check_end(writers.run(overwrite=True), set(place.sizes), place, writers.out)


def test_what_a_kill_after_the_swap_left_is_removed(place: Place, writers: Writers) -> None:
    """The folder that was replaced goes last; when that was cut short, the next run does it."""
    old = writers.out.with_name(".out.moeprune-old")
    old.mkdir()
    (old / "stale").write_text("x")
    shutil.copytree(place.base, writers.out)
    check_end(writers.run(overwrite=True), set(), place, writers.out)


def test_a_real_interrupt_stops_every_thread(place: Place, writers: Writers) -> None:
    """Ctrl-C reaches the main thread while others copy: they stop, and the next run does what was not finished."""
    end = writers.run(at="write .model-00007-of-00009.safetensors.part", send=signal.SIGINT)
    assert (end.killed, end.steps) == (False, 0)
    assert not writers.out.exists()
    before = writers.finished()
    assert 4 <= len(before) < 9
    assert sorted(path.name for path in writers.out.with_name(".out.moeprune-partial").iterdir()) == sorted(before)
    check_end(writers.run(), before, place, writers.out)


# --- two runs -------------------------------------------------------------------------------------------------------


def test_the_second_of_two_runs_stops_at_once(
    place: Place, writers: Writers, capsys: pytest.CaptureFixture[str]
) -> None:
    """While a run is writing a folder, another one for it is refused before any work; the first goes on unharmed."""
    child = writers.start(at="rename model-00004-of-00009.safetensors", send=signal.SIGSTOP)
    wait_for_stop(child)
    before = {path: path.stat().st_mtime_ns for path in writers.out.parent.rglob("*")}
    for command in (
        "apply {base} {plan}",
        "prune {base} --ratio 0.5 --strategy random",
        "apply {base} {plan} --dry-run",
    ):
        arguments = shlex.split(command.format(base=place.base, plan=place.plan))
        assert cli.run([*arguments, "-o", str(writers.out), "--overwrite"]) == 2
        error, hint = capsys.readouterr().err.splitlines()
        assert error == f"error: another run is writing {writers.out}"
        assert "wait for it" in hint
    assert {path: path.stat().st_mtime_ns for path in writers.out.parent.rglob("*")} == before
    os.kill(child, signal.SIGCONT)
    check_end(writers.end(), set(), place, writers.out)


def wait_for_stop(child: int) -> None:
    """Wait until a process has stopped itself."""
    for _ in range(500):
        if Path(f"/proc/{child}/stat").read_text().rsplit(")", 1)[1].split()[0] == "T":
            return
        time.sleep(0.01)
    raise AssertionError("the writer did not stop")


# --- errors ---------------------------------------------------------------------------------------------------------


def run_cli(place: Place, out: Path) -> int:
    """``moeprune apply`` in this process."""
    return cli.run(["apply", str(place.base), str(place.plan), "-o", str(out), "--max-shard-size", str(SHARD_SIZE)])


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, BaseException], list[str]]:
    """Let the n-th write of shard bytes raise an error; gives the list of the files that are written to."""
    monkeypatch.setattr(copying, "THREADS", 1)
    monkeypatch.setattr(copying, "_BUFFER", 4096)
    write_all = shards._write_all

    def install(number: int, error: BaseException) -> list[str]:
        written: list[str] = []

        def write(out: IO[bytes], chunk: memoryview) -> None:
            written.append(Path(out.name).name)
            if len(written) == number:
                raise error
            write_all(out, chunk)

        monkeypatch.setattr(shards, "_write_all", write)
        return written

    return install


FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
BROKEN = OSError(errno.EIO, os.strerror(errno.EIO))


GO_ON = "run the same command again: it goes on after 2 finished shards ({size}) in {kept}"
FULL_DISK = "error: cannot write {out}: No space left on device\nhint: free some space and " + GO_ON
BROKEN_DISK = "error: cannot write {out}: Input/output error\nhint: " + GO_ON
INTERRUPT = "note: the same command will go on after 2 finished shards ({size}) in {kept}\ninterrupted"


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [(FULL, 1, FULL_DISK), (BROKEN, 1, BROKEN_DISK), (KeyboardInterrupt(), 130, INTERRUPT)],
    ids=["full disk", "broken disk", "Ctrl-C"],
)
def test_finished_shards_survive_an_error(
    place: Place,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    broken: Callable[[int, BaseException], list[str]],
    error: BaseException,
    code: int,
    said: str,
) -> None:
    """The message says what is kept and how to go on, half a file is not kept, and the next run does the rest only."""
    out, kept = tmp_path / "out", tmp_path / ".out.moeprune-partial"
    names = sorted(place.sizes)
    size = _files.human_bytes(sum(place.sizes[name] for name in names[:2]))
    broken(40, error)
    assert run_cli(place, out) == code
    assert capsys.readouterr().err.strip() == said.format(out=out, kept=kept, size=size)
    assert sorted(path.name for path in kept.iterdir()) == names[:2]
    written = broken(0, error)
    assert run_cli(place, out) == 0
    assert capsys.readouterr().err.strip() == f"note: going on after 2 finished shards ({size}) in {kept}"
    assert set(written) == {f".{name}.part" for name in names[2:]}
    assert tree(out) == place.expected
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("error", [FULL, KeyboardInterrupt()], ids=["full disk", "Ctrl-C"])
def test_an_error_in_the_first_shard_leaves_nothing(
    place: Place,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    broken: Callable[[int, BaseException], list[str]],
    error: BaseException,
) -> None:
    """There is nothing to go on from, and no hidden file either."""
    broken(10, error)
    assert run_cli(place, tmp_path / "out") in {1, 130}
    assert "another -o" in capsys.readouterr().err or isinstance(error, KeyboardInterrupt)
    assert list(tmp_path.iterdir()) == []


def test_what_is_there_already_counts_as_free_space(
    place: Place, writers: Writers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that goes on needs only the rest; the check stands before the first byte."""
    room = shutil.disk_usage(place.base)
    needed = sum(place.sizes.values()) + 64_000_000
    assert writers.run(at="rename model-00008-of-00009.safetensors").killed
    there = sum(path.stat().st_size for path in writers.out.with_name(".out.moeprune-partial").iterdir())
    assert there > 300_000
    monkeypatch.setattr(shutil, "disk_usage", lambda _: room._replace(free=needed - there - 20_000))
    with pytest.raises(ConfigError, match="not enough disk space"):
        moeprune.apply(place.base, place.plan, writers.out, max_shard_size=SHARD_SIZE)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: room._replace(free=needed - there))
    assert tree(moeprune.apply(place.base, place.plan, writers.out, max_shard_size=SHARD_SIZE)) == place.expected


# --- what is not believed -------------------------------------------------------------------------------------------


def test_another_job_starts_anew(place: Place, writers: Writers, capsys: pytest.CaptureFixture[str]) -> None:
    """Shards of another plan are no use: they are removed with a remark."""
    assert writers.run(at="rename model-00004-of-00009.safetensors").killed
    plan = moeprune.plan(moeprune.collect(place.base), place.base, keep=4, strategy="random")
    capsys.readouterr()
    out = moeprune.apply(place.base, plan, writers.out)
    assert capsys.readouterr().err == (
        f"note: removing what an earlier run left unfinished in {out.with_name('.out.moeprune-partial')}\n"
    )
    assert moeprune.verify(place.base, out).tensors == 1 + 2 + 2 * 4 * 3
    assert [path.name for path in out.parent.iterdir() if path.name != "log"] == ["out"]


def test_a_source_that_was_touched_is_copied_anew(place: Place, writers: Writers, tmp_path: Path) -> None:
    """Shards of files that have changed since are not mixed with those of the new ones."""
    base = shutil.copytree(place.base, tmp_path / "base")
    touched = Place(base, place.plan, place.expected)
    started = Writers(touched, tmp_path)
    assert started.run(at="rename model-00005-of-00009.safetensors").killed
    assert started.finished()
    os.utime(base / "model-00002-of-00002.safetensors", ns=(1, 1))
    check_end(started.run(), set(), touched, started.out)
    started.close()


@pytest.mark.parametrize("damage", ["shorter", "gone", "no journal", "garbage"])
def test_a_shard_is_believed_only_when_journal_and_size_agree(place: Place, writers: Writers, damage: str) -> None:
    """Whatever happened to the hidden folder meanwhile, the result is the same."""
    assert writers.run(at="copy tokenizer.json").killed
    folder, journal = writers.out.with_name(".out.moeprune-partial"), writers.out.with_name(".out.moeprune-journal")
    shard, rows = folder / "model-00002-of-00009.safetensors", journal.read_bytes().splitlines(keepends=True)
    if damage == "shorter":
        shard.write_bytes(shard.read_bytes()[:-1])
    elif damage == "gone":
        shard.unlink()
    elif damage == "no journal":
        journal.unlink()
    else:
        journal.write_bytes(b"".join(rows[:2]) + b"[1]\n" + b"".join(rows[2:]))
    (folder / "stray.safetensors").write_text("x")
    trusted = {json.loads(row)["shard"] for row in rows[1:]} - {shard.name}
    trusted = {"no journal": set(), "garbage": {json.loads(rows[1])["shard"]}}.get(damage, trusted)
    check_end(writers.run(), trusted, place, writers.out)
