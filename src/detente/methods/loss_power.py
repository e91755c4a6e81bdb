"""Weights in proportion to a power of the losses."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from detente.method import Context, EpochWeighting, Paper, Range, Ranges, at_least

__all__ = ["LossPower"]


class LossPower(EpochWeighting):
    """Weights in proportion to a power of each task's mean loss of the last epoch.

    The loss-based probabilities of wPCGrad (Bohn et al. 2024), for use as ``WPCGrad(priority=LossPower())``. ::

        w_i = L_i^gamma / sum_k L_k^gamma                L_i the mean of the last epoch

    Uniform in the first epoch and while a task has no finished epoch. ``gamma =
    0`` is uniform. The paper's values of gamma are not known; 1 is our default.

    Args:
        gamma: the power; larger favours the task with the largest loss more.
        window: steps that count as an epoch, for loops without epochs; None: :meth:`next_epoch` ends it.

    Raises:
        ValueError: an option is out of range, or a loss is not positive.

    Limits:
        The units of the losses decide: with losses 100 and 1 the first has 99% of the weight. A task that cannot
        improve keeps the largest loss, and with it the priority, for good.

    Example:
        >>> import torch, detente
        >>> method = detente.LossPower(gamma=1.0)
        >>> _ = method.weights(torch.tensor([3.0, 1.0])); method.next_epoch()
        >>> method.weights(torch.tensor([3.0, 1.0])).tolist()
        [0.75, 0.25]
    """

    name = "loss_power"
    paper = Paper(
        "bohn2024task",
        "Task Weighting through Gradient Projection for Multitask Learning",
        "Bohn, Christian and Freeman, Ido and Tercan, Hasan and Meisen, Tobias",
        "International Conference on Neural Information Processing",
        2024,
        "2409.01793",
    )
    ranges: ClassVar[Ranges] = {"gamma": Range(0.25, 3.0)}
    positive_losses = True

    def __init__(self, gamma: float = 1.0, window: int | None = None) -> None:
        super().__init__(window)
        self.gamma = at_least("gamma", gamma, 0)

    def rule(self, losses: Tensor, context: Context) -> Tensor:
        past = [self.history.past(task) for task in context.tasks]
        if all(past):
            # softmax of gamma log L: the power without overflow
            weights = torch.softmax(self.gamma * torch.tensor([p[-1] for p in past], dtype=torch.float64).log(), 0)
        else:
            weights = torch.full_like(losses, 1 / len(losses))
        self.history.add(context.tasks, losses)
        return weights
