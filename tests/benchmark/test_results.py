from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest
from scipy import stats

from benchmark.synthetic import DIGITS, SCENES, make_job, write_comparison, write_job
from detente.benchmark.results import Estimate, ResultError, differences, load_comparison, verdict

TASKS = {"left": {"accuracy": "max"}, "right": {"error": "min", "mae": "min"}}


def write(directory: Path, values: dict[str, list[tuple[float, float, float]]], single: list | None = None) -> Path:
    """A comparison with the given (accuracy, error, mae) per label and seed."""
    seeds = tuple(range(max(map(len, values.values()))))
    write_comparison(directory, "mine", DIGITS, tuple(values), seeds, epochs=2, single=single is not None)
    config = json.loads((directory / "comparison.json").read_text())
    (directory / "comparison.json").write_text(json.dumps({**config, "tasks": TASKS}))
    for file in directory.glob("runs/*/*/result.json"):
        job = json.loads(file.read_text())
        file.unlink()
        rows = values.get(job["label"], single or [])
        if job["seed"] < len(rows):
            accuracy, error, mae = rows[job["seed"]]
            job["metrics"] = {"left": {"accuracy": accuracy}, "right": {"error": error, "mae": mae}}
            if job["task"]:
                job["metrics"] = {job["task"]: job["metrics"][job["task"]]}
            file.write_text(json.dumps(job))
    return directory


SINGLE = [(0.8, 10.0, 4.0), (0.9, 30.0, 4.0)]  # means .85, 20, 4
VALUES = {
    "gd": [(0.68, 22.0, 4.4), (0.765, 24.0, 4.4)],
    "pcgrad": [(0.85, 18.0, 4.0), (0.85, 20.0, 4.0)],
}


def test_estimate_is_the_mean_and_the_student_t_interval_of_scipy():
    values = (0.91, 0.87, 0.94)
    estimate = Estimate(dict(enumerate(values)))
    low, high = stats.t.interval(0.95, 2, loc=estimate.mean, scale=stats.sem(values))
    assert estimate.mean == pytest.approx(2.72 / 3, rel=1e-15)  # rounding of a sum of three
    # scipy sums in another order and goes through another quantile routine: a few units in the last place
    assert (estimate.mean - estimate.half_width, estimate.mean + estimate.half_width) == pytest.approx((low, high))


def test_one_seed_and_a_diverged_seed_have_no_interval():
    assert Estimate({0: 0.5}).half_width is None
    assert Estimate({0: 0.5, 1: math.inf}).half_width is None
    assert math.isnan(Estimate({0: 0.5, 1: math.nan}).mean)


def test_delta_m_against_the_mean_single_task_baseline_by_hand(tmp_path):
    comparison = load_comparison(write(tmp_path, VALUES, SINGLE))
    gd, pcgrad = comparison.row("gd"), comparison.row("pcgrad")
    # seed 0 of gd: accuracy -20%, error +10%, mae +10% -> 40/3 flat, (20 + 10)/2 per task
    # seed 1: -10%, +20%, +10% -> 40/3 flat, (10 + 15)/2 per task
    # six digits of hand arithmetic are kept exactly; only float rounding is left
    assert gd.delta_m.values == pytest.approx((40 / 3, 40 / 3))
    assert gd.delta_m_by_task.values == pytest.approx((15.0, 12.5))
    assert pcgrad.delta_m.values == pytest.approx((-10 / 3, 0.0))
    assert gd.metrics["right", "error"].mean == 23.0


def test_rows_are_single_then_by_delta_m_and_ranks_leave_single_out(tmp_path):
    comparison = load_comparison(write(tmp_path, VALUES, SINGLE))
    assert [row.label for row in comparison.rows] == ["single", "pcgrad", "gd"]
    assert [row.mean_rank for row in comparison.rows] == [None, 1.0, 2.0]
    assert [row.conflict_rate is None for row in comparison.rows] == [True, False, False]
    # the baseline against its own mean: 0 up to rounding, and an interval that shows its own noise
    assert comparison.row("single").delta_m.mean == pytest.approx(0.0, abs=1e-12)
    assert comparison.row("single").delta_m.half_width > 10


def test_without_single_task_runs_delta_m_is_absent_and_the_listed_order_holds(tmp_path):
    comparison = load_comparison(write(tmp_path, VALUES))
    assert [row.label for row in comparison.rows] == ["gd", "pcgrad"]
    assert all(row.delta_m is None and row.delta_m_by_task is None for row in comparison.rows)
    assert "no single-task baseline" in verdict(comparison)
    # who did not ask for baselines needs no note on top of the verdict
    assert not any("no single-task baseline" in note for note in comparison.notes)


def test_a_task_without_baseline_leaves_delta_m_absent(tmp_path):
    write_comparison(tmp_path)
    for file in tmp_path.glob("runs/single-left/*/result.json"):
        file.unlink()
    comparison = load_comparison(tmp_path)
    assert comparison.row("gd").delta_m is None
    assert set(comparison.row("single").metrics) == {("right", "accuracy")}
    assert any("single left seed 0" in note for note in comparison.notes)


def test_a_zero_baseline_is_left_out_of_delta_m_and_said(tmp_path):
    comparison = load_comparison(write(tmp_path, VALUES, [(0.85, 20.0, 0.0)] * 2))
    assert comparison.row("gd").delta_m.values == pytest.approx((15.0, 15.0))
    assert any("right mae" in note for note in comparison.notes)


def test_a_diverged_run_sorts_last_and_is_named(tmp_path):
    write_comparison(tmp_path, epochs=2)
    job = make_job("digits", DIGITS, "cagrad(c=0.8)", 1, 2, 0.0)
    job["metrics"]["left"]["accuracy"] = None
    write_job(tmp_path, "cagrad(c=0.8)", job)
    comparison = load_comparison(tmp_path)
    assert comparison.rows[-1].label == "cagrad(c=0.8)"
    assert any("cagrad(c=0.8)" in note and "diverged" in note for note in comparison.notes)
    assert "cagrad(c=0.8)" not in [item.label for item in differences(comparison)]


def test_cost_stands_apart_and_timings_change_nothing_else(tmp_path):
    comparison = load_comparison(write_comparison(tmp_path))
    by_label = {cost.label: cost for cost in comparison.costs}
    times = {label: [j.step_ms for j in comparison.jobs if j.label == label] for label in ("gd", "mgda")}
    assert by_label["gd"].ratio == 1.0
    assert by_label["mgda"].ratio == pytest.approx(sum(times["mgda"]) / sum(times["gd"]))  # rounding
    assert by_label["single"].parameters == 2 * 40_000
    assert by_label["single"].peak_mb == pytest.approx(380.0)  # the largest network, not the sum
    for file in tmp_path.glob("runs/*/*/result.json"):
        job = json.loads(file.read_text())
        job["cost"]["step_ms"] *= 3
        file.write_text(json.dumps(job))
    again = load_comparison(tmp_path)
    assert again.rows == comparison.rows
    assert again.costs != comparison.costs


def test_differences_are_the_paired_t_test_of_scipy_with_holm(tmp_path):
    comparison = load_comparison(write_comparison(tmp_path, "scenes", SCENES, seeds=(0, 1, 2, 3)))
    gd = comparison.row("gd").delta_m.values
    found = differences(comparison)
    assert [item.points.mean for item in found] == sorted((item.points.mean for item in found), reverse=True)
    for item in found:
        own = comparison.row(item.label).delta_m.values
        assert item.p == pytest.approx(stats.ttest_rel(gd, own).pvalue, rel=1e-9)  # differences of nearby floats
    ascending = sorted(found, key=lambda item: item.p)
    expected = [max(min(1.0, item.p * (5 - k)) for k, item in enumerate(ascending[: n + 1])) for n in range(5)]
    assert [item.p_holm for item in ascending] == pytest.approx(expected)


def test_differences_pair_only_the_seeds_both_have(tmp_path):
    write_comparison(tmp_path)
    (tmp_path / "runs/gd/seed-1/result.json").unlink()
    comparison = load_comparison(tmp_path)
    assert {tuple(item.points.by_seed) for item in differences(comparison)} == {(0, 2)}
    assert any("1 of 24 runs are not finished (gd seed 1)" in note for note in comparison.notes)


def test_verdict_names_what_is_better_and_worse(tmp_path):
    text = verdict(load_comparison(write_comparison(tmp_path, noise=0.0005)))
    assert text.startswith("On digits over 3 seeds, cagrad(c=0.8) is better than equal weights by 4.")
    assert "mgda is worse than equal weights by 4." in text
    assert "Holm-corrected for 5 methods" in text


def test_verdict_does_not_see_what_is_not_there(tmp_path):
    text = verdict(load_comparison(write_comparison(tmp_path, methods=("gd", "pcgrad", "cdtt"), noise=0.03)))
    assert text.startswith("No method is distinguishable from equal weights at 3 seeds.")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"seeds": (0,)}, "One seed cannot tell"),
        ({"seeds": (0, 1)}, "Two seeds cannot tell"),
        ({"methods": ("pcgrad", "cdtt")}, "no run with equal weights"),
        ({"methods": ("gd",)}, "only method here"),
    ],
)
def test_verdict_says_why_it_cannot_judge(tmp_path, options, expected):
    assert expected in verdict(load_comparison(write_comparison(tmp_path, **options)))


def test_the_two_averages_may_name_different_winners(tmp_path):
    values = {"gd": [(0.85, 18.0, 3.6)] * 2, "mgda": [(0.93, 21.0, 4.2)] * 2}
    comparison = load_comparison(write(tmp_path, values, SINGLE))
    # flat: gd (0 - 10 - 10)/3, mgda (-9.4 + 5 + 5)/3; per task: gd -5, mgda -2.2
    assert not any("different winners" in note for note in comparison.notes)
    values["mgda"] = [(0.96, 20.0, 4.0)] * 2  # flat -12.9/3 = -4.3, per task -6.5
    comparison = load_comparison(write(tmp_path, values, SINGLE))
    assert any("gd over all metrics alike, mgda per task first" in note for note in comparison.notes)


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[:200],
        lambda text: "[]",
        lambda text: json.dumps({k: v for k, v in json.loads(text).items() if k != "metrics"}),
        lambda text: json.dumps({**json.loads(text), "metrics": {"left": {"accuracy": 0.9}}}),
        lambda text: json.dumps({**json.loads(text), "cost": {"step_ms": "fast", "peak_mb": 1, "parameters": 1}}),
        lambda text: json.dumps({**json.loads(text), "cost": None}),
    ],
    ids=["cut off", "not an object", "no metrics", "a task missing", "text for a number", "no cost"],
)
def test_a_damaged_result_names_the_file_and_the_fix(tmp_path, damage):
    write_comparison(tmp_path, epochs=2)
    path = tmp_path / "runs/pcgrad/seed-1/result.json"
    path.write_text(damage(path.read_text()))
    with pytest.raises(ResultError) as caught:
        load_comparison(tmp_path)
    message = str(caught.value)
    assert str(path) in message
    assert "Delete it and run the same command again:\n  detente compare digits" in message


def test_what_is_no_comparison_is_said(tmp_path):
    with pytest.raises(ResultError, match=r"comparison\.json does not exist\. Is .* a directory that"):
        load_comparison(tmp_path)
    (tmp_path / "comparison.json").write_text("{}")
    with pytest.raises(ResultError, match="lacks problem, tasks, methods, seeds, command"):
        load_comparison(tmp_path)
    write_comparison(tmp_path, seeds=())
    with pytest.raises(ResultError, match="no finished run yet"):
        load_comparison(tmp_path)


def test_the_same_run_twice_is_an_error(tmp_path):
    write_comparison(tmp_path, epochs=2)
    write_job(tmp_path, "copy", make_job("digits", DIGITS, "gd", 0, 2, 0.0))
    with pytest.raises(ResultError, match="are the same run"):
        load_comparison(tmp_path)


def test_verdict_names_the_task_that_pays(tmp_path):
    """Better as a whole may be much better in one figure and worse in another."""
    noise = (0.999, 1.0, 1.001)
    values = {
        "gd": [(0.80 * n, 20.0 * n, 4.0) for n in noise],
        "mgda": [(0.60 * n, 10.0 * n, 2.0) for n in noise],
        "cagrad": [(0.79 * n, 15.0 * n, 3.0) for n in noise],
    }
    text = verdict(load_comparison(write(tmp_path, values, SINGLE)))
    assert "mgda is better than equal weights" in text
    assert re.search(r"But mgda pays with \w+, whose \w+ is 0.6 instead of 0.8\.", text)
    assert "But cagrad" not in text  # a figure that is worse by 1%
