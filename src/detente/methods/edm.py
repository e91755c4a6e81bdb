"""Equiangular direction method."""

from __future__ import annotations

import math

from detente.method import Context, GramianMethod, Paper
from detente.solvers import Array, any_of, cone, diagonal, flip, least, namespace, normalised, real, unit

__all__ = ["EDM", "equiangular"]


def equiangular(gramian: Array, alive: Array) -> tuple[Array, Array]:
    """EDM coefficients ``[B, T]`` (sum 1), and whether each block is exact. Living zero rows take all the weight."""
    xp = namespace(gramian)
    zero = alive & (diagonal(gramian) <= 0)
    norms, cosine = unit(gramian)
    if gramian.shape[-1] == 2:
        weights = normalised(flip(norms), alive)
        exact = weights[:, 0] >= 0
    else:
        solution = cone(cosine, 2 * real(alive) - 1)
        shortest = least(xp.where(alive, norms, math.inf))[:, None]
        inverse = xp.where(alive, xp.where(alive, shortest, 1.0) / norms, 0.0)
        weights, exact = normalised(solution.y * inverse, alive), solution.exact
    return xp.where(any_of(zero)[:, None], normalised(real(zero), zero), weights), exact


class EDM(GramianMethod):
    """EDM: the direction with equal angles to the task gradients.

    The shortest vector ``v = sum_i a_i u_i`` in the hull of the *unit* gradients, as long as the weighted harmonic
    mean of their norms: ``d = v / sum_i (a_i / n_i)`` (Katrutsa et al. 2020). For two tasks
    ``d = (n2 g1 + n1 g2) / (n1 + n2)``. It never conflicts with a task, and rescaling one loss changes its length
    but not its direction. Zero where 0 is in the hull of the unit gradients. Solved exactly; tasks whose gradients
    point the same way share their weight equally (the length depends on it). ::

        a = argmin_{a >= 0, sum a = 1} || sum_i a_i u_i ||,   u_i = g_i / n_i
        d = (sum_i a_i u_i) / sum_i (a_i / n_i)

    Task-specific parameters follow their own loss.

    Args:
        zero_rows: ``"drop"`` or ``"keep"`` tasks with a zero gradient (kept: the update is zero).
        heads: gradient of task-specific parameters, ``"own"`` (default) or ``"weighted"``.

    Limits:
        The shortest gradient sets the length: beside a gradient of 0.001 a unit gradient gives an update of 0.0014, so
        that one task that has arrived slows down all others. It also steers as much as any other when only noise is
        left of it. The update vanishes as gradients become opposite: 0.009 long for two unit gradients at 179 degrees.

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
    row_scale = ("direction",)

    def rule(self, gramian: Array, context: Context) -> Array:
        return self.solved(equiangular(gramian, context.alive), context)
