"""What a method has to be laid beside: fixed weights, its own weights kept fixed, a wider network."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from benchmark.command import run
from detente.benchmark.controls import fixed_weights, sweep, wider
from detente.benchmark.job import Job
from detente.benchmark.problem import load_problem
from detente.benchmark.results import load_comparison, verdict
from detente.benchmark.specs import Spec
from detente.method import Context

TINY = Path(__file__).with_name("tiny_problem.py")
QUICK = ("--epochs", "3", "--seeds", "3")


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("controls") / "out"
    controls = ("--sweep", "3", "--extract", "cagrad")
    outcome = run("compare", TINY, "--methods", "cagrad,pcgrad", *controls, *QUICK, "--out", out)
    assert outcome.code == 0, outcome.text
    return out


def test_two_tasks_are_swept_evenly_and_the_weights_sum_to_two():
    labels = [control.label for control in sweep(("a", "b"), 3)]
    assert labels == ["fixed(0.25, 0.75)", "fixed(0.50, 0.50)", "fixed(0.75, 0.25)"]
    assert [control.method for control in sweep(("a", "b"), 1)] == ["gd(weights={'a': 1.0, 'b': 1.0})"]


@pytest.mark.parametrize("points", [1, 5, 16])
def test_more_tasks_are_spread_over_the_simplex_the_same_way_every_time(points):
    found = sweep(("a", "b", "c"), points)
    assert found == sweep(("a", "b", "c"), points)
    assert len({control.method for control in found}) == points
    losses = torch.ones(3, dtype=torch.float64)
    for control in found:
        method = Spec.parse(control.method).build()
        given = method.weights(losses, Context(("a", "b", "c")))
        assert float(given.sum()) == pytest.approx(3.0, abs=1e-5)  # rounded to six decimals each
        assert float(given.min()) > 0


def test_one_task_has_nothing_to_weigh():
    with pytest.raises(ValueError, match="two tasks or more"):
        sweep(("a",), 3)


def test_extracted_weights_are_the_mean_weights_of_the_same_seed_and_stay_fixed(original):
    for seed in (0, 1, 2):
        source = json.loads((original / f"runs/cagrad/seed-{seed}/result.json").read_text())["mean_weights"]
        taken = json.loads((original / f"runs/weights of cagrad/seed-{seed}/result.json").read_text())
        expected = {task: 2 * weight / sum(source.values()) for task, weight in source.items()}
        for row in taken["history"]:
            assert row["weights"] == pytest.approx(expected, abs=2e-6)  # written with six decimals
        assert taken["method"] == "gd"


def test_the_mean_weights_forget_with_decay_nine_tenths(original):
    result = json.loads((original / "runs/cagrad/seed-1/result.json").read_text())
    mean = None
    for row in result["history"]:
        mean = {t: w if mean is None else 0.9 * mean[t] + 0.1 * w for t, w in row["weights"].items()}
    assert result["mean_weights"] == pytest.approx(mean, rel=1e-12)


def test_extracted_weights_need_the_run_and_a_positive_weight(tmp_path):
    job = Job(str(TINY), "weights of cagrad", "gd", None, 0, {}, weights_of="cagrad")
    with pytest.raises(ValueError, match="needs the finished run"):
        fixed_weights(job, tmp_path)
    path = tmp_path / "runs/cagrad/seed-0/result.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"mean_weights": {"a": -1.0, "b": 0.0}}))
    with pytest.raises(ValueError, match="no positive weight"):
        fixed_weights(job, tmp_path)
    path.write_text(json.dumps({"mean_weights": {"a": -1.0, "b": 3.0}}))
    assert fixed_weights(job, tmp_path).method == "gd(weights={'a': 0.0, 'b': 2.0})"


def test_the_best_fixed_weights_are_chosen_on_validation_and_the_verdict_names_them(original):
    comparison = load_comparison(original)
    assert [row.label for row in comparison.sweep] == ["fixed(0.25, 0.75)", "fixed(0.50, 0.50)", "fixed(0.75, 0.25)"]
    scores = {
        row.label: sum(job.score for job in comparison.jobs if job.label == row.label) for row in comparison.sweep
    }
    assert comparison.best_fixed.label == max(scores, key=scores.get)
    assert [row.label for row in comparison.methods if row.label != "gd"] != []
    assert {row.control for row in comparison.methods} == {None}
    assert "best fixed weights" in verdict(comparison)
    assert comparison.best_fixed.label in verdict(comparison)


def test_controls_are_compared_but_never_counted_as_methods(original):
    comparison = load_comparison(original)
    kinds = {row.label: row.control for row in comparison.rows}
    assert kinds["weights of cagrad"] == "extracted"
    assert kinds[comparison.best_fixed.label] == "sweep"
    assert sum(kind == "sweep" for kind in kinds.values()) == 1
    ranks = [row.mean_rank for row in comparison.rows if row.mean_rank is not None]
    assert len(ranks) == 5  # gd, two methods, the best fixed weights, the extracted ones
    csv = (original / "results.csv").read_text()
    assert all(row.label in csv for row in comparison.sweep)


def test_controls_may_be_added_later_and_finished_runs_are_kept(original, tmp_path):
    out = shutil.copytree(original, tmp_path / "out")
    before = {path: path.stat().st_mtime_ns for path in out.glob("runs/*/*/result.json")}
    outcome = run("compare", TINY, "--methods", "cagrad", "--extract", "cagrad", *QUICK, "--out", out)
    assert outcome.code == 0, outcome.text
    assert {path: path.stat().st_mtime_ns for path in out.glob("runs/*/*/result.json")} == before
    assert load_comparison(out).best_fixed == load_comparison(original).best_fixed


def test_the_wider_network_costs_as_much_as_a_backward_pass_per_task():
    problem = load_problem("digits")
    control = wider(problem, problem.settle({}))
    model = problem.make_model(("left", "right"), problem.settle({}) | control.settings)
    plain = problem.make_model(("left", "right"), problem.settle({}))
    count = sum(p.numel() for p in model.parameters()) / sum(p.numel() for p in plain.parameters())
    assert control.label.startswith("wider (x1.")
    assert 1.3 < count < 5 / 3 + 0.4  # two tasks: 5/3 of the operations; channels are whole numbers


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--wider",), "no setting 'width'"),
        (("--extract", "mgda", "--methods", "cagrad"), "it is not among the methods"),
        (("--sweep", "0"), "--sweep"),
    ],
)
def test_a_control_that_cannot_be_is_told_before_anything_is_written(tmp_path, options, message):
    outcome = run("compare", TINY, *options, "--out", tmp_path / "out")
    assert outcome.code == 2
    assert message in " ".join(outcome.text.split())
    assert not (tmp_path / "out").exists()


def test_the_verdict_says_what_a_wider_network_does_for_the_same_compute(tmp_path):
    outcome = run(
        "compare", "digits", "--methods", "mgda", "--seeds", "3", "--epochs", "1", "--wider", "--out", tmp_path / "out"
    )
    assert outcome.code == 0, outcome.text
    comparison = load_comparison(tmp_path / "out")
    (label,) = [row.label for row in comparison.rows if row.control == "wider"]
    assert f"on a network that is wider for the same compute, {label}" in verdict(comparison)
    sizes = {cost.label: cost.parameters for cost in comparison.costs}
    assert sizes[label] > sizes["gd"]
