"""Direction-oriented multi-objective learning."""

from __future__ import annotations

from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from detente.method import Centred, Context, Paper, Range, Ranges, Weights, at_least, fit_blocks
from detente.solvers import Array, diagonal, least, namespace, on_simplex, simplex_qp, times, unit

__all__ = ["SDMGrad"]


class SDMGrad(Centred):
    """SDMGrad: the shortest vector in the hull of the gradients, pulled towards the mean gradient.

    Xiao et al. (2023). ``strength = 0`` is :class:`MGDA`; for large ``strength`` the update tends to the mean. ::

        g0 = sum_i p_i g_i                                p = 1/T, or the preference
        w  = argmin over the simplex of || g_w + l g0 ||
        d  = (g_w + l g0) / (1 + l)                       the division is the authors' code's

    With one batch (the default) the inner problem is solved exactly. With ``batches=3`` its gradients are unbiased, as
    in the paper: ``G12 = J1 J2'`` from two batches drives the inner loop, the third batch's gradients make the update;
    with 2 the first batch serves twice. Then ``w`` is kept from step to step, and :func:`detente.step` is needed. ::

        G12 <- G12 / (mean_i sqrt(G12_ii))^2
        repeat `iterations` times:  w <- Proj_simplex(w - momentum step along G12 (w + l p))

    Task-specific parameters follow their own loss.

    Args:
        strength: l, at least 0. The authors use 0.3 for vision and 0.6 for MT10 and MT50.
        batches: 1, 2 or 3.
        iterations, lr, momentum: of the inner loop with several batches.
        preference: weights of the tasks in ``g0``: None for the mean, a vector or mapping that sums to 1, or a loss
            weighting such as :class:`DWA`.
        zero_rows: ``"drop"`` leaves tasks with a zero gradient out of the mean, ``"keep"`` counts them there.
        heads: gradient of task-specific parameters, ``"own"`` (default) or ``"weighted"``.

    Raises:
        ValueError: an option is out of range; ``preference`` does not sum to 1.

    Limits:
        The pull ``l g0`` has the length of the longest gradient, so the units of the losses matter: with (100, 0) and
        (-0.5, 0.8) even the default 0.3 went clearly against the second task (cosine -0.48), where MGDA does not. With
        one gradient ten times as long as two others 10% of random triples ended in conflict.

    Example:
        >>> import torch, detente
        >>> J = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
        >>> detente.aggregate(J, detente.SDMGrad(strength=0.0)).tolist()  # MGDA
        [0.800000011920929, 0.4000000059604645]
    """

    name = "sdmgrad"
    paper = Paper(
        "xiao2023direction",
        "Direction-oriented Multi-objective Learning: Simple and Provable Stochastic Algorithms",
        "Xiao, Peiyao and Ban, Hao and Ji, Kaiyi",
        "Advances in Neural Information Processing Systems",
        2023,
        "2305.18409",
    )
    ranges: ClassVar[Ranges] = {"strength": Range(0.1, 10.0, log=True)}
    memory = "T x B weights (batches > 1)"

    def __init__(
        self,
        strength: float = 0.3,
        batches: Literal[1, 2, 3] = 1,
        iterations: int = 20,
        lr: float = 10.0,
        momentum: float = 0.5,
        preference: Weights = None,
        *,
        zero_rows: Literal["drop", "keep"] = "drop",
        heads: Literal["own", "weighted"] | None = None,
    ) -> None:
        super().__init__(preference, zero_rows=zero_rows, heads=heads)
        self.strength = at_least("strength", strength, 0)
        if batches not in (1, 2, 3):
            raise ValueError(f"batches must be 1, 2 or 3; got {batches!r}.")
        self.batches = batches
        self.requires_step = batches > 1
        self.state = ("kept",) if batches > 1 else ()
        self.iterations = int(at_least("iterations", iterations, 1))
        self.lr = at_least("lr", lr, 0, strict=True)
        self.momentum = at_least("momentum", momentum, 0)
        self.start()

    without_step = ", or leave batches=1"

    def start(self) -> None:
        super().start()
        self.kept: dict[str, Tensor] = {}

    def check(self, context: Context) -> None:
        super().check(context)
        blocks = None if context.partition is None else context.partition.count
        fit_blocks(self.name, self.kept, context.tasks, blocks)

    def rule(self, gramian: Array, context: Context) -> Array:
        xp = namespace(gramian)
        centre = self.centre(gramian, context)
        alive = context.alive & (diagonal(gramian) > 0)
        if context.cross is None:
            norms, cosine = unit(gramian)
            shortest = least(xp.where(alive, norms, xp.inf))[:, None]
            shortest = xp.where(xp.isfinite(shortest), shortest, 1.0)
            shares = xp.where(alive, shortest / norms, 0.0)
            pull = xp.where(alive, self.strength * times(gramian, centre) / norms / shortest, 0.0)
            some = alive.any(-1)[:, None]
            solved, exact = simplex_qp(cosine, pull, xp.where(some, shares, 1.0))
            weights = self.solved((xp.where(some, solved * shares, 0.0), exact), context)
        else:
            weights = self._inner_loop(context.cross.numpy(), centre, context)
        return (weights + self.strength * centre) / (1 + self.strength)

    def _inner_loop(self, cross: Array, centre: Array, context: Context) -> Array:
        start = [self.kept.get(t, torch.full((len(cross),), 1 / len(context.tasks)).double()) for t in context.tasks]
        w = on_simplex(np.stack([s.numpy() for s in start], -1), context.alive)
        scale = np.sqrt(np.maximum(diagonal(cross), 0)).mean(-1)[:, None, None] + 1e-8
        cross = cross / scale**2
        velocity = np.zeros_like(w)
        for _ in range(self.iterations):
            velocity = self.momentum * velocity + times(cross, w + self.strength * centre)
            w = on_simplex(w - self.lr * velocity, context.alive)
        self.kept |= {t: torch.from_numpy(w[:, i].copy()) for i, t in enumerate(context.tasks)}
        return w
