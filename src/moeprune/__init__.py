"""Prune the experts of trained Mixture-of-Experts checkpoints, and report honestly what it costs.

Every name below is loaded on first use, so that ``import moeprune`` and ``moeprune --help`` never load torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from moeprune._version import __version__

if TYPE_CHECKING:
    from moeprune.calibration import CalibrationSet as CalibrationSet
    from moeprune.calibration import load_calibration as load_calibration
    from moeprune.checkpoint import Checkpoint as Checkpoint
    from moeprune.checkpoint import open_checkpoint as open_checkpoint
    from moeprune.collectors.callback import statistics_callback as statistics_callback
    from moeprune.collectors.probe import observe as observe
    from moeprune.errors import ArtifactError as ArtifactError
    from moeprune.errors import CheckpointError as CheckpointError
    from moeprune.errors import ConfigError as ConfigError
    from moeprune.errors import EvaluationError as EvaluationError
    from moeprune.errors import LayoutError as LayoutError
    from moeprune.errors import MoePruneError as MoePruneError
    from moeprune.errors import PlanError as PlanError
    from moeprune.errors import PublishError as PublishError
    from moeprune.errors import StaleArtifactError as StaleArtifactError
    from moeprune.errors import StrategyError as StrategyError
    from moeprune.errors import UnsupportedModelError as UnsupportedModelError
    from moeprune.evaluation.compare import EvalReport as EvalReport
    from moeprune.evaluation.text import TextReport as TextReport
    from moeprune.oneshot import prune as prune
    from moeprune.pipeline import apply as apply
    from moeprune.pipeline import collect as collect
    from moeprune.pipeline import compare as compare
    from moeprune.pipeline import evaluate as evaluate
    from moeprune.pipeline import forecast as forecast
    from moeprune.pipeline import plan as plan
    from moeprune.pipeline import verify as verify
    from moeprune.plans import Budget as Budget
    from moeprune.plans import PruningPlan as PruningPlan
    from moeprune.runtime.surgery import prune_model as prune_model
    from moeprune.runtime.surgery import save_model as save_model
    from moeprune.scoring import evaluate_text as evaluate_text
    from moeprune.statistics import RouterStatistics as RouterStatistics

_HOMES = {
    "calibration": ("CalibrationSet", "load_calibration"),
    "checkpoint": ("Checkpoint", "open_checkpoint"),
    "collectors.callback": ("statistics_callback",),
    "collectors.probe": ("observe",),
    "errors": (
        "ArtifactError",
        "CheckpointError",
        "ConfigError",
        "EvaluationError",
        "LayoutError",
        "MoePruneError",
        "PlanError",
        "PublishError",
        "StaleArtifactError",
        "StrategyError",
        "UnsupportedModelError",
    ),
    "evaluation.compare": ("EvalReport",),
    "evaluation.text": ("TextReport",),
    "oneshot": ("prune",),
    "pipeline": ("apply", "collect", "compare", "evaluate", "forecast", "plan", "verify"),
    "plans": ("Budget", "PruningPlan"),
    "runtime.surgery": ("prune_model", "save_model"),
    "scoring": ("evaluate_text",),
    "statistics": ("RouterStatistics",),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}

__all__ = ["__version__", *sorted(_HOME_OF)]  # noqa: PLE0604


def __getattr__(name: str) -> Any:
    """Import a public name's module when the name is first used."""
    if name not in _HOME_OF:
        raise AttributeError(f"module 'moeprune' has no attribute {name!r}")
    return getattr(import_module(f"moeprune.{_HOME_OF[name]}"), name)


def __dir__() -> list[str]:
    """The public names, for completion."""
    return __all__
