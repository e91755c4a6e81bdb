"""Robust multi-task learning with excess risks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor

from detente.method import Context, GramianMethod, Paper, Range, Ranges, TaskRows, at_least
from detente.solvers import Array

__all__ = ["ExcessMTL"]


class ExcessMTL(GramianMethod):
    """ExcessMTL: more weight to tasks that still have far to go, judged by the gradient and not by the loss.

    He et al. (2024): a noisy task keeps a large loss for ever, but its excess risk, estimated from the gradient with a
    diagonal curvature, vanishes. ::

        S_i <- S_i + g_i^2                                   elementwise, 0 at first
        e_i = sum over parameters of g_i^2 / sqrt(S_i + 1e-7)
        first step of a task:  e_i(0) = e_i
        later:  w_i <- w_i exp(eta e_i / e_i(0)),  then sum w = T
        d   = sum_i w_i g_i

    Keeps one vector of the shared parameters per task, by task name.

    Task-specific parameters follow the weighted loss.

    Args:
        eta: rate of the weights, at least 0.
        heads: gradient of task-specific parameters, ``"weighted"`` (default) or ``"own"``.

    Raises:
        ValueError: ``eta`` is negative; the shared parameters changed.

    Limits:
        The first gradient of a task is its yardstick for good: after one first batch with a gradient 100 times too
        small, the task had 99% of the weight by the tenth step. Noise counts as risk, because the gradients are
        squared: in 1000 steps with ``eta = 0.1`` a task of pure noise took 88% from one with a steady gradient.

    Example:
        >>> import torch, detente
        >>> method = detente.ExcessMTL(eta=1.0)
        >>> J = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
        >>> _ = detente.aggregate(J, method)
        >>> d = detente.aggregate(J * torch.tensor([[1.0], [0.01]]), method)  # the second task has arrived
        >>> bool(d[0] > 1)
        True
    """

    name = "excess_mtl"
    paper = Paper(
        "he2024robust",
        "Robust Multi-Task Learning with Excess Risks",
        "He, Yifei and Zhou, Shiji and Zhang, Guojun and Yun, Hyokun and Xu, Yi and Zeng, Belinda and Chilimbi, "
        "Trishul and Zhao, Han",
        "International Conference on Machine Learning",
        2024,
        "2402.02009",
    )
    ranges: ClassVar[Ranges] = {"eta": Range(1e-3, 1.0, log=True)}
    kind = "jacobian"
    heads = "weighted"
    homogeneity = None
    exempt = {  # noqa: RUF012
        "zero_rows_do_not_count": "the weights sum to the number of tasks in the step",
        "blocks": "one weight per task for the whole model",
    }
    per_parameter = True
    memory = "T x P squares"
    state = ("squares", "first", "shares")

    def __init__(self, eta: float = 0.01, *, heads: Literal["own", "weighted"] | None = None) -> None:
        super().__init__(heads=heads)
        self.eta = at_least("eta", eta, 0)
        self.start()

    def start(self) -> None:
        super().start()
        self.squares = TaskRows()
        self.first: dict[str, float] = {}
        self.shares: dict[str, float] = {}

    def check(self, context: Context) -> None:
        self.squares.check(context, self.name)

    def transform(self, rows: Sequence[Tensor], context: Context) -> None:
        wide = [buffer if buffer.dtype == torch.float64 else buffer.float() for buffer in rows]
        parts = [[buffer[i] for buffer in wide] for i in range(len(context.tasks))]
        kept = [self.squares.read(task, new) for task, new in zip(context.tasks, parts, strict=True)]
        excess = []
        for task, old, new in zip(context.tasks, kept, parts, strict=True):
            seen = [s + g**2 for s, g in zip(old, new, strict=True)]
            self.squares.write(task, seen)
            risks = [(g**2 / (s + 1e-7).sqrt()).sum().double() for g, s in zip(new, seen, strict=True)]
            excess.append(torch.stack([risk.to(risks[0].device) for risk in risks]).sum())
        raised = torch.zeros(len(context.tasks), dtype=torch.float64)
        for t, (task, e) in enumerate(zip(context.tasks, torch.stack(excess).tolist(), strict=True)):
            if task in self.first:
                raised[t] = min(self.eta * e / self.first[task], 1e300)
            elif e > 0:
                self.first[task] = e
            self.shares.setdefault(task, 1.0)
        before = torch.tensor([self.shares[task] for task in context.tasks], dtype=torch.float64)
        # as logarithms, whose exponentials may overflow; a share of zero would never grow again
        logs = before.clamp_min(torch.finfo(torch.float64).tiny).log() + raised
        shares = len(context.tasks) * logs.softmax(0)
        self.shares |= dict(zip(context.tasks, shares.tolist(), strict=True))

    def rule(self, gramian: Array, context: Context) -> Array:
        shares = torch.tensor([self.shares.get(t, 1.0) for t in context.tasks], dtype=torch.float64)
        answer: Array = shares.expand(len(gramian), -1).numpy()
        return answer
