"""Fair resource allocation in multi-task learning."""

from __future__ import annotations

from typing import ClassVar, Literal

from detente.method import Context, GramianMethod, Paper, Range, Ranges, at_least
from detente.solvers import Array, bargain, unit

__all__ = ["FairGrad"]


class FairGrad(GramianMethod):
    """FairGrad: the update that maximises the alpha-fair utility of the tasks' gains.

    Ban and Ji (2024). ``alpha = 1`` is :class:`NashMTL`, ``alpha -> 0`` tends to the sum of the gradients,
    ``alpha -> infinity`` to max-min fairness. ::

        w > 0 with  G w = w**(-1 / alpha)  (elementwise)
        d = sum_i w_i g_i

    Solved exactly, by Newton's method on a convex function. The authors' code multiplies by T and cuts the shared
    gradient to norm 1; clip as you would with any gradient. Scaling all gradients by s scales the update by
    ``s**((1 - alpha) / (1 + alpha))``.

    Task-specific parameters follow their own loss.

    Args:
        alpha: fairness, positive. 2 in all runs of the authors.
        zero_rows: ``"drop"`` or ``"keep"`` tasks with a zero gradient; they have no influence either way.
        heads: gradient of task-specific parameters, ``"own"`` (default) or ``"weighted"``.

    Raises:
        ValueError: ``alpha`` is not positive.

    Limits:
        Unless ``alpha`` is 1 or less, the update gets longer as the gradients get shorter: 10 times for gradients 1000
        times smaller with the default. It does not come to rest at a constant learning rate: decay it. Nearly opposite
        gradients give long updates too (6.1 for two unit gradients at 179 degrees, 28 at 179.99), and exactly opposite
        ones none.

    Example:
        >>> import torch, detente
        >>> J = torch.tensor([[4.0, 0.0], [0.0, 1.0]])
        >>> w = detente.FairGrad(alpha=2.0).weights(J @ J.T)
        >>> bool(torch.allclose(J.double() @ J.double().T @ w, w ** -0.5))
        True
    """

    name = "fairgrad"
    paper = Paper(
        "ban2024fair",
        "Fair Resource Allocation in Multi-Task Learning",
        "Ban, Hao and Ji, Kaiyi",
        "International Conference on Machine Learning",
        2024,
        "2402.15638",
    )
    ranges: ClassVar[Ranges] = {"alpha": Range(0.5, 5.0, log=True)}
    nonconflicting = True
    homogeneity = -1 / 3

    def __init__(
        self,
        alpha: float = 2.0,
        *,
        zero_rows: Literal["drop", "keep"] = "drop",
        heads: Literal["own", "weighted"] | None = None,
    ) -> None:
        super().__init__(zero_rows=zero_rows, heads=heads)
        self.alpha = at_least("alpha", alpha, 0, strict=True)
        self.homogeneity = (1 - alpha) / (1 + alpha)

    def rule(self, gramian: Array, context: Context) -> Array:
        norms, cosine = unit(gramian)
        # with y = w n the equation is C y = n**(1/alpha - 1) y**(-1/alpha)
        y = self.solved(bargain(cosine, norms ** (1 / self.alpha - 1), 1 / self.alpha, context.alive), context)
        return y / norms
