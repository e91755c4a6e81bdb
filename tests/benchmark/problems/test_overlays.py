"""MultiMNIST and Multi-Fashion+MNIST: pictures are what they claim to be, splits are clean, other files are named."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from benchmark.layouts import multifashion as fashion_layout
from benchmark.layouts import multimnist as mnist_layout
from benchmark.layouts.multimnist import idx
from detente.benchmark.datasets.source import DataError
from detente.benchmark.problems import multifashion, multimnist

PROBLEMS = {
    "multimnist": (multimnist, mnist_layout.write, "mnist", "mnist", ("left", "right")),
    "multifashion": (multifashion, fashion_layout.write, "fashion", "mnist", ("fashion", "digit")),
}


@pytest.fixture(scope="module", params=list(PROBLEMS))
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    problem, write, upper, lower, tasks = PROBLEMS[request.param]
    directory = tmp_path_factory.mktemp(request.param)
    write(directory, train=40, test=12)
    return problem, directory, upper, lower, tasks


@pytest.fixture(scope="module")
def data(case: Any) -> Any:
    problem, directory, *_ = case
    return problem.make_data(directory, partial=True)


def _raw(directory: Path, folder: str, part: str) -> tuple[Any, Any]:
    images = np.frombuffer((directory / folder / f"{part}-images-idx3-ubyte").read_bytes(), np.uint8, offset=16)
    labels = np.frombuffer((directory / folder / f"{part}-labels-idx1-ubyte").read_bytes(), np.uint8, offset=8)
    return images.reshape(-1, 28, 28), labels


def test_samples_have_the_documented_form(case: Any, data: Any) -> None:
    problem, *_, tasks = case
    assert list(problem.tasks) == list(tasks)
    assert list(data) == ["train", "val", "test"]
    for part in data.values():
        images, *labels = part[:]
        assert (images.shape[1:], images.dtype) == ((1, 36, 36), torch.uint8)
        assert [label.dtype for label in labels] == [torch.int64] * 2
        assert all(label.min() >= 0 and label.max() <= 9 for label in labels)


def test_images_overlay_two_pictures_and_no_picture_is_in_two_splits(case: Any, data: Any) -> None:
    _, directory, upper, lower, _ = case
    used: dict[str, list[tuple[int, int]]] = {}
    for split, part in data.items():
        above, above_labels = _raw(directory, upper, "t10k" if split == "test" else "train")
        below, below_labels = _raw(directory, lower, "t10k" if split == "test" else "train")
        used[split] = []
        for image, first, second in part:
            canvas = image[0].numpy()
            # the strips at the left and at the right show one picture each
            [one] = np.flatnonzero((above[:, :, :8] == canvas[:28, :8]).all((1, 2)))
            [other] = np.flatnonzero((below[:, :, -8:] == canvas[8:, -8:]).all((1, 2)))
            assert (first, second) == (above_labels[one], below_labels[other])
            expected = np.zeros((36, 36), np.uint8)
            expected[:28, :28] = above[one]
            expected[8:, 8:] = np.maximum(expected[8:, 8:], below[other])
            assert (canvas == expected).all()
            used[split].append((int(one), int(other)))
    for side in (0, 1):
        train, val, test = ([pair[side] for pair in used[split]] for split in ("train", "val", "test"))
        assert not set(train) & set(val)
        assert sorted(train + val) == sorted([*range(40)] * 2)  # every picture is used twice
        assert sorted(test) == sorted([*range(12)] * 2)
    assert len(set(used["train"])) > 60  # of 70 or so: paired by chance


def test_data_are_the_same_whatever_the_global_seeds(case: Any, data: Any) -> None:
    problem, directory, *_ = case
    torch.manual_seed(5)
    np.random.seed(5)  # noqa: NPY002
    again = problem.make_data(directory, partial=True)
    for split, part in data.items():
        assert all(torch.equal(a, b) for a, b in zip(again[split].tensors, part.tensors, strict=True))


@pytest.mark.parametrize("chosen", [(0, 1), (0,), (1,)])
def test_losses_train_the_network(case: Any, data: Any, chosen: tuple[int, ...]) -> None:
    problem, *_, tasks = case
    wanted = tuple(tasks[k] for k in chosen)
    torch.manual_seed(0)
    model = problem.make_model(wanted, dropout=0.1, width=0.5)
    batch = next(iter(DataLoader(data["train"], batch_size=16)))
    losses = problem.losses(model, batch, wanted)
    assert tuple(losses) == wanted
    assert all(1 < float(loss.detach()) < 5 for loss in losses.values())  # chance is log 10 = 2.3
    torch.stack(list(losses.values())).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_accuracy_counts_right_answers(case: Any, data: Any) -> None:
    problem, *_, tasks = case

    class Constant(nn.Module):
        def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
            assert images.max() <= 1
            return {task: torch.eye(10)[torch.full((len(images),), 3)] for task in tasks}

    _, first, second = data["train"][:]
    expected = [{"accuracy": int((labels == 3).sum()) / len(labels)} for labels in (first, second)]
    assert problem.metrics(Constant(), data["train"], tasks) == dict(zip(tasks, expected, strict=True))
    assert problem.metrics(Constant(), data["train"], tasks[1:]) == {tasks[1]: expected[1]}


def test_missing_files_say_where_they_come_from(case: Any, tmp_path: Path) -> None:
    problem, *_ = case
    with pytest.raises(DataError, match="gunzip"):
        problem.make_data(tmp_path)


def test_official_counts_are_asked_for(case: Any) -> None:
    problem, directory, *_ = case
    with pytest.raises(DataError, match=r"40 pictures .* 60000"):
        problem.make_data(directory)


def _files(problem: str, directory: Path) -> tuple[ModuleType, Path, Path]:
    module, write, upper, *_ = PROBLEMS[problem]
    write(directory, train=4, test=2)
    folder = directory / upper
    return module, folder / "train-images-idx3-ubyte", folder / "train-labels-idx1-ubyte"


@pytest.mark.parametrize("problem", list(PROBLEMS))
def test_files_that_are_not_official_are_named(problem: str, tmp_path: Path) -> None:
    module, images, labels = _files(problem, tmp_path)
    good_images, good_labels = images.read_bytes(), labels.read_bytes()
    for path, content, complaint in (
        (images, good_images[:-1], "is cut off"),
        (images, good_images[:7], "is cut off"),
        (images, b"", "is no idx file"),
        (images, b"\x1f\x8b" + good_images, "unpack it first"),
        (images, idx(np.zeros((4, 28, 27), np.uint8)), "shape 4x28x27; expected .x28x28"),
        (images, idx(np.zeros((0, 28, 28), np.uint8)), "expected 0"),
        (labels, idx(np.zeros(3, np.uint8)), "shape 3; expected 4"),
        (labels, idx(np.full(4, 10, np.uint8)), "label 10; expected 0 to 9"),
    ):
        images.write_bytes(good_images)
        labels.write_bytes(good_labels)
        path.write_bytes(content)
        with pytest.raises(DataError, match=complaint) as caught:
            module.make_data(tmp_path, partial=True)
        assert images.parent.name in str(caught.value)
