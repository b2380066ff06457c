"""Score many variants of a model on held-out text without writing any: how a search learns what its candidates cost."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from moeprune._files import progress
from moeprune.errors import EvaluationError, PlanError
from moeprune.evaluation.agreement import (
    Agreement,
    AgreementSums,
    FloatArray,
    Perplexity,
    Sequences,
    TokenLosses,
    batches,
    logits_of,
    perplexity,
    perplexity_ratio,
)
from moeprune.experts import ExpertLayer, expert_layers
from moeprune.runtime.masking import Change, Mask, applied

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

KeepLists = Mapping[int, Sequence[int]]  # experts that stay by decoder layer; a layer that is absent keeps all


class Variant:
    """One way to run the model: what changes in each of its MoE layers.

    Example:
        >>> class Gated(Variant):
        ...     def at(self, layer):
        ...         return Gate(layer, policy, decisions[layer.index])
        >>> [score] = evaluator.score([Gated()])
    """

    def at(self, layer: ExpertLayer) -> Change | None:
        """What changes in a layer, whose weights are in memory; None leaves it as it is."""
        raise NotImplementedError

    def begin(self, rows: Sequence[int], ids_BT: torch.Tensor, mask_BT: torch.Tensor) -> None:
        """Learn what runs next, through the whole model or through one layer of it.

        Args:
            rows: which documents the batch holds.
            ids_BT: the tokens.
            mask_BT: 1 for tokens, 0 for padding.
        """


class Masked(Variant):
    """Only some experts are there.

    Args:
        keep: those that stay, by decoder layer; a layer that is absent keeps all.
    """

    def __init__(self, keep: KeepLists) -> None:
        self._keep = keep

    def at(self, layer: ExpertLayer) -> Mask | None:
        """The mask of a layer."""
        return Mask(layer, self._keep[layer.index]) if layer.index in self._keep else None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PlanScore:
    """What a plan does to the model's predictions; intervals are over documents, N of them.

    Attributes:
        perplexity: of the model with the plan's experts.
        perplexity_ratio: that over the base model's, paired by document.
        agreement: how far the plan's next-token distributions agree with the base model's.
        losses: per document, to pair this plan with another.
        base_losses: the base model's.
        kl: KL(base || plan) in nats per document, [N].
        same: tokens per document on which both put the same token first, [N].
    """

    perplexity: Perplexity
    perplexity_ratio: Perplexity
    agreement: Agreement
    losses: TokenLosses
    base_losses: TokenLosses
    kl: FloatArray
    same: FloatArray

    @classmethod
    def of(cls, sums: AgreementSums) -> PlanScore:
        """The score that was added up.

        Raises:
            EvaluationError: fewer than two documents with a predicted token, or probabilities that are not finite.
        """
        return cls(
            perplexity=perplexity(sums.losses),
            perplexity_ratio=perplexity_ratio(sums.base_losses, sums.losses),
            agreement=sums.agreement(),
            losses=sums.losses,
            base_losses=sums.base_losses,
            kl=sums.kl,
            same=sums.same,
        )


def difference(first: PlanScore, second: PlanScore) -> Perplexity:
    """Perplexity under the second plan over that under the first, paired by document: below 1 the second is better.

    Raises:
        EvaluationError: they were measured on different documents.

    Example:
        >>> one, two = evaluator([plan_a, plan_b])
        >>> low, high = difference(one, two).interval
    """
    return perplexity_ratio(first.losses, second.losses)


class Evaluator(Protocol):
    """Scores plans, each given by its keep-lists, against the base model on a text of the evaluator's own."""

    def __call__(self, keeps: Sequence[KeepLists]) -> list[PlanScore]:
        """Score every plan on the same documents, in the order given."""

    def score(self, variants: Sequence[Variant]) -> list[PlanScore]:
        """Score any variants of the model likewise; of a batch they run in the order given."""


def check_documents(sequences: Sequences) -> None:
    """Refuse a text from which nothing can be said.

    Raises:
        EvaluationError: fewer than two documents with a token to predict.
    """
    if sum(len(ids) > 1 for ids in sequences) < 2:
        raise EvaluationError(
            "a plan is scored on at least two documents of two tokens or more", "intervals are over documents"
        )


def check_layers(keep: KeepLists, layers: Collection[int]) -> None:
    """Refuse keep-lists of layers that have no experts.

    Raises:
        PlanError: the message names the first one.
    """
    unknown = keep.keys() - set(layers)
    if unknown:
        raise PlanError(f"the model has no MoE layer {min(unknown)}", f"it has {sorted(layers)}")


class ResidentEvaluator:
    """Scores plans on a model that is in memory, by masking its experts.

    Every batch goes through the base model once and then once per plan, so that it is cheaper to ask for many plans in
    one call; nothing but one batch's logits of the base and of one plan is held.

    Args:
        model: a transformers causal language model in evaluation mode; it is left as it is.
        sequences: token ids per document; the first token is only ever context.
        batch_tokens: most tokens, padding included, in one forward pass.
        reference: the model whose predictions are the base's, where it is another one: the original of one that was
            trained since.

    Raises:
        EvaluationError: fewer than two documents with a token to predict.
        UnsupportedModelError: the model has no experts that can be masked.

    Example:
        >>> evaluator = ResidentEvaluator(model, sequences)
        >>> [score] = evaluator([{0: (0, 2, 5, 7), 1: (1, 2, 3, 6)}])
        >>> score.perplexity_ratio.value, score.agreement.top1.interval
    """

    def __init__(
        self,
        model: PreTrainedModel,
        sequences: Sequences,
        batch_tokens: int = 8192,
        reference: PreTrainedModel | None = None,
    ) -> None:
        check_documents(sequences)
        self.model, self._sequences, self._batch_tokens = model, sequences, batch_tokens
        self._reference = model if reference is None else reference
        self._layers = {layer.index: layer for layer in expert_layers(model)}

    def __call__(self, keeps: Sequence[KeepLists]) -> list[PlanScore]:
        """Score every plan on the same documents, in the order given.

        Raises:
            PlanError: a plan names a layer that has no experts, or a router cannot work with a keep-list.
        """
        for keep in keeps:
            check_layers(keep, self._layers)
        return self.score([Masked(keep) for keep in keeps])

    def score(self, variants: Sequence[Variant]) -> list[PlanScore]:
        """Score any variants of the model; of a batch they run in the order given, after the base.

        Raises:
            PlanError: a layer cannot be changed as a variant says.
        """
        changes = [changes_of(variant, self._layers.values()) for variant in variants]
        sums = [AgreementSums(len(self._sequences)) for _ in variants]
        passes = list(batches(self._sequences, self._batch_tokens)) if variants else []
        for rows, ids_BT, mask_BT in progress(passes, "evaluating", unit="batch"):
            base_BTV = logits_of(self._reference, ids_BT, mask_BT)
            for variant, own, own_sums in zip(variants, changes, sums, strict=True):
                variant.begin(rows, ids_BT, mask_BT)
                with applied(own):
                    other_BTV = logits_of(self.model, ids_BT, mask_BT)
                own_sums.add(rows, base_BTV, other_BTV, ids_BT, mask_BT)
        return [PlanScore.of(one) for one in sums]


def changes_of(variant: Variant, layers: Iterable[ExpertLayer]) -> list[Change]:
    """What a variant changes, in the order of the layers."""
    return [change for layer in layers if (change := variant.at(layer)) is not None]
