"""Do detente and torchjd give the same update, and where they do not, who is right?  Run: make bench-agreement."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

from common import Array, attempt, distance, header, ours, publish, table  # first: sets the threads

# isort: split
import numpy as np
import torch
import torchjd.aggregation as tj
import torchjd.scalarization as ts
from pairs import PAIRS, Pair, mine, theirs

import detente
from reference import projections

AGREE = 1e-4


class Compared(NamedTuple):
    """One case: both updates in detente's convention, and the reference where there is one."""

    ours: Array
    theirs: Array
    reference: Array | None = None


# ---------------------------------------------------------------------------------------------------------------------
# Table 1: cases that are no trouble, torchjd set as exact as it can be


def easy(quick: bool) -> Iterator[Array]:
    """Gradients of like size: independent, in conflict, and with a common part."""
    for T, n in ((2, 20), (3, 30), (5, 50)) if quick else ((2, 20), (3, 30), (5, 50), (10, 200)):
        for seed in range(1 if quick else 3):
            random = np.random.default_rng(seed)
            size = np.exp(0.3 * random.standard_normal((T, 1)))
            J = random.standard_normal((T, n))
            yield size * J
            yield size * (J - 0.9 * J.mean(0))
            yield size * (J + random.standard_normal(n))


def by_pair(pair: Pair, quick: bool) -> Iterator[Compared]:
    for J in easy(quick):
        if len(J) > pair.most:
            continue
        rows = torch.from_numpy(J)
        a = mine(ours(pair.name, **pair.options), rows)
        b = pair.factor(J) * theirs(pair.theirs(len(J), True), rows)
        if pair.reference is not None:
            yield Compared(a, b, pair.reference(J))


def every_order(name: str, build: Callable[[], Any]) -> Callable[[bool], Iterator[Compared]]:
    """Random orders: every update torchjd draws for 3 tasks beside the nearest that detente draws, and the reverse."""

    def run(quick: bool) -> Iterator[Compared]:
        torch.manual_seed(0)
        for J in easy(quick):
            if len(J) > 3:
                continue
            rows = torch.from_numpy(J)
            known = projections.pcgrad_results(J)
            draws = 100 if quick else 300
            mine_drawn = np.array([mine(ours(name, seed=seed), rows) for seed in range(draws)])
            drawn = np.array([theirs(build(), rows) for _ in range(draws)])
            for d in drawn[:100]:
                yield Compared(nearest(mine_drawn, d), d, nearest(known, d))
            for d in mine_drawn[:100]:
                yield Compared(d, nearest(drawn, d), nearest(known, d))

    return run


def nearest(candidates: Array, d: Array) -> Array:
    return candidates[np.argmin(np.linalg.norm(candidates - d, axis=1))]


def gradvac(quick: bool) -> Iterator[Compared]:
    """Two tasks have one order: runs of 5 steps, so that targets move."""
    for seed in range(2 if quick else 5):
        random = np.random.default_rng(seed)
        method, peer = ours("gradvac", beta=0.5), tj.GradVac(beta=0.5, eps=0.0)
        for _ in range(5):
            J = torch.from_numpy(random.standard_normal((2, 20)))
            yield Compared(mine(method, J), theirs(peer, J))


def graddrop(quick: bool) -> Iterator[Compared]:
    """The same uniform numbers for both: one seed for our generator and for the global one."""
    for seed, J in enumerate(easy(quick)):
        rows = torch.from_numpy(J)
        torch.manual_seed(seed)
        yield Compared(mine(ours("graddrop", seed=seed), rows), theirs(tj.GradDrop(), rows))


def excess_mtl(quick: bool) -> Iterator[Compared]:
    for seed in range(2 if quick else 5):
        random = np.random.default_rng(seed)
        method, peer = ours("excess_mtl", eta=0.1), tj.ExcessMTL(robust_step_size=0.1, n_warmup_steps=1)
        for _ in range(5):
            J = torch.from_numpy(random.standard_normal((3, 20)))
            yield Compared(mine(method, J), 3 * theirs(peer, J))


def modo(quick: bool) -> Iterator[Compared]:
    for seed in range(2 if quick else 5):
        random = np.random.default_rng(seed)
        method, peer = ours("modo", gamma=0.01, rho=0.1), tj.MoDoWeighting(gamma=0.01, rho=0.1)
        for _ in range(5):
            J = torch.from_numpy(random.standard_normal((3, 20)))
            yield Compared(mine(method, J), theirs(peer, J))


def losses_of(seed: int, steps: int, T: int = 3) -> Array:
    """Falling losses, as double precision; all above 0."""
    random = np.random.default_rng(seed)
    return np.exp(-0.1 * np.arange(steps)[:, None] * random.random(T) + 0.2 * random.standard_normal((steps, T)))


def slopes(scalarizer: Any, losses: Array, factor: float = 1.0) -> Array:
    """torchjd's weights of the losses: the gradient of its scalar."""
    values = torch.from_numpy(losses).requires_grad_()
    return factor * torch.autograd.grad(scalarizer(values), values)[0].numpy()


def weights(method: Any, losses: Array) -> Array:
    return method.weights(torch.from_numpy(losses)).numpy()


def plain(reduction: str) -> Callable[[bool], Iterator[Compared]]:
    def run(quick: bool) -> Iterator[Compared]:
        for losses in losses_of(0, 3):
            peer = {"sum": ts.Sum, "mean": ts.Mean}[reduction]()
            yield Compared(weights(ours("gd", reduction=reduction), losses), slopes(peer, losses))

    return run


def gls(quick: bool) -> Iterator[Compared]:
    for losses in losses_of(0, 5):
        yield Compared(weights(ours("gls"), losses), slopes(ts.GeometricMean(), losses))


def dwa(quick: bool) -> Iterator[Compared]:
    method, peer = ours("dwa", temperature=2.0), ts.DWA(temperature=2.0)
    for epoch in range(5):
        for losses in losses_of(epoch, 4):
            yield Compared(weights(method, losses), slopes(peer, losses))
        method.next_epoch()
        peer.step()


def learned(name: str, build: Callable[[int], Any]) -> Callable[[bool], Iterator[Compared]]:
    """Learned scales: the peer's parameters by Adam, with our learning rate."""

    def run(quick: bool) -> Iterator[Compared]:
        method, peer = ours(name, lr=0.025), build(3).double()
        adam = torch.optim.Adam(peer.parameters(), lr=0.025)
        for losses in losses_of(0, 20):
            yield Compared(weights(method, losses), slopes(peer, losses))
            adam.zero_grad()
            peer(torch.from_numpy(losses)).backward()
            adam.step()

    return run


def stch(quick: bool) -> Iterator[Compared]:
    """torchjd's is the paper's formula, detente's the authors' code's: the same on log(L / nadir), times T."""
    for mu in (0.5, 1.0):
        method = ours("stch", mu=mu, warmup=0)
        nadir = losses_of(9, 1)[0]
        weights(method, nadir)
        method.next_epoch()
        peer = ts.STCH(mu=mu, weights=torch.ones(3, dtype=torch.float64), reference=torch.from_numpy(np.log(nadir)))
        for losses in losses_of(0, 5):
            yield Compared(weights(method, losses), slopes(lambda L, peer=peer: peer(L.log()), losses, 3.0))


def famo(quick: bool) -> Iterator[Compared]:
    """Whole trainings of a parameter vector: the path after every step."""
    for seed in range(2 if quick else 4):
        random = np.random.default_rng(seed)
        centres = torch.from_numpy(random.standard_normal((3, 10)))
        scales = torch.tensor([1.0, 3.0, 0.3], dtype=torch.float64)

        def losses(x: torch.Tensor, centres=centres, scales=scales) -> torch.Tensor:
            return scales * ((x - centres) ** 2).mean(1) + 0.1

        mine_at = torch.zeros(10, dtype=torch.float64, requires_grad=True)
        theirs_at = torch.zeros(10, dtype=torch.float64, requires_grad=True)
        method = ours("famo", lr=0.1, weight_decay=0.001)
        peer = ts.FAMO(3, lr=0.1, weight_decay=0.001).double()
        first, second = torch.optim.SGD([mine_at], lr=0.3), torch.optim.SGD([theirs_at], lr=0.3)

        def closure(wanted=None, at=mine_at, losses=losses):
            values = dict(zip("abc", losses(at), strict=True))
            return {task: values[task] for task in wanted or values}

        for _ in range(20):
            detente.step(closure, first, method, shared=[mine_at])
            second.zero_grad()
            peer(losses(theirs_at)).backward()
            second.step()
            peer.update(losses(theirs_at))
            yield Compared(mine_at.detach().numpy().copy(), theirs_at.detach().numpy().copy())


SPECIAL: list[tuple[str, str, str, str, Callable[[bool], Iterator[Compared]]]] = [
    ("pcgrad", "PCGrad", "1", "random orders, T <= 3: each update drawn, and the nearest drawn by the other",
     every_order("pcgrad", tj.PCGrad)),
    ("gradvac(beta=0.5)", "GradVac", "1", "eps=0; T = 2 (one order), runs of 5 steps", gradvac),
    ("graddrop", "GradDrop", "1", "equal random numbers", graddrop),
    ("excess_mtl(eta=0.1)", "ExcessMTL", "T (sum, not mean)", "n_warmup_steps=1; runs of 5 steps", excess_mtl),
    ("modo(gamma=0.01, rho=0.1)", "MoDoWeighting", "1", "one batch; runs of 5 steps", modo),
    ("gd(reduction='sum')", "Sum", "1", "weights of the losses", plain("sum")),
    ("gd(reduction='mean')", "Mean", "1", "weights of the losses", plain("mean")),
    ("gls", "GeometricMean", "1", "weights of the losses", gls),
    ("dwa", "DWA", "1", "weights of the losses, 5 epochs", dwa),
    ("uw", "UW", "1", "its parameters by Adam(0.025), 20 steps", learned("uw", ts.UW)),
    ("imtl_l", "IMTLL", "1", "its parameters by Adam(0.025), 20 steps", learned("imtl_l", ts.IMTLL)),
    ("stch", "STCH", "T", "on log L, reference=log nadir, weights=1 (the authors' code)", stch),
    ("famo", "FAMO", "1", "lr=0.1; path of 20 training steps", famo),
]  # fmt: skip
THEIR_NAMES = {
    "cagrad": "CAGrad", "mgda": "MGDA", "upgrad": "UPGrad", "dualproj": "DualProj", "nash_mtl": "NashMTL",
    "aligned_mtl": "AlignedMTL", "imtl_g": "IMTLG", "config": "ConFIG", "fairgrad": "FairGrad",
    "sdmgrad": "SDMGradWeighting", "pcgrad": "PCGrad",
}  # fmt: skip


def agreement(quick: bool) -> str:
    sources = [
        (p.label, THEIR_NAMES[p.name], p.factor_text, p.settings, lambda q, p=p: by_pair(p, q))
        for p in PAIRS
        if p.reference is not None
    ]
    rows = []
    for label, peer, factor, settings, run in [*sources, *SPECIAL]:
        found = attempt(lambda run=run: list(run(quick)), 600)
        if isinstance(found, str):
            rows.append([f"`{label}`", peer, factor, settings, "", found, "", "", ""])
            continue
        apart = [distance(c.ours, c.theirs) for c in found]
        known = [c for c in found if c.reference is not None]
        right = [distance(c.theirs, c.reference) <= AGREE for c in known] if known else [True] * len(found)
        agreed = max((a for a, r in zip(apart, right, strict=True) if r), default=math.nan)
        mine_off = f"{max(distance(c.ours, c.reference) for c in known):.0e}" if known else "-"
        theirs_off = f"{max(distance(c.theirs, c.reference) for c in known):.0e}" if known else "-"
        verdict = "yes" if agreed <= AGREE else "**no**"
        cases = f"{sum(right)} of {len(found)}"
        rows.append([f"`{label}`", peer, factor, settings, cases, f"{agreed:.0e}", verdict, mine_off, theirs_off])
        print("  ", label, *rows[-1][4:], flush=True)
    head = ["detente", "torchjd", "factor", "torchjd's settings", "torchjd right in", "largest difference there"]
    return table([*head, f"<= {AGREE:g}", "detente to reference", "torchjd to reference"], rows)


# ---------------------------------------------------------------------------------------------------------------------
# Table 2: cases where they differ, torchjd as it comes, a reference that decides


def conflicting(T: int, n: int, seed: int) -> Array:
    """Unit-size gradients with conflicts, though not all opposed."""
    random = np.random.default_rng(seed)
    J = random.standard_normal((T, n)) / math.sqrt(n)
    return J - 0.8 * J.mean(0)


def hard(seed: int, quick: bool) -> Iterator[tuple[str, Array]]:
    def scaled(*sizes: float) -> Array:
        return np.array(sizes)[:, None] * J

    random = np.random.default_rng(100 + seed)
    J = conflicting(3, 40, seed)
    yield "rows of like size", J
    yield "rows x (1e-3, 1, 1)", scaled(1e-3, 1, 1)
    yield "rows x (1e-2, 1, 1e2)", scaled(1e-2, 1, 1e2)
    yield "rows x (1e-8, 1, 1e8)", scaled(1e-8, 1, 1e8)
    yield "all x 1e-8", 1e-8 * J
    yield "all x 1e8", 1e8 * J
    yield "one zero row", scaled(0, 1, 1)
    yield "all zero", scaled(0, 0, 0)
    yield "two equal rows", np.array([J[0], J[0], J[1]])
    yield "g, -g", np.array([J[0], -J[0]])
    yield "g, -g + 1e-5 noise", np.array([J[0], -J[0] + 1e-5 * random.standard_normal(40) / math.sqrt(40)])
    yield "T = 1", J[:1]
    if seed == 0 and not quick:
        yield "T = 100, n = 1000", conflicting(100, 1000, 0)
        yield "T = 100, n = 20", conflicting(100, 20, 0)


def error(found: Array | str, wanted: list[Array], J: Array, by_direction: bool) -> float | str:
    """Smallest relative error against the accepted references; where these are 0: length over the longest row."""
    if isinstance(found, str):
        return found
    if not np.isfinite(found).all():
        return "NaN"
    sizes = np.linalg.norm(J, axis=1)
    living = sizes[sizes > 0]
    errors = []
    for reference in wanted:
        length = float(np.linalg.norm(reference))
        if not living.size or length <= 1e-9 * living.min():
            errors.append(float(np.linalg.norm(found)) / (living.max() if living.size else 1.0))
        elif by_direction:
            own = float(np.linalg.norm(found))
            errors.append(distance(found / own, reference / length) if own > 0 else 1.0)
        else:
            errors.append(distance(found, reference))
    return min(errors)


def accepted(pair: Pair, J: Array, textbook: bool) -> list[Array]:
    if pair.candidates is not None:
        return list(pair.candidates(J))
    assert pair.reference is not None
    found = [pair.reference(J)]
    if textbook and pair.textbook is not None and 0 < np.count_nonzero(J.any(1)) < len(J):
        found.append(pair.textbook(J))
    return found


def worst(values: list[float | str]) -> float | str:
    words = [v for v in values if isinstance(v, str)]
    return words[0] if words else max(v for v in values if not isinstance(v, str))


def shown(value: float | str) -> str:
    return value if isinstance(value, str) else "0" if value == 0 else f"{value:.0e}"


def compare(pair: Pair, J: Array, dtype: torch.dtype, limit_s: float) -> tuple[float | str, float | str]:
    """(detente's error, torchjd's) on the rows as they are in ``dtype``."""
    rows = torch.from_numpy(J).to(dtype)
    J = rows.double().numpy()

    def peer() -> Array:
        torch.manual_seed(0)
        d = theirs(pair.theirs(len(J), False), rows)
        return d * pair.factor(J)

    wanted = accepted(pair, J, False)
    a = error(attempt(lambda: mine(ours(pair.name, **pair.options), rows), limit_s), wanted, J, pair.by_direction)
    b = error(attempt(peer, limit_s), accepted(pair, J, True), J, pair.by_direction)
    return a, b


def differences(quick: bool) -> str:
    parts, summary = [], []
    kinds = (torch.float64, torch.float32)
    for pair in PAIRS:
        cells: dict[str, list[list[float | str]]] = {}
        for seed in range(1 if quick else 3):
            for name, J in hard(seed, quick):
                if len(J) > pair.most:
                    continue
                cell = cells.setdefault(name, [[] for _ in range(4)])
                for k, dtype in enumerate(kinds):
                    found = attempt(partial(compare, pair, J, dtype, 20), 300)
                    a, b = (f"reference {found}",) * 2 if isinstance(found, str) else found
                    cell[2 * k].append(a)
                    cell[2 * k + 1].append(b)
        rows = [[name, *(shown(worst(values)) for values in cell)] for name, cell in cells.items()]
        note = " Directions only: torchjd cuts the length to max_norm = 1 by default." if pair.by_direction else ""
        note += " The nearest result of any random order." if pair.candidates else ""
        parts += [f"### {pair.label}", "", *([note.strip(), ""] if note else [])]
        parts.append(table(["case", "detente", "torchjd", "detente float32", "torchjd float32"], rows))
        flat = [[worst(values) for values in cell] for cell in cells.values()]
        line = [f"`{pair.label}`"]
        for k in range(4):
            good = sum(isinstance(f[k], float) and f[k] <= 1e-3 for f in flat)
            line.append(f"{good} of {len(flat)}")
        summary.append(line)
        print("  ", *line, flush=True)
    head = ["method", "detente", "torchjd", "detente float32", "torchjd float32"]
    return "\n".join(["Cases within 1e-3 of the reference:", "", table(head, summary), *parts])


def only_one_has() -> str:
    """What Table 1 leaves out."""
    exported = {n.removesuffix("Weighting") for n in [*tj.__all__, *ts.__all__]}
    exported -= {"Aggregator", "", "GramianWeightedAggregator", "WeightedAggregator", "Scalarizer"}
    shared = {n.removesuffix("Weighting") for n in [*THEIR_NAMES.values(), *(s[1] for s in SPECIAL)]}
    compared = {p.name for p in PAIRS} | {s[0].split("(")[0] for s in SPECIAL}
    theirs_only = sorted(exported - shared)
    ours_only = [n for n in detente.list_methods() if n not in compared]
    return (
        f"Not compared, torchjd: {', '.join(theirs_only)} (Random is our `rlw` and Constant our `gd(weights=...)`).\n\n"
        f"Not compared, detente: {', '.join(ours_only)}.\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer cases, no T = 100; writes agreement-quick.md")
    quick = parser.parse_args().quick
    text = [
        header("detente and torchjd: agreement"),
        "## Table 1: the same update where nothing is hard\n",
        "Relative difference of the two updates, `||d_detente - d_torchjd|| / ||d_torchjd||`: at most "
        f"{AGREE:g} is required in every case in which torchjd is within that of the float64 reference. torchjd is set "
        "to solve the same problem as exactly as it can; its update is multiplied by the factor, a difference of "
        "convention.\n",
        agreement(quick),
        only_one_has(),
        "## Table 2: where they differ, and who is right\n",
        "torchjd with its default settings. Relative error against an independent reference (`tests/reference`, on the "
        "rows as they are in the dtype), worst of several matrices; where the reference is 0: the length of the update "
        "over the longest gradient. With a zero row torchjd may also follow the textbook, which keeps such tasks.\n",
        differences(quick),
    ]
    publish("agreement-quick.md" if quick else "agreement.md", "\n".join(text))


if __name__ == "__main__":
    main()
