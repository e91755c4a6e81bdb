"""Peak memory of one step on a trunk of 100 M parameters with ten tasks, each variant in a process of its own."""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
from collections.abc import Callable

from common import header, ours, publish, table  # first: sets the threads

# isort: split
import torch
from peers import torchjd
from steps import exact, floor, plain
from torch import nn
from workloads import Problem

from detente.gramian import gramian

TASKS, WIDTH, LAYERS, SAMPLES = 10, 4096, 6, 16
VARIANTS: dict[str, Callable[[], Callable[[Problem], object]]] = {
    "plain": lambda: plain,
    "floor": lambda: floor,
    "detente, auto": lambda: exact(ours("cagrad")),
    "detente, batched": lambda: exact(ours("cagrad"), engine="batched"),
    "detente, serial": lambda: exact(ours("cagrad"), engine="serial"),
    "detente, features": lambda: exact(ours("cagrad"), source="features"),
    "torchjd": lambda: torchjd("cagrad(c=0.5)", TASKS),
    "torchjd, chunk 1": lambda: torchjd("cagrad(c=0.5)", TASKS, 1),
}


def peak(variant: str) -> float:
    """MiB that a step takes at its peak, above the model and its batch."""
    torch.manual_seed(0)
    layers = [layer for _ in range(LAYERS) for layer in (nn.Linear(WIDTH, WIDTH), nn.ReLU())]
    problem = Problem(nn.Sequential(*layers), WIDTH, torch.randn(SAMPLES, WIDTH), TASKS)
    step = VARIANTS[variant]()
    gramian(torch.ones(2, 3))  # loads numba
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    step(problem)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--variant", choices=list(VARIANTS), help="measure this one here, and print its MiB")
    parser.add_argument("--name", default="memory.md", help="name of the file in results/; '-' prints only")
    chosen = parser.parse_args()
    if chosen.variant is not None:
        print(peak(chosen.variant))
        return
    size = LAYERS * (WIDTH * WIDTH + WIDTH) * 4 / 2**20
    rows: list[list[str]] = []
    base = 0.0
    for variant in VARIANTS:
        command = [sys.executable, __file__, "--variant", variant]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            last = (done.stderr.strip().splitlines() or [f"ended with {done.returncode}"])[-1]
            rows.append([variant, last if done.returncode > 0 else "killed: out of memory", "-", "-"])
            continue
        found = float(done.stdout)
        base = found if variant == "plain" else base
        rows.append([variant, f"{found:.0f}", f"{found / base:.2f}", f"{(found - base) / size:.2f}"])
        print(" | ".join(rows[-1]), flush=True)
    text = header("Peak memory of a step")
    text += (
        f"\n{LAYERS} linear layers of {WIDTH} units ({size * 2**18 / 1e6:.0f} M parameters, one copy {size:.0f} MiB), "
        f"{SAMPLES} samples, {TASKS} tasks, CAGrad, float32. Resident memory at its highest above the level before the "
        "step, each variant in a process of its own; a plain step needs one copy for `.grad`. numba, loaded before, "
        "takes some 90 MiB of a process once.\n\n"
    )
    text += table(["variant", "MiB", "/ plain", "beyond plain, in copies of the trunk"], rows)
    publish(chosen.name, text)


if __name__ == "__main__":
    main()
