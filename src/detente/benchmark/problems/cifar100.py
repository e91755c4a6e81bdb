"""CIFAR-100 as 20 tasks: which of five classes, for the images of one superclass; every image belongs to one task.

The task of routing networks (Rosenbaum et al. 2018) and of PCGrad (Yu et al. 2020). Convolutions and all layers but the
last are shared. Both papers report on the test split without a validation split; here a tenth of the training images
validates. Accuracies that PCGrad reports, over all images: task-specific last layers .42 and task-specific linear
layers .49 (both of Rosenbaum et al.), independent networks .677, PCGrad .71, routing .747, routing with PCGrad .775.
PCGrad's paper names the network but not its training: Adam, 50 epochs and the batch of 128 are ours.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from detente.benchmark.datasets.cifar100 import CLASSES, SUPERCLASSES, read
from detente.benchmark.models.layers import dropout as dropout_layer
from detente.benchmark.models.layers import scaled
from detente.method import Range

download = """\
CIFAR-100 is on https://www.cs.toronto.edu/~kriz/cifar.html (Krizhevsky, University of Toronto). Take "CIFAR-100 python
version" (cifar-100-python.tar.gz, 161 MB) and unpack it to:

  data/cifar100/    or the folder that --data names
    cifar-100-python/train
    cifar-100-python/test
    cifar-100-python/meta
"""

tasks: dict[str, dict[str, str]] = {superclass: {"accuracy": "max"} for superclass in SUPERCLASSES}
settings: dict[str, Any] = {
    "epochs": 50,
    "batch_size": 128,
    "lr": 1e-3,
    "weight_decay": 0.0,
    "optimizer": "adam",
    "decay_every": 0,
    "architecture": "yu2020",
    "dropout": 0.0,
    "width": 1.0,
    "partial": False,
    "seeds": 3,
}
presets: dict[str, dict[str, Any]] = {
    "yu2020pcgrad": {"architecture": "yu2020", "optimizer": "adam", "lr": 1e-3, "batch_size": 128, "epochs": 50},
    "rosenbaum2018routing": {
        "architecture": "rosenbaum2018",
        "optimizer": "sgd",
        "lr": 1e-2,
        "decay_every": 5,
        "batch_size": 10,
        "epochs": 50,
    },
}
ranges = {"weight_decay": Range(1e-6, 1e-2, log=True)}
methods = "cagrad,wpcgrad,cdtt"  # connection strength needs norms, which the network does not have

# channels of the 3x3 convolutions, features of the linear layers, whether batch norm follows the convolutions
ARCHITECTURES = {
    "yu2020": ((160, 160, 160), (320, 320), False),
    "rosenbaum2018": ((32, 32, 32, 32), (48, 48), True),
}
OPTIMIZERS = {"adam": torch.optim.Adam, "sgd": torch.optim.SGD}
COLUMN = {superclass: k for k, superclass in enumerate(SUPERCLASSES)}

Batch = Sequence[Tensor]


def make_data(directory: Path, partial: bool = False) -> dict[str, Dataset[Any]]:
    """Splits of (uint8 image [3, 32, 32], int64 superclass 0..19, int64 class within the superclass 0..4).

    Raises:
        DataError: a file is missing or not the official one.
    """
    return dict(read(directory, download, partial))


class ConvNet(nn.Module):
    """Convolutions, each with pooling, and linear layers, shared; a linear layer of five classes per task."""

    def __init__(self, tasks: Sequence[str], architecture: str, dropout: float = 0.0, width: float = 1.0) -> None:
        super().__init__()
        convolutions, linears, norm = ARCHITECTURES[architecture]
        layers: list[nn.Module] = []
        inputs, side = 3, 32
        for channels in (scaled(size, width) for size in convolutions):
            layers += [nn.Conv2d(inputs, channels, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
            inputs, side = channels, side // 2
        layers += [*([nn.BatchNorm2d(inputs)] if norm else []), nn.Flatten()]
        inputs *= side**2
        for features in (scaled(size, width) for size in linears):
            layers += [nn.Linear(inputs, features), nn.ReLU(), dropout_layer(dropout)]
            inputs = features
        self.trunk = nn.Sequential(*layers)
        self.heads = nn.ModuleDict({task: nn.Linear(inputs, len(CLASSES[COLUMN[task]])) for task in tasks})

    def forward(self, images: Tensor, tasks: tuple[str, ...]) -> dict[str, Tensor]:
        """Class scores [B, 5] of each requested task for images [B, 3, 32, 32]."""
        features = self.trunk(images)
        return {task: self.heads[task](features) for task in tasks}


def make_model(
    tasks: tuple[str, ...], architecture: str = "yu2020", dropout: float = 0.0, width: float = 1.0
) -> nn.Module:
    """A network with a head for each of ``tasks``.

    Raises:
        ValueError: there is no such architecture.
    """
    if architecture not in ARCHITECTURES:
        raise ValueError(f"architecture must be one of {', '.join(ARCHITECTURES)}; got {architecture!r}.")
    return ConvNet(tasks, architecture, dropout, width)


def make_optimizer(model: nn.Module, settings: dict[str, Any]) -> torch.optim.Optimizer:
    """Adam or plain SGD, as the setting ``optimizer`` says."""
    if settings["optimizer"] not in OPTIMIZERS:
        raise ValueError(f"optimizer must be one of {', '.join(OPTIMIZERS)}; got {settings['optimizer']!r}.")
    make: Callable[..., torch.optim.Optimizer] = OPTIMIZERS[settings["optimizer"]]
    return make(model.parameters(), lr=settings["lr"], weight_decay=settings["weight_decay"])


def make_scheduler(optimizer: torch.optim.Optimizer, settings: dict[str, Any]) -> Any:
    """A tenth of the rate after ``decay_every`` epochs and a hundredth after twice as many; constant where it is 0."""
    every = settings["decay_every"]
    return torch.optim.lr_scheduler.MultiStepLR(optimizer, [every, 2 * every] if every else [], gamma=0.1)


def counts(batch: Batch, tasks: tuple[str, ...]) -> dict[str, int]:
    """How many of the images are of each requested superclass."""
    return {task: int((batch[1] == COLUMN[task]).sum()) for task in tasks}


def losses(model: nn.Module, batch: Batch, tasks: tuple[str, ...]) -> dict[str, Tensor]:
    """Mean cross-entropy (nats) of each requested task over the images of its superclass."""
    return {task: F.cross_entropy(scores, labels) for task, (scores, labels) in _answers(model, batch, tasks).items()}


def metrics(model: nn.Module, data: Dataset[Any], tasks: tuple[str, ...]) -> dict[str, dict[str, float]]:
    """Share of right answers, 0..1, of each requested task.

    Raises:
        ValueError: there is no image of a task, as may be where ``partial``.
    """
    right, seen = dict.fromkeys(tasks, 0), dict.fromkeys(tasks, 0)
    for batch in DataLoader(data, batch_size=500):
        for task, (scores, labels) in _answers(model, batch, tasks).items():
            right[task] += int((scores.argmax(dim=1) == labels).sum())
            seen[task] += len(labels)
    absent = [task for task in tasks if not seen[task]]
    if absent:
        raise ValueError(f"the evaluation set has no image of {absent[0]!r}; use more of the data.")
    return {task: {"accuracy": right[task] / seen[task]} for task in tasks}


def _answers(model: nn.Module, batch: Batch, tasks: tuple[str, ...]) -> dict[str, tuple[Tensor, Tensor]]:
    """Scores and labels of each requested task for its own images; the others are not computed."""
    images, owners, labels = batch
    wanted = torch.isin(owners, owners.new_tensor([COLUMN[task] for task in tasks]))
    images, owners, labels = images[wanted], owners[wanted], labels[wanted]
    output = model(images / 127.5 - 1, tasks)
    own = {task: owners == COLUMN[task] for task in tasks}
    return {task: (output[task][own[task]], labels[own[task]]) for task in tasks}
