"""The tasks' gradients side by side: their Gramian, of the whole model and of its layers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from detente.engine.distributed import Counts, Processes
from detente.engine.graph import listed, reach
from detente.engine.jacobian import Jacobian
from detente.engine.rows import Scattered
from detente.engine.source import Head, task_rows
from detente.gramian import Partition
from detente.losses import named_losses
from detente.watch import Seen

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["Gradients", "seen", "take_gradients", "task_gramian"]


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
    found = seen(losses, shared, counts=counts, parameters=parameters, group=group)
    if not found.found.shared:
        return None
    return take_gradients(found, Partition.by_model).gramians[0]


def seen(
    losses: Mapping[str, Tensor] | Sequence[Tensor],
    shared: Iterable[Tensor] | None = None,
    *,
    counts: Counts | None = None,
    parameters: Iterable[Tensor] | None = None,
    group: ProcessGroup | None = None,
    scale: float = 1.0,
) -> Seen:
    """Losses and what they reach, as :func:`detente.backward` would see them."""
    among = Processes.of(group)
    chosen = None if shared is None else listed(shared)
    if among is None:
        named = named_losses(losses)
        return Seen(named, reach(list(named.values()), chosen), None, scale)
    with among.failing_together():
        named = named_losses(losses, any_number=True)
    parts, found = among.join(named, chosen, counts, None if parameters is None else list(parameters))
    return Seen(parts, found, among, scale)


@dataclass(frozen=True)
class Gradients:
    """The task gradients of one step.

    Attributes:
        rows: those of the shared parameters.
        heads: those of the others, where they were asked for.
        gramians: ``[B, T, T]`` float64 CPU tensor.
    """

    rows: Jacobian | Scattered
    heads: list[Head]
    gramians: Tensor


def take_gradients(
    step: Seen, partition: Callable[[Sequence[Tensor]], Partition], *, whole: bool = False, heads: bool = False
) -> Gradients:
    """One backward pass per task, which keeps the graph and writes no ``.grad``.

    Args:
        step: the losses.
        partition: the blocks of shared parameters to take Gramians of.
        whole: whether every process needs whole rows.
        heads: whether to take the gradients of parameters that one loss alone reaches, too.
    """
    found, among, tensors = step.found, step.among, list(step.named.values())
    shared, count = found.shared, len(tensors)
    blocks = partition(shared)
    if among is None:
        rows: Jacobian | Scattered = Jacobian(shared, count)
    else:
        blocks = among.agreed(blocks, shared)
        rows = among.rows(shared, count, blocks, None, whole=whole)
    taken = task_rows(tensors, found, rows, among, keep=True, heads=heads)
    products = rows.gramian(blocks)
    products = among.total(products) if among is not None and rows.partial else products
    return Gradients(rows, taken, products.cpu() / step.scale**2)
