"""Impartial multi-task learning: gradient balance."""

from __future__ import annotations

from detente.method import Context, GramianMethod
from detente.methods.imtl_l import PAPER
from detente.solvers import Array, equal_products, least, most, namespace, total, unit

__all__ = ["IMTLG"]


class IMTLG(GramianMethod):
    """IMTL-G: the affine combination of the gradients with equal projections on all of them.

    Liu et al. (2021), closed form. ::

        x   = pinv(C) 1                       C the cosines, u_i = g_i / n_i: all u_i . d are equal
        a_i = (x_i / n_i) / sum_k (x_k / n_k)
        d   = sum_i a_i g_i                   sum a = 1

    Rescaling one loss does not change the direction, up to its sign. Where the denominator is 0 up to rounding (as for
    opposite gradients) the update is zero. The paper uses gradients of the shared representation:
    ``source="features"``. :class:`IMTL` adds the balance of losses.

    Task-specific parameters follow their own loss.

    Args:
        zero_rows: ``"drop"`` or ``"keep"`` tasks with a zero gradient (kept: they do not change the others).
        heads: gradient of task-specific parameters, ``"own"`` (default) or ``"weighted"``.

    Limits:
        Coefficients may be negative, and grow without bound where the denominator tends to 0 (39 in the worst of 500
        random triples). The common projection may be negative, and then the update goes against *all* tasks: so it did
        for 1% of random triples, while two tasks are safe. The shortest gradient sets the length: 0.0014 for norms 1
        and 0.001.

    Example:
        >>> import torch, detente
        >>> J = torch.tensor([[1.0, 0.0], [0.0, 3.0]])
        >>> detente.aggregate(J, detente.IMTLG()).tolist()
        [0.75, 0.75]
    """

    name = "imtl_g"
    paper = PAPER
    row_scale = ("direction",)

    def rule(self, gramian: Array, context: Context) -> Array:
        xp = namespace(gramian)
        norms, cosine = unit(gramian)
        x = equal_products(cosine, context.alive)
        scaled = x * (least(norms)[:, None] / norms)
        size = total(scaled)
        sound = (xp.abs(size) > 1e-12 * total(xp.abs(scaled))) & (most(xp.abs(x))[:, None] > 1e-10)
        return xp.where(sound, scaled / xp.where(sound, size, 1.0), 0.0)
