"""The place of a process among many, and the line that tells them when one has died; without torch."""

from __future__ import annotations

import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from datetime import timedelta
from pathlib import Path
from queue import Queue

import pytest

import moeprune
from moeprune import cli
from moeprune.collectors.distributed import (
    ALONE,
    Ranks,
    any_of,
    barrier,
    check_same,
    device_of,
    from_environment,
    process_group,
    reduce_layers,
    shard,
)
from moeprune.collectors.lifeline import Lifeline, lifeline
from moeprune.errors import ConfigError, MoePruneError

LOST = "another process of this run failed"


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    """Start from an environment without a launcher."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)


# --- the place of a process -------------------------------------------------------------------------------------------


def test_a_process_without_a_launcher_is_alone() -> None:
    """Nothing is exchanged, and what many would add up is given back as it is."""
    layers = {3: object()}
    with process_group() as ranks:
        assert ranks == ALONE == Ranks(rank=0, size=1, local_rank=0)
        barrier(ranks)
        check_same(ranks, model="a")
        assert any_of(True, ranks)
        assert not any_of(False, ranks)
        assert reduce_layers(layers, ranks) is layers  # type: ignore[arg-type,comparison-overlap]
        assert device_of(ranks, None) is None


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"WORLD_SIZE": "4", "RANK": "3", "LOCAL_RANK": "1"}, Ranks(rank=3, size=4, local_rank=1)),
        ({"WORLD_SIZE": "4", "RANK": "0"}, Ranks(rank=0, size=4, local_rank=0)),
        ({"WORLD_SIZE": "2", "RANK": "1"}, Ranks(rank=1, size=2, local_rank=1)),
        ({"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0"}, ALONE),
        ({"WORLD_SIZE": "", "RANK": "7"}, ALONE),
    ],
)
def test_the_place_that_a_launcher_gives(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], expected: Ranks
) -> None:
    """By the variables of torch's launchers; without a local number, that among all."""
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert from_environment() == expected


@pytest.mark.parametrize(
    ("environment", "why"),
    [
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE is 2 and RANK is missing"),
        ({"WORLD_SIZE": "2", "RANK": "2"}, "WORLD_SIZE is 2 and RANK is 2"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE in the environment is 'two'"),
        ({"WORLD_SIZE": "2", "RANK": "-1"}, "RANK in the environment is '-1'"),
        ({"WORLD_SIZE": "2", "RANK": "0"}, "WORLD_SIZE is 2 and MASTER_ADDR is not set"),
        ({"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "x"}, "WORLD_SIZE is 2 and MASTER_PORT is not set"),
    ],
)
def test_an_environment_that_cannot_be(monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], why: str) -> None:
    """Refused at once, instead of waiting for nobody."""
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=why), process_group():
        pass


def test_batches_are_dealt_in_turn() -> None:
    """Every batch is in one share, and there may be fewer batches than processes."""
    shares = [shard([1, 2, 3, 4, 5], Ranks(rank=rank, size=3)) for rank in range(3)]
    assert shares == [[1, 4], [2, 5], [3]]
    assert [shard([1], Ranks(rank=rank, size=2)) for rank in range(2)] == [[1], []]


def test_all_devices_for_each_of_several_processes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Unless a machine runs one process only; a device that is named is taken."""
    ranks = Ranks(rank=1, size=2, local_rank=1)
    assert device_of(ranks, "cuda:7") == "cuda:7"
    with pytest.raises(ConfigError, match="--device auto spreads one model over all devices"):
        device_of(ranks, "auto")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    assert device_of(ranks, "auto") == "auto"


@pytest.mark.parametrize(
    "command",
    [
        "prune --ratio 0.5 -o out",
        "plan s.safetensors base --ratio 0.5 -o plan.json",
        "apply base plan.json -o out",
        "stats merge a b -o c",
        "eval base out --tasks x -o report",
        "collect base --calibration x.jsonl --dry-run -o s.safetensors",
    ],
)
def test_other_commands_run_in_one_process(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    """Each process would do all of the work and write over the others."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    assert cli.run(command.split()) == 2
    error = capsys.readouterr().err
    assert "runs in one process, and WORLD_SIZE is 2" in error
    assert "hint: run `moeprune collect` in many processes" in error


def test_prune_from_python_runs_in_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planning does not, for a training script may plan in its first process."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(ConfigError, match="prune runs in one process"):
        moeprune.prune("base", ratio=0.5)
    with pytest.raises(MoePruneError, match="cannot read statistics"):
        moeprune.plan(Path("none.safetensors"), "base", ratio=0.5)


# --- the line ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def line() -> Iterator[Callable[[], tuple[Lifeline, socket.socket]]]:
    """A line, and the end of its connection that another process would hold."""
    with ExitStack() as undo:

        def make() -> tuple[Lifeline, socket.socket]:
            ours, theirs = socket.socketpair()
            undo.enter_context(closing(theirs))
            made = Lifeline([ours])
            undo.callback(made.cut)
            return made, theirs

        yield make


@pytest.mark.parametrize("last", [True, False])
def test_leaving_waits_for_goodbye(line: Callable[[], tuple[Lifeline, socket.socket]], last: bool) -> None:
    """Who is ready first waits for the other, and both say goodbye."""
    here, there = line()
    late = threading.Timer(0.2, lambda: there.sendall(b"."))
    begun = time.monotonic()
    late.start()
    here.leave(last=last)
    assert time.monotonic() - begun > 0.15
    assert there.recv(2) == b"."


@pytest.mark.parametrize("last_words", [b"", b"?"])
def test_an_end_without_goodbye_is_an_error(
    line: Callable[[], tuple[Lifeline, socket.socket]], last_words: bytes
) -> None:
    """Nothing, or anything else: the other end hears of it at once."""
    here, there = line()
    there.sendall(last_words)
    there.shutdown(socket.SHUT_WR)
    with pytest.raises(MoePruneError, match=LOST):
        here.leave(last=True)
    there.settimeout(5)
    assert there.recv(8) == b""  # hung up, without a goodbye


def in_processes(size: int, body: Callable[[int], None]) -> list[str]:
    """Connect threads that stand for processes, and give what each of them ended with."""
    invitations: Queue[bytes] = Queue()

    def process(rank: int) -> str:
        try:
            with lifeline(
                rank,
                size,
                "localhost",
                tell=lambda invitation: [invitations.put(invitation) for _ in range(1, size)] and None,
                ask=invitations.get,
                timeout=timedelta(seconds=10),
            ):
                body(rank)
        except MoePruneError as error:
            return error.message
        except KeyError:
            return "own error"
        return "done"

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(process, range(size)))


def test_processes_that_end_well() -> None:
    """However unlike their work, all of them come out without an error."""
    assert in_processes(4, lambda rank: time.sleep(0.05 * rank)) == ["done"] * 4


@pytest.mark.parametrize("failing", [0, 2])
def test_one_failure_reaches_all(failing: int) -> None:
    """Through the first process, whichever it was; who failed keeps its own error."""

    def body(rank: int) -> None:
        if rank == failing:
            raise KeyError

    ends = in_processes(4, body)
    assert ends.pop(failing) == "own error"
    assert all(end.startswith(LOST) for end in ends)


def test_strangers_are_turned_away() -> None:
    """Somebody who tries the ports of the machine takes nobody's place."""
    invitations: Queue[bytes] = Queue()

    def second() -> None:
        invitation = invitations.get()
        port = int.from_bytes(invitation[:2], "big")
        for words in (b"GET / HTTP/1.0\r\n\r\n", b""):
            with socket.create_connection(("localhost", port)) as stranger:
                stranger.sendall(words)
        with lifeline(1, 2, "localhost", tell=print, ask=lambda: invitation, timeout=timedelta(seconds=10)):
            pass

    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(second)
        with lifeline(0, 2, "localhost", tell=invitations.put, ask=bytes, timeout=timedelta(seconds=10)):
            pass
        other.result()


def test_a_main_thread_that_sleeps_is_woken() -> None:
    """In the main thread the error comes in the middle of whatever runs, and SIGTERM is as it was in the end."""
    invitations: Queue[bytes] = Queue()
    before = signal.getsignal(signal.SIGTERM)

    def second() -> None:
        with lifeline(1, 2, "localhost", tell=print, ask=invitations.get, timeout=timedelta(seconds=10)):
            time.sleep(0.2)
            raise KeyError

    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(second)
        begun = time.monotonic()
        with (
            pytest.raises(MoePruneError, match=LOST),
            lifeline(0, 2, "localhost", tell=invitations.put, ask=bytes, timeout=timedelta(seconds=10)),
        ):
            time.sleep(10)
        assert time.monotonic() - begun < 5
        assert isinstance(other.exception(), KeyError)
    assert signal.getsignal(signal.SIGTERM) is not before
    signal.raise_signal(signal.SIGTERM)  # that of the launcher, which lets the error be told
    assert signal.getsignal(signal.SIGTERM) is before


def test_sigterm_from_outside_is_an_error() -> None:
    """A launcher that stops everybody: the process says that it was told to end."""
    line = Lifeline([])
    with pytest.raises(MoePruneError, match="told to end"):
        line.told_to_end()
    line.cut()
    line.told_to_end()  # the run is over already: nothing to say
