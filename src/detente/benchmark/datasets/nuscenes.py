"""nuScenes' tables, camera geometry and map, read without its devkit (Caesar et al., CVPR 2020).

Three frames, in metres: the world is that of the map; the car's has its origin on the ground below the rear axle, x
forward, y left, z up; a camera's has z along the optical axis. Pixels count from the image's upper left corner, so that
the first pixel's centre is at (.5, .5). Rasters are [classes, x, y] over a `Grid` around the car.
"""

from __future__ import annotations

import math
import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image, ImageDraw

from detente.benchmark.datasets.source import DataError, present, read_json, read_picture

__all__ = [
    "CAMERAS",
    "IMAGE",
    "KINDS",
    "LAYERS",
    "Frame",
    "Grid",
    "Map",
    "heat_maps",
    "read_frames",
    "read_view",
    "rotation",
]

CAMERAS = ("CAM_FRONT_LEFT", "CAM_FRONT", "CAM_FRONT_RIGHT", "CAM_BACK_LEFT", "CAM_BACK", "CAM_BACK_RIGHT")
REFERENCE = "LIDAR_TOP"  # a sample is annotated at the time of its lidar sweep
IMAGE = (900, 1600)  # height, width
LOCATIONS = ("singapore-onenorth", "singapore-hollandvillage", "singapore-queenstown", "boston-seaport")
LAYERS = ("drivable_area", "ped_crossing", "walkway")
KINDS = ("car", "truck", "bus", "trailer", "construction_vehicle", "motorcycle", "bicycle")
CATEGORIES = {  # as in the official detection task, which leaves out emergency vehicles
    "vehicle.car": "car",
    "vehicle.truck": "truck",
    "vehicle.bus.bendy": "bus",
    "vehicle.bus.rigid": "bus",
    "vehicle.trailer": "trailer",
    "vehicle.construction": "construction_vehicle",
    "vehicle.motorcycle": "motorcycle",
    "vehicle.bicycle": "bicycle",
}

Array = NDArray[np.float64]
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Grid:
    """Square cells of ``cell`` metres that reach ``reach`` metres from the car to every side."""

    reach: float = 50.0
    cell: float = 0.5

    @property
    def size(self) -> int:
        return round(2 * self.reach / self.cell)

    @property
    def centres(self) -> Array:
        """Coordinates of the cells' centres along one axis."""
        centres: Array = (np.arange(self.size, dtype=np.float64) + 0.5) * self.cell - self.reach
        return centres

    def cells(self, points: ArrayLike) -> Array:
        """Points in the car's frame as positions in cells; their whole part is the cell."""
        return (np.asarray(points, np.float64) + self.reach) / self.cell


@dataclass(frozen=True)
class Frame:
    """One annotated moment.

    Attributes:
        scene: its scene's name.
        location: the name of its map.
        pose: [4, 4], from the car's frame to the world.
        images: files of the six cameras, in the order of `CAMERAS`.
        projections: [6, 3, 4], from homogeneous points in the car's frame to (pixel x, pixel y, 1) times depth. The
            car's movement between the sweep and each image is part of it.
        boxes: [n, 4], vehicles that lidar or radar touched: index into `KINDS`, x, y in the car's frame, diagonal seen
            from above.
    """

    scene: str
    location: str
    pose: Array
    images: tuple[Path, ...]
    projections: Array
    boxes: Array


def rotation(quaternion: Sequence[float]) -> Array:
    """Matrix [3, 3] of a unit quaternion (w, x, y, z)."""
    w, x, y, z = quaternion
    return np.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
            [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
            [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
        ]
    )


class Rows(dict[str, Any]):
    """Rows by token; one that is not there is an error that names the table."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def __missing__(self, token: str) -> Any:
        raise ValueError(f"it names {token!r}, which {self.name} does not have")


@contextmanager
def checked(path: Path, row: Any) -> Iterator[None]:
    """Tells the file and the record of what is found wrong inside."""
    try:
        yield
    except (KeyError, TypeError, ValueError) as error:
        token = row.get("token") if isinstance(row, dict) else row
        why = f"it has no {error}" if isinstance(error, KeyError) else str(error)
        raise DataError(f"{path}, record {token!r}: {why}. It is damaged or not the official file.") from error


def read_table(path: Path, pick: Callable[[Row], Any]) -> Rows:
    """What ``pick`` makes of each record of a JSON table; records for which that is None are left out.

    They are picked while the file is parsed, so that the millions between the annotated moments never pile up.
    """

    def hook(record: dict[str, Any]) -> tuple[str, Any] | None:
        with checked(path, record):
            value = pick(record)
            return None if value is None else (record["token"], value)

    found = read_json(path, hook)
    if not isinstance(found, list) or not all(row is None or isinstance(row, tuple) for row in found):
        raise DataError(f"{path} is not a list of records, as nuScenes' tables are. It is not the official file.")
    rows = Rows(path.name)
    rows.update(row for row in found if row is not None)
    return rows


def read_frames(root: Path, version: str) -> list[Frame]:
    """All annotated moments of ``root/version``, in the order of its table of samples.

    Raises:
        DataError: naming the table and the record, where a number is impossible or a token leads nowhere; or the image
            that is missing.
    """
    folder = root / version

    def table(name: str, pick: Callable[[Row], Any]) -> Rows:
        return read_table(folder / f"{name}.json", pick)

    logs = table("log", _location)
    scenes = table("scene", lambda row: (row["name"], logs[row["log_token"]]))
    samples = table("sample", lambda row: scenes[row["scene_token"]])
    sensors = table("sensor", lambda row: row["channel"])
    mounts = table("calibrated_sensor", lambda row: _mount(row, sensors))
    shots = table("sample_data", lambda row: _shot(row, samples, mounts))
    wanted = {shot.pose for shot in shots.values()}
    poses = table("ego_pose", lambda row: _pose(row) if row["token"] in wanted else None)
    categories = table("category", lambda row: row["name"])
    instances = table("instance", lambda row: CATEGORIES.get(categories[row["category_token"]], ""))
    vehicles = table("sample_annotation", lambda row: _vehicle(row, samples, instances))

    taken: dict[str, dict[str, tuple[Shot, Array]]] = defaultdict(dict)
    for token, shot in shots.items():
        with checked(folder / "sample_data.json", token):
            taken[shot.sample][shot.mount.channel] = (shot, poses[shot.pose])
    around: dict[str, list[Vehicle]] = defaultdict(list)
    for vehicle in vehicles.values():
        around[vehicle.sample].append(vehicle)
    frames = []
    for token, (scene, location) in samples.items():
        missing = [channel for channel in (REFERENCE, *CAMERAS) if channel not in taken[token]]
        if missing:
            raise DataError(f"{folder / 'sample_data.json'} has no key frame of {missing[0]} for the sample {token!r}.")
        pose = taken[token][REFERENCE][1]
        cameras = [taken[token][channel] for channel in CAMERAS]
        frames.append(
            Frame(
                scene,
                location,
                pose,
                tuple(root / shot.filename for shot, _ in cameras),
                np.stack([_projection(shot.mount, then, pose) for shot, then in cameras]),
                _boxes(around[token], pose),
            )
        )
    _check_images(frames)
    return frames


class Mount(NamedTuple):
    channel: str
    pose: Array  # from the sensor's frame to the car's
    intrinsics: Array | None


class Shot(NamedTuple):
    sample: str
    mount: Mount
    pose: str
    filename: str


class Vehicle(NamedTuple):
    sample: str
    kind: int
    centre: tuple[float, ...]
    diagonal: float


def _location(row: Row) -> str:
    location: str = row["location"]
    if location not in LOCATIONS:
        raise ValueError(f"the location is {location!r}; expected one of {', '.join(LOCATIONS)}")
    return location


def _mount(row: Row, sensors: Rows) -> Mount:
    channel, intrinsics = sensors[row["sensor_token"]], None
    if channel in CAMERAS:
        intrinsics = np.array(row["camera_intrinsic"], np.float64)
        if intrinsics.shape != (3, 3) or not np.isfinite(intrinsics).all() or min(intrinsics[[0, 1], [0, 1]]) <= 0:
            raise ValueError(f"camera_intrinsic must be 3x3 with positive focal lengths; got {row['camera_intrinsic']}")
    return Mount(channel, _pose(row), intrinsics)


def _shot(row: Row, samples: Rows, mounts: Rows) -> Shot | None:
    mount = mounts[row["calibrated_sensor_token"]]
    if not row["is_key_frame"] or mount.channel not in (REFERENCE, *CAMERAS):
        return None
    samples[row["sample_token"]]  # it must be there
    return Shot(row["sample_token"], mount, row["ego_pose_token"], row["filename"])


def _vehicle(row: Row, samples: Rows, instances: Rows) -> Vehicle | None:
    kind = instances[row["instance_token"]]
    samples[row["sample_token"]]
    size, centre = _numbers(row, "size", 3), _numbers(row, "translation", 3)
    _quaternion(row)
    if min(size) <= 0:
        raise ValueError(f"size must be positive; got {list(size)}")
    if not kind or row["num_lidar_pts"] + row["num_radar_pts"] == 0:
        return None
    return Vehicle(row["sample_token"], KINDS.index(kind), centre, math.hypot(size[0], size[1]))


def _numbers(row: Row, field: str, count: int) -> tuple[float, ...]:
    values = tuple(float(value) for value in row[field])
    if len(values) != count or not all(map(math.isfinite, values)):
        raise ValueError(f"{field} must be {count} finite numbers; got {row[field]}")
    return values


def _quaternion(row: Row) -> tuple[float, ...]:
    values = _numbers(row, "rotation", 4)
    if abs(math.hypot(*values) - 1) > 1e-3:
        raise ValueError(f"rotation must be a unit quaternion; got {row['rotation']}")
    return values


def _pose(row: Row) -> Array:
    pose = np.eye(4)
    pose[:3, :3] = rotation(_quaternion(row))
    pose[:3, 3] = _numbers(row, "translation", 3)
    return pose


def _inverse(pose: Array) -> Array:
    inverse = np.eye(4)
    inverse[:3, :3] = pose[:3, :3].T
    inverse[:3, 3] = -pose[:3, :3].T @ pose[:3, 3]
    return inverse


def _projection(mount: Mount, then: Array, now: Array) -> Array:
    assert mount.intrinsics is not None
    to_camera = _inverse(mount.pose) @ _inverse(then) @ now
    projection: Array = mount.intrinsics @ to_camera[:3]
    return projection


def _boxes(vehicles: Sequence[Vehicle], pose: Array) -> Array:
    boxes = np.zeros((len(vehicles), 4))
    if vehicles:
        world = np.array([vehicle.centre for vehicle in vehicles])
        boxes[:, 0] = [vehicle.kind for vehicle in vehicles]
        boxes[:, 1:3] = ((world - pose[:3, 3]) @ pose[:3, :3])[:, :2]
        boxes[:, 3] = [vehicle.diagonal for vehicle in vehicles]
    return boxes


def _check_images(frames: Sequence[Frame]) -> None:
    listed: dict[Path, set[str]] = {}
    for path in (path for frame in frames for path in frame.images):
        folder = path.parent
        if folder not in listed:
            listed[folder] = set(os.listdir(folder)) if folder.is_dir() else set()
        if path.name not in listed[folder]:
            present(path)


def heat_maps(boxes: Array, grid: Grid) -> NDArray[np.float32]:
    """For each of `KINDS` a map [x, y] that is 1 in the cells with a box's centre and falls off around them.

    The maximum of one Gaussian per box, as in CenterPoint (Yin et al., CVPR 2021). Here the circle around the box is at
    three standard deviations, of at least one cell.
    """
    heat = np.zeros((len(KINDS), grid.size, grid.size), np.float32)
    centres = grid.centres
    for kind, x, y, diagonal in boxes:
        cell = np.floor(grid.cells((x, y))).astype(int)
        if (cell >= 0).all() and (cell < grid.size).all():
            sigma = max(diagonal / 6, grid.cell)
            along, across = (np.exp(-(((centres - centres[k]) / sigma) ** 2) / 2) for k in cell)
            np.maximum(heat[int(kind)], np.outer(along, across), out=heat[int(kind)])
    return heat


class Polygon(NamedTuple):
    outline: Array  # [n, 2] in the world
    holes: list[Array]


class Map:
    """The areas of `LAYERS` from one file of the map expansion.

    Raises:
        DataError: naming the file and the record, where a token leads nowhere or an outline is no polygon.
    """

    def __init__(self, path: Path) -> None:
        content = read_json(path)
        needed = ("node", "polygon", *LAYERS)
        if not isinstance(content, dict) or not all(isinstance(content.get(name), list) for name in needed):
            raise DataError(f"{path} must have the lists {', '.join(needed)}. It is not of the map expansion v1.3.")
        nodes, records = Rows("its list of nodes"), Rows("its list of polygons")
        for row in content["node"]:
            with checked(path, row):
                nodes[row["token"]] = _numbers({"x and y": (row["x"], row["y"])}, "x and y", 2)
        for row in content["polygon"]:
            with checked(path, row):
                records[row["token"]] = row

        def ring(tokens: Sequence[str]) -> Array:
            if len(tokens) < 3:
                raise ValueError(f"a polygon needs three corners; it has {len(tokens)}")
            return np.array([nodes[token] for token in tokens])

        def polygon(token: str) -> Polygon:
            row = records[token]
            holes = [hole["node_tokens"] for hole in row["holes"]]  # in official files some are empty
            return Polygon(ring(row["exterior_node_tokens"]), [ring(hole) for hole in holes if hole])

        self.layers: list[list[Polygon]] = []
        for name in LAYERS:
            layer = []
            for row in content[name]:
                with checked(path, row):
                    tokens = row["polygon_tokens"] if "polygon_tokens" in row else [row["polygon_token"]]
                    layer += [polygon(token) for token in tokens]
            self.layers.append(layer)
        self._bounds = [
            np.array([[*area.outline.min(0), *area.outline.max(0)] for area in layer]).reshape(-1, 4)
            for layer in self.layers
        ]

    def raster(self, pose: Array, grid: Grid) -> NDArray[np.bool_]:
        """Whether each cell [layer, x, y] of the grid around a car at ``pose`` belongs to the layer."""
        near = pose[:2, 3], math.sqrt(2) * grid.reach
        masks = []
        for layer, bounds in zip(self.layers, self._bounds, strict=True):
            mask = np.zeros((grid.size, grid.size), bool)
            inside = (bounds[:, :2] < near[0] + near[1]) & (bounds[:, 2:] > near[0] - near[1])
            for index in np.flatnonzero(inside.all(1)):
                mask |= _fill(layer[index], pose, grid)
            masks.append(mask)
        return np.stack(masks)


def _fill(polygon: Polygon, pose: Array, grid: Grid) -> NDArray[np.bool_]:
    """Cells [x, y] of a polygon; Pillow also fills those whose centre an edge touches."""
    image = Image.new("L", (grid.size, grid.size))
    draw = ImageDraw.Draw(image)
    for ring, ink in ((polygon.outline, 1), *((hole, 0) for hole in polygon.holes)):
        cells = grid.cells((ring - pose[:2, 3]) @ pose[:2, :2]) - 0.5  # Pillow's whole numbers are the cells' centres
        draw.polygon(cells[:, ::-1].ravel().tolist(), fill=ink)
    return np.asarray(image, bool)


def read_view(path: Path, matrix: Array, height: int, width: int) -> NDArray[np.uint8]:
    """An image [height, width, 3] of a camera, with its pixels moved by ``matrix`` [3, 3]; black where nothing is.

    It is made smaller first, so that the samples of the move do not alias.

    Raises:
        DataError: it is cut off, no picture, or of another size than `IMAGE`.
    """
    scale = math.sqrt(abs(float(np.linalg.det(matrix[:2, :2]))))
    small = (round(IMAGE[0] * scale), round(IMAGE[1] * scale))
    view = Image.fromarray(read_picture(path, IMAGE, resize=small))
    back = np.linalg.inv(matrix @ np.diag([IMAGE[1] / small[1], IMAGE[0] / small[0], 1.0]))
    moved = view.transform(
        (width, height), Image.Transform.AFFINE, back[:2].ravel().tolist(), Image.Resampling.BILINEAR
    )
    return np.array(moved)
