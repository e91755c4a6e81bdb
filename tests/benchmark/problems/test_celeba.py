"""CelebA: official files are read as they are, others are named, and 40 attributes are learned from and scored."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from benchmark.layouts.celeba import write
from detente.benchmark.datasets.celeba import ATTRIBUTES
from detente.benchmark.datasets.source import DataError
from detente.benchmark.problems import celeba

IMAGE, ANNOTATIONS, PARTITION = (
    "Img/img_align_celeba/000001.jpg",
    "Anno/list_attr_celeba.txt",
    "Eval/list_eval_partition.txt",
)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("celeba")
    write(path)
    return path


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """Files of the test's own, to be damaged."""
    write(tmp_path, train=2, test=1)
    return tmp_path


@pytest.fixture(scope="module")
def batch(directory: Path) -> Any:
    return next(iter(DataLoader(celeba.make_data(directory, partial=True)["train"], batch_size=4)))


def test_samples_have_the_documented_form(directory: Path) -> None:
    data = celeba.make_data(directory, partial=True)
    assert {split: len(part) for split, part in data.items()} == {"train": 4, "val": 2, "test": 2}
    for part in data.values():
        for image, attributes in part:
            assert (image.shape, image.dtype) == ((3, 64, 64), torch.uint8)
            assert (attributes.shape, attributes.dtype) == ((40,), torch.float32)
            assert set(attributes.tolist()) == {0.0, 1.0}
            assert attributes[:2].tolist() == [1, 0]  # as the file says


def test_images_are_the_official_ones_made_small(own: Path) -> None:
    colours = np.zeros((218, 178, 3), dtype=np.uint8)
    colours[:109, :, 0] = 200  # red above, blue below
    colours[109:, :, 2] = 100
    Image.fromarray(colours).save(own / IMAGE, quality=95)
    image = celeba.make_data(own, partial=True)["train"][0][0].float()
    assert image[:, :28].mean((1, 2)) == pytest.approx([200, 0, 0], abs=3)
    assert image[:, 36:].mean((1, 2)) == pytest.approx([0, 0, 100], abs=3)


@pytest.mark.parametrize("tasks", [ATTRIBUTES, *[(name,) for name in ATTRIBUTES[::13]]])
def test_losses_train_the_network(batch: Any, tasks: tuple[str, ...]) -> None:
    torch.manual_seed(0)
    model = celeba.make_model(tasks, dropout=0.1, width=0.05)
    losses = celeba.losses(model, batch, tasks)
    assert tuple(losses) == tasks
    assert all(0 < float(loss.detach()) < 10 for loss in losses.values())
    torch.stack(list(losses.values())).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert any(p.grad.any() for p in model.parameters())


def test_losses_are_cross_entropies_of_the_named_attributes(batch: Any) -> None:
    certain = _Says(dict.fromkeys(ATTRIBUTES, -math.log(3)))  # probability 1/4
    labels = batch[1][:, 8]
    expected = (labels * math.log(4) + (1 - labels) * math.log(4 / 3)).mean()
    assert float(celeba.losses(certain, batch, ("Black_Hair",))["Black_Hair"]) == pytest.approx(float(expected))


def test_f1_is_of_the_whole_set() -> None:
    attributes = torch.zeros(600, 40)
    attributes[:150, 0] = 1
    data = TensorDataset(torch.zeros(600, 3, 64, 64, dtype=torch.uint8), attributes)
    says_yes, says_no = _Says(dict.fromkeys(ATTRIBUTES, 1.0)), _Says(dict.fromkeys(ATTRIBUTES, -1.0))
    tasks = ATTRIBUTES[:2]
    # of 600 faces said to have the first attribute 150 have it, none the second: 2 * 150 / (600 + 150)
    assert celeba.metrics(says_yes, data, tasks) == {tasks[0]: {"f1": 0.4}, tasks[1]: {"f1": 0.0}}
    assert celeba.metrics(says_no, data, tasks) == {tasks[0]: {"f1": 0.0}, tasks[1]: {"f1": 0.0}}


class _Says(nn.Module):
    """The same answer for every image."""

    def __init__(self, logits: dict[str, float]) -> None:
        super().__init__()
        self.logits = logits

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        return {task: torch.full((len(images),), logit) for task, logit in self.logits.items()}


def test_missing_files_say_where_they_come_from(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"mmlab\.ie\.cuhk\.edu\.hk"):
        celeba.make_data(tmp_path)


def test_official_counts_are_asked_for(directory: Path) -> None:
    with pytest.raises(DataError, match=r"4 train faces .* 162770"):
        celeba.make_data(directory)


def test_an_image_that_a_list_names_must_be_there(own: Path) -> None:
    (own / IMAGE).unlink()
    with pytest.raises(DataError, match=r"000001\.jpg is missing"):
        celeba.make_data(own)
    assert len(celeba.make_data(own, partial=True)["train"]) == 1


@pytest.mark.parametrize(
    ("file", "old", "new", "complaint"),
    [
        (ANNOTATIONS, "4\r\n5_o", "5\r\n5_o", "promises '5' images and lists 4"),
        (ANNOTATIONS, "Attractive", "Pretty", "second line must name the 40 attributes"),
        (ANNOTATIONS, "000002.jpg  1", "000002.jpg  2", "'000002.jpg' must be followed by 40 values, 1 or -1"),
        (ANNOTATIONS, "000002.jpg  1", "000002.jpg", "'000002.jpg' must be followed by 40 values"),
        (PARTITION, "000002.jpg 0", "000002.jpg 3", "'000002.jpg' must be followed by 0"),
        (PARTITION, "000002.jpg 0", "000005.jpg 0", "lists other images"),
    ],
)
def test_lists_that_are_not_official_are_named(own: Path, file: str, old: str, new: str, complaint: str) -> None:
    content = (own / file).read_bytes()
    assert content.count(old.encode()) == 1
    (own / file).write_bytes(content.replace(old.encode(), new.encode()))
    with pytest.raises(DataError, match=complaint) as caught:
        celeba.make_data(own, partial=True)
    assert file in str(caught.value)


def test_an_empty_list_is_named(own: Path) -> None:
    (own / ANNOTATIONS).write_text("")
    with pytest.raises(DataError, match=r"list_attr_celeba\.txt"):
        celeba.make_data(own, partial=True)


def test_a_damaged_image_is_named(own: Path) -> None:
    (own / IMAGE).write_bytes((own / IMAGE).read_bytes()[:2000])
    with pytest.raises(DataError, match=r"000001\.jpg cannot be read"):
        celeba.make_data(own, partial=True)["train"][0]


def test_an_image_of_another_size_is_named(own: Path) -> None:
    Image.new("RGB", (178, 178)).save(own / IMAGE)
    with pytest.raises(DataError, match=r"000001\.jpg has 178x178 pixels; expected 218x178"):
        celeba.make_data(own, partial=True)["train"][0]
