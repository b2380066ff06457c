"""Prose and code that ship with Python, divided into splits that share no passage."""

from __future__ import annotations

import ast
import inspect
import random
import re
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tiny_moe.drills import SPLITS, stable_hash

SKIPPED = frozenset(
    [
        "__pycache__",
        "config",
        "distutils",
        "encodings",
        "ensurepip",
        "idlelib",
        "lib-dynload",
        "lib2to3",
        "msilib",
        "pydoc_data",
        "site-packages",
        "dist-packages",
        "test",
        "tests",
        "idle_test",
        "tkinter",
        "turtledemo",
    ]
)
WINDOW = 64
LONG_LINE = 40


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """One module's code, one module's docstrings or one help topic, in paragraphs."""

    name: str
    domain: str
    paragraphs: tuple[str, ...]

    @property
    def split(self) -> str:
        """The one split that the document belongs to."""
        bucket = stable_hash(self.name) % 100
        edges = (("task", 18), ("heldout", 22), ("selection", 26), ("calibration", 33))
        return next((name for name, edge in edges if bucket < edge), "train")


def _is_plain(text: str) -> bool:
    return text.isascii() and "copyright" not in text.lower() and "license" not in text.lower()


def _paragraphs(text: str) -> tuple[str, ...]:
    """Cut a text at its blank lines; drop what is short or not plain."""
    parts = (part.strip("\n") for part in re.split(r"\n\s*\n", text.expandtabs(4)))
    return tuple(part for part in parts if len(part) >= 40 and _is_plain(part))


def _docstring_nodes(tree: ast.Module) -> Iterator[ast.Expr]:
    """Yield the statement of every docstring in a module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node, clean=False):
            first = node.body[0]
            if isinstance(first, ast.Expr):
                yield first


def _split_source(source: str) -> tuple[str, str]:
    """Separate a module into its code without docstrings and its docstrings."""
    lines = source.split("\n")
    prose: list[tuple[int, str]] = []
    for statement in _docstring_nodes(ast.parse(source)):
        value = statement.value
        if isinstance(value, ast.Constant) and isinstance(value.value, str):
            prose.append((statement.lineno, inspect.cleandoc(value.value)))
        for number in range(statement.lineno - 1, statement.end_lineno or statement.lineno):
            lines[number] = "\0"
    code = "\n".join(line for line in lines if line != "\0" and not line.lstrip().startswith("#"))
    return code, "\n\n".join(text for _, text in sorted(prose) if len(text) > 60)


def _modules() -> Iterator[tuple[str, str]]:
    """Yield name and source of the ordinary standard library modules that carry no notice of their own."""
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if any(part in SKIPPED or part.startswith("config-") for part in relative.parts):
            continue
        source = path.read_text(encoding="utf-8", errors="replace")
        if "copyright" not in source.lower() and "license" not in source.lower():
            yield relative.as_posix(), source


def _documents() -> Iterator[Document]:
    """Yield all documents: code, docstrings and help topics."""
    from pydoc_data.topics import topics

    for name, source in _modules():
        code, prose = _split_source(source)
        yield Document(name=f"code/{name}", domain="code", paragraphs=_paragraphs(code))
        yield Document(name=f"prose/{name}", domain="prose", paragraphs=_paragraphs(prose))
    for name, text in sorted(topics.items()):
        yield Document(name=f"topic/{name}", domain="prose", paragraphs=_paragraphs(inspect.cleandoc(text)))


def _windows(paragraph: str) -> Iterator[str]:
    """Yield every 64-character window of a paragraph with its white space made equal."""
    flat = " ".join(paragraph.split())
    for start in range(max(1, len(flat) - WINDOW + 1)):
        yield flat[start : start + WINDOW]


def _long_lines(paragraph: str) -> Iterator[str]:
    return (line.strip() for line in paragraph.split("\n") if len(line.strip()) >= LONG_LINE)


def load_corpus() -> dict[str, list[Document]]:
    """Read all documents by split; a paragraph that repeats a passage of an earlier split or document is dropped.

    The order of the splits matters: the tasks choose first and the training text takes what is left.
    """
    by_split: dict[str, list[Document]] = {split: [] for split in SPLITS}
    for document in _documents():
        by_split[document.split].append(document)
    seen: set[str] = set()
    corpus: dict[str, list[Document]] = {}
    for split in SPLITS:
        corpus[split] = []
        for document in by_split[split]:
            kept = []
            for paragraph in document.paragraphs:
                marks = {*_windows(paragraph), *_long_lines(paragraph)}
                if seen.isdisjoint(marks):
                    kept.append(paragraph)
                    seen |= marks
            if kept:
                corpus[split].append(Document(name=document.name, domain=document.domain, paragraphs=tuple(kept)))
    return corpus


def assert_disjoint(splits: dict[str, list[str]]) -> None:
    """Raise if two splits share a 64-character window or a long line within a paragraph."""
    owner: dict[str, str] = {}
    for split, texts in splits.items():
        for text in texts:
            for paragraph in re.split(r"\n\s*\n", text):
                marks = {mark for mark in _windows(paragraph) if len(mark) == WINDOW} | set(_long_lines(paragraph))
                for mark in marks:
                    if owner.setdefault(mark, split) != split:
                        raise ValueError(f"{owner[mark]} and {split} share {mark!r}")


def shuffled(documents: list[Document], domain: str, seed: int) -> list[Document]:
    """Return the documents of one domain in a random order."""
    chosen = [document for document in documents if document.domain == domain]
    random.Random(seed).shuffle(chosen)
    return chosen
