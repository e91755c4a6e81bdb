"""Residual networks as trunks, and heads for dense tasks on the feature maps of any trunk.

He et al., "Deep Residual Learning for Image Recognition", CVPR 2016, arXiv 1512.03385. The names of the parameters are
torchvision's, so that weights saved from its models can be loaded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detente.benchmark.models import layers as pieces
from detente.benchmark.models.layers import conv, initialise, scaled


class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions and the identity (or a 1 x 1 convolution where the shape changes).

    ``dilations`` are those of the two convolutions.
    """

    expansion = 1

    def __init__(self, inputs: int, inner: int, stride: int = 1, dilations: tuple[int, int] = (1, 1)) -> None:
        super().__init__()
        self.conv1 = conv(inputs, inner, 3, stride, dilations[0])
        self.bn1 = nn.BatchNorm2d(inner)
        self.conv2 = conv(inner, inner, 3, 1, dilations[1])
        self.bn2 = nn.BatchNorm2d(inner)
        self.downsample = _shortcut(inputs, inner, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.downsample(x))


class Bottleneck(nn.Module):
    """A 3 x 3 convolution, which has the stride, between two of 1 x 1; the last has four times the channels."""

    expansion = 4

    def __init__(self, inputs: int, inner: int, stride: int = 1, dilations: tuple[int, int] = (1, 1)) -> None:
        super().__init__()
        outputs = inner * self.expansion
        self.conv1 = conv(inputs, inner, 1)
        self.bn1 = nn.BatchNorm2d(inner)
        self.conv2 = conv(inner, inner, 3, stride, dilations[0])
        self.bn2 = nn.BatchNorm2d(inner)
        self.conv3 = conv(inner, outputs, 1)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.downsample = _shortcut(inputs, outputs, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(y)))
        return F.relu(self.bn3(self.conv3(y)) + self.downsample(x))


def _shortcut(inputs: int, outputs: int, stride: int) -> nn.Module:
    if stride == 1 and inputs == outputs:
        return nn.Identity()
    return nn.Sequential(conv(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs))


Residual = type[BasicBlock] | type[Bottleneck]


class ResNet(nn.Module):
    """Maps [B, channels, H, W] to the feature maps of the four stages, at 1/4, 1/8, 1/16 and 1/32 of the size.

    Args:
        layers: blocks of each stage.
        block: :class:`BasicBlock` or :class:`Bottleneck`.
        width: multiplies all channels.
        channels: channels of the images.
        dilated: the last two stages keep 1/8 of the size, and dilate instead.

    Attributes:
        features: channels of the four maps.
    """

    def __init__(
        self, layers: Sequence[int], block: Residual, width: float = 1.0, channels: int = 3, dilated: bool = False
    ) -> None:
        super().__init__()
        inners = [scaled(inner, width) for inner in (64, 128, 256, 512)]
        self.features = [inner * block.expansion for inner in inners]
        self.conv1 = conv(channels, inners[0], 7, 2)
        self.bn1 = nn.BatchNorm2d(inners[0])
        stages = []
        inputs, dilation = inners[0], 1
        for number, (inner, blocks) in enumerate(zip(inners, layers, strict=True)):
            stride, before = (2 if number else 1), dilation
            if dilated and number > 1:
                stride, dilation = 1, 2 * dilation
            first = block(inputs, inner, stride, (before, dilation))
            inputs = inner * block.expansion
            others = (block(inputs, inner, 1, (dilation, dilation)) for _ in range(blocks - 1))
            stages.append(nn.Sequential(first, *others))
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        initialise(self)

    def forward(self, images: Tensor) -> list[Tensor]:
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(images))), 3, 2, 1)
        maps = []
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = stage(x)
            maps.append(x)
        return maps


class ResNetClassifier(nn.Module):
    """Class scores [B, classes] from the mean of a trunk's last map; arguments of :class:`ResNet` and ``classes``."""

    def __init__(self, layers: Sequence[int], block: Residual, classes: int = 1000, **options: Any) -> None:
        super().__init__()
        self.trunk = ResNet(layers, block, **options)
        self.fc = nn.Linear(self.trunk.features[-1], classes)

    def forward(self, images: Tensor) -> Tensor:
        return cast(Tensor, self.fc(self.trunk(images)[-1].mean((2, 3))))


def resnet18(**options: Any) -> ResNet:
    """ResNet-18 without its classifier; options of :class:`ResNet`."""
    return ResNet((2, 2, 2, 2), BasicBlock, **options)


def resnet50(**options: Any) -> ResNet:
    """ResNet-50 without its classifier; options of :class:`ResNet`."""
    return ResNet((3, 4, 6, 3), Bottleneck, **options)


class DenseHeads(nn.Module):
    """From a trunk's maps to {task: [B, channels[task], H, W]}, resized bilinearly to a given size.

    Args:
        features: channels of the trunk's maps.
        channels: channels of each task's output.
        dropout: rate within each head.
        head: "fused" (HRNetV2: all maps at the size of the first, and two 1 x 1 convolutions) or "deeplab" (DeepLabv3,
            Chen et al., arXiv 1706.05587: a pyramid on the last map; its dropout is 0.5; in training it needs batches
            of two).
    """

    def __init__(
        self,
        features: Sequence[int],
        channels: Mapping[str, int],
        dropout: float = 0.0,
        head: Literal["fused", "deeplab"] = "fused",
    ) -> None:
        super().__init__()
        if head not in HEADS:
            raise ValueError(f"head must be one of {', '.join(HEADS)}; got {head!r}.")
        self.fused = head == "fused"
        self.heads = nn.ModuleDict({task: HEADS[head](features, size, dropout) for task, size in channels.items()})

    def forward(self, maps: Sequence[Tensor], size: tuple[int, int]) -> dict[str, Tensor]:
        x = maps[-1]
        if self.fused:
            x = torch.cat([_resize(one, maps[0].shape[-2:]) for one in maps], dim=1)
        return {task: _resize(head(x), size) for task, head in self.heads.items()}


class DenseModel(nn.Module):
    """A trunk that lists its maps' channels in ``features`` (:class:`ResNet`, HRNet), and :class:`DenseHeads` on it.

    Maps images [B, 3, H, W] to {task: [B, channels[task], H, W]}; arguments of :class:`DenseHeads` follow ``trunk``.
    """

    def __init__(
        self,
        trunk: nn.Module,
        channels: Mapping[str, int],
        dropout: float = 0.0,
        head: Literal["fused", "deeplab"] = "fused",
    ) -> None:
        super().__init__()
        self.trunk = trunk
        self.heads = DenseHeads(cast(Sequence[int], trunk.features), channels, dropout, head)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return cast(dict[str, Tensor], self.heads(self.trunk(images), images.shape[-2:]))


class Pyramid(nn.Module):
    """A map seen through a 1 x 1 convolution, three dilated ones and its mean; [B, outputs, H, W]."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        dilated = (pieces.block(inputs, outputs, dilation=rate) for rate in (12, 24, 36))
        self.branches = nn.ModuleList([pieces.block(inputs, outputs, 1), *dilated])
        self.mean = nn.Sequential(nn.AdaptiveAvgPool2d(1), pieces.block(inputs, outputs, 1))
        self.join = pieces.block(5 * outputs, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        seen = [branch(x) for branch in self.branches]
        return cast(Tensor, self.join(torch.cat([*seen, self.mean(x).expand_as(seen[0])], dim=1)))


def _fused(features: Sequence[int], outputs: int, dropout: float) -> nn.Sequential:
    total = sum(features)
    return nn.Sequential(pieces.block(total, total, 1), pieces.dropout(dropout), nn.Conv2d(total, outputs, 1))


def _deeplab(features: Sequence[int], outputs: int, dropout: float) -> nn.Sequential:
    pyramid = Pyramid(features[-1], 256)
    return nn.Sequential(pyramid, pieces.dropout(dropout), pieces.block(256, 256), nn.Conv2d(256, outputs, 1))


HEADS = {"fused": _fused, "deeplab": _deeplab}


def _resize(x: Tensor, size: Sequence[int]) -> Tensor:
    return F.interpolate(x, list(size), mode="bilinear", align_corners=False)
