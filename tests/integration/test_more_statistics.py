"""Facts of the weights and the statistics that are collected when asked for, against loops by hand."""

from __future__ import annotations

import copy
import dataclasses
import importlib.metadata
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, ClassVar, cast

import numpy as np
import pytest

import moeprune
import moeprune.collecting
import moeprune.collectors.stream
from moeprune import catalogue
from moeprune._options import CalibrationOptions
from moeprune.architectures import ARCHITECTURES
from moeprune.catalogue import FACTS, MORE, ROWS, STATISTICS, requested
from moeprune.cli import run
from moeprune.collectors.weights import Loader, facts_of, sizes_of, step_of
from moeprune.errors import ArtifactError, ConfigError, MoePruneError, StrategyError, UnsupportedModelError
from moeprune.experts import expert_layers
from moeprune.statistics import Statistic, added

if TYPE_CHECKING:
    import torch
    from _pytest.fixtures import FixtureRequest as Request
    from numpy.typing import NDArray
    from transformers import PreTrainedModel

    from moeprune.collectors.measures import Slots

CheckpointOf = Callable[..., Path]
ModelOf = Callable[..., "PreTrainedModel"]
Batch = dict[str, Any]
Arrays = dict[str, "NDArray[Any]"]
FAMILIES = pytest.mark.parametrize("model_type", ["qwen3_moe", "glm4_moe", "deepseek_v3", "gpt_oss"])
HOW = pytest.mark.parametrize("how", ["resident", "streamed", "chunked"])
SIZES = {"batch_tokens": 128}  # several batches per domain


@pytest.fixture
def five_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers are run with five of their experts in memory at a time."""
    arranged = moeprune.collecting.arrange

    def arrange(stream: Any, *given: Any, **named: Any) -> Any:
        expected = arranged(stream, *given, **named)
        stream.chunk = 5
        return expected

    monkeypatch.setattr(moeprune.collecting, "arrange", arrange)


def close(found: Arrays, expected: Arrays, tolerance: float = 1e-5) -> None:
    """Integers equal, the others close, of the same shapes."""
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert found[name].shape == array.shape, name
        if name.endswith("_hist"):  # a value beside an edge may fall on its other side
            assert found[name].sum() == array.sum(), name
            assert np.abs(np.cumsum(found[name] - array, axis=-1)).max() <= 3, name
        elif found[name].dtype.kind == "i":
            np.testing.assert_array_equal(found[name], array, err_msg=name)
        else:
            scale = np.abs(array).max(initial=0)
            np.testing.assert_allclose(found[name], array, rtol=tolerance, atol=tolerance * scale, err_msg=name)


# --- facts of the weights ---------------------------------------------------------------------------------------------


def facts_by_hand(model: PreTrainedModel, layer: int) -> Arrays:
    """From loops over experts in float64; gpt-oss keeps inputs first, and gate and up in turn."""
    experts = model.model.layers[layer].mlp.experts
    rows: dict[str, list[Any]] = {name: [] for name in FACTS}
    for both, down in zip(experts.gate_up_proj.detach().double(), experts.down_proj.detach().double(), strict=True):
        if hasattr(experts, "gate_up_proj_bias"):
            matrices = both[:, ::2].T, both[:, 1::2].T, down.T
        else:
            matrices = both[: len(both) // 2], both[len(both) // 2 :], down
        gate, up, down_HI = (matrix.abs().numpy() for matrix in matrices)
        rows["gate_col_l1"].append(gate.sum(axis=0))
        rows["up_col_l1"].append(up.sum(axis=0))
        rows["down_col_l1"].append(down_HI.sum(axis=0))
        rows["weight_abs_sum"].append(gate.sum() + up.sum() + down_HI.sum())
        rows["weight_sq_sum"].append((gate**2).sum() + (up**2).sum() + (down_HI**2).sum())
        rows["weight_numel"] = [gate.size + up.size + down_HI.size]
    return {name: np.array(values if name != "weight_numel" else values[0]) for name, values in rows.items()}


@FAMILIES
def test_facts_of_the_weights_equal_the_loop(model_type: str, model_of: ModelOf, checkpoint_of: CheckpointOf) -> None:
    """Without any data they are read from the files, and a strategy finds them as they are, domains or not."""
    model = model_of(model_type)
    collected = moeprune.collect(checkpoint_of(model_type))
    assert collected.facts.keys() == collected.layers.keys() == {layer.index for layer in expert_layers(model)}
    for layer, facts in collected.facts.items():
        close(dict(facts), facts_by_hand(model, layer))
        np.testing.assert_array_equal(collected.layer(layer).up_col_l1, facts["up_col_l1"])
    with pytest.raises(StrategyError, match="no 'count' for layer"):
        collected.layer(min(collected.layers)).count  # noqa: B018


@HOW
@pytest.mark.parametrize("model_type", ["qwen3_moe", "gpt_oss"])
def test_facts_do_not_depend_on_how_the_model_runs(
    model_type: str, how: str, checkpoint_of: CheckpointOf, ids_file: Path, tmp_path: Path, request: Request
) -> None:
    """Loaded whole, layer by layer, or without any data they are equal to the bit, and so they are in the file."""
    base = checkpoint_of(model_type)
    if how == "chunked":
        request.getfixturevalue("five_experts")
    collected = moeprune.collect(base, tmp_path / "s", calibration=str(ids_file), **SIZES, stream=how != "resident")
    loaded = moeprune.RouterStatistics.load(tmp_path / "s")
    assert loaded.to_bytes() == collected.to_bytes()
    for layer, facts in moeprune.collect(base).facts.items():
        assert loaded.facts[layer].keys() == facts.keys() == FACTS.keys()
        for name, array in facts.items():
            np.testing.assert_array_equal(loaded.facts[layer][name], array, strict=True)


def test_facts_of_some_experts_at_a_time(model_of: ModelOf, monkeypatch: pytest.MonkeyPatch) -> None:
    """Read in chunks of which the last is smaller, they are the same."""
    experts = expert_layers(model_of("qwen3_moe"))[0].experts
    chunks: list[range] = []

    def read(chunk: range) -> dict[str, Any]:
        chunks.append(chunk)
        return {name: value[chunk.start : chunk.stop] for name, value in experts.named_parameters()}

    size = sum(value.numel() * 4 for value in experts.parameters())
    monkeypatch.setattr("moeprune.collectors.weights._BYTES", size * 5 // 16)
    close(facts_of(experts, loader=Loader(read=read, step=step_of(experts))), facts_of(experts), 0)
    assert [len(chunk) for chunk in chunks] == [5, 5, 5, 1]


def test_quantised_weights_are_described_by_their_numbers(checkpoint_of: CheckpointOf, tmp_path: Path) -> None:
    """Of an FP8 checkpoint the facts are those of the dequantised weights, which another checkpoint holds plainly."""
    import torch
    from safetensors.torch import load_file, save_file

    base = checkpoint_of("qwen3_moe")
    tensors = {name: tensor for file in base.glob("*.safetensors") for name, tensor in load_file(file).items()}
    config = json.loads((base / "config.json").read_text())
    method = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
    packed: dict[str, torch.Tensor] = {}
    plain = dict(tensors)
    for number, (name, tensor) in enumerate(tensors.items()):
        if ".experts." in name:
            packed[name], scale = tensor.to(torch.float8_e4m3fn), torch.full((1, 1), 0.5 + number % 7)
            packed[f"{name}_scale_inv"] = scale
            plain[name] = packed[name].float() * scale
    for folder, values, more in (("fp8", tensors | packed, {"quantization_config": method}), ("plain", plain, {})):
        (tmp_path / folder).mkdir()
        save_file(values, tmp_path / folder / "model.safetensors", metadata={"format": "pt"})
        (tmp_path / folder / "config.json").write_text(json.dumps(config | more))
    expected = moeprune.collect(tmp_path / "plain", dtype="float32").facts
    found = moeprune.collect(tmp_path / "fp8", dtype="float32").facts
    for layer, facts in expected.items():
        close(dict(found[layer]), dict(facts), 0)


def test_packed_weights_are_no_numbers(model_of: ModelOf) -> None:
    """Where a loaded model keeps its experts packed, their facts are not made up from the packed bytes."""
    import torch

    model = copy.deepcopy(model_of("qwen3_moe"))
    experts = expert_layers(model)[0].experts
    experts.down_proj = torch.nn.Parameter(experts.down_proj.to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(UnsupportedModelError, match="packed, as float8_e4m3fn"):
        facts_of(experts)
    with moeprune.observe(model, domains=("prose",)) as observation:
        observation.read_weights()
        found = observation.arrays()
    assert [bool(arrays.facts) for arrays in found.values()] == [False, True]


# --- statistics that are asked for, by hand ---------------------------------------------------------------------------


def batch_of(padding: str, *, rows: int = 3, length: int = 9, seed: int = 0) -> Batch:
    """Random token ids; with padding each row has its own length and a mask of which the padding side is 0."""
    import torch

    ids = torch.randint(1, 97, (rows, length), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    for row in range(1, rows if padding != "none" else 0):
        mask[row, slice(None, 2 * row) if padding == "left" else slice(length - 2 * row, None)] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


@contextmanager
def recorded(model: PreTrainedModel) -> Iterator[dict[int, dict[str, torch.Tensor]]]:
    """What experts and routers are given and give, and the stream before the norm, by layer of the last pass."""
    seen: dict[int, dict[str, torch.Tensor]] = {}
    hooks = []

    def note(layer: int, **values: torch.Tensor) -> None:
        seen.setdefault(layer, {}).update({name: value.detach() for name, value in values.items()})

    for index, decoder in enumerate(model.model.layers):
        if hasattr(decoder.mlp, "experts"):
            router = decoder.mlp.router if hasattr(decoder.mlp, "router") else decoder.mlp.gate
            hooks += [
                decoder.post_attention_layernorm.register_forward_pre_hook(
                    lambda _, args, at=index: note(at, stream=args[0].flatten(0, 1))
                ),
                decoder.mlp.experts.register_forward_pre_hook(
                    lambda _, args, at=index: note(at, hidden=args[0], index=args[1], gates=args[2])
                ),
                decoder.mlp.experts.register_forward_hook(lambda _, __, output, at=index: note(at, routed=output)),
                router.register_forward_hook(lambda _, __, output, at=index: note(at, logits=output[0])),
            ]
    yield seen
    for hook in hooks:
        hook.remove()


def run_by_hand(experts: Any, expert: int, hidden: torch.Tensor) -> tuple[NDArray[Any], NDArray[Any]]:
    """Inner activations and output of one expert for one token, in float64."""
    gate_up, down = experts.gate_up_proj[expert].detach().double(), experts.down_proj[expert].detach().double()
    if hasattr(experts, "gate_up_proj_bias"):
        both = hidden.double() @ gate_up + experts.gate_up_proj_bias[expert].detach()
        gate, up = both[::2].clamp(max=experts.limit), both[1::2].clamp(-experts.limit, experts.limit)
        inner = (up + 1) * gate / (1 + (-experts.alpha * gate).exp())
        return inner.numpy(), (inner @ down + experts.down_proj_bias[expert].detach()).numpy()
    gate, up = (gate_up @ hidden.double()).chunk(2)
    inner = gate / (1 + (-gate).exp()) * up
    return inner.numpy(), (down @ inner).numpy()


def sums_by_hand(model: PreTrainedModel, batches: Sequence[Batch]) -> dict[int, Arrays]:
    """Every statistic of MORE by layer, from loops over tokens, slots and pairs of layers."""
    import torch

    layers = [layer.index for layer in expert_layers(model)]
    experts_of = {layer: model.model.layers[layer].mlp.experts for layer in layers}
    experts = experts_of[layers[0]]
    sizes = sizes_of(experts)
    sums = {
        layer: {
            name: np.zeros(one.shape(sizes["E"], sizes), np.int64 if one.integer else np.float64)
            for name, one in MORE.items()
        }
        for layer in layers
    }
    for batch in batches:
        with recorded(model) as seen, torch.no_grad():
            model(**batch, use_cache=False)
        rows, length = batch["input_ids"].shape
        for row, place in np.ndindex(rows, length):
            if not batch["attention_mask"][row, place]:
                continue
            token = row * length + place
            for position, layer in enumerate(layers):
                own = {name: values[token] for name, values in seen[layer].items()}
                add_token(sums[layer], experts_of[layer], own)
                if position:
                    add_transition(sums[layer], seen[layers[position - 1]], own, token)
            if place + 1 < length and batch["attention_mask"][row, place + 1]:
                for last in seen[layers[-1]]["index"][token].tolist():
                    for first in seen[layers[0]]["index"][token + 1].tolist():
                        sums[layers[0]]["wrap_count"][last, first] += 1
    return sums


def add_token(sums: Arrays, experts: Any, token: dict[str, torch.Tensor]) -> None:
    """Add one token: how far the experts turn its residual stream, and its slots."""
    stream = token["stream"].double().numpy()
    outputs = {}
    for expert, gate in zip(token["index"].tolist(), token["gates"].tolist(), strict=True):
        inner, outputs[expert] = run_by_hand(experts, expert, token["hidden"])
        sums["gated_in_sq_sum"][expert] += (gate * token["hidden"].double().numpy()) ** 2
        sums["gated_mid_sq_sum"][expert] += (gate * inner) ** 2
        sums["gated_output_sum"][expert] += gate * outputs[expert]
    for expert in range(experts.num_experts):
        sums["output_sum_all"][expert] += run_by_hand(experts, expert, token["hidden"])[1]
    sums["logit_gram"] += np.outer(*[token["logits"].double().numpy()] * 2)
    gates = dict(zip(token["index"].tolist(), token["gates"].tolist(), strict=True))
    add_sketches(sums, sorted(gates.values(), reverse=True), [float(token["logits"][expert]) for expert in gates])
    after = stream + sum(gate * outputs[expert] for expert, gate in gates.items())
    turned = 1 - stream @ after / np.linalg.norm(stream) / np.linalg.norm(after)
    for expert, gate in gates.items():
        sums["easy_ep_sum"][expert] += max(turned, 0) * gate * np.linalg.norm(outputs[expert])


def add_sketches(sums: Arrays, gates: list[float], logits: list[float]) -> None:
    """Add one token's slots, its gates in descending order, to the histograms of 2048 bins."""
    for slot in range(1, len(gates)):
        sums["share_hist"][int(2048 * gates[slot] / sum(gates))] += 1
        sums["ratio_hist"][min(2047, int(2048 * gates[slot] / gates[0]))] += 1
        sums["mass_hist"][int(2048 * (1 - sum(gates[:slot]) / sum(gates)))] += 1
    for logit in logits:
        sums["score_hist"][int(1024 * (1 + logit / (1 + abs(logit))))] += 1


def add_transition(sums: Arrays, before: dict[str, torch.Tensor], now: dict[str, torch.Tensor], token: int) -> None:
    """Add the pairs of the experts of one token in two MoE layers that follow each other."""
    for first, one in zip(before["index"][token].tolist(), before["gates"][token].tolist(), strict=True):
        for second, other in zip(now["index"].tolist(), now["gates"].tolist(), strict=True):
            sums["transition_count"][first, second] += 1
            sums["transition_gate"][first, second] += one * other


def rows_by_hand(model: PreTrainedModel, batches: Sequence[Batch], paths: int) -> dict[int, Arrays]:
    """Every statistic of ROWS by layer, from loops over sequences, experts and tokens."""
    import torch

    found: dict[int, list[dict[str, Any]]] = {layer.index: [] for layer in expert_layers(model)}
    number = 0
    for batch in batches:
        with recorded(model) as seen, torch.no_grad():
            model(**batch, use_cache=False)
        length = batch["input_ids"].shape[1]
        for row in range(len(batch["input_ids"])):
            tokens = [row * length + place for place in range(length) if batch["attention_mask"][row, place]]
            for layer, record in seen.items() if number < paths else ():
                experts = model.model.layers[layer].mlp.experts
                own = {name: values[tokens] for name, values in record.items()}
                found[layer].append({"path_domain": 0, "path_row": number} | describe_by_hand(experts, own))
            number += 1
    return {layer: {name: np.array([row[name] for row in rows]) for name in ROWS} for layer, rows in found.items()}


def describe_by_hand(experts: Any, own: dict[str, torch.Tensor]) -> dict[str, Any]:
    """One sequence in one layer."""
    count, mass = experts.num_experts, own["gates"].double().sum(dim=1).numpy()
    outputs_TEH = np.stack(
        [[run_by_hand(experts, expert, hidden)[1] for expert in range(count)] for hidden in own["hidden"]]
    )
    full = np.zeros_like(outputs_TEH[:, 0])
    for token, (index, gates) in enumerate(zip(own["index"].tolist(), own["gates"].tolist(), strict=True)):
        for expert, gate in zip(index, gates, strict=True):
            full[token] += gate * outputs_TEH[token, expert]
    alone = full[:, None] - mass[:, None, None] * outputs_TEH
    return {
        "path_prob": own["logits"].double().softmax(dim=-1).mean(dim=0).numpy(),
        "path_norm": np.linalg.norm(outputs_TEH, axis=2).mean(axis=0),
        "path_loss": np.sqrt((alone**2).sum(axis=(0, 2))),
        "path_scale": np.linalg.norm(full),
    }


@pytest.mark.parametrize("padding", ["none", "left", "right"])
@FAMILIES
def test_everything_equals_the_loop(model_type: str, padding: str, model_of: ModelOf) -> None:
    """What is asked for, of every layer, with padding left out; the core sums and the logits do not change."""
    import torch

    model = model_of(model_type)
    batches = [batch_of(padding), batch_of(padding, rows=2, length=7, seed=1)]
    expected, rows = sums_by_hand(model, batches), rows_by_hand(model, batches, 4)
    with moeprune.observe(model) as core, torch.no_grad():
        plain = [model(**batch).logits for batch in batches]
    with moeprune.observe(model, statistics="all", paths=4) as observation, torch.no_grad():
        logits = [model(**batch).logits for batch in batches]
    result = observation.result()
    assert all(torch.equal(one, other) for one, other in zip(plain, logits, strict=True))
    for layer, arrays in result.layers.items():
        close({name: array[0] for name, array in arrays.items() if name in MORE}, expected[layer])
        close(dict(result.rows[layer]), rows[layer])
        for name in STATISTICS:
            np.testing.assert_array_equal(arrays[name], core.result().layers[layer][name], err_msg=name)
    first, *others = result.layers
    assert result.layers[first]["wrap_count"].any()
    assert not result.layers[first]["transition_count"].any()
    for layer in others:
        tokens, top_k = int(result.layers[layer]["tokens"].sum()), result.top_k
        assert result.layers[layer]["transition_count"].sum() == tokens * top_k**2
        assert not result.layers[layer]["wrap_count"].any()


@pytest.mark.parametrize("model_type", sorted(set(ARCHITECTURES) - {"qwen3_moe", "glm4_moe", "deepseek_v3", "gpt_oss"}))
def test_every_architecture(model_type: str, model_of: ModelOf) -> None:
    """The residual stream, the inner activations and the routes are found in every family."""
    import torch

    model, batch = model_of(model_type), batch_of("left")
    with moeprune.observe(model, statistics="all", paths=2) as observation, torch.no_grad():
        model(**batch)
    result = observation.result()
    expected, rows = sums_by_hand(model, [batch]), rows_by_hand(model, [batch], 2)
    for layer, arrays in result.layers.items():
        close({name: array[0] for name, array in arrays.items() if name in MORE}, expected[layer])
        close(dict(result.rows[layer]), rows[layer])


# --- how they are collected -------------------------------------------------------------------------------------------


def check_equal(found: moeprune.RouterStatistics, expected: moeprune.RouterStatistics, tolerance: float = 1e-6) -> None:
    """Sums, halves, rows and facts are the same, all there is of each."""
    assert (found.domains, found.sizes) == (expected.domains, expected.sizes)
    for part in ("layers", "first_half", "rows", "facts"):
        one, other = getattr(found, part), getattr(expected, part)
        assert one.keys() == other.keys(), part
        for layer, arrays in other.items():
            close(dict(one[layer]), dict(arrays), tolerance)


@HOW
@pytest.mark.parametrize("model_type", ["qwen3_moe", "deepseek_v3", "gpt_oss"])
def test_layer_by_layer_is_the_same(
    model_type: str, how: str, checkpoint_of: CheckpointOf, ids_file: Path, tmp_path: Path, request: Request
) -> None:
    """Collected as the model fits, from another order of calls, everything is what one observation sees."""
    import torch
    from transformers import AutoModelForCausalLM

    base = checkpoint_of(model_type)
    if how == "chunked":
        request.getfixturevalue("five_experts")
    options: dict[str, Any] = {"statistics": "all", "paths": 3, "stream": how != "resident"} | SIZES
    found = moeprune.collect(base, tmp_path / "s", calibration=str(ids_file), **options)
    assert moeprune.RouterStatistics.load(tmp_path / "s").to_bytes() == found.to_bytes()
    model = AutoModelForCausalLM.from_pretrained(base).eval()
    data = moeprune.load_calibration([str(ids_file)], base)
    numbers = dict.fromkeys(data.domains, -1)
    with (
        moeprune.observe(model, domains=sorted(set(data.domains)), statistics="all", paths=3) as observation,
        torch.no_grad(),
    ):
        for domain, ids in zip(data.domains, data.sequences, strict=True):
            numbers[domain] += 1
            with observation.batch(domain, numbers[domain] % 2):
                model(torch.tensor([ids]))
    check_equal(found, observation.result(), 1e-5)
    assert [len(arrays["path_row"]) for arrays in found.rows.values()] == [6] * len(found.layers)
    for layer, arrays in found.first_half.items():
        assert 0 < arrays["easy_ep_sum"].sum() < found.layers[layer]["easy_ep_sum"].sum()


@pytest.mark.parametrize("stream", [False, True], ids=["resident", "streamed"])
def test_slices_of_layers_make_the_whole(stream: bool, checkpoint_of: CheckpointOf, ids_file: Path) -> None:
    """Each slice knows what came before it, and the first one where the last layer's tokens go."""
    base = checkpoint_of("glm4_moe", num_hidden_layers=4)
    options: dict[str, Any] = {"calibration": str(ids_file), "statistics": "all", "stream": stream} | SIZES
    whole = moeprune.collect(base, **options)
    parts = [moeprune.collect(base, layers=layers, **options) for layers in ((1,), (2, 3))]
    check_equal(parts[0].merge(parts[1]), whole)


@pytest.mark.parametrize("lost", [1, 3, 4])
def test_a_resumed_run_gives_the_same_bytes(
    lost: int, checkpoint_of: CheckpointOf, ids_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed before some layer, or before the file is written, it goes on with all that was known then."""
    base = checkpoint_of("deepseek_v3", num_hidden_layers=4)
    options: dict[str, Any] = {"calibration": str(ids_file), "statistics": "all", "stream": True} | SIZES
    whole = moeprune.collect(base, tmp_path / "whole", **options)
    run_layer, ran = moeprune.collectors.stream._run_layer, []

    def die(stream: Any, index: int, *given: Any) -> None:
        if index == lost:
            raise KeyboardInterrupt
        ran.append(index)
        run_layer(stream, index, *given)

    def save(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(moeprune.collectors.stream, "_PACE", 0)
    monkeypatch.setattr(moeprune.collectors.stream, "_run_layer", die)
    with monkeypatch.context() as broken:
        broken.setattr(moeprune.RouterStatistics, "save", save)
        with pytest.raises(KeyboardInterrupt):
            moeprune.collect(base, tmp_path / "s", **options)
    assert ran == [*range(lost)]
    lost = -1
    assert moeprune.collect(base, tmp_path / "s", **options).to_bytes() == whole.to_bytes()
    assert ran == [*range(4)]


def test_processes_share_the_work(checkpoint_of: CheckpointOf, ids_file: Path) -> None:
    """What each process saw of its share of the batches adds up to the whole, rows in their places."""
    from moeprune.checkpoint import open_checkpoint
    from moeprune.collectors.more import Request as Asked
    from moeprune.collectors.resident import load_model, run_batches

    base = checkpoint_of("qwen3_moe")
    checkpoint, data = open_checkpoint(base), moeprune.load_calibration([str(ids_file)], base)
    model, domains = load_model(checkpoint), sorted(set(data.domains))
    asked = Asked(
        statistics=requested(["all"]), paths=3, sequences={name: data.domains.count(name) for name in domains}
    )
    batches = data.batches(128)
    shares = [
        run_batches(model, part, checkpoint, domains=domains, request=asked).arrays()
        for part in (batches, batches[::2], batches[1::2])
    ]

    def together(part: str, layer: int) -> dict[str, Any]:
        one, other = (getattr(share[layer], part) for share in shares[1:])
        return {name: added(name, one[name], other[name]) for name in one}

    for layer, arrays in shares[0].items():
        for part in ("total", "first_half", "rows"):
            close(together(part, layer), getattr(arrays, part), 1e-6)


def test_files_of_other_data_are_joined(checkpoint_of: CheckpointOf, ids_file: Path, tmp_path: Path) -> None:
    """Sums add up, rows come one after the other with the domains of the whole, and facts stay."""
    base = checkpoint_of("qwen3_moe")
    rows = [json.loads(line) for line in ids_file.read_text().splitlines()]
    files = []
    for domain in ("prose", "code"):
        files.append(tmp_path / f"{domain}.jsonl")
        files[-1].write_text("".join(json.dumps(row) + "\n" for row in rows if row["domain"] == domain))
    options: dict[str, Any] = {"statistics": "all", "paths": 2} | SIZES
    parts = [moeprune.collect(base, calibration=str(file), **options) for file in files]
    merged = parts[0].merge(parts[1])
    whole = moeprune.collect(base, calibration=[str(file) for file in files], **options)
    assert (merged.domains, whole.domains) == (("prose", "code"), ("code", "prose"))
    for layer, arrays in whole.rows.items():
        swapped = {name: np.roll(array, 2, axis=0) for name, array in arrays.items()}
        close(dict(merged.rows[layer]), swapped | {"path_domain": np.array([0, 0, 1, 1])}, 1e-6)
        close(dict(merged.facts[layer]), dict(whole.facts[layer]), 0)
        close({name: array[::-1] for name, array in merged.layers[layer].items()}, dict(whole.layers[layer]), 1e-6)
    core = moeprune.collect(base, calibration=str(files[0]), **SIZES)
    with pytest.raises(ArtifactError, match=r"do not hold the same statistics .*same --statistics"):
        core.merge(parts[1])
    halves = whole.halves()
    for layer in whole.rows:
        assert [half.rows[layer]["path_row"].tolist() for half in halves] == [[0, 0], [1, 1]]
        assert halves[1].layer(layer, {"prose": 0.0}).path_domain.tolist() == [0, 1]


# --- statistics of other packages -------------------------------------------------------------------------------------


def cubed(slots: Slots) -> torch.Tensor:
    """Sum of g³ by expert."""
    return slots.by_expert(slots.gates_TK**3)


PLUGINS = {
    "gate_cubed": Statistic(axes="E", meaning="sum of g³", measure=cubed),
    "largest_gate": Statistic(
        axes="E", meaning="largest g", merge="max", measure=lambda slots: slots.gates_TE.amax(dim=0)
    ),
    "top_logit": Statistic(
        axes="", meaning="sum of the largest logit", point="router", measure=lambda logits: logits.amax(dim=1).sum()
    ),
    "stream_sum": Statistic(
        axes="H", meaning="sum of the stream", point="residual", measure=lambda slots: slots.residual_TH.sum(dim=0)
    ),
    "down_peak": Statistic(
        axes="E", meaning="largest |w| of down", point="weights", measure=lambda expert: expert.down.abs().max()
    ),
}


@pytest.fixture
def published(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, object]]:
    """Another package publishes statistics; add to what it does."""
    objects: dict[str, object] = dict(PLUGINS)

    @dataclasses.dataclass(frozen=True)
    class Point:
        name: str
        value: str = "package.module:thing"
        dist: ClassVar[SimpleNamespace] = SimpleNamespace(name="package", version="1.0")

        def load(self) -> object:
            return objects[self.name]

    def entry_points(*, group: str) -> list[Point]:
        return [Point(name) for name in objects] if group == "moeprune.statistics" else []

    monkeypatch.setattr(importlib.metadata, "entry_points", entry_points)
    catalogue._published.cache_clear()
    yield objects
    catalogue._published.cache_clear()


@HOW
def test_statistics_of_other_packages(
    how: str,
    published: dict[str, object],
    model_of: ModelOf,
    checkpoint_of: CheckpointOf,
    ids_file: Path,
    tmp_path: Path,
    request: Request,
) -> None:
    """They are measured at every point, stored, merged, weighted by domain and read by a strategy, by their names."""
    import torch

    if how == "chunked":
        request.getfixturevalue("five_experts")
    base, model = checkpoint_of("qwen3_moe"), model_of("qwen3_moe")
    found = moeprune.collect(
        base, tmp_path / "s", calibration=str(ids_file), statistics=tuple(published), stream=how != "resident", **SIZES
    )
    loaded = moeprune.RouterStatistics.load(tmp_path / "s")
    assert loaded.to_bytes() == found.to_bytes()
    data = moeprune.load_calibration([str(ids_file)], base)
    weights = {"code": 2.0}
    sums = {layer: dict.fromkeys(PLUGINS, 0.0) for layer in loaded.layers}
    for domain, ids in zip(data.domains, data.sequences, strict=True):
        with recorded(model) as seen, torch.no_grad():
            model(torch.tensor([ids]))
        for layer, own in seen.items():
            factor = weights.get(domain, 1.0)
            gates_TE = torch.zeros(len(ids), 16).scatter_(1, own["index"], own["gates"]).double().numpy()
            sums[layer]["gate_cubed"] += factor * (gates_TE**3).sum(axis=0)
            sums[layer]["largest_gate"] = np.maximum(sums[layer]["largest_gate"], gates_TE.max(axis=0))
            sums[layer]["top_logit"] += factor * own["logits"].amax(dim=1).double().sum().numpy()
            sums[layer]["stream_sum"] += factor * own["stream"].double().sum(dim=0).numpy()
    for layer, expected in sums.items():
        down = model.model.layers[layer].mlp.experts.down_proj.detach().abs().amax(dim=(1, 2)).numpy()
        view = loaded.layer(layer, weights)
        close({name: getattr(view, name) for name in PLUGINS}, expected | {"down_peak": down})
    doubled = loaded.merge(loaded).layer(0)
    np.testing.assert_allclose(doubled.gate_cubed, 2 * loaded.layer(0).gate_cubed)
    np.testing.assert_array_equal(doubled.largest_gate, loaded.layer(0).largest_gate)


def test_a_file_needs_the_package_that_publishes_its_statistics(
    published: dict[str, object], model_of: ModelOf, tmp_path: Path
) -> None:
    """Without it the statistic is unknown, and so it is to whoever asks for it."""
    import torch

    with moeprune.observe(model_of("qwen3_moe"), statistics=("gate_cubed",)) as observation, torch.no_grad():
        model_of("qwen3_moe")(**batch_of("none"))
    observation.save(tmp_path / "s")
    published.clear()
    catalogue._published.cache_clear()
    with pytest.raises(ArtifactError, match=r"holds 'gate_cubed', a statistic of package 1.0, which is not installed"):
        moeprune.RouterStatistics.load(tmp_path / "s")
    with pytest.raises(ConfigError, match="there is no statistic 'gate_cubed'"):
        requested(["gate_cubed"])


@pytest.mark.parametrize(
    ("name", "wrong", "why"),
    [
        ("broken", cubed, "is no moeprune.Statistic"),
        ("broken", Statistic(axes="E", meaning=""), "has no function `measure`"),
        ("broken", Statistic(axes="E", meaning="", point="routes", measure=cubed), "has the point 'routes', where"),
        ("broken", Statistic(axes="SE", meaning="", measure=cubed), "has the axes 'SE', where E, H and I are offered"),
        (
            "broken",
            Statistic(axes="H", meaning="", point="weights", measure=cubed),
            "is of weights and its first axis is not E",
        ),
        ("broken", Statistic(axes="E", meaning="", merge=cast("Any", "mean"), measure=cubed), "merges by 'mean'"),
        ("not-a-name", PLUGINS["gate_cubed"], "has no name that strategies and files can use"),
        ("_hidden", PLUGINS["gate_cubed"], "has no name that strategies and files can use"),
        ("seed", PLUGINS["gate_cubed"], "has no name that strategies and files can use"),
    ],
)
def test_what_cannot_be_measured_is_refused(name: str, wrong: object, why: str, published: dict[str, object]) -> None:
    """An entry point must give a statistic that can be measured, stored and merged, under a name that can be read."""
    published[name] = wrong
    for names in ([name], ["all"]):
        with pytest.raises(ConfigError, match=rf"'{name}' of package 1.0 {why}.*\(.*package.module:thing: repair"):
            requested(names)


def test_arrays_of_another_shape_are_refused(published: dict[str, object], model_of: ModelOf) -> None:
    """A statistic that does not give what its axes say stops the run by its name."""
    import torch

    published["broken"] = Statistic(axes="EH", meaning="one axis is missing", measure=cubed)
    model = model_of("qwen3_moe")
    with (
        pytest.raises(ConfigError, match=r"'broken' gave an array of shape \(16,\), not of \(16, 32\)"),
        moeprune.observe(model, statistics=("broken",)),
        torch.no_grad(),
    ):
        model(**batch_of("none"))


def test_numbers_that_are_not_finite_are_refused(published: dict[str, object], model_of: ModelOf) -> None:
    """They would make a file that nobody can read, after hours."""
    import torch

    published["broken"] = Statistic(axes="E", meaning="log of 0", measure=lambda slots: slots.gates_TE.sum(dim=0).log())
    model = model_of("qwen3_moe")
    with (
        moeprune.observe(model, statistics=("broken",)) as observation,
        torch.no_grad(),
    ):
        model(input_ids=torch.tensor([[1, 2]]))
    with pytest.raises(MoePruneError, match="'broken' gave numbers that are not finite"):
        observation.result()


# --- what is asked for ------------------------------------------------------------------------------------------------


def test_names_that_are_asked_for() -> None:
    """All, the core, a statistic, one row for all rows, and what a strategy needs; in the order of files."""
    assert requested([]) == requested(["core"]) == requested(["gram", "weight_abs_sum"]) == ()
    assert requested(["all"]) == (*MORE, *ROWS)
    assert requested(["path_loss", "easy_ep_sum"]) == ("easy_ep_sum", *ROWS)
    settings = CalibrationOptions(statistics=("easy-ep", "gated_in_sq_sum", "reap"))
    assert settings.measured == ("easy_ep_sum", "gated_in_sq_sum")
    assert settings.canonical()["statistics"] == settings.measured
    assert "paths" not in settings.canonical()
    assert "statistics" not in CalibrationOptions().canonical()
    assert CalibrationOptions(statistics=("path_norm",)).canonical()["paths"] == 8
    with pytest.raises(ConfigError, match=r"'easy_ep' is neither a statistic nor a strategy .*easy_ep_sum"):
        CalibrationOptions(statistics=("easy_ep",)).canonical()
    with pytest.raises(ConfigError, match="--paths must be at least 1, not 0"):
        CalibrationOptions(paths=0).canonical()


def test_a_missing_statistic_says_how_to_get_it(checkpoint_of: CheckpointOf, ids_file: Path) -> None:
    """The hint names the option, and the plain statistics lack nothing that they had."""
    layer = moeprune.collect(checkpoint_of("qwen3_moe"), calibration=str(ids_file), **SIZES).layer(0)
    with pytest.raises(StrategyError, match=r"no 'easy_ep_sum' for layer 0 \(collect again with --statistics easy_ep"):
        layer.easy_ep_sum  # noqa: B018
    assert layer.weight_numel == 3 * 16 * 32


def test_a_residual_stream_that_cannot_be_found(model_of: ModelOf) -> None:
    """A block that is given something else than what a module beside it gave is refused by the statistic's name."""
    import torch

    model = copy.deepcopy(model_of("qwen3_moe"))
    model.model.layers[2].mlp.register_forward_pre_hook(lambda _, args: (args[0].clone(),))
    with (
        pytest.raises(UnsupportedModelError, match="easy_ep_sum cannot be measured in layer 2: no module gives"),
        moeprune.observe(model, statistics=("easy_ep_sum",)),
        torch.no_grad(),
    ):
        model(**batch_of("none"))


def test_training_counts_every_token_once(model_of: ModelOf) -> None:
    """Under gradient checkpointing, where layers run twice, the sums are those of one pass; gradients are the same."""
    import torch

    def step(model: PreTrainedModel) -> dict[str, torch.Tensor]:
        model.train()
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model(**batch_of("left"), labels=batch_of("left")["input_ids"], use_cache=False).loss.backward()
        return {name: value.grad for name, value in model.named_parameters() if value.grad is not None}

    model = copy.deepcopy(model_of("glm4_moe"))
    plain = step(copy.deepcopy(model))
    with moeprune.observe(model, statistics="all", paths=2) as observation:
        observed = step(model)
    for name, gradient in plain.items():
        torch.testing.assert_close(observed[name], gradient, rtol=1e-4, atol=1e-6, msg=name)
    result, expected = observation.result(), sums_by_hand(model_of("glm4_moe"), [batch_of("left")])
    for layer, arrays in result.layers.items():
        close({name: array[0] for name, array in arrays.items() if name in MORE}, expected[layer])


def test_slices_of_the_tokens_change_nothing(model_of: ModelOf) -> None:
    """However few rows run at a time."""
    import torch

    model, batch = model_of("gpt_oss"), batch_of("right")
    with moeprune.observe(model, statistics="all") as observation, torch.no_grad():
        observation.slot_rows = 14  # four tokens of top-3
        model(**batch)
    expected = sums_by_hand(model, [batch])
    for layer, arrays in observation.result().layers.items():
        close({name: array[0] for name, array in arrays.items() if name in MORE}, expected[layer])


def test_the_command_line_asks(checkpoint_of: CheckpointOf, ids_file: Path, tmp_path: Path) -> None:
    """``collect`` takes statistics and strategies by name, and refuses a slip before any work."""
    base, file = str(checkpoint_of("qwen3_moe")), tmp_path / "s.safetensors"
    command = [
        "collect",
        base,
        "-o",
        str(file),
        "--calibration",
        str(ids_file),
        "--batch-tokens",
        "128",
        "--paths",
        "2",
    ]
    assert run([*command, "--statistics", "easy-ap"]) == 2
    assert not file.exists()
    assert run([*command, "--statistics", "easy-ep,path_norm"]) == 0
    found = moeprune.RouterStatistics.load(file)
    assert [name for name in found.layers[0] if name not in STATISTICS] == ["easy_ep_sum"]
    assert found.rows[0]["path_norm"].shape == (4, 16)
    assert (found.command["statistics"], found.command["paths"]) == (["easy_ep_sum", *ROWS], 2)


def test_prune_collects_what_its_strategy_needs(checkpoint_of: CheckpointOf, ids_file: Path, tmp_path: Path) -> None:
    """A strategy over weights alone runs without data, and one that draws does not make anybody read the weights."""
    base, options = checkpoint_of("qwen3_moe"), {"ratio": 0.5, "guard": False} | SIZES
    found = moeprune.prune(base, tmp_path / "a", strategy="easy-ep", calibration=str(ids_file), **options).statistics
    assert found is not None
    assert [name for name in found.layers[0] if name not in STATISTICS] == ["easy_ep_sum"]
    weights = moeprune.prune(base, tmp_path / "b", strategy="aimer", **options).statistics
    drawn = moeprune.prune(base, tmp_path / "c", strategy="random", **options).statistics
    assert [part.facts.keys() for part in (weights, drawn) if part is not None] == [{0: 0, 2: 0}.keys(), {}.keys()]


def test_models_that_cannot_be_built_are_collected_without_facts(
    checkpoint_of: CheckpointOf, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where transformers does not know the model a file of no data still comes about, and a note says what it lacks."""
    found = moeprune.collect(checkpoint_of("kimi_k2"))
    assert (found.facts, found.sizes) == ({}, {})
    assert "what the weights alone say is left out" in capsys.readouterr().err


def test_launched_processes_give_the_statistics_of_one(
    checkpoint_of: CheckpointOf, ids_file: Path, tmp_path: Path
) -> None:
    """Two processes that share the batches write what one would: rows of both, and the facts once."""
    base = checkpoint_of("qwen3_moe")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    options = ["--batch-tokens", "128", "--statistics", "all", "--paths", "3", "--stream"]
    command = [sys.executable, "-m", "moeprune", "collect", str(base), "-o", "two", "--calibration", str(ids_file)]
    shared = os.environ | {"OMP_NUM_THREADS": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    running = [
        subprocess.Popen([*command, *options], cwd=tmp_path, env=shared | {"RANK": rank}, stderr=subprocess.PIPE)
        for rank in ("0", "1")
    ]
    said = [process.communicate(timeout=120)[1] for process in running]
    assert [process.returncode for process in running] == [0, 0], said
    alone = moeprune.collect(base, calibration=str(ids_file), statistics="all", paths=3, stream=True, **SIZES)
    check_equal(moeprune.RouterStatistics.load(tmp_path / "two"), alone)
