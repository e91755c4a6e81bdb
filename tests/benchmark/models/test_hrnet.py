"""HRNet."""

from __future__ import annotations

import pytest
import torch

from benchmark.networks import check_gradients, count, shapes
from detente.benchmark.models.hrnet import HRNet, HRNetClassifier
from detente.benchmark.models.resnet import DenseModel


@pytest.mark.parametrize(("small", "published"), [(False, 21_299_004), (True, 15_597_464)])
def test_parameters_with_the_imagenet_classifier(small: bool, published: int):
    """HRNet-W18-C has 21.3 M in the table of its authors (github.com/HRNet/HRNet-Image-Classification); their code
    prints 21,299,004. The tables of github.com/osmr/imgclsmob say the same, and 15,597,464 for HRNet-W18-Small-v2."""
    assert count(HRNetClassifier(small=small)) == published


def test_parameters_have_the_authors_names():
    names = set(HRNet(small=True).state_dict())
    assert {
        "conv2.weight",
        "layer1.0.downsample.0.weight",
        "transition1.0.0.weight",
        "transition1.1.0.0.weight",
        "transition3.3.0.1.bias",
        "stage2.0.branches.1.1.conv2.weight",
        "stage3.2.fuse_layers.0.2.0.weight",
        "stage3.0.fuse_layers.2.0.0.0.weight",
        "stage3.0.fuse_layers.2.0.1.1.running_mean",
        "stage4.1.branches.3.1.bn2.weight",
    } <= names
    assert not any(name.startswith(("transition2.0", "transition3.1", "stage2.0.fuse_layers.0.0")) for name in names)


def test_maps():
    trunk = HRNet(small=True)
    assert trunk.features == [18, 36, 72, 144]
    with torch.no_grad():
        found = shapes(trunk.eval()(torch.randn(1, 3, 96, 64)))
    assert found == [(1, 18, 24, 16), (1, 36, 12, 8), (1, 72, 6, 4), (1, 144, 3, 2)]
    assert count(HRNet(width=9)) < count(HRNet()) / 3


def test_dense_tasks_at_the_size_of_nyud():
    channels = {"semseg": 40, "depth": 1, "normals": 3, "edge": 1}
    model = DenseModel(HRNet(width=4, small=True), channels).eval()
    with torch.no_grad():
        found = model(torch.randn(1, 3, 448, 576))
    assert shapes(found) == {task: (1, size, 448, 576) for task, size in channels.items()}


def test_gradients_reach_everything():
    torch.manual_seed(0)
    check_gradients(DenseModel(HRNet(width=4, small=True), {"depth": 1}), torch.randn(2, 3, 64, 64))
    check_gradients(HRNetClassifier(width=4, classes=3, small=True), torch.randn(2, 3, 64, 64))
