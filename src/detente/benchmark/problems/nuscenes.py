"""nuScenes from above: road, crossings and walkways, and where the vehicles are, from six cameras.

Both tasks are maps of the 100 m around the car (cells of half a metre), as bird's-eye-view networks predict them:

- ``map``: drivable area, pedestrian crossings and walkways of the map expansion. Binary cross-entropy; ``iou`` is the
  mean over the three of intersection over union at probability .5.
- ``vehicles``: centres of the official detection task's seven kinds of vehicle, as heat maps. CenterPoint's focal loss
  (Yin et al., CVPR 2021), per sample and over its vehicles; ``ap`` is the mean over the kinds of average precision,
  where a peak is right within 2 m of a centre. It is not nuScenes' figure, which averages over four distances and
  cuts recall and precision below 10 %; and centres count where their cells are.

The official validation scenes are the test split; a tenth of the training scenes, chosen by a hash of their names,
validates. For v1.0-mini the same lists hold, so that four of its scenes test.

The preset philion2020lift has the published grid, image size, augmentation, optimiser, gradient clipping and weight of
what is there in the loss (Philion & Fidler, "Lift, Splat, Shoot", ECCV 2020, and its code). Theirs is EfficientNet-B0
from ImageNet and a lift by predicted depth; here it is ResNet-18 from scratch and a lift by projection, see
:mod:`detente.benchmark.models.bev`. They train one task at a time: drivable area, lane boundaries, or the areas of
vehicles instead of their centres. The figures are therefore not comparable with the paper's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from detente.benchmark.datasets.nuscenes import (
    IMAGE,
    KINDS,
    LAYERS,
    Frame,
    Grid,
    Map,
    heat_maps,
    read_frames,
    read_view,
)
from detente.benchmark.datasets.source import DataError, check_count, folder, held_out, shipped
from detente.benchmark.dense.images import picture
from detente.benchmark.models.bev import BEVNet
from detente.method import Range

tasks: dict[str, dict[str, str]] = {"map": {"iou": "max"}, "vehicles": {"ap": "max"}}
settings: dict[str, Any] = {
    "epochs": 47,  # about 300,000 steps
    "batch_size": 4,
    "lr": 1e-3,
    "weight_decay": 1e-7,
    "clip_norm": 5.0,
    "dropout": 0.0,
    "width": 1.0,
    "version": "v1.0-trainval",
    "image_height": 128,
    "image_width": 352,
    "cameras": 5,  # of six, drawn for every training sample
    "reach": 50.0,
    "cell": 0.5,
    "partial": False,
}
presets: dict[str, dict[str, Any]] = {"philion2020lift": {}}
download = """\
nuScenes is at https://www.nuscenes.org/nuscenes#download (an account is needed; read its terms of use). Of "Full
dataset (v1.0)", take for Trainval "Metadata" and the ten file blobs (their keyframes are enough), or Mini instead with
--set version=v1.0-mini; and "Map expansion pack (v1.3)", to be unpacked inside maps/. All go to:
  data/nuscenes/   or the folder that --data names
  v1.0-trainval/   scene.json, sample.json, sample_data.json, ego_pose.json, calibrated_sensor.json, sensor.json,
                   sample_annotation.json, instance.json, category.json, log.json (others are not read)
  samples/         CAM_FRONT/*.jpg and the other five cameras, 1600x900
  maps/expansion/  boston-seaport.json, singapore-hollandvillage.json, singapore-onenorth.json,
                   singapore-queenstown.json
Reading the tables of trainval takes a minute or two and a few GB of memory."""

COUNTS = {"v1.0-trainval": (850, 34149), "v1.0-mini": (10, 404)}  # scenes, samples
ranges = {"weight_decay": Range(1e-8, 1e-3, log=True)}  # about the published one
CHANNELS = {"map": len(LAYERS), "vehicles": len(KINDS)}
PRESENT = 2.13  # weight of what is there in the cross-entropy
WITHIN = 2.0  # metres
PEAKS = 100  # detections of a kind that count in a sample

Sample = tuple[Tensor, Tensor, Tensor, Tensor]


def make_data(
    directory: Path,
    version: str = "v1.0-trainval",
    image_height: int = 128,
    image_width: int = 352,
    cameras: int = 5,
    reach: float = 50.0,
    cell: float = 0.5,
    partial: bool = False,
) -> dict[str, Dataset[Sample]]:
    """Splits of :class:`Views`.

    Raises:
        DataError: files are missing, malformed, or fewer than published (unless ``partial``).
        ValueError: no such version.
    """
    if version not in COUNTS:
        raise ValueError(f"version must be one of {', '.join(COUNTS)}; got {version!r}.")
    folder(directory, download, version, "samples", "maps/expansion")
    frames = read_frames(directory, version)
    scenes = sorted({frame.scene for frame in frames})
    for what, found, official in zip(("scenes", "samples"), (len(scenes), len(frames)), COUNTS[version], strict=True):
        check_count(f"{version} {what}", found, official, partial)
    official_val = shipped("nuscenes_val")
    train, val = held_out([scene for scene in scenes if scene not in official_val])
    splits = {"train": train, "val": val, "test": [scene for scene in scenes if scene in official_val]}
    maps = {place: Map(directory / f"maps/expansion/{place}.json") for place in {frame.location for frame in frames}}
    data: dict[str, Dataset[Sample]] = {}
    for split, names in splits.items():
        chosen = [frame for frame in frames if frame.scene in set(names)]
        if not chosen:
            raise DataError(f"{directory / version / 'scene.json'} has no scene for the split {split!r}.")
        drawn = cameras if split == "train" else None
        data[split] = Views(chosen, maps, Grid(reach, cell), (image_height, image_width), drawn)
    return data


class Views(Dataset[Sample]):
    """Samples of (images [N, 3, H, W], projections [N, 3, 4], map [3, X, Y], heat maps [7, X, Y]), all float32.

    Images are normalised as for ImageNet; projections lead from the car's frame to their pixels, see
    :class:`~detente.benchmark.datasets.nuscenes.Frame`. With ``cameras``, that many of the six are drawn for every
    sample, and augmented.
    """

    def __init__(
        self,
        frames: Sequence[Frame],
        maps: Mapping[str, Map],
        grid: Grid,
        size: tuple[int, int],
        cameras: int | None = None,
    ) -> None:
        self.frames, self.maps, self.grid, self.size, self.cameras = frames, maps, grid, size, cameras

    def __len__(self) -> int:
        return len(self.frames)

    def __getitem__(self, index: int) -> Sample:
        frame = self.frames[index]
        chosen = list(range(len(frame.images)))
        if self.cameras is not None:
            chosen = torch.randperm(len(chosen))[: self.cameras].tolist()
        images, projections = [], []
        for camera in chosen:
            matrix = framing(*self.size, augment=self.cameras is not None)
            images.append(picture(read_view(frame.images[camera], matrix, *self.size)))
            projections.append(matrix @ frame.projections[camera])
        return (
            torch.stack(images),
            torch.from_numpy(np.stack(projections)).float(),
            torch.from_numpy(self.maps[frame.location].raster(frame.pose, self.grid)).float(),
            torch.from_numpy(heat_maps(frame.boxes, self.grid)),
        )


def framing(height: int, width: int, augment: bool) -> NDArray[np.float64]:
    """Matrix [3, 3] from the pixels of a camera to those of a network's input, as Philion & Fidler resize and crop.

    ``augment`` draws the size, the part, a mirror image and a turn of up to 5.4 degrees.
    """
    scale, low, left, mirrored, turn = max(height / IMAGE[0], width / IMAGE[1]), 0.11, 0.5, False, 0.0
    if augment:
        size, low, left, mirror, turn = torch.rand(5).tolist()
        scale *= (0.193 + 0.032 * size) / 0.22
        low, mirrored, turn = 0.22 * low, mirror < 0.5, math.radians(5.4) * (2 * turn - 1)
    above = (1 - low) * IMAGE[0] * scale - height
    beside = left * max(0.0, IMAGE[1] * scale - width)
    cut = np.array([[scale, 0, -beside], [0, scale, -above], [0, 0, 1]])
    flip = np.array([[-1.0, 0, width], [0, 1, 0], [0, 0, 1]]) if mirrored else np.eye(3)
    centre = np.array([[1.0, 0, width / 2], [0, 1, height / 2], [0, 0, 1]])
    cos, sin = math.cos(turn), math.sin(turn)
    turned = centre @ np.array([[cos, -sin, 0], [sin, cos, 0], [0, 0, 1]]) @ np.linalg.inv(centre)
    matrix: NDArray[np.float64] = turned @ flip @ cut
    return matrix


def make_model(
    tasks: tuple[str, ...], width: float = 1.0, dropout: float = 0.0, reach: float = 50.0, cell: float = 0.5
) -> nn.Module:
    """A :class:`BEVNet`; heat maps start near .1, as CenterPoint's do, or the many empty cells would rule the loss."""
    model = BEVNet({task: CHANNELS[task] for task in tasks}, Grid(reach, cell).centres.tolist(), width, dropout)
    if "vehicles" in tasks:
        last = model.heads["vehicles"][-1]  # type: ignore[index]
        nn.init.constant_(last.bias, -math.log(9))
    return model


def losses(model: nn.Module, batch: Sequence[Tensor], tasks: tuple[str, ...]) -> dict[str, Tensor]:
    """Cross-entropy of the map, focal loss of the heat maps; means over the samples."""
    images, projections, layers, heat = batch
    output = model(images, projections)
    found = {}
    if "map" in tasks:
        weight = layers.new_tensor(PRESENT)
        found["map"] = F.binary_cross_entropy_with_logits(output["map"], layers, pos_weight=weight)
    if "vehicles" in tasks:
        found["vehicles"] = focal(output["vehicles"], heat).mean()
    return {task: found[task] for task in tasks}


def focal(logits: Tensor, heat: Tensor) -> Tensor:
    """Focal loss [B] of heat maps [B, K, X, Y], over the number of centres (Zhou et al. 2019, eq. 1; at least 1)."""
    centre = heat == 1
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    log_right, log_wrong = F.logsigmoid(logits), F.logsigmoid(-logits)
    at_centres = torch.where(centre, log_wrong.exp() ** 2 * log_right, 0)
    elsewhere = torch.where(centre, 0, (1 - heat) ** 4 * log_right.exp() ** 2 * log_wrong)
    return -(at_centres + elsewhere).sum((1, 2, 3)) / centre.sum((1, 2, 3)).clamp_min(1)


def metrics(model: nn.Module, data: Dataset[Sample], tasks: tuple[str, ...]) -> dict[str, dict[str, float]]:
    """Mean IoU of the layers and mean average precision of the kinds; layers and kinds that never appear are left out.

    Raises:
        ValueError: none appears.
    """
    assert isinstance(data, Views)
    device = next(model.parameters()).device
    hits, union = (torch.zeros(len(LAYERS), dtype=torch.float64) for _ in range(2))
    detected: list[list[Detections]] = [[] for _ in KINDS]
    for images, projections, layers, heat in DataLoader(data, batch_size=4):
        output = {task: x.float().cpu() for task, x in model(images.to(device), projections.to(device)).items()}
        if "map" in tasks:
            there, claimed = layers == 1, output["map"] > 0
            hits += (there & claimed).sum((0, 2, 3))
            union += (there | claimed).sum((0, 2, 3))
        if "vehicles" in tasks:
            for scores, truth in zip(output["vehicles"], heat, strict=True):
                for kind in range(len(KINDS)):
                    detected[kind].append(detect(scores[kind], truth[kind], data.grid.cell))
    figures = {}
    if "map" in tasks:
        figures["map"] = {"iou": _mean("map layer", (hits / union).tolist())}
    if "vehicles" in tasks:
        figures["vehicles"] = {"ap": _mean("vehicle", [average_precision(found) for found in detected])}
    return figures


def _mean(what: str, values: Sequence[float]) -> float:
    known = [value for value in values if not math.isnan(value)]
    if not known:
        raise ValueError(f"no {what} appears in the evaluated samples, so there is nothing to score.")
    return sum(known) / len(known)


Detections = tuple[list[tuple[float, bool]], int]
"""(score, whether it is right) of a sample's peaks, and the number of its objects."""


def detect(scores: Tensor, heat: Tensor, cell: float) -> Detections:
    """Peaks of a map of scores [X, Y], best first, each matched to the nearest centre of its heat map that is left."""
    peaks = (scores == F.max_pool2d(scores[None, None], 3, 1, 1)[0, 0]).nonzero()
    values, order = scores[peaks[:, 0], peaks[:, 1]].sort(descending=True, stable=True)
    centres = (heat == 1).nonzero().double() * cell
    distances = torch.cdist(peaks[order[:PEAKS]].double() * cell, centres)
    found = []
    for score, row in zip(values[:PEAKS].tolist(), distances, strict=True):
        right = bool(len(centres)) and bool(row.min() < WITHIN)
        if right:
            distances[:, row.argmin()] = math.inf
        found.append((score, right))
    return found, len(centres)


def average_precision(samples: Sequence[Detections]) -> float:
    """Mean over the recalls 0, 1 ... 100 % of the best precision at that recall or more; nan without objects."""
    objects = sum(count for _, count in samples)
    if not objects:
        return math.nan
    ranked = sorted((detection for found, _ in samples for detection in found), key=lambda pair: -pair[0])
    right = np.cumsum([correct for _, correct in ranked], dtype=float)
    precision = np.maximum.accumulate((right / np.arange(1, len(right) + 1))[::-1])[::-1]
    reached = np.searchsorted(right / objects, np.arange(101) / 100)
    return float(np.append(precision, 0.0)[reached].mean())
