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

import torch

from detente.benchmark.job import Event, Job, Progress
from detente.benchmark.training import unfinished, work

__all__ = ["TRIES", "run"]

TRIES = 3
"""How often a job is begun whose process dies under it."""


def run(jobs: Sequence[Job], root: Path, processes: int, progress: Progress) -> dict[str, str]:
    """Run what is not finished yet, in ``processes`` worker processes.

    Returns:
        Errors by job, ``{"cagrad seed 0": "..."}``; the other jobs have finished.
    """
    pending = deque(unfinished(jobs, root, progress))
    errors: dict[str, str] = {}
    tries: dict[str, int] = {}
    workers = [_Worker(root) for _ in range(min(processes, len(pending)))]

    def finish(job: Job, error: str | None) -> None:
        event = job.end(error)
        if error is not None:
            errors[event.title] = error
        progress(event)

    def lost(worker: _Worker) -> None:
        job = worker.job
        workers[workers.index(worker)] = _Worker(root)
        if job is None:
            return
        name, how = job.title, worker.ending()
        tries[name] = tries.get(name, 0) + 1
        if tries[name] < TRIES:
            progress(job.retry(f"its process ended ({how})"))
            pending.appendleft(job)
        else:
            finish(job, f"its process ended {TRIES} times, the last time with {how}")

    try:
        while pending or any(worker.job for worker in workers):
            for worker in workers:
                if worker.job is None and pending:
                    worker.begin(pending.popleft())
            ready = wait([part for worker in workers for part in (worker.pipe, worker.process.sentinel)])
            for worker in list(workers):
                try:
                    while worker.pipe.poll():
                        heard = worker.pipe.recv()
                        if isinstance(heard, Event):
                            progress(heard)
                        else:
                            job, worker.job = worker.job, None
                            assert job is not None
                            finish(job, heard or None)
                    gone = worker.process.sentinel in ready
                except (EOFError, OSError):
                    gone = True
                if gone:
                    lost(worker)
    finally:
        for worker in workers:
            worker.end()
    return errors


class _Worker:
    """A process that takes one job after another."""

    def __init__(self, root: Path) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, other = context.Pipe()
        self.process = context.Process(target=_serve, args=(other, root), daemon=True)
        self.process.start()
        other.close()
        self.job: Job | None = None

    def begin(self, job: Job) -> None:
        self.job = job
        try:
            self.pipe.send(job)
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


def _serve(pipe: Connection, root: Path) -> None:
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
            job = pipe.recv()
        except EOFError:
            return
        pipe.send(work(job, root, pipe.send) or "")
