"""Two regressions with a planted relation: none, a loss in a unit a hundred times smaller, or a fight in one block."""

from __future__ import annotations

import torch
from torch import nn
from torch.utils.data import TensorDataset

tasks = {"left": {"error": "min"}, "right": {"error": "min"}}
settings = {"epochs": 4, "batch_size": 32, "lr": 3e-3, "relation": "none"}


def make_data(relation):
    """Inputs [6], targets of both tasks, and what both want of the last block's output."""
    splits = {}
    for number, split in enumerate(("train", "val", "test")):
        generator = torch.Generator().manual_seed(number)
        x = torch.randn(512, 6, generator=generator)
        mixing = torch.randn(6, 3, generator=torch.Generator().manual_seed(9))
        y = (x @ mixing).tanh() + 0.3 * torch.randn(512, 3, generator=generator)
        wanted = (x[:, :1] * 2).sin()
        sides = (wanted, -wanted if relation == "last block" else wanted)
        targets = [torch.cat([y, side], 1) for side in sides]
        if relation == "scale":
            targets[0] = targets[0] * 100  # in centimetres, not in metres
        splits[split] = TensorDataset(x, *targets)
    return splits


class Network(nn.Module):
    """Three shared blocks; the heads read the second, and both tasks take the third's output as it is."""

    def __init__(self, tasks):
        super().__init__()
        self.blocks = nn.ModuleList(
            [
                nn.Sequential(nn.Linear(6, 24), nn.Tanh()),
                nn.Sequential(nn.Linear(24, 24), nn.Tanh()),
                nn.Sequential(nn.Linear(24, 12), nn.Tanh(), nn.Linear(12, 1)),
            ]
        )
        self.heads = nn.ModuleDict({task: nn.Linear(24, 3) for task in tasks})

    def forward(self, x):
        features = self.blocks[1](self.blocks[0](x))
        last = self.blocks[2](features)
        return {task: torch.cat([head(features), last], 1) for task, head in self.heads.items()}


def make_model(tasks):
    return Network(tasks)


def losses(model, batch, tasks):
    x, *targets = batch
    output, by_task = model(x), dict(zip(("left", "right"), targets, strict=True))
    return {task: (output[task] - by_task[task]).square().mean() for task in tasks}


def metrics(model, data, tasks):
    found = losses(model, data.tensors, tasks)
    return {task: {"error": float(value)} for task, value in found.items()}
