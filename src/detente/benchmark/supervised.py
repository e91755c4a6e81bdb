"""Training on a data set: shuffled batches, all tasks' losses from each, an evaluation after every epoch."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler, Sampler, TensorDataset

from detente.benchmark.device import Elsewhere, clock, moved
from detente.benchmark.division import Division
from detente.benchmark.job import Job
from detente.benchmark.log import Log
from detente.benchmark.problem import Problem
from detente.benchmark.randomness import random_state, seed, set_random_state
from detente.benchmark.training import Training, loaded_problem
from detente.method import Method
from detente.methods import AutoLambda
from detente.nn import active_task, convert_task_norm
from detente.step import step

__all__ = ["Supervised"]


# kept for the worker's next job
@lru_cache(maxsize=2)
def _data(source: str, directory: str | None, settings: tuple[tuple[str, Any], ...]) -> dict[str, Dataset[Any]]:
    return loaded_problem(source).make_data(dict(settings), None if directory is None else Path(directory))


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


def _evaluate(
    problem: Problem,
    model: nn.Module,
    data: Dataset[Any],
    tasks: tuple[str, ...],
    per_task: bool,
    device: torch.device,
) -> dict[str, dict[str, float]]:
    was_training = model.training
    model.eval()
    used = model if device.type == "cpu" else Elsewhere(model, device).eval()
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


def _cast(device: torch.device, dtype: torch.dtype, _: nn.Module, inputs: Any, named: Any) -> Any:
    return moved(inputs, device, dtype), moved(named, device, dtype)


class Supervised(Training):
    """A training on a data set."""

    def __init__(self, job: Job) -> None:
        super().__init__(job)
        wanted = self.problem.data_settings(job.settings)
        self.data = _data(job.problem, job.data, tuple(sorted(wanted.items())))
        self.samples = len(self.division.part(range(job.settings["batch_size"])))
        self.dtype = torch.float64 if job.settings["precision"] == "float64" else None
        seed(job.seed)
        self.model = self.problem.make_model(self.tasks, job.settings)
        if self.per_task:
            convert_task_norm(self.model, self.tasks)
        self.model.to(self.device, self.dtype)
        if self.dtype is not None:  # inputs that are made of a batch, or brought by metrics
            self.model.register_forward_pre_hook(partial(_cast, self.device, self.dtype), with_kwargs=True)
        self.division.join(self.model)
        self.method = self.spec.build(self.model, job.settings["epochs"], job.seed)
        self.optimizer = self.problem.make_optimizer(self.model, job.settings)
        self.scheduler = self.problem.make_scheduler(self.optimizer, job.settings)
        self.clip(self.optimizer)
        self.shuffling = torch.Generator().manual_seed(job.seed)
        # Auto-Lambda looks at a second shuffled pass of the training data
        self.second = torch.Generator().manual_seed(job.seed + 1)
        self._second_pass: Iterator[Any] = iter(())
        if isinstance(self.method, AutoLambda):
            self.method.meta = self._second_losses
        self.saved |= {"model": self.model, "optimizer": self.optimizer, "method": self.method}
        self.saved |= {} if self.scheduler is None else {"scheduler": self.scheduler}
        self.generators |= {"shuffling": self.shuffling, "second": self.second}

    @property
    def methods(self) -> Sequence[Method]:
        return (self.method,)

    @property
    def parameters(self) -> int:
        return sum(p.numel() for p in self.model.parameters())

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

    def _labelled(self, batch: Any) -> bool:
        """Whether a batch has samples of any of the tasks, on any process; a single task may have none."""
        if not self.problem.counts_declared:
            return True
        return self.division.any(any(self.problem.counts(batch, self.tasks, self.samples).values()))

    def _second_losses(self, tasks: tuple[str, ...] | None = None) -> dict[str, Tensor]:
        batch = self._moved(next(self._second_pass))
        return self._losses(self.model, batch, self.tasks if tasks is None else tasks)

    def _moved(self, batch: Any) -> Any:
        return moved(batch, self.device, self.dtype)

    def _batches(self, generator: torch.Generator) -> DataLoader[Any]:
        size = self.job.settings["batch_size"]
        return _batches(self.data["train"], size, generator, self.division, self.problem.collate)

    def warm_up(self) -> None:
        before = random_state(self.device)
        batch = self._moved(next(iter(self._batches(torch.Generator()))))
        model = copy.deepcopy(self.model)
        for task in self.tasks:
            with active_task(task):
                for loss in self._losses(model, batch, (task,)).values():
                    loss.backward()  # type: ignore[no-untyped-call]
        set_random_state(before, self.device)

    def train_epoch(self, log: Log, progress: Callable[[float], None]) -> None:
        own = self.division.seed()
        if own is not None:
            seed(own)
        loader = self._batches(self.shuffling)
        self._second_pass = iter(self._batches(self.second))
        self.model.train()
        for k, batch in enumerate(loader):
            if not self._labelled(batch):
                continue
            here = self._moved(batch)
            probing = k % self.job.settings["probe_every"] == 0
            log.step()
            start = clock(self.device)
            probed = self.model.parameters() if probing else None
            closure = self.closure(partial(self._losses, self.model, here), log, probed)
            update = step(closure, self.optimizer, self.method, counts=self.counts)
            if not probing:
                self.step_times.append(1000 * (clock(self.device) - start))
            log.update(update)
            progress((k + 1) / len(loader))

    def figures(self, split: str) -> dict[str, dict[str, float]]:
        return self.division.agreed(
            lambda: _evaluate(self.problem, self.model, self.data[split], self.tasks, self.per_task, self.device)
        )

    def end_epoch(self, found: float) -> None:
        if isinstance(self.scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
            self.scheduler.step(found)
        elif self.scheduler is not None:
            self.scheduler.step()
