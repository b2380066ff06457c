"""Text that a model writes itself, to be trained on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from moeprune.evaluation.agreement import Sequences

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PROMPT = 16  # tokens of a sequence that are given


def sampled(
    model: PreTrainedModel, sequences: Sequences, *, new_tokens: int, seed: int, batch: int = 64
) -> list[tuple[int, ...]]:
    """Have a model go on after the beginnings of some sequences, at temperature 1 from its whole vocabulary.

    Args:
        model: in evaluation mode.
        sequences: token ids; those that are shorter than a prompt are given whole.
        new_tokens: most tokens that are added; a sequence ends where the model ends it.
        seed: of what is drawn.
        batch: sequences that are written together.

    Returns:
        Prompts with what was added, in another order.
    """
    import torch

    found: list[tuple[int, ...]] = []
    with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
        torch.manual_seed(seed)
        for length, prompts in _by_length(sequences):  # of equal length, so that nothing is padded
            for begin in range(0, len(prompts), batch):
                found += _continued(model, prompts[begin : begin + batch], length, new_tokens)
    return found


def _by_length(sequences: Sequences) -> list[tuple[int, list[tuple[int, ...]]]]:
    groups: dict[int, list[tuple[int, ...]]] = {}
    for ids in sequences:
        prompt = tuple(ids[:PROMPT])
        groups.setdefault(len(prompt), []).append(prompt)
    return sorted(groups.items())


def _continued(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], length: int, new_tokens: int
) -> list[tuple[int, ...]]:
    import torch
    from transformers import GenerationConfig

    ids_BT = torch.tensor(prompts, device=model.device)
    given = model.generation_config.eos_token_id if model.generation_config is not None else None
    ends = {given} if isinstance(given, int) else set(given or ())
    settings = GenerationConfig(
        do_sample=True, top_k=0, top_p=1.0, temperature=1.0, max_new_tokens=new_tokens, eos_token_id=[*ends] or None
    )
    settings.pad_token_id = next(iter(ends), 0)
    with torch.no_grad():
        out_BT = model.generate(ids_BT, attention_mask=torch.ones_like(ids_BT), generation_config=settings)
    return [_whole(row, length, ends) for row in out_BT.tolist()]


def _whole(ids: Sequence[int], length: int, ends: set[int]) -> tuple[int, ...]:
    """Through the token that ends it; what follows is padding."""
    for place in range(length, len(ids)):
        if ids[place] in ends:
            return tuple(ids[: place + 1])
    return tuple(ids)
