"""Multi-Fashion+MNIST: a piece of clothing and a handwritten digit laid over each other; one network names both.

Images of 36x36 as in Lin et al. 2019: FashionMNIST in the upper left corner, MNIST in the lower right, each pixel the
brighter of the two. Trained as CAGrad (Liu et al. 2021, Appendix B.1) does: a LeNet of half the channels, with batch
norm.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.utils.data import Dataset

from detente.benchmark.datasets.digits_overlay import accuracies, cross_entropies, read
from detente.benchmark.problems import multimnist

download = """\
FashionMNIST is on https://github.com/zalandoresearch/fashion-mnist (Zalando Research), section "Get the Data". Unpack
its four .gz files (gunzip) to:

  data/multifashion/    or the folder that --data names
    fashion/train-images-idx3-ubyte
    fashion/train-labels-idx1-ubyte
    fashion/t10k-images-idx3-ubyte
    fashion/t10k-labels-idx1-ubyte

""" + multimnist.download.replace("data/multimnist", "data/multifashion")

tasks: dict[str, dict[str, str]] = {"fashion": {"accuracy": "max"}, "digit": {"accuracy": "max"}}
settings: dict[str, Any] = dict(multimnist.settings)
presets: dict[str, dict[str, Any]] = dict(multimnist.presets)
ranges, make_model = multimnist.ranges, multimnist.make_model
COLUMN = {"fashion": 1, "digit": 2}  # of a batch


def make_data(directory: Path, partial: bool = False) -> dict[str, Dataset[Any]]:
    """108,000 / 12,000 / 20,000 pairs: uint8 image [1, 36, 36], int64 labels of the clothing and the digit.

    Raises:
        DataError: a file is missing or not the official one.
    """
    return dict(read(directory, "fashion", "mnist", download, partial))


def losses(model: nn.Module, batch: tuple[Tensor, ...], tasks: tuple[str, ...]) -> dict[str, Tensor]:
    """Mean cross-entropy (nats) of each requested task."""
    return cross_entropies(model, batch, {task: COLUMN[task] for task in tasks})


def metrics(model: nn.Module, data: Dataset[Any], tasks: tuple[str, ...]) -> dict[str, dict[str, float]]:
    """Share of right answers, 0..1, of each requested task."""
    return accuracies(model, data, {task: COLUMN[task] for task in tasks})
