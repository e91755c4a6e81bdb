"""Central direction with task tensioner."""

from __future__ import annotations

import math
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from detente.method import Context, GramianMethod, Paper, Range, Ranges, at_least, one_of
from detente.methods.edm import equiangular
from detente.solvers import Array, diagonal, times

__all__ = ["CDTT"]


class CDTT(GramianMethod):
    """CDTT (Task Tensioner): a central direction, pulled towards the tasks that converge worst.

    The centre b is the :class:`EDM` direction. Each task pulls it along the unit vector from b to its gradient with
    a tension ``c_i = a sigmoid(e (delta_i - 1)) + 1 - a``, where ``delta_i`` is the relative change of the task's
    windowed gradient norm plus ``log10`` of its loss: a task with a large loss and a growing gradient pulls more.
    Where the result conflicts with a task it is moved to the nearest point between it and that task's gradient that
    does not (Nakamura et al. 2022). Everything happens in coefficient space; the coefficients sum to 1. ::

        b       = the EDM direction
        delta_i = S_i / (S_i one step earlier) + log10 L_i,   S_i the sum of the last `window` norms of g_i
        c_i     = a sigmoid(e (delta_i - 1)) + 1 - a
        d       = b + sum_i c_i (g_i - b) / ||g_i - b||
        for i = 1 .. T, where q = g_i . d < 0:
            s = ||g_i||^2 / (||g_i||^2 - q);   d = s d + (1 - s) g_i

    Until ``window + 1`` steps have been seen the update is the centre. The gradient norms of every task are kept by
    task name; a task that is missing in a step keeps its window.

    Task-specific parameters follow their own loss. Only ``a <= 1`` keeps every tension positive.

    Args:
        alpha: strength of the tension, at least 0; 0 gives every task the tension 1.
        window: steps in the windows of gradient norms.
        tension_scale: ``"absolute"`` or ``"relative"``.
        passes: corrections of conflicts: one ``"single"`` pass over the tasks in order (the authors' code), or
            ``"until_feasible"``, at most 100 passes.
        zero_rows: ``"drop"`` (default) leaves a task with a zero gradient out of the step; its zero still enters its
            window. ``"keep"``: the centre is then zero.
        heads: gradient of task-specific parameters, ``"own"`` (default) or ``"weighted"``.

    Raises:
        ValueError: an option is out of range; a loss is negative.

    Limits:
        With ``tension_scale="absolute"`` (the authors' code) the tensions have a length of their own, below 1 each, and
        do not shrink with the gradients: two agreeing gradients of length 0.001 gave an update of length 0.15. Decay
        the learning rate, or use ``"relative"`` (ours), which multiplies them by ``||b||``. And ``log10`` makes the
        result depend on the units of the losses: below 0.01 all tasks pull with the smallest tension, above 10 nearly
        with the largest. One pass of corrections can leave conflicts with earlier tasks (7% of random steps with four
        tasks), and the order of the tasks counts.

    Example:
        >>> import torch, detente
        >>> J = torch.tensor([[1.0, 0.0], [0.0, 3.0]])
        >>> method = detente.CDTT(window=1)
        >>> detente.aggregate(J, method, losses=[0.5, 2.0]).tolist()  # warming up: the EDM direction
        [0.75, 0.75]
        >>> d = detente.aggregate(J, method, losses=[0.5, 2.0])
        >>> bool(d[1] > 0.75 > d[0])  # the task with the larger loss pulls harder
        True
    """

    name = "cdtt"
    paper = Paper(
        "nakamura2022leveraging",
        "Leveraging convergence behavior to balance conflicting tasks in multi-task learning",
        "Nakamura, Angelica Tiemi Mizuno and Grassi Jr, Valdir and Wolf, Denis Fernando",
        "Neurocomputing 511",
        2022,
        "2204.06698",
    )
    ranges: ClassVar[Ranges] = {"alpha": Range(0.05, 0.95), "window": Range(3, 100, log=True, whole=True)}
    needs = frozenset({"gramian", "losses"})
    memory = "T x window x B norms"
    homogeneity = None
    permutation_equivariant = False
    state = ("history",)
    max_passes = 100

    def __init__(
        self,
        alpha: float = 0.3,
        window: int = 10,
        tension_scale: Literal["absolute", "relative"] = "absolute",
        passes: Literal["single", "until_feasible"] = "single",
        *,
        zero_rows: Literal["drop", "keep"] = "drop",
        heads: Literal["own", "weighted"] | None = None,
    ) -> None:
        super().__init__(zero_rows=zero_rows, heads=heads)
        self.alpha = at_least("alpha", alpha, 0)
        self.window = int(at_least("window", window, 1))
        self.tension_scale = one_of("tension_scale", tension_scale, ("absolute", "relative"))
        self.passes = one_of("passes", passes, ("single", "until_feasible"))
        self.history: dict[str, Tensor] = {}
        self.start()

    def start(self) -> None:
        self.history = {}

    def check(self, context: Context) -> None:
        if context.losses is not None and bool((context.losses < 0).any()):
            worst = int(context.losses.argmin())
            raise ValueError(
                f"cdtt takes log10 of the losses, which must not be negative; losses[{context.tasks[worst]!r}] is "
                f"{float(context.losses[worst]):g}. Add a constant to this loss."
            )
        if context.partition is not None:
            self._check_blocks(context, context.partition.count)

    def _check_blocks(self, context: Context, count: int) -> None:
        for task in context.tasks:
            past = self.history.get(task)
            if past is not None and past.shape[1] != count:
                raise ValueError(
                    f"cdtt has seen task {task!r} with {past.shape[1]} blocks and now gets {count}. "
                    "Keep granularity and shared parameters, or call method.reset()."
                )

    def observe(self, gramian: Tensor, context: Context) -> None:
        """Push this step's norms; ``history[task]`` is ``[steps, B]``, at most ``window + 1`` steps."""
        self._check_blocks(context, len(gramian))
        norms = gramian.diagonal(dim1=-2, dim2=-1).clamp_min(0).sqrt()
        for i, task in enumerate(context.tasks):
            new = norms[None, :, i]
            self.history[task] = torch.cat([self.history.get(task, new[:0]), new])[-(self.window + 1) :]

    def tensions(self, context: Context, seen: Array) -> Array | None:
        """``[B, T]`` tensions of the tasks of this step, or None while a task that counts (``seen``) warms up."""
        counted = [task for task, counts in zip(context.tasks, seen, strict=True) if counts]
        if any(len(self.history[task]) <= self.window for task in counted):
            return None
        empty = torch.zeros(self.window + 1, 1, dtype=torch.float64)
        norms = torch.stack(
            [self.history[t] if t in counted else empty.expand_as(self.history[counted[0]]) for t in context.tasks], -1
        )  # [steps, B, T]
        now, before = norms[1:].sum(0), norms[:-1].sum(0)
        change = torch.where(before > 0, now / before, 1.0)
        assert context.losses is not None
        delta = change + context.losses.log10()
        tension: Array = (self.alpha * torch.sigmoid(math.e * (delta - 1)) + 1 - self.alpha).clamp_min(0).numpy()
        return tension

    def rule(self, gramian: Array, context: Context) -> Array:
        centre = self.solved(equiangular(gramian, context.alive), context)
        seen = context.alive.any(0)
        tensions = self.tensions(context, seen) if seen.any() else None
        passes = 0
        if tensions is not None:
            centre = self._tensioned(gramian, centre, np.where(context.alive, tensions, 0.0))
            centre, passes = self._feasible(gramian, centre, context.alive)
        context.stats["passes"] = passes
        return centre

    def _tensioned(self, gramian: Array, centre: Array, tension: Array) -> Array:
        away = np.eye(centre.shape[-1]) - centre[:, None, :]  # row k: from the centre to g_k, in coefficients
        distance = np.sqrt(np.maximum(((away @ gramian) * away).sum(-1), 0))
        far = distance > 1e-12 * np.sqrt(np.maximum(diagonal(gramian), 0))
        pull = np.where(far, tension / np.where(far, distance, 1.0), 0.0)
        if self.tension_scale == "relative":
            pull = pull * np.sqrt(np.maximum((centre * times(gramian, centre)).sum(-1), 0.0))[:, None]
        return centre + (pull[:, None, :] @ away)[:, 0]

    def _feasible(self, gramian: Array, weights: Array, alive: Array) -> tuple[Array, int]:
        square = diagonal(gramian)
        passes = 0
        moved = True
        while moved and passes < (1 if self.passes == "single" else self.max_passes):
            passes += 1
            moved = False
            for k in range(weights.shape[-1]):
                row = gramian[:, k] * weights
                product = row.sum(-1)
                # a product within rounding of zero is not a conflict
                against = alive[:, k] & (product < -1e-14 * np.abs(row).sum(-1))
                if against.any():
                    share = np.where(against, square[:, k] / np.where(against, square[:, k] - product, 1.0), 1.0)
                    weights = share[:, None] * weights
                    weights[:, k] += 1 - share
                    moved = True
        return weights, passes
