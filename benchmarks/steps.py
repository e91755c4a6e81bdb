"""Whole training steps: detente beside torchjd, the bare backward passes and a plain step.  make bench-steps."""

from __future__ import annotations

import argparse
import gc
import math
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from common import attempt, header, ours, publish, shown, table  # first: sets the threads

# isort: split
import numpy as np
import torch
import torchjd.aggregation as tj
from pairs import PAIRS
from torchjd.autojac import jac_to_grad, mtl_backward
from workloads import WORKLOADS, Problem

import detente

Step = Callable[[Problem], object]

BATCHED = ("a", "e")  # trunks that one batched pass can take
METHODS = {p.label: p for p in PAIRS if isinstance(p.theirs(2, False), tj.Aggregator)}


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


def theirs(aggregator: tj.Aggregator, chunk: int | None = None) -> Step:
    def run(problem: Problem) -> None:
        features = problem.features()
        mtl_backward(problem.losses(features), features=features, parallel_chunk_size=chunk)
        jac_to_grad(problem.trunk.parameters(), aggregator)

    return run


def variants(count: int, methods: list[str], *, batched: bool) -> dict[str, Step]:
    """Everything that is timed in turn on one problem."""
    features = exact(ours("cagrad"), source="features")
    # the first of its steps, before the timing, is fresh
    reused = exact(ours("cagrad"), source=detente.Every(1_000_000))
    found: dict[str, Step] = {"plain": plain, "floor": floor, "features cagrad": features, "reused cagrad": reused}
    for label in methods:
        pair = METHODS[label]
        found[f"detente {label}"] = exact(ours(pair.name, **pair.options))
        if batched:
            found[f"detente, batched {label}"] = exact(ours(pair.name, **pair.options), engine="batched")
        found[f"torchjd {label}"] = theirs(pair.theirs(count, False))
        found[f"torchjd, chunk 1 {label}"] = theirs(pair.theirs(count, False), 1)
    return found


def measure(problem: Problem, steps: dict[str, Step], budget: float) -> dict[str, list[float] | str]:
    """Milliseconds of process time per step, all variants in turn; one that fails says how."""
    found: dict[str, list[float] | str] = {}

    def once(step: Step) -> float:
        problem.zero_grad(set_to_none=True)
        begun = time.process_time()
        step(problem)
        return 1e3 * (time.process_time() - begun)

    def twice(step: Step) -> None:
        once(step)
        once(step)

    for name, step in steps.items():
        tried = attempt(partial(twice, step), 60.0)
        found[name] = tried if isinstance(tried, str) else []
    gc.collect()
    gc.disable()
    begun, rounds = time.perf_counter(), 0
    names = list(steps)
    random = np.random.default_rng(0)
    try:
        while rounds < 5 or (time.perf_counter() - begun < budget and rounds < 400):
            for k in random.permutation(len(names)):  # so that no variant always follows the same other
                spent = found[names[k]]
                if not isinstance(spent, str):
                    spent.append(once(steps[names[k]]))
            rounds += 1
            if rounds % 10 == 0:
                gc.collect()
    finally:
        gc.enable()
    return found


def median(values: list[float] | str) -> float:
    return math.nan if isinstance(values, str) else float(np.median(values))


def ratio(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workloads", nargs="+", default=list(WORKLOADS), choices=list(WORKLOADS))
    parser.add_argument("--methods", nargs="+", default=["cagrad(c=0.5)"], choices=list(METHODS))
    parser.add_argument("--counts", nargs="+", type=int, default=[2, 3, 10, 40])
    parser.add_argument("--budget", type=float, default=8.0, help="seconds for each workload and number of tasks")
    parser.add_argument("--name", default="steps.md", help="name of the file in results/; '-' prints only")
    chosen = parser.parse_args()
    overview: list[list[str]] = []
    detail: list[list[str]] = []
    for name in chosen.workloads:
        for count in chosen.counts:
            if count not in WORKLOADS[name].counts:
                continue
            problem = WORKLOADS[name].build(count)
            steps = variants(count, chosen.methods, batched=name in BATCHED)
            found = measure(problem, steps, chosen.budget)
            base, bottom = median(found["plain"]), median(found["floor"])
            for variant, values in found.items():
                detail.append(
                    [name, str(count), variant, shown(values), ratio(median(values) / bottom),
                     ratio(median(values) / base)]
                )  # fmt: skip
            for method in chosen.methods:
                mine = median(found[f"detente {method}"])
                together = median(found.get(f"detente, batched {method}", "-"))
                peer = median(found[f"torchjd {method}"])
                serial = median(found[f"torchjd, chunk 1 {method}"])
                overview.append(
                    [name, str(count), method, ratio(base / bottom), ratio(mine / bottom), ratio(together / bottom),
                     ratio(peer / bottom), ratio(serial / bottom), ratio(mine / base), ratio(together / base),
                     ratio(median(found["features cagrad"]) / base), ratio(median(found["reused cagrad"]) / base)]
                )  # fmt: skip
                print(" | ".join(overview[-1]), flush=True)
    head = [
        "workload",
        "T",
        "method",
        "plain",
        "detente",
        "detente, batched",
        "torchjd",
        "torchjd, chunk 1",
        "detente / plain",
        "batched / plain",
        "features / plain",
        "reused / plain",
    ]
    text = header("Whole steps: detente and torchjd")
    text += "\n".join(f"- {w.name}: {w.what}" for w in WORKLOADS.values() if w.name in chosen.workloads)
    text += (
        "\n\nProcess time of zeroed gradients to written `.grad` on one thread, all variants in turn and in random "
        "order within one process. *floor*: forward and one backward pass per task, results thrown away. *plain*: "
        "forward and one backward pass of the sum.\n\n## Over the floor\n\n"
    )
    text += table(head, overview)
    text += "\n## Each variant: median ms (quartiles; number of steps), over the floor, over a plain step\n\n"
    text += table(["workload", "T", "variant", "ms", "/ floor", "/ plain"], detail)
    publish(chosen.name, text)


if __name__ == "__main__":
    main()
