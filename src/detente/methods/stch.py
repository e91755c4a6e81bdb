"""Smooth Tchebycheff scalarization."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from detente.method import Context, EpochWeighting, Paper, Range, Ranges, at_least

__all__ = ["STCH"]


class STCH(EpochWeighting):
    """STCH: a smooth maximum of the losses, each measured against where it stood after a warm-up.

    Lin et al. (2024), in the form of the authors' multi-task code. An epoch ends when you call :meth:`next_epoch`, or
    after ``window`` steps. ::

        while the first `warmup` + 1 epochs run:  loss = sum_i log L_i
        nadir_i = mean of L_i in epoch `warmup` (counted from 0)
        after that:  loss = mu T log sum_i exp(log(L_i / nadir_i) / mu)
                     w_i  = T softmax(log(L / nadir) / mu)_i / L_i

    For ``mu -> 0`` only the relatively largest loss counts. A task that was not seen in the warm-up is measured by its
    first finished epoch; until then the sum of logarithms holds.

    Args:
        mu: smoothness, positive.
        warmup: epochs before the one that sets the nadir.
        window: steps that count as an epoch, for loops without epochs; None: :meth:`next_epoch` ends it.

    Raises:
        ValueError: an option is out of range, or a loss is not positive.

    Limits:
        At ``mu = 1``, the default, the weights keep their proportions of ``1 / nadir_i`` whatever the losses do: after
        the warm-up only the length of the update adapts. One epoch sets the nadirs for good. A training of no more than
        ``warmup + 1`` epochs is :class:`SI`, as in two of the comparisons of docs/results.

    Example:
        >>> import torch, detente
        >>> method = detente.STCH(warmup=0)
        >>> method.weights(torch.tensor([4.0, 1.0])).tolist()  # the sum of logarithms
        [0.25, 1.0]
        >>> method.next_epoch()  # nadir: 4 and 1
        >>> w = method.weights(torch.tensor([2.0, 1.0]))  # half the nadir, and all of it
        >>> [round(float(v), 6) for v in w * torch.tensor([2.0, 1.0])]
        [0.666667, 1.333333]
    """

    name = "stch"
    paper = Paper(
        "lin2024smooth",
        "Smooth Tchebycheff Scalarization for Multi-Objective Optimization",
        "Lin, Xi and Zhang, Xiaoyuan and Yang, Zhiyuan and Liu, Fei and Wang, Zhenkun and Zhang, Qingfu",
        "International Conference on Machine Learning",
        2024,
        "2402.19078",
    )
    ranges: ClassVar[Ranges] = {"mu": Range(0.1, 10.0, log=True)}
    positive_losses = True
    memory = "T nadirs"
    state = ("history", "nadir", "epoch")

    def __init__(self, mu: float = 1.0, warmup: int = 4, window: int | None = None) -> None:
        super().__init__(window)
        self.mu = at_least("mu", mu, 0, strict=True)
        self.warmup = int(at_least("warmup", warmup, 0))

    def start(self) -> None:
        super().start()
        self.nadir: dict[str, float] = {}
        self.epoch = 0

    def next_epoch(self) -> None:
        super().next_epoch()
        self._ended()

    def _ended(self) -> None:
        if self.epoch >= self.warmup:
            for task, means in self.history.closed.items():
                self.nadir.setdefault(task, means[-1])
        self.epoch += 1

    def rule(self, losses: Tensor, context: Context) -> Tensor:
        if all(task in self.nadir for task in context.tasks):
            nadir = torch.tensor([self.nadir[t] for t in context.tasks], dtype=torch.float64)
            weights = len(losses) * torch.softmax((losses / nadir).log() / self.mu, 0) / losses
        else:
            weights = 1 / losses
        ending = self.window is not None and self.history.steps + 1 >= self.window
        self.history.add(context.tasks, losses)
        if ending:
            self._ended()
        return weights
