"""The Gramian of the task gradients, without an update."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor

from detente.engine.graph import reach
from detente.engine.jacobian import Jacobian
from detente.engine.source import trunk_rows
from detente.gramian import Partition
from detente.losses import named_losses

__all__ = ["task_gramian"]


def task_gramian(
    losses: Mapping[str, Tensor] | Sequence[Tensor], shared: Iterable[Tensor] | None = None
) -> Tensor | None:
    """Inner products of the tasks' gradients of the shared parameters; keeps the graph and writes no ``.grad``.

    Costs one backward pass per task.

    Args:
        losses: as in :func:`detente.backward`.
        shared: parameters to compare the tasks on; None finds those reached by two or more losses.

    Returns:
        ``[T, T]`` float64 CPU tensor, or None where no parameter is shared.

    Example:
        >>> import torch
        >>> x = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> task_gramian([x[0], -x[0] + x[1]]).tolist()
        [[1.0, -1.0], [-1.0, 2.0]]
    """
    tensors = list(named_losses(losses).values())
    found = reach(tensors, shared)
    if not found.shared:
        return None
    rows = trunk_rows(tensors, found, Jacobian(found.shared, len(tensors)), keep=True)
    return rows.gramian(Partition.by_model(found.shared))[0].cpu()
