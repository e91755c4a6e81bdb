"""NYUv2 and Cityscapes as the authors of MTAN prepared them: one .npy file per image and per target.

Liu, Johns and Davison, "End-to-End Multi-Task Learning with Attention", CVPR 2019. Their test split is the folder val.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from detente.benchmark.datasets import source
from detente.benchmark.dense.tasks import IGNORE

__all__ = ["Arrays", "read"]


class Arrays(Dataset[tuple[Tensor, ...]]):
    """Samples (image [3, H, W], labels int64 [H, W] with -1 for none, one map [C, H, W] per further folder).

    Files are read, and checked, when asked for. Images are float32 of 0 to 1, as they are in the files.

    Args:
        directory: with the folders.
        samples: names of the files, without ``.npy``.
        size: (H, W) of all files.
        classes: labels are below.
        labels: folder of the labels.
        maps: channels of the further folders' files; values below 0 only where there are three.
    """

    def __init__(
        self,
        directory: Path,
        samples: Sequence[str],
        size: tuple[int, int],
        classes: int,
        labels: str,
        maps: Mapping[str, int],
    ) -> None:
        self.directory, self.samples, self.size, self.classes = directory, samples, size, classes
        self.labels, self.maps = labels, maps

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        name = f"{self.samples[index]}.npy"
        path = self.directory / self.labels / name
        labels = source.read_array(path, self.size)
        source.check_labels(path, labels, self.classes, (IGNORE,))
        maps = [self._map(self.directory / folder / name, channels) for folder, channels in self.maps.items()]
        image = self._map(self.directory / "image" / name, 3)
        return image, torch.from_numpy(labels.astype(np.int64)), *maps

    def _map(self, path: Path, channels: int) -> Tensor:
        array = source.read_array(path, (*self.size, channels))
        if channels == 1:
            source.check_depth(path, array)
        return torch.from_numpy(np.ascontiguousarray(np.moveaxis(array, -1, 0), dtype=np.float32))


def read(
    directory: Path,
    download: str,
    partial: bool,
    name: str,
    counts: Mapping[str, int],
    size: tuple[int, int],
    classes: int,
    labels: str,
    maps: Mapping[str, int],
) -> dict[str, Arrays]:
    """The splits train and val, cut from the official train by the list of that ``name``, and test, the official val.

    Args:
        directory: with train and val.
        download: text for the error about missing files.
        partial: whether fewer samples than ``counts`` (of the official train and val) will do.
        name: as for :func:`detente.benchmark.datasets.source.validation`.
        counts, size, classes, labels, maps: see :class:`Arrays`.

    Raises:
        DataError: files are missing. What is in them is checked when they are read.
    """
    folders = ["image", labels, *maps]
    source.folder(directory, download, *(f"{part}/{folder}" for part in counts for folder in folders))
    found: dict[str, list[str]] = {}
    for part, official in counts.items():
        files = (path.stem for path in (directory / part / "image").glob("*.npy") if path.stem.isdigit())
        found[part] = sorted(files, key=int)
        source.check_count(f"images in {directory / part}", len(found[part]), official, partial)
        for folder in folders[1:]:
            for sample in found[part]:
                source.present(directory / part / folder / f"{sample}.npy")
    kept, held = source.validation(name, found["train"])
    splits = {"train": ("train", kept), "val": ("train", held), "test": ("val", found["val"])}
    return {
        split: Arrays(directory / part, samples, size, classes, labels, maps)
        for split, (part, samples) in splits.items()
    }
