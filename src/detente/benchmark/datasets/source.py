"""What every reader needs: files that are there and whole, arrays of the promised form, splits that never change.

Every error is a `DataError` that names the file, what was expected, what was found and what to do. Arrays are read with
``allow_pickle=False`` and tensors with ``weights_only=True``: a file from the net never runs code here.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import pickle
from collections.abc import Callable, Collection, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from scipy.io import loadmat

__all__ = [
    "DataError",
    "check_count",
    "check_depth",
    "check_fits",
    "check_labels",
    "check_numbers",
    "check_shape",
    "folder",
    "held_out",
    "listed",
    "present",
    "read_array",
    "read_idx",
    "read_json",
    "read_mat",
    "read_names",
    "read_pickle",
    "read_picture",
    "read_tensors",
    "shipped",
    "validation",
]

Shape = tuple[int | None, ...]
"""Expected sizes; None where any will do."""
Size = tuple[int, int]
"""Height and width."""


class DataError(ValueError):
    """Files of a data set that are missing, malformed or not the official ones."""


def folder(directory: Path, download: str, *needed: str) -> Path:
    """``directory``, if all of the ``needed`` files and folders are in it.

    Raises:
        DataError: with ``download``, the text that says where the files come from and where they go.
    """
    missing = [name for name in needed if not (directory / name).exists()]
    if missing:
        raise DataError(f"{directory} does not hold {missing[0]!r}.\n{download}")
    return directory


def present(path: Path) -> Path:
    """A file that must be there because another file names it."""
    if not path.is_file():
        raise DataError(f"{path} is missing although the data set lists it. Unpack the archive again.")
    return path


def check_count(what: str, found: int, official: int, partial: bool) -> None:
    """Raise unless there are as many samples as published; with ``partial``, at least one."""
    if found == 0:
        raise DataError(f"no {what} were found; the official data has {official}.")
    if found != official and not partial:
        raise DataError(
            f"{found} {what} were found; the official data has {official}. Unpack the archive again, or train on what "
            "is there with --set partial=true (the result says so)."
        )


def check_labels(path: Path, labels: NDArray[Any], classes: int, ignore: Collection[int] = ()) -> None:
    """Raise where a label is outside ``0 .. classes - 1`` and not among those to ``ignore``."""
    found = np.unique(labels).tolist()
    wrong = [label for label in found if label not in range(classes) and label not in ignore]
    if wrong:
        also = f" or {', '.join(map(str, ignore))}" if ignore else ""
        raise DataError(
            f"{path} has the label {wrong[0]}; expected 0 to {classes - 1}{also}. It is not the official file."
        )


def read_array(path: Path, shape: Shape) -> NDArray[Any]:
    """A ``.npy`` file of numbers with the sizes of ``shape``.

    Raises:
        DataError: it is missing, cut off, pickled, of another shape, or not finite.
    """
    array: NDArray[Any] = _reading(path, lambda: np.load(present(path), allow_pickle=False))
    check_numbers(path, array, shape)
    return array


def check_numbers(path: Path, array: NDArray[Any], shape: Shape) -> None:
    """Raise where an array that was read from ``path`` has other sizes than ``shape``, or holds no finite numbers."""
    check_shape(path, array, shape)
    if array.dtype.kind not in "fiub":
        raise DataError(f"{path} holds {array.dtype}; expected numbers.")
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise DataError(f"{path} has values that are not finite. Unpack the archive again.")


def check_depth(path: Path, depth: NDArray[Any]) -> None:
    """Raise where a depth is negative."""
    if depth.min() < 0:
        raise DataError(f"{path} has the depth {depth.min()}; expected 0 (unknown) or more.")


def check_shape(path: Path, array: NDArray[Any], shape: Shape) -> None:
    """Raise where an array that was read from ``path`` has other sizes than ``shape``."""
    if array.ndim != len(shape) or any(want not in (None, got) for want, got in zip(shape, array.shape, strict=True)):
        wanted = "x".join("?" if size is None else str(size) for size in shape)
        raise DataError(f"{path} has the shape {'x'.join(map(str, array.shape))}; expected {wanted}.")


def check_fits(path: Path, size: Size, largest: Size) -> None:
    """Raise where a picture that was read from ``path`` is larger than the official ones, (height, width)."""
    if any(got > most for got, most in zip(size, largest, strict=True)):
        got, most = ("x".join(map(str, each)) for each in (size, largest))
        raise DataError(f"{path} has {got} pixels; expected at most {most}. It is not the official file.")


def read_idx(path: Path) -> NDArray[np.uint8]:
    """An idx file of bytes, as MNIST has them (unpacked).

    Raises:
        DataError: it is missing, no idx file of bytes, or shorter or longer than its header says.
    """
    content = present(path).read_bytes()
    if len(content) < 4 or content[:3] != b"\x00\x00\x08" or not 1 <= content[3] <= 3:
        raise DataError(f"{path} is no idx file of bytes. If it ends in .gz, unpack it first.")
    dimensions = content[3]
    start = 4 + 4 * dimensions
    if len(content) < start:
        raise DataError(f"{path} is cut off within its header.")
    shape = tuple(int(size) for size in np.frombuffer(content[4:start], ">u4"))
    if len(content) - start != math.prod(shape):
        raise DataError(f"{path} is cut off: its header promises {shape}, it has {len(content) - start} bytes of data.")
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)


def read_picture(
    path: Path, size: Size | None = None, labels: bool = False, resize: Size | None = None
) -> NDArray[np.uint8]:
    """A PNG or JPEG file as RGB [H, W, 3]; with ``labels`` the bytes of a grey or palette picture, [H, W].

    Args:
        path: of the file.
        size: (H, W) that it must have.
        labels: see above.
        resize: (H, W) to make a picture in colours smaller to, bilinearly.

    Raises:
        DataError: it is missing, cut off, no such picture or of another size; or ``labels`` are asked of one in
            colours.
    """

    def read() -> NDArray[np.uint8]:
        with Image.open(present(path), formats=("JPEG", "PNG")) as picture:
            if size not in (None, picture.size[::-1]):
                wanted, got = ("x".join(map(str, each)) for each in (size, picture.size[::-1]))
                raise DataError(f"{path} has {got} pixels; expected {wanted}. It is not the official file.")
            if labels:
                if picture.mode not in ("L", "P"):
                    raise DataError(f"{path} is a picture of mode {picture.mode}; expected one byte per pixel.")
                return np.array(picture)
            if resize is None:
                return np.array(picture.convert("RGB"))
            picture.draft("RGB", resize[::-1])  # decodes a JPEG to the next larger half, quarter or eighth
            return np.array(picture.convert("RGB").resize(resize[::-1], Image.Resampling.BILINEAR))

    array: NDArray[np.uint8] = _reading(path, read)
    return array


def read_mat(path: Path, variable: str, take: Callable[[NDArray[Any]], Any]) -> Any:
    """What ``take`` makes of one variable of a MATLAB file (before version 7.3).

    Nothing in the file is run, but its cells and structs can hold anything: ``take`` checks what it finds, and any
    exception of its becomes a DataError.

    Raises:
        DataError: it is missing, cut off, no such file, without the variable, or not as ``take`` expects.
    """

    def read() -> Any:
        content = loadmat(present(path), variable_names=[variable])
        if variable not in content:
            raise DataError(f"{path} has no variable {variable!r}. It is not the official file.")
        return take(content[variable])

    return _reading(path, read)


def read_names(path: Path) -> list[str]:
    """A text file of one name per line."""
    names: list[str] = _reading(path, lambda: present(path).read_text(encoding="utf-8").split())
    return names


def read_tensors(path: Path) -> Any:
    """What ``torch.save`` wrote, loaded with ``weights_only=True``."""
    return _reading(path, lambda: torch.load(present(path), weights_only=True))


ALLOWED = {
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("_codecs", "encode"),
}


class _Unpickler(pickle.Unpickler):
    """Builds NumPy arrays and plain containers; every other name in the file is refused before it is looked up."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no official file does")
        return super().find_class(module, name)


def read_pickle(path: Path) -> dict[str, Any]:
    """A pickled dict of arrays, lists, numbers and text (CIFAR's format); keys that are bytes become text.

    Raises:
        DataError: it is cut off, no dict, or asks for anything else: nothing of it is ever called.
    """
    content = _reading(path, lambda: _Unpickler(io.BytesIO(present(path).read_bytes()), encoding="bytes").load())
    if not isinstance(content, dict):
        raise DataError(f"{path} holds a {type(content).__name__}; expected a dict.")
    return {key.decode() if isinstance(key, bytes) else str(key): value for key, value in content.items()}


def read_json(path: Path, record: Callable[[dict[str, Any]], Any] | None = None) -> Any:
    """A JSON file; ``record``, where given, is called with each object in it, innermost first, and takes its place."""
    return _reading(path, lambda: json.loads(present(path).read_bytes(), object_hook=record))


def _reading(path: Path, read: Callable[[], Any]) -> Any:
    try:
        return read()
    except DataError:
        raise
    except Exception as error:
        why = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(f"{path} cannot be read: {why}. It is damaged or not the official file.") from error


def validation(name: str, samples: Sequence[str]) -> tuple[list[str], list[str]]:
    """Training samples without, and those of, the validation split that detente ships for a data set.

    ``splits/<name>.txt`` names one validation sample per line; it was drawn once, by scripts/splits.py. ``samples`` are
    those that are there (fewer than published where ``partial``); without any of the listed ones the last sample
    validates.
    """
    held = shipped(name)
    if held.isdisjoint(samples):
        held = set(samples[-1:])
    return [sample for sample in samples if sample not in held], [sample for sample in samples if sample in held]


def shipped(name: str) -> set[str]:
    """The names in ``splits/<name>.txt``."""
    return set(files("detente.benchmark").joinpath(f"splits/{name}.txt").read_text().split())


def listed(
    directory: Path, lists: str, counts: Mapping[str, int], files: Callable[[str], Sequence[Path]], partial: bool
) -> dict[str, list[str]]:
    """Names of the samples of the splits train and val, cut from the list train by `held_out`, and test, the list val.

    Args:
        directory: of the data set.
        lists: the folder in it that holds train.txt and val.txt.
        counts: how many names the official lists have.
        files: what belongs to a name.
        partial: leave out names whose first file is missing.

    Raises:
        DataError: a list has another length, or one of the files is missing.
    """
    names = {}
    for part, official in counts.items():
        path = directory / lists / f"{part}.txt"
        all_names = read_names(path)
        names[part] = [name for name in all_names if files(name)[0].is_file()] if partial else all_names
        check_count(f"samples of {path}", len(names[part]), official, partial)
        for name in names[part]:
            for file in files(name):
                present(file)
    kept, held = held_out(names["train"])
    return {"train": kept, "val": held, "test": names["val"]}


def held_out(names: Sequence[str], share: float = 0.1) -> tuple[list[str], list[str]]:
    """Training names without, and those of, a validation split that each name's own hash decides.

    For data sets whose names are only in their own files, so that detente ships no list. About ``share`` of the names
    are held out, the same ones whichever others are there (as with ``partial``). Where none would be, the one with the
    lowest hash is.
    """
    rank = {name: int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64 for name in names}
    held = {name for name in names if rank[name] < share} or set(sorted(names, key=rank.__getitem__)[:1])
    return [name for name in names if name not in held], [name for name in names if name in held]
