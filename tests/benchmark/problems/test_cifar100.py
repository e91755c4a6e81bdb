"""CIFAR-100's superclasses: Python 2's pickles are read and others refused; tasks know their own images only."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from benchmark.layouts.cifar100 import content, pickled, write
from detente.benchmark.datasets.cifar100 import CLASSES, SUPERCLASSES
from detente.benchmark.datasets.source import DataError
from detente.benchmark.problems import cifar100

SHEEP = SUPERCLASSES[11]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cifar100")
    write(path)
    return path


@pytest.fixture(scope="module")
def data(directory: Path) -> Any:
    return cifar100.make_data(directory, partial=True)


def test_samples_have_the_documented_form(data: Any) -> None:
    assert list(data) == ["train", "val", "test"]
    for part in data.values():
        images, superclasses, labels = part[:]
        assert (images.shape[1:], images.dtype) == ((3, 32, 32), torch.uint8)
        assert superclasses.dtype == labels.dtype == torch.int64
        assert sorted(superclasses.unique().tolist()) == list(range(20))
        assert labels.min() >= 0
        assert labels.max() <= 4


def test_every_image_is_in_one_split_with_its_own_labels(directory: Path, data: Any) -> None:
    with (directory / "cifar-100-python/train").open("rb") as file:
        raw = pickle.load(file, encoding="latin1")
    known = {row.tobytes(): k for k, row in enumerate(raw["data"])}
    found: dict[str, list[int]] = {"train": [], "val": []}
    for split, rows in found.items():
        for image, superclass, label in data[split]:
            k = known[image.numpy().tobytes()]  # rows hold red, green and blue planes, as the samples do
            assert raw["coarse_labels"][k] == superclass
            assert raw["fine_labels"][k] == CLASSES[superclass][label]
            rows.append(k)
    assert sorted(found["train"] + found["val"]) == list(range(len(known)))
    assert 0 < len(found["val"]) < 0.2 * len(known)


def test_classes_are_shared_out_among_the_superclasses() -> None:
    assert sorted(label for members in CLASSES for label in members) == list(range(100))
    assert {len(members) for members in CLASSES} == {5}
    assert list(cifar100.tasks) == list(SUPERCLASSES)


@pytest.mark.parametrize("architecture", ["yu2020", "rosenbaum2018"])
@pytest.mark.parametrize("tasks", [SUPERCLASSES, *[(name,) for name in SUPERCLASSES]])
def test_losses_train_the_network(data: Any, architecture: str, tasks: tuple[str, ...]) -> None:
    torch.manual_seed(0)
    model = cifar100.make_model(tasks, architecture=architecture, dropout=0.1, width=0.05)
    losses = cifar100.losses(model, data["val"][:], tasks)
    assert tuple(losses) == tasks
    assert all(0.5 < float(loss.detach()) < 4 for loss in losses.values())  # chance is log 5 = 1.6
    torch.stack(list(losses.values())).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_networks_have_the_published_sizes() -> None:
    published = {"yu2020": 4480 + 2 * 230_560 + 2560 * 320 + 320 + 321 * 320 + 20 * 321 * 5}
    published["rosenbaum2018"] = 896 + 3 * 9248 + 64 + 129 * 48 + 49 * 48 + 20 * 49 * 5
    for architecture, parameters in published.items():
        model = cifar100.make_model(SUPERCLASSES, architecture=architecture)
        assert sum(p.numel() for p in model.parameters()) == parameters
    with pytest.raises(ValueError, match="architecture must be one of yu2020, rosenbaum2018; got 'vgg'"):
        cifar100.make_model(SUPERCLASSES, architecture="vgg")


def test_a_task_counts_and_learns_from_its_own_images_only(data: Any) -> None:
    torch.manual_seed(0)
    images, superclasses, labels = data["train"][:30]
    model = cifar100.make_model(SUPERCLASSES, width=0.05)
    counts = cifar100.counts((images, superclasses, labels), SUPERCLASSES)
    assert counts == {name: int((superclasses == k).sum()) for k, name in enumerate(SUPERCLASSES)}
    mine = superclasses == 11
    before = cifar100.losses(model, (images, superclasses, labels), (SHEEP,))[SHEEP]
    alone = cifar100.losses(model, (images[mine], superclasses[mine], labels[mine]), (SHEEP,))[SHEEP]
    assert float(before.detach()) == pytest.approx(float(alone.detach()))
    swapped = torch.where(mine, labels, 4 - labels)  # other tasks' labels do not matter
    after = cifar100.losses(model, (images, superclasses, swapped), (SHEEP,))[SHEEP]
    assert torch.equal(before, after)


def test_accuracy_is_over_the_images_of_the_superclass(data: Any) -> None:
    class Always(nn.Module):
        def forward(self, images: torch.Tensor, tasks: tuple[str, ...]) -> dict[str, torch.Tensor]:
            return {task: torch.eye(5)[torch.full((len(images),), 2)] for task in tasks}

    _, superclasses, labels = data["test"][:]
    figures = cifar100.metrics(Always(), data["test"], SUPERCLASSES)
    for k, name in enumerate(SUPERCLASSES):
        assert figures[name] == {"accuracy": float((labels[superclasses == k] == 2).double().mean())}
    one = TensorDataset(*(part[:1] for part in data["train"].tensors))
    with pytest.raises(ValueError, match="no image of"):
        cifar100.metrics(Always(), one, SUPERCLASSES)


def test_optimizer_and_schedule_are_those_of_the_presets(data: Any) -> None:
    model = cifar100.make_model((SHEEP,), width=0.05)
    rates = {}
    for name, preset in cifar100.presets.items():
        settings = {**cifar100.settings, **preset}
        optimizer = cifar100.make_optimizer(model, settings)
        schedule = cifar100.make_scheduler(optimizer, settings)
        rates[name] = [type(optimizer).__name__]
        for _ in range(12):
            rates[name].append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            schedule.step()
    assert rates["yu2020pcgrad"] == ["Adam", *[1e-3] * 12]
    assert rates["rosenbaum2018routing"] == ["SGD", *map(pytest.approx, [1e-2] * 5 + [1e-3] * 5 + [1e-4] * 2)]
    with pytest.raises(ValueError, match="optimizer must be one of adam, sgd; got 'adagrad'"):
        cifar100.make_optimizer(model, {**cifar100.settings, "optimizer": "adagrad"})


def test_a_batch_from_a_loader_will_do(data: Any) -> None:
    batch = next(iter(DataLoader(data["train"], batch_size=20)))
    assert sum(cifar100.counts(batch, SUPERCLASSES).values()) == 20


def test_missing_files_say_where_they_come_from(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"www\.cs\.toronto\.edu"):
        cifar100.make_data(tmp_path)


def test_official_counts_are_asked_for(directory: Path) -> None:
    with pytest.raises(DataError, match=r"300 images .* 50000"):
        cifar100.make_data(directory)


class _Payload:
    """Unpickled, it creates a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("part", ["train", "test", "meta"])
@pytest.mark.parametrize("place", ["whole", "inside"])
def test_a_crafted_pickle_is_refused_and_not_run(tmp_path: Path, part: str, place: str) -> None:
    write(tmp_path, test=1)
    trap = tmp_path / "trap"
    payload = _Payload(trap)
    crafted = pickle.dumps(payload if place == "whole" else {b"data": payload}, protocol=2)
    path = tmp_path / "cifar-100-python" / part
    path.write_bytes(crafted)
    with pytest.raises(DataError, match="mkdir") as caught:
        cifar100.make_data(tmp_path, partial=True)
    assert str(path) in str(caught.value)
    assert not trap.exists()
    pickle.loads(crafted)  # which does run it
    assert trap.exists()


def _change(**changes: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda good: good | changes


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (_change(data=np.zeros((20, 3071), np.uint8)), "shape 20x3071; expected .x3072"),
        (_change(data=np.zeros((20, 3072), np.float32)), "array of bytes"),
        (_change(data=[1, 2]), "array of bytes"),
        (_change(data=np.array([None] * 20)), "array of bytes"),
        (_change(fine_labels=[100] * 20), "label 100; expected 0 to 99"),
        (_change(coarse_labels=[20] * 20), "label 20; expected 0 to 19"),
        (_change(fine_labels=[4] * 20), "where it does not belong"),
        (_change(fine_labels=[4] * 19), "one whole number per image"),
        (_change(fine_labels=[0.5] * 20), "one whole number per image"),
        (lambda good: {k: v for k, v in good.items() if k != "coarse_labels"}, "no 'coarse_labels'"),
        (lambda good: [good], "holds a list"),
    ],
)
def test_a_file_that_is_not_official_is_named(
    tmp_path: Path, damage: Callable[[dict[str, Any]], Any], complaint: str
) -> None:
    write(tmp_path, test=1)
    path = tmp_path / "cifar-100-python/test"
    path.write_bytes(pickled(damage(content(np.random.default_rng(0), 20))))
    with pytest.raises(DataError, match=complaint) as caught:
        cifar100.make_data(tmp_path, partial=True)
    assert str(path) in str(caught.value)


def test_a_file_that_is_cut_off_is_named(tmp_path: Path) -> None:
    write(tmp_path, test=1)
    path = tmp_path / "cifar-100-python/train"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(DataError, match="train cannot be read"):
        cifar100.make_data(tmp_path, partial=True)


def test_other_superclasses_are_named(tmp_path: Path) -> None:
    write(tmp_path, test=1)
    (tmp_path / "cifar-100-python/meta").write_bytes(pickled({"coarse_label_names": [b"cats"]}))
    with pytest.raises(DataError, match="meta names other superclasses"):
        cifar100.make_data(tmp_path, partial=True)
