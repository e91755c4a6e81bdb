"""Dynamic weight average."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from detente.method import Context, EpochWeighting, Paper, Range, Ranges, at_least

__all__ = ["DWA"]


class DWA(EpochWeighting):
    """DWA: more weight to tasks whose loss falls slowly.

    Liu et al. (2019), Eq. 7. ::

        r_i = (mean L_i of the last epoch) / (mean L_i of the one before)
        w   = T softmax(r / temperature)

    Weights are 1 for the first two epochs, and for a task with fewer than two finished
    epochs. An epoch ends when you call :meth:`next_epoch`, or after ``window`` steps.

    Args:
        temperature: larger is closer to equal weights.
        window: steps that count as an epoch, for loops without epochs; None: :meth:`next_epoch` ends it.

    Raises:
        ValueError: an option is out of range.

    Limits:
        It hardly reacts: a task that stalls beside one whose loss halves per epoch gets 1.12 and the other 0.88. It
        sees only ratios of losses, so that a loss 100 times as large keeps a gradient 100 times as long. Near 0 the
        ratio is noise: a loss that went from 0.0001 to 0.002 took all the weight.

    Example:
        >>> import torch, detente
        >>> method = detente.DWA()
        >>> for loss in ([1.0, 1.0], [1.0, 0.5]):
        ...     _ = method.weights(torch.tensor(loss)); method.next_epoch()
        >>> w = method.weights(torch.tensor([1.0, 0.5]))
        >>> bool(w[0] > w[1]), round(float(w.sum()), 6)  # the first task stalls
        (True, 2.0)
    """

    name = "dwa"
    paper = Paper(
        "liu2019end",
        "End-To-End Multi-Task Learning With Attention",
        "Liu, Shikun and Johns, Edward and Davison, Andrew J.",
        "IEEE/CVF Conference on Computer Vision and Pattern Recognition",
        2019,
        "1803.10704",
    )
    ranges: ClassVar[Ranges] = {"temperature": Range(0.5, 5.0, log=True)}
    depth = 2

    def __init__(self, temperature: float = 2.0, window: int | None = None) -> None:
        super().__init__(window)
        self.temperature = at_least("temperature", temperature, 0, strict=True)

    def rule(self, losses: Tensor, context: Context) -> Tensor:
        past = [self.history.past(task) for task in context.tasks]
        weights = torch.ones_like(losses)
        if all(len(p) == 2 and p[0] != 0 for p in past):
            ratios = torch.tensor([p[1] / p[0] for p in past], dtype=torch.float64)
            weights = len(past) * torch.softmax(ratios / self.temperature, 0)
        self.history.add(context.tasks, losses)
        return weights
