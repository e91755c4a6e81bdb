"""Runs of a comparison on several processes each, which torchrun starts.

The command stays the only process that is talked to: it starts torchrun, reads from a pipe what the processes report,
and ends them by closing another one, which also happens when it is killed. torchrun starts this module.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from detente.benchmark.job import Event, Job, Progress
from detente.benchmark.training import unfinished, work

__all__ = ["Torchrun", "check_launcher"]

ALONE = "failed alone"
"""Text of an event: a process failed, and others wait for it."""


def check_launcher(name: str) -> None:
    """Raise where there is no such launcher."""
    if name != "torchrun":
        raise ValueError(f"unknown launcher {name!r}. The only one is torchrun: --launch torchrun.")
    if not dist.is_available() or not dist.is_gloo_available():
        raise ValueError(
            "this PyTorch was built without torch.distributed or its gloo backend, which --launch needs. Install "
            "another build, or leave out --launch."
        )


class Torchrun:
    """Runs one job after another, each on so many processes."""

    def __init__(self, processes: int) -> None:
        self.processes = processes

    def __enter__(self) -> Torchrun:
        return self

    def __exit__(self, *_: Any) -> None:
        """Nothing is left running between calls."""

    def __call__(self, jobs: Sequence[Job], root: Path, progress: Progress) -> dict[str, str]:
        """As :class:`detente.benchmark.engines.local.Local`.

        Raises:
            ChildProcessError: torchrun ended before any run had begun.
        """
        left = unfinished(jobs, root, progress)
        errors: dict[str, str] = {}

        def hear(event: Event) -> None:
            progress(event)
            if event.error is not None:
                errors[event.title] = event.error
            if event.ended:
                left[:] = [job for job in left if job.title != event.title]

        while left:
            begun = stuck = False
            with _started(left, root, self.processes) as torchrun:
                assert torchrun.stdout is not None
                for line in torchrun.stdout:
                    event = Event(**json.loads(line))
                    hear(event)
                    begun, stuck = True, event.text == ALONE
                    if stuck:
                        break  # others wait for the process that failed: new ones take what is left
            if not begun:
                raise ChildProcessError(
                    f"torchrun ended with {torchrun.returncode} before any run had begun; its messages say why."
                )
            if left and not stuck:
                hear(left[0].end(f"a process ended without a word (torchrun: {torchrun.returncode})"))
        return errors


@contextmanager
def _started(jobs: Sequence[Job], root: Path, processes: int) -> Iterator[subprocess.Popen[str]]:
    """torchrun, which ends with the block."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "jobs.json").write_text(json.dumps([asdict(job) for job in jobs]))
        torchrun = subprocess.Popen(
            [*command, "-m", "detente.benchmark.engines.torchrun", folder, str(root)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={"OMP_NUM_THREADS": "1", **os.environ},
            start_new_session=True,  # Ctrl-C is for this process alone, which ends the others quietly
        )
        with torchrun:
            try:
                yield torchrun
            except BaseException:
                torchrun.kill()
                raise
            finally:
                assert torchrun.stdin is not None
                torchrun.stdin.close()


# ---------------------------------------------------------------------------------------------------------------------
# In the processes that torchrun starts


def _main(folder: str, root: str) -> None:
    """Run the jobs with the other processes; process 0 reports."""
    threading.Thread(target=_end_with_the_command, daemon=True).start()
    rank, processes = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE"))
    reports = os.dup(1)
    os.dup2(2, 1)  # what a problem prints is no report
    if rank:
        silent = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silent, 1)
        os.dup2(silent, 2)

    def report(event: Event) -> None:
        os.write(reports, (json.dumps(asdict(event)) + "\n").encode())

    def report_first(event: Event) -> None:
        if rank == 0:
            report(event)

    torch.set_num_threads(1)
    jobs = [Job(**content) for content in json.loads(Path(folder, "jobs.json").read_text())]
    store = dist.FileStore(str(Path(folder, "store")), processes)  # type: ignore[attr-defined]
    for k, job in enumerate(jobs):
        if not dist.is_initialized():
            own = dist.PrefixStore(str(k), store)  # type: ignore[attr-defined]
            dist.init_process_group(_backend(processes), store=own, rank=rank, world_size=processes)
        report_first(job.event(0.0))
        error = work(job, Path(root), report_first)
        if error is None:
            report_first(job.end())
            continue
        everyone = [f"error {k} {r}" for r in range(processes)]
        store.set(everyone[rank], error)
        try:
            store.wait(everyone, timedelta(seconds=3))
        except RuntimeError:
            report(replace(job.end(error), text=ALONE))
            threading.Event().wait()  # for the command to end this process
        found = [store.get(key).decode() for key in everyone]
        report_first(job.end("; ".join(dict.fromkeys(found))))
        dist.destroy_process_group()  # what is on its way between the processes must not reach the next job
    if dist.is_initialized():
        dist.destroy_process_group()


def _end_with_the_command() -> None:
    os.read(0, 1)  # nothing is ever written: it ends when the command closes it or is gone
    os._exit(0)


def _backend(processes: int) -> str:
    if torch.cuda.device_count() < processes or not dist.is_nccl_available():
        return "gloo"
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    return "cpu:gloo,cuda:nccl"


if __name__ == "__main__":
    _main(*sys.argv[1:])
