"""Random loss weighting."""

from __future__ import annotations

import torch
from torch import Tensor

from detente.method import Context, LossWeighting, Paper

__all__ = ["RLW"]


class RLW(LossWeighting):
    """RLW: random weights, fresh in every step.

    ``w = softmax(z)`` with ``z`` standard normal (Lin et al. 2022): on average equal weights 1/T. A sobering
    baseline for learned weights.

    Args:
        seed: of the weights; the generator is part of the state.

    Example:
        >>> import torch, detente
        >>> w = detente.RLW(seed=0).weights(torch.ones(3))
        >>> round(float(w.sum()), 6)
        1.0
    """

    name = "rlw"
    paper = Paper(
        "lin2022reasonable",
        "Reasonable Effectiveness of Random Weighting: A Litmus Test for Multi-Task Learning",
        "Lin, Baijiong and Ye, Feiyang and Zhang, Yu and Tsang, Ivor W.",
        "Transactions on Machine Learning Research",
        2022,
        "2111.10603",
    )
    needs = frozenset()
    stochastic = True
    homogeneity = 1.0
    state = ("generator",)

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.seed = seed
        self.generator = torch.Generator()
        self.start()

    def start(self) -> None:
        self.generator.manual_seed(self.seed)

    def rule(self, losses: Tensor, context: Context) -> Tensor:
        return torch.softmax(torch.randn(len(losses), dtype=torch.float64, generator=self.generator), 0)
