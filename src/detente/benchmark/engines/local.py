"""Worker processes on this machine, one thread each; one that dies is replaced and its job goes on."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch

from detente.benchmark.job import Event, Job, Progress
from detente.benchmark.training import unfinished, work

__all__ = ["TRIES", "Local"]

TRIES = 3
"""How often a job is begun whose process dies under it."""


class Local:
    """Runs jobs in up to ``processes`` worker processes, which are kept from one call to the next.

    A context manager: leaving it ends the workers.
    """

    def __init__(self, processes: int) -> None:
        self.processes = processes
        self.workers: list[_Worker] = []

    def __enter__(self) -> Local:
        return self

    def __exit__(self, *_: Any) -> None:
        for worker in self.workers:
            worker.end()
        self.workers = []

    def __call__(self, jobs: Sequence[Job], root: Path, progress: Progress) -> dict[str, str]:
        """Run what is not finished yet.

        Returns:
            Errors by job, ``{"cagrad seed 0": "..."}``; the other jobs have finished.
        """
        pending = deque(unfinished(jobs, root, progress))
        self.workers += [_Worker() for _ in range(min(self.processes, len(pending)) - len(self.workers))]
        errors: dict[str, str] = {}
        tries: dict[str, int] = {}

        def finish(job: Job, error: str | None) -> None:
            if error is not None:
                errors[job.title] = error
            progress(job.end(error))

        def replace(worker: _Worker) -> None:
            job, how = worker.job, worker.ending()
            self.workers[self.workers.index(worker)] = _Worker()
            if job is None:
                return
            tries[job.title] = tries.get(job.title, 0) + 1
            if tries[job.title] < TRIES:
                progress(job.retry(f"its process ended ({how})"))
                pending.appendleft(job)
            else:
                finish(job, f"its process ended {TRIES} times, the last time with {how}")

        while pending or any(worker.job for worker in self.workers):
            for worker in self.workers:
                if worker.job is None and pending:
                    worker.begin(pending.popleft(), root)
            ready = wait([part for worker in self.workers for part in (worker.pipe, worker.process.sentinel)])
            for worker in list(self.workers):
                gone = worker.process.sentinel in ready
                try:
                    while worker.pipe.poll():
                        heard = worker.pipe.recv()
                        if isinstance(heard, Event):
                            progress(heard)
                        elif worker.job is not None:
                            job, worker.job = worker.job, None
                            finish(job, heard or None)
                except (EOFError, OSError):
                    gone = True
                if gone:
                    replace(worker)
        return errors


class _Worker:
    """A process that takes one job after another."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, other = context.Pipe()
        self.process = context.Process(target=_serve, args=(other,), daemon=True)
        self.process.start()
        other.close()
        self.job: Job | None = None

    def begin(self, job: Job, root: Path) -> None:
        self.job = job
        try:
            self.pipe.send((job, root))
        except OSError:
            return  # it has died; its sentinel tells

    def ending(self) -> str:
        """What the process ended with."""
        self.process.join()
        code = self.process.exitcode or 0
        return f"signal {-code}" if code < 0 else f"exit code {code}"

    def end(self) -> None:
        self.pipe.close()  # an idle one reads the end of the pipe
        if self.job is not None:
            self.process.kill()
        self.process.join()


def _serve(pipe: Connection) -> None:
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides; see the watch below
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        wait([parent.sentinel])
        os._exit(1)  # the parent was killed: a resumed comparison must find nobody writing to its runs

    threading.Thread(target=watch, daemon=True).start()
    while True:
        try:
            job, root = pipe.recv()
        except EOFError:
            return
        pipe.send(work(job, root, pipe.send) or "")
