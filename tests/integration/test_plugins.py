"""The example of a package with a statistic and a strategy, installed by pip, and packages that are broken."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import moeprune
from moeprune import catalogue
from moeprune._options import CalibrationOptions
from moeprune.cli import run
from moeprune.errors import ArtifactError, ConfigError, StrategyError
from moeprune.strategies import BUILTIN, resolve

CheckpointOf = Callable[..., Path]
Publish = Callable[..., None]
ROOT = Path(__file__).parents[2]
NAME, STATISTIC, PACKAGE = "projection", "projection_sum", "moeprune-projection 0.1.0"
SIZES: dict[str, Any] = {"batch_tokens": 128, "max_length": 32}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the example, which building it may write into."""
    return shutil.copytree(ROOT / "examples/moeprune-projection", tmp_path_factory.mktemp("source") / "package")


@pytest.fixture(scope="module")
def site(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that pip installed the example into."""
    target = tmp_path_factory.mktemp("site")
    options = ["--quiet", "--disable-pip-version-check", "--no-index", "--no-deps", "--no-build-isolation"]
    command = [sys.executable, "-m", "pip", "install", *options, "--target", str(target), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return target


@pytest.fixture
def publish(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Publish]:
    """Put a package on the path: its name, the code of its module, and its entry points by group."""

    def add(package: str, code: str, **groups: dict[str, str]) -> None:
        site = tmp_path / package
        info = site / f"{package}-1.0.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
        lines = [
            line
            for group, points in groups.items()
            for line in (f"[moeprune.{group}]", *(f"{name} = {package}:{value}" for name, value in points.items()))
        ]
        (info / "entry_points.txt").write_text("\n".join(lines))
        (site / f"{package}.py").write_text(code)
        monkeypatch.syspath_prepend(str(site))

    catalogue._published.cache_clear()
    yield add
    catalogue._published.cache_clear()


@pytest.fixture
def installed(site: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """The example is installed, until its path is taken away."""
    catalogue._published.cache_clear()
    monkeypatch.syspath_prepend(str(site))
    yield monkeypatch
    catalogue._published.cache_clear()


def uninstall(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Take the example away."""
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry != str(site)])
    catalogue._published.cache_clear()


# --- the example ------------------------------------------------------------------------------------------------------


def test_the_package_passes_its_own_tests(source: Path, site: Path) -> None:
    """The contract of strategies and the statistic against a slow computation, with what pip installed."""
    environment = os.environ | {"PYTHONPATH": str(site), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "error::UserWarning"]
    done = subprocess.run(command, cwd=source, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"^\d+ passed", done.stdout, flags=re.MULTILINE)


def test_it_uses_public_names_alone(source: Path) -> None:
    """What it imports is numpy, torch and names of the package that are there to stay."""
    code = (source / "src/moeprune_projection.py").read_text(encoding="utf-8")
    modules = set(re.findall(r"^\s*(?:from|import) ([\w.]+)", code, flags=re.MULTILINE))
    assert modules == {"__future__", "typing", "moeprune", "torch", "numpy", "numpy.typing"}
    for names in re.findall(r"from moeprune import (.*)", code):
        assert set(names.split(", ")) <= set(moeprune.__all__)


def test_one_collection_serves_it_like_a_built_in_one(
    installed: pytest.MonkeyPatch, checkpoint_of: CheckpointOf, ids_file: Path, tmp_path: Path
) -> None:
    """In memory or layer by layer, by the statistic's name or the strategy's, whole or merged, weighted by domain."""
    base = checkpoint_of("qwen3_moe")
    files = by_domain(ids_file, tmp_path)
    options: dict[str, Any] = {"calibration": [str(file) for file in files]} | SIZES
    whole = moeprune.collect(base, tmp_path / "s", statistics=STATISTIC, **options)
    streamed = moeprune.collect(base, statistics=NAME, stream=True, **options)
    parts = [moeprune.collect(base, **options | {"calibration": str(file), "statistics": NAME}) for file in files]
    merged = parts[0].merge(parts[1])
    assert whole.command["plug_ins"] == {STATISTIC: PACKAGE}
    for layer in whole.layers:
        expected = whole.layers[layer][STATISTIC]
        assert expected.shape == (2, 16)
        np.testing.assert_allclose(streamed.layers[layer][STATISTIC], expected, rtol=1e-4)
        np.testing.assert_allclose(merged.layer(layer).projection_sum, expected.sum(axis=0), rtol=1e-4)
        np.testing.assert_allclose(
            whole.layer(layer, {"code": 3.0}).projection_sum, (expected * [[3], [1]]).sum(axis=0), rtol=1e-12
        )
        # the parts of a length are no longer than what they are parts of
        assert (expected <= whole.layers[layer]["gated_norm_sum"] * (1 + 1e-6)).all()
    plans = [moeprune.plan(made, base, ratio=0.5, strategy=NAME) for made in (tmp_path / "s", streamed, merged)]
    assert len({tuple(layer.keep for layer in plan.layers.values()) for plan in plans}) == 1
    assert plans[0].strategy["package"] == PACKAGE
    assert plans[0].stability["median"] > 0
    prose = moeprune.plan(whole, base, ratio=0.5, strategy=NAME, weights={"code": 0.0})
    assert prose.layers != plans[0].layers


def test_one_command_collects_what_it_needs(
    installed: pytest.MonkeyPatch, site: Path, checkpoint_of: CheckpointOf, ids_file: Path, tmp_path: Path
) -> None:
    """And what came out can be read, verified and applied by whoever has not got the package."""
    base, out = str(checkpoint_of("qwen3_moe")), tmp_path / "out"
    options = ["--ratio", "0.5", "--strategy", NAME, "--batch-tokens", "128"]
    assert run(["prune", base, *options, "--calibration", str(ids_file), "-o", str(out)]) == 0
    plan_file = out / "moeprune/plan.json"
    assert moeprune.PruningPlan.load(plan_file).strategy["name"] == NAME
    assert STATISTIC in moeprune.RouterStatistics.load(out / "moeprune/statistics.safetensors").layers[0]
    uninstall(site, installed)
    assert run(["verify", base, str(out)]) == 0
    assert run(["apply", base, str(plan_file), "-o", str(tmp_path / "again")]) == 0


def test_without_the_package_its_file_names_it(
    installed: pytest.MonkeyPatch,
    site: Path,
    checkpoint_of: CheckpointOf,
    ids_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Reading a statistics file, also a merged one, says what to install; its strategy is unknown."""
    base, options = checkpoint_of("qwen3_moe"), {"calibration": str(ids_file)} | SIZES
    made = moeprune.collect(base, tmp_path / "s", statistics=NAME, **options)
    made.merge(made).save(tmp_path / "merged")
    moeprune.collect(base, tmp_path / "core", **options)
    uninstall(site, installed)
    for name in ("s", "merged"):
        with pytest.raises(ArtifactError, match=f"'{STATISTIC}', a statistic of {PACKAGE}, which is not installed"):
            moeprune.RouterStatistics.load(tmp_path / name)
    for command in (
        ["plan", str(tmp_path / "s"), str(base), "--ratio", "0.5", "--dry-run"],
        ["stats", "merge", str(tmp_path / "s"), str(tmp_path / "s"), "-o", str(tmp_path / "x")],
    ):
        capsys.readouterr()
        assert run(command) == 2
        assert capsys.readouterr().err.endswith("hint: install that package to read the file\n")
    with pytest.raises(StrategyError, match=f"unknown strategy '{NAME}'"):
        moeprune.plan(tmp_path / "core", base, ratio=0.5, strategy=NAME)
    with pytest.raises(ConfigError, match=f"'{NAME}' is neither a statistic nor a strategy"):
        moeprune.collect(base, statistics=NAME, **options)


def test_a_core_file_says_what_to_collect(
    installed: pytest.MonkeyPatch, checkpoint_of: CheckpointOf, ids_file: Path
) -> None:
    """The strategy is there, its statistic is not in the file."""
    base = checkpoint_of("qwen3_moe")
    core = moeprune.collect(base, calibration=str(ids_file), **SIZES)
    assert "plug_ins" not in core.command
    with pytest.raises(StrategyError, match=f"no '{STATISTIC}' for layer 0 .*--statistics {STATISTIC}"):
        moeprune.plan(core, base, ratio=0.5, strategy=NAME)


def test_hints_know_the_names_of_other_packages(installed: pytest.MonkeyPatch) -> None:
    """A slip in a plug-in's name is answered as one in a built-in name is."""
    with pytest.raises(StrategyError, match=f"did you mean '{NAME}'"):
        resolve("projektion")
    with pytest.raises(ConfigError, match=f"did you mean '{STATISTIC}'"):
        _ = CalibrationOptions(statistics=("projektion_sum",)).measured


def test_the_lists_have_it(site: Path, tmp_path: Path) -> None:
    """In a process of its own: with what it computes, what it needs and the package that it comes from."""
    strategies = listed("strategies", site, tmp_path)
    assert re.search(
        rf"^{NAME} +sum of the lengths .*\n +needs {STATISTIC}\n +from {PACKAGE}$", strategies, flags=re.MULTILINE
    )
    assert json.loads(listed("strategies", site, tmp_path, "--json"))[NAME] == {
        "summary": "sum of the lengths of gated outputs along the layer's output",
        "paper": "",
        "calibrated": True,
        "needs": [STATISTIC],
        "cost": "one pass over the calibration data",
        "default": False,
        "package": PACKAGE,
    }
    found = json.loads(listed("statistics", site, tmp_path, "--json"))[STATISTIC]
    assert (found["axes"], found["always"], found["package"]) == ("E", False, PACKAGE)


def listed(command: str, site: Path, folder: Path, *options: str) -> str:
    """What a listing command prints where a package is installed."""
    line = [sys.executable, "-m", "moeprune", command, *options]
    environment = os.environ | {"PYTHONPATH": str(site)}
    return subprocess.run(line, cwd=folder, env=environment, capture_output=True, text=True, check=True).stdout


def by_domain(ids_file: Path, folder: Path) -> list[Path]:
    """The rows of each domain in a file of its own."""
    rows = [json.loads(line) for line in ids_file.read_text().splitlines()]
    files = [folder / f"{domain}.jsonl" for domain in ("code", "prose")]
    for file in files:
        file.write_text("".join(json.dumps(row) + "\n" for row in rows if row["domain"] == file.stem))
    return files


# --- the page that explains it ----------------------------------------------------------------------------------------


def test_the_page_shows_the_package_and_its_code_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A criterion from Python runs as it stands there; the rest is what the example's files say."""
    page = (ROOT / "docs/how-to/add-a-strategy.md").read_text(encoding="utf-8")
    example = ROOT / "examples/moeprune-projection"
    in_python, of_module = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    assert of_module in (example / "src/moeprune_projection.py").read_text(encoding="utf-8")
    [points] = re.findall(r"```toml\n(.*?)```", page, flags=re.DOTALL)
    assert points in (example / "pyproject.toml").read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "src").symlink_to(ROOT / "src")
    data = ROOT / "src/moeprune/data"
    moeprune.collect(data / "model", "stats.safetensors", calibration=str(data / "calibration.jsonl"), num_samples=4)
    exec(in_python, {})  # noqa: S102 - our own page
    assert moeprune.PruningPlan.load("own.json").strategy["name"] == "per_root_token"
    for link in re.findall(r"\]\(([^)#]+)", page):
        assert (ROOT / "docs/how-to" / link).exists(), link


# --- packages that are broken -----------------------------------------------------------------------------------------

CODE = """
from moeprune import MoESpec, Statistic, Strategy

def rare(stats):
    return -stats.count

RARE = Strategy(name="rare", criterion=rare, summary="rarest first", paper="0000.00000")
LOST = Strategy(name="lost", criterion=rare, needs=("nobody_has_this",))
PEAK = Statistic(axes="E", meaning="largest |w| of down", point="weights", measure=lambda e: e.down.abs().max())
HEAVY = Strategy(name="heavy", criterion=lambda stats: stats.down_peak, calibrated=False, needs=("down_peak",))
SPEC = MoESpec(model_type="new_moe", router={"mlp.router.weight": 0}, count_keys=("num_experts",))
NUMBER = 3
"""


def test_broken_packages_hide_nothing(publish: Publish, capsys: pytest.CaptureFixture[str]) -> None:
    """What cannot be loaded is listed with one line, what has a built-in name as ignored, and all the rest as ever."""
    publish(
        "plug",
        CODE,
        strategies={"rare": "RARE", "bare": "rare", "other": "RARE", "lost": "LOST", "number": "NUMBER", "reap": "rare"}
        | {"S(1,1,1)": "rare", "auto": "rare", "twice": "rare"},
        statistics={"rare_sum": "rare", "gram": "PEAK", "down_peak": "PEAK"},
        architectures={"new_moe": "SPEC", "odd_moe": "SPEC", "mixtral": "SPEC"},
    )
    publish("gone", "import a_module_that_is_not_there", strategies={"gone": "X"}, architectures={"gone_moe": "X"})
    publish("again", "def twice(stats):\n    return stats.count\n", strategies={"twice": "twice"})

    def said(*command: str) -> Any:
        assert run([*command]) == 0
        captured = capsys.readouterr()
        assert captured.err == ""
        return json.loads(captured.out) if "--json" in command else captured.out

    found = said("strategies", "--json")
    assert [name for name in found if name not in BUILTIN] == [
        *("auto", "S(1,1,1)", "bare", "gone", "lost", "number", "other", "rare", "twice")
    ]
    assert (found["rare"]["paper"], found["bare"]["summary"], found["bare"]["package"]) == (
        "0000.00000",
        "",
        "plug 1.0",
    )
    assert found["reap"] == dict(found["reap"], package="", ignored=["plug 1.0"], paper="2510.13999")
    assert found["auto"]["ignored"] == ["plug 1.0"]
    errors = {name: row["error"] for name, row in found.items() if "error" in row}
    assert errors == {
        "S(1,1,1)": "the strategy 'S(1,1,1)' of plug 1.0 has the name of a built-in one",
        "gone": "the strategy 'gone' of gone 1.0 cannot be loaded: ModuleNotFoundError: "
        "No module named 'a_module_that_is_not_there'",
        "lost": "the strategy 'lost' of plug 1.0 needs the statistic 'nobody_has_this', which no package publishes",
        "number": "the strategy 'number' of plug 1.0 is neither a moeprune.Strategy nor a function",
        "other": "the strategy 'other' of plug 1.0 calls itself 'rare'",
        "twice": "again 1.0 and plug 1.0 publish a strategy 'twice' each",
    }
    text = said("strategies")
    assert re.search("^reap  .*\n +ignored: plug 1.0 publishes the same name$", text, flags=re.MULTILINE)
    assert re.search("^gone +cannot be used: the strategy 'gone' of gone 1.0 cannot", text, flags=re.MULTILINE)
    assert re.search("^bare +from plug 1.0$", text, flags=re.MULTILINE)
    measured = said("statistics", "--json")
    assert measured["gram"]["ignored"] == ["plug 1.0"]
    assert measured["rare_sum"]["error"] == "the statistic 'rare_sum' of plug 1.0 is no moeprune.Statistic"
    assert (measured["down_peak"]["point"], measured["down_peak"]["package"]) == ("weights", "plug 1.0")
    models = said("architectures", "--json")
    assert models["new_moe"] == {"engines": ["transformers", "vllm", "sglang", "llama.cpp"], "package": "plug 1.0"}
    assert models["mixtral"]["ignored"] == ["plug 1.0"]
    assert {name for name, row in models.items() if "error" in row} == {"odd_moe", "gone_moe"}
    assert re.search(
        "^odd_moe +cannot be used: .* is of the model_type 'new_moe'$", said("architectures"), re.MULTILINE
    )


@pytest.mark.parametrize("name", ["gone", "lost", "twice"])
def test_a_broken_strategy_is_refused_by_its_package(
    name: str, publish: Publish, checkpoint_of: CheckpointOf, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before any work, with one line and a hint, wherever it is asked for; built-in names are not touched."""
    publish("plug", CODE, strategies={"lost": "LOST", "twice": "rare", "reap": "rare"})
    publish("gone", "raise ValueError('two\\nlines')", strategies={"gone": "X"})
    publish("again", CODE, strategies={"twice": "rare"})
    base = str(checkpoint_of("qwen3_moe"))
    for command in (
        ["prune", base, "--ratio", "0.5", "--strategy", name, "--calibration", "none.jsonl"],
        ["collect", base, "-o", "s", "--statistics", name, "--calibration", "none.jsonl"],
    ):
        capsys.readouterr()
        assert run(command) == 2
        error, hint = capsys.readouterr().err.splitlines()
        assert re.match(rf"error: .*(strategy '{name}' of \w+ 1.0|publish a strategy '{name}' each)", error)
        assert re.match("hint: .*uninstall", hint)
    assert resolve("reap") is BUILTIN["reap"]


def test_a_fact_of_the_weights_needs_no_data(publish: Publish, checkpoint_of: CheckpointOf, tmp_path: Path) -> None:
    """A strategy over weights that another package measures reads them without calibration, also in one command."""
    publish("plug", CODE, strategies={"heavy": "HEAVY"}, statistics={"down_peak": "PEAK"})
    base = checkpoint_of("qwen3_moe")
    made = moeprune.prune(base, tmp_path / "out", ratio=0.5, strategy="heavy", guard=False)
    assert made.statistics is not None
    peaks = made.statistics.layer(0).down_peak
    assert made.plan.layers[0].keep == tuple(sorted(np.argsort(-peaks, kind="stable")[:8].tolist()))
    with pytest.raises(StrategyError, match=r"'down_peak' for layer 0 \(collect again with --statistics down_peak"):
        moeprune.plan(moeprune.collect(base), base, ratio=0.5, strategy="heavy")
