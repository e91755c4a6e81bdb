"""QM9: molecules become complete graphs with standardised targets; errors come back in units; other files are named."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from benchmark.layouts.qm9 import molecule, write
from detente.benchmark.datasets.source import DataError
from detente.benchmark.problems import qm9

TASKS = tuple(qm9.tasks)
PROPERTIES = [0, 1, 2, 3, 5, 6, 12, 13, 14, 15, 11]
FILE = "raw/qm9_v3.pt"


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("qm9")
    write(path, train=60, test=10)
    return path


@pytest.fixture(scope="module")
def raw(directory: Path) -> Any:
    return torch.load(directory / FILE, weights_only=True)


@pytest.fixture(scope="module")
def data(directory: Path) -> Any:
    return qm9.make_data(directory, partial=True)


@pytest.fixture(scope="module")
def batch(data: Any) -> Any:
    return next(iter(DataLoader(data["train"], batch_size=6, collate_fn=qm9.collate)))


def _places(data: Any, raw: Any) -> dict[str, list[int]]:
    """Places in the file of the molecules of each split, found by their atoms."""
    known = {m["x"].numpy().tobytes(): k for k, m in enumerate(raw)}
    return {split: [known[x.numpy().tobytes()] for _, x, *_ in part] for split, part in data.items()}


def test_every_molecule_is_in_one_split(data: Any, raw: Any) -> None:
    places = _places(data, raw)
    assert list(places) == ["train", "val", "test"]
    assert sorted(k for part in places.values() for k in part) == list(range(80))
    assert all(places.values())


def test_targets_are_standardised_by_the_training_split(data: Any, raw: Any) -> None:
    y = torch.cat([m["y"] for m in raw])[:, PROPERTIES]
    places = _places(data, raw)
    train = y[places["train"]]
    for split, part in data.items():
        targets = torch.stack([sample[0] for sample in part])
        torch.testing.assert_close(targets, (y[places[split]] - train.mean(0)) / train.std(0))
    found = torch.stack([sample[0] for sample in data["train"]])
    torch.testing.assert_close(found.mean(0), torch.zeros(11), atol=1e-6, rtol=0)
    torch.testing.assert_close(found.std(0), torch.ones(11))


def test_graphs_are_complete_with_bonds_and_distances(data: Any, raw: Any) -> None:
    places = _places(data, raw)["train"]
    for k, (targets, x, edges, features) in zip(places, data["train"], strict=True):
        given = raw[k]
        atoms = len(given["x"])
        assert targets.shape == (11,)
        assert torch.equal(x, given["x"])
        assert sorted(map(tuple, edges.T.tolist())) == [(i, j) for i in range(atoms) for j in range(atoms) if i != j]
        bonds = {
            tuple(e): kind for e, kind in zip(given["edge_index"].T.tolist(), given["edge_attr"].tolist(), strict=True)
        }
        for (i, j), row in zip(edges.T.tolist(), features.tolist(), strict=True):
            assert row[:4] == bonds.get((i, j), [0, 0, 0, 0])
            assert row[4] == pytest.approx(float(torch.dist(given["pos"][i], given["pos"][j])), rel=1e-5)


def test_a_batch_is_its_molecules_side_by_side(data: Any, batch: Any) -> None:
    targets, atoms, edges, features, owner = batch
    assert len(targets) == 6
    assert (owner[edges[0]] == owner[edges[1]]).all()
    for k, (target, x, own_edges, own_features) in zip(range(6), data["train"], strict=False):
        mine = owner == k
        start = int(mine.nonzero()[0])
        assert torch.equal(targets[k], target)
        assert torch.equal(atoms[mine], x)
        inside = owner[edges[0]] == k
        assert torch.equal(edges[:, inside] - start, own_edges)
        assert torch.equal(features[inside], own_features)


@pytest.mark.parametrize("tasks", [TASKS, *[(task,) for task in TASKS]])
def test_losses_train_the_network(batch: Any, tasks: tuple[str, ...]) -> None:
    torch.manual_seed(0)
    model = qm9.make_model(tasks, dropout=0.1, width=0.25)
    losses = qm9.losses(model, batch, tasks)
    assert tuple(losses) == tasks
    assert all(0 < float(loss.detach()) < 20 for loss in losses.values())
    torch.stack(list(losses.values())).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_a_molecule_is_predicted_alone_as_in_a_batch(data: Any, batch: Any) -> None:
    torch.manual_seed(0)
    model = qm9.make_model(("mu",), width=0.25).eval()
    with torch.no_grad():
        together = model(*batch[1:])["mu"]
        alone = [model(*qm9.collate([data["train"][k]])[1:])["mu"] for k in range(6)]
    torch.testing.assert_close(together, torch.cat(alone))


def test_errors_are_in_units_of_the_tables(data: Any, raw: Any) -> None:
    class Mean(nn.Module):
        """The mean of the training targets, which is 0 once they are standardised."""

        def forward(self, *graph: torch.Tensor) -> dict[str, torch.Tensor]:
            return {task: torch.zeros(int(graph[-1].max()) + 1) for task in TASKS}

    y = torch.cat([m["y"] for m in raw])[:, PROPERTIES]
    places = _places(data, raw)
    errors = (y[places["test"]] - y[places["train"]].mean(0)).abs().mean(0)
    figures = qm9.metrics(Mean(), data["test"], TASKS)
    for task, error in zip(TASKS, errors.tolist(), strict=True):
        milli = 1 if task in ("mu", "alpha", "r2", "Cv") else 1000  # energies in meV
        assert figures[task] == {"error": pytest.approx(milli * error, rel=1e-4)}


def test_the_rate_falls_where_the_score_stays_and_is_kept_where_it_rises() -> None:
    def rates(scores: list[float]) -> list[float]:
        optimizer = torch.optim.Adam([torch.zeros(1, requires_grad=True)], lr=1e-3)
        schedule = qm9.make_scheduler(optimizer, qm9.settings)
        for score in scores:
            schedule.step(score)
        return [group["lr"] for group in optimizer.param_groups]

    rising = [-3 + 0.1 * k for k in range(20)]  # minus the mean logarithm of the errors
    assert rates(rising) == [1e-3]
    assert rates([-3.0] * 6) == [1e-3]
    assert rates([-3.0] * 7) == pytest.approx([7e-4])
    assert rates([-3.0] * 500) == pytest.approx([1e-5])


def test_missing_files_say_where_they_come_from(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data\.pyg\.org"):
        qm9.make_data(tmp_path)


def test_official_counts_are_asked_for(directory: Path) -> None:
    with pytest.raises(DataError, match=r"80 molecules .* 130831"):
        qm9.make_data(directory)


class _Payload:
    """Unpickled, it creates a folder."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.target),)


def test_a_crafted_file_is_refused_and_not_run(tmp_path: Path) -> None:
    trap = tmp_path / "trap"
    (tmp_path / "raw").mkdir()
    torch.save([_Payload(trap)], tmp_path / FILE)
    with pytest.raises(DataError, match=r"qm9_v3\.pt cannot be read"):
        qm9.make_data(tmp_path, partial=True)
    assert not trap.exists()


def _without(key: str) -> Callable[[Any], Any]:
    return lambda good: {k: v for k, v in good.items() if k != key}


def _with(key: str, value: Any) -> Callable[[Any], Any]:
    return lambda good: good | {key: value}


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (lambda good: torch.zeros(3), "molecule 1 is a Tensor; expected a dict"),
        (_without("pos"), "no tensor 'pos'"),
        (_with("x", torch.zeros(4, 11, dtype=torch.int64)), "no tensor 'x' of numbers"),
        (_with("edge_index", torch.zeros(2, 6)), "no tensor 'edge_index' of numbers"),
        (_with("x", torch.zeros(4, 10)), r"'x' has the shape \[4, 10\]; expected \['\?', 11\]"),
        (_with("y", torch.zeros(19)), r"'y' has the shape \[19\]"),
        (_with("y", torch.full((1, 19), torch.nan)), "'y' has values that are not finite"),
        (_with("pos", torch.zeros(3, 3)), "atoms and places"),
        (_with("edge_attr", torch.zeros(5, 4)), "bonds and their kinds"),
        (_with("edge_index", torch.full((2, 6), 4)), "bond with atom 4; it has 4 atoms"),
    ],
)
def test_a_molecule_that_is_not_official_is_named(tmp_path: Path, damage: Callable[[Any], Any], complaint: str) -> None:
    generator = torch.Generator().manual_seed(0)
    good = [molecule(generator, k) for k in range(8)]
    (tmp_path / "raw").mkdir()
    torch.save([good[0], damage(good[1]), *good[2:]], tmp_path / FILE)
    with pytest.raises(DataError, match=complaint) as caught:
        qm9.make_data(tmp_path, partial=True)
    assert "qm9_v3.pt: molecule 1" in str(caught.value)


def test_a_file_that_is_cut_off_or_of_another_kind_is_named(tmp_path: Path) -> None:
    write(tmp_path)
    path = tmp_path / FILE
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"qm9_v3\.pt cannot be read"):
        qm9.make_data(tmp_path, partial=True)
    torch.save({"x": torch.zeros(3)}, path)
    with pytest.raises(DataError, match="holds a dict; expected a list"):
        qm9.make_data(tmp_path, partial=True)
    torch.save([], path)
    with pytest.raises(DataError, match="no molecules"):
        qm9.make_data(tmp_path, partial=True)
