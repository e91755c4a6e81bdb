"""Kinds of tasks with a value for every pixel: loss, figures, and what augmentation does to the target.

A batch is (image [B, 3, H, W], one target per task). Losses are means over the valid pixels of a batch, and 0 without
any.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from detente.benchmark.dense.augment import Augmented, Warp
from detente.benchmark.dense.meters import AngleMeter, ClassMeter, DepthMeter, EdgeMeter, Meter, SaliencyMeter

__all__ = ["IGNORE", "Classes", "Dense", "Depth", "Edges", "Kind", "Normals", "Saliency"]

Sample = tuple[Tensor, ...]

IGNORE = -1
"""The label of pixels without one."""


class Kind(ABC):
    """One task: its output's channels, loss, figures, and what augmentation does to its target.

    Attributes:
        channels: of the output.
        figures: ``{metric: "max" or "min"}``.
        weight: the published factor of the loss.
    """

    channels = 1
    figures: Mapping[str, str]
    weight = 1.0

    @abstractmethod
    def valid(self, target: Tensor) -> Tensor:
        """Whether each pixel is labelled, bool [B, H, W]."""

    @abstractmethod
    def error(self, found: Tensor, target: Tensor, valid: Tensor) -> Tensor:
        """The loss of each pixel [B, H, W]; whatever where it is not valid."""

    @abstractmethod
    def meter(self) -> Meter: ...

    def loss(self, found: Tensor, target: Tensor) -> Tensor:
        """Mean loss of the valid pixels."""
        valid = self.valid(target)
        full = found.to(torch.promote_types(found.dtype, torch.float32))
        error = torch.where(valid, self.error(full, target, valid), 0.0)
        return self.weight * error.sum() / valid.sum().clamp_min(1)

    def mirrored(self, target: Tensor) -> Tensor:
        return target.flip(-1)

    @abstractmethod
    def warped(self, target: Tensor, warp: Warp) -> Tensor: ...


class Labels(Kind):
    """Targets are int64 [B, H, W]; pixels labelled IGNORE have none."""

    def valid(self, target: Tensor) -> Tensor:
        return target != IGNORE

    def warped(self, target: Tensor, warp: Warp) -> Tensor:
        shifted = (target - IGNORE).float().unsqueeze(0)  # outside is 0, which becomes IGNORE
        return warp(shifted, "nearest").squeeze(0).long() + IGNORE


class Classes(Labels):
    """One of several classes per pixel: cross-entropy; mIoU and pixel accuracy."""

    def __init__(self, classes: int, weight: float = 1.0, figures: Sequence[str] = ("miou", "pixel_accuracy")) -> None:
        self.channels, self.weight = classes, weight
        self.figures = dict.fromkeys(figures, "max")

    def error(self, found: Tensor, target: Tensor, valid: Tensor) -> Tensor:
        return F.cross_entropy(found, target, ignore_index=IGNORE, reduction="none")

    def meter(self) -> Meter:
        return ClassMeter(self.channels)


class Depth(Kind):
    """Depth [B, 1, H, W], 0 where unknown: L1; mean absolute and relative error, or the root of the mean square."""

    def __init__(self, figures: Sequence[str] = ("absolute_error", "relative_error")) -> None:
        self.figures = dict.fromkeys(figures, "min")

    def valid(self, target: Tensor) -> Tensor:
        return target.squeeze(1) > 0

    def error(self, found: Tensor, target: Tensor, valid: Tensor) -> Tensor:
        return (found - target).abs().squeeze(1)

    def meter(self) -> Meter:
        return DepthMeter()

    def warped(self, target: Tensor, warp: Warp) -> Tensor:
        return warp(target, "nearest") / warp.scale  # what looks larger is nearer


class Normals(Kind):
    """Directions [B, 3, H, W], zero where unknown, x to the right and y down; angles in degrees.

    Args:
        weight: factor of the loss.
        absolute: mean absolute difference of the coordinates instead of 1 - cosine.
        figures: some of ``mean_angle``, ``median_angle`` (to .01 degrees), ``within_11``, ``within_22``, ``within_30``.
    """

    channels = 3

    def __init__(
        self,
        weight: float = 1.0,
        absolute: bool = False,
        figures: Sequence[str] = ("mean_angle", "median_angle", "within_11", "within_22", "within_30"),
    ) -> None:
        self.weight, self.absolute = weight, absolute
        self.figures = {name: "max" if name.startswith("within") else "min" for name in figures}

    def valid(self, target: Tensor) -> Tensor:
        return target.any(dim=1)

    def error(self, found: Tensor, target: Tensor, valid: Tensor) -> Tensor:
        if self.absolute:
            return (F.normalize(found, dim=1) - F.normalize(target, dim=1)).abs().mean(dim=1)
        return 1 - F.cosine_similarity(found, target, dim=1)

    def meter(self) -> Meter:
        return AngleMeter()

    def mirrored(self, target: Tensor) -> Tensor:
        return super().mirrored(target) * target.new_tensor([-1.0, 1.0, 1.0])[:, None, None]

    def warped(self, target: Tensor, warp: Warp) -> Tensor:
        x, y, z = warp(target, "bilinear")
        return torch.stack([warp.cos * x + warp.sin * y, warp.cos * y - warp.sin * x, z])


class Mask(Labels):
    """Yes or no per pixel: binary cross-entropy, in which the two answers weigh differently.

    Args:
        weight: factor of the loss.
        positive: weight of a pixel that is on, 1 - positive of one that is off; by default the share of pixels that
            are off, so that both answers weigh the same in every batch (HED, Xie and Tu 2015).
    """

    names: tuple[str, ...] = ("max_f",)

    def __init__(self, weight: float = 1.0, positive: float | None = None) -> None:
        self.weight, self.positive = weight, positive
        self.figures = dict.fromkeys(self.names, "max")

    def error(self, found: Tensor, target: Tensor, valid: Tensor) -> Tensor:
        on = (target == 1).float()
        share = (valid & (target == 0)).sum() / valid.sum().clamp_min(1) if self.positive is None else self.positive
        weight = share * on + (1 - share) * (1 - on)
        return F.binary_cross_entropy_with_logits(found.squeeze(1), on, weight, reduction="none")


class Edges(Mask):
    """Boundaries. The figure is F over all pixels at the best of 99 thresholds.

    An edge found one pixel beside the true one counts as wrong, unlike in the published odsF, whose matching with a
    tolerance is MATLAB code: the two are not comparable.
    """

    def meter(self) -> Meter:
        return EdgeMeter([k / 100 for k in range(1, 100)])


class Saliency(Mask):
    """What catches the eye. Precision, recall and IoU are means over images, as published (Maninis et al. 2019).

    ``max_f`` is the F of mean precision and mean recall, ``miou`` the mean IoU, each at its best of 15 thresholds.
    """

    names = ("miou", "max_f")

    def meter(self) -> Meter:
        return SaliencyMeter([k / 20 for k in range(4, 19)])


class Dense:
    """The tasks of a problem by name, in the order of a batch's targets; gives what a problem module needs."""

    def __init__(self, kinds: Mapping[str, Kind]) -> None:
        self.kinds = dict(kinds)

    @property
    def tasks(self) -> dict[str, dict[str, str]]:
        return {task: dict(kind.figures) for task, kind in self.kinds.items()}

    def channels(self, tasks: Sequence[str]) -> dict[str, int]:
        """Channels of the outputs of ``tasks``."""
        return {task: self.kinds[task].channels for task in tasks}

    def losses(self, model: nn.Module, batch: Sequence[Tensor], tasks: Sequence[str]) -> dict[str, Tensor]:
        output, targets = model(batch[0]), self._targets(batch)
        return {task: self.kinds[task].loss(output[task], targets[task]) for task in tasks}

    def counts(self, batch: Sequence[Tensor], tasks: Sequence[str]) -> dict[str, float]:
        """Valid pixels of each task; a task without any has no loss in this batch."""
        targets = self._targets(batch)
        return {task: float(self.kinds[task].valid(targets[task]).sum()) for task in tasks}

    def metrics(self, model: nn.Module, data: Dataset[Sample], tasks: Sequence[str]) -> dict[str, dict[str, float]]:
        """Figures of the tasks.

        Raises:
            ValueError: no pixel of the whole set has a target for a task, as may be where ``partial``.
        """
        meters = {task: self.kinds[task].meter() for task in tasks}
        labelled = dict.fromkeys(tasks, 0.0)
        for batch in DataLoader(data, batch_size=8):
            output, targets = model(batch[0]), self._targets(batch)
            for task, count in self.counts(batch, tasks).items():
                meters[task].add(output[task].float(), targets[task])
                labelled[task] += count
        without = [task for task in tasks if not labelled[task]]
        if without:
            size = len(data)  # type: ignore[arg-type]
            raise ValueError(f"none of the {size} images to evaluate on has a target for {without[0]!r}; take more.")
        return {task: meter.figures() for task, meter in meters.items()}

    def splits(self, read: Mapping[str, Dataset[Sample]], **augmentation: Any) -> dict[str, Dataset[Sample]]:
        """Splits of which train is augmented; options of :class:`Augmented`."""
        return {**read, "train": Augmented(read["train"], tuple(self.kinds.values()), **augmentation)}

    def _targets(self, batch: Sequence[Tensor]) -> dict[str, Tensor]:
        return dict(zip(self.kinds, batch[1:], strict=True))
