"""Exact solvers for the T x T problems behind the methods, in float64, batched over blocks.

All work on the Gramian divided by the gradients' norms (the cosines), so that no result depends on the scale of a
gradient, and all take ``[B, T, T]`` arrays of NumPy or of PyTorch. NumPy, whose calls cost a third of PyTorch's on such
tiny problems, is what runs on the host: loops end as soon as every block meets its tolerance, and a block that a fast
pivoting scheme cannot certify goes through a slower one that copes with every degeneracy. PyTorch tensors stay on
their device: a fixed number of iterations, no decision that waits for the host (on CUDA, PyTorch's own ``eigh`` and
``pinv`` behind :func:`equal_products` and :func:`spectrum` do), and a flag for blocks left uncertified.

Optimality is checked, not assumed: a solution counts as exact when its KKT conditions hold up to rounding.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = [
    "EPS",
    "Array",
    "Cone",
    "Spectrum",
    "any_of",
    "ball",
    "bargain",
    "cone",
    "diagonal",
    "equal_products",
    "flip",
    "floor",
    "identity",
    "least",
    "like",
    "min_norm",
    "most",
    "namespace",
    "normalised",
    "on_simplex",
    "projected",
    "real",
    "restricted",
    "simplex_qp",
    "spectrum",
    "times",
    "total",
    "unit",
]

Array: TypeAlias = Any
"""A NumPy array or a PyTorch tensor; a function returns the kind it was given."""

EPS = float(np.finfo(np.float64).eps)


# ---------------------------------------------------------------------------------------------------------------------
# What NumPy and PyTorch do not call by one name


def namespace(array: Array) -> Any:
    """The module whose functions work on ``array``."""
    return torch if isinstance(array, Tensor) else np


def like(reference: Array, values: Any) -> Array:
    """``values`` as a float64 array of the kind, and on the device, of ``reference``."""
    if isinstance(reference, Tensor):
        return torch.as_tensor(values, dtype=torch.float64, device=reference.device)
    if isinstance(values, Tensor):
        return values.detach().cpu().double().numpy()
    return np.asarray(values, dtype=np.float64)


def identity(reference: Array) -> Array:
    """Bool ``[T, T]`` that is true on the diagonal, T the last dimension of ``reference``."""
    count = reference.shape[-1]
    return torch.eye(count, dtype=torch.bool, device=reference.device) if isinstance(reference, Tensor) else _eye(count)


@cache
def _eye(count: int) -> NDArray[np.bool_]:
    return np.eye(count, dtype=bool)


def real(mask: Array) -> Array:
    """A bool array as float64 zeros and ones (PyTorch's own arithmetic on bools ends in the default type)."""
    return mask.double() if isinstance(mask, Tensor) else mask * 1.0


def flip(array: Array) -> Array:
    """The last dimension reversed."""
    return array.flip(-1) if isinstance(array, Tensor) else array[..., ::-1]


def diagonal(matrix: Array) -> Array:
    """``[..., T]`` of ``[..., T, T]``."""
    return namespace(matrix).diagonal(matrix, 0, -2, -1)


def times(matrix: Array, vector: Array) -> Array:
    """Matrix times vector, per block."""
    return (matrix @ vector[..., None])[..., 0]


def total(array: Array) -> Array:
    """Sum over the last dimension, which is kept."""
    return array.sum(-1, keepdim=True) if isinstance(array, Tensor) else np.add.reduce(array, -1, keepdims=True)


def any_of(array: Array) -> Array:
    """Whether anything is true along the last dimension."""
    return array.any(-1) if isinstance(array, Tensor) else np.logical_or.reduce(array, -1)


def floor(array: Array, low: float) -> Array:
    """Nothing below ``low``."""
    return array.clamp_min(low) if isinstance(array, Tensor) else np.maximum(array, low)


def least(array: Array) -> Array:
    """Minimum over the last dimension."""
    return array.amin(-1) if isinstance(array, Tensor) else np.minimum.reduce(array, -1)


def most(array: Array) -> Array:
    """Maximum over the last dimension."""
    return array.amax(-1) if isinstance(array, Tensor) else np.maximum.reduce(array, -1)


def _positions(array: Array) -> Array:
    """0 to T - 1 along the last dimension."""
    count = array.shape[-1]
    return torch.arange(count, device=array.device) if isinstance(array, Tensor) else np.arange(count)


def _finished(done: Array) -> bool:
    """Whether all is true, so that work may be left out: known on the host only."""
    return not isinstance(done, Tensor) and np.count_nonzero(done) == done.size


def _linear(matrix: Array, right: Array) -> Array:
    if isinstance(matrix, Tensor):
        return torch.linalg.solve_ex(matrix, right)[0]
    try:
        return np.linalg.solve(matrix, right)
    except np.linalg.LinAlgError:
        jitter = 64 * EPS * matrix.shape[-1] * np.eye(matrix.shape[-1])
        return np.linalg.solve(matrix + jitter, right)


def unit(gramian: Array) -> tuple[Array, Array]:
    """Norms ``[B, T]`` and cosines ``[B, T, T]`` of the gradients behind a Gramian.

    A zero gradient has norm 1 here and is orthogonal to all others, so that no division fails.
    """
    xp = namespace(gramian)
    square = diagonal(gramian)
    norms = xp.sqrt(xp.where(square > 0, square, 1.0))
    cosine = gramian / norms[..., :, None] / norms[..., None, :]
    return norms, xp.where(identity(gramian), 1.0, floor(-floor(-cosine, -1.0), -1.0))


def restricted(gramian: Array, alive: Array) -> Array:
    """The Gramian with zero rows for tasks that do not take part."""
    if _finished(alive):
        return gramian
    return namespace(gramian).where(alive[..., :, None] & alive[..., None, :], gramian, 0.0)


def normalised(weights: Array, alive: Array) -> Array:
    """Weights ``[B, T]`` of the living tasks divided by their sum; equal where they are all zero."""
    xp = namespace(weights)
    if _finished(alive) and _finished(weights.sum(-1) > 0):
        return xp.broadcast_to(weights / total(weights), alive.shape)
    kept = xp.where(alive, weights, 0.0)
    kept = xp.where(total(kept) > 0, kept, real(alive))
    return kept / floor(total(kept), EPS**8)


# ---------------------------------------------------------------------------------------------------------------------
# Pivoting: solve on a guess of the active set, flip what has the wrong sign, until nothing has


class _Trial(NamedTuple):
    """What a guess of the active set gives: ``y`` [B, T], its slack (of inactive rows) and the noise in the slack."""

    y: Array
    slack: Array
    noise: Array


def _reduced(cosine: Array, right: Array, free: Array) -> Array:
    """``x`` [B, T, k] with ``C x = right`` on the free rows and 0 elsewhere."""
    if isinstance(cosine, Tensor) or free.shape[-1] <= 16 or _finished(free):
        return _masked(cosine, right, free)
    if len(free) == 1:
        held = np.flatnonzero(free)
        result = np.zeros_like(right)
        sub = cosine[0][held[:, None], held]
        result[0, held] = _masked(sub[None], right[:, held], _everything(len(held)))[0]
        return result
    # the active sets are often much smaller than T, and the cost grows with the cube
    size = max(int(free.sum(-1).max()), 1)
    order = np.argsort(~free, -1, kind="stable")[:, :size]
    here = np.take_along_axis(free, order, -1)
    block = np.arange(len(free))[:, None] if len(cosine) > 1 else np.zeros((len(free), 1), dtype=int)
    sub = cosine[block[:, :, None], order[:, :, None], order[:, None, :]]
    packed = _masked(sub, np.take_along_axis(right, order[..., None], 1), here)
    result = np.zeros_like(right)
    np.put_along_axis(result, order[..., None], packed, 1)
    return result


@cache
def _everything(count: int) -> NDArray[np.bool_]:
    return np.ones((1, count), dtype=bool)


def _masked(cosine: Array, right: Array, free: Array) -> Array:
    xp = namespace(cosine)
    if _finished(free):
        wanted, matrix = right, cosine
    else:
        wanted = free[..., None] * right
        matrix = xp.where(identity(free), 1.0, (free[..., :, None] & free[..., None, :]) * cosine)
    singular: Array = 1.0
    if xp is np:
        try:
            return np.linalg.solve(matrix, wanted)
        except np.linalg.LinAlgError:  # no other block of the batch may feel it
            singular = (np.linalg.slogdet(np.broadcast_to(matrix, (len(free), *matrix.shape[1:])))[0] == 0)[
                :, None, None
            ]
    # a tiny addition makes duplicates solvable (they share equally); one refinement takes its effect on others out
    raised = matrix + 16 * EPS * free.shape[-1] * singular * real(identity(free))
    first = _linear(raised, wanted)
    return first + _linear(raised, wanted - matrix @ first)


def _pivot(free: Array, evaluate: Callable[[Any, Array], _Trial], cap: int) -> tuple[Array, Array]:
    """Block principal pivoting (Judice and Pires 1994): ``y`` [B, T], and which blocks are feasible and complementary.

    ``evaluate(rows, free)`` solves the blocks at ``rows``. All wrong signs are flipped at once; where that stops making
    progress three times, one at a time (Murty), which ends for every regular problem.
    """
    xp = namespace(free)
    if xp is np and len(free) == 1:
        return _pivot_one(free, evaluate, cap)
    host = xp is np
    y = xp.zeros_like(free, dtype=xp.float64)
    solved = xp.zeros_like(free[:, 0])
    rows: Any = np.arange(len(free)) if host else slice(None)
    fewest = xp.full_like(y[:, 0], free.shape[-1] + 1.0)
    patience = xp.full_like(fewest, 3.0)
    place = _positions(free)
    for k in range(cap):
        trial = evaluate(rows, free)
        wrong = xp.where(free, ~(trial.y >= 0), trial.slack < -trial.noise)
        bad = any_of(wrong)
        y[rows] = trial.y
        solved[rows] = ~bad
        if host:
            if not bad.any():
                break
            if not bad.all():
                rows, free, wrong, fewest, patience = rows[bad], free[bad], wrong[bad], fewest[bad], patience[bad]
        if k < 4:  # most are done by then, and need no counting
            free = free ^ wrong
            continue
        count = real(wrong).sum(-1)
        better = count < fewest
        patience = xp.where(better, 3.0, patience - 1)
        fewest = xp.where(better, count, fewest)
        last = most(xp.where(wrong, place, -1))
        change = wrong & ((patience >= 0)[:, None] | (place == last[:, None]))
        free = free ^ change
    finite = xp.isfinite(y).all(-1)
    return xp.where(finite[:, None], y, 0.0), solved & finite


def _pivot_one(free: Array, evaluate: Callable[[Any, Array], _Trial], cap: int) -> tuple[Array, Array]:
    """:func:`_pivot` for a single block on the host, where the bookkeeping would cost more than the solves."""
    fewest, patience = free.shape[-1] + 1, 3
    for _ in range(cap):
        trial = evaluate(slice(None), free)
        wrong = np.where(free, ~(trial.y >= 0), trial.slack < -trial.noise)
        count = int(np.count_nonzero(wrong))
        if not count:
            return trial.y, np.ones(1, dtype=bool)
        if count < fewest:
            fewest, patience = count, 3
        else:
            patience -= 1
        if patience < 0:
            wrong[0, : np.flatnonzero(wrong[0])[-1]] = False
        free = free ^ wrong
    return (trial.y if np.isfinite(trial.y).all() else np.zeros_like(trial.y)), np.zeros(1, dtype=bool)


def _cap(count: int) -> int:
    return 40 + 2 * count


class Cone(NamedTuple):
    """Solution of :func:`cone`.

    Attributes:
        y: ``[B, T]`` minimiser; where the problem is unbounded, a ray along which it falls for ever (sum 1).
        bounded: ``[B]`` bool, whether a minimiser exists.
        exact: ``[B]`` bool, whether the KKT conditions hold up to rounding.
    """

    y: Array
    bounded: Array
    exact: Array


def cone(cosine: Array, target: Array) -> Cone:
    """Minimise ``0.5 y'Cy - q'y`` over ``y >= 0``: non-negative least squares in Gramian form.

    With unit vectors ``u_i`` and ``C = U U'``, ``d = U'y`` is the shortest vector with ``U d >= q``: the projection of
    the origin on a polyhedron, and for ``q = -U g`` the correction that projects ``g`` on the cone ``{d : U d >= 0}``.

    Args:
        cosine: ``[B, T, T]`` (or ``[1, T, T]`` for all) positive semidefinite C with unit diagonal.
        target: ``[B, T]`` q, of any scale. A row with ``q_i <= 0`` that is orthogonal to all others stays at 0.
    """
    xp = namespace(cosine)
    shared = len(cosine) == 1
    count = target.shape[-1]
    size = xp.abs(target)

    def noise_of(y: Array, q: Array) -> Array:  # cosines are at most 1
        return 8 * EPS * count * (q + total(xp.abs(y)))

    def evaluate(rows: Any, free: Array) -> _Trial:
        matrix = cosine if shared else cosine[rows]
        y = _reduced(matrix, target[rows][..., None], free)[..., 0]
        return _Trial(y, times(matrix, y) - target[rows], noise_of(y, size[rows]))

    with np.errstate(all="ignore"):  # a bad guess may overflow; what counts is checked below
        y, solved = _pivot(_guess(cosine, target), evaluate, _cap(count))
    noise = noise_of(y, size)
    residual = xp.where(y > 0, xp.abs(times(cosine, y) - target), 0.0)
    # a solution so long that its rounding is seen beside the target may be a ray in disguise
    sure = (most(noise) <= 1e-3 * most(size)) & (most(residual) <= 1e-9 * most(size))
    fine = solved & ~any_of((residual > noise) | (y < 0)) & sure
    if _finished(fine):
        return Cone(_even(cosine, target, y), fine, fine)
    positive = floor(y, 0.0)
    ray = positive / floor(total(positive), EPS**8)
    endless = ~fine & ~any_of(xp.abs(times(cosine, ray)) > 16 * EPS * count) & (most(positive) > 0)
    endless = endless & ((ray * target).sum(-1) > 256 * EPS * (ray * xp.abs(target)).sum(-1))
    y = xp.where(endless[:, None], ray, positive)
    if not isinstance(y, Tensor):
        for b in np.flatnonzero(~(fine | endless)):
            y[b], bounded, fine[b] = _active_set(cosine[0 if shared else b], target[b])
            endless[b] = not bounded
    return Cone(_even(cosine, target, y), ~endless, fine | endless)


def _guess(cosine: Array, target: Array) -> Array:
    """Where to start pivoting; for many large problems with one matrix, a few accelerated gradient steps pay."""
    if isinstance(cosine, Tensor) or len(cosine) > 1 or len(target) < 16:
        return target > 0
    matrix = cosine[0]
    rate = 1 / max(float(np.abs(matrix).sum(1).max()), 1.0)
    y = np.maximum(target, 0.0)
    before, ahead = y, y
    for k in range(40):
        y = np.maximum(ahead + rate * (target - ahead @ matrix), 0.0)
        ahead = y + k / (k + 3) * (y - before)
        before = y
    return y > 0


def _even(cosine: Array, target: Array, y: Array) -> Array:
    """The same minimiser with equal shares for rows that are copies of each other."""
    xp = namespace(cosine)
    copies = cosine > 1 - 1e-13
    if isinstance(cosine, np.ndarray) and np.count_nonzero(copies) == cosine.shape[0] * cosine.shape[1]:
        return y  # every row is a copy of itself alone
    close = xp.abs(target[..., :, None] - target[..., None, :]) <= 1e-10 * xp.abs(target[..., :, None])
    same = real(copies & close | identity(cosine))
    return times(same, y / same.sum(-2))


def _active_set(cosine: NDArray[np.float64], target: NDArray[np.float64]) -> tuple[NDArray[np.float64], bool, bool]:
    """:func:`cone` for one block by adding one row at a time (Lawson and Hanson 1974): slower, copes with everything.

    A row inside the span of the active ones moves along the null direction until another row leaves, or for ever, in
    which case no minimiser exists.

    Returns:
        ``y``, whether a minimiser exists, and whether it is exact.
    """
    count = len(target)
    magnitude = np.abs(cosine)
    crowd = cosine.sum(1)  # breaks ties by who conflicts most, not by position
    y = np.zeros(count)
    active: list[int] = []
    rejected: set[int] = set()
    for _ in range(20 * count + 50):
        slack = target - cosine @ y
        noise = 8 * EPS * count * (np.abs(target) + magnitude @ y)
        candidate = slack > noise
        candidate[active] = False
        candidate[list(rejected)] = False
        if not candidate.any():
            return y, True, True
        largest = slack[candidate].max()
        tied = candidate & (slack >= largest - noise)
        new = int(np.argmin(np.where(tied, crowd, math.inf)))
        before = y.copy()
        ray = _enter(cosine, target, y, active, new)
        if ray is not None:
            return ray, False, True
        if np.array_equal(before, y):
            rejected.add(new)
        else:
            rejected.clear()
    return y, True, False


def _solve_one(matrix: Array, target: Array) -> tuple[Array, bool]:
    """Solution of a symmetric system, and whether the matrix was regular (else the least-squares solution)."""
    try:
        return np.asarray(np.linalg.solve(matrix, target), np.float64), True
    except np.linalg.LinAlgError:
        return np.asarray(np.linalg.lstsq(matrix, target, rcond=None)[0], np.float64), False


def _enter(cosine: Array, target: Array, y: Array, active: list[int], new: int) -> Array | None:
    """Let row ``new`` into the active set and minimise there, in place; a ray where that has no end."""
    index = np.array(active, dtype=np.intp)
    if len(index):
        against, regular = _solve_one(cosine[np.ix_(index, index)], cosine[index, new])
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
        best, _ = _solve_one(cosine[np.ix_(index, index)], target[index])
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


# ---------------------------------------------------------------------------------------------------------------------
# Weights on the simplex


def min_norm(gramian: Array, alive: Array) -> tuple[Array, Array]:
    """Weights ``[B, T]`` on the simplex of the shortest vector in the convex hull of the gradients (MGDA's problem).

    Args:
        gramian: ``[B, T, T]``, any scale; a zero row among the living takes all the weight.
        alive: ``[B, T]`` bool, the tasks that take part.

    Returns:
        The weights, and whether each block is exact. The shortest vector is ``J.T @ weights``.
    """
    xp = namespace(gramian)
    gramian = restricted(gramian, alive)
    square = diagonal(gramian)
    norms, cosine = unit(gramian)
    zero = alive & (square <= 0)
    if gramian.shape[-1] == 2:
        # each weight from its own numerator, so that neither loses digits beside the other
        pull = floor(flip(square) - gramian[..., 0, 1][..., None], 0.0)
        weights = normalised(pull, alive)
        exact = weights[..., 0] >= 0
    else:
        shortest = least(xp.where(alive, norms, math.inf))[..., None]
        inverse = xp.where(xp.isfinite(shortest), shortest, 1.0) / norms
        solution = cone(cosine, xp.where(alive, inverse, -1.0))
        weights, exact = normalised(solution.y * inverse, alive), solution.exact
    return xp.where(any_of(zero)[..., None], normalised(real(zero), zero), weights), exact


def simplex_qp(cosine: Array, linear: Array, shares: Array) -> tuple[Array, Array]:
    """Minimise ``0.5 y'Cy + b'y`` over ``y >= 0`` with ``a'y = 1``; a non-zero minimiser exists for every C >= 0.

    Args:
        cosine: ``[B, T, T]`` positive semidefinite with unit diagonal.
        linear: ``[B, T]`` b.
        shares: ``[B, T]`` a, positive; 0 leaves a row out.

    Returns:
        ``y``, and whether each block is exact.
    """
    xp = namespace(cosine)
    count = linear.shape[-1]
    alive = shares > 0
    apart = identity(cosine)

    def noise_of(y: Array, rows: Any, level: Array) -> Array:  # cosines are at most 1
        return 8 * EPS * count * (xp.abs(linear[rows]) + xp.abs(level) * shares[rows] + total(xp.abs(y)))

    def evaluate(rows: Any, free: Array) -> _Trial:
        matrix, b, a = cosine[rows], linear[rows], shares[rows]
        best = xp.where(a > 0, b / xp.where(a > 0, a, 1.0), math.inf)
        free = xp.where(any_of(free)[:, None], free, best <= least(best)[:, None])
        both = _reduced(matrix, xp.stack([a, b], -1), free)
        level = (1 + total(a * both[..., 1])) / total(a * both[..., 0])
        y = level * both[..., 0] - both[..., 1]
        return _Trial(y, xp.where(a > 0, times(matrix, y) + b - level * a, 1.0), noise_of(y, rows, level))

    with np.errstate(all="ignore"):  # a bad guess may overflow; what counts is checked below
        y, solved = _pivot(alive, evaluate, _cap(count))
        product = times(cosine, y) + linear
        level = total(y * product)  # at the optimum: the multiplier, for a'y = 1
        lag = level * shares - product
        wrong = alive & (xp.where(y > 0, xp.abs(lag), lag) > 4 * noise_of(y, slice(None), level))
        exact = solved & ~any_of(wrong | (y < 0)) & (xp.abs((y * shares).sum(-1) - 1) < 1e-9)
    if not isinstance(y, Tensor):
        for b in np.flatnonzero(~exact):
            # shifting every row by one vector turns the linear term into the shortest point of a hull
            a = np.where(alive[b], shares[b], 1.0)
            w = linear[b] / a
            scaled = cosine[b] / a[:, None] / a
            lift = w[:, None] + w
            lowest = float(np.linalg.eigvalsh(scaled + lift)[0])
            matrix = scaled + lift + max(-lowest, 0.0) * count + np.abs(lift).max()
            matrix = np.where(alive[b][:, None] & alive[b], matrix, np.where(apart, 1.0, 0.0))
            weights, certain = min_norm(matrix[None], alive[b][None])
            y[b], exact[b] = weights[0] / a, certain[0]
    return floor(y, 0.0), exact


def on_simplex(point: Array, alive: Array) -> Array:
    """Euclidean projection of ``[B, T]`` on the simplex of the living tasks (Held, Wolfe and Crowder 1974)."""
    xp = namespace(point)
    low = xp.where(alive, point, -math.inf)
    # measured from the largest, so that no 1 is lost beside a huge entry
    top = most(low)[..., None]
    point = point - xp.where(xp.isfinite(top), top, 0.0)
    low = xp.where(alive, point, -math.inf)
    ordered = flip(torch.sort(low, -1)[0] if isinstance(low, Tensor) else np.sort(low, -1))
    held = xp.where(xp.isfinite(ordered), ordered, 0.0)
    number = _positions(point) + 1.0
    excess = (xp.cumsum(held, -1) - 1) / number
    kept = (ordered > excess) & xp.isfinite(ordered)
    last = most(xp.where(kept, _positions(point), 0))[..., None]
    level = (xp.where(_positions(point) == last, excess, 0.0)).sum(-1)[..., None]
    return xp.where(alive, floor(point - level, 0.0), 0.0)


# ---------------------------------------------------------------------------------------------------------------------
# The dual cone and the ball


def projected(gramian: Array, points: Array, alive: Array) -> tuple[Array, Array]:
    """Coefficients ``[B, K, T]`` of the points closest to ``J.T @ points[k]`` that conflict with no gradient.

    The projections on the cone ``{d : J d >= 0}`` (UPGrad and DualProj; Quinton and Rey 2024).

    Args:
        gramian: ``[B, T, T]``, any scale.
        points: ``[B, K, T]`` coefficients of the vectors to project.
        alive: ``[B, T]`` bool, the tasks that count.
    """
    xp = namespace(gramian)
    blocks, number, count = points.shape
    along = points @ gramian
    norms, cosine = unit(restricted(gramian, alive))
    along = along / norms[:, None, :]
    target = xp.where(alive[:, None, :], -along, -1.0).reshape(blocks * number, count)
    many = cosine if blocks == 1 else xp.broadcast_to(cosine[:, None], (blocks, number, count, count))
    solution = cone(many if blocks == 1 else many.reshape(-1, count, count), target)
    step = solution.y.reshape(blocks, number, count) / norms[:, None, :]
    return points + step, solution.exact.reshape(blocks, number).all(-1)


def ball(gramian: Array, pull: Array, radius: Array, alive: Array) -> tuple[Array, Array]:
    """Coefficients ``[B, T]`` of the step in a ball that improves the worst-off task most (CAGrad's problem).

    Maximises ``min_i (p_i + g_i . x)`` over ``||x|| <= r``; of several maximisers the shortest. Instead of the dual
    over the simplex this solves for the level ``v`` of the minimum: the shortest ``x`` with ``p_i + g_i . x >= v`` is a
    :func:`cone` problem, its length grows with v, and on one active set the level with length r is the root of a
    quadratic. Where the gradients have 0 in their convex hull the level is bounded, and the answer may be shorter
    than r.

    Args:
        gramian: ``[B, T, T]``, any scale; a zero row caps the level at its pull.
        pull: ``[B, T]`` p.
        radius: ``[B]`` r.
        alive: ``[B, T]`` bool, the tasks that count.

    Returns:
        Coefficients of ``x``, and whether each block is exact.
    """
    xp = namespace(gramian)
    count = gramian.shape[-1]
    moving = alive & (diagonal(gramian) > 0)
    norms, cosine = unit(restricted(gramian, alive))
    size = xp.where(radius > 0, radius, 1.0)[:, None]
    along, ceiling = pull / norms / size, xp.full_like(radius, math.inf)  # in units of the radius, on unit gradients
    if _finished(moving):
        inverse = least(norms)[:, None] / norms
    else:
        shortest = least(xp.where(moving, norms, math.inf))[:, None]
        shortest = xp.where(xp.isfinite(shortest), shortest, 1.0)
        # a row that takes no part has any level at once; a zero row caps it
        inverse = xp.where(moving, shortest / norms, 0.0)
        ceiling = least(xp.where(alive & ~moving, pull / shortest / size, math.inf))
        along = xp.where(moving, along, 1e300)

    def evaluate(rows: Any, free: Array) -> _Trial:
        matrix, inv, p = cosine[rows], inverse[rows], along[rows]
        if not _finished(any_of(free)):
            lowest = p / xp.where(inv > 0, inv, 1e-300)
            free = xp.where(any_of(free)[:, None], free, lowest <= least(lowest)[:, None])
        both = _reduced(matrix, xp.stack([inv, free * p], -1), free)
        a, g = both[..., 0], both[..., 1]
        slope = total(inv * a)
        base = total(inv * g) / slope
        rest = total((free * p - base * inv) * (g - base * a))
        root = base + xp.sqrt(floor(1 - rest, 0.0) / slope)
        y = root * a - g
        reach = root * inv
        noise = 8 * EPS * count * (xp.abs(p) + xp.abs(reach) + total(xp.abs(y)))  # cosines are at most 1
        return _Trial(y, times(matrix, y) + p - reach, noise)

    with np.errstate(all="ignore"):  # a bad guess may overflow; what counts is checked below
        # everyone who would be behind if the worst-off task alone were helped
        reach = least((along + 1) / inverse)[:, None]
        y, solved = _pivot(along <= inverse * reach, evaluate, 8 if xp is np else _cap(count))
        length = (y * times(cosine, y)).sum(-1)
        # where huge coefficients cancel, rounding passes for length
        sure = (32 * EPS * count) * xp.abs(y).sum(-1) ** 2 <= 1e-9
        exact = solved & (xp.abs(length - 1) <= 1e-9) & sure
        if not _finished(ceiling == math.inf):
            level = (y * (times(cosine, y) + xp.where(inverse > 0, along, 0.0))).sum(-1) / (y * inverse).sum(-1)
            exact = exact & (level <= ceiling)
    done = any_of(moving) & (radius > 0)
    if isinstance(y, Tensor):
        # the cases that the host treats one by one: a level that is bounded by the hull or by a zero row
        y, exact = _bounded_level(cosine, inverse, along, moving, ceiling, floor(y, 0.0), exact)
    elif not exact.all():
        for b in np.flatnonzero(~exact & done):
            held = np.flatnonzero(moving[b])
            part, certain = _walk(cosine[b][held[:, None], held], inverse[b, held], along[b, held], float(ceiling[b]))
            y[b] = 0.0
            y[b, held], exact[b] = part, certain
    return xp.where(done[:, None], y * size / norms, 0.0), exact | ~done


def _bounded_level(
    cosine: Array, inverse: Array, along: Array, moving: Array, ceiling: Array, y: Array, exact: Array
) -> tuple[Array, Array]:
    """On the device: where no level above ``top`` exists, the shortest step that reaches ``top``."""
    xp = namespace(cosine)
    along = xp.where(moving, along, 0.0)
    top = xp.minimum(least(xp.where(moving, (along + 1) / xp.where(moving, inverse, 1.0), math.inf)), ceiling)
    top = xp.where(xp.isfinite(top), top, 0.0)
    blur = EPS * most(xp.abs(xp.where(moving, along / xp.where(moving, inverse, 1.0), 0.0)))
    for turn in range(8):
        found = cone(cosine, xp.where(moving, top[:, None] * inverse - along, -1.0))
        # a convex combination of the gradients that is 0 bounds the level by the same combination of the pulls
        ray = xp.where(found.bounded[:, None], 0.0, found.y)
        bound = (ray * along).sum(-1) / floor((ray * inverse).sum(-1), EPS**8)
        top = xp.where(found.bounded, top, xp.minimum(bound, top - 2.0**turn * blur))  # as in _walk
    reached = found.bounded & ((found.y * times(cosine, found.y)).sum(-1) <= 1) & ~exact
    return xp.where(reached[:, None], found.y, y), exact | (reached & found.exact)


def _walk(
    cosine: NDArray[np.float64], inverse: NDArray[np.float64], pull: NDArray[np.float64], ceiling: float
) -> tuple[NDArray[np.float64], bool]:
    """One block of :func:`ball` by a safeguarded walk over the level; copes with every degeneracy."""

    # one row at a time: its active sets are independent, so that the level's quadratic has a solution
    def step(level: float) -> tuple[NDArray[np.float64], bool, bool]:
        return _active_set(cosine, level * inverse - pull)

    def finish(y: NDArray[np.float64], level: float, exact: bool) -> tuple[NDArray[np.float64], bool]:
        return _even(cosine[None], (level * inverse - pull)[None], y[None])[0], exact

    low = float((pull / inverse).min())
    high = min(float(((pull + 1) / inverse).min()), ceiling)
    blur = EPS * float(np.abs(pull / inverse).max())
    for _ in range(10 + 2 * len(pull)):
        y, bounded, exact = step(high)
        if bounded:
            break
        # a convex combination of the gradients that is 0 bounds the level by the same combination of the pulls, which
        # is known to rounding: a level on the bound itself may pass for one above it
        high = min(high - blur, float(y @ pull) / float(y @ inverse))
        blur *= 2
    else:
        return np.zeros_like(pull), False
    if y @ cosine @ y <= 1:
        return finish(y, high, exact)
    level = high
    for _ in range(100):
        index = np.flatnonzero(y)
        if len(index) == 0:
            low = level
            level = (low + high) / 2
            y, _, exact = step(level)
            continue
        sub = cosine[np.ix_(index, index)]
        both, _ = _solve_one(sub, np.stack([inverse[index], pull[index]], axis=1))
        slope = float(inverse[index] @ both[:, 0])
        base = float(inverse[index] @ both[:, 1]) / slope
        rest = float((pull[index] - base * inverse[index]) @ (both[:, 1] - base * both[:, 0]))
        root = base + math.sqrt(max(1 - rest, 0.0) / slope)
        if abs(root - level) <= 16 * EPS * (abs(base) + abs(root) + 1 / math.sqrt(slope)):
            y = np.zeros_like(y)
            y[index] = np.maximum(root * both[:, 0] - both[:, 1], 0.0)
            return finish(y, root, exact)
        if float(y @ cosine @ y) > 1:
            high = level
        else:
            low = level
        level = root if low <= root <= high else (low + high) / 2
        y, _, exact = step(level)
    return finish(y, level, False)


# ---------------------------------------------------------------------------------------------------------------------
# Bargaining


def bargain(cosine: Array, rate: Array, power: float, alive: Array) -> tuple[Array, Array]:
    """``y > 0`` with ``C y = p y**(-s)``: Nash bargaining (s = 1) and alpha-fair utilities (s = 1 / alpha).

    The minimum of the convex function ``0.5 y'Cy - sum_i p_i U(y_i)`` with ``U' = y**(-s)``, by Newton's method with
    backtracking. It has no minimum where some ``y >= 0`` has ``C y = 0`` (Pareto-stationary gradients): their ``y``
    would grow for ever while they cancel each other, and is set to 0.

    Args:
        cosine: ``[B, T, T]`` positive semidefinite with unit diagonal.
        rate: ``[B, T]`` p > 0.
        power: s > 0.
        alive: ``[B, T]`` bool; the others get 0.

    Returns:
        ``y`` [B, T], and whether the equation holds up to rounding.
    """
    xp = namespace(cosine)
    rate = xp.where(alive, rate, 1.0)
    whole = _finished(alive)
    matrix = cosine if whole else xp.where(alive[:, :, None] & alive[:, None, :] | identity(cosine), cosine, 0.0)
    with np.errstate(all="ignore"):  # overshooting steps are taken back
        alone = rate if power == 1 else rate ** (1 / (1 + power))  # the answer for orthogonal gradients
        # scaling the start to its best length takes most of Newton's way
        grown = floor((alone * times(matrix, alone)).sum(-1), EPS)
        length = ((rate * alone ** (1 - power)).sum(-1) / grown) ** (1 / (1 + power))
        start = alone * xp.clip(length, 1e-4, 1e4)[:, None]
        # then each coordinate goes most of its own way
        behind = xp.clip(times(matrix, start) * start**power / rate, 0.1, 10.0)
        start = start / (xp.sqrt(behind) if power == 1 else behind ** (1 / (1 + power)))
        y, exact, sure = _newton(matrix, rate, power, start, 0.0)
        if not _finished(sure):
            stationary = ~cone(matrix, 2 * real(alive) - 1).bounded & ~sure
            if not _finished(~stationary):
                ridge = 1e-14
                again = _newton(matrix, rate, power, start, ridge)[0]
                # gradients that only cancel each other are left out, they would add rounding alone
                endless = again > alone * ridge ** (-0.5 / (1 + power))
                y = xp.where(stationary[:, None], xp.where(endless, 0.0, again), y)
                exact = exact | stationary
    return (y if whole else xp.where(alive, y, 0.0)), exact


def _newton(matrix: Array, rate: Array, power: float, start: Array, ridge: float) -> tuple[Array, Array, Array]:
    """``y``, whether the equation holds up to rounding, and whether rounding is small beside its terms."""
    xp = namespace(matrix)
    count = start.shape[-1]
    eye = real(identity(matrix))
    if ridge:
        matrix = matrix + ridge * eye
    y = start
    done = y[:, 0] < 0
    before = xp.full_like(y[:, 0], math.inf)
    for _ in range(60):
        force = rate / y if power == 1 else rate * y ** (-power)
        gap = force - times(matrix, y)
        step = _linear(matrix + eye * (power * force / y)[..., None], gap[..., None])[..., 0]
        relative = most(xp.abs(step / y))
        length: Array = 1.0
        if not _finished(relative < 0.3):
            # as far as positive, then back until the slope along the step is not steeper upwards than it was down
            length = floor(1.05 * most(-step / y), 1.0) ** -1
            slope = (gap * step).sum(-1)
            for _ in range(6):
                trial = y + length[:, None] * step
                over = ((rate * trial ** (-power) - times(matrix, trial)) * step).sum(-1) < -0.9 * slope
                if _finished(~over):
                    break
                length = xp.where(over, length / 2, length)
            length = length[:, None]
        y = y + length * (step if len(y) == 1 else xp.where(done[:, None], 0.0, step))
        # Newton squares small steps; where they no longer shrink they are rounding
        done = done | (relative < xp.where(relative < before / 2, 1e-7, 1e-4))
        if _finished(done):
            break
        before = relative
    force = rate / y if power == 1 else rate * y ** (-power)
    noise = 32 * EPS * count * (force + total(y))  # cosines are at most 1
    return y, (xp.abs(force - times(matrix, y)) <= noise).all(-1), (noise <= 0.1 * force).all(-1)


# ---------------------------------------------------------------------------------------------------------------------
# Spectra


def equal_products(cosine: Array, alive: Array) -> Array:
    """``x`` [B, T] of least length with ``C x`` as close to 1 as possible on the living rows: ``pinv(C) 1``."""
    xp = namespace(cosine)
    values, vectors = _eigh(xp.where(alive[:, :, None] & alive[:, None, :], cosine, 0.0))
    kept = values > 8 * EPS * cosine.shape[-1] * floor(most(values), 1.0)[..., None]
    inside = times(xp.swapaxes(vectors, -1, -2), real(alive))
    return times(vectors, xp.where(kept, inside / xp.where(kept, values, 1.0), 0.0))


def _eigh(matrix: Array) -> tuple[Array, Array]:
    found = namespace(matrix).linalg.eigh(matrix)
    return found[0], found[1]


class Spectrum(NamedTuple):
    """Singular value decomposition of the gradients, ``J = V S W'``, seen through their Gramian.

    Attributes:
        lengths: ``[B, T]`` singular values, in no particular order.
        left: ``[B, T, T]`` left singular vectors V, in columns.
        kept: ``[B, T]`` bool, True for the numerical rank, which is decided on the cosines.
        back: ``[B, T, T]``: ``a = back @ c`` are the coefficients of ``sum_k c_k w_k``, w_k right singular vectors.
    """

    lengths: Array
    left: Array
    kept: Array
    back: Array


def spectrum(gramian: Array) -> Spectrum:
    """Singular values and vectors of the gradients behind a Gramian.

    Everything carries the relative accuracy of the *cosines*, however uneven the gradients' norms are: unlike LAPACK's
    eigenvalues, whose errors are relative to the largest one. One-sided Jacobi rotations on a Cholesky factor (Demmel
    and Veselic 1992) where the norms differ by more than 100, and on a device, else LAPACK.
    """
    if isinstance(gramian, Tensor):
        return _jacobi(gramian)
    count = gramian.shape[-1]
    norms, _ = unit(gramian)
    alive = diagonal(gramian) > 0
    longest = np.where(alive, norms, 0.0).max(-1)
    wide = longest > 100 * np.where(alive, norms, math.inf).min(-1)
    scale = np.where(longest > 0, longest, 1.0)
    values, left = np.linalg.eigh(gramian / scale[:, None, None] ** 2)
    kept = values > 8 * EPS * count * np.maximum(values[:, -1:], EPS)
    lengths = np.sqrt(np.where(kept, values, 0.0)) * scale[:, None]
    back = left * np.where(kept, 1 / np.where(kept, lengths, 1.0), 0.0)[:, None, :]
    if wide.any():
        lengths[wide], left[wide], kept[wide], back[wide] = _jacobi(gramian[wide])
    return Spectrum(lengths, left, kept, back)


def _jacobi(gramian: Array) -> Spectrum:
    """Jacobi rotations on ``G = F F'``, F the norms times a pivoted Cholesky factor of the cosines."""
    xp = namespace(gramian)
    count = gramian.shape[-1]
    norms, cosine = unit(gramian)
    alive = diagonal(gramian) > 0
    scale = most(xp.where(alive, norms, 0.0))[:, None]
    scale = xp.where(scale > 0, scale, 1.0)
    rest = xp.where(alive[:, :, None] & alive[:, None, :], cosine, 0.0)
    # largest gradients first, then what is left of the cosines: columns are then graded, and Jacobi is quick
    priority = xp.where(alive, norms / scale, 0.0)
    columns = []
    place = _positions(norms)
    for _ in range(count):
        left = diagonal(rest)
        score = xp.where(left > 16 * EPS * count, left * priority**2, 0.0)
        usable = most(score)[:, None] > 0
        at = xp.argmax(score, -1)[:, None] == place
        pivot = xp.where(usable, total(xp.where(at, left, 0.0)), 1.0)
        column = xp.where(usable, times(rest, real(at)) / xp.sqrt(pivot), 0.0)
        columns.append(column)
        rest = rest - column[:, :, None] * column[:, None, :]
        rest = xp.where(usable[:, :, None] & (at[:, :, None] | at[:, None, :]), 0.0, rest)
    lower = xp.stack(columns, -1)
    turned, turns = _orthogonalised(lower * priority[:, :, None])
    lengths = xp.sqrt((turned**2).sum(-2))
    kept = lengths > 0
    vectors = turned / xp.where(kept, lengths, 1.0)[:, None, :]
    # J' = (rotated parameters) F': the way back goes through the well-conditioned factor of the cosines
    back = xp.swapaxes(xp.linalg.pinv(lower, 1e-12), -1, -2) @ turns / norms[:, :, None]
    return Spectrum(lengths * scale, vectors, kept, xp.where(kept[:, None, :], back, 0.0))


@cache
def _rounds(count: int, device: torch.device | None) -> list[tuple[Array, Array]]:
    """Every pair of columns once, T / 2 disjoint ones at a time, as indices that lie where they are used."""
    even = count + count % 2
    ring, rounds = list(range(even)), []
    for _ in range(even - 1):
        pairs = [(ring[k], ring[even - 1 - k]) for k in range(even // 2)]
        pairs = [(min(p), max(p)) for p in pairs if max(p) < count]
        ring = [ring[0], ring[-1], *ring[1:-1]]
        index = np.array(pairs).T
        rounds.append(tuple(index) if device is None else tuple(torch.as_tensor(index, device=device)))
    return rounds


def _orthogonalised(factor: Array) -> tuple[Array, Array]:
    """``factor @ turns`` with orthogonal columns, and the rotations; T / 2 disjoint pairs of columns at a time."""
    xp = namespace(factor)
    count = factor.shape[-1]
    turns = xp.zeros_like(factor) + real(identity(factor))
    if count == 1:
        return factor, turns
    rounds = _rounds(count, None if xp is np else factor.device)
    for _ in range(30):
        worst = 0.0
        for i, j in rounds:
            x, y = factor[:, :, i], factor[:, :, j]
            a, b, c = (x * x).sum(-2), (y * y).sum(-2), (x * y).sum(-2)
            bound = xp.sqrt(a) * xp.sqrt(b)
            turn = xp.abs(c) > EPS * bound
            if xp is np:
                worst = max(worst, float((np.abs(c) / np.where(bound > 0, bound, 1.0)).max()))
                if not turn.any():
                    continue
            safe = xp.where(turn, c, 1.0)
            zeta = (b - a) / (2 * safe)
            root = xp.where(
                xp.abs(zeta) > 1e150, 2 * xp.abs(zeta), xp.abs(zeta) + xp.sqrt(1 + xp.clip(zeta, -1e150, 1e150) ** 2)
            )
            t = (2 * real(zeta >= 0) - 1) / root
            t = xp.where(turn, t, 0.0)
            cos = 1 / xp.sqrt(1 + t * t)
            sin = cos * t
            for matrix in (factor, turns):
                x, y = matrix[:, :, i], matrix[:, :, j]
                matrix[:, :, i], matrix[:, :, j] = (
                    cos[:, None] * x - sin[:, None] * y,
                    sin[:, None] * x + cos[:, None] * y,
                )
        if xp is np and worst <= 8 * EPS * count:
            break
    return factor, turns
