"""The files that hold the project together name only what is there."""

from __future__ import annotations

import re
import runpy
import shlex
import sys
import tomllib
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[2]
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")


def test_the_commit_hooks_are_commands_that_exist() -> None:
    """Every hook runs a program of the environment, on paths of the tree, and downloads nothing."""
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    assert [repository["repo"] for repository in config["repos"]] == ["local"]
    [repository] = config["repos"]
    for hook in repository["hooks"]:
        program, *arguments = shlex.split(hook["entry"])
        assert program.startswith(".venv/bin/")
        assert Path(sys.executable).with_name(Path(program).name).exists(), program
        for path in (argument for argument in arguments if "/" in argument):
            assert (ROOT / path).exists(), path
        assert hook["language"] == "system"
        assert re.compile(hook.get("files", ""))
    assert [hook["id"] for hook in repository["hooks"]] == ["ruff-check", "ruff-format", "mypy", "unit-tests"]


def test_every_make_target_is_declared() -> None:
    """A file with a target's name would stop one that is not phony, and the documents name only targets that exist."""
    [phony] = re.findall(r"^\.PHONY: (.*)$", MAKEFILE, flags=re.MULTILINE)
    targets = set(re.findall(r"^([a-z][a-z-]*):", MAKEFILE, flags=re.MULTILINE))
    assert targets == set(phony.split())
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")):
        named = re.findall(r"(?:`|^ {4})make ([a-z-]+)", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
        assert set(named) <= targets, page.name


def test_the_page_of_options_is_that_of_the_command_line() -> None:
    """What `make docs` would write is what lies there."""
    script = runpy.run_path(str(ROOT / "tools" / "cli_docs.py"))
    assert script["PAGE"].read_text(encoding="utf-8") == script["render"](), "run `make docs`"


def test_links_between_documents_lead_somewhere() -> None:
    """Every relative link is to a file of the tree, and to a heading of it where it names one."""
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")):
        for target in re.findall(r"\]\((?!https?:)([^)\s]+)\)", page.read_text(encoding="utf-8")):
            name, _, heading = target.partition("#")
            file = (page.parent / name).resolve() if name else page
            assert file.exists(), f"{page.name}: {target}"
            assert not heading or heading in headings(file), f"{page.name}: {target}"


def headings(page: Path) -> set[str]:
    """Anchors of a page's headings, as forges make them."""
    found = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in found}


def test_the_licences_of_the_project_travel_with_it() -> None:
    """Whatever is released holds the licence, and the notice that it asks to keep."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["license-files"] == ["LICENSE", "NOTICE"]
    assert all((ROOT / name).is_file() for name in project["license-files"])
