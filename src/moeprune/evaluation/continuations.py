"""Texts that a model continues: greedily or drawn with a seed, in the same batches whatever the model."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from moeprune._files import progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_DRAWN = {"do_sample": True, "temperature": 0.8, "top_p": 0.95, "top_k": 0}


def continuations(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    *,
    new_tokens: int,
    batch_size: int,
    seed: int | None = None,
) -> list[tuple[tuple[int, ...], bool]]:
    """Continue token ids with the model's own next tokens.

    Args:
        model: a transformers causal language model in evaluation mode; its own generation settings are put aside.
        prompts: token ids of each.
        new_tokens: most tokens to add.
        batch_size: prompts that run together.
        seed: draw tokens at temperature 0.8 from the likeliest 95 %; None takes the likeliest.

    Returns:
        For each prompt the new tokens, and whether the model came to an end of its own, which is left out.
    """
    found: list[tuple[tuple[int, ...], bool]] = []
    starts = range(0, len(prompts), batch_size)
    with _own_settings(model, new_tokens, drawn=seed is not None):
        for start in progress(starts, "continuing", unit="batch"):
            found += _continue(model, prompts[start : start + batch_size], None if seed is None else seed + start)
    return found


def _continue(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], seed: int | None
) -> list[tuple[tuple[int, ...], bool]]:
    import torch

    longest = max(map(len, prompts))
    padding = [longest - len(ids) for ids in prompts]  # on the left: what comes next must follow the prompt
    ids_BT = torch.tensor([[0] * gap + list(ids) for gap, ids in zip(padding, prompts, strict=True)])
    mask_BT = torch.tensor([[0] * gap + [1] * len(ids) for gap, ids in zip(padding, prompts, strict=True)])
    device = model.device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), torch.inference_mode():
        torch.manual_seed(seed or 0)
        model_any: Any = model
        out_BT = model_any.generate(ids_BT.to(device), attention_mask=mask_BT.to(device))
    ends = _ends(model)
    return [_cut(row, ends) for row in out_BT[:, longest:].tolist()]


def _cut(tokens: Sequence[int], ends: frozenset[int]) -> tuple[tuple[int, ...], bool]:
    """What comes before the first end-of-text token, and whether there is one."""
    length = next((place for place, token in enumerate(tokens) if token in ends), len(tokens))
    return tuple(tokens[:length]), length < len(tokens)


def _ends(model: PreTrainedModel) -> frozenset[int]:
    config: Any = model.generation_config
    found = config.eos_token_id
    return frozenset([found] if isinstance(found, int) else found or ())


@contextlib.contextmanager
def _own_settings(model: PreTrainedModel, new_tokens: int, *, drawn: bool) -> Iterator[None]:
    """Generate as we say, not as a file beside the checkpoint says; only what ends a text is the model's own."""
    from transformers import GenerationConfig

    before: Any = model.generation_config
    ends = sorted(_ends(model)) or None
    pad = ends[0] if ends else 0
    how: dict[str, Any] = _DRAWN if drawn else {"do_sample": False}
    ours: Any = GenerationConfig(max_new_tokens=new_tokens, eos_token_id=ends, pad_token_id=pad, **how)
    model.generation_config = ours
    try:
        yield
    finally:
        model.generation_config = before
