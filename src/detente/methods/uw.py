"""Uncertainty weighting."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from detente.method import Context, LossWeighting, Paper, Range, Ranges, TaskScalars, at_least

__all__ = ["UW"]


class UW(LossWeighting):
    """Uncertainty weighting: one learned log-variance ``s_i`` per task.

    Kendall et al. (2018), in its common form. ::

        loss = sum_i 0.5 (exp(-s_i) L_i + s_i)          s_i starts at `init`
        w_i  = 0.5 exp(-s_i)

    The ``s_i`` are learned here, by an Adam of the method's own that steps once per call; nothing
    has to be added to your optimizer.

    Args:
        lr: learning rate of the log-variances.
        init: their starting value.

    Raises:
        ValueError: ``lr`` is not positive.

    Limits:
        It sees losses and no gradients. The weight goes to ``1 / (2 L)``, without bound as a loss tends to 0; a
        negative loss drives it up for ever, to 4e16 after 500 steps at a loss of -1. It is late for losses far from 1:
        with the default ``lr`` it takes 273 steps to fit a loss of 10 to within 10%, and 1429 for 100.

    Example:
        >>> import torch, detente
        >>> method = detente.UW()
        >>> method.weights(torch.tensor([4.0, 0.25])).tolist()
        [0.5, 0.5]
        >>> w = method.weights(torch.tensor([4.0, 0.25]))
        >>> bool(w[0] < 0.5 < w[1])  # noisy tasks lose weight
        True
    """

    name = "uw"
    paper = Paper(
        "kendall2018multi",
        "Multi-Task Learning Using Uncertainty to Weigh Losses for Scene Geometry and Semantics",
        "Kendall, Alex and Gal, Yarin and Cipolla, Roberto",
        "IEEE/CVF Conference on Computer Vision and Pattern Recognition",
        2018,
        "1705.07115",
    )
    ranges: ClassVar[Ranges] = {"lr": Range(1e-3, 1e-1, log=True)}
    state = ("log_variances",)

    def __init__(self, lr: float = 0.025, init: float = 0.0) -> None:
        super().__init__()
        self.lr = at_least("lr", lr, 0, strict=True)
        self.init = float(init)
        self.start()

    def start(self) -> None:
        self.log_variances = TaskScalars(self.init, self.lr)

    def rule(self, losses: Tensor, context: Context) -> Tensor:
        s = self.log_variances.read(context.tasks)
        weights = 0.5 * (-s).exp()
        self.log_variances.descend(context.tasks, 0.5 - weights * losses)
        return weights
