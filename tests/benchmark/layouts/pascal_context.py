"""ATRC's layout of PASCAL-Context with a few photos of noise, smaller than the official ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from scipy.io import savemat

from detente.benchmark.datasets.pascal_context import FILES, SEMANTICS


def write(directory: Path, train: int = 4, test: int = 2, seed: int = 0, size: tuple[int, int] = (60, 80)) -> None:
    """``train`` photos of a person to train and validate on, and ``test`` in the official val, the first of a person.

    They are at most 500 x 500 officially. Every second one has its classes from VOC 2012.
    """
    rng = np.random.default_rng(seed)
    for folder in (*FILES, *SEMANTICS, "ImageSets/Context"):
        (directory / folder).mkdir(parents=True)
    names = [f"2008_{k:06}" for k in range(train + test)]
    (directory / "ImageSets/Context/train.txt").write_text("\n".join(names[:train]) + "\n")
    (directory / "ImageSets/Context/val.txt").write_text("\n".join(names[train:]) + "\n")
    for k, name in enumerate(names):
        photo = Image.fromarray(rng.integers(256, size=(*size, 3), dtype=np.uint8))
        photo.save(directory / "JPEGImages" / f"{name}.jpg")
        classes = np.full(size, 255, np.uint8)
        classes[10:] = rng.integers(21, size=(size[0] - 10, 1))
        picture = Image.fromarray(classes).convert("P")
        picture.putdata(classes.ravel().tolist())
        picture.save(directory / SEMANTICS[k % 2] / f"{name}.png")
        Image.fromarray(rng.integers(256, size=size, dtype=np.uint8)).save(directory / "sal_distill" / f"{name}.png")
        normals = rng.integers(256, size=(*size, 3), dtype=np.uint8)
        Image.fromarray(normals).save(directory / "normals_distill" / f"{name}.png")
        context = np.full(size, 360, np.uint16)  # sky, which has no normals
        context[20:] = 440  # wall
        savemat(directory / "pascal-context/trainval" / f"{name}.mat", {"LabelMap": context})
        parts = [("head", box(size, 20, 30)), ("lhand", box(size, 30, 35))] if k <= train else []
        things = [(15, parts), (7, [])] if k <= train else [(7, [])]
        savemat(directory / "human_parts" / f"{name}.mat", {"anno": annotation(name, things, size)})


def box(size: tuple[int, int], top: int, bottom: int) -> np.ndarray:
    """A mask of some rows, of the columns 10 to 20."""
    mask = np.zeros(size, np.uint8)
    mask[top:bottom, 10:20] = 1
    return mask


def annotation(name: str, things: list[tuple[int, list[tuple[str, np.ndarray]]]], size: tuple[int, int]) -> Any:
    """PASCAL-Part's struct: of each thing the number of its class, and the parts by name."""
    rows = []
    for number, parts in things:
        cell: Any = np.zeros((0, 0))
        if parts:
            cell = np.array([parts], dtype=[("part_name", object), ("mask", object)])
        rows.append(("class", number, box(size, 20, 40), cell))
    fields = [("class", object), ("class_ind", object), ("mask", object), ("parts", object)]
    return {"imname": name, "objects": np.array([rows], dtype=fields)}
