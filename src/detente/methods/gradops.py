"""Gradient deconfliction via orthogonal projections onto subspaces."""

from __future__ import annotations

from detente.method import Context, GramianMethod, Paper
from detente.solvers import EPS, Array, diagonal, identity, most, namespace, real, unit

__all__ = ["GradOPS"]


class GradOPS(GramianMethod):
    """GradOPS: a gradient that conflicts with any other loses everything inside the span of the others.

    Zhu et al. (2025), without the trade-off parameter. ::

        for each task i:
            p_i = g_i - its projection on span{g_j, j != i}    if g_i . g_j < 0 for some j
            p_i = g_i                                            else
        d = sum_i p_i

    Strongly non-conflicting: no order, no task is hurt. Without conflicts the update is the sum of the gradients.

    Task-specific parameters follow their own loss.

    Args:
        zero_rows: ``"drop"`` or ``"keep"`` tasks with a zero gradient; they have no influence either way.
        heads: gradient of task-specific parameters, ``"own"`` (default) or ``"weighted"``.

    Limits:
        Where gradients are dependent, as with more tasks than parameters, nothing is left of the conflicting ones. One
        conflict, however weak, costs all that lies in the span of the others, so that the update jumps: turning one of
        three gradients by 0.000002 radians shortened it from 2.2 to 1.0.

    Example:
        >>> import torch, detente
        >>> J = torch.tensor([[1.0, 0.0], [-1.0, 1.0]])
        >>> d = detente.aggregate(J, detente.GradOPS())
        >>> [round(float(v), 6) for v in d]
        [0.5, 1.5]
    """

    name = "gradops"
    paper = Paper(
        "zhu2025gradient",
        "Gradient Deconfliction via Orthogonal Projections onto Subspaces For Multi-task Learning",
        "Zhu, Shijie and Zhao, Hui and Wu, Tianshu and Wang, Pengjie and Deng, Hongbo and Xu, Jian and Zheng, Bo",
        "ACM International Conference on Web Search and Data Mining",
        2025,
        "2503.03438",
    )
    nonconflicting = True
    row_scale = ("linear",)

    def rule(self, gramian: Array, context: Context) -> Array:
        xp = namespace(gramian)
        count = gramian.shape[-1]
        norms, cosine = unit(gramian)
        values, vectors = xp.linalg.eigh(cosine)
        kept = values > 8 * EPS * count * most(values)[:, None]
        pairs = xp.where(kept, 1 / xp.where(kept, values, 1.0), 0.0)
        inverse = (vectors * pairs[:, None, :]) @ xp.swapaxes(vectors, -1, -2)
        # what is left of u_i outside the span of the others: the i-th row of the inverse, scaled to 1 at i
        own = diagonal(inverse)
        left = inverse / xp.where(own > 0, own, 1.0)[:, :, None]
        # a task with a share in the null space lies in the span of the others itself
        loose = (xp.where(kept, 0.0, 1.0)[:, None, :] * vectors**2).sum(-1) > 1e-10
        left = xp.where(loose[:, :, None], 0.0, left)
        conflicting = (cosine < -8 * EPS).any(-1)
        rows = xp.where(conflicting[:, :, None], left, real(identity(cosine)))
        rows = rows * (context.alive & (diagonal(gramian) > 0))[:, :, None]
        return (norms[:, None, :] @ rows)[:, 0] / norms
