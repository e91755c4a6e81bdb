"""MultiDigits: images are what they claim to be, splits are clean, and a small network learns from them."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from detente.benchmark.problems import digits
from detente.nn import active_task, convert_task_norm

datasets = pytest.importorskip("sklearn.datasets")

BOTH = ("left", "right")


@pytest.fixture(scope="module")
def data() -> Any:
    return digits.make_data()


def taken_apart(images: torch.Tensor) -> list[list[tuple[int, int]]]:
    """For each image all pairs (left, right) of scikit-learn's digits that it overlays, found by search."""
    sources = torch.tensor(datasets.load_digits().images)
    found = []
    for image in images[:, 0].double() * 16:
        left_fits = (sources <= image[:8, :8]).all((1, 2)) & (sources[:, :2] == image[:2, :8]).all((1, 2))
        right_fits = (sources <= image[2:, 2:]).all((1, 2)) & (sources[:, 6:] == image[8:, 2:]).all((1, 2))
        pairs = []
        for left in left_fits.nonzero().flatten().tolist():
            for right in right_fits.nonzero().flatten().tolist():
                canvas = torch.zeros(10, 10, dtype=torch.float64)
                canvas[:8, :8] = sources[left]
                canvas[2:, 2:] = canvas[2:, 2:].maximum(sources[right])
                if torch.equal(canvas, image):
                    pairs.append((left, right))
        found.append(pairs)
    return found


def train_steps(model: nn.Module, data: Any, forwards: list[tuple[str, ...]], steps: int) -> None:
    """Equal weights; every step makes one forward pass for each group of tasks in ``forwards``."""
    optimizer = torch.optim.Adam(model.parameters(), lr=digits.settings["lr"])
    batches = iter(DataLoader(data["train"], batch_size=int(digits.settings["batch_size"])))
    for _ in range(steps):
        optimizer.zero_grad()
        batch = next(batches)
        for tasks in forwards:
            with active_task(tasks[0]):
                torch.stack(list(digits.losses(model, batch, tasks).values())).sum().backward()
        optimizer.step()


def accuracy(model: nn.Module, data: Any, tasks: tuple[str, ...]) -> dict[str, float]:
    with torch.no_grad():
        result = digits.metrics(model.eval(), data, tasks)
    assert set(result) == set(tasks)
    return {task: values["accuracy"] for task, values in result.items()}


def test_images_overlay_two_real_digits_with_their_labels_and_no_digit_is_in_two_splits(data: Any) -> None:
    target = datasets.load_digits().target
    used: dict[str, set[int]] = {}
    for split, dataset in data.items():
        images, left, right = dataset[:600]
        found = taken_apart(images)
        assert [len(pairs) for pairs in found] == [1] * 600  # no image can be read in two ways
        for [(a, b)], *label in zip(found, left.tolist(), right.tolist(), strict=True):
            assert label == [target[a], target[b]]
        used[split] = {source for [pair] in found for source in pair}
    assert not used["train"] & used["val"]
    assert not used["train"] & used["test"]
    assert not used["val"] & used["test"]
    # 1200 draws from n digits show n (1 - exp(-1200 / n)) of them: about 720 of 1078, 267 of 270, 418 of 449
    assert len(used["train"]) > 650
    assert len(used["val"]) > 250
    assert len(used["test"]) > 380


def test_data_have_the_documented_form(data: Any) -> None:
    assert list(data) == ["train", "val", "test"]
    for dataset in data.values():
        images, left, right = dataset[:]
        assert images.shape == (len(dataset), 1, 10, 10)
        assert images.dtype == torch.float32
        assert images.min() == 0
        assert images.max() == 1
        for labels in (left, right):
            assert labels.dtype == torch.int64
            assert sorted(labels.unique().tolist()) == list(range(10))
        # the labels are drawn apart: they agree by chance 1 in 10; .03 is four standard errors of 2000 pairs
        assert (left == right).float().mean() == pytest.approx(0.1, abs=0.03)


def test_data_are_the_same_whatever_the_global_seed(data: Any) -> None:
    torch.manual_seed(123)
    state = torch.get_rng_state()
    again = digits.make_data()
    assert torch.equal(torch.get_rng_state(), state)
    for split, dataset in data.items():
        assert all(torch.equal(a, b) for a, b in zip(again[split].tensors, dataset.tensors, strict=True))


def test_equal_seeds_give_equal_models() -> None:
    models = []
    for _ in range(2):
        torch.manual_seed(5)
        models.append(digits.make_model(BOTH))
    assert all(torch.equal(a, b) for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True))


def test_a_single_task_model_has_only_that_task(data: Any) -> None:
    model = digits.make_model(("right",))
    batch = data["train"][:16]
    assert list(digits.losses(model, batch, ("right",))) == ["right"]
    both = digits.make_model(BOTH)
    assert list(digits.losses(both, batch, BOTH)) == list(BOTH)
    assert sum(p.numel() for p in both.parameters()) - sum(p.numel() for p in model.parameters()) == 48 * 10 + 10


@pytest.mark.parametrize("tasks", [BOTH, ("left",), ("right",)])
def test_a_few_steps_are_far_above_chance(data: Any, tasks: tuple[str, ...]) -> None:
    torch.manual_seed(0)
    model = digits.make_model(tasks)
    train_steps(model, data, [tasks], steps=60)
    # chance is .1; over four seeds 60 steps gave .68 to .75 for two tasks and .73 to .84 for one
    assert min(accuracy(model, data["val"], tasks).values()) > 0.5


def test_accuracy_counts_right_answers(data: Any) -> None:
    class Constant(nn.Module):
        def forward(self, images: torch.Tensor, tasks: tuple[str, ...]) -> dict[str, torch.Tensor]:
            return {task: nn.functional.one_hot(torch.full((len(images),), 3), 10).float() for task in tasks}

    images, left, right = data["val"][:1234]  # not a multiple of any batch
    result = accuracy(Constant(), TensorDataset(images, left, right), BOTH)
    assert result == {"left": int((left == 3).sum()) / 1234, "right": int((right == 3).sum()) / 1234}


def test_the_trunk_learns_with_task_norms(data: Any) -> None:
    torch.manual_seed(0)
    model = convert_task_norm(digits.make_model(BOTH), BOTH)
    train_steps(model, data, [("left",), ("right",)], steps=60)
    for task in BOTH:
        with active_task(task):
            # chance is .1; over four seeds 60 steps gave .68 to .80
            assert accuracy(model, data["val"], (task,))[task] > 0.5


def test_missing_scikit_learn_names_the_install_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match=r'pip install "detente\[compare\]"'):
        digits.make_data()
