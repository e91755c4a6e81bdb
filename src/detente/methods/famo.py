"""Fast adaptive multitask optimization."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from detente.method import (
    Context,
    LossWeighting,
    Paper,
    Range,
    Ranges,
    Session,
    TaskScalars,
    Update,
    at_least,
)

__all__ = ["FAMO"]


class FAMO(LossWeighting):
    """FAMO: all losses fall at the same relative rate, for the price of one backward pass.

    Tasks whose logarithmic loss fell less in a step get more weight in the next (Liu et al. 2023). Needs the losses
    after the optimizer's step, on the same batch: :func:`detente.step` computes them (one more forward pass, with the
    same random numbers); in a loop of your own call :meth:`after_step`. ::

        z   = softmax(xi);   D_i = L_i - minimum_i + 1e-8
        w_i = (z_i / D_i) / sum_k (z_k / D_k)                     sum w = 1
        step;   D' from the losses after it;   delta_i = log D_i - log D'_i
        xi  <- Adam(xi, gradient z * (delta - z . delta), weight decay)

    Args:
        lr: learning rate of ``xi``.
        weight_decay: of ``xi``; the paper uses 0.001 for NYUv2, QM9 and CelebA, 0.01 for Cityscapes and MT10.
        minimum: lowest possible value of each loss, ``{task: value}``; 0 for those not named.

    Raises:
        ValueError: an option is out of range, or a loss is not above its minimum.

    Limits:
        Weights go like ``1 / (L_i - minimum_i)`` whatever the gradients: of two losses 1 and 0.0001 the second has
        99.99% of the weight in the first step. So a loss near its minimum takes over. A task that cannot improve takes
        weight, too: its ``z`` rose to 0.82 beside a loss that fell by 0.5% per step.

    Example:
        >>> import torch, detente
        >>> method = detente.FAMO(lr=0.5)
        >>> w = method.weights(torch.tensor([1.0, 1.0]))
        >>> method.after_step([1.0, 0.5])  # the first task did not improve
        >>> w = method.weights(torch.tensor([1.0, 1.0]))
        >>> bool(w[0] > w[1])
        True
    """

    name = "famo"
    paper = Paper(
        "liu2023famo",
        "FAMO: Fast Adaptive Multitask Optimization",
        "Liu, Bo and Feng, Yihao and Stone, Peter and Liu, Qiang",
        "Advances in Neural Information Processing Systems",
        2023,
        "2306.03792",
    )
    ranges: ClassVar[Ranges] = {"lr": Range(1e-3, 1e-1, log=True), "weight_decay": Range(1e-4, 1e-1, log=True)}
    needs = frozenset({"losses", "losses after the step"})
    memory = "T logits, Adam"
    state = ("logits",)

    def __init__(
        self, lr: float = 0.025, weight_decay: float = 1e-3, minimum: Mapping[str, float] | None = None
    ) -> None:
        super().__init__()
        self.lr = at_least("lr", lr, 0, strict=True)
        self.weight_decay = at_least("weight_decay", weight_decay, 0)
        self.minimum = {task: float(value) for task, value in (minimum or {}).items()}
        self.start()

    def start(self) -> None:
        self.logits = TaskScalars(0.0, self.lr, self.weight_decay)
        self._waiting: tuple[tuple[str, ...], Tensor] | None = None

    def _above(self, losses: Tensor, tasks: tuple[str, ...]) -> Tensor:
        return losses - torch.tensor([self.minimum.get(t, 0.0) for t in tasks], dtype=torch.float64)

    def check(self, context: Context) -> None:
        if context.losses is not None:
            for task, loss in zip(context.tasks, context.losses.tolist(), strict=True):
                if loss <= self.minimum.get(task, 0.0):
                    raise ValueError(
                        f"famo needs losses above their minimum; losses[{task!r}] is {loss:g} and its minimum "
                        f"{self.minimum.get(task, 0.0):g}. Pass minimum={{{task!r}: ...}}, below every possible value."
                    )

    def rule(self, losses: Tensor, context: Context) -> Tensor:
        share = torch.softmax(self.logits.read(context.tasks), 0) / (self._above(losses, context.tasks) + 1e-8)
        self._waiting = (context.tasks, losses.clone())
        return share / share.sum()

    def after_step(self, losses: Mapping[str, float | Tensor] | list[float] | Tensor) -> None:
        """Take the losses after the optimizer's step, on the batch of the last backward pass, into account.

        Losses that are not finite leave everything as it was.

        Raises:
            RuntimeError: there was no step since the last call.
            ValueError: a task is missing, or a loss is not above its minimum.
        """
        if self._waiting is None:
            raise RuntimeError("famo.after_step was called without a step before it; call it once after each step.")
        tasks, before = self._waiting
        if isinstance(losses, Mapping):
            missing = [t for t in tasks if t not in losses]
            if missing:
                raise ValueError(f"famo.after_step: the loss of task {missing[0]!r} is missing; the step had {tasks}.")
            losses = [float(losses[t]) for t in tasks]
        after = torch.as_tensor(losses, dtype=torch.float64).detach().cpu()
        self._waiting = None
        if not bool(after.isfinite().all()):
            return
        self.check(Context(tasks, losses=after))
        gained = (self._above(before, tasks) + 1e-8).log() - (self._above(after, tasks) + 1e-8).log()
        share = torch.softmax(self.logits.read(tasks), 0)
        self.logits.descend(tasks, share * (gained - share @ gained))

    def take_step(self, session: Session) -> Update:
        update = super().take_step(session)
        if self._waiting is not None:  # a step that was not finite left nothing to compare with
            self.after_step(session.values())
        return update
