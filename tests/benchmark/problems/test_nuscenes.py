"""nuScenes: geometry against cases worked out by hand, files that are what they must be, and a network that trains."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader

from benchmark.layouts import nuscenes as layout
from detente.benchmark.datasets.nuscenes import CAMERAS, KINDS, Grid, Map, heat_maps, read_frames, read_view, rotation
from detente.benchmark.datasets.source import DataError, held_out
from detente.benchmark.problems import nuscenes

BOTH = tuple(nuscenes.tasks)
SMALL = {"image_height": 64, "image_width": 176, "reach": 24.0, "cell": 1.0, "partial": True}
CAR, BUS = KINDS.index("car"), KINDS.index("bus")


@pytest.fixture(scope="module")
def official(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("data") / "nuscenes"
    layout.write(directory, train=2, test=2)
    return directory


@pytest.fixture
def directory(official: Path, tmp_path: Path) -> Path:
    """A copy to break."""
    return Path(shutil.copytree(official, tmp_path / "nuscenes"))


@pytest.fixture(scope="module")
def data(official: Path) -> Any:
    return nuscenes.make_data(official, **SMALL)


def edit(path: Path, change: Callable[[Any], Any]) -> None:
    content = json.loads(path.read_text())
    path.write_text(json.dumps(change(content) or content))


def table(directory: Path, name: str) -> Path:
    return directory / layout.VERSION / f"{name}.json"


def pose(x: float, y: float, degrees: float = 0.0) -> np.ndarray:
    matrix = np.eye(4)
    matrix[:3, :3] = rotation(layout.turn(degrees))
    matrix[:2, 3] = x, y
    return matrix


# what is read


def test_samples_have_the_documented_form(data: Any) -> None:
    assert [len(split) for split in data.values()] == [2, 1, 2]
    for split, cameras in (("train", 5), ("val", 6), ("test", 6)):
        sample = data[split][0]
        assert [tuple(x.shape) for x in sample] == [(cameras, 3, 64, 176), (cameras, 3, 4), (3, 48, 48), (7, 48, 48)]
        assert {x.dtype for x in sample} == {torch.float32}
        assert sample[0].abs().max() < 3
        assert set(sample[2].unique().tolist()) == {0, 1}
        assert sample[3].min() >= 0
        assert sample[3].max() == 1


def test_default_sizes_are_the_published_ones(official: Path) -> None:
    images, _, layers, heat = nuscenes.make_data(official, partial=True)["test"][0]
    assert images.shape == (6, 3, 128, 352)
    assert layers.shape == (3, 200, 200)
    assert heat.shape == (7, 200, 200)


def test_official_validation_scenes_are_the_test_split_and_no_scene_is_in_two(data: Any) -> None:
    scenes = {split: {frame.scene for frame in views.frames} for split, views in data.items()}
    assert scenes == {"train": {layout.TRAIN}, "val": {layout.VAL}, "test": {layout.TEST}}


def test_a_tenth_of_the_names_is_held_out_whichever_others_are_there() -> None:
    names = [f"scene-{number:04d}" for number in range(1000)]
    kept, held = held_out(names)
    assert 70 < len(held) < 130
    assert sorted(kept + held) == names
    assert held_out(names[500:])[1] == [name for name in held if name in names[500:]]
    assert held_out(kept[:3])[1]


def test_training_draws_from_torchs_generator_and_evaluation_draws_nothing(data: Any) -> None:
    def same(split: str, seeds: tuple[int, int]) -> bool:
        samples = []
        for seed in seeds:
            torch.manual_seed(seed)
            samples.append(data[split][0])
        return all(torch.equal(a, b) for a, b in zip(*samples, strict=True))

    assert same("train", (0, 0))
    assert not same("train", (0, 1))
    assert same("test", (0, 1))


# geometry


def test_a_quaternion_turns_to_the_left() -> None:
    np.testing.assert_allclose(rotation(layout.turn(90)) @ [1, 0, 0], [0, 1, 0], atol=1e-12)
    np.testing.assert_allclose(
        rotation(layout.looking(0)) @ [[1, 0], [0, 0], [0, 1]], [[0, 1], [-1, 0], [0, 0]], atol=1e-12
    )


def test_a_point_lands_on_the_right_pixel(official: Path) -> None:
    frame = read_frames(official, layout.VERSION)[0]
    # the front camera is 1.7 m ahead at a height of 1.5 m: the point is 10 m before it, 1 m left and 1 m down
    x, y, depth = frame.projections[CAMERAS.index("CAM_FRONT")] @ [11.7, 1.0, 0.5, 1.0]
    np.testing.assert_allclose([x / depth, y / depth, depth], [816.3 - 126.64, 491.5 + 126.64, 10.0])
    # the left one looks 55 degrees aside
    aside = np.radians(55)
    point = [1.7 + 10 * np.cos(aside), 10 * np.sin(aside), 1.5, 1.0]
    x, y, depth = frame.projections[CAMERAS.index("CAM_FRONT_LEFT")] @ point
    np.testing.assert_allclose([x / depth, y / depth, depth], [816.3, 491.5, 10.0])
    assert (frame.projections[CAMERAS.index("CAM_BACK")] @ point)[2] < 0


def test_the_car_moves_between_the_sweep_and_an_image(directory: Path) -> None:
    def ahead(rows: Any) -> None:
        for row in rows:
            if row["token"].endswith("CAM_FRONT-key"):
                row["translation"][0] += 2.0

    edit(table(directory, "ego_pose"), ahead)
    frame = read_frames(directory, layout.VERSION)[0]
    assert (frame.projections[CAMERAS.index("CAM_FRONT")] @ [11.7, 1.0, 0.5, 1.0])[2] == pytest.approx(8.0)
    assert frame.pose[0, 3] == 600.0


def test_vehicles_that_a_sensor_touched_land_in_the_right_cells(official: Path) -> None:
    first, second = read_frames(official, layout.VERSION)[:2]
    heat = heat_maps(first.boxes, Grid())  # 200 cells of .5 m
    # 10 m ahead is 60 m from the rear edge and 50 m from the right one; the bus is 20 m to the left
    assert np.argwhere(heat == 1).tolist() == [[CAR, 120, 100], [BUS, 100, 140]]
    assert np.argwhere(heat_maps(second.boxes, Grid()) == 1).tolist() == [[CAR, 118, 100], [BUS, 98, 140]]
    # the car's diagonal is hypot(1.9, 4.6) m: three standard deviations are half of that
    sigma = math.hypot(1.9, 4.6) / 6
    assert heat[CAR, 122, 101] == pytest.approx(math.exp(-((1.0**2 + 0.5**2) / sigma**2) / 2), rel=1e-5)
    assert len(first.boxes) == 2
    outside = np.array([[CAR, 50.0, 0.0, 5.0], [CAR, 0.0, -50.1, 5.0]])
    assert not heat_maps(outside, Grid()).any()
    overlapping = heat_maps(np.array([[CAR, 0.1, 0.1, 4.0], [CAR, 1.1, 0.1, 4.0]]), Grid())
    assert (overlapping == 1).sum() == 2


def test_boxes_turn_against_the_car(directory: Path) -> None:
    def left(rows: Any) -> None:
        for row in rows:
            row["rotation"] = layout.turn(90)

    edit(table(directory, "ego_pose"), left)
    boxes = read_frames(directory, layout.VERSION)[0].boxes
    np.testing.assert_allclose(boxes[:, :3], [[CAR, 0, -10], [BUS, 20, 0]], atol=1e-9)


def test_areas_of_the_map_land_in_the_right_cells(official: Path) -> None:
    area = Map(official / "maps/expansion/singapore-onenorth.json")
    road, crossing, walkway = area.raster(pose(600, 800), Grid(50.0, 0.5))

    def filled(mask: Any, x: tuple[float, float], y: tuple[float, float]) -> None:
        """The mask is this rectangle, give or take a cell at its edges."""
        centres = Grid(50.0, 0.5).centres
        inside, around = (
            ((centres > x[0] - d) & (centres < x[1] + d))[:, None] & ((centres > y[0] - d) & (centres < y[1] + d))
            for d in (-0.5, 0.5)
        )
        assert mask[inside].all()
        assert not mask[~around].any()

    filled(crossing, (5, 10), (-10, 10))
    filled(walkway, (-60, 60), (12, 15))
    centres = Grid(50.0, 0.5).centres
    hole = ((centres > 21) & (centres < 39))[:, None] & (np.abs(centres) < 4)
    assert not road[hole].any()
    filled(road | (((centres > 19) & (centres < 41))[:, None] & (np.abs(centres) < 6)), (-60, 60), (-10, 10))
    assert not area.raster(pose(5000, 800), Grid()).any()


def test_the_map_turns_against_the_car(official: Path) -> None:
    area, grid = Map(official / "maps/expansion/singapore-onenorth.json"), Grid(30.25, 0.5)  # cells around 0
    straight = area.raster(pose(600, 800), grid)
    left, around = area.raster(pose(600, 800, 90), grid), area.raster(pose(600, 800, 180), grid)
    # what is ahead of the car is to the right of one that has turned left: (x, y) becomes (y, -x)
    for turned, by_hand in ((left, np.rot90(straight, -1, (1, 2))), (around, straight[:, ::-1, ::-1])):
        assert (turned != by_hand).mean() < 0.02  # Pillow rounds edges that meet a centre to one side
        assert turned.sum() > 1000


@pytest.mark.parametrize("seed", [None, 0, 1, 2, 3])
def test_images_and_projections_move_together(official: Path, seed: int | None) -> None:
    if seed is not None:
        torch.manual_seed(seed)
    matrix = nuscenes.framing(128, 352, augment=seed is not None)
    view = read_view(next((official / "samples/CAM_FRONT").iterdir()), matrix, 128, 352)
    y, x = np.mgrid[:128, :352] + 0.5
    source = np.linalg.inv(matrix) @ np.stack([x.ravel(), y.ravel(), np.ones(x.size)])
    # the picture has a white square with corners at (400, 300) and (800, 700) of 1600 x 900 pixels
    beyond = np.abs(source[:2] - [[600], [500]]).max(0).reshape(x.shape) - 200
    assert (view.min(2)[beyond < -15] > 200).all()
    assert (view.max(2)[beyond > 15] < 160).all()
    assert (beyond < -15).sum() > 2000


def test_without_augmentation_the_lower_part_of_the_whole_width_is_seen() -> None:
    # .22 of 1600 x 900 is 352 x 198; 11 % go below, and 128 rows are left
    matrix = nuscenes.framing(128, 352, augment=False)
    np.testing.assert_allclose(matrix, [[0.22, 0, 0], [0, 0.22, -(0.89 * 198 - 128)], [0, 0, 1]])


# training


@pytest.mark.parametrize("tasks", [BOTH, *((task,) for task in BOTH)])
def test_losses_and_metrics_of_the_named_tasks(data: Any, tasks: tuple[str, ...]) -> None:
    torch.manual_seed(0)
    model = nuscenes.make_model(tasks, width=0.125, reach=24.0, cell=1.0)
    batch = next(iter(DataLoader(data["train"], batch_size=2)))
    found = nuscenes.losses(model, batch, tasks)
    assert list(found) == list(tasks)
    for loss in found.values():
        model.zero_grad()
        loss.backward(retain_graph=True)
        assert torch.isfinite(loss)
        assert all(torch.isfinite(p.grad).all() for p in model.encoder.parameters())
    with torch.no_grad():
        figures = nuscenes.metrics(model.eval(), data["val"], tasks)
    assert {task: list(values) for task, values in figures.items()} == {
        task: list(nuscenes.tasks[task]) for task in tasks
    }
    assert all(0 <= value <= 1 for values in figures.values() for value in values.values())


def test_a_few_steps_lower_both_losses(data: Any) -> None:
    torch.manual_seed(0)
    model = nuscenes.make_model(BOTH, width=0.125, reach=24.0, cell=1.0)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    batch = next(iter(DataLoader(data["test"], batch_size=2)))
    values = []
    for _ in range(12):
        found = nuscenes.losses(model, batch, BOTH)
        optimizer.zero_grad()
        torch.stack(list(found.values())).sum().backward()
        optimizer.step()
        values.append([float(loss.detach()) for loss in found.values()])
    # the images are plain, so that only what the cameras do not see tells places apart; measured: .78 and .29 of these
    assert values[-1][0] < 0.9 * values[0][0]
    assert values[-1][1] < 0.5 * values[0][1]


class Told(nn.Module):
    """Answers with what it was given, batch by batch."""

    def __init__(self, answers: dict[str, Tensor]) -> None:
        super().__init__()
        self.anchor = nn.Parameter(torch.zeros(1))
        self.answers = answers
        self.seen = 0

    def forward(self, images: Tensor, projections: Tensor) -> dict[str, Tensor]:
        start, self.seen = self.seen, self.seen + len(images)
        return {task: x[start : self.seen] for task, x in self.answers.items()}


def test_right_answers_score_one_and_wrong_ones_what_they_should(data: Any) -> None:
    layers, heat = (torch.stack([sample[part] for sample in data["test"]]) for part in (2, 3))
    right = {"map": 2 * layers - 1, "vehicles": 20 * heat - 10}
    assert nuscenes.metrics(Told(right), data["test"], BOTH) == {"map": {"iou": 1.0}, "vehicles": {"ap": 1.0}}
    half = layers.clone()
    half[0] = 0  # as if the first sample were empty
    shares = (half.sum((0, 2, 3)) / layers.sum((0, 2, 3))).double()
    moved = torch.roll(20 * heat - 10, 3, dims=2)  # 3 m ahead: all wrong
    wrong = nuscenes.metrics(Told({"map": 2 * half - 1, "vehicles": moved}), data["test"], BOTH)
    assert wrong["map"]["iou"] == pytest.approx(float(shares.mean()))
    assert wrong["vehicles"]["ap"] < 0.1


def test_peaks_are_matched_once_best_first_within_two_metres() -> None:
    heat, scores = torch.zeros(20, 20), torch.full((20, 20), -10.0)
    heat[5, 5] = heat[15, 15] = 1
    scores[5, 7], scores[6, 5], scores[15, 19] = 3.0, 2.0, 1.0  # 1 m; .5 m but second; 2 m are not within 2 m
    found, objects = nuscenes.detect(scores, heat, 0.5)
    assert objects == 2
    assert found[:3] == [(3.0, True), (2.0, False), (1.0, False)]
    assert len(found) == 100
    assert nuscenes.detect(scores, torch.zeros(20, 20), 0.5)[1] == 0


def test_average_precision_by_hand() -> None:
    # precision 1 up to a recall of 1/3 (34 of the 101 steps), 2/3 up to 2/3 (33 of them), 0 beyond
    found = [([(0.9, True), (0.7, True)], 2), ([(0.8, False)], 1)]
    assert nuscenes.average_precision(found) == pytest.approx((34 + 33 * 2 / 3) / 101)
    assert math.isnan(nuscenes.average_precision([([(0.9, False)], 0)]))
    assert nuscenes.average_precision([([], 1)]) == 0


def test_focal_loss_by_hand() -> None:
    heat = torch.tensor([[[[1.0, 0.5]]], [[[0.0, 0.5]]]])
    logits = torch.tensor([[[[0.0, 0.0]]], [[[0.0, math.log(3)]]]])  # probabilities .5 and .75
    log2 = math.log(2)
    first = 0.25 * log2 + 0.5**4 * 0.25 * log2
    second = 0.25 * log2 + 0.5**4 * 0.75**2 * 2 * log2  # no centre: over 1
    torch.testing.assert_close(nuscenes.focal(logits, heat), torch.tensor([first, second]))


def test_there_is_no_score_without_anything_to_find(data: Any) -> None:
    nothing = {"map": torch.full((1, 3, 48, 48), -1.0), "vehicles": torch.zeros(1, 7, 48, 48)}
    views = nuscenes.Views(data["val"].frames, data["val"].maps, Grid(24.0, 1.0), (64, 176))
    far = pose(5000, 5000)
    views.frames = [type(f)(f.scene, f.location, far, f.images, f.projections, np.zeros((0, 4))) for f in views.frames]
    for task in BOTH:
        with pytest.raises(ValueError, match="nothing to score"):
            nuscenes.metrics(Told(nothing), views, (task,))


# files that are not as they must be


def change(row: int, **fields: Any) -> Callable[[Any], None]:
    return lambda rows: rows[row].update(fields)


WRONG = {
    "no pose": ("sample_data", change(0, ego_pose_token="gone"), "CAM_FRONT-key.*'gone'.*ego_pose.json"),
    "no mount": ("sample_data", change(0, calibrated_sensor_token="gone"), "'gone'.*calibrated_sensor.json"),
    "no sample": ("sample_annotation", change(1, sample_token="gone"), "vehicle.bus.*'gone'.*sample.json"),
    "no instance": ("sample_annotation", change(0, instance_token="gone"), "'gone'.*instance.json"),
    "no category": ("instance", change(0, category_token="gone"), "'gone'.*category.json"),
    "no log": ("scene", change(0, log_token="gone"), "'gone'.*log.json"),
    "no scene": ("sample", change(0, scene_token="gone"), "'gone'.*scene.json"),
    "no sensor": ("calibrated_sensor", change(0, sensor_token="gone"), "'gone'.*sensor.json"),
    "long quaternion": ("ego_pose", change(0, rotation=[1, 0, 0, 1]), "unit quaternion"),
    "short quaternion": ("calibrated_sensor", change(0, rotation=[1, 0, 0]), "4 finite numbers"),
    "quaternion of a box": ("sample_annotation", change(2, rotation=[0, 0, 0, 0]), "unit quaternion"),
    "not finite": ("ego_pose", change(0, translation=[0, math.nan, 0]), "translation must be 3 finite"),
    "text": ("ego_pose", change(0, translation="abc"), "record '.*-key'"),
    "intrinsics": ("calibrated_sensor", change(0, camera_intrinsic=[[1, 0], [0, 1]]), "3x3"),
    "no focal length": (
        "calibrated_sensor",
        change(0, camera_intrinsic=np.zeros((3, 3)).tolist()),
        "3x3 with positive",
    ),
    "flat box": ("sample_annotation", change(0, size=[1, 0, 2]), "size must be positive"),
    "elsewhere": ("log", change(0, location="../../secret"), "location is '../../secret'"),
    "no field": ("sample", lambda rows: rows[0].pop("scene_token") and None, "it has no 'scene_token'"),
    "no rows": ("scene", lambda rows: {"token": "x", "name": "y", "log_token": "log"}, "not a list of records"),
    "no camera": ("sample_data", lambda rows: rows[4:], "no key frame of CAM_"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_table_is_named_with_its_record(directory: Path, case: str) -> None:
    name, alter, message = WRONG[case]
    edit(table(directory, name), alter)
    with pytest.raises(DataError, match=rf"{name}\.json.*{message}"):
        nuscenes.make_data(directory, **SMALL)


WRONG_MAPS = {
    "no layer": (lambda content: content.pop("walkway") and None, "walkway"),
    "no node": (lambda content: content["node"].pop(0) and None, "'road'.*'node-0'"),
    "no polygon": (lambda content: content["polygon"].pop(1) and None, "'crossing'.*'polygon-1'"),
    "a line": (
        lambda content: content["polygon"][0].update(exterior_node_tokens=["node-0"]),
        "three corners; it has 1",
    ),
    "no number": (lambda content: content["node"][0].update(x=math.inf), "node-0.*finite"),
    "no map": (lambda content: [1], "must have the lists"),
}


@pytest.mark.parametrize("case", WRONG_MAPS)
def test_a_wrong_map_is_named_with_its_record(directory: Path, case: str) -> None:
    alter, message = WRONG_MAPS[case]
    edit(directory / "maps/expansion/singapore-onenorth.json", alter)
    with pytest.raises(DataError, match=rf"singapore-onenorth\.json.*{message}"):
        nuscenes.make_data(directory, **SMALL)


@pytest.mark.parametrize(
    "name",
    ["v1.0-trainval/ego_pose.json", "maps/expansion/singapore-onenorth.json", "samples/CAM_BACK/scene-0001-0.jpg"],
)
def test_a_missing_file_is_named(directory: Path, name: str) -> None:
    (directory / name).unlink()
    with pytest.raises(DataError, match=f"{name} is missing"):
        nuscenes.make_data(directory, **SMALL)


def test_a_table_that_is_cut_off_is_named(directory: Path) -> None:
    path = table(directory, "sample_data")
    path.write_text(path.read_text()[:-50])
    with pytest.raises(DataError, match=r"sample_data\.json cannot be read"):
        nuscenes.make_data(directory, **SMALL)


def test_images_that_are_cut_off_small_or_of_another_kind_are_named(directory: Path) -> None:
    paths = [directory / f"samples/{camera}/scene-0003-0.jpg" for camera in CAMERAS]
    paths[0].write_bytes(paths[0].read_bytes()[:3000])
    Image.new("RGB", (1600, 901)).save(paths[1])
    Image.new("RGB", (1600, 900)).save(paths[2], "BMP")
    for path, message in zip(
        paths, ("cannot be read", "901x1600 pixels; expected 900x1600", "cannot be read"), strict=False
    ):
        with pytest.raises(DataError, match=f"{path.parent.name}/scene-0003-0.jpg.*{message}"):
            read_view(path, nuscenes.framing(128, 352, augment=False), 128, 352)


def test_an_empty_folder_tells_where_the_files_come_from(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"v1\.0-mini'[\s\S]*nuscenes\.org[\s\S]*maps/expansion"):
        nuscenes.make_data(tmp_path, version="v1.0-mini")


def test_counts_are_the_official_ones_unless_partial(official: Path) -> None:
    with pytest.raises(DataError, match=r"3 v1\.0-trainval scenes were found; the official data has 850"):
        nuscenes.make_data(official)
    with pytest.raises(ValueError, match=r"version must be one of v1\.0-trainval, v1\.0-mini"):
        nuscenes.make_data(official, version="v1.0-test")


def test_every_split_needs_a_scene(directory: Path) -> None:
    def rename(rows: Any) -> None:
        for row in rows:
            row["name"] = layout.TEST

    edit(table(directory, "scene"), rename)
    with pytest.raises(DataError, match="no scene for the split 'train'"):
        nuscenes.make_data(directory, **SMALL)
