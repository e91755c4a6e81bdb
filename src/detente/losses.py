"""The losses of a step, checked and named."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor

__all__ = ["Losses", "check_finite", "named_losses", "without_graph"]

Losses = Mapping[str, Tensor] | Sequence[Tensor]


def named_losses(losses: Losses, *, any_number: bool = False) -> dict[str, Tensor]:
    """Check the losses and give them names; there is at least one, or ``any_number``."""
    if isinstance(losses, Tensor) or not isinstance(losses, Mapping | Sequence):
        raise TypeError(
            f"losses must be a dict {{task: loss}} or a sequence of losses; got {type(losses).__name__}. "
            "Pass the tasks' losses separately, not their sum."
        )
    named = dict(losses) if isinstance(losses, Mapping) else {str(i): loss for i, loss in enumerate(losses)}
    if not named and not any_number:
        raise ValueError("losses is empty; pass at least one loss.")
    for task, loss in named.items():
        if not isinstance(task, str):
            raise TypeError(f"task names must be strings; got {task!r}.")
        if not isinstance(loss, Tensor):
            raise TypeError(
                f"losses[{task!r}] must be a scalar tensor; got {type(loss).__name__}. Did you call .item()?"
            )
        if loss.numel() != 1:
            raise ValueError(
                f"losses[{task!r}] must be a scalar tensor; it has shape {tuple(loss.shape)}. Did you forget .mean()?"
            )
        if loss.is_complex() or not loss.is_floating_point():
            raise TypeError(f"losses[{task!r}] must be real and floating; it has dtype {loss.dtype}.")
        if not loss.requires_grad:
            raise ValueError(
                f"losses[{task!r}] has no autograd graph. Was it computed under torch.no_grad(), from detached "
                "tensors, or by a model whose parameters are all frozen? Leave such a task out of the step."
            )
    return named


def check_finite(losses: Mapping[str, Tensor]) -> None:
    """Raise where a loss is NaN or infinite."""
    for task, loss in losses.items():
        value = float(loss.detach())
        if not math.isfinite(value):
            raise FloatingPointError(
                f"losses[{task!r}] is {value}. Lower the learning rate, clip gradients, or look for a division by zero "
                "or log(0) in this loss. Nothing was written. (Under a gradient scaler pass scale=scaler.get_scale(), "
                "and the step is skipped instead.)"
            )


T = TypeVar("T")


def without_graph(compute: Callable[[], T]) -> T:
    """What ``compute`` returns, without building a graph unless it takes derivatives itself (losses of PINNs)."""
    try:
        with torch.no_grad():
            return compute()
    except RuntimeError as error:
        if "does not require grad" not in str(error):
            raise
    return compute()
