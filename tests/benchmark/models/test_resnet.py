"""Residual networks, and heads for dense tasks."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from benchmark.networks import check_dropout, check_gradients, count, shapes
from detente.benchmark.models.resnet import (
    BasicBlock,
    Bottleneck,
    DenseModel,
    ResNet,
    ResNetClassifier,
    resnet18,
    resnet50,
)

TASKS = {"semseg": 21, "parts": 7, "normals": 3}


@pytest.mark.parametrize(
    ("layers", "block", "published"),
    [((2, 2, 2, 2), BasicBlock, 11_689_512), ((3, 4, 6, 3), Bottleneck, 25_557_032)],
)
def test_parameters_with_the_imagenet_classifier(layers: tuple[int, ...], block: type, published: int):
    """torchvision's num_params of ResNet18_Weights and ResNet50_Weights IMAGENET1K_V1."""
    assert count(ResNetClassifier(layers, block)) == published


def test_parameters_have_torchvisions_names():
    names = set(resnet50(width=0.05).state_dict())
    assert {
        "conv1.weight",
        "bn1.running_var",
        "layer1.0.downsample.0.weight",
        "layer1.0.downsample.1.bias",
        "layer2.3.bn3.weight",
        "layer4.2.conv3.weight",
    } <= names
    assert len(names) == 318  # of torchvision's 320: without fc.weight and fc.bias
    assert len(resnet18(width=0.05).state_dict()) == 120  # of 122


def test_maps():
    images = torch.randn(1, 3, 64, 96)
    strides = (4, 8, 16, 32)
    trunk = resnet18(width=0.25)
    assert trunk.features == [16, 32, 64, 128]
    assert shapes(trunk(images)) == [(1, c, 64 // s, 96 // s) for c, s in zip(trunk.features, strides, strict=True)]
    trunk = resnet50(width=0.0625, channels=1)
    assert trunk.features == [16, 32, 64, 128]
    assert shapes(trunk(images[:, :1]))[-1] == (1, 128, 2, 3)
    assert ResNetClassifier((1, 1, 1, 1), BasicBlock, classes=5, width=0.1)(images).shape == (1, 5)


@pytest.mark.parametrize("make", [resnet18, resnet50])
def test_dilation_keeps_an_eighth_and_sees_as_far(make: Callable[..., ResNet]):
    """Dilated features are those of the strided network at the places that both have: Yu & Koltun, ICLR 2016."""
    torch.manual_seed(0)
    plain, dilated = make(width=0.125).eval(), make(width=0.125, dilated=True).eval()
    dilated.load_state_dict(plain.state_dict())
    images = torch.randn(1, 3, 128, 128)
    with torch.no_grad():
        coarse, fine = plain(images), dilated(images)
    assert [x.shape[-1] for x in fine] == [32, 16, 16, 16]
    for number, step in enumerate((1, 1, 2, 4)):
        torch.testing.assert_close(fine[number][..., ::step, ::step], coarse[number])


def test_gradients_reach_everything():
    torch.manual_seed(0)
    for block in (BasicBlock, Bottleneck):
        check_gradients(ResNetClassifier((1, 2, 1, 1), block, classes=3, width=0.1), torch.randn(4, 3, 64, 64))


@pytest.mark.parametrize("head", ["fused", "deeplab"])
def test_heads(head: str):
    torch.manual_seed(0)
    images = torch.randn(2, 3, 48, 64)

    def make(rate: float) -> DenseModel:
        return DenseModel(ResNet((1, 1, 1, 1), BasicBlock, width=0.1, dilated=True), TASKS, rate, head)

    assert shapes(make(0.0)(images)) == {task: (2, size, 48, 64) for task, size in TASKS.items()}
    check_gradients(make(0.0), images)
    check_dropout(make, images)


def test_parameters_of_heads():
    """HRNetV2's (Sun et al. 2019) fused head has two 1 x 1 convolutions on all channels; DeepLabv3's (Chen et al. 2017)
    pyramid has five branches and its head one more convolution, all of 256 channels."""
    trunk = ResNet((1, 1, 1, 1), BasicBlock, width=0.125)
    total, last = sum(trunk.features), trunk.features[-1]
    fused, deeplab = (count(DenseModel(trunk, {"a": 5}, head=head).heads) for head in ("fused", "deeplab"))
    assert fused == total * total + 2 * total + (total + 1) * 5
    assert deeplab == 2 * 256 * last + 3 * 9 * 256 * last + 5 * 256**2 + 9 * 256**2 + 7 * 512 + (256 + 1) * 5


def test_unknown_head():
    with pytest.raises(ValueError, match="fused, deeplab"):
        DenseModel(resnet18(width=0.01), TASKS, head="other")
