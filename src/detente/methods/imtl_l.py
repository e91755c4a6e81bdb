"""Impartial multi-task learning: loss balance."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from detente.method import Context, LossWeighting, Paper, Range, Ranges, TaskScalars, at_least

__all__ = ["IMTLL"]

PAPER = Paper(
    "liu2021towards",
    "Towards Impartial Multi-task Learning",
    "Liu, Liyang and Li, Yi and Kuang, Zhanghui and Xue, Jing-Hao and Chen, Yimin and Yang, Wenming and Liao, Qingmin "
    "and Zhang, Wayne",
    "International Conference on Learning Representations",
    2021,
)


class IMTLL(LossWeighting):
    """IMTL-L: one learned scale per task, so that all scaled losses are equally large.

    The loss half of Liu et al. (2021). At the minimum over ``s`` every scaled loss is 1. The ``s_i`` are learned here,
    by an Adam of the method's own that steps once per call. ::

        loss = sum_i exp(s_i) L_i - s_i          s_i starts at `init`
        w_i  = exp(s_i)

    Args:
        lr: learning rate of the scales.
        init: their starting value.

    Raises:
        ValueError: ``lr`` is not positive, or a loss is not.

    Limits:
        It sees losses and no gradients: a small loss gets a large weight, also where its gradient is already the
        longest. The weight goes to ``1 / L``, without bound as a loss tends to 0. It is late for losses far from 1:
        with the default ``lr`` it takes 325 steps to fit a loss of 0.001 to within 10%, and more than 1000 for a loss
        of 100.

    Example:
        >>> import torch, detente
        >>> method = detente.IMTLL(lr=0.1)
        >>> for _ in range(300):
        ...     w = method.weights(torch.tensor([4.0, 0.5]))
        >>> [round(float(v), 1) for v in w * torch.tensor([4.0, 0.5])]
        [1.0, 1.0]
    """

    name = "imtl_l"
    paper = PAPER
    ranges: ClassVar[Ranges] = {"lr": Range(1e-3, 1e-1, log=True)}
    positive_losses = True
    memory = "T scales, Adam"
    state = ("scales",)

    def __init__(self, lr: float = 0.025, init: float = 0.0) -> None:
        super().__init__()
        self.lr = at_least("lr", lr, 0, strict=True)
        self.init = float(init)
        self.start()

    def start(self) -> None:
        self.scales = TaskScalars(self.init, self.lr)

    def rule(self, losses: Tensor, context: Context) -> Tensor:
        weights = self.scales.read(context.tasks).exp()
        self.scales.descend(context.tasks, weights * losses - 1)
        return weights
