"""The HTML page: what it says, what it escapes, what it draws, and how large it gets."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import re
import runpy
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeprune.errors import ArtifactError, ConfigError, StaleArtifactError
from moeprune.evaluation.page import ReportSources, render_html, render_report, write_html, write_page
from moeprune.evaluation.page.charts import SHADES, Effect, HeatRow, Scale, effect_scale, forest_row, heatmap
from moeprune.evaluation.page.commands import command_lines
from moeprune.evaluation.page.decisions import shades
from moeprune.evaluation.page.formats import MINUS, plain, signed
from moeprune.evaluation.page.svg import element, render, visible
from moeprune.evaluation.paired import GAIN, INCONCLUSIVE, LOSS, NO_MATERIAL_LOSS
from moeprune.plans import LayerPlan

BENCHMARK = runpy.run_path(str(Path(__file__).parents[2] / "benchmarks" / "report.py"))
SYNTHETIC: Callable[..., ReportSources] = BENCHMARK["synthetic"]
SAVE: Callable[[ReportSources, Path], None] = BENCHMARK["save"]
HOSTILE = "</title></svg></style><script>alert(1)</script><b onclick=\"x\" a='y'>&amp;\u202e\x07{{ 7 * 7 }}"
SHOWN = HOSTILE.replace("\u202e", "⟨U+202E⟩").replace("\x07", "⟨U+0007⟩")
VOID = {"meta", "link"}
SECTIONS = ["tasks", "probes", "text", "ratios", "experts", "calibration", "made"]


class Document(HTMLParser):
    """A page as a strict reader sees it: every tag closed, every attribute known."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: set[str] = set()
        self.ids: list[str] = []
        self.text = ""
        self.source = page
        self.feed(page)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note a tag and its attributes."""
        self.tags.append(tag)
        self.attributes |= {name for name, _ in attrs}
        self.ids += [value for name, value in attrs if name == "id" and value]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note a tag of SVG that closes itself."""
        self.handle_starttag(tag, attrs)
        self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        """Check that what is closed was opened last."""
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        """Collect the text."""
        self.text += data


@pytest.fixture(scope="module")
def full() -> ReportSources:
    """Everything that a page can show, of a small model."""
    return SYNTHETIC(4, 16)


@pytest.fixture(scope="module")
def page(full: ReportSources) -> Document:
    """Its page."""
    return Document(render_html(full))


# --- escaping ---------------------------------------------------------------------------------------------------------


def test_names_of_any_kind_stay_text(page: Document) -> None:
    """Hostile names in every field add no tag and no attribute, and are shown as they are, controls made visible."""
    hostile = Document(render_html(SYNTHETIC(4, 16, say=lambda name: name + HOSTILE)))
    assert set(hostile.tags) == set(page.tags)
    assert hostile.tags.count("bdi") == page.tags.count("bdi")
    assert hostile.attributes == page.attributes
    for name in ("pruned", "base", "task_0", "reap", "vllm", "code", "arc_easy", "half", "data.jsonl", "few prompts"):
        assert name + SHOWN in hostile.text, name
    assert "\u202e" not in hostile.text
    assert "49" not in re.findall(r"alert\(1\).{0,60}", hostile.text)[0]


def test_the_page_runs_and_fetches_nothing(full: ReportSources) -> None:
    """No script, no handler, no address outside the page, and a policy that would forbid all of them."""
    text = render_html(full)
    assert "default-src 'none'; style-src 'unsafe-inline'; img-src data:" in text
    assert not re.search(r"<script|<iframe|<img|\son[a-z]+=|@import|url\(|https?://", text)
    assert set(re.findall(r'(?:href|src)="([^"]*)"', text)) == {"data:,", *(f"#{name}" for name in SECTIONS)}


@pytest.mark.parametrize("sign", ["\x00", "\x1b", "\u202e", "\u2066", "\u200b", "\u061c", "\x85"])
def test_hidden_signs_are_shown(sign: str) -> None:
    """Controls and signs that turn the reading direction are written out; other scripts stay as they are."""
    assert visible(f"a{sign}b") == f"a⟨U+{ord(sign):04X}⟩b"
    assert visible("модель 模型 נמל é\n\t") == "модель 模型 נמל é\n\t"


@given(st.text(), st.text())
def test_elements_escape_whatever_they_are_given(text: str, value: str) -> None:
    """An element reads back as the one that was made."""
    made = ET.fromstring(  # noqa: S314 - what we wrote ourselves
        render(element("text", text=text.replace("\r", ""), class_=value))
    )
    assert (made.text or "") == visible(text.replace("\r", ""))
    assert len(made) == 0


# --- what it says -----------------------------------------------------------------------------------------------------


def test_the_cost_comes_first(full: ReportSources, page: Document) -> None:
    """The worst task with its interval and verdict, how many are worse, and the mean; then what was won."""
    assert full.report is not None
    worst = full.report.tasks[0]
    ends = " to ".join(map(signed, worst.interval))
    order = [
        f"{signed(worst.change)}",
        worst.task,
        f"95 % interval {ends}",
        LOSS,
        "8 of 20",
        "tasks are significantly worse",
    ]
    order += [
        "Mean of the tasks: ",
        f"{MINUS}3.0 points",
        "Won",
        "8 of 16 experts kept in each of 4 layers: 32 experts fewer (50 %)",
    ]
    order += [f"61.0 GB → 33.0 GB ({MINUS}46 %)"]
    positions = [page.text.index(part, page.text.index("Cost")) for part in order]
    assert positions == sorted(positions)


def test_partial_runs_say_so_on_top(full: ReportSources) -> None:
    """The banner stands above the headline, and only where documents were left out."""
    assert full.report is not None
    text = Document(render_html(full)).text
    assert text.index("NOT the full benchmark") < text.index("Cost")
    whole = tuple(dataclasses.replace(row, n_full=row.n) for row in full.report.tasks)
    sources = ReportSources(report=dataclasses.replace(full.report, tasks=whole))
    assert "NOT the full" not in render_html(sources)


def test_inconclusive_never_looks_fine(full: ReportSources) -> None:
    """An inconclusive task has a class and a shape of its own, and so has a verdict that nobody knows."""
    assert full.report is not None
    shapes = {}
    for verdict in (INCONCLUSIVE, "unheard of", NO_MATERIAL_LOSS, GAIN, LOSS):
        row = dataclasses.replace(full.report.tasks[0], verdict=verdict)
        text = render_html(ReportSources(report=dataclasses.replace(full.report, tasks=(row,), suite=None)))
        found = re.search(r'class="verdict ([a-z]+)"><svg [^>]*><path d="([^"]+)"', text)
        assert found
        shapes[verdict] = found.groups()
    assert shapes["unheard of"] == shapes[INCONCLUSIVE]
    assert len({shape for _, shape in shapes.values()}) == len({kind for kind, _ in shapes.values()}) == 4


def test_every_number_of_a_task_is_in_its_row(full: ReportSources, page: Document) -> None:
    """Base, pruned, change, interval, lost, gained, flips, adjusted p, lower bound and detectable effect."""
    assert full.report is not None
    row = full.report.tasks[3]
    cells = [NO_MATERIAL_LOSS, "70.0", f"{100 * row.pruned:.1f}", signed(row.change)]
    cells += [" to ".join(map(signed, row.interval)), "30", "12", "10.5", "0.060", signed(row.ni_lower), "4.5"]
    cells += ["400 of 1,000", "60", "5", "acc, strict"]
    assert "".join([row.task, *cells]) in page.text.replace("\n", "")


def test_metrics_on_their_own_scale_are_not_drawn_in_points(full: ReportSources) -> None:
    """They are in the table, with their own digits, and the page says why the plot lacks them."""
    assert full.report is not None
    row = dataclasses.replace(
        full.report.tasks[0], unit="raw", base=12.3456, change=-0.0123, interval=(-0.02, -0.004), task="perplexing"
    )
    text = Document(render_html(ReportSources(report=dataclasses.replace(full.report, tasks=(row,), suite=None)))).text
    assert "scale of their own, and so in the table only: perplexing" in text
    assert "12.35" in text
    assert f"{MINUS}0.0123" in text
    assert f"{MINUS}0.02 to {MINUS}0.004" in text


@pytest.mark.parametrize("missing", ["report", "plan", "statistics", "provenance", "probes", "sweep", "text"])
def test_a_missing_source_is_a_line_with_a_command(full: ReportSources, missing: str) -> None:
    """Each artifact can be missing: all sections stand, and the one that it fills says how to fill it."""
    found = Document(render_html(dataclasses.replace(full, **{missing: None})))
    assert found.ids == SECTIONS
    commands = {
        "report": "No task was run. moeprune eval MODEL PRUNED --tasks",
        "plan": "The plan is not at hand. moeprune report REPORT PRUNED",
        "statistics": "The statistics are not at hand",
        "provenance": "How it was made",
        "probes": "No probe was run. moeprune eval MODEL PRUNED --probes",
        "sweep": "moeprune sweep MODEL --ratios",
        "text": "No text was scored. moeprune eval MODEL plan.json --text",
    }
    assert commands[missing] in found.text
    if missing != "provenance":
        assert commands[missing] not in Document(render_html(full)).text


@pytest.mark.parametrize("only", ["report", "plan", "statistics", "provenance", "probes", "sweep", "text"])
def test_one_source_is_enough(full: ReportSources, only: str) -> None:
    """A page can be drawn of any artifact alone."""
    assert Document(render_html(ReportSources(**{only: getattr(full, only)}))).ids == SECTIONS


def test_a_plan_alone_says_that_nothing_was_measured(full: ReportSources) -> None:
    """Without a report the headline is not silent about the cost."""
    text = Document(render_html(ReportSources(plan=full.plan, statistics=full.statistics))).text
    assert "not measured" in text
    assert "8 of 16 experts kept" in text


def test_thin_calibration_is_counted(full: ReportSources) -> None:
    """Experts below the minimum count are named, with how many of them stay; each bin says how many stay and go."""
    assert full.statistics is not None
    assert full.plan is not None
    count_DE = np.full((3, 16), 50)
    count_DE[:, :3] = [[0, 5, 6], [0, 0, 6], [0, 0, 7]]  # 0, 5 and 19 tokens
    layers = {layer: {**arrays, "count": count_DE} for layer, arrays in full.statistics.layers.items()}
    kept = {layer: LayerPlan(keep=tuple(range(2, 10))) for layer in layers}
    statistics, plan = dataclasses.replace(full.statistics, layers=layers), dataclasses.replace(full.plan, layers=kept)
    found = Document(render_html(ReportSources(plan=plan, statistics=statistics)))
    assert "12 experts of 64 below 20 tokens, 4 of them kept" in found.text
    bins = re.findall(r">(\d+) kept, (\d+) dropped<", found.source)
    assert bins == [("0", "4"), ("4", "4"), ("0", "0"), ("28", "24"), ("0", "0"), ("0", "0")]


def test_commands_are_those_that_were_recorded(full: ReportSources) -> None:
    """Every stage whose options are known, in order; names with spaces are quoted."""
    found = command_lines(full)
    assert found[0].startswith(
        "moeprune collect MODEL --calibration data.jsonl -o statistics.safetensors --num-samples"
    )
    assert found[1].startswith("moeprune plan statistics.safetensors MODEL -o plan.json --strategy reap --ratio 0.5")
    assert found[2] == "moeprune apply MODEL plan.json -o PRUNED"
    assert found[3].startswith("moeprune eval MODEL PRUNED -o report --tasks task_0,task_1,")
    assert "--text 'code=held out.jsonl'" in found[4]
    compared = dataclasses.replace(full.report, command={"margin": 1.0, "alpha": 0.05, "metrics": {}})  # type: ignore[type-var]
    [line] = command_lines(ReportSources(report=compared))
    assert line == "moeprune compare BASE_RUN PRUNED_RUN -o report --margin 1.0"


def test_several_strategies_stand_side_by_side(full: ReportSources, page: Document) -> None:
    """A sweep of several strategies has a curve of each for every measure, on one scale, in the order of the file."""
    assert full.sweep is not None
    assert re.findall(r"<figcaption>(\w+): mean of the tasks, points", page.source) == ["reap", "random"]
    one = {**full.sweep, "points": [point for point in full.sweep["points"] if point["strategy"] == "reap"]}
    assert "reap: mean" not in Document(render_html(ReportSources(sweep=one))).text
    fractions = copy.deepcopy(one)
    fractions["points"][0]["ratio"] = "1/8"
    assert "1/8" in Document(render_html(ReportSources(sweep=fractions))).text


def test_equal_sources_give_equal_bytes(full: ReportSources, tmp_path: Path) -> None:
    """Twice the same page, from values and from files."""
    assert render_html(full) == render_html(SYNTHETIC(4, 16))
    pages = []
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        SAVE(full, tmp_path / name)
        pages.append(render_report(tmp_path / name).read_bytes())
    assert pages[0] == pages[1]


def test_the_largest_page_stays_small() -> None:
    """94 layers of 160 experts, with all else, stay under 3 MB."""
    assert len(render_html(SYNTHETIC(94, 160)).encode()) < 3_000_000


# --- charts -----------------------------------------------------------------------------------------------------------


@given(
    st.lists(st.floats(-1e6, 1e6).map(lambda value: round(value, 3)), min_size=1, max_size=8),
    st.integers(2, 8),
)
def test_scales_hold_their_values_with_few_round_ticks(values: list[float], count: int) -> None:
    """All values lie inside, ticks too, at equal steps; positions keep the order of values."""
    scale = Scale.around(values, count)
    assert all(0 < scale.share(value) < 1 for value in values)
    assert 1 <= len(scale.ticks) <= 2 * count + 1
    assert all(-1e-9 <= scale.share(tick) <= 1 + 1e-9 for tick in scale.ticks)
    shares = [scale.share(value) for value in sorted(values)]
    assert shares == sorted(shares)


def test_a_forest_row_is_drawn_where_its_numbers_are() -> None:
    """Interval, marker, zero and the margin's band stand at the positions of their values."""
    effect = Effect(label="task", change=-2.0, interval=(-3.0, -1.0), verdict=LOSS)
    scale = effect_scale([effect], 1.0)
    row = forest_row(effect, scale, 1.0)
    line = row.find("line[@class='interval loss']")
    band, shape = row.find("rect[@class='band']"), row.find("svg")
    assert line is not None
    assert band is not None
    assert shape is not None
    assert (line.get("x1"), line.get("x2")) == (scale.x(-3.0), scale.x(-1.0))
    assert shape.get("x") == scale.x(-2.0)
    assert band.get("x") == scale.x(-1.0)
    width = float(band.get("width", "")[:-1])
    assert width == pytest.approx(100 * (scale.share(0) - scale.share(-1)), abs=0.01)


def test_the_heatmap_marks_every_dropped_expert() -> None:
    """One cell with its title per expert, and a stroke through those that are dropped, not a colour alone."""
    dropped = [True, False, True, False, False]
    rows = [HeatRow(layer=7, shades=[0, 1, 2, 3, 7], dropped=dropped, titles=list("abcde"))]
    drawn = heatmap(rows, "scores")
    cells = list(drawn.iter("rect"))
    assert [cell.get("class") for cell in cells] == ["h0", "h1", "h2", "h3", "h7"]
    assert [cell.findtext("title") for cell in cells] == list("abcde")
    [cut] = [path for path in drawn.iter("path") if path.get("class") == "cut"]
    pitch = int(cells[1].get("x", "")) - int(cells[0].get("x", ""))
    assert re.findall(r"M(\d+) ", cut.get("d", "")) == ["1", str(2 * pitch + 1)]
    assert [text.text for text in drawn.iter("text")][-1] == "7"


def test_shades_follow_the_scores() -> None:
    """By share of the layer's mean where that has a meaning, else by rank; never against the order of the scores."""
    assert shades([0, 0.2, 1, 1, 7.8], relative=True) == [0, 0, 3, 3, 5]
    assert shades([-5.0, -1.0, 0.0, 3.0], relative=False) == [0, 2, 4, 6]
    assert max(shades([1e-9] * 1000 + [1e9], relative=True)) == SHADES - 1


@pytest.mark.parametrize("scores", [(-3.0, 2.0, 1.0, 0.5), (0.0, 0.0, 0.0, 0.0)])
def test_scores_of_any_sign_are_drawn(full: ReportSources, scores: tuple[float, ...]) -> None:
    """Negative scores and layers of zeros are shaded by rank, and their curves stay finite."""
    assert full.plan is not None
    layers = {3: LayerPlan(keep=(1, 2), scores=scores)}
    text = render_html(ReportSources(plan=dataclasses.replace(full.plan, layers=layers, budget={}, coverage={})))
    assert "rank of the score" in text
    assert "nan" not in re.sub(r"<style>.*</style>", "", text, flags=re.DOTALL)


def test_layers_that_differ_are_columns(full: ReportSources) -> None:
    """Where layers keep different numbers each has a column, and a copied layer says so."""
    assert full.plan is not None
    scores = tuple(map(float, range(8)))
    layers = {
        0: LayerPlan(keep=(1, 2, 3), scores=scores),
        1: LayerPlan(keep=(4, 5), scores=scores),
        2: LayerPlan(keep=(4, 5), copied_from=1),
    }
    plan = dataclasses.replace(full.plan, layers=layers, budget={"of": 8}, coverage={}, allow_non_uniform=True)
    found = Document(render_html(ReportSources(plan=plan)))
    assert "layer 0: 3 of 8" in found.text
    assert "2 to 3 of 8 experts kept" in found.text
    assert "2 (as layer 1)" in found.text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0"), (0.00012345, "0.000123"), (-12.34, f"{MINUS}12.3"), (1000, "1000"), (12345.0, "12300")],
)
def test_numbers_have_three_digits(value: float, text: str) -> None:
    """Three digits at any magnitude, with a real minus sign."""
    assert plain(value) == text


def test_what_rounds_to_zero_has_no_sign() -> None:
    """A change too small for the digits shown is 0.0, not minus 0.0."""
    assert [signed(value) for value in (-0.01, 0.04, -0.06, 2.0)] == ["0.0", "0.0", f"{MINUS}0.1", "+2.0"]


# --- files ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(full: ReportSources, tmp_path: Path) -> Path:
    """A folder like ``OUT`` of a one-shot run."""
    out = tmp_path / "out"
    (out / "moeprune" / "report").mkdir(parents=True)
    SAVE(full, out / "moeprune")
    (out / "moeprune" / "report.json").rename(out / "moeprune" / "report" / "report.json")
    return out


def test_the_page_lands_beside_the_report(folder: Path, tmp_path: Path) -> None:
    """From the checkpoint, its records or the report's own folder the same page comes, beside the report."""
    place = folder / "moeprune" / "report" / "report.html"
    assert render_report(folder) == place
    page = place.read_bytes()
    for start in (folder / "moeprune", folder / "moeprune" / "report"):
        with pytest.raises(ConfigError, match="exists"):
            render_report(start)
        assert render_report(start, overwrite=True) == place
        assert place.read_bytes() == page
    assert render_report([folder], tmp_path / "page.html").read_bytes() == page
    (folder / "moeprune" / "report" / "report.json").unlink()
    assert render_report(folder, overwrite=True) == place
    assert place.read_bytes() != page


def test_each_artifact_comes_from_the_first_folder_that_has_it(
    folder: Path, tmp_path: Path, full: ReportSources
) -> None:
    """A report of its own goes before that of the checkpoint, whose plan joins it; a named file goes before all."""
    own = tmp_path / "own"
    own.mkdir()
    assert full.report is not None
    (own / "report.json").write_text(dataclasses.replace(full.report, pruned_model="own").to_json())
    text = Document(render_report([own, folder], tmp_path / "page.html").read_text()).text
    assert "What pruning cost: own against base" in text
    assert "8 of 16 experts kept" in text
    named = tmp_path / "named.json"
    named.write_text(json.dumps({**dict(full.sweep or {}), "summary": ["a summary of its own"]}))
    text = Document(render_report(folder, tmp_path / "named.html", sweep=named).read_text()).text
    assert "a summary of its own" in text


@pytest.mark.parametrize(
    "file", ["plan.json", "statistics.safetensors", "report/report.json", "sweep.json", "probes.json"]
)
def test_artifacts_of_another_model_are_refused(folder: Path, tmp_path: Path, full: ReportSources, file: str) -> None:
    """Whatever is of another model than the rest stops the page by name; beside a new report it is left out."""
    other, records = {"model": "9" * 64}, folder / "moeprune"
    if file == "plan.json":
        dataclasses.replace(full.plan, inputs=other).save(records / file)  # type: ignore[type-var]
    elif file.endswith(".safetensors"):
        dataclasses.replace(full.statistics, inputs=other).save(records / file)  # type: ignore[type-var]
    else:
        payload = json.loads((records / file).read_text())
        (records / file).write_text(json.dumps(payload | {"inputs": other | {"base": other["model"]}}))
    with pytest.raises(StaleArtifactError, match="made for another model"):
        render_report(folder, tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()


@pytest.mark.parametrize(
    ("inputs", "problem"),
    [({"plan": "9" * 64}, "made with another plan"), ({"pruned": "9" * 64}, "made for another checkpoint")],
)
def test_probes_of_another_checkpoint_are_refused(
    folder: Path, tmp_path: Path, full: ReportSources, inputs: dict[str, str], problem: str
) -> None:
    """Probes say what they were run on: another plan or checkpoint than the page's is no part of it."""
    payload = {**dict(full.probes or {}), "inputs": {"model": "0" * 64} | inputs}
    (folder / "moeprune" / "probes.json").write_text(json.dumps(payload))
    with pytest.raises(StaleArtifactError, match=problem):
        render_report(folder, tmp_path / "page.html")
    digest = hashlib.sha256((folder / "moeprune" / "plan.json").read_bytes()).hexdigest()
    payload["inputs"] = {"model": "0" * 64, "plan": digest, "pruned": "3" * 64}
    (folder / "moeprune" / "probes.json").write_text(json.dumps(payload))
    render_report(folder, tmp_path / "page.html")


def test_a_plan_of_another_model_does_not_spoil_a_new_report(
    folder: Path, tmp_path: Path, full: ReportSources, capsys: pytest.CaptureFixture[str]
) -> None:
    """An evaluation that is done gets its page all the same, without the plan, and says why."""
    own = tmp_path / "own"
    own.mkdir()
    assert full.report is not None
    inputs = {"base": "9" * 64, "pruned": "3" * 64}
    (own / "report.json").write_text(dataclasses.replace(full.report, inputs=inputs).to_json())
    text = write_page(own, folder).read_text()
    assert "The plan is not at hand" in text
    assert "made for another model" in capsys.readouterr().err


def test_runs_of_unknown_models_are_not_taken_for_the_plans(full: ReportSources) -> None:
    """A comparison of other tools' runs beside a plan says that nothing binds the two."""
    assert full.report is not None
    compared = dataclasses.replace(full.report, command={"margin": 1.0}, inputs={"base": "a", "pruned": "b"})
    text = Document(render_html(ReportSources(report=compared, plan=full.plan))).text
    assert "nothing proves that the plan shown here is theirs" in text
    assert "nothing proves" not in Document(render_html(ReportSources(report=compared))).text


def test_what_holds_nothing_is_refused(tmp_path: Path) -> None:
    """A folder without artifacts, no folder, a missing file and a damaged one: an error with a hint, and no page."""
    with pytest.raises(ConfigError, match="holds no report, plan or statistics"):
        render_report(tmp_path)
    with pytest.raises(ConfigError, match="is no folder"):
        render_report(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="something to show"):
        render_report([])
    with pytest.raises(ConfigError, match="something to show"):
        ReportSources()
    with pytest.raises(ArtifactError, match="cannot read"):
        render_report(tmp_path, sweep=tmp_path / "nowhere.json")
    (tmp_path / "plan.json").write_text('{"schema": "moeprune.plan/2"}')
    with pytest.raises(ArtifactError, match=r"not a moeprune\.plan/1 file"):
        render_report(tmp_path)
    assert not list(tmp_path.glob("*.html"))


@pytest.mark.parametrize(
    ("source", "path", "value"),
    [
        ("probes", ("rows", 0, "unit"), "furlongs"),
        ("probes", ("rows", 0, "interval"), None),
        ("probes", ("rows", 0, "base"), "much"),
        ("sweep", ("points",), []),
        ("sweep", ("points", 0, "ratio"), "half"),
        ("sweep", ("points", 0, "suite", "change"), "big"),
        ("text", ("plans", 0, "ratio"), 1.0),
        ("text", ("extent",), None),
    ],
)
def test_what_cannot_be_shown_is_an_error_that_names_it(
    full: ReportSources, source: str, path: tuple[Any, ...], value: Any
) -> None:
    """Values of the wrong kind are no traceback and no nonsense on the page."""
    payload = copy.deepcopy(dict(getattr(full, source)))
    inner: Any = payload
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    with pytest.raises(ArtifactError, match="cannot be shown") as caught:
        render_html(ReportSources(**{source: payload}))
    assert source in caught.value.message


@pytest.mark.parametrize(
    "wrong",
    [
        {"layers": {}},
        {"layers": {0: LayerPlan(keep=())}},
        {"layers": {0: LayerPlan(keep=(99,))}},
        {"size": {"bytes": {"before": "big"}}},
        {"coverage": {"code": "most"}},
        {"stability": {"median": 1, "lowest": ""}},
    ],
)
def test_a_plan_that_no_stage_would_write_is_an_error(full: ReportSources, wrong: dict[str, Any]) -> None:
    """A plan edited beyond use stops the page with its name."""
    assert full.plan is not None
    sources = dataclasses.replace(full, provenance=None, plan=dataclasses.replace(full.plan, **wrong))
    with pytest.raises(ArtifactError, match="the plan or the statistics cannot be shown"):
        render_html(sources)


def test_the_page_is_written_whole(full: ReportSources, tmp_path: Path) -> None:
    """`write_html` leaves one file with the page."""
    assert write_html(full, tmp_path / "new").read_text() == render_html(full)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["report.html"]
