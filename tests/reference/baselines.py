"""Baselines without history on explicit task gradients. Rows of J are g_i; zero rows count as absent tasks.

Where squaring or cancelling would cost digits the work is done in long double (64 bits of mantissa on x86; where the
platform has no such type the same code runs in float64, and the self-checks widen with LONG_EPS).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from scipy.optimize import brentq

from reference.directions import INSIDE, gd
from reference.geometry import EXACT, Array, min_norm, nnls_polished, norms, project_on_dual_cone, shortest

LONG = np.longdouble
LONG_EPS = float(np.finfo(LONG).eps)
SPENT = 1e-10  # what is left of a unit gradient in the span of the others, when it is rounding and nothing else


def live(J: Array) -> Array:
    return np.flatnonzero(norms(J) > 0)


def spread(values: Array, kept: Array, T: int) -> Array:
    """Coefficients of the kept tasks, with 0 for the others."""
    out = np.zeros(T)
    out[kept] = values
    return out


def unit_rows(J: Array) -> tuple[Array, Array]:
    """(U, n) in long double: u_i = g_i / n_i."""
    rows = J.astype(LONG)
    n = np.array([np.sqrt(np.dot(g, g)) for g in rows])
    return np.array([g / size for g, size in zip(rows, n, strict=True)]), n


def reduced(J: Array) -> Array:
    """J in long double as [T, min(T, P)], up to a rotation of the parameter space (Householder reflections).

    Every row is perturbed relative to its own length only, so rows of any scale keep their digits.
    """
    T, P = J.shape
    A = J.T.astype(LONG)
    if P <= T:
        return A.T.copy()
    for k in range(T):
        v = A[k:, k].copy()
        length = np.sqrt(np.dot(v, v))
        if length == 0:
            continue
        v[0] += length if v[0] >= 0 else -length
        v = v / np.sqrt(np.dot(v, v))
        A[k:, k:] = A[k:, k:] - 2 * np.outer(v, np.dot(v, A[k:, k:]))
    return np.triu(A[:T]).T.copy()


def svd(J: Array) -> tuple[Array, Array]:
    """(Q, s): left singular vectors (columns) and singular values, s falling, by one-sided Jacobi rotations of rows.

    Unlike the bidiagonal algorithms this keeps small singular values of badly scaled rows to full relative accuracy.
    """
    W = reduced(J)
    T = len(W)
    R = np.eye(T, dtype=LONG)
    tiny = (1e-25 * float(norms(W).max())) ** 2
    for _ in range(60):
        turned = False
        for p in range(T - 1):
            for q in range(p + 1, T):
                a, b, c = np.dot(W[p], W[p]), np.dot(W[q], W[q]), np.dot(W[p], W[q])
                if min(a, b) <= tiny or abs(c) <= 8 * LONG_EPS * np.sqrt(a * b):
                    continue
                turned = True
                zeta = (b - a) / (2 * c)
                t = (1 if zeta >= 0 else -1) / (abs(zeta) + np.sqrt(1 + zeta * zeta))
                cos = 1 / np.sqrt(1 + t * t)
                for M in (W, R):
                    x, y = M[p].copy(), M[q].copy()
                    M[p], M[q] = cos * (x - t * y), cos * (t * x + y)
        if not turned:
            break
    else:
        raise AssertionError("Jacobi SVD: not converged")
    s = np.array([np.sqrt(np.dot(w, w)) for w in W])
    order = np.argsort(-s, kind="stable")
    assert np.abs(R @ R.T - np.eye(T)).max() <= 1e4 * LONG_EPS
    return R[order].T, s[order]


def resolved(s: Array, cutoff: float | None) -> int:
    """How many singular values count: s_k^2 > cutoff s_1^2. The default is what G in float64 can tell from 0."""
    return int((s**2 > (len(s) * 1e-15 if cutoff is None else cutoff) * s[0] ** 2).sum())


# Directions from the hull of the gradients


def mgda(J: Array, normalise: str = "none", losses: Sequence[float] | None = None) -> tuple[Array, Array]:
    """(w, d): min-norm weights of the normalised gradients, d = sum w_i g_i of the raw ones.

    Equal normalised gradients share their weight equally (any other split is a minimiser too, with another d).
    """
    kept = live(J)
    if not kept.size:
        return np.zeros(len(J)), np.zeros(J.shape[1])
    rows, n = J[kept], norms(J[kept])
    L = np.ones(len(kept)) if losses is None else np.asarray(losses, dtype=float)[kept]
    divisor = {"none": np.ones(len(kept)), "l2": n, "loss": L, "loss+": L * n}[normalise]
    scaled = np.array([g / size for g, size in zip(rows, divisor, strict=True)])
    found, _ = min_norm(scaled)
    w = []
    for g in scaled:
        same = [x for x, other in zip(found, scaled, strict=True) if np.abs(g - other).max() <= 1e-12 * np.abs(g).max()]
        w.append(sum(same) / len(same))
    return spread(np.array(w), kept, len(J)), gd(rows, np.array(w))


def sdmgrad(J: Array, lam: float) -> tuple[Array, Array]:
    """(w, d): w minimises ||g_w + lam g0|| over the simplex, the min-norm point of the rows g_i + lam g0."""
    kept = live(J)
    if not kept.size:
        return np.zeros(len(J)), np.zeros(J.shape[1])
    rows = J[kept].astype(LONG)
    g0 = sum(rows) / len(rows)
    shifted = np.array([np.asarray(g + lam * g0, dtype=float) for g in rows])
    w, v = min_norm(shifted)
    return spread(w, kept, len(J)), v / (1 + lam)


# Equal projections


def equal_projections(J: Array, cutoff: float | None = None) -> tuple[Array, Array, Array]:
    """(b, U, n): x = sum b_i u_i = pinv(U) 1, the shortest least-squares solution of u_i . x = 1."""
    U, n = unit_rows(J)
    Q, s = svd(U)
    r = resolved(s, cutoff)
    shares = np.array([Q[:, k].sum() for k in range(r)])
    if np.sqrt((shares**2).sum()) <= INSIDE * np.sqrt(len(J)):
        return np.zeros(len(J), dtype=LONG), U, n  # opposite gradients: 1 is orthogonal to everything U can reach
    b = sum(shares[k] / s[k] ** 2 * Q[:, k] for k in range(r))
    rest = 1 - U @ (b @ U)
    assert np.abs(Q[:, :r].T @ rest).max() <= 1e-11 + 1e3 * LONG_EPS * np.abs(b).sum(), "equal projections"
    return b, U, n


def imtl_g(J: Array, cutoff: float | None = None) -> tuple[Array, Array, float]:
    """(a, d, margin): sum a = 1 and u_i . d equal. margin = |sum v| / sum |v|, v_i = b_i / n_i; small: ill-posed."""
    kept = live(J)
    nothing = np.zeros(len(J)), np.zeros(J.shape[1]), 0.0
    if not kept.size:
        return nothing
    b, U, n = equal_projections(J[kept], cutoff)
    v = b / n
    total = v.sum()
    if not np.abs(v).sum() > 0 or abs(total) <= 1e-15 * np.abs(v).sum():
        return nothing
    d = np.asarray((b / total) @ U, dtype=float)
    return spread(np.asarray(v / total, dtype=float), kept, len(J)), d, float(abs(total) / np.abs(v).sum())


def config(J: Array, cutoff: float | None = None) -> Array:
    """ConFIG with the length sum_i g_i . x / ||x||."""
    kept = live(J)
    if not kept.size:
        return np.zeros(J.shape[1])
    b, U, n = equal_projections(J[kept], cutoff)
    x = b @ U
    size = np.sqrt(np.dot(x, x))
    if size == 0:
        return np.zeros(J.shape[1])
    x = x / size
    length = sum(n_i * np.dot(u, x) for u, n_i in zip(U, n, strict=True))
    return np.asarray(length * x, dtype=float)


# Spectral rules


def aligned_mtl(
    J: Array, scale: str = "min", preference: Sequence[float] | None = None, cutoff: float | None = None
) -> tuple[Array, Array]:
    """(a, d): a = B w, B J has all its singular values equal. "median" is the lower one of an even number."""
    kept = live(J)
    if not kept.size:
        return np.zeros(len(J)), np.zeros(J.shape[1])
    rows = J[kept]
    w = np.ones(len(kept)) if preference is None else np.asarray(preference, dtype=float)[kept]
    Q, s = svd(rows)
    r = resolved(s, cutoff)
    lam = s[:r] ** 2
    sigma = {"min": lam[-1], "median": np.sort(lam)[(r - 1) // 2], "rmse": lam.sum() / r}[scale]
    B = np.zeros((len(kept), len(kept)), dtype=LONG)
    for k in range(r):
        B += np.sqrt(sigma) / s[k] * np.outer(Q[:, k], Q[:, k])
    aligned = B @ rows.astype(LONG)
    # orthogonal principal directions, all of length sqrt(sigma)
    principal = Q[:, :r].T @ aligned
    off = principal @ principal.T - sigma * np.eye(r)
    assert np.abs(off).max() <= 1e-11 * sigma + 1e3 * LONG_EPS * lam[0], "Aligned-MTL oracle"
    a = B @ w
    return spread(np.asarray(a, dtype=float), kept, len(J)), np.asarray(a @ rows.astype(LONG), dtype=float)


def gdod(J: Array, tolerance: float = 1e-10, cutoff: float | None = None) -> Array:
    """Sum of the gradients along the right singular vectors v_k that no two tasks disagree on.

    u_i . v_k counts as 0 within the tolerance (on unit gradients: what g_i . v_k rounds to is a share of n_i).
    """
    kept = live(J)
    d = np.zeros(J.shape[1], dtype=LONG)
    if not kept.size:
        return d.astype(float)
    rows = J[kept].astype(LONG)
    Q, s = svd(J[kept])
    for k in range(resolved(s, cutoff)):
        v = (Q[:, k] @ rows) / s[k]
        # g_i . v_k is s_k Q_ik: the product itself cancels where the rows' lengths differ by many orders
        c = [s[k] * Q[i, k] / np.sqrt(np.dot(g, g)) for i, g in enumerate(rows)]
        if min(max(c), -min(c)) <= tolerance:
            d += s[k] * Q[:, k].sum() * v
    return d.astype(float)


def gdod_margins(J: Array, cutoff: float | None = None) -> tuple[float, float, float]:
    """How well posed gdod is: relative gap of singular values, largest side taken as 0, smallest not taken as 0.

    A side is min(max_i u_i . v_k, max_i -u_i . v_k); those at most 1e-10 are taken as 0.
    """
    rows = J[live(J)]
    Q, s = svd(rows)
    r = resolved(s, cutoff)
    gaps = [float(1 - s[k + 1] / s[k]) for k in range(min(r, len(s) - 1))]
    sides = []
    for k in range(r):
        c = Q[:, k] * s[k] / norms(rows)
        sides.append(max(0.0, float(min(c.max(), -c.min()))))
    zero, rest = [x for x in sides if x <= 1e-10], [x for x in sides if x > 1e-10]
    return min(gaps, default=1.0), max(zero, default=0.0), min(rest, default=1.0)


# Projections


def checked_projection(J: Array, g: Array) -> Array:
    """project_on_dual_cone with Moreau's conditions: d in the cone, g - d in its polar, both orthogonal."""
    d = project_on_dual_cone(J, g)
    size = np.sqrt(np.dot(g, g))
    if size == 0:
        return d
    units = np.array([row / n for row, n in zip(J, norms(J), strict=True) if n > 0])
    pull = (d - g) / size
    y = nnls_polished(units.T, pull)
    assert (units @ d / size).min() >= -1e-9, "dual cone: infeasible"
    assert abs(np.dot(pull, d / size)) <= 1e-9, "dual cone: not orthogonal"
    assert np.linalg.norm(units.T @ y - pull) <= 1e-9, "dual cone: outside the polar"
    return d


def shares(kept: Array, preference: Sequence[float] | None) -> Array:
    """Equal, or the given probabilities of the tasks that take part, divided by their sum."""
    p = np.ones(len(kept)) if preference is None else np.asarray(preference, dtype=float)[kept]
    return p / p.sum() if p.size else p


def upgrad(J: Array, preference: Sequence[float] | None = None) -> Array:
    kept = live(J)
    d = np.zeros(J.shape[1])
    for p, g in zip(shares(kept, preference), J[kept], strict=True):
        d += p * checked_projection(J[kept], g)
    return d


def dualproj(J: Array, preference: Sequence[float] | None = None) -> Array:
    kept = live(J)
    return checked_projection(J[kept], gd(J[kept], shares(kept, preference))) if kept.size else np.zeros(J.shape[1])


def gradops(J: Array, cutoff: float | None = None) -> Array:
    """g_i minus its projection on span{g_j, j != i} where g_i . g_j < 0 for some j, else g_i; summed."""
    kept = live(J)
    rows = J[kept]
    d = np.zeros(J.shape[1], dtype=LONG)
    units, n = unit_rows(rows) if kept.size else (rows, rows)
    units = units.astype(float)
    rcond = math.sqrt(len(kept) * 1e-15 if cutoff is None else cutoff)
    for i, g in enumerate(rows):
        others = [j for j in range(len(rows)) if j != i]
        if not any(np.dot(g, rows[j]) < 0 for j in others):
            d += g
            continue
        span = units[others].T
        rest = units[i]
        for _ in range(2):  # the second pass removes what rounding left of the first
            rest = rest - span @ np.linalg.lstsq(span, rest, rcond=rcond)[0]
        if np.sqrt(np.dot(rest, rest)) > SPENT:
            assert np.abs(span.T @ rest).max() <= EXACT + 2 * rcond * np.sqrt(len(kept)) * np.linalg.norm(rest)
            d += n[i] * rest
    return d.astype(float)


def least_cosine(J: Array) -> float:
    """min |cos(g_i, g_j)|: where it is near 0, rounding decides who conflicts and GradOPS jumps."""
    U = unit_rows(J[live(J)])[0]
    return min((float(abs(np.dot(U[i], U[j]))) for i in range(len(U)) for j in range(i)), default=1.0)


# ConicGrad


def conic_support(g: Array, h: Array, c: float) -> float:
    """max of g . d over the cap {||d|| <= 1, h . d >= c}."""
    along, size = np.dot(g, h), np.sqrt(np.dot(g, g))
    if along >= c * size:
        return float(size)
    across = g - along * h
    return float(c * along + math.sqrt(1 - c * c) * np.sqrt(np.dot(across, across)))


def conicgrad(J: Array, c: float) -> tuple[Array, float]:
    """(d, level): ||d|| = ||g0||, and d / ||d|| maximises min_i g_i . d over the cap {||d|| <= 1, h . d >= c}.

    h = g0 / ||g0||, level is the optimum; where it is positive the maximiser has length 1 and is unique. Else the
    maximiser nearest to h is taken and stretched to length 1: over the cone itself the supremum is 0, reached by d = 0.
    """
    kept = live(J)
    if not kept.size:
        return np.zeros(J.shape[1]), 0.0
    rows, n = J[kept], norms(J[kept])
    exact = rows.astype(LONG)
    g0 = sum(exact) / len(rows)
    length = float(np.sqrt(np.dot(g0, g0)))
    if length <= 1e-14 * n.max():
        return np.zeros(J.shape[1]), 0.0
    h = np.asarray(g0 / np.sqrt(np.dot(g0, g0)), dtype=float)
    s = math.sqrt(1 - c * c)
    units = np.array([g / size for g, size in zip(rows, n, strict=True)])
    share = n.min() / n
    along = units @ h
    if s == 0.0:
        return length * h, float((n * along).min())

    v = min_norm(rows)[1]
    inside = float(np.linalg.norm(min_norm(units)[1])) <= INSIDE
    if inside:  # 0 in the hull: no level above 0, and d = 0 lies in the cap of c = 0
        direction = checked_projection(rows, h)
        size = np.sqrt(np.dot(direction, direction))
        if size > INSIDE and np.dot(h, direction) >= (c - EXACT) * size:
            return length * direction / size, 0.0
        if c == 0:
            return np.zeros(J.shape[1]), 0.0
    else:
        size = np.sqrt(np.dot(v, v))
        if np.dot(h, v) >= (c - EXACT) * size:  # on the border both cases agree
            return length * v / size, float(size)

    # the cone binds: d = c h + s z, z orthogonal to h and at most 1 long
    basis = np.linalg.qr(units.T)[0] if units.shape[1] > len(rows) else np.eye(units.shape[1])
    across = np.array([u - np.dot(u, h) * h for u in units]) @ basis
    across[norms(across) <= 1e-13] = 0.0  # rounding of a gradient along h
    best: list[tuple[float, Array, Array]] = []

    def demands(level: float) -> tuple[Array, Array]:
        """across . z >= demands for g_i . d >= level n_min, and the tasks that a z of length 1 can fail."""
        values = (level * share - c * along) / s
        return values, np.flatnonzero(values > -1 - 1e-9)

    def excess(level: float) -> float:
        """How much longer than 1 the shortest z is."""
        values, binding = demands(level)
        found = shortest(across[binding], values[binding])
        if found is None or (across[binding] @ found[0] - values[binding]).min(initial=0.0) < -1e-10:
            return 1e6
        size = float(np.sqrt(np.dot(found[0], found[0])))
        if size <= 1 + 1e-13 and (not best or level >= best[0][0]):
            best[:] = [(level, found[0], spread(found[1], binding, len(rows)))]
        return size - 1

    low = float((c * along / share).min())
    high = 0.0 if inside else float((n / n.min() * (np.abs(along) + 1)).min()) + 1e-6
    low = min(low - 1e-13 * (1 + abs(low)), high)
    if excess(low) < 0 < excess(high):
        brentq(excess, low, high, xtol=1e-16, rtol=1e-15, maxiter=500)
    level, z, multipliers = best[0]
    d = c * h + s * (basis @ z)
    if np.dot(z, z) < 1 - 1e-9:  # no z at all reaches a higher level: use the weights that prove it
        values, binding = demands(level + 1e-9 * max(1.0, abs(level)))
        goal = np.append(np.zeros(across.shape[1]), 1.0)
        proof = nnls_polished(np.vstack([across[binding].T, values[binding]]), goal)
        multipliers = spread(proof, binding, len(rows))
    weights = multipliers / n
    bound = conic_support(gd(rows, weights / weights.sum()), h, c)
    for u, n_i in zip(units, n, strict=True):
        assert bound / n_i - np.dot(u, d) <= 1e-8 * max(1.0, abs(bound) / n_i), "ConicGrad oracle: not optimal"
    size = np.sqrt(np.dot(d, d))
    return (length * d / size if size > INSIDE else np.zeros(J.shape[1])), float(level * n.min())


# Per coordinate


def graddrop(J: Array, U: Array, leak: float | Sequence[float] = 0.0, slope: float = 1.0) -> Array:
    """U: one uniform number per coordinate."""
    T, P = J.shape
    keep = [float(leak)] * T if np.isscalar(leak) else list(leak)
    d = np.zeros(P)
    for k in range(P):
        size = sum(abs(J[i, k]) for i in range(T))
        if size == 0:
            continue
        purity = 0.5 * (1 + sum(J[i, k] for i in range(T)) / size)
        f = min(max(slope * (purity - 0.5) + 0.5, 0.0), 1.0)
        for i in range(T):
            mask = (f > U[k] and J[i, k] > 0) or (f < U[k] and J[i, k] < 0)
            d[k] += (keep[i] + (1 - keep[i]) * mask) * J[i, k]
    return d


# Loss weightings


def si(losses: Sequence[float]) -> list[float]:
    return [1 / loss for loss in losses]


def stch_objective(losses: Sequence[float], nadir: Sequence[float], mu: float = 1.0) -> float:
    """mu T log sum exp(log(L_i / nadir_i) / mu)."""
    x = [math.log(loss / best) / mu for loss, best in zip(losses, nadir, strict=True)]
    return mu * len(x) * (max(x) + math.log(sum(math.exp(v - max(x)) for v in x)))


def stch(losses: Sequence[float], nadir: Sequence[float], mu: float = 1.0) -> list[float]:
    """Derivative of the objective: T softmax(log(L / nadir) / mu) / L."""
    x = [math.log(loss / best) / mu for loss, best in zip(losses, nadir, strict=True)]
    e = [math.exp(v - max(x)) for v in x]
    return [len(e) * v / sum(e) / loss for v, loss in zip(e, losses, strict=True)]


def slope_of(f: Callable[[list[float]], float], at: Sequence[float], i: int, relative: float = 1e-3) -> float:
    """Partial derivative by a central difference of fourth order."""

    def moved(steps: int) -> float:
        point = list(at)
        point[i] += steps * h
        return f(point)

    h = relative * max(abs(at[i]), 1e-3)
    return (8 * (moved(1) - moved(-1)) - (moved(2) - moved(-2))) / (12 * h)
