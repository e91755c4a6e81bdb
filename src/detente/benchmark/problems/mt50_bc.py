"""MT50 by behaviour cloning: one policy imitates the scripted experts of fifty robot manipulation tasks.

As ``mt10_bc``, with all tasks: fifty losses, each from its own demonstrations. Needs the extra ``metaworld``.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.utils.data import Dataset

from detente.benchmark.problems.mt10_bc import make_model, metrics, selection, settings
from detente.benchmark.rl import cloning
from detente.benchmark.rl.cloning import Batch, collate
from detente.benchmark.rl.metaworld import MT50
from detente.benchmark.rl.rates import report, summary

__all__ = [
    "collate", "losses", "make_data", "make_model", "metrics", "report", "selection", "settings", "summary", "tasks",
]  # fmt: skip

tasks: dict[str, dict[str, str]] = {task: {"success": "max"} for task in MT50}


def make_data(
    demos: int, noise: float, steps: int, batch_size: int, episodes: int, horizon: int
) -> dict[str, Dataset[Any]]:
    """``train``: observations and actions of every task; ``val``, ``test``: goals."""
    return cloning.make_data(MT50, demos, noise, steps, batch_size, episodes, horizon)


def losses(model: nn.Module, batch: Batch, tasks: tuple[str, ...]) -> dict[str, Tensor]:
    """Mean squared error of the actions of each task."""
    return cloning.losses(model, batch, tasks, MT50)
