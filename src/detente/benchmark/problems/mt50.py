"""MT50 by multi-task soft actor-critic: fifty robot manipulation tasks of Meta-World, one policy.

As ``mt10``, with all tasks. Needs the extra ``metaworld``, a GPU and patience.
"""

from __future__ import annotations

from detente.benchmark.problems.mt10 import methods, presets, ranges, selection, settings
from detente.benchmark.rl.metaworld import MT50
from detente.benchmark.rl.rates import report, summary
from detente.benchmark.rl.sac import SoftActorCritic, check

__all__ = [
    "check", "methods", "presets", "ranges", "report", "selection", "settings", "summary", "tasks", "training",
]  # fmt: skip

tasks: dict[str, dict[str, str]] = {task: {"success": "max"} for task in MT50}
training = SoftActorCritic
