"""The digits problem in float64, where rounding is too small to change a table.

One process and several then print the same figures:

    detente compare examples/digits_float64.py --out runs/one
    detente compare examples/digits_float64.py --out runs/two --launch torchrun --nproc-per-node 2

In float32, sums over a batch that is divided differ in the last bit, and training magnifies that: as with one process
whose batches come in another order.
"""

from __future__ import annotations

from torch import nn
from torch.utils.data import Dataset, TensorDataset

from detente.benchmark.problems import digits
from detente.benchmark.problems.digits import losses, metrics, settings, tasks

__all__ = ["losses", "make_data", "make_model", "metrics", "settings", "tasks"]


def make_data() -> dict[str, Dataset]:
    return {
        split: TensorDataset(data.tensors[0].double(), *data.tensors[1:]) for split, data in digits.make_data().items()
    }


def make_model(tasks: tuple[str, ...]) -> nn.Module:
    return digits.make_model(tasks).double()
