"""Where a job trains: what has to be moved there, and what is measured in another way than on the CPU."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Elsewhere", "check_device", "clock", "moved"]


def check_device(name: str) -> str:
    """The name, if this PyTorch can use the device.

    Raises:
        ValueError: there is no such device.
    """
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        why = str(error).splitlines()[0]
        raise ValueError(
            f"--device {name}: this PyTorch cannot use it ({why}). Leave it out to train on the CPU."
        ) from None
    return name


def moved(value: Any, device: torch.device, dtype: torch.dtype | None = None) -> Any:
    """Tensors, and tuples, lists and dicts of them, on the device; floating-point ones in ``dtype``, if given."""
    if isinstance(value, Tensor):
        return value.to(device, dtype if value.is_floating_point() else None)
    if isinstance(value, dict):
        return {key: moved(part, device, dtype) for key, part in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(moved(part, device, dtype) for part in value))
    if isinstance(value, list | tuple):
        return type(value)(moved(part, device, dtype) for part in value)
    return value


class Elsewhere(nn.Module):
    """A model on a device, for callers that bring their inputs and take its outputs on the CPU, as ``metrics`` does."""

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        super().__init__()
        self.model, self.device = model, device

    def forward(self, *inputs: Any, **named: Any) -> Any:
        outputs = self.model(*moved(inputs, self.device), **moved(named, self.device))
        return moved(outputs, torch.device("cpu"))


def clock(device: torch.device) -> float:
    """Seconds: of this process's own on the CPU, which others do not slow down; on a GPU once it has done its work."""
    if device.type == "cpu":
        return time.process_time()
    torch.accelerator.synchronize(device)
    return time.perf_counter()
