"""Logic gates: the data is XOR and AND, and the task tensioner solves both sooner than the central direction."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

import detente
from detente.benchmark.engines.local import Local
from detente.benchmark.plan import Plan
from detente.benchmark.problem import load_problem
from detente.benchmark.problems import logic
from detente.benchmark.specs import Spec

BOTH = ("xor", "and")


def train(root: Path, labels: list[str], seeds: range, epochs: int) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Results of the methods (without baselines), and errors."""
    problem = load_problem("logic")
    (jobs,) = Plan(problem, [Spec.parse(label) for label in labels], seeds, problem.settle({"epochs": epochs})).jobs()
    with Local(2) as run:
        errors = run([job for job in jobs if job.task is None], root, lambda _: None)
    return [json.loads(path.read_text()) for path in sorted(root.glob("runs/*/*/result.json"))], errors


def test_the_data_is_the_two_gates_with_the_labels_of_the_paper():
    data = logic.make_data()
    assert set(data) == {"train", "val", "test"}
    for split in data.values():
        rows = {(tuple(x.tolist()), float(xor), float(and_)) for x, xor, and_ in split}
        assert rows == {((a, b), 10.0 * (a != b), float(a and b)) for a in (0.0, 1.0) for b in (0.0, 1.0)}


def test_the_model_is_two_sigmoid_units_and_a_linear_head_per_gate():
    for tasks, count in ((BOTH, 6 + 3 + 3), (("and",), 6 + 3)):
        model = logic.make_model(tasks)
        assert sum(p.numel() for p in model.parameters()) == count
        assert set(model(torch.zeros(3, 2))) == set(tasks)


def test_losses_and_errors_are_mean_squares():
    model = logic.make_model(BOTH)
    for parameter in model.parameters():
        torch.nn.init.zeros_(parameter)
    data = logic.make_data()
    losses = logic.losses(model, data["train"].tensors, BOTH)
    assert {task: float(loss.detach()) for task, loss in losses.items()} == {"xor": 50.0, "and": 0.25}
    with torch.no_grad():
        assert logic.metrics(model, data["test"], ("and",)) == {"and": {"error": 0.25}}


def test_the_optimizer_is_that_of_the_paper():
    optimizer = logic.make_optimizer(logic.make_model(BOTH), {"lr": 0.05})
    assert isinstance(optimizer, torch.optim.SGD)
    assert (optimizer.defaults["lr"], optimizer.defaults["momentum"]) == (0.05, 0.9)
    assert (logic.settings["batch_size"], logic.settings["lr"]) == (2, 0.05)


def result(label: str, seed: int, reached: dict[str, int]) -> dict[str, Any]:
    return {"label": label, "seed": seed, "task": None, "reached": reached}


def test_epochs_are_compared_on_the_seeds_that_both_solved():
    results = [
        result("cdtt", 0, {"xor": 100, "and": 150}),
        result("cdtt", 1, {"xor": 900, "and": 10}),
        result("cdtt", 2, {"and": 10}),
        result("edm", 0, {"xor": 300, "and": 20}),
        result("edm", 1, {"and": 20}),
        result("edm", 2, {"xor": 300, "and": 20}),
        {"label": "single", "seed": 0, "task": "xor", "reached": {"xor": 5}},
    ]
    console = Console(width=100, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    with console.file:
        (table,) = logic.summary(results)
        console.print(table)
        rows = {line.split()[0]: line.split()[1:] for line in console.export_text().splitlines() if line.split()}
    assert rows["cdtt"] == ["2/3", "525", "0.50", "1"]
    assert rows["edm"] == ["2/3", "300", "1.00", "2"]
    assert "single" not in rows
    text = logic.verdict(results)
    assert "cdtt solved both gates in 2 of 3 runs" in text
    assert "cdtt needed 50% of its epochs" in text


def test_every_method_runs(tmp_path):
    labels = [name for name in detente.list_methods() if name != "connection_strength"]  # there are no norms
    results, errors = train(tmp_path, labels, range(1), epochs=3)
    assert errors == {}
    assert {r["label"] for r in results} == set(labels)
    assert all(r["metrics"]["xor"]["epochs"] == 3 for r in results)
    assert all(math.isfinite(r["metrics"]["and"]["error"]) for r in results)


@pytest.mark.slow
def test_the_task_tensioner_needs_fewer_epochs_than_the_central_direction(tmp_path):
    results, errors = train(tmp_path, ["cdtt", "edm"], range(8), epochs=800)
    assert errors == {}
    epochs = {
        (r["label"], r["seed"]): max(r["reached"].values()) for r in results if set(r["reached"]) == {"xor", "and"}
    }
    both = [seed for seed in range(8) if ("cdtt", seed) in epochs and ("edm", seed) in epochs]
    assert len(both) >= 3  # two sigmoid units get stuck on XOR from about four starts in ten
    assert all(epochs["cdtt", seed] < epochs["edm", seed] for seed in both)
    for r in results:  # training stops at the epoch in which the last gate was solved
        assert r["epochs"] == epochs.get((r["label"], r["seed"]), 800)
        for task, epoch in r["reached"].items():
            assert r["history"][epoch - 1]["val"][task]["error"] <= 1e-3
            assert all(row["val"][task]["error"] > 1e-3 for row in r["history"][: epoch - 1])
