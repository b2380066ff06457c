"""Collect statistics from a model that fits in memory."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

from moeprune._files import begin_work, progress, quiet
from moeprune.calibration import Batch
from moeprune.checkpoint import Checkpoint
from moeprune.collectors.more import CORE, Request
from moeprune.collectors.probe import Observation, observe
from moeprune.errors import CheckpointError, ConfigError, UnsupportedModelError, first_line
from moeprune.streaming.quantised import method_of, quantiser_of
from moeprune.streaming.skeleton import torch_dtype
from moeprune.streaming.stream import padded

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_CODES = {"F8_E4M3", "F8_E5M2", "F8_E8M0", "F4", "U8", "I8"}  # dtypes of what is no number without a scale


def load_model(
    checkpoint: Checkpoint, *, device: str | None = None, dtype: str = "auto", trust_remote_code: bool = False
) -> PreTrainedModel:
    """Load a checkpoint for inference.

    Args:
        checkpoint: an opened checkpoint.
        device: ``cpu``, ``cuda``, ``cuda:1``, or ``auto`` to spread over all; by default CUDA where there is one.
        dtype: ``auto`` is the checkpoint's own.
        trust_remote_code: run code that comes with the checkpoint.

    Raises:
        ConfigError: an unknown dtype or device.
        UnsupportedModelError: transformers does not know how its weights are quantised.
        CheckpointError: transformers cannot load it, or would make up tensors that it lacks.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    chosen = dtype if dtype == "auto" else torch_dtype(dtype)
    place = place_of(device)
    _check_quantiser(checkpoint)
    if quiet.get() or not sys.stderr.isatty():
        logging.disable_progress_bar()
    begin_work()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            model, found = AutoModelForCausalLM.from_pretrained(
                checkpoint.path,
                dtype=chosen,
                device_map=place,
                trust_remote_code=trust_remote_code,
                output_loading_info=True,
            )
        except (OSError, ValueError, RuntimeError, ImportError) as error:
            raise CheckpointError(f"transformers cannot load {checkpoint.path}: {first_line(error)}") from error
    if found["missing_keys"]:
        raise CheckpointError(
            f"{checkpoint.path} lacks tensors that the model needs, such as {min(found['missing_keys'])!r}",
            "download the checkpoint again",
        )
    return model.eval()


def _check_quantiser(checkpoint: Checkpoint) -> None:
    """Refuse codes that transformers would take for numbers: it passes over methods that it does not know."""
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

    settings = quantiser_of(checkpoint.config)
    if settings is not None:
        method = method_of(settings)
        known = method in {"bitsandbytes", *AUTO_QUANTIZATION_CONFIG_MAPPING}
    else:
        method = "a method that config.json does not name"
        known = not any(entry.dtype in _CODES for entry in checkpoint.tensors.values())
    if not known:
        raise UnsupportedModelError(
            f"transformers cannot load weights that are quantised by {method}", "dequantise the checkpoint first"
        )


def place_of(device: str | None) -> str:
    """A device map that transformers takes.

    Raises:
        ConfigError: there is no such device.
    """
    import torch

    count = torch.cuda.device_count()
    if device in {None, "auto"}:
        return device or ("cuda" if count else "cpu")
    try:
        wanted = torch.device(str(device))
    except RuntimeError:
        raise ConfigError(f"unknown --device {device!r}", "cpu, cuda, cuda:1 or auto") from None
    if wanted.type == "cuda" and (wanted.index or 0) >= count:
        raise ConfigError(f"--device {device}: there are {count} CUDA devices", "use --device cpu")
    return str(device)


def run_batches(
    model: PreTrainedModel,
    batches: Sequence[Batch],
    checkpoint: Checkpoint,
    layers: Collection[int] | None = None,
    *,
    domains: Sequence[str] = (),
    request: Request = CORE,
) -> Observation:
    """Run every batch through the model and observe it.

    Args:
        model: the loaded model.
        batches: the fixed list of batches.
        checkpoint: what the model was loaded from.
        layers: decoder layers to observe; by default all that have experts.
        domains: labels in the order that the statistics shall have; by default that of the batches.
        request: what to measure beyond the core sums.
    """
    import torch

    with (
        observe(
            model,
            like=checkpoint,
            layers=layers,
            domains=domains,
            statistics=request.statistics,
            paths=request.paths,
            sequences=request.sequences,
        ) as observation,
        torch.inference_mode(),
    ):
        for batch in progress(batches, "collecting", unit="batch"):
            with observation.batch(batch.domain, batch.half, rows=batch.rows):
                # The logits are of no interest, and would be the largest tensor of the pass.
                model(**padded(batch.sequences, model.device), use_cache=False, logits_to_keep=1)
        observation.read_weights()
    return observation
