"""One whole training step: forward, backward and the optimizer, in the order a method's schedule wants."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from detente.backward import named_losses, run
from detente.engine.source import Sampled
from detente.method import LossWeighting, Method, Update

__all__ = ["Closure", "step"]


class Closure(Protocol):
    """Computes the losses of a step: of the named tasks, or of all with ``None``."""

    def __call__(self, tasks: tuple[str, ...] | None = None) -> Mapping[str, Tensor]: ...


def step(
    closure: Closure,
    optimizer: torch.optim.Optimizer,
    method: Method,
    *,
    shared: Iterable[Tensor] | None = None,
    source: str | Sampled = "parameters",
    granularity: str | None = None,
    weighting: LossWeighting | None = None,
) -> Update:
    """Zero the gradients, compute the losses, resolve their conflicts, and step the optimizer.

    Needed for schedules that one backward pass cannot express, such as connection strength's first phase, where
    every task takes an optimizer step of its own; for all other methods the same as ``optimizer.zero_grad()``,
    :func:`detente.backward`, ``optimizer.step()``.

    Args:
        closure: ``closure(tasks=None) -> {task: loss}``; runs the forward pass for the named tasks (all with None)
            on the current batch.
        optimizer: of all parameters. It is stepped once, or once per task in a sequential step.
        method: a method of this library.
        shared, source, granularity, weighting: as in :func:`detente.backward`.

    Returns:
        The :class:`Update`; after a sequential step every weight is 1 and ``stats["sequential"]`` is True.

    Raises:
        ValueError: the closure does not return the task it was asked for; else as :func:`detente.backward`.

    Example:
        >>> import torch, detente
        >>> trunk, heads = torch.nn.Linear(3, 4), torch.nn.ModuleDict({t: torch.nn.Linear(4, 1) for t in "ab"})
        >>> optimizer = torch.optim.SGD([*trunk.parameters(), *heads.parameters()], lr=0.1)
        >>> def closure(tasks=None):
        ...     h = trunk(torch.ones(2, 3)).relu()
        ...     return {t: (heads[t](h) - 1).square().mean() for t in tasks or "ab"}
        >>> update = detente.step(closure, optimizer, detente.PCGrad())
        >>> sorted(update.weights)
        ['a', 'b']
    """
    options: dict[str, Any] = {"granularity": granularity, "weighting": weighting}
    chosen = None if shared is None else list(shared)
    if not method.sequential():
        optimizer.zero_grad(set_to_none=True)
        update = run(closure(None), method, chosen, source, **options)
        optimizer.step()
        return update
    weights: dict[str, Tensor] = {}
    for task in method.sequential_tasks():
        # heads of the other tasks keep gradient None, so that no optimizer moves them
        optimizer.zero_grad(set_to_none=True)
        losses = named_losses(closure((task,)))
        if set(losses) != {task}:
            raise ValueError(
                f"closure(tasks=({task!r},)) must return the loss of that task alone; got {sorted(losses)}. "
                "Compute only the losses named in `tasks`."
            )
        _check_finite(task, losses[task])
        losses[task].backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        weights[task] = torch.ones((), dtype=torch.float64)
    return Update(weights, None, {"backwards": len(weights), "sequential": True})


def _check_finite(task: str, loss: Tensor) -> None:
    if not bool(loss.detach().isfinite().all()):
        raise FloatingPointError(
            f"losses[{task!r}] is {float(loss)}. Lower the learning rate, clip gradients, or look for a division by "
            "zero or log(0) in this loss."
        )
