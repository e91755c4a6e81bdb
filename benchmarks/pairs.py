"""The methods that both libraries have, as rules on given task gradients: how each is called, and how they relate.

torchjd's options of a pair are its defaults, except for ``exact``, where they are set so that it solves the same
problem as exactly as it can. ``factor(J)`` turns torchjd's direction into detente's; ``reference`` is a float64
oracle of the test suite, which shares no code with either library.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import mpmath
import numpy as np
import torch
import torchjd.aggregation as tj
from common import Array
from torchjd.linalg import QuadprogProjector

import detente
from reference import bargaining, baselines, directions, projections

Rule = Callable[[Array], Array]


def one(J: Array) -> float:
    return 1.0


def labelled(name: str, options: dict[str, Any]) -> str:
    return name + (f"({', '.join(f'{k}={v!r}' for k, v in options.items())})" if options else "")


@dataclass(frozen=True)
class Pair:
    """One method in both libraries.

    Attributes:
        name: registered name in detente, with ``options``.
        theirs: ``theirs(T, exact)`` builds torchjd's aggregator, or a weighting (a function from G to coefficients).
        settings: what ``exact`` sets, in words.
        factor, factor_text: detente's direction over torchjd's.
        reference: J -> d; tasks with a zero gradient left out, as detente does.
        textbook: J -> d with such tasks kept, where that is another direction.
        candidates: J -> all results a random order can give, instead of ``reference``.
        by_direction: torchjd's defaults clip the length: with them, compare unit vectors.
        takes: what torchjd's timed call takes: "G", or "J" where it has no Gramian form.
        most: number of tasks up to which ``candidates`` can be listed.
    """

    name: str
    theirs: Callable[[int, bool], Any]
    settings: str = "defaults"
    options: dict[str, Any] = field(default_factory=dict)
    factor: Callable[[Array], float] = one
    factor_text: str = "1"
    reference: Rule | None = None
    textbook: Rule | None = None
    candidates: Rule | None = None
    by_direction: bool = False
    takes: str = "G"
    most: int = 1000

    @property
    def label(self) -> str:
        return labelled(self.name, self.options)


def rows(J: Array) -> int:
    return len(baselines.live(J))


def cagrad(J: Array) -> Array:
    kept = J[baselines.live(J)]
    return directions.cagrad(kept, 0.5) if len(kept) else np.zeros(J.shape[1])


def share_of_living(rule: Rule) -> Rule:
    """A mean over all tasks where detente takes it over those with a gradient."""
    return lambda J: rule(J) * rows(J) / len(J)


def projector(exact: bool) -> QuadprogProjector | None:
    return QuadprogProjector(norm_eps=0.0, reg_eps=0.0) if exact else None


def nash(T: int, exact: bool) -> Any:
    return tj.NashMTL(n_tasks=T, **({"max_norm": 0.0, "optim_niter": 100} if exact else {}))


def sdmgrad(T: int, exact: bool) -> Any:
    return tj.SDMGradWeighting(lr=0.5 / T, n_iter=5000) if exact else tj.SDMGradWeighting()


def aligned_reference(J: Array, scale: str) -> Array:
    """Aligned-MTL in 80 digits for T <= 10, so that the rank of J is what it is and not what float64 can tell."""
    J = J[baselines.live(J)]
    if not 0 < len(J) <= 10:
        return baselines.aligned_mtl(J, scale)[1] if len(J) else np.zeros(J.shape[1])
    with mpmath.workdps(80):
        exact = mpmath.matrix(J.tolist())
        values, vectors = mpmath.eigsy(exact * exact.T)
        kept = [k for k in range(len(J)) if values[k] > max(values) * mpmath.mpf(10) ** -50]
        counted = sorted(values[k] for k in kept)
        length = {"min": counted[0], "median": counted[(len(kept) - 1) // 2], "rmse": sum(counted) / len(kept)}[scale]
        a = [mpmath.mpf(0)] * len(J)
        for k in kept:
            share = mpmath.sqrt(length / values[k]) * sum(vectors[:, k])
            a = [a_i + share * vectors[i, k] for i, a_i in enumerate(a)]
        d = mpmath.matrix([a]) * exact
        return np.array([float(x) for x in d])


def aligned(scale: str) -> Pair:
    return Pair(
        "aligned_mtl",
        lambda T, exact: tj.AlignedMTL(scale_mode=scale),
        options={"scale": scale},
        factor=len,
        factor_text="T (sum, not mean)",
        reference=lambda J: aligned_reference(J, scale),
    )


PAIRS = [
    Pair(
        "cagrad",
        lambda T, exact: tj.CAGrad(c=0.5, **({"norm_eps": 0.0} if exact else {})),
        "norm_eps=0",
        {"c": 0.5},
        reference=cagrad,
        textbook=lambda J: directions.cagrad(J, 0.5),
    ),
    Pair(
        "mgda",
        lambda T, exact: tj.MGDA(epsilon=1e-14, max_iters=20000) if exact else tj.MGDA(),
        "epsilon=1e-14, max_iters=20000",
        reference=lambda J: baselines.mgda(J)[1],
        textbook=directions.mgda,
    ),
    Pair(
        "pcgrad",
        lambda T, exact: tj.PCGrad(),
        candidates=lambda J: projections.pcgrad_results(J[baselines.live(J)]) if rows(J) else 0 * J[:1],
        most=3,
    ),
    Pair(
        "upgrad",
        lambda T, exact: tj.UPGrad(projector=projector(exact)),
        "norm_eps=0, reg_eps=0",
        reference=baselines.upgrad,
        textbook=share_of_living(baselines.upgrad),
    ),
    Pair(
        "dualproj",
        lambda T, exact: tj.DualProj(projector=projector(exact)),
        "norm_eps=0, reg_eps=0",
        reference=baselines.dualproj,
        textbook=share_of_living(baselines.dualproj),
    ),
    Pair(
        "nash_mtl",
        nash,
        "max_norm=0, optim_niter=100",
        reference=lambda J: bargaining.nash(J).d,
        by_direction=True,
        takes="J",
    ),
    aligned("min"),
    aligned("median"),
    aligned("rmse"),
    Pair("imtl_g", lambda T, exact: tj.IMTLG(), reference=lambda J: baselines.imtl_g(J)[1]),
    Pair("config", lambda T, exact: tj.ConFIG(), reference=baselines.config, takes="J"),
    Pair(
        "fairgrad",
        lambda T, exact: tj.FairGrad(alpha=2.0),
        options={"alpha": 2.0},
        reference=lambda J: bargaining.fairgrad(J, 2.0).d,
    ),
    Pair(
        "sdmgrad",
        sdmgrad,
        "lr=0.5/T, n_iter=5000",
        reference=lambda J: baselines.sdmgrad(J, 0.3)[1],
    ),
]


def weighting(aggregator: Any, takes: str = "G") -> Callable[[torch.Tensor], torch.Tensor]:
    """torchjd's function from a Gramian (from J where it has no such form) to coefficients."""
    if takes == "J" or isinstance(aggregator, tj.Weighting):
        return getattr(aggregator, "weighting", aggregator) if hasattr(aggregator, "n_tasks") else aggregator
    return aggregator.gramian_weighting


def theirs(aggregator: Any, J: torch.Tensor) -> Array:
    """torchjd's direction."""
    d = aggregator(J @ J.T) @ J if isinstance(aggregator, tj.Weighting) else aggregator(J)
    return d.detach().double().numpy()


def mine(method: Any, J: torch.Tensor, losses: Any = None) -> Array:
    """detente's direction."""
    return detente.aggregate(J, method, losses=losses).double().numpy()
