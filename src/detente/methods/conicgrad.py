"""Conic multi-task optimization."""

from __future__ import annotations

import math
from typing import ClassVar, Literal

from detente.method import Centred, Context, Paper, Range, Ranges, Weights, at_least
from detente.solvers import EPS, Array, ball, floor, identity, min_norm, namespace, real, times

__all__ = ["ConicGrad"]


class ConicGrad(Centred):
    """ConicGrad: the best improvement of the worst-off task within a cone around the mean gradient.

    Hassanpour et al. (2025): like :class:`CAGrad`, but an angle bounds the update instead of a ball. ::

        g0 = sum_i p_i g_i                        p = 1/T, or the preference
        d  = argmax over unit vectors of min_i g_i . d   subject to   g0 . d >= c ||g0||
        d <- ||g0|| d

    **A reconstruction**: the problem is the paper's; its closed formula was not available, so the problem is solved
    exactly instead: the direction of :class:`MGDA` where it lies in the cone, else on the cone's surface a ball problem
    in the complement of ``g0``. ``c = 1`` is the mean gradient; for ``c -> 0`` the direction tends to MGDA's.

    Task-specific parameters follow their own loss.

    Args:
        c: cosine of the cone's half-angle, in [0, 1].
        preference: weights of the tasks in ``g0``: None for the mean, a vector or mapping that sums to 1, or a loss
            weighting such as :class:`DWA`.
        zero_rows: ``"drop"`` leaves tasks with a zero gradient out of the mean, ``"keep"`` counts them there.
        heads: gradient of task-specific parameters, ``"own"`` (default) or ``"weighted"``.

    Raises:
        ValueError: ``c`` is out of range; ``preference`` does not sum to 1.

    Limits:
        The cone stands around the mean gradient and the update has its length, so the units of the losses matter: the
        longest gradient places the cone, and a short one that gets its way does so with a step as long as the mean. For
        ``c`` near 1 it conflicts as the mean does (7% of random triples at 0.95, none of 300 at 0.5). Opposite
        gradients of unequal length do not stop it: it follows the longer one, and the other task gets worse.

    Example:
        >>> import torch, detente
        >>> J = torch.tensor([[-4.0, 1.0], [6.0, 1.0]])
        >>> d, g0 = detente.aggregate(J, detente.ConicGrad(c=0.5)), J.mean(0)
        >>> bool((J @ d).min() > (J @ g0).min()), round(float(d @ g0 / d.norm() / g0.norm()), 3)
        (True, 0.707)
    """

    name = "conicgrad"
    paper = Paper(
        "hassanpour2025conicgrad",
        "Gradient-Based Multi-Objective Deep Learning: Conic Multi-Task Optimization (ConicGrad)",
        "Hassanpour, Negar and Janjua, Muhammad Kamran and Zhang, Kunlin and Lavasani, Sepehr and Zhang, Xiaowen "
        "and Zhou, Chunhua and Gao, Chao",
        "arXiv:2502.00217",
        2025,
        "2502.00217",
        "misc",
    )
    ranges: ClassVar[Ranges] = {"c": Range(0.1, 0.95)}

    def __init__(
        self,
        c: float = 0.5,
        preference: Weights = None,
        *,
        zero_rows: Literal["drop", "keep"] = "drop",
        heads: Literal["own", "weighted"] | None = None,
    ) -> None:
        super().__init__(preference, zero_rows=zero_rows, heads=heads)
        self.c = at_least("c", c, 0)
        if c > 1:
            raise ValueError(f"c is the cosine of an angle, in [0, 1]; got {c!r}.")

    def rule(self, gramian: Array, context: Context) -> Array:
        xp = namespace(gramian)
        alive = context.alive & (xp.diagonal(gramian, 0, -2, -1) > 0)
        centre = self.centre(gramian, context)
        product = times(gramian, centre)
        square = (centre * product).sum(-1)[:, None]
        some = square > 0
        length = xp.sqrt(xp.where(some, square, 1.0))

        shortest = self.solved(min_norm(gramian, alive), context)
        reach = xp.sqrt(floor((shortest * times(gramian, shortest)).sum(-1), 0.0))[:, None]
        along = (shortest * product).sum(-1)[:, None]
        sizes = xp.sqrt(floor(xp.diagonal(gramian, 0, -2, -1), 0.0))
        noise = 64 * EPS * xp.abs(shortest * product).sum(-1)[:, None]  # where the terms of `along` cancel
        # a hull that reaches 0 has no direction
        inside = (along >= self.c * reach * length - noise) & (reach > 1e-7 * (shortest * sizes).sum(-1)[:, None])
        direct = shortest * (length / xp.where(reach > 0, reach, 1.0))

        # each gradient without its component along the centre, from coefficients: small rows keep their digits
        off = (
            real(identity(gramian)) - product[:, :, None] * centre[:, None, :] / xp.where(some, square, 1.0)[:, :, None]
        )
        across = off @ gramian @ xp.swapaxes(off, -1, -2)
        width = math.sqrt(1 - self.c**2)
        x = self.solved(ball(across, self.c * product / length, xp.full_like(length[:, 0], width), alive), context)
        edge = (self.c / length) * centre + (x[:, None, :] @ off)[:, 0]
        size = xp.sqrt(floor((edge * times(gramian, edge)).sum(-1), 0.0))[:, None]
        edge = edge * (length / xp.where(size > 0, size, 1.0))
        return xp.where(some, xp.where(inside, direct, edge), 0.0)
