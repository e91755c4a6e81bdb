"""MultiDigits: two overlapping handwritten digits, read by one network: the left one and the right one.

The images are scikit-learn's bundled real digits. The source digits are split into train, validation and test first,
so no test image contains a digit the network was trained on; then two digits of a split are laid over each other.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, TensorDataset

SHIFT = 2  # pixels, down and to the right, from the left digit to the right one
PAIRS = {"train": 12_000, "val": 2_000, "test": 4_000}
SHARES = {"train": 0.6, "val": 0.15, "test": 0.25}  # of the 1797 source digits

tasks: dict[str, dict[str, str]] = {"left": {"accuracy": "max"}, "right": {"accuracy": "max"}}
settings: dict[str, float] = {"epochs": 8, "batch_size": 128, "lr": 2e-3}
