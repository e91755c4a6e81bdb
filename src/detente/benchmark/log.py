"""Figures of one epoch of a training: mean losses, weights, norms and cosines."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from detente.benchmark.division import Division
from detente.gramian import cosines
from detente.method import Update

__all__ = ["Log"]


class Log:
    """Figures of the running epoch: mean losses, weights, norms and cosines."""

    def __init__(self, tasks: Sequence[str], division: Division) -> None:
        self.tasks = tasks
        self.division = division
        self.losses: list[list[float]] = []  # of every step and task, of this process's samples
        self.counts: list[list[float]] = []
        self.weights: dict[str, Tensor] = {t: torch.zeros((), dtype=torch.float64) for t in tasks}
        self.gramians: list[Tensor] = []
        self.clipped = 0  # optimizer steps whose gradient was shortened
        self.unsolved = 0  # blocks that a solver could not certify

    @property
    def steps(self) -> int:
        return len(self.losses)

    def step(self) -> None:
        """The next losses are those of a new step."""
        self.losses.append([math.nan] * len(self.tasks))
        self.counts.append([0.0] * len(self.tasks))

    def loss(self, losses: Mapping[str, Tensor], counts: Mapping[str, float]) -> None:
        """Note losses; some methods compute them several times per step, and the first time counts."""
        for t, task in enumerate(self.tasks):
            if task in losses and not self.counts[-1][t]:
                self.losses[-1][t], self.counts[-1][t] = float(losses[task].detach()), counts[task]

    def update(self, update: Update, share: float = 1.0) -> None:
        """Note what a step's method answered, or one of several in a step, with its ``share`` in the weights."""
        for task, weight in update.weights.items():
            self.weights[task] += share * weight.double().mean()
        self.unsolved += int(update.stats.get("unsolved", 0))

    def row(self, epoch: int) -> dict[str, Any]:
        given = (torch.tensor(v, dtype=torch.float64) for v in (self.losses, self.counts))
        losses, counts = self.division.means(*given)
        there = counts > 0
        means = torch.where(there, losses, 0.0).sum(0) / there.sum(0).clamp_min(1)
        entry: dict[str, Any] = {
            "epoch": epoch,
            "steps": self.steps,
            "loss": dict(zip(self.tasks, means.tolist(), strict=True)),
            "weights": {t: float(v) / max(self.steps, 1) for t, v in self.weights.items()},
            "norms": None,
            "cosine": None,
            "conflict_rate": None,
            "clipped": self.clipped,
            "unsolved": self.unsolved,
        }
        if self.gramians:
            stacked = torch.stack(self.gramians)
            cosine = cosines(stacked)
            upper = torch.ones(len(self.tasks), len(self.tasks)).triu(1).bool()
            norms = stacked.diagonal(dim1=1, dim2=2).clamp_min(0).sqrt().mean(0)
            entry["norms"] = dict(zip(self.tasks, norms.tolist(), strict=True))
            entry["cosine"] = cosine.mean(0).tolist()
            entry["conflict_rate"] = float((cosine[:, upper] < 0).double().mean())
            entry["probes"] = len(self.gramians)
        return entry
