"""What a comparison consists of: its jobs, and ``comparison.json``, which says what was asked for."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

import detente
from detente.benchmark.controls import Control
from detente.benchmark.files import write_json
from detente.benchmark.job import Job
from detente.benchmark.problem import Problem
from detente.benchmark.results import EQUAL, SINGLE, read_config
from detente.benchmark.specs import Spec

__all__ = ["Chosen", "Plan", "prepare"]


@dataclass(frozen=True)
class Chosen:
    """What tuning chose for one run name: the method with its options, and the settings it changes."""

    method: str
    settings: Mapping[str, Any]


@dataclass(frozen=True)
class Plan:
    """A comparison.

    Attributes:
        chosen: by name of the run (``cagrad``, ``single-depth``); empty without tuning.
        trials: budget of the tuning per run name; 0 for none.
    """

    problem: Problem
    specs: Sequence[Spec]
    seeds: Sequence[int]
    settings: dict[str, Any]
    data: Path | None = None
    controls: Sequence[Control] = ()
    trials: int = 0
    chosen: Mapping[str, Chosen] = field(default_factory=dict)
    device: str = "cpu"

    def subjects(self) -> Iterator[Job]:
        """One job for each run name, seed 0: the single-task baselines, then the methods."""
        yield from self._of(0)

    def jobs(self) -> list[list[Job]]:
        """All jobs in waves, each of which needs the results of those before; within one seed by seed."""
        first = [job for seed in self.seeds for job in self._of(seed)]
        first += [self._control(c, seed) for seed in self.seeds for c in self.controls if c.weights_of is None]
        second = [self._control(c, seed) for seed in self.seeds for c in self.controls if c.weights_of is not None]
        return [wave for wave in (first, second) if wave]

    def _of(self, seed: int) -> Iterator[Job]:
        for task in self.problem.tasks:
            yield self._job(SINGLE, "gd", task, seed)
        for spec in self.specs:
            yield self._job(spec.label, spec.label, None, seed)

    def _job(self, label: str, method: str, task: str | None, seed: int) -> Job:
        source = self.problem.source
        job = Job(source, label, method, task, seed, self.settings, self._data, device=self.device)
        chosen = self.chosen.get(job.name, Chosen(method, {}))
        return replace(job, method=chosen.method, settings={**self.settings, **chosen.settings})

    def _control(self, control: Control, seed: int) -> Job:
        """Controls are plain gradient descent, so they take what was tuned for equal weights."""
        tuned = self.chosen.get(EQUAL, Chosen(EQUAL, {})).settings
        settings = {**self.settings, **tuned, **control.settings}
        source = self.problem.source
        weights = control.weights_of
        return Job(source, control.label, control.method, None, seed, settings, self._data, weights, self.device)

    @property
    def _data(self) -> str | None:
        return None if self.data is None else str(self.data)


def prepare(root: Path, plan: Plan, command: str, tuning: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Write down what is asked for, or check that the directory holds this comparison; methods and seeds may be added.

    Args:
        tuning: content of ``tuning.json``, once it is known.

    Raises:
        ValueError: the directory holds another comparison.
    """
    problem = plan.problem
    content: dict[str, Any] = {
        "problem": problem.name,
        "source": problem.source,
        "digest": problem.digest,
        "tasks": problem.tasks,
        "selection": problem.selection,
        "settings": plan.settings,
        "methods": [*([] if problem.whole else [SINGLE]), *(spec.label for spec in plan.specs)],
        "controls": {control.label: control.kind for control in plan.controls},
        "trials": plan.trials or (tuning or {}).get("trials", 0),
        "tuning": tuning,
        "seeds": list(plan.seeds),
        "command": command,
        "environment": {
            "detente": detente.__version__,
            **_commit(),
            "torch": torch.__version__,
            "python": platform.python_version(),
            "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
            "device": plan.device,
            "gradients of": "parameters",
        },
    }
    if (root / "comparison.json").exists():
        before = read_config(root / "comparison.json")
        for key in ("problem", "digest", "settings", "trials"):
            if before.get(key) != content[key]:
                what = "the problem's code" if key == "digest" else key
                raise ValueError(
                    f"{root} holds another comparison: {what} was {_differing(before.get(key), content[key])}. "
                    "Choose another --out, or delete the directory."
                )
        content["methods"] = list(dict.fromkeys([*before["methods"], *content["methods"]]))
        content["controls"] = {**before.get("controls", {}), **content["controls"]}
        content["seeds"] = sorted({*before["seeds"], *content["seeds"]})
        content["tuning"] = _joined(root, before.get("tuning"), tuning)
    write_json(root / "comparison.json", content)
    return content


def _joined(root: Path, before: Mapping[str, Any] | None, now: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    """What was tuned before and now: methods may be added, but what was chosen for one stays."""
    if before is None or now is None:
        return now or before
    for name in before["runs"].keys() & now["runs"].keys():
        if before["runs"][name] != now["runs"][name]:
            raise ValueError(f"{root} holds another comparison: {name} was tuned otherwise. Choose another --out.")
    both = {key: {**before[key], **now[key]} for key in ("runs", "ranges")}
    return {**before, **both}


def _differing(before: Any, now: Any) -> str:
    if isinstance(before, dict) and isinstance(now, dict):
        keys = sorted(k for k in {*before, *now} if before.get(k) != now.get(k))
        return ", ".join(f"{k} = {before.get(k)!r} and is now {now.get(k)!r}" for k in keys)
    return f"{before!r} and is now {now!r}"


def _commit() -> dict[str, str]:
    """The commit of a source checkout; nothing for an installed package."""
    place = Path(__file__).parents[3]
    if not (place / ".git").exists():
        return {}
    try:
        found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=place, capture_output=True, text=True)
    except OSError:
        return {}
    return {"commit": found.stdout.strip()} if found.returncode == 0 else {}
