"""Every preset of the problems that read files trains end to end, with the real network on inputs of the real size.

Two networks are made thinner, because a step of theirs takes minutes on one core: NYUv2's SegNet and NYUD-v2's
ResNet-50.
"""

from __future__ import annotations

import importlib
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from detente.benchmark.engines.local import Local
from detente.benchmark.plan import Plan
from detente.benchmark.problem import list_problems, load_problem
from detente.benchmark.specs import Spec

pytestmark = pytest.mark.long

READING = [name for name in list_problems() if load_problem(name).download is not None]
PRESETS = [(name, preset) for name in READING for preset in load_problem(name).presets]
SAMPLES = {  # to train on, to test on (for the layout's writer), and the batch size, which make one step
    "celeba": (2, 1, 2),
    "cifar100": (4, 2, 140),
    "cityscapes": (2, 1, 1),
    "multifashion": (3, 1, 4),
    "multimnist": (3, 1, 4),
    "nuscenes": (1, 1, 1),
    "nyud": (2, 1, 1),
    "nyuv2": (2, 1, 1),
    "pascal_context": (2, 1, 1),
    "qm9": (4, 1, 4),
}
WIDTHS = {
    ("nyuv2", "liu2021cagrad"): 0.5,
    ("nyuv2", "liu2019mtan"): 0.5,
    ("nyud", "vandenhende2021multi"): 0.25,  # ResNet-50
}


@pytest.fixture(scope="module")
def run() -> Iterator[Local]:
    with Local(1) as engine:
        yield engine


@pytest.mark.parametrize(("name", "preset"), PRESETS)
def test_one_epoch(tmp_path: Path, run: Local, name: str, preset: str) -> None:
    problem = load_problem(name)
    train, test, batch_size = SAMPLES[name]
    importlib.import_module(f"benchmark.layouts.{name}").write(tmp_path / "data", train, test)
    given: dict[str, Any] = {"epochs": 1, "partial": True, "batch_size": batch_size}
    given |= {"width": WIDTHS[name, preset]} if (name, preset) in WIDTHS else {}
    settings = problem.settle(given, preset)
    [wave] = Plan(problem, [Spec.parse("cagrad")], [0], settings, tmp_path / "data").jobs()
    jobs = [wave[0], wave[-1]]  # the first task's baseline, and the method
    assert [job.name for job in jobs] == [f"single-{next(iter(problem.tasks))}", "cagrad"]
    assert run(jobs, tmp_path, lambda event: None) == {}
    for job in jobs:
        tasks = problem.tasks if job.task is None else {job.task: problem.tasks[job.task]}
        result = json.loads((job.directory(tmp_path) / "result.json").read_text())
        check(result, tasks, settings["protocol"])


def check(result: dict[str, Any], tasks: dict[str, dict[str, str]], protocol: str) -> None:
    """One epoch was trained; every declared figure is there, and from where the protocol says."""
    assert result["diverged"] is None
    assert result["epochs"] == result["selected_epoch"] == 1
    assert result["steps"] == 1
    [row] = result["history"]
    assert all(math.isfinite(loss) for loss in row["loss"].values())
    for figures in (row["val"], result["metrics"]):
        assert {task: set(found) for task, found in figures.items()} == {task: set(m) for task, m in tasks.items()}
        assert all(math.isfinite(value) for found in figures.values() for value in found.values())
    if protocol == "val-selected":
        assert "test" not in row
    else:
        assert row["test"] == result["metrics"]
