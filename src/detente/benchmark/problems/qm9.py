"""QM9: eleven properties of small molecules by one message-passing network; mean absolute errors.

The set-up of Nash-MTL (Navon et al. 2022): complete graphs with the distance as a feature of the edges, mean squared
error of standardised targets, 10,000 molecules each for test and validation. Differences: the mean and deviation of the
targets are those of the training split (their code takes all molecules), the split is one for all seeds (theirs is
drawn with the seed), and the rate is lowered by the mean logarithm of the errors (theirs by delta-m).

Single-task errors that they report: mu .067, alpha .181, homo 60.6, lumo 53.9, r2 .503, zpve 4.54, U0 58.8, U 64.2,
H 63.8, G 66.2, Cv .072.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from detente.benchmark.datasets.qm9 import Molecules, batch, read
from detente.benchmark.models.mpnn import MessagePassing

download = """\
QM9 comes preprocessed by PyTorch Geometric from https://data.pyg.org/datasets/qm9_v3.zip (the file that
torch_geometric.datasets.QM9 downloads where RDKit is not installed). Unpack it to:

  data/qm9/    or the folder that --data names
    raw/qm9_v3.pt
"""

# property of the file, and what its unit is multiplied by in the tables: energies are in meV instead of eV
TARGETS: dict[str, tuple[int, float]] = {
    "mu": (0, 1.0),  # dipole moment, debye
    "alpha": (1, 1.0),  # polarizability, bohr^3
    "homo": (2, 1e3),
    "lumo": (3, 1e3),
    "r2": (5, 1.0),  # electronic spatial extent, bohr^2
    "zpve": (6, 1e3),  # zero point vibrational energy
    "U0": (12, 1e3),  # atomisation energies and enthalpy, at 0 K and 298.15 K
    "U": (13, 1e3),
    "H": (14, 1e3),
    "G": (15, 1e3),
    "Cv": (11, 1.0),  # heat capacity, cal / (mol K)
}
COLUMN = {task: k for k, task in enumerate(TARGETS)}

tasks: dict[str, dict[str, str]] = {target: {"error": "min"} for target in TARGETS}
settings: dict[str, Any] = {
    "epochs": 300,
    "batch_size": 120,
    "lr": 1e-3,
    "weight_decay": 0.0,
    "dropout": 0.0,
    "width": 1.0,
    "partial": False,
    "seeds": 3,
}
presets: dict[str, dict[str, Any]] = {
    "navon2022nashmtl": {"epochs": 300, "batch_size": 120, "lr": 1e-3, "protocol": "val-selected"}
}
methods = "cagrad,wpcgrad,cdtt"  # connection strength needs norms, which the network does not have
collate = batch


def make_data(directory: Path, partial: bool = False) -> dict[str, Dataset[Any]]:
    """110,831 / 10,000 / 10,000 molecules; see :class:`~detente.benchmark.datasets.qm9.Molecules`.

    Raises:
        DataError: the file is missing or not the official one.
    """
    return dict(read(directory, [number for number, _ in TARGETS.values()], download, partial))


def make_model(tasks: tuple[str, ...], dropout: float = 0.0, width: float = 1.0) -> nn.Module:
    """The message-passing network, with an output for each of ``tasks``."""
    return MessagePassing(tasks, width=width, dropout=dropout)


def make_scheduler(optimizer: torch.optim.Optimizer, settings: dict[str, Any]) -> Any:
    """0.7 of the rate after every five epochs without a better validation score, down to 1e-5."""
    return torch.optim.lr_scheduler.ReduceLROnPlateau(
        optimizer, mode="max", factor=0.7, patience=5, threshold_mode="abs", min_lr=1e-5
    )


def losses(model: nn.Module, batch: tuple[Tensor, ...], tasks: tuple[str, ...]) -> dict[str, Tensor]:
    """Mean squared error of each requested target, standardised."""
    targets, *graph = batch
    output = model(*graph)
    return {task: F.mse_loss(output[task], targets[:, COLUMN[task]]) for task in tasks}


def metrics(model: nn.Module, data: Molecules, tasks: tuple[str, ...]) -> dict[str, dict[str, float]]:
    """Mean absolute error of each requested target: energies in meV, the others in the file's units."""
    total = dict.fromkeys(tasks, 0.0)
    for targets, *graph in DataLoader(data, batch_size=120, collate_fn=collate):
        output = model(*graph)
        for task in tasks:
            total[task] += float((output[task] - targets[:, COLUMN[task]]).abs().double().sum())
    units = {task: float(data.scale[COLUMN[task]]) * TARGETS[task][1] for task in tasks}
    return {task: {"error": units[task] * total[task] / len(data)} for task in tasks}
