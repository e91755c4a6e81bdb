"""Pictures as targets and as the input of trunks."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["direction", "padded", "picture"]

MEAN, DEVIATION = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
"""Of ImageNet's colours, to which published trunks are used."""


def picture(array: Any) -> Tensor:
    """A picture uint8 [H, W, 3] as [3, H, W], with ImageNet's mean and deviation taken out."""
    colours: Tensor = (torch.from_numpy(array).float() / 255 - MEAN) / DEVIATION
    return colours.permute(2, 0, 1)


def direction(array: Any) -> Tensor:
    """A picture uint8 [H, W, 3] of directions as unit vectors [3, H, W]; those of next to no length become 0."""
    vectors: Tensor = torch.from_numpy(array).permute(2, 0, 1).float() / 127.5 - 1
    length = vectors.norm(dim=0)
    return torch.where(length > 0.1, vectors / length.clamp_min(0.1), 0.0)


def padded(maps: Tensor, size: tuple[int, int], fill: float) -> Tensor:
    """Maps [..., h, w] in the middle of [..., H, W] that are ``fill`` elsewhere."""
    height, width = size[0] - maps.shape[-2], size[1] - maps.shape[-1]
    return F.pad(maps, (width // 2, width - width // 2, height // 2, height - height // 2), value=fill)
