"""What the integrations have in common, and what they say where a framework is missing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import detente
from detente.integrations import figures
from integrations.worker import example

SOURCE = str(Path(detente.__file__).parents[1])


@pytest.mark.parametrize("framework", ["lightning", "accelerate", "transformers"])
def test_a_missing_framework_is_named_with_what_installs_it(framework):
    # None in sys.modules is how Python itself marks what cannot be imported
    code = (
        f"import sys; sys.modules['{framework}'] = None\n"
        f"try:\n    import detente.integrations.{framework}\n"
        f"except ImportError as error:\n    assert \"pip install 'detente[{framework}]'\" in str(error), error\n"
        "else:\n    sys.exit('it was imported')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONPATH": SOURCE, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_figures_of_blocks_and_of_one_backward_pass():
    p = torch.ones(2, 3, requires_grad=True)
    q = torch.ones(3, requires_grad=True)
    blocks = detente.backward([p.sum() + q.sum(), (p @ q).sum()], detente.PCGrad(), granularity="layer")
    assert blocks.weights["0"].shape == (2,)
    # nothing conflicts, so that projections leave all as it is
    assert figures(blocks) == {"weights/0": 1.0, "weights/1": 1.0, "conflicts": 0.0}
    single = detente.backward([p.sum(), q.sum() + p.sum()], detente.UW())
    assert set(figures(single)) == {"weights/0", "weights/1"}


def test_actor_critic_learns():
    rewards = example("actor_critic").main(batches=200)
    assert sum(rewards[:10]) / 10 < 0.6 < 0.7 < sum(rewards[-10:]) / 10


def test_equal_weights_are_the_loop_that_sums_the_losses():
    module = example("actor_critic")
    found = module.main(batches=20, method=detente.GD())
    torch.manual_seed(0)
    agent = module.Agent()
    losses_of = module.A2CLoss(agent)
    optimizer = torch.optim.Adam(agent.parameters(), lr=3e-3)
    rewards = []
    for batch in module.collect(agent, 20):
        optimizer.zero_grad()
        sum(losses_of(batch).values()).backward()
        torch.nn.utils.clip_grad_norm_(agent.parameters(), 1.0)
        optimizer.step()
        rewards.append(float(batch["reward"].mean()))
    # equal to the last sample: another policy would soon have drawn other actions
    assert rewards == found
