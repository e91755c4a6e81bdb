"""CelebA: 40 attributes of a face, each a task of yes or no, by one network; F1 per attribute.

The set-up of FAMO (Liu et al. 2023): official splits, images of 64x64, a network of nine layers, binary cross-entropy,
and an answer is yes where its probability is above one half. F1 is 0 while a network never says yes rightly, as happens
for rare attributes early in training. So the epoch is chosen by the mean F1 on the validation split, as in the paper,
and not by the mean logarithm as for other problems.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from detente.benchmark.datasets.celeba import ATTRIBUTES, read
from detente.benchmark.models.celeba import CelebANet

download = """\
CelebA is on https://mmlab.ie.cuhk.edu.hk/projects/CelebA.html (CelebFaces Attributes, Chinese University of Hong Kong).
Take "Align&Cropped Images" (img_align_celeba.zip, 1.4 GB), "Attributes Annotations" and "Train/Val/Test Partitions",
and unpack them to:

  data/celeba/    or the folder that --data names
    Img/img_align_celeba/000001.jpg ... 202599.jpg
    Anno/list_attr_celeba.txt
    Eval/list_eval_partition.txt
"""

tasks: dict[str, dict[str, str]] = {attribute: {"f1": "max"} for attribute in ATTRIBUTES}
settings: dict[str, Any] = {
    "epochs": 15,
    "batch_size": 256,
    "lr": 3e-4,
    "weight_decay": 0.0,
    "dropout": 0.0,
    "width": 1.0,
    "partial": False,
    "seeds": 3,
}
presets: dict[str, dict[str, Any]] = {
    "liu2023famo": {"epochs": 15, "batch_size": 256, "lr": 3e-4, "protocol": "val-selected"}
}
selection = "mean"  # a rare attribute may have an F1 of 0, whose logarithm would outweigh all others
COLUMN = {attribute: k for k, attribute in enumerate(ATTRIBUTES)}


def make_data(directory: Path, partial: bool = False) -> dict[str, Dataset[Any]]:
    """The official splits: uint8 images [3, 64, 64] and float32 attributes [40], 0 or 1.

    Raises:
        DataError: a file is missing or not the official one.
    """
    return dict(read(directory, download, partial))


def make_model(tasks: tuple[str, ...], dropout: float = 0.0, width: float = 1.0) -> nn.Module:
    """The nine-layer network, with an output for each of ``tasks``."""
    return CelebANet(tasks, dropout=dropout, width=width)


def losses(model: nn.Module, batch: tuple[Tensor, Tensor], tasks: tuple[str, ...]) -> dict[str, Tensor]:
    """Mean binary cross-entropy (nats) of each requested attribute."""
    images, attributes = batch
    output = model(images / 255)
    return {task: F.binary_cross_entropy_with_logits(output[task], attributes[:, COLUMN[task]]) for task in tasks}


def metrics(model: nn.Module, data: Dataset[Any], tasks: tuple[str, ...]) -> dict[str, dict[str, float]]:
    """F1, 0..1, of each requested attribute over the whole set; 0 where no face was rightly said to have it."""
    columns = [COLUMN[task] for task in tasks]
    hits, mentions = torch.zeros(len(tasks)), torch.zeros(len(tasks))
    for images, attributes in DataLoader(data, batch_size=256):
        output = model(images / 255)
        said = torch.stack([output[task] > 0 for task in tasks], dim=1)
        true = attributes[:, columns] > 0
        hits += (said & true).sum(0)
        mentions += said.sum(0) + true.sum(0)
    figures = 2 * hits.double() / mentions.clamp_min(1)
    return {task: {"f1": figure} for task, figure in zip(tasks, figures.tolist(), strict=True)}
