"""Task gradients of tasks with samples of their own: one pass for all, a pass per chunk, a pass per task.

``make bench-disjoint``, which needs no peer, or ``python benchmarks/disjoint.py --seconds 5 --name -``.
"""

from __future__ import annotations

import argparse
import itertools
import os
import resource
import time
from collections.abc import Callable

from common import header, publish, shown, table  # before torch: it sets the number of threads

import numpy as np  # isort: skip
import torch
from torch import Tensor, nn

import detente
from detente.engine.disjoint import Chunks
from detente.engine.graph import reach
from detente.engine.jacobian import Jacobian
from detente.engine.source import task_rows

INPUTS, OUTPUTS = 39, 8
NETWORKS = {"2 x 128": (128, 128), "3 x 400": (400, 400, 400)}
SAMPLES = (64, 128)
KEPT = "MALLOC_TRIM_THRESHOLD_" in os.environ
CALLS = 3  # of a variant in its turn


class Case:
    """One network, and one batch of all tasks."""

    def __init__(self, widths: tuple[int, ...], tasks: int, samples: int) -> None:
        torch.manual_seed(0)
        layers: list[nn.Module] = []
        for before, after in itertools.pairwise((INPUTS + tasks, *widths)):
            layers += [nn.Linear(before, after), nn.ReLU()]
        self.net = nn.Sequential(*layers, nn.Linear(widths[-1], OUTPUTS))
        self.tasks, self.samples = tasks, samples
        which = torch.eye(tasks).repeat_interleave(samples, 0)
        self.x = torch.cat([torch.randn(tasks * samples, INPUTS), which], 1)
        self.y = torch.randn(tasks * samples, OUTPUTS)
        self.parameters = list(self.net.parameters())

    def together(self) -> list[Tensor]:
        found = self.net(self.x).split(self.samples)
        return [(a - b).square().mean() for a, b in zip(found, self.y.split(self.samples), strict=True)]

    def by_chunk(self) -> list[Tensor]:
        chunks = zip(self.x.split(self.samples), self.y.split(self.samples), strict=True)
        return [(self.net(x) - y).square().mean() for x, y in chunks]

    def summed(self, losses: list[Tensor]) -> None:
        sum(losses, torch.zeros(())).backward()

    def per_task(self, losses: list[Tensor]) -> list[tuple[Tensor, ...]]:
        last = len(losses) - 1
        return [torch.autograd.grad(loss, self.parameters, retain_graph=t < last) for t, loss in enumerate(losses)]

    def rows_of_chunks(self, losses: list[Tensor]) -> Jacobian:
        found = reach(losses)
        rows = Jacobian(found.shared, len(losses))
        task_rows(losses, found, rows, keep=False)
        return rows

    def rows_of_one_pass(self, losses: list[Tensor]) -> Jacobian:
        found = reach(losses)
        jacobian = Jacobian(found.shared, len(losses))
        Chunks(found, [self.samples] * self.tasks, alike=True).pull(losses, jacobian)
        return jacobian

    def agreement(self) -> float:
        """Largest difference from the gradients of a pass per task, over the parameter's largest entry."""
        wanted = self.per_task(self.together())
        losses = self.together()
        found = {
            id(p): rows for p, rows in zip(reach(losses).shared, self.rows_of_one_pass(losses).slices, strict=True)
        }
        return max(
            float((found[id(p)][t] - row[k]).abs().max() / row[k].abs().max())
            for t, row in enumerate(wanted)
            for k, p in enumerate(self.parameters)
        )

    def variants(self) -> dict[str, tuple[Callable[[], list[Tensor]], Callable[[list[Tensor]], object]]]:
        """By name, what computes the losses and what takes their gradients."""
        source = detente.Disjoint([self.samples] * self.tasks)

        def resolved(method: detente.Method, **options: detente.Disjoint) -> Callable[[list[Tensor]], object]:
            return lambda losses: detente.backward(losses, method, **options)

        return {
            "(a) summed loss": (self.together, self.summed),
            "(b) a backward pass per task": (self.together, self.per_task),
            "(c) by chunk: gradients": (self.by_chunk, self.rows_of_chunks),
            "(d) Disjoint: gradients": (self.together, self.rows_of_one_pass),
            "GD, which takes no task gradients": (self.together, resolved(detente.GD())),
            "(c) by chunk: CAGrad": (self.by_chunk, resolved(detente.CAGrad())),
            "(d) Disjoint: CAGrad": (self.together, resolved(detente.CAGrad(), source=source)),
            "(d) Disjoint: PCGrad": (self.together, resolved(detente.PCGrad(), source=source)),
        }


def measure(case: Case, seconds: float, clock: Callable[[], float]) -> dict[str, tuple[list[float], ...]]:
    """By variant, ms with and without the forward pass, and page faults.

    The variants take turns in random order, three calls each after one that brings everything into the caches, as in
    training; one that has used up its part of the time is left out.
    """
    variants = case.variants()
    found: dict[str, tuple[list[float], ...]] = {name: ([], [], []) for name in variants}
    order = np.random.default_rng(0)
    while True:
        waiting = [name for name, (whole, *_) in found.items() if sum(whole) < 1e3 * seconds / len(found)]
        if not waiting:
            return found
        for name in order.permutation(waiting):
            forward, backward = variants[name]
            for call in range(1 + CALLS):
                case.net.zero_grad(set_to_none=True)
                faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
                start = clock()
                losses = forward()
                middle = clock()
                kept = backward(losses)
                stop = clock()
                del kept, losses
                if call:
                    found[name][0].append(1e3 * (stop - start))
                    found[name][1].append(1e3 * (stop - middle))
                    found[name][2].append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tasks", type=int, nargs="+", default=[10, 50])
    parser.add_argument("--seconds", type=float, default=20, help="per network, number of tasks and of samples")
    parser.add_argument("--name", default="disjoint.md", help="name of the file in results/; '-' prints only")
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall", help="cpu where others use the machine")
    chosen = parser.parse_args()
    clock = time.perf_counter if chosen.clock == "wall" else time.process_time
    began = time.perf_counter(), time.process_time()
    lines = [
        header("Tasks with samples of their own"),
        f"{INPUTS} inputs and the task's number, ReLU, {OUTPUTS} outputs, float32. Median (quartiles; calls) in ms of "
        f"{chosen.clock} time, with and without the forward pass; ratios of medians to (a); page faults of a call. "
        "*Difference*: of the gradients of (d) from those of (b), over the largest entry of a parameter's gradient.",
        "",
        "Freed memory is kept: MALLOC_TRIM_THRESHOLD_ is set." if KEPT else "The allocator is as by default.",
        "",
    ]
    for name, widths in NETWORKS.items():
        for tasks in chosen.tasks:
            for samples in SAMPLES:
                case = Case(widths, tasks, samples)
                difference = case.agreement()
                found = measure(case, chosen.seconds, clock)
                base = [float(np.median(times)) for times in found["(a) summed loss"][:2]]
                rows = []
                for variant, (whole, rest, faults) in found.items():
                    ratios = [f"{np.median(t) / b:.2f}" for t, b in zip((whole, rest), base, strict=True)]
                    rows.append([variant, shown(whole), ratios[0], shown(rest), ratios[1], f"{np.mean(faults):.0f}"])
                lines += [
                    f"## {name}, {tasks} tasks of {samples} samples, difference {difference:.1e}",
                    "",
                    table(["", "with the forward pass", "ratio", "without", "ratio", "faults"], rows),
                ]
    share = (time.process_time() - began[1]) / (time.perf_counter() - began[0])
    lines.append(f"The process had its core in {share:.0%} of the time.")
    publish(chosen.name, "\n".join(lines))


if __name__ == "__main__":
    main()
