"""Random loss weighting."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor

from detente.method import Choice, Context, LossWeighting, Paper, Ranges, Seeded, one_of

__all__ = ["RLW"]


class RLW(Seeded, LossWeighting):
    """RLW: random weights, fresh in every step.

    On average equal weights 1/T (Lin et al. 2022): a sobering baseline for learned weights. ::

        z ~ distribution, one number per task
        w = softmax(z)         normal (default), uniform
        w = z                  Dirichlet(1); Bernoulli(1/2) divided by its sum, drawn again while all are 0

    Args:
        distribution: ``"normal"``, ``"uniform"``, ``"dirichlet"`` or ``"bernoulli"``.
        seed: of the weights; the generator is part of the state.

    Raises:
        ValueError: the distribution is unknown.

    Limits:
        It resolves nothing: on average it is the mean gradient, and the rest is noise. The weights sum to 1, so that
        steps are T times shorter than those of ``sum(losses)``. It was behind equal weights in the three comparisons of
        all methods in docs/results (on digits by 1.5 points of delta-m), though not beyond chance.

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
        "article",
    )
    ranges: ClassVar[Ranges] = {"distribution": Choice(("normal", "uniform", "dirichlet", "bernoulli"))}
    needs = frozenset()

    def __init__(
        self,
        distribution: Literal["normal", "uniform", "dirichlet", "bernoulli"] = "normal",
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.distribution = one_of("distribution", distribution, ("normal", "uniform", "dirichlet", "bernoulli"))
        self.seed = seed
        self.start()

    def rule(self, losses: Tensor, context: Context) -> Tensor:
        count = len(losses)
        if self.distribution == "normal":
            return torch.softmax(torch.randn(count, dtype=torch.float64, generator=self.generator), 0)
        uniform = torch.rand(count, dtype=torch.float64, generator=self.generator)
        if self.distribution == "uniform":
            return torch.softmax(uniform, 0)
        if self.distribution == "bernoulli":
            while not bool((uniform < 0.5).any()):
                uniform = torch.rand(count, dtype=torch.float64, generator=self.generator)
            return (uniform < 0.5).double() / (uniform < 0.5).sum()
        exponential = -torch.log1p(-uniform)  # normalised exponentials are Dirichlet(1)
        return exponential / exponential.sum()
