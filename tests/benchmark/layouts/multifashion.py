"""The official layouts of FashionMNIST and MNIST with a few pictures of noise."""

from __future__ import annotations

from pathlib import Path

from benchmark.layouts import multimnist


def write(directory: Path, train: int = 4, test: int = 2, seed: int = 0) -> None:
    """``train`` pictures of either kind to train and validate on, and ``test`` to test."""
    multimnist.write(directory, train, test, seed, "fashion")
    multimnist.write(directory, train, test, seed + 1, "mnist")
