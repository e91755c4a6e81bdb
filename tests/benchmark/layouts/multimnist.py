"""MNIST's official layout with a few pictures of noise."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray


def write(directory: Path, train: int = 4, test: int = 2, seed: int = 0, folder: str = "mnist") -> None:
    """``train`` pictures to train and validate on, and ``test`` to test."""
    rng = np.random.default_rng(seed)
    (directory / folder).mkdir(parents=True)
    for part, count in (("train", train), ("t10k", test)):
        images = rng.integers(256, size=(count, 28, 28), dtype=np.uint8)
        labels = np.arange(count, dtype=np.uint8) % 10
        (directory / folder / f"{part}-images-idx3-ubyte").write_bytes(idx(images))
        (directory / folder / f"{part}-labels-idx1-ubyte").write_bytes(idx(labels))


def idx(array: NDArray[np.uint8]) -> bytes:
    """An idx file of bytes."""
    return bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes() + array.tobytes()
