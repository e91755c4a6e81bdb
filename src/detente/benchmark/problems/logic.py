"""Logic gates: two neurons learn XOR and AND together; how many epochs until both are solved? (CDTT paper)

The toy of the task tensioner (Nakamura et al. 2022, authors' code): a shared ``Linear(2, 2)`` with a sigmoid, a head
``Linear(2, 1)`` per task, XOR labelled 0/10 and AND 0/1, so that XOR's gradient drowns AND's. Mean squared error, SGD
0.05 with momentum 0.9, two minibatches of two per epoch. A run ends when every task's error over the four points has
once been below 1e-3; the metric is the number of epochs that took. The four points are all the data there is, so the
three splits are the same.

Two sigmoid units can get stuck on XOR for ever, whatever the method; about four starts in ten do. So the table below
the others counts the runs that solved both gates, and compares epochs on the seeds that both methods solved.
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
settings = {"epochs": 2500, "batch_size": 2, "lr": 0.05, "probe_every": 1, "seeds": 10}
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


def summary(results: Sequence[dict[str, Any]]) -> list[Table]:
    """Epochs until both gates were solved, and their ratio to the central direction's."""
    solved: dict[str, dict[int, int]] = {}
    runs: dict[str, int] = {}
    for result in results:
        if result["task"] is None:
            label = result["label"]
            runs[label] = runs.get(label, 0) + 1
            found = solved.setdefault(label, {})
            if set(result["reached"]) == set(tasks):
                found[result["seed"]] = max(result["reached"].values())
    centre = solved.get("edm", {})
    table = Table(title="logic: epochs until both gates are solved", box=box.SIMPLE_HEAD)
    for heading in ("method", "solved", "mean epochs where solved", "relative to edm", "seeds both solved"):
        table.add_column(heading, justify="left" if heading == "method" else "right")
    for label, found in solved.items():
        both = sorted(set(found) & set(centre))
        ratio = sum(found[s] for s in both) / sum(centre[s] for s in both) if both else None
        table.add_row(
            label,
            f"{len(found)}/{runs[label]}",
            f"{statistics.mean(found.values()):.0f}" if found else "-",
            "-" if ratio is None else f"{ratio:.2f}",
            str(len(both)),
        )
    return [table]
