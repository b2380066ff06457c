"""Imports go down only, and heavy libraries are imported where they are used."""

from __future__ import annotations

import ast
import graphlib
from collections.abc import Iterator
from pathlib import Path

import pytest

import moeprune

ROOT = Path(moeprune.__file__).parent
FILES = {
    ".".join(("moeprune", *file.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__"): file
    for file in sorted(ROOT.rglob("*.py"))
}
# From the bottom to the top; a name stands for a module, or for a package with all of its modules.
LAYERS = (
    {"errors", "_files", "_plugins", "_version", "_commands", "sketches"},
    {"catalogue", "statistics_file", "statistics", "architectures", "headers"}
    | {"plans", "plans_sparsify", "plans_multiplex", "plans_skip", "plans_fuse"},
    {"strategies", "checkpoint", "experts", "plan_kinds", "accounts"},
    {"streaming"},
    {"calibration", "collectors", "rewrite", "runtime", "evaluation", "engines", "stability", "budgets"},
    {"_late", "planner", "_options", "inspecting", "publish", "healing"},
    {"collecting", "choosing", "planner_fuse"},
    {"pipeline", "scoring", "reconstructing", "repairing"},
    {"oneshot", "fusing_in_order", "sparsifying", "multiplexing", "skip_scoring", "distilling"},
    {"sweeping", "probing", "gating", "fusing", "mending"},
    {"_cli_options", "_cli_output"},
    {"_cli_eval", "_cli_inspect", "_cli_listing", "_cli_publish", "_cli_report", "_cli_probes", "_cli_sweep"},
    {"_cli_sparsify", "_cli_multiplex", "_cli_skip", "_cli_fuse", "_cli_heal"},
    {"_cli_run"},
    {"cli"},
    {"__main__"},
)
# Sideways, inside one layer: each of these is one-way.
SIDEWAYS = {
    ("_files", "errors"),
    ("_plugins", "errors"),
    ("_files", "_version"),
    ("statistics", "catalogue"),
    ("statistics", "statistics_file"),
    ("statistics_file", "catalogue"),
    ("statistics_file", "headers"),
    ("accounts", "plan_kinds"),
    ("checkpoint", "plan_kinds"),
    ("collectors", "calibration"),
    ("evaluation", "rewrite"),
    ("evaluation", "runtime"),
    ("pipeline", "scoring"),
    ("plans_fuse", "plans"),
    ("plans_skip", "plans"),
    ("plans_multiplex", "plans"),
    ("plans_sparsify", "plans"),
    ("rewrite", "collectors"),
    ("runtime", "collectors"),
    ("runtime", "rewrite"),
}
HEAVY = {
    *("torch", "transformers", "datasets", "lm_eval", "accelerate", "peft", "huggingface_hub", "pyarrow"),
    *("scipy", "safetensors", "jinja2", "yaml", "tqdm"),
}
MODULES = [name for name in FILES if name != "moeprune"]  # the package itself only names what others hold


def imports_of(tree: ast.AST) -> Iterator[str]:
    """Modules that a piece of code imports, wherever the statement stands."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert not node.level, "relative imports hide the layer"
            yield from (_target(node.module, alias.name) for alias in node.names)


def _target(module: str, name: str) -> str:
    if (module, name) == ("moeprune", "__version__"):
        return "moeprune._version"
    return f"{module}.{name}" if f"{module}.{name}" in FILES else module


def own_imports(module: str) -> set[str]:
    """Modules of this package that a module imports; those for types only count too."""
    tree = ast.parse(FILES[module].read_text(encoding="utf-8"))
    return {name for name in imports_of(tree) if name.split(".")[0] == "moeprune"}


def part(module: str) -> str:
    """The module or package of the table that a module belongs to."""
    return module.split(".")[1]


def rank(module: str) -> int:
    """Number of the layer."""
    return next(number for number, names in enumerate(LAYERS) if part(module) in names)


@pytest.mark.parametrize("module", MODULES)
def test_every_import_goes_down(module: str) -> None:
    """A module imports from lower layers, from its own package, or along one of the listed ways."""
    wrong = [
        name
        for name in own_imports(module)
        if rank(name) >= rank(module) and part(name) != part(module) and (part(module), part(name)) not in SIDEWAYS
    ]
    assert not wrong


def test_no_module_imports_in_a_circle() -> None:
    """The modules can be put in an order in which each imports only earlier ones."""
    graphlib.TopologicalSorter({module: own_imports(module) for module in MODULES}).prepare()


def test_the_table_has_no_dead_entry() -> None:
    """Every name and every sideways import of the table exists."""
    assert set().union(*LAYERS) == {part(module) for module in MODULES}
    used = {(part(module), part(name)) for module in MODULES for name in own_imports(module)}
    assert used >= SIDEWAYS


@pytest.mark.parametrize("module", FILES)
def test_heavy_libraries_are_imported_where_they_are_used(module: str) -> None:
    """Importing a module never loads torch, transformers and their like."""
    top = [
        node
        for node in ast.parse(FILES[module].read_text(encoding="utf-8")).body
        if not isinstance(node, ast.FunctionDef | ast.ClassDef | ast.If)
    ]
    assert not {name.split(".")[0] for node in top for name in imports_of(node)} & HEAVY
