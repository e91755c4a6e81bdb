"""The Gramian of the task gradients, without an update."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from detente.engine.distributed import Counts, Processes
from detente.engine.graph import listed, reach
from detente.engine.jacobian import Jacobian
from detente.engine.source import trunk_rows
from detente.gramian import Partition
from detente.losses import named_losses

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["task_gramian"]


def task_gramian(
    losses: Mapping[str, Tensor] | Sequence[Tensor],
    shared: Iterable[Tensor] | None = None,
    *,
    counts: Counts | None = None,
    parameters: Iterable[Tensor] | None = None,
    group: ProcessGroup | None = None,
) -> Tensor | None:
    """Inner products of the tasks' gradients of the shared parameters; keeps the graph and writes no ``.grad``.

    Costs one backward pass per task. With several processes the gradients are those of the whole batch, so that all of
    them must call this together.

    Args:
        losses: as in :func:`detente.backward`.
        shared: parameters to compare the tasks on; None finds those reached by two or more losses.
        counts, parameters, group: as in :func:`detente.backward`.

    Returns:
        ``[T, T]`` float64 CPU tensor, or None where no parameter is shared.

    Example:
        >>> import torch
        >>> x = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> task_gramian([x[0], -x[0] + x[1]]).tolist()
        [[1.0, -1.0], [-1.0, 2.0]]
    """
    among = Processes.of(group)
    chosen = None if shared is None else listed(shared)
    if among is None:
        tensors = list(named_losses(losses).values())
        found = reach(tensors, chosen)
    else:
        with among.failing_together():
            named = named_losses(losses, any_number=True)
        parts, found = among.join(named, chosen, counts, None if parameters is None else list(parameters))
        tensors = list(parts.values())
    if not found.shared:
        return None
    whole = Partition.by_model(found.shared)
    if among is None:
        rows = trunk_rows(tensors, found, Jacobian(found.shared, len(tensors)), keep=True)
        return rows.gramian(whole)[0].cpu()
    summed = among.rows(found.shared, len(tensors), whole, None)
    products = trunk_rows(tensors, found, summed, among, keep=True).gramian(whole)
    return (among.total(products) if summed.partial else products)[0].cpu()
