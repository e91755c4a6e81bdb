"""Workers that die: their jobs go on in others, and the tables are those of an undisturbed run."""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from pathlib import Path

import pytest

from benchmark.command import alive, children, results, run, started, until
from detente.benchmark.engines.local import TRIES, Local
from detente.benchmark.job import Event, Job
from detente.benchmark.plan import Plan
from detente.benchmark.problem import load_problem
from detente.benchmark.specs import parse_methods

TINY = Path(__file__).parents[1] / "tiny_problem.py"
linux = pytest.mark.skipif(sys.platform != "linux", reason="looks processes up in /proc")


def jobs(problem: Path, epochs: int, seeds: int = 1) -> list[Job]:
    loaded = load_problem(str(problem))
    return Plan(loaded, parse_methods("pcgrad"), range(seeds), loaded.settle({"epochs": epochs})).jobs()[0]


def test_jobs_run_in_workers_that_are_kept_from_one_call_to_the_next(tmp_path):
    heard: list[Event] = []
    todo = jobs(TINY, 2, seeds=2)
    with Local(2) as engine:
        assert engine(todo[:4], tmp_path, heard.append) == {}
        workers = [worker.process.pid for worker in engine.workers]
        assert engine(todo, tmp_path, heard.append) == {}
        assert [worker.process.pid for worker in engine.workers] == workers
    ended = [(event.title, event.text) for event in heard if event.ended]
    assert sorted(ended) == sorted(
        [(job.title, "done") for job in todo] + [(j.title, "finished before") for j in todo[:4]]
    )
    assert len(results(tmp_path)) == len(todo)


def variant(path: Path, *lines: str) -> Path:
    """The tiny problem, with lines at the start of its losses."""
    start = "    x, total, sign = batch\n"
    text = TINY.read_text()
    assert start in text
    path.write_text(text.replace(start, "".join(f"    {line}\n" for line in lines) + start))
    return path


def test_an_error_of_a_job_is_told_and_the_others_finish(tmp_path):
    problem = variant(tmp_path / "odd.py", "assert len(model.heads) > 1")
    with Local(1) as engine:
        errors = engine(jobs(problem, 2), tmp_path, lambda _: None)
    assert set(errors) == {"single-sum seed 0", "single-sign seed 0"}
    assert all("AssertionError" in error for error in errors.values())
    assert len(results(tmp_path)) == 2


def test_a_job_whose_worker_is_killed_goes_on_in_another(tmp_path):
    mark = tmp_path / "mark"
    once = f"if len(model.heads) > 1 and not os.path.exists({str(mark)!r}):"
    problem = variant(
        tmp_path / "killed.py", once, f"    open({str(mark)!r}, 'w').close()", "    os.kill(os.getpid(), 9)"
    )
    heard: list[Event] = []
    with Local(2) as engine:
        assert engine(jobs(problem, 2), tmp_path / "out", heard.append) == {}
        engine(jobs(TINY, 2), tmp_path / "whole", lambda _: None)
    (retried,) = [event for event in heard if event.retried]
    assert "signal 9" in retried.text
    found = [{**result, "problem": "tiny_problem"} for result in results(tmp_path / "out").values()]
    assert found == list(results(tmp_path / "whole").values())


def test_a_job_that_kills_every_worker_is_given_up_and_told(tmp_path):
    problem = variant(tmp_path / "deadly.py", "if list(model.heads) == ['sum']:", "    os.kill(os.getpid(), 9)")
    heard: list[Event] = []
    with Local(1) as engine:
        errors = engine(jobs(problem, 2), tmp_path, heard.append)
    assert list(errors) == ["single-sum seed 0"]
    assert f"its process ended {TRIES} times, the last time with signal 9" in errors["single-sum seed 0"]
    assert sum(event.retried for event in heard) == TRIES - 1
    assert len(results(tmp_path)) == 3


def kill_at_random(out: Path, options: tuple[str, ...], times: int) -> int:
    """Kill the driver, and before it a worker, at random moments; how many workers were hit while they worked."""
    moments = random.Random(3)
    hit = 0
    for _ in range(times):
        with started(TINY, out, *options) as process:
            until(lambda: spawned(process.pid), "workers start", process)
            time.sleep(moments.uniform(0.0, 4.0))
            for victim in sorted(spawned(process.pid))[:1]:
                os.kill(victim, signal.SIGKILL)
                hit += 1
            time.sleep(moments.uniform(0.0, 3.0))
            workers = spawned(process.pid)
            process.kill()
            process.wait()
            until(lambda: not any(map(alive, workers)), "the workers of the killed process die")  # noqa: B023
    return hit


def spawned(pid: int) -> set[int]:
    """Worker processes: children that run multiprocessing's spawned main."""
    found = set()
    for child in children(pid):
        try:
            command = Path(f"/proc/{child}/cmdline").read_bytes()
        except OSError:
            continue
        if b"spawn_main" in command:
            found.add(child)
    return found


@linux
@pytest.mark.long
def test_driver_and_worker_killed_ten_times_at_random_moments_the_tables_are_the_same(tmp_path):
    options = ("--methods", "pcgrad,connection_strength", "--seeds", "3", "--epochs", "40")
    whole = run("compare", TINY, *options, "--out", tmp_path / "whole")
    assert whole.code == 0, whole.text
    out = tmp_path / "killed"
    assert kill_at_random(out, options, 10) >= 5
    last = run("compare", TINY, *options, "--out", out)
    assert last.code == 0, last.text
    assert results(out) == results(tmp_path / "whole")
    for name in ("results.csv", "results.md", "results.tex"):
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
