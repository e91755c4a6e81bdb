"""Two tasks of Meta-World, a few short episodes: enough to see that everything is trained, saved and resumed."""

from typing import Any

from detente.benchmark.rl.rates import report, summary
from detente.benchmark.rl.sac import SETTINGS, SoftActorCritic, check

__all__ = ["check", "report", "summary"]

tasks = {task: {"success": "max"} for task in ("drawer-close", "reach")}
settings: dict[str, Any] = {
    **SETTINGS,
    "epochs": 3,
    "episodes": 2,
    "horizon": 30,
    "evaluation_horizon": 60,
    "evaluated": 2,
    "warm_up": 1,
    "hidden": 16,
    "batch_size": 8,
    "probe_every": 7,
    "frames": 0,
    "seeds": 1,
}
methods = "cagrad"
selection = "mean"
training = SoftActorCritic
