"""Conflict-averse gradient descent."""

from __future__ import annotations

from typing import ClassVar, Literal

from torch import Tensor

from detente.method import Centred, Context, Paper, Range, Ranges, Weights, at_least
from detente.solvers import Array, ball, floor, namespace, times

__all__ = ["CAGrad"]


class CAGrad(Centred):
    """CAGrad: the best improvement of the worst-off task within a ball around the mean gradient.

    Maximises ``min_i g_i . d`` subject to ``||d - g0|| <= c ||g0||`` (Liu et al. 2021, Eq. 3), with ``g0`` the mean
    gradient. ``d = g0 + (c ||g0|| / ||g_w||) g_w`` where ``w`` minimises ``g_w . g0 + c ||g0|| ||g_w||`` over the
    simplex. ``c = 0`` is gradient descent on the mean loss; for large ``c`` the direction tends to MGDA's. For
    ``c < 1`` it converges to stationary points of the mean loss. ::

        g0 = sum_i p_i g_i                                p = 1/T, or the preference
        w  = argmin over the simplex of  g_w . g0 + c ||g0|| ||g_w||
        d  = g0 + c ||g0|| / ||g_w|| g_w

    Solved exactly for any number of tasks, whatever the gradients' scales. Where some tasks
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

    Limits:
        The mean gradient sets the scale, so the units of the losses matter: with one gradient 100 times as long as the
        other and ``c = 0.5`` the update went against the short one. Two gradients of equal length give ``(1 + c) g0``,
        gradient descent with a longer step. Below ``c = 1`` the update may conflict (13% of random triples in five
        dimensions at 0.2, 3% at 0.5); from 1 on any Pareto-stationary point may stop it.

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
    ranges: ClassVar[Ranges] = {"c": Range(0.1, 0.9)}

    def __init__(
        self,
        c: float = 0.5,
        rescale: Literal[1, 2] | None = None,
        preference: Weights = None,
        *,
        zero_rows: Literal["drop", "keep"] = "drop",
        heads: Literal["own", "weighted"] | None = None,
    ) -> None:
        super().__init__(preference, zero_rows=zero_rows, heads=heads)
        self.c = at_least("c", c, 0)
        if rescale not in (None, 1, 2):
            raise ValueError(f"rescale must be None, 1 or 2; got {rescale!r}.")
        self.rescale = rescale

    def sampling_shares(self, context: Context) -> Tensor:
        self.preference.check(context)
        shares: Tensor = self.preference(context)
        return shares

    def rule(self, gramian: Array, context: Context) -> Array:
        xp = namespace(gramian)
        centre = self.centre(gramian, context)
        product = times(gramian, centre)
        radius = self.c * xp.sqrt(floor((centre * product).sum(-1), 0.0))
        step = self.solved(ball(gramian, product, radius, context.alive), context)
        return (centre + step) / {None: 1.0, 1: 1 + self.c**2, 2: 1 + self.c}[self.rescale]
