"""Success rates put together: interquartile means, their intervals, the table and the pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from detente.benchmark.rl.rates import report, scores, sheet, summary
from detente.benchmark.statistics import interquartile_mean, stratified_bootstrap


def result(label: str, seed: int, rates: dict[str, float | None], task: str | None = None) -> dict[str, Any]:
    metrics = {name: {"success": rate} for name, rate in rates.items()}
    history = [{"steps": 10, "val": {name: {"success": 0.5} for name in rates}}]
    return {"label": label, "seed": seed, "task": task, "metrics": metrics, "history": history}


def test_the_interquartile_mean_is_that_of_the_middle_half():
    assert interquartile_mean(np.array([[0.0, 0.1], [0.4, 1.0]])) == pytest.approx(0.25)
    assert interquartile_mean(np.linspace(0, 1, 12).reshape(3, 4)) == pytest.approx(0.5)


def test_the_interval_resamples_the_runs_of_each_task():
    fixed = np.tile(np.array([0.0, 0.2, 0.6, 1.0]), (5, 1))  # the tasks differ, the runs do not
    assert stratified_bootstrap(fixed) == pytest.approx((0.4, 0.4))
    scores = np.random.default_rng(0).random((6, 10))
    low, high = stratified_bootstrap(scores)
    assert low < interquartile_mean(scores) < high
    assert stratified_bootstrap(scores) == (low, high)


def test_intervals_of_many_runs_cover_the_mean():
    """With 20 runs on 4 tasks a percentile interval covers .92 to .95; 300 experiments know that to .015."""
    random = np.random.default_rng(1)
    inside = [low <= 0.5 <= high for low, high in (stratified_bootstrap(random.random((20, 4))) for _ in range(300))]
    assert 0.89 <= np.mean(inside) <= 0.98


def test_baselines_of_one_seed_are_one_run_and_diverged_ones_have_failed():
    given = [
        result("single", 0, {"a": 0.5}, "a"),
        result("single", 0, {"b": 1.0}, "b"),
        result("single", 1, {"a": 1.0}, "a"),  # its other half is missing
        result("gd", 0, {"a": 0.25, "b": 0.75}),
        result("gd", 1, {"a": None, "b": None}),
    ]
    found = scores(given)
    assert found["single"].tolist() == [[0.5, 1.0]]
    assert found["gd"].tolist() == [[0.25, 0.75], [0.0, 0.0]]
    [table] = summary(given)
    assert [list(column.cells) for column in table.columns[:2]] == [["single", "gd"], ["0.750", "0.250"]]
    assert next(iter(table.columns[3].cells)) == "-"


def test_pictures_are_drawn_and_shown_by_their_caption(tmp_path: Path):
    labels = ["gd", "cagrad", *(f"method {k}" for k in range(9))]
    given = [result(label, seed, {"a": 0.5, "b": 0.5}) for label in labels for seed in (0, 1)]
    run = tmp_path / "runs/cagrad/seed-0"
    run.mkdir(parents=True)
    frames = [np.full((3, 40, 40, 3), shade, dtype=np.uint8) for shade in (20, 200)]
    sheet(frames, ("reach", "push"), run / "film.png")
    picture = np.asarray(Image.open(run / "film.png"))
    assert picture.shape == (80, 120, 3)
    assert picture[39, 119].tolist() == [20, 20, 20]
    assert picture[79, 119].tolist() == [200, 200, 200]
    report(given, tmp_path)
    report(given, tmp_path)
    names = sorted(path.name for path in (tmp_path / "figures").iterdir())
    assert names == [
        "Interquartile mean of the success over runs and tasks, with 95% bootstrap intervals.svg",
        "Success on the validation goals over training; shaded, the range of the seeds.svg",
        "cagrad, seed 0: a test episode of each task, up to its success.png",
    ]
