"""One training of a comparison: `train` runs a job to its end, from its last checkpoint if there is one.

A job's directory has a ``checkpoint.pt`` while it trains and a ``result.json`` when it is done. Both are written whole
or not at all, so a job that is killed at any moment goes on where its last checkpoint was.
"""

from __future__ import annotations

import copy
import math
import random
import statistics
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler, Sampler, TensorDataset

from detente.benchmark.controls import fixed_weights
from detente.benchmark.device import Elsewhere, clock, moved
from detente.benchmark.division import Division
from detente.benchmark.files import read_checkpoint, write_checkpoint, write_json
from detente.benchmark.job import Job, Progress
from detente.benchmark.memory import PeakMemory
from detente.benchmark.problem import Problem, load_problem
from detente.benchmark.protocol import LAST, looks_at_test, mean_figures, score
from detente.benchmark.specs import Spec
from detente.diagnostics import task_gramian
from detente.gramian import cosines
from detente.method import Method, method_class
from detente.methods import DTP, AutoLambda
from detente.nn import active_task, convert_task_norm
from detente.step import step

__all__ = ["train", "unfinished", "work"]

EMA = 0.9
"""Decay per epoch of the mean weights that `fixed weights extracted from a method` take over."""


# kept for the worker's next job
_problem = lru_cache(maxsize=2)(load_problem)


@lru_cache(maxsize=2)
def _data(source: str, directory: str | None, settings: tuple[tuple[str, Any], ...]) -> dict[str, Dataset[Any]]:
    return _problem(source).make_data(dict(settings), None if directory is None else Path(directory))


class _Parts(Sampler[Sequence[int]]):
    """Batches of shuffled samples, of each the part that this process computes."""

    def __init__(self, data: Dataset[Any], size: int, generator: torch.Generator, division: Division) -> None:
        sampler = RandomSampler(data, generator=generator)  # type: ignore[arg-type]
        self.batches = BatchSampler(sampler, size, drop_last=True)
        self.division = division

    def __iter__(self) -> Iterator[Sequence[int]]:
        return map(self.division.part, self.batches)

    def __len__(self) -> int:
        return len(self.batches)


def _batches(
    data: Dataset[Any], size: int, generator: torch.Generator, division: Division, collate: Callable[[Any], Any] | None
) -> DataLoader[Any]:
    if len(data) < size:  # type: ignore[arg-type]
        raise ValueError(
            f"batch_size is {size} but the training split has {len(data)} samples. "  # type: ignore[arg-type]
            "Lower batch_size."
        )
    parts = _Parts(data, size, generator, division)
    if isinstance(data, TensorDataset):  # one index operation per batch instead of one per sample
        return DataLoader(data, sampler=parts, batch_size=None)
    return DataLoader(data, batch_sampler=parts, collate_fn=collate)  # type: ignore[arg-type]


class _Log:
    """Figures of the running epoch: mean losses, weights, norms and cosines."""

    def __init__(self, tasks: Sequence[str], division: Division) -> None:
        self.tasks = tasks
        self.division = division
        self.losses: list[list[float]] = []  # of every step and task, of this process's samples
        self.counts: list[list[float]] = []
        self.weights: dict[str, Tensor] = {t: torch.zeros((), dtype=torch.float64) for t in tasks}
        self.gramians: list[Tensor] = []
        self.clipped = 0  # optimizer steps whose gradient was shortened
        self.unsolved = 0  # blocks that a solver could not certify

    @property
    def steps(self) -> int:
        return len(self.losses)

    def step(self) -> None:
        """The next losses are those of a new step."""
        self.losses.append([math.nan] * len(self.tasks))
        self.counts.append([0.0] * len(self.tasks))

    def loss(self, losses: Mapping[str, Tensor], counts: Mapping[str, float]) -> None:
        """Note losses; some methods compute them several times per step, and the first time counts."""
        for t, task in enumerate(self.tasks):
            if task in losses and not self.counts[-1][t]:
                self.losses[-1][t], self.counts[-1][t] = float(losses[task].detach()), counts[task]

    def row(self, epoch: int) -> dict[str, Any]:
        given = (torch.tensor(v, dtype=torch.float64) for v in (self.losses, self.counts))
        losses, counts = self.division.means(*given)
        there = counts > 0
        means = torch.where(there, losses, 0.0).sum(0) / there.sum(0).clamp_min(1)
        entry: dict[str, Any] = {
            "epoch": epoch,
            "steps": self.steps,
            "loss": dict(zip(self.tasks, means.tolist(), strict=True)),
            "weights": {t: float(v) / max(self.steps, 1) for t, v in self.weights.items()},
            "norms": None,
            "cosine": None,
            "conflict_rate": None,
            "clipped": self.clipped,
            "unsolved": self.unsolved,
        }
        if self.gramians:
            stacked = torch.stack(self.gramians)
            cosine = cosines(stacked)
            upper = torch.ones(len(self.tasks), len(self.tasks)).triu(1).bool()
            norms = stacked.diagonal(dim1=1, dim2=2).clamp_min(0).sqrt().mean(0)
            entry["norms"] = dict(zip(self.tasks, norms.tolist(), strict=True))
            entry["cosine"] = cosine.mean(0).tolist()
            entry["conflict_rate"] = float((cosine[:, upper] < 0).double().mean())
            entry["probes"] = len(self.gramians)
        return entry


def _evaluate(
    problem: Problem,
    model: nn.Module,
    data: Dataset[Any],
    tasks: tuple[str, ...],
    per_task: bool,
    device: torch.device,
    dtype: torch.dtype | None,
) -> dict[str, dict[str, float]]:
    was_training = model.training
    model.eval()
    used = model if device.type == "cpu" and dtype is None else Elsewhere(model, device, dtype).eval()
    try:
        with torch.no_grad():
            if not per_task:
                return problem.metrics(used, data, tasks)
            figures = {}
            for task in tasks:
                with active_task(task):
                    figures.update(problem.metrics(used, data, (task,)))
            return figures
    finally:
        model.train(was_training)


def _seed(seed: int) -> None:
    torch.manual_seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    random.seed(seed)


def _random_state(device: torch.device) -> dict[str, Any]:
    name, keys, *rest = np.random.get_state()  # noqa: NPY002
    assert isinstance(keys, np.ndarray)
    state = {"torch": torch.get_rng_state(), "numpy": [str(name), keys.tolist(), *rest], "python": random.getstate()}
    return state if device.type != "cuda" else {**state, "cuda": torch.cuda.get_rng_state(device)}


def _set_random_state(state: dict[str, Any], device: torch.device) -> None:
    torch.set_rng_state(state["torch"])
    if device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))  # noqa: NPY002
    random.setstate(state["python"])


class _Training:
    """The state of one job between epochs: everything that a checkpoint holds."""

    PLAIN = ("history", "best", "reached", "step_times", "peak_mb", "first_figures", "mean_weights")
    """Attributes that are saved as they are."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.problem = _problem(job.problem)
        wanted = self.problem.data_settings(job.settings)
        self.data = _data(job.problem, job.data, tuple(sorted(wanted.items())))
        self.tasks = tuple(self.problem.tasks) if job.task is None else (job.task,)
        self.division = Division()
        self.samples = len(self.division.part(range(job.settings["batch_size"])))
        self.counts: dict[str, float] = {}  # samples behind the losses computed last
        _seed(job.seed)
        self.model = self.problem.make_model(self.tasks, job.settings)
        self.spec = Spec.parse(job.method)
        self.device = torch.device(job.device)
        self.dtype = torch.float64 if job.settings["precision"] == "float64" else None
        self.per_task = "model" in method_class(self.spec.method).needs
        if self.per_task:
            convert_task_norm(self.model, self.tasks)
        self.model.to(self.device, self.dtype)
        self.division.join(self.model)
        self.method: Method = self.spec.build(self.model, job.settings["epochs"], job.seed)
        self.optimizer = self.problem.make_optimizer(self.model, job.settings)
        self.scheduler = self.problem.make_scheduler(self.optimizer, job.settings)
        self.log: _Log | None = None
        if job.settings["clip_norm"]:
            self.optimizer.register_step_pre_hook(self._clip)
        self.generator = torch.Generator().manual_seed(job.seed)
        self.history: list[dict[str, Any]] = []
        self.best: dict[str, Any] = {"score": -math.inf, "epoch": 0, "metrics": {}}
        self.reached: dict[str, int] = {}
        self.step_times: list[float] = []
        self.peak_mb = 0.0
        self.first_figures: dict[str, dict[str, float]] = {}
        self.mean_weights: dict[str, float] = {}  # of the method, averaged over epochs with decay EMA
        self.diverged: dict[str, Any] | None = None
        # Auto-Lambda looks at a second shuffled pass of the training data
        self.second = torch.Generator().manual_seed(job.seed + 1)
        self._second_pass: Iterator[Any] = iter(())
        if isinstance(self.method, AutoLambda):
            self.method.meta = self._second_losses

    # -- checkpoints

    def save(self, path: Path) -> None:
        content = {
            "job": asdict(self.job),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": {} if self.scheduler is None else self.scheduler.state_dict(),
            "method": self.method.state_dict(),
            "generator": self.generator.get_state(),
            "second": self.second.get_state(),
            "random": _random_state(self.device),
        }
        write_checkpoint(path, content | {key: getattr(self, key) for key in self.PLAIN})

    def load(self, path: Path) -> None:
        with read_checkpoint(path) as saved:
            if saved["job"] != asdict(self.job):
                raise ValueError("it belongs to another job")
            self.model.load_state_dict(saved["model"])
            self.optimizer.load_state_dict(saved["optimizer"])
            if self.scheduler is not None:
                self.scheduler.load_state_dict(saved["scheduler"])
            self.method.load_state_dict(saved["method"])
            self.generator.set_state(saved["generator"])
            self.second.set_state(saved["second"])
            _set_random_state(saved["random"], self.device)
            for key in self.PLAIN:
                setattr(self, key, saved[key])

    # -- training

    @property
    def epoch(self) -> int:
        return len(self.history)

    def _losses(self, model: nn.Module, batch: Any, tasks: tuple[str, ...]) -> dict[str, Tensor]:
        """Losses of the tasks that have samples in this process's part of a batch."""
        self.counts.update(self.problem.counts(batch, tasks, self.samples))
        present = tuple(task for task in tasks if self.counts[task])
        self.division.check(present, tasks)
        losses: dict[str, Tensor] = {}
        with self._precision():
            if self.per_task:
                for task in present:
                    with active_task(task):
                        losses.update(self.problem.losses(model, batch, (task,)))
            elif present:
                losses = self.problem.losses(model, batch, present)
        if self.division.joint_norms and set(losses) != set(present):
            raise ValueError(
                f"losses() was asked for {list(present)} and gave {list(losses)}. For BatchNorm on several processes "
                "let the problem say by counts(batch, tasks) which tasks have samples in a batch."
            )
        return losses

    def _precision(self) -> AbstractContextManager[Any]:
        """Autocast where it was asked for. bfloat16 has the range of float32, so no method needs a loss scale."""
        if self.job.settings["precision"] != "bfloat16":
            return nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16)

    def _clip(self, *_: Any) -> None:
        """Shorten the gradient that the optimizer is about to take: the same rule for every method and schedule."""
        limit = self.job.settings["clip_norm"]
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), limit)
        if self.log is not None:
            self.log.clipped += int(norm > limit)

    def _labelled(self, batch: Any) -> bool:
        """Whether a batch has samples of any of the tasks, on any process; a single task may have none."""
        if not self.problem.counts_declared:
            return True
        return self.division.any(any(self.problem.counts(batch, self.tasks, self.samples).values()))

    def _closure(self, batch: Any, log: _Log, probing: bool) -> Callable[..., dict[str, Tensor]]:
        unseen = True

        def closure(tasks: tuple[str, ...] | None = None) -> dict[str, Tensor]:
            nonlocal unseen
            wanted = self.tasks if tasks is None else tasks
            losses = self._losses(self.model, batch, wanted)
            log.loss(losses, self.counts)
            if probing and unseen and len(wanted) > 1:
                gramian = task_gramian(losses, counts=self.counts, parameters=self.model.parameters())
                if gramian is not None and len(gramian) == len(self.tasks):
                    log.gramians.append(gramian)
            unseen = False
            return losses

        return closure

    def _second_losses(self, tasks: tuple[str, ...] | None = None) -> dict[str, Tensor]:
        batch = self._moved(next(self._second_pass))
        return self._losses(self.model, batch, self.tasks if tasks is None else tasks)

    def _moved(self, batch: Any) -> Any:
        return moved(batch, self.device, self.dtype)

    def _batches(self, generator: torch.Generator) -> DataLoader[Any]:
        size = self.job.settings["batch_size"]
        return _batches(self.data["train"], size, generator, self.division, self.problem.collate)

    def warm_up(self) -> None:
        """One backward pass on a copy, so that one-time allocations of the libraries do not count as the job's."""
        before = _random_state(self.device)
        batch = self._moved(next(iter(self._batches(torch.Generator()))))
        model = copy.deepcopy(self.model)
        for task in self.tasks:
            with active_task(task):
                for loss in self._losses(model, batch, (task,)).values():
                    loss.backward()  # type: ignore[no-untyped-call]
        _set_random_state(before, self.device)

    def run_epoch(self, progress: Callable[[float, str], None]) -> None:
        settings = self.job.settings
        log = self.log = _Log(self.tasks, self.division)
        own = self.division.seed()
        if own is not None:
            _seed(own)
        loader = self._batches(self.generator)
        self._second_pass = iter(self._batches(self.second))
        count = len(loader)
        self.model.train()
        said = time.monotonic()
        for k, batch in enumerate(loader):
            if not self._labelled(batch):
                continue
            batch = self._moved(batch)
            probing = k % settings["probe_every"] == 0
            log.step()
            start = clock(self.device)
            update = step(self._closure(batch, log, probing), self.optimizer, self.method, counts=self.counts)
            if not probing:
                self.step_times.append(1000 * (clock(self.device) - start))
            for task, weight in update.weights.items():
                log.weights[task] += weight.double().mean()
            log.unsolved += int(update.stats.get("unsolved", 0))
            if time.monotonic() - said > 0.5:
                said = time.monotonic()
                progress((self.epoch + (k + 1) / count) / settings["epochs"], self._line())
        self.method.next_epoch()
        row = log.row(self.epoch + 1)
        bad = [t for t, v in row["loss"].items() if not math.isfinite(v)]
        if bad:
            raise FloatingPointError(f"the loss of task {bad[0]!r} is not finite in epoch {self.epoch + 1}")
        if "metrics" in self.method.needs:
            self._observe_metrics()
        row["val"] = self._figures("val")
        self.history.append(row)
        self._reach(row["val"])
        self._average(row["weights"])
        found = score(self.problem.tasks, row["val"])
        better = found > self.best["score"] or not self.best["epoch"]
        if looks_at_test(settings["protocol"], self.epoch, settings["epochs"]) and self.job.trial is None:
            row["test"] = self._figures("test")
        if better:
            self.best = {"score": found if math.isfinite(found) else -math.inf, "epoch": self.epoch, "metrics": {}}
            if settings["protocol"] == "val-selected" and self.job.trial is None:
                self.best["metrics"] = self._figures("test")
        self._schedule(found)
        self.step_times = self.step_times[-2000:]

    def _average(self, weights: Mapping[str, float]) -> None:
        kept = EMA if self.mean_weights else 0.0
        self.mean_weights = {t: kept * self.mean_weights.get(t, 0.0) + (1 - kept) * weights[t] for t in self.tasks}

    def _schedule(self, found: float) -> None:
        if isinstance(self.scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
            self.scheduler.step(found)
        elif self.scheduler is not None:
            self.scheduler.step()

    def _figures(self, split: str) -> dict[str, dict[str, float]]:
        return self.division.agreed(
            lambda: _evaluate(
                self.problem, self.model, self.data[split], self.tasks, self.per_task, self.device, self.dtype
            )
        )

    def _observe_metrics(self) -> None:
        """Report each task's first figure on the TRAINING data, brought into (0, 1), to the method."""
        figures = self._figures("train")
        self.first_figures = self.first_figures or figures
        report = {}
        for task in self.tasks:
            metric, value = next(iter(figures[task].items()))
            if self.problem.tasks[task][metric] == "max":
                report[task] = min(max(value, 0.0), 1.0)
            else:
                start = self.first_figures[task][metric]
                report[task] = start / (start + value) if start > 0 else 0.5
        for child in self.method.modules():
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

    def _line(self) -> str:
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
        best = max(tested, key=lambda row: score(self.problem.tasks, row["test"]))
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
                "parameters": sum(p.numel() for p in self.model.parameters()),
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
    training = _Training(fixed_weights(job, root))
    division = training.division
    if division.agreed(checkpoint.exists):
        training.load(checkpoint)
    division.wait()  # until all have read it: process 0 may be about to delete it

    def say(fraction: float, text: str) -> None:
        progress(job.event(fraction, text))

    say(training.epoch / job.settings["epochs"], training._line())
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
            say(training.epoch / job.settings["epochs"], training._line())
    if not division.first:
        return
    training.peak_mb = max(training.peak_mb, memory.peak_mb)
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
        return ": ".join([type(error).__name__, *([str(error)] if str(error) else [])])
    return None


def unfinished(jobs: Sequence[Job], root: Path, progress: Progress) -> list[Job]:
    """The jobs without a result, in order; the others are reported as finished before."""
    pending = []
    for job in jobs:
        if (job.directory(root) / "result.json").exists():
            progress(job.end(before=True))
        else:
            pending.append(job)
    return pending
