"""A warm process without torch that forks a writer for every job it reads, so that killing one costs milliseconds.

Each line on stdin is a job in JSON: ``base``, ``plan``, ``out`` and ``overwrite`` for the rewrite, ``log`` for a file
that gets a line for every write of shard bytes, and ``at`` and ``signal``: at that step the writer sends itself the
signal, in the middle of a write where the step is one. A step is named by what it does and the file's name, as in
``rename config.json``, or counted. With ``after`` the writer is killed after that many seconds, wherever it is. The
answers are the writer's process id, then its status and steps.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import IO, Any

from moeprune import pipeline
from moeprune.rewrite import copying, journal, shards

copying._BUFFER = 4096  # several writes per shard
copying.THREADS = 2
SHARD_SIZE = 62_000
answers = sys.stdout


class Steps:
    """Counts what a writer does to the disk, and stops it at one of these steps."""

    def __init__(self, job: dict[str, Any]) -> None:
        self.at = job["at"]
        self.signal = job["signal"]
        self.count = 0
        self.log = Path(job["log"]).open("a", buffering=1)  # noqa: SIM115 - until the process ends

    def reached(self, kind: str, path: object) -> bool:
        """Whether this is the step to stop at."""
        self.count += 1
        return self.at in (self.count, f"{kind} {Path(str(path)).name}")

    def stop(self) -> None:
        """Send the signal; SIGKILL is not survived, after SIGSTOP the writer goes on."""
        os.kill(os.getpid(), self.signal)


def watch(steps: Steps) -> None:
    """Put a step before everything that changes the disk."""
    write_all, fsync, rename, append = shards._write_all, os.fsync, os.rename, journal.Journal._append
    copyfile, write_bytes = shutil.copyfile, Path.write_bytes

    def counted_write(out: IO[bytes], chunk: memoryview) -> None:
        steps.log.write(f"{Path(out.name).name} {len(chunk)}\n")
        if steps.reached("write", out.name):
            write_all(out, chunk[: len(chunk) // 2])
            steps.stop()
            chunk = chunk[len(chunk) // 2 :]
        write_all(out, chunk)

    def counted_append(self: journal.Journal, line: dict[str, Any]) -> None:
        if steps.reached("journal", line.get("shard", "")):
            os.write(self._file.fileno(), json.dumps(line).encode()[:-9])
            steps.stop()
        append(self, line)

    def before(kind: str, call: Any) -> Any:
        def counted(*arguments: Any, **options: Any) -> Any:
            if steps.reached(kind, arguments[-1]):
                steps.stop()
            return call(*arguments, **options)

        return counted

    shards._write_all = counted_write
    journal.Journal._append = counted_append  # type: ignore[method-assign]
    os.fsync, os.rename = before("fsync", fsync), before("rename", rename)
    shutil.copyfile, Path.write_bytes = before("copy", copyfile), before("bytes", write_bytes)  # type: ignore[assignment]
    shutil.rmtree = before("rmtree", shutil.rmtree)


def write(job: dict[str, Any]) -> int:
    """The life of a writer; gives its number of steps."""
    steps = Steps(job)
    watch(steps)
    pipeline.apply(job["base"], job["plan"], job["out"], max_shard_size=SHARD_SIZE, overwrite=job["overwrite"])
    return steps.count


def main() -> None:
    """Fork a writer for every line."""
    for line in sys.stdin:
        job = json.loads(line)
        reader, writer = os.pipe()
        child = os.fork()
        if not child:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            try:
                os.write(writer, str(write(job)).encode())
            finally:
                os._exit(0)
        os.close(writer)
        print(child, file=answers, flush=True)
        if job["after"] is not None:
            time.sleep(job["after"])
            os.kill(child, signal.SIGKILL)  # ended or not, it is waited for below: the number is still its own
        _, status = os.waitpid(child, 0)
        with os.fdopen(reader) as pipe:
            print(json.dumps({"killed": os.WIFSIGNALED(status), "steps": pipe.read()}), file=answers, flush=True)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    main()
