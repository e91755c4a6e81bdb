"""Into ``.grad``, as ``loss.backward()`` leaves it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

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
    outputs: Sequence[Tensor] | Sequence[GradientEdge], gradients: Sequence[Tensor], leaves: Sequence[Tensor]
) -> None:
    """Add to ``.grad`` of the leaves what these gradients of the outputs give: for all of them, or for none.

    Autograd itself accumulates where nothing is there yet, which saves a copy of every gradient.
    """
    if all(p.grad is None for p in leaves):
        try:
            torch.autograd.backward(outputs, gradients, inputs=leaves)
        except BaseException:
            for p in leaves:
                p.grad = None
            raise
    else:
        found = torch.autograd.grad(outputs, leaves, gradients, allow_unused=True)
        accumulate({id(p): (p, g) for p, g in zip(leaves, found, strict=True) if g is not None})


def zero_missing(parameters: Sequence[Tensor]) -> None:
    """Give zeros to those without a gradient: a shared parameter always has one after a step."""
    for p in parameters:
        if p.grad is None:
            p.grad = torch.zeros_like(p)
