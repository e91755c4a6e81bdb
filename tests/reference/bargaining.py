"""Nash-MTL and FairGrad, each by a Newton method of its own, on unit gradients and in long double."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from reference.baselines import LONG, LONG_EPS, live, reduced, spread, unit_rows
from reference.directions import INSIDE
from reference.geometry import Array, min_norm

ROUNDS = 5000


class Bargain(NamedTuple):
    """``distance``: of 0 from the hull of the unit gradients. The coefficients grow like its inverse, and the Gramian
    knows its square only to eps; at ``INSIDE`` or below there is no agreement, and ``a`` and ``d`` are 0."""

    a: Array
    d: Array
    distance: float

    @property
    def stationary(self) -> bool:
        return self.distance <= INSIDE


def newton(M: Array, gradient: Array) -> Array:
    """-(M^T M)^-1 gradient by orthogonal factorisation of M with unit columns."""
    size = np.sqrt((M * M).sum(0))
    R = np.linalg.qr((M / size).astype(float), mode="r")
    step = np.linalg.solve(R, np.linalg.solve(R.T, (gradient / size).astype(float)))
    return -step / size


def along(slope, limit: float) -> float:
    """Where the derivative of a convex function along a line becomes 0, by bisection."""
    high = 1.0 if limit > 1 else limit
    while slope(min(high, limit * (1 - 1e-12))) < 0 and high < limit and high < 1e6:
        high *= 2
    low, high = 0.0, min(high, limit * (1 - 1e-12))
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if slope(middle) < 0 else (low, middle)
    return (low + high) / 2


def nash(J: Array) -> Bargain:
    """a > 0 with G a = 1 / a, from the bargain's own side: d minimises 0.5 ||d||^2 - sum_i log u_i . d."""
    T, kept = len(J), live(J)
    if not kept.size:
        return Bargain(np.zeros(T), np.zeros(J.shape[1]), 0.0)
    full, n = unit_rows(J[kept])
    U = reduced(full)
    v = min_norm(U.astype(float))[1]
    distance = float(np.linalg.norm(v))
    if distance <= INSIDE:
        return Bargain(np.zeros(T), np.zeros(J.shape[1]), distance)
    d = np.sqrt(LONG(len(kept))) * v / distance
    if (U @ d).min() <= 0:
        d = fairgrad_reduced(U, n, 1.0) @ U
    eye, before = np.eye(U.shape[1], dtype=LONG), np.inf
    for _ in range(ROUNDS):
        gains = U @ d
        gradient = d - sum(u / gain for u, gain in zip(U, gains, strict=True))
        p = newton(np.vstack([U / gains[:, None], eye]), gradient)
        rates = U @ p
        change = float(np.abs(rates / gains).max())
        if change > 0.1:
            limit = float(min((-gain / rate for gain, rate in zip(gains, rates, strict=True) if rate < 0), default=1e9))
            curve = rates**2 / gains
            at, bend = np.dot(gradient, p), np.dot(p, p)
            t = along(lambda t: at + t * (bend + (curve / (gains + t * rates)).sum()), limit)  # noqa: B023
        else:
            t = 1.0
        d = d + t * p
        if change <= 1e-15 or (change < 1e-6 and change >= before / 2):
            break
        before = change
    y = 1 / (U @ d)
    assert y.min() > 0
    off = y @ U - d
    assert np.sqrt(np.dot(off, off)) <= 1e-11 * np.sqrt(np.dot(d, d)) + 1e2 * LONG_EPS * (y**2).sum(), "Nash oracle"
    return Bargain(spread(np.asarray(y / n, dtype=float), kept, T), np.asarray(y @ full, dtype=float), distance)


def fairgrad_reduced(U: Array, n: Array, alpha: float) -> Array:
    """y_i = w_i n_i > 0 with (U U^T y)_i = k_i y_i^(-1/alpha), k_i = n_i^(1/alpha - 1).

    This is stationarity of a convex function: Newton in the relative change of each y_i, with exact line searches.
    """
    inverse = 1 / LONG(alpha)
    k = n ** (inverse - 1)
    y = k ** (1 / (1 + inverse))  # each task by itself
    before = np.inf
    for _ in range(ROUNDS):
        v = y @ U
        e = k * y ** (1 - inverse)
        gradient = y * (U @ v) - e
        p = newton(np.vstack([(U * y[:, None]).T, np.diag(np.sqrt(e * inverse))]), gradient)
        change = float(np.abs(p).max())
        if change > 1e-3:
            q = (p * y) @ U
            limit = float(min((-1 / rate for rate in p if rate < 0), default=1e9))
            at, bend = np.dot(gradient, p), np.dot(q, q)
            t = along(lambda t: at + t * bend - (e * p * np.expm1(-inverse * np.log1p(t * p))).sum(), limit)  # noqa: B023
        else:
            t = 1.0
        y = y * (1 + t * p)
        if change <= 1e-15 or (change < 1e-6 and change >= before / 2):
            break
        before = change
    gains, target = U @ (y @ U), k * y**-inverse
    assert y.min() > 0
    assert (np.abs(gains - target) <= 1e-11 * target + 1e2 * LONG_EPS * y.sum()).all(), "FairGrad oracle"
    return y


def fairgrad(J: Array, alpha: float) -> Bargain:
    """w > 0 with G w = w^(-1/alpha). Below alpha = 1/2 the self-check may refuse rows whose scales differ by 1e16."""
    T, kept = len(J), live(J)
    if not kept.size:
        return Bargain(np.zeros(T), np.zeros(J.shape[1]), 0.0)
    full, n = unit_rows(J[kept])
    U = reduced(full)
    distance = float(np.linalg.norm(min_norm(U.astype(float))[1]))
    if distance <= INSIDE:
        return Bargain(np.zeros(T), np.zeros(J.shape[1]), distance)
    y = fairgrad_reduced(U, n, alpha)
    return Bargain(spread(np.asarray(y / n, dtype=float), kept, T), np.asarray(y @ full, dtype=float), distance)
