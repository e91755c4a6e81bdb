"""The bird's-eye-view network looks up the right pixels, and its size follows its settings."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from detente.benchmark.models.bev import BEVNet, lift

SIZE = (64, 96)  # height, width
# looks along x from the origin with a focal length of 50 pixels: x right is -y, y down is -z
AHEAD = torch.tensor([[48.0, -50.0, 0.0, 0.0], [32.0, 0.0, -50.0, 0.0], [1.0, 0.0, 0.0, 0.0]])
BACK = AHEAD * torch.tensor([-1.0, -1.0, 1.0, 1.0])


def ramp(stride: int) -> Tensor:
    """Features [2, h, w] that are the coordinates, in pixels of the image, of each place."""
    y, x = (torch.arange(0, side, stride) + stride / 2 for side in SIZE)
    return torch.stack(torch.meshgrid(x, y, indexing="xy"))


def at(*points: tuple[float, float, float]) -> Tensor:
    return torch.tensor(points)[None, :, None]  # [Z=1, X=n, Y=1, 3]


@pytest.mark.parametrize("stride", [1, 8])
def test_a_point_gets_the_features_of_the_pixel_that_shows_it(stride: int):
    points = at((10.0, 0.0, 0.0), (10.0, 2.0, 0.0), (5.0, -1.0, -1.0))
    found = lift(ramp(stride)[None, None], AHEAD[None, None], points, SIZE)
    torch.testing.assert_close(found[0, :, :, 0].T, torch.tensor([[48.0, 32.0], [38.0, 32.0], [58.0, 42.0]]))


def test_what_no_camera_shows_is_zero_and_what_several_show_is_their_mean():
    # behind; beside the view; in the camera; and one point ahead
    points = at((-10.0, 0.0, 0.0), (10.0, 9.7, 0.0), (0.05, 0.0, 0.0), (10.0, 0.0, 0.0))
    features = torch.stack([torch.ones(1, 8, 12), 3 * torch.ones(1, 8, 12)])[None]
    one = lift(features[:, :1], AHEAD[None, None], points, SIZE)
    assert one.flatten().tolist() == [0, 0, 0, 1]
    both = lift(features, torch.stack([AHEAD, BACK])[None], points, SIZE)
    assert both.flatten().tolist() == [3, 0, 0, 1]
    twice = lift(features, torch.stack([AHEAD, AHEAD])[None], points, SIZE)
    assert twice.flatten().tolist() == [0, 0, 0, 2]


def test_heights_become_channels_and_samples_stay_apart():
    points = torch.stack([torch.tensor([10.0, y, z]) for z in (0.0, 1.0) for y in (0.0, 1.0)]).view(2, 1, 2, 3)
    features = torch.stack([ramp(8), 2 * ramp(8)])[:, None]
    found = lift(features, AHEAD.expand(2, 1, 3, 4), points, SIZE)
    assert found.shape == (2, 4, 1, 2)
    torch.testing.assert_close(found[0, :, 0], torch.tensor([[48.0, 43.0], [32.0, 32.0], [48.0, 43.0], [27.0, 27.0]]))
    torch.testing.assert_close(found[1], 2 * found[0])


def test_geometry_is_exact_under_autocast():
    points, features = at((40.0, 1.0, 0.0), (40.0, 1.3, 0.0)), ramp(8)[None, None]
    with torch.autocast("cpu", torch.bfloat16):
        found = lift(features, AHEAD[None, None], points, SIZE)
    torch.testing.assert_close(found, lift(features, AHEAD[None, None], points, SIZE))


@pytest.mark.parametrize("cells", [12, 13])
def test_the_network_maps_cameras_to_the_ground(cells: int):
    torch.manual_seed(0)
    centres = [k - cells / 2 + 0.5 for k in range(cells)]
    model = BEVNet({"map": 3, "vehicles": 7}, centres, width=0.125)
    images, projections = torch.randn(2, 3, 3, *SIZE), torch.stack([AHEAD, BACK, AHEAD]).expand(2, 3, 3, 4)
    output = model(images, projections)
    assert {task: tuple(x.shape) for task, x in output.items()} == {
        "map": (2, 3, cells, cells),
        "vehicles": (2, 7, cells, cells),
    }
    torch.stack([x.square().mean() for x in output.values()]).sum().backward()
    assert all(p.grad is not None for name, p in model.named_parameters())
    assert "points" not in model.state_dict()


def test_width_scales_the_trunk_and_dropout_adds_no_parameters():
    def parameters(**options: float) -> int:
        return sum(p.numel() for p in BEVNet({"map": 3}, [0.0], **options).parameters())

    plain = parameters()
    assert 13e6 < plain < 14e6  # ResNet-18's 11.2 million and 2.2 million on the ground
    assert 3.8 < parameters(width=2.0) / plain < 4.1
    assert parameters(dropout=0.5) == plain
