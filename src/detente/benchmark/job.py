"""A job is one training of a comparison; an event is news of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["Event", "Job", "Progress"]


@dataclass(frozen=True)
class Job:
    """One training: a method on all tasks (``task`` None), or plain training on one task.

    Attributes:
        problem: name or path, as given to :func:`load_problem`.
        label: the row in tables: the method as it was asked for, ``single``, or the name of a control.
        method: the method with all its options, tuned ones included: ``cagrad(c=0.8)``.
        task: the task of a single-task baseline.
        seed: of initialisation, data order and the method's draws.
        settings: epochs, batch size, learning rate, ...
        data: directory of the official files, for problems that read them.
        weights_of: label of the runs (same seed) whose weights this one keeps fixed, see `detente.benchmark.controls`.
        device: where it trains, ``cpu`` or ``cuda:0``.
        trial: number of the trial, where the job tries hyper-parameters: it never looks at the test split.
    """

    problem: str
    label: str
    method: str
    task: str | None
    seed: int
    settings: dict[str, Any]
    data: str | None = None
    weights_of: str | None = None
    device: str = "cpu"
    trial: int | None = None

    @property
    def name(self) -> str:
        """Name of the run, also of its directory."""
        return self.label if self.task is None else f"single-{self.task}"

    @property
    def place(self) -> str:
        """Which of the runs of this name it is: ``seed 3``, or ``trial 5``."""
        return f"seed {self.seed}" if self.trial is None else f"trial {self.trial}"

    @property
    def title(self) -> str:
        return f"{self.name} {self.place}"

    def directory(self, root: Path) -> Path:
        kind = "runs" if self.trial is None else "trials"
        return root / kind / self.name / self.place.replace(" ", "-")

    def event(self, fraction: float, text: str = "") -> Event:
        return Event(self.name, self.place, fraction, text)

    def end(self, error: str | None = None, *, before: bool = False) -> Event:
        """The last news: it failed, is done, or was done ``before``."""
        text = "failed" if error is not None else "finished before" if before else "done"
        return Event(self.name, self.place, 1.0, text, error, ended=True)

    def retry(self, why: str) -> Event:
        return Event(self.name, self.place, 0.0, f"{why}; it goes on in another", retried=True)


@dataclass(frozen=True)
class Event:
    """News of a job: ``fraction`` of it done, a line of current figures, or the error that ended it.

    ``ended``: there will be no more of it. ``retried``: its process was lost, it goes on in another, `text` says why.
    """

    job: str
    place: str
    fraction: float
    text: str = ""
    error: str | None = None
    ended: bool = False
    retried: bool = False

    @property
    def title(self) -> str:
        return f"{self.job} {self.place}"


Progress = Callable[[Event], None]
