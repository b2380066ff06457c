"""Low-rank adapters on the attention projections of a model: trained in the place of its weights, and merged."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from moeprune.errors import ConfigError, UnsupportedModelError
from moeprune.healing.distillation import levels_of

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

_SELECTS = "indexer"  # of sparse attention: it picks tokens, and no gradient comes through


@dataclass(frozen=True, slots=True, kw_only=True)
class Rank:
    """How large the adapters are (arXiv:2106.09685; 16 and 16 as MAESTRO has it, arXiv:2607.08601).

    Attributes:
        r: rank.
        alpha: the product of the two matrices is multiplied by alpha / r.
    """

    r: int = 16
    alpha: int = 16

    def __post_init__(self) -> None:
        """Refuse sizes that are none.

        Raises:
            ConfigError: one is below 1.
        """
        if self.r < 1 or self.alpha < 1:
            raise ConfigError("--rank and --alpha must be at least 1", "16 and 16 are the defaults")


def projections(model: nn.Module) -> list[str]:
    """Names of the attention projections of every layer: q, k, v, o, and their low-rank parts where there are any.

    Raises:
        UnsupportedModelError: there are none.
    """
    from torch import nn

    levels = levels_of(model)
    found = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and levels.get(f"{name}.weight") == "attention" and _SELECTS not in name
    ]
    if not found:
        raise UnsupportedModelError("the model has no attention projection to adapt", "heal it with --method logits")
    return found


def adapter_sizes(model: nn.Module, rank: Rank) -> list[int]:
    """Elements of the adapters that a model would get, one for each projection."""
    modules = dict(model.named_modules())
    return [rank.r * sum(modules[name].weight.shape) for name in projections(model)]


class Adapters:
    """Adapters inside a loaded model, which computes what it did until they are trained.

    Args:
        model: changed in place; in float32.
        rank: their size.
        seed: of their first values.

    Attributes:
        parameters: what is trained, by name in the model.
        weights: names of the weights that :meth:`merge` changes, as they are called in the model without adapters.
    """

    def __init__(self, model: PreTrainedModel, rank: Rank, seed: int) -> None:
        import torch
        from peft import LoraConfig, get_peft_model

        named = projections(model)
        config = LoraConfig(r=rank.r, lora_alpha=rank.alpha, target_modules=named, lora_dropout=0.0, bias="none")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self._adapted: Any = get_peft_model(model, config)
        self.parameters = {name: value for name, value in model.named_parameters() if "lora_" in name}
        self.weights = [f"{name}.weight" for name in named]

    def merge(self) -> None:
        """Add the products to the weights and take the adapters away."""
        self._adapted.merge_and_unload()
