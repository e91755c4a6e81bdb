"""Independent component alignment for multi-task learning."""

from __future__ import annotations

import math
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from detente.method import Centred, Choice, Context, Paper, Ranges, Weights, one_of
from detente.solvers import Array, least, namespace, spectrum, times

__all__ = ["AlignedMTL"]


class AlignedMTL(Centred):
    """Aligned-MTL: the gradients' principal components, all brought to one length, then summed.

    Senushkin et al. (2023). ::

        G = V diag(l) V'                        the components above rounding
        B = sqrt(s) V diag(1 / sqrt(l)) V'      s = min (default), median or mean of l
        d = J' B w                              w = 1, or T times the preference

    The aligned gradients ``B J`` have condition number 1. The eigendecomposition is accurate for each component
    relative to itself, so that a task whose gradient is 1e8 times smaller still counts; the authors' code drops
    components below about 1e-7 of the largest. ``source="features"`` is the authors' Aligned-MTL-UB.

    Task-specific parameters follow their own loss.

    Args:
        scale: common length: ``"min"``, ``"median"`` (the lower one of an even number) or ``"rmse"`` (the mean of the
            squared lengths).
        preference: weights of the tasks: None for equal, a vector or mapping that sums to 1, or a loss weighting.
        zero_rows: ``"drop"`` or ``"keep"`` tasks with a zero gradient (kept: they count in T with a preference).
        heads: gradient of task-specific parameters, ``"own"`` (default) or ``"weighted"``.

    Raises:
        ValueError: an option is unknown; ``preference`` does not sum to 1.

    Limits:
        With ``scale="min"`` the shortest component sets the length of all. Two unit gradients that agree to within 0.1
        radians give an update of length 0.1 where their sum has 2, and beside a gradient 1000 times shorter the other
        task slows down 1000 times. With ``"rmse"`` the short component, which may be noise, is stretched instead: 700
        times in that case. The update may conflict: with one gradient ten times as long as two others it did for a
        tenth of random triples.

    Example:
        >>> import torch, detente
        >>> J = torch.tensor([[2.0, 0.0], [0.0, 0.5]])
        >>> detente.aggregate(J, detente.AlignedMTL()).tolist()
        [0.5, 0.5]
    """

    name = "aligned_mtl"
    paper = Paper(
        "senushkin2023independent",
        "Independent Component Alignment for Multi-Task Learning",
        "Senushkin, Dmitry and Patakin, Nikolay and Kuznetsov, Arseny and Konushin, Anton",
        "IEEE/CVF Conference on Computer Vision and Pattern Recognition",
        2023,
        "2305.19000",
    )
    ranges: ClassVar[Ranges] = {"scale": Choice(("min", "median", "rmse"))}

    def __init__(
        self,
        scale: Literal["min", "median", "rmse"] = "min",
        preference: Weights = None,
        *,
        zero_rows: Literal["drop", "keep"] = "drop",
        heads: Literal["own", "weighted"] | None = None,
    ) -> None:
        super().__init__(preference, zero_rows=zero_rows, heads=heads)
        self.scale = one_of("scale", scale, ("min", "median", "rmse"))

    def rule(self, gramian: Array, context: Context) -> Array:
        xp = namespace(gramian)
        number = context.alive.sum(-1)[:, None]
        wanted = self.centre(gramian, context) * number
        parts = spectrum(gramian)
        length = self._length(xp.where(parts.kept, parts.lengths, math.inf), parts.kept)
        return times(parts.back, length * times(xp.swapaxes(parts.left, -1, -2), wanted))

    def _length(self, roots: Array, kept: Array) -> Array:
        """``[B, 1]``: the common length, from lengths that are infinite where they do not count."""
        xp = namespace(roots)
        number = kept.sum(-1)[:, None]
        if self.scale == "min":
            chosen = least(roots)[:, None]
        elif self.scale == "median":
            ordered = torch.sort(roots, -1)[0] if isinstance(roots, Tensor) else np.sort(roots, -1)
            place = xp.cumsum(xp.ones_like(ordered), -1) - 1
            held = xp.where(xp.isfinite(ordered), ordered, 0.0)
            middle = (number - 1) // 2
            chosen = xp.where(place == middle, held, 0.0).sum(-1)[:, None]
        else:
            square = xp.where(kept, roots, 0.0) ** 2
            chosen = xp.sqrt(square.sum(-1)[:, None] / xp.where(number > 0, number, 1))
        return xp.where(number > 0, chosen, 0.0)
