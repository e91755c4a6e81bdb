"""detente inside training frameworks: ``lightning``, ``accelerate``, ``transformers``, each imported on request."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.amp import GradScaler

from detente.losses import Losses, named_losses
from detente.method import Method, Update

__all__ = ["by_task", "figures", "load_state_dict", "next_epoch", "refuse_schedules", "scaled", "state_dict", "summed"]


def figures(update: Update) -> dict[str, float]:
    """What to log of a step: ``weights/{task}`` (their mean where there are blocks), and ``conflicts``.

    Example:
        >>> import torch, detente
        >>> shared = torch.ones(2, requires_grad=True)
        >>> update = detente.backward({"a": shared.sum(), "b": -shared[0]}, detente.CAGrad())
        >>> sorted(figures(update)), figures(update)["conflicts"]
        (['conflicts', 'weights/a', 'weights/b'], 1.0)
    """
    found = {f"weights/{task}": float(weight.mean()) for task, weight in update.weights.items()}
    if "conflicts" in update.stats:  # not known to methods that never form the task gradients
        found["conflicts"] = float(update.stats["conflicts"])
    return found


def by_task(losses: Losses) -> dict[str, Tensor]:
    """``{task: loss}``, checked where there is a graph; in evaluation there is none."""
    if torch.is_grad_enabled() or isinstance(losses, Tensor):
        return named_losses(losses, any_number=True)
    return dict(losses) if isinstance(losses, Mapping) else {str(i): loss for i, loss in enumerate(losses)}


def scaled(losses: Losses, scaler: GradScaler | None, steps: int = 1) -> tuple[dict[str, Tensor], float]:
    """The losses as a framework scales its one loss, by the batches of a step and a gradient scaler; and the factor."""
    named = by_task(losses)
    if steps != 1:
        named = {task: loss / steps for task, loss in named.items()}
    if scaler is None:
        return named, 1 / steps
    # the scaler's own product: in float32, whatever the dtype of the loss
    return {task: scaler.scale(loss) for task, loss in named.items()}, scaler.get_scale() / steps


def summed(losses: Losses) -> Tensor:
    """The loss that a framework knows of: for its hooks, its progress bar and its logs."""
    return sum(by_task(losses).values(), torch.zeros(()))


def keepers(method: Method, options: Mapping[str, Any]) -> dict[str, Any]:
    """What has a history: the method, and the ``source`` and ``weighting`` among the options."""
    named = {"method": method, "source": options.get("source"), "weighting": options.get("weighting")}
    return {name: keeper for name, keeper in named.items() if hasattr(keeper, "state_dict")}


def state_dict(method: Method, options: Mapping[str, Any]) -> dict[str, Any]:
    """All history, for a checkpoint."""
    return {name: keeper.state_dict() for name, keeper in keepers(method, options).items()}


def load_state_dict(method: Method, options: Mapping[str, Any], state: Mapping[str, Any]) -> None:
    """Take over a saved history."""
    for name, keeper in keepers(method, options).items():
        keeper.load_state_dict(state[name])


def next_epoch(method: Method, options: Mapping[str, Any]) -> None:
    """Tell everything that works by epochs that one ended."""
    for keeper in keepers(method, options).values():
        if isinstance(keeper, Method):
            keeper.next_epoch()


def refuse_schedules(method: Method, options: Mapping[str, Any]) -> None:
    """Raise where nobody would give a method what it needs after the optimizer's step; it would never learn."""
    for keeper in keepers(method, options).values():
        if isinstance(keeper, Method) and "losses after the step" in keeper.needs:
            raise RuntimeError(
                f"{keeper.name} needs the losses after the optimizer's step, which this loop does not compute. "
                "Use detente.step(closure, optimizer, method) in a loop of your own."
            )
