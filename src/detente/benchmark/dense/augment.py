"""Random mirroring, scaling, rotation and cropping of an image together with its targets."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

__all__ = ["Augmented", "Follows", "Warp"]

Sample = tuple[Tensor, ...]


class Follows(Protocol):
    """Says what becomes of a target."""

    def mirrored(self, target: Tensor) -> Tensor: ...

    def warped(self, target: Tensor, warp: Warp) -> Tensor: ...


class Augmented(Dataset[Sample]):
    """Samples that are mirrored (half of them), scaled, rotated and cropped at random, whenever they are read.

    Args:
        data: samples (image [3, H, W], targets).
        kinds: of the targets.
        scales: factors to draw from; the crop, of the original size, lies anywhere in the scaled image.
        between: draw any factor from the first to the last of ``scales``.
        degrees: rotations up to so many either way.
    """

    def __init__(
        self,
        data: Dataset[Sample],
        kinds: Sequence[Follows],
        scales: Sequence[float] = (1.0,),
        between: bool = False,
        degrees: float = 0.0,
    ) -> None:
        self.data, self.kinds, self.scales, self.between, self.degrees = data, kinds, scales, between, degrees

    def __len__(self) -> int:
        return len(self.data)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> Sample:
        image, *targets = self.data[index]
        mirror, size, turn, *shift = torch.rand(5).tolist()
        if mirror < 0.5:
            image = image.flip(-1)
            targets = [kind.mirrored(target) for kind, target in zip(self.kinds, targets, strict=True)]
        if self.between:
            scale = self.scales[0] + size * (self.scales[-1] - self.scales[0])
        else:
            scale = self.scales[int(size * len(self.scales))]
        angle = math.radians(self.degrees) * (2 * turn - 1)
        if scale == 1 and angle == 0:
            return (image, *targets)
        warp = Warp((image.shape[-2], image.shape[-1]), scale, angle, [2 * s - 1 for s in shift])
        targets = [kind.warped(target, warp) for kind, target in zip(self.kinds, targets, strict=True)]
        return (warp(image, "bilinear"), *targets)


class Warp:
    """Scales and rotates maps [C, H, W] about a point, keeping their size; what comes from outside is 0.

    Args:
        size: (H, W).
        scale: above 1 things become larger.
        angle: of the rotation, in radians.
        shift: where the point lies, right and down, in -1..1 of the room that the scale leaves.
    """

    def __init__(self, size: tuple[int, int], scale: float, angle: float, shift: Sequence[float]) -> None:
        self.scale, self.cos, self.sin = scale, math.cos(angle), math.sin(angle)
        aspect, room = (size[0] - 1) / (size[1] - 1), max(0.0, 1 - 1 / scale)
        cos, sin = self.cos / scale, self.sin / scale
        to_source = torch.tensor([[cos, -sin * aspect, room * shift[0]], [sin / aspect, cos, room * shift[1]]])
        self.grid = F.affine_grid(to_source.unsqueeze(0), [1, 1, *size], align_corners=True)

    def __call__(self, maps: Tensor, mode: str) -> Tensor:
        return F.grid_sample(maps.unsqueeze(0), self.grid, mode=mode, align_corners=True).squeeze(0)
