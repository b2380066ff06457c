"""Heal a checkpoint by any method: dispatch, and nothing else."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from moeprune._files import PathLike
from moeprune.distilling import METHODS as DISTILLED
from moeprune.distilling import distil_checkpoint
from moeprune.errors import ConfigError, nearest
from moeprune.healing.distillation import Recipe
from moeprune.healing.lora import Rank
from moeprune.plans_sparsify import SPARSIFY
from moeprune.repairing import CLOSED_FORM, LAYERWISE, HealResult, heal_layerwise
from moeprune.repairing import METHODS as BY_LAYER
from moeprune.runtime.loading import kind_of

Method = Callable[..., HealResult]

# Options of one way to heal that say nothing about the other, as the command line calls them.
_OF_LAYERS = {"minutes": "--minutes", "memory": "--memory", "device_memory": "--device-memory"}
_OF_GRADIENTS = {"train": "--train", "steps": "--steps", "minutes": "--minutes", "lr": "--lr"}
_OF_WHOLE_MODELS = {
    "schedule": "--schedule",
    "temperature": "--temperature",
    "precision": "--mixed-precision",
    "r": "--rank",
    "alpha": "--alpha",
}


def heal(
    base: PathLike,
    pruned: PathLike,
    output: PathLike,
    *,
    method: str = LAYERWISE,
    calibration: Sequence[str] | str,
    revision: str | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
    **options: Any,
) -> HealResult:
    """Train a pruned, fused or sparsified checkpoint until it does again what its original does.

    A part of the text is held out. Where no weights are closer to the original on it, the output is a copy of what was
    given. A killed run goes on where it stopped; weights that a sparsified model has as zeros stay zeros.

    Args:
        base: the original: folder or Hub id.
        pruned: what was made from it.
        output: new folder, which appears whole or not at all.
        method: ``layerwise`` fits each layer to the original's and has one of them in memory; ``closed-form``
            does so without gradients, by ridge regression on the experts' down projections; ``experts``, for
            sparsified models, fits each expert to the one that it was as well (arXiv:2410.12013); ``logits`` trains
            the whole model on the original's predictions; ``lora`` trains adapters on the attention and merges them.
        calibration: ``[DOMAIN=]SOURCE`` each.
        revision: of a base on the Hub.
        overwrite: replace a folder that is not empty.
        dry_run: check everything, and run nothing.
        options: ``steps``, ``lr``, ``step_tokens`` and ``train``; ``minutes`` for methods by layer; the other fields of
            :class:`moeprune.healing.distillation.Recipe` for ``logits`` and ``lora``, and ``rank`` and ``alpha`` for
            ``lora``; those of :class:`moeprune._options.CalibrationOptions` that say how data is read and models run.

    Raises:
        ConfigError: an option cannot work, the text is too short, or it does not fit in memory.
        UnsupportedModelError: the weights to train are quantised.
        CheckpointError: a model's files are missing or damaged.

    Example:
        >>> result = moeprune.heal("base", "pruned", "healed", calibration="data.jsonl")
        >>> result.before, result.after
    """
    if method not in METHODS:
        raise ConfigError(f"there is no method {method!r}", nearest(method, METHODS) or ", ".join(METHODS))
    _check_options(method, options)
    return METHODS[method](
        base,
        pruned,
        output,
        calibration=calibration,
        revision=revision,
        overwrite=overwrite,
        dry_run=dry_run,
        **options,
    )


def _check_options(method: str, options: Mapping[str, Any]) -> None:
    others = _OF_WHOLE_MODELS if method in BY_LAYER else _OF_LAYERS
    if method == CLOSED_FORM:
        others = others | _OF_GRADIENTS
    if method == "lora":
        others = others | {"train": "--train"}
    for name, option in others.items():
        if options.get(name) is not None:
            raise ConfigError(f"{option} does not go with --method {method}", "leave it out")


def _distilled(method: str) -> Method:
    """A method that trains the whole model."""

    def run(base: PathLike, pruned: PathLike, output: PathLike, **options: Any) -> HealResult:
        recipe, rest = _split(options, Recipe, shared={"seed", "batch_tokens"})
        if isinstance(train := rest.get("train"), str):
            rest["train"] = train.split(",")
        adapters, rest = _split(rest, Rank, shared=set())
        if adapters and method != "lora":
            raise ConfigError("--rank and --alpha are of adapters", "take --method lora")
        made = distil_checkpoint(
            base,
            pruned,
            output,
            method=method,
            recipe=Recipe(**{**DISTILLED[method], **recipe}),
            rank=Rank(**adapters) if adapters else None,
            keep_zeros=kind_of(pruned) == SPARSIFY,
            **rest,
        )
        found = made.distilled
        if found is None:
            return HealResult(output=made.output, method=method, forecast=made.forecast)
        return HealResult(
            output=made.output,
            method=method,
            before=found.before,
            after=found.after,
            healed=made.healed,
            record=found.record(),
        )

    return run


def _split(options: Mapping[str, Any], kind: type[Any], shared: set[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Options that are fields of a class, and the rest, in which the shared ones stay too."""
    known = {item.name for item in dataclasses.fields(kind)}
    own = {name: value for name, value in options.items() if name in known}
    return own, {name: value for name, value in options.items() if name not in known or name in shared}


METHODS: Mapping[str, Method] = {
    **{name: functools.partial(heal_layerwise, method=name) for name in BY_LAYER},
    "logits": _distilled("logits"),
    "lora": _distilled("lora"),
}
