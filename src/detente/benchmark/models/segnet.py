"""SegNet for several dense tasks, plain or with MTAN's attention per task.

Liu, Johns and Davison, "End-to-End Multi-Task Learning with Attention", CVPR 2019, arXiv 1803.10704: the network of the
NYUv2 and Cityscapes experiments of MTAN, PCGrad, CAGrad, Nash-MTL and FAMO. Layers as in the authors' code
(github.com/lorenmt/mtan, im2im_pred/model_segnet_split.py and model_segnet_mtan.py): VGG-16's 13 convolutions, with
batch norm, and their mirror image, which puts features back where the encoder's pooling took them from.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch.nn.functional as F
from torch import Tensor, nn

from detente.benchmark.models import layers
from detente.benchmark.models.layers import scaled
from detente.nn.mtan import AttentionModule, output_layer

CHANNELS = (64, 128, 256, 512, 512)
REPEATS = (1, 1, 2, 2, 2)  # convolutions of a stage after its first


class SegNet(nn.Module):
    """Encoder and decoder shared by all tasks; two convolutions per task.

    Maps [B, 3, H, W] to {task: [B, channels[task], H, W]}; H and W must be multiples of 32. Class scores are not
    normalised, nor are normals.

    Args:
        channels: channels of each task's output.
        attention: MTAN: beside every stage each task selects from the shared features.
        width: multiplies the channels of the stages: 64, 128, 256, 512 and 512.
        dropout: rate before the tasks' convolutions.
    """

    def __init__(
        self, channels: Mapping[str, int], attention: bool = False, width: float = 1.0, dropout: float = 0.0
    ) -> None:
        super().__init__()
        sizes = [scaled(size, width) for size in CHANNELS]
        above = [sizes[0], *sizes[:-1]]  # channels of the decoder's stages
        self.encoder = nn.ModuleList(map(_stage, [3, *sizes[:-1]], sizes, REPEATS))
        self.decoder = nn.ModuleList(map(_stage, sizes, above, REPEATS))
        self.attention = Attention(tuple(channels), sizes) if attention else None
        self.dropout = layers.dropout(dropout)
        self.heads = nn.ModuleDict({task: _head(sizes[0], outputs) for task, outputs in channels.items()})
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.xavier_normal_(module.weight)
                nn.init.zeros_(cast(Tensor, module.bias))

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        x = image
        places, down, up = [], [], []
        for stage in self.encoder:
            first, last = _run(stage, x)
            x, place = F.max_pool2d(last, 2, return_indices=True)
            places.append(place)
            down.append((first, last))
        for stage in reversed(self.decoder):
            first = F.max_unpool2d(x, places.pop(), (2, 2))
            _, x = _run(stage, first)
            up.append((first, x))
        selected = dict.fromkeys(self.heads, x) if self.attention is None else self.attention(down, up)
        return {task: head(self.dropout(selected[task])) for task, head in self.heads.items()}


class Attention(nn.Module):
    """Masks per task on every stage; the convolutions between the stages are shared by the tasks.

    In the encoder a mask is computed from the stage's first features, in the decoder from what unpooling gave it.
    """

    def __init__(self, tasks: tuple[str, ...], sizes: list[int]) -> None:
        super().__init__()
        self.tasks = tasks
        above, below = [sizes[0], *sizes[:-1]], [*sizes[1:], sizes[-1]]
        before = [0, *sizes[1:]]  # channels of the task's features from the stage before
        self.down = _masks(tasks, list(map(sum, zip(sizes, before, strict=True))), sizes)
        self.down_outputs = nn.ModuleList(map(output_layer, sizes, below))
        self.up = _masks(tasks, list(map(sum, zip(sizes, above, strict=True))), above)
        self.up_outputs = nn.ModuleList(map(output_layer, sizes, above))

    def forward(self, down: list[tuple[Tensor, Tensor]], up: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
        """{task: features} of (first, last) features of the encoder's stages, and the decoder's from deepest on."""
        return {task: self._select(task, down, up) for task in self.tasks}

    def _select(self, task: str, down: list[tuple[Tensor, Tensor]], up: list[tuple[Tensor, Tensor]]) -> Tensor:
        x: Tensor | None = None
        for (first, last), masks, output in zip(down, self.down, self.down_outputs, strict=True):
            x = F.max_pool2d(output(cast(nn.ModuleDict, masks)[task](first, last, x)), 2)
        for (first, last), masks, output in zip(up, reversed(self.up), reversed(self.up_outputs), strict=True):
            x = F.interpolate(cast(Tensor, x), scale_factor=2, mode="bilinear", align_corners=True)
            x = cast(nn.ModuleDict, masks)[task](first, last, output(x))
        return cast(Tensor, x)


def _masks(tasks: tuple[str, ...], inputs: list[int], features: list[int]) -> nn.ModuleList:
    """One attention module per stage and task."""
    return nn.ModuleList(
        nn.ModuleDict({task: AttentionModule(given, masked) for task in tasks})
        for given, masked in zip(inputs, features, strict=True)
    )


def _stage(inputs: int, outputs: int, repeats: int) -> nn.ModuleList:
    """The first convolution and the others of a stage."""
    others = nn.Sequential(*(output_layer(outputs, outputs) for _ in range(repeats)))
    return nn.ModuleList([output_layer(inputs, outputs), others])


def _run(stage: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """First and last features of a stage."""
    first, others = cast(nn.ModuleList, stage)
    x = first(x)
    return x, others(x)


def _head(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, inputs, 3, padding=1), nn.Conv2d(inputs, outputs, 1))
