"""Logic gates: two neurons learn XOR and AND together; how many epochs until both are solved? (CDTT paper)

The toy of the task tensioner (Nakamura et al. 2022, authors' code): a shared ``Linear(2, 2)`` with a sigmoid, a head
``Linear(2, 1)`` per task, XOR labelled 0/10 and AND 0/1, so that XOR's gradient drowns AND's. Mean squared error, SGD
0.05 with momentum 0.9, two minibatches of two per epoch. A run ends when every task's error over the four points has
once been below 1e-3; the metric is the number of epochs that took. The four points are all the data there is, so the
three splits are the same.

Two sigmoid units can get stuck on XOR for ever, and often do, whatever the method. So the table below the others counts
the runs that solved both gates, and compares epochs on the seeds that both methods solved.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

import torch
from rich import box
from rich.table import Table
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

tasks = {"xor": {"epochs": "min", "error": "min"}, "and": {"epochs": "min", "error": "min"}}
settings = {"epochs": 2500, "batch_size": 2, "lr": 0.05, "seeds": 24}
methods = "gd,cdtt,edm,mgda,cagrad,wpcgrad"
target = {"xor": {"error": 1e-3}, "and": {"error": 1e-3}}


class Gates(nn.Module):
    """Two shared sigmoid units and one linear head per gate."""

    def __init__(self, gates: tuple[str, ...]) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(2, 2), nn.Sigmoid())
        self.heads = nn.ModuleDict({gate: nn.Linear(2, 1) for gate in gates})

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        h = self.trunk(x)
        return {gate: head(h).squeeze(-1) for gate, head in self.heads.items()}


def make_data() -> dict[str, Dataset[Any]]:
    x = torch.tensor([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]])
    data = TensorDataset(x, 10 * torch.tensor([0.0, 1.0, 1.0, 0.0]), torch.tensor([0.0, 0.0, 0.0, 1.0]))
    return {"train": data, "val": data, "test": data}


def make_model(tasks: tuple[str, ...]) -> nn.Module:
    return Gates(tasks)


def make_optimizer(model: nn.Module, settings: dict[str, Any]) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=settings["lr"], momentum=0.9)


def losses(model: nn.Module, batch: tuple[Tensor, Tensor, Tensor], tasks: tuple[str, ...]) -> dict[str, Tensor]:
    x, xor, and_ = batch
    outputs = model(x)
    labels = {"xor": xor, "and": and_}
    return {task: (outputs[task] - labels[task]).square().mean() for task in tasks}


def metrics(model: nn.Module, data: TensorDataset, tasks: tuple[str, ...]) -> dict[str, dict[str, float]]:
    x, xor, and_ = data.tensors
    return {t: {"error": float(v)} for t, v in losses(model, (x, xor, and_), tasks).items()}


def _solved(results: Sequence[dict[str, Any]]) -> dict[str, dict[int, int | None]]:
    """Epochs until both gates were solved, None for never; by method and seed."""
    solved: dict[str, dict[int, int | None]] = {}
    for result in results:
        if result["task"] is None:
            both = set(result["reached"]) == set(tasks)
            solved.setdefault(result["label"], {})[result["seed"]] = max(result["reached"].values()) if both else None
    return solved


def _ratio(one: dict[int, int | None], other: dict[int, int | None]) -> tuple[float | None, int]:
    """Epochs of ``one`` relative to ``other`` on the seeds that both solved, and how many these are."""
    pairs = [(a, b) for seed, a in one.items() if a is not None and (b := other.get(seed)) is not None]
    return (sum(a for a, _ in pairs) / sum(b for _, b in pairs) if pairs else None), len(pairs)


def verdict(results: Sequence[dict[str, Any]]) -> str:
    """The task tensioner against its central direction."""
    solved = _solved(results)
    if "cdtt" not in solved or "edm" not in solved:
        return "Add cdtt and edm to compare the task tensioner with the central direction alone."
    ratio, both = _ratio(solved["cdtt"], solved["edm"])
    counts = {k: sum(v is not None for v in solved[k].values()) for k in ("cdtt", "edm")}
    runs = len(solved["cdtt"])
    text = f"cdtt solved both gates in {counts['cdtt']} of {runs} runs, the central direction alone in {counts['edm']}"
    if ratio is not None:
        text += f"; on the {both} seeds that both solved, cdtt needed {100 * ratio:.0f}% of its epochs"
    return text + "."


def summary(results: Sequence[dict[str, Any]]) -> list[Table]:
    """Epochs until both gates were solved, and their ratio to the central direction's."""
    solved = _solved(results)
    table = Table(title="logic: epochs until both gates are solved", box=box.SIMPLE_HEAD)
    for heading in ("method", "solved", "mean epochs where solved", "relative to edm", "seeds both solved"):
        table.add_column(heading, justify="left" if heading == "method" else "right")
    for label, found in solved.items():
        epochs = [e for e in found.values() if e is not None]
        ratio, both = _ratio(found, solved.get("edm", {}))
        table.add_row(
            label,
            f"{len(epochs)}/{len(found)}",
            f"{statistics.mean(epochs):.0f}" if epochs else "-",
            "-" if ratio is None else f"{ratio:.2f}",
            str(both),
        )
    return [table]
