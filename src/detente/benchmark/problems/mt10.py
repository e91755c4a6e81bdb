"""MT10 by multi-task soft actor-critic: ten robot manipulation tasks of Meta-World, one policy.

The problem on which PCGrad and CAGrad report their success rates. ``--preset liu2021cagrad`` takes the networks and
the batch of CAGrad's experiments; on a CPU it takes days, as their two million steps need a GPU. Success is measured on
goals that were not trained on. Needs the extra ``metaworld``. Connection strength needs norms, which these networks do
not have.
"""

from __future__ import annotations

from typing import Any

from detente.benchmark.rl.metaworld import MT10
from detente.benchmark.rl.rates import report, summary
from detente.benchmark.rl.sac import SETTINGS, SoftActorCritic, check
from detente.method import Range

__all__ = [
    "check", "methods", "presets", "ranges", "report", "selection", "settings", "summary", "tasks", "training",
]  # fmt: skip

tasks: dict[str, dict[str, str]] = {task: {"success": "max"} for task in MT10}
settings: dict[str, Any] = {**SETTINGS, "epochs": 100, "episodes": 10, "seeds": 3}
presets: dict[str, dict[str, Any]] = {
    "liu2021cagrad": {
        "hidden": 400,
        "layers": 3,
        "batch_size": 128,
        "lr": 3e-4,
        "capacity": 100_000,
        "epochs": 200,
        "episodes": 67,
        "protocol": "max-over-training",
    }
}
methods = "cagrad,pcgrad,wpcgrad,cdtt"
ranges = {"lr": Range(1e-4, 3e-3, log=True)}
selection = "mean"
training = SoftActorCritic
