"""CIFAR-100: 60,000 images of 32x32 pixels in 100 classes, five in each of 20 superclasses."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import TensorDataset

from detente.benchmark.datasets import source

__all__ = ["CLASSES", "SUPERCLASSES", "read"]

FOLDER = "cifar-100-python"
OFFICIAL = {"train": 50_000, "test": 10_000}
SUPERCLASSES = (
    "aquatic_mammals", "fish", "flowers", "food_containers", "fruit_and_vegetables", "household_electrical_devices",
    "household_furniture", "insects", "large_carnivores", "large_man-made_outdoor_things",
    "large_natural_outdoor_scenes", "large_omnivores_and_herbivores", "medium_mammals", "non-insect_invertebrates",
    "people", "reptiles", "small_mammals", "trees", "vehicles_1", "vehicles_2",
)  # fmt: skip
CLASSES = (
    (4, 30, 55, 72, 95), (1, 32, 67, 73, 91), (54, 62, 70, 82, 92), (9, 10, 16, 28, 61), (0, 51, 53, 57, 83),
    (22, 39, 40, 86, 87), (5, 20, 25, 84, 94), (6, 7, 14, 18, 24), (3, 42, 43, 88, 97), (12, 17, 37, 68, 76),
    (23, 33, 49, 60, 71), (15, 19, 21, 31, 38), (34, 63, 64, 66, 75), (26, 45, 77, 79, 99), (2, 11, 35, 46, 98),
    (27, 29, 44, 78, 93), (36, 50, 65, 74, 80), (47, 52, 56, 59, 96), (8, 13, 48, 58, 90), (41, 69, 81, 85, 89),
)  # fmt: skip
"""Fine labels of each superclass."""
LABELS = {"fine_labels": 100, "coarse_labels": 20}
"""How many there are of each kind."""


def read(directory: Path, download: str, partial: bool) -> dict[str, TensorDataset]:
    """Splits of (uint8 image [3, 32, 32], int64 superclass 0..19, int64 class within the superclass 0..4).

    Raises:
        DataError: a file is missing or not the official one.
    """
    folder = source.folder(directory, download, *(f"{FOLDER}/{name}" for name in (*OFFICIAL, "meta"))) / FOLDER
    names = source.read_pickle(folder / "meta").get("coarse_label_names")
    if names != [name.encode() for name in SUPERCLASSES]:
        raise source.DataError(f"{folder / 'meta'} names other superclasses than CIFAR-100. Unpack the archive again.")
    parts = {split: _read(folder / split) for split in OFFICIAL}
    for split, (images, *_) in parts.items():
        source.check_count(f"images in {folder / split}", len(images), OFFICIAL[split], partial)
    kept, held = source.validation("cifar100", [str(k) for k in range(len(parts["train"][0]))])
    chosen = {split: torch.tensor([int(k) for k in numbers]) for split, numbers in (("train", kept), ("val", held))}
    splits = {split: TensorDataset(*(part[rows] for part in parts["train"])) for split, rows in chosen.items()}
    return splits | {"test": TensorDataset(*parts["test"])}


def _read(path: Path) -> tuple[Tensor, Tensor, Tensor]:
    content = source.read_pickle(path)
    missing = [key for key in ("data", "fine_labels", "coarse_labels") if key not in content]
    if missing:
        raise source.DataError(f"{path} has no {missing[0]!r}. It is not the official file (the Python version).")
    images = content["data"]
    if not isinstance(images, np.ndarray) or images.dtype != np.uint8:
        raise source.DataError(f"{path}: 'data' must be an array of bytes. It is not the official file.")
    source.check_shape(path, images, (None, 3 * 32 * 32))
    fine, coarse = (_labels(path, content[key], len(images), classes) for key, classes in LABELS.items())
    place = np.full((100, 2), -1)
    for superclass, members in enumerate(CLASSES):
        place[list(members)] = [(superclass, k) for k in range(len(members))]
    wrong = np.flatnonzero(place[fine, 0] != coarse)
    if len(wrong):
        k = wrong[0]
        raise source.DataError(
            f"{path}: image {k} has class {fine[k]} in superclass {coarse[k]}, where it does not belong."
        )
    return torch.from_numpy(images.reshape(-1, 3, 32, 32)), torch.from_numpy(coarse), torch.from_numpy(place[fine, 1])


def _labels(path: Path, values: object, count: int, classes: int) -> NDArray[np.int64]:
    if not isinstance(values, list) or len(values) != count or not all(type(value) is int for value in values):
        raise source.DataError(f"{path} must have one whole number per image as labels, {count} of them.")
    labels = np.array(values, dtype=np.int64)
    source.check_labels(path, labels, classes)
    return labels
