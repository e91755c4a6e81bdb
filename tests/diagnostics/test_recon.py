"""Recon's scores: conflicts counted layer by layer exactly as a plain loop over autograd counts them."""

from __future__ import annotations

import io
import math
from itertools import combinations

import pytest
import torch
from torch import Tensor, nn

import detente
from detente.diagnostics import ConflictScores
from detente.nn import TaskLayer, active_task, convert_task_layers, convert_task_norm

TASKS = ("left", "right", "up")


class Model(nn.Module):
    """A shared trunk of three layers and a head per task."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.trunk = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 8), nn.LayerNorm(8), nn.Tanh())
        self.heads = nn.ModuleDict({task: nn.Linear(8, 1) for task in TASKS})

    def losses(self, seed: int, tasks: tuple[str, ...] = TASKS) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        features = self.trunk(torch.randn(6, 3, generator=generator))
        targets = torch.randn(3, 6, 1, generator=generator)
        return {task: (self.heads[task](features) - targets[TASKS.index(task)]).square().mean() for task in tasks}


LAYERS = ("trunk.0", "trunk.2", "trunk.3")


def counted(model: Model, steps: list[tuple[str, ...]], threshold: float) -> dict[str, int]:
    counts = dict.fromkeys(LAYERS, 0)
    for seed, tasks in enumerate(steps):
        losses = model.losses(seed, tasks)
        for layer in LAYERS:
            parameters = list(model.get_submodule(layer).parameters())
            flat = [
                torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters, retain_graph=True)]).double()
                for loss in losses.values()
            ]
            for a, b in combinations(flat, 2):
                counts[layer] += bool(a @ b < threshold * a.norm() * b.norm())
    return counts


@pytest.mark.parametrize("threshold", [0.0, -0.2, 0.3])
def test_scores_are_those_of_a_plain_loop(threshold: float) -> None:
    model = Model()
    scores = ConflictScores(model, threshold)
    steps = [TASKS] * 8 + [("up", "left"), ("right",)]
    for seed, tasks in enumerate(steps):
        scores.observe(model.losses(seed, tasks))
    expected = counted(model, steps, threshold)
    assert scores.scores() == expected
    assert scores.steps == 10
    assert len(set(expected.values())) > 1  # or the order would not be tested
    assert scores.top(3) == sorted(LAYERS, key=lambda layer: -expected[layer])
    assert scores.top(1) == scores.top(3)[:1]
    assert scores.top(0) == []


def test_nothing_is_written_and_the_graph_stays() -> None:
    model = Model()
    losses = model.losses(0)
    ConflictScores(model).observe(losses)
    assert all(p.grad is None for p in model.parameters())
    update = detente.backward(losses, detente.CAGrad())
    assert update.gramian.shape == (3, 3)


def test_ties_follow_the_model_and_heads_are_not_scored() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 1))
    head = nn.Linear(1, 1)
    scores = ConflictScores(nn.ModuleList([model, head]))
    out = model(torch.ones(3, 2)).mean()
    scores.observe([out, -head(out.reshape(1, 1)).sum() / head.weight.item()])
    assert scores.scores() == {"0.0": 1, "0.1": 1, "0.2": 1}
    assert scores.top(2) == ["0.0", "0.1"]


def test_zero_and_non_finite_gradients_are_no_conflicts() -> None:
    model = nn.Linear(2, 1)
    scores = ConflictScores(model, 0.5)
    out = model(torch.ones(1, 2)).sum()
    scores.observe([out, 0 * out, out * math.inf, out * math.nan])
    assert scores.scores() == {"": 0}
    scores.observe([out, -out])
    assert scores.scores() == {"": 1}


def test_what_counts_as_a_layer() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.token = nn.Parameter(torch.ones(4))
            self.attention = nn.MultiheadAttention(4, 2)
            self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
            self.plain = nn.Linear(4, 4)
            self.again = self.plain

    model = nn.Sequential(Block(), nn.ReLU(), nn.BatchNorm1d(4))
    assert ConflictScores(model).layers == ("0.attention", "0.normed", "0.plain", "2")
    assert ConflictScores(model, layers=["0", "2"]).layers == ("0", "2")
    converted = convert_task_norm(model, TASKS)
    assert ConflictScores(converted).layers == ("0.attention", "0.normed", "0.plain")


def test_from_scores_to_a_task_specific_model() -> None:
    model = Model()
    scores = ConflictScores(model)
    for seed in range(4):
        scores.observe(model.losses(seed))
    chosen = scores.top(2)
    fresh = convert_task_layers(Model(), TASKS, chosen)
    assert {name for name, m in fresh.named_modules() if isinstance(m, TaskLayer)} == set(chosen)
    again = ConflictScores(fresh)
    losses = {}
    for task in TASKS:
        with active_task(task):
            losses |= fresh.losses(0, (task,))
    again.observe(losses)
    assert set(again.scores()) == set(LAYERS) - set(chosen)
    update = detente.backward(losses, detente.CAGrad())
    assert set(update.weights) == set(TASKS)
    untouched = Model()
    before = list(untouched.modules())
    convert_task_layers(untouched, TASKS, scores.top(0))
    assert all(new is old for new, old in zip(untouched.modules(), before, strict=True))


def test_state_dict_round_trip() -> None:
    model = Model()
    scores = ConflictScores(model, -0.1)
    for seed in range(5):
        scores.observe(model.losses(seed))
    stream = io.BytesIO()
    torch.save(scores.state_dict(), stream)
    stream.seek(0)
    loaded = ConflictScores(Model(), -0.1)
    loaded.load_state_dict(torch.load(stream, weights_only=True))
    for each in (scores, loaded):
        assert each.steps == 5
    assert loaded.scores() == scores.scores()
    scores.observe(model.losses(9))
    assert loaded.steps == 5
    with pytest.raises(ValueError, match=r"for threshold -0.1; this one is 0.0"):
        ConflictScores(model).load_state_dict(scores.state_dict())
    with pytest.raises(ValueError, match="another model"):
        ConflictScores(nn.Linear(2, 2), -0.1).load_state_dict(scores.state_dict())


def test_errors() -> None:
    model = Model()
    scores = ConflictScores(model)
    with pytest.raises(ValueError, match=r"from 0 to 0.*Call observe"):
        scores.top(1)
    scores.observe(model.losses(0))
    with pytest.raises(ValueError, match="from 0 to 3"):
        scores.top(4)
    with pytest.raises(ValueError, match="Was it copied"):
        scores.observe(Model().losses(0))
    assert scores.steps == 1
    with pytest.raises(TypeError, match="not their sum"):
        scores.observe(sum(model.losses(0).values()))
    with pytest.raises(ValueError, match="from -1 to 1; got 2"):
        ConflictScores(model, 2)
    with pytest.raises(ValueError, match="no layer with parameters"):
        ConflictScores(nn.ReLU())
    with pytest.raises(ValueError, match="lies inside"):
        ConflictScores(model, layers=["trunk", "trunk.0"])
