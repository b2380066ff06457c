"""Prune the experts of trained Mixture-of-Experts checkpoints, and report honestly what it costs.

Every name below is loaded on first use, so that ``import moeprune`` and ``moeprune --help`` never load torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from moeprune import _late
from moeprune._version import __version__

_late.watch()

if TYPE_CHECKING:
    from moeprune.architectures import MoESpec as MoESpec
    from moeprune.calibration import CalibrationSet as CalibrationSet
    from moeprune.calibration import load_calibration as load_calibration
    from moeprune.catalogue import Statistic as Statistic
    from moeprune.checkpoint import Checkpoint as Checkpoint
    from moeprune.checkpoint import open_checkpoint as open_checkpoint
    from moeprune.collectors.callback import statistics_callback as statistics_callback
    from moeprune.collectors.measures import Slots as Slots
    from moeprune.collectors.probe import observe as observe
    from moeprune.collectors.weights import ExpertWeights as ExpertWeights
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
    from moeprune.evaluation.page import ReportSources as ReportSources
    from moeprune.evaluation.page import render_report as render_report
    from moeprune.evaluation.text import TextReport as TextReport
    from moeprune.fusing import fuse as fuse
    from moeprune.fusing import plan_fusion as plan_fusion
    from moeprune.gating import skip as skip
    from moeprune.mending import heal as heal
    from moeprune.multiplexing import multiplex as multiplex
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
    from moeprune.plans_fuse import FusePlan as FusePlan
    from moeprune.probing import evaluate_probes as evaluate_probes
    from moeprune.publish.push import push as push
    from moeprune.runtime.loading import load as load
    from moeprune.runtime.skipping import counted as counted
    from moeprune.runtime.surgery import prune_model as prune_model
    from moeprune.runtime.surgery import save_model as save_model
    from moeprune.scoring import evaluate_text as evaluate_text
    from moeprune.sparsifying import sparsify as sparsify
    from moeprune.statistics import LayerStatistics as LayerStatistics
    from moeprune.statistics import RouterStatistics as RouterStatistics
    from moeprune.strategies import GlobalCriterion as GlobalCriterion
    from moeprune.strategies import Strategy as Strategy
    from moeprune.sweeping import sweep as sweep

_HOMES = {
    "architectures": ("MoESpec",),
    "calibration": ("CalibrationSet", "load_calibration"),
    "catalogue": ("Statistic",),
    "checkpoint": ("Checkpoint", "open_checkpoint"),
    "collectors.callback": ("statistics_callback",),
    "collectors.measures": ("Slots",),
    "collectors.probe": ("observe",),
    "collectors.weights": ("ExpertWeights",),
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
    "evaluation.page": ("ReportSources", "render_report"),
    "evaluation.text": ("TextReport",),
    "gating": ("skip",),
    "fusing": ("fuse", "plan_fusion"),
    "mending": ("heal",),
    "multiplexing": ("multiplex",),
    "oneshot": ("prune",),
    "pipeline": ("apply", "collect", "compare", "evaluate", "forecast", "plan", "verify"),
    "plans": ("Budget", "PruningPlan"),
    "plans_fuse": ("FusePlan",),
    "publish.push": ("push",),
    "probing": ("evaluate_probes",),
    "runtime.loading": ("load",),
    "runtime.skipping": ("counted",),
    "runtime.surgery": ("prune_model", "save_model"),
    "scoring": ("evaluate_text",),
    "sparsifying": ("sparsify",),
    "statistics": ("LayerStatistics", "RouterStatistics"),
    "strategies": ("GlobalCriterion", "Strategy"),
    "sweeping": ("sweep",),
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
