"""QM9 as PyTorch Geometric preprocesses it: 130,831 small molecules, of which every pair of atoms is an edge."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

from detente.benchmark.datasets import source

__all__ = ["Molecules", "batch", "read"]

FILE = "raw/qm9_v3.pt"
OFFICIAL = 130_831
SHAPES = {"x": (None, 11), "pos": (None, 3), "edge_index": (2, None), "edge_attr": (None, 4), "y": (1, 19)}
"""Of a molecule: atoms' features, places (angstrom), bonds and their kinds (one-hot), properties."""

Sample = tuple[Tensor, Tensor, Tensor, Tensor]


class Molecules(Dataset[Sample]):
    """Molecules by number: targets [T], atoms [n, 11], edges [2, n(n-1)] and their features [n(n-1), 5].

    Edges join all pairs of atoms; their features are the kind of bond, zero where there is none, and the distance in
    angstrom. Targets are ``mean`` [T] less and by ``scale`` [T] smaller than the properties.
    """

    def __init__(self, molecules: Sequence[dict[str, Tensor]], targets: Tensor, mean: Tensor, scale: Tensor) -> None:
        self.molecules = molecules
        self.targets = (targets - mean) / scale
        self.mean = mean
        self.scale = scale

    def __len__(self) -> int:
        return len(self.molecules)

    def __getitem__(self, index: int) -> Sample:
        molecule = self.molecules[index]
        x, places = molecule["x"], molecule["pos"]
        features = x.new_zeros(len(x), len(x), 5)
        features[molecule["edge_index"][0], molecule["edge_index"][1], :4] = molecule["edge_attr"]
        features[..., 4] = (places[:, None] - places).norm(dim=-1)
        pairs = ~torch.eye(len(x), dtype=torch.bool)
        return self.targets[index], x, pairs.nonzero().T, features[pairs]


def batch(samples: Sequence[Sample]) -> tuple[Tensor, ...]:
    """One graph of many molecules: targets [B, T], atoms [N, 11], edges [2, E], features [E, 5], molecules [N]."""
    targets, atoms, edges, features = zip(*samples, strict=True)
    sizes = torch.tensor([len(x) for x in atoms])
    starts = sizes.cumsum(0) - sizes
    shifted = [pairs + start for pairs, start in zip(edges, starts, strict=True)]
    owner = torch.arange(len(samples)).repeat_interleave(sizes)
    return torch.stack(targets), torch.cat(atoms), torch.cat(shifted, dim=1), torch.cat(features), owner


def read(directory: Path, properties: Sequence[int], download: str, partial: bool) -> dict[str, Molecules]:
    """Splits with the chosen properties as targets, standardised by the mean and deviation of the training split.

    Raises:
        DataError: the file is missing or not the official one.
    """
    path = source.folder(directory, download, FILE) / FILE
    molecules = source.read_tensors(path)
    if not isinstance(molecules, list):
        raise source.DataError(f"{path} holds a {type(molecules).__name__}; expected a list of molecules.")
    source.check_count(f"molecules in {path}", len(molecules), OFFICIAL, partial)
    for number, molecule in enumerate(molecules):
        _check(path, number, molecule)
    rest, test = source.validation("qm9_test", [str(k) for k in range(len(molecules))])
    train, val = source.validation("qm9_val", rest)
    if len(train) < 2:
        raise source.DataError(f"{path}: {len(molecules)} molecules leave fewer than two to train on.")
    rows = {split: list(map(int, names)) for split, names in (("train", train), ("val", val), ("test", test))}
    targets = torch.cat([molecule["y"] for molecule in molecules])[:, list(properties)].float()
    mean, scale = targets[rows["train"]].mean(dim=0), targets[rows["train"]].std(dim=0)
    return {s: Molecules([molecules[k] for k in chosen], targets[chosen], mean, scale) for s, chosen in rows.items()}


def _check(path: Path, number: int, molecule: object) -> None:
    where = f"{path}: molecule {number}"
    if not isinstance(molecule, dict):
        raise source.DataError(f"{where} is a {type(molecule).__name__}; expected a dict. It is not the official file.")
    for key, shape in SHAPES.items():
        tensor = molecule.get(key)
        if not isinstance(tensor, Tensor) or tensor.is_floating_point() == (key == "edge_index"):
            raise source.DataError(f"{where} has no tensor {key!r} of numbers. It is not the official file.")
        if tensor.ndim != 2 or any(want not in (None, got) for want, got in zip(shape, tensor.shape, strict=True)):
            wanted = ["?" if size is None else size for size in shape]
            raise source.DataError(f"{where}: {key!r} has the shape {list(tensor.shape)}; expected {wanted}.")
        if not tensor.isfinite().all():
            raise source.DataError(f"{where}: {key!r} has values that are not finite.")
    atoms, bonds = len(molecule["x"]), molecule["edge_index"]
    if not atoms or len(molecule["pos"]) != atoms or len(molecule["edge_attr"]) != bonds.shape[1]:
        raise source.DataError(f"{where}: its atoms and places, or its bonds and their kinds, differ in number.")
    if bonds.numel() and not 0 <= int(bonds.min()) <= int(bonds.max()) < atoms:
        raise source.DataError(f"{where} has a bond with atom {int(bonds.max())}; it has {atoms} atoms.")
