"""Weighted projection of conflicting gradients."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from detente.method import (
    Choice,
    Context,
    GramianMethod,
    Paper,
    Ranges,
    Seeded,
    TaskWeights,
    Weights,
    one_of,
)
from detente.solvers import EPS, Array, times, unit

__all__ = ["WPCGrad"]


class WPCGrad(Seeded, GramianMethod):
    """wPCGrad: where tasks conflict, a probability distribution decides whose gradient stays whole.

    Tasks are ordered by drawing from ``priority`` without replacement. In that order each task is the reference:
    every other gradient that conflicts with the reference loses its component against it. The gradient drawn first
    is never changed. Without conflicts the update is the sum of the gradients, whatever the priorities.

    **A reconstruction.** The idea and the loss-based probabilities are the paper's (Bohn et al. 2024); its full text
    leaves open whether a reference is the original or the current gradient and whether one or all tasks serve, so
    the choice is an option. ::

        p_i = g_i for all i
        for each task i in the drawn order:      mode="anchor" (the paper's prose): only the first
            r = p_i                              mode="sequence_original": r = g_i
            for every j != i where p_j . r < 0:
                p_j -= (p_j . r) / ||r||^2 r
        d = sum_i p_i

    After ``mode="sequence"`` (default) no two modified gradients conflict.

    Task-specific parameters follow their own loss.

    Args:
        priority: probabilities of the tasks: None (uniform), a vector or a mapping by task name that sums to 1, or a
            loss weighting (:class:`LossPower`, :class:`DTP`, :class:`DWA`, :class:`UW`, ...), whose weights are
            divided by their sum. A high probability means: more often kept whole. Tasks with probability 0 come last
            in random order.
        mode: which gradients serve as references, see above.
        reduction: ``"sum"`` or ``"mean"``.
        seed: of the drawn orders; the generator is part of the state.
        zero_rows: whether tasks with a zero gradient take part in the draw and the mean.
        heads: gradient of task-specific parameters, ``"own"`` (default) or ``"weighted"``.

    Raises:
        ValueError: probabilities are negative, do not sum to 1, or do not fit the tasks.

    Limits:
        The task that stays whole is paid for by the others, who may get worse: for unit gradients with a cosine of -0.8
        the product with the second one was -0.44, where PCGrad's are positive. With equal probabilities the update
        jumps between such steps (31% of random triples went against a task). :class:`LossPower` as priority brings in
        the units of the losses.

    Example:
        >>> import torch, detente
        >>> J = torch.tensor([[1.0, 0.0], [-1.0, 1.0]])
        >>> detente.aggregate(J, detente.WPCGrad(priority=[1.0, 0.0])).tolist()  # task 0 stays whole
        [1.0, 1.0]
    """

    name = "wpcgrad"
    paper = Paper(
        "bohn2024task",
        "Task Weighting through Gradient Projection for Multitask Learning",
        "Bohn, Christian and Freeman, Ido and Tercan, Hasan and Meisen, Tobias",
        "International Conference on Neural Information Processing",
        2024,
        "2409.01793",
    )
    ranges: ClassVar[Ranges] = {
        "priority": Choice((None, "loss_power", "dwa", "dtp")),
        "reduction": Choice(("sum", "mean")),
    }
    row_scale = ("linear",)

    def __init__(
        self,
        priority: Weights = None,
        mode: Literal["sequence", "anchor", "sequence_original"] = "sequence",
        reduction: Literal["sum", "mean"] = "sum",
        seed: int = 0,
        *,
        zero_rows: Literal["drop", "keep"] = "drop",
        heads: Literal["own", "weighted"] | None = None,
    ) -> None:
        super().__init__(zero_rows=zero_rows, heads=heads)
        self.mode = one_of("mode", mode, ("sequence", "anchor", "sequence_original"))
        self.reduction = one_of("reduction", reduction, ("sum", "mean"))
        self.priority = TaskWeights("priority", priority)
        self.needs = self.needs | self.priority.needs
        self.seed = seed
        self.start()

    def check(self, context: Context) -> None:
        self.priority.check(context)

    def prepare(self, context: Context) -> Context:
        return replace(context, shares=self.priority(context))

    def draw(self, probabilities: Tensor) -> list[int]:
        """An order of the tasks, drawn without replacement with these probabilities (Gumbel top-k)."""
        uniform = torch.rand(2, len(probabilities), dtype=torch.float64, generator=self.generator)
        noise = -(-uniform.clamp_min(1e-300).log()).log()
        drawn = probabilities.log() + noise[0]
        possible = probabilities > 0
        keys = torch.where(possible, drawn, torch.where(possible, 0.0, noise[1]))
        return sorted(range(len(keys)), key=lambda i: (bool(possible[i]), float(keys[i])), reverse=True)

    def rule(self, gramian: Array, context: Context) -> Array:
        count = gramian.shape[-1]
        assert context.shares is not None
        order = self.draw(context.shares)
        norms, cosine = unit(gramian)
        # every gradient in units of its own norm: comparisons and corrections are then free of scale
        rows = np.eye(count) * context.alive[:, :, None]
        for i in order[:1] if self.mode == "anchor" else order:
            reference = rows[:, i].copy()
            if self.mode == "sequence_original":
                reference[:] = 0.0
                reference[:, i] = context.alive[:, i]
            image = times(cosine, reference)
            length = (reference * image).sum(-1)[:, None]
            dot = np.minimum((rows @ image[:, :, None])[..., 0], 0)
            dot[:, i] = 0.0
            usable = length > 64 * count * EPS
            share = np.where(usable, dot / np.where(usable, length, 1.0), 0.0)
            rows -= share[:, :, None] * reference[:, None, :]
        weights = (rows * norms[:, :, None]).sum(1) / norms
        return weights / context.alive.sum(-1, keepdims=True) if self.reduction == "mean" else weights
