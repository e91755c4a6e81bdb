"""MultiMNIST: two handwritten digits laid over each other; one network reads the left one and the right one.

Images of 36x36 as in Lin et al. 2019: one digit in the upper left corner, one in the lower right, each pixel the
brighter of the two. Trained as CAGrad (Liu et al. 2021, Appendix B.1) trains on Multi-Fashion+MNIST: a LeNet of half
the channels, with batch norm. With other networks Sener and Koltun 2018 reach accuracies of .9645 and .9495, and PCGrad
.9658 and .9550 (Yu et al. 2020, Table 4).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.utils.data import Dataset

from detente.benchmark.datasets.digits_overlay import accuracies, cross_entropies, read
from detente.benchmark.models.lenet import LeNet
from detente.method import Range

download = """\
MNIST is on http://yann.lecun.com/exdb/mnist/ (LeCun, Cortes and Burges; the same files are mirrored at
https://ossci-datasets.s3.amazonaws.com/mnist/). Unpack the four .gz files (gunzip) to:

  data/multimnist/    or the folder that --data names
    mnist/train-images-idx3-ubyte
    mnist/train-labels-idx1-ubyte
    mnist/t10k-images-idx3-ubyte
    mnist/t10k-labels-idx1-ubyte
"""

tasks: dict[str, dict[str, str]] = {"left": {"accuracy": "max"}, "right": {"accuracy": "max"}}
settings: dict[str, Any] = {
    "epochs": 50,
    "batch_size": 256,
    "lr": 1e-3,
    "weight_decay": 0.01,
    "dropout": 0.0,
    "width": 0.5,
    "norm": True,
    "partial": False,
    "seeds": 3,
}
presets: dict[str, dict[str, Any]] = {
    "liu2021cagrad": {"epochs": 50, "batch_size": 256, "lr": 1e-3, "weight_decay": 0.01, "width": 0.5, "norm": True}
}
ranges = {"weight_decay": Range(1e-4, 1e-1, log=True)}  # about the published one
COLUMN = {"left": 1, "right": 2}  # of a batch


def make_data(directory: Path, partial: bool = False) -> dict[str, Dataset[Any]]:
    """108,000 / 12,000 / 20,000 pairs: uint8 image [1, 36, 36], int64 labels of left and right.

    Raises:
        DataError: a file is missing or not the official one.
    """
    return dict(read(directory, "mnist", "mnist", download, partial))


def make_model(tasks: tuple[str, ...], dropout: float = 0.0, width: float = 0.5, norm: bool = True) -> nn.Module:
    """A LeNet with a head for each of ``tasks``."""
    return LeNet(tasks, dropout=dropout, width=width, norm=norm)


def losses(model: nn.Module, batch: tuple[Tensor, ...], tasks: tuple[str, ...]) -> dict[str, Tensor]:
    """Mean cross-entropy (nats) of each requested task."""
    return cross_entropies(model, batch, {task: COLUMN[task] for task in tasks})


def metrics(model: nn.Module, data: Dataset[Any], tasks: tuple[str, ...]) -> dict[str, dict[str, float]]:
    """Share of right answers, 0..1, of each requested task."""
    return accuracies(model, data, {task: COLUMN[task] for task in tasks})
