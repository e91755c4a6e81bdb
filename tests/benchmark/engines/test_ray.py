"""Ray gives the tables of local workers, also where its workers and the driver are killed."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmark.command import alive, children, results, run, started, until

pytest.importorskip("ray", reason="Ray is not installed: pip install 'detente[ray]'")
pytestmark = [pytest.mark.long, pytest.mark.skipif(sys.platform != "linux", reason="looks processes up in /proc")]

TINY = Path(__file__).parents[1] / "tiny_problem.py"
OPTIONS = ("--methods", "pcgrad,connection_strength", "--seeds", "3", "--epochs", "40")


def ray_workers(pid: int) -> set[int]:
    """Descendants of the driver that run one of its jobs."""
    found, waiting = set(), [pid]
    while waiting:
        for child in children(waiting.pop()):
            waiting.append(child)
            try:
                command = Path(f"/proc/{child}/cmdline").read_bytes()
            except OSError:
                continue
            if command.startswith(b"ray::_work"):
                found.add(child)
    return found


def family(pid: int) -> set[int]:
    found: set[int] = set()
    for child in children(pid):
        found |= {child} | family(child)
    return found


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "out"
    outcome = run("compare", TINY, *OPTIONS, "--out", out)
    assert outcome.code == 0, outcome.text
    return out


def same(out: Path, whole: Path) -> None:
    assert results(out) == results(whole)
    for name in ("results.csv", "results.md", "results.tex"):
        assert (out / name).read_bytes() == (whole / name).read_bytes()


def through_ray(out: Path) -> subprocess.CompletedProcess[str]:
    with started(TINY, out, *OPTIONS, "--engine", "ray") as process:
        text, _ = process.communicate(timeout=300)
        return subprocess.CompletedProcess([], process.returncode, text)


def test_ten_kills_at_random_moments_change_nothing(whole, tmp_path):
    """Each time a worker, then the driver; the next command starts while what they left behind may still write."""
    moments, out, hit = random.Random(4), tmp_path / "out", 0
    left: set[int] = set()
    for _ in range(10):
        with started(TINY, out, *OPTIONS, "--engine", "ray") as process:
            until(lambda: ray_workers(process.pid), "jobs run", process)
            time.sleep(moments.uniform(0.0, 3.0))
            for victim in sorted(ray_workers(process.pid))[:1]:
                subprocess.run(["kill", "-9", str(victim)], check=False)
                hit += 1
            time.sleep(moments.uniform(0.0, 2.0))
            left |= family(process.pid)
            process.send_signal(signal.SIGKILL)
            process.wait()
    assert hit >= 5
    last = through_ray(out)
    assert last.returncode == 0, last.stdout
    same(out, whole)
    assert not list(out.rglob("*.tmp"))
    until(lambda: not any(map(alive, left)), "all of the killed clusters end")


def test_a_worker_that_is_lost_is_reported_and_its_job_goes_on(whole, tmp_path):
    out = tmp_path / "out"
    with started(TINY, out, *OPTIONS, "--engine", "ray") as process:
        # before that a worker only imports, and Ray replaces it without a word
        until(lambda: list(out.glob("runs/*/*/checkpoint.pt")), "jobs train", process)
        subprocess.run(["kill", "-9", str(min(ray_workers(process.pid)))], check=True)
        text, _ = process.communicate(timeout=300)
    assert process.returncode == 0, text
    assert "its worker was lost" in text
    same(out, whole)
