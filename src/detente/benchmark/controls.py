"""Controls: what a gain must be laid beside before it is a method's merit.

* A *sweep* of fixed weights: the plain weighted sum of the losses, with weights spread over the simplex. Where its
  front is not beaten, no conflict needed resolving, only weighing.
* Weights *extracted* from a method: the mean weights it arrived at, kept fixed from the start.
* A *wider* network with equal weights, trained at the compute of one backward pass per task.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import qmc
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode

from detente.benchmark.job import Job
from detente.benchmark.problem import Problem
from detente.benchmark.specs import Spec

__all__ = ["Control", "extracted", "fixed_weights", "sweep", "wider"]

WIDEST = 6.0


@dataclass(frozen=True)
class Control:
    """A row that is no method.

    Attributes:
        label: its name in tables.
        kind: ``sweep``, ``extracted`` or ``wider``.
        method: the method it trains with, always ``gd``.
        settings: those it changes.
        weights_of: label of the method whose weights it takes.
    """

    label: str
    kind: str
    method: str = "gd"
    settings: Mapping[str, Any] = field(default_factory=dict)
    weights_of: str | None = None


def sweep(tasks: Sequence[str], points: int) -> list[Control]:
    """Fixed weights that sum to the number of tasks: evenly spaced for two, else spread over the simplex (Sobol)."""
    count = len(tasks)
    if count < 2:
        raise ValueError("a sweep of fixed weights needs two tasks or more.")
    if count == 2:
        first = np.arange(1, points + 1) / (points + 1)
        shares = np.stack([first, 1 - first], axis=1)
    else:
        drawn = qmc.Sobol(count, scramble=True, rng=np.random.default_rng(0)).random_base2((points - 1).bit_length())
        exponential = -np.log(np.clip(drawn[:points], 1e-6, 1 - 1e-6))
        shares = exponential / exponential.sum(axis=1, keepdims=True)
    digits = 2 if count == 2 and points < 100 else 4  # enough to tell the points apart
    return [_fixed(dict(zip(tasks, map(float, row), strict=True)), digits) for row in shares]


def _fixed(shares: Mapping[str, float], digits: int) -> Control:
    label = f"fixed({', '.join(f'{share:.{digits}f}' for share in shares.values())})"
    return Control(label, "sweep", _gd({task: len(shares) * share for task, share in shares.items()}))


def _gd(weights: Mapping[str, float]) -> str:
    return Spec.parse(f"gd(weights={ {task: round(weight, 6) for task, weight in weights.items()} })").label


def extracted(spec: Spec) -> Control:
    """Gradient descent with fixed weights: the mean weights of the method's own run, seed by seed."""
    return Control(f"weights of {spec.label}", "extracted", weights_of=spec.label)


def fixed_weights(job: Job, root: Path) -> Job:
    """The job with the weights that it takes from another run's result filled in."""
    if job.weights_of is None:
        return job
    path = replace(job, label=job.weights_of).directory(root) / "result.json"
    if not path.exists():
        raise ValueError(f"{job.label} needs the finished run {path.parent}, which is not there.")
    # a weighted sum of losses has no use for a negative weight: the task is then left to the others
    weights = {task: max(weight, 0.0) for task, weight in json.loads(path.read_text())["mean_weights"].items()}
    total = sum(weights.values())
    if total == 0:
        raise ValueError(f"{path} has no positive weight to take over; did the run diverge?")
    return replace(job, method=_gd({task: len(weights) * weight / total for task, weight in weights.items()}))


def wider(problem: Problem, settings: Mapping[str, Any], directory: Path | None = None) -> Control:
    """Equal weights on the width whose training step costs as much as one backward pass per task on the default width.

    A backward pass is taken to cost two forward passes, so T of them are worth ``(1 + 2 T) / 3`` plain steps. The
    operations of a forward pass are counted, not timed.

    Raises:
        ValueError: the problem's make_model has no parameter ``width``.
    """
    if "width" not in settings:
        raise ValueError(
            f"--wider: problem {problem.name!r} has no setting 'width'. Give make_model a parameter width that "
            "multiplies the channels of its trunk, and settings a width of 1.0."
        )
    tasks = tuple(problem.tasks)
    data = problem.make_data(settings, directory)["train"]
    batch = next(iter(DataLoader(data, batch_size=min(4, len(data)), collate_fn=problem.collate)))  # type: ignore[arg-type]

    def operations(width: float) -> int:
        model = problem.make_model(tasks, {**settings, "width": width}).eval()
        with FlopCounterMode(display=False) as counter:
            problem.losses(model, batch, tasks)
        return int(counter.get_total_flops())

    budget = operations(settings["width"]) * (1 + 2 * len(tasks)) / 3
    low, high = 1.0, WIDEST
    while high - low > 0.01:
        middle = (low + high) / 2
        low, high = (middle, high) if operations(settings["width"] * middle) <= budget else (low, middle)
    return Control(f"wider (x{low:.2f})", "wider", settings={"width": round(settings["width"] * low, 4)})
