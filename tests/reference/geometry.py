"""The two convex problems behind most methods, solved on the vectors themselves and checked before they are returned.

Both are reduced to non-negative least squares (Lawson and Hanson, "Solving Least Squares Problems", ch. 23), which
never forms the Gramian, so the oracle keeps the digits that squaring the gradients loses.
"""

from __future__ import annotations

from itertools import combinations

import numpy as np
from scipy.optimize import nnls

Array = np.ndarray
EXACT = 1e-11  # relative optimality residual an oracle accepts from itself: eps times a generous condition of 1e5


def norms(J: Array) -> Array:
    return np.array([np.sqrt(np.dot(g, g)) for g in J])


def nnls_polished(A: Array, b: Array) -> Array:
    """argmin ||A y - b|| over y >= 0; the support NNLS found is solved once more by orthogonal factorisation."""
    y, _ = nnls(A, b, maxiter=100 * A.shape[1] + 100)
    support = np.flatnonzero(y > 0)
    if support.size:
        z = np.linalg.lstsq(A[:, support], b, rcond=1e-13)[0]
        if z.min() >= 0:
            candidate = np.zeros_like(y)
            candidate[support] = z
            if np.linalg.norm(A @ candidate - b) <= np.linalg.norm(A @ y - b):
                return candidate
    return y


def min_norm(J: Array) -> tuple[Array, Array]:
    """(w, g_w): the point of smallest norm in the convex hull of the rows, and weights that reach it.

    For a fixed direction of y >= 0 the best length of  ||J^T y||^2 + (1.y - 1)^2  leaves  q / (1 + q)  with
    q = ||g_w||^2, so the non-negative least squares problem and the simplex problem have the same minimiser after y is
    divided by its sum.
    The unknowns are y_i n_i / n_min, which keeps every column of length about one whatever the row scales.
    """
    n = norms(J)
    if n.min() == 0.0:
        w = (n == 0).astype(float)
        return w / w.sum(), np.zeros(J.shape[1])
    units = np.array([g / size for g, size in zip(J, n, strict=True)])
    share = n.min() / n
    y = nnls_polished(np.vstack([units.T, share]), np.append(np.zeros(J.shape[1]), 1.0))
    y = y / np.dot(share, y)
    v = units.T @ y  # g_w / n_min
    excess = units @ v - share * np.dot(v, v)  # KKT: g_i . g_w >= ||g_w||^2, equality on the support
    assert excess.min() >= -EXACT * y.sum(), "min-norm oracle: not optimal"
    assert abs(np.dot(y, excess)) <= EXACT * y.sum() ** 2, "min-norm oracle: complementarity"
    return y * share, n.min() * v


def min_norm_by_enumeration(J: Array) -> Array:
    """The same point for a few rows: the nearest point of every face's affine hull, if inside the face."""
    best = min(J, key=lambda g: np.dot(g, g))
    for size in range(2, len(J) + 1):
        for face in combinations(range(len(J)), size):
            base, edges = J[face[0]], np.array([J[i] - J[face[0]] for i in face[1:]])
            t = np.linalg.lstsq(edges.T, -base, rcond=1e-12)[0]
            if t.min() >= 0 and t.sum() <= 1:
                point = base + edges.T @ t
                if np.dot(point, point) < np.dot(best, best):
                    best = point
    return best


def shortest(units: Array, levels: Array) -> tuple[Array, Array] | None:
    """(x, multipliers): the shortest x with units @ x >= levels, x = sum_i multipliers_i units_i; None without any."""
    if levels.max(initial=-1.0) <= 0:
        return np.zeros(units.shape[1]), np.zeros(len(units))
    E = np.vstack([units.T, levels])
    f = np.append(np.zeros(units.shape[1]), 1.0)
    y = nnls_polished(E, f)
    r = E @ y - f
    if -r[-1] <= 1e-12:
        return None
    multipliers = y / -r[-1]
    support = np.flatnonzero(multipliers > 0)
    x = np.linalg.lstsq(units[support], levels[support], rcond=1e-13)[0]
    if not (units @ x - levels).min() >= -1e-9 * (1 + np.linalg.norm(x)):
        x = units.T @ multipliers
    return x, multipliers


def project_on_dual_cone(J: Array, g: Array) -> Array:
    """The point of {d : J d >= 0} nearest to g."""
    n = norms(J)
    units = np.array([row / size for row, size in zip(J, n, strict=True) if size > 0])
    size = np.sqrt(np.dot(g, g))
    if size == 0.0 or not len(units):
        return g.copy()
    found = shortest(units, -(units @ (g / size)))
    assert found is not None  # d = 0 is always feasible
    return g + size * found[0]
