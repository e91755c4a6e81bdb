"""Two regressions on one small network with batch normalisation and dropout; a user's problem file, used by tests."""

from __future__ import annotations

import os
import time

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

tasks = {"sum": {"mse": "min"}, "sign": {"accuracy": "max", "mse": "min"}}
settings = {"epochs": 30, "batch_size": 16, "lr": 1e-2, "probe_every": 2}


class Net(nn.Module):
    def __init__(self, names):
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.1))
        self.heads = nn.ModuleDict({name: nn.Linear(8, 1) for name in names})

    def forward(self, x):
        h = self.trunk(x)
        return {name: head(h).squeeze(-1) for name, head in self.heads.items()}


def make_data():
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(96, 4, generator=generator)
    total = x.sum(1) + 0.1 * torch.randn(96, generator=generator)
    sign = (x[:, 0] * x[:, 1]).sign()
    cuts = {"train": slice(0, 48), "val": slice(48, 72), "test": slice(72, 96)}
    return {split: TensorDataset(x[cut], total[cut], sign[cut]) for split, cut in cuts.items()}


def make_model(tasks):
    return Net(tasks)


def losses(model, batch, tasks):
    x, total, sign = batch
    outputs, labels = model(x), {"sum": total, "sign": sign}
    return {task: (outputs[task] - labels[task]).square().mean() for task in tasks}


def metrics(model, data, tasks):
    time.sleep(float(os.environ.get("TINY_SLEEP", "0")))  # makes a run long enough to be killed, without work
    batch = next(iter(DataLoader(data, batch_size=len(data))))
    figures = {task: {"mse": float(loss)} for task, loss in losses(model, batch, tasks).items()}
    if "sign" in tasks:
        figures["sign"]["accuracy"] = float((model(batch[0])["sign"].sign() == batch[2]).double().mean())
    return figures
