"""Write ``docs/cli.md``: every command and option, from the command line itself.

python tools/cli_docs.py
"""

from __future__ import annotations

from pathlib import Path

PAGE = Path(__file__).parents[1] / "docs" / "cli.md"


def render() -> str:
    """The page."""
    from typer import Context
    from typer.cli import get_docs_for_click
    from typer.main import get_command

    from moeprune.cli import app

    command = get_command(app)
    context = Context(command, info_name="moeprune")
    text = get_docs_for_click(obj=command, ctx=context, name="moeprune", title="Every command and option")
    return text.rstrip() + "\n"


if __name__ == "__main__":
    PAGE.write_text(render(), encoding="utf-8")
