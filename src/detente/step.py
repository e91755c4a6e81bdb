"""One whole training step: forward, backward and the optimizer, in the order a method's schedule wants."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Protocol

import torch
from torch import Tensor

from detente.backward import check_finite, named_losses, run
from detente.engine.source import Sampled
from detente.method import LossWeighting, Method, Update, require_method

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
    require_method(method)
    if method.requires_step and (weighting is not None or source != "parameters"):
        raise ValueError(f"weighting and source do not apply to the tasks' own steps of {method.name}; leave them out.")
    before = method.get_extra_state() if method.requires_step else None
    if not method.sequential():
        losses = closure(None)
        optimizer.zero_grad(set_to_none=True)
        update = run(losses, method, shared, source, granularity, weighting)
        optimizer.step()
        return update
    weights: dict[str, Tensor] = {}
    try:
        for task, loss in _one_by_one(closure, method.sequential_tasks()):
            # heads of the other tasks keep gradient None, so that no optimizer moves them
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            weights[task] = torch.ones((), dtype=torch.float64)
    except Exception:
        if not weights:
            method.set_extra_state(before)  # nothing has been trained: the draw of the phase was for nothing
        raise
    return Update(weights, None, {"backwards": len(weights), "sequential": True})


def _one_by_one(closure: Closure, tasks: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
    """The loss of each task, computed when its turn comes; tasks for which the closure returns nothing are left out."""
    for task in tasks:
        losses = dict(closure((task,)))
        if not losses:
            continue
        named_losses(losses)
        if set(losses) != {task}:
            raise ValueError(
                f"closure(tasks=({task!r},)) must return the loss of that task alone; got {sorted(losses)}. "
                "Compute only the losses named in `tasks`."
            )
        check_finite(losses)
        yield task, losses[task]
