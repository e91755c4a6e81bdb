"""The nine-layer network of CelebA."""

from __future__ import annotations

import torch

from benchmark.networks import check_dropout, check_gradients, count, shapes
from detente.benchmark.models.celeba import CelebANet

ATTRIBUTES = tuple(f"attribute_{number}" for number in range(40))


def test_parameters_of_famo():
    """Layers of Liu et al. (2023, FAMO): seven convolutions, two linear layers without bias, 40 logits."""
    convolutions = ((3, 64), (64, 128), (128, 128), (128, 256), (256, 256), (256, 512), (512, 512))
    trunk = sum(9 * a * b + 2 * b for a, b in convolutions) + 2 * (512 * 512 + 2 * 512)
    assert count(CelebANet(ATTRIBUTES)) == trunk + 40 * (512 + 1) == 5_197_160


def test_shapes_and_width():
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert shapes(CelebANet(ATTRIBUTES)(images)) == dict.fromkeys(ATTRIBUTES, (2,))
    assert shapes(CelebANet(("Smiling",), width=0.001)(images)) == {"Smiling": (2,)}
    assert count(CelebANet(("Smiling",), width=0.5)) < count(CelebANet(("Smiling",))) / 3


def test_gradients_and_dropout():
    torch.manual_seed(0)
    images = torch.randn(8, 3, 32, 32)
    check_gradients(CelebANet(ATTRIBUTES[:2], width=0.25), images)
    check_dropout(lambda rate: CelebANet(ATTRIBUTES[:2], rate, width=0.25), images)
