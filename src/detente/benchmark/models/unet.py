"""A small U-Net for several dense tasks (after Ronneberger et al., MICCAI 2015, arXiv 1505.04597)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detente.benchmark.models import layers
from detente.benchmark.models.layers import block, scaled


class UNet(nn.Module):
    """Encoder-decoder with skip connections, shared but for one linear layer per task.

    Maps [B, 3, H, W] to {task: [B, channels[task], H, W]}; H and W must be multiples of 8.

    Args:
        channels: channels of each task's output.
        width: multiplies the channels of the levels: 16, 32, 64 and 128.
        dropout: rate before the tasks' layers.
    """

    def __init__(self, channels: Mapping[str, int], width: float = 1.0, dropout: float = 0.0) -> None:
        super().__init__()
        a, b, c, d = (scaled(level, width) for level in (16, 32, 64, 128))
        self.down = nn.ModuleList([block(3, a), block(a, b), block(b, c), block(c, d)])
        self.up = nn.ModuleList([block(d + c, c), block(c + b, b), block(b + a, a)])
        self.dropout = layers.dropout(dropout)
        self.heads = nn.ModuleDict({task: nn.Conv2d(a, outputs, 1) for task, outputs in channels.items()})

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        levels = [self.down[0](image.contiguous(memory_format=torch.channels_last))]  # a third faster on CPUs
        for stage in self.down[1:]:
            levels.append(stage(F.max_pool2d(levels[-1], 2)))
        x = levels.pop()
        for stage in self.up:
            x = stage(torch.cat([F.interpolate(x, scale_factor=2.0), levels.pop()], dim=1))
        x = self.dropout(x)
        return {task: head(x) for task, head in self.heads.items()}
