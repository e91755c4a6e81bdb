"""Behaviour cloning: one policy imitates the scripted experts of several Meta-World tasks.

The tasks share nothing but the network: each has its own demonstrations, so that a loss per task comes from a forward
pass of its own and the gradients of all tasks together cost little more than one backward pass.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset

from detente.benchmark.models import layers
from detente.benchmark.models.layers import scaled
from detente.benchmark.rl.metaworld import ACTIONS, OBSERVATIONS, Array, demonstrate, success

__all__ = ["Cloned", "Demonstrations", "Episodes", "collate", "losses", "make_data", "metrics"]

Batch = tuple[Tensor, Tensor]


class Episodes(Dataset[Any]):
    """A split to evaluate on: goals, and how the policy's observations are scaled.

    Args:
        split: ``train``, ``val`` or ``test``.
        episodes: per task.
        horizon: steps after which an episode has failed.
        mean, deviation: of the training observations, [39] each.
    """

    def __init__(self, split: str, episodes: int, horizon: int, mean: Tensor, deviation: Tensor) -> None:
        self.split, self.episodes, self.horizon = split, episodes, horizon
        self.mean, self.deviation = mean, deviation

    def __len__(self) -> int:
        return self.episodes


class Demonstrations(Episodes):
    """Observations and actions of every task; item k of one is the k-th of every task, over and over.

    Args:
        parts: observations [N_t, 39] and actions [N_t, 4], task by task; the N_t differ.
        length: number of items.
        evaluated: the rest of :class:`Episodes`, for methods that follow the success on the training goals.
    """

    def __init__(self, parts: Sequence[tuple[Tensor, Tensor]], length: int, **evaluated: Any) -> None:
        super().__init__("train", **evaluated)
        self.parts = parts
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        """A batch: observations [B, T, 39], actions [B, T, 4]."""
        index = torch.tensor(indices)
        rows = [index % len(observations) for observations, _ in self.parts]
        columns = [(seen[k], done[k]) for (seen, done), k in zip(self.parts, rows, strict=True)]
        return torch.stack([seen for seen, _ in columns], 1), torch.stack([done for _, done in columns], 1)


class Cloned(nn.Module):
    """A trunk of two linear layers with layer norm that all tasks share, and a linear head of actions per task."""

    def __init__(self, tasks: Sequence[str], hidden: int, dropout: float) -> None:
        super().__init__()
        sizes = [OBSERVATIONS, hidden, hidden]
        parts: list[nn.Module] = []
        for inputs, outputs in pairwise(sizes):
            parts += [nn.Linear(inputs, outputs), nn.LayerNorm(outputs), nn.ReLU(), layers.dropout(dropout)]
        self.trunk = nn.Sequential(*parts)
        self.heads = nn.ModuleDict({task: nn.Linear(hidden, ACTIONS) for task in tasks})

    def forward(self, observations: Tensor, task: str) -> Tensor:
        """Actions [B, 4] of one task for its scaled observations [B, 39]."""
        actions: Tensor = self.heads[task](self.trunk(observations))
        return actions


def make_data(
    names: Sequence[str], demos: int, noise: float, steps: int, batch_size: int, episodes: int, horizon: int
) -> dict[str, Dataset[Any]]:
    """Demonstrations to train on; held-out goals to evaluate on.

    Raises:
        ImportError: Meta-World is not installed.
    """
    found = [demonstrate(task, demos, noise=noise, seed=k) for k, task in enumerate(names)]
    seen = [torch.from_numpy(observations).float() for observations, _ in found]
    done = [torch.from_numpy(actions).float() for _, actions in found]
    everything = torch.cat(seen)
    # dimensions that never change stay at 0
    mean, deviation = everything.mean(0), everything.std(0).clamp_min(1e-3)
    parts = [((s - mean) / deviation, d) for s, d in zip(seen, done, strict=True)]
    where: dict[str, Any] = {"episodes": episodes, "horizon": horizon, "mean": mean, "deviation": deviation}
    evaluated = {split: Episodes(split, **where) for split in ("val", "test")}
    return {"train": Demonstrations(parts, steps * batch_size, **where), **evaluated}


def make_model(tasks: Sequence[str], hidden: int, width: float, dropout: float) -> nn.Module:
    return Cloned(tasks, scaled(hidden, width), dropout)


def collate(batch: Batch) -> Batch:
    """:class:`Demonstrations` gives whole batches."""
    return batch


def losses(model: nn.Module, batch: Batch, tasks: Sequence[str], names: Sequence[str]) -> dict[str, Tensor]:
    """Mean squared error of each task's actions, from a forward pass per task; ``names``: the tasks of the batch."""
    observations, actions = batch
    columns = {task: names.index(task) for task in tasks}
    return {task: F.mse_loss(model(observations[:, k], task), actions[:, k]) for task, k in columns.items()}


def metrics(model: nn.Module, data: Episodes, tasks: Sequence[str]) -> Mapping[str, dict[str, float]]:
    """Share of successful episodes of each task."""

    def rate(task: str) -> float:
        def policy(observations: Array) -> Array:
            scaled = (torch.from_numpy(observations).float() - data.mean) / data.deviation
            actions: Array = model(scaled, task).clamp(-1, 1).double().numpy()
            return actions

        return success(policy, task, data.split, data.episodes, data.horizon)

    return {task: {"success": rate(task)} for task in tasks}
