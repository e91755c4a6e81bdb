"""Gradient normalization."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from detente.gramian import Partition
from detente.method import Context, GramianMethod, Paper, Range, Ranges, TaskScalars, at_least
from detente.solvers import Array, diagonal

__all__ = ["GradNorm"]


class GradNorm(GramianMethod):
    """GradNorm: learned loss weights that keep the weighted gradients equally long, longer for tasks that lag behind.

    Chen et al. (2018). The weights are ``T softmax(z)``, which keeps them positive; ``z`` is learned here, by an Adam
    of the method's own. ::

        N_i = w_i ||g_i||                                    on the measured layer
        r_i = (L_i / L_i(first step)) / mean_k(L_k / L_k(first step))
        z   <- Adam(z, gradient of sum_i | N_i - mean(N) r_i**alpha |, the target held fixed)
        d   = sum_i w_i g_i                                  with the weights before their update

    The paper measures the last shared layer: ``layer=model.trunk[-1].weight``. Without it all shared parameters count;
    with ``source="features"`` the gradients of the features do, and one pass goes through the trunk.

    Task-specific parameters follow the weighted loss.

    Args:
        alpha: strength of the pull towards equal training rates; 0 only equalises the norms.
        lr: learning rate of ``z``.
        layer: a parameter, or several, on which the norms are measured.
        heads: gradient of task-specific parameters, ``"weighted"`` (default) or ``"own"``.

    Raises:
        ValueError: an option is out of range, a loss is not positive, or ``layer`` is no shared parameter of the step.

    Limits:
        A task with a short gradient takes nearly all of the weights, which sum to T: with norms 1 and 0.001 they went
        to 0.002 and 1.998, and the update became 350 times shorter. The loss of the first batch is the yardstick for
        good. A task that cannot improve lags for ever: beside a loss that fell by 0.5% per step it had 1.97 of 2 after
        600 steps.

    Example:
        >>> import torch, detente
        >>> J, method = torch.tensor([[1.0, 0.0], [0.0, 3.0]]), detente.GradNorm(lr=0.05)
        >>> for _ in range(100):
        ...     d = detente.aggregate(J, method, losses=[1.0, 1.0])
        >>> bool((d - 1.5).abs().max() < 0.1)  # 3:1 in length at first, equal in the end
        True
    """

    name = "gradnorm"
    paper = Paper(
        "chen2018gradnorm",
        "GradNorm: Gradient Normalization for Adaptive Loss Balancing in Deep Multitask Networks",
        "Chen, Zhao and Badrinarayanan, Vijay and Lee, Chen-Yu and Rabinovich, Andrew",
        "International Conference on Machine Learning",
        2018,
        "1711.02257",
    )
    ranges: ClassVar[Ranges] = {"alpha": Range(0.1, 3.0), "lr": Range(1e-3, 1e-1, log=True)}
    heads = "weighted"
    needs = frozenset({"gramian", "losses"})
    memory = "T logits, Adam; T losses"
    state = ("logits", "initial")
    homogeneity = None
    exempt = {  # noqa: RUF012
        "zero_rows_do_not_count": "the weights sum to the number of tasks in the step",
        "blocks": "one weight per task for the whole model",
    }

    def __init__(
        self,
        alpha: float = 1.5,
        lr: float = 0.025,
        layer: Tensor | Iterable[Tensor] | None = None,
        *,
        heads: Literal["own", "weighted"] | None = None,
    ) -> None:
        super().__init__(zero_rows="drop" if layer is None else "keep", heads=heads)
        self.alpha = at_least("alpha", alpha, 0)
        self.lr = at_least("lr", lr, 0, strict=True)
        layers = [] if layer is None else [layer] if isinstance(layer, Tensor) else list(layer)
        self._layer = {id(p) for p in layers}
        self.start()

    def start(self) -> None:
        self.logits = TaskScalars(0.0, self.lr)
        self.initial: dict[str, float] = {}

    def partition(self, parameters: Sequence[Tensor], tasks: tuple[str, ...], granularity: str) -> Partition:
        found = super().partition(parameters, tasks, granularity)
        if not self._layer:
            return found
        measured = frozenset(k for k, p in enumerate(parameters) if id(p) in self._layer)
        if not measured:
            raise ValueError(
                "gradnorm: none of the parameters in `layer` is a shared parameter of this step. Pass the weight of a "
                "layer that all tasks use, such as model.trunk[-1].weight."
            )
        return replace(found, measured=measured)

    def check(self, context: Context) -> None:
        if context.losses is not None:
            for task, loss in zip(context.tasks, context.losses.tolist(), strict=True):
                if loss <= 0:
                    raise ValueError(
                        f"gradnorm compares losses with their first values and needs them positive; losses[{task!r}] "
                        f"is {loss:g}. Add a constant to this loss."
                    )

    def rule(self, gramian: Array, context: Context) -> Array:
        losses = context.losses
        assert losses is not None
        for task, loss in zip(context.tasks, losses.tolist(), strict=True):
            self.initial.setdefault(task, loss)
        norms = torch.from_numpy(diagonal(gramian).sum(0)).clamp_min(0).sqrt()
        share = torch.softmax(self.logits.read(context.tasks), 0)
        weights = len(share) * share
        rate = losses / torch.tensor([self.initial[t] for t in context.tasks], dtype=torch.float64)
        weighted = weights * norms
        target = weighted.mean() * (rate / rate.mean()) ** self.alpha
        # a norm within rounding of its target is on it
        off = torch.where((weighted - target).abs() > 1e-12 * torch.maximum(weighted, target), weighted - target, 0.0)
        slope = off.sign() * norms
        # through w = T softmax(z)
        self.logits.descend(context.tasks, weights * (slope - share @ slope))
        answer: Array = weights.expand(len(gramian), -1).numpy()
        return answer
