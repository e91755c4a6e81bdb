"""MT50 by multi-task soft actor-critic: fifty robot manipulation tasks of Meta-World, one policy.

As ``mt10``, with all tasks. Needs the extra ``metaworld``, a GPU and patience.
"""

from __future__ import annotations

from typing import Any

from detente.benchmark.rl.metaworld import MT50
from detente.benchmark.rl.rates import report, summary
from detente.benchmark.rl.sac import SETTINGS, SoftActorCritic, check
from detente.method import Range

__all__ = ["check", "methods", "ranges", "report", "selection", "settings", "summary", "tasks", "training"]

tasks: dict[str, dict[str, str]] = {task: {"success": "max"} for task in MT50}
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
