"""Exact solvers for the T x T problems behind the methods, in float64.

Each works on the Gramian divided by the gradients' norms (the cosines), so that no result depends on the scale of a
gradient. All rest on one active-set solver, :func:`cone`. Arrays are NumPy: these problems are tiny, and NumPy's
cost per call is a third of PyTorch's.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = ["Cone", "ball", "cone", "min_norm", "norms_and_cosines", "projected"]

Array = NDArray[np.float64]

EPS = float(np.finfo(np.float64).eps)


class Cone(NamedTuple):
    """Solution of :func:`cone`.

    Attributes:
        y: ``[T]`` minimiser; where the problem is unbounded, a ray along which it falls for ever (sum 1).
        bounded: whether a minimiser exists.
        active: ``[T]`` bool, where ``y`` is free (positive).
        exact: False where the iteration cap was hit; ``y`` is then feasible but not optimal.
    """

    y: Array
    bounded: bool
    active: NDArray[np.bool_]
    exact: bool


def norms_and_cosines(gramian: Array) -> tuple[Array, Array]:
    """Norms ``[T]`` and cosines ``[T, T]`` of a Gramian without zero rows; the diagonal is exactly 1."""
    norms = np.sqrt(np.diagonal(gramian))
    cosine = gramian / norms[:, None] / norms[None, :]
    np.fill_diagonal(cosine, 1.0)
    return norms, cosine


def cone(cosine: Array, target: Array, start: NDArray[np.bool_] | None = None) -> Cone:
    """Minimise ``0.5 y'Cy - q'y`` over ``y >= 0``: the point of a polyhedral cone's dual closest to the origin.

    With unit vectors ``u_i`` and ``C = U U'``, ``d = U'y`` is the shortest vector with ``U d >= q``. An active-set
    method (Lawson and Hanson 1974, in Gramian form) that also handles dependent rows: a row inside the span of the
    active ones moves along the null direction until another row leaves, or for ever, in which case no ``d`` exists.

    Args:
        cosine: ``[T, T]`` positive semidefinite C with unit diagonal.
        target: ``[T]`` q, of any scale.
        start: ``[T]`` bool guess of the active set (a warm start).

    Returns:
        A :class:`Cone`; optimality holds up to rounding, row by row.
    """
    count = len(target)
    magnitude = np.abs(cosine)
    crowd = cosine.sum(1)  # breaks ties by who conflicts most, not by position
    y = np.zeros(count)
    active: list[int] = []
    if start is not None and start.any():
        guess = np.flatnonzero(start)
        solved, regular = _solve(cosine[np.ix_(guess, guess)], target[guess])
        if regular and solved.min() > 0:
            y[guess] = solved
            active = guess.tolist()
    rejected: set[int] = set()
    for _ in range(20 * count + 50):
        slack = target - cosine @ y
        noise = 8 * EPS * count * (np.abs(target) + magnitude @ y)
        candidate = slack > noise
        candidate[active] = False
        candidate[list(rejected)] = False
        if not candidate.any():
            return Cone(_even(cosine, target, y), True, y > 0, True)
        largest = slack[candidate].max()
        tied = candidate & (slack >= largest - noise)
        new = int(np.argmin(np.where(tied, crowd, math.inf)))
        before = y.copy()
        ray = _enter(cosine, target, y, active, new)
        if ray is not None:
            return Cone(ray, False, ray > 0, True)
        if np.array_equal(before, y):
            rejected.add(new)
        else:
            rejected.clear()
    return Cone(y, True, y > 0, False)


def _even(cosine: Array, target: Array, y: Array) -> Array:
    """The same minimiser with equal shares for rows that are copies of each other."""
    same = (cosine > 1 - 1e-13) & (np.abs(target[:, None] - target) <= 1e-10 * np.abs(target))
    if np.count_nonzero(same) == len(y):
        return y
    return np.asarray(same @ (y / same.sum(0)))


def _solve(matrix: Array, target: Array) -> tuple[Array, bool]:
    """Solution of a symmetric system, and whether the matrix was regular (else the least-squares solution)."""
    try:
        return np.asarray(np.linalg.solve(matrix, target), np.float64), True
    except np.linalg.LinAlgError:
        return np.asarray(np.linalg.lstsq(matrix, target, rcond=None)[0], np.float64), False


def _enter(cosine: Array, target: Array, y: Array, active: list[int], new: int) -> Array | None:
    """Let row ``new`` into the active set and minimise there, in place; a ray where that has no end."""
    index = np.array(active, dtype=np.intp)
    if len(index):
        against, regular = _solve(cosine[np.ix_(index, index)], cosine[index, new])
        size = 1 + float(np.abs(against).sum())
        # the cosines carry errors of about EPS, so the squared distance from the span carries EPS * size**2
        if not regular or 1 - cosine[index, new] @ against <= 64 * EPS * size**2:
            slope = target[new] - against @ target[index]
            if slope <= 256 * EPS * size * (abs(target[new]) + np.abs(against) @ np.abs(target[index])):
                return None  # nothing is gained along the null direction
            falling = against > 1e-10 * size
            if not falling.any():
                ray = np.zeros_like(y)
                ray[index], ray[new] = np.maximum(-against, 0), 1.0
                return np.asarray(ray / ray.sum())
            ratio = np.where(falling, y[index] / np.where(falling, against, 1.0), math.inf)
            first = int(np.argmin(ratio))
            y[new] += ratio[first]
            y[index] -= ratio[first] * against
            y[active.pop(first)] = 0.0
    active.append(new)
    while active:
        index = np.array(active, dtype=np.intp)
        best, _ = _solve(cosine[np.ix_(index, index)], target[index])
        if best.min() > 0:
            y[index] = best
            return None
        current = y[index]
        blocked = best <= 0
        falls = blocked & (current > best)
        step = np.where(falls, current / np.where(falls, current - best, 1.0), np.where(blocked, 0.0, math.inf))
        length = float(step.min())
        y[index] = current + length * (best - current)
        leaving = {int(i) for i in index[blocked & (step <= length)]}
        y[list(leaving)] = 0.0
        active[:] = [i for i in active if i not in leaving]
    return None


def min_norm(gramian: Array) -> tuple[Array, bool]:
    """Weights ``[T]`` on the simplex of the shortest vector in the convex hull of the gradients (MGDA's problem).

    Args:
        gramian: ``[T, T]``, any scale; a zero row takes all the weight.

    Returns:
        The weights, and whether they are exact. The shortest vector is ``J.T @ weights``.
    """
    zero = np.diagonal(gramian) <= 0
    if zero.any():
        return zero / zero.sum(), True
    if len(gramian) == 2:
        (a, b), (_, d) = gramian
        # each weight from its own numerator, so that neither loses digits beside the other
        pull = np.maximum(np.array([d - b, a - b]), 0.0)
        return (pull / pull.sum() if pull.sum() > 0 else np.array([0.5, 0.5])), True
    norms, cosine = norms_and_cosines(gramian)
    solution = cone(cosine, norms.min() / norms)
    weights = solution.y / (norms / norms.min())
    return weights / weights.sum(), solution.exact


def projected(gramian: Array, centre: Array) -> tuple[Array, bool]:
    """Coefficients ``[T]`` of the point closest to ``J.T @ centre`` that conflicts with no gradient.

    The projection of the centre on ``{d : J d >= 0}`` (DualProj; Quinton and Rey 2024).
    """
    return _level(gramian, centre, 0.0)


def _level(gramian: Array, centre: Array, level: float) -> tuple[Array, bool]:
    keep = np.diagonal(gramian) > 0
    part = gramian[np.ix_(keep, keep)]
    norms, cosine = norms_and_cosines(part)
    solution = cone(cosine, (level - (gramian @ centre)[keep]) / norms)
    result = centre.copy()
    result[keep] += solution.y / norms
    return result, solution.exact


def ball(gramian: Array, centre: Array, radius: float) -> tuple[Array, bool]:
    """Coefficients of the vector in a ball that improves the worst-off task most (CAGrad's problem).

    Maximises ``min_i g_i . d`` subject to ``||d - g0|| <= r`` with ``g0 = J.T @ centre`` and ``r = radius ||g0||``.
    Instead of the dual over the simplex this solves for the level ``v = min_i g_i . d``: the shortest step from
    ``g0`` to ``{d : J d >= v}`` is a :func:`cone` problem, its length grows with v, and on one active set it is the
    root of a quadratic. The active sets are walked by safeguarded Newton until the length is r. Where the gradients
    have 0 in their convex hull no level above 0 can be reached, and the walk ends at the projection of ``g0`` on
    ``{d : J d >= 0}``.

    Args:
        gramian: ``[T, T]``, any scale.
        centre: ``[T]`` weights of the ball's centre.
        radius: c, in units of the centre's length.

    Returns:
        Coefficients ``[T]`` and whether they are exact.
    """
    product = gramian @ centre
    squared = float(centre @ product)
    r = radius * math.sqrt(max(squared, 0.0))
    if r == 0:
        return centre.copy(), True
    keep = np.diagonal(gramian) > 0
    norms, cosine = norms_and_cosines(gramian[np.ix_(keep, keep)])
    pull = product[keep] / norms
    inverse = 1 / norms

    def step(level: float, start: NDArray[np.bool_] | None) -> Cone:
        return cone(cosine, level * inverse - pull, start)

    def finish(y: Array, exact: bool) -> tuple[Array, bool]:
        result = centre.copy()
        result[keep] += y / norms
        return result, exact

    low = float((product[keep]).min())
    high = float((product[keep] + r * norms).min())
    start = None
    if high > 0 and not (keep.all() and cone(cosine, norms.min() * inverse).bounded):
        high = 0.0
        at_zero = step(0.0, None)
        if at_zero.y @ cosine @ at_zero.y <= r * r:
            return finish(at_zero.y, at_zero.exact)
        start = at_zero.active
    level = high
    y = np.zeros_like(norms)
    exact = True
    for _ in range(100):
        solution = step(level, start)
        y, start, exact = solution.y, solution.active, solution.exact
        index = np.flatnonzero(start)
        if len(index) == 0:
            low = level
            level = (low + high) / 2
            continue
        sub = cosine[np.ix_(index, index)]
        both = np.linalg.solve(sub, np.stack([inverse[index], pull[index]], axis=1))
        slope = float(inverse[index] @ both[:, 0])
        base = float(inverse[index] @ both[:, 1]) / slope
        rest = float((pull[index] - base * inverse[index]) @ (both[:, 1] - base * both[:, 0]))
        root = base + math.sqrt(max(r * r - rest, 0.0) / slope)
        if abs(root - level) <= 16 * EPS * (abs(base) + abs(root) + r / math.sqrt(slope)):
            y = np.zeros_like(norms)
            y[index] = np.maximum(root * both[:, 0] - both[:, 1], 0.0)
            return finish(y, exact)
        if float(y @ cosine @ y) > r * r:
            high = level
        else:
            low = level
        level = root if low <= root <= high else (low + high) / 2
    return finish(y, False)
