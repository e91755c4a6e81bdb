"""Projection of the mean gradient on the dual cone."""

from __future__ import annotations

from detente.method import Context, Paper
from detente.methods.upgrad import UPGrad
from detente.solvers import Array, projected

__all__ = ["DualProj"]


class DualProj(UPGrad):
    """DualProj: the mean gradient, projected on the vectors that conflict with no task.

    The direction of gradient episodic memory (Lopez-Paz and Ranzato 2017), in the form of Quinton and Rey (2024). ::

        d = argmin || d - g0 ||  subject to  g_i . d >= 0 for all i,     g0 = sum_i p_i g_i
          = J'v,   v = argmin v'Gv  subject to  v >= p                    p = 1/T, or the preference

    Without conflicts it is the mean gradient. Solved exactly, whatever the gradients' scales.

    Task-specific parameters follow their own loss.

    Args:
        preference: weights of the tasks in ``g0``: None for the mean, a vector or mapping that sums to 1, or a loss
            weighting such as :class:`DWA`.
        zero_rows: ``"drop"`` leaves tasks with a zero gradient out of the mean, ``"keep"`` counts them.
        heads: gradient of task-specific parameters, ``"own"`` (default) or ``"weighted"``.

    Raises:
        ValueError: ``preference`` does not sum to 1.

    Limits:
        A task that conflicts with the mean gets a product of exactly 0: to first order it stands still while the others
        progress. As the mean follows the longest gradient, this falls to the tasks with small losses or units. Near
        Pareto-stationary points the update vanishes: 0.009 long for two unit gradients at 179 degrees.

    Example:
        >>> import torch, detente
        >>> J = torch.tensor([[3.0, 0.0], [-1.0, 1.0]])
        >>> [round(float(v), 6) for v in detente.aggregate(J, detente.DualProj())]
        [0.75, 0.75]
    """

    name = "dualproj"
    paper = Paper(
        "lopezpaz2017gradient",
        "Gradient Episodic Memory for Continual Learning",
        "Lopez-Paz, David and Ranzato, Marc'Aurelio",
        "Advances in Neural Information Processing Systems",
        2017,
        "1706.08840",
    )
    row_scale = ()

    def combine(self, gramian: Array, shares: Array, context: Context) -> Array:
        """The projection of the average."""
        return self.solved(projected(gramian, shares[:, None, :], context.alive), context)[:, 0]
