"""One training of a comparison: `train` runs a job to its end, from its last checkpoint if there is one.

A job's directory has a ``checkpoint.pt`` while it trains and a ``result.json`` when it is done. Both are written whole
or not at all, so a job that is killed at any moment goes on where its last checkpoint was.
"""

from __future__ import annotations

import math
import statistics
import time
import traceback
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from detente.benchmark.controls import fixed_weights
from detente.benchmark.division import Division
from detente.benchmark.files import read_checkpoint, write_checkpoint, write_json
from detente.benchmark.job import Job, Progress
from detente.benchmark.log import Log
from detente.benchmark.memory import PeakMemory
from detente.benchmark.problem import load_problem
from detente.benchmark.protocol import LAST, looks_at_test, mean_figures
from detente.benchmark.randomness import random_state, set_random_state
from detente.benchmark.specs import Spec
from detente.diagnostics import task_gramian
from detente.method import Method, method_class
from detente.methods import DTP
from detente.step import Closure

__all__ = ["Training", "loaded_problem", "train", "unfinished", "work"]

EMA = 0.9
"""Decay per epoch of the mean weights that `fixed weights extracted from a method` take over."""

loaded_problem = lru_cache(maxsize=2)(load_problem)
"""The problem of that source, kept for the worker's next job."""


class Training(ABC):
    """The state of one job between epochs, what counts of it, and its checkpoint.

    What an epoch consists of is left to a subclass, which also builds what is trained.

    Attributes:
        saved: what a checkpoint holds, by name: everything with a ``state_dict``.
        generators: random generators that it holds too; the global ones always belong to it.
        step_times: milliseconds of the last steps.
    """

    PLAIN = ("history", "best", "reached", "step_times", "peak_mb", "first_figures", "mean_weights")
    """Attributes that are saved as they are."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.problem = loaded_problem(job.problem)
        self.tasks = tuple(self.problem.tasks) if job.task is None else (job.task,)
        self.device = torch.device(job.device)
        self.division = Division()
        self.spec = Spec.parse(job.method)
        self.per_task = "model" in method_class(self.spec.method).needs
        self.counts: dict[str, float] = {}  # samples behind the losses computed last
        self.saved: dict[str, Any] = {}
        self.generators: dict[str, torch.Generator] = {}
        self.log: Log | None = None
        self.history: list[dict[str, Any]] = []
        self.best: dict[str, Any] = {"score": -math.inf, "epoch": 0, "metrics": {}}
        self.reached: dict[str, int] = {}
        self.step_times: list[float] = []
        self.peak_mb = 0.0
        self.first_figures: dict[str, dict[str, float]] = {}
        self.mean_weights: dict[str, float] = {}  # of the method, averaged over epochs with decay EMA
        self.diverged: dict[str, Any] | None = None

    # -- what a subclass says

    @property
    @abstractmethod
    def methods(self) -> Sequence[Method]:
        """The methods of the training, each with its own history."""

    @property
    @abstractmethod
    def parameters(self) -> int:
        """How many parameters are trained."""

    @abstractmethod
    def warm_up(self) -> None:
        """One backward pass on a copy, so that one-time allocations of the libraries do not count as the job's."""

    @abstractmethod
    def train_epoch(self, log: Log, progress: Callable[[float], None]) -> None:
        """Take the steps of an epoch, note them in the log and say what share of them is done."""

    @abstractmethod
    def figures(self, split: str) -> dict[str, dict[str, float]]:
        """Figures of the tasks on the train, val or test split."""

    def end_epoch(self, score: float) -> None:  # noqa: B027
        """What follows the evaluation, such as the learning rate's schedule."""

    def finish(self, directory: Path) -> None:  # noqa: B027
        """Files to leave beside the result."""

    # -- checkpoints

    def save(self, path: Path) -> None:
        content = {
            "job": asdict(self.job),
            "parts": {name: part.state_dict() for name, part in self.saved.items()},
            "generators": {name: generator.get_state() for name, generator in self.generators.items()},
            "random": random_state(self.device),
        }
        write_checkpoint(path, content | {key: getattr(self, key) for key in self.PLAIN})

    def load(self, path: Path) -> None:
        with read_checkpoint(path) as saved:
            if saved["job"] != asdict(self.job):
                raise ValueError("it belongs to another job")
            for name, part in self.saved.items():
                part.load_state_dict(saved["parts"][name])
            for name, generator in self.generators.items():
                generator.set_state(saved["generators"][name])
            set_random_state(saved["random"], self.device)
            for key in self.PLAIN:
                setattr(self, key, saved[key])

    # -- training

    @property
    def epoch(self) -> int:
        return len(self.history)

    def clip(self, optimizer: torch.optim.Optimizer) -> None:
        """Shorten the gradients that an optimizer takes: the same rule for every method and schedule."""
        limit = self.job.settings["clip_norm"]
        if not limit:
            return

        def shorten(*_: Any) -> None:
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            norm = nn.utils.clip_grad_norm_(parameters, limit)
            if self.log is not None:
                self.log.clipped += int(norm > limit)

        optimizer.register_step_pre_hook(shorten)

    def closure(
        self,
        losses: Callable[[tuple[str, ...]], dict[str, Tensor]],
        log: Log,
        probed: Iterable[Tensor] | None = None,
    ) -> Closure:
        """What `detente.step` calls: losses of the named tasks, noted in the log, as are their gradients by ``probed``,
        if given.
        """
        unseen = True

        def closure(tasks: tuple[str, ...] | None = None) -> Mapping[str, Tensor]:
            nonlocal unseen
            wanted = self.tasks if tasks is None else tasks
            found = losses(wanted)
            log.loss(found, self.counts)
            if probed is not None and unseen and len(wanted) > 1:
                gramian = task_gramian(found, counts=self.counts, parameters=probed)
                if gramian is not None and len(gramian) == len(self.tasks):
                    log.gramians.append(gramian)
            unseen = False
            return found

        return closure

    def run_epoch(self, progress: Callable[[float, str], None]) -> None:
        settings = self.job.settings
        log = self.log = Log(self.tasks, self.division)
        said = time.monotonic()

        def say(share: float) -> None:
            nonlocal said
            if time.monotonic() - said > 0.5:
                said = time.monotonic()
                progress((self.epoch + share) / settings["epochs"], self.line())

        self.train_epoch(log, say)
        for method in self.methods:
            method.next_epoch()
        row = log.row(self.epoch + 1)
        bad = [t for t, v in row["loss"].items() if not math.isfinite(v)]
        if bad:
            raise FloatingPointError(f"the loss of task {bad[0]!r} is not finite in epoch {self.epoch + 1}")
        if any("metrics" in method.needs for method in self.methods):
            self._observe_metrics()
        row["val"] = self.figures("val")
        self.history.append(row)
        self._reach(row["val"])
        self._average(row["weights"])
        found = self.problem.score(row["val"])
        better = found > self.best["score"] or not self.best["epoch"]
        if looks_at_test(settings["protocol"], self.epoch, settings["epochs"]) and self.job.trial is None:
            row["test"] = self.figures("test")
        if better:
            self.best = {"score": found if math.isfinite(found) else -math.inf, "epoch": self.epoch, "metrics": {}}
            if settings["protocol"] == "val-selected" and self.job.trial is None:
                self.best["metrics"] = self.figures("test")
        self.end_epoch(found)
        self.step_times = self.step_times[-2000:]

    def _average(self, weights: Mapping[str, float]) -> None:
        kept = EMA if self.mean_weights else 0.0
        self.mean_weights = {t: kept * self.mean_weights.get(t, 0.0) + (1 - kept) * weights[t] for t in self.tasks}

    def _observe_metrics(self) -> None:
        """Report each task's first figure on the TRAINING data, brought into (0, 1), to the method."""
        figures = self.figures("train")
        self.first_figures = self.first_figures or figures
        report = {}
        for task in self.tasks:
            metric, value = next(iter(figures[task].items()))
            if self.problem.tasks[task][metric] == "max":
                report[task] = min(max(value, 0.0), 1.0)
            else:
                start = self.first_figures[task][metric]
                report[task] = start / (start + value) if start > 0 else 0.5
        for child in (child for method in self.methods for child in method.modules()):
            if isinstance(child, DTP):
                child.observe_metrics(report)

    def _reach(self, figures: dict[str, dict[str, float]]) -> None:
        for task, goals in (self.problem.target or {}).items():
            if task in figures and task not in self.reached:
                better = {"max": float.__ge__, "min": float.__le__}
                if all(better[self.problem.tasks[task][m]](figures[task][m], float(g)) for m, g in goals.items()):
                    self.reached[task] = self.epoch

    def diverge(self, error: FloatingPointError) -> None:
        """End the run where a loss stopped being finite; it is reported, with no figures, instead of dropped."""
        self.diverged = {"epoch": self.epoch + 1, "reason": str(error).partition(". ")[0].rstrip(".")}

    def done(self) -> bool:
        if self.diverged is not None:
            return True
        target, settings = self.problem.target, self.job.settings
        if target is not None and all(t in self.reached for t in self.tasks if t in target):
            return True
        tired = settings["patience"] and self.epoch - self.best["epoch"] >= settings["patience"]
        return bool(tired) or self.epoch >= settings["epochs"]

    def line(self) -> str:
        if not self.history:
            return ""
        first = {task: next(iter(figures.values())) for task, figures in self.history[-1]["val"].items()}
        return "  ".join(f"{task} {value:.3g}" for task, value in first.items())

    def reported(self) -> tuple[int, dict[str, dict[str, float]]]:
        """The epoch that counts, and its test figures, by the protocol; no figures for a trial."""
        protocol = self.job.settings["protocol"]
        if protocol == "val-selected" or self.job.trial is not None:
            return self.best["epoch"], self.best["metrics"]
        tested = [row for row in self.history if "test" in row]
        if not tested:
            return 0, {}
        if protocol == "last-10-test":
            return self.epoch, mean_figures([row["test"] for row in tested[-LAST:]])
        best = max(tested, key=lambda row: self.problem.score(row["test"]))
        return best["epoch"], best["test"]

    def result(self) -> dict[str, Any]:
        selected, figures = self.reported()
        metrics = {t: dict(v) for t, v in figures.items()}
        for task in self.tasks:
            if "epochs" in self.problem.tasks[task] and self.problem.target and metrics:
                metrics[task]["epochs"] = float(self.reached.get(task, self.job.settings["epochs"]))
        if self.diverged is not None:
            metrics = {t: dict.fromkeys(self.problem.tasks[t], math.nan) for t in self.tasks}
        rated = [(r["conflict_rate"], r["probes"]) for r in self.history if r["conflict_rate"] is not None]
        return {
            "problem": self.problem.name,
            "method": "single" if self.job.task else self.spec.method,
            "label": self.job.label,
            "options": self.spec.label,
            "settings": self.job.settings,
            "seed": self.job.seed,
            "task": self.job.task,
            "metrics": metrics,
            "diverged": self.diverged,
            "selected_epoch": selected,
            "score": self.best["score"] if self.diverged is None else -math.inf,
            "mean_weights": self.mean_weights,
            "epochs": self.epoch,
            "steps": sum(row["steps"] for row in self.history),
            "reached": self.reached,
            "history": self.history,
            "conflict_rate": sum(r * n for r, n in rated) / sum(n for _, n in rated) if rated else None,
            "cost": {
                "step_ms": statistics.median(self.step_times) if self.step_times else 0.0,
                "peak_mb": self.peak_mb,
                "parameters": self.parameters,
            },
        }


def train(job: Job, root: Path, progress: Progress) -> None:
    """Run a job to its end and write its result.

    Raises:
        ValueError: its checkpoint cannot be used, or the problem and the settings do not fit.
    """
    directory = job.directory(root)
    directory.mkdir(parents=True, exist_ok=True)
    checkpoint = directory / "checkpoint.pt"
    training = loaded_problem(job.problem).training(fixed_weights(job, root))
    division = training.division
    if division.agreed(checkpoint.exists):
        training.load(checkpoint)
    division.wait()  # until all have read it: process 0 may be about to delete it

    def say(fraction: float, text: str) -> None:
        progress(job.event(fraction, text))

    say(training.epoch / job.settings["epochs"], training.line())
    training.warm_up()
    saved = time.monotonic()
    with PeakMemory(training.device) as memory:
        while not training.done():
            try:
                training.run_epoch(say)
            except FloatingPointError as error:
                training.diverge(error)
                break
            # an epoch may take milliseconds; losing two seconds of work is cheaper than writing each
            if division.first and time.monotonic() - saved > 2:
                training.save(checkpoint)
                saved = time.monotonic()
            say(training.epoch / job.settings["epochs"], training.line())
    if not division.first:
        return
    training.peak_mb = max(training.peak_mb, memory.peak_mb)
    training.finish(directory)
    write_json(directory / "result.json", training.result())
    for leftover in (checkpoint, directory / "error.txt", *directory.glob("*.tmp")):
        leftover.unlink(missing_ok=True)


def work(job: Job, root: Path, progress: Progress) -> str | None:
    """Run a job; the error's text if it failed."""
    try:
        with warnings.catch_warnings():
            # counted in every result instead of said once per process
            warnings.filterwarnings("ignore", message=".*the solver stopped short of its tolerance")
            train(job, root, progress)
    except Exception as error:
        trace = traceback.format_exc()
        (job.directory(root) / "error.txt").write_text(trace)
        return ": ".join([type(error).__name__, *([str(error)] if str(error) else [])]) + _place(error, job.problem)
    return None


def _place(error: BaseException, source: str) -> str:
    """Where in the user's problem file it happened, if it did."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == source]
    if not frames:
        return ""
    return f" ({Path(source).name}, line {frames[-1].lineno}, in {frames[-1].name}: {frames[-1].line})"


def unfinished(jobs: Sequence[Job], root: Path, progress: Progress) -> list[Job]:
    """The jobs without a result, in order; the others are reported as finished before."""
    pending = []
    for job in jobs:
        if (job.directory(root) / "result.json").exists():
            progress(job.end(before=True))
        else:
            pending.append(job)
    return pending
