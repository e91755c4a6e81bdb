"""Multi-objective gradient correction."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from detente.method import Context, GramianMethod, Paper, Range, Ranges, TaskRows, at_least, fit_blocks
from detente.solvers import Array, on_simplex, times

__all__ = ["MoCo"]


class MoCo(GramianMethod):
    """MoCo: tracked gradients instead of noisy ones, and simplex weights that descend on their common length.

    Fernando et al. (2023). The trackers take the bias out of weights computed from stochastic gradients. ::

        y_i <- y_i - b_k (y_i - g_i)                                     tracked gradients, 0 at first
        l   <- Proj_simplex(l - c_k (Y Y' + rho I) l)                    weights, uniform at first
        d   = sum_i l_i y_i                                              b_k = beta / k^decay, c_k = gamma / k^decay

    Keeps one vector of the shared parameters per task, by task name; a task that is missing in a step keeps its own.

    Task-specific parameters follow the weighted loss.

    Args:
        beta: rate of the trackers, in (0, 1].
        gamma: rate of the weights.
        decay: power of the step number by which both fall.
        rho: regularisation of the weights.
        zero_rows: ``"drop"`` or ``"keep"`` tasks whose tracked gradient is zero.
        heads: gradient of task-specific parameters, ``"weighted"`` (default) or ``"own"``.

    Raises:
        ValueError: an option is out of range; the shared parameters changed.

    Limits:
        Trackers start at 0 and then lag: with the defaults the first update has half its length, and after 1000 steps a
        gradient that turns around is noticed 44 steps later. ``gamma`` is measured in units of squared gradients: at
        gradients of length 10 the weights jumped from one task to the other in every step. It was last or second to
        last of the 38 in the three comparisons of all methods in docs/results, though not beyond chance.

    Example:
        >>> import torch, detente
        >>> J = torch.tensor([[2.0, 0.0], [0.0, 2.0]])
        >>> [round(float(v), 6) for v in detente.aggregate(J, detente.MoCo(beta=0.5))]  # half of the mean at first
        [0.5, 0.5]
    """

    name = "moco"
    paper = Paper(
        "fernando2023mitigating",
        "Mitigating Gradient Bias in Multi-objective Learning: A Provably Convergent Approach",
        "Fernando, Heshan and Shen, Han and Liu, Miao and Chaudhury, Subhajit and Murugesan, Keerthiram and Chen, "
        "Tianyi",
        "International Conference on Learning Representations",
        2023,
        "2210.12624",
    )
    ranges: ClassVar[Ranges] = {"beta": Range(0.1, 0.99), "gamma": Range(0.01, 1.0, log=True), "rho": Range(0.0, 0.5)}
    kind = "jacobian"
    heads = "weighted"
    homogeneity = None
    per_parameter = True
    memory = "T x P tracked gradients"
    state = ("tracked", "shares", "steps")

    def __init__(
        self,
        beta: float = 0.5,
        gamma: float = 0.1,
        decay: float = 0.5,
        rho: float = 0.0,
        *,
        zero_rows: Literal["drop", "keep"] = "drop",
        heads: Literal["own", "weighted"] | None = None,
    ) -> None:
        super().__init__(zero_rows=zero_rows, heads=heads)
        self.beta = at_least("beta", beta, 0, strict=True)
        if beta > 1:
            raise ValueError(f"beta must be in (0, 1]; got {beta!r}.")
        self.gamma = at_least("gamma", gamma, 0)
        self.decay = at_least("decay", decay, 0)
        self.rho = at_least("rho", rho, 0)
        self.start()

    def start(self) -> None:
        super().start()
        self.tracked = TaskRows()
        self.shares: dict[str, Tensor] = {}
        self.steps = 0

    def transform(self, rows: Sequence[Tensor], context: Context) -> None:
        parts = [[buffer[i] for buffer in rows] for i in range(len(context.tasks))]  # views
        before = [self.tracked.read(task, new) for task, new in zip(context.tasks, parts, strict=True)]
        self.steps += 1
        rate = self.beta / self.steps**self.decay
        for i, task in enumerate(context.tasks):
            for new, old in zip(parts[i], before[i], strict=True):
                new.mul_(rate).add_(old, alpha=1 - rate)
            self.tracked.write(task, parts[i])

    def check(self, context: Context) -> None:
        self.tracked.check(context, self.name)
        blocks = None if context.partition is None else context.partition.count
        fit_blocks(self.name, self.shares, context.tasks, blocks)

    def rule(self, gramian: Array, context: Context) -> Array:
        rate = self.gamma / max(self.steps, 1) ** self.decay
        uniform = torch.full((len(gramian),), 1 / len(context.tasks), dtype=torch.float64)
        fit_blocks(self.name, self.shares, context.tasks, len(gramian))
        kept = [self.shares.get(t, uniform) for t in context.tasks]
        before = on_simplex(np.stack([share.numpy() for share in kept], -1), context.alive)
        w = on_simplex(before - rate * (times(gramian, before) + self.rho * before), context.alive)
        self.shares |= {t: torch.from_numpy(w[:, i].copy()) for i, t in enumerate(context.tasks)}
        return w
