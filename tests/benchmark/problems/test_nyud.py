"""NYUD-v2: what is read is what is in the files, and files that are not the official ones are named."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from benchmark.dense_model import Payload, check_metrics, check_training, cut
from benchmark.layouts import nyud as layout
from detente.benchmark.datasets.source import DataError
from detente.benchmark.models.hrnet import HRNet
from detente.benchmark.problems import nyud

TASKS = tuple(nyud.tasks)
SIZE = (53, 70)
INSIDE = (..., slice(197, 197 + 53), slice(253, 253 + 70))  # the picture in the middle of 448 x 576


@pytest.fixture(scope="module")
def official(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("data") / "nyud"
    layout.write(directory, train=3, test=2, size=SIZE)
    return directory


@pytest.fixture
def directory(official: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(official, tmp_path / "nyud"))


def read(path: Path) -> np.ndarray:
    return np.array(Image.open(path))


def test_samples_are_the_files_padded(official: Path):
    data = nyud.make_data(official, partial=True)
    assert {split: len(part) for split, part in data.items()} == {"train": 2, "val": 1, "test": 2}
    image, labels, depth, normals, edges = data["test"][0]
    assert [tuple(x.shape) for x in (image, depth, normals)] == [(n, 448, 576) for n in (3, 1, 3)]
    assert labels.dtype == edges.dtype == torch.int64
    assert labels.shape == edges.shape == (448, 576)
    name = data["test"].names[0]
    assert np.array_equal(labels[INSIDE], read(official / f"segmentation/{name}.png").astype(int) - 1)
    assert np.array_equal(edges[INSIDE], read(official / f"edge/{name}.png") // 255)
    assert np.array_equal(depth[0][INSIDE], np.load(official / f"depth/{name}.npy"))
    colours = image[INSIDE].permute(1, 2, 0).numpy() * [0.229, 0.224, 0.225] + [0.485, 0.456, 0.406]
    assert np.allclose(colours, read(official / f"images/{name}.png") / 255, atol=1e-6)
    directions = read(official / f"normals/{name}.png") / 127.5 - 1.0
    found = normals[INSIDE].permute(1, 2, 0).numpy()
    assert not found[:10].any()
    assert np.allclose(found[10:], directions[10:], atol=0.02)  # rounded to bytes, then of unit length
    assert np.allclose(np.linalg.norm(found[10:], axis=-1), 1)
    outside = torch.ones(448, 576, dtype=torch.bool)
    outside[INSIDE] = False
    assert labels[outside].unique().tolist() == edges[outside].unique().tolist() == [-1]
    assert not depth[0, outside].any()
    assert not normals[:, outside].any()


def test_validation_is_cut_from_training_by_name(official: Path):
    data = nyud.make_data(official, partial=True)
    parts = [data["train"].data.names, data["val"].names, data["test"].names]
    assert sorted(name for part in parts for name in part) == ["0001", "0002", "0003", "0004", "0005"]
    assert parts[2] == ["0004", "0005"]


def test_losses_and_figures(official: Path):
    data = nyud.make_data(official, partial=True)
    batch = tuple(x.unsqueeze(0) for x in data["val"][0])
    check_training(nyud, batch)
    check_metrics(nyud, data["test"])
    pixels, labelled = float(53 * 70), float(43 * 70)
    expected = {"segmentation": labelled, "depth": labelled, "normals": labelled, "edges": pixels}
    assert nyud.counts(batch, TASKS) == expected


def test_augmented_samples_train(official: Path):
    data = nyud.make_data(official, partial=True)
    torch.manual_seed(0)
    samples = [data["train"][k % 2] for k in range(4)]
    assert len({float(sample[2].max()) for sample in samples}) > 2  # depth is divided by the scale
    for sample in samples:
        assert [tuple(x.shape) for x in sample] == [tuple(x.shape) for x in data["val"][0]]


def test_the_network(official: Path):
    data = nyud.make_data(official, partial=True)
    batch = tuple(x.unsqueeze(0)[..., 192:256, 240:336] for x in data["val"][0])
    for architecture in ("hrnet18", "resnet18", "resnet50"):
        model = nyud.make_model(TASKS, architecture, width=0.1, dropout=0.1)
        losses = nyud.losses(model, batch, TASKS)
        assert list(losses) == list(TASKS)
        torch.stack(list(losses.values())).sum().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    with pytest.raises(ValueError, match="hrnet18, resnet18, resnet50"):
        nyud.make_model(TASKS, "vgg")


def test_the_published_trunk_is_the_small_hrnet():
    assert nyud.make_model(("depth",)).trunk.state_dict().keys() == HRNet(small=True).state_dict().keys()


def test_weights_of_a_trunk_are_loaded_from_a_file(tmp_path: Path):
    trunk = nyud.make_model(("depth",), "resnet18", width=0.1).trunk
    file = tmp_path / "weights.pth"
    torch.save({**trunk.state_dict(), "fc.weight": torch.zeros(2)}, file)
    loaded = nyud.make_model(("depth",), "resnet18", width=0.1, pretrained=str(file)).trunk
    assert all(torch.equal(a, b) for a, b in zip(trunk.parameters(), loaded.parameters(), strict=True))
    with pytest.raises(DataError, match=r"weights\.pth has no"):
        nyud.make_model(("depth",), "hrnet18", width=0.1, pretrained=str(file))
    torch.save({"conv1.weight": Payload(tmp_path / "made")}, file)
    with pytest.raises(DataError, match=r"weights\.pth cannot be read"):
        nyud.make_model(("depth",), "resnet18", width=0.1, pretrained=str(file))
    assert not (tmp_path / "made").exists()


def test_the_learning_rate_falls_to_zero():
    optimizer = torch.optim.Adam([torch.nn.Parameter(torch.zeros(1))], lr=1e-4)
    scheduler = nyud.make_scheduler(optimizer, nyud.settings)
    for epoch in range(100):
        assert optimizer.param_groups[0]["lr"] == pytest.approx(1e-4 * (1 - epoch / 100) ** 0.9)
        optimizer.step()
        scheduler.step()


def test_missing_files_are_named(directory: Path, tmp_path: Path):
    with pytest.raises(DataError, match=r"NYUDv2\.tar\.gz"):
        nyud.make_data(tmp_path)
    with pytest.raises(DataError, match=r"3 samples of .*train\.txt.*has 795"):
        nyud.make_data(directory)
    (directory / "edge/0005.png").unlink()
    with pytest.raises(DataError, match=r"edge/0005\.png is missing"):
        nyud.make_data(directory, partial=True)
    (directory / "images/0005.png").unlink()
    assert nyud.make_data(directory, partial=True)["test"].names == ["0004"]


def picture(value: int, *shape: int) -> Callable[[Path], None]:
    return lambda path: Image.fromarray(np.full(shape, value, np.uint8)).save(path)


def objects(path: Path) -> None:
    np.save(path, np.array([Payload(path.parent / "made")], dtype=object), allow_pickle=True)


@pytest.mark.parametrize(
    ("file", "spoil", "what"),
    [
        ("images/0004.png", cut, "cannot be read"),
        ("normals/0004.png", cut, "cannot be read"),
        ("images/0004.png", picture(0, 480, 640, 3), "480x640 pixels; expected at most 448x576"),
        ("segmentation/0004.png", picture(41, *SIZE), "label 41; expected 0 to 40"),
        ("segmentation/0004.png", picture(1, *SIZE, 3), "mode RGB"),
        ("edge/0004.png", picture(0, 53, 71), "53x71 pixels; expected 53x70"),
        ("normals/0004.png", picture(0, 54, 70, 3), "54x70 pixels; expected 53x70"),
        ("depth/0004.npy", objects, "cannot be read"),
        ("depth/0004.npy", cut, "cannot be read"),
        ("depth/0004.npy", lambda path: np.save(path, np.full(SIZE, -1.0)), "depth -1"),
    ],
    ids=[
        "cut",
        "cut normals",
        "large",
        "label",
        "colours",
        "edges' size",
        "normals' size",
        "pickle",
        "cut npy",
        "depth",
    ],
)
def test_malformed_files_are_named(directory: Path, file: str, spoil: Callable[[Path], None], what: str):
    spoil(directory / file)
    data = nyud.make_data(directory, partial=True)
    with pytest.raises(DataError, match=what) as error:
        data["test"][0]
    assert file in str(error.value)
    assert not (directory / "depth/made").exists()
