"""NYUv2: what is read is what is in the files, and files that are not the official ones are named."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmark.dense_model import Payload, check_metrics, check_training, cut
from benchmark.layouts import nyuv2 as layout
from detente.benchmark.datasets.source import DataError
from detente.benchmark.problems import nyuv2

TASKS = tuple(nyuv2.tasks)


@pytest.fixture(scope="module")
def official(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("data") / "nyuv2"
    layout.write(directory, train=3, test=1)
    return directory


@pytest.fixture
def directory(official: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(official, tmp_path / "nyuv2"))


def test_samples_are_the_files(official: Path):
    data = nyuv2.make_data(official, partial=True, augment=False)
    assert {split: len(part) for split, part in data.items()} == {"train": 2, "val": 1, "test": 1}
    image, labels, depth, normals = data["test"][0]
    assert [x.dtype for x in (image, labels, depth, normals)] == [torch.float32, torch.int64] + [torch.float32] * 2
    read = {f: np.load(official / "val" / f / "0.npy") for f in ("image", "label", "depth", "normal")}
    assert np.array_equal(image.permute(1, 2, 0), read["image"])
    assert np.array_equal(labels, read["label"])
    assert np.array_equal(depth[0], read["depth"][..., 0])
    assert np.array_equal(normals.permute(1, 2, 0), read["normal"])
    assert set(labels.unique().tolist()) <= set(range(-1, 13))


def test_validation_is_cut_from_training_and_only_training_is_augmented(official: Path):
    data = nyuv2.make_data(official, partial=True)
    plain = nyuv2.make_data(official, partial=True, augment=False)
    assert sorted([*plain["train"].samples, *plain["val"].samples]) == ["0", "1", "2"]
    torch.manual_seed(1)
    draws = [data["train"][0] for _ in range(4)]
    assert not all(torch.equal(draws[0][0], draw[0]) for draw in draws)
    assert all(x.shape == y.shape for draw in draws for x, y in zip(draw, plain["train"][0], strict=True))
    assert all(torch.equal(x, y) for x, y in zip(data["val"][0], plain["val"][0], strict=True))


def test_losses_and_figures(official: Path):
    data = nyuv2.make_data(official, partial=True, augment=False)
    batch = tuple(x.unsqueeze(0) for x in data["train"][0])
    check_training(nyuv2, batch)
    check_metrics(nyuv2, data["test"])
    labelled = float(288 * 384 - 32 * 32)
    assert nyuv2.counts(batch, TASKS) == dict.fromkeys(TASKS, labelled)


def test_the_network_answers_for_all_tasks_at_once_or_one(official: Path):
    batch = tuple(x.unsqueeze(0) for x in nyuv2.make_data(official, partial=True, augment=False)["train"][0])
    model = nyuv2.make_model(TASKS, width=0.05, dropout=0.1)
    torch.stack(list(nyuv2.losses(model, batch, TASKS).values())).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    alone = nyuv2.make_model(("depth",), width=0.05)
    assert {task: tuple(x.shape) for task, x in alone(batch[0][..., :64, :64]).items()} == {"depth": (1, 1, 64, 64)}
    parameters = [sum(p.numel() for p in nyuv2.make_model(TASKS, a, 0.05).parameters()) for a in ("mtan", "segnet")]
    assert parameters[0] > parameters[1]
    with pytest.raises(ValueError, match="mtan, segnet"):
        nyuv2.make_model(TASKS, architecture="vgg")


def test_the_learning_rate_is_halved_half_way():
    optimizer = torch.optim.Adam([torch.nn.Parameter(torch.zeros(1))], lr=1e-4)
    scheduler = nyuv2.make_scheduler(optimizer, nyuv2.settings)
    rates = []
    for _ in range(200):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates == [1e-4] * 100 + [5e-5] * 100


def test_missing_files_tell_where_to_get_them(tmp_path: Path):
    with pytest.raises(DataError, match=r"lorenmt/mtan"):
        nyuv2.make_data(tmp_path)


def test_the_official_number_of_images_is_checked(official: Path):
    with pytest.raises(DataError, match=r"3 images.*has 795"):
        nyuv2.make_data(official)


def test_a_missing_target_is_named(directory: Path):
    (directory / "train/depth/1.npy").unlink()
    with pytest.raises(DataError, match=r"train/depth/1\.npy is missing"):
        nyuv2.make_data(directory, partial=True)


def objects(path: Path) -> None:
    np.save(path, np.array([Payload(path.parent / "made")], dtype=object), allow_pickle=True)


@pytest.mark.parametrize(
    ("folder", "spoil", "what"),
    [
        ("image", cut, "cannot be read"),
        ("normal", cut, "cannot be read"),
        ("image", objects, "cannot be read"),
        ("depth", lambda path: np.save(path, np.zeros((288, 384))), "288x384; expected 288x384x1"),
        ("label", lambda path: np.save(path, np.full((288, 384), 13)), "label 13; expected 0 to 12 or -1"),
        ("label", lambda path: np.save(path, np.full((288, 384), 1.5)), "label 1.5"),
        ("depth", lambda path: np.save(path, np.full((288, 384, 1), -1.0)), "depth -1"),
        ("normal", lambda path: np.save(path, np.full((288, 384, 3), np.nan)), "not finite"),
    ],
    ids=["cut", "cut normals", "pickle", "shape", "label", "half a label", "depth", "nan"],
)
def test_malformed_files_are_named(directory: Path, folder: str, spoil: Callable[[Path], None], what: str):
    path = directory / "val" / folder / "0.npy"
    spoil(path)
    data = nyuv2.make_data(directory, partial=True)
    with pytest.raises(DataError, match=what) as error:
        data["test"][0]
    assert str(path) in str(error.value)
    assert not (path.parent / "made").exists()
