"""Offer our experts implementation to transformers as soon as somebody imports it, and not before.

``from_pretrained(..., experts_implementation="moeprune_skip")`` is to work after ``import moeprune``, which may not
load transformers. So the import of the module that looks implementations up is watched, and ours is added to it then.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

WATCHED = "transformers.modeling_utils"


class _Watcher(MetaPathFinder):
    """Finds nothing itself; of the watched module it has the usual loader do one thing more."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Called for every module that is imported anew."""
        if name != WATCHED:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            loader: Any = spec.loader
            execute = loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                _register()

            loader.exec_module = exec_module
        return spec


def watch() -> None:
    """Offer it now, if transformers is there already, else when it comes."""
    if WATCHED in sys.modules:
        _register()
    elif not any(isinstance(finder, _Watcher) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Watcher())


def _register() -> None:
    from moeprune.runtime.skipping import register

    register()
