"""A warm process with torch that forks a collection for every job it reads, so that killing one costs little.

Each line on stdin is a job in JSON: ``options`` of :func:`moeprune.collect`, ``log`` for a file that gets a line for
every read of weights (file, position), ``pace`` for how seldom states are saved, and ``at``: at that step the
collection kills itself, in the middle of a write where the step is one. The answer tells how it ended.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import moeprune
from moeprune import _files
from moeprune.collectors import stream
from moeprune.streaming import states, weights

answers = sys.stdout


class Steps:
    """Counts what a collection does to the disk, and ends it at one of these steps."""

    def __init__(self, at: int | None) -> None:
        self.at = at
        self.count = 0

    def reached(self) -> bool:
        """Whether this is the step to stop at."""
        self.count += 1
        return self.count == self.at

    def before(self, call: Any) -> Any:
        """A step before each call."""

        def counted(*arguments: Any, **options: Any) -> Any:
            if self.reached():
                stop()
            return call(*arguments, **options)

        return counted


def stop() -> None:
    """Die as if by another's hand."""
    os.kill(os.getpid(), signal.SIGKILL)


def watch(steps: Steps, log: Any) -> None:
    """Put a step before everything that reads weights or changes the disk."""
    read, write = weights._Files.read, states._write

    def logged_read(self: Any, file: Path, position: int, into: memoryview) -> None:
        log.write(f"{file.name} {position}\n")
        read(self, file, position, into)

    def counted_write(handle: Any, tensor: Any, digest: Any) -> None:
        if steps.reached():
            handle.write(states._bytes_of(tensor)[: tensor.nbytes // 2])
            stop()
        write(handle, tensor, digest)

    weights._Files.read = logged_read  # type: ignore[method-assign]
    states._write = counted_write
    stream._run_layer = steps.before(stream._run_layer)
    weights.Weights._fill = steps.before(weights.Weights._fill)  # type: ignore[method-assign]
    os.fsync, os.replace, os.unlink = (steps.before(call) for call in (os.fsync, os.replace, os.unlink))
    _files.tempfile.mkstemp = steps.before(_files.tempfile.mkstemp)
    shutil.rmtree = steps.before(shutil.rmtree)


def collect(job: dict[str, Any]) -> int:
    """The life of a collection; gives its number of steps."""
    steps = Steps(job["at"])
    with Path(job["log"]).open("w", buffering=1) as log:
        watch(steps, log)
        stream._PACE = job["pace"]
        moeprune.collect(**job["options"])
    return steps.count


def main() -> None:
    """Fork a collection for every line, after one that loads all that is needed."""
    job = json.loads(sys.stdin.readline())
    moeprune.collect(**job["options"])
    print(json.dumps({"killed": False, "steps": ""}), file=answers, flush=True)
    for line in sys.stdin:
        reader, writer = os.pipe()
        child = os.fork()
        if not child:
            try:
                os.write(writer, str(collect(json.loads(line))).encode())
            finally:
                os._exit(0)
        os.close(writer)
        _, status = os.waitpid(child, 0)
        with os.fdopen(reader) as pipe:
            print(json.dumps({"killed": os.WIFSIGNALED(status), "steps": pipe.read()}), file=answers, flush=True)


if __name__ == "__main__":
    main()
