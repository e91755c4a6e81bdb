"""Runs a comparison: one job per method and seed and per single-task baseline and seed, each resumable.

A directory holds one comparison: ``comparison.json`` (what was asked for), and ``runs/<label>/seed-<k>`` with the job's
``checkpoint.pt`` while it trains and ``result.json`` when it is done. Results are written whole or not at all, so a
comparison killed at any moment goes on with the same command.
"""

from __future__ import annotations

import copy
import math
import multiprocessing
import multiprocessing.connection
import os
import platform
import random
import signal
import statistics
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler, TensorDataset

import detente
from detente.benchmark.files import describe, read_checkpoint, write_checkpoint, write_json
from detente.benchmark.memory import PeakMemory
from detente.benchmark.problem import Problem, load_problem
from detente.benchmark.results import read_config
from detente.benchmark.specs import Spec
from detente.diagnostics import task_gramian
from detente.gramian import cosines
from detente.method import Method, method_class
from detente.methods import DTP, AutoLambda
from detente.nn import active_task, convert_task_norm
from detente.step import step

__all__ = ["Event", "Job", "Progress", "jobs_of", "prepare", "run_jobs"]


@dataclass(frozen=True)
class Job:
    """One training: a method on all tasks (``task`` None), or plain training on one task.

    Attributes:
        problem: name or path, as given to :func:`load_problem`.
        label: the method's text, or ``single``.
        task: the task of a single-task baseline.
        seed: of initialisation, data order and the method's draws.
        settings: epochs, batch size, learning rate, ...
    """

    problem: str
    label: str
    task: str | None
    seed: int
    settings: dict[str, Any]

    @property
    def name(self) -> str:
        """Name of the run, also of its directory."""
        return self.label if self.task is None else f"single-{self.task}"

    def directory(self, root: Path) -> Path:
        return root / "runs" / self.name / f"seed-{self.seed}"


@dataclass(frozen=True)
class Event:
    """News of a job: ``fraction`` of it done, a line of current figures, or the error that ended it."""

    job: str
    seed: int
    fraction: float
    text: str = ""
    error: str | None = None


Progress = Callable[[Event], None]


def jobs_of(problem: Problem, specs: Sequence[Spec], seeds: Iterable[int], settings: dict[str, Any]) -> list[Job]:
    """All jobs of a comparison, seed by seed, baselines first."""
    return [
        job
        for seed in seeds
        for job in [
            *(Job(problem.source, "single", task, seed, settings) for task in problem.tasks),
            *(Job(problem.source, spec.label, None, seed, settings) for spec in specs),
        ]
    ]


def prepare(
    root: Path, problem: Problem, specs: Sequence[Spec], seeds: Sequence[int], settings: dict[str, Any], command: str
) -> dict[str, Any]:
    """Write down what is asked for, or check that the directory holds this comparison; methods and seeds may be added.

    Raises:
        ValueError: the directory holds another comparison.
    """
    content: dict[str, Any] = {
        "problem": problem.name,
        "source": problem.source,
        "digest": problem.digest,
        "tasks": problem.tasks,
        "settings": settings,
        "methods": [*([] if problem.whole else ["single"]), *(spec.label for spec in specs)],
        "seeds": list(seeds),
        "command": command,
        "environment": {
            "detente": detente.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        },
    }
    if (root / "comparison.json").exists():
        before = read_config(root / "comparison.json")
        for key in ("problem", "digest", "settings"):
            if before.get(key) != content[key]:
                what = "the problem's code" if key == "digest" else key
                raise ValueError(
                    f"{root} holds another comparison: {what} was {_differing(before.get(key), content[key])}. "
                    "Choose another --out, or delete the directory."
                )
        content["methods"] = list(dict.fromkeys([*before["methods"], *content["methods"]]))
        content["seeds"] = sorted({*before["seeds"], *content["seeds"]})
    write_json(root / "comparison.json", content)
    return content


def _differing(before: Any, now: Any) -> str:
    if isinstance(before, dict) and isinstance(now, dict):
        keys = sorted(k for k in {*before, *now} if before.get(k) != now.get(k))
        return ", ".join(f"{k} = {before.get(k)!r} and is now {now.get(k)!r}" for k in keys)
    return f"{before!r} and is now {now!r}"


# ---------------------------------------------------------------------------------------------------------------------
# One job


@lru_cache(maxsize=2)
def _loaded(source: str) -> tuple[Problem, dict[str, Dataset[Any]]]:
    problem = load_problem(source)
    return problem, problem.make_data()


def _batches(data: Dataset[Any], size: int, generator: torch.Generator) -> DataLoader[Any]:
    if len(data) < size:  # type: ignore[arg-type]
        raise ValueError(
            f"batch_size is {size} but the training split has {len(data)} samples. "  # type: ignore[arg-type]
            "Lower batch_size."
        )
    sampler = RandomSampler(data, generator=generator)  # type: ignore[arg-type]
    if isinstance(data, TensorDataset):  # one index operation per batch instead of one per sample
        return DataLoader(data, sampler=BatchSampler(sampler, size, drop_last=True), batch_size=None)
    return DataLoader(data, batch_size=size, sampler=sampler, drop_last=True)


class _Log:
    """Figures of the running epoch: mean losses, weights, norms and cosines."""

    def __init__(self, tasks: Sequence[str]) -> None:
        self.tasks = tasks
        self.losses: dict[str, Tensor] = {t: torch.zeros((), dtype=torch.float64) for t in tasks}
        self.weights: dict[str, Tensor] = {t: torch.zeros((), dtype=torch.float64) for t in tasks}
        self.steps = 0
        self.gramians: list[Tensor] = []

    def loss(self, losses: Mapping[str, Tensor]) -> None:
        for task, loss in losses.items():
            self.losses[task] += loss.detach().double()

    def row(self, epoch: int) -> dict[str, Any]:
        steps = max(self.steps, 1)
        entry: dict[str, Any] = {
            "epoch": epoch,
            "steps": self.steps,
            "loss": {t: float(v) / steps for t, v in self.losses.items()},
            "weights": {t: float(v) / steps for t, v in self.weights.items()},
            "norms": None,
            "cosine": None,
            "conflict_rate": None,
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


def _score(problem: Problem, figures: dict[str, dict[str, float]]) -> float:
    """What the best epoch is chosen by: the mean logarithm of the validation figures, errors negated.

    The change of this score is, to first order, delta-m, without needing a baseline.
    """
    terms = [
        (1 if problem.tasks[task][metric] == "max" else -1) * math.log(max(value, 1e-12))
        for task, values in figures.items()
        for metric, value in values.items()
    ]
    return sum(terms) / len(terms)


def _evaluate(
    problem: Problem, model: nn.Module, data: Dataset[Any], tasks: tuple[str, ...], per_task: bool
) -> dict[str, dict[str, float]]:
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            if not per_task:
                return problem.metrics(model, data, tasks)
            figures = {}
            for task in tasks:
                with active_task(task):
                    figures.update(problem.metrics(model, data, (task,)))
            return figures
    finally:
        model.train(was_training)


def _random_state() -> dict[str, Any]:
    name, keys, *rest = np.random.get_state()  # noqa: NPY002
    assert isinstance(keys, np.ndarray)
    return {"torch": torch.get_rng_state(), "numpy": [str(name), keys.tolist(), *rest], "python": random.getstate()}


def _set_random_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))  # noqa: NPY002
    random.setstate(state["python"])


class _Training:
    """The state of one job between epochs: everything that a checkpoint holds."""

    PLAIN = ("history", "best", "reached", "step_times", "peak_mb", "first_figures")
    """Attributes that are saved as they are."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.problem, self.data = _loaded(job.problem)
        self.tasks = tuple(self.problem.tasks) if job.task is None else (job.task,)
        torch.manual_seed(job.seed)
        np.random.seed(job.seed)  # noqa: NPY002
        random.seed(job.seed)
        self.model = self.problem.make_model(self.tasks)
        self.spec = Spec.parse("gd" if job.task is not None else job.label)
        self.per_task = "model" in method_class(self.spec.method).needs
        if self.per_task:
            convert_task_norm(self.model, self.tasks)
        self.method: Method = self.spec.build(self.model, job.settings["epochs"], job.seed)
        self.optimizer = self.problem.make_optimizer(self.model, job.settings)
        self.generator = torch.Generator().manual_seed(job.seed)
        self.history: list[dict[str, Any]] = []
        self.best: dict[str, Any] = {"score": -math.inf, "epoch": 0, "metrics": {}}
        self.reached: dict[str, int] = {}
        self.step_times: list[float] = []
        self.peak_mb = 0.0
        self.first_figures: dict[str, dict[str, float]] = {}
        self.diverged: dict[str, Any] | None = None
        self._probing = False
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
            "method": self.method.state_dict(),
            "generator": self.generator.get_state(),
            "second": self.second.get_state(),
            "random": _random_state(),
        }
        write_checkpoint(path, content | {key: getattr(self, key) for key in self.PLAIN})

    def load(self, path: Path) -> None:
        with read_checkpoint(path) as saved:
            if saved["job"] != asdict(self.job):
                raise ValueError("it belongs to another job")
            self.model.load_state_dict(saved["model"])
            self.optimizer.load_state_dict(saved["optimizer"])
            self.method.load_state_dict(saved["method"])
            self.generator.set_state(saved["generator"])
            self.second.set_state(saved["second"])
            _set_random_state(saved["random"])
            for key in self.PLAIN:
                setattr(self, key, saved[key])

    # -- training

    @property
    def epoch(self) -> int:
        return len(self.history)

    def _closure(self, batch: Any, log: _Log) -> Callable[..., dict[str, Tensor]]:
        seen: set[str] = set()  # some methods compute losses several times per step; the first time counts

        def closure(tasks: tuple[str, ...] | None = None) -> dict[str, Tensor]:
            wanted = tasks or self.tasks
            losses: dict[str, Tensor] = {}
            if self.per_task:
                for task in wanted:
                    with active_task(task):
                        losses.update(self.problem.losses(self.model, batch, (task,)))
            else:
                losses = self.problem.losses(self.model, batch, wanted)
            log.loss({task: loss for task, loss in losses.items() if task not in seen})
            if self._probing and len(losses) > 1 and not seen:
                gramian = task_gramian(losses)
                if gramian is not None:
                    log.gramians.append(gramian)
            seen.update(losses)
            return losses

        return closure

    def _second_losses(self, tasks: tuple[str, ...] | None = None) -> dict[str, Tensor]:
        return self.problem.losses(self.model, next(self._second_pass), tasks or self.tasks)

    def warm_up(self) -> None:
        """One backward pass on a copy, so that one-time allocations of the libraries do not count as the job's."""
        before = _random_state()
        batch = next(iter(_batches(self.data["train"], self.job.settings["batch_size"], torch.Generator())))
        model = copy.deepcopy(self.model)
        for task in self.tasks:
            with active_task(task):
                self.problem.losses(model, batch, (task,))[task].backward()  # type: ignore[no-untyped-call]
        _set_random_state(before)

    def run_epoch(self, progress: Callable[[float, str], None]) -> None:
        settings = self.job.settings
        log = _Log(self.tasks)
        loader = _batches(self.data["train"], settings["batch_size"], self.generator)
        self._second_pass = iter(_batches(self.data["train"], settings["batch_size"], self.second))
        count = len(loader)
        self.model.train()
        said = time.monotonic()
        for k, batch in enumerate(loader):
            self._probing = k % settings["probe_every"] == 0
            start = time.process_time()
            update = step(self._closure(batch, log), self.optimizer, self.method)
            if not self._probing:
                self.step_times.append(1000 * (time.process_time() - start))
            log.steps += 1
            for task, weight in update.weights.items():
                log.weights[task] += weight.double().mean()
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
        row["val"] = _evaluate(self.problem, self.model, self.data["val"], self.tasks, self.per_task)
        self.history.append(row)
        self._reach(row["val"])
        score = _score(self.problem, row["val"])
        if score > self.best["score"] or not self.best["metrics"]:
            test = _evaluate(self.problem, self.model, self.data["test"], self.tasks, self.per_task)
            self.best = {"score": score if math.isfinite(score) else -math.inf, "epoch": self.epoch, "metrics": test}
        self.step_times = self.step_times[-2000:]

    def _observe_metrics(self) -> None:
        """Report each task's first figure on the TRAINING data, brought into (0, 1), to the method."""
        figures = _evaluate(self.problem, self.model, self.data["train"], self.tasks, self.per_task)
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
        target = self.problem.target
        stop = target is not None and all(t in self.reached for t in self.tasks if t in target)
        return stop or self.epoch >= self.job.settings["epochs"]

    def _line(self) -> str:
        if not self.history:
            return ""
        first = {task: next(iter(figures.values())) for task, figures in self.history[-1]["val"].items()}
        return "  ".join(f"{task} {value:.3g}" for task, value in first.items())

    def result(self) -> dict[str, Any]:
        metrics = {t: dict(v) for t, v in self.best["metrics"].items()}
        for task in self.tasks:
            if "epochs" in self.problem.tasks[task] and self.problem.target:
                metrics[task]["epochs"] = float(self.reached.get(task, self.job.settings["epochs"]))
        if self.diverged is not None:
            metrics = {t: dict.fromkeys(self.problem.tasks[t], math.nan) for t in self.tasks}
        rated = [(r["conflict_rate"], r["probes"]) for r in self.history if r["conflict_rate"] is not None]
        return {
            "problem": self.problem.name,
            "method": "single" if self.job.task else self.spec.method,
            "label": self.job.label,
            "seed": self.job.seed,
            "task": self.job.task,
            "metrics": metrics,
            "diverged": self.diverged,
            "selected_epoch": self.best["epoch"],
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


def _run(job: Job, root: Path, progress: Progress) -> None:
    directory = job.directory(root)
    directory.mkdir(parents=True, exist_ok=True)
    checkpoint = directory / "checkpoint.pt"
    training = _Training(job)
    if checkpoint.exists():
        training.load(checkpoint)

    def say(fraction: float, text: str) -> None:
        progress(Event(job.name, job.seed, fraction, text))

    say(training.epoch / job.settings["epochs"], training._line())
    training.warm_up()
    saved = time.monotonic()
    with PeakMemory() as memory:
        while not training.done():
            try:
                training.run_epoch(say)
            except FloatingPointError as error:
                training.diverge(error)
                break
            # an epoch may take milliseconds; losing two seconds of work is cheaper than writing each
            if time.monotonic() - saved > 2:
                training.save(checkpoint)
                saved = time.monotonic()
            say(training.epoch / job.settings["epochs"], training._line())
    training.peak_mb = max(training.peak_mb, memory.peak_mb)
    write_json(directory / "result.json", training.result())
    for leftover in (checkpoint, directory / "error.txt"):
        leftover.unlink(missing_ok=True)


# ---------------------------------------------------------------------------------------------------------------------
# Many jobs

_queue: Any = None


def _start_worker(queue: Any) -> None:
    """Prepare a worker process: one thread, and no life beyond its parent's."""
    global _queue
    _queue = queue
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides; see the watch below
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)  # the parent was killed: a resumed comparison must find nobody writing to its runs

    threading.Thread(target=watch, daemon=True).start()


def _work(job: Job, root: Path) -> str | None:
    """Run a job in a worker; the error's text if it failed."""
    try:
        _run(job, root, _queue.put)
    except Exception as error:
        trace = traceback.format_exc()
        (job.directory(root) / "error.txt").write_text(trace)
        return ": ".join([type(error).__name__, *([str(error)] if str(error) else [])])
    return None


def run_jobs(jobs: Sequence[Job], root: Path, processes: int, progress: Progress) -> dict[str, str]:
    """Run what is not finished yet, in ``processes`` worker processes of one thread each.

    Returns:
        Errors by job, ``{"cagrad seed 0": "..."}``; the other jobs have finished.
    """
    pending = []
    for job in jobs:
        if (job.directory(root) / "result.json").exists():
            progress(Event(job.name, job.seed, 1.0, "finished before"))
        else:
            pending.append(job)
    errors: dict[str, str] = {}
    if not pending:
        return errors
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    pool = ProcessPoolExecutor(
        min(processes, len(pending)), mp_context=context, initializer=_start_worker, initargs=(queue,)
    )
    try:
        futures: dict[Future[str | None], Job] = {pool.submit(_work, job, root): job for job in pending}
        waiting = set(futures)
        while waiting:
            done, waiting = wait(waiting, timeout=0.1, return_when=FIRST_COMPLETED)
            for event in _drain(queue):
                progress(event)
            for future in done:
                job = futures[future]
                failure = future.exception()
                error = describe(failure) if failure else future.result()
                if error is not None:
                    errors[f"{job.name} seed {job.seed}"] = error
                progress(Event(job.name, job.seed, 1.0, "" if error is None else "failed", error))
    finally:
        # after an interrupt nothing that still waits is begun
        pool.shutdown(wait=False, cancel_futures=True)
    return errors


def _drain(queue: Any) -> Iterator[Event]:
    while not queue.empty():
        yield queue.get()
