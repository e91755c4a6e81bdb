"""Multi-task learning as a bargaining game."""

from __future__ import annotations

from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from detente.method import Choice, Context, GramianMethod, Ranges, at_least
from detente.methods.si import SI
from detente.solvers import Array, bargain, floor, namespace, times, unit

__all__ = ["NashMTL"]


class NashMTL(GramianMethod):
    """Nash-MTL: the Nash bargaining solution between the tasks' gradients.

    Each task's utility is ``g_i . d``; the solution maximises the product of the utilities in a ball (Navon et al.
    2022). ::

        a > 0 with  G a = 1 / a  (elementwise)            every task gains a_i g_i . d = 1
        d = sum_i a_i g_i,   ||d|| = sqrt(T)
        max_norm:  d <- d min(1, max_norm / ||d||)

    Solved exactly, by Newton's method on the convex function ``0.5 a'Ga - sum_i log a_i``. Rescaling a loss changes
    nothing at all: the length of the update is sqrt(T) whatever the gradients, so the learning rate alone decides how
    far a step goes. Gradients that can only cancel each other (Pareto-stationary ones) have no solution; they are left
    out, and where that is all of them the update is zero.

    Task-specific parameters follow the weighted loss, as in the authors' code.

    Args:
        update_every: solve in every k-th step only and reuse the coefficients in between (the paper's 1 for supervised
            learning, 50 and 100 for reinforcement learning). The backward passes of all tasks are taken in every step.
        max_norm: length to which the update is cut; the authors' code uses 1, None leaves sqrt(T).
        zero_rows: ``"drop"`` or ``"keep"`` tasks with a zero gradient; they have no influence either way.
        heads: gradient of task-specific parameters, ``"weighted"`` (default) or ``"own"``.

    Raises:
        ValueError: an option is out of range.

    Limits:
        The length does not shrink near a solution, so that a constant learning rate circles around it: decay it.
        Coefficients explode as gradients become opposite (81 at 179 degrees, 8100 at 179.99) and are 0 at 180. With
        ``update_every`` above 1, old coefficients meet new gradients: 10 times as long, they make the update 10 times
        as long.

    Example:
        >>> import torch, detente
        >>> J = torch.tensor([[100.0, 0.0], [0.0, 0.01]])
        >>> [round(float(v), 9) for v in detente.aggregate(J, detente.NashMTL())]
        [1.0, 1.0]
    """

    name = "nash_mtl"
    ranges: ClassVar[Ranges] = {"update_every": Choice((1, 5, 20))}
    paper = SI.paper
    heads = "weighted"
    homogeneity = 0.0
    row_scale = ("invariant",)
    nonconflicting = True
    memory = "T x B weights (update_every > 1)"

    def __init__(
        self,
        update_every: int = 1,
        max_norm: float | None = None,
        *,
        zero_rows: Literal["drop", "keep"] = "drop",
        heads: Literal["own", "weighted"] | None = None,
    ) -> None:
        super().__init__(zero_rows=zero_rows, heads=heads)
        self.update_every = int(at_least("update_every", update_every, 1))
        self.state = ("kept", "age") if update_every > 1 else ()
        self.max_norm = None if max_norm is None else at_least("max_norm", max_norm, 0, strict=True)
        self.start()

    def start(self) -> None:
        super().start()
        self.kept: dict[str, Tensor] = {}
        self.age = 0

    def rule(self, gramian: Array, context: Context) -> Array:
        xp = namespace(gramian)
        if self.update_every == 1:
            weights = self._solve(gramian, context)
        else:
            usable = all(t in self.kept and len(self.kept[t]) == len(gramian) for t in context.tasks)
            if self.age % self.update_every == 0 or not usable:
                weights = self._solve(gramian, context)
                self.kept = {t: torch.from_numpy(weights[:, i].copy()) for i, t in enumerate(context.tasks)}
                self.age = 0
            self.age += 1
            weights = np.stack([self.kept[t].numpy() for t in context.tasks], -1)
        if self.max_norm is not None:
            length = xp.sqrt(floor((weights * times(gramian, weights)).sum(-1), 0.0))[:, None]
            cut = self.max_norm / xp.where(length > 0, length, 1.0)
            weights = weights * xp.where(length > self.max_norm, cut, 1.0)
        return weights

    def _solve(self, gramian: Array, context: Context) -> Array:
        norms, cosine = unit(gramian)
        rate = namespace(gramian).ones_like(norms)
        return self.solved(bargain(cosine, rate, 1.0, context.alive), context) / norms
