"""MultiDigits: two overlapping handwritten digits; one network reads the left one and the right one.

The 1797 real digits that scikit-learn bundles are split first, so no validation or test image shows a digit
that was trained on; then two digits of one split are laid over each other. Of a dozen trunks tried with equal
weights, this small one was taken because sharing it costs accuracy. The learning rate was tuned on equal
weights too: the best mean validation accuracy within 12 epochs, over three seeds, was .886 at 1e-3, .894 at
2e-3, .896 at 5e-3 and .897 at 1e-2; of the last two, a tie, the smaller is the default.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, TensorDataset

from detente.benchmark.models import layers
from detente.benchmark.models.layers import block, scaled

SHIFT = 2  # pixels down and to the right, from the left digit to the right one
# share of the source digits, number of pairs made from them
SPLITS = {"train": (0.60, 10_000), "val": (0.15, 2_000), "test": (0.25, 4_000)}

tasks: dict[str, dict[str, str]] = {"left": {"accuracy": "max"}, "right": {"accuracy": "max"}}
settings: dict[str, float] = {"epochs": 12, "batch_size": 128, "lr": 5e-3, "width": 1.0, "dropout": 0.0, "seeds": 5}


def make_data() -> dict[str, Dataset[tuple[Tensor, ...]]]:
    """Overlaid pairs of each split: float32 image [1, 10, 10] in 0..1, int64 labels of left and right.

    Raises:
        ImportError: scikit-learn, which ships the digits, is not installed.
    """
    try:
        from sklearn.datasets import load_digits  # type: ignore[import-untyped, unused-ignore]
    except ImportError as error:
        raise ImportError('the digits problem needs scikit-learn: pip install "detente[compare]"') from error
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32) / 16  # the format's white, not a statistic
    labels = torch.tensor(digits.target, dtype=torch.int64)
    generator = torch.Generator().manual_seed(0)
    sizes = [round(share * len(labels)) for share, _ in SPLITS.values()]
    sources = torch.split(torch.randperm(len(labels), generator=generator), sizes)
    data: dict[str, Dataset[tuple[Tensor, ...]]] = {}
    for (split, (_, pairs)), source in zip(SPLITS.items(), sources, strict=True):
        left, right = source[torch.randint(len(source), (2, pairs), generator=generator)]
        upper = F.pad(images[left], (0, SHIFT, 0, SHIFT))
        lower = F.pad(images[right], (SHIFT, 0, SHIFT, 0))
        data[split] = TensorDataset(upper.maximum(lower).unsqueeze(1), labels[left], labels[right])
    return data


class DigitsNet(nn.Module):
    """A shared trunk of three convolutions with batch norm, and a linear head per task.

    ``width`` multiplies the channels, 8, 12 and 12; ``dropout`` is the rate before the heads.
    """

    def __init__(self, tasks: tuple[str, ...], width: float = 1.0, dropout: float = 0.0) -> None:
        super().__init__()
        a, b = scaled(8, width), scaled(12, width)
        pool = nn.MaxPool2d(2)
        self.trunk = nn.Sequential(*block(1, a), pool, *block(a, b), pool, *block(b, b), nn.Flatten())
        self.dropout = layers.dropout(dropout)
        self.heads = nn.ModuleDict({task: nn.Linear(b * 2 * 2, 10) for task in tasks})

    def forward(self, images: Tensor, tasks: tuple[str, ...]) -> dict[str, Tensor]:
        """Class scores [B, 10] of each requested task for images [B, 1, 10, 10]."""
        features = self.dropout(self.trunk(images))
        return {task: self.heads[task](features) for task in tasks}


def make_model(tasks: tuple[str, ...], width: float = 1.0, dropout: float = 0.0) -> nn.Module:
    """A fresh network with a head for each of ``tasks``."""
    return DigitsNet(tasks, width, dropout)


def losses(model: nn.Module, batch: tuple[Tensor, ...], tasks: tuple[str, ...]) -> dict[str, Tensor]:
    """Mean cross-entropy (nats) of each requested task, from one forward pass."""
    images, labels = batch[0], _labels(batch)
    return {task: F.cross_entropy(scores, labels[task]) for task, scores in model(images, tasks).items()}


def metrics(model: nn.Module, data: Dataset[tuple[Tensor, ...]], tasks: tuple[str, ...]) -> dict[str, dict[str, float]]:
    """Share of right answers, 0..1, of each requested task."""
    right = dict.fromkeys(tasks, 0)
    seen = 0
    for batch in DataLoader(data, batch_size=500):
        labels = _labels(batch)
        for task, scores in model(batch[0], tasks).items():
            right[task] += int((scores.argmax(dim=1) == labels[task]).sum())
        seen += len(batch[0])
    return {task: {"accuracy": count / seen} for task, count in right.items()}


def _labels(batch: tuple[Tensor, ...]) -> dict[str, Tensor]:
    _, left, right = batch
    return {"left": left, "right": right}
