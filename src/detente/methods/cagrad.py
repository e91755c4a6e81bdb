"""Conflict-averse gradient descent."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from detente.method import Context, GramianMethod, Paper, TaskWeights, Weights, at_least, normalized
from detente.solvers import Array, ball

__all__ = ["CAGrad"]


class CAGrad(GramianMethod):
    """CAGrad: the best improvement of the worst-off task within a ball around the mean gradient.

    Maximises ``min_i g_i . d`` subject to ``||d - g0|| <= c ||g0||`` (Liu et al. 2021, Eq. 3), with ``g0`` the mean
    gradient. ``d = g0 + (c ||g0|| / ||g_w||) g_w`` where ``w`` minimises ``g_w . g0 + c ||g0|| ||g_w||`` over the
    simplex. ``c = 0`` is gradient descent on the mean loss; for large ``c`` the direction tends to MGDA's. For
    ``c < 1`` it converges to stationary points of the mean loss.

    Solved exactly for any number of tasks (closed form for two), whatever the gradients' scales. Where some tasks
    are mutually Pareto-stationary (``g_w = 0``) the maximiser is not unique; the one closest to ``g0`` is taken, the
    projection of ``g0`` on the vectors that conflict with no task.

    For many tasks, ``source=detente.Sampled(n)`` is the paper's CAGrad-Fast (Eq. 4): n sampled tasks and the mean of
    the rest take part in the inner problem, which costs n + 1 backward passes.

    Task-specific parameters follow their own loss.

    Args:
        c: radius of the ball in units of ``||g0||``, at least 0. The paper uses 0.2 to 0.9.
        rescale: None (the paper), 1 to divide the update by ``1 + c**2``, 2 by ``1 + c`` (modes of the authors'
            code, which also multiplies by T). The ball constraint holds for None only.
        preference: weights of the tasks in ``g0``: None for the mean, a vector or mapping that sums to 1, or a
            loss weighting such as :class:`DWA`.
        zero_rows: ``"drop"`` (default) leaves tasks with a zero gradient out, also of the mean; ``"keep"`` counts
            them in the mean and lets them cap the level ``min_i g_i . d`` at 0.
        heads: gradient of task-specific parameters, ``"own"`` (default) or ``"weighted"``.

    Raises:
        ValueError: ``c`` is negative; ``preference`` does not sum to 1.

    Example:
        >>> import torch, detente
        >>> J = torch.tensor([[-4.0, 1.0], [6.0, 1.0]])
        >>> d = detente.aggregate(J, detente.CAGrad(c=0.5))
        >>> bool((J @ d).min() > (J @ J.mean(0)).min())  # better for the worst-off task than the mean gradient
        True
    """

    name = "cagrad"
    paper = Paper(
        "liu2021cagrad",
        "Conflict-Averse Gradient Descent for Multi-task Learning",
        "Liu, Bo and Liu, Xingchao and Jin, Xiaojie and Stone, Peter and Liu, Qiang",
        "Advances in Neural Information Processing Systems",
        2021,
        "2110.14048",
    )

    def __init__(
        self,
        c: float = 0.5,
        rescale: Literal[1, 2] | None = None,
        preference: Weights = None,
        *,
        zero_rows: Literal["drop", "keep"] = "drop",
        heads: Literal["own", "weighted"] | None = None,
    ) -> None:
        super().__init__(zero_rows=zero_rows, heads=heads)
        self.c = at_least("c", c, 0)
        if rescale not in (None, 1, 2):
            raise ValueError(f"rescale must be None, 1 or 2; got {rescale!r}.")
        self.rescale = rescale
        self.preference = TaskWeights("preference", preference)
        self.needs = self.needs | self.preference.needs

    def check(self, context: Context) -> None:
        if context.shares is None:
            self.preference.check(context)

    def sampling_shares(self, context: Context) -> Tensor:
        self.preference.check(context)
        shares: Tensor = self.preference(context)
        return shares

    def prepare(self, context: Context) -> Context:
        return context if context.shares is not None else replace(context, shares=self.preference(context))

    def rule(self, gramian: Tensor, context: Context) -> Tensor:
        assert context.shares is not None
        centre = normalized(context.shares).numpy()
        if gramian.shape[-1] == 2 and bool((gramian.diagonal(dim1=-2, dim2=-1) > 0).all()):
            result = torch.from_numpy(_two_tasks(gramian.numpy(), centre, self.c))
        else:
            result = self.per_block(lambda block: ball(block, centre, self.c), gramian, context)
        divisor = {None: 1.0, 1: 1 + self.c**2, 2: 1 + self.c}[self.rescale]
        return result / divisor


def _two_tasks(gramian: Array, centre: Array, c: float) -> Array:
    """Closed form for Gramians ``[B, 2, 2]`` without zero rows: one gradient pulls alone, or both do.

    In units of the gradients' norms: ``y`` is the pull along each unit gradient, ``u . g0`` how far the centre goes
    along it, ``r`` the radius. Pulling along i alone reaches the level ``v_i = n_i (u_i . g0 + r)``; it is optimal
    when the other task is at least as well off. Otherwise both sit at one level v, the root of a quadratic.
    """
    product = gramian @ centre
    r = c * np.sqrt(np.maximum(product @ centre, 0))[:, None]
    n = np.sqrt(np.diagonal(gramian, axis1=1, axis2=2))
    cos = np.clip(gramian[:, 0, 1] / n[:, 0] / n[:, 1], -1, 1)[:, None]
    along = product / n
    level = n * (along + r)
    other = (n * (along + cos * r))[:, ::-1]
    alone = other >= level
    # one alone: the row with the lower level (the first on a tie)
    first = alone[:, :1] & (~alone[:, 1:] | (level[:, :1] <= level[:, 1:]))
    single = np.where(first, [[r_, 0.0] for r_ in r[:, 0]], [[0.0, r_] for r_ in r[:, 0]])

    det = np.maximum(1 - cos**2, np.finfo(float).tiny)
    scale = n.min(1, keepdims=True)  # level in units of the smaller norm, so that no power overflows
    inverse = scale / n

    def solve(rhs: Array) -> Array:
        return np.asarray((rhs - cos * rhs[:, ::-1]) / det)

    with np.errstate(all="ignore"):  # parallel gradients never need both
        a, g = solve(inverse), solve(along)
        slope = (inverse * a).sum(1, keepdims=True)
        base = (inverse * g).sum(1, keepdims=True) / slope
        rest = ((along - base * inverse) * (g - base * a)).sum(1, keepdims=True)
        root = base + np.sqrt(np.maximum(r**2 - rest, 0) / slope)
        both = np.maximum(root * a - g, 0)
    # opposite gradients: nothing beyond level 0, where d is the projection of the centre on their complement
    opposite = (1 + cos <= 4 * math.ulp(1.0)) & ~alone.any(1, keepdims=True)
    both = np.where(opposite, np.maximum(-along, 0), both)
    y = np.where(alone.any(1, keepdims=True), single, both)
    return np.asarray(centre + y / n)
