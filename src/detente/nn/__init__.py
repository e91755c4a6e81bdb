"""Modules that let one trunk treat its tasks differently: one normalisation per task."""

from detente.nn.task_norm import (
    TaskBatchNorm1d,
    TaskBatchNorm2d,
    TaskLayerNorm,
    TaskNorm,
    TaskRMSNorm,
    active_task,
    convert_task_norm,
)

__all__ = [
    "TaskBatchNorm1d",
    "TaskBatchNorm2d",
    "TaskLayerNorm",
    "TaskNorm",
    "TaskRMSNorm",
    "active_task",
    "convert_task_norm",
]
