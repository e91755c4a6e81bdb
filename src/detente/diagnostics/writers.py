"""The main figures of a record, for TensorBoard, Weights & Biases and their like."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

from detente.diagnostics.recording import pairs

__all__ = ["Writer", "scalars", "write"]


@runtime_checkable
class AddsScalars(Protocol):
    """As TensorBoard's ``SummaryWriter``."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> Any: ...


@runtime_checkable
class LogsMappings(Protocol):
    """As a run of Weights & Biases."""

    def log(self, data: dict[str, Any], step: int) -> Any: ...


Writer = AddsScalars | LogsMappings


def write(writer: Writer, values: Mapping[str, float], step: int) -> None:
    """Hand over the figures of a step."""
    if isinstance(writer, AddsScalars):
        for name, value in values.items():
            writer.add_scalar(name, value, step)
    else:
        writer.log(dict(values), step=step)


def scalars(entry: Mapping[str, Any]) -> dict[str, float]:
    """``conflict/{what}``, by task or pair of tasks; layers stay in the file."""
    tasks = entry["tasks"]
    found: dict[str, float] = {}
    for what in ("losses", "norms", "predicted", "realised", "curvature"):
        for task, value in zip(tasks, entry.get(what, ()), strict=False):
            found[f"conflict/{what}/{task}"] = value
    cosines = entry.get("cosines", ())
    for (i, j), value in zip(pairs(len(tasks)), cosines, strict=False):
        found[f"conflict/cosine/{tasks[i]}-{tasks[j]}"] = value
    if cosines:
        found["conflict/rate"] = sum(value < 0 for value in cosines) / len(cosines)
    for task, weight in entry.get("weights", {}).items():
        found[f"conflict/weights/{task}"] = weight
    return found
