"""MTAN's layout of Cityscapes with a few scenes of noise."""

from __future__ import annotations

from pathlib import Path

from benchmark.layouts import nyuv2


def write(directory: Path, train: int = 4, test: int = 2, seed: int = 0) -> None:
    """``train`` scenes to train and validate on, and ``test`` in the official val."""
    nyuv2.arrays(directory, train, test, seed, (128, 256), 7, "label_7", normals=False)
