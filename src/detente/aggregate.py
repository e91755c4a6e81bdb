"""A method's rule on given task gradients."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from detente.engine.jacobian import Jacobian
from detente.method import Context, GramianMethod, LossWeighting, Method, need_losses, require_method
from detente.resolve import first_weights, resolve

__all__ = ["aggregate"]


def aggregate(jacobian: Tensor, method: Method, losses: Sequence[float] | Tensor | None = None) -> Tensor:
    """Apply a method's rule to given task gradients.

    Args:
        jacobian: ``[T, P]``, one row per task.
        method: a method of this library.
        losses: ``[T]`` loss values, for methods that need them.

    Returns:
        The update ``[P]``, in the dtype and on the device of ``jacobian``; all NaN where an entry of ``jacobian``
        is not finite.

    Raises:
        ValueError: shapes do not fit, or the method needs losses or a model.

    Example:
        >>> import torch, detente
        >>> J = torch.tensor([[2.0, 0.0], [0.0, 2.0]])
        >>> detente.aggregate(J, detente.MGDA()).tolist()
        [1.0, 1.0]
    """
    require_method(method)
    if not isinstance(jacobian, Tensor) or jacobian.dim() != 2 or not jacobian.is_floating_point():
        got = f"{tuple(jacobian.shape)}, {jacobian.dtype}" if isinstance(jacobian, Tensor) else type(jacobian).__name__
        raise ValueError(f"jacobian must be a floating tensor of shape [T, P]; got {got}.")
    if len(jacobian) == 0:
        raise ValueError(f"jacobian has no rows, its shape is {tuple(jacobian.shape)}; pass at least one task.")
    jacobian = jacobian.detach()
    if "model" in method.needs:
        raise ValueError(f"{method.name} works on the layers of a model; use detente.backward or detente.step.")
    count = len(jacobian)
    values = None if losses is None else torch.as_tensor(losses, dtype=torch.float64).cpu()
    if values is not None and values.shape != (count,):
        raise ValueError(f"losses must have shape ({count},), one per row of jacobian; got {tuple(values.shape)}.")
    context = Context(tuple(str(i) for i in range(count)), losses=values)
    # elsewhere the Gramian tells
    if (not isinstance(method, GramianMethod) or method.transforms) and not bool(jacobian.isfinite().all()):
        return torch.full_like(jacobian[0], math.nan)
    if not isinstance(method, GramianMethod):
        assert isinstance(method, LossWeighting)
        if values is None and "losses" in method.needs:
            raise ValueError(f"{method.name} needs the losses of the step; pass losses=[...] beside the gradients.")
        weights = method.weights(torch.ones(count, dtype=torch.float64) if values is None else values, context)
        return weights.to(jacobian.device, jacobian.dtype) @ jacobian
    matrix = jacobian.detach()
    if method.transforms:
        matrix = matrix.clone(memory_format=torch.contiguous_format)
    rows = Jacobian([matrix[0]], count, rows=matrix)
    partition = method.partition(rows.parameters, context.tasks, "model")
    first = torch.ones(count, dtype=torch.float64)
    context.sizes = tuple(buffer.shape[1] for buffer in rows.buffers)
    method.check(context)
    blocks = rows.gramian(partition)
    blocks = blocks if method.on_device else blocks.cpu()
    if method.own_weighting is not None:
        need_losses(method.own_weighting, context)
        method.own_weighting.check(context)
        finite = values is not None and bool(values.isfinite().all() & blocks.isfinite().all())
        first = first_weights(method.own_weighting if finite else None, context)
        context = replace(context, losses=None if values is None else values * first)
    first = first.to(blocks.device)
    blocks = blocks * first.unsqueeze(1) * first
    with torch.autocast(jacobian.device.type, enabled=False):
        _, updates = resolve(rows, method, blocks, partition, context, first, 1.0, True)
    return updates[0]
