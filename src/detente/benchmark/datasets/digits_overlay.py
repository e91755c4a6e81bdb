"""Two pictures in one: digits of MNIST, or a piece of clothing of FashionMNIST and a digit, laid over each other.

The pictures are split first, then paired, so that no picture of one split is seen in another. Lin et al. 2019 made
120,000 training and 20,000 test pairs, two for each picture; here too every picture is used twice on either side. Of
the training pictures a tenth validates, which leaves 108,000 pairs to train on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, TensorDataset

from detente.benchmark.datasets import source

__all__ = ["accuracies", "cross_entropies", "files", "read"]

OFFICIAL = {"train": 60_000, "t10k": 10_000}
SIDE, CANVAS = 28, 36
PAIRS = 2  # for each picture
SEEDS = {"train": 0, "val": 1, "test": 2}

Pictures = tuple[NDArray[np.uint8], NDArray[np.uint8]]


def files(folder: str) -> list[str]:
    """Paths of the four files of MNIST or FashionMNIST."""
    return [f"{folder}/{part}-{kind}-ubyte" for part in OFFICIAL for kind in ("images-idx3", "labels-idx1")]


def read(directory: Path, upper: str, lower: str, download: str, partial: bool) -> dict[str, TensorDataset]:
    """Splits of (uint8 image [1, 36, 36], int64 label of the upper left picture, of the lower right one).

    ``upper`` and ``lower`` are the folders of the pictures' idx files.

    Raises:
        DataError: a file is missing or not the official one.
    """
    source.folder(directory, download, *(name for folder in dict.fromkeys((upper, lower)) for name in files(folder)))
    sources = {folder: _sources(directory / folder, partial) for folder in {upper, lower}}
    return {split: _overlay(sources[upper][split], sources[lower][split], seed) for split, seed in SEEDS.items()}


def cross_entropies(model: nn.Module, batch: Sequence[Tensor], columns: Mapping[str, int]) -> dict[str, Tensor]:
    """Mean cross-entropy (nats) of each task, whose labels are in a column of the batch."""
    output = model(batch[0] / 255)
    return {task: F.cross_entropy(output[task], batch[column]) for task, column in columns.items()}


def accuracies(
    model: nn.Module, data: Dataset[tuple[Tensor, ...]], columns: Mapping[str, int]
) -> dict[str, dict[str, float]]:
    """Share of right answers, 0..1, of each task, whose labels are in a column of the data."""
    right = dict.fromkeys(columns, 0)
    seen = 0
    for batch in DataLoader(data, batch_size=500):
        output = model(batch[0] / 255)
        for task, column in columns.items():
            right[task] += int((output[task].argmax(dim=1) == batch[column]).sum())
        seen += len(batch[0])
    return {task: {"accuracy": count / seen} for task, count in right.items()}


def _sources(folder: Path, partial: bool) -> dict[str, Pictures]:
    images, labels = _read(folder, "train", partial)
    kept, held = (list(map(int, rows)) for rows in source.validation("mnist", [str(k) for k in range(len(images))]))
    return {
        "train": (images[kept], labels[kept]),
        "val": (images[held], labels[held]),
        "test": _read(folder, "t10k", partial),
    }


def _read(folder: Path, part: str, partial: bool) -> Pictures:
    paths = [folder / f"{part}-{kind}-ubyte" for kind in ("images-idx3", "labels-idx1")]
    images, labels = (source.read_idx(path) for path in paths)
    source.check_shape(paths[0], images, (None, SIDE, SIDE))
    source.check_shape(paths[1], labels, (len(images),))
    source.check_count(f"pictures in {paths[0]}", len(images), OFFICIAL[part], partial)
    source.check_labels(paths[1], labels, 10)
    return images, labels


def _overlay(upper: Pictures, lower: Pictures, seed: int) -> TensorDataset:
    count = PAIRS * len(upper[0])
    first = np.arange(count) % len(upper[0])
    # NumPy keeps RandomState's stream the same for ever
    second = np.random.RandomState(seed).permutation(count) % len(lower[0])
    canvas = np.zeros((count, 1, CANVAS, CANVAS), dtype=np.uint8)
    canvas[:, 0, :SIDE, :SIDE] = upper[0][first]
    corner = canvas[:, 0, -SIDE:, -SIDE:]
    np.maximum(corner, lower[0][second], out=corner)
    labels = (torch.from_numpy(part[rows].astype(np.int64)) for (_, part), rows in ((upper, first), (lower, second)))
    return TensorDataset(torch.from_numpy(canvas), *labels)
