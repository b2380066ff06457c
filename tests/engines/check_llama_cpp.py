"""Pruned checkpoints in llama.cpp: converted by its own converter, run, and compared with transformers.

``make test-engines`` builds llama.cpp once and runs this file. Its name keeps it out of ``make test``.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import moeprune
from moeprune.architectures import ARCHITECTURES
from moeprune.engines import engine_verdicts
from moeprune.pipeline import BUNDLED

HERE = Path(__file__).parent
ENGINES = HERE.parents[1] / "build" / "engines"
TRAINED = {
    "qwen3_moe": BUNDLED / "model",
    "glm4_moe": HERE.parent / "fixtures" / "glm4_moe",
    "deepseek_v3": HERE.parent / "fixtures" / "deepseek_v3",
}
RANDOM_T = np.random.default_rng(5).integers(0, 97, 32)  # token ids
TOLERANCE = 1e-4  # of the norm; float32 on both sides gives under 1e-5

# Where llama.cpp reads a key that all public files of a family have and random ones lack, or takes only their shapes.
_SIGMOID = {"scoring_func": "sigmoid"}
_PLAIN_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_YARN = {  # llama.cpp rounds the corner dimensions, which the public config forbids
    "rope_type": "yarn",
    "rope_theta": 150000.0,
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "original_max_position_embeddings": 4096,
    "truncate": True,
}
_DSA = _SIGMOID | {"index_head_dim": 64, "index_topk": 64}
_SECTIONS = {"partial_rotary_factor": 0.5, "mrope_section": [2, 1, 1], "mrope_interleaved": True}
_MROPE = {"head_dim": 16, "rope_parameters": _PLAIN_ROPE | _SECTIONS}
CHANGES: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"mlp_only_layers": []},
    "qwen2_moe": {"norm_topk_prob": False},
    "olmoe": {"num_key_value_heads": 4},
    "glm4_moe_lite": _SIGMOID,
    "glm_moe_dsa": _DSA,
    "deepseek_v3": _SIGMOID,
    "deepseek_v32": _DSA,
    "kimi_k2": _SIGMOID,
    "qwen3_5_moe": _MROPE,
    "qwen3_5_moe_text": _MROPE,
    "minimax_m2": _SIGMOID | {"rotary_dim": 4, "rope_parameters": _PLAIN_ROPE | {"partial_rotary_factor": 0.5}},
    "gpt_oss": {"rope_parameters": _YARN},
    "ernie4_5_moe": {"intermediate_size": 32},
}
FAMILIES = [name for name, spec in ARCHITECTURES.items() if "llama.cpp" in spec.engines]
WITH_MTP = ["glm4_moe", "glm4_moe_lite", "glm_moe_dsa", "deepseek_v3", "deepseek_v32", "qwen3_next", "qwen3_5_moe"]

Tensors = dict[str, Any]
CheckpointOf = Callable[..., Path]
PlanByHand = Callable[..., moeprune.PruningPlan]


def llama_cpp() -> Path:
    """The sources of llama.cpp that ``make test-engines`` unpacked and built."""
    return next(ENGINES.glob("llama_cpp_python-*")) / "vendor" / "llama.cpp"


def run(script: str, *arguments: Path | str) -> subprocess.CompletedProcess[str]:
    """One of the two programs beside this file."""
    command = [sys.executable, str(HERE / script), *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": str(ENGINES / "site")}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


def relative(found_TV: np.ndarray, expected_TV: np.ndarray) -> float:
    """Norm of the difference over the norm."""
    return float(np.linalg.norm(found_TV - expected_TV) / np.linalg.norm(expected_TV))


@dataclass(frozen=True, slots=True, kw_only=True)
class Engines:
    """Both engines, and where their files and results go."""

    workspace: Path
    loadable: Callable[[Path], Path]
    capsys: pytest.CaptureFixture[str]

    def convert(self, folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
        """Convert to GGUF."""
        return run("to_gguf.py", llama_cpp(), folder, self.workspace / f"{folder.name}.gguf", *options)

    def decode(self, folder: Path, ids_T: np.ndarray) -> subprocess.CompletedProcess[str]:
        """Load what :meth:`convert` made and save the logits."""
        np.save(self.workspace / "ids.npy", ids_T)
        files = (self.workspace / name for name in (f"{folder.name}.gguf", "ids.npy", f"{folder.name}.npy"))
        return run("run_gguf.py", *files)

    def llama_cpp(self, folder: Path, ids_T: np.ndarray, *options: str) -> np.ndarray:
        """Logits of llama.cpp, [T, V]."""
        converted = self.convert(folder, *options)
        assert converted.returncode == 0, converted.stderr[-2000:]
        decoded = self.decode(folder, ids_T)
        assert decoded.returncode == 0, decoded.stderr[-2000:]
        return np.load(self.workspace / f"{folder.name}.npy")

    def transformers(self, folder: Path, ids_T: np.ndarray) -> np.ndarray:
        """Logits of transformers in float32, [T, V]."""
        import torch
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(self.loadable(folder), dtype=torch.float32).eval()
        with torch.no_grad():
            return model(torch.tensor(ids_T)[None]).logits[0].numpy()

    def compare(
        self, label: str, base: Path, pruned: Path, ids_T: np.ndarray, *options: str, tolerance: float = TOLERANCE
    ) -> None:
        """Both engines agree on both checkpoints, and the checkpoints differ by far more than the engines do."""
        answers = [
            (self.llama_cpp(folder, ids_T, *options), self.transformers(folder, ids_T)) for folder in (base, pruned)
        ]
        line = f"\n{label:<28}"
        for kind, (found_TV, expected_TV) in zip(("unpruned", "pruned"), answers, strict=True):
            error, largest = relative(found_TV, expected_TV), np.abs(found_TV - expected_TV).max()
            same = (found_TV.argmax(-1) == expected_TV.argmax(-1)).mean()
            line += f"  {kind}: max |diff| {largest:.1e}, relative {error:.1e}, top-1 {same:.0%}"
            assert error < tolerance, line
            assert same == 1, line
        assert relative(answers[1][0], answers[0][1]) > 20 * tolerance
        with self.capsys.disabled():
            print(line, end=" ")  # noqa: T201 - the figures of the docs


@pytest.fixture
def engines(tmp_path: Path, loadable: Callable[[Path], Path], capsys: pytest.CaptureFixture[str]) -> Engines:
    """Both engines, with a folder of this test's own."""
    return Engines(workspace=tmp_path, loadable=loadable, capsys=capsys)


@pytest.fixture
def prune(checkpoint_of: CheckpointOf, plan_by_hand: PlanByHand, tmp_path: Path) -> Callable[..., tuple[Path, Path]]:
    """A random checkpoint that llama.cpp knows, and what is left of it."""

    def made(family: str, kept: int | None = None, *, mtp: bool = True, **changes: Any) -> tuple[Path, Path]:
        base = checkpoint_of(family, **CHANGES.get(family, {}) | changes)
        plan = plan_by_hand(base, kept or moeprune.open_checkpoint(base).num_experts // 2, mtp=mtp)
        return base, moeprune.apply(base, plan, tmp_path / "pruned")

    return made


# --- logits ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "kept"), [*((family, None) for family in FAMILIES), ("qwen2_moe", 7), ("qwen3_moe", 3), ("glm4_moe", 3)]
)
def test_pruned_model_computes_the_same(
    family: str, kept: int | None, prune: Callable[..., tuple[Path, Path]], engines: Engines
) -> None:
    """Half of the experts, a prime number or just top-k of them: llama.cpp and transformers give the same logits."""
    base, pruned = prune(family, kept)
    before, after = (moeprune.open_checkpoint(folder).num_experts for folder in (base, pruned))
    engines.compare(f"{family} {before} -> {after}", base, pruned, RANDOM_T)


@pytest.mark.parametrize("family", WITH_MTP)
def test_dropped_mtp_layers_are_not_missed(
    family: str, prune: Callable[..., tuple[Path, Path]], engines: Engines
) -> None:
    """Without its MTP layers a checkpoint converts and computes the same; Qwen's converter wants to be told."""
    base, pruned = prune(family, mtp=False)
    assert moeprune.open_checkpoint(base).mtp_layers
    assert not moeprune.open_checkpoint(pruned).mtp_layers
    told = ["--no-mtp"] if family.startswith("qwen") else []
    assert (engines.convert(pruned).returncode == 0) == (not told)
    engines.compare(f"{family}, MTP dropped", base, pruned, RANDOM_T, *told)


@pytest.mark.parametrize("family", TRAINED)
def test_trained_model_computes_the_same(
    family: str, plan_by_hand: PlanByHand, engines: Engines, tmp_path: Path
) -> None:
    """The trained models, in bf16 and on real text: the same."""
    from transformers import AutoTokenizer

    base = TRAINED[family]
    text = json.loads((BUNDLED / "heldout.jsonl").read_text(encoding="utf-8").splitlines()[0])["text"]
    ids_T = np.array(AutoTokenizer.from_pretrained(base)(text)["input_ids"][:64])
    kept = moeprune.open_checkpoint(base).num_experts // 2
    pruned = moeprune.apply(base, plan_by_hand(base, kept), tmp_path / "pruned")
    engines.compare(f"{family}, trained", base, pruned, ids_T)


# --- quantised ------------------------------------------------------------------------------------------------------


def rewritten(source: Path, target: Path, change: Callable[[Tensors], Tensors], method: dict[str, Any]) -> Path:
    """A copy of a checkpoint with other tensors in its files, and the name of their format in its config."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(source, target)
    index = json.loads((target / "model.safetensors.index.json").read_text())
    homes: dict[str, str] = {}
    for file in sorted(set(index["weight_map"].values())):
        tensors = change(load_file(target / file))
        save_file(tensors, target / file, metadata={"format": "pt"})
        homes |= dict.fromkeys(tensors, file)
    (target / "model.safetensors.index.json").write_text(json.dumps(index | {"weight_map": homes}))
    told = method | {"dequantize": True}  # heard by transformers, which has kernels for neither on a CPU
    config = json.loads((target / "config.json").read_text()) | {"quantization_config": told}
    (target / "config.json").write_text(json.dumps(config))
    return target


def block_fp8(tensors: Tensors) -> Tensors:
    """Linear weights as blocks of F8_E4M3, as DeepSeek-V3 is published; here each weight is one block."""
    import torch

    for name in [name for name in tensors if name.endswith("_proj.weight") and "kv_a_proj" not in name]:
        scale = tensors[name].abs().max() / 448
        tensors[name] = (tensors[name] / scale).to(torch.float8_e4m3fn)
        tensors[f"{name}_scale_inv"] = scale.reshape(1, 1)
    return tensors


def mxfp4(tensors: Tensors) -> Tensors:
    """Stacked experts as random MXFP4 blocks, as gpt-oss is published."""
    import torch

    random = torch.Generator().manual_seed(3)
    for name in [name for name in tensors if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        experts, inputs, outputs = tensors.pop(name).shape
        shape = (experts, outputs, inputs // 32)
        tensors[f"{name}_blocks"] = torch.randint(0, 256, (*shape, 16), generator=random, dtype=torch.uint8)
        tensors[f"{name}_scales"] = torch.randint(119, 123, shape, generator=random, dtype=torch.uint8)
    return tensors


def test_block_fp8_computes_the_same(
    checkpoint_of: CheckpointOf, plan_by_hand: PlanByHand, engines: Engines, tmp_path: Path
) -> None:
    """The converter dequantises a pruned block-FP8 DeepSeek-V3, scales and all, to what transformers makes of it."""
    method = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
    base = rewritten(checkpoint_of("deepseek_v3", **_SIGMOID), tmp_path / "base", block_fp8, method)
    pruned = moeprune.apply(base, plan_by_hand(base, 8), tmp_path / "pruned")
    engines.compare("deepseek_v3, block FP8", base, pruned, RANDOM_T)


def test_mxfp4_computes_the_same(
    checkpoint_of: CheckpointOf, plan_by_hand: PlanByHand, engines: Engines, tmp_path: Path
) -> None:
    """The converter repacks the blocks of a pruned gpt-oss; llama.cpp rounds what it multiplies them by to 8 bits."""
    source = checkpoint_of("gpt_oss", **CHANGES["gpt_oss"], intermediate_size=64)
    base = rewritten(source, tmp_path / "base", mxfp4, {"quant_method": "mxfp4"})
    pruned = moeprune.apply(base, plan_by_hand(base, 6), tmp_path / "pruned")
    engines.compare("gpt_oss, MXFP4", base, pruned, RANDOM_T, tolerance=2e-3)


# --- what must fail -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stated", [7, 9, 16])
def test_converter_refuses_a_wrong_count(
    stated: int, prune: Callable[..., tuple[Path, Path]], engines: Engines, tmp_path: Path
) -> None:
    """A config that counts one expert too few or too many, or was forgotten, is not converted."""
    _, pruned = prune("qwen3_moe")
    wrong = tmp_path / "wrong"
    shutil.copytree(pruned, wrong)
    config = json.loads((wrong / "config.json").read_text())
    assert config["num_experts"] == 8
    (wrong / "config.json").write_text(json.dumps(config | {"num_experts": stated}))
    done = engines.convert(wrong)
    assert done.returncode != 0
    assert "experts" in done.stderr.splitlines()[-1]


def test_groups_that_are_all_used_stop_llama_cpp(prune: Callable[..., tuple[Path, Path]], engines: Engines) -> None:
    """The verdict of the plan is llama.cpp's own: topk_group has to be under n_group."""
    base, pruned = prune("deepseek_v3", topk_group=4)
    verdicts = engine_verdicts(moeprune.open_checkpoint(base), 8)
    assert verdicts["llama.cpp"] == ("topk_group must be smaller than n_group",)
    assert engines.convert(pruned).returncode == 0
    done = engines.decode(pruned, RANDOM_T)
    assert done.returncode != 0
    assert "n_group_used < hparams.n_expert_groups" in done.stderr


@pytest.mark.parametrize(
    ("counts", "broken"),
    [
        ({"n_routed_experts": 8, "n_group": 3, "topk_group": 2}, "n_expert % hparams.n_expert_groups == 0"),
        ({"n_routed_experts": 4, "n_group": 4, "topk_group": 3}, "n_expert_groups < hparams.n_expert"),
    ],
)
def test_uneven_and_single_expert_groups_stop_llama_cpp(
    counts: dict[str, int], broken: str, checkpoint_of: CheckpointOf, engines: Engines
) -> None:
    """What a plan never makes of a group-limited model is what llama.cpp would not take."""
    folder = checkpoint_of("deepseek_v3", **_SIGMOID, **counts)
    assert engines.convert(folder).returncode == 0
    done = engines.decode(folder, RANDOM_T)
    assert done.returncode != 0
    assert broken in done.stderr
