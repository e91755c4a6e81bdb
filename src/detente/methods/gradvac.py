"""Gradient vaccine."""

from __future__ import annotations

from typing import ClassVar, Literal

import numpy as np
import torch

from detente.method import Context, GramianMethod, Paper, Range, Ranges, Seeded, at_least
from detente.solvers import Array, unit

__all__ = ["GradVac"]


class GradVac(Seeded, GramianMethod):
    """GradVac: every pair of gradients is brought to at least the cosine that the pair usually has.

    Wang et al. (2021). PCGrad is the case of a target of 0. ::

        for each task i:  p_i = g_i
            for the other tasks j in random order:
                f = cos(p_i, g_j)
                if f < r_ij:
                    p_i += ||p_i|| (r_ij sqrt(1 - f^2) - f sqrt(1 - r_ij^2)) / (||g_j|| sqrt(1 - r_ij^2)) g_j
                r_ij <- (1 - beta) r_ij + beta f             target, starts at 0; updated for every pair
        d = sum_i p_i

    After a correction the cosine is the target exactly. Targets are kept by task names and per block; a pair that is
    not in a step keeps its target. The paper corrects per layer or for the whole model: ``granularity``.

    Task-specific parameters follow their own loss.

    Args:
        beta: share of a new cosine in the target, in [0, 1]. Common code uses 0.5, the paper about 0.01.
        seed: of the random orders; the generator is part of the state.
        zero_rows: ``"drop"`` or ``"keep"`` tasks with a zero gradient; they have no influence either way.
        heads: gradient of task-specific parameters, ``"own"`` (default) or ``"weighted"``.

    Raises:
        ValueError: ``beta`` is out of range.

    Limits:
        Targets follow the cosines that are seen, so that a conflict that lasts becomes the usual and is no longer
        corrected. With the same two gradients at 135 degrees in every step the first update is PCGrad's; after 20 steps
        (``beta = 0.5``) or 600 (0.01) it is the plain sum. With three tasks and more, later corrections undo earlier
        ones: 6% of random triples ended in conflict, and 30% with one gradient ten times as long.

    Example:
        >>> import torch, detente
        >>> J = torch.tensor([[1.0, 0.0], [-1.0, 1.0]])
        >>> [round(float(v), 6) for v in detente.aggregate(J, detente.GradVac())]  # the first step is PCGrad's
        [0.5, 1.5]
    """

    name = "gradvac"
    paper = Paper(
        "wang2021gradient",
        "Gradient Vaccine: Investigating and Improving Multi-task Optimization in Massively Multilingual Models",
        "Wang, Zirui and Tsvetkov, Yulia and Firat, Orhan and Cao, Yuan",
        "International Conference on Learning Representations",
        2021,
        "2010.05874",
    )
    ranges: ClassVar[Ranges] = {"beta": Range(0.01, 0.9, log=True)}
    row_scale = ("linear",)
    memory = "T x T x B targets, generator"
    state = ("generator", "names", "targets")

    def __init__(
        self,
        beta: float = 0.5,
        seed: int = 0,
        *,
        zero_rows: Literal["drop", "keep"] = "drop",
        heads: Literal["own", "weighted"] | None = None,
    ) -> None:
        super().__init__(zero_rows=zero_rows, heads=heads)
        self.beta = at_least("beta", beta, 0)
        if beta > 1:
            raise ValueError(f"beta must be in [0, 1]; got {beta!r}.")
        self.seed = seed
        self.start()

    def start(self) -> None:
        super().start()
        self.names: list[str] = []
        self.targets = torch.zeros(0, 0, 0, dtype=torch.float64)  # [task, task, block]

    def check(self, context: Context) -> None:
        if context.partition is not None:
            self._fits(context.partition.count)

    def _fits(self, blocks: int) -> None:
        if self.names and self.targets.shape[2] != blocks:
            raise ValueError(
                f"gradvac keeps targets for {self.targets.shape[2]} blocks and now gets {blocks}. "
                "Keep granularity and shared parameters, or call method.reset()."
            )

    def _places(self, tasks: tuple[str, ...], blocks: int) -> Array:
        """Positions of the tasks in ``targets``, which grows for new ones."""
        self._fits(blocks)
        new = [t for t in tasks if t not in self.names]
        if new:
            grown = torch.zeros(*(2 * (len(self.names) + len(new),)), blocks, dtype=torch.float64)
            grown[: len(self.names), : len(self.names)] = self.targets.reshape(len(self.names), len(self.names), blocks)
            self.names, self.targets = [*self.names, *new], grown
        return np.array([self.names.index(t) for t in tasks])

    def rule(self, gramian: Array, context: Context) -> Array:
        blocks, count = gramian.shape[:2]
        place = self._places(context.tasks, blocks)
        target = self.targets.numpy()  # a view: written in place
        keys = torch.rand(count, count, generator=self.generator)
        order = keys.fill_diagonal_(-1).argsort(1).numpy()
        norms, cosine = unit(gramian)
        alive = context.alive & (np.diagonal(gramian, axis1=1, axis2=2) > 0)
        task = np.arange(count)
        rows = np.eye(count) * alive[:, :, None]  # p_i / n_i over unit gradients
        image = rows @ cosine
        square = (rows * image).sum(-1)
        for k in range(1, count):
            met = order[:, k]
            both = alive & alive[:, met] & (square > 1e-28)
            size = np.sqrt(np.where(both, square, 1.0))
            dot = image[:, task, met]
            f = np.clip(dot / size, -1.0, 1.0)
            r = target[place, place[met]].T  # [B, T]
            safe = np.clip(r, -1 + 1e-12, 1 - 1e-12)
            height = np.sqrt(1 - safe**2)
            add = np.where(both & (f < r), size * (safe * np.sqrt(1 - f**2) - f * height) / height, 0.0)
            rows[:, task, met] += add
            square = square + 2 * add * dot + add**2
            image += add[:, :, None] * cosine[:, met]
            target[place, place[met]] = np.where(both, (1 - self.beta) * r + self.beta * f, r).T
        return (rows * norms[:, :, None]).sum(1) / norms
