"""Aggregation alone, from large task gradients to the update, beside memory's bandwidth.  make bench-aggregation."""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial

from common import attempt, header, ours, publish, shown, table  # first: sets the threads

# isort: split
import numpy as np
import torch
from peers import METHODS

LABELS = (
    "mgda", "cagrad(c=0.5)", "pcgrad", "upgrad", "config", "aligned_mtl(scale='min')", "nash_mtl",
)  # fmt: skip


def measure(tasks: int, length: int, rounds: int) -> dict[str, list[float] | str]:
    """Milliseconds of every variant, in turn."""
    import detente
    from detente.gramian import gramian

    rows = torch.randn(tasks, length, generator=torch.Generator().manual_seed(0))
    other = torch.empty_like(rows).copy_(rows)
    variants: dict[str, Callable[[], object]] = {
        "copy": lambda: other.copy_(rows),
        "the Gramian": lambda: gramian(rows),
    }
    for label in LABELS:
        pair = METHODS[label]
        variants[f"detente, {label}"] = partial(detente.aggregate, rows, ours(pair.name, **pair.options))
        variants[f"torchjd, {label}"] = partial(pair.theirs(tasks, False), rows)
    found: dict[str, list[float] | str] = {}
    for name, call in variants.items():
        first = attempt(lambda call=call: (call(), "")[1], 120.0)
        found[name] = first or []
    gc.collect()
    gc.disable()
    for _ in range(rounds):
        for name, call in variants.items():
            times = found[name]
            if isinstance(times, list):
                begun = time.perf_counter()
                call()
                times.append(1e3 * (time.perf_counter() - begun))
    gc.enable()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--length", type=int, default=10_000_000)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--child", nargs=2, metavar=("TASKS", "NUMBA"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        tasks, numba = options.child
        if numba == "without":
            sys.modules["numba"] = None  # type: ignore[assignment]
        print(json.dumps(measure(int(tasks), options.length, options.rounds)))
        return
    text = header("Aggregation alone")
    text += (
        f"\nFrom float32 task gradients `[T, {options.length:.0e}]` in memory to the update, a new tensor; wall time "
        "of one thread in ms, median (quartiles; number), all variants in turn in one process, detente with numba "
        "(`pip install 'detente[fast]'`) and without in two. *copies*: in times of copying the gradients into memory "
        "in use. Reading them twice, once for the products and once for the update, takes two at the bandwidth at "
        "which a copy goes; the target is 1.3 times that. (A copy also writes as much as it reads: at the bandwidth of "
        "both together it would be one, and the target 1.3.)\n\n"
    )
    for tasks in (10, 3):
        found = {}
        for numba in ("with", "without"):
            command = [sys.executable, __file__, "--length", str(options.length), "--rounds", str(options.rounds)]
            output = subprocess.run(
                [*command, "--child", str(tasks), numba], capture_output=True, text=True, check=True
            )
            found[numba] = json.loads(output.stdout.splitlines()[-1])
        rows = []
        for name in found["with"]:
            cells = [name]
            for numba, all_of_it in found.items():
                times = all_of_it[name]
                if numba == "without" and name.startswith("torchjd"):
                    continue
                copies = "-" if isinstance(times, str) else f"{np.median(times) / np.median(all_of_it['copy']):.2f}"
                cells += [shown(times), copies]
            rows.append([*cells, *[""] * (5 - len(cells))])
        ratios = [
            float(np.median(times) / np.median(found["with"]["copy"]))
            for name, times in found["with"].items()
            if name.startswith("detente")
        ]
        text += f"## T = {tasks}\n\nSlowest of detente's methods: {max(ratios):.2f} copies"
        if tasks == 10:
            text += f"; at most 2.6: {'met' if max(ratios) <= 2.6 else '**not met**'}.\n\n"
        else:
            text += ", most of it the update's own memory, touched for the first time.\n\n"
        text += table(["", "ms", "copies", "without numba, ms", "copies"], rows) + "\n"
        print(text)
    publish("aggregation.md", text)


if __name__ == "__main__":
    main()
