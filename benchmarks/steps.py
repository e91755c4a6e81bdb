"""Whole training steps: detente beside its peers, the bare backward passes and a plain step.  make bench-steps."""

from __future__ import annotations

import argparse
import csv
import gc
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from common import RESULTS, attempt, header, ours, publish, shown, table  # first: sets the threads

# isort: split
import numpy as np
import torch
from peers import METHODS, PEERS, Step
from workloads import WORKLOADS, Problem

import detente
from detente.benchmark.memory import PeakMemory

BATCHED = ("a", "e")  # trunks that one batched pass can take
DEFAULT = ["cagrad(c=0.5)", "mgda", "pcgrad", "config"]
TARGETS = {"a": 1.20, "b": 1.03, "c": 1.05, "d": 1.05}  # over the floor
TARGETS_PLAIN = {2: 1.15, 3: 1.25, 10: 1.50}  # on e, over a plain step
TARGETS_TORCHJD = {"all": 1.5, "a": 2.5, "e": 7.0}  # times faster than its default


def plain(problem: Problem) -> None:
    torch.stack(problem.losses(problem.features())).sum().backward()


def floor(problem: Problem) -> None:
    """The task gradients, thrown away: what any exact method has to compute when it takes them one by one."""
    losses = problem.losses(problem.features())
    trunk = list(problem.trunk.parameters())
    for t, loss in enumerate(losses):
        torch.autograd.grad(loss, [*trunk, *problem.heads[t].parameters()], retain_graph=t < len(losses) - 1)


def exact(method: Any, **options: Any) -> Step:
    return lambda problem: detente.backward(problem.losses(problem.features()), method, **options)


def variants(count: int, methods: Sequence[str], *, batched: bool) -> dict[tuple[str, str], Callable[[], Step]]:
    """Everything that is timed in turn on one problem, by ``(who, method)``."""

    def detentes(label: str, **options: Any) -> Callable[[], Step]:
        pair = METHODS[label]
        return lambda: exact(ours(pair.name, **pair.options), **options)

    found: dict[tuple[str, str], Callable[[], Step]] = {("plain", ""): lambda: plain, ("floor", ""): lambda: floor}
    for label in methods:
        found["detente", label] = detentes(label)
        if batched:
            found["detente, batched", label] = detentes(label, engine="batched")
        for peer, build in PEERS.items():
            found[peer, label] = partial(build, label, count)
    found["detente, features", methods[0]] = detentes(methods[0], source="features")
    # the first of its steps, before the timing, is fresh
    found["detente, reused", methods[0]] = detentes(methods[0], source=detente.Every(1_000_000))
    return found


@dataclass
class Measured:
    """What one variant took: milliseconds of each step and its peak memory in MiB, or why it could not run."""

    ms: list[float] = field(default_factory=list)
    mib: float = math.nan
    failure: str = ""

    @property
    def median(self) -> float:
        return float(np.median(self.ms)) if self.ms else math.nan


def measure(
    problem: Problem, builds: Mapping[tuple[str, str], Callable[[], Step]], budget: float, device: torch.device
) -> dict[tuple[str, str], Measured]:
    """Time of whole steps, all variants in turn; then the memory of one step of each.

    Process time on the CPU; on a GPU, where kernels run behind, wall time to the end of the last one.
    """
    gpu = device.type == "cuda"
    clock = time.perf_counter if gpu else time.process_time

    def once(step: Step) -> float:
        problem.zero_grad(set_to_none=True)
        if gpu:
            torch.cuda.synchronize(device)
        begun = clock()
        step(problem)
        if gpu:
            torch.cuda.synchronize(device)
        return 1e3 * (clock() - begun)

    def peak(step: Step) -> float:
        problem.zero_grad(set_to_none=True)
        if gpu:
            gc.collect()
            torch.cuda.reset_peak_memory_stats(device)
            before = torch.cuda.memory_allocated(device)
            step(problem)
            return (torch.cuda.max_memory_allocated(device) - before) / 2**20
        with PeakMemory() as memory:
            step(problem)
        return memory.peak_mb

    found: dict[tuple[str, str], Measured] = {}
    steps: dict[tuple[str, str], Step] = {}

    def begin(build: Callable[[], Step]) -> Step:
        step = build()
        once(step)
        once(step)
        return step

    for name, build in builds.items():
        tried = attempt(partial(begin, build), 60.0)
        found[name] = Measured(failure=tried if isinstance(tried, str) else "")
        if not isinstance(tried, str):
            steps[name] = tried
    names = list(steps)
    bottom = found["floor", ""]
    random = np.random.default_rng(0)
    gc.collect()
    gc.disable()
    begun, rounds = time.perf_counter(), 0
    try:
        while rounds < 5 or (time.perf_counter() - begun < budget and rounds < 400):
            for k in random.permutation(len(names)):  # so that no variant always follows the same other
                entry = found[names[k]]
                # three are enough to see what is so slow
                if not entry.failure and (len(entry.ms) < 3 or entry.median < 4 * bottom.median):
                    try:
                        entry.ms.append(once(steps[names[k]]))
                    except Exception as error:
                        entry.failure = f"raises {type(error).__name__}"
            rounds += 1
            if rounds % 10 == 0:
                gc.collect()
    finally:
        gc.enable()
    for name in names:
        tried = attempt(partial(peak, steps[name]), 60.0)
        found[name].mib = math.nan if isinstance(tried, str) else tried
    return found


@dataclass(frozen=True)
class Cell:
    """One workload, number of tasks and method, all variants."""

    workload: str
    count: int
    method: str
    found: Mapping[tuple[str, str], Measured]

    def of(self, who: str) -> float:
        """Median ms of a variant of this method, NaN where there is none."""
        entry = self.found.get((who, "" if who in ("plain", "floor") else self.method))
        return math.nan if entry is None else entry.median

    @property
    def best_peer(self) -> tuple[str, float]:
        timed = {peer: self.of(peer) for peer in PEERS if not math.isnan(self.of(peer))}
        best = min(timed, key=timed.__getitem__, default="-")
        return best, timed.get(best, math.nan)


def ratio(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.2f}"


def mean(values: Sequence[float]) -> float:
    """Geometric mean."""
    known = [v for v in values if not math.isnan(v)]
    return statistics.geometric_mean(known) if known else math.nan


def against_targets(cells: Sequence[Cell]) -> list[list[str]]:
    """What this run says of the targets: what is compared, measured, target, whether it is met."""
    rows: list[list[str]] = []

    def add(what: str, value: float, target: float, *, least: bool = False) -> None:
        if not math.isnan(value):
            met = value >= target if least else value <= target
            sign = "at least" if least else "at most"
            rows.append([what, ratio(value), f"{sign} {target:.2f}", "yes" if met else "**no**"])

    for workload, target in TARGETS.items():
        for count in sorted({c.count for c in cells if c.workload == workload}):
            here = [c for c in cells if (c.workload, c.count) == (workload, count)]
            value = mean([c.of("detente") / c.of("floor") for c in here])
            add(f"{workload}, T = {count}: detente over the floor", value, target)
    for count, target in TARGETS_PLAIN.items():
        here = [c for c in cells if (c.workload, c.count) == ("e", count)]
        add(f"e, T = {count}: detente over plain", mean([c.of("detente") / c.of("plain") for c in here]), target)
        value = mean([c.of("detente, batched") / c.of("plain") for c in here])
        add(f'e, T = {count}: detente over plain, engine="batched"', value, target)
    for workload in "bcde":
        for count in sorted({c.count for c in cells if c.workload == workload}):
            first = next(c for c in cells if (c.workload, c.count) == (workload, count))
            base = first.of("plain")
            add(f"{workload}, T = {count}: features over plain", first.of("detente, features") / base, 1.05)
            tenth = 0.9 * first.of("detente, reused") + 0.1 * first.of("detente")
            add(
                f"{workload}, T = {count}: Every(10), nine reused steps and a fresh one, over 1.15 plain + .1 exact",
                tenth / (1.15 * base + 0.1 * first.of("detente")),
                1.0,
            )
    slowest = max(cells, key=lambda c: c.of("detente") / c.best_peer[1], default=None)
    if slowest is not None:
        name = f"{slowest.workload}, T = {slowest.count}, {slowest.method}, {slowest.best_peer[0]}"
        add(f"worst cell beside the best peer ({name})", slowest.of("detente") / slowest.best_peer[1], 1.02)
    for workload, target in TARGETS_TORCHJD.items():
        here = [c for c in cells if workload in ("all", c.workload)]
        value = mean([c.of("torchjd") / c.of("detente") for c in here])
        add(f"{workload}: times faster than torchjd's default", value, target, least=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workloads", nargs="+", default=list(WORKLOADS), choices=list(WORKLOADS))
    parser.add_argument("--methods", nargs="+", default=DEFAULT, choices=list(METHODS))
    parser.add_argument("--counts", nargs="+", type=int, default=[2, 3, 10, 40])
    parser.add_argument("--budget", type=float, default=8.0, help="seconds for each workload and number of tasks")
    parser.add_argument("--device", default="cpu", help="cpu, or cuda")
    parser.add_argument("--name", default="steps", help="name of the files in results/; '-' prints only")
    chosen = parser.parse_args()
    device = torch.device(chosen.device)
    cells: list[Cell] = []
    detail: list[list[str]] = []
    flat: list[list[Any]] = []
    for name in chosen.workloads:
        for count in chosen.counts:
            if count not in WORKLOADS[name].counts:
                continue
            problem = WORKLOADS[name].build(count).placed(device)
            builds = variants(count, chosen.methods, batched=name in BATCHED)
            found = measure(problem, builds, chosen.budget, device)
            base, bottom = found["plain", ""].median, found["floor", ""].median
            for (who, method), entry in found.items():
                if entry.failure == "not there yet":
                    continue
                detail.append(
                    [name, str(count), method, who, shown(entry.failure or entry.ms), ratio(entry.median / bottom),
                     ratio(entry.median / base), "-" if math.isnan(entry.mib) else f"{entry.mib:.0f}"]
                )  # fmt: skip
                flat.append([name, count, method, who, entry.median, *_quartiles(entry), entry.mib, entry.failure])
            here = [Cell(name, count, method, found) for method in chosen.methods]
            cells += here
            for cell in here:
                print(" | ".join(_overview(cell)), flush=True)
    text = header("Whole steps", device)
    text += "\n".join(f"- {w.name}: {w.what}" for w in WORKLOADS.values() if w.name in chosen.workloads)
    cpu = device.type == "cpu"
    text += (
        "\n\nFrom zeroed gradients to written `.grad`, all variants in turn and in random order within one process; "
        + ("process time on one thread." if cpu else f"wall time to the end of the last kernel. {_PRECISION}")
        + " *floor*: forward and one backward pass per task, results thrown away. *plain*: forward and one backward "
        "pass of the sum. Peers as their documentation calls them.\n\n"
    )
    against = against_targets(cells)
    if cpu:
        text += "## Against the targets (geometric means over the methods)\n\n"
        text += table(["what", "measured", "target", "met"], against)
    else:
        text += "## The same figures as on the CPU, for which the targets are (geometric means over the methods)\n\n"
        text += table(["what", "measured", "target on the CPU"], [row[:3] for row in against])
    text += "\n## Over the floor\n\n" + table(_HEAD, [_overview(cell) for cell in cells])
    text += "\n## Each variant: median ms (quartiles; number of steps), over the floor, over plain, peak memory\n\n"
    text += "Memory above the level before the step, in MiB"
    text += "; of small steps it is what the allocator happens to keep.\n\n" if cpu else ", by PyTorch's allocator.\n\n"
    text += table(["workload", "T", "method", "variant", "ms", "/ floor", "/ plain", "MiB"], detail)
    publish(chosen.name if chosen.name == "-" else f"{chosen.name}.md", text)
    if chosen.name != "-":
        with (RESULTS / f"{chosen.name}.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["workload", "T", "method", "variant", "ms", "q1", "q3", "mib", "failure"])
            writer.writerows([[f"{v:.5g}" if isinstance(v, float) else v for v in row] for row in flat])


_PRECISION = "PyTorch's defaults: TF32 in convolutions, float32 in matrix products."


def _quartiles(entry: Measured) -> tuple[float, float]:
    return tuple(np.percentile(entry.ms, [25, 75])) if entry.ms else (math.nan, math.nan)


_HEAD = [
    "workload", "T", "method", "plain", "detente", "detente, batched", *PEERS, "detente / plain",
    "detente / best peer",
]  # fmt: skip


def _overview(cell: Cell) -> list[str]:
    bottom, mine = cell.of("floor"), cell.of("detente")
    timed = [ratio(cell.of(who) / bottom) for who in ("plain", "detente", "detente, batched", *PEERS)]
    best = cell.best_peer[1]
    return [cell.workload, str(cell.count), cell.method, *timed, ratio(mine / cell.of("plain")), ratio(mine / best)]


if __name__ == "__main__":
    main()
