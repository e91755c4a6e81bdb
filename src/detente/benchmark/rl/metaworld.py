"""Meta-World (Yu et al. 2019; 3.1, MuJoCo): its tasks with their goals split, evaluation, scripted demonstrations.

Every task has 50 goals, drawn once with a fixed seed: 30 to train on, ten to validate and ten to test, so that a figure
speaks of goals that were not trained on. The official benchmark has no such split.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from gymnasium.vector import SyncVectorEnv

__all__ = [
    "ACTIONS",
    "HORIZON",
    "MT4",
    "MT10",
    "MT50",
    "OBSERVATIONS",
    "Policy",
    "demonstrate",
    "environments",
    "film",
    "success",
]

OBSERVATIONS = 39
ACTIONS = 4
HORIZON = 500  # steps of an official episode
GOALS = {"train": slice(0, 30), "val": slice(30, 40), "test": slice(40, 50)}

MT10 = (
    "reach", "push", "pick-place", "door-open", "drawer-open", "drawer-close", "button-press-topdown",
    "peg-insert-side", "window-open", "window-close",
)  # fmt: skip
MT4 = ("drawer-close", "reach", "window-open", "button-press-topdown")
MT50 = (
    "assembly", "basketball", "bin-picking", "box-close", "button-press-topdown", "button-press-topdown-wall",
    "button-press", "button-press-wall", "coffee-button", "coffee-pull", "coffee-push", "dial-turn", "disassemble",
    "door-close", "door-lock", "door-open", "door-unlock", "hand-insert", "drawer-close", "drawer-open", "faucet-open",
    "faucet-close", "hammer", "handle-press-side", "handle-press", "handle-pull-side", "handle-pull", "lever-pull",
    "pick-place-wall", "pick-out-of-hole", "reach", "push-back", "push", "pick-place", "plate-slide",
    "plate-slide-side", "plate-slide-back", "plate-slide-back-side", "peg-insert-side", "peg-unplug-side", "soccer",
    "stick-push", "stick-pull", "push-wall", "reach-wall", "shelf-place", "sweep-into", "sweep", "window-open",
    "window-close",
)  # fmt: skip

Array = NDArray[np.float64]
Policy = Callable[[Array], Array]
"""Actions [N, 4] in -1..1 for observations [N, 39]."""


def _metaworld() -> Any:
    try:
        import metaworld
        import metaworld.evaluation
        import metaworld.policies
        import metaworld.wrappers
    except ImportError as error:
        raise ImportError(
            f'Meta-World problems need metaworld and MuJoCo ({error}): pip install "detente[metaworld]"'
        ) from error
    return metaworld


@lru_cache(maxsize=64)
def _goals(task: str) -> Sequence[Any]:
    goals: Sequence[Any] = _metaworld().MT1(f"{task}-v3", seed=0).train_tasks
    return goals


def _environment(task: str, horizon: int, **rendering: Any) -> Any:
    """One environment, whose every reset sets the next goal."""
    import gymnasium

    class Goals(gymnasium.Wrapper):  # type: ignore[misc, type-arg, unused-ignore]
        """Sets the goals of a split, or its first ``count``, in turn."""

        def begin(self, split: str, position: int = 0, count: int | None = None) -> None:
            self.goals, self.position = _goals(task)[GOALS[split]][:count], position

        def reset(self, **options: Any) -> Any:
            goal = self.goals[self.position % len(self.goals)]
            self.unwrapped.set_task(goal)  # type: ignore[attr-defined, unused-ignore]
            self.position += 1
            return self.env.reset(**options)

    metaworld = _metaworld()
    env = metaworld.ALL_V3_ENVIRONMENTS[f"{task}-v3"](**rendering)
    env = metaworld.wrappers.AutoTerminateOnSuccessWrapper(gymnasium.wrappers.TimeLimit(env, horizon))
    env.toggle_terminate_on_success(False)
    return gymnasium.wrappers.RecordEpisodeStatistics(Goals(env))


def environments(tasks: Sequence[str], horizon: int) -> SyncVectorEnv:
    """One environment per task: an episode ends after ``horizon`` steps, successful or not.

    Every reset sets the next goal of a split; ``call("begin", split, k, count)`` says that it is the k-th of the first
    ``count``.
    """
    from gymnasium.vector import AutoresetMode, SyncVectorEnv

    makers = [partial(_environment, task, horizon) for task in tasks]
    return SyncVectorEnv(makers, autoreset_mode=AutoresetMode.SAME_STEP)


@lru_cache(maxsize=64)
def _evaluated(task: str, horizon: int) -> SyncVectorEnv:
    return environments([task], horizon)


class _Agent:
    """What Meta-World's evaluation asks."""

    def __init__(self, policy: Policy) -> None:
        self.eval_action = policy

    def reset(self, env_mask: NDArray[np.bool_]) -> None:
        """Nothing is remembered from one episode to the next."""


def success(policy: Policy, task: str, split: str, episodes: int, horizon: int = HORIZON) -> float:
    """Share of successful episodes, by Meta-World's own evaluation; always of the same goals in the same order."""
    envs = _evaluated(task, horizon)
    envs.call("begin", split)
    rate, *_ = _metaworld().evaluation.evaluation(_Agent(policy), envs, num_episodes=episodes)
    return float(rate)


def film(policy: Policy, task: str, frames: int, horizon: int = HORIZON, size: int = 160) -> NDArray[np.uint8]:
    """Frames [F, size, size, 3], evenly spaced, of an episode on the first test goal, up to its success.

    Raises:
        Exception: whatever the machine's OpenGL raises where it cannot render; on Linux without a screen it needs EGL.
    """
    if sys.platform == "linux":
        os.environ.setdefault("MUJOCO_GL", "egl")
    env = _environment(task, horizon, render_mode="rgb_array", camera_name="corner2", width=size, height=size)
    try:

        def play(shown: Sequence[int]) -> tuple[int, list[NDArray[np.uint8]]]:
            env.get_wrapper_attr("begin")("test")
            observation, _ = env.reset()
            pictures = [env.render()] if 0 in shown else []
            for step in range(1, horizon + 1):
                observation, _, _, _, info = env.step(policy(observation[None])[0].astype(np.float32))
                pictures += [env.render()] if step in shown else []
                if info["success"]:
                    break
            return step, pictures

        length, _ = play([])  # rendering takes far longer than playing it twice
        _, pictures = play([round(length * k / max(frames - 1, 1)) for k in range(frames)])
        pictures += pictures[-1:] * (frames - len(pictures))  # of an episode shorter than that
        return np.stack([picture[::-1] for picture in pictures])  # the camera hangs upside down
    finally:
        env.close()


def demonstrate(
    task: str, episodes: int, horizon: int = HORIZON, noise: float = 0.0, seed: int = 0
) -> tuple[Array, Array]:
    """Observations [N, 39] and actions [N, 4] of the scripted expert, of successful episodes up to their success.

    Args:
        task: name of the task.
        episodes: number of successful episodes; unsuccessful ones are left out.
        horizon: steps after which an episode counts as unsuccessful.
        noise: standard deviation of what is added to the actions that are taken; those that are recorded are the
            expert's own (DART, Laskey et al. 2017).
        seed: of the noise.

    Raises:
        RuntimeError: the expert fails on most goals.
    """
    expert = _metaworld().policies.ENV_POLICY_MAP[f"{task}-v3"]()
    env = _environment(task, horizon)
    env.get_wrapper_attr("begin")("train")
    random = np.random.default_rng(seed)
    seen: list[Array] = []
    done: list[Array] = []
    found = 0
    for _ in range(2 * episodes + 30):
        observation, _ = env.reset()
        path: list[tuple[Array, Array]] = []
        for _ in range(horizon):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the experts ask for more than -1..1, and say so at every step
                action = np.clip(expert.get_action(observation), -1, 1)
            path.append((observation, action))
            taken = np.clip(action + noise * random.standard_normal(ACTIONS), -1, 1).astype(np.float32)
            observation, _, _, _, info = env.step(taken)
            if info["success"]:
                break
        else:
            continue
        seen += [observed for observed, _ in path]
        done += [acted for _, acted in path]
        found += 1
        if found == episodes:
            env.close()
            return np.stack(seen), np.stack(done)
    raise RuntimeError(f"the scripted expert of {task} succeeded in {found} episodes only; {episodes} were asked for.")
