"""The small U-Net."""

from __future__ import annotations

import torch

from benchmark.networks import check_dropout, check_gradients, count, shapes
from detente.benchmark.models.unet import UNet

CHANNELS = {"segmentation": 8, "depth": 1, "normals": 3}


def test_parameters():
    """Seven 3 x 3 convolutions with batch norm, and three linear layers on 16 channels."""
    blocks = ((3, 16), (16, 32), (32, 64), (64, 128), (192, 64), (96, 32), (48, 16))
    assert count(UNet(CHANNELS)) == sum(9 * a * b + 2 * b for a, b in blocks) + (16 + 1) * 12 == 243_260


def test_shapes_and_width():
    images = torch.randn(2, 3, 64, 48)
    assert shapes(UNet(CHANNELS)(images)) == {task: (2, c, 64, 48) for task, c in CHANNELS.items()}
    narrow, plain, wide = (count(UNet(CHANNELS, width=width)) for width in (0.01, 1.0, 2.0))
    assert narrow < plain
    assert 3.9 < wide / plain < 4.0  # weights between channels grow with the square
    assert shapes(UNet(CHANNELS, width=0.01)(images))["depth"] == (2, 1, 64, 48)


def test_gradients_and_dropout():
    torch.manual_seed(0)
    images = torch.randn(2, 3, 16, 16)
    check_gradients(UNet(CHANNELS), images)
    check_dropout(lambda rate: UNet(CHANNELS, dropout=rate), images)
