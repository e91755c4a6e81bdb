"""PASCAL-Context with five targets, in the layout of ASTMT, MTI-Net and ATRC. Their test split is the list val.

Maninis, Radosavovic and Kokkinos, "Attentive Single-Tasking of Multiple Tasks", CVPR 2019: semantic classes, human
parts (Chen et al. 2014) and edges are annotations; normals and saliency were found by networks ("distilled").
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from detente.benchmark.datasets import source
from detente.benchmark.dense.images import direction, padded, picture
from detente.benchmark.dense.tasks import IGNORE

__all__ = ["CLASSES", "PARTS", "SIZE", "Photos", "read"]

COUNTS = {"train": 4998, "val": 5105}
CLASSES = 21
SIZE = (512, 512)
"""Images (at most 500 pixels wide and high) are padded to this, as in ATRC."""
IMAGES, CONTEXT, HUMANS, NORMALS, SALIENCY = FILES = {
    "JPEGImages": "jpg",
    "pascal-context/trainval": "mat",
    "human_parts": "mat",
    "normals_distill": "png",
    "sal_distill": "png",
}
"""Folders, and the kind of file in them."""
SEMANTICS = ("semseg/VOC12", "semseg/pascal-context")  # of an image that is in both, the first
LISTS = "ImageSets/Context"
PERSON = 15

PARTS = ("background", "head", "torso", "upper arm", "lower arm", "upper leg", "lower leg")
PART_NAMES = {
    1: "head hair lear rear lebrow rebrow leye reye nose mouth",
    2: "torso neck",
    3: "luarm ruarm",
    4: "llarm rlarm lhand rhand",
    5: "luleg ruleg",
    6: "llleg rlleg lfoot rfoot",
}
PART = {name: part for part, names in PART_NAMES.items() for name in names.split()}

# The network that found the normals was trained on NYUD: they count where the class (of 459) is also one of NYUD's,
# by name, and on tvmonitor (427), which is called television there.
WITH_NORMALS = np.array(
    [
        3, 4, 6, 9, 10, 11, 13, 15, 17, 18, 22, 23, 29, 30, 33, 34, 36, 37, 38, 39, 41, 43, 46, 49, 50, 51, 53, 55, 56,
        59, 61, 62, 65, 66, 68, 69, 72, 73, 78, 83, 84, 85, 87, 88, 95, 96, 101, 104, 105, 107, 111, 113, 115, 122, 124,
        135, 141, 142, 143, 146, 150, 154, 157, 158, 159, 165, 172, 174, 181, 183, 184, 191, 193, 195, 197, 199, 202,
        213, 215, 216, 219, 220, 223, 225, 228, 230, 232, 233, 238, 239, 242, 243, 246, 250, 251, 252, 255, 260, 261,
        263, 269, 272, 273, 275, 281, 283, 284, 285, 286, 287, 288, 290, 291, 292, 293, 295, 304, 307, 309, 310, 314,
        315, 319, 323, 329, 330, 331, 336, 342, 345, 349, 350, 351, 352, 355, 357, 368, 370, 371, 374, 379, 380, 383,
        384, 397, 401, 403, 405, 407, 408, 411, 412, 413, 414, 417, 419, 421, 423, 427, 429, 430, 432, 440, 441, 442,
        443, 444, 446, 454, 457,
    ]
)  # fmt: skip


class Photos(Dataset[tuple[Tensor, ...]]):
    """Samples (image [3, 512, 512], classes, human parts, saliency, normals [3, 512, 512], edges); others [512, 512].

    Images have ImageNet's mean and deviation taken out. Without a target are: labels of -1, normals of zero length.
    Images without annotated humans have no target for human parts. An edge is a pixel whose class (of 459) differs from
    that of its right or lower neighbour. Files are read, and checked, when asked for.
    """

    def __init__(self, directory: Path, names: Sequence[str]) -> None:
        self.directory, self.names = directory, names

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        at = paths(self.directory, self.names[index])
        image = source.read_picture(at[IMAGES])
        size = (image.shape[0], image.shape[1])
        source.check_fits(at[IMAGES], size, SIZE)
        context = _context(at[CONTEXT], size)
        normals = source.read_picture(at[NORMALS], size)
        labels = (
            _semantics(at["semseg"], size),
            _human_parts(at[HUMANS], size),
            _saliency(at[SALIENCY], size),
            _edges(context),
        )
        *maps, edges = (padded(torch.from_numpy(label), SIZE, IGNORE) for label in labels)
        directions = direction(normals) * torch.from_numpy(np.isin(context, WITH_NORMALS))
        return (padded(picture(image), SIZE, 0.0), *maps, padded(directions, SIZE, 0.0), edges)


def _semantics(path: Path, size: tuple[int, int]) -> NDArray[np.int64]:
    labels = source.read_picture(path, size, labels=True)
    source.check_labels(path, labels, CLASSES, (255,))
    return np.where(labels == 255, IGNORE, labels.astype(np.int64))


def _saliency(path: Path, size: tuple[int, int]) -> NDArray[np.int64]:
    return (source.read_picture(path, size, labels=True) > 127).astype(np.int64)


def _context(path: Path, size: tuple[int, int]) -> NDArray[np.int64]:
    def take(labels: NDArray[Any]) -> NDArray[np.int64]:
        source.check_numbers(path, labels, size)
        return labels.astype(np.int64)

    labels: NDArray[np.int64] = source.read_mat(path, "LabelMap", take)
    return labels


def _human_parts(path: Path, size: tuple[int, int]) -> NDArray[np.int64]:
    def take(annotation: NDArray[Any]) -> NDArray[np.int64]:
        labels = np.zeros(size, np.int64)
        annotated = False
        for thing in annotation["objects"][0, 0].flat:
            if int(thing["class_ind"].item()) == PERSON and thing["parts"].size:
                annotated = True
                for part in thing["parts"].flat:
                    name = str(part["part_name"].item())
                    if name not in PART:
                        raise source.DataError(f"{path} has the human part {name!r}, which the official files lack.")
                    source.check_numbers(path, part["mask"], size)
                    labels[part["mask"] != 0] = PART[name]
        return labels if annotated else np.full(size, IGNORE)

    labels: NDArray[np.int64] = source.read_mat(path, "anno", take)
    return labels


def _edges(context: NDArray[np.int64]) -> NDArray[np.int64]:
    edges = np.zeros_like(context)
    edges[:, :-1] |= context[:, :-1] != context[:, 1:]
    edges[:-1] |= context[:-1] != context[1:]
    return edges


def read(directory: Path, download: str, partial: bool) -> dict[str, Photos]:
    """The splits of `source.listed`.

    Raises:
        DataError: files are missing. What is in them is checked when they are read.
    """
    source.folder(directory, download, *FILES, "semseg", f"{LISTS}/train.txt", f"{LISTS}/val.txt")
    splits = source.listed(directory, LISTS, COUNTS, lambda name: list(paths(directory, name).values()), partial)
    return {split: Photos(directory, names) for split, names in splits.items()}


def paths(directory: Path, name: str) -> dict[str, Path]:
    """The files of one image by their folder; that of its semantic classes as "semseg"."""
    found = {folder: directory / folder / f"{name}.{kind}" for folder, kind in FILES.items()}
    *first, last = (directory / folder / f"{name}.png" for folder in SEMANTICS)
    return found | {"semseg": next((path for path in first if path.is_file()), last)}
