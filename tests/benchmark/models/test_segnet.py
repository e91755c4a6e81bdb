"""SegNet, plain and with MTAN's attention."""

from __future__ import annotations

import pytest
import torch

from benchmark.networks import check_dropout, check_gradients, count, shapes
from detente.benchmark.models.segnet import SegNet

NYUV2 = {"segmentation": 13, "depth": 1, "normals": 3}
CITYSCAPES = {"segmentation": 7, "depth": 1}
SINGLE = 24_981_069  # what MTAN's code divides parameter counts by


def test_parameters_of_a_single_task():
    """Liu et al.'s (2019) published unit is SegNet with the head for NYUv2's 13 classes."""
    assert count(SegNet({"segmentation": 13})) == SINGLE


@pytest.mark.parametrize(("channels", "published"), [(NYUV2, "1.77"), (CITYSCAPES, "1.65")])
def test_parameters_of_mtan(channels: dict[str, int], published: str):
    """Column #P of Liu et al. (2019), tables of NYUv2 (13 classes) and Cityscapes (7 classes): parameters of MTAN in
    units of one single-task network."""
    assert f"{count(SegNet(channels, attention=True)) / SINGLE:.2f}" == published


def test_shapes():
    with torch.no_grad():
        found = SegNet(CITYSCAPES, attention=True).eval()(torch.randn(1, 3, 128, 256))
        assert shapes(found) == {"segmentation": (1, 7, 128, 256), "depth": (1, 1, 128, 256)}
        found = SegNet(NYUV2, width=0.1).eval()(torch.randn(1, 3, 288, 384))
        assert shapes(found) == {task: (1, size, 288, 384) for task, size in NYUV2.items()}


def test_unpooling_puts_features_where_they_were():
    """Of two images that differ in one corner, the outputs differ there and not far away."""
    torch.manual_seed(0)
    model = SegNet({"depth": 1}, width=0.1).eval()
    images = torch.zeros(1, 3, 32, 512)
    moved = images.clone()
    moved[..., :32] = 1
    difference = (model(images)["depth"] - model(moved)["depth"]).abs()
    assert difference[..., :32].max() > 0
    assert difference[..., -32:].max() == 0


def test_a_mask_is_its_tasks_own():
    torch.manual_seed(0)
    model = SegNet(NYUV2, attention=True, width=0.05).eval()
    images = torch.randn(2, 3, 32, 32)
    before = model(images)
    with torch.no_grad():
        for stage in [*model.attention.down, *model.attention.up]:
            for parameter in stage["depth"].parameters():
                parameter.add_(torch.randn_like(parameter))
    after = model(images)
    assert {task: torch.equal(before[task], after[task]) for task in NYUV2} == {
        "segmentation": True,
        "depth": False,
        "normals": True,
    }


@pytest.mark.parametrize("attention", [False, True])
def test_gradients_width_and_dropout(attention: bool):
    torch.manual_seed(0)
    images = torch.randn(2, 3, 64, 64)
    check_gradients(SegNet(NYUV2, attention, width=0.1), images)
    check_dropout(lambda rate: SegNet(NYUV2, attention, width=0.1, dropout=rate), images)
    assert count(SegNet(NYUV2, attention, width=0.5)) < count(SegNet(NYUV2, attention)) / 3.9
    assert shapes(SegNet({"depth": 1}, attention, width=0.001)(images)) == {"depth": (2, 1, 64, 64)}
