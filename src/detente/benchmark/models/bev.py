"""Bird's-eye-view network: a car's cameras in, maps of the ground around it out.

Images go through one ResNet-18; every cell of the grid collects what the cameras show at its place, at a few heights,
by bilinear sampling, as in Harley et al., "Simple-BEV", ICRA 2023. This has no parameters, unlike the depths that
Philion & Fidler, "Lift, Splat, Shoot", ECCV 2020, predict. A small U-Net over the ground and a head per task follow.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detente.benchmark.models import layers
from detente.benchmark.models.layers import block, scaled
from detente.benchmark.models.resnet import resnet18

__all__ = ["BEVNet", "lift"]

HEIGHTS = (-1.0, 0.0, 1.0, 2.0)  # metres above the car's ground: roads slope, vehicles stand up
NEAREST = 0.1  # metres in front of a camera, where its view begins


class BEVNet(nn.Module):
    """Maps images [B, N, 3, H, W] of N cameras and projections [B, N, 3, 4] to {task: [B, channels[task], x, y]}.

    Args:
        channels: channels of each task's output.
        centres: coordinates of the cells' centres along either axis, metres.
        width: multiplies the channels of all layers but the last.
        dropout: rate before each task's last convolution.
    """

    points: Tensor

    def __init__(
        self, channels: Mapping[str, int], centres: Sequence[float], width: float = 1.0, dropout: float = 0.0
    ) -> None:
        super().__init__()
        a, b, c = (scaled(level, width) for level in (64, 128, 256))
        self.encoder = resnet18(width=width)
        self.necks = nn.ModuleList([nn.Conv2d(features, a, 1) for features in self.encoder.features[1:]])
        self.flatten = block(len(HEIGHTS) * a, a, 1)
        self.down = nn.ModuleList([_double(a, a), _double(a, b), _double(b, c)])
        self.up = nn.ModuleList([_double(c + b, b), _double(b + a, a)])
        self.heads = nn.ModuleDict(
            {
                task: nn.Sequential(block(a, a), layers.dropout(dropout), nn.Conv2d(a, outputs, 1))
                for task, outputs in channels.items()
            }
        )
        axis = torch.as_tensor(centres, dtype=torch.float32)
        z, x, y = torch.meshgrid(torch.tensor(HEIGHTS), axis, axis, indexing="ij")
        self.register_buffer("points", torch.stack([x, y, z], dim=-1), persistent=False)

    def forward(self, images: Tensor, projections: Tensor) -> dict[str, Tensor]:
        maps = self.encoder(images.flatten(0, 1))[1:]
        size = maps[0].shape[-2:]
        necked = [neck(x) for neck, x in zip(self.necks, maps, strict=True)]
        features = torch.stack([F.interpolate(x, size=size, mode="bilinear") for x in necked]).sum(0)
        features = features.view(*images.shape[:2], *features.shape[1:])
        x = self.flatten(lift(features, projections, self.points, images.shape[-2:]))
        levels = [self.down[0](x)]
        for stage in self.down[1:]:
            levels.append(stage(F.max_pool2d(levels[-1], 2)))
        x = levels.pop()
        for stage in self.up:
            skip = levels.pop()
            x = stage(torch.cat([F.interpolate(x, size=skip.shape[-2:]), skip], dim=1))
        return {task: head(x) for task, head in self.heads.items()}


def lift(features: Tensor, projections: Tensor, points: Tensor, size: Sequence[int]) -> Tensor:
    """Camera features [B, N, C, h, w] at points [Z, X, Y, 3] in the car's frame, as [B, Z * C, X, Y].

    Each is the mean over the cameras that see the point, and zero where none does. ``projections`` [B, N, 3, 4] give
    (pixel x, pixel y, 1) times depth for images of ``size`` (height, width), whatever the size of the feature maps.
    """
    heights, rows, columns, _ = points.shape
    total = features.new_zeros(len(features), features.shape[2], heights * rows, columns)
    seen = features.new_zeros(len(features), 1, heights * rows, columns)
    for camera in range(features.shape[1]):  # one at a time: all samples at once would not fit
        places, visible = _project(projections[:, camera], points.reshape(heights * rows, columns, 3), size)
        found = F.grid_sample(features[:, camera], places.to(features.dtype), align_corners=False)
        total = total + found * visible[:, None]
        seen = seen + visible[:, None]
    mean = (total / seen.clamp_min(1)).view(*total.shape[:2], heights, rows, columns)
    return mean.transpose(1, 2).flatten(1, 2)


def _project(projection: Tensor, points: Tensor, size: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Places [B, ..., 2] of points [..., 3] in the image, -1 to 1 from edge to edge, and whether it shows them."""
    with torch.autocast(points.device.type, enabled=False):  # bfloat16 would be metres off
        scaled_pixels = torch.einsum("bij,rcj->brci", projection[:, :, :3], points) + projection[:, None, None, :, 3]
    depth = scaled_pixels[..., 2:]
    half = scaled_pixels.new_tensor([size[1] / 2, size[0] / 2])
    places = scaled_pixels[..., :2] / depth.clamp_min(NEAREST) / half - 1
    visible = (depth[..., 0] > NEAREST) & (places.abs() <= 1).all(-1)
    return places.clamp(-2, 2), visible


def _double(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(block(inputs, outputs), block(outputs, outputs))
