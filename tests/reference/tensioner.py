"""CDTT (Task Tensioner) with explicit vectors and the angle form of the official algorithm."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from reference.directions import edm
from reference.geometry import Array


def tension(ratio: float, loss: float, alpha: float) -> float:
    """c_i = max(0, alpha / (1 + exp(-e delta + e)) + 1 - alpha), delta = ratio + log10(loss)."""
    if loss == 0.0:
        return max(0.0, 1.0 - alpha)
    exponent = -np.e * (ratio + np.log10(loss)) + np.e
    return max(0.0, (0.0 if exponent > 700 else alpha / (1.0 + np.exp(exponent))) + 1.0 - alpha)


def make_feasible(d: Array, g: Array) -> Array:
    """Where the angle of g and d exceeds 90 degrees: tan(psi) ||g|| w / ||w||, w = d without its part along g.

    psi = pi - angle(g, d - g).
    """
    n = np.sqrt(np.dot(g, g))
    u = g / n
    if np.dot(d, g) >= 0:
        return d
    w = d - np.dot(d, u) * u
    size = np.sqrt(np.dot(w, w))
    if size <= 1e-14 * np.sqrt(np.dot(d, d)):
        return np.zeros_like(d)
    # d - g has the part w orthogonal to g and (d.u - n) along it; atan2 keeps the digits that arccos loses near pi
    psi = np.pi - np.arctan2(size, np.dot(d, u) - n)
    return np.tan(psi) * n * w / size


def cdtt(
    steps: Sequence[tuple[Array, Sequence[float]]],
    alpha: float = 0.3,
    window: int = 10,
    tension_scale: str = "absolute",
    passes: str = "single",
    cap: int = 10_000,
) -> list[Array]:
    """The update of every step of a run; steps: (J, losses). Tensions exist once two full windows have been seen."""
    seen: list[list[float]] = [[] for _ in steps[0][1]]
    updates = []
    for J, losses in steps:
        n = [float(np.sqrt(np.dot(g, g))) for g in J]
        live = [i for i in range(len(J)) if n[i] > 0]
        b = edm(J[live])[1] if live else np.zeros(J.shape[1])
        for i in range(len(J)):
            seen[i].append(n[i])
        d = b.copy()
        if len(seen[0]) >= window + 1:
            stretch = 1.0 if tension_scale == "absolute" else float(np.sqrt(np.dot(b, b)))
            for i in live:
                now, before = sum(seen[i][-window:]), sum(seen[i][-window - 1 : -1])
                c = tension(now / before if before > 0 else 1.0, losses[i], alpha)
                pull = J[i] - b
                length = np.sqrt(np.dot(pull, pull))
                if length > 1e-7 * n[i]:
                    d = d + stretch * c * pull / length
            for _ in range(1 if passes == "single" else cap):
                for i in live:
                    d = make_feasible(d, J[i])
                if all(np.dot(J[i], d) >= -1e-12 * n[i] * np.sqrt(np.dot(d, d)) for i in live):
                    break
        updates.append(d)
    return updates
