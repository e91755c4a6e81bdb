"""MT4, a small part of MT10, by multi-task soft actor-critic: four tasks that are learned within minutes.

Episodes of 150 steps and two layers of 128 units: fifteen thousand steps of all environments, about four minutes on one
core. Rewards are discounted by .95 a step, for these tasks take some fifty. Success is measured on goals that were not
trained on. Needs the extra ``metaworld``. Connection strength needs norms, which these networks do not have.
"""

from __future__ import annotations

from typing import Any

from detente.benchmark.rl.metaworld import MT4
from detente.benchmark.rl.rates import report, summary
from detente.benchmark.rl.sac import SETTINGS, SoftActorCritic, check
from detente.method import Range

__all__ = ["check", "methods", "ranges", "report", "selection", "settings", "summary", "tasks", "training"]

tasks: dict[str, dict[str, str]] = {task: {"success": "max"} for task in MT4}
settings: dict[str, Any] = {
    **SETTINGS,
    "epochs": 24,
    "gamma": 0.95,
    "evaluation_horizon": 150,
    "seeds": 3,
}
methods = "cagrad,pcgrad,wpcgrad,cdtt"
ranges = {"lr": Range(1e-4, 3e-3, log=True)}
selection = "mean"
training = SoftActorCritic
