"""Which figures a run reports, and the policies that hold for every method alike; one job at a time."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmark.command import run
from detente.benchmark.job import Job
from detente.benchmark.problem import load_problem
from detente.benchmark.protocol import best_epoch, looks_at_test, mean_figures, score
from detente.benchmark.results import load_comparison, verdict
from detente.benchmark.training import train

TINY = Path(__file__).with_name("tiny_problem.py")
DIRECTIONS = {"a": {"accuracy": "max"}, "b": {"error": "min"}}


def problem(path: Path, more: str = "", *replacements: tuple[str, str]) -> str:
    text = TINY.read_text()
    for old, new in replacements:
        assert old in text
        text = text.replace(old, new)
    path.write_text(text + more)
    return str(path)


def trained(
    root: Path, source: str | Path = TINY, method: str = "gd", task: str | None = None, **given: Any
) -> dict[str, Any]:
    settings = load_problem(str(source)).settle({"epochs": 4, **given})
    job = Job(str(source), "single" if task else method, method, task, 0, settings)
    train(job, root, lambda _: None)
    return json.loads((job.directory(root) / "result.json").read_text())


def test_the_score_is_the_mean_logarithm_with_errors_negated():
    figures = {"a": {"accuracy": 0.5}, "b": {"error": 4.0}}
    assert score(DIRECTIONS, figures) == pytest.approx((math.log(0.5) - math.log(4.0)) / 2)
    assert math.isfinite(score(DIRECTIONS, {"a": {"accuracy": 0.0}, "b": {"error": 1.0}}))


def test_the_last_ten_epochs_are_the_last_ten():
    assert [e for e in range(1, 31) if looks_at_test("last-10-test", e, 30)] == list(range(21, 31))
    assert [e for e in range(1, 4) if looks_at_test("last-10-test", e, 3)] == [1, 2, 3]
    assert not any(looks_at_test("val-selected", e, 30) for e in range(1, 31))
    assert all(looks_at_test("max-over-training", e, 30) for e in range(1, 31))


def test_val_selected_keeps_no_test_figures_but_those_it_reports(tmp_path):
    result = trained(tmp_path)
    assert all("test" not in row for row in result["history"])
    scores = [score(load_problem(str(TINY)).tasks, row["val"]) for row in result["history"]]
    assert result["selected_epoch"] == 1 + scores.index(max(scores))
    assert result["score"] == max(scores)


def test_last_10_test_reports_the_mean_of_the_test_figures_of_these_epochs(tmp_path):
    result = trained(tmp_path, epochs=12, protocol="last-10-test")
    tested = [row["test"] for row in result["history"] if "test" in row]
    assert [row["epoch"] for row in result["history"] if "test" in row] == list(range(3, 13))
    assert result["metrics"] == mean_figures(tested)
    assert result["metrics"]["sum"]["mse"] == pytest.approx(sum(t["sum"]["mse"] for t in tested) / 10, rel=1e-12)


def test_protocols_that_see_the_test_split_train_just_as_the_others_do(tmp_path):
    """Looking does not draw random numbers: the same run, other figures reported."""
    runs = [trained(tmp_path / p, protocol=p) for p in ("val-selected", "last-10-test", "max-over-training")]
    for other in runs[1:]:
        assert [row["loss"] for row in other["history"]] == [row["loss"] for row in runs[0]["history"]]
        assert [row["val"] for row in other["history"]] == [row["val"] for row in runs[0]["history"]]


def test_max_over_training_takes_one_epoch_for_all_seeds_of_a_method(tmp_path):
    out = tmp_path / "out"
    options = ("--methods", "mgda", "--seeds", "3", "--epochs", "5", "--protocol", "max-over-training", "--jobs", "1")
    outcome = run("compare", TINY, *options, "--out", out)
    assert outcome.code == 0, outcome.text
    comparison = load_comparison(out)
    tasks = comparison.tasks
    for label, task in (("gd", None), ("mgda", None), ("single", "sum")):
        jobs = [job for job in comparison.jobs if (job.label, job.task) == (label, task)]
        scores = [score(tasks, mean_figures([job.history[k]["test"] for job in jobs])) for k in range(5)]
        best = 1 + scores.index(max(scores))
        assert {job.selected_epoch for job in jobs} == {best} == {best_epoch(tasks, [job.history for job in jobs])}
        for job in jobs:
            for (name, metric), value in job.metrics.items():
                assert value == job.history[best - 1]["test"][name][metric]
    assert "an estimate for unseen data" in verdict(comparison)
    assert "Protocol max-over-training" in outcome.out


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"protocol": "best"}, "protocol must be one of val-selected"),
        ({"protocol": "last-10-test", "patience": 3}, "trains to the end"),
        ({"precision": "float8"}, "precision must be one of"),
        ({"clip_norm": -1.0}, "clip_norm must be a non-negative number"),
        ({"patience": 1.5}, "patience must be a non-negative whole number"),
        ({"nonsense": 1}, "has no setting 'nonsense'"),
    ],
)
def test_impossible_settings_are_told(given, message):
    with pytest.raises(ValueError, match=message):
        load_problem(str(TINY)).settle(given)


def test_a_problem_with_a_target_has_one_protocol():
    with pytest.raises(ValueError, match="ends at its target"):
        load_problem("logic").settle({"protocol": "last-10-test"})


def test_a_preset_sets_what_the_command_line_does_not(tmp_path):
    more = "\npresets = {'author2021': {'epochs': 7, 'lr': 0.5, 'protocol': 'last-10-test'}}\n"
    own = load_problem(problem(tmp_path / "own.py", more))
    assert own.settle({})["epochs"] == 30
    found = own.settle({"lr": 0.25}, "author2021")
    assert (found["epochs"], found["lr"], found["protocol"]) == (7, 0.25, "last-10-test")
    with pytest.raises(ValueError, match="has no preset 'author'; it has: author2021"):
        own.settle({}, "author")


def test_with_patience_training_ends_so_many_epochs_after_the_best_one(tmp_path):
    result = trained(tmp_path, epochs=200, patience=3, lr=0.2)
    assert result["epochs"] == result["selected_epoch"] + 3 < 200


def test_one_clipping_holds_for_every_method_and_schedule(tmp_path):
    """With SGD the step's length is the learning rate times the clipped norm: the figures barely move."""
    more = (
        "\n\ndef make_optimizer(model, settings):\n    return torch.optim.SGD(model.parameters(), lr=settings['lr'])\n"
    )
    source = problem(tmp_path / "sgd.py", more)
    for method in ("gd", "cagrad", "famo", "connection_strength"):
        free = trained(tmp_path / "free" / method, source, method, epochs=2, lr=0.1)
        tight = trained(tmp_path / "tight" / method, source, method, epochs=2, lr=0.1, clip_norm=1e-6)
        assert all(row["clipped"] == 0 for row in free["history"])
        sequential = 2 if method == "connection_strength" else 1  # an optimizer step per task, in its first phase
        assert all(row["clipped"] in (row["steps"], sequential * row["steps"]) for row in tight["history"])
        first, last = (row["val"]["sum"]["mse"] for row in tight["history"])
        assert first == pytest.approx(last, rel=0.05)  # BatchNorm's statistics still move
        assert free["history"][0]["val"] != tight["history"][0]["val"]


def test_bfloat16_is_for_all_and_close_to_float32(tmp_path):
    exact, rough = (trained(tmp_path / p, precision=p, epochs=2) for p in ("float32", "bfloat16"))
    assert rough["history"][0]["loss"] != exact["history"][0]["loss"]
    for task, loss in exact["history"][0]["loss"].items():
        assert rough["history"][0]["loss"][task] == pytest.approx(loss, rel=0.05)  # 8 bits of mantissa, 3 steps


def test_float64_holds_for_the_model_and_its_batches(tmp_path):
    exact, rough = (trained(tmp_path / p, method="auto_lambda", precision=p, epochs=2) for p in ("float64", "float32"))
    for found, close in zip(exact["history"], rough["history"], strict=True):
        for task, loss in found["loss"].items():
            assert torch.tensor(loss, dtype=torch.float32).double() != loss
            assert loss == pytest.approx(close["loss"][task], rel=0.05)  # dropout draws other numbers in float64
        for task, figures in found["val"].items():
            assert figures["mse"] == pytest.approx(close["val"][task]["mse"], rel=0.05)
    assert exact["history"][1]["loss"] != rough["history"][1]["loss"]


def test_the_schedule_is_stepped_every_epoch_and_resumed(tmp_path):
    more = """

def make_scheduler(optimizer, settings):
    return torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=1e-6)
"""
    source = problem(tmp_path / "steps.py", more)
    result = trained(tmp_path / "out", source, epochs=3)
    moved = [row["val"]["sum"]["mse"] for row in result["history"]]
    plain = trained(tmp_path / "plain", epochs=3)
    assert result["history"][0]["loss"] == plain["history"][0]["loss"]
    assert abs(moved[2] - moved[1]) < abs(
        plain["history"][2]["val"]["sum"]["mse"] - plain["history"][1]["val"]["sum"]["mse"]
    )


def test_a_plateau_schedule_is_given_the_validation_score(tmp_path):
    more = """

def make_scheduler(optimizer, settings):
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, mode="max", factor=0.1, patience=0)
    step = scheduler.step
    def kept(score):
        optimizer.scores = [*getattr(optimizer, "scores", []), float(score)]
        import pathlib
        pathlib.Path(settings["log"]).write_text(str(optimizer.scores))
        step(score)
    scheduler.step = kept
    return scheduler
"""
    log = tmp_path / "scores"
    source = problem(tmp_path / "plateau.py", more, ('"probe_every": 2}', f'"probe_every": 2, "log": {str(log)!r}}}'))
    result = trained(tmp_path / "out", source, epochs=3)
    tasks = load_problem(source).tasks
    assert json.loads(log.read_text()) == [score(tasks, row["val"]) for row in result["history"]]


def test_batches_without_samples_of_a_task_are_left_out(tmp_path):
    """A single-task run on partly labelled data: its batches may have none of its samples."""
    more = """

def counts(batch, tasks):
    return {task: float((batch[1] > 2.2).sum()) if task == "sum" else float(len(batch[0])) for task in tasks}
"""
    source = problem(tmp_path / "rare.py", more)
    result = trained(tmp_path / "out", source, task="sum", batch_size=4)
    assert 0 < sum(row["steps"] for row in result["history"]) < 4 * 12
    assert math.isfinite(result["metrics"]["sum"]["mse"])


def test_samples_of_any_form_are_collated_by_the_problem(tmp_path):
    more = """

class Rows(torch.utils.data.Dataset):
    def __init__(self, data): self.data = data
    def __len__(self): return len(self.data)
    def __getitem__(self, k): return {"row": self.data[k]}

def collate(samples):
    return tuple(torch.stack(part) for part in zip(*(sample["row"] for sample in samples)))

made = make_data
def make_data():
    data = made()
    return {**data, "train": Rows(data["train"])}
"""
    source = problem(tmp_path / "rows.py", more)
    plain, collated = trained(tmp_path / "plain"), trained(tmp_path / "out", source)
    assert collated["history"] == plain["history"]


def test_settings_reach_the_functions_that_name_them(tmp_path):
    source = problem(
        tmp_path / "wide.py",
        "",
        (
            "def make_model(tasks):\n    return Net(tasks)",
            "def make_model(tasks, extra=0):\n    assert extra == 3\n    return Net(tasks)",
        ),
        ("def make_data():", "def make_data(extra=0):\n    assert extra == 3"),
        ('"probe_every": 2}', '"probe_every": 2, "extra": 0}'),
    )
    assert trained(tmp_path / "out", source, extra="3")["settings"]["extra"] == 3


def test_weight_decay_is_that_of_the_default_optimizer():
    own = load_problem(str(TINY))
    settings = own.settle({"weight_decay": "1e-2"})
    optimizer = own.make_optimizer(own.make_model(("sum",), settings), settings)
    assert isinstance(optimizer, torch.optim.Adam)
    assert optimizer.param_groups[0]["weight_decay"] == 1e-2
