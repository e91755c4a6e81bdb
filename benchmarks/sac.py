"""Updates of multi-task soft actor-critic on MT10 with the networks of CAGrad's experiments: ``make bench-sac``.

Every method trains the real agent in the real environments, one step of all ten for each update, for the same time.
The time of an update is that of the agent alone; updates a minute include the environments.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from contextlib import suppress
from datetime import date
from pathlib import Path

import torch

from detente.benchmark.job import Job
from detente.benchmark.log import Log
from detente.benchmark.problem import load_problem
from detente.benchmark.rl.sac import SoftActorCritic

RESULTS = Path(__file__).parent / "results"
CASES = {  # method and sampled tasks, and the seconds that CAGrad's paper reports
    "SAC, summed losses": ("gd", 0, ""),
    "PCGrad": ("pcgrad", 0, "9.7"),
    "CAGrad": ("cagrad", 0, "10.3"),
    "CAGrad-Fast, 4 tasks sampled": ("cagrad", 4, "4.8"),
}


class _Over(Exception):
    pass


def measure(method: str, sampled: int, seconds: float, device: str) -> tuple[list[float], float]:
    """Milliseconds of updates, and updates a minute, environments included."""
    problem = load_problem("mt10")
    given = {"sampled": sampled, "warm_up": 1, "episodes": 1000, "probe_every": 10**9, "capacity": 20_000}
    settings = problem.settle(given, "liu2021cagrad")
    agent = SoftActorCritic(Job("mt10", method, method, None, 0, settings, device=device))
    agent.warm_up()
    began: list[float] = []

    def progress(_: float) -> None:
        if agent.step_times and not began:
            began.append(time.perf_counter())
        if began and time.perf_counter() - began[0] > seconds:
            raise _Over

    with suppress(_Over):
        agent.train_epoch(Log(agent.tasks, agent.division), progress)
    taken = agent.step_times[5:]
    return taken, 60 * (len(agent.step_times) - 1) / (time.perf_counter() - began[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=120.0, help="for each method")
    parser.add_argument("--device", default="cpu")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    name = torch.cuda.get_device_name() if asked.device.startswith("cuda") else platform.processor() or "CPU"
    lines = [
        "# Updates of soft actor-critic on MT10",
        "",
        f"{date.today()}, {name}, one thread, torch {torch.__version__}, Python {platform.python_version()}, "
        f"{asked.seconds:.0f} s for each method: "
        f"`benchmarks/sac.py --seconds {asked.seconds:g} --device {asked.device}`",
        "",
        "Actor and two critics of 3 x 400 units, ten tasks with 128 transitions each. An update is one of the critics, "
        "the actor and the temperatures. CAGrad's paper gives the time of an update of its own code and machine, "
        "so that only ratios can be laid side by side.",
        "",
        "| method | ms an update, median (quartiles) | to summed losses | updates a minute | paper, s |",
        "|---|---:|---:|---:|---:|",
    ]
    base = 0.0
    for title, (method, sampled, paper) in CASES.items():
        taken, rate = measure(method, sampled, asked.seconds, asked.device)
        low, middle, high = statistics.quantiles(taken, n=4)
        base = base or middle
        lines.append(f"| {title} | {middle:.1f} ({low:.1f}, {high:.1f}) | {middle / base:.2f} | {rate:.0f} | {paper} |")
        print(lines[-1], flush=True)
    (RESULTS / "sac.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
