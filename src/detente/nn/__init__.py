"""Modules that let one trunk treat its tasks differently: norms and layers per task, and the papers' architectures."""

from detente.nn.cross_stitch import CrossStitch, CrossStitchUnit
from detente.nn.experts import CGC, MMoE
from detente.nn.mtan import MTAN, AttentionModule
from detente.nn.rotograd import RotoGrad
from detente.nn.task_layers import TaskLayer, convert_task_layers
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
    "CGC",
    "MTAN",
    "AttentionModule",
    "CrossStitch",
    "CrossStitchUnit",
    "MMoE",
    "RotoGrad",
    "TaskBatchNorm1d",
    "TaskBatchNorm2d",
    "TaskLayer",
    "TaskLayerNorm",
    "TaskNorm",
    "TaskRMSNorm",
    "active_task",
    "convert_task_layers",
    "convert_task_norm",
]
