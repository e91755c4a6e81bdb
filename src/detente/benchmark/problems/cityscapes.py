"""Cityscapes: street photos with segmentation (7 classes) and inverse depth, as in MTAN, CAGrad and Nash-MTL.

The set-up is that of NYUv2 in batches of 8 (Liu et al., "Conflict-Averse Gradient Descent for Multi-task Learning",
NeurIPS 2021). What the data set calls depth is the disparity, at most about .5; the published augmentation divides it
by the scale all the same, and so does this one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.utils.data import Dataset

from detente.benchmark.datasets import mtan
from detente.benchmark.dense.networks import segnet
from detente.benchmark.dense.tasks import Classes, Dense, Depth
from detente.benchmark.problems import nyuv2

CLASSES = 7
scene = Dense({"segmentation": Classes(CLASSES), "depth": Depth()})
tasks, losses, counts, metrics = scene.tasks, scene.losses, scene.counts, scene.metrics
make_scheduler = nyuv2.make_scheduler
settings: dict[str, Any] = nyuv2.settings | {"batch_size": 8}
presets = nyuv2.presets
download = """Cityscapes as prepared by the authors of MTAN: cityscapes2.zip, to which "128x256" links on
https://github.com/lorenmt/mtan. Unpack it so that data/cityscapes (or the folder that --data names) holds:
    train/image/0.npy .. 2974.npy    128 x 256 x 3, from 0 to 1
    train/label_7/                   128 x 256, classes 0 to 6, -1 for none (LibMTL's copy calls this folder label)
    train/depth/                     128 x 256 x 1, the disparity, 0 for unknown
    val/ with the same folders, 0.npy .. 499.npy"""


def make_data(directory: Path, partial: bool = False, augment: bool = True) -> dict[str, Dataset[tuple[Tensor, ...]]]:
    """Samples of image [3, 128, 256], classes [128, 256] and inverse depth [1, 128, 256]; test is the official val.

    Raises:
        DataError: files are missing, or (when a sample is read) not the official ones.
    """
    labels = "label" if (directory / "train/label").is_dir() else "label_7"
    counted = {"train": 2975, "val": 500}
    read = mtan.read(directory, download, partial, "cityscapes", counted, (128, 256), CLASSES, labels, {"depth": 1})
    return scene.splits(read, scales=(1.0, 1.2, 1.5)) if augment else dict(read)


def make_model(
    tasks: tuple[str, ...], architecture: str = "mtan", width: float = 1.0, dropout: float = 0.0
) -> nn.Module:
    """:func:`detente.benchmark.dense.networks.segnet`, "mtan" or "segnet"."""
    return segnet(scene.channels(tasks), architecture, width, dropout)
