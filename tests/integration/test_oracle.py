"""The exact oracle: a pruned checkpoint equals the original with dropped experts' selection scores at minus infinity.

The mask is made here with torch alone and knows nothing of moeprune. Then what ``verify`` proves, and what it finds.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import moeprune
from moeprune.architectures import ARCHITECTURES, ExpertName, RouterName
from moeprune.checkpoint import INDEX, SINGLE
from moeprune.errors import ArtifactError, CheckpointError, PlanError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

PlanByHand = Callable[..., moeprune.PruningPlan]
CheckpointOf = Callable[..., Path]
ModelOf = Callable[..., "PreTrainedModel"]
Loadable = Callable[[Path], Path]
CASES = [
    *((name, {}) for name in ARCHITECTURES),
    ("qwen3_moe", {"norm_topk_prob": False}),
    ("qwen2_moe", {"norm_topk_prob": False}),
    ("olmoe", {"norm_topk_prob": True}),
    ("qwen3_moe", {"tie_word_embeddings": True}),
    ("deepseek_v3", {"norm_topk_prob": False, "n_group": 2, "topk_group": 1}),
    ("glm4_moe", {"n_group": 2, "topk_group": 2, "first_k_dense_replace": 0}),
    *((name, {"stacked": True}) for name in ("qwen3_moe", "mixtral", "minimax_m2", "glm4_moe", "qwen3_next")),
]
GROUPED = "deepseek_v3"  # the architecture with everything: dense layer, groups, bias, shared experts, MTP


def half(folder: Path) -> int:
    """Half of the experts of a checkpoint."""
    return moeprune.open_checkpoint(folder).num_experts // 2


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Norm of the difference over the norm."""
    return float((found - expected).norm() / expected.norm())


def token_ids(rows: int = 4, length: int = 24) -> torch.Tensor:
    """Random token ids."""
    import torch

    return torch.randint(0, 97, (rows, length), generator=torch.Generator().manual_seed(11))


def tensor_bytes(folder: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Every tensor of a checkpoint as dtype, shape and raw bytes."""
    tensors = moeprune.open_checkpoint(folder).tensors.values()
    return {
        entry.name: (entry.dtype, entry.shape, entry.file.read_bytes()[entry.begin : entry.end]) for entry in tensors
    }


@contextmanager
def masked(model: PreTrainedModel, dropped: Mapping[int, list[int]]) -> Iterator[list[torch.Tensor]]:
    """A copy of the model whose routers rank the dropped experts of each layer at minus infinity.

    Every router gets minus infinity as logit where its linear map is computed, and as its correction bias where it has
    one, which takes part in the selection only.
    """
    import torch
    from torch.overrides import TorchFunctionMode

    model = copy.deepcopy(model)
    weights: list[tuple[torch.Tensor, list[int]]] = []
    for layer, experts in dropped.items():
        block = model.model.layers[layer].mlp
        tensors = dict([*block.named_parameters(), *block.named_buffers()])
        weights.append((tensors["router.weight" if "router.weight" in tensors else "gate.weight"], experts))
        for name, tensor in tensors.items():
            if name.endswith("e_score_correction_bias"):
                tensor.data[..., experts] = -torch.inf

    class MinusInfinity(TorchFunctionMode):
        def __torch_function__(
            self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
        ) -> Any:
            output = func(*args, **(kwargs or {}))
            if func is torch.nn.functional.linear:
                for weight, experts in weights:
                    if args[1] is weight:
                        output[..., experts] = -torch.inf
            return output

    with torch.no_grad(), MinusInfinity():
        yield model


@contextmanager
def selections(model: PreTrainedModel, layers: Mapping[int, Any]) -> Iterator[dict[int, set[int]]]:
    """The experts that each layer really uses inside the block."""
    used: dict[int, set[int]] = {layer: set() for layer in layers}
    hooks = [
        model.model.layers[layer].mlp.experts.register_forward_pre_hook(
            lambda _, args, layer=layer: used[layer].update(args[1].flatten().tolist())
        )
        for layer in layers
    ]
    yield used
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize(("model_type", "changes"), CASES, ids=str)
def test_pruned_checkpoint_equals_the_masked_original(
    model_type: str,
    changes: dict[str, Any],
    checkpoint_of: CheckpointOf,
    model_of: ModelOf,
    plan_by_hand: PlanByHand,
    loadable: Loadable,
    tmp_path: Path,
) -> None:
    """Stock transformers loads the output without a word, and its logits are those of the masked original."""
    import torch
    from transformers import AutoModelForCausalLM

    base = checkpoint_of(model_type, **changes)
    checkpoint = moeprune.open_checkpoint(base)
    plan = plan_by_hand(base, half(base))
    out = moeprune.apply(base, plan, tmp_path / "out")
    pruned, info = AutoModelForCausalLM.from_pretrained(loadable(out), output_loading_info=True)
    mtp = tuple(f"model.layers.{layer}." for layer in checkpoint.mtp_layers)
    assert not info["missing_keys"]
    assert not info["mismatched_keys"]
    assert not info["error_msgs"]
    assert [key for key in info["unexpected_keys"] if not key.startswith(mtp or "no MTP")] == []

    everyone = range(checkpoint.num_experts)
    dropped = {
        layer: [expert for expert in everyone if expert not in plan.layers[layer].keep]
        for layer in checkpoint.moe_layers
    }
    ids = token_ids()
    with torch.no_grad():
        original, found = model_of(model_type, **changes)(ids).logits, pruned.eval()(ids).logits
    with masked(model_of(model_type, **changes), dropped) as model, selections(model, dropped) as used:
        expected = model(ids).logits
    assert all(used[layer] and used[layer].isdisjoint(dropped[layer]) for layer in dropped)
    assert relative_error(expected, original) > 1e-2  # the mask matters
    assert relative_error(found, expected) < 1e-5


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_keeping_every_expert_changes_no_byte(
    model_type: str, checkpoint_of: CheckpointOf, plan_by_hand: PlanByHand, tmp_path: Path
) -> None:
    """A plan that keeps all experts gives the same tensors, config and other files, byte for byte."""
    base = checkpoint_of(model_type)
    plan = plan_by_hand(base, moeprune.open_checkpoint(base).num_experts)
    out = moeprune.apply(base, plan, tmp_path / "out")
    assert tensor_bytes(out) == tensor_bytes(base)
    for name in ("config.json", "generation_config.json", "tokenizer_config.json", "LICENSE"):
        assert (out / name).read_bytes() == (base / name).read_bytes()
    assert moeprune.verify(base, out).tensors == len(tensor_bytes(base))


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_only_the_counts_in_the_config_change(
    model_type: str, checkpoint_of: CheckpointOf, plan_by_hand: PlanByHand, tmp_path: Path
) -> None:
    """Each changed line of config.json is a count of routed experts with its value replaced."""
    base = checkpoint_of(model_type)
    out = moeprune.apply(base, plan_by_hand(base, half(base)), tmp_path / "out")
    lines = zip(
        (base / "config.json").read_text().split("\n"), (out / "config.json").read_text().split("\n"), strict=True
    )
    changed = [(before, after) for before, after in lines if before != after]
    everyone, kept = moeprune.open_checkpoint(base).num_experts, half(base)
    assert changed
    for before, after in changed:
        assert before.split('"')[1] in ARCHITECTURES[model_type].count_keys
        assert after == before.replace(str(everyone), str(kept))


def test_kept_experts_and_router_rows_are_the_planned_ones(
    checkpoint_of: CheckpointOf, plan_by_hand: PlanByHand, tmp_path: Path
) -> None:
    """Expert n of the output is the n-th kept one with its bytes; router rows and bias follow, in the MTP layer too."""
    import numpy as np

    base = checkpoint_of(GROUPED)
    plan = plan_by_hand(base, 8)
    source, result = tensor_bytes(base), tensor_bytes(moeprune.apply(base, plan, tmp_path / "out"))
    spec = ARCHITECTURES[GROUPED]
    for name, (dtype, shape, data) in result.items():
        role = spec.role(name, 3)
        if isinstance(role, ExpertName):
            assert (dtype, shape, data) == source[role.renumbered(plan.layers[role.layer].keep[role.expert])]
        elif isinstance(role, RouterName):
            rows = np.frombuffer(source[name][2], dtype=np.float32).reshape(source[name][1])
            assert data == rows[list(plan.layers[role.layer].keep)].tobytes()
            assert shape == (8, *source[name][1][1:])
        else:
            assert (dtype, shape, data) == source[name]
    assert 3 in plan.layers
    assert len(source) - len(result) == 3 * 3 * 8  # layers x parts x dropped experts


@pytest.mark.parametrize("limit", [5_000_000_000, 50_000])
def test_one_shard_or_many(limit: int, checkpoint_of: CheckpointOf, plan_by_hand: PlanByHand, tmp_path: Path) -> None:
    """Both layouts hold the same tensors, load, and pass ``verify``; one shard has no index."""
    from transformers import AutoModelForCausalLM

    base = checkpoint_of("qwen3_moe")
    plan = plan_by_hand(base, 8)
    out = moeprune.apply(base, plan, tmp_path / "out", max_shard_size=limit)
    shards = sorted(path.name for path in out.glob("*.safetensors"))
    if limit > 1_000_000:
        assert shards == [SINGLE]
        assert not (out / INDEX).exists()
    else:
        count = len(shards)
        assert count > 2
        assert shards == [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]
        index = json.loads((out / INDEX).read_text())
        result = tensor_bytes(out)
        assert index["weight_map"].keys() == result.keys()
        assert index["metadata"]["total_size"] == sum(len(data) for _, _, data in result.values())
        per_shard = [
            sum(len(result[name][2]) for name, home in index["weight_map"].items() if home == shard) for shard in shards
        ]
        assert max(per_shard) <= limit
    assert tensor_bytes(out) == tensor_bytes(moeprune.apply(base, plan, tmp_path / "again"))
    assert moeprune.verify(base, out).nbytes == sum(len(data) for _, _, data in tensor_bytes(out).values())
    _, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))


# --- what a plan may not do -------------------------------------------------------------------------------------------


def test_layers_that_keep_different_numbers_are_refused(
    checkpoint_of: CheckpointOf, plan_by_hand: PlanByHand, tmp_path: Path
) -> None:
    """No stock engine loads per-layer expert counts."""
    base = checkpoint_of("qwen3_moe")
    plan, other = plan_by_hand(base, 8), plan_by_hand(base, 6)
    mixed = dataclasses.replace(plan, layers=dict(plan.layers) | {2: other.layers[2]})
    with pytest.raises(PlanError, match=r"different numbers of experts: \[6, 8\]"):
        moeprune.apply(base, mixed, tmp_path / "out")
    assert not any(tmp_path.iterdir())


def test_code_that_comes_with_a_checkpoint_is_never_run(
    checkpoint_of: CheckpointOf, plan_by_hand: PlanByHand, tmp_path: Path
) -> None:
    """Planning, applying and verifying copy it; only loading the model could run it."""
    base, marker = tmp_path / "base", tmp_path / "it ran"
    shutil.copytree(checkpoint_of("qwen3_moe"), base)
    text = (base / "config.json").read_text()
    code = {"AutoConfig": "modeling_x.Config", "AutoModelForCausalLM": "modeling_x.Model"}
    (base / "config.json").write_text(text.replace("{", f'{{"auto_map": {json.dumps(code)},', 1))
    for name in ("modeling_x.py", "__init__.py", "conftest.py"):
        (base / name).write_text(f"open({str(marker)!r}, 'w')\n")
    moeprune.plan(moeprune.collect(base), base, ratio=0.5, strategy="random")
    out = moeprune.apply(base, plan_by_hand(base, 8), tmp_path / "out")
    moeprune.verify(base, out)
    assert (out / "modeling_x.py").read_bytes() == (base / "modeling_x.py").read_bytes()
    assert not marker.exists()


# --- what verify finds ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def written(checkpoint_of: CheckpointOf, plan_by_hand: PlanByHand, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pruned checkpoint in several shards; copy it before changing it."""
    base = checkpoint_of(GROUPED)
    return moeprune.apply(
        base, plan_by_hand(base, 8), tmp_path_factory.mktemp("written") / "out", max_shard_size=60_000
    )


@pytest.fixture
def damaged(written: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(written, tmp_path / "out"))


@pytest.mark.parametrize(
    "name",
    [
        "model.embed_tokens.weight",
        "model.norm.weight",
        "model.layers.0.mlp.gate_proj.weight",
        "model.layers.1.mlp.experts.7.down_proj.weight",
        "model.layers.1.mlp.gate.weight",
        "model.layers.2.mlp.gate.e_score_correction_bias",
        "model.layers.2.mlp.shared_experts.up_proj.weight",
        "model.layers.3.mlp.experts.0.gate_proj.weight",
        "model.layers.3.eh_proj.weight",
    ],
)
def test_verify_finds_a_flipped_bit(name: str, damaged: Path, checkpoint_of: CheckpointOf) -> None:
    """One bit in the middle of any tensor is found, and the message names the tensor."""
    entry = moeprune.open_checkpoint(damaged).tensors[name]
    data = bytearray(entry.file.read_bytes())
    data[(entry.begin + entry.end) // 2] ^= 1
    entry.file.write_bytes(data)
    with pytest.raises(CheckpointError, match=f"tensor '{name}' differs from the source"):
        moeprune.verify(checkpoint_of(GROUPED), damaged)


def test_verify_finds_swapped_experts(damaged: Path, checkpoint_of: CheckpointOf) -> None:
    """Two experts of one layer in each other's place are found, though all bytes are there."""
    tensors = moeprune.open_checkpoint(damaged).tensors
    for part in ("gate_proj", "up_proj", "down_proj"):
        first, second = (tensors[f"model.layers.1.mlp.experts.{expert}.{part}.weight"] for expert in (2, 5))
        blocks = [entry.file.read_bytes()[entry.begin : entry.end] for entry in (first, second)]
        for entry, block in zip((second, first), blocks, strict=True):
            with entry.file.open("r+b") as handle:
                handle.seek(entry.begin)
                handle.write(block)
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.experts\.[25]\.\w+\.weight' differs"):
        moeprune.verify(checkpoint_of(GROUPED), damaged)


@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.1.mlp.experts.7.down_proj.weight"])
def test_verify_finds_a_missing_tensor(name: str, damaged: Path, checkpoint_of: CheckpointOf) -> None:
    """A tensor that the shard and the index both lack is found by name."""
    from safetensors.torch import load_file, save_file

    index = json.loads((damaged / INDEX).read_text())
    shard = damaged / index["weight_map"].pop(name)
    tensors = load_file(shard)
    del tensors[name]
    save_file(tensors, shard, metadata={"format": "pt"})
    (damaged / INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=f"'{name}' is missing"):
        moeprune.verify(checkpoint_of(GROUPED), damaged)


def test_verify_finds_another_dtype(damaged: Path, checkpoint_of: CheckpointOf) -> None:
    """The same bytes under another dtype are found."""
    shard = moeprune.open_checkpoint(damaged).tensors["lm_head.weight"].file
    shard.write_bytes(shard.read_bytes().replace(b'"F32"', b'"I32"'))
    with pytest.raises(CheckpointError, match=r"is I32 .*, should be F32"):
        moeprune.verify(checkpoint_of(GROUPED), damaged)


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("config.json", '"n_routed_experts": 8', '"n_routed_experts": 16'),
        ("config.json", '"num_experts_per_tok": 3', '"num_experts_per_tok": 2'),
        ("config.json", "10000.0", "10000"),
        ("tokenizer_config.json", "128", "129"),
        ("LICENSE", "a licence", "no licence"),
    ],
)
def test_verify_finds_a_changed_file(file: str, old: str, new: str, damaged: Path, checkpoint_of: CheckpointOf) -> None:
    """A changed value of the config and a changed file beside it are found, and the message names the file."""
    text = (damaged / file).read_text()
    assert old in text
    (damaged / file).write_text(text.replace(old, new))
    with pytest.raises(CheckpointError, match=f"{file} is not what the source and the plan give"):
        moeprune.verify(checkpoint_of(GROUPED), damaged)
    (damaged / file).unlink()
    with pytest.raises(CheckpointError, match=f"{file} is missing"):
        moeprune.verify(checkpoint_of(GROUPED), damaged)


def test_verify_finds_stray_weights(damaged: Path, checkpoint_of: CheckpointOf) -> None:
    """A weight file that no index names could be loaded by an engine that takes every file."""
    shutil.copy(next(damaged.glob("*.safetensors")), damaged / "old.safetensors")
    with pytest.raises(CheckpointError, match=r"old\.safetensors is no part of the checkpoint"):
        moeprune.verify(checkpoint_of(GROUPED), damaged)


def test_verify_finds_a_changed_record(damaged: Path, checkpoint_of: CheckpointOf) -> None:
    """A manifest that says something else and a plan that keeps others do not pass, nor does a folder without them."""
    base, manifest, plan = checkpoint_of(GROUPED), damaged / "moeprune/manifest.json", damaged / "moeprune/plan.json"
    good = manifest.read_text()
    digest = json.loads(good)["tensors"]["lm_head.weight"]
    manifest.write_text(good.replace(digest, digest[::-1]))
    with pytest.raises(CheckpointError, match=r"lm_head\.weight' is not what the manifest says"):
        moeprune.verify(base, damaged)
    manifest.write_text(good)
    moeprune.verify(base, damaged)
    edited = json.loads(plan.read_text())
    kept = edited["layers"]["1"]["keep"]
    edited["layers"]["1"]["keep"] = sorted(set(range(16)) - set(kept))
    plan.write_text(json.dumps(edited))
    with pytest.raises(CheckpointError, match=r"layers\.1\..* differs"):
        moeprune.verify(base, damaged)
    plan.unlink()
    with pytest.raises(ArtifactError, match=r"cannot read .*plan\.json"):
        moeprune.verify(base, damaged)
