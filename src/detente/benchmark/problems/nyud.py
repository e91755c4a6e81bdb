"""NYUD-v2: indoor photos with segmentation (40 classes), depth, surface normals and edges, as in ASTMT and MTI-Net.

The multi-task baseline of Vandenhende et al., "MTI-Net", ECCV 2020 (github.com/SimonVandenhende/Multi-Task-Learning-
PyTorch): HRNet-18 (in its code HRNet-W18-Small-v2), Adam, 100 epochs in batches of 8, a learning rate that falls to
zero, and its factors of the losses, which are part of every task's loss here: equal weights are the published ones.
Images keep their size, padded to 448 x 576 as in ATRC, where MTI-Net resizes them to 480 x 640; the tasks' heads are
plain, without its distillation.

Published trunks start from ImageNet's weights, and published figures cannot be reached without. None are downloaded:
give a file of your own with --set pretrained=FILE.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from detente.benchmark.datasets import nyud
from detente.benchmark.dense.networks import with_trunk
from detente.benchmark.dense.tasks import Classes, Dense, Depth, Edges, Normals

scene = Dense(
    {
        "segmentation": Classes(nyud.CLASSES, figures=("miou",)),
        "depth": Depth(figures=("rmse",)),
        "normals": Normals(weight=10.0, absolute=True, figures=("mean_angle",)),
        "edges": Edges(weight=50.0, positive=0.95),
    }
)
tasks, losses, counts, metrics = scene.tasks, scene.losses, scene.counts, scene.metrics
settings: dict[str, Any] = {
    "epochs": 100,
    "batch_size": 8,
    "lr": 1e-4,
    "weight_decay": 1e-4,
    "dropout": 0.0,
    "width": 1.0,
    "architecture": "hrnet18",
    "pretrained": "",
    "partial": False,
}
presets: dict[str, dict[str, Any]] = {
    "vandenhende2020mti": {"protocol": "max-over-training"},
    "vandenhende2021multi": {"protocol": "max-over-training", "architecture": "resnet50"},
}
download = """NYUD-v2 as in ATRC: NYUDv2.tar.gz from https://data.vision.ee.ethz.ch/brdavid/atrc/NYUDv2.tar.gz, which
https://github.com/prismformore/Multi-Task-Transformer/tree/main/InvPT names. Unpack it so that data/nyud (or the
folder that --data names) holds:
    images/NAME.png          RGB
    segmentation/NAME.png    classes 1 to 40, 0 for none
    depth/NAME.npy           in metres, 0 for unknown
    normals/NAME.png         RGB, -1..1 as 0..255
    edge/NAME.png            0 or 255
    gt_sets/train.txt, gt_sets/val.txt    795 and 654 names"""


def make_data(directory: Path, partial: bool = False) -> dict[str, Dataset[tuple[Tensor, ...]]]:
    """Samples of image [3, 448, 576], classes, depth [1, ..] in metres, normals [3, ..], edges; test is official val.

    Raises:
        DataError: files are missing, or (when a sample is read) not the official ones.
    """
    return scene.splits(nyud.read(directory, download, partial), scales=(1.0, 1.2, 1.5))


def make_model(
    tasks: tuple[str, ...],
    architecture: str = "hrnet18",
    width: float = 1.0,
    dropout: float = 0.0,
    pretrained: str = "",
) -> nn.Module:
    """:func:`detente.benchmark.dense.networks.with_trunk`."""
    return with_trunk(scene.channels(tasks), architecture, width, dropout, pretrained)


def make_scheduler(optimizer: torch.optim.Optimizer, settings: dict[str, Any]) -> torch.optim.lr_scheduler.LRScheduler:
    """The learning rate falls as (1 - epoch / epochs) ** .9."""
    return torch.optim.lr_scheduler.PolynomialLR(optimizer, settings["epochs"], power=0.9)
