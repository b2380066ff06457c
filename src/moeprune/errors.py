"""Every error that moeprune raises on purpose.

    MoePruneError
    ├── ConfigError             an option or a combination of options that cannot work
    ├── UnsupportedModelError   a model that moeprune does not know
    │   └── LayoutError         a known model whose tensors are not where they should be
    ├── CheckpointError         a checkpoint folder that is incomplete or damaged
    ├── ArtifactError           a statistics, plan or report file that cannot be read
    │   └── StaleArtifactError  an artifact that was made for another model
    ├── PlanError               a plan that no engine could run
    ├── StrategyError           a strategy that is unknown or lacks what it needs
    ├── EvaluationError         an evaluation that cannot be run or compared
    └── PublishError            a push to the Hub that cannot be made

Each carries one line that says what is wrong and, where there is one, a hint that says what to do.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence


class MoePruneError(Exception):
    """Base of all deliberate errors: ``message`` says what is wrong, ``hint`` what to do about it."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message} ({self.hint})" if self.hint else self.message


class ConfigError(MoePruneError):
    """An option, or a combination of options, that cannot work."""


class UnsupportedModelError(MoePruneError):
    """A model that moeprune does not know, or that has no routed experts."""


class LayoutError(UnsupportedModelError):
    """A known model whose tensors are not where its architecture says they are."""


class CheckpointError(MoePruneError):
    """A checkpoint folder that is incomplete, damaged or unreachable."""


class ArtifactError(MoePruneError):
    """A statistics, plan or report file that cannot be read or written."""


class StaleArtifactError(ArtifactError):
    """An artifact that was made for another model."""


class PlanError(MoePruneError):
    """A plan that would give a checkpoint no engine could run."""


class StrategyError(MoePruneError):
    """A strategy that is unknown, or that lacks the statistics it needs."""


class EvaluationError(MoePruneError):
    """An evaluation that cannot be run, or two runs that cannot be compared."""


class PublishError(MoePruneError):
    """A push to the Hub that cannot be made."""


def first_line(error: BaseException) -> str:
    """The first line of another library's error, or its kind when it says nothing."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def nearest(name: str, known: Iterable[str]) -> str:
    """Hint that names the nearest known names, or all of them when none is near."""
    choices = sorted(known)
    near = difflib.get_close_matches(name, choices, n=3, cutoff=0.6)
    if near:
        return "did you mean " + " or ".join(repr(choice) for choice in near) + "?"
    shown = ", ".join(choices[:20])
    return f"known: {shown}" + (", ..." if len(choices) > 20 else "")


def ranges(numbers: Sequence[int]) -> str:
    """Ascending numbers as people write them: ``0-2, 5`` for 0, 1, 2, 5."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs) or "none"
