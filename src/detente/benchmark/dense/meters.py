"""Figures of tasks with a value for every pixel, added up batch by batch. They need at least one valid pixel.

They are pooled over the valid pixels of the whole set, as those of `detente.benchmark.metrics`, whose outputs would not
fit into memory.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from detente.benchmark import metrics as measure

__all__ = ["AngleMeter", "ClassMeter", "DepthMeter", "EdgeMeter", "Meter", "SaliencyMeter"]


class Meter(Protocol):
    """Adds up what figures are made of, over the batches of an evaluation."""

    def add(self, found: Tensor, target: Tensor) -> None: ...

    def figures(self) -> dict[str, float]: ...


class ClassMeter:
    def __init__(self, classes: int) -> None:
        self.confusion: Tensor | float = 0.0
        self.classes = classes

    def add(self, found: Tensor, target: Tensor) -> None:
        self.confusion = self.confusion + measure.confusion(found, target, self.classes)

    def figures(self) -> dict[str, float]:
        return measure.overlap(torch.as_tensor(self.confusion))


class DepthMeter:
    def __init__(self) -> None:
        self.sums: Tensor | float = 0.0
        self.seen = 0

    def add(self, found: Tensor, target: Tensor) -> None:
        truth = target[target > 0].double()
        error = (found[target > 0].double() - truth).abs()
        self.sums = self.sums + torch.stack([error.sum(), (error / truth).sum(), error.square().sum()])
        self.seen += len(truth)

    def figures(self) -> dict[str, float]:
        absolute, relative, square = (torch.as_tensor(self.sums) / self.seen).tolist()
        return {"absolute_error": absolute, "relative_error": relative, "rmse": math.sqrt(square)}


class AngleMeter:
    """Exact sums, and a histogram of bins of .01 degrees for the median."""

    BINS = 18_000

    def __init__(self) -> None:
        self.sums: Tensor | float = 0.0
        self.bins: Tensor | float = 0.0
        self.seen = 0

    def add(self, found: Tensor, target: Tensor) -> None:
        angles = measure.valid_angles(found, target)
        within = [(angles < limit).double().sum() for limit in (11.25, 22.5, 30.0)]
        self.sums = self.sums + torch.stack([angles.sum(), *within])
        bins = (angles * self.BINS / 180).long().clamp_max(self.BINS - 1)
        self.bins = self.bins + torch.bincount(bins, minlength=self.BINS)
        self.seen += len(angles)

    def figures(self) -> dict[str, float]:
        mean, *within = (torch.as_tensor(self.sums) / self.seen).tolist()
        below = torch.as_tensor(self.bins).cumsum(0)
        median = (int((below < (self.seen + 1) / 2).sum()) + 0.5) * 180 / self.BINS
        names = ("mean_angle", "median_angle", "within_11", "within_22", "within_30")
        return dict(zip(names, (mean, median, *within), strict=True))


class MaskMeter:
    """Pixels that are on, found, and both, at every threshold of the probability."""

    def __init__(self, thresholds: Sequence[float]) -> None:
        self.thresholds = torch.tensor(thresholds)

    def counted(self, found: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Both [B, T], found [B, T] and on [B, 1]."""
        level = torch.bucketize(found.squeeze(1).sigmoid(), self.thresholds.to(found.device))
        right, wrong = self._above(level, target == 1), self._above(level, target == 0)
        return right, right + wrong, (target == 1).sum((1, 2)).double().unsqueeze(1)

    def _above(self, level: Tensor, chosen: Tensor) -> Tensor:
        """How many chosen pixels of each image are above each threshold, float64 [B, T]."""
        images, size = len(level), len(self.thresholds) + 1
        place = level + size * torch.arange(images, device=level.device)[:, None, None]
        counts = torch.bincount(place[chosen], minlength=images * size).view(images, size).double()
        return counts.flip(1).cumsum(1).flip(1)[:, 1:]


class EdgeMeter(MaskMeter):
    def __init__(self, thresholds: Sequence[float]) -> None:
        super().__init__(thresholds)
        self.right: Tensor | float = 0.0
        self.total: Tensor | float = 0.0

    def add(self, found: Tensor, target: Tensor) -> None:
        right, seen, on = self.counted(found, target)
        self.right = self.right + right.sum(0)
        self.total = self.total + (seen + on).sum(0)

    def figures(self) -> dict[str, float]:
        return {"max_f": float((2 * torch.as_tensor(self.right) / torch.as_tensor(self.total).clamp_min(1)).max())}


class SaliencyMeter(MaskMeter):
    def __init__(self, thresholds: Sequence[float]) -> None:
        super().__init__(thresholds)
        self.sums: Tensor | float = 0.0
        self.images = 0

    def add(self, found: Tensor, target: Tensor) -> None:
        right, seen, on = self.counted(found, target)
        either = seen + on - right
        overlap = torch.where(either > 0, right / either.clamp_min(1), 1.0)  # nothing on and nothing found is right
        self.sums = self.sums + torch.stack([right / seen.clamp_min(1), right / on.clamp_min(1), overlap]).sum(1)
        self.images += len(target)

    def figures(self) -> dict[str, float]:
        precision, recall, overlap = torch.as_tensor(self.sums) / self.images
        f = 2 * precision * recall / (precision + recall).clamp_min(1e-12)
        return {"miou": float(overlap.max()), "max_f": float(f.max())}
