"""A line between the processes of one run, which tells all of them at once when one has died.

A process that computes for minutes between two exchanges would learn only at the next one that it works for nothing,
and a launcher ends the others without a word. Every process holds a connection to the first one; whoever leaves says
goodbye. A connection that ends without that means a process that died, and what runs here then ends with an error.
"""

from __future__ import annotations

import contextlib
import hmac
import secrets
import select
import signal
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any

from moeprune._files import begin_work
from moeprune.errors import MoePruneError

_GOODBYE = b"."
_KEEP_ALIVE = {"TCP_KEEPIDLE": 60, "TCP_KEEPINTVL": 20, "TCP_KEEPCNT": 3}  # seconds, seconds, tries


def process_lost() -> MoePruneError:
    """What a process says that ends because another one did."""
    begin_work()  # whatever this process had done by then, the run has failed and was not refused
    return MoePruneError(
        "another process of this run failed, so this one stopped",
        "the first error is in the output of that process; a process that was killed may have run out of memory",
    )


class Lifeline:
    """Connections to other processes that must not end before they say so."""

    def __init__(self, peers: Sequence[socket.socket]) -> None:
        self.interrupts = False  # whether SIGTERM comes here
        self._peers = peers
        self._over = False
        self._lost = threading.Event()
        self._watcher = threading.Thread(target=self._watch, name="moeprune-lifeline", daemon=True)
        self._watcher.start()

    def _watch(self) -> None:
        waiting = set(self._peers)
        while waiting:
            for peer in select.select(list(waiting), [], [])[0]:
                if _received(peer) != _GOODBYE:
                    self._lose()
                    return
                waiting.remove(peer)

    def _lose(self) -> None:
        self._lost.set()
        if not self._over:
            self._hang_up()  # first: the other processes need not wait for what this one is in the middle of
            if self.interrupts:  # also a main thread that sleeps in a system call
                signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)

    def leave(self, *, last: bool) -> None:
        """Say goodbye and wait for that of the others; who is ``last`` answers when all have said it.

        Raises:
            MoePruneError: another process died before.
        """
        if not last:
            self._say_goodbye()
        self._watcher.join()
        if self._lost.is_set():
            raise process_lost()
        if last:
            self._say_goodbye()

    def _say_goodbye(self) -> None:
        with contextlib.suppress(OSError):  # to one that died, which the watcher sees too
            for peer in self._peers:
                peer.sendall(_GOODBYE)

    def cut(self) -> None:
        """End the connections without goodbye: the others shall stop."""
        self._over = True
        self._hang_up()
        self._watcher.join()
        for peer in self._peers:
            peer.close()

    def _hang_up(self) -> None:
        for peer in self._peers:
            with contextlib.suppress(OSError):  # it ended already
                peer.shutdown(socket.SHUT_RDWR)

    def told_to_end(self, *_: Any) -> None:
        """On SIGTERM, which comes from the watcher or from a launcher: end with an error instead of silently."""
        if self._over:
            return
        if self._lost.wait(timeout=1.0):  # a launcher that ends everybody may be quicker than the line
            raise process_lost()
        begin_work()
        raise MoePruneError("this process was told to end (SIGTERM)")


def _received(peer: socket.socket) -> bytes:
    try:
        return peer.recv(1)
    except OSError:
        return b""


@contextlib.contextmanager
def _ending_with_an_error(line: Lifeline) -> Iterator[None]:
    """Let SIGTERM raise inside the block, which only the main thread can."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def let_one_pass(*_: Any) -> None:
        signal.signal(signal.SIGTERM, before)

    before = signal.signal(signal.SIGTERM, line.told_to_end)
    line.interrupts = True
    try:
        yield
    except BaseException:
        # A launcher ends those that are left with one SIGTERM more: they shall say why first.
        signal.signal(signal.SIGTERM, let_one_pass)
        raise
    signal.signal(signal.SIGTERM, before)


# --- setting it up ----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def lifeline(
    rank: int, size: int, host: str, *, tell: Callable[[bytes], None], ask: Callable[[], bytes], timeout: timedelta
) -> Iterator[Lifeline]:
    """Connect the processes of a run for as long as the block runs.

    Args:
        rank: number of this process; ``size``: how many there are.
        host: where process 0 can be reached.
        tell: takes the invitation from process 0 to all others; ``ask`` gives it to them.
        timeout: for all to connect.

    Raises:
        OSError: the connections cannot be made.
        MoePruneError: a process died during the block, or before it said goodbye.
    """
    patience = timeout.total_seconds()
    peers = _invite(size - 1, tell, patience) if rank == 0 else [_accept(ask(), host, patience)]
    for peer in peers:
        _keep_alive(peer)
    line = Lifeline(peers)
    with _ending_with_an_error(line):
        try:
            yield line
            line.leave(last=rank == 0)
        finally:
            line.cut()


def _invite(count: int, tell: Callable[[bytes], None], patience: float) -> list[socket.socket]:
    """Process 0: say the port and a password, and wait until that many others came."""
    password = secrets.token_bytes(16)
    peers: list[socket.socket] = []
    with _server() as server:
        server.settimeout(patience)
        tell(server.getsockname()[1].to_bytes(2, "big") + password)
        while len(peers) < count:
            peer, _ = server.accept()
            peer.settimeout(10.0)
            if hmac.compare_digest(_exactly(peer, len(password)), password):
                peer.settimeout(None)
                peers.append(peer)
            else:  # somebody else who tries the ports of this machine
                peer.close()
    return peers


def _server() -> socket.socket:
    if socket.has_dualstack_ipv6():
        with contextlib.suppress(OSError):  # compiled in, and switched off on this machine
            return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", 0))


def _accept(invitation: bytes, host: str, patience: float) -> socket.socket:
    peer = socket.create_connection((host, int.from_bytes(invitation[:2], "big")), timeout=patience)
    peer.sendall(invitation[2:])
    peer.settimeout(None)
    return peer


def _exactly(peer: socket.socket, count: int) -> bytes:
    data = b""
    with contextlib.suppress(OSError):
        while len(data) < count and (more := peer.recv(count - len(data))):
            data += more
    return data


def _keep_alive(peer: socket.socket) -> None:
    """Notice also a machine that lost its power or its network."""
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _KEEP_ALIVE.items():
        if hasattr(socket, name):
            peer.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
