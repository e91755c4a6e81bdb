"""The time from a Gramian to the coefficients: every Gramian method of detente beside torchjd.  make bench-solvers."""

from __future__ import annotations

import argparse
import gc
import math
import time
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

from common import attempt, header, ours, publish, shown, table  # first: sets the threads

# isort: split
import numpy as np
import torch
import torchjd.aggregation as tj
from pairs import PAIRS, Pair, labelled, weighting

from detente.method import Context, GramianMethod, registry

COUNTS = (2, 3, 10, 40, 100)
TARGET = {2: 0.3, 3: 0.3, 10: 0.3, 100: 5.0}  # ms, for detente
UPGRAD = 20.0  # at T = 100
FASTER = {"cagrad": 20.0, "nash_mtl": 100.0}  # than torchjd, at T = 3
STATEFUL = {"gradvac": tj.GradVacWeighting, "modo": tj.MoDoWeighting}  # torchjd's, beside those of pairs.py
EXTRA = {"mgda": [{"normalise": "l2"}], "aligned_mtl": [{"scale": "median"}, {"scale": "rmse"}]}
WARM, RUNS = 5.0, 5  # a call under 5 ms is timed at its fifth run, or the caches after the other library count
DEADLINE = 60.0  # seconds for one call
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def gramians(T: int, number: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(G, a square J with the same G): independent, in conflict, with a common part; sizes of rows differ."""
    made = []
    for k in range(number):
        random = np.random.default_rng([T, k])
        J = random.standard_normal((T, 2 * T + 10))
        if k % 3 == 1:
            J = J - 0.9 * J.mean(0)
        if k % 3 == 2:
            J = J + 0.3 * random.standard_normal(J.shape[1])
        J = np.exp(0.5 * random.standard_normal((T, 1))) * J
        root = np.linalg.qr(J.T, mode="r").T
        made.append((torch.from_numpy(J @ J.T), torch.from_numpy(np.ascontiguousarray(root))))
    return made


def clock(call: Callable[..., Any], arguments: Any, now: Callable[[], float]) -> float:
    """Milliseconds of one call."""
    for _ in range(RUNS):
        start = now()
        call(*arguments)
        took = 1e3 * (now() - start)
        if took > WARM:
            break
    return took


def measure(
    mine: Callable[..., Any],
    theirs: Callable[..., Any] | None,
    T: int,
    number: int,
    budget: float,
    now: Callable[[], float],
) -> Any:
    """([ms], [ms] or words): both on the same Gramians, in turn; the slower side stops when its time is spent."""
    inputs = gramians(T, number)
    ours_ms: list[float] = []
    theirs_ms: list[float] = []
    failed = attempt(lambda: (theirs(*inputs[0]), "")[1], DEADLINE) if theirs is not None else "-"  # warms up, too
    for _ in range(3):
        mine(*inputs[0])
    gc.collect()
    gc.disable()
    try:
        for k, pair in enumerate(inputs):
            turns = [(mine, ours_ms), (theirs, theirs_ms)]
            for call, spent in turns if k % 2 else reversed(turns):
                if call is None or (call is theirs and failed):
                    continue
                if len(spent) >= 3 and sum(spent) > 1e3 * budget:
                    continue
                took = attempt(partial(clock, call, pair, now), DEADLINE)
                if isinstance(took, str):
                    failed = took
                else:
                    spent.append(took)
    finally:
        gc.enable()
    return ours_ms, theirs_ms or failed


def call_of(method: GramianMethod, T: int) -> Callable[[torch.Tensor, torch.Tensor], Any]:
    """``method.weights`` with losses where the method needs them."""
    if "losses" not in method.needs:
        return lambda G, root: method.weights(G)
    context = Context(tuple(map(str, range(T))), losses=torch.linspace(0.5, 2.0, T, dtype=torch.float64))
    return lambda G, root: method.weights(G, context)


def peer_of(name: str, pair: Pair | None, T: int) -> Callable[[torch.Tensor, torch.Tensor], Any] | None:
    if pair is None and name in STATEFUL:
        peer = STATEFUL[name]()
        return lambda G, root: peer(G)
    if pair is None:
        return None
    run = weighting(pair.theirs(T, False), pair.takes)
    return (lambda G, root: run(root)) if pair.takes == "J" else (lambda G, root: run(G))


def methods() -> tuple[list[tuple[str, dict[str, Any], Pair | None]], list[str]]:
    """(name, options, the pair in torchjd) of all Gramian methods, those of both first; and what is left out."""
    paired = [(p.name, p.options, p) for p in PAIRS]
    done = {p.name for p in PAIRS}
    single, left_out = [], []
    for name, cls in sorted(registry().items()):
        if not issubclass(cls, GramianMethod):
            continue
        if "model" in cls.needs or cls.transform is not GramianMethod.transform:
            left_out.append(name)  # works on the gradients themselves
        elif name not in done:
            single.append((name, {}, None))
    extra = [(n, o, None) for n, many in EXTRA.items() for o in many if not any(p[:2] == (n, o) for p in paired)]
    return paired + sorted(single + extra, key=lambda m: m[0]), left_out


def targets(label: str, name: str, T: int, ours_ms: list[float], theirs_ms: Any) -> list[list[str]]:
    rows = []
    wanted = UPGRAD if name == "upgrad" and T == 100 else TARGET.get(T)
    if wanted is not None:
        middle = float(np.median(ours_ms))
        rows.append(
            [f"`{label}`, T = {T}", f"< {wanted:g} ms", f"{middle:.3g} ms", "yes" if middle < wanted else "**no**"]
        )
    if T == 3 and name in FASTER and not isinstance(theirs_ms, str):
        ratio = float(np.median(theirs_ms) / np.median(ours_ms))
        met = "yes" if ratio >= FASTER[name] else "**no**"
        rows.append([f"`{label}`, T = {T}, torchjd / detente", f">= {FASTER[name]:g}", f"{ratio:.0f}", met])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="T = 2, 3, 10, few repetitions; writes solvers-quick.md")
    parser.add_argument("--methods", nargs="+", help="registered names; all by default (prints only)")
    parser.add_argument("--clock", choices=tuple(CLOCKS), default="wall", help="cpu where others use the machine, too")
    options = parser.parse_args()
    counts, number, budget = ((2, 3, 10), 9, 1.0) if options.quick else (COUNTS, 45, 8.0)
    wanted, left_out = methods()
    start, start_cpu = time.perf_counter(), time.process_time()
    rows, goals = [], []
    for name, settings, pair in wanted:
        if options.methods and name not in options.methods:
            continue
        label = pair.label if pair else labelled(name, settings)
        for T in counts:
            method = attempt(lambda name=name, settings=settings: ours(name, **settings))
            if isinstance(method, str):
                rows.append([f"`{label}`", "-", method, "", "", ""])
                break
            call = call_of(method, T)
            first = attempt(lambda call=call, T=T: (call(*gramians(T, 1)[0]), "")[1], DEADLINE)
            if first:
                rows.append([f"`{label}`", str(T), first, "", "", ""])
                continue
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                mine_ms, theirs_ms = measure(call, peer_of(name, pair, T), T, number, budget, CLOCKS[options.clock])
            known = mine_ms and not isinstance(theirs_ms, str)
            ratio = float(np.median(theirs_ms) / np.median(mine_ms)) if known else math.nan
            rows.append([f"`{label}`", str(T), shown(mine_ms), shown(theirs_ms), f"{ratio:.3g}" if known else "", ""])
            rows[-1][-1] = {"J": "torchjd from J", "G": ""}[pair.takes] if pair else ""
            goals += targets(label, name, T, mine_ms, theirs_ms)
            print("  ", *rows[-1], flush=True)
    had = (time.process_time() - start_cpu) / (time.perf_counter() - start)
    missed = [g for g in goals if g[-1] != "yes"]
    head = ["method", "T", "detente, ms", "torchjd, ms", "torchjd / detente", ""]
    text = [
        header("detente and torchjd: from a Gramian to the coefficients"),
        f"Median {options.clock} time of one call in ms (quartiles; number of calls), default settings, float64. Both "
        "libraries in one process on one thread, in turn on the same Gramians: independent, conflicting and partly "
        "aligned gradients whose sizes differ. detente: `method.weights(G)`. torchjd: its `Weighting` of G; NashMTL "
        "and ConFIG exist for J only and get a T x T matrix with that Gramian. A call under "
        f"{WARM:g} ms is timed at its run number {RUNS} on a Gramian, in both libraries. The process had its core for "
        f"{had:.0%} of the time; with the wall clock and less than 95% others were in the way: repeat the run.\n",
        f"## Targets: {len(goals) - len(missed)} of {len(goals)} met\n",
        table(["what", "target", "measured", "met"], sorted(goals, key=lambda g: g[-1] == "yes")),
        "## All times\n",
        table(head, rows),
        f"Left out, for they work on the gradients themselves: {', '.join(left_out)}.\n",
    ]
    if options.methods:
        print("\n".join(text))
    else:
        publish("solvers-quick.md" if options.quick else "solvers.md", "\n".join(text))


if __name__ == "__main__":
    main()
