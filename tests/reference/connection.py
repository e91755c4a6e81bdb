"""Connection strength by explicit loops over channels: who owns an output channel, and the projection of phase 2."""

from __future__ import annotations

import numpy as np

from reference.geometry import Array


def conv_rows(W: Array, groups: int = 1) -> list[Array]:
    """Weights that enter each output channel of W [out, in / groups, *kernel]."""
    return [W[p].ravel() for p in range(W.shape[0])]


def transposed_rows(W: Array, groups: int = 1) -> list[Array]:
    """Weights that enter each output channel of a transposed convolution, W [in, out / groups, *kernel]."""
    inputs, outputs = W.shape[0] // groups, W.shape[1]
    rows = []
    for group in range(groups):
        for o in range(outputs):
            rows.append(np.concatenate([W[group * inputs + q, o].ravel() for q in range(inputs)]))
    return rows


def columns(W: Array) -> list[Array]:
    """Weights that leave each input channel of a linear layer W [out, in] (task norm before the layer)."""
    return [W[:, q] for q in range(W.shape[1])]


def strength(rows: list[Array], gamma: Array, variance: Array | None, eps: float = 1e-5) -> Array:
    """Eq. 6, 7 for one task: gamma_p^2 / (Var_p + eps) * sum of squares, normalised (variance None: LayerNorm)."""
    S = []
    for p, row in enumerate(rows):
        s = 0.0
        for value in row:
            s += float(value) ** 2
        S.append(float(gamma[p]) ** 2 * s / (1.0 if variance is None else float(variance[p]) + eps))
    total = sum(S)
    return np.array([value / total if total > 0 else 0.0 for value in S])


def owners(strengths: list[Array]) -> list[int]:
    """Eq. 10 with ties to the first task; strengths: one array per task."""
    chosen = []
    for p in range(len(strengths[0])):
        best = 0
        for i in range(1, len(strengths)):
            if strengths[i][p] > strengths[best][p]:
                best = i
        chosen.append(best)
    return chosen


def phase_two(rows: list[list[Array]], owner: list[int]) -> list[Array]:
    """rows[i][p]: gradient of task i on channel p. Returns the sum after every group was projected on its owner."""
    T, P = len(rows), len(owner)
    out = [sum(rows[i][p] for i in range(T)) for p in range(P)]
    if len(set(owner)) == 1:
        return out  # one task owns the layer: the official code leaves it alone
    for i in sorted(set(owner)):
        group = [p for p in range(P) if owner[p] == i]
        v = [np.concatenate([rows[j][p] for p in group]) for j in range(T)]
        total = v[i].copy()
        for j in range(T):
            if j != i:
                t = np.dot(v[j], v[i])
                total = total + (v[j] - t / np.dot(v[i], v[i]) * v[i] if t < 0 else v[j])
        start = 0
        for p in group:
            out[p] = total[start : start + len(rows[0][p])]
            start += len(rows[0][p])
    return out
