"""Dual-balancing multi-task learning."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

from torch import Tensor

from detente.method import Context, GramianMethod, Paper, Range, Ranges, TaskRows, at_least
from detente.methods.si import SI
from detente.solvers import Array, diagonal, most, namespace, unit

__all__ = ["DBMTL"]


class DBMTL(GramianMethod):
    """DB-MTL: logarithmic losses, and smoothed gradients that are all brought to the length of the longest.

    Lin et al. (2023). ::

        g_i = gradient of log(L_i + 1e-8)
        m_i <- b_k m_i + (1 - b_k) g_i                 0 at first,  b_k = beta / k^decay
        d   = max_k ||m_k|| sum_i m_i / ||m_i||

    Keeps one vector of the shared parameters per task, by task name; a task that is missing in a step keeps its own.

    Task-specific parameters follow the logarithm of their own loss.

    Args:
        beta: share of the past in the smoothed gradients, in [0, 1).
        decay: power of the step number by which ``beta`` falls.
        zero_rows: ``"drop"`` or ``"keep"`` tasks whose smoothed gradient is zero; they add nothing either way.
        heads: gradient of task-specific parameters, ``"own"`` (default) or ``"weighted"``.

    Raises:
        ValueError: an option is out of range, a loss is not positive, or the shared parameters changed.

    Limits:
        Conflicts stay (64% of random triples), and every gradient is stretched to the longest: what is left of a task
        that has arrived may be noise, and is then as long as the rest. Gradients of logarithms grow without bound as a
        loss falls: one loss of 1e-6 made the whole update a million times longer. Trackers start at 0, so that with
        ``beta = 0.9`` the first update is a tenth of its length.

    Example:
        >>> import torch, detente
        >>> J = torch.tensor([[3.0, 0.0], [0.0, 0.1]])
        >>> d = detente.aggregate(J, detente.DBMTL(beta=0.0), losses=[1.0, 1.0])
        >>> [round(float(v), 6) for v in d]
        [3.0, 3.0]
    """

    name = "db_mtl"
    paper = Paper(
        "lin2023dual",
        "Dual-Balancing for Multi-Task Learning",
        "Lin, Baijiong and Jiang, Weisen and Ye, Feiyang and Zhang, Yu and Chen, Pengguang and Chen, Ying-Cong and "
        "Liu, Shu and Kwok, James T.",
        "arXiv:2308.12029",
        2023,
        "2308.12029",
        "misc",
    )
    ranges: ClassVar[Ranges] = {"beta": Range(0.1, 0.95), "decay": Range(0.0, 0.5)}
    kind = "jacobian"
    row_scale = ("direction",)
    needs = frozenset({"gramian", "losses"})
    per_parameter = True
    memory = "T x P smoothed gradients"
    state = ("smoothed", "steps")

    def __init__(
        self,
        beta: float = 0.9,
        decay: float = 0.0,
        *,
        zero_rows: Literal["drop", "keep"] = "drop",
        heads: Literal["own", "weighted"] | None = None,
    ) -> None:
        super().__init__(zero_rows=zero_rows, heads=heads)
        self.beta = at_least("beta", beta, 0)
        if beta >= 1:
            raise ValueError(f"beta must be in [0, 1); got {beta!r}.")
        self.decay = at_least("decay", decay, 0)
        self.own_weighting = SI(epsilon=1e-8)
        self.start()

    def start(self) -> None:
        super().start()
        self.smoothed = TaskRows()
        self.steps = 0

    def check(self, context: Context) -> None:
        self.smoothed.check(context, self.name)

    def transform(self, rows: Sequence[Tensor], context: Context) -> None:
        parts = [[buffer[i] for buffer in rows] for i in range(len(context.tasks))]  # views
        before = [self.smoothed.read(task, new) for task, new in zip(context.tasks, parts, strict=True)]
        self.steps += 1
        keep = self.beta / self.steps**self.decay
        for i, task in enumerate(context.tasks):
            for new, old in zip(parts[i], before[i], strict=True):
                new.mul_(1 - keep).add_(old, alpha=keep)
            self.smoothed.write(task, parts[i])

    def rule(self, gramian: Array, context: Context) -> Array:
        xp = namespace(gramian)
        norms, _ = unit(gramian)
        longest = most(xp.where(diagonal(gramian) > 0, norms, 0.0))[:, None]
        return longest / norms
