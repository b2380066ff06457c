"""``moeprune report``: the page of a pruned checkpoint or of a report, made again from their files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moeprune import _cli_options as opt
from moeprune import _cli_output as out


def report(
    folders: Annotated[
        list[Path],
        typer.Argument(
            metavar="FOLDER...",
            help="Pruned checkpoints and folders of reports; each artifact comes from the first that has it.",
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", metavar="FILE", help="The page.  [default: report.html beside the report]"),
    ] = None,
    sweep: Annotated[Path | None, typer.Option("--sweep", metavar="FILE", help="What `moeprune sweep` wrote.")] = None,
    probes: Annotated[Path | None, typer.Option("--probes", metavar="FILE", help="A file of probes.")] = None,
    overwrite: opt.Overwrite = False,
    as_json: opt.AsJson = False,
    quiet: opt.Quiet = False,
    verbose: opt.Verbose = 0,
) -> None:
    """Draw one HTML page of what pruning cost and won, from files alone: no model is loaded."""
    from moeprune.evaluation.page import render_report

    written = render_report(folders, output, sweep=sweep, probes=probes, overwrite=overwrite)
    if as_json:
        out.print_json({"output": str(written), "bytes": written.stat().st_size})
    else:
        out.show(f"page: {written}")


def redraw(output: Path, pruned: str) -> None:
    """Draw the page of an evaluation anew, after the rows that its tasks add to the probes."""
    from moeprune.checkpoint import open_checkpoint
    from moeprune.evaluation.page import write_page

    write_page(output, open_checkpoint(pruned).path)
