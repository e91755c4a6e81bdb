"""Into ``.grad``, as ``loss.backward()`` leaves it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from detente.engine.distributed import Processes

__all__ = ["accumulate", "pull", "zero_missing"]


def accumulate(gradients: Mapping[int, tuple[Tensor, Tensor]], *, ours: bool = False) -> None:
    """Add to ``.grad`` as autograd does, in the memory format of the parameter.

    With ``ours`` nobody else has the gradients, and one that is laid out as its parameter becomes its ``.grad``. What
    autograd returns may be one tensor for two parameters.
    """
    for p, gradient in gradients.values():
        gradient = gradient.detach()
        if p.grad is not None:
            p.grad.add_(gradient)
        elif gradient.layout != torch.strided or (ours and gradient.stride() == p.stride()):
            p.grad = gradient
        else:
            p.grad = torch.empty_like(p).copy_(gradient)


def pull(
    outputs: Sequence[Tensor] | Sequence[GradientEdge],
    gradients: Sequence[Tensor],
    leaves: Sequence[Tensor],
    among: Processes | None = None,
) -> None:
    """Add to ``.grad`` of the leaves what these gradients of the outputs give: for all of them, or for none.

    Autograd itself accumulates where nothing is there yet, which saves a copy of every gradient. With several
    processes the gradients are those of the whole batch.
    """
    if among is not None:
        found = among.gradients(outputs, leaves, gradients)
        accumulate({id(p): (p, g) for p, g in zip(leaves, found, strict=True)}, ours=True)
    elif all(p.grad is None for p in leaves) and not _initialized():
        try:
            torch.autograd.backward(outputs, gradients, inputs=leaves)
        except BaseException:
            for p in leaves:
                p.grad = None
            raise
    else:
        taken = torch.autograd.grad(outputs, leaves, gradients, allow_unused=True)
        accumulate({id(p): (p, g) for p, g in zip(leaves, taken, strict=True) if g is not None})


def _initialized() -> bool:
    """Whether hooks of DistributedDataParallel may wait for parameters that are not in a pass."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def zero_missing(parameters: Sequence[Tensor]) -> None:
    """Give zeros to those without a gradient: a shared parameter always has one after a step."""
    for p in parameters:
        if p.grad is None:
            p.grad = torch.zeros_like(p)
