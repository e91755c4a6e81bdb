"""Gradient sign dropout."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor

from detente.method import Context, GramianMethod, Paper, Range, Ranges, Seeded, at_least
from detente.solvers import Array, namespace

__all__ = ["GradDrop"]


class GradDrop(Seeded, GramianMethod):
    """GradDrop: in every coordinate only the gradients of one, randomly chosen, sign are kept.

    Chen et al. (2020), on the parameters (or with ``source="features"`` on the features, where the paper puts it). ::

        per coordinate:   P = (1 + sum_i g_i / sum_i |g_i|) / 2              purity: 1 if all are positive
                          U ~ uniform(0, 1);   f(P) = clip(k (P - 1/2) + 1/2, 0, 1)
                          keep the positive g_i if f(P) > U, else the negative ones
        d = sum_i (leak + (1 - leak) kept_i) g_i

    Coordinates in which all tasks agree pass unchanged.

    Task-specific parameters follow their own loss.

    Args:
        leak: share of every gradient that is never dropped, in [0, 1]; 1 is the plain sum.
        slope: k, at least 1 makes the choice more decided.
        seed: of the draws; the generator is part of the state.
        zero_rows: has no influence: a zero gradient adds nothing.
        heads: gradient of task-specific parameters, ``"own"`` (default) or ``"weighted"``.

    Raises:
        ValueError: an option is out of range.

    Limits:
        On average, with ``slope = 1``, the update is the plain sum: conflicts are not resolved, noise is added to them.
        A large gradient is kept in proportion to its size, so the units of the losses matter. It depends on the basis
        of the parameters, unlike all methods that only use inner products. For random triples in five dimensions 41% of
        the updates went against a task.

    Example:
        >>> import torch, detente
        >>> J = torch.tensor([[1.0, 2.0], [-3.0, 1.0]])
        >>> d = detente.aggregate(J, detente.GradDrop())
        >>> float(d[0]) in (1.0, -3.0), float(d[1])  # one sign, and agreement
        (True, 3.0)
    """

    name = "graddrop"
    paper = Paper(
        "chen2020just",
        "Just Pick a Sign: Optimizing Deep Multitask Models with Gradient Sign Dropout",
        "Chen, Zhao and Ngiam, Jiquan and Huang, Yanping and Luong, Thang and Kretzschmar, Henrik and Chai, Yuning "
        "and Anguelov, Dragomir",
        "Advances in Neural Information Processing Systems",
        2020,
        "2010.06808",
    )
    ranges: ClassVar[Ranges] = {"leak": Range(0.0, 0.5)}
    kind = "jacobian"
    spans = False
    exempt = {"blocks": "draws one number per coordinate, in the order of the buffers"}  # noqa: RUF012

    def __init__(
        self,
        leak: float = 0.0,
        slope: float = 1.0,
        seed: int = 0,
        *,
        zero_rows: Literal["drop", "keep"] = "drop",
        heads: Literal["own", "weighted"] | None = None,
    ) -> None:
        super().__init__(zero_rows=zero_rows, heads=heads)
        self.leak = at_least("leak", leak, 0)
        if leak > 1:
            raise ValueError(f"leak must be in [0, 1]; got {leak!r}.")
        self.slope = at_least("slope", slope, 0, strict=True)
        self.seed = seed
        self.start()

    def transform(self, rows: Sequence[Tensor], context: Context) -> None:
        for buffer in rows:
            wide = buffer if buffer.dtype in (torch.float32, torch.float64) else buffer.float()
            size = wide.abs().sum(0)
            purity = torch.where(size > 0, 0.5 + 0.5 * wide.sum(0) / torch.where(size > 0, size, 1.0), 0.5)
            chance = (self.slope * (purity - 0.5) + 0.5).clamp(0, 1)
            drawn = torch.rand(buffer.shape[1], generator=self.generator, dtype=torch.float64)
            up = chance.double() > drawn.to(buffer.device)  # drawn < 1: a chance of 1 is certain
            kept = (wide > 0) == up  # zeros stay zeros either way
            buffer.mul_(self.leak + (1 - self.leak) * kept.to(buffer.dtype))

    def rule(self, gramian: Array, context: Context) -> Array:
        return namespace(gramian).ones_like(gramian[..., 0])
