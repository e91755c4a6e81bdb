"""Deterministic rules on explicit task gradients: GD, MGDA, EDM, CAGrad. Rows of J are g_i, the result is d."""

from __future__ import annotations

import numpy as np
from scipy.optimize import brentq, linprog

from reference.geometry import EXACT, Array, min_norm, norms, project_on_dual_cone, shortest

INSIDE = 1e-9  # unit gradients whose hull comes this close to 0 are taken to contain it


def gd(J: Array, weights: Array | None = None) -> Array:
    d = np.zeros(J.shape[1])
    for i, g in enumerate(J):
        d += (1.0 if weights is None else weights[i]) * g
    return d


def mgda(J: Array) -> Array:
    return min_norm(J)[1]


def edm(J: Array) -> tuple[Array, Array]:
    """(beta, d). Min-norm point of the unit gradients, with the length gamma = 1 / sum_i alpha_i / n_i."""
    n = norms(J)
    units = [g / size for g, size in zip(J, n, strict=True)]
    found, v = min_norm(np.array(units))
    # where unit gradients coincide alpha is not unique, and gamma depends on it: equal shares, as T = 2 has them
    alpha = []
    for u in units:
        twins = [a for a, other in zip(found, units, strict=True) if np.abs(u - other).max() <= 1e-12]
        alpha.append(sum(twins) / len(twins))
    gamma = 1.0 / sum(a / size for a, size in zip(alpha, n, strict=True))
    beta = np.array([gamma * a / size for a, size in zip(alpha, n, strict=True)])
    if np.sqrt(np.dot(v, v)) <= INSIDE:
        return beta, np.zeros(J.shape[1])
    return beta, gamma * v


def edm_lengths(J: Array) -> tuple[float, float]:
    """Smallest and largest gamma over ALL minimisers alpha; they differ where unit gradients are affinely dependent."""
    n = norms(J)
    units = np.array([g / size for g, size in zip(J, n, strict=True)])
    _, v = min_norm(units)
    basis = np.linalg.qr(units.T)[0] if units.shape[1] > len(J) else np.eye(units.shape[1])
    equalities = np.vstack([basis.T @ units.T, np.ones(len(J))])
    inverse = n.min() / n
    ends = []
    for sign in (1.0, -1.0):
        found = linprog(sign * inverse, A_eq=equalities, b_eq=np.append(basis.T @ v, 1.0), bounds=(0, None))
        assert found.status == 0
        ends.append(n.min() / abs(found.fun))
    return min(ends), max(ends)


def cagrad(J: Array, c: float, rescale: int | None = None, preference: Array | None = None) -> Array:
    """Maximise min_i g_i . d over ||d - g0|| <= c ||g0||, by root finding over the level nu of min_i g_i . d.

    d(nu) is the point of {d : J d >= nu} nearest to g0; its distance grows with nu, and equals c ||g0|| at the optimum.
    Where 0 lies in the hull of the g_i no level above 0 exists, and d(0) is the maximiser nearest to g0.
    """
    T = len(J)
    p = np.full(T, 1.0 / T) if preference is None else preference
    g0 = gd(J, p)
    scale = {None: 1.0, 1: 1.0 / (1.0 + c**2), 2: 1.0 / (1.0 + c)}[rescale]
    radius = c * np.sqrt(np.dot(g0, g0))
    if radius <= 1e-14 * c * norms(J).max():  # g0 = 0 or c = 0
        return scale * g0
    n = norms(J)
    rows = J[n > 0]
    size, least = norms(rows), norms(rows).min()
    units = np.array([g / s for g, s in zip(rows, size, strict=True)])
    centre = g0 / np.sqrt(np.dot(g0, g0))
    along = units @ centre

    def nearest(level: float) -> tuple[Array, Array, Array] | None:
        """In units of ||g0||, level in units of n_min ||g0||; constraints the ball cannot break are left out."""
        levels = level * (least / size) - along
        kept = np.flatnonzero(levels > -(c + 1.0))
        found = shortest(units[kept], levels[kept])
        return None if found is None else (found[0], found[1], kept)

    def excess(level: float) -> float:
        found = nearest(level)
        return 1e6 if found is None else np.sqrt(np.dot(found[0], found[0])) - c

    contains_zero = n.min() == 0 or np.linalg.norm(min_norm(units)[1]) <= INSIDE
    if contains_zero and excess(0.0) <= 0:
        return scale * project_on_dual_cone(J, g0)
    low = (along * (size / least)).min()
    high = 0.0 if contains_zero else 1.0 + c + 1e-6
    level = brentq(excess, min(low, 0.0), high, xtol=1e-16, rtol=1e-15)
    found = nearest(level)
    assert found is not None
    x, multipliers, kept = found
    d = g0 + np.sqrt(np.dot(g0, g0)) * x

    w = np.zeros(len(rows))  # the multipliers are the dual point: primal value and F(w) must meet
    w[kept] = multipliers / size[kept]
    assert w.sum() > 0
    g_w = gd(rows, w / w.sum())
    dual = np.dot(g_w, g0) + radius * np.sqrt(np.dot(g_w, g_w))
    # on unit rows: g_i . d itself carries eps n_i ||d||, which may exceed the level that a small row sets
    for u, n_i in zip(units, size, strict=True):
        short = dual / n_i - np.dot(u, d)
        assert short <= 100 * EXACT * (1 + c) * np.sqrt(np.dot(g0, g0)), f"CAGrad oracle: {short:.1e} below F(w)"
    return scale * d


def cagrad_two_tasks(J: Array, c: float) -> Array:
    """T = 2 by bisection on the sign of F'(x), x the weight of the longer row (small values keep all their digits)."""
    J = J[np.argsort(-norms(J))]
    g0 = (J[0] + J[1]) / 2
    radius = c * np.sqrt(np.dot(g0, g0))

    def slope(x: float) -> float:
        g_w = x * J[0] + (1 - x) * J[1]
        return np.dot(J[0] - J[1], g0) + radius * np.dot(J[0] - J[1], g_w) / np.sqrt(np.dot(g_w, g_w))

    if slope(0.0) >= 0:
        x = 0.0
    elif slope(1.0) <= 0:
        x = 1.0
    else:
        x = brentq(slope, 0.0, 1.0, xtol=1e-300, rtol=1e-15, maxiter=2000)
    g_w = x * J[0] + (1 - x) * J[1]
    return g0 + radius * g_w / np.sqrt(np.dot(g_w, g_w))
