"""The replay buffer: what is drawn was put in, task by task, and draws go on after a restart."""

from __future__ import annotations

import io

import numpy as np
import torch

from detente.benchmark.rl.replay import Replay


def filled(capacity: int, steps: int) -> Replay:
    buffer = Replay(2, capacity, seed=0)
    for step in range(steps):
        mark = np.array([step, 1000 + step], dtype=np.float64)
        wide, short = np.repeat(mark[:, None], 39, 1), np.repeat(mark[:, None], 4, 1)
        buffer.add(wide, short, mark, wide + 1)
    return buffer


def test_every_task_has_its_part_of_a_batch():
    seen, done, rewards, following = filled(10, 7).sample(64)
    assert [part.shape for part in (seen, done, rewards, following)] == [(128, 39), (128, 4), (128,), (128, 39)]
    assert torch.equal(seen[:, 0], rewards)
    assert torch.equal(done[:, 3], rewards)
    assert torch.equal(following[:, 38], rewards + 1)
    assert set(rewards[:64].tolist()) == set(range(7))
    assert set(rewards[64:].tolist()) == set(range(1000, 1007))


def test_the_oldest_are_overwritten():
    buffer = filled(5, 12)
    assert len(buffer) == 5
    assert set(buffer.sample(200)[2][:200].tolist()) == {7, 8, 9, 10, 11}


def test_saved_and_loaded_it_goes_on():
    for steps in (3, 12):
        buffer = filled(5, steps)
        buffer.sample(4)
        file = io.BytesIO()
        torch.save(buffer.state_dict(), file)
        file.seek(0)
        other = Replay(2, 5, seed=9)
        other.load_state_dict(torch.load(file, weights_only=True))
        for one in (buffer, other):
            one.add(np.ones((2, 39)), np.ones((2, 4)), np.ones(2), np.ones((2, 39)))
        for mine, theirs in zip(buffer.sample(50), other.sample(50), strict=True):
            assert torch.equal(mine, theirs)
