"""A problem of your own: two regressions that share a trunk and disagree about it.

Run it with ``detente compare examples/own_problem.py --epochs 15``. Copy the file and put your data and network in.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset, TensorDataset

# task -> metric -> is larger ("max") or smaller ("min") better?
tasks = {"sine": {"mse": "min"}, "step": {"mse": "min"}}
settings = {"epochs": 15, "batch_size": 64, "lr": 3e-3}


def make_data() -> dict[str, Dataset[tuple[Tensor, ...]]]:
    """Three splits, always the same: methods are chosen on "val" and reported on "test"."""
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(4000, 2, generator=generator) * 4 - 2
    sine = torch.sin(3 * x[:, 0]) * x[:, 1]
    step = (x[:, 0] + x[:, 1] > 0).float() + 0.1 * torch.randn(4000, generator=generator)
    parts = {"train": slice(0, 2000), "val": slice(2000, 3000), "test": slice(3000, 4000)}
    return {name: TensorDataset(x[part], sine[part], step[part]) for name, part in parts.items()}


class Network(nn.Module):
    """A shared trunk and one head per task. BatchNorm lets connection strength take part."""

    def __init__(self, tasks: tuple[str, ...]) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(2, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU())
        self.heads = nn.ModuleDict({task: nn.Linear(16, 1) for task in tasks})

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        features = self.trunk(x)
        return {task: head(features).squeeze(-1) for task, head in self.heads.items()}


def make_model(tasks: tuple[str, ...]) -> nn.Module:
    """A fresh network for these tasks; with one task it is the single-task baseline."""
    return Network(tasks)


def losses(model: nn.Module, batch: tuple[Tensor, ...], tasks: tuple[str, ...]) -> dict[str, Tensor]:
    """One scalar loss per task, from one forward pass."""
    x, sine, step = batch
    outputs, targets = model(x), {"sine": sine, "step": step}
    return {task: F.mse_loss(outputs[task], targets[task]) for task in tasks}


def metrics(model: nn.Module, data: TensorDataset, tasks: tuple[str, ...]) -> dict[str, dict[str, float]]:
    """Every figure that `tasks` declares; the model is in eval mode and gradients are off."""
    return {task: {"mse": float(loss)} for task, loss in losses(model, data.tensors, tasks).items()}
