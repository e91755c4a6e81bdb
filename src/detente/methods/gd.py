"""Gradient descent on a fixed weighted sum of the losses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from torch import Tensor

from detente.method import Context, LossWeighting, Paper, TaskWeights, one_of

__all__ = ["GD"]


class GD(LossWeighting):
    """Gradient descent on a weighted sum of the losses (equal weights, linear scalarization).

    The plain step every other method is compared with. Not adaptive, one backward pass. ::

        d = sum_i w_i g_i                w = 1; divided by T for the mean

    Args:
        weights: one weight per task in order, a mapping by task name, or None for equal weights of 1. They need
            not sum to 1.
        reduction: ``"sum"`` (what ``sum(losses).backward()`` does) or ``"mean"``, which divides by the number of
            tasks in the step.

    Raises:
        ValueError: a weight is negative or not finite; weights do not fit the tasks of a step.

    Limits:
        Conflicts stay, and the largest gradient decides: of the gradients (100, 0) and (-0.5, 0.8) the second task gets
        worse. Good weights have to be searched: on digits nine weightings ranged from 2.2 to 11.8 in delta-m
        (``docs/results/digits.md``). Where the Pareto front is not convex, no weights lead to its inner part.

    Example:
        >>> import torch, detente
        >>> J = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
        >>> detente.aggregate(J, detente.GD(), losses=[1.0, 1.0]).tolist()
        [1.0, 2.0]
    """

    name = "gd"
    paper = Paper("caruana1997multitask", "Multitask Learning", "Caruana, Rich", "Machine Learning 28", 1997)
    needs = frozenset()

    def __init__(
        self,
        weights: Sequence[float] | Tensor | Mapping[str, float] | None = None,
        reduction: Literal["sum", "mean"] = "sum",
    ) -> None:
        super().__init__()
        self.reduction = one_of("reduction", reduction, ("sum", "mean"))
        self.fixed = TaskWeights("weights", weights, distribution=False)

    def check(self, context: Context) -> None:
        self.fixed.check(context)

    def rule(self, losses: Tensor, context: Context) -> Tensor:
        weights: Tensor = self.fixed(context)
        return weights / len(losses) if self.reduction == "mean" else weights
