"""Cityscapes in MTAN's layout, which differs from NYUv2's in size, classes, and the name of the labels' folder."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from benchmark.dense_model import check_metrics, check_training
from benchmark.layouts import cityscapes as layout
from detente.benchmark.datasets.source import DataError
from detente.benchmark.problems import cityscapes

TASKS = tuple(cityscapes.tasks)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    layout.write(tmp_path / "cityscapes", train=3)
    return tmp_path / "cityscapes"


def test_samples_are_the_files(directory: Path):
    data = cityscapes.make_data(directory, partial=True)
    assert {split: len(part) for split, part in data.items()} == {"train": 2, "val": 1, "test": 2}
    image, labels, depth = data["test"][1]
    assert np.array_equal(image.permute(1, 2, 0), np.load(directory / "val/image/1.npy"))
    assert np.array_equal(labels, np.load(directory / "val/label_7/1.npy"))
    assert np.array_equal(depth[0], np.load(directory / "val/depth/1.npy")[..., 0])
    assert [tuple(x.shape) for x in data["train"][0]] == [(3, 128, 256), (128, 256), (1, 128, 256)]


def test_the_labels_may_be_called_as_in_libmtl(directory: Path):
    for part in ("train", "val"):
        (directory / part / "label_7").rename(directory / part / "label")
    assert len(cityscapes.make_data(directory, partial=True)["test"][0]) == 3


def test_losses_and_figures(directory: Path):
    data = cityscapes.make_data(directory, partial=True, augment=False)
    check_training(cityscapes, tuple(map(torch.stack, zip(data["train"][0], data["train"][1], strict=True))))
    check_metrics(cityscapes, data["test"])


def test_the_network(directory: Path):
    batch = tuple(x.unsqueeze(0) for x in cityscapes.make_data(directory, partial=True)["val"][0])
    model = cityscapes.make_model(TASKS, width=0.05)
    assert {task: tuple(x.shape) for task, x in model(batch[0]).items()} == {
        "segmentation": (1, 7, 128, 256),
        "depth": (1, 1, 128, 256),
    }
    torch.stack(list(cityscapes.losses(model, batch, TASKS).values())).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_other_files_are_named(directory: Path, tmp_path: Path):
    with pytest.raises(DataError, match=r"3 images.*2975"):
        cityscapes.make_data(directory)
    np.save(directory / "val/label_7/0.npy", np.full((128, 256), 18))
    with pytest.raises(DataError, match=r"label_7/0\.npy has the label 18; expected 0 to 6 or -1"):
        cityscapes.make_data(directory, partial=True)["test"][0]
    (directory / "train/depth/0.npy").unlink()
    with pytest.raises(DataError, match=r"train/depth/0\.npy is missing"):
        cityscapes.make_data(directory, partial=True)
    with pytest.raises(DataError, match="label_7"):
        cityscapes.make_data(tmp_path)
