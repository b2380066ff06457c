"""The page: one HTML file that shows what pruning cost, what it won, and where both come from.

It needs no script and asks the network for nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from moeprune._files import PathLike, begin_work, check_output_file, note, write_atomic
from moeprune.errors import ArtifactError, ConfigError
from moeprune.evaluation.page.sources import ReportSources, check_pruned, find, read
from moeprune.evaluation.page.view import view_of
from moeprune.rewrite.drop import PROVENANCE

__all__ = ["NAME", "ReportSources", "render_html", "render_report", "write_html", "write_page"]

NAME = "report.html"


def render_html(sources: ReportSources) -> str:
    """The page; equal sources give equal text.

    Raises:
        ArtifactError: an artifact holds values that cannot be shown.
    """
    import jinja2

    from moeprune.evaluation.page.svg import visible

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("moeprune.evaluation", "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        finalize=lambda value: visible(value) if type(value) is str else value,
    )
    return environment.get_template("report.html.j2").render(page=view_of(sources))


def write_html(sources: ReportSources, folder: PathLike) -> Path:
    """Write ``report.html`` into the folder."""
    return write_atomic(Path(folder) / NAME, render_html(sources))


def write_page(folder: Path, pruned: Path | None = None) -> Path:
    """Write the page beside a report that was just written.

    Args:
        folder: of the report.
        pruned: checkpoint whose plan and statistics join it where they were made for the report's base; what cannot
            be used there must not take the page from a report that took hours.
    """
    try:
        return write_html(read(find([folder, pruned] if pruned and pruned.is_dir() else [folder])), folder)
    except ArtifactError as error:
        if pruned is None:
            raise
        note(f"{error.message}: the page is drawn without what lies in {pruned}")
        return write_html(read(find([folder])), folder)


def render_report(
    folders: Sequence[PathLike] | PathLike,
    output: PathLike | None = None,
    *,
    sweep: PathLike | None = None,
    probes: PathLike | None = None,
    overwrite: bool = False,
) -> Path:
    """Draw the page of a pruned checkpoint, of a report, or of both, from their files alone. Runs without torch.

    Args:
        folders: pruned checkpoints and folders of reports; each artifact comes from the first that has it.
        output: the page; by default ``report.html`` beside the report, or else where ``prune`` would put it.
        sweep: file of ``moeprune sweep``, where it lies elsewhere.
        probes: file of probes, where it lies elsewhere.
        overwrite: replace the page.

    Returns:
        The page's file.

    Raises:
        ConfigError: a folder holds nothing to show, or the output exists.
        StaleArtifactError: the files were made for different models.
        ArtifactError: a file is damaged, or of another schema.

    Example:
        >>> moeprune.render_report(["pruned", "text"], "page.html")
    """
    named = [folders] if isinstance(folders, str) or not isinstance(folders, Sequence) else list(folders)
    if not named:
        raise ConfigError("a page needs something to show", "name a pruned checkpoint or the folder of a report")
    files = find(named, {"sweep": sweep, "probes": probes})
    target = Path(output) if output is not None else _default_output(Path(named[0]), files.get("report"))
    check_output_file(target, overwrite=overwrite)
    sources = read(files)
    check_pruned(sources, named)
    page = render_html(sources)
    begin_work()
    return write_atomic(target, page)


def _default_output(folder: Path, report: Path | None) -> Path:
    if report is not None:
        return report.parent / NAME
    records = folder / PROVENANCE
    return records / "report" / NAME if records.is_dir() else folder / NAME
