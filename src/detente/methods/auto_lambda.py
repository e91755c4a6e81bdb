"""Auto-Lambda: bi-level learned loss weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from detente.method import (
    Context,
    LossWeighting,
    Paper,
    Range,
    Ranges,
    Session,
    TaskScalars,
    Update,
    at_least,
)

__all__ = ["AutoLambda"]


class AutoLambda(LossWeighting):
    """Auto-Lambda: loss weights learned so that a step on the weighted losses lowers the primary tasks' losses.

    Liu et al. (2022), with the authors' finite differences. Needs :func:`detente.step`. ::

        theta' = theta - lr (gradient of sum_i l_i L_i, with momentum and weight decay)     virtual step
        v      = lr times the gradient of the sum of the primary losses at theta', on the second batch
        e      = epsilon / ||v||
        l_i   <- Adam(l_i, gradient -(L_i(theta + e v) - L_i(theta - e v)) / (2 e))
        d      = gradient of sum_i l_i L_i

    In auxiliary learning name the tasks that count in ``primary``.

    Args:
        lr: learning rate of the weights.
        init: their starting value.
        primary: tasks whose losses are to fall; None for all.
        meta: ``meta(tasks=None) -> {task: loss}``, a closure on a fresh batch of the training data (the paper's second
            shuffled pass); None uses the step's own batch.
        epsilon: length of the finite difference.

    Raises:
        ValueError: an option is out of range, or no primary task is in a step.

    Limits:
        Nothing normalises the weights, and they may become negative: the update then raises that task's loss. With the
        defaults this took 1000 steps for a gradient that opposed one three times as long. Adam moves each weight by
        about ``lr`` per step, however much or little its task helps. Weights start at 0.1 and move by about 0.0001 by
        default: the first updates are a tenth of the plain sum, and 1000 steps change a weight by about 0.1.

    Example:
        >>> import torch, detente
        >>> trunk, heads = torch.nn.Linear(3, 4), torch.nn.ModuleDict({t: torch.nn.Linear(4, 1) for t in "ab"})
        >>> optimizer = torch.optim.SGD([*trunk.parameters(), *heads.parameters()], lr=0.1)
        >>> def closure(tasks=None):
        ...     h = trunk(torch.ones(2, 3)).tanh()
        ...     return {t: (heads[t](h) - 1).square().mean() for t in tasks or "ab"}
        >>> update = detente.step(closure, optimizer, detente.AutoLambda(lr=0.01))
        >>> bool(update.weights["a"] > 0.1)  # following the losses lowers them
        True
    """

    name = "auto_lambda"
    paper = Paper(
        "liu2022auto",
        "Auto-Lambda: Disentangling Dynamic Task Relationships",
        "Liu, Shikun and James, Stephen and Davison, Andrew J. and Johns, Edward",
        "Transactions on Machine Learning Research",
        2022,
        "2202.03091",
        "article",
    )
    ranges: ClassVar[Ranges] = {"lr": Range(1e-5, 1e-2, log=True)}
    backwards = "3, and 5 forward passes"
    memory = "T weights, Adam"
    state = ("lambdas",)
    requires_step = True

    def __init__(
        self,
        lr: float = 1e-4,
        init: float = 0.1,
        primary: Iterable[str] | None = None,
        meta: Callable[..., Mapping[str, Tensor]] | None = None,
        epsilon: float = 0.01,
    ) -> None:
        super().__init__()
        self.lr = at_least("lr", lr, 0, strict=True)
        self.init = float(init)
        self.primary = None if primary is None else tuple(primary)
        self.meta: Any = meta
        self.epsilon = at_least("epsilon", epsilon, 0, strict=True)
        self.start()

    def why_step(self) -> str:
        return "it tries a virtual step before each real one."

    def start(self) -> None:
        self.lambdas = TaskScalars(self.init, self.lr)

    def rule(self, losses: Tensor, context: Context) -> Tensor:
        return self.lambdas.read(context.tasks)

    def take_step(self, session: Session) -> Update:
        losses = session.losses()
        tasks = tuple(losses)
        goal = tasks if self.primary is None else tuple(t for t in tasks if t in self.primary)
        if not goal:
            raise ValueError(
                f"auto_lambda: none of its primary tasks {list(self.primary or ())} is in this step, which has "
                f"{list(tasks)}."
            )
        current = dict(zip(tasks, self.lambdas.read(tasks).tolist(), strict=True))
        with session.moved(session.virtual_step(session.gradients(losses, current))):
            ahead = session.losses() if self.meta is None else session.join(self.meta())
            wanted = session.gradients({t: ahead[t] for t in goal}, dict.fromkeys(goal, 1.0))
        wanted = [None if v is None else rate * v for v, rate in zip(wanted, session.rates(), strict=True)]
        length = math.sqrt(sum(float(v.double().square().sum()) for v in wanted if v is not None))
        if 0 < length < math.inf:
            step = self.epsilon / length
            with session.moved(wanted, step):
                above = session.values()
            with session.moved(wanted, -step):
                below = session.values()
            slope = torch.tensor([-(above[t] - below[t]) / (2 * step) for t in tasks], dtype=torch.float64)
            if bool(slope.isfinite().all()):
                self.lambdas.descend(tasks, slope)
        return super().take_step(session)
