"""One collection in many processes, started as users start them: launchers, by hand, and as two machines."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

import moeprune
from moeprune.statistics import STATISTICS

CheckpointOf = Callable[..., Path]
PYTHON = sys.executable
TORCHRUN = [PYTHON, "-m", "torch.distributed.run"]
# On machines without a GPU, accelerate's own --cpu starts one process whatever --num_processes says.
ACCELERATE = [PYTHON, "-m", "accelerate.commands.launch", "--multi_gpu", "--mixed_precision=no", "--dynamo_backend=no"]
LOST = "error: another process of this run failed, so this one stopped"

# The command line, and once more from Python: the processes meet twice.
TWICE = """
import sys
import moeprune
from moeprune.cli import run

assert run(sys.argv[1:]) == 0
moeprune.collect(sys.argv[2], "again.safetensors", calibration=sys.argv[4], batch_tokens=40)
"""
# The command line, in which one process dies after some batches; every batch takes its time.
DYING = """
import os, signal, sys, time
from moeprune.collectors import resident
from moeprune.cli import main

def dawdle(*arguments, plain=resident.padded, seen=[]):
    seen.append(arguments)
    if os.environ["RANK"] == sys.argv[1] and len(seen) == 3:
        print(time.time(), flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(0.5)
    return plain(*arguments)

resident.padded = dawdle
main(sys.argv[2:])
"""

# The same in a pass layer by layer: process 1 dies in layer 1, when process 0 is through with it.
DYING_IN_A_LAYER = """
import os, signal, sys, time
from moeprune.collectors import stream
from moeprune.cli import main

def run_layer(model, index, *arguments, plain=stream._run_layer, seen=[]):
    if os.environ.get("GOES_ON"):
        print(index, file=sys.stderr) if not seen else None
        seen.append(index)
    elif os.environ["RANK"] == "1" and index == 1:
        time.sleep(2)
        os.kill(os.getpid(), signal.SIGKILL)
    return plain(model, index, *arguments)

stream._run_layer, stream._PACE = run_layer, 0
main(sys.argv[1:])
"""


def run(
    command: Sequence[str | Path], folder: Path, environment: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a command to its end in a folder."""
    return subprocess.run(
        list(map(str, command)),
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | dict(environment or {}),
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def by_hand(
    commands: Sequence[Sequence[str | Path]], folder: Path, **environment: str
) -> list[subprocess.CompletedProcess[str]]:
    """Run one command per process of a run, with the variables that a launcher would set."""
    common = {"WORLD_SIZE": str(len(commands)), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()} | environment
    with ThreadPoolExecutor(len(commands)) as pool:
        return list(
            pool.map(
                lambda rank: run(commands[rank], folder, common | {"RANK": str(rank)}),
                range(len(commands)),
            )
        )


def free_port() -> str:
    """A port that nobody uses."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def collect_command(base: Path, data: Path, output: str, *more: str) -> list[str]:
    """A collection of many small batches."""
    return ["collect", str(base), "--calibration", str(data), "--batch-tokens", "40", "-o", output, *more]


def check_same(base: Path, found: Path, expected: moeprune.RouterStatistics) -> None:
    """Counts equal, sums close, and therefore the same plan; the headers have no trace of the processes."""
    statistics = moeprune.RouterStatistics.load(found)
    assert statistics.tokens == expected.tokens > 0
    for part in ("layers", "first_half"):
        assert getattr(statistics, part).keys() == getattr(expected, part).keys()
        for layer, arrays in getattr(expected, part).items():
            for name, array in arrays.items():
                own = getattr(statistics, part)[layer][name]
                if STATISTICS[name].integer:
                    np.testing.assert_array_equal(own, array)
                else:
                    np.testing.assert_allclose(own, array, rtol=1e-6, atol=1e-6 * np.abs(array).max())
    for fact in ("domains", "top_k", "command", "inputs", "provenance"):
        assert getattr(statistics, fact) == getattr(expected, fact)
    plans = [moeprune.plan(one, base, ratio=0.5).layers for one in (statistics, expected)]
    assert {layer: plan.keep for layer, plan in plans[0].items()} == {
        layer: plan.keep for layer, plan in plans[1].items()
    }


@pytest.fixture
def base(checkpoint_of: CheckpointOf) -> Path:
    """A checkpoint of two MoE layers."""
    return checkpoint_of("qwen3_moe")


# --- adding up --------------------------------------------------------------------------------------------------------


def test_two_processes_add_up_to_one(base: Path, ids_file: Path, tmp_path: Path) -> None:
    """A launcher's processes give what one process gives, each time they are asked, and one of them speaks."""
    script = tmp_path / "twice.py"
    script.write_text(TWICE)
    command = collect_command(base, ids_file, "two.safetensors", "--json")
    done = run([*TORCHRUN, "--standalone", "--nproc-per-node=2", script, *command], tmp_path)
    assert done.returncode == 0, done.stderr
    expected = moeprune.collect(base, calibration=str(ids_file), batch_tokens=40)
    assert json.loads(done.stdout)["tokens"] == expected.tokens
    assert done.stderr.count("note: very short calibration data") == 1
    check_same(base, tmp_path / "two.safetensors", expected)
    check_same(base, tmp_path / "again.safetensors", expected)
    assert {file.name for file in tmp_path.iterdir()} == {
        ids_file.name,
        script.name,
        "two.safetensors",
        "again.safetensors",
    }


def test_more_processes_than_batches(base: Path, ids_file: Path, tmp_path: Path) -> None:
    """A process without a batch adds nothing, and keeps in step where the layers are run one at a time."""
    data = tmp_path / "two_rows.jsonl"
    data.write_text("".join(ids_file.read_text().splitlines(keepends=True)[:2]))
    command = [PYTHON, "-m", "moeprune", *collect_command(base, data, "three.safetensors", "--memory=256MB")]
    done = by_hand([command] * 3, tmp_path)
    assert [one.returncode for one in done] == [0, 0, 0], done
    assert [bool(one.stdout) for one in done] == [True, False, False]
    assert [one.stderr for one in done[1:]] == ["", ""]
    one = moeprune.collect(base, tmp_path / "one.safetensors", calibration=str(data), batch_tokens=40, stream=True)
    assert "note: running layer by layer" in done[0].stderr
    check_same(base, tmp_path / "three.safetensors", one)


def test_two_machines(base: Path, ids_file: Path, tmp_path: Path) -> None:
    """Two launchers that know each other by address: only the first machine writes."""
    folders = [tmp_path / name for name in ("first", "second")]
    port = free_port()

    def machine(rank: int) -> subprocess.CompletedProcess[str]:
        folders[rank].mkdir()
        place = [f"--machine_rank={rank}", "--main_process_ip=127.0.0.1", f"--main_process_port={port}"]
        launcher = [*ACCELERATE, "--num_machines=2", "--num_processes=2", *place, "-m", "moeprune"]
        return run([*launcher, *collect_command(base, ids_file, "out.safetensors")], folders[rank])

    with ThreadPoolExecutor(2) as pool:
        done = list(pool.map(machine, range(2)))
    assert [one.returncode for one in done] == [0, 0], done
    assert [bool(one.stdout) for one in done] == [True, False]
    assert not list(folders[1].iterdir())
    check_same(base, folders[0] / "out.safetensors", moeprune.collect(base, calibration=str(ids_file), batch_tokens=40))


# --- going wrong ------------------------------------------------------------------------------------------------------


def test_a_killed_process_ends_the_others(base: Path, ids_file: Path, tmp_path: Path) -> None:
    """Started by hand, with nobody to watch them: the error comes while they compute, and nothing is left."""
    script = tmp_path / "dying.py"
    script.write_text(DYING)
    command = [PYTHON, script, "2", *collect_command(base, ids_file, "out.safetensors")]
    done = by_hand([command] * 3, tmp_path)
    ended = time.time()
    *others, killed = done
    assert killed.returncode == -signal.SIGKILL
    assert ended - float(killed.stdout) < 5
    for one in others:
        assert (one.returncode, one.stdout) == (1, "")
        assert one.stderr.startswith(LOST)
    assert {file.name for file in tmp_path.iterdir()} == {ids_file.name, script.name}


def test_processes_go_on_from_where_each_of_them_was(base: Path, ids_file: Path, tmp_path: Path) -> None:
    """Layer by layer, one process dies behind the other: run again, they meet and give what one process gives."""
    script = tmp_path / "dying.py"
    script.write_text(DYING_IN_A_LAYER)
    command = collect_command(base, ids_file, "out.safetensors", "--stream")
    first = by_hand([[PYTHON, script, *command]] * 2, tmp_path)
    assert [one.returncode for one in first] == [1, -signal.SIGKILL]
    again = by_hand([[PYTHON, script, *command]] * 2, tmp_path, GOES_ON="1")
    assert [one.returncode for one in again] == [0, 0], again
    begun = [next(line for line in one.stderr.splitlines() if line.isdecimal()) for one in again]
    assert begun == ["2", "1"]  # the layers that they began with
    expected = moeprune.collect(base, calibration=str(ids_file), batch_tokens=40, stream=True)
    check_same(base, tmp_path / "out.safetensors", expected)
    assert {file.name for file in tmp_path.iterdir()} == {ids_file.name, script.name, "out.safetensors"}


def test_a_killed_process_under_a_launcher(base: Path, ids_file: Path, tmp_path: Path) -> None:
    """The launcher ends the others too; they still say why they stop."""
    script = tmp_path / "dying.py"
    script.write_text(DYING)
    command = [*TORCHRUN, "--standalone", "--nproc-per-node=2", script, "1"]
    done = run([*command, *collect_command(base, ids_file, "out.safetensors")], tmp_path)
    assert time.time() - float(done.stdout) < 10
    assert done.returncode == 1
    assert done.stderr.count(LOST) == 1
    assert {file.name for file in tmp_path.iterdir()} == {ids_file.name, script.name}


def test_processes_with_other_data_are_refused(base: Path, ids_file: Path, tmp_path: Path) -> None:
    """Two machines with different files under one name would add up what does not belong together."""
    other = tmp_path / "other.jsonl"
    other.write_text(ids_file.read_text() + '{"input_ids": [1, 2, 3]}\n')
    commands = [
        [PYTHON, "-m", "moeprune", *collect_command(base, data, "out.safetensors")] for data in (ids_file, other)
    ]
    done = by_hand(commands, tmp_path)
    assert all(one.returncode in {1, 2} and not one.stdout for one in done)
    error = "error: processes 0 and 1 of this run do not have the same calibration data"
    assert any(one.stderr.startswith(error) for one in done)  # one of them may be ended by the other's end
    assert not (tmp_path / "out.safetensors").exists()
