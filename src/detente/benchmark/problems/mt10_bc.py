"""MT10 by behaviour cloning: one policy imitates the scripted experts of ten robot manipulation tasks.

Twelve demonstrations a task on Meta-World's MuJoCo simulation, ten real losses, and the success rate on goals that were
not demonstrated. Noise is added to the actions that the experts take, not to those that are imitated, so that the
policy sees how to return (DART). Needs the extra ``metaworld``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.utils.data import Dataset

from detente.benchmark.rl import cloning
from detente.benchmark.rl.cloning import Batch, Episodes, collate
from detente.benchmark.rl.metaworld import MT10
from detente.benchmark.rl.rates import report, summary

__all__ = [
    "collate", "losses", "make_data", "make_model", "metrics", "report", "selection", "settings", "summary", "tasks",
]  # fmt: skip

tasks: dict[str, dict[str, str]] = {task: {"success": "max"} for task in MT10}
settings: dict[str, Any] = {
    "epochs": 2,
    "steps": 500,
    "batch_size": 64,
    "lr": 1e-3,
    "hidden": 256,
    "width": 1.0,
    "dropout": 0.0,
    "demos": 12,
    "noise": 0.1,
    "episodes": 5,
    "horizon": 200,
    "seeds": 3,
}
selection = "mean"


def make_data(
    demos: int, noise: float, steps: int, batch_size: int, episodes: int, horizon: int
) -> dict[str, Dataset[Any]]:
    """``train``: observations and actions of every task; ``val``, ``test``: goals."""
    return cloning.make_data(MT10, demos, noise, steps, batch_size, episodes, horizon)


def make_model(tasks: tuple[str, ...], hidden: int, width: float = 1.0, dropout: float = 0.0) -> nn.Module:
    """Two shared layers of ``hidden`` units times ``width``, and a head per task."""
    return cloning.make_model(tasks, hidden, width, dropout)


def losses(model: nn.Module, batch: Batch, tasks: tuple[str, ...]) -> dict[str, Tensor]:
    """Mean squared error of the actions of each task."""
    return cloning.losses(model, batch, tasks, MT10)


def metrics(model: nn.Module, data: Episodes, tasks: tuple[str, ...]) -> Mapping[str, dict[str, float]]:
    """Success rate, 0..1, of each task."""
    return cloning.metrics(model, data, tasks)
