"""Run by the interpreter of an environment that a wheel was installed into: does what a first user does there.

cd EMPTY && ENVIRONMENT/bin/python -P installed.py
"""

from __future__ import annotations

import importlib
import json
import pkgutil
import subprocess
import sys
from pathlib import Path

import moeprune

HERE = Path(sys.prefix).resolve()


def command(*arguments: str) -> str:
    """What the command that was installed prints."""
    line = [str(HERE / "bin/moeprune"), *arguments]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def main() -> None:
    """Every module comes from this environment; the default model is pruned, verified and evaluated."""
    assert command("--version") == f"moeprune {moeprune.__version__}\n"
    assert json.loads(command("strategies", "--json"))["hope-total"]["default"]
    told = command("prune", "--ratio", "0.5", "--limit", "4", "--num-samples", "8", "--json")
    made = json.loads(told)
    assert made["verification"]["tensors"] > 0
    assert len(made["report"]["tasks"]) == 7
    assert Path(made["output"], "moeprune/report/report.md").is_file()
    assert command("verify", str(Path(moeprune.__path__[0], "data/model")), made["output"])
    for module in pkgutil.walk_packages(moeprune.__path__, "moeprune."):
        importlib.import_module(module.name)
    files = [Path(str(module.__file__)) for name, module in sys.modules.items() if name.split(".")[0] == "moeprune"]
    assert [file for file in files if not file.resolve().is_relative_to(HERE)] == []
    sys.stdout.write(f"{len(files)} modules of {moeprune.__file__}\n")


if __name__ == "__main__":
    main()
