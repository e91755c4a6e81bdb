"""The file of PyTorch Geometric's QM9 with a few made-up molecules."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def write(directory: Path, train: int = 4, test: int = 2, seed: int = 0) -> None:
    """``train + 2 test`` molecules; how many are held out depends on their places in the shipped splits."""
    generator = torch.Generator().manual_seed(seed)
    (directory / "raw").mkdir(parents=True)
    torch.save([molecule(generator, k) for k in range(train + 2 * test)], directory / "raw/qm9_v3.pt")


def molecule(generator: torch.Generator, number: int) -> dict[str, Any]:
    """A chain of three to six atoms, bonded in both directions."""
    atoms = 3 + number % 4

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    first = torch.arange(atoms - 1)
    edges = torch.cat([torch.stack([first, first + 1]), torch.stack([first + 1, first])], dim=1)
    return {
        "x": normal(atoms, 11),
        "edge_index": edges,
        "edge_attr": torch.eye(4)[edges.sum(0) % 4],
        "y": normal(1, 19),
        "pos": normal(atoms, 3),
        "z": torch.full((atoms,), 6),
        "name": f"gdb_{number + 1}",
        "idx": number,
    }
