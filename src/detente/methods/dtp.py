"""Dynamic task prioritization."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from detente.method import Context, LossWeighting, Paper, Range, Ranges, at_least

__all__ = ["DTP"]


class DTP(LossWeighting):
    """DTP: more weight to tasks that perform badly, by a performance figure between 0 and 1.

    Guo et al. (2018). ::

        k_i <- m (new figure) + (1 - m) k_i              key performance indicator in (0, 1], such as an accuracy
        w_i  = -(1 - k_i)^gamma log k_i

    You report the figures with :meth:`observe_metrics`; until a task has one its
    weight is 1. Report training figures, or validation figures of a split that you do not select on.

    Args:
        gamma: focusing power, at least 0.
        momentum: share of a new figure in the moving average, in (0, 1].

    Raises:
        ValueError: an option or a figure is out of range.

    Limits:
        Tasks fade as they get good: with ``gamma = 2`` the weight is 0.17 at a figure of 0.5, 0.001 at 0.9 and 1e-6 at
        0.99, and when all are good training nearly stops at an unchanged learning rate. Figures are compared as they
        are: 0.9 on an easy task and 0.9 on a hard one weigh alike. On digits the default ``gamma`` was the worst of all
        38 methods before tuning (``docs/results/digits.md``), which then chose 0.55.

    Example:
        >>> import torch, detente
        >>> method = detente.DTP()
        >>> method.observe_metrics({"a": 0.9, "b": 0.5})
        >>> w = detente.WPCGrad(priority=method)  # the worse task is kept whole more often
        >>> bool(method.weight_of("b") > method.weight_of("a"))
        True
    """

    name = "dtp"
    paper = Paper(
        "guo2018dynamic",
        "Dynamic Task Prioritization for Multitask Learning",
        "Guo, Michelle and Haque, Albert and Huang, De-An and Yeung, Serena and Fei-Fei, Li",
        "European Conference on Computer Vision",
        2018,
    )
    ranges: ClassVar[Ranges] = {"gamma": Range(0.5, 3.0), "momentum": Range(0.1, 0.9)}
    needs = frozenset({"losses", "metrics"})
    state = ("figures",)
    floor = 1e-6

    def __init__(self, gamma: float = 2.0, momentum: float = 0.5) -> None:
        super().__init__()
        self.gamma = at_least("gamma", gamma, 0)
        self.momentum = at_least("momentum", momentum, 0, strict=True)
        if momentum > 1:
            raise ValueError(f"momentum must be in (0, 1]; got {momentum!r}.")
        self.start()

    def start(self) -> None:
        self.figures: dict[str, float] = {}

    def observe_metrics(self, figures: Mapping[str, float]) -> None:
        """Take new figures, each in [0, 1] with 1 the best, into the moving averages."""
        for task, figure in figures.items():
            if not 0 <= figure <= 1:
                raise ValueError(
                    f"the figure of task {task!r} must be in [0, 1] with 1 the best; got {figure!r}. "
                    "Normalise it, for example to 1 - error / error at the start."
                )
        for task, figure in figures.items():
            past = self.figures.get(task, figure)
            self.figures[task] = self.momentum * figure + (1 - self.momentum) * past

    def weight_of(self, task: str) -> float:
        """The task's current weight."""
        if task not in self.figures:
            return 1.0
        k = torch.tensor(self.figures[task], dtype=torch.float64).clamp_min(self.floor)
        return float(-((1 - k) ** self.gamma) * k.log())

    def rule(self, losses: Tensor, context: Context) -> Tensor:
        return torch.tensor([self.weight_of(t) for t in context.tasks], dtype=torch.float64).abs()
