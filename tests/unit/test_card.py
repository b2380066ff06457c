"""The model card: what it says, what it says is missing, and what it refuses to say."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from huggingface_hub import ModelCard

import moeprune
from moeprune.errors import CheckpointError, PublishError, StaleArtifactError
from moeprune.evaluation.compare import EvalReport, SuiteComparison, TaskComparison
from moeprune.evaluation.paired import INCONCLUSIVE, LOSS
from moeprune.pipeline import BUNDLED
from moeprune.publish.card import active_parameters, render_card
from moeprune.publish.evidence import gather, prove
from moeprune.publish.licence import find_licence
from moeprune.statistics import STATISTICS, RouterStatistics

MODEL = BUNDLED / "model"
HOSTILE = "a|b`c*d_\n# e [f](g) <script>&"


def statistics_of(model: str) -> RouterStatistics:
    """Statistics of two domains, as if calibration data had been run through the bundled model."""
    rng = np.random.default_rng(2)

    def draw(name: str) -> Any:
        shape = (2, *STATISTICS[name].shape(32))
        return rng.integers(10, 100, shape).astype(np.int64 if STATISTICS[name].integer else np.float64)

    hub = {"source": "org/data", "config": "part", "split": "train", "revision": "c" * 40, "domains": ["code"]}
    own = {"source": "rows.jsonl", "file_sha256": "d" * 64, "domains": ["prose"], "chat_template_sha256": "e" * 64}
    told = {"sequences": 7, "tokens": 90, "max_length": 2048, "packed": True, "sha256": "f" * 64}
    return RouterStatistics(
        domains=("code", "prose"),
        num_experts=32,
        top_k=4,
        layers={layer: {name: draw(name) for name in STATISTICS} for layer in range(4)},
        command={"stage": "collect", "num_samples": 512, "shuffle": False},
        inputs={"model": model, "calibration": "c0"},
        provenance=(hub | told, own | told),
    )


def row(task: str, **changes: Any) -> TaskComparison:
    """A task that got worse."""
    values: dict[str, Any] = {
        "task": task,
        "metric": "acc",
        "filter": "none",
        "version": "1.0",
        "n": 200,
        "n_full": 200,
        "n_shot": 5,
        "base": 0.5,
        "pruned": 0.375,
        "unit": "points",
        "change": -12.5,
        "interval": (-18.0, -7.1),
        "ni_lower": -17.1,
        "lost": 30,
        "gained": 5,
        "flips": 17.5,
        "answers_changed": 40,
        "p": 0.00002,
        "p_adjusted": 0.00004,
        "mde": 8.3,
        "verdict": LOSS,
    }
    return TaskComparison(**(values | changes))


def report_of(base: str, pruned: str, *rows: TaskComparison, **changes: Any) -> EvalReport:
    """A report of these weights."""
    values: dict[str, Any] = {
        "base_model": "big",
        "pruned_model": "small",
        "margin": 1.0,
        "alpha": 0.05,
        "limit": None,
        "tasks": rows,
        "suite": SuiteComparison(
            tasks=2, base=0.5, pruned=0.4, change=-6.2, interval=(-9.0, -3.4), ni_lower=-8.6, verdict=LOSS
        ),
        "settings": {"model_source": "hf", "transformers_version": "5.23.0"},
        "command": {"tasks": ["mc"], "backend": "hf"},
        "inputs": {"base": base, "pruned": pruned},
    }
    return EvalReport(**(values | changes))


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model pruned without calibration data and without an evaluation; read-only."""
    folder = tmp_path_factory.mktemp("card")
    base = moeprune.open_checkpoint(MODEL)
    empty = RouterStatistics.empty(base.moe_layers, num_experts=32, top_k=4, model=base.fingerprint)
    plan = moeprune.plan(empty, MODEL, ratio=0.5, strategy="random")
    return moeprune.apply(MODEL, plan, folder / "out")


@pytest.fixture
def out(bare: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(bare, tmp_path / "out"))


@pytest.fixture
def full(out: Path) -> Path:
    """The same with statistics, a report, and the card and the licence of the base."""
    records = out / "moeprune"
    base = moeprune.open_checkpoint(MODEL).fingerprint
    statistics = statistics_of(base)
    plan = moeprune.plan(statistics, MODEL, ratio=0.5, strategy="reap", weights={"code": 2}, seed=3)
    shutil.rmtree(out)
    moeprune.apply(MODEL, plan, out)
    own = moeprune.open_checkpoint(out).fingerprint
    statistics.save(records / "statistics.safetensors")
    (records / "report").mkdir()
    quiet = {"change": -0.5, "interval": (-2.0, 1.0), "p_adjusted": 0.4, "verdict": INCONCLUSIVE, "n": 150}
    report = report_of(base, own, row("reading"), row("writing", **quiet))
    (records / "report" / "report.json").write_text(report.to_json())
    (out / "README.md").write_text("---\nlicense: other\nlicense_name: big\nlicense_link: LICENSE\nlanguage: en\n---\n")
    (out / "LICENSE").write_text("text\n")
    (out / "NOTICE.txt").write_text("text\n")
    return out


def card_of(folder: Path, name: str = "tiny", **options: Any) -> str:
    """The card of a folder."""
    evidence = gather(folder, **options)
    return render_card(evidence, prove(evidence), name)


def section(card: str, title: str) -> str:
    """The text under a heading."""
    return card.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


# --- front matter -----------------------------------------------------------------------------------------------------


def test_the_hubs_own_loader_reads_the_front_matter(full: Path) -> None:
    """Base, licence, languages, tags, data sets of the Hub and one result per task of the pruned model come back."""
    data = ModelCard(card_of(full, base_model="org/big@abc")).data
    assert (data.base_model, data.get("base_model_relation")) == ("org/big", "finetune")
    assert (data.license, data.license_name, data.license_link, data.language) == ("other", "big", "LICENSE", "en")
    assert (data.tags, data.datasets) == (["moe", "expert-pruning", "moeprune"], ["org/data"])
    assert (data.library_name, data.pipeline_tag, data.model_name) == ("transformers", "text-generation", "tiny")
    reading, writing = data.eval_results
    assert (reading.dataset_type, reading.metric_type, reading.metric_value) == ("reading", "acc", 37.5)
    assert writing.dataset_name == "writing (5-shot, 150 of 200 documents)"
    assert writing.dataset_args["documents"] == 150


def test_what_is_not_known_is_not_in_the_front_matter(out: Path) -> None:
    """Without a report, a base's name, a licence or calibration data there are no such keys."""
    data = ModelCard(card_of(out)).data.to_dict()
    assert sorted(data) == ["library_name", "pipeline_tag", "tags"]


# --- what is said -----------------------------------------------------------------------------------------------------


def test_the_cost_comes_first(full: Path) -> None:
    """Right after the summary stand the worst task, its interval, how many are worse, and that a run was partial."""
    quotes = [line for line in card_of(full).splitlines() if line.startswith("> ")]
    assert quotes[0].startswith("> **Cost: reading \N{MINUS SIGN}12.5 points** (95 % interval ")
    assert "the worst of 2 tasks; 1 of 2 tasks significantly worse (Holm-adjusted p, 5 %), 1 inconclusive" in quotes[0]
    assert quotes[0].endswith("; mean \N{MINUS SIGN}6.2 (\N{MINUS SIGN}9.0 to \N{MINUS SIGN}3.4).")
    assert quotes[1] == "> **NOT the full benchmark: writing 150 of 200**"


def test_every_missing_section_says_so(out: Path) -> None:
    """Without evidence the card says that nothing was evaluated or measured, section by section."""
    card = card_of(out)
    assert "**Cost: not evaluated.**" in card
    assert "Not measured: no statistics" in section(card, "Calibration data")
    evaluation = section(card, "Evaluation")
    for what in ("Tasks", "Perplexity on text", "Probes", "Other ratios"):
        assert any(line.startswith(what) and line.endswith("not evaluated.") for line in evaluation.splitlines()), what
    assert "Unknown" in section(card, "Licence")
    assert "name on the Hub is not recorded" in card
    assert "No task was run" in section(card, "Limits")


def test_what_changed_is_counted(full: Path) -> None:
    """Experts, top-k, parameters and bytes before and after are those of the two checkpoints."""
    base, pruned = moeprune.open_checkpoint(MODEL), moeprune.open_checkpoint(full)
    told = section(card_of(full), "What changed")
    assert "| routed experts per MoE layer | 32 | 16 |" in told
    assert "| experts per token (top-k) | 4 | 4 |" in told
    sizes = [sum(entry.numel for entry in one.tensors.values()) for one in (base, pruned)]
    assert "| parameters | {:,} | {:,} |".format(*sizes) in told
    before, after = active_parameters(pruned, 32)
    assert f"| of these active per token | {before:,} | {after:,} |" in told
    assert before == active_parameters(base, 32)[1]  # what the base itself says
    assert active_parameters(base, 32)[0] == before
    assert "| dtypes on disk | BF16 | BF16 |" in told


def test_calibration_is_told_by_source_and_by_domain(full: Path) -> None:
    """Revision, digest, samples, tokens, weights and the rarest and the median expert of each domain."""
    told = section(card_of(full), "Calibration data")
    assert f"| org/data/part/train | {'c' * 40} | code | 7 | 90 | 2048, packed | {'f' * 64} |" in told
    assert "| rows.jsonl | a file | prose |" in told
    statistics = RouterStatistics.load(full / "moeprune" / "statistics.safetensors")
    counts = np.concatenate([layer["count"] for layer in statistics.layers.values()], axis=1)
    for position, (domain, weight) in enumerate((("code", 2), ("prose", 1))):
        tokens = int(statistics.layers[0]["tokens"][position])
        seen = f"{counts[position].min()} | {int(np.median(counts[position]))} |"
        assert f"| {domain} | {tokens} | {weight} | {seen}" in told
    assert "e" * 64 in told


def test_engines_were_run_only_where_a_report_says_so(full: Path) -> None:
    """The engine that ran the tasks on these weights loads them; of others the rules speak, and are said to."""
    told = section(card_of(full), "Engines")
    assert "| transformers | loaded by 5.23.0: it ran the tasks above |" in told
    assert "| vllm | loads, according to its rules (not run) |" in told
    plan = json.loads((full / "moeprune" / "plan.json").read_text())
    plan["engines"]["vllm"] = ["too few"]
    (full / "moeprune" / "plan.json").write_text(json.dumps(plan))
    assert "| vllm | does not load, according to its rules (not run): too few |" in section(card_of(full), "Engines")
    compared = report_of("samples a", "samples b", row("reading"), command={"margin": 1.0})
    (full / "moeprune" / "report" / "report.json").write_text(compared.to_json())
    card = card_of(full)
    assert "| transformers | loads, according to its rules (not run) |" in card
    assert "do not say which weights made them" in card


def test_texts_probes_and_sweeps_are_told(full: Path) -> None:
    """Whatever lies in the report's folder has a table of its own."""
    report, base = full / "moeprune" / "report", moeprune.open_checkpoint(MODEL).fingerprint
    head = {"moeprune_version": "0.1.0", "command": {}, "inputs": {"model": base}}
    probe = {
        "probe": "loops",
        "group": "generation",
        "what": "share that loops",
        "unit": "%",
        "better": "lower",
        "n": 64,
    }
    numbers = {"base": 1.5, "pruned": 4.7, "change": 3.2, "interval": [0.1, 6.0], "calibrated": False}
    (report / "probes.json").write_text(
        json.dumps({"schema": "moeprune.probes/1"} | head | {"rows": [probe | numbers], "warnings": ["few prompts"]})
    )
    suite = {"change": -2.0, "interval": [-3.0, -1.0], "ni_lower": -2.8, "verdict": "loss"}
    point = {
        "ratio": "0.25",
        "strategy": "reap",
        "kept": 24,
        "bytes": 12,
        "base_bytes": 15,
        "tasks": [],
        "suite": suite,
    }
    sweep = {"margin": 1.0, "points": [point | {"text": None}], "largest_within_margin": None}
    (report / "sweep.json").write_text(json.dumps({"schema": "moeprune.sweep/1"} | head | sweep))
    told = section(card_of(full), "Evaluation")
    assert "| share that loops (%) | not calibrated | 64 | 1.5 | 4.7 | +3.2 | +0.1 to +6" in told
    assert "| worse |" in told
    assert "- few prompts" in told
    assert "0.25" in told.split("Other ratios")[1]


def test_names_stay_inside_their_cells(full: Path) -> None:
    """A task, a domain or a model's name with markup, lines or pipes neither breaks a table nor becomes markup."""
    report = full / "moeprune" / "report" / "report.json"
    payload = json.loads(report.read_text())
    payload["tasks"][0]["task"] = payload["pruned_model"] = HOSTILE
    payload["warnings"] = [HOSTILE]
    report.write_text(json.dumps(payload))
    card = card_of(full, HOSTILE)
    body = card.split("\n---\n", 1)[1]
    assert "<script>" not in body
    assert "[f](g)" not in body
    assert "\n# e" not in body
    tables = [line.replace("\\|", "") for line in section(card, "Evaluation").splitlines() if line.startswith("|")]
    assert {line.count("|") for line in tables} == {14}
    assert ModelCard(card).data.eval_results[0].dataset_type == HOSTILE


def test_equal_evidence_gives_an_equal_card(full: Path) -> None:
    """The card is a function of the folder: no time, host or folder of this machine is in it."""
    card = card_of(full)
    assert card == card_of(full)
    assert str(full) not in card
    assert str(Path.home()) + "/" not in card


# --- bytes ------------------------------------------------------------------------------------------------------------


def test_byte_identity_is_claimed_as_far_as_it_was_checked(full: Path) -> None:
    """Compared with the source, with the record of the copy, or not at all: the card says which."""
    (full / "README.md").unlink()
    evidence = gather(full)
    count = len(evidence.checkpoint.tensors)
    told = render_card(evidence, prove(evidence, MODEL), "tiny")
    assert f"byte-identical: yes. {count} tensors (2.5 MB) and 3 other files were compared with the parent's." in told
    assert f"byte-identical: {count} tensors (2.5 MB) have the digests that were recorded" in card_of(full)
    (full / "moeprune" / "manifest.json").unlink()
    (full / "moeprune" / "provenance.json").unlink()
    saved = card_of(full)
    assert "byte-identical: not known" in saved
    assert "nothing was trained" not in saved


@pytest.mark.parametrize("damage", ["byte", "missing", "surplus"])
def test_weights_that_are_not_what_was_recorded_have_no_card(full: Path, damage: str) -> None:
    """A changed byte, a tensor that the record lacks or one too many is an error that names it."""
    manifest = full / "moeprune" / "manifest.json"
    record = json.loads(manifest.read_text())
    if damage == "byte":
        weights = full / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-1] + b"\1")
    elif damage == "missing":
        record["tensors"].pop("lm_head.weight", None) or record["tensors"].popitem()
    else:
        record["tensors"]["one.too.many"] = "0" * 32
    manifest.write_text(json.dumps(record))
    with pytest.raises(CheckpointError, match="tensor '"):
        card_of(full)


# --- what is refused --------------------------------------------------------------------------------------------------


def test_evidence_of_another_model_is_refused(full: Path) -> None:
    """A report of other weights, statistics of another base and a plan of other counts are never told of."""
    report = full / "moeprune" / "report" / "report.json"
    good, base = report.read_text(), moeprune.open_checkpoint(MODEL).fingerprint
    report.write_text(report_of(base, "other", row("reading")).to_json())
    with pytest.raises(StaleArtifactError, match="is of other weights"):
        gather(full)
    report.write_text(good)
    statistics = full / "moeprune" / "statistics.safetensors"
    kept = statistics.read_bytes()
    statistics_of("other").save(statistics)
    with pytest.raises(StaleArtifactError):
        gather(full)
    statistics.write_bytes(kept)
    plan = json.loads((full / "moeprune" / "plan.json").read_text())
    for layer in plan["layers"].values():
        layer["keep"].pop()
    (full / "moeprune" / "plan.json").write_text(json.dumps(plan))
    with pytest.raises(StaleArtifactError, match="do not have the same experts"):
        gather(full)


def test_a_folder_without_a_plan_has_no_card() -> None:
    """A checkpoint that moeprune did not write is refused, and the hint says what to use."""
    with pytest.raises(PublishError, match=r"has no moeprune/plan\.json") as caught:
        gather(MODEL)
    assert "hf upload" in caught.value.hint


def test_the_base_is_what_was_recorded(tmp_path: Path) -> None:
    """A model of the Hub's cache is named with its commit, and another name is refused."""
    cached = tmp_path / "models--org--big" / "snapshots" / "abc123"
    shutil.copytree(MODEL, cached)
    base = moeprune.open_checkpoint(cached)
    empty = RouterStatistics.empty(base.moe_layers, num_experts=32, top_k=4, model=base.fingerprint)
    out = moeprune.apply(cached, moeprune.plan(empty, cached, keep=8, strategy="random"), tmp_path / "out")
    evidence = gather(out)
    assert (evidence.base.repo, evidence.base.revision) == ("org/big", "abc123")
    assert str(tmp_path) not in (out / "moeprune" / "provenance.json").read_text()
    assert "org/big at revision abc123, with 8 of 32 routed experts" in card_of(out)
    assert gather(out, base_model="org/big").base.revision == "abc123"
    with pytest.raises(PublishError, match="made from org/big, not from org/small"):
        gather(out, base_model="org/small")
    with pytest.raises(PublishError, match="is no model on the Hub"):
        gather(out, base_model="just-a-name")


# --- licences ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("front_matter", "files", "stated", "name", "known"),
    [
        ({"license": "mit"}, [], None, "mit", True),
        ({"license": ["mit"]}, [], None, "mit", True),
        ({"license": "other", "license_link": "x"}, [], None, "other", True),
        ({"license": "other"}, ["LICENSE"], None, "other", True),
        ({"license": "other"}, [], None, "other", False),
        ({"license": "unknown"}, [], None, "", False),
        ({}, ["LICENSE"], None, "", False),
        ({}, [], "apache-2.0", "apache-2.0", True),
        ({"license": "unknown"}, [], "mit", "mit", True),
    ],
)
def test_a_licence_is_known_when_a_reader_could_find_it(
    tmp_path: Path, front_matter: dict[str, Any], files: list[str], stated: str | None, name: str, known: bool
) -> None:
    """By the base's card, or as stated; a file alone does not say which licence it is."""
    for file in files:
        (tmp_path / file).write_text("text")
    found = find_licence(tmp_path, front_matter, stated)
    assert (found.name, found.known, found.stated) == (name, known, stated is not None)


def test_licence_files_are_named(full: Path) -> None:
    """What came with the base binds the pruned model too."""
    told = section(card_of(full), "Licence")
    assert "other (big), inherited from the parent's card" in told
    assert "LICENSE, NOTICE.txt" in told
    (full / "README.md").write_text("---\nlicense: [\n---\n")
    with pytest.raises(PublishError, match="front matter of"):
        gather(full)
