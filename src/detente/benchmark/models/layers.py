"""Pieces that several of the networks are made of."""

from __future__ import annotations

from torch import nn


def scaled(channels: int, width: float) -> int:
    """``channels`` times ``width``, rounded, at least 1."""
    return max(1, round(channels * width))


def dropout(rate: float) -> nn.Module:
    """Dropout; at rate 0 nothing, which draws no random numbers."""
    return nn.Dropout(rate) if rate else nn.Identity()


def conv(inputs: int, outputs: int, kernel: int = 3, stride: int = 1, dilation: int = 1) -> nn.Conv2d:
    """Convolution without bias (batch norm follows) that keeps the size, divided by ``stride``."""
    return nn.Conv2d(inputs, outputs, kernel, stride, dilation * (kernel // 2), dilation, bias=False)


def block(inputs: int, outputs: int, kernel: int = 3, stride: int = 1, dilation: int = 1) -> nn.Sequential:
    """Convolution, batch norm and ReLU."""
    return nn.Sequential(conv(inputs, outputs, kernel, stride, dilation), nn.BatchNorm2d(outputs), nn.ReLU())


def initialise(model: nn.Module) -> None:
    """He et al.'s (2015) normal weights for the convolutions, as residual networks start from."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
