"""Multiple gradient descent algorithm."""

from __future__ import annotations

from typing import ClassVar, Literal

from detente.method import Choice, Context, GramianMethod, Paper, Ranges, need_losses, one_of
from detente.solvers import Array, diagonal, like, min_norm, namespace

__all__ = ["MGDA"]


class MGDA(GramianMethod):
    """MGDA: the shortest vector in the convex hull of the task gradients.

    ``d = J'a`` with ``a = argmin over the simplex of ||J'a||`` (Sener and Koltun 2018, Eq. 3). It never conflicts
    with a task and is zero exactly at Pareto-stationary points. CAGrad tends to its direction for large ``c``.
    With ``zero_rows="keep"`` a task with a zero gradient takes all of the weight and the update is zero, as in the
    textbook. Solved exactly. ::

        c_i = 1, n_i, L_i or L_i n_i                      normalise = "none", "l2", "loss", "loss+"
        a   = argmin_{a >= 0, sum a = 1} || sum_i a_i g_i / c_i ||
        d   = sum_i a_i g_i

    With a normaliser the weights are computed from normalised gradients and applied to the raw ones, as in the
    authors' code; the update is then not the shortest vector of the raw hull and may conflict.

    ``source="features"`` is the authors' MGDA-UB: gradients of the shared representation, one pass through the trunk.

    Task-specific parameters follow the weighted loss, as in the authors' code.

    Args:
        normalise: ``"none"``, ``"l2"``, ``"loss"`` or ``"loss+"``.
        zero_rows: ``"drop"`` or ``"keep"`` tasks with a zero gradient.
        heads: gradient of task-specific parameters, ``"weighted"`` (default) or ``"own"``.

    Raises:
        ValueError: an option is unknown; a loss is not positive where losses normalise.

    Limits:
        It follows the task with the smallest gradient: of the gradients (1, 0) and (0, 0.001) the second has 99.9999%
        of the weight, and the update is 0.001 long. So a task that has arrived, or a loss in a small unit, sets
        direction and length for all. It stops at the first Pareto-stationary point it meets: on the toy from four of
        five starts elsewhere than at the best mean.

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
    ranges: ClassVar[Ranges] = {"normalise": Choice(("none", "l2", "loss", "loss+"))}
    heads = "weighted"
    nonconflicting = True

    def __init__(
        self,
        normalise: Literal["none", "l2", "loss", "loss+"] = "none",
        *,
        zero_rows: Literal["drop", "keep"] = "drop",
        heads: Literal["own", "weighted"] | None = None,
    ) -> None:
        super().__init__(zero_rows=zero_rows, heads=heads)
        self.normalise = one_of("normalise", normalise, ("none", "l2", "loss", "loss+"))
        if self.normalise.startswith("loss"):
            self.needs = self.needs | {"losses"}

    def check(self, context: Context) -> None:
        need_losses(self, context)
        if "losses" in self.needs:
            assert context.losses is not None
            for task, loss in zip(context.tasks, context.losses.tolist(), strict=True):
                if loss <= 0:
                    raise ValueError(
                        f"mgda(normalise={self.normalise!r}) divides by the losses; losses[{task!r}] is {loss:g}. "
                        "Add a constant to this loss, or use normalise='l2'."
                    )

    def rule(self, gramian: Array, context: Context) -> Array:
        xp = namespace(gramian)
        scale = xp.ones_like(diagonal(gramian))
        if self.normalise in ("l2", "loss+"):
            square = diagonal(gramian)
            scale = xp.sqrt(xp.where(square > 0, square, 1.0))
        if self.normalise.startswith("loss"):
            scale = scale * like(gramian, context.losses)
        return self.solved(min_norm(gramian / scale[:, :, None] / scale[:, None, :], context.alive), context)
