"""What skip plans cost on held-out text, beside controls that skip as much, and how long the model takes with them."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moeprune._files import sha256_bytes, to_json, write_atomic
from moeprune._options import CalibrationOptions
from moeprune.calibration import CalibrationSet
from moeprune.checkpoint import Checkpoint
from moeprune.evaluation.agreement import batches, logits_of
from moeprune.evaluation.evaluator import Evaluator, ResidentEvaluator, changes_of
from moeprune.evaluation.skip_report import Measured, SkipReport, report_of, write_skip_report
from moeprune.evaluation.skipped import Control, Gated, Tally, at_random, true_norm
from moeprune.evaluation.token_classes import TokenClasses
from moeprune.experts import expert_layers
from moeprune.plans_skip import SkipPlan
from moeprune.runtime.masking import applied
from moeprune.scoring import open_evaluator, text_digests

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_KINDS = ("policy", "random", "oracle")
_PASSES = 5  # timed passes of each model, in turn
_TIMED_TOKENS = 4096  # of the text that a timed pass runs through


@dataclass(frozen=True, slots=True, kw_only=True)
class SkipTime:
    """How long forward passes over some of the text took, on whatever ran them.

    Attributes:
        base: seconds of the model that skips nothing, the median of the passes; gated: of the one that skips.
        ratio: median of the passes' own ratios; spread: smallest and largest of them.
        tokens: of a pass, padding included; batch: sequences of its largest batch.
        device: kind of device; dtype: of the weights; implementation: of the experts.
    """

    base: float
    gated: float
    ratio: float
    spread: tuple[float, float]
    tokens: int
    batch: int
    device: str
    dtype: str
    implementation: str


def measure_skip(
    checkpoint: Checkpoint,
    plans: Sequence[SkipPlan],
    settings: CalibrationOptions,
    data: CalibrationSet,
    *,
    output: Path | None = None,
    trained: Checkpoint | None = None,
) -> tuple[SkipReport, SkipTime | None]:
    """Score skip plans of a model on text: in memory where it fits, else layer by layer.

    Args:
        checkpoint: the model that the plans are for.
        plans: the one whose rates are broken down, then those of the curve.
        settings: how to run the model.
        data: the text.
        output: what will be written in the end; hidden states that need files lie beside it.
        trained: what the plans run on, where it has other weights than the model; both are in memory then.

    Returns:
        The report, and how long the model took, where it is in memory.

    Raises:
        EvaluationError: fewer than two documents with a token to predict.
        ConfigError: it cannot fit.
    """
    variants = len(_KINDS) * len(plans)
    opened = (
        open_evaluator(checkpoint, settings, data, plans=variants, output=output)
        if trained is None
        else contextlib.nullcontext(_trained_evaluator(checkpoint, trained, settings, data))
    )
    with opened as evaluator:
        found = _scores(evaluator, plans, data.domains, _classes(checkpoint))
        took = time_skip(evaluator.model, plans[0], data) if isinstance(evaluator, ResidentEvaluator) else None
    known = text_digests([data.fingerprint], data.provenance)
    seen = known & text_digests(plans[0].inputs.values(), ())
    report = report_of(
        found[0],
        found[1:],
        data.domains,
        base_model=checkpoint.path.resolve().name,
        text=data.provenance,
        warnings=("the thresholds were solved on this very text: it looks better than it is",) if seen else (),
        command={
            "stage": "skip",
            **plans[0].command,
            **({"curve": [plan.target for plan in plans[1:]]} if plans[1:] else {}),
        },
        inputs={"model": checkpoint.fingerprint, "text": data.fingerprint} | _digests(plans),
    )
    return report, took


def _trained_evaluator(
    checkpoint: Checkpoint, trained: Checkpoint, settings: CalibrationOptions, data: CalibrationSet
) -> ResidentEvaluator:
    from moeprune.collectors.resident import load_model

    models = [
        load_model(one, device=settings.device, dtype=settings.dtype, trust_remote_code=settings.trust_remote_code)
        for one in (trained, checkpoint)
    ]
    return ResidentEvaluator(models[0], data.sequences, settings.batch_tokens, reference=models[1])


def write_measured(report: SkipReport, took: SkipTime | None, folder: Path) -> None:
    """Write ``skip.json``, ``skip.md`` and, as no two runs give the same, ``time.json`` apart from them."""
    write_skip_report(report, folder)
    if took is not None:
        write_atomic(folder / "time.json", to_json(asdict(took)))


def _scores(
    evaluator: Evaluator, plans: Sequence[SkipPlan], labels: Sequence[str], classes: TokenClasses | None
) -> list[Measured]:
    names = sorted(set(labels))
    domains = [names.index(label) for label in labels]
    tallies = [{kind: Tally(domains, classes) for kind in _KINDS} for _ in plans]
    gated = [Gated(plan, own["policy"]) for plan, own in zip(plans, tallies, strict=True)]
    variants = [
        variant
        for one, own in zip(gated, tallies, strict=True)
        for variant in (one, Control(one, at_random, own["random"]), Control(one, true_norm, own["oracle"]))
    ]
    scores = iter(evaluator.score(variants))
    return [
        Measured(plan=plan, scores={kind: next(scores) for kind in _KINDS}, tallies=own)
        for plan, own in zip(plans, tallies, strict=True)
    ]


def _classes(checkpoint: Checkpoint) -> TokenClasses | None:
    """The classes of the tokens, where the checkpoint has a tokenizer."""
    from transformers import AutoTokenizer

    size = checkpoint.spec.values(checkpoint.config).get("vocab_size")
    if size is None or not any((checkpoint.path / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
        return None
    return TokenClasses.of(AutoTokenizer.from_pretrained(checkpoint.path), int(size))


def _digests(plans: Iterable[SkipPlan]) -> dict[str, str]:
    return {f"plan {plan.target:g}": sha256_bytes(to_json(plan.to_dict()).encode()) for plan in plans}


# --- time -------------------------------------------------------------------------------------------------------------


def time_skip(model: PreTrainedModel, plan: SkipPlan, data: CalibrationSet, passes: int = _PASSES) -> SkipTime:
    """Time forward passes of a model with and without a plan's gates, in turn.

    Args:
        model: the loaded model, not gated.
        plan: what is skipped.
        data: the text, of which the first batches are run.
        passes: how often.
    """
    gates = changes_of(_Untold(plan), expert_layers(model))
    chosen: list[tuple[Any, Any]] = []
    for _, ids_BT, mask_BT in batches(data.sequences, _TIMED_TOKENS):
        if chosen and sum(ids.numel() for ids, _ in chosen) + ids_BT.numel() > _TIMED_TOKENS:
            break
        chosen.append((ids_BT, mask_BT))
    seconds: list[tuple[float, float]] = []
    for number in range(1 + passes):  # the first one warms up
        base = _seconds(model, chosen)
        with applied(gates):
            gated = _seconds(model, chosen)
        seconds += [(base, gated)] if number else []
    ratios = sorted(gated / base for base, gated in seconds)
    return SkipTime(
        base=statistics.median(base for base, _ in seconds),
        gated=statistics.median(gated for _, gated in seconds),
        ratio=statistics.median(ratios),
        spread=(ratios[0], ratios[-1]),
        tokens=sum(ids.numel() for ids, _ in chosen),
        batch=max(len(ids) for ids, _ in chosen),
        device=model.device.type,
        dtype=str(model.dtype).removeprefix("torch."),
        implementation=str(model.config._experts_implementation or "eager"),  # noqa: SLF001 - it has no public name
    )


class _Untold(Gated):
    """Gates that tell nobody what they decide."""

    def __init__(self, plan: SkipPlan) -> None:
        super().__init__(plan, Tally([0]))

    def at(self, layer: Any) -> Any:
        """The gate of a layer."""
        gate = super().at(layer)
        gate.counter = None
        return gate


def _seconds(model: PreTrainedModel, chosen: Iterable[tuple[Any, Any]]) -> float:
    import torch

    begin = time.perf_counter()
    for ids_BT, mask_BT in chosen:
        logits_of(model, ids_BT, mask_BT)
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    return time.perf_counter() - begin
