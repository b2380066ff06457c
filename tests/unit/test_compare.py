"""Paired comparison of two lm-eval folders, against planted results and against statsmodels."""

from __future__ import annotations

import hashlib
import json
import math
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeprune.errors import ArtifactError, EvaluationError
from moeprune.evaluation.compare import EvalReport, compare_folders
from moeprune.evaluation.paired import (
    GAIN,
    INCONCLUSIVE,
    LOSS,
    NO_MATERIAL_LOSS,
    SMALL_LOSS,
    bootstrap_interval,
    detectable_change,
    holm,
    mcnemar,
    permutation_p,
    tango_interval,
    verdict_of,
)

Row = dict[str, Any]


def digest(value: object) -> str:
    """A hash as lm-eval takes it."""
    return hashlib.sha256(str(value).encode()).hexdigest()


def sample(doc_id: int, scores: Mapping[str, float], **changes: Any) -> Row:
    """One row of lm-eval's sample file, multiple choice with two options; a right answer is option 0."""
    right = scores.get("acc", 1.0) >= 0.5
    row = {
        "doc_id": doc_id,
        "filter": "none",
        "arguments": {f"gen_args_{i}": {"arg_0": f"question {doc_id}", "arg_1": f" {i}"} for i in range(2)},
        "filtered_resps": [["-1.0", "False"], ["-2.0" if right else "-0.5", "False"]],
        "doc_hash": digest(("doc", doc_id)),
        "prompt_hash": digest(("prompt", doc_id)),
        "target_hash": digest(("target", doc_id)),
        "metrics": list(scores),
        **scores,
    }
    return {**row, **changes}


def write_run(folder: Path, tasks: Mapping[str, Sequence[Row]], *, model: str = "m", **changes: Any) -> Path:
    """A folder as ``lm_eval run --log_samples`` leaves it; ``changes`` replace top-level results."""
    inner = folder / "some__model"
    inner.mkdir(parents=True)
    sizes = {name: len({row["doc_id"] for row in rows}) for name, rows in tasks.items()}
    results = {
        "configs": {name: {"output_type": "multiple_choice"} for name in tasks},
        "versions": dict.fromkeys(tasks, 1.0),
        "n-shot": dict.fromkeys(tasks, 0),
        "n-samples": {name: {"original": size, "effective": size} for name, size in sizes.items()},
        "higher_is_better": {name: {"acc": True} for name in tasks},
        "config": {"batch_size": 16, "limit": None},
        "model_name": f"/somewhere/{model}",
        "chat_template_sha": None,
        **changes,
    }
    stamp = "2026-01-01T00-00-00.000000"
    (inner / f"results_{stamp}.json").write_text(json.dumps(results))
    for name, rows in tasks.items():
        (inner / f"samples_{name}_{stamp}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def planted(n: int, lost: int, gained: int) -> tuple[list[Row], list[Row]]:
    """Samples of a base that is right on the first half and a pruned model with so many losses and gains."""
    base = [float(i < n // 2) for i in range(n)]
    pruned = list(base)
    pruned[:lost] = [0.0] * lost
    pruned[n - gained :] = [1.0] * gained
    return [sample(i, {"acc": v}) for i, v in enumerate(base)], [sample(i, {"acc": v}) for i, v in enumerate(pruned)]


def compare(tmp_path: Path, base: Mapping[str, Any], pruned: Mapping[str, Any], **options: Any) -> EvalReport:
    """Write both runs and compare them."""
    write_run(tmp_path / "base", base, model="big")
    write_run(tmp_path / "pruned", pruned, model="small")
    return compare_folders(tmp_path / "base", tmp_path / "pruned", **options)


# --- planted results --------------------------------------------------------------------------------------------------


def test_identical_runs_are_inconclusive_with_zero_flips(tmp_path: Path) -> None:
    """Two hundred equal answers do not prove that nothing above a point was lost."""
    base, _ = planted(200, 0, 0)
    [row] = compare(tmp_path, {"t": base}, {"t": base}).tasks
    assert (row.lost, row.gained, row.flips, row.answers_changed, row.change, row.p) == (0, 0, 0, 0, 0, 1)
    assert row.interval == pytest.approx((-1.885, 1.885), abs=0.01)
    assert row.verdict == INCONCLUSIVE
    assert row.mde == pytest.approx(100 * 6 / 200)


def test_identical_runs_of_many_documents_show_no_material_loss(tmp_path: Path) -> None:
    """With enough documents the interval of no flips lies within the margin."""
    base, _ = planted(1000, 0, 0)
    [row] = compare(tmp_path, {"t": base}, {"t": base}).tasks
    assert row.verdict == NO_MATERIAL_LOSS


def test_known_loss(tmp_path: Path) -> None:
    """Thirty lost and five gained of two hundred are a loss of 12.5 points."""
    base, pruned = planted(200, 30, 5)
    report = compare(tmp_path, {"t": base}, {"t": pruned})
    [row] = report.tasks
    assert (row.base, row.pruned, row.change) == (0.5, 0.375, -12.5)
    assert (row.lost, row.gained, row.flips, row.answers_changed) == (30, 5, 17.5, 35)
    assert row.p == row.p_adjusted == mcnemar(30, 5)
    assert row.verdict == LOSS
    assert (report.base_model, report.pruned_model, report.warnings, report.suite) == ("big", "small", (), None)


def test_known_gain_and_swapped_order_mirrors(tmp_path: Path) -> None:
    """Swapping the folders mirrors every number and turns the gain into a loss."""
    base, pruned = planted(200, 5, 30)
    [gain] = compare(tmp_path / "one", {"t": base}, {"t": pruned}).tasks
    [loss] = compare(tmp_path / "two", {"t": pruned}, {"t": base}).tasks
    assert (gain.verdict, loss.verdict) == (GAIN, LOSS)
    assert (gain.lost, gain.gained, gain.p, gain.mde) == (loss.gained, loss.lost, loss.p, loss.mde)
    assert gain.change == -loss.change
    assert gain.interval == pytest.approx((-loss.interval[1], -loss.interval[0]))


def test_rows_are_worst_first_with_a_suite_row(tmp_path: Path) -> None:
    """The largest loss comes first; the suite is the mean with the tasks' errors combined."""
    pairs = {"mild": planted(400, 8, 4), "bad": planted(200, 40, 0), "good": planted(200, 0, 30)}
    report = compare(tmp_path, {k: v[0] for k, v in pairs.items()}, {k: v[1] for k, v in pairs.items()})
    assert [row.task for row in report.tasks] == ["bad", "mild", "good"]
    assert report.suite is not None
    assert report.suite.change == pytest.approx(np.mean([row.change for row in report.tasks]))
    half = math.sqrt(sum((row.interval[1] - row.interval[0]) ** 2 / 4 for row in report.tasks)) / 3
    assert report.suite.interval[1] - report.suite.change == pytest.approx(half)
    assert [row.p_adjusted for row in report.tasks] == holm([row.p for row in report.tasks])


def test_documents_are_paired_by_id_not_by_position(tmp_path: Path) -> None:
    """A run whose rows come in another order gives the same numbers."""
    base, pruned = planted(60, 9, 2)
    [row] = compare(tmp_path, {"t": base}, {"t": pruned[::-1]}).tasks
    assert (row.lost, row.gained) == (9, 2)


def test_several_filters_and_metrics(tmp_path: Path) -> None:
    """The strict filter's accuracy is primary; any other metric and filter can be asked for by name."""

    def both(strict: float, loose: float) -> list[Row]:
        metrics = [({"acc_norm": 0.0, "acc": strict}, "strict"), ({"acc_norm": 1.0, "acc": loose}, "loose")]
        return [sample(i, values, filter=name) for i in range(20) for values, name in metrics]

    write_run(tmp_path / "base", {"t": both(1.0, 1.0)})
    write_run(tmp_path / "pruned", {"t": both(0.0, 1.0)})

    def found(**metrics: str) -> tuple[str, str, int, int]:
        [row] = compare_folders(tmp_path / "base", tmp_path / "pruned", metrics=metrics).tasks
        return row.metric, row.filter, row.n, row.lost

    assert found() == ("acc", "strict", 20, 20)
    assert found(t="acc,loose") == ("acc", "loose", 20, 0)
    assert found(t="acc_norm") == ("acc_norm", "strict", 20, 0)
    with pytest.raises(EvaluationError, match="'acc_norm'"):
        found(t="acc_nrm")
    with pytest.raises(EvaluationError, match="no task 'u'"):
        found(u="acc")


def test_lower_is_better_and_raw_units(tmp_path: Path) -> None:
    """A metric that is better when lower counts a fall as a gain, and is not called points beyond 0..1."""
    rng = np.random.default_rng(0)
    base = [sample(i, {"ter": v}) for i, v in enumerate(rng.uniform(40, 60, 50))]
    pruned = [sample(i, {"ter": row["ter"] - 5 + rng.normal()}) for i, row in enumerate(base)]
    better = {"higher_is_better": {"t": {"ter": False}}}
    write_run(tmp_path / "base", {"t": base}, **better)
    write_run(tmp_path / "pruned", {"t": pruned}, **better)
    report = compare_folders(tmp_path / "base", tmp_path / "pruned")
    [row] = report.tasks
    assert (row.metric, row.unit, row.verdict, row.lost) == ("ter", "raw", GAIN, 0)
    assert row.change == pytest.approx(row.base - row.pruned)
    assert row.interval[0] < row.change < row.interval[1]
    assert "its own scale" in report.warnings[0]


def test_choice_kl_is_over_the_options_alone(tmp_path: Path) -> None:
    """The two models' odds of a question's options, renormalised: by hand on two options, nothing without options."""
    base, pruned = planted(20, 5, 0)
    [row] = compare(tmp_path / "one", {"t": base}, {"t": pruned}).tasks
    right, wrong = (1 / (1 + math.exp(-gap)) for gap in (1.0, -0.5))  # of option 0, which is base's own
    moved = right * math.log(right / wrong) + (1 - right) * math.log((1 - right) / (1 - wrong))
    assert row.choice_kl is not None
    assert row.choice_kl.value == pytest.approx(5 * moved / 20)
    assert 0 <= row.choice_kl.interval[0] < row.choice_kl.value < row.choice_kl.interval[1]
    [same] = compare(tmp_path / "two", {"t": base}, {"t": base}).tasks
    assert same.choice_kl is not None
    assert (same.choice_kl.value, same.choice_kl.interval) == (0.0, (0.0, 0.0))
    pruned[3]["filtered_resps"] = [["nan", "False"], ["-1.0", "False"]]
    [broken] = compare(tmp_path / "three", {"t": base}, {"t": pruned}).tasks
    assert broken.choice_kl is None
    written = [sample(i, {"exact_match": 1.0}, filtered_resps=["a"]) for i in range(20)]
    for side in ("base", "pruned"):
        write_run(tmp_path / "four" / side, {"t": written}, configs={"t": {"output_type": "generate_until"}})
    [free] = compare_folders(tmp_path / "four" / "base", tmp_path / "four" / "pruned").tasks
    assert free.choice_kl is None


def test_corpus_metrics_are_left_out_aloud(tmp_path: Path) -> None:
    """A task without a score per document is named in the warnings; alone it is an error."""
    rolling = [sample(i, {}, metrics=["word_perplexity"], word_perplexity=[-9.0, 4]) for i in range(4)]
    base, pruned = planted(20, 2, 1)
    report = compare(tmp_path / "one", {"t": base, "wiki": rolling}, {"t": pruned, "wiki": rolling})
    assert [row.task for row in report.tasks] == ["t"]
    assert "wiki" in report.warnings[0]
    with pytest.raises(EvaluationError, match="per-document"):
        compare(tmp_path / "two", {"wiki": rolling}, {"wiki": rolling})


# --- runs that may not be compared ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt_hash": "x"}, "document 3: changed prompt"),
        ({"doc_hash": "x"}, "document 3: changed document"),
        ({"target_hash": "x"}, "document 3: changed target"),
        ({"arguments": {"gen_args_0": {"arg_0": "question 3", "arg_1": " other"}}}, "document 3: changed requests"),
        ({"doc_id": 99}, "only one run has the documents 3, 99"),
        ({"doc_id": 2}, "document 2 twice"),
        ({"acc": math.nan}, "not finite"),
    ],
)
def test_changed_documents_are_refused(tmp_path: Path, changes: Row, message: str) -> None:
    """One document that differs between the runs stops the comparison, by name."""
    base, pruned = planted(10, 1, 1)
    pruned[3] |= changes
    with pytest.raises(EvaluationError, match=message):
        compare(tmp_path, {"t": base}, {"t": pruned})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"versions": {"t": 2.0}}, "version"),
        ({"n-shot": {"t": 5}}, "few-shot"),
        ({"chat_template_sha": "x"}, "chat template"),
        ({"system_instruction_sha": "x"}, "system instruction"),
    ],
)
def test_changed_settings_are_refused(tmp_path: Path, changes: Row, message: str) -> None:
    """Runs of another version, prompt style or number of examples are not the same experiment."""
    base, pruned = planted(10, 1, 1)
    write_run(tmp_path / "base", {"t": base})
    write_run(tmp_path / "pruned", {"t": pruned}, **changes)
    with pytest.raises(EvaluationError, match=message):
        compare_folders(tmp_path / "base", tmp_path / "pruned")


def test_missing_documents_and_tasks_are_refused(tmp_path: Path) -> None:
    """A run with fewer documents or tasks is refused rather than compared on what is left."""
    base, pruned = planted(10, 1, 1)
    with pytest.raises(EvaluationError, match="only one run has the documents 8, 9"):
        compare(tmp_path / "one", {"t": base}, {"t": pruned[:8]})
    with pytest.raises(EvaluationError, match="has the tasks u"):
        compare(tmp_path / "two", {"t": base, "u": base}, {"t": pruned})


def test_unreadable_folders_are_refused(tmp_path: Path) -> None:
    """No run, several runs, no samples and broken files each say what is wrong."""
    good = write_run(tmp_path / "good", {"t": planted(4, 1, 1)[0]})
    (tmp_path / "none").mkdir()
    with pytest.raises(EvaluationError, match="no lm-eval results"):
        compare_folders(good, tmp_path / "none")
    write_run(tmp_path / "many" / "a", {"t": []})
    write_run(tmp_path / "many" / "b", {"t": []})
    with pytest.raises(EvaluationError, match="holds 2 lm-eval runs"):
        compare_folders(good, tmp_path / "many")
    for name, breakage in (("cut", '{"doc_id": 1'), ("empty", "")):
        folder = write_run(tmp_path / name, {"t": []})
        next(folder.rglob("samples_*")).write_text(breakage)
        with pytest.raises(EvaluationError, match=r"cannot read|no documents"):
            compare_folders(good, folder)
    next((tmp_path / "cut").rglob("samples_*")).unlink()
    with pytest.raises(EvaluationError, match="no samples of task 't'"):
        compare_folders(good, tmp_path / "cut")


def test_doubtful_runs_are_warned_about(tmp_path: Path) -> None:
    """The same model twice, another batch size and NaN likelihoods are compared, but not in silence."""
    base, pruned = planted(10, 1, 1)
    pruned[0]["filtered_resps"] = [["nan", "False"], ["nan", "False"]]
    write_run(tmp_path / "base", {"t": base})
    write_run(tmp_path / "pruned", {"t": pruned}, config={"batch_size": 4, "limit": None})
    text = "\n".join(compare_folders(tmp_path / "base", tmp_path / "pruned").warnings)
    assert "same model" in text
    assert "batch_size (16 and 4)" in text
    assert "pruned model gave NaN likelihoods on 1 documents" in text


# --- the report as a value --------------------------------------------------------------------------------------------


def test_report_round_trips_and_is_deterministic(tmp_path: Path) -> None:
    """A report reads back equal, and equal runs give equal bytes wherever they lie."""
    pairs = {"t": planted(40, 5, 1), "u": planted(30, 1, 1)}
    runs = [{name: pair[side] for name, pair in pairs.items()} for side in (0, 1)]
    one, two = (compare(tmp_path / name, *runs) for name in ("one", "two"))
    assert one.to_json() == two.to_json()
    assert EvalReport.from_json(one.to_json()) == one
    payload = json.loads(one.to_json())
    assert payload["schema"] == "moeprune.report/1"
    assert str(tmp_path) not in one.to_json()
    del payload["tasks"][0]["p"]
    with pytest.raises(ArtifactError, match="not a complete"):
        EvalReport.from_json(json.dumps(payload))


def test_limit_marks_the_report_as_partial(tmp_path: Path) -> None:
    """A run on the first documents only says so."""
    base, pruned = planted(10, 1, 1)
    sizes = {"n-samples": {"t": {"original": 500, "effective": 10}}, "config": {"batch_size": 16, "limit": 10.0}}
    write_run(tmp_path / "base", {"t": base}, **sizes)
    write_run(tmp_path / "pruned", {"t": pruned}, **sizes)
    report = compare_folders(tmp_path / "base", tmp_path / "pruned")
    assert (report.limit, report.partial, report.tasks[0].n_full) == (10, True, 500)


# --- statistics -------------------------------------------------------------------------------------------------------

flips = st.tuples(st.integers(0, 60), st.integers(0, 60), st.integers(1, 400)).map(lambda t: (t[0], t[1], sum(t)))


@settings(deadline=None)  # the first call imports scipy and statsmodels
@given(flips)
def test_mcnemar_equals_statsmodels(case: tuple[int, int, int]) -> None:
    """The exact McNemar p is statsmodels' own."""
    from statsmodels.stats.contingency_tables import mcnemar as reference

    lost, gained, n = case
    expected = float(reference([[n - lost - gained, lost], [gained, 0]], exact=True).pvalue)
    assert mcnemar(lost, gained) == pytest.approx(min(expected, 1.0), abs=1e-12)


@settings(deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_equals_statsmodels(p_values: list[float]) -> None:
    """Holm's adjustment is statsmodels' own, ties and all."""
    from statsmodels.stats.multitest import multipletests

    assert holm(p_values) == pytest.approx(multipletests(p_values, method="holm")[1])


def test_tango_gives_published_intervals() -> None:
    """Two data sets as R gives them (contingencytables on Cavo et al. 2012; PropCIs), and no flips in closed form."""
    assert tango_interval(16, 6, 161) == pytest.approx((-0.1240, -0.0054), abs=5e-5)
    assert tango_interval(25, 28, 618, 0.9) == pytest.approx((-0.0148, 0.0247), abs=5e-5)
    z2 = 1.959964**2
    assert tango_interval(0, 0, 50) == pytest.approx((-z2 / (50 + z2), z2 / (50 + z2)), abs=1e-6)


@settings(deadline=None)
@given(flips, st.sampled_from([0.8, 0.9, 0.95, 0.99]))
def test_tango_properties(case: tuple[int, int, int], confidence: float) -> None:
    """The interval holds the estimate, mirrors under a swap, and its ends just fail the score test."""
    lost, gained, n = case
    lower, upper = tango_interval(lost, gained, n, confidence)
    assert -1 <= lower <= (gained - lost) / n <= upper <= 1
    assert tango_interval(gained, lost, n, confidence) == pytest.approx((-upper, -lower), abs=1e-9)
    narrow = tango_interval(lost, gained, n, confidence - 0.2)
    assert lower - 1e-9 <= narrow[0] <= narrow[1] <= upper + 1e-9


@pytest.mark.parametrize("case", [(6, 2, 40), (0, 3, 25), (10, 10, 60)])
def test_tango_ends_by_brute_force(case: tuple[int, int, int]) -> None:
    """At each end the score statistic, with its nuisance found on a grid, is the normal quantile."""
    lost, gained, n = case
    for end in tango_interval(lost, gained, n):
        losses = np.linspace(max(0.0, -end), (1 - end) / 2, 400_001)[1:-1]
        gains = losses + end
        same = np.clip(1 - losses - gains, 1e-300, None)
        likelihood = lost * np.log(losses) + gained * np.log(np.clip(gains, 1e-300, None))
        loss = losses[np.argmax(likelihood + (n - lost - gained) * np.log(same))]
        score = (gained - lost - n * end) / math.sqrt(n * (2 * loss + end - end * end))
        assert abs(score) == pytest.approx(1.96, abs=0.01)


def test_tango_covers_the_truth() -> None:
    """Over thousands of planted experiments the 95 % interval holds the true change 95 % of the time."""
    rng = np.random.default_rng(0)
    counts = rng.multinomial(200, [0.03, 0.02, 0.95], size=4000)
    cases, times = np.unique(counts[:, :2], axis=0, return_counts=True)
    held = [lower <= -0.01 <= upper for lower, upper in (tango_interval(*map(int, case), 200) for case in cases)]
    assert 0.935 < np.average(held, weights=times) < 0.975


@settings(max_examples=25, deadline=None)
@given(st.lists(st.floats(-1, 1).map(lambda value: round(value, 2)), min_size=1, max_size=40))
def test_bootstrap_holds_the_estimate(values: list[float]) -> None:
    """Also where a bootstrap has little or nothing to draw from, the interval is finite and holds the mean."""
    change_N = np.array(values)
    lower, upper = bootstrap_interval(change_N, span=1.0)
    assert lower - 1e-9 <= change_N.mean() <= upper + 1e-9
    assert 0 <= permutation_p(change_N) <= 1


def test_bootstrap_agrees_with_theory() -> None:
    """On plenty of normal changes the bootstrap gives the textbook interval and the permutation test its p."""
    change_N = np.random.default_rng(1).normal(0.1, 1, 400)
    half = 1.96 * change_N.std() / 20
    assert bootstrap_interval(change_N, 1.0) == pytest.approx(
        (change_N.mean() - half, change_N.mean() + half), abs=0.02
    )
    assert permutation_p(change_N) == pytest.approx(math.erfc(change_N.mean() / half * 1.96 / math.sqrt(2)), abs=0.02)


def test_detectable_change() -> None:
    """Ten percent of flips on 1172 documents show 2.6 points with 80 % power."""
    assert 100 * detectable_change(math.sqrt(0.1), 1172) == pytest.approx(2.6, abs=0.05)


@pytest.mark.parametrize(
    ("change", "lower", "significant", "verdict"),
    [
        (-0.5, -0.9, True, SMALL_LOSS),
        (-5.0, -7.0, True, LOSS),
        (2.0, 1.0, True, GAIN),
        (-0.1, -0.9, False, NO_MATERIAL_LOSS),
        (-0.1, -1.1, False, INCONCLUSIVE),
        (3.0, -1.0, False, INCONCLUSIVE),
    ],
)
def test_verdicts(change: float, lower: float, *, significant: bool, verdict: str) -> None:
    """Significance and non-inferiority are two questions; neither answered is inconclusive."""
    assert verdict_of(change, lower, 1.0, significant=significant) == verdict


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 12), st.integers(0, 12), st.integers(0, 30))
def test_any_planted_pair_is_read_back(lost: int, gained: int, spare: int) -> None:
    """Whatever was planted is counted, inside its interval, and mirrored under a swap."""
    n = 2 * max(lost, gained, 1) + spare
    base, pruned = planted(n, lost, gained)
    with tempfile.TemporaryDirectory() as folder:
        [row] = compare(Path(folder) / "there", {"t": base}, {"t": pruned}).tasks
        [back] = compare(Path(folder) / "back", {"t": pruned}, {"t": base}).tasks
    assert (row.lost, row.gained, row.n) == (lost, gained, n)
    assert row.interval[0] <= row.ni_lower <= row.change <= row.interval[1]
    assert (back.lost, back.gained, back.change) == (gained, lost, -row.change)


def test_reading_needs_no_torch() -> None:
    """Comparing folders works where neither torch nor lm-eval is loaded."""
    module = sys.modules["moeprune.evaluation.compare"]
    assert not {"torch", "lm_eval", "scipy"} & set(vars(module))
