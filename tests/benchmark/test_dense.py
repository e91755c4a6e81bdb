"""Dense tasks: losses over valid pixels, figures that are pooled, and augmentation that keeps targets true."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import TensorDataset

from benchmark.dense_model import Pointwise
from detente.benchmark.dense.augment import Augmented, Warp
from detente.benchmark.dense.images import direction, padded
from detente.benchmark.dense.tasks import IGNORE, Classes, Dense, Depth, Edges, Kind, Normals, Saliency
from detente.benchmark.metrics import angle_errors, depth_errors, segmentation

H, W = 12, 16


def target_of(kind: Kind, images: int) -> Tensor:
    if isinstance(kind, Depth):
        return torch.rand(images, 1, H, W) * (torch.rand(images, 1, H, W) < 0.8)
    if isinstance(kind, Normals):
        return F.normalize(torch.randn(images, 3, H, W), dim=1) * (torch.rand(images, 1, H, W) < 0.8)
    return torch.randint(IGNORE, 5 if isinstance(kind, Classes) else 2, (images, H, W))


def unlabelled(kind: Kind) -> Tensor:
    return torch.zeros_like(target_of(kind, 2)) if isinstance(kind, (Depth, Normals)) else torch.full((2, H, W), IGNORE)


KINDS: dict[str, Kind] = {
    "classes": Classes(5, weight=2.0),
    "depth": Depth(),
    "cosine": Normals(),
    "absolute": Normals(weight=10.0, absolute=True),
    "edges": Edges(weight=50.0, positive=0.95),
    "saliency": Saliency(weight=5.0),
}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_losses_are_means_over_valid_pixels(kind: Kind):
    found, target = torch.randn(2, kind.channels, H, W), target_of(kind, 2)
    per_pixel = []
    on = target == 1 if target.ndim == 3 else target
    positive = 0.95 if isinstance(kind, Edges) else float((target == 0).sum() / (target >= 0).sum())
    for b in range(2):
        for y in range(H):
            for x in range(W):
                out, true = found[b, :, y, x].double(), target[b, ..., y, x].double()
                if isinstance(kind, Classes):
                    error = -out.log_softmax(0)[int(true)] if true != IGNORE else None
                elif isinstance(kind, Depth):
                    error = (out - true).abs()[0] if true > 0 else None
                elif isinstance(kind, Normals):
                    unit = out / out.norm()
                    error = (unit - true).abs().mean() if kind.absolute else 1 - unit @ true
                    error = error if true.any() else None
                else:
                    sure = F.logsigmoid(out[0] if on[b, y, x] else -out[0])
                    error = -(positive if on[b, y, x] else 1 - positive) * sure if true != IGNORE else None
                if error is not None:
                    per_pixel.append(float(error))
    assert kind.loss(found, target).item() == pytest.approx(kind.weight * sum(per_pixel) / len(per_pixel), rel=1e-5)
    assert int(kind.valid(target).sum()) == len(per_pixel)


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_without_valid_pixels_the_loss_is_zero_and_so_is_its_gradient(kind: Kind):
    found = torch.randn(2, kind.channels, H, W, requires_grad=True)
    loss = kind.loss(found, unlabelled(kind))
    loss.backward()
    assert loss == 0
    assert found.grad is not None
    assert not found.grad.any()
    assert Dense({"only": kind}).counts((found, unlabelled(kind)), ("only",)) == {"only": 0}


@pytest.mark.parametrize(
    ("kind", "whole"),
    [
        (Classes(5), lambda found, target: segmentation(found, target, 5)),
        (Depth(("absolute_error", "relative_error")), depth_errors),
        (Normals(), angle_errors),
    ],
    ids=["classes", "depth", "normals"],
)
def test_figures_of_batches_are_those_of_the_whole_set(kind: Kind, whole):
    found, target = torch.randn(20, kind.channels, H, W), target_of(kind, 20)
    meter = kind.meter()
    for some, true in zip(found.split(7), target.split(7), strict=True):
        meter.add(some, true)
    expected = whole(found, target)
    tolerance = {"median_angle": 0.01}  # the width of a bin
    for name in kind.figures:
        assert meter.figures()[name] == pytest.approx(expected[name], rel=1e-9, abs=tolerance.get(name, 1e-12))


def test_root_mean_square_error():
    meter = Depth(("rmse",)).meter()
    meter.add(torch.tensor([[[[1.0, 5.0, 9.0]]]]), torch.tensor([[[[2.0, 2.0, 0.0]]]]))
    assert meter.figures()["rmse"] == pytest.approx(math.sqrt((1 + 9) / 2))


def f_score(right: float, found: float, on: float) -> float:
    return 2 * right / (found + on)


def test_edges_are_scored_at_the_best_threshold_over_all_pixels():
    found, target = 3 * torch.randn(5, 1, H, W), target_of(Edges(), 5)
    meter = Edges().meter()
    for some, true in zip(found.split(2), target.split(2), strict=True):
        meter.add(some, true)
    labelled, chance = target != IGNORE, found[:, 0].sigmoid()
    on = labelled & (target == 1)
    scores = []
    for k in range(1, 100):
        seen = labelled & (chance > k / 100)
        scores.append(f_score(float((seen & on).sum()), float(seen.sum()), float(on.sum())))
    assert meter.figures() == {"max_f": pytest.approx(max(scores))}


def test_saliency_averages_images_at_every_threshold():
    found, target = 3 * torch.randn(5, 1, H, W), target_of(Saliency(), 5)
    target[3] = 0
    found[3] = -9  # an image in which rightly nothing is found
    meter = Saliency().meter()
    for some, true in zip(found.split(2), target.split(2), strict=True):
        meter.add(some, true)
    overlaps, scores = [], []
    for k in range(4, 19):
        rows = []
        for map_, true in zip(found[:, 0].sigmoid(), target, strict=True):
            seen, on = (map_ > k / 20) & (true != IGNORE), true == 1
            right, either = float((seen & on).sum()), float((seen | on).sum())
            rows.append((right / max(1, seen.sum()), right / max(1, on.sum()), right / either if either else 1.0))
        precision, recall, overlap = (float(torch.tensor(column).mean()) for column in zip(*rows, strict=True))
        overlaps.append(overlap)
        scores.append(2 * precision * recall / (precision + recall))
    assert meter.figures() == {"miou": pytest.approx(max(overlaps)), "max_f": pytest.approx(max(scores))}


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_figures_need_a_valid_pixel(kind: Kind):
    scene = Dense({"first": Depth(), "mine": kind})
    data = TensorDataset(torch.rand(2, 3, H, W), torch.ones(2, 1, H, W), unlabelled(kind))
    with pytest.raises(ValueError, match=r"none of the 2 images .* has a target for 'mine'"):
        scene.metrics(Pointwise(scene.channels(("first", "mine"))), data, ("first", "mine"))


def test_a_scaled_crop_shows_a_part_of_the_image_larger_and_nearer():
    image = torch.stack(torch.meshgrid(torch.arange(float(H)), torch.arange(float(W)), indexing="ij"))
    warp = Warp((H, W), 2.0, 0.0, [-1.0, 1.0])
    found = warp(image, "bilinear")
    torch.testing.assert_close(found[0, :, 0], torch.linspace((H - 1) / 2, H - 1, H))  # the lower half
    torch.testing.assert_close(found[1, 0], torch.linspace(0, (W - 1) / 2, W))  # the left half
    assert torch.equal(Depth().warped(torch.full((1, H, W), 3.0), warp), torch.full((1, H, W), 1.5))
    labels = torch.randint(5, (H, W))
    assert set(Classes(5).warped(labels, warp).unique().tolist()) <= set(range(5))


def test_what_comes_from_outside_has_no_target():
    warp = Warp((H, W), 0.5, 0.0, [0.3, 0.3])
    assert warp(torch.ones(1, H, W), "bilinear")[0, 0, 0] == 0
    assert Classes(5).warped(torch.full((H, W), 3), warp)[0].unique().tolist() == [IGNORE]
    assert Classes(5).warped(torch.full((H, W), 3), warp)[H // 2, W // 2] == 3
    for kind in (Depth(), Normals()):
        assert not kind.valid(kind.warped(torch.ones(kind.channels, H, W), warp)[None])[0, 0].any()


@pytest.mark.parametrize("angle", [0.3, -1.2])
@pytest.mark.parametrize("around", [False, True], ids=["away from the centre", "around it"])
def test_normals_turn_with_the_image(angle: float, around: bool):
    """A field that looks the same from all sides is not changed by rotation about its centre."""
    y, x = torch.meshgrid(torch.linspace(-32, 32, 65), torch.linspace(-48, 48, 97), indexing="ij")
    field = torch.stack([-y, x, 0 * x + 9] if around else [x, y, 0 * x + 9])
    turned = Normals().warped(field, Warp((65, 97), 1.0, angle, [0.0, 0.0]))
    inside = (x**2 + y**2) < 30**2
    torch.testing.assert_close(turned[:, inside], field[:, inside], atol=1e-3, rtol=0)


def test_mirroring_flips_everything_and_the_normals_x():
    kinds = (Classes(5), Depth(), Normals())
    targets = [target_of(kind, 1)[0] for kind in kinds]
    flipped = [kind.mirrored(target) for kind, target in zip(kinds, targets, strict=True)]
    assert torch.equal(flipped[0], targets[0].flip(1))
    assert torch.equal(flipped[1], targets[1].flip(2))
    assert torch.equal(flipped[2][0], -targets[2][0].flip(1))
    assert torch.equal(flipped[2][1:], targets[2][1:].flip(2))


def test_augmentation_is_drawn_from_the_global_generator_and_scales_are_those_given():
    image, depth = torch.rand(1, 3, H, W), torch.ones(1, 1, H, W)
    data = Augmented(TensorDataset(image, depth), (Depth(),), scales=(1.0, 2.0))
    torch.manual_seed(0)
    seen = [data[0] for _ in range(40)]
    assert {float(found.max()) for _, found in seen} == {1.0, 0.5}
    assert any(torch.equal(found, image[0]) for found, _ in seen)
    assert any(torch.equal(found, image[0].flip(-1)) for found, _ in seen)
    torch.manual_seed(0)
    again = [data[0] for _ in range(40)]
    assert all(torch.equal(one, other) for one, other in zip(sum(seen, ()), sum(again, ()), strict=True))
    between = Augmented(TensorDataset(image, depth), (Depth(),), scales=(0.8, 1.25), between=True, degrees=20)
    drawn = {float(between[0][1].max()) for _ in range(20)}
    assert len(drawn) == 20
    assert 0.8 <= min(drawn) <= max(drawn) <= 1.25


def test_a_problem_of_kinds():
    scene = Dense(KINDS)
    batch = (torch.rand(2, 3, H, W), *(target_of(kind, 2) for kind in KINDS.values()))
    model = Pointwise(scene.channels(tuple(KINDS)))
    assert scene.tasks["classes"] == {"miou": "max", "pixel_accuracy": "max"}
    assert list(scene.losses(model, batch, ("depth", "edges"))) == ["depth", "edges"]
    assert scene.counts(batch, ("classes",)) == {"classes": float((batch[1] != IGNORE).sum())}
    figures = scene.metrics(model.eval(), TensorDataset(*batch), ("cosine",))
    assert figures["cosine"]["mean_angle"] > 0


def test_pictures_of_directions_and_padding():
    array = torch.tensor([[[255, 128, 127], [127, 127, 128]]], dtype=torch.uint8).numpy()
    found = direction(array)
    assert found.shape == (3, 1, 2)
    assert found[:, 0, 0].norm() == pytest.approx(1)
    assert found[0, 0, 0] > 0.99
    assert not found[:, 0, 1].any()
    assert padded(torch.ones(1, 2), (3, 5), -1).tolist() == [[-1] * 5, [-1, 1, 1, -1, -1], [-1] * 5]
