"""Weighted projection of conflicting gradients."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from detente.method import Context, GramianMethod, Paper, TaskWeights, Weights, one_of

__all__ = ["WPCGrad"]


class WPCGrad(GramianMethod):
    """wPCGrad: where tasks conflict, a probability distribution decides whose gradient stays whole.

    Tasks are ordered by drawing from ``priority`` without replacement. In that order each task is the reference:
    every other gradient that conflicts with the reference loses its component against it. The gradient drawn first
    is never changed. Without conflicts the update is the sum of the gradients, whatever the priorities.

    **A reconstruction.** The idea and the loss-based probabilities are the paper's (Bohn et al. 2024); its full text
    leaves open whether a reference is the original or the current gradient and whether one or all tasks serve, so
    the choice is an option:

    ========================  =========================================================================================
    ``mode="sequence"``       every task in drawn order, with its *current* gradient: afterwards no two modified
                              gradients conflict (default)
    ``mode="anchor"``         only the first drawn task is a reference (the paper's prose)
    ``mode="sequence_original"``  every task in drawn order, with its *original* gradient
    ========================  =========================================================================================

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
    stochastic = True
    state = ("generator",)

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
        self.generator = torch.Generator()
        self.start()

    def start(self) -> None:
        self.generator.manual_seed(self.seed)

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

    def rule(self, gramian: Tensor, context: Context) -> Tensor:
        count = gramian.shape[-1]
        assert context.shares is not None
        order = self.draw(context.shares)
        norms = gramian.diagonal(dim1=-2, dim2=-1).clamp_min(0).sqrt()
        safe = torch.where(norms > 0, norms, 1.0)
        unit = gramian / safe.unsqueeze(-1) / safe.unsqueeze(-2)
        # every gradient in units of its own norm: comparisons and corrections are then free of scale
        rows = torch.eye(count, dtype=torch.float64).expand(len(gramian), -1, -1).clone()
        for i in order[:1] if self.mode == "anchor" else order:
            reference = rows[:, i].clone()
            if self.mode == "sequence_original":
                reference.zero_()
                reference[:, i] = 1.0
            image = torch.einsum("bij,bj->bi", unit, reference)
            length = (reference * image).sum(-1, keepdim=True)
            dot = torch.einsum("bij,bj->bi", rows, image).clamp_max(0)
            dot[:, i] = 0.0
            share = torch.where(length > 64 * count * math.ulp(1.0), dot / length, 0.0)
            rows -= share.unsqueeze(-1) * reference.unsqueeze(-2)
        weights = (rows * norms.unsqueeze(-1)).sum(1) / safe
        return weights / count if self.reduction == "mean" else weights
