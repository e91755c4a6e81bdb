"""CIFAR-100's official layout with a few images of noise, pickled as Python 2 did."""

from __future__ import annotations

import io
import pickle
import struct
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from detente.benchmark.datasets.cifar100 import CLASSES, SUPERCLASSES
from detente.benchmark.datasets.source import validation


def write(directory: Path, train: int = 4, test: int = 2, seed: int = 0) -> None:
    """``train`` and ``test`` images per superclass; more to train, so that every superclass is validated."""
    rng = np.random.default_rng(seed)
    folder = directory / "cifar-100-python"
    folder.mkdir(parents=True)
    names = {"fine_label_names": [f"class {k}".encode() for k in range(100)]}
    names["coarse_label_names"] = [name.encode() for name in SUPERCLASSES]
    (folder / "meta").write_bytes(pickled(names))
    for split, count in (("train", max(20 * train, 300)), ("test", 20 * test)):
        (folder / split).write_bytes(pickled(content(rng, count)))


def content(rng: np.random.Generator, count: int) -> dict[str, Any]:
    """A split's dict; superclasses take turns among the images held out for validation, and among the others."""
    coarse = [0] * count
    for part in validation("cifar100", [str(k) for k in range(count)]):
        for turn, k in enumerate(part):
            coarse[int(k)] = turn % 20
    return {
        "filenames": [f"{k}.png".encode() for k in range(count)],
        "batch_label": b"training batch 1 of 1",
        "fine_labels": [int(rng.choice(CLASSES[c])) for c in coarse],
        "coarse_labels": coarse,
        "data": rng.integers(256, size=(count, 3072), dtype=np.uint8),
    }


class _Python2(pickle._Pickler):
    """Text and bytes are one kind of string, and truth values are numbers."""

    dispatch: ClassVar[dict[Any, Any]] = dict(pickle._Pickler.dispatch)

    def save_string(self, text: bytes | str) -> None:
        raw = text.encode("latin1") if isinstance(text, str) else text
        self.write(pickle.BINSTRING + struct.pack("<i", len(raw)) + raw)
        self.memoize(text)

    def save_truth(self, value: bool) -> None:
        self.save(int(value))

    dispatch[str] = dispatch[bytes] = save_string
    dispatch[bool] = save_truth


def pickled(value: Any) -> bytes:
    """The bytes that Python 2 and the NumPy of its time write."""
    file = io.BytesIO()
    _Python2(file, protocol=2).dump(value)
    return file.getvalue().replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n")
