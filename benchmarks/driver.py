"""What the command itself costs beside its trainings, and how N workers scale: ``make bench-driver``.

Every case is ``detente compare digits`` in a process of its own, with as many trainings per worker.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
TRAININGS = 14  # per worker: about a minute on the machines this was written on
CHILD = """
import json, sys, time
began = time.perf_counter()
from detente.benchmark import cli
from detente.benchmark.engines import local
spent, run = [], local.Local.__call__
def timed(self, jobs, root, progress):
    first = []
    def heard(event):
        first.append((time.perf_counter(), time.process_time()))
        progress(event)
    before = time.perf_counter(), time.process_time()
    try:
        return run(self, jobs, root, heard)
    finally:
        spent.append((before, first[0] if first else before, (time.perf_counter(), time.process_time())))
local.Local.__call__ = timed
try:
    cli.main()
finally:
    (before, first, after), = spent
    report = {"wall": time.perf_counter() - began, "own": time.process_time(), "jobs": after[0] - before[0],
              "steady": after[0] - first[0], "steady_own": after[1] - first[1], "start": first[0] - before[0]}
    print(json.dumps(report), file=sys.stderr)
"""


def run(workers: int, trainings: int) -> dict[str, float]:
    """Seconds: of the whole command and of its own process, and of these while jobs ran."""
    with tempfile.TemporaryDirectory() as folder:
        options = ["compare", "digits", "--methods", "gd,cagrad,pcgrad,mgda,wpcgrad", "--epochs", "6"]
        # five methods and two baselines: seven trainings per seed
        seeds = ["--seeds", str(max(1, trainings * workers // 7)), "--jobs", str(workers), "--out", folder]
        done = subprocess.run(
            [sys.executable, "-c", CHILD, *options, *seeds],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=True,
        )
        return json.loads(done.stderr.strip().splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trainings", type=int, default=TRAININGS, help="per worker")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--name", default="driver.md", help="name of the file in results/; '-' prints only")
    chosen = parser.parse_args()
    cores = sorted({1, os.cpu_count() or 1})
    found: dict[int, list[dict[str, float]]] = {workers: [] for workers in cores}
    for _ in range(chosen.rounds):
        for workers in cores:
            found[workers].append(run(workers, chosen.trainings))
    best = {workers: min(rows, key=lambda row: row["steady"]) for workers, rows in found.items()}
    lines = [
        "# The driver of a comparison",
        "",
        f"`make bench-driver`, {time.strftime('%Y-%m-%d')}, {platform.machine()}, {os.cpu_count()} cores, Python "
        f"{platform.python_version()}; {chosen.trainings} trainings per worker, best of {chosen.rounds} rounds, in s.",
        "",
        "| workers | whole command | jobs | until the first job reports | own CPU while jobs run | share of it |",
        "|---:|---:|---:|---:|---:|---:|",
    ]
    for workers, row in best.items():
        share = 100 * row["steady_own"] / row["steady"]
        figures = " | ".join(f"{row[key]:.1f}" for key in ("wall", "jobs", "start"))
        lines.append(f"| {workers} | {figures} | {row['steady_own']:.2f} | {share:.2f}% |")
    if len(cores) > 1:
        one, most = best[cores[0]], best[cores[-1]]
        scaled = cores[-1] * one["steady"] / most["steady"]
        lines += ["", f"{cores[-1]} workers do {scaled:.2f} times the trainings of one in the same time."]
    text = "\n".join(lines) + "\n"
    print(text)
    if chosen.name != "-":
        (RESULTS / chosen.name).write_text(text)


if __name__ == "__main__":
    main()
