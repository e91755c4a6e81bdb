"""CelebA: 202,599 aligned faces of 178x218 pixels, 40 attributes each, split into three parts by its authors."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from detente.benchmark.datasets import source

__all__ = ["ATTRIBUTES", "Faces", "read"]

IMAGES, ATTRIBUTE_LIST, PARTITION = "Img/img_align_celeba", "Anno/list_attr_celeba.txt", "Eval/list_eval_partition.txt"
OFFICIAL = {"train": 162_770, "val": 19_867, "test": 19_962}  # in the order of the partition's numbers 0, 1, 2
SIZE = (218, 178)
SIDE = 64

ATTRIBUTES = (
    "5_o_Clock_Shadow", "Arched_Eyebrows", "Attractive", "Bags_Under_Eyes", "Bald", "Bangs", "Big_Lips", "Big_Nose",
    "Black_Hair", "Blond_Hair", "Blurry", "Brown_Hair", "Bushy_Eyebrows", "Chubby", "Double_Chin", "Eyeglasses",
    "Goatee", "Gray_Hair", "Heavy_Makeup", "High_Cheekbones", "Male", "Mouth_Slightly_Open", "Mustache",
    "Narrow_Eyes", "No_Beard", "Oval_Face", "Pale_Skin", "Pointy_Nose", "Receding_Hairline", "Rosy_Cheeks",
    "Sideburns", "Smiling", "Straight_Hair", "Wavy_Hair", "Wearing_Earrings", "Wearing_Hat", "Wearing_Lipstick",
    "Wearing_Necklace", "Wearing_Necktie", "Young",
)  # fmt: skip


class Faces(Dataset[tuple[Tensor, Tensor]]):
    """Faces by number: uint8 image [3, 64, 64] and float32 attributes [40], 0 or 1. Files are read when asked for."""

    def __init__(self, directory: Path, names: Sequence[str], attributes: Tensor) -> None:
        self.directory = directory
        self.names = names
        self.attributes = attributes

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        picture = source.read_picture(self.directory / self.names[index], SIZE, resize=(SIDE, SIDE))
        return torch.from_numpy(picture).permute(2, 0, 1), self.attributes[index]


def read(directory: Path, download: str, partial: bool) -> dict[str, Faces]:
    """The official splits; with ``partial`` of the listed faces those whose image is there.

    Raises:
        DataError: a file is missing or not the official one.
    """
    source.folder(directory, download, IMAGES, ATTRIBUTE_LIST, PARTITION)
    images = directory / IMAGES
    names, attributes = _attributes(directory / ATTRIBUTE_LIST)
    parts = _partition(directory / PARTITION, names)
    there = set(os.listdir(images))
    if not partial:
        for name in names:
            if name not in there:
                source.present(images / name)
    splits = {}
    for number, (split, official) in enumerate(OFFICIAL.items()):
        chosen = [
            k for k, (name, part) in enumerate(zip(names, parts, strict=True)) if part == number and name in there
        ]
        source.check_count(f"{split} faces in {images}", len(chosen), official, partial)
        splits[split] = Faces(images, [names[k] for k in chosen], attributes[chosen])
    return splits


def _attributes(path: Path) -> tuple[list[str], Tensor]:
    """Names of the images, and their attributes [N, 40] as 0 or 1."""
    head, titles, *lines = [*_lines(path), "", ""]
    rows = [line.split() for line in lines if line]
    if titles.split() != list(ATTRIBUTES):
        raise source.DataError(f"{path}: its second line must name the {len(ATTRIBUTES)} attributes. Unpack it again.")
    if head.strip() != str(len(rows)):
        raise source.DataError(f"{path} promises {head.strip()!r} images and lists {len(rows)}. Unpack it again.")
    for row in rows:
        if len(row) != 1 + len(ATTRIBUTES) or not {"1", "-1"}.issuperset(row[1:]):
            raise source.DataError(f"{path}: {row[0]!r} must be followed by {len(ATTRIBUTES)} values, 1 or -1.")
    values = np.array([[value == "1" for value in row[1:]] for row in rows], dtype=np.float32)
    return [row[0] for row in rows], torch.from_numpy(values)


def _partition(path: Path, names: Sequence[str]) -> list[int]:
    """The part of each of the images: 0, 1 or 2."""
    rows = [line.split() for line in _lines(path) if line]
    if [row[0] for row in rows] != names:
        raise source.DataError(f"{path} lists other images than {ATTRIBUTE_LIST}. Take both from one archive.")
    for row in rows:
        if len(row) != 2 or row[1] not in ("0", "1", "2"):
            raise source.DataError(
                f"{path}: {row[0]!r} must be followed by 0 (train), 1 (val) or 2 (test); got {row[1:]}."
            )
    return [int(row[1]) for row in rows]


def _lines(path: Path) -> list[str]:
    return [line.strip() for line in source.present(path).read_text(errors="replace").splitlines()]
