"""What happened, task by task: a ring buffer of transitions for each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from detente.benchmark.rl.metaworld import ACTIONS, OBSERVATIONS, Array

__all__ = ["Replay"]


class Replay:
    """Transitions of several tasks that step together.

    Args:
        tasks: their number T.
        capacity: transitions kept per task; older ones are overwritten.
        seed: of the draws.
    """

    SIZES = (OBSERVATIONS, ACTIONS, 1, OBSERVATIONS)

    def __init__(self, tasks: int, capacity: int, seed: int) -> None:
        self.capacity = capacity
        self.parts = [torch.zeros(tasks, capacity, size) for size in self.SIZES]
        self.added = 0  # per task, overwritten ones included
        self.generator = torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        return min(self.added, self.capacity)

    def add(self, observations: Array, actions: Array, rewards: Array, following: Array) -> None:
        """One transition of every task: [T, 39], [T, 4], [T], [T, 39]."""
        place = self.added % self.capacity
        given = (observations, actions, rewards[:, None], following)
        for part, values in zip(self.parts, given, strict=True):
            part[:, place] = torch.from_numpy(values)
        self.added += 1

    def sample(self, size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Transitions drawn with replacement, ``size`` of every task, those of task 0 first.

        Returns:
            Observations [T * B, 39], actions [T * B, 4], rewards [T * B], following observations [T * B, 39].
        """
        tasks = len(self.parts[0])
        drawn = torch.randint(len(self), (tasks, size), generator=self.generator)
        rows = torch.arange(tasks).unsqueeze(1)
        seen, done, rewards, following = (part[rows, drawn].flatten(0, 1) for part in self.parts)
        return seen, done, rewards.squeeze(1), following

    def moments(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation [39] of the observations of all tasks; the latter is a least of 5 cm."""
        seen = self.parts[0][:, : len(self)].flatten(0, 1)
        return seen.mean(0), seen.std(0).clamp_min(0.05)

    def state_dict(self) -> dict[str, Any]:
        """All transitions, and the state of the draws."""
        kept = [part[:, : len(self)].clone() for part in self.parts]
        return {"parts": kept, "added": self.added, "generator": self.generator.get_state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a saved state."""
        for part, kept in zip(self.parts, state["parts"], strict=True):
            part[:, : kept.shape[1]] = kept
        self.added = state["added"]
        self.generator.set_state(state["generator"])
