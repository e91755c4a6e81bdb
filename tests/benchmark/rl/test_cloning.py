"""Behaviour cloning: batches of every task, and a policy that learns one from its expert."""

from __future__ import annotations

import json

import pytest
import torch

from benchmark.command import run
from detente.benchmark.rl.cloning import Cloned, Demonstrations, losses


def test_a_batch_has_a_sample_of_every_task():
    parts = [(torch.full((n, 39), float(t)).cumsum(0), torch.full((n, 4), 10.0 * t)) for t, n in ((1, 5), (2, 7))]
    where = {"episodes": 1, "horizon": 10, "mean": torch.zeros(39), "deviation": torch.ones(39)}
    data = Demonstrations(parts, 100, **where)
    assert len(data) == 100
    observations, actions = data.__getitems__([0, 6, 99])
    assert observations.shape == (3, 2, 39)
    assert actions.shape == (3, 2, 4)
    assert observations[:, 0, 0].tolist() == [1, 2, 5]  # 0, 6 and 99 modulo 5
    assert observations[:, 1, 0].tolist() == [2, 14, 4]
    assert actions[:, :, 0].tolist() == [[10.0, 20.0]] * 3


def test_a_loss_is_that_of_the_tasks_own_samples():
    torch.manual_seed(0)
    names = ("a", "b", "c")
    model = Cloned(names, hidden=8, dropout=0.0)
    batch = torch.randn(6, 3, 39), torch.randn(6, 3, 4)
    found = losses(model, batch, ("c", "a"), names)
    assert list(found) == ["c", "a"]
    for task, k in (("c", 2), ("a", 0)):
        expected = (model.heads[task](model.trunk(batch[0][:, k])) - batch[1][:, k]).square().mean()
        torch.testing.assert_close(found[task], expected)


@pytest.mark.slow
def test_a_short_comparison_learns_two_tasks_by_heart(tmp_path):
    """Drawer-close is learned from four demonstrations within seconds, alone and beside reach."""
    pytest.importorskip("metaworld", reason='needs pip install "detente[metaworld]"')
    problem = tmp_path / "two.py"
    problem.write_text(
        """
from detente.benchmark.problems import mt10_bc
from detente.benchmark.problems.mt10_bc import collate, make_model, metrics, report, selection, summary
from detente.benchmark.rl import cloning
names = ("drawer-close", "reach")
tasks = {task: {"success": "max"} for task in names}
settings = {**mt10_bc.settings, "steps": 200, "demos": 4, "episodes": 3, "hidden": 64, "epochs": 1}
def make_data(demos, noise, steps, batch_size, episodes, horizon):
    return cloning.make_data(names, demos, noise, steps, batch_size, episodes, horizon)
def losses(model, batch, tasks):
    return cloning.losses(model, batch, tasks, names)
"""
    )
    out = tmp_path / "out"
    outcome = run("compare", problem, "--methods", "connection_strength,cagrad,dtp", "--seeds", "1", "--out", out)
    assert outcome.code == 0, outcome.text
    assert "success over all tasks" in outcome.out
    for label in ("gd", "cagrad", "connection_strength", "dtp"):
        result = json.loads((out / f"runs/{label}/seed-0/result.json").read_text())
        assert result["metrics"]["drawer-close"]["success"] == 1.0
        assert result["history"][0]["loss"]["reach"] < 1.0
