"""``moeprune inspect``: what a checkpoint or a file of moeprune is."""

from __future__ import annotations

from typing import Annotated

import typer

from moeprune import _cli_options as opt
from moeprune import _cli_output as out


def inspect(
    path: Annotated[
        str,
        typer.Argument(metavar="PATH", help="Checkpoint folder, Hub id, or a file: statistics, plan, report, ..."),
    ],
    revision: opt.Revision = None,
    as_json: opt.AsJson = False,
    quiet: opt.Quiet = False,
    verbose: opt.Verbose = 0,
) -> None:
    """Say what a checkpoint or a file is: its model, how it was made, key figures."""
    from moeprune.evaluation.report import aligned
    from moeprune.inspecting import describe

    found = describe(path, revision=revision)
    if as_json:
        out.print_json(found.facts)
        return
    width = max(map(len, found.lines), default=0)
    lines = [f"{label:<{width}}  {value}" for label, value in found.lines.items()]
    out.show("\n".join([*lines, *([""] if found.rows else []), *(aligned(found.rows) if found.rows else ())]))
