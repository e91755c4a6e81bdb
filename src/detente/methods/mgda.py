"""Multiple gradient descent algorithm."""

from __future__ import annotations

from torch import Tensor

from detente.method import Context, GramianMethod, Paper
from detente.solvers import min_norm

__all__ = ["MGDA"]


class MGDA(GramianMethod):
    """MGDA: the shortest vector in the convex hull of the task gradients.

    ``d = J'a`` with ``a = argmin over the simplex of ||J'a||`` (Sener and Koltun 2018, Eq. 3). It never conflicts
    with a task and is zero exactly at Pareto-stationary points. CAGrad tends to its direction for large ``c``.
    A task with a small gradient takes most of the weight. With ``zero_rows="keep"`` a task with a zero gradient
    takes all of it and the update is zero, as in the textbook. Solved exactly.

    Task-specific parameters follow the weighted loss, as in the authors' code.

    Args:
        zero_rows: ``"drop"`` or ``"keep"`` tasks with a zero gradient.
        heads: gradient of task-specific parameters, ``"weighted"`` (default) or ``"own"``.

    Example:
        >>> import torch, detente
        >>> J = torch.tensor([[2.0, 0.0], [0.0, 2.0]])
        >>> detente.aggregate(J, detente.MGDA()).tolist()
        [1.0, 1.0]
    """

    name = "mgda"
    paper = Paper(
        "sener2018multi",
        "Multi-Task Learning as Multi-Objective Optimization",
        "Sener, Ozan and Koltun, Vladlen",
        "Advances in Neural Information Processing Systems",
        2018,
        "1810.04650",
    )
    heads = "weighted"
    nonconflicting = True

    def rule(self, gramian: Tensor, context: Context) -> Tensor:
        return self.per_block(min_norm, gramian, context)
