"""Ray: every job is a task on one CPU, on this machine or on a cluster that sees the same directory."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from detente.benchmark.engines.local import TRIES
from detente.benchmark.job import Event, Job, Progress
from detente.benchmark.training import unfinished, work

__all__ = ["run"]


def run(jobs: Sequence[Job], root: Path, processes: int, progress: Progress, address: str | None) -> dict[str, str]:
    """Run what is not finished yet, ``processes`` jobs at a time; at an ``address``, one per CPU of the cluster.

    Returns:
        As :func:`detente.benchmark.engines.local.run`.

    Raises:
        ImportError: Ray is not installed.
        ConnectionError: there is no cluster at the address.
    """
    pending = unfinished(jobs, root, progress)
    errors: dict[str, str] = {}
    if not pending:
        return errors
    ray = _ray()
    if address is None:
        ray.init(num_cpus=processes, include_dashboard=False, log_to_driver=False, configure_logging=False)
    else:
        ray.init(address=address, log_to_driver=False, configure_logging=False)
    try:
        task = ray.remote(num_cpus=1, max_retries=0)(_work)
        source = str(Path(__file__).parents[3])
        running = {task.remote(job, str(root.resolve()), source): (job, 1) for job in pending}
        for job in pending:
            progress(job.event(0.0, "handed to ray"))
        while running:
            done, _ = ray.wait(list(running), timeout=1.0)
            for reference in done:
                job, tries = running.pop(reference)
                try:
                    error = ray.get(reference)
                except ray.exceptions.RayError as gone:  # its worker or its machine is gone
                    how = (str(gone).splitlines() or [type(gone).__name__])[0]
                    if tries < TRIES:
                        progress(job.retry(f"its worker was lost ({how})"))
                        running[task.remote(job, str(root.resolve()), source)] = (job, tries + 1)
                        continue
                    error = f"its worker was lost {TRIES} times: {how}"
                event = job.end(error)
                if error is not None:
                    errors[event.title] = error
                progress(event)
    finally:
        ray.shutdown()
    return errors


def _work(job: Job, root: str, source: str) -> str | None:
    torch.set_num_threads(1)
    return work(job, Path(root), _unheard)


def _unheard(event: Event) -> None:
    """Ray brings back what a task returns, and nothing before."""


def _ray() -> Any:
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        import ray
    except ImportError as error:
        raise ImportError("--engine ray needs Ray, which is not installed. Run: pip install 'detente[ray]'") from error
    return ray
