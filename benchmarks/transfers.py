"""Transfers between host and GPU in one detente step, counted by PyTorch's profiler.  Needs a GPU."""

from __future__ import annotations

import argparse
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from common import attempt, header, ours, publish, table  # first: sets the threads

# isort: split
import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function
from workloads import WORKLOADS

import detente
from detente.method import LossWeighting, method_class

TASKS = 4
FIRST = (
    "cagrad", "pcgrad", "mgda", "nash_mtl", "upgrad", "wpcgrad", "imtl_g", "aligned_mtl", "fairgrad", "cdtt", "dwa",
)  # fmt: skip
# label, workload, what gives the options of every step
SOURCES: list[tuple[str, str, Callable[[], dict[str, Any]]]] = [
    ('engine="serial"', "a", lambda: {"engine": "serial"}),
    ('engine="lean"', "a", lambda: {"engine": "lean"}),
    ('engine="batched"', "a", lambda: {"engine": "batched"}),
    ("ResNet-18", "c", dict),
    ("29 M parameters in products", "e", dict),
    ('source="features"', "b", lambda: {"source": "features"}),
    ("Sampled(2)", "b", lambda: {"source": detente.Sampled(2)}),
    ("Every, fresh step", "b", lambda: {"source": detente.Every(2)}),
    ("Every, reused step", "b", lambda: {"source": detente.Every(1_000_000)}),
    ('granularity="layer"', "b", lambda: {"granularity": "layer"}),
    ('granularity="channel"', "b", lambda: {"granularity": "channel"}),
    ('layer, engine="lean"', "a", lambda: {"granularity": "layer", "engine": "lean"}),
    ("layer, features", "b", lambda: {"granularity": "layer", "source": "features"}),
    ("channel, features", "b", lambda: {"granularity": "channel", "source": "features"}),
    ("storage=torch.bfloat16", "b", lambda: {"storage": torch.bfloat16}),
    ("weighting=DWA()", "b", lambda: {"weighting": detente.DWA()}),
]


@dataclass
class Counted:
    """What one step did: transfers each way, waits for the device, and where in detente the host waited."""

    to_host: int = 0
    to_device: int = 0
    waits: int = 0
    where: Counter[str] = field(default_factory=Counter)

    @property
    def met(self) -> bool:
        return self.to_host <= 1 and self.to_device <= 1


def counted(name: str, workload: str, options: Callable[[], dict[str, Any]], trace: Path | None) -> Counted:
    """``detente.backward`` alone, after the losses: two warm steps, a profiled one, and one that names its waits."""
    problem = WORKLOADS[workload].build(TASKS).placed(torch.device("cuda"))
    method, given = ours(name), options()

    def losses() -> dict[str, torch.Tensor]:
        problem.zero_grad(set_to_none=True)
        found = {str(t): loss for t, loss in enumerate(problem.losses(problem.features()))}
        torch.cuda.synchronize()
        return found

    def step(found: dict[str, torch.Tensor]) -> None:
        detente.backward(found, method, **given)

    for _ in range(2):
        step(losses())
    found = losses()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
        with record_function("step"):
            step(found)
        torch.cuda.synchronize()
    result = _read(profiled)
    if trace is not None:
        profiled.export_chrome_trace(str(trace))
    if isinstance(given.get("source"), detente.Every):
        step(losses())  # so that the next one is of the same kind
    found = losses()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            step(found)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    for warning in caught:
        if str(warning.message).startswith("called a sync"):
            result.where[f"{Path(warning.filename).name}:{warning.lineno}"] += 1
    return result


def _read(profiled: profile) -> Counted:
    events = list(profiled.events() or ())
    span = next(e.time_range for e in events if e.name == "step" and e.device_type == DeviceType.CPU)
    found = Counted()
    for event in events:
        if event.device_type == DeviceType.CUDA:
            found.to_host += event.name.startswith("Memcpy DtoH")
            found.to_device += event.name.startswith("Memcpy HtoD")
        elif span.start <= event.time_range.start <= span.end:
            found.waits += event.name in ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")
    return found


def cases() -> Iterator[tuple[str, str, str, Callable[[], dict[str, Any]]]]:
    """``(method, label, workload, options)`` of everything that is counted."""
    classes = {name: method_class(name) for name in detente.list_methods()}
    others = [n for n, c in classes.items() if n not in FIRST and "model" not in c.needs and not c.requires_step]
    for name in (*FIRST, *others):
        yield name, "one pass" if issubclass(classes[name], LossWeighting) else "", "b", dict
    for label, workload, options in SOURCES:
        yield "cagrad", label, workload, options


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--name", default="transfers", help="name of the file in results/; '-' prints only")
    parser.add_argument("--trace", type=Path, help="file for a Chrome trace of the first step")
    chosen = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("transfers.py counts transfers to and from a GPU, and there is none here.")
    rows: list[list[str]] = []
    for name, label, workload, options in cases():
        tried = attempt(partial(counted, name, workload, options, None if rows else chosen.trace))
        if isinstance(tried, str):
            rows.append([name, label, workload, "-", "-", "-", tried, "**no**"])
        else:
            where = ", ".join(f"{place} ({n})" if n > 1 else place for place, n in tried.where.items())
            verdict = "yes" if tried.met else "**no**"
            rows.append(
                [name, label, workload, *map(str, (tried.to_host, tried.to_device, tried.waits)), where, verdict]
            )
        print(" | ".join(rows[-1]), flush=True)
    text = header("Transfers of a step", torch.device("cuda"))
    text += (
        f"\nOne `detente.backward` after two warm ones, {TASKS} tasks, from computed losses to written `.grad`, on the "
        "trunks of steps.md. Copies as the profiler sees them on the device, calls that wait for the device as it sees "
        "them on the host, and which lines wait (`torch.cuda.set_sync_debug_mode`). Met: at most one copy each way.\n\n"
    )
    text += table(["method", "options", "trunk", "to host", "to device", "waits", "where", "met"], rows)
    publish(chosen.name if chosen.name == "-" else f"{chosen.name}.md", text)


if __name__ == "__main__":
    main()
