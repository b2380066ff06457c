"""The public surface: what there is, that it is found, and that it says what it takes."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest

import moeprune

NAMES = [
    "ArtifactError",
    "Budget",
    "CalibrationSet",
    "Checkpoint",
    "CheckpointError",
    "ConfigError",
    "EvalReport",
    "EvaluationError",
    "ExpertWeights",
    "FusePlan",
    "GlobalCriterion",
    "LayerStatistics",
    "LayoutError",
    "MoESpec",
    "MoePruneError",
    "PlanError",
    "PruningPlan",
    "PublishError",
    "ReportSources",
    "RouterStatistics",
    "Slots",
    "StaleArtifactError",
    "Statistic",
    "Strategy",
    "StrategyError",
    "TextReport",
    "UnsupportedModelError",
    "__version__",
    "apply",
    "collect",
    "compare",
    "counted",
    "evaluate",
    "evaluate_probes",
    "evaluate_text",
    "forecast",
    "fuse",
    "heal",
    "load",
    "load_calibration",
    "multiplex",
    "observe",
    "open_checkpoint",
    "plan",
    "plan_fusion",
    "prune",
    "prune_model",
    "push",
    "render_report",
    "save_model",
    "skip",
    "sparsify",
    "statistics_callback",
    "sweep",
    "verify",
]
FUNCTIONS = [name for name in NAMES if name[0].islower()]
CLASSES = [name for name in NAMES if name[0].isupper()]
# Opening things is shown in the examples of what they are opened for.
STAGES = [name for name in FUNCTIONS if name not in {"load_calibration", "open_checkpoint"}]


@pytest.fixture(scope="module", autouse=True)
def every_submodule() -> list[str]:
    """Import every module, so that one with the name of a public function would take its place."""
    found = [item.name for item in pkgutil.walk_packages(moeprune.__path__, "moeprune.")]
    for name in found:
        importlib.import_module(name)
    return found


def test_the_public_names_are_these() -> None:
    """A name comes or goes on purpose."""
    assert sorted(moeprune.__all__) == NAMES
    assert dir(moeprune) == sorted(moeprune.__all__)


def test_no_module_has_the_name_of_a_public_function(every_submodule: list[str]) -> None:
    """`moeprune.plan` is the function, whatever was imported before."""
    assert not {name.removeprefix("moeprune.") for name in every_submodule} & set(FUNCTIONS)
    for name in FUNCTIONS:
        assert not isinstance(getattr(moeprune, name), ModuleType)
        assert callable(getattr(moeprune, name))


def test_a_name_that_is_not_there_is_an_attribute_error() -> None:
    """A misspelt name fails as in any module."""
    with pytest.raises(AttributeError, match="has no attribute 'prunee'"):
        _ = moeprune.prunee


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_document_what_they_take_and_raise(name: str) -> None:
    """Every parameter is explained, and the errors are named."""
    function = getattr(moeprune, name)
    documented = _section(function, "Args")
    for parameter in inspect.signature(function).parameters:
        assert re.search(rf"\b{parameter}\b", documented), parameter
    assert "Error" in _section(function, "Raises")


@pytest.mark.parametrize("name", STAGES)
def test_stages_show_an_example(name: str) -> None:
    """Whoever reads the help can copy a call."""
    assert f"moeprune.{name}(" in _section(getattr(moeprune, name), "Example")


@pytest.mark.parametrize("name", CLASSES)
def test_classes_have_a_docstring_of_their_own(name: str) -> None:
    """No class shows its base's docstring, or the signature that dataclass puts there."""
    text = vars(getattr(moeprune, name))["__doc__"]
    assert text
    assert not text.startswith(f"{name}(")


def _section(function: Callable[..., Any], title: str) -> str:
    """The indented block under a title of a docstring."""
    found = re.search(rf"^{title}:\n((?:    .*\n?|\n)+)", inspect.getdoc(function) or "", flags=re.MULTILINE)
    assert found, f"{function.__name__} has no {title}"
    return found[1]
