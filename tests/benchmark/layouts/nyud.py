"""ATRC's layout of NYUD-v2 with a few rooms of noise, smaller than the official ones."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

FOLDERS = ("images", "segmentation", "depth", "normals", "edge")


def write(directory: Path, train: int = 4, test: int = 2, seed: int = 0, size: tuple[int, int] = (53, 70)) -> None:
    """``train`` rooms to train and validate on, and ``test`` in the official val; ``size`` is 425 x 560 officially."""
    rng = np.random.default_rng(seed)
    for folder in (*FOLDERS, "gt_sets"):
        (directory / folder).mkdir(parents=True)
    names = [f"{k + 1:04}" for k in range(train + test)]
    (directory / "gt_sets/train.txt").write_text("\n".join(names[:train]) + "\n")
    (directory / "gt_sets/val.txt").write_text("\n".join(names[train:]) + "\n")
    for name in names:
        classes = np.kron(rng.integers(1, 41, size=(4, 4)), np.ones((size[0] // 4 + 1, size[1] // 4 + 1)))
        classes = classes[: size[0], : size[1]].astype(np.uint8)
        edges = np.zeros(size, np.uint8)
        edges[:, :-1][classes[:, :-1] != classes[:, 1:]] = 255
        depth = rng.uniform(0.7, 9.9, size).astype(np.float32)
        normals = rng.normal(size=(*size, 3))
        normals = np.round((normals / np.linalg.norm(normals, axis=-1, keepdims=True) + 1) * 127.5).astype(np.uint8)
        classes[:10], depth[:10], normals[:10] = 0, 0, 127
        pictures = {
            "images": rng.integers(256, size=(*size, 3), dtype=np.uint8),
            "segmentation": classes,
            "normals": normals,
            "edge": edges,
        }
        for folder, picture in pictures.items():
            Image.fromarray(picture).save(directory / folder / f"{name}.png")
        np.save(directory / "depth" / f"{name}.npy", depth)
