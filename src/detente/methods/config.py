"""Conflict-free inverse gradients."""

from __future__ import annotations

import math
from typing import ClassVar, Literal

from detente.method import Choice, Context, GramianMethod, Paper, Ranges, one_of
from detente.solvers import Array, any_of, equal_products, floor, least, most, namespace, real, times, total, unit

__all__ = ["ConFIG"]


class ConFIG(GramianMethod):
    """ConFIG: the direction with the same positive cosine to every gradient, as long as the gradients reach along it.

    Liu et al. (2025). ::

        x = pinv(U) 1 = U' pinv(C) 1             U the unit gradients, C their cosines
        v = x / ||x||
        d = (sum_i g_i . v) v                    length = "projection" (default)

    Other lengths take the norms' minimum, maximum, mean or harmonic mean instead of the sum of projections. Rescaling
    one loss changes the length only. Its direction is that of :class:`IMTLG` up to sign. Where no vector has a positive
    product with the span of all gradients (as for opposite ones) the update is zero.

    Task-specific parameters follow their own loss.

    Args:
        length: ``"projection"``, ``"min"``, ``"max"``, ``"mean"`` or ``"harmonic"``.
        zero_rows: ``"drop"`` or ``"keep"`` tasks with a zero gradient (kept: their norm 0 counts in the length).
        heads: gradient of task-specific parameters, ``"own"`` (default) or ``"weighted"``.

    Raises:
        ValueError: ``length`` is unknown.

    Limits:
        Neither size nor number counts for the direction. A task that has arrived and has only noise left steers as much
        as any other, and one task that opposed nine (cosine -0.9) turned the update away until its cosine with the mean
        was 0.2. Where gradients are dependent, as with more tasks than parameters, no vector has equal cosines and the
        least-squares answer may conflict: it did for 42% of random steps with five tasks and three parameters.

    Example:
        >>> import torch, detente
        >>> J = torch.tensor([[1.0, 0.0], [0.0, 3.0]])
        >>> [round(float(v), 6) for v in detente.aggregate(J, detente.ConFIG())]
        [2.0, 2.0]
    """

    name = "config"
    paper = Paper(
        "liu2025config",
        "ConFIG: Towards Conflict-free Training of Physics Informed Neural Networks",
        "Liu, Qiang and Chu, Mengyu and Thuerey, Nils",
        "International Conference on Learning Representations",
        2025,
        "2408.11104",
    )
    ranges: ClassVar[Ranges] = {"length": Choice(("projection", "min", "max", "mean", "harmonic"))}
    row_scale = ("direction", "linear")

    def __init__(
        self,
        length: Literal["projection", "min", "max", "mean", "harmonic"] = "projection",
        *,
        zero_rows: Literal["drop", "keep"] = "drop",
        heads: Literal["own", "weighted"] | None = None,
    ) -> None:
        super().__init__(zero_rows=zero_rows, heads=heads)
        self.length = one_of("length", length, ("projection", "min", "max", "mean", "harmonic"))

    def rule(self, gramian: Array, context: Context) -> Array:
        xp = namespace(gramian)
        norms, cosine = unit(gramian)
        x = equal_products(cosine, context.alive)
        product = times(cosine, x)
        square = (x * product).sum(-1)[:, None]
        sound = (square > 0) & (most(xp.abs(x))[:, None] > 1e-10)
        root = xp.sqrt(xp.where(sound, square, 1.0))
        sizes = xp.sqrt(floor(xp.diagonal(gramian, 0, -2, -1), 0.0))
        length = total(norms * product) / root if self.length == "projection" else self._length(sizes, context.alive)
        return xp.where(sound, x / root / norms * length, 0.0)

    def _length(self, sizes: Array, alive: Array) -> Array:
        xp = namespace(sizes)
        number = floor(total(real(alive)), 1.0)
        if self.length == "min":
            return xp.where(any_of(alive)[:, None], least(xp.where(alive, sizes, math.inf))[:, None], 0.0)
        if self.length == "max":
            return most(xp.where(alive, sizes, 0.0))[:, None]
        if self.length == "mean":
            return total(xp.where(alive, sizes, 0.0)) / number
        zero = any_of(alive & (sizes <= 0))[:, None]
        inverse = total(xp.where(alive & (sizes > 0), 1 / xp.where(sizes > 0, sizes, 1.0), 0.0))
        return xp.where(zero | (inverse <= 0), 0.0, number / xp.where(inverse > 0, inverse, 1.0))
