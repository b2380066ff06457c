"""A masked model computes what a pruned one computes, and is itself again afterwards."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import moeprune
from moeprune.architectures import ARCHITECTURES
from moeprune.errors import CheckpointError, PlanError, UnsupportedModelError
from moeprune.experts import ExpertLayer, expert_layers
from moeprune.runtime.masking import Mask, masked

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

PlanByHand = Callable[..., moeprune.PruningPlan]
CheckpointOf = Callable[..., Path]
ModelOf = Callable[..., "PreTrainedModel"]
Loadable = Callable[[Path], Path]
GROUPED = {"n_group": 2, "topk_group": 1}
CASES = [
    *((name, {}) for name in ARCHITECTURES),
    ("deepseek_v3", {"norm_topk_prob": False, **GROUPED}),
    ("glm4_moe", {**GROUPED, "first_k_dense_replace": 0}),
    ("qwen3_moe", {"dtype": "bfloat16"}),
    ("deepseek_v3", {"dtype": "bfloat16"}),
]


def token_ids() -> torch.Tensor:
    """Random token ids."""
    import torch

    return torch.randint(0, 97, (3, 16), generator=torch.Generator().manual_seed(5))


def logits_of(model: PreTrainedModel, **options: Any) -> torch.Tensor:
    """Logits of the token ids."""
    import torch

    with torch.no_grad():
        return model(token_ids(), **options).logits


def keep_of(plan: moeprune.PruningPlan) -> dict[int, tuple[int, ...]]:
    """The keep-lists of a plan."""
    return {index: layer.keep for index, layer in plan.layers.items()}


def everything(model: PreTrainedModel) -> dict[str, Any]:
    """Every parameter and buffer by identity, every plain attribute of a module, and the number of its hooks."""
    found: dict[str, Any] = {}
    for prefix, module in model.named_modules():
        tensors = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        found |= {f"{prefix}.{name}": id(tensor) for name, tensor in tensors}
        found |= {f"{prefix}.{name}": value for name, value in vars(module).items() if isinstance(value, int)}
        found[f"{prefix} hooks"] = (len(module._forward_hooks), len(module._forward_pre_hooks))
    return found


@pytest.mark.parametrize(("model_type", "changes"), CASES, ids=str)
def test_a_mask_is_a_pruned_model(
    model_type: str,
    changes: dict[str, Any],
    checkpoint_of: CheckpointOf,
    model_of: ModelOf,
    plan_by_hand: PlanByHand,
    loadable: Loadable,
    tmp_path: Path,
) -> None:
    """Masked logits are, bit for bit, those of the model pruned in place and of the pruned checkpoint."""
    import torch
    from transformers import AutoModelForCausalLM

    base = loadable(checkpoint_of(model_type, **changes))
    model = model_of(model_type, **changes)
    plan = plan_by_hand(base, moeprune.open_checkpoint(base).num_experts // 2)
    written = moeprune.apply(base, plan, tmp_path / "out")
    before, original = everything(model), logits_of(model)
    with masked(expert_layers(model), keep_of(plan)):
        found = logits_of(model)
    assert everything(model) == before
    assert torch.equal(logits_of(model), original)
    assert not torch.equal(found, original)
    assert torch.equal(found, logits_of(moeprune.prune_model(copy.deepcopy(model), plan)))
    assert torch.equal(found, logits_of(AutoModelForCausalLM.from_pretrained(written).eval()))


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
def test_every_experts_implementation_is_masked(
    implementation: str, checkpoint_of: CheckpointOf, plan_by_hand: PlanByHand
) -> None:
    """The numbers are translated before any of transformers' implementations runs."""
    import torch
    from transformers import AutoModelForCausalLM

    base = checkpoint_of("qwen3_moe")
    model = AutoModelForCausalLM.from_pretrained(base, experts_implementation=implementation).eval()
    plan = plan_by_hand(base, 8)
    with masked(expert_layers(model), keep_of(plan)):
        found = logits_of(model)
    assert torch.equal(found, logits_of(moeprune.prune_model(model, plan)))


def test_layers_may_keep_different_numbers(model_of: ModelOf) -> None:
    """One layer keeps 5 experts, the other all: only the first uses fewer, by their original numbers."""
    model, used = model_of("qwen3_moe"), dict[int, set[int]]()
    layers = expert_layers(model)
    with masked(layers, {0: (1, 4, 6, 9, 15)}), selections(layers, used):
        found = logits_of(model)
    assert used[0] == {1, 4, 6, 9, 15}
    assert len(used[2]) > 5
    with Mask(layers[0], (1, 4, 6, 9, 15)).applied():
        assert (logits_of(model) == found).all()


@contextlib.contextmanager
def selections(layers: list[ExpertLayer], used: dict[int, set[int]]) -> Iterator[None]:
    """Note the experts that each layer really runs, whatever was registered before."""
    hooks = [
        layer.experts.register_forward_pre_hook(
            lambda _, args, index=layer.index: used.setdefault(index, set()).update(args[1].flatten().tolist())
        )
        for layer in layers
    ]
    yield
    for hook in hooks:
        hook.remove()


def test_a_mask_can_be_applied_again_and_again(model_of: ModelOf) -> None:
    """Masks made beforehand alternate on one model, and each always computes the same."""
    import torch

    model = model_of("deepseek_v3")
    layer = expert_layers(model)[0]
    masks = [Mask(layer, keep) for keep in (range(0, 16, 2), range(1, 16, 2))]
    found = []
    for mask in [*masks, *masks]:
        with mask.applied():
            found.append(logits_of(model))
    assert torch.equal(found[0], found[2])
    assert torch.equal(found[1], found[3])
    assert not torch.equal(found[0], found[1])


def test_an_error_inside_restores_the_model(model_of: ModelOf) -> None:
    """Whatever is raised in the block, and with a later layer's keep-list refused, the model is as it was."""
    model = model_of("minimax_m2")
    layers, before = expert_layers(model), everything(model)
    with pytest.raises(IndexError), masked(layers, {0: range(6), 1: range(6)}):
        model(token_ids() + 97)  # no such tokens
    assert everything(model) == before
    with pytest.raises(PlanError, match="layer 1: a token could reach 2"), masked(layers, {0: range(6), 1: range(2)}):
        pass
    assert everything(model) == before


# --- together with observe --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", ["qwen3_moe", "deepseek_v3", "ernie4_5_moe"])
def test_observed_experts_keep_their_numbers(
    model_type: str, checkpoint_of: CheckpointOf, model_of: ModelOf, plan_by_hand: PlanByHand
) -> None:
    """Statistics of a masked model are the pruned model's in the kept experts' places, and zero elsewhere."""
    base, model = checkpoint_of(model_type), copy.deepcopy(model_of(model_type))
    plan = plan_by_hand(base, moeprune.open_checkpoint(base).num_experts // 2)
    with moeprune.observe(model) as observation, masked(expert_layers(model), keep_of(plan)):
        logits_of(model)
    found = observation.result()
    with moeprune.observe(moeprune.prune_model(model, plan)) as observation:
        logits_of(model)
    expected = observation.result()
    for index, arrays in found.layers.items():
        kept = np.array(plan.layers[index].keep)
        for name in ("count", "gated_norm_sum", "soft_prob_sum", "max_abs_down"):
            np.testing.assert_allclose(arrays[name][:, kept], expected.layers[index][name], rtol=1e-6, err_msg=name)
            assert not np.delete(arrays[name], kept, axis=1).any()
        pairs = arrays["pair_count"]
        np.testing.assert_array_equal(pairs[:, kept][:, :, kept], expected.layers[index]["pair_count"])
        assert pairs.sum() == expected.layers[index]["pair_count"].sum()


def test_observing_starts_before_the_mask(model_of: ModelOf) -> None:
    """Inside a mask the layers cannot be found, and the hint says what to do."""
    model = model_of("mixtral")
    with (
        masked(expert_layers(model), {0: range(4)}),
        pytest.raises(UnsupportedModelError, match="before experts are masked"),
        moeprune.observe(model),
    ):
        pass


def test_router_logits_have_a_column_for_every_expert(model_of: ModelOf) -> None:
    """With router logits in the output, dropped experts have minus infinity and the balancing loss can be computed."""
    model = model_of("qwen3_moe")
    with masked(expert_layers(model), {0: range(0, 16, 2)}):
        output = model(token_ids(), labels=token_ids(), output_router_logits=True)
    masked_TE, whole_TE = output.router_logits
    assert masked_TE.shape == whole_TE.shape == (48, 16)
    assert masked_TE.isneginf().all(0).tolist() == [False, True] * 8
    assert whole_TE.isfinite().all()
    assert output.aux_loss.isfinite()


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model_type", "keep", "message"),
    [
        ("qwen3_moe", (0, 1), "a token could reach 2 experts, fewer than its top-3"),
        ("qwen3_moe", (3, 2, 1), "must be ascending and without repeats"),
        ("qwen3_moe", (1, 2, 16), "must name experts 0 to 15"),
        ("deepseek_v3", range(8), r"groups keep \[4, 4, 0, 0\] experts"),
    ],
)
def test_keep_lists_that_no_router_can_use_are_refused(
    model_type: str, keep: tuple[int, ...], message: str, model_of: ModelOf
) -> None:
    """The same rules as for a plan, before anything changes."""
    with pytest.raises(PlanError, match=message):
        Mask(expert_layers(model_of(model_type))[0], keep)


def test_masks_of_one_layer_do_not_nest(model_of: ModelOf) -> None:
    """Neither one made beforehand nor one made inside; masks of other layers do."""
    model = model_of("deepseek_v3")
    layers, before = expert_layers(model), everything(model)
    keep = range(0, 16, 2)
    mask, other = Mask(layers[0], keep), Mask(layers[1], keep)
    with mask.applied():
        inside = everything(model)
        with pytest.raises(PlanError, match="layer 1 is masked already"), mask.applied():
            pass
        with pytest.raises(PlanError, match="layer 1 is masked already"), Mask(layers[0], range(1, 16, 2)).applied():
            pass
        with other.applied():
            assert everything(model) != inside
        assert everything(model) == inside
    assert everything(model) == before


def test_weights_that_are_not_those_of_the_mask_are_refused(model_of: ModelOf) -> None:
    """A router that was loaded again has other rows than the mask; one that is offloaded has none."""
    import torch

    model = copy.deepcopy(model_of("mixtral"))
    layer = expert_layers(model)[0]
    mask = Mask(layer, range(4))
    layer.router.weight = torch.nn.Parameter(layer.router.weight + 1)
    with pytest.raises(PlanError, match="was loaded again since the mask was made"), mask.applied():
        pass
    layer.router.weight = torch.nn.Parameter(layer.router.weight.to("meta"))
    with pytest.raises(CheckpointError, match=r"Router\.weight is offloaded"):
        Mask(layer, range(4))
