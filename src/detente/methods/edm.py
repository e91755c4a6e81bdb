"""Equiangular direction method."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from detente.method import Context, GramianMethod, Paper
from detente.solvers import Array, cone, norms_and_cosines

__all__ = ["EDM", "equiangular"]


def equiangular(gramian: Array) -> tuple[Array, bool]:
    """EDM coefficients ``[T]`` (sum 1) of a Gramian, and whether they are exact. Zero rows take all the weight."""
    zero = np.diagonal(gramian) <= 0
    if zero.any():
        return zero / zero.sum(), True
    norms, cosine = norms_and_cosines(gramian)
    if len(norms) == 2:
        return norms[::-1] / norms.sum(), True
    solution = cone(cosine, np.ones(len(norms)))
    weights = solution.y / (norms / norms.min())
    return weights / weights.sum(), solution.exact


class EDM(GramianMethod):
    """EDM: the direction with equal angles to the task gradients.

    The shortest vector ``v = sum_i a_i u_i`` in the hull of the *unit* gradients, as long as the weighted harmonic
    mean of their norms: ``d = v / sum_i (a_i / n_i)`` (Katrutsa et al. 2020). For two tasks
    ``d = (n2 g1 + n1 g2) / (n1 + n2)``. It never conflicts with a task, and rescaling one loss changes its length
    but not its direction. Zero where 0 is in the hull of the unit gradients. Solved exactly; tasks whose gradients
    point the same way share their weight equally (the length depends on it).

    Task-specific parameters follow their own loss.

    Args:
        zero_rows: ``"drop"`` or ``"keep"`` tasks with a zero gradient (kept: the update is zero).
        heads: gradient of task-specific parameters, ``"own"`` (default) or ``"weighted"``.

    Example:
        >>> import torch, detente
        >>> J = torch.tensor([[1.0, 0.0], [0.0, 3.0]])
        >>> detente.aggregate(J, detente.EDM()).tolist()
        [0.75, 0.75]
    """

    name = "edm"
    paper = Paper(
        "katrutsa2020bisector",
        "Follow the bisector: a simple method for multi-objective optimization",
        "Katrutsa, Alexandr and Merkulov, Daniil and Tursynbek, Nurislam and Oseledets, Ivan",
        "arXiv preprint",
        2020,
        "2007.06937",
    )
    nonconflicting = True

    def rule(self, gramian: Tensor, context: Context) -> Tensor:
        return self.per_block(equiangular, gramian, context)
