"""Rooms seen by a camera: segmentation, depth and surface normals, NYUv2's three tasks with exact labels.

Procedural scenes are ray-cast with numpy when the data is made; nothing is downloaded or stored. Furnished rooms have
boxes, cabinets, balls, rugs and pictures under a lamp that casts shadows. Rugs and pictures are flush with the surface
they lie on, so segmentation must see edges that depth and normals must ignore.

Measured on one CPU core: 4 ms per image; 0.10 s per step with one backward pass and 0.19 s with one per task, so 30
epochs of 25 steps take about 80 to 150 s. After 20 epochs of the plain sum of the losses (one seed, test set), against
single tasks: mIoU .530 / .584, depth .429 / .476 m, normals 22.0 / 19.6 degrees. Gradient cosines were negative in 31%
(segmentation and depth), 14% (segmentation and normals) and 25% (depth and normals) of 100 probed steps; in 8, 4 and
12% of those in the second half of the run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.random import Generator
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from detente.benchmark.metrics import angle_errors, depth_errors, segmentation
from detente.benchmark.models.unet import UNet

tasks: dict[str, dict[str, str]] = {
    "segmentation": {"miou": "max", "pixel_accuracy": "max"},
    "depth": {"absolute_error": "min", "relative_error": "min"},
    "normals": {
        "mean_angle": "min",
        "median_angle": "min",
        "within_11": "max",
        "within_22": "max",
        "within_30": "max",
    },
}
settings: dict[str, float] = {"epochs": 30, "batch_size": 16, "lr": 1e-3, "width": 1.0, "dropout": 0.0}
classes = ("floor", "ceiling", "wall", "rug", "picture", "box", "cabinet", "ball")

CHANNELS = {"segmentation": len(classes), "depth": 1, "normals": 3}
SIZES = {"train": 400, "val": 96, "test": 96}
FLOOR, CEILING, WALL, RUG, PICTURE, BOX, CABINET, BALL = range(len(classes))
HALF_VIEW = 0.75  # tangent of half the field of view (74 degrees): focal length 42.7 pixels for 64
GRAZING = 0.08  # the depth sensor loses surfaces seen at less than asin(0.08) = 4.6 degrees

Array = NDArray[np.floating[Any]]


def make_data() -> dict[str, Dataset[tuple[Tensor, ...]]]:
    """Splits of (image [3, 64, 64] around 0, classes [64, 64], depth [1, 64, 64] in metres, normals [3, 64, 64])."""
    splits: dict[str, Dataset[tuple[Tensor, ...]]] = {}
    for number, (split, size) in enumerate(SIZES.items()):
        scenes = [render(np.random.default_rng((number, index))) for index in range(size)]
        splits[split] = TensorDataset(*(torch.from_numpy(np.stack(part)) for part in zip(*scenes, strict=True)))
    return splits


def make_model(tasks: tuple[str, ...], width: float = 1.0, dropout: float = 0.0) -> nn.Module:
    """A small U-Net shared by all tasks, with one head per task."""
    return UNet({task: CHANNELS[task] for task in tasks}, width, dropout)


def losses(model: nn.Module, batch: Sequence[Tensor], tasks: tuple[str, ...]) -> dict[str, Tensor]:
    """Cross-entropy; L1 in metres and 1 - cosine over valid pixels. In training, half the images are mirrored."""
    if model.training:
        batch = mirror(batch, torch.rand(len(batch[0]), device=batch[0].device) < 0.5)
    image, labels, depth, normals = batch
    valid = depth > 0
    criteria: dict[str, Callable[[Tensor], Tensor]] = {
        "segmentation": lambda found: F.cross_entropy(found, labels),
        "depth": lambda found: (found - depth)[valid].abs().mean(),
        "normals": lambda found: (1 - F.cosine_similarity(found, normals, dim=1))[valid[:, 0]].mean(),
    }
    output = model(image)
    return {task: criteria[task](output[task]) for task in tasks}


def metrics(model: nn.Module, data: Dataset[tuple[Tensor, ...]], tasks: tuple[str, ...]) -> dict[str, dict[str, float]]:
    """NYUv2's nine figures, pooled over the pixels of the whole set: shares as fractions, metres, degrees."""
    batches = [(model(image), target) for image, *target in DataLoader(data, batch_size=32)]
    labels, depth, normals = (torch.cat(parts) for parts in zip(*(target for _, target in batches), strict=True))
    criteria: dict[str, Callable[[Tensor], dict[str, float]]] = {
        "segmentation": lambda found: segmentation(found, labels, len(classes)),
        "depth": lambda found: depth_errors(found, depth),
        "normals": lambda found: angle_errors(found, normals),
    }
    return {task: criteria[task](torch.cat([output[task] for output, _ in batches])) for task in tasks}


def mirror(batch: Sequence[Tensor], chosen: Tensor) -> tuple[Tensor, ...]:
    """The batch with the chosen images (bool [N]) flipped left to right; the normals' x changes sign with them."""
    *others, normals = (part.flip(-1) for part in batch)
    flipped = (*others, normals * normals.new_tensor([-1.0, 1.0, 1.0])[:, None, None])
    return tuple(
        torch.where(chosen.view(-1, *[1] * (old.ndim - 1)), new, old) for new, old in zip(flipped, batch, strict=True)
    )


# The rooms. World: metres, y up, origin in the room's middle. Camera, and so the labels: x right, y down, z forward.


def render(rng: Generator, size: int = 64) -> tuple[Array, NDArray[np.int64], Array, Array]:
    """One scene: image [3, S, S], classes [S, S], depth [1, S, S] and normals [3, S, S].

    Depth is measured along the optical axis, in metres. Normals have unit length and point towards the
    camera. Depth and normals are 0 where the sensor sees a surface at a grazing angle.
    """
    room = Room(rng)
    rays = (room.camera @ camera_rays(size).reshape(3, -1)).astype(np.float32)
    depth, solid = room.cast(rays)
    points = room.eye[:, None] + depth * rays
    colour, label, normals = room.surface(points, solid)
    normals *= -np.sign((normals * rays).sum(0))
    image = colour * room.light(points, normals)
    image = image * rng.uniform(0.85, 1.15) + rng.normal(0, rng.uniform(0.01, 0.04), image.shape)
    seen = -(normals * rays).sum(0) > GRAZING * np.sqrt((rays**2).sum(0))
    normals = room.camera.T @ normals
    frame = (size, size)
    return (
        ((np.clip(image, 0, 1) - 0.5) * 4).astype(np.float32).reshape(3, *frame),
        label.reshape(frame),
        (depth * seen).astype(np.float32).reshape(1, *frame),
        (normals * seen).astype(np.float32).reshape(3, *frame),
    )


def camera_rays(size: int) -> Array:
    """Directions [3, S, S] of the pixels' rays in the camera frame, z = 1: depth times ray is the point seen."""
    x = ((np.arange(size, dtype=np.float32) + 0.5) / size * 2 - 1) * HALF_VIEW
    return np.stack([*np.meshgrid(x, x), np.ones((size, size), np.float32)])


class Room:
    """A furnished room with its lamp and camera. Box 0 is the room itself, seen from inside; balls follow the boxes."""

    def __init__(self, rng: Generator) -> None:
        self.half = rng.uniform((1.7, 1.2, 1.7), (3.2, 1.6, 3.2))
        eye = self.half * rng.uniform(-0.85, 0.85, 3)
        eye[1] = rng.uniform(1.0, 1.9) - self.half[1]
        target = -0.7 * eye + rng.uniform(-0.8, 0.8, 3)
        target[1] = rng.uniform(0.2, 1.2) - self.half[1]
        self.eye, self.camera = eye.astype(np.float32), _look(target - eye, rng.normal(0, 0.03))
        self.lamp = self.half * (rng.uniform(-0.7, 0.7), rng.uniform(0.55, 0.85), rng.uniform(-0.7, 0.7))
        self.lamp_colour = 1 + rng.uniform(-0.08, 0.08) * np.array([[1.0], [0.0], [-1.2]])
        self.ambient = rng.uniform(0.45, 0.65)
        self.taken = [(eye[0], eye[2], 0.45)]  # circles on the floor: x, z, radius

        self.boxes = [(0.0, 0.0, 0.0, *self.half, 0.0)]
        self.labels = [WALL]
        self.paints = [Paint(rng, ("plain", "plain", "stripes", "clouds"), 0.25, 0.75)]
        self.floor = Paint(rng, ("tiles", "planks", "planks", "clouds", "plain"), 0.5, 0.65, wood=0.7)
        self.ceiling = Paint(rng, ("plain", "plain", "tiles"), 0.06, 0.9)
        self.patches = [_rug(rng, self.half) for _ in range(rng.integers(0, 3))]
        self.patches += [_picture(rng, self.half) for _ in range(rng.integers(2, 6))]
        for _ in range(rng.integers(1, 5)):
            self._add_cabinet(rng)
        for _ in range(rng.integers(2, 7)):
            self._add_box(rng)
        self.balls: list[tuple[float, ...]] = []
        for _ in range(rng.integers(1, 6)):
            self._add_ball(rng)
        self.box_rows = np.array(self.boxes, np.float32)
        self.ball_rows = np.array(self.balls, np.float32).reshape(-1, 4)

    def _place(self, x: float, z: float, radius: float) -> bool:
        """Claim a circle on the floor, unless something stands there."""
        free = all(np.hypot(x - a, z - b) > radius + r for a, b, r in self.taken)
        if free:
            self.taken.append((x, z, radius))
        return free

    def _add_cabinet(self, rng: Generator) -> None:
        width, height, deep = rng.uniform((0.3, 0.35, 0.17), (0.8, 1.05, 0.32))
        axis, side = rng.choice((0, 2)), rng.choice((-1, 1))
        along = rng.uniform(-1, 1) * max(self.half[2 - axis] - width, 0)
        back = side * (self.half[axis] - deep)
        x, z = (back, along) if axis == 0 else (along, back)
        if self._place(x, z, 0.8 * width):
            size = (deep, height, width) if axis == 0 else (width, height, deep)
            self.boxes.append((x, height - self.half[1], z, *size, 0.0))
            self.labels.append(CABINET)
            self.paints.append(Paint(rng, ("tiles", "doors", "doors", "plain"), 0.6, 0.7, wood=0.6))

    def _add_box(self, rng: Generator) -> None:
        size = rng.uniform(0.12, 0.42, 3)
        radius = float(np.hypot(size[0], size[2]))
        x, z = rng.uniform(-1, 1, 2) * (self.half[[0, 2]] - radius)
        if not self._place(x, z, radius):
            return
        bottom = -self.half[1]
        for _ in range(rng.integers(1, 3)):  # sometimes a smaller one on top
            self.boxes.append((x, bottom + size[1], z, *size, rng.uniform(0, np.pi)))
            self.labels.append(BOX)
            self.paints.append(Paint(rng, ("plain", "plain", "stripes", "checks"), 0.8, 0.8))
            bottom += 2 * size[1]
            size = size * rng.uniform(0.45, 0.75, 3)

    def _add_ball(self, rng: Generator) -> None:
        radius = rng.uniform(0.12, 0.38)
        x, z = rng.uniform(-1, 1, 2) * (self.half[[0, 2]] - radius)
        if self._place(x, z, radius):
            self.balls.append((x, radius - self.half[1], z, radius))
            self.labels.append(BALL)
            self.paints.append(Paint(rng, ("plain", "stripes", "clouds"), 0.9, 0.85))

    def cast(self, rays: Array) -> tuple[Array, NDArray[np.intp]]:
        """Multiples of the camera's `rays` [3, P] at which they end, and the solid each ends on."""
        near, far = _slabs(self.box_rows, self.eye[:, None], rays)
        near[(near > far) | (near <= 0)] = np.inf
        near[0] = far[0]
        ends = np.concatenate([near, _spheres(self.ball_rows, self.eye[:, None], rays)])
        solid = ends.argmin(0)
        return ends[solid, np.arange(len(solid))], solid

    def surface(self, points: Array, solid: NDArray[np.intp]) -> tuple[Array, NDArray[np.int64], Array]:
        """Colours [3, P], classes [P] and unit normals [3, P] of points on the given solids."""
        colour, normals = np.empty_like(points), np.zeros_like(points)
        label = np.array(self.labels, np.int64)[solid]
        for index in np.unique(solid):
            on = np.flatnonzero(solid == index)
            if index >= len(self.boxes):
                ball = self.ball_rows[index - len(self.boxes)]
                out, radius = points[:, on] - ball[:3, None], ball[3]
                normals[:, on] = out = out / np.sqrt((out**2).sum(0))
                colour[:, on] = self.paints[index](radius * np.arctan2(out[0], out[2]), radius * out[1])
                continue
            local = _turn(points[:, on] - self.box_rows[index, :3, None], self.box_rows[index, 6])
            axis = np.abs(local / self.box_rows[index, 3:6, None]).argmax(0)
            out = np.where(np.arange(3)[:, None] == axis, np.sign(local), 0)
            normals[:, on] = _turn(out, -self.box_rows[index, 6])
            u, v = np.where(axis == 0, local[2], local[0]), np.where(axis == 1, local[2], local[1])
            colour[:, on] = self.paints[index](u, v)
            if index == 0:
                for side, paint, name in ((-1, self.floor, FLOOR), (1, self.ceiling, CEILING)):
                    flat = np.flatnonzero(out[1] == side)
                    colour[:, on[flat]], label[on[flat]] = paint(u[flat], v[flat]), name
                for patch in self.patches:
                    face = np.flatnonzero(out[patch.axis] == patch.side)
                    covered, shade = patch.cover(u[face], v[face])
                    colour[:, on[face[covered]]], label[on[face[covered]]] = shade, patch.label
        return colour, label, normals

    def light(self, points: Array, normals: Array) -> Array:
        """Lambert's law for the lamp, with its shadows and an ambient part that is stronger from above; [3, P]."""
        way = (self.lamp[:, None] - points).astype(np.float32)
        distance = np.sqrt((way**2).sum(0))
        near, far = _slabs(self.box_rows[1:], points, way)
        dark = ((near < far) & (near > 1e-3) & (near < 1)).any(0)
        spheres = _spheres(self.ball_rows, points, way)
        dark |= ((spheres > 1e-3) & (spheres < 1)).any(0)
        direct = np.maximum((normals * way).sum(0) / distance, 0) * ~dark / (1 + 0.08 * distance**2)
        lit: Array = self.ambient * (0.85 + 0.15 * normals[1]) + 1.1 * direct * self.lamp_colour
        return lit


class Paint:
    """A random pattern of two random colours over surface coordinates (u, v) in metres.

    `wood` is the chance of a brown instead of any hue.
    """

    def __init__(
        self, rng: Generator, kinds: tuple[str, ...], saturation: float, value: float, wood: float = 0.0
    ) -> None:
        self.kind = rng.choice(kinds)
        hue = rng.normal(2.5, 0.25) if rng.random() < wood else rng.uniform(0, 2 * np.pi)
        shade = value * rng.uniform(0.6, 1.2)
        wheel = 0.5 + 0.5 * np.cos(hue + np.array([0.0, 2.1, 4.2]))
        colour = shade * (1 - saturation * rng.uniform(0.3, 1) * wheel)
        other = colour * rng.uniform(0.45, 0.8) if rng.random() < 0.6 else colour[rng.permutation(3)]
        self.colours = np.stack([colour, other], 1).clip(0, 1)  # [3, 2]
        self.period = rng.uniform(0.15, 0.5)

    def __call__(self, u: Array, v: Array) -> Array:
        """Colours [3, n]."""
        u, v = u / self.period, v / self.period
        mix: NDArray[Any]
        if self.kind == "stripes":
            mix = u % 1 < 0.5
        elif self.kind == "checks":
            mix = (np.floor(u) + np.floor(v)) % 2 > 0
        elif self.kind == "tiles":
            mix = (u % 1 < 0.12) | (v % 1 < 0.12)
        elif self.kind == "planks":
            mix = (u % 1 < 0.12) | ((v / 6 + 0.37 * np.floor(u)) % 1 < 0.03)
        elif self.kind == "doors":
            mix = np.abs(u) < 0.1
        elif self.kind == "clouds":
            mix = 0.5 + 0.25 * (np.sin(5 * u + 2 * v) + np.sin(3 * v - 2 * u + 1))
        else:
            mix = np.zeros_like(u)
        colours: Array = self.colours[:, :1] + (self.colours[:, 1:] - self.colours[:, :1]) * mix
        return colours


@dataclass
class Patch:
    """A rug or picture: a framed rectangle or ellipse on a face of the room."""

    label: int
    axis: int  # normal of the face: 1 for the floor, 0 and 2 for walls
    side: int  # which of the two faces, -1 or 1
    centre: tuple[float, float]
    half: tuple[float, float]
    turn: float
    round: bool
    frame: Paint
    paint: Paint

    def cover(self, u: Array, v: Array) -> tuple[NDArray[np.intp], Array]:
        """Indices of the points of the face that the patch covers, and their colours [3, n]."""
        u, v = _rotate(u - self.centre[0], v - self.centre[1], self.turn)
        a, b = np.abs(u) / self.half[0], np.abs(v) / self.half[1]
        extent = np.hypot(a, b) if self.round else np.maximum(a, b)
        on = np.flatnonzero(extent < 1)
        u, v = u[on], v[on]
        return on, np.where(extent[on] > 0.82, self.frame(u, v), self.paint(u, v))


def _rug(rng: Generator, half: NDArray[np.float64]) -> Patch:
    x, z = rng.uniform(-0.6, 0.6, 2) * half[[0, 2]]
    width, length = rng.uniform(0.5, 1.3, 2)
    frame = Paint(rng, ("plain",), 0.8, 0.6)
    paint = Paint(rng, ("plain", "stripes", "checks", "clouds"), 0.7, 0.7)
    return Patch(RUG, 1, -1, (x, z), (width, length), rng.uniform(0, np.pi), rng.random() < 0.35, frame, paint)


def _picture(rng: Generator, half: NDArray[np.float64]) -> Patch:
    axis, side = int(rng.choice((0, 2))), int(rng.choice((-1, 1)))
    width, height = rng.uniform(0.2, 0.65), rng.uniform(0.2, 0.5)
    along, up = rng.uniform(-0.75, 0.75) * half[2 - axis], rng.uniform(1.3, 1.8) - half[1]
    frame = Paint(rng, ("plain",), 0.7, 0.5, wood=0.6)
    paint = Paint(rng, ("clouds", "stripes", "checks", "plain", "tiles"), 0.6, 0.9)
    return Patch(PICTURE, axis, side, (along, up), (width, height), 0.0, rng.random() < 0.15, frame, paint)


def _look(forward: NDArray[np.float64], roll: float) -> Array:
    """Rotation [3, 3] from the camera frame (x right, y down, z forward) to the world (y up)."""
    z = forward / np.linalg.norm(forward)
    x = np.cross(z, (0.0, 1.0, 0.0))
    x /= np.linalg.norm(x)
    y = np.cross(z, x)
    c, s = np.cos(roll), np.sin(roll)
    return np.stack([c * x + s * y, c * y - s * x, z], axis=1).astype(np.float32)


def _rotate(x: Array, y: Array, angle: float | Array) -> tuple[Array, Array]:
    c, s = np.cos(angle), np.sin(angle)
    return c * x + s * y, c * y - s * x


def _turn(vectors: Array, yaw: float | Array) -> Array:
    """Vectors [3, ...] in the frame of something turned by `yaw` about the vertical."""
    x, z = _rotate(vectors[0], vectors[2], yaw)
    return np.stack([x, np.broadcast_to(vectors[1], x.shape), z])


def _slabs(boxes: Array, origin: Array, rays: Array) -> tuple[Array, Array]:
    """Multiples [K, P] of the rays [3, P] where they enter and leave each box; it is missed where they enter later."""
    centre, half, yaw = boxes[:, :3].T[:, :, None], boxes[:, 3:6].T[:, :, None], boxes[:, 6, None]
    inverse = _turn(rays[:, None], yaw)
    inverse = 1 / np.where(np.abs(inverse) < 1e-8, np.float32(1e-8), inverse)
    middle = -_turn(origin[:, None] - centre, yaw) * inverse
    reach = half * np.abs(inverse)
    enter: Array = (middle - reach).max(0)
    leave: Array = (middle + reach).min(0)
    return enter, leave


def _spheres(balls: Array, origin: Array, rays: Array) -> Array:
    """Multiples [K, P] of the rays [3, P] where they enter each ball; infinite where they miss it or it lies behind."""
    offset = origin[:, None] - balls[:, :3].T[:, :, None]
    a, b = (rays**2).sum(0), (offset * rays[:, None]).sum(0)
    root = b**2 - a * ((offset**2).sum(0) - balls[:, 3, None] ** 2)
    enter: Array = (-b - np.sqrt(np.maximum(root, 0))) / a
    enter[(root <= 0) | (enter <= 0)] = np.inf
    return enter
