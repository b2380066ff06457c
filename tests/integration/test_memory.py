"""Memory of a rewrite, measured in processes of their own on the checkpoints of ``benchmarks/rewrite.py``."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
PER_TENSOR = 1000  # bytes
SCALED = [("weight", "F8_E4M3", (8, 8)), ("weight_scale_inv", "F32", (1, 1))]


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    """The script."""
    spec = importlib.util.spec_from_file_location("rewrite_benchmark", ROOT / "benchmarks" / "rewrite.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def least(benchmark: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> float:
    """Peak memory of a rewrite of next to nothing: Python and what it imports."""
    return peak(benchmark, benchmark.deepseek(2, 16, SCALED, 1), tmp_path_factory.mktemp("few"))


def peak(benchmark: ModuleType, made: tuple[dict[str, Any], list[Any]], work: Path) -> float:
    """Most bytes resident in a rewrite of a checkpoint of this config and these tensors by shard."""
    source, plan = work / "base", work / "plan.json"
    benchmark.build(source, *made)
    benchmark.random_half(source, plan)
    taken: dict[str, float] = benchmark.run("moeprune apply", source, plan, work / "out")
    return taken["rss"]


def test_each_tensor_costs_less_than_a_kilobyte(benchmark: ModuleType, least: float, tmp_path: Path) -> None:
    """Names, places and digests of some 25,000 tensors are held, and little else."""
    config, shards = benchmark.deepseek(17, 256, SCALED, 8)
    count = sum(map(len, shards))
    assert count > 20_000
    assert peak(benchmark, (config, shards), tmp_path) - least < PER_TENSOR * count


def test_the_size_of_tensors_does_not_matter(benchmark: ModuleType, least: float, tmp_path: Path) -> None:
    """80 MB of tensors pass through a buffer of a quarter of one."""
    most = peak(benchmark, benchmark.qwen3(small=True), tmp_path)
    assert sum(file.stat().st_size for file in (tmp_path / "base").glob("*.safetensors")) > 70e6
    assert most - least < 5e6
