"""Plans of every kind, and healed checkpoints: read, applied, verified, shown and published for what they are."""

from __future__ import annotations

import dataclasses
import html
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch

import moeprune
from moeprune.accounts import account_of
from moeprune.checkpoint import open_checkpoint
from moeprune.errors import ArtifactError, CheckpointError, ConfigError, PlanError, PublishError, StaleArtifactError
from moeprune.inspecting import describe
from moeprune.plan_kinds import ChangePlan, load_plan, router_rows
from moeprune.plans_skip import SkipPlan
from moeprune.probing import evaluate_probes
from moeprune.publish.push import make_card, push
from moeprune.scoring import evaluate_text

KINDS = ("gated", "fused", "tied", "sparse", "narrow", "multiplexed")
Made = dict[str, Path]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Token ids to calibrate and to judge on."""
    rng, folder = np.random.default_rng(5), tmp_path_factory.mktemp("rows")
    for name in ("data", "held"):
        drawn = [{"input_ids": rng.integers(0, 97, 24).tolist()} for _ in range(20)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in drawn))
    return {name: str(folder / f"{name}.jsonl") for name in ("data", "held")}


@pytest.fixture(scope="module")
def base(checkpoint_of: Callable[..., Path]) -> Path:
    """The source of all."""
    return checkpoint_of("qwen3_moe")


@pytest.fixture(scope="module")
def made(base: Path, rows: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A checkpoint of every kind; read-only."""
    folder, data = tmp_path_factory.mktemp("made"), rows["data"]
    found = {name: folder / name for name in (*KINDS, "dropped", "healed")}
    moeprune.skip(base, found["gated"], skip_rate=0.5, calibration=data, heldout=rows["held"], max_length=24)
    moeprune.fuse(base, found["fused"], ratio=0.5, calibration=data)
    moeprune.fuse(base, found["tied"], ratio=0.5, calibration=data, router="tied")
    moeprune.sparsify(base, found["sparse"], pattern="2:4", calibration=data)
    moeprune.sparsify(base, found["narrow"], neurons=0.5, calibration=data)
    moeprune.multiplex(base, found["multiplexed"], keep=2, rank=2, steps=2, calibration=data)
    moeprune.prune(base, found["dropped"], ratio=0.5, calibration=data)
    heal(base, found["dropped"], found["healed"], data)
    return found


def heal(base: Path, given: Path, output: Path, data: str) -> None:
    """Train the experts of a checkpoint for a few steps."""
    from moeprune.distilling import distil_checkpoint
    from moeprune.healing.distillation import Recipe

    recipe = Recipe(steps=6, lr=1e-3, checks=3, step_tokens=256)
    result = distil_checkpoint(base, given, output, calibration=data, train="experts", recipe=recipe)
    assert result.healed


def copied(folder: Path, place: Path) -> Path:
    """A copy to be spoiled."""
    return Path(shutil.copytree(folder, place / "copy"))


def edit(file: Path, **changes: Any) -> None:
    """Change top-level values of a JSON file."""
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


# --- reading ----------------------------------------------------------------------------------------------------------


def test_every_kind_is_read_and_told(made: Made) -> None:
    """Each plan comes back as its own class, with an account that has something to say."""
    plans = {name: load_plan(made[name] / "moeprune" / "plan.json") for name in KINDS}
    assert {type(plan) for plan in plans.values()} == {*get_args(ChangePlan)}
    for plan in plans.values():
        account = account_of(plan)  # type: ignore[arg-type]
        assert all((account.summary, account.lines, account.facts, account.rows))
        assert all(len(row) == len(account.head) for row in account.rows)


def test_accounts_say_what_was_measured(made: Made) -> None:
    """Rates, shares and counts are those of the plan, and only what was trained is called trained."""
    told = {name: account_of(load_plan(made[name] / "moeprune" / "plan.json")) for name in KINDS}  # type: ignore[arg-type]
    assert told["gated"].facts["rate"] == pytest.approx(0.5, abs=0.02)
    assert (told["fused"].facts["kept"], told["fused"].facts["of"]) == (8, 16)
    assert told["sparse"].facts["measured"] == told["narrow"].facts["measured"] == 0.5
    assert told["narrow"].facts["width"] * 2 == open_checkpoint(made["gated"]).config["moe_intermediate_size"]
    assert {name for name, account in told.items() if not account.stock} == {"tied", "multiplexed"}
    assert {name for name, account in told.items() if account.trained} == {"multiplexed"}


def test_checkpoints_whose_routers_know_more_are_opened_and_not_pruned(made: Made) -> None:
    """Routers of tied and multiplexed checkpoints keep a row for every source expert."""
    assert {name: router_rows(made[name]) for name in KINDS} == dict.fromkeys(KINDS, 0) | {
        "tied": 16,
        "multiplexed": 16,
    }
    opened = open_checkpoint(made["multiplexed"])
    assert (opened.num_experts, opened.router.num_experts) == (2, 16)
    with pytest.raises(moeprune.errors.UnsupportedModelError, match="stand for several each"):
        opened.check_uniform()


def test_an_unknown_kind_is_named(made: Made, base: Path, tmp_path: Path) -> None:
    """Whatever reads plans refuses a kind that it does not know."""
    folder = copied(made["gated"], tmp_path)
    edit(folder / "moeprune" / "plan.json", kind="fold")
    for work in (
        lambda: load_plan(folder / "moeprune" / "plan.json"),
        lambda: describe(folder),
        lambda: moeprune.render_report(folder),
        lambda: make_card(folder),
        lambda: moeprune.verify(base, folder),
        lambda: moeprune.apply(base, folder / "moeprune" / "plan.json", tmp_path / "out"),
    ):
        with pytest.raises(ArtifactError, match="unknown kind 'fold'"):
            work()


# --- describing -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*KINDS, "healed"])
def test_inspecting_says_what_was_done(made: Made, name: str) -> None:
    """A checkpoint says it in a line, its plan or record with a table and facts for programs."""
    folder = made[name]
    whole = describe(folder)
    record = describe(folder / "moeprune" / ("healing.json" if name == "healed" else "plan.json"))
    kind = record.facts.get("plan_kind", "")
    assert all(whole.lines[key] for key in (kind, "weights", "loads in"))
    assert "pruned by" not in whole.lines
    assert record.facts["trained"] is (name in {"healed", "multiplexed"})
    assert len(record.rows) > 1


def test_inspecting_shows_arrays_beside_plans(made: Made) -> None:
    """The file that a plan keeps its arrays in is told by the plan that it belongs to."""
    for file, kind in (("gated/moeprune/plan", "skip"), ("multiplexed/moeprune/multiplex", "multiplex")):
        found = describe(made["gated"].parent / f"{file}.safetensors")
        assert (found.kind, found.facts["plan_kind"]) == ("arrays", kind)
        assert found.facts["tensors"]


# --- applying and verifying -------------------------------------------------------------------------------------------


def test_a_skip_plan_is_applied_from_its_file(made: Made, base: Path, rows: dict[str, str], tmp_path: Path) -> None:
    """A plan alone, applied, gives the same bytes as writing the folder at once; a dry run gives nothing."""
    plan = tmp_path / "plan.json"
    options: dict[str, Any] = {"skip_rate": 0.5, "calibration": rows["data"], "max_length": 24}
    moeprune.skip(base, plan, **options)
    moeprune.apply(base, plan, tmp_path / "out", dry_run=True)
    assert not (tmp_path / "out").exists()
    moeprune.apply(base, plan, tmp_path / "out")
    for file in (path for path in made["gated"].rglob("*") if path.is_file() and path.parent.name != "report"):
        assert (tmp_path / "out" / file.relative_to(made["gated"])).read_bytes() == file.read_bytes()
    with pytest.raises(StaleArtifactError, match="another model"):
        moeprune.apply(made["dropped"], plan, tmp_path / "other")
    trained = dataclasses.replace(SkipPlan.load(plan), training={"best_step": 3, "steps": 4})
    with pytest.raises(PlanError, match="weights that were trained"):
        moeprune.apply(base, trained, tmp_path / "other")
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("name", ["sparse", "multiplexed"])
def test_records_of_what_was_computed_are_not_applied(made: Made, base: Path, tmp_path: Path, name: str) -> None:
    """What depends on data is made by its own command, and the error names it."""
    with pytest.raises(PlanError, match="a record of what was computed") as caught:
        moeprune.apply(base, made[name] / "moeprune" / "plan.json", tmp_path / "out")
    assert json.loads((made[name] / "moeprune" / "plan.json").read_text())["kind"] in caught.value.hint


@pytest.mark.parametrize("name", [*KINDS, "dropped", "healed"])
def test_every_kind_is_verified(made: Made, base: Path, tmp_path: Path, name: str) -> None:
    """Each folder passes against its source, and not with a byte of a weight changed."""
    source = made["dropped"] if name == "healed" else base
    proof = moeprune.verify(source, made[name])
    assert proof.tensors > proof.computed
    assert bool(proof.computed) is (name not in {"gated", "dropped"})
    folder = copied(made[name], tmp_path)
    weights = bytearray((folder / "model.safetensors").read_bytes())
    weights[-3] ^= 64
    (folder / "model.safetensors").write_bytes(weights)
    with pytest.raises(CheckpointError):
        moeprune.verify(source, folder)


def test_a_healed_checkpoint_is_compared_with_what_was_healed(made: Made, base: Path, tmp_path: Path) -> None:
    """The original is refused with a hint, and so is a difference that no training explains."""
    proof = moeprune.verify(made["dropped"], made["healed"])
    assert 0 < proof.computed < proof.tensors
    with pytest.raises(StaleArtifactError, match="healed towards") as caught:
        moeprune.verify(base, made["healed"])
    assert caught.value.hint == "name the checkpoint that was healed"
    folder = copied(made["healed"], tmp_path)
    edit(folder / "moeprune" / "healing.json", best_step=0)
    with pytest.raises(CheckpointError, match="by no training"):
        moeprune.verify(made["dropped"], folder)


# --- pages and cards --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*KINDS, "healed"])
def test_the_page_tells_of_the_kind(made: Made, tmp_path: Path, name: str) -> None:
    """The page of a folder has what was done, its table, and no advice that is for dropped experts."""
    page = html.unescape(moeprune.render_report(made[name], tmp_path / "page.html").read_text())
    account = describe(made[name])
    done = next(line for key, line in account.lines.items() if key in {"skip", "fuse", "sparsify", "multiplex", "heal"})
    assert str(done)[1:] in page
    assert "What pruning cost" not in page
    assert "The plan is not at hand" not in page
    assert "plan.json --text" not in page


def test_the_page_shows_the_measured_rate(made: Made, tmp_path: Path) -> None:
    """What was skipped on held-out text is told beside what was asked for, with the controls."""
    skip = json.loads((made["gated"] / "moeprune" / "report" / "skip.json").read_text())
    page = moeprune.render_report(made["gated"], tmp_path / "page.html").read_text()
    assert f"{100 * skip['point']['policy']['rate']:.1f} % of the slots were skipped on held-out text" in page
    assert f"{skip['point']['random']['ratio']['value']:.3f} (" in page


def test_a_cost_that_was_measured_with_another_plan_is_refused(made: Made, tmp_path: Path) -> None:
    """A skip report whose plan was changed since is not shown beside the new one."""
    folder = copied(made["gated"], tmp_path)
    edit(folder / "moeprune" / "plan.json", rate=0.4)
    with pytest.raises(StaleArtifactError, match="another plan"):
        moeprune.render_report(folder)


@pytest.mark.parametrize("name", [*KINDS, "healed"])
def test_cards_are_true(made: Made, name: str) -> None:
    """A card says what was done, how to load it, what engines make of it, and of training only where there was any."""
    card = make_card(made[name])
    own = name in {"gated", "tied", "multiplexed"}
    assert ("moeprune.load(" in card) is own
    assert ("| moeprune.load |" in card) is own
    assert ("library_name: moeprune" in card) is (name in {"tied", "multiplexed"})
    assert ("| transformers | loads, according to its rules (not run)" in card) is (name not in {"tied", "multiplexed"})
    assert ("thing was trained" in card) is (name not in {"multiplexed", "healed"})
    assert ("expert-pruning" in card) is (name == "healed")  # it was pruned before
    assert "Kept experts byte-identical" not in card
    assert "have the digests that were recorded" in card


def test_the_card_of_a_gated_model_has_the_measured_rate(made: Made) -> None:
    """The cost on text stands first, at the rate that was measured there."""
    skip = json.loads((made["gated"] / "moeprune" / "report" / "skip.json").read_text())["point"]["policy"]
    [cost] = [line for line in make_card(made["gated"]).splitlines() if line.startswith("> **Cost")]
    assert f"{100 * skip['rate']:.1f} % of the slots skipped" in cost
    assert f"{skip['ratio']['value']:.3f} times" in cost
    assert "and skips nothing" in make_card(made["gated"])


def test_a_card_compares_with_the_source(made: Made, base: Path) -> None:
    """With the source at hand the card tells apart what is equal and what was computed."""
    assert "and all are equal" in make_card(made["gated"], base=base)
    assert "tensors were computed" in make_card(made["sparse"], base=base)
    assert "with what was healed" in make_card(made["healed"], base=made["dropped"])


def test_a_card_of_another_model_is_refused(made: Made, tmp_path: Path) -> None:
    """A plan that lies beside a config, experts or records that it was not made for gives no card."""
    narrow = copied(made["narrow"], tmp_path)
    edit(narrow / "moeprune" / "plan.json", config_edits={"moe_intermediate_size": 3})
    with pytest.raises(StaleArtifactError, match="says moe_intermediate_size = 3, and its config does not"):
        make_card(narrow)
    fused = copied(made["fused"], tmp_path / "fused")
    shutil.copy(made["gated"] / "model.safetensors", fused)
    shutil.copy(made["gated"] / "config.json", fused)
    with pytest.raises(StaleArtifactError, match="do not have the same experts"):
        make_card(fused)
    gated = copied(made["gated"], tmp_path / "gated")
    edit(gated / "moeprune" / "provenance.json", inputs={"model": "0"})
    with pytest.raises(StaleArtifactError, match="was made for another model"):
        make_card(gated)


def test_a_folder_without_a_record_is_refused(base: Path) -> None:
    """Nothing can be said of a checkpoint that nothing was done to."""
    with pytest.raises(PublishError, match="could say nothing"):
        make_card(base)


# --- scoring ----------------------------------------------------------------------------------------------------------


def test_skip_plans_are_scored_on_text(made: Made, base: Path, rows: dict[str, str]) -> None:
    """A plan scored without being written costs what the report of its folder says."""
    skip = json.loads((made["gated"] / "moeprune" / "report" / "skip.json").read_text())["point"]["policy"]
    report = evaluate_text(base, [made["gated"], made["dropped"]], text=rows["held"], max_length=24)
    gated, dropped = report.plans
    assert gated.ratio.value == pytest.approx(skip["ratio"]["value"], rel=1e-6)
    assert (gated.kept, dropped.kept) == (16, 8)
    assert f"skips {100 * skip['rate']:.1f} % of the slots" in report.warnings[-1]


@pytest.mark.parametrize("name", ["fused", "tied", "sparse", "multiplexed", "healed"])
def test_plans_that_compute_weights_are_not_scored_by_masks(
    made: Made, base: Path, rows: dict[str, str], name: str
) -> None:
    """What no mask can do is refused, with what does it."""
    if name != "healed":
        with pytest.raises(ConfigError, match="masks experts") as caught:
            evaluate_probes(base, made[name] / "moeprune" / "plan.json", text=rows["held"])
        assert "moeprune eval BASE OUT" in caught.value.hint
        with pytest.raises(ConfigError, match="computes new weights"):
            evaluate_text(base, made[name], text=rows["held"])
        return
    folder = made[name]
    shutil.copy(made["dropped"] / "moeprune" / "plan.json", folder / "moeprune")
    try:
        with pytest.raises(ConfigError, match="was healed"):
            evaluate_text(base, folder, text=rows["held"])
    finally:
        (folder / "moeprune" / "plan.json").unlink()


# --- the Hub ----------------------------------------------------------------------------------------------------------

LOADER = """
import sys
import torch
import moeprune
with torch.no_grad():
    one, other = [moeprune.load(name)(torch.arange(24)[None]).logits for name in sys.argv[1:]]
print(torch.equal(one, other))
"""


def test_a_gated_model_runs_with_its_gates_from_the_hub(
    made: Made, base: Path, hub: Any, hub_environment: dict[str, str]
) -> None:
    """What was pushed is loaded by its name, and skips what the folder skips."""
    files = {
        str(file.relative_to(made["gated"])): file.read_bytes() for file in made["gated"].rglob("*") if file.is_file()
    }
    hub.add("org/gated", files)
    done = subprocess.run(
        [sys.executable, "-c", LOADER, "org/gated", str(made["gated"])],
        env=hub_environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.strip() == "True", done.stderr
    with torch.no_grad():
        plain, gated = (moeprune.load(name)(torch.arange(24)[None]).logits for name in (base, made["gated"]))
    assert not torch.equal(plain, gated)


@pytest.mark.parametrize("name", ["gated", "multiplexed", "healed"])
def test_what_is_pushed_holds_all_that_loading_needs(made: Made, name: str) -> None:
    """Plans, their arrays and records of healing travel with the weights."""
    sent = push(made[name], "org/name", dry_run=True).files
    needed = {
        "gated": {"plan.json", "plan.safetensors", "report/skip.json"},
        "multiplexed": {"plan.json", "multiplex.safetensors"},
        "healed": {"healing.json"},
    }
    assert {f"moeprune/{file}" for file in needed[name]} <= sent.keys()
