"""NYUv2: indoor photos with segmentation (13 classes), depth and surface normals, as in MTAN, CAGrad and Nash-MTL.

SegNet with MTAN's attention, Adam, 200 epochs in batches of 2, images scaled and mirrored: the set-up of Liu et al.,
"Conflict-Averse Gradient Descent for Multi-task Learning", NeurIPS 2021, except that a tenth of its training images
validates. It tests on all 654 images of the official val and reports the mean of the last ten epochs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from detente.benchmark.datasets import mtan
from detente.benchmark.dense.networks import segnet
from detente.benchmark.dense.tasks import Classes, Dense, Depth, Normals

CLASSES = 13
scene = Dense({"segmentation": Classes(CLASSES), "depth": Depth(), "normals": Normals()})
tasks, losses, counts, metrics = scene.tasks, scene.losses, scene.counts, scene.metrics
settings: dict[str, Any] = {
    "epochs": 200,
    "batch_size": 2,
    "lr": 1e-4,
    "weight_decay": 0.0,
    "dropout": 0.0,
    "width": 1.0,
    "architecture": "mtan",
    "augment": True,
    "partial": False,
}
presets: dict[str, dict[str, Any]] = {
    "liu2021cagrad": {"protocol": "last-10-test"},
    "liu2019mtan": {"protocol": "last-10-test", "augment": False},
}
download = """NYUv2 as prepared by the authors of MTAN: nyuv2.zip, to which "pre-processed NYUv2 dataset" links on
https://github.com/lorenmt/mtan. Unpack it so that data/nyuv2 (or the folder that --data names) holds:
    train/image/0.npy .. 794.npy    288 x 384 x 3, from 0 to 1
    train/label/                    288 x 384, classes 0 to 12, -1 for none
    train/depth/                    288 x 384 x 1, in metres, 0 for unknown
    train/normal/                   288 x 384 x 3, 0 for unknown
    val/ with the same folders, 0.npy .. 653.npy"""


def make_data(directory: Path, partial: bool = False, augment: bool = True) -> dict[str, Dataset[tuple[Tensor, ...]]]:
    """Samples of image [3, 288, 384], classes, depth [1, ..] in metres and normals [3, ..]; test is the official val.

    Raises:
        DataError: files are missing, or (when a sample is read) not the official ones.
    """
    maps = {"depth": 1, "normal": 3}
    counted = {"train": 795, "val": 654}
    read = mtan.read(directory, download, partial, "nyuv2", counted, (288, 384), CLASSES, "label", maps)
    return scene.splits(read, scales=(1.0, 1.2, 1.5)) if augment else dict(read)


def make_model(
    tasks: tuple[str, ...], architecture: str = "mtan", width: float = 1.0, dropout: float = 0.0
) -> nn.Module:
    """:func:`detente.benchmark.dense.networks.segnet`, "mtan" or "segnet"."""
    return segnet(scene.channels(tasks), architecture, width, dropout)


def make_scheduler(optimizer: torch.optim.Optimizer, settings: dict[str, Any]) -> torch.optim.lr_scheduler.LRScheduler:
    """The learning rate is halved half way: after 100 of 200 epochs."""
    return torch.optim.lr_scheduler.MultiStepLR(optimizer, [max(1, settings["epochs"] // 2)], gamma=0.5)
