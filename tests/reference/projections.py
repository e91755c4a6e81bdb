"""PCGrad and wPCGrad with the random order given by the caller, and every result a random order can give."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import permutations, product

import numpy as np

from reference.geometry import Array

SPENT = 1e-7  # a reference this small against its own raw gradient is a rounding remainder of a gradient projected away


def pcgrad(J: Array, orders: Sequence[Sequence[int]]) -> Array:
    """orders[i]: the other tasks in the order in which p_i meets them. The reference is always the raw gradient."""
    return sum(pcgrad_one(J, i, orders[i]) for i in range(len(J)))


def pcgrad_one(J: Array, i: int, order: Sequence[int]) -> Array:
    p = J[i].copy()
    for j in order:
        assert j != i
        t = np.dot(p, J[j])
        if t < 0:
            p = p - t / np.dot(J[j], J[j]) * J[j]
    return p


def pcgrad_results(J: Array) -> Array:
    """All results [number, P] over every choice of one order per task."""
    T = len(J)
    each = [[pcgrad_one(J, i, order) for order in permutations([j for j in range(T) if j != i])] for i in range(T)]
    results = [np.zeros(J.shape[1])]
    for choices in each:
        distinct: list[Array] = []
        for p in choices:
            if not any(np.linalg.norm(p - q) <= 1e-13 * np.linalg.norm(p) for q in distinct):
                distinct.append(p)
        results = [d + p for d, p in product(results, distinct)]
    return np.array(results)


def wpcgrad(J: Array, order: Sequence[int], mode: str = "sequence") -> Array:
    """order: tasks as drawn; each in turn is the reference that the others are projected against."""
    v = [g.copy() for g in J]
    for i in order[:1] if mode == "anchor" else order:
        ref = J[i].copy() if mode == "sequence_original" else v[i].copy()
        if np.linalg.norm(ref) <= SPENT * np.linalg.norm(J[i]):
            continue
        for j in range(len(J)):
            t = np.dot(v[j], ref)
            if j != i and t < 0:
                v[j] = v[j] - t / np.dot(ref, ref) * ref
    return sum(v)


def wpcgrad_results(J: Array, mode: str = "sequence") -> Array:
    return np.array([wpcgrad(J, order, mode) for order in permutations(range(len(J)))])


def plackett_luce(p: Array) -> dict[tuple[int, ...], float]:
    """Probability of every order of sampling without replacement."""
    law = {}
    for order in permutations(range(len(p))):
        chance, left = 1.0, 1.0
        for i in order:
            chance *= p[i] / left
            left -= p[i]
            if left <= 0:
                break
        law[order] = chance
    return law
