"""HRNet: a trunk that keeps a high resolution beside lower ones and exchanges between them.

Sun et al., "High-Resolution Representations for Labeling Pixels and Regions", 2019, arXiv 1904.04514. Layers and names
of the parameters as in github.com/HRNet/HRNet-Image-Classification, so that its weights can be loaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import cast

import torch.nn.functional as F
from torch import Tensor, nn

from detente.benchmark.models.layers import block, conv, initialise
from detente.benchmark.models.resnet import BasicBlock, Bottleneck

SIZES = {False: (4, (1, 4, 3)), True: (2, (1, 3, 2))}  # small: blocks of a branch, exchanges of each stage


class HRNet(nn.Module):
    """Maps [B, 3, H, W] to four feature maps, at 1/4, 1/8, 1/16 and 1/32 of the size.

    Args:
        width: channels of the first map; each next one has twice as many.
        small: the shallower HRNet-W18-Small-v2. The "HRNet-18" of MTI-Net's code and of those who build on it
            (github.com/SimonVandenhende/Multi-Task-Learning-PyTorch, models/model_info/hrnet_w18.yml) is this one.

    Attributes:
        features: channels of the four maps.
    """

    def __init__(self, width: int = 18, small: bool = False) -> None:
        super().__init__()
        blocks, exchanges = SIZES[small]
        self.features = [width * 2**level for level in range(4)]
        self.conv1 = conv(3, 64, 3, 2)
        self.bn1 = nn.BatchNorm2d(64)
        self.conv2 = conv(64, 64, 3, 2)
        self.bn2 = nn.BatchNorm2d(64)
        self.layer1 = nn.Sequential(Bottleneck(64, 64), *(Bottleneck(256, 64) for _ in range(blocks - 1)))
        branches = [[256], *(self.features[:count] for count in (2, 3, 4))]
        self.transition1, self.transition2, self.transition3 = map(_transition, branches[:-1], branches[1:])
        self.stage2, self.stage3, self.stage4 = (
            nn.Sequential(*(Exchange(channels, blocks) for _ in range(count)))
            for channels, count in zip(branches[1:], exchanges, strict=True)
        )
        initialise(self)

    def forward(self, images: Tensor) -> list[Tensor]:
        x = F.relu(self.bn1(self.conv1(images)))
        maps: list[Tensor] = [self.layer1(F.relu(self.bn2(self.conv2(x))))]
        stages = ((self.transition1, self.stage2), (self.transition2, self.stage3), (self.transition3, self.stage4))
        for transition, stage in stages:
            maps = stage([step(x) for step, x in zip(transition, [*maps, maps[-1]], strict=True)])
        return maps


class HRNetClassifier(nn.Module):
    """HRNet-W-C: class scores [B, classes] from all maps, downsampled one after the other and added."""

    def __init__(self, width: int = 18, classes: int = 1000, small: bool = False) -> None:
        super().__init__()
        self.trunk = HRNet(width, small)
        inner = (32, 64, 128, 256)
        outer = [size * Bottleneck.expansion for size in inner]
        self.grow = nn.ModuleList(map(Bottleneck, self.trunk.features, inner))
        self.down = nn.ModuleList(
            nn.Sequential(nn.Conv2d(a, b, 3, 2, 1), nn.BatchNorm2d(b), nn.ReLU()) for a, b in pairwise(outer)
        )
        self.last = nn.Sequential(nn.Conv2d(outer[-1], 2048, 1), nn.BatchNorm2d(2048), nn.ReLU())
        self.classifier = nn.Linear(2048, classes)

    def forward(self, images: Tensor) -> Tensor:
        x, *others = (grow(x) for grow, x in zip(self.grow, self.trunk(images), strict=True))
        for down, other in zip(self.down, others, strict=True):
            x = other + down(x)
        return cast(Tensor, self.classifier(self.last(x).mean((2, 3))))


class Exchange(nn.Module):
    """Residual blocks on every branch, and then each branch's sum of all, brought to its size and channels."""

    def __init__(self, channels: Sequence[int], blocks: int) -> None:
        super().__init__()
        self.branches = nn.ModuleList(nn.Sequential(*(BasicBlock(c, c) for _ in range(blocks))) for c in channels)
        levels = range(len(channels))
        self.fuse_layers = nn.ModuleList(
            nn.ModuleList(_fuse(channels, source, target) for source in levels) for target in levels
        )

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        maps = [branch(x) for branch, x in zip(self.branches, maps, strict=True)]
        fused = []
        for steps, like in zip(self.fuse_layers, maps, strict=True):
            first, *others = (_grow(step(x), like) for step, x in zip(cast(nn.ModuleList, steps), maps, strict=True))
            fused.append(F.relu(sum(others, first)))
        return fused


def _fuse(channels: Sequence[int], source: int, target: int) -> nn.Module:
    """From branch ``source`` to ``target``: strided 3 x 3 convolutions down, a 1 x 1 convolution up."""
    if source == target:
        return nn.Identity()
    if source > target:
        return nn.Sequential(conv(channels[source], channels[target], 1), nn.BatchNorm2d(channels[target]))
    steps: list[nn.Module] = [block(channels[source], channels[source], 3, 2) for _ in range(target - source - 1)]
    last = nn.Sequential(conv(channels[source], channels[target], 3, 2), nn.BatchNorm2d(channels[target]))
    return nn.Sequential(*steps, last)


def _transition(before: Sequence[int], now: Sequence[int]) -> nn.ModuleList:
    """From the maps of one stage to those of the next, which has one more, made from the smallest."""
    steps: list[nn.Module] = [
        nn.Identity() if old == new else block(old, new) for old, new in zip(before, now[: len(before)], strict=True)
    ]
    return nn.ModuleList([*steps, nn.Sequential(block(before[-1], now[-1], 3, 2))])


def _grow(x: Tensor, like: Tensor) -> Tensor:
    if x.shape[-2:] == like.shape[-2:]:
        return x
    return F.interpolate(x, like.shape[-2:], mode="bilinear", align_corners=False)
