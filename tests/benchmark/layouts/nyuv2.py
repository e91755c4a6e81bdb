"""MTAN's layout of NYUv2 with a few scenes of noise."""

from __future__ import annotations

from pathlib import Path

import numpy as np


def write(directory: Path, train: int = 4, test: int = 2, seed: int = 0) -> None:
    """``train`` scenes to train and validate on, and ``test`` in the official val; each without some of its labels."""
    arrays(directory, train, test, seed, (288, 384), 13, "label", normals=True)


def arrays(
    directory: Path, train: int, test: int, seed: int, size: tuple[int, int], classes: int, label: str, normals: bool
) -> None:
    """Scenes of blocks of 32 x 32 pixels, whose upper left block has no target."""
    rng = np.random.default_rng(seed)
    for part, count in (("train", train), ("val", test)):
        folders = ["image", label, "depth", *(["normal"] if normals else [])]
        for folder in folders:
            (directory / part / folder).mkdir(parents=True)
        for k in range(count):
            image = rng.random((*size, 3), dtype=np.float32)
            labels = blocks(rng.integers(classes, size=(size[0] // 32, size[1] // 32)))
            depth = blocks(rng.uniform(0.1, 0.4, (size[0] // 32, size[1] // 32))).astype(np.float32)[..., None]
            direction = rng.normal(size=(*size, 3)).astype(np.float32)
            direction /= np.linalg.norm(direction, axis=-1, keepdims=True)
            labels[:32, :32], depth[:32, :32], direction[:32, :32] = -1, 0, 0
            for folder, array in zip(folders, (image, labels, depth, direction), strict=False):
                np.save(directory / part / folder / f"{k}.npy", array)


def blocks(values: np.ndarray) -> np.ndarray:
    """Every value as 32 x 32 pixels."""
    return values.repeat(32, axis=0).repeat(32, axis=1)
