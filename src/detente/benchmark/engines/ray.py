"""Ray: every job is a task on one CPU, on this machine or on a cluster that sees the same directory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from detente.benchmark.engines.local import TRIES
from detente.benchmark.job import Event, Job, Progress
from detente.benchmark.training import unfinished, work

__all__ = ["Ray"]


class Ray:
    """Runs jobs as Ray tasks, ``processes`` at a time; at an ``address``, one per CPU of that cluster.

    A context manager, within which Ray is connected.

    Raises:
        ImportError: Ray is not installed.
        ConnectionError: there is no cluster at the address, or none could be started.
    """

    def __init__(self, processes: int, address: str | None = None) -> None:
        try:
            import ray
        except ImportError as error:
            raise ImportError(
                "--engine ray needs Ray, which is not installed. Run: pip install 'detente[ray]'"
            ) from error
        self.ray: Any = ray
        self.options: dict[str, Any] = {"log_to_driver": False, "configure_logging": False}
        self.options |= {"num_cpus": processes, "include_dashboard": False} if address is None else {"address": address}

    def __enter__(self) -> Ray:
        self._connect(tries=1 if "address" in self.options else 2)  # half a minute is its limit on a busy machine
        self.task = self.ray.remote(num_cpus=1, max_retries=0)(_work)
        return self

    def _connect(self, tries: int) -> None:
        try:
            self.ray.init(**self.options)
        except Exception as error:  # it raises Exception itself
            self.ray.shutdown()
            if tries > 1:
                self._connect(tries - 1)
                return
            raise ConnectionError(
                f"Ray cannot be reached or started ({(str(error).splitlines() or [''])[0]}). Check --address, or run "
                "the same command with --engine local."
            ) from error

    def __exit__(self, *_: Any) -> None:
        self.ray.shutdown()

    def __call__(self, jobs: Sequence[Job], root: Path, progress: Progress) -> dict[str, str]:
        """As :class:`detente.benchmark.engines.local.Local`; of a job's progress nothing is heard before its end."""
        place = str(root.resolve())
        errors: dict[str, str] = {}
        running = {self.task.remote(job, place): (job, 1) for job in unfinished(jobs, root, progress)}
        for job, _ in running.values():
            progress(job.event(0.0, "handed to ray"))
        while running:
            done, _ = self.ray.wait(list(running), timeout=1.0)
            for reference in done:
                job, tries = running.pop(reference)
                try:
                    error = self.ray.get(reference)
                except self.ray.exceptions.RayError as gone:  # its worker or its machine is gone
                    how = (str(gone).splitlines() or [type(gone).__name__])[0]
                    if tries < TRIES:
                        progress(job.retry(f"its worker was lost ({how})"))
                        running[self.task.remote(job, place)] = (job, tries + 1)
                        continue
                    error = f"its worker was lost {TRIES} times: {how}"
                if error is not None:
                    errors[job.title] = error
                progress(job.end(error))
        return errors


def _work(job: Job, root: str) -> str | None:
    torch.set_num_threads(1)
    return work(job, Path(root), _unheard)


def _unheard(event: Event) -> None:
    """A task's news would need an actor of its own; its end is told by what it returns."""
