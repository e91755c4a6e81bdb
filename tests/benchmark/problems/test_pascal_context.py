"""PASCAL-Context: what is read is what is in the files, and files that are not the official ones are named."""

from __future__ import annotations

import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import savemat

from benchmark.dense_model import Payload, check_metrics, check_training, cut
from benchmark.layouts import pascal_context as layout
from detente.benchmark.datasets.source import DataError
from detente.benchmark.problems import pascal_context

TASKS = tuple(pascal_context.tasks)
SIZE = (60, 80)
INSIDE = (..., slice(226, 286), slice(216, 296))  # the photo in the middle of 512 x 512
NAME = "2008_000003"  # the first of the official val


@pytest.fixture(scope="module")
def official(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("data") / "pascal"
    layout.write(directory, train=3, test=2, size=SIZE)
    return directory


@pytest.fixture
def directory(official: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(official, tmp_path / "pascal"))


def test_samples_are_the_files_padded(official: Path):
    data = pascal_context.make_data(official, partial=True)
    assert {split: len(part) for split, part in data.items()} == {"train": 2, "val": 1, "test": 2}
    image, labels, parts, saliency, normals, edges = data["test"][0]
    assert image.shape == normals.shape == (3, 512, 512)
    outside = torch.ones(512, 512, dtype=torch.bool)
    outside[INSIDE] = False
    for found in (labels, parts, saliency, edges):
        assert found.shape == (512, 512)
        assert found.dtype == torch.int64
        assert found[outside].unique().tolist() == [-1]
    assert not image[:, outside].any()
    assert not normals[:, outside].any()

    written = np.array(Image.open(official / "semseg/pascal-context" / f"{NAME}.png")).astype(int)
    assert np.array_equal(labels[INSIDE], np.where(written == 255, -1, written))
    on = np.array(Image.open(official / "sal_distill" / f"{NAME}.png")) > 127
    assert np.array_equal(saliency[INSIDE], on)
    expected = np.zeros(SIZE)
    expected[20:30, 10:20], expected[30:35, 10:20] = 1, 4  # head, and a hand with the lower arm
    assert np.array_equal(parts[INSIDE], expected)
    expected = np.zeros(SIZE)
    expected[19] = 1  # the last row of the sky
    assert np.array_equal(edges[INSIDE], expected)
    assert not normals[INSIDE][:, :20].any()  # the sky has no normals
    assert normals[INSIDE][:, 20:].norm(dim=0).median() == pytest.approx(1)


def test_images_without_humans_have_no_parts(official: Path):
    data = pascal_context.make_data(official, partial=True)
    batch = tuple(x.unsqueeze(0) for x in data["test"][1])
    assert data["test"][1][2].unique().tolist() == [-1]
    counts = pascal_context.counts(batch, TASKS)
    assert counts["human_parts"] == 0
    assert counts["edges"] == 60 * 80


def test_validation_is_cut_from_training_by_name(official: Path):
    data = pascal_context.make_data(official, partial=True)
    parts = [data["train"].data.names, data["val"].names, data["test"].names]
    assert sorted(name for part in parts for name in part) == [f"2008_{k:06}" for k in range(5)]
    assert parts[2] == [NAME, "2008_000004"]


def test_losses_and_figures(official: Path):
    data = pascal_context.make_data(official, partial=True)
    check_training(pascal_context, tuple(x.unsqueeze(0) for x in data["test"][0]))
    check_metrics(pascal_context, data["test"])


def test_augmented_samples_keep_their_form(official: Path):
    data = pascal_context.make_data(official, partial=True)
    torch.manual_seed(0)
    for sample in (data["train"][0], data["train"][1]):
        assert [(x.shape, x.dtype) for x in sample] == [(x.shape, x.dtype) for x in data["val"][0]]
        assert (sample[1] >= 0).any()


def test_the_network(official: Path):
    batch = tuple(x.unsqueeze(0)[..., 224:288, 208:304] for x in pascal_context.make_data(official, True)["test"][0])
    for architecture in ("hrnet18", "resnet18"):
        model = pascal_context.make_model(TASKS, architecture, width=0.1)
        losses = pascal_context.losses(model, batch, TASKS)
        torch.stack(list(losses.values())).sum().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert list(pascal_context.make_model(("saliency",), width=0.1)(batch[0])) == ["saliency"]


def test_missing_files_are_named(directory: Path, tmp_path: Path):
    with pytest.raises(DataError, match=r"PASCALContext\.tar\.gz"):
        pascal_context.make_data(tmp_path)
    with pytest.raises(DataError, match=r"3 samples of .*train\.txt.*has 4998"):
        pascal_context.make_data(directory)
    (directory / "semseg/pascal-context" / f"{NAME}.png").unlink()
    with pytest.raises(DataError, match=rf"{NAME}\.png is missing"):
        pascal_context.make_data(directory, partial=True)
    (directory / "JPEGImages" / f"{NAME}.jpg").unlink()
    assert pascal_context.make_data(directory, partial=True)["test"].names == ["2008_000004"]
    (directory / "ImageSets/Context/val.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match=r"val\.txt cannot be read"):
        pascal_context.make_data(directory, partial=True)


def picture(value: int, *shape: int) -> Callable[[Path], None]:
    return lambda path: Image.fromarray(np.full(shape, value, np.uint8)).save(path)


def mat(**content: object) -> Callable[[Path], None]:
    return lambda path: savemat(path, content)


def person(part: str, mask: object) -> Callable[[Path], None]:
    return mat(anno=layout.annotation(NAME, [(15, [(part, mask)])], SIZE))  # type: ignore[list-item]


def pickled(path: Path) -> None:
    path.write_bytes(pickle.dumps(Payload(path.parent / "made")))


CELLS = np.array([["a", 1.0]], dtype=object)


@pytest.mark.parametrize(
    ("folder", "spoil", "what"),
    [
        ("JPEGImages", cut, "cannot be read"),
        ("JPEGImages", picture(0, 513, 20, 3), "513x20 pixels; expected at most 512x512"),
        ("semseg/pascal-context", picture(21, *SIZE), "label 21; expected 0 to 20 or 255"),
        ("semseg/pascal-context", picture(0, 60, 81), "60x81 pixels; expected 60x80"),
        ("sal_distill", picture(0, *SIZE, 3), "mode RGB"),
        ("normals_distill", picture(0, 61, 80, 3), "61x80 pixels; expected 60x80"),
        ("pascal-context/trainval", cut, "cannot be read"),
        ("pascal-context/trainval", pickled, "cannot be read"),
        ("pascal-context/trainval", mat(other=1), "no variable 'LabelMap'"),
        ("pascal-context/trainval", mat(LabelMap=np.zeros((60, 81))), "60x81; expected 60x80"),
        ("pascal-context/trainval", mat(LabelMap=CELLS.repeat(60, 0).repeat(40, 1)), "expected numbers"),
        ("human_parts", cut, "cannot be read"),
        ("human_parts", pickled, "cannot be read"),
        ("human_parts", mat(anno=np.zeros((2, 2))), "cannot be read"),
        ("human_parts", person("tail", np.ones(SIZE)), "human part 'tail'"),
        ("human_parts", person("head", np.ones((60, 81))), "60x81; expected 60x80"),
        ("human_parts", person("head", CELLS.repeat(60, 0).repeat(40, 1)), "expected numbers"),
    ],
)
def test_malformed_files_are_named(directory: Path, folder: str, spoil: Callable[[Path], None], what: str):
    (path,) = (directory / folder).glob(f"{NAME}.*")
    spoil(path)
    data = pascal_context.make_data(directory, partial=True)
    with pytest.raises(DataError, match=what) as error:
        data["test"][0]
    assert str(path) in str(error.value)
    assert not (path.parent / "made").exists()
