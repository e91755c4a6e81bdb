"""NYUD-v2 with four targets, in the layout of ASTMT, MTI-Net and ATRC. Their test split is the list val.

Targets: Silberman et al., ECCV 2012 (depth, 40 classes by Gupta et al. 2013), and normals and edges computed from them
(Maninis et al., "Attentive Single-Tasking of Multiple Tasks", CVPR 2019).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from detente.benchmark.datasets import source
from detente.benchmark.dense.images import direction, padded, picture
from detente.benchmark.dense.tasks import IGNORE

__all__ = ["CLASSES", "SIZE", "Rooms", "read"]

COUNTS = {"train": 795, "val": 654}
CLASSES = 40
SIZE = (448, 576)
"""Images (425 x 560) are padded to this, as in ATRC: multiples of 32 for the trunks."""
FILES = {"images": "png", "segmentation": "png", "depth": "npy", "normals": "png", "edge": "png"}
"""Folders, and the kind of file in them."""


class Rooms(Dataset[tuple[Tensor, ...]]):
    """Samples (image [3, 448, 576], classes [448, 576], depth [1, ..] in metres, normals [3, ..], edges [448, 576]).

    Images have ImageNet's mean and deviation taken out. Without a target are: classes and edges of -1, depth of 0,
    normals of zero length. Files are read, and checked, when asked for.
    """

    def __init__(self, directory: Path, names: Sequence[str]) -> None:
        self.directory, self.names = directory, names

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        at = paths(self.directory, self.names[index])
        image = source.read_picture(at["images"])
        size = (image.shape[0], image.shape[1])
        source.check_fits(at["images"], size, SIZE)
        labels = source.read_picture(at["segmentation"], size, labels=True)
        source.check_labels(at["segmentation"], labels, CLASSES + 1)
        depth = source.read_array(at["depth"], size)
        source.check_depth(at["depth"], depth)
        normals = source.read_picture(at["normals"], size)
        edges = source.read_picture(at["edge"], size, labels=True)
        return (
            padded(picture(image), SIZE, 0.0),
            padded(torch.from_numpy(labels.astype(np.int64) - 1), SIZE, IGNORE),  # 0 is unlabelled
            padded(torch.from_numpy(depth.astype(np.float32)).unsqueeze(0), SIZE, 0.0),
            padded(direction(normals), SIZE, 0.0),
            padded(torch.from_numpy((edges > 127).astype(np.int64)), SIZE, IGNORE),
        )


def read(directory: Path, download: str, partial: bool) -> dict[str, Rooms]:
    """The splits of `source.listed`.

    Raises:
        DataError: files are missing. What is in them is checked when they are read.
    """
    source.folder(directory, download, *FILES, "gt_sets/train.txt", "gt_sets/val.txt")
    splits = source.listed(directory, "gt_sets", COUNTS, lambda name: list(paths(directory, name).values()), partial)
    return {split: Rooms(directory, names) for split, names in splits.items()}


def paths(directory: Path, name: str) -> dict[str, Path]:
    """The files of one sample by their folder."""
    return {folder: directory / folder / f"{name}.{kind}" for folder, kind in FILES.items()}
