"""Unconflicting projection of gradients."""

from __future__ import annotations

from typing import Literal

from detente.method import Centred, Context, Paper
from detente.solvers import Array, identity, namespace, projected, real

__all__ = ["PAPER", "UPGrad"]

PAPER = Paper(
    "quinton2024jacobian",
    "Jacobian Descent for Multi-Objective Optimization",
    "Quinton, Pierre and Rey, Valerian",
    "arXiv:2406.16232",
    2024,
    "2406.16232",
    "misc",
)


class UPGrad(Centred):
    """UPGrad: every gradient is projected on the vectors that conflict with no task, then all are averaged.

    Quinton and Rey (2024). ::

        K   = {d : g_j . d >= 0 for all j}
        d   = sum_i p_i proj_K(g_i)             p = 1/T, or the preference
        proj_K(g_i) = J'v,   v = argmin v'Gv  subject to  v >= e_i

    Never conflicts with a task; without conflicts it is the mean gradient. Linear under rescaling of single losses.
    Solved exactly, whatever the gradients' scales.

    Task-specific parameters follow their own loss.

    Args:
        preference: weights of the tasks in the sum: None for the mean, a vector or mapping that sums to 1, or a loss
            weighting such as :class:`DWA`.
        zero_rows: ``"drop"`` leaves tasks with a zero gradient out of the mean, ``"keep"`` counts them.
        heads: gradient of task-specific parameters, ``"own"`` (default) or ``"weighted"``.

    Raises:
        ValueError: ``preference`` does not sum to 1.

    Limits:
        Long gradients still decide: of (100, 0) and (-0.5, 0.8) the second task gains next to nothing (cosine 0.008),
        so the units of the losses matter. The update vanishes near Pareto-stationary points: 0.017 long for two unit
        gradients at 179 degrees.

    Example:
        >>> import torch, detente
        >>> J = torch.tensor([[1.0, 0.0], [-1.0, 1.0]])
        >>> d = detente.aggregate(J, detente.UPGrad())
        >>> d.tolist(), bool((J @ d >= 0).all())
        ([0.25, 0.75], True)
    """

    name = "upgrad"
    paper = PAPER
    nonconflicting = True
    row_scale: tuple[Literal["linear"], ...] = ("linear",)

    def rule(self, gramian: Array, context: Context) -> Array:
        shares = self.centre(gramian, context)
        return self.combine(gramian, shares, context)

    def combine(self, gramian: Array, shares: Array, context: Context) -> Array:
        """The projections of all gradients, averaged."""
        xp = namespace(gramian)
        each = xp.broadcast_to(real(identity(gramian)), gramian.shape)
        every = self.solved(projected(gramian, each, context.alive), context)
        return (shares[:, None, :] @ every)[:, 0]
