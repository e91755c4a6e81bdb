"""Central direction with task tensioner."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from detente.method import Context, GramianMethod, Paper, at_least, one_of, warn_unsolved
from detente.methods.edm import equiangular
from detente.solvers import Array

__all__ = ["CDTT"]


class CDTT(GramianMethod):
    """CDTT (Task Tensioner): a central direction, pulled towards the tasks that converge worst.

    The centre b is the :class:`EDM` direction. Each task pulls it along the unit vector from b to its gradient with
    a tension ``c_i = a sigmoid(e (delta_i - 1)) + 1 - a``, where ``delta_i`` is the relative change of the task's
    windowed gradient norm plus ``log10`` of its loss: a task with a large loss and a growing gradient pulls more.
    Where the result conflicts with a task it is moved to the nearest point between it and that task's gradient that
    does not (Nakamura et al. 2022). Everything happens in coefficient space; the coefficients sum to 1.

    Until ``window + 1`` steps have been seen the update is the centre. The gradient norms of every task are kept by
    task name; a task that is missing in a step keeps its window.

    Two things to know. With ``tension_scale="absolute"`` (the authors' code) the tensions have a length of their own
    (below 1 each) and do not shrink with the gradients: decay the learning rate, or use ``"relative"`` (ours), which
    multiplies them by ``||b||``. And ``log10`` of the loss makes the result depend on the unit of the loss.

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
    needs = frozenset({"gramian", "losses"})
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

    def tensions(self, context: Context) -> Tensor | None:
        """``[B, T]`` tensions of the tasks of this step, or None while warming up."""
        if any(len(self.history[task]) <= self.window for task in context.tasks):
            return None
        norms = torch.stack([self.history[task] for task in context.tasks], dim=-1)  # [steps, B, T]
        if context.blocks is not None:
            norms = norms[:, context.blocks]
        now, before = norms[1:].sum(0), norms[:-1].sum(0)
        change = torch.where(before > 0, now / before, 1.0)
        assert context.losses is not None
        delta = change + context.losses.log10()
        return (self.alpha * torch.sigmoid(math.e * (delta - 1)) + 1 - self.alpha).clamp_min(0)

    def rule(self, gramian: Tensor, context: Context) -> Tensor:
        tensions = self.tensions(context)
        result, unsolved, passes = [], 0, 0
        for k, block in enumerate(gramian.numpy()):
            centre, exact = equiangular(block)
            unsolved += not exact
            if tensions is not None:
                centre = self._tensioned(block, centre, tensions[k].numpy())
                centre, used = self._feasible(block, centre)
                passes = max(passes, used)
            result.append(torch.from_numpy(centre))
        context.stats["passes"] = max(passes, context.stats.get("passes", 0))
        warn_unsolved(self, context, unsolved)
        return torch.stack(result)

    def _tensioned(self, gramian: Array, centre: Array, tension: Array) -> Array:
        away = np.eye(len(centre)) - centre  # row k: from the centre to g_k, in coefficients
        distance = np.sqrt(np.maximum(np.einsum("ki,ij,kj->k", away, gramian, away), 0))
        far = distance > 1e-12 * np.sqrt(np.maximum(np.diagonal(gramian), 0))
        pull = np.where(far, tension / np.where(far, distance, 1.0), 0.0)
        if self.tension_scale == "relative":
            pull = pull * math.sqrt(max(float(centre @ gramian @ centre), 0.0))
        return np.asarray(centre + pull @ away)

    def _feasible(self, gramian: Array, weights: Array) -> tuple[Array, int]:
        diagonal = np.diagonal(gramian)
        passes = 0
        moved = True
        while moved and passes < (1 if self.passes == "single" else self.max_passes):
            passes += 1
            moved = False
            for k in range(len(weights)):
                row = gramian[k] * weights
                product = float(row.sum())
                # a product within rounding of zero is not a conflict
                if product < -1e-14 * float(np.abs(row).sum()):
                    share = diagonal[k] / (diagonal[k] - product)
                    weights = share * weights
                    weights[k] += 1 - share
                    moved = True
        return weights, passes
