"""Meta-World's tasks: their names, goals, experts and evaluation, on the real simulation."""

from __future__ import annotations

import builtins
from typing import Any

import numpy as np
import pytest

from detente.benchmark.problem import load_problem
from detente.benchmark.rl import metaworld
from detente.benchmark.rl.metaworld import MT4, MT10, MT50, demonstrate, environments, success

official = pytest.importorskip("metaworld", reason='needs pip install "detente[metaworld]"')


def test_the_names_are_the_official_ones():
    from metaworld.env_dict import ALL_V3_ENVIRONMENTS, MT10_V3

    assert [f"{task}-v3" for task in MT10] == list(MT10_V3)
    assert {f"{task}-v3" for task in MT50} == set(ALL_V3_ENVIRONMENTS)
    assert len(MT50) == 50
    assert set(MT4) < set(MT10)


def expert(task: str) -> metaworld.Policy:
    policy = official.policies.ENV_POLICY_MAP[f"{task}-v3"]()
    return lambda observations: np.stack([np.clip(policy.get_action(o), -1, 1) for o in observations])


# the experts ask for more than -1..1
@pytest.mark.filterwarnings("ignore:Constant")
def test_success_is_measured_on_the_same_goals_every_time():
    seen: list[list[Any]] = []

    def watched(observations: metaworld.Array) -> metaworld.Array:
        seen[-1].append(observations.copy())
        return expert("reach")(observations)

    for split in ("val", "val", "test"):
        seen.append([])
        assert success(watched, "reach", split, 3, 150) == 1.0
    assert np.array_equal(seen[0], seen[1])
    goals = [{tuple(o[0, 36:]) for o in episode} for episode in seen]
    assert [len(g) for g in goals] == [3, 3, 3]
    assert not goals[0] & goals[2]
    assert success(lambda o: np.zeros((1, 4)), "reach", "val", 2, 20) == 0.0


@pytest.mark.filterwarnings("ignore:Constant")
def test_demonstrations_record_the_expert_and_not_the_noise():
    observations, actions = demonstrate("drawer-close", 2, noise=0.3, seed=1)
    again = demonstrate("drawer-close", 2, noise=0.3, seed=1)
    assert np.array_equal(observations, again[0])
    assert np.array_equal(actions, again[1])
    assert not np.array_equal(observations, demonstrate("drawer-close", 2, noise=0.3, seed=2)[0])
    assert observations.shape == (len(actions), 39)
    policy = official.policies.ENV_POLICY_MAP["drawer-close-v3"]()
    for observation, action in zip(observations[:5], actions[:5], strict=True):
        assert np.array_equal(action, np.clip(policy.get_action(observation), -1, 1))


def test_an_expert_that_fails_is_told(monkeypatch):
    monkeypatch.setattr(metaworld, "GOALS", {"train": slice(0, 1)})
    with pytest.raises(RuntimeError, match="of reach succeeded in 0 episodes only; 1 were asked"):
        demonstrate("reach", 1, horizon=3)


def test_training_episodes_have_their_length_and_goals_in_turn():
    envs = environments(["reach", "drawer-close"], horizon=5)
    first = []
    for begin in (0, 1, 2):
        envs.call("begin", "train", begin, 2)
        first.append(envs.reset()[0][0, 36:])
    assert np.array_equal(first[0], first[2])
    assert not np.array_equal(first[0], first[1])
    for step in range(1, 6):
        _, _, ended, truncated, info = envs.step(np.zeros((2, 4), dtype=np.float32))
        assert not ended.any()
        assert truncated.all() == truncated.any() == (step == 5)
    assert "final_info" in info
    envs.close()


def test_without_metaworld_the_install_command_is_told(monkeypatch):
    known = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name.startswith("metaworld"):
            raise ImportError("No module named 'metaworld'", name="metaworld")
        return known(name, *rest)

    metaworld._goals.cache_clear()
    monkeypatch.setattr(builtins, "__import__", without)
    problem = load_problem("mt10-bc")
    assert problem.name == "mt10_bc"
    with pytest.raises(ImportError, match=r'pip install "detente\[metaworld\]"'):
        problem.make_data(problem.settle({}))
