"""Multi-objective gradient with double sampling."""

from __future__ import annotations

from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from detente.method import Context, GramianMethod, Paper, Range, Ranges, at_least, fit_blocks
from detente.solvers import Array, on_simplex, times

__all__ = ["MoDo"]


class MoDo(GramianMethod):
    """MoDo: simplex weights that take one stochastic descent step on the common length per step.

    Chen et al. (2023). ::

        l <- Proj_simplex(l - gamma (J1 (J2' l) + rho l))      uniform at first, kept from step to step
        d = sum_i l_i g_i                                      gradients of a third batch

    With ``batches=1`` (the default) one batch serves for all three; ``batches=3`` is the paper's double sampling, whose
    products ``J1 J2'`` are unbiased, and needs :func:`detente.step` (with 2 the first batch serves twice).

    Task-specific parameters follow the weighted loss.

    Args:
        gamma: rate of the weights.
        rho: regularisation of the weights.
        batches: 1, 2 or 3.
        zero_rows: ``"drop"`` or ``"keep"`` tasks with a zero gradient.
        heads: gradient of task-specific parameters, ``"weighted"`` (default) or ``"own"``.

    Raises:
        ValueError: an option is out of range.

    Limits:
        ``gamma`` is measured in units of squared gradients, and no default fits all. At gradients of length 10 the
        weights jumped from one task to the other in every step. At 0.01 and 0.02 they were still equal to three digits
        after 2000 steps, where MGDA has 0.8 and 0.2.

    Example:
        >>> import torch, detente
        >>> J, method = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), detente.MoDo(gamma=0.1)
        >>> for _ in range(100):
        ...     d = detente.aggregate(J, method)
        >>> [round(float(v), 2) for v in d]  # MGDA's [0.8, 0.4], a little pulled to the mean by rho
        [0.79, 0.42]
    """

    name = "modo"
    paper = Paper(
        "chen2023three",
        "Three-Way Trade-Off in Multi-Objective Learning: Optimization, Generalization and Conflict-Avoidance",
        "Chen, Lisha and Fernando, Heshan and Ying, Yiming and Chen, Tianyi",
        "Advances in Neural Information Processing Systems",
        2023,
        "2305.20057",
    )
    ranges: ClassVar[Ranges] = {"gamma": Range(0.01, 1.0, log=True), "rho": Range(0.0, 0.5)}
    heads = "weighted"
    homogeneity = None
    memory = "T x B weights"
    state = ("shares",)
    without_step = ", or leave batches=1"

    def __init__(
        self,
        gamma: float = 0.1,
        rho: float = 0.1,
        batches: Literal[1, 2, 3] = 1,
        *,
        zero_rows: Literal["drop", "keep"] = "drop",
        heads: Literal["own", "weighted"] | None = None,
    ) -> None:
        super().__init__(zero_rows=zero_rows, heads=heads)
        self.gamma = at_least("gamma", gamma, 0)
        self.rho = at_least("rho", rho, 0)
        if batches not in (1, 2, 3):
            raise ValueError(f"batches must be 1, 2 or 3; got {batches!r}.")
        self.batches = batches
        self.requires_step = batches > 1
        self.start()

    def start(self) -> None:
        super().start()
        self.shares: dict[str, Tensor] = {}

    def check(self, context: Context) -> None:
        blocks = None if context.partition is None else context.partition.count
        fit_blocks(self.name, self.shares, context.tasks, blocks)

    def rule(self, gramian: Array, context: Context) -> Array:
        cross = gramian if context.cross is None else context.cross.numpy()
        uniform = torch.full((len(gramian),), 1 / len(context.tasks), dtype=torch.float64)
        fit_blocks(self.name, self.shares, context.tasks, len(gramian))
        kept = [self.shares.get(t, uniform) for t in context.tasks]
        before = on_simplex(np.stack([share.numpy() for share in kept], -1), context.alive)
        w = on_simplex(before - self.gamma * (times(cross, before) + self.rho * before), context.alive)
        self.shares |= {t: torch.from_numpy(w[:, i].copy()) for i, t in enumerate(context.tasks)}
        return w
