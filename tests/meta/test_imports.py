"""The command line starts fast, and what copies bytes never loads torch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import moeprune

# Runs command lines in one process; the last line says what came of them and which heavy libraries were loaded.
PROBE = """
import json, sys
import moeprune
from moeprune.cli import run
codes = [run(arguments) for arguments in json.loads(sys.argv[1])]
heavy = {"torch", "transformers", "datasets", "lm_eval", "accelerate", "scipy"} & set(sys.modules)
print(json.dumps({"codes": codes, "heavy": sorted(heavy)}))
"""


def probe(*commands: list[str]) -> Any:
    """What a fresh interpreter says after these command lines."""
    command = [sys.executable, "-c", PROBE, json.dumps(commands)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_stages_that_copy_bytes_never_load_torch(checkpoint_of: Callable[[str], Path], tmp_path: Path) -> None:
    """Help, plan, apply, verify, inspect and report run without torch, transformers, datasets, lm-eval or scipy."""
    base = str(checkpoint_of("glm4_moe"))
    statistics, plan, out = (str(tmp_path / name) for name in ("statistics.safetensors", "plan.json", "out"))
    moeprune.collect(base, statistics)
    found = probe(
        ["--help"],
        ["plan", statistics, base, "--ratio", "0.5", "--strategy", "random", "-o", plan],
        ["apply", base, plan, "-o", out],
        ["verify", base, out],
        ["inspect", out],
        ["card", out],
        ["push", out, "org/name", "--dry-run"],
        ["report", out],
        ["strategies"],
        ["architectures"],
    )
    assert found == {"codes": [0] * 10, "heavy": []}


def test_help_takes_little_time() -> None:
    """`moeprune --help` costs under 0.4 s of processor time, the best of three, from a fresh interpreter."""
    spent = []
    for _ in range(3):
        before = os.times()
        done = subprocess.run([sys.executable, "-m", "moeprune", "--help"], capture_output=True, text=True, check=True)
        after = os.times()
        spent.append(sum(after[2:4]) - sum(before[2:4]))  # of children, user and system: other work does not count
        assert "Commands:" in done.stdout
    assert min(spent) < 0.4
