"""CelebA's official layout with a few faces of noise."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from detente.benchmark.datasets.celeba import ATTRIBUTES


def write(directory: Path, train: int = 4, test: int = 2, seed: int = 0) -> None:
    """``train`` faces to train on, ``test`` to validate and as many to test."""
    rng = np.random.default_rng(seed)
    images = directory / "Img/img_align_celeba"
    for folder in (images, directory / "Anno", directory / "Eval"):
        folder.mkdir(parents=True)
    parts = [0] * train + [1] * test + [2] * test
    names = [f"{k + 1:06}.jpg" for k in range(len(parts))]
    for name in names:
        Image.fromarray(rng.integers(256, size=(218, 178, 3), dtype=np.uint8)).save(images / name)
    values = rng.choice([-1, 1], size=(len(names), len(ATTRIBUTES)))
    values[:, 0], values[:, 1] = 1, -1
    rows = [f"{name} {' '.join(f'{v:2}' for v in row)}" for name, row in zip(names, values, strict=True)]
    head = [str(len(names)), " ".join(ATTRIBUTES) + " "]
    (directory / "Anno/list_attr_celeba.txt").write_text("\r\n".join([*head, *rows, ""]), newline="")
    lines = [f"{name} {part}\n" for name, part in zip(names, parts, strict=True)]
    (directory / "Eval/list_eval_partition.txt").write_text("".join(lines))
